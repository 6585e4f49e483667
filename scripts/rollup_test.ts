// Rollups held against a recount: random work, refreshers at once, pieces, kills, retention.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { migrated, random, ready } from "./testing.ts";

/** Three monthly partitions and a default one, rolled up; without what was there before. */
const SAMPLES = `
  select pgpulse.drop_rollup(rollup) from pgpulse.rollups where rollup = 'samples';
  drop table if exists samples;
  create table samples (
      id bigserial,
      machine text not null,
      zone int,
      value float8,
      at timestamptz not null
  ) partition by range (at);
  create table samples_2026_01 partition of samples for values from ('2026-01-01Z') to ('2026-02-01Z');
  create table samples_2026_02 partition of samples for values from ('2026-02-01Z') to ('2026-03-01Z');
  create table samples_rest partition of samples default;
  create index on samples (machine, at);
  select pgpulse.add_rollup('samples', 'at', measures => array['value', 'zone * 2 as double'],
      keys => array['machine', 'zone'])`;

/** Rows of the view that a count from scratch does not give, and the other way round. */
export async function differences(sql: postgres.ISql): Promise<postgres.RowList<postgres.Row[]>> {
  return await sql`
    with expected as (
        select
            steps.step,
            date_bin(steps.step, at, '2000-01-01Z') as time,
            machine,
            zone,
            count(*) as points,
            avg(v) as value_avg,
            min(v) as value_min,
            max(v) as value_max,
            sum(v) as value_sum,
            count(v) as value_count,
            (array_agg(v order by at, v) filter (where v is not null))[1] as value_first,
            (array_agg(v order by at desc, v desc) filter (where v is not null))[1] as value_last,
            sum(zone * 2)::float8 as double_sum
        from (
            select *, case when abs(value) <= 1e300 then value end as v
            from samples
            where at between '1900-01-01Z' and '2200-01-01Z'
        ) s, (values (interval '1 minute'), ('1 hour'), ('1 day')) as steps (step)
        group by 1, 2, 3, 4
    ), found as (
        select step, time, machine, zone, points, value_avg, value_min, value_max, value_sum,
            value_count, value_first, value_last, double_sum
        from rollup.samples
        where step > '0'
    )
    (select 'missing' as what, * from (table expected except all table found) e)
    union all
    (select 'wrong', * from (table found except all table expected) f)
    limit 5`;
}

/** One random statement: values are eighths, so that sums are exact in any order. */
function work(chance: () => number): string {
  const pick = (n: number) => Math.floor(chance() * n);
  const at = () =>
    chance() < 0.02
      ? ["'infinity'", "'-infinity'", "'1969-12-31Z'", "'9999-01-01Z'"][pick(4)]
      : `timestamptz '2026-01-25Z' + interval '1 second' * ${pick(12 * 86400)}`;
  const value = () =>
    chance() < 0.05 ? ["'NaN'", "'infinity'", "null", "1e305"][pick(4)] : `${pick(8000) / 8}`;
  const row = () =>
    `('${["a", "b", "it''s"][pick(3)]}', ${["null", "1", "2"][pick(3)]}, ${value()}, ${at()})`;
  const few = () => `id in (select id from samples offset ${pick(400)} limit ${1 + pick(6)})`;
  const kind = chance();
  if (kind < 0.6) {
    const rows = Array.from({ length: 1 + pick(40) }, row);
    return `insert into samples (machine, zone, value, at) values ${rows}`;
  }
  if (kind < 0.65) {
    return `insert into samples_2026_02 (machine, value, at)
    select machine, value, at from samples where at >= '2026-02-01Z' and at < '2026-02-03Z' limit 5`;
  }
  if (kind < 0.75) return `update samples set value = ${value()} where ${few()}`;
  if (kind < 0.8) return `update samples set at = ${at()}, zone = 2 where ${few()}`;
  if (kind < 0.85) return `update samples_2026_01 set value = value + 1 where ${few()}`;
  if (kind < 0.95) return `delete from samples where ${few()}`;
  if (kind < 0.99) return `delete from samples_rest where ${few()}`;
  return "truncate samples_rest";
}

/** Refreshes in pieces until no more is left; returns the rows of each piece. */
const pieces = async (sql: postgres.ISql, most: number): Promise<number[]> => {
  const sizes: number[] = [];
  for (let more = true; more;) {
    const rows = await sql`select * from pgpulse.refresh_rollups('samples', ${most})`;
    deepStrictEqual(rows.map(({ fault }) => fault).filter(Boolean), []);
    sizes.push(...rows.map(({ added }) => Number(added)));
    more = rows.some((row) => row.more);
  }
  return sizes;
};

const refresh = async (sql: postgres.ISql, most = 2_000_000) =>
  (await pieces(sql, most)).reduce((sum, n) => sum + n, 0);

Deno.test("rollups", async (t) => {
  await using server = await migrated();

  await t.step("10,000 random writes leave what a recount gives", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    const chance = random(4);
    let rows = 0;
    for (let i = 0; i < 1200; i++) {
      const undone = chance() < 0.05;
      // Some statements roll back, and some come several in a transaction.
      await sql.begin(async (tx) => {
        do await tx.unsafe(work(chance)); while (chance() < 0.1);
        if (undone) throw "undo";
      }).catch((error) => {
        if (error !== "undo") throw error;
      });
      if (i % 60 === 0) {
        rows += await refresh(sql, i % 120 ? 300 : undefined);
        deepStrictEqual([...await differences(sql)], [], `after ${i} statements`);
      }
    }
    ok(rows > 10_000, `${rows} rows`);
  });

  await t.step("three writers, two refreshers: a recount finds no difference", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    let done = false;
    let refreshed = 0;
    const chance = random(7);
    const writer = async () => {
      while (!done) {
        await sql.begin(async (tx) => {
          await tx.unsafe(work(chance).replace("truncate", "delete from"));
          await tx`select pg_sleep(${chance() / 30})`;
          await tx.unsafe(work(chance).replace("truncate", "delete from"));
          // Writers may meet in a deadlock, or one moves another's row to the next partition.
        }).catch((error) => match(error.code, /^(40P01|40001)$/, error.message));
      }
    };
    const refresher = async (most?: number) => {
      const own = postgres(server.url, { max: 1 });
      while (!done) refreshed += await refresh(own, most);
      await own.end();
    };
    const all = [writer(), writer(), writer(), refresher(), refresher(60)];
    await new Promise((wait) => setTimeout(wait, 5000));
    done = true;
    await Promise.all(all);
    ok(refreshed > 0);
    await refresh(sql);
    deepStrictEqual([...await differences(sql)], []);
  });

  await t.step(
    "a refresh that is ended midway loses nothing and counts nothing twice",
    async () => {
      for (const [i, pause] of [20, 100, 250, 60, 150].entries()) {
        const sql = postgres(server.url, { max: 1 });
        if (i === 0) await sql.unsafe(SAMPLES).simple();
        await sql`insert into samples (machine, value, at)
        select 'm' || i % 9, i / 8.0, '2026-01-30Z'::timestamptz + i * interval '7 seconds'
        from generate_series(1, 20000) i`;
        await sql`delete from samples where id % 50 = 0`;
        const [{ pid }] = await sql`select pg_backend_pid() as pid`;
        const end = sql`select * from pgpulse.refresh_rollups()`.then(() => "done", () => "killed");
        await new Promise((wait) => setTimeout(wait, pause));
        // PostgreSQL restarts all its sessions when one is killed, as after a crash.
        if (i < 3) Deno.kill(pid, "SIGKILL");
        else await server.sql`select pg_terminate_backend(${pid})`;
        strictEqual(await end, "killed");
        await ready(server.url);
        await sql.end({ timeout: 1 });
        const again = postgres(server.url, { max: 1 });
        await refresh(again);
        deepStrictEqual([...await differences(again)], []);
        await again.end();
      }
    },
  );

  await t.step("inserts show in the view at once, before any refresh", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    const chance = random(5);
    for (let i = 0; i < 30; i++) {
      await sql.unsafe(`insert into samples (machine, zone, value, at)
        select 'm' || i % 3, nullif(i % 4, 0), i / 8.0,
            '2026-01-31Z'::timestamptz + i * interval '${1 + Math.floor(chance() * 90)} seconds'
        from generate_series(1, 100) i`);
      deepStrictEqual([...await differences(sql)], []);
      if (i % 7 === 0) await sql`select pgpulse.refresh_rollups()`;
    }
  });

  await t.step(
    "partitions made, attached, truncated, purged, dropped; a restore elsewhere",
    async () => {
      const { sql } = server;
      const run = (text: string) => sql.unsafe(text).simple();
      /** Sums of the days of a machine in the view, after a refresh. */
      const days = async (machine: string) => {
        await refresh(sql);
        const rows = await sql`select value_sum from rollup.samples
        where step = '1 day' and machine = ${machine} order by time, value_sum`;
        return rows.map(({ value_sum }) => value_sum);
      };
      await run(SAMPLES);
      await run(`insert into samples (machine, value, at) values
      ('a', 1, '2026-01-05 10:00:00Z'), ('a', 3, '2026-01-05 10:00:30Z')`);
      deepStrictEqual(await days("a"), [4]);

      await run(`create table samples_2026_03 partition of samples
      for values from ('2026-03-01Z') to ('2026-04-01Z')`);
      await run(
        `create table attached (id bigint not null default 0, machine text not null, zone int,
      value float8, at timestamptz not null, tx bigint)`,
      );
      await run(`insert into attached values
      (1, 'b', null, 5, '2026-04-05Z', null), (1, 'b', null, 7, '2026-04-05Z', 12)`);
      await run(`alter table samples attach partition attached
      for values from ('2026-04-01Z') to ('2026-05-01Z')`);
      // The first refresh finds the new partition, the second counts what is in it.
      await refresh(sql);
      deepStrictEqual(await days("b"), [12]);
      await run(
        "delete from attached where value = 5; insert into attached values (2, 'b', 1, 9, '2026-04-05Z')",
      );
      deepStrictEqual(await days("b"), [7, 9]);

      // Retention and DROP keep what was rolled up; a late row is added to it.
      await sql.begin(async (tx) => {
        await tx`set local pgpulse.keep_rollups = on`;
        await tx`delete from samples_2026_01`;
      });
      await run("drop table attached");
      deepStrictEqual(await days("a"), [4]);
      deepStrictEqual(await days("b"), [7, 9]);
      await run("insert into samples (machine, value, at) values ('a', 4, '2026-01-05 10:00:40Z')");
      deepStrictEqual(await days("a"), [8]);
      // Unless somebody asks for a recount.
      await run("select pgpulse.recount_rollup('samples', '2026-01-01Z', '2026-02-01Z')");
      deepStrictEqual(await days("a"), [4]);
      await run("truncate samples_2026_01");
      deepStrictEqual(await days("a"), []);

      // A dump restored elsewhere: transaction numbers mean nothing, some lie in the future.
      await run(
        `insert into samples (machine, value, at) values ('c', 1, '2026-02-05Z'), ('c', 2, '2026-02-06Z')`,
      );
      deepStrictEqual(await days("c"), [1, 2]);
      await run(
        "update pgpulse.rollups set cluster = 1, rolled_tx = 9e15; update samples set tx = 8e15 where value = 2",
      );
      deepStrictEqual(await days("c"), [1, 2]);
      deepStrictEqual(await days("b"), [7, 9]);

      await run("select pgpulse.drop_rollup('samples')");
      deepStrictEqual([
        ...await sql`
      select tgname::text from pg_trigger where tgname like 'pgpulse\\_rollup\\_samples%'
      union all
      select relname from pg_class
      where relnamespace = 'rollup'::regnamespace and relname like 'samples%'
      union all
      select attname from pg_attribute where attrelid = 'samples'::regclass and attname = 'tx'`,
      ], []);
    },
  );

  await t.step("rows that are moved ahead of all others, and others that come there", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    for (const day of [1, 2, 3]) {
      await sql`insert into samples (machine, value, at) values ('a', ${day}, '2026-01-05Z')`;
      await refresh(sql);
      await sql`update samples set at = '2026-02-01Z'::timestamptz + ${day} * interval '1 day'`;
      await refresh(sql);
      await sql`insert into samples (machine, value, at)
        values ('a', 7, '2026-02-01Z'::timestamptz + ${day} * interval '1 day')`;
      await refresh(sql);
      deepStrictEqual([...await differences(sql)], []);
    }
  });

  await t.step("a rollup that fails says why and holds up no other; rights", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    await sql`create table docs (doc jsonb, at timestamptz)`;
    await sql`select pgpulse.add_rollup('docs', 'at', measures => array[${"doc->>'cpu' as cpu"}])`;
    await sql`insert into docs values ('{"cpu": "much"}', '2026-01-05Z'), ('{"cpu": "4"}', '2026-01-06Z')`;
    await sql`insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`;

    const asServer = postgres(server.urlFor("server", "server"), { max: 1 });
    const asGrafana = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
    try {
      const [docs, samples] = await asServer`
        select * from pgpulse.refresh_rollups() where rollup in ('docs', 'samples')`;
      match(docs.fault, /invalid input syntax for type double precision: "much"/);
      strictEqual(samples.fault, null);
      const kept = await asGrafana`select fault from pgpulse.rollups where rollup = 'docs'`;
      match(kept[0].fault, /much/);

      // Only that row is left out, of a recount of its day too, and only once is it told.
      deepStrictEqual([docs.added, docs.recounted, docs.more], ["1", "0", false]);
      match(docs.fault, /^1 rows are left out/);
      await sql`insert into docs values ('{"cpu": "3"}', '2026-01-05Z')`;
      const [next] = await asServer`select * from pgpulse.refresh_rollups('docs')`;
      deepStrictEqual([next.added, next.fault], ["1", null]);
      await sql`update docs set doc = '{"cpu": "6"}' where doc ->> 'cpu' = '3'`;
      const [again] = await asServer`select * from pgpulse.refresh_rollups('docs')`;
      deepStrictEqual([again.added, again.recounted, again.more], ["0", "1", false]);
      match(again.fault, /^1 rows are left out/);
      const sums = () =>
        asGrafana`select cpu_sum, points::int from rollup.docs where step = '1 day' order by time`;
      deepStrictEqual([...await sums()], [{ cpu_sum: 6, points: 1 }, { cpu_sum: 4, points: 1 }]);

      await sql`update docs set doc = '{"cpu": "2"}' where at < '2026-01-06Z'`;
      await sql`delete from docs where at >= '2026-01-06Z'`;
      const [mended] = await asServer`select * from pgpulse.refresh_rollups('docs')`;
      deepStrictEqual([mended.recounted, mended.fault], ["1", null]);
      deepStrictEqual([...await sums()], [{ cpu_sum: 4, points: 2 }]);
      const [read] = await asGrafana`
        select d.cpu_avg, s.value_avg, time_bucket('1 day', s.time) as day
        from rollup.docs d join rollup.samples s using (step, time)
        where step = '1 day'`;
      deepStrictEqual(read, { cpu_avg: 2, value_avg: 1, day: new Date("2026-01-05Z") });
      await rejects(asGrafana`select pgpulse.refresh_rollups()`, /permission denied/);
      await rejects(asServer`select pgpulse.drop_rollup('docs')`, /permission denied/);

      // A table that was dropped: its rollup fails, and can be dropped too.
      await sql`drop table docs cascade`;
      const [gone] = await asServer`select * from pgpulse.refresh_rollups('docs')`;
      match(gone.fault, /does not exist/);
      await sql`select pgpulse.drop_rollup('docs')`;
    } finally {
      await asServer.end();
      await asGrafana.end();
    }
  });

  await t.step(
    "among many transactions one bad row is found, and the others are kept",
    async () => {
      const { sql } = server;
      await sql`create table quotients (a int, b int, at timestamptz)`;
      await sql`select pgpulse.add_rollup('quotients', 'at', measures => array['a / b as q'])`;
      for (let i = 0; i < 40; i++) {
        await sql`insert into quotients
        select 8, case when i = 7 and ${i}::int in (20, 33) then 0 else 2 end,
            '2026-01-05Z'::timestamptz + i * interval '1 second'
        from generate_series(1, 50) i`;
      }
      const faults = [];
      let calls = 0;
      for (let more = true; more; calls++) {
        ok(calls < 20);
        const [row] = await sql`select * from pgpulse.refresh_rollups('quotients')`;
        more = row.more;
        if (row.fault) faults.push(row.fault);
      }
      match(faults.join(), /^1 rows are left out.*division by zero,1 rows/);
      const [{ q_sum, points }] = await sql`select q_sum, points::int from rollup.quotients
      where step = '1 day'`;
      deepStrictEqual([q_sum, points], [4 * 1998, 1998]);
      await sql`select pgpulse.drop_rollup('quotients')`;
      await sql`drop table quotients`;
    },
  );

  await t.step(
    "a partition whose keys fail has a fault of its own and holds up nothing",
    async () => {
      const { sql } = server;
      await sql.unsafe(`${SAMPLES};
      create table kinds (doc jsonb, at timestamptz not null) partition by range (at);
      create table kinds_1 partition of kinds for values from ('2026-01-01Z') to ('2026-02-01Z');
      select pgpulse.add_rollup('kinds', 'at', array['1 as one'], array['(doc->>''k'')::int as k']);
      create table kinds_2 (doc jsonb, at timestamptz not null, tx bigint);
      insert into kinds_2 values ('{"k": "x"}', '2026-02-05Z', 1);
      alter table kinds attach partition kinds_2 for values from ('2026-02-01Z') to ('2026-03-01Z');
      insert into kinds values ('{"k": 1}', '2026-01-05Z');
      insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`).simple();
      await sql`update pgpulse.rollups set rolled_tx = 2 where rollup = 'kinds'`;
      for (let i = 0; i < 2; i++) {
        const [kinds, samples] = await sql`
        select name, detail, fault from pgpulse.upkeep() where name in ('kinds', 'samples')`;
        const detail = i ? null : "1 rows added, 0 recounted";
        deepStrictEqual(samples, { name: "samples", detail, fault: null });
        strictEqual(kinds.detail, detail);
        match(kinds.fault, /invalid input syntax for type integer: "x"/);
      }
      await sql`update kinds_2 set doc = '{"k": 2}'`;
      for (let i = 0; i < 2; i++) await sql`select pgpulse.refresh_rollups('kinds')`;
      deepStrictEqual([
        ...await sql`select k, points::int from rollup.kinds where step = '1 day' order by k`,
      ], [{ k: 1, points: 1 }, { k: 2, points: 1 }]);
      await sql`select pgpulse.drop_rollup('kinds')`;
      await sql`drop table kinds`;
    },
  );

  await t.step("a row far ahead of its time, and the day on which that is near", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    const put = async (...times: string[]) => {
      for (const at of times) {
        await sql.unsafe(`insert into samples (machine, value, at) values ('a', 1, ${at})`);
      }
      const [{ fault }] = await sql`select * from pgpulse.refresh_rollups('samples')`;
      strictEqual(fault, null);
      deepStrictEqual([...await differences(sql)], []);
      const [{ near }] = await sql`select newest < now() + '3 days' as near
        from pgpulse.rollups where rollup = 'samples'`;
      ok(near);
    };
    await put("'2199-01-01Z'", "now() - interval '5 days'");
    await put("'2199-01-01Z'", "'2199-01-01 10:00Z'", "'2198-01-01Z'", "now()");
    await sql`update samples set at = '2199-01-02Z' where at = '2199-01-01Z'`;
    await put("'2199-01-01Z'", "now()");
    // As if a row of today had come when today was far ahead.
    await sql`update pgpulse.rollups set newest = now() - interval '5 days' where rollup = 'samples'`;
    await put("now()", "now() - interval '1 day'", "now() - interval '4 days'", "'2199-01-01Z'");
    await put("now()", "now() - interval '1 day'", "now() + interval '1 day'");
    // Older versions let it move the end.
    await sql`update pgpulse.rollups set newest = '2199-01-01Z' where rollup = 'samples'`;
    await put("now()", "now() + interval '1 day'", "'2199-01-03Z'");
  });

  await t.step("two rollups of a table that is restored into a younger cluster", async () => {
    const { sql } = server;
    await sql.unsafe(`${SAMPLES};
      select pgpulse.add_rollup('samples', 'at', array['value'], name => 'other');
      insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`).simple();
    await sql`select pgpulse.refresh_rollups()`;
    await sql.unsafe(`insert into samples (machine, value, at) values ('a', 2, '2026-02-05Z');
      set pgpulse.keep_rollups = on;
      update samples set tx = tx + 1000000;
      set pgpulse.keep_rollups = off;
      update pgpulse.rollups set rolled_tx = rolled_tx + 1000000, cluster = 42
      where rollup in ('samples', 'other')`).simple();
    for (const rollup of ["other", "samples"]) await sql`select pgpulse.refresh_rollups(${rollup})`;
    for (const rollup of ["other", "samples"]) await sql`select pgpulse.refresh_rollups(${rollup})`;
    deepStrictEqual([...await differences(sql)], []);
    const days = await sql`select value_sum from rollup.other where step = '1 day' order by time`;
    deepStrictEqual(days.map(({ value_sum }) => value_sum), [1, 2]);
    // One that was added there has not seen them either.
    await sql.unsafe(`insert into samples (machine, value, at) values ('a', 4, '2026-02-06Z');
      set pgpulse.keep_rollups = on;
      update samples set tx = tx + 1000000 where value = 4;
      set pgpulse.keep_rollups = off;
      update pgpulse.rollups set cluster = 42 where rollup = 'samples'`).simple();
    for (const rollup of ["samples", "other"]) await sql`select pgpulse.refresh_rollups(${rollup})`;
    deepStrictEqual([...await differences(sql)], []);
    const [{ sum }] = await sql`select sum(value_sum) from rollup.other where step = '1 day'`;
    strictEqual(sum, 7);
    await sql`select pgpulse.drop_rollup('other')`;
  });

  await t.step("recounts on the days that a time zone makes shorter and longer", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    await sql`insert into samples (machine, value, at)
      select 'a', i, day + i * interval '30 minutes'
      from generate_series(0, 95) i, unnest('{2026-03-28 00:00Z,2026-10-24 00:00Z}'::timestamptz[]) day`;
    await refresh(sql);
    const own = postgres(server.url, { max: 1, connection: { TimeZone: "Europe/Berlin" } });
    await own`update samples set value = value + 1`;
    await refresh(own);
    await own.end();
    deepStrictEqual([...await differences(sql)], []);
  });

  await t.step("no writer waits for a refresh, and no refresh for a writer", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    await sql`insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`;
    await sql.begin(async (refreshing) => {
      await refreshing`set local lock_timeout = '2s'`;
      deepStrictEqual([...await refreshing`select fault from pgpulse.refresh_rollups('samples')`], [
        {
          fault: null,
        },
      ]);
      await sql.begin(async (writer) => {
        await writer`set local lock_timeout = '1s'`;
        await writer`insert into samples (machine, value, at) values ('a', 3, '2026-01-05Z')`;
        await writer`update samples set value = 4 where value = 3`;
        await writer`delete from samples where value = 1`;
      });
      // Nor does a second refresher wait: it finds the first at work and does nothing.
      deepStrictEqual([...await sql`select * from pgpulse.refresh_rollups('samples')`], []);
    });
    await sql.begin(async (writer) => {
      await writer`update samples set value = 5 where value = 4`;
      await refresh(sql);
    });
    await refresh(sql);
    deepStrictEqual([...await differences(sql)], []);
  });

  await t.step("after a long stop it catches up in pieces; a large COPY is one", async () => {
    const { sql } = server;
    await sql.unsafe(SAMPLES).simple();
    const insert = (rows: number, from: number) =>
      sql`insert into samples (machine, value, at)
        select 'm' || i % 7, i / 8.0, '2026-01-20Z'::timestamptz + ${from} * interval '1 hour'
          + i * interval '3 seconds'
        from generate_series(1, ${rows}) i`;
    for (let i = 0; i < 300; i++) await insert(i === 200 ? 5000 : 10 + i % 90, i);
    await sql`delete from samples where id % 40 = 7`;
    const sizes: number[] = [];
    for (let more = true; more;) {
      const [row] = await sql`select * from pgpulse.refresh_rollups('samples', 1000)`;
      sizes.push(Number(row.added));
      more = row.more;
      // At each moment all is there: rolled up or not.
      if (sizes.length % 8 === 0 && Number(row.recounted) === 0) {
        const [{ same }] = await sql`select (select count(*) from samples) =
          (select sum(points) from rollup.samples where step = '1 day') as same`;
        ok(same);
      }
    }
    ok(sizes.length > 15, `${sizes}`);
    deepStrictEqual(sizes.filter((size) => size >= 1000).length, 1, `${sizes}`);
    deepStrictEqual([...await differences(sql)], []);
  });

  await t.step("a stored table: rows, packed rows and their rollup agree", async () => {
    const { sql } = server;
    const chance = random(11);
    await sql.unsafe(`
      select pgpulse.drop_rollup(rollup) from pgpulse.rollups where rollup = 'samples';
      drop table if exists samples;
      create table samples (id bigserial, machine text not null, zone int, value float8,
          at timestamptz not null);
      create index on samples (machine, at);
      select pgpulse.add_rollup('samples', 'at', keys => array['machine', 'zone'],
          measures => array['value', 'zone * 2 as double'])`).simple();
    const insert = async (n: number) => {
      for (let i = 0; i < n; i++) await sql.unsafe(work(() => chance() * 0.6));
    };
    const settle = async () => {
      for (let i = 0; i < 200; i++) {
        const rows = await sql`select * from pgpulse.upkeep() where name ~ 'samples'`;
        deepStrictEqual(rows.map(({ fault }) => fault).filter(Boolean), []);
        if (rows.every(({ more }) => !more)) {
          return deepStrictEqual([...await differences(sql)], []);
        }
      }
      throw new Error("There is always more");
    };
    await insert(60);
    await refresh(sql);
    await insert(20);
    await sql`select pgpulse.add_storage('samples', 'at', keys => '{machine,zone}', pack_after => '1 day')`;
    await settle();
    const [{ packed }] = await sql`select sum(chunk$rows)::int as packed from packed.samples`;
    ok(packed > 500, `${packed} packed`);

    await insert(20);
    await sql`update rows.samples set value = value + 1 where value between 100 and 500`;
    await sql`delete from rows.samples where value > 900`;
    await settle();
    await sql`select pgpulse.recount_rollup('samples', '2026-01-01Z', '2026-03-01Z')`;
    await settle();
    await sql`select pgpulse.unpack('samples', '2026-01-28Z', '2026-01-30Z')`;
    await sql`update rows.samples set value = 1 where at between '2026-01-28Z' and '2026-01-29Z'`;
    await sql`delete from rows.samples where id % 7 = 0`;
    await settle();
    // Added anew it finds what is packed, a day each call; late rows come to such days meanwhile.
    await sql`select pgpulse.drop_rollup('samples')`;
    await sql`select pgpulse.add_rollup('samples', 'at', keys => array['machine', 'zone'],
        measures => array['value', 'zone * 2 as double'])`;
    await insert(2);
    const [{ more }] = await sql`select * from pgpulse.refresh_rollups('samples')`;
    ok(more);
    await insert(2);
    await sql`select pgpulse.upkeep()`;
    await settle();
    await insert(2);
    await settle();

    await sql`select pgpulse.drop_storage('samples')`;
    await insert(5);
    await sql`update samples set value = 3 where id % 9 = 0`;
    await settle();
  });

  await t.step(
    "partitions attached to a stored table, or again after they were written to",
    async () => {
      const { sql } = server;
      const day = (n: number) =>
        `date_bin('1 day', now(), '2000-01-01Z') + interval '${n * 24} hours'`;
      const attach = () =>
        sql.unsafe(`do $$ begin
        execute format('alter table rows.samples attach partition attached for values from (%L) to (%L)',
            ${day(20)}, ${day(21)});
      end $$`);
      await sql.unsafe(`
      select pgpulse.drop_rollup(rollup) from pgpulse.rollups where rollup = 'samples';
      drop table if exists samples;
      create table samples (machine text not null, zone int, value float8, at timestamptz not null);
      select pgpulse.add_rollup('samples', 'at', keys => array['machine', 'zone'],
          measures => array['value', 'zone * 2 as double']);
      select pgpulse.add_storage('samples', 'at', ahead => '1 day');
      create table attached (like rows.samples);
      insert into attached (machine, value, at) values ('z', 1, ${day(20)})`).simple();
      await attach();
      // A partition is made before a refresh sees the attached one.
      await sql`update pgpulse.storage set ahead = '4 days' where source = 'samples'::regclass`;
      await sql`select pgpulse.upkeep_storage()`;
      for (let i = 0; i < 2; i++) await refresh(sql);
      deepStrictEqual([...await differences(sql)], []);

      await sql`alter table rows.samples detach partition attached`;
      await refresh(sql);
      await sql`insert into attached (machine, value, at, tx)
      select 'z', 2, at, txid_current() from attached`;
      await sql`update attached set value = 3 where value = 1`;
      await refresh(sql);
      await attach();
      for (let i = 0; i < 2; i++) await refresh(sql);
      deepStrictEqual([...await differences(sql)], []);
      const [{ sum }] = await sql`select sum(value_sum) from rollup.samples where step = '1 day'`;
      strictEqual(sum, 5);
      await sql`select pgpulse.drop_storage('samples')`;
    },
  );

  await t.step("retention: each step for its time, and what is left stays right", async () => {
    const { sql } = server;
    const run = (text: string) => sql.unsafe(text).simple();
    await run(SAMPLES);
    const sums = async () => {
      await refresh(sql);
      const rows = await sql`
        select step::text, sum(value_sum)::int as sum, sum(points)::int as points
        from rollup.samples where step > '0' group by 1 order by 1`;
      return Object.fromEntries(rows.map(({ step, sum, points }) => [step, [sum, points]]));
    };
    // A row each 6 hours, from 40 days ago until now; a minute, an hour and a day have few each.
    await run(`insert into samples (machine, value, at)
      select 'a', 1, date_bin('1 day', now(), '2000-01-01Z') - i * interval '6 hours'
      from generate_series(0, 159) i`);
    deepStrictEqual(await sums(), {
      "00:01:00": [160, 160],
      "01:00:00": [160, 160],
      "1 day": [160, 160],
    });
    await run(`select pgpulse.keep_rollup('samples', '1m', '10 days');
      select pgpulse.keep_rollup('samples', '1 hour', '20 days')`);
    const [done] =
      await sql`select * from pgpulse.upkeep() where name = 'samples' and what = 'retention'`;
    deepStrictEqual(done, {
      what: "retention",
      name: "samples",
      detail: `${159 - 10 * 4 + 159 - 20 * 4} rows of old days deleted`,
      more: false,
      fault: null,
    });
    deepStrictEqual(
      await sql`select * from pgpulse.upkeep() where what = 'retention'`.then((r) => [...r]),
      [],
    );
    const kept = { "00:01:00": [41, 41], "01:00:00": [81, 81], "1 day": [160, 160] };
    deepStrictEqual(await sums(), kept);

    // Of days whose minutes are gone: late rows, updates and deletes reach hours and days.
    const back = (days: number) =>
      `date_bin('1 day', now(), '2000-01-01Z') - interval '${days} days'`;
    await run(`insert into samples (machine, value, at) values
      ('a', 10, ${back(15)}), ('a', 100, ${back(30)}), ('a', 1000, ${back(5)})`);
    kept["00:01:00"] = [1041, 42];
    kept["01:00:00"] = [1091, 83];
    kept["1 day"] = [1270, 163];
    deepStrictEqual(await sums(), kept);
    await run(
      `update samples set value = 20 where value = 10; delete from samples where value = 100;
      update samples set value = 2 where at = ${back(16)} + interval '6 hours'`,
    );
    kept["01:00:00"] = [1102, 83];
    kept["1 day"] = [1181, 162];
    deepStrictEqual(await sums(), kept);

    // Of days whose rows are gone nothing is lost: late rows are added, and no more is changed.
    await sql.begin(async (tx) => {
      await tx.unsafe(`select pgpulse.rows_retired('samples', ${back(2)});
        set local pgpulse.keep_rollups = on;
        delete from samples where at < ${back(2)}`).simple();
    });
    deepStrictEqual(await sums(), kept);
    await run(
      `insert into samples (machine, value, at) values ('a', 3, ${back(15)}), ('a', 4, ${back(3)})`,
    );
    kept["00:01:00"] = [1045, 43];
    kept["01:00:00"] = [1109, 85];
    kept["1 day"] = [1188, 164];
    deepStrictEqual(await sums(), kept);
    await run(`update samples set value = 0 where value = 3; delete from samples where value = 4;
      select pgpulse.recount_rollup('samples', '-infinity', 'infinity')`);
    deepStrictEqual(await sums(), kept);

    // A panel gets the finest step that there is.
    const step = async (from: number, hours: number) => {
      const [{ step }] = await sql.unsafe(`select pgpulse.step(now() - interval '${from} days',
        now() - interval '${from} days' + interval '${hours} hours', 'samples')::text as step`);
      return step;
    };
    deepStrictEqual(
      [await step(1, 1), await step(5, 1), await step(15, 1), await step(30, 1), await step(5, 48)],
      ["00:00:00", "00:01:00", "01:00:00", "1 day", "01:00:00"],
    );
    await rejects(sql`select pgpulse.keep_rollup('samples', '5m', '1 day')`, /it has no step "5m"/);
    await rejects(sql`select pgpulse.keep_rollup('samples', '1m', '1 hour')`, /a day is the least/);
    await rejects(sql`select pgpulse.keep_rollup('absent', '1m', '1 day')`, /none of that name/);
  });
});

// Rollups held against a recount: random work, two refreshers at once, a server that is killed.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { ready, script, type TestServer, testServer } from "./testing.ts";

/** Reproducible numbers from 0 to 1. */
function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

async function migrated(settings: string[] = []): Promise<TestServer> {
  const server = await testServer({ settings });
  const { code, stderr } = await script("migrate.ts", [], {
    DATABASE_URL: server.url,
    DB_PASSWORD: "server",
    GRAFANA_DB_PASSWORD: "grafana",
  });
  strictEqual(code, 0, stderr);
  return server;
}

/** Three monthly partitions and a default one, rolled up. */
const SAMPLES = `
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

const refresh = async (sql: postgres.ISql) => {
  const rows = await sql`select * from pgpulse.refresh_rollups()`;
  deepStrictEqual(rows.map(({ fault }) => fault).filter(Boolean), []);
  return rows.reduce((sum, { added }) => sum + Number(added), 0);
};

Deno.test("10,000 random writes leave what a recount gives", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
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
      rows += await refresh(sql);
      deepStrictEqual([...await differences(sql)], [], `after ${i} statements`);
    }
  }
  ok(rows > 10_000, `${rows} rows`);
});

Deno.test("three writers, two refreshers: a recount finds no difference", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
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
  const refresher = async () => {
    const own = postgres(server.url, { max: 1 });
    while (!done) refreshed += await refresh(own);
    await own.end();
  };
  const all = [writer(), writer(), writer(), refresher(), refresher()];
  await new Promise((wait) => setTimeout(wait, 5000));
  done = true;
  await Promise.all(all);
  ok(refreshed > 0);
  await refresh(sql);
  deepStrictEqual([...await differences(sql)], []);
});

Deno.test("kill -9 in the midst of a refresh loses nothing and counts nothing twice", async () => {
  await using server = await migrated();
  for (const pause of [20, 100, 250]) {
    const sql = postgres(server.url, { max: 1 });
    if (pause === 20) await sql.unsafe(SAMPLES);
    await sql`insert into samples (machine, value, at)
      select 'm' || i % 9, i / 8.0, '2026-01-30Z'::timestamptz + i * interval '7 seconds'
      from generate_series(1, 60000) i`;
    await sql`delete from samples where id % 50 = 0`;
    const [{ pid }] = await sql`select pg_backend_pid() as pid`;
    const end = sql`select * from pgpulse.refresh_rollups()`.then(() => "done", () => "killed");
    await new Promise((wait) => setTimeout(wait, pause));
    // PostgreSQL restarts all its sessions when one is killed, as after a crash.
    Deno.kill(pid, "SIGKILL");
    strictEqual(await end, "killed");
    await ready(server.url);
    await sql.end({ timeout: 1 });
    const again = postgres(server.url, { max: 1 });
    await refresh(again);
    deepStrictEqual([...await differences(again)], []);
    await again.end();
  }
});

Deno.test("inserts show in the view at once, before any refresh", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
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

Deno.test("partitions made, attached, truncated, purged, dropped; a restore elsewhere", async () => {
  await using server = await migrated();
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
  await run(`create table attached (id bigint not null default 0, machine text not null, zone int,
    value float8, at timestamptz not null, tx bigint)`);
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
    select tgname::text from pg_trigger where tgname like 'pgpulse\\_rollup%'
    union all
    select relname from pg_class where relnamespace = 'rollup'::regnamespace
    union all
    select attname from pg_attribute where attrelid = 'samples'::regclass and attname = 'tx'`,
  ], []);
});

Deno.test("a rollup that fails says why and holds up no other; rights", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`create table docs (doc jsonb, at timestamptz)`;
  await sql`select pgpulse.add_rollup('docs', 'at', measures => array[${"doc->>'cpu' as cpu"}])`;
  await sql`insert into docs values ('{"cpu": "much"}', '2026-01-05Z')`;
  await sql`insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`;

  const asServer = postgres(server.urlFor("server", "server"), { max: 1 });
  const asGrafana = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
  try {
    const [docs, samples] = await asServer`select * from pgpulse.refresh_rollups()`;
    match(docs.fault, /invalid input syntax for type double precision: "much"/);
    strictEqual(samples.fault, null);
    const kept = await asGrafana`select fault from pgpulse.rollups where rollup = 'docs'`;
    match(kept[0].fault, /much/);

    await sql`update docs set doc = '{"cpu": "2"}'`;
    strictEqual(await refresh(asServer), 1);
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

Deno.test("no writer waits for a refresh, and no refresh for a writer", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`insert into samples (machine, value, at) values ('a', 1, '2026-01-05Z')`;
  await sql.begin(async (refreshing) => {
    await refreshing`set local lock_timeout = '2s'`;
    deepStrictEqual([...await refreshing`select fault from pgpulse.refresh_rollups()`], [{
      fault: null,
    }]);
    await sql.begin(async (writer) => {
      await writer`set local lock_timeout = '1s'`;
      await writer`insert into samples (machine, value, at) values ('a', 3, '2026-01-05Z')`;
      await writer`update samples set value = 4 where value = 3`;
      await writer`delete from samples where value = 1`;
    });
    // Nor does a second refresher wait: it finds the first at work and does nothing.
    deepStrictEqual([...await sql`select * from pgpulse.refresh_rollups()`], []);
  });
  await sql.begin(async (writer) => {
    await writer`update samples set value = 5 where value = 4`;
    await refresh(sql);
  });
  await refresh(sql);
  deepStrictEqual([...await differences(sql)], []);
});

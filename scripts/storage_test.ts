// Storage held against a plain copy: random work, readers that count all the while, stops and kills.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import postgres from "npm:postgres@3.4.9";
import { migrated, random, ready, script, until } from "./testing.ts";

/** A table of 24 days, rolled up, with a copy of itself; values are eighths: sums are exact. */
const SAMPLES = `
  create table samples (
      id int,
      machine text,
      zone int,
      value float8,
      note text,
      at timestamptz not null
  );
  create index on samples (at);
  insert into samples
  select i, 'm' || i % 3, nullif(i % 2, 0), case when i % 4 > 0 then i % 700 / 8.0 end,
      case when i % 5 = 0 then 'it''s ' || i end, now() - i * interval '10 min'
  from generate_series(1, 24 * 144) i;
  create table plain as select * from samples;
  select pgpulse.add_rollup('samples', 'at', measures => '{value}', keys => '{machine,zone}')`;

const STORE = "select pgpulse.add_storage('samples', 'at', '{machine,zone}')";

/** Rows that one has and the other has not. */
const differences = async (sql: postgres.ISql) => [
  ...await sql`
    with here as (select id, machine, zone, value::text, note, at from samples),
    there as (select id, machine, zone, value::text, note, at from plain)
    (select 'missing' as what, * from (table there except all table here) t limit 3)
    union all
    (select 'wrong', * from (table here except all table there) h limit 3)`,
];

/** What the rollup has and a recount of the copy has not, and the other way round. */
const miscounts = async (sql: postgres.ISql) => [
  ...await sql`
    with expected as (
        select steps.step, date_bin(steps.step, at, '2000-01-01Z') as time, machine, zone,
            count(*) as points, count(v) as value_count, sum(v) as value_sum, max(v) as value_max
        from (select *, case when abs(value) <= 1e300 then value end as v from plain) p,
            (values (interval '1 minute'), ('1 hour'), ('1 day')) as steps (step)
        where at between '1900-01-01Z' and '2200-01-01Z'
        group by 1, 2, 3, 4
    ), found as (
        select step, time, machine, zone, points, value_count, value_sum, value_max
        from rollup.samples where step > '0'
    )
    (select 'missing' as what, * from (table expected except all table found) e limit 3)
    union all
    (select 'wrong', * from (table found except all table expected) f limit 3)`,
];

const refresh = async (sql: postgres.ISql) => {
  for (;;) {
    const rows = await sql`select * from pgpulse.refresh_rollups()`;
    deepStrictEqual(rows.map(({ fault }) => fault).filter(Boolean), []);
    if (!rows.some(({ more }) => more)) return;
  }
};

/** Steps of upkeep until there is nothing more to do, or as many. */
const upkeep = async (sql: postgres.ISql, steps = 1000) => {
  const done = [];
  for (; steps--;) {
    const rows = await sql`select "table"::text, action, detail, more, fault
      from pgpulse.upkeep_storage()`;
    deepStrictEqual(rows.filter(({ fault }) => fault), []);
    done.push(...rows);
    if (!rows.some(({ more }) => more)) break;
  }
  return done;
};

const packed = async (sql: postgres.ISql) => {
  const [{ n }] = await sql`select coalesce(sum(chunk$rows), 0)::int as n from packed.samples`;
  return n as number;
};

/** A row in SQL. */
const literals = (row: Record<string, unknown>) =>
  `(${
    Object.values(row).map((cell) =>
      cell === null ? "null" : `'${String(cell).replaceAll("'", "''")}'`
    )
  })`;

const copyIn = async (sql: postgres.Sql, table: string, lines: string) =>
  await pipeline(
    Readable.from([lines]),
    await sql.unsafe(`copy ${table} (id, machine, zone, value, note, at) from stdin`).writable(),
  );

Deno.test("random work on rows, packed or not, leaves what a plain table has", async () => {
  await using server = await migrated();
  const sql = postgres(server.url, { max: 1, onnotice: () => {} });
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE);
  deepStrictEqual(await differences(sql), [], "turned over");
  const chance = random(11);
  const pick = (n: number) => Math.floor(chance() * n);
  let id = 10_000;
  let refused = 0;
  const row = () => {
    const days = chance() < 0.5 ? pick(24) : pick(3);
    const at = chance() < 0.03
      ? ["infinity", "1969-12-31Z", "2199-01-01Z", "1973-05-05Z"][pick(4)]
      : new Date(Date.now() - days * 86400e3 - pick(86400) * 1000).toISOString();
    const value = chance() < 0.1
      ? ["NaN", "-0", "Infinity", "1e305", null][pick(5)]
      : pick(800) / 8;
    return {
      id: chance() < 0.8 ? id++ : 9999,
      machine: ["m0", "m1", "m2", 'm"3', "it's", null][pick(6)],
      zone: [null, 1, 2][pick(3)],
      value,
      note: chance() < 0.8 ? null : "tab\\t'",
      at,
    };
  };
  for (let i = 1; i <= 240; i++) {
    const kind = chance();
    const rows = Array.from({ length: 1 + pick(30) }, row);
    // Some come twice over, all the same.
    if (chance() < 0.2) rows.push(...rows.slice(0, 3));
    if (kind < 0.35) {
      await sql.begin(async (tx) => {
        for (const table of ["samples", "plain"]) {
          await tx.unsafe(
            `insert into ${table} (id, machine, zone, value, note, at) values ${
              rows.map(literals)
            }`,
          );
        }
      });
    } else if (kind < 0.55) {
      const lines = rows.map((r) =>
        [r.id, r.machine, r.zone, r.value, r.note?.replaceAll("\\", "\\\\"), r.at]
          .map((cell) => cell ?? "\\N").join("\t") + "\n"
      ).join("");
      const [{ into }] = await sql`select pgpulse.rows_of('samples')::text as into`;
      await copyIn(sql, kind < 0.45 ? "samples" : into, lines);
      await copyIn(sql, "plain", lines);
    } else if (kind < 0.75) {
      // By its public name, or behind it; packed rows are refused.
      const work = [
        "update # set value = value + 1 where id = $",
        "update # set at = at + interval '3 days', machine = 'm1' where id = $",
        "delete from # where id = $",
      ][pick(3)].replace("$", `${10_000 + pick(id - 9_000) - 500}`);
      const direct = chance() < 0.3;
      await sql.begin(async (tx) => {
        const { count } = await tx.unsafe(work.replace("#", direct ? "rows.samples" : "samples"));
        if (direct && !count) return;
        await tx.unsafe(work.replace("#", "plain"));
      }).catch((error) => {
        match(error.message, /^Cannot (update|delete) a packed row of "public.samples"/);
        refused++;
      });
    } else if (kind < 0.8) await refresh(sql);
    else if (kind < 0.98) await upkeep(sql, 1 + pick(4));
    else {
      const from = new Date(Date.now() - (10 + pick(10)) * 86400e3);
      await sql`select pgpulse.unpack('samples', ${from}, ${from}, '0')`;
    }
    if (i % 12 === 0) deepStrictEqual(await differences(sql), [], `after ${i} pieces of work`);
  }
  ok(refused > 0, "no packed row was touched");
  await refresh(sql);
  await upkeep(sql);
  ok(await packed(sql) > 2000, `${await packed(sql)} rows packed`);
  deepStrictEqual(await differences(sql), []);
  deepStrictEqual(await miscounts(sql), []);
  await sql`select pgpulse.drop_storage('samples')`;
  deepStrictEqual(await differences(sql), []);
  await refresh(sql);
  deepStrictEqual(await miscounts(sql), []);
  await sql.end();
});

Deno.test("readers count the same all the while, two upkeeps at once", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`truncate samples`;
  await sql.unsafe(STORE);
  // Partitions of the past, so that there are many to be emptied and dropped.
  await sql`select pgpulse.make_partition(s, now() - i * interval '1 day')
    from pgpulse.storage s, generate_series(1, 24) i where source = 'samples'::regclass`;
  await sql`insert into samples select * from plain`;
  await sql`create function total() returns float8 stable language plpgsql as $$
    begin
        perform pg_sleep(random() / 20);
        return (select sum(id) from samples);
    end $$`;
  await refresh(sql);
  const partitions = async () => {
    const [{ n }] = await sql`select count(*)::int as n from pgpulse.bounds('rows.samples')`;
    return n as number;
  };
  ok(await partitions() > 24);
  const [{ all }] = await sql`select sum(id)::float8 as all from plain`;
  let done = false;
  let counted = 0;
  const reader = async (read: (own: postgres.Sql) => Promise<number>) => {
    const own = postgres(server.url, { max: 1 });
    for (; !done; counted++) strictEqual(await read(own), all);
    await own.end();
  };
  const sum = async (own: postgres.ISql) =>
    (await own`select sum(id)::float8 as s from samples`)[0].s;
  const keeper = async () => {
    const own = postgres(server.url, { max: 1 });
    // Two that meet may find all partitions gone: the next round sees that.
    while (!done) {
      await upkeep(own, 5);
      await new Promise((wait) => setTimeout(wait, 5));
    }
    await own.end();
  };
  const all_done = Promise.all([
    reader(sum),
    reader(async (own) => (await own`select total() as s`)[0].s),
    reader((own) =>
      own.begin("isolation level repeatable read", async (tx) => {
        await tx`select count(*) from plain`;
        await new Promise((wait) => setTimeout(wait, 60));
        return await sum(tx);
      })
    ),
    keeper(),
    keeper(),
  ]);
  await until("all is packed, and the partitions are dropped", async () => {
    return await packed(sql) > 2000 && await partitions() < 14;
  }, 60_000).finally(() => done = true);
  await all_done;
  ok(counted > 20, `${counted} counts`);
  deepStrictEqual(await differences(sql), []);
});

Deno.test("who began to read before finds all rows to the end", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`truncate samples`;
  await sql.unsafe(STORE);
  await sql`select pgpulse.make_partition(s, now() - i * interval '1 day')
    from pgpulse.storage s, generate_series(1, 24) i where source = 'samples'::regclass`;
  await sql`insert into samples select * from plain`;
  await refresh(sql);
  const dropped = async () => (await upkeep(sql)).filter(({ action }) => action === "drop empty");
  await sql.begin("isolation level repeatable read", async (reader) => {
    // It has its snapshot, but nothing that it would hold of the table.
    const [{ n }] = await reader`select count(*)::int as n from plain`;
    for (let i = 0; i < 3; i++) deepStrictEqual(await dropped(), []);
    ok(await packed(sql) > 2000);
    const [found] = await reader`select count(*)::int as n from samples`;
    strictEqual(found.n, n);
  });
  const [{ detail }] = await dropped();
  ok(detail.split(", ").length > 10, detail);
  deepStrictEqual(await differences(sql), []);
});

Deno.test("stopped or killed in the midst of it, packing loses nothing and goes on", async () => {
  await using server = await migrated();
  for (const how of ["terminate", "kill"]) {
    const sql = postgres(server.url, { max: 1, onnotice: () => {} });
    if (how === "terminate") {
      await sql.unsafe(SAMPLES);
      await sql.unsafe(STORE);
    }
    await sql`insert into samples select i, 'm' || i % 90, null, i / 8.0, null,
      now() - interval '9 days' - i * interval '1 s' from generate_series(1, 40000) i`;
    await sql`insert into plain select * from samples except all select * from plain`.catch(
      () => {},
    );
    await sql`truncate plain`;
    await sql`insert into plain select id, machine, zone, value, note, at from samples`;
    await refresh(sql);
    const before = await packed(sql);
    const [{ pid }] = await sql`select pg_backend_pid() as pid`;
    // What steps have done stays done; the one that is at work is undone.
    const end = upkeep(sql).then(() => "done", () => how);
    await new Promise((wait) => setTimeout(wait, 400));
    if (how === "kill") Deno.kill(pid, "SIGKILL");
    else await server.sql`select pg_terminate_backend(${pid})`;
    strictEqual(await end, how);
    await ready(server.url);
    await sql.end({ timeout: 1 });
    const again = postgres(server.url, { max: 1 });
    deepStrictEqual(await differences(again), [], how);
    await upkeep(again);
    ok(await packed(again) > before + 39_000);
    deepStrictEqual(await differences(again), [], how);
    await refresh(again);
    deepStrictEqual(await miscounts(again), [], how);
    await again.end();
  }
});

Deno.test("no writer waits for upkeep, and upkeep for no writer", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE);
  const late = (tx: postgres.ISql, id: number) =>
    tx`insert into samples (id, machine, value, at) values
      (${id}, 'm1', 1, now() - interval '9 days'), (${id}, 'm1', 1, now())`;
  await late(sql, 10_000);
  await refresh(sql);
  await upkeep(sql);
  await late(sql, 10_001);
  await refresh(sql);
  await sql.begin(async (packing) => {
    const done = await upkeep(packing, 1);
    match(done[0].detail, /^1 rows from/);
    await sql.begin(async (writer) => {
      await writer`set local lock_timeout = '1s'`;
      await late(writer, 10_002);
      const updated = await writer`update samples set value = 4
        where at > ${new Date(Date.now() - 3600e3)} and value = 1`;
      strictEqual(updated.count, 3);
    });
  });
  await refresh(sql);
  await sql.begin(async (writer) => {
    await late(writer, 10_003);
    const asServer = postgres(server.urlFor("server", "server"), { max: 1 });
    await asServer`set lock_timeout = '2s'`;
    match((await upkeep(asServer))[0].detail, /^1 rows from/);
    await asServer.end();
  });
  const [{ n }] = await sql`select count(*)::int as n from samples where id >= 10000`;
  strictEqual(n, 8);
});

Deno.test("rows of a partition that was not made in time, and of absurd times, are kept", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE.replace("}')", "}', ahead => '0', pack_after => null)"));
  const add = (at: string) =>
    sql.unsafe(`with row as (select 1, 'm', 2, 3.5, 'n', ${at})
      insert into plain select * from row;
      insert into samples select 1, 'm', 2, 3.5, 'n', ${at}`).simple();
  const places = async () =>
    Object.fromEntries(
      (await sql`select tableoid::regclass::text as part, count(*)::int as n from rows.samples
        where id = 1 and note = 'n' group by 1`).map(({ part, n }) => [part, n]),
    );
  const day = (ago: number) => {
    const date = new Date(Date.now() - ago * 86400e3).toISOString().slice(0, 10);
    return {
      at: `timestamptz '${date} 12:00Z'`,
      part: `rows.samples_${date.replaceAll("-", "_")}`,
    };
  };
  for (const at of [day(-1).at, day(-2).at, day(-2).at, day(-500).at, "timestamptz 'infinity'"]) {
    await add(at);
  }
  await add("timestamptz '1911-11-11Z'");
  deepStrictEqual(await places(), { "rows.samples_rest": 6 });
  deepStrictEqual(await differences(sql), []);
  // The one that was late is made, with its rows; what nobody can mean stays where it is.
  await sql`update pgpulse.storage set ahead = '1 day' where source = 'samples'::regclass`;
  const done = await upkeep(sql);
  ok(
    done.some(({ detail }) => detail.includes(`${day(-1).part}, 1 rows from rows.samples_rest`)),
    JSON.stringify(done),
  );
  deepStrictEqual(await places(), {
    [day(-1).part]: 1,
    [day(-2).part]: 2,
    "rows.samples_rest": 3,
  });
  deepStrictEqual(await differences(sql), []);
  await refresh(sql);
  deepStrictEqual(await miscounts(sql), []);
  // Old rows are packed from there, without a partition of their own.
  await sql`truncate rows.samples_before`;
  await sql`delete from plain where at < now() and at > '1970-01-01Z'`;
  await sql.unsafe(STORE);
  await add("timestamptz '2001-01-01Z'");
  await refresh(sql);
  await upkeep(sql);
  strictEqual(await packed(sql), 1);
  deepStrictEqual(await differences(sql), []);
});

Deno.test("retention drops rows, packed and not, and leaves what was rolled up", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE);
  const span = async () => {
    const [row] = await sql`select
        (select count(*)::int from samples where at < now() - interval '21 days') as old,
        (select count(*)::int from samples where at > now() - interval '5 days') as young`;
    return row;
  };
  await sql`update pgpulse.storage set keep = '20 days' where source = 'samples'::regclass`;
  // Not rolled up yet: it waits.
  await upkeep(sql);
  deepStrictEqual(await span(), { old: 433, young: 719 });
  await refresh(sql);
  await sql`update pgpulse.storage set keep = null where source = 'samples'::regclass`;
  await upkeep(sql);
  ok(await packed(sql) > 2000);
  await sql`insert into samples (id, machine, at) values (1, 'm1', now() - interval '30 days')`;
  await sql`insert into plain (id, machine, at) values (1, 'm1', now() - interval '30 days')`;
  await refresh(sql);
  await sql`update pgpulse.storage set keep = '20 days' where source = 'samples'::regclass`;
  const done = await upkeep(sql);
  ok(done.some(({ action }) => action === "drop old"));
  deepStrictEqual(await span(), { old: 0, young: 719 });
  deepStrictEqual(await miscounts(sql), [], "rolled up of rows that are gone");
});

Deno.test("retention drops whole partitions, when all in them is rolled up", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`truncate samples, plain`;
  await sql.unsafe(STORE.replace("}')", "}', pack_after => null, keep => '20 days')"));
  const [{ part }] = await sql`
    select regexp_replace(pgpulse.make_partition(s, now() - interval '30 days'), ',.*', '') as part
    from pgpulse.storage s where source = 'samples'::regclass`;
  const there = async () => (await sql`select to_regclass(${part}) is not null as there`)[0].there;
  const row = "(1, 'm1', 2.5, timestamptz '" + new Date(Date.now() - 30 * 86400e3).toISOString() +
    "')";
  for (const table of ["samples", "plain"]) {
    await sql.unsafe(`insert into ${table} (id, machine, value, at) values ${row}`);
  }
  await upkeep(sql);
  ok(await there(), "dropped before it was rolled up");
  await refresh(sql);
  await upkeep(sql);
  ok(!await there());
  deepStrictEqual([...await sql`select * from samples`], []);
  deepStrictEqual(await miscounts(sql), []);
});

Deno.test("history goes straight into packed form, and comes back as rows to be corrected", async () => {
  await using server = await migrated();
  const { sql } = server;
  const own = postgres(server.url, { max: 1, onnotice: () => {} });
  await own.unsafe(SAMPLES);
  await own.unsafe(STORE);
  await refresh(own);
  await own`create temp table history (like plain)`;
  await own`insert into history
    select i, 'm' || i % 4, i % 3, round((random() * 100)::numeric, 2)::float8, null,
        now() - interval '3 days' - i * interval '1 minute'
    from generate_series(1, 20000) i`;
  await own`update history set value = value * 8 - value * 8 + id % 900 / 8.0`;
  await own`insert into history values (7, 'm1', 1, 1, 'x', '1931-01-01Z'), (7, 'm1', 1, 1, 'x', '1931-01-01Z')`;
  for (let i = 0; i < 2; i++) {
    const [{ n }] = await own`select pgpulse.pack_from('samples', 'history')::int as n`;
    ok(n > 12_000 && n < 20_000, `${n} packed`);
    await own`insert into plain select * from history`;
    deepStrictEqual(await differences(own), []);
    await refresh(own);
    deepStrictEqual(await miscounts(own), []);
  }
  const before = await packed(sql);
  const range = own`now() - interval '12 days', now() - interval '11 days'`;
  const [{ n }] = await own`select pgpulse.unpack('samples', ${range})::int as n`;
  ok(n > 3000, `${n} unpacked`);
  strictEqual(await packed(sql), before - n);
  deepStrictEqual(await differences(own), []);
  for (const table of ["samples", "plain"]) {
    await own`update ${own(table)} set value = 0.5
      where machine = 'm1' and at between now() - interval '12 days' and now() - interval '11.5 days'`;
  }
  // For a day nothing is packed again; then all of it.
  await refresh(own);
  await upkeep(own);
  strictEqual(await packed(sql), before - n);
  await own`update pgpulse.storage set hold_until = null`;
  await upkeep(own);
  ok(await packed(sql) >= before);
  deepStrictEqual(await differences(own), []);
  await refresh(own);
  deepStrictEqual(await miscounts(own), []);
  await own.end();
});

Deno.test("a column added later, a view taken over, uninstall and migrate again", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`create view recent_samples as select * from samples where at > now() - interval '1 day'`;
  await sql.unsafe(STORE);
  await refresh(sql);
  await upkeep(sql);
  await sql`alter table rows.samples add column extra numeric default 5`;
  await sql`alter table plain add column extra numeric`;
  await sql`update plain set extra = 5 where at > (select max("at$to") from packed.samples)`;
  await sql`select pgpulse.remake_storage('samples')`;
  const late = new Date(Date.now() - 9 * 86400e3);
  await sql`insert into samples (id, at) values (99999, ${late})`;
  await sql`insert into plain (id, at, extra) values (99999, ${late}, 5)`;
  await refresh(sql);
  await upkeep(sql);
  const extra = async () =>
    (await sql`select (select sum(extra)::int from samples) as here, (select sum(extra)::int from plain) as there,
      (select count(*)::int from samples where id = 99999 and extra = 5) as one`)[0];
  const { here, there, one } = await extra();
  strictEqual(here, there);
  strictEqual(one, 1);
  const [{ n }] = await sql`select count(*)::int as n from recent_samples`;
  strictEqual(n, 143);

  const env = { DATABASE_URL: server.url, DB_PASSWORD: "server", GRAFANA_DB_PASSWORD: "grafana" };
  const gone = await script("migrate.ts", ["--uninstall", "--yes"], env);
  match(gone.stdout + gone.stderr, /keeps samples as it is stored/);
  strictEqual(gone.code, 0, gone.stderr);
  deepStrictEqual(await differences(sql), []);
  await sql`insert into samples (id, at) values (1, ${late})`;
  await sql`insert into plain (id, at) values (1, ${late})`;
  const back = await script("migrate.ts", [], env);
  strictEqual(back.code, 0, back.stderr);
  deepStrictEqual(await differences(sql), []);
  const [kept] =
    await sql`select keys, pack_after::text from pgpulse.storage where source = 'samples'::regclass`;
  deepStrictEqual(kept, { keys: ["machine", "zone"], pack_after: "7 days" });
  await upkeep(sql);
  deepStrictEqual(await differences(sql), []);
  await rejects(sql`select pgpulse.add_storage('recent_samples', 'at')`, /is no table of its own/);

  // With its data, what migrate made goes altogether; what it stored for others stays.
  const bare = await script("migrate.ts", ["--uninstall", "--data", "--yes"], env);
  strictEqual(bare.code, 0, bare.stderr);
  deepStrictEqual(await differences(sql), []);
  const left = await sql`
    select proname from pg_proc where pronamespace in ('rows'::regnamespace, 'packed'::regnamespace)
    and proname like 'machine%'`;
  deepStrictEqual([...left], []);
});

Deno.test("an update or delete that meets another one loses nothing", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE);
  const recent = "at > now() - interval '1 hour'";
  await sql.unsafe(`update samples set value = 1 where ${recent}`);
  for (const work of ["update samples set value = value + 10", "delete from samples"]) {
    const other = postgres(server.url, { max: 1 });
    let second: Promise<unknown>;
    await sql.begin(async (tx) => {
      const { count } = await tx.unsafe(`update samples set value = value + 1 where ${recent}`);
      ok(count > 3);
      second = other.unsafe(`${work} where ${recent}`).then(() => "done", (error) => error);
      await until(
        "it waits for the first",
        async () =>
          (await sql`select from pg_stat_activity where wait_event_type = 'Lock'
          and query ~ 'samples'`).length > 0,
      );
    });
    const { code, message } = await second! as postgres.PostgresError;
    strictEqual(code, "40001", message);
    match(message, /^Cannot (update|delete) a row of "public.samples": somebody has changed it/);
    await other.end();
  }
  // Again, as the hint says.
  await sql.unsafe(`update samples set value = value + 10 where ${recent}`);
  const [{ values }] = await sql.unsafe(
    `select array_agg(distinct value) as values from samples where ${recent}`,
  );
  deepStrictEqual(values, [13]);
  // What a trigger declines is no row less.
  await sql.unsafe(
    `create function no() returns trigger language plpgsql as 'begin return null; end';
    create trigger no before update or delete on rows.samples for each row execute function no()`,
  );
  const declined = await sql.unsafe(`update samples set value = 0 where ${recent}`);
  strictEqual(declined.count, 0);
});

Deno.test("a sink gets what comes packed from elsewhere, and what retention would drop", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql`select pgpulse.add_sink('samples', 'at', '{machine,zone}', '{value}')`;
  await sql.unsafe(STORE.replace("}')", "}', keep => '20 days')"));
  /** Sends a piece, or what there is; how many lines. */
  const send = async (most = 100_000) => {
    const [plan] = await sql`select piece from pgpulse.plan_sink('samples', ${most})`;
    if (!plan) return 0;
    return await sql.begin(async (tx) => {
      await tx`select pgpulse.read_sink('samples', ${plan.piece})`;
      const lines = await tx`fetch all from pgpulse_sink`;
      await tx`select pgpulse.ack_sink('samples', ${plan.piece}, ${lines.length})`;
      return lines.length;
    });
  };
  const count = async (where: string) =>
    (await sql.unsafe(`select count(*)::int as n from samples where ${where}`))[0].n as number;
  const old = "at < now() - interval '21 days'";
  // In the midst of what was there before it: what it has sent goes, the rest waits.
  await refresh(sql);
  const before = await count("true");
  let sent = 0;
  for (let i = 0; !sent && i < 99; i++) sent = await send(10);
  ok(sent > 0 && sent < 100, `${sent} sent`);
  await upkeep(sql);
  ok(await count("true") >= before - sent);
  ok(await count(old) > 300);
  for (let n = 1; n; sent += n) n = await send();
  strictEqual(sent, before);
  await upkeep(sql);
  strictEqual(await count(old), 0);

  // Late rows while the receiver is away, as rows and as history.
  await sql`insert into samples (id, machine, at) select 1, 'late', now() - interval '40 days' from generate_series(1, 9)`;
  await sql`create table history (like plain)`;
  await sql`insert into history (id, machine, at)
    select i, 'history', now() - interval '9 days' - i * interval '1 min' from generate_series(1, 900) i`;
  const [{ n }] = await sql`select pgpulse.pack_from('samples', 'history')::int as n`;
  strictEqual(n, 0);
  await refresh(sql);
  await upkeep(sql);
  strictEqual(await count("machine = 'late'"), 9);
  // The ones without a field are counted, and have no line.
  strictEqual(await send(), 909);
  await upkeep(sql);
  strictEqual(await count("machine = 'late'"), 0);
  strictEqual(await count("machine = 'history'"), 900);
  const [{ rows }] =
    await sql`select count(*)::int as rows from rows.samples where machine = 'history'`;
  strictEqual(rows, 0, "packed then");
});

Deno.test("the server packs what it may read into what it may write", async () => {
  await using server = await migrated();
  const own = postgres(server.urlFor("server", "server"), { max: 1 });
  await server.sql.unsafe(SAMPLES);
  await server.sql.unsafe(STORE);
  const [{ owner }] = await own`
    select proowner::regrole::text as owner from pg_proc where proname = 'pack_from'`;
  await own.unsafe(`create temp table history (like machine_metrics);
    grant select on history to ${owner};
    insert into history (machine_id, metric_type, value, "timestamp")
    select 'm', 'speed', i, now() - interval '10 days' - i * interval '1 min' from generate_series(1, 50) i`)
    .simple();
  const [{ n }] = await own`select pgpulse.pack_from('machine_metrics', 'history')::int as n`;
  strictEqual(n, 50);
  const [read] = await own`select count(*)::int as n from machine_metrics`;
  strictEqual(read.n, 50);
  await rejects(
    own`select pgpulse.pack_from('samples', 'history')`,
    /role "server" may not read the one and write the other/,
  );
  await rejects(
    own`select pgpulse.pack_from('machine_metrics', 'machine_metrics')`,
    /no plain table/,
  );
  await own.end();
});

Deno.test("readers that hold the view for long do not stop packing", async () => {
  await using server = await migrated();
  const { sql } = server;
  await sql.unsafe(SAMPLES);
  await sql.unsafe(STORE);
  await refresh(sql);
  await upkeep(sql);
  // Numbers that need another form than all those before.
  await sql`insert into samples (id, machine, value, at)
    select i, 'm1', i / 7.0, now() - interval '9 days' + i * interval '1 s' from generate_series(1, 99) i`;
  await refresh(sql);
  const [before] = await sql`select count(*)::int as n, sum(id)::int as ids from samples`;
  const step = await sql.begin(async (reader) => {
    await reader`select count(*) from samples`;
    const step = (async () => {
      for (;;) {
        const done = await upkeep(sql, 1);
        if (done.length) return done;
      }
    })();
    // Where an assertion fails it ends with the server.
    step.catch(() => {});
    await until("it waits for more than a moment", async () =>
      (await sql`select from pg_locks
        where not granted and relation = 'packed.samples_rows'::regclass
          and clock_timestamp() - waitstart > interval '200 ms'`).length > 0);
    return { step };
  });
  const [done] = await step.step;
  deepStrictEqual([done?.action, done?.detail], ["pack", "the view reads more columns"]);
  const was = await packed(sql);
  await upkeep(sql);
  strictEqual(await packed(sql), was + 99);
  const [after] = await sql`select count(*)::int as n, sum(id)::int as ids from samples`;
  deepStrictEqual(after, before);
});

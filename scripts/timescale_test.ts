// The TimescaleDB back end, held against the plain one. PGPULSE_TIMESCALE_BIN names the folder with the
// programs of a PostgreSQL that has the extension; without it these tests are skipped.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import { migrate, ROOT, type TestServer, testServer } from "./testing.ts";

const bin = Deno.env.get("PGPULSE_TIMESCALE_BIN");

function test(name: string, fn: (t: Deno.TestContext) => Promise<void>): void {
  const why = bin ? "" : " (skipped: set PGPULSE_TIMESCALE_BIN to a PostgreSQL with TimescaleDB)";
  Deno.test({ name: `TimescaleDB: ${name}${why}`, ignore: !bin, fn });
}

/** A server with the extension at hand; its background jobs run only when a test calls them. */
async function timescale(extension = true): Promise<TestServer> {
  const server = await testServer({
    bin,
    settings: [
      "shared_preload_libraries=timescaledb",
      "timescaledb.telemetry_level=off",
      "timescaledb.max_background_workers=0",
      "max_worker_processes=8",
    ],
  });
  if (extension) await server.sql`create extension timescaledb`;
  await migrate(server);
  return server;
}

/** Runs the jobs of a kind for table `samples` and its rollup, as the scheduler would. */
async function jobs(sql: postgres.Sql, kind: string): Promise<number> {
  const rows = await sql`select job_id from timescaledb_information.jobs
    where proc_name in (${kind}, ${"policy_" + kind})
      and coalesce(hypertable_name, 'samples') like 'samples%'
    order by 1`;
  for (const { job_id } of rows) await sql`call run_job(${job_id})`;
  return rows.length;
}

const ROLLUP = (table: string) =>
  `select pgpulse.add_rollup('${table}', 'at',
    measures => array['value', 'zone * 2 as double', 'doc->>''cpu'' as cpu'],
    keys => array['machine', 'zone', 'upper(doc->>''host'') as host'])`;

/** Table \`samples\`, a hypertable from the start, and \`plain\` of the same columns. */
const TABLES = `
  create table samples (
      id bigserial, machine text not null, zone int, value float8, at timestamptz not null, doc jsonb
  );
  create index on samples (machine, at desc);
  create table plain (like samples including all);
  grant select on samples to server;
  select create_hypertable('samples', 'at', chunk_time_interval => interval '1 day');
  ${ROLLUP("samples")};
  ${ROLLUP("plain")}`;

/** Rows over \`days\` until now, of all kinds that a rollup has to bear. */
const rows = (n: number, days: number, shift = "0") =>
  `insert into samples (machine, zone, value, at, doc)
  select 'm' || i % 3, nullif(i % 4, 0),
      case i % 50 when 0 then 'NaN' when 1 then 'infinity' when 2 then null when 3 then 1e305
          else i / 8.0 end,
      now() - interval '${shift}' - i * interval '${days} days' / ${n},
      jsonb_build_object('host', 'h' || i % 2, 'cpu', i % 100)
  from generate_series(1, ${n}) i;
  insert into samples (machine, value, at) values ('x', 1, '1969-12-31Z'), ('x', 2, '2300-01-01Z');`;

/** How the rollup of the plain table, made anew, differs from the hypertable's. */
async function differences(sql: postgres.Sql): Promise<unknown[]> {
  await sql`truncate plain`;
  await sql`insert into plain (id, machine, zone, value, at, doc)
    select id, machine, zone, value, at, doc from samples`;
  await sql`select * from pgpulse.refresh_rollups('plain')`;
  return [
    ...await sql`
    (select 'missing' as what, p.* from (table rollup.plain except all table rollup.samples) p limit 3)
    union all
    (select 'wrong', s.* from (table rollup.samples except all table rollup.plain) s limit 3)`,
  ];
}

test("a rollup has the columns and the numbers of the plain one", async () => {
  await using server = await timescale();
  const { sql } = server;
  await sql.unsafe(TABLES).simple();
  const columns = (view: string) =>
    sql`select attname, format_type(atttypid, atttypmod) as type from pg_attribute
      where attrelid = ${view}::regclass order by attnum`;
  deepStrictEqual([...await columns("rollup.samples")], [...await columns("rollup.plain")]);
  deepStrictEqual([
    ...await sql`select attname from pg_attribute
      where attrelid = 'samples'::regclass and attname = 'tx'`,
  ], []);

  await sql.unsafe(rows(2000, 3)).simple();
  deepStrictEqual(await differences(sql), [], "real-time alone");
  strictEqual(await jobs(sql, "refresh_continuous_aggregate"), 3);
  const [{ n }] = await sql`select count(*)::int as n from ${sql("rollup.samples_1m")}
    where bucket < now() - interval '1 hour'`;
  ok(n > 1000, `${n} rows in the continuous aggregate`);
  deepStrictEqual(await differences(sql), [], "refreshed");

  // The newest minutes show at once, late rows and changes after the next refresh.
  await sql.unsafe(`insert into samples (machine, value, at) values ('new', 3, now())`);
  deepStrictEqual(await differences(sql), [], "newest row");
  await sql.unsafe(rows(500, 2, "1 day")).simple();
  await sql`update samples set value = value + 1, zone = 2 where id % 10 = 3`;
  await sql`delete from samples where id % 10 = 4`;
  await jobs(sql, "refresh_continuous_aggregate");
  deepStrictEqual(await differences(sql), [], "late rows, updates, deletes");

  // What no trigger could see is counted again on demand.
  const [{ cagg }] = await sql`select format('%I.%I', materialization_hypertable_schema,
      materialization_hypertable_name) as cagg
    from timescaledb_information.continuous_aggregates where view_name = 'samples_1m'`;
  await sql.unsafe(`update ${cagg} set value_sum = 0 where bucket > now() - interval '5 days'`);
  ok((await differences(sql)).length > 0);
  await sql`select pgpulse.recount_rollup('samples', now() - interval '6 days', now())`;
  strictEqual(await jobs(sql, "recount_job"), 1);
  deepStrictEqual(await differences(sql), [], "recounted");

  // Upkeep has nothing to do but to look; the role of the scripts may call it.
  const asServer = postgres(server.urlFor("server", "server"), { max: 1 });
  const [tended] = await asServer`select * from pgpulse.refresh_rollups('samples')`;
  strictEqual(tended.fault, null);
  await asServer`select * from rollup.samples limit 1`;
  await asServer.end();
  strictEqual(await jobs(sql, "recount_job"), 0, "the job is gone");

  await sql`select pgpulse.drop_rollup('samples')`;
  deepStrictEqual([
    ...await sql`select relname from pg_class
    where relnamespace = 'rollup'::regnamespace and relname like 'samples%'`,
  ], []);
});

test("our time_bucket yields to the real one, also in people's views", async () => {
  await using server = await timescale(false);
  const { sql } = server;
  await sql.unsafe(`insert into metrics ("timestamp", value) values ('2026-03-29 00:30Z', 1);
    create view minutes as select time_bucket('5 minutes', "timestamp") as t from metrics;
    create view days as select time_bucket('1 day', "timestamp", 'Europe/Berlin') as t from metrics`);
  const read = () => sql`select m.t as minute, d.t as day from minutes m, days d`;
  const before = [...await read()];
  await sql`create extension timescaledb`;
  await migrate(server);
  deepStrictEqual([...await read()], before);
  const plan = await sql`explain (verbose) select * from minutes`;
  match(plan.map((row) => row["QUERY PLAN"]).join("\n"), / time_bucket\(/);
  await sql.unsafe("drop view minutes; drop view days");
  await migrate(server);
  deepStrictEqual([...await sql`select to_regnamespace('compat') as compat`], [{ compat: null }]);
  const asGrafana = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
  const [{ week }] =
    await asGrafana`select time_bucket('1 week', '2026-01-01Z'::timestamptz) as week`;
  deepStrictEqual(week, new Date("2025-12-29Z"));
  await asGrafana.end();
});

test("stored tables are hypertables: compression, retention, their names", async () => {
  await using server = await timescale();
  const { sql } = server;
  // Migrate made them: the factory's tables among them.
  const [{ factory }] = await sql`select pgpulse.is_hypertable('machine_metrics') as factory`;
  ok(factory);
  for (const file of ["factory-queries.sql", "factory-machines.sql"]) {
    const session = postgres(server.url, { max: 1, onnotice: () => {} });
    await session.unsafe(await Deno.readTextFile(join(ROOT, "sql/tests", file))).simple();
    await session.end();
  }

  // An existing table with a rollup, of whose rows some are gone already.
  await sql.unsafe(`create table samples (
        id bigserial, machine text not null, zone int, value float8, at timestamptz not null, doc jsonb
    );
    create index samples_machine on samples (machine, at desc);
    grant insert on samples to server;
    ${ROLLUP("samples")}`).simple();
  await sql.unsafe(rows(3000, 8)).simple();
  await sql`select pgpulse.refresh_rollups('samples')`;
  await sql.begin(async (tx) => {
    await tx`set local pgpulse.keep_rollups = on`;
    await tx`delete from samples where at < now() - interval '6 days'`;
  });
  await sql`create table was as select * from rollup.samples where step > '0'`;
  const lost = () =>
    sql`(table was except all select * from rollup.samples where step > '0')
      union all (select * from rollup.samples where step > '0' except all table was) limit 1`;
  const [{ n }] = await sql`select count(*)::int as n from samples`;
  await sql`select pgpulse.add_storage('samples', 'at', keys => '{machine,zone}',
    pack_after => '2 days', keep => '5 days')`;
  const [turned] = await sql`select pgpulse.is_hypertable('samples') as is, count(*)::int as n,
      pgpulse.rows_of('samples') = 'samples'::regclass as rows,
      has_table_privilege('server', 'samples', 'insert') as may,
      to_regclass('samples_machine') is not null as index
    from samples`;
  deepStrictEqual(turned, { is: true, n, rows: true, may: true, index: true });
  deepStrictEqual([...await lost()], []);
  await jobs(sql, "refresh_continuous_aggregate");
  deepStrictEqual([...await lost()], []);

  strictEqual(await jobs(sql, "compression"), 1);
  const chunks = () =>
    sql`select count(*)::int as n, count(*) filter (where is_compressed)::int as packed
      from timescaledb_information.chunks where hypertable_name = 'samples'`;
  const [{ packed }] = await chunks();
  ok(packed >= 4, `${packed} chunks compressed`);
  deepStrictEqual([...await lost()], []);
  await sql`insert into samples (machine, value, at) select 'late', 1, min(at) from samples`;
  await sql`delete from samples where machine = 'late'`;

  // Retention drops rows and keeps what was rolled up of them.
  strictEqual(await jobs(sql, "retention"), 1);
  const [{ n: left }] = await sql`select count(*)::int as n from samples where at < now()`;
  ok(left < n && left > n / 2, `${left} of ${n}`);
  await jobs(sql, "refresh_continuous_aggregate");
  deepStrictEqual([...await lost()], []);
  await sql`select pgpulse.keep_rollup('samples', '1m', '20 days')`;
  await jobs(sql, "retention");
  deepStrictEqual([...await lost()], []);

  // What add_storage changes when it is called again, corrections, and the way back.
  await sql`select pgpulse.add_storage('samples', 'at', keys => '{machine,zone}',
    pack_after => '3 days')`;
  strictEqual(await jobs(sql, "retention"), 1, "of the rollup");
  const [{ unpacked }] = await sql`
    select pgpulse.unpack('samples', now() - interval '6 days', now())::int as unpacked`;
  ok(unpacked > left / 3 && unpacked < left, `${unpacked} rows unpacked of ${left}`);
  strictEqual((await chunks())[0].packed, 0);
  await sql`create temp table more (like samples)`;
  await sql`insert into more select * from samples limit 10`;
  deepStrictEqual([...await sql`select pgpulse.pack_from('samples', 'more')::int as n`], [{
    n: 10,
  }]);
  await sql`create view people as select machine, count(*)::int as n from samples group by 1`;
  const people = () => sql`select * from people order by 1`;
  const before = [...await people()];
  await rejects(sql`select pgpulse.drop_storage('samples')`, /rollup samples stands on/);
  await sql`select pgpulse.drop_rollup('samples')`;
  await sql`select pgpulse.drop_storage('samples')`;
  deepStrictEqual([...await people()], before);
  const [plain] = await sql`select pgpulse.is_hypertable('samples') as is,
    has_table_privilege('server', 'samples', 'insert') as may,
    to_regclass('samples_machine') is not null as index`;
  deepStrictEqual(plain, { is: false, may: true, index: true });
});

test("the way over: rows, packed history and rollups, with stops in between", async () => {
  await using server = await timescale(false);
  const { sql } = server;
  await sql.unsafe(`create table samples (
        id bigserial, machine text not null, zone int, value float8,
        at timestamptz not null default now(), doc jsonb, primary key (id, at)
    );
    comment on table samples is 'mine';
    create index samples_machine on samples (machine, at desc);
    grant insert, select on samples to server;
    grant usage on sequence samples_id_seq to server;
    create view people as select machine, count(*)::int as n from samples group by 1;
    ${ROLLUP("samples")};
    select pgpulse.add_storage('samples', 'at', keys => '{machine,zone}', pack_after => '3 days')`)
    .simple();
  await sql.unsafe(rows(1800, 9)).simple();
  await sql`insert into samples (machine, value, at) values ('never', 1, 'infinity')`;
  await sql`select pgpulse.refresh_rollups()`;
  while ((await sql`select from pgpulse.upkeep_storage() where more`).length);
  // Retention took the rows of the first two days; the rollup has them still.
  await sql`update pgpulse.storage set keep = '7 days' where source = 'samples'::regclass`;
  while ((await sql`select from pgpulse.upkeep_storage() where more`).length);
  await sql`update pgpulse.storage set keep = null where source = 'samples'::regclass`;
  const [kept] = await sql`select count(*) filter (where chunk$at < now() - interval '8 days')::int
      as old, count(*)::int as n from packed.samples`;
  ok(kept.old === 0 && kept.n > 4, `${kept.n} packed, ${kept.old} old`);
  await sql`create table rolled as select * from rollup.samples where step > '0'`;
  await sql`create table was as select id, machine, zone, value, at, doc from samples`;

  await rejects(sql`call pgpulse.move_to_timescale('samples')`, /does not have the extension/);
  await sql`create extension timescaledb`;
  await migrate(server);
  // Until somebody says so all stays as it is.
  deepStrictEqual([...await sql`select pgpulse.is_hypertable('samples') as is`], [{ is: false }]);
  await sql`select * from pgpulse.upkeep()`;

  const differences = async () => [
    ...await sql`
      (select 'lost' as what, * from (select *, doc::text from was except all
          select id, machine, zone, value, at, doc, doc::text from samples where machine <> 'new') l)
      union all
      (select 'more', * from (select id, machine, zone, value, at, doc, doc::text from samples
          where machine <> 'new' except all select *, doc::text from was) m)
      limit 3`,
    ...await sql`
      (select 'lost' as what, * from (table rolled except all
          select * from rollup.samples where step > '0' and machine <> 'new') l limit 2)
      union all
      (select 'more', * from (select * from rollup.samples where step > '0' and machine <> 'new'
          except all table rolled) m limit 2)`,
  ];
  for (let i = 0; i < 4; i++) {
    await sql`select pgpulse.timescale_step('public.samples')`;
    deepStrictEqual(await differences(), [], `after step ${i}`);
  }
  await rejects(
    sql`delete from samples where at < now() - interval '5 days'`,
    /Cannot delete a (packed )?row of "public.samples"/,
  );

  // While it goes on somebody writes, somebody reads, and the mover is ended three times.
  let stopped = false;
  let written = 0;
  const writer = (async () => {
    const own = postgres(server.urlFor("server", "server"), { max: 1 });
    while (!stopped) {
      await own`insert into samples (machine, value) values ('new', 1)`;
      written++;
      await new Promise((wait) => setTimeout(wait, 20));
    }
    await own.end();
  })();
  const counts = new Set<number>();
  const reader = (async () => {
    const own = postgres(server.urlFor("server", "server"), { max: 1, prepare: false });
    while (!stopped) {
      counts.add((await own`select count(*)::int as n from samples where machine <> 'new'`)[0].n);
      await new Promise((wait) => setTimeout(wait, 5));
    }
    await own.end();
  })();
  // Where an assertion fails they end with the server.
  for (const promise of [writer, reader]) promise.catch(() => {});
  for (const ms of [60, 250, 2000, 600_000]) {
    const mover = postgres(server.url, { max: 1, onnotice: () => {} });
    const [{ pid }] = await mover`select pg_backend_pid() as pid`;
    const timer = setTimeout(() => sql`select pg_terminate_backend(${pid})`.execute(), ms);
    await mover`call pgpulse.move_to_timescale('samples')`.catch((error) =>
      match(error.message, /terminating connection|CONNECTION_CLOSED/)
    );
    clearTimeout(timer);
    await mover.end({ timeout: 1 });
  }
  stopped = true;
  await Promise.all([writer, reader]);
  deepStrictEqual(await differences(), []);
  const [{ n }] = await sql`select count(*)::int as n from was`;
  deepStrictEqual([...counts], [n]);
  const [end] = await sql`select pgpulse.is_hypertable('samples') as is,
    (select n from people where machine = 'new') as new,
    (select sum(points)::int from rollup.samples where step = '1 day' and machine = 'new') as rolled,
    obj_description('samples'::regclass) as comment,
    to_regclass('samples_machine') is not null as index,
    to_regclass('rows.samples') is null as gone`;
  deepStrictEqual(end, {
    is: true,
    new: written,
    rolled: written,
    comment: "mine",
    index: true,
    gone: true,
  });
  await jobs(sql, "refresh_continuous_aggregate");
  deepStrictEqual(await differences(), []);
  // From now on rows can be updated and deleted whatever their age, and rollups follow.
  await sql`delete from samples where at < now() - interval '4 days'`;
  await jobs(sql, "refresh_continuous_aggregate");
  const [{ points }] = await sql`select coalesce(sum(points), 0)::int as points from rollup.samples
    where step = '1 hour' and time between now() - interval '6 days' and now() - interval '5 days'`;
  strictEqual(points, 0);
  const [{ before }] = await sql`select count(*)::int as before from rollup.samples_1d_before`;
  ok(before > 0, "what was rolled up of rows that retention took is there");
});

test("rows that repeat packed ones, triggers that are off, rows for a sink", async () => {
  await using server = await timescale(false);
  const { sql } = server;
  await sql.unsafe(`
    create table samples (machine text, value float8, at timestamptz not null, primary key (machine, at));
    create function no() returns trigger language plpgsql as 'begin return null; end';
    create trigger no before insert on samples for each row execute function no();
    alter table samples disable trigger no;
    select pgpulse.add_storage('samples', 'at', keys => '{machine}', pack_after => '2 days');
    insert into samples select 'm', i, now() - interval '5 days' - i * interval '1 min'
    from generate_series(1, 99) i`).simple();
  while ((await sql`select from pgpulse.upkeep_storage() where more`).length);
  await sql`insert into samples select machine, 1000, at from samples`;
  await sql`create extension timescaledb`;
  await migrate(server);
  const mover = postgres(server.url, { max: 1, onnotice: () => {} });
  await mover`call pgpulse.move_to_timescale('samples')`;
  await mover.end();
  const [moved] = await sql`select count(*)::int as n, max(value)::int as most,
      (select tgenabled::text from pg_trigger where tgrelid = 'samples'::regclass and tgname = 'no') as no
    from samples`;
  deepStrictEqual(moved, { n: 99, most: 99, no: "D" });

  await sql`create table sent (value float8, at timestamptz not null)`;
  await sql`select pgpulse.add_sink('sent', 'at', '{}', '{value}')`;
  await sql`select pgpulse.add_storage('sent', 'at')`;
  await sql`create table more as select * from sent`;
  await sql`insert into more values (1, now() - interval '9 days')`;
  await sql`select pgpulse.pack_from('sent', 'more')`;
  const [{ found }] = await sql`select count(*)::int as found from sent where tx > 0`;
  strictEqual(found, 1);
});

// Upkeep as a program: pace, faults, outages, kills, two at once.

import { deepStrictEqual, match, ok, rejects, strictEqual, throws } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { background, migrated, ready, script, until } from "./testing.ts";
import { duration } from "./upkeep.ts";

const TABLE = `
  create table samples (machine text not null, value float8, at timestamptz not null);
  select pgpulse.add_rollup('samples', 'at', measures => '{value}', keys => '{machine}')`;

/** Rows of which the view's days and a count from scratch do not tell the same, or that no refresh saw. */
const CHECK = `
  select machine, count(*), sum(value) from samples group by 1
  except all
  select machine, sum(points)::bigint, sum(value_sum) from rollup.samples_1d group by 1`;

/** Many transactions, and one that takes a while to roll up. */
const LOAD = `
  insert into samples
  select 'm' || i % 9, i / 8.0, '2026-01-30Z'::timestamptz + i * interval '7 seconds'
  from generate_series(1, 150000) i`;

Deno.test("a time is read, or refused with the way to write it", () => {
  deepStrictEqual(["10s", "5m", "1h"].map(duration), [10_000, 300_000, 3_600_000]);
  for (const text of ["", "0s", "5", "1d", "500h", "-5s"]) {
    throws(() => duration(text), /Cannot call it every/);
  }
});

Deno.test("upkeep", async (t) => {
  await using server = await migrated();
  const env = { DATABASE_URL: server.urlFor("server", "server") };
  const { sql } = server;
  await sql.unsafe(TABLE).simple();
  const rolledUp = async () => (await sql.unsafe(CHECK)).length === 0;
  const insert = (n: number) =>
    sql`insert into samples
    select 'a', i / 8.0, '2026-01-01Z'::timestamptz + i * interval '1 minute'
    from generate_series(1, ${n}) i`;

  await t.step(
    "--once works all off, tells what it did, and fails where something fails",
    async () => {
      await insert(500);
      const once = await script("upkeep.ts", ["--once"], env);
      strictEqual(once.code, 0, once.stderr);
      match(once.stdout, /^refresh samples: 500 rows added, 0 recounted$/m);
      match(once.stdout, /^All is up to date$/m);
      ok(await rolledUp());

      await sql`create table docs (doc jsonb, at timestamptz)`;
      await sql`select pgpulse.add_rollup('docs', 'at', measures => array[${"doc->>'cpu' as cpu"}])`;
      await sql`insert into docs values ('{"cpu": "much"}', '2026-01-05Z')`;
      await insert(10);
      const failed = await script("upkeep.ts", ["--once"], env);
      strictEqual(failed.code, 1);
      match(failed.stderr, /^Cannot do refresh docs: .*double precision: "much"$/m);
      ok(await rolledUp());
      const refused = await script("upkeep.ts", ["--every", "soon"], env);
      strictEqual(refused.code, 1);
      match(refused.stderr, /^Cannot call it every "soon": give 1s to 24h/);
      const unknown = await script("upkeep.ts", ["--nonsense"], env);
      match(unknown.stderr, /^Cannot read the command line: Unknown option "--nonsense"; see deno/);
    },
  );

  await t.step("a fault is told once and holds up nothing, and its end is told", async () => {
    await sql`alter table rollup.docs_1m add constraint never check (false) not valid`;
    await sql`insert into docs values ('{"cpu": "1"}', '2026-01-05Z')`;
    await using upkeep = await background("upkeep", ["--every", "1s"], env);
    await upkeep.said(/^Cannot do refresh docs: .*never/);
    await insert(20);
    await until("the other rollup goes on", rolledUp);
    await insert(20);
    await until("and on", rolledUp);
    strictEqual(upkeep.count(/Cannot do refresh docs/), 1);
    await sql`update docs set doc = '{"cpu": "2"}'`;
    await sql`alter table rollup.docs_1m drop constraint never`;
    await upkeep.said(/^refresh docs works again \(it was: .*never/);
    strictEqual(await upkeep.end("SIGINT"), 0);
  });

  await t.step(
    "a stored table's is told once, though others have the table meanwhile",
    async () => {
      await sql`create table stored (host text, n int, at timestamptz not null)`;
      await sql`insert into stored select 'a', i, now() - i * interval '1 hour' from generate_series(1, 500) i`;
      await sql`select pgpulse.add_storage('stored', 'at', keys => '{host}', pack_after => '7 days')`;
      await sql`alter table packed.stored add constraint never check (false)`;
      await using upkeep = await background("upkeep", ["--every", "1s"], env);
      await upkeep.said(/^Cannot do pack .*stored: .*never/);
      await sql.begin(async (other) => {
        await other`select * from pgpulse.upkeep_storage()`;
        // Calls meanwhile meet the table taken.
        await new Promise((done) => setTimeout(done, 2_500));
      });
      await insert(20);
      await until("it goes on", rolledUp);
      deepStrictEqual([upkeep.count(/^Cannot do pack/), upkeep.count(/works again/)], [1, 0]);
      await sql`alter table packed.stored drop constraint never`;
      await upkeep.said(/^pack .*stored works again \(it was: .*never/);
      await upkeep.end();
      await sql`select pgpulse.drop_storage('stored')`;
    },
  );

  await t.step("an outage of the database is told once and waited out", async () => {
    await using upkeep = await background("upkeep", ["--every", "1s"], env);
    await insert(20);
    await until("it works", rolledUp);
    await server.kill();
    await upkeep.said(/^Cannot use "127.0.0.1:\d+": .*it is tried again from time to time$/);
    await server.start();
    await ready(server.url);
    await upkeep.said(/^The database is back$/, 40_000);
    await insert(20);
    await until("it goes on", rolledUp);
    // One line for the broken connection, at most one more each for refused and starting.
    ok(upkeep.count(/^Cannot use/) <= 3, upkeep.log.join("\n"));
    strictEqual(await upkeep.end(), 0);
  });

  await t.step("kill -9 and Ctrl-C in the midst of a piece do no harm", async () => {
    for (const signal of ["SIGKILL", "SIGINT", "SIGKILL"] as const) {
      await sql.unsafe(LOAD);
      await sql`delete from samples where value::int % 50 = 0`;
      const upkeep = await background("upkeep", ["--every", "1s"], env);
      await until("it is at work", async () =>
        (await sql`select from pg_stat_activity
          where application_name = 'pgpulse upkeep' and state = 'active'`).length > 0);
      await upkeep.end(signal);
    }
    // Two at once: one works, the other waits for it.
    const both = await Promise.all([
      script("upkeep.ts", ["--once"], env),
      script("upkeep.ts", ["--once"], env),
    ]);
    deepStrictEqual(both.map(({ code, stderr }) => ({ code, stderr })), [
      { code: 0, stderr: "" },
      { code: 0, stderr: "" },
    ]);
    ok(await rolledUp());
  });

  await t.step("who may do it, and what one call tells", async () => {
    const asServer = postgres(env.DATABASE_URL, { max: 1 });
    const asGrafana = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
    try {
      await insert(3);
      const [row] = await asServer`select * from pgpulse.upkeep() where name = 'samples'`;
      deepStrictEqual(row, {
        what: "refresh",
        name: "samples",
        detail: "3 rows added, 0 recounted",
        more: false,
        fault: null,
      });
      await rejects(asGrafana`select * from pgpulse.upkeep()`, /permission denied/);
      await asServer.begin(async (at) => {
        await at`select pgpulse.refresh_rollups('samples')`;
        const [busy] = await sql`select more from pgpulse.upkeep() where name = 'samples'`;
        strictEqual(busy.more, null);
      });
    } finally {
      await asServer.end();
      await asGrafana.end();
    }
  });
});

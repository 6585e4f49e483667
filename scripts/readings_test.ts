// Readings in SQL: one row an id whatever several connections do at once, and who may do what.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { migrate, migrated, random, script } from "./testing.ts";

type Answer = { taken: number; replaced: number; same: number; failed: { id: string }[] };

const DAY = 86_400_000;

Deno.test("readings", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  await using clients = new AsyncDisposableStack();
  const client = (role: string, password: string) => {
    const sql = postgres(server.urlFor(role, password), { max: 1, onnotice: () => {} });
    clients.defer(() => sql.end());
    return sql;
  };
  const take = async (as: postgres.Sql, source: string, batch: Map<string, unknown>) => {
    const lines = [...batch.values()].map((document) => JSON.stringify(document)).join("\n");
    const [{ answer }] = await as`
      select pgpulse.take_readings(${source}, ${[...batch.keys()]}::text[], ${lines}) as answer`;
    return answer as Answer;
  };
  await t.step("one row an id, whoever takes it at once and wherever its time moves", async () => {
    const start = Date.now();
    let busy = true, partitions = 0;
    const upkeep = async () => {
      for (const as = client("server", "server"); busy;) {
        const done = await as`select detail from pgpulse.upkeep_storage() where action = 'default'`;
        partitions += done.length;
        await new Promise((done) => setTimeout(done, 5));
      }
    };
    const sums = { taken: 0, rest: 0 };
    const worker = async (seed: number) => {
      const as = client("server", "server");
      const chance = random(seed);
      for (let round = 0; round < 60; round++) {
        const batch = new Map<string, unknown>();
        for (let i = 0; i < 20; i++) {
          // Today, or one of days that have no partition yet.
          const day = Math.floor(chance() * 3) ? Math.floor(chance() * 40) : 0;
          const time = start - day * DAY - Math.floor(chance() * 3) * 1000;
          batch.set(`${Math.floor(chance() * 60)}`, {
            time: new Date(time).toISOString(),
            value: Math.floor(chance() * 3),
            device: `d${day % 3}`,
          });
        }
        const { taken, replaced, same, failed } = await take(as, "race", batch);
        deepStrictEqual(failed, []);
        strictEqual(taken + replaced + same, batch.size);
        sums.taken += taken;
        sums.rest += replaced + same;
      }
    };
    const looked = upkeep();
    await Promise.all([1, 2, 3, 4].map(worker)).finally(() => busy = false);
    await looked;
    const [{ keys, rows, agree }] = await sql`
      select
        (select count(*)::int from reading_keys where source = 'race') as keys,
        (select count(*)::int from reading_analytics where source = 'race') as rows,
        (
          select count(*)::int
          from reading_keys k
          join reading_analytics r using ("time", source, source_id)
          where source = 'race'
        ) as agree`;
    deepStrictEqual({ keys, rows, agree }, { keys: 60, rows: 60, agree: 60 });
    ok(sums.taken >= 60 && sums.rest > 0);
    ok(partitions > 0, "no partition was made meanwhile");
  });

  await t.step("the rollup tells what is there, after all that moving", async () => {
    await sql`select pgpulse.refresh_rollups('readings')`;
    const rolled = await sql`
      select device, sum(value_count)::int as n, sum(value_sum)::int as total
      from rollup.readings
      where step = '1 hour' and source = 'race'
      group by 1 order by 1`;
    const rows = await sql`
      select device, count(*)::int as n, sum(value)::int as total
      from reading_analytics where source = 'race'
      group by 1 order by 1`;
    deepStrictEqual([...rolled], [...rows]);
  });

  await t.step("workers never claim the same", async () => {
    const wanted = Array.from({ length: 300 }, (_, i) => `${i}`);
    const claimed: string[] = [];
    await Promise.all(["a", "b", "c", "d"].map(async (worker, seed) => {
      const as = client("server", "server");
      const chance = random(seed);
      for (let round = 0; round < 20; round++) {
        const some = wanted.filter(() => chance() < 0.2);
        const [{ ids }] = await as`
          select ids from pgpulse.claim_readings('claims', ${worker}, ${some}::text[])`;
        claimed.push(...ids ?? []);
      }
    }));
    strictEqual(new Set(claimed).size, claimed.length);
    const [{ all }] = await sql`select pgpulse.claimed_readings('claims') as all`;
    deepStrictEqual(all.sort(), claimed.sort());
  });

  await t.step("a dead worker's claim is recovered once", async () => {
    await sql`insert into pgpulse.reading_claims (source, worker, ids)
      select 'dead', 'gone', array[n::text] from generate_series(1, 30) as n`;
    const found = await Promise.all(["x", "y", "z"].map(async (worker) => {
      const as = client("server", "server");
      await as`select pgpulse.hold_lease(${`etl/${worker}`}, 'me', 60)`;
      const ids: string[] = [];
      for (let some = 1; some;) {
        const rows = await as`select source, ids from pgpulse.recover_readings(${worker})`;
        ids.push(...rows.filter(({ source }) => source === "dead").flatMap(({ ids }) => ids));
        some = rows.length;
      }
      return ids;
    }));
    deepStrictEqual(found.flat().sort(), Array.from({ length: 30 }, (_, i) => `${i + 1}`).sort());
  });

  await t.step("who holds a claim writes before another takes it over, or not at all", async () => {
    await sql`insert into pgpulse.reading_claims (source, worker, ids) values ('fence', 'gone', '{1}')`;
    const [{ id }] = await sql`select id from pgpulse.reading_claims where source = 'fence'`;
    const slow = client("server", "server"), other = client("server", "server");
    const put = (as: postgres.Sql) =>
      as`select pgpulse.take_readings('fence', '{1}', '{}', claim => ${id}, worker => 'gone')`;
    await slow.begin(async (slow) => {
      await put(slow as unknown as postgres.Sql);
      const taken = await other`select * from pgpulse.recover_readings('other')`;
      ok(!taken.some(({ source }) => source === "fence"), "it was taken over meanwhile");
    });
    ok((await other`select * from pgpulse.recover_readings('other')`).length > 0);
    await rejects(put(slow), { code: "55000" });
  });

  await t.step("each role may do its part", async () => {
    const as = client("server", "server");
    for (
      const statement of [
        "insert into reading_analytics (time, source, source_id, received, payload) " +
        "values (now(), 'a', 'a', now(), '{}')",
        "delete from reading_analytics",
        "insert into reading_keys values ('a', 'a', now())",
        "delete from reading_failures",
        "delete from pgpulse.reading_claims",
        "select pgpulse.put_readings('a', '{a}', '{\"{}\"}', now())",
        "select pgpulse.upkeep_readings()",
      ]
    ) {
      await rejects(as.unsafe(statement), { code: "42501" }, statement);
    }
    strictEqual((await take(as, "server", new Map([["a", {}]]))).taken, 1);
    strictEqual((await as`select * from pgpulse.page_readings('server')`).length, 1);
    strictEqual((await as`select * from pgpulse.reading_of('a')`).length, 1);
    const [{ id }] = await as`
      insert into sync_runs (worker, trigger) values ('w', 'once') returning id`;
    await as`update sync_runs set ended = clock_timestamp(), taken = 1 where id = ${id}`;
    const reader = client("grafana_readonly", "grafana");
    await reader`
      select from reading_analytics, reading_keys, reading_failures, reading_sources,
        reading_flow, sync_runs, live.readings, rollup.readings`;
    strictEqual((await reader`select * from pgpulse.page_readings('server')`).length, 1);
    await rejects(take(reader, "reader", new Map([["a", {}]])), { code: "42501" });
    await rejects(reader`select pgpulse.note_flow('a', 'b')`, { code: "42501" });
    await rejects(client("collector", "collect")`select * from reading_analytics`, {
      code: "42501",
    });
  });

  await t.step("uninstall keeps readings, and the next migrate goes on with them", async () => {
    const changed = "select null::timestamptz, 'own', null::text, 1::float8, null::text";
    await sql.unsafe(
      `create or replace function transform_reading(source text, source_id text, payload jsonb)
      returns table ("time" timestamptz, device text, metric text, value float8, unit text)
      language sql stable as $$ ${changed} $$`,
    );
    await clients.disposeAsync();
    const count = async () =>
      (await sql`select count(*)::int as n from reading_analytics`)[0].n as number;
    const before = await count();
    const gone = await script("migrate.ts", ["--uninstall", "--yes"], { DATABASE_URL: server.url });
    match(gone.stdout, /keeps table public.reading_keys with its data/);
    match(gone.stdout, /keeps function public.transform_reading: it was changed/);
    strictEqual(await count(), before);
    await migrate(server);
    deepStrictEqual(await take(sql, "server", new Map([["a", {}], ["b", {}]])), {
      taken: 1,
      replaced: 1,
      same: 0,
      failed: [],
    });
    strictEqual(await count(), before + 1);
    const [{ device }] = await sql`
      select device from reading_analytics where source = 'server' and source_id = 'b'`;
    strictEqual(device, "own");
  });
});

// PostgreSQL that is watched: what collect.ts --postgres samples of it, the views, the dashboard and
// the alerts, on both ends of the range.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import YAML from "npm:yaml@2.9.1";
import { masked, postgresqlSampler, topStatements, Troubles } from "./collect.ts";
import { migrated, ROOT, script, testServer, until } from "./testing.ts";

// deno-lint-ignore no-explicit-any -- samples, dashboards and alerts as JSON and YAML
type Any = any;

const LIBRARY = ["shared_preload_libraries=pg_stat_statements"];
const read = (path: string) => Deno.readTextFileSync(join(ROOT, path));
const dashboard: Any = JSON.parse(read("grafana/dashboards/pgpulse/postgresql.json"));
const rules: Any[] = YAML.parse(read("grafana/provisioning/alerting/postgresql.yaml"))
  .groups.flatMap((group: Any) => group.rules);

Deno.test("masked: no literal and no comment is kept, whatever quotes it", () => {
  const texts: [string, string][] = [
    ["select 1", "select ?"],
    ["select -1.5e-3, x1, t2.c3, $1 from t4", "select -?, x1, t2.c3, $1 from t4"],
    ["select 'it''s', E'a\\'b', U&'c', B'01'", "select ?, ..."],
    ['select "it\'s", \'x\' from "a""b"', 'select "it\'s", ? from "a""b"'],
    ["select $$x 'y'$$, $tag$ $$ 1 $tag$, a", "select ?, ..., a"],
    [
      "select a -- secret 'x\nfrom b /* 1 'y */ where c in (1, 2,3)",
      "select a from b where c in (?, ...)",
    ],
    ["alter role x password 'geheim", "alter role x password ?"],
    ["select $a$ geheim", "select ?"],
    ["insert into t values (E'\\", "insert into t values (?"],
    ["select * from größe2 where é3 = 3", "select * from größe2 where é3 = ?"],
  ];
  deepStrictEqual(texts.map(([text]) => masked(text)), texts.map(([, plain]) => plain));
  strictEqual(masked("select " + "abc, ".repeat(100), 50).length, 50);
});

Deno.test("topStatements: ten at most, by the time since the last look, none that was reset", () => {
  const one = (id: number, calls: number, seconds: number) => (
    { id: `${id}`, calls, seconds, rows: calls, hit: 9 * calls, read: calls }
  );
  const before = new Map([one(1, 1e6, 5000), one(2, 10, 1), one(3, 50, 9)].map((s) => [s.id, s]));
  const now = [one(1, 3, 0.1), one(2, 20, 3), one(3, 50, 9), one(4, 5, 1)];
  deepStrictEqual(topStatements(now, before, 10), [
    { id: "2", calls: 1, seconds: 0.2, mean_seconds: 0.2, rows: 1, cache_hit: 0.9 },
    { id: "4", calls: 0.5, seconds: 0.1, mean_seconds: 0.2, rows: 0.5, cache_hit: 0.9 },
  ]);
  const many = Array.from({ length: 30 }, (_, i) => one(i + 10, 1, i + 1));
  deepStrictEqual(topStatements(many, before, 1).map(({ seconds }) => seconds).slice(0, 2), [
    30,
    29,
  ]);
  strictEqual(topStatements(many, before, 1).length, 10);
});

/** A sampler of an address; `await using` ends it. */
function sampler(url: string, troubles = new Troubles()) {
  const variable = `TEST_POSTGRES_${crypto.randomUUID()}`;
  Deno.env.set(variable, url);
  const one = postgresqlSampler(variable, troubles);
  return {
    move: (to: string) => Deno.env.set(variable, to),
    read: () => one.sample(),
    /** A sample, which must be there. */
    async sample(): Promise<Any> {
      const found = await one.sample();
      ok(found, `no sample: ${troubles.list()}`);
      return found.metrics;
    },
    async [Symbol.asyncDispose]() {
      await one.close();
      Deno.env.delete(variable);
    },
  };
}

const session = (url: string, name: string) =>
  Object.assign(
    postgres(url, {
      max: 1,
      onnotice: () => {},
      connection: { application_name: name },
    }),
    {
      [Symbol.asyncDispose]() {
        return (this as unknown as postgres.Sql).end({ timeout: 1 });
      },
    },
  );

const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

for (const major of [15, 18] as const) {
  Deno.test(`PostgreSQL ${major}: samples`, async (t) => {
    await using server = await testServer({
      major,
      settings: [...LIBRARY, "max_prepared_transactions=2"],
    });
    const { sql, url } = server;
    await sql`create extension pg_stat_statements`;
    await sql`create table "odd "" name" (id int primary key, note text)`;
    await sql`
      insert into "odd "" name" select i, repeat('x', 100) from generate_series(1, 20000) i
    `;
    await sql`vacuum analyze`;
    await using one = sampler(url);
    await using holder = session(url, "holder");
    await using waiter = session(url, "waiter");

    await t.step("the first has no rates, the next ones have", async () => {
      const first = await one.sample();
      strictEqual(first.version.split(".")[0], `${major}`);
      for (const name of ["commits", "wal_bytes", "cache_hit", "checkpoints", "statements"]) {
        ok(!(name in first), `${name}: ${first[name]}`);
      }
      await sql`update "odd "" name" set note = 'more' where id <= 100`;
      await sql`checkpoint`;
      await pause(1_100);
      await sql`select 'flush'`;
      const second = await one.sample();
      for (
        const name of ["commits", "wal_bytes", "tuples_written", "checkpoints", "database_bytes"]
      ) {
        ok(second[name] > 0, `${name}: ${second[name]}`);
      }
      ok(second.checkpoints_requested > 0);
      ok(second.cache_hit > 0 && second.cache_hit <= 1);
      ok(second.connections >= 2 && second.connections < 10, `${second.connections}`);
      ok(Math.abs(second.connections_used - second.connections / 97) < 1e-3);
      deepStrictEqual([second.recovery, second.sees_all, second.blocked], [false, true, 0]);
      ok(second.wraparound < 0.01 && second.uptime < 300 && second.notify_queue === 0);
    });

    await t.step("largest tables, with a bloat estimate", async () => {
      const found = await one.sample();
      ok(!found.tables, "sizes are not read at each sample");
      await using other = sampler(url);
      const [table] = (await other.sample()).tables;
      strictEqual(table.name, 'public."odd "" name"');
      ok(
        table.bytes > table.heap && table.heap > 2e6 && table.indexes > 1e5,
        JSON.stringify(table),
      );
      ok(table.rows >= 20_000 && table.vacuumed > 1e9, JSON.stringify(table));
      // Rows that are gone, and whose place is not used: the estimate says so.
      await sql`delete from "odd "" name" where id % 4 > 0`;
      await sql`vacuum analyze "odd "" name"`;
      await using later = sampler(url);
      const [thin] = (await later.sample()).tables;
      ok(thin.bloat > thin.heap * 0.6 && thin.bloat < thin.heap, JSON.stringify(thin));
      ok(table.bloat < table.heap * 0.2, JSON.stringify(table));
    });

    await t.step(
      "a table that is locked whole hides the others' sizes no more than its own",
      async () => {
        await sql`create table small (id int)`;
        await holder`begin`;
        await holder`lock table "odd "" name" in access exclusive mode`;
        await using other = sampler(url);
        deepStrictEqual((await other.sample()).tables.map(({ name }: Any) => name), [
          "public.small",
        ]);
        await holder`rollback`;
      },
    );

    await t.step("statements: those of the interval, without their literals", async () => {
      await using other = sampler(url);
      await other.sample();
      for (let i = 0; i < 3; i++) {
        await sql.unsafe("select count(*), 'geheim' from generate_series(1, 200000) as slow");
      }
      await pause(100);
      const { statements } = await other.sample();
      const slow = statements.find(({ statement }: Any) => / as slow$/.test(statement));
      ok(slow, JSON.stringify(statements));
      ok(slow.calls > 0 && slow.seconds > 0 && Math.abs(slow.rows - slow.calls) < 1e-6);
      ok(slow.mean_seconds > 0.001, `${slow.mean_seconds}`);
      ok(!JSON.stringify(statements).includes("geheim"));
      ok(!JSON.stringify(statements).includes("pg_stat_activity"), "its own are not spelled out");
    });

    await t.step("a blocked session is seen with its blocker, and what it wants", async () => {
      await holder`begin`;
      await holder`update "odd "" name" set note = 'geheim' where id = 4`;
      const waiting = waiter`update "odd "" name" set note = 'wartet' where id = 4`.execute();
      const found = await until("it waits", async () => {
        const sample = await one.sample();
        return sample.blocked ? sample : undefined;
      });
      strictEqual(found.blocked, 1);
      const [blocked] = found.blocked_sessions;
      const [{ pid: of }] = await holder`select pg_backend_pid() as pid`;
      deepStrictEqual(
        [blocked.application, blocked.user, blocked.on, blocked.statement],
        [
          "waiter",
          "user",
          'a row of public."odd "" name"',
          'update "odd "" name" set note = ? where id = ?',
        ],
      );
      const [by, ...others] = blocked.by;
      deepStrictEqual([by.pid, by.application, by.state, others.length], [
        of,
        "holder",
        "idle in transaction",
        0,
      ]);
      ok(!JSON.stringify(found).includes("geheim"), "a literal is in the sample");
      ok(found.oldest_transaction_seconds > 0);
      strictEqual(found.waits.Lock, 1);
      strictEqual(found.states.idle_in_transaction, 1);
      ok(found.locks.RowExclusiveLock >= 2);
      await holder`commit`;
      await waiting;
      strictEqual((await one.sample()).blocked, 0);
    });

    await t.step("a prepared transaction that was forgotten is the longest", async () => {
      await holder.unsafe("begin; insert into small values (1); prepare transaction 'left'");
      await pause(1_200);
      const { oldest_transaction_seconds } = await one.sample();
      ok(oldest_transaction_seconds > 1, `${oldest_transaction_seconds}`);
      await holder`rollback prepared 'left'`;
    });

    await t.step("counters that are reset make no spike, and go on", async () => {
      await one.sample();
      await sql`select pg_stat_reset()`;
      await sql`select pg_stat_reset_shared('bgwriter')`;
      if (major >= 17) await sql`select pg_stat_reset_shared('checkpointer')`;
      await pause(100);
      const after = await one.sample();
      for (const name of ["commits", "blocks_hit", "tuples_returned", "checkpoints"]) {
        ok(!(name in after), `${name}: ${after[name]}`);
      }
      ok(after.wal_bytes >= 0, "what was not reset goes on");
      await pause(1_100);
      await sql`select 'flush'`;
      const next = await one.sample();
      ok(next.commits >= 0 && next.commits < 1_000, `${next.commits}`);
    });

    await t.step("a second database by its URL", async () => {
      await sql`create database second`;
      const second = server.urlFor("user", "secret", "second");
      await using other = sampler(second);
      const found = await other.read();
      strictEqual(found!.instance, `second@${Deno.hostname()}:${server.port}`);
      ok(!("tables" in found!.metrics), "there is no table yet");
      const out = await script(
        "collect.ts",
        ["--once", "--host", "web1", "--postgres", second],
      );
      strictEqual(out.code, 0, out.stderr);
      const record = JSON.parse(out.stdout.slice(out.stdout.lastIndexOf("\n{") + 1));
      deepStrictEqual([record.host, record.instance], ["web1", found!.instance]);
      ok("commits" in record.metrics, "printed with rates");
      ok(!out.stdout.includes("secret") && !out.stderr.includes("secret"));
    });

    await t.step("a role with few rights gets what it may see, and is told once", async () => {
      await sql`create role few login password 'few'`;
      const troubles = new Troubles();
      const said = console.error;
      const heard: string[] = [];
      console.error = (text: string) => heard.push(text);
      try {
        await using other = sampler(server.urlFor("few", "few"), troubles);
        await holder`begin`;
        await holder`select 1`;
        await other.sample();
        await pause(100);
        const found = await other.sample();
        strictEqual(heard.length, 1, heard.join("\n"));
        match(heard[0], /^Role "few" does not see .*: grant pg_monitor to "few"$/);
        for (const name of ["connections", "wal_bytes", "commits", "blocked", "database_bytes"]) {
          ok(Number.isFinite(found[name]), name);
        }
        ok(found.connections >= 3, "others are counted");
        // What it cannot know is not said to be nothing.
        for (const name of ["states", "active", "waits", "oldest_transaction_seconds"]) {
          ok(!(name in found), name);
        }
        await sql`grant pg_monitor to few`;
        const more = await other.sample();
        ok(more.oldest_transaction_seconds > 0 && more.states.idle_in_transaction === 1);
        match(heard[1], /^Role "few" sees all of ".*" now$/);
      } finally {
        console.error = said;
        await holder`rollback`;
      }
    });

    await t.step("a stuck database gives no sample, told once, and then goes on", async () => {
      const troubles = new Troubles();
      const said = console.error;
      const heard: string[] = [];
      console.error = (text: string) => heard.push(text);
      try {
        await using other = sampler(url, troubles);
        await other.sample();
        // Names of tables are read of it: each sample waits for that lock.
        await holder.unsafe("begin; lock table pg_catalog.pg_database in access exclusive mode");
        strictEqual(await other.read(), undefined);
        match(
          heard.join("\n"),
          /^Cannot watch "testdb@[^"]+": canceling statement due to lock timeout$/,
        );
        await holder`rollback`;
        await until("it goes on", () => other.read());
        match(heard[1], /^Watches "testdb@[^"]+" again$/);
        strictEqual(heard.length, 2);
      } finally {
        console.error = said;
      }
    });

    await t.step("the server is away, and back; a password that was changed", async () => {
      const troubles = new Troubles();
      const said = console.error;
      const heard: string[] = [];
      console.error = (text: string) => heard.push(text);
      try {
        await sql`alter role few password 'new'`;
        await using other = sampler(server.urlFor("few", "few"), troubles);
        strictEqual(await other.read(), undefined);
        match(
          heard[0],
          /^Cannot watch "testdb@[^"]+": the password of "few" is wrong; correct it in the URL of --postgres$/,
        );
        other.move(server.urlFor("few", "new"));
        await until("it is let in", () => other.read());
        await server.kill();
        strictEqual(await other.read(), undefined);
        await server.start();
        const after: Any = await until("it is back", () => other.read());
        ok(!("commits" in after.metrics), "another start, other counters");
      } finally {
        console.error = said;
      }
    });
  });

  Deno.test(`PostgreSQL ${major}: views, live stream, dashboard and alerts`, async (t) => {
    await using server = await migrated({ major, settings: LIBRARY });
    const { sql, url } = server;
    await sql`create extension pg_stat_statements`;
    await using reader = session(server.urlFor("grafana_readonly", "grafana"), "reader");
    await using holder = session(url, "holder");
    await using waiter = session(url, "waiter");

    const values = (range: number, instance: string) => ({
      from: new Date(Date.now() - range * 1000).toISOString(),
      to: new Date(Date.now() + 1000).toISOString(),
      instance: instance.replaceAll("'", "''"),
    });
    /** As Grafana does it, as far as the dashboard needs it. */
    const expand = (text: string, { from, to, instance }: ReturnType<typeof values>) =>
      text.replaceAll("$__timeFrom()", `'${from}'`).replaceAll("$__timeTo()", `'${to}'`)
        .replaceAll("$instance", instance)
        .replace(/\$__timeFilter\(([^)]*)\)/g, `$1 between '${from}' and '${to}'`);
    const targets: [string, Any][] = dashboard.panels
      .filter(({ type }: Any) => type !== "row")
      .flatMap(({ title, targets }: Any) => targets.map((target: Any) => [title, target]))
      .filter(([, target]: [string, Any]) => target.rawSql);

    await t.step("empty tables: no error, something to choose, no alert", async () => {
      const [instances, channels] = dashboard.templating.list;
      const chosen = await reader.unsafe(expand(instances.query, values(3600, "")));
      deepStrictEqual(chosen.map((row) => ({ ...row })), [{ __text: "none", __value: "" }]);
      strictEqual((await reader.unsafe(expand(channels.query, values(3600, "")))).length, 1);
      for (const [, { rawSql }] of targets) await reader.unsafe(expand(rawSql, values(3600, "")));
      for (const { data } of rules) {
        deepStrictEqual([...await reader.unsafe(data[0].model.rawSql)], []);
      }
    });

    // A minute of samples, of a database whose name has a quote in it.
    const instance = "bob's@db1:5432";
    await holder.unsafe("begin; update metrics set value = 1; lock table live_metrics");
    const waiting = waiter`insert into live_metrics (value) values (7)`.execute();
    waiting.catch(() => {});
    await using one = sampler(url);
    await one.sample();
    await pause(300);
    await until("it waits", async () => (await one.sample()).blocked);
    const taken = {
      ...await one.sample(),
      tables: [{
        name: "public.t",
        bytes: 2e6,
        heap: 1e6,
        indexes: 1e6,
        rows: 10,
        dead: 5,
        bloat: 3,
        vacuumed: 1.7e9,
        sequential_scans: 1,
      }],
      statements: [{
        id: "1",
        statement: "select $1",
        calls: 2,
        seconds: 0.5,
        mean_seconds: 0.25,
        rows: 2,
        cache_hit: 1,
      }],
      transactions: [{
        pid: 1,
        user: "u",
        application: "a",
        database: "d",
        state: "active",
        seconds: 99,
        statement: "x",
      }],
      standbys: [{
        name: "s",
        address: "10.0.0.2",
        state: "streaming",
        sync: "async",
        lag_bytes: 9,
        lag_seconds: 90,
      }],
      slots: [{ name: "s", kind: "physical", active: false, status: "reserved", held_bytes: 5e9 }],
      replication_lag_seconds: 90,
      replication_lag_bytes: 9,
      oldest_transaction_seconds: 1_200,
      connections_used: 0.95,
      wraparound: 0.6,
      commits: 3,
      rollbacks: 1,
      cache_hit: 0.99,
      wal_bytes: 1e4,
      tuples_written: 2,
      checkpoints: 0.001,
      database_bytes: 1e8,
    };
    await holder`rollback`;
    await waiting;
    await using collector = session(server.urlFor("collector", "collect"), "collector");
    const batch = (at: Date, metrics: Any = taken, of = instance) => (
      { time: at.toISOString(), host: "web1", instance: of, about: { interval: 5 }, metrics }
    );
    const send = async (records: unknown[]) => {
      const [{ collect }] = await collector`select pgpulse.collect(${
        JSON.stringify(records)
      }::text::json)`;
      return collect;
    };
    const now = Date.now();
    await send(Array.from({ length: 13 }, (_, i) => batch(new Date(now - i * 5_000))));

    await t.step("people's queries: every view has rows, named columns and numbers", async () => {
      const views = await reader`
        select viewname as name from pg_views
        where schemaname = 'public' and viewname ~ '^postgresql_(?!metrics)'
      `;
      ok(views.length >= 14, `${views.length}`);
      for (const { name } of views) {
        const rows = await reader`select * from ${reader(name)} where instance = ${instance}`;
        ok(rows.length > 0, `${name} is empty`);
        if (name !== "postgresql_now") ok(rows[0].time instanceof Date, name);
      }
      const [{ ...activity }] = await reader`
        select connections > 1 as connections, blocked, active >= 1 as active, sees_all, version
        from postgresql_activity order by time desc limit 1
      `;
      deepStrictEqual(activity, {
        connections: true,
        blocked: 1,
        active: true,
        sees_all: true,
        version: taken.version,
      });
      const [blocked] = await reader`
        select application, "on", by_application, by_state from postgresql_blocked limit 1
      `;
      deepStrictEqual({ ...blocked }, {
        application: "waiter",
        on: "public.live_metrics",
        by_application: "holder",
        by_state: "idle in transaction",
      });
      const [table] = await reader`
        select "table", bytes, dead, vacuumed from postgresql_tables limit 1
      `;
      deepStrictEqual({ ...table }, {
        table: "public.t",
        bytes: 2e6,
        dead: 5,
        vacuumed: new Date(1.7e12),
      });
      const [{ silent }] = await reader`select silent from postgresql_now`;
      strictEqual(silent, false);
    });

    await t.step("clocks that are wrong hide nothing, and make nothing silent", async () => {
      const hour = 3_600_000;
      const read = async (of: string) => {
        const [row] = await reader`
          select silent, connections::int, (extract(epoch from now() - last_seen) / 60)::int as minutes
          from postgresql_now where instance = ${of}`;
        return { ...row };
      };
      /** A sample by a clock that is so much ahead; a fresh one says what that clock is. */
      const take = (of: string, ahead: number, connections: number, fresh = true) => {
        const at = new Date(Date.now() + ahead);
        const about = { interval: 5, ...fresh && { now: at } };
        return send([{ ...batch(at, { connections }, of), about }]);
      };
      await take("jumps", 20 * hour, 1, false);
      await take("jumps", 20 * hour + 1, 2);
      await pause(10);
      for (const [i, ahead] of [0, 20 * hour + 1000, -hour, 2000].entries()) {
        await take("jumps", ahead, 3 + i);
        deepStrictEqual(await read("jumps"), { silent: false, connections: 3 + i, minutes: 0 });
      }
      // What waited in a spool is no sign of life.
      await take("backlog", -24 * 60_000, 8, false);
      deepStrictEqual(await read("backlog"), { silent: true, connections: 8, minutes: 24 });
      await take("backlog", -2 * hour, 9, false);
      deepStrictEqual(await read("backlog"), { silent: true, connections: 8, minutes: 24 });
      await sql`delete from postgresql_instances where instance in ('jumps', 'backlog')`;
    });

    await t.step("odd metrics make no query fail", async () => {
      const odd = [{}, {
        tables: 1,
        waits: [],
        locks: "x",
        blocked_sessions: { by: 2 },
        slots: [null],
      }, {
        connections: "many",
        statements: [{ calls: "x" }],
        states: 3,
        standbys: {},
        transactions: ["x"],
      }];
      const all = postgres(server.urlFor("server", "server"), { max: 1 });
      for (const [i, metrics] of odd.entries()) {
        await all`select pgpulse.collect(${
          JSON.stringify([batch(new Date(now - i * 1000), metrics, "odd")])
        }::text::json)`;
      }
      await all.end();
      for (const [, { rawSql }] of targets) {
        await reader.unsafe(expand(rawSql, values(3600, "odd")));
      }
      for (
        const { name } of await reader`
        select viewname as name
        from pg_views
        where schemaname in ('public', 'live') and viewname ~ '^postgresql'
      `
      ) {
        await reader.unsafe(`select * from ${name === "postgresql" ? "live.postgresql" : name}`);
      }
      await sql`delete from postgresql_metrics where instance = 'odd'`.catch(() => {});
    });

    await t.step(
      "the live stream has a channel for each, and the dashboard its address",
      async () => {
        const channels = await reader`
        select address, rows
        from pgpulse.channels
        where stream = 'postgresql' and value = ${instance}
      `;
        const [, variable] = dashboard.templating.list;
        const [{ __value }] = await reader.unsafe(expand(variable.query, values(60, instance)));
        deepStrictEqual(channels.map((row) => ({ ...row })), [{ address: __value, rows: 300 }]);
      },
    );

    await t.step("the dashboard draws each series and fills each table, at any range", async () => {
      for (const range of [300, 3600, 86_400, 30 * 86_400, 365 * 86_400]) {
        for (const [title, { rawSql, format }] of targets) {
          const rows = await reader.unsafe(expand(rawSql, values(range, instance)));
          ok(rows.length > 0, `${title}: no rows at ${range} s`);
          for (const { name } of rows.columns) {
            // of tables there is but one reading
            if (name === "metric") throw new Error(`${title}: Grafana takes "metric" for a name`);
            ok(rows.some((row) => row[name] !== null), `${title}: no ${name} at ${range} s`);
          }
          if (format !== "time_series") continue;
          strictEqual(rows.columns[0].name, "time", title);
          ok(rows.every((row, i) => i === 0 || row.time >= rows[i - 1].time), `${title}: order`);
        }
      }
      // They end, too.
      const old = { from: "1990-01-01", to: "1990-01-02", instance: "bob''s@db1:5432" };
      for (const [, { rawSql }] of targets) await reader.unsafe(expand(rawSql, old));
    });

    await t.step("alerts: each fires for that database, and not for one that is well", async () => {
      const well = {
        ...taken,
        blocked: 0,
        oldest_transaction_seconds: 1,
        replication_lag_seconds: 1,
        connections_used: 0.1,
        wraparound: 0.01,
      };
      // so that a slow test is not silent
      await sql`insert into hosts (host, "interval") values ('web1', '10 minutes')`;
      await send([
        batch(new Date(), well, "well"),
        // It stopped an hour ago, and another one two days ago.
        batch(new Date(now - 3_600_000), taken, "gone"),
        batch(new Date(now - 48 * 3_600_000), taken, "long gone"),
      ]);
      strictEqual(rules.length, 6);
      for (const { title, data, annotations, uid } of rules) {
        const rows = await reader.unsafe(data[0].model.rawSql);
        const value = rows.columns.find(({ name }) => name !== "instance")!.name;
        strictEqual(value, data[0].refId, `${title}: the summary goes by that name`);
        const [{ evaluator: { params: [limit] } }] = data[1].model.conditions;
        deepStrictEqual(
          rows.filter(({ instance }) => instance !== "odd")
            .map((row) => [row.instance, row[value] > limit]).sort(),
          uid === "postgresql-silent"
            ? [["gone", true], ["long gone", true]]
            : [[instance, true], ["well", false]],
          title,
        );
        ok(annotations.runbook && uid.startsWith("postgresql-"));
      }
      ok(
        !read("grafana/provisioning/alerting/postgresql.yaml").split("\n")
          .some((line) => line.includes("$") && !line.startsWith("#")),
      );
    });

    await t.step("a collector reads nothing of it", async () => {
      await using collector = session(server.urlFor("collector", "collect"), "collector");
      await rejects(
        async () => await collector`select * from postgresql_activity`,
        /permission denied/,
      );
    });
  });
}

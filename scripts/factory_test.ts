// Tables of a factory that were there before pgpulse: used as they are, and given back.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { script, testServer } from "./testing.ts";

Deno.test("a factory's own tables are used, and given back", async (t) => {
  await using server = await testServer();
  const { sql, url } = server;
  const env = { DATABASE_URL: url, DB_PASSWORD: "server", GRAFANA_DB_PASSWORD: "grafana" };
  const migrate = (...args: string[]) => script("migrate.ts", args, env);

  await t.step(
    "a table of another shape leaves the factory out, and all else is there",
    async () => {
      await sql`create table downtime (id serial, machine_id int, cause text)`;
      for (const again of [false, true]) {
        const { code, stdout, stderr } = await migrate();
        strictEqual(code, 0, stderr);
        match(stdout, /Leaves out sql\/migrations\/006-factory.sql.*Cannot use public.downtime/);
        match(stdout, /It lacks "machine_id" text, "reason" text, "started_at" timestamptz/);
        strictEqual(/Applied sql/.test(stdout), !again, stdout);
      }
      const server_ = postgres(server.urlFor("server", "server"), { max: 1 });
      await server_`insert into live_metrics (value) values (1)`;
      strictEqual((await server_`select from live.live_metrics`).length, 1);
      await rejects(server_`select from downtime`, /permission denied/);
      await server_.end();
      const { stdout } = await migrate("--status");
      match(stdout, /^pending .*006-factory.sql$/m);
      match(stdout, /^applied .*007-sinks.sql$/m);
      const [{ machines }] = await sql`select to_regclass('machines') as machines`;
      strictEqual(machines, null);
      await sql`drop table downtime`;
    },
  );

  await t.step("machines with columns of its own, numbers of other types, rows", async () => {
    await sql.unsafe(`
      create table machines (
          id varchar(20) primary key,
          name varchar(80),
          area varchar(40),
          status varchar(20),
          oee numeric(5, 2),
          availability numeric(5, 2),
          performance numeric(5, 2),
          quality numeric(5, 2),
          last_updated timestamptz default now(),
          line int
      );
      insert into machines values ('A1', 'Saw', 'Wood', 'running', 70, 80, 90, 97, now(), 3);
      create role app login password 'app';
      create role clerk;
      grant clerk to app;
      grant select, insert, delete on machines to app;
      grant update (status, line) on machines to clerk;
      create table machine_metrics (
          id bigserial primary key,
          machine_id varchar(20),
          metric_type varchar(40),
          value numeric,
          "timestamp" timestamptz default now(),
          zone_number smallint,
          target_value real
      );
      insert into machine_metrics (machine_id, metric_type, value, "timestamp")
      select 'A1', 'temperature', 50, now() - i * interval '1 minute' from generate_series(1, 90) i;
    `);
    const { code, stdout, stderr } = await migrate();
    strictEqual(code, 0, stderr);
    match(stdout, /Leaves public.machine_metrics as it is: migrate did not make it/);
    match(stdout, /select pgpulse.add_factory\(\)/);
    ok(!/Leaves public.production/.test(stdout));
    const [{ rollups }] = await sql`
      select array_agg(rollup order by 1) as rollups
      from pgpulse.rollups
      where source::text ~ 'machine|energy|production'
    `;
    deepStrictEqual(rollups, ["energy_consumption", "production"]);
    const [tx] = await sql`
      select from pg_attribute where attrelid = 'machine_metrics'::regclass and attname = 'tx'
    `;
    strictEqual(tx, undefined);
  });

  await t.step("the present is read and written as before, and has a past now", async () => {
    await sql`update machines set status = 'error', line = 4 where id = 'A1'`;
    await sql`
      insert into machines (id, status, line) values ('A1', 'idle', 5)
      on conflict (id) do update set status = excluded.status
    `;
    const [machine] = await sql`
      select name, status, oee::float8, line, plant, "timestamp" < now() as present from machines
    `;
    deepStrictEqual({ ...machine }, {
      name: "Saw",
      status: "idle",
      oee: 70,
      line: 4,
      plant: "main",
      present: true,
    });
    const past = await sql`select status from machine_history order by "timestamp"`;
    deepStrictEqual(past.map(({ status }) => status), ["running", "error", "idle"]);
  });

  await t.step("who had rights on machines has them still, and no more", async () => {
    const app = postgres(server.urlFor("app", "app"), { max: 1 });
    strictEqual((await app`select id from machines`).length, 1);
    await app`insert into machines (id, status) values ('A2', 'idle')`;
    await app`update machines set status = 'error', line = 9 where id = 'A2'`;
    await rejects(app`update machines set name = 'x'`, /permission denied/);
    await app`delete from machines where id = 'A2'`;
    await app.end();
    await sql`delete from machine_history where machine_id = 'A2'`;
    await sql`revoke select on machines from app`;
    await sql`delete from pgpulse.migrations where name = '200-factory.sql'`;
    strictEqual((await migrate()).code, 0);
    const [{ may }] = await sql`select has_table_privilege('app', 'machines', 'select') as may`;
    strictEqual(may, false, "what was taken away later stays so");
  });

  await t.step("add_factory rolls their metrics up", async () => {
    await sql`select pgpulse.add_factory()`;
    const [{ points, avg }] = await sql`
      select sum(point_count)::int as points, max(avg_value) as avg from machine_metrics_hourly
    `;
    deepStrictEqual([points, avg], [90, 50]);
  });

  await t.step("--uninstall --data leaves what it did not make", async () => {
    const { code, stdout, stderr } = await migrate("--uninstall", "--data", "--yes");
    strictEqual(code, 0, stderr);
    match(stdout, /keeps table public.machines: migrate did not make it/);
    match(stdout, /keeps table public.machine_metrics: migrate did not make it/);
    match(stdout, /drops table public.production with its data/);
    const tables = await sql`
      select relname, relkind from pg_class
      where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v') order by 1
    `;
    deepStrictEqual(tables.map(({ relname, relkind }) => `${relname} ${relkind}`), [
      "machine_metrics r",
      "machines r",
    ]);
    const [{ rows }] = await sql`select count(*)::int as rows from machine_metrics`;
    strictEqual(rows, 90);
    await sql`update machines set status = 'running', line = 6`;
  });
});

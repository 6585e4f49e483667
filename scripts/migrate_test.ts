import { deepStrictEqual as same, match, ok, strictEqual as equal, throws } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import {
  type Applied,
  plan,
  scramVerifier,
  type SqlFile,
  statements,
  supported,
} from "./migrate.ts";
import { installed, ROOT, script, type TestServer, testServer, until } from "./testing.ts";

// --- parts ---------------------------------------------------------------------------------

Deno.test("statements are cut where psql cuts them", () => {
  const pieces = (text: string) => statements(text).map((s) => s.text);
  same(pieces("select 1; select 2"), ["select 1;", "select 2"]);
  same(pieces(";; -- nothing; here\n /* nor; /* nested; */ here; */ ;"), []);
  for (
    const whole of [
      "select 'a;''b;';",
      String.raw`select E'it\'s; one', e'\\';`,
      String.raw`select E'over' ` + "\n" + String.raw` 'two\'; lines';`,
      `select "odd;""name" from t;`,
      "select $$a;b$$, $x$ $$;$$ $y$; $x$, $ü$;$ü$;",
      "select a$b, $1, c$d$e from t where x = 'y;';",
      "create rule r as on insert to t do also (delete from a; delete from b);",
      "create function f() returns int language sql begin atomic select case when true then 1 end; " +
      "select 2; end;",
      "create procedure p() language sql begin /* ; */ atomic insert into t values (1); end;",
      "do $do$ begin perform 1; if true then null; end if; end $do$;",
      "select 1 -- comment; with 'quote\n + /* it's; */ 2;",
    ]
  ) {
    same(pieces(`  ${whole}\n-- between;\nselect 2;`), [whole, "select 2;"]);
  }
  same(pieces("select 'open; quote"), ["select 'open; quote"]);
  same(pieces("select 1; /* open; comment"), ["select 1;"]);
  same(statements("-- head\n\n  select 1;").map((s) => s.start), [11]);
});

const file = (kind: string, name: string, hash = "h"): SqlFile => ({
  kind,
  name,
  hash,
  text: "",
  path: `sql/${kind}s/${name}`,
});
const row = (kind: string, name: string, hash = "h"): Applied => ({
  kind,
  name,
  hash,
  applied_at: new Date(0),
});

Deno.test("the plan orders migrations by number, functions by name, and knows their states", () => {
  const files = [
    file("function", "b.sql"),
    file("function", "a.sql", "new"),
    file("function", "c.sql"),
    file("migration", "1000-late.sql"),
    file("migration", "002-b.sql"),
    file("migration", "001-a.sql"),
  ];
  const ledger = [
    row("migration", "001-a.sql"),
    row("function", "a.sql"),
    row("function", "b.sql"),
    row("function", "old.sql"),
  ];
  same(plan(files, ledger).map((s) => `${s.path} ${s.state}`), [
    "sql/migrations/001-a.sql applied",
    "sql/migrations/002-b.sql pending",
    "sql/migrations/1000-late.sql pending",
    "sql/functions/a.sql changed",
    "sql/functions/b.sql applied",
    "sql/functions/c.sql pending",
    "sql/functions/old.sql gone",
  ]);
});

Deno.test("the plan refuses what cannot be right, and says which number is free", () => {
  const problems = (names: string[], ledger: Applied[]) =>
    plan(names.map((name) => file("migration", name)), ledger)
      .filter((s) => s.state === "refused").map((s) => `${s.path} ${s.problem}`);
  const [edited] = problems(["001-a.sql"], [row("migration", "001-a.sql", "other")]);
  match(edited, /^sql\/migrations\/001-a.sql was edited .* write the change as 002-/);
  const clash = problems(["001-a.sql", "002-b.sql", "002-c.sql"], [row("migration", "001-a.sql")]);
  equal(clash.length, 2);
  match(clash[0], /002-b.sql has the number of 002-c.sql; .* the number 003$/);
  const ledger = [row("migration", "001-a.sql"), row("migration", "003-c.sql")];
  const [late] = problems(["001-a.sql", "002-b.sql", "003-c.sql"], ledger);
  match(late, /002-b.sql comes before 003-c.sql, which is applied already; give it the number 004/);
  const [gone] = problems(["001-a.sql"], ledger);
  match(gone, /003-c.sql is applied in this database but missing here; update this checkout/);
  match(problems(["1-a.sql"], [])[0], /1-a.sql is no name of a migration; call it 002-/);
  match(problems(["users.sql"], [])[0], /users.sql is no name of a migration; call it 001-/);
});

Deno.test("a password becomes the verifier that PostgreSQL itself would make", () => {
  equal(
    scramVerifier(
      "pencil",
      Uint8Array.from(atob("W22ZaJ0SNY7soEsUEjb6gQ=="), (c) => c.charCodeAt(0)),
    ),
    "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:" +
      "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=",
  );
  ok(scramVerifier("a") !== scramVerifier("a"), "salted");
});

Deno.test("a server older than 15 is refused", () => {
  throws(() => supported("14.9", 140009), /Cannot use PostgreSQL 14.9: expected 15 or newer/);
  supported("15.0", 150000);
});

// --- the command ---------------------------------------------------------------------------

const TREES = await Deno.makeTempDir({ prefix: "pgpulse-sql-" });
globalThis.addEventListener("unload", () => Deno.removeSync(TREES, { recursive: true }));

/** Writes a folder like sql/; `roles.sql` and the like are copied from the real one by name. */
async function tree(files: Record<string, string>, real: string[] = []): Promise<string> {
  const dir = await Deno.makeTempDir({ dir: TREES });
  await Deno.mkdir(join(dir, "migrations"));
  await Deno.mkdir(join(dir, "functions"));
  for (const name of real) await Deno.copyFile(join(ROOT, "sql", name), join(dir, name));
  await write(dir, files);
  return dir;
}

async function write(dir: string, files: Record<string, string>): Promise<void> {
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(dir, name), text);
}

/** A database of its own for one test. */
class Scratch {
  constructor(readonly url: string, readonly sql: postgres.Sql, readonly server: TestServer) {}
  static async make(server: TestServer, owner?: string): Promise<Scratch> {
    const name = `t${crypto.randomUUID().slice(0, 8)}`;
    await server.sql.unsafe(`create database ${name} ${owner ? `owner ${owner}` : ""}`);
    const admin = server.urlFor("user", "secret", name);
    const url = owner ? server.urlFor(owner, "secret", name) : admin;
    return new Scratch(url, postgres(admin, { max: 2, onnotice: () => {} }), server);
  }
  get name() {
    return new URL(this.url).pathname.slice(1);
  }
  run(args: string[], env: Record<string, string> = {}) {
    return script("migrate.ts", ["--wait", "0", ...args], { DATABASE_URL: this.url, ...env });
  }
  async done(args: string[], env: Record<string, string> = {}): Promise<string> {
    const { code, stdout, stderr } = await this.run(args, env);
    equal(code, 0, stderr + stdout);
    return stdout;
  }
  async fails(args: string[], env: Record<string, string> = {}): Promise<string> {
    const { code, stdout, stderr } = await this.run(args, env);
    equal(code, 1, stdout);
    ok(!/^ +at /m.test(stderr), `no stack trace: ${stderr}`);
    return stderr;
  }
  /** Everything in the database that is not the system's own. */
  async contents(): Promise<string[]> {
    const rows = await this.sql`
      select pg_describe_object(classid, objid, 0) as what
      from (
        select 'pg_class'::regclass as classid, oid as objid, relnamespace as space from pg_class
        union all select 'pg_proc'::regclass, oid, pronamespace from pg_proc
        union all select 'pg_type'::regclass, oid, typnamespace from pg_type
        union all select 'pg_namespace'::regclass, oid, oid from pg_namespace
        union all select 'pg_trigger'::regclass, oid, null from pg_trigger where not tgisinternal
        union all select 'pg_default_acl'::regclass, oid, null from pg_default_acl
      ) as objects
      where space is null or space in (
        select oid from pg_namespace where nspname !~ '^pg_' and nspname <> 'information_schema'
      )
      order by 1`;
    return rows.map((r) => r.what);
  }
  /** Leaves the server as it was, roles included. */
  async [Symbol.asyncDispose]() {
    await this.sql.end({ timeout: 1 });
    const { sql } = this.server;
    await sql.unsafe(`drop database ${this.name} with (force)`);
    for (const role of ["server", "grafana_readonly"]) {
      // Another database of the same test may still need it; its own end comes later.
      await sql.unsafe(`drop role if exists ${role}`).catch(() => {});
    }
  }
}

/** Starts the script and gathers what it prints, to watch it at work. */
function launch(args: string[], env: Record<string, string>) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", join(ROOT, "scripts/migrate.ts"), ...args],
    env,
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const said = { text: "" };
  const gather = async (stream: ReadableStream<Uint8Array<ArrayBuffer>>) => {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) said.text += text;
  };
  const all = Promise.all([gather(child.stdout), gather(child.stderr), child.status]);
  return { child, said, ended: async () => (await all)[2].code };
}

const PASSWORDS = { DB_PASSWORD: "pass'word$1 ü", GRAFANA_DB_PASSWORD: "123456" };

Deno.test("files are applied", async (t) => {
  await using server = await testServer();

  await t.step("applies in order, once, and says what there is", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({
      "migrations/002-b.sql": "insert into log values ('002');",
      "migrations/001-a.sql": "create table log (line text);\nset datestyle = 'German';",
      "migrations/010-c.sql": "insert into log values ('010 ' || current_setting('datestyle'))",
      "functions/b.sql": "insert into log values ('b')",
      "functions/a.sql": "insert into log values ('a')",
      "functions/notes.txt": "no SQL",
      "grants.sql": "insert into log values ('grants');",
    });
    const before = await db.contents();
    match(
      await db.done(["--dir", dir, "--dry-run"]),
      /pending .*001-a[^]*pending .*functions\/b/,
    );
    match(await db.done(["--dir", dir, "--status"]), /pending +\S*\/migrations\/001-a.sql/);
    same(await db.contents(), before, "nothing was touched");
    match(await db.done(["--dir", dir]), /001-a[^]*002-b[^]*010-c[^]*Applied 5 files/);
    match(await db.done(["--dir", dir]), /^Nothing to do: database "t\w+" at "127.0.0.1:\d+"/);
    const lines = await db.sql`select line from log`;
    same(lines.map((l) => l.line), ["002", "010 ISO, MDY", "a", "b", "grants", "grants"]);
    match(await db.done(["--dir", dir, "--status"]), /applied +\d{4}-\S+Z +\S+001-a.sql/);
    const { items } = JSON.parse(await db.done(["--dir", dir, "--status", "--json"]));
    equal(items.filter((i: { state: string }) => i.state === "applied").length, 5);
  });

  await t.step("refuses an edited migration, not a checkout with CRLF", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({ "migrations/001-a.sql": "create table a ();\n-- end\n" });
    await db.done(["--dir", dir]);
    await write(dir, { "migrations/001-a.sql": "\ufeffcreate table a ();\r\n-- end\r\n" });
    match(await db.done(["--dir", dir]), /^Nothing to do/);
    await write(dir, {
      "migrations/001-a.sql": "create table a (id int);",
      "migrations/002-b.sql": "create table b ();",
    });
    const said = await db.fails(["--dir", dir]);
    match(
      said,
      /Cannot migrate .*\n +\S+\/migrations\/001-a.sql was edited after it was applied/,
    );
    match(said, /003-what-it-does.sql/);
    match(await db.fails(["--dir", dir, "--dry-run"]), /was edited/);
    match(await db.done(["--dir", dir, "--status"]), /refused .*001-a.sql\n +was edited/);
    ok(!(await db.contents()).includes("table b"), "the next one was not applied");
  });

  await t.step("applies a function again when it changed, forgets one that is gone", async () => {
    await using db = await Scratch.make(server);
    const body = (n: number) =>
      `create or replace function f() returns int language sql as 'select ${n}';\n` +
      `insert into log values (${n});`;
    const dir = await tree({
      "migrations/001-log.sql": "create table log (n int)",
      "functions/f.sql": body(1),
      "functions/g.sql": "select 1",
    });
    await db.done(["--dir", dir]);
    await db.done(["--dir", dir]);
    await write(dir, { "functions/f.sql": body(2) });
    await Deno.remove(join(dir, "functions/g.sql"));
    match(await db.done(["--dir", dir, "--dry-run"]), /changed .*f.sql\n.*gone .*g.sql/);
    const said = await db.done(["--dir", dir]);
    match(said, /Applied \S+f.sql again/);
    match(said, /Forgot \S+g.sql: it is gone/);
    match(await db.done(["--dir", dir]), /^Nothing to do/);
    same((await db.sql`select n, f() from log order by n`).map((r) => [r.n, r.f]), [[1, 2], [
      2,
      2,
    ]]);
  });

  await t.step("rolls a failed file back and shows the place", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({ "migrations/001-a.sql": "create table a (id int);" });
    await db.done(["--dir", dir]);
    const plpgsql = "returns int language plpgsql as $$";
    // § marks the place that the message has to name.
    const cases: Record<string, RegExp> = {
      "insert into a values (1);\nselect '🚀🚀',\n\t§none from a;": /column "none" does not exist/,
      "create table b ();\n\n§selekt 1;": /syntax error at or near "selekt"/,
      "create table b ();\n\n  §create table a ();": /relation "a" already exists/,
      [`create function f() ${plpgsql}\nbegin\n  §oops 1;\nend $$;`]: /error at or near "oops"/,
      "select 1;\ndo $$\nbegin\n  §raise exception 'not today';\nend $$;": /: not today\n/,
      "do $$\nbegin\n  insert into a\n    values (§none);\nend $$;": /column "none" does not/,
      [`create function g() ${plpgsql} begin perform 1 / 0; end $$;\n§select g();`]:
        /division by zero\n[^]*Where: .*\n?.*function g\(\) line 1/,
      "select 1;\nselect §'open;\n": /unterminated quoted string/,
      "create table b ();\n§commit;": /no transaction begins or ends/,
      "§begin transaction;\ncreate table b ();": /no transaction begins or ends/,
    };
    for (const [marked, message] of Object.entries(cases)) {
      await write(dir, { "migrations/002-b.sql": marked.replace("§", "") });
      const said = await db.fails(["--dir", dir]);
      const lines = marked.slice(0, marked.indexOf("§")).split("\n");
      match(said, new RegExp(`Cannot apply \\S+/migrations/002-b.sql:${lines.length}: `), marked);
      match(said, message);
      equal(said.split("\n")[2].replace(/\t/g, " "), " ".repeat(4 + lines.at(-1)!.length) + "^");
      ok(!(await db.contents()).some((what) => /table b|function/.test(what)), marked);
    }
    equal((await db.sql`select from a`).length, 0);
    await write(dir, { "migrations/002-b.sql": "create table b ();" });
    match(await db.done(["--dir", dir]), /Applied \S+002-b.sql/);
  });

  await t.step("runs a file without a transaction one statement at a time", async () => {
    await using db = await Scratch.make(server);
    const index = "create index concurrently";
    const dir = await tree({
      "migrations/001-a.sql": "create table a (id int);",
      "migrations/002-index.sql":
        `-- no transaction: built beside the writers\n${index} if not exists one on a (id);\n` +
        `${index} two on a (none);`,
    });
    const said = await db.fails(["--dir", dir]);
    match(said, /002-index.sql:3: column "none" does not exist/);
    match(said, /Statements before it stay/);
    ok((await db.contents()).includes("index one"));
    const second = await Deno.readTextFile(join(dir, "migrations/002-index.sql"));
    await write(dir, { "migrations/002-index.sql": second.replace("none", "id") });
    match(await db.done(["--dir", dir]), /^Applied \S+002-index.sql/m);
    ok((await db.contents()).includes("index two"));
  });

  await t.step("two at once: one waits, idle, and each file is applied once", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({
      "migrations/001-a.sql": "create table a (id int); insert into a values (1);",
    });
    const holder = await db.sql.reserve();
    await holder`select pg_advisory_lock(hashtextextended('pgpulse migrate', 0))`;
    const env = { DATABASE_URL: db.url };
    const both = [launch(["--dir", dir], env), launch(["--dir", dir], env)];
    await until("both wait", () => both.every((b) => b.said.text.includes("Waits: another")));
    // Blocks for ever when one of them waits inside a statement.
    await holder`create table elsewhere (id int)`;
    await holder`create index concurrently on elsewhere (id)`;
    await holder`select pg_advisory_unlock_all()`;
    holder.release();
    same(await Promise.all(both.map((b) => b.ended())), [0, 0]);
    const texts = both.map((b) => b.said.text);
    equal(texts.filter((text) => text.includes("Applied 1 file:")).length, 1, texts.join());
    equal(texts.filter((text) => text.includes("Nothing to do:")).length, 1, texts.join());
    for (const text of texts) equal(text.match(/Waits/g)!.length, 1, "said once");
    equal((await db.sql`select from a`).length, 1);
  });

  await t.step("kill -9 in the middle leaves nothing half done", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({
      "migrations/001-a.sql": "create table a ();",
      "migrations/002-b.sql": "create table b (); select pg_sleep(600);",
    });
    const { child, ended } = launch(["--dir", dir], { DATABASE_URL: db.url });
    const asleep = async () =>
      (await db.sql`select from pg_stat_activity where query like '%pg_sleep(600)%'
          and pid <> pg_backend_pid() and state = 'active'`).length > 0;
    await until("the migration sleeps", asleep);
    child.kill("SIGKILL");
    await ended();
    await write(dir, { "migrations/002-b.sql": "create table b ();" });
    // The server notices by itself that the client is gone, and lets go of the lock.
    const said = await db.done(["--dir", dir]);
    match(said, /Applied 1 file:/);
    ok(!await asleep());
  });

  await t.step("waits for a database that starts, and says so once", async () => {
    await using db = await Scratch.make(server);
    const dir = await tree({ "migrations/001-a.sql": "select 1" });
    const pooler = { DATABASE_URL: `${db.url}?pgbouncer=true` };
    match(await db.fails(["--dir", dir], pooler), /Cannot migrate through a pooler in transaction/);
    await server.kill();
    match(await db.fails(["--dir", dir]), /^Cannot use "127.0.0.1:\d+": nothing listens there/);
    const { said, ended } = launch(["--dir", dir, "--wait", "50"], { DATABASE_URL: db.url });
    await until("it waits", () => said.text.includes("Waits for it, at most 50 s"));
    await server.start();
    equal(await ended(), 0, said.text);
    match(said.text, /^Cannot use .*\nThe database answers\nApplied/);
    const wrong = { DATABASE_URL: db.url.replace("secret", "hush") };
    const { code, stderr, stdout } = await db.run(["--wait", "50"], wrong);
    equal(code, 1, stdout);
    match(stderr, /^Cannot use .*: the password of "user" is wrong/);
    ok(!stderr.includes("hush"));
  });
});

// What a role may do differs from major to major.
for (const major of [15, 18] as const) {
  Deno.test(`roles, and the real sql/, on PostgreSQL ${major}`, async (t) => {
    await using server = await testServer({ major });

    await t.step("creates roles with passwords that nobody sees", async () => {
      await using db = await Scratch.make(server);
      const dir = await tree({ "migrations/001-a.sql": "select 1" }, ["roles.sql"]);
      // Of a password that came as it is the server would make an MD5 hash here.
      await db.sql.unsafe(`alter database ${db.name} set password_encryption = 'md5'`);
      const login = (role: string, password: string) => {
        const sql = postgres(server.urlFor(role, "", db.name), {
          password,
          max: 1,
          onnotice: () => {},
        });
        return sql`select 1`.then(() => true, () => false).finally(() => sql.end());
      };
      match(await db.done(["--dir", dir, "--dry-run"]), /missing +role server/);
      // As in compose: no DATABASE_URL, the owner by POSTGRES_PASSWORD.
      const first = await db.done(["--dir", dir], {
        ...PASSWORDS,
        DATABASE_URL: "",
        DB_HOST: "127.0.0.1",
        DB_PORT: `${server.port}`,
        DB_NAME: db.name,
        POSTGRES_PASSWORD: "secret",
        GRAFANA_DB_PASSWORD: "",
      });
      match(first, /Created role "server": password set from DB_PASSWORD/);
      match(first, /"grafana_readonly": no password set; set GRAFANA_DB_PASSWORD and run/);
      ok(!first.includes("pass'word"));
      ok(await login("server", PASSWORDS.DB_PASSWORD));
      match(await db.done(["--dir", dir], { DB_PASSWORD: "other" }), /^Nothing to do/);
      ok(await login("server", PASSWORDS.DB_PASSWORD), "an existing role keeps its password");
      await db.done(["--dir", dir, "--set-passwords"], { ...PASSWORDS, DB_PASSWORD: "other" });
      ok(await login("server", "other"));
      ok(await login("grafana_readonly", PASSWORDS.GRAFANA_DB_PASSWORD));
      const stored = await server.sql`
        select rolpassword from pg_authid where rolname in ('server', 'grafana_readonly')`;
      for (const { rolpassword } of stored) match(rolpassword, /^SCRAM-SHA-256\$4096:/);
    });

    await t.step("the real sql/ goes in twice, comes out clean, and goes in again", async () => {
      await using db = await Scratch.make(server);
      const before = await db.contents();
      await db.done([], PASSWORDS);
      match(await db.done([], PASSWORDS), /^Nothing to do/);
      const after = await db.contents();
      await db.sql`insert into metrics (value) values (1)`;

      match(
        await db.fails(["--uninstall"]),
        /Nothing was removed; to do it, answer y or add --yes/,
      );
      match(
        await db.done(["--uninstall", "--dry-run"]),
        /keeps table public.metrics with its data/,
      );
      same(await db.contents(), after, "listing removes nothing");

      match(await db.done(["--uninstall", "--yes"]), /drops role server\n[^]*Removed pgpulse/);
      equal((await db.sql`select from metrics`).length, 1);
      const left = (await db.contents()).filter((what) => !before.includes(what));
      const tables =
        "metrics|live_metrics|machines|machine_states|machine_history|machine_metrics|" +
        "energy_consumption|production|alarms|maintenance|downtime|" +
        "hosts|system_metrics|postgresql_metrics|postgresql_instances|" +
        "reading_analytics|reading_keys|reading_failures|reading_sources|reading_flow|sync_runs";
      // Stored ones stay views over schemas rows and packed.
      const data = new RegExp(`\\b(${tables}|idx_machine_metrics|rows|packed)(\\b|_)`);
      same(left.filter((what) => !data.test(what)), [], "only tables stay");
      equal((await db.sql`select from pg_roles where rolname = 'server'`).length, 0);

      await db.done([], PASSWORDS);
      same(await db.contents(), after, "installed again beside the data");
      equal((await db.sql`select from metrics`).length, 1);
      await db.done(["--uninstall", "--data", "--yes"]);
      same(await db.contents(), before, "nothing stays");
      match(await db.done(["--uninstall", "--data", "--yes"]), /Removed/);
    });

    await t.step(
      "an owner who may not create roles gets the SQL for an administrator",
      async () => {
        await server.sql`create role landlord login password 'secret'`;
        await using db = await Scratch.make(server, "landlord");
        const said = await db.done([], PASSWORDS);
        match(said, /Cannot create roles as "landlord"; all else goes on/);
        const orders = said.match(/create role \w+ login password '...'/g)!;
        equal(orders.length, 3);
        for (const order of orders) await server.sql.unsafe(order.replace("...", "secret"));
        match(await db.done([], PASSWORDS), /^Nothing to do/);
        const at = (role: string) => db.url.replace("landlord", role);
        const reader = postgres(at("grafana_readonly"), { max: 1 });
        const writer = postgres(at("server"), { max: 1 });
        await writer`insert into metrics (value) values (1)`;
        equal((await reader`select from metrics`).length, 1);
        await Promise.all([reader.end(), writer.end()]);
        const refused = await db.fails(["--set-passwords"], PASSWORDS);
        match(refused, /Cannot set the password of "\w+" as "landlord": permission denied/);
        const gone = await db.done(["--uninstall", "--data", "--yes"]);
        match(gone, /keeps role server and its rights on what stays: migrate did not make it/);
        equal((await db.sql`select from pg_roles where rolname = 'server'`).length, 1);
      },
    );

    await t.step("an owner who may create roles, no superuser, does all of it", async () => {
      await server.sql`create role manager login createrole password 'secret'`;
      await using db = await Scratch.make(server, "manager");
      const before = await db.contents();
      match(await db.done([], PASSWORDS), /Created role "grafana_readonly": password set/);
      match(await db.done(["--set-passwords"], PASSWORDS), /Role "server": password set/);
      match(await db.done(["--uninstall", "--data", "--yes"]), /drops role grafana_readonly/);
      same(await db.contents(), before);
    });

    await t.step("a role that something else needs is kept", async () => {
      await using db = await Scratch.make(server);
      await using other = await Scratch.make(server);
      const dir = await tree({ "migrations/001-a.sql": "" }, ["roles.sql", "uninstall.sql"]);
      await db.done(["--dir", dir], PASSWORDS);
      await other.sql.unsafe("create table theirs (); grant select on theirs to grafana_readonly");
      await db.sql.unsafe("create table mine (); alter table mine owner to server");
      const said = await db.done(["--dir", dir, "--uninstall", "--yes"]);
      match(said, /keeps role grafana_readonly: .*\n +.*in database/);
      match(said, /keeps role server: it owns objects/);
      ok((await db.contents()).includes("table mine"));
    });

    await t.step("a user who may not make a schema hears who may", async () => {
      await server.sql`create role guest login password 'secret'`;
      await using db = await Scratch.make(server);
      const guest = { DATABASE_URL: db.url.replace("user:", "guest:") };
      match(
        await db.fails([], guest),
        /Cannot make the schema pgpulse .*permission denied.*"guest"/,
      );
    });
  });
}

Deno.test("the run line of the head has every permission that a run needs", async () => {
  await using server = await testServer();
  const source = await Deno.readTextFile(join(ROOT, "scripts/migrate.ts"));
  const [line] = source.replaceAll(/ *\\\n \* +/g, " ").match(/deno run .*migrate\.ts/)!;
  const { success, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: line.replaceAll('"', "").split(/\s+/).slice(1),
    cwd: ROOT,
    env: { DATABASE_URL: server.url, ...PASSWORDS },
  }).output();
  const text = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  ok(success, text);
  match(text, /Applied \d+ files/);
});

Deno.test("wrong flags and folders are answered with what to do", async () => {
  for (
    const [args, answer] of [
      [["--nope"], /--nope/],
      [["--wait", "soon"], /Cannot wait "soon": expected a number of seconds/],
      [["--data"], /without --uninstall/],
      [["--json"], /without --status/],
      [["--status", "--uninstall"], /Cannot use --status with/],
    ] as const
  ) {
    const { code, stderr } = await script("migrate.ts", [...args], { DATABASE_URL: "" });
    equal(code, 1);
    match(stderr, answer);
  }
  const help = await script("migrate.ts", ["--help"]);
  equal(help.code, 0);
  for (const part of ["Usage", "Flags", "Environment", "Cost", "Examples"]) {
    ok(help.stdout.includes(part), part);
  }
});

const openssl = await installed("openssl");

Deno.test({
  name: "sslmode is honoured" + (openssl ? "" : " (skipped: no openssl to make a certificate)"),
  ignore: !openssl,
  async fn() {
    const dir = await Deno.makeTempDir({ prefix: "pgpulse-tls-" });
    const owner = (await Deno.readTextFile("/etc/passwd")).match(/^postgres:[^:]*:(\d+):(\d+)/m);
    for (const name of ["localhost", "elsewhere"]) {
      const made = await new Deno.Command("openssl", {
        args: [
          ..."req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split(" "),
          ...["-subj", `/CN=${name}`, "-addext", `subjectAltName=DNS:${name}`],
          ...["-keyout", join(dir, `${name}.key`), "-out", join(dir, `${name}.crt`)],
        ],
      }).output();
      ok(made.success, new TextDecoder().decode(made.stderr));
      await Deno.chmod(join(dir, `${name}.key`), 0o600);
      if (Deno.uid() !== 0) continue;
      await Deno.chown(join(dir, `${name}.key`), Number(owner![1]), Number(owner![2]));
    }
    await Deno.chmod(dir, 0o755);
    const ca = (name: string) => `&sslrootcert=${join(dir, `${name}.crt`)}`;
    const folder = await tree({ "migrations/001-a.sql": "select 1" });
    for (
      const [name, cases] of Object.entries({
        localhost: [
          ["disable", true],
          ["require", true],
          [`verify-full${ca("localhost")}`, true],
          [`verify-full${ca("elsewhere")}`, false],
          ["verify-full", false],
          // The certificate is for "localhost", not for this address.
          [`verify-full${ca("localhost")}`, false, "127.0.0.1"],
        ],
        elsewhere: [
          [`verify-full${ca("elsewhere")}`, false],
          [`verify-ca${ca("elsewhere")}`, true],
          [`verify-ca${ca("localhost")}`, false],
        ],
      } as Record<string, [string, boolean, string?][]>)
    ) {
      const file = (kind: string) => `ssl_${kind}_file=${join(dir, `${name}.${kind}`)}`;
      const settings = ["ssl=on", file("key"), file("crt").replace("crt_", "cert_")];
      await using server = await testServer({ settings });
      for (const [mode, works, host = "localhost"] of cases) {
        const { code, stdout, stderr } = await script(
          "migrate.ts",
          ["--dir", folder, "--wait", "0", "--status"],
          { DATABASE_URL: server.url.replace("127.0.0.1", host) + `?sslmode=${mode}` },
        );
        equal(code, works ? 0 : 1, `${mode}: ${stdout}${stderr}`);
        match(works ? stdout : stderr, works ? /^PostgreSQL 18/ : /^Cannot use /);
      }
    }
    await Deno.remove(dir, { recursive: true });
  },
});

/**
 * Brings a database to the state of the folder sql/: roles, migrations, functions, grants.
 *
 *     deno task migrate
 *
 * which is short for
 *
 *     deno run --no-prompt --allow-net --allow-read \
 *         "--allow-env=DATABASE_URL,DB_*,COLLECTOR_DB_*,GRAFANA_DB_*,MIGRATE_USER,POSTGRES_*,PG*" \
 *         scripts/migrate.ts
 *
 * Needs PostgreSQL 15 or newer and a login that owns the database.
 * Costs one connection, half a second when nothing is to do; a migration locks what it changes.
 */
import { Buffer } from "node:buffer";
import { createHash, createHmac, pbkdf2Sync, randomBytes } from "node:crypto";
import { basename, dirname, join } from "node:path";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";

const HELP = `Brings a database to the state of the folder sql/

Usage: deno task migrate [flags]

Every run, in this order:
  sql/roles.sql               creates the login roles where they are missing
  sql/migrations/NNN-name.sql in order of number, each once; frozen from then on
  sql/functions/*.sql         in order of name, each again when its text has changed
  sql/grants.sql              gives the roles their rights
Files named NNN-factory.sql are left out, and tried again at each run, where a table of another shape
has one of the factory's names; that is said.
Each file has a transaction of its own: all of it happens or nothing. Statements that refuse one
(create index concurrently, vacuum) go into a migration whose first line is "-- no transaction":
they run one by one, and those before an error stay, so write them to bear a second run.
What was applied stands in the table pgpulse.migrations. Two runs at once are safe: one waits.
Ctrl-C is safe at any moment. On a fresh database all migrations run before the first function
file, so a migration must not call what sql/functions creates.

Flags
  --status         list what is applied, pending or changed; touches nothing
  --json           with --status: as JSON
  --dry-run        list what a run would do; touches nothing
  --set-passwords  set the passwords of the roles again, not only of those just created
  --uninstall      remove what was made: schemas pgpulse, live, rollup and compat, views, triggers,
                   functions, roles; a stored table stays stored, or pgpulse.drop_storage before
                   makes it plain; lists it and asks first; with --dry-run it only lists (by a
                   rolled-back try)
  --data           with --uninstall: remove the tables with their data too
  --yes            with --uninstall: do not ask; needed where there is no terminal
  --dir PATH       folder with the SQL files (default: sql beside the folder of this script)
  --wait SECONDS   how long to wait for a database that is starting (default: 60)
  --help           this text

Environment
  DATABASE_URL     postgres://owner:password@host:5432/database?sslmode=verify-full, or else
  DB_HOST, DB_PORT, DB_NAME, DB_SSLMODE, DB_SSLROOTCERT (localhost, 5432, testdb, prefer, none)
  MIGRATE_USER, POSTGRES_PASSWORD  login of the owner (user, none)
  DB_PASSWORD, GRAFANA_DB_PASSWORD, COLLECTOR_DB_PASSWORD  what the roles server, grafana_readonly
                   and collector get as passwords; they leave this program as SCRAM-SHA-256
                   verifiers only
A pooler must be in session mode.

Cost: one connection, half a second when nothing is to do; a migration locks what it changes.

Examples
  deno task migrate
  deno task migrate --status
  DATABASE_URL=postgres://postgres:secret@db.example.org/postgres deno task migrate --dry-run
  GRAFANA_DB_PASSWORD=new deno task migrate --set-passwords
  deno task migrate --uninstall --data --yes
`;

/** The login roles, and the variable with the password of each. */
const ROLES: Record<string, string> = {
  server: "DB_PASSWORD",
  grafana_readonly: "GRAFANA_DB_PASSWORD",
  collector: "COLLECTOR_DB_PASSWORD",
};

// Before each file: undoes what the role, the database or the last file have set. By the last line
// the server notices that a client was killed; not every system can.
const SESSION = `reset all;
reset role;
set search_path = public;
set statement_timeout = 0;
set lock_timeout = 0;
set client_min_messages = warning;
do $$ begin set client_connection_check_interval = '1s'; exception when others then null; end $$`;

const LEDGER = `create schema if not exists pgpulse;
comment on schema pgpulse is 'Machinery of pgpulse: no data of yours.';
create table pgpulse.migrations (
    kind text not null check (kind in ('migration', 'function')),
    name text not null,
    -- SHA-256 of the file's text
    hash text not null,
    applied_at timestamptz not null default clock_timestamp(),
    primary key (kind, name)
);
comment on table pgpulse.migrations is 'What migrate has applied of sql/; written by it alone.'`;

// --- copied helper: connect (house_test.ts holds the copies equal) ---
/**
 * Opens the database of DATABASE_URL, else of DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD.
 * sslmode (in the URL, else DB_SSLMODE) means what it means to libpq; sslrootcert names a CA file.
 * `address` names another variable that wins over DATABASE_URL where it is set.
 */
export function connect(
  options: postgres.Options<Record<string, never>> = {},
  address = "DATABASE_URL",
): postgres.Sql {
  const env = (name: string, otherwise = "") => Deno.env.get(name) || otherwise;
  const whole = env(address) || env("DATABASE_URL");
  const url = URL.parse(
    whole || `postgres://${env("DB_HOST", "localhost")}:${env("DB_PORT", "5432")}`,
  );
  if (!url || !/^postgres(ql)?:$/.test(url.protocol)) {
    throw new Error(
      `Cannot read ${whole ? address : "DB_HOST and DB_PORT"}: expected ` +
        `postgres://user:password@host:5432/database; write @ / : # % in a password as %40 %2F %3A %23 %25`,
    );
  }
  const mode = url.searchParams.get("sslmode") ?? env("DB_SSLMODE", "prefer");
  const root = url.searchParams.get("sslrootcert") ?? env("DB_SSLROOTCERT");
  let ca: string | undefined;
  try {
    if (root && root !== "system") ca = Deno.readTextFileSync(root);
  } catch (error) {
    throw new Error(
      `Cannot read the CA file "${root}" of sslrootcert: ${(error as Error).message}`,
    );
  }
  const anyName = { checkServerIdentity: () => undefined };
  const ssl = {
    disable: false,
    allow: "prefer",
    prefer: "prefer",
    require: ca ? { ca, ...anyName } : "require",
  }[mode] ??
    // The host is named here too: the driver leaves out addresses, and then any name would do.
    (mode === "verify-ca" ? { ca, ...anyName } : { ca, host: url.hostname });
  // A pooler in transaction mode forgets prepared statements; its URL says pgbouncer=true.
  const prepare = url.searchParams.get("pgbouncer") !== "true";
  for (const name of ["sslmode", "sslrootcert", "pgbouncer"]) url.searchParams.delete(name);
  const part = (inUrl: string, name: string, otherwise: string) =>
    decodeURIComponent(inUrl) || env(name, otherwise);
  return postgres(url.href, {
    user: part(url.username, "DB_USER", "server"),
    password: part(url.password, "DB_PASSWORD", env("PGPASSWORD")),
    database: part(url.pathname.slice(1), "DB_NAME", "testdb"),
    // deno-lint-ignore no-explicit-any -- the type knows fewer forms of ssl than the driver
    ssl: ssl as any,
    prepare,
    connect_timeout: 10,
    onnotice: () => {},
    ...options,
  });
}
// --- end of connect ---

// --- copied helper: explain (house_test.ts holds the copies equal) ---
/** Says what went wrong with the database, why that is likely, and what to do; never a secret. */
export function explain(error: unknown, sql?: postgres.Sql): string {
  const { code = "", message = String(error) } = error as { code?: string; message?: string };
  const { host, port, user, database } = sql?.options ?? {};
  const at = sql ? `"${host}:${port}"` : "the database";
  const cause: Record<string, string> = {
    ECONNREFUSED: "nothing listens there; start it (deno task dev) or set DATABASE_URL",
    ENOTFOUND: "no such host; correct the host in DATABASE_URL",
    CONNECT_TIMEOUT: "no answer; look at the address, the firewall and the network",
    EPIPE: "it closed the connection; it may be restarting, or not take TLS (sslmode)",
    ECONNRESET: "it closed the connection; it may be restarting, or not take TLS (sslmode)",
    CONNECTION_CLOSED: "it closed the connection; it may be restarting, or not take TLS (sslmode)",
    CONNECTION_ENDED: "the connection was ended",
    "28P01": `the password of "${user}" is wrong; correct it in DATABASE_URL or DB_PASSWORD`,
    "28000": `"${user}" may not log in this way; look at pg_hba.conf and sslmode`,
    "3D000": `there is no database "${database}"; create it or correct DATABASE_URL`,
    "42P01": `${message}; run deno task migrate`,
    "3F000": `${message}; run deno task migrate`,
    "42883": `${message}; run deno task migrate`,
    "42501": `${message}; log in as the right role or run deno task migrate`,
    "53100": "its disk is full; free some space, nothing is lost meanwhile",
    "53300": "it has no connection free; raise max_connections or close some",
    "57P03": "it is starting or stopping; wait a moment",
  };
  return `Cannot use ${at}: ${cause[code] ?? message}`;
}
// --- end of explain ---

/** A file of the folder sql/; its kind is the name of its folder without the s. */
export type SqlFile = { kind: string; name: string; path: string; text: string; hash: string };

/** Files of what may be left out, where a database has something else in its place. */
const OPTIONAL = /-factory\.sql$/;

/** A row of pgpulse.migrations. */
export type Applied = { kind: string; name: string; hash: string; applied_at: Date };

/** What there is to do about one file; `refused` carries the problem and what to do about it. */
export type Step = {
  path: string;
  state: "applied" | "pending" | "changed" | "gone" | "refused";
  applied_at?: Date;
  problem?: string;
  file?: SqlFile;
};

/** Reads every SQL file of the folder. */
export async function readTree(dir: string): Promise<SqlFile[]> {
  const files: SqlFile[] = [];
  for (const folder of ["", "functions", "migrations"]) {
    try {
      for await (const { name, isDirectory } of Deno.readDir(join(dir, folder))) {
        if (isDirectory || !/^[^.].*\.sql$/.test(name)) continue;
        // A checkout by another system has the same text, and so the same hash.
        const text = (await Deno.readTextFile(join(dir, folder, name)))
          .replace(/^\ufeff/, "").replaceAll("\r\n", "\n");
        const hash = createHash("sha256").update(text).digest("hex");
        const path = join(basename(dir), folder, name);
        files.push({ kind: folder.slice(0, -1), name, path, text, hash });
      }
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      if (folder === "functions") continue;
      const wanted = join(dir, "migrations");
      throw new Error(`Cannot find "${wanted}": put sql/ beside scripts/, or name it with --dir`);
    }
  }
  return files;
}

/** Holds the files against the ledger: migrations in order of number, then functions by name. */
export function plan(files: SqlFile[], ledger: Applied[], root = "sql"): Step[] {
  const number = (name: string) => Number(name.match(/^\d+/)?.[0] ?? Infinity);
  const order = (a: { name: string }, b: { name: string }) =>
    number(a.name) - number(b.name) || (a.name < b.name ? -1 : 1);
  const steps: Step[] = [];
  for (const kind of ["migration", "function"]) {
    const here = files.filter((f) => f.kind === kind).sort(order);
    const done = ledger.filter((r) => r.kind === kind).sort(order);
    const last = done.at(-1)?.name ?? "";
    const numbers = [...here, ...done].map((f) => number(f.name)).filter(Number.isFinite);
    const next = `${Math.max(0, ...numbers) + 1}`.padStart(3, "0");
    for (const file of here) {
      const { name, path, hash } = file;
      const row = done.find((r) => r.name === name);
      const twin = here.find((f) => f !== file && number(f.name) === number(name))?.name;
      const edited = row && row.hash !== hash;
      const problem = kind === "function"
        ? undefined
        : !/^\d{3,}-.+\.sql$/.test(name)
        ? `is no name of a migration; call it ${next}-what-it-does.sql`
        : edited
        ? "was edited after it was applied; put the old text back (git log -p shows it) and " +
          `write the change as ${next}-what-it-does.sql`
        : !row && twin
        ? `has the number of ${twin}; give the one that is not applied the number ${next}`
        : !row && last && number(name) <= number(last) && !OPTIONAL.test(name)
        ? `comes before ${last}, which is applied already; give it the number ${next}`
        : undefined;
      const state = problem ? "refused" : edited ? "changed" : row ? "applied" : "pending";
      steps.push({ path, state, applied_at: row?.applied_at, problem, file });
    }
    for (const { name, applied_at } of done) {
      if (here.some((f) => f.name === name)) continue;
      const path = join(root, `${kind}s`, name);
      const problem = "is applied in this database but missing here; update this checkout, or " +
        "put the file back: an applied migration is never renamed or removed";
      if (kind === "function") steps.push({ path, state: "gone", applied_at });
      else steps.push({ path, state: "refused", applied_at, problem });
    }
  }
  return steps;
}

/** One statement of a file, and where in the file its first word stands. */
export type Statement = { text: string; start: number };

// In turn: comment, E'', '', "", $tag$, word, space, any other character.
const TOKEN = new RegExp(
  [
    /--[^\n]*|\/\*/,
    /e'(?:\\[^]|''|'\s*\n\s*'|[^'\\])*(?:'|$)|'[^']*(?:'|$)|"[^"]*(?:"|$)/,
    /(\$(?:[a-z_\x80-\uffff][\w\x80-\uffff]*)?\$)[^]*?(?:\1|$)/,
    /[a-z_\x80-\uffff][\w$\x80-\uffff]*|\s+|[^]/,
  ].map((r) => r.source).join("|"),
  "gi",
);

/**
 * Cuts a text at each `;` that ends a statement, as psql does: not in quotes, comments,
 * parentheses or the body of a `begin atomic` function.
 */
export function statements(text: string): Statement[] {
  const found: Statement[] = [];
  const token = new RegExp(TOKEN);
  let start = -1, parentheses = 0, blocks = 0, before = "";
  for (let match; (match = token.exec(text));) {
    const word = match[0].toLowerCase();
    if (word.startsWith("--") || /^\s/.test(word)) continue;
    if (word === "/*") {
      // Comments nest.
      const edge = /\/\*|\*\/|$/g;
      edge.lastIndex = token.lastIndex;
      for (let depth = 1; depth > 0;) {
        const next = edge.exec(text)![0];
        depth = next === "/*" ? depth + 1 : next ? depth - 1 : 0;
      }
      token.lastIndex = edge.lastIndex;
      continue;
    }
    if (start < 0 && word === ";") continue;
    if (start < 0) start = match.index;
    if (word === "(") parentheses++;
    if (word === ")") parentheses--;
    if ((word === "atomic" && before === "begin") || (word === "case" && blocks)) blocks++;
    if (word === "end" && blocks) blocks--;
    if (word === ";" && parentheses <= 0 && !blocks) {
      found.push({ text: text.slice(start, token.lastIndex), start });
      start = -1;
      parentheses = 0;
    }
    before = word;
  }
  if (start >= 0) found.push({ text: text.slice(start).trimEnd(), start });
  return found;
}

/** Shows the line of the file that an SQL error is about, and the server's detail and hint. */
export function pinpoint(
  file: SqlFile,
  { text, start }: Statement,
  error: Partial<postgres.PostgresError>,
): string {
  const { message, position, internal_position, internal_query, where, detail, hint } = error;
  // The server counts characters, JavaScript UTF-16 units.
  const units = (of: string, place = "1") => [...of].slice(0, Number(place) - 1).join("").length;
  const inner = internal_query ? text.indexOf(internal_query) : -1;
  const inBlock = Number(where?.match(/inline_code_block line (\d+)/)?.[1]);
  let at = start, found = true;
  if (position) at += units(text, position);
  else if (inner >= 0) at += inner + units(internal_query!, internal_position);
  else if (inBlock) {
    // Lines of a do-block count from the one with its opening $$.
    at += text.search(/\$\w*\$/);
    for (let line = 1; line < inBlock; line++) at = file.text.indexOf("\n", at) + 1;
    at += file.text.slice(at).search(/\S/);
  } else found = false;
  const deeper = !found || /function (?!inline_code_block)/.test(where ?? "");
  const line = file.text.slice(0, at).split("\n").length;
  const from = file.text.lastIndexOf("\n", at - 1) + 1;
  // Of a long line, the part around the error.
  const cut = Math.max(from, at - 60);
  return [
    `Cannot apply ${file.path}:${line}: ${message}`,
    `    ${file.text.slice(cut).split("\n", 1)[0].slice(0, 90)}`,
    `    ${file.text.slice(cut, at).replace(/[^\t]/g, " ")}^`,
    detail && `Detail: ${detail}`,
    hint && `Hint: ${hint}`,
    deeper && internal_query && `In: ${internal_query.trim().slice(0, 300)}`,
    deeper && where && `Where: ${where}`,
  ].filter(Boolean).join("\n");
}

/** Runs a file statement by statement, so that an error is found in it. */
async function runFile(run: Pick<postgres.Sql, "unsafe">, file: SqlFile, bare = false) {
  const all = statements(file.text);
  for (const statement of all) {
    if (!/^(begin|start|commit|end|rollback|abort)\b[\sa-z]*;?$/i.test(statement.text)) continue;
    const message = "no transaction begins or ends in a file";
    const hint = bare ? "Its statements run one by one" : "It has one of its own: leave this out";
    throw new Error(pinpoint(file, statement, { message, hint }));
  }
  for (const statement of all) {
    await run.unsafe(statement.text).catch((error) => {
      if (!(error instanceof postgres.PostgresError)) throw error;
      const rest = bare ? "Statements before it stay" : "Nothing of this file was applied";
      throw new Error(`${pinpoint(file, statement, error)}\n${rest}`, { cause: error });
    });
  }
}

/** The form in which PostgreSQL keeps a password (RFC 5803); the password itself stays here. */
export function scramVerifier(password: string, salt: Uint8Array = randomBytes(16)): string {
  const hmac = (key: Uint8Array, text: string) => createHmac("sha256", key).update(text).digest();
  const salted = pbkdf2Sync(password.normalize("NFKC"), salt, 4096, 32, "sha256");
  const stored = createHash("sha256").update(hmac(salted, "Client Key")).digest("base64");
  const server = hmac(salted, "Server Key").toString("base64");
  return `SCRAM-SHA-256$4096:${Buffer.from(salt).toString("base64")}$${stored}:${server}`;
}

/** Refuses a server that is too old; `number` is its server_version_num. */
export function supported(version: string, number: number): void {
  if (number >= 150000) return;
  throw new Error(`Cannot use PostgreSQL ${version}: expected 15 or newer; upgrade the server`);
}

/** The connection, with what messages say of it. */
type Session = { sql: postgres.Sql; at: string; user: string; version: string };

const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** Logs in as the owner; waits, at most `seconds`, for a database that is starting. */
async function open(seconds: number): Promise<Session> {
  const { DATABASE_URL, MIGRATE_USER, POSTGRES_PASSWORD, PGPASSWORD } = process.env;
  const login = DATABASE_URL
    ? {}
    : { user: MIGRATE_USER || "user", password: POSTGRES_PASSWORD || PGPASSWORD || "" };
  const end = Date.now() + seconds * 1000;
  for (let told = false;; await pause(500)) {
    const sql = connect({
      ...login,
      // One connection, never renewed: the lock is its own.
      max: 1,
      max_lifetime: null,
      fetch_types: false,
      connection: { application_name: "pgpulse migrate" },
      onnotice: ({ severity, message, detail }) => {
        // Of what a drop takes along, what stands in our own schema is no news.
        const text = [message, detail].join("\n").split("\n")
          .filter((line) => line && !/^drop cascades to (\d|.* pgpulse\.)/.test(line))
          .map((line) => `  ${line}`).join("\n");
        if (text) console.log(severity === "WARNING" ? `Warning of the database:\n${text}` : text);
      },
    });
    // The driver itself tries for ever where a proxy accepts and hangs up.
    const late = Promise.withResolvers<never>();
    const timer = setTimeout(() => late.reject({ code: "CONNECT_TIMEOUT" }), 12_000);
    try {
      const asked = sql`select current_database() as name, current_user as user,
        current_setting('server_version') as version,
        current_setting('server_version_num')::int as number`;
      const [{ name, user, version, number }] = await Promise.race([asked, late.promise]);
      if (told) console.log("The database answers");
      supported(version, number);
      const at = `database "${name}" at "${sql.options.host}:${sql.options.port}"`;
      return { sql, at, user, version };
    } catch (error) {
      await sql.end({ timeout: 0 });
      const { code = "" } = error as { code?: string };
      if (!code) throw error;
      const why = explain(error, sql).replace("or DB_PASSWORD", "or POSTGRES_PASSWORD")
        // After an upgrade of its package nothing else works in a database that has the extension.
        .replace(/.*timescaledb-[^"]*".*/, "$&; $ psql -X -c 'alter extension timescaledb update'");
      const starting = /^(ECONN|EPIPE|EAI_AGAIN|CONNECT|53300|57P)/.test(code);
      if (!starting || !seconds) throw new Error(why);
      if (Date.now() >= end) throw new Error(`${why} (waited ${seconds} s)`);
      if (!told) console.log(`${why}. Waits for it, at most ${seconds} s`);
      told = true;
    } finally {
      clearTimeout(timer);
    }
  }
}

/**
 * Makes the session ours and fresh. Asks for the lock again and again: a session that waits inside
 * pg_advisory_lock would hold up the other one's create index concurrently.
 */
async function claim({ sql, at }: Session): Promise<void> {
  if (!sql.options.prepare) {
    throw new Error(
      "Cannot migrate through a pooler in transaction mode (pgbouncer=true in DATABASE_URL): it " +
        "loses the lock; use the address of the database itself, or of a pooler in session mode",
    );
  }
  for (let told = false;; await pause(300)) {
    await sql.unsafe(SESSION);
    const [{ ours, holder, backend }] = await sql`
      select pg_backend_pid() as backend, pg_try_advisory_lock(key) as ours, (
          select pid from pg_locks
          where locktype = 'advisory' and granted and classid::int8 << 32 | objid::int8 = key
              and database = (select oid from pg_database where datname = current_database())
      ) as holder
      from hashtextextended('pgpulse migrate', 0) as key`;
    if (ours) return await stays(sql, backend);
    const end = holder ? `; if it is dead: select pg_terminate_backend(${holder})` : "";
    if (!told) console.log(`Waits: another migrate is at work on ${at}${end}`);
    told = true;
  }
}

/** Refuses a pooler that hands each transaction to any session: the lock would be left behind. */
async function stays(sql: postgres.Sql, backend: number): Promise<void> {
  for (let i = 0; i < 5; i++) {
    const [{ same, held }] = await sql`
      select pg_backend_pid() = ${backend} as same, exists (
          select from pg_locks
          where locktype = 'advisory' and pid = pg_backend_pid()
      ) as held`;
    if (same && held) continue;
    await sql`select pg_terminate_backend(${backend}) where pg_backend_pid() <> ${backend}`;
    throw new Error(
      "Cannot migrate through a pooler in transaction mode: it loses the lock; use the address of " +
        "the database itself, or of a pooler in session mode",
    );
  }
}

/** What was applied; undefined where migrate never ran. */
async function readLedger(sql: postgres.Sql): Promise<Applied[] | undefined> {
  const [{ made }] = await sql`select to_regclass('pgpulse.migrations') is not null as made`;
  if (made) {
    return await sql<Applied[]>`select kind, name, hash, applied_at from pgpulse.migrations`;
  }
}

async function rolesPresent(sql: postgres.ISql): Promise<string[]> {
  const rows = await sql`select rolname from pg_roles where rolname in ${sql(Object.keys(ROLES))}`;
  return rows.map((row) => row.rolname);
}

/** Creates missing roles, with passwords, or says what an administrator has to run. */
async function makeRoles({ sql, user }: Session, file: SqlFile, setAll: boolean): Promise<void> {
  await sql.begin(async (tx) => {
    const before = await rolesPresent(tx);
    await runFile(tx, file);
    const now = await rolesPresent(tx);
    for (const role of now) {
      const fresh = !before.includes(role);
      if (!fresh && !setAll) continue;
      const password = Deno.env.get(ROLES[role]);
      if (password) {
        const set = `alter role ${role} password`;
        await tx.unsafe(`${set} '${scramVerifier(password)}'`).catch(({ message }) => {
          throw new Error(
            `Cannot set the password of "${role}" as "${user}": ${message}; ` +
              `as an administrator: ${set} '...'`,
          );
        });
      }
      console.log(
        `${fresh ? "Created role" : "Role"} "${role}": ` +
          (password
            ? `password set from ${ROLES[role]}`
            : `no password set; set ${ROLES[role]} and run again with --set-passwords`),
      );
    }
    const missing = Object.keys(ROLES).filter((role) => !now.includes(role));
    if (!missing.length) return;
    console.log(
      `Cannot create roles as "${user}"; all else goes on. As an administrator run this, then ` +
        "migrate again, which gives them their rights:\n" + missing.map((role) =>
          `    create role ${role} login password '...';  -- the value of ${ROLES[role]}`
        ).join("\n"),
    );
  });
}

/** Stops at every problem of the plan, before anything was touched. */
function refuse(steps: Step[], at: string): void {
  const problems = steps.filter((s) => s.problem).map((s) => `\n  ${s.path} ${s.problem}`);
  if (problems.length) throw new Error(`Cannot migrate ${at}:${problems.join("")}`);
}

async function migrate(session: Session, dir: string, setPasswords: boolean): Promise<void> {
  const { sql, at, user } = session;
  const files = await readTree(dir);
  const root = (name: string) => files.find((f) => !f.kind && f.name === name);
  await claim(session);
  const ledger = await readLedger(sql);
  const steps = plan(files, ledger ?? [], basename(dir));
  refuse(steps, at);
  if (!ledger) {
    await sql.begin((tx) => tx.unsafe(LEDGER)).catch(({ message }) => {
      throw new Error(
        `Cannot make the schema pgpulse in ${at}: ${message}; log in as the database's owner, or ` +
          `as an administrator: grant create on database ... to "${user}"`,
      );
    });
  }
  const roles = root("roles.sql");
  if (roles) await makeRoles(session, roles, setPasswords);
  let count = 0;
  let leftOut = false;
  for (const { file, path, state } of steps) {
    if (!file) {
      const name = basename(path);
      await sql`delete from pgpulse.migrations where kind = 'function' and name = ${name}`;
      console.log(`Forgot ${path}: it is gone; what it made stays until a migration drops it`);
    }
    if (!file || state === "applied") continue;
    const { kind, name, hash, text } = file;
    if (leftOut && OPTIONAL.test(name)) continue;
    const begun = performance.now();
    await claim(session);
    const apply = async (run: postgres.ISql, bare = false) => {
      await runFile(run, file, bare);
      if (state === "pending") {
        await run`insert into pgpulse.migrations ${run({ kind, name, hash })}`;
      } else {
        await run`update pgpulse.migrations set hash = ${hash}, applied_at = clock_timestamp()
          where kind = ${kind} and name = ${name}`;
      }
    };
    if (kind === "migration" && /^-- *no transaction\b/i.test(text)) await apply(sql, true);
    else {
      try {
        await sql.begin((tx) => apply(tx));
      } catch (error) {
        // What the file itself raised, and no fault in it.
        const { code, message, hint } = (error as { cause?: postgres.PostgresError }).cause ?? {};
        if (kind !== "migration" || !OPTIONAL.test(name) || code !== "P0001") throw error;
        console.log(
          `Leaves out ${path} and what stands on it: ${message}. ${hint}; then migrate again. All ` +
            "else goes on, the dashboards and alerts of the factory without data",
        );
        leftOut = true;
        continue;
      }
    }
    const again = state === "changed" ? " again" : "";
    console.log(`Applied ${path}${again} in ${Math.round(performance.now() - begun)} ms`);
    count++;
  }
  await claim(session);
  const grants = root("grants.sql");
  if (grants) await sql.begin((tx) => runFile(tx, grants));
  const sum = count === 1 ? "Applied 1 file" : count ? `Applied ${count} files` : "Nothing to do";
  console.log(`${sum}: ${at} is up to date`);
}

/** For --status and --dry-run (`todo`): looks, and touches nothing. */
async function report(session: Session, dir: string, todo: boolean, json: boolean): Promise<void> {
  const { sql, at, user, version } = session;
  const steps = plan(await readTree(dir), await readLedger(sql) ?? [], basename(dir));
  const present = await rolesPresent(sql);
  const list = [
    ...Object.keys(ROLES).map((role) => ({
      path: `role ${role}`,
      state: present.includes(role) ? "present" : "missing",
      applied_at: undefined,
      problem: undefined,
    })),
    ...steps.map(({ file: _, ...step }) => step),
  ];
  if (json) {
    return console.log(JSON.stringify({ database: at, version, user, items: list }, null, 2));
  }
  if (todo) refuse(steps, at);
  console.log(`PostgreSQL ${version}, ${at}, as "${user}"${todo ? "; to do:" : ""}`);
  for (const { path, state, applied_at, problem } of list) {
    if (todo && /applied|present/.test(state)) continue;
    const time = applied_at ? applied_at.toISOString().replace(/\..*/, "Z") : "";
    console.log(
      `${state.padEnd(8)} ${time.padEnd(20)}  ${path}${problem ? `\n    ${problem}` : ""}`,
    );
  }
}

/** Runs uninstall.sql; to list what that would do it runs it too, and rolls it back. */
async function uninstall(session: Session, dir: string, flags: Record<string, unknown>) {
  const { sql, at } = session;
  const file = (await readTree(dir)).find((f) => !f.kind && f.name === "uninstall.sql");
  if (!file) throw new Error(`Cannot uninstall: there is no "${join(dir, "uninstall.sql")}"`);
  await claim(session);
  const run = (keep: boolean) =>
    sql.begin(async (tx) => {
      await tx.unsafe(`set local client_min_messages = notice; set local lock_timeout = '10s';
        set local pgpulse.data = ${flags.data ? "on" : "off"}`);
      await runFile(tx, file);
      if (!keep) throw run;
    }).catch((error) => {
      if (error !== run) throw error;
    });
  if (flags["dry-run"] || !flags.yes) {
    console.log(`This would go from ${at}:`);
    await run(false);
    if (flags["dry-run"]) return;
    const sure = Deno.stdin.isTerminal() && confirm("Remove it?");
    if (!sure) throw new Error("Nothing was removed; to do it, answer y or add --yes");
  }
  await run(true);
  console.log(`Removed pgpulse from ${at}`);
}

async function main(): Promise<void> {
  const { values: flags } = parseArgs({
    options: {
      status: { type: "boolean", default: false },
      json: { type: "boolean", default: false },
      "dry-run": { type: "boolean", default: false },
      "set-passwords": { type: "boolean", default: false },
      uninstall: { type: "boolean", default: false },
      data: { type: "boolean", default: false },
      yes: { type: "boolean", default: false },
      dir: { type: "string", default: join(dirname(import.meta.dirname!), "sql") },
      wait: { type: "string", default: "60" },
      help: { type: "boolean", default: false },
    },
  });
  if (flags.help) return console.log(HELP);
  const { status, json, dir } = flags;
  const wait = Number(flags.wait || NaN);
  if (!(wait >= 0)) throw new Error(`Cannot wait "${flags.wait}": expected a number of seconds`);
  if (status && (flags.uninstall || flags["dry-run"])) {
    throw new Error("Cannot use --status with --uninstall or --dry-run");
  }
  if (json && !status) throw new Error("Cannot use --json without --status");
  if ((flags.data || flags.yes) && !flags.uninstall) {
    throw new Error("Cannot use --data or --yes without --uninstall");
  }
  const session = await open(wait);
  try {
    if (flags.uninstall) await uninstall(session, dir, flags);
    else if (status || flags["dry-run"]) await report(session, dir, !status, json);
    else await migrate(session, dir, flags["set-passwords"]);
  } catch (error) {
    throw (error as { code?: string }).code ? new Error(explain(error, session.sql)) : error;
  } finally {
    await session.sql.end({ timeout: 1 });
  }
}

if (import.meta.main) {
  // Exits by force: the driver may still try an address that failed while we waited.
  main().then(() => Deno.exit(0), (error) => {
    console.error(error.message);
    Deno.exit(1);
  });
}

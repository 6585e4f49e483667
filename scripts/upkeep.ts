/**
 * Keeps rollups and stored tables in order: calls pgpulse.upkeep() every minute.
 *
 *     deno task upkeep
 *
 * which is short for
 *
 *     deno run --no-prompt --allow-net --allow-read "--allow-env=DATABASE_URL,DB_*,PG*" \
 *         scripts/upkeep.ts
 *
 * Needs PostgreSQL 15 or newer with `deno task migrate`, and the role server.
 * Costs one connection and 50 MB; the database about a third of the time that the inserts took.
 */
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";

const HELP = `Keeps rollups and stored tables in order: calls pgpulse.upkeep() every minute

Usage: deno task upkeep [flags]

Each call is a transaction with one bounded piece of work of each kind: new, changed and deleted rows
are brought into rollups, days are deleted that a rollup keeps no longer, partitions are made ahead,
packed and dropped. While there is more, the next call comes at once. What fails is told once, and
its end; it holds up nothing else. Two of these at once, or this and pg_cron, share the work.
Ctrl-C and kill -9 are safe at any moment: the piece under way is undone, and done again later.
An outage of the database is waited out.

Without it nothing is lost: rollups count rows that are not rolled up yet while reading, so panels
become slower. It catches up in pieces after any time, at most 2,000,000 rows each; only what one
transaction has written is always one piece.

Flags
  --every TIME     pause between calls: 10s, 5m, 1h (default: 1m)
  --once           work all off, telling what is done, and end; exit status 1 when something failed
  --help           this text

Environment
  DATABASE_URL     postgres://server:password@host:5432/database?sslmode=verify-full, or else
  DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD, DB_SSLMODE, DB_SSLROOTCERT
                   (localhost, 5432, testdb, server, none, prefer, none)
A pooler in transaction mode will do: say ?pgbouncer=true in its URL.

Cost: one connection and 50 MB; in the database about a third of the time that the inserts took.

Instead of it, where pg_cron is installed:
  select cron.schedule('pgpulse', '* * * * *', 'select pgpulse.upkeep()')

Examples
  deno task upkeep
  deno task upkeep --every 10s
  deno task upkeep --once
  DATABASE_URL=postgres://server:secret@db.example.org/app deno run -A upkeep.ts
`;

/** What one call of pgpulse.upkeep() tells. */
interface Done {
  what: string;
  name: string | null;
  detail: string | null;
  /** Null: another session is at it. */
  more: boolean | null;
  fault: string | null;
}

const WEIGHTS: Record<string, number> = { s: 1_000, m: 60_000, h: 3_600_000 };

/** Reads "10s", "5m" or "1h"; returns ms. */
export function duration(text: string): number {
  const [, n, unit] = text.match(/^(\d+)([smh])$/) ?? [];
  const ms = Number(n) * WEIGHTS[unit];
  if (!(ms >= 1_000 && ms <= 86_400_000)) {
    throw new Error(`Cannot call it every "${text}": give 1s to 24h, as in 10s, 5m or 1h`);
  }
  return ms;
}

const title = ({ what, name }: Done) => [what, name].filter(Boolean).join(" ");

/** Tells each fault when it is new or another one, and when it has ended. */
class Faults {
  readonly told = new Map<string, Done>();

  /** `faulty`: names that the database itself notes a fault of. */
  take(rows: Done[], faulty: string[] = []): void {
    for (const [key, { name, fault }] of this.told) {
      const same = rows.filter((row) => title(row) === key);
      // Where another session is at work, nothing is known.
      if (same.some((row) => row.fault || row.more === null)) continue;
      if (!same.length && rows.some(({ more }) => more === null)) continue;
      // Nor where its turn has not come, or somebody else has the table.
      if (!same.length && rows.some((row) => row.name === name && row.more)) continue;
      if (!same.length && faulty.includes(name!)) continue;
      this.told.delete(key);
      console.log(`${key} works again (it was: ${fault})`);
    }
    for (const row of rows) {
      if (!row.fault || this.told.get(title(row))?.fault === row.fault) continue;
      this.told.set(title(row), row);
      console.error(`Cannot do ${title(row)}: ${row.fault}`);
    }
  }
}

/** Calls it until the signal, or with `once` until all is done; returns the exit status. */
async function keep(sql: postgres.Sql, every: number, once: boolean, signal: AbortSignal) {
  const pause = (ms: number) => sleep(ms, undefined, { signal }).catch(() => {});
  const faults = new Faults();
  let away = "", tries = 0, behind = false, waits = false;
  while (!signal.aborted) {
    const next = performance.now() + every;
    let rows: Done[], faulty: { name: string }[];
    try {
      const query = sql<Done[]>`select what, name, detail, more, fault from pgpulse.upkeep()`;
      const cancel = () => query.cancel();
      signal.addEventListener("abort", cancel);
      rows = await query.finally(() => signal.removeEventListener("abort", cancel));
      const told = [...faults.told.values()].map(({ name }) => name);
      faulty = told.length === 0 ? [] : await sql<{ name: string }[]>`
        select name
        from unnest(${told}::text[]) as name
        join pgpulse.storage on source = to_regclass(name)
        where fault is not null`;
    } catch (error) {
      if (signal.aborted) break;
      const trouble = explain(error, sql);
      if (once) throw new Error(trouble);
      if (trouble !== away) console.error(`${trouble}; it is tried again from time to time`);
      away = trouble;
      await pause(Math.min(every, 30_000, 1_000 * 2 ** tries++));
      continue;
    }
    if (away) console.log("The database is back");
    [away, tries] = ["", 0];
    faults.take(rows, faulty.map(({ name }) => name));
    const more = rows.filter((row) => row.more);
    for (const row of rows) {
      // Refreshing is daily bread, unless it takes many pieces; all else is told when it is done.
      const news = row.what === "refresh" ? once || (row.more && !behind) : once || !row.more;
      if (news && row.detail) {
        console.log(`${title(row)}: ${row.detail}${row.more ? "; there is more" : ""}`);
      }
    }
    if (more.length) {
      behind = true;
      continue;
    }
    if (behind && !once) console.log("All is up to date again");
    behind = false;
    if (once) {
      if (rows.every((row) => row.more !== null)) break;
      if (!waits) console.log("Another session is at work; waits for it");
      waits = true;
      await pause(1_000);
    } else await pause(Math.max(0, next - performance.now()));
  }
  if (once && !faults.told.size && !signal.aborted) {
    console.log("All is up to date");
    const held = await sql<{ source: string; until: Date }[]>`
      select source::text, hold_until as until
      from pgpulse.storage
      where hold_until > now()`;
    for (const { source, until } of held) {
      const told = "it was unpacked, and may be corrected until then (see pgpulse.unpack)";
      console.log(`Nothing of ${source} is packed before ${until.toISOString()}: ${told}`);
    }
  }
  return once && (faults.told.size || signal.aborted) ? 1 : 0;
}

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

function flags(args: string[]) {
  try {
    const { values } = parseArgs({
      args,
      options: {
        every: { type: "string", default: "1m" },
        once: { type: "boolean", default: false },
        help: { type: "boolean", short: "h" },
      },
    });
    return values;
  } catch (error) {
    const [first] = (error as Error).message.replaceAll("'", '"').split(/\. |\.?\n|\.$/);
    throw new Error(`Cannot read the command line: ${first}; see deno task upkeep --help`);
  }
}

async function main(args: string[]): Promise<number> {
  const { every: pace, once, help } = flags(args);
  if (help) {
    console.log(HELP);
    return 0;
  }
  const every = duration(pace);
  const sql = connect({ max: 1, connection: { application_name: "pgpulse upkeep" } });
  const stop = new AbortController();
  Deno.addSignalListener("SIGINT", () => stop.abort());
  if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", () => stop.abort());
  const { host, port, database } = sql.options;
  if (!once) {
    console.log(`Tends database "${database}" at "${host}:${port}" every ${pace}`);
  }
  try {
    return await keep(sql, every, once, stop.signal);
  } finally {
    await sql.end({ timeout: 1 });
  }
}

if (import.meta.main) {
  try {
    Deno.exit(await main(Deno.args));
  } catch (error) {
    console.error(error instanceof Error ? error.message : String(error));
    Deno.exit(1);
  }
}

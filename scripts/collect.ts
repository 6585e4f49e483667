/**
 * Samples this machine, and PostgreSQL servers, into PostgreSQL; no sample is lost on the way.
 *
 *     deno run -A --no-prompt collect.ts
 *
 * Needs: Deno alone, this one file, and a database with `deno task migrate`, as role collector.
 * It runs with -A since Deno opens nothing under /proc and /sys with less; the sandbox of the
 * service manager is its wall: --install writes it.
 * Costs: 0.4 ms of a core a sample to take, 2.8 ms with everything else; 60 MB; one connection,
 * two for a long backlog.
 *
 * How it works. Each sample is written to the spool, a folder of plain files, and then sent. What
 * the database has taken is cut off; whatever else happens, it is sent again, which the key
 * (host, time) makes harmless. So there are no positions to keep, and nothing to repair.
 */
import { X509Certificate } from "node:crypto";
import { statfs } from "node:fs/promises";
import { loadavg, uptime } from "node:os";
import { dirname, join } from "node:path";
import { setTimeout as setTimer } from "node:timers/promises";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";

const HELP = `collect: this machine in PostgreSQL, and so in Grafana, live and for ever

Samples CPU, load, memory, swap, file systems, disks, network, processes, sockets, temperatures and,
inside a container, its limits, at whole intervals of the clock, into system_metrics; with --postgres
also PostgreSQL servers, into postgresql_metrics. Counters become rates here; one that was reset or
wrapped has none in that sample. Units are bytes, seconds and ratios from 0 to 1.

Usage: collect.ts [flags]
       collect.ts --install [flags] | --uninstall

Flags
  --interval TIME       5s, 1m; from 1s to 1h (default: 5s)
  --host NAME           name in the database (default: that of this machine)
  --tag KEY=VALUE       kept with each sample; repeat it for more
  --url-file FILE       file that holds the DATABASE_URL; read again at each try, so that a
                        password may change
  --ca FILE             certificate of the authority that the database's must be signed by; means
                        sslmode=verify-full where neither the URL nor DB_SSLMODE says otherwise.
                        Not for servers of --postgres URL: theirs may have sslrootcert=FILE
  --per-core            each core's use, too
  --network-filesystems NFS, CIFS, FUSE and so on, too; one that hangs holds up nothing else
  --scrape URL          gauges and counters of a Prometheus /metrics address, by URL or by a file
                        that holds one; up to 500 values and 5 MB each; repeat it for more
  --postgres [URL]      statistics of a PostgreSQL server, by URL or by a file that holds one
                        (default: the one it writes to); repeat it for more
  --spool DIR           where samples wait (default: /var/lib/pgpulse-collect for root, else
                        ~/.local/state/pgpulse, ~/Library/Application Support/pgpulse,
                        %LOCALAPPDATA%\\pgpulse)
  --spool-max-size SIZE beyond it the oldest samples are dropped, and counted (default: 1GB)
  --spool-max-age TIME  the same for age; times without a collector do not count (default: 90d)
  --port N              serves /healthz (healthy while it samples and keeps: what waits for the
                        database is no fault, and told beside it) and /metrics on 127.0.0.1
  --once                prints one sample and ends; sends nothing
  --dry-run             prints each sample; sends nothing
  --install             makes it a service that starts with the machine: systemd (247 or later) or
                        launchd; the other flags but --spool, DATABASE_URL, DB_SSLMODE and
                        DB_SSLROOTCERT are kept for it. It reads addresses when it starts: after a change of
                        /etc/pgpulse-collect/url, restart it. Run it as root
  --uninstall           takes the service away; samples not yet sent stay
  --print               with either: prints what it would write or remove, and changes nothing
  --help                this text

Environment
  DATABASE_URL     postgres://collector:password@host:5432/database?sslmode=verify-full, or else
  DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD, DB_SSLMODE, DB_SSLROOTCERT
                   (localhost, 5432, testdb, server, none, prefer, none)
A pooler in transaction mode will do.

What the database has not taken lies in the spool: through kill -9, restarts, and weeks without a
network. When the network is back, the newest sample goes first, then the others, oldest first. Where
the disk is full or read-only, samples wait in memory, up to 8 MB. A power cut may take what was
written within the last half minute and not yet sent. What is lost is counted in the data. Records
that the database refuses as faulty are set aside in the spool's file refused.ndjson. One spool
serves one collector. A sample has at most 100 file systems, disks and interfaces each, the largest.

Exit status: 0; 1 where something is wrong, also with the flags.

Cost: 0.4 ms of a core for a sample, 2.8 ms with all else; 60 MB of memory; one connection, two
while more than 3,000 samples wait; some 2 kB of the database a sample before it is packed.

Examples
  deno run -A collect.ts --once
  DATABASE_URL=postgres://collector:secret@db/testdb deno run -A collect.ts
  sudo DATABASE_URL=postgres://collector:secret@db/testdb deno run -A collect.ts --install \\
      --tag rack=7 --scrape http://localhost:8090/metrics
  deno run -A collect.ts --install --print
  DATABASE_URL=postgres://collector:secret@db/testdb deno run -A collect.ts --postgres
`;

/** Of this script, as the database's table of hosts shows it. */
const VERSION = "1";
/** Pinned like the rest, but loaded only where there is no /proc. */
const SYSTEMINFORMATION = "npm:systeminformation@5.33.23";
/** Slower readings (file systems, temperatures, number of processes) are taken so often. */
const ASIDE_MS = 15_000;
/** The newest reading of a file system counts so long; after that it is left out. */
const STALE_MS = 60_000;
/** A segment of the spool is closed at this size, and goes to the database as one batch. */
const SEGMENT_BYTES = 1_000_000;
const SEGMENT_RECORDS = 1_000;
/** A file that is larger was not written by a collector. */
const MOST_BYTES = 10 * SEGMENT_BYTES;
/** What is kept in memory where the disk takes nothing. */
const MEMORY_BYTES = 8_000_000;
/** What is kept of records that the database refuses. */
const REFUSED_BYTES = 10_000_000;
/** With so many records waiting, a second connection is opened. */
const BACKLOG = 3_000;
/** So many of the newest records are sent before older ones. */
const FRESH = 64;
/** An answer of the database that takes longer is given up; the batch is sent again. */
const PATIENCE_MS = 60_000;
/** Samples that the role may not send now are offered again after this time. */
const HELD_MS = 600_000;
/** Values that one scraped address may add to a sample. */
const MAX_SCRAPED = 500;
/** Characters that such a page may have. */
const MAX_PAGE = 5_000_000;
/** File systems, disks and interfaces that stand in a sample, of each. */
const MAX_PARTS = 100;

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

// --- small tools -------------------------------------------------------------------------------

/** What explain() says, for those who have no checkout, and their address where `source` says. */
function told(error: unknown, sql: postgres.Sql | undefined, source?: string): string {
  const { code, message, hint } = error as { code?: string; message?: string; hint?: string };
  let text = explain(error, sql).replace("start it (deno task dev) or set", "start it or correct");
  // What the server says itself is nearer: which role there is not, which line of pg_hba.conf.
  if (code === "28000") text = text.replace(/: (".*? may not log in this way)/, `: ${message}; $1`);
  if (hint) {
    text = text.replace(/; log in as the right role or run deno task migrate$/, `; ${hint}`);
  }
  return source ? text.replace(/DATABASE_URL( or DB_PASSWORD)?/, source) : text;
}

/** Says each trouble once, and once that it is over. */
export class Troubles {
  #said = new Map<string, Set<string>>();

  say(key: string, message: string): void {
    const said = this.#said.get(key) ?? new Set();
    this.#said.set(key, said);
    // One trouble may show itself in several ways, in turn: each once, and not more than five.
    if (said.has(message) || said.size === 5) return;
    said.add(message);
    console.error(message);
  }

  over(key: string, message?: string): void {
    if (this.#said.delete(key) && message) console.error(message);
  }

  has(key: string): boolean {
    return this.#said.has(key);
  }

  list(): string[] {
    return [...this.#said.values()].map((messages) => [...messages].at(-1)!);
  }
}

const reason = (error: unknown) =>
  (error instanceof Error ? error.message : String(error)).replace(/ \(os error \d+\).*/s, "");

const sleep = (ms: number, signal?: AbortSignal): Promise<void> =>
  setTimer(ms, undefined, { signal }).catch(() => {});

/** The promise, or after `ms` an error that says what did not answer. */
async function within<T>(ms: number, what: string, promise: PromiseLike<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () =>
        reject(
          Object.assign(new Error(`${what} gave no answer in ${ms / 1000} s`), { late: true }),
        ),
      ms,
    );
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

const UNITS: Record<string, number> = { s: 1e3, m: 60e3, h: 3_600e3, d: 86_400e3 };

/** Reads "5s", "1m", "12h" or "90d"; returns ms. */
export function duration(text: string, flag: string, least: number, most: number): number {
  const [, n, unit] = /^(\d+)([smhd])$/.exec(text) ?? [];
  const ms = Number(n) * UNITS[unit];
  if (!(ms >= least && ms <= most)) {
    const say = (ms: number) =>
      ms < 3_600e3 ? `${ms / 1e3}s` : ms < 86_400e3 ? "1h" : ms / 86_400e3 + "d";
    throw new Error(
      `Cannot take ${flag} "${text}": give ${say(least)} to ${say(most)}, as in 5s, 1m or 90d`,
    );
  }
  return ms;
}

/** Reads "500kB", "100MB" or "1GB"; returns bytes. */
export function size(text: string): number {
  const [, n, unit] = /^(\d+)([kMG]B)$/.exec(text) ?? [];
  const bytes = Number(n) * { kB: 1e3, MB: 1e6, GB: 1e9 }[unit]!;
  if (!(bytes >= 100e3)) {
    throw new Error(
      `Cannot take --spool-max-size "${text}": give 100kB or more, as in 100MB or 1GB`,
    );
  }
  return bytes;
}

/** Four significant places behind the point for ratios, two for what is larger. */
const round = (n: number) => n < 1 ? Math.round(n * 1e4) / 1e4 : Math.round(n * 100) / 100;

/** Counters of one thing as rates a second; one that is new or went back has none this time. */
export function rates(
  names: readonly string[],
  now: readonly number[],
  before: readonly number[] | undefined,
  seconds: number,
): Record<string, number> | undefined {
  if (!before) return;
  const found: Record<string, number> = {};
  let any = false;
  for (let i = 0; i < names.length; i++) {
    const more = now[i] - before[i];
    if (!(more >= 0)) continue;
    found[names[i]] = round(more / seconds);
    any = true;
  }
  return any ? found : undefined;
}

// --- this machine ------------------------------------------------------------------------------

/** What a sample holds; README.md and pgpulse.collect() document its shape. */
export type Metrics = Record<string, unknown>;

/** Parts of metrics that are made of numbers by name. */
type Parts = Record<string, Record<string, number>>;
/** Images, which are always full. */
const IMAGES = /^(squashfs|iso9660|udf|erofs|cramfs)$/;

/** What stands in columns of its own: the fullest file system, the busiest disk, sums of all. */
export function summary(metrics: Metrics): Record<string, number | undefined> {
  const { cpu, memory, swap } = metrics as Parts;
  const all = (kind: string) => Object.values((metrics[kind] ?? {}) as Parts);
  const share = (part: number, whole: number) => Math.round(part / whole * 1e6) / 1e6;
  const of = (values: number[], choose: (a: number, b: number) => number) => {
    const known = values.filter(Number.isFinite);
    return known.length ? known.reduce(choose) : undefined;
  };
  const most = (values: number[]) => of(values, (a, b) => Math.max(a, b));
  const sum = (values: number[]) => of(values, (a, b) => a + b);
  const rooms = all("filesystems").filter(({ type }) => !IMAGES.test(`${type}`));
  const [disks, network] = [all("disks"), all("network")];
  return {
    cpu: cpu?.used,
    iowait: cpu?.iowait,
    steal: cpu?.steal,
    load1: (metrics.load as number[] | undefined)?.[0],
    memory_used: memory && share(memory.total - memory.available, memory.total),
    swap_used: swap && share(swap.used, swap.total),
    filesystem_used: most(rooms.map(({ used, available }) => share(used, used + available))),
    inodes_used: most(rooms.map(({ inodes, inodes_used }) => share(inodes_used, inodes))),
    disk_busy: most(disks.map(({ busy }) => busy)),
    disk_bytes: sum(disks.flatMap(({ read_bytes, written_bytes }) => [read_bytes, written_bytes])),
    received_bytes: sum(network.map(({ received_bytes }) => received_bytes)),
    sent_bytes: sum(network.map(({ sent_bytes }) => sent_bytes)),
  };
}

/** Leaves out the smallest, or the least busy, where there are too many of a kind. */
export function largest(metrics: Metrics, troubles: Troubles): Metrics {
  for (const kind of ["filesystems", "disks", "network"]) {
    const all = Object.entries((metrics[kind] ?? {}) as Parts);
    if (all.length <= MAX_PARTS) continue;
    const size = ([, part]: typeof all[0]) =>
      Object.values(part).reduce((sum, n) => sum + (Number(n) || 0), 0);
    all.sort((a, b) => size(b) - size(a));
    metrics[kind] = Object.fromEntries(all.slice(0, MAX_PARTS));
    troubles.say(kind, `Takes the ${MAX_PARTS} largest of ${kind} only, as there are more`);
  }
  return metrics;
}

/** A way to read this machine. */
export interface Machine {
  /** A sample; before there is anything to compare with, undefined. */
  sample(): Metrics | undefined | Promise<Metrics | undefined>;
  /** Takes the slower readings; their newest values stand in the samples. */
  aside(): Promise<void>;
}

const NETWORK = [
  "received_bytes",
  "received_packets",
  "received_errors",
  "received_drops",
  "sent_bytes",
  "sent_packets",
  "sent_errors",
  "sent_drops",
];
const DISK = ["reads", "read_bytes", "writes", "written_bytes"];
/** Interfaces whose traffic passes another one, too. */
const INNER = /^(lo|dummy|docker|br-|virbr|veth|vnet|tap|cali|cni|flannel|fwbr|fwln|fwpr|ifb)/;
/** Disks by name, where /sys does not tell. */
const DISKS = /^([svh]d[a-z]+|xvd[a-z]+|nvme\d+n\d+|mmcblk\d+)$/;

/** A file that is opened once and read again and again, as those of /proc and /sys allow. */
class Reread {
  static #buffer = new Uint8Array(65_536);
  static #decoder = new TextDecoder();
  #file?: Deno.FsFile;
  #pause = 0;

  constructor(readonly path: string) {}

  /** All of it; undefined where the system has no such file, or it has gone. */
  text(): string | undefined {
    if (this.#pause > 0) return void this.#pause--;
    try {
      this.#file ??= Deno.openSync(this.path);
      this.#file.seekSync(0, Deno.SeekMode.Start);
      let length = 0;
      for (;;) {
        const got = this.#file.readSync(Reread.#buffer.subarray(length)) ?? 0;
        length += got;
        // The kernel hands out a page at a time, whole lines of it: less is the end.
        if (got < 3_500) break;
        if (length === Reread.#buffer.length) {
          const larger = new Uint8Array(2 * length);
          larger.set(Reread.#buffer);
          Reread.#buffer = larger;
        }
      }
      return Reread.#decoder.decode(Reread.#buffer.subarray(0, length));
    } catch {
      this.#file?.close();
      this.#file = undefined;
      this.#pause = 20;
    }
  }

  numbers(): number[] | undefined {
    return this.text()?.trim().split(/\s+/).map(Number);
  }
}

/** The number behind a word; undefined where the text has none. */
function after(text: string, word: string): number | undefined {
  const at = text.indexOf(word);
  if (at < 0) return;
  const n = parseInt(text.slice(at + word.length, at + word.length + 24));
  return Number.isNaN(n) ? undefined : n;
}

/** How a processor spent its time between two lines of /proc/stat. */
export function shares(now: number[], before: number[] | undefined) {
  if (!before) return;
  // Of idle and waiting times some run backwards now and then: then that part was none.
  const [user, nice, system, idle, iowait, irq, softirq, steal] = now.slice(0, 8).map((n, i) =>
    Math.max(0, n - before[i])
  );
  const known = [user, nice, system, idle, iowait, irq, softirq, steal].filter(Number.isFinite);
  const total = known.reduce((sum, n) => sum + n, 0);
  if (!total) return;
  const share = (...parts: number[]) => round(parts.reduce((sum, n) => sum + (n || 0), 0) / total);
  return {
    used: share(user, nice, system, irq, softirq, steal),
    user: share(user, nice),
    system: share(system, irq, softirq),
    iowait: share(iowait),
    steal: share(steal),
  };
}

/** Linux, straight from /proc: the hot values in a third of a millisecond. */
export class Linux implements Machine {
  #files: Record<string, Reread>;
  #cpus: number[][] = [];
  #disks = new Map<string, number[]>();
  #network = new Map<string, number[]>();
  #container?: number;
  #at?: number;
  #whole = new Map<string, boolean>();
  #slow: { processes?: number; temperatures?: Record<string, number> } = {};
  #asking = new Set<string>();
  readonly filesystems: FileSystems;

  constructor(
    readonly options: { perCore?: boolean; network?: boolean; proc?: string; sys?: string } = {},
    troubles = new Troubles(),
    /** Monotonic; stands still while the machine sleeps, as its counters do. */
    readonly clock = () => performance.now(),
  ) {
    const { proc = "/proc", sys = "/sys" } = options;
    const file = (path: string) => new Reread(path);
    this.#files = {
      stat: file(`${proc}/stat`),
      load: file(`${proc}/loadavg`),
      memory: file(`${proc}/meminfo`),
      disks: file(`${proc}/diskstats`),
      network: file(`${proc}/net/dev`),
      sockets: file(`${proc}/net/sockstat`),
      sockets6: file(`${proc}/net/sockstat6`),
      uptime: file(`${proc}/uptime`),
      // Version 2 has them in a container only, version 1 everywhere, but without a limit.
      cpuMax: file(`${sys}/fs/cgroup/cpu.max`),
      cpuStat: file(`${sys}/fs/cgroup/cpu.stat`),
      memoryMax: file(`${sys}/fs/cgroup/memory.max`),
      memoryCurrent: file(`${sys}/fs/cgroup/memory.current`),
      memoryStat: file(`${sys}/fs/cgroup/memory.stat`),
      cpuQuota1: file(`${sys}/fs/cgroup/cpu/cpu.cfs_quota_us`),
      cpuPeriod1: file(`${sys}/fs/cgroup/cpu/cpu.cfs_period_us`),
      cpuUsage1: file(`${sys}/fs/cgroup/cpuacct/cpuacct.usage`),
      memoryLimit1: file(`${sys}/fs/cgroup/memory/memory.limit_in_bytes`),
      memoryUsage1: file(`${sys}/fs/cgroup/memory/memory.usage_in_bytes`),
      memoryStat1: file(`${sys}/fs/cgroup/memory/memory.stat`),
    };
    this.filesystems = new FileSystems(`${proc}/self/mountinfo`, !!options.network, troubles);
  }

  sample(): Metrics | undefined {
    const now = this.clock();
    const seconds = this.#at === undefined ? NaN : (now - this.#at) / 1000;
    const first = this.#at === undefined;
    this.#at = now;
    const metrics: Metrics = {};
    const stat = this.#files.stat.text();
    if (stat) metrics.cpu = this.#cpu(stat);
    metrics.load = this.#files.load.numbers()?.slice(0, 3);
    this.#memory(metrics);
    const filesystems = this.filesystems.newest();
    if (filesystems) metrics.filesystems = filesystems;
    metrics.disks = this.#diskRates(seconds);
    metrics.network = this.#networkRates(seconds);
    metrics.uptime = this.#files.uptime.numbers()?.[0];
    if (stat) {
      const tail = stat.slice(stat.lastIndexOf("procs_running"));
      metrics.processes = {
        total: this.#slow.processes,
        running: after(tail, "procs_running"),
        blocked: after(tail, "procs_blocked"),
      };
    }
    metrics.sockets = this.#sockets();
    if (this.#slow.temperatures) metrics.temperatures = this.#slow.temperatures;
    metrics.container = this.#limits(seconds);
    return first ? undefined : metrics;
  }

  #cpu(stat: string) {
    const lines = stat.slice(0, stat.indexOf("\nintr")).split("\n");
    const before = this.#cpus;
    const now = this.#cpus = [];
    const each = [];
    for (let i = 0; i < lines.length && (i === 0 || this.options.perCore); i++) {
      if (!lines[i].startsWith("cpu")) continue;
      const [name, ...numbers] = lines[i].split(/ +/);
      const index = i === 0 ? 0 : Number(name.slice(3)) + 1;
      (now as number[][])[index] = numbers.map(Number);
      if (i) each.push(shares(numbers.map(Number), before[index])?.used ?? null);
    }
    const all = shares(now[0] ?? [], before[0]);
    const cores = lines.filter((line) => /^cpu\d/.test(line)).length;
    return all && { ...all, cores, ...(this.options.perCore ? { each } : {}) };
  }

  #memory(metrics: Metrics): void {
    const text = this.#files.memory.text();
    if (!text) return;
    const bytes = (word: string) => {
      const n = after(text, word);
      return n === undefined ? undefined : n * 1024;
    };
    const [total, free] = [bytes("MemTotal:"), bytes("MemFree:")];
    const [buffers, cached] = [bytes("Buffers:"), bytes("\nCached:")];
    metrics.memory = {
      total,
      available: bytes("MemAvailable:") ?? (free ?? 0) + (buffers ?? 0) + (cached ?? 0),
      free,
      buffers,
      cached,
    };
    const [swap, swapFree] = [bytes("SwapTotal:"), bytes("SwapFree:")];
    if (swap && swapFree !== undefined) metrics.swap = { total: swap, used: swap - swapFree };
  }

  /** Whether it is a disk of its own: no partition, no loop, nothing made of other disks. */
  #isDisk(name: string): boolean {
    let is = this.#whole.get(name);
    if (is === undefined) {
      const exists = (path: string) => {
        try {
          return !!Deno.statSync(`${this.options.sys ?? "/sys"}/${path}`);
        } catch {
          return false;
        }
      };
      is = exists("block") ? exists(`block/${name}/device`) : DISKS.test(name);
      this.#whole.set(name, is);
    }
    return is;
  }

  #diskRates(seconds: number) {
    const text = this.#files.disks.text();
    if (text === undefined) return;
    const [before, now] = [this.#disks, new Map<string, number[]>()];
    const found: Metrics = {};
    for (const line of text.split("\n")) {
      const part = line.trim().split(/ +/);
      if (part.length < 13 || !this.#isDisk(part[2])) continue;
      const sector = 512;
      const counters = [+part[3], +part[5] * sector, +part[7], +part[9] * sector, +part[12]];
      const last = before.get(part[2]);
      now.set(part[2], counters);
      const disk = rates(DISK, counters, last, seconds);
      if (!disk) continue;
      const busy = (counters[4] - last![4]) / 1000 / seconds;
      if (busy >= 0) disk.busy = Math.min(1, round(busy));
      found[part[2]] = disk;
    }
    this.#disks = now;
    return now.size ? found : undefined;
  }

  #networkRates(seconds: number) {
    const text = this.#files.network.text();
    if (text === undefined) return;
    const [before, now] = [this.#network, new Map<string, number[]>()];
    const found: Metrics = {};
    for (const line of text.split("\n")) {
      const colon = line.lastIndexOf(":");
      const name = line.slice(0, colon).trim();
      if (colon < 0 || INNER.test(name)) continue;
      const n = line.slice(colon + 1).trim().split(/ +/).map(Number);
      const counters = [...n.slice(0, 4), ...n.slice(8, 12)];
      // One that never carried anything is none.
      if (!counters[0] && !counters[4]) continue;
      now.set(name, counters);
      const rate = rates(NETWORK, counters, before.get(name), seconds);
      if (rate) found[name] = rate;
    }
    this.#network = now;
    return now.size ? found : undefined;
  }

  #sockets() {
    const four = this.#files.sockets.text();
    if (four === undefined) return;
    const six = this.#files.sockets6.text() ?? "";
    const count = (word: string) =>
      (after(four, `${word}: inuse`) ?? 0) + (after(six, `${word}6: inuse`) ?? 0);
    return { tcp: count("TCP"), udp: count("UDP") };
  }

  /** What the container may use and uses, by control groups of version 2 or 1. */
  #limits(seconds: number) {
    const files = this.#files;
    let cpu, memory, used, cache, spent;
    const memoryMax = files.memoryMax.text();
    if (memoryMax !== undefined) {
      const [quota, period] = files.cpuMax.numbers() ?? [];
      cpu = quota / period;
      memory = Number(memoryMax);
      used = files.memoryCurrent.numbers()?.[0];
      cache = after(files.memoryStat.text() ?? "", "\ninactive_file");
      spent = after(files.cpuStat.text() ?? "", "usage_usec")! / 1e6;
    } else {
      memory = files.memoryLimit1.numbers()?.[0] ?? NaN;
      if (memory > 2 ** 60) memory = NaN;
      const quota = files.cpuQuota1.numbers()?.[0] ?? -1;
      cpu = quota > 0 ? quota / (files.cpuPeriod1.numbers()?.[0] ?? NaN) : NaN;
      if (!(cpu > 0) && !(memory > 0)) return;
      used = files.memoryUsage1.numbers()?.[0];
      cache = after(files.memoryStat1.text() ?? "", "total_inactive_file");
      spent = (files.cpuUsage1.numbers()?.[0] ?? NaN) / 1e9;
    }
    const before = this.#container;
    this.#container = spent;
    const rate = rates(["cpu_used"], [spent], before === undefined ? undefined : [before], seconds);
    return {
      cpu_limit: cpu > 0 ? round(cpu) : undefined,
      ...rate,
      memory_limit: memory > 0 ? memory : undefined,
      memory_used: used === undefined ? undefined : Math.max(0, used - (cache ?? 0)),
    };
  }

  async aside(): Promise<void> {
    const { proc = "/proc", sys = "/sys" } = this.options;
    const read = async (what: () => Promise<void>) => {
      try {
        await what();
      } catch { /* this system has none, or it has just gone */ }
    };
    // One that hangs is not asked again meanwhile: each time would take a thread for good.
    const once = async (name: string, what: () => Promise<void>) => {
      if (this.#asking.has(name)) return;
      this.#asking.add(name);
      await read(what);
      this.#asking.delete(name);
    };
    await Promise.all([
      this.filesystems.read(),
      once("processes", async () => {
        let count = 0;
        for await (const { name } of Deno.readDir(proc)) if (/^\d+$/.test(name)) count++;
        this.#slow.processes = count || undefined;
      }),
      once("temperatures", async () => {
        const found: Record<string, number> = {};
        const text = async (path: string) => (await Deno.readTextFile(path)).trim();
        for await (const { name: chip } of Deno.readDir(`${sys}/class/hwmon`)) {
          await read(async () => {
            const dir = `${sys}/class/hwmon/${chip}`;
            const name = await text(`${dir}/name`);
            for await (const { name: input } of Deno.readDir(dir)) {
              if (!/^temp\d+_input$/.test(input)) continue;
              await read(async () => {
                const sensor = input.replace("_input", "");
                const label = await text(`${dir}/${sensor}_label`).catch(() => sensor);
                const celsius = Number(await text(`${dir}/${input}`)) / 1000;
                let key = `${name} ${label}`;
                for (let n = 2; key in found; n++) key = `${name} ${label} ${n}`;
                if (celsius > -50 && celsius < 200) found[key] = celsius;
              });
            }
          });
        }
        this.#slow.temperatures = Object.keys(found).length ? found : undefined;
      }),
    ]);
  }
}

/** File systems of other machines, or of programs: they may hang. */
const REMOTE = /^(nfs|cifs|smb|fuse(\.|$)|9p|ceph|afs|lustre|glusterfs|virtiofs|ncpfs|gpfs|beegfs)/;
/** Those that hold nothing, or are always full. */
const UNREAL = /^(squashfs|iso9660|erofs|udf|cramfs|overlay|tmpfs|ramfs|devtmpfs|autofs)/;

interface Mount {
  path: string;
  device: string;
  type: string;
}

/** Mounts that are worth watching, each device once, by the shortest path. */
export function mounts(mountinfo: string, network: boolean): Mount[] {
  const byDevice = new Map<string, Mount>();
  const plain = (text: string) =>
    text.replace(/\\(\d{3})/g, (_, octal) => String.fromCharCode(parseInt(octal, 8)));
  for (const line of mountinfo.split("\n")) {
    const [left, right] = line.split(" - ");
    if (!right) continue;
    const [, , number, , path] = left.split(" ");
    const [type, source] = right.split(" ");
    const remote = REMOTE.test(type);
    const real = /^\/dev\//.test(source) || /^(zfs|btrfs|bcachefs)$/.test(type);
    if (remote ? !network : !(real && !UNREAL.test(type)) && path !== "/") continue;
    const mount = { path: plain(path), device: plain(source), type };
    // Snapshots and subvolumes have numbers of their own, and share the room of their device.
    const key = real && type !== "zfs" ? source : remote ? `${source} ${type}` : number;
    const known = byDevice.get(key);
    if (!known || path.length < known.path.length) byDevice.set(key, mount);
  }
  return [...byDevice.values()];
}

/** How full file systems are, read apart from the samples: one that hangs holds up nobody. */
export class FileSystems {
  #found = new Map<string, { at: number; values: Metrics }>();
  #asked = new Map<string, number>();

  constructor(
    readonly mountinfo: string,
    readonly network: boolean,
    readonly troubles: Troubles,
    readonly ask: (path: string) => Promise<Record<string, number>> = statfs as never,
  ) {}

  /** By path, as far as they answered lately. */
  newest(): Metrics | undefined {
    const since = performance.now() - STALE_MS;
    const found = [...this.#found].filter(([, { at }]) => at > since);
    if (!found.length) return;
    return Object.fromEntries(found.map(([path, { values }]) => [path, values]));
  }

  /** Asks each that is not being asked; waits for the answers, but not long. */
  async read(ms = 2_000): Promise<void> {
    let list: Mount[];
    try {
      list = mounts(await Deno.readTextFile(this.mountinfo), this.network);
    } catch {
      return;
    }
    for (const path of this.#found.keys()) {
      if (!list.some((mount) => mount.path === path)) this.#found.delete(path);
    }
    const answers = list.filter(({ path }) => !this.#asked.has(path)).map(async (mount) => {
      const { path, device, type } = mount;
      this.#asked.set(path, performance.now());
      try {
        const { bsize, blocks, bfree, bavail, files, ffree } = await this.ask(path);
        if (!blocks) return;
        const values: Metrics = {
          device,
          type,
          size: blocks * bsize,
          used: (blocks - bfree) * bsize,
          available: bavail * bsize,
        };
        if (files) Object.assign(values, { inodes: files, inodes_used: files - ffree });
        this.#found.set(path, { at: performance.now(), values });
      } catch {
        this.#found.delete(path);
      } finally {
        this.#asked.delete(path);
        this.troubles.over(`mount ${path}`, `File system "${path}" answers again`);
      }
    });
    let timer: ReturnType<typeof setTimeout> | undefined;
    await Promise.race([
      Promise.all(answers),
      new Promise((done) => timer = setTimeout(done, ms)),
    ]);
    clearTimeout(timer);
    for (const [path, at] of this.#asked) {
      if (performance.now() - at < ms) continue;
      this.troubles.say(`mount ${path}`, `File system "${path}" does not answer; it is left out`);
    }
  }
}

/** What is used of systeminformation. */
interface SystemInformation {
  currentLoad(): Promise<Record<string, number> & { cpus: { load: number }[] }>;
  mem(): Promise<Record<string, number>>;
  fsSize(): Promise<(Record<string, number> & Record<"fs" | "type" | "mount", string>)[]>;
  networkStats(which: string): Promise<(Record<string, number> & { iface: string })[]>;
  disksIO(): Promise<Record<string, number> | null>;
  fsStats(): Promise<Record<string, number> | null>;
  cpuTemperature(): Promise<{ main: number | null }>;
}

/** macOS, Windows and the rest, through systeminformation. */
export class Elsewhere implements Machine {
  #before = new Map<string, number[]>();
  #at?: number;
  #slow: Metrics = {};
  #busy = false;

  constructor(readonly si: SystemInformation, readonly perCore = false) {}

  static async load(perCore = false): Promise<Elsewhere> {
    return new Elsewhere((await import(SYSTEMINFORMATION)).default, perCore);
  }

  async sample(): Promise<Metrics | undefined> {
    const quiet = <T>(promise: Promise<T>) => promise.catch(() => undefined);
    const { si } = this;
    const [cpu, memory, network, disks, bytes] = await Promise.all([
      quiet(si.currentLoad()),
      quiet(si.mem()),
      quiet(si.networkStats("*")),
      quiet(si.disksIO()),
      quiet(si.fsStats()),
    ]);
    const now = performance.now();
    const [first, seconds] = [this.#at === undefined, (now - (this.#at ?? now)) / 1000];
    this.#at = now;
    const before = this.#before;
    this.#before = new Map();
    const rate = (key: string, names: string[], counters: (number | null)[]) => {
      const known = counters.map((n) => n ?? NaN);
      this.#before.set(key, known);
      return rates(names, known, before.get(key), seconds);
    };
    const metrics: Metrics = { ...this.#slow, uptime: uptime() };
    if (cpu) {
      const share = (name: string) => round((cpu[name] ?? 0) / 100);
      metrics.cpu = {
        used: share("currentLoad"),
        user: round(share("currentLoadUser") + share("currentLoadNice")),
        system: round(share("currentLoadSystem") + share("currentLoadIrq")),
        iowait: 0,
        steal: share("currentLoadSteal"),
        cores: cpu.cpus.length,
        ...(this.perCore ? { each: cpu.cpus.map(({ load }) => round(load / 100)) } : {}),
      };
    }
    if (Deno.build.os !== "windows") metrics.load = loadavg().map(round);
    if (memory) {
      const { total, available, free, buffers, cached, swaptotal, swapused } = memory;
      metrics.memory = { total, available, free, buffers, cached };
      if (swaptotal) metrics.swap = { total: swaptotal, used: swapused };
    }
    const interfaces: Metrics = {};
    for (const one of network ?? []) {
      if (INNER.test(one.iface) || !(one.rx_bytes || one.tx_bytes)) continue;
      const names = NETWORK.filter((name) => !name.endsWith("packets"));
      const { rx_bytes, rx_errors, rx_dropped, tx_bytes, tx_errors, tx_dropped } = one;
      const counters = [rx_bytes, rx_errors, rx_dropped, tx_bytes, tx_errors, tx_dropped];
      const found = rate(`network ${one.iface}`, names, counters);
      if (found) interfaces[one.iface] = found;
    }
    if (network?.length) metrics.network = interfaces;
    const all = rate("disks", DISK, [
      disks?.rIO ?? null,
      bytes?.rx ?? null,
      disks?.wIO ?? null,
      bytes?.wx ?? null,
    ]);
    if (all) metrics.disks = { all };
    return first ? undefined : metrics;
  }

  async aside(): Promise<void> {
    if (this.#busy) return;
    this.#busy = true;
    try {
      const filesystems: Metrics = {};
      for (const { fs, type, size, used, available, mount } of await this.si.fsSize()) {
        // Of macOS's volumes all but one are its own, and share their room.
        if (!size || /^\/System\/Volumes\/(?!Data$)/.test(mount)) continue;
        filesystems[mount] = { device: fs, type, size, used, available };
      }
      this.#slow.filesystems = filesystems;
      const { main } = await this.si.cpuTemperature();
      if (main) this.#slow.temperatures = { cpu: main };
    } catch {
      /* not on this system */
    } finally {
      this.#busy = false;
    }
  }
}

/** Name of the operating system, as people call it. */
function osName(): string {
  try {
    const [, name] = /^PRETTY_NAME="?(.*?)"?$/m.exec(Deno.readTextFileSync("/etc/os-release")) ??
      [];
    if (name) return name;
  } catch { /* not Linux, or a bare one */ }
  const os = { darwin: "macOS", windows: "Windows", linux: "Linux" } as Record<string, string>;
  return `${os[Deno.build.os] ?? Deno.build.os} ${Deno.osRelease()}`;
}

// --- scraping ----------------------------------------------------------------------------------

/** Values of a Prometheus page: those to be taken as they are, and those that count up. */
export function readPage(page: string, label = "") {
  const types = new Map<string, string>();
  const found: { name: string; value: number; counts: boolean }[] = [];
  for (const line of page.split("\n")) {
    const [, of, type] = /^#\s*TYPE\s+(\S+)\s+(\w+)/.exec(line) ?? [];
    if (of) types.set(of, type);
    const [, name, labels = "", text] = /^([a-zA-Z_:][\w:]*)(\{.*\})?\s+(\S+)/.exec(line) ?? [];
    const value = Number(text);
    if (!name || !Number.isFinite(value)) continue;
    const [, family, suffix = ""] = /^(.*?)(_total|_sum|_count|_bucket|_created)?$/.exec(name)!;
    const kind = types.get(name) ?? types.get(family) ??
      (suffix === "_total" ? "counter" : "gauge");
    const parts = kind === "histogram" || kind === "summary";
    if (suffix === "_created" || (parts && !/_sum|_count/.test(suffix))) continue;
    const all = [labels.slice(1, -1).replace(/,\s*$/, ""), label].filter(Boolean).join();
    // jsonb takes no zero character.
    const key = (all ? `${name}{${all}}` : name).replace(/\p{Cc}/gu, "");
    found.push({ name: key, value, counts: kind === "counter" || parts });
  }
  return found;
}

/** One address, read at each interval apart from the samples. */
export class Scrape {
  #before = new Map<string, number>();
  #at = 0;
  #busy = false;
  #values: Record<string, number> = {};
  #url: URL;
  #headers: Record<string, string> = {};

  constructor(address: string, readonly several: boolean, readonly troubles: Troubles) {
    const url = URL.parse(address);
    if (!url || !/^https?:$/.test(url.protocol)) {
      throw new Error(
        `Cannot scrape "${address}": give an address as http://localhost:9100/metrics`,
      );
    }
    if (url.username) {
      const secret = `${decodeURIComponent(url.username)}:${decodeURIComponent(url.password)}`;
      this.#headers.authorization = `Basic ${btoa(secret)}`;
      url.username = url.password = "";
    }
    this.#url = url;
  }

  newest(): Record<string, number> {
    return this.#values;
  }

  /** Reads it, unless the last time is still under way. */
  async read(ms: number): Promise<void> {
    if (this.#busy) return;
    this.#busy = true;
    const [key, name] = [`scrape ${this.#url}`, `"${this.#url}"`];
    try {
      const answer = await fetch(this.#url, {
        headers: this.#headers,
        signal: AbortSignal.timeout(ms),
      });
      let page = "";
      for await (const text of answer.body?.pipeThrough(new TextDecoderStream()) ?? []) {
        page += text;
        if (page.length > MAX_PAGE) throw new Error(`it is longer than ${MAX_PAGE / 1e6} MB`);
      }
      if (!answer.ok) throw new Error(`it answers ${answer.status}`);
      const now = performance.now();
      const seconds = (now - this.#at) / 1000;
      const before = this.#before;
      [this.#at, this.#before] = [now, new Map()];
      const values: Record<string, number> = {};
      const all = readPage(page, this.several ? `instance="${this.#url.host}"` : "");
      if (!all.length) throw new Error("it has no metrics");
      for (const { name, value, counts } of all.slice(0, MAX_SCRAPED)) {
        if (!counts) values[name] = value;
        else {
          this.#before.set(name, value);
          const rate = rates(
            ["is"],
            [value],
            before.has(name) ? [before.get(name)!] : undefined,
            seconds,
          );
          if (rate) values[name] = rate.is;
        }
      }
      if (all.length > MAX_SCRAPED) {
        this.troubles.say(
          `${key} size`,
          `${name} has ${all.length} values: the first ${MAX_SCRAPED} are taken`,
        );
      }
      this.#values = values;
      this.troubles.over(key, `${name} can be scraped again`);
    } catch (error) {
      this.#values = {};
      this.#before.clear();
      this.troubles.say(key, `Cannot scrape ${name}: ${reason(error)}; it is left out meanwhile`);
    } finally {
      this.#busy = false;
    }
  }
}

// --- PostgreSQL ---
/** A query that a server takes longer for is given up; its values are left out of that sample. */
const STATEMENT_MS = 2_000;
/** Sizes and statements are read so often. */
const DETAILS_MS = 60_000;
/** Server-side settings of one query only, which a pooler does not carry to others. */
const QUIETLY = `select /* pgpulse */ set_config('search_path', 'pg_catalog', true),
    set_config('statement_timeout', '${STATEMENT_MS}', true),
    set_config('lock_timeout', '200', true),
    set_config('timezone', 'UTC', true), set_config('jit', 'off', true)`;
/** To look for the best order of joins costs more than it saves here: 6 ms of a core. */
const AS_WRITTEN = `, set_config('join_collapse_limit', '1', true),
    set_config('from_collapse_limit', '1', true)`;

/** What may be asked there; read once for each connection. */
const ABOUT = `select /* pgpulse */
    current_setting('server_version_num')::int / 10000 as major,
    (
        select quote_ident(n.nspname)
        from pg_extension e
        join pg_namespace n on n.oid = e.extnamespace
        where e.extname = 'pg_stat_statements'
            and string_to_array(e.extversion, '.')::int[] >= '{1,8}'
            -- set where the library is loaded, too
            and current_setting('pg_stat_statements.max', true) is not null
    ) as statements`;

/** Everything cheap, by one query: counters as they are, and the rest as it is kept. */
const samplePostgresql = (major: number) =>
  `with /* pgpulse */ sessions as materialized (
    select *, extract(epoch from clock_timestamp() - xact_start) as seconds
    from pg_stat_activity
    where pid <> pg_backend_pid()
), clients as (
    select * from sessions where backend_type = 'client backend'
), locks as materialized (
    select * from pg_locks where pid is distinct from pg_backend_pid()
), waits as materialized (
    -- To ask who blocks costs a little of each: not for a crowd.
    select *, pg_blocking_pids(pid) as blockers
    from locks
    where not granted
    order by waitstart
    limit 20
), place as materialized (
    select
        r as recovery,
        (select oid from pg_database where datname = current_database()) as own,
        case when r then pg_last_wal_receive_lsn() else pg_current_wal_lsn() end as lsn
    from pg_is_in_recovery() as r
), standbys as materialized (
    select
        application_name as name, host(client_addr) as address, state, sync_state as sync,
        pg_wal_lsn_diff(lsn, replay_lsn) as lag_bytes,
        case when replay_lsn >= lsn then 0 else extract(epoch from replay_lag) end as lag_seconds
    from pg_stat_replication, place
    where state <> 'backup'
), old as (
    select pid, usename, application_name, datname, state, seconds, query
    from sessions
    where backend_type not in ('walsender', 'autovacuum worker') and xact_start is not null
        -- One that listens seems to be, for a moment at each NOTIFY, in one as old as its LISTEN.
        and state is distinct from 'idle'
    union all
    select
        null, owner, gid, database, 'prepared', extract(epoch from clock_timestamp() - prepared),
        null
    from pg_prepared_xacts
), rights as (
    select pg_has_role('pg_read_all_stats', 'usage') as all
)
select jsonb_strip_nulls(jsonb_build_object(
    'version', split_part(current_setting('server_version'), ' ', 1),
    'uptime', round(extract(epoch from clock_timestamp() - pg_postmaster_start_time())),
    'recovery', recovery,
    'sees_all', "all",
    'connections', connections,
    'max_connections', most,
    'connections_used', round(connections / most::numeric, 4),
    'states', case when "all" then (
        select coalesce(jsonb_object_agg(state, n), '{}')
        from (
            select trim(regexp_replace(state, '[^a-z]+', '_', 'g'), '_') as state, count(*) as n
            from clients where state is not null group by 1
        ) as states
    ) end,
    'active', case when "all" then (select count(*) from clients where state = 'active') end,
    'waits', case when "all" then (
        select coalesce(jsonb_object_agg(wait_event_type, n), '{}')
        from (
            select wait_event_type, count(*) as n
            from clients
            where state = 'active' and wait_event_type not in ('Client', 'Activity', 'Timeout')
            group by 1
        ) as waits
    ) end,
    'blocked', (select count(distinct pid) from locks where not granted),
    'oldest_transaction_seconds', (
        select round(max(seconds), 3)
        from (select seconds from old union all select 0 where "all") as o
    ),
    'locks', (
        select jsonb_object_agg(mode, n)
        from (select mode, count(*) as n from locks group by 1) as modes
    ),
    'blocked_sessions', (
        select jsonb_agg(jsonb_build_object(
            'pid', w.pid, 'user', s.usename, 'application', s.application_name,
            'database', s.datname,
            'seconds', round(
                extract(epoch from clock_timestamp() - coalesce(w.waitstart, s.query_start)), 3
            ),
            'lock', w.mode,
            'on', coalesce(
                case when w.database = own then w.relation::regclass::text end,
                -- Who waits for a row has locked it, and waits for the other's transaction.
                (
                    select 'a row of ' || t.relation::regclass
                    from locks t
                    where t.pid = w.pid and t.locktype = 'tuple' and t.database = own
                    limit 1
                ),
                w.locktype
            ),
            'statement', left(s.query, 1000),
            'by', (
                select jsonb_agg(jsonb_build_object(
                    'pid', b.pid, 'user', t.usename, 'application', t.application_name,
                    'state', t.state,
                    'seconds', round(t.seconds, 3), 'statement', left(t.query, 1000)
                ))
                from (select distinct unnest(w.blockers[:5]) as pid) as b
                left join sessions t on t.pid = b.pid
            )
        ))
        from waits w
        join sessions s on s.pid = w.pid
    ),
    'transactions', (
        select jsonb_agg(jsonb_build_object(
            'pid', pid, 'user', usename, 'application', application_name, 'database', datname,
            'state', state, 'seconds', round(seconds, 3), 'statement', left(query, 1000)
        ) order by seconds desc)
        from (select * from old where seconds > 10 order by seconds desc limit 5) as longest
    ),
    'notify_queue', round(pg_notification_queue_usage()::numeric, 4),
    'wraparound', round(wraparound, 4),
    'wraparound_database', wraparound_database,
    'replication_lag_seconds', round(case
        -- What was received is no measure where nothing is received any more.
        when recovery and pg_last_wal_replay_lsn() >= lsn
            and exists (select from pg_stat_wal_receiver)
            then 0
        when recovery then extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp())
        else (select max(lag_seconds) from standbys)
    end, 3),
    'replication_lag_bytes', case
        when recovery then pg_wal_lsn_diff(lsn, pg_last_wal_replay_lsn())
        else (select max(lag_bytes) from standbys)
    end,
    'standbys', (select jsonb_agg(s) from standbys s),
    'slots', (
        select jsonb_agg(jsonb_build_object(
            'name', slot_name, 'kind', slot_type, 'active', active, 'status', wal_status,
            'held_bytes', pg_wal_lsn_diff(lsn, restart_lsn)
        ))
        from pg_replication_slots
    ),
    'counters', jsonb_build_object(
        'database', (
            select jsonb_build_object(
                'since', concat(pg_postmaster_start_time(), stats_reset),
                'commits', xact_commit, 'rollbacks', xact_rollback,
                'blocks_hit', blks_hit, 'blocks_read', blks_read,
                'tuples_returned', tup_returned, 'tuples_fetched', tup_fetched,
                'tuples_inserted', tup_inserted, 'tuples_updated', tup_updated,
                'tuples_deleted', tup_deleted,
                'tuples_written', tup_inserted + tup_updated + tup_deleted,
                'temporary_bytes', temp_bytes,
                'deadlocks', deadlocks, 'conflicts', conflicts
            )
            from pg_stat_database
            where datname = current_database()
        ),
        'wal', jsonb_build_object(
            'since', concat(pg_postmaster_start_time(), recovery),
            'wal_bytes', pg_wal_lsn_diff(lsn, '0/0')
        ),
        'archiver', (
            select jsonb_build_object(
                'since', stats_reset, 'archived', archived_count, 'archive_failures', failed_count
            )
            from pg_stat_archiver
            where current_setting('archive_mode') <> 'off'
        ),
        'checkpoints', (
            select jsonb_build_object(
                'since', stats_reset, ${
    major >= 17
      ? `'checkpoints_timed', num_timed, 'checkpoints_requested', num_requested,
                'checkpoints', num_timed + num_requested,
                'checkpoint_write', write_time / 1000, 'checkpoint_sync', sync_time / 1000,
                'checkpoint_buffers', buffers_written
            )
            from pg_stat_checkpointer`
      : `'checkpoints_timed', checkpoints_timed, 'checkpoints_requested', checkpoints_req,
                'checkpoints', checkpoints_timed + checkpoints_req,
                'checkpoint_write', checkpoint_write_time / 1000,
                'checkpoint_sync', checkpoint_sync_time / 1000,
                'checkpoint_buffers', buffers_checkpoint
            )
            from pg_stat_bgwriter`
  }
        )
    )
)) as found
from place, rights, lateral (
    select
        -- and this one; of others a role with few rights sees no more than that they are there
        1 + (
            select count(*) from sessions
            where backend_type = 'client backend' or backend_type is null and datid is not null
        ) as connections,
        current_setting('max_connections')::int
            - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true)::int, 0) as most
) as room, lateral (
    select
        greatest(age(datfrozenxid), mxid_age(datminmxid)) / 2147483648.0 as wraparound,
        datname as wraparound_database
    from pg_database
    order by 1 desc
    limit 1
) as oldest`;

/**
 * The largest tables. Sizes are true; which tables they are read of is by the planner's figures.
 * bloat: what the heap has beyond the rows' mean width, as far as the role may see statistics.
 */
const TABLES = `with /* pgpulse */ held as materialized (
    select relation from pg_locks where mode = 'AccessExclusiveLock' and granted
), likely as materialized (
    select
        c.oid, c.relname, c.relnamespace, c.reltuples, c.reloptions,
        pg_stat_get_live_tuples(c.oid) as live
    from pg_class c
    left join pg_class t on t.oid = c.reltoastrelid
    where c.relkind in ('r', 'm')
        and c.relpersistence <> 't'
        and (c.relnamespace not in ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)
            or c.relpages > 10000)
        -- whose size cannot be had now
        and not exists (select from held h where h.relation in (c.oid, c.reltoastrelid))
        and not exists (
            select from held h join pg_index i on i.indexrelid = h.relation where i.indrelid = c.oid
        )
    order by
        greatest(c.relpages + coalesce(t.relpages, 0), pg_stat_get_live_tuples(c.oid) / 100) desc
    limit 40
), largest as materialized (
    select *, pg_total_relation_size(oid) as bytes, pg_relation_size(oid) as heap
    from likely
    order by bytes desc
    limit 20
)
select jsonb_build_object(
    'database_bytes', pg_database_size(current_database()),
    'tables', (
        select jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
            'name', l.oid::regclass,
            'bytes', l.bytes,
            'heap', l.heap,
            'indexes', pg_indexes_size(l.oid),
            'rows', l.live,
            'dead', pg_stat_get_dead_tuples(l.oid),
            'bloat', greatest(0, l.heap - 8192 * ceil(
                greatest(l.live, l.reltuples)
                    / nullif(floor(
                        8168 * coalesce(f.factor, 100) / 100 / (28 + 8 * ceil(w.width / 8.0))
                    ), 0)
            )),
            'vacuumed', extract(epoch from greatest(
                pg_stat_get_last_vacuum_time(l.oid), pg_stat_get_last_autovacuum_time(l.oid)
            ))::bigint,
            'counters', array[
                pg_stat_get_tuples_inserted(l.oid), pg_stat_get_tuples_updated(l.oid),
                pg_stat_get_tuples_deleted(l.oid), pg_stat_get_numscans(l.oid)
            ]
        )) order by l.bytes desc)
        from largest l
        join pg_namespace n on n.oid = l.relnamespace
        left join lateral (
            select split_part(o, '=', 2)::int as factor
            from unnest(l.reloptions) as o
            where o like 'fillfactor=%'
        ) as f on true
        left join lateral (
            select sum((1 - s.null_frac) * s.avg_width) as width
            from pg_stats s
            where s.schemaname = n.nspname and s.tablename = l.relname and not s.inherited
            having max(s.avg_width) < 4000 and l.reltuples >= 0
        ) as w on true
    )
) as found`;

const TABLE_COUNTERS = ["inserted", "updated", "deleted", "sequential_scans"] as const;

/**
 * What of a statement is to go, and quoted names, so that a quote in one begins nothing. Quotes may be
 * open at the end: the server gives the beginning of long statements only.
 */
const TOKEN = new RegExp(
  [
    String.raw`(?<name>"(?:[^"]|"")*"?)`,
    String.raw`(?<comment>--[^\n]*|/\*[^]*?(?:\*/|$))`,
    String.raw`\$(?<tag>[A-Za-z_\x80-\uffff][\w\x80-\uffff]*)?\$[^]*?(?:\$\k<tag>\$|$)`,
    String.raw`(?:\b[eE])'(?:[^'\\]|\\[^]|'')*(?:'|\\?$)`,
    String.raw`(?:\b(?:[bBxXnN]|[uU]&))?'(?:[^']|'')*(?:'|$)`,
    String.raw`(?<![\w$\x80-\uffff])\.?\d[\w.]*(?:(?<=[eE])[+-]\d+)?`,
  ].join("|"),
  "g",
);

/** A statement without its literals and comments, in one line of at most `most` characters. */
export function masked(text: string, most = 300): string {
  const plain = text.replace(TOKEN, (...found) => {
    const { name, comment } = found.at(-1);
    return name ?? (comment ? " " : "?");
  }).replace(/\s+/g, " ").replace(/\?(?: ?, ?\?)+/g, "?, ...").trim();
  return plain.length > most ? plain.slice(0, most - 1) + "…" : plain;
}

/** How much of its statistics each statement has, by its id. */
interface Statement {
  id: string;
  calls: number;
  seconds: number;
  rows: number;
  hit: number;
  read: number;
}

/** What was used since `before`, by the ten statements that took the longest. */
export function topStatements(
  now: Statement[],
  before: Map<string, Statement>,
  seconds: number,
): (Omit<Statement, "hit" | "read"> & { mean_seconds: number; cache_hit?: number })[] {
  const none = { calls: 0, seconds: 0, rows: 0, hit: 0, read: 0 };
  return now.map((one) => {
    const was = before.get(one.id) ?? none;
    const blocks = one.hit - was.hit + one.read - was.read;
    const calls = one.calls - was.calls;
    const spent = one.seconds - was.seconds;
    return {
      id: one.id,
      calls: round(calls / seconds),
      seconds: Math.round(spent / seconds * 1e6) / 1e6,
      mean_seconds: Math.round(spent / calls * 1e6) / 1e6,
      rows: round((one.rows - was.rows) / seconds),
      ...blocks > 0 ? { cache_hit: round((one.hit - was.hit) / blocks) } : {},
      sane: calls > 0 && spent >= 0 && one.rows >= was.rows,
    };
  }).filter(({ sane }) => sane).sort((a, b) => b.seconds - a.seconds).slice(0, 10)
    .map(({ sane: _, ...one }) => one);
}

/** Counters of one kind, and since when they count: from another time on they are others. */
type Counters = { since?: string; [name: string]: unknown };
/** What a server has: its version, and the schema of pg_stat_statements. */
type About = { major: number; statements: string | null };
// deno-lint-ignore no-explicit-any -- JSON that the queries above make
type Json = any;

/** Reads the statistics of a PostgreSQL server; `address` is the variable that holds its URL. */
export function postgresqlSampler(address: string, troubles = new Troubles()): {
  sample(): Promise<{ instance: string; metrics: Metrics } | undefined>;
  close(): Promise<void>;
} {
  const open = () => {
    try {
      return connect({
        max: 1,
        prepare: false,
        fetch_types: false,
        connect_timeout: 5,
        connection: { application_name: "pgpulse collect" },
      }, address);
    } catch (error) {
      throw new Error(reason(error).replace(address, "the URL of --postgres"));
    }
  };
  let sql = open();
  const { host: [host], port: [port], database } = sql.options;
  // Many machines have a database of their own at "localhost".
  const local = /^(localhost|127\.[\d.]+|::1|\/.*)$/.test(host);
  const instance = `${database}@${local ? Deno.hostname() : host}:${port}`;

  let about: About | undefined;
  let before: { at: number; counters: Record<string, Counters> } | undefined;
  let details: { at: number; times: number; bytes?: number } = { at: -Infinity, times: 0 };
  let tables: { at: number; counters: Map<string, number[]> } | undefined;
  let statements: { at: number; since?: string; known: Map<string, Statement> } | undefined;
  const texts = new Map<string, string>();
  let failures = 0;
  let again = 0;

  const ask = async (query: string, settings = QUIETLY): Promise<Json[]> => {
    const answer = await within(
      2 * STATEMENT_MS + 6_000,
      `"${instance}"`,
      sql.unsafe(`${settings};\n${query}`).simple(),
    );
    return (answer as Json).at(-1);
  };
  /** Something that may fail without harm to the rest. */
  const attempt = async <T>(what: string, read: () => Promise<T>): Promise<T | undefined> => {
    try {
      const found = await read();
      troubles.over(`${what} of ${instance}`, `Reads ${what} of "${instance}" again`);
      return found;
    } catch (error) {
      const { severity } = error as { severity?: string };
      if (severity !== "ERROR") throw error;
      troubles.say(
        `${what} of ${instance}`,
        `Cannot read ${what} of "${instance}": ${reason(error)}; goes on without`,
      );
    }
  };

  const readTables = async () => {
    const [{ found }] = await ask(TABLES);
    const at = performance.now();
    const counters = new Map<string, number[]>();
    for (const table of found.tables ?? []) {
      counters.set(table.name, table.counters);
      Object.assign(
        table,
        rates(
          TABLE_COUNTERS,
          table.counters,
          tables?.counters.get(table.name),
          (at - (tables?.at ?? 0)) / 1e3,
        ),
      );
      delete table.counters;
    }
    tables = { at, counters };
    return found as { database_bytes: number; tables?: Json[] };
  };

  const readStatements = async (schema: string, since?: string) => {
    const of = `dbid = (select oid from pg_database where datname = current_database())`;
    // Texts lie in a file; those of ten are read, once.
    const now: Statement[] = await ask(
      `select /* pgpulse */ queryid::text as id, sum(calls)::float8 as calls,
          sum(total_exec_time) / 1000 as seconds, sum(rows)::float8 as rows,
          sum(shared_blks_hit)::float8 as hit, sum(shared_blks_read)::float8 as read
      from ${schema}.pg_stat_statements(false)
      where ${of} and queryid is not null
      group by 1`,
    );
    const at = performance.now();
    const known = new Map(now.map((one) => [one.id, one]));
    const last = statements;
    statements = { at, since, known };
    if (!last || last.since !== since) return;
    const top = topStatements(now, last.known, (at - last.at) / 1e3);
    const unknown = top.map(({ id }) => id).filter((id) => !texts.has(id));
    if (texts.size > 1_000) texts.clear();
    if (unknown.length) {
      const found: { id: string; query: string }[] = await ask(
        `select /* pgpulse */ distinct on (queryid) queryid::text as id, left(query, 2000) as query
        from ${schema}.pg_stat_statements(true)
        where ${of} and queryid in (${unknown.join()}) and query is not null`,
      );
      for (const { id, query } of found) {
        texts.set(id, query.includes("/* pgpulse */") ? "(collect.ts, this one)" : masked(query));
      }
    }
    return top.map((one) => ({ ...one, statement: texts.get(one.id) }));
  };

  const read = async (): Promise<Metrics> => {
    const began = performance.now();
    about ??= (await ask(ABOUT))[0] as About;
    const { major, statements: schema } = about;
    if (major < 14) {
      throw new Error(`it is PostgreSQL ${major}, and 14 is the oldest that can be watched`);
    }
    const [{ found }] = await ask(samplePostgresql(major), QUIETLY + AS_WRITTEN);
    const at = performance.now();
    const metrics: Json = found;
    const counters: Record<string, Counters> = metrics.counters;
    delete metrics.counters;
    if (before) {
      for (const [group, { since, ...now }] of Object.entries(counters)) {
        const was = before.counters[group];
        if (was?.since !== since) continue;
        const names = Object.keys(now);
        const values = (of: Counters) => names.map((name) => Number(of[name]));
        Object.assign(metrics, rates(names, values(now), values(was), (at - before.at) / 1e3));
      }
      const { blocks_hit, blocks_read } = metrics;
      if (blocks_hit + blocks_read > 0) {
        metrics.cache_hit = round(blocks_hit / (blocks_hit + blocks_read));
      }
    }
    before = { at, counters };
    const role = sql.options.user;
    if (metrics.sees_all) {
      troubles.over(`rights ${instance}`, `Role "${role}" sees all of "${instance}" now`);
    } else {
      troubles.say(
        `rights ${instance}`,
        `Role "${role}" does not see what others do in "${instance}", and leaves it out; ` +
          `as an administrator: grant pg_monitor to "${role}"`,
      );
    }
    for (const session of [...metrics.blocked_sessions ?? [], ...metrics.transactions ?? []]) {
      for (const one of [session, ...session.by ?? []]) {
        if (one.statement) one.statement = masked(one.statement);
      }
    }
    // Soon after the start for the second time, or what changes would be seen after a minute only.
    if (at - details.at > DETAILS_MS - 500 || details.times === 1) {
      details = { ...details, at, times: details.times + 1 };
      const found = await attempt("sizes of tables", readTables);
      if (found?.tables) metrics.tables = found.tables;
      if (found) details.bytes = found.database_bytes;
      const top = schema &&
        await attempt("statements", () => readStatements(schema, counters.database?.since));
      if (top) metrics.statements = top;
      // Extensions and rights may come.
      about = undefined;
    }
    if (details.bytes) metrics.database_bytes = details.bytes;
    metrics.seconds = round((performance.now() - began) / 1e3);
    return metrics;
  };

  const end = async () => {
    const old = sql;
    about = undefined;
    await old.end({ timeout: 0 }).catch(() => {});
  };
  return {
    async sample() {
      if (performance.now() < again) return;
      try {
        const metrics = await read();
        failures = again = 0;
        troubles.over(`postgres ${instance}`, `Watches "${instance}" again`);
        return { instance, metrics };
      } catch (error) {
        const cause = told(error, sql, "the URL of --postgres").replace(/^Cannot use .*?: /, "");
        troubles.say(`postgres ${instance}`, `Cannot watch "${instance}": ${cause}`);
        // A server that is away is not asked every second, and not by all at once when it is back.
        again = performance.now() +
          Math.min(60e3, 1e3 * 2 ** failures++) * (0.5 + Math.random() / 2);
        await end();
        // The address may hold another password by now.
        sql = open();
      }
    },
    close: end,
  };
}
// --- end of PostgreSQL ---

// --- spool -------------------------------------------------------------------------------------

/** Version of the spool's form; files of this one and of those before are read. */
const FORMAT = 1;
const HEADER = `{"pgpulse":"spool","version":${FORMAT}}\n`;
const encoder = new TextEncoder();
const count = (lines: string) => lines ? lines.split("\n").length : 0;

/** A file of the spool that is written to no more; the number of records stands in its name. */
interface Segment {
  name: string;
  bytes: number;
  records: number;
  /** When it was written to last, ms. */
  at: number;
  sending?: boolean;
  /** Not to be sent before, by performance.now(). */
  held?: number;
}

/** The file that is being written to. */
interface Open {
  file: Deno.FsFile;
  name: string;
  bytes: number;
  records: number;
  taken: number;
}

/** A record: in the file that is open, or, where the disk did not take it, in memory. */
export interface Entry {
  line: string;
  home?: Open;
  /** Of one in memory: not to be sent before, by performance.now(). */
  held?: number;
}

/** Records that go to the database together: a segment, or what is in memory. */
export interface Batch {
  lines: string;
  records: number;
  segment?: Segment;
  entries?: Entry[];
}

/**
 * Records that the database has not taken: a folder with files of one record a line.
 *
 *     12.spool       is being written to; emptied whenever all of it has been taken
 *     11-734.spool   is closed, has 734 records; removed when they have been taken
 *     lost           number of records that had to be dropped
 *     refused.ndjson records that the database does not take
 *     lock           held while a collector is at work here
 */
export class Spool {
  /** Newest records that have not been offered to the database. */
  fresh: Entry[] = [];
  /** Records that had to be dropped. */
  lost = 0;
  /** Closed files, oldest first. */
  #segments: Segment[] = [];
  #open?: Open;
  #number = 0;
  #memory: Entry[] = [];
  #memoryBytes = 0;
  #lock?: Deno.FsFile;
  #ready = false;
  /** When the newest file found here was written to; from then on a clock that nobody sets. */
  #newest = Date.now();
  #began = performance.now();

  constructor(
    readonly dir: string,
    readonly troubles: Troubles,
    readonly limits = { bytes: 1e9, age: 90 * 86_400e3 },
  ) {}

  get bytes(): number {
    return this.#segments.reduce((sum, { bytes }) => sum + bytes, 0) + (this.#open?.bytes ?? 0);
  }

  get records(): number {
    const open = this.#open ? this.#open.records - this.#open.taken : 0;
    return this.#segments.reduce((sum, { records }) => sum + records, 0) + open +
      this.#memory.length;
  }

  /**
   * Takes the folder and what is in it. Throws where another collector has it; where the disk does
   * not let it, records are kept in memory, and calling it again tries again.
   */
  open(): void {
    if (this.#ready && !this.#gone()) return;
    try {
      Deno.mkdirSync(this.dir, { recursive: true, mode: 0o700 });
      this.#lock ??= this.#openLock();
      if (!this.#lock.tryLockSync(true)) {
        let pid = "unknown";
        try {
          [pid] = /^\d+/.exec(Deno.readTextFileSync(join(this.dir, "lock")))!;
        } catch { /* Windows lets nobody read a locked file */ }
        throw new SpoolTaken(
          `Cannot use the spool "${this.dir}": another collector has it (process ${pid}); stop ` +
            `that one, or give this one a folder of its own with --spool`,
        );
      }
      try {
        this.#lock.truncateSync();
        this.#lock.seekSync(0, Deno.SeekMode.Start);
        this.#lock.writeSync(encoder.encode(`${Deno.pid}\n`));
      } catch { /* a full disk: what is in the spool can be sent, and makes room */ }
      const { lost } = this;
      this.#scan();
      this.#ready = true;
      if (lost) this.#lose(0);
      this.#keepMemory();
    } catch (error) {
      if (error instanceof SpoolTaken) throw error;
      this.#full(error);
    }
  }

  #openLock(): Deno.FsFile {
    const path = join(this.dir, "lock");
    try {
      return Deno.openSync(path, { read: true, write: true, create: true });
    } catch (error) {
      try {
        // A read-only disk: what is in the spool can be sent.
        return Deno.openSync(path);
      } catch {
        throw error;
      }
    }
  }

  /** Whether somebody removed the folder; then what is not in memory has gone with it. */
  #gone(): boolean {
    try {
      return !Deno.statSync(this.dir);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) return false;
    }
    const kept = this.fresh.filter(({ home }) => home);
    const lost = Math.max(0, this.records - this.#memory.length - kept.length);
    for (const entry of kept) {
      entry.home = undefined;
      this.#memory.push(entry);
      this.#memoryBytes += entry.line.length;
    }
    this.#leave();
    this.#lose(lost);
    this.troubles.say("gone", `Somebody removed the spool "${this.dir}"; samples lost: ${lost}`);
    this.troubles.over("gone");
    return true;
  }

  /** Finds what an earlier run left. */
  #scan(): void {
    this.#segments = [];
    const names = [...Deno.readDirSync(this.dir)].map(({ name }) => name);
    for (const name of names) {
      const [, number, records] = /^(\d+)(?:-(\d+))?\.spool$/.exec(name) ?? [];
      if (!number) continue;
      this.#number = Math.max(this.#number, Number(number));
      try {
        const path = join(this.dir, name);
        const { size, mtime } = Deno.statSync(path);
        const segment = {
          name,
          bytes: size,
          records: Number(records),
          at: mtime?.getTime() ?? Date.now(),
        };
        if (records === undefined) {
          const lines = this.#read(name);
          if (lines === undefined) continue;
          segment.records = count(lines);
          if (!segment.records) {
            Deno.removeSync(path);
            continue;
          }
          const named = `${number}-${segment.records}.spool`;
          try {
            Deno.renameSync(path, join(this.dir, named));
            segment.name = named;
          } catch { /* a read-only disk: it goes by its old name */ }
        }
        this.#segments.push(segment);
      } catch (error) {
        this.#leaveOut(name, error);
      }
    }
    this.#segments.sort((a, b) => parseInt(a.name) - parseInt(b.name));
    if (this.#segments.length) this.#newest = Math.max(...this.#segments.map(({ at }) => at));
    try {
      this.lost += Number(Deno.readTextFileSync(join(this.dir, "lost"))) || 0;
    } catch { /* nothing was lost */ }
  }

  /** One file that cannot be read holds up no other. */
  #leaveOut(name: string, error: unknown): void {
    this.troubles.say(
      `read ${name}`,
      `Cannot read "${join(this.dir, name)}": ${reason(error)}; it is left out`,
    );
  }

  /** Whole records of a file, without its header; undefined where it must be left alone. */
  #read(name: string): string | undefined {
    const path = join(this.dir, name);
    if (Deno.statSync(path).size > MOST_BYTES) throw new Error("no file of a spool is so large");
    let text = new TextDecoder().decode(Deno.readFileSync(path));
    const [, version] = /^\{"pgpulse":"spool","version":(\d+)\}\n/.exec(text) ?? [];
    if (Number(version) > FORMAT) {
      this.troubles.say(
        `version ${name}`,
        `Leaves "${path}" alone: a newer collect.ts wrote it (version ${version}); ` +
          `run that one to send it`,
      );
      return;
    }
    if (version) text = text.slice(text.indexOf("\n") + 1);
    // What stands behind the last newline was being written when the process ended.
    return text.slice(0, Math.max(0, text.lastIndexOf("\n")));
  }

  /** Keeps a record, on disk where that can be done. */
  add(line: string): void {
    const entry: Entry = { line };
    this.#memory.push(entry);
    this.#memoryBytes += line.length;
    try {
      // Where the folder could not be had, that was said.
      if (!this.#ready) throw undefined;
      this.#keepMemory();
    } catch (error) {
      if (error) this.#full(error);
      while (this.#memoryBytes > MEMORY_BYTES) {
        this.#memoryBytes -= this.#memory.shift()!.line.length;
        this.#lose(1);
      }
    }
    this.fresh.push(entry);
    if (this.fresh.length > FRESH) this.fresh.shift();
    this.#enforce();
  }

  #write(entry: Entry): void {
    const open = this.#open ??= this.#create();
    const data = encoder.encode(`${open.bytes ? "" : HEADER}${entry.line}\n`);
    try {
      for (let n = 0; n < data.length;) {
        const wrote = open.file.writeSync(data.subarray(n));
        if (!wrote) throw new Error("the disk takes nothing");
        n += wrote;
      }
    } catch (error) {
      try {
        // Half a record must not stand in front of the next.
        open.file.truncateSync(open.bytes);
      } catch {
        this.#close();
      }
      throw error;
    }
    open.bytes += data.length;
    open.records++;
    entry.home = open;
    const most = Math.min(SEGMENT_BYTES, this.limits.bytes / 10);
    if (open.bytes >= most || open.records >= SEGMENT_RECORDS) this.#close();
  }

  #create(): Open {
    const name = `${++this.#number}.spool`;
    const file = Deno.openSync(join(this.dir, name), {
      append: true,
      createNew: true,
      mode: 0o600,
    });
    return { file, name, bytes: 0, records: 0, taken: 0 };
  }

  /** Ends the file that is open; what it holds goes to the database like older ones. */
  #close(): void {
    const open = this.#open;
    if (!open) return;
    this.#open = undefined;
    open.file.close();
    const { bytes, records } = open;
    const name = `${parseInt(open.name)}-${records}.spool`;
    const segment = { name: open.name, bytes, records, at: Date.now() };
    try {
      if (!records) return Deno.removeSync(join(this.dir, open.name));
      Deno.renameSync(join(this.dir, open.name), join(this.dir, name));
      segment.name = name;
    } catch { /* it is found by its old name, or it has been taken away */ }
    if (records) this.#segments.push(segment);
  }

  /** Brings what is in memory to the disk, as far as that takes it. */
  #keepMemory(): void {
    while (this.#memory.length) {
      this.#write(this.#memory[0]);
      this.#memoryBytes -= this.#memory.shift()!.line.length;
    }
    this.troubles.over("spool", `The spool "${this.dir}" works again; samples in memory are in it`);
  }

  #full(error: unknown): void {
    this.troubles.say(
      "spool",
      `Cannot write to the spool "${this.dir}": ${
        reason(error)
      }; samples are kept in memory, up to ` +
        `${MEMORY_BYTES / 1e6} MB, until it can`,
    );
  }

  /** Counts records that are dropped; the number goes with each sample, and outlives the process. */
  #lose(count: number): void {
    this.lost += count;
    if (!this.#ready) return;
    try {
      // Written over, not emptied before: a full disk would not take it back.
      using file = Deno.openSync(join(this.dir, "lost"), { write: true, create: true });
      file.writeSync(encoder.encode(`${this.lost}\n`));
    } catch { /* it is counted in memory */ }
  }

  /** Drops the oldest records beyond the limits. */
  #enforce(): void {
    const drop = (why: string) => {
      const oldest = this.#segments.find(({ sending }) => !sending);
      if (!oldest) return false;
      const { name, records } = oldest;
      this.#segments = this.#segments.filter((one) => one !== oldest);
      try {
        Deno.removeSync(join(this.dir, name));
      } catch { /* the limit is for the disk; what cannot be removed is found at the next start */ }
      this.#lose(records);
      this.troubles.say("limit", `The spool is ${why}: the oldest samples are dropped`);
      return true;
    };
    while (this.bytes > this.limits.bytes && drop("larger than --spool-max-size"));
    // Where the clock was set forward, or is wrong from the start, ages are not what they seem.
    const now = Math.min(Date.now(), this.#newest + performance.now() - this.#began);
    const old = () =>
      this.#segments.some(({ sending, at }) => !sending && at < now - this.limits.age);
    while (old() && drop("older than --spool-max-age"));
  }

  /** Newest records that have not been offered yet, to be acknowledged or put back. */
  takeFresh(): Entry[] {
    return this.fresh.splice(0);
  }

  putBack(entries: Entry[]): void {
    this.fresh = [...entries, ...this.fresh].slice(-FRESH);
  }

  /** The database has taken these. */
  acknowledge(entries: Entry[]): void {
    for (const entry of entries) {
      if (entry.home) entry.home.taken++;
      else this.#forget(entry);
    }
    const open = this.#open;
    if (!open?.records || open.taken < open.records) return;
    try {
      open.file.truncateSync(0);
      [open.bytes, open.records, open.taken] = [0, 0, 0];
    } catch { /* what is sent again does no harm */ }
  }

  #forget(entry: Entry): void {
    const at = this.#memory.indexOf(entry);
    if (at < 0) return;
    this.#memory.splice(at, 1);
    this.#memoryBytes -= entry.line.length;
  }

  /** The oldest records that are not being sent, as many as make a batch. */
  take(): Batch | undefined {
    if (this.#open && this.#open.records > this.#open.taken && !this.fresh.length) this.#close();
    for (const segment of [...this.#segments]) {
      if (segment.sending || segment.held! > performance.now()) continue;
      let lines: string | undefined;
      try {
        lines = this.#read(segment.name);
      } catch (error) {
        this.#leaveOut(segment.name, error);
      }
      if (lines === undefined) {
        this.#segments = this.#segments.filter((one) => one !== segment);
        continue;
      }
      segment.sending = true;
      return { lines, records: count(lines), segment };
    }
    const now = performance.now();
    const entries = this.#memory.filter(({ held = 0 }) => held <= now).slice(0, SEGMENT_RECORDS);
    if (!entries.length) return;
    for (const entry of entries) entry.held = Infinity;
    return { lines: entries.map(({ line }) => line).join("\n"), records: entries.length, entries };
  }

  /** The database has not; it is to be sent again, not before `ms` have passed. */
  giveBack({ segment, entries = [] }: Batch, ms = 0): void {
    const held = performance.now() + ms;
    for (const entry of entries) entry.held = held;
    if (segment) Object.assign(segment, { held, sending: false });
  }

  /** The database has taken the batch. */
  done(batch: Batch): void {
    for (const entry of batch.entries ?? []) this.#forget(entry);
    const { segment } = batch;
    if (!segment) return;
    this.#segments = this.#segments.filter((one) => one !== segment);
    const short = segment.records - batch.records;
    if (short > 0) {
      this.#lose(short);
      this.troubles.say(
        "short",
        `Samples are missing in the spool "${this.dir}"; was the power cut? They count as lost`,
      );
    }
    if (!this.#segments.length) this.troubles.over("limit");
    try {
      Deno.removeSync(join(this.dir, segment.name));
    } catch { /* then it is sent again after the next start, which does no harm */ }
  }

  /** Puts a record aside that the database does not take, or that is none. */
  refuse(line: string, why: string): void {
    const path = join(this.dir, "refused.ndjson");
    try {
      const room = (() => {
        try {
          return REFUSED_BYTES - Deno.statSync(path).size;
        } catch {
          return REFUSED_BYTES;
        }
      })();
      if (line.length > room) throw new Error("it is full");
      Deno.writeTextFileSync(path, line + "\n", { append: true, mode: 0o600 });
    } catch {
      this.#lose(1);
    }
    this.troubles.say("refused", `Set aside a record, ${why}: see "${path}"`);
  }

  /** Leaves the folder, with what is in memory where it takes it by now. */
  close(): void {
    try {
      if (this.#memory.length) this.open();
      if (this.#memory.length && this.#ready) this.#keepMemory();
    } catch { /* that was said */ }
    if (this.#memory.length) {
      this.#lose(this.#memory.length);
      this.troubles.say("end", `Samples in memory that are lost: ${this.#memory.length}`);
    }
    this.#leave();
  }

  #leave(): void {
    if (this.#open && !this.#open.records) this.#close();
    this.#open?.file.close();
    this.#open = undefined;
    this.#lock?.close();
    this.#lock = undefined;
    this.#ready = false;
  }
}

/** Another collector has the spool. */
export class SpoolTaken extends Error {}

// --- delivery ----------------------------------------------------------------------------------

const faulty = (error: unknown) => /^(22|23|54)/.test((error as { code?: string }).code ?? "");

/** Brings records to the database: the newest first, then the oldest; tries until it works. */
export class Delivery {
  /** When the database last took something, ms. */
  at = 0;
  sent = 0;
  #sql?: postgres.Sql;
  #most = SEGMENT_RECORDS;
  #tries = 0;
  #wake = () => {};

  constructor(
    readonly spool: Spool,
    readonly troubles: Troubles,
    readonly open: () => postgres.Sql,
    readonly pauses = { first: 500, away: 5_000, refused: 30_000 },
    /** Where the address stands, unless that is the environment. */
    readonly source?: string,
  ) {}

  /** There is something new. */
  poke(): void {
    this.#wake();
  }

  /** Sends until the signal. */
  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        if (await this.round(signal)) continue;
        await this.#poked(signal);
      } catch (error) {
        if (signal.aborted) break;
        this.#trouble(error);
        // Not all at once: a thousand collectors have lost the same database. Where it is starting
        // (57), has no connection free (53) or a pooler answers for it (08) it may soon be back.
        const refused = /^(?!57|53|08)(?=.*\d)[0-9A-Z]{5}$/
          .test((error as { code?: string }).code ?? "");
        const most = refused ? this.pauses.refused : this.pauses.away;
        const pause = Math.min(most, this.pauses.first * 2 ** this.#tries++);
        await sleep(pause * (0.5 + Math.random() / 2), signal);
      }
    }
    await this.close();
  }

  #poked(signal: AbortSignal): Promise<void> {
    return new Promise((done) => {
      const end = () => {
        signal.removeEventListener("abort", end);
        done();
      };
      this.#wake = end;
      signal.addEventListener("abort", end);
      // The abort may be past: its event comes once.
      if (this.spool.fresh.length || signal.aborted) end();
    });
  }

  #trouble(error: unknown): void {
    const sql = this.#sql;
    const code = (error as { code?: string }).code;
    this.troubles.say(
      "database",
      `${
        code ? told(error, sql, this.source) : reason(error)
      }; samples wait in the spool, and it is tried again`,
    );
    // A new connection next time: the password, the address or the server may be another.
    this.#sql = undefined;
    void sql?.end({ timeout: 0 }).catch(() => {});
  }

  /** Offers all there is; returns whether there was anything. Throws where the database is away. */
  async round(signal?: AbortSignal): Promise<boolean> {
    let any = await this.#fresh();
    let failed = false;
    const drain = async (helper?: postgres.Sql) => {
      for (let batch; !failed && !signal?.aborted && (batch = this.spool.take()); any = true) {
        try {
          await this.#send(batch, helper);
          this.spool.done(batch);
          if (!failed) this.#works();
        } catch (error) {
          const held = this.at > 0 && (error as { code?: string })?.code === "42501";
          this.spool.giveBack(batch, held ? HELD_MS : 0);
          if (!held) throw error;
          // It takes others: these may be of a host that is bound to another role by now.
          this.troubles.say(
            "held",
            `${told(error, this.#sql, this.source)}; older samples are kept`,
          );
        }
        if (!helper) await this.#fresh();
      }
    };
    // A long backlog goes over two connections, where a second one can be had. It takes a batch once
    // it is there: while it connects, younger ones would overtake that one.
    const helper = this.spool.records > BACKLOG ? this.open() : undefined;
    await Promise.all([
      drain().finally(() => failed = true),
      helper &&
      within(PATIENCE_MS, "The database", helper`select 1`).then(() => drain(helper))
        .catch(() => {}).then(() => helper.end({ timeout: 1 })),
    ]);
    if (any) this.#works();
    return any;
  }

  #works(): void {
    this.troubles.over("database", "The database takes samples again");
  }

  async #fresh(): Promise<boolean> {
    const entries = this.spool.takeFresh();
    if (!entries.length) return false;
    try {
      // The time of sending tells the database how wrong the clock is.
      const about = `"about":{"now":"${new Date().toISOString()}",`;
      await this.#offer(entries.map(({ line }) => line.replace(/"about":\{(?!\})/, about)).join());
      this.spool.acknowledge(entries);
    } catch (error) {
      // A faulty one among them is found when they are sent with the older ones.
      if (!faulty(error)) {
        this.spool.putBack(entries);
        throw error;
      }
    }
    return true;
  }

  /** Sends a batch as it is; only where that fails it is looked at. */
  async #send(batch: Batch, sql?: postgres.Sql): Promise<void> {
    if (batch.records <= this.#most) {
      try {
        if (batch.lines) await this.#offer(batch.lines.replaceAll("\n", ","), sql);
        this.#most = Math.min(SEGMENT_RECORDS, this.#most * 2);
        return;
      } catch (error) {
        if (!faulty(error)) throw error;
      }
    }
    const good = batch.lines.split("\n").filter((line) => {
      try {
        if (typeof JSON.parse(line)?.time === "string") return true;
      } catch { /* it is none */ }
      if (line.trim()) this.spool.refuse(line, "which is none");
      return false;
    });
    for (let from = 0; from < good.length; from += this.#most) {
      await this.#halve(good.slice(from, from + this.#most), sql);
    }
  }

  /** Sends records, and sets those aside that the database refuses. */
  async #halve(lines: string[], sql?: postgres.Sql): Promise<void> {
    try {
      await this.#offer(lines.join(), sql);
    } catch (error) {
      if (!faulty(error)) throw error;
      if (lines.length === 1) {
        return this.spool.refuse(lines[0], `which the database refuses (${reason(error)})`);
      }
      await this.#halve(lines.slice(0, lines.length / 2), sql);
      await this.#halve(lines.slice(lines.length / 2), sql);
    }
  }

  async #offer(records: string, sql = this.#sql ??= this.open()): Promise<void> {
    // The simple protocol takes one way there and back. No text can end this quotation: in JSON a
    // dollar stands in strings only, where it may be written so.
    const text = records.replaceAll("$", "\\u0024").replaceAll("\0", " ");
    const query = sql.unsafe(`select pgpulse.collect($json$[${text}]$json$)`);
    try {
      await within(PATIENCE_MS, "The database", query);
    } catch (error) {
      if ("late" in (error as object)) this.#most = Math.max(10, Math.floor(this.#most / 4));
      throw error;
    }
    this.at = Date.now();
    this.sent++;
    this.#tries = 0;
  }

  async close(): Promise<void> {
    await this.#sql?.end({ timeout: 1 }).catch(() => {});
    this.#sql = undefined;
  }
}

// --- clock -------------------------------------------------------------------------------------

/** The clock on the wall; tests bring another. */
export interface Clock {
  now(): number;
  sleep(ms: number): Promise<void>;
}

/**
 * Whole intervals of the clock as they come, in ms. One that was missed, as the machine slept or its
 * clock was set, is left out: a sample is never late, and no time comes twice in a row.
 */
export async function* ticks(
  interval: number,
  clock: Clock,
  jumped: (ms: number) => void = () => {},
  signal?: AbortSignal,
): AsyncGenerator<number> {
  const next = () => (Math.floor(clock.now() / interval) + 1) * interval;
  let last = NaN;
  for (let due = next(); !signal?.aborted;) {
    const wait = due - clock.now();
    if (wait > interval) {
      jumped(-wait);
      due = next();
    } else if (wait > 0) {
      await clock.sleep(Math.min(wait, 30_000));
    } else {
      if (wait < -interval / 2) jumped(-wait);
      else if (due !== last) yield last = due;
      due = next();
    }
  }
}

// --- service -----------------------------------------------------------------------------------

const UNIT = "/etc/systemd/system/pgpulse-collect.service";
const PLIST = "/Library/LaunchDaemons/org.pgpulse.collect.plist";
const HOME = "/usr/local/lib/pgpulse-collect";
const STATE = "/var/lib/pgpulse-collect";
const SECRETS = "/etc/pgpulse-collect";

/** What a service needs: the file that starts it, and files only root may read. */
export interface Service {
  path: string;
  text: string;
  secrets: Record<string, string>;
  /** What is loaded beforehand, so that it needs no registry. */
  modules: string[];
}

/**
 * The service for these arguments. Addresses hold passwords, and anybody may read a unit and a
 * command line: they go into files of their own, by the name of their flag and a number.
 */
export function service(
  os: string,
  args: string[],
  secrets: Record<string, string>,
  deno = Deno.execPath(),
): Service {
  const place = os === "darwin" ? SECRETS : "${CREDENTIALS_DIRECTORY}";
  const file = (name: string) => `${place}/${name}`;
  const command = [deno, "run", "-A", "--no-prompt", `${HOME}/collect.ts`];
  const flags = ["--url-file", file("url"), ...secrets.ca ? ["--ca", file("ca")] : []];
  for (const name of Object.keys(secrets)) {
    const [, flag] = /^(\D+)\d+$/.exec(name) ?? [];
    if (flag) flags.push(`--${flag}=${file(name)}`);
  }
  if (os === "darwin") {
    const xml = (text: string) =>
      text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    const list = [...command, ...args, ...flags].map((word) => `    <string>${xml(word)}</string>`);
    const text = `<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key>
  <string>org.pgpulse.collect</string>
  <key>ProgramArguments</key>
  <array>
${list.join("\n")}
  </array>
  <key>EnvironmentVariables</key>
  <dict>
    <key>DENO_DIR</key>
    <string>${STATE}/deno</string>
    <key>DENO_NO_UPDATE_CHECK</key>
    <string>1</string>
  </dict>
  <key>RunAtLoad</key>
  <true/>
  <key>KeepAlive</key>
  <true/>
  <key>ThrottleInterval</key>
  <integer>10</integer>
  <key>Umask</key>
  <integer>63</integer>
  <key>StandardErrorPath</key>
  <string>/var/log/pgpulse-collect.log</string>
  <key>StandardOutPath</key>
  <string>/var/log/pgpulse-collect.log</string>
</dict>
</plist>
`;
    return { path: PLIST, text, secrets, modules: [`${HOME}/collect.ts`, SYSTEMINFORMATION] };
  }
  const quote = (word: string) => {
    const plain = word.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("%", "%%")
      .replaceAll("$", "$$$$");
    return /[\s"';\\]/.test(word) || !word ? `"${plain}"` : plain;
  };
  const line = [...[...command, ...args].map(quote), ...flags].join(" ");
  const credentials = Object.keys(secrets).map((name) =>
    `LoadCredential=${name}:${SECRETS}/${name}`
  );
  const text = `[Unit]
Description=pgpulse: samples of this machine for PostgreSQL
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=${line}
Restart=always
RestartSec=10
# A user of its own, made at the start; it reads the addresses from copies made at the start, so
# after a change of ${SECRETS}/url: systemctl restart pgpulse-collect
DynamicUser=yes
${credentials.join("\n")}
StateDirectory=pgpulse-collect
StateDirectoryMode=0700
Environment=DENO_DIR=${STATE}/deno DENO_NO_UPDATE_CHECK=1
UMask=0077
# It sees the whole machine and changes nothing of it. /proc and /home are left as they are: their
# numbers and file systems are what it is here for. V8 writes code: no MemoryDenyWriteExecute.
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
Nice=5
OOMScoreAdjust=500

[Install]
WantedBy=multi-user.target
`;
  return { path: UNIT, text, secrets, modules: [`${HOME}/collect.ts`] };
}

async function command(...words: string[]): Promise<void> {
  const [name, ...args] = words;
  let out;
  try {
    out = await new Deno.Command(name, { args }).output();
  } catch {
    throw new Error(`Cannot run "${words.join(" ")}": there is no ${name} here`);
  }
  if (!out.success) {
    const said = new TextDecoder().decode(out.stderr).trim().split("\n").at(-1);
    throw new Error(`Cannot run "${words.join(" ")}": ${said}`);
  }
}

function needRoot(what: string): void {
  if (Deno.build.os !== "linux" && Deno.build.os !== "darwin") {
    throw new Error(
      `Cannot ${what} a service on ${Deno.build.os}: have its task scheduler start this command ` +
        `with the machine`,
    );
  }
  if (Deno.uid() !== 0) {
    throw new Error(`Cannot ${what} the service: it takes root; type sudo in front of the command`);
  }
}

/** What keeps the service from running this deno: it sees no homes, and none of /tmp. */
function unreadable(): string | undefined {
  const deno = Deno.realPathSync(Deno.execPath());
  if (Deno.build.os === "linux" && /^\/(root|home|run|tmp)\//.test(deno)) {
    return `Cannot install the service: it may not read "${deno}"; type ` +
      `"sudo cp ${deno} /usr/local/bin/deno", and then /usr/local/bin/deno run -A ...`;
  }
}

async function install(wanted: Service): Promise<void> {
  needRoot("install");
  const deno = Deno.realPathSync(Deno.execPath());
  const hindrance = unreadable();
  if (hindrance) throw new Error(hindrance);
  const write = (path: string, text: string, mode: number) => {
    Deno.mkdirSync(dirname(path), { recursive: true });
    Deno.writeTextFileSync(path, text, { mode });
    Deno.chmodSync(path, mode);
    console.log(`Wrote ${path}`);
  };
  for (const [name, text] of Object.entries(wanted.secrets)) {
    write(`${SECRETS}/${name}`, text, 0o600);
  }
  write(`${HOME}/collect.ts`, Deno.readTextFileSync(import.meta.filename!), 0o644);
  write(wanted.path, wanted.text, 0o644);
  const cached = await new Deno.Command(deno, {
    args: ["cache", "-q", ...wanted.modules],
    env: { DENO_DIR: `${STATE}/deno` },
  }).output();
  if (!cached.success) {
    console.error("Packages could not be loaded now; the service tries it itself");
  }
  if (Deno.build.os === "darwin") {
    await command("launchctl", "bootout", "system", PLIST).catch(() => {});
    await command("launchctl", "bootstrap", "system", PLIST);
    return console.log("It runs; its log: /var/log/pgpulse-collect.log");
  }
  await command("systemctl", "daemon-reload");
  await command("systemctl", "enable", "pgpulse-collect");
  await command("systemctl", "restart", "pgpulse-collect");
  console.log("It runs; its log: journalctl -u pgpulse-collect");
}

async function uninstall(print: boolean): Promise<void> {
  const darwin = Deno.build.os === "darwin";
  const paths = [darwin ? PLIST : UNIT, HOME, SECRETS, `${STATE}/deno`];
  if (print) return console.log(paths.map((path) => `Would remove ${path}`).join("\n"));
  needRoot("uninstall");
  const quietly = (...words: string[]) => command(...words).catch(() => {});
  if (darwin) await quietly("launchctl", "bootout", "system", PLIST);
  else await quietly("systemctl", "disable", "--now", "pgpulse-collect");
  for (const path of paths) {
    try {
      Deno.removeSync(path, { recursive: true });
      console.log(`Removed ${path}`);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  }
  if (!darwin) await quietly("systemctl", "daemon-reload");
  console.log(`Left ${STATE}: samples that were not sent yet, if any`);
}

// --- at work -----------------------------------------------------------------------------------

/** Where samples wait unless --spool says otherwise. */
function spoolFolder(): string {
  const env = (name: string) => Deno.env.get(name);
  if (env("STATE_DIRECTORY")) return env("STATE_DIRECTORY")!;
  if (Deno.build.os === "windows") return join(env("LOCALAPPDATA") ?? ".", "pgpulse");
  if (Deno.uid() === 0) return STATE;
  const home = env("HOME") ?? ".";
  if (Deno.build.os === "darwin") return join(home, "Library/Application Support/pgpulse");
  return join(env("XDG_STATE_HOME") || join(home, ".local/state"), "pgpulse");
}

/** The address that a file holds. */
function addressIn(path: string): string {
  try {
    return Deno.readTextFileSync(path).trim();
  } catch (error) {
    throw new Error(`Cannot read the URL file "${path}": ${reason(error)}`);
  }
}

/** The address that a flag gives, itself or the file that holds it. */
const given = (value: string) => value.includes("://") ? value : addressIn(value);

/** The address with these parameters, as far as it has none of their names. */
export function withDefaults(address: string, parameters: Record<string, string | undefined>) {
  const url = URL.parse(address);
  for (const [name, value] of Object.entries(parameters)) {
    if (value && url && !url.searchParams.has(name)) url.searchParams.set(name, value);
  }
  return url?.href ?? address;
}

/** What /healthz and /metrics tell. */
interface State {
  interval: number;
  samples: number;
  /** When the newest sample was taken, ms; by the clock, and by one that nobody sets. */
  at: number;
  steady: number;
  spool: Spool;
  delivery: Delivery;
  troubles: Troubles;
}

/** Serves /healthz and /metrics. */
export function serve(port: number, state: State, signal: AbortSignal): Deno.HttpServer {
  const { spool, delivery, troubles } = state;
  const when = (ms: number) => ms ? new Date(ms).toISOString() : null;
  const answer = (request: Request) => {
    const { pathname } = new URL(request.url);
    if (pathname === "/healthz") {
      // A database that is away is no illness of the collector: that is what the spool is for.
      const healthy = performance.now() - state.steady < 3 * state.interval &&
        !troubles.has("spool");
      return Response.json({
        healthy,
        sampled: when(state.at),
        taken: when(delivery.at),
        waiting: spool.records,
        lost: spool.lost,
        troubles: troubles.list(),
      }, { status: healthy ? 200 : 503 });
    }
    if (pathname !== "/metrics") return new Response("/healthz\n/metrics\n", { status: 404 });
    const line = (name: string, type: string, help: string, value: number) =>
      `# HELP pgpulse_collect_${name} ${help}\n# TYPE pgpulse_collect_${name} ${type}\n` +
      `pgpulse_collect_${name} ${value}\n`;
    return new Response(
      line("samples_total", "counter", "Samples that were taken", state.samples) +
        line("batches_total", "counter", "Batches that the database took", delivery.sent) +
        line("lost_total", "counter", "Samples that the spool had to drop", spool.lost) +
        line("spool_bytes", "gauge", "Size of the spool", spool.bytes) +
        line("spool_samples", "gauge", "Samples that wait", spool.records) +
        line("last_taken_seconds", "gauge", "When the database last took some", delivery.at / 1e3),
      { headers: { "content-type": "text/plain; version=0.0.4" } },
    );
  };
  try {
    return Deno.serve({ port, hostname: "127.0.0.1", signal, onListen: () => {} }, answer);
  } catch (error) {
    const cause = error instanceof Deno.errors.AddrInUse ? "it is taken" : reason(error);
    throw new Error(`Cannot serve on port ${port}: ${cause}; choose another one with --port`);
  }
}

const OPTIONS = {
  "interval": { type: "string", default: "5s" },
  "host": { type: "string" },
  "tag": { type: "string", multiple: true, default: [] as string[] },
  "url-file": { type: "string" },
  "ca": { type: "string" },
  "per-core": { type: "boolean", default: false },
  "network-filesystems": { type: "boolean", default: false },
  "scrape": { type: "string", multiple: true, default: [] as string[] },
  "postgres": { type: "string", multiple: true, default: [] as string[] },
  "spool": { type: "string" },
  "spool-max-size": { type: "string", default: "1GB" },
  "spool-max-age": { type: "string", default: "90d" },
  "port": { type: "string" },
  "once": { type: "boolean", default: false },
  "dry-run": { type: "boolean", default: false },
  "install": { type: "boolean", default: false },
  "uninstall": { type: "boolean", default: false },
  "print": { type: "boolean", default: false },
  "help": { type: "boolean", short: "h" },
} as const;

/** The variable that holds the address of --url-file, or one with --ca. */
const URL_VARIABLE = "COLLECT_URL";

async function main(args: string[]): Promise<number> {
  // Only --postgres may go without its value.
  const whole = args.map((arg, i) =>
    arg === "--postgres" && (args[i + 1] ?? "-").startsWith("-") ? "--postgres=" : arg
  );
  const { values, tokens } = parseArgs({ args: whole, options: OPTIONS, tokens: true });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  const jobs = (["install", "uninstall", "once", "dry-run"] as const).filter((job) => values[job]);
  if (jobs.length > 1) {
    throw new Error(`Cannot take --${jobs[0]} with --${jobs[1]}: give one of them`);
  }
  if (values.print && !values.install && !values.uninstall) {
    throw new Error("Cannot take --print alone: it goes with --install or --uninstall");
  }
  if (values.uninstall) {
    await uninstall(values.print);
    return 0;
  }
  if (!/^\P{Cc}{1,255}$/u.test(values.host ?? "-")) {
    throw new Error(
      `Cannot take --host "${values.host}": give 1 to 255 characters, without control characters`,
    );
  }
  const interval = duration(values.interval, "--interval", 1e3, 3_600e3);
  const limits = {
    bytes: size(values["spool-max-size"]),
    age: duration(values["spool-max-age"], "--spool-max-age", 60e3, 3_650 * 86_400e3),
  };
  const tags = Object.fromEntries(values.tag.map((tag) => {
    const at = tag.indexOf("=");
    if (at < 1) throw new Error(`Cannot take --tag "${tag}": write it as key=value`);
    return [tag.slice(0, at), tag.slice(at + 1)];
  }));
  const port = Number(values.port ?? NaN);
  if (values.port !== undefined && !(Number.isInteger(port) && port > 0 && port < 65_536)) {
    throw new Error(`Cannot take --port "${values.port}": give a number from 1 to 65535`);
  }
  const urlFile = values["url-file"];
  const env = (name: string) => Deno.env.get(name);
  // A service has another environment.
  const root = values.install ? env("DB_SSLROOTCERT")?.replace(/^system$/, "") : undefined;
  const ca = values.ca ?? root;
  if (ca) {
    try {
      new X509Certificate(Deno.readTextFileSync(ca));
    } catch (error) {
      const cause =
        error instanceof Deno.errors.NotFound || error instanceof Deno.errors.PermissionDenied
          ? reason(error)
          : "it is no certificate; give one in PEM form";
      throw new Error(`Cannot read the CA file "${ca}": ${cause}`);
    }
  }
  if (values.install) {
    const url = urlFile ? addressIn(urlFile) : env("DATABASE_URL");
    if (!url) {
      throw new Error(
        "Cannot install the service: it needs the database's address; set DATABASE_URL or --url-file",
      );
    }
    if (values.spool) {
      throw new Error(`Cannot install with --spool: a service keeps it in "${STATE}"`);
    }
    const database = (url: string) => withDefaults(url, { sslmode: env("DB_SSLMODE") }) + "\n";
    const secrets: Record<string, string> = { url: database(url) };
    if (ca) secrets.ca = Deno.readTextFileSync(ca);
    const kept: string[] = [];
    let n = 0;
    for (const token of tokens) {
      if (token.kind !== "option") continue;
      const { name, value } = token;
      if (/^(install|print|url-file|ca)$/.test(name)) continue;
      if (name === "postgres" && value) secrets[`postgres${++n}`] = database(given(value));
      else if (name === "scrape" && !/^https?:\/\/[^@?#]*$/.test(value!)) {
        secrets[`scrape${++n}`] = given(value!) + "\n";
      } else kept.push(value === undefined || !value ? `--${name}` : `--${name}=${value}`);
    }
    const wanted = service(Deno.build.os, kept, secrets);
    if (!values.print) await install(wanted);
    else {
      for (const name of Object.keys(secrets)) console.log(`# ${SECRETS}/${name} (0600)`);
      console.log(`# ${HOME}/collect.ts\n# ${wanted.path}\n${wanted.text}`);
      const hindrance = unreadable();
      if (hindrance) console.error(hindrance);
    }
    return 0;
  }

  const troubles = new Troubles();
  const stop = new AbortController();
  Deno.addSignalListener("SIGINT", () => stop.abort());
  if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", () => stop.abort());

  const machine = await exists("/proc/stat")
    ? new Linux(
      { perCore: values["per-core"], network: values["network-filesystems"] },
      troubles,
    )
    : await Elsewhere.load(values["per-core"]);
  const scrapes = values.scrape.map((url) =>
    new Scrape(given(url), values.scrape.length > 1, troubles)
  );
  const locate = () => {
    if (!urlFile && !ca) return;
    const url = urlFile ? addressIn(urlFile) : env("DATABASE_URL") ||
      `postgres://${env("DB_HOST") || "localhost"}:${env("DB_PORT") || 5432}`;
    // Not by DB_SSLROOTCERT: this is not for the servers of --postgres.
    const tls = { sslrootcert: ca, sslmode: env("DB_SSLMODE") || "verify-full" };
    Deno.env.set(URL_VARIABLE, ca ? withDefaults(url, tls) : url);
  };
  const open = () => {
    locate();
    try {
      return connect({
        max: 1,
        prepare: false,
        fetch_types: false,
        // A connection that is used once a minute is better had by others.
        idle_timeout: interval > 20e3 ? 5 : undefined,
        connection: { application_name: "pgpulse collect" },
      }, URL_VARIABLE);
    } catch (error) {
      const source = urlFile ? `the URL file "${urlFile}"` : "DATABASE_URL";
      throw new Error(reason(error).replace(URL_VARIABLE, source));
    }
  };
  const offline = values.once || values["dry-run"];
  // A wrong address is told at once; a database that is away is waited for.
  const target = offline ? void locate() : open();
  void target?.end();
  const servers = values.postgres.map((address, i) => {
    if (!address) return postgresqlSampler(URL_VARIABLE, troubles);
    const variable = `COLLECT_POSTGRES_${i + 1}`;
    Deno.env.set(variable, given(address));
    return postgresqlSampler(variable, troubles);
  });

  const spool = new Spool(values.spool ?? spoolFolder(), troubles, limits);
  const delivery = new Delivery(
    spool,
    troubles,
    open,
    undefined,
    urlFile && `the URL file "${urlFile}"`,
  );
  const [at, steady] = [Date.now(), performance.now()];
  const state: State = { interval, samples: 0, at, steady, spool, delivery, troubles };
  const os = osName();
  let host = values.host ?? Deno.hostname();
  let spent = 0;

  const record = (due: number, metrics: Metrics, instance?: string) => {
    const about = JSON.stringify({ os, version: VERSION, interval: interval / 1e3 });
    const head = `{"time":"${new Date(due).toISOString()}","host":${JSON.stringify(host)},` +
      (instance ? `"instance":${JSON.stringify(instance)},` : `"tags":${JSON.stringify(tags)},`);
    // The columns are made of all.
    const all = instance
      ? { metrics }
      : { ...summary(metrics), metrics: largest(metrics, troubles) };
    return `${head}"about":${about},${JSON.stringify(all).slice(1)}`;
  };
  const sample = async (): Promise<Metrics | undefined> => {
    const began = performance.now();
    // On Linux nothing is waited for here.
    const taken = machine.sample();
    const metrics = taken instanceof Promise ? await taken : taken;
    if (!metrics) return;
    if (scrapes.length) metrics.scrape = Object.assign({}, ...scrapes.map((one) => one.newest()));
    metrics.collector = {
      spool_bytes: spool.bytes,
      spool_samples: spool.records,
      lost: spool.lost,
      seconds: spent,
    };
    spent = Math.round((performance.now() - began) * 1e3) / 1e6;
    return metrics;
  };
  const scrape = () => Promise.all(scrapes.map((one) => one.read(Math.min(interval, 10_000))));

  await machine.sample();
  const aside = machine.aside();
  if (values.once) {
    await aside;
    await scrape();
    for (const server of servers) await server.sample().catch(() => {});
    await sleep(1_000, stop.signal);
    await scrape();
    const now = Date.now();
    const show = (line: string) => console.log(JSON.stringify(JSON.parse(line), undefined, 2));
    show(record(now, (await sample())!));
    for (const server of servers) {
      const found = await server.sample();
      if (found) show(record(now, found.metrics, found.instance));
      await server.close();
    }
    return 0;
  }

  if (target) {
    spool.open();
    const { host: at, port, database } = target.options;
    console.log(
      `Samples "${host}" every ${values.interval} into database "${database}" at "${at}:${port}"; ` +
        `the spool is "${spool.dir}"` +
        (spool.records
          ? `, ${spool.records} ${spool.records === 1 ? "sample waits" : "samples wait"} in it`
          : ""),
    );
  }
  if (port) serve(port, state, stop.signal);
  const keep = (line: string) => {
    if (values["dry-run"]) return console.log(line);
    spool.add(line);
    // Not all hosts at the same moment: each has its own, shortly behind the sample.
    setTimeout(() => delivery.poke(), spread);
  };
  const spread = Math.random() * Math.min(400, interval / 10);
  const sending = offline ? Promise.resolve() : delivery.run(stop.signal);

  const asides = (async () => {
    while (!stop.signal.aborted) {
      await sleep(ASIDE_MS, stop.signal);
      if (stop.signal.aborted) break;
      void machine.aside();
      try {
        if (!offline) spool.open();
      } catch (error) {
        // Another one has taken a folder that this one could not have: both go on.
        troubles.say("spool", reason(error));
      }
      const name = Deno.hostname();
      if (values.host || name === host) continue;
      console.log(`This machine is called "${name}" now; it was "${host}"`);
      host = name;
    }
  })();
  const busy = new Set<unknown>();
  const watch = async (due: number, server: typeof servers[0]) => {
    if (busy.has(server)) return;
    busy.add(server);
    try {
      const found = await server.sample();
      if (found) keep(record(due, found.metrics, found.instance));
    } catch (error) {
      troubles.say("postgres", reason(error));
    } finally {
      busy.delete(server);
    }
  };

  const clock = { now: () => Date.now(), sleep: (ms: number) => sleep(ms, stop.signal) };
  let told = -Infinity;
  const jumped = (ms: number) => {
    if (performance.now() - told < 600e3) return;
    told = performance.now();
    const s = `${Math.round(Math.abs(ms) / 1e3)} s`;
    console.log(
      ms < 0
        ? `The clock went back by about ${s}; times that were sampled already are sampled again, and count once`
        : `No sample for ${s}: the machine slept, had no time, or its clock was set forward`,
    );
  };
  void scrape();
  const began = performance.now();
  for await (const due of ticks(interval, clock, jumped, stop.signal)) {
    // Rates over an instant would say little.
    if (!state.samples && performance.now() - began < Math.min(500, interval / 5)) continue;
    const metrics = await sample();
    if (metrics) {
      keep(record(due, metrics));
      state.samples++;
      [state.at, state.steady] = [Date.now(), performance.now()];
    }
    void scrape();
    for (const server of servers) void watch(due, server);
  }
  // What has not gone yet goes after the next start.
  await Promise.race([sending, sleep(1_000)]);
  await asides;
  await Promise.all(servers.map((server) => server.close()));
  spool.close();
  return 0;
}

async function exists(path: string): Promise<boolean> {
  try {
    return !!await Deno.stat(path);
  } catch {
    return false;
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

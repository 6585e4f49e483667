/**
 * Shows PostgreSQL live in Grafana: pushes each stream of schema `live` to Grafana Live.
 *
 *     deno run --no-prompt --allow-net --allow-read --allow-write=.pgpulse --allow-sys=hostname \
 *      "--allow-env=DATABASE_URL,LISTEN_DATABASE_URL,DB_*,PG*,GRAFANA_*,GF_*,INFLUX_*,RELAY_PORT" \
 *      scripts/notify-relay.ts
 *
 * Needs: a database that scripts/migrate.ts has prepared, as role `server`; GRAFANA_URL.
 * Costs: 60 MB of memory; under 1 % of a core when nothing moves. Each stream is read at most a
 * tenth of the time, whatever its view costs.
 *
 * How it works. Every push is a whole window, always of the same number of rows, so that each
 * frame replaces the picture: a panel is full when it opens, and whatever was lost heals with the
 * next frame. NOTIFY only says that something changed; the truth is read from the view.
 * With INFLUX_URL it also sends the rows of chosen tables on, each at least once: see Sinks.
 */
import { Buffer } from "node:buffer";
import { parseArgs } from "node:util";
import { dirname } from "node:path";
import { gzipSync } from "node:zlib";
import postgres from "npm:postgres@3.4.9";
import { type Context, Hono } from "npm:hono@4.13.19";
import { streamSSE } from "npm:hono@4.13.19/streaming";
import uplotCss from "npm:uplot@1.6.32/dist/uPlot.min.css" with { type: "text" };
import uplotJs from "npm:uplot@1.6.32/dist/uPlot.iife.min.js" with { type: "text" };

const HELP = `notify-relay: shows PostgreSQL live in Grafana

Pushes every stream of schema live (see pgpulse.add_stream) to Grafana Live, and serves the same
streams to other programs. With INFLUX_URL it also sends every row of chosen tables (see
pgpulse.add_sink; without any, machine_metrics where migrate made it), at least once, to InfluxDB or VictoriaMetrics.

Usage: notify-relay.ts [flags]
       notify-relay.ts --panel STREAM [--type gauge]

  --port N         HTTP port (default: RELAY_PORT, else 8090)
  --listen HOST    address to listen on (default: 127.0.0.1)
  --budget SIZE    bytes a second for each Grafana, as 500kB or 2MB (default: 1MB); above it the
                   beats slow down
  --state FILE     where tokens that it made are kept (default: .pgpulse/relay-tokens.json)
  --panel STREAM   prints a panel for the stream, ready to paste into a dashboard, and ends
  --type TYPE      type of that panel (default: timeseries)
  --help           this text

Environment:
  DATABASE_URL     or DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD, DB_SSLMODE
  GRAFANA_URL      one address or several with commas; none: serves other programs only
  GRAFANA_TOKEN    service account token (role Editor), one for each address, with commas; also
                   GRAFANA_API_KEY. Without it the relay signs in once with GF_SECURITY_ADMIN_USER
                   and GF_SECURITY_ADMIN_PASSWORD and makes itself a service account
  INFLUX_URL       http://host:8086 (InfluxDB 1 to 3) or http://host:8428 (VictoriaMetrics); none:
                   sends no rows. Positions are kept in the database: one INFLUX_URL at a time
  INFLUX_BUCKET    bucket or database there (default: pgpulse)
  INFLUX_TOKEN     token that may write, with INFLUX_ORG for InfluxDB 2; without one the relay writes
                   as to InfluxDB 1, with INFLUX_USER and INFLUX_PASSWORD where they are set

Serves: /                one page that shows every stream
        /streams         list; as text/event-stream: every stream
        /streams/NAME    server-sent events: "window" (all rows), then "rows" (new or changed ones)
        /healthz         200 while it works; says what it cannot reach
        /metrics         for Prometheus

Costs: about 60 MB of memory, under 1 % of a core when nothing moves, at most 6 connections, 2 more
with INFLUX_URL; in Grafana about 1.25 % of a core for each push of 300 rows a second. A million rows
to InfluxDB cost the relay 2 s of a core and the database 4.

Examples:
  DATABASE_URL=postgres://server:secret@db/testdb GRAFANA_URL=http://localhost:3000 \\
      GRAFANA_TOKEN=glsa_... deno task relay
  deno task relay --panel metrics
  curl -N http://localhost:8090/streams/metrics
  INFLUX_URL=http://localhost:8086 deno task relay
`;

/** Rows of a Grafana message must stay below this; Grafana itself refuses 500 * 1024 bytes. */
const MAX_MESSAGE = 480 * 1024;
/** Characters of a label; it stands in every row of its series. */
const MAX_LABEL = 200;
/** Series of one channel; browsers never drop a label that they saw. */
const MAX_SERIES = 100;
/** Channels of one split stream; Grafana never forgets a channel. */
const MAX_CHANNELS = 500;
/** The same with a slow beat, and so many that all still run at full beat. */
const MAX_SLOW_CHANNELS = 5_000;
const FEW_CHANNELS = 50;
/** Values that split a stream with a slow beat are looked up so often. */
const VALUES_MS = 10_000;
/** Every window is pushed again so often: Grafana's cache of last frames ends with its process. */
const REPUSH_MS = 10_000;
/** Whole windows are read again so often: late commits, updates and deletes show by then. */
const FULL_MS = 10_000;
/** Tails are read at least so often, whatever LISTEN says. */
const TAIL_MS = 1_500;
/** Rows that became visible out of order within this time are seen by the next tail read. */
const OVERLAP_MS = 2_000;
/** Reads that take longer share one connection, so that they hold up only each other. */
const SLOW_MS = 250;
const PULSE_MS = 1_200;
const LEASE_S = 3.5;
/** Rows, and characters, of one message to InfluxDB. */
const SINK_ROWS = 10_000;
const SINK_SIZE = 5_000_000;
/** A batch is offered to InfluxDB for so long, then its transaction is given up and begun anew. */
const SINK_PATIENCE_MS = 60_000;
/** A Grafana that cannot be reached may be starting: told when that lasts longer. */
const AWAY_MS = 15_000;

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

// --- windows ---------------------------------------------------------------------------------

/** How a stream is read; a row of pgpulse.stream_plans(). */
export interface Plan {
  stream: string;
  stream_id: string;
  rows: number;
  coarse_rows: number;
  beat_ms: number;
  slow_ms: number | null;
  split: string | null;
  labels: string[];
  fields: string[];
  tables: string[];
  read_all: string;
  read_tail: string;
  read_values: string | null;
  fault: string | null;
}

/** One row of a window: its time in whole milliseconds, its series, and the line that is pushed. */
export interface Row {
  ms: number;
  series: string;
  line: string;
  values: (string | number | null)[];
}

/**
 * Text that survives as a label: the browser splits labels at commas and equals signs, and line
 * protocol has no empty values.
 */
export function labelText(value: unknown): string {
  const text = value === null ? "(null)" : String(value);
  // deno-lint-ignore no-control-regex -- newlines end a line of the protocol
  return text.replace(/[\x00-\x1f\x7f]+/g, " ").trim().replaceAll(",", ";").replaceAll("=", ":")
    .replaceAll("\\", "/").slice(0, MAX_LABEL) || "(empty)";
}

const escape = (text: string) => labelText(text).replaceAll(" ", "\\ ");

/** A row as InfluxDB line protocol; every field is always there, as a frame's fields never change. */
export function toRow(channel: string, plan: Plan, ms: number, values: Row["values"]): Row {
  const labels = plan.labels.map((name, i) =>
    `,${escape(name)}=${escape(String(values[i] ?? "(null)"))}`
  );
  const fields = plan.fields.map((name, i) => {
    const value = values[plan.labels.length + i];
    // Grafana reads the text NaN as null; a bare NaN or infinity it refuses.
    return `${escape(name)}=${Number.isFinite(value) ? value : '"NaN"'}`;
  });
  const series = labels.join("");
  return { ms, series, values, line: `${channel}${series} ${fields.join()} ${ms}000000` };
}

/** The newest `count` distinct milliseconds of rows, ordered by time, the last of doubles. */
export function newest(rows: Row[], count: number): Row[] {
  const byKey = new Map(rows.map((row) => [`${row.ms}${row.series}`, row]));
  const ordered = [...byKey.values()].sort((a, b) => a.ms - b.ms || (a.series < b.series ? -1 : 1));
  let start = ordered.length;
  for (let distinct = 0; start > 0; start--) {
    if (ordered[start - 1].ms !== ordered[start]?.ms && ++distinct > count) break;
  }
  return ordered.slice(start);
}

/** What one Grafana channel shows. */
export class Channel {
  /** Newest rows, as they are. */
  fine: Row[] = [];
  /** One row for each step of history, by time; those older than the oldest fine row are shown. */
  coarse: Row[] = [];
  /** What is pushed; empty while there is nothing to show. */
  text = "";
  /** Its length in bytes. */
  size = 0;
  /** Counts changes of `text`. */
  version = 0;
  /** Nobody watches it: it is read on the slow beat, and holds no rows between. */
  resting = false;
  /** Until when somebody watches it here, by performance.now(). */
  watchedUntil = 0;
  /** Only every so many-th time is shown, where all would be too long for a message. */
  thinned = 1;
  #series = new Set<string>();
  #tooMany = false;

  constructor(readonly plan: Plan, readonly name: string, readonly troubles: Troubles) {}

  /** Rows that the window shows, oldest first. */
  rows(): Row[] {
    const oldest = this.fine[0]?.ms ?? Infinity;
    return [...this.coarse.filter((row) => row.ms < oldest), ...this.fine];
  }

  /** Takes a whole window. */
  replace(fine: Row[], coarse: Row[]): boolean {
    this.resting = false;
    this.fine = newest(this.#known(fine), this.plan.rows - this.plan.coarse_rows);
    this.coarse = newest(this.#known(coarse), this.plan.coarse_rows);
    return this.#render();
  }

  /** The same, as it is read. */
  take(rows: { row: Row; fine: boolean }[] = []): boolean {
    const some = (fine: boolean) => rows.filter((r) => r.fine === fine).map(({ row }) => row);
    return this.replace(some(true), some(false));
  }

  /** Takes the rows from `since` on; what was there and has not come again is gone. */
  replaceTail(since: number, rows: Row[]): boolean {
    const kept = this.fine.filter((row) => row.ms < since);
    this.fine = newest([...kept, ...this.#known(rows)], this.plan.rows - this.plan.coarse_rows);
    return this.#render();
  }

  /** Lets go of the rows; what was pushed stays. */
  rest(): void {
    this.resting = true;
    this.fine = [];
    this.coarse = [];
  }

  get newestMs(): number {
    return this.fine.at(-1)?.ms ?? 0;
  }

  /** How many rows to ask for, so that every series can fill the window. */
  get wanted(): number {
    return (this.plan.rows - this.plan.coarse_rows) * Math.max(1, this.#series.size);
  }

  #known(rows: Row[]): Row[] {
    for (const { series } of rows) {
      if (this.#series.size < MAX_SERIES) this.#series.add(series);
      else if (!this.#series.has(series)) this.#tooMany = true;
    }
    if (!this.#tooMany) return rows;
    this.troubles.say(
      `series ${this.name}`,
      `Stream "${this.name}" has more than ${MAX_SERIES} series: the others are left out; ` +
        `split it by a column with pgpulse.add_stream(split => ...)`,
    );
    return rows.filter(({ series }) => this.#series.has(series));
  }

  /**
   * Writes the window as exactly `plan.rows` distinct milliseconds: N rows replace N rows in the
   * browser, and fewer would leave old ones beside them. Rows without values fill up in front.
   */
  #render(): boolean {
    const rows = this.rows();
    const render = () => {
      const times = [...new Set(rows.map((row) => row.ms))];
      const shown = this.thinned === 1 ? undefined : new Set(
        times.filter((_, i) => (times.length - 1 - i) % this.thinned === 0),
      );
      const lines = shown ? rows.filter((row) => shown.has(row.ms)) : rows;
      // An empty labelled stream has no series to pad; a frame without labels would add one for good.
      if (!lines.length && this.plan.labels.length && !this.#series.size) return "";
      const oldest = lines[0]?.ms ?? Math.floor(Date.now() / 60_000) * 60_000;
      const series = lines[0]?.series ?? [...this.#series][0] ?? "";
      const missing = this.plan.rows - (shown?.size ?? times.length);
      const fields = this.plan.fields.map((name) => `${escape(name)}="NaN"`).join();
      let text = "";
      for (let i = missing; i > 0; i--) {
        text += `${this.name}${series} ${fields} ${oldest - i}000000\n`;
      }
      for (const row of lines) text += row.line + "\n";
      return text;
    };
    let text = render();
    while (Buffer.byteLength(text) > MAX_MESSAGE && this.thinned < this.plan.rows) {
      this.thinned *= 2;
      text = render();
    }
    if (this.thinned > 1) {
      this.troubles.say(
        `thinned ${this.name}`,
        `Stream "${this.name}" is too long for one message: only one time in ${this.thinned} is ` +
          `shown; split it by a column with pgpulse.add_stream(split => ...) or give it fewer rows`,
      );
    }
    if (text === this.text) return false;
    this.text = text;
    this.size = Buffer.byteLength(text);
    this.version++;
    return true;
  }

  /** Grafana refused the message as too large: show half as many times from now on. */
  shrink(): void {
    this.thinned = Math.min(this.thinned * 2, this.plan.rows);
    this.#render();
  }

  /** A row for other programs. */
  json(row: Row): Record<string, string | number | null> {
    const names = [...this.plan.labels, ...this.plan.fields];
    const pairs = names.map((name, i) => [name, row.values[i]]);
    return { time: new Date(row.ms).toISOString(), ...Object.fromEntries(pairs) };
  }
}

// --- small tools -------------------------------------------------------------------------------

/** Says each trouble once, and once that it is over. */
export class Troubles {
  /** One trouble may show itself in several ways, in turn: each once, and not more than five. */
  #said = new Map<string, Set<string>>();

  say(key: string, message: string): void {
    const said = this.#said.get(key) ?? new Set();
    this.#said.set(key, said);
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

  /** Forgets what was said of streams that are no more; keys end in the name of one. */
  keep(streams: Set<string>): void {
    for (const key of this.#said.keys()) {
      const [, name] =
        key.match(/^(?:plan|read|slow|channels|series|thinned|refused).* (\w[^ /]*)/) ??
          [];
      if (name && !streams.has(name)) this.#said.delete(key);
    }
  }

  list(): string[] {
    return [...this.#said.values()].map((messages) => [...messages].at(-1)!);
  }
}

/** Something that one loop waits for and others set off; look at the reason before waiting. */
class Signal {
  #wake = () => {};

  wait(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, Math.max(0, ms));
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  fire(): void {
    this.#wake();
  }
}

/** Lets so many through at once. */
class Lane {
  #waiting: (() => void)[] = [];

  constructor(private free: number) {}

  /** Gives the milliseconds that it took. */
  async enter(): Promise<number> {
    const since = performance.now();
    if (this.free > 0) this.free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    return performance.now() - since;
  }

  leave(): void {
    const next = this.#waiting.shift();
    if (next) next();
    else this.free++;
  }
}

class TimedOut extends Error {}

/** Gives up waiting, not the work itself. */
function withTimeout<T>(work: PromiseLike<T>, ms: number): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new TimedOut(`No answer within ${ms / 1000} s`)), ms);
    work.then(resolve, reject).then(() => clearTimeout(timer));
  });
}

const READER = {
  // No query waits on a connection behind a slow one while another is free.
  max_pipeline: 0,
  // Whoever asks again has waited already.
  backoff: () => 0.1,
  connection: { application_name: "pgpulse relay" },
};

const pause = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

// --- streams -----------------------------------------------------------------------------------

/** Reads one stream and keeps the windows of its channels. */
class Stream {
  readonly channels = new Map<string, Channel>();
  /** A hint came since the last read. */
  hinted = false;
  stopped = false;
  /** Seconds between the newest row's time and the moment it was read. */
  lag = 0;
  reads = 0;
  readSeconds = 0;
  #signal = new Signal();
  /** Cuts a pause after a failure short. */
  readonly retry = new Signal();
  #nextFull = 0;
  /** With a slow beat: all values that split the stream, those that are read at full beat, and
   * where among the others the slow beat is. */
  #values: string[] = [];
  #live: string[] = [];
  #valuesAt = -Infinity;
  #turn = { at: performance.now(), owed: 0, value: "" };
  /** What a read of each kind costs in milliseconds; of the last two the cheaper, as one may have
   * met a busy machine or a new connection. */
  #cost = { full: 0, tail: 0 };
  #lastCost: { full?: number; tail?: number } = {};
  /** Milliseconds that the present read has waited for its turn. */
  #waited = 0;

  constructor(readonly plan: Plan, readonly relay: Relay) {
    if (!plan.split) this.channels.set("", new Channel(plan, plan.stream, relay.troubles));
  }

  hint(): void {
    this.hinted = true;
    this.#signal.fire();
  }

  stop(): void {
    this.stopped = true;
    this.relay.works(this.plan.stream);
    this.#signal.fire();
  }

  /** Opens a channel for each value that has none yet; SQL alone knows how channels are named. */
  async #open(values: string[]): Promise<void> {
    const { plan, relay } = this;
    const most = plan.slow_ms ? MAX_SLOW_CHANNELS : MAX_CHANNELS;
    const room = most - this.channels.size;
    if (values.length > room) {
      relay.troubles.say(
        `channels ${plan.stream}`,
        `Stream "${plan.stream}" has more than ${most} values of "${plan.split}": ` +
          `the others get no channel; let its view show fewer`,
      );
      if (room < 1) return;
    }
    const names = await relay.query(
      "select value, pgpulse.channel($1, value) from unnest($2::text[]) as value",
      [plan.stream, values.slice(0, room)],
    );
    for (const [value, name] of names as string[][]) {
      this.channels.set(value, new Channel(plan, name, relay.troubles));
    }
    this.#nextFull = 0;
  }

  /** Reads until it is stopped: at once after a hint, on the beat while things change. */
  async run(): Promise<void> {
    const { plan, relay } = this;
    // Beats without change before the stream counts as quiet again: a session's hints are
    // throttled, so rows that follow a hint closely come without one.
    let lively = 0;
    let failures = 0;
    while (!this.stopped) {
      const started = performance.now();
      const hinted = this.hinted;
      this.hinted = false;
      this.#waited = 0;
      try {
        if (plan.slow_ms) await this.#choose(started);
        const kind = started >= this.#nextFull ? "full" : "tail";
        let changed = kind === "full" ? await this.#readAll() : await this.#readTail();
        if (plan.slow_ms && await this.#readSome(started)) changed = true;
        const spent = performance.now() - started - this.#waited;
        const cost = this.#cost[kind] = Math.min(spent, this.#lastCost[kind] ?? 0);
        this.#lastCost[kind] = spent;
        this.reads++;
        this.readSeconds += spent / 1000;
        failures = 0;
        relay.works(plan.stream);
        relay.troubles.over(`read ${plan.stream}`, `Stream "${plan.stream}" is read again`);
        if (kind === "full") {
          this.#nextFull = performance.now() + Math.max(FULL_MS, 20 * cost);
        } else if (hinted && !changed) {
          // Something changed, but not at the end: an update, a delete or a late commit.
          this.#nextFull = Math.min(
            this.#nextFull,
            performance.now() + Math.max(plan.beat_ms, 20 * this.#cost.full),
          );
        }
        if (changed) relay.changed();
        lively = changed || hinted ? 2 : lively - 1;
        if (cost > 1000) {
          relay.troubles.say(
            `slow ${plan.stream}`,
            `Stream "${plan.stream}" takes seconds to read, so it is read less often: it wants an ` +
              `index on its time column, and a view that lets a condition on time through`,
          );
        } else if (cost < 500) {
          relay.troubles.over(
            `slow ${plan.stream}`,
            `Stream "${plan.stream}" is quick to read again`,
          );
        }
        const watched = plan.tables.length > 0 && relay.listening;
        // Full reads keep their own pace above.
        const gap = Math.max(plan.beat_ms, 10 * this.#cost.tail);
        const rest = gap - (performance.now() - started);
        if (rest > 0) await pause(rest);
        if (this.hinted || this.stopped || lively > 0) continue;
        await this.#signal.wait(watched ? TAIL_MS - gap : 0);
      } catch (error) {
        if (this.stopped) return;
        relay.databaseFailed(error, plan.stream);
        failures++;
        this.#nextFull = 0;
        // Not to be cut short by hints, which may come four times a second.
        await this.retry.wait(Math.min(250 * 2 ** failures, 5_000) * (0.75 + Math.random() / 2));
      }
    }
  }

  /** Which channels to read at full beat: those that are watched, or all where they are few. */
  async #choose(now: number): Promise<void> {
    const { plan, relay } = this;
    if (now - this.#valuesAt > VALUES_MS) {
      const answer = await relay.query(plan.read_values!, []);
      this.#values = answer.map(([value]) => value as string).slice(0, MAX_SLOW_CHANNELS);
      this.#valuesAt = now;
      const unknown = this.#values.filter((value) => !this.channels.has(value));
      if (unknown.length) await this.#open(unknown);
    }
    const before = new Set(this.#live);
    const few = this.#values.length <= FEW_CHANNELS;
    const here = [...this.channels].filter(([, { watchedUntil }]) => watchedUntil > now);
    const watched = [...relay.watched.get(plan.stream) ?? []];
    // Whoever reads may watch anything: values that are not there push out none that are.
    const known = watched.filter((value) => this.channels.has(value));
    const unknown = watched.filter((value) => !this.channels.has(value)).slice(0, FEW_CHANNELS);
    const live = [
      ...here.map(([value]) => value),
      ...few ? this.#values : [],
      ...known,
      ...unknown,
    ];
    this.#live = [...new Set(live)].slice(0, MAX_CHANNELS);
    if (this.#live.some((value) => !before.has(value))) this.#nextFull = 0;
    for (const [, channel] of this.#others()) if (!channel.resting) channel.rest();
  }

  /** Reads the windows of some channels that nobody watches, of all within the slow beat. */
  async #readSome(now: number): Promise<boolean> {
    const { plan } = this;
    const turn = this.#turn;
    const others = this.#others();
    turn.owed += others.length * Math.min(1, (now - turn.at) / plan.slow_ms!);
    turn.at = now;
    const count = Math.min(Math.floor(turn.owed), others.length, FEW_CHANNELS);
    if (!count) return false;
    turn.owed -= count;
    const ordered = others.sort(([a], [b]) => a < b ? -1 : 1);
    const next = ordered.findIndex(([value]) => value > turn.value);
    const some = [...ordered.slice(Math.max(next, 0)), ...ordered].slice(0, count);
    turn.value = some.at(-1)![0];
    const { parts } = await this.#read("full", [plan.rows, some.map(([value]) => value)]);
    let changed = false;
    for (const [value, channel] of some) {
      if (channel.take(parts.get(value))) changed = true;
      channel.rest();
    }
    return changed;
  }

  /** Channels that are read at full beat, with what they are split by. */
  #current(): [string, Channel][] {
    if (!this.plan.slow_ms) return [...this.channels];
    return this.#live.flatMap((value) => {
      const channel = this.channels.get(value);
      return channel ? [[value, channel]] : [];
    });
  }

  /** Those that nobody watches. */
  #others(): [string, Channel][] {
    const live = new Set(this.#live);
    return [...this.channels].filter(([value]) => !live.has(value));
  }

  /** The parameter of queries that read certain values only. */
  #chosen(): string[][] {
    return this.plan.slow_ms ? [this.#live] : [];
  }

  #wanted(): number {
    return Math.max(this.plan.rows, ...this.#current().map(([, c]) => c.wanted));
  }

  async #readAll(): Promise<boolean> {
    let changed = false;
    if (this.plan.slow_ms && !this.#live.length) return false;
    for (let asked = 0; asked < this.#wanted();) {
      // Series seen for the first time make room for themselves: then more rows are wanted.
      asked = this.#wanted();
      const { parts } = await this.#read("full", [asked, ...this.#chosen()]);
      for (const [value, channel] of this.#current()) {
        if (channel.take(parts.get(value))) changed = true;
      }
    }
    return changed;
  }

  async #readTail(): Promise<boolean> {
    if (this.plan.slow_ms && !this.#live.length) return false;
    const now = this.relay.now();
    // A full read leaves out values that were silent for long: no tail is to bring them back.
    const newest = Math.max(
      this.plan.split ? now - FULL_MS : 0,
      ...this.#current().map(([, c]) => c.newestMs),
    );
    // Rows ahead of the database's clock must not hide those of the present.
    const since = Math.min(newest, now) - OVERLAP_MS;
    const sum = () => this.#current().reduce((sum, [, c]) => sum + c.wanted, 0);
    const wanted = Math.max(this.plan.rows, sum());
    const { parts, cut } = await this.#read("tail", [wanted, since, ...this.#chosen()]);
    // Cut off by the limit, the answer speaks only of the time after its oldest row.
    const from = Math.max(since, cut);
    let changed = false;
    for (const [value, channel] of this.#current()) {
      if (channel.replaceTail(from, (parts.get(value) ?? []).map((r) => r.row))) changed = true;
    }
    // New series, and perhaps older rows of theirs that the limit cut off.
    if (sum() > wanted) this.#nextFull = 0;
    return changed;
  }

  /**
   * Runs one of the plan's queries, of which the first parameter is the limit. Gives rows by the
   * value that splits the stream, and from when on the limit lets them be whole.
   */
  async #read(kind: "full" | "tail", parameters: [number, ...unknown[]]) {
    const { plan, relay } = this;
    const cost = this.#lastCost[kind] ?? this.#lastCost.full ?? 0;
    const lane = cost < SLOW_MS ? relay.quick : relay.slow;
    this.#waited += await lane.enter();
    const answer = await relay.query(kind === "full" ? plan.read_all : plan.read_tail, parameters)
      .finally(() => lane.leave());
    const cut = answer.length < parameters[0]
      ? -Infinity
      : Math.floor(answer.at(-1)![0] as number) + 1;
    // Line protocol counts nanoseconds in 64 bits: the years 1678 to 2261.
    const cells = answer.filter(([ms]) => Math.abs(ms as number) < 9.2e12);
    const at = plan.split ? 1 + plan.labels.indexOf(plan.split) : -1;
    const valueOf = (row: unknown[]) => (plan.split ? row[at] : "") as string | null;
    const unknown = new Set<string>();
    for (const value of cells.map(valueOf)) {
      if (value !== null && !this.channels.has(value)) unknown.add(value);
    }
    if (unknown.size) await this.#open([...unknown]);
    const width = 1 + plan.labels.length + plan.fields.length;
    const parts = new Map<string, { row: Row; fine: boolean }[]>();
    let newestMs = 0;
    // Newest rows come first; of rows with one time and series the last is to stand.
    for (const row of cells.reverse()) {
      const value = valueOf(row);
      const channel = value === null ? undefined : this.channels.get(value);
      if (value === null || !channel) continue;
      const ms = Math.floor(row[0] as number);
      newestMs = Math.max(newestMs, ms);
      const made = toRow(channel.name, plan, ms, row.slice(1, width) as Row["values"]);
      const entry = { row: made, fine: row[width] !== false };
      if (!parts.get(value)?.push(entry)) parts.set(value, [entry]);
    }
    if (newestMs) this.lag = (relay.now() - newestMs) / 1000;
    return { parts, cut };
  }
}

// --- Grafana ------------------------------------------------------------------------------------

/** How to sign in: a token, or once as a user who may make one. */
export interface SignIn {
  token?: string;
  user?: string;
  password?: string;
}

/** One Grafana that windows are pushed to. */
export class Grafana {
  frames = 0;
  bytes = 0;
  errors = new Map<string, number>();
  /** What was pushed last of each channel: its version, and when. */
  #sent = new WeakMap<Channel, { version: number; at: number; refused?: boolean }>();
  #signal = new Signal();
  #tokens = 0;
  #refilled = performance.now();
  #slowSince = 0;
  /** So many messages are to hold one channel only, to find the one that Grafana refuses. */
  #alone = 0;
  /** Channels that were refused, one after the other. */
  #refusals = 0;
  #failures = 0;
  #failingSince = 0;
  #retryAt = 0;
  #token?: string;
  /** The token that this process made, and the last one that Grafana refused. */
  #made?: string;
  #refused?: string;

  constructor(
    readonly url: string,
    readonly signIn: SignIn,
    readonly budget: number,
    readonly state: string,
    readonly relay: Relay,
  ) {
    this.#token = signIn.token;
    this.#tokens = budget;
  }

  get healthy(): boolean {
    return this.#failures === 0;
  }

  wake(): void {
    this.#signal.fire();
  }

  /** Grafana, or this relay's lead, is new: everything is to be pushed. */
  forget(): void {
    this.#sent = new WeakMap();
    this.wake();
  }

  async run(): Promise<void> {
    const { relay } = this;
    while (!relay.stopped) {
      const rest = this.#retryAt - performance.now();
      const batch = rest <= 0 && relay.leading() ? this.#due() : [];
      if (!batch.length) {
        await this.#signal.wait(rest > 0 ? rest : 500);
        continue;
      }
      try {
        this.#token ??= await this.#makeToken();
        if (!await this.#push(batch)) continue;
        // After failures it may be another process, which knows no channel.
        if (this.#failures) this.#sent = new WeakMap();
        this.#failures = 0;
        this.#refusals = 0;
        relay.troubles.over(`grafana ${this.url}`, `Grafana at "${this.url}" takes frames again`);
        await this.#keepBudget();
      } catch (error) {
        this.#retryAt = performance.now() + this.#failed(error) * (1 + Math.random() / 4);
      }
    }
  }

  /**
   * What to push next, the longest waiting first, of one stream id: Grafana takes many channels in
   * one message. Changed windows are due; unchanged and refused ones again after a while.
   */
  #due(): Channel[] {
    const now = performance.now();
    const due: { channel: Channel; at: number }[] = [];
    for (const channel of this.relay.channels()) {
      if (!channel.text) continue;
      const sent = this.#sent.get(channel);
      const changed = sent?.version !== channel.version && !sent?.refused;
      const again = channel.resting ? channel.plan.slow_ms! : REPUSH_MS;
      if (changed || now - sent!.at >= again) due.push({ channel, at: sent?.at ?? 0 });
    }
    // What somebody looks at goes first.
    due.sort((a, b) => Number(a.channel.resting) - Number(b.channel.resting) || a.at - b.at);
    const batch: Channel[] = [];
    let length = 0;
    for (const { channel } of due) {
      if (batch.length && channel.plan.stream_id !== batch[0].plan.stream_id) continue;
      // A channel that was refused goes alone: it must not take others with it.
      const alone = this.#alone || this.#sent.get(channel)?.refused;
      if (batch.length && (alone || length + channel.size > MAX_MESSAGE / 2)) continue;
      batch.push(channel);
      length += channel.size;
      if (alone) break;
    }
    return batch;
  }

  /** Pushes the channels in one message; false where Grafana refuses it because of one of them. */
  async #push(batch: Channel[]): Promise<boolean> {
    const pushed = batch.map(({ version, size }) => ({ version, size }));
    const body = batch.map((channel) => channel.text).join("");
    const at = performance.now();
    const path = `/api/live/push/${batch[0].plan.stream_id}?gf_live_frame_format=labels_column`;
    try {
      await this.#call("POST", path, body, { authorization: `Bearer ${this.#token}` });
    } catch (error) {
      if (!(error instanceof Refused) || ![400, 413, 500].includes(error.status)) throw error;
      if (batch.length > 1) {
        this.#count(`${error.status}`);
        this.#alone = batch.length;
        return false;
      }
      // One channel after the other: that is Grafana's fault, not theirs.
      if (
        error.status === 500 && ++this.#refusals >= Math.min(3, [...this.relay.channels()].length)
      ) {
        throw error;
      }
      // One channel's fault: the others go on, and it is tried again after a while.
      this.#count(`${error.status}`);
      const [channel] = batch;
      const size = Math.ceil(channel.size / 1000);
      if (error.status === 413) channel.shrink();
      this.#sent.set(channel, { version: channel.version, at, refused: true });
      this.relay.troubles.say(
        `refused ${this.url} ${channel.name}`,
        `Grafana at "${this.url}" refuses channel "${channel.name}" (status ${error.status}): look ` +
          `at Grafana's log, and at the view live.${channel.plan.stream} for odd names; the message ` +
          `has ${size} kB, which a proxy between may find too many`,
      );
      return false;
    }
    if (this.#alone > 0) this.#alone--;
    for (const [i, channel] of batch.entries()) {
      this.#sent.set(channel, { version: pushed[i].version, at });
      this.relay.troubles.over(
        `refused ${this.url} ${channel.name}`,
        `Grafana at "${this.url}" takes channel "${channel.name}" again`,
      );
      this.bytes += pushed[i].size;
      this.#tokens -= pushed[i].size;
    }
    this.frames += batch.length;
    return true;
  }

  /** Waits while more was pushed than the budget allows: beats slow down, nothing is dropped. */
  async #keepBudget(): Promise<void> {
    const now = performance.now();
    this.#tokens = Math.min(
      this.budget,
      this.#tokens + (now - this.#refilled) / 1000 * this.budget,
    );
    this.#refilled = now;
    if (this.#tokens >= 0) {
      if (now - this.#slowSince > 60_000) {
        this.relay.troubles.over(
          `budget ${this.url}`,
          `The streams keep within the budget of Grafana at "${this.url}" again`,
        );
      }
      return;
    }
    this.#slowSince = now;
    this.relay.troubles.say(
      `budget ${this.url}`,
      `The streams want more than ${Math.round(this.budget / 1000)} kB a second of Grafana at ` +
        `"${this.url}": their beats slow down; raise --budget, give them fewer rows or longer beats`,
    );
    await pause(-this.#tokens / this.budget * 1000);
  }

  /** One call of Grafana's API; throws Refused with the status. */
  async #call(method: string, path: string, body: string | undefined, headers: HeadersInit) {
    const response = await fetch(this.url + path, {
      method,
      body,
      headers,
      redirect: "manual",
      signal: AbortSignal.timeout(10_000),
    });
    const text = await response.text();
    if (!response.ok) throw new Refused(response.status, text, response.headers.get("retry-after"));
    return text;
  }

  #count(kind: string): void {
    this.errors.set(kind, (this.errors.get(kind) ?? 0) + 1);
  }

  /** Counts and says a failure once; gives the pause in milliseconds before the next try. */
  #failed(error: unknown): number {
    const refused = error instanceof Refused ? error : undefined;
    const kind = refused
      ? `${refused.status}`
      : error instanceof SignInFailed
      ? "sign-in"
      : "unreachable";
    this.#count(kind);
    if (!this.#failures++) this.#failingSince = performance.now();
    const own = this.signIn.user && !this.signIn.token;
    const advice: Record<string, string> = {
      301: "it redirects; set GRAFANA_URL to its root_url",
      302: "it redirects; set GRAFANA_URL to its root_url",
      401: own
        ? "it refuses the token that the relay made; a new one is made"
        : "it refuses the token; set GRAFANA_TOKEN to one of a service account with role Editor",
      403: "the token may not push; its service account needs the role Editor",
      404: "there is no Grafana Live at this address; correct GRAFANA_URL",
      429: "it asks for fewer messages; lower --budget",
    };
    const cause = error instanceof SignInFailed
      ? error.message
      : refused
      ? `status ${kind}: ${advice[kind] ?? refused.text.slice(0, 200)}`
      : `it cannot be reached (${reason(error)}); is it running?`;
    if (kind !== "unreachable" || performance.now() - this.#failingSince > AWAY_MS) {
      this.relay.troubles.say(
        `grafana ${this.url}`,
        `Cannot push to Grafana at "${this.url}": ${cause}`,
      );
    }
    // A Grafana that lets everybody look says 403 to a token that it does not know.
    if (own && (kind === "401" || kind === "403" && this.#token !== this.#made)) {
      this.#refused = this.#token;
      this.#token = undefined;
    }
    if (error instanceof SignInFailed) return 2 ** 30;
    if (refused?.status === 429) return Number(refused.retryAfter) * 1000 || 5_000;
    if (refused && [401, 403, 404].includes(refused.status)) {
      return Math.min(1000 * 2 ** this.#failures, 30_000);
    }
    return Math.min(250 * 2 ** this.#failures, 5_000);
  }

  /**
   * The token made before, else one of a new service account "pgpulse-relay" with role Editor.
   * A token made earlier under the same name is replaced, so that restarts leave only one.
   */
  async #makeToken(): Promise<string> {
    const { user, password } = this.signIn;
    if (!user || !password) {
      throw new SignInFailed(
        "there is no token; set GRAFANA_TOKEN, or GF_SECURITY_ADMIN_USER and " +
          "GF_SECURITY_ADMIN_PASSWORD to let the relay make one",
      );
    }
    const kept = await readTokens(this.state);
    if (kept[this.url] && kept[this.url] !== this.#refused) return kept[this.url];
    const basic = {
      authorization: `Basic ${encodeBase64(`${user}:${password}`)}`,
      "content-type": "application/json",
    };
    const api = async (method: string, path: string, body?: unknown) =>
      JSON.parse(
        await this.#call(
          method,
          `/api/serviceaccounts${path}`,
          body === undefined ? undefined : JSON.stringify(body),
          basic,
        ),
      );
    try {
      const { serviceAccounts } = await api("GET", "/search?query=pgpulse-relay");
      const account = serviceAccounts.find((a: { name: string }) => a.name === "pgpulse-relay") ??
        await api("POST", "/", { name: "pgpulse-relay", role: "Editor" });
      const name = `relay ${Deno.hostname()} ${Deno.cwd()}`.slice(0, 180);
      for (const token of await api("GET", `/${account.id}/tokens`)) {
        if (token.name === name) await api("DELETE", `/${account.id}/tokens/${token.id}`);
      }
      const { key } = await api("POST", `/${account.id}/tokens`, { name });
      await writeTokens(this.state, { ...await readTokens(this.state), [this.url]: key }).catch(
        ({ message }) =>
          console.error(
            `Cannot keep the token in "${this.state}", so each start makes one: ${message}`,
          ),
      );
      console.log(`Made a token of service account "pgpulse-relay" in Grafana at "${this.url}"`);
      return this.#made = key;
    } catch (error) {
      if (!(error instanceof Refused) || ![400, 401, 403, 409].includes(error.status)) throw error;
      // Five wrong passwords lock the account: never again with this one.
      throw new SignInFailed(
        error.status === 401
          ? `it refuses the password of "${user}", which is not tried again; correct ` +
            `GF_SECURITY_ADMIN_PASSWORD or set GRAFANA_TOKEN, then start the relay again`
          : `"${user}" may not make a service account (status ${error.status}); set GRAFANA_TOKEN`,
      );
    }
  }
}

/** Why a fetch failed, without addresses and ports, which differ each time. */
function reason(error: unknown): string {
  const { message, cause } = error as Error;
  return String((cause as Error)?.message ?? message).split("): ").at(-1)!;
}

class Refused extends Error {
  constructor(readonly status: number, readonly text: string, readonly retryAfter: string | null) {
    super(`Status ${status}`);
  }
}

/** Not to be tried again in this process. */
class SignInFailed extends Error {}

const encodeBase64 = (text: string) => new TextEncoder().encode(text).toBase64();

async function readTokens(file: string): Promise<Record<string, string>> {
  try {
    return JSON.parse(await Deno.readTextFile(file));
  } catch {
    return {};
  }
}

async function writeTokens(file: string, tokens: Record<string, string>): Promise<void> {
  await Deno.mkdir(dirname(file), { recursive: true });
  await Deno.writeTextFile(`${file}.new`, JSON.stringify(tokens, null, 2), { mode: 0o600 });
  await Deno.rename(`${file}.new`, file);
}

// --- sinks ------------------------------------------------------------------------------------------

/** An InfluxDB, or what speaks like one. */
export interface Influx {
  /** Its address, without secrets. */
  url: string;
  /** Where lines are posted. */
  write: string;
  /** Where version 1 makes a database. */
  create?: string;
  authorization?: string;
}

/** What follows the host; an @ in it: a password with / ? # was cut, and a part of it seems a host. */
const behind = ({ pathname, search, hash }: URL) => pathname + search + hash;

/** A URL, also a malformed one, without what may be a password. */
const hidden = (url: string) => url.replace(/^(https?:\/\/)?.*@/s, "$1***@");

/** The InfluxDB of INFLUX_URL; a token means the API of versions 2 and 3, none that of version 1. */
export function influx(env: (name: string) => string | undefined): Influx | undefined {
  const text = env("INFLUX_URL");
  if (!text) return undefined;
  const url = URL.parse(text);
  let login: string[] = [];
  try {
    login = [url!.username, url!.password].map(decodeURIComponent);
  } catch { /* no URL, or one with a bare % */ }
  if (!url || !login.length || !/^https?:$/.test(url.protocol) || /@/.test(behind(url))) {
    throw new Error(
      `Cannot read INFLUX_URL: "${hidden(text)}" is not an address like http://localhost:8086; ` +
        "write @ / : # % in a password as %40 %2F %3A %23 %25, or set INFLUX_PASSWORD",
    );
  }
  const base = url.origin + url.pathname.replace(/\/+$/, "");
  const bucket = env("INFLUX_BUCKET") || "pgpulse";
  const token = env("INFLUX_TOKEN");
  if (token) {
    const query = new URLSearchParams({ org: env("INFLUX_ORG") ?? "", bucket });
    return { url: base, write: `${base}/api/v2/write?${query}`, authorization: `Token ${token}` };
  }
  const user = login[0] || env("INFLUX_USER");
  const password = login[1] || env("INFLUX_PASSWORD") || "";
  const name = bucket.replace(/["\\]/g, "\\$&");
  return {
    url: base,
    write: `${base}/write?${new URLSearchParams({ db: bucket })}`,
    create: `${base}/query?${new URLSearchParams({ q: `create database "${name}"` })}`,
    authorization: user ? `Basic ${encodeBase64(`${user}:${password}`)}` : undefined,
  };
}

/** How many lines a refusal speaks of, where the server took all the others; else undefined. */
export function refusedLines(answer: string): number | undefined {
  if (!/partial write/i.test(answer)) return undefined;
  const dropped = [...answer.matchAll(/dropped=(\d+)/g)].reduce((sum, [, n]) => sum + Number(n), 0);
  const named = answer.match(/unable to parse|"original_line"/g)?.length ?? 0;
  return Math.max(1, dropped + named);
}

/** What became of the rows of a piece. */
interface Tally {
  sent: number;
  skipped: number;
  refused: number;
  refusal: string | null;
}

/** A table that is sent, as /healthz shows it. */
interface SinkState {
  /** Rows that waited when it was looked at last, and when none waited for longer than that. */
  waiting: number;
  caughtUp: number;
  sent: number;
  skipped: number;
  refused: number;
  refusal: string | null;
}

/**
 * Sends rows of tables on, each at least once. What is sent stands in the database, in pieces:
 * planned, read, posted in batches, and acknowledged when the server has taken the last of them.
 * Whatever breaks off in between is sent again: the same line twice is the same point.
 */
export class Sinks {
  readonly states = new Map<string, SinkState>();
  #sql = connect({ max: 1, ...READER });
  /** Apart, as reading takes long. */
  #lease = connect({ max: 1, ...READER });
  #me = crypto.randomUUID();
  #leadUntil = 0;
  /** Lines that the server, or a proxy before it, takes at once. */
  #most = SINK_ROWS;
  /** The last line that was taken: taken again, it does no harm, and tells that lines are taken. */
  #good?: string;
  /** Milliseconds that it took to look whether something is to be sent. */
  #cost = 0;
  /** Reasons of refusals that were said, by sink. */
  #said = new Map<string, Set<string>>();
  #signal = new Signal();

  constructor(readonly influx: Influx, readonly relay: Relay) {}

  leading(): boolean {
    return performance.now() < this.#leadUntil && !this.relay.stopped;
  }

  async run(): Promise<void> {
    const lease = this.#keepLease();
    let begun = false;
    let failures = 0;
    while (!this.relay.stopped) {
      let more = false;
      this.#cost = 0;
      try {
        if (this.leading()) {
          if (!begun) await this.#begin();
          begun = true;
          for (const name of await this.#list()) more = await this.#sendPiece(name) || more;
          failures = 0;
        }
      } catch (error) {
        // Where the server takes nothing, it was waited for.
        if (!(error instanceof Unavailable)) {
          this.relay.databaseFailed(error, undefined, "sinks");
          failures++;
        }
      }
      const rest = Math.max(1000 * 2 ** failures, 10 * this.#cost);
      if (!more) await this.#signal.wait(Math.min(rest, 30_000));
    }
    await lease;
  }

  stop(): void {
    this.#signal.fire();
  }

  async end(): Promise<void> {
    await Promise.all([this.#sql, this.#lease].map((sql) => sql.end({ timeout: 0.5 })));
  }

  /** Two that send do no harm, but no good either. */
  async #keepLease(): Promise<void> {
    const hold = (seconds: number) =>
      this.#lease`select pgpulse.hold_lease('sink', ${this.#me}, ${seconds})`.values();
    let standby = false;
    while (!this.relay.stopped) {
      const started = performance.now();
      try {
        const [[held]] = await withTimeout(hold(LEASE_S), 5_000);
        if (held && !this.leading()) this.#signal.fire();
        this.#leadUntil = held ? started + LEASE_S * 1000 : 0;
        if (!held && !standby) {
          console.log("Another relay sends the sinks, or did a moment ago: this one stands by");
        }
        standby = !held;
        this.relay.works("lease of the sinks");
      } catch (error) {
        if (error instanceof TimedOut) {
          const old = [this.#sql, this.#lease];
          this.#sql = connect({ max: 1, ...READER });
          this.#lease = connect({ max: 1, ...READER });
          for (const sql of old) sql.end({ timeout: 0 }).catch(() => {});
        }
        const code = error instanceof TimedOut ? { code: "CONNECT_TIMEOUT" } : error;
        this.relay.databaseFailed(code, undefined, "lease of the sinks");
      }
      await pause(PULSE_MS);
    }
    if (performance.now() < this.#leadUntil) await hold(0).catch(() => {});
  }

  async #begin(): Promise<void> {
    const [[some, added]] = await this.#sql`
      select exists (select from pgpulse.sinks), pgpulse.first_sink()`.values();
    if (added) console.log(`There was no sink: added that of "${added}" (see pgpulse.add_sink)`);
    else if (!some) {
      console.log(
        "There is no sink, so no row is sent; the owner of a table adds one: " +
          "select pgpulse.add_sink('machine_metrics', 'timestamp', " +
          "'{machine_id,metric_type,zone_number}', '{value,target_value}')",
      );
    }
  }

  async #list(): Promise<string[]> {
    const rows = await this.#sql<(Omit<SinkState, "waiting" | "caughtUp"> & { sink: string })[]>`
      select sink, rows_sent::float8 as sent, rows_skipped::float8 as skipped,
        rows_refused::float8 as refused, refusal
      from pgpulse.sinks
      order by 1`;
    this.relay.works("sinks");
    for (const { sink, ...state } of rows) {
      const { waiting = 0, caughtUp = performance.now() } = this.states.get(sink) ?? {};
      this.states.set(sink, { waiting, caughtUp, ...state });
    }
    const names = rows.map(({ sink }) => sink);
    for (const name of this.states.keys()) if (!names.includes(name)) this.states.delete(name);
    return names;
  }

  /** Sends one piece; whether there may be more. */
  async #sendPiece(name: string): Promise<boolean> {
    const { troubles } = this.relay;
    const started = performance.now();
    try {
      const [plan] = await this.#sql<{ piece: string; waiting: number; restarted: boolean }[]>`
        select piece, waiting::float8, restarted from pgpulse.plan_sink(${name})`;
      this.#cost += performance.now() - started;
      const state = this.states.get(name)!;
      state.waiting = plan?.waiting ?? 0;
      if (plan?.restarted) {
        console.error(
          `Sink "${name}" is sent from the beginning: the database was restored into another ` +
            "cluster, where its position means nothing; repeats do no harm",
        );
      }
      const tally = plan && await this.#sendRows(name, plan.piece);
      troubles.over(`sink ${name}`, `Sink "${name}" is sent again`);
      if (tally) {
        await this.#sql`
          select pgpulse.ack_sink(${name}, ${plan.piece}, ${tally.sent}, ${tally.skipped},
            ${tally.refused}, ${tally.refusal})`;
        for (const what of ["sent", "skipped", "refused"] as const) {
          state[what] += tally[what];
          state.waiting = Math.max(0, state.waiting - tally[what]);
        }
      }
      if (state.waiting === 0) state.caughtUp = started;
      return Boolean(plan);
    } catch (error) {
      const { code = "", message, severity } = error as Record<string, string>;
      if (!severity || /^(08|28|3D|53|57P|58)|^42P01|^42883|^3F000/.test(code)) throw error;
      troubles.say(
        `sink ${name}`,
        `Cannot read sink "${name}": ${message}; look at its table and expressions in pgpulse.sinks`,
      );
      return false;
    }
  }

  /** Posts the rows of a piece while the next ones are read; nothing where it is no longer open. */
  async #sendRows(name: string, piece: string): Promise<Tally | undefined> {
    // By hand: the driver's own transactions end the process when their connection is lost.
    const sql = this.#sql;
    await sql.unsafe("begin read only");
    try {
      const [[cursor]] = await sql`select pgpulse.read_sink(${name}, ${piece})`.values();
      if (!cursor) return undefined;
      const fetch = () => {
        const rows = sql.unsafe(`fetch ${SINK_ROWS} from ${cursor}`).values().execute();
        rows.catch(() => {});
        return rows;
      };
      const tally: Tally = { sent: 0, skipped: 0, refused: 0, refusal: null };
      let posting = Promise.resolve();
      for (let next = fetch(), rows; (rows = await next).length;) {
        next = fetch();
        const lines = rows.flatMap(([line]) => line ?? []) as string[];
        tally.skipped += rows.length - lines.length;
        await posting;
        posting = this.#post(name, lines, tally);
        posting.catch(() => {});
      }
      await posting;
      return tally;
    } finally {
      await sql.unsafe("rollback").catch(() => {});
    }
  }

  /** Posts lines until the server has taken or refused each of them. */
  async #post(name: string, lines: string[], tally: Tally): Promise<void> {
    const half = lines.length >> 1;
    const split = async () => {
      await this.#post(name, lines.slice(0, half), tally);
      await this.#post(name, lines.slice(half), tally);
    };
    if (!lines.length) return;
    const body = lines.join("\n");
    if (half && (lines.length > this.#most || body.length > SINK_SIZE)) return await split();
    const failure = await this.#offer(body, half ? undefined : name);
    if (!failure) {
      this.#good = lines.at(-1);
      tally.sent += lines.length;
      return;
    }
    if (failure.status === 413) this.#most = Math.max(1, half);
    const refused = half ? refusedLines(failure.text) : 1;
    if (failure.status === 413 && half || !refused) return await split();
    const count = Math.min(refused, lines.length);
    tally.sent += lines.length - count;
    tally.refused += count;
    tally.refusal = `Status ${failure.status}: ${failure.text.trim().slice(0, 500)}`;
    this.#sayRefusal(name, count, lines, tally.refusal);
  }

  /** Each reason once, and not more than five: they may quote the line. */
  #sayRefusal(name: string, count: number, lines: string[], refusal: string): void {
    const said = this.#said.get(name) ?? new Set();
    this.#said.set(name, said);
    const reason = refusal.replace(/dropped=\d+/g, "");
    if (said.has(reason) || said.size >= 5) return;
    said.add(reason);
    console.error(
      `"${this.influx.url}" refuses ${count} of ${lines.length} rows of sink "${name}", which go on ` +
        `without: ${refusal}${lines.length === 1 ? ` Line: ${lines[0].slice(0, 200)}` : ""}` +
        (said.size === 5 ? "; further ones are only counted, in pgpulse.sinks" : ""),
    );
  }

  /**
   * Offers a batch, or a single line of the sink `lone`, until it is taken or refused for what is in
   * it; throws Unavailable in the end.
   */
  async #offer(text: string, lone?: string): Promise<Refused | undefined> {
    const { influx, relay: { troubles } } = this;
    const body = packed(text);
    const key = `influx ${influx.url}`;
    const end = performance.now() + SINK_PATIENCE_MS;
    for (let failures = 0;; failures++) {
      let failure: Refused | undefined;
      let cause: string;
      try {
        failure = await this.#call(influx.write, body);
        if (!failure) troubles.over(key, `"${influx.url}" takes rows again`);
        if (!failure) return undefined;
        const judged = [400, 413, 422].includes(failure.status);
        if (judged && (!lone || await this.#means(lone, failure))) return failure;
        // Version 1 makes its databases by a query; tried once an outage.
        const lacks = failure.status === 404 && influx.create &&
          /database not found/i.test(failure.text);
        if (lacks && failures === 0 && !await this.#call(influx.create!)) {
          const name = new URL(influx.write).searchParams.get("db");
          console.log(`Made the database "${name}" (INFLUX_BUCKET) in "${influx.url}"`);
          continue;
        }
        const advice: Record<string, string> = {
          400: "correct INFLUX_URL, INFLUX_BUCKET or INFLUX_ORG",
          401: "correct INFLUX_TOKEN, or INFLUX_USER and INFLUX_PASSWORD",
          403: "it may not write there; give its token or user that right",
          404: "make the bucket there, or correct INFLUX_BUCKET, INFLUX_ORG or INFLUX_URL",
        };
        const text = failure.text.trim().slice(0, 200);
        cause = `status ${failure.status}: ${
          [text, advice[failure.status]].filter(Boolean).join("; ")
        }`;
      } catch (error) {
        cause = `it cannot be reached (${reason(error)}); is it running?`;
      }
      troubles.say(
        key,
        `Cannot send rows to "${influx.url}", which wait in the database: ${cause}`,
      );
      const rest = Number(failure?.retryAfter) * 1000 || Math.min(250 * 2 ** failures, 30_000);
      if (!this.leading() || performance.now() + rest > end) {
        await this.#signal.wait(this.leading() ? Math.min(rest, 30_000) : 0);
        throw new Unavailable();
      }
      await this.#signal.wait(rest * (0.75 + Math.random() / 2));
    }
  }

  /** Whether a refusal means the line, and not whatever comes: then nothing may go on without it. */
  async #means(sink: string, { text }: Refused): Promise<boolean> {
    if (/partial write|dropped=/i.test(text)) return true;
    if (/unable to parse|original_line/.test(text) && text.includes(sink)) return true;
    return Boolean(this.#good) && !await this.#call(this.influx.write, packed(this.#good!));
  }

  /** Posts; gives what was answered where that is no success. */
  async #call(url: string, body?: Uint8Array<ArrayBuffer>): Promise<Refused | undefined> {
    const { authorization } = this.influx;
    const response = await fetch(url, {
      method: "POST",
      body,
      headers: {
        ...authorization && { authorization },
        ...body && { "content-encoding": "gzip", "content-type": "text/plain; charset=utf-8" },
      },
      redirect: "manual",
      signal: AbortSignal.timeout(30_000),
    });
    const text = await response.text();
    if (response.ok) return undefined;
    return new Refused(response.status, text, response.headers.get("retry-after"));
  }
}

const packed = (text: string) => new Uint8Array(gzipSync(text, { level: 1 }));

/** The server takes nothing at present. */
class Unavailable extends Error {}

// --- the relay ------------------------------------------------------------------------------------

/** Streams, Grafanas, and what they share: the database, the lead, the hints. */
export class Relay {
  readonly troubles = new Troubles();
  readonly streams = new Map<string, Stream>();
  /** Values of split streams that panels look at, by pgpulse.watch_stream. */
  readonly watched = new Map<string, Set<string>>();
  readonly grafanas: Grafana[] = [];
  sinks?: Sinks;
  readonly #watchers = new Set<Signal>();
  readonly #me = crypto.randomUUID();
  stopped = false;
  listening = false;
  reconnects = 0;
  lastLoop = performance.now();
  sql = connect({ max: 4, ...READER });
  /** Reads at once; one connection stays free for what must not wait. */
  readonly quick = new Lane(2);
  readonly slow = new Lane(1);
  /** For the lead and the registry, which no slow view is to hold up. */
  #own = connect({ max: 1, ...READER });
  #listener?: postgres.Sql;
  #listenerAt = -Infinity;
  #echo = -Infinity;
  /** Since when LISTEN does not work although the database answers. */
  #deaf = performance.now();
  #leadUntil = 0;
  #standby = false;
  #clock = Date.now() - performance.now();
  #reload = new Signal();
  #pulse = new Signal();
  #done: Promise<unknown> = Promise.resolve();
  #halt = Promise.withResolvers<void>();
  #halted?: Promise<void>;
  #stale = true;
  /** Parts that cannot use the database: streams, the registry, the pulse. */
  #failing = new Set<string>();

  /** The database's clock, in milliseconds since 1970. */
  now(): number {
    return this.#clock + performance.now();
  }

  leading(): boolean {
    return performance.now() < this.#leadUntil;
  }

  *channels(): Generator<Channel> {
    for (const stream of this.streams.values()) yield* stream.channels.values();
  }

  /** Some window changed. */
  changed(): void {
    for (const grafana of this.grafanas) grafana.wake();
    for (const watcher of this.#watchers) watcher.fire();
  }

  /** A signal that fires at every change, for as long as it is used. */
  watch(): Signal & Disposable {
    const signal = Object.assign(new Signal(), {
      [Symbol.dispose]: () => void this.#watchers.delete(signal),
    });
    this.#watchers.add(signal);
    return signal;
  }

  /** Runs a query that only reads; rows as arrays. Cancelled after 15 s. */
  async query(text: string, parameters: unknown[]): Promise<unknown[][]> {
    const query = this.sql.unsafe(text, parameters as never[], { prepare: true });
    // Not query.cancel(), which lets nobody catch that the database cannot be reached for it.
    const { canceller } = query as unknown as { canceller: (q: unknown) => Promise<void> };
    const timer = setTimeout(() => canceller(query).catch(() => {}), 15_000);
    try {
      return await query.values() as unknown as unknown[][];
    } finally {
      clearTimeout(timer);
    }
  }

  /** A stream, or another part of the relay, has reached the database. */
  works(part: string): void {
    this.#failing.delete(part);
    if (!this.#failing.size) this.troubles.over("database", "The database answers again");
  }

  /** Says what is wrong, with the stream or with the whole database. */
  databaseFailed(error: unknown, stream?: string, part = stream ?? "registry"): void {
    const { code = "", message, severity } = error as Record<string, string>;
    // Ended by this program itself, for a reason that was said.
    if (/^CONNECTION_(DESTROYED|ENDED)$/.test(code)) return;
    if (stream && severity && !/^(08|28|3D|53|57P|58)/.test(code)) {
      this.works(stream);
      const reason = code === "57014" ? "it took more than 15 s" : message;
      this.troubles.say(
        `read ${stream}`,
        `Cannot read stream "${stream}": ${reason}; look at its view live.${stream}`,
      );
      if (code.startsWith("42")) this.#load();
    } else {
      this.#failing.add(part);
      // A missing schema or function is as much migrate's business as a missing table.
      const missing = code === "3F000" || code === "42883";
      this.troubles.say(
        "database",
        explain(missing ? { code: "42P01", message } : error, this.sql),
      );
    }
  }

  #load(): void {
    this.#stale = true;
    this.#reload.fire();
  }

  /** Keeps `streams` as the registry has it. */
  async #keepStreams(): Promise<void> {
    while (!this.stopped) {
      this.#stale = false;
      let rest = 30_000;
      try {
        const plans = await this.#own<Plan[]>`select * from pgpulse.stream_plans()`;
        this.works("registry");
        const names = new Set<string>();
        for (const plan of plans) {
          if (plan.fault) {
            this.troubles.say(
              `plan ${plan.stream}`,
              `Stream "${plan.stream}" is not shown: ${plan.fault}`,
            );
            continue;
          }
          this.troubles.over(`plan ${plan.stream}`, `Stream "${plan.stream}" is shown again`);
          names.add(plan.stream);
          const known = this.streams.get(plan.stream);
          if (known && JSON.stringify(known.plan) === JSON.stringify(plan)) continue;
          known?.stop();
          const stream = new Stream(plan, this);
          this.streams.set(plan.stream, stream);
          stream.run();
        }
        for (const [name, stream] of this.streams) {
          if (names.has(name)) continue;
          stream.stop();
          this.streams.delete(name);
        }
        this.troubles.keep(new Set(plans.map(({ stream }) => stream)));
        this.changed();
      } catch (error) {
        this.databaseFailed(error);
        rest = 2_000;
      }
      if (!this.#stale) await this.#reload.wait(rest);
    }
  }

  /** Renews the lead, asks for an echo of its own NOTIFY, reads the clock. */
  async #keepPulse(): Promise<void> {
    const places = this.grafanas.map(({ url }) => placeOf(url)).sort();
    // Relays that push nowhere have nothing to lead.
    const lease = places.length ? `relay for ${places.join(" ")}` : undefined;
    let readOnlyUntil = 0;
    while (!this.stopped) {
      const started = performance.now();
      this.lastLoop = started;
      try {
        const writes = started > readOnlyUntil;
        const pulse = this.#own.unsafe(
          "select extract(epoch from clock_timestamp())::float8 * 1000" +
            (writes && lease ? ", pgpulse.hold_lease($2, $1, $3)" : ", true") +
            (writes ? ", pg_notify('pgpulse', 'echo ' || $1)" : ""),
          [...writes ? [this.#me] : [], ...writes && lease ? [lease, LEASE_S] : []],
        ).values();
        const [[ms, leads]] = await withTimeout(pulse, 5_000);
        this.works("pulse of the relay");
        for (const part of this.#failing) this.streams.get(part)?.retry.fire();
        // A replica has no leases.
        if (writes) await withTimeout(this.#readWatches(), 5_000);
        this.#clock = ms - (started + performance.now()) / 2;
        const led = this.leading();
        this.#leadUntil = leads ? started + LEASE_S * 1000 : 0;
        if (leads && !led) this.#lead();
        if (!leads && !this.#standby) {
          console.log("Another relay leads, or did a moment ago: this one stands by");
        }
        this.#standby = !leads;
        if (writes) this.troubles.over("read-only", "The database takes writes again");
        else this.listening = false;
      } catch (error) {
        const { code } = error as { code?: string };
        if (code === "25006") {
          readOnlyUntil = started + 30_000;
          this.troubles.say(
            "read-only",
            "The database is read-only (a replica?): no LISTEN and no lease here, so tables are " +
              "read on the beat, and two relays would both push",
          );
        } else if (error instanceof TimedOut) {
          // A half-open connection never fails by itself: begin anew.
          this.databaseFailed({ code: "CONNECT_TIMEOUT" }, undefined, "pulse of the relay");
          const old = [this.sql, this.#own];
          this.sql = connect({ max: 4, ...READER });
          this.#own = connect({ max: 1, ...READER });
          this.reconnects++;
          for (const sql of old) sql.end({ timeout: 0 }).catch(() => {});
        } else {
          this.databaseFailed(error, undefined, "pulse of the relay");
        }
      }
      this.#keepListening();
      await this.#pulse.wait(PULSE_MS);
    }
    if (!lease || !this.leading()) return;
    await this.#own`select pgpulse.hold_lease(${lease}, ${this.#me}, 0)`.catch(() => {});
  }

  /** Only where there is a stream with a slow beat. */
  async #readWatches(): Promise<void> {
    if (![...this.streams.values()].some(({ plan }) => plan.slow_ms)) return;
    const answer = await this.#own<{ stream: string; value: string }[]>`
      select stream, value from pgpulse.watches where until > clock_timestamp()`;
    const before = new Map(this.watched);
    this.watched.clear();
    for (const { stream, value } of answer) {
      this.watched.set(stream, (this.watched.get(stream) ?? new Set()).add(value));
    }
    for (const [stream, values] of this.watched) {
      if (!values.isSubsetOf(before.get(stream) ?? new Set())) this.streams.get(stream)?.hint();
    }
  }

  #lead(): void {
    if (this.#standby) console.log("This relay leads now");
    for (const grafana of this.grafanas) grafana.forget();
  }

  /** LISTEN can be dead without a sign (poolers, half-open connections): only an echo proves it. */
  #keepListening(): void {
    const now = performance.now();
    const alive = now - this.#echo < 3.5 * PULSE_MS;
    if (alive !== this.listening) {
      this.listening = alive;
      if (alive) {
        this.troubles.over("listen", "LISTEN works: streams are pushed as soon as they change");
      }
    }
    if (alive || this.troubles.has("database")) this.#deaf = now;
    if (alive || now - this.#listenerAt < 5_000) return;
    if (now - this.#deaf > 10_000) {
      this.troubles.say(
        "listen",
        "LISTEN does not work here (a pooler in transaction mode, or a replica): tables are read on " +
          "the beat instead; set LISTEN_DATABASE_URL to the database's own address for quicker panels",
      );
    }
    this.#listenerAt = now;
    this.#listener?.end({ timeout: 0 }).catch(() => {});
    const listener = this.#listener = connect({ max: 1, ...READER }, "LISTEN_DATABASE_URL");
    // Not waited for: where nobody answers, the lead would be lost.
    withTimeout(
      listener.listen("pgpulse", (payload) => this.#heard(payload), () => this.reconnects++),
      5_000,
    ).catch(() => {});
  }

  #heard(payload: string): void {
    if (payload === `echo ${this.#me}`) {
      this.#echo = performance.now();
      if (!this.listening) {
        this.listening = true;
        this.troubles.over(
          "listen",
          "LISTEN works again: streams are pushed as soon as they change",
        );
        // Hints may have been missed.
        this.#load();
        for (const stream of this.streams.values()) stream.hint();
      }
      return;
    }
    if (payload === "pgpulse.streams") this.#load();
    for (const stream of this.streams.values()) {
      if (stream.plan.tables.includes(payload)) stream.hint();
    }
  }

  /** Works until it is stopped. */
  async run(): Promise<void> {
    this.#done = Promise.all([
      this.#keepPulse(),
      this.#keepStreams(),
      ...this.grafanas.map((grafana) => grafana.run()),
      this.sinks?.run(),
    ]);
    await Promise.race([this.#done, this.#halt.promise]);
  }

  /** Ends the loops and gives the lead back. */
  stop(): Promise<void> {
    return this.#halted ??= this.#stop();
  }

  async #stop(): Promise<void> {
    this.stopped = true;
    this.#halt.resolve();
    for (const stream of this.streams.values()) stream.stop();
    this.#reload.fire();
    this.changed();
    this.#pulse.fire();
    this.sinks?.stop();
    await Promise.race([this.#done, pause(1_000)]);
    const all = [this.sql, this.#own, this.#listener];
    await Promise.all([...all.map((sql) => sql?.end({ timeout: 0.5 })), this.sinks?.end()])
      .catch(() => {});
  }
}

/** The address, with this host's name where it means this host. */
function placeOf(url: string): string {
  const { hostname } = new URL(url);
  const here = hostname === "localhost" || hostname === "[::1]" || hostname.startsWith("127.");
  return here ? `${Deno.hostname()} ${url}` : url;
}

/** A panel that shows a channel, for a dashboard's JSON. */
export function panel(channel: { address: string; label: string; rows: number }, type: string) {
  return {
    type,
    title: channel.label,
    datasource: { type: "datasource", uid: "-- Grafana --" },
    gridPos: { h: 8, w: 12, x: 0, y: 0 },
    // Browsers keep twice as many rows: exactly one window, so that each frame replaces the last.
    maxDataPoints: channel.rows / 2,
    targets: [{
      refId: "A",
      datasource: { type: "datasource", uid: "-- Grafana --" },
      queryType: "measurements",
      channel: channel.address,
      buffer: 31_536_000_000,
    }],
    fieldConfig: { defaults: {}, overrides: [] },
    options: {},
  };
}

// --- HTTP ------------------------------------------------------------------------------------------

const PAGE = `<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>pgpulse</title>
<style>
${uplotCss}
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }
body { margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap }
h1 { font-size: 1.3rem; margin: 0 }
#state { color: #888 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1rem; margin-top: 1rem }
section { border: 1px solid #8884; border-radius: 8px; padding: .75rem 1rem }
h2 { font-size: 1rem; margin: 0; display: flex; justify-content: space-between }
h2 b { font-variant-numeric: tabular-nums }
p { color: #888 }
.u-legend { font-size: .8rem }
</style>
<header><h1>pgpulse</h1><span id="state">connecting</span></header>
<main></main>
<script>${uplotJs.replaceAll("</script", "<\\/script")}</script>
<script>
const COLOURS = ["#5794f2", "#73bf69", "#f2cc0c", "#ff780a", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d"];
const charts = new Map();
const state = document.querySelector("#state");
const dark = matchMedia("(prefers-color-scheme: dark)").matches;

class Chart {
  constructor(channel) {
    this.rows = new Map();
    this.element = document.createElement("section");
    this.element.innerHTML = "<h2><span></span><b></b></h2><div></div>";
    this.element.querySelector("span").textContent = channel;
    document.querySelector("main").append(this.element);
  }
  take(message, whole) {
    if (whole) this.rows.clear();
    for (const row of message.rows) {
      const labels = message.labels.map((name) => row[name]).join(" ");
      this.rows.set(row.time + labels, { at: Date.parse(row.time) / 1000, labels, row });
    }
    this.fields = message.fields;
    const times = [...new Set([...this.rows.values()].map((r) => r.at))].sort((a, b) => a - b);
    const first = times[Math.max(0, times.length - message.size)];
    for (const [key, { at }] of this.rows) if (at < first) this.rows.delete(key);
    this.due ??= requestAnimationFrame(() => this.draw());
  }
  draw() {
    this.due = undefined;
    const rows = [...this.rows.values()].sort((a, b) => a.at - b.at);
    const times = [...new Set(rows.map((r) => r.at))];
    const at = new Map(times.map((t, i) => [t, i]));
    const series = new Map();
    for (const { at: t, labels, row } of rows) {
      for (const field of this.fields) {
        const name = [labels, this.fields.length > 1 || !labels ? field : ""].filter(Boolean).join(" ");
        if (!series.has(name)) series.set(name, new Array(times.length).fill(null));
        const value = row[field];
        series.get(name)[at.get(t)] = Number.isFinite(value) ? value : null;
      }
    }
    const names = [...series.keys()].sort();
    const data = [times, ...names.map((name) => series.get(name))];
    const last = names.length === 1 && data[1].findLast((v) => v !== null);
    this.element.querySelector("b").textContent = Number.isFinite(last) ? +last.toPrecision(5) : "";
    if (this.plot && this.names === names.join()) return this.plot.setData(data);
    this.names = names.join();
    this.plot?.destroy();
    const axis = { stroke: dark ? "#bbb" : "#555", grid: { stroke: "#8883", width: 1 }, ticks: { stroke: "#8883" } };
    this.plot = new uPlot({
      width: this.element.clientWidth - 32,
      height: 200,
      // As wide as its longest number.
      axes: [axis, {
        ...axis,
        size: (_, labels) => 24 + 7 * Math.max(3, ...(labels ?? []).map((label) => label.length)),
      }],
      legend: { show: names.length > 1 && names.length < 12 },
      series: [{}, ...names.map((label, i) => ({
        label, stroke: COLOURS[i % COLOURS.length], width: 1.5, spanGaps: true, points: { show: times.length < 2 },
      }))],
    }, data, this.element.querySelector("div"));
  }
}

const source = new EventSource("streams");
const take = (whole) => ({ data }) => {
  const message = JSON.parse(data);
  if (!charts.has(message.channel)) charts.set(message.channel, new Chart(message.channel));
  charts.get(message.channel).take(message, whole);
  state.textContent = charts.size + (charts.size === 1 ? " stream" : " streams") + ", live";
};
source.addEventListener("window", take(true));
source.addEventListener("rows", take(false));
source.onerror = () => state.textContent = "the relay is away; it is tried again";
addEventListener("resize", () => {
  for (const { plot, element } of charts.values()) plot?.setSize({ width: element.clientWidth - 32, height: 200 });
});
</script>
`;

/** What the relay serves over HTTP. */
export function serve(relay: Relay): Hono {
  const app = new Hono();
  // Whoever asks for one channel watches it; of a stream those are shown that run at full beat.
  const find = (name?: string) =>
    [...relay.channels()].filter((c) => {
      if (c.name === name && c.plan.slow_ms) c.watchedUntil = performance.now() + 15_000;
      return c.name === name || !c.resting && (!name || c.plan.stream === name);
    });

  app.get("/", (c) => c.html(PAGE));

  app.get("/healthz", (c) => {
    const works = performance.now() - relay.lastLoop < 30_000;
    const body = {
      status: !works ? "hangs" : relay.troubles.list().length ? "degraded" : "ok",
      leading: relay.leading(),
      listening: relay.listening,
      streams: relay.streams.size,
      sinks: relay.sinks && sinkReport(relay.sinks),
      troubles: relay.troubles.list(),
    };
    return c.json(body, works ? 200 : 503);
  });

  app.get(
    "/metrics",
    (c) => c.text(metrics(relay), 200, { "content-type": "text/plain; version=0.0.4" }),
  );

  app.get("/streams/:name{.+}?", (c) => {
    const name = c.req.param("name");
    const found = find(name);
    if (name && !found.length) {
      return c.json({ error: `There is no stream "${name}"; GET /streams lists them` }, 404);
    }
    if (!name && !c.req.header("accept")?.includes("text/event-stream")) {
      return c.json(found.map((channel) => ({
        channel: channel.name,
        address: `stream/${channel.plan.stream_id}/${channel.name}`,
        rows: channel.plan.rows,
        labels: channel.plan.labels,
        fields: channel.plan.fields,
      })));
    }
    return events(c, relay, () => find(name));
  });
  app.get("/streams/", (c) => c.redirect("/streams"));
  return app;
}

/** What is sent on, and what waits: how many rows (it counts to 100,001), and for how long. */
function sinkReport(sinks: Sinks) {
  const tables = [...sinks.states].map(([sink, { caughtUp, ...state }]) => ({
    sink,
    ...state,
    behind_s: Math.round((performance.now() - caughtUp) / 1000),
  }));
  return { url: sinks.influx.url, leading: sinks.leading(), tables };
}

/** Server-sent events of some channels: each whole first, then what is new or has changed. */
function events(c: Context, relay: Relay, channels: () => Channel[]) {
  return streamSSE(c, async (stream) => {
    using signal = relay.watch();
    stream.onAbort(() => signal.fire());
    const seen = new WeakMap<Channel, { version: number; lines: Map<string, number> }>();
    let quietSince = performance.now();
    while (!stream.aborted && !relay.stopped) {
      for (const channel of channels()) {
        const last = seen.get(channel);
        if (last?.version === channel.version || channel.resting) continue;
        const rows = channel.rows();
        const lines = new Map(rows.map((row) => [row.line, row.ms]));
        seen.set(channel, { version: channel.version, lines });
        const fresh = rows.filter((row) => !last?.lines.has(row.line));
        // Rows that went without being the oldest were deleted or changed: then all is told again.
        const oldest = rows[0]?.ms ?? -Infinity;
        const whole = !last ||
          [...last.lines].some(([line, ms]) => ms >= oldest && !lines.has(line));
        if (!whole && !fresh.length) continue;
        const event = whole ? "window" : "rows";
        const { name, plan } = channel;
        await stream.writeSSE({
          event,
          data: JSON.stringify({
            channel: name,
            size: plan.rows,
            labels: plan.labels,
            fields: plan.fields,
            rows: (event === "window" ? rows : fresh).map((row) => channel.json(row)),
          }),
        });
        quietSince = performance.now();
      }
      if (performance.now() - quietSince > 15_000) {
        await stream.write(": still here\n\n");
        quietSince = performance.now();
      }
      // What changed while something was written set off a signal that nobody waited for.
      const missed = channels().some((channel) =>
        !channel.resting && seen.get(channel)?.version !== channel.version
      );
      if (missed) continue;
      await signal.wait(5_000);
    }
  });
}

/** Everything worth watching, in Prometheus' text format. */
function metrics(relay: Relay): string {
  const out: string[] = [];
  const metric = (name: string, type: string, help: string, samples: [string, number][]) => {
    out.push(`# HELP pgpulse_relay_${name} ${help}`, `# TYPE pgpulse_relay_${name} ${type}`);
    for (const [labels, value] of samples) out.push(`pgpulse_relay_${name}${labels} ${value}`);
  };
  const label = (name: string, value: string) => `${name}=${JSON.stringify(value)}`;
  const grafana = <T>(value: (g: Grafana) => T) =>
    relay.grafanas.map((g) =>
      [`{${label("grafana", g.url)}}`, Number(value(g))] as [string, number]
    );
  const stream = (value: (s: Stream) => number) =>
    [...relay.streams.values()].map((s) =>
      [`{${label("stream", s.plan.stream)}}`, value(s)] as [string, number]
    );
  metric("leading", "gauge", "1 while this relay pushes.", [["", Number(relay.leading())]]);
  metric("listening", "gauge", "1 while LISTEN is proven to work.", [[
    "",
    Number(relay.listening),
  ]]);
  metric("reconnects_total", "counter", "Connections to the database made for LISTEN or anew.", [[
    "",
    relay.reconnects,
  ]]);
  metric("troubles", "gauge", "Troubles that last.", [["", relay.troubles.list().length]]);
  metric("channels", "gauge", "Channels of each stream.", stream((s) => s.channels.size));
  metric(
    "channels_resting",
    "gauge",
    "Those of them that nobody watches, on their slow beat.",
    stream((s) => [...s.channels.values()].filter((c) => c.resting).length),
  );
  metric("reads_total", "counter", "Reads of each stream's view.", stream((s) => s.reads));
  metric(
    "read_seconds_total",
    "counter",
    "Time spent in those reads.",
    stream((s) => s.readSeconds),
  );
  metric(
    "lag_seconds",
    "gauge",
    "Age of the newest row when it was last read.",
    stream((s) => s.lag),
  );
  metric("grafana_up", "gauge", "1 while Grafana takes frames.", grafana((g) => g.healthy));
  metric("frames_total", "counter", "Windows that Grafana took.", grafana((g) => g.frames));
  metric("bytes_total", "counter", "Bytes of those windows.", grafana((g) => g.bytes));
  metric(
    "errors_total",
    "counter",
    "Pushes that failed, by status.",
    relay.grafanas.flatMap((g) =>
      [...g.errors].map(([status, n]) =>
        [`{${label("grafana", g.url)},${label("status", status)}}`, n] as [string, number]
      )
    ),
  );
  const { leading = false, tables = [] } = relay.sinks ? sinkReport(relay.sinks) : {};
  const sink = (value: (s: typeof tables[0]) => number) =>
    tables.map((s) => [`{${label("sink", s.sink)}}`, value(s)] as [string, number]);
  metric("sink_leading", "gauge", "1 while this relay sends the sinks.", [["", Number(leading)]]);
  metric("sink_behind_seconds", "gauge", "Since when rows wait.", sink((s) => s.behind_s));
  metric("sink_waiting", "gauge", "Rows that wait, counted to 100,001.", sink((s) => s.waiting));
  metric("sink_rows_total", "counter", "Rows that were taken.", sink((s) => s.sent));
  metric("sink_skipped_total", "counter", "Rows without fields.", sink((s) => s.skipped));
  metric("sink_refused_total", "counter", "Rows that were refused.", sink((s) => s.refused));
  return out.join("\n") + "\n";
}

// --- command line ------------------------------------------------------------------------------------

/** A size as 800, 500kB or 2MB, in bytes. */
export function bytes(text: string): number {
  const [, number, unit] = /^(\d+(?:\.\d+)?)\s*(|k|m)b?$/i.exec(text) ?? [];
  const size = Number(number) * { "": 1, k: 1e3, m: 1e6 }[unit?.toLowerCase() ?? ""]!;
  if (!(size >= 1000)) throw new Error(`Cannot read the size "${text}": write it as 500kB or 2MB`);
  return size;
}

/** Each Grafana's address with its way to sign in. */
export function targets(
  env: (name: string) => string | undefined,
): { url: string; signIn: SignIn }[] {
  const list = (text = "") => text.split(",").map((part) => part.trim()).filter(Boolean);
  const tokens = list(env("GRAFANA_TOKEN") || env("GRAFANA_API_KEY"));
  const urls = list(env("GRAFANA_URL")).map((text) => {
    const url = URL.parse(text);
    if (!url || !/^https?:$/.test(url.protocol) || /@/.test(behind(url))) {
      throw new Error(
        `Cannot read GRAFANA_URL: "${hidden(text)}" is not an address like http://localhost:3000`,
      );
    }
    return url.origin + url.pathname.replace(/\/+$/, "");
  });
  if (tokens.length && tokens.length !== urls.length) {
    throw new Error(
      `Cannot match ${tokens.length} tokens of GRAFANA_TOKEN with ${urls.length} addresses of ` +
        `GRAFANA_URL: give as many of both, in one order`,
    );
  }
  return urls.map((url, i) => ({
    url,
    signIn: {
      token: tokens[i],
      user: env("GF_SECURITY_ADMIN_USER") || env("GRAFANA_ADMIN_USER") || "admin",
      password: env("GF_SECURITY_ADMIN_PASSWORD") || env("GRAFANA_ADMIN_PASSWORD"),
    },
  }));
}

async function main(args: string[]): Promise<number> {
  const { values } = parseArgs({
    args,
    options: {
      port: { type: "string" },
      listen: { type: "string", default: "127.0.0.1" },
      budget: { type: "string", default: "1MB" },
      state: { type: "string", default: ".pgpulse/relay-tokens.json" },
      panel: { type: "string" },
      type: { type: "string", default: "timeseries" },
      help: { type: "boolean", short: "h" },
    },
  });
  if (values.help) {
    console.log(HELP);
    return 0;
  }
  if (values.panel) return await printPanel(values.panel, values.type);
  const port = Number(values.port ?? (Deno.env.get("RELAY_PORT") || 8090));
  if (!Number.isInteger(port) || port < 0 || port > 65535) {
    throw new Error(
      `Cannot listen on port "${values.port ?? Deno.env.get("RELAY_PORT")}": give 1 to 65535`,
    );
  }
  const relay = new Relay();
  const budget = bytes(values.budget);
  for (const { url, signIn } of targets((name) => Deno.env.get(name))) {
    relay.grafanas.push(new Grafana(url, signIn, budget, values.state, relay));
  }
  const target = influx((name) => Deno.env.get(name));
  if (target) relay.sinks = new Sinks(target, relay);
  let server;
  try {
    server = Deno.serve({ port, hostname: values.listen, onListen: () => {} }, serve(relay).fetch);
  } catch (error) {
    if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    throw new Error(
      `Cannot listen on "${values.listen}:${port}": the port is taken; choose one with --port`,
    );
  }
  const { hostname, port: taken } = server.addr as Deno.NetAddr;
  const to = relay.grafanas.map(({ url }) => url).join(" and ") ||
    "no Grafana (GRAFANA_URL is not set)";
  console.log(`Serves streams at http://${hostname}:${taken}/, pushes to ${to}`);
  if (target) console.log(`Sends rows to "${target.url}"`);
  const stop = () => relay.stop();
  Deno.addSignalListener("SIGINT", stop);
  if (Deno.build.os !== "windows") Deno.addSignalListener("SIGTERM", stop);
  await relay.run();
  await relay.stop();
  await Promise.race([server.shutdown(), pause(500)]);
  return 0;
}

async function printPanel(stream: string, type: string): Promise<number> {
  const sql = connect({ max: 1, ...READER });
  try {
    const channels = await sql<
      { stream: string; channel: string; address: string; label: string; rows: number }[]
    >`
      select stream, channel, address, label, rows
      from pgpulse.channels
      where stream = ${stream} or channel = ${stream}
      order by channel = ${stream} desc, channel`;
    if (!channels.length) {
      const known = await sql`select stream from pgpulse.streams order by 1`;
      throw new Error(
        `Cannot print a panel of "${stream}": there is no such stream, only ` +
          `${known.map((row) => `"${row.stream}"`).join(", ")}; add one with pgpulse.add_stream`,
      );
    }
    console.log(JSON.stringify(panel(channels[0], type), null, 2));
    if (channels.length > 1) {
      console.error(
        `Stream "${stream}" has ${channels.length} channels, this is the first. To choose by a ` +
          `dashboard variable, make one named "channel" of the query\n` +
          `  select label as __text, address as __value from pgpulse.channels where stream = '${stream}'\n` +
          "and write ${channel} as the channel of the panel",
      );
    }
    return 0;
  } catch (error) {
    throw error instanceof postgres.PostgresError || (error as { code?: string }).code
      ? new Error(explain(error, sql))
      : error;
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

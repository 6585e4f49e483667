/**
 * Makes rows that look like measurements: a live trickle, or years of history.
 *
 *     deno run --no-prompt --allow-env=PG*,DATABASE_URL,DB_* --allow-net --allow-read generate.ts
 *
 * Needs: PostgreSQL 15 or later, the tables of `deno task migrate`, insert and select on them.
 * Costs: live, 60 MB of memory and next to no CPU (some 10 % of a core at 1 ms); `--backfill`
 *        keeps a core of the database busy, and half a core here. 2 MB of disk a day at 5 s.
 */
import { pipeline } from "node:stream/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";

// --- what can be made: a new word is one entry of SOURCES ----------------------------------

type Value = number | string | null;
type Type = "float8" | "int" | "text" | "timestamptz";

/** What one table gets. */
export interface Table {
  /** Column names and types; the first is the time, in ms. */
  columns: Record<string, Type>;
  /** The rows of one tick: always the same for the same seed and time. */
  rows(seed: number, time: number): Value[][];
}

/** What one word on the command line makes. */
export interface Source {
  help: string;
  /** Default of `--interval`. */
  interval: string;
  /** All are written in one transaction; the first has a row at every tick. */
  tables: Record<string, Table>;
}

const sensor: Table = {
  columns: { timestamp: "timestamptz", value: "float8" },
  rows: (seed, time) => [[time, level(seed, time)]],
};

export const SOURCES: Record<string, Source> = {
  metrics: {
    help: "one sensor, 0 to 100, into metrics",
    interval: "5s",
    tables: { metrics: sensor },
  },
  live: {
    help: "one sensor, 0 to 100, into live_metrics",
    interval: "1s",
    tables: { live_metrics: sensor },
  },
};

/** A level between 0 and 100: a swing that peaks each day at 15:00 UTC, a walk and some jitter. */
export function level(seed: number, time: number): number {
  const day = Math.sin((time / 86_400_000 - 0.375) * 2 * Math.PI);
  const jitter = chance(seed, time) - 0.5;
  return Math.round((50 + 15 * day + 33 * walk(seed, time) + 2 * jitter) * 100) / 100;
}

/**
 * A walk within -1 and 1 that keeps returning to 0.
 *
 * It is a sum of smooth noises from 8 hours to 10 s, the short ones weak, as in a random walk. So
 * it needs no state: any tick can be made at any time, in any order, again.
 */
export function walk(seed: number, time: number): number {
  let sum = 0;
  for (let i = 0, period = 28_800_000, weight = 0.55; i < 6; i++, period /= 5, weight *= 0.45) {
    const at = time / period;
    const n = Math.floor(at);
    const x = at - n;
    const a = chance(seed + i, n);
    const b = chance(seed + i, n + 1);
    sum += weight * (2 * (a + (b - a) * x * x * (3 - 2 * x)) - 1);
  }
  return sum;
}

/** A number from 0 to 1 that looks random, always the same for the same seed and whole number. */
export function chance(seed: number, n: number): number {
  let h = seed ^ Math.imul(n, 0x9e3779b1);
  h = Math.imul(h ^ (h >>> 16), 0x21f0aaad);
  h = Math.imul(h ^ (h >>> 15), 0x735a2d97);
  return ((h ^ (h >>> 15)) >>> 0) / 2 ** 32;
}

// --- the command line ----------------------------------------------------------------------

const WORDS = Object.entries(SOURCES)
  .map(([word, { help, interval }]) => `  ${word.padEnd(16)}${help}, every ${interval}`);

const HELP = `Makes rows that look like measurements: a live trickle, or years of history.

Usage: deno task generate [WHAT] [flags]

What
${WORDS.join("\n")}
  Default: metrics. Tables come from deno task migrate.

Flags
  --interval TIME   between two ticks; units ms s m h d, from 1ms (default: see above)
  --count N         end after N ticks (default: go on until Ctrl-C)
  --seed WORD       same seed and same times, same values (default: one that belongs to the table,
                    so that history and live rows of several runs join without a jump)
  --backfill TIME   fill the history from so long ago until now, then end
  --follow          after --backfill, go on live
  --wait SECONDS    how long to wait for what does not heal by itself: a wrong password, a missing
                    table (default: 30); a database that is away is waited for without end
  --help            this text

Ticks lie on a fixed grid, whole multiples of the interval. Live rows that fall due while the
database is away are written when it is back, each once. A clock that is set is followed, no gap is
filled.
A backfill writes only the ticks that have no row yet, in transactions of about two seconds. When
it was stopped, the same line goes on where it ended; run twice, it adds nothing.
Ctrl-C (or SIGTERM) ends it at any moment; what is not committed then is undone.

Environment
  DATABASE_URL, else DB_HOST DB_PORT DB_NAME DB_USER DB_PASSWORD DB_SSLMODE DB_SSLROOTCERT

Cost
  Live: 60 MB of memory and next to no CPU at 5s, 100 MB and some 10 % of a core at 1ms.
  Backfill: a core of the database and half a core here, some 200,000 rows a second.
  Disk: metrics grows by 17,280 rows a day at 5s, 2 MB with its indexes.

Exit status
  0 done, 1 failed, 2 wrong flags, 130 stopped before its end

Examples
  deno task generate
  deno task generate live --interval 100ms
  deno task generate metrics --backfill 30d
  deno task generate metrics --backfill 365d --interval 1m --seed demo
  deno task generate metrics --backfill 7d --follow`;

/** What the command line asks for. Times are in ms. */
export interface Job {
  what: string;
  interval: number;
  count: number;
  seed?: string;
  backfill: number;
  follow: boolean;
  wait: number;
}

class UsageError extends Error {}

/** Reads "250ms", "5s" or "30d" as ms. */
export function duration(flag: string, text: string): number {
  const [, number, unit] = /^(\d+)(ms|s|m|h|d)$/.exec(text) ?? [];
  const ms = Number(number) * { ms: 1, s: 1e3, m: 6e4, h: 36e5, d: 864e5 }[unit]!;
  if (!(ms >= 1 && ms <= 36_500 * 864e5)) {
    throw new UsageError(
      `Cannot read --${flag} "${text}": expected a whole number and a unit (ms s m h d), ` +
        `from 1ms to 36500d, such as 250ms, 5s or 30d`,
    );
  }
  return ms;
}

/** Reads the command line; throws what to type instead. */
export function parse(args: string[]): Job | "help" {
  const flag = { type: "string" } as const;
  let parsed;
  try {
    parsed = parseArgs({
      args,
      allowPositionals: true,
      options: {
        interval: flag,
        count: flag,
        seed: flag,
        backfill: flag,
        follow: { type: "boolean", default: false },
        wait: { ...flag, default: "30" },
        help: { type: "boolean", short: "h" },
      },
    });
  } catch (error) {
    const [first] = (error as Error).message.split(/\. |\.?\n|\.$/);
    const [, name] = /^Option '(--\w+).* (?:missing|ambiguous)/.exec(first) ?? [];
    throw new UsageError(
      name
        ? `Cannot read ${name}: expected a value after it, without a minus sign`
        : `Cannot read the command line: ${first}`,
    );
  }
  const { values, positionals: [what = "metrics", ...more] } = parsed;
  if (values.help) return "help";
  if (!Object.hasOwn(SOURCES, what) || more.length) {
    throw new UsageError(
      `Cannot make "${[what, ...more].join(" ")}": expected one of ${
        Object.keys(SOURCES).join(", ")
      }`,
    );
  }
  const count = Number(values.count ?? Infinity);
  if (values.count !== undefined && !(/^\d+$/.test(values.count) && count > 0)) {
    throw new UsageError(`Cannot read --count "${values.count}": expected a whole number from 1`);
  }
  if (values.seed === "") throw new UsageError(`Cannot use --seed "": expected a number or a word`);
  if (values.follow && !values.backfill) {
    throw new UsageError("Cannot use --follow alone: it goes with --backfill; leave it out");
  }
  if (values.count && values.backfill && !values.follow) {
    throw new UsageError("Cannot use --count with --backfill: it counts live ticks; add --follow");
  }
  if (!/^\d+(\.\d+)?$/.test(values.wait)) {
    throw new UsageError(
      `Cannot read --wait "${values.wait}": expected seconds, such as 30 or 0.5`,
    );
  }
  const interval = duration("interval", values.interval ?? SOURCES[what].interval);
  const backfill = values.backfill ? duration("backfill", values.backfill) : 0;
  if (values.backfill !== undefined && backfill < interval) {
    throw new UsageError(
      `Cannot use --backfill "${values.backfill}": expected at least one interval, ${interval}ms`,
    );
  }
  return {
    what,
    interval,
    count,
    seed: values.seed,
    backfill,
    follow: values.follow,
    wait: Number(values.wait) * 1000,
  };
}

// --- COPY in binary ------------------------------------------------------------------------

const utf8 = new TextEncoder();

/** Writes one value of each type; returns its bytes. */
const put: Record<Type, (view: DataView, at: number, value: never) => number> = {
  float8: (view, at, value: number) => (view.setFloat64(at, value), 8),
  int: (view, at, value: number) => (view.setInt32(at, value), 4),
  text(view, at, value: string) {
    const { read, written } = utf8.encodeInto(value, new Uint8Array(view.buffer, at));
    if (read < value.length) {
      throw new RangeError(`Cannot copy a text of ${value.length} characters`);
    }
    return written;
  },
  // Microseconds since 2000, as two halves: quicker than a BigInt, and exact up to year 2255.
  timestamptz(view, at, value: number) {
    const us = (value - 946_684_800_000) * 1000;
    view.setInt32(at, Math.floor(us / 2 ** 32));
    view.setUint32(at + 4, us >>> 0);
    return 8;
  },
};

/** Rows in the form of `copy ... from stdin (format binary)`, in blocks; a row is at most 64 kB. */
export function* binary(types: Type[], rows: Iterable<Value[]>): Generator<Uint8Array> {
  const size = 256 * 1024;
  const writers = types.map((type) => put[type]);
  // Each block is new: the stream keeps it until the socket has taken it.
  let block = new Uint8Array(size);
  let view = new DataView(block.buffer);
  block.set(new TextEncoder().encode("PGCOPY\n?\r\n"));
  block[7] = 0xff;
  let at = 19;
  for (const row of rows) {
    if (at > size - 64 * 1024) {
      yield block.subarray(0, at);
      block = new Uint8Array(size);
      view = new DataView(block.buffer);
      at = 0;
    }
    view.setInt16(at, writers.length);
    at += 2;
    for (let i = 0; i < writers.length; i++) {
      const bytes = row[i] === null ? -1 : writers[i](view, at + 4, row[i] as never);
      view.setInt32(at, bytes);
      at += 4 + Math.max(bytes, 0);
    }
  }
  view.setInt16(at, -1);
  yield block.subarray(0, at + 2);
}

// --- the work ------------------------------------------------------------------------------

/** A transaction of a backfill: what a stop undoes and a lost connection repeats. */
const CHUNK = { ms: 2000, rows: 500_000, first: 50_000 };
/** Rows of one INSERT at most, when live rows are behind. */
const BATCH = 5000;

/** Troubles that end by themselves: away, starting, stopping, full, standby, deadlock. */
const HEALS =
  /^(E[A-Z]+|EAI_AGAIN|CONNECT_TIMEOUT|CONNECTION_[A-Z]+|08...|25006|40...|53...|55P03|57P0[1-5])$/;
/** Troubles that a migration or a person may end: password, database, table, column, rights. */
const MAY_HEAL = /^(28...|3D000|3F000|42P01|42501|42703)$/;

const quote = (name: string) => `"${name.replaceAll('"', '""')}"`;
const number = (n: number) =>
  n.toLocaleString("en-US", { maximumFractionDigits: n > 0 && n < 10 ? 1 : 0 });
const span = (ms: number) => {
  const units = [[1728e5, 864e5, "d"], [72e5, 36e5, "h"], [12e4, 6e4, "min"], [1000, 1000, "s"]];
  const [, size, unit] = units.find(([least]) => ms >= +least) ?? [0, 1, "ms"];
  return `${number(ms / +size)} ${unit}`;
};
const terminal = Deno.stderr.isTerminal();
/** Says something to people; where a progress bar stands, it gives way. */
const say = (text: string) => console.error(`${terminal ? "\r\x1b[2K" : ""}${text}`);

const CLIENT = {
  max: 1,
  fetch_types: false,
  connection: { application_name: "pgpulse generate" },
};

/** Ticks from `first` to `last`; tick n is at n times the interval. */
interface Ticks {
  first: number;
  last: number;
}

/** One run: writes what a job asks for. */
export class Run {
  /** What is committed: rows, the ticks they span, and how many ticks a backfill found written. */
  readonly written = { rows: 0, first: Infinity, last: -Infinity, there: 0 };
  /** Whether nothing but a signal ends it. */
  endless: boolean;
  readonly #job: Job;
  readonly #stop: AbortSignal;
  readonly #tables: [name: string, table: Table][];
  readonly #id = crypto.randomUUID();
  #sql = connect(CLIENT);
  #seed = 0;
  /** Rows made that are not committed, and the newest tick. */
  #made = { rows: 0, tick: 0 };

  constructor(job: Job, stop: AbortSignal) {
    this.#job = job;
    this.#stop = stop;
    this.endless = job.count === Infinity && !job.backfill;
    this.#tables = Object.entries(SOURCES[job.what].tables);
  }

  /** Writes until all is done; throws when the signal comes. */
  async run(): Promise<void> {
    const { what, interval, backfill, follow, seed } = this.#job;
    const [[table]] = this.#tables;
    // Before the first tick, so that a wrong password is not found an hour later.
    const [{ oid }] = await this.#insist((sql) => sql`select ${quote(table)}::text::regclass::oid`);
    const word = seed ?? `${oid}`;
    this.#seed = [...`${what} ${word}`].reduce(
      (h, letter) => chance(h, letter.codePointAt(0)!) * 2 ** 32 | 0,
      0,
    );
    say(`Writes ${what} every ${span(interval)}, seed "${word}"; Ctrl-C stops`);
    const next = Math.floor(Date.now() / interval);
    if (backfill) {
      // The tick that is due now is left to what writes live.
      await this.#backfill(next - Math.floor(backfill / interval), next);
      if (!follow) return;
    }
    // Restarted within an interval, it finds the row of this tick.
    const due = await this.#insist((sql) => this.#gaps(sql, { first: next, last: next }));
    await this.#live(due.length ? next : next + 1);
  }

  /** Closes the connection; the database undoes what is not committed. */
  async end(): Promise<void> {
    await this.#sql.end({ timeout: 0.5 });
  }

  /** One line that says what was written. */
  summary(ms: number): string {
    const { rows, first, last, there } = this.written;
    const time = (tick: number) => new Date(tick * this.#job.interval).toISOString();
    const into = this.#tables.map(([name]) => name).join(", ");
    const skipped = there ? `; ${number(there)} ticks had rows already` : "";
    if (!rows) return `Wrote nothing into ${into}${skipped}`;
    const rate = `${number(rows / ms * 1000)} rows/s`;
    return `Wrote ${number(rows)} rows into ${into}, ${time(first)} to ${time(last)}, ` +
      `in ${span(ms)} (${rate})${skipped}`;
  }

  /** Writes each tick from `next` on when it is due, and those that are overdue in batches. */
  async #live(next: number): Promise<void> {
    const { interval, count } = this.#job;
    this.endless = count === Infinity;
    const batch = this.#ticksFor(BATCH);
    // Time runs on the steady clock, so that a wall clock that is set is seen, and not filled.
    let offset = Date.now() - performance.now();
    for (let left = count; left > 0;) {
      const now = offset + performance.now();
      const due = Math.min(Math.floor(now / interval) - next + 1, left, batch);
      const jump = Date.now() - now;
      if (due > 0) {
        const ticks = { first: next, last: next + due - 1 };
        await this.#insert(ticks);
        this.#committed([ticks]);
        next += due;
        left -= due;
      } else if (Math.abs(jump) > 1000) {
        offset += jump;
        next = Math.floor((now + jump) / interval) + 1;
        say(`The clock was set ${span(Math.abs(jump))} ${jump < 0 ? "back" : "ahead"}; follows it`);
      } else {
        const wait = Math.min(Math.max(next * interval - now, 10), 60_000);
        await sleep(wait, undefined, { signal: this.#stop });
      }
    }
  }

  /** Inserts some ticks by one statement: once, even when the answer to a first try was lost. */
  async #insert(ticks: Ticks): Promise<void> {
    const rows = Object.fromEntries(this.#tables.map(([name, table]) => {
      const columns = Object.entries(table.columns);
      const json = (type: Type, value: Value) =>
        type === "timestamptz" && value !== null ? new Date(value).toISOString() : value;
      return [
        name,
        Array.from(
          this.#rows(table, [ticks]),
          (row) => Object.fromEntries(columns.map(([name, type], i) => [name, json(type, row[i])])),
        ),
      ];
    }));
    const inserts = this.#tables.map(([name, { columns }], i) => {
      const [table, names] = [quote(name), Object.keys(columns).map(quote)];
      return `t${i} as (
          insert into ${table} (${names}) select ${names}
          from jsonb_populate_recordset(null::${table}, $1::jsonb -> '${name}')
      )`;
    });
    const [[first, { columns }]] = this.#tables;
    const [time, ...others] = Object.keys(columns).map(quote);
    await this.#insist(async (sql, again) => {
      if (again) {
        // Waits for the end of the first try, then looks whether its last row is there.
        await sql`select pg_advisory_xact_lock(hashtextextended(${this.#id}, 0))`;
        const of = (row: string) => `(${others.map((name) => `${row}.${name}`)})`;
        const found = await sql.unsafe(
          `select from ${quote(first)} as t, jsonb_populate_record(null::${quote(first)}, $1) as r
          where t.${time} = r.${time} and ${of("t")} is not distinct from ${of("r")} limit 1`,
          [sql.json(rows[first].at(-1)!)],
        );
        if (found.length) return;
      }
      await sql.unsafe(
        `with ${inserts} select pg_advisory_xact_lock(hashtextextended($2, 0))`,
        [sql.json(rows), this.#id],
        { prepare: true },
      );
    });
  }

  /** Fills the ticks from `from` up to `to`, without it, that have no row yet; oldest first. */
  async #backfill(from: number, to: number): Promise<void> {
    let step = this.#ticksFor(CHUNK.first);
    this.#made.tick = from;
    const key = `generate ${this.#job.what}`;
    const bar = progress(() => ({
      done: (this.#made.tick - from) / (to - from),
      rows: this.written.rows + this.#made.rows,
    }));
    try {
      for (let at = from; at < to;) {
        const began = performance.now();
        const all = { first: at, last: Math.min(at + step, to) - 1 };
        let copied: Ticks[] = [];
        await this.#insist((sql) =>
          sql.begin(async (tx) => {
            // Waits for another backfill, and for an own try whose connection was lost.
            await tx`select pg_advisory_xact_lock(hashtextextended(${key}, 0))`;
            const gaps = await this.#gaps(tx, all);
            // None at a second try: the first was committed, only the answer was lost.
            if (!gaps.length) return;
            this.#made = { rows: 0, tick: at };
            for (const [name, table] of this.#tables) {
              const into = `${quote(name)} (${Object.keys(table.columns).map(quote)})`;
              await pipeline(
                binary(Object.values(table.columns), this.#rows(table, gaps)),
                await tx.unsafe(`copy ${into} from stdin (format binary)`).writable(),
                { signal: this.#stop },
              );
            }
            copied = gaps;
          })
        );
        this.#committed(copied);
        this.written.there += copied.reduce(
          (there, { first, last }) => there - (last - first + 1),
          all.last - all.first + 1,
        );
        this.#made.tick = at = all.last + 1;
        const fitting = step * CHUNK.ms / (performance.now() - began);
        step = Math.ceil(Math.min(fitting, this.#ticksFor(CHUNK.rows)));
      }
    } finally {
      bar.end();
    }
  }

  /** The ticks among `all` that have no row in the first table, as ranges. */
  async #gaps(
    sql: postgres.Sql | postgres.TransactionSql,
    { first, last }: Ticks,
  ): Promise<Ticks[]> {
    const { interval } = this.#job;
    const [name, { columns }] = this.#tables[0];
    const time = sql(Object.keys(columns)[0]);
    const [before, begin, end] = [first - 1, first, last + 1]
      .map((tick) => new Date(tick * interval));
    return await sql<Ticks[]>`
      select
          (extract(epoch from tick) * 1000 / ${interval}::int8)::float8 + 1 as first,
          (extract(epoch from next) * 1000 / ${interval}::int8)::float8 - 1 as last
      from (
          select step, tick, lead(tick, 1, ${end}) over (order by tick) as next
          from (select ${`${interval} ms`}::text::interval as step) as grid, lateral (
              select ${before}::timestamptz as tick
              union
              select date_bin(step, ${time}, timestamptz 'epoch') from ${sql(name)}
              where ${time} >= ${begin} and ${time} < ${end}
          ) as taken
      ) as pairs
      where next - tick > step
      order by tick
    `;
  }

  /** The rows of some ticks of one table. */
  *#rows(table: Table, ranges: Ticks[]): Generator<Value[]> {
    for (const { first, last } of ranges) {
      for (let tick = first; tick <= last; tick++) {
        this.#made.tick = tick;
        for (const row of table.rows(this.#seed, tick * this.#job.interval)) {
          this.#made.rows++;
          yield row;
        }
      }
    }
  }

  /** How many ticks make about so many rows. */
  #ticksFor(rows: number): number {
    const tick = this.#tables.flatMap(([, table]) => table.rows(this.#seed, Date.now()));
    return Math.ceil(rows / tick.length);
  }

  #committed(ranges: Ticks[]): void {
    for (const { first, last } of ranges) {
      this.written.first = Math.min(this.written.first, first);
      this.written.last = Math.max(this.written.last, last);
    }
    if (ranges.length) this.written.rows += this.#made.rows;
    this.#made.rows = 0;
  }

  /** Runs `action` until it succeeds: waits while the database is away, and says so once. */
  async #insist<T>(action: (sql: postgres.Sql, again: boolean) => Promise<T>): Promise<T> {
    let pause = 100;
    let away = 0;
    let stuck = 0;
    for (;;) {
      this.#stop.throwIfAborted();
      try {
        const result = await action(this.#sql, away > 0);
        if (away) say(`The database works again after ${span(Date.now() - away)}; goes on`);
        return result;
      } catch (error) {
        this.#stop.throwIfAborted();
        const code = String((error as { code?: unknown }).code);
        const heals = HEALS.test(code);
        const now = Date.now();
        const news = !away || !heals && !stuck;
        away ||= now;
        stuck = heals ? 0 : stuck || now;
        const text = explain(error, this.#sql);
        if (!heals && (!MAY_HEAL.test(code) || now - stuck >= this.#job.wait)) {
          throw new Error(text, { cause: error });
        }
        const till = heals ? "until it answers" : `for ${span(this.#job.wait)}`;
        if (news) say(`${text}; tries again ${till}`);
        // A new client, whatever state the old one is in.
        this.#sql.end({ timeout: 0 }).catch(() => {});
        this.#sql = connect(CLIENT);
        await sleep(pause, undefined, { signal: this.#stop });
        pause = Math.min(pause * 2, 5000);
      }
    }
  }
}

/** Shows how far it is: a bar on a terminal, elsewhere a line every five seconds. */
function progress(state: () => { done: number; rows: number }) {
  const began = performance.now();
  const show = () => {
    const { done, rows } = state();
    const ms = performance.now() - began;
    const left = done > 0 && done < 1 ? `, ${span(ms / done - ms)} left` : "";
    const text = `${Math.floor(done * 100)} %, ${number(rows)} rows, ` +
      `${number(rows / ms * 1000)} rows/s${left}`;
    const full = Math.round(done * 30);
    Deno.stderr.writeSync(utf8.encode(
      terminal ? `\r\x1b[2K[${"#".repeat(full)}${"-".repeat(30 - full)}] ${text}` : `${text}\n`,
    ));
  };
  const timer = setInterval(show, terminal ? 100 : 5000);
  return {
    end() {
      clearInterval(timer);
      if (terminal) show(), console.error();
    },
  };
}

/** Runs the command line; gives the exit status. */
async function main(args: string[]): Promise<number> {
  const began = performance.now();
  const stop = new AbortController();
  let run: Run | undefined;
  try {
    const job = parse(args);
    if (job === "help") {
      console.log(HELP);
      return 0;
    }
    for (const signal of ["SIGINT", "SIGTERM"] as const) {
      Deno.addSignalListener(signal, () => stop.abort());
    }
    // A statement under way may end, but not hold up the stop.
    const late = new Promise<void>((done) =>
      stop.signal.addEventListener("abort", () => setTimeout(done, 3000))
    );
    run = new Run(job, stop.signal);
    await Promise.race([run.run(), late]);
    return stop.signal.aborted && !run.endless ? 130 : 0;
  } catch (error) {
    if (stop.signal.aborted) return run?.endless ? 0 : 130;
    say((error as Error).message);
    if (error instanceof UsageError) say("See deno task generate --help");
    return error instanceof UsageError ? 2 : 1;
  } finally {
    if (run) {
      await run.end();
      console.log(run.summary(performance.now() - began));
    }
  }
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

if (import.meta.main) Deno.exit(await main(Deno.args));

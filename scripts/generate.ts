/**
 * Makes rows that look like measurements: a live trickle, or years of history.
 *
 *     deno run --no-prompt --allow-env=PG*,DATABASE_URL,DB_* --allow-net --allow-read generate.ts
 *
 * Needs: PostgreSQL 15 or later, the tables of `deno task migrate`, insert and select on them;
 *        for readings MongoDB instead, and --allow-env --allow-sys=hostname for its driver.
 * Costs: live, 60 MB of memory and next to no CPU (some 10 % of a core at 1 ms); `--backfill`
 *        keeps a core of the database busy, and half a core here. 2 MB of disk a day at 5 s.
 */
import { pipeline } from "node:stream/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";

// --- what can be made: a new word is one entry of SOURCES ----------------------------------

type Value = number | string | null;
type Type = "float8" | "int" | "text" | "timestamptz" | "jsonb";

/** What one table gets: rows at each tick, or what changes meanwhile. */
export interface Table {
  /** Column names and types; the first timestamptz is the time, in ms. */
  columns: Record<string, Type>;
  /** The rows of one tick, without those of the first so many machines; the same for seed and time. */
  rows?(seed: number, time: number, there?: number): Value[][];
  /** The rows that are new or others at `to` than at `from`, as they are at `to`. */
  changes?(seed: number, from: number, to: number): Value[][];
  /** What `on conflict` does with such a row: told twice, it does no harm. */
  conflict?: string;
  /**
   * SQL for a tick of many rows: a condition of few of them, first and last among them, one that is true
   * of the last, and how many machines there are.
   */
  probe?: { few: string; last: string; count: string };
}

type Ticking = Table & Required<Pick<Table, "rows">>;

/** What one word on the command line makes. */
export interface Source {
  help: string;
  /** Default of `--interval`. */
  interval: string;
  /** All are written in one transaction; the first has a row at every tick. */
  tables(size: number): Record<string, Table>;
  /** Live rows go through pgpulse.collect, as those of collect.ts: the records of one tick. */
  records?(seed: number, size: number, time: number, interval: number): unknown[];
  /** Documents of one tick go to MongoDB; the same _id for the same seed, sensor and time. */
  documents?(seed: number, size: number, time: number): Record<string, unknown>[];
  /** Default of `--seed`. */
  seed?: string;
  /** SQL for the time, in ms, up to which changes are there. */
  told?: string;
}

const sensor: Table = {
  columns: { timestamp: "timestamptz", value: "float8" },
  rows: (seed, time) => [[time, level(seed, time)]],
};

export const SOURCES: Record<string, Source> = {
  metrics: {
    help: "one sensor, 0 to 100, into metrics",
    interval: "5s",
    tables: () => ({ metrics: sensor }),
  },
  live: {
    help: "one sensor, 0 to 100, into live_metrics",
    interval: "1s",
    tables: () => ({ live_metrics: sensor }),
  },
  factory: {
    help: "a plant: machine_metrics, and what its machines do, make and use",
    interval: "10s",
    tables: plant,
    seed: "factory",
    told: "select (extract(epoch from max(hour)) * 1000)::float8 as told from production",
  },
  hosts: {
    help: "a fleet of hosts, as scripts/collect.ts would send it, into system_metrics",
    interval: "5s",
    tables: fleet,
    records: (seed, size, time, interval) =>
      hostsOf(seed, size).map((host) => host.record(time, interval)),
    seed: "hosts",
  },
  readings: {
    help: "sensors of a building, as documents in MongoDB for scripts/etl.ts",
    interval: "5s",
    tables: () => ({}),
    documents: building,
    seed: "readings",
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

// --- a plant: what a machine does in a day follows from seed, machine and day --------------

const MINUTE = 60_000;
const HOUR = 3_600_000;
const DAY = 86_400_000;

/** What stands in an area: five machines of a kind, then five of the next. */
const AREAS = [
  // hours in which is worked, and at weekends; best seconds a piece; kW and bar at work
  { area: "Molding", kind: "Press", week: [0, 24], end: [0, 24], cycle: 24, kw: 45, bar: 120 },
  { area: "Assembly", kind: "Robot", week: [6, 22], end: [6, 14], cycle: 12, kw: 9, bar: 6 },
  { area: "Packaging", kind: "Packer", week: [0, 24], end: [8, 20], cycle: 4, kw: 6, bar: 7 },
  { area: "Painting", kind: "Booth", week: [6, 22], end: [6, 22], cycle: 40, kw: 30, bar: 4 },
];

type Status = "running" | "idle" | "error" | "maintenance";

/** Why machines stop, how often and for about how many minutes, and with which alarm. */
const REASONS: [reason: string, weight: number, minutes: number, Status, alarm?: string][] = [
  ["Material jam", 24, 7, "error", "JAM"],
  ["Changeover", 20, 20, "idle"],
  ["Waiting for material", 14, 13, "idle"],
  ["Tool wear", 11, 25, "error", "VIBRATION_HIGH"],
  ["Sensor fault", 9, 8, "error", "SENSOR"],
  ["No operator", 8, 10, "idle"],
  ["Overheating", 5, 28, "error", "TEMPERATURE_HIGH"],
  ["Low pressure", 5, 16, "error", "PRESSURE_LOW"],
  ["Drive fault", 3, 45, "error", "DRIVE"],
  ["Power dip", 1, 12, "error", "POWER"],
];
/** How long its trouble is seen before a machine stops. */
const FORERUN: Record<string, number> = {
  "Overheating": 15 * MINUTE,
  "Tool wear": 40 * MINUTE,
  "Low pressure": 12 * MINUTE,
};
/** Degrees above which an alarm is raised. */
const LIMIT = 85;
const WEIGHTS = REASONS.reduce((sum, [, weight]) => sum + weight, 0);

/** A stretch of time in which a machine does one thing. */
interface Piece {
  at: number;
  status: Status;
  /** Whether it was to produce. */
  planned: boolean;
  /** What is about to stop it. */
  trouble?: string;
  /** Temperature at its begin, where it tends to, and the time for most of the way. */
  temp: number;
  goal: number;
  tau: number;
}

interface Event {
  from: number;
  to: number;
  what: "stop" | "maintenance" | "alarm";
  /** Reason of a stop, kind of a maintenance, code of an alarm. */
  name: string;
  severity?: string;
  text?: string;
}

/** A day, as one machine goes through it: what it does without a gap, and what happens to it. */
interface Plan {
  pieces: Piece[];
  events: Event[];
  heated: boolean;
}

/** What OEE of an hour is made of, in seconds and pieces, and its energy. */
export interface Hour {
  planned: number;
  run: number;
  total: number;
  good: number;
  kwh: number;
}

const sub = (seed: number, n: number) => chance(seed, n) * 2 ** 32 | 0;
const cents = (value: number) => Math.round(value * 100) / 100;
const dayOf = (time: number) => Math.floor(time / DAY);
const hourOf = (time: number) => Math.floor(time / HOUR);

/** Smooth noise from -1 to 1 that changes within a period. */
function wave(seed: number, time: number, period: number): number {
  const at = time / period;
  const n = Math.floor(at);
  const x = at - n;
  const a = chance(seed, n);
  return 2 * (a + (chance(seed, n + 1) - a) * x * x * (3 - 2 * x)) - 1;
}

/** One machine; all that it does follows from the seed. Times are ms, and hours and days of UTC. */
export class Machine {
  readonly id: string;
  readonly name: string;
  readonly kind: typeof AREAS[0];
  readonly #seed: number;
  readonly #number: number;
  /** What it should be warm. */
  readonly target: number;
  readonly #mishaps: number;
  #plans = new Map<number, Plan>();
  #last: { from: number; to: number; piece: Piece; plan: Plan; i: number } | undefined;

  constructor(seed: number, number: number) {
    const block = Math.floor(number / 5);
    this.kind = AREAS[block % AREAS.length];
    this.id = `M${`${number + 1}`.padStart(2, "0")}`;
    const before = Math.floor(block / AREAS.length) * 5 + number % 5;
    this.name = `${this.kind.kind} ${before + 1}`;
    this.#number = number;
    this.#seed = sub(seed, number);
    this.target = 62 + Math.round(6 * chance(this.#seed, 1));
    this.#mishaps = (130 + 150 * chance(this.#seed, 2)) * MINUTE;
  }

  /** The plan of a day (days since 1970). */
  plan(day: number): Plan {
    let plan = this.#plans.get(day);
    if (!plan) {
      if (this.#plans.size > 40) this.#plans.clear();
      this.#plans.set(day, plan = this.#draw(day));
    }
    return plan;
  }

  /** The same with its temperatures: what was a day before it began is forgotten. */
  #heated(day: number): Plan {
    const plan = this.plan(day);
    if (plan.heated) return plan;
    plan.heated = true;
    const before = this.plan(day - 1).pieces;
    let temp = before[0].goal;
    for (const [i, piece] of before.entries()) {
      temp = warmth(temp, piece, (before[i + 1]?.at ?? day * DAY) - piece.at);
    }
    for (const [i, piece] of plan.pieces.entries()) {
      piece.temp = temp;
      temp = warmth(temp, piece, (plan.pieces[i + 1]?.at ?? (day + 1) * DAY) - piece.at);
    }
    // Its alarm waits until the limit is passed, at most until the machine stops.
    for (const event of plan.events) {
      if (event.name !== "TEMPERATURE_HIGH") continue;
      const i = plan.pieces.findIndex(({ at }) => at === event.from);
      const { at, temp, goal, tau } = plan.pieces[i];
      const late = Math.max(0, tau * Math.log((goal - temp) / (goal - LIMIT)));
      event.from = Math.min(plan.pieces[i + 1].at, Math.round((at + late) / 1000) * 1000);
    }
    return plan;
  }

  #draw(day: number): Plan {
    const [begin, end] = [day * DAY, (day + 1) * DAY];
    const seed = sub(this.#seed, day);
    let n = 0;
    const draw = () => chance(seed, n++);
    // The first of all days was a Thursday.
    const weekend = (day % 7 + 10) % 7 > 4;
    const [first, last] = this.kind[weekend ? "end" : "week"];
    const plan: Plan = { pieces: [], events: [], heated: false };
    const piece = (at: number, status: Status, planned: boolean, trouble?: string) => {
      const [goal, tau] = status === "running"
        ? trouble === "Overheating" ? [98, 5 * MINUTE] : [this.target, 11 * MINUTE]
        : planned && status !== "maintenance"
        ? [45, 30 * MINUTE]
        : [22, 50 * MINUTE];
      plan.pieces.push({ at, status, planned, trouble, temp: goal, goal, tau });
    };
    if (first > 0) piece(begin, "idle", false);
    // Each machine is looked after every second week, for two hours, when it would produce.
    const care = last - first > 6 && (day + 3 * this.#number) % 14 === 2
      ? begin + (first + 2 + Math.floor(3 * draw())) * HOUR
      : Infinity;
    const shifts = care < Infinity
      ? [[begin + first * HOUR, care], [care + 2 * HOUR, begin + last * HOUR]]
      : [[begin + first * HOUR, begin + last * HOUR]];
    for (const [from, to] of shifts) {
      for (let at = from; at < to;) {
        const pause = -Math.log(1 - draw()) * this.#mishaps + 4 * MINUTE;
        const stop = Math.min(to, Math.round((at + pause) / 1000) * 1000);
        let pick = draw() * WEIGHTS;
        const why = REASONS.find(([, weight]) => (pick -= weight) < 0)!;
        const [reason, , minutes, status, alarm] = why;
        const length = minutes * MINUTE * (0.4 + 0.6 * draw() - 0.8 * Math.log(1 - draw()));
        const resume = Math.min(to, stop + Math.round(length / 1000) * 1000);
        piece(at, "running", true);
        if (stop === to) break;
        const fore = Math.max(at, stop - (FORERUN[reason] ?? 0));
        if (fore < stop) {
          if (fore === at) plan.pieces.pop();
          piece(fore, "running", true, reason);
        }
        piece(stop, status, true);
        plan.events.push({ from: stop, to: resume, what: "stop", name: reason });
        if (alarm) {
          plan.events.push({
            from: fore,
            to: resume,
            what: "alarm",
            name: alarm,
            severity: /TEMP|DRIVE/.test(alarm) ? "critical" : "warning",
            text: `${this.name}: ${reason.toLowerCase()}`,
          });
        }
        // What takes long is a case for the fitters.
        const fitters = stop + 15 * MINUTE;
        if (status === "error" && resume > fitters + 10 * MINUTE) {
          piece(fitters, "maintenance", true);
          plan.events.push({
            from: fitters,
            to: resume,
            what: "maintenance",
            name: "corrective",
            text: reason,
          });
        }
        at = resume;
      }
      if (to === care) {
        piece(care, "maintenance", false);
        plan.events.push({
          from: care,
          to: care + 2 * HOUR,
          what: "maintenance",
          name: "preventive",
          text: "Inspection and lubrication",
        });
      }
    }
    if (last < 24) piece(begin + last * HOUR, "idle", false);
    plan.pieces = plan.pieces.filter(({ at }, i, all) => at < end && at !== all[i + 1]?.at);
    return plan;
  }

  /** What it does at a time; quick when the times come in order. */
  #at(time: number): Piece {
    let last = this.#last;
    if (last && time >= last.from && time < last.to) return last.piece;
    const day = dayOf(time);
    const plan = this.#heated(day);
    let i = last?.plan === plan && time >= last.from ? last.i : 0;
    while (plan.pieces[i + 1]?.at <= time) i++;
    const piece = plan.pieces[i];
    this.#last = last = {
      from: piece.at,
      to: plan.pieces[i + 1]?.at ?? (day + 1) * DAY,
      piece,
      plan,
      i,
    };
    return last.piece;
  }

  status(time: number): Status {
    return this.#at(time).status;
  }

  /** Adds the rows of one tick: machine, type, value, time, zone, target. */
  sample(time: number, rows: Value[][]): void {
    const { id, target, kind } = this;
    const piece = this.#at(time);
    const since = time - piece.at;
    const running = piece.status === "running";
    const tick = Math.floor(time / 1000);
    const seed = this.#seed;
    const noise = (n: number) => 2 * chance(seed + n, tick) - 1;
    const drift = wave(seed + 11, time, 9 * HOUR);
    const temp = warmth(piece.temp, piece, since) + (running ? 1.5 : 0.5) * drift;
    rows.push([id, "temperature", cents(temp + 0.25 * noise(20)), time, null, target]);
    for (let zone = 1; zone <= 4; zone++) {
      // The first zone is cool, the third hot; each has a drift of its own.
      const off = zone === 1 ? -5 : zone === 2 ? -1 : zone === 3 ? 2.5 : -2;
      const value = temp + (temp - 22) / 43 * off + wave(seed + 30 + zone, time, 40 * MINUTE) +
        0.2 * noise(20 + zone);
      rows.push([id, "multi_zone_temp", cents(value), time, zone, target + off]);
    }
    const ramp = running ? Math.min(1, 0.3 + since / 40_000) : 0;
    const begins = piece.trouble ? Math.min(1, since / FORERUN[piece.trouble]) : 0;
    const low = piece.trouble === "Low pressure" ? 1 - 0.3 * begins : 1;
    const load = this.load(hourOf(time));
    const bar = kind.bar * (running ? low * (0.97 + 0.02 * load) : piece.planned ? 0.8 : 0.1);
    rows.push([id, "pressure", cents(bar * (1 + 0.006 * noise(25))), time, null, null]);
    // Bearings and tools wear off until they are looked after.
    const wear = ((dayOf(time) + 3 * this.#number - 2) % 14 + 14) % 14 / 14;
    const shake = piece.trouble === "Tool wear" ? 1 + 1.4 * begins : 1;
    const vibration = running ? (1.6 + 1.1 * wear) * shake * (1 + 0.08 * noise(26)) : 0.05;
    rows.push([id, "vibration", cents(vibration + 0.02 * noise(27)), time, null, null]);
    const speed = 60 / kind.cycle * this.pace(hourOf(time)) * ramp * (1 + 0.015 * noise(28));
    rows.push([id, "speed", cents(speed), time, null, null]);
    const power = this.power(piece, load) * (1 + 0.05 * noise(29));
    rows.push([id, "power", cents(power), time, null, null]);
  }

  /** Part of the best speed that an hour has. */
  pace(hour: number): number {
    const base = 0.84 + 0.1 * chance(this.#seed, 3);
    return Math.min(
      1,
      base + 0.05 * wave(this.#seed + 5, hour, 9) + 0.02 * chance(this.#seed, hour),
    );
  }

  /** Part of its rated power that it takes at work; now and then a leak costs half as much more. */
  load(hour: number): number {
    const day = Math.floor(hour / 24);
    const leaks = chance(this.#seed + 6, day) < 0.02 && hour % 24 >= 9 && hour % 24 < 13;
    return (0.7 + 0.12 * chance(this.#seed + 7, hour)) * (leaks ? 1.5 : 1);
  }

  power({ status, planned }: { status: Status; planned: boolean }, load: number): number {
    const part = { running: load, idle: planned ? 0.25 : 0.04, error: 0.18, maintenance: 0.1 };
    return this.kind.kw * part[status];
  }

  /** What it made and used in an hour (hours since 1970) until a time. */
  hour(hour: number, until: number): Hour {
    const [begin, end] = [hour * HOUR, Math.min((hour + 1) * HOUR, until)];
    const { pieces } = this.plan(Math.floor(hour / 24));
    const load = this.load(hour);
    let [planned, run, kwh] = [0, 0, 0];
    for (const [i, piece] of pieces.entries()) {
      const next = pieces[i + 1]?.at ?? Infinity;
      if (next <= begin) continue;
      if (piece.at >= end) break;
      const seconds = (Math.min(next, end) - Math.max(piece.at, begin)) / 1000;
      if (piece.planned) planned += seconds;
      if (piece.status === "running") run += seconds;
      kwh += seconds * this.power(piece, load) / 3600;
    }
    const total = Math.floor(run / this.kind.cycle * this.pace(hour));
    const scrap = 0.004 + 0.03 * chance(this.#seed, 4) + 0.02 * chance(this.#seed + 8, hour) ** 4;
    return { planned, run, total, good: total - Math.floor(total * scrap), kwh };
  }

  /** OEE, availability, performance and quality of the last full hour that was planned. */
  oee(time: number): (number | null)[] {
    for (let hour = hourOf(time) - 1, tries = 0; tries < 100; hour--, tries++) {
      const { planned, run, total, good } = this.hour(hour, Infinity);
      if (!planned) continue;
      const { cycle } = this.kind;
      return [
        cents(100 * cycle * good / planned),
        cents(100 * run / planned),
        run ? cents(100 * cycle * total / run) : null,
        total ? cents(100 * good / total) : null,
      ];
    }
    return [null, null, null, null];
  }

  /** Times from `from`, without it, to `to` at which status or OEE change. */
  changes(from: number, to: number): number[] {
    const times: number[] = [];
    for (let day = dayOf(from); day <= dayOf(to); day++) {
      const { pieces } = this.plan(day);
      let before = this.plan(day - 1).pieces.at(-1)!.status;
      for (const { at, status } of pieces) {
        if (status !== before) times.push(at);
        before = status;
      }
      for (let hour = day * 24; hour < (day + 1) * 24; hour++) {
        if (this.hour(hour - 1, Infinity).planned) times.push(hour * HOUR);
      }
    }
    return [...new Set(times)].filter((at) => at > from && at <= to).sort((a, b) => a - b);
  }

  /** What began or ended from `from`, without it, to `to`. */
  events(what: Event["what"], from: number, to: number): Event[] {
    const events: Event[] = [];
    const news = (at: number) => at > from && at <= to;
    for (let day = dayOf(from); day <= dayOf(to); day++) {
      for (const event of this.#heated(day).events) {
        if (event.what === what && (news(event.from) || news(event.to))) events.push(event);
      }
    }
    return events;
  }
}

/** How warm a piece is some ms after its begin. */
function warmth(begin: number, { goal, tau }: Piece, ms: number): number {
  return goal + (begin - goal) * Math.exp(-ms / tau);
}

/** The tables of a plant of so many machines. */
export function plant(size: number): Record<string, Table> {
  const last = `M${`${size}`.padStart(2, "0")}`;
  let made: { seed: number; machines: Machine[] } | undefined;
  const all = (seed: number) => {
    if (made?.seed !== seed) {
      made = { seed, machines: Array.from({ length: size }, (_, i) => new Machine(seed, i)) };
    }
    return made.machines;
  };
  const events = (what: Event["what"], ...names: ("name" | "severity" | "text")[]) =>
    ((seed, from, to) =>
      all(seed).flatMap((machine) =>
        machine.events(what, from, to).map((event) => [
          machine.id,
          event.from,
          event.to <= to ? event.to : null,
          ...names.map((name) => event[name]!),
        ])
      )) satisfies Table["changes"];
  // Within a minute the present hour tells nothing new.
  const hours = (row: (id: string, at: number, made: Hour, cycle: number) => Value[] | undefined) =>
    ((seed, from, to) => {
      const rows: Value[][] = [];
      if (Math.floor(from / MINUTE) === Math.floor(to / MINUTE)) return rows;
      for (const machine of all(seed)) {
        for (let hour = hourOf(from); hour * HOUR < to; hour++) {
          const made = row(machine.id, hour * HOUR, machine.hour(hour, to), machine.kind.cycle);
          if (made) rows.push(made);
        }
      }
      return rows;
    }) satisfies Table["changes"];
  const state = (machine: Machine, time: number) => [
    machine.id,
    machine.name,
    machine.kind.area,
    machine.status(time),
    ...machine.oee(time),
  ];
  const described = {
    name: "text",
    area: "text",
    status: "text",
    oee: "float8",
    availability: "float8",
    performance: "float8",
    quality: "float8",
  } as const;
  const text = "text";
  const float8 = "float8";
  const timestamptz = "timestamptz";
  return {
    machine_metrics: {
      columns: {
        machine_id: text,
        metric_type: text,
        value: float8,
        timestamp: timestamptz,
        zone_number: "int",
        target_value: float8,
      },
      probe: {
        few: `machine_id in ('M01', '${last}') and metric_type = 'speed'`,
        last: `machine_id = '${last}'`,
        count: `coalesce(max(substr(machine_id, 2)::int)
            filter (where machine_id ~ '^M[0-9]{2,5}$' and metric_type = 'speed'), 0)`,
      },
      rows(seed, time, there = 0) {
        const rows: Value[][] = [];
        for (const machine of all(seed).slice(there)) machine.sample(time, rows);
        return rows;
      },
    },
    machine_history: {
      columns: { machine_id: text, ...described, timestamp: timestamptz },
      conflict: "do nothing",
      changes: (seed, from, to) =>
        all(seed).flatMap((machine) =>
          machine.changes(from, to).map((at) => [...state(machine, at), at])
        ),
    },
    machines: {
      columns: { id: text, ...described, last_updated: timestamptz },
      // A trigger writes its history, so each change has its own time; else this is a sign of life.
      changes: (seed, from, to) =>
        all(seed).map((machine) => [
          ...state(machine, to),
          machine.changes(from, to).at(-1) ?? to,
        ]),
      conflict: `(id) do update set (name, area, status, oee, availability, performance, quality,
          last_updated) = (excluded.name, excluded.area, excluded.status, excluded.oee,
          excluded.availability, excluded.performance, excluded.quality, excluded.last_updated)
          where machines.last_updated < excluded.last_updated`,
    },
    energy_consumption: {
      columns: { machine_id: text, hour: timestamptz, energy_kwh: float8 },
      changes: hours((id, at, { kwh }) => [id, at, Math.round(kwh * 1000) / 1000]),
      conflict: `(machine_id, hour) do update set energy_kwh = excluded.energy_kwh
          where energy_consumption.energy_kwh < excluded.energy_kwh`,
    },
    production: {
      columns: {
        machine_id: text,
        hour: timestamptz,
        planned_seconds: float8,
        run_seconds: float8,
        ideal_cycle_seconds: float8,
        total_count: "int",
        good_count: "int",
      },
      changes: hours((
        id,
        at,
        { planned, run, total, good },
        cycle,
      ) => planned ? [id, at, planned, run, cycle, total, good] : undefined),
      conflict: `(machine_id, hour) do update set (planned_seconds, run_seconds, total_count,
          good_count) = (excluded.planned_seconds, excluded.run_seconds, excluded.total_count,
          excluded.good_count) where production.planned_seconds < excluded.planned_seconds`,
    },
    downtime: {
      columns: {
        machine_id: text,
        started_at: timestamptz,
        ended_at: timestamptz,
        reason: text,
      },
      changes: events("stop", "name"),
      conflict: `(machine_id, started_at) do update set ended_at = excluded.ended_at
          where downtime.ended_at is null and excluded.ended_at is not null`,
    },
    maintenance: {
      columns: {
        machine_id: text,
        started_at: timestamptz,
        ended_at: timestamptz,
        kind: text,
        note: text,
      },
      changes: events("maintenance", "name", "text"),
      conflict: `(machine_id, started_at) do update set ended_at = excluded.ended_at
          where maintenance.ended_at is null and excluded.ended_at is not null`,
    },
    alarms: {
      columns: {
        machine_id: text,
        raised_at: timestamptz,
        cleared_at: timestamptz,
        code: text,
        severity: text,
        message: text,
      },
      changes: events("alarm", "name", "severity", "text"),
      conflict: `(machine_id, code, raised_at) do update set cleared_at = excluded.cleared_at
          where alarms.cleared_at is null and excluded.cleared_at is not null`,
    },
  };
}

// --- a fleet: what a host does follows from seed, host and time ------------------------------

/** What hosts are for: how many of a hundred, cores, GB, and how busy they are by day. */
const ROLES = [
  { role: "web", share: 40, cores: [4, 8], gb: [8, 16], busy: 0.3, disk: 2e6, net: 2e7 },
  { role: "app", share: 30, cores: [8, 16], gb: [16, 64], busy: 0.35, disk: 3e6, net: 8e6 },
  { role: "db", share: 12, cores: [16, 32], gb: [64, 256], busy: 0.25, disk: 6e7, net: 3e7 },
  { role: "batch", share: 10, cores: [16, 64], gb: [64, 128], busy: 0.55, disk: 2e7, net: 4e6 },
  { role: "cache", share: 8, cores: [4, 8], gb: [32, 128], busy: 0.1, disk: 2e5, net: 5e7 },
];
const SITES = ["fra", "iad", "sin"];
const SYSTEMS = ["Debian GNU/Linux 12", "Ubuntu 24.04 LTS", "Rocky Linux 9"];
const GB = 2 ** 30;

const within = (least: number, value: number, most: number) =>
  Math.min(Math.max(value, least), most);
/** A number that changes little by little, between 0 and 1. */
const drift = (seed: number, time: number) => within(0, 0.5 + walk(seed, time) / 2, 1);
const part = (value: number) => Math.round(within(0, value, 1) * 1e4) / 1e4;

/** One host of a fleet: everything about it at any moment. */
export class Host {
  readonly name: string;
  readonly tags: Record<string, string>;
  readonly #seed: number;
  readonly #kind: typeof ROLES[0];
  readonly #os: string;
  readonly #cores: number;
  readonly #memory: number;
  readonly #disk: number;
  /** It runs hot; its disk fills up and is cleaned every so many days; it has been up since. */
  readonly #hot: boolean;
  readonly #fills: number;
  readonly #booted: number;

  constructor(seed: number, i: number) {
    const own = this.#seed = sub(seed, i + 1);
    const pick = <T>(list: T[], n: number) => list[Math.floor(chance(own, n) * list.length)];
    // The same shares in every hundred, so that a small fleet has some of each too.
    let place = (i * 37) % 100;
    this.#kind = ROLES.find(({ share }) => (place -= share) < 0)!;
    this.name = `${this.#kind.role}-${String(i + 1).padStart(4, "0")}`;
    this.tags = {
      role: this.#kind.role,
      site: pick(SITES, 1),
      rack: `${1 + Math.floor(chance(own, 2) * 40)}`,
    };
    this.#os = pick(SYSTEMS, 3);
    this.#cores = pick(this.#kind.cores, 4);
    this.#memory = pick(this.#kind.gb, 5) * GB;
    this.#disk = (this.#kind.role === "db" ? 2000 : 200) * GB;
    this.#hot = chance(own, 6) < 0.03;
    this.#fills = chance(own, 7) < 0.02 ? 1.2 : 5 + 60 * chance(own, 7);
    this.#booted = -Math.floor(chance(own, 8) * 90 * DAY);
  }

  /** What collect.ts would measure then. */
  metrics(time: number) {
    const own = this.#seed;
    const { busy, disk, net, role } = this.#kind;
    const day = 1 + 0.5 * Math.sin((time / DAY - 0.375) * 2 * Math.PI);
    const shape = day * (0.4 + 1.2 * drift(own, time)) + 0.1 * chance(own, time);
    const work = this.#hot ? 0.75 + 0.25 * drift(own, time) : busy * shape;
    const used = part(within(0.01, work, 0.99));
    const iowait = part(used * (role === "db" ? 0.15 : 0.02) * drift(own + 10, time));
    const system = part((used - iowait) * 0.25);
    const steal = part(chance(own, 9) < 0.1 ? 0.03 * drift(own + 20, time) : 0);
    const load = (ago: number) =>
      cents(this.#cores * (this.#hot ? 1.4 : 1) * used * (0.9 + 0.2 * drift(own, time - ago)));
    const taken = this.#hot ? 0.93 : 0.35 + 0.35 * drift(own + 30, time) + 0.05 * chance(own, 10);
    const available = Math.round(this.#memory * (1 - taken));
    const swap = 4 * GB;
    const swapped = this.#hot ? Math.round(swap * 0.6 * drift(own + 40, time)) : 0;
    // Full by and by, then cleaned.
    const age = (time / DAY / this.#fills + chance(own, 11)) % 1;
    const filled = within(0, 0.3 + (this.#fills < 2 ? 0.66 : 0.45) * age, 0.97);
    const mount = (size: number, part: number, device: string) => ({
      device,
      type: "ext4",
      size,
      used: Math.round(size * 0.95 * part),
      available: Math.round(size * 0.95 * (1 - part)),
      inodes: Math.round(size / 16_384),
      inodes_used: Math.round(size / 16_384 * part * 0.3),
    });
    const moved = disk * shape * (0.5 + chance(own + 1, time));
    const sent = net * shape * (0.8 + 0.4 * chance(own + 2, time));
    const received = sent * (role === "cache" ? 0.2 : 0.6);
    const up = Math.floor(time / (90 * DAY)) * 90 * DAY + this.#booted;
    return {
      cpu: { used, user: part(used - iowait - system), system, iowait, steal, cores: this.#cores },
      load: [load(0), load(5 * MINUTE), load(15 * MINUTE)],
      memory: {
        total: this.#memory,
        available,
        free: Math.round(available * 0.3),
        buffers: Math.round(available * 0.05),
        cached: Math.round(available * 0.6),
      },
      swap: { total: swap, used: swapped },
      filesystems: {
        "/": mount(40 * GB, 0.25 + 0.05 * drift(own + 50, time), "/dev/vda1"),
        "/var/lib": mount(this.#disk, filled, "/dev/vdb1"),
      },
      disks: {
        vda: {
          read_bytes: Math.round(moved * 0.02),
          written_bytes: Math.round(moved * 0.05),
          reads: cents(moved / 2e6),
          writes: cents(moved / 1e6),
          busy: part(moved / 4e9),
        },
        vdb: {
          read_bytes: Math.round(moved * 0.6),
          written_bytes: Math.round(moved * 0.4),
          reads: cents(moved / 4e4),
          writes: cents(moved / 3e4),
          busy: part(moved / 2e8),
        },
      },
      network: {
        eth0: {
          received_bytes: Math.round(received),
          sent_bytes: Math.round(sent),
          received_packets: Math.round(received / 900),
          sent_packets: Math.round(sent / 1100),
          received_errors: 0,
          sent_errors: 0,
          received_drops: chance(own + 3, time) < 0.01 ? 1 : 0,
          sent_drops: 0,
        },
      },
      uptime: Math.round((time - up) / 1000),
      processes: { total: 120 + Math.round(200 * drift(own + 60, time)), running: 1, blocked: 0 },
      sockets: { tcp: 20 + Math.round(sent / 1e5), udp: 6 },
      collector: { spool_bytes: 0, spool_samples: 0, lost: 0, seconds: 0.0004 },
    };
  }

  /** As collect.ts sends it. */
  record(time: number, interval: number) {
    const metrics = this.metrics(time);
    return {
      time: new Date(time).toISOString(),
      host: this.name,
      tags: this.tags,
      about: { os: this.#os, version: "1", interval: interval / 1000 },
      ...this.#summary(metrics),
      metrics,
    };
  }

  /** As pgpulse.collect stores it. */
  row(time: number): Value[] {
    const metrics = this.metrics(time);
    return [
      time,
      this.name,
      JSON.stringify(this.tags),
      JSON.stringify(metrics),
      ...Object.values(this.#summary(metrics)),
    ];
  }

  /** What stands in columns of its own, in their order. */
  #summary({ cpu, load, memory, swap, filesystems, disks, network }: ReturnType<Host["metrics"]>) {
    const share = (part: number, whole: number) => Math.round(part / whole * 1e6) / 1e6;
    const mounts = Object.values(filesystems);
    const all = Object.values(disks);
    return {
      cpu: cpu.used,
      iowait: cpu.iowait,
      steal: cpu.steal,
      load1: load[0],
      memory_used: share(memory.total - memory.available, memory.total),
      swap_used: share(swap.used, swap.total),
      filesystem_used: Math.max(...mounts.map((m) => share(m.used, m.used + m.available))),
      inodes_used: Math.max(...mounts.map((m) => share(m.inodes_used, m.inodes))),
      disk_busy: Math.max(...all.map((d) => d.busy)),
      disk_bytes: all.reduce((sum, d) => sum + d.read_bytes + d.written_bytes, 0),
      received_bytes: network.eth0.received_bytes,
      sent_bytes: network.eth0.sent_bytes,
    };
  }
}

let made: { seed: number; hosts: Host[] } | undefined;

function hostsOf(seed: number, size: number): Host[] {
  if (made?.seed !== seed || made.hosts.length !== size) {
    made = { seed, hosts: Array.from({ length: size }, (_, i) => new Host(seed, i)) };
  }
  return made.hosts;
}

/** The table of a fleet of so many hosts. */
export function fleet(size: number): Record<string, Table> {
  const last = new Host(0, size - 1).name;
  return {
    system_metrics: {
      columns: {
        time: "timestamptz",
        host: "text",
        tags: "jsonb",
        metrics: "jsonb",
        cpu: "float8",
        iowait: "float8",
        steal: "float8",
        load1: "float8",
        memory_used: "float8",
        swap_used: "float8",
        filesystem_used: "float8",
        inodes_used: "float8",
        disk_busy: "float8",
        disk_bytes: "float8",
        received_bytes: "float8",
        sent_bytes: "float8",
      },
      rows: (seed, time, there = 0) =>
        hostsOf(seed, size).slice(there).map((host) => host.row(time)),
      probe: {
        few: `host in ('${new Host(0, 0).name}', '${last}')`,
        last: `host = '${last}'`,
        count: "coalesce(max(substring(host from '^[a-z]+-([0-9]{4,5})$')::int), 0)",
      },
    },
  };
}

// --- a building: what its sensors leave in MongoDB -------------------------------------------

/** What sensors measure: unit, least, most, and by how much days differ from nights. */
const METRICS = [
  { metric: "temperature", unit: "°C", from: 17, to: 25, day: 2 },
  { metric: "humidity", unit: "%", from: 30, to: 60, day: -4 },
  { metric: "co2", unit: "ppm", from: 420, to: 1200, day: 150 },
  { metric: "power", unit: "W", from: 50, to: 900, day: 250 },
];

/** What each sensor of a building says at a time; one in a thousand says nonsense. */
function building(seed: number, size: number, time: number): Record<string, unknown>[] {
  const day = Math.sin((time / DAY - 0.375) * 2 * Math.PI);
  return Array.from({ length: size }, (_, i) => {
    const own = sub(seed, i + 1);
    const { metric, unit, from, to, day: swing } = METRICS[i % METRICS.length];
    const value = within(from, from + (to - from) * drift(own, time) + swing * day, 2 * to);
    const hex = (n: number, digits: number) => (n >>> 0).toString(16).padStart(digits, "0");
    return {
      _id: hex(time / 1000, 8) + hex(own, 8) + hex(time % 1000, 4) + hex(i, 4),
      status: "ingested",
      device: `sensor-${String(i + 1).padStart(3, "0")}`,
      metric,
      value: chance(own + 1, time) < 0.001 ? "n/a" : cents(value),
      unit,
      timestamp: new Date(time),
      room: { floor: 1 + Math.floor(i / 12), number: 101 + 100 * Math.floor(i / 12) + i % 12 },
      battery: Math.round(100 - (time / DAY + 90 * chance(own, 2)) % 90),
      tags: [metric, i % 3 ? "wireless" : "wired"],
    };
  });
}

// --- the command line ------------------------------------------------------------------------

const WORDS = Object.entries(SOURCES)
  .map(([word, { help, interval }]) => `  ${word.padEnd(18)}${help}, every ${interval}`);

const HELP = `Makes rows that look like measurements: a live trickle, or years of history.

Usage: deno task generate [WHAT] [flags]

What
${WORDS.join("\n")}
  Default: metrics. Tables come from deno task migrate.

Flags
  --interval TIME   between two ticks; units ms s m h d y, from 1ms (default: see above)
  --machines N      how many stand in the factory (default: 20)
  --hosts N         how many are in the fleet (default: 100)
  --sensors N       how many are in the building (default: 20)
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
A backfill writes only the ticks that have no row yet, in transactions of about two seconds; where
storage packs, old days of the factory go into packed form at once. When
it was stopped, the same line goes on where it ended; run twice, it adds nothing.
Ctrl-C (or SIGTERM) ends it at any moment; what is not committed then is undone.

The factory's shifts, stops, alarms, maintenance, production and energy follow from seed and time
too, and OEE from them: they are written beside machine_metrics, each once. Started again after a
stop it ends what was open and tells what came meanwhile; the samples of that time are a gap, which
--backfill fills. Hours are those of UTC. With another seed or less machines, begin in empty tables.
With more machines --backfill gives the new ones their past; stop the one that goes on with less.
Beside deno task dev that is: deno task dev --no-factory.

Live samples of hosts go through pgpulse.collect, one a call on eight connections, as from so many
collectors; a backfill is copied, and its last sample of each host goes that way.

Readings go to the collection "readings" of MongoDB, as documents with status "ingested", and need no
PostgreSQL. Their _id follows from seed, sensor and time, so that none comes twice. One in a thousand
has a value that is no number: a dead letter.

Environment
  DATABASE_URL, else DB_HOST DB_PORT DB_NAME DB_USER DB_PASSWORD DB_SSLMODE DB_SSLROOTCERT
  MONGO_URI         for readings: mongodb://user:password@host:27017/database (default database:
                    testdb)

Cost
  Live: 60 MB of memory and next to no CPU at 5s, 100 MB and some 10 % of a core at 1ms.
  Backfill: a core of the database and half a core here, some 200,000 rows a second; of hosts,
  whose rows are large, some 10,000: a day of 1,000 hosts a minute takes minutes and 5 GB.
  Disk: metrics grows by 17,280 rows a day at 5s, 2 MB with its indexes; a factory of 20 machines
  by 1.6 million samples a day at 10s, some 250 MB, until they are packed; 1,000 hosts by 17 million
  at 5s, some 36 GB.

Exit status
  0 done, 1 failed, 2 wrong flags, 130 stopped before its end

Examples
  deno task generate
  deno task generate live --interval 100ms
  deno task generate metrics --backfill 30d
  deno task generate metrics --backfill 365d --interval 1m --seed demo
  deno task generate metrics --backfill 7d --follow
  deno task generate factory --backfill 1d --follow
  deno task generate factory --machines 100 --backfill 1y --interval 1m --follow
  deno task generate hosts --hosts 1000 --backfill 24h --interval 1m --follow
  MONGO_URI=mongodb://localhost/testdb deno task generate readings --backfill 1h --follow`;

/** What the command line asks for. Times are in ms. */
export interface Job {
  what: string;
  interval: number;
  machines: number;
  hosts: number;
  sensors: number;
  count: number;
  seed?: string;
  backfill: number;
  follow: boolean;
  wait: number;
}

class UsageError extends Error {}

/** Reads "250ms", "5s", "30d" or "1y" as ms. */
export function duration(flag: string, text: string): number {
  const [, number, unit] = /^(\d+)(ms|s|m|h|d|y)$/.exec(text) ?? [];
  const ms = Number(number) * { ms: 1, s: 1e3, m: 6e4, h: 36e5, d: 864e5, y: 365 * 864e5 }[unit]!;
  if (!(ms >= 1 && ms <= 36_500 * 864e5)) {
    throw new UsageError(
      `Cannot read --${flag} "${text}": expected a whole number and a unit (ms s m h d y), ` +
        `from 1ms to 100y, such as 250ms, 5s or 30d`,
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
        machines: flag,
        hosts: flag,
        sensors: flag,
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
  const size = (flag: "machines" | "hosts" | "sensors", of: string, otherwise: number) => {
    const text = values[flag];
    const size = Number(text ?? otherwise);
    if (text && what !== of) {
      throw new UsageError(`Cannot use --${flag} with ${what}: it goes with ${of}`);
    }
    if (!(Number.isInteger(size) && size > 0 && size <= 10_000)) {
      throw new UsageError(
        `Cannot read --${flag} "${text}": expected a whole number from 1 to 10000`,
      );
    }
    return size;
  };
  const machines = size("machines", "factory", 20);
  const hosts = size("hosts", "hosts", 100);
  const sensors = size("sensors", "readings", 20);
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
    machines,
    hosts,
    sensors,
    count,
    seed: values.seed,
    backfill,
    follow: values.follow,
    wait: Number(values.wait) * 1000,
  };
}

// --- COPY in binary ------------------------------------------------------------------------

const utf8 = new TextEncoder();
/** Bytes of texts that were written before: most come again and again. */
const texts = new Map<string, Uint8Array>();
/** Bytes of a text at most. */
const LONGEST = 60_000;

/** Writes one value of each type; returns its bytes. */
const put: Record<Type, (view: DataView, at: number, value: never) => number> = {
  float8: (view, at, value: number) => (view.setFloat64(at, value), 8),
  int: (view, at, value: number) => (view.setInt32(at, value), 4),
  // A version, then text; each another.
  jsonb(view, at, value: string) {
    view.setUint8(at, 1);
    const rest = new Uint8Array(view.buffer, at + 1);
    const { read, written } = utf8.encodeInto(value, rest);
    if (read < value.length || written > LONGEST) {
      throw new RangeError(`Cannot copy a document of ${value.length} characters`);
    }
    return 1 + written;
  },
  text(view, at, value: string) {
    let bytes = texts.get(value);
    if (!bytes) {
      bytes = utf8.encode(value);
      if (bytes.length > LONGEST) {
        throw new RangeError(`Cannot copy a text of ${value.length} characters`);
      }
      if (texts.size === 10_000) texts.clear();
      texts.set(value, bytes);
    }
    for (let i = 0; i < bytes.length; i++) view.setUint8(at + i, bytes[i]);
    return bytes.length;
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
/** Age from which on a backfill packs what it writes, where storage does so a week after. */
const PACKED = 8 * DAY;
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

/** Connections that samples of hosts are sent through. */
const COLLECTORS = 8;

const CLIENT = {
  max: 1,
  fetch_types: false,
  connection: { application_name: "pgpulse generate" },
};

/** The columns of times: the first is that of a tick. */
const timeOf = (columns: Table["columns"]) =>
  Object.keys(columns).filter((name) => columns[name] === "timestamptz");

/** Ticks from `first` to `last`; tick n is at n times the interval. */
interface Ticks {
  first: number;
  last: number;
  /** Machines that have theirs: all before that number. */
  there?: number;
}

/** One run: writes what a job asks for. */
export class Run {
  /** What is committed: rows, the ticks they span, and how many ticks a backfill found written. */
  readonly written = { rows: 0, first: Infinity, last: -Infinity, there: 0 };
  /** Whether nothing but a signal ends it. */
  endless: boolean;
  readonly #job: Job;
  readonly #stop: AbortSignal;
  readonly #source: Source;
  readonly #tables: [name: string, table: Table][];
  /** Those with rows at each tick. */
  readonly #ticking: [name: string, table: Ticking][];
  readonly #id = crypto.randomUUID();
  readonly #size: number;
  #client = CLIENT;
  #sql: postgres.Sql;
  #seed = 0;
  /** Rows made that are not committed, and the newest tick. */
  #made = { rows: 0, tick: 0 };
  /** Up to when changes are written. */
  #told = 0;

  constructor(job: Job, stop: AbortSignal) {
    this.#job = job;
    this.#stop = stop;
    this.endless = job.count === Infinity && !job.backfill;
    this.#source = SOURCES[job.what];
    if (this.#source.records) this.#client = { ...CLIENT, max: COLLECTORS };
    this.#sql = connect(this.#client);
    this.#size = job.what === "hosts" ? job.hosts : job.machines;
    this.#tables = Object.entries(this.#source.tables(this.#size));
    this.#ticking = this.#tables.filter(([, { rows }]) => rows) as [string, Ticking][];
  }

  /** Writes until all is done; throws when the signal comes. */
  async run(): Promise<void> {
    const { what, interval, backfill, follow, seed } = this.#job;
    const [[table]] = this.#tables;
    const began = performance.now();
    // Before the first tick, so that a wrong password is not found an hour later.
    const [{ oid }] = await this.#insist((sql) => sql`select ${quote(table)}::text::regclass::oid`);
    const word = seed ?? this.#source.seed ?? `${oid}`;
    this.#seed = [...`${what} ${word}`].reduce(
      (h, letter) => chance(h, letter.codePointAt(0)!) * 2 ** 32 | 0,
      0,
    );
    say(`Writes ${what} every ${span(interval)}, seed "${word}"; Ctrl-C stops`);
    const next = Math.floor(Date.now() / interval);
    if (backfill) {
      // The tick that is due now is left to what writes live.
      const last = this.#source.records ? next - 1 : next;
      await this.#backfill(next - Math.floor(backfill / interval), last);
      if (last < next) {
        await this.#collect({ first: last, last });
        this.#committed([{ first: last, last }]);
      }
      if (!follow) return;
      say(`${this.summary(performance.now() - began)}; goes on live`);
    }
    // What was open when it was stopped is ended, and what came meanwhile is told.
    const past = (next - 1) * interval;
    await this.#insist(async (sql) => {
      const { told } = this.#source;
      if (!told) return;
      const [row] = await sql.unsafe<{ told: number | null }[]>(told);
      await this.#tell(sql, Math.min(row.told ?? past, past) - DAY, past);
    });
    this.#told = past;
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
    const into = this.#ticking.map(([name]) => name).join(", ");
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

  /** Sends each record of some ticks by itself, as collectors would; what is known is not taken. */
  async #collect({ first, last }: Ticks): Promise<void> {
    const { interval } = this.#job;
    let next = first;
    let records: unknown[] = [];
    const send = async (sql: postgres.Sql) => {
      for (;;) {
        if (!records.length && next <= last) {
          this.#made.tick = next;
          records = this.#source.records!(this.#seed, this.#size, next++ * interval, interval);
        }
        const record = records.pop();
        if (!record) return;
        this.#stop.throwIfAborted();
        const [{ taken }] = await sql.unsafe(
          "select (pgpulse.collect($1::text::json) -> 'taken')::int as taken",
          [JSON.stringify([record])],
          { prepare: true },
        );
        this.#made.rows += taken;
      }
    };
    await this.#insist(async (sql) => {
      [next, records, this.#made.rows] = [first, [], 0];
      await Promise.all(Array.from({ length: COLLECTORS }, () => send(sql)));
    });
  }

  /** Inserts some ticks by one statement: once, even when the answer to a first try was lost. */
  async #insert(ticks: Ticks): Promise<void> {
    if (this.#source.records) return await this.#collect(ticks);
    const to = ticks.last * this.#job.interval;
    const rows = this.#tables.map(([, table]) =>
      table.rows
        ? Array.from(this.#rows(table as Ticking, [ticks]))
        : table.changes!(this.#seed, this.#told, to)
    );
    const [[first, { columns }]] = this.#tables;
    const { inserts, json } = this.#inserts(this.#tables, rows);
    await this.#insist(async (sql, again) => {
      if (again) {
        // Waits for the end of the first try, then looks whether its last row is there.
        await sql`select pg_advisory_xact_lock(hashtextextended(${this.#id}, 0))`;
        const names = Object.keys(columns).map(quote);
        const [time] = timeOf(columns).map(quote);
        const of = (row: string) => `(${names.map((name) => `${row}.${name}`)})`;
        const found = await sql.unsafe(
          `select from ${quote(first)} as t, jsonb_populate_record(null::${quote(first)}, $1) as r
          where t.${time} = r.${time} and ${of("t")} is not distinct from ${of("r")} limit 1`,
          [sql.json(json[first].at(-1)!)],
        );
        if (found.length) return;
      }
      await sql.unsafe(
        `with ${inserts} select pg_advisory_xact_lock(hashtextextended($2, 0))`,
        [sql.json(json), this.#id],
        { prepare: true },
      );
    });
    this.#told = to;
  }

  /** Common table expressions that insert the rows of each table, and what they read: $1. */
  #inserts(tables: [name: string, table: Table][], rows: Value[][][]) {
    const json = Object.fromEntries(tables.map(([name, { columns }], i) => {
      const types = Object.entries(columns);
      return [
        name,
        rows[i].map((row) =>
          Object.fromEntries(types.map(([column, type], i) => {
            const value = row[i];
            const text = type === "timestamptz" && value !== null;
            return [column, text ? new Date(value).toISOString() : value];
          }))
        ),
      ];
    }));
    const inserts = tables.map(([name, { columns, conflict }], i) => {
      const [table, names] = [quote(name), Object.keys(columns).map(quote)];
      return `t${i} as (
          insert into ${table} (${names}) select ${names}
          from jsonb_populate_recordset(null::${table}, $1::jsonb -> '${name}')
          ${conflict ? `on conflict ${conflict}` : ""}
      )`;
    });
    return { inserts: inserts.join(), json };
  }

  /** Writes what changed from `from` to `to`, a month at a time; told twice, it does no harm. */
  async #tell(sql: postgres.Sql | postgres.TransactionSql, from: number, to: number) {
    for (let at = from; at < to; at += 30 * DAY) {
      for (const [name, table] of this.#tables) {
        const rows = table.changes?.(this.#seed, at, Math.min(at + 30 * DAY, to)) ?? [];
        for (let i = 0; i < rows.length; i += BATCH) {
          this.#stop.throwIfAborted();
          const { inserts, json } = this.#inserts([[name, table]], [rows.slice(i, i + BATCH)]);
          await sql.unsafe(`with ${inserts} select`, [sql.json(json)], { prepare: true });
        }
      }
    }
  }

  /** Fills the ticks from `from` up to `to`, without it, that have no row yet; oldest first. */
  async #backfill(from: number, to: number): Promise<void> {
    const { interval } = this.#job;
    let step = this.#ticksFor(CHUNK.first);
    this.#made.tick = from;
    const stored = await this.#insist((sql) =>
      Promise.all(this.#ticking.map(([name]) => storage(sql, name)))
    );
    // What upkeep would pack next is packed at once, in whole days.
    const recent = stored.some(({ packs }) => packs) ? dayOf(Date.now() - PACKED) * DAY : -Infinity;
    const key = `generate ${this.#job.what}`;
    const bar = progress(() => ({
      done: (this.#made.tick - from) / (to - from),
      rows: this.written.rows + this.#made.rows,
    }));
    try {
      for (let at = from; at < to;) {
        const began = performance.now();
        const old = at * interval < recent;
        const days = Math.max(dayOf((at + step) * interval), dayOf(at * interval) + 1);
        const next = old ? Math.ceil(Math.min(days * DAY, recent) / interval) : at + step;
        const all = { first: at, last: Math.min(next, to) - 1 };
        let copied: Ticks[] = [];
        await this.#insist((sql) =>
          sql.begin(async (tx) => {
            // Waits for another backfill, and for an own try whose connection was lost.
            await tx`select pg_advisory_xact_lock(hashtextextended(${key}, 0))`;
            const gaps = await this.#gaps(tx, all);
            // None at a second try: the first was committed, only the answer was lost.
            if (!gaps.length) return;
            this.#made = { rows: 0, tick: at };
            await this.#tell(tx, (all.first - 1) * interval, all.last * interval);
            for (const [i, [name, table]] of this.#ticking.entries()) {
              const pack = old && stored[i].packs;
              const rows = pack ? "pg_temp.pgpulse_new" : stored[i].rows;
              if (pack) {
                // pack_from reads it with its owner's rights.
                await tx.unsafe(`create temp table pgpulse_new (like ${quote(name)}) on commit drop;
                  grant select on pgpulse_new to ${stored[i].owner}`);
              }
              const into = `${rows} (${Object.keys(table.columns).map(quote)})`;
              await pipeline(
                binary(Object.values(table.columns), this.#rows(table, gaps)),
                await tx.unsafe(`copy ${into} from stdin (format binary)`).writable(),
                { signal: this.#stop },
              );
              if (pack) {
                await tx.unsafe(`select pgpulse.pack_from('${quote(name)}', '${rows}');
                  drop table pgpulse_new`);
              }
            }
            copied = gaps;
          })
        );
        this.#committed(copied);
        const ticks = all.last - all.first + 1;
        this.written.there += copied.reduce(
          (there, { first, last }) => there - (last - first + 1),
          ticks,
        );
        this.#made.tick = at = all.last + 1;
        const fitting = ticks * CHUNK.ms / (performance.now() - began);
        step = Math.ceil(Math.min(fitting, this.#ticksFor(CHUNK.rows)));
      }
    } finally {
      bar.end();
    }
  }

  /** The ticks among `all` that have no row in the first table, or not of each machine, as ranges. */
  async #gaps(
    sql: postgres.Sql | postgres.TransactionSql,
    { first, last }: Ticks,
  ): Promise<Ticks[]> {
    const { interval } = this.#job;
    const [name, { columns, probe = { few: "true", last: "true", count: "0" } }] = this.#tables[0];
    const time = sql(timeOf(columns)[0]);
    const [before, begin, end] = [first - 1, first, last + 1]
      .map((tick) => new Date(tick * interval));
    const number = (at: string) =>
      sql.unsafe(`(extract(epoch from ${at}) * 1000 / ${interval}::int8)::float8`);
    return await sql<Ticks[]>`
      with grid as (
          select ${`${interval} ms`}::text::interval as step
      ), taken as materialized (
          select date_bin(step, ${time}, timestamptz 'epoch') as tick,
              bool_or(${sql.unsafe(probe.last)}) as whole
          from ${sql(name)}, grid
          where ${time} >= ${begin} and ${time} < ${end} and ${sql.unsafe(probe.few)}
          group by 1
      )
      select ${number("tick")} + 1 as first, ${number("next")} - 1 as last, 0::float8 as there
      from grid, (
          select tick, lead(tick, 1, ${end}) over (order by tick) as next
          from (select ${before}::timestamptz as tick union all select tick from taken) as ticks
      ) as pairs
      where next - tick > step
      union all
      select ${number("tick")}, ${number("tick")}, (
          select ${sql.unsafe(probe.count)}::float8
          from ${sql(name)}
          where ${time} >= tick and ${time} < tick + step
      )
      from taken, grid
      where not whole
      order by 1
    `;
  }

  /** The rows of some ticks of one table. */
  *#rows(table: Ticking, ranges: Ticks[]): Generator<Value[]> {
    for (const { first, last, there } of ranges) {
      for (let tick = first; tick <= last; tick++) {
        this.#made.tick = tick;
        for (const row of table.rows(this.#seed, tick * this.#job.interval, there)) {
          this.#made.rows++;
          yield row;
        }
      }
    }
  }

  /** How many ticks make about so many rows. */
  #ticksFor(rows: number): number {
    const tick = this.#ticking.flatMap(([, table]) => table.rows(this.#seed, Date.now()));
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
        this.#sql = connect(this.#client);
        await sleep(pause, undefined, { signal: this.#stop });
        pause = Math.min(pause * 2, 5000);
      }
    }
  }
}

/** Writes documents to MongoDB; of the shape of Run. */
class Documents {
  endless: boolean;
  readonly #job: Job;
  readonly #stop: AbortSignal;
  readonly #source: Source;
  #client?: { close(): Promise<void> };
  #written = 0;
  #there = 0;

  constructor(job: Job, stop: AbortSignal) {
    [this.#job, this.#stop] = [job, stop];
    this.endless = job.count === Infinity && !job.backfill;
    this.#source = SOURCES[job.what];
  }

  async run(): Promise<void> {
    const { what, interval, backfill, follow, count, seed } = this.#job;
    const uri = Deno.env.get("MONGO_URI");
    if (!uri) throw new UsageError("Cannot write readings: set MONGO_URI, the address of MongoDB");
    // Loaded only here: other words need no MongoDB.
    const { MongoClient, ObjectId } = await import("npm:mongodb@7.9.0");
    const [, name = "testdb"] = /^mongodb(?:\+srv)?:\/\/[^/]+\/([^?]+)/.exec(uri) ?? [];
    let client;
    try {
      client = new MongoClient(uri, { serverSelectionTimeoutMS: 5000 });
    } catch (error) {
      throw new Error(`Cannot read MONGO_URI: ${(error as Error).message}`);
    }
    this.#client = client;
    const readings = client.db(name).collection(what);
    const word = seed ?? this.#source.seed!;
    const number = [...`${what} ${word}`].reduce(
      (h, letter) => chance(h, letter.codePointAt(0)!) * 2 ** 32 | 0,
      0,
    );
    const at = client.options.hosts.join();
    let away = 0;
    const put = async (documents: Record<string, unknown>[]) => {
      const made = documents.map(({ _id, ...rest }) => ({ _id: new ObjectId(`${_id}`), ...rest }));
      for (let pause = 200;; pause = Math.min(pause * 2, 5000)) {
        this.#stop.throwIfAborted();
        try {
          const { insertedCount } = await readings.insertMany(made, { ordered: false });
          this.#written += insertedCount;
          break;
        } catch (error) {
          const { code, insertedCount, message } = error as {
            code?: number;
            insertedCount?: number;
            message: string;
          };
          // Some were there: they come once.
          if (code === 11000) {
            this.#written += insertedCount ?? 0;
            this.#there += made.length - (insertedCount ?? 0);
            break;
          }
          const text = `Cannot write to MongoDB at "${at}": ${message}`;
          if (typeof code === "number") throw new Error(text);
          if (!away) say(`${text}; tries again until it answers`);
          away ||= Date.now();
          await sleep(pause, undefined, { signal: this.#stop });
        }
      }
      if (away) say(`MongoDB works again after ${span(Date.now() - away)}; goes on`);
      away = 0;
    };
    const tick = (n: number) => this.#source.documents!(number, this.#job.sensors, n * interval);
    say(`Writes ${name}.${what} every ${span(interval)}, seed "${word}"; Ctrl-C stops`);
    let next = Math.floor(Date.now() / interval);
    if (backfill) {
      const [from, to] = [next - Math.floor(backfill / interval), next];
      let done = from;
      const bar = progress(() => ({ done: (done - from) / (to - from), rows: this.#written }));
      try {
        while (done < to) {
          const documents = [];
          while (done < to && documents.length < 1000) documents.push(...tick(done++));
          await put(documents);
        }
      } finally {
        bar.end();
      }
      if (!follow) return;
    }
    this.endless = count === Infinity;
    for (let left = count; left > 0; left--) {
      await put(tick(next));
      const wait = Math.max(++next * interval - Date.now(), 0);
      if (left > 1) await sleep(wait, undefined, { signal: this.#stop });
    }
  }

  async end(): Promise<void> {
    await this.#client?.close();
  }

  summary(ms: number): string {
    const rate = `${number(this.#written / ms * 1000)}/s`;
    const skipped = this.#there ? `; ${number(this.#there)} were there already` : "";
    return `Wrote ${number(this.#written)} documents in ${span(ms)} (${rate})${skipped}`;
  }
}

/** Where to COPY to, as partitions are quicker than the view before them; whether they pack. */
async function storage(sql: postgres.Sql, name: string) {
  const [{ packs, owner, parts }] = await sql`
    select coalesce(
            has_function_privilege(to_regproc('pgpulse.pack_from')::oid, 'execute'), false
        ) as packs,
        (
          select proowner::regrole::text from pg_proc where oid = to_regproc('pgpulse.pack_from')
        ) as owner,
        to_regproc('pgpulse.rows_of') is not null as parts
  `;
  if (!parts) return { rows: quote(name), packs: false, owner };
  const [{ rows, stored }] = await sql`
    select pgpulse.rows_of(t)::text as rows, pgpulse.rows_of(t) <> t as stored
    from (select ${quote(name)}::text::regclass as t) as source
  `;
  return { rows, packs: packs && stored, owner };
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
  let run: Run | Documents | undefined;
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
    run = SOURCES[job.what].documents ? new Documents(job, stop.signal) : new Run(job, stop.signal);
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

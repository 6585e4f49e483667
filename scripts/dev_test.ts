import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import { createHash } from "node:crypto";
import { join } from "node:path";
import {
  fetchGrafana,
  freePort,
  type Part,
  processes,
  type State,
  supervise,
  TIMING,
} from "./dev.ts";
import { ROOT, testServer, until } from "./testing.ts";

const QUICK: Partial<typeof TIMING> = {
  every: 100,
  hang: 250,
  pause: 20,
  longest: 100,
  settle: 50,
  stop: 2_000,
};

const sh = (script: string) => ({ command: "sh", args: ["-c", script] });
const gone = (pid: number) => processes(pid).length === 0;

/** Supervises the parts while `use` looks at them; then stops them. */
async function watching(
  parts: Part[],
  use: (it: ReturnType<typeof supervise> & { lines: string[]; health: () => string }) =>
    | Promise<unknown>
    | unknown,
): Promise<string[]> {
  const lines: string[] = [];
  const it = supervise(parts, {
    log: (part, message) => lines.push(`${part}: ${message}`),
    timing: QUICK,
  });
  try {
    const health = () => it.states.map((s) => s.health).join(" ");
    await use({ ...it, lines, health });
  } finally {
    await it.stop();
  }
  return lines;
}

Deno.test("parts start when what they need is healthy, and stop before it", async () => {
  let open = false;
  const lines = await watching([
    {
      name: "a",
      start: () => sh("trap 'echo bye; exit' TERM; echo up; while :; do sleep 0.05; done"),
      probe: () => Promise.resolve(open ? undefined : "starting"),
    },
    { name: "b", after: ["a"], once: true, start: () => sh("echo done") },
    {
      name: "c",
      after: ["b"],
      start: () =>
        sh("trap 'sleep 0.2; echo bye; exit' TERM; echo up; while :; do sleep 0.05; done"),
    },
  ], async ({ lines, health }) => {
    await until("a says something", () => lines.length);
    strictEqual(health(), "starting waiting waiting");
    open = true;
    await until("all is well", () => health() === "healthy done healthy");
    await until("c says something", () => lines.includes("c: up"));
  });
  const own = lines.filter((line) => !line.endsWith("Terminated")); // so says the shell
  deepStrictEqual(own, ["a: up", "b: done", "c: up", "c: bye", "a: bye"]);
});

Deno.test("a part that ends is restarted; one that keeps failing says why, once", async () => {
  await watching([
    {
      name: "bad",
      start: () => sh("echo 'cannot open the door' >&2; exit 3"),
      advice: "Look for the key",
    },
    { name: "needs", after: ["bad"], start: () => sh("sleep 60") },
    { name: "good", start: () => sh("sleep 60") },
  ], async ({ lines, states }) => {
    await until("it has failed often", () => states[0].restarts > 7);
    const told = lines.filter((line) => !line.includes(": cannot open"));
    deepStrictEqual(
      told,
      [
        "bad: Ended with exit status 3; next try in 0.02 s",
        "bad: has failed 5 times in a row: Ended with exit status 3. It last said:",
        "bad:     cannot open the door",
        "bad: Look for the key. It is tried again every 0.1 s",
      ],
    );
    strictEqual(states[1].health, "waiting");
    strictEqual(states[2].health, "healthy");
    strictEqual(states[2].restarts, 0);
  });
});

Deno.test("a full disk and a taken port are called by name", async () => {
  await watching([
    { name: "disk", start: () => sh("echo 'write: No space left on device'; exit 1") },
    { name: "port", port: 5432, start: () => sh("echo 'Address already in use'; exit 1") },
  ], async ({ lines, states }) => {
    await until("both have failed often", () => states.every((s) => s.restarts >= 5));
    ok(lines.some((line) => line.startsWith("disk: The disk is full")));
    ok(lines.some((line) => line.startsWith("port: Another program has taken port 5432")));
  });
});

Deno.test("a part that gives no sign of life is restarted, one that is unwell is not", async () => {
  let silent = false;
  await watching([
    {
      name: "hangs",
      // Deaf to SIGTERM, too.
      start: () => sh("trap '' TERM; sleep 60"),
      probe: () => silent ? new Promise(() => {}) : Promise.resolve(),
    },
    {
      name: "unwell",
      start: () => sh("sleep 60"),
      probe: () => Promise.resolve(silent ? "no database" : undefined),
    },
  ], async ({ lines, states, health }) => {
    await until("both are healthy", () => health() === "healthy healthy");
    const { pid } = states[0];
    silent = true;
    await until("it is restarted", () => states[0].restarts === 1 && states[0].pid);
    silent = false;
    await until("both are healthy now", () => health() === "healthy healthy");
    ok(gone(pid!));
    strictEqual(states[1].restarts, 0);
    strictEqual(lines.filter((l) => l === "unwell: is unwell: no database").length, 1);
    ok(lines.includes("unwell: is healthy now"));
    ok(lines.includes("hangs: is healthy now"));
  });
});

Deno.test("what cannot start says so once and the rest runs", async () => {
  await watching([
    {
      name: "fetch",
      start: () => Promise.reject(new Error("Cannot download it; use --no-grafana")),
    },
    { name: "absent", start: () => ({ command: "/no/such/program", args: [] }) },
    { name: "good", start: () => sh("sleep 60") },
  ], async ({ lines, states }) => {
    await until("it has failed often", () => states[0].restarts > 6 && states[1].restarts > 6);
    strictEqual(lines.filter((l) => l.startsWith("fetch: Cannot download it")).length, 1);
    strictEqual(lines.filter((l) => l.startsWith(`absent: Failed to spawn '/no/such`)).length, 1);
    strictEqual(states[2].health, "healthy");
  });
});

Deno.test("a stop leaves nothing behind, not even deaf parts and their children", async () => {
  const pids: number[] = [];
  const lines = await watching([
    { name: "deaf", start: () => sh("trap '' TERM; echo $$; while :; do sleep 1; done") },
    { name: "forks", start: () => sh("sleep 77 & echo $!; sleep 78 & echo $!; wait") },
    { name: "leaves", start: () => sh("sleep 79 & echo $!; exec sleep 80") },
    {
      name: "fetch",
      start: (signal) =>
        new Promise((_, fail) => signal.addEventListener("abort", () => fail(signal.reason))),
    },
  ], async ({ lines }) => {
    await until("all have told their pids", () => lines.length >= 4);
    pids.push(...lines.map((line) => Number(line.split(": ")[1])));
  });
  strictEqual(pids.length, 4);
  await until("all are gone", () => pids.every(gone));
  ok(lines.includes("deaf: Did not stop when asked; killed"));
});

Deno.test("what is only watched is waited for, and its troubles are told once", async () => {
  let away = true;
  await watching([
    {
      name: "database",
      probe: () => away ? Promise.reject(new Error("Nobody answers")) : Promise.resolve(),
    },
    { name: "script", after: ["database"], start: () => sh("sleep 60") },
  ], async ({ lines, health, states }) => {
    await until("it is told", () => lines.length);
    strictEqual(health(), "failing waiting");
    away = false;
    await until("both are well", () => health() === "healthy healthy");
    away = true;
    await until("it is noticed", () => health() === "unwell healthy");
    away = false;
    await until("both are well", () => health() === "healthy healthy");
    strictEqual(states[1].restarts, 0);
    deepStrictEqual(lines, [
      "database: is not there yet: Nobody answers",
      "database: is healthy now",
      "database: is unwell: Nobody answers",
      "database: is healthy now",
    ]);
  });
});

Deno.test("what a part says that it cannot do is shown, not told again; some lines are left out", async () => {
  let away = true;
  const lines = await watching([
    {
      name: "relay",
      start: () => sh("echo one; echo two; exec sleep 60"),
      probe: () => Promise.resolve(),
      complaint: () => away ? "Cannot reach it" : undefined,
      hear: (line) => line === "two" ? undefined : line,
    },
    { name: "needs", after: ["relay"], start: () => sh("exec sleep 60") },
  ], async ({ health, states }) => {
    await until("both run", () => health() === "degraded healthy");
    strictEqual(states[0].reason, "Cannot reach it");
    away = false;
    await until("both are well", () => health() === "healthy healthy");
    strictEqual(states[0].reason, undefined);
  });
  deepStrictEqual(lines, ["relay: one"]);
});

// --- download ------------------------------------------------------------------------------

/** A stand-in of grafana.com and its mirror; breaks off after so many bytes. */
async function mirror(use: (at: { breaks: number; sha256: string; asked: string[] }) => unknown) {
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await Deno.mkdir(join(dir, "grafana-v13/bin"), { recursive: true });
  const noise = crypto.getRandomValues(new Uint8Array(60_000));
  await Deno.writeFile(join(dir, "grafana-v13/bin/grafana"), noise, { mode: 0o755 });
  const tar = new Deno.Command("tar", { args: ["-czf", "g.tgz", "grafana-v13"], cwd: dir });
  ok((await tar.output()).success);
  const tgz = await Deno.readFile(join(dir, "g.tgz"));
  const it = {
    breaks: Infinity,
    sha256: createHash("sha256").update(tgz).digest("hex"),
    asked: [] as string[],
  };
  await using server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, (request) => {
    if (new URL(request.url).pathname === "/packages") {
      const item = {
        os: Deno.build.os,
        arch: Deno.build.arch === "aarch64" ? "arm64" : "amd64",
        url: "/g.tar.gz",
        sha256: it.sha256,
      };
      const other = { ...item, arch: "armv7", url: "/other.tar.gz" };
      return Response.json({ items: [other, { ...item, url: "/g.deb" }, item] });
    }
    const range = request.headers.get("range") ?? "";
    it.asked.push(range);
    const from = Number(range.match(/\d+/)?.[0] ?? 0);
    if (from >= tgz.length) return new Response(null, { status: 416 });
    const end = Math.min(tgz.length, from + it.breaks);
    const body = new ReadableStream({
      async start(controller) {
        controller.enqueue(tgz.slice(from, end));
        await new Promise((done) => setTimeout(done, 50));
        // With too few bytes this is what a pulled cable looks like.
        controller.close();
      },
    });
    return new Response(body, {
      status: from ? 206 : 200,
      headers: { "content-length": `${tgz.length - from}` },
    });
  });
  Deno.env.set("GRAFANA_PACKAGES_URL", `http://127.0.0.1:${server.addr.port}/packages`);
  try {
    await use(it);
  } finally {
    Deno.env.delete("GRAFANA_PACKAGES_URL");
    await Deno.remove(dir, { recursive: true });
  }
}

Deno.test("a broken download of Grafana goes on where it broke off", async () => {
  const cache = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  const { signal } = new AbortController();
  const lines: string[] = [];
  const log = (_: string, line: string) => lines.push(line);
  await mirror(async (it) => {
    it.breaks = 25_000;
    const get = () => fetchGrafana(log, signal, cache);
    await rejects(get(), /Cannot download Grafana [\d.]+: .*All else runs on/);
    await rejects(get(), /Cannot download/);
    const home = await get();
    deepStrictEqual(it.asked, ["", "bytes=25000-", "bytes=50000-"]);
    const { size, mode } = await Deno.stat(join(home, "bin", "grafana"));
    strictEqual(size, 60_000);
    ok(mode! & 0o100);
    strictEqual(await get(), home);
    strictEqual(it.asked.length, 3);
    const left = (await Array.fromAsync(Deno.readDir(cache))).map((f) => f.name);
    deepStrictEqual(left, [home.split("/").at(-1)]);
  });
  await Deno.remove(cache, { recursive: true });
});

Deno.test("a Grafana with a wrong checksum is thrown away, not run", async () => {
  const cache = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await mirror(async (it) => {
    const right = it.sha256;
    it.sha256 = "0".repeat(64);
    const get = () => fetchGrafana(() => {}, new AbortController().signal, cache);
    await rejects(get(), /checksum .* is wrong/);
    it.sha256 = right;
    await get();
    deepStrictEqual(it.asked, ["", ""]);
  });
  await Deno.remove(cache, { recursive: true });
});

Deno.test("without a network it says what to do; a tarball put there is taken", async () => {
  const cache = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  const get = () => fetchGrafana(() => {}, new AbortController().signal, cache);
  Deno.env.set("GRAFANA_PACKAGES_URL", `http://127.0.0.1:${freePort(0)}/packages`);
  const error = await get().catch((error: Error) => error) as Error;
  Deno.env.delete("GRAFANA_PACKAGES_URL");
  match(error.message, /GRAFANA_HOME .* --no-grafana/);
  const path = error.message.match(/at "([^"]+)"/)![1];
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await Deno.mkdir(join(dir, "grafana-v13/bin"), { recursive: true });
  await new Deno.Command("tar", { args: ["-czf", path, "grafana-v13"], cwd: dir }).output();
  ok((await Deno.stat(join(await get(), "bin"))).isDirectory);
  await Deno.remove(cache, { recursive: true });
  await Deno.remove(dir, { recursive: true });
});

// --- the command line ----------------------------------------------------------------------

/** A checkout of its own, with ports of its own; what runs in it is stopped in the end. */
async function checkout(env: Record<string, string> = {}) {
  const root = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  await Deno.chmod(root, 0o755);
  const copy = ["deno.json", "deno.lock", "scripts", "sql", "grafana"];
  await new Deno.Command("cp", { args: ["-R", ...copy, root], cwd: ROOT }).output();
  await Deno.symlink(join(ROOT, "node_modules"), join(root, "node_modules"));
  const all: Record<string, string> = {
    DB_PORT: `${freePort(0)}`,
    RELAY_PORT: `${freePort(0)}`,
    GRAFANA_PORT: `${freePort(0)}`,
    PORT: `${freePort(0)}`,
    ...env,
  };
  const command = (args: string[]) =>
    new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-prompt", "scripts/dev.ts", ...args],
      cwd: root,
      env: all,
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    });
  const run = async (...args: string[]) => {
    const { code, stdout, stderr } = await command(args).output();
    const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
    return { code, stdout: text(stdout), stderr: text(stderr) };
  };
  const status = async () => JSON.parse((await run("status", "--json")).stdout);
  /** What status reads, without the cost of a process. */
  const saved = (): { pid?: number; parts: State[] } => {
    try {
      return JSON.parse(Deno.readTextFileSync(join(root, ".pgpulse/state.json")));
    } catch {
      return { parts: [] };
    }
  };
  const started: Deno.ChildProcess[] = [];
  return {
    root,
    env: all,
    run,
    status,
    /** Starts the supervisor; `lines` fills with what it says. */
    start(...args: string[]) {
      const child = command(args).spawn();
      started.push(child);
      const lines: string[] = [];
      const read = async (stream: ReadableStream<Uint8Array>) => {
        let rest = "";
        for await (const text of stream.pipeThrough(new TextDecoderStream())) {
          const parts = (rest + text).split("\n");
          rest = parts.pop()!;
          lines.push(...parts);
        }
      };
      const read_ = Promise.all([read(child.stdout), read(child.stderr)]);
      return {
        child,
        lines,
        async stop(signal: Deno.Signal = "SIGTERM") {
          child.kill(signal);
          const { code } = await child.status;
          await read_;
          return code;
        },
        async healthy() {
          await until("all is healthy", () => {
            const { pid, parts } = saved();
            const well = ({ name, health }: State) =>
              name === "factory-past" || /healthy|degraded|done/.test(health);
            return pid === child.pid && parts.every(well);
          }, 30_000);
        },
      };
    },
    part: (name: string) => saved().parts.find((part) => part.name === name)!,
    async [Symbol.asyncDispose]() {
      for (const child of started) {
        try {
          child.kill("SIGTERM");
        } catch { /* ended */ }
        await child.status;
      }
      await Deno.remove(root, { recursive: true });
      const elsewhere = `/var/lib/pgpulse/data${root.replaceAll("/", "-")}-.pgpulse-postgres`;
      await Deno.remove(elsewhere, { recursive: true }).catch(() => {});
    },
  };
}

const pidsOf = (status: { parts: { pid?: number }[] }) =>
  status.parts.flatMap(({ pid }) => pid ? [pid] : []);

Deno.test("dev starts it all, status shows it, a signal ends it", async () => {
  await using here = await checkout();
  const before = await here.run("status");
  strictEqual(before.code, 3);
  match(before.stdout, /start it with deno task dev/);
  const dev = here.start("--no-grafana");
  await dev.healthy();
  const { parts, running, pid } = await here.status();
  ok(running);
  strictEqual(pid, dev.child.pid);
  const past = parts.pop();
  strictEqual(past.name, "factory-past");
  match(past.health, /starting|done/);
  deepStrictEqual(parts.map((p: { name: string; health: string }) => `${p.name} ${p.health}`), [
    "postgres healthy",
    "migrate done",
    "relay healthy",
    "upkeep healthy",
    "collect healthy",
    "etl healthy",
    "generate healthy",
    "generate-live healthy",
    "factory healthy",
  ]);
  match((await here.run("status")).stdout, /^relay .* healthy +http:\/\/localhost:\d+$/m);
  ok(!dev.lines.some((line) => /\| \d+ %, /.test(line)), "progress buries the sign-in");

  const second = await here.run("--no-grafana");
  strictEqual(second.code, 1);
  match(second.stderr, new RegExp(`runs here already \\(pid ${pid}\\); deno task status`));

  await until("it says where to click", () => dev.lines.some((l) => l.includes("Live page")));
  strictEqual(await dev.stop(), 0);
  deepStrictEqual(dev.lines.filter((line) => /FATAL|is unwell/.test(line)), []);
  ok(pidsOf({ parts: [...parts, past] }).every(gone));
  strictEqual((await here.run("status")).code, 3);
  const secrets = JSON.parse(await Deno.readTextFile(join(here.root, ".pgpulse/secrets.json")));
  for (const secret of Object.values(secrets)) ok(!dev.lines.join("\n").includes(`${secret}`));
  strictEqual((await Deno.stat(join(here.root, ".pgpulse/secrets.json"))).mode! & 0o777, 0o600);
});

Deno.test("kill -9 of each part and of the supervisor is got over", async () => {
  await using here = await checkout();
  const dev = here.start("--no-factory", "--no-grafana", "--json");
  await dev.healthy();
  for (const name of ["relay", "generate", "postgres"]) {
    const { pid } = here.part(name);
    Deno.kill(pid!, "SIGKILL");
    await until(`${name} is restarted`, () => {
      const part = here.part(name);
      return part.restarts > 0 && part.health === "healthy" && part.pid !== pid;
    }, 20_000);
  }
  await dev.healthy();
  for (const line of dev.lines) deepStrictEqual(typeof JSON.parse(line).message, "string");
  ok(!dev.lines.some((line) => /FATAL: +the database system|unexpected postmaster/.test(line)));

  const left = await here.status();
  await dev.stop("SIGKILL");
  ok(pidsOf(left).some((pid) => !gone(pid)));
  const status = await here.run("status");
  strictEqual(status.code, 3);
  const [, pids] = /left postgres, .* running; kill ([\d ]+) ends them/.exec(status.stdout)!;
  deepStrictEqual(pids.split(" ").map(Number), pidsOf(left).toReversed());
  const again = here.start("--no-factory", "--no-grafana");
  await again.healthy();
  ok(pidsOf(left).every(gone));
  strictEqual(
    again.lines.filter((line) => line.includes("left by a supervisor")).length,
    pidsOf(left).length,
  );
  strictEqual(here.part("postgres").port, left.parts[0].port);
  strictEqual(await again.stop("SIGINT"), 0);
});

Deno.test("taken ports, lost and damaged files, reused pids are got over", async () => {
  const port = freePort(20_000 + Math.floor(Math.random() * 10_000));
  await using here = await checkout({ DB_PORT: `${port}` });
  const folder = join(here.root, ".pgpulse");
  const state = join(folder, "state.json");
  await Deno.mkdir(folder);
  await Deno.writeTextFile(state, JSON.stringify({ ports: { postgres: port } }));
  using _other = Deno.listen({ hostname: "127.0.0.1", port });
  let dev = here.start("--no-factory", "--no-grafana");
  await dev.healthy();
  const used = here.part("postgres").port!;
  ok(used > port);
  ok(dev.lines.some((line) => line.includes(`Port ${port} is taken`)));
  await dev.stop();
  // As if another process had our pids now: the sleeper must live.
  const sleeper = new Deno.Command("sleep", { args: ["60"] }).spawn();
  const parts = [{ name: "relay", pid: sleeper.pid, started: "long ago" }];
  const ports = { postgres: used };
  await Deno.writeTextFile(state, JSON.stringify({ pid: 1, started: "x", ports, parts }));
  await Deno.remove(join(folder, "secrets.json"));
  dev = here.start("--no-factory", "--no-grafana");
  await dev.healthy();
  strictEqual(here.part("postgres").port, used);
  await dev.stop();
  ok(!gone(sleeper.pid));
  sleeper.kill();
  await sleeper.status;
  await Deno.writeTextFile(state, "{ half a fi");
  dev = here.start("--no-factory", "--no-grafana");
  await dev.healthy();
  strictEqual(dev.lines.filter((line) => line.includes('state.json" is damaged')).length, 1);
  await dev.stop();
});

Deno.test("a MongoDB that is away is told of; readings over HTTP go on, for this machine alone", async () => {
  const MONGO_URI = `mongodb://127.0.0.1:${freePort(0)}/testdb?serverSelectionTimeoutMS=500`;
  await using here = await checkout({ MONGO_URI, API_TOKEN: "a token of tests" });
  const dev = here.start("--no-factory", "--no-grafana", "--no-collect");
  await dev.healthy();
  await until("it is degraded", () => here.part("etl").health === "degraded", 20_000);
  match(here.part("etl").reason!, /MongoDB is away/);
  const { address, port } = here.part("etl");
  ok(dev.lines.some((line) => line.endsWith(`Readings     ${address}/`)));
  const kept = await Deno.readTextFile(join(here.root, ".pgpulse/dev.env"));
  ok(kept.includes(`MONGO_URI='${MONGO_URI}'\n`), "deno task etl beside it finds it");
  const body = JSON.stringify({ readings: [{ id: "1", payload: { value: 1 } }] });
  const headers = { "content-type": "application/json", authorization: "Bearer a token of tests" };
  const post = (headers: Record<string, string>) =>
    fetch(`${address}/api/reading`, { method: "POST", headers, body });
  deepStrictEqual(await (await post(headers)).json(), {
    taken: 1,
    replaced: 0,
    same: 0,
    failed: [],
  });
  const refused = await post({ "content-type": "application/json" });
  strictEqual(refused.status, 401);
  await refused.body?.cancel();
  const listening = await Deno.readTextFile("/proc/net/tcp").catch(() => "");
  const everywhere = `00000000:${port!.toString(16).toUpperCase().padStart(4, "0")} 00000000:0000`;
  ok(!listening.includes(everywhere), "with a token it listens here alone, too");
  strictEqual(await dev.stop(), 0);
});

Deno.test("a signal during the start ends it, too", async () => {
  await using here = await checkout();
  for (const after of [150, 600, 1_500]) {
    const dev = here.start("--no-factory", "--no-grafana");
    await new Promise((done) => setTimeout(done, after));
    await dev.stop();
    strictEqual((await here.run("status")).code, 3);
    const left = processes().filter(({ command }) => command.includes(here.root));
    deepStrictEqual(left, []);
  }
});

Deno.test("a database of one's own is used; roles that refuse us are told once", async () => {
  await using server = await testServer();
  await server.sql`create role server login password 'of somebody'`;
  await using here = await checkout({ DATABASE_URL: server.url });
  let dev = here.start("--no-factory", "--no-grafana");
  await dev.healthy();
  ok(!here.part("postgres").pid && !here.part("postgres").address!.includes("secret"));
  strictEqual(dev.lines.filter((l) => l.includes(`The scripts log in as "user"`)).length, 1);
  const asUser = async (name: string) =>
    (await server.sql`
      select from pg_stat_activity where application_name = 'pgpulse relay' and usename = ${name}
    `).length;
  await until("the relay is the user", () => asUser("user"));
  strictEqual((await server.sql`select from metrics union all select from live_metrics`).length, 0);
  await dev.stop();
  await server.sql`alter role server password 'known to us'`;
  here.env.DB_PASSWORD = "known to us";
  dev = here.start("--no-factory", "--no-grafana");
  await dev.healthy();
  ok(!dev.lines.some((line) => line.includes("The scripts log in as")));
  await until("the scripts are server", () => asUser("server"));
  ok(!dev.lines.join("\n").includes("known to us"));
  await dev.stop();
});

// --- Grafana -------------------------------------------------------------------------------

/** A Grafana that keeps what it was started with; its own words come out of `dump`. */
async function fakeGrafana(home: string) {
  await Deno.mkdir(join(home, "bin"), { recursive: true });
  await Deno.writeTextFile(
    join(home, "bin", "grafana"),
    `#!/bin/sh
echo "$@" >> "${home}/calls"
if [ "$1" = cli ]; then read -r word; echo "reset to $word" >> "${home}/calls"; exit; fi
env > "${home}/env"
touch "$GF_PATHS_DATA/grafana.db"
echo '{"@level":"debug","@message":"a plug-in talks"}'
echo "logger=x level=error msg=\\"my password is $GF_SECURITY_ADMIN_PASSWORD\\""
exec "${Deno.execPath()}" eval 'Deno.serve({hostname: Deno.env.get("GF_SERVER_HTTP_ADDR"),
  port: +Deno.env.get("GF_SERVER_HTTP_PORT")}, () => new Response("[]"))'
`,
    { mode: 0o755 },
  );
}

Deno.test("Grafana gets its settings; its sign-in is printed once, and renewed", async () => {
  await using here = await checkout();
  const home = join(here.root, "grafana-home");
  await fakeGrafana(home);
  here.env.GRAFANA_HOME = home;
  let dev = here.start("--no-factory");
  await dev.healthy();
  const file = await Deno.readTextFile(join(here.root, ".pgpulse/secrets.json"));
  const password = JSON.parse(file)["grafana admin"];
  const signIn = await until(
    "the sign-in is printed",
    () => dev.lines.find((line) => line.includes("Sign-in")),
  );
  ok(signIn.includes(`admin, password: ${password}`));
  strictEqual(dev.lines.filter((line) => line.includes(password)).length, 1);
  ok(dev.lines.some((line) => line.includes("my password is ***")));
  ok(!dev.lines.some((line) => line.includes("a plug-in talks")));
  ok(dev.lines.some((line) => /Dashboards .*\/metrics .*\/readings .*\/d\/streams$/.test(line)));
  const env = await Deno.readTextFile(join(home, "env"));
  const port = here.env.GRAFANA_PORT;
  for (
    const line of [
      `GF_SERVER_HTTP_PORT=${port}`,
      `GF_SERVER_ROOT_URL=http://localhost:${port}/`,
      "GF_SERVER_HTTP_ADDR=127.0.0.1",
      "GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer",
      `PGPULSE_DB_URL=127.0.0.1:${here.env.DB_PORT}`,
      `PGPULSE_DASHBOARDS=${here.root}/grafana/dashboards`,
      "GRAFANA_DB_USER=grafana_readonly",
      "DATABASE_URL=",
    ]
  ) ok(env.split("\n").includes(line), line);
  const kept = join(here.root, ".pgpulse/dev.env");
  strictEqual((await Deno.stat(kept)).mode! & 0o777, 0o600);
  match(await Deno.readTextFile(kept), new RegExp(`@127.0.0.1:${port}/'$`, "m"));
  const contactPoints = await new Deno.Command(Deno.execPath(), {
    args: ["task", "-q", "contact-points"],
    cwd: here.root,
    env: here.env,
  }).output();
  strictEqual(contactPoints.code, 0, new TextDecoder().decode(contactPoints.stderr));
  await dev.stop();
  here.env.GRAFANA_ADMIN_PASSWORD = "chosen by me";
  dev = here.start("--no-factory");
  await dev.healthy();
  match(await Deno.readTextFile(join(home, "calls")), /^reset to chosen by me$/m);
  const source = join(here.root, ".pgpulse/grafana/provisioning/datasources");
  const sources = () => [...Deno.readDirSync(source)].map(({ name }) => name).sort();
  deepStrictEqual(sources(), ["postgresql.yaml"], "without INFLUX_URL there is none of it");
  ok(!dev.lines.join("\n").includes("chosen by me"));
  await dev.stop();
  here.env.INFLUX_URL = "http://me@127.0.0.1:9/";
  here.env.INFLUX_TOKEN = "may read";
  dev = here.start("--no-factory");
  await dev.healthy();
  await dev.stop();
  deepStrictEqual(sources(), ["influxdb.yaml", "postgresql.yaml"]);
  const given = (await Deno.readTextFile(join(home, "env"))).split("\n");
  for (const line of ["URL=http://127.0.0.1:9/", "USER=me", "PASSWORD=may read"]) {
    ok(given.includes(`INFLUX_${line}`), line);
  }
  strictEqual((await Deno.readTextFile(join(home, "calls"))).match(/^reset/gm)?.length, 1);
});

Deno.test("a Grafana that runs already is filled, or it says what to import", async () => {
  const calls: string[] = [];
  let known = 404;
  await using api = Deno.serve(
    { port: 0, hostname: "127.0.0.1", onListen() {} },
    async (request) => {
      const { pathname } = new URL(request.url);
      const body = await request.text();
      if (request.method !== "GET") calls.push(`${request.method} ${pathname}`);
      if (request.method === "GET" && !pathname.endsWith("health")) {
        return new Response("{}", { status: known });
      }
      if (pathname.includes("/rule-groups/")) calls.push(JSON.parse(body).rules[0].title);
      if (pathname === "/api/dashboards/db") calls.push(JSON.parse(body).dashboard.uid);
      return Response.json({});
    },
  );
  const url = `http://127.0.0.1:${api.addr.port}`;
  await using here = await checkout({ GRAFANA_URL: url });
  const alerting = join(here.root, "grafana/provisioning/alerting");
  await Deno.remove(alerting, { recursive: true });
  await Deno.mkdir(alerting);
  await Deno.writeTextFile(
    join(alerting, "a.json"),
    JSON.stringify({ groups: [{ name: "g", rules: [{ uid: "r", title: "{{ $$values }}" }] }] }),
  );
  let dev = here.start("--no-factory");
  await dev.healthy();
  await until("it says what to do", () => dev.lines.some((l) => l.includes("set GRAFANA_TOKEN")));
  await dev.stop();
  deepStrictEqual(calls.filter((call) => !call.includes("/live/")), []);
  here.env.GRAFANA_TOKEN = "glsa_secret";
  for (
    const expected of [
      ["POST /api/datasources", "POST /api/folders", "metrics", "streams", "{{ $values }}"],
      ["PUT /api/datasources/uid/pgpulse-postgresql", "metrics", "streams"],
    ]
  ) {
    calls.length = 0;
    dev = here.start("--no-factory");
    await dev.healthy();
    await until(
      "it is imported",
      () => dev.lines.some((l) => l.includes(`1 alert rule into "${url}"`)),
    );
    await dev.stop();
    ok(expected.every((call) => calls.includes(call)), `${calls}`);
    known = 200;
  }
});

Deno.test("the command line says what it cannot do", async () => {
  await using here = await checkout({ DATABASE_URL: "mysql://x/y" });
  match((await here.run("--help")).stdout, /^Usage: deno task dev/m);
  const cases: [string[], RegExp][] = [
    [["stop"], /Cannot understand "stop"/],
    [["--nonsense"], /nonsense/],
    [["--no-grafana"], /Cannot read DATABASE_URL/],
  ];
  for (const [args, text] of cases) {
    const { code, stderr } = await here.run(...args);
    strictEqual(code, 1);
    match(stderr, text);
    ok(!stderr.includes("    at "));
  }
});

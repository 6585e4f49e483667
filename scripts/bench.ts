/**
 * Measures every figure that the README names, both sides in one run: medians and spread.
 *
 *     deno task bench [FIGURE ...]
 *
 * Runs with all permissions: it starts servers, and reads what processes cost from /proc.
 * Needs: psql, and pgbench for the figure `writers`; GRAFANA_HOME for figures of a real Grafana;
 * MONGO_URI for those of a real MongoDB.
 * Costs: about ten minutes of the whole machine; run nothing beside it.
 */
import { join } from "node:path";
import { parseArgs } from "node:util";
import { BSON, MongoClient } from "npm:mongodb@7.9.0";
import postgres from "npm:postgres@3.4.9";
import { Spool, Troubles } from "./collect.ts";
import { freePort } from "./dev.ts";
import { Encoder } from "./etl.ts";
import { Host } from "./generate.ts";
import {
  migrate,
  MongoStandIn,
  ROOT,
  script,
  type TestServer,
  testServer,
  until,
} from "./testing.ts";

const HELP = `bench: measures every figure that the README names

Usage: deno task bench [FIGURE ...]

Figures: start latency writers relay backfill history dashboards hosts readings (default: all)

  --rounds N    repetitions of each measurement (default: 5)
  --days N      how far back the figure \`history\` goes (default: 365)
  --every TIME  spacing of its rows of the last month (default: 10 s)
  --samples N   how many the figure \`hosts\` drains from a spool (default: 1000000)
  --hosts N     how many its fleet has (default: 1000)
  --documents N how many the figure \`readings\` syncs, round for round (default: 1000000)
  --readings N  how many it syncs once to see the memory, and then pages through
                (default: 10000000)
  --help        this text

Needs psql; pgbench for "writers"; GRAFANA_HOME for a real Grafana's share; MONGO_URI for a real
MongoDB, in whose database the collection pgpulse_bench is made, and dropped. What cannot be measured
here is said. Costs about two hours of the whole machine, most of them for \`history\` and
\`readings\`, which needs 20 GB of disk.
`;

const pause = (ms: number) => new Promise<void>((done) => setTimeout(done, ms));

/** Value at the share `p` (0 to 1) of the sorted samples. */
function quantile(samples: number[], p: number): number {
  const sorted = samples.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(p * sorted.length))];
}

/** Prints one figure: its median and spread, beside the goal. */
function report(figure: string, samples: number[], unit: string, goal: string): void {
  const round = (x: number) => `${+x.toPrecision(3)}`;
  const spread = samples.length > 1
    ? ` (${round(Math.min(...samples))} to ${round(Math.max(...samples))})`
    : "";
  console.log(`| ${figure} | ${round(quantile(samples, 0.5))} ${unit}${spread} | ${goal} |`);
}

const missing = (figure: string, why: string) =>
  console.log(`| ${figure} | not measured: ${why} | |`);

/** A database as users have it: fsync on, roles and streams made; of another PostgreSQL by `bin`. */
async function database(bin?: string, timescale = false): Promise<TestServer> {
  const server = await testServer({
    bin,
    settings: [
      "fsync=on",
      "shared_buffers=1GB",
      "max_wal_size=4GB",
      ...timescale
        ? ["shared_preload_libraries=timescaledb", "timescaledb.telemetry_level=off"]
        : [],
    ],
  });
  if (timescale) await server.sql`create extension timescaledb`;
  await migrate(server);
  return server;
}

/** Seconds of processor time that a process and its threads have used. */
function cpu(pid: number): number {
  const stat = Deno.readTextFileSync(`/proc/${pid}/stat`).split(") ")[1].split(" ");
  return (Number(stat[11]) + Number(stat[12])) / 100;
}

function memoryMB(pid: number): number {
  return Number(/VmRSS:\s+(\d+)/.exec(Deno.readTextFileSync(`/proc/${pid}/status`))![1]) / 1024;
}

/** Share of one core, in percent, that a process uses over some seconds. */
async function share(pid: number, seconds: number): Promise<number> {
  const before = cpu(pid);
  await pause(seconds * 1000);
  return (cpu(pid) - before) / seconds * 100;
}

/** Takes frames as Grafana does and remembers when which row was accepted. */
function endpoint() {
  const accepted = new Map<string, { at: number; newest: number }[]>();
  let frames = 0;
  const server = Deno.serve(
    { port: 0, hostname: "127.0.0.1", onListen: () => {} },
    async (request) => {
      const body = await request.text();
      frames++;
      const lines = body.trimEnd().split("\n");
      // Windows are ordered by time: the last line of each channel is its newest row.
      for (let i = 0; i < lines.length; i++) {
        const channel = lines[i].slice(0, lines[i].search(/[ ,]/));
        if (lines[i + 1]?.startsWith(channel)) continue;
        const newest = Number(lines[i].slice(lines[i].lastIndexOf(" ") + 1, -6));
        const list = accepted.get(channel) ?? [];
        accepted.set(channel, list);
        list.push({ at: Date.now(), newest });
      }
      return new Response();
    },
  );
  const { port } = server.addr as Deno.NetAddr;
  return {
    url: `http://127.0.0.1:${port}`,
    accepted,
    get frames() {
      return frames;
    },
    async [Symbol.asyncDispose]() {
      await server.shutdown();
    },
  };
}

/** The relay as a process of its own, as role server. */
async function relay(server: TestServer, url: string, token = "bench", args: string[] = []) {
  const port = freePort(0);
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "--no-prompt",
      "--allow-env",
      "--allow-net",
      "--allow-read",
      "--allow-write=.pgpulse",
      "--allow-sys=hostname",
      join(ROOT, "scripts/notify-relay.ts"),
      `--port=${port}`,
      ...args,
    ],
    cwd: ROOT,
    env: {
      DATABASE_URL: server.urlFor("server", "server"),
      GRAFANA_URL: url,
      GRAFANA_TOKEN: token,
    },
    stdout: "null",
    stderr: "inherit",
  }).spawn();
  await until("the relay listens", async () => {
    const answer = await fetch(`http://127.0.0.1:${port}/healthz`).catch(() => undefined);
    return (await answer?.json())?.listening;
  });
  return {
    pid: child.pid,
    port,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.status;
    },
  };
}

/** A real Grafana with its own database, and a token of an Editor; undefined without GRAFANA_HOME. */
async function grafana() {
  const home = Deno.env.get("GRAFANA_HOME");
  if (!home) return undefined;
  const data = await Deno.makeTempDir();
  const port = freePort(0);
  const child = new Deno.Command(join(home, "bin", "grafana"), {
    args: ["server", `--homepath=${home}`],
    cwd: home,
    env: {
      GF_PATHS_DATA: data,
      GF_PATHS_LOGS: join(data, "log"),
      GF_SERVER_HTTP_ADDR: "127.0.0.1",
      GF_SERVER_HTTP_PORT: `${port}`,
      GF_PLUGINS_PREINSTALL_DISABLED: "true",
      GF_ANALYTICS_CHECK_FOR_UPDATES: "false",
      GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES: "false",
      GF_ANALYTICS_REPORTING_ENABLED: "false",
    },
    stdout: "null",
    stderr: "null",
  }).spawn();
  const url = `http://127.0.0.1:${port}`;
  const headers = {
    authorization: `Basic ${new TextEncoder().encode("admin:admin").toBase64()}`,
    "content-type": "application/json",
  };
  await until(
    "Grafana is healthy",
    () => fetch(`${url}/api/health`).then((r) => r.ok, () => false),
    120_000,
  );
  const post = async (path: string, body: unknown) =>
    await (await fetch(url + path, { method: "POST", headers, body: JSON.stringify(body) })).json();
  const { id } = await post("/api/serviceaccounts", { name: "bench", role: "Editor" });
  const { key } = await post(`/api/serviceaccounts/${id}/tokens`, { name: "bench" });
  return {
    pid: child.pid,
    url,
    token: key as string,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.status;
      await Deno.remove(data, { recursive: true });
    },
  };
}

/** Waits for the frame that shows a row inserted at `inserted`; milliseconds until its acceptance. */
async function shown(
  frames: { at: number; newest: number }[],
  from: number,
  row: number,
  inserted: number,
) {
  for (let i = from;; i++) {
    await until("a frame comes", () => frames.length > i);
    if (frames[i].newest >= row) return frames[i].at - inserted;
  }
}

async function latency(rounds: number): Promise<void> {
  await using server = await database();
  await using taker = endpoint();
  await using _relay = await relay(server, taker.url);
  const frames = await until("frames come", () => taker.accepted.get("metrics"));
  const probe = async () => {
    const from = frames.length;
    const inserted = Date.now();
    const [{ ms }] = await server.sql`
      insert into metrics (value) values (1)
      returning floor(extract(epoch from "timestamp") * 1000)::float8 as ms`;
    return await shown(frames, from, ms, inserted);
  };
  const quiet: number[] = [];
  for (let i = 0; i < rounds * 10; i++) {
    quiet.push(await probe());
    await pause(700 + Math.random() * 600);
  }
  report("INSERT to frame accepted, quiet, p50", [quantile(quiet, 0.5)], "ms", "at most 10 ms");
  report("the same, all samples", quiet, "ms", "");

  // 50,000 rows/s: 1,000 rows every 20 ms, from a process of its own.
  const writer = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", import.meta.filename!, "--writer", server.url],
    cwd: ROOT,
    stdout: "piped",
  }).spawn();
  await pause(3000);
  const busy: number[] = [];
  for (let i = 0; i < rounds * 40; i++) {
    busy.push(await probe());
    await pause(50 + Math.random() * 100);
  }
  writer.kill("SIGTERM");
  const { stdout } = await writer.output();
  report(
    "rows/s going in meanwhile",
    [Number(new TextDecoder().decode(stdout))],
    "rows/s",
    "50,000",
  );
  report("INSERT to frame accepted, p99", [quantile(busy, 0.99)], "ms", "at most 250 ms");
  report("the same, all samples", busy, "ms", "");
}

/** Writes 50,000 rows a second into metrics until SIGTERM, then prints what it reached. */
async function write(url: string): Promise<void> {
  const sql = postgres(url, { max: 1 });
  const started = performance.now();
  let written = 0;
  let stopped = false;
  Deno.addSignalListener("SIGTERM", () => stopped = true);
  while (!stopped) {
    await sql`insert into metrics (value) select random() from generate_series(1, 1000)`;
    written += 1000;
    const ahead = written / 50 - (performance.now() - started);
    if (ahead > 0) await pause(ahead);
  }
  console.log(Math.round(written / (performance.now() - started) * 1000));
  await sql.end();
}

async function writers(rounds: number): Promise<void> {
  const pgbench = await find("pgbench");
  const psql = await find("psql");
  if (!pgbench || !psql) {
    return missing("writers with live streams on against off", "no pgbench or psql on PATH");
  }
  await using server = await database();
  await using taker = endpoint();
  const dir = await Deno.makeTempDir();
  await Deno.writeTextFile(
    join(dir, "insert.sql"),
    "insert into metrics (value) values (random());\n",
  );
  await server
    .sql`create table million as select now() as "timestamp", random() as value from generate_series(1, 1000000)`;
  const single = async () => {
    const out = await new Deno.Command(pgbench, {
      args: ["-n", "-c", "8", "-T", "6", "-f", join(dir, "insert.sql"), server.url],
      env: { PGOPTIONS: "" },
    }).output();
    return Number(/tps = ([\d.]+)/.exec(new TextDecoder().decode(out.stdout))![1]);
  };
  const file = join(dir, "million.txt");
  await Deno.writeTextFile(file, "0.5\n".repeat(1_000_000));
  const copy = async () => {
    await server.sql`truncate metrics`;
    await server.sql`checkpoint`;
    const started = performance.now();
    await runPsql(psql, server.url, `\\copy metrics (value) from '${file}'`);
    return 1e6 / (performance.now() - started) * 1000;
  };
  const figures: Record<string, number[]> = {
    copyOff: [],
    copyOn: [],
    singleOff: [],
    singleOn: [],
  };
  for (let i = 0; i < rounds; i++) {
    for (const on of i % 2 ? [true, false] : [false, true]) {
      await server.sql.unsafe(
        `alter table metrics ${on ? "enable" : "disable"} trigger pgpulse_hint`,
      );
      await using _relay = on ? await relay(server, taker.url) : undefined;
      figures[on ? "copyOn" : "copyOff"].push(await copy());
      await server.sql`truncate metrics`;
      figures[on ? "singleOn" : "singleOff"].push(await single());
    }
  }
  await Deno.remove(dir, { recursive: true });
  const ratios = (on: number[], off: number[]) => on.map((x, i) => x / off[i]);
  report("one COPY of 1 M rows, off", figures.copyOff, "rows/s", "");
  report(
    "one COPY of 1 M rows, on / off",
    ratios(figures.copyOn, figures.copyOff),
    "x",
    "at least 0.97x",
  );
  report("8 clients, one-row INSERTs, off", figures.singleOff, "rows/s", "");
  report(
    "8 clients, one-row INSERTs, on / off",
    ratios(figures.singleOn, figures.singleOff),
    "x",
    "at least 0.90x",
  );
}

async function relayCost(rounds: number): Promise<void> {
  await using server = await database();
  await using taker = endpoint();
  const bare = new Deno.Command(Deno.execPath(), {
    args: ["eval", "setInterval(() => {}, 1000)"],
    cwd: ROOT,
  }).spawn();
  {
    await using idle = await relay(server, taker.url);
    await pause(10_000);
    const shares: number[] = [];
    for (let i = 0; i < rounds; i++) shares.push(await share(idle.pid, 5));
    report("relay idle", shares, "% of a core", "under 1 %");
    report("memory of a bare runtime", [memoryMB(bare.pid)], "MB", "");
    report(
      "relay idle, memory above that",
      [memoryMB(idle.pid) - memoryMB(bare.pid)],
      "MB",
      "under 30 MB",
    );
  }
  bare.kill();
  await bare.status;
  await server.sql.unsafe(`
    create table fleet (time timestamptz, host text, value float8);
    create index on fleet (host, time);
    create index on fleet (time);
    create view live.fleet as select time, host, value from fleet;
    grant select on live.fleet to server;
    select pgpulse.add_stream('fleet', split => 'host', beat => '1 second');
    insert into fleet
    select t, 'host-' || h, random()
    from generate_series(1, 200) h, (
        select generate_series(now() - interval '1 day', now() - interval '6 minutes', '30 seconds')
        union all
        select generate_series(now() - interval '6 minutes', now(), '1 second')
    ) as times (t);
    analyze fleet`).simple();
  await using real = await grafana();
  for (const [name, at] of [["an endpoint", undefined], ["a real Grafana", real]] as const) {
    if (name === "a real Grafana" && !at) {
      missing("200 channels, Grafana's own share", "GRAFANA_HOME is not set");
      continue;
    }
    await using busy = await relay(server, at?.url ?? taker.url, at?.token, ["--budget=20MB"]);
    let ticking = true;
    const ticks = (async () => {
      while (ticking) {
        const next = pause(1000);
        await server
          .sql`insert into fleet select now(), 'host-' || h, random() from generate_series(1, 200) h`;
        await next;
      }
    })();
    await pause(5000);
    const framesOf = async () => {
      const text = await (await fetch(`http://127.0.0.1:${busy.port}/metrics`)).text();
      return Number(/frames_total\{[^}]*\} (\d+)/.exec(text)![1]);
    };
    const before = await framesOf();
    const started = performance.now();
    const shares: number[] = [];
    const theirs: number[] = [];
    for (let i = 0; i < rounds; i++) {
      const other = at && share(at.pid, 5);
      shares.push(await share(busy.pid, 5));
      if (other) theirs.push(await other);
    }
    const rate = (await framesOf() - before) / (performance.now() - started) * 1000;
    ticking = false;
    await ticks;
    report(`200 channels x 300 rows to ${name}, frames`, [rate], "a second", "200");
    report(
      `200 channels x 300 rows to ${name}, relay (--budget 20MB)`,
      shares,
      "% of a core",
      "under 30 %",
    );
    report(`200 channels, relay's memory`, [memoryMB(busy.pid)], "MB", "");
    if (theirs.length) {
      report("200 channels, Grafana's own share", theirs, "% of a core", "beside it");
    }
  }
}

async function backfill(rounds: number): Promise<void> {
  const psql = await find("psql");
  if (!psql) return missing("generate --backfill against psql \\copy", "no psql on PATH");
  await using server = await database();
  await server.sql.unsafe("alter table metrics disable trigger pgpulse_hint");
  const dir = await Deno.makeTempDir();
  const file = join(dir, "rows.txt");
  const copy = (command: string) => runPsql(psql, server.url, command);
  const ratios: number[] = [];
  const ours: number[] = [];
  const theirs: number[] = [];
  for (let i = 0; i < rounds; i++) {
    await server.sql`truncate metrics`;
    await server.sql`checkpoint`;
    let started = performance.now();
    const made = await script("generate.ts", ["metrics", "--backfill=120d", "--seed=1"], {
      DATABASE_URL: server.urlFor("server", "server"),
    });
    if (made.code) throw new Error(made.stderr);
    const own = performance.now() - started;
    const [{ count }] = await server.sql`select count(*)::int as count from metrics`;
    await copy(`\\copy metrics ("timestamp", value) to '${file}'`);
    await server.sql`truncate metrics`;
    await server.sql`checkpoint`;
    started = performance.now();
    await copy(`\\copy metrics ("timestamp", value) from '${file}'`);
    const other = performance.now() - started;
    ours.push(count / own * 1000);
    theirs.push(count / other * 1000);
    ratios.push(other / own);
  }
  await Deno.remove(dir, { recursive: true });
  report("generate --backfill 120d, start to end", ours, "rows/s", "");
  report("psql \\copy of the same rows", theirs, "rows/s", "");
  report("generate / psql", ratios, "x", "at least 1.0x");
}

/** Runs one statement; answers with its milliseconds. */
async function timed(sql: postgres.Sql, text: string): Promise<number> {
  const started = performance.now();
  await sql.unsafe(text);
  return performance.now() - started;
}

/** A hundred series in machine_metrics: what rollups and storage cost, and how fast history is. */
async function history(rounds: number, { days, every }: Options): Promise<void> {
  const psql = await find("psql");
  if (!psql) return missing("machine_metrics", "no psql on PATH");
  // With TimescaleDB beside, both are of the same PostgreSQL.
  const bin = Deno.env.get("PGPULSE_TIMESCALE_BIN");
  const plain = await year(rounds, days, every, psql, bin);
  if (!bin) return missing("TimescaleDB beside it", "PGPULSE_TIMESCALE_BIN is not set");
  const theirs = await year(rounds, days, every, psql, bin, true);
  for (const [figure, samples] of plain) {
    const median = quantile(theirs.get(figure)!, 0.5);
    report(
      `${figure}: plain / TimescaleDB`,
      samples.map((ms) => ms / median),
      "x",
      "at most 1.2x",
    );
  }
}

/** A month of rows and a year behind it; the times of the reads, by figure. */
async function year(
  rounds: number,
  days: number,
  every: string,
  psql: string,
  bin: string | undefined,
  timescale = false,
): Promise<Map<string, number[]>> {
  await using server = await database(bin, timescale);
  const { sql } = server;
  // As Grafana reads.
  const reader = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
  const name = (figure: string) => timescale ? `TimescaleDB: ${figure}` : figure;
  const reads = new Map<string, number[]>();
  const read = (figure: string, samples: number[], goal: string) => {
    reads.set(figure, samples);
    report(name(figure), samples, "ms", timescale ? "" : goal);
  };
  const run = (command: string) => runPsql(psql, server.url, command);
  const columns = `machine_id, metric_type, value, "timestamp"`;
  // Rows of 100 series in the order in which they come; values with two decimals.
  const rows = (from: string, to: string, spacing = every) =>
    `select 'M' || lpad(m::text, 2, '0') as machine_id, k as metric_type, round((50 + 20 * sin(extract(epoch from t) / 7000 + m)
      + 3 * random())::numeric, 2)::float8 as value, t as "timestamp"
    from generate_series(timestamptz '${from}', timestamptz '${to}' - interval '${spacing}', '${spacing}') t,
      generate_series(1, 20) m, unnest('{temperature,pressure,speed,power,vibration}'::text[]) k`;
  const upkeep = async () => {
    for (let more = true; more;) {
      const work = await sql`select * from pgpulse.upkeep()`;
      const fault = work.find((row) => row.fault);
      if (fault) throw new Error(`upkeep of ${fault.name}: ${fault.fault}`);
      more = work.some((row) => row.more);
    }
  };
  // What TimescaleDB's jobs do within the hour: minutes, hours of these, days of those.
  const settle = async () => {
    for (let i = 0; timescale && i < 3; i++) {
      const jobs = await sql`select job_id from timescaledb_information.jobs
        where proc_name = 'policy_refresh_continuous_aggregate' order by 1`;
      for (const { job_id } of jobs) {
        await until(
          "the job is free",
          () => sql.unsafe(`call run_job(${job_id})`).then(() => true, () => false),
          600_000,
        );
      }
    }
  };
  const day = (ago: number) => new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);
  const [{ target }] = await sql`select pgpulse.rows_of('machine_metrics')::text as target`;

  // Nothing is packed before that is asked for, and there is a partition for each day, as made ahead.
  const month = 30;
  await sql`update pgpulse.storage set pack_after = '100 years'`;
  if (!timescale) {
    await sql`select pgpulse.make_partition(s, ${day(0)}::timestamptz - i * interval '1 day')
    from pgpulse.storage s, generate_series(1, ${month}) i`;
  }

  // Day after day by COPY, also into a table with the same indexes and nothing else.
  await sql.unsafe(
    `create table plain (like ${target} including indexes); alter table plain drop column if exists tx`,
  ).simple();
  const dir = await Deno.makeTempDir();
  const file = join(dir, "rows.txt");
  const off: number[] = [];
  const on: number[] = [];
  const ratios: number[] = [];
  const kept: number[] = [];
  let ago = month;
  let points = 0;
  await upkeep();
  for (; ago > month - rounds; ago--) {
    await run(`\\copy (${rows(day(ago), day(ago - 1)).replaceAll("\n", " ")}) to '${file}'`);
    points = (await Deno.readTextFile(file)).split("\n").length - 1;
    const copy = async (table: string) => {
      await sql`checkpoint`;
      const started = performance.now();
      await run(`\\copy ${table} (${columns}) from '${file}'`);
      return performance.now() - started;
    };
    await sql`truncate plain`;
    const without = await copy("plain");
    const beside = await copy(target);
    const started = performance.now();
    await upkeep();
    kept.push((performance.now() - started) / beside);
    off.push(points * 1000 / without);
    on.push(points * 1000 / beside);
    ratios.push(without / beside);
  }
  await Deno.remove(dir, { recursive: true });
  const copied = `COPY of a day, ${points} points`;
  report(name(`${copied}, rollups and storage off`), off, "points/s", "");
  report(name("the same, on"), on, "points/s", "");
  report(name("on / off"), ratios, "x", "at least 0.80x");
  report(name("upkeep / the COPY's own time"), kept, "x", "at most 0.35x");

  for (; ago > 0; ago--) {
    await sql.unsafe(`insert into ${target} (${columns}) ${rows(day(ago), day(ago - 1))}`);
    await upkeep();
  }
  await settle();
  await sql.unsafe("vacuum analyze");
  const range = (days: number) => `'${day(days)}' and '${day(0)}'`;
  const one = "machine_id = 'M07' and metric_type = 'speed'";
  const raw = (where: string) =>
    `select count(*), avg(value) from machine_metrics where "timestamp" between ${
      range(month)
    } ${where}`;
  const several = async (text: string) => {
    const samples: number[] = [];
    await reader.unsafe(text);
    for (let i = 0; i < rounds; i++) samples.push(await timed(reader, text));
    return samples;
  };
  const rolled = (days: number, where: string) =>
    several(`select time, machine_id, metric_type, value_avg, value_min, value_max
      from rollup.machine_metrics
      where step = pgpulse.step('${day(days)}', '${day(0)}') and time between ${
      range(days)
    } ${where}`);
  read("a month, one series", await rolled(month, `and ${one}`), "10 ms");
  read("a month, 100 series", await rolled(month, ""), "100 ms");
  const size = async () => {
    const [{ bytes }] = await sql`
      select sum(pg_total_relation_size(c.oid))::float8 as bytes
      from pg_class c
      where c.relkind = 'r'
        and (c.relnamespace::regnamespace::text in ('rows', 'packed')
          or c.oid::regclass::text ~ '_timescaledb_internal._hyper_1_|_timescaledb_internal.compress_hyper')`;
    return bytes as number;
  };
  const ratio = (a: number[], b: number[]) => a.map((x, i) => x / b[i]);
  const loose = { one: await several(raw(`and ${one}`)), all: await several(raw("")) };
  const wide = await size();
  const began = performance.now();
  if (timescale) await sql`select compress_chunk(c) from show_chunks('machine_metrics') c`;
  else {
    await sql`update pgpulse.storage set pack_after = '0'`;
    await upkeep();
  }
  report(name("packing"), [points * month / (performance.now() - began) * 1000], "points/s", "");
  // What is empty goes when those who could want to read it have ended.
  for (let i = 0; i < 3; i++) await upkeep();
  await sql.unsafe("vacuum analyze");
  const narrow = await size();
  report(name("a month of rows"), [wide / 1e6], "MB", "");
  report(name("the same, packed"), [narrow / 1e6], "MB", "");
  report(name("packed history smaller by"), [100 - 100 * narrow / wide], "%", "95 %");
  const packed = { one: await several(raw(`and ${one}`)), all: await several(raw("")) };
  read("every row of one series, a month, unpacked", loose.one, "");
  read("every row of one series, a month, packed", packed.one, "");
  report(name("packed / unpacked"), ratio(packed.one, loose.one), "x", "at most 2x");
  read("every row of 100 series, a month, unpacked", loose.all, "");
  read("every row of 100 series, a month, packed", packed.all, "");
  report(name("packed / unpacked"), ratio(packed.all, loose.all), "x", "at most 1.5x");

  // The rest of the year, a row every 5 minutes, straight into packed form and rollups, as the generator does.
  const started = performance.now();
  points = 0;
  for (let ago = month; ago < days; ago += 20) {
    const { count } = await sql.unsafe(`create unlogged table stage as
      select *, null::int as zone_number, null::float8 as target_value
      from (${rows(day(Math.min(days, ago + 20)), day(ago), "5 min")}) as made`);
    points += count;
    await sql.unsafe(`select pgpulse.pack_from('machine_metrics', 'stage'); drop table stage`);
  }
  if (points) {
    report(
      name("made and packed"),
      [points / (performance.now() - started) * 1000],
      "points/s",
      "",
    );
    await upkeep();
    await settle();
    await sql.unsafe("vacuum analyze");
    read(`${days} days, one series`, await rolled(days, `and ${one}`), "20 ms");
    read(`${days} days, 100 series`, await rolled(days, ""), "50 ms");
  }
  await reader.end();
  return reads;
}

/** Every query of the factory's dashboards over a year, as Grafana sends them for all machines. */
async function dashboards(rounds: number): Promise<void> {
  await using server = await database();
  const { code, stderr } = await script("generate.ts", [
    "factory",
    "--backfill=1y",
    "--interval=10m",
  ], { DATABASE_URL: server.urlFor("server", "server") });
  if (code) throw new Error(stderr);
  for (let more = true; more;) {
    more = (await server.sql`select * from pgpulse.upkeep()`).some((row) => row.more);
  }
  await server.sql.unsafe("vacuum analyze");
  const sql = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
  // A panel with a range of its own has the last five minutes.
  const [{ past, near, to, all, one }] = await sql`
    select (now() - interval '1 year')::text as past, (now() - interval '5 minutes')::text as near,
      now()::text as to,
      string_agg(quote_literal(id), ',' order by id) as all, min(id) as one
    from machines`;
  const folder = join(ROOT, "grafana/dashboards/Factory");
  for (const { name } of Deno.readDirSync(folder)) {
    const dashboard = JSON.parse(await Deno.readTextFile(join(folder, name)));
    const queries: string[] = [];
    let from = past;
    JSON.stringify(dashboard, (key, value) => {
      if (value?.gridPos) from = value.timeFrom ? near : past;
      if (key === "rawSql" && value) {
        queries.push(
          value
            .replace(/\$__timeFilter\(([^()]+)\)/g, `$1 between '${from}' and '${to}'`)
            .replace(
              /\$__timeGroupAlias\(([^(),]+),[^()]*\)/g,
              "date_bin('6 h', $1, 'epoch') as \"time\"",
            )
            .replaceAll("$__timeFrom()", `'${from}'`)
            .replaceAll("$__timeTo()", `'${to}'`)
            .replaceAll("'$machine_id'", `'${one}'`)
            .replaceAll("$machine_id", all)
            .replace(/'?\$metric_type'?|\$\{metric_type:sqlstring\}/g, "'temperature'"),
        );
      }
      return value;
    });
    const totals: number[] = [];
    for (let i = 0; i <= rounds; i++) {
      let total = 0;
      for (const query of queries) total += await timed(sql, query);
      if (i) totals.push(total);
    }
    report(`${dashboard.title} over a year, its ${queries.length} queries`, totals, "ms", "300 ms");
  }
  await sql.end();
}

async function find(command: string): Promise<string | undefined> {
  const out = await new Deno.Command("sh", {
    args: [
      "-c",
      `command -v ${command} || ls -d /usr/lib/postgresql/*/bin/${command} 2>/dev/null | tail -n 1`,
    ],
  }).output();
  return new TextDecoder().decode(out.stdout).trim() || undefined;
}

async function runPsql(psql: string, url: string, command: string): Promise<void> {
  const out = await new Deno.Command(psql, { args: [url, "-qc", command] }).output();
  if (!out.success) throw new Error(new TextDecoder().decode(out.stderr));
}

/** `deno task dev` in a copy of the checkout: the first start makes the data, the others are warm. */
async function start(rounds: number): Promise<void> {
  const home = Deno.env.get("GRAFANA_HOME");
  const copy = await Deno.makeTempDir();
  await Deno.chmod(copy, 0o755);
  for (const name of ["scripts", "sql", "grafana", "deno.json", "deno.lock"]) {
    await new Deno.Command("cp", { args: ["-R", join(ROOT, name), copy] }).output();
  }
  await Deno.symlink(join(ROOT, "node_modules"), join(copy, "node_modules"));
  const read = (name: string) =>
    Deno.readTextFile(join(copy, ".pgpulse", name)).then(JSON.parse).catch(() => undefined);
  const rows: number[] = [];
  const healthy: number[] = [];
  let last = 0;
  let finish = () => Promise.resolve();
  for (let i = 0; i <= rounds; i++) {
    const started = Date.now();
    const child = new Deno.Command(Deno.execPath(), {
      args: ["task", "-q", "dev", ...(home ? [] : ["--no-grafana"])],
      cwd: copy,
      stdout: "null",
      stderr: "null",
    }).spawn();
    const row = (async () => {
      const { ports } = await until("this start's state is there", async () => {
        const state = await read("state.json");
        return Date.parse(state?.since) >= started - 1000 && state.ports.postgres && state;
      }, 60_000);
      const { server } = await until("there is a password", () => read("secrets.json"));
      const sql = postgres(`postgres://server:${server}@127.0.0.1:${ports.postgres}/testdb`, {
        max: 1,
        backoff: () => 0.02,
      });
      const newest = () =>
        sql`select coalesce(max(id), 0)::int as id from metrics`.then(([{ id }]) => id, () => -1);
      await until("a new row is there", async () => await newest() > last, 60_000);
      const took = Date.now() - started;
      // The rows that this start adds from now on are not the next one's.
      finish = async () => {
        last = await newest();
        await sql.end();
      };
      return took;
    })();
    const grafana = home && (async () => {
      const { ports } = await until("Grafana has a port", async () => {
        const state = await read("state.json");
        return Date.parse(state?.since) >= started - 1000 && state.ports.grafana && state;
      }, 60_000);
      const url = `http://127.0.0.1:${ports.grafana}/api/health`;
      await until("Grafana is healthy", () => fetch(url).then((r) => r.ok, () => false), 120_000);
      return Date.now() - started;
    })();
    const times = await Promise.all([row, grafana]);
    await finish();
    child.kill("SIGTERM");
    await child.status;
    if (i === 0) continue;
    rows.push(times[0] / 1000);
    if (times[1]) healthy.push(times[1] / 1000);
  }
  await Deno.remove(copy, { recursive: true });
  report("dev, warm, to the first new row by SQL", rows, "s", "within 5 s");
  if (home) report("dev, warm, to a healthy Grafana", healthy, "s", "within 20 s");
  else missing("dev, warm, to a healthy Grafana", "GRAFANA_HOME is not set");
}

/** One of the scripts as a process of its own, which ends with its block. */
function runs(name: string, args: string[], url: string) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", join(ROOT, "scripts", name), ...args],
    cwd: ROOT,
    env: { DATABASE_URL: url },
    stdout: "null",
    stderr: "null",
  }).spawn();
  return {
    pid: child.pid,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.status;
    },
  };
}

/** Seconds of processor time that a process has used, to the microsecond. */
function spent(pid: number): number {
  let ns = 0;
  for (const { name } of Deno.readDirSync(`/proc/${pid}/task`)) {
    ns += Number(Deno.readTextFileSync(`/proc/${pid}/task/${name}/schedstat`).split(" ")[0]);
  }
  return ns / 1e9;
}

/** Seconds of processor time that PostgreSQL has used: all its processes, those that ended too. */
function spentBy(postmaster: number): number {
  let ticks = 0;
  for (const { name } of Deno.readDirSync("/proc")) {
    if (!/^\d+$/.test(name)) continue;
    try {
      const stat = Deno.readTextFileSync(`/proc/${name}/stat`).split(") ")[1].split(" ");
      const own = name === `${postmaster}`;
      if (!own && stat[1] !== `${postmaster}`) continue;
      for (const i of own ? [11, 12, 13, 14] : [11, 12]) ticks += Number(stat[i]);
    } catch { /* it has just ended */ }
  }
  return ticks / 100;
}

/** What collect.ts costs on a host, what a fleet of them costs, and how quickly all is there. */
async function hosts(rounds: number, options: Options): Promise<void> {
  await collector(rounds);
  await drain(rounds, options.samples);
  await fleet(rounds, options.hosts);
}

/** What Telegraf samples of the same, a row a second for each of its tables. */
const TELEGRAF = `
[agent]
  interval = "1s"
  flush_interval = "1s"
[[outputs.postgresql]]
  connection = "$DATABASE_URL"
` + ["cpu", "mem", "swap", "system", "disk", "diskio", "net", "netstat", "processes", "temp"]
  .map((name) => `[[inputs.${name}]]\n`).join("") +
  "  percpu = false\n".repeat(0);

/** CPU and memory of one collector, beside node_exporter and Telegraf. */
async function collector(rounds: number): Promise<void> {
  await using server = await database();
  await server.sql`alter role collector password 'collect'`;
  const url = server.urlFor("collector", "collect");
  const dir = await Deno.makeTempDir();
  await using others = new AsyncDisposableStack();
  const beside = (command: string, args: string[], env: Record<string, string> = {}) => {
    const child = new Deno.Command(command, {
      args,
      env,
      cwd: ROOT,
      stdout: "null",
      stderr: "null",
    }).spawn();
    others.defer(async () => {
      child.kill();
      await child.status;
    });
    return child.pid;
  };
  const bare = beside(Deno.execPath(), ["eval", "setInterval(() => {}, 1000)"]);
  const start = (name: string, interval: string) =>
    others.use(
      runs(
        "collect.ts",
        [`--host=${name}`, `--interval=${interval}`, `--spool=${dir}/${name}`],
        url,
      ),
    ).pid;
  const processes: Record<string, number> = {
    second: start("second", "1s"),
    five: start("five", "5s"),
  };
  const exporter = await find("prometheus-node-exporter");
  if (exporter) {
    const port = freePort(0);
    processes.node_exporter = beside(exporter, [`--web.listen-address=127.0.0.1:${port}`]);
    const scrape = async () =>
      await (await fetch(`http://127.0.0.1:${port}/metrics`).catch(() => undefined))?.text();
    const scraping = setInterval(scrape, 1000);
    others.defer(() => clearInterval(scraping));
  } else missing("node_exporter beside it", "no prometheus-node-exporter on PATH");
  const telegraf = await find("telegraf");
  if (telegraf) {
    const config = join(dir, "telegraf.conf");
    await Deno.writeTextFile(config, TELEGRAF);
    processes.Telegraf = beside(telegraf, ["--config", config, "--quiet"], {
      DATABASE_URL: server.url,
    });
  } else missing("Telegraf beside it", "no telegraf on PATH");
  await pause(60_000);
  const [{ since }] = await server.sql`select now() as since`;
  const figures: Record<string, number[]> = {};
  for (let i = 0; i < rounds; i++) {
    const before = Object.entries(processes).map(([name, pid]) => ({
      name,
      pid,
      seconds: spent(pid),
    }));
    await pause(30_000);
    for (const { name, pid, seconds } of before) {
      (figures[name] ??= []).push((spent(pid) - seconds) / 30 * 1000);
    }
  }
  const took = await server.sql`
    select (metrics #>> '{collector,seconds}')::float8 * 1000 as ms
    from system_metrics where host = 'second' and time >= ${since}`;
  report("to take a sample", took.map(({ ms }) => ms), "ms of a core", "at most 0.5 ms");
  report("a sample a second, all in all", figures.second, "ms of a core", "at most 2.5 ms");
  const percent = figures.five.map((ms) => ms / 10);
  report("a sample each 5 s, all in all", percent, "% of a core", "under 0.05 %");
  report("memory of a bare runtime", [memoryMB(bare)], "MB", "");
  const above = memoryMB(processes.second) - memoryMB(bare);
  report("the collector's memory above that", [above], "MB", "at most 15 MB");
  for (const name of ["node_exporter", "Telegraf"]) {
    if (!processes[name]) continue;
    report(`${name}, once a second`, figures[name], "ms of a core", "beside it");
    report(`memory of ${name}`, [memoryMB(processes[name])], "MB", "beside it");
  }
  const rows = telegraf
    ? await server.sql`select from information_schema.tables where table_name = 'diskio'`
    : [0];
  if (!rows.length) throw new Error("Telegraf has written nothing");
}

/** How quickly a full spool goes to the database, against psql \copy of the same rows. */
async function drain(rounds: number, samples: number): Promise<void> {
  const psql = await find("psql");
  if (!psql) return missing("a spool against psql \\copy", "no psql on PATH");
  await using server = await database();
  const { sql } = server;
  await sql`alter role collector password 'collect'`;
  const [{ target }] = await sql`select pgpulse.rows_of('system_metrics')::text as target`;
  const { columns: all } = await sql`select * from system_metrics limit 0`;
  const columns = all.map(({ name }) => `"${name}"`).join();
  const dir = await Deno.makeTempDir();
  const [full, work, file] = [join(dir, "full"), join(dir, "work"), join(dir, "rows.txt")];
  const spool = new Spool(full, new Troubles(), { bytes: 1e12, age: 1e12 });
  spool.open();
  const host = new Host(1, 0);
  const first = Math.floor(Date.now() / 1000) - samples;
  for (let i = 0; i < samples; i++) {
    spool.add(JSON.stringify(host.record((first + i) * 1000, 1000)));
  }
  spool.close();
  const files = (path: string) => [...Deno.readDirSync(path)].map(({ name }) => name);
  const fresh = async () => {
    await sql.unsafe(`truncate ${target}`);
    await sql`checkpoint`;
  };
  const copy = (command: string) => runPsql(psql, server.url, command);
  const ratios: number[] = [];
  const ours: number[] = [];
  const theirs: number[] = [];
  for (let i = 0; i < rounds; i++) {
    await Deno.mkdir(work);
    for (const name of files(full)) {
      if (name.endsWith(".spool")) await Deno.link(join(full, name), join(work, name));
    }
    await fresh();
    let started = performance.now();
    {
      await using _collector = runs("collect.ts", [
        "--interval=1h",
        `--spool=${work}`,
        "--spool-max-size=1000GB",
        "--spool-max-age=3650d",
      ], server.urlFor("collector", "collect"));
      await until("the spool is empty", () => {
        return files(work).every((name) => !name.endsWith(".spool"));
      }, 3_600_000);
    }
    const own = performance.now() - started;
    const [{ count }] = await sql`select count(*)::int as count from system_metrics`;
    if (count !== samples) throw new Error(`${count} of ${samples} samples are there`);
    await Deno.remove(work, { recursive: true });
    if (!i) await copy(`\\copy (select ${columns} from ${target}) to '${file}'`);
    await fresh();
    started = performance.now();
    await copy(`\\copy ${target} (${columns}) from '${file}'`);
    const other = performance.now() - started;
    ours.push(samples / own * 1000);
    theirs.push(samples / other * 1000);
    ratios.push(other / own);
  }
  await Deno.remove(dir, { recursive: true });
  report(`a spool of ${samples} samples, start to end`, ours, "samples/s", "");
  report("psql \\copy of the same rows", theirs, "samples/s", "");
  report("spool / psql", ratios, "x", "at least 0.7x");
}

/** A fleet at 5 s with its live streams on, and then its dashboards. */
async function fleet(rounds: number, size: number): Promise<void> {
  await using server = await database();
  const { sql } = server;
  const url = server.urlFor("server", "server");
  const upkeep = async () => {
    const { code, stderr } = await script("upkeep.ts", ["--once"], { DATABASE_URL: url });
    if (code) throw new Error(stderr);
  };
  // An hour's and a few minutes' steps are all that the dashboards read of a month and of three days.
  for (const [backfill, interval] of [["30d", "1h"], ["3d", "12m"]]) {
    const { code, stderr } = await script("generate.ts", [
      "hosts",
      `--hosts=${size}`,
      `--backfill=${backfill}`,
      `--interval=${interval}`,
    ], { DATABASE_URL: url });
    if (code) throw new Error(stderr);
    await upkeep();
  }
  {
    await using real = await grafana();
    await using taker = endpoint();
    await using busy = await relay(server, real?.url ?? taker.url, real?.token, ["--budget=20MB"]);
    await using _upkeep = runs("upkeep.ts", [], url);
    // A window is full from the start.
    await using generator = runs("generate.ts", [
      "hosts",
      `--hosts=${size}`,
      "--backfill=25m",
      "--interval=5s",
      "--follow",
    ], url);
    await until("the fleet is live", async () => {
      const [{ all }] = await sql`
        select count(*) filter (where last_time > now() - interval '6 seconds')::int as all from hosts`;
      return all >= size;
    }, 600_000);
    // What was made beforehand is no work of the minutes that are measured.
    await upkeep();
    await pause(30_000);
    const [{ pid }] = await sql`
      select split_part(pg_read_file('postmaster.pid'), e'\\n', 1)::int as pid`;
    const [{ host }] = await sql`select min(host) as host from hosts`;
    const processes: [string, () => number][] = [
      ["the database", () => spentBy(pid)],
      ["the relay", () => spent(busy.pid)],
      ["what simulates them", () => spent(generator.pid)],
    ];
    if (real) processes.push(["Grafana", () => spent(real.pid)]);
    const shares = processes.map((): number[] => []);
    const delays: number[] = [];
    let late = 0;
    for (let i = 0; i < rounds; i++) {
      await sql`select pgpulse.watch_stream('{cpu,memory,network}', ${host})`;
      const before = processes.map(([, seconds]) => seconds());
      const started = performance.now();
      // A minute each, as upkeep comes once in it.
      for (let n = 0; n < 12; n++) {
        // Shortly before the next is due.
        const now = Date.now();
        const tick = Math.ceil((now - 4_500) / 5_000) * 5_000;
        await pause(tick + 4_500 - now);
        const [row] = await sql`
          select
              count(*) filter (where last_time < ${new Date(tick)})::int as late,
              max(extract(epoch from last_seen - last_time))::float8 as worst
          from hosts`;
        late += row.late;
        delays.push(row.worst);
      }
      const seconds = (performance.now() - started) / 1000;
      processes.forEach(([, used], p) => shares[p].push((used() - before[p]) / seconds * 100));
    }
    const goals = ["under 25 %"];
    processes.forEach(([name], i) => {
      report(`${size} hosts at 5 s: ${name}`, shares[i], "% of a core", goals[i] ?? "beside it");
    });
    if (!real) missing(`${size} hosts at 5 s: Grafana`, "GRAFANA_HOME is not set");
    report("samples not there 4.5 s after their time", [late], "samples", "0");
    report("the latest of an interval is there after", delays, "s", "");
  }
  await upkeep();
  await sql.unsafe("vacuum analyze");
  await panels(server, rounds, "hosts.json", 1, 200);
  await panels(server, rounds, "host.json", 30, 50);
}

/** The slowest query of a dashboard of hosts over so many days, as Grafana sends it. */
async function panels(
  server: TestServer,
  rounds: number,
  name: string,
  days: number,
  goal: number,
): Promise<void> {
  const sql = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
  const [{ from, to, host, many }] = await sql`
    select (now() - ${days} * interval '1 day')::text as from, now()::text as to,
      min(host) as host, count(*)::int as many
    from hosts`;
  const path = join(ROOT, "grafana/dashboards/Hosts", name);
  const dashboard = JSON.parse(await Deno.readTextFile(path));
  const queries: { title: string; text: string }[] = [];
  let title = "";
  JSON.stringify(dashboard, (key, value) => {
    if (value?.gridPos) title = value.title;
    if (key === "rawSql" && value) {
      const text = value
        .replace(/\$__timeFilter\(([^()]+)\)/g, `$1 between '${from}' and '${to}'`)
        .replaceAll("$__timeFrom()", `'${from}'::timestamptz`)
        .replaceAll("$__timeTo()", `'${to}'::timestamptz`)
        .replaceAll("$host", host)
        .replace(/\$(filter|scraped)/g, "");
      queries.push({ title, text });
    }
    return value;
  });
  let slowest = { title: "", times: [0] };
  for (const { title, text } of queries) {
    const times: number[] = [];
    await timed(sql, text);
    for (let i = 0; i < rounds; i++) times.push(await timed(sql, text));
    if (quantile(times, 0.5) > quantile(slowest.times, 0.5)) slowest = { title, times };
  }
  await sql.end();
  report(
    `${dashboard.title} over ${days} d, ${many} hosts: slowest of ${queries.length} ` +
      `queries, "${slowest.title}"`,
    slowest.times,
    "ms",
    `under ${goal} ms`,
  );
}

// --- readings ---

/** As many batches at once as the sync has in hand. */
const LANES = 3;
const BATCH = 1_000;
const STATUSES = ["ingested", "processed", "failed"];
const TEMPLATES = STATUSES.map((status) =>
  Uint8Array.from(BSON.serialize({
    _id: new BSON.ObjectId("0".repeat(24)),
    status,
    device: "device-000",
    metric: "temperature",
    value: 0.5,
    unit: "C",
    timestamp: new Date(0),
  }))
);
/** Where in the templates the id, the device's number, the value and the time stand. */
const PLACES = TEMPLATES.map((bson) => {
  const text = Array.from(bson, (byte) => String.fromCharCode(byte)).join("");
  return ["_id\0", "device-", "value\0", "timestamp\0"].map((name) =>
    text.indexOf(name) + name.length
  );
});

/** The reading `i` of so many that came in 28 days, each at another time. */
function reading(i: number, count: number, start: number, status = 0): Uint8Array {
  const bson = TEMPLATES[status].slice();
  const view = new DataView(bson.buffer);
  const [id, device, value, time] = PLACES[status];
  const ms = start + i / count * 28 * 86_400_000;
  view.setUint32(id, ms / 1000);
  view.setUint32(id + 8, i);
  bson.set(new TextEncoder().encode(`${i % 1000}`.padStart(3, "0")), device);
  view.setFloat64(value, 20 + i % 977 / 100, true);
  view.setBigInt64(time, BigInt(Math.floor(ms)), true);
  return bson;
}
const monthAgo = () => Date.now() - 29 * 86_400_000;

/** A collection of any size in a byte each: documents are made when they are asked for. */
class Made {
  readonly indexes = [{ v: 2, key: { _id: 1 }, name: "_id_" }];
  readonly #states: Uint8Array;
  readonly #start = monthAgo();
  /** None before it is ingested, as an index knows. */
  #front = 0;

  constructor(count: number) {
    this.#states = new Uint8Array(count);
  }

  #stored(i: number) {
    const bson = () => reading(i, this.#states.length, this.#start, this.#states[i]);
    return {
      i,
      get bson() {
        return bson();
      },
      get id() {
        const [at] = PLACES[0];
        return new BSON.ObjectId(bson().subarray(at, at + 12));
      },
    };
  }

  // deno-lint-ignore no-explicit-any -- filters of any shape
  *find({ _id = {}, status, ...more }: Record<string, any>) {
    const odd = [...Object.keys(more), ...Object.keys(_id)].find((name) =>
      !["$in", "$nin", "$gt"].includes(name)
    );
    if (odd) throw new Error(`Cannot filter by ${odd}`);
    const place = ({ id }: { id: Uint8Array }) =>
      new DataView(id.buffer, id.byteOffset).getUint32(8);
    const left = new Set((_id.$nin ?? []).map(place));
    const state = status === undefined ? undefined : STATUSES.indexOf(status);
    const wanted = (i: number) =>
      (state === undefined || this.#states[i] === state) && !left.has(i);
    if (_id.$in) {
      for (const i of _id.$in.map(place)) if (wanted(i)) yield this.#stored(i);
      return;
    }
    while (this.#states[this.#front]) this.#front++;
    const first = state === 0 ? this.#front : 0;
    for (let i = _id.$gt ? place(_id.$gt) + 1 : first; i < this.#states.length; i++) {
      if (wanted(i)) yield this.#stored(i);
    }
  }

  update({ i }: { i: number }, { $set }: { $set: { status: string } }): boolean {
    this.#states[i] = STATUSES.indexOf($set.status);
    if (!this.#states[i]) this.#front = Math.min(this.#front, i);
    return true;
  }
}

/** The stand-in of the tests with such a collection; says where it is. */
async function source(count: number): Promise<void> {
  const made = new Made(count);
  class Simulated extends MongoStandIn {
    override collection() {
      return made as unknown as ReturnType<MongoStandIn["collection"]>;
    }
  }
  console.log(new Simulated().start().uri);
  await new Promise(() => {});
}

/** The same in a process of its own. */
async function simulated(count: number) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-A", "--no-prompt", import.meta.filename!, "--source", `${count}`],
    cwd: ROOT,
    stdout: "piped",
  }).spawn();
  const reader = child.stdout.getReader();
  const { value } = await reader.read();
  return {
    uri: new TextDecoder().decode(value).trim(),
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await reader.cancel();
      await child.status;
    },
  };
}

/** A sync from start to end: its milliseconds, and the most memory that it had. */
async function synced(uri: string, collection: string, url: string) {
  const started = performance.now();
  const child = new Deno.Command(Deno.execPath(), {
    args: [
      ...["run", "-A", "--no-prompt", join(ROOT, "scripts/etl.ts")],
      ...["sync", "--once", `--collection=${collection}`],
    ],
    cwd: ROOT,
    env: { MONGO_URI: uri, DATABASE_URL: url },
    stdout: "null",
    stderr: "null",
  }).spawn();
  let mb = 0;
  const look = setInterval(() => {
    try {
      const status = Deno.readTextFileSync(`/proc/${child.pid}/status`);
      mb = Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? mb * 1024) / 1024;
    } catch { /* it has just ended */ }
  }, 50);
  const { code } = await child.status;
  clearInterval(look);
  if (code) throw new Error(`Cannot sync from ${new URL(uri).host}: it ended with ${code}`);
  return { ms: performance.now() - started, mb };
}

/** Partitions are there, as upkeep makes them ahead, and nothing else. */
async function noReadings({ sql }: TestServer): Promise<void> {
  await sql`
    select pgpulse.make_partition(s, current_date::timestamptz - i * interval '1 day')
    from pgpulse.storage s, generate_series(1, 30) i
    where s.source = 'public.reading_analytics'::regclass`;
  const [{ rows }] = await sql`select pgpulse.rows_of('public.reading_analytics')::text as rows`;
  await sql.unsafe(`truncate ${rows}, reading_keys`);
  await sql`checkpoint`;
}

/** Does something for each, so many at once. */
async function inLanes<T>(all: T[], work: (one: T) => Promise<unknown>): Promise<void> {
  const rest = all.values();
  const lane = async () => {
    for (const one of rest) await work(one);
  };
  await Promise.all(Array.from({ length: LANES }, lane));
}

/** The sync beside each of its stages alone, from one MongoDB. */
async function stages(rounds: number, name: string, uri: string, count: number): Promise<void> {
  await using server = await database();
  const url = server.urlFor("server", "server");
  const sql = postgres(url, { max: LANES });
  const client = new MongoClient(uri);
  const collection = client.db().collection("pgpulse_bench");
  const found = await collection.countDocuments({});
  const start = monthAgo();
  for (let i = found; i < count; i += BATCH) {
    const some = Array.from(
      { length: Math.min(BATCH, count - i) },
      (_, n) => BSON.deserialize(reading(i + n, count, start)),
    );
    await collection.insertMany(some);
  }
  await collection.createIndex({ status: 1, _id: 1 });
  const fresh = () => collection.updateMany({}, { $set: { status: "ingested" } });
  const figures: Record<string, number[]> = { reading: [], marking: [], writing: [], sync: [] };
  const note = (figure: string, ms: number) => figures[figure].push(count / ms * 1000);
  const ratios: number[] = [];
  const memory: number[] = [];
  for (let i = 0; i < rounds; i++) {
    await fresh();
    const batches: Uint8Array[][] = [];
    let after: unknown;
    let started = performance.now();
    for (;;) {
      const some = await collection.find({
        status: "ingested",
        ...after ? { _id: { $gt: after as BSON.ObjectId } } : {},
      }, { raw: true, sort: { _id: 1 }, limit: BATCH, batchSize: BATCH, singleBatch: true })
        .toArray() as unknown as Uint8Array[];
      if (!some.length) break;
      batches.push(some);
      after = BSON.deserialize(some.at(-1)!)._id;
    }
    note("reading", performance.now() - started);

    const encoder = new Encoder();
    const ready = batches.map((some) => {
      const lines = some.map((bson) => encoder.json(bson)).join("\n");
      return { lines, ids: some.map((bson) => BSON.deserialize(bson)._id) };
    });
    await noReadings(server);
    started = performance.now();
    await inLanes(ready, ({ lines, ids }) =>
      sql`
        select pgpulse.take_readings('bench', ${ids.map(String)}, ${lines})`);
    note("writing", performance.now() - started);

    started = performance.now();
    await inLanes(
      ready,
      ({ ids }) =>
        collection.updateMany({ _id: { $in: ids }, status: "ingested" }, {
          $set: { status: "processed" },
        }),
    );
    note("marking", performance.now() - started);

    await fresh();
    await noReadings(server);
    const { ms, mb } = await synced(uri, "pgpulse_bench", url);
    note("sync", ms);
    memory.push(mb);
    const [{ n }] = await server.sql`select count(*)::int as n from reading_keys`;
    if (n !== count) throw new Error(`${n} of ${count} readings are there`);
    const last = Object.values(figures).map((samples) => samples.at(-1)!);
    ratios.push(last.pop()! / Math.min(...last));
  }
  if (!found) await collection.drop();
  await client.close();
  await sql.end();
  const what = `${count} readings of ${name}`;
  report(`${what}: reading alone`, figures.reading, "a second", "");
  report("writing alone, 3 at once", figures.writing, "a second", "");
  report("marking alone, 3 at once", figures.marking, "a second", "");
  report("sync --once, start to end", figures.sync, "a second", "");
  report("sync / slowest stage", ratios, "x", "at least 0.8x");
  report("the most memory that the sync had", memory, "MB", "flat");
}

/** Moves readings out of MongoDB, and answers with them. */
async function readings(rounds: number, { documents, readings }: Options): Promise<void> {
  {
    await using mongo = await simulated(documents);
    await stages(rounds, "a simulated MongoDB", mongo.uri, documents);
  }
  const real = Deno.env.get("MONGO_URI");
  if (real) await stages(rounds, "a real MongoDB", real, documents);
  else missing("readings of a real MongoDB", "MONGO_URI is not set");

  await using server = await database();
  const { sql } = server;
  const url = server.urlFor("server", "server");
  // The last one stays, for the pages.
  for (const count of [100_000, readings]) {
    await noReadings(server);
    await using mongo = await simulated(count);
    const { mb } = await synced(mongo.uri, "pgpulse_bench", url);
    report(`the same for ${count} simulated ones`, [mb], "MB", "flat");
  }
  for (let more = true; more;) {
    more = (await sql`select * from pgpulse.upkeep()`).some((row) => row.more);
  }
  await sql.unsafe("vacuum analyze");
  const [{ n, first, last }] = await sql`
    select count(*)::int as n, extract(epoch from min(time))::float8 as first,
      extract(epoch from max(time))::float8 as last
    from reading_keys`;
  const port = freePort(0);
  await using api = runs("etl.ts", ["serve", `--port=${port}`, "--rate=0"], url);
  const get = async (path: string) => {
    const response = await fetch(`http://127.0.0.1:${port}${path}`);
    const text = await response.text();
    if (!response.ok) throw new Error(`GET ${path}: ${text}`);
    return text;
  };
  await until("it serves", () => get("/healthz").catch(() => ""));
  // Wherever it is: a page begins behind any time.
  const page = async () => {
    const at = new Date((first + Math.random() * (last - first)) * 1000).toISOString();
    const place = JSON.stringify([at.replace("Z", "+00:00"), "testdb.pgpulse_bench", "0"]);
    const cursor = new TextEncoder().encode(place).toBase64({ alphabet: "base64url" });
    await get(`/api/reading?limit=100&cursor=${cursor.replace(/=+$/, "")}`);
  };
  for (let i = 0; i < 100; i++) await page();
  const times: number[] = [];
  for (let i = 0; i < rounds * 400; i++) {
    const started = performance.now();
    await page();
    times.push(performance.now() - started);
  }
  const what = `a page of 100 of ${n} readings, anywhere`;
  report(`${what}, p50`, [quantile(times, 0.5)], "ms", "");
  report(`${what}, p99`, [quantile(times, 0.99)], "ms", "under 10 ms");

  const ids = await sql`select source_id as id from reading_keys order by random() limit 1000`;
  const one = () => get(`/api/reading/${ids[Math.floor(Math.random() * ids.length)].id}`);
  for (const [figure, ask] of [["pages of 100", page], ["single readings", one]] as const) {
    const rates: number[] = [];
    const shares: { client: number; api: number }[] = [];
    for (let i = 0; i < rounds; i++) {
      const before = { client: spent(Deno.pid), api: spent(api.pid) };
      const started = performance.now();
      let answers = 0;
      await Promise.all(Array.from({ length: 32 }, async () => {
        while (performance.now() - started < 5_000) {
          await ask();
          answers++;
        }
      }));
      const seconds = (performance.now() - started) / 1000;
      rates.push(answers / seconds);
      shares.push({
        client: (spent(Deno.pid) - before.client) / seconds * 100,
        api: (spent(api.pid) - before.api) / seconds * 100,
      });
    }
    report(`${figure} over 32 connections`, rates, "a second", "1,000");
    report("of that the API", shares.map(({ api }) => api), "% of a core", "");
    report("and who asks, here", shares.map(({ client }) => client), "% of a core", "");
  }
  report("memory of the API", [memoryMB(api.pid)], "MB", "");
}

interface Options {
  days: number;
  every: string;
  samples: number;
  hosts: number;
  documents: number;
  readings: number;
}

type Figure = (rounds: number, options: Options) => Promise<void>;
const FIGURES: Record<string, Figure> = {
  start,
  latency,
  writers,
  relay: relayCost,
  backfill,
  history,
  dashboards,
  hosts,
  readings,
};

async function main(args: string[]): Promise<void> {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      rounds: { type: "string", default: "5" },
      days: { type: "string", default: "365" },
      every: { type: "string", default: "10 s" },
      samples: { type: "string", default: "1000000" },
      hosts: { type: "string", default: "1000" },
      documents: { type: "string", default: "1000000" },
      readings: { type: "string", default: "10000000" },
      writer: { type: "string" },
      source: { type: "string" },
      help: { type: "boolean", short: "h" },
    },
  });
  if (values.help) return console.log(HELP);
  if (values.writer) return await write(values.writer);
  if (values.source) return await source(Number(values.source));
  const names = positionals.length ? positionals : Object.keys(FIGURES);
  for (const name of names) {
    if (!FIGURES[name]) {
      throw new Error(`Cannot measure "${name}": choose of ${Object.keys(FIGURES).join(", ")}`);
    }
  }
  console.log(`| figure | measured: median (least to most) | goal |\n|---|---|---|`);
  for (const name of names) {
    const { rounds, every } = values;
    const [days, samples, hosts, documents, readings] = [
      values.days,
      values.samples,
      values.hosts,
      values.documents,
      values.readings,
    ].map(Number);
    await FIGURES[name](Number(rounds), { days, every, samples, hosts, documents, readings });
  }
}

if (import.meta.main) {
  try {
    await main(Deno.args);
    Deno.exit(0);
  } catch (error) {
    console.error(error instanceof Error ? error.message : String(error));
    Deno.exit(1);
  }
}

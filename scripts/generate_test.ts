import { deepStrictEqual, match, ok, rejects, strictEqual, throws } from "node:assert";
import type postgres from "npm:postgres@3.4.9";
import {
  binary,
  duration,
  type Job,
  level,
  Machine,
  parse,
  plant,
  Run,
  SOURCES,
  walk,
} from "./generate.ts";
import { migrated, ROOT, testServer, until } from "./testing.ts";

/** The permissions that the head of the script names. */
const ALLOW = ["--no-prompt", "--allow-env=PG*,DATABASE_URL,DB_*", "--allow-net", "--allow-read"];

/** Starts the command as a user does. */
function start(url: string, ...args: string[]) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", ...ALLOW, "scripts/generate.ts", ...args],
    cwd: ROOT,
    env: { DATABASE_URL: url },
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const end = child.output().then(({ code, stdout, stderr }) => ({
    code,
    stdout: new TextDecoder().decode(stdout),
    stderr: new TextDecoder().decode(stderr),
  }));
  return { child, end };
}

const generate = (url: string, ...args: string[]) => start(url, ...args).end;

/** Server with the tables of the two sources. */
async function prepared() {
  const server = await testServer();
  for (const table of ["metrics", "live_metrics"]) {
    await server.sql.unsafe(`
      create table ${table} (
          id bigserial primary key,
          "timestamp" timestamptz not null default now(),
          value double precision
      );
      create index on ${table} ("timestamp");
    `);
  }
  return server;
}

/** What a table holds, in steps of `ms`; without gaps and doubles, its three counts are equal. */
async function state(sql: postgres.Sql, ms: number, table = "metrics") {
  const [row] = await sql<{ rows: number; ticks: number; span: number; off: number }[]>`
    select
        count(*)::int as rows,
        count(distinct "timestamp")::int as ticks,
        coalesce(extract(epoch from max("timestamp") - min("timestamp")) * 1000 / ${ms}::int + 1, 0)
            ::float8 as span,
        count(*) filter (where extract(epoch from "timestamp") * 1000 % ${ms}::int <> 0)::int as off
    from ${sql(table)}
  `;
  return row;
}

const whole = (n: number) => ({ rows: n, ticks: n, span: n, off: 0 });

/** Runs a job in this process; gives what it counted and what it said. */
async function within(url: string, job: Partial<Job>) {
  const said: string[] = [];
  const { error } = console;
  console.error = (text) => said.push(text);
  const before = Deno.env.get("DATABASE_URL");
  Deno.env.set("DATABASE_URL", url);
  const run = new Run({ ...parse([]) as Job, ...job }, new AbortController().signal);
  try {
    await run.run();
    return { written: run.written, said };
  } finally {
    console.error = error;
    await run.end();
    if (before === undefined) Deno.env.delete("DATABASE_URL");
    else Deno.env.set("DATABASE_URL", before);
  }
}

/**
 * Stands between client and server. The first `times` messages that contain `word` reach the
 * server, but the client loses its connection instead of getting the answer.
 */
function losing(port: number, word: string, times: number) {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const text = new TextDecoder("latin1");
  const open = new Set<Deno.Conn>();
  const serve = async (client: Deno.Conn) => {
    const server = await Deno.connect({ hostname: "127.0.0.1", port });
    open.add(client).add(server);
    let lost = false;
    const copy = async (from: Deno.Conn, to: Deno.Conn, look: boolean) => {
      const buffer = new Uint8Array(65536);
      for (let n; (n = await from.read(buffer));) {
        const bytes = buffer.subarray(0, n);
        if (look && times > 0 && text.decode(bytes).includes(word)) {
          times--;
          lost = true;
        }
        if (!look && lost) break;
        for (let at = 0; at < n;) at += await to.write(bytes.subarray(at));
      }
    };
    await Promise.race([copy(client, server, true), copy(server, client, false)]).catch(() => {});
    for (const one of [client, server]) {
      if (open.delete(one)) one.close();
    }
  };
  const done = (async () => {
    for await (const client of listener) serve(client).catch(() => {});
  })();
  return {
    port: (listener.addr as Deno.NetAddr).port,
    left: () => times,
    async [Symbol.asyncDispose]() {
      listener.close();
      for (const one of open) one.close();
      open.clear();
      await done;
    },
  };
}

Deno.test("durations have a unit and a least value", () => {
  deepStrictEqual(
    ["1ms", "5s", "2m", "3h", "30d", "2y"].map((text) => duration("interval", text)),
    [
      1,
      5000,
      120_000,
      10_800_000,
      2_592_000_000,
      63_072_000_000,
    ],
  );
  for (const text of ["0", "0s", "5", "s", "-5s", "1.5s", "5 s", "soon", "", "99999d"]) {
    throws(() => duration("interval", text), { message: /^Cannot read --interval ".*": expected/ });
  }
});

Deno.test("bad flags say what is wrong and what is expected", () => {
  const bad: [string, RegExp][] = [
    ["nix", /^Cannot make "nix": expected one of metrics, live/],
    ["metrics live", /^Cannot make "metrics live"/],
    ["constructor", /^Cannot make "constructor"/],
    ["--interval 0", /^Cannot read --interval "0": expected a whole number and a unit/],
    ["--backfill soon", /^Cannot read --backfill "soon": expected/],
    ["--backfill 1s", /^Cannot use --backfill "1s": expected at least one interval, 5000ms$/],
    ["--count -3", /^Cannot read --count: expected a value/],
    ["--count=-3", /^Cannot read --count "-3": expected a whole number from 1$/],
    ["--count 0", /^Cannot read --count "0"/],
    ["--count 1e3", /^Cannot read --count "1e3"/],
    ["--seed=", /^Cannot use --seed ""/],
    ["--follow", /^Cannot use --follow alone/],
    ["--backfill 1d --count 5", /^Cannot use --count with --backfill/],
    ["--machines 5", /^Cannot use --machines with metrics: it goes with factory$/],
    [
      "factory --machines 0",
      /^Cannot read --machines "0": expected a whole number from 1 to 10000/,
    ],
    ["factory --machines many", /^Cannot read --machines "many"/],
    ["--wait", /^Cannot read --wait: expected a value/],
    ["--wait 1m", /^Cannot read --wait "1m": expected seconds/],
    ["--frob", /^Cannot read the command line: Unknown option '--frob'$/],
  ];
  for (const [line, message] of bad) {
    throws(() => parse(line.split(" ")), { message }, line);
  }
  strictEqual(parse(["--help"]), "help");
});

Deno.test("values depend on seed and time only, stay in bounds and move gently", () => {
  const times = Array.from({ length: 20_000 }, (_, i) => 1_790_000_000_000 + i * 60_000);
  const values = times.map((time) => level(7, time));
  deepStrictEqual(times.toReversed().map((time) => level(7, time)).toReversed(), values);
  ok(values.every((value) => value >= 0 && value <= 100));
  ok(times.every((time) => Math.abs(walk(7, time)) <= 1));
  ok(Math.max(...values) - Math.min(...values) > 30, "uses the scale");
  const steps = times.map((time) => Math.abs(level(7, time) - level(7, time + 1000)));
  ok(Math.max(...steps) < 10, "a second does not jump");
  const same = times.filter((time, i) => level(8, time) === values[i]);
  ok(same.length < times.length / 20, "another seed, another curve");
});

Deno.test("a machine's days follow from seed and time, without a gap", () => {
  const monday = Date.UTC(2026, 10, 16) / 864e5;
  const machines = Array.from({ length: 20 }, (_, i) => new Machine(7, i));
  strictEqual(new Set(machines.map(({ id }) => id)).size, 20);
  strictEqual(new Set(machines.map(({ name }) => name)).size, 20);
  let [planned, run, stops, hot] = [0, 0, 0, 0];
  for (const [i, machine] of machines.entries()) {
    const days = Array.from({ length: 28 }, (_, n) => monday + n);
    const again = new Machine(7, i);
    for (const day of days.toReversed()) again.plan(day);
    for (const day of days) {
      const { pieces, events } = machine.plan(day);
      strictEqual(pieces[0].at, day * 864e5);
      ok(pieces.every(({ at }, i) => at < (pieces[i + 1]?.at ?? (day + 1) * 864e5)));
      ok(
        pieces.every(({ status, planned }) => planned || ["idle", "maintenance"].includes(status)),
      );
      ok(events.every(({ from, to }) => from < to && to <= (day + 1) * 864e5));
      deepStrictEqual(again.plan(day).pieces.map(({ at }) => at), pieces.map(({ at }) => at));
      for (let hour = day * 24; hour < day * 24 + 24; hour++) {
        const whole = machine.hour(hour, Infinity);
        planned += whole.planned;
        run += whole.run;
        ok(whole.run <= whole.planned && whole.planned <= 3600 && whole.kwh > 0);
        ok(whole.good <= whole.total && whole.total * machine.kind.cycle <= whole.run);
        const half = machine.hour(hour, hour * 36e5 + 18e5);
        ok(half.run <= whole.run && half.total <= whole.total && half.good <= whole.good);
      }
    }
    const from = monday * 864e5;
    const to = from + 28 * 864e5;
    stops += machine.events("stop", from, to).length;
    for (const { from: at, name } of machine.events("alarm", from, to)) {
      if (name !== "TEMPERATURE_HIGH") continue;
      const rows: [string, string, number][] = [];
      machine.sample(at, rows as never);
      if (machine.status(at) !== "running") continue;
      hot++;
      ok(rows[0][2] > 80 && rows[0][2] < 90, `${machine.id} is raised at ${rows[0][2]}`);
    }
  }
  ok(run / planned > 0.7 && run / planned < 0.95, `${run / planned} of the time was run`);
  ok(stops / 20 / 28 > 2 && stops / 20 / 28 < 15, `${stops} stops`);
  ok(hot > 20, `${hot} times too hot`);
});

Deno.test("samples are the same in any order, and look like their machine", () => {
  const { rows } = plant(20).machine_metrics;
  const times = Array.from({ length: 3000 }, (_, i) => Date.UTC(2026, 10, 16) + i * 60_000);
  const made = times.map((time) => rows!(7, time));
  const backwards = plant(20).machine_metrics.rows!;
  deepStrictEqual(times.toReversed().map((time) => backwards(7, time)).toReversed(), made);
  ok(made.every((tick) => tick.length === 20 * 9));
  const all = made.flat() as [string, string, number, number, number | null, number | null][];
  ok(all.every(([, , value]) => Math.abs(value * 100 - Math.round(value * 100)) < 1e-6));
  const of = (type: string, zone: number | null = null) =>
    all.filter((row) => row[1] === type && row[4] === zone).map((row) => row[2]);
  const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  ok(Math.max(...of("temperature")) > 86 && Math.min(...of("temperature")) > 15);
  const zones = [1, 2, 3, 4].map((zone) => mean(of("multi_zone_temp", zone)));
  ok(zones[0] < zones[3] && zones[3] < zones[1] && zones[1] < zones[2], `${zones}`);
  for (const type of ["pressure", "vibration", "speed", "power"]) {
    const values = of(type);
    ok(Math.max(...values) > 2 * Math.abs(Math.min(...values)), type);
  }
  // Between two samples of a minute nothing that has mass leaps.
  const one = all.filter(([id, type]) => id === "M01" && type === "temperature");
  ok(one.every(([, , value], i) => Math.abs(value - (one[i + 1] ?? one[i])[2]) < 10));
});

Deno.test("--help is the manual, and wrong flags exit with 2", async () => {
  const help = await generate("", "--help");
  strictEqual(help.code, 0);
  for (const word of [...Object.keys(SOURCES), "--backfill", "DATABASE_URL", "Cost", "Examples"]) {
    ok(help.stdout.includes(word), word);
  }
  const wrong = await generate("", "--interval", "0");
  strictEqual(wrong.code, 2);
  match(wrong.stderr, /^Cannot read --interval "0".*\nSee deno task generate --help\n$/);
});

Deno.test("generate writes rows", async (t) => {
  await using server = await prepared();
  const { sql, url } = server;
  const clear = () => sql`truncate metrics, live_metrics`;

  await t.step("binary COPY carries every type", async () => {
    await sql`create table every (at timestamptz, f float8, i int, s text)`;
    const rows = [
      [0, -1.5, 2147483647, 'żółw, "=\n\\ 🐢'],
      [-8e12, NaN, -2147483648, ""],
      [1_790_000_000_123, -Infinity, null, null],
      [null, 5e-324, 0, "x".repeat(20_000)],
      ...Array.from({ length: 20_000 }, (_, i) => [i, i / 3, i, `${i}`]),
    ];
    const copy = await sql`copy every from stdin (format binary)`.writable();
    for (const block of binary(["timestamptz", "float8", "int", "text"], rows)) copy.write(block);
    await new Promise<void>((done) => copy.end(done));
    const found =
      await sql`select (extract(epoch from at) * 1000)::float8 as at, f, i, s from every`;
    deepStrictEqual(found.map((row) => [row.at, row.f, row.i, row.s]), rows);
    throws(() => [...binary(["text"], [["x".repeat(300_000)]])], /Cannot copy a text of 300000/);
  });

  await t.step("--count rows on the grid, then a line of what it wrote", async () => {
    const { code, stdout } = await generate(url, "--interval", "100ms", "--count", "5");
    strictEqual(code, 0);
    match(stdout, /^Wrote 5 rows into metrics, 2\S+ to 2\S+, in \S+ m?s \(\S+ rows\/s\)\n$/);
    deepStrictEqual(await state(sql, 100), whole(5));
  });

  await t.step("live writes into live_metrics", async () => {
    await generate(url, "live", "--interval", "20ms", "--count", "7");
    deepStrictEqual(await state(sql, 20, "live_metrics"), whole(7));
  });

  await t.step("an interval of 1 ms keeps its rate by batches", async () => {
    await clear();
    await within(url, { interval: 1, count: 1500 });
    deepStrictEqual(await state(sql, 1), whole(1500));
  });

  await t.step("a restart within an interval does not write its tick twice", async () => {
    await clear();
    await within(url, { interval: 864e5, count: 1 });
    const { child, end } = start(url, "--interval", "1d");
    await until(
      "the second is ready",
      async () =>
        (await sql`select from pg_stat_activity where application_name = 'pgpulse generate'
        and state = 'idle' and query like '%date_bin%'`).length,
    );
    child.kill("SIGINT");
    const { code, stdout } = await end;
    strictEqual(code, 0);
    strictEqual(stdout, "Wrote nothing into metrics\n");
    strictEqual((await state(sql, 864e5)).rows, 1);
  });

  await t.step("the same seed and times give the same values, live and by COPY", async () => {
    await clear();
    await within(url, { interval: 50, count: 20, seed: "a" });
    // A backfill ends before the tick that is due now.
    await new Promise((done) => setTimeout(done, 60));
    const live = await sql`select "timestamp", value from metrics order by 1`;
    const copied = async (seed?: string) => {
      await clear();
      await within(url, { interval: 50, backfill: 60_000, seed });
      return await sql`
        select "timestamp", value from metrics where "timestamp" between
        ${live[0].timestamp} and ${live.at(-1)!.timestamp} order by 1
      `;
    };
    deepStrictEqual([...await copied("a")], [...live]);
    const other = await copied("b");
    ok(other.some(({ value }, i) => value !== live[i].value));
    deepStrictEqual([...await copied()], [...await copied()], "the table's own seed");
  });

  await t.step("--backfill fills the range up to the tick before this one, once", async () => {
    await clear();
    const first = await generate(url, "--backfill", "30d", "--interval", "1m");
    strictEqual(first.code, 0);
    match(first.stdout, /^Wrote 43,200 rows into metrics/);
    deepStrictEqual(await state(sql, 60_000), whole(43_200));
    const [{ age }] = await sql`
      select extract(epoch from now() - max("timestamp"))::float8 as age from metrics
    `;
    ok(age >= 60 && age < 200, `newest row is ${age} s old`);
    const more = await within(url, { interval: 60_000, backfill: 31 * 864e5 });
    const { rows } = await state(sql, 60_000);
    strictEqual(rows, 43_200 + more.written.rows);
    deepStrictEqual(await state(sql, 60_000), whole(rows));
    ok(more.written.rows >= 1440 && more.written.rows < 1450);
    ok(more.written.there > 43_190);
  });

  await t.step("--backfill leaves ticks alone that have rows, wherever these lie", async () => {
    await clear();
    const start = Math.floor(Date.now() / 1000) * 1000 - 30_000;
    for (const ms of [0, 400, 5999, 6000]) {
      await sql`insert into metrics ("timestamp", value) values (${new Date(start + ms)}, -1)`;
    }
    const run = await within(url, { interval: 1000, backfill: 60_000 });
    strictEqual(run.written.rows, 57);
    strictEqual(run.written.there, 3);
    const [{ seconds }] = await sql`
      select count(distinct date_trunc('second', "timestamp"))::int as seconds from metrics
    `;
    strictEqual(seconds, 60);
  });

  await t.step("two backfills at once fill the range once", async () => {
    await clear();
    const job = { interval: 1000, backfill: 2 * 864e5 };
    await Promise.all([within(url, job), within(url, job)]);
    const { rows } = await state(sql, 1000);
    ok(rows >= 172_800 && rows <= 172_802);
    deepStrictEqual(await state(sql, 1000), whole(rows));
  });

  await t.step("--follow goes on live without a gap", async () => {
    await clear();
    const run = await within(url, { interval: 10, backfill: 60_000, follow: true, count: 50 });
    strictEqual(run.written.rows, 6050);
    deepStrictEqual(await state(sql, 10), whole(6050));
  });

  await t.step("SIGTERM in a backfill: whole transactions, and the next run goes on", async () => {
    await clear();
    const args = ["--backfill", "1000000s", "--interval", "1s"];
    const { child, end } = start(url, ...args);
    await until("rows are there", async () => (await sql`select from metrics limit 1`).length);
    child.kill("SIGTERM");
    const { code, stdout, stderr } = await end;
    strictEqual(code, 130, stderr);
    const [, wrote] = /^Wrote ([\d,]+) rows/.exec(stdout) ?? [];
    const rows = Number(wrote?.replaceAll(",", ""));
    deepStrictEqual(await state(sql, 1000), whole(rows));
    ok(rows < 1_000_000, "stopped in the middle");
    const again = await generate(url, ...args);
    match(again.stdout, /; \d[\d,]* ticks had rows already\n$/);
    const all = await state(sql, 1000);
    deepStrictEqual(all, whole(all.span));
    ok(all.rows >= 1_000_000 && all.rows < 1_000_100);
  });

  await t.step("a source with several tables is written as one", async () => {
    await sql`create table many (at timestamptz, who text, n int)`;
    await sql`create table rare (at timestamptz, v float8)`;
    SOURCES.test = {
      help: "",
      interval: "1s",
      tables: () => ({
        many: {
          columns: { at: "timestamptz", who: "text", n: "int" },
          rows: (_, time) => [[time, `a'"b`, 1], [time, null, 2]],
        },
        rare: {
          columns: { at: "timestamptz", v: "float8" },
          rows: (seed, time) => time % 1000 ? [] : [[time, level(seed, time)]],
        },
      }),
    };
    try {
      const job = { what: "test", interval: 100, count: 20, follow: true, backfill: 30_000 };
      const run = await within(url, job);
      const [{ many, rare }] = await sql`
        select (select count(*)::int from many) as many, (select count(*)::int from rare) as rare
      `;
      strictEqual(many, 640);
      strictEqual(rare, 32);
      strictEqual(run.written.rows, many + rare);
      deepStrictEqual(
        [...await sql`select distinct who, n from many order by n`],
        [{ who: `a'"b`, n: 1 }, { who: null, n: 2 }],
      );
    } finally {
      delete SOURCES.test;
    }
  });

  await t.step("a clock that is set is followed, the gap stays empty", async () => {
    await clear();
    const now = Date.now;
    const set = setTimeout(() => Date.now = () => now() + 3_600_000, 300);
    try {
      await within(url, { interval: 20, count: 50 });
    } finally {
      clearTimeout(set);
      Date.now = now;
    }
    const { rows, ticks, span, off } = await state(sql, 20);
    deepStrictEqual({ rows, ticks, off }, { rows: 50, ticks: 50, off: 0 });
    ok(span > 180_000, "jumped");
  });

  await t.step("an INSERT or COMMIT whose answer is lost is not repeated", async () => {
    await clear();
    {
      await using proxy = losing(server.port, '"value"', 3);
      const through = url.replace(`:${server.port}`, `:${proxy.port}`);
      const run = await within(through, { interval: 20, count: 60 });
      strictEqual(proxy.left(), 0);
      strictEqual(run.written.rows, 60);
      ok(run.said.some((text) => /^Cannot use .* tries again/.test(text)), run.said.join("\n"));
      deepStrictEqual(await state(sql, 20), whole(60));
    }
    await clear();
    {
      await using proxy = losing(server.port, "commit", 2);
      const through = url.replace(`:${server.port}`, `:${proxy.port}`);
      const run = await within(through, { interval: 1000, backfill: 864e5 });
      strictEqual(proxy.left(), 0);
      strictEqual(run.written.rows, 86_400);
      deepStrictEqual(await state(sql, 1000), whole(86_400));
    }
  });

  await t.step(
    "a wrong password or a missing table ends it after --wait, with advice",
    async () => {
      const wrong = await generate(server.urlFor("user", "nonsense"), "--wait", "0");
      strictEqual(wrong.code, 1);
      match(wrong.stderr, /^Cannot use "127.0.0.1:\d+": the password of "user" is wrong; .*\n$/);
      ok(!wrong.stderr.includes("nonsense"));
      await sql`drop table live_metrics`;
      const job = { what: "live", wait: 300 };
      await rejects(within(url, job), {
        message: /"live_metrics" does not exist; run deno task migr/,
      });
    },
  );

  await t.step("a table that comes within --wait is waited for", async () => {
    const { end } = start(url, "live", "--interval", "10ms", "--count", "3");
    await new Promise((done) => setTimeout(done, 800));
    await sql`create table live_metrics ("timestamp" timestamptz, value float8)`;
    const { code, stderr } = await end;
    strictEqual(code, 0, stderr);
    deepStrictEqual(await state(sql, 10, "live_metrics"), whole(3));
  });
});

Deno.test("generate outlives a database that is killed", async (t) => {
  await using server = await prepared();
  const { sql, url } = server;

  await t.step("live: ticks missed are written afterwards, each once", async () => {
    const { end } = start(url, "--interval", "20ms", "--count", "150");
    await until("rows are there", async () => (await sql`select from metrics limit 1`).length);
    await server.kill();
    await new Promise((done) => setTimeout(done, 1000));
    await server.start();
    const { code, stdout, stderr } = await end;
    strictEqual(code, 0, stderr);
    match(stdout, /^Wrote 150 rows/);
    deepStrictEqual(await state(sql, 20), whole(150));
    match(
      stderr,
      /^Writes .*\nCannot use .*; tries again until it answers\nThe database works again .*\n$/,
    );
  });

  await t.step("backfill: nothing lost, nothing doubled", async () => {
    await sql`truncate metrics`;
    const { end } = start(url, "--backfill", "40d", "--interval", "2s");
    await until("rows are there", async () => (await sql`select from metrics limit 1`).length);
    await server.kill();
    await server.start();
    const { code, stdout, stderr } = await end;
    strictEqual(code, 0, stderr);
    match(stdout, /^Wrote 1,728,000 rows/);
    deepStrictEqual(await state(sql, 2000), whole(1_728_000));
    match(stderr, /Cannot use /);
  });

  await t.step("away at the start: waits, and stops when told to", async () => {
    await server.kill();
    const { child, end } = start(url);
    const seen = new Promise((done) => setTimeout(done, 1500));
    await seen;
    child.kill("SIGTERM");
    const { code, stdout, stderr } = await end;
    strictEqual(code, 0);
    strictEqual(stdout, "Wrote nothing into metrics\n");
    match(stderr, /^Cannot use "127.0.0.1:\d+": nothing listens there; .*\n$/);
    await server.start();
  });
});

Deno.test("generate factory writes a plant that holds together", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  const url = server.urlFor("server", "server");
  const { now } = Date;
  /** Runs it as if it were another time; the database knows nothing of that. */
  const at = async (time: number, job: Partial<Job>) => {
    const shift = time - now();
    Date.now = () => now() + shift;
    try {
      return await within(url, { what: "factory", machines: 7, interval: 60_000, ...job });
    } finally {
      Date.now = now;
    }
  };
  const once = async () => {
    const [{ rows, points }] = await sql`
      select count(*)::int as rows,
          count(distinct (machine_id, metric_type, zone_number, "timestamp"))::int as points
      from machine_metrics
    `;
    strictEqual(points, rows);
    return rows;
  };
  const morning = Math.floor(now() / 864e5) * 864e5 - 4 * 864e5 + 10 * 36e5;
  const told = ["machine_history", "production", "energy_consumption", "downtime", "alarms"];
  const all = () =>
    Promise.all(
      [...told, "maintenance", "machines"].map(async (table) => {
        const json = sql`to_jsonb(t) - array['id', 'timestamp', 'last_updated', 'tx']`;
        return [...await sql`select ${json} as row from ${sql(table)} t order by 1`];
      }),
    );
  const open = async () => {
    const [{ n }] = await sql`
      select ((select count(*) from downtime where ended_at is null)
          + (select count(*) from alarms where cleared_at is null))::int as n
    `;
    return n;
  };

  await t.step("--backfill, and again: nothing new", async () => {
    const run = await at(morning, { backfill: 2 * 864e5 });
    strictEqual(run.written.rows, 2880 * 7 * 9);
    strictEqual(await once(), 2880 * 7 * 9);
    const before = await all();
    ok(before.every((rows) => rows.length > 0));
    strictEqual((await at(morning, { backfill: 2 * 864e5 })).written.rows, 0);
    deepStrictEqual(await all(), before);
  });

  await t.step("more machines get their past, the others theirs once", async () => {
    const job = { backfill: 2 * 864e5, interval: 600_000, machines: 9 };
    strictEqual((await at(morning, job)).written.rows, 288 * 2 * 9);
    strictEqual(await once(), 2880 * 7 * 9 + 288 * 2 * 9);
    strictEqual((await at(morning, job)).written.rows, 0);
    const [{ machines }] = await sql`select count(*)::int as machines from machines`;
    strictEqual(machines, 9);
    for (const table of ["machine_metrics", ...told, "maintenance"]) {
      await sql`delete from ${sql(table)} where machine_id in ('M08', 'M09')`;
    }
    await sql`delete from machines where id in ('M08', 'M09')`;
    await sql`delete from machine_history where machine_id in ('M08', 'M09')`;
  });

  await t.step("production follows from the states, OEE from production", async () => {
    const [{ hours, off }] = await sql`
      select count(*)::int as hours, max(abs(p.run_seconds - coalesce(s.seconds, 0))) as off
      from production p
      left join lateral (
          select sum(extract(epoch from ended_at - started_at))::float8 as seconds
          from pgpulse.machine_state_at(p.hour, p.hour + interval '1 hour', array[p.machine_id])
          where status = 'running'
      ) s on true
      where p.hour > ${new Date(morning - 2 * 864e5)} and p.hour < ${new Date(morning - 36e5)}
    `;
    ok(hours > 200, `${hours} hours`);
    ok(off < 0.001, `${off} s`);
    const [{ changes, wrong }] = await sql`
      select count(*)::int as changes, count(*) filter (
          where abs(h.oee - o.availability * o.performance * o.quality / 1e4) > 0.01
              or abs(h.availability - o.availability) > 0.01
              or abs(h.oee - o.oee) > 0.01
      )::int as wrong
      from machine_history h
      join machine_oee_hourly o
          on o.machine_id = h.machine_id and o.hour = h."timestamp" - interval '1 hour'
          and o.run_seconds > 0
    `;
    ok(changes > 200 && wrong === 0, `${wrong} of ${changes} changes have another OEE`);
    const [{ present }] = await sql`
      select count(*)::int as present
      from machines m
      join lateral (
          select * from machine_history h where h.machine_id = m.id order by h."timestamp" desc limit 1
      ) h on h.status = m.status and h.oee is not distinct from m.oee
    `;
    strictEqual(present, 7);
  });

  await t.step("states are contiguous; stops, alarms and energy go with them", async () => {
    const [from, to] = [new Date(morning - 864e5), new Date(morning - 6e5)];
    const spent = await sql`
      select machine_id, sum(seconds) as seconds
      from pgpulse.machine_time_in_state(${from}, ${to}) group by 1
    `;
    deepStrictEqual(spent.map(({ seconds }) => seconds), Array(7).fill((+to - +from) / 1000));
    const [{ stops, wrong }] = await sql`
      select count(*)::int as stops, count(*) filter (where s.status = 'running')::int as wrong
      from downtime d
      cross join lateral pgpulse.machine_state_at(
          d.started_at, d.ended_at, array[d.machine_id]
      ) s
      where d.started_at > ${from} and d.ended_at < ${to}
    `;
    ok(stops > 10 && wrong === 0, `${wrong} of ${stops} stops run`);
    const [{ off }] = await sql`
      select max(abs(power.avg_value / e.energy_kwh - 1)) as off
      from energy_consumption e
      join machine_metrics_hourly power
          on power.machine_id = e.machine_id and power.hour = e.hour
          and power.metric_type = 'power' and power.point_count = 60
      where e.hour between ${from} and ${to} and e.energy_kwh > 2
    `;
    ok(off < 0.3, `energy and power differ by ${off}`);
  });

  await t.step("stopped and started again, live: what was open ends, each once", async () => {
    const [{ stop }] = await sql`
      select extract(epoch from started_at)::float8 * 1000 as stop
      from downtime
      where ended_at - started_at > interval '25 minutes'
      order by started_at desc
      limit 1
    `;
    await sql`truncate machine_states, ${sql(told)}, maintenance`;
    // By the view it would go row by row, and not what is packed.
    await sql`truncate rows.machine_metrics, packed.machine_metrics`;
    const job = { interval: 1000, count: 1 };
    await at(stop + 10 * 6e4, job);
    strictEqual(await once(), 7 * 9);
    ok(await open() > 0);
    await at(stop + 10 * 6e4, job);
    strictEqual(await once(), 2 * 7 * 9, "a second start waits for the next tick");
    await at(stop + 8 * 36e5, job);
    const [{ left }] = await sql`
      select count(*)::int as left from downtime
      where ended_at is null and started_at < ${new Date(stop + 36e5)}
    `;
    strictEqual(left, 0);
    strictEqual(await once(), 3 * 7 * 9);
    // The same time, told at once, tells the same.
    const since = new Date(stop - 36e5);
    const day = () =>
      sql`
        select machine_id, reason, started_at, ended_at, null::float8 as run_seconds
        from downtime where started_at > ${since}
        union all
        select machine_id, null, hour, null, run_seconds from production where hour > ${since}
        union all
        select machine_id, status, "timestamp", null, oee from machine_history
        where "timestamp" > ${since} and status is not null
        order by 1, 2, 3
      `;
    const live = [...await day()];
    await sql`truncate machine_states, ${sql(told)}, maintenance`;
    await at(stop + 8 * 36e5, job);
    const again = [...await day()];
    ok(again.length > 50);
    // Only the first sight of each machine is a line of history of its own.
    const known = new Set(live.map((row) => JSON.stringify(row)));
    ok(again.every((row) => known.has(JSON.stringify(row))));
    ok(live.length - again.length <= 14, `${live.length} and ${again.length} rows`);
  });

  await t.step("SIGTERM in a backfill, and again: each once", async () => {
    await sql`truncate machine_states, ${sql(told)}, maintenance`;
    // By the view it would go row by row, and not what is packed.
    await sql`truncate rows.machine_metrics, packed.machine_metrics`;
    const args = ["factory", "--machines", "2", "--backfill", "20d", "--interval", "2m"];
    const { child, end } = start(url, ...args);
    await until(
      "rows are there",
      async () => (await sql`select from machine_metrics limit 1`).length,
      60_000,
    );
    child.kill("SIGTERM");
    const { code, stderr } = await end;
    strictEqual(code, 130, stderr);
    const { stdout } = await generate(url, ...args);
    match(stdout, / ticks had rows already\n$/);
    ok(await once() >= 20 * 720 * 18);
    const [{ days }] = await sql`
      select count(distinct hour)::float8 / 24 as days from energy_consumption
    `;
    ok(days > 19.9 && days < 20.1, `energy of ${days} days`);
  });

  await t.step("as role server, what is old goes into packed form at once", async () => {
    const [{ packed, rows, unpacked }] = await sql`
      select (select count(*)::int from packed.machine_metrics) as packed,
          (select count(*)::int from machine_metrics where "timestamp" < now() - interval '10 days')
              as rows,
          (select count(*)::int from rows.machine_metrics where "timestamp" < now() - interval '10 days')
              as unpacked
    `;
    ok(packed > 0 && rows >= 9 * 720 * 18, `${packed} packed, ${rows} rows`);
    strictEqual(unpacked, 0);
  });
});

import { deepStrictEqual, doesNotMatch, match, ok, strictEqual, throws } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import {
  bytes,
  Channel,
  labelText,
  newest,
  panel,
  type Plan,
  type Row,
  targets,
  toRow,
  Troubles,
} from "./notify-relay.ts";
import {
  type Background,
  background,
  GrafanaStandIn,
  installed,
  migrated,
  parseLines,
  Picture,
  quietPort,
  ROOT,
  script,
  type TestServer,
  until,
} from "./testing.ts";

/** Many relays come and go at one server. */
const SETTINGS = ["max_connections=300"];
const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

// --- units ---------------------------------------------------------------------------------------

const PLAN: Plan = {
  stream: "m",
  stream_id: "pgpulse",
  rows: 10,
  coarse_rows: 0,
  beat_ms: 250,
  slow_ms: null,
  split: null,
  labels: [],
  fields: ["value"],
  tables: ["public.m"],
  read_all: "",
  read_tail: "",
  read_values: null,
  fault: null,
};
const LABELLED = { ...PLAN, labels: ["host"] };

const rows = (count: number, from = 1000, plan = PLAN, ...labels: string[]): Row[] =>
  Array.from({ length: count }, (_, i) => toRow("m", plan, from + i, [...labels, i]));

/** What a browser shows after each of the channel's texts. */
function picture(n: number, ...texts: string[]): Picture {
  const picture = new Picture(n / 2);
  for (const text of texts) picture.take(parseLines(text).get("m")!);
  return picture;
}

/** Runs something with console.error caught. */
function said(work: (troubles: Troubles) => void): string[] {
  const lines: string[] = [];
  const { error } = console;
  console.error = (line: string) => void lines.push(line);
  try {
    work(new Troubles());
  } finally {
    console.error = error;
  }
  return lines;
}

Deno.test("labels lose only what the browser or line protocol cannot bear", () => {
  const pairs: [unknown, string][] = [
    ["web-1", "web-1"],
    ["a,b=c", "a;b:c"],
    ["two  words", "two  words"],
    [" \t padded\n", "padded"],
    ["one\r\n\ttwo", "one two"],
    ["C:\\temp\\", "C:/temp/"],
    ["", "(empty)"],
    ["   ", "(empty)"],
    [null, "(null)"],
    ['say "hi"', 'say "hi"'],
    ["Größe 温度 🌡", "Größe 温度 🌡"],
    [0, "0"],
    ["{x}", "{x}"],
    ["#1", "#1"],
    ["x".repeat(1000), "x".repeat(200)],
  ];
  for (const [value, text] of pairs) strictEqual(labelText(value), text);
});

Deno.test("rows are lines that Grafana's parser takes, with every field in each", () => {
  const plan = { ...PLAN, labels: ["host", "my zone"], fields: ["a", "b c", "d,e=f", 'q"'] };
  const values = ["x y", null, 1.5e-300, NaN, Infinity, null];
  const { line } = toRow("m", plan, 1700000000123, values);
  const frame = parseLines(line + "\n").get("m")!;
  deepStrictEqual(frame.labels, ["host=x y, my zone=(null)"]);
  deepStrictEqual(frame.time, [1700000000123]);
  deepStrictEqual(frame.fields.map(({ name }) => name), ["a", "b c", "d;e:f", 'q"']);
  deepStrictEqual(frame.fields.map(({ values }) => values[0]), [1.5e-300, null, null, null]);
  for (const value of [0, -0, 5e-324, 1.7976931348623157e308, -1e21, 1 / 3, 2 ** 53]) {
    for (const ms of [0, -1, 9.1e12, -9.1e12]) {
      const frame = parseLines(toRow("m", PLAN, ms, [value]).line).get("m")!;
      deepStrictEqual([frame.time[0], frame.fields[0].values[0]], [ms, value + 0]);
    }
  }
});

Deno.test("the stand-in refuses what Grafana's parser refuses", () => {
  for (
    const bad of [
      "m value=NaN 1",
      "m value=inf 1",
      "m,host= value=1 1",
      "m,host value=1 1",
      "m value= 1",
      "m value 1",
      "m",
      "m value=1 x",
      "m value=1e400 1",
      "m value=1 9223372036854775808",
      "m a b=1 1",
      "m,a=b,c value=1 1",
    ]
  ) throws(() => parseLines(bad), Error, bad);
  const { fields, labels } = parseLines(
    'm,b=2\\ x,a=1\\,y v=1,t="x \\"y",o=true 1000000\nm v=2i 2\n',
  )
    .get("m")!;
  deepStrictEqual(labels, ["a=1,y, b=2 x", ""]);
  deepStrictEqual(fields.map(({ name, type }) => [name, type]), [
    ["o", "boolean"],
    ["t", "string"],
    ["v", "number"],
  ]);
  deepStrictEqual(fields[2].values, [1, 2]);
  deepStrictEqual(fields[0].values, [true, null]);
});

Deno.test("newest keeps whole milliseconds, in order, the last of doubles", () => {
  const row = (ms: number, series: string, value: number) => {
    return { ms, series, values: [value], line: `${ms}${series}${value}` };
  };
  deepStrictEqual(newest([], 3), []);
  deepStrictEqual(newest([row(1, "a", 1)], 0), []);
  const mixed = [row(3, "a", 1), row(1, "a", 2), row(3, "b", 3), row(2, "a", 4), row(3, "a", 5)];
  deepStrictEqual(newest(mixed, 1).map((r) => r.values[0]), [5, 3]);
  deepStrictEqual(newest(mixed, 2).map((r) => r.values[0]), [4, 5, 3]);
  deepStrictEqual(newest(mixed, 9).map((r) => r.values[0]), [2, 4, 5, 3]);
});

for (const count of [0, 1, 9, 10, 11, 25]) {
  Deno.test(`a window of 10 shows ${count} rows and nothing else`, () => {
    const channel = new Channel(PLAN, "m", new Troubles());
    channel.replace(rows(25, 500), []);
    const before = channel.text;
    channel.replace(rows(count), []);
    const shown = picture(10, before, channel.text, channel.text);
    strictEqual(shown.rows.length, 10);
    strictEqual(new Set(shown.rows.map(({ ms }) => ms)).size, 10);
    const wanted = rows(count).slice(-10).map((row) => [row.ms, row.values[0]]);
    deepStrictEqual(shown.points(), count ? { value: wanted } : {});
  });
}

Deno.test("a labelled window is padded within its own series, also when it is empty again", () => {
  const channel = new Channel(LABELLED, "m", new Troubles());
  channel.replace([], []);
  strictEqual(channel.text, "", "Nothing is pushed before the first label is known");
  channel.replace([...rows(3, 1000, LABELLED, "a"), ...rows(4, 1001, LABELLED, "b")], []);
  const first = channel.text;
  const shown = picture(10, first);
  strictEqual(shown.rows.length, 10);
  deepStrictEqual(shown.points(), {
    "host=a value": [[1000, 0], [1001, 1], [1002, 2]],
    "host=b value": [[1001, 0], [1002, 1], [1003, 2], [1004, 3]],
  });
  channel.replace([], []);
  deepStrictEqual(picture(10, first, channel.text).points(), {});
});

Deno.test("a tail replaces what is younger and leaves what is older", () => {
  const channel = new Channel(PLAN, "m", new Troubles());
  ok(channel.replace(rows(8), []));
  ok(!channel.replace(rows(8), []), "The same rows are no change");
  ok(!channel.replaceTail(1006, rows(2, 1006).map((r, i) => toRow("m", PLAN, r.ms, [6 + i]))));
  ok(channel.replaceTail(1006, [toRow("m", PLAN, 1007, [70]), toRow("m", PLAN, 1009, [90])]));
  deepStrictEqual(channel.rows().map((r) => [r.ms, r.values[0]]).slice(-4), [
    [1004, 4],
    [1005, 5],
    [1007, 70],
    [1009, 90],
  ]);
  strictEqual(channel.newestMs, 1009);
});

Deno.test("coarse rows end where the newest rows begin", () => {
  const plan = { ...PLAN, coarse_rows: 6 };
  const channel = new Channel(plan, "m", new Troubles());
  const coarse = [100, 200, 300, 400, 500, 600].map((ms) => toRow("m", plan, ms, [ms]));
  channel.replace(rows(9, 350, plan), coarse);
  deepStrictEqual(channel.rows().map((r) => r.ms), [100, 200, 300, 355, 356, 357, 358]);
  strictEqual(picture(10, channel.text).rows.length, 10);
});

Deno.test("a window too long for one message is thinned, and that is said once", () => {
  const plan = { ...LABELLED, rows: 2000 };
  const long = "ü".repeat(200);
  const lines = said((troubles) => {
    const channel = new Channel(plan, "m", troubles);
    for (let i = 0; i < 3; i++) {
      channel.replace([...rows(2000, 1000, plan, long), ...rows(2000, 1000, plan, "b")], []);
    }
    const size = new TextEncoder().encode(channel.text).length;
    ok(size < 500 * 1024, `${size} bytes are within Grafana's limit`);
    const shown = picture(2000, channel.text);
    strictEqual(shown.rows.length, 2000);
    const points = shown.points();
    deepStrictEqual(points[`host=${long} value`], points["host=b value"]);
    deepStrictEqual(points["host=b value"].at(-1), [2999, 1999], "The newest is always shown");
    ok(points["host=b value"].length >= 500);
  });
  strictEqual(lines.length, 1);
  match(lines[0], /^Stream "m" is too long for one message/);
});

Deno.test("of too many series the first ones stay, and that is said once", () => {
  const lines = said((troubles) => {
    const channel = new Channel(LABELLED, "m", troubles);
    for (let i = 0; i < 2; i++) {
      const all = Array.from({ length: 130 }, (_, i) => toRow("m", LABELLED, 1000, [`h${i}`, i]));
      channel.replace(all, []);
    }
    const points = picture(10, channel.text).points();
    strictEqual(Object.keys(points).length, 100);
    ok(points["host=h99 value"]);
  });
  strictEqual(lines.length, 1);
  match(lines[0], /more than 100 series/);
});

Deno.test("a trouble is said once, and its end once", () => {
  const lines = said((troubles) => {
    troubles.over("a", "never begun");
    for (let i = 0; i < 3; i++) {
      troubles.say("a", "A is broken");
      troubles.say("a", "A is broken in another way");
    }
    deepStrictEqual(troubles.list(), ["A is broken in another way"]);
    for (let i = 0; i < 3; i++) troubles.over("a", "A works again");
    troubles.say("a", "A is broken");
  });
  deepStrictEqual(lines, [
    "A is broken",
    "A is broken in another way",
    "A works again",
    "A is broken",
  ]);
});

Deno.test("sizes", () => {
  strictEqual(bytes("2000"), 2000);
  strictEqual(bytes("500kB"), 500_000);
  strictEqual(bytes("1.5 MB"), 1_500_000);
  strictEqual(bytes("1m"), 1_000_000);
  for (const bad of ["", "1", "kB", "-5kB", "1GB", "1,5MB", "0"]) {
    throws(() => bytes(bad), /^Error: Cannot read the size ".*": write it as 500kB or 2MB$/);
  }
});

Deno.test("addresses and tokens of several Grafanas", () => {
  const of = (env: Record<string, string>) => targets((name) => env[name]);
  deepStrictEqual(of({}), []);
  deepStrictEqual(of({ GRAFANA_URL: "http://a:3000/, https://b/grafana/", GRAFANA_TOKEN: "1,2" }), [
    { url: "http://a:3000", signIn: { token: "1", user: "admin", password: undefined } },
    { url: "https://b/grafana", signIn: { token: "2", user: "admin", password: undefined } },
  ]);
  const [{ signIn }] = of({
    GRAFANA_URL: "http://a",
    GRAFANA_ADMIN_USER: "old",
    GRAFANA_ADMIN_PASSWORD: "old",
    GF_SECURITY_ADMIN_USER: "boss",
    GF_SECURITY_ADMIN_PASSWORD: "pw",
  });
  deepStrictEqual(signIn, { token: undefined, user: "boss", password: "pw" });
  strictEqual(of({ GRAFANA_URL: "http://a", GRAFANA_API_KEY: "k" })[0].signIn.token, "k");
  throws(() => of({ GRAFANA_URL: "localhost:3000" }), /Cannot read GRAFANA_URL: "localhost:3000"/);
  throws(
    () => of({ GRAFANA_URL: "http://me:x/secret@a" }),
    /^Error: Cannot read GRAFANA_URL: "http:\/\/\*\*\*@a"/,
  );
  throws(
    () => of({ GRAFANA_URL: "http://a,http://b", GRAFANA_TOKEN: "secret" }),
    (error: Error) => /^Cannot match 1 tokens/.test(error.message) && !/secret/.test(error.message),
  );
});

Deno.test("a panel shows exactly one window", () => {
  const made = panel({ address: "stream/a/b", label: "b", rows: 300 }, "gauge");
  strictEqual(made.maxDataPoints, 150);
  strictEqual(made.targets[0].buffer, 31_536_000_000);
  strictEqual(made.targets[0].channel, "stream/a/b");
  strictEqual(made.type, "gauge");
});

// --- against PostgreSQL and a stand-in for Grafana -------------------------------------------------

type Points = ReturnType<Picture["points"]>;

/** One migrated database and one relay that most tests share. */
interface World extends AsyncDisposable {
  server: TestServer;
  /** As owner. */
  sql: postgres.Sql;
  grafana: GrafanaStandIn;
  relay: Background;
  /** Where the relay serves. */
  http: string;
}

const dir = Deno.makeTempDirSync({ prefix: "pgpulse-relay-" });

/** A relay as role `server`, on a free port, with its own folder for tokens. */
async function startRelay(
  url: string,
  grafana: GrafanaStandIn[],
  env: Record<string, string> = {},
  ...args: string[]
): Promise<Background> {
  const relay = await background("relay", ["--port", "0", ...args], {
    DATABASE_URL: url,
    GRAFANA_URL: grafana.map(({ url }) => url).join(),
    GRAFANA_TOKEN: grafana.map(() => "glsa_static").join(),
    ...env,
  }, Deno.makeTempDirSync({ dir }));
  started.push(relay);
  return relay;
}

/** Relays that the present test started. */
let started: Background[] = [];

const address = async (relay: Background) =>
  (await relay.said(/^Serves streams at/)).match(/http:\S+\//)![0];

async function open(major: 15 | 18): Promise<World> {
  const server = await migrated({ major, settings: SETTINGS });
  const grafana = new GrafanaStandIn().start();
  // An untouched copy, to make further databases of.
  const admin = postgres(server.urlFor("user", "secret", "postgres"), { max: 1 });
  await admin`create database spare template testdb strategy file_copy`;
  await admin.end();
  const relay = await startRelay(server.urlFor("server", "server"), [grafana]);
  const http = await address(relay);
  const { sql } = server;
  return {
    server,
    sql,
    grafana,
    relay,
    http,
    async [Symbol.asyncDispose]() {
      await relay[Symbol.asyncDispose]();
      await grafana.stop();
      await server[Symbol.asyncDispose]();
    },
  };
}

let shared: Promise<World> | undefined;
const world = () => shared ??= open(18);

Deno.test.afterAll(async () => {
  await (await shared)?.[Symbol.asyncDispose]();
  await Deno.remove(dir, { recursive: true });
});

/** Makes a table with its view and stream, as a user would. */
async function stream(
  sql: postgres.Sql,
  name: string,
  options = "",
  columns = "value float8",
): Promise<void> {
  await sql.unsafe(`
    create table public.${name} (at timestamptz not null default clock_timestamp(), ${columns});
    create index on public.${name} (at);
    create view live.${name} as select * from public.${name};
    select pgpulse.add_stream('${name}' ${options && `, ${options}`});
  `).simple();
}

/** The newest rows of a table, as a panel ought to draw them. */
async function truth(
  sql: postgres.Sql,
  table: string,
  { n = 300, label = "", where = "true", field = "value" } = {},
): Promise<Points> {
  const rows = await sql.unsafe(`
    select * from (
      select distinct on (ms, label) *, dense_rank() over (order by ms desc) as rank
      from (
        select floor(extract(epoch from at) * 1000)::float8 as ms, ${label || "''"} as label,
          ${field}::float8 as value, at
        from public.${table}
        where ${where} and at < now() + interval '1 minute'
      ) as rows
      order by ms, label, at desc
    ) as ranked
    where rank <= ${n}
    order by ms`);
  const points: Points = {};
  for (const { ms, label: text, value } of rows) {
    if (!Number.isFinite(value)) continue;
    (points[`${label && `${label}=${labelText(text)} `}${field}`] ??= []).push([ms, value]);
  }
  return points;
}

/** Waits until the picture is what is wanted, N rows and no more. */
async function shows(
  picture: Picture,
  wanted: () => Points | Promise<Points>,
  ms = 12_000,
): Promise<void> {
  let difference: unknown;
  await until("the picture is right", async () => {
    try {
      deepStrictEqual(picture.points(), await wanted());
      return true;
    } catch (error) {
      difference = error;
    }
  }, ms).catch(() => {
    throw difference;
  });
  if (picture.frames) strictEqual(picture.rows.length, 2 * picture.maxDataPoints);
}

type Scenario = [name: string, run: () => Promise<void>, ignore?: boolean];

/** Scenarios that mostly wait, several at a time. */
function together(name: string, scenarios: Scenario[]): void {
  const loose = { sanitizeOps: false, sanitizeResources: false, sanitizeExit: false };
  const fn = async (t: Deno.TestContext) => {
    started = shared ? [(await shared).relay] : [];
    const queue = [...scenarios];
    const worker = async () => {
      for (let next = queue.shift(); next; next = queue.shift()) {
        const [name, fn, ignore] = next;
        await t.step({ name, fn, ignore, ...loose });
      }
    };
    await Promise.all(Array.from({ length: 6 }, worker));
  };
  Deno.test({ name, fn, ...loose });
}

/** What one relay makes of tables. */
const pictures: Scenario[] = [];
const against = (name: string, run: () => Promise<void>) => void pictures.push([name, run]);

for (const major of [18, 15] as const) {
  against(`PostgreSQL ${major}: a picture is right for 0, 1, N-1, N and more rows`, async () => {
    await using own = major === 15 ? await open(15) : undefined;
    const { sql, grafana, relay } = own ?? await world();
    await stream(sql, "counted", "rows => 50");
    const picture = grafana.subscribe("stream/pgpulse/counted", 25);
    await until("the empty window comes", () => picture.frames);
    deepStrictEqual(picture.points(), {});
    strictEqual(picture.rows.length, 50);
    for (const more of [1, 48, 1, 1, 500]) {
      await sql`insert into counted select clock_timestamp() + i * interval '1 ms', random()
        from generate_series(1, ${more}) as i`;
      await shows(picture, () => truth(sql, "counted", { n: 50 }));
    }
    // Whoever comes later sees the same at once.
    deepStrictEqual(
      grafana.subscribe("stream/pgpulse/counted", 25).points(),
      await truth(sql, "counted", { n: 50 }),
    );
    strictEqual(relay.count(/counted/), 0, "Nothing to complain of");
  });
}

against("what happens to a row shows: insert, update, delete, past, future", async () => {
  const { sql, grafana } = await world();
  await stream(sql, "changing");
  const picture = grafana.subscribe("stream/pgpulse/changing");
  const right = () => shows(picture, () => truth(sql, "changing"));
  await sql`insert into changing select now() - i * interval '1 s', i from generate_series(1, 20) as i`;
  await right();
  await sql`insert into changing (value) values (21)`;
  await right();
  await sql`update changing set value = 100 where value = 15`;
  await right();
  await sql`delete from changing where value = 3`;
  await right();
  await sql`delete from changing where at = (select max(at) from changing)`;
  await right();
  await sql`insert into changing values (now() - interval '1 hour', 60)`;
  await right();
  await sql`insert into changing values (now() + interval '30 s', 30)`;
  await right();
  await sql`insert into changing (value) values (22)`;
  await right();
  strictEqual(picture.points().value.at(-1)![1], 30);
  // Not yet to be seen, and then, without a hint, its time comes.
  await sql`insert into changing values (now() + interval '61 s', 61), (now() + interval '1 hour', 3600)`;
  await until("its time has come", () => picture.points().value.at(-1)![1] === 61);
  await right();
  await sql`truncate changing`;
  await right();
  deepStrictEqual(picture.points(), {});
});

against("a transaction that commits late is seen, also in a busy stream", async () => {
  const { sql, grafana } = await world();
  await stream(sql, "late");
  const picture = grafana.subscribe("stream/pgpulse/late");
  const committed = Promise.withResolvers<void>();
  const slow = sql.begin(async (tx) => {
    await tx`insert into late values (now(), -1)`;
    await committed.promise;
  });
  for (let i = 0; i < 40; i++) {
    await sql`insert into late (value) values (${i})`;
    await pause(100);
    // 3 s late, which no tail read reaches back to, with others before and behind.
    if (i === 30) committed.resolve();
  }
  await slow;
  await shows(picture, () => truth(sql, "late"), 15_000);
  ok(picture.points().value.some(([, value]) => value === -1));
});

against("a graded window is what SQL says: coarse history, then the newest rows", async () => {
  const { sql, grafana } = await world();
  await sql`insert into metrics ("timestamp", value)
    select t, random() from generate_series(now() - interval '7 h', now(), interval '7 s') as t`;
  const picture = grafana.subscribe("stream/pgpulse/metrics");
  const wanted = async (): Promise<Points> => {
    const rows = await sql<{ ms: number; value: number }[]>`
      with fine as (
        select "timestamp" as at, value from metrics order by 1 desc limit 120
      ), grid as (
        select generate_series(0, 179) * interval '-2 min' + date_bin('2 min', now(), 'epoch') as at
      ), coarse as (
        select grid.at, (
          select value from metrics m
          where m."timestamp" <= grid.at and m."timestamp" > grid.at - interval '2 min'
          order by m."timestamp" desc limit 1
        ) as value
        from grid
        where grid.at < (select min(at) from fine)
      )
      select floor(extract(epoch from at) * 1000)::float8 as ms, value
      from (select * from coarse union all select * from fine) as all_rows
      where value is not null
      order by 1`;
    return { value: rows.map(({ ms, value }) => [ms, value]) };
  };
  await shows(picture, wanted, 15_000);
  const [first, last] = [picture.points().value[0][0], picture.points().value.at(-1)![0]];
  ok(last - first > 5.9 * 3600_000, "Six hours in one panel");
  await sql`insert into metrics (value) values (1)`;
  await shows(picture, wanted, 15_000);
});

against("a graded window grades each series, and each channel of a split stream", async () => {
  const { sql, grafana } = await world();
  const shape = "dev text, part text, value float8";
  await stream(sql, "graded", "history => '1 hour', step => '1 min', rows => 100", shape);
  await sql`create view live.graded_by_dev as select at, dev, part, value from graded`;
  await sql`select pgpulse.add_stream('graded_by_dev', history => '1 hour', step => '1 min',
    rows => 100, split => 'dev')`;
  await sql`insert into graded
    select now() - i * interval '7 s', 'dev ' || d, 'part ' || p, i * 100 + d * 10 + p
    from generate_series(1, 700) as i, generate_series(1, 2) as d, generate_series(1, 2) as p
    where (i + p) % 2 = 0`;
  const wanted = async (dev: string): Promise<Points> => {
    const rows = await sql<{ ms: number; dev: string; part: string; value: number }[]>`
      with mine as (
        select * from graded where ${dev || null}::text is null or dev = ${dev}
      ), times as (
        select distinct at from mine order by at desc limit 40
      ), fine as (
        select * from mine where at in (select at from times)
      ), coarse as (
        select distinct on (grid.at, dev, part) grid.at, dev, part, value
        from generate_series(
          date_bin('1 min', now(), 'epoch') - interval '59 min', date_bin('1 min', now(), 'epoch'), '1 min'
        ) as grid (at)
        join mine on mine.at <= grid.at and mine.at > grid.at - interval '1 min'
        where grid.at < (select min(at) from fine)
        order by grid.at, dev, part, mine.at desc
      )
      select floor(extract(epoch from at) * 1000)::float8 as ms, dev, part, value
      from (select * from coarse union all select * from fine) as all_rows
      order by 1`;
    const points: Points = {};
    for (const { ms, dev, part, value } of rows) {
      (points[`dev=${dev},part=${part} value`] ??= []).push([ms, value]);
    }
    return points;
  };
  const whole = grafana.subscribe("stream/pgpulse/graded", 50);
  const one = grafana.subscribe("stream/pgpulse/graded_by_dev/dev=201", 50);
  await shows(whole, () => wanted(""), 20_000);
  await shows(one, () => wanted("dev 1"), 20_000);
  strictEqual(Object.keys(whole.points()).length, 4);
  await sql`insert into graded values (now(), 'dev 1', 'part 1', -1), (now(), 'dev 2', 'part 1', -2)`;
  await shows(whole, () => wanted(""), 20_000);
  await shows(one, () => wanted("dev 1"), 20_000);
});

against("hints name their table whatever the writer's search_path", async () => {
  const { server, sql } = await world();
  await stream(sql, "hinting");
  const [{ tables }] =
    await sql`select tables from pgpulse.stream_plans() where stream = 'hinting'`;
  deepStrictEqual(tables, ["public.hinting"]);
  const heard: string[] = [];
  const { unlisten } = await sql.listen("pgpulse", (payload) => void heard.push(payload));
  const writer = postgres(server.url, { max: 1, connection: { search_path: "pg_catalog" } });
  await writer`insert into public.hinting (value) values (1)`;
  await writer.end();
  await until("the hint is heard", () => heard.includes("public.hinting"));
  await unlisten();
});

against("a split stream has a channel for each value, whatever its name", async () => {
  const { sql, grafana } = await world();
  const odd = [
    "plain",
    "with space",
    "a,b=c",
    "Größe/温度",
    "",
    "..",
    `quote"'\\{}`,
    "new\nline",
    "NULL",
    "x".repeat(150),
    "ü".repeat(90),
  ];
  await stream(sql, "devices", "split => 'dev', rows => 20", "dev text, value float8");
  await sql`insert into devices (dev, value)
    select dev, i from unnest(${odd}::text[]) as dev, generate_series(1, 3) as i`;
  await sql`insert into devices (dev, value) values (null, 1)`;
  const channels = () =>
    sql<{ value: string; address: string }[]>`
      select value, address from pgpulse.channels where stream = 'devices'`;
  const known = await channels();
  deepStrictEqual(known.map(({ value }) => value).sort(), [...odd].sort());
  strictEqual(new Set(known.map(({ address }) => address)).size, odd.length);
  const check = async (value: string, address: string) => {
    const picture = grafana.subscribe(address, 10);
    await shows(picture, async () => {
      const points = await truth(sql, "devices", { n: 20, label: "dev" });
      const name = `dev=${labelText(value)} value`;
      return { [name]: points[name] };
    });
  };
  for (const { value, address } of known) await check(value, address);
  // A value that comes later gets its channel too.
  await sql`insert into devices (dev, value) values ('new one', 1)`;
  await check("new one", (await channels()).find(({ value }) => value === "new one")!.address);
  const mine = grafana.channels.filter((name) => name.startsWith("stream/pgpulse/devices"));
  deepStrictEqual(mine, (await channels()).map(({ address }) => address).sort());
});

against("odd values and names of labels and fields arrive, and break nothing", async () => {
  const { sql, grafana } = await world();
  await sql`create type mood as enum ('calm, or so', 'wild')`;
  await stream(
    sql,
    "odd",
    "",
    `"the host" text, mood mood, value numeric, "a b" real, "c,d=e" int, "Größe" bool, "q""" float8`,
  );
  const hosts = ["a,b", "c=d", 'e"f', "g\\h", "i\nj", "Größe 温度 🌡", "", " ", "'; drop table x"];
  for (const [i, host] of hosts.entries()) {
    await sql`insert into odd values (
      timestamptz '2020-01-01' + ${i} * interval '1 s', ${host}, 'calm, or so', ${i}, 1.5, 2, true, 'NaN')`;
  }
  await sql`insert into odd (at, value, "q""") values ('2020-01-01 00:01', 'NaN', 'Infinity')`;
  await sql`insert into odd (at, value, "q""") values ('2020-01-01 00:02', 1e300, '-Infinity')`;
  await sql`insert into odd (at, value) values ('infinity', 1), ('-infinity', 1), ('0001-01-01', 1)`;
  const picture = grafana.subscribe("stream/pgpulse/odd");
  const [{ at }] =
    await sql`select extract(epoch from timestamptz '2020-01-01')::float8 * 1000 as at`;
  const wanted: Points = {};
  for (const [i, host] of hosts.entries()) {
    const series = `mood=calm; or so,the host=${labelText(host)}`;
    const ms = at + i * 1000;
    for (const [field, value] of [["Größe", 1], ["a b", 1.5], ["c;d:e", 2], ["value", i]]) {
      (wanted[`${series} ${field}`] ??= []).push([ms, value]);
    }
  }
  wanted["mood=(null),the host=(null) value"] = [[at + 120_000, 1e300]];
  await shows(picture, () => wanted);
  deepStrictEqual(grafana.changedFields, []);
});

against("rows of one millisecond: of one series the last stands, of several each", async () => {
  const { sql, grafana } = await world();
  await stream(sql, "same_ms", "rows => 10", "host text, value float8");
  const picture = grafana.subscribe("stream/pgpulse/same_ms", 5);
  await sql`insert into same_ms
    select timestamptz '2024-01-01' + s * interval '1 ms' + us * interval '1 us', 'h' || h, s * 100 + us
    from generate_series(1, 4) as s, generate_series(0, 1) as us, generate_series(1, 3) as h`;
  await shows(picture, () => truth(sql, "same_ms", { n: 10, label: "host" }));
  deepStrictEqual(picture.points()["host=h1 value"].map(([, v]) => v), [101, 201, 301, 401]);
  // Whole milliseconds stay what they are.
  await stream(sql, "exact");
  await sql`insert into exact
    select timestamptz '2025-06-01 12:34:56' + i * interval '1 ms', i from generate_series(1, 300) as i`;
  await shows(grafana.subscribe("stream/pgpulse/exact"), () => truth(sql, "exact"));
});

against("many series share one channel, up to a limit that is said once", async () => {
  const { sql, grafana, relay } = await world();
  await stream(sql, "fleet", "rows => 20", "host text, value float8");
  const picture = grafana.subscribe("stream/pgpulse/fleet", 10);
  await sql`insert into fleet
    select now() - s * interval '1 s', 'host ' || h, s from generate_series(1, 30) as s, generate_series(1, 40) as h`;
  await shows(picture, () => truth(sql, "fleet", { n: 20, label: "host" }));
  strictEqual(Object.keys(picture.points()).length, 40);
  await sql`insert into fleet select now(), 'late ' || h, 1 from generate_series(1, 90) as h`;
  await relay.said(/Stream "fleet" has more than 100 series/);
  await until("the picture has its hundred", () => Object.keys(picture.points()).length === 100);
  await sql`insert into fleet values (now(), 'more', 1)`;
  await pause(600);
  strictEqual(relay.count(/Stream "fleet"/), 1);
});

against("a stream too long for one message is thinned and says so once", async () => {
  const { sql, grafana, relay } = await world();
  await stream(sql, "long", "rows => 2000", "host text, value float8");
  const picture = grafana.subscribe("stream/pgpulse/long", 1000);
  await sql`insert into long
    select now() - s * interval '1 s', repeat('длинный', 5) || h, s
    from generate_series(1, 2500) as s, generate_series(1, 9) as h`;
  await relay.said(/Stream "long" is too long for one message: only one time in \d+ is shown/);
  await until("it is shown", () => {
    const series = Object.values(picture.points());
    return series.length === 9 && series.every((points) => points.length >= 250);
  });
  strictEqual(picture.rows.length, 2000);
  const all = await truth(sql, "long", { n: 2000, label: "host" });
  for (const [name, points] of Object.entries(picture.points())) {
    deepStrictEqual(points.at(-1), all[name].at(-1));
    const values = new Map(all[name]);
    ok(points.every(([ms, value]) => values.get(ms) === value), "A part of the truth");
  }
  strictEqual(relay.count(/Stream "long"/), 1);
  await sql`drop view live.long`;
});

against("a view that fails says so once, the others go on, and it heals", async () => {
  const { sql, grafana, relay } = await world();
  await stream(sql, "healthy");
  await sql`create table ratio (at timestamptz default clock_timestamp(), part int, whole int)`;
  await sql`create view live.ratio as select at, part / whole as value from ratio`;
  await sql`select pgpulse.add_stream('ratio')`;
  const picture = grafana.subscribe("stream/pgpulse/ratio");
  const other = grafana.subscribe("stream/pgpulse/healthy");
  await sql`insert into ratio values (default, 8, 2)`;
  await until("4 shows", () => picture.points().value?.[0][1] === 4);
  await sql`insert into ratio values (default, 1, 0)`;
  await relay.said(/^Cannot read stream "ratio": division by zero; look at its view live.ratio/);
  for (let i = 0; i < 8; i++) {
    await sql`insert into ratio values (default, 1, 0)`;
    await sql`insert into healthy (value) values (${i})`;
    await pause(300);
  }
  await shows(other, () => truth(sql, "healthy"));
  await sql`delete from ratio where whole = 0`;
  await sql`insert into ratio values (default, 9, 3)`;
  await until("3 shows", () => picture.points().value?.[1]?.[1] === 3);
  await relay.said(/Stream "ratio" is read again/);
  strictEqual(relay.count(/Cannot read stream "ratio"/), 1);
  strictEqual(relay.count(/Stream "ratio" is read again/), 1);
});

against("a view that changes its columns is refused, the others go on", async () => {
  const { sql, grafana, relay, http } = await world();
  await stream(sql, "shifting");
  await stream(sql, "steady");
  const [picture, other] = ["shifting", "steady"].map((name) =>
    grafana.subscribe(`stream/pgpulse/${name}`)
  );
  await sql`insert into shifting (value) values (1)`;
  await shows(picture, () => truth(sql, "shifting"));
  await sql`alter view live.shifting rename column value to worth`;
  await relay.said(
    /^Stream "shifting" is not shown: its columns changed from \(at .*value double.*\) to \(at .*worth/,
  );
  await sql`insert into shifting (value) values (2)`;
  await sql`insert into steady (value) values (2)`;
  await shows(other, () => truth(sql, "steady"));
  strictEqual(picture.points().value.length, 1);
  const health = await (await fetch(`${http}healthz`)).json();
  ok(health.troubles.some((text: string) => /shifting/.test(text)));
  await sql`alter view live.shifting rename column worth to value`;
  await sql`select pgpulse.add_stream('shifting')`;
  await shows(picture, () => truth(sql, "shifting"));
  strictEqual(relay.count(/Stream "shifting" is not shown/), 1);
  strictEqual(relay.count(/Stream "shifting" is shown again/), 1);
  deepStrictEqual(grafana.changedFields, []);
});

against("a stream that is dropped ends, with its troubles", async () => {
  const { sql, http, relay } = await world();
  await stream(sql, "doomed");
  const names = async (): Promise<string[]> =>
    (await (await fetch(`${http}streams`)).json()).map((c: { channel: string }) => c.channel);
  await until("it is there", async () => (await names()).includes("doomed"));
  await sql`drop view live.doomed`;
  await relay.said(/Stream "doomed" is not shown: its view is gone/, 35_000);
  await sql`select pgpulse.drop_stream('doomed')`;
  await until("it is gone", async () => !(await names()).includes("doomed"));
  await until("nothing is said of it any more", async () => {
    const { troubles } = await (await fetch(`${http}healthz`)).json();
    return !troubles.some((text: string) => /doomed/.test(text));
  });
});

// --- what other programs get ---------------------------------------------------------------------

/** Reads server-sent events; `next` waits for one. */
function listen(url: string): AsyncDisposable & {
  next(): Promise<{ event: string; channel: string; size: number; rows: { value: number }[] }>;
} {
  const stop = new AbortController();
  const events: string[] = [];
  const reading = (async () => {
    const answer = await fetch(url, {
      signal: stop.signal,
      headers: { accept: "text/event-stream" },
    });
    let rest = "";
    for await (const text of answer.body!.pipeThrough(new TextDecoderStream())) {
      const parts = (rest + text).split("\n\n");
      rest = parts.pop()!;
      events.push(...parts.filter((part) => part.startsWith("event")));
    }
  })().catch(() => {});
  return {
    async next() {
      const text = await until("an event comes", () => events.shift());
      const [, event, data] = text.match(/^event: (\w+)\ndata: (.*)$/)!;
      return { event, ...JSON.parse(data) };
    },
    async [Symbol.asyncDispose]() {
      stop.abort();
      await reading;
    },
  };
}

against("server-sent events: the window first, then rows, a window where rows went", async () => {
  const { sql, http } = await world();
  await stream(sql, "events", "rows => 20");
  await sql`insert into events (value) values (1)`;
  await until("it is there", async () => {
    const answer = await fetch(`${http}streams/events`, {
      headers: { accept: "text/event-stream" },
    });
    await answer.body?.cancel();
    return answer.ok;
  });
  await using events = listen(`${http}streams/events`);
  const values = ({ rows }: { rows: { value: number }[] }) => rows.map(({ value }) => value);
  const collected = async (wanted: string, count: number) => {
    const all: number[] = [];
    while (all.length < count) {
      const event = await events.next();
      strictEqual(event.event, wanted);
      all.push(...values(event));
    }
    return all;
  };
  deepStrictEqual(await collected("window", 1), [1]);
  await sql`insert into events (value) values (2)`;
  await sql`insert into events (value) values (3)`;
  deepStrictEqual(await collected("rows", 2), [2, 3]);
  await sql`delete from events where value = 2`;
  deepStrictEqual(await collected("window", 2), [1, 3]);
  await sql`update events set value = 30 where value = 3`;
  deepStrictEqual(await collected("window", 2), [1, 30]);
  // Far from the end, where only a full read sees it: one row before all others, one gone.
  await sql`insert into events select now() - i * interval '1 min', -i from generate_series(1, 3) as i`;
  deepStrictEqual((await collected("rows", 3)).sort(), [-1, -2, -3]);
  await sql.begin(async (tx) => {
    await tx`insert into events values (now() - interval '1 h', -60)`;
    await tx`delete from events where value = -2`;
  });
  deepStrictEqual(await collected("window", 5), [-60, -3, -1, 1, 30]);
  await sql`delete from events`;
  let last = await events.next();
  while (last.rows.length) last = await events.next();
  deepStrictEqual([last.event, last.size], ["window", 20]);
});

against("/metrics is Prometheus' text format, /healthz, /streams and / answer", async () => {
  const { http, relay } = await world();
  const text = await (await fetch(`${http}metrics`)).text();
  const names = new Set<string>();
  for (const line of text.trimEnd().split("\n")) {
    const meta = line.match(/^# (HELP|TYPE) (pgpulse_relay_\w+) (.+)$/);
    if (meta) {
      if (meta[1] === "TYPE") {
        match(meta[3], /^(counter|gauge)$/);
        ok(!names.has(meta[2]), `${meta[2]} stands once`);
        names.add(meta[2]);
      }
      continue;
    }
    const sample = line.match(
      /^([a-z_]+)(\{\w+="(?:[^"\\\n]|\\[\\"n])*"(?:,\w+="(?:[^"\\\n]|\\[\\"n])*")*\})? (-?[\d.e+-]+)$/,
    );
    ok(sample && names.has(sample[1]), `Prometheus can read: ${line}`);
  }
  for (
    const name of ["lag_seconds", "frames_total", "bytes_total", "errors_total", "reconnects_total"]
  ) {
    ok(names.has(`pgpulse_relay_${name}`), name);
  }
  const health = await fetch(`${http}healthz`);
  strictEqual(health.status, 200);
  const { leading, listening } = await health.json();
  deepStrictEqual({ leading, listening }, { leading: true, listening: true });
  const list = await (await fetch(`${http}streams`)).json();
  ok(list.find((c: { address: string }) => c.address === "stream/my_stream_id/live_metrics"));
  const none = await fetch(`${http}streams/none`);
  strictEqual(none.status, 404);
  match((await none.json()).error, /There is no stream "none"/);
  const page = await (await fetch(http)).text();
  match(page, /^<!doctype html>/);
  doesNotMatch(
    page,
    /https?:\/\/(?!(github\.com|www\.w3\.org))/,
    "The page loads nothing from elsewhere",
  );
  doesNotMatch(relay.log.join("\n"), /glsa_static|:server@/, "No secrets in the log");
});

against("--panel prints a panel, --help the manual, and wrong flags say what to do", async () => {
  const { server, http } = await world();
  const env = { DATABASE_URL: server.urlFor("server", "server") };
  const run = (args: string[], more = {}) => script("notify-relay.ts", args, { ...env, ...more });
  const [shown, split, help, none, flag, port, taken, budget, url, tokens, login] = await Promise
    .all([
      run(["--panel", "live_metrics", "--type", "gauge"]),
      run(["--panel", "devices/plain"]),
      run(["--help"]),
      run(["--panel", "nonesuch"]),
      run(["--colour"]),
      run(["--port", "http"]),
      run(["--port", new URL(http).port]),
      run(["--budget", "plenty"], { GRAFANA_URL: "http://a" }),
      run([], { GRAFANA_URL: "a:b" }),
      run([], { GRAFANA_URL: "http://a", GRAFANA_TOKEN: "b,c" }),
      run(["--panel", "metrics"], { DATABASE_URL: server.urlFor("server", "wrong-pw") }),
    ]);
  const { type, maxDataPoints, targets } = JSON.parse(shown.stdout);
  deepStrictEqual([type, maxDataPoints, targets[0].channel], [
    "gauge",
    150,
    "stream/my_stream_id/live_metrics",
  ]);
  strictEqual(JSON.parse(split.stdout).targets[0].channel, "stream/pgpulse/devices/plain");
  match(help.stdout, /Usage: notify-relay.ts/);
  const failed = [none, flag, port, taken, budget, url, tokens, login];
  const said = [
    /^Cannot print a panel of "nonesuch": there is no such stream, only .*"metrics"/,
    /--colour/,
    /^Cannot listen on port "http"/,
    /^Cannot listen on "127.0.0.1:\d+": the port is taken; choose one with --port/,
    /^Cannot read the size "plenty"/,
    /^Cannot read GRAFANA_URL: "a:b"/,
    /^Cannot match 2 tokens/,
    /the password of "server" is wrong/,
  ];
  failed.forEach(({ code, stdout, stderr }, i) => {
    deepStrictEqual([code, stdout], [1, ""], stderr);
    match(stderr, said[i]);
    doesNotMatch(stderr, /\n\s+at |wrong-pw/, "No stack trace, no secret");
  });
});

against("copied alone into an empty folder it passes its type check and helps", async () => {
  const alone = await Deno.makeTempDir({ dir });
  await Deno.copyFile(join(ROOT, "scripts/notify-relay.ts"), join(alone, "relay.ts"));
  for (const args of [["check", "relay.ts"], ["run", "--no-prompt", "relay.ts", "--help"]]) {
    const { code, stderr } = await new Deno.Command(Deno.execPath(), { args, cwd: alone }).output();
    strictEqual(code, 0, new TextDecoder().decode(stderr));
  }
});

together("pictures of tables, and what other programs get", pictures);

// --- faults, each with a database and a relay of its own ------------------------------------------

/** A migrated database with a stream that can be written to. */
async function database(name: string) {
  const { server } = await world();
  const admin = postgres(server.urlFor("user", "secret", "postgres"), { max: 1 });
  await admin.unsafe(`create database ${name} template spare strategy file_copy`);
  await admin.end();
  const sql = postgres(server.urlFor("user", "secret", name), { max: 2, onnotice: () => {} });
  await stream(sql, name);
  let i = 0;
  return {
    sql,
    url: server.urlFor("server", "server", name),
    channel: `stream/pgpulse/${name}`,
    insert: async () => void await sql`insert into ${sql(name)} (value) values (${i++})`,
    truth: () => truth(sql, name),
    [Symbol.asyncDispose]: () => sql.end({ timeout: 1 }),
  };
}

/** The relay's complaints about one Grafana. */
const about = (relay: Background, { url }: GrafanaStandIn) =>
  relay.log.filter((line) => line.startsWith("Cannot push") && line.includes(url));

const health = async (relay: Background) =>
  await (await fetch(`${await address(relay)}healthz`)).json();

const leads = (relay: Background) =>
  until("it leads", async () => (await health(relay)).leading, 20_000);

async function severalGrafanas() {
  const names = ["fine", "away", "slow", "hang", "401", "403", "429", "500", "302"] as const;
  type Name = (typeof names)[number];
  const each = <T>(value: (name: Name) => T) =>
    Object.fromEntries(names.map((name) => [name, value(name)])) as Record<Name, T>;
  const all = each(() => new GrafanaStandIn());
  const grafanas = Object.values(all);
  for (const grafana of grafanas) if (grafana !== all.away) grafana.start();
  all.slow.mood = "slow";
  all.hang.mood = "hang";
  all[401].tokens.clear();
  all[403].tokens.set("glsa_static", "Viewer");
  all[429].mood = { status: 429, headers: { "retry-after": "2" } };
  all[500].mood = { status: 500 };
  all[302].mood = { status: 302, headers: { location: "http://127.0.0.1:1/" } };
  await using own = await database("many");
  await using relay = await startRelay(own.url, grafanas);
  const pictures = each((name) => all[name].subscribe(own.channel));
  await leads(relay);
  for (let i = 0; i < 20; i++) {
    await own.insert();
    if (i === 10) await shows(pictures.fine, own.truth, 3_000);
    await pause(100);
  }
  await shows(pictures.slow, own.truth);
  const said: [Name, RegExp][] = [
    ["away", /it cannot be reached \(tcp connect error: Connection refused.*is it running\?$/],
    ["401", /status 401: it refuses the token; set GRAFANA_TOKEN/],
    ["403", /status 403: the token may not push; its service account needs the role Editor/],
    ["429", /status 429: it asks for fewer messages/],
    ["500", /status 500/],
    ["302", /status 302: it redirects; set GRAFANA_URL to its root_url/],
  ];
  await until("it is away for long", () => about(relay, all.away).length, 25_000);
  for (const [name, pattern] of said) {
    const lines = about(relay, all[name]);
    strictEqual(lines.length, 1, lines.join("\n"));
    match(lines[0], pattern);
    ok(all[name].pushes.length < 25, `${all[name].pushes.length} pushes to ${name} are no storm`);
  }
  all[429].pushes.forEach(({ at }, i, { [i - 1]: last }) => {
    ok(!last || at - last.at >= 1_990, `Retry-After is honoured: ${at - last?.at} ms`);
  });
  for (const name of ["fine", "slow"] as const) deepStrictEqual(about(relay, all[name]), []);
  // All is well again.
  all.away.start();
  all[401].tokens.set("glsa_static", "Editor");
  all[403].tokens.set("glsa_static", "Editor");
  for (const grafana of grafanas) grafana.mood = undefined;
  for (const name of names) await shows(pictures[name], own.truth, 20_000);
  for (const [name] of said) {
    const again = `Grafana at "${all[name].url}" takes frames again`;
    await until(again, () => relay.log.includes(again));
    strictEqual(relay.log.filter((line) => line === again).length, 1);
    strictEqual(about(relay, all[name]).length, 1);
  }
  strictEqual(await relay.end("SIGTERM"), 0);
  await Promise.all(grafanas.map((grafana) => grafana.stop()));
}

async function refusedChannel() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("accused");
  await stream(own.sql, "innocent");
  await using relay = await startRelay(own.url, [grafana]);
  const accused = grafana.subscribe(own.channel);
  const innocent = grafana.subscribe("stream/pgpulse/innocent");
  const innocence = () => truth(own.sql, "innocent");
  await own.insert();
  await shows(accused, own.truth, 20_000);
  for (const status of [500, 413]) {
    let tries = 0;
    grafana.refuse = (channel) => channel === "accused" && tries++ >= 0 ? status : undefined;
    for (let i = 0; i < 12; i++) {
      await own.insert();
      await own.sql`insert into innocent (value) values (${i})`;
      await pause(100);
    }
    await shows(innocent, innocence);
    const refused = `Grafana at "${grafana.url}" refuses channel "accused" (status ${status})`;
    strictEqual(relay.log.filter((line) => line.startsWith(refused)).length, 1);
    ok(tries <= 4, `${tries} tries are no storm`);
    grafana.refuse = undefined;
    await until(
      "it is taken again",
      () => relay.count(/takes channel "accused" again/) === (status === 500 ? 1 : 2),
      15_000,
    );
    if (status === 500) await shows(accused, own.truth, 20_000);
  }
  // Every other time only, as the message was too large.
  const all = new Map((await own.truth()).value);
  const shown = accused.points().value;
  ok(shown.length < all.size && shown.every(([ms, value]) => all.get(ms) === value));
  deepStrictEqual(about(relay, grafana), []);
}

async function restartedGrafana() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("refilled");
  await using relay = await startRelay(own.url, [grafana]);
  await own.insert();
  const filled = () => grafana.channels.length === 3;
  await until("it is filled", filled);
  // Between two pushes: nobody noticed, nothing changes.
  await grafana.stop();
  grafana.start();
  deepStrictEqual(grafana.channels, []);
  await until("it is filled again", filled, 15_000);
  await shows(grafana.subscribe(own.channel), own.truth);
  deepStrictEqual(about(relay, grafana), []);
  // While the relay pushes: all channels come back with the first success.
  await grafana.stop();
  await own.insert();
  const metrics = `${await address(relay)}metrics`;
  await until(
    "it is missed",
    async () => /^pgpulse_relay_grafana_up\{.*\} 0$/m.test(await (await fetch(metrics)).text()),
  );
  grafana.start();
  await until("something comes", () => grafana.channels.length, 8_000);
  await until("all is there", filled, 3_000);
  await shows(grafana.subscribe(own.channel), own.truth);
  deepStrictEqual(about(relay, grafana), [], "a restart is no trouble");
}

async function ownToken() {
  await using grafana = new GrafanaStandIn().start();
  const env = {
    GRAFANA_TOKEN: "",
    GRAFANA_ADMIN_USER: "nobody",
    GF_SECURITY_ADMIN_USER: "admin",
    GF_SECURITY_ADMIN_PASSWORD: grafana.password,
  };
  await using own = await database("signed");
  await using relay = await startRelay(own.url, [grafana], env);
  const picture = grafana.subscribe(own.channel);
  await own.insert();
  await shows(picture, own.truth);
  strictEqual(grafana.tokenNames.length, 1);
  const { right } = grafana.passwords;
  const [key] = [...grafana.tokens.keys()].filter((key) => key !== "glsa_static");
  await own.insert();
  await shows(picture, own.truth);
  strictEqual(grafana.passwords.right, right, "Signs in once");
  grafana.tokens.delete(key);
  await own.insert();
  await shows(picture, own.truth);
  strictEqual(grafana.tokenNames.length, 1, "The old token is replaced");
  strictEqual(relay.count(/^Cannot push to Grafana .* a new one is made$/), 1);
  await relay.said(/takes frames again/);
  strictEqual(relay.count(/takes frames again/), 1);
  strictEqual(relay.count(/^Made a token of service account "pgpulse-relay"/), 2);
  doesNotMatch(relay.log.join("\n"), /glsa_|sesame/);
  // The next start finds it.
  const file = join(await Deno.readLink(`/proc/${relay.pid}/cwd`), ".pgpulse/relay-tokens.json");
  strictEqual((await Deno.stat(file)).mode! & 0o777, 0o600);
  strictEqual(await relay.end(), 0);
  const made = grafana.passwords.right;
  await using next = await startRelay(own.url, [grafana], env, "--state", file);
  await own.insert();
  await shows(picture, own.truth);
  strictEqual(grafana.passwords.right, made);
  strictEqual(next.count(/token/), 0);
  // Where it may not write it works all the same, and says what that means.
  await using other = await startRelay(own.url, [grafana], env, "--state", "/proc/nowhere/t.json");
  await next.end();
  await own.insert();
  await shows(picture, own.truth);
  await other.said(/^Cannot keep the token in "\/proc\/nowhere\/t.json", so each start makes one/);
  deepStrictEqual(about(other, grafana), []);
}

async function wrongPassword() {
  await using grafana = new GrafanaStandIn().start();
  await using other = new GrafanaStandIn().start();
  await using own = await database("unsigned");
  await using relay = await startRelay(own.url, [grafana], {
    GRAFANA_TOKEN: "",
    GF_SECURITY_ADMIN_PASSWORD: "wrong",
  });
  await using none = await startRelay(own.url, [other], { GRAFANA_TOKEN: "" });
  await relay.said(/^Cannot push/, 20_000);
  await none.said(/^Cannot push/, 20_000);
  for (let i = 0; i < 20; i++) {
    await own.insert();
    await pause(100);
  }
  deepStrictEqual(grafana.passwords, { right: 0, wrong: 1 });
  deepStrictEqual(other.passwords, { right: 0, wrong: 0 });
  strictEqual(grafana.pushes.length + other.pushes.length, 0);
  strictEqual(about(relay, grafana).length, 1);
  match(about(relay, grafana)[0], /refuses the password of "admin", which is not tried again/);
  doesNotMatch(relay.log.join("\n"), /wrong/);
  match(
    about(none, other).join(),
    /there is no token; set GRAFANA_TOKEN, or GF_SECURITY_ADMIN_USER/,
  );
}

async function budget() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("costly");
  await using relay = await startRelay(own.url, [grafana], {}, "--budget", "30kB");
  const picture = grafana.subscribe(own.channel);
  await leads(relay);
  const begun = Date.now();
  for (let i = 0; i < 40; i++) {
    await own.insert();
    await pause(100);
  }
  const bytes = grafana.pushes.reduce((sum, push) => sum + push.bytes, 0);
  const seconds = (Date.now() - begun) / 1000;
  // What comes on top: one second saved up, and the last message.
  ok(bytes < 30_000 * (seconds + 3) + 60_000, `${bytes} bytes in ${seconds} s`);
  await shows(picture, own.truth, 30_000);
  strictEqual(relay.count(/want more than 30 kB a second .* their beats slow down/), 1);
}

async function twoRelays() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("led");
  await using first = await startRelay(own.url, [grafana]);
  await leads(first);
  await using second = await startRelay(own.url, [grafana]);
  await second.said(/^Another relay leads, or did a moment ago: this one stands by$/);
  const picture = grafana.subscribe(own.channel);
  const frames = async (of: Background) => {
    const text = await (await fetch(`${await address(of)}metrics`)).text();
    return Number(text.match(/^pgpulse_relay_frames_total\{.*\} (\d+)$/m)![1]);
  };
  for (let i = 0; i < 10; i++) {
    await own.insert();
    await pause(150);
  }
  await shows(picture, own.truth);
  strictEqual(await frames(second), 0);
  ok(await frames(first) > 0);
  await first.end("SIGKILL");
  await own.insert();
  await second.said(/^This relay leads now$/, 8_000);
  await shows(picture, own.truth);
  // One that ends in order gives the lead back.
  await using third = await startRelay(own.url, [grafana]);
  await third.said(/^Another relay leads/);
  strictEqual(await second.end("SIGTERM"), 0);
  await third.said(/^This relay leads now$/, 8_000);
  await own.insert();
  await shows(picture, own.truth);
  strictEqual(third.count(/leads/), 2);
}

async function signals() {
  await using grafana = new GrafanaStandIn().start();
  grafana.mood = "hang";
  await using own = await database("ended");
  // Accepts and never answers.
  using mute = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const nowhere = `postgres://server:server@127.0.0.1:${(mute.addr as Deno.NetAddr).port}/testdb`;
  await using one = await startRelay(own.url, [grafana]);
  await using two = await startRelay(nowhere, [grafana]);
  await leads(one);
  await two.said(/^Cannot use "127.0.0.1:\d+": no answer/, 20_000);
  const begun = Date.now();
  deepStrictEqual(await Promise.all([one.end("SIGTERM"), two.end("SIGINT")]), [0, 0]);
  ok(Date.now() - begun < 5_000, `${Date.now() - begun} ms`);
}

async function killedDatabase() {
  await using own = await open(15);
  const { server, grafana, relay } = own;
  await stream(server.sql, "outage");
  const picture = grafana.subscribe("stream/pgpulse/outage");
  await server.sql`insert into outage (value) values (1)`;
  await shows(picture, () => truth(server.sql, "outage"));
  for (const round of [1, 2]) {
    await server.kill();
    await until("it is missed", () => relay.count(/^Cannot use ".*"/) >= round);
    await pause(2_500);
    await server.start();
    const sql = postgres(server.url, { max: 1, onnotice: () => {} });
    await sql`insert into outage (value) values (${round * 10})`;
    await shows(picture, () => truth(sql, "outage"), 15_000);
    await until("it hears again", async () => (await health(relay)).listening, 15_000);
    await sql`insert into outage (value) values (${round * 10 + 1})`;
    await shows(picture, () => truth(sql, "outage"), 5_000);
    await until("its end is said", () => relay.count(/^The database answers again$/) === round);
    await sql.end();
  }
  const lines = relay.log.slice(1);
  ok(lines.length <= 6, `Each outage in at most two forms, and its end: ${lines.join("\n")}`);
}

async function lateDatabase() {
  await using grafana = new GrafanaStandIn().start();
  await using server = await migrated({ settings: SETTINGS });
  await server.sql`insert into metrics (value) values (1)`;
  await server.kill();
  await using relay = await startRelay(server.urlFor("server", "server"), [grafana]);
  await relay.said(/^Cannot use "127.0.0.1:\d+": nothing listens there; start it/);
  await pause(2_000);
  strictEqual(relay.log.length, 2, relay.log.join("\n"));
  await server.start();
  await relay.said(/^The database answers again$/, 15_000);
  await until("it pushes", () => grafana.channels.includes("stream/pgpulse/metrics"), 15_000);
}

/** Passes connections on to a port; those that stand can be frozen, as by a firewall. */
function proxy(to: number): AsyncDisposable & { port: number; freeze(): void } {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  let open: { frozen: boolean; ends: Deno.Conn[] }[] = [];
  const pass = async (link: (typeof open)[0], from: number) => {
    const chunk = new Uint8Array(65536);
    for (let n; (n = await link.ends[from].read(chunk)) && !link.frozen;) {
      await link.ends[1 - from].write(chunk.slice(0, n));
    }
    if (!link.frozen) link.ends[1 - from].close();
  };
  (async () => {
    for await (const conn of listener) {
      const link = { frozen: false, ends: [conn, await Deno.connect({ port: to })] };
      open.push(link);
      for (const from of [0, 1]) pass(link, from).catch(() => {});
    }
  })();
  return {
    port: (listener.addr as Deno.NetAddr).port,
    freeze() {
      for (const link of open) link.frozen = true;
    },
    async [Symbol.asyncDispose]() {
      listener.close();
      for (const { ends } of open) {
        for (const end of ends) await Promise.try(() => end.close()).catch(() => {});
      }
      open = [];
    },
  };
}

async function halfOpen() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("frozen");
  await using through = proxy((await world()).server.port);
  const url = `postgres://server:server@127.0.0.1:${through.port}/frozen`;
  await using relay = await startRelay(url, [grafana]);
  const picture = grafana.subscribe(own.channel);
  await leads(relay);
  await own.insert();
  await shows(picture, own.truth);
  for (const round of [1, 2]) {
    await until("it hears", async () => (await health(relay)).listening, 20_000);
    await pause(1_000);
    through.freeze();
    await own.insert();
    await shows(picture, own.truth, 20_000);
    await until("it is over", () => relay.count(/^The database answers again$/) === round);
  }
  strictEqual(relay.count(/^Cannot use .* no answer/), 2, relay.log.join("\n"));
  strictEqual(relay.log.length, 5, relay.log.join("\n"));
}

async function cutListener() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("cut");
  const { sql } = own;
  await using relay = await startRelay(own.url, [grafana]);
  const picture = grafana.subscribe(own.channel);
  const mine = sql`application_name = 'pgpulse relay' and datname = current_database()`;
  const listens = () =>
    until("it listens", async () => {
      const found = await sql`select from pg_stat_activity where ${mine} and query ilike 'listen%'`;
      return found.length && (await health(relay)).listening;
    }, 15_000);
  for (let i = 0; i < 5; i++) {
    await listens();
    await sql`select pg_terminate_backend(pid) from pg_stat_activity
      where ${mine} and query ilike 'listen%'`;
    await own.insert();
    await shows(picture, own.truth);
  }
  strictEqual(relay.log.length, 1, relay.log.join("\n"));
  await sql`select pg_terminate_backend(pid) from pg_stat_activity where ${mine}`;
  await own.insert();
  await shows(picture, own.truth);
  await listens();
  const [{ count }] = await sql`select count(*)::int as count from pg_stat_activity where ${mine}`;
  ok(count <= 6, `${count} connections`);
}

async function deaf() {
  await using grafana = new GrafanaStandIn().start();
  const { server } = await world();
  await using own = await database("deaf");
  // Of another database no hint comes, as little as through a pooler.
  await using relay = await startRelay(own.url, [grafana], {
    LISTEN_DATABASE_URL: server.urlFor("server", "server", "postgres"),
  });
  const picture = grafana.subscribe(own.channel);
  await own.insert();
  await shows(picture, own.truth);
  await relay.said(/^LISTEN does not work here/, 25_000);
  for (let i = 0; i < 3; i++) {
    await own.insert();
    await shows(picture, own.truth, 5_000);
  }
  const { listening, leading } = await health(relay);
  deepStrictEqual([listening, leading], [false, true]);
  // A stream that comes without a hint is found too, if later.
  await pause(5_500);
  strictEqual(relay.log.length, 2, relay.log.join("\n"));
}

async function readOnly() {
  await using grafana = new GrafanaStandIn().start();
  const { server } = await world();
  await using own = await database("replica");
  await own.sql`create role reader login password 'pw' in role server`;
  await own.sql`alter role reader set default_transaction_read_only = on`;
  await using relay = await startRelay(server.urlFor("reader", "pw", "replica"), [grafana]);
  const picture = grafana.subscribe(own.channel);
  await relay.said(/^The database is read-only/);
  for (let i = 0; i < 3; i++) {
    await own.insert();
    await shows(picture, own.truth, 5_000);
  }
  strictEqual(relay.count(/read-only/), 1);
}

async function unprepared() {
  const { server } = await world();
  await using relay = await startRelay(server.urlFor("user", "secret", "postgres"), []);
  await relay.said(/^Cannot use "127.0.0.1:\d+": .*deno task migrate/);
  await using other = await startRelay(server.urlFor("server", "bad-pw"), []);
  await other.said(/^Cannot use "127.0.0.1:\d+": the password of "server" is wrong/);
  await pause(3_000);
  ok(relay.log.length <= 3, relay.log.join("\n"));
  strictEqual(other.log.length, 2, other.log.join("\n"));
  doesNotMatch(other.log.join("\n"), /bad-pw/);
}

async function slowViews() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("brisk");
  const { sql } = own;
  for (let i = 0; i < 4; i++) {
    await sql.unsafe(`create view live.slow_${i} as
      select now() as at, 1.0 as value from (select pg_sleep(1.5)) as nap`);
    await sql`select pgpulse.add_stream(${`slow_${i}`}, beat => '1 s')`;
  }
  await using relay = await startRelay(own.url, [grafana]);
  const picture = grafana.subscribe(own.channel);
  await leads(relay);
  let lost = 0;
  for (let i = 0; i < 20; i++) {
    await own.insert();
    if (!(await health(relay)).leading) lost++;
    await pause(250);
  }
  await shows(picture, own.truth);
  strictEqual(lost, 0, "The lead is kept");
  for (let i = 0; i < 4; i++) {
    await relay.said(new RegExp(`^Stream "slow_${i}" takes seconds to read`), 30_000);
  }
  await own.insert();
  await shows(picture, own.truth, 5_000);
  strictEqual(relay.log.length, 5, relay.log.join("\n"));
}

/** Begins PgBouncer in transaction mode before a server; gives its port. */
async function bouncer(server: TestServer): Promise<AsyncDisposable & { port: number }> {
  const port = quietPort();
  const folder = await Deno.makeTempDir({ prefix: "pgpulse-bouncer-" });
  await Deno.chmod(folder, 0o755);
  await Deno.writeTextFile(`${folder}/users`, `"server" "server"\n`);
  await Deno.writeTextFile(
    `${folder}/ini`,
    `[databases]
* = host=127.0.0.1 port=${server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = ${port}
unix_socket_dir =
auth_type = plain
auth_file = ${folder}/users
pool_mode = transaction
`,
  );
  const child = new Deno.Command("pgbouncer", {
    args: [`${folder}/ini`],
    ...(Deno.uid() === 0 ? { uid: 65534, gid: 65534 } : {}),
    stdout: "null",
    stderr: "null",
  }).spawn();
  return {
    port,
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.status;
      await Deno.remove(folder, { recursive: true });
    },
  };
}

async function pooled() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("pooled");
  await using pool = await bouncer((await world()).server);
  const url = `postgres://server:server@127.0.0.1:${pool.port}/pooled?pgbouncer=true`;
  await using relay = await startRelay(url, [grafana]);
  const picture = grafana.subscribe(own.channel);
  await own.insert();
  await shows(picture, own.truth);
  await relay.said(/^LISTEN does not work here/, 25_000);
  await own.insert();
  await shows(picture, own.truth, 5_000);
  strictEqual(relay.log.length, 2, relay.log.join("\n"));
}

async function readers() {
  await using own = await database("crowd");
  await own
    .sql`insert into crowd select now() - i * interval '1 s', i from generate_series(1, 300) as i`;
  await using relay = await startRelay(own.url, []);
  const url = `${await address(relay)}streams/crowd`;
  await until("it is there", async () => {
    const answer = await fetch(url, { headers: { accept: "text/event-stream" } });
    await answer.body?.cancel();
    return answer.ok && (await health(relay)).listening;
  });
  const files = () => [...Deno.readDirSync(`/proc/${relay.pid}/fd`)].length;
  await pause(500);
  const before = files();
  // Accepts the answer and never reads it.
  const slow = await Deno.connect({ hostname: "127.0.0.1", port: Number(new URL(url).port) });
  await slow.write(new TextEncoder().encode(`GET /streams/crowd HTTP/1.1\r\nhost: x\r\n\r\n`));
  for (let i = 0; i < 20; i++) {
    await using reader = listen(url);
    strictEqual((await reader.next()).event, "window");
    // Each is a window of 300 rows to whoever listens.
    await own.sql`update crowd set value = ${-i} where at = (select max(at) from crowd)`;
  }
  {
    await using quick = listen(url);
    strictEqual((await quick.next()).rows.length, 300);
  }
  slow.close();
  await until("all are gone", () => files() <= before + 2, 15_000);
  strictEqual(relay.log.length, 1, relay.log.join("\n"));
}

async function atRest() {
  await using grafana = new GrafanaStandIn().start();
  await using own = await database("resting");
  // Without a table to watch it is read on its beat, as nothing else tells of a change.
  await own.sql`create view live.constant as select timestamptz '2024-01-01' as at, 1.0 as value`;
  await own.sql`select pgpulse.add_stream('constant', beat => '500 ms')`;
  await using relay = await startRelay(own.url, [grafana]);
  await leads(relay);
  const count = async () => {
    const text = await (await fetch(`${await address(relay)}metrics`)).text();
    const of = (name: string, stream = ".*") =>
      Number(text.match(new RegExp(`^pgpulse_relay_${name}\\{.*${stream}.*\\} (\\d+)$`, "m"))![1]);
    return [of("reads_total", "resting"), of("reads_total", "constant"), of("frames_total")];
  };
  await until("all is quiet", async () => (await health(relay)).listening);
  await pause(2_000);
  const before = await count();
  await pause(4_000);
  const [resting, constant, frames] = (await count()).map((n, i) => n - before[i]);
  ok(resting >= 1 && resting <= 5, `${resting} reads of a watched table in 4 s`);
  ok(constant >= 2 && constant <= 9, `${constant} reads on a beat of 500 ms in 4 s`);
  ok(frames <= 4, `${frames} windows pushed again in 4 s`);
}

const hasBouncer = await installed("pgbouncer");

together("faults of Grafana, of the database, of the relay itself", [
  ["one channel that Grafana refuses does not hold up the others", refusedChannel],
  ["a restarted Grafana is filled again, at once where the relay noticed", restartedGrafana],
  ["several Grafanas: a fault is said once and leaves the others alone", severalGrafanas],
  ["a killed database that comes back loses nothing, and is said once", killedDatabase],
  ["where LISTEN does not work it reads on the beat, and says so once", deaf],
  [
    `through PgBouncer in transaction mode it works${hasBouncer ? "" : " (skipped: none on PATH)"}`,
    pooled,
    !hasBouncer,
  ],
  ["connections that died without a sign are given up", halfOpen],
  ["slow views hold up neither the lead nor the other streams", slowViews],
  ["of two relays one pushes; the other takes over when it is killed or ends", twoRelays],
  ["it waits for a database that is not there yet", lateDatabase],
  ["with a password it makes one token, keeps it, replaces it when it is revoked", ownToken],
  ["SIGTERM and SIGINT end it soon, also while Grafana or the database hang", signals],
  ["a listener that is cut off comes back, and leaves no connection behind", cutListener],
  ["above the budget beats slow down, which is said once", budget],
  ["a wrong password is tried exactly once, none at all is said", wrongPassword],
  ["a database that was not migrated, or a wrong password, is said once", unprepared],
  ["slow and vanished readers of events harm nobody and leave nothing behind", readers],
  ["on a read-only database it reads on the beat and says so once", readOnly],
  ["at rest it reads little and pushes only what Grafana might have forgotten", atRest],
]);

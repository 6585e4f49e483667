// Sinks held against a stand-in with InfluxDB's rules: whatever breaks, each row is there in the end.

import { deepStrictEqual, match, ok, strictEqual, throws } from "node:assert";
import { gunzipSync } from "node:zlib";
import postgres from "npm:postgres@3.4.9";
import { influx, refusedLines } from "./notify-relay.ts";
import { type Background, background, migrated, quietPort, until } from "./testing.ts";

// --- units ----------------------------------------------------------------------------------------

Deno.test("INFLUX_URL: a token means the newer API, none the old one", () => {
  const target = (env: Record<string, string>) => influx((name) => env[name]);
  strictEqual(target({}), undefined);
  deepStrictEqual(target({ INFLUX_URL: "http://a:8086/" }), {
    url: "http://a:8086",
    write: "http://a:8086/write?db=pgpulse",
    create: "http://a:8086/query?q=create+database+%22pgpulse%22",
    authorization: undefined,
  });
  const user = { INFLUX_USER: "u", INFLUX_PASSWORD: "p:ö" };
  const basic = `Basic ${new TextEncoder().encode("u:p:ö").toBase64()}`;
  strictEqual(target({ INFLUX_URL: "http://a:8086", ...user })?.authorization, basic);
  const inside = target({ INFLUX_URL: "http://u:p%3A%C3%B6@a/insert/0/influx" })!;
  deepStrictEqual([inside.url, inside.authorization], ["http://a/insert/0/influx", basic]);
  deepStrictEqual(
    target({ INFLUX_URL: "https://a", INFLUX_TOKEN: "t", INFLUX_ORG: "o x", INFLUX_BUCKET: "b" }),
    {
      url: "https://a",
      write: "https://a/api/v2/write?org=o+x&bucket=b",
      authorization: "Token t",
    },
  );
  for (
    const place of ["//u:secret@a", "://u:se/secret@a", "://u:p@secret/secret@a", "://u:%secret@a"]
  ) {
    throws(
      () => target({ INFLUX_URL: `http${place}` }),
      /^Error: Cannot read INFLUX_URL: (?!.*secret).*as %40 %2F/,
      place,
    );
  }
});

Deno.test("refusals: how many lines the server left out of those it took", () => {
  const counts: [string, number | undefined][] = [
    ['{"error":"unable to parse \'m x 1\': invalid field format"}', undefined],
    ["", undefined],
    ['{"error":"partial write: points beyond retention policy dropped=12"}', 12],
    ["{\"error\":\"partial write: unable to parse 'a': b\\nunable to parse 'c': d dropped=0\"}", 2],
    ['{"error":"partial write of line protocol occurred","data":[{"original_line":"a"}]}', 1],
    ["partial write", 1],
  ];
  for (const [answer, count] of counts) strictEqual(refusedLines(answer), count, answer);
});

// --- a stand-in for InfluxDB -----------------------------------------------------------------------

const KEY = String.raw`(?:[^,= \\\n]|\\.)+`;
const VALUE = String.raw`-?\d+i|-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|"(?:[^"\\]|\\.)*"|true|false`;
const FIELD = `${KEY}=(?:${VALUE})`;
const LINE = new RegExp(
  String.raw`^((?:[^, \\\n]|\\.)+)((?:,${KEY}=${KEY})*) (${FIELD}(?:,${FIELD})*) (-?\d{1,19})$`,
);
const FIELDS = new RegExp(`(${KEY})=(${VALUE})`, "g");
const TAGS = new RegExp(`,(${KEY})=(${KEY})`, "g");
const plain = (text: string) => text.replace(/\\([,= ])/g, "$1");

/** A point: its series as `measurement,tag=value`, and its fields by name. */
interface Point {
  series: string;
  ns: bigint;
  fields: Record<string, number | bigint | string | boolean>;
}

function parse(line: string): Point {
  const found = LINE.exec(line);
  if (!found) throw new Error(`unable to parse '${line}': invalid line`);
  const [, name, tags, fields, ns] = found;
  const pairs = [...fields.matchAll(FIELDS)].map(
    ([, key, text]) => {
      const value = text.endsWith("i") && !text.startsWith('"')
        ? BigInt(text.slice(0, -1))
        : text.startsWith('"')
        ? text.slice(1, -1).replace(/\\(["\\])/g, "$1")
        : /^[tf]/.test(text)
        ? text === "true"
        : Number(text);
      if (typeof value === "number" && !Number.isFinite(value)) {
        throw new Error(`unable to parse '${line}'`);
      }
      return [plain(key), value];
    },
  );
  const labels = [...tags.matchAll(TAGS)]
    .map(([, key, value]) => `,${plain(key)}=${plain(value)}`).sort();
  return {
    series: plain(name) + labels.join(""),
    ns: BigInt(ns),
    fields: Object.fromEntries(pairs),
  };
}

/** InfluxDB as the relay sees it, version 1 or 2, with switches for its faults. */
class InfluxStandIn implements AsyncDisposable {
  readonly port = quietPort();
  readonly url = `http://127.0.0.1:${this.port}`;
  /** Answers this instead of working. */
  mood?: { status: number; headers?: Record<string, string>; text?: string };
  /** Takes so many batches, and then the answer is lost. */
  loseAnswers = 0;
  /** Milliseconds before each answer. */
  delay = 0;
  /** Bytes, unpacked. */
  limit = 10_000_000;
  /** As version 2: one bad line spoils its batch. */
  strict = false;
  /** Does not say which line it refuses. */
  vague = false;
  /** A series that is refused. */
  refuse?: (point: Point) => boolean;
  databases = new Set<string>();
  token = "sesame";
  points = new Map<string, Point>();
  requests: { status: number; lines: number }[] = [];
  /** Lines that were taken, repeats among them. */
  taken = 0;
  #server?: Deno.HttpServer;

  start(): this {
    this.#server = Deno.serve(
      { port: this.port, hostname: "127.0.0.1", onListen: () => {} },
      async (request) => {
        const body = new Uint8Array(await request.arrayBuffer());
        const response = this.#answer(request, body);
        const text = new TextDecoder().decode(
          request.headers.has("content-encoding") ? gunzipSync(body) : body,
        );
        this.requests.push({ status: response.status, lines: text.split("\n").length });
        if (this.delay) await new Promise((done) => setTimeout(done, this.delay));
        if (response.ok && this.loseAnswers > 0) {
          this.loseAnswers--;
          return new Response("the answer is lost", { status: 502 });
        }
        return response;
      },
    );
    return this;
  }

  async stop(): Promise<void> {
    const { finished } = this.#server!;
    this.#server!.shutdown();
    await finished;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop();
  }

  #answer(request: Request, body: Uint8Array): Response {
    const { pathname, searchParams } = new URL(request.url);
    const say = (status: number, error: string) => Response.json({ error }, { status });
    if (this.mood) return new Response(this.mood.text ?? "", this.mood);
    if (pathname === "/query") {
      this.databases.add(/^create database "(\w+)"$/.exec(searchParams.get("q")!)![1]);
      return Response.json({ results: [{}] });
    }
    if (pathname === "/api/v2/write") {
      if (request.headers.get("authorization") !== `Token ${this.token}`) {
        return say(401, "unauthorized access");
      }
    } else if (!this.databases.has(searchParams.get("db")!)) {
      return say(404, `database not found: "${searchParams.get("db")}"`);
    }
    const text = new TextDecoder().decode(gunzipSync(body));
    if (text.length > this.limit) return say(413, "Request Entity Too Large");
    const errors: string[] = [];
    const points: Point[] = [];
    for (const line of text.split("\n").filter(Boolean)) {
      try {
        const point = parse(line);
        if (this.refuse?.(point)) throw new Error(`unable to parse '${line}': refused`);
        points.push(point);
      } catch (error) {
        errors.push((error as Error).message);
      }
    }
    if (!errors.length || !this.strict && points.length) {
      for (const point of points) this.points.set(`${point.series} ${point.ns}`, point);
      this.taken += points.length;
    }
    if (!errors.length) return new Response(null, { status: 204 });
    if (this.vague) return say(400, "invalid request");
    const partial = !this.strict && points.length;
    return say(400, partial ? `partial write: ${errors.join("\n")} dropped=0` : errors.join("\n"));
  }
}

// --- against PostgreSQL ------------------------------------------------------------------------------

/** A migrated server, and databases made of its untouched copy. */
async function worlds() {
  const server = await migrated({ settings: ["max_connections=100"] });
  await server.sql.end();
  const admin = postgres(server.urlFor("user", "secret", "postgres"), {
    max: 1,
    onnotice: () => {},
  });
  return {
    server,
    /** A database of its own, its relay's address, and an InfluxDB. */
    async world(name: string) {
      await admin.unsafe(`create database ${name} template testdb`);
      const sql = postgres(server.urlFor("user", "secret", name), { max: 8, onnotice: () => {} });
      const influx = new InfluxStandIn().start();
      const relays: Background[] = [];
      return {
        sql,
        influx,
        async relay(env: Record<string, string> = {}): Promise<Background> {
          const relay = await background("relay", ["--port", "0"], {
            DATABASE_URL: server.urlFor("server", "server", name),
            INFLUX_URL: influx.url,
            ...env,
          });
          relays.push(relay);
          return relay;
        },
        async [Symbol.asyncDispose]() {
          for (const relay of relays) await relay[Symbol.asyncDispose]();
          await influx.stop().catch(() => {});
          await sql.end({ timeout: 1 });
        },
      };
    },
    async [Symbol.asyncDispose]() {
      await admin.end({ timeout: 1 });
      await server[Symbol.asyncDispose]();
    },
  };
}

let shared: ReturnType<typeof worlds> | undefined;
const setup = () => shared ??= worlds();
const loose = { sanitizeOps: false, sanitizeResources: false, sanitizeExit: false };
const test = (name: string, fn: () => Promise<void>) => Deno.test({ name, fn, ...loose });

Deno.test.afterAll(async () => {
  await (await shared)?.[Symbol.asyncDispose]();
});

/** Days in partitions, all others in the default one; `n` tells each row. */
const SAMPLES = `
  create table samples (
      machine text not null,
      n bigint not null,
      at timestamptz not null default clock_timestamp(),
      value float8
  ) partition by range (at);
  create table samples_1 partition of samples for values from ('2026-01-01Z') to ('2026-01-02Z');
  create table samples_2 partition of samples for values from ('2026-01-02Z') to ('2026-01-03Z');
  create table samples_rest partition of samples default;
  create index on samples (at)`;
const SINK = `select pgpulse.add_sink('samples', 'at', '{machine,n}', '{value}')`;

/** Waits until exactly the rows of the table are there, each once. */
async function complete(sql: postgres.Sql, influx: InfluxStandIn, ms = 30_000): Promise<void> {
  const rows = await sql<{ key: string; value: number }[]>`
    select 'samples,machine=' || machine || ',n=' || n || ' '
      || (extract(epoch from at) * 1000000)::bigint || '000' as key, value
    from samples`;
  await until(`${rows.length} rows are there (${influx.points.size} are)`, () => {
    return influx.points.size >= rows.length;
  }, ms);
  strictEqual(influx.points.size, rows.length);
  for (const { key, value } of rows) strictEqual(influx.points.get(key)?.fields.value, value, key);
}

test("a line is what line protocol can say of a row, whatever is in it", async () => {
  await using own = await (await setup()).world("lines");
  const { sql, influx } = own;
  await sql`
    create table odd (
      at timestamptz, "tag one" text, site int, i int, b bigint, d numeric, r real, f float8, ok boolean,
      note text, doc jsonb
    )`;
  await sql`
    select pgpulse.add_sink('odd', 'at', array['site', 'tag one'], array['i', 'b', 'd', 'r', 'f', 'ok',
      'note', 'doc', 'doc->>''host'' as host', 'f * 2 as "Double"'])`;
  const note = 'say "hi", C:\\temp\\ =\n\ttwo\r';
  // As text, as the driver would cut it to milliseconds.
  const at = sql`'2026-01-01 00:00:00.123456Z'`;
  await sql`insert into odd values (${at}, 'x, y=z', 7, -1, 9007199254740993, 1.25, 1.1, 1e300, true,
    ${note}, '{"host": "a\\"b"}')`;
  // Left out: nulls, empty tags, and numbers that are none.
  await sql`insert into odd values (${at}, '', null, 1, null, 'NaN', 'Infinity', 'NaN', null, null, null)`;
  await sql`insert into odd values ('1969-12-31 23:59:59.999999Z', E'C:\\\\\n', 0, 0)`;
  // Skipped: without a field, or of a time that cannot be told.
  await sql`insert into odd (at, "tag one") values (${at}, 'nothing')`;
  await sql`insert into odd (at, i) values ('infinity', 1), ('0100-01-01Z', 1), ('2300-01-01Z', 1), (null, 1)`;
  const relay = await own.relay();
  await until("all have come", () => influx.points.size === 3);
  const ns = 1767225600123456000n;
  deepStrictEqual(Object.fromEntries(influx.points), {
    [`odd,site=7,tag one=x, y=z ${ns}`]: {
      series: "odd,site=7,tag one=x, y=z",
      ns,
      fields: {
        Double: 2e300,
        b: 9007199254740993n,
        d: 1.25,
        doc: '{"host": "a\\"b"}',
        f: 1e300,
        host: 'a"b',
        i: -1n,
        note: 'say "hi", C:\\temp\\ =\\n\ttwo\\r',
        ok: true,
        r: 1.1,
      },
    },
    [`odd ${ns}`]: { series: "odd", ns, fields: { i: 1n } },
    "odd,site=0,tag one=C:/  -1000": {
      series: "odd,site=0,tag one=C:/ ",
      ns: -1000n,
      fields: { i: 0n },
    },
  });
  const state = await until("it is acknowledged", async () => {
    return (await sql`select * from pgpulse.sinks where rows_sent > 0`)[0];
  });
  deepStrictEqual([state.rows_sent, state.rows_skipped, state.rows_refused], ["3", "5", "0"]);
  strictEqual(await relay.end(), 0);
});

test("every row arrives, whatever fails meanwhile", async () => {
  const { server, world } = await setup();
  await using own = await world("faults");
  const { sql, influx } = own;
  await sql.unsafe(SAMPLES).simple();
  // What was there before the sink, then more than a piece holds in one transaction.
  await sql`insert into samples select 'a', i, '2026-01-01Z'::timestamptz + i * interval '0.7 s', i
    from generate_series(1, 20000) i`;
  await sql.unsafe(SINK);
  const late = await sql.reserve();
  await late`begin`;
  await late`insert into samples select 'late', i, '2026-01-02 10:00Z'::timestamptz + i * interval '1 s', i
    from generate_series(1, 1000) i`;
  influx.delay = 50;
  let relay = await own.relay();
  await until("some are taken", () => influx.taken > 0);
  await sql`insert into samples select 'b', i, '2026-01-01 12:00Z'::timestamptz + i * interval '0.9 s', i
    from generate_series(1, 105000) i`;
  let n = 0;
  let writing = true;
  const writer = (async () => {
    while (writing) {
      n++;
      await sql`insert into samples (machine, n, value) select 'w', ${n * 100} + i, ${n}
        from generate_series(1, 20) i`.catch(() => {});
      await new Promise((done) => setTimeout(done, 10));
    }
  })();
  const passes = (count: number) => {
    const before = influx.requests.length;
    return until("it goes on", () => influx.requests.length >= before + count, 20_000);
  };
  // kill -9 in the midst of a batch.
  influx.delay = 150;
  await passes(3);
  await relay.end("SIGKILL");
  relay = await own.relay();
  await passes(3);
  influx.delay = 0;
  influx.loseAnswers = 2;
  await passes(4);
  for (
    const mood of [
      { status: 503 },
      { status: 429, headers: { "retry-after": "1" } },
      { status: 500 },
      // Of a proxy, of a lost organisation: no line is meant.
      { status: 400, text: "The plain HTTP request was sent to HTTPS port" },
      { status: 422 },
    ]
  ) {
    influx.mood = mood;
    await passes(2);
    influx.mood = undefined;
  }
  await passes(2);
  // Away, with the database killed meanwhile; two relays where there was one.
  await influx.stop();
  await relay.said(/^Cannot send rows to/);
  writing = false;
  await writer;
  await late`commit`;
  late.release();
  await server.kill();
  await server.start();
  influx.start();
  const second = await own.relay();
  await complete(sql, influx);
  // One of them sends; the other takes over from it.
  const both = [relay, second];
  const idle = await until("one stands by", () => both.find((r) => r.count(/stands by/)));
  await both.find((r) => r !== idle)!.end("SIGKILL");
  await sql`insert into samples values ('last', 1, default, 1)`;
  await complete(sql, influx);
  const [{ rows }] = await sql`select count(*)::int as rows from samples`;
  ok(influx.taken >= rows, `${influx.taken} taken of ${rows}`);
  doesNotRepeat(relay, second);
});

/** Each trouble is logged once, and again only after its end. */
function doesNotRepeat(...relays: Background[]): void {
  for (const { log } of relays) {
    for (const [i, line] of log.entries()) {
      const before = log.slice(0, i).lastIndexOf(line);
      if (before < 0 || / again$/.test(line)) continue;
      ok(log.slice(before, i).some((between) => / again$/.test(between)), `Told twice: ${line}`);
    }
  }
}

test("what is refused is refused alone, counted, and told once", async () => {
  await using own = await (await setup()).world("refused");
  const { sql, influx } = own;
  await sql.unsafe(SAMPLES).simple();
  await sql.unsafe(SINK);
  const insert = (machine: string, count: number) =>
    sql`insert into samples select ${machine}, i, '2026-01-01Z'::timestamptz + i * interval '1 s', i
      from generate_series(1, ${count}::int) i`;
  influx.refuse = ({ series }) => /n=(77|1234|4000)$/.test(series);
  influx.strict = true;
  influx.limit = 100_000;
  await insert("v2", 5000);
  const relay = await own.relay();
  const numbers = async () => {
    const [row] = await sql`select rows_sent::int, rows_refused::int, refusal from pgpulse.sinks`;
    return [row.rows_sent, row.rows_refused, row.refusal];
  };
  await until("version 2's batch is through", async () => (await numbers())[1] === 3);
  strictEqual(influx.points.size, 4997);
  ok(influx.requests.some(({ status }) => status === 413), "a batch was too large");
  strictEqual(relay.count(/refuses 1 of 1 rows .*unable to parse .* Line: samples,/), 3);
  influx.strict = false;
  await insert("v1", 5000);
  await until("version 1's is too", async () => (await numbers())[1] === 6);
  deepStrictEqual((await numbers()).slice(0, 2), [9994, 6]);
  match((await numbers())[2], /^Status 400: .*partial write: unable to parse/);
  strictEqual(influx.points.size, 9994);
  await insert("v3", 5000);
  await until("and further ones", async () => (await numbers())[1] === 9);
  strictEqual(relay.count(/refuses/), 5, "the rest is only counted");
  influx.strict = influx.vague = true;
  await insert("v4", 5000);
  await until("those not named are found", async () => (await numbers())[1] === 12);
  strictEqual(influx.points.size, 4 * 4997);
});

test("a server that takes no line at all refuses none: they wait", async () => {
  await using own = await (await setup()).world("blanket");
  const { sql, influx } = own;
  await sql.unsafe(SAMPLES).simple();
  await sql.unsafe(SINK);
  await sql`insert into samples select 'a', i, '2026-01-01Z'::timestamptz + i * interval '1 s', i
    from generate_series(1, 500) i`;
  for (const text of ["Please provide either orgID or org", "unable to parse '\x1f\x8b'"]) {
    influx.mood = { status: 400, text };
    const relay = await own.relay({ INFLUX_TOKEN: "sesame" });
    await relay.said(/^Cannot send rows to .*status 400: .*correct INFLUX_URL, INFLUX_BUCKET or/);
    const before = influx.requests.length;
    await until("it tries again", () => influx.requests.length > before);
    strictEqual(relay.count(/refuses/), 0);
    const [{ sent, refused }] = await sql`
      select rows_sent::int as sent, rows_refused::int as refused from pgpulse.sinks`;
    deepStrictEqual([sent, refused], [0, 0]);
    await relay.end();
  }
  influx.mood = undefined;
  await own.relay({ INFLUX_TOKEN: "sesame", INFLUX_ORG: "o" });
  await complete(sql, influx);
});

test("a wrong token is waited for, a missing database made; health tells what waits", async () => {
  await using own = await (await setup()).world("token");
  const { sql, influx } = own;
  await sql.unsafe(SAMPLES).simple();
  await sql.unsafe(SINK);
  await sql`insert into samples values ('a', 1, default, 1)`;
  influx.token = "another";
  const relay = await own.relay({ INFLUX_TOKEN: "sesame", INFLUX_ORG: "o" });
  await relay.said(/^Cannot send rows to .*status 401: .*correct INFLUX_TOKEN/);
  const [http] = /http:\S+\//.exec(await relay.said(/^Serves/))!;
  const health = async () => await (await fetch(`${http}healthz`)).json();
  const { status, sinks } = await health();
  deepStrictEqual([status, sinks.url, sinks.leading], ["degraded", influx.url, true]);
  deepStrictEqual([sinks.tables[0].sink, sinks.tables[0].waiting], ["samples", 1]);
  influx.token = "sesame";
  await complete(sql, influx);
  await until("it is well", async () => (await health()).status === "ok");
  await until("nothing waits", async () => (await health()).sinks.tables[0].waiting === 0);
  match(
    await (await fetch(`${http}metrics`)).text(),
    /^pgpulse_relay_sink_rows_total\{sink="samples"\} 1$/m,
  );
  doesNotMatchSecret(relay, "sesame");
  strictEqual(await relay.end(), 0);
  await sql`insert into samples values ('a', 2, default, 1)`;
  const older = await own.relay({ INFLUX_BUCKET: "plant" });
  await older.said(/^Made the database/);
  await complete(sql, influx);
  deepStrictEqual([...influx.databases], ["plant"]);
});

function doesNotMatchSecret(relay: Background, secret: string): void {
  ok(!relay.log.join("\n").includes(secret), "a secret is in the log");
}

test("a sink begins where it was told to, and anew where the database was restored", async () => {
  await using own = await (await setup()).world("since");
  const { sql, influx } = own;
  influx.databases.add("pgpulse");
  await sql.unsafe(SAMPLES).simple();
  await sql`insert into samples select 'old', i, '2026-01-01Z'::timestamptz + i * interval '1 h', i
    from generate_series(1, 47) i`;
  await sql`select pgpulse.add_sink('samples', 'at', '{machine,n}', '{value}', since => '2026-01-02Z')`;
  const relay = await own.relay();
  await until("those of the second day come", () => influx.points.size === 24);
  // New rows come whatever their time.
  await sql`insert into samples values ('new', 1, '2020-01-01Z', 1), ('new', 2, '3000-01-01Z', 2)`;
  await until("the one whose time can be told comes", () => influx.points.size === 25);
  influx.points.clear();
  await sql.begin(async (sql) => {
    await sql`update pgpulse.sinks set cluster = 1`;
    await sql`insert into samples values ('new', 3, '2019-01-01Z', 1)`;
  });
  await relay.said(/^Sink "samples" is sent from the beginning: the database was restored/);
  await until("all since then come again", () => influx.points.size === 24);
  // Columns that go are told, and others are not held up.
  await sql`select pgpulse.add_sink('metrics', 'timestamp', '{}', '{value}')`;
  await sql`alter table samples drop column value`;
  await sql`insert into samples values ('new', 4, '2026-01-02Z')`;
  await sql`insert into metrics (value) values (1)`;
  await relay.said(/^Cannot read sink "samples": column .*value.* does not exist/);
  await until(
    "the other goes on",
    () => [...influx.points.keys()].some((k) => k.startsWith("metrics ")),
  );
  await sql`select pgpulse.add_sink('samples', 'at', '{machine}', '{n}')`;
  await relay.said(/^Sink "samples" is sent again/);
  await until("it does", () => influx.points.has("samples,machine=new 1767312000000000000"));
});

test("packed rows are sent as others; what was not sent yet is not packed", async () => {
  await using own = await (await setup()).world("packed");
  const { sql, influx } = own;
  influx.databases.add("pgpulse");
  await sql`create table samples (machine text, n bigint, at timestamptz not null, value float8)`;
  await sql`insert into samples select 'm' || i % 3, i, now() - i * interval '1 h', i
    from generate_series(1, 500) i`;
  await sql.unsafe(SINK);
  await sql`select pgpulse.add_storage('samples', 'at', keys => '{machine}', period => '1 day',
    pack_after => '7 days')`;
  const upkeep = async () => {
    while ((await sql`select * from pgpulse.upkeep_storage()`).some(({ more }) => more));
    const [{ raw }] = await sql`
      select count(*)::int as raw from samples where tx > 0 and at < now() - interval '9 days'`;
    return raw;
  };
  strictEqual(await upkeep(), 0, "all of the old ones are packed");
  const relay = await own.relay();
  await complete(sql, influx);
  await relay.end();
  await sql`insert into samples values ('late', 1, now() - interval '12 days', 1)`;
  strictEqual(await upkeep(), 1, "it waits for the sink");
  await own.relay();
  await complete(sql, influx);
  await until("it is packed then", async () => await upkeep() === 0);
});

// --- against InfluxDB itself -------------------------------------------------------------------------

/** An InfluxDB 1 with an empty folder. */
async function realInflux(program: string) {
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-test-" });
  const url = `http://127.0.0.1:${quietPort()}`;
  const config = `reporting-disabled = true
    bind-address = "127.0.0.1:${quietPort()}"
    [meta]
    dir = "${dir}/meta"
    [data]
    dir = "${dir}/data"
    wal-dir = "${dir}/wal"
    [http]
    bind-address = "${url.slice("http://".length)}"
    log-enabled = false
    [logging]
    level = "error"`;
  await Deno.writeTextFile(`${dir}/influxd.conf`, config);
  const child = new Deno.Command(program, {
    args: ["-config", `${dir}/influxd.conf`],
    stdout: "null",
    stderr: "null",
  }).spawn();
  await until(
    "InfluxDB answers",
    () => fetch(`${url}/ping`).then(async (r) => (await r.text(), r.ok), () => false),
  );
  return {
    url,
    async query(q: string) {
      const answer = await fetch(`${url}/query`, {
        method: "POST",
        body: new URLSearchParams({ db: "pgpulse", q, epoch: "ns" }),
      });
      const { results: [{ series, error }] } = await answer.json();
      strictEqual(error, undefined);
      return series?.[0].values;
    },
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.status;
      await Deno.remove(dir, { recursive: true });
    },
  };
}

const influxd = (Deno.env.get("PATH") ?? "").split(":").map((dir) => `${dir}/influxd`)
  .find((path) => {
    try {
      return Deno.statSync(path).isFile;
    } catch {
      return false;
    }
  });

Deno.test({
  name: `a real InfluxDB takes rows, and refuses those that do not fit${
    influxd ? "" : ": there is no influxd on PATH"
  }`,
  ignore: !influxd,
  ...loose,
  async fn() {
    await using own = await (await setup()).world("real");
    await using influx = await realInflux(influxd!);
    const { sql } = own;
    await sql.unsafe(SAMPLES).simple();
    await sql.unsafe(SINK);
    await sql`insert into samples select ${'a "b", =\\'}, i, '2026-01-01Z'::timestamptz + i * interval '1 s', i / 8.0
      from generate_series(1, 100) i`;
    await sql`insert into samples select 'late', i, '2026-03-01Z'::timestamptz + i * interval '1 s', i
      from generate_series(1, 50) i`;
    // A text where the week of the former has numbers to come.
    await influx.query("create database pgpulse");
    await fetch(`${influx.url}/write?db=pgpulse`, {
      method: "POST",
      body: 'samples value="text" 1767225600000000000',
    }).then((r) => r.text());
    const relay = await own.relay({ INFLUX_URL: influx.url });
    const numbers = async () => {
      const [row] = await sql`select rows_sent::int, rows_refused::int, refusal from pgpulse.sinks`;
      return [row.rows_sent, row.rows_refused];
    };
    await until("all are taken or refused", async () => (await numbers()).join() === "50,100");
    await relay.said(/refuses 100 of 150 rows .*field type conflict/);
    await sql`insert into samples select ${'a "b", =\\'}, i, '2026-05-01Z'::timestamptz + i * interval '1 s', i / 8.0
      from generate_series(1, 10) i`;
    await until("further ones come", async () => (await numbers()).join() === "60,100");
    const rows = await influx.query(
      "select machine, n, value from samples where time >= '2026-02-01'",
    );
    strictEqual(rows.length, 60);
    deepStrictEqual(rows.at(-1).slice(1), ['a "b", =/', "10", 1.25]);
  },
});

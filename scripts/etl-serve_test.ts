// The HTTP side of etl.ts: over real connections, against a real database.

import { deepStrictEqual, doesNotMatch, match, ok, strictEqual } from "node:assert";
import { Buffer } from "node:buffer";
import fc from "npm:fast-check@4.10.2";
import { limiter, parseExactly, preferred, type Run, serve, type ServeOptions } from "./etl.ts";
import { background, migrated, quietPort, script, until } from "./testing.ts";

type Json = Record<string, unknown>;

/** `serve` on a port of its own; `await using` ends it. */
async function running(options: Partial<ServeOptions> = {}, sync?: Parameters<typeof serve>[1]) {
  const port = quietPort();
  const stop = new AbortController();
  const url = `http://127.0.0.1:${port}`;
  const done = serve({ port, ...options }, sync, stop.signal);
  await until("it serves", () => fetch(`${url}/healthz`).then((r) => r.text(), () => false));
  const ask = async (path: string, init: RequestInit = {}) => {
    const response = await fetch(url + path, init);
    const text = await response.text();
    const json = () => JSON.parse(text);
    return { status: response.status, headers: response.headers, text, json };
  };
  const post = (body: unknown, init: RequestInit = {}) =>
    ask("/api/reading", {
      method: "POST",
      body: typeof body === "string" ? body : JSON.stringify(body),
      ...init,
      headers: { "content-type": "application/json", ...init.headers as Record<string, string> },
    });
  /** Sends bytes as they are; gives what comes back until the other side closes. */
  const raw = async (text: string | Uint8Array, halfClose = false) => {
    const bytes = typeof text === "string" ? new TextEncoder().encode(text) : text;
    using socket = await Deno.connect({ hostname: "127.0.0.1", port });
    await socket.write(bytes);
    if (halfClose) await socket.closeWrite();
    return await new Response(socket.readable).text().catch((error) => `${error}`);
  };
  return {
    url,
    port,
    ask,
    post,
    raw,
    async [Symbol.asyncDispose]() {
      stop.abort();
      strictEqual(await done, 0);
    },
  };
}

/** What is logged meanwhile. */
async function logged(work: () => Promise<unknown>): Promise<string> {
  const { log, error } = console;
  const lines: string[] = [];
  console.log = console.error = (line: string) => void lines.push(line);
  try {
    await work();
  } finally {
    Object.assign(console, { log, error });
  }
  return lines.join("\n");
}

const RUN: Run = {
  id: 7,
  trigger: "http",
  started: "2026-11-22T12:00:00+00:00",
  ended: null,
  read: 3,
  taken: 2,
  replaced: 0,
  same: 0,
  failed: 1,
  error: null,
};

/** A sync that ends when it is told to. */
function fakeSync(trouble: string | null = null) {
  const runs: { finish: (more?: Partial<Run>) => void }[] = [];
  return {
    runs,
    once(_trigger: string, begun?: (run: Run) => void): Promise<Run> {
      begun?.(RUN);
      return new Promise((done) =>
        runs.push({ finish: (more) => done({ ...RUN, ended: RUN.started, ...more }) })
      );
    },
    status: () => ({
      worker: "test",
      continuous: false,
      running: runs.length > 0,
      mongo: "up" as const,
      trouble,
      run: RUN,
      sources: [{ source: "testdb.readings", backlog: 5, lag_seconds: 1.5 }],
    }),
  };
}

Deno.test("the API over HTTP", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  Deno.env.set("DATABASE_URL", server.urlFor("server", "server"));
  const { log, error } = console;
  console.log = console.error = () => {};
  await using restored = new AsyncDisposableStack();
  restored.defer(() => {
    Object.assign(console, { log, error });
    Deno.env.delete("DATABASE_URL");
  });
  await using api = await running({ cors: ["https://app.example.org"] });

  // 2,500 readings: many at once, then ever more seldom, over a year.
  const base = Date.now() - 3_600e3;
  await sql`
    select pgpulse.take_readings('testdb.readings', array_agg(lpad(i::text, 5, '0') order by i),
      string_agg(json_build_object(
        'time', to_char(to_timestamp(${
    base / 1e3
  }::float8 - t) at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'device', 'd' || i % 7, 'metric', 'm' || i % 2, 'value', i,
        'nested', json_build_object('n', i % 10, 's', (i % 10)::text))::text, e'\n' order by i))
    from generate_series(0, 2499) i,
      lateral (select case when i < 2400 then i / 3 else (i - 2399) * 3 * 86400 + 1000 end as t)`;
  const ids = (await sql<{ source_id: string }[]>`
    select source_id from reading_analytics order by time desc, source desc, source_id desc`)
    .map((row) => row.source_id);
  const walk = async (query: string): Promise<string[]> => {
    const seen: string[] = [];
    for (let next: string | null = null, pages = 0; pages < 100; pages++) {
      const { json } = await api.ask(`/api/reading?${query}${next ? `&cursor=${next}` : ""}`);
      const page = json();
      seen.push(...page.readings.map((one: Json) => one.id));
      next = page.next;
      if (!next) return seen;
    }
    throw new Error("There is no end");
  };

  await t.step(
    "welcomes: as plain text, and browsers with a page that begins with it",
    async () => {
      const plain = await api.ask("/");
      strictEqual(plain.text, "Welcome to the Observability Platform");
      match(plain.headers.get("content-type")!, /^text\/plain/);
      const page = await api.ask("/", {
        headers: { accept: "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8" },
      });
      match(page.headers.get("content-type")!, /^text\/html/);
      const body = page.text.slice(page.text.indexOf("<body>")).replace(/<style.*<\/style>/s, "");
      match(body.replace(/<[^>]+>/g, "").trim(), /^Welcome to the Observability Platform/);
      for (const path of ["api/reading", "openapi.json", "healthz", "metrics", "api/sync/runs"]) {
        ok(page.text.includes(`href="${path}"`), path);
        strictEqual((await api.ask(`/${path}`)).status, 200, path);
      }
    },
  );

  await t.step("pages reach every reading once, in order, however sparse they lie", async () => {
    deepStrictEqual(await walk("limit=500"), ids);
    deepStrictEqual(await walk("limit=33"), ids);
  });

  await t.step("a page tells each column, to the microsecond", async () => {
    const { json, headers } = await api.ask("/api/reading?limit=1");
    const [{ payload, ...row }] = json().readings;
    const [{ time, received, processed }] = await sql<{ [name: string]: string }[]>`
      select to_json(time at time zone 'UTC') #>> '{}' || '+00:00' as time,
        to_json(received at time zone 'UTC') #>> '{}' || '+00:00' as received,
        to_json(processed at time zone 'UTC') #>> '{}' || '+00:00' as processed
      from reading_analytics where source_id = ${ids[0]}`;
    deepStrictEqual(row, {
      time,
      source: "testdb.readings",
      id: ids[0],
      device: `d${Number(ids[0]) % 7}`,
      metric: `m${Number(ids[0]) % 2}`,
      value: Number(ids[0]),
      unit: null,
      received,
      processed,
    });
    strictEqual(payload.value, Number(ids[0]));
    match(headers.get("link")!, /^<\/api\/reading\?limit=1&cursor=[\w-]+>; rel="next"$/);
  });

  await t.step("filters: source, time, what the document contains", async () => {
    const having = (test: (n: number) => boolean) => ids.filter((id) => test(Number(id)));
    deepStrictEqual(await walk("limit=300&payload.device=d3"), having((n) => n % 7 === 3));
    deepStrictEqual(await walk("payload.device=d3&payload.metric=m1"), having((n) => n % 14 === 3));
    deepStrictEqual(await walk("source=testdb.readings&limit=1000"), ids);
    deepStrictEqual(await walk("source=other"), []);
    deepStrictEqual(await walk("payload.nested.n=4"), having((n) => n % 10 === 4));
    deepStrictEqual(await walk("payload.nested.s=4"), []);
    const text = encodeURIComponent('"4"');
    deepStrictEqual(await walk(`payload.nested.s=${text}`), having((n) => n % 10 === 4));
    const contained = encodeURIComponent('{"nested":{"n":3},"device":"d3"}');
    deepStrictEqual(await walk(`payload=${contained}`), having((n) => n % 70 === 3));
    deepStrictEqual(
      await walk(`payload=${contained}&payload.nested.s=%223%22&payload.metric=m1&from=2000-01-01`),
      having((n) => n % 70 === 3),
    );
    const time = (seconds: number) => new Date(base - seconds * 1000).toISOString();
    deepStrictEqual(await walk(`from=${time(2)}`), having((n) => n < 9));
    deepStrictEqual(
      await walk(`from=${time(9)}&to=${time(2)}`),
      having((n) => n >= 9 && n < 30),
    );
    // The plus sign of a zone, as people write it.
    const here = time(2).replace("Z", "+00:00");
    deepStrictEqual(await walk(`from=${here}`), having((n) => n < 9));
    deepStrictEqual(await walk("from=9999-12-31"), []);
    deepStrictEqual(await walk("to=0001-01-01"), []);
    deepStrictEqual(await walk("from=2030-01-01&to=2020-01-01"), []);
  });

  await t.step("SQL in filters is text", async () => {
    for (const evil of ["' or 1=1 --", "$1", '"; drop table metrics', "%", "\\"]) {
      const text = encodeURIComponent(evil);
      for (
        const query of [
          `source=${text}`,
          `payload.device=${text}`,
          `payload.${text}=1`,
          `payload.a=${text}`,
        ]
      ) {
        const { status, json } = await api.ask(`/api/reading?${query}`);
        deepStrictEqual([status, json().readings], [200, []], query);
      }
    }
    strictEqual((await walk("limit=1000")).length, ids.length);
  });

  await t.step("JSON, NDJSON and CSV by Accept, with the same content", async () => {
    const as = (accept: string, query = "limit=1000") =>
      api.ask(`/api/reading?${query}`, { headers: { accept } });
    const page = (await as("application/json")).json().readings as Json[];
    const lines = await as("application/x-ndjson");
    match(lines.headers.get("content-type")!, /^application\/x-ndjson/);
    deepStrictEqual(lines.text.trimEnd().split("\n").map((line) => JSON.parse(line)), page);
    const csv = await as("text/csv");
    const [head, ...rows] = csv.text.trimEnd().split("\r\n").map((line) =>
      [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^,]*))/g)]
        .map(([, quoted, plain]) => quoted?.replaceAll('""', '"') ?? plain)
    );
    deepStrictEqual(head, Object.keys(page[0]));
    deepStrictEqual(
      rows.map((row) => Object.fromEntries(head.map((name, i) => [name, row[i]]))),
      page.map((row) =>
        Object.fromEntries(
          Object.entries(row).map(([name, value]) => [
            name,
            name === "payload" ? rows[page.indexOf(row)][9] : String(value ?? ""),
          ]),
        )
      ),
    );
    deepStrictEqual(rows.map((row) => JSON.parse(row[9])), page.map(({ payload }) => payload));
    strictEqual((await as("image/png")).status, 406);
    // More than a page is streamed.
    const all = await as("application/x-ndjson", "limit=1000000");
    deepStrictEqual(all.text.trimEnd().split("\n").map((line) => JSON.parse(line).id), ids);
    const some = await as("text/csv", "limit=2001");
    strictEqual(some.text.trimEnd().split("\r\n").length, 2002);
    strictEqual(
      (await as("text/csv", "limit=2001&source=none")).text.trimEnd().split("\r\n").length,
      1,
    );
    strictEqual((await as("application/x-ndjson", "source=none")).text, "");
  });

  await t.step("what the caller gets wrong is named", async () => {
    const cursor = (value: unknown) => Buffer.from(JSON.stringify(value)).toString("base64url");
    const wrong: [string, string][] = [
      ["limit=0", "limit"],
      ["limit=-1", "limit"],
      ["limit=1e2", "limit"],
      ["limit=1001", "limit"],
      ["limit=9999999", "limit"],
      ["limit=1&limit=2", "limit"],
      ["from=yesterday", "from"],
      ["from=2026-13-01", "from"],
      ["from=2026-02-30", "from"],
      ["to=0000-01-01", "to"],
      ["from=2026-01-01T00:00:00%2B20:00", "from"],
      ["sorce=a", "sorce"],
      ["__proto__=1", "__proto__"],
      ["source=", "source"],
      ["source=a%00b", "source"],
      ["source=a&source=b", "source"],
      [`source=${"a".repeat(300)}`, "source"],
      [`source=${"ü".repeat(200)}`, "source"],
      ["payload=1", "payload"],
      ["payload={", "payload"],
      ["payload=[1]", "payload"],
      ["payload.=1", "payload."],
      ["payload.a..b=1", "payload.a..b"],
      ["payload.a=1&payload.a=2", "payload.a"],
      ["payload.a=1&payload.a.b=2", "payload.a.b"],
      ["payload=%7B%22a%22:1%7D&payload.a=1", "payload.a"],
      ["payload.a=1e999999", "payload.a"],
      ["payload.a=%00", "payload.a"],
      ["payload.%00=1", "payload.\0"],
      ['payload.a="\\ud800"', "payload.a"],
      ['payload={"a":["\\u0000"]}', "payload"],
      ["cursor=x", "cursor"],
      ["cursor=", "cursor"],
      [`cursor=${cursor(["2026-01-01T00:00:00+00:00", "a"])}`, "cursor"],
      [`cursor=${cursor(["2026-99-01T00:00:00+00:00", "a", "b"])}`, "cursor"],
      [`cursor=${cursor(["infinity", "a", "b"])}`, "cursor"],
      [`cursor=${cursor([`2026-01-01T00:00:00.${"0".repeat(999)}+00:00`, "a", "b"])}`, "cursor"],
      [`cursor=${cursor(["2026-01-01T00:00:00+00:00", "a\0", "b"])}`, "cursor"],
      [`cursor=${cursor(["2026-01-01T00:00:00+00:00", 1, 2])}`, "cursor"],
    ];
    for (const [query, name] of wrong) {
      const { status, headers, json } = await api.ask(`/api/reading?${query}`);
      strictEqual(status, 400, query);
      match(headers.get("content-type")!, /^application\/problem\+json/);
      const problem = json();
      strictEqual(problem.errors[0].field, name, query);
      match(problem.detail, new RegExp(`^Cannot take "${RegExp.escape(name)}": `));
      strictEqual(problem.request, headers.get("x-request-id"));
    }
    strictEqual((await api.ask("/api/sync/runs/x")).status, 400);
    strictEqual((await api.ask("/api/sync/reading?wait=maybe")).status, 400);
    strictEqual((await api.ask("/nothing")).status, 404);
    const method = await api.ask("/api/reading", { method: "DELETE" });
    deepStrictEqual([method.status, method.headers.get("allow")], [405, "GET, POST"]);
  });

  await t.step(
    "one reading, whatever its id; which source must be said where two have it",
    async () => {
      const { status, json } = await api.ask(`/api/reading/${ids[3]}`);
      deepStrictEqual([status, json().id], [200, ids[3]]);
      strictEqual((await api.ask("/api/reading/none")).status, 404);
      strictEqual((await api.ask(`/api/reading/${ids[3]}?source=none`)).status, 404);
      strictEqual((await api.ask(`/api/reading/${ids[3]}?at=1`)).json().errors[0].field, "at");
      strictEqual((await api.ask("/api/reading/%00")).status, 400);
      for (const id of ['{"$a":1}', "a/b", "50% + ü", "..."]) {
        strictEqual((await api.post({ readings: [{ id, payload: { id } }] })).status, 200);
        const found = await api.ask(`/api/reading/${encodeURIComponent(id)}`);
        deepStrictEqual([found.status, found.json().payload], [200, { id }], id);
      }
      await api.post({ readings: [{ id: ids[3], source: "lab", payload: {} }] });
      const both = await api.ask(`/api/reading/${ids[3]}`);
      deepStrictEqual([both.status, both.json().sources], [409, ["lab", "testdb.readings"]]);
      strictEqual((await api.ask(`/api/reading/${ids[3]}?source=lab`)).json().source, "lab");
    },
  );

  await t.step("POST takes a batch: once, again, changed", async () => {
    const batch = (value: number) => ({
      readings: [1, 2, 3].map((i) => ({
        id: `p${i}`,
        source: "post",
        payload: { value: i * value },
      })),
    });
    const counts = async (body: unknown) => (await api.post(body)).json();
    deepStrictEqual(await counts(batch(1)), { taken: 3, replaced: 0, same: 0, failed: [] });
    deepStrictEqual(await counts(batch(1)), { taken: 0, replaced: 0, same: 3, failed: [] });
    deepStrictEqual(await counts(batch(2)), { taken: 0, replaced: 3, same: 0, failed: [] });
    deepStrictEqual((await walk("source=post")).toSorted(), ["p1", "p2", "p3"]);
  });

  await t.step("POST loses no digit of a number", async () => {
    const numbers = "[12345678901234567890,0.1234567890123456789,1e400,-0.10,17]";
    const { status } = await api.post(
      `{"readings":[{"id":"n","payload":{"n":${numbers},"__proto__":1}}]}`,
    );
    strictEqual(status, 200);
    const [{ same, proto }] = await sql`
      select payload -> 'n' = ${numbers}::text::jsonb as same, payload ? '__proto__' as proto
      from reading_analytics where source = 'api' and source_id = 'n'`;
    deepStrictEqual([same, proto], [true, true]);
    strictEqual(JSON.stringify(parseExactly("[123.456789012345678]")), "[123.456789012345678]");
  });

  await t.step("POST names what cannot be taken, and takes the others", async () => {
    const { status, json } = await api.post({
      readings: [
        { id: "ok", source: "mixed", payload: { value: 1 } },
        { id: "time", source: "mixed", payload: { time: "9999-01-01T00:00:00Z" } },
        { id: "nul", source: "mixed", payload: { text: "a\0b" } },
        { id: "half", source: "mixed", payload: { text: "\ud800" } },
        { id: "long", source: "mixed", payload: { sensor: "x".repeat(6_000) } },
        { id: "empty", source: "mixed", payload: {} },
      ],
    });
    const problem = json();
    deepStrictEqual([status, problem.taken], [422, 2]);
    const failed = problem.failed.map((one: Json) => one.id).toSorted();
    deepStrictEqual(failed, ["half", "long", "nul", "time"]);
    const fields = problem.errors.map((one: Json) => one.field);
    ok(fields.includes("readings.1.payload.time"), fields);
    ok(fields.includes("readings.4.payload.sensor"), fields);
    deepStrictEqual((await walk("source=mixed")).toSorted(), ["empty", "ok"]);
  });

  await t.step("POST refuses bodies of the wrong shape, by name", async () => {
    const wrong: [unknown, number, string?][] = [
      ["", 400],
      ["{", 400],
      ["[]", 400, ""],
      [{}, 400, "readings"],
      [{ readings: [] }, 400, "readings"],
      [{ readings: {} }, 400, "readings"],
      [{ readings: [{}] }, 400, "readings.0.id"],
      [{ readings: [{ id: "", payload: {} }] }, 400, "readings.0.id"],
      [{ readings: [{ id: 1, payload: {} }] }, 400, "readings.0.id"],
      [{ readings: [{ id: "a\nb", payload: {} }] }, 400, "readings.0.id"],
      [{ readings: [{ id: "ü".repeat(600), payload: {} }] }, 400, "readings.0.id"],
      [{ readings: [{ id: "\ud800", payload: {} }] }, 400, "readings.0.id"],
      [{ readings: [{ id: "a", source: "ü".repeat(200), payload: {} }] }, 400, "readings.0.source"],
      [{ readings: [{ id: "a" }] }, 400, "readings.0.payload"],
      [{ readings: [{ id: "a", payload: [] }] }, 400, "readings.0.payload"],
      ['{"readings":[{"id":"a","payload":12345678901234567890}]}', 400, "readings.0.payload"],
      [{ readings: [{ id: "a", payload: {}, time: "now" }] }, 400, "readings.0.time"],
      [{ readings: [{ id: "a", payload: {} }], more: 1 }, 400, "more"],
      [{ readings: Array(10_001).fill({ id: "a", payload: {} }) }, 400, "readings"],
    ];
    for (const [body, status, name] of wrong) {
      const answer = await api.post(body);
      const what = JSON.stringify(body).slice(0, 100);
      strictEqual(answer.status, status, what);
      if (name !== undefined) strictEqual(answer.json().errors[0].field, name, what);
    }
    for (const depth of [1_000, 100_000]) {
      const deep = '{"a":'.repeat(depth) + "1" + "}".repeat(depth);
      const { status } = await api.post(`{"readings":[{"id":"deep","payload":${deep}}]}`);
      ok([200, 400, 422].includes(status), `depth ${depth}: ${status}`);
    }
    const type = (value: string) => api.post("{}", { headers: { "content-type": value } });
    strictEqual((await type("text/plain")).status, 415);
    strictEqual((await type("application/json; charset=latin1")).status, 415);
    strictEqual((await type('application/json; charset="UTF-8"')).status, 400);
    const encoded = await api.post("{}", { headers: { "content-encoding": "gzip" } });
    strictEqual(encoded.status, 415);
    const bytes = await api.ask("/api/reading", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: new Uint8Array([0x22, 0xff, 0x22]),
    });
    deepStrictEqual([bytes.status, bytes.json().detail], [400, "The body is no UTF-8"]);
  });

  await t.step("POST refuses too much, said or not", async () => {
    const large = `{"readings":[{"id":"x","payload":{"x":"${"x".repeat(18 * 2 ** 20)}"}}]}`;
    strictEqual((await api.post(large)).status, 413);
    const unsaid = new Blob([large]).stream();
    const { status } = await api.ask("/api/reading", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: unsaid,
    });
    strictEqual(status, 413);
    strictEqual((await api.ask("/healthz")).status, 200);
  });

  await t.step("bodies count until they are answered, and not beyond", async () => {
    const post = (id: string) =>
      api.post(`{"readings":[{"id":"${id}","source":"large","payload":{}}]}${" ".repeat(15e6)}`)
        .then(({ status }) => status);
    let held: Promise<number>[] = [];
    await sql.begin(async (tx) => {
      await tx`lock table reading_keys`;
      held = [post("a"), post("b")];
      await until("both wait for the lock", async () => {
        const [{ n }] = await sql`
          select count(*)::int as n from pg_stat_activity where wait_event_type = 'Lock'`;
        return n >= 2;
      });
      strictEqual(await post("c"), 503);
    });
    deepStrictEqual(await Promise.all(held), [200, 200]);
    strictEqual(await post("c"), 200);
  });

  await t.step("bodies cut short and broken requests change nothing", async () => {
    const head =
      "POST /api/reading HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    const body = '{"readings":[{"id":"cut","payload":{}}]}';
    await api.raw(`${head}Content-Length: 500\r\n\r\n${body}`, true);
    await api.raw(`${head}Transfer-Encoding: chunked\r\n\r\nZZ\r\n${body}`, true);
    await api.raw(`${head}Transfer-Encoding: chunked\r\n\r\n28\r\n${body}\r\n`, true);
    for (
      const line of ["BLAH", "GET /%zz%ff?x=%zz HTTP/1.1\r\nHost: localhost", "GET * HTTP/1.1"]
    ) {
      doesNotMatch(await api.raw(`${line}\r\nConnection: close\r\n\r\n`, true), /^HTTP\/1.1 5/);
    }
    strictEqual((await api.ask("/api/reading/cut")).status, 404);
    strictEqual((await api.post(body)).status, 200);
  });

  await t.step(
    "who opens a connection and stays silent is cut off; who leaves is forgotten",
    async () => {
      await Promise.all([
        api.raw("").then((said) => match(said, /^(HTTP\/1.1 408|$)/)),
        api.raw("GET / HTTP/1.1\r\nHost: loc").then((said) => match(said, /^(HTTP\/1.1 408|$)/)),
        (async () => {
          const leaving = new AbortController();
          const { body } = await fetch(`${api.url}/api/reading?limit=100000`, {
            headers: { accept: "application/x-ndjson" },
            signal: leaving.signal,
          });
          await body!.getReader().read();
          leaving.abort();
          strictEqual((await api.ask("/healthz")).status, 200);
        })(),
      ]);
    },
  );

  await t.step("request ids: its own, or the caller's, and in the log", async () => {
    const said = await logged(async () => {
      const { headers } = await api.ask("/api/reading?limit=1", {
        headers: { "x-request-id": "mine-1.2" },
      });
      strictEqual(headers.get("x-request-id"), "mine-1.2");
      const other = await api.ask("/nothing", { headers: { "x-request-id": "not mine" } });
      match(other.headers.get("x-request-id")!, /^[\da-f-]{36}$/);
    });
    match(said, /^http mine-1\.2 127\.0\.0\.1 GET \/api\/reading\?limit=1 200 in /m);
    match(said, /^http [\da-f-]{36} 127\.0\.0\.1 GET \/nothing 404 in /m);
  });

  await t.step("CORS for those that are named, also for what goes wrong", async () => {
    const from = (origin: string, path = "/api/reading?limit=1") =>
      api.ask(path, { headers: { origin } }).then(({ headers }) =>
        headers.get("access-control-allow-origin")
      );
    strictEqual(await from("https://app.example.org"), "https://app.example.org");
    strictEqual(await from("https://app.example.org", "/nothing"), "https://app.example.org");
    strictEqual(await from("https://evil.example.org"), null);
    const preflight = await api.ask("/api/reading", {
      method: "OPTIONS",
      headers: {
        "origin": "https://app.example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
      },
    });
    strictEqual(preflight.status, 204);
    match(preflight.headers.get("access-control-allow-headers")!, /authorization/);
  });

  await t.step("without a token: neither other names nor other sites' pages get in", async () => {
    const get = (headers: string) =>
      api.raw(`GET /api/reading HTTP/1.1\r\n${headers}\r\nConnection: close\r\n\r\n`);
    match(await get("Host: evil.example.org"), /^HTTP\/1.1 421 /);
    match(await get(`Host: localhost:${api.port}`), /^HTTP\/1.1 200 /);
    match(await get(`Host: [::1]:${api.port}`), /^HTTP\/1.1 200 /);
    match(await get("Host: localhost\r\nSec-Fetch-Site: cross-site"), /^HTTP\/1.1 403 /);
    match(await get("Host: localhost\r\nSec-Fetch-Site: same-origin"), /^HTTP\/1.1 200 /);
    await using bound = await running({ bind: "127.0.0.1" });
    const evil = "GET / HTTP/1.1\r\nHost: evil.example.org\r\nConnection: close\r\n\r\n";
    match(await bound.raw(evil), /^HTTP\/1.1 421 /);
  });

  await t.step("API_TOKEN guards all but the welcome and health, and is never logged", async () => {
    await using guarded = await running({ token: "s3cret-token", bind: "127.0.0.1" });
    const said = await logged(async () => {
      for (const path of ["/", "/healthz", "/server/health"]) {
        strictEqual((await guarded.ask(path)).status, 200, path);
      }
      const { paths } = (await api.ask("/openapi.json")).json();
      for (const path of Object.keys(paths).slice(3)) {
        if (/^\/(healthz|server\/health)$/.test(path)) continue;
        const { status, headers } = await guarded.ask(path);
        deepStrictEqual(
          [status, headers.get("www-authenticate")],
          [401, 'Bearer realm="pgpulse"'],
          path,
        );
      }
      strictEqual((await guarded.ask("/nothing")).status, 401);
      strictEqual((await guarded.ask("//")).status, 401);
      strictEqual((await guarded.post({})).status, 401);
      const get = (authorization: string) =>
        guarded.ask("/api/reading", { headers: { authorization } }).then(({ status }) => status);
      strictEqual(await get("Bearer s3cret-token"), 200);
      strictEqual(await get("bearer s3cret-token"), 200);
      for (const wrong of ["s3cret-token", "Bearer s3cret-toke", "Bearer ", "Basic s3cret-token"]) {
        strictEqual(await get(wrong), 401, wrong);
      }
    });
    doesNotMatch(said, /s3cret/);
    match(said, /GET \/api\/reading 401 in/);
  });

  await t.step("a client that asks too often is told when to come again", async () => {
    let now = 0;
    const wait = limiter(2, () => now);
    deepStrictEqual([1, 2, 3, 4, 5].map(() => wait("a")), [0, 0, 0, 0, 1]);
    strictEqual(wait("b"), 0);
    now = 500;
    deepStrictEqual([wait("a"), wait("a")], [0, 1]);
    deepStrictEqual([limiter(0)("a")], [0]);
    await using slow = await running({ rate: 1 });
    const answers = [];
    for (let i = 0; i < 5; i++) answers.push(await slow.ask("/api/reading?limit=1"));
    const refused = answers.filter(({ status }) => status === 429);
    ok(refused.length > 0);
    ok(Number(refused[0].headers.get("retry-after")) >= 1);
  });

  await t.step("sync: 503 with the reason where there is no MongoDB", async () => {
    for (const method of ["GET", "POST"]) {
      const { status, json } = await api.ask("/api/sync/reading", { method });
      deepStrictEqual([status, json().detail], [503, "Cannot sync: MONGO_URI is not set"]);
    }
    strictEqual((await api.ask("/api/sync/reading", { method: "HEAD" })).status, 405);
    strictEqual((await api.ask("/healthz")).json().status, "ok");
  });

  await t.step("sync: counts at its end, or a run to look up", async () => {
    const sync = fakeSync();
    await using with_ = await running({}, sync);
    const { status, json, headers } = await with_.ask("/api/sync/reading?wait=false", {
      method: "POST",
    });
    deepStrictEqual([status, json()], [202, RUN]);
    strictEqual(headers.get("location"), "/api/sync/runs/7");
    const waiting = with_.ask("/api/sync/reading");
    await until("it has begun", () => sync.runs.length === 2);
    sync.runs.forEach(({ finish }) => finish());
    const ended = await waiting;
    deepStrictEqual([ended.status, ended.json()], [200, { ...RUN, ended: RUN.started }]);
    const failing = with_.ask("/api/sync/reading");
    await until("it has begun", () => sync.runs.length === 3);
    sync.runs[2].finish({ error: "MongoDB is away" });
    const failed = await failing;
    deepStrictEqual([failed.status, failed.json().run.taken], [503, 2]);
    match(failed.json().detail, /MongoDB is away/);
    const health = (await with_.ask("/healthz")).json();
    deepStrictEqual(health.sync, {
      mongo: "up",
      running: true,
      trouble: null,
      backlog: 5,
      lag_seconds: 1.5,
    });
  });

  await t.step("a sync that cannot go on shows, and why to those who may know", async () => {
    const trouble = 'Cannot use "db:5432": its disk is full';
    await using stuck = await running({ token: "s3cret" }, fakeSync(trouble));
    const headers = { authorization: "Bearer s3cret" };
    const [open, known] = [await stuck.ask("/healthz"), await stuck.ask("/healthz", { headers })];
    deepStrictEqual([open.json().status, open.json().sync.trouble], ["degraded", "the log has it"]);
    strictEqual(known.json().sync.trouble, trouble);
    match((await stuck.ask("/metrics", { headers })).text, /^pgpulse_etl_sync_trouble 1$/m);
  });

  await t.step("runs of the sync, page by page and one by one", async () => {
    await sql`
      insert into sync_runs (worker, trigger, ended, taken)
      select 'w', 'once', now(), i from generate_series(1, 5) i`;
    const first = (await api.ask("/api/sync/runs?limit=3")).json();
    const second = (await api.ask(`/api/sync/runs?limit=3&before=${first.next}`)).json();
    deepStrictEqual([...first.runs, ...second.runs].map((run) => run.taken), [5, 4, 3, 2, 1]);
    strictEqual(second.next, null);
    deepStrictEqual((await api.ask(`/api/sync/runs/${first.runs[0].id}`)).json(), first.runs[0]);
    strictEqual((await api.ask("/api/sync/runs/999999")).status, 404);
  });

  await t.step("/metrics is what Prometheus reads", async () => {
    await using with_ = await running({}, fakeSync());
    await with_.ask("/api/reading?limit=1");
    await with_.ask("/nothing");
    const { text, headers } = await with_.ask("/metrics");
    match(headers.get("content-type")!, /^text\/plain; version=0\.0\.4/);
    for (const line of text.trimEnd().split("\n")) {
      match(
        line,
        /^(# (HELP|TYPE) pgpulse_etl_\w+ .+|pgpulse_etl_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? \S+)$/,
      );
    }
    match(text, /^pgpulse_etl_http_requests_total\{route="\/api\/reading",status="200"\} 1$/m);
    match(text, /^pgpulse_etl_http_requests_total\{route="other",status="404"\} 1$/m);
    match(text, /^pgpulse_etl_sync_backlog\{source="testdb\.readings"\} 5$/m);
    match(text, /^pgpulse_etl_database_up 1$/m);
  });

  await t.step("Accept is read as it is meant", () => {
    const offered = ["application/json", "application/x-ndjson", "text/csv"];
    const best: [string | undefined, string][] = [
      [undefined, "application/json"],
      ["", "application/json"],
      ["*/*", "application/json"],
      ["text/*", "text/csv"],
      ["text/csv;q=0.5, application/json;q=0.1", "text/csv"],
      ["*/*;q=0.1, TEXT/CSV", "text/csv"],
      ["application/json;q=0, */*", "application/x-ndjson"],
      ["text/html,application/xhtml+xml,*/*;q=0.8", "application/json"],
    ];
    for (const [accept, type] of best) strictEqual(preferred(accept, offered), type, accept);
  });

  await t.step(
    "whatever a caller sends, as /openapi.json has it or not, it is no 5xx",
    async () => {
      const document = (await api.ask("/openapi.json")).json();
      await check(document, api.ask);
    },
  );

  await t.step("documents that are stored small come a few at a time", async () => {
    const readings = Array.from({ length: 10 }, (_, i) => ({
      id: `${i}`,
      source: "big",
      payload: { x: "x".repeat(1e6) },
    }));
    strictEqual((await api.post({ readings })).status, 200);
    const { json, headers } = await api.ask("/api/reading?source=big&limit=1000");
    strictEqual(json().readings.length, 4);
    match(headers.get("link")!, /rel="next"/);
    deepStrictEqual((await walk("source=big")).toSorted(), readings.map(({ id }) => id));
    await sql`delete from reading_analytics where source = 'big'`;
  });

  await t.step("many bad ones are told as one is", async () => {
    const readings = Array.from({ length: 10_000 }, (_, i) => ({
      id: `${i}`,
      source: "bad",
      payload: i % 2 ? { value: "bad" } : { text: "\0" },
    }));
    const { status, json } = await api.post({ readings });
    deepStrictEqual([status, json().failed.length], [422, 10_000]);
  });

  await t.step(
    "the command: with its task's permissions, until SIGTERM, and no port twice",
    async () => {
      const port = quietPort();
      const env = {
        DATABASE_URL: server.urlFor("server", "server"),
        PORT: String(port),
        API_TOKEN: "s3cret-token",
      };
      await using command = await background("etl", ["serve"], env);
      await command.said(/^Serves readings at http:\/\/0\.0\.0\.0:\d+\/$/, 30_000);
      await command.said(/^There is no sync: MONGO_URI is not set$/);
      const get = (authorization: string) =>
        fetch(`http://127.0.0.1:${port}/api/reading`, { headers: { authorization } })
          .then(async (response) => (await response.body!.cancel(), response.status));
      deepStrictEqual([await get("Bearer no"), await get("Bearer s3cret-token")], [401, 200]);
      const second = await script("etl.ts", ["serve"], env);
      strictEqual(second.code, 1);
      match(second.stderr, /^Cannot listen on "0\.0\.0\.0:\d+": the port is taken; choose another/);
      strictEqual(await command.end(), 0);
      doesNotMatch(command.log.join("\n"), /s3cret/);
    },
  );

  await t.step("a database that goes away: 503, told once, and it comes back", async () => {
    const said = await logged(async () => {
      await server.kill();
      for (let i = 0; i < 3; i++) {
        const { status, headers } = await api.ask("/api/reading?limit=1");
        deepStrictEqual([status, headers.get("retry-after")], [503, "5"]);
      }
      const health = await until("it shows", async () => {
        const { status, json } = await api.ask("/healthz");
        return status === 200 && json().database === "away" && json();
      });
      strictEqual(health.status, "degraded");
      await server.start();
      await until("it is back", async () => (await api.ask("/api/reading?limit=1")).status === 200);
    });
    strictEqual(said.match(/^The database answers again$/gm)?.length, 1);
    ok(said.match(/^Cannot use /gm)!.length <= 2, said);
  });
});

// --- /openapi.json as a generator and as a judge -------------------------------------------------

interface Schema extends Json {
  $ref?: string;
  type?: string | string[];
  anyOf?: Schema[];
  enum?: unknown[];
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
}
interface Operation {
  parameters?: { in: string; name: string; required?: boolean; schema: Schema }[];
  requestBody?: { content: Record<string, { schema: Schema }> };
  responses: Record<string, { content?: Record<string, { schema: Schema }> }>;
}

async function check(
  document: Json,
  ask: (
    path: string,
    init: RequestInit,
  ) => Promise<{ status: number; headers: Headers; text: string }>,
) {
  const resolve = (schema: Schema): Schema =>
    schema.$ref
      ? schema.$ref.split("/").slice(1).reduce((at, key) => at[key] as Json, document)
      : schema;

  /** Says where a value is not as its schema has it. */
  const wrong = (given: Schema, value: unknown, at = "$"): string | undefined => {
    const schema = resolve(given);
    if (schema.anyOf) {
      return schema.anyOf.some((one) => !wrong(one, value)) ? undefined : `${at} is none of anyOf`;
    }
    const is = value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
    const types = [schema.type ?? is].flat().map((type) => type === "integer" ? "number" : type);
    if (!types.includes(is)) return `${at} is ${is}, not ${types}`;
    if (schema.enum && !schema.enum.includes(value)) return `${at} is not of ${schema.enum}`;
    if (is === "array") {
      return (value as unknown[]).map((one, i) => wrong(schema.items ?? {}, one, `${at}[${i}]`))
        .find(Boolean);
    }
    if (is !== "object") return;
    const object = value as Json;
    const lacks = schema.required?.find((name) => !(name in object));
    if (lacks) return `${at} lacks ${lacks}`;
    return Object.entries(schema.properties ?? {})
      .map(([name, one]) => name in object ? wrong(one, object[name], `${at}.${name}`) : undefined)
      .find(Boolean);
  };

  /** Values that a schema allows. */
  const right = (given: Schema): fc.Arbitrary<unknown> => {
    const schema = resolve(given);
    if (schema.enum) return fc.constantFrom(...schema.enum);
    if (schema.type === "integer") {
      const { minimum = 0, maximum = 1e9 } = schema as { minimum?: number; maximum?: number };
      const most = Math.min(maximum, 2 ** 31);
      return fc.oneof(
        fc.constantFrom(minimum, most),
        fc.integer({ min: minimum, max: Math.min(most, 99) }),
      );
    }
    if (schema.format === "date-time") {
      return fc.date({
        noInvalidDate: true,
        min: new Date("0001-01-01"),
        max: new Date("9999-12-31"),
      })
        .map((date) => date.toISOString());
    }
    if (schema.type === "array") {
      return fc.array(right(schema.items ?? {}), {
        minLength: schema.minItems as number ?? 0,
        maxLength: 5,
      });
    }
    if (schema.properties) {
      return fc.record(
        Object.fromEntries(Object.entries(schema.properties).map(([k, v]) => [k, right(v)])),
        { requiredKeys: schema.required ?? [] },
      );
    }
    if (schema.type === "object") return fc.dictionary(fc.string(), fc.jsonValue());
    if (schema.example) return fc.constant(schema.example);
    const least = schema.minLength as number ?? 0;
    return fc.string({ unit: "grapheme-ascii", minLength: least, maxLength: 40 });
  };
  const junk = fc.oneof(
    fc.string({ unit: "binary" }),
    fc.json(),
    fc.constantFrom(
      "\0",
      "'",
      "' or true --",
      "1e999999",
      "-0",
      "infinity",
      "0001-01-01 BC",
      "{}",
      "[[[",
      "%",
    ),
  );
  // Mostly as it should be, or nothing would get past the first check.
  const mixed = (schema: Schema) =>
    fc.oneof({ weight: 12, arbitrary: right(schema) }, { weight: 1, arbitrary: junk });

  const operations = Object.entries(document.paths as Record<string, Record<string, Operation>>)
    .flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => ({ path, method, operation }))
    );
  ok(operations.length >= 12, `${operations.length} operations`);

  const request = fc.constantFrom(...operations).chain(({ path, method, operation }) => {
    const parameters = operation.parameters ?? [];
    const part = (where: string) => {
      const those = parameters.filter((one) => one.in === where);
      return fc.record(
        Object.fromEntries(those.map(({ name, schema }) => [name, mixed(schema)])),
        { requiredKeys: those.filter((one) => one.required).map((one) => one.name) },
      );
    };
    const types = Object.values(operation.responses).flatMap(({ content = {} }) =>
      Object.keys(content)
    );
    const [media] = Object.entries(operation.requestBody?.content ?? {});
    return fc.record({
      path: fc.constant(path),
      method: fc.constant(method.toUpperCase()),
      params: part("path"),
      query: part("query"),
      more: fc.oneof({ weight: 9, arbitrary: fc.constant(null) }, {
        weight: 1,
        arbitrary: fc.tuple(fc.oneof(junk, junk.map((text) => `payload.${text}`)), junk),
      }),
      accept: fc.oneof(fc.constantFrom("*/*", ...types), fc.stringMatching(/^[ -~]{0,30}$/)),
      body: media
        ? fc.oneof(
          { weight: 5, arbitrary: right(media[1].schema).map((value) => JSON.stringify(value)) },
          { weight: 1, arbitrary: fc.json() },
          { weight: 1, arbitrary: junk },
        )
        : fc.constant(undefined),
      type: fc.oneof({ weight: 9, arbitrary: fc.constant(media?.[0] ?? "") }, {
        weight: 1,
        arbitrary: fc.stringMatching(/^[!-~]{1,20}$/),
      }),
    });
  });

  const seen = new Set<string>();
  await fc.assert(
    fc.asyncProperty(
      request,
      async ({ path, method, params, query, more, accept, body, type }) => {
        const text = (value: unknown) =>
          encodeURIComponent(String(value).toWellFormed()).replace(
            /^\.+$/,
            (dots) => "%2E".repeat(dots.length),
          );
        const to = path.replace(/{(\w+)}/g, (_, name) => text(params[name]) || "%20");
        const pairs = [...Object.entries(query), ...more ? [more] : []];
        const search = pairs.map(([name, value]) => `${text(name)}=${text(value)}`).join("&");
        const answer = await ask(`${to}?${search}`, {
          method,
          headers: { accept, ...body === undefined ? {} : { "content-type": type } },
          body: body?.toWellFormed(),
        });
        const { status, headers } = answer;
        const { operation } = operations.find((one) =>
          one.path === path && one.method === method.toLowerCase()
        )!;
        const noMongo = status === 503 && path === "/api/sync/reading";
        ok(status < 500 || noMongo, `${status} ${answer.text}`);
        // A path that ends with what only looks like one is another path.
        if (status === 404 && !operation.responses[404]) return;
        const said = operation.responses[status];
        ok(said, `status ${status} is not in the document`);
        const [media] = headers.get("content-type")!.split(";");
        const schema = said.content?.[media]?.schema;
        ok(schema, `${status} as ${media} is not in the document`);
        if (/[/+]json$/.test(media)) strictEqual(wrong(schema, JSON.parse(answer.text)), undefined);
        seen.add(`${method} ${path} ${status}`);
      },
    ),
    { numRuns: 400 },
  );
  // It was not refused all the time.
  for (const one of ["GET /api/reading 200", "GET /api/reading 400", "POST /api/reading 200"]) {
    ok(seen.has(one), `${one} did not come up: ${[...seen].sort()}`);
  }
}

// The sync: documents of MongoDB in PostgreSQL, each exactly once, whatever happens on the way.

import { deepStrictEqual, doesNotMatch, match, ok, strictEqual, throws } from "node:assert";
import { Buffer } from "node:buffer";
import postgres from "npm:postgres@3.4.9";
import fc from "npm:fast-check@4.10.2";
import { BSON, MongoClient } from "npm:mongodb@7.9.0";
import { Encoder, RawId, Unreadable } from "./etl.ts";
import {
  type Background,
  background,
  migrated,
  MongoStandIn,
  random,
  realMongo,
  type TestServer,
  until,
} from "./testing.ts";

const {
  Binary,
  BSONRegExp,
  BSONSymbol,
  Code,
  Decimal128,
  Double,
  Int32,
  Long,
  MaxKey,
  MinKey,
  ObjectId,
  Timestamp,
} = BSON;

// --- BSON as JSON --------------------------------------------------------------------------------

/** PostgreSQL for all: each test gets a copy of its database. */
let server: TestServer;
let databases = 0;
Deno.test.beforeAll(async () => void (server = await migrated()));
Deno.test.afterAll(async () => await server[Symbol.asyncDispose]());

// deno-lint-ignore no-explicit-any -- documents of any shape
type Any = any;

/** What such JSON stands for: the way back that etl.ts --help promises to be there. */
function decode(json: string): Any {
  const special: Record<string, (value: Any, node: Any) => Any> = {
    $oid: (hex) => new ObjectId(hex as string),
    $date: (at) => new Date(typeof at === "string" ? at : at.toNumber()),
    $numberLong: (text) => Long.fromString(text),
    $numberDouble: (text) => new Double(Number(text)),
    $numberDecimal: (text) => Decimal128.fromString(text),
    $binary: ({ base64, subType }) =>
      new Binary(Uint8Array.fromBase64(base64), parseInt(subType, 16)),
    $string: (base64) => new TextDecoder().decode(Uint8Array.fromBase64(base64)),
    $timestamp: ({ t, i }) => new Timestamp({ t: Number(t), i: Number(i) }),
    $regularExpression: ({ pattern, options }) => new BSONRegExp(pattern, options),
    $code: (code, { $scope }) => new Code(code, $scope),
    $symbol: (text) => new BSONSymbol(text),
    $minKey: () => new MinKey(),
    $maxKey: () => new MaxKey(),
  };
  // deno-lint-ignore no-explicit-any -- the type of the reviver lacks its third parameter
  return (JSON.parse as any)(json, (_: string, value: Any, { source }: { source?: string }) => {
    if (typeof value === "number") {
      if (/[.e]/.test(source!)) return new Double(value);
      const whole = BigInt(source!);
      if (whole !== BigInt.asIntN(64, whole)) return new Double(value);
      return whole === BigInt.asIntN(32, whole) ? new Int32(value) : Long.fromBigInt(whole);
    }
    if (Object.prototype.toString.call(value) !== "[object Object]" || value._bsontype) {
      return value;
    }
    const keys = Object.keys(value);
    const kind = keys.find((key) => /^\$(?!\$|scope)/.test(key));
    if (kind) return special[kind](value[kind], value);
    return Object.fromEntries(
      Object.entries(value).map(([key, v]) => [key.startsWith("$$") ? key.slice(1) : key, v]),
    );
  });
}

const text = fc.oneof(fc.string({ unit: "binary" }), fc.string(), fc.constantFrom("\0", "a\0b"));
const name = fc.oneof(
  fc.string({ unit: "grapheme" }),
  fc.constantFrom("$oid", "$date", "$", "$$", "a.b", "", "status", "__proto__", "$string", "0"),
).map((key) => key.replaceAll("\0", ""));
const long = fc.bigInt(-(2n ** 63n), 2n ** 63n - 1n)
  .filter((n) => n !== BigInt.asIntN(32, n)).map((n) => Long.fromBigInt(n));
const decimal = fc.oneof(
  fc.tuple(fc.bigInt(-(10n ** 34n - 1n), 10n ** 34n - 1n), fc.integer({ min: -6176, max: 6111 }))
    .map(([digits, exponent]) => Decimal128.fromString(`${digits}E${exponent}`)),
  fc.constantFrom("NaN", "Infinity", "-0", "1E-6176", "9.999999999999999999999999999999999E+6144")
    .map((digits) => Decimal128.fromString(digits)),
);
const { tree: value } = fc.letrec((tie) => ({
  tree: fc.oneof(
    { maxDepth: 4 },
    text,
    fc.boolean(),
    fc.constant(null),
    fc.integer().map((n) => new Int32(n)),
    fc.double().map((n) => new Double(n)),
    fc.constantFrom(-0, 17, 1e17, 2 ** 53, 1e300, 5e-324).map((n) => new Double(n)),
    long,
    decimal,
    fc.date({ noInvalidDate: true }),
    fc.uint8Array({ minLength: 12, maxLength: 12 }).map((bytes) => new ObjectId(bytes)),
    // A vector (9) of any bytes is refused by the driver.
    fc.tuple(fc.uint8Array(), fc.integer({ min: 0, max: 255 }).filter((kind) => kind !== 9))
      .map(([bytes, kind]) => new Binary(bytes, kind)),
    fc.tuple(fc.nat(), fc.integer({ min: 0, max: 2 ** 32 - 1 }))
      .map(([t, i]) => new Timestamp({ t, i })),
    fc.tuple(name, fc.constantFrom("", "i", "imx"))
      .map(([pattern, options]) => new BSONRegExp(pattern, options)),
    text.map((code) => new Code(code)),
    fc.tuple(text, tie("object")).map(([code, scope]) => new Code(code, scope as Any)),
    text.map((symbol) => new BSONSymbol(symbol)),
    fc.constantFrom(new MinKey(), new MaxKey()),
    fc.array(tie("tree"), { maxLength: 4 }),
    tie("object"),
  ),
  object: fc.array(fc.tuple(name, tie("tree")), { maxLength: 6 }).map((pairs) =>
    Object.fromEntries(pairs)
  ),
}));
const object = fc.array(fc.tuple(name, value), { maxLength: 8 }).map((pairs) =>
  Object.fromEntries(pairs)
);

const serialize = (document: Any) => BSON.serialize(document, { ignoreUndefined: false });
const encoder = new Encoder();

Deno.test("any document becomes JSON on one line, and is the same on the way back", () => {
  fc.assert(
    fc.property(object, (document) => {
      const bson = serialize(document);
      const json = encoder.json(bson);
      ok(!json.includes("\n"), json);
      deepStrictEqual(serialize(decode(json)), bson, json);
    }),
    { numRuns: 2000 },
  );
});

Deno.test("numbers, dates and strings of any kind keep their value in jsonb", async (t) => {
  await using all = await sides();
  const sorted = (node: Any): Any => {
    if (Array.isArray(node)) return node.map(sorted);
    if (Object.prototype.toString.call(node) !== "[object Object]" || node._bsontype) {
      return node?._bsontype === "Code"
        ? new Code(node.code, node.scope && sorted(node.scope))
        : node;
    }
    return Object.fromEntries(Object.keys(node).sort().map((key) => [key, sorted(node[key])]));
  };
  await t.step("as any document does, but for the order of fields", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(object, { minLength: 20, maxLength: 20 }), async (documents) => {
        const json = documents.map((document) => encoder.json(serialize(document)));
        const back = await all.sql`
          select line::jsonb::text as json
          from unnest(${json}::text[]) with ordinality as lines (line, n)
          order by n`;
        back.forEach(({ json }, i) => {
          deepStrictEqual(serialize(sorted(decode(json))), serialize(sorted(documents[i])), json);
        });
      }),
      { numRuns: 30 },
    );
  });
});

Deno.test("what is no BSON is refused with the field's name, and crashes nothing", () => {
  const whole = serialize({ _id: 1, a: "text", b: { c: [1, 2, { d: new Date(0) }] }, e: /x/i });
  const some = random(7);
  for (let i = 0; i < 3000; i++) {
    const broken = whole.slice(0, some() < 0.3 ? Math.floor(some() * whole.length) : undefined);
    for (let n = 0; n < 3; n++) {
      if (broken.length) broken[Math.floor(some() * broken.length)] = Math.floor(some() * 256);
    }
    try {
      JSON.parse(encoder.json(broken));
    } catch (error) {
      ok(error instanceof Unreadable, String(error));
    }
  }
  const twice = serialize({ _id: 1, key1: 1, key2: 2 });
  twice[twice.lastIndexOf("2".charCodeAt(0))] = "1".charCodeAt(0);
  throws(() => encoder.json(twice), {
    field: "key1",
    message: "key1 has a name that is there twice",
  });
  throws(() => encoder.json(whole.subarray(0, 30)), /cut short/);
  let deep: Any = {};
  for (let i = 0; i < 600; i++) deep = { deep };
  throws(() => encoder.json(serialize(deep)), /deep is nested deeper than 500/);
  // Bytes that are no UTF-8: a string of Latin-1, as careless writers leave them.
  const latin = serialize({ _id: 1, name: "M?ller" });
  latin[latin.indexOf("?".charCodeAt(0))] = 0xfc;
  strictEqual(encoder.json(latin), '{"_id":1,"name":{"$string":"TfxsbGVy"}}');
});

Deno.test("each _id has a text of its own", () => {
  const ids = [
    [new ObjectId("65f000000000000000000001"), "65f000000000000000000001"],
    ["65f000000000000000000001", '"65f000000000000000000001"'],
    ["device-7/2026", "device-7/2026"],
    ["", '""'],
    ["sha256:abcd", "sha256:abcd"],
    [17, "17"],
    ["17", '"17"'],
    ["true", '"true"'],
    [true, "true"],
    [new Double(2 ** 60), "1152921504606846976"],
    [Long.fromString("1152921504606847000"), "1152921504606847000"],
    ['"17"', String.raw`"\"17\""`],
    ["a\nb", String.raw`"a\nb"`],
    ["a\0b", '{"$string":"YQBi"}'],
    [Long.fromString("9007199254740993"), "9007199254740993"],
    [new Double(1.5), "1.5"],
    [{ device: "a", hour: 7 }, '{"device":"a","hour":7}'],
    [new Date(0), '{"$date":"1970-01-01T00:00:00.000Z"}'],
  ] as const;
  for (const [_id, expected] of ids) {
    encoder.json(serialize({ _id, other: 1 }));
    strictEqual(encoder.idText(), expected);
  }
  strictEqual(new Set(ids.map(([, expected]) => expected)).size, ids.length);
  // MongoDB holds these for one.
  for (const _id of [new Int32(17), new Double(17), Long.fromNumber(17)]) {
    encoder.json(serialize({ _id }));
    strictEqual(encoder.idText(), "17");
  }
});

Deno.test("an _id goes to MongoDB as the bytes that it is", () => {
  const keyOf = (bson: Uint8Array) => {
    encoder.scan(bson);
    return encoder.rawId().key;
  };
  fc.assert(fc.property(value, (_id) => {
    const raw = RawId.of(keyOf(serialize({ before: 1, _id, behind: 2 })));
    const filter = (id: Any) => serialize({ _id: { $gt: id, $nin: [id, 7, id] }, status: "a" });
    deepStrictEqual(filter(raw), filter(_id));
  }));
  // What objects would put in another order.
  const odd = serialize(new Map([["_id", new Map<string, Any>([["sensor", "a"], ["7", 2]])]]));
  deepStrictEqual(serialize({ _id: RawId.of(keyOf(odd)) }), odd);
  // Others' strings are nobody's business, though they be no UTF-8.
  const latin = serialize({ _id: "x", name: "M?ller" });
  latin[latin.indexOf("?".charCodeAt(0))] = 0xfc;
  deepStrictEqual(serialize({ _id: RawId.of(keyOf(latin)) }), serialize({ _id: "x" }));
});

// --- the sync ------------------------------------------------------------------------------------

const HOUR = 3_600_000;

/** A document as applications leave them. */
const reading = (seq: number, more: Any = {}) => ({
  _id: new ObjectId(),
  status: "ingested",
  device: `device-${seq % 7}`,
  metric: "temperature",
  value: new Double(20 + seq % 10),
  unit: "°C",
  timestamp: new Date(Date.now() - HOUR + seq),
  seq: new Int32(seq),
  ...more,
});

/** A database of its own, and a MongoDB. */
interface Sides extends AsyncDisposable {
  sql: postgres.Sql;
  mongo: MongoStandIn;
  env: Record<string, string>;
  /** Starts etl.ts. */
  etl(...args: string[]): Promise<Background>;
  /** Runs it to its end. */
  run(...args: string[]): Promise<{ code: number; said: string }>;
  /** How many documents have each status. */
  statuses(): Record<string, number>;
}

async function sides(options?: { replicaSet: boolean }): Promise<Sides> {
  const name = `test${++databases}`;
  const admin = postgres(server.urlFor("user", "secret", "postgres"), { max: 1 });
  await admin.unsafe(`create database ${name} template testdb`);
  await admin.end();
  const sql = postgres(server.urlFor("user", "secret", name), { max: 2, onnotice: () => {} });
  const mongo = new MongoStandIn(options).start();
  const env = { DATABASE_URL: server.urlFor("server", "server", name), MONGO_URI: mongo.uri };
  const etl = (...args: string[]) => background("etl", args, env);
  return {
    sql,
    mongo,
    env,
    etl,
    async run(...args) {
      const child = await etl(...args);
      const code = await child.end(null);
      // On a slow machine it tells how far it is.
      return { code, said: child.log.filter((line) => !/^\d+ %, /.test(line)).join("\n") };
    },
    statuses() {
      const counts: Record<string, number> = {};
      for (const { status } of mongo.collection("readings").docs.values()) {
        counts[String(status)] = (counts[String(status)] ?? 0) + 1;
      }
      return counts;
    },
    async [Symbol.asyncDispose]() {
      await mongo[Symbol.asyncDispose]();
      await sql.end({ timeout: 1 });
    },
  };
}

const put = (mongo: MongoStandIn, ...documents: Any[]) => {
  for (const document of documents) mongo.collection("readings").put(document);
};

Deno.test("every document comes once, and again when it is another", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const documents = Array.from({ length: 2345 }, (_, i) => reading(i));
  put(mongo, ...documents, reading(9999, { status: "draft" }));
  const first = await all.run("sync", "--once", "--batch", "500", "--worker", "tester");
  deepStrictEqual(first, {
    code: 0,
    said: "2,345 read: 2,345 new, 0 replaced, 0 there before, 0 failed",
  });
  deepStrictEqual(all.statuses(), { processed: 2345, draft: 1 });
  const [row] = await sql`
    select device, metric, value, unit, time, source, payload - '_id' as payload
    from reading_analytics
    where source_id = ${String(documents[7]._id)}`;
  deepStrictEqual(row, {
    device: "device-0",
    metric: "temperature",
    value: 27,
    unit: "°C",
    time: documents[7].timestamp,
    source: "testdb.readings",
    payload: {
      status: "ingested",
      device: "device-0",
      metric: "temperature",
      value: 27,
      unit: "°C",
      timestamp: { $date: documents[7].timestamp.toISOString() },
      seq: 7,
    },
  });
  // One with a new value, one with another time, one as it was.
  put(
    mongo,
    { ...documents[0], value: new Double(99) },
    { ...documents[1], timestamp: new Date(Date.now() - 30 * 24 * HOUR) },
    documents[2],
  );
  const { said } = await all.run("sync", "--once");
  strictEqual(said, "3 read: 0 new, 2 replaced, 1 there before, 0 failed");
  const [{ rows, keys, claims }] = await sql`
    select (select count(*)::int from reading_analytics) as rows,
      (select count(*)::int from reading_keys) as keys,
      (select count(*)::int from pgpulse.reading_claims) as claims`;
  deepStrictEqual({ rows, keys, claims }, { rows: 2345, keys: 2345, claims: 0 });
  const runs = await sql`
    select split_part(worker, '/', 1) as worker, trigger, read::int, replaced::int, error,
      ended >= started as ended
    from sync_runs order by id`;
  deepStrictEqual([...runs], [
    { worker: "tester", trigger: "once", read: 2345, replaced: 0, error: null, ended: true },
    { worker: runs[1].worker, trigger: "once", read: 3, replaced: 2, error: null, ended: true },
  ]);
});

Deno.test("what cannot be taken is kept with its reason, and replayed when it is mended", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const bad = {
    late: reading(1, { timestamp: new Date(253402300799999) }),
    text: reading(2, { timestamp: "yesterday" }),
    value: reading(3, { value: "warm" }),
    long: reading(4, { _id: "x".repeat(2000) }),
  };
  put(
    mongo,
    ...Object.values(bad),
    ...Array.from({ length: 50 }, (_, i) => reading(i)),
    { _id: new Int32(17), status: "ingested" },
    { _id: "17", status: "ingested", "a.b": { $set: 1, "": null }, nul: "a\0b", nan: NaN },
    { _id: { device: "a", at: new Date(0) }, status: "ingested" },
  );
  const { code, said } = await all.run("sync", "--once");
  deepStrictEqual([code, said], [0, "57 read: 53 new, 0 replaced, 0 there before, 4 failed"]);
  deepStrictEqual(all.statuses(), { processed: 53, failed: 4 });
  const letters = await sql`
    select field, reason, document ->> 'device' as device, tries, length(bson) > 50 as bson
    from reading_failures order by document ->> 'seq'`;
  deepStrictEqual(letters.map(({ field }) => field), ["timestamp", "timestamp", "value", "_id"]);
  ok(letters.every(({ bson, tries, device }) => bson && tries === 1 && device), `${letters}`);
  const odd = await sql`
    select source_id, payload::text as payload from reading_analytics
    where length(source_id) < 20 or source_id like '{%' order by 1`;
  deepStrictEqual(odd.map(({ source_id }) => source_id), [
    '"17"',
    "17",
    '{"device":"a","at":{"$date":"1970-01-01T00:00:00.000Z"}}',
  ]);
  deepStrictEqual(decode(odd[0].payload)["a.b"], { $set: new Int32(1), "": null });
  strictEqual(decode(odd[0].payload).nul, "a\0b");
  ok(Number.isNaN(decode(odd[0].payload).nan.value));
  // One is mended in MongoDB, all are tried again.
  put(mongo, { ...bad.text, timestamp: new Date(), status: "failed" });
  mongo.collection("readings").delete(
    mongo.collection("readings").docs.get(String(bad.value._id))!,
  );
  const again = await all.run("replay");
  strictEqual(
    again.said,
    `3 put back to "ingested" in MongoDB
Of those no longer in MongoDB, or without it: 1 read: 0 new, 0 replaced, 0 there before, 1 failed
3 read: 1 new, 0 replaced, 0 there before, 2 failed`,
  );
  deepStrictEqual(all.statuses(), { processed: 54, failed: 2 });
  // The transform is mended: the one that MongoDB has no longer is taken from its letter.
  await sql.unsafe(`
    create or replace function public.transform_reading(source text, source_id text, payload jsonb)
    returns table ("time" timestamptz, device text, metric text, value float8, unit text)
    language sql stable
    as 'select now(), null::text, null::text, null::float8, null::text'`);
  const mended = await all.run("replay", "--reason", "value");
  match(mended.said, /1 read: 1 new/);
  deepStrictEqual(
    [...await sql`select field from reading_failures order by 1`].map(({ field }) => field),
    ["_id", "timestamp"],
  );
  strictEqual((await all.run("replay", "--id", "nobody")).said, "There is no such failed reading");
});

Deno.test("a document that others change meanwhile is taken as they leave it", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const documents = Array.from({ length: 30 }, (_, i) => reading(i));
  put(mongo, ...documents);
  let turn = 0;
  mongo.before = (command, body) => {
    if (command !== "update" || !body.updates[0].q._id.$in.length || turn++) return;
    // Between its being read and its being marked.
    put(
      mongo,
      { ...documents[3], value: new Double(-3) },
      { ...documents[4], value: new Double(-4), status: "cancelled" },
    );
    const own = mongo.collection("readings");
    own.delete(own.docs.get(String(documents[5]._id))!);
  };
  const { code } = await all.run("sync", "--once");
  strictEqual(code, 0);
  const rows = await sql`
    select value from reading_analytics where payload @> '{"seq": 3}' or payload @> '{"seq": 4}'
    order by payload -> 'seq'`;
  // A status that is not "ingested" is no concern of the sync: what was read of it stays.
  deepStrictEqual(rows.map(({ value }) => value), [-3, 24]);
  deepStrictEqual(all.statuses(), { processed: 28, cancelled: 1 });
  strictEqual((await sql`select 1 from reading_analytics`).length, 30);
});

Deno.test("one document that cannot be taken or marked stops no other", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  put(
    mongo,
    reading(1, { _id: "" }),
    reading(3, { _id: { a: 1, b: 2 } }),
    reading(4, { _id: "refused" }),
    ...Array.from({ length: 20 }, (_, i) => reading(i)),
  );
  for (const { bson } of mongo.collection("readings").docs.values()) {
    const twice = Buffer.from(bson).indexOf("\x10b\0\x02");
    if (twice > 0) bson[twice + 1] = "a".charCodeAt(0);
  }
  mongo.before = (command, body) =>
    command === "update" && JSON.stringify(body.updates).includes("refused")
      ? MongoStandIn.fault(121, "DocumentValidationFailure")
      : undefined;
  const { code, said } = await all.run("sync", "--once");
  strictEqual(code, 0, said);
  match(said, /Leaves "refused" of "testdb\.readings" alone: MongoDB refuses to mark it/);
  const letters = await sql`
    select source_id, reason from reading_failures order by reason collate "C"`;
  deepStrictEqual(letters.map(({ reason }) => reason), [
    "MongoDB refuses to mark it: DocumentValidationFailure",
    "_id has a name that is there twice",
  ]);
  match(letters[1].source_id, /^\{"\$sha256":"[0-9a-f]{64}"\}$/);
  const rows = await sql`
    select source_id from reading_analytics where length(source_id) < 20 order by 1`;
  deepStrictEqual(rows.map(({ source_id }) => source_id), ['""', "refused"]);
  strictEqual(all.statuses().processed, 21);
});

Deno.test("what a dead worker had marked comes again, whatever its _id is", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const ids = [
    new ObjectId(),
    Long.fromString("9007199254740993"),
    "sha256:abcd",
    "x".repeat(2000),
  ];
  for (const _id of [...ids, { sensor: "a", "7": 2 }]) {
    const document = reading(1, { _id, status: "processed" });
    put(mongo, document);
    encoder.scan(serialize(document));
    await sql`
      insert into pgpulse.reading_claims (source, worker, ids)
      values ('testdb.readings', 'dead', ${[encoder.rawId().key]})`;
  }
  const { code, said } = await all.run("sync", "--once");
  strictEqual(code, 0, said);
  match(said, /5 read: 4 new, 0 replaced, 0 there before, 1 failed/);
  deepStrictEqual(all.statuses(), { processed: 4, failed: 1 });
});

Deno.test("17 that is deleted and put again as 17.0 meanwhile is taken as 17.0", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  put(mongo, reading(1, { _id: new Int32(17), value: 1 }));
  let turn = 0;
  mongo.before = (command, body) => {
    if (command !== "update" || !body.updates[0].q._id.$in?.length || turn++) return;
    const own = mongo.collection("readings");
    for (const stored of own.docs.values()) own.delete(stored);
    put(mongo, reading(1, { _id: new Double(17), value: 2 }));
  };
  strictEqual((await all.run("sync", "--once")).code, 0);
  deepStrictEqual(
    [...await sql`select source_id, value from reading_analytics`],
    [{ source_id: "17", value: 2 }],
  );
  deepStrictEqual(all.statuses(), { processed: 1 });
});

Deno.test("replay takes no old letter over what came since, and none stops the others", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const twice = Buffer.from(serialize({ _id: "b", key1: 1, key2: 2 }));
  twice[twice.indexOf("key2") + 3] = "1".charCodeAt(0);
  for (const [id, bson] of [["b", twice], ["c", null], ["d", null]] as const) {
    await sql`
      insert into reading_failures (source, source_id, reason, document, bson)
      values ('testdb.readings', ${id}, 'bad', ${bson ? null : sql.json({ value: 1 })}, ${
      bson ?? Buffer.from(serialize({ _id: id, value: 1 }))
    })`;
  }
  put(mongo, reading(1, { _id: "c", status: "processed", value: 2 }));
  const { code, said } = await all.run("replay");
  strictEqual(code, 1);
  match(said, /^1 left alone: they are another's, or have another status\n.*1 new.* 1 failed$/);
  const rows = await sql`select source_id from reading_analytics`;
  deepStrictEqual(rows.map(({ source_id }) => source_id), ["d"]);
  mongo.stop();
  match((await all.run("replay")).said, /^Cannot use MongoDB at .*nothing listens there/);
});

Deno.test("a session of PostgreSQL that ends while MongoDB is asked is no more than a trouble", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  put(mongo, reading(1));
  let ended = 0;
  mongo.before = async (command) => {
    if (command !== "find" || ended) return;
    ended = (await sql`
      select pg_terminate_backend(pid) from pg_stat_activity
      where application_name = 'pgpulse etl' and datname = current_database()`).length;
    await new Promise((done) => setTimeout(done, 300));
  };
  const { code, said } = await all.run("sync", "--once");
  deepStrictEqual([code, ended > 0], [0, true], said);
  deepStrictEqual(all.statuses(), { processed: 1 });
});

Deno.test("several collections of a replica set share it; the flow counts each document", async () => {
  await using all = await sides({ replicaSet: true });
  const { sql, mongo } = all;
  const names = Array.from({ length: 8 }, (_, i) => `readings${i}`);
  const flags = names.flatMap((name) => ["--collection", name]);
  await using _ = await all.etl("sync", "--batch", "20", ...flags);
  await until("it watches", () => mongo.commands.get("aggregate")! >= 8);
  for (let seq = 0; seq < 3000; seq++) {
    mongo.collection(names[seq % 8]).put(reading(seq));
    if (seq % 20 === 0) await new Promise((done) => setTimeout(done, 40));
  }
  await until("the flow has all of them", async () => {
    const [{ read }] = await sql`select coalesce(sum(read), 0)::int as read from reading_flow`;
    ok(read <= 3000);
    return read === 3000;
  }, 20_000);
});

Deno.test("a user that may not write is told so once, and nothing is taken", async () => {
  await using all = await sides();
  put(all.mongo, reading(1));
  all.mongo.readOnly = true;
  for (const args of [["sync", "--once"], ["sync"]]) {
    const { code, said } = await all.run(...args);
    strictEqual(code, 1);
    match(said, /may not update; the sync reads and updates: grant it readWrite/);
    strictEqual(said.match(/may not/g)!.length, 1, said);
  }
  strictEqual((await all.sql`select 1 from reading_analytics`).length, 0);
});

Deno.test("where it may make no index it says so once, and works", async () => {
  await using all = await sides();
  put(all.mongo, reading(1), reading(2));
  all.mongo.mayIndex = false;
  const { code, said } = await all.run("sync", "--once", "--batch", "1");
  strictEqual(code, 0);
  strictEqual(said.match(/Cannot make an index on "testdb\.readings"/g)?.length, 1, said);
  match(said, /db\.readings\.createIndex\(\{ status: 1, _id: 1 \}\)/);
  match(said, /2 read: 2 new/);
});

Deno.test("MongoDB and PostgreSQL away in turn: it waits, says so once, goes on", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  await using sync = await all.etl("sync", "--batch", "10");
  await sync.said(/Syncs testdb\.readings/);
  const arrived = (n: number) =>
    until(`${n} are there`, async () => {
      const rows = await sql`select 1 from reading_analytics`.catch(() => []);
      return rows.length === n && all.statuses().processed === n;
    }, 40_000);
  put(mongo, ...Array.from({ length: 25 }, (_, i) => reading(i)));
  await arrived(25);
  mongo.stop();
  await sync.said(/Cannot use MongoDB at "127\.0\.0\.1:\d+": nothing listens there/, 30_000);
  put(mongo, ...Array.from({ length: 25 }, (_, i) => reading(i)));
  mongo.start();
  await arrived(50);
  await sync.said(/The sync works again/);
  await server.kill();
  put(mongo, ...Array.from({ length: 25 }, (_, i) => reading(i)));
  await sync.said(/Cannot use "127\.0\.0\.1:\d+": /, 30_000);
  await server.start();
  await arrived(75);
  // A failover: connections break, and for a while there is no primary.
  let refused = 0;
  mongo.before = (command) =>
    /update|find/.test(command) && refused++ < 5
      ? MongoStandIn.fault(10107, "NotWritablePrimary")
      : undefined;
  put(mongo, ...Array.from({ length: 25 }, (_, i) => reading(i)));
  mongo.hangUp();
  await arrived(100);
  strictEqual(
    sync.count(/^Cannot use MongoDB at .* nothing listens there/),
    1,
    sync.log.join("\n"),
  );
  strictEqual(await sync.end("SIGTERM"), 0);
  const [{ claims, runs }] = await sql`
    select (select count(*)::int from pgpulse.reading_claims) as claims,
      (select count(*)::int from sync_runs where ended is not null) as runs`;
  deepStrictEqual({ claims, runs }, { claims: 0, runs: 1 });
});

Deno.test("kill -9 of three workers at random moments: every document once", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  const some = random(6);
  const total = 6000;
  const workers = new Set<Background>();
  const start = async () => void workers.add(await all.etl("sync", "--batch", "50"));
  await Promise.all([start(), start(), start()]);
  const documents: Any[] = [];
  for (let crash = 0; crash < 12; crash++) {
    const most = Math.min(total, documents.length + total / 12);
    while (documents.length < most) {
      documents.push(reading(documents.length));
      put(mongo, documents.at(-1));
    }
    // Applications change documents all the time, also those in hand.
    for (let left = 100 + some() * 900; left > 0; left -= 20) {
      for (let n = 0; n < 10; n++) {
        const seq = Math.floor(some() * documents.length);
        put(mongo, documents[seq] = { ...documents[seq], value: new Double(Math.random()) });
      }
      await new Promise((done) => setTimeout(done, 20));
    }
    const [victim] = [...workers].sort(() => some() - 0.5);
    workers.delete(victim);
    await victim.end("SIGKILL");
    await start();
  }
  await until("all are there", () => all.statuses().processed === total, 90_000);
  const claims = () => sql`select 1 from pgpulse.reading_claims`;
  await until("nothing is in hand", async () => !(await claims()).length, 30_000);
  for (const worker of workers) strictEqual(await worker.end("SIGTERM"), 0, worker.log.join("\n"));
  const [counted] = await sql`
    select count(*)::int as rows, count(distinct source_id)::int as ids,
      count(distinct payload -> 'seq')::int as seqs,
      (select count(*)::int from reading_keys) as keys,
      (select count(*)::int from reading_failures) as failures
    from reading_analytics`;
  deepStrictEqual({ ...counted }, {
    rows: total,
    ids: total,
    seqs: total,
    keys: total,
    failures: 0,
  });
  deepStrictEqual(all.statuses(), { processed: total });
  const rows = await sql`
    select source_id, value from reading_analytics order by (payload ->> 'seq')::int`;
  deepStrictEqual(
    rows.map(({ source_id, value }) => [source_id, value]),
    documents.map(({ _id, value }) => [String(_id), value.value]),
  );
});

Deno.test("change streams wake it where the server has them", async () => {
  await using all = await sides({ replicaSet: true });
  const { sql, mongo } = all;
  await using _ = await all.etl("sync");
  await until("it watches", () => mongo.commands.get("aggregate"));
  await using client = new MongoClient(mongo.uri);
  const readings = client.db().collection<Any>("readings");
  // Pauses have grown: so many looks would take half a minute.
  await until("it has become quiet", () => mongo.commands.get("find")! > 8, 30_000);
  for (let i = 0; i < 5; i++) {
    await readings.insertOne(reading(i));
    await until("it is there", async () => (await sql`select 1 from reading_analytics`).length > i);
  }
  const { matchedCount } = await readings.updateOne({ seq: 3 }, {
    $set: { status: "ingested", value: 1 },
  });
  strictEqual(matchedCount, 1);
  await until(
    "it is replaced",
    async () => (await sql`select 1 from reading_analytics where value = 1`).length === 1,
  );
});

Deno.test("Ctrl-C finishes the batch in hand", async () => {
  await using all = await sides();
  const { sql, mongo } = all;
  put(mongo, ...Array.from({ length: 5000 }, (_, i) => reading(i)));
  mongo.slow = 30;
  const sync = await all.etl("sync", "--once", "--batch", "100");
  await until("some are taken", () => all.statuses().processed > 300);
  strictEqual(await sync.end("SIGINT"), 1, sync.log.join("\n"));
  match(sync.log.join("\n"), /Stopped before all was done/);
  const [{ rows, claims }] = await sql`
    select (select count(*)::int from reading_analytics) as rows,
      (select count(*)::int from pgpulse.reading_claims) as claims`;
  deepStrictEqual([rows, claims], [all.statuses().processed, 0]);
  ok(rows < 5000);
});

Deno.test("a wrong command line or address is told in one line, without secrets", async () => {
  await using all = await sides();
  const cases: [string[], RegExp][] = [
    [["sync", "--batch", "0"], /Cannot take --batch "0": give a whole number from 1 to 10000/],
    [
      ["sync", "--source", "readings"],
      /Cannot take --source "readings": give database\.collection/,
    ],
    [["walk"], /Cannot do "walk": say sync, serve or replay/],
    [["sync", "--every"], /Cannot read the command line: Unknown option "--every"/],
  ];
  for (const [args, expected] of cases) {
    const { code, said } = await all.run(...args);
    strictEqual(code, 2);
    match(said, expected);
    doesNotMatch(said, /^\s+at /m);
  }
  const wrong = await background("etl", ["sync", "--once"], {
    ...all.env,
    MONGO_URI: "mongodb:/secret:word@host",
  });
  strictEqual(await wrong.end(null), 1);
  match(wrong.log.join("\n"), /Cannot read MONGO_URI: .*expected mongodb:\/\/user:password@host/);
  doesNotMatch(wrong.log.join("\n"), /secret/);
});

Deno.test("generate readings writes documents, each once, and the sync takes them", async () => {
  await using all = await sides();
  const generate = async (...args: string[]) => {
    const child = await background("generate", ["readings", ...args], all.env);
    strictEqual(await child.end(null), 0, child.log.join("\n"));
    return child.log.at(-1)!;
  };
  match(await generate("--backfill", "2m", "--interval", "1s", "--sensors", "10"), /^Wrote 1,200 /);
  const { size } = all.mongo.collection("readings").docs;
  match(
    await generate("--backfill", "1m", "--interval", "1s", "--sensors", "10"),
    /; \d+ were there already$/,
  );
  ok(all.mongo.collection("readings").docs.size < size + 600);
  match(await generate("--count", "2", "--interval", "1s", "--sensors", "3"), /^Wrote [3-6] /);
  strictEqual((await all.run("sync", "--once")).code, 0);
  const [{ devices, rows }] = await all.sql`
    select count(distinct device)::int as devices, count(*)::int as rows from reading_analytics`;
  deepStrictEqual([devices, rows], [10, all.statuses().processed]);
});

const real = await realMongo();
Deno.test({
  name: `a real server takes part${real.uri ? "" : `: skipped, ${real.without}`}`,
  ignore: !real.uri,
  async fn() {
    await using all = await sides();
    const own = `readings_${crypto.randomUUID().slice(0, 8)}`;
    await using server = await real.start!();
    await using client = new MongoClient(server.uri);
    const readings = client.db("pgpulse_test").collection<Any>(own);
    const sync = async () => {
      const env = { ...all.env, MONGO_URI: server.uri };
      const flags = ["--once", "--batch", "100", "--source", `pgpulse_test.${own}`];
      const child = await background("etl", ["sync", ...flags], env);
      return [await child.end(null), child.log.filter((line) => !/ %, /.test(line)).join("\n")];
    };
    try {
      await readings.insertMany(Array.from({ length: 250 }, (_, i) => reading(i)));
      await readings.insertMany([
        reading(7, { timestamp: "tomorrow" }),
        { _id: 17, status: "ingested" },
        { _id: "17", status: "ingested", nested: [[{ deep: Decimal128.fromString("1.10") }]] },
      ]);
      deepStrictEqual(await sync(), [
        0,
        "253 read: 252 new, 0 replaced, 0 there before, 1 failed",
      ]);
      await readings.updateMany({ seq: { $lt: 3 } }, { $set: { status: "ingested", value: -1 } });
      deepStrictEqual(await sync(), [0, "3 read: 0 new, 3 replaced, 0 there before, 0 failed"]);
      strictEqual(await readings.countDocuments({ status: "processed" }), 252);
      strictEqual(await readings.countDocuments({ status: "failed" }), 1);
      strictEqual((await all.sql`select 1 from reading_analytics where value = -1`).length, 3);
    } finally {
      await readings.drop();
    }
  },
});

Deno.test("who joins a sync over HTTP gets that run, and nothing is missed", async () => {
  await using all = await sides();
  const { mongo } = all;
  await using api = await all.etl("serve", "--port", "0", "--rate", "0");
  const [url] = /http:\S+/.exec(await api.said(/^Serves readings/, 30_000))!;
  const begin = async (query = "") => {
    const response = await fetch(`${url}api/sync/reading${query}`, { method: "POST" });
    const { id, ended } = await response.json();
    return { status: response.status, id, ended };
  };
  mongo.slow = 5;
  let last = 0;
  for (let i = 0; i < 2; i++) {
    put(mongo, ...Array.from({ length: 100 }, (_, seq) => reading(seq)));
    const both = await Promise.all([begin("?wait=false"), begin("?wait=false")]);
    const [{ id }] = both;
    deepStrictEqual(both, Array(2).fill({ status: 202, id, ended: null }));
    ok(id > last);
    last = id;
    await begin();
  }
  // Whatever was there before a call is taken when it returns.
  await Promise.all([0, 1, 2].map(async (lane) => {
    for (let i = 0; i < 8; i++) {
      const document = reading(lane);
      put(mongo, document);
      strictEqual((await begin()).status, 200);
      const stored = mongo.collection("readings").docs.get(String(document._id));
      strictEqual(stored?.status, "processed");
    }
  }));
});

/**
 * Moves readings from MongoDB into PostgreSQL, each exactly once, and serves them over HTTP.
 *
 *     deno task etl sync
 *     deno task etl serve --sync
 *
 * which is short for
 *
 *     deno run --no-prompt --allow-net --allow-read --allow-sys=hostname --allow-env \
 *         scripts/etl.ts COMMAND
 *
 * (the driver of MongoDB reads the environment for the clouds that it knows).
 *
 * Needs PostgreSQL 15 or newer with `deno task migrate`, and the role server; for the sync MongoDB
 * 4.4 or newer, and a user that may read and update the collection.
 * Costs five connections to MongoDB, one more for each collection, and four to PostgreSQL, eight more
 * for serve; 100 MB of memory, up to 1 GB where documents come near their limit of 16 MB.
 *
 * How the sync works. A batch of documents is claimed, which is a row in PostgreSQL; read; written
 * to PostgreSQL; marked in MongoDB; read again, and those that changed meanwhile are put back; then
 * the claim goes. The claim of a worker that died is put back whole: what was taken is then taken
 * again, which the key (source, source_id) makes harmless. So there are no positions to keep, and
 * a crash between any two steps loses nothing and doubles nothing. What is left: MongoDB knows no
 * claims, so a worker that is frozen for longer than its lease just before it marks, marks when it
 * wakes; if it is killed before it has read again, a change of these milliseconds is not seen.
 */
import { Buffer } from "node:buffer";
import { createHash, timingSafeEqual } from "node:crypto";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { hostname } from "node:os";
import { pipeline } from "node:stream/promises";
import { setTimeout as setTimer } from "node:timers/promises";
import { parseArgs } from "node:util";
import type { Context } from "npm:hono@4.13.19";
import { cors } from "npm:hono@4.13.19/cors";
import {
  BSON,
  MongoClient,
  MongoError,
  MongoNetworkError,
  MongoServerError,
  MongoServerSelectionError,
} from "npm:mongodb@7.9.0";
import postgres from "npm:postgres@3.4.9";
import { OpenAPIHono, type RouteConfig, z } from "npm:@hono/zod-openapi@1.6.3";

/** A worker that gave no sign of life for so long is dead. */
const LEASE_S = 15;

const HELP = `etl: documents of MongoDB in PostgreSQL, and over HTTP

Usage: etl.ts sync [--once] [flags]
       etl.ts serve [--sync] [flags]
       etl.ts replay [--source NAME] [--id ID] [--reason TEXT]

Commands
  sync     takes documents with status "ingested" into reading_analytics, and then sets them
           "processed"; what cannot be taken is set "failed", and kept with the reason in
           reading_failures. Any number of these share the work
  serve    answers HTTP; with --sync it syncs all the time, too
  replay   takes failed readings again: all, or those that the flags name

Flags of sync
  --once             takes all that waits, and ends; exit status 1 when something went wrong
  --collection NAME  in the database of MONGO_URI (default: readings); repeat it for more
  --source DB.NAME   a collection of any database; repeat it for more
  --batch N          documents a batch, 1 to 10000 (default: 1000)
  --worker NAME      name in claims and runs; a few characters are added, that make it one
                     (default: that of this machine)

Flags of serve, besides those of sync
  --sync             syncs all the time
  --port N           where it listens (default: PORT, else 8085)
  --bind ADDRESS     address to listen at (default: 127.0.0.1; with API_TOKEN everywhere)
  --cors ORIGIN      lets pages of that origin read answers; repeat it for more; * is any
                     (default: API_CORS, with commas)
  --rate N           requests a second for each address, so for all behind a proxy together;
                     0: any number (default: API_RATE, else 100)

Flags of replay
  --source DB.NAME   those of this source; repeat it for more
  --id ID            the one of this source_id
  --reason TEXT      those whose reason contains this

  --help             this text

Environment
  MONGO_URI          mongodb://user:password@host:27017/database (default database: testdb)
  DATABASE_URL       postgres://server:password@host:5432/database?sslmode=verify-full, or else
  DB_HOST, DB_PORT, DB_NAME, DB_USER, DB_PASSWORD, DB_SSLMODE, DB_SSLROOTCERT
                     (localhost, 5432, testdb, server, none, prefer, none)
  API_TOKEN          asked for by all of HTTP but the welcome and health: Authorization: Bearer
A pooler in transaction mode will do: say ?pgbouncer=true in its URL.

Serves: /                    the welcome; to a browser a page that shows how it is
        /api/reading         GET: readings as JSON, NDJSON or CSV (Accept), the newest first, by source,
                             from, to, payload or payload.a.b, limit, cursor (next of the page before)
                             POST: takes {"readings":[{"id":"1","payload":{...}}]}; again is no harm.
                             Who may POST may replace any reading, those of MongoDB ("source"), too
        /api/reading/ID      one of them
        /api/sync/reading    GET or POST: syncs and counts; ?wait=false: answers at once with the run
        /api/sync/runs       what was synced, and when; /ID: one of them
        /healthz             200 while it works; says what it cannot reach; also /server/health
        /metrics             for Prometheus
        /openapi.json        all of this, for programs

A document becomes one row: its key is (source, source_id). source is database.collection. source_id
is the 24 hex digits of an ObjectId, or a string as it is; a string that is empty, reads as JSON or as
24 hex digits, or has control characters, and any other _id, is its JSON: 17, "17", {"device":"a"}.
17.0 is 17, as it is for MongoDB (but not as Decimal128, nor within a document). What is longer than
1024 bytes, or cannot be text, is {"$sha256":"..."}, and a dead letter. A document that comes again with
other content replaces its row. Columns are derived by the function public.transform_reading, which is
yours to replace; payload is the whole document as it was read.

JSON is relaxed Extended JSON (v2) of MongoDB, and loses nothing but the order of fields:
  a number          whole doubles with a point (17.0), whole numbers without, at full length
  NaN, Infinity, -0 {"$numberDouble":"NaN"}        Decimal128  {"$numberDecimal":"1.10"}
  ObjectId          {"$oid":"..."}                 Date        {"$date":"2026-11-22T12:00:00.000Z"}
  Binary            {"$binary":{"base64":"...","subType":"00"}}, and so on
  a string with NUL, or that is no UTF-8           {"$string":"base64 of its bytes"}
  a name that begins with $                        has one $ more; dots stay as they are

Kill -9 is safe at any moment: what a dead worker had in hand is taken again after ${LEASE_S} s,
which the key makes harmless. Ctrl-C finishes the batch in hand. A database that is away is waited for.
Readings are kept for ever, as MongoDB says "processed" of them. To drop those whose time is past:
select pgpulse.add_storage('public.reading_analytics', 'time', keys => '{source}', keep => '1 year');
a backfill of what is older is then taken, and dropped.
A document that MongoDB refuses to mark, by a validator or a unique index, is taken, becomes a dead
letter, and is left alone until the sync starts anew.
Where the server has change streams they wake the sync, else it looks each 0.2 to 5 s.
It makes the index { status: 1, _id: 1 } where it may; without one each look reads the collection.

Cost: 100 MB of memory, up to 1 GB where documents come near their limit of 16 MB; four connections
to PostgreSQL, and eight for serve; to MongoDB five, and one for each collection.

Examples
  MONGO_URI=mongodb://localhost/testdb deno task etl sync --once
  deno task etl serve --sync --port 8085
  deno task etl sync --collection readings --collection alarms --batch 2000
  deno task etl replay --reason "time"
`;

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

const { Decimal128, ObjectId } = BSON;

// --- BSON as JSON --------------------------------------------------------------------------------

/** A document that cannot be JSON, or is no BSON; the message names the field. */
export class Unreadable extends Error {
  constructor(readonly field: string, reason: string) {
    super(`${field} ${reason}`);
  }
}

/** Deeper than MongoDB lets documents be. */
const DEEPEST = 500;
const HEX = "0123456789abcdef";
const BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const ascii = (text: string) => Uint8Array.from(text, (char) => char.charCodeAt(0));
/** The byte that follows a backslash; 1: as \u00xx; 0: nothing is to do. */
const ESCAPES = new Uint8Array(256).fill(1, 0, 32);
for (const [char, as] of ['""', "\\\\", "\bb", "\ff", "\nn", "\rr", "\tt"]) {
  ESCAPES[char.charCodeAt(0)] = as.charCodeAt(0);
}
const [HEX_CODES, BASE64_CODES] = [ascii(HEX), ascii(BASE64)];
const [ID, STATUS] = [ascii("_id\0"), ascii("status\0")];
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Where an element lies in its document: its type byte, its value, and the byte behind it. */
interface Place {
  at: number;
  value: number;
  end: number;
}

/**
 * Writes BSON as JSON, one document a line, as HELP documents. Bytes become bytes: making objects
 * of documents would cost five times as much.
 */
export class Encoder {
  #out = new Uint8Array(1 << 16);
  #length = 0;
  #in!: Uint8Array;
  #view!: DataView;
  /** Where the name of the field that it is at begins; 0: at none. */
  #name = 0;
  #strict = false;
  /** Of the last document. */
  id?: Place;
  status?: Place;

  /** The JSON of a document; never with a line break. */
  json(bson: Uint8Array): string {
    // What a big document took is given back.
    if (this.#out.length > 1 << 22) this.#out = new Uint8Array(1 << 16);
    for (const strict of [false, true]) {
      this.#strict = strict;
      this.#length = 0;
      this.#begin(bson);
      try {
        if (bson.length < 5 || this.#int(0) !== bson.length) this.#fail("is cut short");
        this.#document(0, bson.length, false, 0);
      } catch (error) {
        if (error instanceof RangeError) this.#fail("is cut short");
        throw error;
      }
      try {
        return utf8.decode(this.#out.subarray(0, this.#length));
      } catch {
        // Some string is no UTF-8: each is looked at, and that one is written as its bytes.
      }
    }
    return this.#fail("is no UTF-8");
  }

  /** Looks only where its id and its status are. */
  scan(bson: Uint8Array): void {
    this.#begin(bson);
    for (let at = 4; at < bson.length - 1;) {
      const value = this.#nul(at + 1, bson.length) + 1;
      const end = this.#end(bson[at], value, bson.length);
      if (this.#is(ID, at + 1)) this.id ??= { at, value, end };
      if (this.#is(STATUS, at + 1)) this.status ??= { at, value, end };
      at = end;
    }
  }

  /** The id of the last document, as the bytes that it is. */
  rawId(): RawId {
    if (!this.id) throw new Unreadable("_id", "is missing");
    const { at, value, end } = this.id;
    const bytes = new Uint8Array(1 + end - value);
    bytes[0] = this.#in[at];
    bytes.set(this.#in.subarray(value, end), 1);
    return new RawId(bytes);
  }

  /** The id of the last document, as text: see HELP. */
  idText(): string {
    if (!this.id) throw new Unreadable("_id", "is missing");
    const { at, value, end } = this.id;
    if (this.#in[at] === 1) {
      // For MongoDB 17.0 and 17 are one _id.
      const double = this.#view.getFloat64(value, true);
      if (Number.isInteger(double) && Math.abs(double) < 2 ** 63) return `${BigInt(double)}`;
    }
    this.#length = 0;
    this.#strict = true;
    this.#value(this.#in[at], value, end, 1);
    const json = utf8.decode(this.#out.subarray(0, this.#length));
    if (this.#in[at] === 7) return json.slice(9, 33);
    if (this.#in[at] !== 2 || json[0] !== '"') return json;
    const text = JSON.parse(json);
    return bare(text) ? text : json;
  }

  #begin(bson: Uint8Array): void {
    this.#in = bson;
    this.#view = new DataView(bson.buffer, bson.byteOffset, bson.byteLength);
    this.#name = 0;
    this.id = this.status = undefined;
  }

  #fail(reason: string): never {
    const field = this.#in.subarray(this.#name, this.#in.indexOf(0, this.#name));
    throw new Unreadable(this.#name ? new TextDecoder().decode(field) : "document", reason);
  }

  /** Whether such a name, with its NUL, stands there. */
  #is(name: Uint8Array, at: number): boolean {
    for (let i = 0; i < name.length; i++) if (this.#in[at + i] !== name[i]) return false;
    return true;
  }

  #int(at: number): number {
    return this.#view.getInt32(at, true);
  }

  #room(more: number): void {
    if (this.#length + more <= this.#out.length) return;
    const grown = new Uint8Array(Math.max(this.#out.length * 2, this.#length + more));
    grown.set(this.#out.subarray(0, this.#length));
    this.#out = grown;
  }

  /** Writes characters that need no escape. */
  #write(text: string): void {
    this.#room(text.length);
    for (let i = 0; i < text.length; i++) this.#out[this.#length++] = text.charCodeAt(i);
  }

  /** Writes a string that lies in the document; a name that begins with $ gets one more. */
  #string(from: number, to: number, name = false): void {
    const [bytes, length] = [this.#in, this.#length];
    this.#room(6 * (to - from) + 3);
    const out = this.#out;
    let n = length;
    out[n++] = 34;
    if (name && bytes[from] === 36) out[n++] = 36;
    for (let i = from; i < to; i++) {
      const byte = bytes[i];
      const escape = ESCAPES[byte];
      if (escape === 0) {
        out[n++] = byte;
      } else if (escape > 1) {
        out[n++] = 92;
        out[n++] = escape;
      } else if (byte) {
        out.set([92, 117, 48, 48, HEX_CODES[byte >> 4], HEX_CODES[byte & 15]], n);
        n += 6;
      } else return this.#odd(from, to);
    }
    if (this.#strict) {
      try {
        utf8.decode(bytes.subarray(from, to));
      } catch {
        return name ? this.#fail("has a name that is no UTF-8") : this.#odd(from, to);
      }
    }
    out[n++] = 34;
    this.#length = n;
  }

  /** A string that jsonb cannot hold: with NUL, or no UTF-8. */
  #odd(from: number, to: number): void {
    this.#write('{"$string":');
    this.#base64(from, to);
    this.#write("}");
  }

  #base64(from: number, to: number): void {
    this.#room(4 * Math.ceil((to - from) / 3) + 2);
    const [bytes, out] = [this.#in, this.#out];
    let n = this.#length;
    out[n++] = 34;
    for (let i = from; i < to; i += 3) {
      const three = bytes[i] << 16 | (i + 1 < to ? bytes[i + 1] << 8 : 0) |
        (i + 2 < to ? bytes[i + 2] : 0);
      out[n++] = BASE64_CODES[three >> 18];
      out[n++] = BASE64_CODES[three >> 12 & 63];
      out[n++] = i + 1 < to ? BASE64_CODES[three >> 6 & 63] : 61;
      out[n++] = i + 2 < to ? BASE64_CODES[three & 63] : 61;
    }
    out[n++] = 34;
    this.#length = n;
  }

  #hex(from: number, to: number): void {
    this.#room(2 * (to - from) + 2);
    this.#out[this.#length++] = 34;
    for (let i = from; i < to; i++) {
      this.#out[this.#length++] = HEX_CODES[this.#in[i] >> 4];
      this.#out[this.#length++] = HEX_CODES[this.#in[i] & 15];
    }
    this.#out[this.#length++] = 34;
  }

  /** Where the NUL of a name is. */
  #nul(from: number, end: number): number {
    const at = this.#in.indexOf(0, from);
    return at < 0 || at >= end ? this.#fail("is cut short") : at;
  }

  /** Where a string with a length before it ends; its bytes begin 4 behind `at`. */
  #stringEnd(at: number, end: number): number {
    const to = at + 3 + this.#int(at);
    if (to < at + 4 || to >= end || this.#in[to]) this.#fail("is cut short");
    return to;
  }

  /** Where the value of such a type ends. */
  #end(type: number, at: number, end: number): number {
    switch (type) {
      case 1: // double
      case 9: // date
      case 17: // timestamp
      case 18: // 64-bit integer
        return at + 8;
      case 2: // string
      case 13: // code
      case 14: // symbol
        return this.#stringEnd(at, end) + 1;
      case 3: // document
      case 4: // array
      case 15: // code with scope
        return at + Math.max(5, this.#int(at));
      case 5: // binary
        return at + 5 + Math.max(0, this.#int(at));
      case 7: // ObjectId
        return at + 12;
      case 8: // boolean
        return at + 1;
      case 16: // 32-bit integer
        return at + 4;
      case 19: // Decimal128
        return at + 16;
      case 11: // regular expression
        return this.#nul(this.#nul(at, end) + 1, end) + 1;
      case 12: // pointer to a document
        return this.#stringEnd(at, end) + 13;
      case 6: // undefined
      case 10: // null
      case 127: // greatest of all
      case 255: // least of all
        return at;
      default:
        return this.#fail(`is of an unknown BSON type, ${type}`);
    }
  }

  #document(from: number, end: number, array: boolean, depth: number): void {
    if (depth > DEEPEST) this.#fail(`is nested deeper than ${DEEPEST}`);
    if (this.#in[end - 1]) this.#fail("is cut short");
    this.#write(array ? "[" : "{");
    const names = new Names(this.#in);
    let at = from + 4;
    for (let first = true; at < end - 1; first = false) {
      const begin = at;
      const type = this.#in[at++];
      const name = at;
      while (this.#in[at]) at++;
      if (at >= end) this.#fail("is cut short");
      const value = at + 1;
      const to = this.#end(type, value, end);
      // The names of an array are its numbers: they go without saying.
      if (!first) this.#write(",");
      if (!array) {
        if (depth === 0) {
          this.#name = name;
          if (this.#is(ID, name)) this.id = { at: begin, value, end: to };
          if (this.#is(STATUS, name)) this.status = { at: begin, value, end: to };
        }
        if (names.twice(name, at)) this.#fail("has a name that is there twice");
        this.#string(name, at, true);
        this.#write(":");
      }
      if (to >= end) this.#fail("is cut short");
      this.#value(type, value, to, depth + 1);
      at = to;
    }
    if (at !== end - 1) this.#fail("is cut short");
    this.#write(array ? "]" : "}");
  }

  #value(type: number, at: number, to: number, depth: number): void {
    const view = this.#view;
    switch (type) {
      case 1:
        return this.#double(view.getFloat64(at, true));
      case 2:
        return this.#string(at + 4, to - 1);
      case 3:
      case 4:
        return this.#document(at, to, type === 4, depth);
      case 5:
        return this.#binary(at, to);
      case 6:
        return this.#write('{"$undefined":true}');
      case 7:
        this.#write('{"$oid":');
        this.#hex(at, to);
        return this.#write("}");
      case 8:
        return this.#write(this.#in[at] ? "true" : "false");
      case 9:
        return this.#date(Number(view.getBigInt64(at, true)), at);
      case 10:
        return this.#write("null");
      case 11: {
        const options = this.#nul(at, to) + 1;
        this.#write('{"$regularExpression":{"pattern":');
        this.#string(at, options - 1);
        this.#write(',"options":');
        this.#string(options, to - 1);
        return this.#write("}}");
      }
      case 12:
        this.#write('{"$dbPointer":{"$ref":');
        this.#string(at + 4, to - 13);
        this.#write(',"$id":');
        this.#value(7, to - 12, to, depth);
        return this.#write("}}");
      case 13:
      case 14:
        this.#write(type === 13 ? '{"$code":' : '{"$symbol":');
        this.#string(at + 4, to - 1);
        return this.#write("}");
      case 15: {
        const scope = this.#stringEnd(at + 4, to) + 1;
        this.#write('{"$code":');
        this.#string(at + 8, scope - 1);
        this.#write(',"$scope":');
        this.#document(scope, to, false, depth);
        return this.#write("}");
      }
      case 16:
        return this.#write(`${this.#int(at)}`);
      case 17:
        this.#write(`{"$timestamp":{"t":${view.getUint32(at + 4, true)},`);
        return this.#write(`"i":${view.getUint32(at, true)}}}`);
      case 18: {
        const high = view.getInt32(at + 4, true);
        // Up to 2^52 a double is exact, and quicker.
        const small = high >= -0x100000 && high < 0x100000;
        return this.#write(
          `${small ? high * 2 ** 32 + view.getUint32(at, true) : view.getBigInt64(at, true)}`,
        );
      }
      case 19: {
        const text = new Decimal128(this.#in.slice(at, to)).toString();
        return this.#write(`{"$numberDecimal":"${text}"}`);
      }
      default:
        return this.#write(type === 127 ? '{"$maxKey":1}' : '{"$minKey":1}');
    }
  }

  #double(value: number): void {
    const text = Object.is(value, -0) ? "-0.0" : `${value}`;
    if (text === "-0.0" || !Number.isFinite(value)) {
      return this.#write(`{"$numberDouble":"${text}"}`);
    }
    this.#write(text);
    // jsonb keeps the places behind the point: so whole doubles stay what they are.
    if (Number.isInteger(value) && !text.includes("e")) this.#write(".0");
  }

  #date(ms: number, at: number): void {
    if (ms >= 0 && ms < 253402300800000) {
      return this.#write(`{"$date":"${new Date(ms).toISOString()}"}`);
    }
    this.#write(`{"$date":{"$numberLong":"${this.#view.getBigInt64(at, true)}"}}`);
  }

  #binary(at: number, to: number): void {
    const kind = this.#in[at + 4];
    // The old kind has its length twice.
    const from = kind === 2 ? at + 9 : at + 5;
    if (kind === 2 && (from > to || this.#int(at + 5) !== to - from)) this.#fail("is cut short");
    this.#write('{"$binary":{"base64":');
    this.#base64(from, to);
    this.#write(`,"subType":"${HEX[kind >> 4]}${HEX[kind & 15]}"}}`);
  }
}

/** The names of an object that were met, as jsonb would keep but the last of two. */
class Names {
  #hashes: number[] = [];
  #places: number[] = [];
  #seen?: Set<string>;

  constructor(readonly bytes: Uint8Array) {}

  twice(from: number, to: number): boolean {
    const { bytes } = this;
    if (this.#hashes.length === 24) {
      const name = (at: number) => String(bytes.subarray(at, bytes.indexOf(0, at)));
      this.#seen ??= new Set(this.#places.map(name));
      return this.#seen.size === this.#seen.add(name(from)).size;
    }
    let hash = to - from;
    for (let i = from; i < to; i++) hash = Math.imul(hash, 31) + bytes[i] | 0;
    for (let i = 0; i < this.#hashes.length; i++) {
      if (this.#hashes[i] !== hash) continue;
      let n = 0;
      while (from + n < to && bytes[this.#places[i] + n] === bytes[from + n]) n++;
      if (from + n === to && bytes[this.#places[i] + n] === 0) return true;
    }
    this.#hashes.push(hash);
    this.#places.push(from);
    return false;
  }
}

/** Whether such an id of type string stands bare: no other id's text is the same. */
function bare(text: string): boolean {
  // deno-lint-ignore no-control-regex -- they are what is looked for
  if (/^$|^[0-9a-f]{24}$|[\x00-\x1f]/.test(text)) return false;
  try {
    JSON.parse(text);
    return false;
  } catch {
    return true;
  }
}

// --- the sync ------------------------------------------------------------------------------------

/** What was done with documents, in numbers. */
export interface Counts {
  /** Read from the source. */
  read: number;
  /** New in PostgreSQL. */
  taken: number;
  /** There before, with other content. */
  replaced: number;
  /** There before, just so. */
  same: number;
  failed: number;
}

/** One run of the sync, as pgpulse.sync_runs keeps it. */
export interface Run extends Counts {
  id: number;
  trigger: string;
  /** ISO 8601. */
  started: string;
  ended: string | null;
  error: string | null;
}

export interface SyncStatus {
  worker: string;
  /** Runs all the time. */
  continuous: boolean;
  /** A run is in progress. */
  running: boolean;
  mongo: "up" | "away";
  /** What holds it up. */
  trouble: string | null;
  /** The run in progress, else the last one. */
  run: Run | null;
  sources: { source: string; backlog: number | null; lag_seconds: number | null }[];
}

export interface Sync {
  /**
   * Takes all that waits; joins the run in progress where there is one. `begun` is told at once
   * which run it is. Where a side is away, the run ends with `error`; nothing is thrown.
   */
  once(trigger: string, begun?: (run: Run) => void): Promise<Run>;
  status(): SyncStatus;
}

/** Settings of a sync. */
export interface SyncOptions {
  uri: string;
  /** As database.collection. */
  sources: string[];
  batch: number;
  worker: string;
}

/** Batches in hand at a time: one is read, one written, one marked. */
const LANES = 3;
/** Pauses between looks, where nothing wakes it; they grow. */
const [SHORTEST, LONGEST] = [200, 5_000];
/** pgpulse.take_readings takes no longer ids. */
const LONGEST_ID = 1024;

/** Ids in hand, at most so many bytes of them: a command of MongoDB has 16 MB. */
const MOST_IDS = 4 * 2 ** 20;

const NO_ID = new Uint8Array(12);

/** An _id as the bytes that it is: objects of JavaScript would change some, as {"a":1,"7":2}. */
export class RawId extends ObjectId {
  /** Its type and its value. */
  constructor(readonly bytes: Uint8Array) {
    super(NO_ID);
  }

  static of(key: string): RawId {
    return new RawId(Buffer.from(key, "hex"));
  }

  /** What claims have of it. */
  get key(): string {
    return Buffer.from(this.bytes.buffer, this.bytes.byteOffset, this.bytes.length).toString("hex");
  }

  /** So the driver writes an ObjectId; its type, 7, is there already, before its name. */
  serializeInto(out: Uint8Array, at: number): number {
    let type = at - 2;
    while (out[type] !== 7) type--;
    out[type] = this.bytes[0];
    out.set(this.bytes.subarray(1), at);
    return this.bytes.length - 1;
  }
}

interface Item {
  id: string;
  _id: RawId;
  bson: Uint8Array;
  status?: Place;
  json: string;
  failure?: { reason: string; field: string | null };
}

/** What was claimed together. */
interface Batch {
  source: string;
  claim: string;
  ids: RawId[];
}

/** A document, as far as the sync knows. */
interface Ingested {
  _id: InstanceType<typeof ObjectId>;
  status: string;
}

const none = (): Counts => ({ read: 0, taken: 0, replaced: 0, same: 0, failed: 0 });

const add = (sum: Counts, more: Counts) => {
  for (const name of Object.keys(none()) as (keyof Counts)[]) sum[name] += more[name];
};

const sleep = (ms: number, signal?: AbortSignal): Promise<void> =>
  setTimer(ms, undefined, { signal }).catch(() => {});

const same = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

/** Whether it is the document that was read, but for its status. */
function unchanged({ bson, status }: Item, now: Uint8Array): boolean {
  if (!status) return false;
  const { at, value, end } = status;
  const length = now.length >= value + 5 &&
    new DataView(now.buffer, now.byteOffset).getInt32(value, true);
  // All of it, from the length of the document, which differs, to the status; and behind that.
  return now[at] === 2 && same(bson.subarray(4, value), now.subarray(4, value)) &&
    same(bson.subarray(end), now.subarray(value + 4 + Number(length)));
}

/** Whether a side is away, and will be back. */
function away(error: unknown): boolean {
  const { code } = error as { code?: unknown };
  if (error instanceof MongoError) {
    return error instanceof MongoNetworkError || error instanceof MongoServerSelectionError ||
      /^Mongo(PoolCleared|WaitQueueTimeout|NotConnected|TopologyClosed|Operation)/.test(
        error.name,
      ) ||
      error.hasErrorLabel("RetryableWriteError") || MONGO_HEALS.has(Number(code));
  }
  return PG_HEALS.test(String(code));
}

/** Shutting down, stepped down, no primary, timeouts: another try may do. */
const MONGO_HEALS = new Set([
  ...[6, 7, 24, 50, 64, 89, 91, 112, 133, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436],
]);
const PG_HEALS = new RegExp(
  "^(08...|53...|57P0.|58...|40001|40P01|55000|25P0[34]|57014|CONNECT_TIMEOUT|CONNECTION_.*" +
    "|E(CONN.*|PIPE|TIMEDOUT|HOSTUNREACH|NETUNREACH|AI_AGAIN|NOTFOUND))$",
);

/** Whether MongoDB takes other updates, but not this one: a validator, a unique index. */
const refuses = (error: unknown): error is Error =>
  error instanceof MongoServerError && !away(error) && ![13, 18, 8000].includes(Number(error.code));

/** Says what went wrong with MongoDB, why that is likely, and what to do; never a secret. */
function explainMongo(error: unknown, client?: MongoClient): string {
  const hosts = client?.options.hosts.map(String).join() ?? "";
  const { code, message, cause } = error as { code?: number; message: string; cause?: Error };
  const at = `Cannot use MongoDB at "${hosts}"`;
  const user = client?.options.credentials?.username;
  if (code === 13) {
    const what = /command \{ (\w+)/.exec(message)?.[1] ?? "do this";
    return `${at}: ${
      user ? `"${user}"` : "its user"
    } may not ${what}; the sync reads and updates: ` +
      `grant it readWrite on the database`;
  }
  if (code === 18 || code === 8000) {
    return `${at}: user or password is wrong; correct MONGO_URI (authSource: where users are kept)`;
  }
  const deepest = `${message} ${cause?.message ?? ""}`;
  if (/ECONNREFUSED/.test(deepest)) {
    return `${at}: nothing listens there; start it or correct MONGO_URI`;
  }
  if (/ENOTFOUND|EAI_AGAIN/.test(deepest)) return `${at}: no such host; correct MONGO_URI`;
  if (error instanceof MongoServerSelectionError) {
    return `${at}: no server that takes writes answers; look at it, the network and MONGO_URI`;
  }
  return `${at}: ${message}`;
}

interface State {
  /** Where the next look begins; undefined: at the first. */
  after?: RawId;
  /** What was not there any more when it was to be read: it is not looked for twice. */
  missed: Set<string>;
  /** What MongoDB refuses to mark: it is left alone. */
  refused: Set<string>;
  flow: Counts;
  backlog: number | null;
  lag: number | null;
  /** When it was counted, and how long that took. */
  counted: number;
  took: number;
  /** Since when something waits. */
  since?: number;
  looks: number;
}

/** Moves documents; several of these, anywhere, share the work. */
export class Worker implements Sync {
  readonly client: MongoClient;
  readonly #sql: postgres.Sql;
  readonly #options: SyncOptions;
  readonly #stop: AbortSignal;
  readonly #sources = new Map<string, State>();
  readonly #encoder = new Encoder();
  /** The runs that count what is done. */
  readonly #runs = new Set<Run>();
  #last: Run | null = null;
  #once?: Promise<Run>;
  #begun = Promise.withResolvers<Run>();
  /** Somebody has joined the run since its last look began. */
  #joined = false;
  #draining?: Promise<number>;
  #again = false;
  #ready = false;
  #trouble: string | null = null;
  readonly #said = new Set<string>();
  #mongoAway = false;
  #continuous = false;
  /** Until when the lease is held, by performance.now(). */
  #leased = 0;
  #renewing?: ReturnType<typeof setInterval>;
  #wake?: () => void;
  #turn = 0;
  #claiming: Promise<unknown> = Promise.resolve();
  #recovered = -Infinity;
  /** The loop has ended, by a fault. */
  #ended = false;

  constructor(options: SyncOptions, sql: postgres.Sql, stop: AbortSignal) {
    this.#options = options;
    this.#sql = sql;
    this.#stop = stop;
    for (const source of options.sources) {
      this.#sources.set(source, {
        missed: new Set(),
        refused: new Set(),
        flow: none(),
        backlog: null,
        lag: null,
        counted: -Infinity,
        took: 0,
        looks: 0,
      });
    }
    try {
      this.client = new MongoClient(options.uri, {
        appName: "pgpulse etl",
        serverSelectionTimeoutMS: 5_000,
        connectTimeoutMS: 5_000,
        // What a failover could take back is neither taken nor marked.
        readConcern: { level: "majority" },
        writeConcern: { w: "majority" },
        readPreference: "primary",
        // Each change stream has one for itself.
        maxPoolSize: LANES + 2 + options.sources.length,
      });
    } catch (error) {
      throw new Error(
        `Cannot read MONGO_URI: ${(error as Error).message}; expected ` +
          `mongodb://user:password@host:27017/database`,
      );
    }
  }

  /** Counts what waits, in all sources. */
  async backlog(): Promise<number> {
    const counts = [...this.#sources.keys()].map((source) =>
      this.#collection(source).countDocuments({ status: "ingested" })
    );
    return (await Promise.all(counts)).reduce((sum, n) => sum + n, 0);
  }

  status(): SyncStatus {
    return {
      worker: this.#options.worker,
      continuous: this.#continuous,
      running: this.#draining !== undefined,
      mongo: this.#mongoAway ? "away" : "up",
      trouble: this.#trouble,
      run: this.#last,
      sources: [...this.#sources].map(([source, { backlog, lag }]) => ({
        source,
        backlog,
        lag_seconds: lag,
      })),
    };
  }

  // --- runs ---

  /** `patient`: a side that is away is waited for. */
  once(trigger: string, begun?: (run: Run) => void, patient = false): Promise<Run> {
    if (this.#once) this.#joined = true;
    else {
      this.#begun = Promise.withResolvers();
      this.#once = this.#runOnce(trigger, patient);
    }
    void this.#begun.promise.then(begun);
    return this.#once;
  }

  async #runOnce(trigger: string, patient: boolean): Promise<Run> {
    let run: Run | undefined;
    let fault: string | null = null;
    try {
      await this.#insist((error) => patient && away(error), async () => {
        if (!run) this.#begun.resolve(run = await this.#begin(trigger));
        // It looks again for those who join, so that nothing is missed that was there before.
        do {
          this.#joined = false;
          await this.#drain();
          // Others have some in hand, or died with it: then their lease lapses. What they claim
          // later came later.
          const last = await this.#others();
          while (last && !this.#stop.aborted && await this.#others(last)) {
            await sleep(250, this.#stop);
            await this.#drain();
          }
          // They may have put some back.
          if (last) await this.#drain();
        } while (this.#joined && !this.#stop.aborted);
        this.#once = undefined;
      });
      if (this.#stop.aborted) fault = "Stopped before all was done";
    } catch (error) {
      this.#once = undefined;
      fault = this.#explain(error);
    }
    if (!run) {
      const now = new Date().toISOString();
      return { id: 0, trigger, started: now, ended: now, error: fault, ...none() };
    }
    await this.#end(run, fault).catch(() => {});
    return run;
  }

  /** Does it until it succeeds, or the fault is none to wait for. */
  async #insist(patient: (error: unknown) => boolean, act: () => Promise<void>): Promise<void> {
    for (let pause = SHORTEST; !this.#stop.aborted; pause = Math.min(2 * pause, LONGEST)) {
      try {
        await act();
        return this.#fine();
      } catch (error) {
        if (!patient(error)) throw error;
        this.#say(this.#explain(error));
        await sleep(pause, this.#stop);
      }
    }
  }

  async #begin(trigger: string): Promise<Run> {
    await this.#hold();
    const [{ id, started }] = await this.#sql`
      insert into public.sync_runs (worker, trigger)
      values (${this.#options.worker}, ${trigger})
      returning id::float8, started`;
    const run: Run = {
      id,
      trigger,
      started: started.toISOString(),
      ended: null,
      error: null,
      ...none(),
    };
    this.#runs.add(run);
    return this.#last = run;
  }

  async #save(run: Run): Promise<void> {
    const { read, taken, replaced, same, failed, ended } = run;
    const error = run.error ?? (ended ? null : this.#trouble);
    await this.#sql`
      update public.sync_runs
      set ${this.#sql({ read, taken, replaced, same, failed, ended, error })}
      where id = ${run.id}`;
  }

  async #end(run: Run, error: string | null): Promise<void> {
    this.#runs.delete(run);
    run.error = error;
    run.ended = new Date().toISOString();
    await this.#save(run);
  }

  /** The last claim, up to this one, of another worker. */
  async #others(upto = "9223372036854775807"): Promise<string | null> {
    const [{ last }] = await this.#sql<{ last: string | null }[]>`
      select max(id) as last
      from pgpulse.reading_claims
      where source = any (${[...this.#sources.keys()]}) and worker <> ${this.#options.worker}
        and id <= ${upto}::bigint`;
    return last;
  }

  /** Syncs until the signal; a side that is away is waited for. `lasting`: any other fault, too. */
  async keep(lasting = false): Promise<void> {
    this.#continuous = true;
    let run: Run | undefined;
    let fault: string | null = null;
    const beside = [
      this.#tellFlow(),
      ...[...this.#sources.keys()].map((name) => this.#watch(name)),
    ];
    try {
      for (let pause = SHORTEST; !this.#stop.aborted;) {
        await this.#insist((error) => lasting || away(error), async () => {
          run ??= await this.#begin("continuous");
          pause = await this.#drain() ? SHORTEST : Math.min(pause * 1.6, LONGEST);
        });
        await this.#rest(pause);
      }
    } catch (error) {
      fault = this.#explain(error);
      this.#ended = true;
      throw new Error(fault);
    } finally {
      this.#continuous = false;
      if (run) await this.#end(run, fault).catch(() => {});
      await this.client.close().catch(() => {});
      await Promise.all(beside);
    }
  }

  /** Waits, unless something wakes it. */
  async #rest(ms: number): Promise<void> {
    const woken = new Promise<void>((done) => this.#wake = done);
    await Promise.race([sleep(ms, this.#stop), woken]);
    this.#wake = undefined;
  }

  /** Says a trouble once, whatever forms it takes in turn. */
  #say(text: string): void {
    this.#trouble = text;
    if (this.#said.has(text)) return;
    this.#said.add(text);
    console.error(`${text}; it is tried again`);
  }

  #fine(): void {
    if (this.#trouble) console.error(`The sync works again (it was: ${this.#trouble})`);
    this.#trouble = null;
    this.#said.clear();
  }

  #explain(error: unknown): string {
    this.#mongoAway = error instanceof MongoError && away(error);
    if (error instanceof MongoError) return explainMongo(error, this.client);
    const { code, message, detail, hint } = error as Record<string, string | undefined>;
    if (!code) return `Cannot sync: ${message}`;
    return [explain(error, this.#sql), detail, hint].filter(Boolean).join("; ");
  }

  /** Ends in good order: the batch in hand is finished before. */
  async close(): Promise<void> {
    await this.#draining?.catch(() => {});
    clearInterval(this.#renewing);
    this.#leased = 0;
    await this.#sql`
      select pgpulse.hold_lease(${`etl/${this.#options.worker}`}, ${this.#options.worker}, 0)`
      .catch(() => {});
    await this.client.close().catch(() => {});
  }

  // --- the work ---

  /** Holds the lease, from now on. */
  async #hold(): Promise<void> {
    const { worker } = this.#options;
    const renew = async () => {
      const begun = performance.now();
      await this.#sql`select pgpulse.hold_lease(${`etl/${worker}`}, ${worker}, ${LEASE_S})`;
      this.#leased = begun + LEASE_S * 1000;
    };
    if (performance.now() > this.#leased - LEASE_S * 500) await renew();
    this.#renewing ??= setInterval(() => {
      if (this.#draining || this.#continuous || this.#runs.size) renew().catch(() => {});
    }, LEASE_S * 300);
  }

  /** Takes all that waits, once for all who ask; gives how many documents that were. */
  #drain(): Promise<number> {
    this.#again = true;
    return this.#draining ??= (async () => {
      let read = 0;
      try {
        await this.#hold();
        if (!this.#ready) await this.#prepare();
        while (this.#again && !this.#stop.aborted) {
          this.#again = false;
          await this.#recover(true);
          read += await this.#lanes();
        }
      } catch (error) {
        this.#forget();
        throw error;
      } finally {
        this.#draining = undefined;
      }
      this.#mongoAway = false;
      return read;
    })();
  }

  /** Before the first batch: may it update, and is there an index? */
  async #prepare(): Promise<void> {
    for (const source of this.#sources.keys()) {
      const collection = this.#collection(source);
      await collection.updateMany(
        { _id: { $in: [] }, status: "ingested" },
        { $set: { status: "processed" } },
      );
      const index = { status: 1, _id: 1 } as const;
      const there = await collection.indexes().catch(() => []);
      const fits = ({ key }: { key: object }) =>
        JSON.stringify(key).startsWith(JSON.stringify(index).slice(0, -1));
      if (there.some(fits)) continue;
      await collection.createIndex(index).catch((error) => {
        if (away(error)) throw error;
        console.error(
          `Cannot make an index on "${source}": ${error.message}; without it each look reads the ` +
            `whole collection. Make it: db.${
              source.slice(source.indexOf(".") + 1)
            }.createIndex({ status: 1, _id: 1 })`,
        );
      });
    }
    this.#ready = true;
  }

  #collection(source: string) {
    const dot = source.indexOf(".");
    return this.client.db(source.slice(0, dot)).collection<Ingested>(
      source.slice(dot + 1),
    );
  }

  /** After a fault: nothing is in hand, claims that stand are recovered. */
  #forget(): void {
    for (const state of this.#sources.values()) {
      state.after = undefined;
    }
  }

  /** Puts back what dead workers had in hand, or this one before a fault. */
  async #recover(own = false): Promise<void> {
    const { worker } = this.#options;
    this.#recovered = performance.now();
    for (;;) {
      const claims = await this.#sql<{ claim: string; source: string; ids: string[] }[]>`
        select claim, source, ids from pgpulse.recover_readings(${worker}, ${own})`;
      if (!claims.length) return;
      for (const { claim, source, ids } of claims) {
        await this.#putBack(source, ids.map(RawId.of));
        await this.#release(claim);
      }
    }
  }

  async #putBack(source: string, ids: RawId[]): Promise<void> {
    await this.#collection(source).updateMany(
      { _id: { $in: ids }, status: { $in: ["processed", "failed"] } },
      { $set: { status: "ingested" } },
    );
  }

  /**
   * A dead letter comes again by the usual way, where MongoDB has its document: `back`. One that has
   * another status there is `left` alone; undefined: it is not there.
   */
  async putBackFailed(source: string, bson: Uint8Array): Promise<"back" | "left" | undefined> {
    if (!this.#sources.has(source)) return;
    this.#encoder.scan(bson);
    const _id = this.#encoder.rawId();
    const collection = this.#collection(source);
    const { matchedCount } = await collection.updateOne(
      { _id, status: { $in: ["failed", "ingested"] } },
      { $set: { status: "ingested" } },
    );
    if (matchedCount) return "back";
    const there = await collection.find({ _id }, { raw: true, projection: { _id: 1 }, limit: 1 })
      .toArray();
    return there.length ? "left" : undefined;
  }

  #release(claim: string) {
    return this.#sql`select pgpulse.release_readings(${claim}, ${this.#options.worker})`;
  }

  /** Works batch by batch, in up to so many lanes, until none is left. */
  async #lanes(): Promise<number> {
    const all: Promise<void>[] = [];
    let read = 0;
    let fault: unknown;
    for (const { missed } of this.#sources.values()) missed.clear();
    const lane = async () => {
      try {
        while (!this.#stop.aborted && !fault) {
          const found = await this.#claim();
          if (!found) return;
          if (found.more && all.length < LANES) all.push(lane());
          read += await this.#work(found.batch);
        }
      } catch (error) {
        fault ??= error;
      }
    };
    all.push(lane());
    // Lanes are added while others are waited for.
    for (let i = 0; i < all.length; i++) await all[i];
    if (fault) throw fault;
    return read;
  }

  /** Claims the next batch, of each source in turn. One at a time: two would find the same. */
  #claim(): Promise<{ batch: Batch; more: boolean } | undefined> {
    const next = this.#claiming.then(async () => {
      const sources = [...this.#sources];
      if (performance.now() - this.#recovered > LONGEST) await this.#recover();
      for (let i = 0; i < sources.length; i++) {
        const [source, state] = sources[this.#turn++ % sources.length];
        const found = await this.#claimOf(source, state);
        if (found) return found;
      }
    });
    this.#claiming = next.catch(() => {});
    return next;
  }

  /**
   * Only ids are looked for, without a lock, however long that takes; who claims them first has them,
   * and reads them then: so nobody has a document in hand as it was before another one took it.
   */
  async #claimOf(
    source: string,
    state: State,
  ): Promise<{ batch: Batch; more: boolean } | undefined> {
    const { worker, batch: limit } = this.#options;
    // What was put back lies before: now and then it looks from the first one on.
    if (state.looks++ % 50 === 0) {
      state.after = undefined;
      state.missed.clear();
    }
    for (let whole = state.after === undefined; !this.#stop.aborted;) {
      const { after, missed, refused } = state;
      // Its own lie before; or it begins anew.
      const claims = await this.#sql<{ ids: string[] }[]>`
        select ids
        from pgpulse.reading_claims
        where source = ${source} and (${after === undefined} or worker <> ${worker})`;
      const out: RawId[] = [];
      let bytes = 0;
      for (const key of [...missed, ...refused, ...claims.flatMap(({ ids }) => ids)]) {
        if ((bytes += key.length) < 2 * MOST_IDS) out.push(RawId.of(key));
      }
      const docs = await this.#collection(source).find({
        status: "ingested",
        ...after || out.length
          ? { _id: { ...after ? { $gt: after } : {}, ...out.length ? { $nin: out } : {} } }
          : {},
      }, {
        raw: true,
        projection: { _id: 1 },
        sort: { _id: 1 },
        limit,
        batchSize: limit,
        singleBatch: true,
      }).toArray() as unknown as Uint8Array[];
      if (!docs.length) {
        if (whole) return;
        whole = true;
        state.after = undefined;
        continue;
      }
      const found = new Map<string, RawId>();
      bytes = 0;
      for (const bson of docs) {
        if ((bytes += bson.length) > MOST_IDS && found.size) break;
        this.#encoder.scan(bson);
        state.after = this.#encoder.rawId();
        found.set(state.after.key, state.after);
      }
      const wanted = [...found.keys()].filter((key) => !missed.has(key) && !refused.has(key));
      const [{ claim, ids }] = await this.#sql<{ claim: string | null; ids: string[] | null }[]>`
        select claim, ids from pgpulse.claim_readings(${source}, ${worker}, ${wanted})`;
      if (!claim) continue;
      const batch = { source, claim, ids: ids!.map((key) => found.get(key)!) };
      return { batch, more: docs.length === limit };
    }
  }

  /** Reads what is claimed, 16 MB at a time, and takes it; gives how many documents that were. */
  async #work({ source, claim, ids }: Batch): Promise<number> {
    const left = new Map(ids.map((_id) => [_id.key, _id]));
    let read = 0;
    while (left.size) {
      const received = new Date();
      const docs = await this.#collection(source).find(
        { _id: { $in: [...left.values()] }, status: "ingested" },
        { raw: true, limit: left.size, batchSize: left.size, singleBatch: true },
      ).toArray() as unknown as Uint8Array[];
      if (!docs.length) break;
      const items = docs.map((bson) => this.#item(bson));
      await this.#take(source, claim, items, received);
      const before = left.size;
      for (const { _id } of items) left.delete(_id.key);
      read += items.length;
      // It was 17, and is 17.0 now.
      if (left.size === before) break;
    }
    const { missed } = this.#sources.get(source)!;
    for (const key of left.keys()) missed.add(key);
    await this.#release(claim);
    return read;
  }

  #item(bson: Uint8Array): Item {
    const encoder = this.#encoder;
    let json = "";
    let failure: Item["failure"];
    try {
      json = encoder.json(bson);
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      failure = { reason: error.message, field: error.field };
      encoder.scan(bson);
    }
    const status = encoder.status;
    const _id = encoder.rawId();
    let id: string;
    try {
      id = encoder.idText();
      if (Buffer.byteLength(id) > LONGEST_ID) {
        throw new Unreadable("_id", `is longer than ${LONGEST_ID} bytes`);
      }
    } catch (error) {
      if (!(error instanceof Unreadable)) throw error;
      failure ??= { reason: error.message, field: "_id" };
      id = JSON.stringify({ $sha256: createHash("sha256").update(_id.bytes).digest("hex") });
    }
    return { id, _id, bson, status, json, failure };
  }

  /** Writes documents to PostgreSQL, marks them in MongoDB, looks whether they are what they were. */
  async #take(source: string, claim: string, items: Item[], received: Date): Promise<void> {
    const good = items.filter(({ failure }) => !failure);
    const [{ done }] = await this.#sql`
      select pgpulse.take_readings(
        ${source}, ${good.map(({ id }) => id)}, ${good.map(({ json }) => json).join("\n")},
        ${received}, false, ${claim}, ${this.#options.worker}
      ) as done`;
    const failures = new Map<string, Item["failure"]>(
      done.failed.map((failure: { id: string }) => [failure.id, failure]),
    );
    for (const item of good) item.failure = failures.get(item.id);
    const failed = items.filter(({ failure }) => failure);
    await this.#keepFailures(source, claim, failed);
    const refused = [
      ...await this.#mark(source, items.filter(({ failure }) => !failure), "processed"),
      ...await this.#mark(source, failed, "failed"),
    ];
    const state = this.#sources.get(source)!;
    if (refused.length) {
      for (const { _id } of refused) state.refused.add(_id.key);
      await this.#keepFailures(source, claim, refused);
    }
    const { taken, replaced, same } = done;
    const counts: Counts = { read: items.length, taken, replaced, same, failed: failed.length };
    // Of two runs at a time the later one counts it, so that their sums are true.
    for (const sum of [state.flow, ...[...this.#runs].slice(-1)]) add(sum, counts);
    if (state.backlog) state.backlog = Math.max(0, state.backlog - items.length);
  }

  /** Keeps dead letters; also without one it says whether the claim is still held. */
  async #keepFailures(source: string, claim: string, failed: Item[]): Promise<void> {
    const keep = (letters: string[]) =>
      this.#sql`
        select pgpulse.hold_claim(${claim}, ${this.#options.worker}),
          pgpulse.keep_failures(${source}, ${`[${letters}]`}::text::jsonb)`;
    const letter = ({ id, bson, json, failure }: Item, whole = true) =>
      JSON.stringify({ id, ...failure, bson: Buffer.from(bson).toString("base64") })
        .replace(/}$/, () => whole && json ? `,"document":${json}}` : "}");
    await keep(failed.map((item) => letter(item))).catch(async (error) => {
      if (!/^(22|54)/.test(error.code)) throw error;
      // PostgreSQL cannot make jsonb of one of them.
      for (const item of failed) {
        await keep([letter(item)]).catch((error) => {
          if (!/^(22|54)/.test(error.code)) throw error;
          return keep([letter(item, false)]);
        });
      }
    });
  }

  /** Marks documents; those that changed since they were read are put back. Gives what is refused. */
  async #mark(source: string, items: Item[], status: "processed" | "failed"): Promise<Item[]> {
    if (!items.length) return [];
    if (performance.now() > this.#leased) {
      throw Object.assign(new Error("the lease of this worker lapsed"), { code: "55000" });
    }
    const collection = this.#collection(source);
    const _id = { $in: items.map(({ _id }) => _id) };
    const refused: Item[] = [];
    try {
      await collection.updateMany({ _id, status: "ingested" }, { $set: { status } });
    } catch (error) {
      if (!refuses(error)) throw error;
      for (const item of items) {
        try {
          await collection.updateOne({ _id: item._id, status: "ingested" }, { $set: { status } });
        } catch (error) {
          if (!refuses(error)) throw error;
          const reason = `MongoDB refuses to mark it: ${error.message}`;
          console.error(`Leaves "${item.id}" of "${source}" alone: ${reason}`);
          item.failure ??= { reason, field: null };
          refused.push(item);
        }
      }
    }
    const byKey = new Map(items.map((item) => [item._id.key, item]));
    const changed: RawId[] = [];
    const marked = await collection.find({ _id, status }, { raw: true, batchSize: items.length })
      .toArray();
    for (const now of marked as unknown as Uint8Array[]) {
      this.#encoder.scan(now);
      const _id = this.#encoder.rawId();
      const item = byKey.get(_id.key);
      // Without one: 17 was deleted, and is 17.0 now.
      if (!item || !unchanged(item, now)) changed.push(_id);
    }
    if (changed.length) await this.#putBack(source, changed);
    return refused;
  }

  // --- what is to be seen ---

  /** Wakes the loop when a document comes, where the server can tell. */
  async #watch(source: string): Promise<void> {
    const ingested = "ingested";
    while (!this.#stop.aborted && !this.#ended) {
      const changes = this.#collection(source).watch([{
        $match: {
          $or: [{ "fullDocument.status": ingested }, {
            "updateDescription.updatedFields.status": ingested,
          }],
        },
      }, { $project: { _id: 1 } }]);
      const end = () => void changes.close().catch(() => {});
      this.#stop.addEventListener("abort", end);
      try {
        for await (const _ of changes) this.#wake?.();
      } catch (error) {
        // A server that has none: polling does.
        if (!away(error)) return;
      } finally {
        this.#stop.removeEventListener("abort", end);
        end();
      }
      await sleep(LONGEST, this.#stop);
    }
  }

  /** Each five seconds of the clock: what was done, and what waits. */
  async #tellFlow(): Promise<void> {
    while (!this.#stop.aborted && !this.#ended) {
      await sleep(5_000 - Date.now() % 5_000, this.#stop);
      for (const [source, state] of this.#sources) {
        try {
          await this.#look(source, state);
        } catch {
          // The loop tells of it.
          continue;
        }
        // One that is stuck falls silent: that is what the alert listens for.
        if (this.#trouble) continue;
        const { flow } = state;
        state.flow = none();
        const { read, taken, replaced, same, failed } = flow;
        await this.#sql`
          select pgpulse.note_flow(
            ${source}, ${this.#options.worker}, ${read}, ${taken}, ${replaced}, ${same}, ${failed},
            ${state.backlog}, ${state.lag}
          )`.catch(() => add(state.flow, flow));
      }
      for (const run of this.#runs) await this.#save(run).catch(() => {});
    }
  }

  /** How many documents wait, and how long the oldest has. */
  async #look(source: string, state: State): Promise<void> {
    const collection = this.#collection(source);
    const waiting = { status: "ingested" };
    const [oldest] = await collection.find(waiting, {
      projection: { _id: 1 },
      sort: { _id: 1 },
      limit: 1,
    }).toArray();
    const now = Date.now();
    state.since = oldest ? state.since ?? now : undefined;
    state.lag = !oldest ? 0 : Math.max(
      0,
      now - (oldest._id instanceof ObjectId ? +oldest._id.getTimestamp() : state.since!),
    ) /
      1000;
    // Counting reads the whole index: where that takes long, it is done seldom.
    if (!oldest) state.backlog = 0;
    else if (performance.now() - state.counted >= 20 * state.took) {
      const begun = performance.now();
      state.backlog = await collection.countDocuments(waiting);
      state.counted = performance.now();
      state.took = state.counted - begun;
    }
  }
}

/**
 * Takes dead letters again. Those that MongoDB still has are put back there: `back`, or `left` alone
 * where their status says that others have seen to them; the rest is taken from what was kept.
 */
export async function replay(
  sql: postgres.Sql,
  sync: Worker | undefined,
  { source, id, reason }: { source?: string[]; id?: string; reason?: string },
): Promise<Counts & { back: number; left: number }> {
  const counts = { ...none(), back: 0, left: 0 };
  const encoder = new Encoder();
  let [after, afterId] = ["", ""];
  for (;;) {
    const page = await sql<{ source: string; source_id: string }[]>`
      select source, source_id
      from public.reading_failures
      where (${source ?? null}::text[] is null or source = any (${source ?? null}::text[]))
        and (${id ?? null}::text is null or source_id = ${id ?? null})
        and (${reason ?? null}::text is null or strpos(reason, ${reason ?? null}) > 0)
        and (source, source_id) > (${after}, ${afterId})
      order by source, source_id
      limit 1000`;
    if (!page.length) return counts;
    for ({ source: after, source_id: afterId } of page) {
      const [letter] = await sql<
        { failed: string; document: string | null; bson: Uint8Array | null }[]
      >`
        select failed::text as failed, document::text as document, bson
        from public.reading_failures
        where source = ${after} and source_id = ${afterId}`;
      // Others have taken it just now.
      if (!letter) continue;
      try {
        const there = letter.bson && await sync?.putBackFailed(after, letter.bson);
        if (there) {
          counts[there]++;
          continue;
        }
        counts.read++;
        const json = letter.document ?? encoder.json(letter.bson ?? new Uint8Array());
        const [{ done }] = await sql`
          select pgpulse.take_letter(${after}, ${afterId}, ${letter.failed}::text::timestamptz, ${json}) as done`;
        if (!done) counts.left++;
        for (const name of ["taken", "replaced", "same"] as const) {
          counts[name] += done?.[name] ?? 0;
        }
        counts.failed += done?.failed.length ?? 0;
      } catch (error) {
        if (!(error instanceof Unreadable)) throw error;
        counts.failed++;
      }
    }
  }
}

// --- serve ---

const WELCOME = "Welcome to the Observability Platform";

/** Bytes of a body, and of all bodies in hand; read as JSON they take several times as much. */
const MAX_BODY = 17 * 2 ** 20;
const MAX_BODIES = 2 * MAX_BODY;
/** What is read at once, so what an answer costs in memory: rows, and bytes of their text. */
const PAGE_ROWS = 1_000;
const PAGE_BYTES = 4 * 2 ** 20;
/** Rows of an answer that is streamed. */
const MAX_ROWS = 1_000_000;
const QUERY_MS = 10_000;
/** A sync is waited for so long: less than proxies wait for an answer. */
const SYNC_MS = 50_000;
/** Who reads nothing of an answer for so long is gone. */
const SILENCE_MS = 75_000;
const HEADERS_MS = 10_000;
const BODY_MS = 60_000;
const SHUTDOWN_MS = 3_000;
/** Addresses that only this machine reaches. */
const LOOPBACK = /^(127\.|::1$|localhost$)/;

export interface ServeOptions {
  port: number;
  /** Where it listens; undefined: 127.0.0.1, or everywhere where there is a token. */
  bind?: string;
  /** Asked for by everything but the welcome and health. */
  token?: string;
  /** Origins whose pages may read answers; "*" is any. */
  cors?: string[];
  /** Requests a second for each client; 0: as many as come. */
  rate?: number;
}

/** What is answered in place of what was asked for; RFC 9457. */
class Problem extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly more: Record<string, unknown> = {},
    readonly headers: Record<string, string> = {},
  ) {
    super(message);
  }
}

/** A problem with one thing that the caller said. */
const wrong = (field: string, reason: string) =>
  new Problem(400, `Cannot take "${field}": ${reason}`, { errors: [{ field, reason }] });

// What comes in and goes out. The schemas that check requests are those /openapi.json is made of.

/** JSON that keeps numbers as they were written, which TypeScript does not know yet. */
const exact = JSON as typeof JSON & {
  rawJSON(text: string): unknown;
  isRawJSON(value: unknown): boolean;
};

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value) && !exact.isRawJSON(value);

const name = (most: number) =>
  z.string().min(1).max(most).regex(/^\P{Cc}*$/u, "has control characters")
    .refine((text) => text.isWellFormed(), "has half of a character")
    .refine((text) => Buffer.byteLength(text) <= most, `is longer than ${most} bytes`);
const Source = name(255).openapi({
  description: "database.collection of MongoDB, or what a POST said",
});
const Id = name(1_024).openapi({
  description: "Key of the reading in its source; of MongoDB the _id",
});

const Time = z.string().transform((text, context) => {
  // A plus sign that was not written as %2B arrives as a space.
  const [, day = "", clock = "T00:00:00", zone = "Z"] =
    /^(\d{4}-\d\d-\d\d)(?:([T ]\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?)(Z|[+ -](?:0\d|1[0-5]):\d\d)?)?$/
      .exec(text) ?? [];
  const time = `${day}${clock.replace(" ", "T")}${zone.replace(" ", "+")}`;
  // A 30th of February is read as a day of March.
  const real = Number.isFinite(Date.parse(time)) && day > "0001" &&
    new Date(day).toISOString().startsWith(day);
  if (real) return time;
  context.addIssue("is no time like 2026-11-22 or 2026-11-22T12:00:05Z");
  return z.NEVER;
}).openapi({ type: "string", format: "date-time" });

const whole = (least: number, most: number) =>
  z.string().regex(/^\d{1,15}$/, "is no whole number").transform(Number)
    .pipe(z.number().min(least, `is below ${least}`).max(most, `is above ${most}`))
    .openapi({ type: "integer", minimum: least, maximum: most });

/** The row that a page ends with. */
type Position = [time: string, source: string, id: string];

const Cursor = z.string().max(8_000).transform((text, context): Position => {
  try {
    const [time, source, id, ...more] = JSON.parse(`${Buffer.from(text, "base64url")}`);
    const known = /^(?!0000)\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00$/.test(time) &&
      Number.isFinite(Date.parse(time));
    const texts = [source, id].every((one) => typeof one === "string" && !one.includes("\0"));
    if (known && texts && !more.length) return [time, source, id];
  } catch { /* told below */ }
  context.addIssue("is not as it was given; take `next` of the page before");
  return z.NEVER;
}).openapi({
  type: "string",
  description: "`next` of the page before",
  example: "WyIyMDI2LTExLTIyVDEyOjAwOjA1KzAwOjAwIiwiYXBpIiwiMSJd",
});

const Contained = z.string().max(8_000).transform((text, context) => {
  try {
    const value = parseExactly(text);
    if (isObject(value)) return value;
  } catch { /* told below */ }
  context.addIssue('is no JSON object like {"device":"a"}');
  return z.NEVER;
}).openapi({
  type: "string",
  description: "JSON object that the document contains. payload.a.b=7 is short for " +
    'payload={"a":{"b":7}}: a value that does not read as JSON is text; several all hold',
  example: '{"device":"a"}',
});

const List = z.object({
  source: Source.optional(),
  from: Time.optional().openapi({ description: "First time" }),
  to: Time.optional().openapi({ description: "Time behind the last" }),
  payload: Contained.optional(),
  limit: whole(1, MAX_ROWS).default(100).openapi({
    description: `Rows; of JSON at most ${PAGE_ROWS}`,
    default: 100,
  }),
  cursor: Cursor.optional(),
}).catchall(z.string()).superRefine((query, context) => {
  const paths = Object.keys(query).filter((name) => !(name in List.shape));
  for (const name of paths) {
    const issue = !name.startsWith("payload.")
      ? "is not known here"
      : /\.(\.|$)/.test(name)
      ? "is no path like payload.a.b"
      : undefined;
    if (issue) context.addIssue({ code: "custom", path: [name], message: issue });
  }
});

const Float = z.union([z.number(), z.enum(["NaN", "Infinity", "-Infinity"])]);
const Payload = z.custom<Record<string, unknown>>(isObject, "is no JSON object")
  .openapi({ type: "object", additionalProperties: true });
const Reading = z.object({
  time: z.iso.datetime({ offset: true }),
  source: z.string(),
  id: z.string(),
  device: z.string().nullable(),
  metric: z.string().nullable(),
  value: Float.nullable(),
  unit: z.string().nullable(),
  received: z.iso.datetime({ offset: true }),
  processed: z.iso.datetime({ offset: true }),
  payload: Payload,
}).openapi("Reading");
const Page = z.object({
  readings: z.array(Reading),
  next: z.string().nullable().openapi({
    description: "cursor of the next page; null: this is the last",
  }),
}).openapi("Page");

const Batch = z.strictObject({
  readings: z.array(
    z.strictObject({
      source: Source.default("api"),
      id: Id,
      payload: Payload.openapi({ description: "Becomes columns as a document of MongoDB does" }),
    }),
  ).min(1).max(10_000),
}).openapi("Batch");
const Taken = z.object({
  taken: z.int().openapi({ description: "New ones" }),
  replaced: z.int().openapi({ description: "There before, with other content" }),
  same: z.int().openapi({ description: "There before, just so" }),
  failed: z.array(
    z.object({
      source: z.string(),
      id: z.string(),
      reason: z.string(),
      field: z.string().nullable(),
    }),
  ),
}).openapi("Taken");

const RunView = z.object({
  id: z.int(),
  trigger: z.string().openapi({ description: "once, continuous, http or replay" }),
  started: z.iso.datetime({ offset: true }),
  ended: z.iso.datetime({ offset: true }).nullable(),
  read: z.int(),
  taken: z.int(),
  replaced: z.int(),
  same: z.int(),
  failed: z.int(),
  error: z.string().nullable(),
}).openapi("Run");
const Runs = z.object({ runs: z.array(RunView), next: z.int().nullable() }).openapi("Runs");

const Health = z.object({
  status: z.enum(["ok", "degraded"]),
  database: z.enum(["up", "away"]),
  sync: z.object({
    mongo: z.enum(["up", "away", "off"]),
    running: z.boolean(),
    trouble: z.string().nullable().openapi({
      description: "What it tries again and again; without the API_TOKEN only that there is one",
    }),
    backlog: z.int().nullable(),
    lag_seconds: z.number().nullable(),
  }),
}).openapi("Health");

const ProblemView = z.object({
  type: z.string(),
  title: z.string(),
  status: z.int(),
  detail: z.string(),
  request: z.string().openapi({ description: "Its id, as the log has it" }),
  errors: z.array(z.object({ field: z.string(), reason: z.string() })).optional(),
}).openapi("Problem");

const TITLES: Record<number, string> = {
  200: "What was asked for",
  202: "Under way; look it up at Location",
  400: "Bad request",
  401: "Not signed in",
  403: "Not from there",
  404: "Not found",
  405: "Method not allowed",
  406: "Not acceptable",
  408: "Timed out",
  409: "Ambiguous",
  413: "Too large",
  415: "Unsupported media type",
  421: "Misdirected",
  422: "Some could not be taken",
  429: "Too many requests",
  500: "Broken",
  503: "Unavailable",
};

/** Responses of a route: content by media type, and the problems it may have. */
function responses(
  content: Record<string, z.ZodType>,
  more: Record<number, z.ZodType> = {},
  ...problems: number[]
) {
  const media = (by: Record<string, z.ZodType>) =>
    Object.fromEntries(Object.entries(by).map(([type, schema]) => [type, { schema }]));
  const said = (status: number, by: Record<string, z.ZodType>) =>
    [status, { description: TITLES[status], content: media(by) }] as const;
  return Object.fromEntries([
    said(200, content),
    ...Object.entries(more).map(([status, schema]) =>
      said(+status, { "application/json": schema })
    ),
    ...[...problems, 400, 401, 403, 421, 429, 500, 503].map((status) =>
      said(status, { "application/problem+json": ProblemView })
    ),
  ]);
}

const JSON_TYPE = "application/json";
const LINES = "application/x-ndjson";
const CSV = "text/csv";

/** Of the offered media types the one that Accept likes best; the first, where it likes several. */
export function preferred(accept: string | undefined, offered: string[]): string | undefined {
  const ranges = (accept?.trim() || "*/*").split(",").map((part) => {
    const [range, ...parameters] = part.toLowerCase().split(";").map((one) => one.trim());
    const q = parameters.find((one) => one.startsWith("q="))?.slice(2) ?? "1";
    return { range, q: Number(q) || 0 };
  });
  const weight = (type: string) => {
    // The most exact range speaks for a type.
    const exact = [type, type.replace(/\/.*/, "/*"), "*/*"];
    const found = exact.map((range) => ranges.find((one) => one.range === range));
    return found.find(Boolean)?.q ?? 0;
  };
  const best = offered.toSorted((a, b) => weight(b) - weight(a))[0];
  return weight(best) > 0 ? best : undefined;
}

/** The input as the schema has it, or a problem that names each field. */
function checked<S extends z.ZodType>(schema: S, input: unknown): z.output<S> {
  const { data, error } = schema.safeParse(input);
  if (!error) return data as z.output<S>;
  const errors = error.issues.flatMap(({ path, message, ...issue }) =>
    (issue.code === "unrecognized_keys" ? issue.keys : [""]).map((key) => ({
      field: [...path, ...key ? [key] : []].join("."),
      reason: key ? "is not known here" : message.replace(/^Invalid input: /, ""),
    }))
  ).slice(0, 20);
  const { field, reason } = errors[0];
  throw new Problem(400, `Cannot take ${field ? `"${field}"` : "this"}: ${reason}`, { errors });
}

/** JSON with each number as it was written, where a double would change it. */
export function parseExactly(text: string): unknown {
  try {
    // Sixteen digits, or an exponent: less always survives, and is quicker without a look at each.
    if (!/[\d.]{17}|\d[eE]/.test(text)) return JSON.parse(text);
    return JSON.parse(
      text,
      ((_key: string, value: unknown, { source }: { source?: string }) =>
        typeof value === "number" && source && source !== String(value)
          ? exact.rawJSON(source)
          : value) as Parameters<typeof JSON.parse>[1],
    );
  } catch (error) {
    const reason = error instanceof RangeError ? "it is nested too deep" : (error as Error).message;
    throw new Problem(400, `Cannot read the body as JSON: ${reason}`);
  }
}

// --- pages of readings ---

const READING =
  "time, source, source_id as id, device, metric, value, unit, received, processed, payload";
const COLUMNS = READING.replace("source_id as ", "").split(", ");
const LINE = {
  [JSON_TYPE]: "row_to_json(r)::text",
  [LINES]: "row_to_json(r)::text",
  [CSV]: COLUMNS.map((name) =>
    /^(time|received|processed)$/.test(name)
      ? `(to_json(${name}) #>> '{}')`
      : `coalesce('"' || replace(${name}::text, '"', '""') || '"', '')`
  ).join(" || ',' || "),
};
const BETWEEN: Record<string, string> = { [JSON_TYPE]: ",\n", [LINES]: "\n", [CSV]: "\r\n" };

/** Some rows as text, ready to be sent; `next` where there are more. */
interface Piece {
  body: Uint8Array;
  rows: number;
  next?: Position;
}

/** Why PostgreSQL's JSON cannot hold it. */
function unfit(value: unknown): string | undefined {
  if (typeof value === "string") {
    return value.includes("\0") || !value.isWellFormed()
      ? "has a NUL or half of a character, which no reading here has"
      : undefined;
  }
  if (exact.isRawJSON(value)) {
    const [, exponent = "0"] = /e(.+)/i.exec(JSON.stringify(value)) ?? [];
    return Math.abs(Number(exponent)) > 8_000 ? "is out of range" : undefined;
  }
  if (typeof value !== "object" || !value) return;
  for (const part of Object.entries(value).flat()) {
    const reason = unfit(part);
    if (reason) return reason;
  }
}

/** All that the parameters payload and payload.* want the document to contain. */
function contained(query: z.output<typeof List>): unknown {
  const merged = (name: string, a: unknown, b: unknown): unknown => {
    if (!isObject(a) || !isObject(b)) throw wrong(name, "contradicts another parameter");
    const both = Object.keys(b).map((key) =>
      [key, Object.hasOwn(a, key) ? merged(name, a[key], b[key]) : b[key]] as const
    );
    // Not by assignment, for which "__proto__" is no key like others.
    return Object.fromEntries([...Object.entries(a), ...both]);
  };
  const sound = (name: string, value: unknown) => {
    const reason = unfit(value);
    if (reason) throw wrong(name, reason);
    return value;
  };
  let all = sound("payload", query.payload);
  for (const [name, text] of Object.entries(query)) {
    if (!name.startsWith("payload.")) continue;
    let value: unknown = text;
    try {
      value = parseExactly(text as string);
    } catch { /* then it is text */ }
    const document = name.split(".").slice(1).reduceRight(
      (inner, key) => Object.fromEntries([[key, inner]]),
      value,
    );
    all = all ? merged(name, all, sound(name, document)) : sound(name, document);
  }
  return all;
}

/** Readings from the newest on, in pieces of at most a page; the last costs what the first does. */
async function* pieces(
  ask: (text: string, values: (string | null)[]) => Promise<(Uint8Array | null)[]>,
  query: z.output<typeof List>,
  type: keyof typeof LINE,
): AsyncGenerator<Piece> {
  const holds = contained(query);
  const filters = [query.source, query.from, query.to, holds && JSON.stringify(holds)];
  let position = query.cursor;
  for (let left = query.limit; left;) {
    const [body, count, end, more] = await ask(
      `with page as (
        select
          *,
          row_number() over () as n,
          -- Stored compressed it may become far more: not all of that is made, to be left out below.
          sum(
            pg_column_size(payload) * case when pg_column_compression(payload) is null then 1 else 8 end
          ) over (rows unbounded preceding) as stored
        from pgpulse.page_readings(
          $1, $2::timestamptz, $3::timestamptz, $4::text::jsonb, $5::timestamptz, $6, $7, $8::int + 1
        )
      ), line as materialized (
        select n, time, source, source_id, (select ${
        LINE[type]
      } from (select ${READING}) as r) as text
        from page
        where n <= $8::int and (n = 1 or stored <= ${PAGE_BYTES})
      ), kept as (
        select *
        from (select *, sum(octet_length(text)) over (order by n) as bytes from line) as line
        where n = 1 or bytes <= ${PAGE_BYTES}
      )
      select
        string_agg(text, $9 order by n),
        count(*),
        (select json_build_array(time, source, source_id) from kept order by n desc limit 1)::text,
        count(*) < (select count(*) from page)
      from kept`,
      [
        ...filters,
        ...(position ?? [null, null, null]),
        String(Math.min(left, PAGE_ROWS)),
        BETWEEN[type],
      ].map((value) => value as string ?? null),
    );
    const rows = Number(`${count}`);
    if (!rows) return;
    left -= rows;
    position = JSON.parse(`${end}`) as Position;
    const open = `${more}` === "t";
    yield { body: body!, rows, next: open ? position : undefined };
    if (!open) return;
  }
}

// --- answers ---

/** Labels and their number, as Prometheus counts. */
class Counter extends Map<string, number> {
  add(labels: Record<string, string>, by = 1) {
    const text = Object.entries(labels).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
    const key = text.length ? `{${text}}` : "";
    this.set(key, (this.get(key) ?? 0) + by);
  }
}

const BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10];

/** So many requests a second for each client, and twice as many at once. */
export function limiter(rate: number, now = () => performance.now()) {
  const clients = new Map<string, { left: number; at: number }>();
  let swept = -Infinity;
  /** Seconds to wait; 0: go on. */
  return (client: string): number => {
    if (!rate) return 0;
    const at = now();
    const filled = (one: { left: number; at: number }) =>
      Math.min(2 * rate, one.left + (at - one.at) / 1e3 * rate);
    // Whoever has been quiet is as good as unknown.
    if (clients.size > 10_000 && at - swept > 1_000) {
      swept = at;
      for (const [key, one] of clients) if (filled(one) >= 2 * rate) clients.delete(key);
    }
    const known = clients.get(client);
    const left = known ? filled(known) : 2 * rate;
    clients.set(client, { left: left < 1 ? left : left - 1, at });
    return left < 1 ? Math.max(1, Math.ceil((1 - left) / rate)) : 0;
  };
}

/** Without telling by the time it takes how much of it is right. */
function sameSecret(given: string, wanted: string): boolean {
  const hash = (text: string) => createHash("sha256").update(text).digest();
  return timingSafeEqual(hash(given), hash(wanted));
}

/** What a request brings besides what Request knows. */
type Env = {
  Bindings: {
    incoming: IncomingMessage;
    id: string;
    /** The path as /openapi.json has it. */
    route?: string;
    /** Bytes of its body. */
    bytes?: number;
    /** The answer comes in pieces. */
    streams?: boolean;
  };
};

/** The body as text, within its limits; what it takes of the room is given back with the answer. */
async function text(env: Env["Bindings"], room: { bytes: number }): Promise<string> {
  const { incoming } = env;
  const type = incoming.headers["content-type"] ?? "";
  if (!/^application\/json\s*(;\s*charset="?utf-8"?\s*)?$/i.test(type)) {
    throw new Problem(415, `Cannot read "${type}": send application/json in UTF-8`);
  }
  const encoding = incoming.headers["content-encoding"] ?? "identity";
  if (encoding !== "identity") throw new Problem(415, `Cannot read "${encoding}": send it plain`);
  const tooLarge = new Problem(
    413,
    `Cannot take more than ${MAX_BODY} bytes: send smaller batches`,
  );
  if (Number(incoming.headers["content-length"]) > MAX_BODY) throw tooLarge;
  const chunks: Uint8Array[] = [];
  env.bytes = 0;
  try {
    await new Promise<void>((done, fail) => {
      incoming.on("data", (chunk: Uint8Array) => {
        env.bytes! += chunk.length;
        room.bytes += chunk.length;
        chunks.push(chunk);
        if (env.bytes! > MAX_BODY) fail(tooLarge);
        else if (room.bytes > MAX_BODIES) {
          fail(new Problem(503, "Too many large bodies at once", {}, { "retry-after": "1" }));
        } else return;
        // What still comes is read and forgotten, so that the answer is heard.
        chunks.length = 0;
        incoming.removeAllListeners("data").resume();
      });
      incoming.once("end", done);
      const cut = () => fail(new Problem(400, "The body was cut short"));
      incoming.once("error", cut).once("aborted", cut).once("close", cut);
    });
    return new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks));
  } catch (error) {
    throw error instanceof TypeError ? new Problem(400, "The body is no UTF-8") : error;
  }
}

/** Everything that is answered. */
export function api(options: ServeOptions, sql: postgres.Sql, sync: Sync | undefined) {
  const { token, cors: origins = [], rate = 0 } = options;
  const requests = new Counter();
  const taken = new Counter();
  const times = { buckets: BUCKETS.map(() => 0), count: 0, sum: 0 };
  const bodies = { bytes: 0 };
  const wait = limiter(rate);
  const app = new OpenAPIHono<Env>();

  // --- the database, and what it says ---

  let away: string | undefined;
  const ask = async (
    text: string,
    values: (string | null)[] = [],
  ): Promise<(Uint8Array | null)[]> => {
    const query = sql.unsafe(text, values, { prepare: sql.options.prepare }).raw();
    let hangs: ReturnType<typeof setTimeout> | undefined;
    const timer = setTimeout(() => query.cancel(), QUERY_MS);
    try {
      const rows = await Promise.race([
        query,
        new Promise<never>((_, fail) => {
          hangs = setTimeout(() => fail({ code: "CONNECT_TIMEOUT" }), QUERY_MS + 2_000);
        }),
      ]);
      if (away) console.log("The database answers again");
      away = undefined;
      return (rows as unknown as (Uint8Array | null)[][])[0] ?? [];
    } finally {
      clearTimeout(timer);
      clearTimeout(hangs);
    }
  };
  const problemOf = (error: unknown, id: string, method = "GET"): Problem => {
    if (error instanceof Problem) return error;
    const { code = "", message = String(error) } = error as { code?: string; message?: string };
    // What the caller said cannot be computed: numbers, times, depths out of range.
    if (/^(22|54)...$/.test(code)) return new Problem(400, `Cannot take this: ${message}`);
    if (code === "57014") {
      const advice = method === "POST" ? "send fewer at once" : "narrow it with from and to";
      return new Problem(
        503,
        `Cannot answer this: it takes longer than ${QUERY_MS / 1e3} s; ${advice}`,
      );
    }
    if (code) {
      const cause = explain(error, sql);
      // Told once, and then when it is over.
      if (cause !== away) console.error(away = cause);
      const hint = { "retry-after": "5" };
      return new Problem(503, "The database cannot be used at present", {}, hint);
    }
    console.error(`http ${id} ${error instanceof Error ? error.stack : message}`);
    return new Problem(500, "This should not have happened; the log has the reason");
  };

  // --- who may ---

  app.use(async (c, next) => {
    const { incoming } = c.env;
    const seconds = wait(incoming.socket.remoteAddress ?? "");
    if (seconds) {
      const hint = { "retry-after": String(seconds) };
      throw new Problem(429, `More than ${rate} requests a second`, {}, hint);
    }
    // A page of another site that has its name point here must not read what is open to this machine.
    if (!token && LOOPBACK.test(options.bind ?? "127.0.0.1")) {
      const host = URL.parse(`http://${incoming.headers.host ?? "localhost"}`)?.hostname ?? "";
      if (!/^(localhost|127\.[\d.]+|\[::1\])$/.test(host)) {
        throw new Problem(421, `Cannot answer as "${host}": set API_TOKEN, or --bind an address`);
      }
    }
    await next();
  });
  if (origins.length) {
    app.use(cors({
      origin: origins.includes("*") ? "*" : origins,
      allowHeaders: ["authorization", "content-type", "x-request-id"],
      exposeHeaders: ["link", "location", "retry-after", "x-request-id"],
      maxAge: 600,
    }));
  }
  const OPEN = ["/", "/healthz", "/server/health"];
  const signedIn = ({ incoming }: Env["Bindings"]) => {
    const [, given = ""] = /^Bearer (.+)$/i.exec(incoming.headers.authorization ?? "") ?? [];
    return !token || sameSecret(given, token);
  };
  app.use(async (c, next) => {
    const { headers } = c.env.incoming;
    if (!OPEN.includes(c.req.path) && !signedIn(c.env)) {
      const hint = { "www-authenticate": 'Bearer realm="pgpulse"' };
      throw new Problem(401, "Send Authorization: Bearer and the API_TOKEN", {}, hint);
    }
    // Without a token a browser must not be had to do what a page of elsewhere wants.
    const origin = headers.origin ?? "";
    const known = origins.includes("*") || origins.includes(origin);
    if (!token && headers["sec-fetch-site"] === "cross-site" && !known && c.req.path !== "/") {
      throw new Problem(403, `Cannot answer pages of "${origin}": allow it with --cors`);
    }
    await next();
  });

  // --- routes, each with its place in /openapi.json ---

  type Input<R> = {
    query: R extends { query: infer S extends z.ZodType } ? z.output<S> : unknown;
    params: R extends { params: infer S extends z.ZodType } ? z.output<S> : unknown;
    body: R extends
      { body: { content: { "application/json": { schema: infer S extends z.ZodType } } } }
      ? z.output<S>
      : unknown;
  };
  const known: { path: RegExp; method: string }[] = [];
  function route<const R extends NonNullable<RouteConfig["request"]>>(
    method: "get" | "post",
    path: string,
    summary: string,
    request: R,
    responses: RouteConfig["responses"],
    answer: (c: Context<Env>, input: Input<R>) => Response | Promise<Response>,
  ) {
    const security = token && !OPEN.includes(path) ? [{ token: [] }] : [];
    app.openAPIRegistry.registerPath({ method, path, summary, request, responses, security });
    known.push({
      path: RegExp(`^${path.replaceAll(".", "\\.").replaceAll(/{\w+}/g, "[^/]+")}$`),
      method: method.toUpperCase(),
    });
    app.on([method], [path.replaceAll(/{(\w+)}/g, ":$1")], async (c) => {
      c.env.route = path;
      const given: Record<string, string | string[]> = {};
      for (const [name, value] of new URL(c.req.url).searchParams) {
        // The one name that would pass as no name at all.
        if (name === "__proto__") throw wrong(name, "is not known here");
        given[name] = name in given ? [given[name], value].flat() : value;
      }
      const [media] = Object.values(request.body?.content ?? {});
      const body = media && "schema" in media ? media.schema as z.ZodType : undefined;
      try {
        return await answer(c, {
          query: checked(request.query as z.ZodType ?? z.strictObject({}), given),
          params: checked(request.params as z.ZodType ?? z.object({}), c.req.param()),
          body: body && checked(body, parseExactly(await text(c.env, bodies))),
        } as Input<R>);
      } finally {
        bodies.bytes -= c.env.bytes ?? 0;
      }
    });
  }

  route(
    "get",
    "/",
    "The welcome",
    {},
    responses({ "text/plain": z.string(), "text/html": z.string() }),
    (c) => {
      if (preferred(c.req.header("accept"), ["text/plain", "text/html"]) !== "text/html") {
        return c.text(WELCOME);
      }
      c.header(
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; " +
          "script-src 'unsafe-inline'; connect-src 'self'",
      );
      return c.html(PAGE);
    },
  );

  const json = { [JSON_TYPE]: Page, [LINES]: z.string(), [CSV]: z.string() };
  route(
    "get",
    "/api/reading",
    "Readings, the newest first, a page at a time",
    { query: List },
    responses(json, {}, 406),
    async (c, { query }) => {
      const accept = c.req.header("accept");
      const type = preferred(accept, Object.keys(json)) as keyof typeof LINE | undefined;
      if (!type) {
        throw new Problem(406, `Cannot answer as "${accept}": say ${Object.keys(json).join(", ")}`);
      }
      const headers: Record<string, string> = {
        "content-type": type === CSV ? "text/csv; charset=utf-8" : type,
        "vary": "accept",
      };
      if (type === JSON_TYPE && query.limit > PAGE_ROWS) {
        throw wrong("limit", `is above ${PAGE_ROWS}; more at once come as ${LINES} or ${CSV}`);
      }
      const all = pieces(ask, query, type);
      const between = Buffer.from(BETWEEN[type]);
      const link = (next: string) => {
        const url = new URL(c.req.url);
        url.searchParams.set("cursor", next);
        return `<${url.pathname}${url.search}>; rel="next"`;
      };
      const cursor = (end: Position) => Buffer.from(JSON.stringify(end)).toString("base64url");
      if (type === JSON_TYPE || query.limit <= PAGE_ROWS) {
        const parts: Uint8Array[] = [];
        let next: string | undefined;
        for await (const piece of all) {
          if (parts.length) parts.push(between);
          parts.push(piece.body);
          next = piece.next && cursor(piece.next);
          // A page of JSON may end early.
          if (type === JSON_TYPE) break;
        }
        if (next) headers.link = link(next);
        const [open, close] = type === JSON_TYPE
          ? ['{"readings":[', `],"next":${JSON.stringify(next ?? null)}}\n`]
          : [type === CSV ? `${COLUMNS}\r\n` : "", parts.length ? BETWEEN[type] : ""];
        return c.body(
          Buffer.concat([Buffer.from(open), ...parts, Buffer.from(close)]),
          200,
          headers,
        );
      }
      // What is wrong shows before the first byte is on its way.
      const first = await all.next();
      const stream = async function* () {
        if (type === CSV) yield Buffer.from(`${COLUMNS}\r\n`);
        for (let piece = first; !piece.done; piece = await all.next()) {
          yield piece.value.body;
          yield between;
        }
      };
      c.env.streams = true;
      return c.body(ReadableStream.from(stream()), 200, headers);
    },
  );

  route(
    "get",
    "/api/reading/{id}",
    "One reading",
    {
      // Of MongoDB it may have more than a POST may give.
      params: z.object({ id: z.string().max(1_024).regex(/^[^\0]+$/, "has a NUL") }),
      query: z.strictObject({ source: Source.optional() }),
    },
    responses({ [JSON_TYPE]: Reading }, {}, 404, 409),
    async (c, { params: { id }, query: { source } }) => {
      const [body, sources] = await ask(
        `select min(row_to_json(r)::text), json_agg(source)::text
        from (select ${READING} from pgpulse.reading_of($1, $2)) as r`,
        [id, source ?? null],
      );
      const known: string[] = JSON.parse(`${sources ?? "[]"}`);
      if (known.length > 1) {
        throw new Problem(409, `Cannot choose between ${known.length} readings: add ?source=`, {
          sources: known,
        });
      }
      if (!body) throw new Problem(404, `There is no reading "${id}"`);
      return c.body(body as Uint8Array<ArrayBuffer>, 200, { "content-type": JSON_TYPE });
    },
  );

  route(
    "post",
    "/api/reading",
    "Takes readings straight in; the same again changes nothing",
    { body: { required: true, content: { [JSON_TYPE]: { schema: Batch } } } },
    responses({ [JSON_TYPE]: Taken }, {}, 408, 413, 415, 422),
    async (c, { body }) => {
      const result = { taken: 0, replaced: 0, same: 0, failed: [] as Record<string, unknown>[] };
      // All of them before any is taken.
      const lines = body.readings.map(({ payload }, i) => {
        try {
          return JSON.stringify(payload);
        } catch {
          throw wrong(`readings.${i}.payload`, "is nested too deep");
        }
      });
      const places = Map.groupBy(lines.keys(), (i) => body.readings[i].source);
      for (const [source, some] of places) {
        const [said] = await ask(
          `select pgpulse.take_readings($1, array(select json_array_elements_text($2::text::json)), $3)::text`,
          [
            source,
            JSON.stringify(some.map((i) => body.readings[i].id)),
            some.map((i) => lines[i]).join("\n"),
          ],
        );
        const { failed, ...counts } = JSON.parse(`${said}`);
        for (const name of ["taken", "replaced", "same"] as const) result[name] += counts[name];
        result.failed.push(...failed.map((one: object) => ({ source, ...one })));
      }
      for (const name of ["taken", "replaced", "same"] as const) {
        taken.add({ result: name }, result[name]);
      }
      taken.add({ result: "failed" }, result.failed.length);
      if (!result.failed.length) return c.json(result);
      const errors = result.failed.slice(0, 20).map(({ source, id, field, reason }) => ({
        field: `readings.${
          body.readings.findIndex((one) => one.id === id && one.source === source)
        }.payload${field ? `.${field}` : ""}`,
        reason,
      }));
      const count = `${result.failed.length} of ${body.readings.length}`;
      throw new Problem(422, `Cannot take ${count} readings; the others are in`, {
        errors,
        ...result,
      });
    },
  );

  // --- the sync ---

  const begin = async (c: Context<Env>, { query }: { query: { wait: string } }) => {
    if (c.req.method === "HEAD") {
      throw new Problem(405, "HEAD begins no sync", {}, { allow: "GET, POST" });
    }
    if (!sync) throw new Problem(503, "Cannot sync: MONGO_URI is not set");
    const { promise: begun, resolve } = Promise.withResolvers<Run>();
    const all = sync.once("http", resolve);
    let timer: ReturnType<typeof setTimeout> | undefined;
    const patience = new Promise<undefined>((done) => {
      timer = setTimeout(() => done(undefined), query.wait === "false" ? 0 : SYNC_MS);
    });
    const ended = await Promise.race([all, patience]);
    clearTimeout(timer);
    if (ended?.error) {
      throw new Problem(503, `Cannot sync: ${ended.error.replace(/^Cannot sync: /, "")}`, {
        run: ended,
      });
    }
    if (ended) return c.json(ended);
    all.catch(() => {});
    const run = await Promise.race([begun, all]);
    return c.json(run, 202, { location: `/api/sync/runs/${run.id}` });
  };
  const Wait = z.strictObject({
    wait: z.enum(["true", "false"]).default("true").openapi({
      description: `false: 202 at once; true: 202 only where it takes longer than ${
        SYNC_MS / 1e3
      } s`,
    }),
  });
  const runs = responses({ [JSON_TYPE]: RunView }, { 202: RunView });
  const once = "Takes what waits in MongoDB; joins the run in progress, if there is one";
  route("get", "/api/sync/reading", once, { query: Wait }, runs, begin);
  route("post", "/api/sync/reading", once, { query: Wait }, runs, begin);

  const RUN = "id, trigger, started, ended, read, taken, replaced, same, failed, error";
  route(
    "get",
    "/api/sync/runs",
    "Runs of the sync, the newest first",
    {
      query: z.strictObject({
        limit: whole(1, PAGE_ROWS).default(50).openapi({ default: 50 }),
        before: whole(1, 1e15).optional().openapi({ description: "`next` of the page before" }),
      }),
    },
    responses({ [JSON_TYPE]: Runs }),
    async (c, { query: { limit, before = 1e15 } }) => {
      const [found] = await ask(
        `select json_agg(row_to_json(r) order by id desc)::text
        from (
          select ${RUN} from public.sync_runs where id < $1::bigint order by id desc limit $2::int + 1
        ) as r`,
        [String(before), String(limit)],
      );
      const list: Run[] = JSON.parse(`${found ?? "[]"}`);
      const more = list.length > limit;
      const some = list.slice(0, limit);
      return c.json({ runs: some, next: more ? some.at(-1)!.id : null });
    },
  );
  route(
    "get",
    "/api/sync/runs/{id}",
    "One run",
    { params: z.object({ id: whole(1, 1e15) }) },
    responses({ [JSON_TYPE]: RunView }, {}, 404),
    async (c, { params: { id } }) => {
      const [found] = await ask(
        `select row_to_json(r)::text
        from (select ${RUN} from public.sync_runs where id = $1::bigint) as r`,
        [String(id)],
      );
      if (!found) throw new Problem(404, `There is no run ${id}`);
      return c.json(JSON.parse(`${found}`));
    },
  );

  // --- how it is ---

  let looked: { at: number; database: Promise<"up" | "away"> } | undefined;
  const database = () => {
    // However often it is asked for, the database is asked once a second.
    if (!looked || performance.now() - looked.at > 1_000) {
      const asked = ask("select 1").then(
        () => "up" as const,
        (error) => (problemOf(error, ""), "away" as const),
      );
      const late = new Promise<"away">((done) => setTimeout(() => done("away"), 2_000));
      looked = { at: performance.now(), database: Promise.race([asked, late]) };
    }
    return looked.database;
  };
  const health = async (env: Env["Bindings"]): Promise<z.output<typeof Health>> => {
    const status: Partial<SyncStatus> = sync?.status() ?? {};
    const { sources = [], mongo, running = false, trouble = null } = status;
    const known = <T>(values: (T | null)[]) => values.filter((value) => value !== null);
    const backlogs = known(sources.map((one) => one.backlog));
    const lags = known(sources.map((one) => one.lag_seconds));
    const up = await database();
    return {
      status: up === "up" && mongo !== "away" && !trouble ? "ok" : "degraded",
      database: up,
      sync: {
        mongo: mongo ?? "off",
        running,
        trouble: trouble && (signedIn(env) ? trouble : "the log has it"),
        backlog: backlogs.length ? backlogs.reduce((a, b) => a + b) : null,
        lag_seconds: lags.length ? Math.max(...lags) : null,
      },
    };
  };
  for (const path of ["/healthz", "/server/health"]) {
    // 200 while it works: a database that is away is not mended by starting this again.
    route(
      "get",
      path,
      "How it is",
      {},
      responses({ [JSON_TYPE]: Health }),
      async (c) => c.json(await health(c.env)),
    );
  }

  route(
    "get",
    "/metrics",
    "For Prometheus",
    {},
    responses({ "text/plain": z.string() }),
    async (c) => {
      const out: string[] = [];
      const metric = (
        name: string,
        type: string,
        help: string,
        samples: Iterable<[string, number]>,
      ) => {
        out.push(`# HELP pgpulse_etl_${name} ${help}`, `# TYPE pgpulse_etl_${name} ${type}`);
        for (const [labels, value] of samples) out.push(`pgpulse_etl_${name}${labels} ${value}`);
      };
      const up = await database();
      const status: Partial<SyncStatus> = sync?.status() ?? {};
      const { sources = [], mongo, running, trouble, run } = status;
      const by = (value: (one: SyncStatus["sources"][0]) => number | null) =>
        sources.map((one) =>
          [`{source=${JSON.stringify(one.source)}}`, value(one) ?? NaN] as [string, number]
        );
      metric("http_requests_total", "counter", "Requests, by route and status.", requests);
      metric("http_request_seconds", "histogram", "Time until the answer had gone.", []);
      BUCKETS.forEach((le, i) =>
        out.push(`pgpulse_etl_http_request_seconds_bucket{le="${le}"} ${times.buckets[i]}`)
      );
      out.push(
        `pgpulse_etl_http_request_seconds_bucket{le="+Inf"} ${times.count}`,
        `pgpulse_etl_http_request_seconds_sum ${times.sum}`,
        `pgpulse_etl_http_request_seconds_count ${times.count}`,
      );
      metric(
        "posted_readings_total",
        "counter",
        "Readings of POST, by what became of them.",
        taken,
      );
      metric("database_up", "gauge", "1 while the database answers.", [[
        "",
        Number(up === "up"),
      ]]);
      if (sync) {
        metric("mongo_up", "gauge", "1 while MongoDB answers.", [["", Number(mongo === "up")]]);
        metric("sync_running", "gauge", "1 while a run is in progress.", [["", Number(running)]]);
        metric("sync_trouble", "gauge", "1 while it cannot go on, and tries again.", [[
          "",
          Number(Boolean(trouble)),
        ]]);
        metric("sync_backlog", "gauge", "Documents that wait.", by((one) => one.backlog));
        metric(
          "sync_lag_seconds",
          "gauge",
          "Since when the oldest waits.",
          by((one) => one.lag_seconds),
        );
        metric(
          "sync_run_readings",
          "gauge",
          "Of the run in progress, else the last one.",
          run
            ? (["read", "taken", "replaced", "same", "failed"] as const)
              .map((name) => [`{result="${name}"}`, run[name]])
            : [],
        );
      }
      return c.text(out.join("\n") + "\n", 200, { "content-type": "text/plain; version=0.0.4" });
    },
  );

  app.openAPIRegistry.registerComponent("securitySchemes", "token", {
    type: "http",
    scheme: "bearer",
  });
  route(
    "get",
    "/openapi.json",
    "This document",
    {},
    responses({ [JSON_TYPE]: z.looseObject({}) }),
    (c) =>
      c.json(app.getOpenAPI31Document({
        openapi: "3.1.0",
        info: { title: "pgpulse readings", version: "1" },
      })),
  );

  const problem = (c: Context<Env>, { status, message, more, headers }: Problem) =>
    c.body(
      JSON.stringify({
        type: "about:blank",
        title: TITLES[status] ?? "Problem",
        status,
        detail: message,
        request: c.env.id,
        ...more,
      }) + "\n",
      status as 400,
      { ...headers, "content-type": "application/problem+json" },
    );
  app.notFound((c) => {
    const allow = known.filter(({ path }) => path.test(c.req.path)).map(({ method }) => method);
    return problem(
      c,
      allow.length
        ? new Problem(405, `Cannot ${c.req.method} here`, {}, { allow: allow.join(", ") })
        : new Problem(404, `There is nothing at "${c.req.path}"; see / and /openapi.json`),
    );
  });
  app.onError((error, c) => problem(c, problemOf(error, c.env.id, c.req.method)));

  /** Counts an answer once it has gone. */
  const count = (env: Env["Bindings"], status: number, seconds: number) => {
    requests.add({ route: env.route ?? "other", status: String(status) });
    BUCKETS.forEach((le, i) => times.buckets[i] += Number(seconds <= le));
    times.count++;
    times.sum += seconds;
  };
  return { app, count };
}

/** Begins as the welcome does; shows how it is. */
const PAGE = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${WELCOME}</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem; }
  td { padding: 0 1.5rem 0 0; }
  code { font-size: 0.9em; }
</style>
</head>
<body>
<h1>${WELCOME}</h1>
<table id="state"><tr><td>asks how it is</td></tr></table>
<ul>
  <li><a href="api/reading">api/reading</a>: readings, the newest first</li>
  <li><a href="api/sync/runs">api/sync/runs</a>: what was taken from MongoDB, and when</li>
  <li><a href="openapi.json">openapi.json</a>: all that can be asked</li>
  <li><a href="metrics">metrics</a>: for Prometheus</li>
  <li><a href="healthz">healthz</a>: how it is</li>
</ul>
<p>A sync is begun by <code>curl -X POST</code> to <code>api/sync/reading</code>. Where there is an
API_TOKEN, all but this page and healthz ask for it: <code>Authorization: Bearer ...</code></p>
<script>
const table = document.getElementById("state");
const row = (name, value) => {
  const cells = [name, value ?? "unknown"].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  const line = document.createElement("tr");
  line.append(...cells);
  return line;
};
async function look() {
  try {
    const { database, sync } = await (await fetch("healthz")).json();
    table.replaceChildren(
      row("database", database),
      row("MongoDB", sync.mongo),
      row("sync", sync.trouble ?? (sync.mongo === "off" ? "off" : sync.running ? "runs" : "rests")),
      row("waiting in MongoDB", sync.mongo === "off" ? "none" : sync.backlog),
      row("oldest of them waits", sync.lag_seconds === null ? "unknown" : sync.lag_seconds.toFixed(1) + " s"),
    );
  } catch {
    table.replaceChildren(row("the server", "is away"));
  }
  setTimeout(look, 2000);
}
look();
</script>
</body>
</html>
`;

/** Answers HTTP until the signal; gives the exit status. Without MONGO_URI there is no sync. */
export async function serve(
  options: ServeOptions,
  sync: Sync | undefined,
  stop: AbortSignal,
): Promise<number> {
  const sql = connect({
    max: 8,
    connection: { application_name: "pgpulse etl serve", TimeZone: "UTC" },
    // Times go as they are: a Date would lose microseconds.
    types: { date: { to: 1184, from: [1184], serialize: String, parse: String } } as never,
  });
  const { app, count } = api(options, sql, sync);

  /** In parts it shows that a slow client reads. */
  const parts = function* (whole: Uint8Array) {
    for (let at = 0; at < whole.length; at += 2 ** 16) yield whole.subarray(at, at + 2 ** 16);
  };
  const answer = async (incoming: IncomingMessage, outgoing: ServerResponse) => {
    const began = performance.now();
    const { method = "", url = "", headers } = incoming;
    const given = `${headers["x-request-id"] ?? ""}`;
    const env: Env["Bindings"] = {
      incoming,
      id: /^[\w.-]{1,64}$/.test(given) ? given : crypto.randomUUID(),
    };
    let response: Response;
    try {
      // A body is read by the routes that want one. Proxies' clients send whole addresses.
      const path = url.replace(/^https?:\/\/[^/]*/, "");
      const flat = Object.entries(headers).map(([name, value]) =>
        [name, `${value}`] as [string, string]
      );
      response = await app.fetch(
        new Request(`http://localhost${path}`, { method, headers: flat }),
        env,
      );
    } catch {
      response = new Response(`{"status":400,"detail":"Cannot read the request"}\n`, {
        status: 400,
        headers: { "content-type": "application/problem+json" },
      });
    }
    let broken = "";
    let silence: ReturnType<typeof setTimeout> | undefined;
    try {
      const stream = env.streams && response.body;
      const whole = stream ? undefined : new Uint8Array(await response.arrayBuffer());
      outgoing.writeHead(response.status, {
        ...whole && method !== "HEAD" ? { "content-length": whole.length } : {},
        ...Object.fromEntries(response.headers),
        "x-request-id": env.id,
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
      });
      const read = () => {
        clearTimeout(silence);
        silence = setTimeout(() => outgoing.destroy(), SILENCE_MS);
      };
      read();
      outgoing.once("finish", () => clearTimeout(silence));
      const pieces = stream || whole!.length > 2 ** 16 && ReadableStream.from(parts(whole!));
      if (!pieces) outgoing.end(whole);
      else {
        await pipeline(pieces, async function* (pieces) {
          for await (const piece of pieces) {
            read();
            yield piece;
          }
        }, outgoing);
      }
      // What was not wanted of a body is read and forgotten, or the next request waits behind it.
      incoming.resume();
    } catch (error) {
      // Too late for another status; the client sees that the answer is not whole.
      broken = `, broken off: ${(error as Error).message}`;
      clearTimeout(silence);
      outgoing.destroy();
    }
    const ms = performance.now() - began;
    count(env, response.status, ms / 1e3);
    const quiet = response.ok && /^\/(healthz|server\/health|metrics)?$/.test(env.route ?? "-");
    if (!quiet || broken) {
      const client = incoming.socket.remoteAddress;
      const took = `${response.status} in ${ms.toFixed(1)} ms${broken}`;
      console.log(`http ${env.id} ${client} ${method} ${url} ${took}`);
    }
  };
  // node:http, as Deno.serve waits for ever: for headers, for bodies, for clients that do not read.
  const server = createServer({
    headersTimeout: HEADERS_MS,
    requestTimeout: BODY_MS,
    keepAliveTimeout: 15_000,
    connectionsCheckingInterval: 1_000,
  }, (incoming, outgoing) => void answer(incoming, outgoing));
  const bind = options.bind ?? (options.token ? "0.0.0.0" : "127.0.0.1");
  try {
    await new Promise<void>((done, fail) => {
      server.once("error", fail).listen(options.port, bind, done);
    });
  } catch (error) {
    await sql.end({ timeout: 0 });
    const reason = (error as { code?: string }).code === "EADDRINUSE"
      ? "the port is taken; choose another one with --port"
      : (error as Error).message;
    throw new Error(`Cannot listen on "${bind}:${options.port}": ${reason}`);
  }
  const { port } = server.address() as { port: number };
  console.log(`Serves readings at http://${bind.includes(":") ? `[${bind}]` : bind}:${port}/`);
  if (!options.token && !LOOPBACK.test(bind)) {
    console.error("Whoever reaches this address may read and write: API_TOKEN is not set");
  }
  if (!sync) console.log("There is no sync: MONGO_URI is not set");

  await new Promise((done) => stop.aborted ? done(0) : stop.addEventListener("abort", done));
  const closed = new Promise((done) => server.close(done));
  server.closeIdleConnections();
  const timer = setTimeout(() => server.closeAllConnections(), SHUTDOWN_MS);
  await closed;
  clearTimeout(timer);
  await sql.end({ timeout: 1 });
  return 0;
}

// --- end of serve ---

// --- the command line ----------------------------------------------------------------------------

export class UsageError extends Error {}

type Flags = ReturnType<typeof parse>;

export function parse(args: string[]) {
  try {
    const { values, positionals } = parseArgs({
      args,
      allowPositionals: true,
      options: {
        once: { type: "boolean", default: false },
        sync: { type: "boolean", default: false },
        source: { type: "string", multiple: true },
        collection: { type: "string", multiple: true },
        batch: { type: "string", default: "1000" },
        worker: { type: "string", default: hostname() },
        port: { type: "string" },
        bind: { type: "string" },
        cors: { type: "string", multiple: true },
        rate: { type: "string" },
        id: { type: "string" },
        reason: { type: "string" },
        help: { type: "boolean", short: "h", default: false },
      },
    });
    return { ...values, positionals };
  } catch (error) {
    const [first] = (error as Error).message.replaceAll("'", '"').split(/\. |\.?\n|\.$/);
    throw new UsageError(`Cannot read the command line: ${first}`);
  }
}

/** A whole number within bounds. */
function asked(name: string, text: string, least: number, most: number): number {
  const number = /^\d+$/.test(text) ? Number(text) : NaN;
  if (number >= least && number <= most) return number;
  throw new UsageError(
    `Cannot take ${name} "${text}": give a whole number from ${least} to ${most}`,
  );
}

/** The sync that MONGO_URI and the flags name; none without MONGO_URI. */
export function worker(
  { collection, source = [], batch, worker }: Flags,
  sql: postgres.Sql,
  stop: AbortSignal,
): Worker | undefined {
  const uri = Deno.env.get("MONGO_URI");
  const limit = asked("--batch", batch, 1, 10_000);
  if (!uri) return;
  const [, name = "testdb"] = /^mongodb(?:\+srv)?:\/\/[^/]+\/([^?]+)/.exec(uri) ?? [];
  const names = collection ?? (source.length ? [] : ["readings"]);
  const sources = [...new Set([...names.map((one) => `${name}.${one}`), ...source])];
  for (const one of sources) {
    if (!/^[^.$\0/\\ ]+\.[^$\0]+$/.test(one)) {
      throw new UsageError(`Cannot take --source "${one}": give database.collection`);
    }
  }
  const suffix = crypto.randomUUID().slice(0, 6);
  return new Worker({ uri, sources, batch: limit, worker: `${worker}/${suffix}` }, sql, stop);
}

const number = (n: number) => n.toLocaleString("en");
const counted = ({ read, taken, replaced, same, failed }: Counts) =>
  `${number(read)} read: ${number(taken)} new, ${number(replaced)} replaced, ` +
  `${number(same)} there before, ${number(failed)} failed`;

/** Shows how far it is, as long as much waits: a bar on a terminal, elsewhere a line each 5 s. */
async function progress(sync: Worker, stop: AbortSignal): Promise<void> {
  const terminal = Deno.stderr.isTerminal();
  const begun = performance.now();
  let all = 0;
  while (!stop.aborted) {
    await sleep(terminal ? 200 : 5_000, stop);
    const { run, trouble } = sync.status();
    if (!run || run.ended || trouble) continue;
    // The first count says how long the bar is.
    all ||= await sync.backlog().then((left) => run.read + left, () => 0);
    const share = Math.min(1, run.read / Math.max(all, run.read, 1));
    const ms = performance.now() - begun;
    const left = share > 0 && share < 1
      ? `, ${Math.ceil(ms / share * (1 - share) / 1000)} s left`
      : "";
    const text =
      `${Math.floor(share * 100)} %, ${number(run.read)} of ${number(Math.max(all, run.read))}` +
      `, ${number(Math.round(run.read / ms * 1000))}/s${left}`;
    const full = Math.round(share * 30);
    const bar = `\r\x1b[2K[${"#".repeat(full)}${"-".repeat(30 - full)}] ${text}`;
    await Deno.stderr.write(new TextEncoder().encode(terminal ? bar : `${text}\n`));
  }
  if (terminal) console.error();
}

/** One run on the command line; gives the exit status. */
async function runOnce(sync: Worker, trigger: string, stop: AbortSignal): Promise<number> {
  const shown = new AbortController();
  const bar = progress(sync, AbortSignal.any([stop, shown.signal]));
  const run = await sync.once(trigger, undefined, true);
  shown.abort();
  await bar;
  console.log(counted(run));
  if (run.error) console.error(run.error);
  return run.error ? 1 : 0;
}

async function main(args: string[]): Promise<number> {
  const flags = parse(args);
  const [command, ...more] = flags.positionals;
  if (flags.help) {
    console.log(HELP);
    return 0;
  }
  if (!["sync", "serve", "replay"].includes(command) || more.length) {
    throw new UsageError(`Cannot do "${flags.positionals.join(" ")}": say sync, serve or replay`);
  }
  const stop = new AbortController();
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    if (Deno.build.os !== "windows" || signal === "SIGINT") {
      // The second time it ends at once, and what is in hand comes again.
      Deno.addSignalListener(signal, () => stop.signal.aborted ? Deno.exit(130) : stop.abort());
    }
  }
  const env = (name: string) => Deno.env.get(name) || undefined;
  const sql = connect({
    max: LANES + 1,
    connection: { application_name: "pgpulse etl" },
  });
  let sync: Worker | undefined;
  // The batch in hand is finished, but holds up the end no longer than this.
  const late = new Promise<number>((done) =>
    stop.signal.addEventListener("abort", () => setTimeout(() => done(130), 3_500))
  );
  const work = async () => {
    if (command === "replay") {
      const { source, id, reason } = flags;
      const named = source ?? (await sql<{ source: string }[]>`
        select distinct source from public.reading_failures`).map(({ source }) => source);
      const there = named.filter((one) => one.includes("."));
      if (there.length) sync = worker({ ...flags, source: there }, sql, stop.signal);
      const { back, left, ...counts } = await replay(sql, sync, { source, id, reason });
      if (back) console.log(`${number(back)} put back to "ingested" in MongoDB`);
      if (left) {
        console.log(`${number(left)} left alone: they are another's, or have another status`);
      }
      if (counts.read) {
        console.log(`Of those no longer in MongoDB, or without it: ${counted(counts)}`);
      }
      if (!back && !left && !counts.read) console.log("There is no such failed reading");
      return back ? await runOnce(sync!, "replay", stop.signal) : counts.failed ? 1 : 0;
    }
    sync = worker(flags, sql, stop.signal);
    if (command === "serve") {
      const rate = asked("--rate", flags.rate ?? env("API_RATE") ?? "100", 0, 1e6);
      const options = {
        port: asked("--port", flags.port ?? env("PORT") ?? "8085", 0, 65_535),
        bind: flags.bind,
        token: env("API_TOKEN"),
        cors: flags.cors ?? env("API_CORS")?.split(",").map((origin) => origin.trim()),
        rate,
      };
      if (!flags.sync) return await serve(options, sync, stop.signal);
      if (!sync) throw new UsageError("Cannot sync: set MONGO_URI");
      // Whatever befalls the sync, HTTP goes on and tells.
      const [status] = await Promise.all([serve(options, sync, stop.signal), sync.keep(true)]);
      return status;
    }
    if (!sync) throw new UsageError("Cannot sync: set MONGO_URI");
    if (flags.once) return await runOnce(sync, "once", stop.signal);
    console.log(`Syncs ${sync.status().sources.map(({ source }) => source).join(", ")}`);
    const bar = Deno.stderr.isTerminal() ? progress(sync, stop.signal) : undefined;
    await sync.keep();
    await bar;
    return 0;
  };
  try {
    return await Promise.race([work(), late]);
  } catch (error) {
    if (error instanceof MongoError) throw new Error(explainMongo(error, sync?.client));
    if (!(error instanceof Error && "code" in error)) throw error;
    throw new Error(explain(error, sql));
  } finally {
    if (!stop.signal.aborted) stop.abort();
    await Promise.race([sync?.close(), sleep(1_000)]);
    await sql.end({ timeout: 0 });
  }
}

if (import.meta.main) {
  try {
    Deno.exit(await main(Deno.args));
  } catch (error) {
    console.error(error instanceof Error ? error.message : String(error));
    if (error instanceof UsageError) console.error("See etl.ts --help");
    Deno.exit(error instanceof UsageError ? 2 : 1);
  }
}

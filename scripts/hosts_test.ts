// Hosts: samples taken exactly once whatever happens, by those who may, and read as columns.

import { deepStrictEqual, match, ok, rejects, strictEqual } from "node:assert";
import postgres from "npm:postgres@3.4.9";
import { summary } from "./collect.ts";
import { background, GrafanaStandIn, migrated, script, until } from "./testing.ts";

type Json = Record<string, unknown>;

const METRICS = {
  cpu: { used: 0.5, user: 0.3, system: 0.15, iowait: 0.04, steal: 0.01, cores: 8 },
  load: [3, 2, 1],
  memory: { total: 1000, available: 400, free: 100, buffers: 50, cached: 250 },
  swap: { total: 200, used: 50 },
  filesystems: {
    "/": {
      device: "/dev/vda1",
      type: "ext4",
      size: 1000,
      used: 600,
      available: 300,
      inodes: 100,
      inodes_used: 10,
    },
    "/data": {
      device: "/dev/vdb1",
      type: "xfs",
      size: 1000,
      used: 100,
      available: 900,
      inodes: 100,
      inodes_used: 20,
    },
    "/snap/core": { device: "/dev/loop1", type: "squashfs", size: 10, used: 10, available: 0 },
  },
  disks: {
    vda: { read_bytes: 10, written_bytes: 20, reads: 1, writes: 2, busy: 0.1 },
    vdb: { read_bytes: 1, written_bytes: 2, reads: 1, writes: 2, busy: 0.7 },
  },
  network: {
    eth0: {
      received_bytes: 100,
      sent_bytes: 50,
      received_packets: 5,
      sent_packets: 4,
      received_errors: 0,
      sent_errors: 0,
      received_drops: 1,
      sent_drops: 0,
    },
  },
  uptime: 1234,
  processes: { total: 99, running: 2, blocked: 1 },
  sockets: { tcp: 12, udp: 3 },
  temperatures: { "coretemp Package id 0": 45.5 },
  container: { cpu_limit: 2, cpu_used: 0.4, memory_limit: 500, memory_used: 100 },
  scrape: { 'http_requests_total{code="200"}': 3.2 },
  collector: { spool_bytes: 0, spool_samples: 0, lost: 7, seconds: 0.0004 },
};

const record = (host: string, time: number, more: Json = {}) => ({
  time: new Date(time).toISOString(),
  host,
  tags: { rack: "7" },
  about: { os: "Debian GNU/Linux 12", version: "1", interval: 5 },
  ...summary((more.metrics ?? METRICS) as Json),
  metrics: METRICS,
  ...more,
});

const second = () => Math.floor(Date.now() / 1000) * 1000;

Deno.test("pgpulse.collect", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  await using clients = new AsyncDisposableStack();
  const client = (role: string, password: string) => {
    const sql = postgres(server.urlFor(role, password), { max: 4, onnotice: () => {} });
    clients.defer(() => sql.end());
    return sql;
  };
  const collector = client("collector", "collect");
  const collect = async (batch: unknown, as = collector) => {
    const [{ answer }] = await as`
      select pgpulse.collect(${JSON.stringify(batch)}::text::json) as answer
    `;
    return answer as { taken: number; known: number };
  };
  /** Runs it and gives the error. */
  const fault = async (batch: unknown, as = collector) => {
    const error = await collect(batch, as).then(() => undefined, (error) => error);
    ok(error, "it was taken");
    return error as postgres.PostgresError;
  };
  const count = async (host: string) => {
    const [{ n }] = await sql`select count(*)::int as n from system_metrics where host = ${host}`;
    return n;
  };

  await t.step("takes each sample once, however often and at once it is sent", async () => {
    const now = second();
    const batch = Array.from({ length: 20 }, (_, i) => record("once", now - i * 5000));
    deepStrictEqual(await collect(batch), { taken: 20, known: 0 });
    deepStrictEqual(await collect(batch), { taken: 0, known: 20 });
    deepStrictEqual(await collect([...batch.slice(5), record("once", now + 5000)]), {
      taken: 1,
      known: 15,
    });
    const twice = record("twice", now);
    deepStrictEqual(await collect([twice, twice]), { taken: 1, known: 1 });
    const many = Array.from({ length: 50 }, (_, i) => record("at once", now - i * 1000));
    const answers = await Promise.all([many, many, many, many].map((batch) => collect(batch)));
    strictEqual(answers.reduce((sum, { taken }) => sum + taken, 0), 50);
    strictEqual(await count("at once"), 50);
    strictEqual(await count("once"), 21);
    deepStrictEqual(await collect([]), { taken: 0, known: 0 });
  });

  await t.step("keeps the registry: the newest sample tells, old ones do not", async () => {
    const now = second();
    const read = async (host: string) => {
      const [row] = await sql`
        select first_seen, last_seen, last_time, os, version, extract(epoch from "interval")::float8 as interval,
            tags, clock_offset, lost::int, role
        from hosts where host = ${host}`;
      return row;
    };
    const about = (ahead: number, more: Json = {}) => ({
      about: {
        os: "Debian GNU/Linux 12",
        version: "1",
        interval: 5,
        now: new Date(Date.now() + ahead * 1000),
        ...more,
      },
    });
    await collect([record("kept", now, about(0))]);
    const first = await read("kept");
    deepStrictEqual(
      [
        first.os,
        first.version,
        first.interval,
        first.tags,
        first.lost,
        first.role,
        +first.last_time,
      ],
      ["Debian GNU/Linux 12", "1", 5, { rack: "7" }, 7, null, now],
    );
    ok(Math.abs(first.clock_offset) < 5, `${first.clock_offset}`);
    ok(Math.abs(+first.first_seen - Date.now()) < 60_000);
    // the backlog
    const old = { about: { os: "old", version: "0", interval: 60 }, tags: {} };
    await collect([record("kept", now - 3_600_000, old), record("kept", now - 1_800_000, old)]);
    const second_ = await read("kept");
    deepStrictEqual([second_.os, second_.interval, +second_.last_time], [first.os, 5, now]);
    strictEqual(+second_.first_seen, +first.first_seen);
    ok(second_.last_seen > first.last_seen);
    // a newer one, with its clock said; the newest of a batch counts, wherever it stands
    await collect([
      record("kept", now + 5000, about(90, { os: "new" })),
      record("kept", now - 1000, old),
    ]);
    const third = await read("kept");
    deepStrictEqual([third.os, third.version, third.interval], ["new", "1", 5]);
    ok(third.clock_offset > 85 && third.clock_offset < 95, `${third.clock_offset}`);
    // far ahead, then put right
    await collect([record("kept", now + 7_200_000, { ...about(7_200), tags: { wrong: "1" } })]);
    ok((await read("kept")).clock_offset > 7000);
    await collect([record("kept", now + 10_000, about(0))]);
    const right = await read("kept");
    deepStrictEqual([right.tags, +right.last_time], [{ rack: "7" }, now + 10_000]);
    ok(Math.abs(right.clock_offset) < 60, `${right.clock_offset}`);
    // put back by an hour: what is fresh tells, whatever its time
    await collect([record("kept", now - 3_585_000, about(-3_600))]);
    const behind = await read("kept");
    strictEqual(+behind.last_time, now - 3_585_000);
    ok(behind.clock_offset < -3_500 && behind.clock_offset > -3_700, `${behind.clock_offset}`);
    // a backlog says nothing of the clock, even where nothing newer is known
    await collect([record("asleep", now - 7_200_000), record("kept", now - 1_000)]);
    deepStrictEqual(
      [(await read("asleep")).clock_offset, (await read("kept")).clock_offset],
      [null, behind.clock_offset],
    );
  });

  await t.step("a bad record is named, and nothing of its batch is taken", async () => {
    const now = second();
    const good = record("bad", now);
    const cases: [Json | unknown, RegExp][] = [
      [record("bad", now, { time: undefined }), /record 2 of 3 is bad: it has no time/],
      [record("bad", now, { time: "yesterday" }), /yesterday|no time/],
      [record("bad", now, { time: "2026-11-22 12:00" }), /no time/],
      [record("bad", now, { time: "2026-13-45T00:00:00Z" }), /out of range/],
      [record("bad", now, { time: "infinity" }), /infinity|no time/],
      [record("bad", now + 90_000_000), /more than a day ahead/],
      [record("bad", now, { time: "1969-01-01T00:00:00Z" }), /before 1970/],
      [record("bad", now, { host: undefined }), /no host/],
      [record("bad", now, { host: "" }), /no host/],
      [record("x".repeat(256), now), /no host/],
      [record("bad", now, { metrics: undefined }), /metrics are no object/],
      [record("bad", now, { metrics: [1] }), /metrics are no object/],
      [record("bad", now, { tags: "red" }), /tags are no object/],
      [record("bad", now, { about: { interval: -5 } }), /interval/],
      [record("bad", now, { about: { interval: "soon" } }), /soon/],
      [record("bad", now, { instance: "" }), /instance/],
      [record("bad", now, { cpu: "much" }), /record 2 of 3 is bad: .*much/],
      [record("bad", now, { cpu: "NaN" }), /record 2 of 3 is bad: a number of it is NaN/],
      [record("bad", now, { sent_bytes: "Infinity" }), /is NaN or infinite/],
      [record("bad", now, { load1: "-Infinity" }), /is NaN or infinite/],
      [record("bad", now, { about: { now: "soon" } }), /record 2 of 3 is bad: .*soon/],
      [
        record("bad", now, { metrics: { collector: { lost: 1.5 } } }),
        /record 2 of 3 is bad: .*bigint: "1\.5"/,
      ],
      [record("bad", now, { metrics: { filesystems: 1 } }), /filesystems/],
      [record("bad", now, { metrics: { network: [] } }), /network/],
      [record("bad", now, { metrics: { scrape: 5 } }), /scrape/],
      [7, /record 2 of 3/],
      [null, /record 2 of 3/],
    ];
    for (const [bad, reason] of cases) {
      const error = await fault([good, bad, good]);
      strictEqual(error.code, "22023", `${JSON.stringify(bad)}: ${error.message}`);
      match(error.message, reason);
    }
    // numbers that JSON can say and a column cannot hold
    await rejects(
      collector.unsafe(
        `select pgpulse.collect('[${JSON.stringify(good).replace('"cpu":0.5', '"cpu":1e999')}]')`,
      ),
      /record 1 of 1 .* out of range/,
    );
    strictEqual((await fault({ time: 1 })).code, "22023");
    strictEqual((await fault(null)).code, "22023");
    strictEqual(await count("bad"), 0);
    const [{ known }] = await sql`select count(*)::int as known from hosts where host = 'bad'`;
    strictEqual(known, 0);
  });

  await t.step("a bound role writes for its hosts only, and nobody else for them", async () => {
    const now = second();
    await sql.unsafe(`create role agent login password 'agent' in role collector`);
    const agent = client("agent", "agent");
    deepStrictEqual(await collect([record("free", now)], agent), { taken: 1, known: 0 });
    await sql`select pgpulse.bind_host('bound', 'agent')`;
    const [{ shown }] =
      await sql`select count(*)::int as shown from hosts_now where host = 'bound'`;
    strictEqual(shown, 0, "it has sent nothing yet");
    const other = await fault([record("free", now), record("bound", now)]);
    strictEqual(other.code, "42501");
    match(other.message, /Cannot take samples of host "bound": it is bound to role "agent"/);
    const away = await fault([record("bound", now), record("free", now + 1000)], agent);
    strictEqual(away.code, "42501");
    match(away.message, /host "free": role "agent" is bound to other hosts/);
    strictEqual((await fault([record("bound", now, { instance: "a@b" })])).code, "42501");
    strictEqual((await fault([record("new", now)], agent)).code, "42501");
    // A database goes with the host that has sent its newest sample.
    const watched = (host: string, i: number) =>
      record(host, now + i, { instance: "testdb@db1:5432", metrics: {} });
    await collect([watched("free", 0)]);
    const stolen = await fault([watched("bound", 1)], agent);
    strictEqual(stolen.code, "42501");
    match(
      stolen.message,
      /samples of "testdb@db1:5432", which are from host "free": role "agent" is bound to other/,
    );
    deepStrictEqual(await collect([watched("other", 2)]), { taken: 1, known: 0 });
    await sql`select pgpulse.bind_host('other', 'agent')`;
    match(
      (await fault([record("free", now + 2000), watched("free", 3)])).message,
      /samples of "testdb@db1:5432", which are from host "other": it is bound to role "agent"/,
    );
    deepStrictEqual(await collect([watched("bound", 4)], agent), { taken: 1, known: 0 });
    await sql`delete from postgresql_metrics where instance = 'testdb@db1:5432'`;
    await sql`delete from postgresql_instances`;
    await sql`select pgpulse.bind_host('other', null)`;
    deepStrictEqual(await collect([record("bound", now)], agent), { taken: 1, known: 0 });
    await rejects(sql`select pgpulse.bind_host('bound', 'nobody_of_that_name')`, /no such role/);
    await rejects(collector`select pgpulse.bind_host('bound', null)`, /permission denied/);
    await sql`select pgpulse.bind_host('bound', null)`;
    deepStrictEqual(await collect([record("bound", now + 1000)]), { taken: 1, known: 0 });
    deepStrictEqual(await collect([record("free", now + 1000)], agent), { taken: 1, known: 0 });
  });

  await t.step("role collector can call that and nothing else", async () => {
    for (
      const command of [
        "select from system_metrics",
        "select from hosts",
        "select from hosts_now",
        "select from rows.system_metrics",
        "select from rollup.hosts",
        "select from live.cpu",
        "select from pgpulse.storage",
        "insert into hosts (host) values ('x')",
        "insert into system_metrics (time, host, metrics) values (now(), 'x', '{}')",
        "insert into rows.system_metrics (time, host, metrics) values (now(), 'x', '{}')",
        "delete from hosts",
        "create table public.mine (a int)",
        "select pgpulse.watch_stream('{cpu}', 'x')",
        "select pgpulse.hold_lease('x', 'x', 1)",
        "select pgpulse.upkeep()",
      ]
    ) {
      await rejects(collector.unsafe(command), { code: "42501" }, command);
    }
    const [{ functions }] = await sql`
      select array_agg(proname::text order by proname) as functions
      from pg_proc p
      where p.prosecdef and has_function_privilege('collector', p.oid, 'execute')
          and has_schema_privilege('collector', p.pronamespace, 'usage')
    `;
    // The others tell names and a number.
    deepStrictEqual(functions, ["cluster", "collect", "name_of", "rows_of", "sink_position"]);
  });

  await t.step("views show every part", async () => {
    const time = second();
    await collect([
      record("seen", time),
      { time: new Date(time), host: "bare", metrics: {} },
    ]);
    const one = async (view: string, more = "true") => {
      const rows = await sql.unsafe(`select * from ${view} where host = 'seen' and ${more}`);
      strictEqual(rows.length, 1, view);
      const { time: at, host: _, ...rest } = rows[0];
      if (at) strictEqual(+at, time);
      return rest;
    };
    deepStrictEqual(await one("host_cpu"), {
      cpu: 0.5,
      user: 0.3,
      system: 0.15,
      iowait: 0.04,
      steal: 0.01,
      cores: 8,
    });
    deepStrictEqual(await one("host_load"), { load1: 3, load5: 2, load15: 1 });
    deepStrictEqual(await one("host_memory"), {
      total: 1000,
      available: 400,
      used: 600,
      used_ratio: 0.6,
      swap_total: 200,
      swap_used: 50,
    });
    deepStrictEqual(await one("host_filesystems", "mount = '/'"), {
      mount: "/",
      device: "/dev/vda1",
      type: "ext4",
      size: 1000,
      used: 600,
      available: 300,
      used_ratio: 600 / 900,
      inodes: 100,
      inodes_used: 10,
      image: false,
    });
    strictEqual((await one("host_filesystems", "mount = '/snap/core'")).image, true);
    deepStrictEqual(await one("host_disks", "disk = 'vda'"), {
      disk: "vda",
      read_bytes: 10,
      written_bytes: 20,
      reads: 1,
      writes: 2,
      busy: 0.1,
    });
    const { interface: name, received_bytes, received_drops } = await one(
      "host_network",
      "interface = 'eth0'",
    );
    deepStrictEqual([name, received_bytes, received_drops], ["eth0", 100, 1]);
    deepStrictEqual(await one("host_temperatures"), {
      sensor: "coretemp Package id 0",
      celsius: 45.5,
    });
    deepStrictEqual(await one("host_scrapes"), {
      name: 'http_requests_total{code="200"}',
      value: 3.2,
    });
    deepStrictEqual(await one("host_containers"), {
      cpu_limit: 2,
      cpu_used: 0.4,
      memory_limit: 500,
      memory_used: 100,
    });
    deepStrictEqual(await one("host_system"), {
      uptime: 1234,
      processes: 99,
      running: 2,
      blocked: 1,
      tcp_sockets: 12,
      udp_sockets: 3,
    });
    const now = await one("hosts_now");
    deepStrictEqual(
      [now.silent, now.cpu, now.load1, now.memory_used, now.swap_used, now.cores, now.uptime],
      [false, 0.5, 3, 0.6, 0.25, 8, 1234],
    );
    deepStrictEqual(
      [now.filesystem_used, now.inodes_used, now.disk_busy, now.disk_bytes],
      [0.666667, 0.2, 0.7, 33],
    );
    deepStrictEqual([now.received_bytes, now.sent_bytes], [100, 50]);
    // What a system does not have is null, in the same rows.
    const [bare] = await sql`
      select c.cpu, c.cores, m.total, l.load1 from host_cpu c
      join host_memory m using (host, time) join host_load l using (host, time)
      where host = 'bare'`;
    deepStrictEqual({ ...bare }, { cpu: null, cores: null, total: null, load1: null });
  });

  await t.step("a host that stops is silent after three intervals, and stays listed", async () => {
    await collect([record("stops", second(), { about: { interval: 10 } })]);
    const silent = async (ago: number) => {
      await sql`update hosts set last_seen = now() - ${`${ago} s`}::interval where host = 'stops'`;
      const [row] = await sql`select silent, cpu from hosts_now where host = 'stops'`;
      strictEqual(row.cpu, 0.5);
      return row.silent;
    };
    deepStrictEqual([await silent(25), await silent(31), await silent(80_000)], [
      false,
      true,
      true,
    ]);
  });

  await t.step("role server reads every view", async () => {
    const server = client("server", "server");
    const views = await sql`
      select viewname as name from pg_views
      where schemaname = 'public' and viewname ~ '^(hosts?|postgresql)_'`;
    ok(views.length > 25, `${views.length}`);
    for (const { name } of views) await server`select * from ${server(name)} limit 1`;
  });

  await t.step("pgpulse.fleet has each host at each moment, whatever its interval", async () => {
    const upto = Math.floor(Date.now() / 1000);
    for (const interval of [5, 7, 700]) {
      const newest = Math.floor(upto / interval) * interval;
      const times = Array.from(
        { length: Math.ceil(2000 / interval) + 1 },
        (_, i) => (newest - i * interval) * 1000,
      );
      await collect(
        times.map((time) => record(`every ${interval}`, time, { about: { interval } })),
      );
    }
    const found = await sql`
      select host, count(*)::int as n, count(distinct time)::int as moments
      from pgpulse.fleet(to_timestamp(${upto - 1000}), to_timestamp(${upto}))
      where host like 'every %'
      group by 1
      order by 1`;
    const [{ n }] = found;
    ok(n >= 15, `${n}`);
    deepStrictEqual([...found].map((row) => ({ ...row })), [
      { host: "every 5", n, moments: n },
      { host: "every 7", n, moments: n },
      { host: "every 700", n, moments: n },
    ]);
  });

  await t.step(
    "pgpulse.fleet has a host that has just begun, and moments since the first",
    async () => {
      const now = Date.now();
      const since = Math.floor(now / 60_000) * 60_000 - 180_000;
      await sql.begin(async (tx) => {
        // A fleet of its own, for the length of this transaction.
        await tx`delete from rows.system_metrics`;
        await tx`update hosts set last_seen = null`;
        const young = Array.from({ length: 36 }, (_, i) => record("young", since + i * 5_000));
        for (const batch of [young, [record("new", Math.floor(now / 1000) * 1000 + 3)]]) {
          await tx`select pgpulse.collect(${JSON.stringify(batch)}::text::json)`;
        }
        const found = await tx`
        select host, count(*)::int as n
        from pgpulse.fleet(now() - interval '6 hours', now())
        group by 1
        order by 1`;
        deepStrictEqual(found.map(({ host, n }) => [host, n > 10]), [["new", false], [
          "young",
          true,
        ]]);
        strictEqual(found[0].n, 1);
        throw undefined;
      }).catch((error) => {
        if (error) throw error;
      });
    },
  );

  await t.step("live streams read them", async () => {
    const [row] = await sql`
      select c.used, c."user", c.system, c.iowait, c.steal, m.used as memory, m.swap, n.received, n.sent
      from live.cpu c join live.memory m using (host, time) join live.network n using (host, time)
      where host = 'seen'`;
    deepStrictEqual({ ...row }, {
      used: 0.5,
      user: 0.3,
      system: 0.15,
      iowait: 0.04,
      steal: 0.01,
      memory: 0.6,
      swap: 0.25,
      received: 100,
      sent: 50,
    });
    // Each collector's every sample would send a NOTIFY.
    const [{ hints }] = await sql`
      select count(*)::int as hints from pg_trigger
      where tgname = 'pgpulse_hint' and tgrelid = pgpulse.rows_of('system_metrics')`;
    strictEqual(hints, 0);
  });

  await t.step("samples of databases go into their own table", async () => {
    const now = second();
    const one = record("db1", now, { instance: "testdb@db1:5432", metrics: { connections: 5 } });
    deepStrictEqual(await collect([one, record("db1", now)]), { taken: 2, known: 0 });
    deepStrictEqual(await collect([one, record("db1", now)]), { taken: 0, known: 2 });
    const rows = await sql`select host, instance, metrics from postgresql_metrics`;
    deepStrictEqual([...rows].map((r) => ({ ...r })), [
      { host: "db1", instance: "testdb@db1:5432", metrics: { connections: 5 } },
    ]);
  });
});

Deno.test("samples in packed history and rollups", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  const collect = async (batch: unknown) => {
    const [{ answer }] = await sql`
      select pgpulse.collect(${JSON.stringify(batch)}::text::json) as answer
    `;
    return answer as { taken: number; known: number };
  };
  const DAY = 86_400_000;
  // Noon, so that a sample and those beside it lie in one period.
  const noon = (ago: number) => Math.floor(Date.now() / DAY) * DAY + DAY / 2 - ago * DAY;
  const upkeep = async () => {
    for (let more = true; more;) {
      const rows = await sql`select more, fault from pgpulse.upkeep()`;
      for (const { fault } of rows) strictEqual(fault, null);
      more = rows.some((row) => row.more);
    }
  };
  const packed = async () => {
    const [{ n }] =
      await sql`select coalesce(sum(chunk$rows), 0)::int as n from packed.system_metrics`;
    return n;
  };
  const values = (i: number) => ({
    cpu: { used: (i % 97) / 100, iowait: (i % 7) / 100, steal: 0 },
    load: [i % 11],
    memory: { total: 1000, available: i % 1000 },
    network: { eth0: { received_bytes: i * 3, sent_bytes: i } },
    ...i % 5 ? { swap: { total: 100, used: i % 100 } } : {},
  });

  await t.step("old samples are packed, and known all the same", async () => {
    for (const ago of [6, 5, 1, 0]) {
      const batch = Array.from(
        { length: 200 },
        (_, i) => record(`host ${i % 2}`, noon(ago) - i * 1000, { metrics: values(i + ago) }),
      );
      deepStrictEqual(await collect(batch), { taken: 200, known: 0 });
    }
    await upkeep();
    strictEqual(await packed(), 400);
    for (const ago of [6, 5, 1]) {
      const batch = Array.from(
        { length: 200 },
        (_, i) => record(`host ${i % 2}`, noon(ago) - i * 1000, { metrics: values(i + ago) }),
      );
      // and one that is new, into the packed period
      const late = record("host 0", noon(ago) + 500, { metrics: values(3) });
      deepStrictEqual(await collect([...batch, late]), { taken: 1, known: 200 });
      deepStrictEqual(await collect([late]), { taken: 0, known: 1 });
    }
    await upkeep();
    strictEqual(await packed(), 402);
    const [{ rows, different }] = await sql`
      select count(*)::int as rows, count(distinct (host, time))::int as different from system_metrics`;
    deepStrictEqual([rows, different], [803, 803]);
  });

  await t.step("a repeat waits for the packing under way, and is not taken", async () => {
    const batch = Array.from({ length: 300 }, (_, i) => record("race", noon(6) - i * 1000));
    await collect(batch);
    await sql`select pgpulse.refresh_rollups()`;
    let answer: { taken: number; known: number } | undefined;
    let sending: Promise<unknown> = Promise.resolve();
    await sql.begin(async (tx) => {
      const rows =
        await tx`select action, detail, more from pgpulse.upkeep_storage() where action is not null`;
      ok(rows.some(({ detail }) => /300 rows/.test(detail)), JSON.stringify(rows));
      sending = collect(batch).then((result) => answer = result);
      await until("it waits", async () => {
        const [{ n }] = await sql`
          select count(*)::int as n from pg_stat_activity
          where wait_event_type = 'Lock' and query like '%pgpulse.collect%'`;
        return n > 0;
      });
      strictEqual(answer, undefined);
    });
    await sending;
    deepStrictEqual(answer, { taken: 0, known: 300 });
    const [{ n }] = await sql`select count(*)::int as n from system_metrics where host = 'race'`;
    strictEqual(n, 300);
  });

  await t.step("rollups are what a recount of the JSON gives", async () => {
    await upkeep();
    await collect(
      Array.from(
        { length: 50 },
        (_, i) => record("host 1", noon(0) + 1000 + i * 997, { metrics: values(i) }),
      ),
    );
    for (const [step, unit] of [["1 minute", "minute"], ["1 hour", "hour"], ["1 day", "day"]]) {
      const [{ different, rows }] = await sql`
        with counted as (
            select
                date_trunc(${unit}, time, 'UTC') as time,
                host,
                count(*) as points,
                avg((metrics #>> '{cpu,used}')::float8) as cpu,
                max((metrics #>> '{cpu,iowait}')::float8) as iowait,
                min(1 - (metrics #>> '{memory,available}')::float8 / 1000) as memory,
                count(metrics #> '{swap,used}') as swap,
                sum((metrics #>> '{network,eth0,received_bytes}')::float8) as received
            from system_metrics
            where host like 'host %'
            group by 1, 2
        )
        select count(*)::int as rows, count(*) filter (where
            r.points is distinct from c.points
            or abs(r.cpu_avg - c.cpu) > 1e-9
            or r.iowait_max <> c.iowait
            or abs(r.memory_used_min - c.memory) > 1e-9
            or r.swap_used_count <> c.swap
            or r.received_bytes_sum <> c.received
            or c.points is null
        )::int as different
        from counted c
        full join (
            select * from rollup.hosts where step = ${step}::interval and host like 'host %'
        ) as r using (time, host)`;
      ok(rows >= 8, `${rows}`);
      strictEqual(different, 0, step);
    }
    const [kept] =
      await sql`select keep_1m::text, keep_1h::text, keep_1d from pgpulse.rollups where rollup = 'hosts'`;
    deepStrictEqual({ ...kept }, { keep_1m: "90 days", keep_1h: "2 years", keep_1d: null });
    const [stored] = await sql`
      select pack_after::text, keep::text from pgpulse.storage where source = 'system_metrics'::regclass`;
    deepStrictEqual({ ...stored }, { pack_after: "3 days", keep: "14 days" });
  });

  await t.step("nothing of it is lost when the table is made plain again", async () => {
    await sql`select pgpulse.drop_storage('system_metrics')`;
    const late = record("host 0", noon(6), { metrics: values(0) });
    deepStrictEqual(await collect([late, record("host 0", noon(0) + 777)]), { taken: 1, known: 1 });
    const [{ n, live }] = await sql`
      select (select count(*)::int from system_metrics) as n, (select count(*)::int from live.cpu) as live`;
    deepStrictEqual([n, live > 0], [1154, true]);
    await sql`select pgpulse.add_hosts()`;
    deepStrictEqual(await collect([late]), { taken: 0, known: 1 });
  });
});

Deno.test("pgpulse.watch_stream", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  const grafana = postgres(server.urlFor("grafana_readonly", "grafana"), {
    max: 1,
    onnotice: () => {},
  });
  await using _ = { [Symbol.asyncDispose]: () => grafana.end() };
  const watch = async (streams: string[], value: string | null) => {
    const [row] = await grafana`select pgpulse.watch_stream(${streams}, ${value}) as watched`;
    return row.watched;
  };
  await t.step("renews a lease of two minutes for streams that are split", async () => {
    strictEqual(await watch(["cpu", "memory", "metrics", "absent"], "web1"), true);
    const leases = () =>
      sql`
      select stream, value, extract(epoch from until - now())::float8 as left from pgpulse.watches order by 1`;
    const first = await leases();
    deepStrictEqual(first.map(({ stream, value }) => [stream, value]), [["cpu", "web1"], [
      "memory",
      "web1",
    ]]);
    ok(first.every(({ left }) => left > 110 && left <= 120));
    await sql`update pgpulse.watches set until = now() + '30 seconds' where stream = 'cpu'`;
    await sql`update pgpulse.watches set until = now() + '100 seconds' where stream = 'memory'`;
    await watch(["cpu", "memory"], "web1");
    const [cpu, memory] = await leases();
    ok(cpu.left > 110, `${cpu.left}`);
    ok(memory.left < 105, "one that is fresh is not written");
    await sql`update pgpulse.watches set until = now() - interval '1 hour'`;
    await watch(["network"], "web2");
    deepStrictEqual((await leases()).map(({ stream }) => stream), ["network"]);
  });
  await t.step("where there are many, only for values that are there", async () => {
    await sql`insert into hosts (host) values ('web1')`;
    await sql`insert into system_metrics (time, host, metrics) values (now(), 'web1', '{}')`;
    await sql`
      insert into pgpulse.watches
      select 'cpu', 'junk ' || i, now() + interval '2 minutes' from generate_series(1, 1000) i`;
    await watch(["cpu", "memory"], "web1");
    await watch(["cpu", "memory"], "absent");
    const found = await sql`
      select stream, value from pgpulse.watches where value !~ '^junk' and stream <> 'network' order by 1, 2`;
    deepStrictEqual(found.map(({ stream, value }) => `${stream} ${value}`), [
      "cpu web1",
      "memory absent",
      "memory web1",
    ]);
  });
  await t.step("writes nothing where it may not", async () => {
    await sql`truncate pgpulse.watches`;
    await grafana.begin("read only", async (tx) => {
      const [{ watched }] = await tx`select pgpulse.watch_stream('{cpu}', 'web1') as watched`;
      strictEqual(watched, false);
    });
    strictEqual(await watch(["cpu"], null), false);
    strictEqual(await watch(["cpu"], "x".repeat(256)), false);
    const [{ n }] = await sql`select count(*)::int as n from pgpulse.watches`;
    strictEqual(n, 0);
    await rejects(grafana`insert into pgpulse.watches values ('cpu', 'x', now())`, {
      code: "42501",
    });
  });
});

Deno.test("the relay pushes what is watched at full beat, the rest slowly", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  await using grafana = new GrafanaStandIn().start();
  await sql.unsafe(`
    create table beats (at timestamptz not null default clock_timestamp(), host text, value float8);
    create index on beats (host, at);
    create index on beats (at);
    create view live.beats as select * from beats;
    select pgpulse.add_stream('beats', split => 'host', rows => 20, beat => '200 ms', slow => '6 seconds');
    insert into beats select now() - j * interval '1 second', format('h%s', i), i
    from generate_series(10, 79) i, generate_series(1, 30) j;
  `).simple();
  const dir = await Deno.makeTempDir({ prefix: "pgpulse-hosts-" });
  await using relay = await background("relay", ["--port", "0"], {
    DATABASE_URL: server.urlFor("server", "server"),
    GRAFANA_URL: grafana.url,
    GRAFANA_TOKEN: "glsa_static",
  }, dir);
  const http = (await relay.said(/^Serves streams at/)).match(/http:\S+\//)![0];
  const pushes = (host: string) =>
    grafana.pushes.filter(({ channels }) => channels.some((c) => c.endsWith(`beats/${host}`)))
      .length;
  const all = Array.from({ length: 70 }, (_, i) => `h${10 + i}`);
  /** Inserts a row for each host again and again; gives how often channels were pushed meanwhile. */
  const beat = async (hosts: string[], times = 20) => {
    const before = hosts.map(pushes);
    for (let i = 0; i < times; i++) {
      await sql`insert into beats (host, value) select format('h%s', i), random() from generate_series(10, 79) i
        where exists (select from beats where host = format('h%s', i))`;
      await new Promise((done) => setTimeout(done, 200));
    }
    return hosts.map((host, i) => pushes(host) - before[i]);
  };
  const drawn = (channel: string) => grafana.subscribe(`stream/pgpulse/beats/${channel}`).points();
  const truth = async (host: string) =>
    (await sql<{ ms: number; value: number }[]>`
      select floor(extract(epoch from at) * 1000)::float8 as ms, value
      from beats where host = ${host} order by at desc limit 20`)
      .map(({ ms, value }) => [ms, value]).reverse();

  await t.step("each channel comes within the slow beat, whole", async () => {
    await until("all were pushed", () => all.every((host) => pushes(host) > 0), 20_000);
    for (const host of ["h10", "h44", "h79"]) {
      const [points] = Object.values(drawn(host));
      deepStrictEqual(points, await truth(host));
    }
  });

  await t.step("a watched one is pushed at each beat", async () => {
    await sql`select pgpulse.watch_stream('{beats}', 'h44')`;
    await sql`insert into beats (host, value) values ('h44', random())`;
    await until("it is noticed", async () => {
      const [points = []] = Object.values(drawn("h44"));
      return JSON.stringify(points) === JSON.stringify(await truth("h44"));
    });
    const [watched, ...others] = await beat(["h44", "h43", "h45", "h46"]);
    ok(watched >= 6 && others.every((n) => n <= watched / 3), `${watched} and ${others}`);
    const text = await (await fetch(`${http}metrics`)).text();
    match(text, /pgpulse_relay_channels_resting\{stream="beats"\} 69/);
  });

  await t.step("leases of values that are not there push it not out", async () => {
    await sql`
      insert into pgpulse.watches
      select 'beats', 'a' || i, now() + interval '2 minutes' from generate_series(1, 600) i`;
    // now the last one of the table
    await sql`delete from pgpulse.watches where value = 'h44'`;
    await sql`select pgpulse.watch_stream('{beats}', 'h44')`;
    await new Promise((done) => setTimeout(done, 3_000));
    const [watched, other] = await beat(["h44", "h45"]);
    ok(watched >= 6 && other <= watched / 3, `${watched} and ${other}`);
    await sql`delete from pgpulse.watches where value <> 'h44'`;
  });

  await t.step("until its lease has ended", async () => {
    await sql`update pgpulse.watches set until = now()`;
    await until(
      "it rests",
      async () =>
        /channels_resting\{stream="beats"\} 70/.test(await (await fetch(`${http}metrics`)).text()),
    );
    const [before, other] = await beat(["h44", "h45"]);
    ok(before <= 3, `${before} and ${other}`);
  });

  await t.step("a host that nobody knew is shown as soon as it is watched", async () => {
    await sql`insert into beats (host, value) values ('fresh', 5)`;
    await sql`select pgpulse.watch_stream('{beats}', 'fresh')`;
    await until("it is pushed", () => pushes("fresh") > 0, 5_000);
    await sql`delete from beats where host = 'fresh'`;
    await sql`truncate pgpulse.watches`;
  });

  await t.step("whoever reads one channel of the relay watches it", async () => {
    const abort = new AbortController();
    const response = await fetch(`${http}streams/beats/h20`, { signal: abort.signal });
    const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    const reading = (async () => {
      for (;;) text += (await reader.read()).value ?? "";
    })().catch(() => {});
    await until("its window comes", () => /event: window/.test(text));
    strictEqual(JSON.parse(text.match(/^data: (.*)$/m)![1]).rows.length, 20);
    const [watched, other] = await beat(["h20", "h21"]);
    ok(watched >= 6 && other <= watched / 3, `${watched} and ${other}`);
    ok(text.match(/event: rows/g)!.length >= 6);
    abort.abort();
    await reading;
  });

  await t.step("where there are few all run at full beat", async () => {
    await sql`delete from beats where host > 'h50'`;
    await until(
      "none rests",
      async () =>
        /channels_resting\{stream="beats"\} 30/.test(await (await fetch(`${http}metrics`)).text()),
      15_000,
    );
    const counts = await beat(["h10", "h30", "h50"]);
    ok(counts.every((n) => n >= 6), `${counts}`);
  });

  await t.step("it said no trouble, and ends", async () => {
    deepStrictEqual(grafana.changedFields, []);
    deepStrictEqual(relay.log.filter((line) => /Cannot|Stream|budget/.test(line)), []);
    strictEqual(await relay.end(), 0);
    await Deno.remove(dir, { recursive: true });
  });
});

Deno.test("generate hosts makes a fleet, through the door that collectors use", async (t) => {
  await using server = await migrated({ major: 15 });
  const { sql } = server;
  const generate = (...args: string[]) =>
    script("generate.ts", ["hosts", "--hosts", "12", ...args], {
      DATABASE_URL: server.urlFor("server", "server"),
    });
  const rows = async () => {
    const [{ n }] = await sql`select count(*)::int as n from system_metrics`;
    return n;
  };

  await t.step("history is copied, each tick once, and every host is registered", async () => {
    const { code, stderr, stdout } = await generate("--backfill", "20m", "--interval", "1m");
    strictEqual(code, 0, stderr);
    match(stdout, /^Wrote 240 rows into system_metrics/);
    strictEqual(await rows(), 240);
    const [{ hosts, silent, known }] = await sql`
      select count(*)::int as hosts, count(*) filter (where silent)::int as silent,
          count(os)::int as known
      from hosts_now where cpu between 0 and 1`;
    deepStrictEqual([hosts, silent, known], [12, 0, 12]);
    match(
      (await generate("--backfill", "10m", "--interval", "1m")).stdout,
      /9 ticks had rows already/,
    );
    ok(await rows() <= 240 + 24, "but for a minute that has begun since");
  });

  await t.step("its columns are what collect.ts makes of its JSON", async () => {
    const made = await sql`select * from system_metrics`;
    for (const { metrics, ...columns } of made) {
      const expected = Object.entries(summary(metrics));
      strictEqual(expected.length, 12);
      for (const [name, value] of expected) strictEqual(columns[name], value, name);
    }
  });

  await t.step("live ones are sent by pgpulse.collect", async () => {
    const before = await rows();
    const { code, stderr } = await generate("--count", "3", "--interval", "200ms");
    strictEqual(code, 0, stderr);
    strictEqual(await rows(), before + 36);
    const [{ hosts }] = await sql`
      select count(*)::int as hosts from hosts where "interval" = interval '200 milliseconds'`;
    strictEqual(hosts, 12);
  });

  await t.step("its flag is checked", async () => {
    const { code, stderr } = await script("generate.ts", ["factory", "--hosts", "5"]);
    strictEqual(code, 2);
    match(stderr, /^Cannot use --hosts with factory: it goes with hosts/m);
  });
});

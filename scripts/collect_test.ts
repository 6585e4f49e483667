// The collector: its readings, its clock, its spool, and what it does when things go wrong.

import { deepStrictEqual, match, ok, strictEqual, throws } from "node:assert";
import { dirname, join } from "node:path";
import {
  Delivery,
  duration,
  Elsewhere,
  FileSystems,
  largest,
  Linux,
  mounts,
  rates,
  readPage,
  Scrape,
  serve,
  service,
  shares,
  size,
  Spool,
  summary,
  ticks,
  Troubles,
  withDefaults,
} from "./collect.ts";
import postgres from "npm:postgres@3.4.9";
import {
  installed,
  migrated,
  quietPort,
  ROOT,
  surroundings,
  testServer,
  until,
} from "./testing.ts";

const pause = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** What the collector says of troubles, kept instead of printed. */
class Heard extends Troubles {
  heard: string[] = [];
  #listen(speak: () => void): void {
    const error = console.error;
    console.error = (text) => this.heard.push(text);
    speak();
    console.error = error;
  }
  override say(key: string, message: string): void {
    this.#listen(() => super.say(key, message));
  }
  override over(key: string, message?: string): void {
    this.#listen(() => super.over(key, message));
  }
}

async function folder(): Promise<AsyncDisposable & { path: string }> {
  const path = await Deno.makeTempDir({ prefix: "pgpulse-collect-" });
  const remove = () => Deno.remove(path, { recursive: true }).catch(() => {});
  return { path, [Symbol.asyncDispose]: remove };
}

/** Writes files, by path below `root`. */
function lay(root: string, files: Record<string, string>): void {
  for (const [path, text] of Object.entries(files)) {
    Deno.mkdirSync(dirname(join(root, path)), { recursive: true });
    Deno.writeTextFileSync(join(root, path), text);
  }
}

/** The pgpulse.collect() of the contract, as small as it can be. */
const STAND_IN = `
  create schema pgpulse;
  create table system_metrics (
    time timestamptz, host text, metrics jsonb, n bigserial, primary key (host, time)
  );
  create table batches (n bigserial, size int, first timestamptz, now text);
  create function pgpulse.collect(batch jsonb) returns jsonb language plpgsql security definer as $$
  declare
    taken int;
  begin
    insert into batches (size, first, now) select jsonb_array_length(batch),
      (batch->0->>'time')::timestamptz, batch->0->'about'->>'now';
    insert into system_metrics
    select (r->>'time')::timestamptz, r->>'host', r->'metrics'
    from jsonb_array_elements(batch) r on conflict do nothing;
    get diagnostics taken = row_count;
    return jsonb_build_object('taken', taken, 'known', jsonb_array_length(batch) - taken);
  end $$;
  create role collector login password 'first';
  grant usage on schema pgpulse to collector;`;

const START = Date.UTC(2026, 0, 1);
const record = (n: number, metrics = `{"n":${n}}`) =>
  `{"time":"${new Date(START + n * 1000).toISOString()}","host":"h","about":{"version":"1"},` +
  `"metrics":${metrics}}`;

// --- readings ----------------------------------------------------------------------------------

Deno.test("times and sizes are read, or refused with the way to write them", () => {
  deepStrictEqual(["5s", "2m", "1h"].map((text) => duration(text, "--x", 1e3, 4e6)), [
    5e3,
    120e3,
    3_600e3,
  ]);
  for (const text of ["", "5", "0s", "2h", "1w", "-1s"]) {
    throws(() => duration(text, "--x", 1e3, 4e6), /Cannot take --x ".*": give 1s to/);
  }
  deepStrictEqual(["500kB", "1GB"].map(size), [500e3, 1e9]);
  for (const text of ["1", "1kB", "1TB", "GB"]) throws(() => size(text), /--spool-max-size/);
});

const STAT = (user: number, idle: number, iowait = 0) =>
  `cpu  ${user} 0 100 ${idle} ${iowait} 0 0 0 0 0\ncpu0 ${user} 0 100 ${idle} ${iowait} 0 0 0 0 0\n` +
  `intr 5 ${"0 ".repeat(20)}\nctxt 1\nprocs_running 3\nprocs_blocked 1\nsoftirq 1\n`;
const DISK = (name: string, reads: number, busy: number) =>
  ` 254       0 ${name} ${reads} 0 ${reads * 8} 5 10 0 80 5 0 ${busy} 10 0 0 0 0 0 0\n`;
const NET = (received: number, sent: number) =>
  `Inter-| Receive | Transmit\n face |bytes packets\n    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n` +
  `veth12: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n` +
  `  eth0:${received} 10 0 1 0 0 0 0 ${sent} 20 0 0 0 0 0 0\n`;
const MEMORY = `MemTotal: 1000 kB\nMemFree: 300 kB\nMemAvailable: 600 kB\nBuffers: 10 kB\n` +
  `Cached: 200 kB\nSwapCached: 7 kB\nSwapTotal: 100 kB\nSwapFree: 75 kB\n`;

Deno.test("Linux: counters become rates, also through resets, wraps and vanished disks", async () => {
  await using dir = await folder();
  const [proc, sys] = [join(dir.path, "proc"), join(dir.path, "sys")];
  lay(dir.path, {
    "proc/stat": STAT(1000, 5000),
    "proc/loadavg": "0.20 0.10 0.05 1/99 4711\n",
    "proc/meminfo": MEMORY,
    "proc/diskstats": DISK("vda", 100, 1000) + DISK("vda1", 100, 1000) + DISK("loop0", 1, 1),
    "proc/net/dev": NET(1e9, 500),
    "proc/net/sockstat": "sockets: used 9\nTCP: inuse 4 orphan 0\nUDP: inuse 1 mem 0\n",
    "proc/net/sockstat6": "TCP6: inuse 2\nUDP6: inuse 0\n",
    "proc/uptime": "12345.67 99\n",
    "sys/block/vda/device/x": "",
  });
  let now = 0;
  const linux = new Linux({ proc, sys, perCore: true }, new Heard(), () => now);
  strictEqual(linux.sample(), undefined, "there is nothing to compare with");

  const next = () => {
    now += 10_000;
    // deno-lint-ignore no-explicit-any -- tests look into it
    return linux.sample() as any;
  };
  lay(proc, {
    "stat": STAT(1250, 5700, 50),
    "diskstats": DISK("vda", 150, 6000) + DISK("vda1", 150, 6000),
    "net/dev": NET(1e9 + 5000, 1500),
  });
  const sample = next();
  deepStrictEqual(sample.cpu, {
    used: 0.25,
    user: 0.25,
    system: 0,
    iowait: 0.05,
    steal: 0,
    cores: 1,
    each: [0.25],
  });
  deepStrictEqual(sample.load, [0.2, 0.1, 0.05]);
  deepStrictEqual(sample.memory, {
    total: 1_024_000,
    available: 614_400,
    free: 307_200,
    buffers: 10_240,
    cached: 204_800,
  });
  deepStrictEqual(sample.swap, { total: 102_400, used: 25_600 });
  deepStrictEqual(sample.disks, {
    vda: { reads: 5, read_bytes: 20_480, writes: 0, written_bytes: 0, busy: 0.5 },
  });
  deepStrictEqual(Object.keys(sample.network), ["eth0"]);
  strictEqual(sample.network.eth0.received_bytes, 500);
  strictEqual(sample.network.eth0.sent_bytes, 100);
  deepStrictEqual(sample.sockets, { tcp: 6, udp: 1 });
  strictEqual(sample.processes.running, 3);
  strictEqual(sample.uptime, 12345.67);
  strictEqual(sample.container, undefined);

  // One counter wraps, the other goes on.
  lay(proc, { "net/dev": NET(40, 2500) });
  const { eth0 } = next().network;
  ok(!("received_bytes" in eth0), "a counter that went back has no rate");
  strictEqual(eth0.sent_bytes, 100);
  lay(proc, { "net/dev": NET(1040, 2500) });
  strictEqual(next().network.eth0.received_bytes, 100, "it counts again from there");

  // A disk vanishes, and another comes under its name.
  lay(proc, { "diskstats": "" });
  strictEqual(next().disks, undefined);
  lay(proc, { "diskstats": DISK("vda", 1e9, 2000) });
  deepStrictEqual(next().disks, {}, "there is nothing to compare it with");
  lay(proc, { "diskstats": DISK("vda", 1e9 + 10, 2000) });
  strictEqual(next().disks.vda.reads, 1);

  // What a system lacks is left out; all else goes on.
  lay(proc, { "stat": "", "meminfo": "MemTotal: 5 kB\n", "loadavg": "" });
  Deno.removeSync(join(proc, "net"), { recursive: true });
  const poor = next();
  strictEqual(poor.cpu, undefined);
  strictEqual(poor.memory.total, 5 * 1024);
  strictEqual(poor.uptime, 12345.67);
  ok(poor.disks.vda);
});

Deno.test("Linux: a container's limits, by control groups of version 2 and 1", async () => {
  const read = async (files: Record<string, string>, later: Record<string, string>) => {
    await using dir = await folder();
    lay(dir.path, files);
    let now = 0;
    const sys = join(dir.path, "sys");
    const linux = new Linux({ proc: join(dir.path, "proc"), sys }, new Heard(), () => now);
    linux.sample();
    now += 10_000;
    lay(dir.path, later);
    return linux.sample()!.container;
  };
  const two = "sys/fs/cgroup/";
  deepStrictEqual(
    JSON.parse(JSON.stringify(
      await read({
        [`${two}memory.max`]: "1000000\n",
        [`${two}cpu.max`]: "150000 100000\n",
        [`${two}memory.current`]: "500000\n",
        [`${two}memory.stat`]: "anon 1\nfile 2\ninactive_file 100000\n",
        [`${two}cpu.stat`]: "usage_usec 1000000\nuser_usec 1\n",
      }, { [`${two}cpu.stat`]: "usage_usec 6000000\nuser_usec 1\n" }),
    )),
    { cpu_limit: 1.5, cpu_used: 0.5, memory_limit: 1e6, memory_used: 400_000 },
  );
  const one = {
    [`${two}memory/memory.limit_in_bytes`]: "9223372036854771712\n",
    [`${two}memory/memory.usage_in_bytes`]: "77\n",
    [`${two}cpu/cpu.cfs_quota_us`]: "-1\n",
    [`${two}cpu/cpu.cfs_period_us`]: "100000\n",
    [`${two}cpuacct/cpuacct.usage`]: "1000000000\n",
  };
  strictEqual(await read(one, {}), undefined, "a host has these files, too, without limits");
  deepStrictEqual(
    JSON.parse(JSON.stringify(
      await read({ ...one, [`${two}cpu/cpu.cfs_quota_us`]: "200000\n" }, {
        [`${two}cpuacct/cpuacct.usage`]: "3000000000\n",
      }),
    )),
    { cpu_limit: 2, cpu_used: 0.2, memory_used: 77 },
  );
});

Deno.test("a time that runs backwards is no time, and no time at all gives no share", () => {
  strictEqual(shares([1, 0, 0, 5], undefined), undefined);
  strictEqual(shares([5, 5, 5, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5, 5]), undefined);
  strictEqual(shares([0, 0, 0, 1, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9]), undefined);
  const steps = shares([10, 0, 0, 100, 3, 0, 0, 0], [0, 0, 0, 10, 5, 0, 0, 0])!;
  deepStrictEqual([steps.used, steps.iowait], [0.1, 0]);
  strictEqual(rates(["a"], [5], [6], 1), undefined);
  deepStrictEqual(rates(["a", "b"], [5, NaN], [4, 1], 2), { a: 0.5 });
});

Deno.test("other systems: the same shape through systeminformation; what fails is left out", async () => {
  let bytes = 1000;
  const gone = () => Promise.reject(new Error("not here"));
  const is = <T>(value: T) => () => Promise.resolve(value);
  const load = { currentLoad: 50, currentLoadUser: 30, currentLoadSystem: 20 };
  const machine = new Elsewhere({
    currentLoad: is({ ...load, cpus: [{ load: 40 }, { load: 60 }] } as never),
    mem: gone,
    fsSize: is([
      { fs: "disk1", type: "APFS", size: 10, used: 4, available: 6, mount: "/" },
      { fs: "disk1", type: "APFS", size: 10, used: 1, available: 6, mount: "/System/Volumes/VM" },
    ] as never),
    networkStats: () =>
      Promise.resolve([
        { iface: "en0", rx_bytes: bytes += 1000, tx_bytes: 5000 - bytes, rx_errors: 0 },
        { iface: "lo0", rx_bytes: 1, tx_bytes: 1 },
      ] as never),
    disksIO: is(null),
    fsStats: gone,
    cpuTemperature: is({ main: 40 }),
  }, true);
  await machine.aside();
  strictEqual(await machine.sample(), undefined);
  await pause(20);
  // deno-lint-ignore no-explicit-any -- tests look into it
  const sample = (await machine.sample()) as any;
  deepStrictEqual([sample.cpu.used, sample.cpu.cores, sample.cpu.each], [0.5, 2, [0.4, 0.6]]);
  deepStrictEqual(Object.keys(sample.filesystems), ["/"]);
  deepStrictEqual(Object.keys(sample.network), ["en0"]);
  ok(sample.network.en0.received_bytes > 0);
  ok(!("sent_bytes" in sample.network.en0), "that counter went back");
  ok(!("memory" in sample) && !("disks" in sample));
  deepStrictEqual(sample.temperatures, { cpu: 40 });
});

Deno.test("what stands in columns: the fullest, the busiest, sums; what is not known is left out", () => {
  const room = { type: "ext4", used: 1, available: 2, inodes: 4, inodes_used: 1 };
  const all = summary({
    cpu: { used: 0.5, user: 0.4, iowait: 0.1, steal: 0 },
    load: [3, 2, 1],
    memory: { total: 1000, available: 400 },
    swap: { total: 200, used: 50 },
    filesystems: {
      "/": room,
      "/data": { type: "zfs", used: 9, available: 1 },
      "/cd": { ...room, type: "iso9660", available: 0, inodes_used: 4 },
      "/new": { type: "xfs", used: 0, available: 0 },
    },
    disks: {
      vda: { read_bytes: 1, busy: 0.2 },
      vdb: { read_bytes: 2, written_bytes: 4, busy: 0.1 },
    },
    network: { eth0: { received_bytes: 10, sent_bytes: 1 }, eth1: { sent_bytes: 2 } },
  });
  deepStrictEqual(all, {
    cpu: 0.5,
    iowait: 0.1,
    steal: 0,
    load1: 3,
    memory_used: 0.6,
    swap_used: 0.25,
    filesystem_used: 0.9,
    inodes_used: 0.25,
    disk_busy: 0.2,
    disk_bytes: 7,
    received_bytes: 10,
    sent_bytes: 3,
  });
  strictEqual(JSON.stringify(summary({ disks: {}, filesystems: undefined })), "{}");
});

Deno.test("file systems: each device once, no images, others' only on request", () => {
  const text = [
    "22 27 0:21 / /proc rw - proc proc rw",
    "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw",
    "30 27 254:0 /var/lib /var/lib/bound rw - ext4 /dev/vda rw",
    "31 27 0:33 / /run rw - tmpfs tmpfs rw",
    String.raw`32 27 8:1 / /mnt/my\040disk rw - xfs /dev/sdb1 rw`,
    "33 27 7:1 / /snap/x ro - squashfs /dev/loop1 ro",
    "34 27 0:44 / /mnt/nas rw - nfs4 nas:/export rw",
    "35 27 0:50 /@ /data rw - btrfs /dev/sdc rw",
    "36 27 0:51 /@home /data/home rw - btrfs /dev/sdc rw",
    "",
  ].join("\n");
  deepStrictEqual(mounts(text, false).map(({ path }) => path), ["/", "/mnt/my disk", "/data"]);
  ok(mounts(text, true).some(({ path, type }) => path === "/mnt/nas" && type === "nfs4"));
  deepStrictEqual(
    mounts("27 1 0:9 / / rw - overlay overlay rw", false).map(({ type }) => type),
    ["overlay"],
  );
});

Deno.test("file systems: one that hangs is told once, asked once, and holds up no other", async () => {
  await using dir = await folder();
  lay(dir.path, {
    mountinfo: "1 1 8:0 / / rw - ext4 /dev/sda rw\n2 1 8:1 / /hung rw - ext4 /dev/sdb rw\n",
  });
  const troubles = new Heard();
  const asked: string[] = [];
  let answer = () => {};
  const values = { bsize: 10, blocks: 100, bfree: 40, bavail: 30, files: 8, ffree: 6, type: 0 };
  const systems = new FileSystems(join(dir.path, "mountinfo"), false, troubles, (path) => {
    asked.push(path);
    if (path === "/") return Promise.resolve(values);
    return new Promise((done) => answer = () => done(values));
  });
  for (let i = 0; i < 3; i++) await systems.read(20);
  deepStrictEqual(asked, ["/", "/hung", "/", "/"]);
  deepStrictEqual(systems.newest(), {
    "/": {
      device: "/dev/sda",
      type: "ext4",
      size: 1000,
      used: 600,
      available: 300,
      inodes: 8,
      inodes_used: 2,
    },
  });
  deepStrictEqual(troubles.heard, ['File system "/hung" does not answer; it is left out']);
  answer();
  await pause(0);
  ok("/hung" in systems.newest()!);
  deepStrictEqual(troubles.heard.slice(1), ['File system "/hung" answers again']);
});

Deno.test("a machine of a thousand mounts: the largest stand in a sample, the columns are of all", () => {
  const troubles = new Heard();
  const filesystems = Object.fromEntries(
    Array.from({ length: 1000 }, (_, n) => [`/${n}`, { size: n, used: n, available: n ? n : 0.1 }]),
  );
  const metrics = { filesystems, disks: { vda: { busy: 0.5 } } };
  strictEqual(summary({ ...metrics, filesystems: { ...filesystems } }).filesystem_used, 0.5);
  for (let n = 0; n < 2; n++) largest(metrics, troubles);
  deepStrictEqual(
    Object.keys(metrics.filesystems).map((path) => +path.slice(1)).sort((a, b) => a - b),
    [
      ...Array(100).keys(),
    ].map((n) => 900 + n),
  );
  deepStrictEqual(metrics.disks, { vda: { busy: 0.5 } });
  deepStrictEqual(troubles.heard, ["Takes the 100 largest of filesystems only, as there are more"]);
});

Deno.test({
  name: "Linux: a sensor that hangs is not asked again, and holds up nothing else",
  ignore: Deno.build.os !== "linux",
  fn: async () => {
    await using dir = await folder();
    const chip = join(dir.path, "sys/class/hwmon/hwmon0");
    lay(dir.path, { "proc/1/x": "", "sys/class/hwmon/hwmon0/temp1_input": "45000\n" });
    // A pipe that nobody writes to.
    ok(new Deno.Command("mkfifo", { args: [join(chip, "name")] }).outputSync().success);
    const linux = new Linux({ proc: join(dir.path, "proc"), sys: join(dir.path, "sys") });
    const first = linux.aside();
    let back = false;
    const second = linux.aside().then(() => back = true);
    try {
      await until("it is not asked again", () => back);
    } finally {
      // Opened for both, it waits for nobody; closed, it ends what waits.
      Deno.openSync(join(chip, "name"), { read: true, write: true }).close();
      await Promise.all([first, second]);
    }
  },
});

Deno.test("scraping: a page without an end, and characters that the database refuses", async () => {
  const endless = new Uint8Array(100_000).fill(35);
  let path = "";
  const server = Deno.serve(
    { port: 0, hostname: "127.0.0.1", onListen: () => {} },
    () =>
      new Response(
        path ? path : new ReadableStream({ pull: (to) => to.enqueue(endless) }),
      ),
  );
  const troubles = new Heard();
  const scrape = new Scrape(`http://127.0.0.1:${server.addr.port}/`, false, troubles);
  await scrape.read(20_000);
  match(troubles.heard[0], /it is longer than 5 MB; it is left out/);
  path = 'a{b="\0c\x07"} 1\n';
  await scrape.read(20_000);
  deepStrictEqual(scrape.newest(), { 'a{b="c"}': 1 });
  await server.shutdown();
});

Deno.test("scraping: gauges as they are, counters as rates, a page that fails is left out", async () => {
  const page = (n: number) =>
    `# HELP x y
# TYPE requests_total counter
requests_total{code="200",path="/a b}c"} ${n}
# TYPE temperature gauge
temperature 21.5 1700000000000
# TYPE took histogram
took_bucket{le="1"} 5
took_sum ${n * 2}
took_count ${n}
# TYPE quantiles summary
quantiles{quantile="0.5"} 1
bad NaN
`;
  deepStrictEqual(readPage(page(7), 'instance="i"').map(({ name, counts }) => [name, counts]), [
    ['requests_total{code="200",path="/a b}c",instance="i"}', true],
    ['temperature{instance="i"}', false],
    ['took_sum{instance="i"}', true],
    ['took_count{instance="i"}', true],
  ]);
  let body: string | undefined = page(100);
  let signed: string | null = null;
  const server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen: () => {} }, (request) => {
    signed = request.headers.get("authorization");
    return new Response(body, { status: body ? 200 : 500 });
  });
  const troubles = new Heard();
  const url = `http://me:secret@127.0.0.1:${server.addr.port}/metrics`;
  const scrape = new Scrape(url, false, troubles);
  await scrape.read(1000);
  deepStrictEqual(scrape.newest(), { temperature: 21.5 });
  strictEqual(signed, `Basic ${btoa("me:secret")}`);
  body = page(1100);
  await scrape.read(1000);
  const { took_count, took_sum } = scrape.newest();
  ok(took_count > 0 && Math.abs(took_sum / took_count - 2) < 0.01);
  body = page(3);
  await scrape.read(1000);
  deepStrictEqual(scrape.newest(), { temperature: 21.5 }, "a restart of the program is no spike");
  body = undefined;
  await scrape.read(1000);
  await scrape.read(1000);
  deepStrictEqual(scrape.newest(), {});
  strictEqual(troubles.heard.length, 1);
  match(troubles.heard[0], /^Cannot scrape "http:\/\/127.*": it answers 500; it is left out/);
  body = page(9);
  await scrape.read(1000);
  match(troubles.heard[1], /can be scraped again/);
  await server.shutdown();
  throws(() => new Scrape("localhost:9100", false, troubles), /Cannot scrape "localhost:9100"/);
});

// --- clock -------------------------------------------------------------------------------------

Deno.test("samples come at whole intervals, whatever the clock does, and none twice", async () => {
  let wall = START + 300;
  let set = 0;
  const clock = {
    now: () => wall,
    // A timer may come a little early or late; somebody sets the clock meanwhile.
    sleep: (ms: number) => {
      wall += Math.max(1, ms + [0, -1, 3, 40][Math.round(wall) % 4]) + set;
      set = 0;
      return Promise.resolve();
    },
  };
  const jumps: number[] = [];
  const times: number[] = [];
  let work = 10;
  for await (const due of ticks(5000, clock, (ms) => jumps.push(ms))) {
    times.push(due);
    wall += work;
    work = 10;
    if (times.length === 20) set = 3_600_000 + 4_000; // forward
    if (times.length === 40) set = -7_200_000; // back
    if (times.length === 60) wall -= 30; // back over the border that was just sampled
    if (times.length === 80) work = 17_000; // a sample that took far too long
    if (times.length === 100) break;
  }
  ok(times.every((ms) => ms % 5000 === 0), "on whole intervals");
  ok(times.every((ms, i) => ms !== times[i - 1]), "none twice in a row");
  const steps = times.slice(1).map((ms, i) => ms - times[i]).filter((step) => step !== 5000);
  strictEqual(steps.length, 3, `${steps}`);
  ok(steps[0] > 3_600_000 - 5000 && steps[1] < -7_100_000 && steps[2] === 20_000, `${steps}`);
  ok(jumps.some((ms) => ms < 0) && jumps.some((ms) => ms > 0));
});

// --- spool -------------------------------------------------------------------------------------

/** Brings all that is in the spool into a list, as the database would. */
function drain(spool: Spool): string[] {
  const all: string[] = [];
  const fresh = spool.takeFresh();
  all.push(...fresh.map(({ line }) => line));
  spool.acknowledge(fresh);
  for (let batch; (batch = spool.take());) {
    all.push(...batch.lines.split("\n"));
    spool.done(batch);
  }
  return all;
}

const files = (dir: string) => [...Deno.readDirSync(dir)].map(({ name }) => name).sort();

Deno.test("spool: what was taken leaves nothing; what was not is there after a restart", async () => {
  await using dir = await folder();
  const spool = new Spool(dir.path, new Heard());
  spool.open();
  for (let n = 0; n < 3; n++) {
    spool.add(record(n));
    const fresh = spool.takeFresh();
    deepStrictEqual(fresh.map(({ line }) => line), [record(n)]);
    spool.acknowledge(fresh);
    deepStrictEqual([spool.bytes, spool.records], [0, 0]);
  }
  for (let n = 3; n < 2500; n++) spool.add(record(n));
  strictEqual(spool.records, 2497);
  strictEqual(spool.fresh.length, 64);
  spool.close();
  ok(files(dir.path).some((name) => name.endsWith("-1000.spool")), `${files(dir.path)}`);

  const again = new Spool(dir.path, new Heard());
  again.open();
  strictEqual(again.records, 2497);
  const lines = drain(again);
  deepStrictEqual(lines, Array.from({ length: 2497 }, (_, i) => record(i + 3)), "oldest first");
  again.close();
  deepStrictEqual(files(dir.path), ["lock"]);
});

Deno.test("spool: a half-written last record, older and newer forms", async () => {
  await using dir = await folder();
  const head = (version: number) => `{"pgpulse":"spool","version":${version}}\n`;
  lay(dir.path, {
    "3.spool": `${head(1)}${record(3)}\n${record(4).slice(0, 50)}`,
    "2.spool": `${head(0)}${record(2)}\n`,
    "1.spool": `${record(1)}\n`,
    "4.spool": "",
    "5.spool": record(9).slice(0, 20),
    "7.spool": `${head(99)}\x01\x02new form\n`,
    "x.spool": "not ours",
  });
  const troubles = new Heard();
  const spool = new Spool(dir.path, troubles);
  spool.open();
  deepStrictEqual(drain(spool), [1, 2, 3].map((n) => record(n)));
  spool.add(record(8));
  deepStrictEqual(drain(spool), [record(8)]);
  spool.close();
  strictEqual(troubles.heard.length, 1);
  match(troubles.heard[0], /Leaves ".*7.spool" alone: a newer collect.ts wrote it \(version 99\)/);
  deepStrictEqual(files(dir.path), ["7.spool", "lock", "x.spool"]);
});

Deno.test("spool: one odd file holds up no other", async () => {
  await using dir = await folder();
  const head = `{"pgpulse":"spool","version":1}\n`;
  lay(dir.path, {
    "1-1.spool": `${head}${record(1)}\n`,
    "2-5.spool/x": "",
    "3.spool/x": "",
    "9.spool": `${head}${record(9)}\n`,
  });
  Deno.writeFileSync(join(dir.path, "4.spool"), new Uint8Array(11_000_000));
  const troubles = new Heard();
  const spool = new Spool(dir.path, troubles);
  spool.open();
  spool.add(record(10));
  deepStrictEqual(drain(spool), [10, 1, 9].map((n) => record(n)));
  spool.close();
  ok(
    troubles.heard.length === 3 && troubles.heard.every((s) => /^Cannot read ".*left out$/.test(s)),
  );
  deepStrictEqual(files(dir.path), ["2-5.spool", "3.spool", "4.spool", "lock"]);
});

Deno.test("spool: samples that a power cut took are counted, once", async () => {
  await using dir = await folder();
  const head = `{"pgpulse":"spool","version":1}\n`;
  lay(dir.path, { "3-5.spool": "", "4-2.spool": `${head}${record(1)}\n${record(2).slice(0, 50)}` });
  for (let n = 0; n < 2; n++) {
    const spool = new Spool(dir.path, new Heard());
    spool.open();
    const batch = spool.take()!;
    spool.giveBack(batch);
    strictEqual(spool.lost, 0, "the database is away");
    spool.close();
  }
  const troubles = new Heard();
  const spool = new Spool(dir.path, troubles);
  spool.open();
  deepStrictEqual(drain(spool).filter(Boolean), [record(1)]);
  strictEqual(spool.lost, 6);
  match(troubles.heard.join(), /^Samples are missing in the spool ".*"; was the power cut/);
  spool.close();
});

Deno.test("spool: somebody removes the folder: it goes on in a new one, and counts", async () => {
  await using dir = await folder();
  const path = join(dir.path, "spool");
  const troubles = new Heard();
  const spool = new Spool(path, troubles);
  spool.open();
  for (let n = 0; n < 1100; n++) spool.add(record(n));
  Deno.removeSync(path, { recursive: true });
  spool.add(record(1100));
  spool.open();
  spool.add(record(1101));
  strictEqual(spool.lost, 1101 - 64, "those that are not in memory");
  match(troubles.heard.join(), /^Somebody removed the spool ".*"; samples lost: 1037/);
  spool.close();
  const again = new Spool(path, new Heard());
  again.open();
  strictEqual(again.lost, 1037);
  deepStrictEqual(drain(again), Array.from({ length: 65 }, (_, n) => record(1037 + n)));
  again.close();
});

Deno.test("spool: a clock that is wrong drops nothing by age, at the start and later", async () => {
  await using dir = await folder();
  const limits = { bytes: 1e9, age: 86_400_000 };
  const { now } = Date;
  const run = (days: number, from: number) => {
    const spool = new Spool(dir.path, new Heard(), limits);
    spool.open();
    for (let n = from; n < from + 1200; n++) {
      if (n === from + 600) Date.now = () => now() + days * 86_400_000;
      spool.add(record(n));
    }
    spool.close();
    strictEqual(spool.lost, 0);
  };
  try {
    run(0, 0);
    Date.now = () => now() + 200 * 86_400_000;
    run(400, 1200);
    Date.now = now;
    run(-400, 2400);
  } finally {
    Date.now = now;
  }
});

Deno.test("spool: beyond its limits the oldest are dropped, and counted for good", async () => {
  await using dir = await folder();
  const troubles = new Heard();
  const limits = { bytes: 100_000, age: 86_400_000 };
  const spool = new Spool(dir.path, troubles, limits);
  spool.open();
  const long = (n: number) => record(n, `{"n":${n},"text":"${"x".repeat(900)}"}`);
  for (let n = 0; n < 200; n++) spool.add(long(n));
  ok(spool.bytes <= limits.bytes, `${spool.bytes}`);
  const left = 200 - spool.lost;
  ok(spool.lost > 90 && left > 70, `${spool.lost} lost`);
  spool.close();

  const again = new Spool(dir.path, troubles, limits);
  again.open();
  strictEqual(again.lost, 200 - left);
  const oldest = files(dir.path).filter((name) => /-\d+\.spool/.test(name))
    .sort((a, b) => parseInt(a) - parseInt(b))[0];
  const old = new Date(Date.now() - 2 * 86_400_000);
  Deno.utimeSync(join(dir.path, oldest), old, old);
  again.close();
  const third = new Spool(dir.path, troubles, limits);
  third.open();
  third.add(long(200));
  strictEqual(third.lost, 200 - left + Number(/-(\d+)/.exec(oldest)![1]), "those that are too old");
  const lines = drain(third);
  strictEqual(new Set(lines).size, 201 - third.lost, "and no others");
  strictEqual(lines.at(-1), long(199));
  third.close();
  strictEqual(troubles.heard.filter((text) => /oldest samples are dropped/.test(text)).length, 2);
});

/** Mounts a small tmpfs; undefined where that is not allowed. */
function tmpfs(path: string, options: string): (() => void) | undefined {
  if (Deno.build.os !== "linux") return;
  const run = (name: string, ...args: string[]) => {
    try {
      return new Deno.Command(name, { args, stderr: "null" }).outputSync().success;
    } catch {
      return false;
    }
  };
  if (!run("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)) return;
  return () => void run("umount", "-l", path);
}

const mountable = await (async () => {
  await using dir = await folder();
  const unmount = tmpfs(dir.path, "size=64k");
  unmount?.();
  return !!unmount;
})();

Deno.test({
  name: `spool: a full disk${mountable ? "" : " (left out: no tmpfs can be mounted here)"}`,
  ignore: !mountable,
  fn: async () => {
    await using dir = await folder();
    const unmount = tmpfs(dir.path, "size=64k")!;
    try {
      const troubles = new Heard();
      const spool = new Spool(dir.path, troubles);
      spool.open();
      const count = 200;
      for (let n = 0; n < count; n++) spool.add(record(n, `{"text":"${"x".repeat(777)}"}`));
      strictEqual(spool.records, count, "those that the disk did not take are kept in memory");
      strictEqual(troubles.heard.length, 1);
      match(troubles.heard[0], /Cannot write to the spool ".*": .*(space|full).*kept in memory/i);
      ok(spool.bytes < 65_536);
      // What is on the disk is whole.
      for (const name of files(dir.path).filter((name) => name.endsWith(".spool"))) {
        match(Deno.readTextFileSync(join(dir.path, name)), /}\n$/);
      }
      strictEqual(new Set(drain(spool)).size, count, "and all of them get away");
      strictEqual(spool.records, 0);
      spool.add(record(count));
      match(troubles.heard[1], /works again/);
      strictEqual(spool.lost, 0);
      for (let n = 0; n < count; n++) spool.add(record(n, `{"text":"${"x".repeat(777)}"}`));
      spool.close();
      match(troubles.heard.at(-1)!, /^Samples in memory that are lost: \d+$/);
      ok(spool.lost > 100);

      const again = new Spool(dir.path, troubles);
      again.open();
      strictEqual(again.records, count + 1 - spool.lost, "they can be sent, and make room");
      strictEqual(new Set(drain(again)).size, count + 1 - spool.lost);
      again.close();
    } finally {
      unmount();
    }
  },
});

Deno.test({
  name: `spool: a read-only disk${mountable ? "" : " (left out: no tmpfs can be mounted here)"}`,
  ignore: !mountable,
  fn: async () => {
    await using dir = await folder();
    const unmount = tmpfs(dir.path, "size=1m,ro")!;
    try {
      const troubles = new Heard();
      const spool = new Spool(join(dir.path, "spool"), troubles);
      spool.open();
      for (let n = 0; n < 100; n++) spool.add(record(n));
      spool.open();
      strictEqual(troubles.heard.length, 1);
      match(troubles.heard[0], /Cannot write to the spool .*[Rr]ead-only/);
      strictEqual(spool.records, 100);
      const remount = ["-o", "remount,rw", dir.path];
      ok(new Deno.Command("mount", { args: remount }).outputSync().success);
      spool.open();
      match(troubles.heard[1], /works again; samples in memory are in it/);
      strictEqual(spool.records, 100);
      deepStrictEqual(new Set(drain(spool)).size, 100);
      strictEqual(spool.lost, 0);
      spool.add(record(100));
      spool.close();

      // What is in it goes, also from there.
      ok(new Deno.Command("mount", { args: ["-o", "remount,ro", dir.path] }).outputSync().success);
      const again = new Spool(join(dir.path, "spool"), new Heard());
      again.open();
      again.add(record(101));
      deepStrictEqual(new Set(drain(again)), new Set([record(100), record(101)]));
      again.close();
      strictEqual(again.lost, 0);
    } finally {
      unmount();
    }
  },
});

Deno.test("spool: a folder that cannot be had; memory has its limit, and what it drops is counted", async () => {
  await using dir = await folder();
  lay(dir.path, { file: "" });
  const troubles = new Heard();
  const spool = new Spool(join(dir.path, "file", "spool"), troubles);
  spool.open();
  const large = "x".repeat(100_000);
  for (let n = 0; n < 100; n++) spool.add(record(n, `{"n":${n},"text":"${large}"}`));
  ok(spool.lost > 15 && spool.lost < 25, `${spool.lost} lost`);
  strictEqual(spool.records, 100 - spool.lost);
  strictEqual(troubles.heard.length, 1);
  spool.close();
  strictEqual(spool.lost, 100, "at the end all of them");
});

// --- delivery ----------------------------------------------------------------------------------

/** Runs a delivery until `until` is true. */
async function deliver(
  spool: Spool,
  troubles: Troubles,
  url: () => string,
  done: () => boolean,
  pauses = { first: 10, away: 50, refused: 50 },
) {
  const stop = new AbortController();
  const delivery = new Delivery(
    spool,
    troubles,
    () => postgres(url(), { max: 1, prepare: false, fetch_types: false, connect_timeout: 2 }),
    pauses,
  );
  const running = delivery.run(stop.signal);
  try {
    await until("all is sent", done, 30_000);
  } finally {
    stop.abort();
    await running;
  }
}

Deno.test("delivery: records that say nothing about their host are JSON, too", async () => {
  await using dir = await folder();
  const spool = new Spool(dir.path, new Heard());
  spool.open();
  spool.add(record(1).replace('{"version":"1"}', "{}"));
  spool.add(record(2));
  const queries: string[] = [];
  const unsafe = (query: string) => Promise.resolve(queries.push(query));
  await new Delivery(spool, spool.troubles, () => ({ unsafe }) as never).round();
  const [first, second] = JSON.parse(/\$json\$(.*)\$json\$/.exec(queries[0])![1]);
  deepStrictEqual(first.about, {});
  ok("now" in second.about && second.about.version === "1");
  spool.close();
});

Deno.test("delivery", async (t) => {
  await using server = await testServer();
  const { sql } = server;
  await sql.unsafe(STAND_IN).simple();
  const clear = () => sql`truncate system_metrics, batches restart identity`;
  const password = { is: "first" };
  const url = () => server.urlFor("collector", password.is);

  await t.step("no database for long: the newest goes first, then the oldest first", async () => {
    await using dir = await folder();
    // The order is that of one connection; of two, each may be done first.
    await sql`alter role collector connection limit 1`;
    await server.kill();
    const troubles = new Heard();
    const spool = new Spool(dir.path, troubles);
    spool.open();
    const count = 17_280; // a day at 5 s
    for (let n = 0; n < count; n++) spool.add(record(n));
    const stop = new AbortController();
    const delivery = new Delivery(
      spool,
      troubles,
      () => postgres(url(), { max: 1, prepare: false, fetch_types: false }),
      { first: 10, away: 50, refused: 50 },
    );
    const running = delivery.run(stop.signal);
    await until("it has tried", () => troubles.has("database"));
    await pause(300);
    strictEqual(spool.records, count);
    await server.start();
    await until("all is sent", () => spool.records === 0, 30_000);
    stop.abort();
    await running;
    const [{ n }] = await sql`select count(*)::int as n from system_metrics`;
    strictEqual(n, count);
    const batches =
      await sql`select size, now, extract(epoch from first) as first from batches order by n`;
    deepStrictEqual(batches.map(({ size }) => size).slice(0, 3), [64, 1000, 1000]);
    const first = batches.map(({ first }) => Number(first) - START / 1000);
    strictEqual(first[0], count - 64, "the newest");
    deepStrictEqual(first.slice(1, 4), [0, 1000, 2000], "then the oldest");
    ok(Math.abs(Date.parse(batches[0].now) - Date.now()) < 60_000);
    strictEqual(batches[1].now, null, "only what is new tells of the clock");
    match(troubles.heard[0], /nothing listens there.*samples wait in the spool/);
    match(troubles.heard.at(-1)!, /takes samples again/);
    ok(troubles.heard.length <= 4, `${troubles.heard}`);
    spool.close();
    deepStrictEqual(files(dir.path), ["lock"]);
    await sql`alter role collector connection limit -1`;
  });

  await t.step("a long backlog goes over a second connection, too, and is there once", async () => {
    await clear();
    await using dir = await folder();
    const spool = new Spool(dir.path, new Heard());
    spool.open();
    const count = 17_280;
    for (let n = 0; n < count; n++) spool.add(record(n));
    let opened = 0;
    const address = () => (opened++, url());
    await deliver(spool, spool.troubles, address, () => spool.records === 0);
    strictEqual(opened, 2);
    const [{ n }] = await sql`select count(*)::int as n from system_metrics`;
    strictEqual(n, count);
    spool.close();
  });

  await t.step("a changed password, a missing function: samples are kept, told once", async () => {
    await clear();
    await using dir = await folder();
    const troubles = new Heard();
    const spool = new Spool(dir.path, troubles);
    spool.open();
    await sql`alter role collector password 'second'`;
    await sql`alter function pgpulse.collect rename to gone`;
    spool.add(record(1));
    let asked = 0;
    const address = () => {
      // Somebody changes the file with the address, and later migrates.
      if (asked++ === 3) password.is = "second";
      return url();
    };
    const stop = new AbortController();
    const delivery = new Delivery(
      spool,
      troubles,
      () => postgres(address(), { max: 1, prepare: false, fetch_types: false }),
      { first: 10, away: 50, refused: 50 },
    );
    const running = delivery.run(stop.signal);
    await until(
      "it lacks the function",
      () => troubles.list().some((s) => /deno task migrate/.test(s)),
    );
    strictEqual(spool.records, 1);
    await sql`alter function pgpulse.gone rename to collect`;
    await until("it is sent", () => spool.records === 0);
    stop.abort();
    await running;
    strictEqual(troubles.heard.length, 3, `${troubles.heard}`);
    match(troubles.heard[0], /the password of "collector" is wrong/);
    ok(!troubles.heard.some((text) => /first|second/.test(text)), "and no password is");
    spool.close();
  });

  await t.step("a database without a free connection may soon have one", async () => {
    await clear();
    await using dir = await folder();
    const troubles = new Heard();
    const spool = new Spool(dir.path, troubles);
    spool.open();
    await sql`alter role collector connection limit 0`;
    spool.add(record(1));
    const pauses = { first: 3_600_000, away: 10, refused: 3_600_000 };
    const sending = deliver(spool, troubles, url, () => spool.records === 0, pauses);
    await until("it has tried", () => troubles.has("database"));
    await sql`alter role collector connection limit -1`;
    await sending;
    match(troubles.heard[0], /no connection free/);
    spool.close();
  });

  const pooler = await installed("pgbouncer");
  await t.step({
    name: `through PgBouncer in transaction mode${pooler ? "" : " (left out: none on PATH)"}`,
    ignore: !pooler,
    fn: async () => {
      await clear();
      await using dir = await folder();
      await Deno.chmod(dir.path, 0o755);
      const port = quietPort();
      lay(dir.path, {
        users: `"collector" "${password.is}"\n`,
        ini: `[databases]\n* = host=127.0.0.1 port=${server.port}\n[pgbouncer]\n` +
          `listen_addr = 127.0.0.1\nlisten_port = ${port}\nunix_socket_dir =\nauth_type = plain\n` +
          `auth_file = ${dir.path}/users\npool_mode = transaction\n`,
      });
      const child = new Deno.Command("pgbouncer", {
        args: [join(dir.path, "ini")],
        ...(Deno.uid() === 0 ? { uid: 65534, gid: 65534 } : {}),
        stdout: "null",
        stderr: "null",
      }).spawn();
      try {
        const spool = new Spool(join(dir.path, "spool"), new Heard());
        spool.open();
        // What would end a quotation, were it not written otherwise, and a character of three bytes.
        const text = String.raw`{"text":"$json$ '' \\ \" €"}`;
        for (let n = 0; n < 3000; n++) spool.add(record(n, n % 2 ? text : "{}"));
        const at = url().replace(`:${server.port}/`, `:${port}/`);
        await deliver(spool, spool.troubles, () => at, () => spool.records === 0);
        const [{ n, like }] = await sql`select count(*)::int as n,
          count(*) filter (where metrics = ${text}::text::jsonb)::int as like from system_metrics`;
        deepStrictEqual([n, like], [3000, 1500]);
        spool.close();
      } finally {
        child.kill("SIGKILL");
        await child.status;
      }
    },
  });
});

Deno.test("delivery to the function of the database", async (t) => {
  await using server = await migrated();
  const { sql } = server;
  const clear = () => sql`truncate rows.system_metrics, hosts`;
  const url = () => server.urlFor("collector", "collect");

  await t.step(
    "garbage and records that the database refuses are set aside, no others",
    async () => {
      await clear();
      await using dir = await folder();
      const head = `{"pgpulse":"spool","version":1}\n`;
      const lines = Array.from({ length: 300 }, (_, n) => record(n));
      lines[17] = "\x00\x00\x00\xff garbage";
      lines[100] = record(100, "5");
      lines[200] = '{"half":';
      lines[201] = "";
      lines[250] = record(250, '"text"');
      lines[260] = record(260, String.raw`{"zero":"\u0000"}`);
      lay(dir.path, { "1.spool": head + lines.join("\n") + "\n" });
      Deno.writeFileSync(join(dir.path, "2.spool"), crypto.getRandomValues(new Uint8Array(5000)));
      lay(dir.path, { "3.spool": head + record(400) + "\n" });
      const troubles = new Heard();
      const spool = new Spool(dir.path, troubles);
      spool.open();
      await deliver(spool, troubles, url, () => spool.records === 0);
      const rows = await sql`
      select (extract(epoch from time) * 1000 - ${START})::int / 1000 as n from system_metrics order by 1`;
      const bad = [17, 100, 200, 201, 250, 260];
      const good = lines.map((_, n) => n).filter((n) => !bad.includes(n));
      deepStrictEqual(rows.map(({ n }) => n), [...good, 400]);
      const refused = Deno.readTextFileSync(join(dir.path, "refused.ndjson"));
      for (const n of [100, 200, 250, 260]) ok(refused.includes(lines[n] + "\n"), `${n}`);
      strictEqual(spool.lost, 0);
      ok(troubles.heard.length <= 5 && troubles.heard.every((s) => /^Set aside a record/.test(s)));
      spool.close();
    },
  );

  await t.step("a new record that is refused holds up no other", async () => {
    await clear();
    await using dir = await folder();
    const troubles = new Heard();
    const spool = new Spool(dir.path, troubles);
    spool.open();
    spool.add(record(1));
    spool.add(record(2, "[]"));
    spool.add(record(3));
    await deliver(spool, troubles, url, () => spool.records === 0);
    const [{ n }] = await sql`select count(*)::int as n from system_metrics`;
    strictEqual(n, 2);
    match(troubles.heard[0], /which the database refuses \(.*its metrics are no object\)/);
    spool.close();
  });

  await t.step(
    "old samples of a host that is bound to another role hold up no others",
    async () => {
      await clear();
      await using dir = await folder();
      await sql`select pgpulse.bind_host('old', 'server')`;
      const troubles = new Heard();
      const spool = new Spool(dir.path, troubles);
      const head = `{"pgpulse":"spool","version":1}\n`;
      const old = record(1).replace('"h"', '"old"');
      lay(dir.path, {
        "1.spool": `${head}${old}\n`,
        "2.spool": `${head}${record(2)}\n`,
        "3.spool": `${head}${record(3)}\n`,
      });
      spool.open();
      spool.add(record(4));
      await deliver(spool, troubles, url, () => spool.records === 1);
      strictEqual((await sql`select from system_metrics`).length, 3);
      strictEqual(troubles.heard.length, 1, `${troubles.heard}`);
      match(
        troubles.heard[0],
        /"old": it is bound to role "server"; The owner.*bind_host\(host, role\).*samples are kept/,
      );
      spool.close();
      ok(Deno.readTextFileSync(join(dir.path, "1-1.spool")).includes(old));
    },
  );

  await t.step("nor where they are in memory, and they are not sent again and again", async () => {
    await clear();
    await sql`select pgpulse.bind_host('old', 'server')`;
    await using dir = await folder();
    lay(dir.path, { file: "" });
    let batches = 0;
    const troubles = new Heard();
    const spool = new class extends Spool {
      override take() {
        const batch = super.take();
        if (batch) batches++;
        return batch;
      }
    }(join(dir.path, "file", "spool"), troubles);
    spool.open();
    spool.add(record(0).replace('"h"', '"old"'));
    for (let n = 1; n <= 64; n++) spool.add(record(n));
    let looks = 0;
    await deliver(spool, troubles, url, () => troubles.has("held") && ++looks > 5);
    deepStrictEqual([batches, spool.records], [1, 1]);
    strictEqual((await sql`select from system_metrics`).length, 64);
  });

  await t.step(
    "kill -9 at 20 random moments: what the spool took is there exactly once",
    async () => {
      await clear();
      await using dir = await folder();
      const kills = Number(Deno.env.get("COLLECT_KILLS") ?? 20);
      const start = Math.floor(Date.now() / 1e3 - 2 * 86_400) * 1e3;
      const program = join(dir.path, "program.ts");
      // It says each number only after the spool has taken it.
      Deno.writeTextFileSync(
        program,
        `
      import { Delivery, Spool, Troubles } from ${JSON.stringify(join(ROOT, "scripts/collect.ts"))};
      import postgres from "npm:postgres@3.4.9";
      const troubles = new Troubles();
      const text = new TextEncoder();
      const spool = new class extends Spool {
        override acknowledge(entries) {
          super.acknowledge(entries);
          Deno.stdout.writeSync(text.encode("fresh\\n"));
        }
      }(${JSON.stringify(join(dir.path, "spool"))}, troubles);
      spool.open();
      const [from, last] = Deno.args.map(Number);
      const open = () => postgres(${
          JSON.stringify(url())
        }, { max: 1, prepare: false, fetch_types: false });
      const delivery = new Delivery(spool, troubles, open, { first: 10, away: 50, refused: 50 });
      const stop = new AbortController();
      const running = delivery.run(stop.signal);
      for (let n = from; n < last; n++) {
        const time = new Date(${start} + n * 1000).toISOString();
        spool.add(JSON.stringify({ time, host: "h", about: { version: "1" },
          metrics: { n, pad: "x".repeat(n % 3000) } }));
        Deno.stdout.writeSync(text.encode(n + "\\n"));
        delivery.poke();
        if (n % 7 === 0) await new Promise((done) => setTimeout(done, n % 5));
      }
      while (spool.records) await new Promise((done) => setTimeout(done, 20));
      stop.abort();
      await running;
      spool.close();`,
      );
      let next = 0;
      let fresh = 0;
      const run = async (last: number, kill: boolean) => {
        const child = new Deno.Command(Deno.execPath(), {
          args: ["run", "-A", "--no-prompt", "--no-check", program, `${next}`, `${last}`],
          cwd: ROOT,
          env: surroundings(),
          clearEnv: true,
          stdout: "piped",
          stderr: "inherit",
        }).spawn();
        let said = "";
        let armed = false;
        for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
          said += text;
          if (kill && !armed) {
            armed = true;
            setTimeout(() => child.kill("SIGKILL"), Math.random() * 300);
          }
        }
        const { success } = await child.status;
        // A number whose newline is missing was not said.
        const lines = said.slice(0, said.lastIndexOf("\n") + 1).split("\n");
        const numbers = lines.filter((line) => /^\d/.test(line));
        if (numbers.length) next = Number(numbers.at(-1)) + 1;
        fresh += lines.filter((line) => line === "fresh").length;
        return success;
      };
      for (let i = 0; i < kills; i++) strictEqual(await run(1e9, true), false);
      const spooled = next;
      ok(spooled > kills && fresh > kills, `${spooled} in all, ${fresh} times the newest`);
      ok(await run(spooled, false), "the last run sends what is left");
      const rows = await sql`select (metrics->>'n')::int as n from system_metrics order by 1`;
      const found = new Set(rows.map(({ n }) => n));
      // A record may be there whose number was not said any more: it was written before the kill.
      for (let n = 0; n < spooled; n++) ok(found.has(n), `${n} of ${spooled} is missing`);
      strictEqual(found.size, rows.length, "none twice");
      deepStrictEqual(files(join(dir.path, "spool")), ["lock"]);
      if (kills > 20) {
        console.log(`${kills} kills, ${spooled} records, ${fresh} batches of the newest`);
      }
    },
  );
});

// --- as a program ------------------------------------------------------------------------------

/** The collector as a user runs it: the file alone, in an empty folder. */
async function alone() {
  const dir = await folder();
  const path = join(dir.path, "collect.ts");
  await Deno.copyFile(join(ROOT, "scripts/collect.ts"), path);
  const command = (args: string[], env: Record<string, string> = {}) =>
    new Deno.Command(Deno.execPath(), {
      args: ["run", "-A", "--no-prompt", "-q", path, ...args],
      cwd: dir.path,
      env: { ...surroundings(), NO_COLOR: "1", ...env },
      clearEnv: true,
      stdout: "piped",
      stderr: "piped",
    });
  const run = async (args: string[], env?: Record<string, string>) => {
    const { code, stdout, stderr } = await command(args, env).output();
    const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
    return { code, stdout: text(stdout), stderr: text(stderr) };
  };
  return { ...dir, command, run };
}

Deno.test("--once, --dry-run and wrong flags, copied alone", async () => {
  await using place = await alone();
  const once = await place.run(["--once", "--tag", "rack=7", "--host", "web1", "--per-core"]);
  strictEqual(once.code, 0, once.stderr);
  const sample = JSON.parse(once.stdout);
  const columns = Object.entries(summary(sample.metrics)).filter(([, value]) =>
    value !== undefined
  );
  deepStrictEqual(
    Object.entries(sample).slice(0, -1).filter(([, value]) => typeof value === "number"),
    columns,
  );
  for (const name of ["time", "host", "tags", "about", "metrics"]) ok(name in sample, name);
  deepStrictEqual([sample.host, sample.tags, sample.about.interval], ["web1", { rack: "7" }, 5]);
  const { cpu, memory, filesystems } = sample.metrics;
  ok(cpu.used >= 0 && cpu.used <= 1 && cpu.cores === cpu.each.length, JSON.stringify(cpu));
  ok(memory.total > memory.available && memory.available > 0);
  const [largest] = Object.values<Record<string, number>>(filesystems);
  ok(largest.size >= largest.used + largest.available);

  const child = place.command(["--dry-run", "--interval", "1s"]).spawn();
  let said = "";
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    said += text;
    if (said.split("\n").length > 2) break;
  }
  child.kill("SIGTERM");
  await child.stderr.cancel();
  await child.status;
  const times = said.split("\n").slice(0, 2).map((line) => Date.parse(JSON.parse(line).time));
  strictEqual(times[1] - times[0], 1000);
  strictEqual(times[0] % 1000, 0);

  for (
    const [args, message] of [
      [["--interval", "0s"], /Cannot take --interval "0s"/],
      [["--tag", "rack"], /Cannot take --tag "rack": write it as key=value/],
      [["--url-file", "gone"], /Cannot read the URL file "gone"/],
      [["--ca", "gone"], /Cannot read the CA file "gone"/],
      [["--install", "--print"], /set DATABASE_URL or --url-file/],
      [["--print"], /Cannot take --print alone/],
      [["--install", "--dry-run"], /Cannot take --install with --dry-run/],
      [["--host", ""], /Cannot take --host "": give 1 to 255 characters/],
      [["--host", "x".repeat(256)], /Cannot take --host "x+"/],
      [["--port", "0"], /Cannot take --port "0": give a number from 1/],
    ] as const
  ) {
    const { code, stderr } = await place.run([...args]);
    strictEqual(code, 1);
    match(stderr, message);
    ok(!stderr.includes("    at "), stderr);
  }
});

Deno.test("health is by a clock that nobody sets; a port that is not to be had is told", async () => {
  await using dir = await folder();
  const troubles = new Heard();
  const spool = new Spool(dir.path, troubles);
  const delivery = new Delivery(spool, troubles, () => ({}) as never);
  // The newest sample is ten intervals old, and the clock went back since by an hour.
  const [at, steady] = [Date.now() + 3_600_000, performance.now() - 10_000];
  const state = { interval: 1000, samples: 1, at, steady, spool, delivery, troubles };
  const stop = new AbortController();
  const port = quietPort();
  const server = serve(port, state, stop.signal);
  const health = await fetch(`http://127.0.0.1:${port}/healthz`);
  deepStrictEqual([health.status, (await health.json()).healthy], [503, false]);
  throws(() => serve(port, state, stop.signal), /Cannot serve on port \d+: it is taken; choose/);
  stop.abort();
  await server.finished;
  const real = Deno.serve;
  try {
    Deno.serve = (() => {
      throw new Deno.errors.PermissionDenied("Permission denied (os error 13)");
    }) as never;
    throws(() => serve(80, state, stop.signal), /on port 80: Permission denied; choose .* --port$/);
  } finally {
    Deno.serve = real;
  }
});

Deno.test("--install --print: a service that hides its passwords", async () => {
  await using place = await alone();
  const env = { DATABASE_URL: "postgres://collector:sesame@db/testdb" };
  const args = ["--install", "--print", "--tag", "rack=7 b%", "--postgres", "--interval", "10s"];
  const { code, stdout, stderr } = await place.run(
    [...args, "--postgres", "postgres://me:open@db2/app"],
    env,
  );
  strictEqual(code, 0, stderr);
  ok(!/sesame|open/.test(stdout), stdout);
  if (Deno.build.os === "linux") {
    match(
      stdout,
      /^ExecStart=.*collect\.ts "--tag=rack=7 b%%" --postgres --interval=10s --url-file/m,
    );
    match(stdout, /--postgres=\$\{CREDENTIALS_DIRECTORY\}\/postgres1$/m);
    match(stdout, /^LoadCredential=url:/m);
    match(stdout, /^DynamicUser=yes$/m);
  }
  const { text, path, modules } = service(
    "darwin",
    ["--tag=a=<b>"],
    { url: "postgres://x:secret@y/z" },
    "/d",
  );
  match(path, /\.plist$/);
  ok(modules.some((name) => /systeminformation@/.test(name)), "it needs no registry to start");
  match(text, /<string>--tag=a=&lt;b&gt;<\/string>/);
  ok(!text.includes("secret"));
  const linux = service("linux", [], { url: "", scrape1: "" });
  match(linux.text, /^ExecStart=.* --scrape=\$\{CREDENTIALS_DIRECTORY\}\/scrape1$/m);
});

/** A certificate of an authority whose key nobody has. */
const AUTHORITY = `-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIUXfXXIKT7KQ+Xubxw0/C4UNYdyz0wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJYXV0aG9yaXR5MCAXDTI2MTEyMzAwMjQxM1oYDzIxMjYxMDMw
MDAyNDEzWjAUMRIwEAYDVQQDDAlhdXRob3JpdHkwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARLeAeiIrq8WeVmoE+g6JZ0WzLw5iWm3qmOieD6E9hXDdzVKkiQSWm+
PIFGbLiR52aEPS6Vg3XJUY1sHFNeL6V7o1MwUTAdBgNVHQ4EFgQUyp394YzMIWYh
vGlaDr9prfRZZ28wHwYDVR0jBBgwFoAUyp394YzMIWYhvGlaDr9prfRZZ28wDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEAxT5cCcCqjyUYMxUawG6c
HuSFvxmRngbg2Vfc7zCOJj0CIFFKpQfz80WEeYg9cPN8x48h6deUHkXI1CzeGndZ
SKRT
-----END CERTIFICATE-----
`;

Deno.test("--install keeps TLS as it was tried; --uninstall --print removes nothing", async () => {
  await using place = await alone();
  lay(place.path, { "ca.pem": AUTHORITY });
  const address = "postgres://collector@db/testdb";
  const env = { DATABASE_URL: address, DB_SSLROOTCERT: "ca.pem", DB_SSLMODE: "verify-ca" };
  const scrapes = ["http://me:sesame@h/metrics", "http://h/?token=open", "http://plain/metrics"];
  const { stdout } = await place.run(
    ["--install", "--print", ...scrapes.flatMap((url) => ["--scrape", url])],
    env,
  );
  ok(!/sesame|token/.test(stdout), stdout);
  match(stdout, /--scrape=http:\/\/plain\/metrics/);
  match(stdout, /^# \S+\/ca \(0600\)\n# \S+\/scrape1 \(0600\)\n# \S+\/scrape2 \(0600\)\n#/m);
  const gone = await place.run(["--install", "--print"], { ...env, DB_SSLROOTCERT: "gone.pem" });
  match(gone.stderr, /Cannot read the CA file "gone.pem"/);
  lay(place.path, { "bad.pem": "authority\n" });
  const bad = await place.run(["--ca", "bad.pem"], { DATABASE_URL: address });
  strictEqual(bad.code, 1);
  match(bad.stderr, /^Cannot read the CA file "bad.pem": it is no certificate/);
  strictEqual(withDefaults(address, { sslmode: "verify-ca" }), `${address}?sslmode=verify-ca`);
  strictEqual(
    withDefaults(`${address}?sslmode=require`, { sslmode: "verify-full", sslrootcert: "/x" }),
    `${address}?sslmode=require&sslrootcert=%2Fx`,
  );
  const { code, stdout: removed } = await place.run(["--uninstall", "--print"]);
  strictEqual(code, 0);
  match(removed, /^Would remove \//);
});

Deno.test("as a program: two with one spool, health, metrics, an outage, its own restart", async () => {
  await using server = await migrated();
  await using place = await alone();
  const port = quietPort();
  const urlFile = join(place.path, "url");
  Deno.writeTextFileSync(urlFile, server.urlFor("collector", "collect") + "\n");
  const args = ["--interval", "1s", "--host", "web1", "--spool", "spool", "--url-file", urlFile];
  const start = (...more: string[]) => {
    const child = place.command([...args, ...more]).spawn();
    let said = "";
    const read = async (stream: ReadableStream<Uint8Array>) => {
      for await (const text of stream.pipeThrough(new TextDecoderStream())) said += text;
    };
    const ended = Promise.all([child.status, read(child.stdout), read(child.stderr)]);
    return {
      said: () => said,
      end: async (signal: Deno.Signal) => {
        child.kill(signal);
        return (await ended)[0].code;
      },
    };
  };
  const count = async () => {
    const [{ n }] = await server
      .sql`select count(*)::int as n from system_metrics where host = 'web1'`;
    return n as number;
  };
  const first = start("--port", `${port}`);
  await until("samples are there", async () => await count() >= 2, 20_000);
  const health = await fetch(`http://127.0.0.1:${port}/healthz`);
  strictEqual(health.status, 200);
  const told = await health.json();
  deepStrictEqual([told.healthy, told.lost, told.troubles], [true, 0, []]);
  const page = await (await fetch(`http://127.0.0.1:${port}/metrics`)).text();
  const values = readPage(page);
  ok(values.find(({ name }) => name === "pgpulse_collect_samples_total")!.value >= 2);
  ok(values.find(({ name }) => name === "pgpulse_collect_samples_total")!.counts);

  // The CA is that of the database it writes to, which has no TLS; the other one is another matter.
  lay(place.path, { "ca.pem": AUTHORITY });
  const watched = await place.run(
    ["--once", "--url-file", urlFile, "--ca", "ca.pem", "--postgres", "--postgres", server.url],
  );
  strictEqual(watched.stdout.match(/^ +"instance": "testdb@/gm)?.length, 1, watched.stdout);
  match(watched.stderr, /Cannot watch "testdb@.*TLS/);

  const second = await place.run(args);
  strictEqual(second.code, 1);
  match(second.stderr, /Cannot use the spool "spool": another collector has it \(process \d+\)/);

  await server.kill();
  await until("it has noticed", () => /samples wait in the spool/.test(first.said()));
  await pause(2_500);
  strictEqual((await fetch(`http://127.0.0.1:${port}/healthz`)).status, 200);
  strictEqual(await first.end("SIGKILL"), 137);
  await server.start();
  const before = await count();
  const third = start();
  await until("the newest and the others are there", async () => {
    const [{ gaps }] = await server.sql`select count(*) filter (where gap > '1 second')::int as gaps
      from (select time - lag(time) over (order by time) as gap from system_metrics) g`;
    return await count() >= before + 4 && gaps <= 1;
  }, 20_000);
  match(third.said(), /1 sample waits in it|\d samples wait in it/);
  strictEqual(await third.end("SIGTERM"), 0);
  ok(!files(join(place.path, "spool")).some((name) => name.endsWith("refused.ndjson")));
  const [{ odd }] = await server.sql`
    select count(*)::int as odd from system_metrics where date_trunc('second', time) <> time`;
  strictEqual(odd, 0, "samples are on whole seconds");
  const [host] = await server.sql`select version, lost, abs(clock_offset) < 1 as near from hosts`;
  deepStrictEqual({ ...host }, { version: "1", lost: "0", near: true });
});

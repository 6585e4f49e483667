// What Grafana and Docker Compose read: dashboards, provisioning, grafana.ini, compose.yaml. Their
// SQL runs here as grafana_readonly, with Grafana's macros expanded as Grafana does it.

import { deepStrictEqual, match, notStrictEqual, ok, strictEqual, throws } from "node:assert";
import { basename, join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import YAML from "npm:yaml@2.9.1";
import { summary } from "./collect.ts";
import { migrated, ROOT } from "./testing.ts";

// deno-lint-ignore no-explicit-any -- JSON and YAML as people wrote them; the tests look at them
type Any = any;

const LIVE = "-- Grafana --";
const YEAR = 31_536_000_000;
const NOISE = ["id", "version", "iteration", "gnetId", "__inputs", "__requires", "__elements"];

const read = (path: string) => Deno.readTextFileSync(join(ROOT, path));
const yaml = (path: string): Any => YAML.parse(read(path), { merge: true });
const list = (folder: string, ending: string) =>
  [...Deno.readDirSync(join(ROOT, folder))].map(({ name }) => name)
    .filter((name) => name.endsWith(ending)).sort().map((name) => `${folder}/${name}`);

/** Folders of a folder, and those in them. */
const folders = (folder: string): string[] => [
  folder,
  ...[...Deno.readDirSync(join(ROOT, folder))].filter(({ isDirectory }) => isDirectory)
    .flatMap(({ name }) => folders(`${folder}/${name}`)),
];
const dashboards: [string, Any][] = folders("grafana/dashboards")
  .flatMap((folder) => list(folder, ".json"))
  .map((path) => [path, JSON.parse(read(path))]);
/** Those of machines, of hosts, of readings, and of all else; PostgreSQL's own has its own test. */
const isFactory = ([path]: [string, Any]) => path.includes("/Factory/");
const isHosts = ([path]: [string, Any]) => path.includes("/Hosts/");
const isReadings = ([path]: [string, Any]) => path.includes("/Readings/");
const isOther = (d: [string, Any]) =>
  ![isFactory, isHosts, isReadings].some((is) => is(d)) && d[1].uid !== "postgresql";
const sources: Any[] = ["grafana/provisioning/datasources", "grafana/influxdb/datasources"]
  .flatMap((folder) => list(folder, ".yaml"))
  .flatMap((path) => yaml(path).datasources ?? []);
const rules: [string, Any][] = list("grafana/provisioning/alerting", ".yaml")
  .flatMap((path) => (yaml(path).groups ?? []).flatMap((group: Any) => group.rules))
  .map((rule) => [rule.title, rule]);
const provisioning = [
  ...["alerting", "dashboards", "datasources"].map((folder) => `grafana/provisioning/${folder}`),
  "grafana/influxdb/dashboards",
  "grafana/influxdb/datasources",
].flatMap((folder) => list(folder, ".yaml"));

/** Panels, those in closed rows too. */
function panels(dashboard: Any): Any[] {
  return dashboard.panels.flatMap((panel: Any) => [panel, ...panel.panels ?? []]);
}

/** The SQL of an alert rule. */
const query = ({ data }: Any): string =>
  data.find(({ datasourceUid }: Any) => datasourceUid !== "__expr__").model.rawSql;

/** Whether a target, a panel or a variable belongs to the database. */
const bySql = ({ datasource }: Any) => datasource?.uid === "pgpulse-postgresql";

// --- SQL with Grafana's macros -------------------------------------------------------------------

interface Range {
  from: Date;
  to: Date;
  /** Width of a step in seconds. */
  interval: number;
}

/** Expands variables and macros as Grafana's PostgreSQL data source does, and refuses what it refuses. */
export function expand(
  sql: string,
  { from, to, interval }: Range,
  variables: Record<string, string> = {},
): string {
  const known: Record<string, string> = {
    __interval: `${interval}s`,
    __interval_ms: `${interval * 1000}`,
    __url_time_range: "from=now%2Fd&to=now&timezone=Europe%2FBerlin",
    ...variables,
  };
  const named = sql.replace(
    /\$\{(\w+)(?::\w+)?\}|\[\[(\w+)\]\]|\$(\w+)(?!\w*\()/g,
    (whole, ...names) => known[names.find((name) => name)] ?? whole,
  );
  // As in Grafana: the arguments of a macro end at the first closing bracket.
  return named.replace(/\$(\w+)\(([^)]*)\)/g, (whole, macro, inside, at) => {
    const [first, step, fill] = inside.split(",").map((arg: string) => arg.trim());
    if (!first && !/(From|To)$/.test(macro)) throw new Error(`${whole} needs a column`);
    const seconds = () => {
      const [, n, unit] = step?.replaceAll("'", "").match(/^(\d+)(ms|s|m|h|d)$/) ?? [];
      if (!n) throw new Error(`${whole} needs an interval`);
      if (fill !== undefined && !/^(NULL|previous|-?[\d.]+)$/.test(fill)) {
        throw new Error(`${whole} cannot fill with ${fill}`);
      }
      const units: Record<string, number> = { ms: 0.001, s: 1, m: 60, h: 3600, d: 86400 };
      return Number(n) * units[unit];
    };
    // Before a comma, $__timeGroup names its column, as it did in old versions.
    const alias =
      macro.endsWith("Alias") || macro === "__timeGroup" && named[at + whole.length] === ","
        ? ' as "time"'
        : "";
    switch (macro) {
      case "__time":
        return `${first} as "time"`;
      case "__timeEpoch":
        return `extract(epoch from ${first}) as "time"`;
      case "__timeFilter":
        return `${first} between '${from.toISOString()}' and '${to.toISOString()}'`;
      case "__timeFrom":
        return `'${from.toISOString()}'`;
      case "__timeTo":
        return `'${to.toISOString()}'`;
      case "__timeGroup":
      case "__timeGroupAlias":
        return `floor(extract(epoch from ${first})/${seconds()})*${seconds()}${alias}`;
      case "__unixEpochFilter":
        return `${first} >= ${Math.floor(+from / 1000)} and ${first} <= ${Math.floor(+to / 1000)}`;
      case "__unixEpochGroup":
      case "__unixEpochGroupAlias":
        return `floor((${first})/${seconds()})*${seconds()}${alias}`;
      default:
        throw new Error(`Grafana knows no macro ${whole}`);
    }
  });
}

Deno.test("macros expand as in Grafana, and what Grafana does not know is refused", () => {
  const range = { from: new Date(0), to: new Date(60_000), interval: 5 };
  strictEqual(
    expand(`select $__timeGroupAlias("t", $__interval, NULL), $__interval_ms`, range),
    `select floor(extract(epoch from "t")/5)*5 as "time", 5000`,
  );
  strictEqual(
    expand("$__timeFilter(t) and a = '${host}' and b in ([[host]]) and c = '$host'", range, {
      host: "x",
    }),
    "t between '1970-01-01T00:00:00.000Z' and '1970-01-01T00:01:00.000Z' " +
      "and a = 'x' and b in (x) and c = 'x'",
  );
  strictEqual(
    expand("select $__timeGroup(t, 1m), $__timeFrom() group by $__timeGroup(t, 1m)", range),
    'select floor(extract(epoch from t)/60)*60 as "time", ' +
      "'1970-01-01T00:00:00.000Z' group by floor(extract(epoch from t)/60)*60",
  );
  strictEqual(expand("$__unixEpochFilter(t)", range), "t >= 0 and t <= 60");
  throws(() => expand("$__timeFilter()", range), /needs a column/);
  throws(() => expand("$__timeGroup(t)", range), /needs an interval/);
  throws(() => expand("$__bucket(t)", range), /knows no macro/);
});

for (const major of [15, 18] as const) {
  Deno.test(`as grafana_readonly, PostgreSQL ${major}: every SQL text returns rows`, async (t) => {
    await using server = await migrated({ major });
    const reader = postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1 });
    try {
      const addresses = await reader`select address, rows from pgpulse.channels`;
      const windows = new Map(addresses.map(({ address, rows }) => [address, rows]));
      ok(windows.size > 0);

      await t.step("alerts on empty tables: a row where silence is what is told", async () => {
        for (const [title, rule] of rules) {
          const rows = await reader.unsafe(query(rule));
          strictEqual(rows.length, rule.uid === "pgpulse-no-data" ? 1 : 0, title);
          ok(rows.every((row) => Object.values(row).every((v) => Number.isFinite(v))), title);
        }
      });

      for (const table of ["metrics", "live_metrics"]) {
        await server.sql.unsafe(
          `insert into ${table} ("timestamp", value)
           select t, 50 + 10 * random()
           from generate_series(now() - interval '2 hours', now() - interval '5 s', '10 s') t`,
        );
      }
      const ranges = [[300, 1], [3600, 10], [2_592_000, 1800]].map(([length, interval]) => ({
        from: new Date(Date.now() - length * 1000),
        to: new Date(Date.now() + 1000),
        interval,
      }));

      for (const [path, dashboard] of dashboards.filter(isOther)) {
        const choices: Record<string, string[]> = {};
        for (const variable of (dashboard.templating?.list ?? []).filter(bySql)) {
          await t.step(`${path}: variable ${variable.name}`, async () => {
            strictEqual(variable.type, "query");
            const rows = await reader.unsafe(expand(variable.query, ranges[0]));
            ok(rows.length > 0);
            for (const row of rows) deepStrictEqual(Object.keys(row), ["__text", "__value"]);
            choices[variable.name] = rows.map((row) => row.__value);
            if (variable.current) ok(choices[variable.name].includes(variable.current.value));
          });
        }
        // One choice for each variable is enough for SQL; channels are looked at one by one below.
        const first = Object.fromEntries(Object.entries(choices).map(([k, [v]]) => [k, v]));
        const texts = [...panels(dashboard), { title: "annotations", ...dashboard.annotations }]
          .flatMap((panel) =>
            (panel.targets ?? panel.list ?? []).filter(bySql).map((target: Any) => ({
              ...target,
              title: panel.title,
              timeFrom: panel.timeFrom,
            }))
          );
        for (const { title, refId, rawSql, format, timeFrom } of texts) {
          await t.step(`${path}: ${title} ${refId}`, async () => {
            for (const range of ranges.slice(0, timeFrom ? 1 : undefined)) {
              const rows = await reader.unsafe(expand(rawSql, range, first));
              ok(rows.length > 0, "no rows");
              for (const name of Object.keys(rows[0])) {
                ok(rows.some((row) => row[name] !== null && Number(row[name]) !== 0), `no ${name}`);
              }
              if (format !== "time_series") continue;
              // Grafana draws a series from a column "time", in order, and numbers beside it.
              const times = rows.map((row) => Number(row.time));
              ok(times.every((time, i) => i === 0 || time >= times[i - 1]), "not in order");
              const others = Object.keys(rows[0]).filter((name) => name !== "time");
              ok(others.length > 0 && !others.includes("metric"), `columns: ${others}`);
              for (const name of others) strictEqual(typeof rows[0][name], "number", name);
            }
          });
        }
        await t.step(`${path}: live channels are there, and windows fit`, () => {
          for (const panel of panels(dashboard)) {
            for (const target of panel.targets ?? []) {
              if (target.datasource.uid !== LIVE) continue;
              const [, variable] = target.channel.match(/^\$\{(\w+)\}$/) ?? [];
              for (const address of variable ? choices[variable] : [target.channel]) {
                ok(windows.has(address), `${panel.title}: there is no channel "${address}"`);
                strictEqual(panel.maxDataPoints, windows.get(address) / 2, panel.title);
              }
            }
          }
        });
      }

      await t.step("the alert on rows that come", async () => {
        const [, rule] = rules.find(([, { uid }]) => uid === "pgpulse-no-data")!;
        const [{ age }] = await reader.unsafe(query(rule));
        ok(age > 0 && age < 60, `${age}`);
      });

      await t.step("the example of a stream of one's own works", async () => {
        const text = dashboards.flatMap(([, d]) => panels(d))
          .find((p) => p.options?.content?.includes("```sql"));
        const [, example] = text.options.content.match(/```sql\n(.*?)```/s);
        await server.sql`create table rooms (at timestamptz, room text, degrees float8)`;
        await server.sql.unsafe(example).simple();
        const [heat] = await reader`select label from pgpulse.channels where stream = 'heat'`;
        strictEqual(heat.label, "heat");
      });
    } finally {
      await reader.end();
    }
  });
}

// --- the factory ---------------------------------------------------------------------------------

/**
 * Six machines: M01 has a quote in its name, M'4 one in its id. For the alerts: M02 is hot, M03 is
 * silent, M05 makes little and uses much energy; M06 has all of it, but is under maintenance.
 */
const FACTORY = `
insert into machines (id, name, area, status, oee, availability, performance, quality, target_oee)
select id, name, area, case id when 'M06' then 'maintenance' else 'running' end, 60, 80, 80, 97, 60
from (values
    ('M01', 'Foreman''s press', 'Bob''s hall'),
    ('M02', 'Press 2', 'Bob''s hall'),
    ('M03', 'Press 3', 'Bob''s hall'),
    ('M''4', 'Robot 1', 'Assembly'),
    ('M05', 'Robot 2', 'Assembly'),
    ('M06', 'Robot 3', 'Assembly')
) as m (id, name, area);
insert into machine_history (machine_id, "timestamp", name, area, status, oee)
select m.id, t, m.name, m.area, (array['running', 'idle', 'error', 'maintenance'])[1 + n % 4], 60
from machines m, generate_series(1, 400) n, lateral (select now() - n * interval '1 hour' as t) t;
insert into production
select id, t, 3600, case when id in ('M05', 'M06') then 900 else 3000 end, 10,
    case when id in ('M05', 'M06') then 80 else 270 end,
    case when id in ('M05', 'M06') then 75 else 268 end
from machines, generate_series(
    date_trunc('hour', now()) - interval '30 days', date_trunc('hour', now()), '1 hour'
) t;
insert into energy_consumption
select machine_id, hour, 10 + extract(day from hour)::int % 2 + case
    when machine_id in ('M05', 'M06') and hour = date_trunc('hour', now()) - interval '1 hour' then 10
    else 0
end
from production;
insert into alarms (machine_id, severity, code, message, raised_at, cleared_at)
select id, 'critical', 'E1', 'Door <open>', now() - n * interval '7 hours', now() - n * interval '6 hours'
from machines, generate_series(1, 5) n;
insert into alarms (machine_id, severity, code, message)
select id, 'warning', 'T2', 'Warm' from machines;
insert into maintenance (machine_id, kind, note, started_at, ended_at)
select id, 'planned', 'Oil', now() - interval '5 hours', now() - interval '4 hours' from machines;
insert into downtime (machine_id, reason, started_at, ended_at)
select id, (array['Jam', 'Tool change'])[n % 2 + 1], t, t + interval '9 minutes'
from machines, generate_series(1, 9) n, lateral (select now() - n * interval '3 hours' as t) t;
-- Alone in their range, and without a length.
insert into downtime (machine_id, reason, started_at, ended_at)
values ('M01', 'Jam', '1990-01-01 12:00Z', '1990-01-01 12:00Z'),
    ('M01', 'Clock', '1990-01-01 12:10Z', '1990-01-01 12:00Z');
insert into machine_metrics (machine_id, metric_type, value, "timestamp", zone_number, target_value)
select id, type, level + random() + case when id in ('M02', 'M06') then 25 else 0 end, t, zone, 68
from machines, (values
    ('temperature', null, 65), ('multi_zone_temp', 1, 60), ('multi_zone_temp', 2, 62),
    ('multi_zone_temp', 3, 63), ('multi_zone_temp', 4, 61), ('pressure', null, 5), ('speed', null, 900)
) as series (type, zone, level), lateral (
    select now() - n * interval '3 hours' as t from generate_series(1, 300) n
    union all
    select now() - n * interval '30 seconds' from generate_series(0, 130) n
) t
where id <> 'M03' or t < now() - interval '20 minutes';
select pgpulse.refresh_rollups();
`;

/** A value of a variable as Grafana puts it into SQL. */
const quoted = (values: string[]) => values.map((v) => `'${v.replaceAll("'", "''")}'`).join(",");

/** OIDs of what Grafana reads as text and as numbers. */
const TEXT = [25, 1042, 1043], NUMBERS = [20, 21, 23, 700, 701, 1700];

/** What Grafana can draw a time series from. */
function drawable(rows: postgres.RowList<postgres.Row[]>, title: string) {
  // Grafana draws a series for each text, from a column "time" in order and numbers.
  const [time, ...others] = rows.columns;
  deepStrictEqual([time.name, time.type], ["time", 1184]);
  ok(others.every(({ type }) => [...TEXT, ...NUMBERS].includes(type)), title);
  ok(others.some(({ type }) => NUMBERS.includes(type)), `${title}: no number`);
  ok(!others.some(({ name }) => name === "metric"), title);
  ok(rows.every((row, i) => i === 0 || row.time >= rows[i - 1].time), `${title}: order`);
}

/** Reads dashboards as Grafana does. */
function reading(reader: postgres.Sql, day: Range) {
  /** What a dashboard's variables offer, each asked for with those before it, all of it chosen. */
  const choose = async (dashboard: Any, chosen: Record<string, string>) => {
    const values: Record<string, string> = {};
    for (const { name, type, query, multi } of dashboard.templating?.list ?? []) {
      if (type === "textbox") {
        values[name] = (chosen[name] ?? "").replaceAll("'", "''");
        continue;
      }
      const rows = await reader.unsafe(expand(query, day, values));
      ok(rows.length > 0, `${name} offers nothing, and in () is no SQL`);
      for (const row of rows) deepStrictEqual(Object.keys(row), ["__text", "__value"]);
      const all = rows.map((row) => row.__value);
      if (chosen[name]) ok(all.includes(chosen[name]), `${name} lacks ${chosen[name]}: ${all}`);
      values[name] = multi
        ? quoted(chosen[name] ? [chosen[name]] : all)
        : (chosen[name] ?? all[0]).replaceAll("'", "''");
    }
    return values;
  };
  /** Runs all SQL of a dashboard; calls back with the rows of each text. */
  const run = async (
    dashboard: Any,
    range: Range,
    values: Record<string, string>,
    look: (rows: postgres.RowList<postgres.Row[]>, target: Any, title: string) => void = () => {},
  ) => {
    const texts = [
      ...panels(dashboard).flatMap(({ title, targets = [] }) =>
        targets.filter(bySql).map((t: Any) => [title, t])
      ),
      ...(dashboard.annotations?.list ?? []).filter(bySql).map((
        { name, target }: Any,
      ) => [name, target]),
    ];
    for (const [title, target] of texts) {
      try {
        look(await reader.unsafe(expand(target.rawSql, range, values)), target, title);
      } catch (error) {
        throw new Error(
          `${dashboard.title}, ${title}, from ${range.from.toISOString()}: ${error}`,
        );
      }
    }
  };
  return { choose, run };
}

for (const major of [15, 18] as const) {
  Deno.test(`as grafana_readonly, PostgreSQL ${major}: the factory's dashboards and alerts`, async (t) => {
    await using server = await migrated({ major });
    await using reader = Object.assign(
      postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1, onnotice: () => {} }),
      { [Symbol.asyncDispose]: () => reader.end() },
    );
    const end = Date.now() + 1000;
    const back = (seconds: number, interval: number): Range => (
      { from: new Date(end - seconds * 1000), to: new Date(end), interval }
    );
    const day = back(86_400, 60);
    const ranges = [
      back(300, 1),
      back(3600, 5),
      day,
      back(2_592_000, 1800),
      back(31_536_000, 43_200),
    ];
    const before = { from: new Date("1990-01-01"), to: new Date("1990-01-02"), interval: 60 };

    const { choose, run } = reading(reader, day);
    const named = (uid: string): Any => dashboards.find(([, d]) => d.uid === uid)![1];
    const factory = dashboards.filter(isFactory).map(([, dashboard]) => dashboard);
    const press = { area: "Bob's hall", machine_id: "M01" };

    await t.step("empty tables: no error, and nothing to choose is no error either", async () => {
      for (const dashboard of factory) await run(dashboard, day, await choose(dashboard, {}));
    });
    await server.sql.unsafe(FACTORY).simple();

    for (const dashboard of factory) {
      await t.step(
        `${dashboard.title}: draws something over a day, no error over any range`,
        async () => {
          const single = dashboard.uid === "machine" ? press : { area: press.area };
          const values = await choose(dashboard, single);
          for (const range of [...ranges, before]) {
            await run(dashboard, range, values, (rows, { format }, title) => {
              if (range === day) {
                ok(rows.length > 0, "no rows");
                for (const name of Object.keys(rows[0])) {
                  ok(rows.some((row) => row[name] !== null), `no ${name}`);
                }
              }
              ok(rows.length < 8000, `${title}: ${rows.length} rows`);
              if (format !== "time_series") return;
              drawable(rows, title);
            });
          }
        },
      );
    }
    await t.step(
      "quotes in ids, names, areas and filters; a filter that nothing passes",
      async () => {
        const area = named("area");
        const robot = { area: "Assembly", machine_id: "M'4", machine: "^ro.*[12]$" };
        for (const dashboard of [area, named("factory-template"), named("machine")]) {
          await run(dashboard, day, await choose(dashboard, robot));
        }
        await run(area, day, await choose(area, { area: press.area, machine: "n's" }));
        await run(area, day, await choose(area, { area: press.area, machine: "nothing" }));
      },
    );
    await t.step("annotations: a link to the machine, whatever its id", async () => {
      await run(named("plant"), day, {}, (rows, _, title) => {
        if (!["Alarms", "Maintenance"].includes(title)) return;
        const links = rows.map(({ text }) => text.match(/var-machine_id=(\S+?)&amp;/)![1]);
        ok(links.map(decodeURIComponent).includes("M'4"), links.join());
        ok(rows.every(({ text }) => text.includes("&amp;from=now%2Fd&to=now&timezone=Europe%2F")));
        ok(rows.every(({ tags }) => /^(critical|maintenance),/.test(tags)), title);
        if (title === "Maintenance") ok(rows.every((row) => row.timeend > row.time));
      });
    });
    await t.step(
      "annotations: of many the worst, spread over the range, and a word of the others",
      async () => {
        // Every 10 minutes; each third one is longer.
        await server.sql`
        insert into alarms (machine_id, severity, code, raised_at, cleared_at)
        select 'M01', 'critical', 'E2', at, at + case n % 3 when 0 then interval '7 minutes' else '1 minute' end
        from generate_series(0, 143) n, lateral (select now() - n * interval '10 minutes' as at) _`;
        await server.sql`
        insert into maintenance (machine_id, kind, started_at, ended_at)
        select 'M01', 'repair', at, at + case n % 3 when 0 then interval '7 minutes' else '1 minute' end
        from generate_series(1, 143) n, lateral (select now() - n * interval '10 minutes' as at) _`;
        for (const dashboard of factory) {
          await run(dashboard, day, await choose(dashboard, press), (rows, _, title) => {
            if (!rows.columns.some(({ name }) => name === "tags")) return;
            ok(rows.length >= 29 && rows.length <= 30, `${title}: ${rows.length}`);
            ok(rows.every(({ text }) => /; \d+ more about then are not shown$/.test(text)), title);
            const times = rows.map(({ time }) => Number(time)).sort((a, b) => a - b);
            ok(times[0] < end - 22 * 3_600_000 && times.at(-1)! > end - 3_600_000, title);
            for (const { time, timeend } of rows) {
              if (timeend && Number(time) > +day.from) {
                ok(timeend - time > 300_000, `${title}: a short one`);
              }
            }
          });
        }
        await server.sql`delete from maintenance where kind = 'repair'`;
      },
    );
    await t.step(
      "the running hour is drawn at its rate, and not in its first minutes",
      async () => {
        await server.sql`
        update energy_consumption
        set energy_kwh = 10 * extract(epoch from now() - hour) / 3600
        where machine_id = 'M01' and hour = date_trunc('hour', now())`;
        await server.sql`select pgpulse.refresh_rollups()`;
        const machine = named("machine");
        await run(machine, ranges[1], await choose(machine, press), (rows, _, title) => {
          if (title !== "Energy per hour") return;
          ok(
            rows.every(({ energy }) => energy > 9.5 && energy < 11.5),
            rows.map((r) => r.energy).join(),
          );
        });
      },
    );
    await t.step("units of what is measured", async () => {
      const unit = async (...types: string[]) =>
        (await reader`select pgpulse.metric_unit(variadic ${types}) as unit`)[0].unit;
      strictEqual(await unit("temperature", "multi_zone_temp"), "celsius");
      strictEqual(await unit("power"), "kwatt");
      strictEqual(await unit("temperature", "power"), "short");
      strictEqual(await unit("temperature", "of one's own"), "short");
    });
    await t.step("an area's own dashboard is one command", async () => {
      const [text] = panels(named("factory-template")).filter(({ type }) => type === "text");
      const [, command] = text.options.content.match(/```sh\n(.*?)```/s);
      const dir = await Deno.makeTempDir();
      await Deno.mkdir(join(dir, "grafana/dashboards"), { recursive: true });
      await Deno.symlink(
        join(ROOT, "grafana/dashboards/Factory/factory-template.json"),
        join(dir, "template"),
      );
      await Deno.mkdir(join(dir, "grafana/dashboards/Factory"));
      await Deno.copyFile(
        join(dir, "template"),
        join(dir, "grafana/dashboards/Factory/factory-template.json"),
      );
      const done = await new Deno.Command("sh", { args: ["-euc", command], cwd: dir }).output();
      strictEqual(done.code, 0, new TextDecoder().decode(done.stderr));
      const made = JSON.parse(
        await Deno.readTextFile(join(dir, "grafana/dashboards/Factory/Molding/molding.json")),
      );
      deepStrictEqual([made.uid, made.title], ["molding", "Molding"]);
      const [area] = made.templating.list.filter(({ name }: Any) => name === "area");
      strictEqual(area.regex, "^Molding$");
      await Deno.remove(dir, { recursive: true });
    });

    const alert = async (title: string) => {
      const [, rule] = rules.find(([name]) => name === title)!;
      const rows = await reader.unsafe(query(rule));
      const numbers = rows.columns.filter(({ type }) => NUMBERS.includes(type));
      strictEqual(numbers.length, 1, "an alert has one number and labels");
      ok(rows.columns.every(({ type }) => [...TEXT, ...NUMBERS].includes(type)));
      const [{ params: [limit] }] = rule.data.at(-1).model.conditions.map((c: Any) => c.evaluator);
      return Object.fromEntries(
        rows.map((row) => [row.machine_id, Number(row[numbers[0].name]) > limit]),
      );
    };
    const calm = { M01: false, M02: false, M03: false, "M'4": false, M05: false };
    await t.step("alerts: those that they are for, and nothing under maintenance", async () => {
      const { M03: _, ...measured } = calm;
      deepStrictEqual(await alert("High Temperature"), { ...measured, M02: true });
      deepStrictEqual(await alert("Machine stopped reporting"), { ...calm, M03: true });
      deepStrictEqual(await alert("OEE under target"), { ...calm, M05: true });
      deepStrictEqual(await alert("Energy anomaly"), { ...calm, M05: true });
    });
    await t.step("alerts: silent while a window of maintenance is open, no longer", async () => {
      await server.sql`
        insert into maintenance (machine_id, kind, started_at, ended_at)
        values ('M02', 'repair', now() - interval '1 minute', null),
            ('M03', 'planned', now() - interval '1 minute', now() + interval '1 hour'),
            ('M05', 'planned', now() + interval '1 hour', now() + interval '2 hours')`;
      const { M02: _, M03: __, ...others } = calm;
      deepStrictEqual(await alert("High Temperature"), others);
      deepStrictEqual(await alert("Machine stopped reporting"), others);
      deepStrictEqual(await alert("OEE under target"), { ...others, M05: true });
      await server.sql`update maintenance set ended_at = now() where machine_id = 'M02'`;
      strictEqual((await alert("High Temperature")).M02, true);
    });
    await t.step("alerts: a NaN hides no heat", async () => {
      await server.sql`
        insert into machine_metrics (machine_id, metric_type, value) values ('M02', 'temperature', 'NaN')`;
      strictEqual((await alert("High Temperature")).M02, true);
    });

    await t.step("All over 5,000 machines: capped, and no error", async () => {
      await server.sql.unsafe(`
        insert into machines (id, name, area, status, oee)
        select 'N' || n, 'Many ' || n, 'Many', 'running', n % 97 from generate_series(1, 5000) n;
        insert into machine_metrics (machine_id, metric_type, value, "timestamp")
        select 'N' || n, 'temperature', 50, now() - i * interval '1 minute'
        from generate_series(1, 5000) n, generate_series(1, 3) i;
        insert into production
        select 'N' || n, date_trunc('hour', now()), 3600, 3000, 10, 200, 199
        from generate_series(1, 5000) n;
        insert into energy_consumption select machine_id, hour, 9 from production where hour > now() - interval '1 hour'
        on conflict do nothing;
      `).simple();
      for (const uid of ["plant", "area", "factory-template"]) {
        const values = await choose(named(uid), { area: "Many" });
        if (values.machine_id) strictEqual(values.machine_id.split(",").length, 5000);
        await run(named(uid), ranges[1], values, (rows, { format }, title) => {
          ok(rows.length < 8000, `${uid}, ${title}: ${rows.length} rows`);
          if (format !== "time_series") return;
          ok(new Set(rows.map((row) => row.machine ?? "")).size <= 40, `${uid}, ${title}`);
        });
      }
      strictEqual(Object.keys(await alert("Machine stopped reporting")).length, 5004);
    });
  });
}

Deno.test("the factory's dashboards: numbers, ranges, thresholds and variables that people know", () => {
  const factory = new Map(dashboards.filter(isFactory).map(([, d]) => [d.uid, d]));
  deepStrictEqual([...factory].map(([uid, { title, time }]) => [uid, title, time.from]), [
    ["area", "2 Area", "now-6h"],
    ["factory-template", "Template", "now-6h"],
    ["machine", "3 Machine", "now-1h"],
    ["plant", "1 Plant", "now-24h"],
  ]);
  for (const [uid, { templating, timepicker, annotations }] of factory) {
    const offered = timepicker.quick_ranges.map(({ from }: Any) => from);
    for (const from of ["5m", "1h", "2h", "6h", "24h", "7d", "30d", "1y"]) {
      ok(offered.includes(`now-${from}`), from);
    }
    deepStrictEqual(annotations.list.map(({ name }: Any) => name), ["Alarms", "Maintenance"]);
    const variables = (templating?.list ?? []).map(({ name, multi }: Any) => [name, multi]);
    const known: Record<string, unknown> = {
      plant: [],
      machine: [["machine_id", false], ["metric_type", true]],
    };
    deepStrictEqual(
      variables,
      known[uid] ??
        [["area", false], ["machine", undefined], ["machine_id", true], ["metric_type", true]],
    );
    // Neither form works with the other kind of variable.
    const sql = JSON.stringify(factory.get(uid));
    if (uid === "machine") match(sql, /machine_id = '\$machine_id'/);
    else if (uid !== "plant") match(sql, /id in \(\$machine_id\)/);
    ok(!(uid === "machine" ? /in \(\$machine_id\)/ : /'\$machine_id'/).test(sql), uid);
  }
  const temperature = panels(factory.get("machine")).find(({ title }) => title === "Temperature")!;
  deepStrictEqual(
    temperature.fieldConfig.defaults.thresholds.steps.map((
      { color, value }: Any,
    ) => [color, value]),
    [["green", null], ["yellow", 70], ["red", 85]],
  );
  const names = temperature.fieldConfig.overrides[0].properties
    .find(({ id }: Any) => id === "mappings").value.map(({ options }: Any) => options.result.text);
  deepStrictEqual(names, ["Normal", "Warning", "Critical"]);
});

// --- hosts ---------------------------------------------------------------------------------------

/**
 * Samples of one host as collect.ts sends them: the last 20 minutes, before that by the hour. Its
 * second file system fills by so much an hour, up to so much.
 */
function samples(
  host: string,
  {
    cpu = 0.3,
    memory = 0.5,
    root = 0.2,
    disk = 0.4,
    rise = 0,
    ahead = 0,
    every = 5,
    now = Date.now(),
  },
): Any[] {
  const tick = Math.floor(now / 1000 / every) * 1000 * every,
    hour = Math.floor(now / 3_600_000) * 3_600_000;
  const times = [
    ...Array.from({ length: 240 }, (_, i) => hour - (i + 1) * 3_600_000),
    ...Array.from({ length: 6 }, (_, i) => tick - (i + 1) * 3_600_000),
    ...Array.from({ length: 240 }, (_, i) => tick - i * 1000 * every),
  ];
  return times.map((time) => ({
    time: new Date(time).toISOString(),
    host,
    tags: { role: "web" },
    about: { os: "Linux", version: "1", interval: every, now: new Date(now + ahead).toISOString() },
    metrics: {
      cpu: { used: cpu, user: cpu / 2, system: cpu / 4, iowait: 0.01, steal: 0.01, cores: 4 },
      load: [1, 1, 1],
      memory: { total: 1000, available: 1000 * (1 - memory), free: 1, buffers: 1, cached: 1 },
      swap: { total: 100, used: 10 },
      filesystems: Object.fromEntries(
        [["/", root], ["/snap", 1], ["/data", disk - rise * (now - time) / 3_600_000]].map((
          [mount, used],
        ) => [
          mount,
          {
            device: "/dev/vda1",
            type: mount === "/snap" ? "squashfs" : "ext4",
            size: 1e9,
            used: 1e9 * Math.max(Number(used), 0.01),
            available: 1e9 * (1 - Math.max(Number(used), 0.01)),
            inodes: 1000,
            inodes_used: 10,
          },
        ]),
      ),
      disks: { vda: { read_bytes: 1, written_bytes: 2, reads: 1, writes: 1, busy: 0.1 } },
      network: { eth0: { received_bytes: 10, sent_bytes: 20, received_packets: 1 } },
      uptime: 1000,
      processes: { total: 100, running: 1, blocked: 0 },
      sockets: { tcp: 1, udp: 1 },
      temperatures: { "Package id 0": 45.5 },
      container: { cpu_limit: 2, memory_limit: 1e9 },
      scrape: { 'requests{code="200"}': 3.2 },
      collector: { lost: 1 },
    },
  }));
}

for (const major of [15, 18] as const) {
  Deno.test(`as grafana_readonly, PostgreSQL ${major}: the dashboards and alerts of hosts`, async (t) => {
    await using server = await migrated({ major });
    await using reader = Object.assign(
      postgres(server.urlFor("grafana_readonly", "grafana"), { max: 1, onnotice: () => {} }),
      { [Symbol.asyncDispose]: () => reader.end() },
    );
    const back = (seconds: number, interval: number): Range => (
      { from: new Date(Date.now() - seconds * 1000), to: new Date(), interval }
    );
    const day = back(86_400, 60);
    const { choose, run } = reading(reader, day);
    const of = dashboards.filter(isHosts).map(([, dashboard]) => dashboard);
    const [host] = of.filter(({ uid }) => uid === "host");

    await t.step("empty tables: no error", async () => {
      for (const dashboard of of) await run(dashboard, day, await choose(dashboard, {}));
    });
    const send = async (records: Any[]) => {
      const sender = postgres(server.urlFor("collector", "collect"), { max: 1 });
      for (let i = 0; i < records.length; i += 500) {
        const part = records.slice(i, i + 500);
        const batch = JSON.stringify(part.map((one) => ({ ...one, ...summary(one.metrics) })));
        await sender`select pgpulse.collect(${batch}::text::json)`;
      }
      await sender.end();
    };
    await send([
      ...samples("calm", { every: 7 }),
      ...samples("Bob's host <1>", { cpu: 0.97, memory: 0.97, ahead: 60_000 }),
      ...samples("full", { disk: 0.95 }),
      ...samples("filling", { root: 0.65, disk: 0.6, rise: 0.05 }),
      ...samples("gone", { now: Date.now() - 1_200_000 }),
    ]);
    await server.sql`
      update hosts set last_seen = now() - interval '20 minutes' where host = 'gone'`;

    for (const dashboard of of) {
      await t.step(`${dashboard.title}: draws something, no error over any range`, async () => {
        const values = await choose(dashboard, { host: "Bob's host <1>" });
        const ranges = [
          back(300, 1),
          back(3600, 5),
          day,
          back(604_800, 600),
          back(2_592_000, 1800),
          back(31_536_000, 43_200),
        ];
        for (const range of ranges) {
          await run(dashboard, range, values, (rows, { format }, title) => {
            ok(rows.length > 0, `${title} from ${range.from.toISOString()}: no rows`);
            for (const name of Object.keys(rows[0])) {
              if (range !== day || name === "Full in") continue;
              ok(rows.some((row) => row[name] !== null), `no ${name}`);
            }
            ok(rows.length < 8000, `${title}: ${rows.length} rows`);
            if (format === "time_series") drawable(rows, title);
          });
        }
        const before = { from: new Date("1990-01-01"), to: new Date("1990-01-02"), interval: 60 };
        await run(dashboard, before, values);
      });
    }
    await t.step("Host: an interval that fits into no round time is drawn too", async () => {
      const drawn: string[] = [];
      await run(host, back(1200, 1), await choose(host, { host: "calm" }), (rows, _, title) => {
        if (rows.length > 50) drawn.push(title);
      });
      for (const title of ["File systems", "Interfaces"]) {
        ok(drawn.includes(title), `${title}: not among ${drawn}`);
      }
    });
    await t.step("a filter by name or tag, and one that nothing passes", async () => {
      const [hosts] = of.filter(({ uid }) => uid === "hosts");
      for (const [filter, many] of [["^ca", 1], ["web", 5], ["n'o", 0]] as const) {
        await run(hosts, back(300, 1), await choose(hosts, { filter }), (rows, _, title) => {
          if (title === "All hosts") strictEqual(rows.length, many, filter);
          // no image, which is always full
          if (title === "Fullest mounts") ok(rows.every(({ Mount }) => Mount !== "/snap"));
        });
      }
    });
    await t.step("Host: its channels are there, windows fit, and it says who looks", async () => {
      const values = await choose(host, { host: "Bob's host <1>" });
      const addresses = await reader`select address, rows from pgpulse.channels`;
      const windows = new Map(addresses.map(({ address, rows }) => [address, rows]));
      const live = panels(host).filter(({ datasource }) => datasource?.uid === LIVE);
      strictEqual(live.length, 3);
      for (const { title, targets: [{ channel }], maxDataPoints } of live) {
        const address = values[channel.match(/^\$\{(\w+)\}$/)![1]];
        strictEqual(windows.get(address), maxDataPoints * 2, `${title}: ${address}`);
      }
      const watches = await server.sql`
        select stream from pgpulse.watches where value = 'Bob''s host <1>' and until > now() order by 1`;
      deepStrictEqual(watches.map(({ stream }) => stream), ["cpu", "memory", "network"]);
    });
    await t.step("alerts: those that they are for", async () => {
      const fired: Record<string, string[]> = {};
      for (
        const [title, rule] of rules.filter(([, { dashboardUid }]) => dashboardUid === "hosts")
      ) {
        const rows = await reader.unsafe(query(rule));
        const [number, ...more] = rows.columns.filter(({ type }) => NUMBERS.includes(type));
        ok(number && !more.length, `${title}: one number and labels`);
        ok(rows.columns.every(({ type }) => [...TEXT, ...NUMBERS].includes(type)), title);
        const { type, params: [limit] } = rule.data.at(-1).model.conditions[0].evaluator;
        fired[title] = rows.filter((row) => {
          const value = Number(row[number.name]);
          return type === "gt" ? value > limit : value < limit;
        }).map(({ host, mount = "" }) => `${host} ${mount}`.trim());
      }
      deepStrictEqual(fired, {
        "Host silent": ["gone"],
        "CPU busy": ["Bob's host <1>"],
        "Memory nearly used up": ["Bob's host <1>"],
        "File system nearly full": ["full /data"],
        "Clock off": ["Bob's host <1>"],
        "Disk full within a day": ["filling /data"],
      });
    });
  });
}

Deno.test("the dashboards of hosts: names and ranges that people know, one leads to the other", () => {
  const of = new Map(dashboards.filter(isHosts).map(([, d]) => [d.uid, d]));
  deepStrictEqual([...of].map(([uid, { title }]) => [uid, title]), [["host", "Host"], [
    "hosts",
    "Hosts",
  ]]);
  for (const { timepicker } of of.values()) {
    const offered = timepicker.quick_ranges.map(({ from }: Any) => from);
    for (const from of ["5m", "1h", "24h", "30d", "1y"]) ok(offered.includes(`now-${from}`), from);
  }
  match(
    JSON.stringify(of.get("hosts")),
    /d\/host\?var-host=\$\{__data\.fields\.Host:percentencode\}/,
  );
});

// --- readings ------------------------------------------------------------------------------------

for (const major of [15, 18] as const) {
  Deno.test(`as grafana_readonly, PostgreSQL ${major}: the dashboard and alerts of readings`, async (t) => {
    await using server = await migrated({ major });
    const [reader, etl] = [["grafana_readonly", "grafana"], ["server", "server"]].map((
      [role, password],
    ) => postgres(server.urlFor(role, password), { max: 1, onnotice: () => {} }));
    await using _ = {
      [Symbol.asyncDispose]: async () => void await Promise.all([reader.end(), etl.end()]),
    };
    const back = (seconds: number, interval: number): Range => (
      { from: new Date(Date.now() - seconds * 1000), to: new Date(), interval }
    );
    const hour = back(3600, 5);
    const { choose, run } = reading(reader, hour);
    const [[, dashboard]] = dashboards.filter(isReadings);
    /** How many rows each panel gets. */
    const counts = async (range: Range, values: Record<string, string>) => {
      const rows = new Map<string, number>();
      await run(dashboard, range, values, ({ length }, _, title) => rows.set(title, length));
      return rows;
    };
    // The last 20 minutes each five seconds, before that by the hour.
    const now = Math.floor(Date.now() / 5000) * 5000;
    const times = [
      ...Array.from({ length: 240 }, (_, i) => now - i * 5000),
      ...Array.from({ length: 240 }, (_, i) => now - (i + 1) * 3_600_000),
    ].map((time) => new Date(time).toISOString());
    const take = (source: string, documents: Any[]) =>
      etl`select pgpulse.take_readings(
        ${source}, ${documents.map((_, i) => `${i}`)},
        ${documents.map((one) => JSON.stringify(one)).join("\n")}, keep => true
      ) as counts`;
    const documents = times.map((time, i) => (
      { time, device: `door ${i % 20}`, metric: "opened", value: i }
    ));
    const needMongo = ["Sync", "Backlog", "Lag", "Taken", "Throughput", "Backlog in MongoDB"];

    await t.step("empty tables: no error, and a channel that is there", async () => {
      const values = await choose(dashboard, {});
      // One that is not would load for ever; of this one the panel leaves nothing but its message.
      strictEqual(values.channel, "'stream/pgpulse/metrics'");
      const rows = await counts(hour, values);
      deepStrictEqual(needMongo.filter((title) => rows.get(title)), []);
    });
    await t.step(
      "without MongoDB: what was POSTed is there, the rest says what it needs",
      async () => {
        strictEqual((await take("api", documents))[0].counts.taken, times.length);
        const rows = await counts(hour, await choose(dashboard, {}));
        deepStrictEqual(needMongo.filter((title) => rows.get(title)), []);
        ok(rows.get("Readings a minute")! > 100);
        ok(rows.get("${metric:text} by device")! > 100);
        strictEqual(rows.get("Latest readings"), 100);
        for (const { title, fieldConfig } of panels(dashboard)) {
          if (needMongo.includes(title)) match(fieldConfig.defaults.noValue, /needs MONGO_URI/);
        }
      },
    );
    await take("Bob's.db", [...documents, { value: "n/a", device: "x" }, { time: "soon" }]);
    for (const source of ["Bob's.db", "slow.readings", "gone.readings"]) {
      const lag = source === "Bob's.db" ? 1 : 900;
      await etl`select pgpulse.note_flow(${source}, 'w', 10, 7, 1, 1, 1, 20, ${lag})`;
      await server.sql`
        insert into reading_flow
        select time::timestamptz, ${source}, 5, 1, 10, 7, 1, 1, 1 from unnest(${times}::text[]) as time
        on conflict do nothing`;
    }
    await server.sql`
      update reading_sources set last_seen = now() - interval '20 minutes' where source = 'gone.readings'`;
    await etl`
      insert into sync_runs (worker, trigger, started, ended, error)
      values ('w', 'continuous', now() - interval '2 minutes', null, null),
        ('w', 'once', now() - interval '2 minutes', now() - interval '1 minute', 'Cannot'),
        ('w', 'replay', now() - interval '20 days', now() - interval '19 days', null)`;

    for (const source of ["", "Bob's.db"]) {
      await t.step(`draws something over any range${source && ": one source"}`, async () => {
        const values = await choose(dashboard, { source, metric: "opened" });
        const ranges = [
          back(300, 1),
          hour,
          back(86_400, 120),
          back(604_800, 600),
          back(2_592_000, 1800),
          back(31_536_000, 43_200),
        ];
        for (const range of ranges) {
          await run(dashboard, range, values, (rows, { format }, title) => {
            ok(rows.length > 0, `${title} from ${range.from.toISOString()}: no rows`);
            ok(rows.length < 8000, `${title}: ${rows.length} rows`);
            for (const name of Object.keys(rows[0])) {
              if (/^(Unit|timeend)$/.test(name)) continue;
              ok(rows.some((row) => row[name] !== null), `${title}: no ${name}`);
            }
            if (format === "time_series") drawable(rows, title);
          });
        }
        const before = { from: new Date("1990-01-01"), to: new Date("1990-01-02"), interval: 60 };
        await run(dashboard, before, values);
      });
    }
    await t.step("a minute's worth is told of each minute, at any width of a point", async () => {
      const values = await choose(dashboard, { source: "Bob's.db", metric: "opened" });
      for (const range of [back(900, 5), back(900, 60)]) {
        await run(dashboard, range, values, (rows, _, title) => {
          if (title === "Readings a minute") strictEqual(rows.at(-2)!.readings, 12);
          if (title === "Throughput") strictEqual(rows.at(-2)!.new, 7 / 5);
        });
      }
    });
    await t.step("its channels are there, windows fit, and it says who looks", async () => {
      const values = await choose(dashboard, { source: "Bob's.db" });
      const live = panels(dashboard).find(({ datasource }) => datasource?.uid === LIVE);
      strictEqual(live.repeat, "channel");
      const [found] = await reader`
        select rows from pgpulse.channels where address = ${values.channel.replaceAll("'", "")}`;
      strictEqual(found.rows, live.maxDataPoints * 2);
      await counts(hour, values);
      const watches = await server.sql`
        select stream from pgpulse.watches where value = 'Bob''s.db' and until > now()`;
      deepStrictEqual(watches.map(({ stream }) => stream), ["readings"]);
    });
    await t.step(
      "alerts: those that they are for, a stopped one as long as it is listed",
      async () => {
        const fired = async () => {
          const found: Record<string, string[]> = {};
          const of = rules.filter(([, { dashboardUid }]) => dashboardUid === "readings");
          for (const [title, rule] of of) {
            const rows = await reader.unsafe(query(rule));
            deepStrictEqual(
              rows.columns.map(({ type }) => type),
              [25, 701],
              `${title}: text, number`,
            );
            const { type, params: [limit] } = rule.data.at(-1).model.conditions[0].evaluator;
            strictEqual(type, "gt");
            const name = rows.columns[1].name;
            found[title] = rows.filter((row) => row[name] > limit).map(({ source }) => source);
          }
          return found;
        };
        const all = {
          "Sync of readings stopped": ["gone.readings"],
          "Readings come late": ["slow.readings"],
          "Readings could not be taken": ["Bob's.db"],
        };
        deepStrictEqual(await fired(), all);
        await server.sql`truncate reading_flow`;
        deepStrictEqual(await fired(), all);
        await server.sql`delete from reading_sources where source = 'gone.readings'`;
        deepStrictEqual(await fired(), { ...all, "Sync of readings stopped": [] });
      },
    );
  });
}

// --- dashboards ----------------------------------------------------------------------------------

for (const [path, dashboard] of dashboards) {
  Deno.test(`${path}: named after its uid, no noise, every panel explained`, () => {
    strictEqual(basename(path), `${dashboard.uid}.json`);
    deepStrictEqual(NOISE.filter((key) => key in dashboard), []);
    ok(!/"(pluginVersion|libraryPanel)"/.test(read(path)), "noise of the user interface");
    match(read(path), /^\{\n {2}"uid"[^]*\}\n$/, "2 spaces, uid first, a newline at the end");
    ok(dashboard.title && dashboard.description);
    ok(dashboard.tags.includes("pgpulse"), "the dashboards' links go by this tag");
    strictEqual(dashboard.schemaVersion, 42);
    strictEqual(dashboard.timezone, "browser");
    notStrictEqual(dashboard.graphTooltip, 0, "one crosshair for all panels");
    deepStrictEqual(
      dashboard.timepicker.refresh_intervals,
      [...path.includes("/pgpulse/") ? ["1s"] : [], "5s", "10s", "30s", "1m", "5m"],
    );
    ok(dashboard.timepicker.refresh_intervals.includes(dashboard.refresh), dashboard.refresh);

    const known = [LIVE, ...sources.map(({ uid }) => uid)];
    const all = panels(dashboard);
    strictEqual(new Set(all.map(({ id }) => id)).size, all.length, "ids are not unique");
    const taken = new Set<string>();
    for (const { title, description, type, gridPos: at, ...panel } of all) {
      ok(title, "a panel has no title");
      if (type === "row") continue;
      ok(description?.endsWith("."), `${title}: no description`);
      ok(at.x + at.w <= 24, `${title}: wider than the dashboard`);
      for (let x = at.x; x < at.x + at.w; x++) {
        for (let y = at.y; y < at.y + at.h; y++) {
          ok(!taken.has(`${x} ${y}`), `${title}: lies on another panel`);
          taken.add(`${x} ${y}`);
        }
      }
      if (type === "text") continue;
      if (panel.repeat) {
        // There it is one value, which Grafana does not quote by itself.
        ok(!new RegExp(`\\$${panel.repeat}\\b`).test(JSON.stringify(panel.targets)), title);
      }
      ok(panel.targets.length > 0, `${title}: asks for nothing`);
      for (const target of panel.targets) {
        ok(known.includes(target.datasource.uid), `${title}: unknown source`);
        // Together with another source it would be "-- Mixed --", which waits for a stream to end.
        deepStrictEqual(target.datasource, panel.datasource, title);
        if (target.datasource.uid !== LIVE) {
          ok(target.rawQuery && (target.rawSql || target.query), title);
          continue;
        }
        strictEqual(panel.targets.length, 1, `${title}: one channel a panel`);
        strictEqual(target.queryType, "measurements", title);
        strictEqual(target.buffer, YEAR, `${title}: a shorter buffer tears the window`);
        match(target.channel, /^(stream\/[\w-]{1,80}\/[\w./=-]{1,80}|\$\{\w+\})$/, title);
      }
    }
  });
}

Deno.test("the dashboards of S0 and S1 are there, under the names people know", () => {
  const metrics = dashboards.find(([, { title }]) => title === "Metrics Dashboard")?.[1];
  deepStrictEqual([metrics?.uid, metrics?.refresh, metrics?.time], ["metrics", "5s", {
    from: "now-1h",
    to: "now",
  }]);
  const gauge = panels(metrics).find(({ title }) => title === "Live Metric (Grafana Live)");
  deepStrictEqual([gauge?.type, gauge?.targets[0].channel], [
    "gauge",
    "stream/my_stream_id/live_metrics",
  ]);
  const shown = panels(metrics).filter((p) => p.targets[0].channel === "stream/pgpulse/metrics");
  deepStrictEqual(shown.map(({ timeFrom }) => timeFrom).sort(), ["10m", "6h", undefined]);
  match(JSON.stringify(metrics), /\$__timeGroupAlias\(/);
  strictEqual(dashboards.find(([, { uid }]) => uid === "streams")?.[1].title, "Streams");
});

// --- provisioning and grafana.ini ----------------------------------------------------------------

/** Names of variables in .env.example; true where the line is not a comment. */
const documented = new Map(
  [...read(".env.example").matchAll(/^(# )?([A-Z][A-Z0-9_]*)=(.*)$/gm)]
    .map(([, comment, name]) => [name, !comment]),
);

Deno.test("provisioning: every variable it names is explained in .env.example", () => {
  const names = provisioning.flatMap((path) =>
    [...YAML.stringify(yaml(path)).matchAll(/\$\{?(\w+)/g)].map(([, name]) => name)
  );
  ok(names.includes("PGPULSE_DB_URL") && names.includes("PGPULSE_DASHBOARDS"));
  deepStrictEqual(names.filter((name) => !documented.has(name)), []);
});

Deno.test("provisioning: the data source people know, read-only, its password left as it is", () => {
  const [source] = sources.filter(({ name }) => name === "PostgreSQL");
  strictEqual(source.uid, "pgpulse-postgresql");
  strictEqual(source.type, "grafana-postgresql-datasource");
  deepStrictEqual([source.isDefault, source.editable], [true, false]);
  // ${...} would be expanded twice, and in jsonData a password of digits would become a number.
  deepStrictEqual(source.secureJsonData, { password: "$GRAFANA_DB_PASSWORD" });
  strictEqual(sources.filter(({ isDefault }) => isDefault).length, 1);
  strictEqual(new Set(sources.map(({ uid }) => uid)).size, sources.length);
});

Deno.test("provisioning: the files are the truth of the dashboards", () => {
  const [provider] = yaml("grafana/provisioning/dashboards/pgpulse.yaml").providers;
  strictEqual(provider.allowUiUpdates, false);
  strictEqual(provider.options.path, "$PGPULSE_DASHBOARDS");
  // A folder of the provider's own beside that is refused.
  deepStrictEqual([provider.options.foldersFromFilesStructure, provider.folder], [true, undefined]);
  const uids = dashboards.map(([, { uid }]) => uid);
  strictEqual(new Set(uids).size, uids.length, "Grafana takes none of two with one uid");
});

for (const [title, rule] of rules) {
  Deno.test(`alert "${title}": complete, and nothing in it that Grafana would expand`, () => {
    for (const { datasourceUid } of rule.data) {
      ok(["__expr__", ...sources.map(({ uid }) => uid)].includes(datasourceUid), datasourceUid);
    }
    ok(rule.data.some(({ refId }: Any) => refId === rule.condition));
    ok(rule.annotations.summary && rule.annotations.description && rule.annotations.runbook);
    const [, dashboard] = dashboards.find(([, { uid }]) => uid === rule.dashboardUid)!;
    ok(panels(dashboard).some(({ id }) => id === rule.panelId), "its panel is gone");
    ok(!YAML.stringify(rule).includes("$"), "a $ means different things to different versions");
    ok(!/\bmetric\b/.test(query(rule).replace(/'.*?'/g, "")), "Grafana takes it for a name");
    const { __dashboardUid__: uid, __panelId__: id } = rule.annotations;
    deepStrictEqual([uid, id], [rule.dashboardUid, `${rule.panelId}`], "messages link by these");
    if (rule.dashboardUid === "machine") match(rule.annotations.link, /Labels\.machine_id/);
    // A panel that shows one host would wear the broken hearts of the others.
    notStrictEqual(rule.dashboardUid, "host");
    if (rule.dashboardUid === "hosts") match(rule.annotations.link, /Labels\.host/);
    if (rule.dashboardUid === "readings") match(rule.annotations.link, /Labels\.source/);
  });
}

Deno.test("alerting: no contact point, as one with a fault in it keeps Grafana from starting", () => {
  for (const path of list("grafana/provisioning/alerting", ".yaml")) {
    deepStrictEqual(Object.keys(yaml(path)).sort(), ["apiVersion", "groups"], path);
  }
});

/** Keys of an .ini file, each with its section before it. */
function keys(ini: string): string[] {
  let section = "";
  return ini.split("\n").flatMap((line) => {
    section = line.match(/^\[(.+)\]/)?.[1] ?? section;
    const [, key] = line.match(/^(\w+)\s*=/) ?? [];
    return key ? [`[${section}] ${key}`] : [];
  });
}

const home = Deno.env.get("GRAFANA_HOME");

Deno.test({
  name: `grafana.ini: every key is one that Grafana knows${
    home ? "" : ": GRAFANA_HOME is not set"
  }`,
  ignore: !home,
  fn() {
    const known = new Set(keys(Deno.readTextFileSync(join(home!, "conf/defaults.ini"))));
    ok(known.size > 500);
    deepStrictEqual(keys(read("grafana/grafana.ini")).filter((key) => !known.has(key)), []);
  },
});

Deno.test("grafana.ini: what the live panels need, and no secret", () => {
  const ini = read("grafana/grafana.ini");
  match(ini, /\[live\]\n(#.*\n)*max_connections = 100\n/);
  match(ini, /\[dashboards\]\n(#.*\n)*min_refresh_interval = 1s\n/);
  deepStrictEqual(keys(ini).filter((key) => /password|secret_key|admin/.test(key)), []);
  strictEqual(new Set(keys(ini)).size, keys(ini).length);
});

// --- compose.yaml and .env.example ---------------------------------------------------------------

const compose = yaml("compose.yaml");
const services: [string, Any][] = Object.entries(compose.services);

/** Words of a command line, as a shell and Docker Compose both split it. */
const words = (line: string) => line.match(/"[^"]*"|\S+/g)!.map((word) => word.replaceAll('"', ""));

Deno.test("compose: the scripts run with the permissions that deno.json gives them", () => {
  const { tasks } = JSON.parse(read("deno.json"));
  const ran = services.filter(([, { image }]) => image.startsWith("denoland/deno:"));
  for (
    const name of [
      "migrate",
      "generate",
      "generate-live",
      "relay",
      "upkeep",
      "collect",
      "contact-points",
      "etl",
      "readings",
    ]
  ) {
    ok(ran.some(([other]) => other === name), name);
  }
  for (const [name, service] of ran) {
    // Only here, beside deno task dev, is there a file with the address of a database.
    const [script] = service.command.match(/scripts\/\S+/);
    const { command } = Object.values<Any>(tasks).find((task) => task.command.includes(script))!;
    const [, ...task] = words(command)
      .filter((word) => word !== "-q" && !word.startsWith("--env-file="));
    // Same words, same paths: the folder of the repository is /pgpulse there.
    deepStrictEqual(words(service.command).slice(0, task.length), task, name);
    strictEqual(service.working_dir, "/pgpulse", name);
    ok(service.volumes.includes("./scripts:/pgpulse/scripts:ro"), name);
    strictEqual(service.volumes.includes("./sql:/pgpulse/sql:ro"), name === "migrate", name);
    ok(service.read_only, name);
  }
});

Deno.test("compose: no secret in it, every variable in .env.example, no value there", () => {
  const text = read("compose.yaml");
  const used = [...text.matchAll(/\$\{(\w+)/g)].map(([, name]) => name);
  deepStrictEqual(used.filter((name) => !documented.has(name)), []);
  const required = [...text.matchAll(/\$\{(\w+):\?set \1 in \.env, see \.env\.example\}/g)]
    .map(([, name]) => name);
  deepStrictEqual(
    [...new Set(required)].sort(),
    [...documented].filter(([, active]) => active).map(([name]) => name).sort(),
    "what compose asks for is what .env.example leaves to fill in",
  );
  for (const [name, { environment = {} }] of services) {
    for (const [key, value] of Object.entries(environment)) {
      if (!/PASSWORD|SECRET|TOKEN|_KEY/.test(key)) continue;
      match(`${value}`, /^\$\{\w+:(\?.+|-(\$\{\w+:-\})?)\}$/, `${name}: ${key}`);
    }
  }
  for (const [, name, value] of read(".env.example").matchAll(/^([A-Z]\w*)=(.*)$/gm)) {
    strictEqual(value, "", `${name} has a value that people would keep`);
  }
});

Deno.test("compose: images of a version, no build, ports of this machine alone", () => {
  for (const [name, service] of services) {
    match(service.image, /:v?\d+(\.\d+)*(-p\d+)?$/, name);
    ok(!("build" in service), name);
    ok(service.security_opt.includes("no-new-privileges:true"), name);
    for (const port of service.ports ?? []) match(port, /^\$\{BIND_ADDRESS:-127\.0\.0\.1\}:\$\{/);
  }
  deepStrictEqual(services.filter(([, s]) => s.ports).map(([name]) => name), [
    "postgres",
    "relay",
    "etl",
    "grafana",
  ]);
});

Deno.test("compose: starts in order, and what is mounted is there", () => {
  for (const [name, service] of services) {
    for (const [on, { condition }] of Object.entries<Any>(service.depends_on ?? {})) {
      if (condition === "service_healthy") ok(compose.services[on].healthcheck, on);
      else match(condition, /^service_(started|completed_successfully)$/, `${name}: ${on}`);
    }
    for (const volume of service.volumes ?? []) {
      const [from] = volume.split(":");
      if (from.startsWith("./")) {
        ok(Deno.statSync(join(ROOT, from)), from);
        match(volume, /:ro$/);
      } else ok(from in compose.volumes, volume);
    }
  }
  deepStrictEqual(Object.keys(compose.services.migrate.depends_on), ["postgres"]);
  for (
    const name of ["generate", "generate-live", "relay", "upkeep", "collect", "etl", "grafana"]
  ) {
    ok("migrate" in compose.services[name].depends_on, name);
  }
  ok(compose.services.postgres.volumes.includes("postgres-data:/var/lib/postgresql"));
});

Deno.test("compose: all of provisioning is mounted; that of InfluxDB under a name without INFLUX_URL that Grafana reads past", () => {
  const volumes: string[] = compose.services.grafana.volumes;
  for (const path of provisioning) {
    ok(volumes.some((volume) => path.startsWith(volume.slice(2).split(":")[0])), path);
    const inside = path.replace(/^grafana\/(provisioning|influxdb)/, "/etc/grafana/provisioning");
    if (!path.includes("influxdb")) continue;
    const conditional = inside.replace(/\.yaml$/, "${INFLUX_URL:+.yaml}");
    ok(volumes.includes(`./${path}:${conditional}:ro`), path);
  }
});

Deno.test("compose: Grafana gets every variable that provisioning names", () => {
  const { environment } = compose.services.grafana;
  for (const path of provisioning) {
    for (const [, name] of YAML.stringify(yaml(path)).matchAll(/\$\{?(\w+)/g)) {
      ok(environment[name], `${path}: ${name}`);
    }
  }
});

Deno.test(".env.example: explains every variable that the scripts read", () => {
  // Those of the system and of libpq are no settings of ours.
  const system = /^(HOME|PATH|NO_PROXY|XDG_\w+|STATE_DIRECTORY|LOCALAPPDATA|CI|NO_COLOR|TERM)$/;
  const names = list("scripts", ".ts").filter((path) => !/_test\.ts$|testing\.ts$/.test(path))
    .flatMap((path) =>
      [...read(path).matchAll(/\b(?:env(?:\.get)?|given)\((?:\s*"[A-Z_]+",?)+/g)]
        .flatMap(([call]) => [...call.matchAll(/"([A-Z_]+)"/g)].map(([, name]) => name))
    );
  // What they may read at all, where it is named in full.
  const { tasks } = JSON.parse(read("deno.json"));
  for (const { command } of Object.values<Any>(tasks)) {
    const [, allowed = ""] = command.match(/--allow-env=([\w,*]+)/) ?? [];
    names.push(...allowed.split(",").filter((name: string) => /^[A-Z_]+$/.test(name)));
  }
  ok(names.includes("LISTEN_DATABASE_URL"));
  ok(names.includes("DATABASE_URL"));
  deepStrictEqual([...new Set(names)].filter((n) => !documented.has(n) && !system.test(n)), []);
});

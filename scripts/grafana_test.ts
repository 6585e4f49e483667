// What Grafana and Docker Compose read: dashboards, provisioning, grafana.ini, compose.yaml. Their
// SQL runs here as grafana_readonly, with Grafana's macros expanded as Grafana does it.

import { deepStrictEqual, match, notStrictEqual, ok, strictEqual, throws } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import YAML from "npm:yaml@2.9.1";
import { ROOT, script, testServer } from "./testing.ts";

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

const dashboards: [string, Any][] = list("grafana/dashboards", ".json")
  .map((path) => [path, JSON.parse(read(path))]);
const sources: Any[] = list("grafana/provisioning/datasources", ".yaml")
  .flatMap((path) => yaml(path).datasources);
const rules: [string, Any][] = list("grafana/provisioning/alerting", ".yaml")
  .flatMap((path) => (yaml(path).groups ?? []).flatMap((group: Any) => group.rules))
  .map((rule) => [rule.title, rule]);
const provisioning = ["alerting", "dashboards", "datasources"]
  .flatMap((folder) => list(`grafana/provisioning/${folder}`, ".yaml"));

/** Panels, those in closed rows too. */
function panels(dashboard: Any): Any[] {
  return dashboard.panels.flatMap((panel: Any) => [panel, ...panel.panels ?? []]);
}

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
    await using server = await testServer({ major });
    const migrated = await script("migrate.ts", [], {
      DATABASE_URL: server.url,
      DB_PASSWORD: "one",
      GRAFANA_DB_PASSWORD: "two",
    });
    strictEqual(migrated.code, 0, migrated.stderr);
    const reader = postgres(server.urlFor("grafana_readonly", "two"), { max: 1 });
    try {
      const addresses = await reader`select address, rows from pgpulse.channels`;
      const windows = new Map(addresses.map(({ address, rows }) => [address, rows]));
      ok(windows.size > 0);

      await t.step("the alert has one row on an empty table", async () => {
        for (const [title, rule] of rules) {
          for (const { datasourceUid, model } of rule.data) {
            if (datasourceUid === "__expr__") continue;
            const rows = await reader.unsafe(model.rawSql);
            strictEqual(rows.length, 1, title);
            ok(Object.values(rows[0]).every((v) => Number.isFinite(v)), JSON.stringify(rows));
          }
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

      for (const [path, dashboard] of dashboards) {
        const choices: Record<string, string[]> = {};
        for (const variable of dashboard.templating?.list ?? []) {
          await t.step(`${path}: variable ${variable.name}`, async () => {
            ok(bySql(variable) && variable.type === "query");
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

      for (const [title, rule] of rules) {
        await t.step(`alert: ${title}`, async () => {
          for (const { datasourceUid, model } of rule.data) {
            if (datasourceUid === "__expr__") continue;
            const rows = await reader.unsafe(expand(model.rawSql, ranges[0]));
            ok(rows.length > 0);
            const [name] = Object.keys(rows[0]);
            notStrictEqual(name, "metric", "Grafana takes it for the series' name");
            ok(rows.every((row) => Number.isFinite(row[name])), JSON.stringify(rows));
          }
        });
      }

      await t.step("the example of a stream of one's own works", async () => {
        const text = dashboards.flatMap(([, d]) => panels(d)).find((p) => p.type === "text");
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

// --- dashboards ----------------------------------------------------------------------------------

for (const [path, dashboard] of dashboards) {
  Deno.test(`${path}: named after its uid, no noise, every panel explained`, () => {
    strictEqual(path, `grafana/dashboards/${dashboard.uid}.json`);
    deepStrictEqual(NOISE.filter((key) => key in dashboard), []);
    ok(!/"(pluginVersion|libraryPanel)"/.test(read(path)), "noise of the user interface");
    match(read(path), /^\{\n {2}"uid"[^]*\}\n$/, "2 spaces, uid first, a newline at the end");
    ok(dashboard.title && dashboard.description);
    ok(dashboard.tags.includes("pgpulse"), "the dashboards' links go by this tag");
    strictEqual(dashboard.schemaVersion, 42);
    strictEqual(dashboard.timezone, "browser");
    notStrictEqual(dashboard.graphTooltip, 0, "one crosshair for all panels");
    deepStrictEqual(dashboard.timepicker.refresh_intervals, ["1s", "5s", "10s", "30s", "1m", "5m"]);
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
      ok(panel.targets.length > 0, `${title}: asks for nothing`);
      for (const target of panel.targets) {
        ok(known.includes(target.datasource.uid), `${title}: unknown source`);
        // Together with another source it would be "-- Mixed --", which waits for a stream to end.
        deepStrictEqual(target.datasource, panel.datasource, title);
        if (target.datasource.uid !== LIVE) {
          ok(target.rawQuery && target.rawSql, title);
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
  deepStrictEqual(ran.map(([name]) => name), ["migrate", "generate", "generate-live", "relay"]);
  for (const [name, service] of ran) {
    // Only here, beside deno task dev, is there a file with the address of a database.
    const [, ...task] = words(tasks[name.replace("-live", "")].command)
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
  for (const [name, { environment }] of services) {
    for (const [key, value] of Object.entries(environment)) {
      if (!/PASSWORD|SECRET|TOKEN|_KEY/.test(key)) continue;
      match(`${value}`, /^\$\{\w+:(\?.+|-)\}$/, `${name}: ${key}`);
    }
  }
  for (const [, name, value] of read(".env.example").matchAll(/^([A-Z]\w*)=(.*)$/gm)) {
    strictEqual(value, "", `${name} has a value that people would keep`);
  }
});

Deno.test("compose: images of a version, no build, ports of this machine alone", () => {
  for (const [name, service] of services) {
    match(service.image, /:\d+(\.\d+)*$/, name);
    ok(!("build" in service), name);
    ok(service.security_opt.includes("no-new-privileges:true"), name);
    for (const port of service.ports ?? []) match(port, /^\$\{BIND_ADDRESS:-127\.0\.0\.1\}:\$\{/);
  }
  deepStrictEqual(services.filter(([, s]) => s.ports).map(([name]) => name), [
    "postgres",
    "relay",
    "grafana",
  ]);
});

Deno.test("compose: starts in order, and what is mounted is there", () => {
  for (const [name, service] of services) {
    for (const [on, { condition }] of Object.entries<Any>(service.depends_on ?? {})) {
      if (condition === "service_healthy") ok(compose.services[on].healthcheck, on);
      else strictEqual(condition, "service_completed_successfully", `${name}: ${on}`);
    }
    for (const volume of service.volumes) {
      const [from, , mode] = volume.split(":");
      if (from.startsWith("./")) {
        ok(Deno.statSync(join(ROOT, from)), from);
        strictEqual(mode, "ro", volume);
      } else ok(from in compose.volumes, volume);
    }
  }
  deepStrictEqual(Object.keys(compose.services.migrate.depends_on), ["postgres"]);
  for (const name of ["generate", "generate-live", "relay", "grafana"]) {
    ok("migrate" in compose.services[name].depends_on, name);
  }
  ok(compose.services.postgres.volumes.includes("postgres-data:/var/lib/postgresql"));
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
  const system = /^(HOME|PATH|NO_PROXY|XDG_\w+|CI|NO_COLOR|TERM)$/;
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

// Where alerts go, against a stand-in for Grafana; and, where there is a real one, an alert of the
// factory from the row that is too hot to the message, and back.

import { deepStrictEqual, match, ok, strictEqual } from "node:assert";
import { join } from "node:path";
import YAML from "npm:yaml@2.9.1";
import { apply, route } from "./contact-points.ts";
import { freePort } from "./dev.ts";
import { migrated, ROOT, script, until } from "./testing.ts";

// deno-lint-ignore no-explicit-any -- Grafana's own formats
type Json = any;

const CRITICAL = [["severity", "=", "critical"]];
const UNTOUCHED = { receiver: "empty", group_by: ["grafana_folder", "alertname"] };

Deno.test("policy: all to one, critical ones to the pager too; people's own is left alone", () => {
  const both = route(UNTOUCHED, ["pgpulse", "pgpulse pager"])!;
  strictEqual(both.receiver, "pgpulse");
  deepStrictEqual(both.routes, [
    { receiver: "pgpulse pager", object_matchers: CRITICAL, continue: true },
    { receiver: "pgpulse" },
  ]);
  ok((both.group_by as string[]).includes("area"));
  deepStrictEqual(route(both, ["pgpulse", "pgpulse pager"]), both, "again it is the same");
  const pager = route(both, ["pgpulse pager"])!;
  deepStrictEqual([pager.receiver, pager.routes], ["pgpulse pager", []]);
  const added = { receiver: "pgpulse", object_matchers: [["area", "=", "Molding"]] };
  const more = route({ ...both, group_wait: "1m", routes: [added, ...both.routes!] }, ["pgpulse"])!;
  deepStrictEqual([more.routes, more.group_wait], [[added], "1m"]);
  strictEqual(route({ receiver: "ours" }, ["pgpulse"]), undefined);
  strictEqual(route({ ...UNTOUCHED, routes: [{ receiver: "x" }] }, ["pgpulse"]), undefined);
});

/** What the provisioning API of Grafana keeps. */
function standIn() {
  const kept = { points: new Map<string, Json>(), policy: UNTOUCHED as Json, refused: "" };
  const server = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (request) => {
    const [, what, uid] = new URL(request.url).pathname.split("/provisioning")[1].split("/");
    const { method } = request;
    const body = method === "PUT" || method === "POST" ? await request.json() : undefined;
    if (request.headers.get("authorization") !== "Basic YWRtaW46c2VjcmV0") {
      return Response.json({ message: "Unauthorized" }, { status: 401 });
    }
    if (what === "policies") {
      if (method === "PUT") kept.policy = body;
      if (method === "DELETE") kept.policy = UNTOUCHED;
      return Response.json(kept.policy, { status: method === "GET" ? 200 : 202 });
    }
    if (method === "GET") return Response.json([...kept.points.values()]);
    if (method === "DELETE") kept.points.delete(uid);
    else if (kept.refused && body.type === kept.refused) {
      const message = `invalid: ${JSON.stringify(body.settings)}`;
      return Response.json({ message }, { status: 400 });
    } else kept.points.set(body.uid, body);
    return Response.json({}, { status: 202 });
  });
  const url = `http://127.0.0.1:${server.addr.port}`;
  return { kept, url, [Symbol.asyncDispose]: () => server.shutdown() };
}

Deno.test("what is set is there, what is not is taken away, what is refused is said", async () => {
  await using grafana = standIn();
  const { kept, url } = grafana;
  const run = (values: Record<string, string>) =>
    apply(url, "Basic YWRtaW46c2VjcmV0", new Map(Object.entries(values)));
  deepStrictEqual(await run({}), { done: [], failed: [], found: "empty" });
  strictEqual(kept.policy, UNTOUCHED);
  await run({ ALERT_EMAIL: "a@x.org, b@x.org", ALERT_PAGERDUTY_KEY: "k" });
  deepStrictEqual([...kept.points.values()].map(({ name, type }) => [name, type]), [
    ["pgpulse", "email"],
    ["pgpulse pager", "pagerduty"],
  ]);
  match(kept.points.get("pgpulse-email").settings.addresses, /^a@x\.org; ?b@x\.org$/);
  strictEqual((kept.policy as Json).routes.length, 2);
  kept.refused = "slack";
  const { done, failed } = await run({
    ALERT_SLACK_URL: "https://hooks.example/secret",
    ALERT_WEBHOOK_URL: "hooks.example/secret",
    ALERT_PAGERDUTY_KEY: "k",
  });
  deepStrictEqual(done, ["pagerduty", "no email"]);
  match(failed.join("\n"), /Cannot set up slack: .*\*\*\*.*; correct ALERT_SLACK_URL\n.*webhook/);
  ok(!failed.join().includes("secret"));
  strictEqual(kept.policy.receiver, "pgpulse pager");
  await run({});
  deepStrictEqual([kept.points.size, kept.policy], [0, UNTOUCHED]);
  kept.policy = { receiver: "mine" };
  const { failed: [said] } = await run({ ALERT_EMAIL: "a@x.org" });
  match(said, /Leaves the notification policies as they are.*choose "pgpulse"/);
  deepStrictEqual(kept.policy, { receiver: "mine" });
});

Deno.test("the command says what it cannot do, and tries a password once", async () => {
  await using grafana = standIn();
  const run = (env: Record<string, string>) => script("contact-points.ts", [], env);
  const address = { GRAFANA_URL: grafana.url, ALERT_EMAIL: "a@x.org" };
  const good = await run({ ...address, GF_SECURITY_ADMIN_PASSWORD: "secret" });
  deepStrictEqual([good.code, good.stdout], [0, `Alerts of "${grafana.url}": email\n`]);
  grafana.kept.points.clear();
  const none = await run({ GRAFANA_URL: grafana.url, GF_SECURITY_ADMIN_PASSWORD: "secret" });
  match(
    none.stdout,
    /: nothing to do, they go to its contact point "\w+"; set one of ALERT_EMAIL, /,
  );
  for (
    const [env, text] of [
      [{ ...address, GF_SECURITY_ADMIN_PASSWORD: "wrong" }, /refuses the sign-in/],
      [address, /set GRAFANA_TOKEN or GF_SECURITY_ADMIN_PASSWORD/],
      // What is for the Grafana of dev is shown to no other one.
      [
        { ...address, GRAFANA_DEV_URL: grafana.url.replace("//", "//admin:secret@") },
        /set GRAFANA_TOKEN or GF_SECURITY_ADMIN_PASSWORD/,
      ],
      [{ GRAFANA_URL: "http://me:x/secret@host" }, /Cannot read GRAFANA_URL: "http:..\*\*\*@host"/],
      [
        { GRAFANA_URL: "http://me:secret@127.0.0.1:9", GRAFANA_TOKEN: "t" },
        /Cannot set up .* "http:..127.0.0.1:9"/,
      ],
      [
        { GRAFANA_URL: "http://127.0.0.1:9", GRAFANA_TOKEN: "t" },
        /Cannot set up the contact points/,
      ],
    ] as const
  ) {
    const { code, stderr } = await run(env);
    strictEqual(code, 1);
    match(stderr, text);
    ok(!/ {4}at |secret/.test(stderr), stderr);
  }
  const own = await run({
    ALERT_EMAIL: "a@x.org",
    GRAFANA_DEV_URL: grafana.url.replace("//", "//admin:secret@"),
  });
  deepStrictEqual([own.code, own.stdout], [0, `Alerts of "${grafana.url}": email\n`]);
  const unknown = await script("contact-points.ts", ["--nonsense"]);
  match(
    unknown.stderr,
    /^Cannot read the command line: Unknown option "--nonsense"; see deno task/,
  );
  match(
    (await script("contact-points.ts", ["--help"])).stdout,
    /^Usage: deno task contact-points/m,
  );
});

const home = Deno.env.get("GRAFANA_HOME");

Deno.test({
  name: `a real Grafana: a hot and a silent machine are told to a webhook, and when it is over${
    home ? "" : " (skipped: GRAFANA_HOME is not set)"
  }`,
  ignore: !home,
  async fn(t) {
    await using server = await migrated();
    const { sql } = server;
    await sql.unsafe(`
      insert into machines (id, name, area, status) values
          ('M01', 'Foreman''s press', 'Molding', 'running'), ('M02', 'Press 2', 'Molding', 'running'),
          ('M03', 'Press 3', 'Molding', 'maintenance');
      insert into machine_metrics (machine_id, metric_type, value, "timestamp")
      select id, 'temperature', case id when 'M02' then 60 else 99 end, now() - n * interval '20 s'
      from (values ('M01'), ('M02'), ('M03')) m (id), generate_series(0, 20) n
      where id <> 'M02' or n > 18`).simple();

    // The rules as they are, looked at more often and told at once.
    const data = await Deno.makeTempDir();
    const provisioning = join(data, "provisioning");
    for (const folder of ["datasources", "dashboards", "alerting"]) {
      await Deno.mkdir(join(provisioning, folder), { recursive: true });
      for await (const { name } of Deno.readDir(join(ROOT, "grafana/provisioning", folder))) {
        await Deno.copyFile(
          join(ROOT, "grafana/provisioning", folder, name),
          join(provisioning, folder, name),
        );
      }
    }
    const file = join(provisioning, "alerting/factory.yaml");
    const rules = YAML.parse(await Deno.readTextFile(file));
    for (const group of rules.groups) {
      group.interval = "10s";
      for (const rule of group.rules) rule.for = "0s";
    }
    await Deno.writeTextFile(file, YAML.stringify(rules));

    const port = freePort(0);
    const url = `http://127.0.0.1:${port}`;
    const child = new Deno.Command(join(home!, "bin/grafana"), {
      args: ["server", `--homepath=${home}`, `--config=${join(ROOT, "grafana/grafana.ini")}`],
      env: {
        GF_PATHS_DATA: data,
        GF_PATHS_LOGS: data,
        GF_PATHS_PROVISIONING: provisioning,
        GF_SERVER_HTTP_ADDR: "127.0.0.1",
        GF_SERVER_HTTP_PORT: `${port}`,
        GF_SECURITY_ADMIN_PASSWORD: "secret",
        GF_UNIFIED_ALERTING_ALERTMANAGER_CONFIG_POLL_INTERVAL: "5s",
        PGPULSE_DASHBOARDS: join(ROOT, "grafana/dashboards"),
        PGPULSE_DB_URL: `127.0.0.1:${server.port}`,
        PGPULSE_DB_NAME: "testdb",
        PGPULSE_DB_SSLMODE: "disable",
        GRAFANA_DB_USER: "grafana_readonly",
        GRAFANA_DB_PASSWORD: "grafana",
      },
      stdout: "null",
      stderr: "null",
    }).spawn();
    const told = new Map<string, string[]>();
    let hot: Json;
    await using hook = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (r) => {
      for (const alert of (await r.json()).alerts) {
        const { status, labels } = alert;
        if (labels.machine_id === "M01") hot = alert;
        const name = `${labels.alertname} ${labels.machine ?? ""}`;
        told.set(name, [...told.get(name) ?? [], status]);
      }
      return new Response();
    });
    const api = async (path: string, body?: unknown): Promise<Json> => {
      const answer = await fetch(`${url}/api${path}`, {
        method: body ? "PUT" : "GET",
        headers: {
          authorization: "Basic YWRtaW46c2VjcmV0",
          "content-type": "application/json",
          "x-disable-provenance": "true",
        },
        body: body ? JSON.stringify(body) : undefined,
      });
      const text = await answer.text();
      ok(answer.ok, `${path}: ${answer.status} ${text}`);
      return JSON.parse(text);
    };
    const newest = (name: string, status: string) =>
      until(`${name} is told to be ${status}`, () => told.get(name)?.at(-1) === status, 90_000);
    try {
      await until(
        "Grafana answers",
        () => fetch(`${url}/api/health`).then(async (r) => (await r.text(), r.ok), () => false),
        120_000,
      );
      const policy = await api("/v1/provisioning/policies");
      await api("/v1/provisioning/policies", {
        ...policy,
        group_wait: "1s",
        group_interval: "1s",
        repeat_interval: "1h",
      });
      const { code, stdout, stderr } = await script("contact-points.ts", [], {
        GRAFANA_URL: url,
        GF_SECURITY_ADMIN_PASSWORD: "secret",
        ALERT_EMAIL: "a@x.org",
        ALERT_SLACK_URL: "https://hooks.example/services/x",
        ALERT_PAGERDUTY_KEY: "0123456789abcdef0123456789abcdef",
        ALERT_WEBHOOK_URL: `http://127.0.0.1:${hook.addr.port}/`,
      });
      strictEqual(code, 0, stderr);
      match(stdout, /email, slack, webhook, pagerduty/);
      strictEqual((await api("/v1/provisioning/policies")).receiver, "pgpulse");

      await t.step("both fire, those that they are for", async () => {
        await newest("High Temperature Foreman's press", "firing");
        await newest("Machine stopped reporting Press 2", "firing");
        deepStrictEqual([...told.keys()].filter((name) => /^(High|Machine)/.test(name)).sort(), [
          "High Temperature Foreman's press",
          "Machine stopped reporting Press 2",
        ]);
      });
      await t.step(
        "the links in them lead to the machine and to a panel that is there",
        async () => {
          match(hot.annotations.link, /\/d\/machine\?var-machine_id=M01$/);
          match(hot.annotations.summary, /^Foreman's press in Molding is too hot: 9\d\.\d °C$/);
          const [, uid, panel] = hot.panelURL.match(/\/d\/(\w+).*[?&]viewPanel=(\d+)/);
          const { dashboard } = await api(`/dashboards/uid/${uid}`);
          ok(dashboard.panels.some(({ id }: Json) => `${id}` === panel), hot.panelURL);
        },
      );
      await t.step("both resolve: rows come again, a window of maintenance begins", async () => {
        await sql`
          insert into machine_metrics (machine_id, metric_type, value) values ('M02', 'temperature', 60)`;
        await sql`insert into maintenance (machine_id, kind) values ('M01', 'repair')`;
        await newest("High Temperature Foreman's press", "resolved");
        await newest("Machine stopped reporting Press 2", "resolved");
      });
    } finally {
      child.kill("SIGKILL");
      await child.status;
      await Deno.remove(data, { recursive: true }).catch(() => {});
    }
  },
});

// From INSERT to the screen: a real Grafana, a real browser, and everything between taken away once.

import { strictEqual } from "node:assert";
import { join } from "node:path";
import { type Browser, chromium, type Page } from "npm:playwright-core@1.65.1";
import { freePort } from "./dev.ts";
import { panel } from "./notify-relay.ts";
import { migrated, ROOT, until } from "./testing.ts";

const home = Deno.env.get("GRAFANA_HOME");
const browserPath = Deno.env.get("CHROMIUM") ?? "/usr/bin/chromium";
const lacks = [
  home ? "" : "GRAFANA_HOME is not set",
  await Deno.stat(browserPath).then(() => "", () => `no Chromium at ${browserPath}: set CHROMIUM`),
].filter(Boolean).join(", ");

/** A process of its own that is started, killed and started again. */
class Part implements AsyncDisposable {
  #child?: Deno.ChildProcess;

  constructor(
    readonly command: string,
    readonly args: string[],
    readonly env: Record<string, string>,
    readonly healthy: string,
  ) {}

  async start(): Promise<void> {
    const { args, env } = this;
    this.#child = new Deno.Command(this.command, {
      args,
      env,
      cwd: ROOT,
      stdout: "null",
      stderr: "null",
    }).spawn();
    await until(
      `${this.healthy} answers`,
      () => fetch(this.healthy).then(async (r) => (await r.text(), r.ok), () => false),
      120_000,
    );
  }

  async kill(): Promise<void> {
    this.#child?.kill("SIGKILL");
    await this.#child?.status;
    this.#child = undefined;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill();
  }
}

/** A panel that writes one number about the channel: how many values it holds, or the newest. */
function stat(id: number, title: string, calc: string, x: number) {
  const base = panel({ address: "stream/pgpulse/metrics", label: title, rows: 300 }, "stat");
  return {
    ...base,
    id,
    gridPos: { h: 6, w: 6, x, y: 0 },
    fieldConfig: { defaults: { decimals: 3 }, overrides: [] },
    options: {
      reduceOptions: { calcs: [calc], fields: "", values: false },
      graphMode: "none",
      textMode: "value",
    },
  };
}

Deno.test({
  name: `a panel is full when opened, shows a new row, and heals after every kill${
    lacks && ` (skipped: ${lacks})`
  }`,
  ignore: lacks !== "",
  fn: async (t) => {
    await using server = await migrated();
    // Every 30 s for longer than the window reaches.
    await server.sql`
      insert into metrics ("timestamp", value)
      select t, 0.5 from generate_series(now() - interval '7 hours', now() - interval '31 s', '30 s') t`;

    const data = await Deno.makeTempDir();
    const port = freePort(0);
    const url = `http://127.0.0.1:${port}`;
    await using grafana = new Part(join(home!, "bin/grafana"), [
      "server",
      `--homepath=${home}`,
      `--config=${join(ROOT, "grafana/grafana.ini")}`,
    ], {
      GF_PATHS_DATA: data,
      GF_PATHS_LOGS: data,
      GF_PATHS_PROVISIONING: join(ROOT, "grafana/provisioning"),
      GF_SERVER_HTTP_ADDR: "127.0.0.1",
      GF_SERVER_HTTP_PORT: `${port}`,
      GF_SERVER_ROOT_URL: url,
      GF_AUTH_ANONYMOUS_ENABLED: "true",
      GF_SECURITY_ADMIN_PASSWORD: "secret",
      PGPULSE_DASHBOARDS: join(ROOT, "grafana/dashboards"),
      PGPULSE_DB_URL: `127.0.0.1:${server.port}`,
      PGPULSE_DB_NAME: "testdb",
      PGPULSE_DB_SSLMODE: "disable",
      GRAFANA_DB_USER: "grafana_readonly",
      GRAFANA_DB_PASSWORD: "grafana",
    }, `${url}/api/health`);
    await grafana.start();
    const relayPort = freePort(0);
    await using relay = new Part(Deno.execPath(), [
      "run",
      "-A",
      "--no-prompt",
      join(ROOT, "scripts/notify-relay.ts"),
      `--port=${relayPort}`,
      `--state=${join(data, "tokens.json")}`,
    ], {
      DATABASE_URL: server.urlFor("server", "server"),
      GRAFANA_URL: url,
      GF_SECURITY_ADMIN_PASSWORD: "secret",
    }, `http://127.0.0.1:${relayPort}/healthz`);
    await relay.start();
    const saved = await fetch(`${url}/api/dashboards/db`, {
      method: "POST",
      headers: {
        authorization: `Basic ${new TextEncoder().encode("admin:secret").toBase64()}`,
        "content-type": "application/json",
      },
      body: JSON.stringify({
        dashboard: {
          uid: "proof",
          title: "Proof",
          time: { from: "now-6h", to: "now" },
          panels: [stat(1, "Held", "count", 0), stat(2, "Newest", "lastNotNull", 6)],
        },
      }),
    });
    strictEqual(saved.status, 200, await saved.text());

    let browser: Browser | undefined;
    try {
      browser = await chromium.launch({
        executablePath: browserPath,
        args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
      });
      const page: Page = await browser.newPage({ viewport: { width: 1200, height: 700 } });
      const shows = (title: string) =>
        page.locator(`[data-testid="data-testid Panel header ${title}"]`).innerText()
          .then((text) => text.replace(title, "").trim(), () => "");
      const open = () => page.goto(`${url}/d/proof?kiosk`);
      // 120 rows of the last hour and, before them, one for each 2 min of five hours.
      const full = () =>
        until("the panel holds the whole window", async () => {
          const held = Number(await shows("Held"));
          return held >= 265 && held <= 300;
        }, 60_000);
      let value = 1;
      const insertIsShown = async () => {
        value++;
        await server.sql`insert into metrics (value) values (${value})`;
        await until(
          `${value} is on the screen`,
          async () => await shows("Newest") === `${value}.000`,
          60_000,
        );
      };

      await t.step("full on open", async () => {
        await open();
        await full();
      });
      await t.step("a new row is on the screen", insertIsShown);
      await t.step("full after a reload", async () => {
        await page.reload();
        await full();
      });
      await t.step("after kill -9 of the relay", async () => {
        await relay.kill();
        await server.sql`insert into metrics (value) values (${++value})`;
        await relay.start();
        await until(
          "what was missed is shown",
          async () => await shows("Newest") === `${value}.000`,
          60_000,
        );
        await full();
        await insertIsShown();
      });
      await t.step("after kill -9 of Grafana", async () => {
        await grafana.kill();
        await server.sql`insert into metrics (value) values (${++value})`;
        await grafana.start();
        await until(
          "what was missed is shown",
          async () => await shows("Newest") === `${value}.000`,
          60_000,
        );
        await full();
        await insertIsShown();
        await open();
        await full();
      });
      await t.step("after kill -9 of the database", async () => {
        await server.kill();
        await server.start();
        await until(
          "a row can be inserted",
          () => server.sql`select 1`.then(() => true, () => false),
        );
        await insertIsShown();
        await full();
      });
      await t.step("an update and a delete are seen", async () => {
        await server.sql`update metrics set value = 77 where id = (select max(id) from metrics)`;
        await until("the update is shown", async () => await shows("Newest") === "77.000", 60_000);
        await server.sql`delete from metrics where value = 77`;
        await until(
          "the delete is shown",
          async () => await shows("Newest") === `${value - 1}.000`,
          60_000,
        );
      });
    } finally {
      await browser?.close();
    }
    await Deno.remove(data, { recursive: true }).catch(() => {});
  },
});

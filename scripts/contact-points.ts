/**
 * Tells Grafana where alerts go: contact points and notification policy from the environment.
 *
 *     deno run --no-prompt --allow-net --allow-env=ALERT_*,GRAFANA_*,GF_* contact-points.ts
 *
 * Needs: a running Grafana, and its administrator or a token of the role Admin.
 * Costs: one start of Deno and a handful of requests; nothing stays behind.
 */
import { parseArgs } from "node:util";

/** Contact points of ours: one for all alerts, one for what cannot wait. */
const ALL = "pgpulse";
const PAGER = "pgpulse pager";

/** Each way that an alert may take, by the variable that asks for it. */
export const WAYS = [
  {
    variable: "ALERT_EMAIL",
    uid: "pgpulse-email",
    name: ALL,
    type: "email",
    form: /^[^@]+@[^@]+(,[^@]+@[^@]+)*$/,
    settings: (value: string) => ({ addresses: value.replaceAll(",", ";"), singleEmail: true }),
  },
  {
    variable: "ALERT_SLACK_URL",
    uid: "pgpulse-slack",
    name: ALL,
    type: "slack",
    form: /^https?:\/\/\S+$/,
    settings: (value: string) => ({ url: value }),
  },
  {
    variable: "ALERT_WEBHOOK_URL",
    uid: "pgpulse-webhook",
    name: ALL,
    type: "webhook",
    form: /^https?:\/\/\S+$/,
    settings: (value: string) => ({ url: value, httpMethod: "POST" }),
  },
  {
    variable: "ALERT_PAGERDUTY_KEY",
    uid: "pgpulse-pagerduty",
    name: PAGER,
    type: "pagerduty",
    form: /^\S+$/,
    settings: (value: string) => ({
      integrationKey: value,
      severity: '{{ or .CommonLabels.severity "critical" }}',
    }),
  },
];

// deno-lint-ignore no-explicit-any -- Grafana's own formats
type Json = any;

const env = (name: string) => Deno.env.get(name)?.trim() || undefined;

/** A route of Grafana's notification policy. */
interface Route {
  receiver: string;
  object_matchers?: string[][];
  continue?: boolean;
  routes?: Route[];
  [key: string]: unknown;
}

/**
 * The policy with our contact points in it, nothing where it is somebody's own and stays.
 * Routes that people added to ours are kept.
 */
export function route(policy: Route, names: string[]): Route | undefined {
  const untouched = ["", "empty", "grafana-default-email"].includes(policy.receiver ?? "") &&
    !policy.routes?.length;
  if (!untouched && ![ALL, PAGER].includes(policy.receiver)) return undefined;
  const matchers = ({ object_matchers = [] }: Route) => object_matchers.join();
  const theirs = (policy.routes ?? []).filter((r) =>
    !(r.receiver === PAGER && matchers(r) === "severity,=,critical") &&
    !(r.receiver === ALL && matchers(r) === "")
  );
  const [receiver] = names;
  const both = names.length > 1;
  return {
    ...policy,
    receiver,
    // One message for an alert and an area, however many of its machines are meant.
    group_by: ["grafana_folder", "alertname", "area"],
    routes: [
      ...both
        ? [{ receiver: PAGER, object_matchers: [["severity", "=", "critical"]], continue: true }]
        : [],
      ...theirs,
      // What a route has taken no longer comes to the root.
      ...both ? [{ receiver: ALL }] : [],
    ],
  };
}

/**
 * Brings one Grafana to what the environment says; returns what it did and what it could not, and
 * where alerts go by the policy that it found.
 */
export async function apply(
  url: string,
  authorization: string,
  wanted: Map<string, string>,
): Promise<{ done: string[]; failed: string[]; found: string }> {
  const done: string[] = [], failed: string[] = [];
  const call = async (method: string, path: string, body?: unknown): Promise<Json> => {
    const answer = await fetch(`${url}/api/v1/provisioning${path}`, {
      method,
      // What is set here stays open to changes in Grafana.
      headers: {
        authorization,
        "content-type": "application/json",
        "x-disable-provenance": "true",
      },
      body: body ? JSON.stringify(body) : undefined,
      signal: AbortSignal.timeout(15_000),
    });
    const text = await answer.text();
    if (answer.ok) return text && JSON.parse(text);
    if (answer.status === 401) {
      throw new Error(
        "it refuses the sign-in; correct GF_SECURITY_ADMIN_PASSWORD or GRAFANA_TOKEN",
      );
    }
    if (answer.status === 403) throw new Error("the sign-in needs the role Admin");
    const { message = text } = text.startsWith("{") ? JSON.parse(text) : {};
    throw new Error(`status ${answer.status}: ${message.slice(0, 200)}`);
  };
  const there = new Set<string>(
    (await call("GET", "/contact-points")).map(({ uid }: { uid: string }) => uid),
  );
  const ready = new Set<string>();
  for (const { variable, uid, name, type, form, settings } of WAYS) {
    const value = wanted.get(variable);
    if (!value) continue;
    const point = { uid, name, type, settings: settings(value), disableResolveMessage: false };
    try {
      // Grafana takes what looks like nothing of the kind, and says so when an alert is to go out.
      if (!form.test(value)) throw new Error("what it says has another form");
      if (there.has(uid)) await call("PUT", `/contact-points/${uid}`, point);
      else await call("POST", "/contact-points", point);
      done.push(type);
      ready.add(name);
    } catch (error) {
      // What Grafana says of a wrong address may hold the address, which may be a secret.
      const why = (error as Error).message.replaceAll(value, "***");
      failed.push(`Cannot set up ${type}: ${why}; correct ${variable}`);
      if (there.has(uid)) ready.add(name);
    }
  }
  const names = [ALL, PAGER].filter((name) => ready.has(name));
  const policy: Route = await call("GET", "/policies");
  const unwanted = WAYS.filter(({ variable, uid }) => !wanted.get(variable) && there.has(uid));
  if (names.length) {
    const changed = route(policy, names);
    if (changed) await call("PUT", "/policies", changed);
    else {
      failed.push(
        `Leaves the notification policies as they are, as they are not pgpulse's: choose ` +
          `${names.map((name) => `"${name}"`).join(" and ")} in them`,
      );
    }
  } else if (unwanted.length && route(policy, [])?.routes?.length === 0) {
    await call("DELETE", "/policies");
  }
  for (const { uid, type } of unwanted) {
    try {
      await call("DELETE", `/contact-points/${uid}`);
      done.push(`no ${type}`);
    } catch (error) {
      failed.push(`Cannot take away ${type}: ${(error as Error).message}`);
    }
  }
  return { done, failed, found: policy.receiver ?? "" };
}

const HELP = `Tells Grafana where alerts go: contact points and notification policy

Usage: deno task contact-points

Beside deno task dev it needs nothing but the ALERT_ variables.

Sets up, in Grafana, what the environment asks for, and takes away what it no longer asks for. What
Grafana refuses is said, and all else goes on: a contact point with a fault in it, in a file of
grafana/provisioning, would keep Grafana from starting. deno task dev and docker compose up run
this whenever they start.

All alerts go to the contact point "${ALL}": email, Slack, webhook. Those with the label
severity=critical go to "${PAGER}" too: PagerDuty. Without the former, all go to the latter.
One message for each alert and area. Policies that somebody made in Grafana are left as they are;
routes added to these are kept.

Flags
  --help           this text

Environment
  ALERT_EMAIL           addresses, with commas between; Grafana sends mail only where GF_SMTP_ENABLED,
                        GF_SMTP_HOST and so on say how
  ALERT_SLACK_URL       URL of an incoming webhook of Slack
  ALERT_PAGERDUTY_KEY   integration key (Events API v2) of a service of PagerDuty
  ALERT_WEBHOOK_URL     gets each message as JSON by POST
  GRAFANA_URL           http://localhost:3000; several with commas between
  GRAFANA_TOKEN         token of a service account with the role Admin (GRAFANA_API_KEY is its other
                        name), one for each GRAFANA_URL; else
  GF_SECURITY_ADMIN_USER, GF_SECURITY_ADMIN_PASSWORD
                        the administrator (admin); also GRAFANA_ADMIN_USER, GRAFANA_ADMIN_PASSWORD
  GRAFANA_DEV_URL       address and sign-in of the Grafana of deno task dev, which keeps it in
                        .pgpulse/dev.env; taken where GRAFANA_URL is not set

Cost: one start of Deno and a handful of requests. Wrong passwords are tried once.

Examples
  ALERT_EMAIL=shift@example.com,plant@example.com deno task contact-points
  ALERT_SLACK_URL=https://hooks.slack.com/services/... GRAFANA_URL=https://me.grafana.net \\
      GRAFANA_TOKEN=glsa_... deno run -A contact-points.ts
`;

/** Runs one command line; returns the exit status. */
async function main(args: string[]): Promise<number> {
  let status = 0;
  const say = (text: string) => (console.error(text), status = 1);
  try {
    const { values } = parseArgs({
      args,
      options: { help: { type: "boolean", short: "h", default: false } },
    });
    if (values.help) return console.log(HELP), 0;
  } catch (error) {
    const [first] = (error as Error).message.replaceAll("'", '"').split(/\. |\.?\n|\.$/);
    return say(`Cannot read the command line: ${first}; see deno task contact-points --help`);
  }
  const wanted = new Map(WAYS.flatMap(({ variable }) => {
    const value = env(variable);
    return value ? [[variable, value] as const] : [];
  }));
  // The Grafana of deno task dev, with its sign-in; its password is for no other one.
  const dev = env("GRAFANA_URL") ? null : URL.parse(env("GRAFANA_DEV_URL") ?? "");
  const urls = (env("GRAFANA_URL") ?? dev?.origin ?? "http://localhost:3000").split(",")
    .map((url) => url.trim());
  const tokens = (env("GRAFANA_TOKEN") ?? env("GRAFANA_API_KEY"))?.split(",") ?? [];
  const [devUser, devPassword] = [dev?.username, dev?.password]
    .map((text) => text && decodeURIComponent(text));
  const user = env("GF_SECURITY_ADMIN_USER") ?? env("GRAFANA_ADMIN_USER") ?? devUser ?? "admin";
  const password = env("GF_SECURITY_ADMIN_PASSWORD") ?? env("GRAFANA_ADMIN_PASSWORD") ??
    devPassword;
  for (const [i, text] of urls.entries()) {
    const parsed = URL.parse(text);
    const { protocol, pathname, search, hash } = parsed ?? {};
    // An @ behind the host: a password with a / in it, of which a part would be taken for the host.
    if (!parsed || !/^https?:$/.test(protocol!) || `${pathname}${search}${hash}`.includes("@")) {
      const hidden = text.replace(/^(https?:\/\/)?.*@/s, "$1***@");
      say(`Cannot read GRAFANA_URL: "${hidden}" is not an address like http://localhost:3000`);
      continue;
    }
    // Without a user and a password: they may be printed nowhere, and nothing takes them.
    const url = parsed.origin + parsed.pathname.replace(/\/+$/, "");
    const token = tokens[i]?.trim();
    if (!token && !password) {
      say(`Cannot sign in to "${url}": set GRAFANA_TOKEN or GF_SECURITY_ADMIN_PASSWORD`);
      continue;
    }
    const basic = new TextEncoder().encode(`${user}:${password}`).toBase64();
    try {
      const { done, failed, found } = await apply(
        url,
        token ? `Bearer ${token}` : `Basic ${basic}`,
        wanted,
      );
      if (done.length) console.log(`Alerts of "${url}": ${done.join(", ")}`);
      else if (!failed.length) {
        const names = WAYS.map(({ variable }) => variable).join(", ");
        console.log(
          `Alerts of "${url}": nothing to do, they go to its contact point "${found}"; set one of ${names}`,
        );
      }
      failed.forEach(say);
    } catch (error) {
      const { message, cause } = error as Error;
      const why = (cause as Error)?.message ?? message;
      say(`Cannot set up the contact points of "${url}": ${why}`);
    }
  }
  return status;
}

if (import.meta.main) Deno.exit(await main(Deno.args));

// What holds the house together: copied helpers, scripts that stand alone, one list of packages.

import { deepStrictEqual, match, ok, strictEqual } from "node:assert";
import { join } from "node:path";
import { ROOT } from "./testing.ts";

/** Scripts that people copy to a host, one file each. */
const SCRIPTS = [
  "collect.ts",
  "contact-points.ts",
  "dev.ts",
  "etl.ts",
  "generate.ts",
  "migrate.ts",
  "notify-relay.ts",
  "upkeep.ts",
];

const read = (path: string) => Deno.readTextFileSync(join(ROOT, path));
const files = [...Deno.readDirSync(join(ROOT, "scripts"))].map(({ name }) => name)
  .filter((name) => name.endsWith(".ts"));

Deno.test("copied helpers are the same in every script, and at most three", () => {
  const copies = new Map<string, Map<string, string[]>>();
  for (const name of SCRIPTS) {
    const source = read(`scripts/${name}`);
    for (
      const [, helper, body] of source.matchAll(
        /^\/\/ --- copied helper: (\w+) .*?---\n(.*?)^\/\/ --- end of \1 ---$/gms,
      )
    ) {
      const bodies = copies.get(helper) ?? new Map();
      copies.set(helper, bodies.set(body, [...bodies.get(body) ?? [], name]));
    }
  }
  ok(copies.size > 0 && copies.size <= 3, `${copies.size} helpers`);
  for (const [helper, bodies] of copies) {
    deepStrictEqual([...bodies.values()].length, 1, `${helper} differs: ${[...bodies.values()]}`);
  }
});

Deno.test("each script stands alone: types and --help in an empty folder", async (t) => {
  const dir = await Deno.makeTempDir();
  try {
    for (const name of SCRIPTS) {
      await t.step(name, async () => {
        const folder = join(dir, name.replace(".ts", ""));
        await Deno.mkdir(folder);
        await Deno.copyFile(join(ROOT, "scripts", name), join(folder, name));
        const deno = (...args: string[]) =>
          new Deno.Command(Deno.execPath(), { args, cwd: folder, env: { NO_COLOR: "1" } }).output();
        const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
        const check = await deno("check", name);
        strictEqual(check.code, 0, text(check.stderr));
        const help = await deno("run", "-A", "--no-prompt", name, "--help");
        strictEqual(help.code, 0, text(help.stderr));
        match(text(help.stdout), /Usage: /);
      });
    }
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("packages are pinned to one version each, and in the lock", () => {
  const versions = new Map<string, Set<string>>();
  const lock = JSON.parse(read("deno.lock")).specifiers;
  for (const name of files) {
    for (const [, pkg, version] of read(`scripts/${name}`).matchAll(/"npm:([a-z-]+)@([^"/]*)/g)) {
      match(version, /^\d+\.\d+\.\d+/, `${name}: ${pkg}`);
      ok(lock[`npm:${pkg}@${version}`], `${pkg}@${version} is not in deno.lock`);
      versions.set(pkg, (versions.get(pkg) ?? new Set()).add(version));
    }
  }
  ok(versions.size > 0);
  for (const [pkg, found] of versions) strictEqual(found.size, 1, `${pkg}: ${[...found]}`);
});

Deno.test("every task's script is there, and the README tells of each", () => {
  const { tasks } = JSON.parse(read("deno.json"));
  const readme = read("README.md");
  for (const [task, { command }] of Object.entries<{ command: string }>(tasks)) {
    for (const [path] of command.matchAll(/scripts\/[\w-]+\.ts/g)) {
      ok(Deno.statSync(join(ROOT, path)).isFile, path);
    }
    ok(readme.includes(`deno task ${task}`), `README.md does not name deno task ${task}`);
  }
});

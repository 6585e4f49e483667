// Runs sql/tests: one behaviour a file, each between begin and rollback, on both ends of the range.

import { deepStrictEqual, ok } from "node:assert";
import { join } from "node:path";
import postgres from "npm:postgres@3.4.9";
import { migrated, ROOT, until } from "./testing.ts";

/** In each file's session: the message with which a statement is refused. */
const REFUSAL = `
  create function pg_temp.refusal(statement text) returns text
  language plpgsql
  as $$
  begin
      execute statement;
      return 'not refused';
  exception when others then
      return sqlerrm;
  end
  $$`;

const folder = join(ROOT, "sql/tests");
const files = [...Deno.readDirSync(folder)].map(({ name }) => name).sort();

for (const major of [15, 18] as const) {
  Deno.test(`sql/tests on PostgreSQL ${major}`, async (t) => {
    await using server = await migrated({ major });
    for (const file of files) {
      await t.step(file, async () => {
        const sql = postgres(server.url, { max: 1, onnotice: () => {} });
        try {
          await sql.unsafe(REFUSAL);
          await sql.unsafe(await Deno.readTextFile(join(folder, file))).simple();
        } finally {
          await sql.end();
        }
      });
    }

    await t.step(
      "live_metrics is announced on influx_feed as JSON, short when it would be too long",
      async () => {
        const sql = postgres(server.urlFor("server", "server"), { max: 1 });
        const heard: Record<string, unknown>[] = [];
        await sql.listen("influx_feed", (payload) => heard.push(JSON.parse(payload)));
        await server.sql`alter table live_metrics add note text`;
        await server.sql`insert into live_metrics (value, note) values (1.5, 'hello'), (2.5, ${
          "x".repeat(9000)
        })`;
        await until("both rows are announced", () => heard.length === 2);
        const rows = await server
          .sql`select id::int, to_json("timestamp") as timestamp, value from live_metrics order by id`;
        deepStrictEqual(heard, [{ ...rows[0], note: "hello" }, { ...rows[1] }]);
        await sql.end();
      },
    );

    await t.step("a session's hints come at most four times a second", async () => {
      const sql = postgres(server.url, { max: 1, onnotice: () => {} });
      let heard = 0;
      await sql.listen("pgpulse", (table) => heard += Number(table === "public.hinted"));
      await sql`create table hinted (value int)`;
      await sql`select pgpulse.watch('hinted')`;
      const started = performance.now();
      for (let i = 0; i < 300; i++) await sql`insert into hinted values (${i})`;
      const most = Math.ceil((performance.now() - started) / 250) + 1;
      await sql`select pg_notify('pgpulse', 'end')`;
      await until("a hint comes", () => heard > 0);
      ok(
        heard <= Math.min(most, 299),
        `${heard} hints of 300 statements, at most ${most} expected`,
      );
      await sql.end();
    });
  });
}

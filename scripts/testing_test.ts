import { strictEqual } from "node:assert";
import { testServer } from "./testing.ts";

for (const major of [15, 18] as const) {
  Deno.test(`embedded PostgreSQL ${major} answers`, async () => {
    await using server = await testServer({ major });
    const [row] = await server
      .sql`select current_setting('server_version_num')::int / 10000 as major`;
    strictEqual(row.major, major);
  });
}

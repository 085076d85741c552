// Fill the tables and the queue: `node fill.js USERS SESSIONS`. The queue's Redis database is flushed.
import * as store from "./store.js";

const [users, sessions] = process.argv.slice(2).map(Number);
const pool = store.pool();
const redis = store.connection();
await redis.flushdb();
await pool.query(store.SCHEMA);
await pool.query("TRUNCATE express_sessions");
await pool.query(
  `INSERT INTO express_profiles SELECT 'user ' || n, true FROM generate_series(0, $1::int - 1) AS n
   ON CONFLICT DO NOTHING`, [users]);
const queue = store.queue();
await queue.waitUntilReady();
if (sessions) {
  const { rows } = await pool.query(
    `INSERT INTO express_sessions (user_id, expires_at, latitude, longitude)
     SELECT 'user ' || n, now() + interval '1 hour' + n * interval '1 ms', 52.516275, 13.377704
     FROM generate_series(0, $1::int - 1) AS n RETURNING id, expires_at`, [sessions]);
  for (let at = 0; at < rows.length; at += 1000)
    await queue.addBulk(rows.slice(at, at + 1000).map(({ id, expires_at }) => (
      { name: "expire", data: { id }, opts: { jobId: `expire-${id}`, delay: expires_at - Date.now() } })));
}
await pool.query("ANALYZE express_sessions");
process.exit(0);

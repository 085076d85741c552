// Sessions as they are commonly built on Node: Express, a transaction a call on pg's pool, BullMQ for the expiry.
import { Worker } from "bullmq";
import express from "express";
import * as store from "./store.js";

const pool = store.pool();
const queue = store.queue();
await pool.query(store.SCHEMA);

const app = express();
app.disable("x-powered-by");
app.disable("etag");
app.use(express.json());

class Refusal extends Error {
  constructor(status, reason) {
    super(reason);
    this.status = status;
  }
}

// The job's id is the session's, so that it can be moved and removed.
const delay = (session) => Math.max(0, session.expires_at - Date.now());
const jobId = (session) => `expire-${session.id}`;

async function transaction(work) {
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    const result = await work(client);
    await client.query("COMMIT");
    return result;
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  } finally {
    client.release();
  }
}

const COLUMNS = "id, user_id, started_at, expires_at, ended_at, end_reason";

app.post("/session/start", async (request, response) => {
  const { user_id, duration, latitude, longitude } = request.body;
  const session = await transaction(async (client) => {
    const profile = await client.query("SELECT 1 FROM express_profiles WHERE user_id = $1", [user_id]);
    if (!profile.rowCount) throw new Refusal(412, "PROFILE_REQUIRED");
    const active = await client.query(
      "SELECT id FROM express_sessions WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now()", [user_id]);
    if (active.rowCount) throw new Refusal(409, "SESSION_ALREADY_ACTIVE");
    const inserted = await client.query(
      `INSERT INTO express_sessions (user_id, expires_at, latitude, longitude)
       VALUES ($1, now() + make_interval(secs => $2), $3, $4) RETURNING ${COLUMNS}`,
      [user_id, duration, latitude, longitude]);
    return inserted.rows[0];
  });
  await queue.add("expire", { id: session.id }, { jobId: jobId(session), delay: delay(session) });
  response.json({ session });
});

app.post("/session/extend", async (request, response) => {
  const { user_id, additional_duration } = request.body;
  const { rows } = await pool.query(
    `UPDATE express_sessions SET expires_at = expires_at + make_interval(secs => $2)
     WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now() RETURNING ${COLUMNS}`,
    [user_id, additional_duration]);
  if (!rows.length) throw new Refusal(404, "NO_ACTIVE_SESSION");
  const job = await queue.getJob(jobId(rows[0]));
  await job?.changeDelay(delay(rows[0]));
  response.json({ session: rows[0] });
});

app.post("/session/end", async (request, response) => {
  const { rows } = await pool.query(
    `UPDATE express_sessions SET ended_at = now(), end_reason = 'USER'
     WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now() RETURNING ${COLUMNS}`,
    [request.body.user_id]);
  if (!rows.length) throw new Refusal(404, "NO_ACTIVE_SESSION");
  await queue.remove(jobId(rows[0]));
  response.json({ session: rows[0] });
});

app.get("/session", async (request, response) => {
  const { rows } = await pool.query(
    `SELECT ${COLUMNS} FROM express_sessions WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now()`,
    [request.query.user_id]);
  response.json({ active: rows.length > 0, session: rows[0] });
});

app.use((error, _request, response, _next) => {
  if (!error.status) console.error(error);
  response.status(error.status ?? 500).json({ reason: error.status ? error.message : "INTERNAL" });
});

const worker = new Worker(store.QUEUE, async (job) => {
  await pool.query(
    `UPDATE express_sessions SET ended_at = expires_at, end_reason = 'EXPIRED'
     WHERE id = $1 AND ended_at IS NULL AND expires_at <= now()`, [job.data.id]);
}, { connection: store.connection(), concurrency: 50 });
worker.on("error", console.error);

const server = app.listen(0, "127.0.0.1", () => console.log(`listening on 127.0.0.1:${server.address().port}`));
process.on("SIGTERM", () => process.exit(0));

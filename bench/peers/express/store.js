// The tables, and what the server and the filling of them share.
import { Queue } from "bullmq";
import { Redis } from "ioredis";
import pg from "pg";

export const QUEUE = "express-expiry";

// BullMQ's own Redis database: the bench flushes it.
export const connection = () => new Redis(process.env.REDIS_URL, { maxRetriesPerRequest: null });

export const pool = () => new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 20 });

export const queue = () =>
  new Queue(QUEUE, { connection: connection(), defaultJobOptions: { removeOnComplete: true, removeOnFail: 1000 } });

export const SCHEMA = `
CREATE TABLE IF NOT EXISTS express_profiles (user_id text PRIMARY KEY, verified boolean NOT NULL);
CREATE TABLE IF NOT EXISTS express_sessions (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id text NOT NULL,
  started_at timestamptz NOT NULL DEFAULT now(),
  expires_at timestamptz NOT NULL,
  ended_at timestamptz,
  end_reason text,
  latitude float8 NOT NULL,
  longitude float8 NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS express_sessions_active ON express_sessions (user_id) WHERE ended_at IS NULL;
`;

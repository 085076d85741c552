// node example.js http://127.0.0.1:50051 TOKEN_FILE: starts a session, prints what happens to it, and ends it.
import { readFileSync } from "node:fs";
import { setTimeout as pause } from "node:timers/promises";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { SessionService } from "./generated/afterhours/v1/session_service_pb.js";
import { SessionEventType } from "./generated/afterhours/v1/session_event_pb.js";
import { ErrorInfoSchema } from "./generated/google/rpc/error_details_pb.js";

const [baseUrl, tokenFile] = process.argv.slice(2) as [string, string];

// The file is read for each call, so that a token can be renewed while the program runs.
const bearer: Interceptor = (next) => async (request) => {
  request.header.set("authorization", `Bearer ${readFileSync(tokenFile, "utf8").trim()}`);
  return next(request);
};
const transport = createGrpcTransport({
  baseUrl,
  interceptors: [bearer],
  // Without pings a watch would wait for ever for a server that vanished: this notices it within 40 s.
  pingIntervalMs: 30_000,
  pingTimeoutMs: 10_000,
});
const sessions = createClient(SessionService, transport);

// Why a call failed: decide by this, not by the message.
function reasonOf(error: unknown): string {
  return ConnectError.from(error).findDetails(ErrorInfoSchema)[0]?.reason ?? "";
}

// Every event after the cursor; resumes there when the stream breaks or its token expires. After CURSOR_EXPIRED start
// again with an empty cursor, as at the beginning.
async function* watch(cursor = "", signal?: AbortSignal) {
  let refusedTokens = 0;
  while (!signal?.aborted) {
    try {
      for await (const { event } of sessions.watchSessions({ cursor }, { signal })) {
        refusedTokens = 0;
        cursor = event!.cursor;
        yield event!;
      }
    } catch (error) {
      if (signal?.aborted) return;
      const broken = ConnectError.from(error).code === Code.Unavailable || reasonOf(error) === "SLOW_CONSUMER";
      // There may be a new token; one that is refused again and again is no use.
      const expired = reasonOf(error) === "UNAUTHENTICATED" && ++refusedTokens <= 4;
      if (!broken && !expired) throw error;
    }
    await pause(500, undefined, { signal }).catch(() => {});
  }
}

const stop = new AbortController();
let begun = false;
for await (const event of watch("", stop.signal)) {
  if (event.type === SessionEventType.HEARTBEAT) {
    if (begun) continue;
    // The first message: from here on nothing is missed. The request_id makes a retry safe.
    begun = true;
    const request = {
      duration: { seconds: 900n },
      location: { latitude: 52.5163, longitude: 13.3777 },
      requestId: crypto.randomUUID(),
    };
    const { session } = await sessions.startSession(request, { timeoutMs: 2000 });
    console.log(`started ${session!.id}`);
    await sessions.startSession({ ...request, requestId: "" }).catch((error) => console.log(reasonOf(error)));
    await sessions.endSession({ requestId: crypto.randomUUID() }, { timeoutMs: 2000 });
  } else {
    console.log(`${SessionEventType[event.type]} ${event.session!.id}`);
    if (event.type === SessionEventType.ENDED) stop.abort();
  }
}

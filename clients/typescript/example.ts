// node example.js http://127.0.0.1:50051 TOKEN: starts a session, prints what happens to it, and ends it.
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { SessionService } from "./generated/afterhours/v1/session_service_pb.js";
import { SessionEventType } from "./generated/afterhours/v1/session_event_pb.js";
import { ErrorInfoSchema } from "./generated/google/rpc/error_details_pb.js";

const [baseUrl, token] = process.argv.slice(2) as [string, string];

const bearer: Interceptor = (next) => async (request) => {
  request.header.set("authorization", `Bearer ${token}`);
  return next(request);
};
const sessions = createClient(SessionService, createGrpcTransport({ baseUrl, interceptors: [bearer] }));

// Why a call failed: decide by this, not by the message.
function reasonOf(error: unknown): string {
  return ConnectError.from(error).findDetails(ErrorInfoSchema)[0]?.reason ?? "";
}

// Every event after the cursor; goes on where it was when the stream breaks.
async function* watch(cursor = "", signal?: AbortSignal) {
  while (!signal?.aborted) {
    try {
      for await (const { event } of sessions.watchSessions({ cursor }, { signal })) {
        cursor = event!.cursor;
        yield event!;
      }
    } catch (error) {
      const again = ConnectError.from(error).code === Code.Unavailable || reasonOf(error) === "SLOW_CONSUMER";
      if (signal?.aborted) return;
      if (!again) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

const stop = new AbortController();
for await (const event of watch("", stop.signal)) {
  if (event.type === SessionEventType.HEARTBEAT) {
    // The first message: from here on nothing is missed. The request_id makes a retry safe.
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

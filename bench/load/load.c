/* A load generator that costs less than what it measures: one thread, gRPC over h2c by libnghttp2, or HTTP/1.1.
 *
 *     load h2|http1 HOST:PORT PATH REQUESTS CONCURRENCY CONNECTIONS SECONDS WRAP LEAST
 *
 * REQUESTS is a file of frames as gRPC has them (a zero byte, four bytes of length, the payload). For h2 a frame is the
 * body of a call of PATH; for http1 its payload is a whole request, and PATH is not looked at. CONCURRENCY calls are
 * kept in flight until SECONDS have passed or, without WRAP, every request was sent once; those in flight are awaited.
 * An answer of fewer than LEAST bytes is no success: it says "no such thing" with status OK.
 *
 * Prints one line of JSON. Failures are counted by grpc-status, or by the status of HTTP when that is not 200;
 * 900 is an answer that was too short, 901 a call whose connection or stream broke.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { STATUSES = 1000, SHORT = 900, BROKEN = 901, BUFFER = 1 << 18, WINDOW = 1 << 24 };
/* Seconds after the end for which calls in flight are awaited. */
static const double PATIENCE = 15;

typedef struct {
  const uint8_t *at;
  size_t length;
} Request;

typedef struct {
  double began;
  Request request;
  size_t sent, received;
  int http, grpc;
} Call;

typedef struct Connection {
  int fd;
  nghttp2_session *session; /* NULL for HTTP/1.1, where the connection has one call */
  Call call;
  uint8_t *out, *in;
  size_t out_from, out_to, in_length;
} Connection;

static Request *requests;
static size_t request_count, next_request, in_flight, answered, stored, broken;
static int wraps;
static size_t least;
static double until, last_answer;
static const char *path;
static char authority[64];
static float *latencies;
static size_t statuses[STATUSES];

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec + at.tv_nsec * 1e-9;
}

static void fail(const char *what) {
  fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "failed");
  exit(1);
}

static void load_requests(const char *file, int payload_only) {
  int fd = open(file, O_RDONLY);
  struct stat about;
  if (fd < 0 || fstat(fd, &about)) fail(file);
  const uint8_t *at = mmap(NULL, about.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
  if (at == MAP_FAILED) fail(file);
  for (const uint8_t *end = at + about.st_size; at < end;) {
    uint32_t length;
    memcpy(&length, at + 1, 4);
    length = ntohl(length);
    if (!(request_count & (request_count + 1)) &&
        !(requests = realloc(requests, 2 * (request_count + 1) * sizeof *requests)))
      fail("memory");
    int head = payload_only ? 5 : 0;
    requests[request_count++] = (Request){at + head, 5 + length - head};
    at += 5 + length;
  }
}

/* Take the next request into `call`; zero if there is none, or no time. */
static int next(Call *call) {
  if (next_request == request_count && wraps) next_request = 0;
  double at = now();
  if (next_request == request_count || at >= until) return 0;
  *call = (Call){.began = at, .request = requests[next_request++], .grpc = -1};
  in_flight++;
  return 1;
}

static void done(Call *call, int status) {
  in_flight--;
  last_answer = now();
  if (status == 0 && call->received < least) status = SHORT;
  statuses[status < 0 || status >= STATUSES ? BROKEN : status]++;
  if (status) return;
  if (answered == stored && !(latencies = realloc(latencies, (stored = stored ? 2 * stored : 1 << 16) * sizeof(float))))
    fail("memory");
  latencies[answered++] = (float)(last_answer - call->began);
}

static ssize_t body(nghttp2_session *session, int32_t stream, uint8_t *to, size_t room, uint32_t *flags,
                    nghttp2_data_source *source, void *connection) {
  (void)session, (void)stream, (void)connection;
  Call *call = source->ptr;
  size_t left = call->request.length - call->sent, n = left < room ? left : room;
  memcpy(to, call->request.at + call->sent, n);
  call->sent += n;
  if (n == left) *flags |= NGHTTP2_DATA_FLAG_EOF;
  return (ssize_t)n;
}

#define HEADER(name, value, length) \
  {(uint8_t *)name, (uint8_t *)(value), sizeof name - 1, length, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}
#define FIXED(name, value) HEADER(name, value, sizeof value - 1)

static void submit(Connection *connection, Call *call) {
  nghttp2_nv headers[] = {
      FIXED(":method", "POST"),           FIXED(":scheme", "http"),
      HEADER(":path", path, strlen(path)), HEADER(":authority", authority, strlen(authority)),
      FIXED("te", "trailers"),            FIXED("content-type", "application/grpc"),
      FIXED("user-agent", "load"),
  };
  nghttp2_data_provider provider = {.source = {.ptr = call}, .read_callback = body};
  if (nghttp2_submit_request(connection->session, NULL, headers, sizeof headers / sizeof *headers, &provider, call) < 0)
    fail("submit");
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
                     const uint8_t *value, size_t length, uint8_t flags, void *connection) {
  (void)length, (void)flags, (void)connection;
  Call *call = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
  if (!call) return 0;
  if (name_length == 11 && !memcmp(name, "grpc-status", 11)) call->grpc = atoi((const char *)value);
  if (name_length == 7 && !memcmp(name, ":status", 7)) call->http = atoi((const char *)value);
  return 0;
}

static int on_data(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data, size_t length,
                   void *connection) {
  (void)flags, (void)data, (void)connection;
  Call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (call) call->received += length;
  return 0;
}

static int on_close(nghttp2_session *session, int32_t stream, uint32_t error, void *connection) {
  (void)error;
  Call *call = nghttp2_session_get_stream_user_data(session, stream);
  if (!call) return 0;
  done(call, call->http && call->http != 200 ? call->http : call->grpc < 0 ? BROKEN : call->grpc);
  if (next(call))
    submit(connection, call);
  else
    free(call);
  return 0;
}

/* Send what there is to send, until the socket is full. */
static void flush(Connection *connection) {
  for (;;) {
    if (connection->out_from == connection->out_to) {
      connection->out_from = connection->out_to = 0;
      const uint8_t *piece;
      ssize_t n;
      while (connection->session && connection->out_to < BUFFER / 2 &&
             (n = nghttp2_session_mem_send(connection->session, &piece)) > 0) {
        if (connection->out_to + n > BUFFER) fail("a frame larger than the buffer");
        memcpy(connection->out + connection->out_to, piece, n);
        connection->out_to += n;
      }
      if (!connection->out_to) return;
    }
    ssize_t n = send(connection->fd, connection->out + connection->out_from,
                     connection->out_to - connection->out_from, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) return; /* epoll tells, edge-triggered, when there is room again */
    if (n < 0) fail("send");
    connection->out_from += n;
  }
}

static void start_http1(Connection *connection) {
  if (!next(&connection->call)) return;
  connection->in_length = 0;
  connection->out_from = 0;
  connection->out_to = connection->call.request.length;
  if (connection->out_to > BUFFER) fail("a request larger than the buffer");
  memcpy(connection->out, connection->call.request.at, connection->out_to);
}

/* Take the answer if it is whole: a head with Content-Length, and so much body. */
static void take_http1(Connection *connection) {
  uint8_t *head_end = memmem(connection->in, connection->in_length, "\r\n\r\n", 4);
  if (!head_end) return;
  size_t head = head_end + 4 - connection->in, length = 0;
  for (char *line = (char *)connection->in; line < (char *)head_end; line = strstr(line, "\r\n") + 2)
    if (!strncasecmp(line, "content-length:", 15)) length = strtoul(line + 15, NULL, 10);
  if (connection->in_length < head + length) return;
  int status = atoi((char *)connection->in + 9);
  connection->call.received = length;
  done(&connection->call, status == 200 ? 0 : status);
  start_http1(connection);
}

static void receive(Connection *connection) {
  uint8_t buffer[BUFFER / 4];
  for (;;) {
    ssize_t n = recv(connection->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      broken = 1;
      return;
    }
    if (connection->session) {
      if (nghttp2_session_mem_recv(connection->session, buffer, n) < 0) fail("HTTP/2");
    } else {
      if (connection->in_length + n >= BUFFER) fail("an answer larger than the buffer");
      memcpy(connection->in + connection->in_length, buffer, n);
      connection->in_length += n;
      connection->in[connection->in_length] = 0;
      take_http1(connection);
    }
    if ((size_t)n < sizeof buffer) return;
  }
}

static void open_connection(Connection *connection, struct sockaddr_in *to, const nghttp2_session_callbacks *callbacks) {
  connection->fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connection->fd < 0 || connect(connection->fd, (struct sockaddr *)to, sizeof *to)) fail("connect");
  fcntl(connection->fd, F_SETFL, O_NONBLOCK);
  setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
  connection->out = malloc(BUFFER);
  connection->in = malloc(BUFFER);
  if (!callbacks) return;
  nghttp2_settings_entry settings[] = {{NGHTTP2_SETTINGS_ENABLE_PUSH, 0}, {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, WINDOW}};
  if (nghttp2_session_client_new(&connection->session, callbacks, connection) ||
      nghttp2_submit_settings(connection->session, 0, settings, 2) ||
      nghttp2_session_set_local_window_size(connection->session, 0, 0, WINDOW))
    fail("HTTP/2");
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static double quantile(double share) { return answered ? latencies[(size_t)((answered - 1) * share)] * 1e3 : 0; }

static void report(double began) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  double cpu = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
  qsort(latencies, answered, sizeof *latencies, by_value);
  printf("{\"calls\": %zu, \"seconds\": %.6f, \"p50_ms\": %.4f, \"p99_ms\": %.4f, \"max_ms\": %.4f, \"cpu\": %.6f, \"errors\": {",
         answered, last_answer - began, quantile(0.5), quantile(0.99), quantile(1), cpu);
  statuses[BROKEN] += in_flight;
  const char *comma = "";
  for (int status = 1; status < STATUSES; status++)
    if (statuses[status]) printf("%s\"%d\": %zu", comma, status, statuses[status]), comma = ", ";
  printf("}}\n");
}

int main(int argc, char **argv) {
  if (argc != 10) return fprintf(stderr, "usage: see the head of load.c\n"), 2;
  int http1 = !strcmp(argv[1], "http1");
  int concurrency = atoi(argv[5]), count = http1 ? concurrency : atoi(argv[6]);
  char *colon = strchr(argv[2], ':');
  struct sockaddr_in to = {.sin_family = AF_INET};
  if (!colon || concurrency < 1 || count < 1) fail("arguments");
  snprintf(authority, sizeof authority, "%s", argv[2]);
  *colon = 0;
  to.sin_port = htons(atoi(colon + 1));
  if (inet_pton(AF_INET, argv[2], &to.sin_addr) != 1) fail("HOST");
  path = argv[3];
  load_requests(argv[4], http1);
  wraps = atoi(argv[8]);
  least = strtoul(argv[9], NULL, 10);

  nghttp2_session_callbacks *callbacks;
  nghttp2_session_callbacks_new(&callbacks);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_close);

  Connection *connections = calloc(count, sizeof *connections);
  int poll = epoll_create1(0);
  for (int i = 0; i < count; i++) {
    open_connection(&connections[i], &to, http1 ? NULL : callbacks);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = &connections[i]};
    epoll_ctl(poll, EPOLL_CTL_ADD, connections[i].fd, &event);
  }
  double began = now();
  until = began + atof(argv[7]);
  for (int i = 0; i < concurrency; i++) {
    Connection *connection = &connections[i % count];
    Call *call;
    if (http1)
      start_http1(connection);
    else if (next(call = malloc(sizeof *call)))
      submit(connection, call);
  }
  for (int i = 0; i < count; i++) flush(&connections[i]);
  while (in_flight && !broken && now() < until + PATIENCE) {
    struct epoll_event events[64];
    int n = epoll_wait(poll, events, 64, 100);
    for (int i = 0; i < n; i++) {
      Connection *connection = events[i].data.ptr;
      if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(connection);
      flush(connection);
    }
  }
  report(began);
  return 0;
}

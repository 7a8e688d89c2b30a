/* Devices, memory, streams and events of the simulated CANN, in host memory. Work is done when it is issued, so streams
   order nothing and events have happened. Signatures: the acl headers in the torch_npu wheel. */
#include "simulator.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
  INVALID_DEVICE = 107001,
  INVALID_PARAM = 107000,
  UNSUPPORTED = 207000,
  OUT_OF_MEMORY = 207001,
  OUT_OF_STREAMS = 207008,
};
enum { MAX_DEVICES = 16, ALIGNMENT = 512 };

struct hooks sim_hooks;
static __thread char words[512];
static __thread int current;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t used[MAX_DEVICES];
static int num_streams[MAX_DEVICES], next_stream = 1;

struct block { /* lies before what is handed out */
  struct block *next, *previous;
  uint64_t mapped;
  int device; /* -1: pinned host memory */
  void *address;
};
static struct block blocks = {&blocks, &blocks, 0, 0, 0};

uint64_t sim_number(const char *variable, uint64_t otherwise) {
  const char *text = getenv(variable);
  return text && *text ? strtoull(text, 0, 10) : otherwise;
}

int sim_refuse(int code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(words, sizeof words, format, arguments);
  va_end(arguments);
  return code;
}

long sim_trace(const char *name) {
  if (sim_number("NPU_SIMULATOR_TRACE", 0))
    fprintf(stderr, "simulated CANN: %s answers 0\n", name);
  return 0;
}

const char *aclGetRecentErrMsg(void) { return words; }

/* -- devices ------------------------------------------------------------------------------------------- */

static int num_devices(void) { return (int)sim_number("NPU_SIMULATOR_DEVICES", 1); }
int sim_set_hooks(const struct hooks *given) { return sim_hooks = *given, 0; }

const char *aclrtGetSocName(void) {
  const char *name = getenv("NPU_SIMULATOR_SOC");
  return name && *name ? name : "Ascend910B3";
}
int aclrtGetDeviceCount(uint32_t *count) { return *count = num_devices(), 0; }
int aclrtGetDevice(int *device) { return *device = current, 0; }
int aclrtSetDevice(int device) {
  if (device < 0 || device >= num_devices())
    return sim_refuse(INVALID_DEVICE, "simulated CANN: device %d; there are %d", device, num_devices());
  return current = device, 0;
}
static char contexts[MAX_DEVICES];
int aclrtGetCurrentContext(void **context) { return *context = contexts + current, 0; }
int aclrtSetCurrentContext(void *context) { return current = (int)((char *)context - contexts), 0; }
int aclrtCreateContext(void **context, int device) { return *context = contexts + device, 0; }
int aclrtGetPrimaryCtxState(int device, uint32_t *flags, int *active) { return *flags = 0, *active = 1, 0; }
int aclrtGetRunMode(int *mode) { return *mode = 1, 0; }
int aclrtDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 1, 0; }
int aclrtDeviceGetBareTgid(int *pid) { return *pid = 1, 0; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return *value = 0, 0; }
int aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { return *flag = 0, 0; }
int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
  if (attribute == 301)
    return *value = (int64_t)sim_number("NPU_SIMULATOR_MEMORY", 8ULL << 30), 0;
  return *value = attribute == 1 || attribute == 101 || attribute == 201 ? 20 : 0, 0;
}
int aclrtGetDeviceResLimit(int device, int type, uint32_t *value) { return *value = 20, 0; }
int aclrtGetStreamResLimit(void *stream, int type, uint32_t *value) { return *value = 20, 0; }
int aclrtGetResInCurrentThread(int type, uint32_t *value) { return *value = 20, 0; }
int aclrtGetLogicDevIdByUserDevId(int user, int *logical) { return *logical = user, 0; }
int aclsysGetVersionStr(const char *package, char *version) { return strcpy(version, "9.1.0"), 0; }
int aclsysGetCANNVersion(int package, char *version) { return strcpy(version, "9.1.0"), 0; }
int aclGetCannAttribute(int attribute, int32_t *value) { return *value = 1, 0; }
int aclGetCannAttributeList(const int **list, size_t *count) { return *list = 0, *count = 0, 0; }
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) { return *value = 0, 0; }

/* -- memory -------------------------------------------------------------------------------------------- */

static int take(void **out, uint64_t size, int device) {
  uint64_t mapped = (size + 2 * ALIGNMENT + 4095) / 4096 * 4096, total = sim_number("NPU_SIMULATOR_MEMORY", 8ULL << 30);
  pthread_mutex_lock(&lock);
  int fits = device < 0 || used[device] + mapped <= total;
  if (fits && device >= 0)
    used[device] += mapped;
  pthread_mutex_unlock(&lock);
  if (!fits)
    return sim_refuse(OUT_OF_MEMORY, "simulated CANN: device %d has %llu bytes, %llu are used, %llu were asked for",
                      device, (unsigned long long)total, (unsigned long long)used[device], (unsigned long long)size);
  char *base = mmap(0, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    return sim_refuse(OUT_OF_MEMORY, "simulated CANN: the host has no %llu bytes", (unsigned long long)mapped);
  struct block *b = (struct block *)base;
  b->mapped = mapped, b->device = device, b->address = base + ALIGNMENT;
  pthread_mutex_lock(&lock);
  b->next = blocks.next, b->previous = &blocks;
  b->next->previous = blocks.next = b;
  pthread_mutex_unlock(&lock);
  return *out = b->address, 0;
}

static int give(void *address) {
  struct block *b = (struct block *)((char *)address - ALIGNMENT);
  pthread_mutex_lock(&lock);
  b->next->previous = b->previous, b->previous->next = b->next;
  if (b->device >= 0)
    used[b->device] -= b->mapped;
  pthread_mutex_unlock(&lock);
  return munmap(b, b->mapped), 0;
}

int aclrtMalloc(void **out, uint64_t size, int policy) { return take(out, size, current); }
int aclrtMallocAlign32(void **out, uint64_t size, int policy) { return take(out, size, current); }
int aclrtFree(void *address) { return give(address); }
int aclrtMallocHost(void **out, uint64_t size) { return take(out, size, -1); }
int aclrtMallocHostWithCfg(void **out, uint64_t size, void *config) { return take(out, size, -1); }
int aclrtFreeHost(void *address) { return give(address); }
int aclrtGetMemInfo(int kind, uint64_t *free_bytes, uint64_t *total) {
  *total = sim_number("NPU_SIMULATOR_MEMORY", 8ULL << 30);
  return *free_bytes = *total - used[current], 0;
}
/* location {uint32 id; enum type}, uint32 page size: 0 host, 1 device, 2 unregistered. */
int aclrtPointerGetAttributes(const void *pointer, uint32_t *attributes) {
  attributes[0] = 0, attributes[1] = 2, attributes[2] = 4096;
  pthread_mutex_lock(&lock);
  for (struct block *b = blocks.next; b != &blocks; b = b->next)
    if ((char *)pointer >= (char *)b && (char *)pointer < (char *)b + b->mapped)
      attributes[0] = b->device < 0 ? 0 : b->device, attributes[1] = b->device < 0 ? 0 : 1;
  pthread_mutex_unlock(&lock);
  return 0;
}
int aclrtMemcpy(void *to, uint64_t room, const void *from, uint64_t size, int kind) {
  if (size > room)
    return sim_refuse(INVALID_PARAM, "simulated CANN: a copy of %llu bytes into %llu", (unsigned long long)size,
                      (unsigned long long)room);
  return memcpy(to, from, size), 0;
}
int aclrtMemcpyAsync(void *to, uint64_t room, const void *from, uint64_t size, int kind, void *stream) {
  return aclrtMemcpy(to, room, from, size, kind);
}
int aclrtMemset(void *to, uint64_t room, int value, uint64_t size) {
  return size > room ? INVALID_PARAM : (memset(to, value, size), 0);
}
int aclrtMemsetAsync(void *to, uint64_t room, int value, uint64_t size, void *stream) {
  return aclrtMemset(to, room, value, size);
}
int aclrtReserveMemAddress(void **out, uint64_t size, uint64_t alignment, void *expected, uint64_t flags) {
  return sim_refuse(UNSUPPORTED, "simulated CANN: has no virtual memory management; set expandable_segments:False");
}

/* -- streams and events -------------------------------------------------------------------------------- */

int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flag) {
  int most = (int)sim_number("NPU_SIMULATOR_STREAMS", 1984);
  if (num_streams[current] >= most)
    return sim_refuse(OUT_OF_STREAMS, "simulated CANN: device %d has %d streams, all are taken", current, most);
  struct stream *s = calloc(1, sizeof *s);
  num_streams[current]++;
  s->id = next_stream++, s->device = current;
  return *out = s, 0;
}
int aclrtCreateStream(void **out) { return aclrtCreateStreamWithConfig(out, 0, 0); }
int aclrtDestroyStream(void *stream) { return num_streams[((struct stream *)stream)->device]--, free(stream), 0; }
int aclrtDestroyStreamForce(void *stream) { return aclrtDestroyStream(stream); }
int aclrtStreamGetId(void *stream, int *id) { return *id = stream ? ((struct stream *)stream)->id : 0, 0; }
int aclrtStreamQuery(void *stream, int *status) { return *status = 0, 0; }
int sim_num_streams(void) { return num_streams[current]; }
static int held; /* by captured graphs */
int sim_hold_streams(int number) { return held = number, 0; }
int aclrtGetStreamAvailableNum(uint32_t *count) {
  int left = (int)sim_number("NPU_SIMULATOR_STREAMS", 1984) - num_streams[current] - held;
  return *count = left > 0 ? left : 0, 0;
}

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
/* External events are those that a graph waits for; others only make a stream join a capture. */
static int tell(int kind, struct event *event, struct stream *stream) {
  if (event->flag & 0x20)
    return sim_hooks.event ? sim_hooks.event(kind, event, stream) : 0;
  if (kind == 0)
    event->captured = stream && stream->capturing;
  if (kind == 1 && event->captured && stream && !stream->capturing && sim_hooks.event)
    return sim_hooks.event(3, event, stream);
  return 0;
}
int aclrtCreateEventWithFlag(void **out, uint32_t flag) {
  struct event *e = calloc(1, sizeof *e);
  return e->flag = flag, *out = e, 0;
}
int aclrtCreateEvent(void **out) { return aclrtCreateEventWithFlag(out, 0); }
int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { return aclrtCreateEventWithFlag(out, flag); }
int aclrtDestroyEvent(void *event) { return free(event), 0; }
int aclrtRecordEvent(void *event, void *stream) {
  ((struct event *)event)->recorded = 1, ((struct event *)event)->at_ms = now_ms();
  return tell(0, event, stream);
}
int aclrtStreamWaitEvent(void *stream, void *event) { return tell(1, event, stream); }
int aclrtResetEvent(void *event, void *stream) { return tell(2, event, stream); }
int aclrtQueryEventStatus(void *event, int *status) { return *status = 1, 0; }
int aclrtQueryEventWaitStatus(void *event, int *status) { return *status = 0, 0; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) {
  return *ms = (float)(((struct event *)end)->at_ms - ((struct event *)start)->at_ms), 0;
}
int aclrtEventGetTimestamp(void *event, uint64_t *us) { return *us = ((struct event *)event)->at_ms * 1e3, 0; }

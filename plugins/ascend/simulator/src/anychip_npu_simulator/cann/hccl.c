/* HCCL: ranks meet and exchange in Python, by gloo; here calls become a name and up to eight numbers. */
#include "simulator.h"
#include <stdio.h>
#include <string.h>

enum { INTERNAL = 4 };
typedef uint64_t u64;

static int call(const char *what, void *send, void *recv, void *stream, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f) {
  u64 numbers[6] = {a, b, c, d, e, f};
  return sim_hooks.collective ? sim_hooks.collective(what, send, recv, numbers, stream) : INTERNAL;
}
#define COMM(comm) ((u64)(uintptr_t)(comm))

int HcclGetRootInfo(void *info) { return call("root_info", 0, info, 0, 0, 0, 0, 0, 0, 0); }
int HcclCommInitRootInfoConfig(uint32_t size, const void *info, uint32_t rank, const void *config, void **comm) {
  return call("init", (void *)info, comm, 0, size, rank, config ? *(const uint32_t *)((const char *)config + 24) : 0, 0,
              0, 0);
}
int HcclCommInitRootInfo(uint32_t size, const void *info, uint32_t rank, void **comm) {
  return HcclCommInitRootInfoConfig(size, info, rank, 0, comm);
}
int HcclCommDestroy(void *comm) { return call("destroy", 0, 0, 0, 0, 0, 0, 0, 0, COMM(comm)); }
int HcclGetCommAsyncError(void *comm, int *error) { return *error = 0, 0; }
uint32_t HcclGetCommConfigCapability(void) { return 3; }
int HcclGetCommName(void *comm, char *name) { return sprintf(name, "simulated-%llu", (unsigned long long)COMM(comm)), 0; }
const char *HcclGetErrorString(int code) { return code ? "simulated HCCL: see the error's words" : "no error"; }
int HcclSetConfig(int config, int value) { return 0; }
int HcclGroupStart(void) { return 0; }
int HcclGroupEnd(void) { return 0; }

int HcclAllReduce(void *send, void *recv, u64 count, int type, int op, void *comm, void *stream) {
  return call("all_reduce", send, recv, stream, count, type, op, 0, 0, COMM(comm));
}
int HcclBroadcast(void *buffer, u64 count, int type, uint32_t root, void *comm, void *stream) {
  return call("broadcast", buffer, buffer, stream, count, type, root, 0, 0, COMM(comm));
}
int HcclAllGather(void *send, void *recv, u64 count, int type, void *comm, void *stream) {
  return call("all_gather", send, recv, stream, count, type, 0, 0, 0, COMM(comm));
}
int HcclReduceScatter(void *send, void *recv, u64 count, int type, int op, void *comm, void *stream) {
  return call("reduce_scatter", send, recv, stream, count, type, op, 0, 0, COMM(comm));
}
int HcclAlltoAll(const void *send, u64 count, int type, const void *recv, u64 rcount, int rtype, void *comm, void *s) {
  return call("all_to_all", (void *)send, (void *)recv, s, count, type, rcount, rtype, 0, COMM(comm));
}
int HcclAlltoAllV(const void *send, const void *counts, const void *offsets, int type, const void *recv,
                  const void *rcounts, const void *roffsets, int rtype, void *comm, void *stream) {
  return call("all_to_all_v", (void *)send, (void *)recv, stream, COMM(counts), type, COMM(offsets), COMM(rcounts),
              COMM(roffsets), COMM(comm));
}
int HcclSend(void *buffer, u64 count, int type, uint32_t to, void *comm, void *stream) {
  return call("send", buffer, buffer, stream, count, type, to, 0, 0, COMM(comm));
}
int HcclRecv(void *buffer, u64 count, int type, uint32_t from, void *comm, void *stream) {
  return call("recv", buffer, buffer, stream, count, type, from, 0, 0, COMM(comm));
}
int HcclBarrier(void *comm, void *stream) { return call("barrier", 0, 0, stream, 0, 0, 0, 0, 0, COMM(comm)); }

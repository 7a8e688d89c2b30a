/* What the parts of the simulated CANN share: the machine that is simulated, and the hooks by which Python simulates
   graphs and collectives. */
#ifndef NPU_SIMULATOR_SIMULATOR_H
#define NPU_SIMULATOR_SIMULATOR_H
#include <stdint.h>

struct hooks {
  /* Graphs. A hook returns an ACL error code, 0 for success. Handles are numbers that Python gives. */
  int (*capture_begin)(void *stream, uint64_t *model);
  int (*capture_end)(void *stream);
  int (*execute)(uint64_t model, void *stream);
  int (*destroy)(uint64_t model);
  int (*group_begin)(void *stream);
  int (*group_end)(void *stream, uint64_t *group);
  int (*update_begin)(void *stream, uint64_t group);
  int (*update_end)(void *stream);
  /* kind: 0 record, 1 wait, 2 reset of an external event; 3 a stream joins a capture by an event. */
  int (*event)(int kind, void *event, void *stream);
  /* Collectives: `what` names the function, arguments are those of hccl.c. */
  int (*collective)(const char *what, void *send, void *recv, const uint64_t *numbers, void *stream);
};
extern struct hooks sim_hooks;

int sim_refuse(int code, const char *format, ...); /* keeps the words for aclGetRecentErrMsg, returns code */
long sim_trace(const char *name); /* a function of which nothing is simulated: 0 */
uint64_t sim_number(const char *variable, uint64_t otherwise);

struct stream {
  int id, device, capturing;
  uint64_t model;
};
struct event {
  uint32_t flag;
  int recorded, captured;
  double at_ms;
};
#endif

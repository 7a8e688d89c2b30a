/* ACL graphs: the calls of aclmdlRI*, handed to the hooks with which Python records and replays. */
#include "simulator.h"
#include <stddef.h>

enum { UNSUPPORTED = 207000, INVALID_PARAM = 107000 };

int aclmdlRICaptureBegin(void *stream, int mode) {
  struct stream *s = stream;
  if (!sim_hooks.capture_begin)
    return sim_refuse(UNSUPPORTED, "simulated CANN: graphs need the simulator's Python part");
  int error = sim_hooks.capture_begin(stream, &s->model);
  if (!error)
    s->capturing = 1;
  return error;
}
int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) {
  struct stream *s = stream;
  *status = s && s->capturing;
  if (model)
    *model = s && s->capturing ? (void *)(uintptr_t)s->model : NULL;
  return 0;
}
int aclmdlRICaptureEnd(void *stream, void **model) {
  struct stream *s = stream;
  s->capturing = 0;
  return *model = (void *)(uintptr_t)s->model, sim_hooks.capture_end(stream);
}
int aclmdlRICaptureThreadExchangeMode(int *mode) { return 0; }
int aclmdlRIGetId(void *model, uint32_t *id) { return *id = (uint32_t)(uintptr_t)model, 0; }
int aclmdlRIDebugPrint(void *model) { return 0; }
int aclmdlRIExecuteAsync(void *model, void *stream) { return sim_hooks.execute((uintptr_t)model, stream); }
int aclmdlRIDestroy(void *model) { return sim_hooks.destroy((uintptr_t)model); }
int aclmdlRICaptureTaskGrpBegin(void *stream) { return sim_hooks.group_begin(stream); }
int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) {
  uint64_t number = 0;
  int error = sim_hooks.group_end(stream, &number);
  return *group = (void *)(uintptr_t)number, error;
}
int aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) {
  return sim_hooks.update_begin(stream, (uintptr_t)group);
}
int aclmdlRICaptureTaskUpdateEnd(void *stream) { return sim_hooks.update_end(stream); }

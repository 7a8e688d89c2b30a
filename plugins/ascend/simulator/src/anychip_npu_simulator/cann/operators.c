/* Operators of the old interface (aclopCompileAndExecute), which the vendor's C++ still calls where it does not go
   through torch's dispatcher: ProcessGroupHCCL pads short messages to 512 bytes. Any other is refused by name. */
#include "simulator.h"
#include <stdlib.h>
#include <string.h>

enum { UNSUPPORTED = 207000, MAX_DIMS = 8 };

struct desc {
  int type, num_dims;
  int64_t dims[MAX_DIMS];
};
struct buffer {
  void *data;
  uint64_t size;
};

void *aclCreateTensorDesc(int type, int num_dims, const int64_t *dims, int format) {
  struct desc *d = calloc(1, sizeof *d);
  d->type = type, d->num_dims = num_dims > MAX_DIMS ? MAX_DIMS : num_dims;
  for (int i = 0; i < d->num_dims; i++)
    d->dims[i] = dims[i];
  return d;
}
void aclDestroyTensorDesc(void *desc) { free(desc); }
void *aclCreateDataBuffer(void *data, uint64_t size) {
  struct buffer *b = malloc(sizeof *b);
  return b->data = data, b->size = size, b;
}
int aclDestroyDataBuffer(void *buffer) { return free(buffer), 0; }

static uint64_t item_size(int type) {
  switch (type) {
  case 2: case 4: case 12: return 1;  /* int8, uint8, bool */
  case 1: case 6: case 7: case 27: return 2; /* float16, int16, uint16, bfloat16 */
  case 0: case 3: case 8: return 4;   /* float, int32, uint32 */
  case 9: case 10: case 11: return 8; /* int64, uint64, double */
  }
  return 0;
}
static uint64_t bytes(const struct desc *d) {
  uint64_t size = item_size(d->type);
  for (int i = 0; i < d->num_dims; i++)
    size *= d->dims[i];
  return size;
}

static int fill(struct desc **in, struct buffer **given, struct desc *out, struct buffer *to) {
  uint64_t item = item_size(out->type), total = bytes(out);
  for (uint64_t at = 0; item && at < total; at += item)
    memcpy((char *)to->data + at, given[1]->data, item);
  return 0;
}

/* Zeros around x; paddings are two numbers a dimension, before and after. */
static int pad(struct desc **in, struct buffer **given, struct desc *out, struct buffer *to) {
  struct desc *x = in[0];
  int last = x->num_dims - 1;
  uint64_t item = item_size(x->type), row = item, total = bytes(x);
  int64_t before[MAX_DIMS], at[MAX_DIMS] = {0};
  if (last < 0 || !total)
    return memset(to->data, 0, bytes(out)), 0;
  for (int i = 0; i <= last; i++)
    before[i] = in[1]->type == 9 ? ((int64_t *)given[1]->data)[2 * i] : ((int32_t *)given[1]->data)[2 * i];
  row *= x->dims[last];
  memset(to->data, 0, bytes(out));
  for (uint64_t from = 0; from < total; from += row) {
    uint64_t place = 0;
    for (int i = 0; i <= last; i++)
      place = place * out->dims[i] + before[i] + (i < last ? at[i] : 0);
    memcpy((char *)to->data + place * item, (char *)given[0]->data + from, row);
    for (int i = last - 1; i >= 0 && ++at[i] == x->dims[i]; i--)
      at[i] = 0;
  }
  return 0;
}

int aclopCompileAndExecute(const char *op, int num_in, struct desc **in, struct buffer **given, int num_out,
                           struct desc **out, struct buffer **to) {
  if (!strcmp(op, "Fill"))
    return fill(in, given, out[0], to[0]);
  if (!strcmp(op, "PadV3"))
    return pad(in, given, out[0], to[0]);
  return sim_refuse(UNSUPPORTED, "simulated CANN: operator %s is not simulated; a kernel of the simulator should serve it",
                    op);
}
int aclopCompileAndExecuteV2(const char *op, int num_in, void **in, void **given, int num_out, void **out, void **to) {
  return aclopCompileAndExecute(op, num_in, (struct desc **)in, (struct buffer **)given, num_out, (struct desc **)out,
                                (struct buffer **)to);
}

// The Python module. Tensors come as addresses, structures as bytes that Python packed: no header of torch is needed
// to build this, and no version of torch to run it. Arguments are the callers' to get right; anychip_cpu is the only one.
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <mutex>

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "choice_types.h"
#include "kernels.h"
#include "packing.h"
#include "panel_rows.h"
#include "plan.h"
#include "pool.h"
#include "recording.h"
#include "routing.h"
#include "sampling.h"
#include "shared_memory.h"
#include "tensors.h"

namespace anychip {
namespace {

// Objects that Python holds.
template <class T>
constexpr const char* kNameOf = nullptr;
template <>
constexpr const char* kNameOf<Recording> = "anychip_cpu.recording";
template <>
constexpr const char* kNameOf<StepPlan> = "anychip_cpu.plan";

// Reads arguments one after the other; the first wrong one stays as Python's error.
class Arguments {
 public:
  Arguments(PyObject* const* args, Py_ssize_t count) : next_(args), end_(args + count) {}

  int64_t integer() {
    if (PyObject* value = take()) return PyLong_AsLongLong(value);
    return 0;
  }
  double real() {
    if (PyObject* value = take()) return PyFloat_AsDouble(value);
    return 0;
  }
  template <class T>
  T* address() {
    return (T*)integer();
  }
  DType type() { return DType(integer()); }
  // Bytes that hold a T.
  template <class T>
  const T* structure() {
    static const T none{};
    PyObject* value = take();
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (!value || PyBytes_AsStringAndSize(value, &data, &size) < 0) return &none;
    if (size != sizeof(T)) {
      PyErr_Format(PyExc_ValueError, "a structure of %zd bytes; the kernels were built for %zu", size, sizeof(T));
      return &none;
    }
    return (const T*)data;
  }
  template <class T>
  T* object() {
    PyObject* value = take();
    return value ? (T*)PyCapsule_GetPointer(value, kNameOf<T>) : nullptr;
  }
  bool failed() const { return PyErr_Occurred() != nullptr; }

 private:
  PyObject* take() {
    if (next_ != end_) return *next_++;
    PyErr_SetString(PyExc_TypeError, "too few arguments");
    return nullptr;
  }
  PyObject* const* next_;
  PyObject* const* end_;
};

// One call at a time: kernels share the pool and storage that is kept between calls.
std::mutex in_use;

template <class Fn>
PyObject* without_gil(const Fn& fn) {
  if (current_recording) {
    PyErr_SetString(PyExc_NotImplementedError, "a compiled function that is not listed in recordings");
    return nullptr;
  }
  bool memory = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    std::lock_guard<std::mutex> lock(in_use);
    fn();
  } catch (const std::bad_alloc&) {
    memory = false;
  }
  Py_END_ALLOW_THREADS;
  if (!memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// fn(call) now; while this thread records, it is listed instead. `rows`: the field that says how many rows the call is
// for, which follows the step's tokens.
template <class Call, class Fn>
PyObject* launch(const Call& call, int64_t Call::*rows, Fn fn) {
  if (!current_recording) return without_gil([&] { fn(call); });
  current_recording->add(call, rows, fn);
  Py_RETURN_NONE;
}

// Of a call whose sizes lie in memory.
template <class Call, class Fn>
PyObject* launch(const Call& call, Fn fn) {
  if (!current_recording) return without_gil([&] { fn(call); });
  current_recording->add(call, fn);
  Py_RETURN_NONE;
}

template <class T>
PyObject* held(T* made) {
  PyObject* capsule = PyCapsule_New(made, kNameOf<T>, [](PyObject* c) { delete (T*)PyCapsule_GetPointer(c, kNameOf<T>); });
  if (!capsule) delete made;
  return capsule;
}

using Args = PyObject* const*;

PyObject* set_thread_count(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const int64_t threads = a.integer();
  if (a.failed()) return nullptr;
  return without_gil([&] { set_threads(int(threads)); });
}

// (weights, source, rows, first, span, lane)
PyObject* pack_rows(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  PackRows p;
  p.w = a.structure<PackedWeights>()->weights();
  p.source = a.address<void>();
  p.rows = a.integer(), p.first = a.integer(), p.span = a.integer(), p.lane = a.integer();
  if (a.failed()) return nullptr;
  return without_gil([&] { pack(p); });
}

// (weights, x, x type, m, ldx, bias, out, out type, ldo, plain): plain weights lie row by row
PyObject* linear(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Gemm g;
  g.w = a.structure<PackedWeights>()->weights();
  g.x = a.address<void>(), g.x_type = a.type(), g.m = a.integer(), g.ldx = a.integer();
  g.bias = a.address<void>();
  g.out = a.address<void>(), g.out_type = a.type(), g.ldo = a.integer();
  const bool plain = a.integer();
  if (a.failed()) return nullptr;
  return launch(g, &Gemm::m, [plain](const Gemm& g) { plain ? rows(g) : gemm(g); });
}

// (weights, ids, count, out, out type): rows of coded weights
PyObject* read_panel_rows(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  PanelRows r;
  r.w = a.structure<PackedWeights>()->weights();
  r.ids = a.address<int64_t>(), r.count = a.integer();
  r.out = a.address<void>(), r.type = a.type();
  if (a.failed()) return nullptr;
  return launch(r, &PanelRows::count, [](const PanelRows& r) { panel_rows(r); });
}

// (data, bytes): reads them, for the memory's speed
PyObject* read_memory(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const auto* data = a.address<float>();
  const int64_t bytes = a.integer();
  if (a.failed()) return nullptr;
  return without_gil([&] { read(data, bytes / int64_t(sizeof(float))); });
}

// (type, x, residual, weight, out, total, rows, width, ldx, ldr, eps, unit_offset)
PyObject* rms_norm(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Norm n;
  n.type = a.type();
  n.x = a.address<void>(), n.residual = a.address<void>(), n.weight = a.address<void>();
  n.out = a.address<void>(), n.total = a.address<void>();
  n.rows = a.integer(), n.width = a.integer(), n.ldx = a.integer(), n.ldr = a.integer();
  n.eps = float(a.real()), n.unit_offset = a.integer();
  if (a.failed()) return nullptr;
  return launch(n, &Norm::rows, [](const Norm& n) { norm(n); });
}

// (type, x, out, rows, width, ldx, activation)
PyObject* gated_activation(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Gate g;
  g.type = a.type(), g.x = a.address<void>(), g.out = a.address<void>();
  g.rows = a.integer(), g.width = a.integer(), g.ldx = a.integer(), g.activation = Activation(a.integer());
  if (a.failed()) return nullptr;
  return launch(g, &Gate::rows, [](const Gate& g) { gate(g); });
}

// (ids, weight, out, tokens, rows, row bytes, first): an id that the rows do not hold becomes zeros
PyObject* embedding(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Lookup l;
  l.ids = a.address<int32_t>(), l.weight = a.address<char>(), l.out = a.address<char>();
  l.tokens = a.integer(), l.rows = a.integer(), l.row_bytes = a.integer(), l.first = a.integer();
  if (a.failed()) return nullptr;
  return launch(l, &Lookup::tokens, [](const Lookup& l) { look_up(l); });
}

// (query_start, seq_lens, block_table, slots, positions, rows, tokens, table_stride, kv_heads, group, window) -> a step's
// plan over these arrays, which `renew_plan` reads
PyObject* new_plan(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Batch b{};
  b.query_start = a.address<int32_t>(), b.seq_lens = a.address<int32_t>(), b.block_table = a.address<int32_t>();
  b.slots = a.address<int64_t>(), b.positions = a.address<int32_t>();
  b.rows = a.integer(), b.room = a.integer(), b.table_stride = a.integer();
  const int64_t kv_heads = a.integer(), group = a.integer(), window = a.integer();
  if (a.failed()) return nullptr;
  return held(new StepPlan(b, kv_heads, group, window));
}

// (plan) -> the step's tokens, padding aside
PyObject* renew_plan(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  StepPlan* plan = a.object<StepPlan>();
  if (a.failed()) return nullptr;
  plan->renew(num_threads());
  return PyLong_FromLongLong(plan->batch.tokens);
}

// (layer, plan, q, ldq, k, ldk, v, ldv, cache, out, and where it is wanted lse)
PyObject* paged_attention(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const Layer* layer = a.structure<Layer>();
  const StepPlan* plan = a.object<StepPlan>();
  if (a.failed()) return nullptr;
  AttentionCall call{*layer, plan->batch, nullptr, nullptr, nullptr, 0, 0, 0, nullptr, nullptr, nullptr};
  call.q = a.address<void>(), call.ldq = a.integer();
  call.k = a.address<void>(), call.ldk = a.integer();
  call.v = a.address<void>(), call.ldv = a.integer();
  call.cache = a.address<char>(), call.out = a.address<void>();
  if (count > 10) call.lse = a.address<float>();
  if (a.failed()) return nullptr;
  return launch(call, [](const AttentionCall& call) {
    clear_padding(call);
    attention(call);
  });
}

// (layer, step, inputs, cache, out): writes the step's rows, then attends
PyObject* absorbed_attention(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const auto* layer = a.structure<LatentLayer>();
  const auto* step = a.structure<LatentStep>();
  const auto* inputs = a.structure<LatentInputs>();
  LatentCall call{*layer, *step, *inputs, nullptr, nullptr};
  call.cache = a.address<void>(), call.out = a.address<void>();
  if (a.failed()) return nullptr;
  return launch(call, [](const LatentCall& call) { latent_attention(call); });
}

// (layer, step, inputs, cache, chosen): writes the step's index keys, then chooses
PyObject* choose_tokens(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const auto* layer = a.structure<IndexLayer>();
  const auto* step = a.structure<LatentStep>();
  const auto* inputs = a.structure<IndexInputs>();
  ChoiceCall call{*layer, *step, *inputs, nullptr, nullptr};
  call.cache = a.address<void>(), call.chosen = a.address<int32_t>();
  if (a.failed()) return nullptr;
  return launch(call, [](const ChoiceCall& call) { choose(call); });
}

// (rule, step, inputs, states, out)
PyObject* advance_matrix(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const auto* rule = a.structure<MatrixRule>();
  const auto* step = a.structure<StateStep>();
  const auto* inputs = a.structure<MatrixInputs>();
  MatrixCall call{*rule, *step, *inputs, nullptr, nullptr};
  call.states = a.address<float>(), call.out = a.address<void>();
  if (a.failed()) return nullptr;
  return launch(call, [](const MatrixCall& call) { matrix_state(call); });
}

// (step, type, channels, width, weight, bias, x, ldx, tails, out)
PyObject* causal_convolution(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  ConvolutionCall call{};
  call.step = *a.structure<StateStep>();
  call.type = a.integer(), call.channels = a.integer(), call.width = a.integer();
  call.weight = a.address<void>(), call.bias = a.address<void>();
  call.x = a.address<void>(), call.ldx = a.integer(), call.tails = a.address<void>(), call.out = a.address<void>();
  if (a.failed()) return nullptr;
  return launch(call, [](const ConvolutionCall& call) { convolution(call); });
}

// (step, type, channels, state_dim, a, d, x, ldx, dt, lddt, b, ldb, c, ldc, states, out)
PyObject* selective_scan(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  ScanCall call{};
  call.step = *a.structure<StateStep>();
  call.type = a.integer(), call.channels = a.integer(), call.state_dim = a.integer();
  call.a = a.address<float>(), call.d = a.address<float>();
  call.x = a.address<void>(), call.ldx = a.integer(), call.dt = a.address<float>(), call.lddt = a.integer();
  call.b = a.address<void>(), call.ldb = a.integer(), call.c = a.address<void>(), call.ldc = a.integer();
  call.states = a.address<float>(), call.out = a.address<void>();
  if (a.failed()) return nullptr;
  return launch(call, [](const ScanCall& call) { scan(call); });
}

// (experts, type, x, ldx, out, ids, weights, tokens, top_k)
PyObject* fused_moe(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const Experts* experts = a.structure<Experts>();
  Moe m{*experts, DType::f32, nullptr, nullptr, nullptr, nullptr, 0, 0, 0};
  m.type = a.type(), m.x = a.address<void>(), m.ldx = a.integer(), m.out = a.address<void>();
  m.ids = a.address<int64_t>(), m.weights = a.address<float>(), m.tokens = a.integer(), m.top_k = a.integer();
  if (a.failed()) return nullptr;
  return launch(m, &Moe::tokens, [](const Moe& m) { moe(m); });
}

// (type, x, ldx, y, ldy, stack, slot of each token, tokens); the stack's bytes hold down, up, scales, ranks, slots, parts,
// max rank, inputs, outputs, and the address of the offsets of the parts
PyObject* add_low_rank(PyObject*, Args args, Py_ssize_t count) {
  struct Stack {
    int64_t down, up, scales, ranks, slots, parts, max_rank, in, out, offsets;
  };
  Arguments a(args, count);
  LowRank l;
  l.type = a.type(), l.x = a.address<void>(), l.ldx = a.integer(), l.y = a.address<void>(), l.ldy = a.integer();
  const Stack s = *a.structure<Stack>();
  l.slot_of = a.address<int32_t>(), l.tokens = a.integer();
  if (a.failed()) return nullptr;
  l.down = (const void*)s.down, l.up = (const void*)s.up;
  l.scales = (const float*)s.scales, l.ranks = (const int32_t*)s.ranks, l.offsets = (const int64_t*)s.offsets;
  l.slots = s.slots, l.parts = s.parts, l.max_rank = s.max_rank, l.in = s.in, l.out = s.out;
  return launch(l, &LowRank::tokens, [](const LowRank& l) { low_rank(l); });
}

// (type, logits, bias, tokens, experts, ld, top_k, sigmoid, renormalize, scale, weights, ids)
PyObject* route_tokens(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Route r;
  r.type = a.type(), r.logits = a.address<void>(), r.bias = a.address<float>();
  r.tokens = a.integer(), r.experts = a.integer(), r.ld = a.integer(), r.top_k = a.integer();
  r.sigmoid = a.integer(), r.renormalize = a.integer(), r.scale = float(a.real());
  r.weights = a.address<float>(), r.ids = a.address<int64_t>();
  if (a.failed()) return nullptr;
  return launch(r, &Route::tokens, [](const Route& r) { route(r); });
}

// (logits, rows, vocab, ld, temperature, top_k, top_p, min_p, seed_low, seed_high, sample_index, position, ids)
PyObject* sample_tokens(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Sample s;
  s.logits = a.address<float>(), s.rows = a.integer(), s.vocab = a.integer(), s.ld = a.integer();
  s.temperature = a.address<float>(), s.top_k = a.address<int32_t>();
  s.top_p = a.address<float>(), s.min_p = a.address<float>();
  s.seed_low = a.address<int32_t>(), s.seed_high = a.address<int32_t>();
  s.sample_index = a.address<int32_t>(), s.position = a.address<int32_t>();
  s.ids = a.address<int32_t>();
  if (a.failed()) return nullptr;
  return launch(s, &Sample::rows, [](const Sample& s) { sample(s); });
}

// (logits, out, rows, vocab, ld, slots, counts, repetition, presence, frequency, bias_ids, biases, num_biases, width)
PyObject* edit_row_logits(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Edits e;
  e.logits = a.address<float>(), e.out = a.address<float>();
  e.rows = a.integer(), e.vocab = a.integer(), e.ld = a.integer();
  e.slots = a.address<int32_t>(), e.counts = a.address<int32_t>();
  e.repetition = a.address<float>(), e.presence = a.address<float>(), e.frequency = a.address<float>();
  e.bias_ids = a.address<int32_t>(), e.biases = a.address<float>(), e.num_biases = a.address<int32_t>();
  e.width = a.integer();
  if (a.failed()) return nullptr;
  return launch(e, &Edits::rows, [](const Edits& e) { edit_logits(e); });
}

// (logits, masks, out, rows, vocab, ld, words)
PyObject* mask_tokens(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Masks m;
  m.logits = a.address<float>(), m.masks = a.address<int32_t>(), m.out = a.address<float>();
  m.rows = a.integer(), m.vocab = a.integer(), m.ld = a.integer(), m.words = a.integer();
  if (a.failed()) return nullptr;
  return launch(m, &Masks::rows, [](const Masks& m) { apply_masks(m); });
}

// (op, type, out type, a, b, condition, out, rows, width, scalar)
PyObject* elementwise(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Elementwise e;
  e.op = Elementwise::Op(a.integer()), e.type = a.type(), e.out_type = a.type();
  e.a = a.address<void>(), e.b = a.address<void>(), e.condition = a.address<bool>(), e.out = a.address<void>();
  e.rows = a.integer(), e.width = a.integer(), e.scalar = a.real();
  if (a.failed()) return nullptr;
  return launch(e, &Elementwise::rows, [](const Elementwise& e) { apply(e); });
}

// (source, indices, whether they are int64, out, rows, source rows, row bytes)
PyObject* gather_rows(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Gather g;
  g.source = a.address<char>(), g.indices = a.address<void>(), g.wide = a.integer(), g.out = a.address<char>();
  g.rows = a.integer(), g.source_rows = a.integer(), g.row_bytes = a.integer();
  if (a.failed()) return nullptr;
  return launch(g, &Gather::rows, [](const Gather& g) { gather(g); });
}

// (base, indices, source, out, rows, base rows, row bytes)
PyObject* replaced_rows(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Replace r;
  r.base = a.address<char>(), r.indices = a.address<int64_t>(), r.source = a.address<char>(), r.out = a.address<char>();
  r.rows = a.integer(), r.base_rows = a.integer(), r.row_bytes = a.integer();
  if (a.failed()) return nullptr;
  return launch(r, &Replace::rows, [](const Replace& r) { replace_rows(r); });
}

// (region, rank, ranks, slot bytes, data, elements, type, timeout in seconds) -> whether every rank came
PyObject* shared_all_reduce(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  SharedReduce r;
  r.region = a.address<char>(), r.rank = a.integer(), r.ranks = a.integer(), r.slot_bytes = a.integer();
  r.data = a.address<char>(), r.elements = a.integer(), r.type = a.type();
  r.timeout_s = a.real();
  if (a.failed()) return nullptr;
  bool met = false;
  Py_BEGIN_ALLOW_THREADS;
  met = all_reduce(r);
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(met);
}

// (tokens) -> a recording of a step of so many
PyObject* new_recording(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const int64_t tokens = a.integer();
  if (a.failed()) return nullptr;
  return held(new Recording(tokens));
}

// (recording, or nothing): this thread's calls are listed there from now on, or made again
PyObject* record(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  Recording* recording = count ? a.object<Recording>() : nullptr;
  if (a.failed()) return nullptr;
  current_recording = recording;
  Py_RETURN_NONE;
}

// (recording) -> how many calls it lists
PyObject* num_recorded(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const Recording* recording = a.object<Recording>();
  if (a.failed()) return nullptr;
  return PyLong_FromLongLong(recording->size());
}

// (recording, first, last, tokens): makes these calls, for so many tokens
PyObject* replay(PyObject*, Args args, Py_ssize_t count) {
  Arguments a(args, count);
  const Recording* recording = a.object<Recording>();
  const int64_t first = a.integer(), last = a.integer(), tokens = a.integer();
  if (a.failed()) return nullptr;
  return without_gil([&] { recording->replay(first, last, tokens); });
}

#define ENTRY(name, function) {name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    ENTRY("set_threads", set_thread_count),
    ENTRY("pack_rows", pack_rows),
    ENTRY("linear", linear),
    ENTRY("panel_rows", read_panel_rows),
    ENTRY("read", read_memory),
    ENTRY("rms_norm", rms_norm),
    ENTRY("gated_activation", gated_activation),
    ENTRY("embedding", embedding),
    ENTRY("new_plan", new_plan),
    ENTRY("renew_plan", renew_plan),
    ENTRY("attention", paged_attention),
    ENTRY("latent_attention", absorbed_attention),
    ENTRY("choose", choose_tokens),
    ENTRY("matrix_state", advance_matrix),
    ENTRY("convolution", causal_convolution),
    ENTRY("scan", selective_scan),
    ENTRY("route", route_tokens),
    ENTRY("moe", fused_moe),
    ENTRY("add_low_rank", add_low_rank),
    ENTRY("sample", sample_tokens),
    ENTRY("edit_logits", edit_row_logits),
    ENTRY("apply_token_masks", mask_tokens),
    ENTRY("elementwise", elementwise),
    ENTRY("gather", gather_rows),
    ENTRY("replace", replaced_rows),
    ENTRY("all_reduce", shared_all_reduce),
    ENTRY("new_recording", new_recording),
    ENTRY("record", record),
    ENTRY("num_recorded", num_recorded),
    ENTRY("replay", replay),
    {nullptr, nullptr, 0, nullptr},
};
#undef ENTRY

#define TEXT(name) #name
#define NAME_OF(module) TEXT(module)
PyModuleDef definition = {PyModuleDef_HEAD_INIT, NAME_OF(ANYCHIP_MODULE), "Kernels of anychip-cpu; see native.py.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace anychip

#define INIT(module) PyInit_##module
#define NAMED(module) INIT(module)
PyMODINIT_FUNC NAMED(ANYCHIP_MODULE)() {
#if defined(__AMX_BF16__)
  // Linux gives a process the tile registers when it asks.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData)) {
    PyErr_SetString(PyExc_ImportError, "the system does not let this process use AMX");
    return nullptr;
  }
#endif
  return PyModule_Create(&anychip::definition);
}

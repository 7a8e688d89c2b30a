#include "pool.h"

#include <dlfcn.h>

namespace anychip {
namespace {

// The entry points that GCC's and LLVM's runtimes share.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Count = int (*)();

Parallel start_region = nullptr;
Count thread_index = nullptr, team_size = nullptr;
int wanted_threads = 1;

struct Region {
  Body body;
  void* context;
};

void enter(void* data) {
  const auto* region = (const Region*)data;
  region->body(region->context, thread_index(), team_size());
}

}  // namespace

bool open_pool(const char* library) {
  void* handle = dlopen(*library ? library : nullptr, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  start_region = (Parallel)dlsym(handle, "GOMP_parallel");
  thread_index = (Count)dlsym(handle, "omp_get_thread_num");
  team_size = (Count)dlsym(handle, "omp_get_num_threads");
  if (start_region && thread_index && team_size) return true;
  start_region = nullptr;
  return false;
}

void set_threads(int threads) { wanted_threads = threads < 1 ? 1 : threads; }

int num_threads() { return start_region ? wanted_threads : 1; }

void run(Body body, void* context) {
  if (num_threads() == 1) {
    body(context, 0, 1);
    return;
  }
  Region region{body, context};
  start_region(enter, &region, unsigned(wanted_threads), 0);
}

}  // namespace anychip

// Chooses, once, the kernels for this processor.
#include "wkv7.h"

#include <cstring>

extern const Wkv7Kernels wkv7_portable;
#if defined(__x86_64__)
extern const Wkv7Kernels wkv7_avx2, wkv7_avx512;
#endif

namespace {

struct Choice {
  const char *name;
  const Wkv7Kernels *kernels;
  bool usable;
};

// Best first.
const Choice *choices(int &count) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // this runs while the library is being loaded
#endif
  static const Choice all[] = {
#if defined(__x86_64__)
      {"avx512", &wkv7_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")},
      {"avx2", &wkv7_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"portable", &wkv7_portable, true},
  };
  count = sizeof all / sizeof *all;
  return all;
}

const Choice *first_usable() {
  int count;
  const Choice *choice = choices(count);
  while (!choice->usable) ++choice;
  return choice;
}

const Choice *chosen = first_usable();

}  // namespace

extern "C" {

const char *wkv7_source() { return WKV7_SOURCE; }
const char *wkv7_instructions() { return chosen->name; }

int wkv7_choose(const char *name) {
  int count;
  const Choice *all = choices(count);
  for (int i = 0; i < count; ++i)
    if (all[i].usable && !std::strcmp(all[i].name, name)) {
      chosen = &all[i];
      return 1;
    }
  return 0;
}

void wkv7_forward(const Wkv7Problem *problem, const Wkv7Forward *io) { chosen->kernels->forward(*problem, *io); }
void wkv7_backward(const Wkv7Problem *problem, const Wkv7Backward *io) { chosen->kernels->backward(*problem, *io); }
}

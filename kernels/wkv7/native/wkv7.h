// The plain C interface between Python (ctypes) and the kernels, and between the dispatcher and its instruction sets.
#pragma once
#include <cstdint>

#define WKV7_API __attribute__((visibility("default")))

extern "C" {

// Tokens of shape (tokens, heads, size) with the last dimension contiguous; head h of the problem reads head h / group.
struct Wkv7View {
  void *data;
  int64_t token, head;  // strides in elements
  int32_t type;         // 0 fp32, 1 bf16
  int32_t group;
};

// The tokens of sequence s are those at bounds[s] .. bounds[s + 1] of `tokens`, or these numbers themselves if it is null.
struct Wkv7Problem {
  int64_t sequences, heads, size;
  const int64_t *bounds, *tokens;
  const int64_t *segments;  // (sequences + 1) first checkpoint of each sequence; null when none are kept
  int32_t threads;
};

// y and the final state; the two states may be the same memory. `checkpoints` (segments, heads, size, size) receives the
// state before every 16th token and `removed` (tokens, heads, size) S a of each token, or both are null.
struct Wkv7Forward {
  Wkv7View r, w, k, v, a, b, y;
  const float *initial;  // (sequences, heads, size, size) as (value, key), or null for zero
  float *final, *checkpoints, *removed;
};

struct Wkv7Backward {
  Wkv7View r, w, k, v, a, b, dy;
  const float *checkpoints, *removed, *d_final;  // d_final may be null
  Wkv7View dr, dw, dk, dv, da, db;               // of `heads` heads each
  float *d_initial;                              // may be null
};

// What build.py's source_hash() was when this was compiled.
WKV7_API const char *wkv7_source();
// "avx512", "avx2" or "portable": what this processor gets, unless `wkv7_choose` has been called.
WKV7_API const char *wkv7_instructions();
// Use a named instruction set; 0 if this processor or this build lacks it.
WKV7_API int wkv7_choose(const char *name);
WKV7_API void wkv7_forward(const Wkv7Problem *, const Wkv7Forward *);
WKV7_API void wkv7_backward(const Wkv7Problem *, const Wkv7Backward *);
}

constexpr int kSegment = 16;  // tokens between two checkpoints

struct Wkv7Kernels {
  void (*forward)(const Wkv7Problem &, const Wkv7Forward &);
  void (*backward)(const Wkv7Problem &, const Wkv7Backward &);
};

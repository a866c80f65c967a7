// The WKV-7 recurrence, step by step, with the state of a head in the cache. Compiled once per instruction set:
// WKV7_TABLE names the table of entry points and WKV7_LANES is the number of floats in a vector.
//
// Forward: the state is held transposed, [key][value], so that the lanes of a vector are values and neither S a nor S r
// needs a horizontal sum. One pass over the state per token: S a of the next token is summed up while S is being updated.
// Backward: the state is held as [value][key]. A few rows at a time stay in the cache over a segment of 16 tokens: they
// are recomputed from the checkpoint, then walked back. Sums over rows (dr, dw, dk, da, db) go through small buffers.
//
// Rounding: what is carried through all tokens, the state and its gradient, is a base plus the change since the start of
// the segment, so that a long memory is rounded once in 16 tokens instead of at each. Decays come as decay - 1.
#include "wkv7.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

namespace {

#define INLINE inline __attribute__((always_inline))

template <int W>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
};
template <int W>
using Vec = typename Lanes<W>::Float;

template <int W>
INLINE Vec<W> load(const float *p) {
  Vec<W> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <int W>
INLINE void store(float *p, Vec<W> x) {
  std::memcpy(p, &x, sizeof x);
}
template <int W>
INLINE void add(float *p, Vec<W> x) {
  store<W>(p, load<W>(p) + x);
}
template <int W>
INLINE Vec<W> all(float x) {
  return x - Vec<W>{};
}

// Lane i of the result is lane Index::at(i) of x followed by y.
template <int W, class Index, int... I>
INLINE Vec<W> shuffle(Vec<W> x, Vec<W> y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, Index::at(I)...);
#else
  return __builtin_shuffle(x, y, typename Lanes<W>::Int{Index::at(I)...});
#endif
}
template <int W, class Index>
INLINE Vec<W> shuffle(Vec<W> x, Vec<W> y) {
  return shuffle<W, Index>(x, y, std::make_integer_sequence<int, W>{});
}

// Groups of `size` lanes belong together: the first or second half of each, those of x before those of y.
template <int W, int size, int part>
struct Half {
  static constexpr int at(int i) {
    const int half = size / 2, groups = W / size, group = i / half;
    return (group < groups ? 0 : W) + group % groups * size + part * half + i % half;
  }
};
template <int W, int size>
INLINE Vec<W> halve(Vec<W> x, Vec<W> y) {
  return shuffle<W, Half<W, size, 0>>(x, y) + shuffle<W, Half<W, size, 1>>(x, y);
}

// Lanes in groups of `size`, one group or more for each of `count` vectors, to sums of groups in the first lanes, in order.
template <int W, int size, int count>
INLINE Vec<W> sum_groups(const Vec<W> *x) {
  if constexpr (size == 1) {
    return x[0];
  } else if constexpr (count == 1) {
    const Vec<W> halved = halve<W, size>(x[0], x[0]);
    return sum_groups<W, size / 2, 1>(&halved);
  } else {
    Vec<W> next[count / 2];
    for (int i = 0; i < count / 2; ++i) next[i] = halve<W, size>(x[2 * i], x[2 * i + 1]);
    return sum_groups<W, size / 2, count / 2>(next);
  }
}

// out[i] = sum of the lanes of x[i], for `count` vectors, a power of two <= W.
template <int W, int count>
INLINE void sum_lanes(const Vec<W> *x, float *out) {
  float lanes[W];
  store<W>(lanes, sum_groups<W, W, count>(x));
  for (int i = 0; i < count; ++i) out[i] = lanes[i];
}

// e^x - 1 to about one unit in the last place, for x <= 88.
template <int W>
INLINE Vec<W> exponential_minus_1(Vec<W> x) {
  const Vec<W> lowest = all<W>(-87.f), highest = all<W>(88.f), shift = all<W>(12582912.f);  // 1.5 * 2^23 rounds
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec<W> n = (x * 1.44269504f + shift) - shift;
  const Vec<W> f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<W> p = all<W>(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f}) p = p * f + c;
  p = p * (f * f) + f;
  typename Lanes<W>::Int bits = (__builtin_convertvector(n, typename Lanes<W>::Int) + 127) << 23;
  Vec<W> power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power + (power - 1);
}

INLINE float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
INLINE uint16_t narrow(float x) {  // round to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float *floats(const Wkv7View &view, int64_t token, int64_t head) {
  return static_cast<float *>(view.data) + token * view.token + head / view.group * view.head;
}
INLINE void read(const Wkv7View &view, int64_t token, int64_t head, int size, float *out) {
  if (view.type == 0) {
    std::memcpy(out, floats(view, token, head), sizeof(float) * size);
  } else {
    const uint16_t *from = static_cast<const uint16_t *>(view.data) + token * view.token + head / view.group * view.head;
    for (int i = 0; i < size; ++i) out[i] = widen(from[i]);
  }
}
INLINE void write(const Wkv7View &view, int64_t token, int64_t head, int size, const float *in) {
  if (view.type == 0) {
    std::memcpy(floats(view, token, head), in, sizeof(float) * size);
  } else {
    uint16_t *to = static_cast<uint16_t *>(view.data) + token * view.token + head / view.group * view.head;
    for (int i = 0; i < size; ++i) to[i] = narrow(in[i]);
  }
}

class Buffer {
 public:
  explicit Buffer(size_t floats) : data_(static_cast<float *>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {
    std::memset(data_.get(), 0, floats * 4);  // lanes beyond the head size stay zero
  }
  float *data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float *p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// Neighboring heads of one sequence, by one thread. They go through the sequence together, segment by segment: what they
// read of a token lies side by side, while the same head's tokens lie pages apart.
struct Task {
  int64_t sequence, head, heads, first, count;
  const int64_t *tokens;
  int64_t token(int64_t i) const { return tokens ? tokens[first + i] : first + i; }
};

// Runs work(task, memory) for all heads of all sequences, with shared + heads * per_head floats of memory each.
template <class Work>
void for_each_task(const Wkv7Problem &p, int64_t shared, int64_t per_head, Work work) {
  constexpr int64_t cache = 1 << 18;  // floats that the heads of a task may fill
  // Several tasks a thread: none waits long for one that the system has put aside.
  const int64_t share = p.threads > 1 ? 4 * p.threads : 1, enough = std::max<int64_t>(1, p.sequences * p.heads / share);
  const int64_t heads = std::min({p.heads, enough, std::max<int64_t>(1, (cache - shared) / per_head)});
  const int64_t parts = (p.heads + heads - 1) / heads, tasks = p.sequences * parts;
  auto run = [&](int64_t i, float *memory) {
    const int64_t s = i / parts, head = i % parts * heads;
    work(Task{s, head, std::min(heads, p.heads - head), p.bounds[s], p.bounds[s + 1] - p.bounds[s], p.tokens}, memory);
  };
  if (p.threads <= 1 || tasks == 1) {
    Buffer buffer(shared + heads * per_head);
    for (int64_t i = 0; i < tasks; ++i) run(i, buffer.data());
    return;
  }
#pragma omp parallel num_threads(p.threads)
  {
    Buffer buffer(shared + heads * per_head);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) run(i, buffer.data());
  }
}

// Of the rows i and i + d of a matrix: the new row i (`lower` false) or i + d, with off-diagonal d x d blocks exchanged.
template <int W, int d, bool lower>
struct Exchange {
  static constexpr int at(int i) { return lower ? ((i & d) ? W + i : i + d) : ((i & d) ? W + i - d : i); }
};
template <int W, int d>
INLINE void exchange(Vec<W> *x) {
  if constexpr (d < W) {
    for (int i = 0; i < W; ++i) {
      if (i & d) continue;
      const Vec<W> upper = x[i], lower = x[i + d];
      x[i] = shuffle<W, Exchange<W, d, false>>(upper, lower);
      x[i + d] = shuffle<W, Exchange<W, d, true>>(upper, lower);
    }
    exchange<W, 2 * d>(x);
  }
}

// W x W transpose.
template <int W>
INLINE void transpose_tile(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  Vec<W> x[W];
  for (int i = 0; i < W; ++i) x[i] = load<W>(from + i * from_stride);
  exchange<W, 1>(x);
  for (int i = 0; i < W; ++i) store<W>(to + i * to_stride, x[i]);
}

// P: head size padded to 8, 16, 32, 64, 128 or 256.
template <int P>
struct Kernel {
  static constexpr int W = std::min(WKV7_LANES, P);
  static constexpr int V = P / W;  // vectors in a row
  // Vectors of values that the forward works on together: enough to share the broadcast keys, few enough for the
  // registers and for a block of the state to stay in the first-level cache.
  static constexpr int C = std::min(V, WKV7_LANES < 16 ? 2 : std::max(1, 256 / P));
  // Floats from one input of a segment to the next; the extra line keeps them out of each other's cache sets.
  static constexpr int stride = kSegment * P + 16;
  // Rows that the backward works on together, and vectors of keys.
  static constexpr int R = 8, B = std::min(V, WKV7_LANES < 16 ? 2 : 4);

  // Log decays to decay - 1 = e^w - 1. A decay near one is rounded by up to 3e-8, the same way at every token, which a
  // slow head would add up over its memory.
  static void losses(float *w, int count) {
    for (int i = 0; i < count * P; i += W) store<W>(w + i, exponential_minus_1<W>(load<W>(w + i)));
  }

  // A single token: y and the new state, row by row, without a transposed copy of the state.
  static void step(const Wkv7Problem &p, const Wkv7Forward &io, const Task &task, int64_t head) {
    const int N = p.size;
    alignas(64) float r[P] = {}, w[P] = {}, k[P] = {}, v[P] = {}, a[P] = {}, b[P] = {}, y[P] = {};
    const int64_t token = task.token(0);
    const Wkv7View *views[] = {&io.r, &io.w, &io.k, &io.v, &io.a, &io.b};
    float *rows[] = {r, w, k, v, a, b};
    for (int i = 0; i < 6; ++i) read(*views[i], token, head, N, rows[i]);
    losses(w, 1);
    // S' r = S (w r) + (S a) (b r) + v (k r): both products with the old state, so one pass over it is enough.
    float br = 0, kr = 0;
    alignas(64) float wr[P];
    for (int i = 0; i < P; ++i) br += b[i] * r[i], kr += k[i] * r[i], wr[i] = r[i] + w[i] * r[i];
    const int64_t at = (task.sequence * p.heads + head) * N * N;
    const bool whole = N % W == 0;  // otherwise rows are copied into a padded one
    for (int row = 0; row < N; ++row) {
      alignas(64) float padded[P];
      const float *from = io.initial ? io.initial + at + row * N : nullptr;
      float *to = io.final + at + row * N;
      const float *S = from;
      if (!whole || !from) {
        std::memset(padded, 0, sizeof padded);
        if (from) std::memcpy(padded, from, sizeof(float) * N);
        S = padded;
      }
      const int vectors = whole ? N / W : V;
      Vec<W> sums[2] = {};
      for (int j = 0; j < vectors; ++j) {
        const Vec<W> s = load<W>(S + j * W);
        sums[0] += s * load<W>(a + j * W);
        sums[1] += s * load<W>(wr + j * W);
      }
      float dots[2];
      sum_lanes<W, 2>(sums, dots);
      const float removed = dots[0], value = v[row];
      y[row] = dots[1] + removed * br + value * kr;
      float *out = whole ? to : padded;
      for (int j = 0; j < vectors; ++j)
        store<W>(out + j * W, load<W>(S + j * W) + (load<W>(S + j * W) * load<W>(w + j * W) +
                                                    (removed * load<W>(b + j * W) + value * load<W>(k + j * W))));
      if (!whole) std::memcpy(to, padded, sizeof(float) * N);
    }
    write(io.y, token, head, N, y);
  }

  typedef float *Rows[kSegment];  // one input or output, a row of at least N floats per token

  struct Tokens {
    Rows r, w, k, v, a, b, u, y;
  };

  // One token for C * W values from `offset` on. S: [key][C * W], the state before the segment; `change` since then, to be
  // read but for the first token. The last one leaves the new state in S. u: S a, replaced by that of the next token.
  template <bool FIRST, bool LAST>
  static INLINE void token(int N, int offset, float *S, float *change, const Tokens &x, int t, Vec<W> *u) {
    const float *r = x.r[t], *w = x.w[t], *k = x.k[t], *b = x.b[t], *a_next = LAST ? nullptr : x.a[t + 1];
    Vec<W> value[C], y[C] = {}, u_next[C] = {};
    for (int c = 0; c < C; ++c) {
      value[c] = load<W>(x.v[t] + offset + c * W);
      store<W>(x.u[t] + offset + c * W, u[c]);
    }
    // Sums of sums of a few keys: S a is small where a key repeats, and one long sum would lose digits there.
    for (int begin = 0; begin < N; begin += 8) {
      Vec<W> y_part[C] = {}, u_part[C] = {};
      for (int i = begin; i < begin + 8; ++i) {
        const Vec<W> wi = all<W>(w[i]), bi = all<W>(b[i]), ki = all<W>(k[i]), ri = all<W>(r[i]);
        const Vec<W> ai = LAST ? Vec<W>{} : all<W>(a_next[i]);
        for (int c = 0; c < C; ++c) {
          float *base_at = S + (i * C + c) * W, *change_at = change + (i * C + c) * W;
          const Vec<W> base = load<W>(base_at), d = FIRST ? Vec<W>{} : load<W>(change_at);
          const Vec<W> before = FIRST ? base : base + d, gain = FIRST ? value[c] * ki : value[c] * ki + d;
          const Vec<W> d_next = before * wi + (u[c] * bi + gain), s = base + d_next;
          store<W>(LAST ? base_at : change_at, LAST ? s : d_next);
          y_part[c] += s * ri;
          if (!LAST) u_part[c] += s * ai;
        }
      }
      for (int c = 0; c < C; ++c) y[c] += y_part[c], u_next[c] += u_part[c];
    }
    for (int c = 0; c < C; ++c) {
      store<W>(x.y[t] + offset + c * W, y[c]);
      u[c] = u_next[c];
    }
  }

  static void walk(int N, int count, int offset, float *S, float *change, const Tokens &x) {
    Vec<W> u[C] = {};
    for (int i = 0; i < N; ++i)
      for (int c = 0; c < C; ++c) u[c] += load<W>(S + (i * C + c) * W) * x.a[0][i];
    if (count == 1) return token<true, true>(N, offset, S, change, x, 0, u);
    token<true, false>(N, offset, S, change, x, 0, u);
    for (int t = 1; t < count - 1; ++t) token<false, false>(N, offset, S, change, x, t, u);
    token<false, true>(N, offset, S, change, x, count - 1, u);
  }

  static void forward(const Wkv7Problem &p, const Wkv7Forward &io) {
    const int N = p.size;
    constexpr int blocks = V / C;
    for_each_task(p, 8 * stride + P * C * W, P * P, [&](const Task &task, float *memory) {
      if (task.count == 1 && !io.checkpoints) {
        for (int64_t h = 0; h < task.heads; ++h) step(p, io, task, task.head + h);
        return;
      }
      float *change = memory + 8 * stride, *states = change + P * C * W;  // a state: [block][key][C * W]
      Tokens x;
      Rows *rows[8] = {&x.r, &x.w, &x.k, &x.v, &x.a, &x.b, &x.y, &x.u};
      Wkv7View removed{io.removed, p.heads * N, N, 0, 1};
      const Wkv7View *views[8] = {&io.r, &io.w, &io.k, &io.v, &io.a, &io.b, &io.y, io.removed ? &removed : nullptr};
      // Floats are used where they are, but not the decays, nor what several blocks of values would fetch again.
      auto direct = [&](int i) { return i != 1 && blocks == 1 && N == P && views[i] && views[i]->type == 0; };
      auto outside = [&](int64_t h) { return (task.sequence * p.heads + task.head + h) * N * N; };
      std::memset(states, 0, sizeof(float) * P * P * task.heads);
      if (io.initial)
        for (int64_t h = 0; h < task.heads; ++h)
          for (int row = 0; row < N; ++row)
            for (int i = 0; i < N; ++i) states[h * P * P + inside(row, i)] = io.initial[outside(h) + row * N + i];
      for (int64_t begin = 0; begin < task.count; begin += kSegment) {
        const int count = int(std::min<int64_t>(kSegment, task.count - begin));
        for (int64_t h = 0; h < task.heads; ++h) {
          float *S = states + h * P * P;
          const int64_t head = task.head + h;
          if (io.checkpoints)
            save(S, N, io.checkpoints + ((p.segments[task.sequence] + begin / kSegment) * p.heads + head) * N * N);
          for (int i = 0; i < 8; ++i)
            for (int t = 0; t < count; ++t) {
              float *scratch = memory + i * stride + t * P;
              (*rows[i])[t] = direct(i) ? floats(*views[i], task.token(begin + t), head) : scratch;
              if (!direct(i) && i < 6) read(*views[i], task.token(begin + t), head, N, scratch);
            }
          losses(memory + stride, count);
          for (int block = 0; block < blocks && block * C * W < N; ++block)
            walk(N, count, block * C * W, S + block * C * W * P, change, x);
          for (int i = 6; i < 8; ++i)
            for (int t = 0; t < count && views[i] && !direct(i); ++t)
              write(*views[i], task.token(begin + t), head, N, (*rows[i])[t]);
        }
      }
      for (int64_t h = 0; h < task.heads; ++h) save(states + h * P * P, N, io.final + outside(h));
    });
  }

  // Where the forward's state of a head keeps (value, key).
  static INLINE int inside(int value, int key) { return (value / (C * W) * P + key) * C * W + value % (C * W); }

  // [block][key][C * W] -> (value, key) of N x N.
  static void save(const float *S, int N, float *to) {
    if (N % W == 0) {
      for (int row = 0; row < N; row += W)
        for (int i = 0; i < N; i += W)
          transpose_tile<W>(S + inside(row, i), C * W, to + row * N + i, N);
    } else {
      for (int row = 0; row < N; ++row)
        for (int i = 0; i < N; ++i) to[row * N + i] = S[inside(row, i)];
    }
  }

  struct Segment {
    float *r, *w, *k, *v, *a, *b, *dy, *u;  // [token][P]
    float *dr, *dw, *dk, *dv, *da, *db;
    float *history;  // [token][R][P]: the rows before each token, and after the last
    float *change;   // [R][P]: of the gradient
  };

  // Rows row .. row + R of the state and of its gradient through a segment: forwards from the checkpoint, and back.
  // Vectors of keys are taken B at a time, so that their sums over the rows stay in registers.
  static void walk_back(int count, int row, const float *S0, float *G, const Segment &segment) {
    const Segment x = segment;
    std::memcpy(x.history, S0, sizeof(float) * R * P);
    for (int t = 0; t < count; ++t) {
      const float *u = x.u + t * P + row, *v = x.v + t * P + row, *dy = x.dy + t * P + row;
      for (int c = 0; c < P; c += B * W) {
        const int at = t * P + c;
        const float *before = x.history + t * R * P + c;
        float *after = x.history + (t + 1) * R * P + c;
        Vec<W> w[B], b[B], k[B], dr[B] = {};
        for (int i = 0; i < B; ++i)
          w[i] = load<W>(x.w + at + i * W), b[i] = load<W>(x.b + at + i * W), k[i] = load<W>(x.k + at + i * W);
        for (int j = 0; j < R; ++j)
          for (int i = 0; i < B; ++i) {
            const Vec<W> old = load<W>(before + j * P + i * W), s = old + (old * w[i] + (v[j] * k[i] + u[j] * b[i]));
            store<W>(after + j * P + i * W, s);
            dr[i] += dy[j] * s;
          }
        for (int i = 0; i < B; ++i) add<W>(x.dr + at + i * W, dr[i]);
      }
    }
    std::memset(x.change, 0, sizeof(float) * R * P);
    for (int t = count - 1; t >= 0; --t) {
      const float *u = x.u + t * P + row, *v = x.v + t * P + row, *dy = x.dy + t * P + row;
      Vec<W> sums[2 * R];
      for (int c = 0; c < P; c += B * W) {
        const int at = t * P + c;
        Vec<W> r[B], k[B], b[B];
        for (int i = 0; i < B; ++i)
          r[i] = load<W>(x.r + at + i * W), k[i] = load<W>(x.k + at + i * W), b[i] = load<W>(x.b + at + i * W);
        for (int j = 0; j < R; ++j) {
          Vec<W> dv = {}, du = {};
          for (int i = 0; i < B; ++i) {
            float *d = x.change + j * P + c + i * W;
            const Vec<W> d_now = load<W>(d) + dy[j] * r[i], g = load<W>(G + j * P + c + i * W) + d_now;
            store<W>(d, d_now);
            dv += g * k[i];
            du += g * b[i];
          }
          sums[j] = c ? sums[j] + dv : dv;
          sums[R + j] = c ? sums[R + j] + du : du;
        }
      }
      alignas(64) float dots[2 * R];
      constexpr int together = std::min(W, 2 * R);
      for (int i = 0; i < 2 * R; i += together) sum_lanes<W, together>(sums + i, dots + i);
      const float *du = dots + R;
      for (int j = 0; j < R; ++j) x.dv[t * P + row + j] = dots[j];
      for (int c = 0; c < P; c += B * W) {
        const int at = t * P + c;
        const float *before = x.history + t * R * P + c;
        Vec<W> w[B], a[B], dw[B] = {}, dk[B] = {}, da[B] = {}, db[B] = {};
        for (int i = 0; i < B; ++i) w[i] = load<W>(x.w + at + i * W), a[i] = load<W>(x.a + at + i * W);
        for (int j = 0; j < R; ++j)
          for (int i = 0; i < B; ++i) {
            float *d = x.change + j * P + c + i * W;
            const Vec<W> g = load<W>(G + j * P + c + i * W) + load<W>(d), s = load<W>(before + j * P + i * W);
            dk[i] += v[j] * g;
            db[i] += u[j] * g;
            dw[i] += g * s;
            da[i] += du[j] * s;
            store<W>(d, g * w[i] + (du[j] * a[i] + load<W>(d)));
          }
        for (int i = 0; i < B; ++i) {
          add<W>(x.dw + at + i * W, dw[i]), add<W>(x.dk + at + i * W, dk[i]);
          add<W>(x.da + at + i * W, da[i]), add<W>(x.db + at + i * W, db[i]);
        }
      }
    }
    for (int i = 0; i < R * P; i += W) add<W>(G + i, load<W>(x.change + i));
  }

  static void backward(const Wkv7Problem &p, const Wkv7Backward &io) {
    const int N = p.size;
    const Wkv7View *inputs[] = {&io.r, &io.w, &io.k, &io.v, &io.a, &io.b, &io.dy};
    const Wkv7View *outputs[] = {&io.dr, &io.dw, &io.dk, &io.da, &io.db, &io.dv};
    for_each_task(p, P * P + 14 * stride + (kSegment + 2) * R * P, P * P, [&](const Task &task, float *memory) {
      Segment x;
      float **parts[] = {&x.r, &x.w, &x.k, &x.v, &x.a, &x.b, &x.dy, &x.u, &x.dr, &x.dw, &x.dk, &x.da, &x.db, &x.dv};
      for (float **part : parts) *part = memory, memory += stride;
      x.history = memory;
      x.change = x.history + (kSegment + 1) * R * P;
      float *S = x.change + R * P, *gradients = S + P * P;
      auto outside = [&](int64_t h) { return (task.sequence * p.heads + task.head + h) * N * N; };
      auto checkpoint = [&](int64_t segment, int64_t head) {
        return io.checkpoints + ((p.segments[task.sequence] + segment) * p.heads + head) * N * N;
      };
      for (int64_t h = 0; h < task.heads; ++h)
        copy_rows(io.d_final ? io.d_final + outside(h) : nullptr, N, gradients + h * P * P);
      for (int64_t segment = (task.count + kSegment - 1) / kSegment - 1; segment >= 0; --segment) {
        const int64_t begin = segment * kSegment;
        const int count = int(std::min<int64_t>(kSegment, task.count - begin));
        for (int64_t h = 0; h < task.heads; ++h) {
          const int64_t head = task.head + h;
          float *G = gradients + h * P * P;
          copy_rows(checkpoint(segment, head), N, S);
          for (int t = 0; t < count; ++t) {
            const int64_t token = task.token(begin + t);
            for (int i = 0; i < 7; ++i) read(*inputs[i], token, head, N, *parts[i] + t * P);
            std::memcpy(x.u + t * P, io.removed + (token * p.heads + head) * N, sizeof(float) * N);
          }
          losses(x.w, count);
          std::memset(x.dr, 0, sizeof(float) * 5 * stride);
          for (int row = 0; row < N; row += R) walk_back(count, row, S + row * P, G + row * P, x);
          for (int i = 0; i < count * P; ++i) x.dw[i] += x.dw[i] * x.w[i];
          for (int i = 0; i < 6; ++i)
            for (int t = 0; t < count; ++t) write(*outputs[i], task.token(begin + t), head, N, *parts[8 + i] + t * P);
        }
      }
      if (io.d_initial)
        for (int64_t h = 0; h < task.heads; ++h)
          for (int row = 0; row < N; ++row)
            std::memcpy(io.d_initial + outside(h) + row * N, gradients + h * P * P + row * P, sizeof(float) * N);
    });
  }

  // N x N -> rows of P floats; zero without a source.
  static void copy_rows(const float *from, int N, float *to) {
    if (!from || N < P) std::memset(to, 0, sizeof(float) * P * P);
    if (from)
      for (int row = 0; row < N; ++row) std::memcpy(to + row * P, from + row * N, sizeof(float) * N);
  }
};

void forward(const Wkv7Problem &p, const Wkv7Forward &io) {
  if (p.size <= 8) return Kernel<8>::forward(p, io);
  if (p.size <= 16) return Kernel<16>::forward(p, io);
  if (p.size <= 32) return Kernel<32>::forward(p, io);
  if (p.size <= 64) return Kernel<64>::forward(p, io);
  if (p.size <= 128) return Kernel<128>::forward(p, io);
  return Kernel<256>::forward(p, io);
}

void backward(const Wkv7Problem &p, const Wkv7Backward &io) {
  if (p.size <= 8) return Kernel<8>::backward(p, io);
  if (p.size <= 16) return Kernel<16>::backward(p, io);
  if (p.size <= 32) return Kernel<32>::backward(p, io);
  if (p.size <= 64) return Kernel<64>::backward(p, io);
  if (p.size <= 128) return Kernel<128>::backward(p, io);
  return Kernel<256>::backward(p, io);
}

}  // namespace

extern const Wkv7Kernels WKV7_TABLE;
const Wkv7Kernels WKV7_TABLE = {forward, backward};

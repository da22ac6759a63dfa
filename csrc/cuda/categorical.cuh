// One categorical row: log-prob and entropy from one pass over its logits, and their gradient. Who reads a row depends
// on its width A alone, so that a row alone has the same bits as in any batch:
//   A <= 32 (16 in double)  a thread; the block's rows come through shared memory
//   A <= 256                8 lanes of a warp
//   A <= 2048               a warp
//   wider                   a block; [8192, 151936] in bfloat16 is 2.5 GB, 0.83 ms at 3.0 TB/s, and leaves 19
//                           instructions an element: its loop takes 12
// Logits without gaps between columns and without an action mask are read sixteen bytes at a time, several loads ahead.
// Whatever their alignment, the same columns fall to the same thread. All others are read one by one.
#pragma once
#include "rows.cuh"
#include "../math/elementary.h"

namespace pf {
namespace PF_ISA {

// The softmax of float takes e^x in one instruction, 2 ulp. It flushes what is no normal number to 0, and so e^floor.
template <>
PF_FN constexpr float softmax_floor<float>() {
  return -88.0f;
}
template <>
PF_FN float exp_floored<float>(const float& x) {
  const float octaves = x * 1.44269504088896340736f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(octaves));
  return e;
#else
  const float e = std::exp2(octaves);
  return e < std::numeric_limits<float>::min() ? 0.0f : e;
#endif
}

}  // namespace PF_ISA
}  // namespace pf

#include "../math/categorical.h"

namespace pf {
namespace PF_ISA {

// Rows are at most this wide: columns are counted in 32 bits.
constexpr int64_t kMostActions = int64_t{1} << 30;

// The larger one; a NaN is passed over.
PF_DEV float number_max(float a, float b) { return fmaxf(a, b); }
PF_DEV double number_max(double a, double b) { return fmax(a, b); }

// Who reads a row: see above.
template <class T>
constexpr int kStagedWidth = 128 / static_cast<int>(sizeof(T));
constexpr int64_t kMostOf8 = 256, kMostOfWarp = 2048;

// What a pass over logits leaves, relative to the largest one so far. A NaN is not the largest: it stays in the sums.
template <class T>
struct SoftmaxSums {
  T largest = -std::numeric_limits<T>::infinity(), sum = 0, weighted = 0;

  static PF_DEV T finite(T x) { return x == -std::numeric_limits<T>::infinity() ? T(0) : x; }
  PF_DEV T shift() const { return finite(largest); }
  PF_DEV void raise(T to, T inverse_temperature) {
    const T u = softmax_exponent(largest, finite(to), inverse_temperature), e = exp_floored(u);
    weighted = e * fma_of(u, sum, weighted);
    sum *= e;
    largest = to;
  }
};

// log p = (logits - shift)/temperature - log_sum; log_sum = inf: the row gives 0.
template <class T>
struct CategoricalRow {
  T log_prob = 0, entropy = 0, shift = 0, log_sum = std::numeric_limits<T>::infinity();

  CategoricalRow() = default;
  PF_DEV CategoricalRow(const SoftmaxSums<T>& s, T taken, T inverse_temperature) : CategoricalRow() {
    if (s.sum == 0) return;  // no action is possible, or the row was skipped
    shift = s.shift(), log_sum = log_of(s.sum);
    log_prob = fma_of(taken - shift, inverse_temperature, -log_sum);
    entropy = softmax_entropy(log_sum, s.sum, s.weighted);
  }
};

// d/d logit of g·log_prob + h·entropy. A row whose g and h are both 0 gives 0, whatever it holds.
template <class T>
struct LogitSlope {
  T shift, log_sum, entropy, inverse_temperature, minus_g, minus_h;
  int action;
  bool dead;

  PF_DEV LogitSlope(const CategoricalRow<T>& row, T inverse_temperature, int action, T g, T h)
      : shift(row.shift), log_sum(row.log_sum), entropy(row.entropy), inverse_temperature(inverse_temperature),
        minus_g(-(g * inverse_temperature)), minus_h(-(h * inverse_temperature)), action(action),
        dead(row.log_sum == std::numeric_limits<T>::infinity() || (g == 0 && h == 0)) {}
  PF_DEV T of_others(T logit) const {
    return softmax_grad(logit, shift, log_sum, entropy, inverse_temperature, minus_g, minus_h);
  }
  PF_DEV T operator()(T logit, int column) const {
    const T d = of_others(logit);
    return column == action ? d - minus_g : d;
  }
};

// --- what a row is told ----------------------------------------------------------------------------------------------

// 1/temperature, finite, so that the largest logit's (z - z)/temperature stays 0.
template <class T>
PF_FN T inverse_of(T temperature) {
  return smaller_or_second(std::numeric_limits<T>::max(), T(1) / temperature);
}
template <class T>
PF_DEV T inverse_of_row(const Categorical& c, int64_t i, T inverse_temperature) {
  return c.temperature.data ? inverse_of(element<T>(c.temperature, i)) : inverse_temperature;
}

// The action, or -1 where it is none of `width` and refused; `where`: how that is noted.
PF_DEV int checked(int64_t action, int64_t width, int64_t where, Offence* offence) {
  if (action >= 0 && action < width) return static_cast<int>(action);
  refuse(offence, where, action);
  return -1;
}
// The action of row i, which lies at `at`; -1: the row is skipped.
PF_DEV int action_of(const Categorical& c, int64_t i, int64_t at, Offence* offence) {
  const int64_t action = element<int64_t>(c.actions, at);
  if (c.has_ignore_index && action == c.ignore_index) return -1;
  return checked(action, c.logits.width, i, offence);
}

// A row that one thread reads, logit by logit; action -1: skipped.
template <class T, class F>
PF_DEV CategoricalRow<T> row_of_thread(F&& logit, int width, int action, T inverse_temperature) {
  if (action < 0) return {};
  SoftmaxSums<T> s;
  for (int k = 0; k < width; ++k) s.largest = number_max(logit(k), s.largest);
  const T shift = s.shift();
  for (int k = 0; k < width; ++k) {
    const T u = softmax_exponent(logit(k), shift, inverse_temperature), e = exp_floored(u);
    s.sum += e;
    s.weighted = fma_of(e, u, s.weighted);
  }
  return {s, logit(action), inverse_temperature};
}

// --- narrow rows: a tile in shared memory, a thread a row ------------------------------------------------------------

template <class T>
struct StagedRows {
  static constexpr int kStride = kStagedWidth<T> + 1;  // of one row: no two of a warp's in one bank
  T z[kThreads * kStride];

  // Of rows without gaps: vector(e, at) for the thread's elements [e, e + N), which lie at at[] in z, and single(e, at)
  // for those that are left over.
  template <int N, class V, class F>
  static PF_DEV void over_packed(int rows, int width, V&& vector, F&& single) {
    const int n = rows * width, whole = n - n % N, gap = kStride - width;
    over_elements<N>(whole, width, [&](int e, Place p) {
      int at[N];
      if (width >= N) {  // at most one row ends here
#pragma unroll
        for (int k = 0; k < N; ++k) at[k] = p.row * kStride + p.column + k + (p.column + k >= width ? gap : 0);
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k, p.next()) at[k] = p.row * kStride + p.column;
      }
      vector(e, at);
    });
    for (int e = whole + threadIdx.x; e < n; e += kThreads) single(e, e / width * kStride + e % width);
  }

  // Rows [first, first + rows) of the logits. Every thread calls, and then waits.
  template <class S>
  PF_DEV void read(const Rows& logits, int64_t first, int rows) {
    const int width = static_cast<int>(logits.width);
    if constexpr (std::is_same_v<S, Any>) {
      over_tile<1>(rows, width,
                   [&](int, Place p) { z[p.row * kStride + p.column] = element<T>(logits, first + p.row, p.column); });
    } else {
      const S* from = static_cast<const S*>(logits.lead.data) + first * width;
      over_packed<kVector<S>>(rows, width, [&](int e, const int (&at)[kVector<S>]) {
        T x[kVector<S>];
        unpack(load16(from + e), from, x);
#pragma unroll
        for (int k = 0; k < kVector<S>; ++k) z[at[k]] = x[k];
      }, [&](int e, int at) { z[at] = number(from[e]); });
    }
  }
  // Puts -inf where the mask is 0; mask_row(row): where the mask of the tile's row lies, -1: nowhere.
  template <class F>
  PF_DEV void mask(const Rows& action_mask, int rows, F&& mask_row) {
    over_tile<1>(rows, static_cast<int>(action_mask.width), [&](int, Place p) {
      const int64_t at = mask_row(p.row);
      if (at >= 0 && !flag(action_mask, at, p.column)) {
        z[p.row * kStride + p.column] = -std::numeric_limits<T>::infinity();
      }
    });
  }
  // The tile to d_logits, 0 where the mask is. Every thread has written its row, and waited.
  template <class S, class F>
  PF_DEV void write(const Rows& d_logits, const Rows& action_mask, int64_t first, int rows, F&& mask_row) const {
    const int width = static_cast<int>(d_logits.width);
    if constexpr (std::is_same_v<S, Any>) {
      const bool masked = action_mask.lead.data;
      over_tile<1>(rows, width, [&](int, Place p) {
        T d = z[p.row * kStride + p.column];
        if (masked) {
          const int64_t at = mask_row(p.row);
          if (at < 0 || !flag(action_mask, at, p.column)) d = T(0);
        }
        put(d_logits, first + p.row, p.column, d);
      });
    } else {
      S* to = static_cast<S*>(const_cast<void*>(d_logits.lead.data)) + first * width;
      over_packed<kVector<S>>(rows, width, [&](int e, const int (&at)[kVector<S>]) {
        T d[kVector<S>];
#pragma unroll
        for (int k = 0; k < kVector<S>; ++k) d[k] = z[at[k]];
        store16(to + e, packed(to, d));
      }, [&](int e, int at) { to[e] = Stored<S, T>::from(z[at]); });
    }
  }

  // Columns [j, j + width) of the thread's own row as one categorical; action -1: skipped.
  PF_DEV CategoricalRow<T> forward(int j, int width, int action, T inverse_temperature) const {
    const T* row = z + threadIdx.x * kStride + j;
    return row_of_thread([&](int k) { return row[k]; }, width, action, inverse_temperature);
  }
  // The gradient takes the place of the logits.
  PF_DEV void backward(int j, int width, const LogitSlope<T>& slope) {
    T* row = z + threadIdx.x * kStride + j;
    if (slope.dead) {
      for (int k = 0; k < width; ++k) row[k] = T(0);
    } else {
      for (int k = 0; k < width; ++k) row[k] = slope.of_others(row[k]);
      if (slope.action >= 0) row[slope.action] -= slope.minus_g;
    }
  }
};

// --- wide rows: a group of lanes a row -------------------------------------------------------------------------------

// The logits of one row. load(column): kShare of them as they lie in memory, -inf beyond the end.
template <class T, class S>
struct Line {
  static constexpr int kShare = kVector<S>;
  using Raw = uint4;
  const S* data;
  int width, skew;  // bytes past a multiple of sixteen
  int inner, last_inner;  // columns, multiples of kShare, between which loads of sixteen bytes stay inside the row

  PF_DEV Line(const S* data, int width)
      : data(data), width(width), skew(static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16)),
        inner(skew == 0 ? 0 : kShare),
        last_inner(width - (skew == 0 ? kShare : 2 * kShare - skew / static_cast<int>(sizeof(S)))) {}
  PF_DEV Line(const Rows& logits, const Rows&, int64_t row, int64_t)
      : Line(static_cast<const S*>(logits.lead.data) + offset_of(logits.lead, row), static_cast<int>(logits.width)) {}
  // `columns` of them from `column` on.
  PF_DEV Line part(int column, int columns) const { return {data + column, columns}; }
  PF_DEV bool holds(int from, int to) const { return from >= inner && to <= last_inner; }
  // Two aligned loads and a shift where the row begins between them.
  PF_DEV uint4 load_inner(int column) const {
    const S* at = data + column;
    if (skew == 0) return load16(at);
    const char* before = reinterpret_cast<const char*>(at) - skew;
    const uint4 a = load16(before), b = load16(before + 16);
    uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = skew & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = skew & 4 ? w[i + 1] : w[i];
    if constexpr (sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = skew & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
    }
    return {w[0], w[1], w[2], w[3]};
  }
  PF_DEV uint4 load(int column) const {
    if (holds(column, column)) return load_inner(column);
    T x[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      x[i] = column + i < width ? number(data[column + i]) : -std::numeric_limits<T>::infinity();
    }
    return packed(data, x);
  }
  PF_DEV void numbers(const uint4& raw, T (&x)[kShare]) const { unpack(raw, data, x); }
  PF_DEV T at(int column) const { return number(data[column]); }
  PF_DEV bool is_possible(int) const { return true; }
  PF_DEV T logit(int column) const { return at(column); }
};
template <class T>
struct Line<T, Any> {
  static constexpr int kShare = 1;
  using Raw = T;
  const void *data, *mask;
  DType dtype, mask_dtype;
  int64_t offset, stride, mask_offset, mask_stride;
  int width;

  PF_DEV Line(const Rows& logits, const Rows& action_mask, int64_t row, int64_t mask_row)
      : data(logits.lead.data), mask(action_mask.lead.data), dtype(logits.lead.dtype),
        mask_dtype(action_mask.lead.dtype), offset(offset_of(logits.lead, row)), stride(logits.stride),
        mask_offset(mask ? offset_of(action_mask.lead, mask_row) : 0), mask_stride(action_mask.stride),
        width(static_cast<int>(logits.width)) {}
  PF_DEV Line part(int column, int columns) const {
    Line p = *this;
    p.offset += column * stride, p.mask_offset += column * mask_stride, p.width = columns;
    return p;
  }
  PF_DEV bool is_possible(int column) const {
    return !mask || flag(mask, mask_dtype, mask_offset + column * mask_stride);
  }
  PF_DEV T logit(int column) const { return element<T>(data, dtype, offset + column * stride); }
  PF_DEV T at(int column) const { return is_possible(column) ? logit(column) : -std::numeric_limits<T>::infinity(); }
  PF_DEV bool holds(int, int to) const { return to < width; }
  PF_DEV T load_inner(int column) const { return at(column); }
  PF_DEV T load(int column) const { return column < width ? at(column) : -std::numeric_limits<T>::infinity(); }
  PF_DEV void numbers(const T& raw, T (&x)[1]) const { x[0] = raw; }
};

constexpr int kAhead = 4;  // loads on their way while four are summed

// kAhead loads of a lane, kStep columns apart.
template <int kStep, class L>
PF_DEV void load_ahead(const L& line, int column, typename L::Raw (&raw)[kAhead]) {
  if (line.holds(column, column + (kAhead - 1) * kStep)) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) raw[k] = line.load_inner(column + k * kStep);
  } else {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) raw[k] = line.load(column + k * kStep);
  }
}

// One lane's pass over its share of the columns.
template <int kLanes, class T, class S>
PF_DEV SoftmaxSums<T> sums_of_lane(const Line<T, S>& line, int lane, T inverse_temperature) {
  constexpr int N = Line<T, S>::kShare, kStep = kLanes * N;
  SoftmaxSums<T> s;
  typename Line<T, S>::Raw ahead[kAhead];
  load_ahead<kStep>(line, lane * N, ahead);
#pragma unroll 1
  for (int c = 0; c < line.width; c += kAhead * kStep) {
    T x[kAhead][N];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) line.numbers(ahead[k], x[k]);
    if (c + kAhead * kStep < line.width) load_ahead<kStep>(line, c + kAhead * kStep + lane * N, ahead);
    T top = s.largest;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) top = number_max(x[k][i], top);
    }
    if (top > s.largest) s.raise(top, inverse_temperature);
    const T shift = s.shift();
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (c + k * kStep >= line.width) break;
      T sum, weighted;  // of a few: small terms meet one another before they meet the sum
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T u = softmax_exponent(x[k][i], shift, inverse_temperature), e = exp_floored(u);
        sum = i == 0 ? e : sum + e;
        weighted = i == 0 ? e * u : fma_of(e, u, weighted);
      }
      s.sum += sum, s.weighted += weighted;
    }
  }
  return s;
}

// The sums of all lanes of a group, in each of its lanes. Every thread of the warp, or of the block, calls.
template <int kLanes, class T>
PF_DEV SoftmaxSums<T> joined(SoftmaxSums<T> s, T inverse_temperature) {
  constexpr int kNear = kLanes < kWarp ? kLanes : kWarp;
  T top = s.largest;
#pragma unroll
  for (int other = kNear / 2; other > 0; other /= 2) {
    top = number_max(top, __shfl_xor_sync(kAllLanes, top, other));
  }
  if constexpr (kLanes <= kWarp) {
    s.raise(top, inverse_temperature);
#pragma unroll
    for (int other = kNear / 2; other > 0; other /= 2) {
      s.sum += __shfl_xor_sync(kAllLanes, s.sum, other), s.weighted += __shfl_xor_sync(kAllLanes, s.weighted, other);
    }
  } else {
    PF_SHARED(T[kWarps], largest);
    PF_SHARED(double[2 * kWarps], sums);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (lane == 0) largest[warp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = number_max(top, largest[w]);
    s.raise(top, inverse_temperature);
    const double sum = sum_of_warp(static_cast<double>(s.sum));
    const double weighted = sum_of_warp(static_cast<double>(s.weighted));
    if (lane == 0) sums[warp] = sum, sums[kWarps + warp] = weighted;
    __syncthreads();
    double all = 0, all_weighted = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w], all_weighted += sums[kWarps + w];
    s.sum = static_cast<T>(all), s.weighted = static_cast<T>(all_weighted);
  }
  return s;
}

// A row of the group's; every thread of the warp, or of the block, calls. action -1: skipped, and not read.
template <int kLanes, class T, class S>
PF_DEV CategoricalRow<T> row_of_group(const Line<T, S>& line, int action, T inverse_temperature) {
  SoftmaxSums<T> s;
  T taken = 0;
  if (action >= 0) {
    taken = line.at(action);
    s = sums_of_lane<kLanes>(line, static_cast<int>(threadIdx.x % kLanes), inverse_temperature);
  }
  return {joined<kLanes>(s, inverse_temperature), taken, inverse_temperature};
}

// --- the gradient of wide rows ---------------------------------------------------------------------------------------

// A piece of a row: what a block writes without coming around.
template <class T, class S>
constexpr int kPiece = kThreads * kAhead * (std::is_same_v<S, Any> ? 4 : Line<T, S>::kShare);
template <class T, class S>
inline int64_t pieces_of(int64_t width) {
  return (width + kPiece<T, S> - 1) / kPiece<T, S>;
}

// The gradient of one logit of a row whose own begins at `offset`.
template <class T, class S>
PF_DEV void write_slope(const Line<T, S>& line, const Rows& d_logits, int64_t offset, const LogitSlope<T>& slope,
                        int column) {
  const T d = slope.dead || !line.is_possible(column) ? T(0) : slope(line.logit(column), column);
  put(d_logits.lead, offset + column * d_logits.stride, d);
}
// Lane `lane`'s share of piece `piece` of the gradient of a row, which begins at `offset`; -1: of all of it. It may be
// the logits' own memory: a lane reads what it writes and nothing else.
template <int kLanes, class T, class S>
PF_DEV void write_slopes(const Line<T, S>& line, const Rows& d_logits, int64_t offset, const LogitSlope<T>& slope,
                         int lane, int64_t piece) {
  constexpr int N = Line<T, S>::kShare;
  S* to = static_cast<S*>(const_cast<void*>(d_logits.lead.data)) + offset;
  const int before = line.skew == 0 ? 0 : N - line.skew / static_cast<int>(sizeof(S));
  const int head = before < line.width ? before : line.width, vectors = (line.width - head) / N;
  const int first = piece < 0 ? 0 : static_cast<int>(piece) * (kPiece<T, S> / N);
  const int end = piece < 0 || vectors < first + kPiece<T, S> / N ? vectors : first + kPiece<T, S> / N;
#pragma unroll
  for (int l = lane; l < 2 * N && first == 0; l += kLanes) {  // before the first and behind the last sixteen bytes
    const int column = l < N ? l : head + vectors * N + l - N;
    if (column < (l < N ? head : line.width)) write_slope(line, d_logits, offset, slope, column);
  }
#pragma unroll 1
  for (int v = first + lane; v < end; v += kAhead * kLanes) {
    uint4 raw[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (v + k * kLanes < end && !slope.dead) {
        raw[k] = load16(line.data + head + (v + k * kLanes) * N);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (v + k * kLanes >= end) break;
      const int column = head + (v + k * kLanes) * N;
      T d[N];
      if (slope.dead) {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = T(0);
      } else {
        line.numbers(raw[k], d);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = slope.of_others(d[i]);
        if (static_cast<unsigned>(slope.action - column) < static_cast<unsigned>(N)) {
#pragma unroll
          for (int i = 0; i < N; ++i) d[i] = column + i == slope.action ? d[i] - slope.minus_g : d[i];
        }
      }
      store16(to + column, packed(to, d));
    }
  }
}
template <int kLanes, class T>
PF_DEV void write_slopes(const Line<T, Any>& line, const Rows& d_logits, int64_t offset, const LogitSlope<T>& slope,
                         int lane, int64_t piece) {
  const int first = piece < 0 ? 0 : static_cast<int>(piece) * kPiece<T, Any>;
  const int end = piece < 0 || line.width < first + kPiece<T, Any> ? line.width : first + kPiece<T, Any>;
#pragma unroll 1
  for (int c = first + lane; c < end; c += kLanes) write_slope(line, d_logits, offset, slope, c);
}

// --- which way, on the host ------------------------------------------------------------------------------------------

// f(T{}, S{}): the compute type, and how the logits are read: in their own dtype where `plain`, else as Any.
template <bool kHalf, class F>
inline cudaError_t by_logits(bool is_double, bool plain, DType dtype, F&& f) {
  if (is_double) return f(double{}, Any{});
  if (plain && dtype == DType::f32) return f(float{}, float{});
  if (plain && dtype == DType::bf16) return f(float{}, BFloat16{});
  if constexpr (kHalf) {
    if (plain && dtype == DType::f16) return f(float{}, Half{});
  }
  return f(float{}, Any{});
}
// f(lanes): how many read a row together, as a constant: 1, 8, 32 or the block.
template <class T, class F>
inline cudaError_t by_width(int64_t width, F&& f) {
  if (width > kMostActions) return cudaErrorInvalidValue;
  if (width <= kStagedWidth<T>) return f(std::integral_constant<int, 1>{});
  if (width <= kMostOf8) return f(std::integral_constant<int, 8>{});
  if (width <= kMostOfWarp) return f(std::integral_constant<int, kWarp>{});
  return f(std::integral_constant<int, kThreads>{});
}

// Blocks for n rows that `lanes` threads read together.
inline int64_t blocks_of_groups(int64_t n, int lanes) {
  const int64_t groups = kThreads / lanes, blocks = (n + groups - 1) / groups, most = (int64_t{1} << 31) - 1;
  return blocks < most ? blocks : most;
}

// Whether logits may be read sixteen bytes at a time: a tile of narrow rows has no gaps, a wide row none of its own.
inline bool is_plain(const Rows& logits, const Rows& action_mask, bool is_double) {
  const bool narrow = logits.width <= (is_double ? kStagedWidth<double> : kStagedWidth<float>);
  return narrow ? is_packed(logits, logits.lead.dtype) : logits.stride == 1 && !action_mask.lead.data;
}
// Whether the gradient's rows lie as the logits' do, sixteen bytes against sixteen bytes.
inline bool is_alike(const Rows& logits, const Rows& d_logits) {
  const Stream &a = logits.lead, &b = d_logits.lead;
  const int64_t size = a.dtype == DType::f32 ? 4 : 2;
  bool alike = a.dtype == b.dtype && a.ndim == b.ndim && logits.stride == d_logits.stride &&
               (reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data)) % 16 == 0;
  for (int d = 0; alike && d < a.ndim; ++d) {
    alike = a.shape[d] == b.shape[d] && (a.stride[d] - b.stride[d]) * size % 16 == 0;
  }
  return alike;
}

}  // namespace PF_ISA
}  // namespace pf

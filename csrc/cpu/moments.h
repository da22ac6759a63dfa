// Moments of a tile in one pass: it is shifted by where its numbers lie (the mean so far, or that of the first few), so
// that nothing cancels. Tiles are joined in double, in a fixed order.
#pragma once
#include "../math/moments.h"

namespace pf {
namespace PF_ISA {

// A tile's moments while its numbers come by; what is left out adds 0.
template <class T>
struct ShiftedMoments {
  using V = Vec<T>;
  V shift, drift = V(T(0)), squares = V(T(0));

  // at(i), valid(i): sixteen numbers of the tile and which of them count.
  template <class At, class Valid>
  PF_INLINE ShiftedMoments(const Moments& so_far, int64_t n, At&& at, Valid&& valid) {
    T near = static_cast<T>(so_far.mean);
    for (int64_t i = 0; so_far.count == 0 && i < n; i += kLanes) {
      const auto m = valid(i);
      if (!any(m)) continue;
      const V zero(T(0));
      near = sum_of_lanes(select(m, at(i), zero)) / sum_of_lanes(select(m, V(T(1)), zero));
      break;
    }
    shift = V(near);
  }
  PF_INLINE void add(const V& deviation) {
    drift = drift + deviation;
    squares = fma_of(deviation, deviation, squares);
  }
  Moments finish(double count) const {
    return Moments::shifted(count, static_cast<double>(shift.r[0][0]), static_cast<double>(sum_of_lanes(drift)),
                            static_cast<double>(sum_of_lanes(squares)));
  }
};

// The valid ones of n elements; mask == nullptr: all.
template <class T>
inline Moments tile_moments(const T* x, const T* mask, int64_t n, const Moments& so_far) {
  using V = Vec<T>;
  const auto at = [&](int64_t i) { return V::load(x + i); };
  const auto valid = [&](int64_t i) { return tile_valid<T>(mask, i, n); };
  ShiftedMoments<T> moments(so_far, n, at, valid);
  const int64_t whole = mask ? 0 : n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) moments.add(at(i) - moments.shift);
  const V zero(T(0));
  V count = zero;
  for (int64_t i = whole; i < n; i += kLanes) {
    const auto m = valid(i);
    moments.add(select(m, at(i) - moments.shift, zero));
    count = count + select(m, V(T(1)), zero);
  }
  return moments.finish(mask ? static_cast<double>(sum_of_lanes(count)) : static_cast<double>(n));
}

}  // namespace PF_ISA
}  // namespace pf

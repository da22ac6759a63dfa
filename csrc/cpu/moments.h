// Count, mean and sum of squared deviations: two passes over each tile in L1, tiles joined in double by Chan's rule
// (Chan, Golub, LeVeque 1979). No cancellation, and a fixed order.
#pragma once

namespace pf {
namespace PF_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }
};

// x at n valid lanes of a tile; mask == nullptr: all n.
template <class T>
inline Moments tile_moments(const T* x, const T* mask, int64_t n) {
  using V = Vec<T>;
  const V zero(T(0));
  V sum(T(0)), count(T(0)), squares(T(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    const auto valid = tile_valid<T>(mask, i, n);
    sum = sum + select(valid, V::load(x + i), zero);
    count = count + select(valid, V(T(1)), zero);
  }
  Moments m;
  m.count = sum_of_lanes(count);
  if (m.count == 0) return m;
  m.mean = static_cast<double>(sum_of_lanes(sum)) / m.count;
  const V mean(static_cast<T>(m.mean));
  V drift(T(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    const V d = select(tile_valid<T>(mask, i, n), V::load(x + i) - mean, zero);
    squares = squares + d * d;
    drift = drift + d;
  }
  // mean was rounded to T; drift is what that left
  const double left = sum_of_lanes(drift);
  m.mean = static_cast<double>(static_cast<T>(m.mean)) + left / m.count;
  m.m2 = static_cast<double>(sum_of_lanes(squares)) - left * (left / m.count);
  if (m.m2 < 0) m.m2 = 0;  // comparisons with NaN are false: it stays
  return m;
}

}  // namespace PF_ISA
}  // namespace pf

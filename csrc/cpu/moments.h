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

// The valid ones of n elements; mask == nullptr: all. kEvery: all, and n is a whole number of vectors.
template <class T, bool kEvery = false>
inline Moments tile_moments(const T* x, const T* mask, int64_t n) {
  using V = Vec<T>;
  const V zero(T(0));
  const auto kept = [&](const V& v, int64_t i) {
    if constexpr (kEvery) return v;
    return select(tile_valid<T>(mask, i, n), v, zero);
  };
  V sum(T(0));
  for (int64_t i = 0; i < n; i += kLanes) sum = sum + kept(V::load(x + i), i);
  Moments m;
  m.count = static_cast<double>(n);
  if (mask) {
    V count(T(0));
    for (int64_t i = 0; i < n; i += kLanes) count = count + kept(V(T(1)), i);
    m.count = sum_of_lanes(count);
  }
  if (m.count == 0) return m;
  const T mean = static_cast<T>(static_cast<double>(sum_of_lanes(sum)) / m.count);
  V squares(T(0)), drift(T(0));
  for (int64_t i = 0; i < n; i += kLanes) {
    const V d = kept(V::load(x + i) - V(mean), i);
    squares = squares + d * d;
    drift = drift + d;
  }
  const double left = sum_of_lanes(drift);  // what rounding the mean to T left over
  m.mean = static_cast<double>(mean) + left / m.count;
  m.m2 = static_cast<double>(sum_of_lanes(squares)) - left * (left / m.count);
  if (m.m2 < 0) m.m2 = 0;  // NaN compares false and stays
  return m;
}

}  // namespace PF_ISA
}  // namespace pf

// Count, mean and sum of squared deviations, joined by Chan's rule (Chan, Golub, LeVeque 1979).
#pragma once
#include "number.h"

namespace pf {
namespace PF_ISA {

struct Moments {
  double count = 0, mean = 0, m2 = 0;

  PF_FN void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * delta * (count * (other.count / total));
    count = total;
  }

  // Of `count` numbers around `shift`, from the sums of their deviations and of their squares.
  static PF_FN Moments shifted(double count, double shift, double drift, double squares) {
    if (count == 0) return {};
    const double m2 = squares - drift * (drift / count);
    return {count, shift + drift / count, m2 < 0 ? 0 : m2};  // NaN compares false and stays
  }
};

// The same before the end, around one of the numbers: nothing cancels that n roundings do not bound, and joining two
// takes no division.
template <class T>
struct SumsAround {
  T shift = 0, drift = 0, squares = 0;

  PF_FN void add(T x, bool is_first) {
    if (is_first) shift = x;
    const T deviation = x - shift;
    drift += deviation, squares += deviation * deviation;
  }
  PF_FN void merge(double count, const SumsAround& o, double others) {
    if (others == 0) return;
    if (count == 0) {
      *this = o;
      return;
    }
    const double step = o.shift - shift;
    squares += o.squares + step * (2 * o.drift + others * step);
    drift += o.drift + others * step;
  }
  PF_FN Moments finish(double count) const { return Moments::shifted(count, shift, drift, squares); }
  PF_FN SumsAround<double> wide() const { return {shift, drift, squares}; }
};
using ShiftedSums = SumsAround<double>;

}  // namespace PF_ISA
}  // namespace pf

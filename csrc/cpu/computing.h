// What the loops of all losses compute in.
#pragma once

#include "body.h"
#include "vector.h"

namespace fused_ce {
namespace {

// Elements of a buffer of the first-level cache.
constexpr int kBlock = 1024;

struct FloatsSum {
  Doubles lanes{};
  FUSED_CE_HOST_DEVICE void add(Floats v) { lanes += __builtin_convertvector(v, Doubles); }
  FUSED_CE_HOST_DEVICE double total() const {
    double sums[4] = {};  // that do not wait for one another
    for (int i = 0; i < kLanes; ++i) sums[i % 4] += lanes[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// What Real is computed in, how its vectors are added up, and how many elements a step takes.
template <class Real>
struct Computing;
template <>
struct Computing<float> {
  using Vector = Floats;
  using Total = FloatsSum;
  static constexpr int kStep = 2 * kLanes;
};
template <>
struct Computing<double> {
  using Vector = double;
  using Total = Sum;
  static constexpr int kStep = 2;
};
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

FUSED_CE_HOST_DEVICE float sum_of_lanes(Floats v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
FUSED_CE_HOST_DEVICE float max_of_lanes(Floats v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}
FUSED_CE_HOST_DEVICE double sum_of_lanes(double v) { return v; }
FUSED_CE_HOST_DEVICE double max_of_lanes(double v) { return v; }

}  // namespace
}  // namespace fused_ce

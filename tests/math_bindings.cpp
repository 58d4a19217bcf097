// What test_math.py calls: the functions of csrc/math.h and the conversions of csrc/cpu/vector.h
// over numpy arrays, as submodules `scalar` (float), `vector` (kLanes floats), `double` and
// `doubles` (a vector of them).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "../csrc/cpu/vector.h"

namespace py = pybind11;
using namespace fused_ce;

namespace {

constexpr Precision kFull = Precision::kFull;
constexpr Precision kHalf = Precision::kHalf;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class V>
constexpr int kWidth = sizeof(V) / sizeof(ScalarOf<V>);

// The kWidth<V> values at p, or as many as there are, filled up with zeros.
template <class V>
V take(const Array<ScalarOf<V>>& values, py::ssize_t at) {
  ScalarOf<V> lanes[kWidth<V>] = {};
  for (int i = 0; i < kWidth<V> && at + i < values.size(); ++i) lanes[i] = values.data()[at + i];
  V v;
  memcpy(&v, lanes, sizeof(v));
  return v;
}
template <class V>
void put(V v, ScalarOf<V>* to, py::ssize_t count) {
  memcpy(to, &v, count < kWidth<V> ? count * sizeof(ScalarOf<V>) : sizeof(v));
}

// f over arrays of one length: an array of it, or [2, length] for losses and gradients.
template <class V, class F, class... More>
Array<ScalarOf<V>> map(F f, const Array<ScalarOf<V>>& first, const More&... more) {
  py::ssize_t length = first.size();
  using Value = decltype(f(take<V>(first, 0), take<V>(more, 0)...));
  constexpr bool kPair = !std::is_same_v<Value, V>;
  Array<ScalarOf<V>> out(kPair ? 2 * length : length);
  ScalarOf<V>* to = out.mutable_data();
  for (py::ssize_t i = 0; i < length; i += kWidth<V>) {
    Value value = f(take<V>(first, i), take<V>(more, i)...);
    if constexpr (kPair) {
      put(value.loss, to + i, length - i);
      put(value.gradient, to + length + i, length - i);
    } else {
      put(value, to + i, length - i);
    }
  }
  return out;
}

// One row's loss, lse and entropy, and the factors of its gradient: [7, length].
template <class V>
Array<ScalarOf<V>> softmax_row(
    const Array<ScalarOf<V>>& sums,      // [5, length]
    const Array<ScalarOf<V>>& target,    // [2, length] w_y, l_y
    const Array<ScalarOf<V>>& upstream,  // [3, length] loss, lse, entropy
    double z_loss) {
  py::ssize_t length = sums.shape(1);
  Array<ScalarOf<V>> out({py::ssize_t{7}, length});
  const V z = V{} + static_cast<ScalarOf<V>>(z_loss);
  for (py::ssize_t i = 0; i < length; i += kWidth<V>) {
    auto at = [&](const Array<ScalarOf<V>>& from, int row) {
      return take<V>(from, row * length + i);
    };
    SoftmaxSums<V> s{at(sums, 0), at(sums, 1), at(sums, 2), at(sums, 3), at(sums, 4)};
    V weight = at(target, 0);
    auto row = SoftmaxRow<V>::evaluate(s, true, weight, at(target, 1), z);
    auto g = SoftmaxGradient<V>::evaluate(s, row, weight, z, at(upstream, 0), at(upstream, 1),
                                          at(upstream, 2));
    V results[] = {row.loss,  row.lse,       row.entropy, g.exponential,
                   g.entropy, g.coefficient, g.label};
    for (int k = 0; k < 7; ++k) put(results[k], out.mutable_data() + k * length + i, length - i);
  }
  return out;
}

template <class V>
void define_math(py::module_ m) {
  using Values = const Array<ScalarOf<V>>&;
  m.def("exp_negative",
        [](Values y) { return map<V>([](V v) { return math::exp_negative<kFull>(v); }, y); });
  m.def("log1p_unit",
        [](Values e) { return map<V>([](V v) { return math::log1p_unit<kFull>(v); }, e); });
  m.def("exp_negative_half",
        [](Values y) { return map<V>([](V v) { return math::exp_negative<kHalf>(v); }, y); });
  m.def("log1p_unit_half",
        [](Values e) { return map<V>([](V v) { return math::log1p_unit<kHalf>(v); }, e); });
  m.def("tanh", [](Values x) { return map<V>([](V v) { return math::tanh(v); }, x); });
  m.def("log", [](Values x) { return map<V>([](V v) { return math::log(v); }, x); });
  m.def("logits", [](Values x, Values negative, Values positive, Values scale) {
    auto f = [](V v, V a, V b, V s) { return BceLogits::evaluate<kFull>(v, a, b, a + b, s); };
    return map<V>(f, x, negative, positive, scale);
  });
  m.def("probability", [](Values p, Values t) {
    return map<V>([](V v, V u) { return BceProbability::evaluate<kFull>(v, u); }, p, t);
  });
  m.def("focal", [](Values x, Values t, double positive, double negative, double gamma,
                    double parity, int32_t power) {
    using Scalar = ScalarOf<V>;
    FocalOptions<Scalar> options{static_cast<Scalar>(positive), static_cast<Scalar>(negative),
                                 static_cast<Scalar>(gamma), static_cast<Scalar>(parity), power};
    return map<V>([&](V v, V u) { return FocalLogits::evaluate<kFull>(v, u, options); }, x, t);
  });
  m.def("softmax_row", &softmax_row<V>);
}

// T's bits to floats and back; the length must be a multiple of kWidth<V>.
template <class V, class T>
void define_conversions(py::module_ m, const std::string& name) {
  m.def(("widen_" + name).c_str(), [](const Array<uint16_t>& bits) {
    Array<float> out(bits.size());
    const T* from = reinterpret_cast<const T*>(bits.data());
    for (py::ssize_t i = 0; i < bits.size(); i += kWidth<V>) {
      if constexpr (kWidth<V> == 1) {
        out.mutable_data()[i] = to_real<float>(from[i]);
      } else {
        store(out.mutable_data() + i, load(from + i));
      }
    }
    return out;
  });
  m.def(("narrow_" + name).c_str(), [](const Array<float>& values) {
    Array<uint16_t> out(values.size());
    T* to = reinterpret_cast<T*>(out.mutable_data());
    for (py::ssize_t i = 0; i < values.size(); i += kWidth<V>) {
      if constexpr (kWidth<V> == 1) {
        to[i] = from_real<T>(values.data()[i]);
      } else {
        store(to + i, load(values.data() + i));
      }
    }
    return out;
  });
}

template <class V>
void define_conversions(py::module_ m) {
  define_conversions<V, Float16>(m, "float16");
  define_conversions<V, BFloat16>(m, "bfloat16");
}

}  // namespace

PYBIND11_MODULE(math_bindings, m) {
  auto scalar = m.def_submodule("scalar"), vector = m.def_submodule("vector");
  define_math<float>(scalar);
  define_math<Floats>(vector);
  define_math<double>(m.def_submodule("double"));
  define_math<Doubles>(m.def_submodule("doubles"));
  define_conversions<float>(scalar);
  define_conversions<Floats>(vector);
}

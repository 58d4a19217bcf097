"""csrc/math.h against mpmath, and the half conversions of csrc/cpu/vector.h against torch.

Every function is tested as scalar code and as vector code, in each of the instruction sets that the
CPU ops are built for and this machine has.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

mpmath = pytest.importorskip("mpmath")
np = pytest.importorskip("numpy")
pybind11 = pytest.importorskip("pybind11")

HERE = Path(__file__).parent
CAPABILITY = torch.backends.cpu.get_cpu_capability()
FLAGS = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "native": ["-march=native"]}


@pytest.fixture(scope="session", params=FLAGS)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler named c++")
    if not (HERE.parent / "csrc").is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    if request.param == "avx2" and not CAPABILITY.startswith("AVX"):
        pytest.skip(f"this machine's instruction set is {CAPABILITY}")
    module = tmp_path_factory.mktemp(request.param) / "math_bindings.so"
    # -ffp-contract as in CMakeLists.txt
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += ["-ffp-contract=off", "-Wno-psabi"]
    folders = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [compiler, *flags, *FLAGS[request.param], *(f"-I{folder}" for folder in folders)]
    subprocess.run([*command, HERE / "math_bindings.cpp", "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("math_bindings", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=["scalar", "vector", "double", "doubles"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def dtype_of(kind: str) -> Any:
    return np.float64 if kind.startswith("double") else np.float32


@cache
def magnitudes(dtype: Any, most: float) -> Any:
    """Positive numbers up to `most`: where a function may go wrong, their neighbours, others."""
    info = np.finfo(dtype)
    generator = np.random.default_rng(0)
    values = [0, info.smallest_subnormal, info.tiny / 3, info.tiny, 1e-38, 1e-30, 1e-8, 1, 20, 87]
    values += [87.34, 88, 88.73, 103.9, 103.97, 103.98, 104, 200, 708.4, 745.2, 746]
    powers = 2.0 ** np.arange(-30, 9)
    steps = np.arange(1, 300) * np.log(2) / 2  # where exp_negative goes on to the next power of two
    random = [generator.uniform(0, most, 300), np.exp(generator.uniform(-90, 0, 300))]
    values = np.concatenate([values, powers, steps, *random]).astype(dtype)
    values = np.concatenate([values, np.nextafter(values, 0), np.nextafter(values, dtype(np.inf))])
    return np.unique(values[(values >= 0) & (values <= most)])


@cache
def logits(dtype: Any) -> Any:
    values = magnitudes(dtype, 800.0 if dtype == np.float64 else 200.0)
    return np.concatenate([-values[::-1], values])


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": mpmath.exp,
    "log": mpmath.log,
    "log1p": mpmath.log1p,
    "tanh": mpmath.tanh,
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
}


@cache
def _right(name: str, values: bytes, dtype: Any) -> Any:
    results = []
    with mpmath.workdps(60):
        for value in np.frombuffer(values, dtype):
            mantissa, exponent = mpmath.frexp(FUNCTIONS[name](mpmath.mpf(float(value))))
            high = float(mantissa)
            results.append(np.ldexp(np.longdouble(high) + float(mantissa - high), exponent))
    return np.array(results)


def right(name: str, values: Any) -> Any:
    """The function by mpmath, in numpy's widest floats: sums of a few such terms are as good."""
    return _right(name, values.tobytes(), values.dtype.type)


def ulp(magnitude: Any, dtype: Any) -> Any:
    """The spacing of the dtype's numbers at a magnitude."""
    info = np.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(magnitude), info.tiny))[1]
    return np.ldexp(np.longdouble(info.eps), exponent - 1)


def assert_within(units: Any, got: Any, wanted: Any, *inputs: Any, terms: Any = None) -> None:
    """The error is at most so many units in the last place of the result, or of `terms`."""
    unit = ulp(wanted if terms is None else terms, got.dtype)
    error = np.where(np.isnan(got) & np.isnan(wanted), 0, np.abs(got - wanted) / unit / units)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    at = [value[worst] if np.ndim(value) else value for value in inputs]
    assert error[worst] <= 1, f"at {at}: {got[worst]} where {wanted[worst]} is right"


# Errors in units in the last place, of which one is 2^-24 to 2^-23 of a float.
# exp_negative: its fit 0.05 (3.1e-9), the rounding of r 0.25, the polynomial's product 0.2 and sum
# 0.25, the result 0.5. A subnormal result is rounded once more.
EXP, EXP_SUBNORMAL = 1.25, 1.75
# log1p_unit: its fit 0.16 (9.4e-9); e^2, the polynomial and their product, which is at most 0.45 of
# the result, 0.9 in all; the sum 0.5.
LOG1P = 1.6
# log: its fit 0.1 (5.9e-9), f^2 / 2 and the tail 0.4, two sums of 0.5.
LOG = 1.5
# tanh: up to 1 the polynomial's part is at most a third of the result, and so is 2 e / (1 + e)
# above: its own error is below 3, a unit of the result in all; the last sum 0.5. libm's is 2 off.
TANH, TANH_DOUBLE = 1.5, 2.5


def test_exp_negative(bindings: Any, kind: str) -> None:
    m, dtype = getattr(bindings, kind), dtype_of(kind)
    y = magnitudes(dtype, 800.0 if kind.startswith("double") else 200.0)
    y = np.concatenate([-y[y <= 43], y])  # the focal loss asks for exp of up to 43
    wanted = right("exp", -y)
    units = np.where(wanted < np.finfo(dtype).tiny, EXP_SUBNORMAL, EXP)
    assert_within(units, m.exp_negative(y), wanted, y)
    # Of the 2e-5 that Precision::kHalf promises of a sum with log1p, exp has its fit 5.4e-6 and the
    # product of y <= 104 with a rounded log(2), without a fused multiply-add rounded again.
    error = np.abs(m.exp_negative_half(y) - wanted)
    assert (error <= 1.3e-5 * wanted + np.finfo(dtype).smallest_subnormal).all()
    for function in (m.exp_negative, m.exp_negative_half):
        special = function(np.array([0, -0.0, np.inf, 1e30, np.nan], dtype))
        assert special[:4].tolist() == [1, 1, 0, 0]
        assert np.isnan(special[4])


def test_log1p_unit(bindings: Any, kind: str) -> None:
    m, dtype = getattr(bindings, kind), dtype_of(kind)
    e = magnitudes(dtype, 1.0)
    wanted = right("log1p", e)
    assert_within(LOG1P, m.log1p_unit(e), wanted, e)
    # Precision::kHalf promises 2e-5 of the result; a subnormal one is rounded
    error = np.abs(m.log1p_unit_half(e) - wanted)
    assert (error <= 2e-5 * wanted + np.finfo(dtype).smallest_subnormal).all()
    for function in (m.log1p_unit, m.log1p_unit_half):
        special = function(np.array([0, np.nan], dtype))
        assert special[0] == 0
        assert np.isnan(special[1])


def test_log(bindings: Any, kind: str) -> None:
    m, dtype = getattr(bindings, kind), dtype_of(kind)
    x = magnitudes(dtype, 800.0)[1:]
    around_one = 1 + np.arange(-50, 50) * np.finfo(dtype).eps / 2
    borders = (2.0 ** np.arange(-3, 4) * np.sqrt(2))[:, None] * (1 + np.arange(-3, 4) * 1e-7)
    large = [1e10, 1e30, np.finfo(dtype).max]
    x = np.concatenate([x, *(np.ravel(v).astype(dtype) for v in (around_one, borders, large))])
    assert_within(LOG, m.log(x), right("log", x), x)
    special = m.log(np.array([0, -0.0, np.inf, -1, -np.inf, np.nan], dtype))
    assert special[:3].tolist() == [-np.inf, -np.inf, np.inf]
    assert np.isnan(special[3:]).all()


def test_tanh(bindings: Any, kind: str) -> None:
    m, dtype = getattr(bindings, kind), dtype_of(kind)
    border = 1 + np.arange(-50, 50) * np.finfo(dtype).eps / 2  # of polynomial and exponential
    x = np.concatenate([magnitudes(dtype, 100.0), border.astype(dtype)])
    x = np.concatenate([-x, x])
    units = TANH_DOUBLE if kind.startswith("double") else TANH
    assert_within(units, m.tanh(x), right("tanh", x), x)
    special = m.tanh(np.array([np.inf, -np.inf, 1e30, np.nan], dtype))
    assert special[:3].tolist() == [1, -1, 1]
    assert np.isnan(special[3])


def test_logits(bindings: Any, kind: str) -> None:
    dtype = dtype_of(kind)
    x = logits(dtype)
    rise, fall = right("softplus", x), right("softplus", -x)
    p, q = right("sigmoid", x), right("sigmoid", -x)
    coefficients = [(1, 0), (0, 1), (0.3, 0.7), (0, 3), (0.75, 5.25), (2, -1), (-0.5, 4.5), (0, 0)]
    for negative, positive in coefficients:
        for factor in (1.0, -0.1, 1e-3):
            a, b, s = dtype(negative), dtype(positive), dtype(factor)
            arguments = (np.full_like(x, v) for v in (a, b, s))
            loss, gradient = getattr(bindings, kind).logits(x, *arguments).reshape(2, -1)
            a, b, s = np.longdouble(a), np.longdouble(b), np.longdouble(s)
            # Beside exp and log1p, half a unit for each product and sum, a + b too.
            terms = abs(a) * rise + abs(b) * fall
            wanted = a * rise + b * fall
            assert_within(EXP_SUBNORMAL + LOG1P + 2, loss, wanted, x, a, b, terms=terms)
            # 1 + e, its reciprocal, a + b, three products and a sum
            wrong = np.where(x >= 0, abs(a), abs(b))
            terms = abs(s) * (wrong + (abs(a) + abs(b)) * np.minimum(p, q))
            wanted = s * (a * p - b * q)
            assert_within(EXP_SUBNORMAL + 3.5, gradient, wanted, x, a, b, s, terms=terms)


def test_logits_special(bindings: Any, kind: str) -> None:
    dtype = dtype_of(kind)
    x = np.array([np.inf, -np.inf, np.inf, -np.inf, -0.0, np.nan], dtype)
    t = np.array([1, 0, 0, 1, 0, 1], dtype)
    loss, gradient = getattr(bindings, kind).logits(x, 1 - t, t, np.ones_like(x)).reshape(2, -1)
    assert loss[:4].tolist() == [0, 0, np.inf, np.inf]
    assert gradient[:5].tolist() == [0, 0, 1, -1, 0.5]
    assert np.isnan(loss[5])
    assert np.isnan(gradient[5])
    for gamma, power in ((0, 0), (0.5, 0), (2, 2), (5, 5), (5, 0)):
        arguments = (x, t, 0.25, 0.75, gamma, -1, power)
        loss, gradient = getattr(bindings, kind).focal(*arguments).reshape(2, -1)
        assert loss[:4].tolist() == [0, 0, np.inf, np.inf]
        assert gradient[:4].tolist() == [0, 0, 0.75, -0.25]
        assert np.isnan(loss[5])
        assert np.isnan(gradient[5])


def test_probability(bindings: Any, kind: str) -> None:
    dtype = dtype_of(kind)
    p = magnitudes(dtype, 1.0)
    p = np.unique(np.concatenate([p, 1 - p]))
    inside = p[(p > 0) & (p < 1)]
    log_p, log_q = (np.where(v == 1, 0, -100).astype(np.longdouble) for v in (p, 1 - p))
    log_p[np.isin(p, inside)] = np.maximum(right("log", inside), -100)
    log_q[np.isin(p, inside)] = np.maximum(right("log1p", -inside), -100)
    for label in (0, 1, 0.25, 0.7):
        t = np.full_like(p, label)
        loss, gradient = getattr(bindings, kind).probability(p, t).reshape(2, -1)
        wide, t = p.astype(np.longdouble), t.astype(np.longdouble)
        # log, what rounding 1 - p took (a quotient and a sum), two products and two sums
        terms = -(np.abs(t) * log_p + np.abs(1 - t) * log_q)
        assert_within(LOG + 3, loss, terms, p, label)
        # 1 - p, the difference, the product and the quotient: four units in a lower binade
        wanted = (wide - t) / np.maximum(wide * (1 - wide), np.float32(1e-12))  # as torch
        assert_within(4, gradient, wanted, p, label)
    special = getattr(bindings, kind).probability(np.full(1, np.nan, dtype), np.ones(1, dtype))
    assert np.isnan(special).all()


@pytest.mark.parametrize(
    ("gamma", "power"),  # by logarithms, and by products of each kind
    [(0, 0), (0.5, 0), (1, 0), (2, 0), (5, 0), (1, 1), (2, 2), (3, 3), (5, 5), (8, 8)],
)
def test_focal(bindings: Any, kind: str, gamma: float, power: int) -> None:
    dtype = dtype_of(kind)
    x = logits(dtype)
    rise, fall = right("softplus", x), right("softplus", -x)
    p, q = right("sigmoid", x), right("sigmoid", -x)
    parity = 1 - 2 * (gamma % 2) if gamma == int(gamma) else np.nan
    for label in (0, 1, 0.25, 0.7, 1.5, -0.5):
        t = np.longdouble(dtype(label))
        a = 1 - t
        u = a * p + t * q
        size = np.abs(u)
        # how much larger the terms of u are than u
        spread = (abs(a) * p + abs(t) * q) / size
        # gamma multiplies the rounding of log u, and that of u where it is a sum; or that of u
        of_log = 1 if power else np.abs(np.log(size))
        condition = 1 + gamma * (of_log + (spread if label not in (0, 1) else 0))
        modulation = size**gamma * np.where(u < 0, parity, 1)
        slope = (a - t) * p * q / u
        ce, ce_x = a * rise + t * fall, a * p - t * q
        ce_terms = abs(a) * rise + abs(t) * fall
        ce_x_terms = np.where(x >= 0, abs(a), abs(t)) + (abs(a) + abs(t)) * np.minimum(p, q)
        x_terms = ce_x_terms + ce_terms * gamma * np.abs(slope) * spread
        for of_positive, of_negative in ((0.25, 0.75), (1, 1)):
            arguments = (x, np.full_like(x, label), of_positive, of_negative, gamma, parity, power)
            loss, gradient = getattr(bindings, kind).focal(*arguments).reshape(2, -1)
            factor = (of_positive * t + of_negative * a) * modulation
            terms = (of_positive * abs(t) + of_negative * abs(a)) * size**gamma * condition
            # The cross entropy's error, that of one exponential more, and four products and sums;
            # what underflows is multiplied by a hundred at most.
            units = EXP_SUBNORMAL + LOG1P + 0.5 + EXP + 2
            least = 100 * np.finfo(dtype).tiny
            for got, wanted, of in (
                (loss, factor * ce, ce_terms),
                (gradient, factor * (ce_x + gamma * ce * slope), x_terms),
            ):
                assert_within(units, got, wanted, x, label, gamma, terms=terms * of + least)


HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def to_bits(values: torch.Tensor) -> Any:
    return values.view(torch.int16).numpy().view(np.uint16)


def exact_softmax_row(logits: Any, b: Any, y: int, weight: Any, z: Any, upstream: Any) -> Any:
    """Loss, lse, entropy and d / d l_c of all together, by the definitions of csrc/math.h."""
    logits, b, upstream = ([mpmath.mpf(float(v)) for v in row] for row in (logits, b, upstream))
    weight = mpmath.mpf(float(weight))
    lse = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in logits))
    p = [mpmath.exp(x - lse) for x in logits]
    entropy = lse - mpmath.fsum(q * x for q, x in zip(p, logits, strict=True))
    spread = mpmath.fsum(c * (lse - x) for c, x in zip(b, logits, strict=True))
    loss = weight * (lse - logits[y]) + spread + z * lse**2
    gradients = []
    for c, (q, x) in enumerate(zip(p, logits, strict=True)):
        of_loss = (weight + mpmath.fsum(b) + 2 * z * lse) * q - b[c] - (weight if c == y else 0)
        of_entropy = -q * (x - lse + entropy)
        gradients.append(upstream[0] * of_loss + upstream[1] * q + upstream[2] * of_entropy)
    return [np.longdouble(float(v)) for v in (loss, lse, entropy, *gradients)]


@pytest.mark.parametrize("z_loss", [0, 1 / 8])
def test_softmax_row(bindings: Any, kind: str, z_loss: float) -> None:
    dtype, generator = dtype_of(kind), np.random.default_rng(0)
    rows, classes = 67, 5  # rows for whole vectors, and a tail
    logits = generator.normal(0, 4, (rows, classes)).astype(dtype)
    logits[0] = 0  # as large an entropy as there is
    logits[1] = [80, -80, 0, 0, 0]  # as small a one
    b = generator.uniform(0, 1, (rows, classes)).astype(dtype)
    b[::2] = 0  # rows without coefficients
    weight = generator.uniform(0, 2, rows).astype(dtype)
    y = generator.integers(classes, size=rows)
    upstream = generator.normal(0, 1, (3, rows)).astype(dtype)

    reference = logits.max(1)
    below = np.longdouble(reference)[:, None] - logits
    e = np.exp(-below)
    sums = [reference, e.sum(1), b.sum(1, dtype=np.longdouble), (b * below).sum(1)]
    sums = np.stack([*sums, (e * below).sum(1)]).astype(dtype)
    target = np.stack([weight, logits[np.arange(rows), y]])
    found = getattr(bindings, kind).softmax_row(sums, target, upstream, z_loss)
    loss, lse, entropy = found[:3]
    of_exponential, of_entropy, of_coefficient, of_label = np.longdouble(found[3:])[..., None]
    gradient = e * (of_exponential + of_entropy * below) - b * of_coefficient
    gradient[np.arange(rows), y] -= of_label[:, 0]

    with mpmath.workdps(40):
        exact = np.array(
            [
                exact_softmax_row(logits[i], b[i], y[i], weight[i], z_loss, upstream[:, i])
                for i in range(rows)
            ]
        )
    # The units are of the terms, which cancel: half a one for the sums that come in, the rest for
    # the four or five roundings between these and a result.
    log_sum, total = np.log(sums[1]) + 1, weight + sums[2]
    square = z_loss * (np.abs(reference) + log_sum) ** 2
    assert_within(2, lse, exact[:, 1], terms=np.abs(reference) + log_sum)
    assert_within(3, entropy, exact[:, 2], terms=log_sum + sums[4] / sums[1])
    terms = weight * (reference - target[1]) + sums[3] + total * log_sum + square
    assert_within(3, loss, exact[:, 0], terms=terms)
    of_loss, of_lse, of_entropy = np.abs(upstream)[..., None]
    terms = of_loss[:, 0] * (total + 2 * z_loss * (np.abs(reference) + log_sum)) + of_lse[:, 0]
    terms = terms[:, None] + of_entropy * (log_sum[:, None] + below)
    terms = terms * e / sums[1][:, None] + of_loss * (b + weight[:, None])
    assert_within(3, gradient.astype(dtype).ravel(), exact[:, 3:].ravel(), terms=np.ravel(terms))


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("code", ["scalar", "vector"])
def test_widen(bindings: Any, code: str, name: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    wanted = torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).float().numpy()
    got = getattr(getattr(bindings, code), f"widen_{name}")(bits)
    number = ~np.isnan(wanted)
    assert (np.isnan(got) == ~number).all()
    # as bits, so that -0 is not 0
    assert (got.view(np.uint32) == wanted.view(np.uint32))[number].all()


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("code", ["scalar", "vector"])
def test_narrow(bindings: Any, code: str, name: str) -> None:
    dtype = HALVES[name]
    bits = np.arange(2**16, dtype=np.uint16)
    exact = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    # every tie between neighbours, infinity counted as the number after the last, and the floats
    # beside the ties
    finite = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    beyond = finite[-1] + (finite[-1] - finite[-2])
    finite = np.concatenate([[-beyond], finite, [beyond]])
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(to)) for to in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    values = np.concatenate([exact, ties, *beside, random])
    values = values[: len(values) // 64 * 64]  # whole vectors
    wanted = to_bits(torch.from_numpy(values).to(dtype))
    got = getattr(getattr(bindings, code), f"narrow_{name}")(values)
    number = ~np.isnan(values)
    assert (got == wanted)[number].all()
    assert np.isnan(getattr(bindings.scalar, f"widen_{name}")(got)[~number]).all()

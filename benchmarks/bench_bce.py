"""The standard cases of binary cross entropy: `python benchmarks/bench_bce.py --plot bce.png`."""

import sys

from fused_ce.bench.command import run_cases

# (case, dtype, size) by device
CASES = {
    "cpu": [
        # Smaller than a tensor's own overhead: what a call costs.
        ("plain", "float32", "4"),
        ("plain", "float32", "1000"),
        # One batch of a classifier, in the caches.
        ("plain", "float32", "10000"),
        ("plain", "float32", "1000000"),
        ("plain", "bfloat16", "1000000"),
        ("inplace", "float32", "1000000"),
        ("bool", "float32", "1000000"),
        # Beyond every cache: what memory allows.
        ("plain", "float32", "64Mi"),
        ("plain", "bfloat16", "64Mi"),
        ("pos_weight", "float32", "64Mi"),
        ("weight", "float32", "64Mi"),
        ("bool", "float32", "64Mi"),
        ("bool", "bfloat16", "64Mi"),
        ("inplace", "float32", "64Mi"),
        ("inplace", "bfloat16", "64Mi"),
    ],
    "cuda": [
        # What a call costs: a launch takes longer than the kernel.
        ("plain", "float32", "4"),
        ("plain", "float32", "1000000"),
        # Beyond the cache: what memory allows.
        ("plain", "float32", "64Mi"),
        ("plain", "bfloat16", "64Mi"),
        ("plain", "bfloat16", "512Mi"),
        ("pos_weight", "bfloat16", "64Mi"),
        ("weight", "float32", "64Mi"),
        ("weight", "bfloat16", "64Mi"),
        ("bool", "bfloat16", "64Mi"),
        ("inplace", "float32", "64Mi"),
        ("inplace", "bfloat16", "64Mi"),
    ],
}

if __name__ == "__main__":
    sys.exit(run_cases("bce", __doc__, CASES))

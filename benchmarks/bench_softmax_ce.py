"""The standard cases of softmax cross entropy: `benchmarks/bench_softmax_ce.py --plot ce.png`."""

import argparse
import sys

from fused_ce.bench.command import add_options, run
from fused_ce.bench.rows import STANDARD_PASSES, rows

# (case, dtype, size)
CASES = [
    # Smaller than a tensor's own overhead: what a call costs.
    ("plain", "float32", "2x2"),
    ("plain", "float32", "100x10"),
    # Classifiers: of two classes, of ten, and of ImageNet's thousand.
    ("plain", "float32", "65536x2"),
    ("plain", "float32", "65536x10"),
    ("plain", "float32", "8192x1000"),
    ("plain", "bfloat16", "8192x1000"),
    # Language models: beyond every cache, and vocabularies that no vector length divides.
    ("plain", "float32", "1024x32768"),
    ("plain", "bfloat16", "1024x32768"),
    ("plain", "bfloat16", "1024x50257"),
    ("plain", "float32", "512x128256"),
    ("plain", "bfloat16", "512x128256"),
    ("inplace", "float32", "1024x32768"),
    ("inplace", "bfloat16", "1024x32768"),
    ("ignored", "bfloat16", "1024x32768"),
    ("smoothing", "bfloat16", "1024x32768"),
    ("softcap", "bfloat16", "1024x32768"),
    ("z_loss", "bfloat16", "1024x32768"),
    ("weight", "float32", "8192x1000"),
    ("probabilities", "float32", "8192x1000"),
    # Segmentation: the classes are not the last dimension.
    ("plain", "float32", "8x21x512x512"),
    ("plain", "bfloat16", "8x21x512x512"),
    ("inplace", "float32", "8x21x512x512"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "ce")
    options = parser.parse_args()
    return run(
        (
            row
            for case, dtype, size in CASES
            for row in rows("ce", [case], [dtype], [size], STANDARD_PASSES, options.device)
        ),
        options,
    )


if __name__ == "__main__":
    sys.exit(main())

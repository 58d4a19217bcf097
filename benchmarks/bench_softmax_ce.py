"""The standard cases of softmax cross entropy: `benchmarks/bench_softmax_ce.py --plot ce.png`."""

import sys

from fused_ce.bench.command import run_cases

# (case, dtype, size) by device
CASES = {
    "cpu": [
        # Smaller than a tensor's own overhead: what a call costs.
        ("plain", "float32", "2x2"),
        ("plain", "float32", "100x10"),
        # Classifiers: of two classes, of ten, of a hundred, and of ImageNet's thousand.
        ("plain", "float32", "65536x2"),
        ("plain", "float32", "65536x10"),
        ("plain", "float32", "65536x100"),
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
    ],
    "cuda": [
        # What a call costs: a launch takes longer than the kernel.
        ("plain", "float32", "2x2"),
        # Classifiers: of two classes, of ten, of a hundred, and of ImageNet's thousand.
        ("plain", "float32", "16Mix2"),
        ("plain", "float32", "4Mix10"),
        ("plain", "float32", "1Mix100"),
        ("plain", "float32", "64kx1000"),
        ("plain", "bfloat16", "64kx1000"),
        # Language models: Llama 2, GPT-2, Llama 3, Qwen 2.5, Gemma.
        ("plain", "float32", "8192x32000"),
        ("plain", "bfloat16", "8192x32000"),
        ("plain", "bfloat16", "8192x50257"),
        ("plain", "float32", "4096x128256"),
        ("plain", "bfloat16", "4096x128256"),
        ("plain", "bfloat16", "4096x151936"),
        ("plain", "bfloat16", "4096x256000"),
        ("inplace", "bfloat16", "64kx1000"),
        ("inplace", "float32", "8192x32000"),
        ("inplace", "bfloat16", "8192x32000"),
        ("inplace", "bfloat16", "8192x50257"),
        ("inplace", "bfloat16", "4096x128256"),
        ("inplace", "bfloat16", "4096x256000"),
        ("ignored", "bfloat16", "8192x32000"),
        ("smoothing", "bfloat16", "8192x32000"),
        ("softcap", "bfloat16", "8192x32000"),
        ("z_loss", "bfloat16", "8192x32000"),
        ("weight", "float32", "64kx1000"),
        ("probabilities", "float32", "64kx1000"),
        # Segmentation: the classes are not the last dimension.
        ("plain", "float32", "32x21x512x512"),
        ("plain", "bfloat16", "32x21x512x512"),
        ("inplace", "float32", "32x21x512x512"),
    ],
}

if __name__ == "__main__":
    sys.exit(run_cases("ce", __doc__, CASES))

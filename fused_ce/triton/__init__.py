"""The ops of fused_ce written in Triton, for machines without the native CUDA kernels."""

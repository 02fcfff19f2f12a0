"""Decoding on a GPU: kernels in Triton whose sums have one order, recorded as CUDA graphs."""

"""Decoding on a GPU: Triton kernels with a fixed order of summation, recorded as CUDA graphs."""

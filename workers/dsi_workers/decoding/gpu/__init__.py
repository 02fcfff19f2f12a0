"""The decoder for GPUs. Its limits stand here, because code that counts memory or checks options imports no Triton."""

#: The largest number of rows that the kernels compute.
MOST_ROWS = 256
#: Positions of the KV cache that attention reads as one part (`SPLIT` in kernels.py).
SPLIT_POSITIONS = 128

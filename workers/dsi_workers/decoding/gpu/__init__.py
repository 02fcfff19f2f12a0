"""The decoder for GPUs. Its limits stand here, because code that counts memory or checks options imports no Triton."""

#: The largest number of rows that the kernels compute.
MOST_ROWS = 256
#: A run of more rows, alone in a forward, is computed by library calls as a chunk of a prompt is.
MOST_RUN_ROWS = 64
#: Positions of the KV cache that attention reads as one part (`SPLIT` in kernels.py).
SPLIT_POSITIONS = 128

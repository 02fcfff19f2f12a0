"""The decoder for GPUs. Here are the sizes of its buffers that those must know who count memory, without importing Triton."""

#: The largest number of rows that the kernels compute.
MOST_ROWS = 256
#: Positions of the KV cache that attention reads as one part (`SPLIT` in kernels.py).
SPLIT_POSITIONS = 128

"""Forwards with the same bits however tokens are grouped: layers, attention, KV cache, kernels, and the widths that agree."""

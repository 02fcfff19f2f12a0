"""Forward passes of a model: layers, attention, KV cache and kernels. The bits of a token do not depend on its batch."""

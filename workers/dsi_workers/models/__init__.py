"""From a model reference to a directory with safetensors: fetched from the hub, or converted from a GGUF."""

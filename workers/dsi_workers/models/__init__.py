"""Turns a model reference into a directory with safetensors: by fetching from the model hub, or by converting a GGUF file."""

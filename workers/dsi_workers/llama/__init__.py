"""Runs GGUF files with llama.cpp: the extra `llama-cpp`."""

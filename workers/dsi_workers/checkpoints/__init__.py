"""Load a model from its files: with our own reader for the Llama family, with transformers for all other models."""

"""From the files of a model to layers in memory: our own reader for the Llama family, transformers for the others."""

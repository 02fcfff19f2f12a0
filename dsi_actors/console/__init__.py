"""What commands and benchmarks share: options, signals, terminal, progress, pictures, the description of the machine."""

"""Processes that the benchmarks start, to measure them or to compare with them. They read JSON requests from standard input."""

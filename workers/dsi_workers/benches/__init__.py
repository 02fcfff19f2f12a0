"""Processes that benchmarks measure, or measure against. They read JSON requests from standard input."""

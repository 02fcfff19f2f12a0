"""Faults on purpose: what `dsi-actors chaos` does to workers and to the frames between them and the orchestrator."""

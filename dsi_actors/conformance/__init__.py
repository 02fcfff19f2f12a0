"""Examines a worker: plays the orchestrator of protocol/SPEC.md against it and checks what the worker answers."""

"""The ZeroMQ socket of the orchestrator, and which of the frames that reach it are worth decoding."""

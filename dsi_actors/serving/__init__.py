"""An OpenAI-compatible service on an orchestrator. Needs the extra `serve`; nothing else here imports it."""

"""The worker process: main loop, connection to the orchestrator, engines and models. Start: `python -m dsi_actors.worker`."""

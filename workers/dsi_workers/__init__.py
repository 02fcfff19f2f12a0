"""Workers: one loop, one connection, several engines. Started by `python -m dsi_actors.worker`."""

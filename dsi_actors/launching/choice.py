"""Which launcher an orchestrator uses that was given none."""

from __future__ import annotations

from dsi_actors.config import Config
from dsi_actors.host.requirements import require
from dsi_actors.launching.launcher import Launcher
from dsi_actors.launching.local import LocalLauncher


def launcher_for(config: Config) -> Launcher:
    """Raises ConfigError if a package that it needs is not installed."""
    if config.cluster == "ray":
        require("a Ray cluster", "ray")
        from dsi_actors.launching.ray_cluster import RayLauncher  # imports Ray, which takes a second

        return RayLauncher(config.ray_address)
    return LocalLauncher()

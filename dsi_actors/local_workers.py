"""The workers that an orchestrator starts itself: what they are, where they run, and that all of them came."""

from __future__ import annotations

import time

from dsi_actors.config import NGRAM, TIMED, Config
from dsi_actors.errors import WorkerStartError
from dsi_actors.host.devices import crowding
from dsi_actors.host.requirements import require_models
from dsi_actors.launching.launcher import Launcher, WorkerSpec
from dsi_actors.logs import get_logger
from dsi_actors.root import Root
from dsi_actors.supervision.scaling import Autoscaler, Demand
from dsi_actors.supervision.supervisor import WorkerSupervisor

log = get_logger("local")


async def start_local_workers(root: Root, config: Config, launcher: Launcher, endpoint: str) -> None:
    """Returns when all are ready. Raises ConfigError and WorkerStartError."""
    require_models(config.local_models, *config.local_extras)
    workers = config.local_workers
    if config.cluster == "local":
        _warn_of_crowding(config)
    specs = [
        WorkerSpec(
            device,
            role,
            model,
            endpoint,
            config.log_level,
            config.log_format,
            models_are_there=bool(config.local_models),
        )
        for device, role, model in workers
    ]
    most, spare = config.local_servers, specs[config.first_servers : config.local_servers]
    specs = [*specs[: config.first_servers], *specs[most:]]
    supervisor = WorkerSupervisor(launcher, config, specs, root.on_exit)
    root.supervise(supervisor)
    begun = time.monotonic()
    root.expected_workers = len(specs)
    root.report_workers("loading models")

    def settled() -> bool:
        return len(root.ready_workers) == len(specs) or bool(root.exits) or root.ended

    while not (all_ready := await root.wait_until(settled, config.ready_timeout_s)):
        if not any(worker.preparing for worker in root.workforce.workers):
            break
    if root.exits:
        incarnation, spec, how = root.exits[0]
        reason = root.workforce.failures.get(incarnation, how)
        raise WorkerStartError(f"the {spec.role} worker on {spec.device} did not start: {reason}")
    if root.ended:
        raise WorkerStartError("the orchestrator ended while its workers started")
    if not all_ready:
        raise WorkerStartError(
            f"only {len(root.ready_workers)} of {len(specs)} workers were ready after {config.ready_timeout_s:g} s"
        )
    supervisor.restarts = True
    if spare:
        demand = Demand(config.first_servers, most, shrink_after_s=config.shrink_after_s)
        root.scale(
            Autoscaler(
                supervisor, demand, spare, generations=lambda: len(root.generations), loads=lambda: root.loads
            )
        )  # fmt: skip
    log.info("local workers ready", number=len(specs), after_s=round(time.monotonic() - begun, 2))


def _warn_of_crowding(config: Config) -> None:
    workers = config.local_workers
    targets = [device for device, role, _ in workers if role == "target"]
    drafters = [device for device, role, model in workers if role == "drafter" and model != NGRAM]
    problem = crowding(targets, drafters, config.threads)
    if config.engine != TIMED and problem is not None:
        log.warning(problem)

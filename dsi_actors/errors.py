"""What can go wrong for a user of the orchestrator. Each message is one sentence that says what to do."""

from __future__ import annotations


class DsiError(Exception):
    """Base of all errors that are not bugs of ours."""


class ConfigError(DsiError):
    """A setting or an argument cannot be used. Raised before any work starts."""


class TooManyGenerations(DsiError):
    """So many wait or run already that one more is not taken. Later there is room again."""


class WorkerStartError(DsiError):
    """A local worker did not become ready: it failed to load its model, ended, or took too long."""


class NoTargetError(DsiError):
    """No target server is there to go on with. `token_ids` are the tokens committed so far."""

    def __init__(self, message: str, token_ids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.token_ids = token_ids


class OrchestratorClosed(DsiError):
    """The orchestrator was closed while the generation ran."""

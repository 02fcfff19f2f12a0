"""What a worker that says Hello is told to be, or why it is refused. A function of the settings and of who is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsi_actors.config import NGRAM, NGRAM_FOR, RANDOM, SELF_COPIES, TIMED, Config, adapter_of
from dsi_protocol import PROTOCOL_VERSION, Hello, OptionValue

#: The part of a GPU's memory that its workers take together, where they choose themselves.
_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is told to be."""

    role: str
    engine: str
    model: str
    options: Mapping[str, OptionValue]
    #: Of a drafter: what the configuration, or the worker itself, calls it.
    kind: str = ""

    @property
    def occupies_device(self) -> bool:
        """Whether it keeps a device busy."""
        return self.engine not in (NGRAM, TIMED)


def assign(config: Config, hello: Hello, *, targets: int, kinds: Sequence[str]) -> Assignment | str:
    """The assignment, or the reason of the refusal. There are so many target servers already, and drafters of these kinds."""
    if hello.version != PROTOCOL_VERSION:
        return f"it speaks protocol version {hello.version}, this orchestrator {PROTOCOL_VERSION}"
    role = hello.role
    if role == "auto":
        role = "drafter" if _drafts(config, hello, targets, kinds) else "target"
    if role == "target":
        if hello.model not in ("", config.target):
            return f"it has the model {hello.model!r}, but the target is {config.target!r}"
        if hello.engine not in ("auto", config.engine):
            return f"it has the engine {hello.engine!r}, but target servers here run {config.engine!r}"
        return Assignment(role, config.engine, config.target, {**_share_of_gpu(config, hello), **config.target_options})
    if role == "drafter":
        return _assign_drafter(config, hello, kinds)
    return f"it wants the role {hello.role!r}: a worker is a target or a drafter"


def _drafts(config: Config, hello: Hello, targets: int, kinds: Sequence[str]) -> bool:
    """Whether a worker that leaves its role to us shall draft: if it can do nothing else, or drafters are missing."""
    if hello.engine not in ("auto", config.engine):  # target servers run another one
        return True
    if hello.model == config.target:  # which may draft for itself, in fewer bits
        return hello.model in config.drafters and hello.model not in kinds and targets > 0
    return hello.model in config.drafters or (targets > 0 and len(kinds) < len(config.drafters))


def _share_of_gpu(config: Config, hello: Hello) -> dict[str, OptionValue]:
    """The option of our engines that leaves room for the other local workers with a model on the same GPU."""
    models = max(map(config.local_models_on, hello.device.split(","))) if hello.device.startswith("cuda") else 0
    return {"memory_share": _MEMORY_SHARE / models} if models > 1 else {}


def _assign_drafter(config: Config, hello: Hello, kinds: Sequence[str]) -> Assignment | str:
    """A drafter of the configuration, or of the model that the worker names. A worker with an engine of its own, as one in
    another language has, keeps that engine. It is told the model that the configuration names, if that is one."""
    if hello.engine not in ("auto", NGRAM, config.engine) and not hello.model:
        named = [kind for kind in config.drafters if not kind.startswith((*SELF_COPIES, NGRAM, RANDOM))]
        if not named:
            return Assignment("drafter", hello.engine, "", config.drafter_options, hello.engine)
        options = {**config.drafter_options, "target": config.target}  # its vocabulary may be another one
        return Assignment("drafter", hello.engine, named[0], options, hello.engine)
    lacking = [kind for kind in config.drafters if kind not in kinds]
    kind = reference = hello.model or next(iter([*lacking, *config.drafters]), "")
    engine = config.engine if hello.engine == "auto" else hello.engine
    if hello.engine == NGRAM or (reference == NGRAM and hello.engine == "auto"):
        return Assignment("drafter", NGRAM, "", config.drafter_options, NGRAM)
    if reference == RANDOM:
        options = {"vocabulary_size": 256, "any_vocabulary": True, "acceptance": 0.0}
        return Assignment("drafter", TIMED, "", options, kind)
    if engine == TIMED:
        return Assignment("drafter", TIMED, "", config.drafter_options, kind)
    if not reference:
        return "no drafter is wanted here"
    options = {**_share_of_gpu(config, hello), **config.drafter_options}
    if reference.startswith(NGRAM_FOR):
        reference = reference.removeprefix(NGRAM_FOR)
        options["lookup"] = True
    if reference in SELF_COPIES:
        options["quantization"] = SELF_COPIES[reference]
        reference = config.target
        if adapter := adapter_of(config.target_options):
            options.setdefault("adapter", adapter)  # the target's own weights have it, too
    elif config.target:
        options["target"] = config.target  # its vocabulary may be another one
    return Assignment("drafter", engine, reference, options, kind)

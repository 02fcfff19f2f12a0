"""Refuses weights that do not fit their model. Without this check a library may fill the gaps with random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from dsi_workers.models.files import ModelError, some_names

#: A tensor whose shape does not fit: its name, its shape in the files, and the shape that config.json asks for.
Mismatch: TypeAlias = tuple[str, Sequence[int], Sequence[int]]

_ADVICE = "the files are not of one model, or not complete: fetch the model again, or choose another"


def refuse_misfit(
    reference: str, *, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Mismatch], words: int = 0
) -> None:
    """Raise ModelError if weights are missing, unknown to the model, or of another shape than config.json says.

    `reference`: the model's name in the message. `words`: vocab_size of config.json; 0 if it is not known.
    """
    wrong = sorted(mismatched)
    for name, found, wanted in wrong:
        if words and len(found) == 2 and tuple(wanted) == (words, found[1]):
            raise ModelError(
                f"config.json of {reference} says vocab_size {words}, but {name} has {found[0]} rows: {_ADVICE}"
            )
    if wrong:
        name, found, wanted = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(
            f"the weights of {reference} do not fit its config.json: {name} is {list(found)} and should be "
            f"{list(wanted)}{others}: {_ADVICE}"
        )
    parts = [f"{what}: {some_names(names)}" for what, names in (("missing", missing), ("unknown", unexpected)) if names]
    if parts:
        raise ModelError(f"the weights of {reference} do not fit its config.json ({'; '.join(parts)}): {_ADVICE}")


def refuse_loading_info(info: dict[str, Any], model: Any, reference: str) -> None:
    """`refuse_misfit` for what transformers' `from_pretrained` reports with output_loading_info.

    transformers itself leaves out tied weights and what the model's class declares to be no fault. Buffers are no weights: the
    model computes them, and old files have them still.
    """
    buffers = {name for name, _ in model.named_buffers()}

    def is_buffer(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or any(f".{buffer}".endswith(f".{name}") for buffer in buffers)

    config = model.config.get_text_config(decoder=True)
    refuse_misfit(
        reference,
        missing=[name for name in info["missing_keys"] if name not in buffers],
        unexpected=[name for name in info["unexpected_keys"] if not is_buffer(name)],
        mismatched=info["mismatched_keys"],
        words=int(getattr(config, "vocab_size", 0) or 0),
    )

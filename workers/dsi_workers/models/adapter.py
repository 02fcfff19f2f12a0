"""Merges a LoRA adapter into a model, once, with the library peft. The result is a model like any other."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsi_workers.models.completion import read_pickle
from dsi_workers.models.conversion import identity, kept, link_others, quiet_transformers
from dsi_workers.models.files import (
    ADAPTER_CONFIG,
    INDEX_FILE,
    ModelError,
    Report,
    read_json,
    read_vocabulary_hash,
    some_names,
    weight_files,
)
from dsi_workers.models.headers import read_header
from dsi_workers.models.misfit import refuse_loading_info

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
#: Parts of the names of weights that a tied model has only once.
_TIED = ("lm_head", "embed_tokens", "embed_out", "wte")


def check_adapter(adapter: str) -> Path:
    """Return the adapter's file of weights. Raises ModelError if `adapter` is not the directory of a LoRA adapter, or peft is not
    installed."""
    place = Path(adapter).expanduser()
    if not place.is_dir():
        raise ModelError(f"there is no directory {adapter}: --adapter takes the directory of a LoRA adapter")
    if not (place / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{adapter} has no {ADAPTER_CONFIG}: --adapter takes the directory of a LoRA adapter")
    kind = read_json(place / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{adapter} is an adapter of the kind {kind}: only LoRA is supported")
    found = [place / name for name in _WEIGHTS if (place / name).is_file()]
    if not found:
        raise ModelError(f"{adapter} has no weights ({_WEIGHTS[0]} is missing): fetch the adapter again")
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"merging the adapter {adapter} needs peft: pip install 'dsi-actors[lora]'")
    return found[0]


def merged(directory: Path, adapter: str, report: Report) -> Path:
    """Return the directory of the model in `directory` with the adapter merged into its weights, in float32.

    The model must have safetensors. Merges if that has not been done yet: the key covers the adapter's content. Raises
    ModelError.
    """
    weights, place = check_adapter(adapter), Path(adapter).expanduser()
    _refuse_unfit(directory, place, weights)
    content = hashlib.sha256()
    for file in (place / ADAPTER_CONFIG, weights):
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    base = [directory / name for name in ("config.json", "tokenizer.json", *weight_files(directory))]
    what = f"merging the adapter {adapter} into {directory.name}"
    return kept(
        f"{directory.name}+{place.resolve().name}",
        [content.hexdigest(), identity(*filter(Path.exists, base))],
        place,
        what,
        lambda work: _merge(directory, place, weights, work, f"{what}, once", report),
        report,
    )


def _names(weights: Path) -> Iterable[str]:
    return read_header(weights) if weights.suffix == ".safetensors" else read_pickle(weights)


def _refuse_unfit(directory: Path, place: Path, weights: Path) -> None:
    """Raise ModelError for an adapter that cannot be merged into this model."""
    config = read_json(directory / "config.json")
    if config.get("quantization_config"):
        raise ModelError(
            f"the adapter {place} cannot be merged into quantized weights ({directory}): give the model that is not quantized"
        )
    if config.get("tie_word_embeddings") and any(part in name for name in _names(weights) for part in _TIED):
        raise ModelError(
            f"the adapter {place} changes the embeddings or the output matrix, which are one in {directory}: this cannot be "
            "merged"
        )
    if (place / "tokenizer.json").is_file() and read_vocabulary_hash(place) != read_vocabulary_hash(directory):
        raise ModelError(
            f"the adapter {place} has another vocabulary than {directory}: give the model for which it was trained"
        )


def _merge(directory: Path, place: Path, weights: Path, work: Path, what: str, report: Report) -> None:
    report(what, 0.0, "importing peft")
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries: what matters is checked below
        report(what, 0.1, "reading weights")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        model, info = loaded
        refuse_loading_info(info, model, str(directory))
        report(what, 0.5, "merging")
        adapted = peft.PeftModel.from_pretrained(model, str(place))
        given = set(_names(weights))
        # Whoever saved the adapter may have saved the model's embeddings with it.
        embeddings = any(name.endswith(".weight") and "lora_" not in name for name in given)
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=embeddings))
        if wanted != given:
            # Where weights are missing peft begins with random ones, and it ignores those that it does not know.
            parts = [f"{which}: {some_names(names)}" for which, names in
                     (("missing", wanted - given), ("unknown", given - wanted)) if names]  # fmt: skip
            raise ModelError(
                f"the weights of the adapter {place} do not fit {directory} ({'; '.join(parts)}): give the model for which it "
                "was trained"
            )
        whole = adapted.merge_and_unload()
        report(what, 0.8, "writing safetensors")
        whole.save_pretrained(work)
    for written in work.iterdir():  # the settings are those of the model
        if not written.name.startswith("model"):
            written.unlink()
    link_others(directory, work, leave_out=[*weight_files(directory), INDEX_FILE])
    report(what, 1.0, "")

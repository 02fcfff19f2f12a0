"""Converts a GGUF file, or all parts of a split one, to a directory with safetensors and tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsi_workers.models.conversion import identity, is_kept, kept, quiet_transformers
from dsi_workers.models.files import ModelError, Report, some_names
from dsi_workers.models.misfit import refuse_loading_info
from dsi_workers.models.rope_factors import rope_of_factors

_MAGIC = b"GGUF"
#: How llama.cpp names the parts of a split file.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
#: The tensor by which llama.cpp stores how RoPE is scaled. It is no weight.
_ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(gguf: Path, report: Report, *, tokenizer_only: bool = False) -> Path:
    """Return the directory of the converted model. Converts it if this has not been done yet. With `tokenizer_only`, only
    config.json and the tokenizer are sure to be in it. Raises ModelError."""
    parts = _parts(gguf)
    what = f"converting {gguf.name}"
    match = _PART.fullmatch(gguf.name)
    name, key = match[1] if match else gguf.stem, [identity(*parts)]
    if tokenizer_only and not is_kept(name, key):
        what = f"reading the vocabulary of {gguf.name}"
        return kept(f"{name}-tokenizer", key, gguf, what, lambda work: _convert_tokenizer(parts[0], work), report)
    return kept(name, key, gguf, what, lambda work: _convert(parts, work, f"{what}, once", report), report)


def _parts(gguf: Path) -> list[Path]:
    """All files of the model, in order: more than one if `gguf` is a part of a split model. Raises ModelError."""
    match = _PART.fullmatch(gguf.name)
    if match is None:
        return [gguf]
    count = int(match[3])
    names = [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, count + 1)]
    if absent := [name for name in names if not (gguf.parent / name).is_file()]:
        raise ModelError(
            f"{gguf} is one of {count} parts of a model, and others are not beside it ({some_names(absent)}): put all parts "
            "into one directory"
        )
    return [gguf.parent / name for name in names]


def _convert(parts: Sequence[Path], work: Path, what: str, report: Report) -> None:
    _refuse_other_files(parts)
    report(what, 0.0, "importing transformers")
    try:
        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"converting {parts[0].name} needs torch: pip install 'dsi-actors[torch]' ({error})") from None
    file, joined = parts[0], work / "joined.gguf"
    if len(parts) > 1:
        report(what, 0.05, "joining the parts")
        _join([gguf.GGUFReader(part) for part in parts], joined)
        file = joined
    reader = gguf.GGUFReader(file)
    _refuse_unsupported(reader, parts[0])
    source, name = str(file.parent), file.name
    with quiet_transformers():
        # transformers does not report its progress. The shares of the steps below are measured constants.
        report(what, 0.1, "reading weights")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
        refuse_loading_info(info, model, str(parts[0]))
        _refuse_left_out(reader, model, parts[0])
        report(what, 0.7, "reading the vocabulary")
        AutoTokenizer.from_pretrained(source, gguf_file=name, trust_remote_code=False).save_pretrained(work)
        report(what, 0.9, "writing safetensors")
        for tensor in reader.tensors:
            if tensor.name == _ROPE_FACTORS:
                factors = gguf.dequantize(tensor.data, tensor.tensor_type).tolist()
                _scale_rope(model.config, [float(factor) for factor in factors])
        # The weights are not quantized any more, but with these settings transformers would refuse to save them.
        setattr(model, "hf_quantizer", None)  # noqa: B010
        del model.config.quantization_config
        model.save_pretrained(work)
        report(what, 1.0, "")
    joined.unlink(missing_ok=True)


def _convert_tokenizer(file: Path, work: Path) -> None:
    _refuse_other_files([file])
    try:
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"reading {file.name} needs transformers: pip install 'dsi-actors[torch]' ({error})") from None
    with quiet_transformers():
        for kind in (AutoConfig, AutoTokenizer):
            kind.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False).save_pretrained(work)


def _refuse_other_files(parts: Sequence[Path]) -> None:
    for part in parts:
        with part.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{part} is not a GGUF file, or it is damaged: fetch it again")


def _join(readers: Sequence[Any], path: Path) -> None:
    """Write one GGUF file with the tensors of all parts. The first part has the metadata."""
    import gguf

    first = readers[0]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    promised = _field(first, "split.tensors.count")
    if promised is not None and promised != len(tensors):
        raise ModelError(f"the parts of {path.parent} have {len(tensors)} tensors of {promised}: fetch all parts again")
    writer = gguf.GGUFWriter(path, arch=str(_field(first, "general.architecture")), endianess=first.endianess)
    if (alignment := _field(first, "general.alignment")) is not None:
        writer.data_alignment = int(alignment)
    for field in first.fields.values():
        if field.name.startswith(("GGUF.", "split.")) or field.name == "general.architecture":
            continue
        kind = field.types[0]
        of_items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=of_items)
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=first.endianess)
    writer.close()


def _field(reader: Any, name: str) -> Any:
    """A value of the metadata; None if the file does not have it."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _refuse_unsupported(reader: Any, file: Path) -> None:
    """Raise ModelError for what transformers would leave out of the model without a word."""
    if (_field(reader, "split.count") or 0) > 1:
        raise ModelError(
            f"{file} is one of {_field(reader, 'split.count')} parts of a model, under another name: name the parts as "
            "llama.cpp does (NAME-00001-of-00003.gguf)"
        )
    scaling = _field(reader, f"{_field(reader, 'general.architecture')}.rope.scaling.type")
    if scaling not in (None, "", "none") and _field(reader, "general.architecture") != "gpt-oss":
        raise ModelError(
            f"{file} scales RoPE ({scaling}) in a way that is not supported for GGUF files: give the model with "
            "safetensors instead"
        )


def _refuse_left_out(reader: Any, model: Any, file: Path) -> None:
    """Raise ModelError if the file has weights that the model has not, such as biases of a model that has none here."""
    held = sum(tensor.numel() for tensor in model.parameters())
    given = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != _ROPE_FACTORS)
    if given > held:
        names = _unknown_tensors(reader, model)
        raise ModelError(
            f"{file} has {given} weights, and the {model.config.model_type} model that transformers makes of it {held}"
            f"{f' (unknown: {some_names(names)})' if names else ''}: give the model with safetensors instead"
        )


def _unknown_tensors(reader: Any, model: Any) -> list[str]:
    """Names of tensors in the file that no weight of the model has, by the gguf package's table of names."""
    import gguf

    architecture = _field(reader, "general.architecture")
    kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    if not kinds:
        return []
    names = gguf.get_tensor_name_map(kinds[0], int(model.config.num_hidden_layers))
    parts = [name.rpartition(".") for name in model.state_dict()]
    known = {f"{names.get_name(module)}.{kind}" for module, _, kind in parts}
    return [tensor.name for tensor in reader.tensors if tensor.name not in known | {_ROPE_FACTORS}]


def _scale_rope(config: Any, factors: Sequence[float]) -> None:
    """Make the configuration scale RoPE by the factors of llama.cpp."""
    rope = dict(config.rope_parameters)
    config.rope_parameters = rope_of_factors(factors, float(rope["rope_theta"]), int(config.max_position_embeddings))

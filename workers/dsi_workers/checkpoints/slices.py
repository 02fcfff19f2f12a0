"""Which part of each weight of the Llama family a rank of a group has.

Query heads go with the KV head that they share, so that attention needs nothing of other ranks. The first matrices of a layer
are divided by rows (what they give), the last ones by columns (what they take): one sum over ranks follows each of these.
Embedding and output matrix are divided by rows of the vocabulary, tied or not.
"""

from __future__ import annotations

import math
from typing import Any

from dsi_workers.decoding.share import Share
from dsi_workers.engine import EngineError

#: The MLP and the vocabulary are divided in units of so many rows, where that divides them: kernels compute in tiles. Elsewhere
#: in units of half as many, and so on.
_UNIT = 64
_BY_COLUMNS = ("o_proj", "down_proj")


def refuse_degree(config: Any, degree: int, reference: str) -> None:
    """Raise EngineError if the model cannot be divided among so many ranks. `reference`: its name in the message."""
    least = min(config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    if degree > least:
        what = "KV heads" if least == config.num_key_value_heads else "columns or tokens"
        raise EngineError(
            f"{reference} has {least} {what}, which cannot be divided among {degree} devices: give it at most {least} devices"
        )


def words_of(config: Any, share: Share) -> range:
    """The token ids whose rows of embedding and output matrix the rank has."""
    return share.of(config.vocab_size, _unit(config.vocab_size, share.degree))


def part_of(name: str, config: Any, share: Share) -> tuple[int, range] | None:
    """Which part of the weight `name` the rank has: the dimension that is divided, and the part of it. An empty range: nothing.
    None: all of it. `config`: of the whole model."""
    if share.degree == 1:
        return None
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0, words_of(config, share)
    matrix, _, kind = name.rpartition(".")
    matrix = matrix.rpartition(".")[2]
    if matrix in ("gate_proj", "up_proj", "down_proj"):
        size = config.intermediate_size
        part = share.of(size, _unit(size, share.degree))
    elif matrix in ("q_proj", "k_proj", "v_proj", "o_proj"):
        kv_heads = share.of(config.num_key_value_heads)
        group = 1 if matrix in ("k_proj", "v_proj") else config.num_attention_heads // config.num_key_value_heads
        part = range(kv_heads.start * group * config.head_dim, kv_heads.stop * group * config.head_dim)
    else:
        return None
    if matrix not in _BY_COLUMNS:
        return 0, part
    if kind == "weight":
        return 1, part
    return None if share.rank == 0 else (0, range(0))  # a bias is added once


def _unit(count: int, degree: int) -> int:
    """The largest unit of which each rank gets at least one."""
    unit = math.gcd(count, _UNIT)
    while unit > 1 and count < unit * degree:
        unit //= 2
    return unit


def narrow(config: Any, share: Share) -> None:
    """Change the configuration to the heads that the rank has."""
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = len(share.of(config.num_key_value_heads))
    config.num_attention_heads = config.num_key_value_heads * group

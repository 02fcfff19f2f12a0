"""Compiles kernels for GPUs that need not be here. The interpreter runs code that the compiler refuses."""

from __future__ import annotations

from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsi_workers.decoding.gpu import choice_kernels, expert_kernels, experts, kernels, prompt_kernels

#: An 8B shape.
SHAPE = {"heads": 32, "kv_heads": 8, "dim": 128}
HALF = (
    *("qkv", "cos", "sin", "keys", "values", "branch_keys", "branch_values", "query_norm", "key_norm", "out"),
    *("x", "weight", "y", "scales", "bias", "residual", "norm", "gate_up", "gated"),
)
POINTERS = {
    **dict.fromkeys(HALF, "*bf16"),
    **dict.fromkeys(("positions", "slots", "forks", "firsts", "units", "begins", "ends"), "*i32"),
    **dict.fromkeys(("words", "best_tokens", "tokens", "steps", "ids"), "*i32"),
    **dict.fromkeys(("partial_outputs", "maxima", "exp_sums", "best", "temperatures", "thresholds"), "*fp32"),
    "keys_of_rows": "*i64",
    **dict.fromkeys(("partial_outputs", "maxima", "exp_sums", "logits", "shares", "parts"), "*fp32"),
    **dict.fromkeys(("pairs", "counts"), "*i32"),
    **{"choices": "*i8", "weights": "*bf16"},
}
NUMBERS = {"epsilon": "fp32", "scaling": "fp32"}


#: The experts of Qwen3-30B-A3B.
EXPERTS = {"experts": 128, "top_k": 8}
HIDDEN, INNER = 2048, 768


def shared_bytes(
    kernel: Any, constants: dict[str, Any], *, capability: int, pointers: dict[str, str] | None = None, **launch: int
) -> int:
    """Compile for a GPU of this compute capability; return how much of a processor's shared memory a program takes.

    `pointers`: types of arguments that differ from the usual ones. `launch`: warps and pipeline stages.
    """
    known = {**POINTERS, **(pointers or {})}
    signature = {
        name: "constexpr" if name in constants else known.get(name) or NUMBERS.get(name, "i32")
        for name in kernel.arg_names
    }
    places = [place for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(place,): [["tt.divisibility", 16]] for place in places}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {**launch, **({"launch_pdl": True} if constants.get("pdl") else {})}
    compiled: Any = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


def compile_experts(capability: int) -> None:
    pdl = {"pdl": capability >= 90}
    choice = {**EXPERTS, "renormalized": True, "block_rows": 4, "block_experts": 128, **pdl}
    shared_bytes(expert_kernels.choose_experts, choice, capability=capability)
    shared_bytes(expert_kernels.list_pairs, {**EXPERTS, "block_rows": 256, **pdl}, capability=capability, num_warps=1)
    shared_bytes(expert_kernels.add_experts, {"top_k": 8, "block_rows": 4, "block": 256, **pdl}, capability=capability)
    for plan in (experts._FEW_ROWS, experts._CHUNK):
        for first, int8 in ((True, False), (False, False), (True, True)):
            product = {
                **EXPERTS, "inputs": HIDDEN if first else INNER, "by_row": first, "gated": first, "scaled": int8,
                "normed": first, "tile": plan.tile, "block_experts": 128, "block_n": plan.block_n, "block_k": plan.block_k, **pdl,
            }  # fmt: skip
            kinds = {"weights": "*i8" if int8 else "*bf16", "y": "*bf16" if first else "*fp32"}
            shared_bytes(
                expert_kernels.multiply_by_experts, product, capability=capability, pointers=kinds, num_warps=plan.warps,
                num_stages=plan.stages,
            )  # fmt: skip
    router = {
        "inputs": HIDDEN, "gated": False, "scaled": False, "biased": False, "added": False, "normed": True, "block_rows": 16,
        "block_n": experts._ROUTER_BLOCK, "block_k": 256, "prefetched_lines": 4, **pdl,
    }  # fmt: skip
    shared_bytes(kernels.multiply, router, capability=capability, pointers={"y": "*fp32"}, num_warps=4, num_stages=4)


if __name__ == "__main__":
    for capability in (80, 90):
        constants = {**SHAPE, "pdl": capability >= 90}
        turn = {**constants, "normed": True, "block_half": 64}
        attend = {**constants, "sliding_window": 0, "most_groups": 256, "block_m": 32, "block_d": 128}
        combine = {
            "heads": 32, "dim": 128, "sliding_window": 0, "block_d": 128, "block_splits": 1024, "pdl": capability >= 90
        }  # fmt: skip
        product = {
            "inputs": 4096, "gated": False, "scaled": False, "biased": False, "added": True, "normed": False, "block_rows": 64,
            "block_n": 64, "block_k": 256, "pdl": capability >= 90, "prefetched_lines": 4,
        }  # fmt: skip
        shared_bytes(kernels.apply_rope_and_store_kv, turn, capability=capability)
        shared_bytes(kernels.combine_splits, combine, capability=capability)
        shared_bytes(kernels.multiply, product, capability=capability)
        taken = shared_bytes(kernels.attend_to_splits, attend, capability=capability)
        chunk = {"heads": 32, "kv_heads": 8, "dim": 128, "normed": True, "block_half": 64}
        rope = {**chunk, "block_rows": prompt_kernels.ROPE_ROWS}
        shared_bytes(prompt_kernels.apply_rope_and_store_chunk, rope, capability=capability)
        gate = {"block_rows": prompt_kernels.GATE_ROWS, "block": 512}
        shared_bytes(prompt_kernels.multiply_by_silu, gate, capability=capability)
        choose = {"sampled": True, "filtered": True, "block": choice_kernels.BLOCK_TOKENS}
        shared_bytes(choice_kernels.choose_in_blocks, choose, capability=capability)
        shared_bytes(choice_kernels.take_choices, {"block_rows": 16, "block": 128}, capability=capability)
        assert taken <= 48 * 1024, f"attention takes {taken} bytes of shared memory: too few programs run side by side"
        compile_experts(capability)

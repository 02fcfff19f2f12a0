"""Test support: a LoRA adapter for a small model, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def make_adapter(directory: Path, base: Path, *, seed: int = 1, **settings: Any) -> Path:
    """Write a random adapter for the model in `base`. `settings`: of peft's LoraConfig."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=16, **{"target_modules": ["q_proj", "v_proj", "down_proj"], **settings})
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, so that nothing would change
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(directory)
    return directory

"""Kernels for a GPU run in Triton's interpreter where there is none. It is chosen when they are first imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

"""transformers and llama.cpp themselves as processes of ours, to measure against: see reference.py and llama_cpp.py in
workers/dsi_workers/benches."""

from __future__ import annotations

from dsi_actors.benches.line_process import LineProcess


class ReferenceProcess(LineProcess):
    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        threads: int = 1,
        drafter: str = "",
        device: str = "cpu:0",
        layers: int | None = None,
    ) -> None:
        settings = {
            "--model": model, "--dtype": dtype, "--threads": str(threads), "--drafter": drafter, "--device": device,
        }  # fmt: skip
        if layers is not None:
            settings["--layers"] = str(layers)
        super().__init__("dsi_workers.benches.reference", *(word for setting in settings.items() for word in setting))


class LlamaCppProcess(LineProcess):
    def __init__(self, model: str, quantization: str, drafter: str = "") -> None:
        super().__init__(
            "dsi_workers.benches.llama_cpp", "--model", model, "--quantization", quantization, "--drafter", drafter
        )

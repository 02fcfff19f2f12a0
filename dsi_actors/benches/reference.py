"""transformers itself as a process of ours, to measure against: see workers/dsi_workers/benches/reference.py."""

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

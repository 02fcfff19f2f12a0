"""The sampling parameters of a generation, as they travel in OpenGeneration. SPEC.md section 7 says what each of them does."""

from __future__ import annotations

from dataclasses import dataclass

from dsi_protocol.fields import F64, U32, U64, Bool

#: Below this temperature, sampling is greedy.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a worker chooses tokens. The defaults take the most probable token."""

    temperature: F64 = 0.0  # below 1e-6: the most probable token
    top_k: U32 = 0  # 0: off
    top_p: F64 = 1.0
    min_p: F64 = 0.0
    repetition_penalty: F64 = 1.0
    seed: U64 = 0
    logprobs: Bool = False  # whether Verified carries logarithms of probabilities

    @property
    def greedy(self) -> bool:
        """True if the token with the largest logit is chosen, after all other parameters."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def plain_greedy(self) -> bool:
        """True if the token with the largest logit is chosen, and no parameter changes logits."""
        return self.greedy and self.repetition_penalty == 1

    @property
    def problem(self) -> str:
        """Names a parameter that is outside its range. "" if all are valid."""
        if not 0 <= self.temperature <= 1000:
            return f"temperature must lie in [0, 1000], not {self.temperature}"
        if not 0 < self.top_p <= 1:
            return f"top_p must lie in (0, 1], not {self.top_p}"
        if not 0 <= self.min_p <= 1:
            return f"min_p must lie in [0, 1], not {self.min_p}"
        if not 0.001 <= self.repetition_penalty <= 1000:
            return f"repetition_penalty must lie in [0.001, 1000], not {self.repetition_penalty}"
        return ""


#: Every parameter has its default.
GREEDY = SamplingParameters()

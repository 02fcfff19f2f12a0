"""The sampling parameters of a generation, as they travel in OpenGeneration. SPEC.md section 7 says what each of them does."""

from __future__ import annotations

from dataclasses import dataclass

from dsi_protocol.fields import F64, U32, U64, Bool, Floats, LongText, Tokens, TokenSequences

#: Below this temperature, sampling is greedy.
LEAST_TEMPERATURE = 1e-6
#: The most biased tokens, stop tokens and bad words.
MAX_LISTED = 1024
#: The most tokens of a bad word.
MAX_BAD_WORD = 64
#: The most of the most probable tokens that are told for a position.
MAX_TOP_LOGPROBS = 20


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
    presence_penalty: F64 = 0.0  # subtracted from the logits of tokens that the answer has
    frequency_penalty: F64 = 0.0  # subtracted once for each time that the answer has the token
    biased_tokens: Tokens = ()  # tokens that `biases` are added to
    biases: Floats = ()  # one for each of `biased_tokens`
    bad_words: TokenSequences = ()  # sequences of tokens that the answer must not have
    min_tokens: U32 = 0  # the answer has none of `stop_tokens` among its first tokens, so many
    stop_tokens: Tokens = ()  # tokens that end the answer; needed with min_tokens and with a grammar
    grammar: LongText = ""  # what the answer must be, as llguidance takes it; "": anything
    top_logprobs: U32 = 0  # with `logprobs`: so many of the most probable tokens are told for each position

    @property
    def greedy(self) -> bool:
        """True if the token with the largest logit is chosen, after all other parameters."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def plain_greedy(self) -> bool:
        """True if the token with the largest logit is chosen, and no parameter changes logits."""
        return self.greedy and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """True if a parameter changes logits, or forbids tokens, before `temperature` is applied."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.biased_tokens
            or self.bad_words
            or self.grammar
            or (self.min_tokens and self.stop_tokens)
        )

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                return f"{name} must lie in [-2, 2], not {getattr(self, name)}"
        if self.top_logprobs > (MAX_TOP_LOGPROBS if self.logprobs else 0):
            return f"top_logprobs must lie in [0, {MAX_TOP_LOGPROBS}], and needs logprobs"
        return self._problem_of_lists()

    def _problem_of_lists(self) -> str:
        if len(self.biased_tokens) != len(self.biases) or len(set(self.biased_tokens)) != len(self.biased_tokens):
            return "logit_bias must have one bias for each token, and no token twice"
        if len(self.biases) > MAX_LISTED or not all(-100 <= bias <= 100 for bias in self.biases):
            return f"logit_bias must have at most {MAX_LISTED} tokens, each with a bias in [-100, 100]"
        if len(self.stop_tokens) > MAX_LISTED:
            return f"stop_token_ids must be at most {MAX_LISTED} tokens, not {len(self.stop_tokens)}"
        if len(self.bad_words) > MAX_LISTED or not all(0 < len(word) <= MAX_BAD_WORD for word in self.bad_words):
            return f"bad_words must be at most {MAX_LISTED} sequences of 1 to {MAX_BAD_WORD} tokens"
        return ""


#: Every parameter has its default.
GREEDY = SamplingParameters()

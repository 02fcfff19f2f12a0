"""DSPy: a text, and a signature whose fields a grammar keeps. A model of this size fills no form without one."""

import sys
from typing import Literal

import dspy
from dspy.adapters import JSONAdapter


class Model(dspy.LM):
    """DSPy knows by a list what models can do. A service of one's own is not on it."""

    supports_response_schema = True
    supported_params = frozenset({"response_format"})


class Answer(dspy.Signature):
    """Say what the city is like."""

    city: str = dspy.InputField()
    capital: bool = dspy.OutputField()
    size: Literal["small", "large"] = dspy.OutputField()


model = Model(
    "openai/tiny", api_base=sys.argv[1], api_key="any", cache=False, temperature=0, max_tokens=200, num_retries=0
)
[text] = model("Say hello.")
assert text
with dspy.context(lm=model, adapter=JSONAdapter()):
    answer = dspy.Predict(Answer)(city="Oslo")
assert answer.size in ("small", "large")
assert isinstance(answer.capital, bool)

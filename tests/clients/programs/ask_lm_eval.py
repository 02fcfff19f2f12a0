"""lm-evaluation-harness on two tasks of its own: choices by their likelihood, and a text up to a stop string.

The likelihoods are those that the service tells of the same prompt without an answer.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "any"}
home = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = home.name

import lm_eval  # noqa: E402  it reads the environment
import openai  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

url, directory = sys.argv[1:3]
client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
model = client.models.list().data[0].id

QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0},
    {"question": "Two and two are", "choices": ["a green horse", "four"], "answer": 1},
    {"question": "The end", "choices": [".", " is near, they say"], "answer": 0},
]
DATA = """dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
"""
CHOICES = """task: choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT = """task: text
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match}]
"""

tasks = Path(home.name)
(tasks / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
for name, words in (("choices", CHOICES), ("text", TEXT)):
    (tasks / f"{name}.yaml").write_text(words + DATA.format(file=tasks / "questions.jsonl"))
found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=f"model={model},base_url={url}/completions,tokenizer_backend=huggingface,tokenizer={directory},num_concurrent=2",
    tasks=["choices", "text"],
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)


def likelihood(beginning: str, end: str) -> float:
    """Of the end, as the service tells it of a prompt."""
    answer = client.completions.create(
        model=model, prompt=f"{beginning} {end}", max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    told = answer.choices[0].logprobs
    pairs = zip(told.text_offset, told.token_logprobs, strict=True)
    return sum(logprob for offset, logprob in pairs if offset >= len(beginning))


scored = found["samples"]["choices"]
assert len(scored) == len(QUESTIONS)
right = 0
for sample in scored:
    doc = sample["doc"]
    told = [likelihood(doc["question"], choice) for choice in doc["choices"]]
    for [(own, _greedy)], expected in zip(sample["resps"], told, strict=True):
        assert abs(float(own) - expected) < 1e-6 * abs(expected), (doc, own, expected)
    right += told.index(max(told)) == doc["answer"]
assert abs(found["results"]["choices"]["acc,none"] - right / len(QUESTIONS)) < 1e-6
assert all(sample["resps"][0][0] for sample in found["samples"]["text"])

"""A multiple choice, a generation and a perplexity task for lm-eval, over data sets made here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

WORDS = (
    *("sun", "moon", "river", "stone", "bird", "house", "garden", "winter", "song", "letter"),
    *("bright", "cold", "small", "old", "quiet", "red", "far", "empty", "warm", "new"),
)
NAMES = ("toy_choice", "toy_generate", "toy_perplexity")

_YAML = {
    "toy_choice": """
output_type: multiple_choice
fewshot_split: train
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "toy_generate": """
output_type: generate_until
fewshot_split: train
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e", "\\n\\n"], do_sample: false, max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "toy_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


def write_toy_tasks(folder: Path, *, docs: int = 12, names: tuple[str, ...] = NAMES) -> Path:
    """Write the tasks' YAML files, called ``names``, and their data into ``folder``."""
    for kind, name in zip(NAMES, names, strict=True):
        for seed, split in enumerate(("train", "test")):
            lines = [json.dumps(doc) for doc in _docs(kind, docs, seed)]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    train: {folder / name}.train.jsonl\n    test: {folder / name}.test.jsonl\n"
            f"test_split: test\nmetadata: {{version: 1}}\n{_YAML[kind]}"
        )
    return folder


def _docs(kind: str, count: int, seed: int) -> Iterator[dict[str, object]]:
    generator = random.Random(f"{kind} {seed}")

    def say(words: int) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    for i in range(count):
        if kind == "toy_choice":
            # Some in one token, some that begin alike, and one that another continues.
            choices = [say(1), say(2), say(3)]
            choices.append(f"{choices[0]} {say(2)}")
            question = "" if i == 3 else f"The {say(4 + 3 * (i % 4))}, so the {say(1)} was"
            yield {"question": question, "choices": choices, "answer": generator.randrange(4)}
        elif kind == "toy_generate":
            yield {"question": f"{say(3 + i)}?", "target": say(2)}
        else:
            yield {"text": say(5 + 40 * (i % 4)) + "."}

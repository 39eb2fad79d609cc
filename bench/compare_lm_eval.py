"""Speed of an evaluation against lm-eval's own HFLM: same machine, weights, dtype, tasks.

    python -m bench.compare_lm_eval --threads 2

SmolLM2-135M in float32 answers a toy multiple-choice task with two examples before each question,
continues prompts, and reads texts. Only the time that the two model classes take is measured, not
lm-eval's preparations, which are the same. HFLM pads a batch to its longest sequence and computes
contexts anew for every answer.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import click
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from minitron_kernels import AutoTokenizer, MinitronForCausalLM
from minitron_kernels.integrations.lm_eval import MinitronLM, load_tasks
from minitron_kernels.loaders.hub import resolve
from tests.toy_tasks import NAMES, write_toy_tasks

METHODS = ("loglikelihood", "generate_until", "loglikelihood_rolling")


def theirs(model: MinitronForCausalLM, tokenizer: Any, batch_size: int) -> HFLM:
    """HFLM over transformers' model with the same weights and vocabulary."""
    config = MistralConfig(**model.config.to_hf())
    other = MistralForCausalLM(config).to(model.dtype).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tok,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.eos_token,
    )
    return HFLM(pretrained=other, tokenizer=fast, batch_size=batch_size)


def timed(lm: Any) -> dict[str, float]:
    """Seconds of each kind of request, filled while ``lm`` is used."""
    seconds = dict.fromkeys(METHODS, 0.0)

    def wrap(name: str) -> None:
        method = getattr(lm, name)

        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **options)
            seconds[name] += time.perf_counter() - started
            return result

        setattr(lm, name, run)

    for name in METHODS:
        wrap(name)
    return seconds


@click.command(help=__doc__)
@click.option("--model", "source", default="smollm2-135m", show_default=True)
@click.option("--docs", default=24, show_default=True, help="documents of each task")
@click.option("--shots", default=2, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(source: str, docs: int, shots: int, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    path = resolve(source)
    model = MinitronForCausalLM.from_pretrained(path, dtype="float32", device="cpu", expand=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ours = MinitronLM(model, tokenizer, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        write_toy_tasks(Path(folder), docs=docs)
        results = {}
        for name, lm in (
            ("minitron_kernels", ours),
            ("HFLM", theirs(model, tokenizer, batch_size)),
        ):
            seconds = timed(lm)
            table = simple_evaluate(
                model=lm,
                tasks=load_tasks(NAMES, Path(folder)),
                num_fewshot=shots,
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),
            )
            results[name] = seconds, make_table(table)
    (a, ours_table), (b, theirs_table) = results.values()
    print(ours_table if ours_table == theirs_table else f"{ours_table}\n{theirs_table}")
    print(f"{path.name}, float32, {threads} threads, {docs} documents, {shots} examples each")
    print("| requests | minitron_kernels, s | HFLM, s | ratio |")
    print("|---|---|---|---|")
    for name in METHODS:
        print(f"| {name} | {a[name]:.2f} | {b[name]:.2f} | {b[name] / a[name]:.2f} |")


if __name__ == "__main__":
    main()

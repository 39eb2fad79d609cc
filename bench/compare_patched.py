"""Prefill and decode of a transformers model, as it is and patched: same weights, loop and process.

    python bench/compare_patched.py --threads 2 --repeat 5

The model is SmolLM2-135M with its weights expanded, in transformers' own class. Both sides run a
loop of forward pass (DynamicCache, default attention) and argmax, taking turns; medians are
printed. Where other processes run as well, the CPU time tells more than the time that passes.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
import torch
from tqdm import tqdm

from minitron_kernels import MinitronForCausalLM
from minitron_kernels.integrations.transformers import patch, unpatch
from minitron_kernels.loaders.hub import resolve


def load(model: str, dtype: str) -> Any:
    """transformers' plain model, with dense weights of ``dtype``."""
    from transformers import MistralConfig, MistralForCausalLM

    ours = MinitronForCausalLM.from_pretrained(
        resolve(model), dtype=dtype, device="cpu", expand=True
    )
    theirs = (
        MistralForCausalLM(MistralConfig(**ours.config.to_hf())).to(getattr(torch, dtype)).eval()
    )
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@torch.inference_mode()
def run(model: Any, prompt: torch.Tensor, new_tokens: int) -> list[tuple[float, float]]:
    """Of prefill and of decode: seconds a token, and the seconds of all cores."""
    clocks = time.perf_counter, time.process_time
    marks = [[clock() for clock in clocks]]
    out = model(prompt[None], use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    marks.append([clock() for clock in clocks])
    for _ in range(new_tokens):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    marks.append([clock() for clock in clocks])
    counts = len(prompt), new_tokens
    return [
        ((after[0] - before[0]) / n, (after[1] - before[1]) / n)
        for before, after, n in zip(marks, marks[1:], counts, strict=False)
    ]


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--prompt", "prompt_tokens", default=512, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
def main(
    model: str, dtype: str, prompt_tokens: int, new_tokens: int, threads: int, repeat: int
) -> None:
    torch.set_num_threads(threads)
    theirs = load(model, dtype)
    prompt = torch.randint(10, 1000, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
    measured: dict[str, list[list[tuple[float, float]]]] = {"stock": [], "patched": []}
    for i in tqdm(range(repeat + 1), leave=False):
        for name, timings in measured.items():
            (patch if name == "patched" else unpatch)(theirs)
            timing = run(theirs, prompt, new_tokens)
            if i:  # the first is a warm-up
                timings.append(timing)
    print(f"{model}, {dtype}, {threads} threads, medians of {repeat}")
    print("| phase | | patched | stock | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for k, phase in enumerate((f"prefill {prompt_tokens}", f"decode {new_tokens}")):
        for c, what in enumerate(("tokens/s", "tokens per second of CPU time")):
            ours, stock = ([1 / t[k][c] for t in measured[name]] for name in ("patched", "stock"))
            ratio = statistics.median(a / b for a, b in zip(ours, stock, strict=True))
            medians = statistics.median(ours), statistics.median(stock)
            print(f"| {phase} | {what} | {medians[0]:.1f} | {medians[1]:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

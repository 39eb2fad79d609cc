"""Prefill and decode speed against transformers' eager model: same machine, weights, dtype, prompt.

    python bench/compare_transformers.py --threads 2 --repeat 5

Both run in one process, taking turns; medians are printed. transformers runs its plain forward pass
(default attention, DynamicCache) in a loop of argmax, which is less than its generate() does; this
package runs `generate`, sampling included.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from comparison import SIDES, median, random_prompt, ratio, take_turns

from minitron_kernels.loaders.hub import resolve


@click.command(help=__doc__)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"))
@click.option("--prompt", "prompt_tokens", default=512, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="also write all runs")
def main(
    model: str,
    dtypes: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
    repeat: int,
    json_path: Path | None,
) -> None:
    torch.set_num_threads(threads)
    path = resolve(model)
    prompt = random_prompt(prompt_tokens)
    rows, runs = [], []
    for dtype in dtypes:
        names = "minitron_kernels", "transformers"
        sides = {name: SIDES[name](path, dtype, time.perf_counter) for name in names}
        measured = take_turns(sides, prompt, new_tokens, repeat, dtype)
        runs.append({"dtype": dtype, "tokens_per_second": measured})
        both = list(measured.values())
        for k, phase in enumerate((f"prefill {prompt_tokens}", f"decode {new_tokens}")):
            a, b = (median(timings, k) for timings in both)
            rows.append(f"| {dtype} | {phase} | {a:.1f} | {b:.1f} | {ratio(*both, k):.2f} |")
    print(f"{path.name}, {threads} threads, medians of {repeat}, tokens/s")
    print("| dtype | phase | minitron_kernels | transformers | ratio |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    if json_path is not None:
        json_path.write_text(json.dumps({"model": path.name, "threads": threads, "runs": runs}))


if __name__ == "__main__":
    main()

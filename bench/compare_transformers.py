"""Prefill and decode speed against transformers' eager model: same machine, weights, dtype, prompt.

    python bench/compare_transformers.py --threads 2 --repeat 5

Both run in one process, taking turns, so that a change of the machine's speed meets both; medians
are printed. transformers runs its plain forward pass (default attention, DynamicCache) in a loop of
argmax, which is less than its generate() does; this package runs `generate`, sampling included.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from tqdm import tqdm

from minitron_kernels import MinitronForCausalLM, SamplingParams
from minitron_kernels.generate import generate
from minitron_kernels.loaders.hub import resolve

Timing = tuple[float, float]  # prefill and decode, tokens/s


def ours(path: Path, dtype: str) -> Callable[[list[int], int], Timing]:
    model = MinitronForCausalLM.from_pretrained(path, dtype=dtype, device="cpu")

    def run(prompt: list[int], new_tokens: int) -> Timing:
        params = SamplingParams(max_new_tokens=new_tokens + 1, ignore_eos=True)
        timings = generate(model, None, [prompt], params)[0].timings
        return (
            timings.prefill_tokens / timings.prefill_seconds,
            timings.decode_tokens / timings.decode_seconds,
        )

    return run


def theirs(path: Path, dtype: str) -> Callable[[list[int], int], Timing]:
    """transformers' plain model with the same weights (its GGUF loader would keep them packed)."""
    from transformers import MistralConfig, MistralForCausalLM

    loaded = MinitronForCausalLM.from_pretrained(path, dtype=dtype, device="cpu")
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**loaded.config.to_hf()))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(
        model.config
    )  # its buffers are no weights
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()

    @torch.inference_mode()
    def run(prompt: list[int], new_tokens: int) -> Timing:
        started = time.perf_counter()
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        for _ in range(new_tokens):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        ended = time.perf_counter()
        return len(prompt) / (prefilled - started), new_tokens / (ended - prefilled)

    return run


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
    prompt = torch.randint(10, 1000, (prompt_tokens,), generator=torch.Generator().manual_seed(0))
    rows, runs = [], []
    for dtype in dtypes:
        sides = {"minitron_kernels": ours(path, dtype), "transformers": theirs(path, dtype)}
        measured: dict[str, list[Timing]] = {name: [] for name in sides}
        for i in tqdm(range(repeat + 1), desc=dtype, leave=False):
            for name, run in sides.items():
                timing = run(prompt.tolist(), new_tokens)
                if i:  # the first is a warm-up
                    measured[name].append(timing)
        runs.append({"dtype": dtype, "tokens_per_second": measured})
        for k, phase in enumerate((f"prefill {prompt_tokens}", f"decode {new_tokens}")):
            a, b = (statistics.median(t[k] for t in measured[name]) for name in sides)
            ratio = statistics.median(
                x[k] / y[k] for x, y in zip(*(measured[name] for name in sides), strict=True)
            )
            rows.append(f"| {dtype} | {phase} | {a:.1f} | {b:.1f} | {ratio:.2f} |")
    print(f"{path.name}, {threads} threads, medians of {repeat}, tokens/s")
    print("| dtype | phase | minitron_kernels | transformers | ratio |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    if json_path is not None:
        json_path.write_text(json.dumps({"model": path.name, "threads": threads, "runs": runs}))


if __name__ == "__main__":
    main()

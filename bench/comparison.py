"""What comparisons with other runtimes have in common: the sides, turns, and medians.

A side is a function of a prompt and a number of new tokens that returns tokens/s. Sides take turns,
so that a change of the machine's speed meets all of them. Run as a script, this module serves a
side to the process that started it:

    python bench/comparison.py minitron_kernels FILE.gguf --dtype bfloat16 --threads 2
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from side_process import Clock, Run, Timing, clock_of, serve
from tqdm import tqdm

from minitron_kernels import MinitronForCausalLM, SamplingParams
from minitron_kernels.bench_peers import Transformers
from minitron_kernels.generate import stream


def ours(path: Path, dtype: str, clock: Clock, int8_activations: bool = False) -> Run:
    """`stream`, sampling included."""
    model = MinitronForCausalLM.from_pretrained(
        path, dtype=dtype, device="cpu", int8_activations=int8_activations
    )

    def run(prompt: list[int], new_tokens: int) -> Timing:
        started = clock()
        params = SamplingParams(max_new_tokens=new_tokens + 1, ignore_eos=True)
        events = stream(model, None, [prompt], params)
        next(events)
        prefilled = clock()
        for _ in events:
            pass
        ended = clock()
        return len(prompt) / (prefilled - started), new_tokens / (ended - prefilled)

    return run


def transformers(path: Path, dtype: str, clock: Clock) -> Run:
    """transformers' plain model with the same weights, expanded, in a loop of argmax."""
    model = MinitronForCausalLM.from_pretrained(path, dtype=dtype, device="cpu", expand=True)
    side = Transformers(model, clock)

    def run(prompt: list[int], new_tokens: int) -> Timing:
        times = side.run([prompt], new_tokens + 1)
        return len(prompt) / times.prefill_seconds, new_tokens / times.decode_seconds

    return run


SIDES: dict[str, Callable[[Path, str, Clock], Run]] = {
    "minitron_kernels": ours,
    "minitron_kernels int8": partial(ours, int8_activations=True),
    "transformers": transformers,
}


def random_prompt(tokens: int) -> list[int]:
    ids: list[int] = torch.randint(
        10, 1000, (tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return ids


def take_turns(
    sides: Mapping[str, Run], prompt: list[int], new_tokens: int, repeat: int, title: str
) -> dict[str, list[Timing]]:
    """``repeat`` timings of each side, after a warm-up."""
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for i in tqdm(range(repeat + 1), desc=title, leave=False):
        for name, run in sides.items():
            timing = run(prompt, new_tokens)
            if i:
                timings[name].append(timing)
    return timings


def median(timings: Sequence[Timing], phase: int) -> float:
    return statistics.median(timing[phase] for timing in timings)


def ratio(a: Sequence[Timing], b: Sequence[Timing], phase: int) -> float:
    """Median of the ratios of runs that followed each other."""
    return statistics.median(x[phase] / y[phase] for x, y in zip(a, b, strict=True))


@click.command(help=__doc__)
@click.argument("side", type=click.Choice(list(SIDES)))
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cpu-time", is_flag=True)
def main(side: str, path: Path, dtype: str, threads: int, cpu_time: bool) -> None:
    torch.set_num_threads(threads)
    serve(lambda: SIDES[side](path, dtype, clock_of(cpu_time)))


if __name__ == "__main__":
    main()

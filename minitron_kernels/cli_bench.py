"""The command `minitron bench` (`bench.py` measures)."""

from __future__ import annotations

import functools
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import click

from minitron_kernels.cli import (
    ModelOptions,
    _cuda_graphs_option,
    _json_option,
    _model_options,
    _print_json,
    _write,
    cli,
)


def _integers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not integers with commas between") from None


@cli.command()
@functools.partial(_model_options, model=click.argument("model", required=False))
@click.option("--prompt", default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--generate", default=128, show_default=True, help="New tokens of each sequence.")
@click.option(
    "--batch", default="1,8,64", show_default=True, callback=_integers, help="Sequences at a time."
)
@click.option("--repeat", default=5, show_default=True, help="Runs, a warm-up not counted.")
@click.option("--compare", default="", metavar="NAMES", help="transformers, llama-cpp, or both.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw a figure: .svg, .png or .pdf.",
)
@click.option(
    "--cpu-time", is_flag=True, help="Processor time of one thread: for a CPU that others use."
)
@_cuda_graphs_option
@_json_option
def bench(
    source: ModelOptions,
    prompt: int,
    generate: int,
    batch: list[int],
    repeat: int,
    compare: str,
    plot: Path | None,
    cpu_time: bool,
    cuda_graphs: bool | None,
    as_json: bool,
) -> None:
    """Tokens/s, latencies, memory and share of the bandwidth bound of MODEL, on random prompts."""
    with redirect_stdout(sys.stderr):
        import torch

        from minitron_kernels import bench as runner
        from minitron_kernels import bench_peers

        workload = runner.Workload(prompt, generate, batch, repeat)
        names = bench_peers.parse(compare)
        if plot is not None:
            runner.check_plot(plot)
        model, _ = source.load()
        if cpu_time and (model.device.type != "cpu" or torch.get_num_threads() > 1):
            raise click.UsageError("--cpu-time needs --device cpu --num-threads 1")
        clock = time.process_time if cpu_time else time.perf_counter
        assert model.checkpoint is not None
        path = model.checkpoint.path
        report = runner.run(
            model,
            workload,
            peers=lambda: bench_peers.make(names, model, path, clock),
            clock=clock,
            cuda_graphs=cuda_graphs,
            progress=_progress,
        )
        if plot is not None:
            runner.plot(report, plot)
    if as_json:
        _print_json(report)
    else:
        _write("\n".join(runner.table(report)) + "\n")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)

"""The command `minitron eval` (`integrations/lm_eval.py` does it)."""

from __future__ import annotations

import functools
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from minitron_kernels.cli import (
    ModelOptions,
    _json_option,
    _model_options,
    _print_json,
    _write,
    cli,
)
from minitron_kernels.loaders.files import check_folder


@cli.command("eval")
@functools.partial(_model_options, model=click.argument("model"))
@click.option("--tasks", required=True, metavar="NAME,...", help="Names, patterns, YAML files.")
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Examples before each question.  [default: the task's]",
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="The first N documents of each task, or below 1 this share of them.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Sequences computed at a time.  [default: 64]",
)
@click.option("--chat-template", is_flag=True, help="Put the prompts into the chat template.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    help="Folder of task definitions in lm-eval's YAML format.",
)
@click.option(
    "--run-unsafe-code", is_flag=True, help="Allow tasks that execute code the model wrote."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the JSON object with every document and its answers.",
)
@_json_option
def evaluate(
    source: ModelOptions,
    tasks: str,
    num_fewshot: int | None,
    limit: float | None,
    batch_size: int | None,
    chat_template: bool,
    include_path: Path | None,
    run_unsafe_code: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Score MODEL on tasks of lm-evaluation-harness.

    Needs pip install 'minitron_kernels[eval]'. Data sets come from the Hugging Face Hub, or from
    its cache with HF_HUB_OFFLINE=1.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise click.UsageError("--tasks names none")
    if limit is not None and not (limit < 1 or limit.is_integer()):
        raise click.UsageError(f"--limit takes a whole number or a share below 1, got {limit}")
    if output is not None:
        check_folder(output)
    with redirect_stdout(sys.stderr):
        try:
            from minitron_kernels.integrations import lm_eval
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"minitron eval needs lm-evaluation-harness (no module {error.name!r}): "
                "pip install 'minitron_kernels[eval]'"
            ) from None
        loaded = lm_eval.load_tasks(names, include_path)
        model, tokenizer = source.load()
        results = lm_eval.evaluate(
            model,
            tokenizer,
            loaded,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            chat_template=chat_template,
            run_unsafe_code=run_unsafe_code,
            log_samples=output is not None,
        )
        report = lm_eval.report(results, source.model)
        if output is not None:
            samples = {"samples": lm_eval.as_json(results["samples"])}
            output.write_text(json.dumps({**report, **samples}, indent=2), encoding="utf-8")
    if as_json:
        _print_json(report)
    else:
        _write(lm_eval.table(results))

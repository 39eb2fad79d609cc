"""The `minitron` command: generate, chat, score, eval, bench, info, quantize.

Standard output carries the result only (text as it is produced, or one JSON object); everything
else goes to standard error. Exit codes: 0 done, 2 a mistake of the user's (one line `error: ...`),
130 interrupted by Ctrl-C. Heavy modules are imported inside the commands, so that `minitron --help`
answers at once.

Started by torchrun as several processes, generate, chat and score share the model among them (see
`parallel`): the first process reads and prints, and one of them tells of an error.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from minitron_kernels.config import DTYPES
from minitron_kernels.loaders.hub import SMOLLM2
from minitron_kernels.native import MAX_THREADS

if TYPE_CHECKING:
    from minitron_kernels.generate import GenerationResult, Timings, TokenStream
    from minitron_kernels.loaders.tokenizer import Tokenizer
    from minitron_kernels.model import MinitronForCausalLM
    from minitron_kernels.sampling_params import SamplingParams

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT
MAX_TEXT_BYTES = 1 << 28
PARALLEL_COMMANDS = ("generate", "chat", "score")
USER_ERRORS = (click.ClickException, ValueError, OSError, NotImplementedError, MemoryError)

_Command = Callable[..., Any]
_T = TypeVar("_T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    # Before torch is imported: OpenMP threads that wait by spinning stall when other processes want
    # the cores. On two busy ones SmolLM2 decoded 0.7-2 tokens/s with the default, 4-5 so.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # NumPy's, which multiply nothing here, spin after they start.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # show the escape of what the encoding lacks
            stream.reconfigure(errors="backslashreplace")
    if sys.stdin is None:  # closed by the caller: as if it were empty
        sys.stdin = io.TextIOWrapper(io.BytesIO())
    collects = gc.isenabled()
    gc.disable()  # until a model is loaded: what imports and headers make stays, and is much
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed")
        with _silence() if _rank() else nullcontext():
            return cli.main(args=argv, prog_name="minitron", standalone_mode=False) or 0
    except click.Abort:
        return EXIT_INTERRUPTED
    except (*USER_ERRORS, RuntimeError) as error:
        is_first = _is_first_to_fail()  # else another process has failed, and told why
        if is_first and not (isinstance(error, USER_ERRORS) or _is_out_of_memory(error)):
            raise
        if os.environ.get("MK_TRACEBACK") == "1":
            traceback.print_exc()
        if is_first:
            click.echo(f"error: {_one_line(error)}", err=True)
        return EXIT_USAGE
    finally:
        if collects:
            gc.enable()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch found no memory, which it tells by a RuntimeError."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        message = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        message = (
            error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        )
    elif isinstance(error, MemoryError) or _is_out_of_memory(error):
        message = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        message = str(error)
    return "; ".join(line.strip() for line in message.splitlines() if line.strip()) or repr(error)


# --- several processes ---


def _rank() -> int | None:
    """This process's number among those that torchrun started; None: it is the only one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # so that torch is not imported
        return None
    from minitron_kernels import parallel

    return int(os.environ["RANK"]) if parallel.is_launched() else None


@contextmanager
def _silence() -> Iterator[None]:
    """Print nothing; for all processes but the first."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _is_first_to_fail() -> bool:
    if _rank() is None:
        return True
    from minitron_kernels import parallel

    return parallel.is_first_to_fail()


def _from_first(function: Callable[[], _T]) -> _T:
    """What the first process gets of ``function``, which the others do not call."""
    if _rank() is None:
        return function()
    from minitron_kernels import parallel

    return parallel.from_first(parallel.join(), function)


# --- options that several commands share ---


def _logit_bias(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> dict[int, float]:
    bias = {}
    for value in values:
        token, _, amount = value.partition("=")
        try:
            bias[int(token)] = float(amount)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE, such as 42=-1.5") from None
    return bias


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_revision_option = click.option("--revision", help="Branch, tag or commit of a Hub repository.")
_dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="auto",
    show_default=True,
    help="Type of activations, cache and weights; quantised matrices of a GGUF file stay so.",
)
_expand_option = click.option(
    "--expand", is_flag=True, help="Expand quantised matrices to --dtype while loading."
)
_num_threads_option = click.option(
    "--num-threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: all cores]"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how."""

    model: str | None
    revision: str | None
    dtype: str
    device: str
    expand: bool
    allow_nonfinite: bool
    int8_activations: bool
    num_threads: int | None

    def load(self) -> tuple[MinitronForCausalLM, Tokenizer]:
        from minitron_kernels.loaders.hub import resolve

        if self.model is None:
            command = click.get_current_context().command_path
            click.echo(
                f"no --model: using the small built-in {SMOLLM2}; "
                f"for the 8B model: {command} --model minitron-8b",
                err=True,
            )
        path = resolve(SMOLLM2 if self.model is None else self.model, self.revision)
        opened = None
        if path.suffix == ".gguf" and _rank() is None:  # one of several looks at its part alone
            from minitron_kernels.startup import OpenedGGUF

            scan = not (self.expand or self.allow_nonfinite)
            opened = OpenedGGUF.read(path, scan_scales=scan, num_threads=self.num_threads)

        import torch

        from minitron_kernels.loaders.gguf import GGUFCheckpoint
        from minitron_kernels.loaders.tokenizer import AutoTokenizer
        from minitron_kernels.model import MinitronForCausalLM

        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        tokenizer = opened.tokenizer if opened else AutoTokenizer.from_pretrained(path)
        model = MinitronForCausalLM.from_pretrained(
            GGUFCheckpoint(path, opened.files, opened.scales) if opened else path,
            dtype=self.dtype,
            device=self.device,
            expand=self.expand,
            allow_nonfinite=self.allow_nonfinite,
            int8_activations=self.int8_activations,
            tensor_parallel=_rank() is not None,
        )
        # All that is there now goes to the oldest generation: looking at it took 0.09 s before the
        # first token.
        gc.freeze()
        gc.unfreeze()
        gc.enable()
        return model, tokenizer


_model_option = click.option(
    "--model",
    metavar="SOURCE",
    help="Folder, .gguf or .nemo file, Hub id, Hub id:QUANT, or one of the names minitron-8b, "
    f"minitron-8b:QUANT, {SMOLLM2}.  [default: {SMOLLM2}]",
)


def _model_options(
    command: _Command, model: Callable[[_Command], _Command] = _model_option
) -> _Command:
    """Give `command` the options of ModelOptions, as its argument `source`.

    `model` is the one that names the model.
    """

    @_options(
        model,
        _revision_option,
        _dtype_option,
        click.option(
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
        ),
        _expand_option,
        click.option(
            "--allow-nonfinite",
            is_flag=True,
            help="Load quantised matrices even if a block scale is infinite or NaN.",
        ),
        click.option(
            "--int8-activations",
            is_flag=True,
            help="Round activations to 8 bits for products with quantised matrices on the CPU: "
            "faster, and less exact.",
        ),
        _num_threads_option,
    )
    @functools.wraps(command)
    def run(**options: Any) -> Any:
        fields = [field.name for field in dataclasses.fields(ModelOptions)]
        source = ModelOptions(**{name: options.pop(name) for name in fields})
        return command(source=source, **options)

    return run


_cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="Decode in CUDA graphs, or do not.  [default: where there are any]",
)


def _sampling_options(max_new_tokens: int) -> Callable[[_Command], _Command]:
    # Named as the fields of SamplingParams, which checks the values and has the defaults.
    return _options(
        click.option(
            "--max-new-tokens", type=int, default=max_new_tokens, show_default=True, metavar="N"
        ),
        click.option("--min-new-tokens", type=int, metavar="N"),
        click.option(
            "--temperature", type=float, help="0 takes the likeliest token.  [default: 0]"
        ),
        click.option("--top-k", type=int, metavar="N", help="Sample from the N likeliest tokens."),
        click.option("--top-p", type=float, help="Sample from the likeliest that sum to this."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
        click.option("--repetition-penalty", type=float),
        click.option("--presence-penalty", type=float),
        click.option("--frequency-penalty", type=float),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before TEXT. Repeatable."),
        click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
        click.option("--seed", type=int, help="Makes sampling reproducible."),
        click.option(
            "--logit-bias",
            multiple=True,
            callback=_logit_bias,
            metavar="ID=VALUE",
            help="Added to a token's logit. Repeatable.",
        ),
    )


def _sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    from minitron_kernels.sampling_params import SamplingParams

    return SamplingParams(**{name: value for name, value in options.items() if value is not None})


# --- text in, text out ---


def _utf8(text: str, what: str) -> str:
    """`text` as typed, where lone surrogates stand for bytes that the locale cannot decode."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return _decode(os.fsencode(text), what)
    return text


def _read_utf8(source: Path | None) -> str:
    """The text of a file, or of standard input for None."""
    what = "standard input" if source is None else str(source)
    # A limit, as devices and pipes may have no end.
    with nullcontext(sys.stdin.buffer) if source is None else source.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{what} holds more than {MAX_TEXT_BYTES >> 20} MiB of text")
    return _decode(data, what)


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{what} is not UTF-8: {error}") from None


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _print_json(value: Mapping[str, Any]) -> None:
    # Serialised whole before the first byte goes out; ASCII, so that no locale can break it.
    _write(json.dumps(value, indent=2, default=str, allow_nan=False) + "\n")


def _run(stream: TokenStream, show: bool) -> bool:
    """Run a stream to its end, or to Ctrl-C (then False); `show` prints text as it is produced."""
    finished = True
    try:
        for event in stream:
            if show:
                _write(event.text)
    except KeyboardInterrupt:
        finished = False
    stream.close()
    if show:
        _write("\n")
    return finished


# --- the commands ---


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minitron_kernels", message="%(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Text from Mistral-NeMo-Minitron-8B and other Llama-shaped models."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    elif ctx.invoked_subcommand not in PARALLEL_COMMANDS and _rank() is not None:
        raise click.UsageError(
            f"{ctx.invoked_subcommand} runs in one process: start it without torchrun; "
            f"{', '.join(PARALLEL_COMMANDS)} take several"
        )


@cli.command()
@click.argument("prompt", required=False)
@_model_options
@_sampling_options(max_new_tokens=128)
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json: of the chosen and the N likeliest."
)
@click.option(
    "--batch-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='A prompt a line, or JSONL: {"prompt": TEXT or IDS, sampling options of this request}.',
)
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@click.option(
    "--stats", is_flag=True, help="Tell weights, times and peak memory on standard error."
)
@_cuda_graphs_option
@_json_option
def generate(
    source: ModelOptions,
    prompt: str | None,
    batch_file: Path | None,
    no_stream: bool,
    stats: bool,
    cuda_graphs: bool | None,
    as_json: bool,
    **sampling: Any,
) -> int:
    """Continue PROMPT (standard input when it is absent or "-")."""
    if prompt is not None and batch_file is not None:
        raise click.UsageError("PROMPT and --batch-file exclude each other")
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    requests = _from_first(lambda: _read_requests(prompt, batch_file))
    defaults = _sampling_params(sampling)
    params = [request.sampling_params(defaults) for request in requests]
    streaming = not (as_json or no_stream or batch_file)
    with redirect_stdout(sys.stderr):  # what libraries print is no part of the result
        start = time.perf_counter()
        model, tokenizer = source.load()
        load_seconds = time.perf_counter() - start
        from minitron_kernels.generate import stream

        prompts = [request.prompt for request in requests]
        try:
            run = stream(model, tokenizer, prompts, params, cuda_graphs=cuda_graphs)
        except ValueError as error:  # counts the prompts; the user counts lines
            raise ValueError(
                re.sub(
                    r"^prompt (\d+)",
                    lambda match: f"{requests[int(match[1])].origin}the prompt",
                    str(error),
                )
            ) from error
    finished = _run(run, show=streaming)
    report: dict[str, Any] = {}
    if as_json or stats:
        from minitron_kernels.info import activations_info, outline, peak_memory, weights_info

        report = {
            "timings": {"load_seconds": load_seconds, **_timings_json(run.timings)},
            "weights": weights_info(model),
            "activations": activations_info(model),
            **peak_memory(),
        }
    if as_json:
        results = [_result_json(result) for result in run.results]
        _print_json({**({"results": results} if batch_file else results[0]), **report})
    elif not streaming:
        for i, result in enumerate(run.results, start=1):
            header = f"--- {i}/{len(run.results)} ---\n" if batch_file else ""
            _write(f"{header}{result.text}\n")
    if stats:
        click.echo("\n".join(outline(report)), err=True)
    return 0 if finished else EXIT_INTERRUPTED


@dataclasses.dataclass
class Request:
    """One prompt and the sampling options that it sets itself."""

    origin: str  # what an error message starts with: "", or "FILE, line N: "
    prompt: str | list[int]
    overrides: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"{self.origin}the prompt is empty")
        if isinstance(self.prompt, str):
            try:
                self.prompt.encode()
            except UnicodeError as error:
                raise ValueError(f"{self.origin}the prompt is not Unicode: {error}") from None

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """`defaults` with this request's options in their place."""
        known = [field.name for field in dataclasses.fields(defaults)]
        unknown = self.overrides.keys() - known
        if unknown:
            raise ValueError(
                f"{self.origin}unknown key {min(unknown)!r}; accepted: prompt, {', '.join(known)}"
            )
        overrides = dict(self.overrides)
        try:
            if isinstance(overrides.get("stop"), str):
                overrides["stop"] = (overrides["stop"],)
            bias = overrides.get("logit_bias")
            if isinstance(bias, dict):  # JSON has no integer keys
                overrides["logit_bias"] = {
                    int(token) if token.isdecimal() else token: bias[token] for token in bias
                }
            if "max_length" in overrides:
                overrides.setdefault("max_new_tokens", None)
            return dataclasses.replace(defaults, **overrides)
        except ValueError as error:
            raise ValueError(f"{self.origin}{error}") from None


def _read_requests(prompt: str | None, batch_file: Path | None) -> list[Request]:
    if batch_file is None:
        return [Request("", _read_prompt(prompt), {})]
    return list(_read_batch(batch_file))


def _read_prompt(argument: str | None) -> str:
    if argument is not None and argument != "-":
        return _utf8(argument, "the prompt")
    if sys.stdin.isatty():
        click.echo("reading the prompt from the terminal, to Ctrl-D", err=True)
    return _read_utf8(None).removesuffix("\n").removesuffix("\r")


def _read_batch(path: Path) -> Iterator[Request]:
    """The requests of a batch file, blank lines left out.

    JSONL when named so (.jsonl) or when the first line is an object with a prompt; else each line
    is a prompt.
    """
    lines = [
        (f"{path}, line {number}: ", line)
        for number, line in enumerate(_read_utf8(path).split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix != ".jsonl" and not _is_request(lines[0][1]):
        for origin, line in lines:
            yield Request(origin, line.removesuffix("\r"), {})
        return
    for origin, line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin}not JSON: {error}") from None
        if not isinstance(entry, dict) or "prompt" not in entry:
            raise ValueError(f'{origin}expected an object with the key "prompt", got {line[:60]}')
        prompt = entry.pop("prompt")
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not (isinstance(prompt, str) or is_ids):
            raise ValueError(f"{origin}prompt must be a string or a list of ids, got {prompt!r}")
        yield Request(origin, prompt, entry)


def _is_request(line: str) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and "prompt" in entry


def _result_json(result: GenerationResult) -> dict[str, Any]:
    fields = dataclasses.asdict(result)
    del fields["timings"]  # the run's, reported once
    if result.logprobs is None:
        del fields["logprobs"]
    return fields


def _timings_json(timings: Timings) -> dict[str, float | int | None]:
    fields = dataclasses.asdict(timings)
    for phase in ("prefill", "decode"):
        seconds = fields[f"{phase}_seconds"]
        rate = fields[f"{phase}_tokens"] / seconds if seconds else None
        fields[f"{phase}_tokens_per_second"] = rate
    return fields


@cli.command()
@_model_options
@_sampling_options(max_new_tokens=512)
@click.option("--system", metavar="TEXT", help="Message that tells the model how to behave.")
@_cuda_graphs_option
def chat(
    source: ModelOptions,
    system: str | None,
    cuda_graphs: bool | None,
    **sampling: Any,
) -> int:
    """Talk with a model that has a chat template, on a terminal or with one turn a line piped in.

    /system TEXT sets the system message and starts over, /reset starts over, /exit (or the end of
    the input) ends. Ctrl-C ends a reply; in a pipe, the command.
    """
    params = _sampling_params(sampling)
    model, tokenizer = source.load()
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{model.config.source}: no chat template, so this model cannot chat; "
            "minitron generate continues a text"
        )
    from minitron_kernels.generate import Engine, TokenStream, affordable_tokens

    # One cache for the whole dialogue: of each turn only what is new is read.
    room = affordable_tokens(model, [1, model.config.max_position_embeddings - 1])
    engine = Engine(
        model, tokenizer, room, max_batch_size=1, cuda_graphs=cuda_graphs, keep_last=True
    )
    interactive = _from_first(sys.stdin.isatty)
    if system is not None:
        system = _utf8(system, "--system")
    turns: list[dict[str, str]] = []
    lines = _user_lines(interactive)
    while (line := _from_first(lambda: next(lines, None))) is not None:
        command, _, argument = line.partition(" ")
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            if command == "/system":
                system = argument.strip()
            turns.clear()
            continue
        turns.append({"role": "user", "content": line})
        opening = [{"role": "system", "content": system}] if system else []
        ids = tokenizer.apply_chat_template([*opening, *turns])
        try:
            result = engine.add(ids, params)
        except ValueError as error:
            problem = re.sub(r"^prompt \d+", "the conversation", str(error))
            if not interactive:
                raise ValueError(problem) from None
            click.echo(f"error: {problem}; /reset starts over", err=True)
            turns.pop()
            continue
        if not _run(TokenStream(engine, [result]), show=True) and not interactive:
            return EXIT_INTERRUPTED
        turns.append({"role": "assistant", "content": result.text})
    return 0


def _user_lines(interactive: bool) -> Iterator[str]:
    """The lines that the user types or pipes in, blank ones left out."""
    if interactive:
        with suppress(ImportError):  # line editing and history for input(), where there is readline
            import readline  # noqa: F401
        click.echo("/exit  /reset  /system TEXT  Ctrl-C ends a reply", err=True)
    while True:
        if interactive:
            try:
                line = _utf8(input("> " if sys.stdout.isatty() else ""), "the line")
            except EOFError:
                _write("\n")
                return
        else:
            data = sys.stdin.buffer.readline()
            if not data:
                return
            line = _decode(data, "standard input")
        if line.strip():
            yield line.strip()


@cli.command()
@_model_options
@click.option("--text", help="Text to score.")
@click.option("--ids", metavar="ID,ID,...", help="Token ids to score.")
@click.option(
    "--file",
    "text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 file of text to score.",
)
@_json_option
def score(
    source: ModelOptions,
    text: str | None,
    ids: str | None,
    text_file: Path | None,
    as_json: bool,
) -> None:
    """Log-probability of each token given those before it, and the perplexity of the whole."""
    if [text, ids, text_file].count(None) != 2:
        raise click.UsageError("give one of --text, --ids and --file")
    if text_file is not None:
        text = _read_utf8(text_file)
    elif text is not None:
        text = _utf8(text, "--text")
    token_ids = [] if ids is None else _parse_ids(ids)
    if not (text or token_ids):
        raise click.UsageError("there is nothing to score: the input is empty")
    with redirect_stdout(sys.stderr):
        model, tokenizer = source.load()
        from minitron_kernels.generate import score as run

        if text is not None:
            token_ids = tokenizer.encode(text)
        logprobs = run(model, token_ids)
    scored = [logprob for logprob in logprobs if logprob is not None]
    perplexity = math.exp(-math.fsum(scored) / len(scored)) if scored else None
    if as_json:
        _print_json({"ids": token_ids, "logprobs": logprobs, "perplexity": perplexity})
        return
    lines = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        value = "-" if logprob is None else f"{logprob:.4f}"
        lines.append(f"{token_id}\t{value}\t{json.dumps(tokenizer.decode([token_id]))}\n")
    lines.append(f"perplexity {'-' if perplexity is None else f'{perplexity:.4f}'}\n")
    _write("".join(lines))


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(f"--ids takes integers with commas between, got {text!r}") from None


@cli.command()
@click.argument("model", required=False)
@_revision_option
@_dtype_option
@_expand_option
@_json_option
def info(model: str | None, revision: str | None, dtype: str, expand: bool, as_json: bool) -> None:
    """Versions, devices and compiled kernels; for MODEL its shape, files and memory needs.

    The weights are not loaded.
    """
    with redirect_stdout(sys.stderr):
        from minitron_kernels.info import build, cpu_info, cuda_info, model_info, outline, versions

        report: dict[str, Any] = {
            "versions": versions(),
            "cpu": cpu_info(),
            "cuda": cuda_info(),
            "build": build(),
        }
        if model is not None:
            from minitron_kernels.loaders.hub import resolve

            report["model"] = model_info(resolve(model, revision), dtype, expand)
    if as_json:
        _print_json(report)
        return
    entries = report["build"].pop("entries", {})
    kernels = {f"sm_{arch}": f"{len(names)} kernels" for arch, names in entries.items()}
    _write("\n".join(outline({**report, "build": report["build"] | kernels})) + "\n")


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "kind",
    required=True,
    help="Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, F16, BF16 or F32.",
)
@click.option("--pure", is_flag=True, help="All matrices in one type; by default as llama.cpp.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@_num_threads_option
@_revision_option
@_json_option
def quantize(
    source: str,
    out: Path,
    kind: str,
    pure: bool,
    force: bool,
    num_threads: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Write IN (a folder, a .gguf file of floats, .nemo, a Hub id) as a quantised GGUF file OUT."""
    with redirect_stdout(sys.stderr):
        from minitron_kernels.loaders.hub import resolve
        from minitron_kernels.quantize import quantize as run

        path = resolve(source, revision)
        report = run(path, out, kind, pure=pure, force=force, num_threads=num_threads)
    if as_json:
        _print_json({"path": str(out), **dataclasses.asdict(report)})
        return
    types = ", ".join(f"{count} {name}" for name, count in sorted(report.tensors.items()))
    bits = 8 * report.nbytes / report.parameters
    _write(f"{out}: {report.nbytes / 1e9:.2f} GB, {bits:.2f} bits a weight; tensors: {types}\n")


# Commands in files of their own, which take what is shared from here.
from minitron_kernels import cli_bench, cli_eval  # noqa: E402, F401

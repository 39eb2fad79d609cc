"""Prefill and decode speed against llama.cpp: same machine, GGUF file, threads and prompt.

    python bench/compare_llama_cpp.py smollm2-135m --llama-python llama/bin/python

Sides are processes that take turns: this package, llama.cpp (llama-cpp-python, which --llama-python
finds in another environment) at each --setting, and transformers on the expanded weights if asked
for. --int8-activations adds this package with activations rounded to 8 bits, as llama.cpp's are.
Printed are medians, in brackets the least and the greatest, and ratios to the best of the others.
Settings of llama.cpp are those words, joined by +: flash (flash attention), repack (weights copied
into an order of its own at load; without, they stay mapped), or plain.

--first-token [TEXT] measures, instead, the seconds from a process' start to the first token.
--busy-core keeps one core busy with another process meanwhile.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from comparison import median, random_prompt, ratio, take_turns
from side_process import SideProcess, Timing, busy

from minitron_kernels.loaders.hub import resolve

HERE = Path(__file__).parent
PROMPT = "Complete the paragraph: our solar system is"
Command = list[str | Path]


def llama_command(python: str, path: Path, setting: str) -> Command:
    words = [f"--{word}" for word in setting.split("+") if word != "plain"]
    return [python, HERE / "llama_cpp_side.py", path, *words]


def seconds_to_output(command: Command) -> float:
    """From the start of a process to the first line that it prints."""
    # An installed package has its bytecode.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    arguments = [str(part) for part in command]
    started = time.perf_counter()
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not first:
        raise click.ClickException(f"{command[0]} ended with exit code {process.returncode}")
    return seconds


def spread(timings: Sequence[Timing], phase: int) -> str:
    each = [timing[phase] for timing in timings]
    return f"{statistics.median(each):.1f} ({min(each):.1f}-{max(each):.1f})"


def measure_first_token(commands: dict[str, Command], repeat: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in commands}
    for i in range(1 + repeat):
        for name, command in commands.items():
            seconds = seconds_to_output(command)
            if i:  # the first has the file read into memory
                times[name].append(seconds)
    print("| | first token, s |\n| --- | --- |")
    for name, each in times.items():
        print(f"| {name} | {statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f}) |")


def measure_speed(
    commands: dict[str, Command], prompt_tokens: int, new_tokens: int, repeat: int
) -> None:
    sides: dict[str, SideProcess] = {}
    for name, command in commands.items():
        sides[name] = SideProcess(command)
    measured = take_turns(sides, random_prompt(prompt_tokens), new_tokens, repeat, "runs")
    columns = f"| | prefill {prompt_tokens}, tokens/s | decode {new_tokens}, tokens/s"
    print(f"{columns} | load, s | peak memory, GB |\n| --- | --- | --- | --- | --- |")
    for name, side in sides.items():
        phases = " | ".join(spread(measured[name], phase) for phase in (0, 1))
        memory = side.peak_bytes * 1e-9
        print(f"| {name} | {phases} | {side.load_seconds:.2f} | {memory:.2f} |")
        side.close()
    ours = [name for name in measured if name.startswith("minitron_kernels")]
    others = [name for name in measured if name not in ours]
    for phase, what in enumerate(("prefill", "decode")):
        best = max(others, key=lambda name: median(measured[name], phase))
        for name in ours:
            times = ratio(measured[name], measured[best], phase)
            print(f"{what}: {name} {times:.2f} times {best}")


@click.command(help=__doc__)
@click.argument("model")
@click.option("--llama-python", default=sys.executable, help="an interpreter with llama_cpp")
@click.option(
    "--setting",
    "settings",
    multiple=True,
    default=("plain", "flash", "repack", "flash+repack"),
    show_default=True,
)
@click.option("--int8-activations", is_flag=True, help="also this package with these")
@click.option("--transformers", is_flag=True, help="also transformers in bfloat16")
@click.option("--prompt", "prompt_tokens", default=512, show_default=True)
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option(
    "--first-token",
    is_flag=False,
    flag_value=PROMPT,
    metavar="[TEXT]",
    help=f"measure the time to the first token of TEXT (default: {PROMPT!r})",
)
@click.option("--cpu-time", is_flag=True, help="of all threads, for a busy machine: --threads 1")
@click.option("--busy-core", type=int, help="core that another process keeps busy")
def main(
    model: str,
    llama_python: str,
    settings: tuple[str, ...],
    int8_activations: bool,
    transformers: bool,
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
    repeat: int,
    first_token: str | None,
    busy_core: int | None,
    cpu_time: bool,
) -> None:
    found = subprocess.run([llama_python, "-c", "import llama_cpp"], stderr=subprocess.DEVNULL)
    if found.returncode:
        print(
            f"llama-cpp-python cannot be imported by {llama_python}; install it there, or name "
            "another interpreter with --llama-python",
            file=sys.stderr,
        )
        raise SystemExit(2)
    path = resolve(model)
    each = ["--threads", str(threads), *(["--cpu-time"] if cpu_time else [])]
    serve: Command = [sys.executable, HERE / "comparison.py"]
    commands: dict[str, Command] = {
        name: [*serve, name, path, *each]
        for name in ("minitron_kernels", *(["minitron_kernels int8"] if int8_activations else []))
    }
    commands |= {
        f"llama.cpp {setting}": [*llama_command(llama_python, path, setting), *each]
        for setting in settings
    }
    if transformers:
        commands["transformers bfloat16"] = [*serve, "transformers", path, *each]
    if first_token is not None:
        generate: Command = [sys.executable, "-m", "minitron_kernels", "generate", first_token]
        commands = {
            name: [*command, "--first-token", first_token]
            for name, command in commands.items()
            if name.startswith("llama.cpp")
        }
        own = [*generate, "--model", path, "--max-new-tokens", "1"]
        commands = {
            "minitron_kernels": own,
            **({"minitron_kernels int8": [*own, "--int8-activations"]} if int8_activations else {}),
            **commands,
        }
    print(f"{path.name}, {threads} threads, {repeat} runs each\n")
    with busy(busy_core):
        if first_token is not None:
            measure_first_token(commands, repeat)
        else:
            measure_speed(commands, prompt_tokens, new_tokens, repeat)


if __name__ == "__main__":
    main()

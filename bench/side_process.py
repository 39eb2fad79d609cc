"""A side of a comparison in a process of its own, spoken to in lines of JSON.

Only the standard library is used: a side may run in another interpreter, without this package.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Timing = tuple[float, float]  # prefill and decode, tokens/s
Run = Callable[[list[int], int], Timing]  # of a prompt and a number of new tokens
Clock = Callable[[], float]


def clock_of(cpu_time: bool) -> Clock:
    """Of the wall, or of all threads of this process."""
    return time.process_time if cpu_time else time.perf_counter


def peak_bytes() -> int:
    """Largest resident memory of this process, pages of mapped files included."""
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


def serve(load: Callable[[], Run]) -> None:
    """Load, then run what is asked for on standard input until it ends."""
    started = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong to the answers
    run = load()
    print(json.dumps({"load_seconds": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        timing = run(*json.loads(line))
        answer = {"timing": timing, "peak_bytes": peak_bytes()}
        print(json.dumps(answer), file=answers, flush=True)


class SideProcess:
    """A process that calls `serve`; calling this makes a run in it."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.load_seconds: float = self._answer()["load_seconds"]
        self.peak_bytes = 0

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(self._process.wait())
        return json.loads(line)

    def __call__(self, prompt: list[int], new_tokens: int) -> Timing:
        assert self._process.stdin is not None
        print(json.dumps([prompt, new_tokens]), file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        prefill, decode = answer["timing"]
        return prefill, decode

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def busy(core: int | None) -> Iterator[None]:
    """With a process that keeps a core busy, and nothing else in mind (None: without)."""
    if core is None:
        yield
        return
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        try:
            yield
        finally:
            process.kill()

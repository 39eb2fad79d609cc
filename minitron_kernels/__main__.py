"""The process of the `minitron` command; `python -m minitron_kernels` is what torchrun starts."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

from minitron_kernels.cli import EXIT_INTERRUPTED, main

STARTING_THREADS = ("libtorch", "scales")  # see `startup`


def run_and_exit() -> None:
    """Run the process's command line and end the process with its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    code = main()
    if any(thread.name in STARTING_THREADS for thread in threading.enumerate()):
        # Stopped by a mistake or Ctrl-C while they run, whose memory an orderly end would take.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    gc.freeze()  # else the interpreter looks through all that torch made before it ends: 0.6 s
    sys.exit(code)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: an exception, except while torch is being imported, which it would abort."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        os._exit(EXIT_INTERRUPTED)
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    run_and_exit()

"""Starts the `minitron` command in a process of its own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUN_MAIN = "import sys; from minitron_kernels.cli import main; sys.exit(main())"


def popen(*args: str | Path, env: dict[str, str] | None = None, **options: Any) -> Any:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN_MAIN, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        bufsize=0,  # else communicate() misses what read() has buffered
        **options,
    )

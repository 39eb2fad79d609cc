"""Compile one entry file for one architecture (ninja runs this once per pair).

Writes OUT (a fatbin: SASS, and PTX as text), OUT.json (what ptxas says of each entry) and OUT.d
(the headers used). Spills and stack are errors: a kernel that needs them has the wrong tile. So is
wgmma that ptxas serialises.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

FLAGS = [
    "-fatbin",
    "--compress-mode=none",  # the emulator and people read the PTX
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "-Xptxas=-v",
    "-Icsrc",
    "-Iinclude",
]

_PTXAS_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '\w+'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """`ptxas -v` output -> {entry: {registers, smem_bytes, stack_bytes, spill_bytes}}."""
    entries = {}
    for match in _PTXAS_ENTRY.finditer(text):
        smem = re.search(r"(\d+) bytes smem", match["rest"])
        entries[match["name"]] = {
            "registers": int(match["registers"]),
            "smem_bytes": int(smem.group(1)) if smem else 0,
            "stack_bytes": int(match["stack"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
        }
    return entries


def _own_headers(depfile: Path, out: Path) -> None:
    """Keep the repository's files only: the toolkit may sit in a build environment that goes."""
    _, _, files = depfile.read_text().replace("\\\n", " ").partition(": ")
    own = [f for f in files.split() if not Path(f).is_absolute()]
    depfile.write_text(f"{out}: {' '.join(own)}\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", required=True)
    parser.add_argument("--src", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--nvcc-version", help="only makes ninja rebuild when it changes")
    parser.add_argument("--werror", action="store_true")
    args = parser.parse_args()
    depfile = Path(f"{args.out}.d")
    what = f"{args.src} for sm_{args.arch}"
    command = [
        os.environ["MK_NVCC"],
        *FLAGS,
        *(["-Werror=all-warnings"] if args.werror else []),
        f"-gencode=arch=compute_{args.arch},code=[sm_{args.arch},compute_{args.arch}]",
        f"-DMK_SM={args.arch.rstrip('af')}",
        *("-MMD", "-MF", str(depfile)),
        *("-o", str(args.out), args.src),
    ]
    if os.environ.get("CXX"):
        command.append(f"-ccbin={os.environ['CXX']}")
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"error: compiling {what} failed:\n{done.stdout}")
    if "(C75" in done.stdout:  # advice on wgmma: serialised, or registers that setmaxnreg lacks
        sys.exit(f"error: ptxas warns of {what}:\n{done.stdout}")
    entries = parse_ptxas(done.stdout)
    for name, use in entries.items():
        if use["spill_bytes"] or use["stack_bytes"]:
            sys.exit(f"error: {name} ({what}) spills or uses stack: {use}")
    if not entries:
        sys.exit(f"error: {what} holds no kernel; ptxas said:\n{done.stdout}")
    _own_headers(depfile, args.out)
    record = {"seconds": round(time.perf_counter() - start, 2), "entries": entries}
    Path(f"{args.out}.json").write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

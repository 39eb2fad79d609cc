"""SASS of kernels, and the instructions of their main loop.

cuobjdump of the PyPI wheel nvidia-cuda-cuobjdump (it calls nvdisasm, of nvidia-cuda-nvdisasm), or
of a CUDA toolkit on PATH.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);", re.M
)
# Instructions that end a basic block; BSSY, BSYNC and WARPSYNC only order lanes. A CALL goes on to
# its target and behind itself: it comes back, or is a jump under a predicate (with NOINC).
_BRANCHES = ("BRA", "BRX", "CALL", "JMP", "JMX", "EXIT", "RET")


def find_tool(name: str) -> str | None:
    """Path of cuobjdump or nvdisasm, None if it is not installed."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    return str(wheel) if wheel.exists() else shutil.which(name)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!P0"; "" if it always executes
    opcode: str  # with its modifiers: "HMMA.16816.F32.BF16"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands.strip())
        return int(found[1], 16) if self.name in ("BRA", "CALL", "JMP") and found else None


@functools.cache
def functions(file: Path) -> dict[str, list[Instruction]]:
    """Kernel name -> its instructions, of a cubin or fatbin. FileNotFoundError without the tool."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")
    env = {**os.environ, "PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    text = subprocess.run(
        [tool, "-sass", file], capture_output=True, text=True, check=True, env=env
    ).stdout
    parts = re.split(r"\n\s*Function : (\w+)", text)
    return {n: parse(body) for n, body in zip(parts[1::2], parts[2::2], strict=True)}


def parse(text: str) -> list[Instruction]:
    return [
        Instruction(int(address, 16), predicate or "", opcode, operands)
        for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
    ]


_MMAS = ("HMMA", "HGMMA", "QGMMA")


@dataclass(frozen=True)
class MainLoop:
    """The innermost loop with the most HMMA (or HGMMA) instructions, counted once around.

    `instructions`: those of every turn that goes through the block with the most HMMAs;
    `conditional`: all others of the loop (the rescaling of accumulators, say). Predicated ones
    count, as they take their issue slot either way.
    """

    instructions: int
    conditional: int
    hmma: int  # among `instructions`
    opcodes: dict[str, int]  # of `instructions`, by name
    loads: dict[int, int] = field(default_factory=dict)  # of global memory in all of it, by bits


def main_loop(
    code: list[Instruction], which: Callable[[MainLoop], bool] | None = None
) -> MainLoop | None:
    """None if no loop of the kernel holds an HMMA. Of loops with as many, the shortest: a masked
    copy of the loop is longer. `which` tells the one that is meant where a kernel has a loop for
    each of several types."""
    blocks, successors = _basic_blocks(code)
    dominators = _dominators(successors)
    hmma = [sum(i.name in _MMAS for i in block) for block in blocks]
    loops: dict[int, set[int]] = {}  # by header; several ways back to it are one loop
    latches: dict[int, set[int]] = {}
    for latch, targets in enumerate(successors):
        for header in targets & dominators[latch]:
            body = _natural_loop(header, latch, successors)
            loops[header] = loops.get(header, set()) | body
            latches.setdefault(header, set()).add(latch)
    with_hmma = {h: body for h, body in loops.items() if any(hmma[b] for b in body)}
    found = []
    for header, body in with_hmma.items():
        if any(other < body for other in with_hmma.values()):
            continue  # not the innermost one
        middle = max(sorted(body), key=lambda b: hmma[b])
        within = [targets & body - {header} for targets in successors]
        always = [
            i
            for b in sorted(body)
            if b == middle
            or middle not in _reached(header, within, without=b)
            or not latches[header] & _reached(middle, within, without=b)
            for i in blocks[b]
        ]
        size = sum(len(blocks[b]) for b in body)
        opcodes = Counter(i.name for i in always)
        found.append(
            MainLoop(
                len(always),
                size - len(always),
                sum(opcodes[name] for name in _MMAS),
                dict(opcodes.most_common()),
                dict(Counter(_load_bits(i) for b in body for i in blocks[b] if i.name == "LDG")),
            )
        )
    found = [loop for loop in found if which is None or which(loop)]
    return max(found, key=lambda loop: (loop.hmma, -loop.instructions), default=None)


def _load_bits(load: Instruction) -> int:
    widths = re.findall(r"\.[US]?(8|16|64|128)\b", load.opcode)
    return int(widths[0]) if widths else 32


def _reached(start: int, successors: list[set[int]], without: int = -1) -> set[int]:
    """The blocks that a block can go on to, itself too, on paths that avoid one."""
    seen = {start} - {without}
    todo = list(seen)
    while todo:
        new = successors[todo.pop()] - seen - {without}
        seen |= new
        todo += new
    return seen


def _basic_blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[set[int]]]:
    """Blocks in the order of addresses, and the blocks that each can go on to."""
    index = {i.address: n for n, i in enumerate(code)}
    starts = {0}
    for n, i in enumerate(code):
        if i.name in _BRANCHES:
            starts.add(n + 1)
            if i.target in index:
                starts.add(index[i.target])
    bounds = sorted(starts | {len(code)})
    blocks = [code[a:b] for a, b in pairwise(bounds)]
    block_at = {block[0].address: b for b, block in enumerate(blocks)}
    successors = []
    for b, block in enumerate(blocks):
        last = block[-1]
        out = {block_at[last.target]} if last.target in block_at else set()
        # A uniform predicate is an operand: BRA.U !UP0, target.
        is_conditional = last.predicate or "," in last.operands
        goes_on = last.name not in _BRANCHES or last.name == "CALL" or is_conditional
        if goes_on and b + 1 < len(blocks):
            out.add(b + 1)
        successors.append(out)
    # An indirect branch may go to any block that nothing else goes to: the cases of a switch.
    named = set().union(*successors) | {0}
    cases = set(range(len(blocks))) - named
    for b, block in enumerate(blocks):
        if block[-1].name in ("BRX", "JMX"):
            successors[b] = cases - {b + 1} if block[-1].predicate else cases
    return blocks, successors


def _predecessors(successors: list[set[int]]) -> list[set[int]]:
    before: list[set[int]] = [set() for _ in successors]
    for b, targets in enumerate(successors):
        for t in targets:
            before[t].add(b)
    return before


def _dominators(successors: list[set[int]]) -> list[set[int]]:
    """Of each block those that every path from the first one to it goes through, itself too.
    Of a block that nothing reaches: itself."""
    reached = _reached(0, successors)
    before = _predecessors(successors)
    found = [reached if b in reached else {b} for b in range(len(successors))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for b in sorted(reached - {0}):
            now = {b} | set.intersection(*(found[p] for p in before[b] & reached))
            changed |= now != found[b]
            found[b] = now
    return found


def _natural_loop(header: int, latch: int, successors: list[set[int]]) -> set[int]:
    """The blocks that reach the latch without the header."""
    before = _predecessors(successors)
    body, todo = {header, latch}, [latch] if latch != header else []
    while todo:
        new = before[todo.pop()] - body
        body |= new
        todo += new
    return body

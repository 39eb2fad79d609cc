"""What a command can do before torch is there: importing it takes longer than all else of a start.

Most of an import is Python's own work, on one core. On the other a thread brings torch's library
into the process while the header of a GGUF file and its tokenizer are read, and another, when that
is done, looks at the scales of the file's blocks while the modules of torch run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from minitron_kernels.loaders import byte_level
from minitron_kernels.loaders.gguf_file import GGUFFile, ScaleScan, open_parts
from minitron_kernels.loaders.tokenizer import Tokenizer
from minitron_kernels.native import MAX_THREADS


@dataclass
class OpenedGGUF:
    """What has been read, or is being read, of a GGUF file."""

    files: list[GGUFFile]
    tokenizer: Tokenizer
    scales: ScaleScan | None

    @classmethod
    def read(cls, path: Path, *, scan_scales: bool, num_threads: int | None) -> OpenedGGUF:
        """Open a model's file or files. Raises as GGUFFile and Tokenizer.from_gguf do."""
        # The Rust library enters itself with the loader when a thread first uses it, and would wait
        # until the loader is done with torch's.
        byte_level.build({"a": 0}, [], ["a"], False, "")
        loading = load_torch_library()
        files = open_parts(path)
        scales = None
        if scan_scales:  # one core is left to the import
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            threads = max(1, min(num_threads or cores, MAX_THREADS) - 1)
            scales = ScaleScan(files, threads, after=loading)
        return cls(files, Tokenizer.from_gguf(files[0].metadata, str(path)), scales)


def load_torch_library() -> threading.Thread | None:
    """Let a thread load torch's largest library, which takes 0.3 s and no interpreter.

    What has to be loaded itself waits meanwhile, so that numpy and tokenizers are there before.
    Does nothing where there is none of this name; importing torch will tell what is wrong.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or ():
        library = Path(folder) / "lib" / "libtorch_cpu.so"
        if library.exists():
            # A function called through ctypes runs without the interpreter's lock, unlike CDLL().
            dlopen = ctypes.CDLL(None).dlopen
            dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
            args = os.fsencode(library), os.RTLD_NOW
            thread = threading.Thread(target=dlopen, args=args, name="libtorch", daemon=True)
            thread.start()
            return thread
    return None

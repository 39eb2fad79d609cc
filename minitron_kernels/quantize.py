"""From a checkpoint to a quantised GGUF file: which matrix gets which type, and the writing of it.

The mixes (`Q4_K_M`, ...) are llama.cpp's, by the rules of its src/llama-quant.cpp of autumn 2026
without an importance matrix; the published files of other versions differ in the layers that get
more bits. Matrices are read, encoded and written a million weights at a time, on all cores.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from minitron_kernels import block_encoders
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders import gguf_writer
from minitron_kernels.loaders.checkpoint import TORCH_DTYPES, Checkpoint, open_checkpoint
from minitron_kernels.loaders.files import check_folder
from minitron_kernels.loaders.gguf import GGUFCheckpoint, gguf_name
from minitron_kernels.loaders.gguf_file import GGUFFile
from minitron_kernels.loaders.gguf_writer import TensorHead
from minitron_kernels.quantized import nonfinite_scale_row

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mix:
    """A kind of file: what most matrices are stored as, and llama.cpp's number for the kind."""

    base: str
    file_type: int


MIXES = {
    "F32": Mix("F32", 0),
    "F16": Mix("F16", 1),
    "BF16": Mix("BF16", 32),
    "Q8_0": Mix("Q8_0", 7),
    "Q4_0": Mix("Q4_0", 2),
    "Q4_1": Mix("Q4_1", 3),
    "Q5_0": Mix("Q5_0", 8),
    "Q5_1": Mix("Q5_1", 9),
    "Q4_K_S": Mix("Q4_K", 14),
    "Q4_K_M": Mix("Q4_K", 15),
    "Q5_K_S": Mix("Q5_K", 16),
    "Q5_K_M": Mix("Q5_K", 17),
    "Q6_K": Mix("Q6_K", 18),
}
ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama.cpp's
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Report:
    """What was written: bytes of the file, and how many tensors of each type."""

    nbytes: int
    tensors: dict[str, int]
    parameters: int


def quantize(
    source: Path,
    out: Path,
    kind: str,
    *,
    pure: bool = False,
    force: bool = False,
    num_threads: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Write the checkpoint ``source`` as the GGUF file ``out``, of one of MIXES.

    ``source`` is a folder with safetensors, a .nemo file, or a GGUF file of F32, F16 or BF16
    matrices. ``pure`` gives all matrices the mix's base type. ``progress`` shows a bar (None: on a
    terminal). Memory stays at some 20 MB a thread besides the mapped pages of the source. ``out``
    appears when it is complete; an error or Ctrl-C leaves nothing.

    Raises ValueError for an unknown kind, an ``out`` that exists (without ``force``), a damaged or
    quantised source and for weights that are not finite or too large for their type, naming the
    tensor; OSError where files cannot be read or written, or the disk has too little room.
    """
    mix = _mix(kind)
    out = Path(out)
    _check_out(out, force)
    model = _open(Path(source))
    plan = _plan(model, ALIASES.get(kind, kind), pure)
    pairs = [
        *model.pairs,
        gguf_writer.uint32("general.file_type", mix.file_type),
        gguf_writer.uint32("general.quantization_version", 2),
    ]
    heads = [TensorHead(t.name, target, t.shape) for t, target in plan]
    head = gguf_writer.header(pairs, heads)
    total = len(head) + sum(h.nbytes + gguf_writer.padding(h.nbytes) for h in heads)
    free = shutil.disk_usage(out.absolute().parent).free
    if total > free:
        raise OSError(f"{out}: needs {total / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")
    bar = tqdm(
        total=sum(t.numel for t, _ in plan),
        desc=f"to {kind}",
        unit=" weights",
        unit_scale=True,
        disable=None if progress is None else not progress,
    )
    threads = num_threads or len(os.sched_getaffinity(0))
    with _new_file(out, force) as stream, bar, ThreadPoolExecutor(threads) as pool:
        stream.write(head)
        try:
            for tensor, target in plan:
                _write_tensor(stream, pool, threads, tensor, target, bar.update)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Report(total, dict(Counter(h.type for h in heads)), sum(t.numel for t, _ in plan))


def _mix(kind: str) -> Mix:
    mix = MIXES.get(ALIASES.get(kind, kind))
    if mix is None:
        raise ValueError(f"type: got {kind!r:.80}, accepted: {', '.join([*MIXES, *ALIASES])}")
    return mix


# ---- sources ----


@dataclass(frozen=True)
class SourceTensor:
    """A stored tensor under its GGUF name; ``rows(a, b)`` are some of its rows, fp32 [b - a, K]."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    rows: Callable[[int, int], npt.NDArray[np.float32]]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


@dataclass(frozen=True)
class Source:
    """A model to be written: its shape, tensors, and metadata less what a quantiser sets."""

    config: ModelConfig
    tensors: list[SourceTensor]
    pairs: list[gguf_writer.Pair]


def _open(path: Path) -> Source:
    checkpoint = open_checkpoint(path)
    _check_complete(checkpoint)
    if isinstance(checkpoint, GGUFCheckpoint):
        return _open_gguf(checkpoint)
    return _open_floats(checkpoint)


def _check_complete(checkpoint: Checkpoint) -> None:
    for name, shape in checkpoint.config.weight_shapes().items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ValueError(f"{checkpoint.path}: tensor {name} is missing")
        if info.shape != shape:
            raise ValueError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, "
                f"the config asks for {list(shape)}"
            )


def _open_floats(checkpoint: Checkpoint) -> Source:
    from minitron_kernels.loaders.tokenizer import Tokenizer

    config = checkpoint.config
    tensors = []
    load = _one_at_a_time(checkpoint)
    for name, shape in config.weight_shapes().items():
        info = checkpoint.tensors[name]
        rows = _torch_rows(functools.partial(load, name), _pair_order(name, config))
        tensors.append(SourceTensor(gguf_name(name), shape, info.type, info.file, rows))
    if config.rope_factors is not None:
        factors = torch.tensor(config.rope_factors)
        shape = tuple(factors.shape)
        file = Path(config.source)
        rows = _torch_rows(lambda: factors, None)
        tensors.append(SourceTensor("rope_freqs.weight", shape, "F32", file, rows))
    tokenizer = Tokenizer.from_file(checkpoint.path)
    name = checkpoint.path.resolve().name
    pairs = gguf_writer.model_pairs(config, name)
    return Source(
        config, tensors, pairs + gguf_writer.tokenizer_pairs(tokenizer, config.vocab_size)
    )


def _pair_order(name: str, config: ModelConfig) -> torch.Tensor | None:
    """For Q and K, which row stands where in GGUF: the halves of every head are interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None:
        return None
    rows = torch.arange(heads * config.head_dim)
    return rows.view(heads, 2, config.head_dim // 2).transpose(1, 2).flatten()


def _one_at_a_time(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """Weights as stored; the last one is kept, for its rows are asked for by several threads."""
    lock = threading.Lock()

    @functools.lru_cache(maxsize=1)
    def load(name: str) -> torch.Tensor:
        return checkpoint.load(name, TORCH_DTYPES[checkpoint.tensors[name].type])

    def locked(name: str) -> torch.Tensor:
        with lock:
            return load(name)

    return locked


def _torch_rows(
    load: Callable[[], torch.Tensor], order: torch.Tensor | None
) -> Callable[[int, int], npt.NDArray[np.float32]]:
    def rows(start: int, end: int) -> npt.NDArray[np.float32]:
        stored = load()
        matrix = stored if stored.ndim == 2 else stored[None]
        part = matrix[start:end] if order is None else matrix[order[start:end]]
        if part.dtype == torch.bfloat16:
            return _from_bfloat16(part.view(torch.uint16).numpy())
        return part.numpy().astype(np.float32, copy=False)

    return rows


def _from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


# Set anew, or true of the source file only.
_DROPPED = ("general.file_type", "general.quantization_version", "general.alignment", "split.")


def _open_gguf(checkpoint: GGUFCheckpoint) -> Source:
    tensors = []
    for file in checkpoint.files:
        for tensor in file.tensors.values():
            if tensor.type.name in QUANT_TYPES:
                raise ValueError(
                    f"{file.path}: tensor {tensor.name!r:.80} is {tensor.type.name} already: "
                    "quantise from F32, F16 or BF16, or the errors add up"
                )
            tensors.append(
                SourceTensor(
                    tensor.name,
                    tensor.shape,
                    tensor.type.name,
                    file.path,
                    _gguf_rows(file, tensor.name),
                )
            )
    first = checkpoint.files[0]
    pairs = [first.raw_pair(key) for key in first.metadata if not key.startswith(_DROPPED)]
    return Source(checkpoint.config, tensors, pairs)


def _gguf_rows(file: GGUFFile, name: str) -> Callable[[int, int], npt.NDArray[np.float32]]:
    kind = file.tensors[name].type.name
    stored = file.rows(name)

    def rows(start: int, end: int) -> npt.NDArray[np.float32]:
        part = stored[start:end]
        if kind == "BF16":
            return _from_bfloat16(part.view(np.uint16))
        return part.view(np.float16 if kind == "F16" else np.float32).astype(np.float32, copy=False)

    return rows


# ---- which type ----


def _plan(model: Source, kind: str, pure: bool) -> list[tuple[SourceTensor, str]]:
    """Every tensor with the type to store it as; says which had to be stored otherwise, and why."""
    config, tied = model.config, not any(t.name == "output.weight" for t in model.tensors)
    plan = []
    instead: Counter[str] = Counter()
    for tensor in model.tensors:
        if len(tensor.shape) < 2:
            plan.append((tensor, "F32"))
            continue
        wanted = MIXES[kind].base if pure else mix_type(tensor.name, kind, config, tied)
        target = storable_type(wanted, tensor.shape[-1])
        if target != wanted:
            instead[f"rows of {tensor.shape[-1]} cannot be {wanted}: {target} instead"] += 1
        plan.append((tensor, target))
    for reason, count in instead.items():
        _log.warning("%s (matrices: %d)", reason, count)
    return plan


def mix_type(name: str, kind: str, config: ModelConfig, tied: bool) -> str:
    """The type that llama.cpp's mix ``kind`` gives the matrix ``name`` (GGUF's name).

    ``tied``: there is no output.weight, so that token_embd takes its place and its type.
    """
    base = MIXES[kind].base
    if base not in QUANT_TYPES:
        return base
    module = name.split(".")[-2]
    if module == "output" or (module == "token_embd" and tied):
        whole = config.hidden_size % QUANT_TYPES[base].elements == 0
        return "Q6_K" if whole and base != "Q8_0" else "Q8_0"
    if module not in ("attn_v", "ffn_down"):
        return base
    layer, layers = int(name.split(".")[1]), config.num_hidden_layers
    eighth = layers // 8
    more_bits = (
        layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    )  # half of the layers: the outer ones, and every third between
    chosen = base
    if kind in ("Q4_K_M", "Q5_K_M") and more_bits:
        chosen = "Q6_K"
    elif kind == "Q4_K_S" and layer < (4 if module == "attn_v" else eighth):
        chosen = "Q5_K"
    is_70b = layers == 80 and config.num_attention_heads != config.num_key_value_heads
    if module == "attn_v" and is_70b and chosen == "Q4_K":
        return "Q5_K"
    return chosen


def storable_type(wanted: str, cols: int) -> str:
    """``wanted``, or what llama.cpp takes where rows of ``cols`` are not whole blocks of it."""
    for kind in (wanted, _FALLBACKS.get(wanted, wanted)):
        if kind not in QUANT_TYPES or cols % QUANT_TYPES[kind].elements == 0:
            return kind
    return "F16"


# ---- writing ----


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file")
    if out.exists() and not out.is_file():
        raise ValueError(f"{out}: is no regular file, and is not replaced")
    if out.exists() and not force:
        raise ValueError(f"{out}: already there; --force replaces it")
    check_folder(out)


@contextmanager
def _new_file(out: Path, force: bool) -> Iterator[BinaryIO]:
    """A file that takes the name ``out`` when the block ends well, and is gone otherwise."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    stream = part.open("xb")
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _check_out(out, force)  # it may have come up meanwhile
        part.replace(out)
    except BaseException as error:
        with suppress(FileNotFoundError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, error.strerror, str(out)) from None
        raise


def _write_tensor(
    stream: BinaryIO,
    pool: ThreadPoolExecutor,
    threads: int,
    tensor: SourceTensor,
    target: str,
    advance: Callable[[int], object],
) -> None:
    """Encode on all threads, write in order; a few chunks are under way at any time."""
    cols = tensor.shape[-1]
    num_rows = tensor.numel // cols
    step = max(1, _CHUNK_ELEMENTS // cols)
    waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
    written = 0

    def write_next() -> None:
        nonlocal written
        data = waiting.popleft().result()
        stream.write(data.data)
        written += data.nbytes
        advance(data.shape[0] * cols)

    for start in range(0, num_rows, step):
        waiting.append(pool.submit(_encode, tensor, start, min(start + step, num_rows), target))
        if len(waiting) > 2 * threads:
            write_next()
    while waiting:
        write_next()
    stream.write(b"\0" * gguf_writer.padding(written))


def _encode(tensor: SourceTensor, start: int, end: int, target: str) -> npt.NDArray[np.uint8]:
    """Rows start to end - 1 as stored in ``target``: uint8 [rows, row bytes]."""
    rows = tensor.rows(start, end)
    _require_finite(rows, tensor, start, "is not finite")
    if target in QUANT_TYPES:
        data = block_encoders.encode(rows, target)
        if nonfinite_scale_row(torch.from_numpy(data), target) is not None:
            raise ValueError(
                f"{tensor.file}: tensor {tensor.name!r} has weights too large for {target}: "
                f"rows {start} to {end - 1} reach {np.abs(rows).max():.3g}"
            )
        return data
    with np.errstate(over="ignore"):
        dense = torch.from_numpy(rows).to(TORCH_DTYPES[target])
        if target == "F16" and tensor.type != "F16":
            _require_finite(dense.numpy(), tensor, start, "is too large for F16")
    return dense.view(torch.uint8).numpy()


def _require_finite(
    rows: npt.NDArray[np.floating], tensor: SourceTensor, start: int, problem: str
) -> None:
    if not (np.isfinite(rows.max()) and np.isfinite(rows.min())):
        row, column = (int(i) for i in np.argwhere(~np.isfinite(rows))[0])
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r}: the weight in row {start + row}, column "
            f"{column} {problem}"
        )

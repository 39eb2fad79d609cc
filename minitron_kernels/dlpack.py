"""The operations on arrays of any library that speaks DLPack or __cuda_array_interface__.

    from minitron_kernels import dlpack

    y = dlpack.rms_norm(x, weight, 1e-5)  # x of NumPy, CuPy, JAX, PyTorch, ...
    dlpack.add_rms_norm(x, residual, weight, 1e-5, out=y, stream=cupy.cuda.get_current_stream())

The functions are those of `ops`, whose docstrings tell shapes and errors. Arrays are read, and
those that an op updates are written, where they lie; dtypes are bfloat16 (of NumPy: ml_dtypes),
float16 and float32, and int32 or int64 of indices. A result is an array of the library that the
first argument is from, if that has a from_dlpack, else a torch tensor, which any consumer of DLPack
takes. With ``out`` (for several results, a tuple) it is copied there, and ``out`` is returned.

``stream`` is where work on a GPU is enqueued: a handle (int), or what has it as ``cuda_stream``
(PyTorch), ``ptr`` (CuPy) or ``__cuda_stream__()``; None: torch's current one. Nothing waits for the
GPU: arrays must live, and stay as they are, until the stream has come by.

Raises TypeError for what is no array, for a dtype or a device that no op takes, and for an array to
be written that cannot be.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack

from minitron_kernels import cuda_ops, ops
from minitron_kernels.library import Norm, Rope

__all__ = [
    "Norm",
    "Rope",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "attention_kvcache",
    "linear",
    "rms_norm",
    "silu_and_mul",
    "swiglu_mlp",
]

Tensor = torch.Tensor
Array = Any

# DLDeviceType: main memory, pinned or not, and CUDA's, managed or not.
_DEVICE_TYPES = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}
# By typestr of __cuda_array_interface__, which has no name for bfloat16: "V2" is what ml_dtypes'
# extension type gives.
_TYPESTRS = {
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
    "<i4": torch.int32,
    "<i8": torch.int64,
}


# ------------------------------------------------------------------------------- the operations


def rms_norm(
    x: Array, weight: Array, eps: float, *, out: Array | None = None, stream: Any = None
) -> Array:
    """See ops.rms_norm."""
    with _Call(x, stream) as call:
        result = ops.rms_norm(call.read("x", x), call.read("weight", weight), eps)
        return call.give(result, out)


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float,
    *,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    """See ops.add_rms_norm: ``residual`` is updated."""
    with _Call(x, stream) as call:
        rows = call.read("x", x)
        target = call.write("out", out, rows)
        sums = call.write("residual", residual)
        result = ops.add_rms_norm(rows, sums, call.read("weight", weight), eps)
        return call.give(result, out, target)


def apply_rope(
    q: Array,
    k: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    interleaved: bool = False,
    *,
    out: tuple[Array, Array] | None = None,
    stream: Any = None,
) -> tuple[Array, Array]:
    """See ops.apply_rope; ``out``: (q's, k's)."""
    with _Call(q, stream) as call:
        rotated_q, rotated_k = ops.apply_rope(
            call.read("q", q),
            call.read("k", k),
            call.read("cos", cos),
            call.read("sin", sin),
            call.read("positions", positions),
            interleaved,
        )
        out_q, out_k = (None, None) if out is None else out
        return call.give(rotated_q, out_q), call.give(rotated_k, out_k)


def silu_and_mul(gate_up: Array, *, out: Array | None = None, stream: Any = None) -> Array:
    """See ops.silu_and_mul."""
    with _Call(gate_up, stream) as call:
        return call.give(ops.silu_and_mul(call.read("gate_up", gate_up)), out)


def linear(
    x: Array,
    w: Array,
    residual: Array | None = None,
    *,
    norm: Norm | tuple[Array, float] | None = None,
    out_dtype: torch.dtype | str | None = None,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    """See ops.linear; ``w`` may be a QuantizedTensor, ``out_dtype`` a name."""
    with _Call(x, stream) as call:
        result = ops.linear(
            call.read("x", x),
            call.read("w", w),
            call.read_if("residual", residual),
            norm=call.norm(norm),
            out_dtype=getattr(torch, out_dtype) if isinstance(out_dtype, str) else out_dtype,
        )
        return call.give(result, out)


def swiglu_mlp(
    x: Array,
    w_gate_up: Array | tuple[Array, Array],
    w_down: Array,
    norm: Norm | tuple[Array, float] | None = None,
    residual: Array | None = None,
    *,
    out: Array | None = None,
    stream: Any = None,
) -> Array:
    """See ops.swiglu_mlp; ``w_gate_up`` [2I, H] with gate's rows first, a pair, or packed."""
    with _Call(x, stream) as call:
        matrices: Any
        if isinstance(w_gate_up, ops.PackedGateUp):
            matrices = ops.PackedGateUp(call.read("w_gate_up", w_gate_up.weight))
        elif isinstance(w_gate_up, tuple):
            gate, up = w_gate_up
            matrices = call.read("gate", gate), call.read("up", up)
        else:
            matrices = call.read("w_gate_up", w_gate_up)
        result = ops.swiglu_mlp(
            call.read("x", x),
            matrices,
            call.read("w_down", w_down),
            call.norm(norm),
            call.read_if("residual", residual),
        )
        return call.give(result, out)


def attention(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    stream: Any = None,
) -> Any:
    """See ops.attention; ``out`` is that of the result, not of the LSE."""
    with _Call(q, stream) as call:
        result = ops.attention(
            call.read("q", q),
            call.read("k", k),
            call.read("v", v),
            call.read("cu_seqlens_q", cu_seqlens_q),
            call.read("cu_seqlens_k", cu_seqlens_k),
            max_seqlen_q=max_seqlen_q,
            causal=causal,
            softmax_scale=softmax_scale,
            window=window,
            rope=call.rope(rope),
            return_lse=return_lse,
        )
        return call.give_attention(result, out)


def attention_kvcache(
    q: Array,
    k_new: Array | None,
    v_new: Array | None,
    k_cache: Array,
    v_cache: Array,
    block_table: Array,
    cache_seqlens: Array,
    rope: Rope | None = None,
    *,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    min_seqlen_q: int = 0,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    stream: Any = None,
) -> Any:
    """See ops.attention_kvcache: with k_new and v_new, the cache is updated."""
    with _Call(q, stream) as call:
        queries = call.read("q", q)
        target = call.write("out", out, queries)
        reach = call.read if k_new is None else call.write
        result = ops.attention_kvcache(
            queries,
            call.read_if("k_new", k_new),
            call.read_if("v_new", v_new),
            reach("k_cache", k_cache),
            reach("v_cache", v_cache),
            call.read("block_table", block_table),
            call.read("cache_seqlens", cache_seqlens),
            call.rope(rope),
            cu_seqlens_q=call.read_if("cu_seqlens_q", cu_seqlens_q),
            max_seqlen_q=max_seqlen_q,
            min_seqlen_q=min_seqlen_q,
            causal=causal,
            softmax_scale=softmax_scale,
            window=window,
            return_lse=return_lse,
        )
        return call.give_attention(result, out, target)


# ------------------------------------------------------------------------ arrays in, arrays out


class _Call:
    """One call: its arrays as tensors over the same memory, its results as the caller's arrays."""

    def __init__(self, first: Array, stream: Any) -> None:
        self._first, self._stream = first, stream
        self._exit = ExitStack()

    def __enter__(self) -> _Call:
        self._exit.enter_context(_on_stream(_device_of(self._first), self._stream))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def read(self, name: str, array: Array) -> Tensor:
        """The array as a tensor, not copied."""
        if isinstance(array, Tensor):
            return array.detach()
        if isinstance(array, np.ndarray):
            return _of_numpy(name, array)
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            try:
                return torch.utils.dlpack.from_dlpack(array)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                raise TypeError(f"{name} ({type(array).__name__}): {error}") from error
        if hasattr(array, "__cuda_array_interface__"):
            return _of_cuda_interface(name, array.__cuda_array_interface__)
        raise TypeError(
            f"{name} must be an array with __dlpack__ or __cuda_array_interface__, got "
            f"{type(array).__name__}"
        )

    def read_if(self, name: str, array: Array | None) -> Tensor | None:
        return None if array is None else self.read(name, array)

    def write(self, name: str, array: Array | None, like: Tensor | None = None) -> Any:
        """The array, which will be written, as a tensor; of the shape and dtype of ``like``."""
        if array is None:
            return None
        if isinstance(array, np.ndarray):
            writable = array.flags.writeable
        elif type(array).__module__.startswith("jax"):
            writable = False
        else:
            interface = getattr(array, "__cuda_array_interface__", None) or {}
            writable = not interface.get("data", (0, False))[1]
        if not writable:
            raise TypeError(
                f"{name} would be written, but this {type(array).__name__} is read-only"
            )
        tensor = self.read(name, array)
        if like is not None and tensor.shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)}, got {list(tensor.shape)}")
        if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise TypeError(
                f"{name} must be {like.dtype} on {like.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        return tensor

    def norm(self, norm: Norm | tuple[Array, float] | None) -> Norm | None:
        return None if norm is None else Norm(self.read("norm.weight", norm[0]), norm[1])

    def rope(self, rope: Rope | None) -> Rope | None:
        if rope is None:
            return None
        cos, sin, positions, interleaved = rope
        return Rope(
            self.read("rope.cos", cos),
            self.read("rope.sin", sin),
            self.read_if("rope.positions", positions),
            interleaved,
        )

    def give(self, result: Tensor, out: Array | None, target: Tensor | None = None) -> Array:
        """``out``, after the result was copied to it, or the result as one of the first's kind."""
        if out is None:
            return self._like_first(result)
        if target is None:
            target = self.write("out", out, result)
        target.copy_(result)
        return out

    def give_attention(
        self, result: Tensor | tuple[Tensor, Tensor], out: Array | None, target: Any = None
    ) -> Any:
        if isinstance(result, Tensor):
            return self.give(result, out, target)
        values, lse = result
        return self.give(values, out, target), self._like_first(lse)

    def _like_first(self, result: Tensor) -> Array:
        first = self._first
        if isinstance(first, Tensor):
            return result
        if isinstance(first, np.ndarray):
            return _to_numpy(result)
        if hasattr(first, "__array_namespace__"):
            return first.__array_namespace__().from_dlpack(result)
        library = importlib.import_module(type(first).__module__.partition(".")[0])
        return library.from_dlpack(result) if hasattr(library, "from_dlpack") else result


def _device_of(x: Array) -> torch.device:
    """Where the first array is."""
    if isinstance(x, Tensor):
        return x.device
    if hasattr(x, "__dlpack_device__"):
        kind, index = x.__dlpack_device__()
        name = _DEVICE_TYPES.get(int(kind))
        if name is None:
            raise TypeError(f"the first array is on DLPack device type {kind}, not a CPU or CUDA")
        return torch.device(name, index) if name == "cuda" else torch.device(name)
    if hasattr(x, "__cuda_array_interface__"):
        return torch.device("cuda")
    return torch.device("cpu")  # read() tells what is wrong with it


@contextmanager
def _on_stream(device: torch.device, stream: Any) -> Iterator[None]:
    """Make a stream of the device torch's current one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        if stream is not None and not cuda_ops.emulate:
            raise ValueError(f"stream: the first array is on {device}, which has no streams")
        yield
        return
    with torch.cuda.device(device):
        if stream is None:
            yield
            return
        with torch.cuda.stream(_stream_of(_handle(stream))):
            yield


def _stream_of(handle: int) -> Any:
    """A stream of the current device. 0 is its default one, as 1 is in CUDA's array interface."""
    if handle in (0, 1):
        return torch.cuda.default_stream()
    return torch.cuda.ExternalStream(handle)


def _handle(stream: Any) -> int:
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise TypeError(
        "stream must be a handle, or have cuda_stream, ptr or __cuda_stream__, got "
        f"{type(stream).__name__}"
    )


def _of_numpy(name: str, array: np.ndarray) -> Tensor:
    try:
        with warnings.catch_warnings():  # of arrays that cannot be written, which read() does not
            warnings.filterwarnings("ignore", message=".*not writable")
            if array.dtype.name == "bfloat16":
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} (NumPy, {array.dtype}): {error}") from error


def _to_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _of_cuda_interface(name: str, interface: dict[str, Any]) -> Tensor:
    """A view of what __cuda_array_interface__ (versions 2 and 3) describes."""
    dtype = _TYPESTRS.get(interface["typestr"])
    if dtype is None:
        raise TypeError(
            f"{name}: typestr {interface['typestr']!r} is not supported; accepted: "
            f"{', '.join(_TYPESTRS)}"
        )
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: masked arrays are not supported")
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is not None and any(step < 0 or step % dtype.itemsize for step in strides):
        raise TypeError(f"{name}: strides of {strides} bytes are not supported")
    return _cuda_view(
        interface["data"][0],
        shape,
        None if strides is None else tuple(step // dtype.itemsize for step in strides),
        dtype,
        interface.get("stream"),
    )


class _Bytes:
    """Device memory that torch.as_tensor takes."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def _cuda_view(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: torch.dtype,
    stream: int | None,
) -> Tensor:
    """A tensor over device memory, after what ``stream`` does to it; strides in elements."""
    if strides is None:
        strides = torch.empty(shape, device="meta").stride()
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cuda")
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = torch.as_tensor(_Bytes(pointer, reach * dtype.itemsize), device="cuda")
    if stream is not None:
        with torch.cuda.device(memory.device):
            torch.cuda.current_stream().wait_stream(_stream_of(stream))
    return memory.view(dtype).as_strided(shape, strides)

"""The ops on arrays of other libraries, against the ops on tensors; no copy is made of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from minitron_kernels import dlpack, ops
from minitron_kernels.dlpack import Norm, Rope
from minitron_kernels.quantized import QuantizedTensor
from tests.emulated_device import DEVICE, EmulatedGPU, emulated
from tests.gguf_files import random_rows

Tensor = torch.Tensor

NUMPY_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


# ---- the libraries: a tensor as an array over the same memory, and back


def to_numpy(t: Tensor) -> np.ndarray:
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


class Exported:
    """Nothing but DLPack, as of a library that is not known here."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def to_jax(t: Tensor) -> Any:
    numpy = pytest.importorskip("jax.numpy")
    return numpy.from_dlpack(t)


LIBRARIES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "torch": (lambda t: t, lambda t: t),
    "numpy": (to_numpy, lambda a: torch.from_numpy(np.array(a, np.float64))),
    "jax": (to_jax, lambda a: torch.from_numpy(np.array(a, np.float64))),
    "dlpack": (Exported, lambda t: t),
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Any:
    name = request.param
    if name == "jax":
        pytest.importorskip("jax", reason="jax is not installed (extra jax)")
    return name


def case(name: str, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of an op."""
    x = randn(5, 64, dtype=dtype)
    heads = [randn(7, n, 64, dtype=dtype, seed=n) for n in (4, 2, 2)]
    angles = randn(32, 32, seed=9)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(7, dtype=torch.int32)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    norm = Norm(randn(64, dtype=dtype, seed=3), EPS)
    gate, up = (randn(96, 64, dtype=dtype, seed=s) / 8 for s in (4, 5))
    down = randn(64, 96, dtype=dtype, seed=6) / 8
    cache = [randn(4, 16, 2, 64, dtype=dtype, seed=s) for s in (7, 8)]
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    cases: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "rms_norm": ([x, norm.weight, EPS], {}),
        "add_rms_norm": ([x, randn(5, 64, dtype=dtype, seed=1), norm.weight, EPS], {}),
        "apply_rope": ([*heads[:2], cos, sin, positions, True], {}),
        "silu_and_mul": ([x], {}),
        "linear": ([x, gate], {"norm": norm, "residual": randn(5, 96, dtype=dtype, seed=2)}),
        "swiglu_mlp": ([x, (gate, up), down, norm, x], {}),
        "swiglu_mlp joined": ([x, torch.cat((gate, up)), down], {}),
        "attention": (
            [*heads, starts, starts],
            {"rope": Rope(cos, sin), "return_lse": True, "window": 4},
        ),
        "attention_kvcache": (
            [*heads, *cache, table, torch.tensor([5, 20], dtype=torch.int32)],
            {"rope": Rope(cos, sin), "cu_seqlens_q": starts},
        ),
        "attention_kvcache read": (
            [heads[0][:2], None, None, *cache, table, torch.tensor([9, 20], dtype=torch.int32)],
            {},
        ),
    }
    return cases[name]


CASES = (
    "rms_norm", "add_rms_norm", "apply_rope", "silu_and_mul", "linear", "swiglu_mlp",
    "swiglu_mlp joined", "attention", "attention_kvcache", "attention_kvcache read",
)  # fmt: skip
IN_PLACE = ("add_rms_norm", "attention_kvcache")


def convert(value: Any, to: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return to(value)
    if isinstance(value, (Norm, Rope)):
        return type(value)(*(convert(item, to) for item in value))
    if isinstance(value, tuple):
        return tuple(convert(item, to) for item in value)
    return value


def results_of(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_ops_on_arrays(library: str, name: str, dtype: torch.dtype) -> None:
    """The op's own bits, as arrays of the same library; what is updated is updated in place."""
    if library == "jax" and name in IN_PLACE:
        pytest.skip("JAX arrays cannot be updated: see test_arrays_that_cannot_be_written")
    to, back = LIBRARIES[library]
    op = name.partition(" ")[0]
    args, options = case(name, dtype)
    expected = results_of(getattr(ops, op)(*args, **options))
    own_args, own_options = case(name, dtype)
    arrays = [convert(value, to) for value in own_args]
    actual = getattr(dlpack, op)(*arrays, **{k: convert(v, to) for k, v in own_options.items()})
    for got, wanted in zip(results_of(actual), expected, strict=True):
        if library != "dlpack":
            assert isinstance(got, type(arrays[0]))
        if library == "numpy":
            assert got.dtype == NUMPY_DTYPES[wanted.dtype]
        assert torch.equal(back(got).double(), wanted.double())
    for updated, wanted in zip(own_args, args, strict=True):
        if isinstance(wanted, Tensor):
            assert torch.equal(updated, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
def test_out(name: str, dtype: torch.dtype) -> None:
    """Into arrays of the caller's, which may be strided."""
    op = name.partition(" ")[0]
    args, options = case(name, dtype)
    expected = results_of(getattr(ops, op)(*args, **options))
    args, options = case(name, dtype)
    outs = [torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=dtype)[..., ::2] for t in expected]
    if op == "attention" and options.get("return_lse"):
        outs = outs[:1]
    out = to_numpy(outs[0]) if len(outs) == 1 else tuple(map(to_numpy, outs))
    arrays = [convert(value, to_numpy) for value in args]
    options = {key: convert(value, to_numpy) for key, value in options.items()}
    actual = getattr(dlpack, op)(*arrays, **options, out=out)
    for got, own in zip(results_of(actual), results_of(out), strict=False):
        assert got is own
    for tensor, wanted in zip(outs, expected, strict=False):
        assert torch.equal(tensor, wanted)


def test_inputs_are_not_copied(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    to, _ = LIBRARIES[library]
    seen: list[int] = []

    def spy(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.extend((x.data_ptr(), weight.data_ptr()))
        return x

    monkeypatch.setattr(ops, "rms_norm", spy)
    x, weight = randn(4, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)
    dlpack.rms_norm(to(x), to(weight), EPS)
    assert seen == [x.data_ptr(), weight.data_ptr()]


def test_quantized_matrix_with_numpy_activations() -> None:
    blocks = torch.from_numpy(random_rows("Q4_K", 12, 256, np.random.default_rng(0)))
    w = QuantizedTensor(blocks, "Q4_K", (12, 256))
    x = randn(3, 256, dtype=torch.bfloat16)
    actual = dlpack.linear(to_numpy(x), w, out_dtype="float32")
    assert actual.dtype == np.float32
    assert torch.equal(torch.from_numpy(actual), ops.linear(x, w, out_dtype=torch.float32))


# ---- errors


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


X = np.ones((2, 8), np.float32)
W = np.ones(8, np.float32)


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_only_read_may_be_read_only() -> None:
    actual = dlpack.rms_norm(frozen(X.copy()), frozen(W.copy()), EPS)
    assert np.array_equal(actual, dlpack.rms_norm(X, W, EPS))


def test_arrays_that_cannot_be_written() -> None:
    residual = frozen(X.copy())
    with pytest.raises(TypeError, match="residual would be written, but this ndarray is read-only"):
        dlpack.add_rms_norm(X, residual, W, EPS)
    # Nothing has been updated when it is another argument that cannot be.
    residual = X.copy()
    with pytest.raises(TypeError, match="out would be written"):
        dlpack.add_rms_norm(X, residual, W, EPS, out=frozen(X.copy()))
    with pytest.raises(ValueError, match=r"out must be \[2, 8\], got \[8\]"):
        dlpack.add_rms_norm(X, residual, W, EPS, out=W)
    assert np.array_equal(residual, X)


def test_jax_arrays_cannot_be_written() -> None:
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed (extra jax)")
    x, w = jnp.ones((2, 8)), jnp.ones(8)
    with pytest.raises(TypeError, match="residual would be written"):
        dlpack.add_rms_norm(x, x, w, EPS)
    with pytest.raises(TypeError, match="out would be written"):
        dlpack.rms_norm(x, w, EPS, out=x)


def test_jax_tracers_are_refused() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed (extra jax)")
    with pytest.raises(TypeError, match=r"x must be an array .* got DynamicJaxprTracer"):
        jax.jit(lambda x: dlpack.rms_norm(x, W, EPS))(X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dlpack.rms_norm([1.0], W, EPS), TypeError, "x must be an array .* got list"),
        (lambda: dlpack.rms_norm(X, None, EPS), TypeError, "weight must be an array"),
        (lambda: dlpack.rms_norm(X.astype(np.float64), W, EPS), TypeError, "x must be bfloat16"),
        (lambda: dlpack.rms_norm(X.astype(">f4"), W, EPS), TypeError, r"x \(NumPy, >f4\)"),
        (lambda: dlpack.rms_norm(X.astype("U1"), W, EPS), TypeError, r"x \(NumPy, <U1\)"),
        (lambda: dlpack.rms_norm(X[::-1], W, EPS), TypeError, r"x \(NumPy, float32\).*stride"),
        (lambda: dlpack.rms_norm(X, W.astype(np.float16), EPS), TypeError, "weight is"),
        (lambda: dlpack.rms_norm(X, W[:4], EPS), ValueError, "weight must have shape 8"),
        (
            lambda: dlpack.rms_norm(X, W, EPS, out=X.astype(np.float16)),
            TypeError,
            "out must be torch.float32 on cpu, got torch.float16",
        ),
        (lambda: dlpack.rms_norm(X, W, EPS, stream=0), ValueError, "stream: .* on cpu"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class OnMetal(Exported):
    def __dlpack_device__(self) -> Any:
        return 8, 0


def test_device_types() -> None:
    with pytest.raises(TypeError, match="DLPack device type 8"):
        dlpack.rms_norm(OnMetal(randn(2, 8)), W, EPS)


# ---- streams


class WithCudaStream:
    cuda_stream = 48


class WithPtr:
    ptr = 64


class WithProtocol:
    ptr = 1

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 80


@pytest.mark.parametrize(
    ("stream", "handle"), [(16, 16), (WithCudaStream(), 48), (WithPtr(), 64), (WithProtocol(), 80)]
)
def test_stream_handles(stream: Any, handle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the op runs where its stream is the current one."""
    entered: list[Any] = []

    @contextmanager
    def note(what: Any) -> Iterator[None]:
        entered.append(what)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", note)
    monkeypatch.setattr(torch.cuda, "stream", note)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle: ("external", handle))
    device = torch.device("cuda", 1)
    with dlpack._on_stream(device, stream):
        assert entered == [device, ("external", handle)]


@pytest.mark.parametrize("stream", [True, "0", object()])
def test_stream_errors(stream: Any) -> None:
    with pytest.raises(TypeError, match="stream must be a handle"):
        dlpack._handle(stream)


# ---- __cuda_array_interface__, on an emulated GPU


class FakeCuda:
    """Device memory with nothing but __cuda_array_interface__, as Numba's arrays have it."""

    def __init__(self, tensor: Tensor, read_only: bool = False, **changed: Any) -> None:
        kinds = {torch.float16: "<f2", torch.bfloat16: "<V2", torch.int32: "<i4"}
        kinds[torch.float32] = "<f4"
        size = tensor.element_size()
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": None
            if tensor.is_contiguous()
            else tuple(step * size for step in tensor.stride()),
            "typestr": kinds[tensor.dtype],
            "data": (tensor.data_ptr(), read_only),
            "version": 3,
            "stream": 1,
        } | changed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedGPU]:
    """An emulated GPU, whose memory is found by its address in the place of torch's view."""
    with emulated("sm_80") as device:
        memory: list[Tensor] = []

        def view(
            pointer: int, shape: Any, strides: Any, dtype: torch.dtype, stream: int | None
        ) -> Tensor:
            (owner,) = [t for t in memory if t.data_ptr() == pointer]
            assert owner.dtype == dtype and stream == 1
            strides = torch.empty(shape, device="meta").stride() if strides is None else strides
            return owner.as_strided(shape, strides)

        monkeypatch.setattr(dlpack, "_cuda_view", view)
        device.memory = memory  # type: ignore[attr-defined]
        yield device


def on(gpu: Any, tensor: Tensor) -> Tensor:
    moved = tensor.to(DEVICE)
    gpu.memory.append(moved)
    return moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_array_interface(gpu: EmulatedGPU, dtype: torch.dtype) -> None:
    """Rows with gaps between them, an update in place, and the result in the caller's memory."""
    wide = on(gpu, randn(5, 128, dtype=dtype))
    residual, weight = on(gpu, randn(5, 64, dtype=dtype, seed=1)), on(gpu, randn(64, dtype=dtype))
    out = on(gpu, torch.zeros(5, 64, dtype=dtype))
    expected_sum = residual.clone()
    x = wide[:, :64]
    expected = ops.add_rms_norm(x, expected_sum, weight, EPS)
    target = FakeCuda(out)
    result = dlpack.add_rms_norm(
        FakeCuda(x), FakeCuda(residual), FakeCuda(weight, read_only=True), EPS, out=target
    )
    assert result is target
    assert torch.equal(out.cpu(), expected.cpu())
    assert torch.equal(residual.cpu(), expected_sum.cpu())
    alone = dlpack.rms_norm(FakeCuda(x), FakeCuda(weight), EPS)  # of no library: a tensor
    assert torch.equal(alone.cpu(), ops.rms_norm(x, weight, EPS).cpu())


def test_cuda_array_interface_errors(gpu: EmulatedGPU) -> None:
    x, weight = on(gpu, randn(5, 64).half()), on(gpu, randn(64).half())
    good = FakeCuda(weight)
    for changed, message in (
        ({"typestr": "<c8"}, "x: typestr '<c8' is not supported"),
        ({"mask": object()}, "masked"),
        ({"strides": (-128, 2)}, "strides"),
        ({"strides": (127, 2)}, "strides"),
    ):
        with pytest.raises(TypeError, match=message):
            dlpack.rms_norm(FakeCuda(x, **changed), good, EPS)
    with pytest.raises(TypeError, match="residual would be written"):
        dlpack.add_rms_norm(FakeCuda(x), FakeCuda(x, read_only=True), good, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_gpu_arrays_and_streams(library: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, weight = randn(5, 64).half().cuda(), randn(64).half().cuda()
    expected = ops.rms_norm(x, weight, EPS)
    if library == "torch":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        actual = dlpack.rms_norm(x, weight, EPS, stream=stream)
        stream.synchronize()
    else:
        cupy = pytest.importorskip("cupy")
        arrays = [cupy.from_dlpack(t) for t in (x, weight)]
        actual = torch.from_dlpack(dlpack.rms_norm(*arrays, EPS, stream=cupy.cuda.Stream.null))
    assert torch.equal(actual, expected)

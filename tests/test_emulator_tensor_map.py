"""Tensor maps of the emulator: what the driver documents is accepted and kept, the rest refused."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.emulator import last_report, library

F16, F32, BF16, TF32_FTZ = 6, 7, 9, 12
U4_ALIGN8, U4_ALIGN16, U6_ALIGN16 = 13, 14, 15
BITS = [8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6]
SPANS = [0, 32, 64, 128, 128, 128, 128]  # bytes, by swizzle


class Decoded(ctypes.Structure):
    """emu::TensorMap."""

    _fields_ = (
        ("checksum", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint16 * 5),
        ("steps", ctypes.c_uint8 * 5),
        ("rank", ctypes.c_uint8),
        ("type", ctypes.c_uint8),
        ("interleave", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("l2_promotion", ctypes.c_uint8),
        ("fill", ctypes.c_uint8),
        ("unused", ctypes.c_uint8 * 19),
    )


@dataclass(frozen=True)
class Args:
    """Of cuTensorMapEncodeTiled but the map. None is a null pointer."""

    type: int = BF16
    rank: int = 3
    address: int | None = 0x10000
    dims: tuple[int, ...] | None = (128, 1000, 8)
    strides: tuple[int, ...] | None = (2048, 256)  # heads lie inside tokens
    box: tuple[int, ...] | None = (64, 128, 1)
    steps: tuple[int, ...] | None = (1, 1, 1)
    interleave: int = 0
    swizzle: int = 3
    l2_promotion: int = 2
    fill: int = 0


def new_map(offset: int = 0) -> np.ndarray:
    """128 bytes of 0xee, `offset` bytes after a multiple of 128."""
    memory = np.full(128 * 3, 0xEE, np.uint8)
    start = -memory.ctypes.data % 128 + offset
    return memory[start : start + 128]


def entry(name: bytes, *types: Any) -> Any:
    address, status = ctypes.c_void_p(), ctypes.c_int()
    found = library().cuGetProcAddress_v2(
        name, ctypes.byref(address), 13000, ctypes.c_uint64(0), ctypes.byref(status)
    )
    assert found == 0 and address.value is not None
    return ctypes.CFUNCTYPE(ctypes.c_int, *types)(address.value)


def encode(at: int | None, a: Args) -> int:
    void, word, pointer = ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER
    of64, of32 = pointer(ctypes.c_uint64), pointer(word)
    function = entry(
        b"cuTensorMapEncodeTiled",
        *(void, word, word, void, of64, of64, of32, of32, word, word, word, word),
    )

    def array(kind: Any, values: tuple[int, ...] | None) -> Any:
        return None if values is None else (kind * len(values))(*values)

    return function(
        *(at, a.type, a.rank, a.address),
        *(array(ctypes.c_uint64, values) for values in (a.dims, a.strides)),
        *(array(word, values) for values in (a.box, a.steps)),
        *(a.interleave, a.swizzle, a.l2_promotion, a.fill),
    )


def replace_address(at: int | None, address: int | None) -> int:
    function = entry(b"cuTensorMapReplaceAddress", ctypes.c_void_p, ctypes.c_void_p)
    return function(at, address)


def decode(tensor_map: np.ndarray) -> Args | None:
    d = Decoded()
    if library().emu_tensor_map_decode(ctypes.c_void_p(tensor_map.ctypes.data), ctypes.byref(d)):
        return None
    n = d.rank
    assert not any([*d.dims[n:], *d.strides[n - 1 :], *d.box[n:], *d.steps[n:], *d.unused])
    return Args(
        *(d.type, n, d.address, tuple(d.dims[:n]), tuple(d.strides[: n - 1])),
        *(tuple(d.box[:n]), tuple(d.steps[:n])),
        *(d.interleave, d.swizzle, d.l2_promotion, d.fill),
    )


def use_device(capability: int) -> None:
    lib, value, context = library(), ctypes.c_int(), ctypes.c_void_p()
    assert lib.cuInit(0) == 0
    assert lib.cuDeviceGetCount(ctypes.byref(value)) == 0
    for device in range(value.value):
        assert lib.cuDeviceGetAttribute(ctypes.byref(value), 75, device) == 0
        if value.value == capability:
            assert lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
            assert lib.cuCtxSetCurrent(context) == 0
            return
    pytest.skip(f"MK_EMU_DEVICE leaves out capability {capability}")


@pytest.fixture(autouse=True, scope="module")
def sm_90() -> Iterator[None]:
    use_device(9)
    yield
    assert library().cuCtxSetCurrent(None) == 0


@st.composite
def good_args(draw: st.DrawFn) -> Args:
    kind = draw(st.integers(0, 15))
    bits, has_gaps = BITS[kind], kind >= U4_ALIGN16
    interleave = 0 if kind == U6_ALIGN16 else draw(st.integers(0, 2))
    if has_gaps:  # with INTERLEAVE_32B no swizzle is left for 16U4_ALIGN16B
        interleave = min(interleave, 1)
        swizzle = draw(st.sampled_from([0, 3, 4] + [6] * (kind == U6_ALIGN16)))
    else:
        swizzle = 1 if interleave == 2 else draw(st.integers(0, 6))
    rank = draw(st.integers(3 if interleave else 1, 5))
    unit = 32 if interleave == 2 or has_gaps else 16

    multiple = 128 if has_gaps else 2 if kind == U4_ALIGN8 else 1
    largest = 2**32 if rank == 1 else 2**12
    dims = [multiple * draw(st.integers(1, largest // multiple))]
    dims += [draw(st.integers(1, 70)) for _ in range(rank - 1)]
    strides, below = [0] * (rank - 1), -(-dims[0] * bits // 8)
    for i in draw(st.permutations(range(rank - 1))):  # any order in memory
        strides[i] = (-(-below // unit) + draw(st.integers(0, 3))) * unit
        below = strides[i] * dims[i + 1]

    inner_unit = 128 // bits if interleave == 0 else 1
    span = SPANS[swizzle] if swizzle and interleave == 0 else 10**6
    inner = draw(st.integers(1, min(256, span * 8 // bits) // inner_unit)) * inner_unit
    box = [128 if has_gaps else inner] + [draw(st.integers(1, 256)) for _ in range(rank - 1)]
    fill = draw(st.integers(0, 1)) if F16 <= kind <= TF32_FTZ else 0
    return Args(
        *(kind, rank, unit * draw(st.integers(1, 2**40)), tuple(dims), tuple(strides), tuple(box)),
        *(tuple(draw(st.integers(1, 8)) for _ in range(rank)), interleave, swizzle),
        *(draw(st.integers(0, 3)), fill),
    )


@settings(max_examples=300, deadline=None)
@given(args=good_args(), address=st.integers(1, 2**40), offset=st.sampled_from([0, 64]))
def test_tensor_map_keeps_what_was_encoded(args: Args, address: int, offset: int) -> None:
    tensor_map = new_map(offset)
    at = tensor_map.ctypes.data
    assert encode(at, args) == 0, last_report()
    assert decode(tensor_map) == args
    assert decode(tensor_map.copy()) == args  # kernels get it by value
    assert replace_address(at, address * 32) == 0, last_report()
    assert decode(tensor_map) == replace(args, address=address * 32)


BIG = Args(
    rank=5, dims=(1, 2**32, 1, 1, 2), strides=(16, 0, 0, 2**40 - 16), box=(8, 256, 1, 1, 1),
    steps=(8, 1, 1, 1, 1), swizzle=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "args",
    [
        Args(),
        BIG,
        Args(rank=1, dims=(2**32,), strides=None, box=(64,), steps=(1,)),
        Args(type=F32, box=(32, 1, 1), strides=(4096, 512), fill=1),
        Args(type=U4_ALIGN8, box=(256, 1, 1), strides=(64, 64000)),
    ],
)
def test_tensor_map_accepts_the_limits(args: Args) -> None:
    tensor_map = new_map()
    assert encode(tensor_map.ctypes.data, args) == 0, last_report()
    expected = replace(args, strides=args.strides or ())
    assert decode(tensor_map) == expected


INTERLEAVED = Args(interleave=2, swizzle=1, address=0x20)
PACKED = Args(type=U6_ALIGN16, strides=(768, 96), box=(128, 1, 1), address=0x20)

REFUSED = [
    ("tensorDataType", Args(type=16)),
    ("interleave", Args(interleave=3)),
    ("interleave", replace(PACKED, interleave=1)),
    ("swizzle", Args(swizzle=7)),
    ("l2Promotion", Args(l2_promotion=4)),
    ("oobFill", Args(fill=2)),
    *[("oobFill", Args(type=kind, fill=1)) for kind in (0, 1, 2, 3, 4, 5, 13, 14, 15)],
    ("tensorRank", Args(rank=0)),
    ("tensorRank", Args(rank=6)),
    ("tensorRank", Args(rank=2, interleave=1)),
    ("tensorRank", Args(rank=2, interleave=2, swizzle=1)),
    ("globalAddress", Args(address=None)),
    ("globalAddress", Args(address=0x10008)),
    ("globalAddress", replace(INTERLEAVED, address=0x30)),
    ("globalAddress", replace(PACKED, address=0x30)),
    ("globalDim", Args(dims=None)),
    ("globalDim[1]", Args(dims=(128, 0, 8))),
    ("globalDim[2]", Args(dims=(128, 1000, 2**32 + 1))),
    ("globalDim[0]", replace(PACKED, dims=(64, 1000, 8))),
    ("globalDim[0]", Args(type=U4_ALIGN8, dims=(127, 1000, 8))),
    ("globalStrides", Args(strides=None)),
    ("globalStrides[0]", Args(strides=(2056, 256))),
    ("globalStrides[1]", Args(strides=(256, 2**40))),
    ("globalStrides[1]", replace(INTERLEAVED, strides=(4096, 272))),
    ("globalStrides[1]", replace(PACKED, strides=(1024, 112))),
    ("globalStrides[1]", Args(strides=(2048, 240))),  # rows overlap
    ("globalStrides[0]", Args(strides=(2032, 256))),  # tokens overlap
    ("globalStrides[1]", Args(strides=(256, 999 * 256))),
    ("globalStrides[0]", Args(strides=(0, 256))),
    ("globalStrides[3]", replace(BIG, strides=(512, 0, 0, 2**40 - 16))),  # beyond 2^40 below
    ("boxDim", Args(box=None)),
    ("boxDim[1]", Args(box=(64, 0, 1))),
    ("boxDim[2]", Args(box=(64, 1, 257))),
    ("boxDim[0]", Args(box=(60, 1, 1))),  # 120 bytes
    ("boxDim[0]", Args(box=(16, 1, 1), type=U4_ALIGN8)),  # 8 bytes
    ("boxDim[0]", replace(PACKED, box=(64, 1, 1))),
    ("boxDim[0]", Args(swizzle=1, box=(24, 1, 1))),
    ("boxDim[0]", Args(swizzle=2, box=(40, 1, 1))),
    *[("boxDim[0]", Args(swizzle=swizzle, box=(72, 1, 1))) for swizzle in (3, 4, 5, 6)],
    ("elementStrides", Args(steps=None)),
    ("elementStrides[1]", Args(steps=(1, 0, 1))),
    ("elementStrides[2]", Args(steps=(1, 1, 9))),
    *[("swizzle", replace(INTERLEAVED, swizzle=swizzle)) for swizzle in (0, 2, 3, 4, 5, 6)],
    *[("swizzle", replace(PACKED, swizzle=swizzle)) for swizzle in (1, 2, 5)],
    *[("swizzle", replace(PACKED, type=U4_ALIGN16, swizzle=swizzle)) for swizzle in (1, 2, 5, 6)],
]


@pytest.mark.parametrize(("argument", "args"), REFUSED)
def test_tensor_map_refuses(argument: str, args: Args) -> None:
    tensor_map = new_map()
    assert encode(tensor_map.ctypes.data, args) == 1
    assert last_report().startswith(f"cuTensorMapEncodeTiled: {argument}: got ")
    assert (tensor_map == 0xEE).all()


@pytest.mark.parametrize("args", [INTERLEAVED, PACKED, replace(PACKED, type=U4_ALIGN16)])
def test_tensor_map_accepts_what_the_refused_ones_vary(args: Args) -> None:
    assert encode(new_map().ctypes.data, args) == 0, last_report()


def test_tensor_map_refuses_bad_map_addresses() -> None:
    tensor_map = new_map(32)
    for at in (None, tensor_map.ctypes.data):
        assert encode(at, Args()) == 1
        assert last_report().startswith("cuTensorMapEncodeTiled: tensorMap: got ")
        assert replace_address(at, 0x100) == 1
        assert last_report().startswith("cuTensorMapReplaceAddress: tensorMap: got ")
    assert (tensor_map == 0xEE).all()


@pytest.mark.parametrize(
    ("args", "bad"), [(Args(), [None, 8]), (INTERLEAVED, [None, 16]), (PACKED, [None, 16])]
)
def test_tensor_map_replace_address_keeps_the_alignment(args: Args, bad: list[int | None]) -> None:
    tensor_map = new_map()
    assert encode(tensor_map.ctypes.data, args) == 0
    for address in bad:
        assert replace_address(tensor_map.ctypes.data, address) == 1
        assert last_report().startswith("cuTensorMapReplaceAddress: globalAddress: got ")
        assert decode(tensor_map) == args


def test_tensor_map_that_was_not_encoded_is_known() -> None:
    tensor_map = new_map()
    for value in (0, 0xEE):
        tensor_map[:] = value
        assert decode(tensor_map) is None
        assert replace_address(tensor_map.ctypes.data, 0x100) == 1
        assert last_report().startswith("cuTensorMapReplaceAddress: tensorMap: got ")
    assert encode(tensor_map.ctypes.data, Args()) == 0
    for i in range(128):
        tensor_map[i] ^= 1
        assert decode(tensor_map) is None
        tensor_map[i] ^= 1
    assert decode(tensor_map) == Args()


def test_tensor_map_needs_a_context_with_tma() -> None:
    tensor_map = new_map()
    at = tensor_map.ctypes.data
    try:
        assert library().cuCtxSetCurrent(None) == 0
        assert encode(at, Args()) == 201 and replace_address(at, 0x100) == 201
        use_device(8)
        assert encode(at, Args()) == 801 and "the device is sm_80" in last_report()
        use_device(10)
        assert encode(at, Args()) == 0
    finally:
        use_device(9)

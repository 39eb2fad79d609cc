"""Corrupt and malicious checkpoints: a ValueError naming file and field, never worse."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minitron_kernels.loaders.checkpoint import open_checkpoint
from minitron_kernels.loaders.files import MAX_JSON_BYTES
from minitron_kernels.loaders.gguf_file import GGUFFile
from tests.gguf_files import (
    SCALE_OFFSETS,
    TINY_METADATA,
    RawGGUF,
    raw_pair,
    raw_string,
    raw_tensor,
    tiny_tensors,
    write_gguf,
)

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10
Q4_0, IQ4_XS = 2, 23
HUGE = (1 << 64) - 1
ARCH = raw_pair("general.architecture", STRING, raw_string("llama"))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + items


VECTOR = raw_tensor("a", [8], 0, 0)  # 8 floats, 32 bytes

HOSTILE_GGUF: dict[str, tuple[RawGGUF, str]] = {
    "wrong magic": (RawGGUF(magic=b"GGML"), "not a GGUF file"),
    "version 1": (RawGGUF(version=1), "version: got 1, accepted: 2, 3"),
    "big endian": (RawGGUF(version=0x03000000), "version: a big-endian file"),
    "tensor count": (RawGGUF(num_tensors=HUGE), f"tensor count: {HUGE} items cannot fit"),
    "metadata count": (RawGGUF(num_pairs=1 << 40), "metadata count: 1099511627776 items"),
    "key length": (
        RawGGUF(pairs=[raw_string("k", HUGE) + u32(U8) + b"\0"]),
        f"metadata key 0: {HUGE} bytes at offset",
    ),
    "key not UTF-8": (
        RawGGUF(pairs=[raw_pair(b"\xff\xfe", U8, b"\0")]),
        "metadata key 0: not valid UTF-8",
    ),
    "key twice": (
        RawGGUF(pairs=[ARCH, ARCH]),
        "general.architecture: the key occurs twice",
    ),
    "value type": (RawGGUF(pairs=[raw_pair("k", 99, u64(0))]), "k: unknown value type 99"),
    "bool": (RawGGUF(pairs=[raw_pair("k", BOOL, b"\2")]), "k: a bool must be stored as 0 or 1"),
    "string length": (
        RawGGUF(pairs=[raw_pair("k", STRING, raw_string("v", 1 << 63))]),
        "k: 9223372036854775808 bytes at offset",
    ),
    "string not UTF-8": (
        RawGGUF(pairs=[raw_pair("k", STRING, raw_string(b"\xc3\x28"))]),
        "k: not valid UTF-8",
    ),
    "array length": (
        RawGGUF(pairs=[raw_pair("k", ARRAY, array(F32, HUGE))]),
        f"k: {HUGE} items cannot fit",
    ),
    "array length overflowing 64 bits in bytes": (
        RawGGUF(pairs=[raw_pair("k", ARRAY, array(U64, 1 << 61, u64(0)))]),
        "k: 2305843009213693952 items cannot fit",
    ),
    "array of strings length": (
        RawGGUF(pairs=[raw_pair("k", ARRAY, array(STRING, 1 << 32, raw_string("a")))]),
        "k: 4294967296 items cannot fit",
    ),
    "string in array": (
        RawGGUF(
            pairs=[raw_pair("k", ARRAY, array(STRING, 2, raw_string("a") + raw_string("b", 99)))]
        ),
        r"k\[1\]: string at offset",
    ),
    "string in array not UTF-8": (
        RawGGUF(
            pairs=[raw_pair("k", ARRAY, array(STRING, 2, raw_string("a") + raw_string(b"\xff")))]
        ),
        r"k\[1\]: not valid UTF-8",
    ),
    "nested array": (
        RawGGUF(pairs=[raw_pair("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]),
        "k: unknown array item type 9",
    ),
    "array item type": (
        RawGGUF(pairs=[raw_pair("k", ARRAY, array(77, 1))]),
        "k: unknown array item type 77",
    ),
    **{
        f"alignment {value}": (
            RawGGUF(pairs=[raw_pair("general.alignment", U32, u32(value))]),
            f"general.alignment: got {value}, accepted: a power of two",
        )
        for value in (0, 1, 24)
    },
    "alignment of a wrong type": (
        RawGGUF(pairs=[raw_pair("general.alignment", STRING, raw_string("32"))]),
        "general.alignment: got '32', accepted",
    ),
    "tensor name not UTF-8": (
        RawGGUF(tensors=[raw_tensor(b"\xff", [8], 0, 0)], data=bytes(32)),
        "name of tensor 0: not valid UTF-8",
    ),
    "tensor twice": (
        RawGGUF(tensors=[VECTOR, VECTOR], data=bytes(32)),
        "tensor 'a': the name occurs twice",
    ),
    **{
        f"{count} dimensions": (
            RawGGUF(tensors=[raw_tensor("a", [8], 0, 0, num_dims=count)], data=bytes(32)),
            f"tensor 'a': got {count} dimensions, accepted: 1 to 4",
        )
        for count in (0, 5, 0xFFFFFFFF)
    },
    "dimension 0": (
        RawGGUF(tensors=[raw_tensor("a", [8, 0], 0, 0)], data=bytes(32)),
        r"tensor 'a': shape \[0, 8\] has an empty dimension",
    ),
    "dimension -1": (
        RawGGUF(tensors=[raw_tensor("a", [HUGE], 0, 0)], data=bytes(32)),
        "tensor 'a': 73786976294838206460 bytes at offset",
    ),
    "product that overflows to 32 bytes": (
        RawGGUF(tensors=[raw_tensor("a", [1 << 33, 1 << 31, 8], 0, 0)], data=bytes(32)),
        "tensor 'a': .* reach past the end of the file",
    ),
    "partial block": (
        RawGGUF(tensors=[raw_tensor("a", [40], Q4_0, 0)], data=bytes(64)),
        "tensor 'a': rows of 40 are not a multiple of Q4_0's 32 elements",
    ),
    "tensor type": (
        RawGGUF(tensors=[raw_tensor("a", [8], 4321, 0)], data=bytes(32)),
        "tensor 'a': unknown tensor type 4321, accepted: F32,",
    ),
    "offset not aligned": (
        RawGGUF(tensors=[raw_tensor("a", [8], 0, 16)], data=bytes(64)),
        "tensor 'a': offset 16 is not a multiple of 32",
    ),
    "offset out of the file": (
        RawGGUF(tensors=[raw_tensor("a", [8], 0, 64)], data=bytes(64)),
        "tensor 'a': 32 bytes at offset .* reach past the end of the file",
    ),
    "offset that wraps around": (
        RawGGUF(tensors=[raw_tensor("a", [8], 0, (1 << 64) - 32)], data=bytes(64)),
        "tensor 'a': 32 bytes at offset .* reach past the end of the file",
    ),
    "overlap": (
        RawGGUF(tensors=[raw_tensor("a", [16], 0, 0), raw_tensor("b", [8], 0, 32)], data=bytes(64)),
        "tensor 'b': its data overlaps those of 'a'",
    ),
    "same place": (
        RawGGUF(tensors=[raw_tensor("b", [8], 0, 0), raw_tensor("a", [8], 0, 0)], data=bytes(32)),
        "tensor 'a': its data overlaps those of 'b'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_GGUF)
def test_hostile_gguf_is_a_value_error_naming_file_and_field(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE_GGUF[case]
    path = raw.write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        GGUFFile(path)


def test_the_hand_written_file_is_valid_where_nothing_is_made_wrong(tmp_path: Path) -> None:
    """Else the tests above could pass by luck."""
    pairs = [ARCH, raw_pair("k", ARRAY, array(STRING, 2, raw_string("a") + raw_string("b")))]
    tensors = [VECTOR, raw_tensor("b", [8], 0, 32)]
    data = np.arange(16, dtype=np.float32).tobytes()
    for version in (2, 3):
        raw = RawGGUF(version=version, pairs=pairs, tensors=tensors, data=data)
        file = GGUFFile(raw.write(tmp_path / "m.gguf"))
        assert file.metadata == {"general.architecture": "llama", "k": ["a", "b"]}
        assert file.rows("b").view(np.float32).tolist() == [list(range(8, 16))]


def test_unsupported_types_and_tensors_are_named(tmp_path: Path) -> None:
    raw = RawGGUF(tensors=[raw_tensor("a", [256], IQ4_XS, 0)], data=bytes(256))
    with pytest.raises(NotImplementedError, match=r"m\.gguf: tensor 'a': type IQ4_XS is not"):
        GGUFFile(raw.write(tmp_path / "m.gguf"))
    for name in (
        "blk.0.attn_q.bias",
        "blk.0.ffn_gate_exps.weight",
        "attn_q.weight",
        "blk.0.output.weight",
        "blk.00.attn_q.weight",
    ):
        write_gguf(
            tmp_path / "m.gguf",
            tiny_tensors("F16") | {name: tiny_tensors("F16")["output_norm.weight"]},
        )
        with pytest.raises(NotImplementedError, match=rf"m\.gguf: tensor '{name}' is not part"):
            open_checkpoint(tmp_path / "m.gguf")
    other = tiny_tensors("F16") | {"blk.0.attn_q.bias": tiny_tensors("F16")["output_norm.weight"]}
    write_gguf(tmp_path / "m.gguf", other, TINY_METADATA | {"general.architecture": "gemma3"})
    with pytest.raises(NotImplementedError, match=r"m\.gguf: general\.architecture 'gemma3'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_gguf_cut_off_anywhere_is_a_value_error(tmp_path: Path) -> None:
    metadata = TINY_METADATA | {"tokenizer.ggml.tokens": ["a", "b"], "x": [1, 2], "y": True}
    write_gguf(tmp_path / "whole.gguf", tiny_tensors("Q4_K"), metadata)
    whole = (tmp_path / "whole.gguf").read_bytes()
    header = whole.index(b"output_norm.weight") + 64
    cut = tmp_path / "cut.gguf"
    # Every byte of the header, and some of the data; the last tensor's padding is not needed.
    for size in [*range(header), *range(header, len(whole) - 32, 40961), len(whole) - 32]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: "):
            GGUFFile(cut)


def load_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.load(name, torch.float32)


ACCEPTED_ERRORS = (ValueError, NotImplementedError)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    metadata = TINY_METADATA | {"tokenizer.ggml.tokens": ["a", "bc"], "x": [1.5, 2.5], "y": True}
    tensors = {
        n: (k, rows[:8] if rows.ndim > 1 else rows) for n, (k, rows) in tiny_tensors("Q6_K").items()
    }
    write_gguf(path, tensors, metadata)
    return path.read_bytes()


def test_gguf_with_any_bytes_changed_never_crashes(tmp_path: Path, small_gguf: bytes) -> None:
    header = small_gguf.index(b"output_norm.weight") + 64
    load_everything_of(tmp_path, small_gguf)
    interesting = st.sampled_from([0, 1, 2, 7, 0x7F, 0x80, 0xFE, 0xFF])
    change = st.tuples(st.integers(0, header), interesting | st.integers(0, 255))
    outcomes = {"opened": 0, "refused": 0}

    @settings(
        max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(change, min_size=1, max_size=8) | st.tuples(change), st.integers(0, 9))
    def mutate(changes: Sequence[tuple[int, int]], cut: int) -> None:
        data = bytearray(small_gguf)
        for position, value in changes:
            data[position] = value
        if cut == 9:
            del data[changes[0][0] :]
        try:
            load_everything_of(tmp_path, bytes(data))
            outcomes["opened"] += 1
        except ACCEPTED_ERRORS as error:
            assert "m.gguf" in str(error)
            outcomes["refused"] += 1

    mutate()
    assert min(outcomes.values()) > 10, outcomes  # both branches were met


def load_everything_of(folder: Path, data: bytes) -> None:
    (folder / "m.gguf").write_bytes(data)
    load_everything(folder / "m.gguf")


@pytest.mark.parametrize("bits", [0x7E00, 0xFC00, 0x7C00], ids=["nan", "-inf", "inf"])
@pytest.mark.parametrize("kind", SCALE_OFFSETS)
def test_scales_that_are_not_finite_name_the_tensor(tmp_path: Path, kind: str, bits: int) -> None:
    for offset in SCALE_OFFSETS[kind]:
        tensors = tiny_tensors(kind)
        rows = tensors["blk.0.ffn_down.weight"][1]
        _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        last_block = rows[-1, -nbytes:]
        last_block[offset : offset + 2] = np.array([bits], np.uint16).view(np.uint8)
        write_gguf(tmp_path / "m.gguf", tensors)
        checkpoint = open_checkpoint(tmp_path / "m.gguf")
        name = "model.layers.0.mlp.down_proj.weight"
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(
                ValueError,
                match=rf"m\.gguf: tensor '{name}' \({kind}\) has values that are not finite",
            ):
                checkpoint.load(name, dtype)


def test_values_beyond_float16_are_refused_where_they_would_become_infinite(tmp_path: Path) -> None:
    tensors = tiny_tensors("F16")
    tensors["output_norm.weight"] = ("F32", np.full(256, 7e4, np.float32).view(np.uint8))
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.load("model.norm.weight", torch.bfloat16).float().min() > 69000
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' \(F32\).*not finite as float16"):
        checkpoint.load("model.norm.weight", torch.float16)


def test_q_rows_that_do_not_divide_into_heads(tmp_path: Path) -> None:
    tensors = tiny_tensors("Q4_0")
    kind, rows = tensors["blk.0.attn_q.weight"]
    tensors["blk.0.attn_q.weight"] = (kind, rows[:-1])
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(
        ValueError, match=r"q_proj\.weight': shape \[255, 256\] does not divide into 4"
    ):
        checkpoint.load("model.layers.0.self_attn.q_proj.weight", torch.float32)


# ---- split files ----


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return write_gguf(tmp_path / "m.gguf", tiny_tensors("Q4_0"), per_file=5)


def test_split_with_a_part_missing(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"-00002-of-00003\.gguf: part 2 of 3 is missing"):
        open_checkpoint(parts[0])


def test_split_with_parts_exchanged(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_suffix(".tmp"))
    parts[2].rename(parts[1])
    parts[1].with_suffix(".tmp").rename(parts[2])
    with pytest.raises(ValueError, match=r"00002-of-00003\.gguf: split\.no: got 2, expected 1"):
        open_checkpoint(parts[0])


def test_split_with_the_same_part_twice(parts: list[Path]) -> None:
    data = bytearray(parts[1].read_bytes())
    at = data.index(b"split.no") + len("split.no") + 4
    data[at] = 2
    parts[2].write_bytes(data)
    with pytest.raises(ValueError, match=r"split\.tensors\.count: got 12, expected"):
        open_checkpoint(parts[0])


def test_split_whose_tensors_repeat(parts: list[Path]) -> None:
    data = parts[2].read_bytes()
    parts[2].write_bytes(data.replace(b"blk.0.ffn_norm.weight", b"blk.0.ffn_gate.weight"))
    with pytest.raises(
        ValueError, match=r"00003\.gguf: tensor 'blk\.0\.ffn_gate\.weight' is also in .*00002-of"
    ):
        open_checkpoint(parts[0])


def test_a_part_under_another_name(tmp_path: Path, parts: list[Path]) -> None:
    with pytest.raises(
        ValueError, match=r"renamed\.gguf: split\.count: the file is one of 3 parts"
    ):
        open_checkpoint(parts[0].rename(tmp_path / "renamed.gguf"))
    with pytest.raises(ValueError, match=r"the name says part 00004 of 00003"):
        open_checkpoint(parts[1].rename(tmp_path / "m-00004-of-00003.gguf"))


# ---- what is not a file ----


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf: no such file"):
        open_checkpoint(tmp_path / "nowhere.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait forever
    with pytest.raises(ValueError, match=r"pipe\.gguf: not a regular file"):
        open_checkpoint(tmp_path / "pipe.gguf")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors: name the folder that holds it"):
        open_checkpoint(tmp_path / "model.safetensors")


# ---- safetensors folders ----

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 64,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": torch.ones(4), "b": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(5)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "/etc/passwd",
        "/elsewhere/one.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "C:one.safetensors",
        "..",
        "",
        "one.safetensors\0",
        "one.bin",
        7,
        None,
        ["one.safetensors"],
    ],
)
def test_index_that_names_files_elsewhere(sharded: Path, shard: Any) -> None:
    (sharded / "sub").mkdir()
    (sharded / "sub" / "one.safetensors").write_bytes((sharded / "one.safetensors").read_bytes())
    write_index(sharded, {"a": shard})
    with pytest.raises(ValueError, match=rf"{INDEX}: weight_map: 'a': got .*, accepted: the name"):
        open_checkpoint(sharded)


def remove_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()


def dangling_link(folder: Path) -> None:
    remove_shard(folder)
    (folder / "two.safetensors").symlink_to(folder.parent / "nowhere" / "two.safetensors")


def pipe(folder: Path) -> None:
    remove_shard(folder)
    os.mkfifo(folder / "two.safetensors")


@pytest.mark.parametrize("damage", [remove_shard, dangling_link, pipe])
def test_shard_that_is_not_there(sharded: Path, damage: Callable[[Path], None]) -> None:
    damage(sharded)
    with pytest.raises(ValueError, match=rf"{INDEX}: weight_map: two\.safetensors: no such file"):
        open_checkpoint(sharded)


def test_index_that_does_not_match_its_shards(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "d": "two.safetensors"})
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'd' is missing"):
        open_checkpoint(sharded)
    save_file({"a": torch.ones(4), "c": torch.ones(5)}, sharded / "two.safetensors")
    write_index(sharded, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'a' is here, and also in"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 1_000_000, "nested too deeply"),
        ('{"weight_map":' * 1_000_000, "nested too deeply"),
        (
            '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
            "not valid JSON: duplicate key 'a'",
        ),
        ('{"weight_map": ' + "1" * 10_000 + "}", "not valid JSON"),
        ("{}", "weight_map: must be an object"),
        ('{"weight_map": {}}', "weight_map: must be an object"),
        ('{"weight_map": []}', "weight_map: must be an object"),
        ("\ud800", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:24].encode("ascii", "replace").decode(),
)
def test_corrupt_index(sharded: Path, text: str, message: str) -> None:
    (sharded / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"{INDEX}: {message}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_a_bomb(sharded: Path, name: str) -> None:
    with (sharded / name).open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no space
    with pytest.raises(
        ValueError, match=rf"{name}: {1 << 40} bytes, more than the {MAX_JSON_BYTES}"
    ):
        open_checkpoint(sharded)


def safetensors_bytes(header: Any, data: bytes, claimed: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data


def entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        safetensors_bytes({}, b"", claimed=HUGE),
        safetensors_bytes({}, b"", claimed=1 << 40),
        safetensors_bytes(b"[" * 100_000, b""),
        safetensors_bytes(b"\xff", b""),
        safetensors_bytes({"a": entry([2], 0, 8)}, bytes(4)),
        safetensors_bytes({"a": entry([2], 0, 8)}, bytes(12)),
        safetensors_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        safetensors_bytes({"a": entry([1 << 62, 4], 0, 8)}, bytes(8)),
        safetensors_bytes({"a": entry([-2], 0, 8)}, bytes(8)),
        safetensors_bytes({"a": entry([3], 0, 8)}, bytes(8)),
        safetensors_bytes({"a": entry([2], 8, 0)}, bytes(8)),
        safetensors_bytes({"a": entry([2], 0, 8, "F99")}, bytes(8)),
    ],
    ids=range(14),
)
def test_corrupt_safetensors(sharded: Path, data: bytes) -> None:
    (sharded / "one.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"one\.safetensors: "):
        open_checkpoint(sharded)


def test_safetensors_with_any_bytes_changed_never_crashes(sharded: Path) -> None:
    whole = (sharded / "one.safetensors").read_bytes()
    load_everything(sharded)
    change = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

    @settings(
        max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.lists(change, min_size=1, max_size=4))
    def mutate(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for position, value in changes:
            data[position] = value
        (sharded / "one.safetensors").write_bytes(data)
        try:
            load_everything(sharded)
        except ACCEPTED_ERRORS as error:
            assert "one.safetensors" in str(error)

    mutate()


def test_safetensors_type_that_is_not_a_float(sharded: Path) -> None:
    save_file({"c": torch.ones(5, dtype=torch.int8)}, sharded / "two.safetensors")
    with pytest.raises(NotImplementedError, match=r"two\.safetensors: tensor 'c': type I8 is not"):
        open_checkpoint(sharded)


def test_safetensors_values_that_do_not_fit(sharded: Path) -> None:
    save_file({"c": torch.tensor([1.0, float("nan")])}, sharded / "two.safetensors")
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.load("a", torch.bfloat16).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor 'c' \(F32\) has values"):
        checkpoint.load("c", torch.bfloat16)


# ---- memory ----


def test_hostile_headers_allocate_next_to_nothing(tmp_path: Path) -> None:
    """Every case again, in a process whose address space may grow by 64 MiB only."""
    paths = []
    for i, (raw, _) in enumerate(HOSTILE_GGUF.values()):
        paths.append(str(raw.write(tmp_path / f"{i}.gguf")))
    # Counts that are honest, in a sparse file of a terabyte.
    values = {
        "bytes": raw_pair("k", ARRAY, array(I8, 1 << 36)),
        "bytes within the header": raw_pair("k", ARRAY, array(I8, 1 << 24)),
        "strings": raw_pair("k", ARRAY, array(STRING, 1 << 36)),
        "string": raw_pair("k", STRING, u64(1 << 39)),
    }
    for name, value in values.items():
        path = RawGGUF(pairs=[value]).write(tmp_path / f"{name}.gguf")
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        paths.append(str(path))
    script = """
import json, resource, sys
from pathlib import Path
from minitron_kernels.loaders.gguf_file import GGUFFile
import gguf
paths = json.load(sys.stdin)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for path in paths:  # the mapping of the file counts as address space too
    limit = used + (64 << 20) + Path(path).stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        GGUFFile(path)
    except ValueError:
        continue
    raise SystemExit(f"{path} was accepted")
"""
    subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(paths), text=True, check=True, timeout=120
    )

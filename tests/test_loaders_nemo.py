"""NeMo archives: each form gives the Hugging Face model's weights; hostile ones are refused."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata

from minitron_kernels import AutoTokenizer, MinitronForCausalLM
from minitron_kernels.cli import main
from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders import nemo, nemo_weights
from minitron_kernels.loaders.checkpoint import open_checkpoint
from minitron_kernels.loaders.nemo import NemoCheckpoint
from tests.nemo_files import (
    nemo_config,
    nemo_parts,
    saved,
    stack_layers,
    to_megatron,
    tokenizer_files,
    write_tar,
    zarr_files,
)
from tests.tiny_checkpoint import write_tiny_checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "gqa2": {},
    "gqa4-hd32": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32},
    "one-kv-head-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "kind": "llama"},
}


@dataclass
class Model:
    folder: Path  # the Hugging Face form
    config: dict[str, Any]
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(make_hf_model: Callable[..., tuple[Any, Path]]) -> Callable[..., Model]:
    made: dict[str, Model] = {}

    def get(shape: str = "gqa2", **more: Any) -> Model:
        key = f"{shape} {more}"
        if key not in made:
            sizes = {"vocab_size": 332, **SHAPES[shape], **more}
            model, folder = make_hf_model(**sizes)
            config = json.loads((folder / "config.json").read_text())
            made[key] = Model(folder, config, dict(model.state_dict()))
        return made[key]

    return get


@pytest.fixture
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The temporary folder is empty afterwards."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def logits(path: Path, **options: Any) -> torch.Tensor:
    model = MinitronForCausalLM.from_pretrained(path, **options)
    ids = torch.arange(24).reshape(2, 12) * 7 % model.config.vocab_size
    return model.logits(ids)


def files_of(form: str, model: Model) -> dict[str, bytes]:
    if form == "single":
        return nemo_parts(model.state, model.config)
    if form == "two ranks":
        return nemo_parts(model.state, model.config, ranks=2)
    config = nemo_config(model.config)
    files = {"model_config.yaml": yaml.safe_dump(config).encode()}
    arrays = stack_layers(to_megatron(model.state, config))
    if form == "zarr":
        return files | zarr_files(arrays)
    if form == "zarr of two ranks":
        return files | zarr_files(arrays, ranks=2)
    assert form == "torch.distributed"
    return files | distributed_files(arrays)


def distributed_files(arrays: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """model_weights/ as torch.distributed.checkpoint writes it, a piece per layer."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            save(arrays, storage_writer=FileSystemWriter(folder), no_dist=True)
        return {f"model_weights/{p.name}": p.read_bytes() for p in Path(folder).iterdir()}


# ---- equal to the Hugging Face form


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["single", "two ranks"])
def test_logits_equal_the_hugging_face_form(
    form: str, shape: str, models: Callable[..., Model], tmp_path: Path
) -> None:
    """Bit for bit, from the tar and from the folder that it unpacks to."""
    model = models(shape)
    if form == "two ranks" and model.config["num_key_value_heads"] == 1:
        path = write_tar(tmp_path / "model.nemo", files_of(form, model))
        with pytest.raises(NotImplementedError, match="KV group"):
            open_checkpoint(path)
        return
    expected = logits(model.folder)
    path = write_tar(tmp_path / "model.nemo", files_of(form, model))
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, NemoCheckpoint)
    for name, weight in model.state.items():
        if name in checkpoint.tensors:
            assert torch.equal(checkpoint.load(name, torch.float32), weight), name
    assert set(checkpoint.tensors) == set(checkpoint.config.weight_shapes())
    assert torch.equal(logits(path), expected)
    with tarfile.open(path) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4 on
            archive.extraction_filter = staticmethod(tarfile.data_filter)
        archive.extractall(tmp_path / "folder")
    assert torch.equal(logits(tmp_path / "folder"), expected)


def test_indices_that_python_3_11_0_wrote() -> None:
    """It pickles a member of an enumeration as getattr(class, name)."""

    class Member:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (Metadata, "planner_data")

    index = pickle.dumps(Metadata({}, Member()))
    assert b"getattr" in index
    assert "planner_data" in nemo_weights._read_records(index, "an index").state


@pytest.mark.parametrize("form", ["zarr", "zarr of two ranks", "torch.distributed"])
def test_sharded_forms(form: str, models: Callable[..., Model], tmp_path: Path) -> None:
    model = models()
    path = write_tar(tmp_path / "model.nemo", files_of(form, model))
    assert torch.equal(logits(path), logits(model.folder))


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("form", ["single", "two ranks", "zarr", "torch.distributed"])
def test_compressed(form: str, models: Callable[..., Model], tmp_path: Path) -> None:
    """Unpacked to a temporary folder, which is gone before the weights are read."""
    model = models()
    path = write_tar(tmp_path / "model.nemo", files_of(form, model), "w:gz")
    assert torch.equal(logits(path), logits(model.folder))


def test_bfloat16_weights_and_names_of_half_precision(
    models: Callable[..., Model], tmp_path: Path
) -> None:
    """Stored as bfloat16 under "model.module.", norms apart as without Transformer Engine."""
    model = models()
    config = nemo_config(model.config, megatron_amp_O2=True)
    state = {
        f"module.{name}".replace(
            "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        ).replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"): w.bfloat16()
        for name, w in to_megatron(model.state, config).items()
    }
    files = {
        "model_config.yaml": yaml.safe_dump(config).encode(),
        "model_weights.ckpt": saved(state),
    }
    path = write_tar(tmp_path / "model.nemo", files)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.dtype == "bfloat16"
    assert {info.type for info in checkpoint.tensors.values()} == {"BF16"}
    for name, weight in model.state.items():
        assert torch.equal(checkpoint.load(name, torch.bfloat16), weight.bfloat16())
        assert torch.equal(checkpoint.load(name, torch.float32), weight.bfloat16().float())


def test_weights_are_views_of_the_tar(models: Callable[..., Model], tmp_path: Path) -> None:
    """Q, K and V are copies of the rows that lie apart; nothing else takes memory."""
    model = models()
    path = write_tar(tmp_path / "model.nemo", files_of("single", model))
    checkpoint = open_checkpoint(path)
    copied = 0
    for name, info in checkpoint.tensors.items():
        first, second = (checkpoint.load(name, torch.float32) for _ in range(2))
        if first.data_ptr() != second.data_ptr():
            assert ".self_attn." in name and "o_proj" not in name
            copied += info.numel * 4
    assert copied == checkpoint.ram_needed(torch.float32)
    assert checkpoint.ram_needed(torch.bfloat16) == 2 * checkpoint.config.num_parameters
    embedding = checkpoint.load("model.embed_tokens.weight", torch.float32)
    before = path.read_bytes()
    embedding.zero_()  # in memory only
    assert path.read_bytes() == before


@pytest.mark.parametrize("fault", ["a KV group's K and V exchanged", "gate and up exchanged"])
def test_a_planted_fault_is_seen(
    fault: str, models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("gqa4-hd32")
    path = write_tar(tmp_path / "model.nemo", files_of("single", model))
    parts = dict(nemo._LAYER_PARTS)
    a, b = (
        ("self_attn.k_proj", "self_attn.v_proj")
        if "KV" in fault
        else ("mlp.gate_proj", "mlp.up_proj")
    )
    parts[a], parts[b] = parts[b], parts[a]
    monkeypatch.setattr(nemo, "_LAYER_PARTS", parts)
    assert not torch.equal(logits(path), logits(model.folder))


def test_qkv_rows_that_ignore_the_groups_are_seen(
    models: Callable[..., Model], tmp_path: Path
) -> None:
    """All of Q, then K, then V is another model: a file that has the rows so gives other logits."""
    model = models("gqa4-hd32")
    config = nemo_config(model.config)
    state = to_megatron(model.state, config)
    for i in range(config["num_layers"]):
        old = f"model.layers.{i}.self_attn."
        state[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = torch.cat(
            [model.state[f"{old}{x}_proj.weight"] for x in "qkv"]
        )
    files = files_of("single", model) | {"model_weights.ckpt": saved(state)}
    path = write_tar(tmp_path / "model.nemo", files)
    assert not torch.equal(logits(path), logits(model.folder))


# ---- the tokenizer and the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the tiny checkpoint with its tokenizer, the same as a .nemo file)."""
    from safetensors.torch import load_file

    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    config = json.loads((folder / "config.json").read_text())
    files = nemo_parts(load_file(folder / "model.safetensors"), config)
    path = folder.parent / "tiny.nemo"
    return folder, write_tar(path, files | tokenizer_files(folder))


@pytest.mark.usefixtures("nothing_is_left")
def test_tokenizer(tiny: tuple[Path, Path]) -> None:
    folder, path = tiny
    ours, theirs = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(folder)
    text = "Hello, <|user|> Grüße"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.source == f"{path}: 0a1b2c3d_tokenizer.json"
    config = open_checkpoint(path).config
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))


@pytest.mark.usefixtures("nothing_is_left")
def test_tekken_under_sentencepieces_name(models: Callable[..., Model], tmp_path: Path) -> None:
    tekken = {
        "config": {
            "pattern": ".",
            "default_vocab_size": 276,
            "default_num_special_tokens": 20,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)
        ],
    }
    files = files_of("single", models())
    path = write_tar(
        tmp_path / "a.nemo", files | {"f00_tokenizer.model": json.dumps(tekken).encode()}
    )
    assert AutoTokenizer.from_pretrained(path).encode("A") == [1, 20 + 65]
    path = write_tar(tmp_path / "b.nemo", files | {"f00_tokenizer.model": b"\x0a\x0e"})
    with pytest.raises(NotImplementedError, match="SentencePiece"):
        AutoTokenizer.from_pretrained(path)
    path = write_tar(tmp_path / "c.nemo", files)
    with pytest.raises(FileNotFoundError, match="names 'mistralai/Mistral-Nemo-Base-2407'"):
        AutoTokenizer.from_pretrained(path)


def test_command_line(
    tiny: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, path = (str(each) for each in tiny)

    def run(*args: str) -> dict[str, Any]:
        assert main([*args, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    options = ["--max-new-tokens", "6"]
    ours, theirs = (run("generate", "Hi", "--model", m, *options) for m in (path, folder))
    assert ours["token_ids"] == theirs["token_ids"]
    ours, theirs = (run("score", "--text", "Hello", "--model", m) for m in (path, folder))
    assert ours == theirs
    info = run("info", path)["model"]
    assert info["tensor_types"] == {"F32": {"count": 21, "bytes": 4 * info["parameters"]}}
    out = [str(tmp_path / name) for name in ("a.gguf", "b.gguf")]
    for source, target in zip((path, folder), out, strict=True):
        run("quantize", source, target, "--type", "Q8_0")
    ours, theirs = (run("score", "--text", "Hello", "--model", m) for m in out)
    assert ours == theirs


# ---- the config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"normalization": "layernorm1p"}, "normalization 'layernorm1p' is not supported"),
        ({"normalization": None}, "normalization 'layernorm' is not supported"),
        ({"activation": "squared-relu"}, "activation 'squared-relu' is not supported"),
        ({"bias": True}, "bias True is not supported"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"rotary_percentage": 0.5}, "rotary_percentage 0.5 is not supported"),
        ({"num_moe_experts": 8}, "num_moe_experts 8 is not supported"),
        ({"scale_positional_embedding": True}, "scale_positional_embedding True"),
        ({"num_layers": "${x}"}, "field 'num_layers' must be an integer, got '\\${x}'"),
        ({"num_layers": None}, "field 'num_layers' is missing"),
        ({"num_layers": 4}, "tensor decoder.layers.3.* is missing"),
        ({"num_query_groups": 3}, "must be a multiple of num_key_value_heads"),
        ({"num_query_groups": 4}, "linear_qkv.weight has shape .* the config asks for"),
        ({"ffn_hidden_size": 161}, "linear_fc1.weight has shape"),
        ({"hidden_size": 97}, "word_embeddings.weight has shape"),
        ({"layernorm_epsilon": "small"}, "'layernorm_epsilon' must be a number"),
        ({"window_size": [4, 4]}, "window_size must be"),
        ({"tensor_model_parallel_size": 2}, None),  # of the run; the file holds the whole model
    ],
)
def test_config_is_checked(
    change: dict[str, Any], problem: str | None, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models()
    files = files_of("single", model)
    files["model_config.yaml"] = yaml.safe_dump(nemo_config(model.config) | change).encode()
    path = write_tar(tmp_path / "model.nemo", files)
    if problem is None:
        open_checkpoint(path)
        return
    with pytest.raises((ValueError, NotImplementedError), match=problem):
        open_checkpoint(path)


def test_config_fields() -> None:
    hf = {
        **dict.fromkeys(("num_hidden_layers", "num_key_value_heads"), 2),
        **dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 64),
        "num_attention_heads": 4,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    data = nemo_config(
        hf, window_size=[99, 0], seq_len_interpolation_factor=4, layernorm_epsilon="1e-6"
    )
    config = ModelConfig.from_nemo(data, vocab_size=8, dtype="bfloat16")
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (16, 1e6, 1e-6)
    assert config.sliding_window == 100
    assert config.rope_factors == (4.0,) * 8
    del data["share_embeddings_and_output_weights"]  # NeMo's default
    assert ModelConfig.from_nemo(data, vocab_size=8, dtype="bfloat16").tie_word_embeddings


# ---- damaged and hostile archives


class _Code:
    """A pickle of it makes a folder when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "executed"),)


def with_entry(files: dict[str, bytes], entry: tarfile.TarInfo, data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def torch_file(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rezip(data: bytes, change: Callable[[str, bytes], bytes], method: int = 0) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def hostile(model: Model) -> dict[str, tuple[bytes, str]]:
    """Archives, and what is said of each."""
    files = files_of("single", model)
    weights = files["model_weights.ckpt"]
    plain = with_entry(files, entry("./end"))

    def tar_of(**changed: bytes) -> bytes:
        return with_entry(files | {"model_weights.ckpt": changed["weights"]}, entry("./end"))

    config = {"model_config.yaml": files["model_config.yaml"]}
    state = to_megatron(model.state, nemo_config(model.config))
    first = next(iter(state))
    sharded = files_of("torch.distributed", model)
    zarr = files_of("zarr", model)
    header = next(n for n in zarr if n.endswith("fc2.weight/.zarray"))
    bomb = gzip.compress(with_entry(config, entry("./model_weights.ckpt"), bytes(1 << 26)))
    long_name = entry("./x", tarfile.GNUTYPE_LONGNAME)
    outside = "leads outside"
    return {
        "traversal": (with_entry(files, entry("../evil"), b"x"), outside),
        "inner traversal": (with_entry(files, entry("./a/../../evil"), b"x"), outside),
        "absolute": (with_entry(files, entry("/evil"), b"x"), outside),
        "backslash": (with_entry(files, entry("..\\evil"), b"x"), outside),
        "symlink": (with_entry(files, entry("./l", tarfile.SYMTYPE, "/etc/passwd")), "no plain"),
        "hard link": (with_entry(files, entry("./l", tarfile.LNKTYPE, "/etc/passwd")), "no plain"),
        "device": (with_entry(files, entry("./d", tarfile.CHRTYPE)), "no plain file"),
        "fifo": (with_entry(files, entry("./f", tarfile.FIFOTYPE)), "no plain file"),
        "twice": (with_entry(files, entry("./model_weights.ckpt"), b"x"), "is there twice"),
        "long name": (with_entry(files, long_name, bytes(1 << 25)), "a tar header of"),
        "gzip bomb": (bomb, "larger than|truncated"),
        "gzip of garbage": (gzip.compress(b"no tar" * 999), "not a tar"),
        "half a gzip": (gzip.compress(plain)[:-2000], "damaged gzip|truncated"),
        "damaged gzip": (gzip.compress(plain)[:3000] + bytes(3000), "damaged gzip"),
        "half a tar": (plain[: len(plain) // 2], "truncated"),
        "no tar": (b"hello" * 1000, "not a tar"),
        "empty": (b"", "not a tar"),
        "no config": (with_entry({"model_weights.ckpt": weights}, entry("./e")), "is missing"),
        "no weights": (with_entry(config, entry("./e")), "has no weights"),
        "config no mapping": (
            with_entry(files | {"model_config.yaml": b"- 1"}, entry("./e")),
            "must hold a mapping",
        ),
        "config no YAML": (
            with_entry(files | {"model_config.yaml": b"a: [" * 999}, entry("./e")),
            "not valid YAML",
        ),
        "config with code": (
            with_entry(
                files | {"model_config.yaml": b"a: !!python/object/apply:os.mkdir [executed]"},
                entry("./e"),
            ),
            "not valid YAML",
        ),
        "config too large": (
            with_entry(files | {"model_config.yaml": b"#" * (1 << 21)}, entry("./e")),
            "more than the",
        ),
        "pickle with code": (tar_of(weights=torch_file({"a": _Code()})), "running code"),
        "plain pickle": (tar_of(weights=pickle.dumps(_Code())), "not a file of torch.save"),
        "weights are a list": (tar_of(weights=torch_file([1])), "must hold a dict"),
        "half the weights": (tar_of(weights=weights[: len(weights) // 2]), "truncated"),
        "compressed zip": (
            tar_of(weights=rezip(weights, lambda n, d: d, zipfile.ZIP_DEFLATED)),
            "is compressed",
        ),
        "big endian": (
            tar_of(weights=rezip(weights, lambda n, d: b"big" if n.endswith("byteorder") else d)),
            "not little endian",
        ),
        "storage cut": (
            tar_of(weights=rezip(weights, lambda n, d: d[:4] if "/data/" in n else d)),
            "lies outside|running code|not finite|beyond",
        ),
        "tensor missing": (
            tar_of(weights=saved({k: v for k, v in state.items() if k != first})),
            "is missing or not a matrix",
        ),
        "wrong shape": (
            tar_of(weights=saved(state | {"decoder.final_layernorm.weight": torch.ones(7)})),
            r"final_layernorm.weight has shape \[7\], the config asks for \[96\]",
        ),
        "integers": (
            tar_of(
                weights=saved(
                    state | {"decoder.final_layernorm.weight": torch.ones(96, dtype=torch.int32)}
                )
            ),
            "is torch.int32",
        ),
        "a rank missing": (
            with_entry(
                {
                    k: v
                    for k, v in files_of("two ranks", model).items()
                    if not k.startswith("mp_rank_00")
                },
                entry("./e"),
            ),
            "has ranks 1",
        ),
        "pipeline ranks": (
            with_entry(
                config | {"tp_rank_00_pp_rank_000/model_weights.ckpt": weights}, entry("./e")
            ),
            "pipeline-parallel",
        ),
        "index with code": (
            with_entry(sharded | {"model_weights/.metadata": pickle.dumps(_Code())}, entry("./e")),
            "names (os|posix|nt).mkdir",
        ),
        "index is no index": (
            with_entry(sharded | {"model_weights/.metadata": b"\x80\x04]."}, entry("./e")),
            "not the index",
        ),
        "index damaged": (
            with_entry(
                sharded | {"model_weights/.metadata": sharded["model_weights/.metadata"][:-99]},
                entry("./e"),
            ),
            "damaged",
        ),
        "piece is garbage": (
            with_entry(
                sharded
                | {"model_weights/__0_0.distcp": b"x" * len(sharded["model_weights/__0_0.distcp"])},
                entry("./e"),
            ),
            "not a file of torch.save",
        ),
        "zarr compressed": (
            with_entry(
                zarr
                | {
                    header: zarr[header].replace(
                        b'"compressor": null', b'"compressor": {"id": "blosc"}'
                    )
                },
                entry("./e"),
            ),
            "compressed arrays",
        ),
        "zarr header": (with_entry(zarr | {header: b"{"}, entry("./e")), "not a zarr header"),
        "zarr chunk missing": (
            with_entry(
                {k: v for k, v in zarr.items() if k != header.replace(".zarray", "1.0.0")},
                entry("./e"),
            ),
            "1.0.0 is missing",
        ),
        "zarr chunk cut": (
            with_entry(zarr | {header.replace(".zarray", "1.0.0"): b"1234"}, entry("./e")),
            "has 4 bytes",
        ),
    }


HOSTILE = (
    *("traversal", "inner traversal", "absolute", "backslash", "symlink", "hard link", "device"),
    *("fifo", "twice", "long name", "gzip bomb", "gzip of garbage", "half a gzip"),
    *("damaged gzip", "half a tar", "no tar", "empty", "no config", "no weights"),
    *("config no mapping", "config no YAML", "config with code", "config too large"),
    *("pickle with code", "plain pickle", "weights are a list", "half the weights"),
    *("compressed zip", "big endian", "storage cut", "tensor missing", "wrong shape", "integers"),
    *("a rank missing", "pipeline ranks", "index with code", "index is no index"),
    *("index damaged", "piece is garbage", "zarr compressed", "zarr header"),
    *("zarr chunk missing", "zarr chunk cut"),
)


@pytest.fixture(scope="module")
def archives(models: Callable[..., Model]) -> dict[str, tuple[bytes, str]]:
    made = hostile(models())
    assert set(made) == set(HOSTILE)
    return made


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "gz"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive(
    case: str,
    compressed: bool,
    archives: dict[str, tuple[bytes, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line that says what is wrong, and no file anywhere: not here, above, or in TMPDIR."""
    data, problem = archives[case]
    if compressed and data[:2] == b"\x1f\x8b":
        pytest.skip("is compressed as it is")
    work = tmp_path / "work"
    work.mkdir()
    (work / "model.nemo").write_bytes(gzip.compress(data, 1) if compressed else data)
    monkeypatch.chdir(work)
    with pytest.raises((ValueError, NotImplementedError), match=problem):
        open_checkpoint(Path("model.nemo"))
    assert [p.name for p in work.iterdir()] == ["model.nemo"]
    assert {p.name for p in tmp_path.iterdir()} == {"work", "tmp"}
    assert main(["info", "model.nemo"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: model.nemo")


def test_bombs_are_not_unpacked(models: Callable[..., Model], tmp_path: Path) -> None:
    """Of 256 MiB of zeros in 256 KiB nothing is written: the header tells enough."""
    import tracemalloc

    member = tarfile.TarInfo("./model_weights.ckpt")
    member.size = 1 << 28
    path = tmp_path / "model.nemo"
    with gzip.open(path, "wb", 1) as out:
        out.write(member.tobuf())
        for _ in range(256):
            out.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 21
    with pytest.raises(ValueError, match="larger than"):
        open_checkpoint(path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="larger than"):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_told_beforehand(
    models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "model.nemo", files_of("single", models()), "w:gz")
    monkeypatch.setattr(shutil, "disk_usage", lambda where: shutil._ntuple_diskusage(9, 9, 9))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"bytes of disk in .* \(TMPDIR\), 9 are free"):
        open_checkpoint(path)


def test_any_cut_of_an_archive_is_an_error(models: Callable[..., Model], tmp_path: Path) -> None:
    """Whatever is missing at the end: a ValueError, never wrong weights."""
    data = write_tar(tmp_path / "whole", files_of("two ranks", models())).read_bytes()
    end = data.rstrip(b"\0")
    for keep in np.linspace(0, len(end) - 1, 40).astype(int):
        path = tmp_path / "model.nemo"
        path.write_bytes(data[:keep])
        with pytest.raises((ValueError, OSError)):
            open_checkpoint(path)


@pytest.mark.parametrize("form", ["single", "zarr", "torch.distributed"])
def test_changed_bytes_never_crash(
    form: str, models: Callable[..., Model], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Most often in headers and pickles: other weights, or an error that names the file."""
    data = write_tar(tmp_path / "whole", files_of(form, models())).read_bytes()
    path = tmp_path / "model.nemo"
    generator = random.Random(form)
    refused = 0
    for _ in range(120):
        changed = bytearray(data)
        for _ in range(generator.choice([1, 1, 3, 20])):
            start, end = generator.choice(
                [(0, 6000), (len(data) - 40000, len(data)), (0, len(data))]
            )
            changed[generator.randrange(start, end)] = generator.choice(
                [0, 255, generator.randrange(256)]
            )
        path.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.tensors:
                checkpoint.load(name, torch.float32)
        except (ValueError, NotImplementedError) as error:
            assert str(error).startswith(str(path)), error
            refused += 1
    assert refused > 15


def test_missing_file(tmp_path: Path) -> None:
    for source in (tmp_path / "no.nemo", "no.nemo"):
        with pytest.raises(FileNotFoundError, match=r"no\.nemo: no such file"):
            MinitronForCausalLM.from_pretrained(source)

"""NeMo archives of random models: the weights of a Hugging Face model under Megatron's names."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

Tensor = torch.Tensor


def nemo_config(hf: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """model_config.yaml of a config.json, with fields as NeMo writes them."""
    rope = hf.get("rope_parameters") or {}
    return {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "mcore_gpt": True,
        "precision": "bf16-mixed",
        "encoder_seq_length": hf["max_position_embeddings"],
        "max_position_embeddings": hf["max_position_embeddings"],
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "kv_channels": hf["head_dim"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "bias": False,
        "position_embedding_type": "rope",
        "rotary_base": rope.get("rope_theta", hf.get("rope_theta", 1e4)),
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"],
        "tokenizer": {"library": "huggingface", "type": "mistralai/Mistral-Nemo-Base-2407"},
    } | changes


def to_megatron(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Head by head and row by row: nothing here is how the loader takes them apart."""
    d, groups = config["kv_channels"], config["num_query_groups"]
    queries = config["num_attention_heads"] // groups
    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not config["share_embeddings_and_output_weights"]:
        out["output_layer.weight"] = state["lm_head.weight"]
    for i in range(config["num_layers"]):
        old, new = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (state[f"{old}self_attn.{x}_proj.weight"] for x in "qkv")
        rows = []
        for g in range(groups):
            heads = range(g * queries, (g + 1) * queries)
            rows += [q[h * d : (h + 1) * d] for h in heads]
            rows += [k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
        gate, up = (state[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        out |= {
            f"{new}self_attention.linear_qkv.layer_norm_weight": state[
                f"{old}input_layernorm.weight"
            ],
            f"{new}self_attention.linear_qkv.weight": torch.cat(rows),
            f"{new}self_attention.linear_proj.weight": state[f"{old}self_attn.o_proj.weight"],
            f"{new}mlp.linear_fc1.layer_norm_weight": state[
                f"{old}post_attention_layernorm.weight"
            ],
            f"{new}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{new}mlp.linear_fc2.weight": state[f"{old}mlp.down_proj.weight"],
        }
    return {name: tensor.detach().clone() for name, tensor in out.items()}


def split(state: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """What each tensor-parallel rank saves."""
    out: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        for rank, own in enumerate(out):
            if "layer_norm" in name or "layernorm" in name:
                own[name] = tensor
            elif "linear_proj" in name or "linear_fc2" in name:
                own[name] = tensor.chunk(ranks, 1)[rank].clone()
            elif "linear_fc1" in name:
                halves = tensor.chunk(2)
                own[name] = torch.cat([half.chunk(ranks)[rank] for half in halves])
            else:
                own[name] = tensor.chunk(ranks)[rank].clone()
    return out


def saved(state: Mapping[str, Any]) -> bytes:
    """model_weights.ckpt: names as NeMo's, and the state of Transformer Engine among them."""
    named: dict[str, Any] = {f"model.{name}": tensor for name, tensor in state.items()}
    named["model.decoder.layers.0.self_attention.core_attention._extra_state"] = io.BytesIO(b"x")
    named["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = None
    buffer = io.BytesIO()
    torch.save(named, buffer)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    """A tar as NeMo makes it, of a folder: its members are "./name"."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.addfile(directory("./"))
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def directory(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    return entry


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer of a checkpoint folder, under names that NeMo gives: with a hash."""
    return {
        f"0a1b2c3d_{name}": (folder / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
        if (folder / name).is_file()
    }


def nemo_parts(
    state: Mapping[str, Tensor], hf_config: Mapping[str, Any], ranks: int = 1, **changes: Any
) -> dict[str, bytes]:
    """The files of an archive: config, and the weights of one rank or of several."""
    config = nemo_config(hf_config, tensor_model_parallel_size=ranks, **changes)
    megatron = to_megatron(state, config)
    files = {"model_config.yaml": yaml.safe_dump(config).encode()}
    if ranks == 1:
        return files | {"model_weights.ckpt": saved(megatron)}
    return files | {
        f"mp_rank_{rank:02d}/model_weights.ckpt": saved(own)
        for rank, own in enumerate(split(megatron, ranks))
    }


def stack_layers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint: those of all layers as one."""
    stacked: dict[str, list[Tensor]] = {}
    out = {}
    for name, tensor in state.items():
        if name.startswith("decoder.layers."):
            rest = name.split(".", 3)[3]
            stacked.setdefault(f"model.decoder.layers.{rest}", []).append(tensor)
        else:
            out[f"model.{name}"] = tensor
    return out | {name: torch.stack(each) for name, each in stacked.items()}


def zarr_files(arrays: Mapping[str, Tensor], ranks: int = 1) -> dict[str, bytes]:
    """model_weights/ in zarr's form, matrices in ``ranks`` chunks of rows."""
    kinds = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}
    files = {}
    for name, tensor in arrays.items():
        stacked = name.startswith("model.decoder.layers.")
        chunks = list(tensor.shape)
        if stacked:
            chunks[0] = 1
        if tensor.ndim == 2 + stacked:
            chunks[-2] //= ranks
        files[f"model_weights/{name}/.zarray"] = json.dumps(
            {
                "zarr_format": 2,
                "shape": list(tensor.shape),
                "chunks": chunks,
                "dtype": kinds[tensor.dtype],
                "compressor": None,
                "fill_value": None,
                "filters": None,
                "order": "C",
            }
        ).encode()
        grid = [s // c for s, c in zip(tensor.shape, chunks, strict=True)]
        for index in torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, len(grid)).tolist():
            block = tensor[
                tuple(slice(i * c, i * c + c) for i, c in zip(index, chunks, strict=True))
            ]
            key = ".".join(map(str, index))
            files[f"model_weights/{name}/{key}"] = (
                block.contiguous().view(torch.uint8).numpy().tobytes()
            )
    return files

"""GGUF files as transformers models with quantised matrices, against transformers' own load."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from minitron_kernels import MinitronForCausalLM
from minitron_kernels.integrations import transformers_attention
from minitron_kernels.integrations.transformers import QuantizedLinear, from_gguf, patch, unpatch
from minitron_kernels.quantized import QuantizedTensor
from tests.emulated_device import emulated
from tests.test_loaders_gguf import in_file_mapping
from tests.test_model_emulated import check_logits
from tests.test_model_quantized import LAYERS, UNIFORM, VOCAB, random_ids, write_model
from tests.transformers_models import compiled, ops_in

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        "mixed": write_model(folder / "mixed.gguf"),
        "tied": write_model(folder / "tied.gguf", UNIFORM, "Q4_K", None),
    }


def expanded(path: Path) -> Any:
    """What transformers makes of the file, fp32; a plain model, whose dtype may be changed."""
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    loaded.config.vocab_size = VOCAB
    plain = type(loaded)(loaded.config).eval()
    plain.load_state_dict(loaded.state_dict())
    return plain


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("name", ["mixed", "tied"])
@torch.no_grad()
def test_logits_and_tokens_equal_transformers(
    name: str, patched: bool, files: dict[str, Path]
) -> None:
    theirs, ids = expanded(files[name]), random_ids(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    stock = theirs(ids, attention_mask=mask).logits[mask.bool()]
    exact = copy.deepcopy(theirs).double()(ids, attention_mask=mask).logits[mask.bool()]
    model = from_gguf(files[name], dtype="float32", device="cpu", patched=patched)
    actual = model(ids, attention_mask=mask).logits[mask.bool()]
    limit = 2 * (stock.double() - exact).abs().max()
    assert (actual.double() - exact).abs().max() <= limit + 1.2e-7 * exact.abs().max()
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), theirs.generate(ids, **options))


@torch.no_grad()
def test_bfloat16(files: dict[str, Path]) -> None:
    model, ids = from_gguf(files["mixed"], device="cpu"), random_ids(2, 19)
    assert model.dtype == torch.bfloat16
    exact = expanded(files["mixed"]).double()(ids).logits
    stock = expanded(files["mixed"]).bfloat16()(ids).logits
    check_logits(model(ids).logits, stock, exact)


def test_matrices_stay_as_stored(files: dict[str, Path]) -> None:
    model = from_gguf(files["mixed"], device="cpu", dtype="float32")
    kinds = {n: m.weight.quant_type for n, m in model.named_modules() if _is_quantized(m)}
    layer = model.model.layers[0]
    assert isinstance(layer.mlp.down_proj, QuantizedLinear)
    stored = {k for layer in LAYERS for k in layer if k not in ("F16", "BF16", "F32")}
    assert set(kinds.values()) == stored | {"Q6_K", "Q5_0"}
    assert "Q5_K" in repr(layer.mlp.down_proj)
    for name, module in model.named_modules():
        if _is_quantized(module) and not name.endswith(("q_proj", "k_proj")):
            assert in_file_mapping(module.weight.blocks, files["mixed"]), name


def _is_quantized(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), QuantizedTensor)


def test_a_tied_table_is_one(files: dict[str, Path]) -> None:
    model = from_gguf(files["tied"], device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size


@torch.no_grad()
def test_state_dict_and_save(files: dict[str, Path], tmp_path: Path) -> None:
    model, ids = from_gguf(files["mixed"], device="cpu"), random_ids(1, 9)
    expected = model(ids).logits
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.1 * sum(p.nbytes for p in model.parameters()) + 100_000
    buffer.seek(0)
    state = torch.load(buffer)
    for p in model.parameters():
        (p.blocks if isinstance(p, QuantizedTensor) else p).zero_()
    assert not torch.equal(model(ids).logits, expected)
    model.load_state_dict(state)
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(NotImplementedError, match=r"the weights are GGUF blocks.*mixed.gguf"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_patch_and_unpatch(files: dict[str, Path]) -> None:
    model, ids = from_gguf(files["tied"], device="cpu", patched=False), random_ids(2, 9)
    before = model(ids).logits
    assert not patch(model).left
    assert not torch.equal(model(ids).logits, before)
    unpatch(model)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_compiles_whole(files: dict[str, Path]) -> None:
    model, ids = from_gguf(files["tied"], dtype="float32", device="cpu"), random_ids(2, 9)
    expected = model(ids).logits
    function, graphs = compiled(model)
    torch.testing.assert_close(function(ids).logits, expected)
    assert ops_in(graphs) >= {"attention", "linear_quant", "linear_swiglu_quant", "embedding_quant"}


@torch.no_grad()
def test_smollm2(smollm2_gguf: Path) -> None:
    """The real model: the thin model's tokens, which tests hold against transformers'."""
    prompt = torch.tensor([[28120, 253, 642, 281, 260, 2240]])
    expected = MinitronForCausalLM.from_pretrained(smollm2_gguf, dtype="float32", device="cpu")
    model = from_gguf(smollm2_gguf, dtype="float32", device="cpu")
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options), expected.generate(prompt, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype 'int8' is not supported"),
        ({"device": "tpu"}, ValueError, "device 'tpu'"),
        ({"path": "nothing.gguf"}, FileNotFoundError, "nothing.gguf"),
    ],
)
def test_bad_arguments(
    options: dict[str, Any], error: type[Exception], message: str, files: dict[str, Path]
) -> None:
    with pytest.raises(error, match=message):
        from_gguf(**{"path": files["tied"], **options})


@torch.no_grad()
def test_on_the_kernels(files: dict[str, Path], caplog: Any) -> None:
    """Packed for the CUDA kernels, which compute all of it."""
    ids = random_ids(1, 13)
    exact = expanded(files["tied"]).double()(ids).logits
    stock = expanded(files["tied"]).bfloat16()(ids).logits
    transformers_attention._log_once.cache_clear()
    with emulated("sm_80") as gpu, caplog.at_level(logging.WARNING, "minitron_kernels"):
        model = from_gguf(files["tied"], device=gpu.name)
        for buffer in model.buffers():
            buffer.data = buffer.to("cpu:0", copy=True)
        on_device = ids.to("cpu:0", copy=True)
        past = DynamicCache(config=model.config)
        parts = [
            model(part, past_key_values=past).logits for part in on_device.tensor_split([12], dim=1)
        ]
        actual = torch.cat(parts, dim=1).cpu()
    check_logits(actual, stock, exact)
    assert not [r for r in caplog.records if r.name.startswith("minitron_kernels")]

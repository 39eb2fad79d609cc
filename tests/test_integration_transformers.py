"""Patched transformers models against the same models as transformers computes them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    masking_utils,
)

from minitron_kernels.integrations import transformers_attention
from minitron_kernels.integrations.transformers import patch, register_attention, unpatch
from tests.emulated_device import emulated
from tests.test_model_emulated import check_logits as check_bf16_logits
from tests.tiny_checkpoint import write_tiny_checkpoint

Tensor = torch.Tensor
VOCAB = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
}


def random_model(kind: str = "mistral", seed: int = 0, **options: Any) -> Any:
    """fp32, with weights large enough for logits that tell tokens apart."""
    model_class, config_class = CLASSES[kind]
    extra = {"sliding_window": None} if kind == "mistral" else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**(SHAPE | extra | options))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.mul_(5)
    return model


@pytest.fixture(scope="module")
def models() -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def get(kind: str = "mistral", **options: Any) -> Any:
        key = kind, *sorted(options.items())
        if key not in made:
            made[key] = random_model(kind, **options)
        return made[key]

    return get


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    report = patch(model)
    assert not report.left, str(report)
    try:
        yield model
    finally:
        unpatch(model)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(ids: Tensor, side: str) -> Tensor:
    """An attention mask whose rows have 0, 3, 6, ... tokens of padding."""
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        if side == "left":
            mask[i, : 3 * i] = 0
        elif side == "right" and i:
            mask[i, -3 * i :] = 0
    return mask


def check(actual: Tensor, stock: Tensor, exact: Tensor, mask: Tensor | None = None) -> None:
    """DESIGN's rule: at most twice the error that transformers makes in the same dtype.

    Against its largest error, one unit of it being that of float32 at the largest logit.
    """
    if mask is not None:
        actual, stock, exact = (t[mask.bool()] for t in (actual, stock, exact))
    assert actual.isfinite().all()
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    limit = 2 * (stock.double() - exact).abs().max() + unit
    error = (actual.double() - exact).abs().max()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


@torch.no_grad()
def all_logits(model: Any, ids: Tensor, mask: Tensor | None, cache: str, chunks: int = 1) -> Tensor:
    """Logits [B, S, V], read in so many chunks."""
    past = None
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 7)
        for layer in past.layers:  # an emulated device has no part in .to(device)
            layer.cumulative_length = layer.cumulative_length.to(ids.device, copy=True)
    elif cache == "dynamic":
        past = DynamicCache(config=model.config)
    elif cache == "lazy":
        past = DynamicCache()
    logits, start = [], 0
    for part in ids.tensor_split(chunks, dim=1):
        end = start + part.shape[1]
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :end]}
        if past is not None:
            options["past_key_values"] = past
        if mask is not None:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        logits.append(model(part, use_cache=past is not None, **options).logits)
        start = end
    return torch.cat(logits, dim=1)


def in_double(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What `all_logits` gives in float64, from a copy."""
    return all_logits(copy.deepcopy(model).double(), *args, **kwargs)


# ---------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "lazy", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logits_equal_transformers(
    kind: str, cache: str, side: str, models: Any, caplog: Any
) -> None:
    model, ids = models(kind), random_ids(3, 23)
    mask = None if side == "none" else padding(ids, side)
    chunks = 1 if cache == "none" or side == "right" else 4
    stock = all_logits(model, ids, mask, cache, chunks)
    exact = in_double(model, ids, mask, "dynamic")
    transformers_attention._log_once.cache_clear()
    with patched(model), caplog.at_level(logging.WARNING, "minitron_kernels"):
        actual = all_logits(model, ids, mask, cache, chunks)
    check(actual, stock, exact, mask)
    assert not caplog.records, "nothing of this is left to transformers"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_padding(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3), "kv_heads")
    heads = kv_heads * draw(st.integers(1, 3), "group")
    model = random_model(
        draw(st.sampled_from(["llama", "mistral"]), "kind"),
        num_hidden_layers=1,
        hidden_size=heads * draw(st.integers(1, 12), "hidden / heads"),
        intermediate_size=draw(st.integers(1, 40), "intermediate"),
        num_key_value_heads=kv_heads,
        num_attention_heads=heads,
        head_dim=2 * draw(st.integers(1, 40), "head_dim / 2"),
        tie_word_embeddings=draw(st.booleans(), "tied"),
    )
    batch, length = draw(st.integers(1, 4), "batch"), draw(st.integers(1, 40), "length")
    ids = random_ids(batch, length)
    mask = torch.ones_like(ids)
    for i in range(batch):
        mask[i, : draw(st.integers(0, length - 1), "padding")] = 0
    chunks = draw(st.integers(1, length), "chunks")
    cache = draw(st.sampled_from(["dynamic", "lazy", "static"]), "cache")
    exact = in_double(model, ids, mask, "dynamic")
    stock = all_logits(model, ids, mask, cache, chunks)
    with patched(model):
        check(all_logits(model, ids, mask, cache, chunks), stock, exact, mask)


@pytest.mark.parametrize("fault", ["mask dropped", "no mask function", "window forgotten"])
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails for what silently goes wrong."""
    model = random_model("mistral", sliding_window=5 if fault == "window forgotten" else None)
    ids = random_ids(3, 23)
    mask = padding(ids, "left")
    stock, exact = all_logits(model, ids, mask, "none"), in_double(model, ids, mask, "none")
    with patched(model):
        check(all_logits(model, ids, mask, "none"), stock, exact, mask)
        if fault == "window forgotten":
            monkeypatch.setattr(model.config, "sliding_window", None)
        else:
            mapping = masking_utils.AttentionMaskInterface._global_mapping
            if fault == "mask dropped":
                monkeypatch.setitem(mapping, "minitron", lambda **kwargs: None)
            else:
                monkeypatch.delitem(mapping, "minitron")
        with pytest.raises(AssertionError, match="error"):
            check(all_logits(model, ids, mask, "none"), stock, exact, mask)


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_sliding_window(cache: str, side: str, models: Any, caplog: Any) -> None:
    """Mistral's; its caches keep the last tokens only."""
    model, ids = models("mistral", sliding_window=8), random_ids(2, 29)
    mask = padding(ids, side)
    chunks = 1 if cache == "none" else 6
    stock = all_logits(model, ids, mask, cache, chunks)
    exact = in_double(model, ids, mask, "none")
    transformers_attention._log_once.cache_clear()
    with patched(model), caplog.at_level(logging.WARNING, "minitron_kernels"):
        check(all_logits(model, ids, mask, cache, chunks), stock, exact, mask)
    assert not caplog.records


def test_a_window_is_mistrals_only() -> None:
    """Llama's class on a Mistral config that has one: transformers does not look at it."""
    model, ids = random_model("llama", sliding_window=5, use_cache=False), random_ids(2, 29)
    stock, exact = all_logits(model, ids, None, "none"), in_double(model, ids, None, "none")
    with patched(model):
        check(all_logits(model, ids, None, "none"), stock, exact)


@pytest.mark.parametrize("has_bf16_products", [True, False])
def test_bfloat16(has_bf16_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows and few, with PyTorch's products of many and with our own."""
    monkeypatch.setattr(
        "minitron_kernels.integrations.transformers._has_bf16_products", lambda: has_bf16_products
    )
    model, ids = random_model("mistral").bfloat16(), random_ids(3, 41)
    mask = padding(ids, "left")
    stock = all_logits(model, ids, mask, "dynamic", 5)
    exact = in_double(model, ids, mask, "none")
    products: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, w: Tensor, *args: Any) -> Tensor:
        products.append(x.shape[0])
        return linear(x, w, *args)

    with patched(model):
        with monkeypatch.context() as context:
            context.setattr(torch.nn.functional, "linear", counted)
            whole = all_logits(model, ids, mask, "none")
        assert len(products) == 1 + 2 * 7 * has_bf16_products  # the output matrix, and layers
        actual = all_logits(model, ids, mask, "dynamic", 5)
    for logits in (actual, whole):
        check_bf16_logits(logits[mask.bool()], stock[mask.bool()], exact[mask.bool()])


def test_scaled_rope_and_other_heads_of_a_model(models: Any) -> None:
    """Rotary tables are the model's own; the rest of the model may be anything."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, ids = random_model("llama", rope_parameters=rope), random_ids(2, 19)
    stock, exact = all_logits(model, ids, None, "none"), in_double(model, ids, None, "none")
    with patched(model):
        check(all_logits(model, ids, None, "none"), stock, exact)
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3)).eval()
    bare = LlamaModel(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for other, output in ((classifier, "logits"), (bare, "last_hidden_state")):
            expected = getattr(other(ids), output)
            with patched(other):
                torch.testing.assert_close(getattr(other(ids), output), expected)


# -------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 20},
        {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: ",".join(options) or "greedy",
)
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_gives_the_same_tokens(options: dict[str, Any], side: str, models: Any) -> None:
    model = models("llama")
    ids = random_ids(1 if "prompt_lookup_num_tokens" in options else 3, 11)
    mask = padding(ids, side)
    common = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False} | options
    tokens = []
    for context in (patched, None):
        torch.manual_seed(3)
        if context is None:
            tokens.append(model.generate(ids, **common))
        else:
            with context(model):
                tokens.append(model.generate(ids, **common))
    assert torch.equal(*tokens)


def test_the_model_cards_snippet(tmp_path: Path) -> None:
    """LlamaForCausalLM on the Mistral checkpoint, as the card has it, and one line more."""
    folder = write_tiny_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for with_line in (False, True):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
        if with_line:
            report = patch(model)
            assert set(report.replaced) == {"RMSNorm", "MLP", "attention", "decoder layer"}
        prompt = "Complete the paragraph"
        inputs = tokenizer.encode(prompt, return_tensors="pt").to(model.device)
        outputs = model.generate(inputs, max_length=inputs.shape[1] + 20)
        assert outputs.shape[1] > inputs.shape[1]
        texts.append((outputs.tolist(), tokenizer.decode(outputs[0])))
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------- caches


@torch.no_grad()
def test_dynamic_cache_may_be_cut_copied_and_reordered(models: Any) -> None:
    """Keys are written in place, behind those that other holders of the cache look at."""
    model, ids = models(), random_ids(2, 30)
    expected = model(ids).logits
    other = ids.clone()
    other[:, 20:] = random_ids(2, 10, seed=5)
    expected_other = model(other).logits
    with patched(model):
        past = DynamicCache(config=model.config)
        model(ids[:, :18], past_key_values=past)
        model(ids[:, 18:20], past_key_values=past)
        keys = past.layers[0].keys
        before = keys.clone()
        shallow = copy.copy(past)
        shallow.layers = [copy.copy(layer) for layer in past.layers]
        deep = copy.deepcopy(past)
        for cache, tokens, logits in (
            (past, ids, expected),
            (shallow, other, expected_other),
            (deep, ids, expected),
        ):
            out = model(tokens[:, 20:], past_key_values=cache).logits
            torch.testing.assert_close(out, logits[:, 20:])
            assert cache.get_seq_length() == 30
        assert torch.equal(keys, before)
        past.crop(-10)
        out = model(other[:, 20:], past_key_values=past).logits
        torch.testing.assert_close(out, expected_other[:, 20:])
        past.crop(-10)
        past.reorder_cache(torch.tensor([1, 0]))
        out = model(ids[[1, 0], 20:], past_key_values=past).logits
        torch.testing.assert_close(out, expected[[1, 0], 20:])
        # and one that transformers filled goes on here, and back
    past = DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=past)
    with patched(model):
        model(ids[:, 10:20], past_key_values=past)
    out = model(ids[:, 20:], past_key_values=past).logits
    torch.testing.assert_close(out, expected[:, 20:])


@torch.no_grad()
def test_static_cache_that_is_full(models: Any) -> None:
    model, ids = models(), random_ids(2, 30)
    with patched(model):
        past = StaticCache(config=model.config, max_cache_len=29)
        model(ids[:, :28], past_key_values=past)
        values = past.layers[0].values.clone()
        with pytest.raises(ValueError, match=r"room for 29 tokens, 30 are needed"):
            model(ids[:, 28:], past_key_values=past)
        assert torch.equal(past.layers[0].values, values)


@torch.no_grad()
def test_a_key_of_padding_is_not_looked_at(models: Any) -> None:
    """NaN in the padding's embeddings stays there."""
    model, ids = models(), random_ids(3, 17)
    mask = padding(ids, "left")
    embeds = model.model.embed_tokens(ids)
    clean = model(inputs_embeds=embeds, attention_mask=mask).logits
    with patched(model):
        poisoned = embeds.masked_fill(~mask.bool()[..., None], float("nan"))
        for cache in (None, DynamicCache(config=model.config), StaticCache(model.config, 20)):
            out = model(inputs_embeds=poisoned, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(out[mask.bool()], clean[mask.bool()])


# ----------------------------------------------------------------------------- patch and unpatch


def test_unpatch_restores_everything() -> None:
    model, ids = random_model("llama"), random_ids(2, 13)
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    parameters = list(model.parameters())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = [sorted(m.__dict__) for m in model.modules()]
    with torch.no_grad():
        logits = model(ids).logits
        report = patch(model)
        assert model.config._attn_implementation == "minitron"
        assert patch(model) == report  # again: nothing more to do
        assert [type(m) for m in model.modules()] != classes
        changed = model(ids).logits
        assert not torch.equal(changed, logits)  # so it was the kernels
        torch.testing.assert_close(changed, logits)
        unpatch(model)
        assert torch.equal(model(ids).logits, logits)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert model.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    unpatch(model)  # nothing to do


def test_report_counts_and_names() -> None:
    report = patch(random_model("llama"))
    assert {kind: len(names) for kind, names in report.replaced.items()} == {
        "RMSNorm": 5,
        "MLP": 2,
        "attention": 2,
        "decoder layer": 2,
    }
    assert "model.layers.1.mlp" in report.replaced["MLP"]
    assert str(report) == "replaced: 5 RMSNorm, 2 MLP, 2 attention, 2 decoder layer"


class Bits(nn.Linear):
    """Stands for a quantised Linear of another library."""


def _with_bits(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = Bits


def _with_hook(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *args: None)


def _with_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward


def _in_training(model: Any) -> None:
    model.model.layers[0].mlp.train()


@pytest.mark.parametrize(
    ("options", "change", "left", "reason"),
    [
        ({"attention_bias": True}, None, "self_attn", "q_proj has a bias"),
        ({"mlp_bias": True}, None, "mlp", "gate_proj has a bias"),
        ({"hidden_act": "gelu"}, None, "mlp", "its activation is gelu"),
        ({"head_dim": 260}, None, "self_attn", "head_dim is 260"),
        ({}, _with_bits, "mlp", "up_proj is a tests.test_integration_transformers.Bits"),
        ({}, _with_hook, "self_attn", "v_proj has hooks"),
        ({}, _with_forward, "mlp", "it has a forward of its own"),
        ({}, _in_training, "mlp", "training mode"),
        ({}, lambda model: model.double(), "mlp", "gate_proj is torch.float64"),
    ],
)
def test_what_is_left_and_why(
    options: dict[str, Any], change: Callable[[Any], Any] | None, left: str, reason: str
) -> None:
    model, ids = random_model("llama", **options), random_ids(2, 9)
    if change is not None:
        change(model)
    with torch.no_grad():
        expected = model(ids).logits
        report = patch(model)
        torch.testing.assert_close(model(ids).logits, expected)
    assert reason in report.left[f"model.layers.0.{left}"]
    assert report.left["model.layers.0"] == "parts of it were left"
    assert reason in str(report)
    unpatch(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("a path", "model must be a transformers model, got str"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear has none"),
    ],
)
def test_patch_refuses_what_is_no_such_model(model: Any, message: str) -> None:
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=message):
            function(model)


def test_a_version_with_other_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def sdpa_mask(batch_size: int, cache_position: Tensor, kv_length: int) -> None:
        """As in transformers 5.0."""

    transformers_attention.check_version.cache_clear()
    monkeypatch.setattr(masking_utils, "sdpa_mask", sdpa_mask)
    with pytest.raises(NotImplementedError, match="its mask functions take other arguments"):
        patch(random_model())


def test_a_patched_model_is_saved_and_copied_as_any_other(tmp_path: Path) -> None:
    model, ids = random_model("llama"), random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        patch(model)
        patched_logits = model(ids).logits
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert again.config._attn_implementation == "sdpa"
        assert torch.equal(again(ids).logits, expected)
        copied = copy.deepcopy(model)
        unpatch(model)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(copied(ids).logits, patched_logits)
        # new weights count at once
        patch(model)
        model.load_state_dict(random_model("llama", seed=1).state_dict())
        torch.testing.assert_close(model(ids).logits, random_model("llama", seed=1)(ids).logits)


# ---------------------------------------------------------------------- calls left to transformers


@contextmanager
def reason_logged(caplog: Any, reason: str) -> Iterator[None]:
    transformers_attention._log_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "minitron_kernels.integrations.transformers"):
        yield
    assert any(reason in record.message for record in caplog.records), caplog.text


def test_gradients_are_transformers(models: Any, caplog: Any) -> None:
    model, ids = random_model("llama"), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with patched(model), reason_logged(caplog, "gradients may be wanted"):
        model(ids, labels=ids, attention_mask=padding(ids, "none")).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


@torch.no_grad()
def test_arbitrary_masks(models: Any, caplog: Any) -> None:
    model, ids = models("llama"), random_ids(2, 9)
    hole = torch.ones_like(ids)
    hole[0, 3:5] = 0
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand((2, 1, 9, 9), generator=generator) < 0.5
    seen |= torch.eye(9, dtype=torch.bool)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    cases: list[dict[str, Any]] = [
        {"attention_mask": hole},
        {"attention_mask": seen},
        {"attention_mask": additive},
        {"position_ids": packed, "use_cache": False},
    ]
    for case in cases:
        expected = model(ids, **case).logits
        plain = model(ids).logits
        assert not torch.allclose(expected, plain, atol=1e-2)
        with patched(model), reason_logged(caplog, "the mask is not a causal one"):
            torch.testing.assert_close(model(ids, **case).logits, expected)


@torch.no_grad()
def test_attentions_and_hidden_states(models: Any, caplog: Any) -> None:
    model, ids = random_model("llama", attn_implementation="eager"), random_ids(2, 9)
    options = {"output_attentions": True, "output_hidden_states": True}
    expected = model(ids, attention_mask=padding(ids, "left"), **options)
    with patched(model), reason_logged(caplog, "output_attentions"):
        actual = model(ids, attention_mask=padding(ids, "left"), **options)
    for name in ("attentions", "hidden_states"):
        for a, b in zip(actual[name], expected[name], strict=True):
            real = padding(ids, "left").bool()
            a, b = (t.transpose(1, 2) if name == "attentions" else t for t in (a, b))
            torch.testing.assert_close(a[real], b[real])


class LoRA(nn.Module):
    """An adapter in the place of a matrix, as peft puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features), requires_grad=False)
        self.b = nn.Parameter(torch.randn(base.out_features, 2), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@torch.no_grad()
def test_what_comes_between_after_the_patch(caplog: Any) -> None:
    """Adapters and hooks do what they did before."""
    model, ids = random_model("llama"), random_ids(2, 9)
    plain = model(ids).logits
    with patched(model):
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[0].mlp
        attention.v_proj = LoRA(attention.v_proj)
        with reason_logged(caplog, "v_proj was replaced, or has hooks"):
            adapted = model(ids).logits
        seen: list[Tensor] = []
        hook = mlp.up_proj.register_forward_hook(lambda m, args, out: seen.append(out))
        with reason_logged(caplog, "up_proj was replaced, or has hooks"):
            torch.testing.assert_close(model(ids).logits, adapted)
        hook.remove()
        of_norm = model.model.layers[0].input_layernorm.register_forward_hook(
            lambda m, args, out: seen.append(out)
        )
        torch.testing.assert_close(model(ids).logits, adapted)
        assert [tuple(t.shape) for t in seen] == [(2, 9, 96), (2, 9, 64)]
        of_norm.remove()
    torch.testing.assert_close(model(ids).logits, adapted)
    assert not torch.allclose(adapted, plain, atol=1e-2)


@torch.no_grad()
def test_autocast_and_mixed_dtypes(models: Any, caplog: Any) -> None:
    model, ids = models("llama"), random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with patched(model), reason_logged(caplog, "autocast"):
            assert torch.equal(model(ids).logits, expected)


# ------------------------------------------------------------------------- attn_implementation


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_registered_attention(cache: str, side: str, models: Any) -> None:
    """The attention alone, chosen by name."""
    assert register_attention() == "minitron"
    stock_model = models("llama")
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=register_attention())).eval()
    model.load_state_dict(stock_model.state_dict())
    ids = random_ids(3, 23)
    mask = None if side == "none" else padding(ids, side)
    chunks = 1 if cache == "none" or side == "right" else 4
    calls: list[Tensor | None] = []
    function = AttentionInterface._global_mapping["minitron"]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[4])
        return function(*args, **kwargs)

    AttentionInterface.register("minitron", counted)
    try:
        actual = all_logits(model, ids, mask, cache, chunks)
    finally:
        register_attention()
    assert len(calls) == 2 * chunks
    stock = all_logits(stock_model, ids, mask, cache, chunks)
    check(actual, stock, in_double(stock_model, ids, mask, "dynamic"), mask)


@torch.no_grad()
def test_masks_of_other_implementations(models: Any) -> None:
    """A patched model whose implementation is then set to another one gets that one's masks."""
    model, ids = random_model("llama"), random_ids(3, 11)
    mask = padding(ids, "left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    for name in ("sdpa", "eager"):
        patch(model)
        model.set_attn_implementation(name)
        actual = model(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(actual, expected)
        unpatch(model)
        assert model.config._attn_implementation == name  # the user's choice stays


# ----------------------------------------------------------------------------------- torch.compile


def compiled(model: Any) -> tuple[Any, list[torch.fx.GraphModule]]:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


def ops_in(graphs: list[torch.fx.GraphModule]) -> set[str]:
    calls = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    return {c.split(".")[1] for c in calls if c.startswith("minitron_kernels.")}


@torch.no_grad()
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_compiles_whole(cache: str, models: Any) -> None:
    model, ids = models("llama", num_hidden_layers=1), random_ids(2, 12)
    chunks = 1 if cache == "none" else 2
    expected = all_logits(model, ids, None, cache, chunks)
    with patched(model):
        function, graphs = compiled(model)
        function.config = model.config
        actual = all_logits(function, ids, None, cache, chunks)
    torch.testing.assert_close(actual, expected)
    assert ops_in(graphs) >= {"swiglu_mlp", "linear"}
    # without a cache, transformers' mask is one for sequences that may be packed into a row
    assert ("attention" in ops_in(graphs)) == (cache != "none")


@torch.no_grad()
def test_compiled_decoding_of_a_padded_batch(models: Any) -> None:
    """As generate() does it: masks are made outside of the graph, once for all layers."""
    model, ids = models("llama", num_hidden_layers=1), random_ids(3, 9)
    options = {"attention_mask": padding(ids, "left"), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, cache_implementation="static", **options)
    with patched(model):
        plain, forward = model.forward, []

        def spy(*args: Any, **kwargs: Any) -> Any:
            forward.append(kwargs.get("attention_mask"))
            return function(*args, **kwargs)

        function, graphs = compiled(plain)
        model.forward = spy
        try:
            actual = model.generate(ids, cache_implementation="static", **options)
        finally:
            del model.forward
    assert torch.equal(actual, expected)
    assert all(mask.shape == (3, 1, 1, 2) for mask in forward)
    assert "qkv_rope_append" in ops_in(graphs)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor(models: Any) -> None:
    model, ids = models("llama"), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    with patched(model):
        actual = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected)


# -------------------------------------------------------------------------------- compiled kernels


@pytest.mark.parametrize(
    ("arch", "head_dim"), [("sm_80", 64), ("sm_90", 128)], ids=["emu-sm_80", "emu-sm_90"]
)
@torch.no_grad()
def test_on_the_kernels(arch: str, head_dim: int, caplog: Any) -> None:
    """Prompt and single tokens, padded and not, by the CUDA kernels; nothing goes to PyTorch."""
    model = random_model("llama", head_dim=head_dim, num_hidden_layers=1)
    ids = random_ids(2, 21)
    eager = copy.deepcopy(model).bfloat16()
    exact_model = copy.deepcopy(eager).double()
    cases: list[tuple[str, Tensor | None, int]] = [
        ("dynamic", None, 3),
        ("static", None, 3),
        ("dynamic", padding(ids, "left"), 2),
    ]
    expected = [
        [all_logits(m, ids, mask, cache, chunks) for m in (eager, exact_model)]
        for cache, mask, chunks in cases
    ]
    state = copy.deepcopy(eager.state_dict())
    transformers_attention._log_once.cache_clear()
    caplog.set_level(logging.WARNING, "minitron_kernels")
    with emulated(arch) as gpu:
        eager.to(gpu.device(gpu.name))
        for name, p in list(eager.named_parameters()) + list(eager.named_buffers()):
            moved = p.detach().to("cpu:0", copy=True)
            assert gpu.is_on_device(moved), name
            p.data = moved
        with patched(eager):
            for (cache, mask, chunks), (stock, exact) in zip(cases, expected, strict=True):
                on_device = [None if t is None else t.to("cpu:0", copy=True) for t in (ids, mask)]
                out = all_logits(eager, *on_device, cache, chunks).cpu()
                real = torch.ones_like(ids).bool() if mask is None else mask.bool()
                check_bf16_logits(out[real], stock[real], exact[real])
            mlp = eager.model.layers[0].mlp
            assert mlp.gate_proj.weight.stride(0) == 2 * mlp.gate_proj.weight.shape[1]
            now = {name: t.cpu() for name, t in eager.state_dict().items()}
        assert mlp.gate_proj.weight.is_contiguous()
    assert all(torch.equal(t, state[name]) and t.is_contiguous() for name, t in now.items())
    assert not caplog.records

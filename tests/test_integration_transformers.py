"""Patched transformers models against the same models as transformers computes them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    StaticCache,
    masking_utils,
)

from minitron_kernels.integrations import transformers_attention
from minitron_kernels.integrations.transformers import patch, register_attention, unpatch
from tests.emulated_device import emulated
from tests.test_model_emulated import check_logits as check_bf16_logits
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.transformers_models import (
    SHAPE,
    all_logits,
    check,
    compiled,
    in_double,
    ops_in,
    padding,
    patched,
    random_ids,
    random_model,
)

Tensor = torch.Tensor

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


@pytest.mark.parametrize("has_amx", [True, False])
def test_bfloat16(has_amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows and few, with PyTorch's products of many and with our own."""
    monkeypatch.setattr("minitron_kernels.integrations.transformers._has_amx", lambda: has_amx)
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
        assert len(products) == 1 + 2 * 7 * has_amx  # the output matrix, and layers
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

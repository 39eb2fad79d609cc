"""What patch() replaces and gives back, and which calls it leaves to transformers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    masking_utils,
)

from minitron_kernels.integrations import transformers_attention
from minitron_kernels.integrations.transformers import patch, unpatch
from tests.transformers_models import padding, patched, random_ids, random_model

Tensor = torch.Tensor

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
        ({}, _with_bits, "mlp", "up_proj is a tests.test_integration_transformers_patch.Bits"),
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

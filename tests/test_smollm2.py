"""The real SmolLM2-135M-Instruct (Q4_1 GGUF) against transformers' fp32 load of the same file."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import AutoTokenizer, MinitronForCausalLM, SamplingParams
from minitron_kernels.generate import generate, score

PROMPTS = [
    "Complete the paragraph: our solar system is",
    "def fibonacci(n):\n    ",
    "The capital of France is",
]


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(smollm2_gguf, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def theirs(smollm2_gguf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


def test_greedy_tokens_and_scores_equal_transformers(
    model: MinitronForCausalLM, theirs: Any, smollm2_gguf: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    params = SamplingParams(max_new_tokens=48, min_new_tokens=48)
    results = generate(model, tokenizer, PROMPTS, params)
    for result in results:
        inputs = torch.tensor([result.prompt_ids])
        expected = theirs.generate(
            inputs, max_new_tokens=48, min_new_tokens=48, do_sample=False, pad_token_id=2
        )
        assert result.token_ids == expected[0, inputs.shape[1] :].tolist()

        with torch.no_grad():
            logits = theirs(expected).logits
        ours = model.logits(expected)
        assert (ours - logits).abs().max() / logits.abs().max() <= 1e-5
        chosen = logits[0, :-1].log_softmax(-1).gather(1, expected[0, 1:, None])[:, 0]
        assert score(model, expected[0].tolist())[1:] == pytest.approx(chosen.tolist(), abs=1e-4)


def test_int8_activations_cost_little(model: MinitronForCausalLM, smollm2_gguf: Path) -> None:
    """Logits of text: off by no more than three times what bfloat16 costs, and the perplexity by
    less than 2 %."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    ids = torch.tensor([tokenizer.encode(inspect.getsource(argparse))[:600]])
    ours = MinitronForCausalLM.from_pretrained(smollm2_gguf, dtype="bfloat16", device="cpu")
    expected, exact = model.logits(ids), ours.logits(ids)
    ours.set_int8_activations(True)
    rounded = ours.logits(ids)

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))

    def size(difference: torch.Tensor) -> float:
        return float(difference.square().mean().sqrt())

    assert size(exact - expected) < size(rounded - expected) < 3 * size(exact - expected)
    assert abs(loss(rounded) - loss(expected)) < 0.02


def test_text_makes_sense(model: MinitronForCausalLM, smollm2_gguf: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    )
    result = generate(model, tokenizer, chat, SamplingParams(max_new_tokens=40))[0]
    assert "Paris" in result.text
    assert result.finish_reason == "stop" and "<|im_end|>" not in result.text

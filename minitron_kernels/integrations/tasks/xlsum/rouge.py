"""ROUGE of a summary, as Google's rouge_score computes it with stemming: F measures in 0..1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_KINDS = ("rouge1", "rouge2", "rougeL")


@cache
def _scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(_KINDS, use_stemmer=True)


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The scores of one document; ``results`` holds the one text that was generated."""
    scores = _scorer().score(doc["summary"], results[0].strip())
    return {kind: scores[kind].fmeasure for kind in _KINDS}

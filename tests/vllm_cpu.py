r"""vLLM's engine on a machine without a GPU, with the attention backend that it is asked for.

The wheel of vLLM on PyPI is compiled for CUDA. Of what its CPU platform calls compiled code for,
three helpers are here in PyTorch (`_HELPERS`); nothing of what minitron_kernels replaces is, and
vLLM's own attention is not there at all. A platform plugin chooses the platform, in every process.

    python -m tests.vllm_cpu \
        '{"model": "m.gguf", "prompts": [[1, 2]], "max_tokens": 8, "engine": {}, "to": "ids.json"}'

writes the token ids that vLLM generates greedily.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Tensor = torch.Tensor


def _slot_mapping(starts: Tensor, positions: Tensor, table: Tensor, slots: Tensor, n: int) -> None:
    rows = torch.arange(int(starts[-1]), dtype=starts.dtype)
    sequence = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
    positions = positions[: len(rows)]
    slots[: len(rows)] = table[sequence, positions // n].long() * n + positions % n
    slots[len(rows) :] = -1


_HELPERS = {
    "init_cpu_memory_env(int[] nodes) -> ()": lambda nodes: None,
    "compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor table, "
    "Tensor(a!) slots, int block) -> ()": _slot_mapping,
    "greedy_argmax(Tensor logits) -> Tensor": lambda logits: logits.argmax(-1),
}
_library = torch.library.Library("_C", "FRAGMENT")


def platform() -> str:
    """The entry point vllm.platform_plugins."""
    torch.accelerator.empty_cache = lambda: None  # there is none
    for schema, function in _HELPERS.items():
        name = schema.partition("(")[0]
        if not hasattr(torch.ops._C, name):
            _library.define(schema)
            _library.impl(name, function, "CompositeExplicitAutograd")
    return "tests.vllm_platform.Platform"


def write_plugins(folder: Path) -> None:
    """A distribution with this platform, and the entry point of pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    group = "vllm.general_plugins"
    section = re.search(
        rf'\[project\.entry-points\."{re.escape(group)}"\]\n(\w+) = "(.+)"', project
    )
    assert section is not None
    info = folder / "minitron_kernels_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: minitron-kernels-tests\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(
        f"[vllm.platform_plugins]\nminitron_tests = tests.vllm_cpu:platform\n"
        f"[{group}]\n{section[1]} = {section[2]}\n"
    )


def environment(plugins: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(plugins)]),
        "VLLM_PLUGINS": "minitron_kernels,minitron_tests",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",
    }


def main(request: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    engine = {
        "model": request["model"],
        "config_format": "minitron_gguf",
        "load_format": "minitron_gguf",
        "attention_backend": "MINITRON",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "float32",
        "enforce_eager": True,
        "compilation_config": {"custom_ops": ["all"]},
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 16,
        **request["engine"],
    }
    llm = LLM(**engine)
    params = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    results = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(result.outputs[0].token_ids) for result in results]
    Path(request["to"]).write_text(json.dumps(tokens), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

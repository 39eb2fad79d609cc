"""`minitron bench` for Minitron-8B's shape without a checkpoint: random weights, made in place.

    python -m bench.whole_model --weights Q4_K --device cuda --batch 1,8,64 --json model.json

For a machine that has no model, and no minutes to write and load 5 or 17 GB. Weights are `dense`
(bfloat16), or all of one type of GGUF blocks; the LM head is Q6_K then, as in the published files.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import click
import torch

from bench import inputs
from bench.shapes import KINDS, MINITRON, SMALL
from minitron_kernels import bench, devices
from minitron_kernels.config import ModelConfig
from minitron_kernels.model import MinitronForCausalLM
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor


def random_model(config: ModelConfig, weights: str, device: torch.device) -> MinitronForCausalLM:
    """In bfloat16, packed as from_pretrained packs it. Blocks are drawn once for each shape."""
    with torch.device("meta"):
        model = MinitronForCausalLM(config)
    drawn: dict[tuple[str, tuple[int, ...]], QuantizedTensor] = {}

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        if weights == "dense":
            w = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return w.normal_(std=0.02)
        kind = "Q6_K" if name == "lm_head.weight" else weights
        if (kind, shape) not in drawn:
            drawn[kind, shape] = inputs.quantised(kind, *shape)
        own = drawn[kind, shape]  # on a CPU each module reads memory of its own
        return QuantizedTensor(own.blocks.clone(), kind, shape)

    for layer in model.model.layers:
        layer.get_submodule("self_attn").interleaved = weights != "dense"
    for name, shape in config.weight_shapes().items():
        model._set(name, weight(name, shape), torch.bfloat16, device)
    return model


@click.command(help=__doc__)
@click.option("--weights", default="dense", type=click.Choice(["dense", *KINDS]))
@click.option("--device", default="auto", help="auto, cpu, cuda, or emulated:sm_80 and its like")
@click.option("--layers", type=int, help="default: all 40")
@click.option("--small", is_flag=True, help="sizes that tell nothing, in seconds")
@click.option("--prompt", default=512, show_default=True)
@click.option("--generate", default=128, show_default=True)
@click.option("--batch", default="1,8,64", show_default=True)
@click.option("--repeat", default=5, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="also write the report")
def main(
    weights: str, device: str, layers: int | None, small: bool, prompt: int, generate: int,
    batch: str, repeat: int, path: Path | None,
) -> None:  # fmt: skip
    config = SMALL if small else MINITRON
    config = dataclasses.replace(
        config,
        num_hidden_layers=layers or config.num_hidden_layers,
        source=f"random weights, {weights}",
    )
    with _emulator(device) as emulated:
        place = devices.parse(device)
        workload = bench.Workload(prompt, generate, [int(b) for b in batch.split(",")], repeat)
        report = bench.run(random_model(config, weights, place), workload)
    if emulated is not None:
        report["device"] = "PTX emulator"
    print("\n".join(bench.table(report)))
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def _emulator(device: str):  # type: ignore[no-untyped-def]
    if not device.startswith("emulated:"):
        return nullcontext()
    from tests.emulated_device import emulated

    return emulated(device.partition(":")[2])


if __name__ == "__main__":
    main()

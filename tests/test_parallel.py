"""Models shared by two processes, over gloo, against the same model in one."""

from __future__ import annotations

import json
import logging
import multiprocessing as mp
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from minitron_kernels import MinitronForCausalLM, SamplingParams, cpu_graphs, graphs
from minitron_kernels.cli import main
from minitron_kernels.generate import Engine, generate, score
from minitron_kernels.layers import Packable
from minitron_kernels.loaders.checkpoint import Weights, open_checkpoint
from minitron_kernels.parallel import ShardWeights, split
from minitron_kernels.quant_packing import PackedQuantizedTensor
from minitron_kernels.quantized import QuantizedTensor
from tests.emulated_device import emulated
from tests.nemo_files import nemo_parts, write_tar
from tests.test_loaders_gguf import in_file_mapping
from tests.test_model_quantized import METADATA, write_model

Tensor = torch.Tensor

ROOT = Path(__file__).parents[1]
TIMEOUT = 120  # seconds that a job of the ranks may take
PROMPTS = [[5, 17, 200, 31, 9, 44], [300], [7, 7, 250, 3]]
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)


class Ranks:
    """Processes that form a group; a call runs a function of this module in all of them."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, folder / "rendezvous", theirs)
            process = context.Process(target=serve, args=args)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The ranks' results; an exception in one is its result."""
        for pipe in self.pipes:
            pipe.send((function, args))
        assert all(pipe.poll(TIMEOUT) for pipe in self.pipes), "a rank does not answer"
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def serve(rank: int, size: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(function(*args))
        except Exception as error:
            pipe.send(error)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def same(results: list[Any]) -> Any:
    """The result that all ranks have, bit for bit."""
    first, *others = results
    if isinstance(first, Exception):
        raise first
    for other in others:
        assert torch.equal(first, other) if isinstance(first, Tensor) else first == other
    return first


def load(source: Path, parallel: bool, **options: Any) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(
        source, **{"device": "cpu", "tensor_parallel": parallel, **options}
    )


def logits_of(source: Path, ids: Tensor, parallel: bool = True, **options: Any) -> Tensor:
    return load(source, parallel, **options).logits(ids)


def tokens_of(
    source: Path, dtype: str, params: SamplingParams = GREEDY, parallel: bool = True
) -> list[list[int]]:
    model = load(source, parallel, dtype=dtype)
    return [result.token_ids for result in generate(model, None, PROMPTS, params)]


def bf16_logits_of(source: Path, ids: Tensor) -> Tensor:
    return logits_of(source, ids, dtype="bfloat16")


# ---------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("total", "parts", "unit", "lengths"),
    [
        (8, 2, 1, [4, 4]),
        (3, 2, 1, [2, 1]),
        (11520, 2, 256, [5888, 5632]),  # Minitron's MLP in K-quants: 45 blocks a row
        (11520, 4, 64, [2880, 2880, 2880, 2880]),
        (331, 3, 1, [111, 110, 110]),
    ],
)
def test_split(total: int, parts: int, unit: int, lengths: list[int]) -> None:
    runs = split(total, parts, unit)
    assert [len(run) for run in runs] == lengths
    assert [i for run in runs for i in run] == list(range(total))


# ----------------------------------------------------------------------------- dense models

SHAPES: dict[str, dict[str, Any]] = {
    "kv2": {},
    "kv4": {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256},
    "kv3-uneven-tied": {
        "kind": "llama",
        "hidden_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def dense(request: pytest.FixtureRequest, make_hf_model: Callable[..., Any]) -> tuple[Any, Path]:
    model: tuple[Any, Path] = make_hf_model(**SHAPES[request.param])
    return model


def test_float32_logits(ranks: Ranks, dense: tuple[Any, Path]) -> None:
    hf_model, source = dense
    ids = torch.tensor([[1, 300, 17, 45, 45, 200, 8], [2, 9, 9, 9, 310, 4, 77]])
    actual = same(ranks(logits_of, source, ids))
    with torch.no_grad():
        error = (hf_model(ids).logits - (exact := hf_model.double()(ids).logits)).abs().max()
        hf_model.float()
    assert (actual - exact).abs().max() <= 2 * error


def test_bfloat16_logits(ranks: Ranks, dense: tuple[Any, Path]) -> None:
    source = dense[1]
    ids = torch.tensor([[1, 300, 17, 45, 45, 200, 8]])
    actual = same(ranks(bf16_logits_of, source, ids))
    exact = logits_of(source, ids, parallel=False)
    alone = logits_of(source, ids, parallel=False, dtype="bfloat16")
    assert (actual - exact).abs().max() <= 2 * (alone - exact).abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_one_process(ranks: Ranks, dense: tuple[Any, Path], dtype: str) -> None:
    """Three prompts in a batch, prefill and decode."""
    source = dense[1]
    assert same(ranks(tokens_of, source, dtype)) == tokens_of(source, dtype, parallel=False)


def test_sampled_tokens(ranks: Ranks, dense: tuple[Any, Path]) -> None:
    """With a seed those of one process; without, of one seed in all ranks."""
    source = dense[1]
    seeded = SamplingParams(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)
    actual = same(ranks(tokens_of, source, "float32", seeded))
    assert actual == tokens_of(source, "float32", seeded, parallel=False)
    free = SamplingParams(max_new_tokens=12, temperature=1.5)
    once, again = (same(ranks(tokens_of, source, "float32", free)) for _ in range(2))
    assert once != again


def rows_alone_and_together(source: Path) -> bool:
    model = load(source, True, dtype="bfloat16")
    ids = torch.tensor([[1, 300, 17, 45], [2, 9, 9, 310], [3, 4, 5, 6]])
    together = model.logits(ids)
    return all(torch.equal(together[i], model.logits(ids[i : i + 1])[0]) for i in range(3))


def test_a_row_does_not_depend_on_the_batch(ranks: Ranks, dense: tuple[Any, Path]) -> None:
    assert same(ranks(rows_alone_and_together, dense[1]))


@pytest.mark.slow
def test_three_processes(make_hf_model: Callable[..., Any], tmp_path: Path) -> None:
    """Four KV heads, five units of the MLP and an odd vocabulary for three."""
    hf_model, source = make_hf_model(num_attention_heads=8, num_key_value_heads=4)
    ids = torch.tensor([[1, 300, 17, 45, 45, 200, 8], [2, 9, 9, 9, 310, 4, 77]])
    three = Ranks(tmp_path, 3)
    try:
        actual = same(three(logits_of, source, ids))
        tokens = {dtype: same(three(tokens_of, source, dtype)) for dtype in ("float32", "bfloat16")}
        assert same(three(rows_alone_and_together, source))
    finally:
        three.close()
    with torch.no_grad():
        error = (hf_model(ids).logits - (exact := hf_model.double()(ids).logits)).abs().max()
    assert (actual - exact).abs().max() <= 2 * error
    for dtype, generated in tokens.items():
        assert generated == tokens_of(source, dtype, parallel=False)


def test_tensors_of_no_module_are_left_alone(
    ranks: Ranks, make_hf_model: Callable[..., Any]
) -> None:
    _, source = make_hf_model()
    ids = torch.tensor([[1, 300, 17, 45]])
    expected = same(ranks(logits_of, source, ids))
    weights = load_file(source / "model.safetensors")
    weights |= {"extra": torch.ones(3), "model.layers.0.self_attn.o_proj.bias": torch.ones(3)}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(same(ranks(logits_of, source, ids)), expected)
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    kind, message = same(ranks(error_of, [source] * 2, {}))
    assert kind == "ValueError" and "tensor model.norm.weight is missing" in message


def allocated(source: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the weights of a rank keep outside of the file, and those foretold."""
    assert dist.group.WORLD is not None
    weights = ShardWeights.of(Weights(open_checkpoint(source), dtype), dist.group.WORLD)
    copied = 0
    for name in weights.checkpoint.config.weight_shapes():
        weight = weights.load(name)
        stored = weight.blocks if isinstance(weight, QuantizedTensor) else weight
        if not in_file_mapping(stored, weights.checkpoint.tensors[name].file):
            copied += stored.untyped_storage().nbytes()
    return copied, weights.ram_needed()


def test_memory_is_foretold_for_every_format(
    ranks: Ranks, make_hf_model: Callable[..., Any], quantized: Path, tmp_path: Path
) -> None:
    """And what is copied is this rank's part only."""
    hf_model, folder = make_hf_model(vocab_size=332)
    config = json.loads((folder / "config.json").read_text())
    parts = nemo_parts(dict(hf_model.state_dict()), config)
    nemo = write_tar(tmp_path / "model.nemo", parts)
    for source in (folder, nemo, quantized):
        for dtype in (torch.float32, torch.bfloat16):
            for copied, foretold in ranks(allocated, source, dtype):
                assert copied == foretold, (source, dtype)
    ids = torch.tensor([[1, 300, 17, 45]])
    assert torch.equal(same(ranks(logits_of, nemo, ids)), same(ranks(logits_of, folder, ids)))


def other_calls(source: Path) -> tuple[Any, ...]:
    model = load(source, True)
    ids = torch.tensor([[3, 5, 7, 9]])
    continued = model.generate(ids, max_length=9).tolist()
    return continued, score(model, [3, 5, 7, 9, 11])


def test_generate_and_score_methods(ranks: Ranks, dense: tuple[Any, Path]) -> None:
    source = dense[1]
    continued, scores = same(ranks(other_calls, source))
    model = load(source, False)
    assert continued == model.generate(torch.tensor([[3, 5, 7, 9]]), max_length=9).tolist()
    assert scores == pytest.approx(score(model, [3, 5, 7, 9, 11]), abs=1e-4)


def described(source: Path, dtype: str) -> dict[str, tuple[list[int], bool, int]]:
    """Shape, whether it lies in a mapped file, and what it keeps alive, of each weight."""
    found = {}
    for name, weight in load(source, True, dtype=dtype).named_parameters():
        stored = weight.blocks if isinstance(weight, QuantizedTensor) else weight
        own = stored.numel() * stored.itemsize
        is_view = in_file_mapping(stored, source / "model.safetensors")
        kept = own if is_view else stored.untyped_storage().nbytes()
        found[name] = list(weight.shape), is_view, kept
    return found


def test_each_rank_reads_its_part_of_the_file(
    ranks: Ranks, make_hf_model: Callable[..., Any]
) -> None:
    _, source = make_hf_model()
    first, second = ranks(described, source, "float32")
    shapes = load(source, False).state_dict()
    for name, (shape, is_view, _) in first.items():
        assert is_view, name
        whole = list(shapes[name].shape)
        if "norm" in name:
            assert shape == second[name][0] == whole
            continue
        dim = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        assert shape[dim] + second[name][0][dim] == whole[dim]
        assert shape[1 - dim] == second[name][0][1 - dim] == whole[1 - dim]
        assert abs(shape[dim] - second[name][0][dim]) <= 32
    # Converted weights are copies, of the part alone.
    for name, (shape, is_view, kept) in ranks(described, source, "bfloat16")[1].items():
        assert not is_view
        assert kept == 2 * int(torch.Size(shape).numel()), name


# ------------------------------------------------------------------------- quantised models

# Two KV groups of 256 columns; three blocks of 256 a row of down_proj, shared unevenly.
QUANTIZED = METADATA | {
    "llama.attention.head_count": 8,
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.rope.dimension_count": 64,
    "llama.feed_forward_length": 768,
}
MATRICES = {
    "attn_q": (512, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 512),
    "ffn_gate": (768, 256),
    "ffn_up": (768, 256),
    "ffn_down": (256, 768),
}
LAYERS = (
    ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q5_K"),
    ("Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q4_K", "Q4_K", "Q6_K"),
    ("Q5_K", "F16", "Q2_K", "Q3_K", "Q8_0", "BF16", "F32"),
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model.gguf"
    return write_model(path, LAYERS, matrices=MATRICES, metadata=QUANTIZED)


@pytest.fixture(scope="module")
def quantized_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "tied.gguf"
    layers = (("Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K"),)
    metadata = QUANTIZED | {"llama.block_count": 1}
    return write_model(path, layers, "Q6_K", None, MATRICES, metadata)


@pytest.mark.parametrize("name", ["quantized", "quantized_tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_tokens(
    ranks: Ranks, name: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(name)
    assert same(ranks(tokens_of, source, dtype)) == tokens_of(source, dtype, parallel=False)


def test_quantized_logits(ranks: Ranks, quantized: Path) -> None:
    ids = torch.tensor([[1, 300, 17, 45, 45, 200, 8]])
    actual = same(ranks(logits_of, quantized, ids))
    alone = logits_of(quantized, ids, parallel=False, dtype="float32")
    exact = logits_of(quantized, ids, parallel=False, dtype="float32", expand=True)
    half = logits_of(quantized, ids, parallel=False, dtype="bfloat16")
    actual = same(ranks(bf16_logits_of, quantized, ids))
    assert (actual - exact).abs().max() <= 2 * (half - exact).abs().max()
    assert (alone - exact).abs().max() < 1e-3 * (half - exact).abs().max()


def stored_parts(source: Path) -> dict[str, Any]:
    return {
        name: (weight.quant_type, weight.blocks.clone(), in_file_mapping(weight.blocks, source))
        for name, weight in load(source, True).named_parameters()
        if isinstance(weight, QuantizedTensor)
    }


def test_quantized_parts_are_the_stored_blocks(ranks: Ranks, quantized: Path) -> None:
    whole = dict(load(quantized, False).named_parameters())
    first, second = ranks(stored_parts, quantized)
    kept = {name for name, weight in whole.items() if isinstance(weight, QuantizedTensor)}
    assert first.keys() == second.keys() == kept
    for name in kept:
        dim = int(name.endswith(("o_proj.weight", "down_proj.weight")))
        assert first[name][0] == second[name][0] == whole[name].quant_type
        blocks = torch.cat([first[name][1], second[name][1]], dim)
        assert torch.equal(blocks, whole[name].blocks), name
        if dim == 0 and in_file_mapping(whole[name].blocks, quantized):
            assert first[name][2] and second[name][2], name


def expanded_logits_of(source: Path, ids: Tensor) -> Tensor:
    return logits_of(source, ids, expand=True, dtype="float32")


def test_expanded_quantized_model(ranks: Ranks, quantized: Path) -> None:
    ids = torch.tensor([[1, 300, 17, 45, 45, 200, 8]])
    actual = same(ranks(expanded_logits_of, quantized, ids))
    alone = logits_of(quantized, ids, parallel=False, expand=True, dtype="float32")
    torch.testing.assert_close(actual, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


def emulated_tokens_of(source: Path) -> tuple[list[list[int]], dict[str, list[int]]]:
    with emulated("sm_80") as gpu:
        model = load(source, True, dtype="bfloat16", device=gpu.name)
        packed = {
            name: list(weight.shape)
            for name, weight in model.named_parameters()
            if isinstance(weight, PackedQuantizedTensor)
        }
        assert all(m.packed_weight is not None for m in model.modules() if is_joined(m))
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        results = generate(model, None, PROMPTS[:2], params, cuda_graphs=True)
        return [result.token_ids for result in results], packed


def is_joined(module: torch.nn.Module) -> bool:
    """Whether its matrices are packed as one: those of an MLP of one type."""
    return isinstance(module, Packable) and "gate_proj" in module.matrices


def test_tokens_on_an_emulated_gpu(ranks: Ranks, quantized_tied: Path, tmp_path: Path) -> None:
    """Each rank packs its part, into tiles or rows; the kernels' tokens are those of the CPU."""
    metadata = QUANTIZED | {"llama.block_count": 1}
    layers = (("BF16",) * 7,)
    dense = write_model(tmp_path / "m.gguf", layers, "BF16", "BF16", MATRICES, metadata)
    for source in (quantized_tied, dense):
        (first, packed), (second, other) = ranks(emulated_tokens_of, source)
        params = SamplingParams(max_new_tokens=3, ignore_eos=True)
        model = load(source, False, dtype="bfloat16")
        expected = [r.token_ids for r in generate(model, None, PROMPTS[:2], params)]
        assert first == second == expected
        down = "model.layers.0.mlp.down_proj.weight"
        if source != dense:
            assert packed[down] == [256, 512] and other[down] == [256, 256]


# ------------------------------------------------------------------------------------ limits


def error_of(sources: list[Path], options: dict[str, Any]) -> tuple[str, str]:
    """What loading raises, from another source in each rank."""
    try:
        load(sources[dist.get_rank()], True, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_too_few_kv_heads(ranks: Ranks, make_hf_model: Callable[..., Any]) -> None:
    _, source = make_hf_model(num_key_value_heads=1)
    kind, message = same(ranks(error_of, [source] * 2, {}))
    assert kind == "ValueError"
    assert message.endswith("2 processes cannot share the 1 KV heads of this model; accepted: 1")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({3: "Q4_K"}, "the 2 KV heads of this model (in units of 2); accepted: 1"),
        ({6: "Q3_K"}, "the 256 columns of down_proj of this model (in units of 256); accepted: 1"),
    ],
)
def test_too_few_blocks(
    ranks: Ranks, changed: dict[int, str], expected: str, tmp_path: Path
) -> None:
    """Columns of K-quants are cut every 256 elements; expanded, anywhere."""
    kinds = tuple(changed.get(i, "Q8_0") for i in range(7))
    matrices = MATRICES | {"attn_q": (256, 256), "attn_output": (256, 256)}
    matrices |= {"ffn_gate": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}
    metadata = METADATA | {"llama.block_count": 1, "llama.feed_forward_length": 256}
    source = write_model(tmp_path / "m.gguf", (kinds,), "Q8_0", "Q8_0", matrices, metadata)
    kind, message = same(ranks(error_of, [source] * 2, {}))
    assert kind == "ValueError" and f"2 processes cannot share {expected}" in message
    assert same(ranks(error_of, [source] * 2, {"expand": True})) == ("", "")


def test_an_error_of_one_rank_is_raised_by_both(
    ranks: Ranks, make_hf_model: Callable[..., Any], tmp_path: Path
) -> None:
    _, source = make_hf_model()
    missing = tmp_path / "elsewhere"
    missing.mkdir()
    first, second = ranks(error_of, [source, missing], {})
    assert first == (second[0], f"rank 1: {second[1]}")
    assert first[0] == "FileNotFoundError" and "elsewhere" in second[1]


def test_nonfinite_scales_are_told_by_their_row(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank looks at the scales of its part only; the error names the row of the file."""
    source = write_model(tmp_path / "m.gguf", LAYERS, matrices=MATRICES, metadata=QUANTIZED)
    whole = load(source, False)
    weight = whole.model.layers[0].get_submodule("mlp").get_submodule("up_proj").weight
    assert weight.quant_type == "Q3_K"
    stored = bytes(weight.blocks[700].numpy())
    data = bytearray(source.read_bytes())
    data[data.index(stored) + 108 : data.index(stored) + 110] = b"\x00\x7c"
    source.write_bytes(data)
    first, second = ranks(error_of, [source] * 2, {})
    assert "stored row 700 has a block scale" in second[1]
    assert first == (second[0], f"rank 1: {second[1]}")
    assert same(ranks(error_of, [source] * 2, {"allow_nonfinite": True})) == ("", "")


def reasons(source: Path) -> tuple[str | None, str | None, list[str]]:
    model = load(source, True)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("minitron_kernels.generate")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    Engine(model, None, 16)
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)
    return graphs.why_not(model), cpu_graphs.why_not(model), messages


def test_steps_are_not_recorded(ranks: Ranks, make_hf_model: Callable[..., Any]) -> None:
    """A recorded step would leave out what the ranks exchange; the reason is logged."""
    in_graphs, recorded, messages = same(ranks(reasons, make_hf_model()[1]))
    assert in_graphs is not None and recorded is not None
    assert f"decoding without recorded steps: {recorded}" in messages


@pytest.mark.parametrize(("value", "error"), [(True, ValueError), ("auto", TypeError)])
def test_tensor_parallel_needs_a_group(
    value: Any, error: type[Exception], make_hf_model: Callable[..., Any]
) -> None:
    with pytest.raises(error, match="tensor_parallel"):
        MinitronForCausalLM.from_pretrained(make_hf_model()[1], tensor_parallel=value)


# ------------------------------------------------------------------------------ command line


def torchrun(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, "-m", "minitron_kernels", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=env,
    )


def test_command_line(smollm2_gguf: Path) -> None:
    """The prompt comes from standard input, and there is one result."""
    args = ["generate", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "8", "--json"]
    args += ["--model", str(smollm2_gguf)]
    done = torchrun(*args, stdin="The capital of France is")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    model = load(smollm2_gguf, False, dtype="float32")
    (expected,) = generate(model, None, [result["prompt_ids"]], SamplingParams(max_new_tokens=8))
    assert result["token_ids"] == expected.token_ids
    assert "Paris" in result["text"]
    # This rank's part, a little more than half: it has two of three KV heads.
    weights = sum(w.nbytes for w in model.parameters())
    own = sum(entry["bytes"] for entry in result["weights"].values())
    assert 0.45 * weights < own < 0.62 * weights


@pytest.mark.gpu
def test_command_line_on_two_gpus(smollm2_gguf: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    args = ["generate", "The capital of France is", "--device", "cuda", "--max-new-tokens", "8"]
    done = torchrun(*args, "--model", str(smollm2_gguf), "--json")
    assert done.returncode == 0, done.stderr
    assert "Paris" in json.loads(done.stdout)["text"]


def test_command_line_tells_of_an_error_once(tmp_path: Path) -> None:
    done = torchrun("generate", "hi", "--model", str(tmp_path / "missing.gguf"))
    assert done.returncode != 0
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "missing.gguf" in told[0], done.stderr
    assert "exitcode  : 2" in done.stderr  # of the ranks, as torchrun reports it


def test_command_line_of_one_process_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the first process says so."""
    told = []
    for rank in ("0", "1"):
        for name, value in {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, value)
        assert main(["quantize", str(tmp_path), "out.gguf", "--type", "Q8_0"]) == 2
        told.append(capfd.readouterr().err)
    assert told[0].startswith("error: quantize runs in one process") and told[1] == ""

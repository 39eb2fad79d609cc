"""Other runtimes as sides of `minitron bench --compare`, on the same weights: they are optional."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron_kernels.bench import Clock, Prompts, RunTimes, Side
from minitron_kernels.model import MinitronForCausalLM
from minitron_kernels.quantized import QuantizedTensor

NAMES = ("transformers", "llama-cpp")


def parse(names: str) -> tuple[str, ...]:
    """Those of a list with commas; raises ValueError for one that is not known or not installed."""
    chosen = tuple(filter(None, (name.strip() for name in names.split(","))))
    for name in chosen:
        if name not in NAMES:
            raise ValueError(f"cannot compare with {name!r}; known are {', '.join(NAMES)}")
        package = name.replace("-", "_")
        if importlib.util.find_spec(package) is None:
            wanted = {"llama-cpp": "llama-cpp-python"}.get(name, name)
            raise ValueError(f"{name} is not installed (pip install {wanted})")
    return chosen


def make(
    names: Sequence[str],
    model: MinitronForCausalLM,
    path: Path,
    clock: Clock = time.perf_counter,
) -> list[Side]:
    """The sides of these names, with the weights of `model`, which was loaded from `path`."""
    makers: dict[str, Callable[[], Side]] = {
        "transformers": lambda: Transformers(model, clock),
        "llama-cpp": lambda: LlamaCpp(path, model, clock),
    }
    return [makers[name]() for name in names]


class Transformers:
    """transformers' eager model (MistralForCausalLM, its default attention and cache) in a loop of
    argmax, which does less than its generate(). Quantised weights are expanded, as it does."""

    name = "transformers"
    version: str | None = None

    def __init__(self, model: MinitronForCausalLM, clock: Clock = time.perf_counter) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        with torch.device("meta"), _default_dtype(model.dtype):
            self._model: Any = MistralForCausalLM(MistralConfig(**model.config.to_hf()))
        self._device, self._clock = model.device, clock
        self._model.to_empty(device=model.device).eval()
        # Its buffers are no weights.
        rotary = self._model.model.rotary_emb
        self._model.model.rotary_emb = type(rotary)(self._model.config, device=model.device)
        weights = {
            name: w.dequantize(model.dtype) if isinstance(w, QuantizedTensor) else w
            for name, w in model.state_dict().items()
        }
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self._model.tie_weights()

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> RunTimes:
        times = RunTimes(prefill_tokens=sum(map(len, prompts)))
        started = last = self._clock()
        ids = torch.tensor(prompts, device=self._device)
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        for i in range(new_tokens):
            if i:
                out = self._model(ids, past_key_values=out.past_key_values, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            ids.tolist()  # as whoever generates text does
            now = self._clock()
            if i:
                times.gaps += [now - last] * len(prompts)
            else:
                times.prefill_seconds = now - started
                times.first = [times.prefill_seconds] * len(prompts)
            last = now
        times.decode_tokens = len(prompts) * (new_tokens - 1)
        times.decode_seconds = last - started - times.prefill_seconds
        return times


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LlamaCpp:
    """llama-cpp-python on the model's own GGUF file, one sequence, argmax of its logits."""

    name = "llama-cpp"
    version: str | None = None

    def __init__(
        self, path: Path, model: MinitronForCausalLM, clock: Clock = time.perf_counter
    ) -> None:
        self._path, self._model, self._clock = path, model, clock
        self._llama: Any = None

    def _loaded(self, num_tokens: int) -> Any:
        if self._path.suffix != ".gguf":
            raise ValueError(f"llama.cpp reads GGUF files, not {self._path.name}")
        if self._llama is None:
            import llama_cpp

            self.version = getattr(llama_cpp, "__version__", None)
            threads = torch.get_num_threads()
            self._llama = llama_cpp.Llama(
                str(self._path), n_ctx=num_tokens, n_batch=512, n_threads=threads,
                n_threads_batch=threads, logits_all=False, verbose=False,
                n_gpu_layers=-1 if self._model.device.type == "cuda" else 0,
            )  # fmt: skip
        return self._llama

    def run(self, prompts: Prompts, new_tokens: int) -> RunTimes:
        if len(prompts) > 1:
            raise ValueError("llama-cpp-python generates one sequence at a time")
        (prompt,) = prompts
        llama = self._loaded(len(prompt) + new_tokens + 1)
        times = RunTimes(prefill_tokens=len(prompt), decode_tokens=new_tokens - 1)
        llama.reset()
        started = last = self._clock()
        ids = list(prompt)
        for i in range(new_tokens):
            llama.eval(ids)
            ids = [int(llama.sample(temp=0.0))]
            now = self._clock()
            if i:
                times.gaps.append(now - last)
            else:
                times.prefill_seconds = now - started
                times.first = [times.prefill_seconds]
            last = now
        times.decode_seconds = last - started - times.prefill_seconds
        return times

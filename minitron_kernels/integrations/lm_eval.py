"""lm-evaluation-harness (`pip install 'minitron_kernels[eval]'`): a model class, and a runner.

lm-eval finds models of other packages by their import only, so it is run from here: `evaluate`, or
`minitron eval`. With this module imported, `simple_evaluate(model="minitron", ...)` works as well.
Scores are those of lm-eval's own `HFLM` on the same weights; what differs is how they are computed
(`minitron_kernels.scoring`, and the continuous batching of `minitron_kernels.generate`).
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.group import Group
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from minitron_kernels.generate import stream
from minitron_kernels.loaders.tokenizer import AutoTokenizer, Tokenizer
from minitron_kernels.model import MinitronForCausalLM
from minitron_kernels.sampling_params import SamplingParams
from minitron_kernels.scoring import score_continuations

# Definitions that lm-eval lacks.
TASKS = Path(__file__).parent / "tasks"
DEFAULT_BATCH_SIZE = 64
PACKAGE = "minitron_kernels"

# The two texts of a request, if it is one of a task's, and their token ids.
_Tokens = tuple[tuple[str, str] | None, list[int], list[int]]

# Generation options of tasks that say what is the case anyway.
_NEUTRAL = {"num_beams": 1, "use_cache": True, "num_return_sequences": 1}


@register_model("minitron")
class MinitronLM(TemplateLM):  # type: ignore[misc]
    """A model of this package, as lm-eval wants it.

    ``pretrained``: a loaded model, whose ``tokenizer`` must be given then, or what
    `MinitronForCausalLM.from_pretrained` takes, as it takes ``options``. ``batch_size`` bounds the
    sequences computed at a time ("auto": 64); ``max_length`` the tokens, below the model's context.
    """

    def __init__(
        self,
        pretrained: MinitronForCausalLM | str,
        tokenizer: Tokenizer | str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, MinitronForCausalLM):
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer: give tokenizer=")
            self.model = pretrained
        else:
            self.model = MinitronForCausalLM.from_pretrained(pretrained, **options)
            tokenizer = pretrained if tokenizer is None else tokenizer
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, options.get("revision"))
        self.tokenizer = tokenizer
        self.max_length = self.model.config.max_position_embeddings
        if max_length is not None:
            if not 0 < max_length <= self.max_length:
                raise ValueError(f"max_length must be 1..{self.max_length}, got {max_length}")
            self.max_length = max_length
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = DEFAULT_BATCH_SIZE if automatic else int(batch_size)  # type: ignore[arg-type]
        if automatic and max_batch_size is not None:
            self.batch_size = min(self.batch_size, int(max_batch_size))
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if self.tokenizer.bos_token_id is None and self.eot_token_id is None:
            raise ValueError(
                f"{self.tokenizer.source}: neither a BOS nor an EOS token, one of which stands for "
                "an empty context"
            )
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token, or None."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, or else the end-of-text token."""
        bos = self.tokenizer.bos_token_id
        prefix = self.eot_token_id if bos is None else bos
        assert prefix is not None
        return prefix

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm-eval caches requests."""
        return self.tokenizer.source.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of the model beside the results."""
        return {
            "model_num_parameters": self.model.config.num_parameters,
            "model_dtype": str(self.model.dtype),
            "model_source": self.model.config.source,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids, with the special tokens of the tokenizer unless the text begins with them."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, prefix)
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The dialogue as one text; without ``add_generation_prompt`` its last message is open."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        if not add_generation_prompt:
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def _loglikelihood_tokens(
        self,
        requests: list[_Tokens],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        with tqdm(
            total=len(requests), desc="log-likelihoods", unit=" requests", disable=disable_tqdm
        ) as bar:
            answers = score_continuations(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, longer ones in windows, each token predicted once."""
        windows: list[_Tokens] = []
        ends = []
        for (text,) in (request.args for request in requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = []
        for request, start, end in zip(requests, [0, *ends], ends, strict=False):
            totals.append(sum(scores[start:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, by each request's own generation options."""
        prompts, params, stops = [], [], []
        for context, options in (request.args for request in requests):
            sampling, stop = self._sampling(options)
            assert sampling.max_new_tokens is not None
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"{sampling.max_new_tokens} new tokens leave no room for a prompt in the "
                    f"model's context of {self.max_length}"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            prompts.append(ids[-room:])
            params.append(sampling)
            stops.append(stop)
        # The longest first: what is left for the end takes little time.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        run = stream(
            self.model,
            self.tokenizer,
            [prompts[i] for i in order],
            [params[i] for i in order],
            max_batch_size=self.batch_size,
        )
        with tqdm(
            total=len(requests), desc="generation", unit=" requests", disable=disable_tqdm
        ) as bar:
            for event in run:
                bar.update(event.finish_reason is not None)
        texts = [""] * len(requests)
        for i, result in zip(order, run.results, strict=True):
            texts[i] = postprocess_generated_text(result.text, stops[i], None)
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _sampling(self, options: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """A task's generation options as `SamplingParams`, and its stop strings."""
        given = {name: value for name, value in options.items() if value is not None}
        options = {**normalize_gen_kwargs(given)}
        eos = self.tokenizer.eos_token
        stop = [text for text in handle_stop_sequences(options.pop("until"), eos) if text]
        do_sample, max_new = options.pop("do_sample"), options.pop("max_gen_toks")
        temperature = options.pop("temperature", 1.0 if do_sample else 0.0)
        for name, value in _NEUTRAL.items():
            if options.get(name) == value:
                del options[name]
        known = {field.name for field in fields(SamplingParams)}
        if unknown := options.keys() - known:
            raise NotImplementedError(
                f"generation option {min(unknown)!r} is not supported; accepted: until, do_sample, "
                f"max_gen_toks, {', '.join(sorted(known))}"
            )
        # Special tokens have no text in a result, so a stop string that is one is found by its id.
        to_text = self.tokenizer.convert_ids_to_tokens
        ids = [id for id in self.tokenizer.all_special_ids if to_text(id) in stop]
        return (
            SamplingParams(
                temperature=temperature if do_sample else 0.0,
                max_new_tokens=max_new,
                stop=tuple(stop),
                stop_token_ids=tuple(ids),
                **options,
            ),
            stop,
        )


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> list[Any]:
    """Tasks and groups by name, pattern (``mmlu_*``) or path of a YAML file, data sets included.

    ``include_path`` is a folder of definitions that come before those of this package and of
    lm-eval. Raises ValueError for an unknown name, with those that are close, and for a definition
    or a data set that cannot be loaded.
    """
    folders = [TASKS] if include_path is None else [TASKS, include_path]
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"{include_path}: no such folder")
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(_find(manager, name) for name in names):
        # lm-eval's own 14,000 definitions take 10 seconds to list.
        manager = TaskManager(include_path=folders)
    loaded: dict[str, Any] = {}
    for name in names:
        found = _find(manager, name)
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"unknown task {name!r}{hint}")
        for each in found:
            try:
                part = manager.load([each])
            except Exception as error:  # of YAML, of the task's code, of the data set, of the Hub
                raise ValueError(f"cannot load task {each!r}: {_told(error)}") from error
            groups = part.get("groups", {})
            loaded |= {each: groups[each]} if each in groups else part["tasks"]
    return list(loaded.values())


def _find(manager: TaskManager, name: str) -> list[str]:
    if name in manager.task_index:
        return [name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return [name]
    return fnmatch.filter(manager.all_tasks, name) if set(name) & set("*?[") else []


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def evaluate(
    model: MinitronForCausalLM,
    tokenizer: Tokenizer,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | None = None,
    chat_template: bool = False,
    run_unsafe_code: bool = False,
    log_samples: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's `simple_evaluate` of a model on what `load_tasks` gave; its result.

    ``num_fewshot``: examples before each question (None: as the task says). ``limit``: documents of
    each task, or below 1 their share. ``run_unsafe_code`` allows tasks that execute what the model
    wrote, such as mbpp. ``log_samples`` adds every document with its answers. ``options`` are
    others of simple_evaluate. Added to the result: ``seconds``, those of the evaluation.
    """
    from lm_eval import simple_evaluate

    for task in tasks:
        for each in task.get_all_tasks() if isinstance(task, Group) else [task]:
            if getattr(each, "UNSAFE_CODE", False) and not run_unsafe_code:
                raise ValueError(
                    f"task {each.task_name} executes code that the model wrote; to allow it: "
                    "--run-unsafe-code, run_unsafe_code=True"
                )
    lm = MinitronLM(model, tokenizer, batch_size=batch_size)
    started = time.perf_counter()
    results: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=lm.batch_size,
        device=str(model.device),
        apply_chat_template=chat_template,
        confirm_run_unsafe_code=run_unsafe_code,
        log_samples=log_samples,
        task_manager=TaskManager(include_defaults=False),
        **options,
    )
    return {**results, "seconds": time.perf_counter() - started}


def report(results: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """What `minitron eval --json` prints: scores by task, and what they depend on."""
    kept = ("results", "groups", "n-shot", "versions", "higher_is_better", "n-samples", "config")
    parts = {key: results[key] for key in kept if results.get(key)}
    versions = {"lm_eval": results["lm_eval_version"], "minitron_kernels": version(PACKAGE)}
    summary = {"model": model, **parts, "packages": versions, "seconds": results["seconds"]}
    return {key: as_json(value) for key, value in summary.items()}


def as_json(value: Any) -> Any:
    """``value`` as JSON takes it: numbers that are not finite become null, objects text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's tables of the scores of tasks and of groups."""
    parts = [utils.make_table(results)]
    if results.get("groups"):
        parts.append(utils.make_table(results, "groups"))
    return "\n".join(part.strip() + "\n" for part in parts)

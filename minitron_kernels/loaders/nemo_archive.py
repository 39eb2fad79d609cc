"""The files in a .nemo archive: a tar, plain or compressed by gzip, or the folder it unpacks to.

Nothing in an archive is trusted. Members are plain files whose names stay inside; their sizes are
held against the file before anything is read, and no name reaches the file system: a compressed
archive is unpacked into numbered files of a temporary folder.
"""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from minitron_kernels.loaders.files import require_file

# Bounds that no real archive comes near.
_MAX_MEMBERS = 1 << 17
_MAX_READ = 16 << 20  # at once, from a tar: long names and extended headers
# Weights hardly compress; what expands more than this is no checkpoint.
_MAX_EXPANSION = 32
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of the archive: bytes ``offset`` ... ``offset + size`` of ``path``."""

    path: Path
    offset: int
    size: int

    def read(self, limit: int, name: str) -> bytes:
        """The content, which must not be longer than ``limit``."""
        if self.size > limit:
            raise ValueError(f"{name}: {self.size} bytes, more than the {limit} accepted")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{name}: truncated")
        return data

    def map(self) -> npt.NDArray[np.uint8]:
        """The content, memory-mapped: writing to it never reaches the file."""
        if not self.size:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "c", self.offset, (self.size,))


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Member]]:
    """The files of the archive by name.

    What is mapped while the context lasts stays readable; a compressed archive's files are gone
    after it.
    """
    if path.is_dir():
        yield _folder_members(path)
        return
    require_file(path)
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if not is_gzip:
        yield _tar_members(path)
        return
    with tempfile.TemporaryDirectory(prefix="minitron-nemo-") as folder:
        yield _unpack(path, Path(folder))


def _folder_members(folder: Path) -> dict[str, Member]:
    members = {}
    for file in sorted(folder.rglob("*")):
        if file.is_symlink():
            raise ValueError(f"{file}: a link, which an unpacked .nemo does not have")
        if file.is_file():
            members[file.relative_to(folder).as_posix()] = Member(file, 0, file.stat().st_size)
    return members


def _tar_members(path: Path) -> dict[str, Member]:
    """Where the members of an uncompressed tar lie in it."""
    size = path.stat().st_size
    members = {}
    with path.open("rb") as file:
        for name, entry in _entries(path, file, size):
            if entry.offset_data + entry.size > size:
                raise ValueError(f"{path}: truncated: {name!r:.80} ends beyond the file")
            members[name] = Member(path, entry.offset_data, entry.size)
    return members


def _unpack(path: Path, folder: Path) -> dict[str, Member]:
    """Unpack a compressed tar into ``folder``; its members are there then."""
    limit = _MAX_EXPANSION * path.stat().st_size + _MAX_READ
    members = {}
    try:
        with gzip.open(path) as file:
            stream = cast(IO[bytes], file)
            for number, (name, entry) in enumerate(_entries(path, stream, limit)):
                free = shutil.disk_usage(folder).free
                if entry.size > free:
                    raise OSError(
                        f"{path}: {name!r:.80} needs {entry.size} bytes of disk in {folder.parent} "
                        f"(TMPDIR), {free} are free"
                    )
                target = folder / str(number)  # no name of the archive reaches the file system
                with target.open("wb") as out:
                    _copy(stream, out, entry, f"{path}: {name!r:.80}")
                members[name] = Member(target, 0, entry.size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip: {error}") from None
    return members


def _copy(stream: IO[bytes], out: IO[bytes], entry: tarfile.TarInfo, what: str) -> None:
    stream.seek(entry.offset_data)
    left = entry.size
    while left:
        data = stream.read(min(left, _COPY_BYTES))
        if not data:
            raise ValueError(f"{what}: truncated")
        out.write(data)
        left -= len(data)


class _Bounded(io.RawIOBase):
    """A stream that refuses to be read far at once, or beyond ``limit`` bytes from its start."""

    def __init__(self, stream: IO[bytes], limit: int, path: Path) -> None:
        self._stream, self._limit, self._path = stream, limit, path

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ:
            raise ValueError(f"{self._path}: a tar header of {size} bytes")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._check(offset)
        return self._stream.seek(offset)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _check(self, end: int) -> None:
        if end > self._limit + tarfile.RECORDSIZE:
            raise ValueError(
                f"{self._path}: truncated, or its members are larger than {self._limit} bytes, "
                "the most that is accepted of a file of its size"
            )


def _entries(path: Path, stream: IO[bytes], limit: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files in a tar, their names cleaned of "./"; what is no plain file inside is refused."""
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=_Bounded(stream, limit, path), mode="r:") as archive:
            for entry in archive:
                name = _inner_name(path, entry.name)
                if len(seen) >= _MAX_MEMBERS:
                    raise ValueError(f"{path}: more than {_MAX_MEMBERS} members")
                if name in seen and not entry.isdir():
                    raise ValueError(f"{path}: {name!r:.80} is there twice")
                seen.add(name)
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse() or entry.size < 0:
                    raise ValueError(
                        f"{path}: {name!r:.80} is no plain file (a link, a device, a sparse file)"
                    )
                yield name, entry
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar as NeMo writes, or truncated: {error}") from None


def _inner_name(path: Path, name: str) -> str:
    inner = PurePosixPath(name)
    if inner.is_absolute() or ".." in inner.parts or "\\" in name or not name.isprintable():
        raise ValueError(f"{path}: member {name!r:.80} leads outside of the archive")
    return str(inner)

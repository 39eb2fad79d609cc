"""Token ids into text one by one, as they come."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection
from typing import Protocol


class StreamDecoder(Protocol):
    """Turns token ids into text one by one; the pieces concatenate to `decode` of all the ids."""

    def push(self, token_id: int) -> str:
        """Text that became final with this token; "" while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end (an incomplete character becomes U+FFFD); starts afresh."""


class ByteStreamDecoder:
    """For byte-level vocabularies: tokens are bytes, so UTF-8 decides what is complete."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class WindowStreamDecoder:
    """For any other vocabulary: decode a window of recent tokens, and emit what it gained.

    The window holds the tokens of the last emitted piece as context, because decoders treat the
    first token of a text differently (its leading space goes). A run of byte tokens `<0xNN>` is
    decoded as a whole, so it is held until it ends.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        token_text: Callable[[int], str | None],
        skipped: Collection[int],
    ) -> None:
        self._decode, self._token_text, self._skipped = decode, token_text, skipped
        self._window: list[int] = []
        self._num_context = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", self._token_text(token_id) or ""):
            return ""
        return self._emit()

    def flush(self) -> str:
        rest = self._emit()
        self._window, self._num_context = [], 0
        return rest

    def _emit(self) -> str:
        context = self._decode(self._window[: self._num_context])
        delta = self._decode(self._window)[len(context) :]
        if delta:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
        return delta

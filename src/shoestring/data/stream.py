"""Plain text as a stream: sources of any size, one language, no repeats, a number of bytes, and on from a place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoestring.core.errors import UsageError
from shoestring.data.formats import rows
from shoestring.data.rows import BadRow


@dataclass(frozen=True)
class Place:
    """How far a stream was read; plain data, to be stored beside a checkpoint.

    Attributes:
        texts: how many were given out.
        bytes: their length in UTF-8.
        digest: hash of all of them, so that a source that changed meanwhile is noticed.
    """

    texts: int = 0
    bytes: int = 0
    digest: str = ""


class TextStream:
    """The texts of one or more sources (files or hub ids, as `data.read` takes them), one after another.

    A text that was there before, up to case and spaces, is left out. Going on from a place reads what lies before it
    again, without giving it out.

    Args:
        max_bytes: the first text that would go beyond it ends the stream.
        language: take only rows whose `language_field` says so; rows without the field are left out.
        field: where a row has its text.
        keep: says of a text whether to take it.
        place: where to go on.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        *,
        max_bytes: int | None = None,
        language: str | None = None,
        field: str = "text",
        language_field: str = "language",
        keep: Callable[[str], bool] | None = None,
        place: Place | None = None,
    ) -> None:
        if not sources:
            raise UsageError("a stream needs at least one source")
        if max_bytes is not None and max_bytes < 1:
            raise UsageError(f"max_bytes={max_bytes} leaves no text", remedy="Give 1 or more, or None for no bound")
        self.sources, self.max_bytes, self.language = list(sources), max_bytes, language
        self.field, self.language_field, self.keep = field, language_field, keep
        self.start = place or Place()
        self.place = self.start

    def __iter__(self) -> Iterator[str]:
        """The texts from the stream's beginning, or from the place it was made with.

        Raises:
            UsageError: a source cannot be read, or is no longer what was read up to that place.
        """
        self.place, given, size, digest = self.start, 0, 0, hashlib.sha256()
        for text in self._chosen():
            length = len(text.encode())
            if self.max_bytes is not None and size + length > self.max_bytes:
                break
            given, size = given + 1, size + length
            digest.update(hashlib.sha256(text.encode()).digest())
            if given < self.start.texts:
                continue
            now = Place(given, size, digest.hexdigest())
            if given == self.start.texts:
                if now != self.start:
                    raise self._changed()
                continue
            self.place = now
            yield text
        if given < self.start.texts:
            raise self._changed()

    def _chosen(self) -> Iterator[str]:
        seen: set[bytes] = set()
        for source in self.sources:
            for line, row in rows(source):
                if isinstance(row, BadRow):
                    raise UsageError(f"{source}:{line}: {row}", remedy="Mend the line, or leave the source out")
                if not isinstance(row, Mapping) or not isinstance(row.get(self.field), str):
                    raise UsageError(f"{source}:{line}: has no text in {self.field!r}", remedy="Name the right field")
                if self.language is not None and row.get(self.language_field) != self.language:
                    continue
                text = row[self.field].strip()
                key = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=12).digest()
                if not text or key in seen or (self.keep is not None and not self.keep(text)):
                    continue
                seen.add(key)
                yield text

    def _changed(self) -> UsageError:
        return UsageError(
            f"the text is no longer what was read up to text {self.start.texts}",
            f"one of {', '.join(map(str, self.sources))}, or a setting of the stream, has changed",
            "Begin anew, or bring the sources back",
        )

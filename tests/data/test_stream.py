from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest

from shoestring.core.errors import UsageError
from shoestring.data.stream import Place, TextStream

TEXTS = ["Uno due.", "tre", "UNO  due.", "quattro è", "  ", "cinque", "tre"]
ONCE = ["Uno due.", "tre", "quattro è", "cinque"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    rows = [{"text": text, "language": "ita" if i != 5 else "deu"} for i, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_repeats_and_empty_texts_are_left_out(file: Path) -> None:
    assert list(TextStream([file])) == ONCE
    assert list(TextStream([file, file])) == ONCE, "repeats between sources"


def test_language_and_filter(file: Path) -> None:
    assert list(TextStream([file], language="deu")) == ["cinque"]
    assert list(TextStream([file], language="ita", keep=lambda text: len(text) > 3)) == ["Uno due.", "quattro è"]


def test_sources_of_every_form(tmp_path: Path, file: Path) -> None:
    (tmp_path / "b.txt").write_text("Ein\nAbsatz\n\nZwei\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as packed:
        packed.write('{"sentence": "Drei"}\n')
    assert list(TextStream([tmp_path / "b.txt", file]))[:3] == ["Ein\nAbsatz", "Zwei", "Uno due."]
    assert list(TextStream([tmp_path / "c.jsonl.gz"], field="sentence")) == ["Drei"]


@pytest.mark.parametrize(("cap", "count"), [(8, 1), (10, 1), (11, 2), (20, 2), (21, 3), (None, 4)])
def test_the_cap_counts_bytes(file: Path, cap: int | None, count: int) -> None:
    stream = TextStream([file], max_bytes=cap)
    assert list(stream) == ONCE[:count]
    assert stream.place.bytes == sum(len(text.encode()) for text in ONCE[:count])


@pytest.mark.parametrize("after", range(5))
def test_going_on_from_a_place_gives_the_rest(file: Path, after: int) -> None:
    first = TextStream([file])
    begun = list(islice(first, after))
    place = Place(**json.loads(json.dumps(asdict(first.place))))
    second = TextStream([file], place=place)
    assert begun + list(second) == ONCE
    whole = TextStream([file])
    list(whole)
    assert second.place == whole.place


def test_a_source_that_changed_is_noticed(file: Path) -> None:
    stream = TextStream([file])
    list(islice(stream, 3))
    original = file.read_text()
    for changed in (original.replace("tre", "sei"), original.splitlines(keepends=True)[0]):
        file.write_text(changed)
        with pytest.raises(UsageError, match="no longer what was read up to text 3"):
            list(TextStream([file], place=stream.place))


def test_reading_does_not_run_ahead(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "gut"}\n{"text": "auch"}\nnone\n')
    stream = iter(TextStream([path]))
    assert [next(stream), next(stream)] == ["gut", "auch"]
    with pytest.raises(UsageError, match=r"a.jsonl:3: is not JSON"):
        next(stream)


def test_settings_and_rows_that_cannot_be(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one source"):
        TextStream([])
    with pytest.raises(UsageError, match="max_bytes=0"):
        TextStream([file], max_bytes=0)
    with pytest.raises(UsageError, match="has no text in 'content'"):
        list(TextStream([file], field="content"))
    with pytest.raises(UsageError, match="does not exist"):
        list(TextStream([tmp_path / "none.jsonl"]))

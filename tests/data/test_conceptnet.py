from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from shoestring.core.errors import UsageError
from shoestring.data import conceptnet

ROWS = [
    ("/r/IsA", "/c/it/gatto/n", "/c/it/animale"),
    ("/r/IsA", "/c/it/gatto/n/wn/animal", "/c/it/animale/n"),  # the same words again
    ("/r/Synonym", "/c/it/porta_d'ingresso", "/c/en/front_door/n"),
    ("/r/PartOf", "/c/en/wheel", "/c/it/auto"),  # the start is of another language
    ("/r/ExternalURL", "/c/it/gatto", "http://it.dbpedia.org/resource/Gatto"),
    ("/r/RelatedTo", "/c/it/gatto", "http://example.org/c/it/cane"),
    ("/r/RelatedTo", "/c/it/gatto/n", "/c/it/gatto/v"),  # said of itself
    ("/r/dbpedia/genre", "/c/it/opera", "/c/it/musica"),  # no phrase
    ("/r/UsedFor", "/c/it/", "/c/it/x"),  # no word
    ("/r/UsedFor", "/c/it", "/c/it/x"),
    ("/r/UsedFor", "it/penna", "/c/it/x"),
    ("/r/UsedFor", "/c/ita/penna", "/c/it/x"),
    ("/r/UsedFor/", "/c/it/n/n", "/c/it/città_è/n"),  # a word that looks like a part of speech
]


def written(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    text = "".join(f"/a/[x]\t{r}\t{s}\t{e}\t{{}}\n" for r, s, e in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as packed:
            packed.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["assertions.csv", "assertions.csv.gz"])
def test_assertions_become_sentences(tmp_path: Path, name: str) -> None:
    assert list(conceptnet.sentences(written(tmp_path / name, ROWS), "it")) == [
        "gatto is a animale.", "porta d'ingresso is a synonym of front door.", "n is used for città è.",
    ]  # fmt: skip
    assert list(conceptnet.sentences(tmp_path / name, "en")) == ["wheel is part of auto."]


def test_every_relation_has_a_phrase_of_its_own(tmp_path: Path) -> None:
    rows = [(f"/r/{name}", "/c/it/a", "/c/it/b") for name in conceptnet.RELATIONS]
    found = list(conceptnet.sentences(written(tmp_path / "a.csv", rows), "it"))
    assert len(found) == len(conceptnet.RELATIONS) >= 32
    assert all(sentence.startswith("a ") and sentence.endswith(" b.") for sentence in found)


def test_what_is_no_assertion(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ROWS[:1])
    path.write_bytes(path.read_bytes() + b"/a/x\t/r/IsA\n")
    with pytest.raises(UsageError, match=r"a.csv:2: is no assertion. has 2 tab-separated cells"):
        list(conceptnet.sentences(path, "it"))
    path.write_bytes(b"\xe0\x41\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        list(conceptnet.sentences(path, "it"))
    with pytest.raises(UsageError, match="cannot be read"):
        list(conceptnet.sentences(tmp_path / "none.csv", "it"))


def test_the_split_does_not_depend_on_the_order() -> None:
    found = [f"w{i} is a x." for i in range(105)]
    parts = conceptnet.split(found)
    assert [len(part) for part in parts] == [85, 10, 10]
    assert sorted(sum(parts, [])) == sorted(found)
    assert conceptnet.split(found[::-1]) == parts and conceptnet.split(found, seed=1) != parts

"""Whatever the tokens are, the text is what cutting the whole text would give, and nothing settled is taken back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.engine.request import Sampling
from shoestring.engine.stopping import Stopped, TextStop

EOS, OTHER_EOS, STOP = 0, 1, 2


class Pieces:
    """A tokenizer whose token i >= 10 stands for the bytes pieces[i - 10]."""

    eos = (EOS, OTHER_EOS)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def stream(self, *, after: Sequence[int] = ()) -> _Stream:
        return _Stream(self.pieces)


class _Stream:
    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        known = (self.pieces[token - 10] if token >= 10 else b"<%d>" % token for token in ids)
        return "".join(map(self.decoder.decode, known))

    def finish(self) -> str:
        return self.decoder.decode(b"", True)


def _follow(pieces: list[str | bytes], chunk: int = 1, last: tuple[int, ...] = (), **settings: Any) -> list[Stopped]:
    """What pushing the pieces as one token each, `chunk` at a time, gives."""
    coded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    stop = TextStop(Pieces(coded), Sampling(**settings))
    tokens = [*range(10, 10 + len(coded)), *last]
    found = []
    for start in range(0, len(tokens), chunk):
        found.append(stop.push(tokens[start : start + chunk]))
        if found[-1].finished:
            return found
    return [*found, Stopped(stop.flush(), 0)]


def _text(found: list[Stopped]) -> str:
    return "".join(part.text for part in found)


def _cut(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """What should come out, by reading the text one character after another."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


_texts = st.text(alphabet="ab\n€🙂", max_size=30)
_stops = st.lists(st.text(alphabet="ab\n€🙂", min_size=1, max_size=6), max_size=4).map(tuple)


@given(_texts, _stops, st.booleans(), st.lists(st.integers(0, 120)), st.integers(1, 4), st.booleans())
def test_any_split_gives_the_text_cut_at_the_first_stop(
    text: str, stops: tuple[str, ...], include: bool, borders: list[int], chunk: int, ends: bool
) -> None:
    raw = text.encode()
    edges = [0, *sorted({border for border in borders if 0 < border < len(raw)}), len(raw)]
    pieces: list[str | bytes] = [raw[start:end] for start, end in zip(edges, edges[1:])]
    last = (EOS,) if ends else ()
    found = _follow(pieces, chunk, last, stop=stops, include_stop=include)
    expected, stop = _cut(text, stops, include)
    assert _text(found) == expected
    if stop is not None:
        assert (found[-1].finished, found[-1].stop_reason) == ("stop", stop)
        # The token that completes the stop string is the last that belongs to the answer.
        length = len(_cut(text, stops, True)[0].encode())
        used = next(index for index, edge in enumerate(edges[1:], 1) if edge >= length)
        assert sum(part.kept for part in found) == used
    else:
        assert found[-1].finished == ("stop" if ends else None)
        assert sum(part.kept for part in found) == len(pieces) + len(last)


@given(_texts, _stops, st.integers(0, 12), st.integers(1, 12))
def test_limits_hold_whatever_the_stops(text: str, stops: tuple[str, ...], least: int, most: int) -> None:
    found = _follow(list(text), stop=stops, min_tokens=least, max_tokens=most)
    count = sum(part.kept for part in found)
    assert count <= most
    if found[-1].finished == "length":
        assert count == most and _text(found) == text[:most]
    if found[-1].finished == "stop":
        assert count > least
        assert _text(found) == text[:least] + _cut(text[least:], stops, False)[0]


def test_text_comes_as_soon_as_it_is_settled() -> None:
    found = _follow(["Hel", "lo\n", "\nUs", "e", "er"], stop=("\n\nUser",))
    assert [part.text for part in found] == ["Hel", "lo", "", "", "\n\nUseer", ""]
    found = _follow(["Hel", "lo\n", "\nUs", "er:", "no"], stop=("\n\nUser",))
    assert [part.text for part in found] == ["Hel", "lo", "", ""]
    assert found[-1] == Stopped("", 1, "stop", "\n\nUser")


def test_without_stop_strings_nothing_is_held() -> None:
    assert [part.text for part in _follow(["a", "b", b"\xe2\x82", b"\xac"])] == ["a", "b", "", "€", ""]


@pytest.mark.parametrize("last", [(EOS,), (OTHER_EOS,), (STOP,)])
def test_ends_are_not_text_and_what_was_held_is_given_out(last: tuple[int, ...]) -> None:
    found = _follow(["a\n", b"\xf0\x9f"], last=last, stop=("\n\n",), stop_token_ids=(STOP,))
    assert _text(found) == "a\n�"
    assert found[-1].finished == "stop"
    assert found[-1].stop_reason == (STOP if last == (STOP,) else None)
    assert sum(part.kept for part in found) == 3


def test_a_stop_token_can_be_kept() -> None:
    assert _text(_follow(["a"], last=(STOP,), stop_token_ids=(STOP,), include_stop=True)) == "a<2>"


def test_ends_can_be_passed_over() -> None:
    found = _follow(["a"], last=(EOS, STOP, EOS), ignore_eos=True, stop_token_ids=(STOP,))
    assert _text(found) == "a<0>"
    assert found[-1].stop_reason == STOP


def test_what_follows_an_end_in_the_same_push_is_not_kept() -> None:
    found = _follow(["a", "b", "cXd", "e"], chunk=4, stop=("X",))
    assert found == [Stopped("abc", 3, "stop", "X")]


def test_the_limit_gives_out_what_was_held() -> None:
    found = _follow(["a", "\n", "never"], max_tokens=2, stop=("\n\n",))
    assert _text(found) == "a\n"
    assert found[-1].finished == "length"


def test_a_stop_at_the_limit_is_a_stop() -> None:
    assert _follow(["a", "X"], max_tokens=2, stop=("X",))[-1].finished == "stop"
    assert _follow(["a"], max_tokens=2, last=(EOS,))[-1].finished == "stop"

"""What every split must keep, whatever the groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UsageError
from shoestring.data import Corpus, Example, split

groups = st.lists(st.integers(0, 30), min_size=0, max_size=200)
fractions = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (1.0, 0.0, 0.0), (0.9, 0.0, 0.1), (1 / 3, 1 / 3, 1 / 3)])


def corpus_of(numbers, grouped=True):
    return Corpus(
        [
            Example(text=f"text {n} {i if grouped else ''}", group=f"g{n}" if grouped else "")
            for i, n in enumerate(numbers)
        ],
        "text",
    )


@settings(deadline=None)
@given(groups, fractions, st.integers(0, 5), st.booleans())
def test_invariants(numbers, parts, seed, grouped):
    corpus = corpus_of(numbers, grouped)
    result = split(corpus, parts, seed)
    assert split(corpus, parts, seed) == result
    assert len(result) == len(parts)
    place = {id(example): index for index, example in enumerate(corpus.examples)}
    where = {}
    for part, piece in enumerate(result):
        order = [place[id(example)] for example in piece.examples]
        assert order == sorted(order)
        assert parts[part] or not order
        for index in order:
            assert where.setdefault(numbers[index], part) == part
    assert sorted(place[id(e)] for piece in result for e in piece.examples) == list(range(len(numbers)))
    if len(set(numbers)) >= len(parts):
        assert all(piece.examples for piece, fraction in zip(result, parts) if fraction)
    largest = max((numbers.count(number) for number in set(numbers)), default=0)
    for piece, fraction in zip(result, parts):
        assert abs(len(piece) - fraction * len(numbers)) <= max(largest, 1) * len(parts)


def test_fractions_are_near_and_the_seed_matters():
    corpus = corpus_of(range(1000), grouped=False)
    one, two = split(corpus, seed=1), split(corpus, seed=2)
    assert [len(part) for part in one] == [800, 100, 100]
    assert one[2].examples != two[2].examples
    assert len({e.text for e in one[2].examples} & {e.text for e in two[2].examples}) < 30


def test_one_example_goes_to_the_first_part():
    assert [len(part) for part in split(corpus_of([1]))] == [1, 0, 0]


def test_wrong_fractions():
    for wrong in ((0.5, 0.1), (1.1, -0.1)):
        with pytest.raises(UsageError, match="do not add up to 1"):
            split(corpus_of([1]), wrong)

"""Divide a corpus so that no group, and no repeated example, stands in two parts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from shoestring.core.errors import UsageError
from shoestring.data.corpus import Corpus, Example


def split(corpus: Corpus, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> tuple[Corpus, ...]:
    """Divide `corpus` into one part per fraction (train, validation, test), each in the corpus's own order.

    Whole groups are dealt out; an example without a group is a group with its exact repeats. The same corpus,
    fractions and seed give the same parts on any machine. Parts have the asked sizes as nearly as groups allow, and
    a part asked for is empty only when there are fewer groups than parts.

    Raises:
        UsageError: a fraction below 0, or fractions that do not add up to 1.
    """
    if any(fraction < 0 for fraction in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise UsageError(
            f"split fractions {','.join(map(str, fractions))} do not add up to 1", remedy="For example 0.8,0.1,0.1"
        )
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(corpus.examples):
        groups[_group(example)].append(index)
    chance = {name: _chance(seed, name) for name in groups}
    # Large groups first, while every part still has room for them; within a size class the seed decides.
    order = sorted(groups, key=lambda name: (-len(groups[name]).bit_length(), chance[name], name))
    room = [fraction * len(corpus) for fraction in fractions]
    parts: list[list[str]] = [[] for _ in fractions]
    for name in order:
        size = len(groups[name])
        free = [left if left >= size and fraction else 0.0 for left, fraction in zip(room, fractions)]
        part = _pick(free, _chance(seed, "part:" + name)) if any(free) else _roomiest(room, fractions)
        parts[part].append(name)
        room[part] -= size
    for index, fraction in enumerate(fractions):
        donor = max(parts, key=len)
        if fraction and not parts[index] and len(donor) > 1:
            smallest = min(donor, key=lambda name: (len(groups[name]), chance[name], name))
            donor.remove(smallest)
            parts[index].append(smallest)
    return tuple(
        corpus.part([corpus.examples[index] for index in sorted(index for name in part for index in groups[name])])
        for part in parts
    )


def parts_of(corpus: Corpus, seed: int, *, choosing: bool = True) -> tuple[Corpus, Corpus, Corpus]:
    """The train, validation and test parts of `split`, none of them empty.

    Args:
        choosing: whether something is chosen on the validation part; without it that part may be empty.

    Raises:
        UsageError: the data has too few groups to be split so.
    """
    train, valid, test = split(corpus, seed=seed)
    if not (len(train) and (len(valid) or not choosing) and len(test)):
        raise UsageError(
            f"{corpus.source} has too little in it to split: {len(corpus)} examples give parts of {len(train)}, "
            f"{len(valid)} and {len(test)}",
            f"training{', choosing and judging each' if choosing else ' and judging both'} need examples of their own, "
            "and those that are alike stay together",
            f"Bring more examples, or more than {'two groups' if choosing else 'one group'} of them",
        )
    return train, valid, test


def _group(example: Example) -> str:
    return "group:" + example.group if example.group else "content:" + example.fingerprint()


def _chance(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _pick(weights: Sequence[float], chance: float) -> int:
    mark = chance * sum(weights)
    for index, weight in enumerate(weights):
        mark -= weight
        if mark < 0:
            return index
    return max(range(len(weights)), key=weights.__getitem__)


def _roomiest(room: Sequence[float], fractions: Sequence[float]) -> int:
    return max((index for index, fraction in enumerate(fractions) if fraction), key=room.__getitem__)

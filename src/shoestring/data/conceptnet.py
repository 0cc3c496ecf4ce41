"""Sentences from ConceptNet's dump of assertions: relations of one language's words, said in English phrases."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from shoestring.core.errors import UsageError
from shoestring.data.formats import lines

RELATIONS = {
    "RelatedTo": "is related to", "FormOf": "is a form of", "IsA": "is a", "PartOf": "is part of", "HasA": "has",
    "UsedFor": "is used for", "CapableOf": "is capable of", "AtLocation": "is found at", "Causes": "causes",
    "HasSubevent": "has the subevent", "HasFirstSubevent": "begins with", "HasLastSubevent": "ends with",
    "HasPrerequisite": "requires", "HasProperty": "has the property", "MotivatedByGoal": "is motivated by",
    "ObstructedBy": "is obstructed by", "Desires": "desires", "CreatedBy": "is created by",
    "Synonym": "is a synonym of", "Antonym": "is an antonym of", "DistinctFrom": "is distinct from",
    "DerivedFrom": "is derived from", "SymbolOf": "is a symbol of", "DefinedAs": "is defined as",
    "MannerOf": "is a manner of", "LocatedNear": "is located near", "HasContext": "is used in the context of",
    "SimilarTo": "is similar to", "EtymologicallyRelatedTo": "is etymologically related to",
    "EtymologicallyDerivedFrom": "is etymologically derived from", "CausesDesire": "causes the desire for",
    "MadeOf": "is made of", "ReceivesAction": "can be", "InstanceOf": "is an instance of",
}  # fmt: skip


def sentences(dump: Path | str, language: str) -> Iterator[str]:
    """ "<start> <phrase> <end>." for every assertion whose start is a word of `language`, each sentence once.

    Left out are ends that are web addresses, words said of themselves, and relations that no phrase is known for.

    Args:
        dump: assertions.csv as ConceptNet publishes it, tab-separated, packed by gzip or not.
        language: ConceptNet's code, such as "it".

    Raises:
        UsageError: a line that is not an assertion; no such file.
    """
    seen: set[str] = set()
    for number, line in lines(dump):
        cells = line.split("\t") if isinstance(line, str) else []
        if len(cells) < 4:
            why = f"has {len(cells)} tab-separated cells" if isinstance(line, str) else str(line)
            raise UsageError(f"{dump}:{number}: is no assertion", why, "Give ConceptNet's assertions.csv or .csv.gz")
        relation, (start_language, start), (_, end) = RELATIONS.get(_last(cells[1])), _word(cells[2]), _word(cells[3])
        if relation is None or start_language != language or not start or not end or start == end:
            continue
        sentence = f"{start} {relation} {end}."
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def split(found: list[str], seed: int = 42) -> tuple[list[str], list[str], list[str]]:
    """80, 10 and 10 per cent for training, validation and test."""
    order = sorted(found)
    random.Random(seed).shuffle(order)
    tenth = len(order) // 10
    return order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]


def _last(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _word(uri: str) -> tuple[str, str]:
    """(language, word) of a node /c/xx/word, whatever part of speech and sense follow; empty for any other."""
    parts = uri.split("/")
    if len(parts) < 4 or parts[:2] != ["", "c"]:
        return "", ""
    return parts[2], parts[3].replace("_", " ").strip()

"""The built-in set: real, large, without leaks, the same each time."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from shoestring.data import builtin, read, split


@pytest.fixture(scope="module")
def corpus():
    return read("python-docs")


def test_thousands_of_real_pairs(corpus):
    assert len(corpus) > 3000
    assert len({example.group for example in corpus.examples}) > 100
    pairs = {example.messages[0]["content"].split("`")[1]: example for example in corpus.examples}
    example = pairs["json.dumps"]
    assert "def dumps(obj, *, skipkeys=False" in example.messages[0]["content"]
    assert example.messages[1]["content"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")
    assert example.group == "json"
    assert "def sqrt(x, /): ..." in pairs["math.sqrt"].messages[0]["content"]
    assert "class Counter(dict)" in pairs["collections.Counter"].messages[0]["content"]


def test_answers_are_clean_and_unrepeated(corpus):
    answers = [example.messages[1]["content"] for example in corpus.examples]
    assert all(builtin.SHORTEST <= len(answer) <= builtin.LONGEST and answer == answer.strip() for answer in answers)
    assert not any(">>>" in answer or "--\n\n" in answer for answer in answers)
    assert max(Counter(" ".join(answer.lower().split()) for answer in answers).values()) == 1


def test_split_keeps_modules_whole(corpus):
    parts = split(corpus)
    assert sum(len(part) for part in parts) == len(corpus)
    assert [len(part) / len(corpus) for part in parts] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    groups = [{example.group for example in part.examples} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_same_in_another_process_and_nothing_odd_is_imported(corpus):
    code = (
        "import sys\nfrom shoestring.data.builtin import python_docs\nfrom shoestring.data import Corpus\n"
        "import hashlib\nprint(hashlib.sha256(''.join(e.fingerprint() for e in python_docs()).encode()).hexdigest())\n"
        "print(sorted({'antigravity', 'this', 'tkinter', 'idlelib', 'turtle', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import hashlib

    here = hashlib.sha256("".join(example.fingerprint() for example in corpus.examples).encode()).hexdigest()
    assert run.stdout.split("\n")[:2] == [here, "[]"]

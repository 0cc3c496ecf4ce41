"""Whatever is drawn under a mask is a match: random walks with the default model's tokenizer."""

from __future__ import annotations

import json
import re
import resource
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.core.errors import ShoestringError
from shoestring.engine.constraint import MAX_TEXT, Constraints, Matcher
from shoestring.engine.request import Constraint, Request, RequestError, Sampling
from shoestring.engine.sampler import Sampler

MERGES = ["ab", "12", '":', "},", "abc", "tr", "ue", "true"]


class Bytes:
    """A tokenizer of the 256 bytes and a few merges."""

    eos: tuple[int, ...] = (0, 1)

    def __init__(self) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = ["<end>", "<other-end>", *alphabet, *MERGES]
        merges = [(w[:2], w[2:]) if w == "true" else (w[:-1], w[-1]) for w in MERGES]
        inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<other-end>", special=True)])
        self.inner, self.json, self.vocab = inner, inner.to_str(), len(words)


class Real:
    """The default model's tokenizer."""

    eos: tuple[int, ...] = (2,)
    vocab = 49_152

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.json = (folder / "tokenizer.json").read_text()
        self.inner = Tokenizer.from_str(self.json)


@pytest.fixture(scope="module")
def small() -> Bytes:
    return Bytes()


@pytest.fixture(scope="module")
def constraints(small: Bytes) -> Constraints:
    return Constraints(small, small.vocab)


@pytest.fixture(scope="module")
def real() -> tuple[Real, Sampler]:
    from shoestring.models import resolve

    described = Real(Path(resolve("smollm2")))
    return described, Sampler(described.vocab, described)


def _allowed(matcher: Matcher, vocab: int) -> list[int]:
    row = np.zeros(vocab, np.float32)
    matcher.mask(row)
    assert set(np.unique(row)) <= {0.0, -np.inf}
    return np.flatnonzero(row == 0).tolist()


def _walk(described: Bytes | Real, sampler: Sampler, constraint: Constraint, seed: int, limit: int = 400) -> str | None:
    """The text of one answer drawn from random logits; None if it is not finished within `limit` tokens."""
    random = np.random.default_rng(seed)
    settings = Sampling(constraint=constraint, temperature=1.0, seed=seed, top_p=0.999, repetition_penalty=1.1)
    state = sampler.state(Request([3], settings), 0)
    closing = [described.inner.token_to_id(word) for word in ('"', "}", "]", ")", "b")]
    base = random.standard_normal(described.vocab).astype(np.float32)
    tokens: list[int] = []
    while len(tokens) < limit:
        row = np.roll(base, int(random.integers(described.vocab))) * 3
        if len(tokens) > 40:  # now come to an end
            row[[*closing, *described.eos]] += 20
        (choice,) = sampler.sample(row[None], [state])
        assert not choice.error, choice.error
        state.accept(choice.token)
        if state.finished:
            assert state.matcher and state.matcher.complete
            text: str = described.inner.decode(tokens)
            return text
        tokens.append(choice.token)
    return None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "🙂"]}, "maxItems": 3},
        "at": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "at"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "in": {"$ref": "#/$defs/place"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


def _is_place(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value["x"], int | float)
        and set(value) <= {"x", "in"}
        and ("in" not in value or _is_place(value["in"]))
    )


def _is_person(value: Any) -> bool:
    return (
        {"name", "age", "at"} <= set(value) <= {"name", "age", "tags", "at"}
        and isinstance(value["name"], str)
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and len(value.get("tags", [])) <= 3
        and set(value.get("tags", [])) <= {"a", "bé", "🙂"}
        and (value["at"] is None or isinstance(value["at"], bool) or _is_place(value["at"]))
    )


EXPRESSIONS = [
    r"[0-9]{3}-[a-z]+",
    r"^(true|false)$",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"[А-я€🙂]{2,5}",
    r"\w+@\w+\.(com|org)",
    r"(a|bc)*d?",
    r'"[^"\\\n]{0,20}"',
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?",
]


def _assert_walks(described: Bytes | Real, sampler: Sampler, walks: int) -> None:
    schema = Constraint("json_schema", json.dumps(PERSON))
    finished = 0
    for seed in range(walks):
        for constraint in (schema, Constraint("json_object"), *(Constraint("regex", e) for e in EXPRESSIONS)):
            text = _walk(described, sampler, constraint, seed)
            if text is None:
                continue
            finished += 1
            if constraint == schema:
                assert _is_person(json.loads(text)), text
            elif constraint.kind == "json_object":
                assert isinstance(json.loads(text), dict), text
            else:
                # Unicode has letters that this Python does not know yet.
                known = "".join("x" if unicodedata.category(c) == "Cn" else c for c in text)
                assert re.fullmatch(constraint.text, known), (constraint.text, text)
    assert finished > 0.8 * walks * (2 + len(EXPRESSIONS))


def test_random_walks_match(small: Bytes) -> None:
    _assert_walks(small, Sampler(small.vocab, small), walks=4)


@pytest.mark.real
def test_random_walks_of_the_default_tokenizer_match(real: tuple[Real, Sampler]) -> None:
    _assert_walks(*real, walks=5)


@pytest.mark.real
def test_random_walks_through_a_grammar(real: tuple[Real, Sampler]) -> None:
    grammar = Constraint("grammar", 'start: sum\nsum: term (("+"|"-") term)*\nterm: /[0-9]{1,4}/ | "(" sum ")"')
    for seed in range(5):
        text = _walk(*real, grammar, seed)
        assert text is not None and re.fullmatch(r"[0-9+()-]+", text)
        compile(re.sub(r"\b0+(?=\d)", "", text), "<answer>", "eval")


@pytest.mark.real
def test_special_tokens_and_unknown_ids_are_never_allowed(real: tuple[Real, Sampler]) -> None:
    described, _ = real
    wide = Constraints(described, described.vocab + 64)
    allowed = _allowed(wide.matcher(Constraint("regex", r"(?s).*")), described.vocab + 64)
    assert len(allowed) > 40_000 and max(allowed) < described.vocab
    assert [token for token in allowed if token < 17] == [2]  # the end, as the empty text matches already


def test_an_end_may_come_only_behind_a_whole_match(constraints: Constraints, small: Bytes) -> None:
    matcher = constraints.matcher(Constraint("regex", "ab?"))
    a, b, ab = (small.inner.token_to_id(word) for word in ("a", "b", "ab"))
    assert _allowed(matcher, small.vocab) == [a, ab]
    assert not matcher.complete
    matcher.accept(a)
    assert _allowed(matcher, small.vocab) == [0, 1, b]
    assert matcher.complete and not matcher.finished
    matcher.accept(b)
    assert _allowed(matcher, small.vocab) == [0, 1]
    assert matcher.complete and matcher.finished


def test_rollback(constraints: Constraints, small: Bytes) -> None:
    matcher = constraints.matcher(Constraint("regex", "(ab|c)+"))
    a, b, c = (small.inner.token_to_id(word) for word in "abc")
    at_start = _allowed(matcher, small.vocab)
    for path in ([a], [a, b, c, a, b], [c, 0], [a, b, 1]):
        for token in path:
            matcher.accept(token)
        matcher.rollback(len(path))
        assert _allowed(matcher, small.vocab) == at_start
        assert not matcher.finished


def test_white_space_has_an_end(constraints: Constraints, small: Bytes) -> None:
    schema = {"type": "array", "items": {"enum": [1, {"a": True}]}, "maxItems": 3}
    matcher = constraints.matcher(Constraint("json_schema", json.dumps(schema)))
    blanks = [small.inner.token_to_id(letter) for letter in "ĊĠ"]
    tokens: list[int] = []
    while not matcher.finished:
        allowed = _allowed(matcher, small.vocab)
        tokens.append(next((token for token in blanks if token in allowed), allowed[-1]))
        matcher.accept(tokens[-1])
        assert len(tokens) < 1000
    text = small.inner.decode(tokens)
    assert max(map(len, re.findall(r"\s+", text))) == 40 and "\n\n" not in text
    json.loads(text)


def test_matchers_of_one_constraint_do_not_share_their_progress(constraints: Constraints, small: Bytes) -> None:
    first, second = (constraints.matcher(Constraint("regex", "abc")) for _ in range(2))
    first.accept(small.inner.token_to_id("abc"))
    assert first.finished and not second.finished


def test_min_tokens_gives_way_to_a_constraint_at_its_end(small: Bytes) -> None:
    sampler = Sampler(small.vocab, small)
    state = sampler.state(Request([3], Sampling(constraint=Constraint("regex", "a{2}"), min_tokens=10)), 0)
    tokens = []
    while not state.finished:
        (choice,) = sampler.sample(np.zeros((1, small.vocab), np.float32), [state])
        assert not choice.error
        state.accept(choice.token)
        tokens.append(choice.token)
    assert tokens == [small.inner.token_to_id("a")] * 2 + [0]


_KEYS = ("type", "properties", "items", "enum", "const", "anyOf", "allOf", "$ref", "minimum", "minLength", "pattern",
         "required", "additionalProperties", "prefixItems", "multipleOf", "x-guidance", "$defs")  # fmt: skip
_words = st.sampled_from(["string", "object", "array", "integer", "#", "#/$defs/a", "[a-z]+", "\ud800"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(_KEYS), _values, max_size=4).map(lambda d: Constraint("json_schema", json.dumps(d)))
    | st.text(max_size=20).map(lambda text: Constraint("json_schema", text))
    | st.text(alphabet="ab(){}[]*+?|\\.^$-012,dws:/\n\ud800", max_size=20).map(lambda text: Constraint("regex", text))
    | st.text(alphabet='ab(){}[]*+?|:/"\n ', max_size=20).map(lambda text: Constraint("grammar", "start: " + text))
    | st.text(alphabet='ab(){}[]*+?|:/"\n =', max_size=20).map(lambda text: Constraint("grammar", "root ::= " + text))
)
def test_anything_is_compiled_or_refused(constraints: Constraints, small: Bytes, constraint: Constraint) -> None:
    try:
        matcher = constraints.matcher(constraint)
    except RequestError as error:
        assert error.param == "response_format" and (error.why or error.remedy)
    else:
        assert _allowed(matcher, small.vocab)


REFUSED = [
    ("json_schema", "not json", "not JSON"),
    ("json_schema", "[1]", "JSON list"),
    ("json_schema", '{"type": "nonsense"}', "nonsense"),
    ("json_schema", '{"type": "string", "pattern": "(["}', "unclosed"),
    ("json_schema", '{"$ref": "http://example.com/x"}', "fetch"),
    ("json_schema", '{"$ref": "file:///etc/passwd"}', "fetch"),
    ("json_schema", '{"$ref": "#/missing"}', "missing"),
    ("json_schema", '{"not": {"type": "string"}}', "not"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"items":' * 65 + "{}" + "}" * 65, "nested deeper"),
    ("json_schema", "[" * 60_000, "not JSON"),
    ("json_schema", " " * (MAX_TEXT + 1), "characters"),
    ("json_schema", '{"const": "\\ud800"}', "not JSON serializable"),
    ("json_schema", '{"minLength": 99999999999999999999}', "not JSON serializable"),
    ("regex", "\ud800", "surrogates"),
    ("grammar", "start: /\ud800/", "surrogates"),
    ("xml", "<a/>", "Unknown constraint"),
    ("regex", "([", "unclosed"),
    ("regex", r"(a|b)\1", "backreferences"),
    ("regex", r"(?=a)b", "look-around"),
    ("regex", r"[^\s\S]", "Nothing matches"),
    ("grammar", "start: foo", "foo"),
    ("grammar", "start: start", "Nothing matches"),
    ("grammar", "", "Empty grammar"),
    ("grammar", "root ::= foo", "foo"),
    ("grammar", "root ::= " + "(" * 9999, "nested too deeply"),
    ("grammar", 'root ::= "\ud800"', "surrogates"),
    ("grammar", "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(400))]), "rules"),
]


@pytest.mark.parametrize("kind, text, reason", REFUSED, ids=lambda value: str(value)[:30])
def test_a_bad_constraint_is_refused_with_its_reason(
    constraints: Constraints, kind: Any, text: str, reason: str
) -> None:
    with pytest.raises(RequestError) as caught:
        constraints.matcher(Constraint(kind, text))
    assert caught.value.param == "response_format"
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600


def _laughs(link: dict[str, Any]) -> dict[str, Any]:
    nodes: dict[str, Any] = {"a0": {"type": "object", "properties": {"k": {"type": "string"}}}}
    for i in range(1, 25):
        nodes[f"a{i}"] = json.loads(json.dumps(link).replace("LAST", f"#/$defs/a{i - 1}").replace("KEY", f"k{i}"))
    return {"$defs": nodes, "$ref": "#/$defs/a24"}


_LAST: dict[str, Any] = {"$ref": "LAST"}
_EITHER = {"anyOf": [_LAST, {"type": "object", "properties": {"KEY": {"type": "integer"}}}]}
HEAVY = [
    Constraint("regex", "a{1000000}"),
    Constraint("regex", "(a{1000}){1000}"),
    Constraint("regex", "(a?){5000}a{5000}"),
    Constraint("regex", r"([a-z]+\s?){1000}"),
    Constraint("grammar", 'start: e\ne: e e | "a" | e e e'),
    Constraint("grammar", 'start: "a"{1000000}'),
    Constraint("grammar", "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(398)), 'r398 ::= "a"'])),
    Constraint("json_schema", json.dumps(_laughs({"allOf": [_LAST, _LAST]}))),
    Constraint("json_schema", json.dumps(_laughs({"anyOf": [_LAST, _LAST]}))),
    Constraint("json_schema", json.dumps(_laughs({"allOf": [_EITHER, _EITHER]}))),
    Constraint("json_schema", json.dumps({"properties": {f"p{i}": {"type": "integer"} for i in range(1500)}})),
    Constraint("json_schema", json.dumps({"type": "string", "minLength": 10**9})),
    Constraint("json_schema", json.dumps({"type": "array", "items": {"pattern": "a{9999}"}, "minItems": 10**9})),
]


@pytest.mark.parametrize("constraint", HEAVY, ids=lambda c: c.text[:30])
def test_heavy_constraints_cost_little_or_are_refused(
    constraints: Constraints, small: Bytes, constraint: Constraint
) -> None:
    constraints.matcher(Constraint("regex", "a"))  # the tokenizer is there
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    steps = 30
    try:
        matcher = constraints.matcher(constraint)
        for _ in range(steps):
            token = _allowed(matcher, small.vocab)[-1]
            matcher.accept(token)
            if matcher.finished:
                break
    except ShoestringError:
        pass
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_forbidden_token_is_an_error_of_that_answer_alone(small: Bytes) -> None:
    sampler = Sampler(small.vocab, small)
    request = Request([3], Sampling(constraint=Constraint("regex", "a+")))
    wrong, right = sampler.state(request, 0), sampler.state(request, 1)
    wrong.accept(small.inner.token_to_id("b"))
    rows = np.zeros((2, small.vocab), np.float32)
    broken, good = sampler.sample(rows, [wrong, right])
    assert "cannot be followed" in broken.error
    assert good.token == small.inner.token_to_id("a") and not good.error


def test_a_model_without_an_end_token_is_refused(small: Bytes) -> None:
    class Endless(Bytes):
        eos = ()

    with pytest.raises(RequestError, match="no end token"):
        Constraints(Endless(), small.vocab).matcher(Constraint("json_object"))


def test_only_the_latest_are_remembered(small: Bytes) -> None:
    constraints = Constraints(small, small.vocab)
    for i in range(100):
        constraints.matcher(Constraint("regex", f"a{{{i + 1}}}"))
    assert len(constraints._compiled) == 32


def test_no_heavy_library_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from shoestring.engine import check, constraint, sampler, stopping; import llguidance;"
        "print(*{'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""

"""Methods named on a command line, and what they plug into an engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine import plug
from shoestring.engine.hooks import CountingFiller, Hooks, RepeatDrafter
from shoestring.engine.policy import Fifo
from shoestring.lab import answering
from shoestring.methods.decoding import _contract as decoding


@dataclass(frozen=True)
class RepeatConfig:
    match: int = 2
    broken: bool = False
    table: str = ""


class Repeating(RepeatDrafter):
    closed = 0

    def stats(self) -> dict[str, float]:
        return {"repeats": 1.0}

    def close(self) -> None:
        Repeating.closed += 1


def module(name: str, **words: object) -> ModuleType:
    made = ModuleType(f"shoestring.methods.decoding.{name}")
    made.__dict__.update({"example": RepeatConfig, **words})
    return made


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three methods: one repeats, one plugs in at the same point, one counts."""
    Repeating.closed = 0

    def skewed(config: RepeatConfig, opened: object) -> Hooks:
        return Hooks(drafter=Repeating(), policy=Fifo())

    modules = {
        "again": module("again", plug=lambda config, opened: Hooks(drafter=Repeating(config.match))),
        "twice": module("twice", plug=skewed),
        "filling": module("filling", plug=lambda config, opened: Hooks(filler=CountingFiller(50))),
    }
    points = {"again": "drafter", "twice": "drafter, policy", "filling": "filler"}
    methods = {
        name: Method(
            Paper("A paper", "2024-01"), "RepeatConfig", ("latency",), traits={"plugs": points[name]}, name=name,
            room="decoding", words=("plug",),
        )
        for name in modules
    }  # fmt: skip
    monkeypatch.setattr(catalog, "methods", lambda: methods)
    monkeypatch.setattr(catalog, "module", lambda name: modules[name])
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, f"shoestring.methods.decoding.{name}", made)
    yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tiny"))


def test_spelled() -> None:
    assert plug.spelled("aded,table=x.bin,nodes=8,chain=True,c=[1,2]") == (
        "aded", {"table": "x.bin", "nodes": 8, "chain": True, "c": [1, 2]},
    )  # fmt: skip


@pytest.mark.parametrize("word", ["again,match", "again,=2", "again,match=1,match=2"])
def test_misspelled(word: str) -> None:
    with pytest.raises(UsageError, match="is not a setting"):
        plug.spelled(word)


def test_answers_are_those_without_and_counts_tell(model: Path) -> None:
    with answering.exact(model) as plain, answering.exact(model, plugs=["again,match=1", "filling"]) as other:
        assert answering.answers(other) == answering.answers(plain)
        counts = other.counts()
        assert counts.plugged == {"repeats": 1.0} and counts.filler_tokens == 50
        assert counts.accepted_draft_tokens > 0 and other.hooks.drafter.match == 1
        assert not plain.counts().plugged
    assert Repeating.closed == 1


def test_a_policy_and_a_decoder_of_its_own(model: Path) -> None:
    made = []

    def decoder(runner, sampler, hooks):  # type: ignore[no-untyped-def]
        from shoestring.engine.decoder import Decoder

        made.append(hooks)
        return Decoder(runner, sampler, hooks)

    with answering.exact(model, plugs=["twice"], hooks=Hooks(decoder=decoder)) as engine:
        assert isinstance(engine.scheduler.policy, Fifo)
        assert made == [engine.hooks] and answering.answers(engine)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agian"], "agian does not plug in.*Did you mean again"),
        (["again,matches=3"], "again has no option matches.*match"),
        (["again,match=few"], "again: match=few is not a whole number"),
        (["again,match=true"], "again: match=true is not a whole number"),
        (["again,broken=1"], "again: broken=1 is not true or false"),
        (["again,table=7"], 'again: table=7 is not text. Quotes make it so: table="7"'),
        (["again", "twice"], "twice cannot be plugged in.*again is the drafter already"),
    ],
)
def test_what_cannot_be_plugged_in(words: list[str], said: str, model: Path) -> None:
    with pytest.raises(UsageError, match=f"(?s){said}"):
        answering.exact(model, plugs=words)
    assert Repeating.closed == (2 if len(words) == 2 else 0)  # nothing half-opened is left behind


def test_what_is_plugged_in_is_closed_when_the_engine_cannot_be(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        layers = (1,)

    with pytest.raises(UsageError, match="cannot be plugged in together"):
        answering.exact(model, plugs=["again"], hooks=Hooks(exit=Never()))  # type: ignore[arg-type]
    assert Repeating.closed == 1

    from shoestring.engine.native_runner import NativeRunner

    def refused(self: NativeRunner, blocks: int) -> None:
        raise MemoryError("no room")

    closed: list[NativeRunner] = []
    close = NativeRunner.close
    monkeypatch.setattr(NativeRunner, "reserve", refused)
    monkeypatch.setattr(NativeRunner, "close", lambda self: (closed.append(self), close(self)))
    with pytest.raises(MemoryError):
        answering.exact(model, plugs=["again"])
    assert Repeating.closed == 2 and len(closed) == 1


def test_places() -> None:
    assert [m.name for m in plug.pluggable("drafter")] == ["again", "twice"]
    assert plug.method_for("twice", "policy").name == "twice"
    with pytest.raises(UsageError, match="filling does not plug in as drafter. it is a method for something else"):
        plug.method_for("filling", "drafter")


@pytest.mark.parametrize("check", decoding.CHECKS, ids=lambda check: check.__name__)
def test_the_room_passes_what_is_sound(check) -> None:  # type: ignore[no-untyped-def]
    check(catalog.module("again"))


def test_the_room_finds_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(RepeatDrafter):
        """Says that the model is sure of what it guesses, by drafting into an engine that does not verify."""

    from shoestring.engine.decoder import Decoder

    class Trusting(Decoder):
        def _verify(self, outcome, state, logits):  # type: ignore[no-untyped-def]
            for token in outcome.chunk.sequence.draft[: outcome.chunk.draft]:
                (choice,) = self.sampler.sample(logits[:1], [state])
                outcome.choices.append(type(choice)(token))
            outcome.accepted = outcome.chunk.draft

    bad = catalog.module("again")
    monkeypatch.setattr(bad, "plug", lambda config, opened: Hooks(drafter=Liar(1), decoder=Trusting))
    with pytest.raises(AssertionError, match="plain decoding writes"):
        decoding.check_greedy_answers_are_those_of_plain_decoding(bad)

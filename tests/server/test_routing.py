"""The rule that sends a request to a replica, without any."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.server.routing import BLOCK, Ask, Routing, asked

LONG = "You answer questions about rivers. " * 40
CHAT = "/v1/chat/completions"
FIELDS = st.sampled_from(["messages", "prompt", "n", "max_tokens", "input", "tools", "model", "cache_salt"])
VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner),
).map(lambda value: json.dumps(value).encode())


def chat(*said: str, client: str = "", tokens: int = 16, **fields: Any) -> Ask:
    roles = ("system", "user", "assistant")
    messages = [{"role": roles[min(at, 1)], "content": text} for at, text in enumerate(said)]
    body = {"model": "m", "messages": messages, "max_tokens": tokens, **fields}
    return asked(CHAT, client, json.dumps(body).encode())


class Replicas:
    """Sends asks where the rule says, and ends them when told."""

    def __init__(self, *names: str) -> None:
        self.routing, self.names, self.number = Routing(), names, 0
        self.routing.keep(names)

    def send(self, ask: Ask, done: bool = True, at: str = "") -> str:
        self.number += 1
        key = str(self.number)
        place = at or self.routing.choose(key, ask, self.names)[0]
        self.routing.settle(key, ask, place)
        if done:
            self.routing.end(key)
        return place


def test_a_prompt_goes_where_its_beginning_is_known() -> None:
    three = Replicas("a", "b", "c")
    homes = {topic: three.send(chat(f"{topic} {LONG}", "first")) for topic in ("x", "y", "z")}
    assert set(homes.values()) == {"a", "b", "c"}, "nothing known: those that were sent least"
    for _ in range(3):
        for topic, home in homes.items():
            assert three.send(chat(f"{topic} {LONG}", f"again {three.number}")) == home
    assert three.routing.found / three.routing.characters > 0.6 and three.routing.spilled == 0


def test_a_conversation_stays_where_it_began() -> None:
    two = Replicas("a", "b")
    turns = [LONG, "hello"]
    home = two.send(chat(*turns))
    two.send(chat("something else", "entirely"))
    for turn in range(4):
        turns += [f"an answer of some length, {turn} " * 9, f"and a question {turn}"]
        before = two.routing.found
        assert two.send(chat(*turns)) == home
        assert two.routing.found > before


def test_others_help_when_waiting_costs_more_than_computing_again() -> None:
    two = Replicas("a", "b")
    ask = chat(LONG, "q", tokens=200)
    home = two.send(ask)
    assert two.send(ask, done=False) == home
    assert ask.answers < ask.prompt, "one answer under way is less than this prompt"
    assert two.send(ask, done=False) == home
    other = two.send(ask, done=False)
    assert other != home, "two are more"
    assert two.routing.spilled == 1
    assert two.send(chat("short", "q"), done=False) == home, "less is open there"


def test_without_anything_known_the_least_loaded_takes_it() -> None:
    three = Replicas("a", "b", "c")
    for at in range(9):
        three.send(chat(f"{at}", "x" * 50), done=False)
    load = [sum(1 for place, _ in three.routing._open.values() if place == name) for name in three.names]
    assert load == [3, 3, 3]


def test_keys_salts_and_models_do_not_share() -> None:
    mine = chat(LONG, "q", client="k1").blocks
    assert chat(LONG, "other", client="k1").blocks[:5] == mine[:5]
    for other in (chat(LONG, "q", client="k2"), chat(LONG, "q", client="k1", cache_salt="s"),
                  chat(LONG, "q", client="k1", model="ft"), chat("!" + LONG, "q", client="k1")):  # fmt: skip
        assert not set(other.blocks) & set(mine)


def test_what_is_counted() -> None:
    assert chat("a" * 1000, "b", tokens=10).answers == 40
    assert chat("a", "b", tokens=10, n=3).answers == 120
    assert chat("a", "b", tokens=10**6).answers == 1024, "many ask for far more than they get"
    assert chat("a", "b", tokens=0).answers == 512
    text = asked("/v1/completions", "", json.dumps({"prompt": "x" * 1000}).encode())
    assert text.prompt == 1000 and len(text.blocks) == 1000 // BLOCK
    tokens = asked("/v1/completions", "", json.dumps({"prompt": list(range(1000))}).encode())
    assert len(tokens.blocks) > 10
    several = asked("/v1/completions", "", json.dumps({"prompt": ["x" * 500, "y" * 500], "max_tokens": 1}).encode())
    assert several.prompt == 1000 and several.answers == 8
    assert asked("/v1/embeddings", "", json.dumps({"input": "x" * 300}).encode()) == Ask((), 300, 0)
    assert asked("/tokenize", "", json.dumps({"prompt": "x" * 300}).encode()) == Ask()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | VALUES, st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings"]))
def test_any_body_can_be_asked_about(body: bytes, path: str) -> None:
    ask = asked(path, "", body)
    assert ask.prompt >= 0 and ask.answers >= 0 and len(ask.blocks) * BLOCK <= ask.prompt


def test_deep_nesting_is_no_harm() -> None:
    assert asked(CHAT, "", b"[" * 100_000) == Ask()


def test_what_a_lost_replica_knew_and_did_is_forgotten() -> None:
    two = Replicas("a", "b")
    ask = chat(LONG, "q")
    home = two.send(ask, done=False)
    (other,) = {"a", "b"} - {home}
    two.routing.lose(home)
    assert two.routing.replicas == (other,) and not two.routing._open
    two.names = (other,)
    assert two.send(ask) == other
    two.routing.keep(["a", "b"])
    two.names = ("a", "b")
    assert two.send(ask) == other, "one that comes back knows nothing"
    two.routing.settle("9", ask, "gone")  # it went to one that has died since
    assert two.routing.requests == 3


def test_only_as_much_is_remembered_as_a_cache_holds() -> None:
    one = Replicas("a")
    one.routing.room = 10
    first = chat("x" * 5 * BLOCK, "q")
    one.send(first)
    for at in range(3):
        one.send(chat(f"{at}" + "y" * 5 * BLOCK, "q"))
    assert len(one.routing._known["a"]) == 10
    before = one.routing.found
    one.send(first)
    assert one.routing.found == before, "it was forgotten"
    longer = chat("z" * 30 * BLOCK, "q")
    one.send(longer)
    before = one.routing.found
    one.send(longer)
    assert one.routing.found - before == 10 * BLOCK, "the beginning is kept"


def test_ray_may_ask_twice_or_send_elsewhere() -> None:
    two = Replicas("a", "b")
    ask = chat("x", "y")
    first = two.routing.choose("1", ask, ("a", "b"))
    assert two.routing.choose("1", ask, ("a", "b")) == first, "it is not in its own way"
    two.routing.settle("1", ask, first[1])
    assert two.routing._open["1"][0] == first[1]
    two.routing.end("1")
    two.routing.end("1")
    assert not two.routing._open
    two.routing.settle("1", ask, "a")  # it had ended before Ray said where it went
    assert not two.routing._open
    assert two.routing.choose("2", ask, ()) == []

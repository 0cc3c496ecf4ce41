"""Whom the policies choose, without a scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shoestring.engine.policy import Fair, Fifo
from shoestring.engine.request import Request
from shoestring.engine.scheduler import Chunk
from shoestring.engine.sequence import Sequence


def one(name: str, client: str = "", priority: int = 0) -> Sequence:
    return Sequence(Request([1], id=name, client=client, priority=priority), 0, [1], 1)


def work(policy: Fifo, sequence: Sequence, tokens: int) -> None:
    policy.on_step([Chunk(sequence, 0, tokens)])


def admitted(policy: Fifo) -> list[str]:
    """Everyone, in the order of admission."""
    names = []
    while (sequence := policy.next()) is not None:
        policy.on_admit(sequence)
        names.append(sequence.request.id)
    return names


def test_first_come_first_served_and_small_priorities_first() -> None:
    policy = Fifo()
    for name, priority in (("a", 0), ("b", 1), ("c", -1), ("d", 0), ("e", 1)):
        policy.on_add(one(name, priority=priority))
    assert admitted(policy) == ["c", "a", "d", "b", "e"]
    assert policy.next() is None


def test_a_step_of_priority_is_worth_so_many_tokens_of_waiting() -> None:
    policy = Fifo(patience=100)
    running = one("running")
    policy.on_add(running)
    policy.on_admit(running)
    policy.on_add(one("late", priority=1))
    work(policy, running, 99)
    policy.on_add(one("before"))
    work(policy, running, 2)
    policy.on_add(one("after"))
    assert admitted(policy) == ["before", "late", "after"]


@pytest.mark.parametrize("policy", [Fifo(), Fair()])
def test_who_was_preempted_keeps_its_place(policy: Fifo) -> None:
    first, second, third = one("first"), one("second"), one("third")
    for sequence in (first, second, third):
        policy.on_add(sequence)
    for sequence in (first, second):
        policy.on_admit(sequence)
    assert policy.victim([first, second]) is second
    policy.on_add(second)
    assert policy.next() is second
    policy.on_add(first)
    assert admitted(policy) == ["first", "second", "third"]


@pytest.mark.parametrize("policy", [Fifo, Fair])
def test_a_line_under_random_comings_and_goings(policy: type[Fifo]) -> None:
    rng = random.Random(1)
    queue: Any = policy()
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    for number in range(3000):
        move = rng.random()
        if move < 0.4:
            waiting.append(one(str(number), rng.choice("abc"), rng.choice([0, 0, 1])))
            queue.on_add(waiting[-1])
        elif move < 0.6 and waiting:
            head = queue.next()
            assert head in waiting
            # Nobody before it among its own.
            same = [s for s in waiting if policy is Fifo or s.request.client == head.request.client]
            assert min(same, key=lambda s: queue._places[s]) is head
            if policy is Fair:
                accounts = {s.request.client: queue._accounts[s.request.client] for s in waiting}
                assert accounts[head.request.client] == min(accounts.values())
            waiting.remove(head)
            queue.on_admit(head)
            running.append(head)
        elif move < 0.7 and running:
            loser = queue.victim(running)
            running.remove(loser)
            queue.on_add(loser)
            waiting.append(loser)
        elif move < 0.85 and (waiting or running):
            gone = rng.choice(waiting + running)
            (waiting if gone in waiting else running).remove(gone)
            queue.on_finish(gone)
        elif running:
            queue.on_step([Chunk(s, 0, rng.randrange(1, 50), rng.randrange(3)) for s in running])
        assert (queue.next() is None) == (not waiting)
    for sequence in waiting + running:
        queue.on_finish(sequence)
    assert queue.next() is None
    left = {k: v for k, v in vars(queue).items() if isinstance(v, dict | list) and v}
    assert not left, f"something is kept of what has gone: {left}"


def test_the_client_that_was_served_least_is_next() -> None:
    policy = Fair()
    for name in ("a1", "a2", "a3", "b1", "b2"):
        policy.on_add(one(name, client=name[0]))
    first = policy.next()
    assert first
    policy.on_admit(first)
    work(policy, first, 100)
    second = policy.next()
    assert second and (first.request.id, second.request.id) == ("a1", "b1")
    policy.on_admit(second)
    work(policy, second, 30)
    assert policy.next().request.id == "b2"  # type: ignore[union-attr]
    work(policy, second, 71)
    assert policy.next().request.id == "a2"  # type: ignore[union-attr]


def test_priorities_order_the_requests_of_one_client_only() -> None:
    policy = Fair()
    for name, client, priority in (("a", "x", 0), ("b", "y", -100), ("c", "y", 5)):
        policy.on_add(one(name, client, priority))
    head = policy.next()
    assert head
    policy.on_admit(head)
    work(policy, head, 10)
    assert policy.next().request.client != head.request.client  # type: ignore[union-attr]
    assert admitted(policy).index("b" if head.request.id == "a" else "a") == 0


def test_what_was_not_used_is_not_owed() -> None:
    policy = Fair()
    long, short = one("long", "long"), one("short", "short")
    for sequence in (long, short):
        policy.on_add(sequence)
        policy.on_admit(sequence)
    work(policy, long, 1000)  # the other asks for little
    policy.on_add(one("s", "short"))
    assert policy._accounts["short"] == 500
    policy.on_add(one("l", "long"))
    assert policy.next().request.id == "s"  # type: ignore[union-attr]


def test_room_is_made_until_clients_have_equally_many_places() -> None:
    policy = Fair()
    running = [one(f"a{i}", "a") for i in range(4)]
    for sequence in running:
        policy.on_add(sequence)
        policy.on_admit(sequence)
    newcomers = [one(f"b{i}", "b") for i in range(4)]
    for newcomer in newcomers:
        policy.on_add(newcomer)
    taken = []
    for newcomer in newcomers:
        loser = policy.yields(running, newcomer)
        if loser is None:
            break
        taken.append(loser.request.id)
        running.remove(loser)
        policy.on_add(loser)
        policy.on_admit(newcomer)
        running.append(newcomer)
    assert taken == ["a3", "a2"]
    assert policy.victim(running).request.id == "b1"
    assert Fifo().yields(running, newcomers[3]) is None


def test_accounts_of_clients_that_have_left_do_not_pile_up() -> None:
    policy = Fair()
    stay = one("stay", "stay")
    policy.on_add(stay)
    policy.on_admit(stay)
    for number in range(2000):
        sequence = one(str(number), f"c{number}")
        policy.on_add(sequence)
        policy.on_admit(sequence)
        work(policy, sequence, 10)
        work(policy, stay, 10)
        policy.on_finish(sequence)
    assert len(policy._accounts) < 100
    assert len(policy._order) < 100

"""A pretended model over pretended pages, to see a scheduler's mistakes as wrong tokens.

A slot of a page holds a number that depends on the token there and on the slots before it. The next token depends on
every number that the sequence's table leads to. A page that is missing, stale, shared by mistake or written by two
sequences therefore changes the answer, and `answer` says what it should be.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from shoestring.engine.blocks import BlockPool
from shoestring.engine.policy import Policy
from shoestring.engine.request import Request, Sampling
from shoestring.engine.scheduler import Chunk, Plan, Scheduler
from shoestring.engine.sequence import Sequence

VOCABULARY = 50


def value(adapter: str, token: int, before: int) -> int:
    return hash((len(adapter), token, before))


def following(values: list[int], index: int) -> int:
    """The next token of answer `index` after slots with these values."""
    return hash((index, *values)) % VOCABULARY


def answer(request: Request, index: int, tokens: int) -> list[int]:
    """What a model without pages answers."""
    values: list[int] = []
    said: list[int] = []
    for token in request.prompt:
        values.append(value(request.adapter, token, values[-1] if values else 0))
    while len(said) < tokens:
        said.append(following(values, index))
        values.append(value(request.adapter, said[-1], values[-1]))
    return said


class Memory:
    """The pages and the model. `whose` are the words under which a slot may be read."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots = [[(0, ("", ""))] * pool.size for _ in range(pool.count)]

    def compute(self, plan: Plan) -> dict[Sequence, tuple[list[int], int]]:
        """Tokens that follow each sequence, and how many of them were drafted, for those that reach their end."""
        targets = [to for _, to in plan.copies]
        assert len(targets) == len(set(targets)), "two copies into one page"
        tables = {block for chunk in plan.chunks for block in chunk.sequence.blocks}
        assert tables.issuperset(targets), "a copy for nobody"
        for source, to in plan.copies:
            self.slots[to] = list(self.slots[source])
        written: Counter[int] = Counter()
        new: list[tuple[Sequence, list[int]]] = []
        outcomes: dict[Sequence, tuple[list[int], int]] = {}
        for chunk in plan.chunks:  # everything is read before anything is written
            sequence, end = chunk.sequence, chunk.start + chunk.count
            assert chunk.count > 0 and chunk.start == sequence.computed and end <= len(sequence.tokens)
            values = self.read(sequence, chunk.start)
            for token in sequence.tokens[chunk.start : end]:
                values.append(value(sequence.request.adapter, token, values[-1] if values else 0))
            drafted = self.verify(chunk, values, outcomes) if end == len(sequence.tokens) else []
            last = end + len(drafted) - 1
            pages = range(chunk.start // self.pool.size, last // self.pool.size + 1)
            written.update(sequence.blocks[page] for page in pages)
            assert all(self.pool.references[sequence.blocks[page]] == 1 for page in pages), "writes a shared page"
            new.append((sequence, values[chunk.start :] + drafted))
        assert all(times == 1 for times in written.values()), "two sequences write to one page"
        for sequence, values in new:
            for at, number in enumerate(values, start=sequence.computed):
                self.write(sequence, at, number)
        for sequence, (tokens, _) in outcomes.items():
            # The accepted nodes of a tree are moved together, as the runner's move_slots does.
            base = len(sequence.tokens)
            for place, node in enumerate(self.path(sequence, tokens)):
                number, whose = self.slots[sequence.blocks[(base + node) // self.pool.size]][
                    (base + node) % self.pool.size
                ]
                assert whose == self.whose(sequence)
                self.write(sequence, base + place, number)
        return outcomes

    def verify(self, chunk: Chunk, values: list[int], outcomes: dict[Sequence, tuple[list[int], int]]) -> list[int]:
        """Follows the draft's tree; returns the numbers of its nodes' slots."""
        sequence = chunk.sequence
        assert len(sequence.draft) == len(sequence.draft_parents) == chunk.draft
        numbers: list[int] = []
        for token, parent in zip(sequence.draft, sequence.draft_parents):
            numbers.append(value(sequence.request.adapter, token, numbers[parent] if parent >= 0 else values[-1]))
        tokens = [following(values, sequence.index)]
        seen, node = list(values), -1
        while True:
            children = [j for j, p in enumerate(sequence.draft_parents) if p == node]
            node = next((j for j in children if sequence.draft[j] == tokens[-1]), -2)
            if node < 0:
                break
            seen.append(numbers[node])
            tokens.append(following(seen, sequence.index))
        outcomes[sequence] = tokens, len(tokens) - 1
        return numbers

    @staticmethod
    def path(sequence: Sequence, tokens: list[int]) -> list[int]:
        nodes: list[int] = []
        for token in tokens[:-1]:
            at = nodes[-1] if nodes else -1
            nodes.append(
                next(j for j, p in enumerate(sequence.draft_parents) if p == at and sequence.draft[j] == token)
            )
        return nodes

    def whose(self, sequence: Sequence) -> tuple[str, str]:
        return sequence.request.isolation, sequence.request.adapter

    def read(self, sequence: Sequence, slots: int) -> list[int]:
        found = []
        for at in range(slots):
            number, whose = self.slots[sequence.blocks[at // self.pool.size]][at % self.pool.size]
            assert whose == self.whose(sequence), f"{sequence.request.id} reads what {whose} wrote"
            found.append(number)
        return found

    def write(self, sequence: Sequence, at: int, number: int) -> None:
        page = self.slots[sequence.blocks[at // self.pool.size]]
        page[at % self.pool.size] = (number, self.whose(sequence))


@dataclass
class House:
    """An engine without arithmetic: submits, steps, cancels, and checks everything after every move."""

    scheduler: Scheduler
    drafts: random.Random | None = None
    said: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    open: dict[str, Request] = field(default_factory=dict)
    begun: dict[str, set[int]] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)  # in the order of their first admission
    preemptions: int = 0
    found: int = 0  # tokens found in the prefix cache
    accepted: int = 0
    steps: int = 0
    story: list[object] = field(default_factory=list)  # what was computed, to compare two schedules

    def __post_init__(self) -> None:
        self.memory = Memory(self.scheduler.pool)

    def submit(self, request: Request) -> None:
        self.scheduler.add(Sequence(request, 0, list(request.prompt), len(request.prompt)))
        self.open[request.id] = request
        self.begun[request.id] = {0}
        self.said[request.id, 0] = []

    def cancel(self, request_id: str) -> None:
        gone = self.scheduler.cancel(request_id)
        if self.open.pop(request_id, None):
            assert {s.index for s in gone} == self.begun[request_id]
        else:
            assert not gone
        assert not any(s.blocks for s in gone), "pages of a cancelled request are not free at once"
        assert not self.scheduler.cancel(request_id)

    def step(self, cancel_before: list[str] = [], cancel_between: list[str] = []) -> Plan:  # noqa: B006
        """One step, with requests cancelled while it is computed: before its results come, or among them."""
        scheduler = self.scheduler
        if self.drafts:
            for sequence in scheduler.running:
                if sequence.decoding:
                    sequence.draft, sequence.draft_parents = self.guess(sequence)
        ready = [s for s in scheduler.running if s.pending == 1]
        plan = scheduler.schedule()
        self.steps += 1
        used = sum(chunk.count + chunk.draft for chunk in plan.chunks)
        assert used + plan.spare == scheduler.max_tokens and plan.spare >= 0, "the budget is not kept"
        assert len(scheduler.running) <= scheduler.max_sequences
        chunked = [chunk.sequence for chunk in plan.chunks]
        assert len(set(chunked)) == len(chunked) and set(chunked) <= set(scheduler.running)
        assert all(s in chunked or s in plan.preempted for s in ready), "an answer does not grow"
        assert plan.chunks or not (scheduler.running or scheduler.waiting), "nothing is done and somebody waits"
        self.preemptions += len(plan.preempted)
        for sequence in plan.admitted:
            self.found += sequence.cached
            assert sequence.computed < len(sequence.tokens)
            if not sequence.preemptions and sequence.index == 0:
                self.admitted.append(sequence)
        self.story += [(c.sequence.request.id, c.sequence.index, c.start, c.count, c.draft) for c in plan.chunks]
        self.story += plan.copies
        self.check()
        outcomes = self.memory.compute(plan)
        for request_id in cancel_before:
            self.cancel(request_id)
            self.check()
        between = list(cancel_between)
        for chunk in plan.chunks:
            self.settle(chunk, *outcomes.get(chunk.sequence, ([], 0)))
            self.check()
            if between:
                self.cancel(between.pop())
                self.check()
        return plan

    def settle(self, chunk: Chunk, tokens: list[int], accepted: int) -> None:
        sequence, request = chunk.sequence, chunk.sequence.request
        values = self.memory.read(sequence, chunk.start) if sequence in self.scheduler.running else []
        for token in sequence.tokens[chunk.start : chunk.start + chunk.count]:
            values.append(value(request.adapter, token, values[-1] if values else 0))
        first = bool(tokens) and len(sequence.tokens) == sequence.prompt_tokens
        if not self.scheduler.settle(chunk, tokens, accepted):
            assert request.id not in self.open or (request.id, sequence.index) not in self.said
            return
        assert not self.scheduler.settle(chunk, tokens, accepted), "settled twice"
        assert not tokens or sequence.pending == 1
        self.accepted += accepted
        twins = []
        if first and sequence.index == 0:
            for index in range(1, request.sampling.n):
                twin = self.scheduler.fork(sequence, index)
                twin.tokens[sequence.prompt_tokens :] = [following(values, index)]
                self.said[request.id, index] = []
                self.begun[request.id].add(index)
                twins.append((twin, twin.tokens[sequence.prompt_tokens :]))
        for one, new in [(sequence, tokens), *twins]:
            self.take(one, new)

    def take(self, sequence: Sequence, tokens: list[int]) -> None:
        request = sequence.request
        said = self.said[request.id, sequence.index]
        limit = request.sampling.max_tokens or 0
        said += tokens[: limit - len(said)]
        if len(said) >= limit:
            self.scheduler.finish(sequence)
            self.begun[request.id].discard(sequence.index)
            assert said == answer(request, sequence.index, limit), "a wrong page was read"
            if not self.begun[request.id]:
                del self.open[request.id]

    def guess(self, sequence: Sequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A tree whose nodes are often right."""
        assert self.drafts
        told = sequence.tokens[sequence.prompt_tokens :]
        truth = answer(sequence.request, sequence.index, len(told) + 6)[len(told) :]
        tokens: list[int] = []
        parents: list[int] = []
        depths = {-1: 0}
        for node in range(self.drafts.randrange(0, 7)):
            parent = self.drafts.choice([-1, *range(node)]) if self.drafts.random() < 0.4 else node - 1
            depths[node] = depths[parent] + 1
            right = truth[depths[parent]] if depths[parent] < len(truth) else 0
            token = right if self.drafts.random() < 0.7 else (right + 1 + node) % VOCABULARY
            tokens.append(token)
            parents.append(parent)
        return tuple(tokens), tuple(parents)

    def check(self) -> None:
        scheduler, size = self.scheduler, self.scheduler.pool.size
        scheduler.pool.check(s.blocks for s in scheduler.running)
        assert not set(scheduler.running) & set(scheduler.waiting)
        here = {(s.request.id, s.index) for s in (*scheduler.running, *scheduler.waiting)}
        assert here == {(i, index) for i in self.open for index in self.begun[i]}, "a request is lost"
        for sequence in scheduler.waiting:
            assert not sequence.blocks and not sequence.computed
        for sequence in scheduler.running:
            assert sequence.computed <= len(sequence.blocks) * size

    def drain(self, steps: int) -> None:
        """Every request ends within so many steps, and then every page is free."""
        for _ in range(steps):
            if not self.open:
                break
            self.step()
        assert not self.open, f"{len(self.open)} requests did not end in {steps} steps"
        assert not self.scheduler.running and not self.scheduler.waiting
        assert not self.scheduler.pool.used
        self.check()


def house(
    pages: int = 64, size: int = 4, *, tokens: int = 32, sequences: int = 8, policy: Policy | None = None,
    drafts: random.Random | None = None,
) -> House:  # fmt: skip
    scheduler = Scheduler(
        BlockPool(pages, size), max_tokens=tokens, max_sequences=sequences, context=pages * size, policy=policy
    )
    return House(scheduler, drafts)


def request(name: str, prompt: list[int], limit: int = 4, **options: object) -> Request:
    n = options.pop("n", 1)
    return Request(prompt, Sampling(max_tokens=limit, n=n), id=name, arrival=0.0, **options)  # type: ignore[arg-type]

"""What the next step computes: which sequences, how many tokens of each, in which pages.

    plan = scheduler.schedule()
    ... copy plan.copies, compute plan.chunks ...
    scheduler.settle(chunk, tokens, accepted)  # for every chunk

Sequences that wait for one token go first, each with its draft; what is left of the step's budget is spent on prompts,
in the policy's order. A sequence is admitted when its tokens so far fit into free pages and one page is left for each
that runs. When running sequences need pages and none is free, the policy's victim goes back to the line with nothing
computed; its pages are found again if nobody has taken them in between.

Pages change hands in `schedule` alone. So what is given back while a step is computed, by `finish` or `cancel`, is
nobody else's before the step has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoestring.engine.blocks import BlockPool
from shoestring.engine.policy import Fair, Policy
from shoestring.engine.request import RequestError
from shoestring.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Chunk:
    """Tokens start..start+count-1 of a sequence and then the first `draft` of its guesses, in slots start onwards."""

    sequence: Sequence
    start: int
    count: int
    draft: int = 0


@dataclass(slots=True, eq=False)
class Plan:
    """One step.

    Attributes:
        copies: pages to copy (from, to) before anything is computed.
        preempted: went back to the line; nothing of them is computed any more.
        admitted: run from now on; `sequence.cached` says how much of them was found.
        spare: tokens of the step's budget that nobody uses.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    spare: int = 0


class Scheduler:
    """Shares steps and pages among sequences. Not thread-safe.

    Args:
        max_tokens: of one step, drafts included; at least `max_sequences`, so that every answer can grow in every step.
        max_sequences: that hold pages at the same time.
        context: the longest sequence.
        policy: `Fair` when None.
        findable: whether pages may be found again by what was computed into them, for others and after a preemption.

    Attributes:
        running: sequences that hold pages, in the order of their admission.
        waiting: sequences that do not.
        context: the longest sequence that also fits the pool.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_tokens: int,
        max_sequences: int,
        context: int,
        policy: Policy | None = None,
        findable: bool = True,
    ) -> None:
        if not 1 <= max_sequences <= max_tokens:
            raise ValueError(f"{max_sequences} sequences in steps of {max_tokens} tokens: some would never be served")
        self.pool, self.policy, self.findable = pool, policy or Fair(), findable
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self.context = min(context, pool.count * pool.size)
        self.running: dict[Sequence, None] = {}
        self.waiting: dict[Sequence, None] = {}
        self._chunks: dict[Sequence, Chunk] = {}  # planned and not settled
        self._copies: dict[int, int] = {}  # to: from
        self._plan = Plan()
        self._sought: tuple[Sequence, list[bytes]] | None = None  # keys of the one that was last tried to be admitted

    # ---- sequences come and go ----

    def add(self, sequence: Sequence) -> None:
        """A new sequence joins the line.

        Raises:
            RequestError: it has no tokens, or could not be computed to its end even if it were alone.
        """
        request, size = sequence.request, len(sequence.tokens)
        if not size:
            raise RequestError("The prompt is empty", remedy="Write something", param="prompt")
        # The last token of an answer is never computed.
        longest = size if request.embed else size + max(request.sampling.max_tokens or 0, 1) - 1
        if longest > self.context:
            raise RequestError(
                f"The prompt of {size} tokens needs room for {longest} with its answer; there is room for "
                f"{self.context}",
                remedy="Ask for fewer tokens" if size <= self.context else "Shorten the prompt",
                param="max_tokens" if size <= self.context else "prompt",
                code="context_length_exceeded",
            )
        self.waiting[sequence] = None
        self.policy.on_add(sequence)

    def fork(self, sequence: Sequence, index: int) -> Sequence:
        """Another answer that begins as this one stands. They share pages until one of them writes.

        When all places are taken it joins the line instead, and finds again what it can.
        """
        twin = Sequence(
            sequence.request,
            index,
            sequence.tokens.copy(),
            sequence.prompt_tokens,
            None if sequence.positions is None else sequence.positions.copy(),
            cached=sequence.cached,
        )
        self.policy.on_add(twin)
        if sequence in self.running and len(self.running) < self.max_sequences:
            twin.computed = twin.seen = sequence.computed
            twin.blocks = sequence.blocks[: self._pages(sequence.computed)]
            self.pool.hold(twin.blocks)
            self.running[twin] = None
            self.policy.on_admit(twin)
        else:
            self.waiting[twin] = None
        return twin

    def finish(self, sequence: Sequence) -> None:
        """It has ended; its pages are free at once. Nothing happens when it is not here."""
        if sequence in self.running:
            del self.running[sequence]
            self._chunks.pop(sequence, None)
            self._release(sequence)
        elif sequence in self.waiting:
            del self.waiting[sequence]
        else:
            return
        self.policy.on_finish(sequence)

    def cancel(self, request_id: str) -> list[Sequence]:
        """`finish` all answers of a request, in the middle of a step too; those that were still here."""
        gone = [s for where in (self.running, self.waiting) for s in where if s.request.id == request_id]
        for sequence in gone:
            self.finish(sequence)
        return gone

    def restart(self) -> int:
        """Every page has lost what was in it: all that run go back to the line, to be computed again; how many."""
        again = tuple(self.running)
        for sequence in again:
            self._preempt(sequence)
        self.pool.forget()
        self._sought = None
        return len(again)

    # ---- the step ----

    def schedule(self) -> Plan:
        """Begin a step. Chunks of the step before that were not settled count as not computed."""
        self._plan = plan = Plan()
        self._chunks = chunks = {}
        copies = self._copies
        copies.clear()
        size, references, running = self.pool.size, self.pool.references, self.running
        prompts: list[Sequence] = []
        drafting: list[Sequence] = []
        for sequence in tuple(running):
            computed = sequence.computed
            pending = len(sequence.tokens) - computed
            if pending != 1:
                sequence.draft = sequence.draft_parents = ()
                if pending:
                    prompts.append(sequence)
                continue
            if sequence not in running:
                continue
            blocks, at = sequence.blocks, computed // size
            if (at >= len(blocks) or references[blocks[at]] > 1) and not self._reserve(sequence, computed + 1):
                continue
            chunks[sequence] = Chunk(sequence, computed, 1)
            if sequence.draft:
                drafting.append(sequence)
        room = self.max_tokens - len(chunks)
        if drafting or (room and (prompts or self.waiting)):
            room = min(room, self.policy.share(self.max_tokens, len(chunks)))
            if drafting:
                room = self._draft(drafting, room)
            if room > 0 and (prompts or self.waiting):
                self._prompt(prompts, room)
        used = 0
        for chunk in chunks.values():
            plan.chunks.append(chunk)
            used += chunk.count + chunk.draft
        plan.spare = self.max_tokens - used
        if copies:
            plan.copies = [(source, to) for to, source in copies.items()]
        self.policy.on_step(plan.chunks)
        return plan

    def settle(self, chunk: Chunk, tokens: list[int] | tuple[int, ...] = (), accepted: int = 0) -> bool:
        """A chunk was computed. False, and nothing happens, when its sequence has ended or was cancelled meanwhile.

        Args:
            tokens: what follows the sequence now. The last one is not computed yet.
            accepted: how many of `tokens`, from the first, were drafted: they stand in the slots after the chunk's own.
        """
        sequence = chunk.sequence
        if self._chunks.get(sequence) is not chunk:
            return False
        if accepted and not accepted <= min(chunk.draft, len(tokens)):
            raise ValueError(f"{accepted} of {len(tokens)} tokens accepted from a draft of {chunk.draft}")
        if tokens and chunk.start + chunk.count != len(sequence.tokens):
            raise ValueError("tokens follow a chunk that does not reach the end of its sequence")
        del self._chunks[sequence]
        size = self.pool.size
        before, computed = chunk.start // size, chunk.start + chunk.count + accepted
        sequence.computed = computed
        if computed > sequence.seen:
            sequence.seen = computed
        sequence.tokens += tokens
        if self.findable and computed // size > before:
            self.pool.register(sequence.blocks, sequence.tokens, _salt(sequence), before, computed // size)
        if chunk.draft:
            sequence.draft = sequence.draft_parents = ()
            keep = self._pages(len(sequence.tokens))
            self.pool.release(reversed(sequence.blocks[keep:]))
            del sequence.blocks[keep:]
        return True

    # ---- parts of a step ----

    def _draft(self, drafting: list[Sequence], room: int) -> int:
        """Add what there is room for of each sequence's draft; what is left of `room`."""
        drafting = [sequence for sequence in drafting if sequence in self.running]
        wanted = sum(len(sequence.draft) for sequence in drafting)
        # A guess may be for nothing, a prompt's token is not: while somebody waits, half is for prompts.
        most = room // 2 if self.waiting or len(self._chunks) < len(self.running) else room
        each = wanted if wanted <= most else most // len(drafting)
        pool = self.pool
        for sequence in drafting:
            held = len(sequence.blocks)
            slots = min((held + pool.free) * pool.size, self.context) - len(sequence.tokens)
            draft = max(0, min(len(sequence.draft), each, slots))
            sequence.draft, sequence.draft_parents = sequence.draft[:draft], sequence.draft_parents[:draft]
            sequence.blocks += [pool.allocate() for _ in range(self._pages(len(sequence.tokens) + draft) - held)]
            self._chunks[sequence].draft = draft
            room -= draft
        return room

    def _prompt(self, prompts: list[Sequence], room: int) -> None:
        """Spend `room` tokens on unfinished prompts and on those that can be admitted."""
        rank = self.policy.rank
        prompts.sort(key=rank, reverse=True)
        full = False
        while room > 0:
            # Nobody comes in a step in which somebody had to go: it would often be the same one.
            head = self.policy.next() if self.waiting and not (full or self._plan.preempted) else None
            if head and (not prompts or rank(head) < rank(prompts[-1])):
                full = not self._admit(head)
                if full:
                    continue
                sequence = head
            elif prompts:
                sequence = prompts.pop()
                if sequence not in self.running:
                    continue
            else:
                break
            start = sequence.computed
            count = min(len(sequence.tokens) - start, room)
            if self._reserve(sequence, start + count):
                self._chunks[sequence] = Chunk(sequence, start, count)
                room -= count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of all its tokens, if the policy finds a place for it."""
        pool, running = self.pool, self.running
        while True:
            if len(running) < self.max_sequences:
                found = pool.match(self._keys(sequence))
                new = self._pages(len(sequence.tokens)) - len(found)
                idle = sum(not pool.references[block] for block in found)
                if new + idle + len(running) <= pool.free:
                    break
            loser = self.policy.yields(running, sequence)
            if loser is None:
                return False
            self._preempt(loser)
        del self.waiting[sequence]
        self._sought = None
        pool.hold(found)
        sequence.blocks = [*found, *(pool.allocate() for _ in range(new))]
        sequence.computed = len(found) * pool.size
        sequence.cached = min(sequence.computed, sequence.prompt_tokens)
        running[sequence] = None
        self.policy.on_admit(sequence)
        self._plan.admitted.append(sequence)
        return True

    def _keys(self, sequence: Sequence) -> list[bytes]:
        if self._sought is None or self._sought[0] is not sequence:
            # The last token is always computed: somebody wants to know what follows it.
            keys = self.pool.keys(sequence.tokens, _salt(sequence), len(sequence.tokens) - 1)
            self._sought = sequence, keys
        return self._sought[1]

    def _reserve(self, sequence: Sequence, slots: int) -> bool:
        """Make slots computed..slots-1 of a running sequence its own to write; False when that cost it its place."""
        pool, blocks, at = self.pool, sequence.blocks, sequence.computed // self.pool.size
        if slots > self.context:
            raise ValueError(
                f"{sequence.request.id} has more tokens than the context of {self.context}: finish it first"
            )
        while len(blocks) * pool.size < slots or pool.references[blocks[at]] > 1:
            if not pool.free:
                loser = self.policy.victim(self.running)
                self._preempt(loser)
                if loser is sequence:
                    return False
            elif at < len(blocks) and pool.references[blocks[at]] > 1:
                blocks[at], copy = pool.writable(blocks[at])
                if copy:
                    self._copies[copy[1]] = copy[0]
            else:
                blocks.append(pool.allocate())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self._chunks.pop(sequence, None)
        for block in sequence.blocks:
            self._copies.pop(block, None)
        self._release(sequence)
        sequence.computed = 0
        sequence.draft = sequence.draft_parents = ()
        sequence.preemptions += 1
        self.waiting[sequence] = None
        self.policy.on_add(sequence)
        self._plan.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.blocks))
        sequence.blocks = []

    def _pages(self, slots: int) -> int:
        return -(-slots // self.pool.size)


def _salt(sequence: Sequence) -> bytes:
    """Pages are shared only under one isolation word, and never between adapters."""
    request = sequence.request
    return repr((request.isolation, request.adapter)).encode()

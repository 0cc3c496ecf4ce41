"""ADED: guess ahead from a table of token triples that learns from every answer, and verify the guesses in one pass.

How it works
    1. A table M[(a, b)] -> {c: value} says what may follow two tokens. Of a corpus in the model's own tokens the value
       is p = count(a, b, c) / count(a, b), over triples inside one document. The file keeps all of them, memory the 12
       likeliest successors of each pair, not renormalised.                                                     (eq. 1)
    2. In every step each triple (a, b, c) among the last 16 tokens is reinforced, M[(a, b)][c] = min(M + 0.04, 3); new
       pairs and successors are made. The table outlives requests; values are scores.                           (eq. 2)
    3. The draft is searched for. A state is a pair of tokens, the root the last two, a sentence at most L = 4 states.
       150 times: from the root go to the child with the largest                                                (eq. 3)
           score / visits + (c1 + ln((N + c2 + 1) / c2)) value sqrt(N) / (1 + visits)
       where N is the parent's visits, an unvisited child comes first, c1 = 32 and c2 = 8; make all successors of a
       childless state its children and step into one; roll out to L states, each token drawn in proportion to its row;
       add the Score, 1 + the sum of the values on the way (eq. 4), and a visit to all states on the path in the tree.
    4. The 24 most visited paths, each with its likeliest successor added, are merged into a tree of at most 64 nodes.
    5. The chance to reach a node is estimated: the product along its path of how often guesses of its kind came true
       lately. A kind is a share of the row, a value, whether the token came when the six before it last stood together
       (the three, where six did not), and how many tokens in a row did so. With A(n) the sum over the n likeliest
       nodes, cost(n) the measured seconds of a pass over n tokens, and s the seconds of the search, the draft is the n
       that maximises                                                                                            (eq. 5)
           (1 + A(n)) / (cost(1 + n) + s)
       and nothing where that is not two hundredths better than 1 / cost(1). So it is a chain where branches do not pay,
       and nothing where guesses do not come true. What is not drafted is still compared with what comes, and now and
       then two nodes are drafted to see what a pass costs by now, so that drafting begins again where it pays.
    6. One pass over all nodes verifies: each sees the past and its own ancestors, at the position of its depth. A token
       is drawn at a node, under all of its request's settings, and where it is one of the node's children the walk goes
       on there. So every token is drawn from the model's own distribution, and as a draw depends on seed, answer and
       position alone, the answer is that of plain decoding. Keys and values of the other branches are given up.

Where it bends
    The authors keep a fixed number of tree tokens; step 5 is ours. Where at most 24 nodes are likely enough to pay,
    they are taken without a search, which only ranks, and those that are still likely after L states go on, to at most
    16 tokens: text that is copied comes in long pieces. `always=true` leaves step 5 out, and searches whatever has more
    than 24 nodes. After 32 passes without a draft only every eighth token is looked at, and learnt eight times as
    much. The authors learn from the last 16 tokens of a prompt, as `prompts=false` does; otherwise the window
    passes over the whole prompt once. Their sampling draws anew for each leaf and keeps the luckiest path, which
    over-represents what is drafted; step 6 does not. Tables are separate between clients whose cached prompts are: how
    fast an answer comes must not tell what others wrote. On the native runner a node gets the bits of plain decoding,
    in every number format; elsewhere a pass over several tokens rounds otherwise than one over one, and in bfloat16
    near ties may fall otherwise. Under transformers' `generate`, neither batches nor models with sliding windows or
    recurrent layers.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine.hooks import Draft, Hooks, Verified
from shoestring.engine.sequence import Sequence as Answer
from shoestring.methods.decoding import _costs, _latest, _trigrams
from shoestring.methods.decoding._latest import Latest
from shoestring.methods.decoding._trigrams import KINDS, Trigrams, View, share_of

if TYPE_CHECKING:
    from shoestring.engine.open import Opened
    from shoestring.engine.runner import Runner

METHOD = Method(
    paper=Paper(
        "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
        "2024-06",
        arxiv="2407.12021",
        code="liuxukun2000/Adaptix",
    ),
    provides="AdedConfig",
    saves=("latency", "energy"),
    combines={"quantizers": "yes", "pruners": "yes", "adapters": "yes"},
    traits={"plugs": "drafter", "answers": "as plain decoding"},
)
_MARGIN = 1.02  # how much better than no draft a draft must look
_UNLIKELY = 0.02  # a node that is reached less often is not looked at
_RARELY, _RAREST, _FEW = 64, 1024, 2  # passes without a draft until some nodes are drafted to see what a pass costs
_HALF = 512  # guesses of a kind after which old ones count half
_AT_FIRST = 8  # guesses of a kind that count like what is supposed before anything is known
_DEEPEST = 16  # tokens of a draft that goes on because it is still likely
_UNUSED, _GLANCE = 32, 8  # passes without a draft after which only every eighth token is looked at


@dataclass(frozen=True)
class AdedConfig:
    """Settings of the drafter.

    Attributes:
        corpus: data file to count triples in: text or conversations, such as the model's own answers.
        table: file that keeps what was counted; it is read when it is there, and otherwise made of the corpus.
        successors: kept of each counted pair.
        entries: pairs that are remembered beside the counted ones; 1 or 2 kB each.
        window: latest tokens that are learnt in every step.
        increment, cap: what each time adds to a value, and how far it goes; increment 0 learns nothing.
        prompts: learn whole prompts, not only their last tokens.
        states: longest sentence of the search, in pairs of tokens.
        iterations: of the search.
        explore, settle: c1 and c2 of its formula.
        paths: how many of the most visited paths are taken.
        nodes: most tokens of a draft.
        tree: False drafts chains only.
        always: draft whether or not it pays.
    """

    corpus: str = ""
    table: str = ""
    successors: int = 12
    entries: int = 100_000
    window: int = 16
    increment: float = 0.04
    cap: float = 3.0
    prompts: bool = True
    states: int = 4
    iterations: int = 150
    explore: float = 32.0
    settle: float = 8.0
    paths: int = 24
    nodes: int = 64
    tree: bool = True
    always: bool = False

    def __post_init__(self) -> None:
        least = {"successors": 1, "entries": 1, "window": 3, "states": 2, "iterations": 1, "paths": 1, "nodes": 1}
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            kind: Any = type(setting.default)
            sound = isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
            if not sound and not (kind is float and type(value) is int):
                raise UsageError(f"{name}={value!r} is not of type {kind.__name__}", remedy=f"Try {setting.default!r}")
            if kind in (int, float) and not least.get(name, 0) <= value < math.inf:
                raise UsageError(f"{name}={value} is out of range", remedy=f"Give at least {least.get(name, 0)}")
        if self.settle == 0:
            raise UsageError("settle=0 divides by nothing", remedy="Give more, such as 8")


def example() -> AdedConfig:
    return AdedConfig()


def plug(config: AdedConfig, opened: Opened) -> Hooks:
    return Hooks(drafter=AdedDrafter(config, opened.tokenizer))


def generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    drafter: AdedDrafter | None = None,
    **model_kwargs: Any,
) -> Any:
    """For transformers: `model.generate(..., custom_generate=generate)`, with `drafter=` to go on learning.

    Raises:
        UsageError: a batch, padding, beams, or a model whose cache cannot give up rows.
    """
    from shoestring.methods.decoding import _tree

    return _tree.generate(
        drafter or AdedDrafter(AdedConfig()), model, input_ids, logits_processor, stopping_criteria, generation_config,
        **model_kwargs,
    )  # fmt: skip


# ---- the tree of guesses ----


@dataclass
class Guesses:
    """A tree of tokens that may come: parents[i] < i, -1 for the first level.

    Attributes:
        kinds: of each token, as `Text.kinds`.
        chances: that it is reached.
        visits: of the search; empty where there was none.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)

    def add(self, token: int, parent: int, kind: int, chance: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.kinds.append(kind)
        self.chances.append(chance)
        return len(self.tokens) - 1


@dataclass(slots=True)
class Text:
    """The end of a text, as far as guesses depend on it.

    Attributes:
        recent: its last tokens, as `_latest.end`.
        run: how many tokens in a row came as the last time.
        chance: that it comes to this, where the end is guessed.
    """

    recent: int
    run: int = 0
    chance: float = 1.0

    def then(self, token: int, kind: int, chance: float) -> Text:
        """What it is behind a guess."""
        return Text(_latest.then(self.recent, token), self.run + 1 if kind >= AGAIN else 0, chance)


class Known:
    """What an owner's text is judged by: the table, what came last, and how often such guesses came true."""

    def __init__(self, table: Trigrams, latest: Latest, owner: int, rates: Sequence[float]) -> None:
        self.table, self.latest, self.owner, self.rates = table, latest, owner, rates

    def row(self, text: Text) -> View | None:
        return self.table.view(self.owner, *_latest.pair(text.recent))

    def kinds(self, text: Text, row: View) -> Sequence[int]:
        """Of each token of the text's row: what the row says, and whether it is what came the last time."""
        said = self.latest.after(self.owner, text.recent)
        if said is None:
            return row.kinds
        again = AGAIN + KINDS * bisect_right(_RUNS, text.run)
        return [kind + (again if token == said else KINDS) for token, kind in zip(row.tokens, row.kinds)]


def whole(known: Known, text: Text, config: AdedConfig, floor: float) -> Guesses | None:
    """Everything that may come with a chance of at least `floor`; None where that is more than the search may take."""
    found, rates = Guesses(), known.rates
    edge = [(-1, text)]
    for level in range(config.states if config.always else _DEEPEST):
        last = level >= config.states - 1  # where each has its likeliest successor only
        further = []
        for node, here in edge:
            row = known.row(here)
            if row is None:
                continue
            kinds = known.kinds(here, row)
            least = floor / here.chance
            places: Sequence[int] = [i for i, kind in enumerate(kinds) if rates[kind] >= least]
            if last and places:
                places = places[:1] if config.always else [max(places, key=lambda i: rates[kinds[i]])]
            for i in places:
                token, kind = row.tokens[i], kinds[i]
                chance = here.chance * rates[kind]
                further.append((found.add(token, node, kind, chance), here.then(token, kind, chance)))
            if len(found.tokens) > config.paths and not last:
                return None
        edge = further
    return found


def search(known: Known, text: Text, config: AdedConfig) -> Guesses:
    """The most visited paths of a Monte-Carlo tree search from a pair, merged; no draw depends on what came before."""
    look, owner, states = known.table.view, known.owner, config.states
    first, second = _latest.pair(text.recent)
    c1, c2 = config.explore, config.settle
    tokens, parents, values = [second], [-1], [0.0]
    befores, levels, sums = [first], [1], [1.0]  # the token before, states on the path, 1 + the values on it
    starts, ends, untried = [0], [0], [0]  # children, and the first of them that was never visited
    visits, scores = [0], [0.0]
    draw = (first * 2654435761 + second * 40503 + 12345) & 0xFFFFFFFF
    for _ in range(config.iterations):
        node, path = 0, [0]
        while starts[node] < ends[node]:
            if untried[node] < ends[node]:
                node = untried[node]
                untried[parents[node]] += 1
            else:
                reached = visits[node]
                weight = (c1 + math.log((reached + c2 + 1) / c2)) * math.sqrt(reached)
                best, parent = -1.0, node
                for child in range(starts[parent], ends[parent]):
                    seen = visits[child]
                    puct = scores[child] / seen + weight * values[child] / (1 + seen)  # (eq. 3)
                    if puct > best:
                        best, node = puct, child
            path.append(node)
        view: View | None = None
        if levels[node] < states:
            view = look(owner, befores[node], tokens[node])
        if view is not None:
            starts[node] = untried[node] = len(tokens)
            count, above, before = len(view.tokens), sums[node], tokens[node]
            tokens += view.tokens
            values += view.values
            sums += [above + value for value in view.values]
            parents += [node] * count
            befores += [before] * count
            levels += [levels[node] + 1] * count
            for empty in (starts, ends, untried, visits):
                empty += [0] * count
            scores += [0.0] * count
            ends[node] = starts[node] + count
            untried[node] += 1
            node = starts[node]
            path.append(node)
        score, a, b = sums[node], befores[node], tokens[node]
        for _ in range(levels[node], states):
            view = look(owner, a, b)
            if view is None:
                break
            draw = (draw * 1664525 + 1013904223) & 0xFFFFFFFF
            place = bisect_right(view.sums, draw / 4294967296 * view.sums[-1])
            place = min(place, len(view.tokens) - 1)
            score += view.values[place]  # (eq. 4)
            a, b = b, view.tokens[place]
        for step in path:
            visits[step] += 1
            scores[step] += score
    # The most visited first; among equals the shorter path, then the one that was made first.
    order = sorted(range(1, len(tokens)), key=lambda n: (-visits[n], n))[: config.paths]
    taken = set(order)
    for node in order:
        while parents[node] > 0:
            node = parents[node]
            taken.add(node)
    found = Guesses()
    places = {0: -1}
    ends_of = {-1: text}

    def take(parent: int, token: int, seen: int) -> int:
        here = ends_of[parent]
        row = known.row(here)
        assert row is not None
        kind = known.kinds(here, row)[row.tokens.index(token)]
        chance = here.chance * known.rates[kind]
        found.visits.append(seen)
        child = found.add(token, parent, kind, chance)
        ends_of[child] = here.then(token, kind, chance)
        return child

    for node in sorted(taken):
        places[node] = take(places[parents[node]], tokens[node], visits[node])
    for node in sorted(taken):
        view = look(owner, befores[node], tokens[node])
        if view is not None and (starts[node] == ends[node] or starts[node] not in taken):
            take(places[node], view.tokens[0], 0)
    return found


# ---- what comes true ----

# Kinds below KINDS are those of the row alone, where the three tokens before are new together; then come those of one
# that did not follow them the last time, then of the one that did, by how many tokens in a row had come so.
AGAIN, _RUNS = 2 * KINDS, (1, 4, 12)
WAYS = AGAIN + KINDS * (len(_RUNS) + 1)


class Rates:
    """How often guesses of each kind came true lately, where what stood before them had."""

    def __init__(self) -> None:
        # Before anything is known: the more hopeful the larger the share, and the longer all came as the last time.
        shares = [share_of(kind) for kind in range(KINDS)]
        first = [most * share**1.3 for most in (0.5, 0.4) for share in shares]
        first += [0.3 + 0.1 * run + 0.3 * share for run in range(len(_RUNS) + 1) for share in shares]
        self._told = [float(_AT_FIRST)] * WAYS
        self._true = [_AT_FIRST * rate for rate in first]
        self.rates = first

    def add(self, kind: int, came: bool) -> None:
        told, true = self._told[kind] + 1, self._true[kind] + came
        if told > _HALF:
            told, true = told / 2, true / 2
        self._told[kind], self._true[kind] = told, true
        self.rates[kind] = true / told


@dataclass
class _Expected:
    """What is expected of one answer: its owner, the tokens that are known of it, and the guesses after them.

    Attributes:
        run: how many of these tokens, from the last one back, came as the last time.
    """

    owner: int
    known: int
    rates: Rates
    run: int = 0
    guesses: Guesses | None = None


class AdedDrafter:
    """Drafts for the engine, and for `generate`. Safe to use from several threads.

    Args:
        tokenizer: of the model; without one no corpus and no table can be used.

    Raises:
        UsageError: the corpus or the table cannot be used.
    """

    def __init__(self, config: AdedConfig, tokenizer: Any = None) -> None:
        self.config = config
        counted = None
        if tokenizer is not None:
            counted = _trigrams.counted_from(config.corpus, config.table, tokenizer)
        elif config.corpus or config.table:
            raise UsageError("A corpus needs the model's tokenizer", remedy="Give it to AdedDrafter as well")
        self.table = Trigrams(
            counted,
            successors=config.successors,
            entries=config.entries,
            increment=config.increment,
            cap=config.cap,
            window=config.window,
        )
        self.latest = Latest(4 * config.entries)
        self.costs = _costs.Costs()
        self._rates = (Rates(), Rates())  # of answers that take the likeliest token, and of those that are drawn
        self._expected: WeakKeyDictionary[Answer, _Expected] = WeakKeyDictionary()
        self._answers, self._others, self._luck = 1, 0.0, 0.0  # of the latest pass, for what the next will be like
        self._search = 1e-4  # seconds that a search lately took
        self._drafting = 0.0  # seconds of this step so far
        # Passes since the latest draft, and how many of them until one is tried.
        self._idle, self._patience = 0, _RARELY
        self._total = dict.fromkeys(
            ("passes", "drafts", "nodes", "tokens", "searches", "drafting", "seconds", "plain"), 0.0
        )

    def ready(self, runner: Runner, pages: int) -> None:
        if runner.attention is None and not self.config.always:
            self.costs = _costs.measured(runner, pages)

    def propose(self, answer: Answer, limit: int) -> Draft:
        began = time.perf_counter()
        with self.table.lock:
            draft = self._propose(answer, limit)
        self._drafting += time.perf_counter() - began
        return draft

    def observe(self, verified: Sequence[Verified], tokens: int, seconds: float) -> None:
        answers, drafts, nodes, accepted = len(verified), 0, 0, 0
        for one in verified:
            if one.draft.tokens:
                drafts += 1
                nodes += len(one.draft.tokens)
                accepted += len(one.accepted)
        with self.table.lock:
            total, drafting = self._total, self._drafting
            self._drafting = 0.0
            if tokens > answers + nodes:
                return  # prompts were computed as well
            rest = (answers - 1) / answers
            self._answers, self._others, self._luck = answers, nodes * rest, accepted * rest
            self._idle = 0 if nodes else self._idle + 1
            if self._idle < _UNUSED or self._idle % _GLANCE == 0:
                self.costs.observe(tokens, seconds)
            total["passes"] += 1
            total["drafts"] += drafts
            total["nodes"] += nodes
            total["tokens"] += answers + accepted
            total["drafting"] += drafting
            total["seconds"] += seconds + drafting
            total["plain"] += self.costs.of(answers) * (answers + accepted) / answers if nodes else seconds

    def stats(self) -> dict[str, float]:
        """Of passes without prompts; `draft_gain` is how many times faster than plain decoding should have been."""
        t = self._total
        passes = max(t["passes"], 1.0)
        return {
            "draft_passes": t["passes"],
            "draft_tokens_per_pass": t["tokens"] / passes,
            "draft_nodes_per_pass": t["nodes"] / passes,
            "draft_share_of_passes": t["drafts"] / passes,
            "draft_searches": t["searches"],
            "draft_ms_per_pass": 1000 * t["drafting"] / passes,
            "draft_gain": t["plain"] / t["seconds"] if t["seconds"] else 1.0,
            "draft_pairs_counted": float(self.table.counted),
            "draft_pairs_held": float(len(self.table)),
            "draft_triples_learnt": float(self.table.learnt),
        }

    # ---- one draft ----

    def _propose(self, answer: Answer, limit: int) -> Draft:
        config, table, tokens = self.config, self.table, answer.tokens
        expected = self._expected.get(answer)
        steps = 1
        if expected is None:
            # What follows the first \0 only keeps this request's own pages apart.
            owner = table.owner(answer.request.isolation.partition("\0")[0])
            rates = self._rates[answer.request.sampling.temperature > 0]
            expected = self._expected[answer] = _Expected(owner, 0, rates)
            if config.prompts and answer.index == 0:
                table.learn_all(owner, tokens[: answer.prompt_tokens])
            else:
                expected.known = max(len(tokens) - config.window, 0)
        elif self._idle >= _UNUSED and not config.always:
            steps = len(tokens) - expected.known
            if steps < _GLANCE:
                return Draft()
        if expected.guesses is not None:
            _compare(expected.guesses, expected.rates, tokens[expected.known :])
        owner, rates = expected.owner, expected.rates
        table.learn(owner, tokens[-config.window :], steps)
        expected.run = self.latest.learn(owner, tokens, expected.known, expected.run)
        expected.known, expected.guesses = len(tokens), None
        if len(tokens) < 2:
            return Draft()
        known = Known(table, self.latest, owner, rates.rates)
        text = Text(_latest.end(tokens), expected.run)
        row = known.row(text)
        if row is None:
            return Draft()
        if not (config.always or self._idle >= self._patience):
            kinds = known.kinds(text, row)
            chances = [rates.rates[kind] for kind in kinds]
            if not self._may_pay(chances):
                # Nothing to verify, but the first guesses are compared with what comes.
                expected.guesses = Guesses(list(row.tokens), [-1] * len(kinds), list(kinds), chances)
                return Draft()
        began = time.perf_counter()
        floor = 0.0 if config.always else self._floor()
        guesses = whole(known, text, config, floor)
        if guesses is None:
            guesses = search(known, text, config)
            self._total["searches"] += 1
        expected.guesses = guesses
        draft = self._chosen(guesses, limit)
        taken = min(time.perf_counter() - began, 4 * self._search)  # a search that was held up says little
        self._search += 0.05 * (taken - self._search)
        return draft

    def _plain(self) -> tuple[float, int]:
        """Tokens that the next pass brings without a draft here, and how many it computes for that."""
        return self._answers + self._luck, self._answers + round(self._others)

    def _may_pay(self, chances: Sequence[float]) -> bool:
        """Whether a draft could pay if all that follows the first level were as likely as the best of it."""
        best = max(chances)
        reached = min(sum(chances), 1.0) * sum(best**depth for depth in range(self.config.states))
        tokens, base = self._plain()
        spent = self.costs.of(base + 1) + self._search * self._answers
        return (tokens + reached) / spent > _MARGIN * tokens / self.costs.of(base)

    def _floor(self) -> float:
        """The chance below which a further token is not worth what one costs on average over the next sixteen."""
        tokens, base = self._plain()
        plain = self.costs.of(base)
        each = (self.costs.of(base + 16) - plain) / 16
        return max(_UNLIKELY, 0.75 * each * tokens / plain)

    def _chosen(self, guesses: Guesses, limit: int) -> Draft:
        """The nodes that pay, likeliest first, so that parents stand before their children."""
        config, parents, reach = self.config, guesses.parents, guesses.chances
        order = sorted(range(len(reach)), key=lambda n: -reach[n])
        if not config.tree:
            order = self._chain(parents, order)
        order = order[: min(limit, config.nodes)]
        if not config.always:
            paying = self._paying([reach[n] for n in order])
            if paying:
                self._patience = _RARELY
            elif order and self._idle >= self._patience:  # costs may not be what they were
                paying, self._patience, self._idle = _FEW, min(2 * self._patience, _RAREST), 0
            order = order[:paying]
        at = {node: i for i, node in enumerate(order)}
        at[-1] = -1
        return Draft(tuple(guesses.tokens[n] for n in order), tuple(at[parents[n]] for n in order))

    @staticmethod
    def _chain(parents: Sequence[int], order: Sequence[int]) -> list[int]:
        """The likeliest child of the likeliest child, and so on."""
        chain: list[int] = []
        node = -1
        while (found := next((n for n in order if parents[n] == node), -1)) >= 0:
            chain.append(found)
            node = found
        return chain

    def _paying(self, reach: Sequence[float]) -> int:
        """How many of the likeliest nodes bring most tokens a second; 0 where plain decoding is as good."""
        cost = self.costs.of
        tokens, base = self._plain()
        search = self._search * self._answers
        best, count = _MARGIN * tokens / cost(base), 0
        for n, likely in enumerate(reach, 1):
            if likely < _UNLIKELY:
                break
            tokens += likely
            speed = tokens / (cost(base + n) + search)  # (eq. 5)
            if speed > best:
                best, count = speed, n
        return count


def _compare(guesses: Guesses, rates: Rates, came: Sequence[int]) -> None:
    """Tell the rates which of the guesses came, as far as a path of them did."""
    tokens, parents, node = guesses.tokens, guesses.parents, -1
    for token in came:
        found = -2
        for i in range(node + 1, len(parents)):
            if parents[i] == node:
                true = tokens[i] == token
                rates.add(guesses.kinds[i], true)
                if true:
                    found = i
        if found < 0:
            return
        node = found

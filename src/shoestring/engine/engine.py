"""The engine: requests in, text out, one step at a time. A step schedules, runs, settles."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import ShoestringError, UsageError, nearest
from shoestring.engine.blocks import BlockPool
from shoestring.engine.check import check_sampling
from shoestring.engine.decoder import Decoder, Outcome
from shoestring.engine.gates import GatedDecoder
from shoestring.engine.hooks import Filler, Hooks, Spare
from shoestring.engine.memory import free_memory
from shoestring.engine.open import Opened, open_model
from shoestring.engine.policy import Policy
from shoestring.engine.request import Completion, Delta, FinishReason, Request, RequestError, Sampling, Usage
from shoestring.engine.runner import BLOCK, CacheLost, Runner, keeps_pages
from shoestring.engine.sampler import Choice, Sampler, SampleState
from shoestring.engine.scheduler import Plan, Scheduler
from shoestring.engine.sequence import Sequence as Answer
from shoestring.engine.stopping import TextStop
from shoestring.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from shoestring.core.ledger import Stage

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True)
class Counts:
    """Totals since the engine was opened, and how it stands now. Pages in blocks, memory in bytes, times in seconds."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    filler_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    weight_bytes: int = 0
    cache_bytes_used: int = 0
    cache_bytes_peak: int = 0
    cache_bytes_limit: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    plugged: Mapping[str, float] = field(default_factory=dict)  # what is plugged in says of itself


@dataclass(eq=False)
class _Work:
    """One answer beside its sequence: how it draws, when it stops, what it has cost."""

    sequence: Answer
    state: SampleState
    stop: TextStop
    adapter: int
    spare: list[SampleState]  # of the answers that begin when this one's prompt is finished
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    tokens: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    total: np.ndarray | None = None

    def siblings(self) -> list[SampleState]:
        return self.spare


class Engine:
    """A model that answers many requests at once.

    Args:
        model: hub id, folder, GGUF file, `smollm2`, or a runner with its tokenizer as (runner, tokenizer).
        runner: "native", "torch", or "auto": native where the family and its weights allow it.
        dtype: "auto" computes on the weights as they are stored.
        cache_dtype: "bf16", "int8" or "fp32" keys and values.
        memory: bytes for keys and values, a hard limit; None takes 1 GiB or a quarter of the free memory, whichever is
            less, and always one full context.
        max_sequences: answers computed at the same time.
        max_step_tokens: tokens of one step; a longer prompt is computed in chunks beside the answers of others.
        context: longest sequence; None is the model's own.
        threads: of the arithmetic; None is one for each core that this process may use.
        adapters: name -> folder of adapters that are LoRA, or can be written as one, loaded beside the weights.
        plugs: methods to plug in beside `hooks`, each as `name,option=value,...`.

    Raises:
        UsageError: a model that cannot be opened. DoesNotFit: the memory is not to be had.
    """

    def __init__(
        self,
        model: str | Path | tuple[Runner, Tokenizer] = "smollm2",
        *,
        runner: str = "auto",
        dtype: str = "auto",
        cache_dtype: str = "bf16",
        memory: int | None = None,
        max_sequences: int = 16,
        max_step_tokens: int = 256,
        context: int | None = None,
        threads: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        hooks: Hooks = Hooks(),
        plugs: Sequence[str] = (),
        policy: Policy | None = None,
        prefix_cache: bool = True,
        offline: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if max_sequences < 1 or max_step_tokens < 1:
            raise UsageError(
                f"max_sequences={max_sequences}, max_step_tokens={max_step_tokens} leaves nothing to compute",
                remedy="Both are at least 1",
            )
        if isinstance(model, tuple):
            opened = Opened(*model, model[0].facts.family, Path())
        else:
            opened = open_model(
                model, runner=runner, dtype=dtype, cache_dtype=cache_dtype, threads=threads, offline=offline,
                trust_remote_code=trust_remote_code, **_reading(plugs),
            )  # fmt: skip
        self.runner, self.tokenizer = opened.runner, opened.tokenizer
        self.name, self.note = opened.name, opened.note
        self._own_adapter = opened.adapter  # when the model is itself an adapter on its base
        if plugs:
            from shoestring.engine.plug import plugged

            try:
                hooks = plugged(plugs, opened, hooks)
            except BaseException:
                self.runner.close()
                raise
        if hooks.exit and hooks.drafter and not hooks.decoder:
            hooks.close()
            self.runner.close()
            raise UsageError(
                "A drafter and an exit policy cannot be plugged in together",
                "a draft is verified by whole passes",
                "Leave out one",
            )
        self.facts = facts = self.runner.facts
        self.context = min(context or facts.context, facts.context)
        self.hooks, self.runner.attention = hooks, hooks.attention
        blocks = _blocks(memory, facts.block_bytes, self.context, max_sequences)
        try:
            self.runner.reserve(blocks)
        except BaseException:
            hooks.close()  # it may hold processes and connections
            self.runner.close()
            raise
        self.pool = BlockPool(blocks, BLOCK)
        # Pages that a hook left half filled, or filled otherwise, are of no use to another request.
        filled = hooks.attention is None or keeps_pages(hooks.attention)
        kind = hooks.decoder or (GatedDecoder if hooks.exit else Decoder)
        holes = getattr(kind, "leaves_holes", False)
        self.prefix_cache = prefix_cache and filled and not (holes or hooks.tap)
        self.scheduler = Scheduler(
            self.pool,
            max_tokens=max(max_step_tokens, max_sequences),
            max_sequences=max_sequences,
            context=self.context,
            policy=policy or hooks.policy,
            findable=not holes,
        )
        self.context = self.scheduler.context
        self.sampler = Sampler(facts.vocab, self.tokenizer)
        self._decoder = kind(self.runner, self.sampler, hooks)
        parts = [self._decoder, *hooks.plugged()]
        self._telling = [part for part in parts if hasattr(part, "stats")]
        self._asked = [part for part in parts if hasattr(part, "check")]
        self._told = [part for part in parts if hasattr(part, "ended")]
        self.adapters: dict[str, int] = {}
        self._works: dict[Answer, _Work] = {}
        self._requests: dict[str, list[Answer]] = {}
        self._leaving: set[str] = set()  # adapters to be dropped when their last request has ended
        self._deltas: deque[Delta] = deque()
        self._streams: dict[str, deque[Delta]] = {}  # by request that is awaited here: what came, whoever stepped
        self._turn = threading.RLock()  # of threads that await answers here
        self._closed = False
        self._alone = itertools.count()  # numbers of those that share no pages
        self._spare = Spare(0)
        # Set by whoever steps: whether filler work should end soon, and what to call when a pass begins.
        self.urgent: Callable[[], bool] = lambda: False
        self.computing: Callable[[], None] = lambda: None
        self._totals: dict[str, Any] = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "draft_tokens",
             "accepted_draft_tokens", "preemptions", "filler_tokens", "steps", "cache_bytes_peak"), 0
        ) | {"step_seconds": 0.0}  # fmt: skip
        self._finished: dict[str, int] = {}
        for name, folder in (adapters or {}).items():
            self.add_adapter(name, folder)
        hooks.ready(self.runner, blocks)

    # ---- requests ----

    def check(self, request: Request) -> None:
        """Raises RequestError when the request cannot be served; `param` names the field at fault."""
        facts, prompt = self.facts, request.prompt
        if self._closed:
            raise RequestError("The engine is closed", remedy="Open another one")
        if not prompt:
            raise RequestError("The prompt is empty", remedy="Write something", param="prompt")
        if min(prompt) < 0 or max(prompt) >= facts.vocab:
            bad = next(t for t in prompt if not 0 <= t < facts.vocab)
            raise RequestError(f"Token id {bad} is outside the vocabulary of {facts.vocab}", param="prompt")
        room = self.context - (0 if request.embed else 1)
        if len(prompt) > room:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens; the model's context is {self.context}",
                remedy="Shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        if request.adapter and (request.adapter not in self.adapters or request.adapter in self._leaving):
            known = nearest(request.adapter, self.adapters)
            raise RequestError(
                f"There is no adapter {request.adapter}", remedy=known, param="model", code="model_not_found"
            )
        if request.id in self._requests:
            raise RequestError(f"A request named {request.id} is being served", param="id")
        check_sampling(request.sampling, facts.vocab)
        for part in self._asked:
            part.check(request)

    def submit(self, request: Request) -> None:
        """Take a request in; its answer comes out of `step`.

        Raises:
            RequestError: as `check`, or a prompt that needs more cache than there is.
        """
        self.check(request)
        size, sampling = len(request.prompt), request.sampling
        left = self.context - size
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens or left, left)) if left else sampling
        positions = None
        tokens = list(request.prompt)
        isolation = request.isolation
        if self.hooks.filter and not request.embed:
            positions = list(self.hooks.filter.keep(tokens))
            tokens = [tokens[i] for i in positions]
            isolation += f"\0{hash(tuple(positions))}"  # the same tokens at other positions have other keys
        if not self.prefix_cache or request.embed or sampling.prompt_logprobs is not None:
            # Every token must be computed, or none may be shared; an id may come again when its request has ended.
            isolation = f"{isolation}\0{next(self._alone)}"
        request = replace(request, sampling=sampling, isolation=isolation)
        sequence = Answer(request, 0, tokens, len(tokens), positions)
        states = [self.sampler.state(request, i) for i in range(1 if request.embed else sampling.n)]
        adapter = self.adapters.get(request.adapter, self._own_adapter)
        work = _Work(sequence, states[0], self._stop(request), adapter, states[1:])
        self.scheduler.add(sequence)
        self._works[sequence] = work
        self._requests[request.id] = [sequence]
        self._totals["prompt_tokens"] += size

    def _stop(self, request: Request) -> TextStop:
        return TextStop(self.tokenizer, request.sampling, request.prompt if request.continues else ())

    def cancel(self, request_id: str) -> None:
        """Drop a request; its pages are free at once. Unknown or ended ones are passed over."""
        for sequence in self._requests.get(request_id, []).copy():
            self._end(self._works[sequence], "abort")
        self.scheduler.cancel(request_id)
        self._requests.pop(request_id, None)

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to report."""
        return not (self._works or self._deltas)

    # ---- the step ----

    def step(self) -> list[Delta]:
        """Compute one batch, then filler work; what the batch added to each answer."""
        deltas = self.advance()
        self.fill()
        return deltas

    def advance(self) -> list[Delta]:
        """Compute one batch and leave the rest of the step to `fill`; what the batch added to each answer."""
        self._propose()
        began = time.monotonic()
        plan = self.scheduler.schedule()
        outcomes = self._run(plan, began)
        self._settle(outcomes)
        if self.hooks.filler:
            self._spare = Spare(
                tokens=plan.spare,
                computed=self.scheduler.max_tokens - plan.spare,
                context=sum(chunk.start + chunk.count for chunk in plan.chunks),
                seconds=time.monotonic() - began,
                running=len(self.scheduler.running),
                urgent=self.urgent,
            )
        deltas = list(self._deltas)
        self._deltas.clear()
        return deltas

    def _run(self, plan: Plan, began: float) -> list[Outcome]:
        if not plan.chunks:
            return []
        if plan.copies:
            self.runner.copy_blocks(plan.copies)
        totals = self._totals
        if self.adapters:  # answers of one adapter side by side read it once
            plan.chunks.sort(key=lambda chunk: self._works[chunk.sequence].adapter)
        works = [self._works[chunk.sequence] for chunk in plan.chunks]
        for work in works:
            if not work.started:
                work.started, work.cached = began, work.sequence.cached
                totals["prefix_queries"] += work.sequence.prompt_tokens
                totals["prefix_hits"] += work.cached
        self.computing()
        try:
            outcomes = self._decoder.run(plan.chunks, works)
        except CacheLost:
            self.scheduler.restart()
            outcomes = []
        totals["steps"] += 1
        totals["step_seconds"] += time.monotonic() - began
        totals["preemptions"] += len(plan.preempted)
        totals["cache_bytes_peak"] = max(totals["cache_bytes_peak"], self.pool.used * self.facts.block_bytes)
        return outcomes

    def _settle(self, outcomes: list[Outcome]) -> None:
        now = time.monotonic()
        for outcome in outcomes:
            work = self._works.get(outcome.chunk.sequence)
            if work is None:  # cancelled while it was computed
                self.scheduler.settle(outcome.chunk, [], 0)
                continue
            if outcome.error:
                self.scheduler.settle(outcome.chunk, [], 0)
                self._end(work, "error", error=outcome.error)
                continue
            if outcome.summed is not None:
                self._settle_embedding(work, outcome)
                continue
            if not outcome.choices:
                self.scheduler.settle(outcome.chunk, [], 0)
                if outcome.prompt:
                    self._deltas.append(self._delta(work, (), "", prompt_logprobs=outcome.prompt))
                continue
            self.scheduler.settle(outcome.chunk, [c.token for c in outcome.choices], outcome.accepted)
            self._siblings(work, outcome, now)
            work.drafted += outcome.chunk.draft
            work.accepted += outcome.accepted
            self._totals["draft_tokens"] += outcome.chunk.draft
            self._totals["accepted_draft_tokens"] += outcome.accepted
            self._take(work, outcome.choices, now, outcome)

    def _take(self, work: _Work, choices: Sequence[Choice], now: float, outcome: Outcome | None = None) -> None:
        """Add drawn tokens to an answer, and end it where a stop says so."""
        work.first_token = work.first_token or now
        work.last_token = now
        stopped = work.stop.push([choice.token for choice in choices])
        kept = choices[: stopped.kept]
        work.tokens += len(kept)
        self._totals["generation_tokens"] += len(kept)
        delta = self._delta(
            work,
            tuple(choice.token for choice in kept),
            stopped.text,
            logprobs=tuple(choice.logprob for choice in kept if choice.logprob is not None),
            prompt_logprobs=outcome.prompt if outcome else (),
        )
        if stopped.finished:
            self._end(work, stopped.finished, delta, stop_reason=stopped.stop_reason)
        else:
            self._deltas.append(delta)

    def _siblings(self, work: _Work, outcome: Outcome, now: float) -> None:
        """Begin the request's further answers: they share the pages of the prompt that has just been computed."""
        states, work.spare = work.spare, []
        sequence = work.sequence
        for index, (state, choice) in enumerate(zip(states, outcome.siblings), start=1):
            twin = self.scheduler.fork(sequence, index)
            twin.tokens[sequence.prompt_tokens :] = [choice.token]
            other = _Work(twin, state, self._stop(sequence.request), work.adapter, [], work.started, cached=work.cached)
            self._works[twin] = other
            self._requests[sequence.request.id].append(twin)
            self._take(other, [choice], now)

    def _settle_embedding(self, work: _Work, outcome: Outcome) -> None:
        assert outcome.summed is not None
        work.total = outcome.summed if work.total is None else work.total + outcome.summed
        self.scheduler.settle(outcome.chunk, [], 0)
        if work.sequence.pending == 0:
            mean = work.total / work.sequence.prompt_tokens
            vector = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
            self._end(work, "stop", replace(self._delta(work, (), ""), embedding=vector))

    def _end(
        self,
        work: _Work,
        reason: FinishReason,
        delta: Delta | None = None,
        error: str = "",
        stop_reason: str | int | None = None,
    ) -> None:
        sequence = work.sequence
        self.scheduler.finish(sequence)
        del self._works[sequence]
        for part in self._told:
            part.ended(sequence)
        answers = self._requests[sequence.request.id]
        answers.remove(sequence)
        if not answers:
            del self._requests[sequence.request.id]
        self._finished[reason] = self._finished.get(reason, 0) + 1
        delta = delta or self._delta(work, (), work.stop.flush())
        self._deltas.append(replace(delta, finish_reason=reason, error=error, stop_reason=stop_reason))
        for name in [n for n in self._leaving if not self._uses(n)]:
            self._forget(name)

    def _delta(self, work: _Work, tokens: tuple[int, ...], text: str, **more: Any) -> Delta:
        sequence = work.sequence
        usage = Usage(
            prompt_tokens=len(sequence.request.prompt),
            cached_tokens=work.cached,
            completion_tokens=work.tokens,
            draft_tokens=work.drafted,
            accepted_draft_tokens=work.accepted,
            arrival=sequence.request.arrival,
            started=work.started,
            first_token=work.first_token,
            last_token=work.last_token,
        )
        return Delta(sequence.request.id, sequence.index, tokens, text, usage=usage, **more)

    def _propose(self) -> None:
        if not self.hooks.drafter:
            return
        for sequence, work in self._works.items():
            sequence.draft = sequence.draft_parents = ()
            left = (sequence.request.sampling.max_tokens or 0) - work.tokens - 1
            if sequence.decoding and left > 0:
                draft = self.hooks.drafter.propose(sequence, min(self.scheduler.max_tokens - 1, left))
                sequence.draft, sequence.draft_parents = draft.tokens, draft.parents

    def fill(self) -> int:
        """Let the filler use what the latest batch left, once; how many tokens' worth it did."""
        spare, self._spare = self._spare, Spare(0)
        if not self.hooks.filler or spare.tokens <= 0:
            return 0
        used = self.hooks.filler.work(spare)
        self._totals["filler_tokens"] += used
        return used

    def plug_filler(self, filler: Filler) -> None:
        """Plug in filler work while the engine runs. It is closed with the engine.

        Raises:
            UsageError: there is some already.
        """
        if self.hooks.filler is not None:
            raise UsageError("Something else fills the steps of this engine", remedy="Leave out one of them")
        self.hooks = replace(self.hooks, filler=filler)
        self._telling += [filler] if hasattr(filler, "stats") else []

    # ---- adapters ----

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Load an adapter that is a LoRA, or can be written as one; requests name it. The base is not copied.

        Raises:
            UsageError: the name is taken, or the adapter does not belong to this model or is more than low-rank.
        """
        if not name or name == self.name or name in self.adapters:
            raise UsageError(f"The name {name!r} is taken", remedy="Give the adapter another name")
        self.adapters[name] = self.runner.add_adapter(str(folder))

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it are finished first, new ones are refused.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.adapters or name in self._leaving:
            raise UsageError(f"There is no adapter {name}", remedy=nearest(name, self.adapters))
        self._leaving.add(name)
        if not self._uses(name):
            self._forget(name)

    def _uses(self, name: str) -> bool:
        return any(sequence.request.adapter == name for sequence in self._works)

    def _forget(self, name: str) -> None:
        self._leaving.discard(name)
        self.runner.drop_adapter(self.adapters.pop(name))
        # A later adapter of the same name must not find pages that this one filled.
        self.pool.forget()

    # ---- whole answers ----

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of plain text, of a conversation (a list of messages, through the chat template), or as given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.tokenizer.chat(prompt)
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling = Sampling(), *, adapter: str = ""
    ) -> list[list[Completion]]:
        """Answer prompts together: for each, its `sampling.n` completions.

        Args:
            prompts: one prompt or several. A prompt is text, token ids, or a list of messages {"role", "content"}.

        Raises:
            RequestError: one of the requests cannot be served; none is begun.
        """
        many = prompts if _several(prompts) else [prompts]
        requests = [self._asking(p, sampling, adapter) for p in many]  # type: ignore[arg-type]
        for request in requests:
            self.check(request)
        found: dict[str, list[list[Delta]]] = {r.id: [[] for _ in range(sampling.n)] for r in requests}
        with self._awaited(requests) as come:
            while any(request.id in self._requests for request in requests):
                self._round()
        for delta in itertools.chain(*come):
            found[delta.request_id][delta.index].append(delta)
        return [[_completion(deltas) for deltas in found[r.id]] for r in requests]

    def stream(self, prompt: Prompt, sampling: Sampling = Sampling(), *, adapter: str = "") -> Iterator[Delta]:
        """Answer one prompt piece by piece; leaving the iterator cancels the request. Several may be read in turns.

        Raises:
            RequestError: by the call itself, before the first piece.
        """
        pieces = self._pieces(self._asking(prompt, sampling, adapter))
        next(pieces)
        return pieces

    def _asking(self, prompt: Prompt, sampling: Sampling, adapter: str) -> Request:
        return Request(self.prompt_ids(prompt), sampling, adapter=adapter, continues=isinstance(prompt, str))

    @contextmanager
    def _awaited(self, requests: Sequence[Request]) -> Iterator[list[deque[Delta]]]:
        """Requests taken in, and what comes for each, whoever steps; at the end those that are left are cancelled."""
        come: list[deque[Delta]] = [deque() for _ in requests]
        try:
            with self._turn:
                for request, some in zip(requests, come):
                    self.submit(request)
                    self._streams[request.id] = some
            yield come
        finally:
            with self._turn:
                for request in requests:
                    if self._streams.pop(request.id, None) is not None:
                        self.cancel(request.id)

    def _round(self) -> None:
        """A step; what belongs to awaited requests waits for whoever asked."""
        with self._turn:
            for delta in self.step():
                if delta.request_id in self._streams:
                    self._streams[delta.request_id].append(delta)

    def _pieces(self, request: Request) -> Iterator[Any]:
        left = request.sampling.n
        with self._awaited([request]) as (come,):
            yield None  # for `stream`: a generator that has not begun is never told that nobody wants it
            while left:
                while not come:
                    self._round()
                delta = come.popleft()
                yield delta
                left -= delta.finish_reason is not None
                if delta.error:
                    raise ShoestringError("An answer could not be finished", delta.error)

    def embed(self, prompts: Sequence[list[int]], *, adapter: str = "") -> np.ndarray:
        """float32 [len(prompts), hidden]: the mean of each prompt's normed hidden states, scaled to length 1."""
        requests = [Request(list(p), embed=True, adapter=adapter) for p in prompts]
        for request in requests:
            self.check(request)
        with self._awaited(requests) as come:
            while any(request.id in self._requests for request in requests):
                self._round()
        return np.stack([next(d.embedding for d in some if d.embedding is not None) for some in come])

    # ---- accounts ----

    def counts(self) -> Counts:
        used, total, page = self.pool.used, self.pool.count, self.facts.block_bytes
        return Counts(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_used=used,
            blocks_total=total,
            weight_bytes=self.facts.weight_bytes,
            cache_bytes_used=used * page,
            cache_bytes_limit=total * page,
            finished=dict(self._finished),
            plugged={name: value for part in self._telling for name, value in part.stats().items()},
            **self._totals,
        )

    def account(self, stage: Stage) -> None:
        """Record in a ledger's stage what this engine has computed and holds. Bytes are exact, of pages and weights."""
        counts = self.counts()
        stage.record("tokens", counts.generation_tokens, "token", "counted", "answers")
        stage.record("prompt_tokens", counts.prompt_tokens, "token", "counted", "prompts")
        stage.record("steps", counts.steps, "step", "counted")
        stage.record("weight_bytes", counts.weight_bytes, "B", "counted", "weights as they are computed with")
        stage.record("cache_bytes", counts.cache_bytes_peak, "B", "counted", "most pages of keys and values in use")
        stage.record("cache_bytes_limit", counts.cache_bytes_limit, "B", "counted", "pages there are")

    def close(self) -> None:
        """Free the model. The engine cannot be used any more; to close it again changes nothing."""
        if self._closed:
            return
        self._closed = True
        for request_id in list(self._requests):
            self.cancel(request_id)
        self.hooks.close()
        self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reading(plugs: Sequence[str]) -> dict[str, Any]:
    """How the methods that are plugged in want the model read; only they need the list of methods."""
    if not plugs:
        return {}
    from shoestring.engine.plug import loader, span

    return {"loader": loader(plugs), "span": span(plugs)}


def _several(prompts: Any) -> bool:
    return (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str)
        and bool(prompts)
        and not (isinstance(prompts[0], int | np.integer | dict))
    )


def _completion(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    if last.error:
        raise ShoestringError("An answer could not be finished", last.error)
    assert last.finish_reason
    return Completion(
        tuple(token for delta in deltas for token in delta.tokens),
        "".join(delta.text for delta in deltas),
        last.finish_reason,
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        tuple(logprob for delta in deltas for logprob in delta.prompt_logprobs),
        last.usage,
    )


def _blocks(memory: int | None, block_bytes: int, context: int, max_sequences: int) -> int:
    """Pages of the cache: what `memory` holds, or a sensible number."""
    full = -(-context // BLOCK) + 1
    if memory is not None:
        blocks = memory // block_bytes
        if blocks < 2:
            raise UsageError(
                f"{memory} bytes of cache hold {blocks} pages of {block_bytes} bytes",
                remedy=f"Give at least {2 * block_bytes} bytes",
            )
        return int(min(blocks, full * max_sequences))
    room = free_memory() // 4
    wanted = max(full * block_bytes, min(1 << 30, room))
    return int(max(2, min(wanted // block_bytes, full * max_sequences)))

"""CE-CoLLM: the edge runs the lower layers and says itself what it is sure of; a cloud finishes the rest on demand.

How it works
    1. The model of L layers has exit heads behind e1 < e2. The edge loads the layers 1..e2, the cloud e1+1..L. For a
       token the edge runs to e1: if max softmax(exit 1) >= theta it says argmax; else on to e2 and the same test there.
       A token that left at e1 waits with its hidden state; when a later one needs the layers above, it goes first.
    2. As soon as h_e1 of a token exists, before exit 1 is computed, it goes up beside the edge's own work: dialogue,
       position, numbers. A prompt's states go up piece by piece while it is computed.
    3. The cloud begins at e1 + 1, which it can do earliest, and computes e1+1..e2 once more: that is the price.
    4. Cloud, for each dialogue: states that wait, keys and values of its layers, the next position. Asked for the token
       after position t it waits for the states up to t, runs all that wait as one chunk, and returns one token id. What
       the edge has answered itself is computed there in bulk, or never.
    5. Uploading and asking are two connections. Dialogues that ask at the same time are computed together.
    6. States travel as fp32, fp16 (half the bytes; as bf16 where a number is too large for it), bf16, or int8 with one
       scale a token.
    7. Where no cloud answers within `patience` the token is taken from exit 2, as are the next ones until it answers
       again; the states are kept, and what is missing goes up first. Without a cloud the edge works alone.

Where it bends
    Greedy answers only: with sampling, exits change the distribution. theta = 1 never leaves, also where a confidence
    rounds to 1, and gives the tokens of the whole model; below, answers may differ. The model must not have been made
    for exits: heads are trained beside it (the method exit_heads), and untrained ones are refused. Hidden states tell
    what was written, so use TLS on a network of others; nothing of them is logged. Their fingerprint samples large
    files. The paper's models are pre-trained with exits and its links are wide-area ones; a small model with heads
    added afterwards is sure of few tokens.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper
from shoestring.engine.hooks import Hooks
from shoestring.engine.request import Request, RequestError

if TYPE_CHECKING:
    from shoestring.engine.engine import Engine
    from shoestring.engine.exits import ExitHeads
    from shoestring.engine.open import Opened
    from shoestring.engine.runner import Batch
    from shoestring.engine.sequence import Sequence as Answer
    from shoestring.methods.serving._split_link import Link

METHOD = Method(
    paper=Paper(
        "CE-CoLLM: Efficient and Adaptive Large Language Models Through Cloud-Edge Collaboration",
        "2024-11",
        code="mlsysx/CE-CoLLM",
    ),
    provides="CeCollmConfig",
    saves=("compute", "money", "network", "latency", "memory"),
    combines={"quantizers": "yes", "decoding": "passes end at the edge's gates already"},
    traits={"plugs": "exit, tap, front", "roles": "edge=plug, cloud=front"},
    expects={
        "check_drawn_answers_are_those_of_plain_serving": "with sampling, exits would change the distribution: refused",
    },
)
_LOG = 4096  # tokens of which the log knows


@dataclass(frozen=True)
class CeCollmConfig:
    """Both roles. Lengths in layers, times in seconds.

    Attributes:
        heads: edge: folder of two trained exit heads, e1 and e2.
        cloud: edge: address of the cloud; empty works alone.
        threshold: edge: theta, the calibrated confidence from which the edge answers itself; 1 is never.
        transfer: edge: how states travel: fp32, fp16, bf16 or int8.
        patience: edge: longest wait for a token of the cloud.
        key: edge: the cloud's key; default is SHOESTRING_API_KEY.
        after: cloud: e1, the layers that edges run before they send.
        idle: cloud: a dialogue that is not heard of for so long is forgotten.
        dialogues: cloud: how many of full length there is room for.
    """

    heads: str = ""
    cloud: str = ""
    threshold: float = 0.8
    transfer: str = "fp16"
    patience: float = 5.0
    key: str = ""
    after: int = 0
    idle: float = 600.0
    dialogues: int = 16

    def __post_init__(self) -> None:
        from shoestring.methods.serving._split import check_form

        check_form(self.transfer)
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold} is not a confidence", remedy="Give 0 to 1; 1 is never")
        for name in ("patience", "idle", "dialogues"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} is not possible", remedy="Give more than 0")
        if self.after < 0:
            raise UsageError(f"after={self.after} is not possible", remedy="Give the layers that edges run, e1")


def example() -> CeCollmConfig:
    return CeCollmConfig(heads="exit-heads", cloud="http://127.0.0.1:8001")


@dataclass(frozen=True)
class Said:
    """One token: who said it ("exit 1", "exit 2", "cloud" or "fallback"), how sure the exit was, how long it took."""

    by: str
    confidence: float
    seconds: float


class Edge:
    """Exit policy and tap in one: sees every state at e1 on its way, and decides at e1 and e2."""

    def __init__(self, heads: ExitHeads, link: Link | None, threshold: float) -> None:
        self.heads, self.link, self.threshold = heads, link, threshold
        self.layer = heads.layers[0]
        self.log: deque[Said] = deque(maxlen=_LOG)
        self.counts = dict.fromkeys(("exit 1", "exit 2", "cloud", "fallback"), 0)
        self._began = 0.0
        self._own = secrets.token_hex(6)  # other edges number their requests too

    @property
    def layers(self) -> Sequence[int]:
        return self.heads.layers

    def check(self, request: Request) -> None:
        s = request.sampling
        greedy = s.temperature == 0 and s.repetition_penalty == 1 and not (s.presence_penalty or s.frequency_penalty)
        for field, plain in (
            ("temperature", greedy), ("logit_bias", not s.logit_bias), ("logprobs", s.logprobs is None),
            ("min_tokens", not s.min_tokens), ("response_format", s.constraint is None), ("n", s.n == 1),
        ):  # fmt: skip
            if not plain:
                raise RequestError(
                    "This server answers greedily only", "a part of the model elsewhere says tokens, not chances",
                    "Ask for one answer, with temperature 0, without penalties, constraints or log-probabilities",
                    param=field,
                )  # fmt: skip
        if request.embed or s.prompt_logprobs is not None:
            raise RequestError("The last layers of this model run elsewhere", remedy="Ask for text", param="input")

    def pass_through(self, hidden: np.ndarray, batch: Batch) -> np.ndarray:
        """Send what has come to e1, before anybody decides on it."""
        self._began = time.perf_counter()
        if self.link:
            for owner, start, end, at in zip(batch.owners, batch.starts, batch.starts[1:], batch.contexts):
                self.link.send(self._name(owner), int(at), hidden[start:end])
        return hidden

    def leave(self, layer: int, hidden: Any, answers: Sequence[Answer]) -> list[np.ndarray | bool]:
        logits = self.heads.logits(layer, hidden)
        sure = self.heads.confidence(layer, logits)
        stays = [not (self.threshold < 1 and c >= self.threshold) for c in sure]
        first = layer == self.layer
        found: list[np.ndarray | bool] = [False if stay else row for stay, row in zip(stays, logits)]
        said = [("exit 1" if first else "exit 2") if not stay else "" for stay in stays]
        if not first:
            asked = [i for i, stay in enumerate(stays) if stay]
            tokens: Sequence[int | None] = [None] * len(asked)
            if self.link and asked:
                # The newest token's place: everything before it has been sent.
                tokens = self.link.ask([(self._name(answers[i]), len(answers[i].tokens) - 1) for i in asked])
            for i, token in zip(asked, tokens):
                if token is not None and token < len(logits[i]):
                    found[i], said[i] = _only(token, logits[i]), "cloud"
                else:
                    found[i], said[i] = logits[i], "fallback" if self.link else "exit 2"
        took = time.perf_counter() - self._began
        for by, confidence in zip(said, sure):
            if by:
                self.counts[by] += 1
                self.log.append(Said(by, float(confidence), took))
        return found

    def ended(self, answer: Answer) -> None:
        if self.link:
            self.link.end(self._name(answer))

    def _name(self, answer: Answer) -> str:
        return f"{self._own}-{answer.request.id}-{answer.index}"

    def stats(self) -> dict[str, float]:
        found = {f"edge_{by.replace(' ', '_')}_tokens": float(n) for by, n in self.counts.items()}
        if self.link:
            found |= {f"edge_bytes_{kind}": float(n) for kind, n in sorted(self.link.bytes.items())}
            found["edge_cloud_up"] = float(self.link.up)
        return found

    def close(self) -> None:
        if self.link:
            self.link.close()


def span(config: CeCollmConfig) -> tuple[int, int]:
    """The edge's layers."""
    return 0, _gates(config)[1]


def plug(config: CeCollmConfig, opened: Opened) -> Hooks:
    """The edge.

    Raises:
        UsageError: heads of another model, or a cloud that has not the other half of this one.
    """
    from shoestring.engine.exits import read_exits
    from shoestring.methods.serving._split import fingerprint, own_key
    from shoestring.methods.serving._split_link import Link

    gates = _gates(config)
    heads = read_exits(Path(config.heads), opened.runner)
    link = None
    if config.cloud:
        hidden = opened.runner.facts.hidden
        hello = {"fingerprint": fingerprint(opened.path), "after": gates[0], "hidden": hidden}
        link = Link(config.cloud, config.key or own_key(), hello, config.transfer, hidden, config.patience)
        try:
            link.greet()
        except BaseException:
            link.close()
            raise
    edge = Edge(heads, link, config.threshold)
    return Hooks(exit=edge, tap=edge)


def front(config: CeCollmConfig, settings: Any) -> Any:
    """The cloud: an application that edges speak to, with the layers after e1 of `settings.model`.

    Raises:
        UsageError: no `after`, or one that leaves the cloud no layers.
    """
    from shoestring.engine.open import open_model
    from shoestring.methods.serving._split import Cloud, Upper, fingerprint, pages_for

    if not config.after:
        raise UsageError("A cloud needs after=LAYERS", "that is where edges send from", "Give e1 of their exit heads")
    opened = open_model(
        settings.model,
        runner=settings.runner,
        dtype=settings.dtype,
        cache_dtype=settings.kv_dtype,
        threads=settings.threads,
        trust_remote_code=settings.trust_remote_code,
        span=(config.after, None),
    )
    upper = Upper(opened.runner, pages_for(opened.runner, settings.cache_bytes, config.dialogues))
    return Cloud(upper, fingerprint(opened.path), config.after, config.idle, opened.runner.close)


@contextmanager
def stage(model: Path) -> Iterator[Engine]:
    """An edge that never leaves, and its cloud in a thread, over random heads: for the room's checks."""
    from shoestring.lab.answering import exact
    from shoestring.lab.split import cloud, random_heads

    heads = random_heads(model, (1, 2))
    words = f"ce_collm,heads={heads},threshold=1,transfer=fp32"
    with cloud(model, front, CeCollmConfig(after=1)) as url, exact(model, plugs=[f"{words},cloud={url}"]) as engine:
        yield engine


def _gates(config: CeCollmConfig) -> tuple[int, int]:
    from shoestring.engine.exits import gates_in

    if not config.heads:
        raise UsageError("An edge needs heads=FOLDER", remedy="`shoestring train --method exit_heads` makes them")
    gates = gates_in(Path(config.heads))
    if len(gates) != 2:
        raise UsageError(f"{config.heads} has exit heads behind {gates}", "an edge has two, e1 < e2")
    return gates[0], gates[1]


def _only(token: int, like: np.ndarray) -> np.ndarray:
    """Logits under which nothing but `token` can be chosen."""
    row = np.full_like(like, -np.inf)
    row[token] = 0.0
    return row

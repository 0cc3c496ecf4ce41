"""Which replica answers: the one that has computed most of a prompt before, unless others have that much less to do.

Everything is counted in characters of prompts. A replica's cost for a request is the part of its prompt that was not
sent there before, and what all its open requests have still to compute. A token of an answer shares its step with
others, so it counts as much as one of a prompt.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

PER_TOKEN = 4  # characters
BLOCK = 128  # characters that are remembered, or not, as one
_ANSWER = 128  # tokens of an answer whose request sets no limit
_LONGEST = 256  # tokens: many ask for far more than they get
_MATCH = 0.5  # share of a prompt known elsewhere from which on going past it is counted as a spill


@dataclass(frozen=True)
class Ask:
    """What a request wants computed.

    Attributes:
        blocks: one hash for each whole block of the prompt, which stands for everything up to its end.
        prompt: characters.
        answers: tokens of all its answers, guessed, in characters.
    """

    blocks: tuple[bytes, ...] = ()
    prompt: int = 0
    answers: int = 0


def asked(path: str, client: str, body: bytes) -> Ask:
    """What a request says it wants; nothing for one that is not for the model, or cannot be read.

    Args:
        client: who asks. Prompts of others are cached apart from theirs, and so are those of another salt or model.
    """
    try:
        given = json.loads(body)
        return _asked(path, client, given) if isinstance(given, dict) else Ask()
    except (ValueError, RecursionError):
        return Ask()


def _asked(path: str, client: str, given: dict[str, Any]) -> Ask:
    if path.endswith("/embeddings"):
        return Ask(prompt=len(_text(given.get("input"))))
    if path.endswith("/chat/completions"):
        tools = _text(given["tools"]) if given.get("tools") else ""
        prompts = [tools + _text(given.get("messages")).removesuffix("]")]  # what follows goes on where this ends
    elif path.endswith("/completions"):
        prompts = [_text(prompt).removesuffix("]") for prompt in _prompts(given.get("prompt"))]
    else:
        return Ask()
    apart = json.dumps([client, given.get("cache_salt"), given.get("model")], default=str)
    most = given.get("max_completion_tokens") or given.get("max_tokens")
    tokens = min(most, _LONGEST) if isinstance(most, int) and most > 0 else _ANSWER
    number = given.get("n")
    answers = len(prompts) * (number if isinstance(number, int) and number > 0 else 1)
    return Ask(_hashes(apart, prompts[0]), sum(map(len, prompts)), answers * tokens * PER_TOKEN)


@dataclass
class Routing:
    """What was sent where, and what is still open. Calls are locked: Ray's router has a thread of its own.

    Attributes:
        room: blocks to remember of each replica: about what its cache of keys and values holds.
        requests: sent; `characters` of prompts in whole blocks, and `found` of these where they were sent.
        spilled: requests that went elsewhere than where most of their prompt was known.
    """

    room: int = 1 << 16
    requests: int = 0
    characters: int = 0
    found: int = 0
    spilled: int = 0
    _known: dict[str, OrderedDict[bytes, None]] = field(default_factory=dict)
    _sent: dict[str, int] = field(default_factory=dict)
    _open: dict[str, tuple[str, int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that are there."""
        return tuple(self._known)

    def keep(self, replicas: Iterable[str]) -> None:
        """These are there, and no others: what was known of others is gone with them."""
        with self._lock:
            kept = list(replicas)
            self._known = {name: self._known.get(name, OrderedDict()) for name in kept}
            self._sent = {name: self._sent.get(name, 0) for name in kept}
            self._open = {key: at for key, at in self._open.items() if at[0] in self._known}

    def lose(self, replica: str) -> None:
        """It has died."""
        self.keep(name for name in self.replicas if name != replica)

    def choose(self, request: str, ask: Ask, replicas: Sequence[str]) -> list[str]:
        """The replicas, the best first, where the request is taken to go: `settle` says if it went elsewhere."""
        with self._lock:
            self._open.pop(request, None)  # Ray asks again when the first choice was full
            work = dict.fromkeys(replicas, 0)
            for name, size in self._open.values():
                if name in work:
                    work[name] += size
            found = {name: self._found(name, ask) for name in replicas}
            cost = {name: work[name] + ask.prompt - found[name] for name in replicas}
            ranked = sorted(replicas, key=lambda name: (cost[name], self._sent.get(name, 0), name))
            if ranked:
                best = ranked[0]
                self._open[request] = best, ask.prompt - found[best] + ask.answers
            return ranked

    def settle(self, request: str, ask: Ask, replica: str) -> None:
        """The request has gone to this replica, which will know its prompt from now on."""
        with self._lock:
            found = {name: self._found(name, ask) for name in self._known}
            if replica not in found:
                return
            if request in self._open:
                self._open[request] = replica, ask.prompt - found[replica] + ask.answers
            self._sent[replica] += 1
            self.requests += 1
            self.characters += len(ask.blocks) * BLOCK
            self.found += found[replica]
            most = max(found.values())
            self.spilled += most > found[replica] and most > _MATCH * ask.prompt
            known = self._known[replica]
            for block in reversed(ask.blocks):  # the beginning is forgotten last
                known[block] = None
                known.move_to_end(block)
            while len(known) > self.room:
                known.popitem(last=False)

    def end(self, request: str) -> None:
        """It has been answered, or will not be."""
        with self._lock:
            self._open.pop(request, None)

    def stats(self) -> dict[str, float]:
        with self._lock:
            return {
                "replicas": len(self._known),
                "routed_requests": self.requests,
                "routed_characters": self.characters,
                "routed_characters_found": self.found,
                "routed_spilled": self.spilled,
            }

    def _found(self, replica: str, ask: Ask) -> int:
        """Characters of the prompt that were sent there before, from its beginning."""
        known: Mapping[bytes, None] = self._known.get(replica, {})
        count = 0
        for block in ask.blocks:
            if block not in known:
                break
            count += 1
        return count * BLOCK


_SHARED: dict[str, Routing] = {}


def shared(name: str) -> Routing:
    """The one of that name in this process: whoever starts replicas and Ray's router both ask for it."""
    return _SHARED.setdefault(name, Routing())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _prompts(given: Any) -> list[Any]:
    """A text or list of token ids is one prompt, a list of these are several."""
    several = isinstance(given, list) and given and not isinstance(given[0], int)
    return given if several else [given]


def _hashes(apart: str, text: str) -> tuple[bytes, ...]:
    made: list[bytes] = []
    hashed: Callable[[bytes], Any] = lambda data: blake2b(data, digest_size=8)
    last = hashed(apart.encode("utf-8", "replace")).digest()
    for at in range(BLOCK, len(text) + 1, BLOCK):
        last = hashed(last + text[at - BLOCK : at].encode("utf-8", "replace")).digest()
        made.append(last)
    return tuple(made)

"""What all routes share: the engine once it is there, who may come in, what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any

from shoestring import __version__
from shoestring.server.bill import Meter
from shoestring.server.errors import ApiError
from shoestring.server.keys import ANYONE, Client, Keys
from shoestring.server.limits import Gate
from shoestring.server.metrics import Metrics
from shoestring.server.settings import Settings, names

if TYPE_CHECKING:
    from shoestring.engine.aio import AsyncEngine

log = logging.getLogger("shoestring.server")


class Off:
    """Stands where fine-tuning would be: whatever is asked of it is refused."""

    def __getattr__(self, name: str) -> Any:
        raise ApiError(403, "Fine-tuning is off. The server must be started with --fine-tune FOLDER")


class Service:
    """One server's state. Used from the event loop alone.

    Attributes:
        state: "loading", "ready" or "draining"; what the engine says of itself is in `health`.
        tasks: requests under way, so that they can be cut off at the end.
        tuning: files and fine-tuning jobs; while that is off, what refuses them.
        owners: adapters that only one client may use, name -> its digest; the others are everybody's.
    """

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self.settings, self.keys = settings, keys
        self.state = "loading"
        self.names = names(settings.served_model_name)
        self.gate = Gate(
            settings.replicas * (settings.max_num_seqs + settings.queue),
            settings.key_concurrency,
            settings.key_requests_per_minute,
        )
        self.meter = Meter()
        self.metrics = Metrics(self)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.tuning: Any = Off()
        self.owners: dict[str, str] = {}
        self.created = int(time.time())
        self.fingerprint = ""
        self.front: Any = None  # an application that answers where an engine would
        self._engine: AsyncEngine | None = None

    def open_front(self, front: Any) -> None:
        """From now on requests are answered, by others."""
        self.front = front
        self.names = self.names or list(getattr(front, "names", ())) or [self.settings.title]
        if self.state == "loading":
            self.state = "ready"

    def open(self, engine: AsyncEngine) -> None:
        """From now on requests are answered."""
        self._engine = engine
        inner = engine.engine
        self.names = self.names or [inner.name]
        about = f"{self.names[0]} {inner.facts.precision} {inner.facts.backend} {__version__}"
        self.fingerprint = "fp_" + hashlib.sha256(about.encode()).hexdigest()[:10]
        if self.state == "loading":
            self.state = "ready"

    @property
    def engine(self) -> AsyncEngine:
        """The engine.

        Raises:
            ApiError: 503 while it is not there, not any more, or about to go.
        """
        self.check(self._engine is not None)
        assert self._engine
        if self._engine.state != "ready":
            raise ApiError(503, "The engine has stopped", code="engine_failed", headers={"x-should-retry": "false"})
        return self._engine

    def check(self, there: bool) -> None:
        """Raises ApiError, 503, while what answers is not there, or is about to go."""
        if self.state == "draining":
            raise ApiError(503, "The server is ending", code="draining", headers=_LATER | {"connection": "close"})
        if not there:
            raise ApiError(503, "The model is being loaded", code="model_loading", headers=_LATER)

    @property
    def loaded(self) -> AsyncEngine | None:
        """The engine in whatever state, for those who only look."""
        return self._engine

    def health(self) -> str:
        """One of loading, ready, draining, failing, stalled."""
        engine = self._engine
        if engine is not None and engine.state != "ready":
            return "failing"
        if engine is not None and engine.busy and time.monotonic() - engine.last_step > self.settings.stall_seconds:
            return "stalled"
        if self.state == "ready" and hasattr(self.front, "health"):
            return str(self.front.health())
        return self.state

    def adapters(self, client: Client = ANYONE) -> list[str]:
        """Names of the loaded adapters that a client may use."""
        there = self._engine.engine.adapters if self._engine is not None else {}
        return sorted(name for name in there if self.owners.get(name, "") in ("", client.digest))

    def pick(self, model: str, client: Client) -> str:
        """The adapter that a request's `model` names; empty for the base model.

        Raises:
            ApiError: 404 when there is neither model nor adapter of that name for this client.
        """
        if model in self.names:
            return ""
        self.engine  # noqa: B018  # refuses while it is loading or ending
        adapters = self.adapters(client)
        if model in adapters:
            return model
        known = ", ".join([*self.names, *adapters][:20])
        raise ApiError(404, f"There is no such model. There are: {known}", param="model", code="model_not_found")

    def isolation(self, client: Client, salt: str | None) -> str:
        """Requests share cached prefixes only when this word is the same: one key, one salt."""
        return f"{client.digest}:{salt or ''}"


_LATER = {"retry-after": "2"}

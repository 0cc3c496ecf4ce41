"""Keys of clients. Only their hashes are kept, and comparing takes the same time whatever was sent."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from shoestring.core.errors import UsageError

VARIABLE = "SHOESTRING_API_KEY"
_LONGEST = 1024


@dataclass(frozen=True)
class Client:
    """Who is asking: `name` is safe to show, `digest` tells clients apart and is not."""

    name: str
    digest: str


ANYONE = Client("anyone", "")


def client_of(request: Any) -> Client:
    """Who has sent a request that passed the door."""
    return cast(Client, request.state.client)


class Keys:
    """The keys that are let in; without any, everybody is."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._clients: list[tuple[bytes, Client]] = []
        for key in dict.fromkeys(keys):
            if not key.isascii() or not key.isprintable() or " " in key or len(key) > _LONGEST:
                raise UsageError("A key has spaces or other characters than printable ASCII, or is too long")
            digest = hashlib.sha256(key.encode()).digest()
            self._clients.append((digest, Client(digest.hex()[:8], digest.hex())))

    def __bool__(self) -> bool:
        return bool(self._clients)

    @classmethod
    def load(cls, file: str = "") -> Keys:
        """The keys in `file`, one a line, `#` for remarks, and the one in SHOESTRING_API_KEY.

        Raises:
            UsageError: the file cannot be read, has no key, or a key with spaces.
        """
        found = [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else []
        if file:
            try:
                lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not text"
                raise UsageError(f"The key file {file} cannot be read", why) from None
            kept = [line for line in lines if line and not line.startswith("#")]
            if not kept:
                raise UsageError(f"The key file {file} has no key", remedy="Write one key a line")
            found += kept
        return cls(found)

    def client(self, headers: Sequence[tuple[bytes, bytes]]) -> Client | None:
        """Who sent these headers; None for nobody we know."""
        if not self._clients:
            return ANYONE
        sent = [value for name, value in headers if name == b"authorization"]
        if len(sent) != 1:
            return None
        digest = hashlib.sha256(_presented(sent[0])).digest()
        found = None
        for known, client in self._clients:
            if hmac.compare_digest(known, digest):
                found = client
        return found


def _presented(header: bytes) -> bytes:
    """The key in `Bearer KEY`, or in `Basic` as the password, which is how browsers ask a person."""
    scheme, _, rest = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""

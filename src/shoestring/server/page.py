"""The status page: one file, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


@cache
def html() -> bytes:
    return _FILE.read_bytes()


def _hashes(tag: str) -> str:
    """What a policy needs to allow the page's own scripts or styles, and no others."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html().decode(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
}

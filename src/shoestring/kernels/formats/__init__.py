"""The values of packed weights, in plain torch: what a format's tensors stand for, how they are made, their product.

A file holds the formats of one kind; `shoestring.kernels.layout` has their sizes, without torch. The native kernels
compute with the same tensors, and these files are what they are held against.
"""

from __future__ import annotations

import importlib
from functools import cache

from shoestring.kernels.formats._format import Format, Tensors
from shoestring.kernels.layout import Layout
from shoestring.kernels.layout import parse as parse_layout

__all__ = ["Format", "Tensors", "parse"]


@cache
def parse(spec: str) -> Format:
    """The format that `spec` names, such as `int4/64`.

    Raises:
        UsageError: there is no such format.
    """
    return of(parse_layout(spec))


def of(layout: Layout) -> Format:
    """The format whose tensors lie so."""
    made: Format = importlib.import_module(f"{__name__}.{layout.kind}").FORMAT(layout)
    return made

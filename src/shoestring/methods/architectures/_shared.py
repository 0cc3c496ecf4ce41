"""What every architecture shares: what a conversion returns, names that say where they come from, and the seal.

A folder of an architecture is read with the classes that wrote it. transformers refuses a `model_type` that it does not
know; but whoever reads the folder with the class of the family it was made from would get random weights for whatever
that family has and the architecture has not. So the folder is sealed, as folders of the quantizers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shoestring.models.seal import seal, unseal

PREFIX = "shoestring_"  # of every `model_type` of this room, by which a folder tells that it needs it
ROOM = "shoestring.methods.architectures"  # what to import before such a folder can be read
LINE = f"import {ROOM}"

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Converted:
    """A model of the new build with the weights of the old one.

    Attributes:
        facts: what was measured and chosen on the way, as plain data; kept in the folder.
    """

    model: PreTrainedModel
    facts: Mapping[str, Any] = field(default_factory=dict)


class Sealed:
    """Goes before the family's own class among the bases of a configuration: it is sealed where it is saved, and takes
    the seal off where it is read."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        unseal(self, ROOM)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        seal(Path(save_directory), ROOM)

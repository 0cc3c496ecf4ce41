"""What every architecture shares: what a conversion returns, names that say where they come from, and the seal.

A folder of an architecture is read with the classes that wrote it. transformers refuses a `model_type` that it does not
know; but whoever reads the folder with the class of the family it was made from would get random weights for whatever
that family has and the architecture has not. So the folder is sealed, as folders of the quantizers are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

PREFIX = "shoestring_"  # of every `model_type` of this room, by which a folder tells that it needs it
LINE = "import shoestring.methods.architectures"
# A name that no weight file has: who does not know to remove it stops, with the remedy in the message.
SEAL = "needs-the-line__import-shoestring.methods.architectures__before-from_pretrained.safetensors"

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Converted:
    """A model of the new build with the weights of the old one.

    Attributes:
        facts: what was measured and chosen on the way, as plain data; kept in the folder.
    """

    model: PreTrainedModel
    facts: Mapping[str, Any] = field(default_factory=dict)


def unseal(config: Any) -> None:
    """Take the seal off a configuration that was read from a sealed folder; for the `__post_init__` of a config."""
    if getattr(config, "transformers_weights", None) == SEAL:
        del config.transformers_weights


def seal(folder: Path) -> None:
    """Make a saved folder refuse the classes of the family it was made from, with the remedy in their error."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["transformers_weights"] = SEAL
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""Forms of adapters: plain LoRA as it is, what its method can write as LoRA, and what a method must make known to peft.

The type that an adapter's configuration names is the name of its method, in capitals. A method file may define
`as_lora(folder: Path, out: Path) -> None`: it writes the adapter of `folder` into the empty folder `out` as a plain
LoRA folder of peft that adds exactly the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoestring.core.errors import UsageError
from shoestring.models.folder import ADAPTER_CONFIG, check_adapter

if TYPE_CHECKING:
    from shoestring.core.method import Method

_ROOM, _WORD = "adapters", "as_lora"


class NotBeside(UsageError):
    """A sound adapter that cannot run beside the weights of its base and share batches with others."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(
            what,
            why,
            "Give its folder as the model, which serves it alone, or merge it into its base: `shoestring merge`",
        )


@contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """The folder itself when it is a LoRA, else one that its method writes, for as long as the block lasts.

    Raises:
        NotBeside: no method can write it as LoRA.
        UsageError: as `check_adapter`.
    """
    config = check_adapter(folder)
    if config.get("peft_type") == "LORA":
        yield folder
        return
    import tempfile  # these take their time, and a LoRA needs neither

    from shoestring.core import catalog

    method = _method(config)
    if method is None or _WORD not in method.words:
        raise NotBeside(
            f"{folder / ADAPTER_CONFIG} is of the type {str(config.get('peft_type'))[:40]!r}",
            "only LoRA adapters, and those that can be written as LoRA, run beside the weights",
        )
    with tempfile.TemporaryDirectory(prefix="shoestring-") as place:
        catalog.module(method.name).as_lora(folder, Path(place))
        yield Path(place)


def make_known(folder: Path) -> None:
    """Let the method of an adapter's type register it with peft. What stays unknown is left for peft to refuse."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from shoestring.core import catalog

    config = check_adapter(folder)
    method = _method(config)
    if method is not None:
        catalog.module(method.name)
    elif config.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        catalog.adopt_room(_ROOM)


def _method(config: dict[str, Any]) -> Method | None:
    from shoestring.core import catalog

    found = catalog.methods().get(str(config.get("peft_type")).lower())
    return found if found and found.room == _ROOM else None

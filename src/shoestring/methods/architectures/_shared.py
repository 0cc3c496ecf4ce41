"""What every architecture shares: its classes for each family, what a conversion returns, and the seal.

A folder of an architecture is read with the classes that wrote it. transformers refuses a `model_type` that it does not
know; but whoever reads the folder with the class of the family it was made from would get random weights for whatever
that family has and the architecture has not. So the folder is sealed, as folders of the quantizers are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoestring.core.errors import UsageError
from shoestring.models.derived import plain
from shoestring.models.load import quiet
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


def derive(
    family: str,
    module: str,
    word: str,
    mixin: type,
    fields: Mapping[str, tuple[Any, Any]],
    complete: Callable[[Any], None] = lambda config: None,
    check: Callable[[Any], None] = lambda config: None,
) -> tuple[Any, Any]:
    """The configuration and the model class of an architecture for one family.

    Args:
        module: of the method; the last part of its name stands in `model_type`.
        word: what the names of both classes begin with.
        mixin: goes before the family's own model class.
        fields: what the configuration says beside the family's: name -> type and default.
        complete: called with a new configuration, fills in what was left open.
        check: called with a configuration, raises ValueError where it cannot be.
    """
    base, own = CONFIG_MAPPING[family], plain(family)
    name = word + own.__name__.removesuffix("ForCausalLM")

    def __post_init__(self: Any, **kwargs: Any) -> None:
        Sealed.__post_init__(self, **kwargs)
        complete(self)

    said = {
        "__module__": module,
        "__doc__": f"A {base.__name__} that also says {', '.join(fields)}.",
        "__annotations__": {field: kind for field, (kind, _) in fields.items()},
        **{field: default for field, (_, default) in fields.items()},
        "model_type": f"{PREFIX}{module.rpartition('.')[2]}_{family}",
        "__post_init__": __post_init__,
        "validate_architecture": check,
    }
    config: Any = strict(type(f"{name}Config", (Sealed, base), said))
    named = {"__module__": module, "__doc__": f"A {own.__name__} of a {config.__name__}.", "config_class": config}
    return config, type(f"{name}ForCausalLM", (mixin, own), named)


def built(made: tuple[Any, Any], model: PreTrainedModel, state: Mapping[str, Tensor], **own: Any) -> PreTrainedModel:
    """What `derive` has made, with the configuration of `model`, in which it says `own`, and the weights `state`.

    It is in eval mode and generates as `model` does.
    """
    config, kind = made
    said = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    with quiet():
        found, report = kind.from_pretrained(
            None, config=config(**{**said, **own}), state_dict=state, dtype=model.dtype, output_loading_info=True
        )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    found.generation_config = copy.deepcopy(model.generation_config)
    return found.eval()  # type: ignore[no-any-return]


def family_of(model: PreTrainedModel, families: Sequence[str], method: str, why: str) -> str:
    """Which of the families a plain model is of. Raises UsageError for another: `why` does `method` not fit it."""
    for family in families:
        if type(model) is plain(family):
            return family
    known = ", ".join(plain(family).__name__ for family in families)
    raise UsageError(f"{method} does not fit {type(model).__name__}", why, f"Use one of {known}")

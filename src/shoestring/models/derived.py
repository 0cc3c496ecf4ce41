"""Model classes that derive from a family's own: more in the configuration, other parts in the model.

They are known to transformers' Auto classes once the module that asks for them has been imported. What they save is
sealed: a reader that has not imported it stops, where the family's own class would fill what it misses with random
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shoestring.models.seal import seal, unseal


def plain(family: str) -> Any:
    """A family's own causal model class."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


def derive(
    family: str,
    module: str,
    word: str,
    prefix: str,
    fields: Mapping[str, tuple[Any, Any]],
    *,
    build: Callable[[Any, Any], None],
    check: Callable[[Any], None],
    complete: Callable[[Any], None] = lambda config: None,
) -> tuple[Any, Any]:
    """The configuration and the causal model class that derive from those of `family`.

    Args:
        module: full name of the module that they belong to, whose import a saved folder asks of its readers.
        word: what the names of both begin with. `prefix`: what their `model_type` begins with.
        fields: what the configuration says beside the family's: name -> type and default.
        build: called with a new model of the family and its configuration, puts other parts into it.
        check: called with a configuration, raises ValueError where it cannot be.
        complete: called with a configuration, fills in what was left open.
    """
    base, own = CONFIG_MAPPING[family], plain(family)

    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        complete(self)
        unseal(self, module)

    def save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> None:
        base.save_pretrained(self, save_directory, **kwargs)
        seal(Path(save_directory), module)

    said = {
        "__module__": module,
        "__doc__": f"A {base.__name__} that also says {', '.join(fields)}.",
        "__annotations__": {name: kind for name, (kind, _) in fields.items()},
        **{name: default for name, (_, default) in fields.items()},
        "model_type": prefix + family,
        "__post_init__": __post_init__,
        "save_pretrained": save_pretrained,
        "validate_architecture": check,
    }
    config: Any = strict(type(f"{word}{base.__name__}", (base,), said))

    def __init__(self: Any, config: Any) -> None:
        own.__init__(self, config)
        build(self, config)
        self.post_init()

    named = {
        "__module__": module,
        "__doc__": f"A {own.__name__} of a {config.__name__}.",
        "__init__": __init__,
        "config_class": config,
    }
    made = type(f"{word}{own.__name__}", (own,), named)
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, made)
    return config, made

"""What a run was started from, in plain fields, so that a resumed run can be held against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from torch import nn

from shoestring.training.options import TrainOptions

HARMLESS = ("version.",)
_SAMPLES = 64
# Where a model lies and which library wrote its config may change without changing the model.
_PLACES = (
    "_name_or_path",
    "base_model_name_or_path",
    "revision",
    "transformers_version",
    "use_cache",
    "inference_mode",
)


def fingerprint(model: nn.Module, rows: Sequence[dict[str, Any]], options: TrainOptions) -> dict[str, Any]:
    """Fields that must be equal when the run is resumed: data, options, model, adapter, library versions."""
    found: dict[str, Any] = {"data": data_digest(rows), **options.decisive()}
    trained = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    found["trained weights"] = _digest(trained)
    for name, config in getattr(model, "peft_config", {}).items():
        fields = config.to_dict()
        found |= {f"adapter {name}.{k}": v for k, v in fields.items() if k not in _PLACES and v is not None}
    config = getattr(model, "config", None)
    if config is not None:
        found["model config"] = _digest({k: v for k, v in config.to_dict().items() if k not in _PLACES})
    found["base model"] = weights_digest(model)
    for package in ("torch", "transformers", "peft"):
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    return json.loads(json.dumps(found, default=_plain))


def data_digest(rows: Sequence[dict[str, Any]]) -> str:
    """Hash of all token ids, labels, positions and contexts, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for values in (*map(row.get, ("input_ids", "labels", "position_ids")), *row.get("context", ())):
            digest.update(np.asarray(() if values is None else values, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Hash of some values of every frozen weight, or of every weight when none is frozen."""
    parameters = dict(model.named_parameters())
    frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
    digest = hashlib.sha256()
    for name, parameter in (frozen or parameters).items():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)

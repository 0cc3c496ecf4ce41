"""PEFT's LoRA folders as low-rank matrices: read without torch, refused when they are more."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.engine.adapter_forms import NotBeside
from shoestring.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from shoestring.models.llama_like import PROJECTIONS, LlamaLike
from shoestring.models.tensors import floats, open_safetensors

_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d{1,5})\.(?:self_attn|mlp)\.(\w+)_proj\.lora_(A|B)\.weight", re.ASCII
)
# Fields that change nothing about y += scale * B A x, whatever they hold; any other may only hold nothing.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "ensure_weight_tying", "init_lora_weights", "bias", "runtime_config", "fan_in_fan_out",
}  # fmt: skip
# Ways to begin that leave the base's weights as they are; others (PiSSA, OLoRA, LoftQ ...) change them.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_adapter(folder: Path, model: LlamaLike) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """The adapter in `folder` for `model`: (layer, projection) -> a [rank, in], b [out, rank] with the scale in it.

    Raises:
        NotBeside: more than plain LoRA, or tensors that the model has no place for.
        UsageError: pickles or corrupt files; tensors of other shapes, or not finite. The field or tensor is named.
    """
    config = check_adapter(folder)
    refuse_more(folder, config)
    where = folder / ADAPTER_WEIGHTS
    tensors = open_safetensors(where)
    halves: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for name in tensors:
        match = _TENSOR.fullmatch(name)
        role = match[2] if match else ""
        layer = int(match[1]) if match else 0
        if match is None or layer >= model.layers or role not in {*PROJECTIONS} & {*model.block_roles(layer)}:
            raise NotBeside(
                f"{where} holds {name[:120]}",
                f"a {model.family} model of {model.layers} layers takes no low-rank matrix of that name",
            )
        rows, cols = model.shape_of(role, layer)
        dims = tensors.dims(name) or (0,)
        wanted = (dims[0], cols) if match[3] == "A" else (rows, dims[-1])
        if dims != wanted or not 0 < min(dims) <= 65_536:
            raise UsageError(
                f"{name[:120]} of {where} has the dimensions {dims}",
                f"its weight is {rows} x {cols}",
                "Use the adapter with the base it was trained on",
            )
        values = floats(tensors[name])
        if not np.isfinite(values).all():
            raise UsageError(
                f"{name[:120]} of {where} is not finite", remedy="Save the adapter again, or train it anew"
            )
        halves.setdefault((layer, role), {})[match[3]] = values
    parts = {}
    for (layer, role), pair in halves.items():
        module = model_name(layer, role)
        if len(pair) != 2:
            raise UsageError(f"{where} has only lora_{next(iter(pair))} of {module}", remedy="Save the adapter again")
        a, b = pair["A"], pair["B"]
        rank = chosen(folder, config, "rank_pattern", "r", module)
        if not len(a) == b.shape[1] == rank:
            raise UsageError(
                f"{where} has ranks {len(a)} and {b.shape[1]} for {module}, and {ADAPTER_CONFIG} says {rank}",
                remedy="Save the adapter again",
            )
        alpha = chosen(folder, config, "alpha_pattern", "lora_alpha", module)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        parts[layer, role] = a, b * np.float32(scale)
    return parts


def model_name(layer: int, role: str) -> str:
    """Full name of a projection as an adapter's patterns see it."""
    return f"model.layers.{layer}.{'mlp' if role in ('gate', 'up', 'down') else 'self_attn'}.{role}_proj"


def refuse_more(folder: Path, config: dict[str, Any]) -> None:
    """Raises NotBeside when adapter_config.json asks for more than y += scale * B A x; the fields are named."""
    where = folder / ADAPTER_CONFIG
    more = sorted(name for name, value in config.items() if value and name not in _HARMLESS)
    more += ["bias"] if config.get("bias", "none") != "none" else []
    more += [] if config.get("init_lora_weights") in _STARTS else ["init_lora_weights"]
    if more:
        raise NotBeside(
            f"{where} asks for more than low-rank products ({', '.join(more)[:200]})",
            "this cannot be mixed with other adapters in one batch",
        )


def chosen(folder: Path, config: dict[str, Any], patterns: str, plain: str, module: str) -> float:
    """The value of a module: that of the first pattern its name ends with, else the plain one."""
    found = config.get(plain, 8)
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise UsageError(f"{folder / ADAPTER_CONFIG} has {patterns} that is no table", remedy="Save the adapter again")
    for pattern, value in table.items():
        if re.search(r"[*+?{]", pattern) or len(pattern) > 1000:
            raise UsageError(
                f"{folder / ADAPTER_CONFIG} has a pattern in {patterns} that could take forever to match",
                f"{pattern[:60]!r} repeats something",
                "List the modules' names instead",
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                found = value
                break
        except re.error as error:
            raise UsageError(f"{folder / ADAPTER_CONFIG} has a broken pattern in {patterns}", str(error)) from None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < abs(found) < 1e9:
        raise UsageError(
            f"{folder / ADAPTER_CONFIG} has {plain}={str(found)[:40]} for {module}", remedy="Save it again"
        )
    return found

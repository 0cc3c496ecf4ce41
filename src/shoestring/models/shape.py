"""A model as plain numbers, from the model itself or from its folder's configuration and file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape, Weight
from shoestring.models.folder import ADAPTER_CONFIG, Folder, check_folder
from shoestring.models.inspect import Anatomy, features, inspect, is_norm, is_transposed, plain_role
from shoestring.models.load import auto_class, choose_dtype, kind_of, quiet


def shape_of(model: nn.Module | Path | str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a model, or of a model folder without reading its weights.

    Of a model: `resident` and `stored` are the bytes of its tensors as they are. Of a folder: `stored` is what the file
    headers say (a packed matrix with its scales), `resident` the bytes in the dtype that `load` would choose; packed
    tensors stay packed. For an encoder-decoder `layers` counts both stacks, and a token's FLOPs are those of passing one
    token through each.

    Raises:
        UsageError: the folder is not a sound model folder, or the architecture is not understood.
    """
    if isinstance(model, nn.Module):
        return _shape(model, None, None)
    path = Path(model)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        raise UsageError(f"{path} is an adapter and has no shape of its own", remedy="Merge it into its base first")
    folder = check_folder(path, trust_remote_code=trust_remote_code)
    return _shape(_empty_model(folder, trust_remote_code), folder, choose_dtype("auto", folder, "cpu").itemsize)


def _empty_model(folder: Folder, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig

    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=trust_remote_code)
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            return auto_class(kind_of(folder.config)).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UsageError(
            f"{folder.path / 'config.json'} describes no model that transformers knows", str(error).strip()[:300]
        ) from error


def _shape(model: nn.Module, folder: Folder | None, width: int | None) -> Shape:
    anatomy = inspect(model)
    config: Any = getattr(getattr(model, "get_base_model", lambda: model)(), "config")  # noqa: B009
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    hidden = int(getattr(config, "hidden_size", 0) or model.get_submodule(anatomy.embeddings).embedding_dim)  # type: ignore[arg-type]
    head_dim = int(getattr(config, "head_dim", 0) or hidden // heads)
    context = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 0
    return Shape(
        weights=_weights(model, anatomy, folder, width, _active_share(config)),
        layers=len(anatomy.blocks),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(anatomy, heads, head_dim),
        head_dim=head_dim,
        vocab=int(model.get_submodule(anatomy.embeddings).weight.shape[0]),  # type: ignore[union-attr,index,arg-type]
        context=int(context) if isinstance(context, int) else 0,
        family=str(getattr(config, "model_type", "")),
        other_files=folder.other_files if folder else 0,
    )


def _weights(
    model: nn.Module, anatomy: Anatomy, folder: Folder | None, width: int | None, active: float
) -> tuple[Weight, ...]:
    roles = {anatomy.embeddings: "embed"}
    if anatomy.head:
        roles[anatomy.head] = "head"
    for block in anatomy.blocks:
        roles |= {name: plain_role(key) for key, name in block.projections.items()}
    shared = {
        name: "shared"
        for block in anatomy.blocks
        for key, name in block.projections.items()
        if key.startswith("expert.shared")
    }
    modules = dict(model.named_modules())
    first: dict[int, str] = {}
    weights: list[Weight] = []
    claimed = _packed_parts(folder, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    for name, tensor in _tensors(model):
        module_name = _owner(name, roles)
        module = modules.get(name.rpartition(".")[0], model)
        role = roles.get(module_name, "")
        dims = tuple(tensor.shape)
        if name.endswith("bias") and len(dims) < 2:
            role = "bias"
        elif is_norm(module):
            role = "norm"
        elif isinstance(module, nn.Embedding):
            role = "embed"
        elif not role or len(dims) < 2:
            role = role if role in ("embed", "head") else "other"
        if len(dims) == 2 and is_transposed(module):
            dims = dims[::-1]
        tied = first.get(id(tensor), "")
        first.setdefault(id(tensor), name)
        resident = tensor.numel() * (width or tensor.element_size())
        stored = resident
        if folder:
            stored = claimed.get(name, 0)
            if name not in folder.tensors and stored:
                resident = stored
        used = active if role == "expert" and module_name not in shared else 1.0
        weights.append(Weight(name, role, dims, 0 if tied else stored, 0 if tied else resident, tied, used))
    return tuple(weights)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, tied ones under each of their names, and the buffers that are saved."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    saved = set(model.state_dict(keep_vars=True))
    return parameters + [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _packed_parts(folder: Folder | None, parameters: set[str]) -> dict[str, int]:
    """Bytes on disk of each parameter; a packed matrix is stored under other names in the same module."""
    if folder is None:
        return {}
    stored = {name: folder.tensors[name].size for name in parameters if name in folder.tensors}
    for name, tensor in folder.tensors.items():
        if name not in parameters:
            weight = f"{name.rpartition('.')[0]}.weight"
            if weight in parameters:
                stored[weight] = stored.get(weight, 0) + tensor.size
    return stored


def _owner(name: str, roles: dict[str, str]) -> str:
    """The nearest enclosing module that has a role."""
    while name:
        name = name.rpartition(".")[0]
        if name in roles:
            return name
    return ""


def _active_share(config: Any) -> float:
    """Active experts / experts of a mixture, 1 for a dense model."""
    total = next(
        (
            n
            for n in (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
            if n
        ),
        0,
    )
    active = next(
        (n for n in (getattr(config, key, None) for key in ("num_experts_per_tok", "moe_topk", "top_k_experts")) if n),
        0,
    )
    return active / total if isinstance(active, int) and isinstance(total, int) and active and total else 1.0


def _kv_heads(anatomy: Anatomy, heads: int, head_dim: int) -> int:
    """Key-value heads from the width of the projections, which is what the cache holds."""
    block = anatomy.blocks[-1]
    if "k" in block.projections:
        return max(1, features(anatomy.model.get_submodule(block.projections["k"]))[1] // head_dim)
    width = features(anatomy.model.get_submodule(block.projections["qkv"]))[1]
    return max(1, (width // head_dim - heads) // 2)

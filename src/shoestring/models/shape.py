"""A model as plain numbers, from the model itself or from its folder's configuration and file headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape, Weight, context_of
from shoestring.models.anatomy import Anatomy, features, inspect, is_norm, is_projection, keeps_keys, plain_role
from shoestring.models.folder import ADAPTER_CONFIG, Folder, check_folder
from shoestring.models.guard import Tensor
from shoestring.models.load import auto_class, choose_dtype, kind_of, know_architecture, quiet
from shoestring.models.packed_layers import PARTS


def shape_of(model: nn.Module | Path | str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a model, or of a model folder without reading its weights.

    Of a model: `resident` and `stored` are the bytes of its tensors as they are. Of a folder: `stored` is what the file
    headers say (a packed matrix with its scales), `resident` the bytes in the dtype that `load` would choose; packed
    tensors stay packed. For an encoder-decoder `layers` counts both stacks, and a token's FLOPs are those of passing
    one token through each.

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

    know_architecture(folder)
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
    weights = _weights(model, anatomy, folder, width, config)
    return Shape(
        weights=weights,
        layers=len(anatomy.blocks) * _passes(config, anatomy),
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(anatomy, heads, head_dim),
        head_dim=head_dim,
        vocab=int(model.get_submodule(anatomy.embeddings).weight.shape[0]),  # type: ignore[union-attr,index,arg-type]
        context=context_of(config),
        family=str(getattr(config, "model_type", "")),
        keyless=sum(not keeps_keys(block) for block in anatomy.blocks) * _passes(config, anatomy),
        other_files=folder.total - sum(weight.stored for weight in weights) if folder else 0,
    )


def _weights(
    model: nn.Module, anatomy: Anatomy, folder: Folder | None, width: int | None, config: Any
) -> tuple[Weight, ...]:
    roles = {anatomy.embeddings: "embed"}
    if anatomy.head:
        roles[anatomy.head] = "head"
    in_blocks, always_on = set(), set()
    for block in anatomy.blocks:
        roles |= {name: plain_role(key) for key, name in block.projections.items()}
        in_blocks.add(block.name)
        always_on |= {name for key, name in block.projections.items() if key.startswith("expert.shared")}
    active, passes = _active_share(config), _passes(config, anatomy)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = _tensors(model)
    names = {name for name, _ in parameters}
    on_disk = _stored(parameters, modules, folder) if folder else {}
    first: dict[int, str] = {}
    weights: list[Weight] = []
    for name, parameter in parameters:
        owner = _owner(name, roles)
        module = modules[name.rpartition(".")[0]]
        if _belongs_to_packed(name, module, names):
            continue
        dims = _dims(name, parameter, module)
        tied = first.get(id(parameter), "")
        first.setdefault(id(parameter), name)
        stored = resident = parameter.numel() * (width or parameter.element_size())
        if folder:
            stored, packed = on_disk.get(name, (0, False))
            resident = stored if packed else resident
        elif name.endswith(".weight"):
            own = module.state_dict(keep_vars=True)
            beside = [tensor for key, tensor in own.items() if key != "bias" and tensor is not parameter]
            resident += sum(tensor.numel() * tensor.element_size() for tensor in beside)
            stored = resident
        role = _role(name, dims, module, roles.get(owner, ""))
        used = active if role == "expert" and owner not in always_on else 1.0
        if any(name.startswith(block + ".") for block in in_blocks):
            used *= passes
        weights.append(Weight(name, role, dims, 0 if tied else stored, 0 if tied else resident, tied, used))
    # A projection that gathers its matrix from a parameter of the model says from which; it multiplies all the same.
    for name, module in modules.items():
        source = getattr(module, "shared_with", "")
        if source and is_projection(module):
            columns, rows = features(module)
            used = float(passes) if any(name.startswith(block + ".") for block in in_blocks) else 1.0
            weights.append(Weight(f"{name}.weight", roles.get(name, "other"), (rows, columns), 0, 0, source, used))
    return tuple(weights)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, tied ones under each of their names, and the bodies of matrices that are packed into buffers."""
    found: list[tuple[str, torch.Tensor]] = list(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_matrix(module) and "weight" not in module._parameters and not hasattr(module, "base_layer"):
            buffers = list(module.buffers(recurse=False))
            if buffers:
                found.append(
                    (f"{name}.weight", max(buffers, key=lambda buffer: buffer.numel() * buffer.element_size()))
                )
    return found


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or is_projection(module)


def _role(name: str, dims: tuple[int, ...], module: nn.Module, role: str) -> str:
    if name.endswith("bias"):
        return "bias"
    if is_norm(module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embed"
    return role if role and len(dims) > 1 else "other"


def _dims(name: str, parameter: torch.Tensor, module: nn.Module) -> tuple[int, ...]:
    """Dimensions of the matrix that a parameter stands for: (out, in), also when it is packed or transposed."""
    if name.endswith(".weight"):
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        if is_projection(module) and not hasattr(module, "base_layer"):
            columns, rows = features(module)
            return rows, columns
    return tuple(parameter.shape)


def _belongs_to_packed(name: str, module: nn.Module, names: set[str]) -> bool:
    """Whether a parameter is the scales or the codebook of the packed weight beside it."""
    owner, _, leaf = name.rpartition(".")
    return _is_matrix(module) and leaf not in ("weight", "bias") and f"{owner}.weight" in names


def _stored(
    parameters: list[tuple[str, torch.Tensor]], modules: dict[str, nn.Module], folder: Folder
) -> dict[str, tuple[int, bool]]:
    """Bytes on disk of each parameter with what stands beside it in the file (scales), and whether it is packed."""
    names = {name for name, _ in parameters}
    beside: dict[str, list[Tensor]] = {}
    for name, tensor in folder.tensors.items():
        owner = f"{name.rpartition('.')[0]}.weight"
        if name in names or owner in names:
            beside.setdefault(name if name in names else owner, []).append(tensor)
    together = _packed_experts(folder)
    found: dict[str, tuple[int, bool]] = {}
    absent: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in parameters:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if name in beside:
            dims = _dims(name, parameter, modules[name.rpartition(".")[0]])
            packed = len(beside[name]) > 1 or math.prod(beside[name][0].dims) != math.prod(dims)
            found[name] = sum(tensor.size for tensor in beside[name]), packed
        elif _place(name) in together:
            found[name] = together[_place(name)], True
        else:
            absent[name] = parameter.numel()
    # Some families are stored under other names (each expert apart, no prefix); together they still weigh the same.
    left = sum(tensor.size for tensor in folder.tensors.values()) - sum(size for size, _ in found.values())
    total = sum(absent.values())
    for name, count in absent.items():
        share = left * count // total
        found[name], left, total = (share, False), left - share, total - count
    return found


def _packed_experts(folder: Folder) -> dict[tuple[str, ...], int]:
    """Bytes of the packed matrices of a layer's experts, by what `_place` says of the parameter that they stand for."""
    parameters = {part: name for name, part in PARTS.items()}
    found: dict[tuple[str, ...], int] = {}
    for name, tensor in folder.tensors.items():
        owner, _, part = name.rpartition(".")[0].rpartition(".")
        if part in parameters:
            place = _place(f"{owner}.{parameters[part]}")
            found[place] = found.get(place, 0) + tensor.size
    return found


def _place(name: str) -> tuple[str, ...]:
    """The words of a name but that of the module around experts, for which files of some families have another."""
    words = name.split(".")
    return (*words[:-3], *words[-2:])


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


def _passes(config: Any, anatomy: Anatomy) -> int:
    """How often each block runs: more than once when layers share their weights, as ALBERT's do."""
    layers = getattr(config, "num_hidden_layers", 0)
    return max(1, layers // len(anatomy.blocks)) if isinstance(layers, int) and anatomy.kind != "seq2seq" else 1


def _kv_heads(anatomy: Anatomy, heads: int, head_dim: int) -> int:
    """Key-value heads from the width of the projections, which is what the cache holds; those of the largest layer."""
    block = anatomy.blocks[-1]
    keys = [other.projections["k"] for other in anatomy.blocks if "k" in other.projections]
    if keys:
        return max(1, *(features(anatomy.model.get_submodule(name))[1] // head_dim for name in keys))
    if "qkv" not in block.projections:
        return heads
    width = features(anatomy.model.get_submodule(block.projections["qkv"]))[1]
    return max(1, (width // head_dim - heads) // 2)

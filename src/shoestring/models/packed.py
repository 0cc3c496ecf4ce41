"""Packed weights inside a transformers model: modules that stand for float ones, and the quantizer that reads them.

A packed weight keeps the name `weight` (its scales stand beside it as `scales`), so tying, saving, sharding and device
maps of transformers work on it unchanged, while its shape or type differs from the float one: a reader that does not
know the format meets a mismatch instead of nonsense. Which format each module has stands in `quantization_config`,
under `packing`, so a folder is read without knowing what made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # that of torch's own attention, which reads it
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from shoestring.core.errors import UsageError
from shoestring.core.shape import Shape, Weight
from shoestring.kernels import formats
from shoestring.kernels.formats import Format
from shoestring.models import surgery
from shoestring.models.anatomy import DOWN, GATE_UP, gated_experts, is_router, read_by_families, routers, stacked
from shoestring.models.packed_layers import (
    PARTS,
    ExpertMatrices,
    Packed,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    packed_modules,
    scale_of,
    scaled,
)
from shoestring.models.seal import unseal

__all__ = [
    "BIAS",
    "MOST_LEFT",
    "PARTS",
    "PLAIN",
    "ROOM",
    "ExpertMatrices",
    "Packed",
    "PackedConfig",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedQuantizer",
    "does_not_fit",
    "expert_stacks",
    "float_module",
    "linear",
    "linear_dims",
    "mark",
    "one_of_two",
    "packable",
    "packed_modules",
    "packing_of",
    "parameters_of",
    "priced",
    "refuse_unpacked",
    "replace_embedding",
    "scale_of",
    "tie",
    "tied_head",
    "tied_to_table",
]
ROOM = "shoestring.methods.quantizers"  # what to import before a packed folder can be read
BIAS = "+bias"  # after a format: the layer has a bias, also where the family's own has none
PLAIN = "shoestring_packed"  # the quantization method of folders whose packed layers were made one by one
MOST_LEFT = 0.1  # of the weights that are packed: so many may stand where no packed module holds them


class PackedConfig(QuantizationConfigMixin):
    """Which module is packed in which format; a method that packs while a model is read subclasses it.

    Args:
        modules_to_not_convert: names, or parts of names, of modules to leave alone.
        packing: module -> format such as `int4/64`, of a model that is packed already.
    """

    method = "packed"
    quant_method: Any

    def __init__(
        self,
        modules_to_not_convert: list[str] | None = None,
        packing: Mapping[str, str] | None = None,
        **stray: Any,
    ) -> None:
        self.quant_method = f"shoestring_{self.method}"
        self.modules_to_not_convert = modules_to_not_convert
        self.packing = _checked(packing)
        # Facts that a configuration writes and derives again.
        stray = {name: value for name, value in stray.items() if name not in ("quant_method", "bits")}
        if stray:
            raise UsageError(f"{type(self).__name__} has no option {', '.join(sorted(stray))}")

    def format_of(self, name: str, rows: int, columns: int, embedding: bool) -> Format | None:
        """The format of the module called `name`, whose weight is [rows, columns]; None leaves it as it is.

        The matrices of a layer's experts are asked for as those of one expert, under the names that they have packed:
        the experts' own with `.gate_up` and `.down` behind it. Either both have a format or none has.
        """
        spec = self.packing.get(name)
        return None if spec is None else formats.parse(spec.removesuffix(BIAS))

    def pack(self, weight: torch.Tensor, format: Format, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a float weight [rows, columns]; those of a format whose length depends on them, any length.

        Experts of a mixture come one by one, with their numbers behind the name.
        """
        return format.pack(weight)

    def left_alone(self, name: str) -> bool:
        return any(part in name for part in self.modules_to_not_convert or ())


def _checked(packing: Any) -> dict[str, str]:
    if packing is None:
        return {}
    if isinstance(packing, Mapping) and all(isinstance(word, str) for pair in packing.items() for word in pair):
        return dict(packing)
    raise UsageError(
        "The packing of a configuration does not name a format for each module",
        f"it is {str(packing)[:80]!r}",
        "Check that configuration and weights belong together",
    )


def linear(
    format: Format,
    tensors: Mapping[str, torch.Tensor],
    columns: int,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> PackedLinear:
    """A layer over tensors that `format` made of a matrix [rows, columns]; the bias is [rows]."""
    rows = len(bias) if bias is not None else len(tensors["weight"])
    with torch.device("meta"):
        made = PackedLinear(columns, rows, format, bias is not None, dtype)
    made.hold(format, tensors)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made


def replace_embedding(model: PreTrainedModel, name: str, format: Format, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a packed table in the place of the float one called `name`, and under a head that shares its weight."""
    table: Any = model.get_submodule(name)
    rows, columns, dtype = table.num_embeddings, table.embedding_dim, table.weight.dtype
    head, owner = model.get_output_embeddings(), tied_head(model)
    with torch.device("meta"):
        made = PackedEmbedding(rows, columns, format, table.padding_idx, scale_of(table), dtype)
    made.hold(format, tensors)
    surgery.replace_module(model, name, made.train(table.training))
    if owner and isinstance(head, nn.Linear):
        with torch.device("meta"):
            above = PackedLinear(columns, rows, format, head.bias is not None, dtype, tied=True)
        above.hold(format, tensors)
        above.weight = made.weight  # type: ignore[assignment]
        if head.bias is not None:
            above.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
        surgery.replace_module(model, owner, above.train(head.training))


def mark(model: PreTrainedModel, config: PackedConfig | None = None) -> None:
    """Make a model whose layers were packed one by one save itself as a packed folder, to be sealed for `ROOM`."""
    made = config or PackedConfig()
    made.packing = packing_of(model)
    model.config.quantization_config = made
    quantizer = PackedQuantizer(made, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    tie(model)
    _keep_rows(model)


def packing_of(model: nn.Module) -> dict[str, str]:
    """Module -> format of everything packed in a model, with `+bias` where a layer has one."""
    return {
        name: str(module.format) + BIAS * (getattr(module, "bias", None) is not None)
        for name, module in packed_modules(model)
    }


def parameters_of(model: nn.Module) -> int:
    """How many numbers the parameters of a model stand for; tied ones once."""
    packed = {id(module.weight): module.rows * module.columns for _, module in packed_modules(model)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


class Pack(ConversionOps):
    """Packs one float weight while transformers reads it, so no whole model is ever inflated."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **given: Any) -> dict[str, Any]:
        name: str = given["full_layer_name"]
        value = next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        owner, parameter = name.rpartition(".")[::2]
        packed: Any = given["model"].get_submodule(owner)
        if isinstance(packed, PackedExperts):
            place, packed = f"{owner}.{PARTS[parameter]}", packed.came(parameter)
            given["missing_keys"].discard(name)
            made = self.made(name, [(f"{place}.{expert}", matrix) for expert, matrix in enumerate(value)], packed)
            format, tensors = packed.joined(made)
        else:
            place = owner
            value = value.t() if owner in self.quantizer.transposed else value
            (tensors,) = self.made(name, [(owner, value)], packed)
            format = packed.format
            if format.layout.says_its_size:
                format = formats.parse(f"{format.layout.native}/{tensors['weight'].numel()}")
        if format != packed.format:
            packed.hold(format, {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()})
        return {f"{place}.{key}": tensor for key, tensor in tensors.items()}

    def made(self, name: str, values: Sequence[tuple[str, torch.Tensor]], packed: Packed) -> list[dict[str, Any]]:
        """The tensors of each matrix (what it is called, its values) of the parameter `name`."""
        config = self.quantizer.quantization_config
        found: list[dict[str, Any]] = []
        try:
            for called, matrix in values:
                # Codes are what the weights say, whatever the caller's products are computed in.
                with torch.autocast(matrix.device.type, enabled=False):
                    found.append(config.pack(matrix.contiguous(), packed.format, called))
        except UsageError as error:
            # transformers would bury it in a report: kept until the weights are read.
            self.quantizer.refusals.append(f"{name} cannot be quantized: {error}")
            rows, columns = values[0][1].shape
            empty = packed.format.empty(rows, columns)
            return [{key: torch.zeros_like(t, device="cpu") for key, t in empty.items()} for _ in values]
        return found


class PackedQuantizer(HfQuantizer):
    """The transformers side of `PackedConfig`: packs while loading a float model, and loads what it saved."""

    requires_calibration = False
    quantization_config: PackedConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()
        self.refusals: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UsageError(
                "Weights that are left on the disk cannot be packed while they are read",
                "transformers leaves them there as floats",
                "Pack the model without a device_map, save it, and load the packed folder with yours",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the config before the weight files are looked up.
        unseal(config, ROOM)
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        dtype = kwargs.get("dtype") or model.dtype
        table, sharing = tied_to_table(model)
        shared = self._format_of_table(model, table, sharing) if sharing else None
        replacements: list[tuple[str, nn.Module]] = []
        for name, module in list(model.named_modules()):
            tied = name in sharing
            format = shared if tied or (sharing and name == table) else self._format(model, name, module)
            if format is None:
                continue
            with torch.device("meta"):
                if isinstance(module, nn.Embedding):
                    rows, columns, padding = module.num_embeddings, module.embedding_dim, module.padding_idx
                    new: nn.Module = PackedEmbedding(rows, columns, format, padding, scale_of(module), dtype, tied)
                else:
                    rows, columns = linear_dims(module)
                    bias = module.bias is not None or self._has_bias(model, name)
                    new = PackedLinear(columns, rows, format, bias, dtype, tied)
            if isinstance(module, Conv1D):
                self.transposed.add(name)
            replacements.append((name, new))
        surgery.replace_modules(model, replacements)
        packed = list(self._experts(model))
        if not self.pre_quantized:
            refuse_unpacked(model, left_alone=self.quantization_config.left_alone)
        for experts in packed if not self.pre_quantized else ():
            experts.expect()
        for part in _models(model):
            part._init_weights = partial(_initialize, part._init_weights)  # type: ignore[method-assign]
        return model

    def _experts(self, model: PreTrainedModel) -> Iterator[PackedExperts]:
        """Put packed experts into every layer for whose experts there are formats."""
        config = self.quantization_config
        for name, module in stacked(model):
            if not gated_experts(module):
                continue
            found: list[Format] = []
            for tensor, part in PARTS.items():
                spec = self._spec(model, f"{name}.{part}") if self.pre_quantized else ""
                format = formats.parse(spec) if spec else None
                if not self.pre_quantized and not config.left_alone(f"{name}.{tensor}"):
                    _, rows, columns = module.get_parameter(tensor).shape
                    format = config.format_of(f"{name}.{part}", rows, columns, False)
                found += [] if format is None else [format]
            if not found:
                continue
            if len(found) < len(PARTS):
                raise one_of_two(name)
            with torch.device("meta"):
                made = PackedExperts(module, *found)
            surgery.replace_module(model, name, made)
            yield made

    def _format(self, model: PreTrainedModel, name: str, module: nn.Module) -> Format | None:
        config = self.quantization_config
        embedding = isinstance(module, nn.Embedding)
        if self.pre_quantized:
            spec = self._spec(model, name)
            if not spec:
                return None
            if not embedding and not isinstance(module, nn.Linear | Conv1D):
                raise UsageError(
                    f"The configuration packs {name[:120]}, which is a {type(module).__name__}",
                    remedy="Check that configuration and weights belong together",
                )
            return formats.parse(spec.removesuffix(BIAS))
        if not packable(model, name, module) or config.left_alone(name):
            return None
        if embedding:
            return config.format_of(name, module.num_embeddings, module.embedding_dim, True)  # type: ignore[arg-type]
        return config.format_of(name, *linear_dims(module), False)

    def _format_of_table(self, model: PreTrainedModel, table: str, sharing: Sequence[str]) -> Format | None:
        """The format of the token table, which is that of all who share its weight."""
        format = self._format(model, table, model.get_submodule(table))
        alone = [name for name in sharing if not self.pre_quantized and self.quantization_config.left_alone(name)]
        if format is not None and alone:
            raise UsageError(
                f"{alone[0]} of {type(model).__name__} cannot be left alone by itself",
                f"it shares the weight of {table}",
                f"Name {table} in modules_to_not_convert to leave both alone, or neither",
            )
        return format

    def _spec(self, model: PreTrainedModel, name: str) -> str:
        """What a packed folder says of a module, also when a model with another head wrote it, or one without."""
        packing, prefix = self.quantization_config.packing, f"{model.base_model_prefix}."
        return next((packing[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in packing), "")

    def _has_bias(self, model: PreTrainedModel, name: str) -> bool:
        return self.pre_quantized and self._spec(model, name).endswith(BIAS)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        owner, _, tensor = param_name.rpartition(".")
        if self.pre_quantized or tensor not in ("weight", *PARTS):
            return False
        return isinstance(model.get_submodule(owner), Packed if tensor == "weight" else PackedExperts)

    def get_quantize_ops(self) -> Pack:
        return Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for part in _models(model):
            vars(part).pop("_init_weights", None)  # as it was, where it was changed
        if self.refusals:
            raise UsageError(*self.refusals[:3])
        tie(model)
        _keep_rows(model)
        self.quantization_config.packing = packing_of(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # A config that was read from disk says its dtype as a word.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedExperts):
                surgery.replace_module(model, name, module.float_module(dtype))
        packed, transposed = list(packed_modules(model)), _transposed(model)
        made = ((name, float_module(module, dtype, name in transposed)) for name, module in packed)
        surgery.replace_modules(model, made)
        for part in _models(model):
            vars(part).pop("resize_token_embeddings", None)
        model.tie_weights()
        return model


if PLAIN not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(PLAIN)(PackedConfig)
    register_quantizer(PLAIN)(PackedQuantizer)


def _models(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _initialize(plain: Callable[[nn.Module], None], module: nn.Module) -> None:
    """What transformers does with a module that it has not all weights of; codes cannot be drawn at random.

    Raises:
        UsageError: a packed module lacks some of its tensors.
    """
    if not isinstance(module, Packed):
        return plain(module)
    for name, tensor in (*module.tensors().items(), ("bias", getattr(module, "bias", None))):
        borrowed = module.tied and name != "bias"
        if tensor is not None and not tensor.is_meta and not borrowed and not hasattr(tensor, "_is_hf_initialized"):
            raise UsageError(
                f"There is no {name} for a packed matrix of {module.rows} x {module.columns}",
                "the folder lacks it, or holds it under another name",
                "Get an intact copy of the model; leave layers that are to be trained out with modules_to_not_convert",
            )


def tie(model: PreTrainedModel) -> None:
    """Give those who share the token table's codes what stands beside them."""
    name, sharing = tied_to_table(model)
    table: Any = model.get_submodule(name) if name else None
    for other in map(model.get_submodule, sharing if isinstance(table, PackedEmbedding) else ()):
        if isinstance(other, Packed) and other.weight is table.weight:
            other.hold(table.format, table.tensors())
            other.weight = table.weight
            if isinstance(other, PackedLinear) and other.bias is not None:
                # transformers makes a head's bias as long as the weight is, which it takes for one of floats.
                other.bias.data = other.bias.data[: other.rows]


def _keep_rows(model: PreTrainedModel) -> None:
    """Make a model whose token table is packed refuse another number of tokens: transformers would resize the codes."""
    for part in _models(model):
        table = _token_table(part)
        if isinstance(table, PackedEmbedding):
            # Of the table and not of the model, which would then hold itself and outlive its last use.
            part.resize_token_embeddings = partial(_same_rows, table)  # type: ignore[method-assign]


def _same_rows(
    table: PackedEmbedding,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> PackedEmbedding:
    """transformers' `resize_token_embeddings` of a packed table, which only ever keeps its rows.

    Raises:
        UsageError: another number of rows is asked for.
    """
    wanted = table.rows if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != table.rows:
        raise UsageError(
            f"The token table has {table.rows} rows packed as {table.format} and cannot have {wanted}",
            "the codes of a table are not drawn anew",
            "Resize the model that it was packed from and pack that, or call dequantize() first, which makes it floats",
        )
    return table


def tied_to_table(model: PreTrainedModel) -> tuple[str, list[str]]:
    """The name of the token table that holds the weight, and of the modules that share it."""
    found = _token_table(model)
    name = next((name for name, module in model.named_modules() if module is found), "")
    sources = {target.removesuffix(".weight"): source.removesuffix(".weight") for target, source in _tied(model)}
    table = sources.get(name, name)
    return table, [other for other, source in sources.items() if source == table]


def _token_table(model: PreTrainedModel) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:  # as models and parts of models say that read no tokens
        return None
    return found


def _tied(model: PreTrainedModel) -> list[tuple[str, str]]:
    return [pair for pair in model.all_tied_weights_keys.items() if pair[0].endswith(".weight")]


def linear_dims(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or transformers' transposed one."""
    rows, columns = list(module.weight.shape)  # type: ignore[union-attr, arg-type]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def tied_head(model: PreTrainedModel) -> str | None:
    """The name of a head that shares the embedding's weight."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    name = next((n for n, m in model.named_modules() if m is head), None)
    return name if name and f"{name}.weight" in model.all_tied_weights_keys else None


def packable(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Whether a module's weight is one that formats are made for."""
    if isinstance(module, nn.Embedding):
        # Only the token table: position and type tables are small and often indexed in other ways.
        table, sharing = tied_to_table(model)
        return name == table and _only_scales(module) and not any(_kept_in_floats(model, other) for other in sharing)
    if not isinstance(module, nn.Linear | Conv1D) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if _of_task(model, name) or _kept_in_floats(model, name) or is_router(model, name):
        return False
    # An untied head is as sensitive as the embedding is; a tied one shares the embedding's codes.
    return module is not model.get_output_embeddings() or name == tied_head(model)


def _of_task(model: PreTrainedModel, name: str) -> bool:
    """Whether a module belongs to a head that classifies, which is small, and random until it is trained."""
    alone = model.base_model is model or model.get_output_embeddings() is not None
    return not alone and not name.startswith(f"{model.base_model_prefix}.")


def _kept_in_floats(model: PreTrainedModel, name: str) -> bool:
    """Whether the family's own code reads a module's weight: for its type, and computes in that, or to multiply."""
    read = (*(model._keep_in_fp32_modules or ()), *read_by_families(model))
    return any(f".{part}." in f".{name}." for part in read)


def _only_scales(table: nn.Embedding) -> bool:
    """Whether a table does no more with the rows that it looks up than to scale them, and holds nothing beside them."""
    plain = type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")
    return plain and [name for name, _ in table.named_parameters()] == ["weight"] and not list(table.children())


def refuse_unpacked(
    model: PreTrainedModel, packed: int | None = None, left_alone: Callable[[str], bool] = lambda name: False
) -> None:
    """A promise of size must not be broken in silence by matrices that no packed module holds (experts that a family
    builds in its own way, say).

    Args:
        packed: how many weights will be packed; None counts those that are.
        left_alone: whether the user has asked to leave a parameter as it is.
    """
    if packed is None:
        packed = sum(m.rows * m.columns for _, m in packed_modules(model))
    head = model.get_output_embeddings()
    left = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.dim() > 2 and p.is_floating_point() and (head is None or p is not getattr(head, "weight", None))
    }
    wanted = sum(count for name, count in left.items() if not left_alone(name))
    if not packed or wanted > MOST_LEFT * packed:
        raise does_not_fit(type(model).__name__, list(left))


def does_not_fit(name: str, elsewhere: Sequence[str]) -> UsageError:
    """What is said of a model most of whose weights, such as those `elsewhere`, would not be packed."""
    return UsageError(
        f"{name} does not fit weight quantization of linear layers",
        f"most of its weights stand elsewhere ({', '.join(elsewhere[:2]) or 'no linear layers found'})",
        "Use a model of linear layers, such as LlamaForCausalLM, or a mixture of such experts as Mixtral's with a "
        "method that packs them (`shoestring methods`)",
    )


def priced(
    shape: Shape, size: Callable[[str, int, int, bool], int | None], *, experts: bool = True, runs: bool = False
) -> Shape:
    """The shape of a model whose matrices are packed while it is read.

    Args:
        size: bytes of the packed matrix of a module (its name, rows, columns, whether it is the token table); None
            leaves it as it is. Of experts that stand in one tensor it is asked for one, under the tensor's name.
        experts: whether those are packed at all.
        runs: whether packed matrices are runs of bytes whose length depends on them.
    """
    left = routers(weight.name.rpartition(".")[0] for weight in shape.weights)
    stacks: dict[str, int | None] = {}
    for pair in expert_stacks(shape) if experts else ():
        sizes = [size(weight.name, *weight.dims[1:], False) for weight in pair]  # type: ignore[call-arg, arg-type]
        if sizes.count(None) == 1:
            raise one_of_two(pair[0].name.rpartition(".")[0])
        stacks |= {weight.name: taken for weight, taken in zip(pair, sizes)}

    def touch(weight: Weight) -> Weight:
        owner, _, tensor = weight.name.rpartition(".")
        table = weight.role == "embed" or (weight.role == "head" and bool(weight.tied))
        taken = stacks.get(weight.name)
        if taken is not None:
            count = weight.dims[0]
            taken = count * taken + (8 * (count + 1) if runs else 0)
        elif tensor == "weight" and len(weight.dims) == 2 and owner not in left and (table or weight.role != "head"):
            taken = size(owner, weight.dims[0], weight.dims[1], table)
        return weight if taken is None else replace(weight, stored=taken, resident=taken)

    return shape.change(touch)


def expert_stacks(shape: Shape) -> Iterator[tuple[Weight, Weight]]:
    """`GATE_UP` and `DOWN` of every layer for whose experts packed ones can stand: `gated_experts` in numbers."""
    owned: dict[str, list[Weight]] = {}
    for weight in shape.weights:
        owned.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    for own in owned.values():
        by_name = {weight.name.rpartition(".")[2]: weight for weight in own}
        if set(by_name) != {GATE_UP, DOWN} or any(len(weight.dims) != 3 for weight in own):
            continue
        _, wide, hidden = by_name[GATE_UP].dims
        if by_name[DOWN].dims[1:] == (hidden, wide // 2):
            yield by_name[GATE_UP], by_name[DOWN]


def one_of_two(experts: str) -> UsageError:
    return UsageError(
        f"One of the two tensors of {experts} cannot be left alone by itself",
        f"experts are packed with both, {' and '.join(PARTS)}",
        f"Name {experts.rpartition('.')[2]} in modules_to_not_convert to leave both alone, or neither",
    )


class _ScaledEmbedding(nn.Embedding):
    """A float table that scales what it looks up, as some families' own do."""

    scale: float | torch.Tensor = 1.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return scaled(super().forward(input), self.scale)


def _transposed(model: PreTrainedModel) -> set[str]:
    """Names of the layers for which the family has transformers' transposed ones."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    return {name for name, module in plain.named_modules() if isinstance(module, Conv1D)}


def float_module(packed: Any, dtype: torch.dtype, transposed: bool = False) -> nn.Module:
    """The module with plain weights in `dtype` that a packed one stands for; `transposed`: [in, out]."""
    weight = packed.unpacked().to(dtype)
    if isinstance(packed, nn.Embedding):
        table = _ScaledEmbedding.from_pretrained(weight, freeze=False, padding_idx=packed.padding_idx)
        table.scale = packed.scale
        return table
    with torch.device("meta"):
        made: Any = (
            Conv1D(packed.out_features, packed.in_features)
            if transposed
            else nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
        )
    made.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    if packed.bias is not None:
        made.bias = nn.Parameter(packed.bias.data.to(dtype))
    return made

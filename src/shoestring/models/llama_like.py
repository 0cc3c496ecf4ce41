"""What the native kernels must know of a Llama-like model, from config.json or GGUF metadata: plain data, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shoestring.core.errors import UsageError
from shoestring.models import stated
from shoestring.models.mixtures import CORRECTION, ROLES, STEMS, Experts, experts
from shoestring.models.stated import NotNative as NotNative  # whoever describes a model may meet it
from shoestring.models.tensors import Source, floats

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_MOST_HEAD_DIM = 512
_MAX_LAYERS = 1 << 14  # beyond it no number of layers is meant

# Family -> what transformers assumes where config.json is silent.
_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10_000.0,
    "num_key_value_heads": None, "head_dim": None, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "use_sliding_window": False, "layer_types": None, "max_position_embeddings": 32768,
    "layer_key_value_heads": None, "layer_intermediate_sizes": None, "output_biases": False, "share_map": None,
}  # fmt: skip
_QWEN: dict[str, Any] = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "mistral": {**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {**_COMMON, **_QWEN},
    "qwen3": {**_COMMON, **_QWEN, "head_dim": 128},
    "smollm3": {
        **_COMMON, "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2_000_000.0,
        "no_rope_layers": None, "no_rope_layer_interval": 4,
    },
    "granite": {
        **_COMMON, "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    },
}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    **_COMMON, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None, "layer_expert_maps": None,
    "experts_per_group": None, "latent_dim": None, "factor_down": None,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {
        **_MIXTURE, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "norm_topk_prob": True,
        "max_position_embeddings": 131072, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        **_MIXTURE, "num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28, "qkv_bias": True,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        **_MIXTURE, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "olmoe": {
        **_MIXTURE, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "clip_qkv": None, "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "dots1": {
        **_MIXTURE, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62,
        "max_position_embeddings": 2048, "moe_intermediate_size": 1408, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0, "n_group": 1,
    },
}  # fmt: skip
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "SmolLM3ForCausalLM": "smollm3", "GraniteForCausalLM": "granite",
    "MixtralForCausalLM": "mixtral", "Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe", "Dots1ForCausalLM": "dots1",
}  # fmt: skip
_VARIED = re.compile("^(Uneven|Regrouped)")  # how the classes of `models.uneven` and `models.regrouped` begin
_OURS = re.compile(r"shoestring_[a-z0-9]+_(\w+)")  # model types of ours end in the family they vary
_VARYING = ("share_map", "factor_down")  # and these say in which way, of those that the kernels know
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_ATTENTION, _MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
_OF_SCORES = ("q", "k", "q_norm", "k_norm")

_FOLDER_NAMES = {
    "embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm", "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "q_norm": "model.layers.{}.self_attn.q_norm", "k_norm": "model.layers.{}.self_attn.k_norm",
    **{role: f"model.layers.{{}}.self_attn.{role}_proj" for role in _ATTENTION},
    **{role: f"model.layers.{{}}.mlp.{role}_proj" for role in _MLP},
}  # fmt: skip
GGUF_NAMES = {
    "embedding": "token_embd", "final_norm": "output_norm", "head": "output",
    "attention_norm": "blk.{}.attn_norm", "mlp_norm": "blk.{}.ffn_norm",
    "q_norm": "blk.{}.attn_q_norm", "k_norm": "blk.{}.attn_k_norm",
    "q": "blk.{}.attn_q", "k": "blk.{}.attn_k", "v": "blk.{}.attn_v", "o": "blk.{}.attn_output",
    **{role: f"blk.{{}}.ffn_{role}" for role in _MLP},
}  # fmt: skip
_GGUF_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: pair i turns by position * inverse[i]; cosines and sines are multiplied by `factor`."""

    inverse: np.ndarray  # float32 [rotated dimensions / 2]
    factor: float = 1.0


@dataclass(frozen=True)
class LlamaLike:
    """The shape of a model and where its tensors are.

    Attributes:
        family: as in `FAMILIES` and `MIXTURES`.
        activation: of the gate: "silu" or "gelu_tanh".
        rotates, windows: of each layer; a window of 0 sees everything.
        biased: roles of PROJECTIONS that have a bias.
        head_norms: queries and keys are normalised, head by head or, with `whole_norms`, all heads together.
        tied: the head is the token table.
        interleaved: rows of q and k are stored in pairs and not in halves, as GGUF has them for some families.
        names: role -> name of its tensors without `.weight`, with {} for the layer.
        layer_kv_heads, layer_intermediate: of each layer where layers differ, else empty; `heads`, `kv_heads` and
            `intermediate` are then those of the largest.
        leaders: for each layer the one whose attention weights it takes, its own number where it computes them; empty
            where all do. A layer that takes them has neither queries nor keys.
        mixture: what stands in the place of feed-forwards, None where nothing does.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    activation: str
    rotary: Rotary
    rotates: tuple[bool, ...]
    windows: tuple[int, ...]
    biased: frozenset[str]
    head_norms: bool
    tied: bool
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    interleaved: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: _FOLDER_NAMES)
    layer_kv_heads: tuple[int, ...] = ()
    layer_intermediate: tuple[int, ...] = ()
    leaders: tuple[int, ...] = ()
    whole_norms: bool = False
    mixture: Experts | None = None

    def mixes(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.mixture is not None and bool(self.mixture.targets[layer])

    @property
    def shares(self) -> bool:
        """Whether any layer takes the attention weights of another."""
        return not all(self.leads(layer) for layer in range(self.layers))

    def leads(self, layer: int) -> bool:
        """Whether a layer computes attention weights of its own."""
        return not self.leaders or self.leaders[layer] == layer

    def block_roles(self, layer: int) -> tuple[str, ...]:
        """Roles of the weights that a layer has."""
        norms = ("attention_norm", "mlp_norm", *(("q_norm", "k_norm") if self.head_norms else ()))
        roles = (*PROJECTIONS, *norms)
        if self.mixture and self.mixes(layer):
            shared = ("shared_gate", "shared_up", "shared_down") if self.mixture.shared else ()
            weigher = ("weigher",) if self.mixture.weighed else ()
            roles = (*_ATTENTION, *norms, "router", *shared, *weigher)
        return roles if self.leads(layer) else tuple(role for role in roles if role not in _OF_SCORES)

    def shape_of(self, role: str, layer: int = 0) -> tuple[int, ...]:
        """Dimensions of the weight of a role, rows first; of one expert where the role is `expert_gate` or its like."""
        kv_heads = self.layer_kv_heads[layer] if self.layer_kv_heads else self.kv_heads
        neurons = self.layer_intermediate[layer] if self.layer_intermediate else self.intermediate
        narrow = kv_heads * self.head_dim
        wide = self.heads // self.kv_heads * narrow
        if self.mixture and role in ROLES:
            return self.mixture.shape_of(role, layer, self.hidden)
        heads = (wide, narrow) if self.whole_norms else (self.head_dim, self.head_dim)
        return {
            "q": (wide, self.hidden), "k": (narrow, self.hidden), "v": (narrow, self.hidden), "o": (self.hidden, wide),
            "gate": (neurons, self.hidden), "up": (neurons, self.hidden),
            "down": (self.hidden, neurons), "embedding": (self.vocab, self.hidden),
            "head": (self.vocab, self.hidden), "attention_norm": (self.hidden,), "mlp_norm": (self.hidden,),
            "final_norm": (self.hidden,), "q_norm": heads[:1], "k_norm": heads[1:],
        }[role]  # fmt: skip

    def name(self, role: str, layer: int = 0) -> str:
        """Full name of a role's tensors without the last word; of "experts" the module that holds them."""
        if self.mixture and role in ROLES:
            return self.mixture.name(role, layer)
        return self.names[role].format(layer)

    def tables(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, float32 [positions, rotated dimensions / 2]."""
        angles = np.arange(positions, dtype=np.float32)[:, None] * self.rotary.inverse[None]
        factor = np.float32(self.rotary.factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def describe(source: Source, *, mixtures: bool = False) -> LlamaLike:
    """The model that a folder or a GGUF file holds, with all its tensors there.

    Args:
        mixtures: whether it may have experts.

    Raises:
        NotNative: the native kernels do not compute it, or it has experts and may have none.
        UsageError: something that no model can have, or a tensor that is missing.
    """
    tensors = source.tensors
    if source.gguf:
        dims = {name: tensors.dims(name) for name in tensors}
        frequencies = floats(tensors[_GGUF_FREQUENCIES]) if _GGUF_FREQUENCIES in tensors else None
        model = from_gguf(source.values, dims, frequencies)
    else:
        model = from_config(source.values)
        if model.mixture:
            model = replace(model, mixture=model.mixture.spelled(tensors))
    if model.mixture and not mixtures:
        raise NotNative(f"A {model.family} model is a mixture of experts")
    check_names(model, tensors, packing(source))
    return model


def packing(source: Source) -> Mapping[str, str]:
    """Module -> weight format, of a folder that a quantizer of ours packed; empty for others.

    Raises:
        NotNative: packed in another way.
    """
    packed = None if source.gguf else source.values.get("quantization_config")
    if not packed:
        return {}
    found = packed.get("packing") if isinstance(packed, dict) else None
    if not isinstance(found, dict) or not all(isinstance(spec, str) for spec in found.values()):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        raise NotNative(f"The native runner does not know weights packed with {str(method)[:60]!r}")
    # The packing names modules, and files of some families have other names for what holds the experts.
    first, other = (f".{stem}." for stem in STEMS)
    known = source.tensors
    return {name if f"{name}.weight" in known else name.replace(first, other, 1): spec for name, spec in found.items()}


def check_family(config: Mapping[str, Any]) -> str:
    """The family of a config.json. Raises NotNative when the kernels do not know it."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    family = _ARCHITECTURES.get(_VARIED.sub("", name)) if name else str(config.get("model_type", ""))
    varies = any(config.get(key) is not None for key in _VARYING)
    if varies and (ours := _OURS.fullmatch(str(config.get("model_type", "")))):
        family = ours[1]
    if family not in FAMILIES and family not in MIXTURES:
        raise NotNative(
            f"The native runner does not know the family {name or family or 'of this model'}",
            f"it runs {', '.join(_ARCHITECTURES)}",
        )
    return family


def from_config(config: Mapping[str, Any]) -> LlamaLike:
    """The model that a config.json of transformers describes.

    Raises:
        NotNative: a family or a setting that the native kernels do not compute.
        UsageError: a value that no model can have.
    """
    family = check_family(config)
    known: dict[str, Any] = {**(FAMILIES.get(family) or MIXTURES[family]), **config}
    layers, hidden = stated.size(known, "num_hidden_layers", _MAX_LAYERS), stated.size(known, "hidden_size")
    heads = stated.size(known, "num_attention_heads")
    kv_heads = heads if known["num_key_value_heads"] is None else stated.size(known, "num_key_value_heads")
    head_dim = hidden // heads if known["head_dim"] is None else stated.size(known, "head_dim")
    context = stated.size(known, "max_position_embeddings")
    activation = str(known["hidden_act"])
    if activation not in _ACTIVATIONS:
        raise NotNative(f"The native runner does not know the activation {activation[:40]!r}")
    rotates = _rotates(known, family, layers)
    biased = (
        {"q", "k", "v"} if family == "qwen2" else set(_ATTENTION) if stated.flag(known, "attention_bias") else set()
    )
    biased |= set(_MLP) if stated.flag(known, "mlp_bias") and family in FAMILIES else set()
    if family in ("mistral", "mixtral"):
        biased = set()
    if family == "qwen2_moe":
        biased = {"q", "k", "v"} if stated.flag(known, "qkv_bias") else set()
    if known.get("clip_qkv") is not None:
        raise NotNative("The native runner does not clip queries, keys and values")
    biased |= {"o", "down"} if stated.flag(known, "output_biases") else set()
    granite = family == "granite"
    return _checked(
        LlamaLike(
            family=family,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=stated.size(known, "intermediate_size"),
            vocab=stated.size(known, "vocab_size"),
            context=context,
            epsilon=stated.number(known, "rms_norm_eps"),
            activation=_ACTIVATIONS[activation],
            rotary=_rotary(known, head_dim, context),
            rotates=rotates,
            windows=_windows(known, family, rotates),
            biased=frozenset(biased),
            head_norms=family in ("qwen3", "qwen3_moe", "olmoe", "dots1"),
            whole_norms=family == "olmoe",
            mixture=experts(known, family, layers) if family in MIXTURES else None,
            tied=stated.flag(known, "tie_word_embeddings"),
            attention_scale=stated.number(known, "attention_multiplier") if granite else head_dim**-0.5,
            embedding_scale=stated.number(known, "embedding_multiplier") if granite else 1.0,
            residual_scale=stated.number(known, "residual_multiplier") if granite else 1.0,
            logit_scale=1.0 / stated.number(known, "logits_scaling") if granite else 1.0,
            layer_kv_heads=stated.of_each(known, "layer_key_value_heads", layers, kv_heads),
            layer_intermediate=stated.of_each(
                known, "layer_intermediate_sizes", layers, stated.size(known, "intermediate_size")
            ),
            leaders=_leaders(known, layers),
        )
    )


# GGUF architecture -> whether its q and k rows lie in pairs.
GGUF_FAMILIES = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}


def from_gguf(
    values: Mapping[str, Any], dims: Mapping[str, tuple[int, ...]], frequencies: np.ndarray | None
) -> LlamaLike:
    """The model that a GGUF file's metadata describes.

    Args:
        dims: of each tensor by name; what the metadata leaves open is seen from them.
        frequencies: the float32 tensor `rope_freqs.weight`, which divides the inverse frequencies, or None.

    Raises:
        NotNative: an architecture or a setting that the native kernels do not compute.
        UsageError: a value that no model can have.
    """
    family = str(values.get("general.architecture", ""))
    if family not in GGUF_FAMILIES:
        raise NotNative(
            f"The native runner does not know GGUF files of the architecture {family[:40]!r}",
            f"it runs {', '.join(GGUF_FAMILIES)}",
        )
    own = {key.removeprefix(f"{family}."): values[key] for key in values if key.startswith(f"{family}.")}
    if own.get("expert_count"):
        raise NotNative("The native runner does not compute mixtures of experts")
    if "token_embd.weight" not in dims:
        raise UsageError("The GGUF file has no token table", "token_embd.weight is missing", "Get an intact file")
    layers, hidden = stated.size(own, "block_count", _MAX_LAYERS), stated.size(own, "embedding_length")
    heads = stated.size(own, "attention.head_count")
    kv_heads = stated.size(own, "attention.head_count_kv") if "attention.head_count_kv" in own else heads
    head_dim = stated.size(own, "attention.key_length") if "attention.key_length" in own else hidden // heads
    if own.get("attention.value_length", head_dim) != head_dim:
        raise NotNative("The native runner wants keys and values of one width")
    rotated = stated.size(own, "rope.dimension_count") if "rope.dimension_count" in own else head_dim
    interleaved = GGUF_FAMILIES[family]
    if interleaved and rotated != head_dim:
        raise NotNative(f"The native runner does not rotate {rotated} of {head_dim} dimensions that lie in pairs")
    context = stated.size(own, "context_length")
    window = own.get("attention.sliding_window") or 0
    if window and window < context:
        raise NotNative("The native runner does not know which layers of this GGUF file have a sliding window")
    biased = frozenset(r for r in PROJECTIONS if GGUF_NAMES[r].format(0) + ".bias" in dims)
    return _checked(
        LlamaLike(
            family=family,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=stated.size(own, "feed_forward_length"),
            vocab=dims["token_embd.weight"][0],
            context=context,
            epsilon=stated.number(own, "attention.layer_norm_rms_epsilon"),
            activation="silu",
            rotary=_gguf_rotary(own, rotated, context, frequencies),
            rotates=usual_rotation(family, layers),
            windows=(0,) * layers,
            biased=biased,
            head_norms="blk.0.attn_q_norm.weight" in dims,
            tied="output.weight" not in dims,
            attention_scale=stated.number(own, "attention.scale") if own.get("attention.scale") else head_dim**-0.5,
            interleaved=interleaved,
            names=GGUF_NAMES,
        )
    )


def usual_rotation(family: str, layers: int) -> tuple[bool, ...]:
    """Which layers rotate where no list says so. GGUF writes no list: the family's own step is what it means."""
    step = FAMILIES[family].get("no_rope_layer_interval")
    return tuple(not step or (layer + 1) % step != 0 for layer in range(layers))


def check_names(model: LlamaLike, tensors: Collection[str], packing: Mapping[str, str] | None = None) -> None:
    """Hold the tensors of a file against the model: all must be there, and none beside them that could matter.

    Args:
        packing: module -> format, of a packed folder; such modules have what their format says beside the weight.

    Raises:
        UsageError: one is missing. NotNative: one is there that the family does not have.
    """
    packing = packing or {}
    wanted = [model.name(role) + ".weight" for role in ("embedding", "final_norm")]
    wanted += [] if model.tied else [model.name("head") + ".weight"]
    for layer in range(model.layers):
        block = model.block_roles(layer)
        wanted += [model.name(role, layer) + ".weight" for role in block]
        wanted += [model.name(role, layer) + ".bias" for role in block if role in model.biased]
        if model.mixture and model.mixes(layer):
            wanted += [f"{model.name('experts', layer)}.{name}" for name in model.mixture.names(layer)]
            wanted += [f"{model.name('router', layer)}.{CORRECTION}"] * model.mixture.corrected
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UsageError(
            f"The weights lack {len(missing)} tensors of {len(wanted)}, the first is {missing[0]}",
            "they would be random",
            "Check that configuration and weights belong together",
        )
    ignored = {_GGUF_FREQUENCIES, model.name("head") + ".weight"}
    expected = set(wanted) | ignored
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        packed = owner in packing and (
            leaf in ("scales", "starts") or (leaf == "bias" and f"{owner}.weight" in expected)
        )
        if name not in expected and not packed and not name.endswith(("rotary_emb.inv_freq", ".attn_rot_embd.weight")):
            raise NotNative(f"The native runner does not know what {name[:120]} is for in a {model.family} model")


# ---- what config.json says ----


def _rotates(config: Mapping[str, Any], family: str, layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * layers
    given = config["no_rope_layers"]
    if given is None:
        step = stated.size(config, "no_rope_layer_interval")
        return tuple((layer + 1) % step != 0 for layer in range(layers))
    if not isinstance(given, list) or len(given) < layers:
        raise UsageError(f"config.json has no_rope_layers for other than {layers} layers", remedy="Get an intact model")
    return tuple(bool(item) for item in given[:layers])


def _windows(config: Mapping[str, Any], family: str, rotates: tuple[bool, ...]) -> tuple[int, ...]:
    layers = len(rotates)
    window = config["sliding_window"]
    if family in ("llama", "granite", "olmoe") or window is None:
        return (0,) * layers
    if family not in ("mistral", "mixtral", "dots1") and not stated.flag(config, "use_sliding_window"):
        return (0,) * layers
    window = stated.size(config, "sliding_window")
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    types = config["layer_types"]
    if types is None and family == "smollm3":
        return tuple(0 if turns else window for turns in rotates)
    if types is None and family == "qwen2_moe":
        least = stated.size(config, "max_window_layers")
        return tuple(window if layer % 2 == 0 and layer < least else 0 for layer in range(layers))
    if types is None:
        full = config["max_window_layers"]
        if not isinstance(full, int):
            raise UsageError(f"config.json has max_window_layers={str(full)[:40]}", remedy="Get an intact model")
        return tuple(window if layer >= full else 0 for layer in range(layers))
    if not isinstance(types, list):
        raise UsageError("config.json has layer_types that are no list", remedy="Get an intact model")
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown or len(types) < layers:
        raise NotNative(f"The native runner does not know the layer types {', '.join(unknown) or 'of some layers'}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types[:layers])


def _leaders(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    given = config["share_map"]
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) != layers or not all(type(value) is int for value in given):
        raise UsageError("config.json has no usable share_map", f"{layers} layers' numbers", "Get an intact model")
    last = -1  # of those whose weights are taken: the kernels keep the weights of one at a time
    taken = {leader for layer, leader in enumerate(given) if leader != layer}
    for layer, leader in enumerate(given):
        if leader == layer:
            last = layer if layer in taken else last
        elif not 0 <= leader < layer or given[leader] != leader:
            raise UsageError(
                f"config.json says that layer {layer} takes the attention weights of layer {leader}",
                "that is no earlier layer with weights of its own",
                "Get an intact model",
            )
        elif leader != last:
            raise NotNative("The native runner keeps the attention weights of one layer at a time")
    return tuple(given)


def _rotary(config: Mapping[str, Any], head_dim: int, context: int) -> Rotary:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise UsageError("config.json has rotary settings that are no table", remedy="Get an intact model")
    if given and all(isinstance(value, dict) for value in given.values()):
        # One table for each type of layer; families here turn all layers alike.
        if len({repr(sorted(value.items())) for value in given.values()}) > 1:
            raise NotNative("The native runner turns all layers alike, and here each type of layer has its own angles")
        given = next(iter(given.values()))
    kind = str(given.get("rope_type", given.get("type", "default")))
    theta = stated.number({"rope_theta": config["rope_theta"], **given}, "rope_theta")
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    rotated = int(
        head_dim * (1.0 if share is None else stated.number({"partial_rotary_factor": share}, "partial_rotary_factor"))
    )
    original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings", context))
    settings = {**given, "original_max_position_embeddings": original}
    if kind == "default":
        return Rotary(_plain(theta, rotated))
    if kind == "linear":
        return Rotary(_plain(theta, rotated) / np.float32(stated.number(settings, "factor")))
    if kind == "llama3":
        return Rotary(_llama3(_plain(theta, rotated), settings))
    if kind == "yarn":
        return _yarn(theta, rotated, context, settings)
    raise NotNative(
        f"The native runner does not know the rotary scaling {kind[:40]!r}", "it knows default, linear, llama3 and yarn"
    )


def _plain(theta: float, rotated: int) -> np.ndarray:
    # float32 throughout, as the models were trained.
    powers = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    return np.float32(1.0) / np.power(np.float32(theta), powers)


def _llama3(inverse: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones are not, those between are blended."""
    factor, original = (
        stated.number(settings, "factor"),
        stated.number(settings, "original_max_position_embeddings"),
    )
    low, high = stated.number(settings, "low_freq_factor"), stated.number(settings, "high_freq_factor")
    if high == low:
        raise UsageError("config.json has high_freq_factor = low_freq_factor", remedy="Get an intact model")
    waves = np.float32(2 * math.pi) / inverse
    blend = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    mixed = (1 - blend) * inverse / np.float32(factor) + blend * inverse
    long, short = waves > original / low, waves < original / high
    return np.where(long, inverse / np.float32(factor), np.where(short, inverse, mixed)).astype(np.float32)


def _yarn(theta: float, rotated: int, context: int, settings: Mapping[str, Any]) -> Rotary:
    """Dimensions that turn often keep their angles, those that turn rarely are slowed by `factor`."""
    original = stated.number(settings, "original_max_position_embeddings")
    factor = context / original if settings.get("factor") is None else stated.number(settings, "factor")
    fast = stated.number(settings, "beta_fast") if settings.get("beta_fast") else 32.0
    slow = stated.number(settings, "beta_slow") if settings.get("beta_slow") else 1.0

    def dimension(turns: float) -> float:
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(rotated // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, 0, 1)
    powers = np.power(np.float32(theta), np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
    inverse = (1 / (np.float32(factor) * powers)) * (1 - kept) + (1 / powers) * kept
    return Rotary(inverse.astype(np.float32), _yarn_factor(factor, settings))


def _yarn_factor(factor: float, settings: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return stated.number(settings, "attention_factor")
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return grown(stated.number(settings, "mscale")) / grown(stated.number(settings, "mscale_all_dim"))
    return grown(1.0)


def _gguf_rotary(own: Mapping[str, Any], rotated: int, context: int, frequencies: np.ndarray | None) -> Rotary:
    theta = stated.number(own, "rope.freq_base") if "rope.freq_base" in own else 10_000.0
    kind = str(own.get("rope.scaling.type", "none"))
    settings = {
        "factor": own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)),
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length", context),
        "attention_factor": own.get("rope.scaling.attn_factor"),
    }
    if kind == "yarn":
        found = _yarn(theta, rotated, context, settings)
    elif kind in ("none", "linear"):
        found = Rotary(
            _plain(theta, rotated) / np.float32(stated.number(settings, "factor") if kind == "linear" else 1.0)
        )
    else:
        raise NotNative(f"The native runner does not know the rotary scaling {kind[:40]!r}")
    if frequencies is None:
        return found
    if frequencies.shape != found.inverse.shape or not (frequencies > 0).all():
        raise UsageError(
            f"{_GGUF_FREQUENCIES} of shape {frequencies.shape} cannot be right", remedy="Get an intact file"
        )
    return Rotary(found.inverse / frequencies, found.factor)


# ---- values that a file may lie about ----


def _checked(model: LlamaLike) -> LlamaLike:
    if model.heads % model.kv_heads:
        raise UsageError(
            f"{model.heads} heads cannot share {model.kv_heads} heads of keys and values", remedy="Get an intact model"
        )
    if model.head_dim % 2 or model.head_dim > _MOST_HEAD_DIM or len(model.rotary.inverse) * 2 > model.head_dim:
        raise NotNative(f"The native runner does not compute heads of {model.head_dim} dimensions")
    if not np.isfinite(model.rotary.inverse).all():
        raise UsageError("The model's rotary frequencies are not finite", remedy="Get an intact model")
    return model

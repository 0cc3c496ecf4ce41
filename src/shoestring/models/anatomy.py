"""Where everything is in a transformers language model: blocks, projections by role, embeddings, head, norms.

Found by structure and a small vocabulary of projection names, so that a new model family needs no entry. This is the
one file that knows how families call their parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn

from shoestring.core.errors import UsageError

# Last word of a projection's name -> its role. Words that mean different things in attention and in the MLP are absent:
# there the place and the shape decide.
_ATTENTION: dict[str, tuple[str, ...]] = {
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj_with_mqa", "kv_a_proj"),
    "kv_b": ("kv_b_proj",),
    "q": ("q", "q_proj", "query", "q_lin", "wq", "query_proj", "q_linear"),
    "k": ("k", "k_proj", "key", "k_lin", "wk", "key_proj", "k_linear"),
    "v": ("v", "v_proj", "value", "v_lin", "wv", "value_proj", "v_linear"),
    "qkv": ("qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "in_proj", "att_proj", "qkv_linear"),
    "o": ("o", "o_proj", "out_proj", "out_lin", "wo", "dense", "c_proj", "attn_out", "output", "out", "o_linear"),
}
_MLP: dict[str, tuple[str, ...]] = {
    "gate": ("gate_proj", "w1", "wi_0", "gate", "linear_v"),
    "up": ("up_proj", "w3", "wi_1", "wi", "fc1", "fc_in", "lin1", "c_fc", "dense_h_to_4h", "linear_1"),
    "gate_up": ("gate_up_proj", "gate_and_up_proj", "w1w3"),
    "down": ("down_proj", "w2", "wo", "fc2", "fc_out", "lin2", "c_proj", "dense_4h_to_h"),
}
# What a configuration lists for models whose layers differ in size.
LAYER_SIZES = ("layer_key_value_heads", "layer_intermediate_sizes")
_LOW_RANK = {"q_a": "q", "q_b": "q", "kv_a": "k", "kv_b": "v"}
_ORDER = (
    "q_a", "q_b", "kv_a", "kv_b", "q", "k", "v", "qkv", "o",
    "cross_q", "cross_k", "cross_v", "cross_qkv", "cross_o", "router", "gate", "up", "gate_up", "down",
)  # fmt: skip
_IN_ATTENTION = re.compile(r"att", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|encoder_att", re.IGNORECASE)
_EXPERT = re.compile(r"expert", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"(.+?)\.(?:gate|router)(?:\.\w+)*")
_ROUTER = ("gate", "router", "classifier", "shared_expert_gate")

# Layers of a model type whose weight its own code reads, as a matrix or for its type, and does not say so to anybody.
_READ = {
    "falcon_mamba": ("lm_head",),
    "longt5": ("wo",),
    "mamba": ("dt_proj", "lm_head"),
    "mobilebert": ("predictions.dense", "predictions.decoder"),
    "rwkv": ("attention.output", "feed_forward.value"),
    "switch_transformers": ("wo",),
}


@dataclass(frozen=True)
class Block:
    """One repeated layer.

    Attributes:
        index: its place within its stack, from 0.
        name: full module name, such as `model.layers.3`.
        module: the module itself.
        projections: role -> full module name, in the order in which data passes through. Roles are those of
            `core.shape.PROJECTIONS`; low-rank attention has `q_a`, `q_b`, `kv_a`, `kv_b` (a before b); cross-attention
            `cross_q`, `cross_k`, `cross_v`, `cross_o`; each expert of a mixture `expert.0.up` and so on, or `expert`
            for a module that keeps all experts in stacked parameters; `router` chooses among them. A layer that takes
            the attention weights of an earlier one has neither `q` nor `k`.
        norms: full names of its normalisations in order.
        stack: "decoder", or "encoder" in the encoder of an encoder-decoder and in a masked model.
    """

    index: int
    name: str
    module: nn.Module
    projections: dict[str, str]
    norms: tuple[str, ...]
    stack: str


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model by full module name; an absent part is an empty name.

    Attributes:
        kind: "causal", "masked" or "seq2seq".
        blocks: in the order in which they run; for an encoder-decoder the encoder's come first.
        embeddings: the input embedding; `head` the output projection; `final_norm` the last normalisation before it.
        embeddings_tied: head and input embedding share their weight.
    """

    model: nn.Module
    kind: str
    blocks: tuple[Block, ...]
    embeddings: str
    head: str
    final_norm: str
    embeddings_tied: bool

    def linears(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(full name, module, role) of each projection that is a module with one weight matrix, in running order.

        The role has no prefix: cross-attention's `cross_q` is a "q", an expert's "expert". Routers, embeddings and head
        are left out.
        """
        for block in self.blocks:
            for key, name in block.projections.items():
                module = self.model.get_submodule(name)
                if key != "router" and is_projection(module):
                    yield name, module, plain_role(key)

    def stack(self, name: str) -> tuple[Block, ...]:
        """The blocks of the "encoder" or the "decoder"."""
        return tuple(block for block in self.blocks if block.stack == name)


@dataclass(frozen=True)
class FeedForward:
    """How a family of models computes the feed-forward part of a layer, for those who compute it in pieces.

    Attributes:
        inner: linear layers that read the block's input; one of them alone may hold gate and up (`fused`).
        down: the linear layer that writes its output.
        activation: the block's attribute with the non-linearity.
        attention: projections of the attention beside it.
    """

    inner: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "act_fn"
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    fused: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.inner, self.down)

    def middle(self, activation: Callable[[torch.Tensor], torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `down` reads, (rows, width), from what the `inner` layers gave."""
        gate, *up = parts[0].chunk(2, dim=-1) if self.fused else parts
        return activation(gate) * up[0] if up else activation(gate)


class Absent(nn.Module):
    """What stands where a block had its attention or its MLP: it adds nothing to the residual stream, or a constant.

    Args:
        part: "attention" or "mlp".
        width: of the residual stream.
        bias: whether there is a constant, the parameter `bias`.
    """

    def __init__(self, part: str, width: int, bias: bool = False) -> None:
        super().__init__()
        self.part = part
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, *inputs: torch.Tensor, hidden_states: torch.Tensor | None = None, **_: Any) -> Any:
        x = inputs[0] if hidden_states is None else hidden_states
        added = x.new_zeros(()) if self.bias is None else self.bias
        return (added, None) if self.part == "attention" else added


@dataclass(frozen=True)
class Half:
    """The attention or the MLP, plain or of experts, of a block that normalises before each: full names of the module
    and of its norm."""

    module: str
    norm: str


def halves(block: Block, plain: bool = True) -> dict[str, Half]:
    """The "attention" and the "mlp" of a block that normalises before each of the two and nowhere else.

    Args:
        plain: whether to refuse a block that normalises behind them too, or once before both.

    Raises:
        UsageError: a block of another build.
    """
    children = dict(block.module.named_children())
    norms = [name for name, child in children.items() if is_norm(child) or isinstance(child, nn.Identity)]
    found: dict[str, str] = {}
    own = {"mlp" if key == "down" or key.startswith("expert") else key: n for key, n in block.projections.items()}
    for part, role in (("attention", "o"), ("mlp", "mlp")):
        inside = own.get(role, "").removeprefix(block.name + ".").partition(".")[0]
        gone = [name for name, child in children.items() if isinstance(child, Absent) and child.part == part]
        found[part] = inside or (gone[0] if gone else "")
    if not (norms and all(found.values())) or plain and (len(norms) != 2 or len(children) != 4):
        raise UsageError(
            f"{block.name} is not an attention and an MLP with a norm before each",
            f"it holds {', '.join(children)}",
            "Use a Llama-like model",
        )
    before = (norms[0], norms[len(norms) // 2])
    return {
        part: Half(f"{block.name}.{name}", f"{block.name}.{norm}") for (part, name), norm in zip(found.items(), before)
    }


@dataclass(frozen=True)
class Mixture:
    """The experts of one block, and what chooses among them.

    The router is called with hidden states (tokens, width) and returns logits (tokens, choices), gates (tokens, k) and
    choices (tokens, k); the experts are called with hidden states, choices and gates, in this order.

    Attributes:
        block: place of the block among all blocks, from 0.
        router, experts: full names of the two modules.
        count: how many experts there are.
        chosen: how many of them a token meets.
        tensors: names of the experts' own parameters, each with one slice for every expert.
    """

    block: int
    router: str
    experts: str
    count: int
    chosen: int
    tensors: tuple[str, ...]


# Where a configuration says how many experts there are, and how many of them a token meets.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")


def mixtures(model: nn.Module) -> tuple[Mixture, ...]:
    """The mixtures of a model in running order; blocks without experts are passed over.

    Softmax before or after the choice, sigmoid gates, groups of experts and experts that all tokens share are matters
    of the family's own router and block, which stay as they are.

    Raises:
        UsageError: a model without experts, or with routers or experts that are called in another way.
    """
    found = []
    for place, block in enumerate(inspect(model).blocks):
        if "expert" not in block.projections:
            if any(key.startswith("expert.") and not key.startswith("expert.shared") for key in block.projections):
                _unknown_mixture(model, f"{block.name} keeps each expert in a module of its own")
            continue
        name = block.projections["expert"]
        experts: Any = model.get_submodule(name)
        router: Any = next(
            (
                child
                for word, child in model.get_submodule(name.rpartition(".")[0]).named_children()
                if word in _ROUTER and child is not experts
            ),
            None,
        )
        if router is None:
            _unknown_mixture(model, f"{name} has no router beside it")
        asked = list(signature(type(experts).forward).parameters)[1:]
        needed = [p for p in signature(type(router).forward).parameters.values() if p.default is p.empty][1:]
        if len(asked) < 3 or len(needed) != 1 or needed[0].kind is not needed[0].POSITIONAL_OR_KEYWORD:
            _unknown_mixture(model, f"{type(router).__name__} or {type(experts).__name__} takes other arguments")
        count, chosen = getattr(experts, "num_experts", 0), getattr(router, "top_k", 0)
        if not chosen:
            config = getattr(model, "config", None)
            chosen = next((n for n in (getattr(config, word, 0) for word in EXPERTS_CHOSEN) if n), 0)
        tensors = tuple(n for n, p in experts.named_parameters(recurse=False) if len(p) == count)
        if not isinstance(chosen, int) or chosen < 1:
            _unknown_mixture(model, f"{type(router).__name__} does not say how many experts a token meets")
        router_name = next(n for n, module in model.named_modules() if module is router)
        found.append(Mixture(place, router_name, name, int(count), int(chosen), tensors))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no experts",
            "only a mixture of experts has any",
            "Use Mixtral, OLMoE or their kin",
        )
    return tuple(found)


def route(router: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (tokens, choices), gates (tokens, k) and choices (tokens, k) of hidden states (tokens, width).

    Raises:
        UsageError: the router answers with something else.
    """
    answer = router(hidden)
    fits = isinstance(answer, tuple) and len(answer) == 3 and all(isinstance(part, torch.Tensor) for part in answer)
    if fits:
        logits, gates, choices = answer
        fits = len(logits) == len(hidden) and gates.shape == choices.shape and not choices.is_floating_point()
    if not fits:
        raise UsageError(
            f"{type(router).__name__} is not understood",
            "it does not answer with logits, gates and choices",
            "Use Mixtral, OLMoE, Qwen-MoE, DeepSeek or their kin",
        )
    return logits, gates, choices


# What families call the matrices of experts that stand one above the other: (experts, 2 inner, width), the gates' rows
# before those of up, and (experts, width, inner).
GATE_UP, DOWN = "gate_up_proj", "down_proj"


def stacked(model: nn.Module) -> list[tuple[str, Any]]:
    """Full name and module of each layer's experts whose matrices are the parameters `GATE_UP` and `DOWN`."""
    return [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, GATE_UP, None), nn.Parameter)]


def gated_experts(experts: Any) -> bool:
    """Whether the stacked experts of a layer are `GATE_UP`, the family's gate and `DOWN`, and nothing beside them."""
    other = ("has_bias", "is_transposed", "has_post_expert_norm")
    usual = getattr(experts, "has_gate", False) and not any(getattr(experts, word, False) for word in other)
    dims = {name: parameter.dim() for name, parameter in experts.named_parameters()}
    return bool(usual and dims == {GATE_UP: 3, DOWN: 3})


def routers(names: Iterable[str]) -> set[str]:
    """Of full names of modules, those that choose among the experts beside them, and those within them."""
    known = set(names)
    beside = {name.partition(".expert")[0] for name in known if ".expert" in name}
    return {name for name in known if (found := _ROUTER_NAME.fullmatch(name)) and found[1] in beside}


def is_router(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` is one of `routers`."""
    found = _ROUTER_NAME.fullmatch(name)
    children = dict(model.get_submodule(found[1]).named_children()) if found else {}
    return any(child.startswith("expert") for child in children)


def expert_reads(experts: Any, expert: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each matrix of one expert is multiplied with when the expert is given x (tokens, width): by parameter."""
    return {GATE_UP: x, DOWN: experts._apply_gate(x @ experts.get_parameter(GATE_UP)[expert].T.to(x.dtype))}


def set_experts(config: Any, count: int) -> None:
    """Write how many experts every layer has into a configuration."""
    for word in EXPERT_COUNTS:
        if isinstance(getattr(config, word, None), int):
            setattr(config, word, count)


def _unknown_mixture(model: nn.Module, why: str) -> Any:
    raise UsageError(
        f"The experts of {type(model).__name__} are not understood",
        why,
        "Use Mixtral, OLMoE, Qwen-MoE, DeepSeek or their kin, as transformers 5 builds them",
    )


def attends(block: nn.Module) -> bool:
    """Whether a block has attention, which one that was cut down may have lost."""
    return not any(isinstance(module, Absent) and module.part == "attention" for module in block.modules())


# By model type; a family that is not here computes something else.
FEED_FORWARDS = dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"), FeedForward()) | {
    "phi": FeedForward(("fc1",), "fc2", "activation_fn", ("q_proj", "k_proj", "v_proj", "dense")),
    "phi3": FeedForward(("gate_up_proj",), activation="activation_fn", attention=("qkv_proj", "o_proj"), fused=True),
}


def attention_of(block: Block) -> str:
    """Full name of the module that holds the attention's projections."""
    return block.projections["o"].rpartition(".")[0]


def keeps_keys(block: Block) -> bool:
    """Whether a layer computes keys of its own; one that takes another's attention weights does not."""
    return bool({"k", "qkv", "kv_a", "kv_b"} & set(block.projections))


def plain_role(key: str) -> str:
    """The role in `core.shape.ROLES` of a key of `Block.projections`."""
    if key.startswith("expert"):
        return "expert"
    return _LOW_RANK.get(key) or ("other" if key == "router" else key.removeprefix("cross_"))


def inspect(model: nn.Module) -> Anatomy:
    """The anatomy of a causal, masked or encoder-decoder language model of transformers, bare or wrapped by peft.

    Raises:
        UsageError: names the class and the part that was not found.
    """
    core = getattr(model, "get_base_model", lambda: model)()
    prefix = _name_of(model, core)
    config = getattr(core, "config", None)
    if config is None:
        _unknown(core, "a configuration")
    kind = model_kind(core)
    stacks = _stacks(core)
    if not stacks:
        _unknown(core, "a list of equal blocks with attention in them")
    blocks: list[Block] = []
    for list_name, modules in stacks:
        stack = "encoder" if kind == "masked" or (kind == "seq2seq" and _is_encoder(list_name)) else "decoder"
        for index, module in enumerate(modules):
            name = f"{list_name}.{index}"
            projections = _projections(module)
            _check(core, name, projections, {m.part for m in module.modules() if isinstance(m, Absent)})
            blocks.append(
                Block(
                    index,
                    prefix + name,
                    module,
                    {role: f"{prefix}{name}.{part}" for role, part in projections.items()},
                    tuple(
                        f"{prefix}{name}.{part}" for part, child in module.named_modules() if part and is_norm(child)
                    ),
                    stack,
                )
            )
    embeddings = _getter(core, "get_input_embeddings")
    if embeddings is None:
        _unknown(core, "input embeddings")
    head = _getter(core, "get_output_embeddings")
    tied = head is not None and getattr(head, "weight", 0) is getattr(embeddings, "weight", 1)
    final_norm = _final_norm(core, stacks[-1][0])
    return Anatomy(
        model,
        kind,
        tuple(blocks),
        prefix + _name_of(core, embeddings).removesuffix("."),
        prefix + _name_of(core, head).removesuffix(".") if head is not None else "",
        prefix + final_norm if final_norm else "",
        tied,
    )


def model_kind(model: nn.Module) -> str:
    """ "causal", "masked" or "seq2seq", from the model's class and configuration."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    if "MaskedLM" in name or "PreTraining" in name:
        return "masked"
    return "causal"


def is_projection(module: nn.Module) -> bool:
    """A module that multiplies by one weight matrix: nn.Linear, GPT-2's Conv1D, a packed or an adapted replacement."""
    if hasattr(module, "base_layer"):
        return is_projection(module.base_layer)  # type: ignore[arg-type]  # what is adapted may be a whole block
    if isinstance(module, nn.Linear):
        return True
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out), as GPT-2's Conv1D does, rather than (out, in)."""
    return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a projection, whatever its class."""
    module = getattr(module, "base_layer", module)
    if is_transposed(module):
        return int(module.weight.shape[0]), int(module.nf)  # type: ignore[union-attr,arg-type,index]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def is_norm(module: nn.Module) -> bool:
    """A layer or root-mean-square normalisation of any library."""
    return "norm" in type(module).__name__.lower() and not any(is_projection(child) for child in module.modules())


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 0 for most, 1 for families that store the way from 1."""
    weight: Any = norm.weight
    zeros = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in norm.named_parameters()}
    sign = torch.ones(weight.shape, dtype=weight.dtype)  # of mean 0 and deviation 1
    sign[1::2] = -1
    with torch.no_grad():
        return float(round(float((torch.func.functional_call(norm, zeros, (sign[None, None],)) * sign).median())))


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Full name -> the list that holds a stack's blocks."""
    core = getattr(model, "get_base_model", lambda: model)()
    return {_name_of(model, core) + name: modules for name, modules in _stacks(core)}


def closing_norms(model: nn.Module) -> dict[str, str]:
    """Full name of a block -> its normalisation whose output is the block's own; blocks that end by adding are absent.

    Names do not tell, since families use the same ones in either order: a few tokens are passed and looked at.

    Raises:
        UsageError: the model cannot be called with tokens alone.
    """
    anatomy = inspect(model)
    core: Any = getattr(model, "get_base_model", lambda: model)()
    found: dict[str, str] = {}
    hooks = []
    for block in anatomy.blocks:
        seen: list[tuple[str, torch.Tensor]] = []
        for name in block.norms:
            norm = model.get_submodule(name)
            hooks.append(norm.register_forward_hook(lambda _, args, out, n=name, seen=seen: seen.append((n, out))))

        def look(_: nn.Module, args: Any, out: Any, block: Block = block, seen: list = seen) -> None:
            left = out[0] if isinstance(out, tuple) else out
            if seen and torch.equal(left, seen[-1][1]):
                found[block.name] = seen[-1][0]

        hooks.append(block.module.register_forward_hook(look))
    # Several tokens, since one that pads may be embedded as zeros, which a norm leaves as they are.
    ids = torch.arange(4, device=core.get_input_embeddings().weight.device)[None]
    more = {"decoder_input_ids": ids} if anatomy.kind == "seq2seq" else {}
    was_training = core.training
    core.eval()
    try:
        with torch.no_grad():
            core(input_ids=ids, **more)
    except Exception as error:
        raise UsageError(
            f"tokens could not be passed through {type(core).__name__}", f"{type(error).__name__}: {error}"
        ) from error
    finally:
        core.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def renumber(blocks: nn.ModuleList) -> None:
    """Number the layers anew from 0, so that each finds its own place in a key-value cache.

    Those without attention take no number: a cache learns its length from its first layer.
    """
    index = 0
    for block in blocks:
        for module in block.modules():
            for attribute in ("layer_idx", "layer_id", "layer_number"):
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
        index += attends(block)


def set_depth(config: Any, layers: int, kept: list[int], stack: str = "decoder") -> None:
    """Write the number of layers into a configuration, and keep only `kept` of what it lists for each layer."""
    names: tuple[str, ...] = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
    if stack == "encoder" and getattr(config, "is_encoder_decoder", False):
        names = ("encoder_layers", "num_layers", "num_encoder_layers")
    elif getattr(config, "is_encoder_decoder", False):
        names = ("decoder_layers", "num_decoder_layers")
    before = max(kept, default=-1) + 1
    for name in names:
        if isinstance(getattr(config, name, None), int):
            before = max(before, getattr(config, name))
            setattr(config, name, layers)
    for name, value in list(vars(config).items()):
        if (
            isinstance(value, list)
            and len(value) == before
            and name in ("layer_types", "mlp_layer_types", "no_rope_layers", *LAYER_SIZES)
        ):
            setattr(config, name, [value[index] for index in kept])


def _stacks(core: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Outermost lists whose every element has attention and projections; of several in one model the longest."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in core.named_modules():
        inside = any(name.startswith(other + ".") for other, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and _is_stack(module):
            found.append((name, module))
    if not getattr(core.config, "is_encoder_decoder", False):
        return sorted(found, key=lambda item: -len(item[1]))[:1]
    return sorted(found, key=lambda item: not _is_encoder(item[0]))


def _is_stack(modules: nn.ModuleList) -> bool:
    having = [_has_attention(block) for block in modules]
    return any(having) and all(has or not attends(block) for has, block in zip(having, modules))


def _is_encoder(name: str) -> bool:
    parts = name.split(".")
    return "encoder" in parts and "decoder" not in parts


def _has_attention(block: nn.Module) -> bool:
    keys = set(_projections(block))
    return bool({"qkv", "q", "q_b", "v"} & keys) and "o" in keys


def _projections(block: nn.Module) -> dict[str, str]:
    """Role (with prefix) -> name within the block, in the order in which data passes through them."""
    found: dict[str, str] = {}
    undecided: list[tuple[str, nn.Module]] = []
    for name, module in _leaves(block):
        key = _expert_key(name, module) or _named_role(name)
        if key and key not in found:
            found[key] = name
        elif not key and is_projection(module):
            undecided.append((name, module))
    # An MLP whose projections have names of their own still widens and then narrows.
    for name, module in undecided:
        narrow, wide = features(module)
        key = "up" if wide > narrow else "down"
        if narrow != wide and not ({"gate_up", "expert"} & set(found)):
            found.setdefault(key, name)
    return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)))


def _leaves(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        full = f"{prefix}{name}"
        if is_projection(child) or _stacked_experts(child) or _is_router(name, child):
            yield full, child
        else:
            yield from _leaves(child, full + ".")


def _stacked_experts(module: nn.Module) -> bool:
    # Packed linear layers can have three-dimensional weights too.
    if is_projection(module) or isinstance(module, nn.Embedding | nn.Conv1d):
        return False
    if getattr(module, "stacked_experts", False):  # packed ones say so themselves
        return True
    return any(parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))


def _is_router(name: str, module: nn.Module) -> bool:
    return name in _ROUTER and any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))


def _expert_key(name: str, module: nn.Module) -> str:
    parts = name.split(".")
    if _stacked_experts(module):
        return "expert"
    numbered = re.search(r"experts?\.(?:\w+\.)?(\d+)\.", name)
    if numbered:
        return f"expert.{numbered.group(1)}.{_named_role('mlp.' + parts[-1]) or parts[-1]}"
    if (
        parts[-1] in _ROUTER
        and not _IN_ATTENTION.search(name)
        and (not is_projection(module) or features(module)[1] <= 512)
    ):
        return "router"
    if _EXPERT.search(name):
        return f"expert.shared.{_named_role('mlp.' + parts[-1]) or parts[-1]}"
    return ""


def _named_role(name: str) -> str:
    *path, leaf = name.split(".")
    leaf = leaf.lower()
    if any(_IN_ATTENTION.search(part) for part in path):
        prefix = "cross_" if any(_CROSS.search(part) for part in path) else ""
        for role, words in _ATTENTION.items():
            if leaf in words:
                return prefix + role
        return ""
    for role, words in _MLP.items():
        if leaf in words:
            return role
    return ""


def _check(core: nn.Module, name: str, projections: dict[str, str], gone: set[str]) -> None:
    keys = set(projections)
    if "attention" not in gone:
        borrows = "v" in keys and not {"q", "k"} & keys
        if not (borrows or "qkv" in keys or {"q", "k", "v"} <= keys or ("kv_b" in keys and {"q", "q_b"} & keys)):
            _unknown(core, f"query, key and value projections in {name}")
        if "o" not in keys:
            _unknown(core, f"the attention's output projection in {name}")
    experts = any(key.startswith("expert") for key in keys)
    if "mlp" not in gone and not experts and not ({"down"} <= keys and ({"up", "gate_up"} & keys)):
        _unknown(core, f"the MLP's up and down projections in {name}")


def _final_norm(core: nn.Module, list_name: str) -> str:
    parent_name = list_name.rpartition(".")[0]
    parent = core.get_submodule(parent_name)
    candidates = [
        name for name, child in parent.named_children() if is_norm(child) and not re.search(r"emb|prediction", name)
    ]
    if not candidates:
        return ""
    return f"{parent_name}.{candidates[-1]}" if parent_name else candidates[-1]


def _getter(core: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(core, name)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _name_of(model: nn.Module, part: nn.Module | None) -> str:
    """Name of `part` within `model` with a dot behind it; empty for the model itself."""
    for name, module in model.named_modules():
        if module is part:
            return name + "." if name else ""
    return ""


def _unknown(core: nn.Module, missing: str) -> Any:
    raise UsageError(
        f"The model class {type(core).__name__} is not understood: {missing} could not be found",
        "models are addressed through their blocks, attention and MLP projections",
        "Use a transformer language model, such as Llama, Qwen, Mistral, GPT-2, BERT or T5",
    )


def read_by_families(model: nn.Module) -> tuple[str, ...]:
    """Ends of the names of layers whose weight the family's own code reads beside calling them."""
    return _READ.get(str(getattr(getattr(model, "config", None), "model_type", "")), ())

"""MixLoRA: send every token through the few of many low-rank feed-forward experts that a trained router picks for it.

How it works
    1. The model stays frozen. An expert j of a layer is the layer's feed-forward block with a low-rank pair of its own
       beside each linear layer m; A starts random, B at zero:
       W_jm = W_m + s B_jm A_jm,   s = alpha / r   (alpha / sqrt r with rsLoRA; rows rescaled with DoRA)         (eq. 1)
    2. A router G (E x d), in float32, gives each token x its probabilities, and k of E experts work on it:
       p = softmax(G x),   w_j = p_j / (sum of the k largest p) for these, else 0                                (eq. 2)
       y = sum_j w_j expert_j(x) + (1 - sum_j w_j) FFN(x)                                                        (eq. 3)
    3. The experts differ by their pairs alone, so the frozen products are shared. W_gate x and W_up x are computed once
       for all tokens; expert j adds its pairs on the rows routed to it, which gives h_j; and what leaves the block goes
       through W_down once, because that is linear:
       y = W_down (sum_j w_j h_j) + sum_j w_j s B_j A_j h_j                                                      (eq. 4)
    4. So that no expert starves, training adds a coefficient times, over the tokens of all layers but padding,
       E sum_e f_e P_e,   f_e share of tokens sent to e, P_e mean p_e;   k when even, E when collapsed           (eq. 5)
    5. The attention's projections get one pair each, of their own rank, with experts or without.
    6. Other routings. "mixlora-dynamic" keeps experts in falling order of p until their sum passes `top_p`, with
       w_j = p_j. "mixlora-switch" keeps the likeliest, w = p, unless `expert_capacity` tokens of the same text went to
       it before; a token too many gets FFN(x). It adds the mean squared log-sum-exp of the logits to the loss.

Where it bends
    The last product of a block runs once a token, not k times as in the authors' code (with DoRA on it: k times). The
    rest of eq. 3, 1 - sum w, goes to the frozen block; the authors leave it out for the two other routings, which
    shrinks the block's output before anything is learnt. Capacity is counted over the tokens of a text that one call
    sees, and padding takes none. `jitter_noise` reaches the router alone, in training alone. A temperature
    divides the logits. One adapter acts on a row of a batch: rows are assigned with `adapter_names`, in training as
    well. Folders are written and read in the authors' layout. No merging: which weights a token meets depends on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import Shape, Weight
from shoestring.methods.adapters import _shared as shared
from shoestring.methods.adapters._experts import (
    ROUTES,
    UNMERGEABLE,
    Call,
    MixLoraBlock,
    MixLoraLayer,
    MixLoraLinear,
    PairSettings,
    balance,
)
from shoestring.models.anatomy import FEED_FORWARDS, FeedForward

METHOD = Method(
    paper=Paper(
        "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA based Mixture of Experts",
        "2024-04",
        arxiv="2404.15159",
        code="TUDB-Labs/MixLoRA",
        licence="Apache-2.0",
    ),
    provides="MixLoraConfig",
    saves=("parameters", "memory", "latency", "storage"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "weight",
        "merges": "no",
        "parameters": "per layer E d + E r sum (in + out) over the feed-forward block, and r (in + out) in attention",
    },
    expects={
        "check_merge": "which experts work on a token depends on the token, so no one weight replaces them",
        "check_unmerge_restores_the_base": "nothing can be merged: which experts work depends on the token",
    },
)
TRAINING = {"learning_rate": 1e-3}
BASE = "__base__"  # peft's word for a row of a batch without an adapter
_LINEARS = {name for form in FEED_FORWARDS.values() for name in form.linears}


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass
class MixLoraConfig(shared.AdapterConfig):
    """Settings of a MixLoRA adapter; the names are those of the authors' files.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, use_dora: of the pairs in attention and, unless `expert_lora` says
            otherwise, of the experts.
        expert_lora: any of these five, for the experts alone.
        routing_strategy: "mixlora" (the `top_k` likeliest), "mixlora-dynamic" (`top_p`) or "mixlora-switch" (one, with
            `expert_capacity`).
        num_experts: experts in each layer.
        router_loss: whether training adds the balance term, times `router_aux_loss_coef`.
        router_z_loss_coef: of the second term of "mixlora-switch".
        router_init_range: standard deviation of a new router; None means 0.02, and 1 for "mixlora-switch".
        jitter_noise: in training the router's input is multiplied by numbers from 1 - j to 1 + j; None means 0, and
            0.01 for "mixlora-switch".
        temperature: divides the logits of "mixlora-dynamic"; 0 leaves them as they are.
        act_fn: name of an activation that the experts use in place of the model's own.

    `target_modules` names projections of the attention and of the feed-forward block, at least one of the latter; None
    means all of them.
    """

    TYPE = "mixlora"

    r: int = field(default=8, metadata={"help": "Rank of a pair"})
    lora_alpha: float = field(default=16, metadata={"help": "A pair is scaled by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before a pair"})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt r"})
    use_dora: bool = field(default=False, metadata={"help": "Learn the rows' lengths apart"})
    expert_lora: dict[str, Any] | None = field(default=None, metadata={"help": "What differs for the experts' pairs"})
    routing_strategy: str = field(default="mixlora", metadata={"help": "How experts are picked"})
    num_experts: int = field(default=8, metadata={"help": "Experts in each layer"})
    top_k: int = field(default=2, metadata={"help": "Experts for each token"})
    top_p: float = field(default=0.8, metadata={"help": "Probability that the picked experts cover"})
    temperature: float = field(default=0.0, metadata={"help": "Divides the logits"})
    expert_capacity: int = field(default=32, metadata={"help": "Tokens of a text that an expert takes"})
    router_loss: bool = field(default=True, metadata={"help": "Train towards even load"})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Coefficient of the balance term"})
    router_z_loss_coef: float = field(default=0.001, metadata={"help": "Coefficient of the logits' size"})
    router_init_range: float | None = field(default=None, metadata={"help": "Deviation of a new router"})
    jitter_noise: float | None = field(default=None, metadata={"help": "Noise on the router's input"})
    act_fn: str | None = field(default=None, metadata={"help": "Activation of the experts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing_strategy not in ROUTES:
            raise ValueError(
                f"routing_strategy={self.routing_strategy!r} is not known; it is one of {', '.join(map(repr, ROUTES))}"
            )
        switch = self.routing_strategy == "mixlora-switch"
        if self.router_init_range is None:
            self.router_init_range = 1.0 if switch else 0.02
        if self.jitter_noise is None:
            self.jitter_noise = 0.01 if switch else 0.0
        stray = set(self.expert_lora or {}) - set(PairSettings.__dataclass_fields__)
        if stray:
            raise ValueError(
                f"expert_lora has no setting {', '.join(sorted(stray))}; it takes "
                + ", ".join(PairSettings.__dataclass_fields__)
            )
        for where, pair in (("", self.pair()), ("expert_lora: ", self.pair(experts=True))):
            shared.whole(f"{where}r", pair.r)
            shared.number(f"{where}lora_dropout", pair.lora_dropout, 0.0, 0.999)
            shared.number(f"{where}lora_alpha", pair.lora_alpha, 0.0)
        for name in ("num_experts", "top_k", "expert_capacity"):
            shared.whole(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than the {self.num_experts} experts; lower it")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_init_range", "temperature"):
            shared.number(name, getattr(self, name), 0.0)
        shared.number("jitter_noise", self.jitter_noise, 0.0, 0.999)
        shared.number("top_p", self.top_p, 0.0, 1.0)
        if not self.top_p:
            raise ValueError("top_p=0 keeps no expert; it must be above 0, and at most 1")
        if self.act_fn is not None and self.act_fn not in ACT2FN:
            raise ValueError(f"act_fn={self.act_fn!r} is no activation of transformers; leave it out for the model's")

    def pair(self, *, experts: bool = False) -> PairSettings:
        """What the pairs in attention, or those of the experts, are made of."""
        own = {name: getattr(self, name) for name in PairSettings.__dataclass_fields__}
        return PairSettings(**(own | (self.expert_lora or {}) if experts else own))

    def to_dict(self) -> dict[str, Any]:
        """As the authors' reader wants it: without `expert_lora` where there is none."""
        made = {k: v for k, v in super().to_dict().items() if v is not None or k != "expert_lora"}
        if isinstance(self.target_modules, set):
            made["target_modules"] = sorted(self.target_modules)
        return made

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Take the fields of the authors' files that have no meaning here, where they have the one possible value."""
        for name, only in (("bias", "none"), ("sparse_step", None)):
            if (value := kwargs.pop(name, only)) != only:
                raise ValueError(f"the adapter was saved with {name}={value!r}, and only {only!r} can be read")
        if kwargs.get("expert_lora"):
            beside = ("bias", "task_type", "base_model_name_or_path")
            kwargs["expert_lora"] = {k: v for k, v in kwargs["expert_lora"].items() if k not in beside}
        return super().check_kwargs(**kwargs)


# --- the tuner --------------------------------------------------------------------------------------------------------


class MixLoraModel(shared.Guard):
    """The tuner. It listens to the model's own forward, so that every way of calling it is heard."""

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.call = Call()
        super().__init__(model, *args, **kwargs)
        body = getattr(model, "base_model", model)
        self.listening = [
            body.register_forward_pre_hook(self._begin, with_kwargs=True),
            body.register_forward_hook(self._end),
            model.register_forward_hook(self._add_to_loss, with_kwargs=True),
        ]

    # ---- what is adapted

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        family = model_config.get("model_type")
        if family not in FEED_FORWARDS:
            raise ValueError(
                f"MixLoRA does not know the feed-forward block of {type(self.model).__name__} ({family}); it knows "
                f"those of {', '.join(sorted(FEED_FORWARDS))}"
            )
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = {*FEED_FORWARDS[family].attention, *FEED_FORWARDS[family].linears}
        if peft_config.act_fn is None:
            # The model's own; the authors' reader wants it by name.
            peft_config.act_fn = model_config.get("hidden_activation") or model_config.get("hidden_act")
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        blocks = (name for name, _ in model.named_modules() if name.endswith(".mlp"))
        if not any(self._check_target_module_exists(peft_config, name) for name in blocks):
            raise ValueError(
                f"target_modules={peft_config.target_modules} reaches no feed-forward block; name at least one of "
                f"{', '.join(self._form().linears)}, or take a method without experts"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        name = key.rpartition(".")[2]
        if name in _LINEARS:
            return False  # it is adapted with its block
        if name == "mlp":
            return any(shared.reaches(peft_config, f"{key}.{linear}") for linear in _LINEARS)
        return bool(shared.reaches(peft_config, key))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        form = self._form()
        made: nn.Module
        if isinstance(target, MixLoraBlock | MixLoraLinear):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        if target_name == "mlp":
            made = MixLoraBlock(target, adapter_name, peft_config, current_key, form, self.call)
        elif target_name in form.attention:
            self._check_target(target, current_key, (nn.Linear,), "linear layers")
            made = MixLoraLinear(target, adapter_name, peft_config, current_key, self.call)
        else:
            raise TypeError(f"{current_key} is no projection of attention or feed-forward block, and has no place here")
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def _form(self) -> FeedForward:
        return FEED_FORWARDS[self.get_model_config(self.model)["model_type"]]

    def _replace_module(self, parent: Any, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MixLoraBlock):
            setattr(parent, child_name, new_module)  # peft would look for the weight of a layer
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act.

        Raises:
            ValueError: several are named; a token cannot follow two routers.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"MixLoRA adapters do not act together ({', '.join(adapter_name)}): a token follows one router; assign "
                "rows of a batch to adapters with adapter_names"
            )
        super().set_adapter(adapter_name, inference_mode)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(UNMERGEABLE)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self.listening:
            handle.remove()
        return model

    # ---- a pass of the model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            unknown = sorted(set(names) - set(self.peft_config) - {BASE})
            if unknown:
                raise ValueError(f"adapter_names has {', '.join(unknown)}; known: {', '.join(self.peft_config)}")
            beams = kwargs.get("num_beams") or 1
            self.call.assigned = [name for name in names for _ in range(beams)]
        try:
            yield
        finally:
            self.call.assigned = None

    def _begin(self, _body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Call = self.call
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        call.mask = mask if isinstance(mask, Tensor) else None
        call.positions, call.rows, call.loads, call.open = kwargs.get("position_ids"), call.assigned, {}, True

    def _end(self, *_: Any) -> None:
        self.call.open = False

    def _add_to_loss(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        extra = self.auxiliary_loss() if labels is not None else None
        if labels is None or extra is None:
            return None
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            extra = extra * (labels[..., 1:] != -100).sum() / items
        if isinstance(output, tuple):
            return (output[0] + extra, *output[1:])
        output.loss, output.aux_loss = output.loss + extra, extra.detach()
        return output

    def auxiliary_loss(self) -> Tensor | None:
        """What the last pass adds to the loss: the balance term of each adapter in it, times its coefficient.

        None after a pass that was not to be trained on. A plain `transformers.Trainer` needs no call: where the model
        is given labels, `output.loss` has the term in it, and `output.aux_loss` says what it was.

        Raises:
            ValueError: gradient checkpointing of the kind that cuts the routers off the loss.
        """
        found: list[Tensor] = []
        configs: Mapping[str, Any] = self.peft_config
        for name, by_layer in self.call.loads.items():
            config, loads = configs[name], list(by_layer.values())
            if not config.router_loss or not loads[0].trained:
                continue
            term = config.router_aux_loss_coef * balance(loads)
            if config.routing_strategy == "mixlora-switch":
                squared = torch.stack([load.squared for load in loads]).sum()
                tokens = torch.stack([load.tokens for load in loads]).sum().clamp(min=1)
                term = term + config.router_z_loss_coef * squared / tokens
            if torch.is_grad_enabled() and loads[0].learns and not term.requires_grad:
                raise ValueError(
                    "gradient checkpointing with use_reentrant=True cuts the routers off the balance term; enable it "
                    "with use_reentrant=False, or set router_loss=False"
                )
            found.append(term)
        return torch.stack(found).sum() if found else None

    def expert_load(self, adapter_name: str | None = None) -> list[dict[str, Any]]:
        """How the last pass of the model, in training or not, loaded the experts, layer by layer.

        Returns:
            For each layer {"layer": its number, "tokens": tokens sent to each expert, "share": the same as shares of
            their sum, "entropy": of the shares, 1 when even and 0 when one expert has all}; padding is not counted.
        """
        name = adapter_name or self.active_adapters[0]
        report: list[dict[str, Any]] = []
        for layer, load in self.call.loads.get(name, {}).items():
            tokens = load.chosen
            share = tokens / tokens.sum().clamp(min=1)
            entropy = float(-(share * share.clamp(min=1e-12).log()).sum()) / math.log(max(2, len(share)))
            counts = [int(n) for n in tokens]
            report.append({"layer": layer, "tokens": counts, "share": share.tolist(), "entropy": entropy})
        return report

    # ---- files, in the authors' layout

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key if key.startswith("mixlora.layers.") else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return {
            name: part.clone()
            for key, names in _places(model, adapter_name)
            for name, part in zip(names, state_dict[key].chunk(len(names)))
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        left, made, own = dict(state_dict), {}, model.state_dict()
        _same_experts(left, config.num_experts)
        for key, names in _places(model, adapter_name):
            lacking = [name for name in names if name not in left]
            if lacking:
                raise ValueError(f"the adapter's file lacks {lacking[0]}; save the adapter again")
            made[key] = torch.cat([left.pop(name) for name in names])
            if made[key].shape != own[key].shape:
                raise ValueError(
                    f"{names[0]} in the adapter's file has another size than this model and config take (all experts "
                    f"{tuple(made[key].shape)}, not {tuple(own[key].shape)}); use the base it was trained on"
                )
        foreign = sorted(key for key in left if not shared.saved_beside(key, model))
        if foreign:
            raise ValueError(
                f"the adapter's file holds {foreign[0][:120]}, which MixLoraConfig does not have on this model; use "
                "the base it was trained on, and an intact file"
            )
        return left | made


def _places(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, list[str]]]:
    """(name in the model's state, names in the authors' files) of every tensor of an adapter."""
    for path, module in model.named_modules():
        if isinstance(module, MixLoraLayer):
            for container, names in module.places(adapter_name):
                yield f"{path}.{container}.{adapter_name}", names


def _same_experts(tensors: Mapping[str, Tensor], wanted: int) -> None:
    """Raises ValueError when a file holds another number of experts than the adapter was made with."""
    numbers = [int(m[1]) for key in tensors if (m := re.search(r"^mixlora\..*\.experts\.(\d+)\.", key))]
    if numbers and max(numbers) + 1 != wanted:
        raise ValueError(
            f"the adapter's file holds {max(numbers) + 1} experts a layer, and its config says num_experts={wanted}; "
            "the number is fixed when an adapter is made"
        )


# --- the method's words -----------------------------------------------------------------------------------------------


def register() -> None:
    shared.join("mixlora", MixLoraConfig, MixLoraModel)


def example() -> MixLoraConfig:
    return MixLoraConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return (
        {"r": 4, "lora_alpha": 8, "num_experts": 8, "top_k": 2},
        {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k": 2},
    )


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """E d + E r sum (in + out) parameters a layer, and r (in + out) for each projection of the attention.

    The experts stay beside the model, in float32, and k of E work on a token.
    """
    config = MixLoraConfig(**{**settings()[0], **options})
    form, pair, expert = FEED_FORWARDS.get(shape.family, FeedForward()), config.pair(), config.pair(experts=True)
    made: list[Weight] = []

    def add(name: str, rows: int, columns: int, experts: int = 1) -> None:
        dims, used = (experts * rows, columns), config.top_k / config.num_experts if experts > 1 else 1.0
        size = 4 * rows * columns * experts
        made.append(Weight(name, "expert" if experts > 1 else "other", dims, size, size, used=used))

    chosen = copy(config)
    chosen.target_modules = config.target_modules or {*form.attention, *form.linears}  # type: ignore[assignment]
    blocks: set[str] = set()
    for weight in shape.weights:
        key = weight.name.removesuffix(".weight")
        path, _, name = key.rpartition(".")
        if len(weight.dims) != 2 or not shared.reaches(chosen, key):
            continue
        out, wide = weight.dims
        if name in form.linears:
            if path not in blocks:
                add(f"{path}.router", config.num_experts, shape.hidden)
                blocks.add(path)
            add(f"{key}.pairs", out + wide, expert.r, config.num_experts)
            if expert.use_dora:
                add(f"{key}.lengths", out, 1, config.num_experts)
        elif name in form.attention:
            add(f"{key}.pair", out + wide, pair.r)
            if pair.use_dora:
                add(f"{key}.lengths", out, 1)
    whole = Shape(**{**vars(shape), "weights": (*shape.weights, *made)})
    return Price(whole, trainable=sum(w.count for w in made), train_flops=2.0)

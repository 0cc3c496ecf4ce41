"""SSF: scale and shift what frozen layers give, then fold both into their weights; or choose from a pool per input.

How it works
    1. After a frozen layer with output y (..., c) stand a scale and a shift (c,), broadcast over all other axes:
       y' = y * scale + shift, with scale ~ normal(1, init_std) and shift ~ normal(0, init_std)                  (eq. 1)
    2. Both fold into the layer, so the adapter costs nothing at work. A linear layer or convolution becomes
       W' = scale[:, None] W, b' = scale b + shift, a norm gamma' = scale gamma, beta' = scale beta + shift, an
       embedding E' = E * scale + shift                                                                          (eq. 2)
    3. A pool holds `pool` entries of scale and shift at every site, (P, c), and one set of keys (P, q) for the model.
       The frozen model without the adapter gives each input a query u(x) (q,); sim_i = cosine(u(x), key_i)      (eq. 3)
    4. Every site uses the plain mean of the `choose` entries with the largest sim, input by input in a batch;
       a pooled classifier, weight (P, C, d) and bias (P, C), is mixed in the same way                           (eq. 4)
    5. Training minimises (1 - key_weight) task + key_weight (1 - sum of the chosen sims): the second term pulls the
       chosen keys towards the query, and is the only one that reaches them                                      (eq. 5)

Where it bends
    The paper is on images; here every linear layer and norm of a language model's blocks is a site. A norm without a
    bias gets a scale alone, for a shift would have no place to fold into (shift="always" gives it one, and cannot be
    merged). Merging gives linear layers biases: the configuration's switches for them are set, and where a family has
    none merging says so. `settings` starts at scale 1 and shift 0, so that training begins at the base model.
    The pools are those of FedIns (arXiv 2308.06051). Its code averages a batch's choices and so trains one input at a
    time; here each row has its own. The query of a language model is the mean state of the prompt's first
    `query_tokens`, chosen once and kept while it generates; where a call carries no labels, nothing tells the prompt
    of a shorter example from its answer. In `auxiliary_loss` eq. 5 stands divided by (1 - key_weight).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.methods.adapters import _shared
from shoestring.methods.adapters._shared import number, read_bias, sizes, whole
from shoestring.models.anatomy import norm_offset

METHOD = Method(
    paper=Paper(
        "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
        "2022-10",
        arxiv="2210.08823",
        code="dongzelian/SSF",
    ),
    provides="SsfConfig",
    saves=("parameters", "memory", "storage", "network"),
    combines={"quantizers": "yes"},
    traits={
        "family": "additive",
        "acts_on": "activation",
        "merges": "yes",
        "parameters": "2 out per weight, d per norm",
    },
)
TRAINING = {"learning_rate": 2e-3}
_SHIFTS = ("foldable", "always", "never")
_EPSILON = 1e-8
# Norms whose channels stand second, (batch, channels, ...), wherever the rest of torch's have them last.
_CHANNELS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass
class SsfConfig(_shared.AdapterConfig):
    """SSF, one or a pool of them.

    Args:
        init_std: spread of scale around 1 and shift around 0 at the start; 0 starts at the base model.
        shift: "foldable" gives a shift to the sites that can hold it after merging, "always" to all, "never" to none.
        pool: entries P of the pool; 1 is plain SSF.
        choose: entries K that are mixed for each input.
        key_weight: share of the loss that pulls keys towards queries; 0 leaves the keys where they start.
        query_size: width q of queries and keys; None takes the model's hidden size.
        query_tokens: how many tokens at the start of a prompt make its query.
        classifier: name of a linear layer that is trained whole.
        pool_classifier: give the classifier a pool too; False shares one among all inputs.
        classifier_from_base: start the classifier as it is in the base, not anew.
    """

    TYPE = "ssf"

    init_std: float = field(default=0.02, metadata={"help": "Spread of scale and shift at the start"})
    shift: str = field(default="foldable", metadata={"help": "Which sites get a shift: foldable, always, never"})
    pool: int = field(default=1, metadata={"help": "Entries of the pool"})
    choose: int = field(default=1, metadata={"help": "Entries mixed for each input"})
    key_weight: float = field(default=0.1, metadata={"help": "Share of the loss that pulls keys towards queries"})
    query_size: int | None = field(default=None, metadata={"help": "Width of queries; None: the hidden size"})
    query_tokens: int = field(default=32, metadata={"help": "Tokens of a prompt that make its query"})
    classifier: str | None = field(default=None, metadata={"help": "A linear layer trained whole"})
    pool_classifier: bool = field(default=True, metadata={"help": "Whether the classifier is pooled too"})
    classifier_from_base: bool = field(default=False, metadata={"help": "Start the classifier as the base has it"})

    def __post_init__(self) -> None:
        super().__post_init__()
        number("init_std", self.init_std, 0)
        for name in ("pool", "choose", "query_tokens"):
            whole(name, getattr(self, name))
        if self.query_size is not None:
            whole("query_size", self.query_size)
        if self.shift not in _SHIFTS:
            raise ValueError(f"shift={self.shift!r} is not known; it must be one of {', '.join(_SHIFTS)}")
        if self.choose > self.pool:
            raise ValueError(f"choose={self.choose} of a pool of {self.pool} is not possible; choose at most the pool")
        if self.classifier and self.task_type == "SEQ_CLS":
            raise ValueError("with task_type SEQ_CLS peft itself trains the classifier; leave out one of the two")
        number("key_weight", self.key_weight, 0)
        if self.key_weight >= 1:
            raise ValueError(f"key_weight={self.key_weight} leaves nothing of the task; it must be below 1")


@dataclass
class Choice:
    """The entries that each row of the present batch uses; all sites of one adapter share it.

    Attributes:
        entries: (rows, K), None before anything was asked.
        similarity: (rows, K), of the chosen keys with the queries; carries their gradient.
        kept: stays until it is withdrawn, whatever the model is given.
        used: (P,), how often training chose each entry.
    """

    used: Tensor
    entries: Tensor | None = None
    similarity: Tensor | None = None
    kept: bool = False


class SsfLayer(_shared.LinearLayer):
    """What sites and classifiers share: which entries are chosen."""

    other_param_names = ("choices",)

    def containers(self) -> None:
        self.choices: dict[str, Choice] = {}


class SsfSite(SsfLayer):
    """A frozen layer of any kind that has an output channel axis, with scale (P, c) and shift (P, c) behind it."""

    adapter_layer_names = ("ssf_scale", "ssf_shift")

    def containers(self) -> None:
        super().containers()
        self.ssf_scale, self.ssf_shift = nn.ParameterDict(), nn.ParameterDict()
        base: Any = self.get_base_layer()
        self.is_norm = base.weight.dim() == 1
        convolves = base.weight.dim() > 2 and not _shared.is_packed(base)
        self.axis = 1 if convolves or isinstance(base, _CHANNELS_SECOND) else -1

    def fill(self, adapter_name: str, config: SsfConfig, key: str, **shared: Any) -> None:
        shape = config.pool, self.out_features
        self.choices[adapter_name] = shared["choice"]
        self.ssf_scale[adapter_name] = nn.Parameter(1 + config.init_std * torch.randn(shape))  # eq. 1
        if config.shift == "always" or config.shift == "foldable" and self.can_shift():
            self.ssf_shift[adapter_name] = nn.Parameter(config.init_std * torch.randn(shape))

    def can_shift(self) -> bool:
        """Whether a shift can fold into the base: a norm may have no bias, and its kind no place for one."""
        return not self.is_norm or read_bias(self.get_base_layer()) is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        changed = out
        for name in self.acting:
            changed = changed * self._mixed(self.ssf_scale[name], name, out)  # eq. 1
            if name in self.ssf_shift:
                changed = changed + self._mixed(self.ssf_shift[name], name, out)
        return changed.to(out.dtype)

    def _mixed(self, entries: Tensor, name: str, out: Tensor) -> Tensor:
        """The mix of entries (P, c) for each row of `out`, shaped to broadcast over it."""
        values = mix(entries, self.choices[name])
        if values.dim() == 1:
            return values if self.axis == -1 else values.view(-1, *[1] * (out.dim() - 2))
        if len(values) != len(out):
            raise ValueError(
                f"entries were chosen for {len(values)} inputs, and a site sees {len(out)}; call the whole model, or "
                "choose for these inputs with `asking(queries)`"
            )
        ones = [1] * (out.dim() - 2)
        shape = (*ones, values.shape[1]) if self.axis == -1 else (values.shape[1], *ones)
        return values.view(len(values), *shape)

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = one_mix(self.ssf_scale[adapter_name], self.choices[adapter_name])
        shift = None
        if adapter_name in self.ssf_shift:
            shift = one_mix(self.ssf_shift[adapter_name], self.choices[adapter_name])
        base: Any = self.get_base_layer()
        kind, dtype = type(base).__name__, weight.dtype
        if isinstance(base, nn.Embedding):
            return (weight * scale + (0 if shift is None else shift)).to(dtype), None  # eq. 2
        if shift is not None and not self.can_shift():
            raise ValueError(f'{kind} has no bias to fold a shift into; train with shift="foldable"')
        bias = None if bias is None else bias * scale  # eq. 2
        bias = bias if shift is None else shift if bias is None else bias + shift
        if self.is_norm:
            offset = 0.0 if isinstance(base, _CHANNELS_SECOND) else norm_offset(base)
            return (weight * scale + offset * (scale - 1)).to(dtype), None if bias is None else bias.to(dtype)
        rows = scale.view(-1, *[1] * (weight.dim() - 1))
        return (rows * weight).to(dtype), None if bias is None else bias.to(dtype)


class SsfLinear(SsfSite):
    """A linear layer; peft tells linear layers from others by the class name."""


class SsfHead(SsfLayer):
    """A classifier trained whole: weight (P, C, d) and bias (P, C) in place of the base's."""

    adapter_layer_names = ("ssf_head_weight", "ssf_head_bias")

    def containers(self) -> None:
        super().containers()
        self.ssf_head_weight, self.ssf_head_bias = nn.ParameterDict(), nn.ParameterDict()

    def fill(self, adapter_name: str, config: SsfConfig, key: str, **shared: Any) -> None:
        base, pool = self.get_base_layer(), config.pool if config.pool_classifier else 1
        self.choices[adapter_name] = shared["choice"]
        weight = torch.empty(pool, self.out_features, self.in_features)
        bias = torch.zeros(pool, self.out_features)
        if config.classifier_from_base:
            weight[:] = _shared.read_weight(base).detach().float()
            start = read_bias(base)
            bias += 0 if start is None else start.detach().float()
        else:
            for entry in weight:
                nn.init.kaiming_normal_(entry)
        self.ssf_head_weight[adapter_name], self.ssf_head_bias[adapter_name] = nn.Parameter(weight), nn.Parameter(bias)

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        weight = mix(self.ssf_head_weight[names[-1]], self.choices[names[-1]]).to(x.dtype)
        bias = mix(self.ssf_head_bias[names[-1]], self.choices[names[-1]]).to(x.dtype)
        if weight.dim() == 2:
            return nn.functional.linear(x, weight, bias)
        return torch.einsum("b...d,bcd->b...c", x, weight) + bias.view(len(bias), *[1] * (x.dim() - 2), -1)  # eq. 4

    def changed(self, adapter_name: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        pools = self.ssf_head_weight[adapter_name], self.ssf_head_bias[adapter_name]
        new, start = (one_mix(pool, self.choices[adapter_name]).to(weight.dtype) for pool in pools)
        return new, start


class SsfModel(_shared.Guard):
    """The tuner: it holds the keys of every pool, asks for queries, and chooses before the model runs."""

    prefix = "ssf_"
    tuner_layer_cls = SsfLayer
    target_module_mapping = {}
    uses_shared_state = True
    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "ssf_keys" not in self._modules:
            self.ssf_keys = nn.ParameterDict()
            self.choices: dict[str, Choice] = {}
            self._asking = False
            self._hooks: list[Any] = []
        config: Any = self.peft_config[adapter_name]
        self.choices[adapter_name] = Choice(torch.zeros(config.pool, dtype=torch.long))
        if config.pool > 1:
            width = config.query_size or getattr(getattr(model, "config", None), "hidden_size", None)
            if width is None:
                raise ValueError(f"{type(model).__name__} states no hidden size; set query_size to that of the queries")
            keys = nn.init.trunc_normal_(torch.empty(config.pool, width), std=0.02)
            device = next((p.device for p in model.parameters()), None)
            self.ssf_keys[adapter_name] = nn.Parameter(keys.to(device))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self._hooks:  # a model that could not be adapted keeps none
            self._hooks = [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after, with_kwargs=True),
            ]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = {name for name, _ in _sites(self.model)}
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        head = peft_config.classifier
        if head and (key == head or key.endswith(f".{head}")):
            return True
        return _shared.reaches(peft_config, key)

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
        choice, head = self.choices[adapter_name], peft_config.classifier
        whole_layer = bool(head) and (current_key == head or current_key.endswith(f".{head}"))
        if isinstance(target, SsfHead if whole_layer else SsfSite):
            target.update_layer(adapter_name, peft_config, current_key, choice=choice)  # type: ignore[operator]
            return
        kinds = (nn.Linear, Conv1D) if whole_layer else (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d)
        if whole_layer or not _is_norm(target):
            self._check_target(target, current_key, kinds, "linear layers, norms, embeddings and convolutions")
        made = SsfHead if whole_layer else SsfLinear if isinstance(target, nn.Linear | Conv1D) else SsfSite
        new = made(target, adapter_name, peft_config, current_key, choice=choice)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for name, keys in self.ssf_keys.items():
            # Without the second term of eq. 5 nothing would ever reach them.
            learns = self.peft_config[name].key_weight > 0
            keys.requires_grad_(name in self.active_adapters and not inference_mode and learns)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.ssf_keys:
            del self.ssf_keys[adapter_name]
        self.choices.pop(adapter_name, None)

    # --- choosing ------------------------------------------------------------------------------------------------

    def queries(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the frozen model without adapters makes of each input: (rows, q), without gradient.

        Args:
            kwargs: of the model's forward; `labels` of a causal model mark the prompt, before the first of them.

        Raises:
            ValueError: the model is none of transformers', so only its owner can say what a query is.
        """
        model = self.model
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{type(model).__name__} is no transformers model; give each batch its queries with `asking(queries)`"
            )
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        given = {name: kwargs[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        body: Any = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        layers = [m for m in model.modules() if isinstance(m, SsfLayer)]
        off = [layer._disable_adapters for layer in layers]
        training = [m for m in model.modules() if m.training]
        try:
            for layer in layers:
                layer._disable_adapters = True
            model.eval()
            with torch.no_grad():
                states = body(**given, use_cache=False).last_hidden_state
        finally:
            for layer, was_off in zip(layers, off):
                layer._disable_adapters = was_off
            for module in training:
                module.training = True
        mask, labels = given.get("attention_mask"), kwargs.get("labels")
        asked = torch.ones(states.shape[:2], device=states.device)
        asked = mask.to(asked) if mask is not None and mask.shape == asked.shape else asked
        if labels is not None and labels.shape == asked.shape and model.can_generate():
            prompt = asked * ((labels != -100).cumsum(1) == 0)
            asked = torch.where(prompt.any(1, keepdim=True), prompt, asked)
        most = max(self.peft_config[name].query_tokens for name in self._pooled())
        asked = (asked * (asked.cumsum(1) <= most))[..., None]
        return (states.float() * asked).sum(1) / asked.sum(1).clamp(min=1)

    @contextmanager
    def asking(self, queries: Tensor) -> Iterator[None]:
        """Within the block the entries of `queries` (rows, q) are used, whatever the model is given.

        For queries that were worked out before, for models that are none of transformers', and for `merge_for`.
        """
        chosen = [self.choices[name] for name in self._pooled()]
        self._choose(queries)
        for choice in chosen:
            choice.kept = True
        try:
            yield
        finally:
            for choice in chosen:
                choice.kept = False

    def merge_for(self, queries: Tensor) -> None:
        """Fold the mix of one input's query (1, q) into the weights, until `unmerge_adapter` or `merge_and_unload`."""
        with self.asking(queries):
            self.merge_adapter()

    def usage(self, adapter_name: str = "default") -> Tensor:
        """How often training chose each entry, (P,); warns when fewer than 2K were ever chosen: the keys collapsed."""
        used, config = self.choices[adapter_name].used, self.peft_config[adapter_name]
        found, fewest = int((used > 0).sum()), min(2 * config.choose, config.pool)
        if used.sum() and found < fewest:
            warnings.warn(f"only {found} of {len(used)} entries were ever chosen: the queries are alike", stacklevel=2)
        return used.clone()

    def auxiliary_loss(self) -> Tensor | None:
        """The key term of the last training pass, scaled to be added to the task's loss: eq. 5 / (1 - key_weight)."""
        terms = []
        for name in self._pooled():
            weight, similarity = self.peft_config[name].key_weight, self.choices[name].similarity
            if weight and self.training and similarity is not None and similarity.requires_grad:
                terms.append(weight / (1 - weight) * (1 - similarity.sum(1)).mean())  # eq. 5
        return torch.stack(terms).sum() if terms else None

    def _pooled(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.ssf_keys]

    def _choose(self, queries: Tensor) -> None:
        for name in self._pooled():
            keys, choice = self.ssf_keys[name], self.choices[name]
            if queries.dim() != 2 or queries.shape[1] != keys.shape[1]:
                raise ValueError(f"queries of shape {tuple(queries.shape)} do not fit keys of width {keys.shape[1]}")
            unit = [nn.functional.normalize(v.float(), dim=1, eps=_EPSILON) for v in (queries.to(keys.device), keys)]
            found = (unit[0] @ unit[1].T).topk(self.peft_config[name].choose, dim=1)  # eq. 3
            choice.similarity, choice.entries = found.values, found.indices
            if self.training:
                choice.used += torch.bincount(found.indices.flatten().cpu(), minlength=len(choice.used))

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Choose for this batch, unless entries are kept, adapters are off or folded, or a prompt goes on."""
        names = self._pooled()
        if self._asking or not names or any(self.choices[name].kept for name in names):
            return
        site = next(m for m in model.modules() if isinstance(m, SsfLayer))
        cache = kwargs.get("past_key_values")
        goes_on = cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0
        if site.disable_adapters or site.merged or goes_on:
            return
        self._asking = True
        try:
            self._choose(self.queries(*args, **kwargs))
        finally:
            self._asking = False

    def _after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        extra = self.auxiliary_loss() if kwargs.get("labels") is not None else None
        if extra is not None and getattr(output, "loss", None) is not None:
            output.loss = output.loss + extra.to(output.loss.dtype)

    # --- leaving peft --------------------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        room = self._room_for_biases(kwargs.get("adapter_names")) if merge else None
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # type: ignore[func-returns-value]
        for hook in self._hooks:
            hook.remove()
        if room is not None:
            switches, biased = room
            for switch in switches:
                setattr(model.config, switch, True)
            for name in biased:
                layer = model.get_submodule(name)
                if read_bias(layer) is None:
                    zeros = layer.weight.new_zeros(sizes(layer)[1])
                    layer.bias = nn.Parameter(zeros, requires_grad=False)
        return model

    def _room_for_biases(self, adapter_names: list[str] | None) -> tuple[list[str], set[str]] | None:
        """The switches of the model's configuration under which all layers that get a bias have one, and all layers
        that then have one; None when no layer gets a bias, or the model is none of transformers'.

        Raises:
            ValueError: the family has no place for one of them, so a saved model would lose it.
        """
        model: Any = self.model
        named = {name: m for name, m in model.named_modules() if isinstance(m, SsfSite)}
        gets = {
            name
            for name, site in named.items()
            if (read_bias(site.get_base_layer()) is None or len(site._kept or "both") == 1)
            and not isinstance(site.get_base_layer(), nn.Embedding)
            and any(adapter in site.ssf_shift for adapter in adapter_names or site.active_adapters)
        }
        if not gets or not isinstance(model, PreTrainedModel):
            return None
        switches: list[str] = []
        biased: set[str] = set()
        for switch in [k for k, v in model.config.to_dict().items() if k.endswith("bias") and v is False]:
            twin = copy.deepcopy(model.config)
            setattr(twin, switch, True)
            with torch.device("meta"):
                made = type(model)(twin)
            has = {
                name
                for name, m in made.named_modules()
                if read_bias(m) is not None and isinstance(m, nn.Linear | Conv1D)
            }
            if has & gets:
                switches.append(switch)
                biased |= has
        if gets - biased:
            raise ValueError(
                f"{type(model).__name__} has no place for the bias of {min(gets - biased)}, so a saved model would "
                'lose it; train with shift="never", or keep the adapter beside its base'
            )
        return switches, biased


def mix(entries: Tensor, choice: Choice) -> Tensor:
    """The plain mean of the chosen entries: (P, ...) -> (rows, ...), or (...) where there is only one.

    Raises:
        ValueError: there is a pool, and nothing was chosen.
    """
    if len(entries) == 1:
        return entries[0]
    if choice.entries is None:
        raise ValueError("no entries of the pool were chosen; call the whole model, or use `asking(queries)`")
    return entries[choice.entries].mean(1)  # eq. 4


def one_mix(entries: Tensor, choice: Choice) -> Tensor:
    """The mix that is folded into a weight: of the only entry, or of the one input that is asked for."""
    if len(entries) > 1 and not (choice.kept and choice.entries is not None and len(choice.entries) == 1):
        raise ValueError(
            f"a pool of {len(entries)} entries is mixed anew for every input and has no one weight to merge into; "
            "`merge_for(query)` folds the mix of one input"
        )
    values = mix(entries, choice).detach()
    return values if len(entries) == 1 else values[0]


def register() -> None:
    _shared.join("ssf", SsfConfig, SsfModel)


def example() -> SsfConfig:
    return SsfConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"init_std": 0.0}, {"init_std": 0.0, "target_modules": "all-linear"})


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """Scale and shift of every channel, once an entry of the pool, and the keys; the merged model costs what the base
    does, and its biases."""
    chosen = SsfConfig(**{**settings()[0], **options})
    names = {w.name for w in shape.weights}
    channels = shifts = 0
    for weight in shape.of(*PROJECTIONS, "norm"):
        if weight.role == "norm" and chosen.target_modules == "all-linear":
            continue
        foldable = weight.role != "norm" or weight.name.removesuffix("weight") + "bias" in names
        channels += weight.dims[0]
        shifts += weight.dims[0] * (chosen.shift == "always" or chosen.shift == "foldable" and foldable)
    keys = chosen.pool * (chosen.query_size or shape.hidden) if chosen.pool > 1 and chosen.key_weight else 0
    return Price(shape, trainable=chosen.pool * (channels + shifts) + keys, train_flops=2.0)


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and norms of a model, without its head."""
    heads = [model.get_output_embeddings()] if isinstance(model, PreTrainedModel) else []
    if isinstance(model, PreTrainedModel):
        heads += [m for n, m in model.named_children() if n in ("score", "classifier", "qa_outputs")]
    wrapped = {name for name, module in model.named_modules() if isinstance(module, SsfLayer)}
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, SsfSite) else module
        if not (isinstance(base, nn.Linear | Conv1D) or _is_norm(base)) or name.rpartition(".")[0] in wrapped:
            continue
        if name and all(module is not head for head in heads):
            yield name, module


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not list(module.children())

"""PERK: read a long context by a few gradient steps into a throw-away low-rank adapter whose start is meta-learned.

How it works
    1. Every chosen weight is frozen; beside it stand A (r x in) and B (out x r): h = W x + (alpha / sqrt r) B A x.
       phi is all A and B; phi_0, their start, is what training finds.
    2. Reading (the inner loop). The context is split into segments, a set in any order. N times, phi takes one AdamW
       step along the gradient of
           L(phi) = 1/S sum over segments, tokens of w_t nll_t,   w_t = softplus(MLP(last hidden state)),      (eq. 1)
       with a learned rate for every tensor of phi and every step; nothing of AdamW's state outlives a context.
    3. Training (the outer loop) minimises the loss of the answer to a question, under phi_N and with no context in the
       prompt, over phi_0, the weighting net and the rates.
    4. Truncated unrolling: in the first s of the N steps the inner gradient is a constant, so the step's Jacobian is
       the identity; through the later ones second derivatives flow.                                          (eq. 2)
    5. At work `TestTimeMemory` encodes a context once and answers any number of questions on it; a context takes no
       key-value cache, and reading it one segment at a time takes the memory of one segment.

Where it bends
    The paper's rank of 256 is as large as the matrices of a small model; here 16. A row without a context is trained
    as plain language modelling on phi_0. AdamW's epsilon stands inside the root and is larger than usual, because the
    second derivative of a step at a zero gradient is its inverse. On a packed base, which has no second derivative,
    use first_order=True. A few thousand tokens are still cheaper to read as a prompt: read the claim.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_outputs import CausalLMOutput

from shoestring import data
from shoestring.core.errors import UsageError
from shoestring.core.method import Method, Paper, Price
from shoestring.core.shape import PROJECTIONS, Shape
from shoestring.data.corpus import Corpus, Example
from shoestring.methods.adapters._shared import (
    AdapterConfig,
    LinearLayer,
    LinearTuner,
    compute_dtype,
    is_packed,
    join,
    number,
    whole,
    write_lora,
)

METHOD = Method(
    paper=Paper(
        "PERK: Long-Context Reasoning as Parameter-Efficient Test-Time Learning",
        "2025-07",
        code="eric11eca/perk",
        licence="MIT",
    ),
    provides="PerkConfig",
    saves=("memory",),
    combines={"quantizers": "with first_order=True"},
    traits={
        "family": "reparameterised",
        "acts_on": "weight",
        "merges": "yes",
        "parameters": "r (in + out) per weight + 128 d + 257 + N x tensors",
    },
    expects={
        "check_every_trainable_gets_a_gradient": "rates and weighting net learn from contexts, not from plain text",
        "check_gradient_checkpointing": "rates and weighting net learn from contexts, not from plain text",
    },
)
TRAINING = {"learning_rate": 1e-3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
_WIDTH = 128  # of the weighting net's hidden layer
_BETAS, _EPSILON = (0.9, 0.95), 1e-8


@dataclass
class PerkConfig(AdapterConfig):
    """Settings of the low-rank pairs and of reading.

    Args:
        r, alpha, dropout: rank, scale alpha / sqrt(r), and dropout before A while training.
        init_std: spread of B at the start. At 0 training starts at the base model, and A has no gradient at first.
        inner_steps: N, gradient steps over a context.
        truncate: s, how many of the first steps are constants for the outer gradient.
        first_order: every step is one.
        inner_optimizer: "adamw" or "sgd".
        inner_rate: the rates' start; about 5e-5 to 1e-2 for adamw, 0.1 to 1 for sgd.
        learn_rates, weighting: whether the rates are learned and the tokens weighted.
        segment_tokens: length of a segment; a longer document is split.

    Raises:
        ValueError: a value that is not possible.
    """

    TYPE: ClassVar[str] = "perk"

    r: int = field(default=16, metadata={"help": "Rank"})
    alpha: float = field(default=16.0, metadata={"help": "Scale; the product is times alpha / sqrt(r)"})
    dropout: float = field(default=0.1, metadata={"help": "Dropout before A while training"})
    init_std: float = field(default=0.0, metadata={"help": "Spread of B at the start"})
    inner_steps: int = field(default=4, metadata={"help": "Gradient steps over a context"})
    truncate: int = field(default=2, metadata={"help": "First steps without second derivatives"})
    first_order: bool = field(default=False, metadata={"help": "No second derivatives at all"})
    inner_optimizer: str = field(default="adamw", metadata={"help": "adamw or sgd"})
    inner_rate: float = field(default=5e-5, metadata={"help": "The inner rates' start"})
    learn_rates: bool = field(default=True, metadata={"help": "Learn the inner rates"})
    weighting: bool = field(default=True, metadata={"help": "Weight the context's tokens"})
    segment_tokens: int = field(default=256, metadata={"help": "Length of a segment"})

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("r", self.r)
        whole("inner_steps", self.inner_steps)
        whole("truncate", self.truncate, 0)
        whole("segment_tokens", self.segment_tokens, 8)
        number("dropout", self.dropout, 0, 1)
        number("init_std", self.init_std, 0)
        number("inner_rate", self.inner_rate, 1e-12)
        if self.truncate > self.inner_steps:
            raise ValueError(f"truncate={self.truncate} is more than the {self.inner_steps} inner steps there are")
        if self.inner_optimizer not in ("adamw", "sgd"):
            raise ValueError(f'inner_optimizer={self.inner_optimizer!r} is not known; use "adamw" or "sgd"')

    @property
    def constant_steps(self) -> int:
        return self.inner_steps if self.first_order else self.truncate


class PerkLinear(LinearLayer):
    """A linear layer with a low-rank pair: `perk_A` (r, in) and `perk_B` (out, r) by adapter."""

    adapter_layer_names = ("perk_A", "perk_B")
    other_param_names = ("scaling", "dropout")

    def containers(self) -> None:
        self.perk_A, self.perk_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def fill(self, adapter_name: str, config: PerkConfig, key: str, **shared: Any) -> None:
        dtype = compute_dtype(self.get_base_layer())
        a, b = torch.empty(config.r, self.in_features), torch.empty(self.out_features, config.r)
        nn.init.kaiming_uniform_(a, math.sqrt(5))
        nn.init.normal_(b, std=config.init_std) if config.init_std else nn.init.zeros_(b)
        self.perk_A[adapter_name], self.perk_B[adapter_name] = nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))
        self.scaling[adapter_name], self.dropout[adapter_name] = config.alpha / math.sqrt(config.r), config.dropout

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        return self.scaling[adapter_name] * (self.perk_B[adapter_name] @ self.perk_A[adapter_name])

    def adapted(self, x: Tensor, names: list[str]) -> Tensor:
        y = self.base_layer(x)
        for name in names:
            a, b = self.perk_A[name], self.perk_B[name]
            inner = F.dropout(x, self.dropout[name], self.training).to(a.dtype) @ a.T
            y = y + (self.scaling[name] * (inner @ b.T)).to(y.dtype)
        return y


class Weighting(nn.Module):
    """How much each token of a context counts, (..., d) -> (...); equal at the start, where its last layer is zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, _WIDTH), nn.Linear(_WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.out.weight.dtype)
        return F.softplus(self.out(F.gelu(self.hidden(hidden))), beta=3.0)[..., 0]


class PerkModel(LinearTuner):
    """The tuner: keeps rates and weighting net, and reads the context of rows that have one before their question."""

    prefix = "perk_"
    tuner_layer_cls = PerkLinear
    uses_shared_state = True

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "perk_weighting"):
            self.perk_weighting, self.perk_rates = nn.ModuleDict(), nn.ParameterDict()
            model.register_forward_pre_hook(_refuse_context, with_kwargs=True)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: PerkConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        like = next(iter(self.start(adapter_name).values()))
        rates = torch.full((config.inner_steps, len(self.start(adapter_name))), math.log(config.inner_rate))
        self.perk_rates[adapter_name] = nn.Parameter(rates.to(like.device))
        if config.weighting:
            self.perk_weighting[adapter_name] = Weighting(_width(model)).to(like.device)
        self._train_shared(self.active_adapters)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._train_shared([] if inference_mode else self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for container in (self.perk_rates, self.perk_weighting):
            if adapter_name in container:
                del container[adapter_name]

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft looks for the name at the end of a key; a weighting net's parameters have theirs behind it.
        start, net, own = key.partition(f".perk_weighting.{adapter_name}.")
        return f"{start}.perk_weighting.{own}" if net else super()._remove_adapter_name_from_key(key, adapter_name)

    def _train_shared(self, names: Sequence[str]) -> None:
        for name, rates in self.perk_rates.items():
            config: PerkConfig = self.peft_config[name]  # type: ignore[assignment]
            trains = name in names and not config.inference_mode
            rates.requires_grad_(trains and config.learn_rates)
            if name in self.perk_weighting:
                # In constant steps the weights are constants too.
                self.perk_weighting[name].requires_grad_(trains and config.constant_steps < config.inner_steps)

    def start(self, adapter_name: str) -> dict[str, Tensor]:
        """phi_0 by name in the wrapped model, in the order in which the rates are kept."""
        ends = (f".perk_A.{adapter_name}", f".perk_B.{adapter_name}")
        return {name: p for name, p in self.model.named_parameters() if name.endswith(ends)}

    def forward(self, *args: Any, context: Any = None, **kwargs: Any) -> Any:
        """As the model's own; rows with a `context` are answered under what reading it made of phi.

        Args:
            context: (rows, segments, longest) token ids, -1 where there is none; or one list of segments a row.
        """
        if context is None:
            return self.model(*args, **kwargs)
        return self._answered(context, *args, **kwargs)

    def _answered(
        self,
        context: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        logits = []
        for row, segments in enumerate(context):
            phi = self.read(split_segments(segments), unrolled=torch.is_grad_enabled())
            mask = None if attention_mask is None else attention_mask[row : row + 1]
            logits.append(self.under(phi, input_ids=input_ids[row : row + 1], attention_mask=mask).logits)
        whole_batch = torch.cat(logits)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(_precise(whole_batch[:, :-1].flatten(0, 1)), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=whole_batch)  # type: ignore[arg-type]

    def under(self, phi: Mapping[str, Tensor], **inputs: Any) -> Any:
        """The model's output with phi in place of phi_0; the model itself is not touched."""
        return torch.func.functional_call(self.model, dict(phi), (), inputs)

    def read(
        self, segments: Sequence[Tensor], *, unrolled: bool = False, accumulate: bool = False
    ) -> dict[str, Tensor]:
        """phi_N after the inner loop over the segments.

        Args:
            segments: token ids, (length,) each.
            unrolled: keep the graph, so that the outer loss has a gradient in phi_0, rates and weighting net.
            accumulate: take the gradient of one segment at a time: the same one, in the memory of one.

        Raises:
            ValueError: more than one adapter is active, gradient checkpointing beside second derivatives, no context.
        """
        if len(self.active_adapters) != 1:
            raise ValueError(f"{len(self.active_adapters)} adapters are active; a context is read into exactly one")
        name = self.active_adapters[0]
        config: PerkConfig = self.peft_config[name]  # type: ignore[assignment]
        self._refuse_what_has_no_second_derivative(config, unrolled)
        if not segments or max(len(s) for s in segments) < 2:
            raise ValueError("the context is empty; give at least one segment of two tokens")
        phi: dict[str, Tensor] = dict(self.start(name))
        if not unrolled:
            phi = {key: p.detach().clone() for key, p in phi.items()}
        phi = {key: _precise(p) for key, p in phi.items()}
        rates = self.perk_rates[name].exp()
        first, second = ([torch.zeros_like(p) for p in phi.values()] for _ in range(2))
        for step in range(config.inner_steps):
            kept = unrolled and step >= config.constant_steps  # eq. 2
            gradients = self._gradients(phi, segments, name, kept, accumulate)
            with torch.set_grad_enabled(unrolled):
                moves, first, second = _moves(gradients, first, second, step, config.inner_optimizer)
                phi = {key: p - rates[step, i] * moves[i] for i, (key, p) in enumerate(phi.items())}
        return phi if unrolled else {key: p.detach() for key, p in phi.items()}

    def _gradients(
        self, phi: Mapping[str, Tensor], segments: Sequence[Tensor], name: str, kept: bool, accumulate: bool
    ) -> list[Tensor]:
        """Gradients of the context's loss in phi: with their own graph where `kept`, else constants."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            if kept:
                return list(torch.autograd.grad(self._loss(phi, segments, name), list(phi.values()), create_graph=True))
            leaves = {key: p.detach().requires_grad_() for key, p in phi.items()}
            sums = [torch.zeros_like(p) for p in leaves.values()]
            for part in [[s] for s in segments] if accumulate else [segments]:
                loss = self._loss(leaves, part, name) * (len(part) / len(segments))
                for total, gradient in zip(sums, torch.autograd.grad(loss, list(leaves.values()))):
                    total += gradient
            return sums

    def _loss(self, phi: Mapping[str, Tensor], segments: Sequence[Tensor], name: str) -> Tensor:
        device = next(iter(phi.values())).device
        longest = max(len(s) for s in segments)
        ids = torch.zeros(len(segments), longest, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, segment in enumerate(segments):
            ids[row, : len(segment)] = segment.to(device)
            mask[row, : len(segment)] = 1
        output = self.under(phi, input_ids=ids, attention_mask=mask, output_hidden_states=name in self.perk_weighting)
        nll = F.cross_entropy(_precise(output.logits[:, :-1].transpose(1, 2)), ids[:, 1:], reduction="none")
        if name in self.perk_weighting:
            nll = nll * self.perk_weighting[name](output.hidden_states[-1][:, :-1])
        return (nll * mask[:, 1:]).sum() / len(segments)  # eq. 1

    def _refuse_what_has_no_second_derivative(self, config: PerkConfig, unrolled: bool) -> None:
        if not unrolled or config.constant_steps == config.inner_steps:
            return
        remedy = "set first_order=True, or leave it out"
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise ValueError(f"gradient checkpointing keeps no graph for second derivatives; {remedy}")
        if any(is_packed(m.base_layer) for m in self.model.modules() if isinstance(m, PerkLinear)):
            raise ValueError(f"a base of packed integers has no second derivatives; {remedy}")


def _width(model: Any) -> int:
    """The width of the hidden states that the weighting net reads."""
    try:
        return int(model.get_input_embeddings().embedding_dim)
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"{type(model).__name__} has no table of tokens, so the weighting net would have nothing to read; use "
            "weighting=False, or a language model"
        ) from None


def _refuse_context(model: nn.Module, args: Any, kwargs: Any) -> None:
    # peft calls the inner model past its tuner when it was not told the task, and many models ignore what is strange.
    if "context" in kwargs:
        raise ValueError('a context reaches the model unread; make the adapter with task_type="CAUSAL_LM"')


def _precise(values: Tensor) -> Tensor:
    """In float32 at least: steps of 5e-5 and sums of losses are lost in bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _moves(
    gradients: list[Tensor], first: list[Tensor], second: list[Tensor], step: int, optimizer: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The inner optimizer's directions, and its next state; differentiable."""
    if optimizer == "sgd":
        return gradients, first, second
    b1, b2 = _BETAS
    first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients)]
    second = [b2 * v + (1 - b2) * g * g for v, g in zip(second, gradients)]
    c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    return [m / c1 / (v / c2 + _EPSILON).sqrt() for m, v in zip(first, second)], first, second


def split_segments(segments: Any) -> list[Tensor]:
    """Segments (length,) of one row's context: padding (-1) is taken off, empty segments are left out."""
    found = [torch.as_tensor(s) for s in segments]
    return [s[s >= 0] for s in found if (s >= 0).any()]


class TestTimeMemory:
    """Contexts read into phi, questions answered without them. Every memory has a phi of its own.

    Args:
        model: a `PeftModel` with one active adapter of this method.
        tokenizer: the model's.

    Example:
        memory = TestTimeMemory(model, tokenizer).encode([chapter_one, chapter_two])
        memory.answer("Who opened the door?")
    """

    __test__ = False  # pytest takes the name for a test's

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.tuner: PerkModel = model.base_model
        self.config: PerkConfig = self.tuner.peft_config[self.tuner.active_adapters[0]]  # type: ignore[assignment]
        self.phi: dict[str, Tensor] | None = None
        self.segments = 0

    def encode(self, context: str | Sequence[str], *, accumulate: bool = True) -> TestTimeMemory:
        """A memory that has read `context`: one text, or documents in any order.

        Raises:
            UsageError: nothing to read.
        """
        documents = [context] if isinstance(context, str) else list(context)
        segments = segment(documents, self.tokenizer, self.config.segment_tokens)
        if not segments:
            raise UsageError("the context is empty", remedy="Give a text, or a list of documents")
        made = TestTimeMemory(self.model, self.tokenizer)
        self.model.eval()
        made.phi = self.tuner.read([torch.tensor(s) for s in segments], accumulate=accumulate)
        made.segments = len(documents)
        return made

    def answer(self, question: str, *, max_new_tokens: int = 64) -> str:
        """Greedy answer to a question under what was read, the question alone in the prompt."""
        asked = Example([{"role": "user", "content": _asked(question, self.segments)}])
        ids = self.tokenizer.apply_chat_template(
            asked.messages, chat_template=data.chat_template(self.tokenizer), add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )["input_ids"].to(self.model.device)  # fmt: skip
        ends, out, cache = {self.tokenizer.eos_token_id}, [], None
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                output = self._output(ids, cache)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                if int(ids) in ends:
                    break
                out.append(int(ids))
        return self.tokenizer.decode(out, skip_special_tokens=True)

    def _output(self, ids: Tensor, cache: Any) -> Any:
        inputs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        return self.tuner.model(**inputs) if self.phi is None else self.tuner.under(self.phi, **inputs)

    def forget(self) -> None:
        """Drop what was read: answers come from phi_0 again, which reading never touched."""
        self.phi, self.segments = None, 0

    def save(self, folder: str | Path) -> None:
        """What was read, as a plain LoRA folder of peft's."""
        phi = self.tuner.start(self.tuner.active_adapters[0]) if self.phi is None else self.phi
        tensors = {f"base_model.model.{name.rpartition('.')[0]}": p.detach() for name, p in phi.items()}
        _write_lora(self.config.to_dict(), tensors, Path(folder))


def segment(documents: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Token ids of "doc_j: text", each document split into pieces of at most `length` tokens, each with its heading."""
    segments = []
    for position, document in enumerate(documents, 1):
        heading = tokenizer(f"doc_{position}: ", add_special_tokens=False).input_ids
        text = tokenizer(document.strip(), add_special_tokens=False).input_ids
        room = max(1, length - len(heading))
        segments += [heading + text[start : start + room] for start in range(0, len(text), room)]
    return segments


def encode(
    corpus: Corpus, tokenizer: Any, max_length: int, *, options: Mapping[str, Any], on_long: str
) -> data.Encoded:
    """Rows of question and answer, each with its `context` apart, as segments of token ids.

    The question is the shorter one of the first and the last paragraph of what the user says last; the context is the
    rest of it and all that was said before, a document for each message and paragraph group.

    Raises:
        UsageError: an example that has no context beside its question, or is no conversation.
    """
    config = PerkConfig(**{k: v for k, v in {**settings()[0], **options}.items() if k != "task_type"})
    rows: list[dict[str, Any]] = []
    sums: list[data.Encoded] = []
    for example in corpus.examples:
        documents, question, answer = _parts(corpus, example)
        turn = [{"role": "user", "content": _asked(question, len(documents))}, {"role": "assistant", "content": answer}]
        asked = corpus.part([Example(turn, group=example.group, line=example.line)])
        try:
            made = data.encode(asked, tokenizer, max_length, on_long=on_long)
        except UsageError:
            if on_long != "drop":
                raise
            continue
        sums.append(made)
        rows += [{**row, "context": segment(documents, tokenizer, config.segment_tokens)} for row in made.rows]
    if not rows:
        raise UsageError(f"{corpus.source or 'the data'} has nothing to train on", remedy="Raise max_length")
    return data.Encoded(
        rows,
        sum(len(row["input_ids"]) for row in rows),
        sum(made.trained_tokens for made in sums),
        sum(made.truncated for made in sums),
        len(corpus) - len(rows),
        sums[0].template,
    )


def _parts(corpus: Corpus, example: Example) -> tuple[list[str], str, str]:
    said = [m["content"] for m in example.messages if m["role"] == "user"]
    if not said or not example.learned():
        raise UsageError(
            f"{corpus.where(example)} is no conversation", remedy="This method learns from questions and answers"
        )
    last = example.learned()[-1]
    before = [m["content"] for m in example.messages[:last]]
    pieces = [piece.strip() for piece in re.split(r"\n\s*\n", before[-1]) if piece.strip()]
    question = min((pieces[0], pieces[-1]), key=len)
    rest = list(pieces)
    rest.remove(question)
    documents = [*(text for text in before[:-1] if text.strip()), *(["\n\n".join(rest)] if rest else [])]
    if not documents:
        raise UsageError(
            f"{corpus.where(example)} has no context beside its question",
            "the context is what comes before, or a paragraph apart from the question",
            "Put the text to be read into the message, an empty line, then the question",
        )
    return documents, question, example.messages[last]["content"]


def _asked(question: str, documents: int) -> str:
    return f"You have memorised {documents} document{'s' if documents != 1 else ''}.\n\n{question}\n\nAnswer:"


def as_lora(folder: Path, out: Path) -> None:
    """Write phi_0 of the adapter in `folder` as a plain LoRA folder."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _write_lora(config, load_file(folder / "adapter_model.safetensors"), out)


def _write_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], out: Path) -> None:
    halves: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer, _, half = name.removeprefix("base_model.model.").rpartition(".perk_")
        if half in ("A", "B") and layer:
            halves.setdefault(layer, {})[half] = value.cpu()
        elif not name.startswith("base_model.perk_"):
            beside[name] = value
    pairs = {layer: (found["A"], found["B"]) for layer, found in halves.items()}
    # The product's scale here is alpha / sqrt r, there alpha / r.
    alpha = config["alpha"] * math.sqrt(config["r"])
    write_lora(out, {**config, "dropout": 0.0}, pairs, dict.fromkeys(pairs, alpha), beside)


def register() -> None:
    join("perk", PerkConfig, PerkModel)


def example() -> PerkConfig:
    return PerkConfig(**settings()[0])


def settings() -> tuple[dict[str, Any], ...]:
    """The configurations worth trying, most parameters first."""
    return ({"r": 16, "dropout": 0.0, "target_modules": "all-linear"},)


def price(shape: Shape, options: Mapping[str, Any]) -> Price:
    """r (in + out) a weight, the weighting net, and a rate for each tensor and inner step."""
    config = PerkConfig(**{**settings()[0], **options})
    weights = [w for w in shape.of(*PROJECTIONS) if len(w.dims) == 2]
    trained = sum(config.r * sum(w.dims) for w in weights)
    trained += config.inner_steps * 2 * len(weights) if config.learn_rates else 0
    if config.weighting and config.constant_steps < config.inner_steps:
        trained += _WIDTH * shape.hidden + 2 * _WIDTH + 1
    # One pass forward and back for each inner step, twice that where its gradient is differentiated again.
    unrolled = config.inner_steps - config.constant_steps
    return Price(shape, trainable=trained, train_flops=2.0 * (1 + config.inner_steps + 2 * unrolled))

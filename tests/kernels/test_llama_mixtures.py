"""Mixtures of experts: numpy's products expert by expert, the same bits in any batch, and what cannot be is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from llamas import Chain, array, batch, dirty_cache, expected, family, feed, native, needs_library, pack, pages

from shoestring.core.errors import UsageError
from shoestring.kernels import formats, matrix
from shoestring.kernels.llama import Expert, Latent, Llama, Mixture, _SkExpert

pytestmark = needs_library

HIDDEN = 64
FORMATS = (
    "fp32", "bf16", "int8/32", "int4/32", "uniform2/32", "uniform3/32", "uniform4/32", "uniform5/32", "uniform6/32",
    "ternary/32", "tritplanes/32", "binary2/32", "binary3o/32", "binary4o/32", "sparse/0", "exponents/0",
    "dictionary/0",
)  # fmt: skip
RANDOM = np.random.default_rng(0)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 64, count)]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return torch.from_numpy((1.5 * drawn * shape[-1] ** -0.5).astype(np.float32))


def stored(weight: torch.Tensor, spec: str) -> tuple[matrix.Matrix, np.ndarray]:
    """A matrix of a format, and the numbers that it stands for."""
    rows, cols = weight.shape
    if spec in ("fp32", "bf16"):
        made = pack(weight, spec)
    else:
        name, _, number = spec.partition("/")
        format = formats.parse(spec)
        if name in ("ternary", "tritplanes"):
            parts = trits(weight, format, name)
        else:
            parts = format.pack(weight.bfloat16() if name in ("sparse", "exponents") else weight)
        if number == "0":
            format = formats.parse(f"{name}/{parts['weight'].numel()}")
        # Numbers of 16 bits have no type of their own in numpy.
        arrays = {n: (t.view(torch.int16) if t.element_size() == 2 else t).numpy() for n, t in parts.items()}
        made = format.layout.matrix(arrays, rows, cols)
    return made, made.rows_of(np.arange(rows))


def trits(weight: torch.Tensor, format: Any, name: str) -> dict[str, torch.Tensor]:
    """Signs of the larger numbers, and beside them of the smaller ones where there are two planes."""
    groups = -(-weight.shape[1] // format.layout.group)
    size = weight.abs().mean()
    first = (weight / size).round().clamp(-1, 1).long()
    if name == "ternary":
        return format.encode(first, torch.full((len(weight), groups), float(size)))
    scales = torch.tensor([float(size), float(size) / 2]).expand(len(weight), groups, 2).contiguous()
    return format.encode(first, weight.sign().long(), scales.half())


class Part:
    """A mixture in the kernels' form, and in numpy's."""

    def __init__(
        self,
        choices: int,
        chosen: int,
        width: int,
        spec: str = "fp32",
        *,
        fused: bool = False,
        shared: int = 0,
        weighed: bool = False,
        spaces: int = 0,
        size: int = 0,
        joint: bool = False,
        **how: Any,
    ) -> None:
        """With `spaces`, so many latent spaces of `size` dimensions; `joint` ones have a down of their own."""
        count = max(how.get("targets", ()), default=choices - 1) + 1
        self.router, self.router_values = stored(values(choices, HIDDEN, seed=1), "fp32")
        self.weigher: matrix.Matrix | None = None
        if weighed:
            self.weigher, self.weigher_values = stored(values(1, HIDDEN, seed=2), "fp32")
        self.experts: list[Expert] = []
        self.numbers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.latents = [self._latent(size, spec, number, joint) for number in range(spaces)]
        for number in range(count):
            if spaces:
                self._add_latent(width, spec, number, self.latents[number * spaces // count][0])
            else:
                self._add(width, spec, number, fused)
        if shared:
            self._add(shared, spec, count, False)
        self.mixture = Mixture(
            self.router, tuple(self.experts[:count]), chosen, shared=self.experts[count] if shared else None,
            weigher=self.weigher, latents=tuple(latent for latent, _ in self.latents), **how,
        )  # fmt: skip

    @staticmethod
    def _latent(size: int, spec: str, seed: int, joint: bool) -> tuple[Latent, list[np.ndarray]]:
        made = [stored(values(size, HIDDEN, seed=1000 * half + seed), spec) for half in (1, 2)]
        made += [stored(values(HIDDEN, size, seed=3000 + seed), spec)] * joint
        return Latent(*(each for each, _ in made)), [numbers for _, numbers in made]

    def _add_latent(self, width: int, spec: str, seed: int, latent: Latent) -> None:
        halves = [stored(values(width, latent.width, seed=1000 * half + seed), spec) for half in (1, 2)]
        down = stored(values(latent.width if latent.down else HIDDEN, width, seed=seed), spec)
        self.experts.append(Expert(halves[0][0], halves[1][0], down[0]))
        self.numbers.append((halves[0][1], halves[1][1], down[1]))

    def _add(self, width: int, spec: str, seed: int, fused: bool) -> None:
        both, numbers = stored(values(2 * width, HIDDEN, seed=seed), spec)
        down, down_numbers = stored(values(HIDDEN, width, seed=seed), spec)
        if not fused:
            halves = [stored(values(2 * width, HIDDEN, seed=seed)[part], spec) for part in self._halves(width)]
            numbers = np.concatenate([half[1] for half in halves])
        self.experts.append(Expert(both, None, down) if fused else Expert(halves[0][0], halves[1][0], down))
        self.numbers.append((numbers[:width], numbers[width:], down_numbers))

    @staticmethod
    def _halves(width: int) -> tuple[slice, slice]:
        return slice(0, width), slice(width, 2 * width)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What it makes of normed tokens [tokens, hidden], one token and one choice after another."""
        what, out = self.mixture, np.zeros_like(x)
        for token, row in enumerate(x):
            logits = row @ self.router_values.T
            scores = 1 / (1 + np.exp(-logits))
            if what.scores == "softmax":
                scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            ranked = scores if what.correction is None else scores + what.correction
            best = np.argsort(-ranked, kind="stable")[: what.chosen]
            gates = scores[best] / (scores[best].sum() if what.normalized else 1) * what.scale
            for choice, gate in zip(best, gates):
                out[token] += gate * self._feed(what.targets[choice] if what.targets else choice, row)
            if what.shared:
                weight = 1 if self.weigher is None else 1 / (1 + np.exp(-(row @ self.weigher_values[0])))
                out[token] += weight * self._feed(len(what.experts), row)
        return out

    def _feed(self, number: int, row: np.ndarray) -> np.ndarray:
        gate, up, down = self.numbers[number]
        if self.latents and number < len(self.mixture.experts):
            shared = self.latents[number * len(self.latents) // len(self.mixture.experts)][1]
            gate, up = gate @ shared[0], up @ shared[1]
            down = shared[2] @ down if len(shared) == 3 else down
        inner = row @ gate.T
        return (inner / (1 + np.exp(-inner)) * (row @ up.T)) @ down.T


KINDS: dict[str, Callable[[], Part]] = {
    "softmax": lambda: Part(4, 2, 48),
    "normalized": lambda: Part(5, 3, 33, normalized=True),
    "one of one": lambda: Part(1, 1, 17),
    "all": lambda: Part(3, 3, 16, normalized=True),
    "sigmoid": lambda: Part(6, 2, 48, scores="sigmoid", normalized=True, scale=1.7,
                            correction=np.linspace(-0.3, 0.3, 6).astype(np.float32)),
    "many": lambda: Part(70, 8, 24),
    "shared": lambda: Part(4, 2, 24, shared=80),
    "weighed": lambda: Part(4, 2, 48, shared=33, weighed=True),
    "fused": lambda: Part(4, 2, 35, fused=True),
    "targets": lambda: Part(5, 3, 24, targets=(0, 1, 0, 2, 0), normalized=True),
    "one space": lambda: Part(6, 3, 40, spaces=1, size=24),
    "spaces": lambda: Part(6, 3, 33, spaces=2, size=17, normalized=True),
    "space of each": lambda: Part(5, 2, 24, spaces=5, size=33, shared=20),
    "joint space": lambda: Part(6, 3, 40, spaces=1, size=24, joint=True, shared=33, weighed=True),
    "joint spaces": lambda: Part(12, 5, 33, spaces=4, size=50, joint=True, normalized=True),
    "spaces of many": lambda: Part(70, 8, 24, spaces=35, size=64, joint=True, shared=16),
    "spaces of targets": lambda: Part(6, 4, 24, spaces=2, size=40, joint=True, targets=(0, 1, 0, 2, 0, 3)),
}  # fmt: skip


def mixed(part: Part, *, layer: int | None = None, name: str = "llama", **changes: Any) -> Llama:
    """A model with a mixture in every layer, or in one alone."""
    model = native(family(name), **changes)
    gone: dict[str, Any] = dict.fromkeys(("gate", "up", "down"))
    blocks = tuple(
        replace(block, **gone, mixture=part.mixture) if layer in (None, number) else block
        for number, block in enumerate(model.blocks)
    )
    return replace(model, blocks=blocks)


def after(model: Llama, ids: list[int], part: Part) -> tuple[np.ndarray, np.ndarray]:
    """What a layer with a mixture adds to the stream, and what it should."""
    cut = replace(model, blocks=model.blocks[:1])
    cache = dirty_cache(cut, 20, "fp32")
    given = batch([(Chain(pages(len(ids))), ids)])
    found = cut.run(cache, given)
    silent = replace(
        cut, blocks=(replace(cut.blocks[0], mixture=replace(part.mixture, scale=0.0, shared=None, weigher=None)),)
    )
    before = silent.run(dirty_cache(cut, 20, "fp32"), given)
    block = cut.blocks[0]
    normed = before / np.sqrt(np.square(before).mean(-1, keepdims=True) + cut.epsilon) * block.mlp_norm
    return found - before, part(normed) * cut.residual_scale


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("count", [1, 7, 60])
def test_it_is_what_its_experts_say(name: str, count: int, isa: str) -> None:
    part = KINDS[name]()
    found, wanted = after(mixed(part), tokens(count), part)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


def test_the_residual_scale_is_heeded() -> None:
    part = KINDS["weighed"]()
    found, wanted = after(mixed(part, residual_scale=0.3), tokens(9), part)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format(spec: str, isa: str) -> None:
    part = Part(5, 2, 80, spec, shared=48)
    found, wanted = after(mixed(part), tokens(40), part)
    error = np.sqrt(np.square(found - wanted).mean()) / wanted.std()
    # Formats of integers and signs round activations to eight bits, those of bfloat16 numbers to eight digits.
    assert error < (1e-5 if spec in ("fp32", "dictionary/0") else 0.02), error


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_of_latent_spaces(spec: str, joint: bool, isa: str) -> None:
    part = Part(6, 2, 80, spec, spaces=2, size=48, joint=joint, shared=48)
    found, wanted = after(mixed(part), tokens(40), part)
    error = np.sqrt(np.square(found - wanted).mean()) / wanted.std()
    # Activations are rounded on the way into a space and on the way out too.
    assert error < (1e-5 if spec in ("fp32", "dictionary/0") else 0.03), error


@pytest.mark.parametrize("spec", ["fp32", "bf16", "int4/32", "sparse/0", "dictionary/0"])
def test_gate_and_up_in_one_matrix_have_the_same_bits(spec: str) -> None:
    apart, fused = (mixed(Part(4, 2, 48, spec, fused=fused)) for fused in (False, True))
    found, wanted = (feed(model, dirty_cache(model, 4), Chain(pages(30)), tokens(30)) for model in (fused, apart))
    np.testing.assert_array_equal(found, wanted)


SPACES: dict[str, dict[str, Any]] = {
    "none": {}, "spaces": {"spaces": 3, "size": 33}, "joint": {"spaces": 3, "size": 40, "joint": True},
}  # fmt: skip


@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("spec", FORMATS)
def test_chunks_batches_and_threads_do_not_change_a_bit(spec: str, spaces: str, isa: str) -> None:
    model = mixed(Part(9, 3, 40, spec, shared=24, weighed=True, **SPACES[spaces]))
    lengths = [1, 270, 9, 40]
    alone = []
    for n in lengths:
        cache = dirty_cache(model, 20, "fp32")
        alone.append(feed(model, cache, Chain(pages(n)), tokens(n, n)))
    for threads in (1, 2, 3):
        cache, first, chains = dirty_cache(model, 40, "fp32"), 0, []
        for n in lengths:
            chains.append(Chain(pages(n, first)))
            first += len(chains[-1].table)
        made = batch([(chain, tokens(n, n)) for chain, n in zip(chains, lengths)])
        together = model.logits(model.run(cache, made, threads=threads), np.arange(len(made.ids)), threads)
        np.testing.assert_array_equal(together, np.concatenate(alone))
        cache, chain = dirty_cache(model, 20, "fp32"), Chain(pages(270))
        ids = tokens(270, 270)
        steps = [1, 1, 2, 5, 8, 9, 30, 100, 114]
        parts, at = [], 0
        for size in steps:
            parts.append(feed(model, cache, chain, ids[at : at + size], threads=threads))
            at += size
        np.testing.assert_array_equal(np.concatenate(parts), alone[1])


def test_dense_layers_may_stand_between(isa: str) -> None:
    model = family("llama")
    part = Part(4, 2, 48)
    made = mixed(part, layer=1)
    assert [block.mixture is not None for block in made.blocks] == [False, True, False]
    whole = feed(made, dirty_cache(made, 4), Chain(pages(20)), tokens(20))
    # The experts of a mixture in which all are one are that one.
    dense = native(model)
    block = dense.blocks[1]
    assert block.gate and block.up and block.down
    alike = Mixture(part.router, (Expert(block.gate, block.up, block.down),) * 4, 2, normalized=True)
    gone: dict[str, Any] = dict.fromkeys(("gate", "up", "down"))
    same = replace(dense, blocks=(dense.blocks[0], replace(block, **gone, mixture=alike), dense.blocks[2]))
    found = feed(same, dirty_cache(same, 4), Chain(pages(20)), tokens(20))
    np.testing.assert_allclose(found, expected(model, tokens(20)), rtol=0, atol=2e-2)
    assert np.abs(found - whole).max() > 0.1


def test_of_equal_scores_the_first_are_chosen() -> None:
    part = Part(6, 2, 24)
    flat = matrix.make("fp32", 6, HIDDEN, np.zeros((6, HIDDEN), np.float32))
    part.mixture, part.router_values = replace(part.mixture, router=flat), np.zeros((6, HIDDEN), np.float32)
    found, wanted = after(mixed(part), tokens(5), part)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("spaces", SPACES)
def test_products_that_are_no_numbers_stay_in_their_token(spaces: str) -> None:
    model = mixed(Part(6, 3, 24, shared=16, weighed=True, **SPACES[spaces]))
    ids = tokens(12)
    ids[5] = 2
    rows = model.embedding.rows_of(np.arange(model.vocab))
    rows[2] = np.nan
    broken = replace(model, embedding=matrix.make("fp32", len(rows), HIDDEN, rows))
    chains = [Chain([page]) for page in range(12)]
    made = batch([(chain, [token]) for chain, token in zip(chains, ids)])
    found = broken.run(dirty_cache(model, 12), made, threads=2)
    wanted = model.run(dirty_cache(model, 12), made)
    sound = np.arange(12) != 5
    np.testing.assert_array_equal(found[sound], wanted[sound])
    assert np.isnan(found[5]).all()


def test_queries_and_keys_may_be_normed_as_a_whole(isa: str) -> None:
    model = native(family("llama"))
    norms = [array(1 + 0.3 * values(width)) for width in (64, 32)]
    blocks = tuple(replace(block, q_norm=norms[0], k_norm=norms[1]) for block in model.blocks)
    whole = replace(model, blocks=blocks)
    ids = tokens(30)
    prefill = feed(whole, dirty_cache(whole, 4), Chain(pages(30)), ids)
    cache, chain = dirty_cache(whole, 4), Chain(pages(30))
    steps = np.concatenate([feed(whole, cache, chain, [token], threads=2) for token in ids])
    np.testing.assert_array_equal(steps, prefill)
    # Equal numbers in a norm of each head and in one of all heads differ, unless the heads are equally large.
    heads = tuple(replace(b, q_norm=np.ones(16, np.float32), k_norm=np.ones(16, np.float32)) for b in model.blocks)
    each = replace(model, blocks=heads)
    assert np.abs(feed(each, dirty_cache(each, 4), Chain(pages(30)), ids) - prefill).max() > 0.1


WRONG: dict[str, tuple[Callable[[Mixture], Mixture], str]] = {
    "router": (lambda m: replace(m, router=pack(values(4, 48), "fp32")), "router is 4 x 48"),
    "choices": (lambda m: replace(m, router=pack(values(3, HIDDEN), "fp32")), "3 choices"),
    "targets": (lambda m: replace(m, targets=(0, 1, 2, 4)), "4 choices"),
    "below": (lambda m: replace(m, targets=(0, 1, 2, -1)), "4 choices"),
    "more than there are": (lambda m: replace(m, chosen=5), "5 experts of 4"),
    "none": (lambda m: replace(m, chosen=0), "0 experts of 4"),
    "no experts": (lambda m: replace(m, experts=()), "0 experts"),
    "scores": (lambda m: replace(m, scores="hard"), "no scores hard"),
    "expert": (lambda m: replace(m, experts=(*m.experts[:3], replace(m.experts[3], down=m.router))), "Expert 3"),
    "shared": (lambda m: replace(m, shared=replace(m.experts[0], up=pack(values(48, 48), "fp32"))), "shared expert"),
    "weigher": (lambda m: replace(m, weigher=m.router), "weigher is 4 x 64"),
    "nobody to weigh": (lambda m: replace(m, weigher=pack(values(1, HIDDEN), "fp32")), "no shared"),
    "correction": (lambda m: replace(m, correction=np.zeros(3, np.float32)), "correction"),
    "half a tile": (lambda m: replace(m, experts=(Part(1, 1, 40, "int8/32", fused=True).experts[0],) * 4), "Expert 0"),
}  # fmt: skip


WRONG_SPACES: dict[str, tuple[Callable[[Mixture], Mixture], str]] = {
    "too many": (lambda m: replace(m, latents=m.latents * 2), "6 experts cannot share 4"),
    "one down": (lambda m: replace(m, latents=(m.latents[0], replace(m.latents[1], down=None))), "6 experts cannot"),
    "another width": (lambda m: replace(m, latents=(m.latents[0], replace(m.latents[1], up=m.router))), "space 1"),
    "wider than the stream": (lambda m: replace(m, latents=(Part._latent(65, "fp32", 0, True)[0],)), "space 0"),
    "another down": (lambda m: replace(m, latents=(replace(m.latents[0], down=m.latents[0].up),) * 2), "space 0"),
    "no down": (lambda m: replace(m, latents=tuple(replace(s, down=None) for s in m.latents)), "Expert 0"),
    "of the stream": (lambda m: replace(m, experts=Part(6, 2, 24).mixture.experts), "Expert 0"),
    "in one matrix": (lambda m: replace(m, experts=(*m.experts[:5], replace(m.experts[5], up=None))), "Expert 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SPACES)
def test_spaces_that_do_not_belong_together_are_named(name: str) -> None:
    change, said = WRONG_SPACES[name]
    part = Part(6, 2, 24, spaces=2, size=40, joint=True)
    mixed(part)
    part.mixture = change(part.mixture)
    with pytest.raises(UsageError, match=said):
        mixed(part)


def test_bytes_of_a_space_count_once_a_token() -> None:
    part = Part(6, 3, 24, spaces=2, size=24, joint=True)
    expert, latent = part.experts[0].size, part.latents[0][0].size
    assert part.mixture.size == part.router.size + 3 * expert + 2 * latent
    assert replace(part.mixture, chosen=1).size == part.router.size + expert + latent


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_together_is_named(name: str) -> None:
    change, said = WRONG[name]
    part = Part(4, 2, 48)
    part.mixture = change(part.mixture)
    with pytest.raises(UsageError, match=said):
        mixed(part)


@pytest.mark.parametrize(
    ("field", "lie"),
    [("chosen", 0), ("chosen", 5), ("count", 0), ("count", 5), ("choices", 3), ("choices", 1 << 40), ("scores", 2),
     ("experts", None), ("targets", None)],
)  # fmt: skip
def test_the_kernels_trust_no_caller(field: str, lie: Any) -> None:
    model = mixed(Part(4, 2, 48))
    setattr(structs(model)[1], field, lie)
    refused(model)


@pytest.mark.parametrize("lie", [0, 3, 5, 8, -2, 1 << 40])
def test_the_kernels_trust_no_caller_with_spaces(lie: int) -> None:
    model = mixed(Part(4, 2, 48, spaces=2, size=32, joint=True))
    structs(model)[1].latent_count = lie
    refused(model)


@pytest.mark.parametrize(
    ("matrix", "field", "lie"),
    [("gate", "rows", 65), ("gate", "rows", 0), ("up", "rows", 33), ("up", "data", None), ("down", "rows", 0),
     ("down", "cols", 31), ("gate", "format", 99), ("gate", "cols", 48)],
)  # fmt: skip
def test_the_kernels_trust_no_space(matrix: str, field: str, lie: Any) -> None:
    model = mixed(Part(4, 2, 48, spaces=2, size=32, joint=True))
    space = _SkExpert.from_address(structs(model)[1].latents + ctypes.sizeof(_SkExpert))
    setattr(getattr(space, matrix), field, lie)
    refused(model)


def structs(model: Llama) -> list[Any]:
    """What the kernels are told of a model's mixtures."""
    assert model._struct
    return [kept for kept in model._kept if type(kept).__name__ == "_SkMixture"]


def refused(model: Llama) -> None:
    cache = dirty_cache(model, 2)
    before = cache.data.copy()
    with pytest.raises(UsageError, match="index lies outside"):
        model.run(cache, batch([(Chain([0]), tokens(5))]))
    np.testing.assert_array_equal(cache.data, before)


def test_a_layer_with_experts_takes_no_addition_to_a_feed_forward() -> None:
    model = mixed(Part(4, 2, 48))
    parts = {(0, "up"): (np.ones((2, HIDDEN), np.float32), np.ones((96, 2), np.float32))}
    with pytest.raises(UsageError, match="has experts there"):
        model.adapter(parts)
    parts = {(0, "q"): (np.ones((2, HIDDEN), np.float32), np.ones((64, 2), np.float32))}
    added = model.adapter(parts)
    ids = tokens(9)
    made = batch([(Chain([0]), ids)], adapters=[0] * 9)
    assert np.abs(model.run(dirty_cache(model, 1), made, adapters=[added])).max() > 0


def test_bytes_of_a_token_are_those_of_the_experts_that_it_meets() -> None:
    part = Part(8, 2, 48, shared=32)
    dense = native(family("llama"))
    left = sum(m.size for b in dense.blocks for name, m in b.matrices.items() if name in "qkvo") + dense.head.size
    assert mixed(part).weight_bytes == left + 3 * 4 * HIDDEN * (8 + 3 * 2 * 48 + 3 * 32)

"""Random subspaces: the projections, one vector for a whole model, and the search for the smallest dimension."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from shoestring import data as datasets
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.peak import close_window, open_window
from shoestring.core.step import Work
from shoestring.lab import tiny as models
from shoestring.methods.adapters import _projections as projections
from shoestring.methods.adapters._dimension import Memory, search
from shoestring.methods.adapters._meter import Meter, advice
from shoestring.methods.adapters.intrinsic_dimension import RandomSubspaceConfig, measure, register

register()
KINDS = ("fastfood", "dense", "sparse")


def wrapped(base: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(models.model() if base is None else base, RandomSubspaceConfig(**options)).eval()


def vector(model: Any, adapter: str = "default") -> torch.Tensor:
    return model.base_model.intrinsic_dimension_v[adapter]


def stirred(model: Any, size: float = 0.3) -> Any:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(size * torch.randn_like(p))
    return model


def made(kind: str, counts: list[int], d: int, seed: int = 0) -> list[Any]:
    if kind == "sparse":
        return [projections.sparse(counts, d, seed)]
    if kind == "dense":
        return [projections.dense(sum(counts), d, seed)]
    return list(projections.fastfood([sum(counts)] if kind == "fastfood" else counts, d, seed))


def matrix(parts: list[Any], d: int) -> torch.Tensor:
    """P (n, d), column by column."""
    return torch.stack([torch.cat([part.apply(column) for part in parts]) for column in torch.eye(d)], 1)


# ---------------------------------------------------------------- projections


def test_walsh_hadamard_is_the_matrix() -> None:
    x = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0])
    assert projections.walsh_hadamard(x).tolist() == [4, 2, 0, -2, 0, 2, 0, 2]
    hadamard = pytest.importorskip("scipy.linalg").hadamard
    for size in (1, 2, 16, 128):
        x = torch.randn(size, dtype=torch.float64)
        expected = torch.tensor(hadamard(size), dtype=torch.float64) @ x
        assert torch.allclose(projections.walsh_hadamard(x), expected, atol=1e-9)
    x = torch.randn(2**16, dtype=torch.float64)
    assert torch.allclose(projections.walsh_hadamard(projections.walsh_hadamard(x)), 2**16 * x)


def test_fastfood_is_its_chain_of_matrices() -> None:
    n, d, length = 50, 5, 64
    part = projections.fastfood([n], d, 7)[0]
    stream = projections.numbers(7, 1, n)
    order, gauss = torch.tensor(stream.permutation(length)), torch.tensor(stream.standard_normal(length))
    signs = torch.tensor(projections.numbers(7, 2, 0).randint(0, 2, 8) * 2.0 - 1)
    h = projections.hadamard(length).double()
    padded = torch.zeros(length, d, dtype=torch.float64)
    padded[:d] = torch.diag(signs[:d])
    chain = h @ (gauss[:, None] * (h @ padded)[order])
    divisor = (length * gauss.square().sum()).sqrt() * math.sqrt(n / length)
    assert torch.allclose(matrix([part], d).double(), chain[:n] / divisor, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "per tensor"])
def test_columns_have_unit_norm_over_the_model_and_are_nearly_orthogonal(kind: str) -> None:
    counts = [4096, 64, 8192, 96]
    columns = matrix(made(kind, counts, 40), 40)
    assert torch.allclose(columns.norm(dim=0), torch.ones(40), atol=0.03)
    cosines = columns.T @ columns - torch.eye(40)
    assert cosines.abs().max() < 0.1
    shares = torch.stack([part.square().sum(0) for part in columns.split(counts)])
    expected = torch.tensor(counts) / sum(counts)
    loose = 0.6 if kind == "sparse" else 0.5  # small tensors fluctuate
    assert torch.allclose(shares.mean(1), expected, rtol=loose), "a layer's share is that of its size"


def test_the_figure_of_fastfood_that_is_known() -> None:
    columns = matrix(list(projections.fastfood([17_610], 120, 0)), 120)
    assert (columns.norm(dim=0) - 1).abs().max() < 0.02
    assert (columns.T @ columns - torch.eye(120)).abs().max() < 0.1


@pytest.mark.parametrize("kind", [*KINDS, "per tensor"])
def test_the_backward_pass_is_the_transpose(kind: str) -> None:
    for part in made(kind, [30, 7], 6):
        v = torch.randn(6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, p=part: projections.project(x, p), v)
        out = projections.project(v, part)
        assert not out.grad_fn.saved_tensors, "the backward pass keeps the projection and nothing else"


def test_a_seed_is_the_projection_on_every_machine() -> None:
    # Written down once: a change here makes every saved adapter another one.
    part = projections.fastfood([20], 3, 11)[0]
    assert part.order.tolist()[:8] == KNOWN["order"] and part.signs.tolist() == KNOWN["signs"]
    assert torch.allclose(part.scale[:3], torch.tensor(KNOWN["scale"]), atol=1e-6)
    assert torch.allclose(projections.dense(4, 2, 11).matrix[0], torch.tensor(KNOWN["dense"]), atol=1e-6)
    assert projections.sparse([30], 2, 11).rows.tolist() == KNOWN["rows"]
    torch.manual_seed(123)
    assert torch.equal(projections.fastfood([20], 3, 11)[0].scale, part.scale), "torch's generator has no part in it"
    assert not torch.equal(projections.fastfood([20], 3, 12)[0].scale, part.scale)


KNOWN: dict[str, Any] = {
    "order": [3, 0, 1, 1, 1, 2, 0, 2],
    "signs": [-1.0, 1.0, -1.0, -1.0],
    "scale": [-0.0123023, 0.0469608, -0.0446071],
    "dense": [0.1252611, 0.6321724],
    "rows": [0, 1, 2, 3, 6, 7, 10, 13, 13, 14, 14, 18, 19],
}


def test_a_million_weights_need_no_matrix() -> None:
    count, d = 10**6, 10**3
    window = open_window()
    part = projections.fastfood([count], d, 0)[0]
    v = torch.zeros(d, requires_grad=True)
    projections.project(v, part).sum().backward()
    close_window(window)
    if window.own is None or window.floor is None:
        pytest.skip("this system has no counter of memory")
    assert v.grad is not None and v.grad.abs().sum() > 0
    above = window.own - window.floor
    # Nothing where freed memory is used again.
    assert above < 100e6, f"{above / 1e6:.0f} MB; the matrix itself would take 4 GB"


# ---------------------------------------------------------------- the adapter


def test_one_vector_serves_the_whole_model() -> None:
    model = wrapped(d=50)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"base_model.intrinsic_dimension_v.default"}
    assert vector(model).shape == (50,) and not vector(model).any()
    covered = model.peft_config["default"].covered
    assert {name.split(".")[-2] for name in covered} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model(**models.inputs(model)).loss.backward()
    assert vector(model).grad.abs().min() > 0, "every direction reaches the loss"


@pytest.mark.parametrize("options", [{"projection": k} for k in KINDS] + [{"per_tensor": True}], ids=str)
def test_what_layers_get_is_the_slice_of_the_whole(options: dict[str, Any]) -> None:
    model = stirred(wrapped(d=30, **options))
    space = model.base_model.spaces["default"]
    flat = torch.cat([part.apply(vector(model).detach()) for part in space.parts])
    with torch.no_grad():
        slices = [space.delta(name) for name in space.shapes]
    assert torch.allclose(torch.cat([s.flatten() for s in slices]), flat, atol=1e-6)
    layer = model.base_model.model.model.layers[1].self_attn.k_proj
    x = torch.randn(3, 64)
    changed = layer.base_layer.weight + space.delta("model.layers.1.self_attn.k_proj.weight")
    assert torch.allclose(layer(x), x @ changed.T, atol=1e-5)


def test_all_covers_biases_norms_and_embeddings_and_a_tied_one_once() -> None:
    base = models.model("gpt2")
    model = wrapped(base, d=40, target_modules="all")
    covered = model.peft_config["default"].covered
    assert sum(math.prod(s) for s in covered.values()) == sum(p.numel() for p in models.model("gpt2").parameters())
    assert {"transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.0.attn.c_attn.bias"} <= set(covered)
    assert "lm_head.weight" not in covered, "it is the embedding"
    out = models.logits(stirred(model, 0.5))
    assert not torch.allclose(out, models.logits(models.model("gpt2")), atol=1e-3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    assert torch.allclose(models.logits(model), out, atol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    few = wrapped(models.model("gpt2"), d=40, target_modules="all", exclude_parameters=["bias", "wte.weight"])
    assert not any(n.endswith("bias") or "wte" in n for n in few.peft_config["default"].covered)


def test_running_statistics_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match="1 is a BatchNorm1d.*running statistics"):
        wrapped(net, d=3, target_modules=["0", "1"])
    assert set(wrapped(net, d=3, target_modules="all").peft_config["default"].covered) == {"0.weight", "0.bias"}


def test_a_file_is_the_vector_and_a_header(tmp_path: Path) -> None:
    model = stirred(wrapped(d=200, projection_seed=5))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1100
    again = PeftModel.from_pretrained(models.model(), tmp_path).eval()
    assert torch.equal(models.logits(again), models.logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["projection_seed"] == 5 and config["covered"]["model.layers.0.self_attn.k_proj.weight"] == [32, 64]
    with pytest.raises(ValueError, match="other tensors than this model has"):
        PeftModel.from_pretrained(models.model(num_key_value_heads=4), tmp_path)


def test_other_seeds_are_other_subspaces() -> None:
    one, two = stirred(wrapped(d=20)), stirred(wrapped(d=20, projection_seed=1))
    assert torch.equal(vector(one), vector(two)) and not torch.allclose(models.logits(one), models.logits(two))


def test_blocks_may_have_a_factor_of_their_own() -> None:
    model = wrapped(d=20, layer_scalars=True)
    scalars = model.base_model.intrinsic_dimension_scalars["default"]
    assert scalars.tolist() == [1, 1]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    price = catalog.module("intrinsic_dimension").price
    from shoestring.models import shape_of

    assert trained == 22 == price(shape_of(models.model()), {"d": 20, "layer_scalars": True}).trainable
    stirred(model)
    space = model.base_model.spaces["default"]
    with torch.no_grad():
        scalars.copy_(torch.tensor([2.0, 0.0]))
        name = "model.layers.{}.self_attn.q_proj.weight"
        doubled, gone = space.delta(name.format(0)), space.delta(name.format(1))
        scalars.fill_(1.0)
        assert torch.allclose(doubled, 2 * space.delta(name.format(0))) and not gone.any()
    model(**models.inputs(model)).loss.backward()
    assert scalars.grad.abs().min() > 0


def test_a_model_that_could_not_be_adapted_is_left_clean() -> None:
    base = models.model()
    with pytest.raises(ValueError, match="no_such"):
        wrapped(base, d=10, target_modules=["no_such"])
    assert not base._forward_pre_hooks and not base._forward_hooks
    assert not wrapped(base, d=10).unload()._forward_pre_hooks


def test_more_dimensions_than_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="d=99999 is more than the 24576 covered weights"):
        wrapped(d=99_999)
    refused = (({"d": 0}, "d=0"), ({"projection": "fast"}, "fastfood, dense"), ({"projection_seed": -1}, "seed=-1"))
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            RandomSubspaceConfig(**options)


def test_small_steps_survive_sixteen_bits_and_packed_bases(tmp_path: Path) -> None:
    half = wrapped(models.model(dtype=torch.bfloat16), d=20)
    layer = half.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        vector(half).fill_(1e-3)
    moved = torch.nn.functional.linear(
        x, layer.spaces["default"].delta("model.layers.0.self_attn.q_proj.weight").bfloat16()
    )
    assert moved.abs().max() > 0 and torch.equal(layer(x), before + moved)
    models.model().save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=catalog.load("int8")(group_size=32))
    model = wrapped(packed, d=20)
    plain = models.logits(model)
    out = models.logits(stirred(model, 0.5))
    assert not torch.allclose(out, plain)
    with model.disable_adapter():
        assert torch.equal(models.logits(model), plain)
    with pytest.raises(ValueError, match="packed integers"):
        model.merge_adapter()


# ---------------------------------------------------------------- what it learns


def digits() -> tuple[torch.Tensor, ...]:
    pixels, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    return x[:1300], y[:1300], x[1300:], y[1300:]


def accuracy(epochs: int = 25, rate: float = 0.1, width: int = 32, **options: Any) -> float:
    """Of an MLP 64-w-w-10 trained from its own random start in a subspace, or (no options) directly."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    if options:
        net = get_peft_model(net, RandomSubspaceConfig(target_modules="all", **options))
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float((net(test_x).argmax(1) == test_y).float().mean())


def test_dense_sparse_and_fastfood_learn_alike() -> None:
    found = {kind: accuracy(projection=kind, d=200) for kind in KINDS}
    assert min(found.values()) > 0.75 and max(found.values()) - min(found.values()) < 0.08, found


def test_more_dimensions_learn_more() -> None:
    assert accuracy(d=4, projection="dense") < 0.6 < accuracy(d=300, projection="dense")


def test_an_orthonormal_projection_of_all_dimensions_is_direct_training() -> None:
    weights = 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    direct = accuracy(width=8, epochs=15, rate=0.01)
    turned = accuracy(width=8, epochs=15, rate=0.01, projection="orthonormal", d=weights)
    assert direct > 0.6 and abs(direct - turned) < 0.08


# ---------------------------------------------------------------- the search


def rising(d: int, seed: int) -> float:
    return 1 - math.exp(-d / 100) + 0.001 * seed


def test_the_search_brackets_the_answer() -> None:
    asked: list[int] = []

    def score(d: int, seed: int) -> float:
        asked.append(d)
        return rising(d, seed)

    found = search(score, [1.0, 1.0, 1.0], grid=(8, 64, 512, 4096), refine=4)
    truth = next(d for d in range(1, 999) if sum(rising(d, s) for s in range(3)) / 3 >= 0.9)
    assert found.d is not None and found.below < truth <= found.d and found.d < 1.2 * found.below
    assert 4096 not in asked, "it ends where it is enough"
    assert found.low is not None and found.low <= found.d <= found.high
    assert len(found.curve[found.d]) == 3 and list(found.curve) == sorted(found.curve)


def test_the_mean_decides_not_a_lucky_seed() -> None:
    found = search(lambda d, s: 1.0 if d >= 100 or s == 0 else 0.5, [1.0], grid=(10, 100), refine=0)
    assert found.d == 100 and found.low == 10, "the interval tells that one seed passed below"


def test_a_flat_curve_stops_early_and_a_flat_foot_does_not() -> None:
    asked: list[int] = []
    flat = search(lambda d, s: (asked.append(d), min(0.6, d / 100))[1], [1.0], grid=(50, 100, 200, 400, 800, 1600))
    assert flat.d is None and flat.flat and 1600 not in asked and flat.high is None
    foot = search(lambda d, s: 0.001 if d < 1000 else 1.0, [1.0], grid=(1, 10, 100, 1000), refine=0)
    assert foot.d == 1000


@pytest.mark.parametrize(
    "options", [{"grid": ()}, {"grid": (0, 3)}, {"baseline": [0.0]}, {"share": 0.0}, {"seeds": ()}], ids=str
)
def test_a_search_without_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        search(rising, **{"baseline": [1.0], "grid": (1, 2), **options})


def test_an_interrupted_search_goes_on_where_it_stood(tmp_path: Path) -> None:
    done: list[str] = []

    def run(stop: int) -> Any:
        memory = Memory(tmp_path / "m.json", {"steps": 3})

        def score(d: int, seed: int) -> float:
            def train() -> float:
                if len(done) == stop:
                    raise KeyboardInterrupt
                done.append(f"{d} {seed}")
                return rising(d, seed)

            return memory(f"{d} {seed}", train)

        return search(score, [1.0], grid=(8, 64, 512), refine=0)

    with pytest.raises(KeyboardInterrupt):
        run(4)
    assert run(99).d == 512 and len(done) == 9 == len(set(done))
    with pytest.raises(UsageError, match="steps differ"):
        Memory(tmp_path / "m.json", {"steps": 4})


# ---------------------------------------------------------------- the meter


def work(folder: Path, data: Path, **more: Any) -> Work:
    corpus = datasets.read(str(data))
    train, valid, _ = datasets.split(corpus, seed=0)
    return Work(Ledger(), folder, train, valid, **more)


def test_the_meter_reports_a_curve_and_a_rank(tiny: Path, data: Path, tmp_path: Path) -> None:
    options = {"grid": [4, 64, 1024], "steps": 4, "batch": 8, "seeds": 2, "refine": 1, "direct_rate": 3e-3, "rate": 0.1}
    said: list[str] = []
    found = measure(tiny, options, work(tmp_path, data, say=said.append))
    # Ten runs at most: two direct, and two seeds of three dimensions and one between.
    assert re.fullmatch(r"direct 0: [\d.]+ nats, \d+ s; at most 9 more runs, \d+ min", said[0]) and len(said) <= 10
    assert found["baseline"] > 0 and found["weights"] == 24_576
    assert [row["d"] for row in found["curve"]] == sorted(row["d"] for row in found["curve"])
    assert all(set(row) == {"d", "fall", "seed 0", "seed 1"} for row in found["curve"])
    assert "rank" in found["advice"] or found["d90"] is None
    held = json.loads((tmp_path / "intrinsic-dimension.json").read_text())["scores"]
    assert {"before", "direct 0", "direct 1"} <= set(held)
    again = measure(tiny, {**options, "seeds": 2}, work(tmp_path, data, say=pytest.fail))
    assert again == found
    more = measure(tiny, {**options, "baseline": 1e-6}, work(tmp_path, data))
    assert more["d90"] is not None and more["d90"] <= (found["d90"] or 1024)


def test_the_meter_leaves_the_model_as_it_was_between_runs(tiny: Path, data: Path, tmp_path: Path) -> None:
    options = {"grid": [16], "steps": 2, "batch": 4, "seeds": 1, "refine": 0, "direct_rate": 1e-2, "baseline": 1e-9}
    first = measure(tiny, options, work(tmp_path / "a", data))["curve"]
    both = measure(tiny, {**options, "baseline": "direct", "grid": [8, 16]}, work(tmp_path / "b", data))["curve"]
    assert [row for row in both if row["d"] == 16] in ([], first)


def test_the_meter_names_what_it_does_not_know(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option speed"):
        measure(tiny, {"speed": 1}, work(tmp_path, data))
    for options in ({"grid": "a,b"}, {"seeds": 0}, {"share": 2.0}, {"baseline": -1.0}):
        with pytest.raises(UsageError):
            Meter.read(options)
    assert Meter.read({"grid": "8, 64"}).grid == (8, 64)


def test_advice_counts_numbers() -> None:
    found = search(lambda d, s: 1.0 if d >= 1000 else 0.0, [1.0], grid=(100, 1000), refine=0)
    said = advice(found, [(64, 64), (64, 32)], Meter())
    assert "is 5 (1,120 numbers, 1.12 times d90)" in said and "Rule of thumb" in said
    none = search(lambda d, s: 0.1, [1.0], grid=(1, 2), refine=0)
    assert "No tried dimension" in advice(none, [(64, 64)], Meter())

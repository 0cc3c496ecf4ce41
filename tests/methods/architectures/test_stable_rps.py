from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shoestring import models
from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.core.ledger import Ledger
from shoestring.core.step import Work
from shoestring.lab import tiny
from shoestring.methods.architectures import _array

RPS = catalog.module("stable_rps")
TURNS = [195, 2499, 1741, 1311]  # of seed 7 and m 3001
SIGNS = [-1, 1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, -1, -1]
BLOCKS = [[456, 211], [1432, 1259]]


def rows(count: int = 8, length: int = 12) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.batch(count, length).tolist()]


def converted(base: Any = None, **options: Any) -> Any:
    return RPS.convert(base or tiny.model(), RPS.StableRPSOptions(**{"kept": 0.1, **options}), []).model


def fresh(seed: int = 0, **said: Any) -> Any:
    """A new model of some hundred weights a slot at most, its array drawn after the seed."""
    base = tiny.model().config
    own = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures")}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(RPS.MODELS[0][0](**{**own, "shared_size": 3001, **said}))


def shared_of(model: Any) -> Any:
    return model.get_input_embeddings().shared


def users(shared: Any) -> dict[int, list[tuple[float, int]]]:
    """Slot -> (scale, number) of its weights, one weight after another by the formulas of the paper."""
    array, found = shared.map, {}
    a, b, c = array._factors
    for place in shared.places:
        for row in range(place.rows):
            for column in range(place.columns):
                j = place.offset + row * place.columns + column
                if array.mapping == "fold":
                    x = j // array.m
                    slot = ((a * x + b * x * x + c) % _array.PRIME % array.m + j % array.m) % array.m
                else:
                    high, wide = (1, 8) if place.looked_up else (16, 16)
                    x = place.offset + row // high * math.ceil(place.columns / wide) + column // wide
                    start = (a * x + b * x * x + c) % _array.PRIME % (array.m - high * wide)
                    slot = start + row % high * wide + column % wide
                found.setdefault(slot, []).append((place.scale, j))
    return found


def gradient_in_weights(model: Any, texts: int = 4) -> torch.Tensor:
    """What psi's gradient must be before Gamma: a dense model's gradients, scattered one place after another."""
    dense = RPS.materialize(model).train()
    dense(**tiny.inputs(dense, tiny.batch(texts, 12))).loss.backward()
    shared = shared_of(model)
    total = torch.zeros(shared.map.m)
    for place in shared.places:
        grad = dense.get_parameter(f"{place.name}.weight").grad * place.scale
        if shared.map.signs:
            grad = grad * shared.signs(place)
        slots = shared.map.slots(place, torch.arange(place.rows))
        total.index_add_(0, slots.flatten(), grad.flatten())
    return total


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("mapping", ["fold", "roast"])
def test_every_weight_has_the_slot_of_the_formula(mapping: str) -> None:
    shared = shared_of(fresh(mapping=mapping, num_hidden_layers=1))
    listed = users(shared)
    assert shared.users(0).tolist() == [len(listed.get(slot, [])) for slot in range(shared.map.m)]
    for place in shared.places:
        slots = shared.map.slots(place, torch.arange(place.rows)).flatten().tolist()
        assert all((place.scale, place.offset + at) in listed[slot] for at, slot in enumerate(slots))


@pytest.mark.parametrize("m", [1, 7, 500, 3001, 50_001, 200_003])
def test_the_fold_loads_all_slots_alike(m: int) -> None:
    shared = shared_of(fresh(shared_size=m))
    counts, total = shared.users(0), sum(place.size for place in shared.places)
    assert {int(count) for count in counts.unique()} <= {total // m, -(-total // m)}
    assert counts.sum() == total


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_in_the_order_of_the_modules_and_tied_ones_once(tied: bool) -> None:
    base = tiny.model(tie_word_embeddings=tied)
    model = converted(base)
    names = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    places, at = shared_of(model).places, 0
    assert [place.name for place in places] == (names[:-1] if tied else names)
    for place in places:
        assert place.offset == at and (place.rows, place.columns) == base.get_parameter(f"{place.name}.weight").shape
        at += place.size
    head = model.get_output_embeddings().place
    assert (head == places[0]) is tied and (head == places[-1]) is not tied


def test_roast_does_not() -> None:
    counts = shared_of(fresh(mapping="roast")).users(0)
    assert counts.max() - counts.min() > 5


def test_weights_of_a_chunk_share_no_slot() -> None:
    array = _array.Map(3001)
    for chunk in (0, 1, 5):
        place = _array.Place("", chunk * 3001, 3001, 1, False)
        assert len(set(array.slots(place, torch.arange(3001)).flatten().tolist())) == 3001


def test_a_matrix_is_a_few_slices_of_the_array() -> None:
    model = fresh()
    shared = shared_of(model)
    for place in shared.places:
        pieces = list(shared.map.slices(place))
        assert len(pieces) <= 2 * (place.size // shared.map.m + 2)
        listed = [slot for start, length in pieces for slot in range(start, start + length)]
        assert listed == shared.map.slots(place, torch.arange(place.rows)).flatten().tolist()


def test_the_map_is_the_same_everywhere() -> None:
    """Known answers: files made elsewhere must be read with the same map."""
    array = _array.Map(3001, seed=7)
    assert [array.turn(chunk) for chunk in range(4)] == TURNS
    assert array.sign(torch.arange(-4, 12, dtype=torch.int32)).tolist() == SIGNS
    block = _array.Map(3001, seed=7, mapping="roast")
    assert block.slots(_array.Place("", 0, 32, 32, False), torch.tensor([0, 17]))[:, ::16].tolist() == BLOCKS
    assert [_array.Map(3001, seed=8).turn(chunk) for chunk in range(4)] != TURNS


def test_signs_are_even_and_those_of_the_weights_number() -> None:
    shared = shared_of(fresh())
    whole = torch.cat([shared.signs(place).flatten() for place in shared.places]).float()
    assert set(whole.tolist()) == {-1.0, 1.0} and abs(whole.mean()) < 4 / len(whole) ** 0.5
    assert abs((whole[1:] * whole[:-1]).mean()) < 4 / len(whole) ** 0.5
    chosen = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(shared.signs(shared.places[1], chosen), shared.signs(shared.places[1])[chosen])
    far = _array.Place("", 2**32 + 2**31 - 3, 2, 4, False)  # numbers that do not fit into 32 bits
    assert torch.equal(shared.signs(far), shared.signs(far, torch.arange(2)))


def test_the_size_has_no_divisor_in_common_with_a_row() -> None:
    assert _array.size_of(10_000, [64, 96], 0.1) == 1001
    assert _array.size_of(1155 * 10, [3, 5, 7, 11], 0.1) == 1156
    assert _array.size_of(10_000, [64, 96], 1.0) == 10_000


# ---------------------------------------------------------------- recovery and gradients


@pytest.mark.parametrize("tied", [False, True])
def test_all_of_it_is_the_model_itself_turned(tied: bool) -> None:
    base = tiny.model(tie_word_embeddings=tied)
    made = RPS.convert(base, RPS.StableRPSOptions(kept=1.0), [])
    assert made.facts["exact"] and torch.equal(tiny.logits(made.model), tiny.logits(base))
    shared = shared_of(made.model)
    flat = torch.cat([(base.get_parameter(f"{p.name}.weight") * shared.signs(p)).flatten() for p in shared.places])
    assert torch.equal(made.model.psi, flat.roll(shared.map.turn(0)))


def test_more_than_all_of_it_is_exact_too() -> None:
    base = tiny.model()
    assert torch.equal(tiny.logits(converted(base, kept=1.3)), tiny.logits(base))


@pytest.mark.parametrize("spread", [0.01, 0.5])
def test_recovered_weights_deviate_as_the_familys_do(spread: float) -> None:
    model = fresh(spread=spread, shared_size=30_001)
    assert model.psi.abs().max() <= spread and model.psi.std().item() == pytest.approx(spread / 3**0.5, rel=0.03)
    for place in shared_of(model).places:
        found = model.get_submodule(place.name).weight.std().item()
        assert found == pytest.approx(model.config.initializer_range, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mapping", ["fold", "roast"])
def test_gradients_are_a_dense_models_scattered_and_divided(mapping: str, tied: bool) -> None:
    for scaler in ("none", "v1"):
        model = converted(tiny.model(tie_word_embeddings=tied), mapping=mapping, scaler=scaler).train()
        want = gradient_in_weights(model)
        want = want if scaler == "none" else want / shared_of(model).gamma()
        for _ in range(2):  # a second backward pass adds to the first
            model(**tiny.inputs(model, tiny.batch(4, 12))).loss.backward()
        torch.testing.assert_close(model.psi.grad, 2 * want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_scales_differ_where_the_matrices_do() -> None:
    shared = shared_of(converted())
    base = tiny.model()
    for place in shared.places:
        deviation = float(base.get_parameter(f"{place.name}.weight").detach().std(correction=0))
        assert place.scale == pytest.approx(deviation * 3**0.5 / 0.05, rel=1e-5)


@pytest.mark.parametrize("scaler", ["v1", "v2", "v3", "v4", "v5"])
@pytest.mark.parametrize("mapping", ["fold", "roast"])
def test_gamma_is_that_of_the_formula(mapping: str, scaler: str) -> None:
    shared = shared_of(converted(tiny.model(num_hidden_layers=1), mapping=mapping, scaler=scaler))
    listed, got = users(shared), shared.gamma()
    for slot in range(0, shared.map.m, 13):
        scales = [scale for scale, _ in listed.get(slot, [])]
        want = {
            "v1": sum(scales) ** 2 / (len(scales) + 1e-3),
            "v2": sum(scales),
            "v3": sum(scales) / (len(scales) + 1e-3),
            "v4": sum(s * s for s in scales) ** 0.5,
            "v5": sum(s * s for s in scales),
        }[scaler] + 1e-6
        assert got[slot].item() == pytest.approx(want, rel=1e-4)


def curve(spread: float, scaler: str, steps: int = 12, **said: Any) -> list[float]:
    """Losses of SGD from the same weights, whatever psi's spread is."""
    model = fresh(spread=spread, scaler=scaler, **said).train()
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    losses = []
    for _ in range(steps):
        loss = model(**tiny.inputs(model, tiny.batch(4, 12))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_with_the_scaler_the_spread_does_not_matter() -> None:
    curves = [curve(spread, "v1") for spread in (0.001, 0.01, 0.1)]
    assert curves[0][-1] < curves[0][0] - 0.3, "it does not learn, so this would say nothing"
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=2e-3)


def test_without_it_the_spread_is_a_learning_rate() -> None:
    curves = [curve(spread, "none") for spread in (0.001, 0.01, 0.1)]
    assert curves[0][0] == pytest.approx(curves[2][0], rel=1e-4)
    ends = [losses[-1] if math.isfinite(losses[-1]) else 100.0 for losses in curves]
    assert max(ends) - min(ends) > 0.3


def test_all_of_it_trains_as_the_dense_model_does() -> None:
    """No gap without compression, step by step."""
    base = tiny.model()
    losses = []
    for model in (base, converted(base, kept=1.0)):
        model.train()
        optimizer, seen = torch.optim.SGD(model.parameters(), 0.5), []
        for _ in range(8):
            loss = model(**tiny.inputs(model)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0][-1] < losses[0][0] - 0.1 and losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_gradients_are_summed_in_float32() -> None:
    """In bfloat16 sums over a hundred users would lose most of their digits."""
    model = converted(kept=0.005, scaler="none").to(torch.bfloat16).train()
    shared = shared_of(model)
    kept: list[torch.Tensor] = []
    model.psi.register_hook(lambda grad: kept.append(grad))
    seen = []
    take = shared.take
    shared.take = lambda: seen.append({t.dtype for t in shared._sums.values()}) or take()
    model(**tiny.inputs(model)).loss.backward()
    assert seen == [{torch.float32}] and kept[0].dtype == torch.bfloat16


def test_a_changed_type_is_noticed() -> None:
    """Training holds bfloat16 weights in float32, in place; gradients must not pass through bfloat16 then."""
    model = converted().to(torch.bfloat16).train()
    model(**tiny.inputs(model)).loss.backward()
    model.zero_grad()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model(**tiny.inputs(model)).loss.backward()
    assert model.psi.grad.dtype == torch.float32
    assert not torch.equal(model.psi.grad, model.psi.grad.bfloat16().float())


def test_a_backward_pass_that_broke_off_leaves_nothing() -> None:
    model = converted().train()
    model(**tiny.inputs(model)).loss.backward()
    want = model.psi.grad.clone()
    model.zero_grad()

    def stop(_: torch.Tensor) -> None:
        raise RuntimeError("stop")

    hook = model.get_parameter("model.layers.0.input_layernorm.weight").register_hook(stop)
    with pytest.raises(RuntimeError):
        model(**tiny.inputs(model)).loss.backward()
    hook.remove()
    model.zero_grad()
    assert shared_of(model)._sums
    loss = model(**tiny.inputs(model)).loss
    assert not shared_of(model)._sums
    loss.backward()
    torch.testing.assert_close(model.psi.grad, want)


def test_checkpointing_changes_no_gradient() -> None:
    model = converted().train()
    grads = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**tiny.inputs(model), use_cache=False).loss.backward()
        grads.append(model.psi.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_the_padding_tokens_row_gets_no_gradient_from_the_text() -> None:
    model = converted(tiny.model(tie_word_embeddings=False), scaler="none").train()
    embedding = model.get_input_embeddings()
    embedding(torch.tensor([[0, 0]])).sum().backward()
    assert embedding.padding_idx == 0 and not model.psi.grad.any()
    embedding(torch.tensor([[0, 5]])).sum().backward()
    assert model.psi.grad.count_nonzero() == embedding.embedding_dim


# ---------------------------------------------------------------- memory


def test_memory_of_training_is_that_of_the_array() -> None:
    model = converted(kept=0.02).train()
    shared = shared_of(model)
    total = sum(place.size for place in shared.places)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss = model(**tiny.inputs(model, tiny.batch(1, 4))).loss
    optimizer = torch.optim.AdamW(model.parameters())
    loss.backward()
    optimizer.step()
    assert optimizer.state[model.psi]["exp_avg"].shape == (shared.map.m,)
    held = [t for m in (shared, *model.modules()) for t in vars(m).values() if isinstance(t, torch.Tensor)]
    held += list(shared._sums.values()) + list(model.parameters()) + list(model.buffers())
    assert max(t.numel() for t in held) < 0.03 * total
    assert sum(p.numel() for p in model.parameters()) < 0.03 * total


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    model = converted().train()
    sizes = {(place.rows, place.columns) for place in shared_of(model).places}
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        model(**tiny.inputs(model, tiny.batch(1, 5)))
    assert saved and not {shape for shape in saved if shape in sizes or shape[::-1] in sizes}


def test_embeddings_read_only_the_rows_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted()
    shared = shared_of(model)
    want = shared.matrix(shared.places[0])[torch.tensor([[3, 60, 3]])]
    asked = Counter[str]()
    slots = _array.Map.slots

    def counted(self: Any, place: Any, rows: torch.Tensor) -> torch.Tensor:
        asked[place.name] += rows.numel()
        return slots(self, place, rows)

    monkeypatch.setattr(_array.Map, "slots", counted)
    monkeypatch.setattr(_array.Shared, "matrix", None)
    got = model.get_input_embeddings()(torch.tensor([[3, 60, 3]]))
    assert torch.equal(got, want) and list(asked.values()) == [3]
    got.sum().backward()
    assert list(asked.values()) == [6]


def test_autocast_computes_in_bfloat16_and_sums_in_float32() -> None:
    model = converted(tiny.model("llama", tie_word_embeddings=True)).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**tiny.inputs(model))
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert model.psi.grad.dtype == torch.float32 and torch.isfinite(model.psi.grad).all()


# ---------------------------------------------------------------- the file, the price, the conversion


def test_the_file_holds_the_array_once_and_the_map_is_in_the_configuration(tmp_path: Path) -> None:
    base = tiny.model()
    model = converted(base, map_seed=5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    total = sum(place.size for place in shared_of(model).places)
    m = _array.size_of(total, [64, 96], 0.1)
    norms = sum(p.numel() for n, p in base.named_parameters() if "norm" in n)
    assert set(tensors) - {"psi"} == {n for n, _ in base.named_parameters() if "norm" in n}
    assert sum(t.nbytes for t in tensors.values()) == 4 * (m + norms)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.config.shared_size == m and found.config.map_seed == 5
    assert shared_of(found).map == shared_of(model).map and shared_of(found).places == shared_of(model).places


def test_multiplications_do_not_fall() -> None:
    shape = models.shape_of(tiny.model())
    for kept in (1.0, 0.1):
        made = RPS.price(shape, {"kept": kept}).shape
        assert made.flops_per_token(64) == shape.flops_per_token(64)
    assert made.storage < 0.12 * shape.storage
    assert models.shape_of(converted()).flops_per_token(64) == shape.flops_per_token(64)


def test_conversion_is_the_nearest_array() -> None:
    """Moving any slot makes the matrices no better."""
    base = tiny.model(num_hidden_layers=1)
    model = converted(base)
    shared = shared_of(model)
    weights = [(place, base.get_parameter(f"{place.name}.weight").detach()) for place in shared.places]
    residue = torch.zeros(shared.map.m)
    for place, weight in weights:
        shared.scatter(residue, place, shared.signed(weight - shared.matrix(place), place))
    assert residue.abs().max() < 1e-4 * shared.users(2).max()


def test_small_modules_stay_as_they_are() -> None:
    model = converted(tiny.model("qwen3"), smallest=3000)
    left = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert left and all("k_proj" in name or "v_proj" in name for name in left)


def test_biases_stay() -> None:
    base = tiny.model(attention_bias=True)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = converted(base, kept=1.0)
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    model.train()(**tiny.inputs(model)).loss.backward()
    base.train()(**tiny.inputs(base)).loss.backward()
    name = "model.layers.0.self_attn.q_proj.bias"
    torch.testing.assert_close(model.get_parameter(name).grad, base.get_parameter(name).grad)


def test_an_ordinary_model_comes_out_again() -> None:
    model = converted()
    plain = RPS.materialize(model)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert torch.equal(tiny.logits(plain), tiny.logits(model))


def test_a_copy_has_an_array_of_its_own() -> None:
    model = converted().train()
    model(**tiny.inputs(model)).loss.backward()
    copied = copy.deepcopy(model).eval()
    before = tiny.logits(model.eval())
    with torch.no_grad():
        copied.psi.zero_()
    assert torch.equal(tiny.logits(model), before) and not torch.equal(tiny.logits(copied), before)


def test_training_divides_before_it_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is clipped is already divided: the norm that training sees is that of the divided gradient."""
    made = RPS.convert(tiny.model(), RPS.StableRPSOptions(kept=0.1), [])
    seen: list[float] = []
    clip = torch.nn.utils.clip_grad_norm_

    def look(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(float(made.model.psi.grad.norm()))
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    want = gradient_in_weights(made.model, 8) / shared_of(made.model).gamma()
    work = Work(Ledger(), tmp_path, training={"max_steps": 1, "per_device_train_batch_size": 8, "save_steps": 0})
    facts = RPS.heal(made, tiny.model(), RPS.StableRPSOptions(kept=0.1), rows(8), [], work)
    assert facts["steps"] == 1 and seen[0] == pytest.approx(float(want.norm()), rel=1e-3)


def test_healing_teaches_it_and_leaves_an_exact_one_alone(tmp_path: Path) -> None:
    for kept in (0.3, 1.0):
        options = RPS.StableRPSOptions(kept=kept)
        made = RPS.convert(tiny.model(), options, [])
        with torch.no_grad():
            before = made.model(**tiny.inputs(made.model)).loss.item()
        settings = {**RPS.TRAINING, "learning_rate": 5e-3, "max_steps": 30, "save_steps": 0}
        facts = RPS.heal(
            made, tiny.model(), options, rows(), [], Work(Ledger(), tmp_path / str(kept), training=settings)
        )
        with torch.no_grad():
            after = made.model.eval()(**tiny.inputs(made.model)).loss.item()
        assert (after < 0.7 * before and facts["steps"] == 30) if kept < 1 else (after == before and not facts["steps"])


@pytest.mark.parametrize(
    "options",
    [{"kept": 0}, {"kept": "all"}, {"spread": -1.0}, {"mapping": "x"}, {"scaler": "v9"}, {"smallest": -1}],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(options)))):
        RPS.StableRPSOptions(**options)


def test_roast_needs_room_for_a_block() -> None:
    with pytest.raises(UsageError, match="too small"):
        converted(mapping="roast", kept=0.001)


@pytest.mark.real
def test_on_the_default_model() -> None:
    """Turned and signed it is the same model to the bit; with the half of it, it must be trained anew."""
    base = models.load("smollm2").model
    ids = torch.tensor([[504, 2933, 28, 260, 3575, 314]])
    with torch.no_grad():
        want = base(ids, labels=ids)
        made = RPS.convert(base, RPS.StableRPSOptions(kept=1.0), [])
        assert torch.equal(made.model(ids).logits, want.logits)
        assert made.facts["array"] == sum(p.numel() for n, p in base.named_parameters() if "norm" not in n)
        del made
        half = RPS.convert(base, RPS.StableRPSOptions(kept=0.5), [])
        assert half.facts["load"] in ([1, 2], [2, 2])
        assert half.model(ids, labels=ids).loss > want.loss + 1

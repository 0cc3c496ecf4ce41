"""Exit heads: trained against the whole model, and the same in torch and beside the engine's runners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.exits import WARMTH, gates_in, read_exits
from shoestring.engine.open import open_model
from shoestring.lab import answering, tiny
from shoestring.lab.answering import answers, exact
from shoestring.methods.adapters._exits import Gate, fit_temperatures, gates_loss, kept_rows
from shoestring.methods.adapters.exit_heads import ExitHeadsConfig
from shoestring.training.between_steps import BetweenSteps

Train = Callable[..., list[float]]
WIDE: dict[str, Any] = {"num_hidden_layers": 4, "initializer_range": 0.2}


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    module = catalog.module("exit_heads")
    return catalog.contract("adapters").wrap(module, tiny.model(**WIDE), {"gates": [1, 3], "r": 8, **options})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[Any, Path, Path]:
    """A wrapped model after some training, the folder of its gates, and the folder of its base."""
    model = wrapped()
    train(model, 80)
    folder = tmp_path_factory.mktemp("gates")
    model.save_pretrained(str(folder))
    return model.eval(), folder, answering.folder(tmp_path_factory.mktemp("tiny"), **WIDE)


def test_the_loss_is_the_divergence_from_the_whole_model_and_so_are_its_gradients() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    torch.manual_seed(0)
    gates, head, final = [Gate(Norm()), Gate(Norm())], nn.Linear(8, 20, bias=False), torch.randn(50, 8)
    states, weights, at = [torch.randn(50, 8) for _ in gates], [1.0, 0.5], 1.5
    kept = torch.arange(50) % 5 == 0
    with torch.no_grad():
        gates[0].warmth.fill_(0.03)
    loss, agree = gates_loss(gates, states, weights, head, final, at, kept)
    for gate, x, said in zip(gates, states, agree):
        assert torch.equal(said, head(gate(x)).argmax(-1) == head(final).argmax(-1))
    loss.backward()
    found = [p.grad.clone() for gate in gates for p in gate.parameters() if p.grad is not None]
    wanted = torch.zeros(())
    for gate, x, weight in zip(gates, states, weights):
        gate.zero_grad()
        said, guess = head(final).detach(), head(gate(x))
        taught, whole = (guess[~kept] / at).log_softmax(-1), (said[~kept] / at).log_softmax(-1)
        kl = F.kl_div(taught, whole, reduction="batchmean", log_target=True)
        warm = guess[kept].detach() / (WARMTH * gate.warmth).exp()
        sure = F.cross_entropy(warm, said[kept].argmax(-1))
        wanted = wanted + weight * kl + sure - sure.detach()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for a, p in zip(found, [p for gate in gates for p in gate.parameters()]):
        assert p.grad is not None and torch.allclose(a, p.grad, atol=1e-6)


def test_the_same_positions_are_kept_from_the_gates_wherever_a_text_is_cut() -> None:
    ids = torch.randint(1000, (8, 400), generator=torch.Generator().manual_seed(0))
    kept = kept_rows(ids)
    assert 0.09 < kept.float().mean() < 0.16
    assert torch.equal(kept_rows(ids[:, 100:300])[:, 3:], kept[:, 103:300])


def test_gates_learn_and_the_model_stays_what_it_was(trained: tuple[Any, Path, Path], train: Train) -> None:
    model = wrapped()
    losses = train(model, 40)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(tiny.model(**WIDE)))
    assert torch.equal(tiny.logits(trained[0]), tiny.logits(tiny.model(**WIDE)))


def test_labels_that_are_masked_do_not_count() -> None:
    model, ids = wrapped(), tiny.batch(2, 20)
    masked = ids.clone()
    masked[:, 10:] = -100
    short = model(input_ids=ids[:, :10], labels=ids[:, :10]).loss
    assert torch.allclose(model(input_ids=ids, labels=masked).loss, short, atol=1e-5)


def test_temperatures_meet_how_often_a_gate_is_right(trained: tuple[Any, Path, Path]) -> None:
    """Of a gate that says with p what is right with p, the mean confidence is the share of right ones."""
    model, folder, base = trained
    runner = open_model(base, dtype="fp32", cache_dtype="fp32").runner
    heads = read_exits(folder, runner)
    ids = 3 + torch.randint(60, (20, 24), generator=torch.Generator().manual_seed(9999))
    with torch.no_grad():
        out = model.base_model.model(input_ids=ids, output_hidden_states=True)
    for gate in (1, 3):
        logits = heads.logits(gate, out.hidden_states[gate].flatten(0, 1).numpy())
        right = (logits.argmax(-1) == out.logits.flatten(0, 1).argmax(-1).numpy()).mean()
        assert abs(heads.confidence(gate, logits).mean() - right) < 0.1
    runner.close()


def least(logits: torch.Tensor, right: torch.Tensor) -> float:
    """The temperature of a fine grid at which cross-entropy is least."""
    grid = torch.linspace(-2, 2, 4001).exp().tolist()
    return min(grid, key=lambda t: F.cross_entropy(logits / t, right).item())


def test_a_temperature_is_fitted_where_cross_entropy_is_least() -> None:
    torch.manual_seed(0)
    gates, head = [Gate(nn.RMSNorm(8)), Gate(nn.RMSNorm(8))], nn.Linear(8, 20, bias=False)
    final = torch.randn(3000, 8)
    with torch.no_grad():
        head.weight.mul_(5)
        gates[1].warmth.fill_(0.2)
    read = torch.stack([final + torch.randn_like(final), final + 0.4 * torch.randn_like(final), final])
    fit_temperatures(gates, read, head)
    with torch.no_grad():
        for gate, x in zip(gates, read):
            assert gate.temperature.item() == pytest.approx(least(head(gate(x)), head(final).argmax(-1)), rel=3e-3)
    assert gates[0].temperature > 1.2 * gates[1].temperature


def test_a_gate_that_is_never_wrong_and_one_without_rows_have_temperatures_too() -> None:
    gate, head = Gate(nn.Identity()), nn.Linear(8, 20, bias=False)
    gate.norm = nn.RMSNorm(8, elementwise_affine=True)
    x = torch.randn(2, 0, 8)
    fit_temperatures([gate], x, head)
    assert gate.temperature.item() == 1
    x = gate.norm(torch.randn(500, 8)).detach()
    fit_temperatures([gate], torch.stack([x, x]), head)
    assert 0.04 < gate.temperature.item() < 0.06


@pytest.mark.parametrize("ends", ["as planned", "earlier", "from a checkpoint"])
def test_a_run_ends_by_fitting_temperatures_to_its_gates(ends: str) -> None:
    """What training left of them, here something absurd, is no part of the end."""

    def step(model: Any, number: int) -> None:
        ids = texts(number)
        model(input_ids=ids, labels=ids).loss.backward()
        model.base_model.update_and_allocate(number)

    model = wrapped().train()
    for number, gate in enumerate(gates_in_it(model)):
        with torch.no_grad():
            gate.up.normal_(generator=torch.Generator().manual_seed(number)).mul_(0.05)
            gate.warmth.fill_(0.1)
    between = BetweenSteps(model)
    between.begin(6 if ends == "earlier" else 4)
    for number in range(3):
        step(model, number)
    assert all(gate.warmth.item() == pytest.approx(0.1) for gate in gates_in_it(model))
    if ends == "from a checkpoint":
        kept, weights = between.state(), model.state_dict()
        model = wrapped().train()
        model.load_state_dict(weights)
        between = BetweenSteps(model)
        between.load(kept)
        between.begin(4)
    step(model, 3)
    if ends == "earlier":
        between.shorten(4)
    ids = torch.cat([texts(number) for number in range(4)])
    rows = kept_rows(ids)
    rows[:, -1] = False
    with torch.no_grad():
        out = model.base_model.model(input_ids=ids, output_hidden_states=True)
        right, head = out.logits[rows].argmax(-1), model.get_output_embeddings()
        for place, gate in zip((1, 3), gates_in_it(model)):
            wanted = least(head(gate(out.hidden_states[place][rows])), right)
            assert gate.temperature.item() == pytest.approx(wanted, rel=3e-3)


def texts(number: int) -> torch.Tensor:
    return 3 + torch.randint(60, (4, 40), generator=torch.Generator().manual_seed(number))


def gates_in_it(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Gate)]


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_the_engine_computes_what_torch_does(trained: tuple[Any, Path, Path], kind: str) -> None:
    model, folder, base = trained
    runner = open_model(base, runner=kind, dtype="fp32", cache_dtype="fp32").runner
    heads = read_exits(folder, runner)
    assert heads.layers == gates_in(folder) == (1, 3)
    x = torch.randn(5, 64)
    for gate in heads.layers:
        block = model.base_model.blocks[f"model.layers.{gate - 1}"].module
        with torch.no_grad():
            wanted = model.get_output_embeddings()(block.exit.gate["default"](x))
        assert np.abs(heads.logits(gate, runner.from_host(x.numpy())) - wanted.numpy()).max() < 1e-4
    runner.close()


def test_serving_leaves_early_below_a_threshold_and_never_at_one(trained: tuple[Any, Path, Path]) -> None:
    _, folder, base = trained
    with exact(base) as plain, exact(base, plugs=[f"exit_heads,heads={folder},threshold=1"]) as never:
        assert answers(never) == answers(plain)
        assert never.counts().plugged["exit_after_1"] == never.counts().plugged["exit_after_3"] == 0
    left = []
    for threshold in (0.9, 0.5, 0.1):
        with exact(base, plugs=[f"exit_heads,heads={folder},threshold={threshold}"]) as engine:
            answers(engine)
            counts = engine.counts().plugged
            left.append(counts["exit_after_1"] + counts["exit_after_3"])
    assert left == sorted(left) and left[-1] > left[0]


@pytest.mark.parametrize("sampling", [answering.GREEDY, answering.DRAWN], ids=["greedy", "drawn"])
def test_drafts_below_the_gate_change_nothing(trained: tuple[Any, Path, Path], sampling: Any) -> None:
    _, folder, base = trained
    with exact(base) as plain, exact(base, plugs=[f"exit_heads,heads={folder},exact=true,sure=0"]) as engine:
        assert answers(engine, sampling) == answers(plain, sampling)
        counts = engine.counts()
        assert 0 < counts.accepted_draft_tokens < counts.draft_tokens


def test_a_guess_that_is_not_sure_is_not_drafted(trained: tuple[Any, Path, Path]) -> None:
    _, folder, base = trained
    with exact(base) as plain, exact(base, plugs=[f"exit_heads,heads={folder},exact=true,sure=1"]) as engine:
        run, layers = engine.runner.run, [0]

        def counting(batch: Any, first: int = 0, last: int | None = None, hidden: Any = None) -> Any:
            layers[0] += (4 if last is None else last) - first
            return run(batch, first, last, hidden)

        engine.runner.run = counting  # type: ignore[method-assign]
        prompt = answering.PROMPTS[:1]
        assert answers(engine, prompts=prompt) == answers(plain, prompts=prompt)
        assert engine.counts().draft_tokens == 0 and layers[0] == 4 * 16 and engine.pool.used == 0


def test_a_norm_of_any_kind_is_read_as_it_is_trained(tmp_path: Path) -> None:
    """Some families keep the weight of a norm less one, some have a bias."""
    for family in (Gemma3ForCausalLM, GPT2LMHeadModel):
        torch.manual_seed(0)
        base = answering.folder(tmp_path / family.__name__, small(family))
        model = catalog.contract("adapters").wrap(
            catalog.module("exit_heads"), family.from_pretrained(base), {"gates": [1], "r": 4}
        )
        gate = next(m for m in model.modules() if isinstance(m, Gate))
        with torch.no_grad():
            for p in gate.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(str(tmp_path / "heads"))
        runner = open_model(base, runner="torch", dtype="fp32", cache_dtype="fp32").runner
        x = torch.randn(5, 64)
        with torch.no_grad():
            wanted = model.get_output_embeddings()(gate(x)).numpy()
        heads = read_exits(tmp_path / "heads", runner)
        assert np.abs(heads.logits(1, x) - wanted).max() < 1e-4
        assert heads.heads[1].temperature == pytest.approx(gate.temperature.item(), rel=1e-5)
        runner.close()


def small(family: Any) -> Any:
    """What makes a tiny model of a family; the options of others are passed over."""

    def make(**_: object) -> Any:
        if family is GPT2LMHeadModel:
            return family(GPT2Config(vocab_size=tiny.VOCAB, n_positions=128, n_embd=64, n_layer=3, n_head=4))
        return family(
            Gemma3TextConfig(
                vocab_size=tiny.VOCAB,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=3,
                head_dim=16,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                sliding_window=8,
            )  # fmt: skip
        )

    return make


def test_logits_that_are_changed_after_the_head_are_refused() -> None:
    model = catalog.contract("adapters").wrap(
        catalog.module("exit_heads"),
        GraniteForCausalLM(
            GraniteConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                logits_scaling=8.0,
            )  # fmt: skip
        ),
        {"gates": [1], "r": 4},
    )
    with pytest.raises(UsageError, match="after its head"):
        model(input_ids=tiny.batch(1, 8), labels=tiny.batch(1, 8))


def test_an_untrained_gate_is_refused(tmp_path: Path, trained: tuple[Any, Path, Path]) -> None:
    wrapped().save_pretrained(str(tmp_path))
    with pytest.raises(UsageError, match="never trained"):
        exact(trained[2], plugs=[f"exit_heads,heads={tmp_path}"])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"gates": [4]}, "do not stand below"), ({"gates": [3, 1]}, "not ascending"), ({"gates": [0]}, "gates=0"),
     ({"gates": []}, "empty"), ({"r": 0}, "r=0"), ({"weights": [1.0]}, "not as many")],
)  # fmt: skip
def test_gates_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        wrapped(**options)


def test_gates_stand_at_thirds_by_default() -> None:
    config: Any = wrapped(gates=None).peft_config["default"]
    assert config.gates == [1, 3] and ExitHeadsConfig().gates is None


@pytest.mark.parametrize(
    ("word", "said"),
    [("exit_heads", "needs heads"), ("exit_heads,heads=x,threshold=2", "threshold=2"), ("m2r2", "needs streams"),
     ("m2r2,streams=x,sure=-1", "sure=-1"), ("m2r2,streams=x,length=0", "length=0"),
     ("m2r2,streams=x,by=luck", "by=luck"), ("exit_heads,heads=/nowhere", "is not a folder"),
     ("m2r2,streams=/nowhere", "is not a folder")],
)  # fmt: skip
def test_settings_that_cannot_be(trained: tuple[Any, Path, Path], word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        exact(trained[2], plugs=[word])

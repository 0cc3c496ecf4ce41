"""MoLE beside the mixture it replaces: trained from nothing at equal steps, and converted from a trained one."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Work
from shoestring.lab import mixture
from shoestring.lab.arms import Arms
from shoestring.models import load
from shoestring.training import TrainOptions, train

_PAPER = (
    "substantially fewer parameters and less computation at performance comparable to a standard mixture of experts; "
    "no figure in the abstract"
)
_SIZES = "Mixtral of hidden 192, 3 layers of 16 experts of 96, top-2; one latent space of 96 for all 16 (k = 16)"
_SCRATCH = (
    _SIZES + "; from random weights, 60 steps of 4 x 256 tokens of Python documentation, float32, AdamW; held-out loss "
    "on the test part; each arm's learning rate the better of two, a factor of 2 apart, on validation data of seed 0"
)
_CONVERTED = (
    "the same mixture trained for a minute, then converted without weighting by inputs; held-out loss on the test part"
)
_NARROW = (
    ", k = 16 with a latent space of 24 and the down projections in one too: with one of 96 conversion adds next to "
    "nothing, and there is nothing to recover"
)
_SCALE = "real pretrained mixtures, of which no small one is at hand; savings in communication"
CLAIMS = (
    Claim(
        "parameters",
        paper=_PAPER,
        here=_SIZES + "; parameters of the experts",
        measure="expert_parameters",
        arm="mole-16",
        against="mixture",
        expect="<= 0.75",
    ),
    Claim(
        "quality",
        paper=_PAPER,
        here=_SCRATCH,
        measure="heldout_loss",
        arm="mole-16",
        against="mixture",
        expect="<= 1.03",
        cannot=_SCALE,
    ),
    Claim(
        "quality-of-small-groups",
        paper=_PAPER,
        here=_SCRATCH + "; groups of 4 in place of 16",
        measure="heldout_loss",
        arm="mole-4",
        against="mixture",
        expect="<= 1.03",
        cannot=_SCALE,
    ),
    Claim(
        "fewer-experts",
        paper=_PAPER,
        here=_SCRATCH + "; against a mixture of 12 experts, which has 6% more parameters in them",
        measure="heldout_loss",
        arm="mole-16",
        against="twelve",
        expect="< 1.0",
        cannot=_SCALE,
    ),
    Claim(
        "smaller-groups-lose-less",
        paper="a common space holds all experts exactly only if their null spaces meet; more experts meet in less",
        here=_CONVERTED + ", groups of 2 against groups of 4",
        measure="heldout_loss",
        arm="converted-2",
        against="converted-4",
        expect="< 1.0",
    ),
    Claim(
        "larger-groups-lose-more",
        paper="a common space holds all experts exactly only if their null spaces meet; more experts meet in less",
        here=_CONVERTED + ", groups of 4 against one of 16",
        measure="heldout_loss",
        arm="converted-4",
        against="converted-16",
        expect="< 1.0",
    ),
    Claim(
        "healing",
        paper=_PAPER,
        here=_CONVERTED
        + _NARROW
        + "; what the loss is above that of the mixture as it was, after 50 steps of 4 x 256 tokens on the "
        "experts alone against before them; the mixture gets no more steps, so this says that healing is enough",
        measure="loss_rise",
        arm="healed",
        against="narrow",
        expect="<= 0.5",
        cannot=_SCALE,
    ),
    Claim(
        "healing-beyond-training",
        paper=_PAPER,
        here=_CONVERTED
        + _NARROW
        + "; what the loss is above that of the mixture, where the experts of both have had the same 50 steps "
        "against where neither has: that part of the loss which training the mixture on would not have taken as well",
        measure="gap",
        arm="healed",
        against="narrow",
        expect="<= 0.5",
        cannot=_SCALE,
    ),
    Claim(
        "against-truncation",
        paper=_PAPER,
        here=_CONVERTED + ", k = 16, against cutting every gate and up projection alone to rank 36, as many parameters",
        measure="heldout_loss",
        arm="converted-16",
        against="truncated",
        expect="< 1.0",
        cannot=_SCALE,
    ),
)
RATES = {"mixture": 8e-3, "twelve": 8e-3, "mole-16": 4e-3, "mole-4": 4e-3}
TEST = 2  # part of the text


def run(arms: Arms) -> None:
    recipe = replace(mixture.FINE, batch=4, steps=arms.size(2, 60))
    for name, model in scratch(recipe, arms.seed):
        with arms.arm(name) as stage:
            mixture.fit(model, recipe, arms.seed, rate=RATES[name])
            _enter(stage, model, recipe, arms.size(2, 48))
        del model
    trained = replace(mixture.FINE, steps=2, batch=1) if arms.quick else mixture.FINE
    _convert(arms, load(mixture.mixture(trained, arms.seed), dtype="float32").model, trained)


def scratch(recipe: mixture.Recipe, seed: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """Every arm's model before its training."""
    yield "mixture", mixture.new(recipe, seed)
    yield "twelve", mixture.new(replace(recipe, experts=12), seed)
    said = {k: v for k, v in mixture.config(recipe).to_dict().items() if k not in ("model_type", "architectures")}
    for group in (16, 4):
        torch.manual_seed(seed)
        config = catalog.load("mole")(**said, experts_per_group=group)
        yield f"mole-{group}", AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _convert(arms: Arms, model: PreTrainedModel, recipe: mixture.Recipe) -> None:
    module, windows = catalog.module("mole"), arms.size(2, 48)
    before = mixture.heldout(model, recipe, windows, TEST)
    for group in (2, 4, 16):
        with arms.arm(f"converted-{group}") as stage:
            options = module.MoLEOptions(experts_per_group=group, allow_growth=True)
            made = module.convert(model, options, [])
            _enter(stage, made.model, recipe, windows, before)
            kept = [layer[part]["kept"] for layer in made.facts["layers"] for part in ("gate", "up")]
            stage.record("energy_kept", sum(kept) / len(kept), "share", "measured")
    whole = deepcopy(model)
    with arms.arm("truncated") as stage:
        _truncate(model, 36)
        _enter(stage, model, recipe, windows, before)
    del model
    with arms.arm("narrow") as stage:
        options = module.MoLEOptions(latent_dim=24, factor_down=True)
        made = module.convert(whole, options, [])
        stage.record("gap", _enter(stage, made.model, recipe, windows, before) - before, "nat", "measured")
    # Rows of the training text, drawn as training draws them.
    tokens, draw = mixture.stream(recipe.vocabulary), torch.Generator().manual_seed(arms.seed)
    starts = torch.randint(len(tokens) - recipe.length, (arms.size(4, 200),), generator=draw).tolist()
    rows = [{"input_ids": (ids := tokens[s : s + recipe.length].tolist()), "labels": ids} for s in starts]
    settings: dict[str, Any] = {"learning_rate": 1e-3, "warmup_ratio": 0.1, "save_steps": 0}
    settings["per_device_train_batch_size"] = 4
    with arms.arm("trained-on") as stage:
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_(".experts." in name)
        train(whole, rows, [], TrainOptions(seed=arms.seed, **settings), arms.folder / "more", ledger=arms.ledger)
        after = _enter(stage, whole.eval(), recipe, windows, before)
    with arms.arm("healed") as stage:
        work = Work(arms.ledger, arms.folder / "heal", training=settings, seed=arms.seed)
        module.heal(made, whole, options, rows, [], work)
        stage.record("gap", _enter(stage, made.model.eval(), recipe, windows, before) - after, "nat", "measured")


def _enter(stage: Any, model: PreTrainedModel, recipe: mixture.Recipe, windows: int, before: float = 0.0) -> float:
    loss = mixture.heldout(model, recipe, windows, TEST)
    stage.record("heldout_loss", loss, "nat", "measured")
    stage.record("loss_rise", loss - before, "nat", "measured")
    count = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    stage.record("expert_parameters", count, "parameter", "counted")
    return loss


@torch.no_grad()
def _truncate(model: PreTrainedModel, rank: int) -> None:
    """The nearest matrices of this rank to every gate and up projection."""
    for name, weight in model.named_parameters():
        if name.endswith("gate_up_proj"):
            u, sigma, v = torch.linalg.svd(torch.stack(weight.data.chunk(2, 1)), full_matrices=False)
            near = (u[..., :rank] * sigma[..., None, :rank]) @ v[..., :rank, :]
            weight.copy_(torch.cat(list(near), 1))

"""QMoE: how small the code is, how many weights become zero by themselves, what calibration saves of the quality."""

from dataclasses import replace

import torch

from shoestring import data
from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.core.step import Step, Work
from shoestring.kernels.formats import dictionary
from shoestring.lab import mixture
from shoestring.lab.arms import Arms
from shoestring.models import inspect, load

_PAPER = (
    "SwitchTransformer-c2048, 1.6T parameters, 3.2 TB: less than 160 GB (20x, 0.8 bits per parameter), minor accuracy "
    "loss, in less than a day on one GPU, with a run-time overhead below 5 % against ideal uncompressed execution"
)
_MIXTURE = (
    "a Mixtral of 22.3M parameters (hidden 512, 3 layers of 8 experts of 512, top-2) trained for two minutes on Python "
    "documentation, its experts drawn at first from Student's t with 8 degrees of freedom; calibrated on 128 examples; "
)
_LARGE = "trillions of parameters; large mixtures stand ternary weights far better than small ones"
_RECIPE = replace(mixture.WIDE, hidden=512, inner=512, heads=8)  # 64 bits a row are 1/8 of a bit a weight
CLAIMS = (
    Claim(
        "format",
        paper=_PAPER,
        here="random ternary matrices of 768 x 3072 with 88.5% zeros; all bytes over all weights",
        measure="bits_per_weight",
        arm="code",
        against="plain",
        expect="<= 0.05",
    ),
    Claim(
        "natural-zeros",
        paper="the natural sparsity of ternary experts is close to 90 %; the dictionary is made for 88.5 %",
        here="SmolLM2-135M-Instruct, rows of every second block's gate, up and down projections on grids of their ends",
        measure="zeros",
        arm="smollm2",
        against="dictionary",
        expect=">= 1.0",
        cannot="the paper's own experts, which are not at hand",
    ),
    Claim(
        "calibration",
        paper=_PAPER,
        here=_MIXTURE + "held-out loss of ternary experts, GPTQ against rounding to the nearest, nats a token",
        measure="heldout_loss",
        arm="gptq",
        against="nearest",
        expect="< 0",
        by="difference",
        cannot=_LARGE,
    ),
    Claim(
        "recovery",
        paper=_PAPER,
        here=_MIXTURE + "what the held-out loss rises by, GPTQ over rounding to the nearest",
        measure="loss_rise",
        arm="gptq",
        against="nearest",
        expect="<= 0.5",
        cannot=_LARGE,
    ),
    Claim(
        "below-one-bit",
        paper=_PAPER,
        here=_MIXTURE + "all bytes of the experts over their weights, against bfloat16",
        measure="expert_bits",
        arm="gptq",
        against="plain",
        expect="< 0.0625",
        cannot=_LARGE,
    ),
    Claim(
        "twenty-times",
        paper=_PAPER,
        here=_MIXTURE + "bytes of the experts in memory, against bfloat16; 64 bits a row weigh more on rows of 512",
        measure="expert_bytes",
        arm="gptq",
        against="plain",
        expect="<= 0.05",
        cannot=_LARGE,
    ),
    Claim(
        "speed",
        paper=_PAPER,
        here="not measured",
        measure="seconds",
        cannot="the overhead is that of a GPU kernel against execution on weights that fit into no machine",
    ),
)


def run(arms: Arms) -> None:
    _format(arms)
    _natural(arms)
    recipe = replace(_RECIPE, steps=2, batch=1) if arms.quick else _RECIPE
    source = mixture.mixture(recipe, arms.seed)
    windows = arms.size(2, 48)
    with arms.arm("plain") as stage:
        model = load(source, dtype="float32").model
        loss = mixture.heldout(model, recipe, windows)
        experts = [p.numel() for p in model.parameters() if p.dim() == 3]
        stage.record("heldout_loss", loss, "nat", "measured")
        stage.record("expert_bits", 16, "bit", "counted")
        stage.record("expert_bytes", 2 * sum(experts), "B", "counted")
        del model
    contract, module = catalog.contract("quantizers"), catalog.module("qmoe")
    train = data.split(data.read(mixture.DATA), seed=0)[0]
    some = train.part(train.examples[arms.seed :: len(train) // 128][: arms.size(2, 128)])
    for rounding in ("gptq", "nearest"):
        with arms.arm(rounding) as stage:
            folder, work = arms.folder / rounding, Work(arms.ledger, arms.folder / "work", train=some, seed=arms.seed)
            facts = contract.apply(module, Step("compress", "qmoe", {"rounding": rounding}), source, folder, work)
            model = load(folder, dtype="float32").model
            found = mixture.heldout(model, recipe, windows)
            held = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if ".experts." in n)
            stage.record("heldout_loss", found, "nat", "measured")
            stage.record("loss_rise", found - loss, "nat", "measured")
            stage.record("expert_bits", facts["expert_bits"], "bit", "counted")
            stage.record("expert_bytes", held, "B", "counted")
            stage.record("zeros", facts["zeros"], "share", "counted")
            del model


def _format(arms: Arms) -> None:
    with arms.arm("plain") as stage:
        stage.record("bits_per_weight", 16, "bit", "counted")
    with arms.arm("code") as stage:
        rows, columns = 768, 3072
        draw = torch.rand(rows, columns, generator=torch.Generator().manual_seed(arms.seed))
        symbols = torch.where(draw < 0.885, 0, torch.where(draw < 0.9425, 1, 2)).to(torch.uint8)
        packed = dictionary.encode(symbols, -torch.ones(rows), torch.ones(rows))
        stage.record("bits_per_weight", 8 * len(packed) / (rows * columns), "bit", "counted")


def _natural(arms: Arms) -> None:
    with arms.arm("dictionary") as stage:
        stage.record("zeros", 0.885, "share", "counted")
    with arms.arm("smollm2") as stage:
        model = arms.load().model
        zeros = weights = 0
        for block in inspect(model).blocks[arms.seed % 2 :: arms.size(15, 2)]:
            for role in ("gate", "up", "down"):
                weight = model.get_submodule(block.projections[role]).weight.float()
                zeros += int((dictionary.to_symbols(weight, *dictionary.ends(weight)) == 0).sum())
                weights += weight.numel()
        stage.record("zeros", zeros / weights, "share", "counted")

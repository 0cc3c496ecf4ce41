"""What a mapping flow saves: cycles in a simulated circuit, instructions and bytes counted, times of a model."""

from functools import cache
from typing import Any

import numpy as np

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.jobs.evaluate import compare
from shoestring.lab.arms import MODEL, Arms
from shoestring.lab.rounded import matrices
from shoestring.methods.mapping import _rtl, _sparse, _timing
from shoestring.methods.mapping._ir import LLAMA2_7B
from shoestring.methods.mapping._targets import TARGETS
from shoestring.methods.mapping._templates import APART, OURS, PUBLISHED, Schedule
from shoestring.models import resolve

_CIRCUIT = (
    "a unit of 4 groups x 2 multipliers for blocks of 8 x 8 in Amaranth's simulator, sums exact, 16 outputs in two "
    "strips over 512 inputs; cycles from start to the last sum"
)
_TIMES = (
    "LLaMA2-7B by its sizes, the published schedule and board (VHK158), modelled with the published constant 3.2; the "
    "worst of |ours / theirs| or its inverse"
)
CLAIMS = (
    Claim(
        "half",
        paper="1.6x computation efficiency from sparse DSP chains; the cycles fall in proportion to N/M",
        here=_CIRCUIT + "; 4 of 8 kept against all",
        measure="cycles",
        arm="4:8",
        against="8:8",
        expect="<= 0.525",
    ),
    Claim(
        "quarter",
        paper="1.6x computation efficiency from sparse DSP chains; the cycles fall in proportion to N/M",
        here=_CIRCUIT + "; 2 of 8 kept against all",
        measure="cycles",
        arm="2:8",
        against="8:8",
        expect="<= 0.2625",
    ),
    Claim(
        "multipliers",
        paper="the sparse chain reuses the DSPs of the dense one",
        here="the unit with 2 groups and a window of 4, synthesised by yosys for UltraScale+; DSP48E2 cells with muxes "
        "and breaks against the same without",
        measure="multipliers",
        arm="sparse",
        against="without muxes",
        expect="<= 1.0",
        cannot="place and route: clock and watts of a real board",
    ),
    Claim(
        "decode",
        paper="profile of the authors: 9.28 ms a token at 144 positions, 9.81 at 512, 10.62 at 1,024, 12.23 at 2,048",
        here=_TIMES,
        measure="worst_ratio_decode",
        arm="modelled",
        against="published",
        expect="<= 1.05",
    ),
    Claim(
        "prefill",
        paper="profile of the authors: 289.9 ms for 128 tokens, 1,181.4 for 512",
        here=_TIMES,
        measure="worst_ratio_prefill",
        arm="modelled",
        against="published",
        expect="<= 1.05",
    ),
    Claim(
        "storage",
        paper="about 500x less instruction storage (from ~TB to ~GB for lengths up to 2,048)",
        here="SmolLM2-135M, decode, every length up to 2,048, u280: buckets of 16, one stream for the cores and one "
        "load for the channels against a stream for each length; bytes of compiled streams",
        measure="instruction_bytes",
        arm="adaptive",
        against="every length",
        expect="<= 0.0625",
    ),
    Claim(
        "traffic",
        paper="decode stays on chip: only weights and cache cross the memory",
        here="SmolLM2-135M, decode at 512 positions, u280: bytes of activations to and from memory in the compiled "
        "program, on chip against operator by operator",
        measure="activation_bytes",
        arm="on chip",
        against="apart",
        expect="<= 0.5",
    ),
    Claim(
        "bandwidth",
        paper="bandwidth use 35.6 % -> 65.9 %",
        here="the same two programs, modelled: share of the time in which loads are under way",
        measure="loading",
        arm="on chip",
        against="apart",
        expect="> 1.0",
    ),
    Claim(
        "quality",
        paper="no figure for models this small; LLaMA2-7B and OPT-6.7B keep their accuracy",
        here="SmolLM2-135M-Instruct, every linear layer at 8 of 16 by magnitude and 4 bits with a scale per output, "
        "untrained after it; perplexity on held-out answers against float32",
        measure="perplexity",
        arm="pruned and rounded",
        against="original",
        expect="<= 1.1",
    ),
    Claim(
        "board",
        paper="6.0x energy and 1.8x cost efficiency against V100S; 1.2x the throughput of A100",
        here="not shown: there is no board",
        measure="",
        cannot="energy, money and any comparison with a GPU; times of boards are modelled, never measured",
    ),
)

DECODE_MS = {144: 9.28, 512: 9.81, 1024: 10.62, 2048: 12.23}
PREFILL_MS = {128: 289.9, 512: 1181.4}


def run(arms: Arms) -> None:
    circuit(arms)
    times(arms)
    counted(arms)
    quality(arms)


def circuit(arms: Arms) -> None:
    """Cycles and multipliers of the circuit; its sums are held against numpy's."""
    rng = np.random.default_rng(arms.seed)
    inputs = arms.size(128, 512)
    for keep in (8, 4, 2):
        with arms.arm(f"{keep}:8") as stage:
            cycles = 0
            for _ in range(2):
                weights = _strip(rng, inputs, keep)
                activations = rng.integers(-128, 128, (2, inputs)).astype(np.int8)
                sums, taken = _rtl.run(weights, activations, np.full(inputs // 8, keep))
                assert (sums == activations.astype(np.int64) @ weights.astype(np.int64).T).all()
                cycles += taken
            stage.record("cycles", cycles, "cycle", "counted", "simulation of the circuit")
    if arms.quick:  # synthesis takes half a minute a circuit
        return
    for name, sparse in (("sparse", True), ("without muxes", False)):
        with arms.arm(name) as stage:
            stage.record("multipliers", _multipliers(sparse), "DSP48E2", "counted", "yosys synth_xilinx -family xcup")


# What no seed changes is worked out once.


@cache
def _multipliers(sparse: bool) -> int:
    return _rtl.synthesised(2, 4, sparse=sparse).get("DSP48E2", 0)


@cache
def _milliseconds(mode: str, length: int) -> float:
    config = catalog.load("flightllm")(head_bits=4)
    of, board = config.matrices(LLAMA2_7B), TARGETS["vhk158"]
    return 1e3 * _timing.modelled(LLAMA2_7B, board, mode, length, of, schedule=PUBLISHED).seconds


@cache
def _stored(limit: int) -> Any:
    flightllm = catalog.module("flightllm")
    return flightllm.storage(flightllm.network(resolve(MODEL)), flightllm.example(), TARGETS["u280"], limit)


_rounded: dict[str, Any] = {}


def _strip(rng: np.random.Generator, inputs: int, keep: int) -> np.ndarray:
    weights = rng.integers(1, 128, (8, inputs)) * rng.choice((-1, 1), (8, inputs))
    places = np.argsort(rng.random((8, inputs // 8, 8)), -1)
    return np.where(places.reshape(8, inputs) < keep, weights, 0).astype(np.int8)


def times(arms: Arms) -> None:
    """Modelled times beside those that the authors' profile printed."""
    rows = (("decode", DECODE_MS, arms.size(1, 4)), ("prefill", PREFILL_MS, arms.size(0, 2)))
    for mode, published, count in rows:
        ratios = [1.0]
        with arms.arm("modelled") as stage:
            for length, ms in list(published.items())[:count]:
                found = _milliseconds(mode, length)
                stage.record(f"{mode}_{length}", found / 1e3, "s", "modelled", "clock over compiled instructions")
                ratios += [found / ms, ms / found]
            stage.record(f"worst_ratio_{mode}", max(ratios), "ratio", "modelled")
        with arms.arm("published") as stage:
            stage.record(f"worst_ratio_{mode}", 1.0, "ratio", "declared", "the authors' repository")


def counted(arms: Arms) -> None:
    """Bytes of instruction streams, and of what decode moves."""
    flightllm, board = catalog.module("flightllm"), TARGETS["u280"]
    config, network = flightllm.example(), flightllm.network(resolve(MODEL))
    stored = _stored(arms.size(128, 2048))
    for name, size in (("adaptive", stored.merged), ("every length", stored.every)):
        with arms.arm(name) as stage:
            stage.record("instruction_bytes", size, "B", "counted")
    schedules: dict[str, Schedule] = {"on chip": OURS, "apart": APART}
    for name, schedule in schedules.items():
        with arms.arm(name) as stage:
            found = _timing.modelled(network, board, "decode", 512, config.matrices(network), schedule=schedule)
            stage.record("activation_bytes", found.moved["activations"], "B", "counted", "of the compiled program")
            stage.record("loading", found.busy["LD"], "share", "modelled")
            stage.record("tokens_per_s", 1 / found.seconds, "token/s", "modelled")


def quality(arms: Arms) -> None:
    """Perplexity of the default model as it is, and pruned and rounded as the accelerator stores it."""
    import torch

    reference = arms.load(dtype="float32")
    rows = arms.docs(reference.tokenizer, {"test": arms.size(2, 16)})["test"].rows
    model = arms.load(dtype="float32").model
    with arms.arm("pruned and rounded") as stage, torch.no_grad():
        for name, layer in matrices(model, range(arms.size(1, 1 << 10))).items():
            if name not in _rounded:
                _rounded[name] = _sparse.pack(layer.weight.numpy(), bits=4, keep=0.5)
            packed = _rounded[name]
            layer.weight.copy_(torch.from_numpy(packed.integers * packed.scales[:, None]))
        found = compare(model, reference.model, rows)
        stage.record("perplexity", found.model.perplexity.value, "perplexity", "measured")
    with arms.arm("original") as stage:
        stage.record("perplexity", found.reference.perplexity.value, "perplexity", "measured")

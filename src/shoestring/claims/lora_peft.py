"""peft's own tuners beside each other: what each trains, saves and holds, and whether its formula counts exactly."""

import time
from functools import cache
from typing import Any

import torch

from shoestring.core import catalog
from shoestring.core.claim import Claim
from shoestring.lab.arms import MODEL, Arms

METHODS = (
    "dora",
    "rslora",
    "pissa",
    "olora",
    "adalora",
    "ia3",
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
    "adaption_prompt",
    "vera",
    "randlora",
    "loha",
    "lokr",
    "oft",
    "boft",
    "hra",
    "fourierft",
    "waveft",
    "c3a",
    "road",
    "miss",
    "shira",
    "vblora",
    "unilora",
    "tinylora",
    "delora",
    "gralora",
    "hira",
    "psoft",
    "ln_tuning",
    "trainable_tokens",
    "lily",
    "osf",
)
_NONE = "none: a survey, whose table names families and where they act"
_COUNT = (
    "SmolLM2-135M-Instruct, the method's first settings; parameters counted in the built model against its formula. "
    + "No seed enters, so it is counted once a run, without reading weights where the tuner can be built so"
)
_STEP = "SmolLM2-135M-Instruct, AdamW, steps on 2 x 64 tokens of Python documentation; the first settings"
_PEAK = _STEP + "; memory beyond the loaded model, against training all weights"
_TIME = _STEP + "; the shortest of 3 steps, against training all weights"
_FILE = "SmolLM2-135M-Instruct, the first settings; bytes of the saved adapter against those of the model's weights"
# fmt: off
CLAIMS = (
    Claim(
        "every count", _NONE, _COUNT + "; how many of the methods differ", "counts_that_differ", "counted", "formula",
        "<= 0", "difference",
    ),
    Claim("dora", _NONE, _COUNT, "dora", "counted", "formula", "<= 1.0001"),
    Claim("rslora", _NONE, _COUNT, "rslora", "counted", "formula", "<= 1.0001"),
    Claim("pissa", _NONE, _COUNT, "pissa", "counted", "formula", "<= 1.0001"),
    Claim("olora", _NONE, _COUNT, "olora", "counted", "formula", "<= 1.0001"),
    Claim("adalora", _NONE, _COUNT, "adalora", "counted", "formula", "<= 1.0001"),
    Claim("ia3", _NONE, _COUNT, "ia3", "counted", "formula", "<= 1.0001"),
    Claim("prompt_tuning", _NONE, _COUNT, "prompt_tuning", "counted", "formula", "<= 1.0001"),
    Claim("prefix_tuning", _NONE, _COUNT, "prefix_tuning", "counted", "formula", "<= 1.0001"),
    Claim("p_tuning", _NONE, _COUNT, "p_tuning", "counted", "formula", "<= 1.0001"),
    Claim("adaption_prompt", _NONE, _COUNT, "adaption_prompt", "counted", "formula", "<= 1.0001"),
    Claim("vera", _NONE, _COUNT, "vera", "counted", "formula", "<= 1.0001"),
    Claim("randlora", _NONE, _COUNT, "randlora", "counted", "formula", "<= 1.0001"),
    Claim("loha", _NONE, _COUNT, "loha", "counted", "formula", "<= 1.0001"),
    Claim("lokr", _NONE, _COUNT, "lokr", "counted", "formula", "<= 1.0001"),
    Claim("oft", _NONE, _COUNT, "oft", "counted", "formula", "<= 1.0001"),
    Claim("boft", _NONE, _COUNT, "boft", "counted", "formula", "<= 1.0001"),
    Claim("hra", _NONE, _COUNT, "hra", "counted", "formula", "<= 1.0001"),
    Claim("fourierft", _NONE, _COUNT, "fourierft", "counted", "formula", "<= 1.0001"),
    Claim("waveft", _NONE, _COUNT, "waveft", "counted", "formula", "<= 1.0001"),
    Claim("c3a", _NONE, _COUNT, "c3a", "counted", "formula", "<= 1.0001"),
    Claim("road", _NONE, _COUNT, "road", "counted", "formula", "<= 1.0001"),
    Claim("miss", _NONE, _COUNT, "miss", "counted", "formula", "<= 1.0001"),
    Claim("shira", _NONE, _COUNT, "shira", "counted", "formula", "<= 1.0001"),
    Claim("vblora", _NONE, _COUNT, "vblora", "counted", "formula", "<= 1.0001"),
    Claim("unilora", _NONE, _COUNT, "unilora", "counted", "formula", "<= 1.0001"),
    Claim("tinylora", _NONE, _COUNT, "tinylora", "counted", "formula", "<= 1.0001"),
    Claim("delora", _NONE, _COUNT, "delora", "counted", "formula", "<= 1.0001"),
    Claim("gralora", _NONE, _COUNT, "gralora", "counted", "formula", "<= 1.0001"),
    Claim("hira", _NONE, _COUNT, "hira", "counted", "formula", "<= 1.0001"),
    Claim("psoft", _NONE, _COUNT, "psoft", "counted", "formula", "<= 1.0001"),
    Claim("ln_tuning", _NONE, _COUNT, "ln_tuning", "counted", "formula", "<= 1.0001"),
    Claim("trainable_tokens", _NONE, _COUNT, "trainable_tokens", "counted", "formula", "<= 1.0001"),
    Claim("lily", _NONE, _COUNT, "lily", "counted", "formula", "<= 1.0001"),
    Claim("osf", _NONE, _COUNT, "osf", "counted", "formula", "<= 1.0001"),
    Claim("dora, memory", _NONE, _PEAK, "peak_memory_above_floor", "dora", "full", "<= 0.6"),
    Claim("dora, time", _NONE, _TIME, "step_seconds", "dora", "full", "<= 1.0"),
    Claim("dora, file", _NONE, _FILE, "adapter_bytes", "dora", "full", "<= 0.1"),
    Claim("ia3, memory", _NONE, _PEAK, "peak_memory_above_floor", "ia3", "full", "<= 0.6"),
    Claim("ia3, time", _NONE, _TIME, "step_seconds", "ia3", "full", "<= 1.0"),
    Claim("ia3, file", _NONE, _FILE, "adapter_bytes", "ia3", "full", "<= 0.1"),
    Claim("prompt_tuning, memory", _NONE, _PEAK, "peak_memory_above_floor", "prompt_tuning", "full", "<= 0.6"),
    Claim("prompt_tuning, time", _NONE, _TIME, "step_seconds", "prompt_tuning", "full", "<= 1.0"),
    Claim("prompt_tuning, file", _NONE, _FILE, "adapter_bytes", "prompt_tuning", "full", "<= 0.1"),
    Claim("prefix_tuning, memory", _NONE, _PEAK, "peak_memory_above_floor", "prefix_tuning", "full", "<= 0.6"),
    Claim("prefix_tuning, time", _NONE, _TIME, "step_seconds", "prefix_tuning", "full", "<= 1.0"),
    Claim("prefix_tuning, file", _NONE, _FILE, "adapter_bytes", "prefix_tuning", "full", "<= 0.1"),
    Claim("vera, memory", _NONE, _PEAK, "peak_memory_above_floor", "vera", "full", "<= 0.6"),
    Claim("vera, time", _NONE, _TIME, "step_seconds", "vera", "full", "<= 1.0"),
    Claim("vera, file", _NONE, _FILE, "adapter_bytes", "vera", "full", "<= 0.1"),
    Claim("ln_tuning, memory", _NONE, _PEAK, "peak_memory_above_floor", "ln_tuning", "full", "<= 0.6"),
    Claim("ln_tuning, time", _NONE, _TIME, "step_seconds", "ln_tuning", "full", "<= 1.0"),
    Claim("ln_tuning, file", _NONE, _FILE, "adapter_bytes", "ln_tuning", "full", "<= 0.1"),
    Claim("lily, memory", _NONE, _PEAK, "peak_memory_above_floor", "lily", "full", "<= 0.6"),
    Claim("lily, time", _NONE, _TIME, "step_seconds", "lily", "full", "<= 1.0"),
    Claim("lily, file", _NONE, _FILE, "adapter_bytes", "lily", "full", "<= 0.1"),
)
# fmt: on
_AT_WORK = ("full", "dora", "ia3", "prompt_tuning", "prefix_tuning", "vera", "ln_tuning", "lily")
_NEED_WEIGHTS = ("boft", "shira", "unilora")  # peft reads values while it builds these


def run(arms: Arms) -> None:
    counts = _counts(arms.quick)
    for place, arm in enumerate(("counted", "formula")):
        with arms.arm(arm) as stage:
            for name, pair in counts.items():
                stage.record(name, pair[place], "parameter", "counted")
            differ = 0 if place else sum(a != b for a, b in counts.values())
            stage.record("counts_that_differ", differ, "method", "counted")
    for name in _AT_WORK[: arms.size(2, len(_AT_WORK))]:
        _at_work(arms, name)


@cache
def _counts(quick: bool) -> dict[str, tuple[int, int]]:
    """Trained parameters as counted and as the price says, by method. The quick size builds two layers only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from shoestring.models import load, resolve, shape_of

    config = AutoConfig.from_pretrained(resolve(MODEL))
    if quick:
        config.num_hidden_layers, config.layer_types = 2, None
    with torch.device("meta"):
        shape = shape_of(AutoModelForCausalLM.from_config(config))
    found = {}
    for name in METHODS:
        module, door = catalog.module(name), catalog.contract("adapters")
        if name in _NEED_WEIGHTS:
            model = AutoModelForCausalLM.from_config(config) if quick else load(MODEL).model
            wrapped = door.wrap(module, model, {})
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
                wrapped = door.wrap(module, model, {})
        counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        found[name] = counted, module.price(shape, {}).trainable
    return found


def _at_work(arms: Arms, name: str) -> None:
    """Steps on one batch: extra memory, time and, for an adapter, bytes on disk."""
    loaded = arms.load(dtype="float32")
    model: Any = loaded.model
    rows = arms.docs(loaded.tokenizer, {"train": 32}, max_length=64)["train"].rows
    ids = torch.tensor([row["input_ids"][:64] for row in rows if len(row["input_ids"]) >= 64][:2])
    with arms.arm(name) as stage:
        if name != "full":
            model = catalog.contract("adapters").wrap(catalog.module(name), model, {})
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-4)
        seconds = []
        for _ in range(arms.size(2, 4)):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        stage.record("step_seconds", min(seconds[1:]), "s", "measured", "the shortest of 3 after one to warm up")
        stage.record("trainable_parameters", sum(p.numel() for p in trained), "parameter", "counted")
    if name == "full":
        size = sum(p.numel() for p in model.parameters()) * 4
    else:
        model.save_pretrained(str(arms.folder / name))
        size = (arms.folder / name / "adapter_model.safetensors").stat().st_size
    with arms.arm(name) as stage:
        stage.record("adapter_bytes", size, "B", "counted")

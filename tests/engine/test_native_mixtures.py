"""Mixtures of experts as they are stored: apart, in one tensor, packed, of unequal layers; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from runner_cases import Part, batch, in_chunks, logits, make, off, own, pages, text
from safetensors.torch import load_file, save_file

from shoestring.core import catalog
from shoestring.core.errors import UsageError
from shoestring.engine.adapter_forms import NotBeside
from shoestring.engine.engine import Engine
from shoestring.engine.native_runner import NativeRunner
from shoestring.engine.open import open_model
from shoestring.engine.request import Sampling
from shoestring.kernels import formats
from shoestring.methods.quantizers import qmoe
from shoestring.models import anatomy, regrouped, surgery
from shoestring.models.llama_like import NotNative
from shoestring.models.packed import PARTS, ROOM, PackedConfig, mark
from shoestring.models.seal import seal

EXACT, NEAR = 1e-5, 0.05  # where pages are float32: the same arithmetic in another order; activations of eight bits
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dots1")
REGROUPED = regrouped.FAMILIES


def opened(folder: Path, **options: Any) -> NativeRunner:
    runner = NativeRunner(folder, **{"threads": 2, "cache_dtype": "fp32", **options})
    runner.reserve(8)
    return runner


def found_in(folder: Path, count: int = 40, **options: Any) -> np.ndarray:
    return logits(opened(folder, **options), Part(text(count), pages(count)))


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(family: str = "mixtral", **changes: Any) -> Path:
        make(family, **changes).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- as they are stored ----


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_one_tensor_are_those_that_stand_apart(saved: Callable[..., Path], family: str) -> None:
    folder = saved(family)
    apart = found_in(folder)
    model = make(family)
    rewrite(folder, lambda _: dict(model.state_dict()))
    assert any("gate_up_proj" in name for name in load_file(folder / "model.safetensors"))
    np.testing.assert_array_equal(found_in(folder), apart)
    assert off(apart, own(model, text(40))) < EXACT


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_half_precision_experts_in_one_tensor(saved: Callable[..., Path], dtype: str) -> None:
    folder = saved("qwen2_moe")
    half = make("qwen2_moe").half()
    rewrite(folder, lambda _: dict(half.state_dict()))
    runner = opened(folder, dtype=dtype)
    assert runner.facts.precision == dtype
    ids = text(40)
    found = logits(runner, Part(ids, pages(40)))
    # A router may choose another expert after the rounding to bfloat16, here of few tokens.
    far = np.abs(found - own(half.float(), ids)).max(1) > 0.2
    assert far.mean() < (0.001 if dtype == "fp32" else 0.2)


MOLE = catalog.module("mole")
GROUPS: dict[str, dict[str, Any]] = {
    "all": {}, "pairs": {"experts_per_group": 2}, "each": {"experts_per_group": 1},
    "wide": {"experts_per_group": 4, "latent_dim": 57}, "down": {"factor_down": True, "latent_dim": 30},
    "down of pairs": {"factor_down": True, "experts_per_group": 2, "latent_dim": 50},
}  # fmt: skip


def latent_of(family: str, chosen: int = 3, **options: Any) -> Any:
    """A mixture whose experts share latent spaces; a token meets so many of four."""
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": chosen}
    return MOLE.convert(make(family, **sizes), MOLE.MoLEOptions(allow_growth=True, **options), []).model


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("family", MOLE.FAMILIES)
def test_experts_may_share_latent_spaces(tmp_path: Path, family: str, groups: str) -> None:
    model = latent_of(family, **GROUPS[groups])
    model.save_pretrained(tmp_path / "latent")
    runner = opened(tmp_path / "latent")
    stored = load_file(tmp_path / "latent" / "model.safetensors")
    assert runner.facts.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    ids = text(60)
    found = logits(runner, Part(ids, pages(60)))
    wanted = own(model, ids)
    assert off(found, wanted) < EXACT and (found.argmax(1) == wanted.argmax(1)).all()
    np.testing.assert_array_equal(in_chunks(runner, ids, pages(60, 4), [1, 1, 5, 20, 33]), found)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", ["pairs", "down of pairs"])
def test_latent_experts_of_sixteen_bits(tmp_path: Path, kind: torch.dtype, groups: str) -> None:
    model = latent_of("mixtral", 4, **GROUPS[groups])
    model.save_pretrained(tmp_path / "latent")
    rewrite(tmp_path / "latent", lambda tensors: {name: tensor.to(kind) for name, tensor in tensors.items()})
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).float()
    runner = opened(tmp_path / "latent")
    assert runner.facts.precision == ("bf16" if kind is torch.bfloat16 else "fp32")
    ids = text(40)
    found = logits(runner, Part(ids, pages(40)))
    assert off(found, own(model, ids)) < (NEAR if kind is torch.bfloat16 else EXACT)


@pytest.mark.parametrize("groups", ["pairs", "down"])
def test_latent_experts_stand_beside_packed_layers(tmp_path: Path, groups: str) -> None:
    model = latent_of("qwen2_moe", 4, **GROUPS[groups])
    model.save_pretrained(tmp_path / "packed")
    format = formats.parse("int8/32")
    packing: dict[str, str] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if name == module or ".self_attn." not in name or tensor.dim() == 1:
                made[name] = tensor
                continue
            packing[module] = "int8/32+bias" if f"{module}.bias" in tensors else "int8/32"
            parts = format.pack(tensor)
            model.get_submodule(module).weight.data = format.unpack(parts, tensor.shape[1])
            made |= {f"{module}.{leaf}": value for leaf, value in parts.items()}
        return made

    rewrite(tmp_path / "packed", pack)
    configure(tmp_path / "packed", quantization_config={"quant_method": "shoestring_packed", "packing": packing})
    runner = opened(tmp_path / "packed")
    assert runner.facts.precision == "fp32 + int8"
    ids = text(40)
    assert off(logits(runner, Part(ids, pages(40))), own(model, ids)) < NEAR


LATENT_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"experts_per_group": 3}, "4 experts do not make groups of 3"),
    "larger groups": ({"experts_per_group": 8}, "4 experts do not make groups of 8"),
    "no number": ({"experts_per_group": "2"}, "experts_per_group"),
    "size": ({"latent_dim": 65}, "latent_dim=65"),
    "another size": ({"latent_dim": 20}, r"own_gate .*\(4, 96, 24\)"),
    "less than none": ({"latent_dim": -1}, "latent_dim"),
    "fewer groups": ({"experts_per_group": 4}, r"shared_gate .*\(2, 24, 64\)"),
    "down": ({"factor_down": 1}, "factor_down"),
    "no down": ({"factor_down": False}, "down_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENT_LIES)
def test_latent_spaces_that_cannot_be(tmp_path: Path, name: str) -> None:
    changes, said = LATENT_LIES[name]
    latent_of("mixtral", experts_per_group=2, latent_dim=24, factor_down=True).save_pretrained(tmp_path / "latent")
    opened(tmp_path / "latent")
    configure(tmp_path / "latent", **changes)
    with pytest.raises(UsageError, match=said):
        opened(tmp_path / "latent")


def test_latent_spaces_of_another_family(tmp_path: Path) -> None:
    latent_of("mixtral").save_pretrained(tmp_path / "latent")
    configure(tmp_path / "latent", model_type="shoestring_mole_other")
    with pytest.raises(NotNative, match="MoLEMixtral"):
        opened(tmp_path / "latent")


def test_bytes_of_the_weights_are_all_counted(saved: Callable[..., Path]) -> None:
    for family in ("mixtral", "qwen2_moe", "dots1"):
        folder = saved(family)
        stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
        assert opened(folder).facts.weight_bytes == stored


def qmoe_of(model: Any, folder: Path, leave: str = "-") -> Any:
    """The model with ternary experts, saved, except in layers whose name has `leave` in it."""
    config = qmoe.QMoEConfig(rounding="nearest")
    for name, experts in list(qmoe._experts(model)):
        if leave not in name:
            count, width = len(experts.get_parameter(anatomy.GATE_UP)), model.config.hidden_size
            packed, _, _ = qmoe._compressed(experts, torch.randn(8, width), torch.zeros(8, 2).long(), config)
            assert packed.num_experts == count
            surgery.replace_module(model, name, packed)
    mark(model, config)
    model.save_pretrained(folder)
    seal(folder, ROOM)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("leave", ["-", "layers.2."])
def test_ternary_experts_stay_in_their_code(tmp_path: Path, family: str, leave: str) -> None:
    model = qmoe_of(make(family), tmp_path / "packed", leave)
    runner = opened(tmp_path / "packed")
    assert runner.facts.precision == "fp32 + dictionary"
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert runner.facts.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    ids = text(40)
    found = logits(runner, Part(ids, pages(40)))
    assert off(found, own(model, ids)) < EXACT
    np.testing.assert_array_equal(in_chunks(runner, ids, pages(40, 4), [1, 1, 5, 20, 13]), found)


@pytest.mark.parametrize("spec", ["int8/32", "int4/64", "binary3o/32", "sparse"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_stand_apart_may_be_packed(tmp_path: Path, family: str, spec: str) -> None:
    """As any other layer: the packing names each, by its module. Tokens meet all here, none by a narrow choice."""
    model = make(family, num_experts=2, num_local_experts=2, num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "packed")
    model = model.half().float().bfloat16().float() if spec == "sparse" else model
    packing: dict[str, str] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if ".experts." not in name and "shared_expert." not in name:
                made[name] = tensor
                continue
            format = formats.parse("sparse/0" if spec == "sparse" else spec)
            parts = format.pack(tensor.bfloat16() if spec == "sparse" else tensor)
            said = f"sparse/{parts['weight'].numel()}" if spec == "sparse" else spec
            packing[module.replace("block_sparse_moe", "mlp")] = said
            plain = formats.parse(said).unpack(parts, tensor.shape[1])
            _put(model, module, plain)
            made |= {f"{module}.{leaf}": value for leaf, value in parts.items()}
        return made

    rewrite(tmp_path / "packed", pack)
    configure(tmp_path / "packed", quantization_config={"quant_method": "shoestring_packed", "packing": packing})
    runner = opened(tmp_path / "packed")
    assert runner.facts.precision == f"fp32 + {spec.partition('/')[0].rstrip('o')}"
    ids = text(40)
    assert off(logits(runner, Part(ids, pages(40))), own(model, ids)) < NEAR


SPECS = (
    "int8/32", "int4/64", "int4/128", "uniform2/32", "uniform3/64", "uniform4/32", "uniform5/64", "uniform6/32",
    "binary3o/32", "huffman/0", "exponents/0", "sparse/0", "dictionary/0",
)  # fmt: skip


def packed_in(family: str, spec: str, folder: Path, **changes: Any) -> Any:
    """The model with the experts of every layer in one format, packed by transformers and saved."""
    make(family, **changes).bfloat16().save_pretrained(folder / "plain")
    model = make(family, **changes)
    places = (f"{name}.{part}" for name, _ in anatomy.stacked(model) for part in PARTS.values())
    config = PackedConfig(packing=dict.fromkeys(places, spec))
    made = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=config, dtype=torch.float32
    ).eval()
    made.save_pretrained(folder / "packed")
    seal(folder / "packed", ROOM)
    return made


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_packed_together_in_any_format(tmp_path: Path, family: str, spec: str) -> None:
    """Tokens meet all that there are, none by a narrow choice; their widths are no multiples of the kernels' tiles."""
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 3)
    model = packed_in(family, spec, tmp_path, intermediate_size=88, **counts)
    runner = opened(tmp_path / "packed", dtype="fp32")
    kind = formats.parse(spec).layout
    assert ("bf16" if kind.kind == "huffman" else kind.native) in runner.facts.precision
    ids = text(40)
    wanted, found = own(model, ids), logits(runner, Part(ids, pages(40)))
    # Products round activations to 8 bits, those of bfloat16 numbers to bfloat16, and ternary ones not at all.
    bound = {"dictionary": EXACT, **dict.fromkeys(("huffman", "exponents", "sparse"), 1e-2)}.get(kind.kind, NEAR)
    assert off(found, wanted) < bound
    np.testing.assert_array_equal(in_chunks(runner, ids, pages(40, 4), [1, 1, 5, 20, 13]), found)
    if kind.used_as_stored:
        stored = load_file(tmp_path / "packed" / "model.safetensors")
        assert runner.facts.weight_bytes == sum(tensor.nbytes for tensor in stored.values())


def _put(model: Any, module: str, values: torch.Tensor) -> None:
    """A matrix of a file into the model, whose experts stand in one tensor."""
    owner, _, rest = module.replace("block_sparse_moe", "mlp").partition(".experts.")
    if not rest:
        model.get_submodule(module).weight.data = values
        return
    number, role = rest.split(".")
    experts = model.get_submodule(f"{owner}.experts")
    if role in ("w2", "down_proj"):
        experts.down_proj.data[int(number)] = values
    else:
        begin = 0 if role in ("w1", "gate_proj") else len(values)
        experts.gate_up_proj.data[int(number), begin : begin + len(values)] = values


@pytest.mark.parametrize("family", REGROUPED)
def test_layers_may_keep_unequal_and_joint_experts(tmp_path: Path, family: str) -> None:
    model = make(family, num_local_experts=4, num_experts=4, num_experts_per_tok=2)
    found = anatomy.mixtures(model)
    # The last layer's choices 0 and 3 stand for one expert, so that some tokens choose it twice.
    rows = [[0, 1, 3], *([0, 1, 2, 3] for _ in found[1:])]
    to = [[0, 1, 2], *([0, 1, 2, 0] for _ in found[1:])]
    tensors = [{name: model.get_submodule(m.experts).get_parameter(name)[:3] for name in m.tensors} for m in found]
    smaller = regrouped.regroup(model, rows, to, tensors)
    smaller.save_pretrained(tmp_path / "small")
    runner = opened(tmp_path / "small")
    ids = text(60)
    assert off(logits(runner, Part(ids, pages(60))), own(smaller, ids)) < EXACT


def test_spans_have_the_experts_of_their_layers(saved: Callable[..., Path]) -> None:
    folder = saved("qwen3_moe")  # whose layer 1 alone has experts
    ids = text(20)
    whole = opened(folder)
    wanted = logits(whole, Part(ids, pages(20)))
    lower, upper = opened(folder, span=(0, 1)), opened(folder, span=(1, None))
    made = batch(Part(ids, pages(20)))
    found = upper.logits(upper.run(made, hidden=lower.run(made)), np.arange(20, dtype=np.int32))
    np.testing.assert_array_equal(found, wanted)


# ---- what is refused ----


BROKEN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "router of NaN": ("mixtral", lambda t: {n: v * torch.nan if "1.block_sparse_moe.gate" in n else v
                                            for n, v in t.items()}, "1.block_sparse_moe.gate.weight .*not finite"),
    "correction of NaN": ("dots1", lambda t: {n: v * torch.nan if "correction" in n else v for n, v in t.items()},
                          "e_score_correction_bias .*not finite"),
    "router of other experts": ("mixtral", lambda t: {n: v[:3] if "moe.gate" in n else v for n, v in t.items()},
                                r"gate.weight .* \(3, 64\)"),
    "router of another width": ("olmoe", lambda t: {n: v[:, :63] if "mlp.gate." in n else v for n, v in t.items()},
                                r"gate.weight .* \(5, 63\)"),
    "expert": ("mixtral", lambda t: {n: v[:, :95] if "experts.2.w2" in n else v for n, v in t.items()}, "experts.2.w2"),
    "missing expert": ("qwen3_moe", lambda t: {n: v for n, v in t.items() if "experts.7.up" not in n}, "experts.7.up"),
    "missing router": ("olmoe", lambda t: {n: v for n, v in t.items() if "1.mlp.gate.w" not in n}, "1.mlp.gate.weight"),
    "missing weigher": ("qwen2_moe", lambda t: {n: v for n, v in t.items() if "shared_expert_gate" not in n},
                        "shared_expert_gate"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_cannot_be_are_named(saved: Callable[..., Path], name: str) -> None:
    family, change, said = BROKEN[name]
    folder = saved(family)
    rewrite(folder, change)
    with pytest.raises(UsageError, match=said) as caught:
        opened(folder)
    assert not isinstance(caught.value, NotNative), "it is no matter of the runner"


def test_one_expert_more_is_left_to_torch(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")
    configure(folder, num_local_experts=3)
    with pytest.raises(NotNative, match="experts.3.w1"):
        opened(folder)


def test_starts_that_lie_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    qmoe_of(make("mixtral"), folder)
    sound = load_file(folder / "model.safetensors")
    name = next(n for n in sound if n.endswith("0.block_sparse_moe.experts.down.starts"))
    starts = sound[name]
    for lie, said in (
        (starts.flip(0), "does not divide"), (starts + 1, "does not divide"), (starts * 0, "does not divide"),
        (starts[:-1], "has the dimensions"), (starts.float(), "starts of F32"),
        (torch.tensor([0, 4, *starts[2:]]), "are not a dictionary matrix"),
    ):  # fmt: skip
        save_file({**sound, name: lie}, folder / "model.safetensors")
        with pytest.raises(UsageError, match=said):
            opened(folder)
    save_file(sound, folder / "model.safetensors")
    opened(folder)


LEFT: dict[str, tuple[str, dict[str, Any], str]] = {
    "clipped": ("olmoe", {"clip_qkv": 1.0}, "clip"),
    "groups": ("dots1", {"n_group": 2, "topk_group": 1, "n_routed_experts": 6}, "by groups"),
    "family": ("gpt_oss", {}, "GptOss"),
    "activation": ("mixtral", {"hidden_act": "relu"}, "relu"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(saved: Callable[..., Path], name: str) -> None:
    family, changes, said = LEFT[name]
    with pytest.raises(NotNative, match=said):
        opened(saved(family, **changes))


MAPS: tuple[Any, ...] = (
    [[0, 1], [0, 1]],
    [[0, 1, 2]] * 2,
    [[0, 1, 3]] * 3,
    [[0, 1, -1]] * 3,
    [[0, 1, 0.5]] * 3,
    [[]] * 3,
    "all",
    [0] * 3,
)


@pytest.mark.parametrize("maps", MAPS, ids=str)
def test_maps_that_cannot_be(saved: Callable[..., Path], maps: Any) -> None:
    folder = saved("mixtral")
    configure(folder, architectures=["RegroupedMixtralForCausalLM"], layer_expert_maps=maps)
    with pytest.raises(UsageError, match="layer_expert_maps"):
        opened(folder)


def test_more_choices_than_experts(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")
    configure(folder, num_experts_per_tok=5)
    with pytest.raises(UsageError, match="5 experts of 4"):
        opened(folder)


# ---- adapters, and what looks at experts ----


def test_an_adapter_of_experts_does_not_run_beside(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("mixtral")
    model = make("mixtral")
    model.config._name_or_path = model.name_or_path = str(folder)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "lora"))
    runner = opened(folder)
    with pytest.raises(NotBeside, match="target_parameters"):
        runner.add_adapter(str(tmp_path / "lora"))
    file = tmp_path / "lora" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "target_parameters": None}))
    with pytest.raises(NotBeside, match="experts"):
        runner.add_adapter(str(tmp_path / "lora"))
    ids = text(20)
    runner.reserve(4)
    np.testing.assert_array_equal(logits(runner, Part(ids, pages(20))), found_in(folder, 20))


def test_an_adapter_of_a_feed_forward_that_is_a_mixture(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Layers of one family may have either; what fits a dense one has no place in the other."""
    runner = opened(saved("qwen3_moe"))  # layer 1 has experts, the others have none
    model = make("qwen3_moe")
    # peft takes the names of a feed-forward for those of all experts, so its own folder is written anew.
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    get_peft_model(make("qwen3_moe"), config).save_pretrained(str(tmp_path / "lora"))
    up = model.model.layers[0].mlp.up_proj
    halves = {"A": torch.randn(4, up.in_features), "B": torch.randn(up.out_features, 4)}
    up.weight.data += 2 * halves["B"] @ halves["A"]

    def write(layer: int) -> Path:
        place = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        save_file({f"{place}.lora_{half}.weight": values for half, values in halves.items()},
                  tmp_path / "lora" / "adapter_model.safetensors")  # fmt: skip
        return tmp_path / "lora"

    ids = text(20)
    number = runner.add_adapter(str(write(0)))
    found = logits(runner, Part(ids, pages(20), adapter=number))
    assert off(found, own(model, ids)) < EXACT < off(found, own(make("qwen3_moe"), ids))
    with pytest.raises(NotBeside, match="layers.1.mlp"):
        runner.add_adapter(str(write(1)))


def test_matrices_alone_are_not_shown(saved: Callable[..., Path]) -> None:
    """Who computes with the same memory otherwise would leave out the routes."""
    assert not hasattr(opened(saved("mixtral")), "weights")


@pytest.fixture
def answering(saved: Callable[..., Path], model: Path) -> Path:
    folder = saved("mixtral", vocab_size=259)
    for file in model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_mixture_opens_on_the_native_runner(answering: Path) -> None:
    found = open_model(answering)
    assert found.runner.facts.backend == "native" and not found.note


def test_an_adapter_of_experts_is_served_as_a_model(answering: Path, tmp_path: Path) -> None:
    """Merged into its base, whose experts then are others."""
    model = transformers.AutoModelForCausalLM.from_pretrained(answering)
    config = LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"], target_modules=[], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path / "lora"))
    ids = text(20)
    wanted = own(adapted, ids)
    found = open_model(tmp_path / "lora", dtype="float32", cache_dtype="fp32")
    assert found.runner.facts.backend == "native" and "merged" in found.note
    found.runner.reserve(4)
    assert off(logits(found.runner, Part(ids, pages(20))), wanted) < 1e-3
    assert off(found_in(answering, 20), wanted) > 0.1


@pytest.mark.parametrize("word", ["expert_routing", "expert_offloading,slots=2"])
def test_what_looks_at_experts_gets_the_torch_runner(answering: Path, word: str, tmp_path: Path) -> None:
    prompt, sampling = [70, 80, 90], Sampling(temperature=0, max_tokens=4)
    with Engine(answering, dtype="float32", cache_dtype="fp32") as engine:
        assert engine.facts.backend == "native"
        plain = engine.generate(prompt, sampling)[0][0]
    with Engine(answering, dtype="float32", cache_dtype="fp32", plugs=[word]) as engine:
        assert engine.facts.backend == "torch"
        found = engine.generate(prompt, sampling)[0][0]
        counts = engine.counts().plugged
    assert found.tokens == plain.tokens
    assert any(str(name).startswith(("routing_", "expert_")) for name in counts)
    with pytest.raises(UsageError, match="native runner cannot run"):
        Engine(answering, runner="native", plugs=[word])


def test_the_torch_runner_says_the_same(answering: Path) -> None:
    ids = text(30)
    both = []
    for runner in ("native", "torch"):
        made = open_model(answering, runner=runner, dtype="float32", cache_dtype="fp32").runner
        made.reserve(4)
        both.append(logits(made, Part(ids, pages(30))))
    assert off(*both) < EXACT and (both[0].argmax(1) == both[1].argmax(1)).all()

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import DoesNotFit, QualityGate, UsageError
from shoestring.jobs import compress as job
from shoestring.jobs.compress import CompressRequest, compress
from shoestring.jobs.export import export
from shoestring.jobs.fit import FitRequest, fit
from shoestring.jobs.train import TrainRequest, train
from shoestring.lab import tiny as lab


def from_folder(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).dequantize()


def test_the_bill(tiny: Path, data: Path, tmp_path: Path, digest: Callable[[Path], str]) -> None:
    before = digest(tiny)
    request = CompressRequest(str(tiny), "int8", {"group_size": 32}, str(data), keep=0.9, eval_examples=4)
    result = compress(request, out=tmp_path / "out")
    assert digest(tiny) == before
    assert result["storage_before"] == sum(f.stat().st_size for f in tiny.iterdir())
    assert result["storage"] == sum(f.stat().st_size for f in (tmp_path / "out" / "model").iterdir())
    assert 8.5 <= result["bits_per_weight"] < 8.7, "8 bits and 16 of scale for each 32, and norms as they are"
    assert result["quality_kept"] == pytest.approx(1 / result["perplexity_ratio"]["value"])
    assert 0 < result["kl"]["value"] < 0.01
    assert AutoModelForCausalLM.from_pretrained(result["model"]) is not None
    assert compress(request, out=tmp_path / "out", resume=True)["kl"] == {
        k: list(v) if isinstance(v, tuple) else v for k, v in result["kl"].items()
    }


@pytest.fixture
def mixture(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with a random mixture of a family, and the tiny model's tokenizer."""

    def make(family: str = "mixtral") -> Path:
        folder = tmp_path / family
        sizes = dict(
            vocab_size=lab.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
            max_position_embeddings=256,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(folder)
        for file in tiny.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return make


@pytest.mark.parametrize("method", ["int4", "lut_gemm", "dfloat11", "expert_pruning,int8"])
def test_experts_of_a_mixture(method: str, mixture: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    options = {"cast": True} if method == "dfloat11" else {}
    request = CompressRequest(str(mixture()), method, options, str(data), keep=0.1, eval_examples=2)
    result = compress(request, out=tmp_path / "out")
    assert result["bits_per_weight"] < {"int4": 5.5, "lut_gemm": 7.5}.get(method, 13)
    plain = export(result["model"], tmp_path / "plain", dtype="float32")
    packed = AutoModelForCausalLM.from_pretrained(result["model"], dtype="float32")
    off = (lab.logits(AutoModelForCausalLM.from_pretrained(plain)) - lab.logits(packed)).norm()
    assert off < 0.05 * lab.logits(packed).norm()


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("mixtral", "tequila", "A mixtral model does not fit.*experts.gate_up_proj"),
        ("gpt_oss", "int4", "A gpt_oss model does not fit.*experts.gate_up_proj"),
        ("gpt_oss", "dfloat11", "A gpt_oss model does not fit"),
        ("gpt_oss", "qmoe", "experts of a gpt_oss model are of another build"),
    ],
)
def test_experts_that_a_method_does_not_pack_are_refused_before_a_folder_is_made(
    family: str, method: str, words: str, mixture: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        compress(CompressRequest(str(mixture(family)), method, data=str(data)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_within_a_limit(mixture: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    result = compress(
        CompressRequest(str(mixture()), data=str(data), bits=5.5, keep=0.1, eval_examples=2), out=tmp_path / "out"
    )
    assert 5.3 < result["bits_per_weight"] <= 5.5
    assert any(
        ".experts.gate_up" in name
        for name in json.loads((Path(result["model"]) / "config.json").read_text())["quantization_config"]["packing"]
    )


def test_no_options_are_the_methods_own(tiny: Path, data: Path, tmp_path: Path) -> None:
    result = compress(CompressRequest(str(tiny), "int4", data=str(data), eval_examples=2, keep=0.1), out=tmp_path / "o")
    assert result["options"] == {"group_size": 32, "embeddings": 8}


def test_below_keep_it_is_no_model(tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def worse(*args: object) -> object:
        found = true(*args)
        return replace(found, perplexity_ratio=replace(found.perplexity_ratio, value=4.0))

    true = job.compare
    monkeypatch.setattr(job, "compare", worse)
    request = CompressRequest(str(tiny), "int8", data=str(data), eval_examples=2)
    with pytest.raises(QualityGate, match="keeps 25.0%.*asks for 95.0%") as caught:
        compress(request, out=tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    kept = next((tmp_path / "out" / "run" / "work").glob("*/config.json")).parent
    assert str(kept) in str(caught.value)
    monkeypatch.setattr(job, "compare", true)
    assert compress(request, out=tmp_path / "out", resume=True)["quality_kept"] > 0.95, "a failed run can go on"


def test_a_size_without_a_method(tiny: Path, data: Path, tmp_path: Path) -> None:
    before = sum(f.stat().st_size for f in tiny.iterdir())
    settings = {"max_length": 16}
    request = CompressRequest(str(tiny), data=str(data), size="75kB", keep=0.2, eval_examples=4, training=settings)
    result = compress(request, out=tmp_path / "out")
    weights = result["bits_per_weight"] * sum(p.numel() for p in from_folder(result["model"]).parameters()) / 8
    assert result["storage_before"] == before and weights < 75_000
    with pytest.raises(DoesNotFit, match="tokenizer and configuration alone take"):
        compress(CompressRequest(str(tiny), data=str(data), size="1kB"), out=tmp_path / "two")
    with pytest.raises(DoesNotFit, match="the smallest on offer take"):
        compress(CompressRequest(str(tiny), data=str(data), bits=1.5), out=tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_a_size_is_the_limit_of_a_method_that_keeps_to_one(tiny: Path, data: Path, tmp_path: Path) -> None:
    given = {"data": str(data), "keep": 0.2, "eval_examples": 4, "training": {"max_length": 16}}
    options = {"rounding": "nearest"}
    request = CompressRequest(str(tiny), "mixed", options, size="75kB", **given)  # type: ignore[arg-type]
    result = compress(request, out=tmp_path / "size")
    assert result["method"] == "mixed" and result["options"]["rounding"] == "nearest"
    assert sum(f.stat().st_size for f in Path(result["model"]).glob("*.safetensors")) <= 75_000
    result = compress(CompressRequest(str(tiny), "mixed", bits=5.0, **given), out=tmp_path / "bits")  # type: ignore[arg-type]
    assert 4.5 < result["bits_per_weight"] <= 5


def test_a_stack_prunes_nothing_after_packing_and_trains_between(tiny: Path, data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "max_length": 16}
    request = CompressRequest(
        str(tiny), "lora,int8", {"lora.r": 2}, str(data), keep=0.2, eval_examples=4, training=settings
    )
    result = compress(request, out=tmp_path / "out")
    assert result["method"] == "lora,int8" and result["options"]["lora"] == {"r": 2}
    card = (Path(result["model"]) / "README.md").read_text()
    assert "import shoestring.methods.quantizers" in card and "perplexity / the original's" in card


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "lora"}, "lora does not compress"),
        ({"method": ""}, "no method is given"),
        ({"method": "int8,int4"}, "int4 cannot follow int8: the weights are integers already"),
        ({"method": "int4,lora"}, "cannot be folded into packed weights"),
        ({"size": "1MB", "bits": 3.0}, "both --size and --bits"),
        ({"size": "60", "method": ""}, "size=60 has no unit.*size=60MB"),
        ({"bits": 0.0, "method": ""}, "--bits 0.0"),
        ({"bits": 5.0, "method": "mixed", "options": {"bytes": 9}}, "mixed is given bytes and a limit beside it"),
        ({"bits": 5.0, "method": "mixed", "options": {"bits": 4}}, "need a limit.*not both"),
        ({"bits": 5.0, "method": "int8"}, "mixed cannot follow int8"),
        ({"keep": 0}, "keep is 0"),
        ({"eval_examples": 0}, "eval_examples is 0"),
        ({"options": {"group_size": 48}}, "group_size 48"),
        ({"options": {"embeddings": 3}}, "embeddings 3"),
        ({"options": {"groups": 64}}, "no option groups"),
    ],
)
def test_refused_before_a_folder_is_made(change: dict, words: str, tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        compress(CompressRequest(**{"model": str(tiny), "method": "int8", "data": str(data), **change}),
                 out=tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer*", None, "holds no tokenizer"),
        ("model.safetensors", None, "holds no weights"),
        ("tokenizer.json", '{"model": {"type": ', "tokenizer in .* cannot be loaded"),
        ("tokenizer.json", '{"model": {"type": "Unheard"}}', "tokenizer in .* cannot be loaded"),
        ("chat_template.jinja", "{% for %}", "chat template refuses"),
        ("tokenizer.json", {"w4": 99}, "makes the token 99, and the model knows 64"),
    ],
)
def test_a_folder_that_quality_cannot_be_measured_of_is_refused_before_any_work(
    name: str, content: Any, words: str, tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    if isinstance(content, dict):
        tokenizer = json.loads((folder / name).read_text())
        tokenizer["model"]["vocab"] |= content
        content = json.dumps(tokenizer)
    for file in folder.glob(name):
        file.write_text(content) if content else file.unlink()
    with pytest.raises(UsageError, match=words):
        compress(CompressRequest(str(folder), "int8", data=str(data)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "packed already, with gptq.*Give the model that it was made from.$"),
        ({"bits": 4}, "packed already, with a method it does not name"),
        ({"quant_method": "shoestring_int4"}, "packed already, with int4.*or unpack it with `shoestring export`"),
    ],
)
def test_what_is_packed_already_is_refused_before_any_work(
    stated: dict[str, Any], words: str, tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    requests: list[dict[str, Any]] = [{"method": "int8"}, {"bits": 4.0}, {"method": "compresso"}]
    for request in requests:
        with pytest.raises(UsageError, match=words):
            compress(CompressRequest(str(folder), data=str(data), **request), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "kind"), [("t5", "seq2seq"), ("bert", "masked")])
def test_a_model_that_says_no_next_token_is_refused_before_any_work(
    family: str, kind: str, tiny: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / family
    shutil.copytree(tiny, folder)
    lab.model(family).save_pretrained(folder)
    jobs: list[Any] = [
        (compress, CompressRequest(str(folder), "int8", data=str(data))),
        (train, TrainRequest(str(folder), data=str(data))),
        (fit, FitRequest(str(folder), data=str(data), budget="storage=1MB")),
    ]
    for do, request in jobs:
        with pytest.raises(UsageError, match=f"is a {kind} model. held-out loss is that of the next token"):
            do(request, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A signal that cannot be heard comes when half of the weights are on the disk.
_KILLED = """
import json, os, signal, sys
import transformers.modeling_utils as saving
from shoestring.jobs.compress import CompressRequest, compress

def half(tensors, file, **more):
    real(tensors, file, **more)
    os.truncate(file, os.path.getsize(file) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

real, saving.safe_save_file = saving.safe_save_file, half
compress(CompressRequest(**json.loads(sys.argv[1])), out=sys.argv[2])
"""


def test_killed_while_it_writes_it_leaves_no_model_and_goes_on(
    tiny: Path, data: Path, tmp_path: Path, digest: Callable[[Path], str]
) -> None:
    request = {"model": str(tiny), "bits": 5.0, "data": str(data), "keep": 0.1, "eval_examples": 2}
    out, alone = tmp_path / "out", tmp_path / "alone"
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, json.dumps(request), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-1500:]
    (half,) = [path.parent for path in out.rglob("config.json")]
    assert ".partial-" in half.name and not (out / "model").exists()
    compress(CompressRequest(**request), out=out, resume=True)  # type: ignore[arg-type]
    compress(CompressRequest(**request), out=alone)  # type: ignore[arg-type]
    assert digest(out / "model") == digest(alone / "model")
    assert not half.exists(), "what was half lies about"

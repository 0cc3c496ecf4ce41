"""The command line in this very process, on tiny random models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from saying import Said, Shoestring

from shoestring import cli


@pytest.fixture
def shoestring(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shoestring:
    """Runs a command in `tmp_path` with a cache of its own, offline."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> Said:
        capfd.readouterr()
        code = cli.exit_code([str(word) for word in words])
        out, err = capfd.readouterr()
        if "torch" in sys.modules:
            import torch

            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "a mode is left switched"
        return Said(code, out, err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random causal model and a tokenizer; do not write into it."""
    import torch

    from shoestring.lab import tiny

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model(max_position_embeddings=256).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A hundred small questions with answers."""
    file = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{i % 50 + 4} w{i % 7 + 4}", "completion": f"w{i % 11 + 4} w{i % 5 + 4}"} for i in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(4, 64)]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    return made

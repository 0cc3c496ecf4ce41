"""A tiny random model with a tokenizer, and something to teach it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# What holds a clock against a bound, by folder or file.
QUIET = (
    "core", "server", "models/test_guard.py", "models/test_load.py", "engine/test_scheduler.py",
    "methods/serving/test_ce_collm",
)  # fmt: skip
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores already


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here).as_posix()
        if place.startswith(QUIET):
            item.add_marker(pytest.mark.quiet)


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

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoestring.jobs.at_work import storage
from shoestring.lab import tiny


def word_tokenizer():
    """One token for each of the words w3, w4 ... that a tiny model knows."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def fake_at_work(folder: Path, **_: Any) -> dict[str, Any]:
    """The bytes are the folder's own; the rest is the same for every model."""
    speed = {"median": 100.0, "min": 90.0, "max": 110.0}
    return {
        "storage": storage(Path(folder)), "peak_memory": 600_000_000, "floor_memory": 500_000_000,
        "decode_tokens_per_s": speed, "prefill_tokens_per_s": speed, "latency": 0.01, "load_seconds": 0.1,
        "threads": 1, "dtype": "float32", "first_token_seconds": 0.01,
    }  # fmt: skip

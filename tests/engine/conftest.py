"""A tiny model that reads bytes, with two adapters: what tests of the whole engine run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from runner_cases import make
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

VOCAB = 259
CONTEXT = 128


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads bytes, with weights large enough that every token of a prompt changes what follows."""
    folder = tmp_path_factory.mktemp("soak") / "model"
    make("llama", vocab_size=VOCAB, max_position_embeddings=CONTEXT).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    inner = Tokenizer(BPE({word: index for index, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    for seed, name in enumerate(("first", "second")):
        base = make("llama", vocab_size=VOCAB, max_position_embeddings=CONTEXT)
        torch.manual_seed(seed + 1)
        folders[name] = tmp_path_factory.mktemp("lora") / name
        get_peft_model(base, config).save_pretrained(folders[name])
    return folders

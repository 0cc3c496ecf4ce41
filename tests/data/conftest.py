from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    from shoestring.models import resolve

    return AutoTokenizer.from_pretrained(resolve("smollm2"))

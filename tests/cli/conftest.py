"""The command line in this very process."""

from __future__ import annotations

import sys
from pathlib import Path

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

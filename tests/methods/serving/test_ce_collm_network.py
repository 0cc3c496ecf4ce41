"""CE-CoLLM between two network namespaces, the cloud as `shoestring serve` runs it: delay, loss, and a cut cable."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.engine.request import Sampling
from shoestring.lab import answering
from shoestring.lab.answering import PROMPTS, answers, exact
from shoestring.lab.network import Elsewhere, elsewhere, why_not
from shoestring.lab.split import SlowLink, random_heads

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
KEY = "a-key-of-the-cloud"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering.folder(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6)


@pytest.fixture(scope="module")
def there(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY, encoding="utf-8")
    with elsewhere("shoestring-ce") as place:
        command = [
            *place.command, sys.executable, "-m", "shoestring", "serve", str(model), "--role", "cloud,after=2",
            "--host", place.there, "--port", "8000", "--api-key-file", str(keys), "--dtype", "fp32", "--kv-dtype",
            "fp32", "--threads", "1",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 60
            while not _healthy(place) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.1)
            assert _healthy(place), process.stderr.read().decode() if process.poll() is not None else "it is not ready"
            yield place
        finally:
            process.terminate()
            process.wait(30)


def _healthy(place: Elsewhere) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://{place.there}:8000/health", timeout=1).status == 200)
    except OSError:
        return False


def words(model: Path, url: str, **more: object) -> str:
    said = {"threshold": 1, "transfer": "fp32", "key": KEY, "patience": 10, **more}
    heads = random_heads(model, (2, 4), spread=0.6)
    return ",".join([f"ce_collm,heads={heads},cloud={url}", *(f"{k}={v}" for k, v in said.items())])


def url_of(place: Elsewhere) -> str:
    return f"http://{place.there}:8000"


def test_far_away_and_lossy_the_answers_are_those_of_the_whole_model(model: Path, there: Elsewhere) -> None:
    shaped = there.shape(delay="10ms", loss="5%")
    # Kernels without netem lose nothing; the delay is then this side's.
    wire = SlowLink(url_of(there), delay=0.0 if shaped else 0.01)
    with exact(model) as plain, exact(model, plugs=[words(model, wire.url)]) as edge:
        wanted = answers(plain)
        began = time.perf_counter()
        assert answers(edge) == wanted
        assert time.perf_counter() - began > 16 * 0.02, "the cable has no delay"
        assert edge.hooks.exit.counts == {"exit 1": 0, "exit 2": 0, "cloud": 96, "fallback": 0}  # type: ignore[union-attr]
    wire.close()
    there.plain()


def test_a_cut_cable_is_survived_and_a_mended_one_used(
    model: Path, there: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.methods.serving._split_link._PROBE", 0.05)
    with exact(model) as plain, exact(model, plugs=[words(model, url_of(there), patience=0.4)]) as edge:
        policy = edge.hooks.exit
        by = []
        for i, _ in enumerate(edge.stream(PROMPTS[3], Sampling(max_tokens=30, ignore_eos=True))):
            by.append(policy.log[-1].by)  # type: ignore[union-attr]
            if i == 7:
                there.cut()
            if i == 14:
                there.mend()
                deadline = time.monotonic() + 10
                while not policy.link.up and time.monotonic() < deadline:  # type: ignore[union-attr]
                    time.sleep(0.05)
        assert set(by[:8]) == {"cloud"} and set(by[8:15]) == {"fallback"} and set(by[16:]) == {"cloud"}, by
        assert answers(edge) == answers(plain)


def test_without_the_key_there_is_no_cloud(model: Path, there: Elsewhere) -> None:
    with pytest.raises(Exception, match="refuses this edge"):
        exact(model, plugs=[words(model, url_of(there), key="another")])

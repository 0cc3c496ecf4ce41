import io
import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from job_cases import word_tokenizer

from shoestring.core.errors import UsageError
from shoestring.engine.engine import Engine
from shoestring.jobs.generate import chat, generate
from shoestring.kernels.loader import load
from shoestring.lab import tiny
from shoestring.models import Loaded

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """A tiny model on disk: the engine runs it."""
    tiny.model(max_position_embeddings=128).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(tmp_path):
    """A tiny model in memory: transformers runs it."""
    return Loaded(tiny.model(max_position_embeddings=64), word_tokenizer(), tmp_path, "tiny", "causal")


def expected(loaded, prompt, tokens):
    ids = torch.tensor([loaded.tokenizer(prompt).input_ids])
    out = loaded.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_pieces_are_the_greedy_answer(loaded):
    pieces = list(generate(loaded, "w5 w6", max_new_tokens=8, raw=True))
    assert "".join(pieces).strip() == expected(loaded, "w5 w6", 8).strip()
    assert len(pieces) > 1


def test_drawing_follows_the_seed_and_leaves_the_global_one_alone(loaded):
    before = torch.random.get_rng_state()
    texts = ["".join(generate(loaded, "w5", max_new_tokens=12, temperature=1.0, seed=s, raw=True)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_leaving_early_stops_the_model(loaded):
    loaded.model.generation_config.eos_token_id = None
    pieces = generate(loaded, "w5", max_new_tokens=50, raw=True)
    next(pieces)
    pieces.close()
    time.sleep(0.05)
    assert not any(t.name == "shoestring-generate" for t in threading.enumerate())


def test_an_error_of_the_model_reaches_the_reader(loaded):
    def broken(*_, **__):
        raise RuntimeError("the model broke")

    loaded.model.forward = broken
    with pytest.raises(RuntimeError, match="the model broke"):
        list(generate(loaded, "w5", raw=True))


def test_bad_requests_are_refused_before_the_first_piece(loaded):
    with pytest.raises(UsageError, match="context is 64"):
        generate(loaded, " ".join(["w5"] * 70), raw=True)
    with pytest.raises(UsageError, match="temperature=-1"):
        generate(loaded, "w5", temperature=-1, raw=True)
    with pytest.raises(UsageError, match="empty"):
        generate(loaded, "", raw=True)
    masked = Loaded(tiny.model("bert"), word_tokenizer(), loaded.path, "tiny", "masked")
    with pytest.raises(UsageError, match="fills gaps"):
        generate(masked, "w5")


def test_the_answer_is_cut_to_the_context(loaded):
    loaded.model.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    text = "".join(generate(loaded, " ".join(["w5"] * 60), max_new_tokens=100, raw=True))
    assert len(text.split()) <= 4


def test_encoder_decoder(loaded):
    seq2seq = Loaded(tiny.model("t5"), word_tokenizer(), loaded.path, "tiny", "seq2seq")
    assert len(list(itertools.islice(generate(seq2seq, "w5 w6", max_new_tokens=5), 9))) >= 0


def test_chat_keeps_history_and_obeys_its_words(loaded):
    out, notes = io.StringIO(), io.StringIO()
    said = ["w5", "", "w6", "/clear", "w7", "/exit", "w8"]
    history = chat(loaded, lines=said, out=out, notes=notes, max_new_tokens=3, temperature=0, system="w9")
    assert [m["role"] for m in history] == ["system", "user", "assistant"] and history[1]["content"] == "w7"
    assert out.getvalue().count("\n") == 3
    assert "no chat template" in notes.getvalue()


def test_chat_forgets_the_oldest_turn_when_the_context_is_full(loaded):
    notes = io.StringIO()
    chat(loaded, lines=[" ".join(["w5"] * 15)] * 5, out=io.StringIO(), notes=notes, max_new_tokens=4)
    assert "oldest turn" in notes.getvalue()


def test_chat_reads_standard_input_that_is_no_terminal(loaded, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("w5\nw6\n"))
    assert len(chat(loaded, max_new_tokens=2, temperature=0)) == 4
    assert "> " not in capsys.readouterr().out


# ---------------------------------------------------------------- on the engine


def test_the_engine_gives_the_greedy_answer_piece_by_piece(folder):
    model = Loaded(tiny.model(max_position_embeddings=128), word_tokenizer(), folder, "tiny", "causal")
    pieces = list(generate(folder, "w5 w6", max_new_tokens=8, raw=True, dtype="float32"))
    assert "".join(pieces).split() == expected(model, "w5 w6", 8).split()
    assert len(pieces) > 1


def test_the_engine_draws_by_the_seed(folder):
    with Engine(folder) as engine:
        texts = [
            "".join(generate(engine, "w5", max_new_tokens=9, temperature=1.0, seed=s, raw=True)) for s in (1, 1, 2)
        ]
    assert texts[0] == texts[1] != texts[2]


def test_stops_end_the_answer_on_both_ways(folder, loaded):
    loaded = Loaded(tiny.model(max_position_embeddings=128), loaded.tokenizer, folder, "tiny", "causal")
    for model in (folder, loaded):
        whole = "".join(generate(model, "w5 w6", max_new_tokens=12, raw=True, dtype="float32")).split()
        stop = whole[4]
        text = "".join(generate(model, "w5 w6", max_new_tokens=12, raw=True, stop=(stop,), dtype="float32"))
        assert text.split() == whole[: whole.index(stop)]


def test_leaving_early_cancels_the_request(folder):
    with Engine(folder) as engine:
        pieces = generate(engine, "w5", max_new_tokens=100, raw=True)
        next(pieces)
        assert engine.counts().blocks_used
        pieces.close()
        engine.step()
        assert engine.idle and engine.counts().running == 0


def test_what_the_engine_refuses_runs_in_transformers(tmp_path):
    for family, raw in (("t5", True), ("t5", False)):
        tiny.model(family).save_pretrained(tmp_path / family)
        word_tokenizer().save_pretrained(tmp_path / family)
        assert list(generate(tmp_path / family, "w5 w6", max_new_tokens=5, raw=raw)) is not None
    with pytest.raises(UsageError, match="neither JSON schema"):
        generate(tmp_path / "t5", "w5", json_schema="{}")
    tiny.model("bert").save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="fills gaps"):
        generate(tmp_path / "bert", "w5")
    with pytest.raises(UsageError, match="cannot chat"):
        chat(tmp_path / "t5", lines=["w5"])


def test_bad_requests_are_refused_by_the_engine_too(folder):
    for wrong, words in (
        ({"prompt": "w5 " * 200}, "context is 128"), ({"temperature": -1}, "temperature"), ({"prompt": ""}, "empty"),
        ({"top_k": -2}, "top_k"), ({"json_schema": "{"}, "schema"), ({"adapter": str(folder)}, "adapter"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            generate(folder, **({"prompt": "w5", "raw": True} | wrong))


def test_a_second_turn_computes_only_what_is_new(folder):
    lines = [" ".join(f"w{i}" for i in range(5, 25)), "w7 w8"]
    how = {"max_new_tokens": 12, "temperature": 0}
    with Engine(folder) as engine:
        seen = []
        submit = engine.submit
        engine.submit = lambda request: (seen.append(len(request.prompt)), submit(request))
        kept = chat(engine, lines=lines, out=io.StringIO(), notes=io.StringIO(), **how)
        assert engine.counts().prefix_hits >= seen[0] // 16 * 16 >= 16
    with Engine(folder, prefix_cache=False) as engine:
        assert chat(engine, lines=lines, out=io.StringIO(), notes=io.StringIO(), **how) == kept
        assert engine.counts().prefix_hits == 0


def test_the_native_way_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from shoestring.engine.engine import Engine; from shoestring.jobs.generate import generate\n"
        "engine = Engine(sys.argv[1])\n"
        "assert list(generate(engine, 'w5', max_new_tokens=3)) is not None\n"
        "print(engine.facts.backend, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if load().library is None:
        pytest.skip("no native library")
    assert done.stdout == "native []\n", done.stdout + done.stderr

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from job_cases import word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from shoestring.core.errors import ShoestringError, UsageError
from shoestring.jobs import evaluate
from shoestring.lab import tiny

torch.set_num_threads(1)


def some_rows(n=7, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        size = int(rng.integers(4, 20))
        ids = rng.integers(3, tiny.VOCAB, size).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
    return rows


def wider(words=80):
    model = tiny.model()
    model.resize_token_embeddings(words, mean_resizing=False)
    return model


def by_hand(model, rows):
    """Every row alone, whole logits."""
    out = []
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
            labels = torch.tensor(row["labels"])[1:]
            out.append((logits[labels != -100].log_softmax(-1), labels[labels != -100]))
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_is_what_the_whole_logits_give_whatever_the_batch(family):
    model, rows = tiny.model(family), some_rows()
    scores = by_hand(model, rows)
    tokens = sum(len(t) for _, t in scores)
    expected = float(sum(F.nll_loss(s, t, reduction="sum") for s, t in scores)) / tokens
    found = [evaluate.heldout(model, rows, batch_tokens=size) for size in (1, 40, 4096)]
    for quality in found:
        assert quality.loss.value == pytest.approx(expected, abs=1e-5)
        assert quality.tokens == tokens
    assert found[0].perplexity.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert found[0].loss.interval[0] < expected < found[0].loss.interval[1]


def test_bfloat16_loss_moves_less_than_a_thousandth_with_the_batch():
    model, rows = tiny.model(dtype=torch.bfloat16), some_rows(20)
    one, many = (evaluate.heldout(model, rows, batch_tokens=size).loss.value for size in (1, 4096))
    assert many == pytest.approx(one, rel=1e-3)


def test_a_models_own_cap_on_its_logits_is_kept():
    config = AutoConfig.for_model(
        "gemma2", vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.05, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = AutoModelForCausalLM.from_config(config).eval(), some_rows()
    scores = by_hand(model, rows)
    expected = float(sum(F.nll_loss(s, t, reduction="sum") for s, t in scores)) / sum(len(t) for _, t in scores)
    assert evaluate.heldout(model, rows).loss.value == pytest.approx(expected, abs=1e-5)


def test_never_more_logits_than_a_piece(monkeypatch):
    model = tiny.model()
    ids = tiny.batch(1, 300)[0].tolist()
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.numel() // tiny.VOCAB))
    evaluate.heldout(model, [{"input_ids": ids, "labels": ids}])
    assert sum(seen) >= 299 and max(seen) <= 64


def test_comparison_against_the_formulas():
    model, reference, rows = tiny.model(seed=1), tiny.model(seed=2), some_rows()
    found = evaluate.compare(model, reference, rows, batch_tokens=50)
    ours, theirs = by_hand(model, rows), by_hand(reference, rows)
    q, p = (torch.cat([s for s, _ in part]) for part in (ours, theirs))
    targets = torch.cat([t for _, t in ours])
    assert found.kl.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    assert found.changed.value == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()), abs=1e-9)
    ratio = math.exp(float(F.nll_loss(q, targets) - F.nll_loss(p, targets)))
    assert found.perplexity_ratio.value == pytest.approx(ratio, rel=1e-4)
    m = ((p.exp() + q.exp()) / 2).log()
    js = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2 / math.log(2)
    assert found.probability_loyalty.value == pytest.approx(float((1 - js.sqrt()).mean()), abs=1e-4)
    assert found.model.loss.value == pytest.approx(evaluate.heldout(model, rows).loss.value, abs=1e-5)
    assert found.kl.interval[0] < found.kl.value < found.kl.interval[1]
    json.dumps(found.to_json())


def test_a_model_equals_itself():
    model, rows = tiny.model(), some_rows()
    found = evaluate.compare(model, copy.deepcopy(model), rows)
    assert found.kl.value == pytest.approx(0, abs=1e-6) and found.changed.value == 0
    assert found.perplexity_ratio.value == 1 and found.perplexity_ratio.interval == (1, 1)
    assert found.probability_loyalty.value == pytest.approx(1, abs=2e-3)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for trial in range(200):
        tokens = rng.integers(1, 20, 60)
        sums = np.stack([rng.normal(2.0, 1.0, 60) * tokens, tokens], 1)
        low, high = evaluate._quality(sums, trial).loss.interval
        hits += low < 2.0 < high
    assert 175 <= hits <= 199


def test_what_cannot_be_scored_is_refused():
    model, rows = tiny.model(), some_rows()
    with pytest.raises(UsageError, match="no labelled token"):
        evaluate.heldout(model, [{"input_ids": [3, 4], "labels": [-100, -100]}])
    with pytest.raises(UsageError, match="Packed"):
        evaluate.heldout(model, [{**rows[0], "position_ids": [0]}])
    with pytest.raises(UsageError, match="vocabularies have 64 and 80"):
        evaluate.compare(model, wider(), rows)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ShoestringError, match="not numbers"):
        evaluate.heldout(model, rows)


def test_one_row_has_no_interval():
    assert evaluate.heldout(tiny.model(), some_rows(1)).loss.interval is None


@pytest.mark.parametrize("words", [1, 2, 9, 10, 11, 37, 40])
def test_windows_count_every_token_but_the_first_once(words):
    text = " ".join(f"w{3 + i % 60}" for i in range(words))
    rows = evaluate.windows(text, word_tokenizer(), length=10, stride=4)
    counted = [label for row in rows for label in row["labels"] if label != -100]
    assert counted == [3 + i % 60 for i in range(words)][1:]
    assert all(len(row["input_ids"]) <= 10 and len(row["input_ids"]) == len(row["labels"]) for row in rows)
    for row in rows[1:]:
        assert row["labels"].count(-100) >= 10 - 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from shoestring.models import save

    base = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 1), ("two", 2)):
        save(tiny.model(seed=seed), word_tokenizer(), base / name)
    return base


def test_evaluate_a_text_file_against_another_model(folder, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"w{3 + i % 50}" for i in range(3000)))
    found = evaluate.evaluate(folder / "one", data=text, against=folder / "two", work=False)
    assert found["data"]["split"] == "all" and found["data"]["rows"] > 3
    assert found["quality"]["tokens"] == 2999
    assert found["against"]["comparison"]["kl"]["value"] > 0
    alone = evaluate.evaluate(folder / "two", data=text, work=False)
    assert alone["quality"]["loss"]["value"] == pytest.approx(found["against"]["quality"]["loss"]["value"], abs=1e-5)
    json.dumps(found)


def test_evaluate_chat_rows_scores_the_test_part(folder, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"w{i % 60 + 3}", "completion": f"w5 w{i % 50 + 4}"}) + "\n" for i in range(60))
    )
    part = evaluate.evaluate(folder / "one", data=file, work=False)
    whole = evaluate.evaluate(folder / "one", data=file, work=False, split="all")
    few = evaluate.evaluate(folder / "one", data=file, work=False, split="all", limit=5)
    assert 0 < part["data"]["rows"] < whole["data"]["rows"] == 60 and few["data"]["rows"] == 5


def test_evaluate_refuses_with_a_reason(folder, tmp_path):
    with pytest.raises(UsageError, match="unknown split"):
        evaluate.evaluate(folder / "one", split="tset", work=False)
    from shoestring.models import save

    other = word_tokenizer()
    other.add_tokens(["more"])
    save(wider(65), other, tmp_path / "other")
    text = tmp_path / "t.txt"
    text.write_text("w3 w4 w5")
    with pytest.raises(UsageError, match="tokenizers differ"):
        evaluate.evaluate(folder / "one", data=text, against=tmp_path / "other", work=False)


def test_tasks_of_lm_eval(folder, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": f"w{i}", "a": i % 2}) + "\n" for i in range(3, 9)))
    (tmp_path / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: " + str(tmp_path / "q.jsonl") + "\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['w10', 'w11']\n"
        "doc_to_target: a\nmetric_list:\n  - metric: acc\n"
    )
    text = tmp_path / "t.txt"
    text.write_text("w3 w4 w5")
    found = evaluate.evaluate(folder / "one", data=text, tasks=["words"], task_folder=tmp_path, work=False)
    assert 0 <= found["tasks"]["words"]["acc,none"] <= 1
    with pytest.raises(UsageError, match="no task wrods"):
        evaluate.evaluate(folder / "one", data=text, tasks=["wrods"], task_folder=tmp_path, work=False)


@pytest.mark.real
def test_heldout_of_the_default_model():
    from shoestring.jobs._doors import open_model

    loaded = open_model("smollm2")
    text = "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and Rome that of Italy."
    good = evaluate.heldout(loaded.model, evaluate.windows(text, loaded.tokenizer))
    bad = evaluate.heldout(loaded.model, evaluate.windows(" ".join(sorted(text.split())), loaded.tokenizer))
    assert 10 < good.perplexity.value < bad.perplexity.value / 4

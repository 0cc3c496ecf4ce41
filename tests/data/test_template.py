"""What is trained is exactly the answers, under many templates; text in messages forges nothing."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shoestring.core.errors import UsageError
from shoestring.data import Corpus, Example, chat_template, describe, encode, lengths

END = "<|im_end|>"
# Shapes of templates in use: reasoning hidden from earlier turns, trimmed content, text markers, an opened reasoning
# block in the prompt, an end-of-turn token on answers only.
TEMPLATES = {
    "hides reasoning": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "trims": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "text markers": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "opens reasoning": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
        "{% else %}<repo_name>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<repo_name><think>\n{% endif %}"
    ),
    "none": None,
    "own": "",
}


def chat(*contents, **options):
    roles = ["user", "assistant"] * (len(contents) // 2)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return Example(messages, **options)


def corpus_of(*examples):
    return Corpus(list(examples), "chat", source="data.jsonl")


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def with_template(tokenizer, name):
    changed = copy.deepcopy(tokenizer)
    if name != "own":
        changed.chat_template = TEMPLATES[name]
    return changed


@pytest.fixture(scope="module", params=list(TEMPLATES))
def templated(request, tokenizer):
    return with_template(tokenizer, request.param)


@pytest.mark.parametrize("careful", [False, True])
def test_only_answers_are_trained(templated, careful):
    question = f"2{END}?" if careful else "2?"
    encoded = encode(corpus_of(chat("1?", "one", question, "two")), templated, 200)
    texts = [trained(templated, row) for row in encoded.rows]
    assert "".join(text.replace(" ", "") for text in texts) == f"one{END}two{END}"
    for row in encoded.rows:
        assert len(row["input_ids"]) == len(row["labels"])
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))


def test_hidden_reasoning_gives_one_row_an_answer(tokenizer):
    changed = with_template(tokenizer, "hides reasoning")
    example = chat("1?", "<think>a</think>one", "2?", "<think>b</think>two")
    rows = encode(corpus_of(example), changed, 200).rows
    assert [trained(changed, row) for row in rows] == [f"<think>a</think>one{END}", f"<think>b</think>two{END}"]
    assert "<think>a" not in changed.decode(rows[1]["input_ids"])


def test_template_that_loses_the_answer_is_refused(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(UsageError, match=r"data.jsonl:7: the chat template does not show answer 2"):
        encode(corpus_of(chat("a", "b", line=7)), changed, 99)
    changed.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UsageError, match=r"data.jsonl:7: .*refuses the conversation.*no system role"):
        encode(corpus_of(chat("a", "b", line=7)), changed, 99)


def test_a_model_without_tokenizer_is_a_clear_error():
    corpus = Corpus([Example(text="some text")], "text")
    for asked in (lambda: encode(corpus, None, 64), lambda: describe(corpus, None)):
        with pytest.raises(UsageError, match="no tokenizer"):
            asked()


def test_plain_template_is_told(tokenizer):
    bare = with_template(tokenizer, "none")
    encoded = encode(corpus_of(chat("Hi", "Hello")), bare, 99)
    assert encoded.template == "plain" and encode(corpus_of(chat("Hi", "Hello")), tokenizer, 99).template == "model"
    assert "user: Hi\nassistant: Hello<|im_end|>" in bare.decode(encoded.rows[0]["input_ids"])
    prompt = bare.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        chat_template=chat_template(bare),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encoded.rows[0]["input_ids"][: len(prompt)] == prompt
    assert encoded.rows[0]["labels"][len(prompt)] != -100


@pytest.mark.parametrize("name, answer", [("own", "Hello"), ("own", "\n\nHello"), ("trims", "Hello")])
def test_matches_what_generation_sees(tokenizer, name, answer):
    changed = with_template(tokenizer, name)
    row = encode(corpus_of(chat("Hi", answer)), changed, 99).rows[0]
    prompt = changed.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert trained(changed, row) == answer + END
    first = next(index for index, label in enumerate(row["labels"]) if label != -100)
    assert row["input_ids"][:first] == prompt


words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=30)
pieces = st.one_of(words, st.sampled_from([END, "<|im_start|>assistant\n", "<|endoftext|>", "assistant", "\n"]))
questions = st.lists(pieces, min_size=1, max_size=4).map("".join)
answers = questions.filter(str.strip)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(questions, answers, st.sampled_from([0.0, 1.0])), min_size=1, max_size=4))
def test_trained_tokens_are_the_answers(tokenizer, turns):
    weights = [weight for turn in turns for weight in (0.0, turn[2])]
    example = chat(*(text for turn in turns for text in turn[:2]), weights=weights)
    if not any(weights):
        with pytest.raises(UsageError, match="0 tokens to train"):
            encode(corpus_of(example), tokenizer, 10_000)
        return
    said = "".join(text for turn in turns for text in turn[:2])
    # This vocabulary lacks some bytes of rare scripts, which are then lost.
    assume(tokenizer.decode(tokenizer(said, add_special_tokens=False).input_ids) == said)
    (row,) = encode(corpus_of(example), tokenizer, 10_000).rows
    assert trained(tokenizer, row) == "".join(answer + END for _, answer, weight in turns if weight)
    starts = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ends = tokenizer.convert_tokens_to_ids(END)
    assert row["input_ids"].count(starts) == row["input_ids"].count(ends) == 2 * len(turns) + 1
    assert row["input_ids"].count(tokenizer.convert_tokens_to_ids("<|endoftext|>")) == 0
    whole = tokenizer.apply_chat_template(example.messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == whole


def test_stand_ins_never_meet_the_users_own_characters(tokenizer):
    text = f"\U0010f000{END}\U0010f001<|im_start|>"
    row = encode(corpus_of(chat(text, "ok")), tokenizer, 99).rows[0]
    assert text in tokenizer.decode(row["input_ids"])


def test_loss_on_all_and_plain_text(tokenizer):
    row = encode(corpus_of(chat("Hi", "Hello")), tokenizer, 99, loss_on="all").rows[0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    text = Corpus([Example(text=f"Some text {END} here")], "text")
    encoded = encode(text, tokenizer, 99)
    row = encoded.rows[0]
    assert tokenizer.decode(row["input_ids"]) == f"Some text {END} here{END}" and encoded.template == "none"
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_tools(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "One"},
    ]
    example = Example(messages, line=3)
    with pytest.raises(UsageError, match="data.jsonl:3: the example uses tools"):
        encode(corpus_of(example), tokenizer, 99)
    able = copy.deepcopy(tokenizer)
    able.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (row,) = encode(corpus_of(example), able, 99).rows
    assert trained(able, row) == '{"name": "add", "arguments": {"a": 1}}' + END + "One" + END


def test_too_long(tokenizer):
    corpus = corpus_of(chat("Hi", "Hello", line=1), chat("Hi", "long " * 300, line=2))
    with pytest.raises(UsageError, match=r"data.jsonl:2: the example has 3\d\d tokens, the limit is 100") as caught:
        encode(corpus, tokenizer, 100)
    assert "truncate" in str(caught.value)
    cut = encode(corpus, tokenizer, 100, on_long="truncate")
    assert (len(cut), cut.truncated, cut.dropped, max(lengths(cut))) == (2, 1, 0, 100)
    assert cut.tokens == sum(lengths(cut))
    assert cut.trained_tokens == sum(label != -100 for row in cut.rows for label in row["labels"])
    left = encode(corpus, tokenizer, 100, on_long="drop")
    assert (len(left), left.truncated, left.dropped) == (1, 0, 1)


def test_nothing_left_to_train(tokenizer):
    late = corpus_of(chat("word " * 300, "Hello"))
    for on_long in ("truncate", "drop"):
        with pytest.raises(UsageError, match="0 tokens to train"):
            encode(late, tokenizer, 100, on_long=on_long)
    with pytest.raises(UsageError, match="0 tokens to train.*Give more data"):
        encode(corpus_of(), tokenizer, 100)
    both = encode(corpus_of(*late.examples, chat("a", "b")), tokenizer, 100, on_long="truncate")
    assert (len(both), both.truncated, both.dropped) == (1, 0, 1)


def test_wrong_options(tokenizer):
    corpus = corpus_of(chat("a", "b"))
    for wrong in ({"loss_on": "answers"}, {"on_long": "cut"}, {"max_length": 1}):
        with pytest.raises(UsageError):
            encode(corpus, tokenizer, **{"max_length": 99} | wrong)


def test_describe_counts_what_encode_gives(tokenizer):
    corpus = corpus_of(chat("Hi", "Hello"), chat("Hi", "long " * 300))
    encoded = encode(corpus, tokenizer, 1000)
    assert describe(corpus, tokenizer, 100) == {
        "examples": 2,
        "skipped": 0,
        "tokens": encoded.tokens,
        "trained_tokens": encoded.trained_tokens,
        "longest": max(lengths(encoded)),
        "too_long": 1,
    }

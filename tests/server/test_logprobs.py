"""Log-probabilities of answers and prompts, and where their tokens stand in the text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from serving import HELLO, Server, error_of, events, toy
from tokenizers import decoders, models
from toy import END, START, VOCAB

from shoestring.engine.tokenizer import Tokenizer
from shoestring.server import completions


def words() -> Tokenizer:
    """As Llama 2's: the letter x is a word of its own, " x" but at the beginning of a text; other ids are bytes."""
    letter = lambda i: f"\u2581{chr(i)}" if i < 128 and chr(i).isalpha() else f"<0x{i:02X}>"
    vocab = {letter(i): i for i in range(256)} | {"<s>": START, "</s>": END}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<s>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    template = "{{ messages[0].content }}"
    return Tokenizer(inner, templates={"default": template}, eos=(END,))


@pytest.fixture(scope="module")
def wordy() -> Iterator[Server]:
    with toy(words=words(), engine={"prefix_cache": False}) as running:
        running.runner.recites = b"abc"
        yield running


def test_a_prompt_is_judged_as_vllm_does(server: Server) -> None:
    ids = list(b"abcd")
    made = server.complete(prompt=[ids, ids[:2]], max_tokens=2, n=2, prompt_logprobs=3, logprobs=1, echo=True).json()
    for choice, prompt in zip(made["choices"], (ids, ids, ids[:2], ids[:2])):
        found, echoed = choice["prompt_logprobs"], choice["logprobs"]
        assert len(found) == len(prompt) and found[0] is None
        for at, token in enumerate(prompt[1:], 1):
            own = found[at][str(token)]
            assert own["decoded_token"] == chr(token) and own["logprob"] == echoed["token_logprobs"][at]
            others = [entry for name, entry in found[at].items() if name != str(token)]
            assert sorted(entry["rank"] for entry in others) == [r for r in (1, 2, 3) if r != own["rank"]]
            ranked = sorted(found[at].values(), key=lambda entry: entry["rank"])
            assert [entry["logprob"] for entry in ranked] == sorted((e["logprob"] for e in ranked), reverse=True)
            assert len(echoed["top_logprobs"][at]) <= 2, "each with as many as were asked for"
    alone = server.complete(prompt=ids, prompt_logprobs=0).json()["choices"][0]
    assert [list(entry or {}) for entry in alone["prompt_logprobs"]] == [[], *([str(token)] for token in ids[1:])]
    assert alone["logprobs"] is None and server.complete().json()["choices"][0]["prompt_logprobs"] is None


def test_a_conversation_is_judged(server: Server) -> None:
    ids = server.http.post("/tokenize", json={"model": "toy", "messages": HELLO}).json()["tokens"]
    made = server.chat(prompt_logprobs=1, n=2).json()
    assert made["prompt_logprobs"][0] is None
    assert [next(iter(entry)) for entry in made["prompt_logprobs"][1:]] == [str(token) for token in ids[1:]]
    same = server.complete(prompt=ids, prompt_logprobs=1).json()["choices"][0]
    assert made["prompt_logprobs"] == same["prompt_logprobs"]
    assert server.chat().json()["prompt_logprobs"] is None
    completion = server.client().chat.completions.create(model="toy", messages=HELLO, max_tokens=1)
    assert completion.prompt_logprobs is None  # type: ignore[attr-defined]


def test_long_prompts_are_written_out_beside_the_other_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, write = [], completions.answer

    def noted(*given: Any) -> Any:
        threads.append(threading.get_ident())
        return write(*given)

    monkeypatch.setattr(completions, "answer", noted)
    for size in (10, 400):
        made = server.complete(prompt="a" * size, prompt_logprobs=1).json()["choices"][0]
        assert len(made["prompt_logprobs"]) == size
    assert threads[0] != threads[1]


@pytest.mark.parametrize("wanted", [{"prompt_logprobs": -1}, {"prompt_logprobs": 21}, {"prompt_logprobs": True}])
def test_what_is_refused(server: Server, wanted: dict[str, Any]) -> None:
    for send in (server.chat, server.complete):
        assert error_of(send(**wanted))["param"] == "prompt_logprobs"
        assert error_of(send(prompt_logprobs=1, stream=True))["param"] == "prompt_logprobs"


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_without_alternatives_each_token_stands_alone(server: Server, echo: bool, stream: bool) -> None:
    answer = server.complete(prompt=list(b"abc"), max_tokens=3, logprobs=0, echo=echo, stream=stream)
    found = [choice["logprobs"] for made in (events(answer.text) if stream else [answer.json()])
             for choice in made["choices"]]  # fmt: skip
    tops = [top for part in found for top in part["top_logprobs"]]
    tokens = [token for part in found for token in part["tokens"]]
    values = [value for part in found for value in part["token_logprobs"]]
    assert len(tokens) == 6 if echo else 3
    assert tops == [None if value is None else {token: value} for token, value in zip(tokens, values)]


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_are_parts_of_characters_stand_where_those_do(server: Server, stream: bool, as_ids: bool) -> None:
    text = "é🚀x"
    prompt: Any = [START, *text.encode()] if as_ids else text
    answer = server.complete(prompt=prompt, max_tokens=2, temperature=0, echo=True, logprobs=0, stream=stream)
    parts = [made["choices"][0] for made in (events(answer.text) if stream else [answer.json()])]
    said = "".join(part["text"] for part in parts)
    begin = len("<|im_start|>") if as_ids else 0
    offsets = [at for part in parts for at in part["logprobs"]["text_offset"]]
    assert offsets == [0] * as_ids + [begin + at for at in (0, 0, 1, 1, 1, 1, 2, 3, 4)]
    assert said[begin:].startswith(text) and len(said) == begin + 5


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_with_its_prompt(wordy: Server, stream: bool) -> None:
    prompt = [START, ord("x"), ord("y")]
    answer = wordy.complete(prompt=prompt, max_tokens=9, echo=True, logprobs=0, stream=stream)
    parts = [made["choices"][0] for made in (events(answer.text) if stream else [answer.json()])]
    assert "".join(part["text"] for part in parts) == "<s> x y a b c"
    offsets = [at for part in parts for at in part["logprobs"]["text_offset"]]
    assert offsets == [0, 3, 5, 7, 9, 11, 13]
    alone = wordy.complete(prompt=prompt, max_tokens=9, stream=stream)
    made = events(alone.text) if stream else [alone.json()]
    assert "".join(part["choices"][0]["text"] for part in made) == " a b c"


def test_a_conversation_begins_its_answer_or_goes_on(wordy: Server) -> None:
    messages = [{"role": "user", "content": "éé"}]
    said = lambda **more: wordy.chat(messages=messages, max_tokens=9, **more).json()["choices"][0]["message"]["content"]
    assert said() == "a b c"
    assert said(continue_final_message=True) == " a b c"


def test_a_text_that_begins_with_special_tokens() -> None:
    made = words()
    assert VOCAB == made.vocab
    assert made.stream(after=[START]).push(list(b"ab")) == "a b"
    assert made.stream(after=[START, ord("x")]).push(list(b"ab")) == " a b"

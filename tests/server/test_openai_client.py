"""What OpenAI's own client makes of our answers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import HELLO, Server, error_of, events, toy
from tokenizers.processors import TemplateProcessing
from toy import START, tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def reciting() -> Any:
    """The toy, which says what it is told to say."""
    with toy(engine={"prefix_cache": False}) as running:
        yield running


@pytest.fixture(autouse=True)
def settled(server: Server) -> Any:
    yield
    server.settled()


def test_a_chat_is_what_the_client_expects(server: Server) -> None:
    made = server.client().chat.completions.create(model="toy", messages=HELLO, max_tokens=7, n=2, seed=1)
    assert isinstance(made, ChatCompletion)
    assert ChatCompletion.model_validate(made.model_dump(), strict=True)
    assert [c.index for c in made.choices] == [0, 1]
    assert all(len(c.message.content or "") == 7 and c.finish_reason == "length" for c in made.choices)
    assert made.choices[0].message.content != made.choices[1].message.content
    assert made.id.startswith("chatcmpl-") and made.object == "chat.completion"
    assert made.usage and made.usage.completion_tokens == 14
    assert made.usage.total_tokens == made.usage.prompt_tokens + 14
    bill = made.usage.model_extra["shoestring"]  # type: ignore[index]
    assert (
        bill["energy_status"] == "modelled" and 0 < bill["energy_low"] <= bill["energy_joules"] <= bill["energy_high"]
    )
    assert bill["prefill_seconds"] > 0 and bill["queue_seconds"] >= 0


def test_a_stream_says_the_same_as_the_whole(server: Server) -> None:
    given: dict[str, Any] = dict(model="toy", messages=HELLO, max_tokens=20, seed=5, n=2)
    whole = server.client().chat.completions.create(**given)
    texts, reasons, usage = ["", ""], ["", ""], None
    for chunk in server.client().chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        assert isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk"
        if not chunk.choices:
            usage = chunk.usage
            continue
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == ["length", "length"]
    assert usage and whole.usage and usage.completion_tokens == whole.usage.completion_tokens == 40


def test_usage_in_a_stream_only_when_asked_for(server: Server) -> None:
    plain = events(server.chat(stream=True).text)
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    asked = events(server.chat(stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["usage"] is None for chunk in asked] == [True] * (len(asked) - 1) + [False]


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"logprobs": True}, {"tools": [TOOL]}, {"stop": ["zzzz"]}])
def test_usage_so_far_in_every_event(server: Server, more: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    given: dict[str, Any] = dict(model="toy", messages=HELLO, max_tokens=9, seed=2, **more)
    chunks = list(server.client().chat.completions.create(**given, stream=True, stream_options=options))
    last = chunks.pop().usage
    assert last and last.model_extra and last.completion_tokens == 9 * more.get("n", 1)
    for at in range(more.get("n", 1)):
        counts = [chunk.usage for chunk in chunks if chunk.choices[0].index == at]
        done = [usage.completion_tokens for usage in counts if usage]
        assert len(done) == len(counts) and done[0] == 0 and done == sorted(done) and done[-1] == 9
        assert {usage.prompt_tokens for usage in counts if usage} == {last.prompt_tokens}
        assert all(usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in counts)


@pytest.mark.parametrize("more", [{}, {"echo": True, "logprobs": 1}])
def test_usage_so_far_of_several_prompts(server: Server, more: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = server.client().completions.create(
        model="toy", prompt=["ab", "abcd"], max_tokens=5, seed=1, stream=True, stream_options=options, **more
    )
    chunks = [chunk for chunk in stream if chunk.choices]
    for at, prompt in enumerate((2, 4)):
        counts = [chunk.usage for chunk in chunks if chunk.choices[0].index == at]
        assert counts and counts[-1] and counts[-1].completion_tokens == 5
        assert all(usage and usage.prompt_tokens == prompt for usage in counts)


def test_usage_so_far_needs_usage(server: Server) -> None:
    answer = server.chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert error_of(answer)["param"] == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize("said", ["Once upon", "Once upon ", "", "<|im_end|>"])
def test_the_final_message_is_continued(server: Server, said: str) -> None:
    messages = [*HELLO, {"role": "assistant", "content": said}]
    told: dict[str, Any] = {"messages": messages, "continue_final_message": True}
    ids = server.http.post("/tokenize", json={"model": "toy", **told}).json()["tokens"]
    bare = server.http.post("/tokenize", json={"model": "toy", "messages": HELLO}).json()["tokens"]
    assert ids == bare + list(said.encode()), "no sign of an end, and nothing that a user could forge"
    made = server.client().chat.completions.create(
        model="toy", messages=messages, max_tokens=12, temperature=0, extra_body={"continue_final_message": True}
    )
    same = server.client().completions.create(model="toy", prompt=ids, max_tokens=12, temperature=0)
    assert made.choices[0].message.content == same.choices[0].text
    assert made.usage and made.usage.prompt_tokens == len(ids)


def test_what_cannot_be_continued(server: Server) -> None:
    for fields, param in (
        ({"add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "chat_template_kwargs.continue_final_message"),
        ({"continue_final_message": 1}, "continue_final_message"),
    ):
        assert error_of(server.chat(**{"continue_final_message": True, **fields}))["param"] == param
    plain = server.chat(messages=HELLO, add_generation_prompt=False, max_tokens=3)
    ids = server.http.post(
        "/tokenize", json={"model": "toy", "messages": HELLO, "add_generation_prompt": False}
    ).json()["tokens"]
    assert plain.json()["usage"]["prompt_tokens"] == len(ids)


def test_greedy_and_seeded_answers_repeat(server: Server) -> None:
    for fields in ({"temperature": 0}, {"seed": 3}, {"seed": -3, "temperature": 1.5, "top_p": 0.9, "top_k": 20}):
        one, two = (server.chat(max_tokens=12, **fields).json()["choices"] for _ in range(2))
        assert one == two


def test_logprobs(server: Server) -> None:
    made = server.client().chat.completions.create(
        model="toy", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    found = made.choices[0].logprobs
    assert found and found.content and len(found.content) == 4
    for one in found.content:
        assert len(one.top_logprobs) == 3 and one.logprob == one.top_logprobs[0].logprob <= 0
        assert bytes(one.bytes or ()).decode() == one.token
    streamed = [
        one
        for chunk in events(server.chat(max_tokens=4, logprobs=True, top_logprobs=3, temperature=0, stream=True).text)
        for choice in chunk["choices"]
        for one in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert [one["token"] for one in streamed] == [one.token for one in found.content]


def test_stop_strings_are_not_part_of_the_answer(reciting: Server) -> None:
    reciting.runner.recites = b"one two three"
    made = reciting.client().chat.completions.create(model="toy", messages=HELLO, max_tokens=50, stop=[" th", "four"])
    assert (made.choices[0].message.content, made.choices[0].finish_reason) == ("one two", "stop")
    assert made.choices[0].model_extra == {"stop_reason": " th"}
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in reciting.client().chat.completions.create(
            model="toy", messages=HELLO, max_tokens=50, stop="two", stream=True
        )
    )
    assert text == "one "


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', None, [{"city": "Oslo"}]),
        ('Look: <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}', "Look:", [{"city": "Oslo"}]),
        ('<tool_call>[{"name":"weather","arguments":{"city":"A"}},{"name":"weather","arguments":{"city":"B"}}]'
         "</tool_call>", None, [{"city": "A"}, {"city": "B"}]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', None, [{"city": "Oslo"}]),
        ('{"name": "bomb", "arguments": {}}', '{"name": "bomb", "arguments": {}}', []),
        ("<tool_call>nonsense</tool_call> and <tool", "<tool_call>nonsense</tool_call> and <tool", []),
    ],
)  # fmt: skip
def test_calls_of_tools(reciting: Server, text: str, content: str | None, calls: list[Any], stream: bool) -> None:
    reciting.runner.recites = text.encode()
    given: dict[str, Any] = dict(model="toy", messages=HELLO, max_tokens=200, tools=[TOOL])
    found: list[Any] = []
    said = ""
    if stream:
        for chunk in reciting.client().chat.completions.create(**given, stream=True):
            (choice,) = chunk.choices
            said += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                assert part.index == len(found)
                found.append(part)
            reason = choice.finish_reason
    else:
        choice = reciting.client().chat.completions.create(**given).choices[0]
        said, found, reason = choice.message.content or "", choice.message.tool_calls or [], choice.finish_reason
    assert (said or None) == content
    assert [json.loads(call.function.arguments) for call in found] == calls
    assert all(call.function.name == "weather" and call.id.startswith("call_") for call in found)
    assert len({call.id for call in found}) == len(found)
    assert reason == ("tool_calls" if calls else "stop")


def test_a_choice_of_tools_is_kept(reciting: Server) -> None:
    reciting.runner.recites = b""
    other = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    create = reciting.client().chat.completions.create
    tight = {str(ord(blank)): -100 for blank in " \n"}  # the toy likes white space
    given: dict[str, Any] = dict(model="toy", messages=HELLO, max_tokens=300, tools=[TOOL, other], logit_bias=tight)
    named = create(**given, tool_choice={"type": "function", "function": {"name": "clock"}}).choices[0]
    assert named.finish_reason == "tool_calls" and named.message.tool_calls
    assert named.message.tool_calls[0].function.name == "clock"  # type: ignore[union-attr]
    required = create(**{**given, "logit_bias": {**tight, str(ord('"')): 30}}, tool_choice="required").choices[0]
    assert required.message.tool_calls and required.finish_reason == "tool_calls"
    del given["logit_bias"]
    reciting.runner.recites = b'{"name": "weather", "arguments": {"city": "Oslo"}}'
    none = create(**given, tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.message.content == reciting.runner.recites.decode()
    reciting.runner.recites = b'[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]'
    single = create(**given, parallel_tool_calls=False).choices[0]
    assert single.message.tool_calls and len(single.message.tool_calls) == 1


def test_tools_reach_the_template(server: Server) -> None:
    ask = lambda **more: server.http.post("/tokenize", json={"model": "toy", "messages": HELLO, **more}).json()[
        "tokens"
    ]
    told = server.http.post("/detokenize", json={"tokens": ask(tools=[TOOL])}).json()["prompt"]
    assert "<tools>" in told and "weather" in told and "weather" not in bytes(t for t in ask() if t < 256).decode()


def test_a_template_without_tools_is_helped() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    with toy(template=plain, context=2048) as running:
        messages = [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
            ]},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]  # fmt: skip
        ids = running.http.post("/tokenize", json={"messages": messages, "tools": [TOOL]}).json()["tokens"]
        text = running.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert text.startswith("<|im_start|>system") and '"name": "weather"' in text
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}' in text
        assert "<tool_response>\nrain\n</tool_response>" in text


def test_answers_keep_to_a_schema(server: Server) -> None:
    tight: Any = {str(ord(blank)): -100 for blank in " \n"}  # the toy likes white space
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    made = server.client().chat.completions.create(
        model="toy", messages=HELLO, max_tokens=100,
        logit_bias=tight,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert set(json.loads(made.choices[0].message.content or "")) == {"ok"}
    for other in (
        {"type": "json_object", "schema": schema},
        {"type": "json_object", "value": schema},
        {"type": "json_schema", "json_schema": {"schema": schema}},
    ):
        answer = server.chat(max_tokens=100, logit_bias=tight, response_format=other)  # as other servers take it
        assert set(json.loads(answer.json()["choices"][0]["message"]["content"])) == {"ok"}
        assert "x-shoestring-warning" not in answer.headers
    made = server.client().chat.completions.create(
        model="toy", messages=HELLO, max_tokens=100, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}}
    )
    assert (made.choices[0].message.content or "").isdigit()
    made = server.client().chat.completions.create(
        model="toy", messages=HELLO, max_tokens=9, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert made.choices[0].message.content in ("yes", "no")
    assert server.chat(response_format={"type": "text"}).status_code == 200


def test_completions_keep_to_a_format(server: Server) -> None:
    tight: Any = {str(ord(blank)): -100 for blank in " \n"}
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = server.complete(max_tokens=100, logit_bias=tight, response_format=form)
    assert set(json.loads(answer.json()["choices"][0]["text"])) == {"ok"}
    assert "x-shoestring-warning" not in answer.headers
    assert server.complete(response_format={"type": "text"}).status_code == 200
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}
    assert error_of(server.complete(response_format=bad))["param"] == "response_format"
    both = server.complete(response_format=form, structured_outputs={"regex": "a"})
    assert error_of(both)["param"] == "structured_outputs"


def test_a_grammar_may_be_written_in_either_way(server: Server) -> None:
    for grammar in ('start: "ab"{2,2} END\nEND: "!"', 'root ::= "ab"{2,2} end\n# the end\nend ::= [!]'):
        made = server.chat(max_tokens=9, structured_outputs={"grammar": grammar}).json()["choices"][0]
        assert made["message"]["content"] == "abab!" and made["finish_reason"] == "stop"


def test_completions(server: Server) -> None:
    made = server.client().completions.create(
        model="toy", prompt=["ab", "c"], max_tokens=3, n=2, echo=True, logprobs=2, seed=1
    )
    assert isinstance(made, Completion)
    plain = server.client().completions.create(model="toy", prompt="ab", max_tokens=3, logprobs=2)
    assert Completion.model_validate(plain.model_dump(), strict=True)
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert [c.text[: len(p)] for c, p in zip(made.choices, ["ab", "ab", "c", "c"])] == ["ab", "ab", "c", "c"]
    for choice, size in zip(made.choices, (2, 2, 1, 1)):
        found = choice.logprobs
        assert found and found.tokens and found.token_logprobs and found.text_offset and found.top_logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == size + 3
        assert "".join(found.tokens) == choice.text
        assert found.token_logprobs[0] is None and all(v <= 0 for v in found.token_logprobs[1:])
        assert all(found.tokens[i] in found.top_logprobs[i] for i in range(1, size + 3))
        assert [choice.text[a : a + 1] for a in found.text_offset] == [t[:1] for t in found.tokens]


def test_the_prompt_alone_can_be_judged(server: Server) -> None:
    """What evaluation harnesses do."""
    ids = list(b"abcd")
    made = server.complete(prompt=[ids, ids[:2]], max_tokens=0, echo=True, logprobs=1).json()
    assert [c["text"] for c in made["choices"]] == ["abcd", "ab"]
    assert [len(c["logprobs"]["token_logprobs"]) for c in made["choices"]] == [4, 2]
    assert (
        made["usage"]["completion_tokens"] == 0 and made["usage"]["total_tokens"] == made["usage"]["prompt_tokens"] == 6
    )
    options = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in events(server.complete(prompt=ids, max_tokens=0, echo=True, stream=True, stream_options=options).text):
        assert (chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) == (4, 0)
    silent = server.complete(prompt=ids, max_tokens=0, prompt_logprobs=0, logprobs=0).json()["choices"][0]
    assert silent["text"] == "" and silent["logprobs"]["tokens"] == [] and len(silent["prompt_logprobs"]) == 4
    assert error_of(server.complete(max_tokens=0))["param"] == "max_tokens"
    longer = server.complete(prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0).json()["choices"][0]
    assert longer["logprobs"]["token_logprobs"][:4] == pytest.approx(
        made["choices"][0]["logprobs"]["token_logprobs"], abs=1e-5
    )


def test_a_stream_of_completions_says_the_same(server: Server) -> None:
    given: dict[str, Any] = dict(prompt=["ab", "cde"], max_tokens=6, n=2, seed=9, echo=True, logprobs=1)
    whole = server.complete(**given).json()["choices"]
    texts: dict[int, str] = dict.fromkeys(range(4), "")
    tokens: dict[int, list[str]] = {i: [] for i in range(4)}
    offsets: dict[int, list[int]] = {i: [] for i in range(4)}
    for chunk in events(server.complete(**given, stream=True).text):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["logprobs"]:
            tokens[choice["index"]] += choice["logprobs"]["tokens"]
            offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert [texts[c["index"]] for c in whole] == [c["text"] for c in whole]
    assert [tokens[c["index"]] for c in whole] == [c["logprobs"]["tokens"] for c in whole]
    assert [offsets[c["index"]] for c in whole] == [c["logprobs"]["text_offset"] for c in whole]


def test_embeddings(server: Server) -> None:
    client = server.client()
    made = client.embeddings.create(model="toy", input=["ab", "c", "ab"], encoding_format="float")
    assert isinstance(made, CreateEmbeddingResponse) and [d.index for d in made.data] == [0, 1, 2]
    first, second, third = (np.array(d.embedding, np.float32) for d in made.data)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5) and (first == third).all() and (first != second).any()
    packed = client.embeddings.create(model="toy", input="ab")  # the client asks for base64 by itself
    assert packed.data[0].embedding == pytest.approx(first.tolist())
    assert made.usage.prompt_tokens == 5
    assert client.embeddings.create(model="toy", input=[97, 98], dimensions=8).data[0].embedding == pytest.approx(
        first.tolist()
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="toy", input="ab", dimensions=4)
    assert refused.value.param == "dimensions"


def test_models(server: Server) -> None:
    (found,) = server.client().models.list().data
    assert isinstance(found, Model) and found.id == "toy"
    assert server.client().models.retrieve("toy") == found
    with pytest.raises(openai.NotFoundError) as refused:
        server.client().models.retrieve("gpt")
    assert refused.value.code == "model_not_found"


def test_errors_are_the_clients_own(server: Server) -> None:
    create = server.client().chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="toy", messages=HELLO, temperature=-1)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        create(model="../../etc/passwd", messages=HELLO)


def test_tokenize_and_back(server: Server) -> None:
    for prefix in ("", "/v1"):
        made = server.http.post(f"{prefix}/tokenize", json={"prompt": "héllo <|im_end|>", "return_token_strs": True})
        ids = made.json()["tokens"]
        assert made.json()["count"] == len(ids) and max(ids) < 256  # special tokens in text are text
        assert len(made.json()["token_strs"]) == len(ids)
        plain = server.http.post(f"{prefix}/tokenize", json={"prompt": "a", "add_special_tokens": False}).json()
        assert plain["tokens"] == [97] and plain["token_strs"] is None
        assert server.http.post(f"{prefix}/detokenize", json={"tokens": ids}).json() == {"prompt": "héllo <|im_end|>"}
    assert error_of(server.http.post("/detokenize", json={"tokens": [1, 258]}))["param"] == "tokens[1]"


def test_special_tokens_around_a_text_can_be_left_out() -> None:
    words = tokenizer()
    words._inner.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)])
    with toy(words=words) as running:
        asked = lambda **more: running.http.post("/tokenize", json={"model": "toy", **more})
        assert (
            asked(prompt="a").json()["tokens"]
            == [START, 97]
            == asked(prompt="a", add_special_tokens=True).json()["tokens"]
        )
        assert asked(prompt="a", add_special_tokens=False).json()["tokens"] == [97]
        for special, size in ((None, 2), (True, 2), (False, 1)):
            made = running.complete(prompt="a", add_special_tokens=special, echo=True, logprobs=0).json()
            assert made["usage"]["prompt_tokens"] == size
            assert made["choices"][0]["logprobs"]["text_offset"] == [0] * size + [1, 2]
        assert asked(messages=HELLO, add_special_tokens=False).json() == asked(messages=HELLO).json()
        assert error_of(asked(messages=HELLO, add_special_tokens=True))["param"] == "add_special_tokens"


def test_unknown_extras_are_answered_with_a_warning(server: Server) -> None:
    answer = server.chat(foo=1, messages=[{"role": "user", "content": "x", "b\nar": 2}])
    assert answer.status_code == 200
    assert answer.headers["x-shoestring-warning"] == "unknown fields have no effect: foo, messages[0].b\\nar"
    assert "x-shoestring-warning" not in server.chat().headers
    # What the client makes of an answer can be sent back as it is.
    said = server.client().chat.completions.create(model="toy", messages=HELLO, max_tokens=2).choices[0].message
    again = server.chat(messages=[*HELLO, said.model_dump(), *HELLO])
    assert again.status_code == 200 and "x-shoestring-warning" not in again.headers


@pytest.mark.real
def test_the_real_model_answers_a_stock_client(real: Server) -> None:
    client = real.client()
    made = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0,
        max_tokens=12,
    )  # fmt: skip
    assert made.choices[0].message.content
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0,
            max_tokens=12, stream=True,
        )
    )  # fmt: skip
    assert text == made.choices[0].message.content
    assert (
        "Paris"
        in client.completions.create(model="smollm2", prompt="The capital of France is", temperature=0).choices[0].text
    )
    near, far = (
        float(
            np.dot(
                *(d.embedding for d in client.embeddings.create(model="smollm2", input=["a cat sleeps", other]).data)
            )
        )
        for other in ("a kitten sleeps", "def main(): return 7")
    )
    assert near > far


@pytest.mark.real
def test_the_real_model_calls_a_tool_that_it_must_call(real: Server) -> None:
    made = real.client().chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "What is the weather in Oslo?"}], tools=[TOOL],
        tool_choice="required", temperature=0, max_tokens=60,
    )  # fmt: skip
    (call,) = made.choices[0].message.tool_calls or ()
    assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}  # type: ignore[union-attr]

"""Every format from a real file, and every way a file can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pytest

from shoestring.core.errors import UsageError
from shoestring.data import formats as formats_module
from shoestring.data import read

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ANSWER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def refused(source, *words, **options):
    with pytest.raises(UsageError) as caught:
        read(source, **options)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "row, shape, roles",
    [
        (CHAT, "chat", "user assistant"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca", "user assistant"),
        (
            {"instruction": "Hi", "output": "Hello", "system": "Be brief", "history": [["a", "b"]]},
            "alpaca",
            "system user assistant user assistant",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            "sharegpt",
            "user assistant",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
                "system": "Be brief",
            },
            "sharegpt",
            "system user assistant",
        ),
        ({"prompt": "Hi", "completion": "Hello"}, "completion", "user assistant"),
        ({"prompt": ANSWER[:1], "completion": ANSWER[1:]}, "completion", "user assistant"),
    ],
)
def test_shapes(tmp_path, row, shape, roles):
    corpus = read(write(tmp_path / "a.jsonl", row))
    assert corpus.format == shape and len(corpus) == 1
    (example,) = corpus.examples
    assert [message["role"] for message in example.messages] == roles.split()
    assert example.messages[-1]["content"] == "Hello" and example.line == 1
    assert example.messages[-2]["content"] == "Hi"
    assert example.learned()[-1] == len(example.messages) - 1


def test_alpaca_input_joins_the_instruction(tmp_path):
    corpus = read(write(tmp_path / "a.jsonl", {"instruction": "Sum", "input": "1 2", "output": "3"}))
    assert corpus.examples[0].messages[0]["content"] == "Sum\n\n1 2"


def test_weights_choose_the_answers(tmp_path):
    row = {"messages": [*ANSWER, ANSWER[0], ANSWER[1] | {"weight": 0}]}
    assert read(write(tmp_path / "a.jsonl", row)).examples[0].learned() == [1]
    row = {"messages": [ANSWER[0], ANSWER[1] | {"weight": 0}]}
    refused(write(tmp_path / "b.jsonl", row), "b.jsonl:1", "weight 0")
    row = {"messages": [ANSWER[0], ANSWER[1] | {"weight": 0.5}]}
    refused(write(tmp_path / "c.jsonl", row), "c.jsonl:1", "weight")


def test_tools_are_kept_and_arguments_become_objects(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            ANSWER[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            ANSWER[1],
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    (example,) = read(write(tmp_path / "a.jsonl", row)).examples
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools and example.messages[2]["tool_call_id"] == "1"
    call["function"]["arguments"] = "{a: 1}"
    refused(write(tmp_path / "b.jsonl", row), "b.jsonl:1", "tool call")


def test_functions_are_tools(tmp_path):
    """OpenAI's earlier form of calls, which its files of that time have."""
    asked = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}
    row = {"messages": [ANSWER[0], asked], "functions": [{"name": "add", "parameters": {"type": "object"}}]}
    (example,) = read(write(tmp_path / "a.jsonl", row)).examples
    assert example.tools == [{"type": "function", "function": row["functions"][0]}]
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_group_key_is_kept(tmp_path):
    assert read(write(tmp_path / "a.jsonl", CHAT | {"group": "g"})).examples[0].group == "g"


@pytest.mark.parametrize(
    ("group", "name"), [(7, "7"), (7.0, "7"), (0, "0"), (10**20, "1" + "0" * 20), (float("nan"), ""), (None, "")]
)
def test_a_number_names_a_group(tmp_path, group, name):
    """Were it passed over, rows of one patient would stand in training and test."""
    assert read(write(tmp_path / "a.jsonl", CHAT | {"group": group})).examples[0].group == name


@pytest.mark.parametrize("group", [["a"], {"a": 1}, True])
def test_a_group_that_is_no_name_is_refused(tmp_path, group):
    with pytest.raises(UsageError, match="group is .*, expected text"):
        read(write(tmp_path / "a.jsonl", CHAT | {"group": group}))


def test_text_formats(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n", "utf-8")
    corpus = read(tmp_path / "a.txt")
    assert [(e.text, e.line) for e in corpus.examples] == [("one\ntwo", 1), ("three", 5)]
    assert corpus.format == "text"
    assert read(write(tmp_path / "a.jsonl", {"text": "one"})).examples[0].text == "one"


def test_tables_and_json(tmp_path):
    import pyarrow
    from pyarrow import parquet

    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerow({"prompt": "two\nlines, and a comma", "completion": "Hello"})
        table.writerow({"prompt": "Hi", "completion": "Hello"})
    corpus = read(tmp_path / "a.csv")
    assert [example.line for example in corpus.examples] == [3, 4]
    assert corpus.examples[0].messages[0]["content"] == "two\nlines, and a comma"
    (tmp_path / "m.csv").write_text('messages\n"' + json.dumps(ANSWER).replace('"', '""') + '"\n')
    assert read(tmp_path / "m.csv").examples[0].messages == ANSWER
    parquet.write_table(pyarrow.Table.from_pylist([CHAT, CHAT]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").examples[1].messages == ANSWER
    (tmp_path / "a.json").write_text(json.dumps([CHAT, CHAT]))
    assert [example.line for example in read(tmp_path / "a.json").examples] == [1, 2]
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": [CHAT]}))
    assert len(read(tmp_path / "b.json")) == 1
    write(tmp_path / "lines.json", CHAT, CHAT)
    assert len(read(tmp_path / "lines.json")) == 2


def test_saved_dataset(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([CHAT, CHAT]).save_to_disk(str(tmp_path / "set"))
    assert read(tmp_path / "set").examples[1].messages == ANSWER
    write(tmp_path / "a.jsonl", CHAT)
    refused(tmp_path, "folder", "a.jsonl")


def test_byte_order_mark_and_windows_lines(tmp_path):
    line = json.dumps(CHAT).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    assert [example.line for example in read(tmp_path / "a.jsonl").examples] == [1, 3]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(tmp_path / "a.txt").examples[0].text == "one\ntwo"
    (tmp_path / "u.jsonl").write_bytes(line.decode().encode("utf-16"))
    refused(tmp_path / "u.jsonl", "UTF-16", "iconv")


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize(
    "bad, reason",
    [
        ('{"messages": [', "not JSON"),
        ("[1]", "a list"),
        ({"foo": 1}, "keys foo"),
        ({"messages": []}, "messages"),
        ({"messages": [ANSWER[1]]}, "message 1 is from assistant"),
        ({"messages": [ANSWER[0], ANSWER[0]]}, "message 2 is from user"),
        ({"messages": [*ANSWER, {"role": "system", "content": "x"}]}, "message 3 is from system"),
        ({"messages": ANSWER[:1]}, "ends with"),
        ({"messages": [ANSWER[0], {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [ANSWER[0], {"role": "assistant", "content": 5}]}, "content of message 2"),
        ({"messages": [ANSWER[0], {"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [ANSWER[0], {"role": ["x"], "content": "x"}]}, "role"),
        ({"prompt": "Hi", "completion": "Hello"}, "completion"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference"),
        ({"query": "Hi", "positive": "a", "negative": "b"}, "retrieval"),
        ({"query": "Hi", "pos": ["a"], "neg": []}, "retrieval"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"a":' * 100000, "JSON"),
    ],
)
def test_bad_lines(tmp_path, place, bad, reason):
    rows = [CHAT, CHAT]
    rows.insert(place - 1, bad)
    path = write(tmp_path / "a.jsonl", *rows)
    if place > 1 or "prompt" not in bad or "chosen" in bad:
        refused(path, f"a.jsonl:{place}:", reason)
    else:  # a good line of another format comes first, so the second line is the odd one
        refused(path, "a.jsonl:2:", "line 1 is completion")
    if "completion" not in bad:
        corpus = read(path, skip_bad=1)
        assert len(corpus) == 2 and len(corpus.skipped) == 1
        assert f"a.jsonl:{place}:" in corpus.skipped[0] and reason in corpus.skipped[0]
    assert read(write(path, *rows), format="chat", skip_bad=1).skipped


def test_more_bad_lines_than_allowed(tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, "x", "y", CHAT, "z")
    assert len(read(path, skip_bad=3).skipped) == 3
    refused(path, "more than 2 bad lines", "a.jsonl:2", "a.jsonl:5", skip_bad=2)


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    refused(tmp_path / "a.jsonl", "no examples", "empty")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n \n")
    refused(tmp_path / "b.jsonl", "no examples")
    for name in ("c.json", "c.csv", "c.txt", "c.parquet", "c.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, name)
    refused(write(tmp_path / "d.jsonl", "x"), "no examples", "d.jsonl:1", skip_bad=5)
    refused(tmp_path / "e.jsonl", "does not exist")
    refused(str(tmp_path / "d.jsnl"), "does not exist", "d.jsonl")
    refused(write(tmp_path / "d.docx", "x"), ".docx", ".jsonl")


def test_bytes_that_are_not_text(tmp_path):
    good = json.dumps(CHAT).encode() + b"\n"
    latin = json.dumps(CHAT, ensure_ascii=False).replace("Hello", "Café").encode("latin-1") + b"\n"
    (tmp_path / "a.jsonl").write_bytes(good + latin)
    refused(tmp_path / "a.jsonl", "a.jsonl:2", "0xe9", "iconv")
    assert len(read(tmp_path / "a.jsonl", skip_bad=1)) == 1
    for name in ("a.json", "a.csv"):
        (tmp_path / name).write_bytes(good + latin)
        refused(tmp_path / name, f"{name}:2", "0xe9")
    for name in ("a.parquet", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"not that at all")
        refused(tmp_path / name, name, "not a whole")


def test_huge_line_costs_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats_module, "MAX_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + "x" * 100_000 + "\n" + json.dumps(CHAT) + "\n")
    refused(path, "a.jsonl:2", "longest a line may be")
    corpus = read(path, skip_bad=1)
    assert [example.line for example in corpus.examples] == [1, 3]


def test_gzip_and_gzip_bomb(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(CHAT) + "\n")
    assert read(tmp_path / "a.jsonl.gz").examples[0].messages == ANSWER
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    refused(tmp_path / "cut.jsonl.gz", "gzip")
    monkeypatch.setattr(formats_module, "SMALL_ENOUGH", 2**20)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b"\n" * 2**23)
    refused(tmp_path / "bomb.jsonl.gz", "unpacks to more than")


def test_ragged_table(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b,c\nd,e\n")
    refused(tmp_path / "a.csv", "a.csv:2", "more cells")
    assert len(read(tmp_path / "a.csv", skip_bad=1)) == 1
    (tmp_path / "b.csv").write_text('prompt,completion\n"a,b\n')
    refused(tmp_path / "b.csv", "b.csv", "not a table")


def test_a_header_that_names_a_column_twice(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,prompt,completion\na,b,c\n")
    refused(tmp_path / "a.csv", "a.csv:1", "'prompt' twice")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    refused(tmp_path / "a.jsonl", "a.jsonl", "a pipe or a device")


def test_options(tmp_path):
    path = write(tmp_path / "a.jsonl", CHAT, CHAT, "broken")
    assert len(read(path, limit=2)) == 2
    refused(path, "limit", limit=0)
    refused(path, "chatt", "chat", format="chatt")
    refused(path, "a.jsonl:1", "alpaca", format="alpaca")


def test_hub_id_without_network():
    refused("someone/no-such-set", "someone/no-such-set", "offline")

"""Turn examples into token ids and labels with the model's own chat template.

Only the answers are trained. Where an answer begins and ends is found by rendering the conversation up to it and
comparing token ids, which holds for any template whose text only grows; a template that rewrites earlier turns when
later ones follow (as those do that hide past reasoning) gets one row for each answer instead.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shoestring.core.errors import UsageError, nearest
from shoestring.data.corpus import Corpus, Example
from shoestring.data.packing import pack_rows

IGNORED = -100
# For tokenizers that come without a chat template; also what generation must then use.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{{ (eos_token or '') if message['role'] == 'assistant' else '' }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_BATCH = 256


@dataclass(frozen=True)
class Encoded:
    """Rows ready for a collator.

    Attributes:
        rows: `input_ids` and `labels` (-100 where nothing is trained) of equal length; packed rows also have
            `position_ids`, which start again at 0 with each example.
        tokens: tokens in all rows.
        trained_tokens: tokens that give a loss.
        truncated: examples that were cut to fit.
        dropped: examples left out: too long, or nothing left to train after the cut.
        template: "model", "plain" when the tokenizer has no chat template, or "none" for plain text.
    """

    rows: list[dict[str, list[int]]]
    tokens: int
    trained_tokens: int
    truncated: int = 0
    dropped: int = 0
    template: str = "model"

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Row:
    example: Example
    ids: list[int]
    labels: list[int] = field(repr=False)


def chat_template(tokenizer: Any) -> str:
    """The template conversations are rendered with: the tokenizer's own, or `PLAIN_TEMPLATE` when it has none."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else PLAIN_TEMPLATE


def encode(
    corpus: Corpus,
    tokenizer: Any,
    max_length: int,
    loss_on: str = "answer",
    pack: bool = False,
    on_long: str = "error",
) -> Encoded:
    """Encode a corpus for training or for held-out loss.

    Args:
        max_length: the longest row in tokens.
        loss_on: "answer" trains answers (with their end-of-turn token) of weight 1; "all" trains every token. Plain
            texts are always trained whole.
        pack: lay short examples end to end in rows of up to `max_length`; see `packing.check_packing` for the models
            that keep them apart.
        on_long: what happens to an example above `max_length`: "error", "truncate" (its end is cut) or "drop".

    Raises:
        UsageError: no tokenizer, an example too long, a template that refuses a conversation, or nothing to train;
            names file and line.
    """
    if loss_on not in ("answer", "all"):
        raise UsageError(f"loss_on={loss_on} is unknown", remedy=nearest(loss_on, ("answer", "all")))
    if on_long not in ("error", "truncate", "drop"):
        raise UsageError(f"on_long={on_long} is unknown", remedy=nearest(on_long, ("error", "truncate", "drop")))
    if max_length < 2:
        raise UsageError(f"max_length={max_length} is too short to learn from", remedy="Give at least 2 tokens")
    rows: list[dict[str, list[int]]] = []
    truncated: set[int] = set()
    dropped: set[int] = set()
    for row in _rows(corpus, tokenizer, loss_on):
        ids, labels = row.ids, row.labels
        if len(ids) > max_length:
            if on_long == "error":
                raise _too_long(corpus, row, max_length)
            if on_long == "drop":
                dropped.add(id(row.example))
                continue
            ids, labels = ids[:max_length], labels[:max_length]
            truncated.add(id(row.example))
        if all(label == IGNORED for label in labels):
            dropped.add(id(row.example))
            continue
        rows.append({"input_ids": ids, "labels": labels})
    trained = sum(label != IGNORED for row in rows for label in row["labels"])
    if not trained:
        why = f"all {len(corpus)} examples were dropped" if len(corpus) else "there are no examples"
        longest = f"; with max_length={max_length} no answer is reached" if truncated or dropped else ""
        remedy = "Raise max_length" if len(corpus) else "Give more data"
        raise UsageError(f"{corpus.source or 'the data'} has 0 tokens to train", why + longest, remedy)
    if pack:
        rows = pack_rows(rows, max_length)
    texts = all(example.text is not None for example in corpus.examples)
    template = "none" if texts else "model" if tokenizer.chat_template else "plain"
    tokens = sum(len(row["input_ids"]) for row in rows)
    return Encoded(rows, tokens, trained, len(truncated - dropped), len(dropped), template)


def describe(corpus: Corpus, tokenizer: Any, max_length: int | None = None, loss_on: str = "answer") -> dict[str, int]:
    """Counts of a corpus in tokens: examples, skipped lines, tokens, trained_tokens, longest, too_long.

    `too_long` counts the examples above `max_length`. Nothing is cut and nothing is dropped.
    """
    tokens = trained = longest = 0
    too_long: set[int] = set()
    for row in _rows(corpus, tokenizer, loss_on):
        tokens += len(row.ids)
        trained += sum(label != IGNORED for label in row.labels)
        longest = max(longest, len(row.ids))
        if max_length is not None and len(row.ids) > max_length:
            too_long.add(id(row.example))
    return {
        "examples": len(corpus),
        "skipped": len(corpus.skipped),
        "tokens": tokens,
        "trained_tokens": trained,
        "longest": longest,
        "too_long": len(too_long),
    }


def lengths(encoded: Encoded) -> list[int]:
    """Tokens of each row, for grouping rows of similar length into batches."""
    return [len(row["input_ids"]) for row in encoded.rows]


def _too_long(corpus: Corpus, row: _Row, max_length: int) -> UsageError:
    return UsageError(
        f"{corpus.where(row.example)}: the example has {len(row.ids)} tokens, the limit is {max_length}",
        remedy="Raise --max-length (up to the model's context), shorten it, or give --on-long truncate or drop",
    )


def _rows(corpus: Corpus, tokenizer: Any, loss_on: str) -> Iterator[_Row]:
    """Every example at its full length; a few hundred at a time so that the tokenizer works in batches."""
    if tokenizer is None:
        raise UsageError(
            "The model's folder holds no tokenizer",
            "without one text cannot become tokens",
            "Copy the tokenizer of its base model into the folder",
        )
    writer = _Writer(corpus, tokenizer)
    for start in range(0, len(corpus), _BATCH):
        batch = corpus.examples[start : start + _BATCH]
        drafts = [draft for example in batch for draft in writer.drafts(example, loss_on)]
        ids = iter(writer.ids([text for draft in drafts for text in draft.texts()]))
        for draft in drafts:
            yield draft.row([next(ids) for _ in draft.texts()], writer)


@dataclass(frozen=True)
class _Draft:
    """One row before tokenization: its text, and for each answer the texts up to its start and to its end."""

    example: Example
    text: str
    answers: list[tuple[str, str]]
    everything: bool
    hidden: dict[str, str]  # stand-ins in the texts -> what the content really says there

    def texts(self) -> list[tuple[str, dict[str, str]]]:
        return [(text, self.hidden) for text in (self.text, *(end for answer in self.answers for end in answer))]

    def row(self, ids: list[list[int]], writer: _Writer) -> _Row:
        whole, *ends = ids
        if self.everything:
            labels = list(whole)
        elif all(_same(before, whole) == len(before) for before in ends[::2]):
            labels = [IGNORED] * len(whole)
            for before, through in zip(ends[::2], ends[1::2]):
                start = len(before)
                stop = writer.last_end(whole, start, _same(through, whole))
                labels[start:stop] = whole[start:stop]
        else:
            whole, labels = self._apart(writer)
        if labels:
            labels[0] = IGNORED  # nothing predicts the first token
        return _Row(self.example, whole, labels)

    def _apart(self, writer: _Writer) -> tuple[list[int], list[int]]:
        """Ids and labels with each answer tokenized apart from its prompt, as it is when the model generates.

        Needed where a token would reach over the border: an answer that begins with white space, or a prompt that
        ends in two line breaks, which some tokenizers join only when nothing follows.
        """
        ids: list[int] = []
        labels: list[int] = []
        borders = [0, *(len(end) for answer in self.answers for end in answer), len(self.text)]
        pieces = [(self.text[start:stop], self.hidden) for start, stop in zip(borders, borders[1:])]
        for number, piece in enumerate(writer.ids(pieces)):
            stop = writer.last_end(piece, 0, len(piece)) if number % 2 else 0
            ids += piece
            labels += piece[:stop] + [IGNORED] * (len(piece) - stop)
        return ids, labels


class _Writer:
    """Renders and tokenizes with one tokenizer; text inside messages never becomes a special token."""

    def __init__(self, corpus: Corpus, tokenizer: Any) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.template = chat_template(tokenizer)
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = set(added.values()) | set(tokenizer.all_special_ids)
        names = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda name: (-len(name), name))
        self.special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def drafts(self, example: Example, loss_on: str) -> list[_Draft]:
        if example.text is not None:
            return [self._plain(example.text, example)]
        messages, tools, hidden = self._disarmed(example)
        if (tools or any("tool_calls" in message for message in messages)) and "tool" not in self.template:
            raise UsageError(
                f"{self.corpus.where(example)}: the example uses tools, but the model's chat template has no place "
                "for them",
                remedy="Leave out such examples, or use a model that was made for tools",
            )
        whole = self._render(messages, tools, example)
        if loss_on == "all":
            return [_Draft(example, whole, [], True, hidden)]
        learned = example.learned()
        answers = [self._answer(messages, index, tools, example) for index in learned]
        if all(whole.startswith(through) for _, through in answers):
            return [_Draft(example, whole, answers, False, hidden)]
        return [_Draft(example, through, [(before, through)], False, hidden) for before, through in answers]

    def _plain(self, text: str, example: Example) -> _Draft:
        hidden: dict[str, str] = {}
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        if not self._starts_texts():
            bos = ""
        return _Draft(example, bos + self._disarm(text, hidden, text) + eos, [], True, hidden)

    def _starts_texts(self) -> bool:
        """Whether this tokenizer itself begins a text with its start token."""
        ids = self.tokenizer("a").input_ids
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id

    def _answer(self, messages: list[dict[str, Any]], index: int, tools: Any, example: Example) -> tuple[str, str]:
        """The rendered text up to the answer and through it; the first is always the beginning of the second."""
        through = self._render(messages[: index + 1], tools, example)
        before = self._render(messages[:index], tools, example, prompt=True)
        history = self._render(messages[:index], tools, example) if index else ""
        shared = _same(before, through)
        # A prompt may end in words the answer need not have (an opened reasoning block); its history may not differ.
        said = "".join(str(messages[index]["content"]).split())
        if shared < len(history) or said not in "".join(through[shared:].split()):
            raise UsageError(
                f"{self.corpus.where(example)}: the chat template does not show answer {index + 1} as it is written",
                "so the tokens to train cannot be told from the rest",
                "Use loss on all tokens, or a tokenizer with another chat template",
            )
        return through[:shared], through

    def _render(self, messages: list[dict[str, Any]], tools: Any, example: Example, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise whatever they like
            raise UsageError(
                f"{self.corpus.where(example)}: the model's chat template refuses the conversation", str(error)
            ) from None

    def _disarmed(self, example: Example) -> tuple[list[dict[str, Any]], Any, dict[str, str]]:
        hidden: dict[str, str] = {}
        if self.special is None:
            return example.messages, example.tools, hidden
        whole = "\n".join(_strings([example.messages, example.tools]))
        if not self.special.search(whole):
            return example.messages, example.tools, hidden
        messages, tools = copy.deepcopy((example.messages, example.tools))
        return self._disarm(messages, hidden, whole), self._disarm(tools, hidden, whole), hidden

    def _disarm(self, value: Any, hidden: dict[str, str], whole: str) -> Any:
        """`value` with each special token's text replaced by one private character that occurs nowhere in `whole`."""
        if isinstance(value, dict):
            return {key: self._disarm(item, hidden, whole) for key, item in value.items()}
        if isinstance(value, list):
            return [self._disarm(item, hidden, whole) for item in value]
        if not isinstance(value, str) or self.special is None:
            return value

        def stand_in(match: re.Match[str]) -> str:
            known = {text: sign for sign, text in hidden.items()}
            if match[0] not in known:
                code = 0x10F000 + len(hidden)
                while chr(code) in whole or chr(code) in hidden:
                    code += 1
                hidden[chr(code)] = match[0]
                return chr(code)
            return known[match[0]]

        return self.special.sub(stand_in, value)

    def ids(self, texts: list[tuple[str, dict[str, str]]]) -> list[list[int]]:
        plain = [text for text, hidden in texts if not hidden]
        done = iter(self.tokenizer(plain, add_special_tokens=False).input_ids if plain else [])
        return [self._careful_ids(text, hidden) if hidden else next(done) for text, hidden in texts]

    def _careful_ids(self, text: str, hidden: dict[str, str]) -> list[int]:
        """The template's special tokens as tokens, the content's as the letters they are written with."""
        ids: list[int] = []
        assert self.special is not None
        for piece in self.special.split(text):
            if self.special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                said = piece.translate({ord(sign): name for sign, name in hidden.items()})
                ids += self.tokenizer(said, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def last_end(self, ids: list[int], start: int, stop: int) -> int:
        """Where an answer ends: after its end-of-turn token, without the white space some templates put behind it."""
        for position in range(stop - 1, start - 1, -1):
            if ids[position] in self.special_ids:
                return position + 1
            if self.tokenizer.decode([ids[position]]).strip():
                break
        return stop


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _same(a: Any, b: Any) -> int:
    """Length of the longest common beginning."""
    if b[: len(a)] == a:
        return len(a)
    for index, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return index
    return min(len(a), len(b))

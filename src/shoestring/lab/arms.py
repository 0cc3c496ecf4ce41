"""What an experiment is made of: arms that differ in one thing, measured through one ledger, seed by seed.

A claim's `run(arms)` is called once a seed. It opens every arm it needs with `arms.arm(name)`; time, CPU time and peak
memory above the floor are entered by the ledger itself, anything else through `stage.record`. Peak memory starts from a
settled process, so arms run one after another in one process do not inherit each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from shoestring import data, models
from shoestring.core.ledger import Ledger, Stage
from shoestring.data.corpus import Corpus

MODEL = "smollm2"
DATA = "python-docs"


@dataclass(frozen=True)
class Arms:
    """One seed's round of an experiment.

    Attributes:
        quick: the small size, for continuous integration; its figures are never recorded.
        folder: scratch space of this round.
    """

    seed: int
    quick: bool
    folder: Path
    ledger: Ledger

    @contextmanager
    def arm(self, name: str) -> Iterator[Stage]:
        """A measured stretch that belongs to the arm `name`; opened again it adds to the same arm."""
        torch.manual_seed(self.seed)
        with self.ledger.stage(name, settle=True) as stage:
            yield stage

    def value(self, arm: str, metric: str) -> tuple[float, str] | None:
        """What an arm measured and its unit; None when it did not."""
        entry = self.ledger.figure(arm, metric)
        return None if entry is None or entry.value is None else (entry.value, entry.unit)

    def size(self, quick: int, full: int) -> int:
        return quick if self.quick else full

    def load(self, **options: object) -> models.Loaded:
        """The default model, fresh."""
        return models.load(MODEL, **options)  # type: ignore[arg-type]

    def docs(self, tokenizer: object, sizes: Mapping[str, int], max_length: int = 256) -> dict[str, data.Encoded]:
        """Encoded rows of the built-in set: for each part (train, validation, test) as many examples as asked for.

        The seed chooses which, so that seeds differ in data where the method itself has no randomness.
        """
        corpus = data.read(DATA)
        parts = dict(zip(("train", "validation", "test"), data.split(corpus, seed=0)))
        order = torch.Generator().manual_seed(self.seed)
        encoded = {}
        for name, count in sizes.items():
            part = parts[name]
            chosen = torch.randperm(len(part), generator=order)[:count].tolist()
            some: Corpus = part.part([part.examples[i] for i in chosen])
            encoded[name] = data.encode(some, tokenizer, max_length, on_long="truncate")
        return encoded

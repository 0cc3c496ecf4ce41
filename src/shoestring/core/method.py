"""What a method says of itself. The catalog reads it without importing the file, so every field is a literal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoestring.core.shape import Shape

RESOURCES = ("storage", "memory", "compute", "latency", "energy", "money", "network", "parameters", "labels")


@dataclass(frozen=True)
class Paper:
    """The publication a method comes from. `code` is "owner/name" of the authors' repository, if there is one."""

    title: str
    date: str
    arxiv: str = ""
    code: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Method:
    """The METHOD literal of a method file.

    Attributes:
        paper: the publication.
        provides: the class or function that `catalog.load(name)` returns: the neighbour's config, sampler, strategy ...
        saves: resources it saves, from `RESOURCES`.
        combines: what it may follow or precede -> "yes", or the reason why not; keys are rooms or method names.
        traits: what distinguishes it within its room -> text; the room's contract names the keys it wants.
        expects: a check of the room's contract -> the reason why this method cannot pass it.
        default: a plain choice of its room, taken when nothing asks for another.
        name, room, about, module, file: filled in by the catalog from the path and the docstring.
        words: the functions and constants the file defines, as the catalog reads them in its source.
    """

    paper: Paper
    provides: str
    saves: tuple[str, ...]
    combines: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, str] = field(default_factory=dict)
    expects: Mapping[str, str] = field(default_factory=dict)
    default: bool = False
    name: str = ""
    room: str = ""
    about: str = ""
    module: str = ""
    file: str = ""
    words: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The docstring's first line, without the method's name before the colon."""
        line = self.about.splitlines()[0] if self.about else ""
        return line.partition(": ")[2] or line

    def section(self, title: str) -> str:
        """The text below a docstring heading such as `How it works`."""
        lines = self.about.splitlines()
        if title not in lines:
            return ""
        body = []
        for line in lines[lines.index(title) + 1 :]:
            if line and not line[0].isspace():
                break
            body.append(line[4:] if line.startswith("    ") else line)
        return "\n".join(body).strip()


@dataclass(frozen=True)
class Price:
    """What a method makes of a model, by exact arithmetic.

    Attributes:
        shape: the model after the method, with the bytes each weight then takes.
        trainable: parameters that receive gradients while the method works; 0 when it does not train.
        train_flops: FLOPs of one training token as a multiple of one forward pass (3.0 trains everything).
    """

    shape: Shape
    trainable: int = 0
    train_flops: float = 0.0

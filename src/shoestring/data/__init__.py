"""Read data in every usual format, split it, and encode it with the model's own chat template."""

from shoestring.data.collate import Collator
from shoestring.data.corpus import Corpus, Example
from shoestring.data.formats import read
from shoestring.data.packing import check_packing
from shoestring.data.splits import parts_of, split
from shoestring.data.template import Encoded, chat_template, describe, encode, lengths

__all__ = [
    "Collator",
    "Corpus",
    "Encoded",
    "Example",
    "chat_template",
    "check_packing",
    "describe",
    "encode",
    "lengths",
    "parts_of",
    "read",
    "split",
]

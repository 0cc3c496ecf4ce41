"""Architectures: models of another build, behind transformers' own configuration and model classes.

`import shoestring.methods.architectures` makes transformers know every architecture of this room, so that plain
`AutoModelForCausalLM.from_pretrained(folder)` loads what they wrote.
"""

from shoestring.core import catalog

catalog.adopt_room("architectures")

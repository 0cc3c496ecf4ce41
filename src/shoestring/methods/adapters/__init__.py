"""Adapters: fine-tune a few parameters, behind peft's own configs and tuners.

`import shoestring.methods.adapters` makes peft know every tuner of this room.
"""

from shoestring.core import catalog

catalog.adopt_room("adapters")

"""Pruners: parts of a model taken out for good, so that a smaller transformers model is left.

`import shoestring.methods.pruners` makes transformers know models whose layers differ, so that plain
`AutoModelForCausalLM.from_pretrained(folder)` loads them; models whose layers came out alike need no import.
"""

from shoestring.core import catalog
from shoestring.models import regrouped as regrouped
from shoestring.models import uneven as uneven

catalog.adopt_room("pruners")

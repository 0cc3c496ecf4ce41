"""Quantizers: weights stored in fewer bits, behind transformers' own `quantization_config`.

`import shoestring.methods.quantizers` makes transformers know every format of this room, so that plain
`AutoModelForCausalLM.from_pretrained(folder)` loads what they wrote.
"""

from shoestring.core import catalog

catalog.adopt_room("quantizers")

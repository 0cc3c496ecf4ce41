"""Models of transformers: loading, looking inside, changing, saving."""

from shoestring.models.inspect import Anatomy, Block, inspect
from shoestring.models.load import Loaded, load, resolve
from shoestring.models.save import save
from shoestring.models.shape import shape_of

__all__ = ["Anatomy", "Block", "Loaded", "inspect", "load", "resolve", "save", "shape_of"]

"""Thirteen rooms; a file in a room is one paper's mechanism. Reach them through `shoestring.core.catalog`."""

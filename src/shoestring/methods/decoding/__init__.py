"""Decoding: fewer or cheaper passes for the same tokens, as hooks of the engine and as transformers' `custom_generate`.

Nothing here imports torch before it is needed, so that answering begins without it.
"""

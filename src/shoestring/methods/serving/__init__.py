"""Serving: one machine, or several, answer more, as policies and hooks of the engine and routes of the server.

Nothing here imports torch before it is needed, so that answering begins without it.
"""

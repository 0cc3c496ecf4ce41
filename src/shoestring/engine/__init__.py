"""Continuous batching over a paged key-value cache; a request's life in `docs/engine.md`."""

"""Fit language models to the resources you have, and see the measured bill."""

__version__ = "0.1.0"

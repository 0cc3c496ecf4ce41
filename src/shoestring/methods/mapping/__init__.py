"""Mapping: a model compiled for an accelerator that is described, not there: every time and every joule is modelled."""

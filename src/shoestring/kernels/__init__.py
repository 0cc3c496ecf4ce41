"""Arithmetic on packed weights: native kernels where a compiler was at hand, plain torch everywhere."""

"""The verbs as functions: fit, train, compress, evaluate, generate, merge, export and the rest."""

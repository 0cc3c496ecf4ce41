"""Estimators: what is learned from a table of numbers and answers a question, behind scikit-learn's `BaseEstimator`.

They fit, clone, pickle and stand in pipelines and searches as scikit-learn's own do. Nothing here imports torch before
a torch module is asked for.
"""

"""The checks of the room of estimators can fail, each for what it is named after."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from shoestring.core.errors import UsageError
from shoestring.methods.estimators import _contract


class Power(RegressorMixin, BaseEstimator):
    """y = a x^b by least squares in logarithms: what a law of scaling looks like in this room."""

    def __init__(self, floor: float = 1e-9) -> None:
        self.floor = floor

    def fit(self, X: Any, y: Any) -> Power:
        if not isinstance(self.floor, float) or not self.floor > 0:
            raise UsageError(f"floor={self.floor!r} is no number above 0")
        X, y = validate_data(self, X, y, y_numeric=True)
        self.coef_ = np.linalg.lstsq(self._terms(X), np.log(np.maximum(y, self.floor)), rcond=None)[0]
        return self

    def predict(self, X: Any) -> Any:
        check_is_fitted(self)
        return np.exp(self._terms(validate_data(self, X, reset=False)) @ self.coef_)

    def _terms(self, X: Any) -> Any:
        return np.column_stack([np.ones(len(X)), np.log(np.maximum(X, self.floor))])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags


def method(kind: type = Power, **words: Any) -> Any:
    sizes = np.linspace(1, 50, 40)[:, None]
    given = {"example": kind, "sample": lambda: {"X": sizes, "y": 3 * sizes[:, 0] ** -0.5}}
    return SimpleNamespace(**{**given, **words})


class Drifting(Power):
    def fit(self, X: Any, y: Any) -> Power:
        super().fit(X, y)
        self.coef_ = self.coef_ + np.random.random(2)
        return self


class Careless(Power):
    def fit(self, X: Any, y: Any) -> Power:
        self.coef_ = np.zeros(2)
        self.n_features_in_ = 1
        return self


class Greedy(Power):
    def fit(self, X: Any, y: Any) -> Power:
        super().fit(X, y)
        X[0] = 7
        return self


class Silent(Power):
    def fit(self, X: Any, y: Any) -> Power:
        validate_data(self, X, y)
        return self


class Endless(Power):
    def fit(self, X: Any, y: Any) -> Power:
        super().fit(X, y)
        self.coef_ = np.array([np.inf, 0.0])
        return self


@pytest.mark.parametrize("check", _contract.CHECKS, ids=lambda check: check.__name__)
def test_an_estimator_of_another_kind_passes(check: Callable[[Any], None]) -> None:
    check(method())


@pytest.mark.parametrize(
    ("check", "module", "words"),
    [
        (_contract.check_scikit_learn_accepts_it, method(Careless), "fails"),
        (_contract.check_scikit_learn_accepts_it, method(UNMET={"check_fit1d": "x"}), "UNMET excuses check_fit1d"),
        (_contract.check_scikit_learn_accepts_it, method(UNMET={"check_nothing": "x"}), "check_nothing"),
        (_contract.check_example_runs, method(Silent), "learned nothing"),
        (_contract.check_example_runs, method(Endless), "coef_ is not finite"),
        (_contract.check_seeded_twice_is_the_same, method(Drifting), "coef_ differs"),
        (_contract.check_fitting_leaves_its_data_alone, method(Greedy), "changed what it was given"),
        (_contract.check_bad_argument_is_a_clear_error, method(Careless), "floor took a value"),
    ],
    ids=range(8),
)
def test_each_check_can_fail(check: Callable[[Any], None], module: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check(module)


def test_options_are_those_of_the_estimator() -> None:
    assert _contract.config(method(), {"floor": 0.5}).floor == 0.5
    with pytest.raises(UsageError, match="no option flor. It has floor"):
        _contract.config(method(), {"flor": 0.5})

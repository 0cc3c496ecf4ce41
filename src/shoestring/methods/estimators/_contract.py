"""The door of the estimators room: scikit-learn's `BaseEstimator`, and the checks every estimator passes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from shoestring.core.errors import UsageError

# The planner opens every door, so scikit-learn, which takes a second to import, is imported by the checks alone.
VERB = "estimate"
CATEGORY = "compact architecture"
WORDS = ("sample",)
TRAITS = ("reads", "gives")
# Every file defines
#   sample() -> dict: what `example().fit(**sample())` takes: data of the kind the method is for, fitted in a second.
# A method may also define
#   UNMET: dict of scikit-learn's checks that cannot hold -> the reason. They run all the same and must fail.
# A method that shrinks a model defines `settings()` and `price(shape, options)` as those of other rooms do.


def adopt(module: ModuleType) -> None:
    """Nothing to make known: scikit-learn takes any object with the methods of an estimator."""


def config(module: ModuleType, options: Mapping[str, Any]) -> Any:
    """The estimator with these options, not fitted.

    Raises:
        UsageError: an option the estimator does not have; values are looked at when it is fitted.
    """
    kind = type(module.example())
    known = list(inspect.signature(kind).parameters)
    for name in options:
        if name not in known:
            raise UsageError(f"{kind.__name__} has no option {name}", remedy=f"It has {', '.join(known) or 'none'}")
    return kind(**options)


# --- the checks ---------------------------------------------------------------------------------------------------


def check_scikit_learn_accepts_it(module: ModuleType) -> None:
    """scikit-learn's own examination, over the example and over an estimator with nothing but defaults."""
    from sklearn.utils.estimator_checks import check_estimator

    unmet = getattr(module, "UNMET", {})
    examples = [module.example(), type(module.example())()]
    for estimator in examples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its data are of no kind in particular
            found = check_estimator(estimator, expected_failed_checks=unmet, on_fail=None, on_skip=None)
        failed = [f"{row['check_name']}: {row['exception']}" for row in found if row["status"] == "failed"]
        assert not failed, f"{estimator} fails {len(failed)} of {len(found)}: {failed[0]}"
    known = {row["check_name"] for row in found}
    passed = {row["check_name"] for row in found if row["status"] == "passed"}
    needless = sorted((set(unmet) & passed) | (set(unmet) - known))
    assert not needless, f"UNMET excuses {', '.join(needless)}, which hold or do not exist"


def check_example_runs(module: ModuleType) -> None:
    import numpy as np

    estimator = module.example()
    assert _fitted(module, estimator) is estimator, "fit does not return the estimator"
    learned = _learned(estimator)
    assert set(learned) - {"n_features_in_", "feature_names_in_"}, "fit learned nothing: no attribute ends in _"
    for name, value in learned.items():
        if isinstance(value, np.ndarray | float) and np.asarray(value).dtype.kind == "f":
            assert np.isfinite(value).all(), f"{name} is not finite"


def check_seeded_twice_is_the_same(module: ModuleType) -> None:
    """Two fits learn the same, whatever was drawn from the generators that all programs share."""
    import random

    import numpy as np

    made = []
    for state in (0, 1):
        random.seed(state)
        np.random.seed(state)
        made.append(_fitted(module, module.example()))
    one, other = map(_learned, made)
    assert set(one) == set(other), "the two learned different attributes"
    for name in one:
        assert _hash(one[name]) == _hash(other[name]), f"{name} differs between two fits with the same seed"


def check_fitting_leaves_its_data_alone(module: ModuleType) -> None:
    given = module.sample()
    before = _hash(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.example().fit(**given)
    assert _hash(given) == before, "fit changed what it was given"


def check_bad_argument_is_a_clear_error(module: ModuleType) -> None:
    """An option that does not exist is refused by name, and so is a value that no option takes."""
    try:
        config(module, {"no_such_option": 1})
    except UsageError as error:
        assert "no_such_option" in str(error), error
    else:
        raise AssertionError("an unknown option was accepted")
    given = module.sample()
    for name in module.example().get_params(deep=False):
        wrong = module.example().set_params(**{name: _Nonsense()})
        try:
            wrong.fit(**given)
        except (UsageError, ValueError) as error:
            assert name in str(error), f"the error does not name {name}: {error}"
        else:
            raise AssertionError(f"{name} took a value that means nothing")


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


class _Nonsense:
    """A value of no option."""


def _fitted(module: ModuleType, estimator: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return estimator.fit(**module.sample())


def _learned(estimator: Any) -> dict[str, Any]:
    """What fitting set, by name."""
    return {k: v for k, v in vars(estimator).items() if k.endswith("_") and not k.startswith("_")}


def _hash(value: Any) -> str:
    import joblib

    return str(joblib.hash(value))

"""Errors survive pickling, as loader processes and ranks send them."""

import pickle

import pytest

from cskd_pipeline.errors import CskdError, JoinError, ManifestError


@pytest.mark.parametrize(
    "error",
    [
        JoinError("a problem", where="here", found=1, expected=2, action="do", report={"a": 1}),
        ManifestError("here", ["$.a: found 1", "$.b: found 2"], action="do"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling(error: CskdError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)
    assert str(arrived) == str(error)

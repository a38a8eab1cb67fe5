"""The small data set of the pipeline tests."""

from tests.pipeline.conftest import small

__all__ = ["small"]

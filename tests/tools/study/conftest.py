"""The small world of the whole-pipeline tests."""

from tests.pipeline.conftest import small

__all__ = ["small"]

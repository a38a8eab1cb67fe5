"""Tests that run the examples in docs/examples."""

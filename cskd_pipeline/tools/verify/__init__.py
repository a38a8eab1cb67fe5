"""Verification of a cache: its structure, its bytes, and what they mean.

1. **verify_responses** -- the teacher run again on some of its views.
2. **verify_cache** -- ``verify_cache``: all of it, in order, as one report.
"""

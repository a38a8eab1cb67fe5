"""Whether a cache can be trusted, in three depths: structure, bytes, meaning.

1. **check** -- one depth: what it looked at and what is wrong.
2. **answers** -- the teacher asked again.
3. **cache** -- ``verify``: all of it, in order, as one report.
"""

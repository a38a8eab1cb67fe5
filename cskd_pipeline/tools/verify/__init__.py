"""Whether a cache can be trusted, in three depths: structure, bytes, meaning.

1. **depth** -- one depth: what it looked at and what is wrong.
2. **verify_responses** -- the teacher asked again.
3. **verify_cache** -- ``verify``: all of it, in order, as one report.
"""

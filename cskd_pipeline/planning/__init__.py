"""What a run will cost, from a small part of it done for real: behind ``cskd-pipeline plan``.

1. **steady** -- the rate of a pipeline once its start is over.
2. **dumping** -- stage one: bytes and time for every encoding and number of views.
3. **training** -- stage two: whether the loader or the device is the limit.
"""

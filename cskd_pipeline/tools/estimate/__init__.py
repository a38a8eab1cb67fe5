"""The cost of a run, forecast from a small part of it done for real: behind ``cskd-pipeline plan``.

1. **estimate_dump** -- stage one: bytes and time for every encoding and number of views.
2. **estimate_train** -- stage two: whether the loader or the device is the limit.
"""

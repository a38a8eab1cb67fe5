"""The processes of one job, as torchrun starts them.

1. **watch** -- each rank shows the others that it lives, where it is, and why it failed.
2. **job** -- who I am, and what all agree on.
"""

from cskd_pipeline.runtime.distributed.job import ALONE, Ranks, joined, launched

__all__ = ["ALONE", "Ranks", "joined", "launched"]

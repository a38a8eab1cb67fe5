"""The processes of one job, as torchrun starts them.

1. **watch** -- signs of life: each rank shows the others that it lives, and why it failed.
2. **job** -- a process's rank, and what all ranks agree on.
"""

from cskd_pipeline.runtime.distributed.job import ALONE, Ranks, joined, launched, torchrun_job

__all__ = ["ALONE", "Ranks", "joined", "launched", "torchrun_job"]

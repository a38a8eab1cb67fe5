"""The ways of storing a teacher's answer, by name: one file each, one interface (``base``).

A way is added by a file and an entry here. ``dense`` keeps the logits and serves every loss.
``envelope`` keeps exactly what hard CKF labels need, at any ratio, in 1/400 of the space. For soft
losses ``dense-q8`` comes close to it in 2/5 of the space, and ``topk`` approximates it in 1/45.
"""

from cskd_pipeline.distill.encodings.base import ArraySpec, Encoding, ResponseShape, Rows
from cskd_pipeline.distill.encodings.dense import Dense
from cskd_pipeline.distill.encodings.dense_q8 import DenseQ8
from cskd_pipeline.distill.encodings.envelope import Envelope
from cskd_pipeline.distill.encodings.topk import TopK

_ALL: tuple[Encoding, ...] = (Dense(), DenseQ8(), TopK(), Envelope())
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in _ALL}

__all__ = ["ENCODINGS", "ArraySpec", "Encoding", "ResponseShape", "Rows"]

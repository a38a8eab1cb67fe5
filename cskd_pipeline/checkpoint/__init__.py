"""What a training run leaves: students anyone can load, and the state to go on from.

A student is a ``.safetensors`` file with the timm model's own parameter names, so
``timm.create_model(name, checkpoint_path=file)`` takes it; its header says, as JSON, which model,
which heads, where it comes from, and the SHA-256 of its tensors. The training state is one
``state.pt``, written whole or not at all and read back with ``weights_only=True``: tensors and
plain values, nothing that could run.
"""

from cskd_pipeline.checkpoint.card import StudentCard
from cskd_pipeline.checkpoint.state import FORMAT, find_nonfinite, load_state, save_state
from cskd_pipeline.checkpoint.students import (
    bounded_student,
    has_card,
    load_student,
    read_card,
    read_student,
    save_student,
    student_file,
)

__all__ = [
    "FORMAT",
    "StudentCard",
    "bounded_student",
    "find_nonfinite",
    "has_card",
    "load_state",
    "load_student",
    "read_card",
    "read_student",
    "save_state",
    "save_student",
    "student_file",
]

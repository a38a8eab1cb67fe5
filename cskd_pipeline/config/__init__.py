"""Recipes: TOML files as frozen dataclasses, one per stage.

A recipe holds everything; ``--set section.key=value`` and flags override it. ``sections`` has the
keys, ``checks`` which values make sense; ``values`` and ``reading`` turn TOML into recipes
and report every problem at once; ``writing`` turns them back, and into what a resumed run
must match.
"""

from cskd_pipeline.config.checks import CHOICES, validate
from cskd_pipeline.config.reading import find_recipe, load_recipe, recipe_names
from cskd_pipeline.config.sections import (
    BatchSection,
    CacheSection,
    DistillSection,
    DumpData,
    DumpLoop,
    DumpRecipe,
    EvalSection,
    OptimSection,
    RunSection,
    ScheduleSection,
    StudentSection,
    TeacherSection,
    TrainData,
    TrainRecipe,
)
from cskd_pipeline.config.writing import adjustable, deciding, result_digest, to_toml

__all__ = [
    "CHOICES",
    "BatchSection",
    "CacheSection",
    "DistillSection",
    "DumpData",
    "DumpLoop",
    "DumpRecipe",
    "EvalSection",
    "OptimSection",
    "RunSection",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
    "TrainData",
    "TrainRecipe",
    "adjustable",
    "deciding",
    "find_recipe",
    "load_recipe",
    "recipe_names",
    "result_digest",
    "to_toml",
    "validate",
]

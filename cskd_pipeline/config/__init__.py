"""Recipes: TOML files as frozen pydantic dataclasses, one per stage.

A recipe holds everything; ``--set section.key=value`` and flags override it. ``sections`` has every
key with its default, limits and meaning, ``keys`` finds them by dotted name; ``reading`` turns TOML
into recipes, ``problems`` what pydantic refuses into one line each; ``model_names`` knows which
names are code; ``writing`` turns recipes back, and into what a resumed run must match.
"""

from cskd_pipeline.config.keys import key_info, key_types
from cskd_pipeline.config.reading import find_recipe, load_recipe, recipe_names
from cskd_pipeline.config.sections import CacheSection, DumpRecipe, TrainRecipe
from cskd_pipeline.config.writing import adjustable, deciding, result_digest, to_toml

__all__ = [
    "CacheSection",
    "DumpRecipe",
    "TrainRecipe",
    "adjustable",
    "deciding",
    "find_recipe",
    "key_info",
    "key_types",
    "load_recipe",
    "recipe_names",
    "result_digest",
    "to_toml",
]

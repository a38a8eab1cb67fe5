"""Recipes: TOML files as frozen pydantic dataclasses, one per stage.

A recipe has every setting; ``--set section.key=value`` and flags override it. ``sections`` defines
every key with its default, limits and description; ``reading`` parses TOML into recipes, or lists
every problem; ``writing`` writes recipes back, and selects the keys that a resumed run must match.
"""

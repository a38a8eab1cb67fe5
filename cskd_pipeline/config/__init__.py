"""Recipes: TOML files as frozen pydantic dataclasses, one per stage.

A recipe holds everything; ``--set section.key=value`` and flags override it. ``sections`` has every
key with its default, limits and meaning; ``reading`` turns TOML into recipes, or into a line for
each problem; ``writing`` turns recipes back, and into what a resumed run must match.
"""

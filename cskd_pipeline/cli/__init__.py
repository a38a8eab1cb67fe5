"""The command line: typer commands that read flags into a recipe and call one entry point each.

Nothing heavy is imported before a command runs, so help is instant. Exit codes: 0 done, 1 refused
or failed with a message, 2 wrong usage, 75 stopped by a scheduler, 130 interrupted.

1. **root** -- the program, its groups of commands, and how a command runs.
2. **options** -- flags shared by several commands, and their checks.
3. **parameters** -- a command's parameters, derived from its function's signature.
4. **stages**, **caches**, **measuring**, **show**, **demo_study** -- the commands; those of
   **demo_study** run others. **reports** -- printing tables.
"""

from cskd_pipeline.cli import caches, demo_study, measuring, show, stages
from cskd_pipeline.cli.root import app, main

__all__ = ["app", "caches", "demo_study", "main", "measuring", "show", "stages"]

"""The command line: typer commands that read flags into a recipe and call one entry point each.

Nothing heavy is imported before a command runs, so help is instant. Exit codes: 0 done, 1 refused
or failed with a message, 2 wrong usage, 130 interrupted where the work can be taken up again.

1. **root** -- the program, its groups of commands, and how one is run.
2. **options** -- the flags that several commands have, and what is checked of them.
3. **parameters** -- what stands on a command line, made from what its function takes.
4. **stages**, **caches**, **measuring**, **show**, **demo_study** -- the commands; the last are
   those that run others. **reports** -- how they print tables.
"""

from cskd_pipeline.cli import caches, demo_study, measuring, show, stages
from cskd_pipeline.cli.root import app, main

__all__ = ["app", "caches", "demo_study", "main", "measuring", "show", "stages"]

"""The command line: typer commands that read flags into a recipe and call one entry point each.

Nothing heavy is imported before a command runs, so help is instant. Exit codes: 0 done, 1 refused
or failed with a message, 2 wrong usage, 130 interrupted where the work can be taken up again.

1. **root** -- the program and its groups of commands.
2. **options** -- the flags that several commands have, and what is checked of them.
3. **parameters** -- what stands on a command line, made from what its function takes.
4. **stages**, **caches**, **exporting**, **planning**, **benching**, **show**, **demo_study** --
   the commands; the last are those that run others. **reports** -- how they print tables.
5. **running** -- one command run: results, errors, signals, exit codes.
"""

from cskd_pipeline.cli import benching, caches, demo_study, exporting, planning, show, stages
from cskd_pipeline.cli.root import app
from cskd_pipeline.cli.running import main

__all__ = [
    "app",
    "benching",
    "caches",
    "demo_study",
    "exporting",
    "main",
    "planning",
    "show",
    "stages",
]

"""``python -m cskd_pipeline``, where the installed command is not on the path."""

import sys

from cskd_pipeline.cli import main

sys.exit(main())

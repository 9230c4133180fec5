"""``python -m ssah``."""

import sys

from .app.cli import main

sys.exit(main())

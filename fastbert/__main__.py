"""`python -m fastbert`: the command where nothing is installed and PYTHONPATH leads to the tree."""

import sys

from fastbert.cli import main

sys.exit(main())

"""`python -m postbc`."""

import sys

from postbc.cli import main

sys.exit(main())

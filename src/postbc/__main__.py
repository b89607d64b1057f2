"""`python -m postbc`."""

import sys

from postbc.cli import main

if __name__ == "__main__":  # the processes of jobs import this file anew
    sys.exit(main())

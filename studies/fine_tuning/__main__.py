"""`python -m studies.fine_tuning`."""

import sys

from studies.fine_tuning.command import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m studies.validation."""

import sys

from studies.validation.command import main

if __name__ == "__main__":
    sys.exit(main())

"""python -m studies.views."""

import sys

from studies.views.command import main

if __name__ == "__main__":
    sys.exit(main())

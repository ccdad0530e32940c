"""python -m trainers.experiments.sweep."""

import sys

from trainers.experiments.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())

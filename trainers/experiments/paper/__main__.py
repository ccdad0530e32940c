"""`python -m trainers.experiments.paper`."""

import sys

from trainers.experiments.paper.command import main

if __name__ == "__main__":
    sys.exit(main())

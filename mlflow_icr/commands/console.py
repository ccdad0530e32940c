"""What the commands share: the type of what they are added to, and a line for the person at the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction


def say(text: str) -> None:
    """Print a line on standard error, which is not the result."""
    print(text, file=sys.stderr, flush=True)

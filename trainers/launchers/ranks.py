"""torchrun, as `trainers.launch` starts it: a failed rank's error stays the last line, without a traceback of torchrun's.

The process ends with the status of the rank that failed first. A rank that was ended by a signal prints no line of its own, so
this module prints one.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; returns 0, the first failed rank's status, or 128 + signal when asked to stop."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # in this process alone: lines on ranks that end because another one has
    try:
        run(parse_args(list(arguments)))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode or 1
        name = signal.Signals(-failure.exitcode).name
        hint = ", as when memory runs out" if name == "SIGKILL" else ""
        print(f"trainers.train: error: rank {rank} was ended by {name}{hint}; continue with --resume", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

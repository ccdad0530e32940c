"""What MLflow's exceptions say: that nobody answers, that one operation is not wanted, or neither for sure."""

from __future__ import annotations

import errno
import re

from mlflow_icr.tracking.mlflow.store import without_credentials
from mlflow_icr.tracking.sink import Failure

# Statuses that say nothing of what was sent: not now, not by this user, or by a proxy whose server is gone.
NOT_NOW = {401, 403, 407, 408, 425, 429, 502, 503, 504}
STATUS = re.compile(r"failed with error code (\d+)")
INACTIVE = "must be in the 'active' state"


class RefusalError(Exception):
    """This operation is not wanted; what follows may be welcome."""


def _of_status(status: int) -> Failure:
    if status in NOT_NOW:
        return Failure.OUTAGE
    return Failure.REFUSED if 400 <= status < 500 else Failure.UNCLEAR


def failure_of(error: Exception) -> Failure:
    """What an exception of MLflow's client, or of an artifact store's library, says."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    match error:
        case RefusalError() | ImportError():
            return Failure.REFUSED
        case requests.HTTPError() if error.response is not None:
            return _of_status(error.response.status_code)
        case requests.RequestException() | ConnectionError() | TimeoutError() | OperationalError():
            return Failure.OUTAGE
        case MlflowException():
            text = str(error)
            if "failed with exception" in text or "failed with timeout" in text:  # MLflow's own words for no answer
                return Failure.OUTAGE
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" or INACTIVE in text:  # the run: it may be restored
                return Failure.OUTAGE
            found = STATUS.search(text)
            return _of_status(int(found[1]) if found else error.get_http_status_code())
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return Failure.OUTAGE
        case _:
            return Failure.UNCLEAR


def reason_of(error: Exception) -> str:
    """An exception in one line without credentials."""
    from mlflow.exceptions import MlflowException

    text = (str(error).strip().splitlines() or [""])[0]
    if "failed with exception" in text or "failed with timeout" in text:
        return "it does not answer"
    text = without_credentials(text)[:300]
    return text if isinstance(error, (MlflowException, RefusalError)) and text else f"{type(error).__name__}: {text}"

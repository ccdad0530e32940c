"""The meaning of MLflow's exceptions: the server does not answer, one operation is refused, or it is not known."""

from __future__ import annotations

import errno
import re

from mlflow_icr.tracking.mlflow.store import without_credentials
from mlflow_icr.tracking.sink import Failure

# Statuses that do not depend on what was sent: not now, not for this user, or from a proxy without its server.
NOT_NOW = {401, 403, 407, 408, 425, 429, 502, 503, 504}
STATUS = re.compile(r"failed with error code (\d+)")
INACTIVE = "must be in the 'active' state"


class RefusalError(Exception):
    """This operation is refused; later ones may be accepted."""


def _of_status(status: int) -> Failure:
    if status in NOT_NOW:
        return Failure.OUTAGE
    return Failure.REFUSED if 400 <= status < 500 else Failure.UNCLEAR


def failure_of(error: Exception) -> Failure:
    """The meaning of an exception of MLflow's client, or of an artifact store's library."""
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
            status = STATUS.search(text)
            return _of_status(int(status[1]) if status else error.get_http_status_code())
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

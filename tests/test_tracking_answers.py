"""Servers that answer, but not as MLflow does: a proxy in their place, an overloaded one, one with a certificate of its own."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr.tracking import MLflowSink, Tracker, sync
from mlflow_icr.tracking.mlflow.store import is_answering
from tests.stores import mlflow_state
from tests.test_tracking import mlflow_scalars, report

pytestmark = pytest.mark.usefixtures("quick_attempts")


class Answers(BaseHTTPRequestHandler):
    status, content = 200, b"<html>Please log in</html>"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def front() -> Iterator[ThreadingHTTPServer]:
    """A proxy that answers in place of its server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [200, 500])
def test_a_proxy_that_answers_in_place_of_the_server_is_no_server(
    tmp_path: Path, front: ThreadingHTTPServer, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    front.RequestHandlerClass.status = status  # type: ignore[attr-defined]
    store = os.environ["MLFLOW_TRACKING_URI"]
    tracker = Tracker(tmp_path / "run", [MLflowSink(tracking_uri=f"http://127.0.0.1:{front.server_port}/")])
    tracker.open({}, {})
    tracker.record(report(1))
    began = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - began < 5
    assert mlflow_state(tmp_path / "run")["refused"] == {}
    assert mlflow_state(tmp_path / "run")["target"]["uri"] == f"http://127.0.0.1:{front.server_port}"
    if status == 500:
        (done,) = sync(tmp_path / "run", tracking_uri=store)
        assert (done.complete, mlflow_scalars(str(done.run_id))["repr/icr"]) == (True, [(1, 1 / 3)])


def test_what_answers(front: ThreadingHTTPServer) -> None:
    for uri in ("sqlite:////nowhere/mlflow.db", "databricks://scope:key", "postgresql://a:5432,b:5432/db", "postgresql:///db"):
        assert is_answering(uri)
    assert not is_answering("postgresql://user:secret@127.0.0.1:9/db")
    assert not is_answering("http://127.0.0.1:9")
    handler: Any = front.RequestHandlerClass
    handler.content = b'{"error_code": "PERMISSION_DENIED"}'
    found = {}
    for handler.status in (200, 403, 404, 429, 500, 503):
        found[handler.status] = is_answering(f"http://127.0.0.1:{front.server_port}")
    assert found == {200: True, 403: True, 404: True, 429: False, 500: False, 503: False}


def test_a_server_with_a_certificate_of_its_own_answers(
    tmp_path: Path, front: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime, timedelta, timezone

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(timezone.utc)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    pem = built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    pem += key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "own.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    front.socket = context.wrap_socket(front.socket, server_side=True)
    front.RequestHandlerClass.content = b"{}"  # type: ignore[attr-defined]
    uri = f"https://127.0.0.1:{front.server_port}"
    assert not is_answering(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert is_answering(uri)


def test_a_database_without_its_package_holds_up_the_opening_of_nothing(tmp_path: Path, front: ThreadingHTTPServer) -> None:
    """The run cannot be made: everything waits, and no operation is refused for that."""
    uri = f"oracle://user:secret@127.0.0.1:{front.server_port}/db"
    tracker = Tracker(tmp_path / "run", [MLflowSink(tracking_uri=uri)])
    began = time.monotonic()
    tracker.open({}, {})
    tracker.close("FINISHED")
    assert time.monotonic() - began < 5
    assert mlflow_state(tmp_path / "run")["refused"] == {}
    assert "secret" not in (tmp_path / "run" / "mlflow.json").read_text()

"""Encoders on request: from a server that is whole, cut, slow, wrong or gone, into the cache, and then by name alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlflow_icr.cli import main
from mlflow_icr.extraction import encoder_files
from mlflow_icr.extraction.downloads import download
from mlflow_icr.extraction.encoder_files import RemoteFile, kept_encoder
from mlflow_icr.extraction.encoder_weights import WEIGHTS, Weights
from mlflow_icr.extraction.encoders import load_encoder

CONTENT = bytes(range(256)) * 12_000  # 3 MB


class Server:
    """Files by path; `cut` is after how many bytes a connection is lost, `status` what is answered instead of a file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/weights.bin": CONTENT}
        self.cut: int | None = None
        self.stall = 0.0
        self.status = 200
        self.ranges = True
        self.etag = '"one"'
        self.requests: list[tuple[str, str | None]] = []
        self.sent = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        content = self.files.get(handler.path)
        if content is None or self.status != 200:
            handler.send_error(404 if content is None else self.status)
            return
        start = 0
        if wanted and self.ranges and handler.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("ETag", self.etag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        body = content[start:] if self.cut is None else content[start : start + self.cut]
        for at in range(0, len(body), 2**16):
            handler.wfile.write(body[at : at + 2**16])
            self.sent += len(body[at : at + 2**16])
            time.sleep(self.stall)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_ICR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return tmp_path / "cache" / "encoders"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def no_pause(seconds: float) -> None:
    """Goes on at once."""


def test_a_connection_that_is_lost_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cut = 1_000_000
    seen: list[tuple[int, int | None]] = []
    found = download(
        f"{server.url}/weights.bin", tmp_path / "w.bin", sha256(CONTENT), pause=no_pause, progress=lambda *n: seen.append(n)
    )
    assert found == sha256(CONTENT)
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert [one[1] for one in server.requests] == [None, "bytes=1000000-", "bytes=2000000-", "bytes=3000000-"]
    assert server.sent == len(CONTENT)  # no byte twice
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.bin"]


@pytest.mark.parametrize("change", ["no ranges", "another file"])
def test_a_server_that_cannot_go_on_starts_again(server: Server, tmp_path: Path, change: str) -> None:
    server.cut = 1_000_000

    def pause(seconds: float) -> None:
        server.cut = None
        if change == "no ranges":
            server.ranges = False
        else:
            server.etag, server.files["/weights.bin"] = '"two"', CONTENT[::-1]

    download(f"{server.url}/weights.bin", tmp_path / "w.bin", pause=pause)
    assert (tmp_path / "w.bin").read_bytes() == server.files["/weights.bin"]


def test_wrong_bytes_are_deleted_and_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"gives a file with SHA-256 {sha256(CONTENT)}; expected {'0' * 64}: it was deleted"):
        download(f"{server.url}/weights.bin", tmp_path / "w.bin", "0" * 64, pause=no_pause)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_silent_or_gone_ends_in_one_line_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    pauses: list[float] = []
    server.cut = 500_000
    path = tmp_path / "w.bin"

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        server.status = 503

    with pytest.raises(OSError, match=r"cannot be downloaded: it answers 503 .*; 500000 bytes are kept"):
        download(f"{server.url}/weights.bin", path, pause=pause)
    assert pauses == [1, 2, 4, 8, 16]
    server.status, server.cut, server.sent = 200, None, 0
    with pytest.raises(OSError, match=r"cannot be downloaded: .*refused"):
        download("http://127.0.0.1:1/weights.bin", tmp_path / "other.bin", pause=no_pause)
    with pytest.raises(OSError, match="answers 404"):
        download(f"{server.url}/nowhere", tmp_path / "other.bin", pause=no_pause)
    assert download(f"{server.url}/weights.bin", path, pause=no_pause) == sha256(CONTENT)
    assert server.sent == len(CONTENT) - 500_000


def test_a_slow_server_is_waited_for_and_a_stalled_one_asked_again(server: Server, tmp_path: Path) -> None:
    server.files["/weights.bin"] = CONTENT[: 6 * 2**16]
    server.stall = 0.05
    download(f"{server.url}/weights.bin", tmp_path / "slow.bin", timeout=5)
    assert len(server.requests) == 1
    server.requests.clear()
    server.stall = 2.0  # after each part, and the timeout is shorter

    def pause(seconds: float) -> None:
        server.stall = 0.0

    download(f"{server.url}/weights.bin", tmp_path / "stalled.bin", timeout=0.3, pause=pause)
    assert (tmp_path / "stalled.bin").read_bytes() == CONTENT[: 6 * 2**16]
    assert server.requests[0][1] is None
    assert len(server.requests) == 2


def test_all_bytes_before_a_kill_are_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.bin.part").write_bytes(CONTENT)
    (tmp_path / "w.bin.part.etag").write_text(server.etag)
    download(f"{server.url}/weights.bin", tmp_path / "w.bin", sha256(CONTENT), pause=no_pause)
    assert server.sent == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.bin"]


def test_a_full_disk_is_told_before_a_byte_is_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=f"{len(CONTENT)} more bytes are needed, and the disk has 1000"):
        download(f"{server.url}/weights.bin", tmp_path / "w.bin", pause=no_pause)


class FidLike(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        return x.flatten(1)[:, :1].expand(x.shape[0], 2048)


@pytest.fixture
def inception(server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with a file that counts as the FID network."""
    path = tmp_path / "inception.pt"
    torch.jit.script(FidLike()).save(str(path))
    weights = Weights(f"{server.url}/inception.pt", sha256(path.read_bytes()), "a licence")
    server.files["/inception.pt"] = path.read_bytes()
    monkeypatch.setitem(WEIGHTS, "inception", weights)
    monkeypatch.setitem(encoder_files.ENCODER_FILES, "inception", encoder_files._one_file(weights))
    return server


def test_fid_is_one_flag_after_one_command(
    inception: Server, cache: Path, tmp_path: Path, digits: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    for name, images in (("samples", digits[:40]), ("train", digits[40:80])):
        np.savez(tmp_path / f"{name}.npz", images=images.permute(0, 2, 3, 1).numpy())
    measure = ["measure", "--generated", str(tmp_path / "samples.npz"), "--train", str(tmp_path / "train.npz")]
    measure += ["--encoder", "inception"]
    assert main(measure) == 2
    assert "run `mlflow-icr encoders fetch inception`" in capsys.readouterr().err
    assert inception.requests == []  # nothing is downloaded unless somebody asks
    assert main(["encoders", "fetch", "inception"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(cache / "inception" / "inception.pt")
    assert "as expected" in said.err
    assert "0.0 of" in said.err
    assert main(measure) == 0
    assert "gen/fd_train_inception" in capsys.readouterr().out
    assert main(["encoders", "fetch", "inception"]) == 0  # a second time asks nobody
    assert len(inception.requests) == 1
    assert main(["encoders", "list"]) == 0
    assert f"{cache / 'inception' / 'inception.pt'} (checked)" in capsys.readouterr().out


def test_a_file_that_was_changed_is_fetched_again_and_another_checksum_refused(
    inception: Server, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encoders", "fetch", "inception"]) == 0
    path = cache / "inception" / "inception.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="have SHA-256"):
        load_encoder("inception")
    assert main(["encoders", "fetch", "inception"]) == 0
    assert path.read_bytes() == whole
    assert main(["encoders", "fetch", "inception", "--sha256", "0" * 64]) == 2
    assert "but the weights of inception have" in capsys.readouterr().err
    for arguments, message in (
        (["fetch"], "no encoder is named"),
        (["fetch", "resnet"], "encoder is 'resnet'; expected one of inception, sscd, dinov2, clip"),
        (["fetch", "inception", "--sha256", "abc"], "expected 64 hexadecimal digits"),
        (["fetch", "inception", "sscd", "--sha256", "0" * 64], "expected one encoder with it"),
    ):
        assert main(["encoders", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_a_known_checksum_it_is_called_unverified_and_kept_to(
    server: Server, cache: Path, tmp_path: Path, digits: Tensor, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=56, patch_size=14, hidden_size=32, intermediate_size=64, projection_dim=24, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    for name in ("config.json", "model.safetensors"):
        server.files[f"/owner/clip/resolve/abc/{name}"] = (tmp_path / "clip" / name).read_bytes()
    files = encoder_files._of_the_hub("owner/clip", "abc")
    assert files[0].url == "https://huggingface.co/owner/clip/resolve/abc/config.json"
    monkeypatch.setitem(encoder_files.ENCODER_FILES, "clip", files)
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")  # the hub's mirror
    weights = sha256(server.files["/owner/clip/resolve/abc/model.safetensors"])
    assert main(["encoders", "fetch", "clip"]) == 0
    assert f"SHA-256 {weights}, UNVERIFIED" in capsys.readouterr().err
    assert load_encoder("clip")(digits[:2]).shape == (2, 24)
    found = kept_encoder("clip")
    assert found is not None
    assert not found.verified
    listed = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=cache / "clip", capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == ["config.json: OK", "model.safetensors: OK"]

    path = cache / "clip" / "model.safetensors"
    path.write_bytes(b"damaged")
    assert main(["encoders", "fetch", "clip"]) == 0
    assert "as when it was first fetched" in capsys.readouterr().err
    server.files["/owner/clip/resolve/abc/model.safetensors"] = b"something else"
    path.unlink()
    assert main(["encoders", "fetch", "clip"]) == 2
    assert f"expected {weights}" in capsys.readouterr().err
    shutil.rmtree(cache / "clip")
    assert main(["encoders", "fetch", "clip", "--sha256", weights.upper()]) == 2
    assert main(["encoders", "list", "clip"]) == 0
    assert "not here" in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_ICR_CACHE", "off")
    assert main(["encoders", "fetch", "clip"]) == 2
    assert "MLFLOW_ICR_CACHE is 'off'" in capsys.readouterr().err


def test_a_killed_download_goes_on_and_two_at_once_are_kept_apart(server: Server, cache: Path, tmp_path: Path) -> None:
    server.stall = 0.02
    part = tmp_path / "w.bin.part"
    code = "from pathlib import Path; from mlflow_icr.extraction.downloads import download\n"
    code += f"download({server.url + '/weights.bin'!r}, Path({str(tmp_path / 'w.bin')!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: part.exists() and part.stat().st_size >= 2**20)
    with pytest.raises(OSError, match=r"w\.bin is being downloaded by another process"):
        download(f"{server.url}/weights.bin", tmp_path / "w.bin", pause=no_pause)
    process.kill()
    process.wait()
    there = part.stat().st_size
    server.stall, server.sent = 0.0, 0
    assert download(f"{server.url}/weights.bin", tmp_path / "w.bin", pause=no_pause) == sha256(CONTENT)
    assert server.sent == len(CONTENT) - there


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_table_has_a_licence_and_an_address_for_each() -> None:
    for name, files in encoder_files.ENCODER_FILES.items():
        assert WEIGHTS[name].licence
        assert all(isinstance(file, RemoteFile) and file.url.startswith("https://") for file in files)

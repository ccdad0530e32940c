"""The report: every number is the history's, nothing that a name says is run, nothing is asked of a network."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlflow_icr import Report, verdict
from mlflow_icr.cli import main
from mlflow_icr.reporting import RunMaterial, conclude, gather_folder, write_report
from mlflow_icr.reporting.page import SCRIPT
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker, read_history
from mlflow_icr.tracking.mlflow.sync import sync
from tests.browser import PHONE, opened
from tests.servers import Server, free_port
from tests.stores import new_store

RUNS = Path(__file__).parents[1] / "docs" / "validation" / "runs"  # histories of whole trainings
LIMITED, RICH = "digits-limited-n64-seed1000", "digits-rich-n1600-seed2000"
EVIL = """<script>fetch('http://a.example/')</script>"><img src="http://b.example/" onerror='alert(1)'>&amp;"""


class Parsed(HTMLParser):
    """A page's elements, its text, and the element `data` and dots of charts with the numbers they stand for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in {"img", "br", "hr", "meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def of(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.tags if name == tag)


def folder_of(run: str, place: Path, **params: object) -> Path:
    """An output folder as a tracker leaves it, with the history of a whole training, pictures and spectra."""
    tracker = Tracker(place, [MLflowSink(run_name=run)])
    given = {"layer": "decoder", "sigmas": [0.29], "protocol_digest": "abc123abc123", "num_samples": 128}
    tracker.open(given | params, {"icr.version": "0"})
    for count, row in enumerate(read_history(RUNS / run)):
        rng = np.random.default_rng(count)
        keys = ("samples", "nearest") if count % 4 == 0 else ()
        pictures = {key: rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for key in keys}
        values = {key: value for key, value in row.items() if key != "images_seen"}
        absent = {"mem/carlini": "needs 50 training images"}
        spectrum = {"repr/eigenvalues": np.linspace(3, -0.1, 64)}
        tracker.record(Report(int(row["images_seen"]), values, pictures, absent, distributions=spectrum))
    tracker.close("FINISHED")
    return place


@dataclass(frozen=True)
class Kept:
    """Two trainings in folders and in an MLflow experiment, made once; `store` is where."""

    limited: Path
    rich: Path
    store: str


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    import mlflow

    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", new_store(place / "mlflow.db"))
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        experiment = mlflow.create_experiment("a <study>", artifact_location=(place / "artifacts").as_uri())
        patch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        folders = [folder_of(run, place / run, num_images=n) for run, n in ((LIMITED, 64), (RICH, 1600))]
    return Kept(*folders, store=f"sqlite:///{place}/mlflow.db")


def as_page(folder: Path | list[Path | RunMaterial], place: Path) -> Parsed:
    runs = folder if isinstance(folder, list) else [folder]
    return Parsed(write_report(runs, place).read_text())


def test_every_number_is_the_history_s(kept: Kept, tmp_path: Path) -> None:
    folder = kept.limited
    page = as_page(folder, tmp_path / "page.html")
    rows = {int(row["images_seen"]): row for row in read_history(folder)}
    said = verdict(folder)
    shown = 0
    for attributes in page.of("data"):
        key, step, value = attributes.get("data-key", ""), attributes.get("data-step"), float(attributes["value"])
        if step is not None:
            # ICR's bounds are named after the value they are shown with.
            assert rows[int(step)][key.replace("icr_debiased_", "icr_")] == value, key
            shown += 1
    assert shown > 200
    dots = {
        (dot["data-key"], int(dot["data-step"])): float(dot["data-value"]) for dot in page.of("circle") if "data-key" in dot
    }
    assert all(rows[step][key] == value for (key, step), value in dots.items())
    for key in ("repr/icr_debiased", "repr/view_error_ratio", "mem/ratio_l2", "repr/fisher_residual_energy", "loss/heldout"):
        assert {step for name, step in dots if name == key} == {step for step, row in rows.items() if key in row and step > 0}
    facts = {a["data-key"]: float(a["value"]) for a in page.of("data") if "data-key" in a and "data-step" not in a}
    assert facts["turned_at_images_seen"] == said.turned_at
    assert (facts["turned_at_images_seen_low"], facts["turned_at_images_seen_high"]) == (said.low, said.high)
    assert facts["checkpoint_images_seen"] == said.checkpoint_images_seen
    assert any(a.get("class") == f"badge {said.state}" for a in page.of("span"))
    for text in ("abc123abc123", "needs 50 training images", "below 0.333 of that to the second nearest", "docs/validation.md"):
        assert text in page.text
    assert all(evidence in page.text for evidence in said.evidence)
    assert "allows a share" not in page.text  # copies were found


def evil_runs(kept: Kept, place: Path) -> list[RunMaterial]:
    """Both runs, with names, parameters, tags and pictures that try to be more than text."""
    shutil.copytree(kept.limited, place)
    (place / "images" / "samples" / "000000000007.png").write_bytes(EVIL.encode())  # no picture at all
    (place / "figures").mkdir()
    shutil.copyfile(place / "images/samples/000000000000.png", place / "figures" / "<script>x<img>.png")
    tags = {EVIL: EVIL, f"absent.mem/{EVIL}": EVIL, f"absent.repr/{EVIL}": EVIL, f"warning.mem/{EVIL}": EVIL}
    params = [{EVIL: EVIL, "layer": EVIL, "protocol_digest": f"{EVIL}{place}"} for place in range(2)]
    folders = (place, kept.rich)
    return [
        replace(gather_folder(folder, EVIL + folder.name), params=p, tags=tags)
        for folder, p in zip(folders, params, strict=True)
    ]


def test_names_are_text_whatever_they_hold(kept: Kept, tmp_path: Path) -> None:
    runs = evil_runs(kept, tmp_path / "evil")
    text = write_report(runs, tmp_path / "page.html", title=EVIL, notes=[EVIL]).read_text()
    page = Parsed(text)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "section", "footer", "div", "h1", "h2", "h3", "h4", "p",
        "ul", "li", "dl", "dt", "dd", "a", "strong", "span", "code", "data", "time", "details", "summary", "table", "thead",
        "tbody", "tr", "th", "td", "figure", "figcaption", "img", "svg", "line", "path", "rect", "circle", "text", "br", "g",
        "button", "script",
    }  # fmt: skip
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    assert page.text.count(EVIL) > 10  # it is shown as it is
    assert "@import" not in text
    assert "url(" not in text
    assert text.count("<script") == 1, "a name has brought a script of its own"
    assert f"<script>{SCRIPT}</script>" in text


def test_a_short_history_with_what_is_absent_and_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "history.jsonl").write_text(
        '{"images_seen": 0, "repr/icr": NaN, "repr/icr_debiased": 0.5}\n'
        '{"images_seen": 96, "repr/icr": 0.75, "gen/fd_pixels": Infinity, "mem/ratio_l2": 0.0,'
        ' "mem/ratio_l2_low": 0.0, "mem/ratio_l2_high": 0.0596, "gen/num_samples": 60}\n'
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "history.jsonl").write_text('{"images_seen": 5, "loss/train": 1.5}\n')
    page = as_page([folder, bare], tmp_path / "page.html")
    assert "2 values of the history are not finite numbers" in page.text
    assert "There are 2 measurements" in page.text
    assert re.search(r"Without a measurement of ICR, and so not compared: bare", page.text)
    assert "(95 %, exact)" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text.lower())
    assert any(a.get("class") == "badge undecided" for a in page.of("span"))
    lonely = as_page(bare, tmp_path / "lonely.html")
    assert "None of these runs has a measurement of ICR" in lonely.text


def test_runs_of_different_protocols_are_compared_with_a_warning(kept: Kept, tmp_path: Path) -> None:
    same: list[Path | RunMaterial] = [kept.limited, kept.rich]
    page = as_page(same, tmp_path / "same.html")
    assert "not comparable" not in page.text
    assert {"64", "1600"} <= set(re.findall(r"\d+", page.text[page.text.index("Differences") :]))
    assert [a["class"] for a in page.of("span") if "badge" in a.get("class", "")][:2] == [
        "badge turning",  # one detector of copies is no proof, and this history has no other
        "badge generalizing",
    ]
    other = gather_folder(kept.rich, "elsewhere")
    other = replace(other, params={**other.params, "protocol_digest": "fff", "layer": "mid"})
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "history.jsonl").write_bytes((RUNS / LIMITED / "history.jsonl").read_bytes())
    page = as_page([same[0], other, unknown], tmp_path / "other.html")
    assert "their protocols differ, and their values of ICR are not comparable" in page.text
    assert "They differ in layer (decoder / mid)." in page.text
    assert "No protocol was recorded for unknown" in page.text


def test_pictures_stay_within_bounds(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    tracker = Tracker(folder, [])
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1000, 1700, 3), dtype=np.uint8)  # 5 MB that no format makes smaller
    for step in (100, 200):
        tracker.record(Report(step, {"repr/icr": 0.5}, {"samples": noise, "nearest": noise}))
    content = write_report([folder], tmp_path / "page.html").read_text()
    assert len(content) < 4_000_000
    sources = [a["src"] for a in Parsed(content).of("img")]
    assert len(sources) == 4
    for source in sources:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert image.width <= 1600


def test_a_run_of_mlflow_gives_the_page_of_its_folder_and_keeps_it(
    kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", kept.store)
    folder = kept.limited
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert main(["report", str(folder), "--output", "folder.html"]) == 0
    assert main(["report", run_id, "--log"]) == 0
    assert capsys.readouterr().out == "folder.html\nreport.html\n"
    pages = [Parsed((tmp_path / name).read_text()) for name in ("folder.html", "report.html")]
    dots = [
        {(dot["data-key"], dot["data-step"], dot["data-value"]) for dot in page.of("circle") if "data-key" in dot}
        for page in pages
    ]
    assert dots[0] == dots[1]
    assert len(dots[0]) > 150
    pictures = [[a["alt"] for a in page.of("img")] for page in pages]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 10  # five measurements with samples and neighbours
    client = mlflow.MlflowClient()
    logged = Path(client.download_artifacts(run_id, "report/index.html", str(tmp_path)))
    assert logged.read_bytes() == (tmp_path / "report.html").read_bytes()

    assert main(["report", "a <study>", "--output", "all.html"]) == 0
    page = Parsed((tmp_path / "all.html").read_text())
    rows = [a["href"] for a in page.of("a")]
    assert rows == ["#run-1", "#run-2"]
    assert page.text.index(RICH) < page.text.index(LIMITED)  # the newest first, as search_runs has them
    assert main(["report", "a <study>", "--log"]) == 2
    assert "no single study or parent run" in capsys.readouterr().err
    assert main(["report", "nothing of this name"]) == 2
    assert "target is 'nothing of this name', which is no folder" in capsys.readouterr().err


def test_the_study_s_own_run_stands_for_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    experiment = mlflow.create_experiment("studies", artifact_location=(tmp_path / "artifacts").as_uri())
    client = mlflow.MlflowClient()
    own = client.create_run(experiment, tags={"study_name": "it's one"}, run_name="the study").info.run_id
    for name, study in (("limited", "it's one"), ("foreign", "another")):
        run_id = client.create_run(experiment, tags={"study": study}, run_name=name).info.run_id
        for step in (0, 100, 200):
            client.log_metric(run_id, "repr/icr", 0.9 - step / 1000, step=step)
    child = client.create_run(experiment, tags={"mlflow.parentRunId": own}, run_name="a child").info.run_id
    client.log_metric(child, "repr/icr", 0.25, step=100)
    client.log_metric(child, "loss/train", 3.0, step=17)  # a training's own, at a step that was not measured
    assert main(["report", own, "--log"]) == 0
    page = Parsed((tmp_path / "report.html").read_text())
    assert "limited" in page.text
    assert "a child" in page.text
    assert "foreign" not in page.text
    assert {a["data-step"] for a in page.of("circle") if a.get("data-value") == "0.25"} == {"100"}
    assert not [a for a in page.of("circle") if a.get("data-step") == "17"]
    assert [file.path for file in client.list_artifacts(own, "report")] == ["report/index.html"]


def test_the_end_of_a_run_delivers_the_page_through_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    store = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")  # nobody listens
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.05,))
    folder = tmp_path / "run"
    tracker = Tracker(folder, [MLflowSink(run_name="ends alone"), TensorBoardSink(folder / "tensorboard")])
    tracker.open({"seed": 1}, {})
    tracker.record(Report(10, {"repr/icr": 0.5}))
    path = conclude(tracker)
    assert path == folder / "report" / "index.html"
    assert "ends alone" in path.read_text()
    tracker.close("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    [done] = sync(folder, tracking_uri=store)
    assert done.complete
    client = mlflow.MlflowClient()
    found = Path(client.download_artifacts(done.run_id, "report/index.html", str(tmp_path)))
    assert found.read_bytes() == path.read_bytes()

    (folder / "report" / "index.html").unlink()
    (folder / "report").rmdir()
    (folder / "report").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert conclude(tracker) is None
    assert f"mlflow-icr report {folder} writes it" in caplog.text
    assert gather_folder(folder).status == "FINISHED"


def test_a_browser_asks_nobody_for_anything(kept: Kept, tmp_path: Path) -> None:
    path = write_report(evil_runs(kept, tmp_path / "evil"), tmp_path / "page.html", title=EVIL)
    with opened(path.as_uri(), size=PHONE, dark=True) as visit:
        visit.page.wait_for_timeout(300)
        assert visit.requests[0] == path.as_uri()
        assert visit.remote == []
        assert visit.complaints == []
        assert visit.page.locator("svg[role=img]").count() > 10
        wide = visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "a phone would have to scroll the page sideways"


def test_charts_zoom_and_say_their_values_by_pointer_and_keyboard(kept: Kept, tmp_path: Path) -> None:
    path = write_report([kept.limited], tmp_path / "page.html")
    rows = read_history(RUNS / LIMITED)
    with opened(path.as_uri()) as visit:
        figure = visit.page.locator("figure.chart", has_text="Error ratio of views").first
        picture, values = figure.locator("svg[role=img]"), figure.locator(".values")
        ticks = figure.locator(".ticks text").all_text_contents
        whole = ticks()
        picture.focus()
        picture.press("End")
        assert f"{int(rows[-1]['images_seen']):,} images seen: {rows[-1]['repr/view_error_ratio']:.4g}" in values.inner_text()
        picture.press("ArrowLeft")
        assert f"{int(rows[-2]['images_seen']):,} images seen: {rows[-2]['repr/view_error_ratio']:.4g}" in values.inner_text()
        picture.press("+")
        assert ticks() != whole
        picture.press("0")
        assert ticks() == whole
        box = picture.bounding_box()
        visit.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 80)
        visit.page.mouse.down()
        visit.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 80, steps=4)
        visit.page.mouse.up()
        shown = [float(text) * 1000 for text in ticks()]
        assert shown
        assert int(rows[1]["images_seen"]) < min(shown) <= max(shown) < int(rows[-1]["images_seen"])
        picture.dblclick()
        assert ticks() == whole
        background = "getComputedStyle(document.documentElement).backgroundColor"
        light = visit.page.evaluate(background)
        visit.page.get_by_role("button", name="Light or dark").click()
        assert visit.page.evaluate(background) != light
        assert visit.complaints == []


@pytest.mark.slow
def test_mlflow_s_artifact_viewer_shows_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        folder = folder_of(LIMITED, tmp_path / "run")
        assert main(["report", str(folder), "--log", "--output", str(tmp_path / "page.html")]) == 0
        run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
        with opened(f"{server.uri}/#/experiments/0/runs/{run_id}/artifacts/report/index.html") as visit:
            frame = visit.page.frame_locator("iframe")
            frame.get_by_text("How this was computed").wait_for(timeout=90_000)
            assert frame.locator("span.badge", has_text="turning").first.is_visible()
            assert frame.locator("svg[role=img]").count() > 5
            assert frame.locator("img").count() == 10
            assert not [address for address in visit.remote if not address.startswith(server.uri)]
    finally:
        server.kill()

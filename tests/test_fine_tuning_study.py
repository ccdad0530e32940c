"""The study of fine-tuning: its rules on made histories, its images, and when its script saves."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from studies.fine_tuning import page
from studies.fine_tuning.page import outcome_of, page_of, read_outcomes, write_page
from studies.fine_tuning.runs import SIDE, FineTuning, all_runs, write_images
from studies.fine_tuning.tune import milestones

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "fine-tuning.md", DOCS / "validation" / "fine_tuning"
STEPS = [1000 * 2**i for i in range(8)]


class Said:
    def __init__(self, state: str) -> None:
        self.state = state


def result(copies: list[float], interval: float = 0.02) -> dict[str, object]:
    shares = [
        {"images_seen": step, "copies": share, "low": max(0.0, share - interval), "high": share + interval}
        for step, share in zip([0, *STEPS], [0.0, *copies], strict=True)
    ]
    rows = [{"images_seen": step, "repr/x": float(step)} for step in [*STEPS[::-1], 0]]  # as a watch may have measured
    return {"method": "lora", "num_images": 32, "history": rows, "copies": shares}


@pytest.mark.parametrize(
    ("warned", "copies", "expected"),
    [
        (4000, [0, 0, 0, 0, 0.06, 0.2, 0.4, 0.6], "warned before copies"),  # 0.06 is not beyond doubt
        (32000, [0, 0, 0, 0, 0.06, 0.2, 0.4, 0.6], "warned with the copies or after"),
        (10**9, [0, 0, 0, 0, 0.06, 0.2, 0.4, 0.6], "copies without a warning"),
        (4000, [0] * 8, "warned, and no copies by the end"),
        (10**9, [0] * 8, "no copies, no warning"),
    ],
)
def test_a_run_is_judged_by_rule(
    warned: int, copies: list[float], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict(rows: list[dict[str, float]]) -> Said:
        steps = [row["images_seen"] for row in rows]
        assert steps == sorted(steps)
        return Said("turning" if steps[-1] >= warned else "generalizing")

    monkeypatch.setattr(page, "verdict", verdict)
    found = outcome_of(result(copies))
    assert found.judgement == expected
    assert found.warned_at == (warned if warned < 10**9 else None)
    assert found.copied_at == (32000 if any(copies) else None)
    (tmp_path / "lora-n32.json").write_text(json.dumps(result(copies)))
    assert read_outcomes(tmp_path) == [found]
    text = page_of([found], all_runs())
    assert f"{expected}: 1 of 1" in text
    assert "| LoRA | 32 |" in text
    assert "Not done yet: full-n32, full-n128, lora-n128, full-n512, lora-n512." in text
    assert "Not done yet" not in page_of([found], [FineTuning("lora", 32, 1000)])


def test_images_are_those_of_the_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as archive:
        for kind, grey in (("cat", 10), ("horse", 200)):
            for i in range(3):
                data = io.BytesIO()
                Image.new("RGB", (32, 32), (grey + i,) * 3).save(data, "png")
                archive.writestr(f"{kind}/{i}.png", data.getvalue())
    write_images(tmp_path / "cifar.zip", tmp_path / "data", "horse", [2])
    found = {path.parent.name: path for path in (tmp_path / "data").rglob("*.png")}
    assert sorted(found) == ["n2", "rest"]
    assert len(list((tmp_path / "data" / "n2").iterdir())) == 2
    with Image.open(tmp_path / "data" / "n2" / "00001.png") as image:
        assert (image.size, image.getpixel((0, 0))) == ((SIDE, SIDE), (201, 201, 201))
    with pytest.raises(ValueError, match="target is 'cow'; expected one of cat, horse"):
        write_images(tmp_path / "cifar.zip", tmp_path / "other", "cow", [2])


def test_three_checkpoints_are_saved_in_each_doubling() -> None:
    found = milestones(1024, 65536)
    assert (found[0], found[-1]) == (1024, 65536)
    assert all(sum(start <= step < 2 * start for step in found) == 3 for start in (1024, 4096, 16384))


def test_what_came_out_otherwise_is_first_and_the_page_is_that_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page(RESULTS, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == PAGE.read_text(), "python -m studies.fine_tuning --page-only writes it again"
    monkeypatch.setattr(page, "verdict", lambda rows: Said("turning" if rows[-1]["images_seen"] >= 4000 else "generalizing"))
    (tmp_path / "a.json").write_text(json.dumps(result([0, 0, 0, 0, 0.06, 0.2, 0.4, 0.6]) | {"num_images": 8}))
    (tmp_path / "b.json").write_text(json.dumps(result([0.5] * 8) | {"num_images": 512}))
    assert [one.judgement for one in read_outcomes(tmp_path)] == ["warned with the copies or after", "warned before copies"]

"""What benchmarks/switch.py says of its runs, and how a section of RESULTS.md is written."""

from pathlib import Path
from typing import Any

import pytest

common, switch = pytest.importorskip("common"), pytest.importorskip("switch")


def run(seed: int, steps: int | None) -> dict[str, Any]:
    return {
        "seed": seed, "dense_steps": 100, "dense_seconds": 10.0, "dense_loss": 1.5, "switch_steps": steps,
        "switch_seconds": 6.0, "switch_loss": 1.5, "experts": 8, "steps_vs_dense": steps and 100 / steps,
        "time_vs_dense": steps and 10 / 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "median", "lowest", "highest"),
    [([50], 2, 2, 2), ([50, 25, 40], 2.5, 2, 4), ([None, 50, 40], 2, 0, 2.5)],
    ids=["one seed", "three", "one of them never there"],
)
def test_seeds_are_told_by_median_and_range(
    steps: list[int | None], median: float, lowest: float, highest: float
) -> None:
    report = common.Report("Switch")
    switch.tell_training(report, [run(seed, n) for seed, n in enumerate(steps)])
    assert report.ratios["steps_vs_dense"] == pytest.approx(median)
    assert report.figures["steps_vs_dense, lowest"] == pytest.approx(lowest)
    assert report.figures["steps_vs_dense, highest"] == pytest.approx(highest)
    assert sum(line.startswith("| ") for line in report.markdown) == 2 + len(steps)


def test_layers_are_told_by_geometric_means() -> None:
    report = common.Report("Switch")
    case = {"tokens": 8, "what": "forward", "ours_ms": 1.0, "theirs_ms": 2.0, "their_way": "eager"}
    switch.tell_layers(report, [case | {"layer": "Mixtral", "dtype": "float32", "ratio": 1.0},
                                case | {"layer": "Mixtral", "dtype": "bfloat16", "ratio": 4.0}])  # fmt: skip
    assert report.ratios["layer_vs_transformers"] == pytest.approx(2)
    assert report.figures["layer_vs_transformers, bfloat16"] == pytest.approx(4)


def test_a_section_is_replaced_in_place_and_says_ratios_only_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    facts = {**common.machine(), **common.versions(), "date": "today", "command": "python it.py"}
    for title, ratios in (("One", {"speed": 2.0}), ("Two", {}), ("One", {"speed": 3.0})):
        common._record(common.Report(title, ratios=ratios), facts)
    text = (tmp_path / "RESULTS.md").read_text()
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("## ")] == ["## One", "## Two"]
    assert text.count("Ratios: ") == 1
    assert "`speed` **3.00**" in text

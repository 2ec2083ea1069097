"""The page of experts and its pictures, over HTTP and in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, expect
from typer.testing import CliRunner

from coterie.answer import Answerer
from coterie.business import Business
from coterie.cli.main import app
from coterie.curation import keep_curve
from coterie.data.curve import fit_curve
from test_desk_page import axe, violations
from test_page import served, visitor

__all__ = ["axe"]


@pytest.fixture
def shelf(fitted_shop: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fitted_shop, tmp_path / "shop")


@pytest.fixture
def address(shelf: Path) -> Iterator[str]:
    with served(Answerer.open(Business.open(shelf))) as address:
        yield address


def curve() -> dict[str, Any]:
    scores = {n: np.array([[1.0] * right + [0.0] * (4 - right)]) for n, right in ((16, 1), (32, 2), (64, 3))}
    return {"title": "colors", "measured_by": "a probe on words", **fit_curve(scores).json()}


def test_each_expert_stands_beside_the_base_model(address: str, shelf: Path) -> None:
    page = httpx.get(f"{address}/experts").text
    library = Business.open(shelf).library
    for name in library.names():
        assert f">{name}</h2>" in page
        rows = library.evaluation(name)["held_out"]["expert"]["rows"]
        assert f"On {rows} held-out row(s), not learned from" in page
    chart = httpx.get(f"{address}/experts/scores.svg")
    assert chart.headers["content-type"] == "image/svg+xml"
    assert "Before and after tuning" in chart.text
    assert "colors" in chart.text


def test_figures_on_test_rows_go_before_those_on_held_out_ones(address: str, shelf: Path) -> None:
    figures = {"rows": 7, "too_long": 0, "accuracy": {"value": 0.25, "low": 0.1, "high": 0.5}}
    better = {**figures, "accuracy": {"value": 0.75, "low": 0.5, "high": 0.9}}
    Business.open(shelf).library.record("colors", 1, {"test": {"base": figures, "expert": better}})
    page = httpx.get(f"{address}/experts").text
    assert "On 7 test row(s), not learned from" in page
    assert "<td>25.0% (95% CI 10.0% to 50.0%)</td><td>75.0% (95% CI 50.0% to 90.0%)</td>" in page


def test_a_learning_curve_is_shown_once_it_is_measured(address: str, shelf: Path) -> None:
    missing = httpx.get(f"{address}/experts/colors/curve.svg")
    assert missing.status_code == 404
    assert "coterie data curve -e colors" in missing.json()["error"]["message"]
    keep_curve(Business.open(shelf), "colors", curve())
    page = httpx.get(f"{address}/experts").text
    assert "Measured by a probe on words. Twice the data (128 rows): about +" in page
    picture = httpx.get(f"{address}/experts/colors/curve.svg").text
    assert "colors: is it enough?" in picture
    assert "expected" in picture


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"title": "x", "points": []}', '{"title": "x", "law": 3}'])
def test_a_damaged_curve_is_left_out(broken: str, address: str, shelf: Path) -> None:
    keep_curve(Business.open(shelf), "colors", curve())
    (shelf / ".coterie" / "curves" / "colors.json").write_text(broken)
    page = httpx.get(f"{address}/experts")
    assert page.status_code == 200
    assert "Twice the data" not in page.text
    assert httpx.get(f"{address}/experts/colors/curve.svg").status_code == 404


def test_a_business_without_experts_says_how_to_get_one(shop: Path) -> None:
    with served(Answerer.open(Business.open(shop))) as address:
        assert "No experts yet." in httpx.get(f"{address}/experts").text
        assert httpx.get(f"{address}/experts/scores.svg").status_code == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_read_by_eyes_and_by_screen_readers(
    scheme: str, width: int, browser: Browser, address: str, shelf: Path, axe: str
) -> None:
    keep_curve(Business.open(shelf), "colors", curve())
    with visitor(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        page.goto(f"{address}/experts")
        expect(page.get_by_role("heading", level=2)).to_have_text(["colors", "greet"])
        page.get_by_text("How it learned").first.click()
        assert violations(page, axe) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"


def test_the_chat_page_leads_to_it(browser: Browser, address: str) -> None:
    with visitor(browser, address) as page:
        page.get_by_role("link", name="How good the experts are").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Experts")


def test_the_curve_of_an_experts_data_is_drawn_and_kept(shelf: Path, tmp_path: Path) -> None:
    test = shelf / "test.csv"
    test.write_text("text,color\nSay which color a ripe tomato has,red\nAnd the color of the sea?,blue\n")
    asked = ["data", "curve", str(shelf), "-e", "colors", "--test", str(test), "--words", "--steps", "3"]
    drawn = ["--repeats", "1", "--chart", str(tmp_path / "curve.svg"), "--json"]
    done = CliRunner().invoke(app, asked + drawn)
    assert done.exit_code == 0, done.output
    assert "is it enough?" in (tmp_path / "curve.svg").read_text()
    kept = json.loads((shelf / ".coterie" / "curves" / "colors.json").read_text())
    assert kept == json.loads(done.stdout)
    refused = CliRunner().invoke(app, ["data", "curve", str(shelf), "-e", "colors", "--chart", "curve.gif"])
    assert "a chart is written as .svg or .png" in str(refused.exception)

"""The report and the card: complete, self-contained, well-formed, honest about what is missing."""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lesionflow.evaluation import charts, metrics
from lesionflow.evaluation.evaluate import evaluate_oof
from lesionflow.evaluation.gate import check
from lesionflow.evaluation.report import write_card, write_report
from lesionflow.recipe import Gate, Recipe

spec = importlib.util.spec_from_file_location("oof_tables", Path(__file__).with_name("test_evaluate.py"))
oof_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oof_tables)

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle"}


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.tags, self.references = [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.references += (values.get("aria-labelledby") or "").split()
        self.references += [values["href"][1:]] if (values.get("href") or "").startswith("#") else []
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def run():
    oof = oof_tables.table(known=0.5)
    found = evaluate_oof(oof, replicates=200)
    recipe = Recipe(name="baseline <i>", description="A test & more.")
    context = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "data_hash": "d" * 64,
        "fold_hash": "f" * 64,
        "synthetic": True,
        "data_licence": "CC-BY (12 lesions)",
        "versions": {"lesionflow": "9.9", "numpy": "2.0"},
        "gate": check(found, Gate(pauc_floor=0.19)),
        "curves": [
            {"fold": f, "model": 0, "epoch": e, "loss": 1 / (1 + e), "pauc": 0.1 if e % 2 else None}
            for f in range(3)
            for e in range(4)
        ],
    }
    return oof, found, context


@pytest.fixture(scope="module")
def text(run, tmp_path_factory):
    oof, found, context = run
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, found, oof, context)
    return path.read_text()


def test_the_page_is_one_file_without_network_or_script(text):
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text


def test_the_page_is_well_formed_and_usable_with_a_keyboard_or_screen_reader(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == tags.count("main") == 1
    assert tags.count("caption") == tags.count("table") == 4
    pictures = [values for tag, values in page.tags if tag == "svg"]
    assert len(pictures) == tags.count("desc") == 5
    assert all(values["role"] == "img" and values["aria-labelledby"] for values in pictures)
    assert ("html", {"lang": "en"}) in page.tags
    assert page.tags[tags.index("body") + 1][1]["class"] == "skip"


def test_the_page_shows_every_figure_with_its_interval(text, run):
    _, found, _ = run
    pauc = found["pauc"]
    for one in (pauc["rank_pooled"], pauc["pooled"], pauc["mean_of_folds"], *pauc["folds"]):
        assert f"{one['value']:.4f}" in text
        assert f"{one['interval']['low']:.4f} to {one['interval']['high']:.4f}" in text
    assert f"{found['thresholds']['refer']['lower_bound']:.1%}" in text


def test_the_page_says_where_it_comes_from_and_what_it_is_not(text, run):
    _, found, _ = run
    assert text.count("Not a medical device.") == 1
    assert "Synthetic data." in text
    assert found["groups"]["note"] in text
    assert "Refused" in text
    assert "is under the floor 0.1900" in text
    for item in ("d" * 64, "f" * 64, "CC-BY (12 lesions)", "numpy 2.0", "[training]", "baseline &lt;i&gt;"):
        assert item in text
    assert "<i>" not in text


def test_missing_context_and_missing_intervals_still_make_a_page(tmp_path):
    oof = oof_tables.table(malignant=9, known=0.0)
    found = evaluate_oof(oof, replicates=100)
    write_report(tmp_path / "report.html", found, oof, {})
    text = (tmp_path / "report.html").read_text()
    Page(text)
    assert "No interval: 9 malignant lesions" in text
    assert "not patient-clustered" in text
    assert "Not checked" in text
    assert "Synthetic data." not in text
    assert "None" not in re.sub(r"<style>.*</style>", "", text, flags=re.S)
    write_card(tmp_path / "MODEL_CARD.md", found, {})
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "none: 9 malignant lesions" in card
    assert "is not reached" in card
    assert "None" not in card


def test_the_card_holds_use_data_figures_limits_and_recipe(run, tmp_path):
    _, found, context = run
    write_card(tmp_path / "MODEL_CARD.md", found, context)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    headings = re.findall(r"^## (.*)$", card, re.M)
    assert headings == ["Intended use", "The model", "Data", "Figures", "Limits", "How it was made"]
    assert card.count("Not a medical device.") == 1
    assert "**Synthetic data.**" in card
    one = found["pauc"]["rank_pooled"]
    assert f"| {one['value']:.4f} | {one['interval']['low']:.4f} to {one['interval']['high']:.4f} |" in card
    assert found["groups"]["note"] in card
    assert "Gate refused" in card


def test_the_shaded_area_of_the_roc_chart_is_the_pauc():
    oof = oof_tables.table()
    y, s = oof["target"].to_numpy(), oof["logit"].to_numpy()
    svg = charts.roc(*metrics.roc_points(y, s), 0.8, "x")
    path = re.search(r'class="shade" d="M(.*?)Z"', svg).group(1)
    points = [tuple(map(float, p.split())) for p in path.split("L")]
    shoelace = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True)) / 2
    assert abs(shoelace) / 330**2 == pytest.approx(metrics.pauc(y, s), abs=5e-4)

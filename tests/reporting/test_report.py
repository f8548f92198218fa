"""The report and the card: complete, self-contained, well-formed, honest about what is missing."""

from __future__ import annotations

import importlib.util
import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from lesionflow.evaluation import metrics
from lesionflow.recipe import Recipe
from lesionflow.reporting import charts, charts_clinical, charts_modes, checklists, report
from lesionflow.reporting.card import card
from lesionflow.reporting.report import write_report
from lesionflow.reporting.wording import Notes, cell, number, plain
from lesionflow.serving.heat import LEGEND

spec = importlib.util.spec_from_file_location("sample", Path(__file__).with_name("sample.py"))
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle"}
FOUR_DIGITS = re.compile(r"\b0\.\d{4}\b(?!%)")


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.tags, self.references, self.words = [], [], [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.references += (values.get("aria-labelledby") or "").split()
        self.references += [values["href"][1:]] if (values.get("href") or "").startswith("#") else []
        self.references += re.findall(r"url\(#(.*?)\)", values.get("fill") or "")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("style", "code"):
            self.words.append(data)


@pytest.mark.parametrize("made", [sample.metrics, lambda: sample.metrics("institution"), sample.bare])
def test_what_is_rendered_here_has_the_documented_schema(made):
    schema = json.loads((Path(__file__).parents[2] / "docs" / "metrics.schema.json").read_text())
    jsonschema.validate(made(), schema)


def page(tmp_path, found, context=None, **options):
    write_report(tmp_path / "report.html", found, sample.oof(), context or {}, **options)
    return (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return page(tmp_path_factory.mktemp("report"), sample.metrics(), sample.context(), holdout=sample.oof(seed=1))


def test_the_page_is_one_file_without_network_or_script(text):
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    assert "<script" not in text


@pytest.mark.parametrize("kind", ["full", "institution", "bare", "pictures"])
def test_the_page_is_well_formed_and_usable_with_a_keyboard_or_screen_reader(kind, tmp_path):
    found = {"institution": sample.metrics("institution"), "bare": sample.bare()}.get(kind, sample.metrics())
    text = page(
        tmp_path, found, {} if kind == "bare" else sample.context(),
        gallery=sample.gallery() if kind == "pictures" else None,
    )  # fmt: skip
    looked = Page(text)
    assert len(looked.ids) == len(set(looked.ids))
    assert set(looked.references) <= set(looked.ids)
    tags = [tag for tag, _ in looked.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("nav") == tags.count("footer") == 1
    assert tags.count("caption") == tags.count("table") > 4
    assert all(values.get("scope") in ("row", "col") for tag, values in looked.tags if tag == "th")
    pictures = [values for tag, values in looked.tags if tag == "svg" and values.get("aria-hidden") != "true"]
    assert len(pictures) == tags.count("desc") == tags.count("title") - 1 > 2
    assert all(values["role"] == "img" and values["aria-labelledby"] for values in pictures)
    assert ("html", {"lang": "en"}) in looked.tags
    assert looked.tags[tags.index("body") + 1][1]["class"] == "skip"
    assert all(values.get("alt") for tag, values in looked.tags if tag == "img")
    links = [v["href"] for tag, v in looked.tags if tag == "a" and "href" in v]
    sections = [values["id"] for tag, values in looked.tags if tag == "section"]
    assert links[1:] == [f"#{name}" for name in sections], "the contents name every section, in order"
    words = "".join(looked.words)
    assert "None" not in words
    assert "nan" not in words.lower().split()


def figures(tree, path=""):
    """Every Figure of the sample, with its path."""
    if isinstance(tree, dict):
        if "interval" in tree and "value" in tree:
            yield path, tree
        for key, value in tree.items():
            yield from figures(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from figures(value, f"{path}[{i}]")


STYLES = ("area", "percent", "rate", "ratio", "signed", "small")


def shown(figure, words):
    """Whether the figure stands in `words` in some style, with its interval or its reason beside it."""
    for style in STYLES:
        interval = figure["interval"]
        if figure["value"] is None:
            return interval["reason"] in words
        value = number(figure["value"], style)
        if interval["low"] is None:
            if f"{value} no interval" in words and interval["reason"] in words:
                return True
        elif re.search(
            re.escape(value)
            + r"\W+"
            + re.escape(f"{number(interval['low'], style)} to {number(interval['high'], style)}"),
            words,
        ):
            return True
    return False


@pytest.mark.parametrize("made", [sample.metrics, sample.bare])
def test_every_figure_is_shown_with_its_interval_or_its_reason(made, tmp_path):
    found = made()
    words = " ".join(" ".join(Page(page(tmp_path, found, sample.context())).words).split())
    # Bins of the reliability plot are written as short percentages, tested below; pooled ones of a kind once.
    every = [(path, one) for path, one in figures(found) if ".bins[" not in path]
    assert len(every) > 60
    absent = [path for path, one in every if not shown(one, words)]
    assert absent == []


def test_the_page_shows_no_pauc_without_an_interval_beside_it(text):
    """A figure of four digits is followed by its interval, belongs to one, or is a threshold."""
    words = " ".join(" ".join(Page(re.sub(r"<svg.*?</svg>", "", text, flags=re.S)).words).split())
    for match in FOUR_DIGITS.finditer(words):
        around = words[max(0, match.start() - 40) : match.end() + 40]
        assert re.search(r" to [+-]?0\.\d|no interval|floor|bound|logit|Standard deviation", around), around


def test_the_reliability_plot_has_every_bin_also_as_a_table(text):
    one = sample.metrics()["calibration"]["bins"]
    for entry in one:
        assert f"{charts_clinical.percent(entry['low'])} to {charts_clinical.percent(entry['high'])}" in text
    svg = charts_clinical.reliability(one, 0.00098, "x")
    assert svg.count('class="dot"') == 8
    assert svg.count('class="none-found"') == 2
    assert svg.count('class="whisker"') == 10


def test_the_page_says_where_it_comes_from_and_what_it_is_not(text):
    assert text.count("Not a medical device.") == 1
    assert "Synthetic data." in text
    assert sample.metrics()["groups"]["note"] in text
    assert "Refused" in text
    assert "is under the floor 0.1900" in text
    for item in ("d" * 64, "f" * 64, "CC-BY (24,300 lesions)", "numpy 2.0", "[training]", "baseline &lt;i&gt;"):
        assert item in text
    assert "<i>" not in text


def test_how_many_subgroups_were_compared_is_said_once(text, tmp_path):
    assert text.count("13 comparisons over all partitions") == 1
    assert "is not a person's skin type." in unescape(text)
    found = sample.metrics()
    found["subgroups"][0]["note"] = "2 of 99 comparisons over all partitions."
    assert page(tmp_path, found).count("comparisons over all partitions") == 4


def test_duplicates_are_listed_by_name_and_patients_on_both_sides_are_told(text, tmp_path):
    assert "ISIC_0000117, ISIC_0731142" in text
    assert "hold-out and 4" in text
    assert "No patient lies in two folds" in text
    found = sample.metrics()
    found["leaks"]["patients_in_two_folds"] = 3
    found["leaks"]["exact_duplicates"]["count"] = 77
    changed = page(tmp_path, found)
    assert "3 patients lie on both sides" in changed
    assert "the first 1 of 77" in changed


def test_a_split_by_institution_names_each_and_one_by_patient_says_how_to_get_it(text, tmp_path):
    assert "folds.kind=institution" in text
    changed = page(tmp_path, sample.metrics("institution"))
    assert "folds.kind=institution" not in changed
    assert "Harbour Hospital" in changed


def test_missing_context_and_missing_intervals_still_make_a_page(tmp_path):
    found = sample.bare()
    text = unescape(page(tmp_path, found))
    assert "12 malignant lesions: under 20" in text
    assert "not patient-clustered" in text
    assert "Not checked" in text
    assert "No lesions were held out: set folds.holdout" in text
    assert "not checked (not asked for)" in text
    assert "Synthetic data." not in text
    assert 'id="training"' not in text
    made = card(found, {})
    assert "none: 12 malignant lesions" in made
    assert "is not reached" in made
    assert "None" not in made


@pytest.mark.parametrize(
    "name",
    [
        "modes",
        "tabular",
        "served",
        "subgroups",
        "leaks",
        "calibration",
        "decision_curve",
        "operating",
        "split",
        "explain",
    ],
)
def test_a_part_that_is_absent_says_so(name, tmp_path):
    found, context = sample.metrics(), sample.context()
    found.pop(name, None)
    context.pop(name, None)
    Page(page(tmp_path, found, context))
    card(found, context)


def test_pictures_are_inlined_only_when_given(text, tmp_path):
    assert "<img" not in text
    assert "gallery.html" in text
    with_them = page(tmp_path, sample.metrics(), gallery=sample.gallery())
    assert with_them.count("<img") == 3
    assert "Patients' images." in unescape(with_them)
    assert LEGEND in unescape(with_them)
    assert "A. Clinic, CC-BY" in with_them


def test_notes_give_each_reason_once_under_a_letter():
    notes = Notes()
    few, other = sample.missing("too few"), sample.missing("no column")
    assert [cell(one, "area", notes)["mark"] for one in (few, other, few)] == ["a", "b", "a"]
    assert notes.lines() == [("a", "too few"), ("b", "no column")]
    for i in range(30):
        notes.mark(f"{i}")
    assert notes.mark("29") == "ff"
    assert cell(None, "area", notes)["value"] is None


def test_numbers_keep_three_figures_and_never_an_exponent():
    assert number(0.0000123456, "small") == "0.0000123"
    assert number(0.00021, "small") == "0.00021"
    assert number(1234.56, "rate") == "1,234.6"
    assert plain(sample.figure(0.1, 0.05, 0.2)) == "0.1000 (0.0500 to 0.2000)"
    assert plain(sample.figure(0.1)) == f"0.1000 (no interval: {sample.FEW})"
    assert plain(sample.missing()) == f"none: {sample.FEW}"


def test_the_card_holds_use_data_figures_limits_recipe_and_both_checklists():
    found, context = sample.metrics(), sample.context()
    made = card(found, context)
    headings = re.findall(r"^## (.*)$", made, re.M)
    assert headings == [
        "Intended use", "The model", "Data", "Figures", "What is served", "What each part adds", "Subgroups", "Limits",
        "How it was made", "CLAIM 2024", "TRIPOD+AI",
    ]  # fmt: skip
    assert made.count("Not a medical device.") == 1
    assert "**Synthetic data.**" in made
    one = found["pauc"]["rank_pooled"]
    assert f"| {one['value']:.4f} | {one['interval']['low']:.4f} to {one['interval']['high']:.4f} |" in made
    assert found["groups"]["note"] in made
    assert "Gate refused" in made
    assert "None" not in made


def test_the_checklists_are_complete():
    assert [one.number for one in checklists.CLAIM] == [str(i) for i in range(1, 45)]
    letters = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    assert [one.number for one in checklists.TRIPOD] == [
        f"{i}{letter}" for i in range(1, 28) for letter in letters.get(i, " ").strip() or [""]
    ]
    topics = [one.topic for one in checklists.CLAIM]
    assert len(set(topics)) == len(topics)


@pytest.mark.parametrize("items", [checklists.CLAIM, checklists.TRIPOD], ids=["CLAIM", "TRIPOD"])
def test_every_pointer_of_a_checklist_leads_somewhere(items):
    found, context = sample.metrics("institution"), sample.context()
    recipe, headings = Recipe(name="any").to_dict(), re.findall(r"^## (.*)$", card(found, context), re.M)
    for item in items:
        said = checklists.answer(item, found)
        assert ("not done" in said) == (not item.pointers)
        for pointer in item.pointers + item.more:
            kind, path = pointer.split(":", 1)
            if kind == "metrics":
                assert checklists.find(path, found) not in (None, [], {}), pointer
            elif kind == "recipe":
                assert checklists.find(path, recipe) is not None, pointer
            elif kind == "card":
                assert path in headings, pointer
            elif kind == "report":
                assert path in report.SECTIONS.values(), pointer
            else:
                assert kind == "file"
                assert path in ("explain.json", "gallery.html", "docs/features.md")


def test_what_a_run_lacks_is_not_claimed_in_a_checklist():
    items = {one.topic: one for one in checklists.CLAIM}
    external = items["Test on external data"]
    assert checklists.answer(external, sample.metrics()).startswith("not done")
    assert "split.names" in checklists.answer(external, sample.metrics("institution"))
    assert "served" in checklists.answer(items["Performance with uncertainty"], sample.metrics())
    assert "served" not in checklists.answer(items["Performance with uncertainty"], sample.bare())


def test_the_shaded_area_of_the_roc_chart_is_the_pauc():
    oof = sample.oof()
    y, s = oof["target"].to_numpy(), oof["logit"].to_numpy()
    svg = charts.roc(*metrics.roc_points(y, s), 0.8, "x")
    path = re.search(r'class="shade" d="M(.*?)Z"', svg).group(1)
    points = [tuple(map(float, p.split())) for p in path.split("L")]
    shoelace = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True)) / 2
    assert abs(shoelace) / 330**2 == pytest.approx(metrics.pauc(y, s), abs=5e-4)


def test_the_decision_chart_ends_where_referring_all_falls_off_it_and_bears_missing_bands():
    curve = sample.decision()
    svg = charts_clinical.decision(curve, "x")
    for path in re.findall(r' d="M([^"]*)"', svg):
        for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path):
            assert -1 <= float(pair[1]) <= 260
    assert 'class="shade"' not in charts_clinical.decision(curve | {"low": None, "high": None}, "x")
    assert charts_clinical.decision(curve | {"probability": []}, "x") == ""


def colours(block):
    """Custom properties of a style block, as relative luminances (WCAG 2)."""

    def luminance(code):
        code = "".join(2 * c for c in code) if len(code) == 3 else code
        parts = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    return {name: luminance(code) for name, code in re.findall(r"--([\w-]+): #(\w{6}|\w{3});", block)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_of_charts_contrast_with_their_ground(scheme):
    """What axe-core can't see: text within pictures needs 4.5, lines 3."""
    style = (Path(report.__file__).parent / "style.html").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    tone = colours(blocks[scheme == "dark"])
    assert len(tone) == 18

    def contrast(a, b):
        low, high = sorted((tone[a], tone[b]))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", "accent", "malignant", "benign", "good", "bad"):
        assert contrast(name, "page") >= 4.5, name
        assert contrast(name, "panel") >= 4.5, name
    assert contrast("warn", "warn-bg") >= 4.5
    for i in range(6):
        assert contrast(f"s{i}", "page") >= 3


def test_what_each_part_adds_stands_with_its_interval_and_how_sure_it_is(text):
    words = " ".join(" ".join(Page(text).words).split())
    found = sample.metrics()["modes"]
    for one in found["adds"]:
        assert plain(one["out_of_fold"], "signed").replace("(", "").replace(")", "") in words
    assert "Picture and metadata, compared with the patient's other lesions served" in words
    assert "What is served, where there is enough for it: picture and metadata, compared" in words
    svg = charts_modes.differences(
        [
            {"label": one["block"], "out_of_fold": one["out_of_fold"], "holdout": one["holdout"]}
            for one in found["adds"]
        ],
        "x",
    )
    assert (svg.count('class="dot"'), svg.count('class="none-found"'), svg.count("whisker held")) == (5, 5, 5)
    zero = float(re.search(r'class="chance" d="M([\d.]+)', svg).group(1))
    for row, at in zip(found["adds"], re.findall(r'class="dot" cx="([\d.]+)"', svg), strict=True):
        assert (float(at) > zero) == (row["out_of_fold"]["value"] > 0)
    assert charts_modes.differences([], "x") == charts_modes.importances([], "x") == ""


def test_each_way_to_score_has_its_thresholds_or_none(text, tmp_path):
    assert text.count("refer or routine</td>") == 5
    words = unescape(page(tmp_path, sample.bare(), sample.context()))
    assert "Thresholds of each way to score" not in words
    assert "No patients were set aside" in words or "no patients were set aside" in words


def test_the_twenty_largest_importances_are_shown_by_block_and_the_joining_is_said(text):
    every = sorted(sample.tabular()["importances"], key=lambda one: -one["share"])
    chart = re.search(r'<svg[^>]*aria-labelledby="importances-t.*?</svg>', text, re.S).group(0)
    for i, one in enumerate(every):
        assert (f">{one['name']}<" in chart) == (i < 20)
    widths = [float(w) for w in re.findall(r'<rect class="benign"[^>]* width="([\d.]+)"', chart)]
    names = re.findall(r">(tbp_\w+)<", chart)
    share = {one["name"]: one["share"] for one in every}
    assert [w / max(widths) for w in widths] == pytest.approx([share[n] / every[0]["share"] for n in names], abs=0.001)
    own = sum(one["share"] for one in every if one["block"] == "plain")
    assert f"The lesion&#39;s own columns: {own:.0%} of all" in chart or f"own columns: {own:.0%} of all" in chart
    assert "(folds 0, 2 and 4)" in text
    assert "the mean of the two ranks (fold 3)" in text
    assert "3 LightGBM, 1 CatBoost in each fold" in text


def test_a_run_without_metadata_says_nothing_of_it(tmp_path):
    found, context = sample.metrics(), sample.context()
    del found["modes"], context["tabular"]
    text = page(tmp_path, found, context)
    assert 'id="modes"' not in text
    assert 'id="features"' not in text
    made = card(found, context)
    assert "It sees pixels only, no metadata." in made
    assert "## What each part adds" not in made
    assert "recipe `tabular" not in made


def test_the_card_says_what_metadata_does_and_what_it_adds():
    found, context = sample.metrics(), sample.context()
    made = card(found, context)
    assert "pixels only" not in made
    assert "3 LightGBM, 1 CatBoost in each fold" in made
    one = found["modes"]["adds"][0]["out_of_fold"]
    assert f"| The lesion's metadata, to the picture | {plain(one, 'signed')} |" in made
    assert "| The picture alone | 0.1301 (" in made
    assert "| 9a | Choice of predictors | card, The model, recipe `tabular`" in made
    assert "recipe `tabular.missing`" in made
    del found["modes"]["each"]["image"], found["modes"]["each"]["image_record"], found["modes"]["each"]["image_visit"]
    found["modes"] |= {"served": "visit", "adds": [found["modes"]["adds"][3]]}
    assert "It sees no pictures: it reads" in card(found, context)
    assert "pixel crops" not in card(found, context)

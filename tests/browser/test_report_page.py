"""The report in a real browser: it asks for nothing, complains of nothing, fits a phone, and axe-core passes it."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np
import pytest

from lesionflow.evaluation.evaluate import evaluate
from lesionflow.recipe import Evaluation
from lesionflow.reporting.gallery import write_gallery
from lesionflow.reporting.report import write_report


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = load(Path(__file__).parents[1] / "reporting" / "sample.py")
check = load(Path(__file__).with_name("sound.py")).check
VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


def scored(metadata: Path, seed: int = 0):
    """Out-of-fold and hold-out tables of these lesions with invented scores, and the figures of them."""
    import polars as pl

    wanted = (
        "isic_id", "target", "patient_id", "sex", "age_approx", "anatom_site_general", "attribution", "tbp_tile_type",
        "clin_size_long_diam_mm", "tbp_lv_Lext", "tbp_lv_Bext",
    )  # fmt: skip
    table = pl.read_csv(metadata, infer_schema_length=None)
    table = table.select([name for name in wanted if name in table.columns])
    rng, n = np.random.default_rng(seed), len(table)
    y = table["target"].to_numpy()
    group = table["patient_id"].fill_null(table["isic_id"]) if "patient_id" in table.columns else table["isic_id"]
    fold = np.array([zlib.crc32(one.encode()) % 4 - 1 for one in group.to_list()])
    table = table.with_columns(
        patient_group=group, target=y.astype(np.int8), fold=fold, fold_hash=pl.lit("f" * 64),
        logit=rng.normal(0, 1, n) + 2.4 * y - 3,
    )  # fmt: skip
    oof, holdout = table.filter(pl.col("fold") >= 0), table.filter(pl.col("fold") < 0)
    split = {"kind": "patient", "names": None, "holdout": len(holdout)}
    found = evaluate(oof, holdout, Evaluation(replicates=200), split=split, leaks=sample.metrics()["leaks"])
    return found, oof, holdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory, synthetic):
    """Reports: of a synthetic data set, of invented figures in full, by institution, with next to none."""
    folder = tmp_path_factory.mktemp("pages")
    found, oof, holdout = scored(synthetic / "train-metadata.csv")
    made = {
        "synthetic": (found, oof, sample.context(), {"holdout": holdout}),
        "full": (sample.metrics(), sample.oof(), sample.context(), {"holdout": sample.oof(seed=1),
                                                                    "gallery": sample.gallery()}),
        "institution": (sample.metrics("institution"), sample.oof(), sample.context(), {}),
        "bare": (sample.bare(), sample.oof(), {}, {}),
    }  # fmt: skip
    for name, (metrics, table, context, more) in made.items():
        write_report(folder / f"{name}.html", metrics, table, context, **more)
    write_gallery(folder / "gallery.html", sample.gallery(), sample.context() | {"synthetic": False})
    return folder


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("name", ["synthetic", "full"])
def test_the_report_is_sound_at_every_size_in_light_and_dark(name, width, scheme, pages, visit, axe):
    check(visit(pages / f"{name}.html", width, scheme), axe)


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("institution", 390, "dark"), ("bare", 390, "light"), ("gallery", 390, "dark"), ("gallery", 1280, "light")],
)
def test_other_pages_are_sound(name, width, scheme, pages, visit, axe):
    check(visit(pages / f"{name}.html", width, scheme), axe)


def test_the_report_of_real_lesions_is_sound(real_data, tmp_path, visit, axe):
    found, oof, holdout = scored(real_data / "isic2024-images" / "train-metadata.csv")
    write_report(tmp_path / "report.html", found, oof, sample.context() | {"synthetic": False}, holdout=holdout)
    check(visit(tmp_path / "report.html", 390, "light"), axe)
    check(visit(tmp_path / "report.html", 1280, "dark"), axe)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', "image-alt"),
        ('<p style="color: #999; background: #aaa">hardly readable</p>', "color-contrast"),
        ('<div style="width: 2000px">wide</div>', "2000"),
        ('<img src="http://127.0.0.1:9/x.png" alt="from elsewhere">', "127.0.0.1"),
        ("<script>console.error('something broke')</script>", "something broke"),
    ],
)
def test_the_checks_find_what_is_wrong(planted, said, pages, tmp_path, visit, axe):
    text = (pages / "bare.html").read_text().replace("</main>", f"{planted}</main>")
    (tmp_path / "wrong.html").write_text(text)
    with pytest.raises(AssertionError, match=said):
        check(visit(tmp_path / "wrong.html", 390), axe)


def test_a_keyboard_reaches_the_results_and_always_shows_where_it_is(pages, visit):
    page = visit(pages / "full.html", 390)
    page.keyboard.press("Tab")
    place = page.evaluate("() => { const r = document.activeElement.getBoundingClientRect(); return [r.left, r.top] }")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the results"
    assert min(place) >= 0, "the skip link shows itself when it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            return [e.tagName, style.outlineStyle, parseFloat(style.outlineWidth), e.closest('main') !== null] }""")
        )
    assert all(style != "none" and width >= 2 and inside for _, style, width, inside in seen), seen
    page.goto((pages / "full.html").as_uri())
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.url.endswith("#served"), "the contents lead to their sections"


def test_print_is_light_whatever_the_screen_and_leaves_the_contents_out(pages, visit):
    page = visit(pages / "full.html", 1280, "dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 28)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.is_visible("nav")
    assert page.is_visible("main h2")

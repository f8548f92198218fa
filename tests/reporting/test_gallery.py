"""The gallery shows the worst errors and says whose pictures they are; it lets nothing else out."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from lesionflow.errors import DataError
from lesionflow.reporting.gallery import ALARM, LARGEST, MISSED, gallery, write_gallery
from lesionflow.serving.predictor import Predictor

COUNT = 60


@pytest.fixture(scope="module")
def store(encode):
    """Lesions in another order than the table's, one of them large and with a name in its EXIF."""
    ids = [f"ISIC_{n:07}" for n in range(COUNT)][::-1]
    images = {name: encode(n) for n, name in enumerate(ids)}
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe 1970-01-01"
    buffer = io.BytesIO()
    Image.fromarray(np.full((500, 1000, 3), (200, 150, 120), np.uint8)).save(buffer, "JPEG", exif=exif)
    images["ISIC_0000000"] = buffer.getvalue()
    return SimpleNamespace(ids=ids, jpeg=lambda row: images[ids[row]], path="store")


def table(fold=-1):
    """Malignant 0..9; the lower a malignant lesion's number, the lower its logit; benign ones rise with theirs."""
    target = [int(n < 10) for n in range(COUNT)]
    logit = [float(n) * (1 if n < 10 else 0.15) - 3 for n in range(COUNT)]
    rows = pl.DataFrame({
        "isic_id": [f"ISIC_{n:07}" for n in range(COUNT)], "target": target, "logit": logit,
        "fold": [fold if fold == -1 else n % 2 for n in range(COUNT)],
        "attribution": ["<b>A. Clinic</b>" if n else None for n in range(COUNT)],
        "copyright_license": ["CC-BY" if n else None for n in range(COUNT)],
    })  # fmt: skip
    return rows.sample(fraction=1, shuffle=True, seed=1)


def pixels_of(uri: str) -> np.ndarray:
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_worst_errors_of_both_kinds_come_first(store, mapped_bundle):
    predictor = Predictor(mapped_bundle)
    items = gallery(store, table(), predictor, size=4)
    assert [(i["kind"], i["isic_id"]) for i in items] == [
        *((MISSED, f"ISIC_{n:07}") for n in (0, 1, 2, 3)), *((ALARM, f"ISIC_{n:07}") for n in (59, 58, 57, 56))
    ]  # fmt: skip
    first, alarm = items[0], items[4]
    assert first["sentence"] == "Malignant, yet 50 of 50 benign lesions score higher."
    # 59 x 0.15 - 3 = 5.85; malignant logits are -3 to 6.
    assert alarm["sentence"] == "Benign, yet 9 of 10 malignant lesions score lower."
    assert (first["logit"], first["band"], alarm["band"]) == (-3.0, "routine", "refer")
    assert first["probability"] == predictor.probability(-3.0)
    assert {i["origin"] for i in items} == {"hold-out"}
    assert (first["attribution"], alarm["licence"]) == (None, "CC-BY")
    assert pixels_of(alarm["image"]).shape == (83, 97, 3)
    assert pixels_of(alarm["overlay"]).shape == (32, 32, 3)


def test_only_pixels_leave_the_file(store, mapped_bundle):
    (item,) = [i for i in gallery(store, table(), Predictor(mapped_bundle)) if i["isic_id"] == "ISIC_0000000"]
    assert pixels_of(item["image"]).shape == (LARGEST // 2, LARGEST, 3)
    assert b"Jane" in store.jpeg(COUNT - 1)
    assert b"Jane" not in base64.b64decode(item["image"].split(",")[1])


def test_folds_are_ranked_each_on_its_own_scale(store, mapped_bundle):
    rows = table(fold=0).with_columns(pl.col("logit") + 100 * (pl.col("fold") == 1))
    items = gallery(store, rows, Predictor(mapped_bundle), size=2)
    assert [i["isic_id"][-1] for i in items[:2]] == ["0", "1"], "by raw logits both would be of fold 0"
    assert {i["origin"] for i in items} == {"out of fold"}


def test_what_cannot_be_judged_is_said(store, mapped_bundle):
    doubts = pl.when(pl.col("isic_id") == "ISIC_0000001").then(pl.lit(["much darker"])).otherwise(pl.lit([]))
    rows = table().with_columns(doubts=doubts.cast(pl.List(pl.String)))
    items = gallery(store, rows, Predictor(mapped_bundle), size=2)
    assert [i["band"] for i in items[:2]] == ["routine", "cannot judge"]
    assert items[1]["doubts"] == ["much darker"]


def test_a_graph_without_maps_and_lesions_of_one_kind(store, bundle_dir, tmp_path):
    rows = table().filter(pl.col("target") == 0)
    items = gallery(store, rows, Predictor(bundle_dir), size=3)
    assert [(i["kind"], i["overlay"]) for i in items] == [(ALARM, None)] * 3
    assert gallery(store, rows.clear(), Predictor(bundle_dir)) == []
    write_gallery(tmp_path / "g.html", items, {})
    assert "class-activation" not in (tmp_path / "g.html").read_text()
    with pytest.raises(DataError, match="ISIC_9"):
        gallery(store, rows.with_columns(isic_id=pl.lit("ISIC_9")), Predictor(bundle_dir))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("synthetic", [False, True])
def test_the_page_stands_alone_and_warns(store, mapped_bundle, tmp_path, synthetic):
    items = gallery(store, table(), Predictor(mapped_bundle))
    context = {"recipe": {"name": "baseline"}, "synthetic": synthetic, "versions": {"lesionflow": "9"}}
    write_gallery(tmp_path / "gallery.html", items, context)
    html = (tmp_path / "gallery.html").read_text()
    page = Page()
    page.feed(html)
    assert ("Not for sharing" in page.text) is not synthetic
    assert "Not a medical device." in page.text
    assert "<b>A. Clinic</b>" in page.text, "escaped: it is text, not a tag"
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", html)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert "url(" not in html and "@import" not in html
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 24
    assert all(picture["alt"] for picture in pictures)
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings == ["h1", "h2", "h2"]
    assert {"main", "header", "footer"} <= {tag for tag, _ in page.tags}
    for item in items:
        assert item["isic_id"] in page.text and item["sentence"] in page.text


def test_an_empty_gallery_is_a_page_too(tmp_path):
    write_gallery(tmp_path / "g.html", [], {})
    assert (tmp_path / "g.html").read_text().count("<p>None.</p>") == 2


def test_a_run_with_metadata_shows_every_score_and_the_reasons(store, mapped_bundle, tmp_path):
    """Probability and band are of the way that scored the lesion: without metadata that is its picture."""
    predictor = Predictor(mapped_bundle)
    modes = {
        name: {"calibration": {"a": a, "b": 1.0}, "thresholds": {"refer": {"logit": limit}}}
        for name, a, limit in (("image", 0.5, 99.0), ("record", 1.0, 0.0), ("image_record", 2.0, -99.0))
    }
    predictor.bundle.info["visit"] = {"served": "image_record", "modes": modes}
    rows = table().with_columns(
        image_logit=pl.col("logit") - 1, record_logit=pl.col("logit") + 2, image_record_logit=pl.col("logit")
    )
    bare = "ISIC_0000001"
    rows = rows.with_columns(
        logit=pl.when(pl.col("isic_id") == bare).then("image_logit").otherwise("image_record_logit")
    )
    said = {"ISIC_0000000": ("redder than <most>", "the patient is about 75 years old")}
    items = gallery(
        store, rows, predictor, size=2, reasons=lambda ids: {name: said[name] for name in ids if name in said}
    )
    by = {item["isic_id"]: item for item in items}
    joined, alone = by["ISIC_0000000"], by[bare]
    assert joined["probability"] == pytest.approx(1 / (1 + np.exp(-(2 * -3.0 + 1))))
    assert alone["probability"] == pytest.approx(1 / (1 + np.exp(-(0.5 * -3.0 + 1))))
    assert (joined["band"], alone["band"]) == ("refer", "routine")
    assert [(one["mode"], one["logit"]) for one in joined["scores"]] == [
        ("The picture alone", -4.0), ("Metadata of the lesion", -1.0), ("Picture and metadata of the lesion", -3.0)
    ]  # fmt: skip
    assert joined["scores"][1]["probability"] == pytest.approx(0.5)
    assert (joined["reasons"], alone["reasons"]) == (list(said["ISIC_0000000"]), [])
    write_gallery(tmp_path / "g.html", items, {})
    html = (tmp_path / "g.html").read_text()
    page = Page()
    page.feed(html)
    assert "Its metadata: redder than <most>; the patient is about 75 years old." in page.text
    assert html.count("<table") == html.count("<caption") == 4
    assert html.count("Its metadata") == 1

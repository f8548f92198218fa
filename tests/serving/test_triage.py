"""A visit in, a ranked list out: the service's answers are the bundle's own, whatever came and however it came."""

from __future__ import annotations

import base64
import json
import math
import time

import httpx
import numpy as np
import polars as pl
import pytest
from starlette.testclient import TestClient

from lesionflow.bundle import probability_interval
from lesionflow.data.source import open_source
from lesionflow.serving.app import create_app
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.visit import Visits

WITHHELD = ("target", "patient_id")


@pytest.fixture(scope="module")
def visit(finished, synthetic):
    """The largest patient's pictures and metadata."""
    with open_source(synthetic) as source:
        table = source.metadata
        patient = table.group_by("patient_id").len().sort("len", "patient_id", descending=True)["patient_id"][0]
        table = table.filter(pl.col("patient_id") == patient).head(12)
        return [(name, source.read(name)) for name in table["isic_id"]], table


@pytest.fixture(scope="module")
def http(start, finished):
    with start(finished / "bundle") as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def form(images, table=None, **options):
    files = [("images", (f"{name}.jpg", data, "image/jpeg")) for name, data in images]
    if table is not None:
        kept = table.select(c for c in table.columns if c not in WITHHELD and not c.startswith(("iddx", "mel_")))
        files.append(("metadata", ("visit.csv", kept.write_csv().encode(), "text/csv")))
    return {"files": files, "data": {"options": json.dumps(options)} if options else None}


def by_id(answer) -> dict:
    return {lesion["id"]: lesion for lesion in answer["lesions"]}


def test_the_answers_are_the_bundles_own(http, finished, visit):
    images, table = visit
    answer = http.post("/v1/triage", **form(images, table, reasons=True)).raise_for_status().json()
    visits = Visits(Predictor(finished / "bundle"))
    expected = {one.isic_id: one for one in visits.predict([data for _, data in images], table)}
    found = by_id(answer)
    assert list(found) == [one["id"] for one in answer["lesions"]] and set(found) == set(expected)
    for name, one in expected.items():
        lesion = found[name]
        assert (lesion["mode"], lesion["band"]) == (one.mode, one.band)
        assert lesion["probability"] == pytest.approx(one.probability, abs=1e-6)
        assert lesion["scores"] == pytest.approx(one.scores, abs=1e-6)
        assert lesion["reasons"] == list(one.reasons) and lesion["doubts"] == list(one.doubts)
        ends = probability_interval(lesion["logit"], visits.modes[one.mode]["calibration"])
        assert (lesion["interval"] is None) == (ends is None)
        if ends:
            assert [lesion["interval"]["low"], lesion["interval"]["high"]] == pytest.approx(ends)
            assert ends[0] < lesion["probability"] < ends[1]
    ranks = [(one["rank"], -one["probability"]) for one in answer["lesions"]]
    assert ranks == sorted(ranks) and ranks[0][0] == 1
    assert answer["served"] == "image_visit" and answer["context"]["lesions"] == len(images)
    assert sum(answer["summary"]["bands"].values()) == len(images) == answer["summary"]["lesions"]
    assert answer["notice"] == "Not a medical device."


def test_json_says_the_same_as_a_form(http, visit):
    images, table = visit
    rows = table.select(c for c in table.columns if c not in WITHHELD).drop("isic_id").to_dicts()
    lesions = [
        {"id": name, "image": base64.b64encode(data).decode(), "metadata": row}
        for (name, data), row in zip(images, rows, strict=True)
    ]
    theirs = http.post("/v1/triage", json={"lesions": lesions}).raise_for_status().json()
    ours = http.post("/v1/triage", **form(images, table)).raise_for_status().json()
    for one, other in zip(theirs["lesions"], ours["lesions"], strict=True):
        # Another batch, so the last digits may differ.
        assert one["id"] == other["id"] and one["probability"] == pytest.approx(other["probability"], abs=1e-6)
        assert one["band"] == other["band"] and one["reasons"] == other["reasons"]


def test_a_bad_picture_is_named_and_the_others_are_answered(http, visit):
    images, table = visit
    broken = [*images[:3], (images[3][0], b"\xff\xd8 nothing"), ("extra", b"GIF89a")]
    answer = http.post("/v1/triage", **form(broken, table.head(4))).raise_for_status().json()
    assert {error["id"]: error["position"] for error in answer["errors"]} == {images[3][0]: 3, "extra": 4}
    found = by_id(answer)
    assert found[images[3][0]]["mode"] == "visit" and found[images[3][0]]["band"] == "cannot judge"
    last = answer["lesions"][-1]
    assert (last["id"], last["mode"], last["probability"]) == ("extra", None, None)
    assert answer["summary"]["judged"] <= 3


def test_pictures_alone_and_metadata_alone(http, finished, visit):
    images, table = visit
    alone = http.post("/v1/triage", **form(images)).raise_for_status().json()
    assert alone["summary"]["modes"] == {"image": len(images)} and "without metadata" in alone["context"]["note"]
    expected = Predictor(finished / "bundle").predict([data for _, data in images])
    logits = {name: one.logit for (name, _), one in zip(images, expected, strict=True)}
    assert {one["id"]: one["logit"] for one in alone["lesions"]} == pytest.approx(logits, abs=1e-5)
    bare = http.post("/v1/triage", **form([], table)).raise_for_status().json()
    assert bare["summary"]["modes"] == {"visit": len(table)} and bare["summary"]["judged"] == 0
    single = http.post("/v1/triage", **form(images[:1], table.head(1))).raise_for_status().json()
    assert single["lesions"][0]["mode"] == "image_record"


def test_reasons_are_for_the_highest_ranked(http, visit):
    images, table = visit
    every = http.post("/v1/triage", **form(images, table, reasons=True)).json()["lesions"]
    some = http.post("/v1/triage", **form(images, table, reasons=4)).json()["lesions"]
    assert [one["reasons"] for one in some[:4]] == [one["reasons"] for one in every[:4]]
    assert not any(one["reasons"] for one in some[4:])
    assert not any(
        one["reasons"] for one in http.post("/v1/triage", **form(images, table, reasons=False)).json()["lesions"]
    )


def test_heat_maps_come_for_those_asked_for(http, visit):
    images, table = visit
    maps = http.get("/v1/model").json()["maps"]
    answer = http.post("/v1/triage", **form(images, table, heatmaps=[images[2][0]]))
    if not maps:
        assert answer.status_code == 422 and "no heat maps" in answer.json()["error"]
        return
    drawn = [one["id"] for one in answer.json()["lesions"] if one["heatmap"]]
    assert drawn == [images[2][0]]
    picture = base64.b64decode(by_id(answer.json())[images[2][0]]["heatmap"].partition(",")[2])
    assert picture.startswith(b"\x89PNG")


TWO = "isic_id,patient_id\na,P1\nb,P2\n"
FAULTS = {
    "two patients": ({"files": [("metadata", ("m.csv", TWO))]}, 422, "2 patients"),
    "one id twice": ({"files": [("images", ("a.jpg", b"x")), ("images", ("a.png", b"y"))]}, 422, "'a' comes twice"),
    "a word among numbers": ({"files": [("metadata", ("m.csv", "isic_id,age_approx\na,old\n"))]}, 422, "age_approx"),
    "a ragged line": ({"files": [("metadata", ("m.csv", "isic_id,sex\na\n"))]}, 422, "line 2"),
    "no isic_id": ({"files": [("metadata", ("m.csv", "sex\nmale\n"))]}, 422, "isic_id"),
    "an unknown part": ({"files": [("photos", ("a.jpg", b"x"))]}, 400, "'photos'"),
    "nothing": ({"json": {"lesions": []}}, 422, "no lesions"),
    "nothing that can be scored": ({"files": [("images", ("a.jpg", b"x"))]}, 422, "nothing can be scored"),
    "no base64": ({"json": {"lesions": [{"id": "a", "image": "%"}]}}, 400, "lesions[0].image"),
    "an unknown option": ({"json": {"lesions": [{"id": "a"}], "options": {"maps": True}}}, 400, "heatmaps and reasons"),
    "another type": ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "multipart/form-data"),
    "NaN": ({"content": b'{"lesions": NaN}', "headers": {"Content-Type": "application/json"}}, 400, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_understood_is_refused_with_its_name(http, fault):
    request, status, words = FAULTS[fault]
    answer = http.post("/v1/triage", **request)
    assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert answer.json()["request_id"] == answer.headers["X-Request-ID"]


def test_a_name_that_goes_places_is_a_name(http, visit):
    (_, data), table = visit[0][0], None
    answer = http.post("/v1/triage", files=[("images", ("../../x\u202e/y.jpg", data))], data=table)
    assert answer.json()["lesions"][0]["file"] == "y.jpg"


def test_what_the_model_is_can_be_asked(http, finished):
    told = http.get("/v1/model").json()
    assert told["served"] == "image_visit" and "age_approx" in told["metadata_columns"]
    assert not set(WITHHELD) & set(told["metadata_columns"])
    assert set(told["worth"]) == set(told["modes"]) and told["synthetic"] is True
    assert not math.isnan(told["prevalence"])


def test_each_visit_counts_once_in_what_is_held_against_the_hold_out(finished, visit):
    class Recorder:
        def __init__(self):
            self.heard = []

        def add(self, statistics, logits, **more):
            self.heard.append((statistics, logits, more))

        def gauges(self):
            return []

    images, table = visit
    app = create_app(finished / "bundle")
    service = app.state.service
    service.drift, service.looks = Recorder(), True
    with TestClient(app) as client:
        while service.reason is not None:
            time.sleep(0.05)
        client.post("/v1/triage", **form([*images[:3], ("bad", b"no")], table.head(5))).raise_for_status()
        client.post("/v1/triage", **form(images[:2])).raise_for_status()
    (looks, logits, first), (_, second, more) = service.drift.heard
    assert set(logits) == {"image", "record", "visit", "image_record", "image_visit"}
    # Three pictures, one that can't be used, two lesions without any.
    assert [int(np.isfinite(x).sum()) for x in (looks["brightness"], logits["image"], logits["record"])] == [3, 3, 5]
    assert len(first["bands"]) == len(first["table"]) == 6
    assert more["table"] is None and np.isfinite(second["image"]).all()


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "lesion", ['{"id":"a","metadata":{"sex":"\\ud800"}}', '{"id":"a","metadata":{"\\udfff":"x"}}', '{"id":"\\ud800"}']
)
def test_half_a_character_is_refused_by_name(http, lesion):
    answer = http.post("/v1/triage", content=f'{{"lesions":[{lesion}]}}', headers=JSON)
    assert answer.status_code == 422 and "lesions[0]" in answer.json()["error"], answer.text


@pytest.mark.parametrize("numbers", [(1e308, -1e308), (1e200, 1e200), (5.0, -2e6)])
def test_numbers_beyond_measure_are_refused_by_name(http, numbers):
    lesions = [{"id": f"L{n}", "metadata": {"tbp_lv_x": x, "age_approx": 50}} for n, x in enumerate(numbers)]
    answer = http.post("/v1/triage", json={"lesions": lesions})
    assert answer.status_code == 422 and "column tbp_lv_x: L" in answer.json()["error"], answer.text


def test_tables_and_lists_that_can_be_no_visit_are_refused_before_they_are_read(http):
    started = time.perf_counter()
    wide = ",".join(["isic_id", *(f"c{n}" for n in range(40_000))]) + "\n"
    answer = http.post("/v1/triage", files=[("metadata", ("m.csv", wide.encode()))])
    assert answer.status_code == 422 and "40,001 columns" in answer.json()["error"], answer.text
    long = "isic_id\n" + "".join(f"a{n}\n" for n in range(500_000))
    answer = http.post("/v1/triage", files=[("metadata", ("m.csv", long.encode()))])
    assert answer.status_code == 413 and answer.json()["limit"] == "visit", answer.text
    for inside in (b"{}", b"1"):
        answer = http.post("/v1/triage", content=b'{"lesions":[' + (inside + b",") * 3_000_000 + b"1]}", headers=JSON)
        assert answer.status_code == 413 and answer.json()["limit"] == "visit", answer.text
    assert time.perf_counter() - started < 10


def test_headers_in_capitals_are_understood_and_what_is_not_used_is_said(http, visit):
    images, table = visit
    head, *rows = table.head(3).write_csv().splitlines()
    files = [("images", (f"{name}.jpg", data)) for name, data in images[:2]]
    plain = http.post("/v1/triage", files=[*files, ("metadata", ("m.csv", "\n".join([head, *rows]).encode()))]).json()
    odd = "\r\n".join([head.upper() + ", Shoe_Size", *(" " + row + ",44" for row in rows)])
    answer = http.post("/v1/triage", files=[*files, ("metadata", ("m.csv", odd.encode()))]).json()
    assert [one["probability"] for one in answer["lesions"]] == [one["probability"] for one in plain["lesions"]]
    used, pictures = answer["context"]["notes"]
    assert "Shoe_Size" in used and table["isic_id"][2] in pictures and "1 of 3" in pictures


def test_a_visit_that_is_asked_for_again_can_stay_out_of_the_figures(finished, visit):
    app, heard = create_app(finished / "bundle"), []
    lesion = {"id": "room/4", "image": base64.b64encode(visit[0][0][1]).decode()}
    with TestClient(app) as client:
        while app.state.service.reason is not None:
            time.sleep(0.05)
        app.state.service.answered = heard.append
        for options in ({}, {"count": False}):
            answer = client.post("/v1/triage", json={"lesions": [lesion], "options": options})
            assert answer.json()["lesions"][0]["id"] == "room/4", answer.text
        assert len(heard) == 1
        answer = client.post("/v1/triage", json={"lesions": [lesion], "options": {"heatmaps": ["other"]}})
        assert answer.status_code == 422 and "'other'" in answer.json()["error"]

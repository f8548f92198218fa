"""One lesion, one answer: training's code, the ONNX graph and the service in all its forms, on 1,000 lesions.

The bundle comes from a run of its own, trained long enough that its logits are spread, and joined by ranks: there the
picture moves the joined score most. The lines that the run measured, flat for a model this small, are put aside for
those of a good model, slope 1 and the shift from the data's prevalence to the stated one; the thresholds lie amid the
scores, halfway between two neighbours.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import struct
from pathlib import Path

import httpx
import numpy as np
import pytest

from lesionflow import keys, steps
from lesionflow.bundle import INFO, write_manifest
from lesionflow.client import Client
from lesionflow.data.features import features, has_record, lesions_of_patient
from lesionflow.data.store import Store
from lesionflow.data.synthetic import synthesize
from lesionflow.evaluation.calibration import sigmoid
from lesionflow.evaluation.thresholds import band_of
from lesionflow.models.joining import Joined
from lesionflow.recipe import Recipe
from lesionflow.serving.predictor import CANNOT_JUDGE, Predictor

LESIONS = 1000
LIMIT = 1e-5
"""Of probabilities."""
LOGIT_LIMIT = 5e-4
"""Of log-odds, whatever the line makes of them."""
SHIFT = float(np.log(0.00098 / 0.99902) - np.log(0.15 / 0.85))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Path:
    values = tiny_recipe.to_dict()
    more = {"training": {"epochs": 5}, "tabular": {"rounds": 60}, "stack": {"method": "rank"}}
    values |= {part: values[part] | changed for part, changed in more.items()}
    data, run = tmp_path_factory.mktemp("data") / "data", tmp_path_factory.mktemp("run") / "run"
    synthesize(data, patients=60, lesions=1200, seed=5, prevalence=0.15, workers=1, progress=False)
    keyed = steps.begin(run, Recipe.from_dict(values), data)
    steps.prepare(run, data, keyed["prepare"])
    steps.split(run, keyed["split"])
    steps.train(run, keyed["train"])
    steps.stack(run, keyed["stack"])
    steps.evaluate(run, keyed["evaluate"])
    steps.gate(run, keyed["gate"])
    steps.export(run, keyed["export"])
    return run


@pytest.fixture(scope="module")
def store(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Lesions that the run has never seen."""
    data, other = tmp_path_factory.mktemp("data") / "data", tmp_path_factory.mktemp("other") / "run"
    synthesize(data, patients=25, lesions=LESIONS, seed=77, prevalence=0.1, workers=1, progress=False)
    keyed = steps.begin(other, Recipe.load(str(run / "recipe.toml")), data)
    steps.prepare(other, data, keyed["prepare"])
    return Store.open(other / "store")


@pytest.fixture(scope="module")
def trained(run: Path, store: Store) -> dict[str, np.ndarray]:
    """Served log-odds [N] by mode, by what trained the models: torch, features and ways to join, no bundle."""
    from lesionflow.models.image import preprocess_spec
    from lesionflow.training.scoring import fold_weights, load_network, score

    recipe, rows = Recipe.load(str(run / "recipe.toml")), np.arange(len(store))
    folds = []
    for paths in fold_weights(run, recipe, recipe.folds.count):
        members = [score(load_network(p, recipe), store, rows, preprocess_spec(recipe), "none") for p in paths]
        folds.append(np.mean(members, axis=0))
    joined = Joined.load(lambda name: (run / "stack" / name).read_bytes())
    own = tuple(name for name in joined.blocks if name in ("plain", "derived"))
    alone = lesions_of_patient(store.table) == 1
    assert has_record(store.table).all() and not alone.any()
    pictures = np.stack(folds, axis=1)
    found = joined.scores(pictures, features(store.table, own), features(store.table, joined.blocks), alone)
    # `image` among them is the picture on the joined scale; a picture alone is answered by its own logit.
    return {mode: logits.mean(1) for mode, logits in found.items()} | {"picture": pictures.mean(1)}


@pytest.fixture(scope="module")
def bundle(run: Path, trained: dict[str, np.ndarray]) -> Path:
    """The run's bundle with the lines and thresholds of this test."""
    info = keys.read_json(run / "bundle" / INFO)

    def decide(of: dict, logits: np.ndarray) -> None:
        of["calibration"] |= {"a": 1.0, "b": SHIFT}
        ranked = np.sort(logits)
        cuts = {name: (ranked[at - 1] + ranked[at]) / 2 for name, at in (("refer", 900), ("low", 500))}
        of["thresholds"] = {
            name: {"logit": float(cut), "sensitivity": 0.9, "reached": True} for name, cut in cuts.items()
        }

    decide(info, trained["picture"])
    for mode, of in info["visit"]["modes"].items():
        decide(of, trained[mode])
    keys.write_json(run / "bundle" / INFO, info)
    write_manifest(run / "bundle")
    return run / "bundle"


@pytest.fixture(scope="module")
def url(start, bundle: Path):
    with start(bundle) as running:
        yield running.url


@pytest.fixture(scope="module")
def thresholds(bundle: Path) -> dict[str, dict]:
    info = keys.read_json(bundle / INFO)
    return {"picture": info["thresholds"]} | {m: of["thresholds"] for m, of in info["visit"]["modes"].items()}


def assert_equal(found: dict[str, list], logits: np.ndarray, cuts: dict, judged: list[bool]) -> None:
    off = np.abs(np.asarray(found["probability"]) - sigmoid(logits + SHIFT)).max()
    assert off <= LIMIT, off
    off = np.abs(np.asarray(found["logit"]) - logits).max()
    assert off <= LOGIT_LIMIT, off
    band = found["band"]
    bands = band_of(logits, cuts)
    assert bands is not None and len(set(bands.tolist())) == 3
    changed = [n for n, (ours, theirs) in enumerate(zip(band, bands, strict=True)) if judged[n] and ours != theirs]
    assert not changed
    # Too few that can be judged would show too little.
    assert all((ours == CANNOT_JUDGE) != sure for ours, sure in zip(band, judged, strict=True)) and sum(judged) > 900


@pytest.fixture(scope="module")
def judged(bundle: Path, store: Store) -> list[bool]:
    return [not answer.doubts for answer in Predictor(bundle).predict([store.jpeg(row) for row in range(len(store))])]


def in_json(store: Store, rows: range) -> tuple[bytes, dict[str, str]]:
    data = [base64.b64encode(store.jpeg(row)).decode() for row in rows]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(rows)], "data": data}
    return json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"}


def in_binary(store: Store, rows: range) -> tuple[bytes, dict[str, str]]:
    images = [store.jpeg(row) for row in rows]
    data = b"".join(struct.pack("<I", len(image)) + image for image in images)
    size = {"binary_data_size": len(data)}
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(rows)], "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def tensors(response: httpx.Response) -> dict[str, list]:
    """A response's outputs by name, whichever form they have."""
    length = int(response.headers.get("Inference-Header-Content-Length", len(response.content)))
    tail, found = response.content[length:], {}
    for output in json.loads(response.content[:length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = output["data"]
            continue
        raw, tail = tail[:size], tail[size:]
        if output["datatype"] == "BYTES":
            found[output["name"]] = []
            while raw:
                (length,) = struct.unpack("<I", raw[:4])
                found[output["name"]].append(raw[4 : 4 + length].decode())
                raw = raw[4 + length :]
        else:
            found[output["name"]] = np.frombuffer(raw, {"FP32": "<f4", "FP64": "<f8"}[output["datatype"]]).tolist()
    return found


def test_the_graph_s(bundle, store, trained, thresholds, judged):
    answers = Predictor(bundle).predict([store.jpeg(row) for row in range(len(store))])
    assert trained["picture"].std() > 0.5, "logits that are all alike would prove nothing"
    found = {name: [getattr(a, name) for a in answers] for name in ("probability", "logit", "band")}
    assert_equal(found, trained["picture"], thresholds["picture"], judged)


@pytest.mark.parametrize("form", [in_json, in_binary])
def test_the_protocol_s(url, store, trained, thresholds, judged, form):
    found: dict[str, list] = {"probability": [], "logit": [], "band": []}
    for start in range(0, LESIONS, 50):
        body, headers = form(store, range(start, start + 50))
        response = httpx.post(f"{url}/v2/models/quick/infer", content=body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        answers = tensors(response)
        for name, values in found.items():
            values += answers[name]
    assert_equal(found, trained["picture"], thresholds["picture"], judged)


def test_the_client_s(url, store, trained, thresholds, judged):
    with Client(url) as service:
        answers = service.infer((store.ids[row], store.jpeg(row)) for row in range(len(store)))
    assert [a["image"] for a in answers] == list(store.ids)
    assert_equal(by_name(answers), trained["picture"], thresholds["picture"], judged)


def by_name(answers: list[dict]) -> dict[str, list]:
    return {name: [answer[name] for answer in answers] for name in ("probability", "logit", "band")}


def in_form(url: str, pictures: list[tuple[str, bytes]], rows: list[dict[str, str]]) -> dict:
    with Client(url) as service:
        return service.triage(pictures, rows, reasons=False)


def as_json(url: str, pictures: list[tuple[str, bytes]], rows: list[dict[str, str]]) -> dict:
    described = {row["isic_id"]: {k: v for k, v in row.items() if k != "isic_id"} for row in rows}
    lesions = [
        {"id": Path(name).stem, "image": base64.b64encode(data).decode(), "metadata": described[Path(name).stem]}
        for name, data in pictures
    ]
    response = httpx.post(f"{url}/v1/triage", json={"lesions": lesions, "options": {"reasons": 0}}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("form", [in_form, as_json])
def test_triage_s(url, store, trained, thresholds, judged, form):
    buffer = io.StringIO(store.table.drop("target", strict=False).write_csv())
    table = {row["isic_id"]: row for row in csv.DictReader(buffer)}
    place = {name: row for row, name in enumerate(store.ids)}
    answers: dict[str, dict] = {}
    whose = [store.table["patient_id"][row] for row in range(len(store))]
    for _, rows in itertools.groupby(sorted(range(len(store)), key=lambda row: whose[row]), key=lambda row: whose[row]):
        names = [store.ids[row] for row in rows]
        visit = form(url, [(f"{n}.jpg", store.jpeg(place[n])) for n in names], [table[n] for n in names])
        assert not visit["errors"]
        assert [lesion["rank"] for lesion in visit["lesions"]] == list(range(1, len(names) + 1))
        ranked = sorted(names, key=lambda name: -trained["image_visit"][place[name]])
        served = [trained["image_visit"][place[lesion["id"]]] for lesion in visit["lesions"]]
        assert served == pytest.approx([trained["image_visit"][place[n]] for n in ranked], abs=1e-4)
        answers |= {lesion["id"]: lesion for lesion in visit["lesions"]}
    inorder = [answers[name] for name in store.ids]
    assert {answer["mode"] for answer in inorder} == {"image_visit"}
    assert_equal(by_name(inorder), trained["image_visit"], thresholds["image_visit"], judged)
    for mode in inorder[0]["scores"]:
        assert np.abs([a["scores"][mode] for a in inorder] - sigmoid(trained[mode] + SHIFT)).max() <= LIMIT, mode


def test_modes_differ(trained):
    """Else a mix-up between them wouldn't show."""
    modes = [sigmoid(trained[mode]) for mode in ("picture", "record", "visit", "image_record", "image_visit")]
    for one, other in itertools.combinations(modes, 2):
        assert np.abs(one - other).max() > 0.01

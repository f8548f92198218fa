"""`ask`: files, folders and HDF5 files to answers, and errors that name the file or the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys

import h5py
import numpy as np
import pytest

from lesionflow import client
from lesionflow.errors import ClusterError, DataError, UsageError
from lesionflow.serving.predictor import Predictor


@pytest.fixture
def crops(tmp_path, encode):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encode(number))
    (folder / "notes.txt").write_text("not an image")
    return folder


def assert_same(answers, expected):
    np.testing.assert_allclose([a["logit"] for a in answers], [e.logit for e in expected], atol=1e-6)
    np.testing.assert_allclose([a["probability"] for a in answers], [e.probability for e in expected], atol=1e-6)
    assert [a["band"] for a in answers] == [e.band for e in expected]


def test_a_folder_and_a_file_in_order(service, bundle_dir, crops, encode):
    answers = client.ask(service.url, [crops, crops / "1.jpg"])
    assert [a["image"] for a in answers] == ["0.jpg", "1.jpg", "2.jpg", "1.jpg"]
    assert_same(answers, Predictor(bundle_dir).predict([encode(n) for n in (0, 1, 2, 1)]))


def test_an_hdf5_file_by_ids_in_several_requests(service, bundle_dir, tmp_path, encode, monkeypatch):
    monkeypatch.setattr(client, "BATCH_IMAGES", 2)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for number in range(5):
            file[f"ISIC_{number}"] = np.void(encode(number))
    answers = client.ask(service.url + "/", [tmp_path / "x.hdf5"], model="tiny")
    assert [a["image"] for a in answers] == [f"ISIC_{n}" for n in range(5)]
    assert_same(answers, Predictor(bundle_dir).predict([encode(n) for n in range(5)]))


def test_a_refused_image_is_named(service, crops, monkeypatch):
    monkeypatch.setattr(client, "BATCH_IMAGES", 2)
    (crops / "2.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match=r"2\.jpg: refused"):
        client.ask(service.url, [crops])


def test_a_missing_file_and_an_empty_folder_are_named(service, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg"):
        client.ask(service.url, [tmp_path / "gone.jpg"])
    with pytest.raises(DataError, match="no images"):
        client.ask(service.url, [tmp_path])


def test_nobody_listening_names_the_url_and_the_remedy(crops):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ClusterError, match=rf"{url}: connection refused.*lesionflow serve"):
        client.ask(url, [crops])


def test_a_server_that_never_answers_times_out(crops):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ClusterError, match=r"no answer within 0\.2 s"),
    ):
        client.ask(f"http://127.0.0.1:{silent.getsockname()[1]}", [crops], timeout=0.2)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", "http://x:port", ""])
def test_what_is_no_url_is_a_usage_error(url, crops):
    with pytest.raises(UsageError):
        client.ask(url, [crops])


def test_an_unknown_model_says_which_there_is(service, crops):
    with pytest.raises(ClusterError, match="this server has 'tiny'"):
        client.ask(service.url, [crops], model="other")


def test_the_client_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import lesionflow.client;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lesionflow']"

"""Downloads from a stand-in for Kaggle on the loopback, through Kaggle's own client library."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("kagglesdk")
from kagglesdk import kaggle_env

from lesionflow.data import fetch as fetching
from lesionflow.errors import ClusterError, LesionflowError, UsageError

_spec = importlib.util.spec_from_file_location("kaggle_stand_in", Path(__file__).parents[1] / "kaggle_stand_in.py")
stand_in = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = stand_in
_spec.loader.exec_module(stand_in)

CANARY = "canary-KGAT-7d41e0b2"
IMAGES = np.random.default_rng(0).bytes(3_000_000)
TABLE = b"isic_id,target\n" + b"".join(b"ISIC_%07d,0\n" % i for i in range(5000))
FILES = {"train-image.hdf5": IMAGES, "train-metadata.csv": TABLE}


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    """No token of the person running the tests may be found, and none may leave."""
    for name in [n for n in os.environ if n.startswith("KAGGLE_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "home" / ".kaggle").mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def kaggle(monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY)
    with stand_in.StandIn(dict(FILES), authorization=f"Bearer {CANARY}") as stand:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, stand.url)
        yield stand


def fetch(out, files=tuple(FILES), **options):
    return fetching.fetch(out, files=files, progress=False, pause=0.01, **options)


def start(entry):
    return int(entry["Range"].removeprefix("bytes=").removesuffix("-"))


def test_every_file_arrives_and_is_recorded(kaggle, tmp_path):
    paths = fetch(tmp_path / "data")
    assert [p.read_bytes() for p in paths] == [IMAGES, TABLE]
    record = json.loads((tmp_path / "data/fetch.json").read_text())
    assert record["competition"] == "isic-2024-challenge"
    assert record["files"]["train-metadata.csv"]["bytes"] == len(TABLE)
    assert len(record["files"]["train-image.hdf5"]["sha256"]) == 64
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["fetch.json", *sorted(FILES)]


def test_second_fetch_does_nothing(kaggle, tmp_path):
    fetch(tmp_path)
    kaggle.log.clear()
    fetch(tmp_path)
    assert kaggle.log == []


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"x" + TABLE[1:]), lambda p: p.unlink()])
def test_damaged_or_lost_file_alone_is_fetched_again(kaggle, tmp_path, damage):
    _, table = fetch(tmp_path)
    damage(table)
    kaggle.log.clear()
    fetch(tmp_path)
    assert table.read_bytes() == TABLE
    assert ["train-metadata.csv" in entry["path"] for entry in kaggle.storage()] == [True]


def test_broken_transfer_is_continued_where_it_broke(kaggle, tmp_path):
    kaggle.faults += [("break", 1_500_000), ("", 0), ("break", 700_000)]
    fetch(tmp_path, ["train-image.hdf5"])
    assert (tmp_path / "train-image.hdf5").read_bytes() == IMAGES
    assert kaggle.faults == []
    first, second = (start(entry) for entry in kaggle.storage() if entry["Range"])
    assert 1_400_000 < first <= 1_500_000
    assert first + 600_000 < second <= first + 700_000


def test_next_call_continues_what_the_last_one_left(kaggle, tmp_path):
    kaggle.faults += [("break", 2_000_000)]
    with pytest.raises(ClusterError, match="kept and continued"):
        fetch(tmp_path, ["train-image.hdf5"], tries=1)
    assert not (tmp_path / "train-image.hdf5").exists()
    fetch(tmp_path, ["train-image.hdf5"])
    assert (tmp_path / "train-image.hdf5").read_bytes() == IMAGES
    assert 1_900_000 < start(kaggle.storage()[-1]) <= 2_000_000


def test_partial_of_another_version_is_thrown_away(kaggle, tmp_path):
    kaggle.faults += [("break", 2_000_000)]
    with pytest.raises(ClusterError):
        fetch(tmp_path, ["train-image.hdf5"], tries=1)
    kaggle.files["train-image.hdf5"], kaggle.etag = IMAGES[::-1], '"v2"'
    fetch(tmp_path, ["train-image.hdf5"])
    assert (tmp_path / "train-image.hdf5").read_bytes() == IMAGES[::-1]


def test_busy_server_is_asked_again(kaggle, tmp_path):
    kaggle.faults += [("status", 503), ("status", 429)]
    fetch(tmp_path, ["train-metadata.csv"])
    assert (tmp_path / "train-metadata.csv").read_bytes() == TABLE


def test_flipped_byte_is_noticed_by_the_servers_checksum(kaggle, tmp_path):
    kaggle.faults += [("flip", 1000)]
    fetch(tmp_path, ["train-metadata.csv"])
    assert (tmp_path / "train-metadata.csv").read_bytes() == TABLE
    assert len(kaggle.storage()) == 2


def test_file_damaged_on_the_server_is_refused(kaggle, tmp_path):
    kaggle.faults += [("flip", 1000), ("flip", 1000)]
    with pytest.raises(ClusterError, match="MD5"):
        fetch(tmp_path, ["train-metadata.csv"])
    assert list(tmp_path.glob("*.csv")) == []


def test_archive_is_unpacked_under_the_plain_name(kaggle, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train-metadata.csv", TABLE)
    kaggle.files["train-metadata.csv"] = packed.getvalue()
    fetch(tmp_path, ["train-metadata.csv"])
    assert (tmp_path / "train-metadata.csv").read_bytes() == TABLE
    assert list(tmp_path.glob(".*")) == []


def test_damaged_archive_is_refused_and_not_kept(kaggle, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("train-metadata.csv", TABLE)
    data = bytearray(packed.getvalue())
    data[500] ^= 255
    kaggle.files["train-metadata.csv"], kaggle.hashes = bytes(data), False
    with pytest.raises(ClusterError, match="archive is damaged"):
        fetch(tmp_path, ["train-metadata.csv"])
    assert list(tmp_path.glob("*train-metadata*")) == []


def basic(name, key):
    return "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()


@pytest.mark.parametrize("place", ["token file", "user and key", "kaggle.json", "config dir"])
def test_token_is_found_wherever_kaggle_allows_it(kaggle, tmp_path, monkeypatch, empty_home, place):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    kaggle.authorization = basic("someone", CANARY)
    key = json.dumps({"username": "someone", "key": CANARY})
    if place == "token file":
        (empty_home / ".kaggle/access_token").write_text(CANARY + "\n")
        kaggle.authorization = f"Bearer {CANARY}"
    elif place == "user and key":
        monkeypatch.setenv("KAGGLE_USERNAME", "someone")
        monkeypatch.setenv("KAGGLE_KEY", CANARY)
    elif place == "kaggle.json":
        (empty_home / ".kaggle/kaggle.json").write_text(key)
    else:
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
        (tmp_path / "kaggle.json").write_text(key)
    fetch(tmp_path / "data", ["train-metadata.csv"])
    assert (tmp_path / "data/train-metadata.csv").read_bytes() == TABLE


def test_missing_token_says_where_it_may_be_put(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(UsageError, match=r"no Kaggle token.*~/\.kaggle/access_token.*KAGGLE_API_TOKEN.*kaggle\.json"):
        fetch(tmp_path)
    assert kaggle.log == []


def test_rules_not_accepted_says_where_to_accept_them(kaggle, tmp_path):
    kaggle.rules_accepted = False
    with pytest.raises(ClusterError, match=r"kaggle\.com/competitions/isic-2024-challenge/rules"):
        fetch(tmp_path)


def test_refused_token(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "stale")
    with pytest.raises(UsageError, match="refused the token"):
        fetch(tmp_path)


def test_unknown_file_and_competition(kaggle, tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.csv"):
        fetch(tmp_path, ["nothing.csv"])
    with pytest.raises(UsageError, match="no-such"):
        fetch(tmp_path, competition="no-such")


def test_path_outside_the_folder_is_refused(kaggle, tmp_path):
    with pytest.raises(UsageError, match="without leading"):
        fetch(tmp_path, ["../escape.csv"])
    assert kaggle.log == []


def test_no_network(kaggle, tmp_path, monkeypatch):
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="check the network"):
        fetch(tmp_path, tries=2)


def test_no_disk_space(kaggle, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match=r"no disk space for train-image\.hdf5"):
        fetch(tmp_path)


@pytest.mark.parametrize("fault", ["rules", "stale", "storage 403", "broken", "no network"])
def test_token_and_signed_address_never_leave(kaggle, tmp_path, monkeypatch, caplog, capfd, fault):
    caplog.set_level(logging.DEBUG)
    if fault == "rules":
        kaggle.rules_accepted = False
    elif fault == "stale":
        kaggle.authorization = "Bearer another"
    elif fault == "storage 403":
        kaggle.faults += [("status", 403)]
    elif fault == "broken":
        kaggle.faults += [("break", 10)] * 10
    else:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(LesionflowError) as caught:
        fetching.fetch(tmp_path, files=["train-image.hdf5"], tries=1, pause=0, progress=True)
    said = "".join(traceback.format_exception(caught.value)) + caplog.text.replace(
        f"/storage/train-image.hdf5?signature={stand_in.SIGNATURE}", ""
    )  # urllib3 logs paths at DEBUG, which lesionflow never switches on.
    said += "".join(capfd.readouterr()) + "".join(
        p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()
    )
    assert CANARY not in said
    assert stand_in.SIGNATURE not in said


def test_storage_is_not_shown_the_token(kaggle, tmp_path):
    kaggle.faults += [("break", 1000)]
    fetch(tmp_path, ["train-metadata.csv"])
    assert kaggle.storage()
    assert all(not entry["Authorization"] for entry in kaggle.storage())

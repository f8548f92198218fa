"""The Kaggle token reaches the Secret from every place it may lie in, and nothing else ever shows it."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import sys
import traceback
from pathlib import Path

import pytest
from kagglesdk import kaggle_env

from lesionflow.cluster import manifests, secrets
from lesionflow.cluster.api import Api
from lesionflow.cluster.settings import Place, Settings
from lesionflow.data import kaggle
from lesionflow.errors import ClusterError, LesionflowError, UsageError

_spec = importlib.util.spec_from_file_location("kaggle_stand_in", Path(__file__).parents[1] / "kaggle_stand_in.py")
stand_in = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = stand_in
_spec.loader.exec_module(stand_in)

CANARY = "KGAT_canary-51c0ffee7d41e0b2"
CODED = base64.b64encode(CANARY.encode()).decode()
TABLE = b"isic_id,target\nISIC_0000001,0\n"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No token of the person running the tests may be found, and none may leave."""
    for name in [n for n in os.environ if n.startswith("KAGGLE_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "home" / ".kaggle").mkdir(parents=True)
    return tmp_path / "home"


def key_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"username": "someone", "key": CANARY}))
    return path


def token_file(path):
    path.write_text(CANARY + "\n")
    return path


SOURCES = {
    "token in the environment": lambda home, patch: patch.setenv("KAGGLE_API_TOKEN", CANARY),
    "path in the environment": lambda home, patch: patch.setenv("KAGGLE_API_TOKEN", str(token_file(home / "token"))),
    "access_token": lambda home, patch: token_file(home / ".kaggle/access_token"),
    "access_token.txt": lambda home, patch: token_file(home / ".kaggle/access_token.txt"),
    "user and key": lambda home, patch: (
        patch.setenv("KAGGLE_USERNAME", "someone"),
        patch.setenv("KAGGLE_KEY", CANARY),
    ),
    "kaggle.json": lambda home, patch: key_file(home / ".kaggle/kaggle.json"),
    "config folder": lambda home, patch: key_file(home / ".config/kaggle/kaggle.json"),
    "named folder": lambda home, patch: patch.setenv("KAGGLE_CONFIG_DIR", str(key_file(home / "k/kaggle.json").parent)),
}
GIVEN = {
    "token file": lambda home, patch: token_file(home / "given"),
    "key file": lambda home, patch: str(key_file(home / "given.json")),
    "standard input": lambda home, patch: patch.setattr("sys.stdin", io.StringIO(CANARY + "\n")) or "-",
    "key on standard input": lambda home, patch: (
        patch.setattr("sys.stdin", io.StringIO(json.dumps({"username": "someone", "key": CANARY}))) or "-"
    ),
    "typed": lambda home, patch: io.StringIO(CANARY),
}
BY_KEY = {"user and key", "kaggle.json", "config folder", "named folder", "key file", "key on standard input"}


def stored(double, name="kaggle"):
    return double.store.get("Secret", "team", name)


def values(double):
    return {k: base64.b64decode(v).decode() for k, v in (stored(double)["data"] or {}).items()}


def others(double):
    """Everything on the cluster but the Secret's data."""
    kinds = [k for k in double.store.kinds if not k.startswith("SelfSubject")]
    objects = [o for k in kinds for o in double.store.list(k)]
    return json.dumps([{**o, "data": None} if o["kind"] == "Secret" else o for o in objects])


def assert_silent(text):
    for secret in (CANARY, CODED, base64.b64encode(CODED.encode()).decode(), CANARY[5:]):
        assert secret not in text


@pytest.mark.parametrize("place", [*SOURCES, *GIVEN])
def test_a_token_goes_from_its_place_into_the_secret_and_nowhere_else(
    double, api, home, tmp_path, monkeypatch, capfd, caplog, place
):
    caplog.set_level(logging.DEBUG)
    source = GIVEN[place](home, monkeypatch) if place in GIVEN else None
    if source is None:
        SOURCES[place](home, monkeypatch)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    told = []
    assert not secrets.has_kaggle_token(api, Settings())
    name = secrets.store_kaggle_token(api, Settings(), source=source, tell=told.append)
    assert name == "kaggle" and secrets.has_kaggle_token(api, Settings())
    key = {"KAGGLE_USERNAME": "someone", "KAGGLE_KEY": CANARY}
    assert values(double) == (key if place in BY_KEY else {"KAGGLE_API_TOKEN": CANARY})
    assert_silent("".join(told) + "".join(capfd.readouterr()) + caplog.text + others(double))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", [*SOURCES, *GIVEN])
def test_a_pod_downloads_with_what_the_secret_holds(double, api, home, tmp_path, monkeypatch, place):
    """envFrom in a pod is the environment; the stand-in lets in nothing but the right header."""
    source = GIVEN[place](home, monkeypatch) if place in GIVEN else SOURCES[place](home, monkeypatch)
    secrets.store_kaggle_token(api, Settings(), source=source if place in GIVEN else None, tell=lambda text: None)
    for name in [n for n in os.environ if n.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    for name, value in values(double).items():
        monkeypatch.setenv(name, value)
    pair = base64.b64encode(f"someone:{CANARY}".encode()).decode()
    header = f"Basic {pair}" if place in BY_KEY else f"Bearer {CANARY}"
    with stand_in.StandIn({"train-metadata.csv": TABLE}, authorization=header) as stand:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, stand.url)
        with kaggle.connect() as client:
            response = kaggle.open_file(client, "isic-2024-challenge", "train-metadata.csv")
            assert response.content == TABLE


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("token in the environment", "environment variable KAGGLE_API_TOKEN"),
        ("access_token", "/.kaggle/access_token"),
        ("user and key", "KAGGLE_USERNAME and KAGGLE_KEY"),
        ("kaggle.json", "/.kaggle/kaggle.json"),
        ("token file", "/given"),
        ("standard input", "standard input"),
        ("typed", "what was typed"),
    ],
)
def test_the_place_is_said(api, home, monkeypatch, capsys, place, where):
    source = GIVEN[place](home, monkeypatch) if place in GIVEN else SOURCES[place](home, monkeypatch)
    secrets.store_kaggle_token(api, Settings(), source=source if place in GIVEN else None)
    said = capsys.readouterr().out
    assert where in said and "secret kaggle in namespace team" in said


def test_the_secret_outlives_every_run_but_is_ours(double, api, home, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY)
    secrets.store_kaggle_token(api, Settings.load(None, ["kaggle_secret=mine"]), tell=lambda text: None)
    labels = stored(double, "mine")["metadata"]["labels"]
    assert labels == {manifests.MANAGED_BY: "lesionflow"}


def test_a_new_token_takes_the_old_ones_place(double, api, home, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_old-old-old-old-old")
    secrets.store_kaggle_token(api, Settings(), tell=lambda text: None)
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    SOURCES["user and key"](home, monkeypatch)
    secrets.store_kaggle_token(api, Settings(), tell=lambda text: None)
    # The old token would win over the key in a pod's environment.
    assert values(double) == {"KAGGLE_USERNAME": "someone", "KAGGLE_KEY": CANARY}


def test_somebody_elses_secret_keeps_its_own_values_and_labels(double, api, monkeypatch):
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "kaggle"}, "stringData": {"other": "x"}}
    double.store.create(made, "team")
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY)
    secrets.store_kaggle_token(api, Settings(), tell=lambda text: None)
    assert values(double) == {"other": "x", "KAGGLE_API_TOKEN": CANARY}
    assert manifests.MANAGED_BY not in (stored(double)["metadata"].get("labels") or {})


@pytest.mark.parametrize(
    "data", [{}, {"KAGGLE_API_TOKEN": ""}, {"KAGGLE_USERNAME": "eA=="}, {"kaggle.json": "e30="}, {"KAGGLE_KEY": "eA=="}]
)
def test_a_secret_without_usable_keys_holds_no_token(double, api, data):
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "kaggle"}, "data": data}
    double.store.create(made, "team")
    assert not secrets.has_kaggle_token(api, Settings())
    held = [name for name, value in data.items() if value]
    assert f"keys {', '.join(held) or 'none'}, but" in secrets.kaggle_fault(api, Settings())


# --- refusals -----------------------------------------------------------------------------------


def shown(error):
    return "".join(traceback.format_exception(error))


MALFORMED = {
    "two lines": f"{CANARY}\n{CANARY}",
    "a sentence": f"my token is {CANARY}",
    "too short": "KGAT_canary",
    "too long": CANARY * 40,
    "a path": f"/home/someone/{CANARY}",
    "quoted": f'"{CANARY}"',
    "not ASCII": f"{CANARY}é",
    "a web page": f"<html>{CANARY}</html>",
    "an assignment": f"KAGGLE_API_TOKEN={CANARY} x",
    "half a key file": json.dumps({"key": CANARY}),
    "a broken key file": json.dumps({"username": "someone", "key": CANARY})[:-3],
    "a key of spaces": json.dumps({"username": "some one", "key": CANARY}),
}


@pytest.mark.parametrize("about", MALFORMED)
@pytest.mark.parametrize("how", ["typed", "file", "environment"])
def test_a_malformed_token_is_refused_and_not_shown(double, api, tmp_path, monkeypatch, capfd, caplog, about, how):
    caplog.set_level(logging.DEBUG)
    source = None
    if how == "typed":
        source = io.StringIO(MALFORMED[about])
    elif how == "file":
        source = tmp_path / "token"
        source.write_text(MALFORMED[about])
    else:
        monkeypatch.setenv("KAGGLE_API_TOKEN", MALFORMED[about])
    with pytest.raises(UsageError) as caught:
        secrets.store_kaggle_token(api, Settings(), source=source)
    assert "kaggle.com/settings" in str(caught.value)
    assert stored(double) is None
    assert_silent(shown(caught.value) + "".join(capfd.readouterr()) + caplog.text)


def test_the_token_given_for_a_file_is_not_repeated(api):
    with pytest.raises(UsageError, match="never belongs on a command line") as caught:
        secrets.store_kaggle_token(api, Settings(), source=CANARY)
    assert_silent(shown(caught.value))


def test_no_token_anywhere(api):
    with pytest.raises(UsageError, match=r"no Kaggle token.*~/\.kaggle/access_token"):
        secrets.store_kaggle_token(api, Settings())
    with pytest.raises(UsageError, match="no Kaggle token"):
        secrets.store_kaggle_token(api, Settings(), source=io.StringIO(" \n"))


def test_a_token_too_long_for_a_path_stops_a_download_without_being_shown(monkeypatch):
    # Kaggle's library takes the variable for a path first, and the system's refusal repeats it.
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY * 40)
    with pytest.raises(UsageError, match="can't be read") as caught, kaggle.connect():
        pass
    assert_silent(shown(caught.value))


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("echo", [CANARY, CODED])
def test_a_cluster_that_repeats_the_object_in_its_refusal_is_not_quoted(double, api, monkeypatch, exists, echo):
    if exists:
        double.store.create(manifests.secret(Place("kaggle"), "kaggle", {"KAGGLE_KEY": b"x"}, of_run=False), "team")
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY)

    def refuse(self, *args, **options):
        raise ClusterError(f'secrets "kaggle" is forbidden: policy refuses {{"data": "{echo}"}}')

    monkeypatch.setattr(Api, "patch" if exists else "create", refuse)
    with pytest.raises(ClusterError, match=r"policy refuses.*\*\*\*") as caught:
        secrets.store_kaggle_token(api, Settings())
    # The traceback too: `from None` hides the first error from --debug.
    assert_silent(shown(caught.value))


@pytest.mark.parametrize("verb", ["get", "create"])
def test_without_the_right_the_refusal_says_so(double, api, monkeypatch, verb):
    double.faults["deny"] = {(verb, "secrets")}
    monkeypatch.setenv("KAGGLE_API_TOKEN", CANARY)
    with pytest.raises(LesionflowError, match="403"):
        secrets.store_kaggle_token(api, Settings())

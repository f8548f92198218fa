"""The Kaggle token's way into the cluster: from where Kaggle keeps it straight into a Secret.

    store_kaggle_token(api, settings)                      # from this machine
    store_kaggle_token(api, settings, source="-")          # from standard input

The Secret's keys are the environment variables that `data.kaggle` reads, so pods take it whole
(envFrom). The token is never an argument of a command, and no message, log or file carries it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.settings import Place, Settings
from lesionflow.data.kaggle import LOGIN_HELP, find_token, read_key_file
from lesionflow.errors import ClusterError, UsageError

TOKEN, USER, KEY = "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"
_SHAPES = {
    # No path, which KAGGLE_API_TOKEN may also hold: it would mean nothing in a pod.
    TOKEN: re.compile(r"[A-Za-z0-9_][A-Za-z0-9._~+/=-]{15,254}"),
    USER: re.compile(r"[A-Za-z0-9._@-]{1,100}"),
    KEY: re.compile(r"[A-Za-z0-9._-]{16,200}"),
}


def store_kaggle_token(
    api: Api, settings: Settings, *, source: str | Path | TextIO | None = None, tell: Callable[[str], None] = print
) -> str:
    """Put the Kaggle token into the Secret `settings.kaggle_secret` and return that name.

    `source` is a file (a bare token, or a kaggle.json), `-` for standard input, or an open stream, such as one
    around a typed password; without one, the token is taken from where Kaggle's own tools keep it. `tell` hears
    which place it was. A secret that exists keeps whatever else it holds.
    Raises `UsageError` for no token or a malformed one, `ClusterError` if the cluster refuses.
    """
    values, where = find_token() if source is None else _read(source)
    if not values:
        raise UsageError(f"no Kaggle token found: {LOGIN_HELP}")
    for name, value in values.items():
        if not _SHAPES[name].fullmatch(value):
            raise UsageError(f"{where}: that doesn't look like a Kaggle {_WHAT[name]}: {LOGIN_HELP}")
    secret = manifests.secret(
        Place("kaggle", settings), settings.kaggle_secret, {k: v.encode() for k, v in values.items()}, of_run=False
    )
    try:
        if api.get("Secret", settings.kaggle_secret) is None:
            api.create(secret)
        else:
            # Taken out, not left: an old token beside a new key would be preferred to it.
            stale = dict.fromkeys(_SHAPES)
            api.patch("Secret", settings.kaggle_secret, {"data": {**stale, **secret["data"]}})
    except ClusterError as error:
        raise ClusterError(_without(str(error), [*values.values(), *secret["data"].values()])) from None
    tell(f"stored the Kaggle token from {where} as secret {settings.kaggle_secret} in namespace {api.namespace}")
    return settings.kaggle_secret


def has_kaggle_token(api: Api, settings: Settings) -> bool:
    """Whether the cluster holds a token that a download can use."""
    return kaggle_fault(api, settings) == ""


def kaggle_fault(api: Api, settings: Settings) -> str:
    """What is wrong with the secret: `missing`, or what its keys lack; empty if it is usable. Values stay unread."""
    secret = api.get("Secret", settings.kaggle_secret)
    if secret is None:
        return "missing"
    held = {name for name, value in (secret.get("data") or {}).items() if value}
    if TOKEN in held or {USER, KEY} <= held:
        return ""
    found = ", ".join(sorted(held)) or "none"
    return f"it has the keys {found}, but a download reads {TOKEN}, or {USER} and {KEY}"


def _read(source: str | Path | TextIO) -> tuple[dict[str, str], str]:
    try:
        if isinstance(source, str | Path) and str(source) != "-":
            text, where = Path(source).expanduser().read_text(), str(source)
        else:
            stream = sys.stdin if isinstance(source, str | Path) else source
            text, where = stream.read(), "standard input" if stream is sys.stdin else "what was typed"
    except (OSError, UnicodeDecodeError) as error:
        # Unnamed: somebody may have given the token itself for the file.
        raise UsageError(
            f"the Kaggle token can't be read from the given file ({type(error).__name__}): name a file that holds it, "
            "or - for standard input; the token itself never belongs on a command line"
        ) from None
    text = text.strip()
    if text.startswith("{"):
        key = read_key_file(text, where)
        return {USER: key["username"], KEY: key["password"]}, where
    return ({TOKEN: text}, where) if text else ({}, where)


_WHAT: Mapping[str, str] = {TOKEN: "token (one line of letters, digits and ._-)", USER: "user name", KEY: "key"}


def _without(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text

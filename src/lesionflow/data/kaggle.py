"""Ask Kaggle for one file of a competition, through Kaggle's own client library (`kagglesdk`).

The `kaggle` command's package is built on the same library, but logs in while it is imported,
makes folders in the home directory and ends the process when something is missing; the library
does none of that.

Secrets: the token goes from its place straight into the client. It is never an argument, and no
message carries it, nor a signed address: server errors are reported by status and reason only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lesionflow.errors import ClusterError, LesionflowError, UsageError, missing_extra

LOGIN_HELP = (
    "make a token at kaggle.com/settings (API), then put it into ~/.kaggle/access_token, or into the environment "
    "variable KAGGLE_API_TOKEN; an older kaggle.json belongs into ~/.kaggle/, or its two values into "
    "KAGGLE_USERNAME and KAGGLE_KEY"
)


def find_token() -> tuple[dict[str, str], str]:
    """This machine's token, as the environment variables that carry it, and where it was found; empty if there is none.

    Looks where `connect` looks, without the client library. A login by `kaggle auth login` isn't taken: its tokens
    last for hours. Raises `UsageError` for a key file that can't be read.
    """
    home = Path.home() / ".kaggle"
    given = os.environ.get("KAGGLE_API_TOKEN", "").strip()
    try:
        if given and not Path(given).is_file():
            return {"KAGGLE_API_TOKEN": given}, "the environment variable KAGGLE_API_TOKEN"
        for path in (Path(given) if given else None, home / "access_token", home / "access_token.txt"):
            if path is not None and path.is_file() and (token := path.read_text().strip()):
                return {"KAGGLE_API_TOKEN": token}, str(path)
    except OSError as error:
        # A message of the system's would carry the path, which may be the token.
        raise UsageError(f"the Kaggle token can't be read ({type(error).__name__}): {LOGIN_HELP}") from None
    key, where = _api_key()
    return ({"KAGGLE_USERNAME": key["username"], "KAGGLE_KEY": key["password"]}, where) if key else ({}, "")


class TransientError(Exception):
    """Worth another try: the network broke off, or the server is busy."""


@contextmanager
def connect(timeout: float = 60.0) -> Iterator[Any]:
    """An authenticated `kagglesdk.KaggleClient`. Raises `UsageError` if no token is found anywhere."""
    try:
        from kagglesdk import KaggleClient, KaggleCredentials, get_access_token_from_env
        from requests import RequestException
        from requests.adapters import HTTPAdapter
    except ImportError:
        raise missing_extra("kaggle", "train") from None

    # The library sets no timeout of its own: a silent server would be waited for for ever.
    adapter = HTTPAdapter()
    send = adapter.send
    adapter.send = lambda request, **options: send(request, **options | {"timeout": options.get("timeout") or timeout})
    values: dict[str, str] = {}
    try:
        stored_token = get_access_token_from_env()[0]
    except OSError as error:
        # The library takes the token for a path first; too long for one, it would stand in the system's message.
        raise UsageError(f"the Kaggle token can't be read ({type(error).__name__}): {LOGIN_HELP}") from None
    if not stored_token:
        values, _ = _api_key()
        if not values:
            with KaggleClient() as anonymous:
                stored = KaggleCredentials.load(client=anonymous)
                try:
                    token = stored.get_access_token() if stored else None
                except RequestException as error:
                    raise UsageError(
                        f"the stored Kaggle login couldn't be renewed ({type(error).__name__}): "
                        "run `kaggle auth login` again"
                    ) from None
            values = {"api_token": token} if token else {}
        if not values:
            raise UsageError(f"no Kaggle token found: {LOGIN_HELP}")
    with KaggleClient(user_agent="lesionflow", **values) as client:
        session = client.http_client()._session
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        session.headers["Accept-Encoding"] = "identity"  # Ranges and sizes are those of the file itself.
        yield client


def open_file(client: Any, competition: str, name: str) -> Any:
    """A streaming `requests.Response` of one file from its start; the caller closes it.

    Raises `TransientError`, or a `LesionflowError` that says what to do.
    """
    from kagglesdk.competitions.types.competition_api_service import ApiDownloadDataFileRequest

    request = ApiDownloadDataFileRequest()
    request.competition_name, request.file_name = competition, name
    with explained(competition, name):
        return client.competitions.competition_api_client.download_data_file(request)


def reopen_file(client: Any, response: Any, start: int, validator: str, competition: str, name: str) -> Any:
    """The same file from byte `start` (206), or from its beginning (200) if it has changed meanwhile."""
    again = response.request.copy()
    response.close()
    again.headers["Range"] = f"bytes={start}-"
    again.headers["If-Range"] = validator
    with explained(competition, name):
        session = client.http_client()._session
        settings = session.merge_environment_settings(again.url, {}, True, None, None)
        partial = session.send(again, **settings)
        partial.raise_for_status()
        return partial


@contextmanager
def explained(competition: str, name: str) -> Iterator[None]:
    """Turn the client's exceptions into ours, without their texts: those may hold signed addresses."""
    from requests import RequestException
    from urllib3.exceptions import HTTPError as TransportError

    try:
        yield
    except RequestException as error:
        answer = getattr(error, "response", None)
        failure = (
            _refused(answer.status_code, competition, name) if answer is not None else TransientError(_reason(error))
        )
        raise failure from None
    except (TransportError, ConnectionError, TimeoutError) as error:
        raise TransientError(_reason(error)) from None


def _refused(status: int, competition: str, name: str) -> LesionflowError | TransientError:
    if status == 401:
        return UsageError(f"Kaggle refused the token (401), it may have expired: {LOGIN_HELP}")
    if status == 403:
        return ClusterError(
            f"Kaggle refuses {name} (403): accept the rules at kaggle.com/competitions/{competition}/rules "
            "with the account that the token belongs to, then fetch again"
        )
    if status == 404:
        return UsageError(f"Kaggle knows no file {name!r} in the competition {competition!r} (404): check both names")
    if status in (408, 425, 429) or status >= 500:
        return TransientError(f"the server answered {status}")
    return ClusterError(f"Kaggle answered {status} for {name}: try again later")


def _reason(error: BaseException) -> str:
    kind = type(error).__name__
    if "Timeout" in kind:
        return "the server stopped answering"
    if "NameResolution" in str(error) or "getaddrinfo" in str(error):
        return "the server's name can't be resolved"
    return f"the connection failed ({kind})"


def _api_key() -> tuple[dict[str, str], str]:
    """User name and key from the environment or kaggle.json, and where they were; empty if there are none."""
    key = {"username": os.environ.get("KAGGLE_USERNAME", ""), "password": os.environ.get("KAGGLE_KEY", "")}
    if all(key.values()):
        return key, "the environment variables KAGGLE_USERNAME and KAGGLE_KEY"
    home = Path.home()
    config = os.environ.get("XDG_CONFIG_HOME") or str(home / ".config")
    for folder in (os.environ.get("KAGGLE_CONFIG_DIR"), home / ".kaggle", Path(config) / "kaggle"):
        path = Path(folder) / "kaggle.json" if folder else None
        if path is not None and path.is_file():
            return read_key_file(path.read_text(), str(path)), str(path)
    return {}, ""


def read_key_file(text: str, where: str) -> dict[str, str]:
    """User name and key of a kaggle.json. Raises `UsageError` naming the place, not the content."""
    try:
        stored = json.loads(text)
        return {"username": str(stored["username"]), "password": str(stored["key"])}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{where}: not a Kaggle key file (needs username and key): {LOGIN_HELP}") from None

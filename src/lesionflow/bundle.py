"""A bundle is what a run hands to the world: a folder that answers for itself.

    bundle = Bundle.open(Path("run/bundle"))      # every file checked against the manifest
    bundle.info["metrics"], bundle.spec.size
    graph = bundle.read("image.onnx")             # the very bytes that were checked

    bundle.json      what the model is and how it did: see `check_info`
    image.onnx       uint8 NHWC `image` [B, S, S, 3] in; float32 `fold_logits` [B, K] and `logit` [B] out; none where
                     metadata alone is known
    tabular/         where metadata is used: boosted trees as text, and `stack.json`, how they join the pictures
    MODEL_CARD.md    the same for people
    reference/       synthetic lesions and `answers.json`, what the model said about them
    MANIFEST.sha256  the SHA-256 of every file above; `sha256sum -c MANIFEST.sha256` reads it too

Opening refuses, by name, any file that was changed, added, removed or renamed, any link, any path
that leaves the folder and any kind of file that could carry code. It proves that the files belong
together, not who made them: whoever can rewrite a file can rewrite the manifest. Nothing here is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from lesionflow.data.images import PreprocessSpec
from lesionflow.errors import DataError
from lesionflow.graphfile import check_graph
from lesionflow.keys import file_hash, write_text

FORMAT = 1
MANIFEST = "MANIFEST.sha256"
INFO = "bundle.json"
GRAPH = "image.onnx"
CARD = "MODEL_CARD.md"
ANSWERS = "reference/answers.json"
NOTICE = "Not a medical device."

SUFFIXES = (".json", ".onnx", ".md", ".txt", ".png", ".jpg", ".jpeg")
"""Kinds of file a bundle may hold; none of them can run anything."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a model may be called: it goes into URLs."""
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    info: dict[str, Any]
    """The content of bundle.json."""
    hashes: Mapping[str, str]
    """SHA-256 by relative path; empty if the bundle was opened without verification."""

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Bundle:
        """Open and check a bundle. Raises `DataError` naming the file and what is wrong with it."""
        path = Path(path)
        if not (path / INFO).is_file():
            raise DataError(f"{path}: not a bundle, it has no {INFO}: point to the folder that the export wrote")
        hashes = check_files(path) if verify else {}
        bundle = cls(path, check_info(_json(cls(path, {}, hashes).read(INFO), path / INFO), str(path / INFO)), hashes)
        if verify and bundle.pictures and GRAPH not in hashes:
            raise DataError(f"{path}: the manifest has no {GRAPH}, so this is no bundle: export it again")
        return bundle

    @property
    def name(self) -> str:
        """The model's name, as the service's URLs have it."""
        return str(self.info["name"])

    @property
    def spec(self) -> PreprocessSpec:
        return PreprocessSpec.from_dict(self.info["preprocess"])

    @property
    def pictures(self) -> bool:
        """Whether there is a graph that scores pictures; else the bundle knows metadata alone."""
        return self.info["graph"].get("file", GRAPH) is not None

    @property
    def models(self) -> int:
        """K, the columns of `fold_logits`."""
        return int(self.info["models"])

    @property
    def version(self) -> str:
        """Twelve hex digits that name this very bundle: the start of its manifest's SHA-256."""
        return file_hash(self.path / MANIFEST)[:12] if (self.path / MANIFEST).is_file() else "unverified"

    def read(self, name: str) -> bytes:
        """A file's bytes; they are hashed again, so nothing can change between the check and the use."""
        data = (self.path / name).read_bytes()
        if self.hashes and self.hashes.get(name) != hashlib.sha256(data).hexdigest():
            raise DataError(f"{self.path / name}: changed since the bundle was opened: export it again")
        if name.endswith(".onnx"):
            check_graph(data, str(self.path / name))
        return data

    def answers(self) -> list[dict[str, Any]]:
        """The reference lesions: `file`, `logit`, `fold_logits` each, and with metadata `visit_fold_logits`."""
        return list(_json(self.read(ANSWERS), self.path / ANSWERS)["answers"])

    def visit(self) -> list[dict[str, Any]]:
        """The reference lesions' metadata, in the order of `answers`; empty where the bundle knows pictures alone."""
        return list(_json(self.read(ANSWERS), self.path / ANSWERS).get("visit", []))


def write_manifest(path: Path) -> None:
    """Write MANIFEST.sha256 over every other file in the folder, sorted by name."""
    names = [name for name in _files(path) if name != MANIFEST]
    write_text(path / MANIFEST, "".join(f"{file_hash(path / name)}  {name}\n" for name in names))


def verify(path: Path) -> None:
    """Raise `DataError` naming what is wrong with the bundle's files, or with bundle.json; return if nothing is."""
    Bundle.open(path)


def check_files(path: Path) -> dict[str, str]:
    """Check every file against the manifest and return the hashes by name.

    Raises `DataError` naming the first file that was changed, added, removed or renamed, is a link,
    leaves the folder, is of a kind that a bundle can't hold, or is a graph that reads other files.
    """
    listed = _read_manifest(path)
    present = set(_files(path)) - {MANIFEST}
    actual = {name: file_hash(path / name) for name in sorted(present)}
    added, removed = sorted(present - set(listed)), sorted(set(listed) - present)
    by_hash = {digest: name for name, digest in listed.items() if name in removed}
    for name in added:
        if (old := by_hash.get(actual[name])) is not None:
            raise DataError(f"{path / name}: renamed, the manifest has it as {old}: restore the bundle")
        raise DataError(f"{path / name}: added, the manifest doesn't list it: remove it, or export again")
    for name in removed:
        raise DataError(f"{path / name}: removed, but the manifest lists it: restore the bundle")
    for name, digest in actual.items():
        if digest != listed[name]:
            raise DataError(f"{path / name}: changed, its SHA-256 isn't the manifest's: restore the bundle")
    if INFO not in listed:
        raise DataError(f"{path}: the manifest has no {INFO}, so this is no bundle: export it again")
    for name in listed:
        if name.endswith(".onnx"):
            check_graph((path / name).read_bytes(), str(path / name))
    return listed


def check_info(info: Any, where: str) -> dict[str, Any]:
    """Return bundle.json's content if it can be used, else raise `DataError` naming the field.

    Fields: `format` 1; `name`; `created` (UTC, ISO 8601); `lesionflow` (version); `preprocess`
    (`PreprocessSpec`); `graph` (`inputs`, `outputs`: name, datatype, shape with -1 for the batch;
    `opset`); `models` K; `tta`; `calibration` (`kind`, `a`, `b`: probability = 1 / (1 + exp(-(a x
    logit + b))), `a` positive so that the order of lesions stays, what prevalence it is for, and the `covariance`
    of a and b, or null);
    `thresholds` (`refer` and `low`, each with a `logit` and how it was chosen, as `band` reads them;
    empty where no band could be vouched for); `inputs` (what pictures the model knows, as
    `serving.inputs` reads it; may be missing); `drift` (what the hold-out looks like, as `serving.drift`
    reads it; may be missing); `visit` (only with metadata: `served`, the mode of what is
    served, and `modes`, each with its `calibration`, `thresholds` and what it is worth; the `calibration` and
    `thresholds` above are then those of a picture alone); `metrics` (with intervals); `recipe`; `data_hash`;
    `fold_hash`; `data_licence`; `synthetic`; `parity`; `notice`.
    """
    if not isinstance(info, dict):
        raise DataError(f"{where}: not a JSON object: export the bundle again")
    if info.get("format") != FORMAT:
        raise DataError(
            f"{where}: format is {info.get('format')!r}, this version of lesionflow reads {FORMAT}: "
            "export the bundle again, or install the version that wrote it"
        )
    models = info.get("models")
    checks = {
        "name": isinstance(info.get("name"), str) and NAME.fullmatch(info["name"]),
        "preprocess": _is_spec(info.get("preprocess")),
        "graph": isinstance(info.get("graph"), dict),
        "models": isinstance(models, int) and not isinstance(models, bool) and models >= 1,
        "tta": info.get("tta", "none") in ("none", "flips"),
        "calibration": _is_calibration(info.get("calibration")),
        "notice": info.get("notice") == NOTICE,
    }
    for field, good in checks.items():
        if not good:
            raise DataError(f"{where}: {field} can't be {info.get(field)!r}: export the bundle again")
    _check_thresholds(info.get("thresholds"), f"{where}: thresholds")
    if "visit" not in info and info["graph"].get("file", GRAPH) is None:
        raise DataError(f"{where}: neither a graph nor a visit, so it can't score anything: export the bundle again")
    if "visit" in info:
        _check_visit(info["visit"], f"{where}: visit")
    for field in ("inputs", "drift"):
        if not isinstance(info.get(field, {}), dict):
            raise DataError(f"{where}: {field} must be an object: export the bundle again")
    return info


def _check_thresholds(thresholds: Any, where: str) -> None:
    if not isinstance(thresholds, dict):
        raise DataError(f"{where} must be an object of bands: export the bundle again")
    for name, threshold in thresholds.items():
        if name not in ("refer", "low"):
            raise DataError(f"{where}.{name} is no band, those are refer and low: export the bundle again")
        if not isinstance(threshold, dict) or not _finite(threshold.get("logit")):
            raise DataError(f"{where}.{name} needs a finite `logit`: export the bundle again")
    if "low" in thresholds and not ("refer" in thresholds and _logit(thresholds, "low") <= _logit(thresholds, "refer")):
        raise DataError(f"{where}.low needs a thresholds.refer that isn't under it: export the bundle again")


def _check_visit(visit: Any, where: str) -> None:
    modes = visit.get("modes") if isinstance(visit, dict) else None
    if not isinstance(modes, dict) or visit.get("served") not in modes:
        raise DataError(f"{where} needs `modes`, and `served` among them: export the bundle again")
    for name, mode in modes.items():
        if not isinstance(mode, dict) or not _is_calibration(mode.get("calibration")):
            raise DataError(f"{where}.modes.{name} needs a `calibration`: export the bundle again")
        _check_thresholds(mode.get("thresholds"), f"{where}.modes.{name}.thresholds")


def band(logit: float, thresholds: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The band of a served logit: `refer` from its threshold on, `low` under its own, else `routine`.

    None without thresholds. That a picture can't be judged at all is for `serving.inputs` to say.
    """
    if not math.isfinite(logit):
        raise DataError("the model's answer is not a number: export the bundle again")
    if not thresholds:
        return None
    if logit >= _logit(thresholds, "refer"):
        return "refer"
    return "low" if "low" in thresholds and logit < _logit(thresholds, "low") else "routine"


def probability_interval(
    logit: float, calibration: Mapping[str, Any], level: float = 0.95
) -> tuple[float, float] | None:
    """What a calibrated probability could be, had the line been fitted to other patients of the kind; None if unknown.

    Normal on the log-odds: a x logit + b plus and minus z x sqrt(logit^2 var(a) + 2 logit cov(a, b) + var(b)). It
    covers the line alone: that patients and pictures are of the kind it was fitted on is assumed.
    """
    if not (covariance := calibration.get("covariance")):
        return None
    (aa, ab), (_, bb) = covariance
    middle = calibration["a"] * logit + calibration["b"]
    error = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(max(0.0, logit * logit * aa + 2 * logit * ab + bb))
    low, high = (0.5 * (1 + math.tanh(z / 2)) for z in (middle - error, middle + error))
    return low, high


def _logit(thresholds: Mapping[str, Mapping[str, Any]], name: str) -> float:
    return float(thresholds[name]["logit"])


def _files(path: Path) -> list[str]:
    """Relative names of all regular files, sorted; refuses links and anything else."""
    names: list[str] = []
    folders = [path]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                name = Path(entry.path).relative_to(path).as_posix()
                if stat.S_ISLNK(mode):
                    raise DataError(f"{entry.path}: a symbolic link; a bundle holds plain files only: copy the file in")
                if stat.S_ISDIR(mode):
                    folders.append(Path(entry.path))
                elif not stat.S_ISREG(mode):
                    raise DataError(f"{entry.path}: not a plain file: remove it")
                elif name != MANIFEST and not name.endswith(SUFFIXES):
                    raise DataError(f"{entry.path}: a bundle can't hold this kind of file: remove it")
                else:
                    names.append(name)
    return sorted(names)


def _read_manifest(path: Path) -> dict[str, str]:
    manifest = path / MANIFEST
    if manifest.is_symlink() or not manifest.is_file():
        raise DataError(f"{manifest}: missing, so the bundle can't be checked: restore it, or export again")
    listed: dict[str, str] = {}
    for number, line in enumerate(manifest.read_bytes().decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{manifest}: line {number} isn't `<sha256>  <name>`: restore the bundle")
        digest, name = match.groups()
        if name.startswith("/") or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise DataError(f"{manifest}: line {number}: {name!r} leaves the bundle's folder: don't use this bundle")
        if name in listed or name == MANIFEST:
            raise DataError(f"{manifest}: line {number}: {name!r} can't be listed here: restore the bundle")
        listed[name] = digest
    return listed


def _json(data: bytes, where: Path) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}): restore the bundle") from None


def _is_spec(value: Any) -> bool:
    try:
        spec = PreprocessSpec.from_dict(value)
        return (
            32 <= spec.size <= 1024
            and spec.filter in ("bilinear", "bicubic", "lanczos")
            and len(spec.mean) == len(spec.std) == 3
            and all(map(math.isfinite, spec.mean))
            and all(math.isfinite(s) and s > 0 for s in spec.std)
        )
    except (TypeError, KeyError, ValueError):
        return False


def _is_calibration(value: Any) -> bool:
    if not (isinstance(value, dict) and _finite(value.get("a")) and _finite(value.get("b")) and value["a"] > 0):
        return False
    return value.get("covariance") is None or _is_covariance(value["covariance"])


def _is_covariance(value: Any) -> bool:
    rows = isinstance(value, list) and len(value) == 2 and all(isinstance(row, list) and len(row) == 2 for row in value)
    if not (rows and all(_finite(one) for row in value for one in row)):
        return False
    (aa, ab), (ba, bb) = value
    return bool(aa >= 0 and bb >= 0 and ab == ba and ab * ab <= aa * bb * (1 + 1e-9))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""Check a data set before anything is trained on it.

    for finding in audit(Path("data")):
        print(finding.severity, finding.code, finding.where, finding.examples, finding.remedy)

Metadata is judged by `tablecheck`, images by `imagecheck`; here the parts are put side by side:
metadata against images, train against test, folds against patients. Nothing is changed on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from lesionflow.data import imagecheck
from lesionflow.data.findings import Finding, error, render, to_json, warning
from lesionflow.data.source import difference, find_parts, open_images
from lesionflow.data.table import FileError, read_cells
from lesionflow.data.tablecheck import check_table
from lesionflow.errors import DataError, UsageError

__all__ = ["Finding", "audit", "render", "to_json"]

PARTS = ("train", "test")


@dataclass(frozen=True)
class _Part:
    """What could be read of one part; None where there is nothing, or nothing readable."""

    name: str
    cells: pl.DataFrame | None = None
    images: Path | None = None
    image_ids: Sequence[str] = ()
    scan: imagecheck.Scan | None = None

    @property
    def has_ids(self) -> bool:
        return self.cells is not None and "isic_id" in self.cells.columns

    def column(self, name: str) -> dict[str, str | None]:
        """isic_id -> text cell of a column; empty if there is no such column."""
        if not self.has_ids or self.cells is None or name not in self.cells.columns:
            return {}
        return dict(zip(self.cells["isic_id"], self.cells[name], strict=True))


def audit(
    directory: Path,
    *,
    images: bool = True,
    progress: bool = False,
    folds: Path | None = None,
    workers: int | None = None,
) -> list[Finding]:
    """Every finding of a data set directory (or of bare images), errors first.

    `images=False` looks at the metadata alone, `folds` is a table of `isic_id, fold` (Parquet or
    CSV) to be checked against the patients, `workers` the number of processes that decode images
    (one for small sets, else one per core). Raises `UsageError` if there is no such path.
    """
    directory = Path(directory)
    if not directory.exists():
        raise UsageError(f"{directory}: no such file or directory: check the path")
    findings: list[Finding] = []
    parts = []
    for name in PARTS:
        part, found = _read_part(directory, name, images, progress, workers)
        if part.cells is None and part.images is None and not found:
            continue
        parts.append(part)
        findings += found
        findings += _ids_against_images(part)
        fold_of: dict[str, int] = {}
        if folds is not None and name == "train":
            fold_of, found = _check_folds(folds, part)
            findings += found
        if part.scan is not None and part.images is not None:
            findings += imagecheck.fault_findings(part.scan, part.images.name)
            findings += imagecheck.duplicate_findings(
                imagecheck.same_bytes(part.scan),
                imagecheck.near_duplicates(part.scan, part.images, progress=progress),
                part.images.name,
                patients=part.column("patient_id"),
                targets=part.column("target"),
                folds=fold_of,
            )
    if len(parts) == len(PARTS):
        findings += _train_against_test(*parts)
    if not parts:
        looked = "train-metadata.csv, train-image.hdf5, train-image/ and the same for test"
        return [error("no_data", str(directory), [directory], f"no data set here: none of {looked}", "check the path")]
    return sorted(findings, key=lambda finding: finding.severity)


def _read_part(
    directory: Path, name: str, images: bool, progress: bool, workers: int | None
) -> tuple[_Part, list[Finding]]:
    findings: list[Finding] = []
    image_path, table_path = find_parts(directory, name)
    if image_path == directory and name != "train":
        return _Part(name), []  # Bare images are looked at once.
    cells = None
    if table_path is not None:
        try:
            cells = read_cells(table_path)
            findings += check_table(cells, table_path.name, name)
        except FileError as fault:
            findings.append(_unreadable(fault))
    if image_path is None:
        if images and table_path is not None:
            findings.append(
                warning(
                    "no_images", table_path.name, [f"{name}-image.hdf5"], "no images beside the metadata",
                    f"add {name}-image.hdf5 or {name}-image/; the tabular stage alone can do without",
                )
            )  # fmt: skip
        return _Part(name, cells), findings
    try:
        source = open_images(image_path)
        ids = source.ids()
        source.close()
    except FileError as fault:
        return _Part(name, cells), [*findings, _unreadable(fault)]
    except DataError as fault:
        return _Part(name, cells), [
            *findings,
            error("two_files", image_path.name, [image_path], str(fault), "keep one"),
        ]
    if table_path is None and image_path != directory:
        findings.append(
            warning(
                "no_metadata", image_path.name, [f"{name}-metadata.csv"], "no metadata beside the images",
                f"add {name}-metadata.csv; training needs isic_id and target",
            )
        )  # fmt: skip
    part = _Part(name, cells, image_path, ids)
    if not images:
        return part, findings
    wanted = set(part.column("isic_id")) if part.has_ids else set(ids)
    scan = imagecheck.scan(image_path, [i for i in ids if i in wanted], workers=workers, progress=progress)
    return _Part(name, cells, image_path, ids, scan), findings


def _unreadable(fault: FileError) -> Finding:
    return error(fault.code, fault.path.name, [fault.path.name], fault.problem, fault.remedy)


def _ids_against_images(part: _Part) -> Iterator[Finding]:
    if not part.has_ids or part.cells is None or part.images is None:
        return
    ids = part.cells["isic_id"].drop_nulls().unique(maintain_order=True).to_list()
    if missing := difference(ids, part.image_ids):
        yield error(
            "missing_image", part.images.name, missing, "rows of the metadata without an image",
            "restore the images, remove the rows, or leave them out with --skip-corrupt",
        )  # fmt: skip
    if extra := difference(part.image_ids, ids):
        yield warning(
            "extra_image", part.images.name, extra, "images without a row in the metadata, left unused",
            "add the rows, or remove the images",
        )  # fmt: skip


def _check_folds(path: Path, part: _Part) -> tuple[dict[str, int], list[Finding]]:
    """isic_id -> fold, and what is wrong with the split."""
    where = path.name
    try:
        table = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
        table = table.select(pl.col("isic_id").cast(pl.String), pl.col("fold").cast(pl.Int64))
    except (pl.exceptions.PolarsError, OSError) as wrong:
        reason = (str(wrong).splitlines() or [type(wrong).__name__])[0]
        remedy = "split again with `lesionflow data split`"
        return {}, [error("unreadable_folds", where, [where], f"no table of isic_id and fold ({reason})", remedy)]
    fold_of = dict(table.iter_rows())
    findings = []
    if part.has_ids:
        known = list(part.column("isic_id"))
        for ids, code, message in (
            (difference(known, list(fold_of)), "no_fold", "lesions without a fold"),
            (difference(list(fold_of), known), "unknown_in_folds", "ids in the folds that the metadata doesn't have"),
        ):
            if ids:
                findings.append(error(code, where, ids, message, "split this data set again"))
    patients = pl.DataFrame(
        [(p, fold_of[i]) for i, p in part.column("patient_id").items() if p is not None and i in fold_of],
        schema={"patient": pl.String, "fold": pl.Int64},
        orient="row",
    )
    split = patients.group_by("patient").agg(pl.col("fold").n_unique()).filter(pl.col("fold") > 1)
    if split.height:
        findings.append(
            error(
                "patient_in_two_folds", where, split["patient"].sort(), "patients with lesions in more than one fold",
                "split again, grouped by patient: scores would be too good",
            )
        )  # fmt: skip
    return fold_of, findings


def _train_against_test(train: _Part, test: _Part) -> Iterator[Finding]:
    for column, make, remedy in (
        ("isic_id", error, "remove them from one of the two: scores on them would be too good"),
        ("patient_id", warning, "score new patients only, or say so: their other lesions were trained on"),
    ):
        shared = {v for v in train.column(column).values() if v} & {v for v in test.column(column).values() if v}
        if shared:
            code = f"same_{column.removesuffix('_id').replace('isic', 'id')}_train_test"
            yield make(code, f"train, test: {column}", sorted(shared), f"{column}s in both parts", remedy)
    if train.scan is None or test.scan is None or not train.scan.ids or not test.scan.ids:
        return
    seen = {digest.tobytes() for digest in train.scan.digests}
    same_id = set(train.scan.ids)
    pairs = zip(test.scan.ids, test.scan.digests, strict=True)
    hits = [isic_id for isic_id, digest in pairs if isic_id not in same_id and digest.tobytes() in seen]
    if hits:
        remedy = "remove them from one of the two: scores on them would be too good"
        yield error(
            "same_bytes_train_test", "test images", hits, "test images that are in train, byte for byte", remedy
        )

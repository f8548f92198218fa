"""What a run shows to people: the report and the card, and how it compares with an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesionflow import keys
from lesionflow.errors import DataError, UsageError
from lesionflow.pack import licences
from lesionflow.plan import data_of, recipe_of


def report(run: Path, gate_result: dict[str, Any]) -> None:
    """Write `report.html` and `MODEL_CARD.md`."""
    import polars as pl

    from lesionflow.evaluation.report import write_card, write_report

    recipe, (store, folds) = recipe_of(run), data_of(run)
    curves = (run / "metrics.csv").read_text()
    context = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data": store.info,
        "synthetic": store.info["synthetic"],
        "data_licence": licences(store),
        "versions": keys.read_json(run / "run.json")["versions"],
        "gate": gate_result,
        "curves": pl.read_csv(run / "metrics.csv", infer_schema_length=None).to_dicts() if curves else [],
    }
    metrics = keys.read_json(run / "metrics.json")
    write_report(run / "report.html", metrics, pl.read_parquet(run / "oof.parquet"), context)
    write_card(run / "MODEL_CARD.md", metrics, context)


def paired(run: Path, incumbent: Path) -> dict[str, Any]:
    """The paired difference to the run that the incumbent bundle came from, on the lesions both scored."""
    import polars as pl

    from lesionflow.evaluation.metrics import fold_rank
    from lesionflow.evaluation.paired import paired_difference

    other = incumbent.parent / "oof.parquet"
    if not other.exists():
        raise UsageError(f"--incumbent {incumbent}: no oof.parquet beside the bundle to compare with; give RUN/bundle")
    both = pl.read_parquet(run / "oof.parquet").join(pl.read_parquet(other), on="isic_id", suffix="_b")
    if len(both) == 0:
        raise DataError(f"{other}: shares no lesion with this run, so there is nothing to compare")
    if set(both["fold_hash"]) != set(both["fold_hash_b"]):
        raise DataError(f"{other}: another split than this run's; a paired comparison needs the same folds")
    fold, options = both["fold"].to_numpy(), recipe_of(run).evaluation
    ours, theirs = (fold_rank(both[column].to_numpy(), fold) for column in ("logit", "logit_b"))
    return paired_difference(
        both["target"].to_numpy(), ours, theirs, both["patient_group"].to_list(),
        replicates=options.replicates, seed=options.seed,
    )  # fmt: skip

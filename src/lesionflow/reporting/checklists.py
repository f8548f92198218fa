"""Two reporting guidelines, item by item: where the run answers it, or "not done".

CLAIM 2024 (Checklist for Artificial Intelligence in Medical Imaging, doi:10.1148/ryai.240300) has 44 items,
TRIPOD+AI (prediction models, doi:10.1136/bmj-2023-078378) 27 with 52 sub-items. Topics are named in our words;
the guidelines' own texts say what each asks for.

An answer is a list of pointers: `metrics:` a field of metrics.json, `recipe:` a field of the recipe, `card:` a
section of the card, `report:` a section of the report, `file:` what the run writes beside it. A pointer to a field
that this run doesn't have is left out, and an item with none left is not done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_DONE = "not done"


@dataclass(frozen=True)
class Item:
    """One item of a guideline."""

    number: str
    topic: str
    pointers: tuple[str, ...] = ()
    note: str = ""
    """Said where the pointers need a word, or why there are none."""
    more: tuple[str, ...] = ()
    """Further pointers of a run that uses metadata."""
    more_note: str = ""
    """What such a run says instead of `note`."""


def answer(item: Item, metrics: Mapping[str, Any]) -> str:
    """Where this run answers `item`, as Markdown, or `not done` and, if known, why."""
    joined = bool(metrics.get("modes"))
    pointers = item.pointers + item.more if joined else item.pointers
    present = [text for pointer in pointers if (text := _resolve(pointer, metrics))]
    where = ", ".join(present) if present else NOT_DONE
    note = item.more_note if joined and item.more_note else item.note
    return f"{where}: {note}" if note else where


def rows(items: tuple[Item, ...], metrics: Mapping[str, Any]) -> str:
    """The guideline as a Markdown table."""
    lines = [f"| {one.number} | {one.topic} | {answer(one, metrics)} |" for one in items]
    return "\n".join(["| item | topic | where |", "|---|---|---|", *lines])


def find(path: str, tree: Mapping[str, Any]) -> Any:
    """What lies at a dotted path of nested dicts, or None."""
    at: Any = tree
    for part in path.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return None
        at = at[part]
    return at


def _resolve(pointer: str, metrics: Mapping[str, Any]) -> str | None:
    kind, path = pointer.split(":", 1)
    if kind == "metrics":
        return None if find(path, metrics) in (None, [], {}) else f"metrics.json `{path}`"
    if kind == "recipe":
        return f"recipe `{path}`"
    if kind == "card":
        return f"card, {path}"
    return f"report, {path}" if kind == "report" else path


_PUBLISHER = "as the data's publisher gives it; see there"
_FIGURES = ("metrics:pauc", "metrics:auc", "metrics:average_precision", "metrics:served.pauc")
_TREES = ("recipe:tabular", "recipe:stack")
_TOLD = "report:What the metadata tells"
_EMPTY = "cells `unknown`; empty cells of metadata are not filled in, trees learn which way they go"
_TRAINING = ("recipe:training", "recipe:optimizer", "recipe:augment", "recipe:sampling")

CLAIM = (
    Item("1", "Title names the kind of AI", ("card:The model",)),
    Item("2", "Summary of design, methods, results", ("report:Summary",)),
    Item("3", "Background and intended role", ("card:Intended use",)),
    Item("4", "Aims and hypotheses", ("recipe:description", "recipe:gate")),
    Item("5", "Prospective or retrospective", ("card:Data",)),
    Item("6", "Goal of the study", ("card:Intended use",)),
    Item("7", "Sources of data", ("card:Data",)),
    Item("8", "What was included and excluded", ("card:Data", "recipe:image.skip_corrupt"), "besides the publisher's"),
    Item("9", "Preprocessing", ("recipe:image",), "", ("recipe:tabular",)),
    Item("10", "Choice of subsets", ("recipe:sampling",)),
    Item("11", "De-identification", (), "the publisher's work, before this"),
    Item("12", "Missing data", ("metrics:groups.lesions_without_patient", "metrics:subgroups"), "cells `unknown`",
         ("recipe:tabular.missing", _TOLD), _EMPTY),
    Item("13", "How images were acquired", (), _PUBLISHER),
    Item("14", "Reference standard, how obtained", (), f"the column `target`, {_PUBLISHER}"),
    Item("15", "Reference standard, why this one", (), _PUBLISHER),
    Item("16", "Who annotated", (), _PUBLISHER),
    Item("17", "Annotation of the test set", (), "the same labels as in training"),
    Item("18", "Agreement between annotators", (), _PUBLISHER),
    Item("19", "Assignment to partitions", ("metrics:split.kind", "metrics:split.holdout", "recipe:folds")),
    Item("20", "Level of disjoint partitions", ("metrics:groups.kind", "metrics:leaks.patients_in_two_folds")),
    Item("21", "Intended sample size", (), "all lesions of the data; intervals say what they suffice for"),
    Item("22", "The model in detail", ("card:The model", "recipe:model"), "", (*_TREES, _TOLD)),
    Item("23", "Software", ("card:How it was made",)),
    Item("24", "Initial parameters", ("recipe:model.weights", "recipe:seed")),
    Item("25", "Training in detail", _TRAINING, "", _TREES),
    Item("26", "How the final model is picked", ("recipe:training.epochs", "recipe:training.ema"), "a fixed schedule",
         ("recipe:tabular.rounds", _TOLD), "fixed schedules; the way of joining is picked in the other folds"),
    Item("27", "Ensembling", ("recipe:model.per_fold", "recipe:folds.count", "card:The model"), "",
         ("recipe:stack", "metrics:modes.adds")),
    Item("28", "Measures of performance", ("metrics:headline", "report:How to read this")),
    Item("29", "Uncertainty and significance", ("metrics:settings", "metrics:pauc.rank_pooled.interval")),
    Item("30", "Robustness", ("metrics:pauc.folds", "metrics:subgroups")),
    Item("31", "Explanations", ("file:explain.json", "report:Explanations"), "where the network gives maps", (_TOLD,),
         "maps where the network gives them; importances, and reasons per lesion in words"),
    Item("32", "Evaluation on internal data", ("metrics:pauc.rank_pooled", "metrics:served.pauc")),
    Item("33", "Test on external data", ("metrics:split.names",), "other institutions, of the same collection"),
    Item("34", "Registration of a trial"),
    Item("35", "Numbers included and excluded", ("metrics:counts", "metrics:split.holdout", "card:Data")),
    Item("36", "Characteristics by partition", ("metrics:pauc.folds", "metrics:subgroups"), "not crossed"),
    Item("37", "Performance with uncertainty", _FIGURES, "", ("metrics:modes.each",)),
    Item("38", "Diagnostic estimates and precision", ("metrics:operating", "metrics:served.operating",
                                                       "metrics:thresholds.refer", "metrics:served.thresholds")),
    Item("39", "Analysis of failures", ("file:gallery.html",), "local, as it shows patients"),
    Item("40", "Limitations", ("card:Limits",)),
    Item("41", "Implications for practice", ("card:Intended use", "metrics:decision_curve", "metrics:operating")),
    Item("42", "Protocol or further technical detail", ("card:How it was made",), "the recipe; no protocol beforehand"),
    Item("43", "Availability of software, model, data", ("card:How it was made", "card:Data")),
    Item("44", "Funding"),
)  # fmt: skip

TRIPOD = (
    Item("1", "Title: model, population, outcome", ("card:Intended use",)),
    Item("2", "Structured abstract", ("report:Summary",)),
    Item("3a", "Context and reason for the model", ("card:Intended use",)),
    Item("3b", "Target population, place in care, users", ("card:Intended use",)),
    Item("3c", "Known inequalities between groups", (), "figures by group are given; their causes are not reviewed"),
    Item("4", "Objectives", ("recipe:description", "recipe:gate")),
    Item("5a", "Sources of data, and why", ("card:Data",)),
    Item("5b", "Dates of the data", (), _PUBLISHER),
    Item("6a", "Setting and centres", ("metrics:split.names",), _PUBLISHER),
    Item("6b", "Eligibility", ("card:Data",), "beyond the publisher's own"),
    Item("6c", "Treatments", (), "none bear on a picture's label"),
    Item("7", "Data preparation", ("recipe:image", "recipe:sampling")),
    Item("8a", "Outcome, how and when assessed", (), f"the column `target`, {_PUBLISHER}"),
    Item("8b", "Outcome assessors", (), _PUBLISHER),
    Item("8c", "Blinding of outcome assessment", (), _PUBLISHER),
    Item("9a", "Choice of predictors", ("card:The model",), "pixels only", ("recipe:tabular", _TOLD),
         "pixels, the columns that the test file has, and published features made of them"),
    Item("9b", "Definition of predictors", ("recipe:image",), "", ("recipe:tabular", "file:docs/features.md")),
    Item("9c", "Predictor assessors", ("card:The model",), "none: pixels only", (),
         "none: pixels, and columns as the scanner and the record give them"),
    Item("10", "Sample size", ("metrics:counts",), "all lesions of the data; not planned"),
    Item("11", "Missing data", ("metrics:groups.lesions_without_patient", "metrics:subgroups"), "cells `unknown`",
         ("recipe:tabular.missing", _TOLD), _EMPTY),
    Item("12a", "Use of data for training and evaluation", ("metrics:split", "recipe:folds")),
    Item("12b", "Handling of predictors", ("recipe:image", "recipe:augment"), "", ("recipe:tabular",)),
    Item("12c", "Kind of model, building, tuning, internal validation", ("recipe:model", *_TRAINING, "recipe:folds"),
         "", (*_TREES, "metrics:modes.adds")),
    Item("12d", "Clusters, how handled", ("metrics:groups", "metrics:pauc.folds", "metrics:split.kind")),
    Item("12e", "Measures of performance", ("metrics:headline", "report:How to read this")),
    Item("12f", "Model updating", ("metrics:served.calibration",), "recalibrated to the stated prevalence"),
    Item("12g", "How predictions were computed in evaluation", ("card:Figures", "metrics:split.holdout")),
    Item("13", "Class imbalance", ("recipe:sampling", "metrics:settings.prevalence")),
    Item("14", "Fairness", ("metrics:subgroups",), "measured, not adjusted for"),
    Item("15", "Model output and thresholds", ("card:The model", "metrics:thresholds", "metrics:served.thresholds")),
    Item("16", "Differences between training and evaluation data", ("metrics:pauc.folds", "metrics:split.kind")),
    Item("17", "Ethical approval", (), _PUBLISHER),
    Item("18a", "Funding"),
    Item("18b", "Conflicts of interest"),
    Item("18c", "Protocol", (), "the recipe is fixed before training, but not published beforehand"),
    Item("18d", "Registration"),
    Item("18e", "Data sharing", ("card:Data",), "by licence and hash"),
    Item("18f", "Code sharing", ("card:How it was made",)),
    Item("19", "Patient and public involvement"),
    Item("20a", "Flow of participants", ("metrics:counts", "metrics:groups", "metrics:split.holdout")),
    Item("20b", "Characteristics of participants", ("metrics:subgroups", "metrics:groups")),
    Item("20c", "Evaluation data beside training data", ("metrics:pauc.folds",), "sizes and malignant lesions only"),
    Item("21", "Participants and outcomes in each analysis", ("metrics:pauc.folds", "metrics:served.counts")),
    Item("22", "The whole model, for use by others", ("card:How it was made",), "the bundle"),
    Item("23a", "Performance with intervals, by subgroup", (*_FIGURES, "metrics:calibration", "metrics:subgroups"),
         "", ("metrics:modes.each",)),
    Item("23b", "Differences between clusters", ("metrics:pauc.folds", "metrics:split.names")),
    Item("24", "Result of updating", ("metrics:served.calibration", "metrics:calibration")),
    Item("25", "Interpretation, with fairness and earlier work", ("report:Summary",), "earlier work: not reviewed"),
    Item("26", "Limitations", ("card:Limits",)),
    Item("27a", "Poor or unusable input", ("metrics:served.bands",), "a picture unlike the known is `cannot judge`",
         ("metrics:modes.each",), "a picture unlike the known is `cannot judge`; without metadata the picture answers"),
    Item("27b", "What users must do and know", ("card:Intended use",)),
    Item("27c", "Next steps, generalisability", ("card:Limits",)),
)  # fmt: skip

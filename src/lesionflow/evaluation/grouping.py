"""Whom an interval draws: patients, lesions, or both, said in words.

A lesion of an unknown patient is its own group under its own isic_id. An interval over such groups takes
lesions of one patient for independent and is too narrow, so every output that shows one says what was drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Grouping:
    """What the groups of a set of lesions are."""

    kind: str
    """`patient`, `lesion` (no patient known) or `mixed`."""
    clusters: int
    patients: int
    """Known patients."""
    lesions_with_patient: int
    lesions_without_patient: int
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(patients: int, with_patient: int, without_patient: int) -> Grouping:
    """The grouping of `with_patient` lesions of known patients and `without_patient` others."""
    clusters, total = patients + without_patient, with_patient + without_patient
    if not without_patient:
        kind, note = "patient", f"Intervals draw the {patients:,} patients with replacement."
    elif not with_patient:
        kind, note = (
            "lesion",
            (
                "No patient is known, so intervals draw single lesions and are not patient-clustered: "
                "lesions of one patient are alike, and the true uncertainty is larger."
            ),
        )
    else:
        kind, note = (
            "mixed",
            (
                f"The patient is known for {with_patient:,} of {total:,} lesions ({patients:,} patients); every other "
                "lesion is drawn on its own, so intervals are only partly patient-clustered and may be too narrow."
            ),
        )
    return Grouping(kind, clusters, patients, with_patient, without_patient, note)

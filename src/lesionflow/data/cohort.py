"""Who has which lesion in the synthetic set, and how likely each is malignant: the known truth.

A lesion's malignancy is a logistic function of independent parts,

    log-odds = intercept + structure + record + oddness

* **structure** (pixels only): a centre-to-rim change of hue and radial streaks, drawn into the crop
  but measured by no column.
* **record** (columns only): age, sex, site and the body scanner's naevus confidence, none of them
  visible in a crop.
* **oddness** (patient context): how far the lesion's size, darkness, colour and border lie from
  this patient's own signature. A column or a crop shows `look = signature + deviation`; only the
  patient's other lesions tell the two apart.

`bounds` says what can be known of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

GENERATOR_VERSION = 1
"""Raised whenever the same parameters would give another set; the golden test holds it."""

TRAITS = ("size", "darkness", "color", "border")
SIGNATURE_VARIANCE = 0.5

# Log-odds per standard deviation, or per category.
STRUCTURE_WEIGHT = 2.1
TRAIT_WEIGHTS = (1.9, 1.7, 0.9, 0.8)
"""Of the deviations, in the order of `TRAITS`: what is easiest to see counts most."""
NEVUS_WEIGHT = 1.6
AGE_WEIGHT = 0.08
"""Per year over `AGE_MEAN`."""
AGE_MEAN, AGE_SD = 57.0, 13.0
SEX_WEIGHTS = (-0.3, 0.3)
SITE_WEIGHTS = (-0.7, 2.0, 0.4, -0.5, 0.7)
"""In the order of `schema.SITES`."""
SITE_SHARES = (0.21, 0.05, 0.25, 0.31, 0.18)
MALE_SHARE = 0.66
BLANK_AGE, BLANK_SEX, BLANK_SITE = 0.007, 0.029, 0.014
"""Shares of blank cells in the full SLICE-3D set; age and sex are blank for a patient, site for a lesion."""

_INSTITUTION_SHARES = (0.28, 0.22, 0.16, 0.16, 0.09, 0.05, 0.04)
_SIZE_SPREAD = 1.05
"""Of log lesions per patient: median 241 and maximum 9,184 at a mean of 385 in the full set."""


@dataclass(frozen=True)
class Cohort:
    """Every patient and lesion, without pixels; lesions in the order of their ids, both parts mixed."""

    seed: int
    age: Floats
    """[patients], multiples of 5, before blanking."""
    male: Flags
    age_blank: Flags
    sex_blank: Flags
    institution: Ints
    """[patients], index into `appearance.INSTITUTIONS`."""
    white_tile: Flags
    """[patients], "3D: white" instead of "3D: XP"."""
    skin: Floats
    """[patients, 3], standard normal offsets of the skin's L, a, b."""
    hairiness: Floats
    """[patients], 0..1."""
    patient_number: Ints
    """[patients], the digits of the patient's id."""
    patient: Ints
    """[lesions], index into the patients."""
    number: Ints
    """[lesions], the digits of isic_id, ascending."""
    test: Flags
    """[lesions], whether the lesion is in the test part."""
    look: Floats
    """[lesions, traits], signature + deviation."""
    deviation: Floats
    """[lesions, traits], from the patient's signature; unknown to any model."""
    structure: Floats
    """[lesions], strength of the pixel-only structure."""
    nevus: Floats
    """[lesions], behind the naevus confidence."""
    site: Ints
    """[lesions], index into `schema.SITES`, before blanking."""
    site_blank: Flags
    intercept: float
    probability: Floats
    """[lesions], the true probability of malignancy."""
    target: Ints
    """[lesions], 0 or 1, drawn with `probability`."""


def stream(seed: int, *key: int) -> np.random.Generator:
    """An independent generator for every key, the same whatever is drawn elsewhere."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(GENERATOR_VERSION, *key))))


def draw_cohort(*, patients: int, lesions: int, seed: int, prevalence: float) -> Cohort:
    """Draw patients, lesions and labels: `lesions` training rows and about 5 % more for the test part.

    The training part has exactly max(1, round(prevalence x lesions)) malignant lesions (none at
    prevalence 0), and each lesion's chance to be one of them is exactly its `probability`.
    """
    test_lesions = max(4, round(lesions / 20))
    test_patients = min(max(2, round(patients / 20)), test_lesions)
    rng = stream(seed, 0)
    count, rows = patients + test_patients, lesions + test_lesions
    institution = rng.choice(len(_INSTITUTION_SHARES), count, p=_INSTITUTION_SHARES)
    # All scanners but most of the first institution's use cross-polarised light.
    white_tile = rng.random(count) < np.where(institution == 0, 0.92, 0.02)
    age = np.clip(5.0 * np.round(rng.normal(AGE_MEAN, AGE_SD, count) / 5), 15, 85)
    sizes = np.concatenate([
        _lesions_per_patient(rng, patients, lesions),
        _lesions_per_patient(rng, test_patients, test_lesions),
    ])  # fmt: skip
    patient = rng.permutation(np.repeat(np.arange(count), sizes))
    signature = rng.normal(0, np.sqrt(SIGNATURE_VARIANCE), (count, len(TRAITS)))
    deviation = rng.standard_normal((rows, len(TRAITS)))
    drawn = Cohort(
        seed=seed,
        age=age,
        male=rng.random(count) < MALE_SHARE,
        age_blank=rng.random(count) < BLANK_AGE,
        sex_blank=rng.random(count) < BLANK_SEX,
        institution=institution,
        white_tile=white_tile,
        skin=rng.standard_normal((count, 3)),
        hairiness=rng.random(count),
        patient_number=rng.permutation(_numbers(rng, count)),
        patient=patient,
        number=_numbers(rng, rows),
        test=patient >= patients,
        look=signature[patient] + deviation,
        deviation=deviation,
        structure=rng.standard_normal(rows),
        nevus=rng.standard_normal(rows),
        site=rng.choice(len(SITE_SHARES), rows, p=SITE_SHARES),
        site_blank=rng.random(rows) < BLANK_SITE,
        intercept=0.0,
        probability=np.zeros(rows),
        target=np.zeros(rows, np.int64),
    )
    if prevalence == 0:
        return drawn
    malignant = max(1, round(prevalence * lesions))
    log_odds = true_log_odds(drawn)
    train = ~drawn.test
    intercept = _solve_intercept(log_odds[train], malignant / lesions)
    probability = sigmoid(log_odds + intercept)
    target = np.zeros(rows, np.int64)
    target[train] = _draw_labels(rng, probability[train], malignant)
    expected = probability[~train]
    target[~train] = _draw_labels(rng, expected, max(1, round(float(expected.sum()))))
    values = {**drawn.__dict__, "intercept": intercept, "probability": probability, "target": target}
    return Cohort(**values)


def true_log_odds(cohort: Cohort) -> Floats:
    """[lesions], without the intercept."""
    log_odds: Floats = (
        STRUCTURE_WEIGHT * cohort.structure
        + NEVUS_WEIGHT * cohort.nevus
        + AGE_WEIGHT * (cohort.age[cohort.patient] - AGE_MEAN)
        + np.asarray(SEX_WEIGHTS)[cohort.male[cohort.patient].astype(int)]
        + np.asarray(SITE_WEIGHTS)[cohort.site]
        + cohort.deviation @ np.asarray(TRAIT_WEIGHTS)
    )
    return log_odds


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _solve_intercept(log_odds: Floats, prevalence: float) -> float:
    low, high = -60.0, 60.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(log_odds + middle).mean() < prevalence else (low, middle)
    return (low + high) / 2


def _draw_labels(rng: np.random.Generator, probability: Floats, malignant: int) -> Ints:
    """Exactly `malignant` ones; systematic sampling in random order, so each row's chance stays its probability."""
    order = rng.permutation(len(probability))
    ends = np.cumsum(probability[order]) * (malignant / probability.sum())
    ticks = np.searchsorted(ends, rng.random() * (1 - 1e-9) + np.arange(malignant), side="right")
    labels = np.zeros(len(probability), np.int64)
    labels[order[np.minimum(ticks, len(order) - 1)]] = 1
    return labels


def _lesions_per_patient(rng: np.random.Generator, patients: int, lesions: int) -> Ints:
    """Heavy-tailed counts, at least 1 each, that add up to `lesions`."""
    weight = np.exp(rng.normal(0, _SIZE_SPREAD, patients))
    if patients > 3:
        # Nobody has more than 40 % of a small set, which could not be split.
        for _ in range(60):  # Each cut lowers the sum, hence the bound; it settles geometrically.
            weight = np.minimum(weight, 0.4 * weight.sum())
    exact = weight / weight.sum() * (lesions - patients)
    counts = np.floor(exact).astype(np.int64)
    short = lesions - patients - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return np.asarray(counts + 1)


def _numbers(rng: np.random.Generator, count: int) -> Ints:
    """Distinct ascending numbers of at most seven digits."""
    numbers: Ints = np.cumsum(rng.integers(1, max(1, 9_900_000 // count), count, endpoint=True))
    return numbers

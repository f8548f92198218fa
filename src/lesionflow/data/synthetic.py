"""A synthetic mini SLICE-3D: the competition's layout, with the true answers beside it.

    lesionflow data synth --out DIR --patients 40 --lesions 2000 --seed 0 --prevalence 0.05

Every lesion's malignancy probability is known: logit P = intercept + w_F F + w_M M + w_C C, with

- F, a fine sign that only the pixels hold (`drawing`: the veil);
- M, what plain metadata says: age, sex and body site;
- C, how odd the lesion is *for its patient*, in size and in darkness.

Each is standard normal, or nearly so, and independent of the others. Size and darkness themselves
stand in the columns and in the pixels, but a trait is T = sqrt(1 - r) U + sqrt(r) D: the patient's
own normal look U plus the oddity D that carries the signal. A single lesion reveals D only dimly
(E[D | T] = sqrt(r) T); the patient's other lesions tell U, and with it D.

`truth.json` holds the probabilities and the best pAUC that four kinds of information can reach: the
expected pAUC of the ranking by P(malignant | information), which no model can beat on average. All
hidden parts are normal given what is seen, so that probability is an integral over one normal variable.

Everything is drawn from generators keyed by seed and patient: the result doesn't depend on the number
of workers. `GENERATOR_VERSION` changes whenever a byte of the result would.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data import schema
from lesionflow.data.drawing import HARMONICS, Floats, Lesion, encode, outline, render
from lesionflow.errors import UsageError
from lesionflow.keys import write_json, write_text
from lesionflow.progress import track

GENERATOR_VERSION = 1

ODDITY = 0.3
"""r: share of a trait's variance that is oddity, not the patient's own look."""
W_FINE, W_META, W_ODD = 1.75, 1.6, 1.7
"""Weights of the three parts in the logit."""
POOL = 256
"""Distinct crops that `repeat_bytes` draws from."""

_INSTITUTIONS = (
    ("Memorial Sloan Kettering Cancer Center", "CC-BY", 0.34),
    ("Department of Dermatology, Hospital Clínic de Barcelona", "CC-BY-NC", 0.25),
    ("University Hospital of Basel", "CC-BY-NC", 0.15),
    ("Frazer Institute, The University of Queensland, Dermatology Research Centre", "CC-BY", 0.14),
    ("ACEMID MIA", "CC-0", 0.07),
    ("ViDIR Group, Department of Dermatology, Medical University of Vienna", "CC-BY-NC", 0.03),
    ("Department of Dermatology, University of Athens", "CC-BY", 0.02),
)
# Body site, location, its simple form, share, effect on M, and the box of x, y, z it lies in (mm).
_SITES = (
    ("posterior torso", "Torso Back Top Third", "Torso Back", 0.18, 0.3, (0, 1400, -60)),
    ("posterior torso", "Torso Back Middle Third", "Torso Back", 0.12, 0.2, (0, 1200, -60)),
    ("posterior torso", "Torso Back Bottom Third", "Torso Back", 0.04, -0.1, (0, 1020, -60)),
    ("anterior torso", "Torso Front Top Half", "Torso Front", 0.14, 0.1, (0, 1330, 110)),
    ("anterior torso", "Torso Front Bottom Half", "Torso Front", 0.07, -0.2, (0, 1050, 110)),
    ("upper extremity", "Left Arm - Upper", "Left Arm", 0.06, -0.3, (280, 1300, 30)),
    ("upper extremity", "Right Arm - Upper", "Right Arm", 0.06, -0.3, (-280, 1300, 30)),
    ("upper extremity", "Left Arm - Lower", "Left Arm", 0.04, -0.4, (400, 1150, 50)),
    ("upper extremity", "Right Arm - Lower", "Right Arm", 0.04, -0.4, (-400, 1150, 50)),
    ("lower extremity", "Left Leg - Upper", "Left Leg", 0.06, -0.6, (130, 700, 40)),
    ("lower extremity", "Right Leg - Upper", "Right Leg", 0.06, -0.6, (-130, 700, 40)),
    ("lower extremity", "Left Leg - Lower", "Left Leg", 0.05, -0.3, (120, 330, 20)),
    ("lower extremity", "Right Leg - Lower", "Right Leg", 0.05, -0.3, (-120, 330, 20)),
    ("head/neck", "Head & Neck", "Head & Neck", 0.03, 2.2, (0, 1600, 40)),
)
_SITE_SHARE = np.array([s[3] for s in _SITES]) / sum(s[3] for s in _SITES)
_SITE_EFFECT = np.array([s[4] for s in _SITES])
_SITE_MEAN = float(_SITE_SHARE @ _SITE_EFFECT)
_SITE_SD = float(np.sqrt(_SITE_SHARE @ (_SITE_EFFECT - _SITE_MEAN) ** 2))
# M = 0.75 age + 0.55 site + the rest sex, each standardised.
_M_AGE, _M_SITE = 0.75, 0.55
_M_SEX = float(np.sqrt(1 - _M_AGE**2 - _M_SITE**2))
_AGE_MEAN, _AGE_SD, _MALE = 58.0, 13.0, 0.66
_DIAGNOSES = (
    ("Malignant melanocytic proliferations (Melanoma)", "Melanoma in situ"),
    ("Malignant adnexal epithelial proliferations - Follicular", "Basal cell carcinoma"),
    ("Malignant epidermal proliferations", "Squamous cell carcinoma in situ"),
)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Patient:
    """One patient's lesions before anything is drawn; N lesions."""

    number: int
    ids: list[str]
    known: dict[str, Any]
    """Columns that are one value for the patient."""
    site: NDArray[np.int64]
    """Index into the table of sites, [N]."""
    fine: Floats
    meta: Floats
    odd: Floats
    seen: dict[str, Floats]
    """Posterior mean and variance of the logit's three parts given each kind of information, [N] each."""
    traits: Floats
    """Size and darkness, standard normal over the population, [N, 2]."""
    missing_site: NDArray[np.bool_]


def synthesize(
    out: Path,
    *,
    patients: int = 40,
    lesions: int = 2000,
    seed: int = 0,
    prevalence: float = 0.05,
    repeat_bytes: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the data set to `out` and return truth.json's content without the per-lesion probabilities.

    `lesions` train rows of `patients` patients, and about a twentieth as many of other patients as the
    test part. `prevalence` is the expected share of malignant lesions (0..0.5). An `out` that holds the
    same set already is kept. Raises `UsageError` naming the argument and its bound.
    """
    _check(patients, lesions, seed, prevalence)
    asked = {
        "generator": GENERATOR_VERSION,
        "patients": patients,
        "lesions": lesions,
        "seed": seed,
        "prevalence": prevalence,
        "repeat_bytes": repeat_bytes,
    }
    if out.exists() and any(out.iterdir()):
        truth = _truth_of(out)
        if truth is not None and truth["parameters"] == asked:
            return {k: v for k, v in truth.items() if k != "probability"}
        raise UsageError(f"--out {out}: not empty, and not this synthetic set; choose another folder or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        work.chmod(0o755)
        truth = _write(work, asked, workers, progress)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {k: v for k, v in truth.items() if k != "probability"}


def _check(patients: int, lesions: int, seed: int, prevalence: float) -> None:
    if not 2 <= patients <= 1_000_000:
        raise UsageError(f"patients must be between 2 and 1000000, got {patients}")
    if not patients <= lesions <= 9_000_000:
        raise UsageError(f"lesions must be between patients ({patients}) and 9000000, got {lesions}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")
    if not 0 <= prevalence <= 0.5:
        raise UsageError(f"prevalence must be between 0 and 0.5, got {prevalence}")


def _truth_of(out: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((out / "truth.json").read_text()))
    except (OSError, json.JSONDecodeError):
        return None


def _write(work: Path, asked: dict[str, Any], workers: int | None, progress: bool) -> dict[str, Any]:
    seed, prevalence = asked["seed"], asked["prevalence"]
    train = _cohort(asked["patients"], asked["lesions"], seed, first_patient=0, first_lesion=0)
    count = max(3, asked["lesions"] // 20)
    test_patients = min(count, max(2, asked["patients"] // 20))
    test = _cohort(test_patients, count, seed, first_patient=asked["patients"], first_lesion=asked["lesions"])

    score = np.concatenate([W_FINE * p.fine + W_META * p.meta + W_ODD * p.odd for p in train])
    intercept = _intercept(score, prevalence)
    probability = _sigmoid(intercept + score)
    targets = _labels(probability, seed)
    ids = [i for p in train for i in p.ids]
    _write_metadata(work / "train-metadata.csv", train, targets, seed)
    _write_metadata(work / "test-metadata.csv", test, None, seed)
    write_text(work / "sample_submission.csv", "isic_id,target\n" + "".join(f"{i},0.3\n" for p in test for i in p.ids))
    for part, cohort in (("train", train), ("test", test)):
        _write_images(work / f"{part}-image.hdf5", part, cohort, asked, workers, progress)
    truth = {
        "about": "Synthetic data made by lesionflow: no lesion or patient here is real.",
        "parameters": asked,
        "malignant": int(targets.sum()),
        "intercept": intercept,
        "weights": {"fine": W_FINE, "metadata": W_META, "oddity": W_ODD, "share_of_oddity": ODDITY},
        "best_pauc": _best(train, intercept, probability) if prevalence else None,
        "probability": {i: float(f"{p:.6g}") for i, p in zip(ids, probability.tolist(), strict=True)},
    }
    write_json(work / "truth.json", truth)
    return truth


def _cohort(patients: int, lesions: int, seed: int, *, first_patient: int, first_lesion: int) -> list[Patient]:
    """Patients with a heavy-tailed number of lesions (median 241, largest 9,184 of 401,059 in the real set)."""
    rng = np.random.default_rng([GENERATOR_VERSION, seed, first_patient, 1])
    share = np.exp(1.05 * rng.standard_normal(patients))
    if patients > 3:
        share = np.minimum(share, 0.4 * share.sum())  # Nobody has most of the lesions.
    wanted = 1 + (lesions - patients) * share / share.sum()
    counts = np.floor(wanted).astype(np.int64)
    counts[np.argsort(counts - wanted)[: lesions - int(counts.sum())]] += 1
    starts = first_lesion + np.concatenate([[0], np.cumsum(counts)[:-1]])
    return [_patient(first_patient + n, int(counts[n]), int(starts[n]), seed) for n in range(patients)]


def _patient(number: int, count: int, start: int, seed: int) -> Patient:
    rng = _rng(seed, number, 1)
    age = float(np.clip(5 * np.round(rng.normal(_AGE_MEAN, _AGE_SD) / 5), 15, 85))
    male = bool(rng.random() < _MALE)
    institution = int(rng.choice(len(_INSTITUTIONS), p=_shares()))
    age_known, sex_known = bool(rng.random() > 0.008), bool(rng.random() > 0.026)
    look = rng.standard_normal(2)
    site = rng.choice(len(_SITES), count, p=_SITE_SHARE)
    odd = rng.standard_normal((count, 2))
    fine = rng.standard_normal(count)
    missing_site = rng.random(count) < 0.015
    traits = np.sqrt(1 - ODDITY) * look + np.sqrt(ODDITY) * odd
    parts = {
        "age": (np.full(count, (age - _AGE_MEAN) / _AGE_SD * _M_AGE), _M_AGE, np.full(count, age_known)),
        "sex": (
            np.full(count, (male - _MALE) / np.sqrt(_MALE * (1 - _MALE)) * _M_SEX),
            _M_SEX,
            np.full(count, sex_known),
        ),
        "site": ((_SITE_EFFECT[site] - _SITE_MEAN) / _SITE_SD * _M_SITE, _M_SITE, ~missing_site),
    }
    # What a reader of the columns knows of M: a missing cell leaves its part at the mean, with its variance.
    known_meta = sum((value * seen for value, _, seen in parts.values()), np.zeros(count))
    left_meta = sum((weight**2 * ~seen for _, weight, seen in parts.values()), np.zeros(count))
    # D given all the patient's lesions: the patient's look U has a normal posterior given the traits' mean.
    noise = ODDITY / count
    shrink = (1 - ODDITY) / (1 - ODDITY + noise)
    look_mean = shrink * traits.mean(0) / np.sqrt(1 - ODDITY)
    look_left = 1 - shrink
    odd_mean = (traits - np.sqrt(1 - ODDITY) * look_mean) / np.sqrt(ODDITY)
    odd_left = (1 - ODDITY) * look_left / ODDITY
    two = np.sqrt(2)
    seen = {
        "alone": np.sqrt(ODDITY) * traits.sum(1) / two,
        "alone_left": np.full(count, 1 - ODDITY),
        "context": odd_mean.sum(1) / two,
        "context_left": np.full(count, odd_left),
        "meta": known_meta,
        "meta_left": left_meta,
    }
    known = {
        "patient_id": f"IP_{_scattered(number):07d}",
        "age_approx": age if age_known else None,
        "sex": ("male" if male else "female") if sex_known else None,
        "attribution": _INSTITUTIONS[institution][0],
        "copyright_license": _INSTITUTIONS[institution][1],
        "tbp_tile_type": "3D: XP" if institution != 3 and rng.random() < 0.8 else "3D: white",
    }
    meta = sum((value for value, _, _ in parts.values()), np.zeros(count))
    ids = [f"ISIC_{_scattered(start + n):07d}" for n in range(count)]
    return Patient(number, ids, known, site, fine, meta, odd.sum(1) / two, seen, traits, missing_site)


def _scattered(number: int) -> int:
    """Seven-digit numbers that don't tell the order: a bijection on 0..9,999,999."""
    return (number * 7_368_787 + 1_234_567) % 10_000_000


def _shares() -> Floats:
    shares = np.array([i[2] for i in _INSTITUTIONS])
    return shares / shares.sum()


def _rng(seed: int, patient: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([GENERATOR_VERSION, seed, patient, purpose])))


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _intercept(score: Floats, prevalence: float) -> float:
    """The intercept at which the mean probability is the prevalence, by bisection."""
    low, high = -40.0, 40.0
    if prevalence == 0:
        return low
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(middle + score).mean() < prevalence else (low, middle)
    return (low + high) / 2


def _labels(probability: Floats, seed: int) -> NDArray[np.int8]:
    """Systematic sampling: each lesion is malignant with exactly its probability, and their number is its sum."""
    rng = np.random.default_rng([GENERATOR_VERSION, seed, 2])
    order = rng.permutation(len(probability))
    total = np.cumsum(probability[order])
    start = 0.5 if total[-1] < 2 else rng.random()
    passed = np.floor(total - start + 1).astype(np.int64)
    targets = np.zeros(len(probability), np.int8)
    targets[order] = np.diff(passed, prepend=0) > 0
    return targets


def _best(cohort: list[Patient], intercept: float, probability: Floats) -> dict[str, float]:
    """Expected pAUC of the best ranking with each kind of information."""

    def over(get: str) -> Floats:
        return np.concatenate([p.seen[get] for p in cohort])

    fine = np.concatenate([p.fine for p in cohort])
    nothing = np.zeros(len(fine))
    everything = nothing + 1.0
    known = {
        "images": (W_FINE * fine, nothing, (nothing, everything), ("alone", "alone_left")),
        "metadata": (nothing, everything, (over("meta"), over("meta_left")), ("alone", "alone_left")),
        "patient_context": (nothing, everything, (over("meta"), over("meta_left")), ("context", "context_left")),
        "all": (W_FINE * fine, nothing, (over("meta"), over("meta_left")), ("context", "context_left")),
    }
    best = {}
    for name, (fine_mean, fine_left, (meta, meta_left), (odd, odd_left)) in known.items():
        mean = intercept + fine_mean + W_META * meta + W_ODD * over(odd)
        left = W_FINE**2 * fine_left + W_META**2 * meta_left + W_ODD**2 * over(odd_left)
        posterior = sum(w * _sigmoid(mean + np.sqrt(left) * z) for z, w in zip(_NODES, _WEIGHTS, strict=True))
        best[name] = round(_expected_pauc(probability, np.asarray(posterior)), 5)
    return best


def _expected_pauc(probability: Floats, ranking: Floats, min_tpr: float = 0.8) -> float:
    """pAUC when every lesion is malignant with its probability: integral of 1 - FPR over TPR from `min_tpr`."""
    order = np.argsort(-ranking, kind="stable")
    tpr = np.concatenate([[0], np.cumsum(probability[order])])
    fpr = np.concatenate([[0], np.cumsum(1 - probability[order])])
    tpr, fpr = tpr / tpr[-1], fpr / fpr[-1]
    at = np.concatenate([[min_tpr], tpr[tpr > min_tpr]])
    value = 1 - np.interp(at, tpr, fpr)
    return float(np.sum((value[1:] + value[:-1]) / 2 * np.diff(at)))


def _appearance(patient: Patient, seed: int) -> tuple[dict[str, Floats], Floats]:
    """What is drawn and measured: columns' numbers [N] and the outlines' waves [N, 2, 5]."""
    rng = _rng(seed, patient.number, 2)
    n = len(patient.ids)
    tone = rng.normal(0, 1)
    own = rng.standard_normal(6)
    z = rng.standard_normal((n, 12))
    skin_l = np.clip(53 + 10 * tone + 2.5 * z[:, 0], 24, 80)
    skin_a = np.clip(15 + 2.6 * own[0] + 1.6 * z[:, 1], 6, 28)
    skin_b = np.clip(26.5 + 3 * own[1] + 2 * z[:, 2], 13, 40)
    diameter = 3.6 * np.exp(0.30 * patient.traits[:, 0])
    delta_l = -8.3 * np.exp(0.35 * patient.traits[:, 1])
    delta_l = np.maximum(delta_l, 6 - skin_l)  # Nothing is darker than black.
    delta_a = 4.7 + 0.8 * own[2] + 1.8 * z[:, 3]
    delta_b = 1.2 + 0.8 * own[3] + 2.0 * z[:, 4]
    ratio = np.clip(0.68 + 0.06 * own[4] + 0.13 * z[:, 5], 0.35, 0.98)
    irregular = 0.05 * np.exp(0.3 * own[5] + 0.45 * z[:, 6])
    waves = np.stack(
        [
            irregular[:, None] * rng.standard_normal((n, len(HARMONICS))) / np.sqrt(HARMONICS),
            rng.uniform(0, 2 * np.pi, (n, len(HARMONICS))),
        ],
        axis=1,
    )
    waves[:, 0] = np.clip(waves[:, 0], -0.12, 0.12)
    area, perimeter = outline(diameter / 2, diameter / 2 * ratio, waves)
    spread = np.clip(np.exp(-0.1 + 0.55 * z[:, 7]), 0, 6)
    values = {
        "diameter": diameter, "minor": diameter * ratio, "area": area, "perimeter": perimeter,
        "skin_l": skin_l, "skin_a": skin_a, "skin_b": skin_b,
        "delta_l": delta_l, "delta_a": delta_a, "delta_b": delta_b,
        "spread": spread, "irregular": irregular, "asymmetry": np.clip(0.28 + 0.1 * z[:, 8], 0.05, 0.8),
        "nevus": 100 * _sigmoid(1.5 * z[:, 9] - 0.5), "confidence": 100 * _sigmoid(4 + 2 * z[:, 10]),
        "edge": 0.35 + 0.1 * np.abs(z[:, 11]), "angle": rng.uniform(0, np.pi, n),
        "side": np.clip(np.round(133 + 18 * rng.standard_normal() + 11 * rng.standard_normal(n)), 61, 239),
        "hairs": rng.poisson(1.2 * np.exp(0.8 * rng.standard_normal()), n).clip(0, 12).astype(np.float64),
    }  # fmt: skip
    return values, waves


def _write_metadata(path: Path, cohort: list[Patient], targets: NDArray[np.int8] | None, seed: int) -> None:
    start = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for patient in cohort:
            n = len(patient.ids)
            own = None if targets is None else targets[start : start + n]
            table = _columns(patient, own, seed)
            file.write(table.write_csv(include_header=start == 0))
            start += n


def _columns(patient: Patient, targets: NDArray[np.int8] | None, seed: int) -> pl.DataFrame:
    """One patient's rows with the competition's columns."""
    values, _ = _appearance(patient, seed)
    rng = _rng(seed, patient.number, 3)
    n = len(patient.ids)
    lesion_l = values["skin_l"] + values["delta_l"]
    lesion_a, lesion_b = values["skin_a"] + values["delta_a"], values["skin_b"] + values["delta_b"]
    delta = np.hypot(values["delta_l"], values["delta_b"])
    sites = [None if hidden else _SITES[s] for s, hidden in zip(patient.site, patient.missing_site, strict=True)]
    centre = np.array([s[5] for s in _SITES], np.float64)[patient.site]
    where = centre + rng.standard_normal((n, 3)) * [60, 70, 30]
    malignant = np.zeros(n, bool) if targets is None else targets == 1
    kind = rng.integers(0, len(_DIAGNOSES), n)
    melanoma = malignant & (kind == 0)
    thick = np.round(rng.gamma(1.2, 0.4, n), 1)

    def text(value: Any) -> list[Any]:
        return [value] * n

    def diagnosis(level: int) -> list[str | None]:
        return [_DIAGNOSES[k][level] if m else None for k, m in zip(kind, malignant, strict=True)]

    columns: dict[str, Any] = {
        "isic_id": patient.ids,
        "target": targets,
        "patient_id": text(patient.known["patient_id"]),
        "age_approx": text(patient.known["age_approx"]),
        "sex": text(patient.known["sex"]),
        "anatom_site_general": [s[0] if s else None for s in sites],
        "clin_size_long_diam_mm": values["diameter"].round(2),
        "image_type": text("TBP tile: close-up"),
        "tbp_tile_type": text(patient.known["tbp_tile_type"]),
        "tbp_lv_A": lesion_a,
        "tbp_lv_Aext": values["skin_a"],
        "tbp_lv_B": lesion_b,
        "tbp_lv_Bext": values["skin_b"],
        "tbp_lv_C": np.hypot(lesion_a, lesion_b),
        "tbp_lv_Cext": np.hypot(values["skin_a"], values["skin_b"]),
        "tbp_lv_H": np.degrees(np.arctan2(lesion_b, lesion_a)),
        "tbp_lv_Hext": np.degrees(np.arctan2(values["skin_b"], values["skin_a"])),
        "tbp_lv_L": lesion_l,
        "tbp_lv_Lext": values["skin_l"],
        "tbp_lv_areaMM2": values["area"],
        "tbp_lv_area_perim_ratio": values["perimeter"] ** 2 / values["area"],
        "tbp_lv_color_std_mean": values["spread"],
        "tbp_lv_deltaA": values["delta_a"],
        "tbp_lv_deltaB": values["delta_b"],
        "tbp_lv_deltaL": values["delta_l"],
        "tbp_lv_deltaLB": delta,
        "tbp_lv_deltaLBnorm": 0.8 * delta,
        "tbp_lv_eccentricity": np.sqrt(1 - (values["minor"] / values["diameter"]) ** 2),
        "tbp_lv_location": [s[1] if s else "Unknown" for s in sites],
        "tbp_lv_location_simple": [s[2] if s else "Unknown" for s in sites],
        "tbp_lv_minorAxisMM": values["minor"],
        "tbp_lv_nevi_confidence": values["nevus"],
        "tbp_lv_norm_border": np.clip(60 * values["irregular"], 0, 10),
        "tbp_lv_norm_color": np.clip(3 * values["spread"], 0, 10),
        "tbp_lv_perimeterMM": values["perimeter"],
        "tbp_lv_radial_color_std_max": 0.95 * values["spread"],
        "tbp_lv_stdL": 1.1 + values["spread"],
        "tbp_lv_stdLExt": 1.6 + 0.2 * rng.gamma(3, 1, n),
        "tbp_lv_symm_2axis": values["asymmetry"],
        "tbp_lv_symm_2axis_angle": 5 * np.floor(np.degrees(values["angle"]) / 5),
        "tbp_lv_x": where[:, 0],
        "tbp_lv_y": where[:, 1],
        "tbp_lv_z": where[:, 2],
        "attribution": text(patient.known["attribution"]),
        "copyright_license": text(patient.known["copyright_license"]),
        "lesion_id": [f"IL_{_scattered(int(i[5:])):07d}" if m else None
                      for i, m in zip(patient.ids, malignant, strict=True)],
        "iddx_full": [f"Malignant::{a}::{b}" if m else "Benign"
                      for m, a, b in zip(malignant, diagnosis(0), diagnosis(1), strict=True)],
        "iddx_1": ["Malignant" if m else "Benign" for m in malignant],
        "iddx_2": diagnosis(0),
        "iddx_3": diagnosis(1),
        "iddx_4": text(None),
        "iddx_5": text(None),
        "mel_mitotic_index": ["0/mm^2" if m else None for m in melanoma],
        "mel_thick_mm": [float(t) if m else None for t, m in zip(thick, melanoma, strict=True)],
        "tbp_lv_dnn_lesion_confidence": values["confidence"],
    }  # fmt: skip
    names = schema.TEST_COLUMNS if targets is None else schema.TRAIN_COLUMNS
    table = pl.DataFrame({name: columns[name] for name in names}, strict=False)
    numbers = [c for c, kind in table.schema.items() if kind == pl.Float64]
    return table.with_columns(pl.col(numbers).round(6))


def _draw(patient: Patient, seed: int, rows: range) -> list[bytes]:
    """Some of a patient's crops as JPEG; each lesion has a generator of its own, so any worker can draw any."""
    values, waves = _appearance(patient, seed)
    drawn = []
    for n in rows:
        skin = np.array([values[k][n] for k in ("skin_l", "skin_a", "skin_b")])
        delta = np.array([values[k][n] for k in ("delta_l", "delta_a", "delta_b")])
        lesion = Lesion(
            side=int(values["side"][n]),
            major=float(values["diameter"][n]) / 2,
            minor=float(values["minor"][n]) / 2,
            angle=float(values["angle"][n]),
            waves=waves[n],
            skin=skin,
            colour=skin + delta,
            variegation=float(values["spread"][n]),
            edge=float(values["edge"][n]),
            veil=float(_sigmoid(np.float64(1.7 * patient.fine[n]))),
            hairs=int(values["hairs"][n]),
        )
        rng = np.random.Generator(np.random.SFC64([GENERATOR_VERSION, seed, patient.number, int(n)]))
        drawn.append(encode(render(lesion, rng)))
    return drawn


def _task(arguments: tuple[Patient, int, range]) -> list[bytes]:
    return _draw(*arguments)


def _crops(cohort: list[Patient], asked: dict[str, Any], workers: int | None) -> Iterator[bytes]:
    """Every lesion's JPEG in order."""
    seed = asked["seed"]
    tasks = [(p, seed, range(at, min(at + 256, len(p.ids)))) for p in cohort for at in range(0, len(p.ids), 256)]
    if asked["repeat_bytes"]:
        pool: list[bytes] = []
        for task in tasks:
            pool += _task(task)
            if len(pool) >= POOL:
                break
        chosen = np.random.default_rng([GENERATOR_VERSION, seed, 4])
        for patient in cohort:
            yield from (pool[i] for i in chosen.integers(0, len(pool), len(patient.ids)))
        return
    total = sum(len(p.ids) for p in cohort)
    workers = workers or (min(8, os.cpu_count() or 1) if total > 3000 else 1)
    if workers == 1:
        for task in tasks:
            yield from _task(task)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        # A window of tasks, so that a large set is never all in memory.
        waiting = [executor.submit(_task, task) for task in tasks[: 4 * workers]]
        upcoming = iter(tasks[4 * workers :])
        while waiting:
            yield from waiting.pop(0).result()
            if (task := next(upcoming, None)) is not None:
                waiting.append(executor.submit(_task, task))


def _write_images(
    path: Path, part: str, cohort: list[Patient], asked: dict[str, Any], workers: int | None, progress: bool
) -> None:
    ids = [i for p in cohort for i in p.ids]
    with h5py.File(path, "w", libver="latest", track_order=False) as file:
        crops = track(_crops(cohort, asked, workers), f"synth {part}", total=len(ids), show=progress)
        for isic_id, data in zip(ids, crops, strict=True):
            file.create_dataset(isic_id, data=np.bytes_(data), track_times=False)

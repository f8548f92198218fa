"""What in a lesion's metadata moves its score, in words that a clinician can check on the patient.

    reasons(matrix.values, contributions, matrix.names, table)
    [("larger and darker than most of this patient's other lesions on the back", "the patient is about 75 years old"),
     ("speaks against: 1.9 mm across",)]

The trees' contributions (TreeSHAP, log-odds) say what is worth naming; what is said of it comes from the numbers alone.
So no phrase claims a direction that the lesion doesn't show, even where the model makes something odd of it: a lesion
is called larger because of its size, never because size raised its score. Nor does one speak for lesions whose cells
are blank: where those that could be compared are too few to speak for all, the phrase says how many they were.
Contributions of one concept (size, darkness, border, ...) and one comparison are added up first, as many features tell
of the same thing and the trees deal its weight out among them as it comes.

Some is never said: the skin around, the kind of tile and where on the body model's axes a lesion lies carry weight, but
are nothing that a look at the patient would confirm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lesionflow.data.context import Patients
from lesionflow.data.derived import sites as body_sites
from lesionflow.data.features import Feature, catalogue
from lesionflow.data.neighbours import NEAREST, POSITION
from lesionflow.errors import DataError

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

NOTICEABLE = log(1.25)
"""Named from here on: what makes the odds a quarter higher."""
STRONG = log(1.5)
"""What speaks against a lesion is named where it makes the odds a third lower."""
MOST = 3
"""Phrases for a lesion, all together."""
TOGETHER = 3
"""Concepts in one comparison."""
CLEAR = 0.75
"""Place among the others above which a lesion has more than most of them: ties count half, so half surely have less."""

SITES = {
    "anterior torso": "on the front of the trunk",
    "head/neck": "on the head and neck",
    "lower extremity": "on the legs",
    "posterior torso": "on the back",
    "upper extremity": "on the arms",
}
_COMPARED = re.compile(r"(.+)_(?:patient|site)_(?:diff|robust_z|z|rank|share)|(.+)_near_diff")
_VISIBLE = {
    "clin_size_long_diam_mm": 0.5, "tbp_lv_L": 2.0, "tbp_lv_deltaLBnorm": 1.0, "tbp_lv_norm_color": 0.5,
    "tbp_lv_norm_border": 0.5, "tbp_lv_nevi_confidence": 5.0,
}  # fmt: skip
"""Differences to the nearest lesions from which on they are named."""


def _signed(below: str, above: str) -> Callable[[float], str]:
    """Words for a difference to the skin around; none under 1, which an eye doesn't see."""
    return lambda v: "" if abs(v) < 1 else f"{above if v > 0 else below} than the skin around it"


_Said = Mapping[str, Callable[[float], str]]
_STATED: Mapping[str, _Said] = {
    # concept: feature: what it says of the lesion alone. The first is said for the whole concept.
    "age": {"age_approx": lambda v: f"the patient is about {v:.0f} years old"},
    "sex": {"male": lambda v: "the patient is a man" if v == 1 else "the patient is a woman"},
    "size": {"clin_size_long_diam_mm": lambda v: f"{v:.1f} mm across"},
    "darkness": {"tbp_lv_deltaL": _signed("darker", "lighter")},
    "naevus": {"tbp_lv_nevi_confidence": lambda v: f"the scanner's confidence in a naevus is {v:.0f} %"},
}
_OWN: Mapping[str, _Said] = {
    # As above, but each said only for itself: these concepts hold different things.
    "colour": {
        "tbp_lv_norm_color": lambda v: f"colour variation {v:.1f} of 10",
        "tbp_lv_deltaA": _signed("less red", "redder"),
        "tbp_lv_deltaB": _signed("less yellow", "yellower"),
    },
    "border": {"tbp_lv_norm_border": lambda v: f"border irregularity {v:.1f} of 10"},
    "shape": {"tbp_lv_symm_2axis": lambda v: f"asymmetry {v:.2f} of 1"},
}


@dataclass(frozen=True)
class _Told:
    """Something to say of one lesion."""

    weight: float
    """Log-odds that it adds."""
    words: str
    against: str = ""
    """What it is compared with; "" for a statement that stands alone."""
    base: str = ""
    """In what."""


def reasons(
    values: Floats,
    contributions: Floats,
    names: Sequence[str],
    table: pl.DataFrame,
    rows: Sequence[int] | None = None,
) -> list[tuple[str, ...]]:
    """At most `MOST` phrases for each of B lesions, what raises its score first, strongest first.

    values [B, F], NaN where unknown, and contributions [B, F + 1] in log-odds, the base last, of the features `names`;
    `table` has the lesions' metadata in the same order, of whole patients, as the features were made of them
    (`patient_id` and `anatom_site_general` are used where they are there). With `rows` only these of the B are told
    of, in that order, and contributions are [len(rows), F + 1]. Raises `DataError` where these don't match.
    """
    which = list(range(len(table))) if rows is None else list(rows)
    if values.shape != (len(table), len(names)) or contributions.shape != (len(which), len(names) + 1):
        raise DataError(
            f"reasons: {values.shape} values and {contributions.shape} contributions for {len(which)} lesions and "
            f"{len(names)} features; give the matrix that was scored"
        )
    known = {feature.name: feature for feature in catalogue()}
    topics = _topics([known[name] for name in names if name in known])
    place = {name: column for column, name in enumerate(names)}
    sites = table["anatom_site_general"].to_list() if "anatom_site_general" in table.columns else [None] * len(table)
    telling = _telling(contributions, topics, place)
    company = _Company(values, place, table)
    return [
        _lesion(_Lesion(values[row], shares, place, sites[row], company.of(row)), topics) if tells else ()
        for row, shares, tells in zip(which, contributions, telling, strict=True)
    ]


Topics = Mapping[tuple[str, str], Sequence[Feature]]
"""The features of each concept and comparison."""


def _topics(features: Sequence[Feature]) -> Topics:
    found: dict[tuple[str, str], list[Feature]] = {}
    for feature in features:
        found.setdefault((feature.concept, feature.against), []).append(feature)
    return found


def _telling(contributions: Floats, topics: Topics, place: Mapping[str, int]) -> list[bool]:
    """Whether any concept of a lesion weighs enough to be named, [B]: of most lesions none does."""
    if not topics:
        return [False] * len(contributions)
    weights = [contributions[:, [place[one.name] for one in of]].sum(axis=1) for of in topics.values()]
    slack = 1e-9  # Sums in another order.
    highest, lowest = np.max(weights, axis=0), np.min(weights, axis=0)
    telling: list[bool] = ((highest >= NOTICEABLE - slack) | (lowest <= -STRONG + slack)).tolist()
    return telling


class _Company:
    """Which lesions each is compared with, and which of those have a value."""

    def __init__(self, values: Floats, place: Mapping[str, int], table: pl.DataFrame) -> None:
        patients, site = Patients(table), body_sites(table)
        code = np.empty_like(patients.code)
        code[patients.order] = patients.code
        self._keys = {"patient": code, "site": code * (len(SITES) + 1) + site + 1}
        self._rows: dict[tuple[str, int], NDArray[np.intp]] = {}
        self._values, self._place = values, place

    def of(self, row: int) -> Callable[[str, str], Floats]:
        """Of one lesion: scope and feature -> the other lesions' values, NaN where they have none."""

        def others(scope: str, name: str) -> Floats:
            key = int(self._keys[scope][row])
            if (scope, key) not in self._rows:
                self._rows[scope, key] = np.flatnonzero(self._keys[scope] == key)
            rows = self._rows[scope, key]
            rows = rows[rows != row]
            return self._values[rows, self._place[name]] if name in self._place else np.full(len(rows), np.nan)

        return others


class _Lesion:
    """One row of numbers by feature, and `others`: scope and feature -> the same of those it is compared with."""

    def __init__(
        self, values: Floats, shares: Floats, place: Mapping[str, int], site: str | None,
        others: Callable[[str, str], Floats],
    ) -> None:  # fmt: skip
        self._values, self._shares, self._place, self.others = values, shares, place, others
        self.where = SITES.get((site or "").strip().lower(), "")

    def value(self, name: str) -> float:
        return float(self._values[self._place[name]]) if name in self._place else float("nan")

    def share(self, names: Sequence[str]) -> float:
        return float(sum(self._shares[self._place[name]] for name in names if name in self._place))


def _lesion(lesion: _Lesion, topics: Topics) -> tuple[str, ...]:
    told = _told(lesion, topics)
    raising = _phrases(lesion, [one for one in told if one.weight >= NOTICEABLE])
    lowering = min(
        (one for one in told if one.weight <= -STRONG), key=lambda one: (one.weight, one.words), default=None
    )
    if lowering is None:
        return tuple(raising[:MOST])
    return (*raising[: MOST - 1], f"speaks against: {_phrases(lesion, [lowering])[0]}")


def _told(lesion: _Lesion, topics: Topics) -> list[_Told]:
    """Everything that can be said, whatever its weight; a concept is compared once, with what weighs most."""
    alone, compared = [], dict[str, list[_Told]]()
    for (concept, against), features in topics.items():
        weight = lesion.share([feature.name for feature in features])
        if words := _statement(lesion, concept, against, weight):
            alone.append(_Told(weight, words))
        elif against and (one := _comparison(lesion, features, weight, against)) is not None:
            compared.setdefault(concept, []).append(one)
    strongest = [max(of, key=lambda one: (abs(one.weight), one.against)) for of in compared.values()]
    return [*alone, *strongest]


def _statement(lesion: _Lesion, concept: str, against: str, weight: float) -> str:
    """What the lesion is, of this concept: numbers, not judgements."""
    if (concept, against) == ("look", "patient"):
        return _look(lesion)
    if (concept, against) == ("place", "neighbours"):
        near = lesion.value("nearest_mm")
        placed = " whose place is known" if np.isnan(lesion.others("patient", "nearest_mm")).any() else ""
        return f"the nearest other lesion{placed} is {near:.0f} mm away" if np.isfinite(near) else ""
    if against:
        return ""
    if concept == "place":
        return f"it lies {lesion.where}" if lesion.where else ""
    own, whole = _OWN.get(concept, {}), _STATED.get(concept, {})
    # Of several things that one concept holds, the one that moves the score the same way, and most.
    candidates = [(abs(lesion.share([name])), name) for name in own if lesion.share([name]) * weight > 0]
    for name in [*whole, *(name for _, name in sorted(candidates, reverse=True))]:
        value = lesion.value(name)
        if np.isfinite(value) and (words := (whole.get(name) or own[name])(value)):
            return words
    return ""


def _look(lesion: _Lesion) -> str:
    """How far from the patient's usual lesion, all things together."""
    rank, far = lesion.value("look_to_median_rank"), lesion.others("patient", "look_to_median")
    if not (rank > CLEAR or rank < 1 - CLEAR):
        return ""
    compared = far[np.isfinite(far)]
    only = "" if len(compared) == len(far) else " that can be compared"
    if rank < 1 - CLEAR:
        return f"more like this patient's usual lesion than most of the others{only}"
    # Whoever is as far isn't nearer.
    nearer = float(np.mean(compared < lesion.value("look_to_median")))
    share = f"{np.floor(100 * nearer + 1e-9):.0f} % of the others{only}"
    if nearer == 1:
        share = f"all other lesions{only}"
    return f"less like this patient's usual lesion than {share}"


def _comparison(lesion: _Lesion, features: Sequence[Feature], weight: float, against: str) -> _Told | None:
    """How the lesion compares with the others in this concept, if it clearly does."""
    by_base: dict[str, list[Feature]] = {}
    for feature in features:
        if found := _COMPARED.fullmatch(feature.name):
            by_base.setdefault(found[1] or found[2], []).append(feature)
    weighed = sorted(((lesion.share([f.name for f in of]), base) for base, of in by_base.items()), reverse=weight > 0)
    for share, base in weighed:
        if share * weight <= 0:
            break
        one = by_base[base][0]
        # NaN is neither more nor less: with no other lesion there is nothing to say.
        if against == "neighbours":
            gap = lesion.value(f"{base}_near_diff")
            more, less = gap >= _VISIBLE[base], gap <= -_VISIBLE[base]
        else:
            rank = lesion.value(f"{base}_{against}_rank")
            more, less = rank > CLEAR, rank < 1 - CLEAR
        if word := one.higher if more else one.lower if less else "":
            return _Told(weight, word, against, base)
    return None


def _phrases(lesion: _Lesion, told: Sequence[_Told]) -> list[str]:
    """What is compared with the same lesions becomes one phrase; strongest first."""
    weighed = [(one.weight, one.words) for one in told if not one.against]
    compared = [one for one in told if one.against]
    for against in dict.fromkeys(one.against for one in compared):
        of = sorted((one for one in compared if one.against == against), key=lambda one: (-abs(one.weight), one.words))
        of = of[:TOGETHER]
        thans = [_than(lesion, one) for one in of]
        # What holds against all holds against most.
        thans = [f"most of {than}" if f"most of {than}" in thans else than for than in thans]
        for than in dict.fromkeys(thans):
            same = [one for one, its in zip(of, thans, strict=True) if its == than]
            words = f"{_joined([one.words for one in same])} than {than}"
            weighed.append((sum(one.weight for one in same), words))
    return [words for _, words in sorted(weighed, key=lambda one: (-abs(one[0]), one[1]))]


def _than(lesion: _Lesion, told: _Told) -> str:
    return _nearest(lesion, told.base) if told.against == "neighbours" else _others(lesion, told.base, told.against)


def _others(lesion: _Lesion, base: str, against: str) -> str:
    """The lesions that it was compared with, all or most of them, in words."""
    rank, ranks = lesion.value(f"{base}_{against}_rank"), lesion.others(against, f"{base}_{against}_rank")
    count, compared = len(ranks), int(np.isfinite(ranks).sum())
    where = f" {lesion.where or 'on the same body site'}" if against == "site" else ""
    whose = f"this patient's other lesion{'s' * (count != 1)}{where}"
    every = rank in (0.0, 1.0)
    if every and compared == count:
        return whose
    # Ties count half, so of those compared so many at least have less (or more).
    passed = round((2 * max(rank, 1 - rank) - 1) * compared)
    if passed > count / 2:
        return f"most of {whose}"
    if compared == 1:
        return f"the only one of this patient's {count} other lesions{where} that can be compared"
    some = f"the {compared} of this patient's {count} other lesions{where} that can be compared"
    return some if every else f"most of {some}"


def _nearest(lesion: _Lesion, base: str) -> str:
    """The nearest lesions on the body, in words: those that the features average over."""
    apart = np.sqrt(sum((lesion.others("patient", axis) - lesion.value(axis)) ** 2 for axis in POSITION))
    placed = np.flatnonzero(np.isfinite(apart))
    if not len(placed):
        return "the lesions nearest to it that can be compared are on average"  # Features without coordinates.
    farthest = np.sort(apart[placed])[min(NEAREST, len(placed)) - 1]
    known = np.isfinite(lesion.others("patient", base)[placed[apart[placed] <= farthest]])
    if len(known) == 1:
        return "the lesion nearest to it"
    if known.all():
        return "the lesions nearest to it are on average"
    if known.sum() == 1:
        return "the only one of the lesions nearest to it that can be compared"
    return "the lesions nearest to it that can be compared are on average"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

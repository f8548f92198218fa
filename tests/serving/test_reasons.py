"""Reasons: what is said of a lesion is true of its numbers, whatever the model makes of them."""

from __future__ import annotations

import re
from math import log

import numpy as np
import polars as pl
import pytest

from lesionflow.data.features import catalogue, features
from lesionflow.data.schema import SITES
from lesionflow.errors import DataError
from lesionflow.serving.reasons import CLEAR, MOST, NOTICEABLE, STRONG, reasons
from lesionflow.serving.reasons import SITES as WORDS

KNOWN = {one.name: one for one in catalogue()}
NAMES = tuple(KNOWN)
SITE_OF = {words: site for site, words in WORDS.items()}


def table(lesions: int = 240, seed: int = 0, blank: float = 0.03) -> pl.DataFrame:
    """Patients of one to about forty lesions, with some cells empty and many values tied."""
    rng = np.random.default_rng(seed)
    owner = np.minimum(rng.geometric(0.06, lesions), 30)
    owner[:4] = [101, 102, 103, 103]

    def some(low: float, high: float, step: float) -> list[float | None]:
        values = np.round(rng.uniform(low, high, lesions) / step) * step
        return [None if rng.random() < blank else float(v) for v in values]

    return pl.DataFrame({
        "isic_id": [f"ISIC_{i:07}" for i in range(lesions)], "patient_id": [f"IP_{i}" for i in owner],
        "age_approx": (owner % 9 * 10.0).tolist(), "sex": np.where(owner % 2, "male", "female").tolist(),
        "anatom_site_general": [None if rng.random() < 0.1 else SITES[rng.integers(5)] for _ in range(lesions)],
        "tbp_tile_type": ["3D: XP"] * lesions,
        "clin_size_long_diam_mm": some(1, 12, 0.5), "tbp_lv_areaMM2": some(1, 80, 2.0),
        "tbp_lv_minorAxisMM": some(1, 8, 0.5), "tbp_lv_perimeterMM": some(4, 40, 2.0),
        **{f"tbp_lv_{c}": some(20, 70, 2.0) for c in ("L", "Lext")},
        **{f"tbp_lv_{c}": some(5, 30, 1.0) for c in ("A", "B", "C", "H", "Aext", "Bext", "Cext", "Hext")},
        **{f"tbp_lv_{c}": some(-15, 5, 0.5) for c in ("deltaL", "deltaA", "deltaB", "deltaLB")},
        **{f"tbp_lv_{c}": some(0, 10, 1.0) for c in ("deltaLBnorm", "norm_border", "norm_color", "stdL", "stdLExt")},
        **{f"tbp_lv_{c}": some(0, 5, 0.5) for c in ("color_std_mean", "radial_color_std_max")},
        **{f"tbp_lv_{c}": some(0, 1, 0.1) for c in ("eccentricity", "symm_2axis")},
        "tbp_lv_nevi_confidence": some(0, 100, 5.0), **{f"tbp_lv_{c}": some(-400, 400, 1.0) for c in "xyz"},
    })  # fmt: skip


@pytest.fixture(scope="module")
def lesions() -> pl.DataFrame:
    return table()


@pytest.fixture(scope="module")
def values(lesions: pl.DataFrame) -> np.ndarray:
    return features(lesions).values


def shares(count: int, weights: dict[str, float] | None = None, seed: int | None = None) -> np.ndarray:
    """Contributions: `weights` by feature for every lesion, or at random."""
    if seed is not None:
        return np.random.default_rng(seed).normal(size=(count, len(NAMES) + 1)) * 0.3
    found = np.zeros((count, len(NAMES) + 1))
    for name, weight in (weights or {}).items():
        found[:, NAMES.index(name)] = weight
    return found


def bases(words: str, against: str) -> list[str]:
    """The features that an adjective may be about, with whether it says more or less of them."""
    found = []
    for name, one in KNOWN.items():
        stem = name.removesuffix(f"_{against}_rank" if against != "neighbours" else "_near_diff")
        if stem != name and words in (one.higher, one.lower) and one.against == against:
            found.append((stem, words == one.higher))
    return found


def truth(phrase: str, row: np.ndarray, lesion: dict, others: pl.DataFrame) -> bool:
    """Whether a phrase is true of the lesion's own numbers and of the same patient's other lesions."""
    value = dict(zip(NAMES, row.tolist(), strict=True))
    phrase = phrase.removeprefix("speaks against: ")
    if phrase.startswith("it lies "):
        return SITE_OF[phrase.removeprefix("it lies ")] == lesion["anatom_site_general"]
    if found := re.fullmatch(r"the patient is about (\d+) years old", phrase):
        return float(found[1]) == lesion["age_approx"]
    if found := re.fullmatch(r"the patient is a (man|woman)", phrase):
        return (found[1] == "man") == (lesion["sex"] == "male")
    simple = {
        r"([\d.]+) mm across": "clin_size_long_diam_mm", r"colour variation ([\d.]+) of 10": "tbp_lv_norm_color",
        r"border irregularity ([\d.]+) of 10": "tbp_lv_norm_border", r"asymmetry ([\d.]+) of 1": "tbp_lv_symm_2axis",
        r"the scanner's confidence in a naevus is (\d+) %": "tbp_lv_nevi_confidence",
    }  # fmt: skip
    for pattern, column in simple.items():
        if found := re.fullmatch(pattern, phrase):
            return abs(float(found[1]) - lesion[column]) < 0.051
    if found := re.fullmatch(r"(.*) than the skin around it", phrase):
        column, sign = {
            "darker": ("deltaL", -1), "lighter": ("deltaL", 1), "redder": ("deltaA", 1), "less red": ("deltaA", -1),
            "less yellow": ("deltaB", -1), "yellower": ("deltaB", 1),
        }[found[1]]  # fmt: skip
        return lesion[f"tbp_lv_{column}"] * sign >= 1
    some = " that can be compared" in phrase
    if found := re.fullmatch(r"the nearest other lesion( whose place is known)? is (\d+) mm away", phrase):
        apart = distances(lesion, others)
        assert bool(found[1]) == bool(np.isnan(apart).any())
        return abs(float(found[2]) - np.nanmin(apart)) <= 0.5 + 1e-6
    if "usual lesion" in phrase:
        theirs = others["look_to_median"]
        assert some == (theirs.null_count() > 0)
        nearer = float((theirs.drop_nulls() < value["look_to_median"]).mean())
        if found := re.search(r"less like this patient's usual lesion than (\d+) % of the others", phrase):
            return float(found[1]) <= 100 * nearer + 1e-6 < float(found[1]) + 1
        if "than all other lesions" in phrase:
            return nearer == 1
        return phrase.startswith("more like") and float((theirs.drop_nulls() > value["look_to_median"]).mean()) > 0.5
    if found := re.fullmatch(r"(.*) than (the .*nearest to it.*)", phrase):
        order = np.argsort(distances(lesion, others))[: min(5, int(np.isfinite(distances(lesion, others)).sum()))]
        for words in spoken(found[1]):
            for base, more in bases(words, "neighbours"):
                near = others[base].to_numpy()[order]
                known = near[np.isfinite(near)]
                gap = value[f"{base}_near_diff"]
                said = {
                    "the lesion nearest to it": len(near) == 1,
                    "the lesions nearest to it are on average": len(known) == len(near) > 1,
                    "the only one of the lesions nearest to it that can be compared": len(known) == 1 < len(near),
                    "the lesions nearest to it that can be compared are on average": 1 < len(known) < len(near),
                }
                if (gap > 0) == more and said[found[2]] and gap == pytest.approx(value[base] - known.mean()):
                    break
            else:
                return False
        return True
    found = re.fullmatch(
        r"(.*) than (most of )?(?:this patient's|the (\d+|only one) of this patient's (\d+)) other lesions?"
        r"( on .*?)?( that can be compared)?", phrase,
    )  # fmt: skip
    assert found, phrase
    against = "site" if found[5] else "patient"
    if found[5]:
        assert SITE_OF[found[5].strip()] == lesion["anatom_site_general"]
        others = others.filter(pl.col("anatom_site_general") == lesion["anatom_site_general"])
    assert ("lesions" in phrase) == (len(others) != 1), phrase
    assert bool(found[3]) == bool(found[6]) and found[4] in (None, str(len(others)))
    compared = None if not found[3] else 1 if found[3] == "only one" else int(found[3])
    return all(
        any(
            beyond(value[base], others[base], more, most=bool(found[2]), compared=compared)
            for base, more in bases(words, against)
        )
        for words in spoken(found[1])
    )


def distances(lesion: dict, others: pl.DataFrame) -> np.ndarray:
    """To the patient's other lesions on the body, mm [n], NaN where either's place is unknown."""
    axes = [f"tbp_lv_{axis}" for axis in "xyz"]
    mine = np.array([lesion[axis] for axis in axes], np.float64)
    return np.linalg.norm(others.select(axes).cast(pl.Float64).to_numpy() - mine, axis=1)


def spoken(words: str) -> list[str]:
    return re.split(r", | and ", words)


def beyond(mine: float, theirs: pl.Series, more: bool, *, most: bool, compared: int | None) -> bool:
    """Counted lesion by lesion: who has no value is not passed, unless the phrase leaves such out, by number."""
    known = theirs.drop_nulls().to_numpy()
    if compared is not None and len(known) != compared:
        return False
    passed, of = int((known < mine if more else known > mine).sum()), len(theirs) if compared is None else compared
    return passed > of / 2 if most else passed == of


@pytest.mark.parametrize(("seed", "blank"), [*((seed, 0.03) for seed in range(4)), (4, 0.0), (5, 0.3), (6, 0.6)])
def test_every_phrase_is_true_of_the_numbers(seed: int, blank: float) -> None:
    lesions = table(seed=seed, blank=blank)
    values = features(lesions).values
    said = reasons(values, shares(len(lesions), seed=seed), NAMES, lesions)
    made = ("contrast_Lab", "circularity", "look_to_median")
    lesions = lesions.with_columns(pl.Series(name, values[:, NAMES.index(name)]).fill_nan(None) for name in made)
    kinds = set()
    for row, phrases in enumerate(said):
        lesion = lesions.row(row, named=True)
        others = lesions.filter(pl.col("patient_id") == lesion["patient_id"], pl.col("isic_id") != lesion["isic_id"])
        assert len(phrases) <= MOST
        assert sum(p.startswith("speaks against") for p in phrases) <= 1
        for phrase in phrases:
            assert truth(phrase, values[row], lesion, others), (phrase, lesion)
            kinds.add(re.sub(r"[\d.]+|.* (?=than)", "", phrase))
        if not len(others):
            assert not any("other" in p or "nearest" in p for p in phrases)
    assert len(kinds) > 20, "the synthetic lesions must call for many kinds of phrases"
    assert any("that can be compared" in kind for kind in kinds) == (blank > 0)


def test_a_phrase_speaks_for_no_lesion_whose_cell_is_blank() -> None:
    rows = pl.DataFrame({
        "isic_id": [f"I{i}" for i in range(6)], "patient_id": ["P"] * 6, "anatom_site_general": ["posterior torso"] * 6,
        "clin_size_long_diam_mm": [9.0, 2, None, None, None, None], "tbp_lv_L": [20.0, 30, 40, 50, 60, None],
        "tbp_lv_norm_border": [9.0, 1, 2, None, None, None],
    })  # fmt: skip

    def first(*names: str) -> tuple[str, ...]:
        return reasons(features(rows).values, shares(6, dict.fromkeys(names, 0.5)), NAMES, rows)[0]

    size, light, border = (f"{n}_site_rank" for n in ("clin_size_long_diam_mm", "tbp_lv_L", "tbp_lv_norm_border"))
    one = "larger than the only one of this patient's 5 other lesions on the back that can be compared"
    assert first(size) == (one,)
    assert first(light) == ("darker than most of this patient's other lesions on the back",), "4 of 5, whatever the 5th"
    two = "more irregular in its border than the 2 of this patient's 5 other lesions on the back that can be compared"
    assert first(border) == (two,)
    assert set(first(size, border)) == {one, two}, "not the same lesions, so not one phrase"
    rows = rows.with_columns(clin_size_long_diam_mm=pl.Series([9.0, *[None] * 5]))
    assert first(size) == ()


def test_comparisons_with_the_same_lesions_become_one_phrase() -> None:
    rows = pl.DataFrame({
        "isic_id": [f"I{i}" for i in range(5)], "patient_id": ["P"] * 5, "anatom_site_general": ["posterior torso"] * 5,
        "clin_size_long_diam_mm": [9.0, 2, 3, 4, 5], "tbp_lv_L": [20.0, 40, 50, 60, 45], "age_approx": [75.0] * 5,
    })  # fmt: skip
    weights = {"clin_size_long_diam_mm_site_diff": 0.4, "tbp_lv_L_site_z": 0.5, "age_approx": 0.3}
    said = reasons(features(rows).values, shares(5, weights), NAMES, rows)
    assert said[0] == (
        "darker and larger than this patient's other lesions on the back", "the patient is about 75 years old"
    )  # fmt: skip
    assert said[1] == (
        "smaller than this patient's other lesions on the back", "the patient is about 75 years old"
    ), "the size raises this one's score too, but it is small"  # fmt: skip
    assert said == reasons(features(rows).values, shares(5, weights), NAMES, rows)


def test_several_features_of_one_concept_are_added_up(lesions: pl.DataFrame, values: np.ndarray) -> None:
    own = [n for n, one in KNOWN.items() if one.concept == "size" and not one.against][:3]
    each = NOTICEABLE / 3
    assert all("mm across" in str(r) for r, v in zip(
        reasons(values, shares(len(lesions), dict.fromkeys(own, each + 0.001)), NAMES, lesions),
        lesions["clin_size_long_diam_mm"], strict=True,
    ) if v is not None)  # fmt: skip
    assert not any(reasons(values, shares(len(lesions), dict.fromkeys(own, each - 0.001)), NAMES, lesions))


def test_what_speaks_against_is_said_where_it_is_strong(lesions: pl.DataFrame, values: np.ndarray) -> None:
    said = reasons(values, shares(len(lesions), {"clin_size_long_diam_mm": -STRONG - 0.01}), NAMES, lesions)
    assert any(said)
    for phrases, size in zip(said, lesions["clin_size_long_diam_mm"], strict=True):
        assert phrases == (() if size is None else (f"speaks against: {size:.1f} mm across",))
    assert not any(reasons(values, shares(len(lesions), {"clin_size_long_diam_mm": -log(1.49)}), NAMES, lesions))


def test_the_oddest_lesion_of_a_patient_is_told_by_how_many_are_nearer_to_the_usual() -> None:
    rows = table(41, seed=3).with_columns(patient_id=pl.lit("P"))
    column = NAMES.index("look_to_median_rank")
    found = features(rows).values
    said = reasons(found, shares(41, {"look_lof": 0.3}), NAMES, rows)
    for rank, phrases in zip(found[:, column], said, strict=True):
        if rank > CLEAR and rank < 1:
            (number,) = re.fullmatch(
                r"less like this patient's usual lesion than (\d+) % of the others that can be compared", phrases[0]
            ).groups()
            assert 0 <= 100 * rank - float(number) < 2.6
    assert sum("than all other lesions" in str(p) for p in said) == 1


def test_metadata_of_one_lesion_alone_and_blocks_that_are_left_out() -> None:
    rows = pl.DataFrame({"isic_id": ["I1"], "clin_size_long_diam_mm": [8.2], "sex": ["female"]})
    matrix = features(rows, ("plain",))
    contributions = np.full((1, len(matrix.names) + 1), 0.3)
    (said,) = reasons(matrix.values, contributions, matrix.names, rows)
    assert set(said) == {"8.2 mm across", "the patient is a woman"}
    assert reasons(matrix.values[:0], contributions[:0], matrix.names, rows[:0]) == []


def test_shapes_that_do_not_belong_together_are_refused(lesions: pl.DataFrame, values: np.ndarray) -> None:
    with pytest.raises(DataError, match="give the matrix that was scored"):
        reasons(values, shares(len(lesions))[:, :-1], NAMES, lesions)
    with pytest.raises(DataError, match="give the matrix that was scored"):
        reasons(values, shares(len(lesions)), NAMES, lesions[:3])

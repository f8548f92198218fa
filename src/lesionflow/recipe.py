"""A recipe is the whole description of a run: frozen dataclasses, read from and written to TOML.

    recipe = Recipe.load("recipes/quick.toml", overrides=["training.epochs=2"])

Every error names the field and its bound. Unknown fields are refused, so a typo can't pass silently.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lesionflow.errors import UsageError
from lesionflow.fields import bound, build, override_all, read_toml

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a recipe, and so a bundle and a served model, may be called."""


MODES = {
    "image": "the picture alone",
    "record": "metadata of the lesion",
    "visit": "metadata, compared with the patient's other lesions",
    "image_record": "picture and metadata of the lesion",
    "image_visit": "picture and metadata, compared with the patient's other lesions",
}
"""What a lesion's score can rest on, in words, from the poorest to the richest; a run serves the last that it has."""


@dataclass(frozen=True)
class Folds:
    """How lesions are split; a patient is never on both sides."""

    kind: str = bound("patient", choices=("patient", "institution"))
    """`patient` deals patients to `count` folds; `institution` holds out one institution (`attribution`) at a time."""
    count: int = bound(5, 2, 20)
    """Number of cross-validation folds (by patient only)."""
    holdout: float = bound(0.25, 0, 0.5)
    """Share of patients set aside from every fold, so that what is served, the mean of all folds' models, can be
    calibrated, its thresholds chosen and its bands vouched for; 0: none, and then there are no bands. To vouch for
    a sensitivity of 0.9 takes 29 patients with a malignant lesion in there, for 0.95 it takes 59."""
    seed: int = bound(0, 0)
    """Seed of the split; separate from the training seed, so that seeds compare on the same folds."""


@dataclass(frozen=True)
class ImageInput:
    """What the network is shown."""

    size: int = bound(128, 32, 1024)
    """Side of the square crop, pixels."""
    filter: str = bound("bilinear", choices=("bilinear", "bicubic", "lanczos"))
    """Resampling filter, antialiased."""
    skip_corrupt: bool = False
    """Leave out images that can't be decoded, counted and listed, instead of stopping."""


@dataclass(frozen=True)
class Sampling:
    """Which lesions an epoch shows, in which order."""

    kind: str = bound("balanced", choices=("balanced", "shuffle"))
    """`balanced` draws all malignant lesions and fresh negatives each epoch; `shuffle` draws every lesion once."""
    negatives: float = bound(3.0, 0.1, 1000)
    """Negatives drawn per malignant lesion and epoch (balanced only)."""


@dataclass(frozen=True)
class Augment:
    """Random changes to a training image; zero or false switches one off."""

    flip: bool = True
    """Horizontal and vertical flips, each with probability 1/2."""
    rotate90: bool = True
    """Right-angle rotations, uniformly."""
    rotate: float = bound(0.0, 0, 180)
    """Further rotation by up to this many degrees either way."""
    scale: float = bound(0.0, 0, 0.9)
    """Zoom by a factor in 1 - scale .. 1 + scale."""
    brightness: float = bound(0.0, 0, 1)
    """Relative change of brightness, up to."""
    contrast: float = bound(0.0, 0, 1)
    """Relative change of contrast, up to."""
    saturation: float = bound(0.0, 0, 1)
    """Relative change of saturation, up to."""
    hue: float = bound(0.0, 0, 0.5)
    """Change of hue, in turns, up to."""


@dataclass(frozen=True)
class Model:
    """The image network."""

    backbone: str = "tf_efficientnet_lite0"
    """Any timm model name."""
    weights: str = "auto"
    """`auto`: offline ImageNet weights where a package carries them, else timm's hub, else an error;
    `none`: random; otherwise a path to a state dict (.pt, .safetensors)."""
    dropout: float = bound(0.0, 0, 0.9)
    """Dropout before the classifier."""
    drop_path: float = bound(0.0, 0, 0.9)
    """Stochastic depth, where the backbone knows it."""
    freeze: int = bound(0, 0, 50)
    """Stages kept at their pretrained weights and statistics, counted from the input (1: the stem):
    cheaper steps, and less to overfit with few malignant lesions."""
    per_fold: int = bound(1, 0, 20)
    """Independently seeded models per fold, whose logits are averaged; 0: none, for data without pictures, and then
    the metadata alone is learned from (`tabular`)."""


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    name: str = bound("adamw", choices=("adamw", "adam"))
    lr: float = bound(1e-3, 1e-7, 1)
    """Peak learning rate."""
    weight_decay: float = bound(0.01, 0, 1)
    """Decoupled decay of matrices and kernels; norms and biases are spared (adamw only)."""
    schedule: str = bound("cosine", choices=("cosine", "constant"))
    """Per step, after the warm-up."""
    warmup: float = bound(0.1, 0, 0.9)
    """Share of all steps with a linear warm-up."""
    clip: float = bound(1.0, 0, 1000)
    """Gradient norm is clipped to this; 0 leaves it alone."""


@dataclass(frozen=True)
class Training:
    """The fixed schedule; no epoch is picked on the fold that is scored."""

    epochs: int = bound(10, 1, 10_000)
    """Passes of the sampler."""
    batch_size: int = bound(32, 1, 8192)
    """Lesions per optimiser step over all processes together."""
    ema: float = bound(0.99, 0, 0.99999)
    """Decay per step of the weights' moving average that is scored and exported; 0 uses the last weights."""
    auxiliary: float = bound(0.0, 0, 10)
    """Weight of a second loss beside malignant or not: which kind of diagnosis (`iddx_2`; a target, never an input)."""
    precision: str = bound("auto", choices=("auto", "fp32", "bf16"))
    """`auto` takes what is fastest on the device: bf16 on CUDA, fp32 on a CPU."""
    validate_every: float = bound(0.0, 0, 10_000)
    """pAUC on the held-out fold every so many epochs and at the end, for the curves only; 0: never."""
    validate_lesions: int = bound(1024, 0, 10_000_000)
    """Held-out lesions looked at each time: all malignant ones and a sample of the others, whose error the curve
    tells (`pauc_error`); 0: all of them."""
    checkpoint_every: float = bound(1.0, 0.001, 10_000)
    """Epochs between checkpoints."""
    checkpoint_minutes: float = bound(10.0, 0.01, 1440)
    """A checkpoint is made after so many minutes at the latest: what a crash may cost. A stop is always saved."""
    checkpoint_cost: float = bound(0.02, 0.001, 1)
    """Share of the time that checkpoints may take; those at epochs' ends that would cost more are left out."""
    cache: str = bound("auto", choices=("auto", "on", "off"))
    """Keep all pictures decoded, at `image.size`, in a file beside the store; the weights are the same either way.
    `auto` does so if the schedule draws more pictures over all folds than there are, so that decoding each once is
    less work, and if twice the space is free (401,059 lesions at 128 pixels take 20 GB)."""
    tta: str = bound("none", choices=("none", "flips"))
    """Views averaged when a lesion is scored: `flips` is the crop and its three mirror images, in the graph."""


@dataclass(frozen=True)
class Tabular:
    """Boosted trees on a lesion's metadata, and on how it compares with the same patient's other lesions."""

    lightgbm: int = bound(0, 0, 50)
    """LightGBM models per fold, each with its own seed and draw of benign lesions, whose log-odds are averaged.
    Without any member of the three kinds the metadata isn't used."""
    catboost: int = bound(0, 0, 50)
    """CatBoost models per fold (needs `pip install lesionflow[boosters]`)."""
    xgboost: int = bound(0, 0, 50)
    """XGBoost models per fold (needs the same)."""
    derived: bool = True
    """Published features made of a lesion's own columns: colour contrast, shape, size ratios, location."""
    context: bool = True
    """Differences, ranks and robust z-scores within the patient, and within the patient's body site."""
    neighbours: bool = True
    """Distances to and outlyingness among the patient's own lesions."""
    negatives: float = bound(0.0, 0, 100_000)
    """Benign lesions drawn per malignant one, afresh for each model; 0: all of them."""
    rounds: int = bound(200, 1, 20_000)
    """Trees per model: fixed, since a number picked on the fold that is scored would flatter."""
    learning_rate: float = bound(0.03, 1e-4, 1)
    leaves: int = bound(15, 2, 1024)
    """Leaves per tree."""
    min_leaf: int = bound(20, 1, 100_000)
    """Fewest lesions in a leaf."""
    columns: float = bound(0.3, 0.01, 1)
    """Share of the features that a tree may look at."""
    rows: float = bound(0.8, 0.05, 1)
    """Share of the lesions that a tree learns from."""
    l2: float = bound(5.0, 0, 10_000)
    """Penalty on leaf values."""
    missing: str = bound("refuse", choices=("refuse", "allow"))
    """What to do where empty cells alone tell malignant from benign lesions, which a model would learn."""

    @property
    def members(self) -> int:
        """Boosted models per fold; 0: the metadata isn't used."""
        return self.lightgbm + self.catboost + self.xgboost

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks of features (`data.features`) that are used, those of the lesion alone first."""
        wanted = {"plain": True, "derived": self.derived, "context": self.context, "neighbours": self.neighbours}
        return tuple(name for name, used in wanted.items() if used)


@dataclass(frozen=True)
class Stack:
    """How the picture's and the metadata's scores become one."""

    method: str = bound("auto", choices=("auto", "trees", "linear", "rank"))
    """`trees` learn from the features and the picture's log-odds together, `linear` weighs two log-odds, `rank`
    averages two ranks; `auto` takes, for each fold, what ranks best in the other folds."""
    noise: float = bound(0.0, 0, 5)
    """Standard deviation of the noise on the picture's log-odds while trees learn from them."""


@dataclass(frozen=True)
class Evaluation:
    """How scores become figures."""

    replicates: int = bound(2000, 100, 100_000)
    """Patient-clustered bootstrap replicates."""
    seed: int = bound(0, 0)
    sensitivity: float = bound(0.9, 0.5, 0.999)
    """Sensitivity that the band `refer` is chosen for: its one-sided 95 % lower bound reaches this."""
    low_sensitivity: float = bound(0.95, 0.5, 0.999)
    """The same for `refer` and `routine` together; what is below them is `low`."""
    prevalence: float = bound(0.00098, 0, 0.5)
    """Share of malignant lesions where the model will be used, that probabilities are stated for; 0: as in the data.
    By default that of the whole SLICE-3D collection, 393 of 401,059."""


@dataclass(frozen=True)
class Gate:
    """What a model must show before it may be exported and deployed."""

    pauc_floor: float = bound(0.02, 0, 0.2)
    """The pAUC interval's lower bound must not be under this (0.02 is a coin)."""
    sensitivity_floor: float = bound(0.0, 0, 1)
    """One-sided 95 % lower bound of the served band `refer`'s sensitivity, on the hold-out; 0 doesn't ask."""
    delta: float = bound(0.01, 0, 0.2)
    """The paired pAUC difference to the incumbent's bundle must not be below -delta."""
    parity: float = bound(1e-4, 1e-7, 0.1)
    """Largest logit difference between torch and the exported graph."""


@dataclass(frozen=True)
class Recipe:
    """A run, completely described. Sections are documented on their own classes."""

    name: str
    description: str = ""
    seed: int = bound(0, 0)
    """Seed of initialisation, sampling and augmentation."""
    folds: Folds = Folds()
    image: ImageInput = ImageInput()
    sampling: Sampling = Sampling()
    augment: Augment = Augment()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    tabular: Tabular = Tabular()
    stack: Stack = Stack()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe by its path or the name of a shipped one; `overrides` are `section.field=value`.

        Raises `UsageError` naming the field for anything unknown, of the wrong type or out of bounds.
        """
        path = find(name_or_path)
        values = read_toml(path, "recipe")
        values.setdefault("name", path.stem)
        override_all(values, overrides)
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        recipe = build(cls, values, where, "")
        if not re.fullmatch(NAME, recipe.name):
            raise UsageError(
                f"{where}: name must be of letters, digits, dots, dashes, underscores, got {recipe.name!r}"
            )
        if not recipe.model.per_fold and not recipe.tabular.members:
            raise UsageError(
                f"{where}: neither a picture's model (model.per_fold) nor one of the metadata (tabular.lightgbm): "
                "nothing to train; set one of them to at least 1"
            )
        if (low := recipe.evaluation.low_sensitivity) < recipe.evaluation.sensitivity:
            raise UsageError(
                f"{where}: evaluation.low_sensitivity {low:g} is under evaluation.sensitivity "
                f"{recipe.evaluation.sensitivity:g}; lesions called low must miss fewer cancers, so raise it"
            )
        return recipe

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())


def shipped() -> dict[str, Path]:
    """Recipes by name: those of a source checkout, else those packed into the wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parents[1] / "recipes", here / "recipes"):
        if found := {p.stem: p for p in sorted(folder.glob("*.toml"))}:
            return found
    return {}


def find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise UsageError(f"recipe {path}: no such file")
        return path
    if (known := shipped()).get(str(name_or_path)) is None:
        raise UsageError(f"recipe {str(name_or_path)!r}: not one of {', '.join(known)}, nor a .toml file")
    return known[str(name_or_path)]

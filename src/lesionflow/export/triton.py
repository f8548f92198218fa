"""A Triton model repository, derived from a bundle: the same graph behind another server.

    OUT/<model name>/config.pbtxt      shapes, types and batching, from bundle.json
    OUT/<model name>/1/model.onnx      the bundle's image.onnx, byte for byte

Triton sees pixels and gives logits; decoding, calibration and bands stay with lesionflow, which goes
before it as a transformer (`lesionflow serve BUNDLE --predictor-host HOST`). No torch.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from lesionflow.bundle import GRAPH, Bundle
from lesionflow.errors import DataError, UsageError
from lesionflow.serving.graph import cam_shape

CONFIG = "config.pbtxt"
PREFERRED = (16, 32, 64)
"""Batch sizes that Triton sends at once instead of waiting for more."""
QUEUE_DELAY = 2000
"""Microseconds a request may wait for others to share its batch: little beside the decoding before it."""


def write_repository(bundle: Path, out: Path, *, max_batch: int = 64, gpu: bool = False) -> Path:
    """Write the repository `out` for a bundle that verifies, and return `out`; other models in it stay.

    Batches hold up to `max_batch` lesions. The model runs on the CPU, or with `gpu` on every GPU that
    Triton sees. The model's folder appears only once it is complete.

    Raises `DataError` for a bundle that doesn't verify, `UsageError` where the folder of that name isn't a model.
    """
    opened, out = Bundle.open(bundle), Path(out)
    if max_batch < 1:
        raise UsageError(f"max_batch must be at least 1, got {max_batch}")
    place = out / opened.name
    if place.exists() and not (place / CONFIG).is_file():
        raise UsageError(f"{place}: exists and is not a Triton model: choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    # Beside the repository, because Triton takes every folder in it for a model.
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model = work / opened.name
        (model / "1").mkdir(parents=True)
        (model / CONFIG).write_text(model_config(opened, max_batch=max_batch, gpu=gpu))
        (model / "1" / "model.onnx").write_bytes(opened.read(GRAPH))
        if place.exists():
            place.rename(work / "old")
        model.rename(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def model_config(bundle: Bundle, *, max_batch: int = 64, gpu: bool = False) -> str:
    """The text of config.pbtxt, a Triton ModelConfig. Raises `DataError` if bundle.json has other tensors."""
    graph, size, models = bundle.info["graph"], bundle.spec.size, bundle.models
    found = [(t.get("name"), t.get("datatype"), t.get("shape")) for t in graph.get("inputs", [])]
    found += [(t.get("name"), t.get("datatype"), t.get("shape")) for t in graph.get("outputs", [])]
    expected = [
        ("image", "UINT8", [-1, size, size, 3]),
        ("fold_logits", "FP32", [-1, models]),
        ("logit", "FP32", [-1]),
    ]
    if shape := cam_shape(bundle):
        expected.append(("cam", "FP32", [-1, *shape]))
    if found != expected:
        raise DataError(f"{bundle.path}: bundle.json's graph has {found}, not {expected}: export the bundle again")
    preferred = sorted({min(size, max_batch) for size in PREFERRED})
    # Triton's dims leave the batch out and may not be empty: `logit` is one value a lesion to a client,
    # and the reshape says that the graph gives it without that dimension.
    maps = f',\n  {{ name: "cam" data_type: TYPE_FP32 dims: [ {shape[0]}, {shape[1]} ] }}' if shape else ""
    return f"""name: "{bundle.name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
input [
  {{ name: "image" data_type: TYPE_UINT8 dims: [ {size}, {size}, 3 ] }}
]
output [
  {{ name: "fold_logits" data_type: TYPE_FP32 dims: [ {models} ] }},
  {{ name: "logit" data_type: TYPE_FP32 dims: [ 1 ] reshape {{ shape: [ ] }} }}{maps}
]
dynamic_batching {{
  preferred_batch_size: [ {", ".join(map(str, preferred))} ]
  max_queue_delay_microseconds: {QUEUE_DELAY}
}}
instance_group [
  {{ count: 1 kind: {"KIND_GPU" if gpu else "KIND_CPU"} }}
]
version_policy {{ latest {{ num_versions: 1 }} }}
parameters {{ key: "bundle" value {{ string_value: "{bundle.version}" }} }}
"""

"""The exported graph says what torch says, or there is no bundle."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lesionflow.bundle import Bundle, write_manifest
from lesionflow.data.images import PreprocessSpec
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.serving.predictor import Predictor

SIZE = 32


def by_hand(models, pixels, spec, flips=False):
    """Plain torch, straight from the definition: float64 [N, K]."""
    x = torch.from_numpy(pixels).double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)
    views = [x, x.flip(2), x.flip(3), x.flip(2).flip(3)] if flips else [x]
    with torch.no_grad():
        return np.stack([np.mean([m.double()(v).numpy() for v in views], axis=0) for m in map(copy_of, models)], axis=1)


def copy_of(model):
    import copy

    return copy.deepcopy(model)


def pixels(count, seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 3, 64])
def test_the_graph_agrees_with_torch_at_any_batch_size(bundle_dir, tiny_models, count):
    images = pixels(count)
    fold_logits, logit = Predictor(bundle_dir).logits(images)
    assert (fold_logits.shape, logit.shape) == ((count, 2), (count,))
    if count:
        expected = by_hand(tiny_models, images, PreprocessSpec(size=SIZE))
        np.testing.assert_allclose(fold_logits, expected, atol=1e-5)
        np.testing.assert_allclose(logit, expected.mean(1), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_batch_is_dynamic_in_the_graph_itself(bundle_dir, count):
    session = ort.InferenceSession(bundle_dir / "image.onnx")
    fold_logits, logit = session.run(None, {"image": pixels(count)})
    assert (fold_logits.shape, logit.shape) == ((count, 2), (count,))


def test_mirror_images_are_averaged_in_the_graph(export_tiny, tiny_models, tmp_path):
    export_tiny(tmp_path / "bundle", tta="flips")
    images = pixels(5)
    predictor = Predictor(tmp_path / "bundle")
    _, logit = predictor.logits(images)
    expected = by_hand(tiny_models, images, PreprocessSpec(size=SIZE), flips=True).mean(1)
    np.testing.assert_allclose(logit, expected, atol=1e-5)
    plain = by_hand(tiny_models, images, PreprocessSpec(size=SIZE)).mean(1)
    assert np.abs(plain - expected).max() > 0.01, "mirroring must matter for this test to mean anything"
    np.testing.assert_allclose(predictor.logits(images[:, ::-1, ::-1].copy())[1], logit, atol=1e-5)


def test_a_real_backbone_exports_lean_and_for_old_runtimes(tmp_path, encode):
    import onnx
    import timm

    from lesionflow.export.onnx import export_bundle

    torch.manual_seed(1)
    spec = PreprocessSpec(size=64)
    model = timm.create_model("mobilenetv3_small_050", num_classes=1)  # [B, 1], and in training mode.
    result = export_bundle(
        [model],
        tmp_path / "bundle",
        spec=spec,
        info={"name": "real"},
        parity_images=pixels(18, size=64),
        tolerance=1e-3,
        reference=[("a.jpg", encode(0))],
        card=None,
    )
    assert model.training, "the caller's model stays as it was"
    assert 0 < result["parity"]["max_abs"] <= 1e-3
    graph = onnx.load(tmp_path / "bundle" / "image.onnx")
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    assert graph.ir_version == 8
    kinds = {node.op_type for node in graph.graph.node}
    assert "BatchNormalization" not in kinds
    raw = (tmp_path / "bundle" / "image.onnx").read_bytes()
    assert b".py" not in raw, "no source paths or stack traces of the exporting machine"


def test_the_result_and_bundle_json_record_parity(bundle_dir, export_tiny, tmp_path):
    result = export_tiny(tmp_path / "b")
    info = Bundle.open(tmp_path / "b").info
    assert info["parity"] == result["parity"]
    assert info["parity"]["count"] == 20
    assert 0 <= info["parity"]["mean_abs"] <= info["parity"]["max_abs"] <= 1e-4
    assert info["graph"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, SIZE, SIZE, 3]}]
    assert info["graph"]["outputs"][0]["shape"] == [-1, 2]
    assert info["synthetic"] is True
    answers = json.loads((tmp_path / "b/reference/answers.json").read_text())["answers"]
    assert [a["file"] for a in answers] == ["a.png", "b.jpg"]


class Unfaithful(nn.Module):
    """Says one thing in torch and another when traced for export."""

    def __init__(self, off):
        super().__init__()
        self.off = off

    def forward(self, x):
        answer = x.mean((1, 2, 3))
        return answer + self.off if torch.compiler.is_compiling() else answer


@pytest.mark.parametrize("off", [2e-4, -5.0, float("nan")])
def test_a_graph_that_differs_is_refused_and_leaves_nothing(export_tiny, tmp_path, off):
    with pytest.raises(GateRefused, match="parity"):
        export_tiny(tmp_path / "bundle", models=[Unfaithful(off)])
    assert list(tmp_path.iterdir()) == []


def test_the_unfaithful_model_passes_once_the_difference_is_allowed(export_tiny, tmp_path):
    result = export_tiny(tmp_path / "bundle", models=[Unfaithful(2e-4)], tolerance=1e-3)
    assert result["parity"]["max_abs"] == pytest.approx(2e-4, rel=0.01)


def test_a_refused_export_leaves_the_old_bundle_working(export_tiny, bundle_copy):
    before = Bundle.open(bundle_copy).version
    with pytest.raises(GateRefused):
        export_tiny(bundle_copy, models=[Unfaithful(1.0)])
    assert Bundle.open(bundle_copy).version == before
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["bundle"]


def test_a_complete_export_replaces_the_old_bundle(export_tiny, tiny_models, bundle_copy):
    export_tiny(bundle_copy, models=tiny_models[:1], info={"name": "next"})
    assert (Bundle.open(bundle_copy).name, Bundle.open(bundle_copy).models) == ("next", 1)
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_not_a_bundle_is_never_replaced(export_tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        export_tiny(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_that_cannot_be_exported_is_a_clear_error(export_tiny, tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) if x.sum().item() > 0 else x.amax((1, 2, 3))

    with pytest.raises(UsageError, match="can't be exported"):
        export_tiny(tmp_path / "bundle", models=[Branching()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"models": []},
        {"tta": "all"},
        {"parity_images": pixels(0)},
        {"parity_images": pixels(2, size=16)},
        {"reference": []},
        {"reference": [("../a.png", b"")]},
        {"reference": [("answers.json", b"")]},
    ],
)
def test_arguments_that_make_no_bundle_are_refused_at_once(export_tiny, tmp_path, changes):
    with pytest.raises(UsageError):
        export_tiny(tmp_path / "bundle", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_exporter_is_silent(export_tiny, tmp_path, capfd):
    export_tiny(tmp_path / "bundle")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- Class-activation maps -------------------------------------------------------------------------------------------


def maps_by_hand(models, pixels, spec, flips=False):
    """Weights x features + bias from the definition, float64 [N, h, w], without the code under test."""
    x = torch.from_numpy(pixels).double().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)
    folds = []
    for model in models:
        members = []
        for network in copy_of(model).double().networks:
            weight, bias = network.classifier.weight[0], network.classifier.bias
            for axes in [[], [2], [3], [2, 3]] if flips else [[]]:
                with torch.no_grad():
                    features = network.forward_features(torch.flip(x, axes))
                cam = (features * weight.view(1, -1, 1, 1)).sum(1, keepdim=True) + bias
                members.append(torch.flip(cam, axes)[:, 0].detach().numpy())
        folds.append(np.mean(members, axis=0))
    return np.mean(folds, axis=0)


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_the_graphs_maps_are_the_definition_and_their_mean_is_the_logit(export_tiny, pooling_models, tmp_path, tta):
    result = export_tiny(tmp_path / "bundle", models=pooling_models, tta=tta)
    predictor, images = Predictor(tmp_path / "bundle"), pixels(21)
    fold_logits, logit, cam = predictor.graph.explained(images)
    assert cam.shape == (21, 8, 8)
    assert predictor.graph.explained(images[:0])[2].shape == (0, 8, 8)
    np.testing.assert_allclose(cam, maps_by_hand(pooling_models, images, predictor.spec, tta == "flips"), atol=1e-4)
    np.testing.assert_allclose(cam.mean((1, 2)), logit, atol=1e-5)
    assert np.abs(cam - logit[:, None, None]).max() > 0.05, "the maps must vary for this test to mean anything"
    np.testing.assert_array_equal(predictor.logits(images)[0], fold_logits)
    assert 0 <= result["parity"]["cam_max_abs"] <= 1e-4
    info = Bundle.open(tmp_path / "bundle").info
    assert info["graph"]["outputs"][2] == {"name": "cam", "datatype": "FP32", "shape": [-1, 8, 8]}
    session = ort.InferenceSession(tmp_path / "bundle/image.onnx")
    assert [output.name for output in session.get_outputs()] == ["fold_logits", "logit", "cam"]


@pytest.mark.parametrize(
    ("backbone", "size", "expected"),
    [
        ("test_efficientnet", 64, (2, 2)),
        ("test_resnet", 96, (3, 3)),
        ("tf_efficientnet_lite0", 96, (3, 3)),
        ("test_efficientnet", 32, None),  # One place is no map.
        # Something nonlinear comes after the pooling, or there is none: a mean over places isn't the logit.
        ("mobilenetv3_small_050", 96, None),
        ("test_convnext", 96, None),
        ("test_vit", 160, None),
    ],
)
def test_only_networks_whose_maps_are_exact_have_any(backbone, size, expected):
    import timm

    from lesionflow.export.graph import map_shape

    torch.manual_seed(0)
    network = timm.create_model(backbone, num_classes=1).eval()
    assert map_shape([network], torch.randn(3, 3, size, size)) == expected


def test_a_graph_without_maps_says_so(bundle_dir):
    assert [o["name"] for o in Bundle.open(bundle_dir).info["graph"]["outputs"]] == ["fold_logits", "logit"]
    assert "cam_max_abs" not in Bundle.open(bundle_dir).info["parity"]
    graph = Predictor(bundle_dir).graph
    assert graph.cam_shape is None
    with pytest.raises(UsageError, match="no class-activation maps"):
        graph.explained(pixels(1))


def test_a_head_that_only_looks_linear_is_found_out(export_tiny, pooling_models, tmp_path):
    """The classifier is there, but the network clips its logit: only the figures show that the map isn't exact."""
    odd = copy_of(pooling_models[0])
    head = odd.networks[0].forward_head
    odd.networks[0].forward_head = lambda features: head(features).clamp(max=-0.05)
    export_tiny(tmp_path / "bundle", models=[odd])
    assert len(Bundle.open(tmp_path / "bundle").info["graph"]["outputs"]) == 2


def test_maps_that_differ_from_torchs_refuse_the_export(export_tiny, pooling_models, tmp_path, monkeypatch):
    """Planted: the graph forgets to mirror a map back. Its mean is still the logit; its places are wrong."""
    from lesionflow.export import graph

    monkeypatch.setattr(graph, "_map", lambda network, features, right=graph._map: right(network, features).flip(1))
    with pytest.raises(GateRefused, match="class-activation maps"):
        export_tiny(tmp_path / "bundle", models=pooling_models)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_the_maps_that_bundle_json_lists_is_refused(bundle_copy):
    info = json.loads((bundle_copy / "bundle.json").read_text())
    info["graph"]["outputs"].append({"name": "cam", "datatype": "FP32", "shape": [-1, 2, 2]})
    (bundle_copy / "bundle.json").write_text(json.dumps(info))
    write_manifest(bundle_copy)
    with pytest.raises(DataError, match="cam"):
        Predictor(bundle_copy)


def test_a_graph_that_says_something_else_than_was_evaluated_is_refused(export_tiny, tmp_path, bundle_dir):
    predictor = Predictor(bundle_dir)
    size = predictor.spec.size
    images = np.random.default_rng(0).integers(0, 255, (4, size, size, 3), np.uint8)
    evaluated = predictor.logits(images)[1].astype(np.float64)
    made = export_tiny(tmp_path / "same", parity_images=images, evaluated=evaluated[:3])
    assert made["parity"]["evaluated_max_abs"] <= 1e-4
    evaluated[1] += 0.01
    with pytest.raises(GateRefused, match="thresholds were chosen"):
        export_tiny(tmp_path / "other", parity_images=images, evaluated=evaluated)
    assert not (tmp_path / "other").exists()

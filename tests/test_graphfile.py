"""A graph that isn't what a bundle may hold is refused from its bytes, at once; every graph we make passes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lesionflow.bundle import GRAPH
from lesionflow.errors import DataError
from lesionflow.graphfile import check_graph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model(nodes=(), tensors=(), *, domain: str = "", functions=()) -> bytes:
    graph = helper.make_graph(list(nodes), "g", [], [], list(tensors))
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions)).SerializeToString()


def tensor(dims, kind=FLOAT, raw: bytes = b"", **fields) -> TensorProto:
    made = TensorProto(dims=dims, data_type=kind, name="t", **fields)
    if raw:
        made.raw_data = raw
    return made


def shape(*values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), "s")


def external() -> TensorProto:
    made = tensor([4])
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="location", value="/etc/passwd")
    return made


def nested(depth: int) -> bytes:
    inner = helper.make_graph([], "g", [], [])
    for _ in range(depth):
        inner = helper.make_graph([helper.make_node("Identity", [], [], body=inner)], "g", [], [])
    return helper.make_model(inner).SerializeToString()


def function() -> bytes:
    made = helper.make_function("own", "F", [], [], [helper.make_node("Identity", ["x"], ["y"])], [])
    return model([helper.make_node("F", ["x"], ["y"], domain="own")], domain="own", functions=[made])


UNUSED = helper.make_function("own", "F", [], [], [helper.make_node("Identity", ["x"], ["y"])], [])


def constant(value: TensorProto) -> bytes:
    return model([helper.make_node("Constant", [], ["c"], value=value)])


HOSTILE = {
    "data in another file": (model(tensors=[external()]), "another file"),
    "in an attribute": (constant(external()), "another file"),
    "terabytes declared": (model(tensors=[tensor([1 << 40, 4], raw=b"1234")]), "larger than its data"),
    "terabytes declared without data": (model(tensors=[tensor([1 << 20, 1 << 20])]), "larger than its data"),
    "sizes that overflow": (model(tensors=[tensor([1 << 32, 1 << 32, 1 << 32], raw=b"12")]), "larger than its data"),
    "a negative size": (model(tensors=[tensor([-4], raw=b"12345678")]), "negative size"),
    "more data than declared": (model(tensors=[tensor([1], raw=b"x" * 400)]), "isn't of the size"),
    "a few values for many": (model(tensors=[tensor([1000], float_data=[1.0, 2.0])]), "larger than its data"),
    "a shape of gigabytes": (model(tensors=[shape(4096, 4096, 64)]), "constant shape"),
    "one huge number": (model(tensors=[shape(1 << 40)]), "could be a size"),
    "a shape in an attribute": (constant(shape(1 << 14, 1 << 14)), "constant shape"),
    "a shape as plain values": (model(tensors=[tensor([2], INT64, int64_data=[1 << 20, 1 << 20])]), "constant shape"),
    "a loop": (model([helper.make_node("Loop", [], [])]), "a node Loop"),
    "a branch": (model([helper.make_node("If", [], [])]), "a node If"),
    "chance": (model([helper.make_node("RandomNormal", [], ["r"], shape=[9])]), "RandomNormal"),
    "another's operator": (model([helper.make_node("Py", [], [], domain="evil")], domain="evil"), "'evil'"),
    "a function of its own": (function(), "not of ONNX itself"),
    "an unused function": (model(functions=[UNUSED], domain="own"), "functions of its own"),
    "nested without end": (nested(25), "not a readable"),
    "too many nodes": (model([helper.make_node("Relu", ["x"], ["x"])] * 50_001), "50,000 nodes"),
    "nothing": (b"\xff" * 50, "not a readable"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_graph_is_refused_before_a_runtime_sees_it(kind):
    data, words = HOSTILE[kind]
    with pytest.raises(DataError, match=f"^bundle/{GRAPH}: .*{words}"):
        check_graph(data, f"bundle/{GRAPH}")


def test_what_we_export_passes_quickly(bundle_dir: Path, finished: Path):
    for folder in (bundle_dir, finished / "bundle"):
        data = (folder / GRAPH).read_bytes()
        started = time.process_time()
        check_graph(data, GRAPH)
        assert time.process_time() - started < 0.5


def test_ordinary_constants_pass():
    check_graph(model(tensors=[shape(-1, 1280, 49), shape(0, 2**63 - 1), shape(-(2**63), 5)]), GRAPH)
    check_graph(model(tensors=[numpy_helper.from_array(np.zeros((3, 5), np.float32), "w")]), GRAPH)
    check_graph(model(tensors=[tensor([3], float_data=[1.0, 2.0, 3.0]), tensor([0])]), GRAPH)


def test_damaged_bytes_are_refused_or_pass_but_never_crash(bundle_dir: Path):
    data, rng = (bundle_dir / GRAPH).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randrange(1, 30)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            check_graph(bytes(changed), GRAPH)
        except DataError:
            refused += 1
    assert refused > 100

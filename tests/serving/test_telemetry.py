"""What the service counts, as Prometheus' own parser reads it."""

from __future__ import annotations

import base64
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lesionflow.serving.app import create_app
from lesionflow.serving.drift import Gauge
from lesionflow.serving.protocol import ServiceLimits
from lesionflow.serving.telemetry import Telemetry

INFER = "/v2/models/tiny/infer"


@pytest.fixture
def client(bundle_dir):
    with TestClient(create_app(bundle_dir, limits=ServiceLimits(images=4))) as client:
        deadline = time.monotonic() + 20
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
        yield client


def samples(client) -> dict[tuple[str, frozenset], float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = [one for family in text_string_to_metric_families(answer.text) for one in family.samples]
    return {(one.name, frozenset(one.labels.items())): one.value for one in found}


def ask(client, images) -> int:
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images)], "data": data}
    return client.post(INFER, json={"inputs": [tensor]}).status_code


def test_requests_lesions_batches_and_refusals_are_counted(client, encode) -> None:
    assert [ask(client, [encode(n) for n in range(count)]) for count in (3, 1, 5)] == [200, 200, 400]
    client.get("/v2/models/ISIC_0000001")
    found = samples(client)
    route = ("route", "/v2/models/{name}/infer")

    def at(name: str, *labels: tuple[str, str]) -> float:
        return found["lesionflow_" + name, frozenset(labels)]

    assert at("requests_total", ("method", "POST"), route, ("status", "200")) == 2
    assert at("requests_total", ("method", "POST"), route, ("status", "400")) == 1
    assert at("refusals_total", ("limit", "images")) == 1
    assert at("request_seconds_count", route) == 3
    assert sum(value for (name, _), value in found.items() if name == "lesionflow_lesions_total") == 4
    # The reference lesions, checked at the start, are not among the batches.
    assert (at("batch_lesions_sum"), at("batch_lesions_count")) == (4, 2)
    assert at("graph_seconds_total") > 0
    assert (at("ready"), at("requests_running"), at("lesions_waiting")) == (1, 1, 0)
    assert [dict(labels)["model"] for name, labels in found if name == "lesionflow_model_info"] == ["tiny"]
    assert "ISIC_0000001" not in str(found), "what a client makes up is no label"


def test_drift_is_told(client) -> None:
    class Double:
        def gauges(self) -> list[Gauge]:
            return [
                Gauge("shift", {"institution": "", "figure": "brightness", "test": "level"}, 0.25),
                Gauge("windows", {"institution": ""}, 2),
            ]

    client.app.state.telemetry = telemetry = Telemetry(client.app.state.service, Double())
    for _ in range(2):
        text = telemetry.render()[0].decode()
    assert 'lesionflow_drift_shift{figure="brightness",institution="",test="level"} 0.25' in text
    assert 'lesionflow_drift_windows{institution=""} 2.0' in text


def test_an_institution_that_is_no_longer_looked_at_is_no_longer_told(bundle_dir):
    class Drifts:
        names = ("here", "there")

        def gauges(self):
            return [SimpleNamespace(name="shift", labels={"institution": n}, value=1.0) for n in self.names]

    app = create_app(bundle_dir)
    telemetry = app.state.telemetry
    telemetry._drift = Drifts()
    assert b'institution="there"' in telemetry.render()[0]
    telemetry._drift.names = ("here",)
    body = telemetry.render()[0]
    app.state.service.close()
    assert b'institution="here"' in body and b'institution="there"' not in body

"""A stand-in for the Kubeflow Pipelines API: takes what kfp's own client submits and really runs it.

    with Pipelines(double) as pipelines:
        kfp.Client(host=pipelines.url).create_run_from_pipeline_package(...)

The submitted IR is executed by `kfp.local`, each component a process of its own, and the run's state,
its tasks' states and a failed component's pod (with its log, in the double's store) are served as the
real API and cluster would. Not here: KFP's own backend (driver, launcher, cache, artifact store,
multi-user authorisation), images, volumes and secrets of the component pods.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from double.server import Double

RUNNER = """
import json, sys
from kfp import components, local
pipeline = components.load_component_from_file(sys.argv[1])
local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[3])
pipeline(**json.loads(open(sys.argv[2]).read()))
"""
_TASK = re.compile(r"Task \S*?'([\w-]+)'\S* finished with status \S*?(SUCCESS|FAILURE)")
_STARTED = re.compile(r"Executing task \S*?'([\w-]+)'")


class Pipelines:
    """Serves /apis/v2beta1 on loopback until it is left; runs that still go are stopped then."""

    def __init__(self, double: Double, *, namespace: str = "team", environment: dict[str, str] | None = None) -> None:
        self.double, self.namespace, self.environment = double, namespace, environment or {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.specs: dict[str, dict[str, Any]] = {}
        """Run id -> what was submitted: pipeline_spec and runtime_config."""
        self.outputs: dict[str, str] = {}
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="lesionflow-kfp-")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Pipelines:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run_id in self._children:
            self.terminate(run_id)
        self._server.shutdown()
        self._server.server_close()
        self._scratch.cleanup()

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        run_id = str(uuid.uuid4())
        self.specs[run_id] = body
        run = {
            "run_id": run_id,
            "display_name": body["display_name"],
            "experiment_id": body.get("experiment_id"),
            "state": "RUNNING",
            "created_at": _now(),
            "run_details": {"task_details": []},
        }
        self.runs[run_id] = run
        threading.Thread(target=self._execute, args=(run_id, body), daemon=True).start()
        return run

    def terminate(self, run_id: str) -> None:
        child = self._children[run_id]
        if child.poll() is None:
            self.runs[run_id]["state"] = "CANCELING"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _execute(self, run_id: str, body: dict[str, Any]) -> None:
        folder = Path(self._scratch.name) / run_id
        folder.mkdir(parents=True)
        spec = body["pipeline_spec"]
        documents = [spec["pipeline_spec"], spec["platform_spec"]] if "pipeline_spec" in spec else [spec]
        (folder / "pipeline.yaml").write_text(yaml.safe_dump_all(documents))
        (folder / "arguments.json").write_text(json.dumps(body["runtime_config"]["parameters"]))
        arguments = [str(folder / name) for name in ("pipeline.yaml", "arguments.json", "root")]
        child = subprocess.Popen(
            [sys.executable, "-c", RUNNER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        self._children[run_id] = child
        tasks: dict[str, dict[str, Any]] = {}
        lines: list[str] = []
        assert child.stdout
        for line in child.stdout:
            lines.append(line)
            self.outputs[run_id] = "".join(lines)
            if match := _STARTED.search(line):
                tasks[match[1]] = {"display_name": match[1], "state": "RUNNING", "run_id": run_id}
            elif match := _TASK.search(line):
                state = "SUCCEEDED" if match[2] == "SUCCESS" else "FAILED"
                tasks[match[1]] = {"display_name": match[1], "state": state, "run_id": run_id}
                if state == "FAILED":
                    self._failed_pod(run_id, match[1], lines)
            self.runs[run_id]["run_details"] = {"task_details": list(tasks.values())}
        code = child.wait()
        stopped = self.runs[run_id]["state"] == "CANCELING"
        state = "CANCELED" if stopped else "SUCCEEDED" if code == 0 else "FAILED"
        self.runs[run_id] |= {"state": state, "finished_at": _now()}

    def _failed_pod(self, run_id: str, task: str, lines: list[str]) -> None:
        """The pod that a failed component leaves on a cluster: its log, and the launcher's exit code."""
        name = f"lesionflow-{run_id[:8]}-{task}"
        store = self.double.store
        store.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": self.namespace,
                    "labels": {"pipeline/runid": run_id},
                },
                # Nobody's to run: it has been run.
                "spec": {"containers": [{"name": "main", "image": "python"}], "schedulerName": "none"},
            }
        )
        store.set_status(
            "Pod",
            self.namespace,
            name,
            {
                "phase": "Failed",
                "containerStatuses": [
                    {
                        "name": "main",
                        "image": "python",
                        "imageID": "",
                        "ready": False,
                        "restartCount": 0,
                        # KFP's launcher ends with 1, whatever the step ended with.
                        "state": {"terminated": {"exitCode": 1, "reason": "Error"}},
                    }
                ],
            },
        )
        store.log_path(self.namespace, name, "main").write_text("".join(lines))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _handler(pipelines: Pipelines) -> type[BaseHTTPRequestHandler]:
    experiment = {"experiment_id": "e1", "display_name": "lesionflow", "created_at": _now()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, code: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].rstrip("/").removeprefix("/apis/v2beta1")
            if path == "/healthz":
                self.answer({"multi_user": False})
            elif path == "/experiments":
                self.answer({"experiments": [experiment]})
            elif path.startswith("/runs/") and (run := pipelines.runs.get(path.removeprefix("/runs/"))):
                self.answer(run)
            else:
                self.answer({"error": f"{path} not found", "code": 5}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            if self.path.rstrip("/").endswith("/runs"):
                self.answer(pipelines.submit(body))
            elif self.path.endswith(":terminate"):
                pipelines.terminate(self.path.rpartition("/")[2].removesuffix(":terminate"))
                self.answer({})
            elif self.path.rstrip("/").endswith("/experiments"):
                self.answer({**experiment, "display_name": body["display_name"]})
            else:
                self.answer({"error": f"{self.path} not found", "code": 5}, 404)

    return Handler

"""Triton's Python side of a backend called `onnxruntime`: runs inside a Triton server, not in the tests' process."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.outputs = [output["name"] for output in config["output"]]

    def execute(self, requests):
        """One call of the graph for all requests that Triton put together."""
        pixels = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        results = self.session.run(self.outputs, {"image": np.concatenate(pixels)})
        ends = np.cumsum([len(part) for part in pixels])[:-1]
        rows = zip(*(np.split(result, ends) for result in results), strict=True)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(n, p) for n, p in zip(self.outputs, parts, strict=True)])
            for parts in rows
        ]

"""The bundle's graph, running in this process on ONNX Runtime: pixels in, logits and maps out.

Batches are cut into pieces of `GRAPH_BATCH` views, so memory stays bounded however many lesions come. A light graph
works on each piece with one thread, on as many pieces at one time as there are threads: threads that share a piece
spend a tenth of the CPU on each other. A heavy one has all threads work on one piece, so that nobody waits long.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from lesionflow.bundle import GRAPH, Bundle
from lesionflow.data.images import Pixels
from lesionflow.errors import DataError, UsageError, missing_extra

GRAPH_BATCH = 16
"""Views per call: larger batches fall out of a CPU's cache and are slower (five lite0: 121/s at 16, 103/s at 64)."""

TOGETHER = 4
"""Views per call from which on larger calls cost no less of CPU for each."""
LIGHT = 0.05
"""Seconds that a light graph takes at most for one lesion with one thread."""

VIEWS = {"none": 1, "flips": 4}
"""Views of a lesion that the graph averages, by the bundle's `tta`."""

Floats = NDArray[np.float32]


class Graph:
    """A loaded graph. Safe to call from several threads."""

    def __init__(self, bundle: Bundle, threads: int | None = None, *, light: bool | None = None) -> None:
        """Load the graph onto `threads` CPU threads, by default all that this process may use.

        `light`: each call on one of them alone; by default where a lesion takes no longer than `LIGHT` so.

        Raises `DataError` if it can't be loaded or isn't what bundle.json says.
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise missing_extra("onnxruntime", "serve") from None
        self._where = bundle.path / GRAPH
        self._size, self._models = bundle.spec.size, bundle.models
        self.cam_shape = cam_shape(bundle)
        """Height and width of the class-activation maps, None if the graph gives none."""
        self._batch = lesions(bundle)
        data = bundle.read(GRAPH)

        def load(many: int) -> ort.InferenceSession:
            options = ort.SessionOptions()
            options.intra_op_num_threads = many
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # Idle threads would otherwise spin: much slower where cores are shared, no faster where they aren't.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            try:
                return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors share no base of their own.
                raise self._unusable(error) from None

        threads = threads or available_cpus()
        self.parallel = 1
        """Calls worth running at one time."""
        self._session = load(threads if light is False else 1)
        self._check()
        if threads > 1 and light is not False:
            if light or self._is_light():
                self.parallel = threads
            else:
                self._session = load(threads)
        self._pool = ThreadPoolExecutor(self.parallel, "graph piece")

    def logits(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """uint8 [B, S, S, 3] to (`fold_logits` float32 [B, K], `logit` float32 [B]); B may be 0.

        Raises `DataError` for any other shape or type.
        """
        fold_logits, logit = self._run(pixels, {"fold_logits": (self._models,), "logit": ()})
        return fold_logits, logit

    def explained(self, pixels: Pixels) -> tuple[Floats, Floats, Floats]:
        """As `logits`, and `cam` float32 [B, h, w]: the class-activation map, whose mean is the logit.

        Raises `UsageError` if the graph gives no maps.
        """
        self.require_maps()
        shapes = {"fold_logits": (self._models,), "logit": (), "cam": self.cam_shape or (0, 0)}
        fold_logits, logit, cam = self._run(pixels, shapes)
        return fold_logits, logit, cam

    @property
    def has_cam(self) -> bool:
        """Whether the graph gives class-activation maps."""
        return self.cam_shape is not None

    def require_maps(self) -> None:
        """Raise `UsageError` if the graph gives no class-activation maps."""
        if self.cam_shape is None:
            raise UsageError(
                f"{self._where}: gives no class-activation maps: its networks don't end in global average pooling and "
                "one linear layer, or it was exported before maps were; export the bundle again with such a backbone"
            )

    def _run(self, pixels: Pixels, shapes: Mapping[str, tuple[int, ...]]) -> list[Floats]:
        """The outputs named in `shapes` (name -> shape of one lesion's), float32 [B, ...] each."""
        check_pixels(pixels, self._size)
        outputs = [np.empty((len(pixels), *shape), dtype=np.float32) for shape in shapes.values()]

        def run(start: int) -> None:
            rows = slice(start, start + self._batch)
            feed = {"image": np.ascontiguousarray(pixels[rows])}
            for output, found in zip(outputs, self._session.run(list(shapes), feed), strict=True):
                output[rows] = found

        starts = range(0, len(pixels), self._batch)
        for _ in self._pool.map(run, starts) if len(starts) > 1 and self.parallel > 1 else map(run, starts):
            pass
        return outputs

    def _is_light(self) -> bool:
        """Whether one thread is fast enough for a lesion. The fastest of a few runs counts: others were disturbed."""
        pixels = np.zeros((1, self._size, self._size, 3), np.uint8)
        fastest = math.inf
        for _ in range(4):
            started = time.perf_counter()
            try:
                self._session.run(None, {"image": pixels})
            except Exception as error:
                raise self._unusable(error) from None
            fastest = min(fastest, time.perf_counter() - started)
            if not LIGHT < fastest < 4 * LIGHT:
                break
        return fastest <= LIGHT

    def _unusable(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return DataError(f"{self._where}: can't be loaded ({reason}): export the bundle again")

    def _check(self) -> None:
        size = self._size
        inputs = {i.name: (i.type, i.shape[1:]) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, o.shape[1:]) for o in self._session.get_outputs()}
        expected = {"image": ("tensor(uint8)", [size, size, 3])}
        if inputs != expected:
            raise DataError(f"{self._where}: takes {inputs}, bundle.json says {expected}: export the bundle again")
        promised: dict[str, list[int]] = {"fold_logits": [self._models], "logit": []}
        if self.cam_shape:
            promised["cam"] = list(self.cam_shape)
        for name, rest in promised.items():
            if outputs.get(name) != ("tensor(float)", rest):
                raise DataError(
                    f"{self._where}: gives {name} as {outputs.get(name)}, bundle.json says float {rest}: "
                    "export the bundle again"
                )


class NoGraph:
    """In place of the graph of a bundle that knows metadata alone: takes no picture."""

    parallel = 1
    cam_shape = None
    has_cam = False

    def __init__(self, bundle: Bundle) -> None:
        self._where, self._models = bundle.path, bundle.models

    def logits(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """Empty for no pixels. Raises `UsageError` for any."""
        if len(pixels):
            raise UsageError(f"{self._where}: knows metadata alone, no pictures: give it the lesions' metadata instead")
        return np.zeros((0, self._models), np.float32), np.zeros(0, np.float32)

    def explained(self, pixels: Pixels) -> tuple[Floats, Floats, Floats]:
        raise self.no_maps()

    def require_maps(self) -> None:
        raise self.no_maps()

    def no_maps(self) -> UsageError:
        """Why there are no class-activation maps."""
        return UsageError(f"{self._where}: knows metadata alone, so there are no maps of pictures")


def lesions(bundle: Bundle) -> int:
    """Lesions per call: `GRAPH_BATCH` views."""
    return max(1, GRAPH_BATCH // VIEWS[bundle.info.get("tta", "none")])


def cam_shape(bundle: Bundle) -> tuple[int, int] | None:
    """Height and width of the maps that bundle.json says the graph gives, None if it gives none.

    Raises `DataError` if it lists them in another shape.
    """
    for output in bundle.info["graph"].get("outputs", []):
        if output.get("name") == "cam":
            shape = output.get("shape")
            if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) for n in shape):
                raise DataError(f"{bundle.path}: bundle.json has cam as {shape}: export the bundle again")
            return int(shape[1]), int(shape[2])
    return None


def check_pixels(pixels: Pixels, size: int) -> None:
    """Raise `DataError` unless `pixels` are uint8 [B, size, size, 3]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
        raise DataError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}, the model takes uint8 [B, {size}, {size}, 3]: "
            "resize with `to_pixels`, or send the encoded image"
        )


def available_cpus() -> int:
    """CPUs this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""What deploy/ promises: images by rule, objects as the package makes them, accepted by every version's schemas."""

from __future__ import annotations

import fnmatch
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lesionflow import __version__
from lesionflow.cli import app
from lesionflow.cluster import clean
from lesionflow.cluster.settings import Settings

Object = dict[str, Any]

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = ("train", "serve")
SECRET = re.compile(r"token|secret|passw|credential|api_?key|kaggle\.json|\.netrc", re.IGNORECASE)


def dockerfile(name: str) -> str:
    return (IMAGES / f"{name}.Dockerfile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, the rest) for each, comments gone and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def admitted(path: str, ignore: str) -> bool:
    """Whether .dockerignore's last matching line lets a file into the build context."""
    inside = True
    parts = Path(path).parts
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in filter(None, (raw.strip() for raw in ignore.splitlines())):
        if line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        deep = pattern.startswith("**/")
        tried = parts if deep else prefixes
        if any(fnmatch.fnmatchcase(part, pattern.removeprefix("**/")) for part in tried):
            inside = line.startswith("!")
    return inside


def violations(text: str, ignore: str) -> list[str]:
    """Every rule of ours that a Dockerfile breaks."""
    found: list[str] = []
    steps = instructions(text)
    arguments: dict[str, str] = {}
    user, stages = "root", []
    for word, rest in steps:
        if word == "ARG":
            name, _, default = rest.partition("=")
            if not stages:
                arguments[name] = default
        if word == "FROM":
            if rest.split()[0] != "${BASE}${DIGEST:+@${DIGEST}}":
                found.append(f"FROM {rest}: the base is not BASE with an optional DIGEST")
            stages.append(rest)
            user = "root"
        if word == "ADD":
            found.append(f"ADD {rest}: COPY takes files of the context, and nothing else is taken")
        if word == "USER":
            user = rest
        if word == "COPY" and not rest.startswith("--from="):
            sources = shlex.split(rest)[:-1]
            wrong = [s for s in sources if s == "." or not (ROOT / s).exists() or not admitted(s, ignore)]
            found += [f"COPY {source}: not among what .dockerignore admits" for source in wrong]
        if word == "RUN":
            for command in re.split(r"&&|\||;", rest):
                apt = r"apt-get (update|install -y --no-install-recommends [a-z0-9 -]+)"
                if re.fullmatch(apt, command.strip()):
                    continue  # By name, from the base's own distribution.
                if re.search(r"\b(curl|wget|apt-get|apk|git|conda)\b|https?://", command):
                    found.append(f"RUN {command.strip()}: downloads something else than packages by name")
                if "pip install" in command and "--constraint" not in command:
                    found.append(f"RUN {command.strip()}: packages that nothing pins")
        if word in ("ARG", "ENV") and SECRET.search(rest):
            found.append(f"{word} {rest}: a secret's name; it would stay in the image's history")
        if word == "RUN" and re.search(r"--mount=type=secret|chmod\s+(-R\s+)?[0-7]*7[0-7]*7\b", rest):
            found.append(f"RUN {rest}: secrets or world-writable files")
    if "BASE" not in arguments or arguments.get("DIGEST") != "":
        found.append("no ARG BASE and empty ARG DIGEST before the first FROM")
    if arguments.get("BASE", "").count(":") != 1 or arguments.get("BASE", "").endswith(":latest"):
        found.append("ARG BASE has no version")
    identity = user.split(":")
    if not all(part.isdigit() and int(part) > 0 for part in identity) or len(identity) != 2:
        found.append(f"USER {user}: a number other than 0 is what Kubernetes can check")
    environment = " ".join(rest for word, rest in steps if word == "ENV")
    if "HOME=/tmp" not in environment or "PYTHONDONTWRITEBYTECODE=1" not in environment:
        found.append("writes outside of /tmp: HOME or byte code")
    if ("ENTRYPOINT", '["lesionflow"]') not in steps:
        found.append("the entry point is not lesionflow")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_images_keep_the_rules(name: str) -> None:
    assert violations(dockerfile(name), (ROOT / ".dockerignore").read_text()) == []


MISTAKES = {
    "root": ("USER 1000:1000", "USER root"),
    "no user": ("USER 1000:1000\n", ""),
    "a name instead of a number": ("USER 1000:1000", "USER app:app"),
    "user only in the build stage": (
        "WORKDIR /build",
        "USER 1000:1000\nWORKDIR /build",
        "USER 1000:1000\nEXPOSE",
        "EXPOSE",
    ),
    "no digest": ("${DIGEST:+@${DIGEST}}", ""),
    "digest unknown to FROM": ("ARG DIGEST=\n", ""),
    "latest": ("python:3.11-slim", "python:latest"),
    "add from the network": ("COPY src src", "ADD https://example.org/src.tar src"),
    "curl": ("RUN python -m venv", "RUN curl -O https://example.org/x && python -m venv"),
    "everything copied": ("COPY src src", "COPY . ."),
    "data copied": ("COPY src src", "COPY demo demo"),
    "unpinned": ("--constraint requirements.txt ", ""),
    "secret argument": ("WORKDIR /build", "ARG KAGGLE_KEY_TOKEN\nWORKDIR /build"),
    "secret in the environment": ("HOME=/tmp", "HOME=/tmp INDEX_PASSWORD=x"),
    "home on the root file system": ("HOME=/tmp", "HOME=/home/app"),
    "a shell to start": ('ENTRYPOINT ["lesionflow"]', 'ENTRYPOINT ["sh", "-c"]'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_rule_is_seen(mistake: str) -> None:
    text, changes = dockerfile("serve"), MISTAKES[mistake]
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    assert violations(text, (ROOT / ".dockerignore").read_text())


def test_the_build_context_holds_the_package_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    tracked = subprocess.run(
        ["git", "ls-files", "src", "recipes"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    needed = {*tracked, "pyproject.toml", "requirements.txt", "README.md", "LICENSE"}
    assert len(needed) > 80
    assert {path for path in needed if not admitted(path, ignore)} == set()
    for path in (
        "data/train-image.hdf5", "demo/run/bundle/image.onnx", "runs/first/oof.parquet", ".git/config", "kubeconfig",
        ".venv/bin/python", "kaggle.json", ".kaggle/kaggle.json", ".env", "src/lesionflow/.env", "wheel.whl",
        "src/lesionflow/__pycache__/cli.pyc", "src/lesionflow.egg-info/PKG-INFO", "tests/conftest.py",
        "notebooks/02_pipeline.ipynb", "deploy/kustomize/base/access.yaml", "build/lib/lesionflow/cli.py",
    ):  # fmt: skip
        assert not admitted(path, ignore), path


def test_the_images_are_those_of_the_settings_and_the_service_has_no_torch() -> None:
    bases = dict(rest.partition("=")[::2] for word, rest in instructions(dockerfile("train")) if word == "ARG")
    assert bases["BASE"] == Settings().image.train, "the packaged image stands on the one that is used without it"
    installed = [rest for word, rest in instructions(dockerfile("serve")) if word == "RUN"]
    assert [found for rest in installed for found in re.findall(r"\.\[(.*?)\]", rest)] == ["serve"]


@dataclass
class Build:
    """A build stage as far as a machine without Docker can follow it: COPY and RUN, in a folder."""

    root: Path
    folder: Path = field(default_factory=Path)

    def path(self, inside: str) -> Path:
        return self.root / inside.lstrip("/") if inside.startswith("/") else self.folder / inside

    def follow(self, text: str, ignore: str) -> None:
        stages = 0
        for word, rest in instructions(text):
            stages += word == "FROM"
            if stages != 1:
                continue
            if word == "WORKDIR":
                self.folder = self.path(rest)
                self.folder.mkdir(parents=True)
            elif word == "COPY":
                *sources, target = shlex.split(rest)
                for source in sources:
                    self._copy(
                        source, self.path(target) / source if target.endswith("/") else self.path(target), ignore
                    )
            elif word == "RUN":
                command = rest.replace("/opt/", f"{self.root}/opt/")
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                environment = {"PATH": path, **{k: v for k, v in os.environ.items() if k.startswith("PIP_")}}
                subprocess.run(
                    ["bash", "-ec", command], cwd=self.folder, check=True, env={"HOME": str(self.root), **environment}
                )

    def _copy(self, source: str, target: Path, ignore: str) -> None:
        origin = ROOT / source
        for file in [origin] if origin.is_file() else [p for p in origin.rglob("*") if p.is_file()]:
            if admitted(str(file.relative_to(ROOT)), ignore):
                goal = target if origin.is_file() else target / file.relative_to(origin)
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, goal)


@pytest.mark.slow
def test_what_the_serving_image_installs_serves_without_torch(tmp_path: Path, bundle_dir: Path) -> None:
    build = Build(tmp_path / "image")
    build.follow(dockerfile("serve"), (ROOT / ".dockerignore").read_text())
    binaries = tmp_path / "image" / "opt" / "lesionflow" / "bin"

    def run(*command: str) -> str:
        environment = {"PATH": str(binaries), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    installed = run(str(binaries / "pip"), "list", "--format=freeze")
    assert not re.search(r"^(torch|lightning|kfp|kubernetes|matplotlib)==", installed, re.MULTILINE)
    pinned = set((ROOT / "requirements.txt").read_text().split())
    theirs = {line for line in installed.split() if not line.startswith(("pip==", "setuptools==", "lesionflow"))}
    assert theirs <= pinned, "everything is as pinned"
    lesionflow = str(binaries / "lesionflow")
    assert "--ready-file" in run(lesionflow, "serve", "--help")
    assert "reproduced" in run(lesionflow, "verify", str(bundle_dir))
    assert f"lesionflow {__version__}" in run(lesionflow, "--version")


# Kustomize -----------------------------------------------------------------------------------------------------------

FITS = {
    "kubeflow-1.8": ("pytorchjob", ("kubeflow-1.8",)),
    "kubeflow-1.11": ("trainjob", ("kubeflow-1.11", "trainer-2.3")),
}
"""Overlay -> its launcher and the clusters it is for."""
FORMS = ((), ("triton",), ("serverless",), ("triton-serverless",))
OVERLAYS = [(version, device) for version in FITS for device in ("cpu", "gpu")]
NAMESPACE = "kubeflow-user-example-com"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "deploy" / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kubectl() -> str:
    return shutil.which("kubectl") or pytest.skip("no kubectl on this machine")


@pytest.fixture(scope="module")
def build(kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Object]]:
    """`build("kubeflow-1.11", "gpu", "triton")` -> the overlay's objects, with those components switched on in it."""

    def made(version: str, device: str, *components: str) -> list[Object]:
        tree = Path(shutil.copytree(ROOT / "deploy" / "kustomize", tmp_path_factory.mktemp("deploy") / "kustomize"))
        overlay = tree / "overlays" / version / device
        text = (overlay / "kustomization.yaml").read_text()
        for component in components:
            line = f"- ../../../components/{component}\n"
            assert f"# {line}" in text, "every component is offered where it can be switched on"
            text = text.replace(f"# {line}", line)
        (overlay / "kustomization.yaml").write_text(text)
        done = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return made


def named(objects: list[Object]) -> dict[tuple[str, str], Object]:
    return {(obj["kind"], obj["metadata"]["name"]): obj for obj in objects}


def test_the_rendered_files_are_what_the_package_makes(render: ModuleType) -> None:
    assert [str(path.relative_to(ROOT)) for path in render.stale()] == [], "run: python deploy/render.py"


@pytest.mark.parametrize("form", FORMS, ids="+".join)
@pytest.mark.parametrize(("version", "device"), OVERLAYS)
def test_an_overlay_is_what_the_same_settings_make(
    render: ModuleType, build: Callable[..., list[Object]], version: str, device: str, form: tuple[str, ...]
) -> None:
    """Patches on the base give exactly the objects that lesionflow makes from the settings file."""
    launcher, _ = FITS[version]
    images = {f"lesionflow-{part}": f"lesionflow-{part}:{__version__}" for part in DOCKERFILES}
    settings = [word for name in form for word in render.FORMS[name]]
    settings += [f"image.{part}={images[f'lesionflow-{part}']}" for part in DOCKERFILES] + [f"namespace={NAMESPACE}"]
    expected = render.objects(render.place(device, *settings), launcher)
    for obj in expected:
        obj["metadata"]["namespace"] = NAMESPACE
        for subject in obj.get("subjects", []):
            subject["namespace"] = NAMESPACE
    assert named(build(version, device, *form)) == named(expected)


@pytest.fixture(scope="module")
def crds() -> Path:
    folder = Path(os.environ.get("LESIONFLOW_CRDS", ROOT.parent / "shared" / "crds"))
    return folder if folder.is_dir() else pytest.skip(f"no upstream CRDs in {folder}: set LESIONFLOW_CRDS")


@pytest.fixture
def store(tmp_path: Path, crds: Path) -> Callable[[str], Any]:
    """`store(profile)` -> an empty cluster that validates against that profile's schemas."""
    from double.store import Store

    return lambda profile: Store(profile, crds, tmp_path / profile)


@pytest.mark.parametrize("form", FORMS, ids="+".join)
@pytest.mark.parametrize(
    ("version", "device", "profile"), [(v, d, profile) for v, d in OVERLAYS for profile in FITS[v][1]]
)
def test_every_object_of_every_overlay_is_valid(
    build: Callable[..., list[Object]],
    store: Callable[[str], Any],
    version: str,
    device: str,
    profile: str,
    form: tuple[str, ...],
) -> None:
    cluster = store(profile)
    objects = build(version, device, *form, "restricted")
    assert {"PersistentVolumeClaim", "Role", "RoleBinding", "NetworkPolicy", "InferenceService", "Namespace"} <= {
        obj["kind"] for obj in objects
    }
    for obj in sorted(objects, key=lambda obj: obj["kind"] != "Namespace"):
        cluster.create(obj)
    for obj in objects:
        assert cluster.get(obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


@pytest.mark.parametrize(("version", "profile"), [("kubeflow-1.8", "kubeflow-1.8"), ("kubeflow-1.11", "trainer-2.3")])
def test_kubectl_applies_an_overlay_and_finds_nothing_to_change_afterwards(
    kubectl: str, crds: Path, tmp_path: Path, version: str, profile: str
) -> None:
    """As in the tutorial: a server-side dry run, which stores nothing, the real thing, and what differs then."""
    from double.server import Double

    with Double(profile, crds) as double:
        double.store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        config = double.kubeconfig(tmp_path / "kubeconfig", namespace=NAMESPACE)
        overlay = str(ROOT / "deploy" / "kustomize" / "overlays" / version / "cpu")

        def run(*words: str) -> str:
            command = [kubectl, "--kubeconfig", str(config), *words, "-k", overlay]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        dry = run("apply", "--dry-run=server").splitlines()
        assert len(dry) >= 10
        assert not double.store.list("PersistentVolumeClaim", NAMESPACE)
        assert all("created" in line for line in run("apply").splitlines())
        assert len(double.store.list("PersistentVolumeClaim", NAMESPACE)) == 3
        assert run("diff") == "", "diff exits 1 where something differs"


def test_an_overlay_for_another_version_is_refused(
    build: Callable[..., list[Object]], store: Callable[[str], Any]
) -> None:
    from double.store import Refused

    job = next(obj for obj in build("kubeflow-1.11", "cpu") if obj["kind"] == "TrainJob")
    with pytest.raises(Refused, match="could not find"):
        store("kubeflow-1.8").create(job, "default")


def pods(obj: Any) -> Iterator[Object]:
    """Every pod spec within an object that is ours to write (Triton's runtime brings its own)."""
    if isinstance(obj, dict):
        if "containers" in obj:
            yield obj
        else:
            for value in obj.values():
                yield from pods(value)
    elif isinstance(obj, list):
        for value in obj:
            yield from pods(value)


@pytest.mark.parametrize(("version", "device"), OVERLAYS)
def test_pods_meet_the_restricted_standard(build: Callable[..., list[Object]], version: str, device: str) -> None:
    from double.admission import restricted

    found = [pod for obj in build(version, device, "triton") for pod in pods(obj)]
    assert len(found) == {"kubeflow-1.8": 3, "kubeflow-1.11": 2}[version]
    for pod in found:
        assert restricted(pod) == []
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]


def test_gpus_are_asked_for_where_they_are_and_nowhere_else(build: Callable[..., list[Object]]) -> None:
    for version, device in OVERLAYS:
        text = yaml.safe_dump_all(build(version, device))
        assert ("nvidia.com/gpu" in text) == (device == "gpu")


def test_the_role_covers_what_the_code_asks_the_cluster_for(render: ModuleType) -> None:
    """Calls of the API whose kind is written out: `api.list("Pod", ...)`; applying takes create and patch."""
    verbs = {"apply": ("create", "patch"), "logs": ("get",), "tail": ("get",), "events": ("list",), "serves": ()}
    asked: dict[str, set[str]] = {}
    for path in (ROOT / "src" / "lesionflow" / "cluster").glob("*.py"):
        for verb, kind in re.findall(r"api\.(\w+)\(\s*\"([A-Z]\w+)\"", path.read_text()):
            asked.setdefault(kind, set()).update(verbs.get(verb, (verb,)))
    for kind in itertools.chain.from_iterable(clean.ORDER):
        asked.setdefault(kind, set()).update(("list", "delete"))
    unknown = {kind: ask for kind, ask in asked.items() if not ask <= set(render.RIGHTS.get(kind, ()))}
    # Read by the doctor where it may, for the whole cluster: no namespace's role can give that.
    cluster_wide = {"Node", "Namespace", "StorageClass", "ClusterServingRuntime", "SelfSubjectAccessReview"}
    assert {kind: ask for kind, ask in unknown.items() if kind not in cluster_wide} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "settings").glob("*.toml")), ids=lambda path: path.stem)
def test_settings_files_load_and_say_how_to_use_them(path: Path) -> None:
    Settings.load(path)
    assert f"--cluster {path.relative_to(ROOT)}" in path.read_text()
    assert path.relative_to(ROOT).as_posix() in TUTORIAL


def test_the_base_alone_binds_the_role_to_the_pods_account(kubectl: str) -> None:
    overlay = ROOT / "deploy" / "kustomize" / "overlays" / "base"
    made = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, text=True, check=True).stdout
    (binding,) = [obj for obj in yaml.safe_load_all(made) if obj["kind"] == "RoleBinding"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "default-editor", "namespace": NAMESPACE}]


# The tutorial --------------------------------------------------------------------------------------------------------

TUTORIAL = (ROOT / "docs" / "cluster.md").read_text()


def commands() -> list[str]:
    """The tutorial's own commands: lines of its console blocks, and whole commands in running text."""
    blocks = "".join(re.findall(r"```console\n(.*?)```", TUTORIAL, re.DOTALL)).replace("\\\n", " ")
    lines = [line[2:] for line in blocks.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"```.*?```", "", TUTORIAL, flags=re.DOTALL)
    lines += [found.replace("\n", " ") for found in re.findall(r"`(lesionflow [^`]+)`", prose)]
    parts = (part.partition("  #")[0].strip() for line in lines for part in line.split(" && "))
    return sorted({part for part in parts if part.startswith("lesionflow ")})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_tutorial_exists_with_its_options(command: str) -> None:
    words = shlex.split(command)[1:]
    depth = 2 if words[0] in ("cluster", "data", "pipeline") else 1
    result = CliRunner().invoke(app, [*words[:depth], "--help"] if words[0] != "--version" else words)
    assert result.exit_code == 0, result.output
    text = re.sub(r"[^\w-]+", " ", result.output)
    for option in (w for w in words if w.startswith("--") and w != "--version"):
        assert option in text, f"{command}: no option {option}"
    settings = [value for flag, value in itertools.pairwise(words) if flag == "--on" and "..." not in value]
    settings = [value.replace("URL", "https://example.org").replace("REGISTRY", "example.org") for value in settings]
    Settings.load(overrides=settings)


def test_the_tutorial_names_only_what_is_there() -> None:
    for path in re.findall(r"(?<![\w/])((?:deploy|docs|notebooks|tests)/[\w./-]+\w)", TUTORIAL):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", TUTORIAL):
        assert (ROOT / "docs" / target).exists(), target
    for overlay in re.findall(r"`(overlays/[\w./-]+)`", TUTORIAL):
        assert (ROOT / "deploy" / "kustomize" / overlay / "kustomization.yaml").exists(), overlay


def test_the_table_of_settings_has_every_field_as_it_is() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "write_settings.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python docs/write_settings.py"
    for name, value in Settings().to_dict().items():
        for field_name in (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else (name,):
            assert f"| `{field_name}` |" in TUTORIAL


@pytest.mark.parametrize(
    "symptom",
    [
        "is pending",
        "no node can take it",
        "exceeded quota",
        "there is no image",
        "can't be pulled",
        "out of memory",
        "out of shared memory",
        "violates PodSecurity",
        "no cluster to talk to",
        "the gate refuses this model",
        "not allowed (403)",
    ],
)
def test_symptoms_are_the_words_that_the_code_says(symptom: str) -> None:
    said = "".join(path.read_text() for path in (ROOT / "src" / "lesionflow").rglob("*.py"))
    assert symptom in said
    assert symptom in TUTORIAL

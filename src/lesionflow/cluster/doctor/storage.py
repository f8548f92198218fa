"""The doctor's questions about storage: volumes that pods on several nodes can write at once."""

from __future__ import annotations

from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.doctor.scene import Answer, Scene, Unanswered, together
from lesionflow.cluster.settings import Place

_DEFAULT_CLASS = ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class")
# Parts of provisioners' names. One node at a time comes first: "rook-ceph.rbd" is not "rook-ceph.cephfs".
_ONE_NODE = (
    *("local-path", "openebs.io/local", "no-provisioner", "topolvm", "lvm", "zfs", "rbd", "ceph.rook.io/block"),
    *("ebs.csi", "aws-ebs", "pd.csi", "gce-pd", "disk.csi.azure", "azure-disk", "cinder", "blockvolume", "bs.csi"),
)
_ONE_MACHINE = ("hostpath", "host-path")
_SHARED = (
    *("longhorn", "nfs", "cephfs", "efs.csi", "file.csi.azure", "azure-file", "filestore", "gluster", "portworx"),
    *("pxd", "juicefs", "manila", "smb", "lustre", "weka", "beegfs", "quobyte", "rook"),
)


def storage(scene: Scene) -> Answer:
    """Whether new claims get a volume, and one that pods on several nodes can write at once."""
    volumes, job = scene.settings.volumes, scene.settings.job
    if not manifests.claims(scene.trial):
        return Answer("ok", "only existing claims are used")
    classes = {c["metadata"]["name"]: c for c in scene.read("StorageClass")}
    shared = "set volumes.storage_class to one whose volumes are shared (Longhorn, NFS, CephFS, EFS, Filestore), or "
    shared += (
        "volumes.access=ReadWriteOnce with job.node_selector=kubernetes.io/hostname=NODE, which keeps pods together"
    )
    default = [n for n, c in classes.items() if any(_notes(c).get(a) == "true" for a in _DEFAULT_CLASS)]
    name = volumes.storage_class or (default[0] if default else "")
    if not name:
        named = f"set volumes.storage_class to one of {', '.join(classes)}" if classes else "install one, as Longhorn"
        return Answer("fail", "the cluster has no default storage class: claims would stay pending", named)
    if name not in classes:
        known = ", ".join(classes) or "none"
        remedy = "set volumes.storage_class to one of these, or leave it empty for the default"
        return Answer("fail", f"there is no storage class {name}; the cluster has: {known}", remedy)
    faults = []
    if len(default) > 1 and not volumes.storage_class:
        remedy = "set volumes.storage_class, or unmark all but one as default"
        faults.append(Answer("warn", f"several storage classes are the default: {', '.join(default)}", remedy))
    provisioner = str(classes[name].get("provisioner", ""))
    machines = _machines(scene)
    if volumes.access == "ReadWriteOnce":
        if job.nodes > 1 and machines != 1 and not job.node_selector:
            text = "with volumes.access=ReadWriteOnce every pod must land on one node, but nothing keeps them together"
            remedy = "set job.node_selector=kubernetes.io/hostname=NODE, or volumes.access=ReadWriteMany"
            faults.append(Answer("warn", text, remedy))
    elif any(part in provisioner for part in _ONE_NODE):
        faults.append(Answer("fail", f"class {name} ({provisioner}) has no ReadWriteMany volumes", shared))
    elif any(part in provisioner for part in _ONE_MACHINE):
        text = f"class {name} ({provisioner}) gives each node a volume of its own"
        faults.append(Answer("warn" if machines == 1 else "fail", f"{text}, shared only on a single node", shared))
    elif not any(part in provisioner for part in _SHARED):
        text = f"whether class {name} ({provisioner}) has ReadWriteMany volumes isn't known"
        faults.append(Answer("warn", text, f"look into its documentation; if not, {shared}"))
    return together(faults, f"class {name} ({provisioner}), {volumes.access}")


def claims(scene: Scene) -> Answer:
    """Whether the claims that are there already can be mounted where the job needs them."""
    volumes, job = scene.settings.volumes, scene.settings.job
    named = {v: getattr(volumes, f"{v}_claim") for v in manifests.VOLUMES if getattr(volumes, f"{v}_claim")}
    wanted = {v: Place(scene.run, scene.settings).claim(v) for v in manifests.VOLUMES} if scene.run else named
    there = {c["metadata"]["name"]: c for c in scene.read("PersistentVolumeClaim")}
    faults = []
    for volume, name in wanted.items():
        claim = there.get(name)
        if claim is None:
            if volume in named:
                remedy = f"make it, or leave volumes.{volume}_claim empty: then the run makes one"
                faults.append(Answer("fail", f"volumes.{volume}_claim: there is no claim {name}", remedy))
            continue
        phase = claim.get("status", {}).get("phase", "Pending")
        if phase != "Bound":
            events = [e.get("message", "") for e in scene.api.events(name)]
            waits = any("first consumer" in e for e in events)
            cause = f" ({events[-1]})" if events and not waits else ""
            remedy = f"kubectl -n {scene.api.namespace} describe pvc {name} says why; usually class or size"
            text = f"claim {name} is {phase}, not Bound{cause}"
            if waits:
                faults.append(Answer("warn", f"{text}: it waits for its first pod", "nothing, if it is new"))
            else:
                faults.append(Answer("fail", text, remedy))
        elif job.nodes > 1 and "ReadWriteMany" not in claim["spec"].get("accessModes", []):
            remedy = (
                "use a ReadWriteMany claim, or keep the pods together: job.node_selector=kubernetes.io/hostname=NODE"
            )
            kept = job.node_selector or _machines(scene) == 1
            faults.append(
                Answer(
                    "warn" if kept else "fail",
                    f"claim {name} isn't ReadWriteMany, and {job.nodes} pods need it",
                    remedy,
                )
            )
    present = [name for name in wanted.values() if name in there]
    return together(faults, f"bound: {', '.join(present)}" if present else "none of the run's claims exists yet")


def _machines(scene: Scene) -> int | None:
    """How many nodes the cluster has; None if this account may not see them."""
    try:
        return len(scene.read("Node"))
    except Unanswered:
        return None


def _notes(obj: dict[str, Any]) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}

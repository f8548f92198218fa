"""One request to the API server double: which object it means, and the answer in the API's words."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from double import admission, answers, discovery, logs, patches, protobuf, tables, watches
from double.answers import Refused
from double.core import Kind
from double.store import Object, Store

if TYPE_CHECKING:
    from double.server import Double

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes; without this each answer waits 40 ms for the other side's acknowledgement.
    disable_nagle_algorithm = True

    # What this request is about: set by `_route`.
    kind: Kind
    version: str
    namespace: str
    name: str
    sub: str

    @property
    def double(self) -> Double:
        found: Double = self.server.double  # type: ignore[attr-defined]
        return found

    @property
    def store(self) -> Store:
        return self.double.store

    def _handle(self) -> None:
        self.started = False
        try:
            parts = urlsplit(self.path)
            self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
            # Read first: an answer before the body is read would break a kept connection.
            self.raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if delay := self.double.faults.get("delay"):
                time.sleep(delay)
            self._check_status("", "")
            path = [part for part in parts.path.split("/") if part]
            if (plain := discovery.answer(self.double, path, self.headers.get("Accept", ""))) is not None:
                self._send_plain(plain)
                return
            self._route(path)
            self._permit()
            getattr(self, f"_{self.command.lower()}")()
        except Refused as refused:
            self._send(refused.body(), refused.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception as error:  # a fault of the double's own must not look like a hang
            if not self.started:
                self._send(Refused(500, "InternalError", f"{type(error).__name__}: {error}").body(), 500)
            raise

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _route(self, path: list[str]) -> None:
        """/api/v1/... or /apis/GROUP/VERSION/..., then [namespaces/NS]/PLURAL[/NAME[/SUB]]."""
        missing = Refused(404, "NotFound", "the server could not find the requested resource")
        if path[:1] == ["api"] and len(path) > 2:
            group, self.version, rest = "", path[1], path[2:]
        elif path[:1] == ["apis"] and len(path) > 3:
            group, self.version, rest = path[1], path[2], path[3:]
        else:
            raise missing
        self.namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            self.namespace, rest = rest[1], rest[2:]
        found = discovery.find(self.double, group, self.version, rest[0])
        if found is None or len(rest) > 3:
            raise missing
        self.kind = found
        self.name = rest[1] if len(rest) > 1 else ""
        self.sub = rest[2] if len(rest) > 2 else ""
        known = {"status": found.status, "log": found.kind == "Pod", "": True}
        if not known.get(self.sub):
            raise missing

    def _permit(self) -> None:
        """Planted faults for this verb."""
        verb = _VERBS.get(self.command, "")
        if not verb:
            verb = "get" if self.name else "watch" if _yes(self.query.get("watch")) else "list"
        if verb == "delete" and not self.name:
            verb = "deletecollection"
        plural = f"{self.kind.plural}/{self.sub}" if self.sub else self.kind.plural
        self._check_status(verb, plural)
        if not discovery.allowed(self.double, verb, plural):
            why = f'User "tester" cannot {verb} resource "{plural}" in API group "{self.kind.group}"' + (
                f' in the namespace "{self.namespace}"' if self.namespace else " at the cluster scope"
            )
            full = f"{plural}.{self.kind.group}" if self.kind.group else plural
            name = f' "{self.name}"' if self.name else ""
            details = {"name": self.name, "group": self.kind.group, "kind": self.kind.plural}
            raise Refused(403, "Forbidden", f"{full}{name} is forbidden: {why}", details)
        if verb == "create" and (why := self.double.faults.get("quota", {}).get(plural)):
            body = self._body()
            raise answers.forbidden(self.kind, body.get("metadata", {}).get("name", ""), why)

    def _check_status(self, verb: str, plural: str) -> None:
        status = self.double.faults.get("status")
        if isinstance(status, dict):
            status = status.get((verb, plural))
        if status:
            reason = {401: "Unauthorized", 403: "Forbidden", 503: "ServiceUnavailable"}.get(status, "InternalError")
            raise Refused(status, reason, {401: "Unauthorized"}.get(status, f"planted fault: {reason}"))

    def _get(self) -> None:
        if self.sub == "log":
            self._stream(logs.read(self.double, self.namespace, self.name, self.query), "text/plain")
        elif self.name:
            found = self.store.get(self.kind.kind, self.namespace, self.name)
            if found is None:
                raise answers.not_found(self.kind, self.name)
            self._send_object(found)
        elif _yes(self.query.get("watch")):
            self._stream(
                watches.lines(self.double, self.kind, self.namespace, self.query, self._shown), "application/json"
            )
        else:
            with self.store.changed:
                items = self._listed()
                version = self.store.version
            if tables.wanted(self.headers.get("Accept", "")):
                self._send(tables.table(self.kind, items, version))
                return
            self._send_list(items, version)

    def _shown(self, obj: Object) -> Object:
        if tables.wanted(self.headers.get("Accept", "")):
            return tables.table(self.kind, [obj], "", head=False)
        return self._converted(obj)

    def _listed(self) -> list[Object]:
        labels, fields = self.query.get("labelSelector", ""), self.query.get("fieldSelector", "")
        return self.store.list(self.kind.kind, self.namespace or None, labels, fields)

    def _post(self) -> None:
        body = self._body()
        self._expect_kind(body)
        if self.kind.kind == "SelfSubjectAccessReview":
            spec = admission.checked(self.kind, {**body, "metadata": {"name": "none"}})["spec"]
            self._send(discovery.review(self.double, body, spec), 201)
            return
        if self.kind.status:
            body.pop("status", None)
        self._lenient(body)
        made = self.store.create(body, self.namespace or None, **self._how())
        self._send_object(made, 201)

    def _put(self) -> None:
        body = self._body()
        self._expect_kind(body)
        body.setdefault("metadata", {}).setdefault("name", self.name)
        body["metadata"]["namespace"] = self.namespace
        self._lenient(body)
        self._send_object(self.store.update(body, part=self.sub or "main", **self._how()))

    def _patch(self) -> None:
        type_ = self.headers.get("Content-Type", "").partition(";")[0]
        body = self._body()
        if type_ == "application/apply-patch+yaml":
            self._expect_kind(body)
            if body.get("metadata", {}).setdefault("name", self.name) != self.name:
                raise Refused(400, "BadRequest", "the name of the object does not match the name on the URL")
            if "fieldManager" not in self.query:
                raise Refused(400, "BadRequest", "fieldManager is required for apply patch")
            if self.kind.status and not self.sub:
                body.pop("status", None)
            self._lenient(body)
            manager, force = self.query["fieldManager"], _yes(self.query.get("force"))
            made, new = self.store.apply(body, self.namespace or None, manager, force=force, **self._how())
            self._send_object(made, 201 if new else 200)
            return
        for _ in range(5):
            old = self.store.get(self.kind.kind, self.namespace, self.name)
            if old is None:
                raise answers.not_found(self.kind, self.name)
            new_one = self._patched(type_, old, body)
            self._lenient(new_one)
            try:
                self._send_object(self.store.update(new_one, part=self.sub or "main", **self._how()))
                return
            except Refused as refused:
                # Somebody else changed it meanwhile, which is the patcher's business only if it named a version.
                if refused.reason != "Conflict" or "resourceVersion" in json.dumps(body):
                    raise
        raise answers.stale(self.kind, self.name)

    def _patched(self, type_: str, old: Object, body: Any) -> Object:
        if type_ == "application/json-patch+json":
            try:
                return _mapping(patches.json_patch(old, body))
            except ValueError as error:
                raise Refused(422, "Invalid", f"the server rejected our request due to an error: {error}") from None
        if type_ == "application/strategic-merge-patch+json":
            if not self.kind.core:
                message = "the body of the request was in an unknown format - accepted media types include: "
                types = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
                raise Refused(415, "UnsupportedMediaType", message + types)
            return _mapping(patches.strategic(old, body, self.kind.schemas[self.kind.version]))
        if type_ == "application/merge-patch+json":
            return _mapping(patches.merge(old, body))
        raise Refused(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {type_}")

    def _delete(self) -> None:
        options = self._body() if self.raw else {}
        policy = options.get("propagationPolicy") or self.query.get("propagationPolicy")
        grace = options.get("gracePeriodSeconds", self.query.get("gracePeriodSeconds"))
        how = {"orphan": policy == "Orphan", "now": str(grace) == "0"}
        dry_run = bool(options.get("dryRun") or self.query.get("dryRun"))
        if not self.name:
            items = self._listed()
            for item in items if not dry_run else ():
                meta = item["metadata"]
                self.store.delete(self.kind.kind, meta.get("namespace"), meta["name"], **how)
            self._send_list(items)
            return
        found = self.store.get(self.kind.kind, self.namespace, self.name)
        if found is None:
            raise answers.not_found(self.kind, self.name)
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted and wanted != found["metadata"]["uid"]:
            raise answers.stale(self.kind, self.name)
        if not dry_run:
            self.store.delete(self.kind.kind, self.namespace, self.name, **how)
        left = self.store.get(self.kind.kind, self.namespace, self.name)
        if left is not None and not dry_run:
            self._send_object(left)
            return
        uid = found["metadata"]["uid"]
        details = {"name": self.name, "group": self.kind.group, "kind": self.kind.plural, "uid": uid}
        self._send({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})

    def _body(self) -> Any:
        if protobuf.MEDIA_TYPE in self.headers.get("Content-Type", ""):
            return protobuf.decode(self.raw)
        try:
            # JSON is YAML; the C loader makes no difference between them worth a second path.
            return yaml.load(self.raw, Loader=yaml.CSafeLoader) if b"\t" not in self.raw else json.loads(self.raw)
        except (yaml.YAMLError, ValueError) as error:
            raise Refused(400, "BadRequest", f"couldn't get version/kind; json parse error: {error}") from None

    def _expect_kind(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refused(400, "BadRequest", "couldn't get version/kind; json parse error")
        body.setdefault("kind", self.kind.kind)
        body.setdefault("apiVersion", self._api_version())
        if body["kind"] != self.kind.kind or body["apiVersion"] != self._api_version():
            given = f"{body['apiVersion']}, Kind={body['kind']}"
            wanted = f"{self._api_version()}, Kind={self.kind.kind}"
            raise Refused(400, "BadRequest", f"the API version in the data ({given}) does not match ({wanted})")
        named = (body.get("metadata") or {}).get("namespace")
        if self.namespace and named and named != self.namespace:
            message = "the namespace of the provided object does not match the namespace sent on the request"
            raise Refused(400, "BadRequest", message)

    def _how(self) -> dict[str, Any]:
        loose = self.query.get("fieldValidation", "")
        return {"dry_run": bool(self.query.get("dryRun")), "loose": loose}

    def _lenient(self, body: Object) -> None:
        self.warnings = admission.unknown(self.kind, body) if self.query.get("fieldValidation") == "Warn" else []

    def _api_version(self) -> str:
        return f"{self.kind.group}/{self.version}" if self.kind.group else self.version

    def _converted(self, obj: Object) -> Object:
        """A custom object in the version that was asked for: they differ in name only."""
        return {**obj, "apiVersion": self._api_version()}

    def _send_list(self, items: list[Object], version: str = "") -> None:
        head = {"apiVersion": self._api_version(), "kind": f"{self.kind.kind}List"}
        metadata = {"resourceVersion": version or self.store.version}
        self._send({**head, "metadata": metadata, "items": [self._converted(item) for item in items]})

    def _send_object(self, obj: Object, status: int = 200) -> None:
        if tables.wanted(self.headers.get("Accept", "")):
            self._send(tables.table(self.kind, [obj], obj["metadata"].get("resourceVersion", "")), status)
        else:
            self._send(self._converted(obj), status)

    def _send(self, body: Any, status: int = 200) -> None:
        self._send_plain((json.dumps(body).encode(), "application/json"), status)

    def _send_plain(self, answer: tuple[bytes, str], status: int = 200) -> None:
        body, type_ = answer
        self.started = True
        self.send_response(status)
        self.send_header("Content-Type", type_)
        self.send_header("Content-Length", str(len(body)))
        for path in getattr(self, "warnings", ()):
            self.send_header("Warning", f'299 - "unknown field \\"{path}\\""')
        self.warnings: list[str] = []
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, chunks: Iterable[bytes], type_: str) -> None:
        """Chunks as they come; an empty one only asks whether the client is still there."""
        chunks = iter(chunks)
        first = next(chunks, b"")  # raises before the header where there is nothing to read
        self.started = True
        self.send_response(200)
        self.send_header("Content-Type", type_)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(first)
        with contextlib.closing(chunks):  # type: ignore[type-var]
            for chunk in chunks:
                self._chunk(chunk)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, chunk: bytes) -> None:
        if chunk:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


def _mapping(value: Any) -> Object:
    if not isinstance(value, dict):
        raise Refused(422, "Invalid", "the patch leaves no object")
    return value


def _yes(value: str | None) -> bool:
    return value in ("1", "true", "True")

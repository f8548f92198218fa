"""`ask`: files, folders and HDF5 files to answers, and errors that name the file or the remedy."""

from __future__ import annotations

import email
import email.policy
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from lesionflow import client
from lesionflow.cli import app
from lesionflow.errors import ClusterError, DataError, UsageError
from lesionflow.serving.predictor import Predictor


@pytest.fixture
def crops(tmp_path, encode):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encode(number))
    (folder / "notes.txt").write_text("not an image")
    return folder


def assert_same(answers, expected):
    np.testing.assert_allclose([a["logit"] for a in answers], [e.logit for e in expected], atol=1e-6)
    np.testing.assert_allclose([a["probability"] for a in answers], [e.probability for e in expected], atol=1e-6)
    assert [a["band"] for a in answers] == [e.band for e in expected]


def test_a_folder_and_a_file_in_order(service, bundle_dir, crops, encode):
    answers = client.ask(service.url, [crops, crops / "1.jpg"])
    assert [a["image"] for a in answers] == ["0.jpg", "1.jpg", "2.jpg", "1.jpg"]
    assert_same(answers, Predictor(bundle_dir).predict([encode(n) for n in (0, 1, 2, 1)]))


def test_an_hdf5_file_by_ids_in_several_requests(service, bundle_dir, tmp_path, encode, monkeypatch):
    monkeypatch.setattr(client, "BATCH_IMAGES", 2)
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for number in range(5):
            file[f"ISIC_{number}"] = np.void(encode(number))
    answers = client.ask(service.url + "/", [tmp_path / "x.hdf5"], model="tiny")
    assert [a["image"] for a in answers] == [f"ISIC_{n}" for n in range(5)]
    assert_same(answers, Predictor(bundle_dir).predict([encode(n) for n in range(5)]))


def test_a_refused_image_is_named(service, crops, monkeypatch):
    monkeypatch.setattr(client, "BATCH_IMAGES", 2)
    (crops / "2.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(DataError, match=r"2\.jpg: refused"):
        client.ask(service.url, [crops])


def test_a_missing_file_and_an_empty_folder_are_named(service, tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg"):
        client.ask(service.url, [tmp_path / "gone.jpg"])
    with pytest.raises(DataError, match="no images"):
        client.ask(service.url, [tmp_path])


def test_nobody_listening_names_the_url_and_the_remedy(crops):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ClusterError, match=rf"{url}: connection refused.*lesionflow serve"):
        client.ask(url, [crops])


def test_a_server_that_never_answers_times_out(crops):
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ClusterError, match=r"no answer within 0\.2 s"),
    ):
        client.ask(f"http://127.0.0.1:{silent.getsockname()[1]}", [crops], timeout=0.2)


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", "http://x:port", ""])
def test_what_is_no_url_is_a_usage_error(url, crops):
    with pytest.raises(UsageError):
        client.ask(url, [crops])


def test_an_unknown_model_says_which_there_is(service, crops):
    with pytest.raises(ClusterError, match="this server has 'tiny'"):
        client.ask(service.url, [crops], model="other")


def test_a_url_with_a_password_is_refused_without_repeating_it(crops):
    with pytest.raises(UsageError) as refused:
        client.ask("http://me:hunter2@127.0.0.1:1", [crops])
    assert "hunter2" not in str(refused.value)


READY = (200, {}, [{"name": "tiny"}])
BUSY = (503, {"Retry-After": "3"}, {"error": "busy: 2.5 s of work are waiting", "limit": "wait"})
VISIT = {
    "model": "tiny", "bundle": "1", "request_id": "r", "notice": "Not a medical device.", "served": "image_visit",
    "context": {"lesions": 2, "note": None}, "summary": {"lesions": 2},
    "lesions": [
        {"rank": 1, "id": "b", "file": "[b].jpg", "band": "refer", "probability": 0.25, "mode": "image_visit",
         "interval": {"low": 0.1, "high": 0.5, "level": 0.95}, "reasons": ["larger than the others"], "doubts": []},
        {"rank": 2, "id": "[a]", "file": "[a].jpg", "band": "cannot judge", "probability": 0.125, "mode": "image",
         "interval": None, "reasons": [], "doubts": ["blurred"]},
        {"rank": 3, "id": "c", "file": None, "band": None, "probability": None, "mode": "", "interval": None,
         "reasons": [], "doubts": []},
    ],
    "errors": [{"id": "d", "file": "d.jpg", "error": "no JPEG or PNG", "limit": None, "position": 3}],
}  # fmt: skip


@pytest.fixture
def fake():
    """`fake(answer, ...)`: a service that gives these answers in turn, each (status, headers, JSON), "close" or a
    function of the handler; gives its URL, the requests (method, path, headers, body) and the connections' number."""
    servers = []

    def start(*answers):
        left, requests, connections = list(answers), [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                connections.append(self.client_address)

            def do_POST(self):
                answer = left.pop(0)
                if callable(answer):
                    self.close_connection = True
                    return answer(self)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                requests.append((self.command, self.path, self.headers, body))
                if answer == "close":
                    self.close_connection = True
                    return None
                status, headers, value = answer
                data = json.dumps(value).encode()
                self.send_response(status)
                # Without saying so beforehand, and as some servers do it: with a last word that answers nothing.
                self.close_connection = headers.pop("then", "") == "close"
                for name, text in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)
                if self.close_connection:
                    time.sleep(0.05)
                    self.wfile.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return None

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests, connections

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def slept(monkeypatch):
    """The seconds that the client would have waited; the clock goes on by them."""
    waits = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits)))
    return waits


def test_a_busy_service_is_asked_again_after_the_time_it_names(fake, slept):
    url, requests, connections = fake(BUSY, BUSY, (200, {}, VISIT))
    with client.Client(url) as service:
        assert service.triage([("a.jpg", b"picture")]) == VISIT
    assert len(slept) == 2
    assert 3 <= slept[0] <= 4.5 <= slept[1] <= 6.75
    assert len({body for *_, body in requests}) == 1, "the same request each time"
    assert len(connections) == 1


def test_patience_ends_and_says_what_the_service_said(fake, slept):
    url, requests, _ = fake(BUSY, BUSY, BUSY, BUSY)
    with client.Client(url, patience=10) as service, pytest.raises(ClusterError, match=r"503: busy: 2\.5 s"):
        service.triage([("a.jpg", b"picture")])
    assert 1 < len(requests) < 4
    assert sum(slept) <= 10


def test_what_names_no_time_is_not_asked_again(fake, slept):
    url, requests, _ = fake((503, {}, {"error": "not ready: x"}), (500, {"Retry-After": "1"}, {"error": "internal"}))
    with client.Client(url) as service:
        for word in ("not ready", "internal"):
            with pytest.raises(ClusterError, match=word):
                service.triage([("a.jpg", b"picture")])
    assert len(requests) == 2
    assert not slept


def test_a_connection_that_was_closed_while_idle_is_opened_again(fake):
    url, requests, connections = fake((200, {"then": "close"}, VISIT), (200, {}, VISIT))
    with client.Client(url) as service:
        service.triage([("a.jpg", b"picture")])
        time.sleep(0.15)
        service.triage([("a.jpg", b"picture")])
    assert len(requests) == len(connections) == 2


def test_a_connection_that_is_closed_under_a_request_is_tried_once_more(fake):
    url, requests, connections = fake(READY, "close", (200, {}, VISIT), READY, "close", "close", (200, {}, VISIT))
    with client.Client(url) as service:
        service.model()
        assert service.triage([("a.jpg", b"picture")]) == VISIT
    assert (len(requests), len(connections)) == (3, 2)
    with client.Client(url) as service:
        service.model()
        with pytest.raises(ClusterError, match="can't be reached"):  # A new connection broke too: it isn't idleness.
            service.triage([("a.jpg", b"picture")])
    assert (len(requests), len(connections)) == (6, 4)


def test_a_refusal_that_comes_before_the_body_was_sent_is_read(fake):
    def early(handler):
        data = b'{"error": "the body is larger than the limit", "limit": "visit_body"}'
        handler.wfile.write(b"HTTP/1.1 413 No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)

    url, _, _ = fake(early)
    with client.Client(url) as service, pytest.raises(DataError, match="larger than the limit"):
        service.triage([("a.jpg", bytes(20_000_000))])


def test_the_token_goes_in_the_header_and_nowhere_else(fake):
    url, requests, _ = fake((200, {}, VISIT), (401, {}, {"error": "no token, or a wrong one"}))
    with client.Client(url, token="s3cret") as service:
        service.triage([("a.jpg", b"picture")])
        with pytest.raises(UsageError, match="asks for a token") as refused:
            service.triage([("a.jpg", b"picture")])
    assert requests[0][2]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in f"{refused.value}{requests[0][1]}{requests[0][3]}"
    for wrong in ("", "two words", "s3\r\nHost: x", "schl\u00fcssel"):
        with pytest.raises(UsageError, match="the token") as refused:
            client.Client(url, token=wrong)
        assert not wrong or wrong not in str(refused.value)


def test_a_visit_is_a_form_that_others_can_read(fake, tmp_path):
    """The standard library's parser of e-mail stands for any other implementation of multipart."""
    url, requests, _ = fake((200, {}, VISIT), (200, {}, VISIT))
    (tmp_path / "visit.csv").write_bytes(b"isic_id,sex\r\na,female\r\n")
    names = ["a.jpg", 'q"uote.png', "\u8840\u7ba1.jpg", "new\r\nline.jpg"]
    contents = [bytes(range(256)), b"--", b"\r\n", b""]
    with client.Client(url + "/under/") as service:
        service.triage(zip(names, contents, strict=True), tmp_path / "visit.csv", heatmaps=["a"], reasons=3)
        service.triage([], [{"isic_id": "a", "age_approx": 60}, {"isic_id": "b,c", "sex": "male"}])
    (_, path, headers, body), (_, _, again, rows) = requests
    assert path == "/under/v1/triage"
    whole = email.message_from_bytes(
        f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body, policy=email.policy.HTTP
    )
    options, metadata, *images = whole.iter_parts()
    assert json.loads(options.get_content()) == {"heatmaps": ["a"], "reasons": 3}
    assert metadata.get_payload(decode=True) == b"isic_id,sex\r\na,female\r\n"
    assert [part.get_payload(decode=True) for part in images] == contents
    for name in ("a.jpg", "q%22uote.png", "\u8840\u7ba1.jpg", "new%0D%0Aline.jpg"):
        assert body.count(f'name="images"; filename="{name}"\r\n'.encode()) == 1
    assert b'isic_id,age_approx,sex\r\na,60,\r\n"b,c",,male\r\n' in rows
    assert again["Content-Type"] != headers["Content-Type"], "a boundary of its own"


def test_a_refused_visit_names_the_pictures(fake):
    errors = [{"id": f"{n}", "file": f"{n}.jpg", "error": "cut short"} for n in range(7)]
    url, _, _ = fake((422, {}, {"error": "nothing can be scored", "errors": errors}))
    with client.Client(url) as service, pytest.raises(DataError, match=r"nothing.*; 0\.jpg: cut short.*and 2 more"):
        service.triage([("0.jpg", b"")])


def test_another_server_is_no_service(fake):
    url, _, _ = fake((200, {}, ["hello"]), (200, {}, {"outputs": [{}]}), (200, {}, {"hello": 1}), (404, {}, "no"))
    with client.Client(url) as service:
        for ask in (
            service.model,
            lambda: service.infer([("a", b"")], "m"),
            lambda: service.triage([("a", b"")]),
            service.about,
        ):
            with pytest.raises(ClusterError):
                ask()


def test_health_says_what_is_wrong_and_waits_for_nothing(fake, service):
    url, _, _ = fake((503, {"Retry-After": "9"}, {"ready": False, "error": "not ready: a reference lesion differs"}))
    with client.Client(url) as unready:
        found = unready.health()
    assert (found["live"], found["ready"]) == (True, False)
    assert "a reference lesion differs" in found["reason"]
    with client.Client(service.url) as running:
        assert running.health() == {"live": True, "ready": True, "reason": None}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with client.Client(url) as gone:
        found = gone.health()
    assert (found["live"], found["ready"]) == (False, False)
    assert "refused" in found["reason"]


def test_one_patient_of_several(tmp_path, crops):
    table = tmp_path / "all.csv"
    table.write_text("\ufeffisic_id,patient_id,sex\n0,p1,male\n1,p2,female\n2,p1,male\n3,p1,\n", "utf-8")
    rows = client.rows_of(table, "p1")
    assert [row["isic_id"] for row in rows] == ["0", "2", "3"]
    found = list(client.pictures([crops, crops / "1.jpg"], {row["isic_id"] for row in rows}))
    assert [name for name, _ in found] == ["0.jpg", "2.jpg"]
    with pytest.raises(DataError, match="no lesion of patient 'p9'"):
        client.rows_of(table, "p9")
    table.write_text("isic_id\na\n")
    with pytest.raises(DataError, match="no column patient_id"):
        client.rows_of(table, "p1")


def test_the_command_prints_those_that_need_a_look_first(fake, crops, tmp_path, monkeypatch):
    (tmp_path / "visit.csv").write_text("isic_id\n0\n")
    (tmp_path / "token").write_text("s3cret\n")
    url, requests, _ = fake((200, {}, VISIT), (200, {}, VISIT))
    monkeypatch.setenv("COLUMNS", "120")
    run = CliRunner().invoke(
        app,
        ["ask", url, str(crops), "--metadata", str(tmp_path / "visit.csv"), "--token-file", str(tmp_path / "token")],
    )
    assert run.exit_code == 0, run.output
    assert requests[0][2]["Authorization"] == "Bearer s3cret"
    assert requests[0][3].count(b'name="images"') == 3
    lines = [line.split("\u2502")[1:-1] for line in run.output.splitlines() if "\u2502" in line]
    shown = [[cell.strip() for cell in line] for line in lines]
    assert shown == [
        ["2", "[a]", "0.1250", "cannot judge", "blurred"],
        ["1", "b", "0.2500 (0.1000 to 0.5000)", "refer", "larger than the others"],
        ["3", "c", "-", "-", ""],
    ]
    assert "not used: d.jpg: no JPEG or PNG" in run.output
    assert run.output.count("Not a medical device.") == 1
    monkeypatch.setenv("LESIONFLOW_TOKEN", "fr0m-env")
    run = CliRunner().invoke(app, ["ask", url, "--metadata", str(tmp_path / "visit.csv"), "--json"])
    assert json.loads(run.output) == VISIT
    assert requests[1][2]["Authorization"] == "Bearer fr0m-env"


def test_a_token_file_that_is_none_is_named(tmp_path, crops):
    for name, text in (("empty", " \n"), ("gone", None)):
        if text is not None:
            (tmp_path / name).write_text(text)
        run = CliRunner().invoke(app, ["ask", "http://127.0.0.1:1", str(crops), "--token-file", str(tmp_path / name)])
        assert isinstance(run.exception, UsageError), run.output
        assert str(tmp_path / name) in str(run.exception)


def test_one_picture_costs_at_most_a_kilobyte_more_than_its_file(service, encode, monkeypatch):
    """Everything that is sent for it, the request line and the headers included."""
    picture, sent = encode(3), []
    with client.Client(service.url, token="x" * 64) as asking:
        model = asking.model()
        send = asking._http.send
        monkeypatch.setattr(asking._http, "send", lambda data: (sent.append(len(data)), send(data))[1])
        asking.infer([("0.jpg", picture)], model)
    assert len(picture) < sum(sent) <= len(picture) + 1024


def test_the_file_works_where_the_package_is_not(service, crops, tmp_path):
    shutil.copy(client.__file__, tmp_path / "client.py")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import client; from pathlib import Path\n"
        f"assert 'lesionflow' not in sys.modules\n"
        f"print([a['image'] for a in client.ask({service.url!r}, [Path({str(crops)!r})])])\n"
        f"try: client.ask({service.url!r}, [Path('gone.jpg')])\n"
        f"except client.DataError as error: print(error)"
    )
    # Isolated and without site-packages: the package can't be found.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "['0.jpg', '1.jpg', '2.jpg']",
        "gone.jpg: can't be read (No such file or directory): check the path",
    ]


def test_the_client_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import lesionflow.client;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['lesionflow']"


def test_pictures_are_found_by_name_with_and_without_suffix(tmp_path, encode):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(encode(1))
    assert [name for name, _ in client.pictures([tmp_path], {"a", "b.jpg"})] == ["a.jpg", "b.jpg"]
    assert [name for name, _ in client.pictures([tmp_path / "a.jpg", tmp_path / "c.jpg"], {"c.jpg"})] == ["c.jpg"]

"""The triage page in a real browser: against the service, and against answers made up to hold what is hard to come by.

Whatever it shows, it asks for nothing but its own server, stores nothing, and axe-core passes it.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load(Path(__file__).with_name("sound.py")).check
KEPT = """async () => [localStorage.length, sessionStorage.length, document.cookie,
  (await indexedDB.databases()).length, (await caches.keys()).length]"""
MODEL = {
    "model": "made up", "bundle": "0123456789ab", "notice": "Not a medical device.", "served": "image_visit",
    "bands": {"image_visit": {"refer": {"logit": -4.0, "sensitivity": 0.93}}}, "maps": True, "synthetic": False,
    "limits": {"visit": 5000, "visit_body": 10_000_000},
}  # fmt: skip
HOSTILE = '<img src=x onerror="console.error(1)">'


@pytest.fixture(scope="module")
def url(start, mapped_bundle):
    with start(mapped_bundle) as running:
        yield running.url + "/"


@pytest.fixture
def photos(tmp_path, encode):
    """`photos(n)`: a folder of so many pictures, L000.jpg and so on."""

    def make(count: int) -> list[Path]:
        folder = tmp_path / "visit"
        folder.mkdir(exist_ok=True)
        for number in range(count):
            (folder / f"L{number:03}.jpg").write_bytes(encode(number))
        return sorted(folder.iterdir())

    return make


def lesion(rank: int, count: int, **changes):
    """One of `count` lesions of an invented answer, spread over a body; a third has no position."""
    p = 0.2 / rank
    band = "refer" if rank <= 3 else "cannot judge" if rank % 11 == 0 else "routine" if rank < count / 2 else "low"
    place = {"x": (rank * 97) % 600 - 300.0, "y": 100.0 + (rank * 53) % 1600, "z": (rank * 31) % 300 - 100.0}
    return {
        "rank": rank, "id": f"L{rank:03}", "file": f"L{rank:03}.jpg", "mode": "image_visit", "band": band,
        "probability": p, "interval": {"low": p / 2, "high": p * 1.5, "level": 0.95, "of": ""}, "logit": -rank / 10,
        "scores": {"image": p / 2, "image_visit": p}, "reasons": ["darker than most"] if rank < 9 else [],
        "doubts": ["unlike those it was tried on"] if band == "cannot judge" else [], "position": place,
        "site": ("posterior torso", "lower extremity", None)[rank % 3], "size_mm": 2 + rank % 7, "heatmap": None,
    } | changes  # fmt: skip


def answer(lesions, errors=(), note=None):
    bands = dict.fromkeys(("refer", "routine", "low", "cannot judge", "none"), 0)
    for one in lesions:
        bands[one["band"] or "none"] += 1
    return {
        "model": "made up", "bundle": "0123456789ab", "request_id": "r1", "notice": MODEL["notice"],
        "served": "image_visit", "context": {"lesions": len(lesions), "note": note},
        "summary": {"lesions": len(lesions), "judged": len(lesions), "bands": bands, "prevalence": 0.001,
                    "modes": {"image_visit": len(lesions)}, "seconds": 0.1},
        "lesions": lesions, "errors": list(errors),
    }  # fmt: skip


@pytest.fixture
def stub(visit, url):
    """Open the page with invented answers: `stub(triage, width, scheme)` -> page; `page.asked` collects requests.

    `triage` is an answer, or a list of (status, headers, body) given one after another, the last for good.
    """

    def go(triage, width: int = 1280, scheme: str = "light"):
        told = triage if isinstance(triage, list) else [(200, {}, triage)]
        asked = []

        def reply(route):
            status, headers, body = told[min(len(asked), len(told) - 1)]
            asked.append(route.request)
            route.fulfill(status=status, headers=headers, content_type="application/json", body=json.dumps(body))

        page = visit(url, width, scheme)
        page.asked = asked
        page.route("**/v1/model", lambda route: route.fulfill(json=MODEL))
        page.route("**/v1/triage", reply)
        page.reload()
        return page

    return go


def upload(page, files, names=None):
    """Hand these over and ask; `files` are paths, or `names` with the bytes of the first."""
    if names:
        data = files[0].read_bytes()
        page.set_input_files("#photos", [{"name": n, "mimeType": "image/jpeg", "buffer": data} for n in names])
    else:
        page.set_input_files("#photos", [str(one) for one in files])
    page.click("#start")


def ready(page):
    page.wait_for_selector("#results:not([hidden])", timeout=60_000)
    return page


def ids(page) -> list[str]:
    return page.evaluate("() => [...document.querySelectorAll('#list > li')].map(e => e.dataset.id)")


def selected(page) -> str:
    return page.locator("[aria-current]").locator("xpath=..").get_attribute("data-id")


def exported(page) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.click("#export")
    text = Path(download.value.path()).read_text(encoding="utf-8-sig")
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_visit_of_241_lesions_and_a_bad_file(width, scheme, visit, url, photos, axe):
    files = photos(241)
    folder = files[0].parent
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not for the server")
    page = visit(url, width, scheme)
    check(page, axe)
    assert page.inner_text("#notice") == "Not a medical device."
    page.set_input_files("#folder", str(folder))
    assert "1 file left out" in page.inner_text("#left-out summary")
    assert page.inner_text("#start") == "Rank 242 lesions"
    page.click("#start")
    ready(page)
    check(page, axe)
    assert page.inner_text("body").count("Not a medical device") == 1

    refused = page.inner_text("#errors")
    assert "2 files not used" in refused
    assert "broken.jpg neither JPEG nor PNG" in refused
    assert "notes.txt neither a JPEG or PNG photo nor a CSV" in refused

    rows = exported(page)
    ranked = [float(row["probability"]) for row in rows if row["probability"]]
    assert len(ranked) == 241
    assert ranked == sorted(ranked, reverse=True)
    assert [row["isic_id"] for row in rows if row["rank"]] == ids(page)
    assert {row["file"] for row in rows if row["error"]} == {"broken.jpg", "visit/notes.txt"}

    page.select_option("#sort", "name")
    assert len(ids(page)) == 242
    assert ids(page) == sorted(ids(page), key=str.lower)
    page.fill("#find", "l07")
    assert ids(page) == [f"L07{n}" for n in range(10)]
    page.fill("#find", "")
    page.select_option("#sort", "rank")

    page.locator(".row").nth(4).click()
    assert page.get_attribute("#photo", "src").startswith("blob:")
    before = page.locator("#photo").screenshot()
    page.click("#heat")
    page.wait_for_function("() => document.querySelector('#photo').src.startsWith('data:image/png')")
    assert page.locator("#photo").screenshot() != before
    check(page, axe)
    page.click("#heat")
    assert page.get_attribute("#photo", "src").startswith("blob:")
    assert page.evaluate(KEPT) == [0, 0, "", 0, 0]
    assert page.context.cookies() == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_everything_an_answer_may_hold_is_sound(width, scheme, stub, photos, axe):
    lesions = [lesion(n, 60) for n in range(1, 60)]
    lesions[5] |= {"file": None, "interval": None, "scores": {"visit": 0.03}, "mode": "visit"}
    lesions.append(lesion(60, 60, mode=None, band=None, probability=None, interval=None, scores={}, position=None))
    page = stub(answer(lesions, [{"id": "L060", "file": "L060.jpg", "error": "cut off", "limit": None}]), width, scheme)
    upload(page, photos(1), [f"L{n:03}.jpg" for n in range(1, 61)])
    ready(page)
    for place in (0, 5, 10, 59):
        page.locator(".row").nth(place).click()
        check(page, axe)
        page.keyboard.press("Escape")
    page.locator(".row").first.click()
    panel = page.inner_text("#panel")
    told = (
        "20 %", "10 – 30 %", "95 % interval", "Above the line that kept 93 %", "darker than most", "picture alone",
        "More suspicious than all of the 58 others", "from the front", "Nearest to it",
    )  # fmt: skip
    for words in told:
        assert words in panel
    assert page.evaluate(KEPT) == [0, 0, "", 0, 0]


def test_the_map_has_the_patients_right_on_the_left_and_a_click_selects(stub, photos):
    here = [lesion(n, 9, site="posterior torso") for n in (1, 2, 3)]
    here[0]["position"] = {"x": 300.0, "y": 1200.0, "z": 0.0}
    here[1]["position"] = {"x": -300.0, "y": 400.0, "z": 0.0}
    page = stub(answer(here))
    upload(page, photos(1), ["L001.jpg", "L002.jpg", "L003.jpg"])
    ready(page)
    place = "() => { const r = document.querySelector('.map .ring').getBoundingClientRect(); return [r.x, r.y] }"
    right = page.evaluate(place)
    page.keyboard.press("j")
    left = page.evaluate(place)
    assert right[0] < left[0] and right[1] < left[1]
    page.evaluate(
        """([x, y]) => document.querySelector('.map').dispatchEvent(
        new MouseEvent('click', {clientX: x + 6, clientY: y + 6, bubbles: true}))""",
        right,
    )
    assert selected(page) == "L001"


def test_the_keyboard_alone_is_enough(stub, photos):
    page = stub(answer([lesion(n, 20) for n in range(1, 21)]))
    upload(page, photos(1), [f"L{n:03}.jpg" for n in range(1, 21)])
    ready(page)
    assert page.locator(".row[tabindex='0']").count() == 1, "one stop for Tab, not one for each lesion"
    for key, where in [("j", 2), ("ArrowDown", 3), ("k", 2), ("End", 20), ("j", 20), ("Home", 1), ("ArrowUp", 1)]:
        page.keyboard.press(key)
        assert selected(page) == f"L{where:03}", key
        assert page.evaluate("() => document.activeElement.closest('li')?.dataset.id") in (selected(page), None)
    page.keyboard.press("g")
    assert page.get_attribute("#sheet", "aria-pressed") == "true"
    page.keyboard.press("h")
    assert page.get_attribute("#heat", "aria-pressed") == "true"
    page.wait_for_function("() => document.querySelector('#legend').textContent.includes('drew none')")
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#find") == "jk"
    assert ids(page) == [None]
    page.keyboard.press("Escape")
    assert len(ids(page)) == 20
    page.click(".keys summary")
    page.uncheck("#keys-on")
    page.click("h1")
    page.keyboard.press("j")
    assert selected(page) == "L001", "letters can be switched off"


def test_on_a_phone_a_lesion_takes_the_screen_and_gives_it_back(stub, photos):
    page = stub(answer([lesion(n, 9) for n in range(1, 10)]), 390)
    upload(page, photos(1), [f"L{n:03}.jpg" for n in range(1, 10)])
    ready(page)
    assert not page.is_visible("#panel")
    page.locator(".row").nth(1).click()
    assert page.evaluate("() => document.activeElement.id") == "panel"
    assert page.get_attribute("#panel", "role") == "dialog"
    assert page.evaluate("() => document.querySelector('.ranked').inert")
    page.click("[aria-label='Next lesion']")
    assert page.inner_text("#panel h2") == "L003"
    page.click(".back")
    assert not page.is_visible("#panel")
    assert page.evaluate("() => document.activeElement.closest('li').dataset.id") == "L003"
    small = page.evaluate("""() => [...document.querySelectorAll('button, select, input')].filter(e =>
        e.checkVisibility() && e.getBoundingClientRect().height < 40).map(e => e.outerHTML.slice(0, 60))""")
    assert small == [], "fingers need room"


def test_a_token_is_asked_for_sent_and_kept_nowhere(stub, photos):
    refused = (401, {}, {"error": "a token is needed"})
    page = stub([refused, refused, (200, {}, answer([lesion(1, 1)]))])
    upload(page, photos(1), ["L001.jpg"])
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#token-why').textContent.includes('refused')")
    page.fill("#token", "secret")
    page.keyboard.press("Enter")
    ready(page)
    assert [one.headers.get("authorization") for one in page.asked] == [None, "Bearer wrong", "Bearer secret"]
    assert page.evaluate(KEPT) == [0, 0, "", 0, 0]
    assert "secret" not in page.content() and page.input_value("#token") == ""


def test_a_busy_server_is_asked_again_and_a_cancelled_visit_keeps_its_photos(stub, photos):
    busy = (503, {"Retry-After": "1"}, {"error": "busy, 3 s of work are waiting", "limit": "wait"})
    page = stub([busy, (200, {}, answer([lesion(1, 1)]))])
    upload(page, photos(1), ["L001.jpg"])
    page.wait_for_function("() => document.querySelector('#working-text').textContent.includes('busy')")
    ready(page)
    assert len(page.asked) == 2
    page = stub([busy])
    upload(page, photos(1), ["L001.jpg", "L002.jpg"])
    page.wait_for_function("() => document.querySelector('#working-text').textContent.includes('busy')")
    page.click("#cancel")
    page.wait_for_selector("#intake:not([hidden])")
    assert page.inner_text("#start") == "Rank 2 lesions"
    assert not page.is_visible("#problem")


def test_what_the_server_refuses_is_said_in_its_words(stub, photos):
    body = {"error": "nothing can be scored: see errors", "errors": [{"file": "L001.jpg", "error": "cut off"}]}
    page = stub([(422, {}, body)])
    upload(page, photos(1), ["L001.jpg"])
    page.wait_for_selector("#problem:not([hidden])")
    assert " ".join(page.inner_text("#problem").split()) == "nothing can be scored: see errors L001.jpg cut off"


def test_more_than_the_limits_is_refused_before_it_is_sent(stub, photos):
    page = stub(answer([]))
    page.set_input_files("#photos", [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"x" * 11_000_000}])
    page.click("#start")
    assert "the server takes 10 MB" in page.inner_text("#problem")
    assert page.asked == []


def test_two_photos_of_one_name_are_not_mixed_up(stub, photos):
    page = stub(answer([lesion(1, 1)]))
    page.set_input_files("#photos", [{"name": "a.jpg", "mimeType": "image/jpeg", "buffer": b"1"}])
    page.set_input_files("#photos", [{"name": "a.png", "mimeType": "image/png", "buffer": b"22"}])
    assert page.inner_text("#start") == "Rank 1 lesion"
    page.click("#left-out summary")
    assert "a.png another photo has the same name" in page.inner_text("#left-out")


def test_photos_and_a_csv_can_be_dropped_anywhere(stub, photos):
    page = stub(answer([lesion(1, 1)]))
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.items.add(new File(['x'], 'L001.jpg', {type: 'image/jpeg'}));
        data.items.add(new File(['isic_id\\nL001'], 'visit.csv', {type: 'text/csv'}));
        document.querySelector('header').dispatchEvent(
            new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})) }""")
    page.wait_for_selector("#taken:not([hidden])")
    assert "1 photo and visit.csv" in page.inner_text("#taken-text")
    page.click("#start")
    ready(page)
    sent = page.asked[0].post_data_buffer.decode("latin-1")
    assert re.findall(r'name="(\w+)"', sent) == ["images", "metadata", "options"]


def test_names_are_never_markup_nor_formulas(stub, photos):
    hostile = lesion(1, 2, id=HOSTILE, file=f"{HOSTILE}.jpg", site=HOSTILE, reasons=[HOSTILE], doubts=[HOSTILE])
    formula = lesion(2, 2, id="=HYPERLINK(1)", file="=HYPERLINK(1).jpg", reasons=["dark;=1+1", "@SUM(1)"])
    errors = [{"id": HOSTILE, "file": HOSTILE, "error": HOSTILE, "limit": None}]
    page = stub(answer([hostile, formula], errors, note=HOSTILE))
    upload(page, photos(1), ["x.jpg"])
    ready(page)
    assert page.told == []
    assert page.locator("img[src=x]").count() == 0
    assert page.inner_text("#panel h2") == HOSTILE
    rows = exported(page)
    assert rows[1]["isic_id"] == "'=HYPERLINK(1)"
    # Where a semicolon parts the cells, what follows it begins one.
    assert rows[1]["reasons"] == "dark;'=1+1; '@SUM(1)"


def test_two_thousand_lesions_stay_quick(stub, photos):
    page = stub(answer([lesion(n, 2000, id=f"L{n}", file=f"L{n}.jpg") for n in range(1, 2001)]))
    upload(page, photos(1), [f"L{n}.jpg" for n in range(1, 2001)])
    ready(page)
    page.wait_for_selector(".crop img[src]")
    assert 5 < page.locator(".crop img[src]").count() < 60, "only those near the window hold a picture"
    took = page.evaluate("""() => { const t = performance.now();
        document.querySelector('#sort').value = 'name'; arrange(); document.body.offsetHeight;
        for (let i = 0; i < 20; i++) step(1); return performance.now() - t }""")
    assert took < 5000, f"{took:.0f} ms for sorting and twenty steps"
    for place in range(0, 2000, 200):
        page.locator(".row").nth(place).scroll_into_view_if_needed()
        page.wait_for_timeout(100)
    assert page.locator(".crop img[src]").count() < 60, "those far from it let theirs go"


def test_print_has_every_crop_and_no_controls(stub, photos):
    page = stub(answer([lesion(n, 60) for n in range(1, 61)]), scheme="dark")
    upload(page, photos(1), [f"L{n:03}.jpg" for n in range(1, 61)])
    ready(page)
    page.evaluate(
        "() => { window.print = () => { window.printed = document.querySelectorAll('.crop img[src]').length } }"
    )
    page.click("#print")
    page.wait_for_function("() => window.printed !== undefined")
    assert page.evaluate("() => window.printed") == 60
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in (".tools", "#panel", ".actions"):
        assert not page.is_visible(hidden)
    assert page.is_visible("#notice") and page.is_visible(".why >> nth=0")


def test_a_new_visit_forgets_the_last(stub, photos):
    page = stub(answer([lesion(1, 1)]))
    upload(page, photos(1), ["L001.jpg"])
    ready(page)
    page.click("#again")
    assert page.is_visible("#intake") and not page.is_visible("#taken") and not page.is_visible("#actions")
    assert "L001" not in page.content()
    assert page.evaluate("() => [photos.size, urls.size, rows.size, answer]") == [0, 0, 0, None]


def test_the_files_are_sent_with_a_policy_and_only_once(url, visit):
    for path, kind in (("", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        with urllib.request.urlopen(url + path, timeout=10) as got:
            assert got.headers["Content-Type"].startswith(kind)
            policy = got.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy
            tag = got.headers["ETag"]
        again = urllib.request.Request(url + path, headers={"If-None-Match": f'"other", {tag}'})
        with pytest.raises(urllib.error.HTTPError, match="304"):
            urllib.request.urlopen(again, timeout=10)
    page = visit(url)
    page.evaluate("""() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';
        document.body.append(s); fetch('http://127.0.0.1:9/').catch(() => {}) }""")
    time.sleep(0.2)
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.ran") is None
    assert sum("Content Security Policy" in one for one in page.told) >= 2

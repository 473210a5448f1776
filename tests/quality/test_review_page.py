"""The page of ``medseg review`` in a real browser, as a person uses it: opened from a disk, without a network."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from browser import Browser, find_browser

from medseg_supcon.datasets import read_case_names
from medseg_supcon.quality import Entry, write_page
from medseg_supcon.scans import Scan

LABELS = {"background": 0, "left <b>": 1, "</script><script>alert(1)</script>": 2}
NASTY = ["a'b\"c", "x</script><img src=x onerror=alert(1)>", "a&amp;b<!--", "Ünïcode 脑 𝔘", "=cmd", "no # comment"]
ROWS = (
    "[...document.querySelectorAll('#list li')].filter((e) => !e.hidden).map((e) => e.querySelector('b').textContent)"
)
NAME = "document.querySelector('#name').textContent"
SHOWN = "document.body.dataset.shown"


@pytest.fixture(scope="module")
def program() -> str:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium or Chrome in PATH: the page is not tested in a browser")
    return found


@pytest.fixture
def browser(program: str, tmp_path: Path) -> Iterator[Browser]:
    with Browser(program, tmp_path) as one:
        yield one
        assert one.problems == []
        assert [url for url in one.requests if not url.startswith(("file://", "blob:", "data:"))] == []


def volume(folder: Path, name: str, data: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.0, 2.0, 1.5, 1])), file)
    return file


def entry(folder: Path, number: int, name: str, quality: dict | None = None, **more: object) -> Entry:
    """A bright box in noise and its mask, in a file whose name is a number."""
    rng = np.random.default_rng(number)
    mask = np.zeros((20, 24, 16), np.uint8)
    mask[4 : 12 + number, 5:15, 3:11] = 1
    mask[4:8, 5:15, 3:11] = 2
    scan = (100 * (mask > 0) + rng.normal(0, 9, mask.shape)).astype(np.float32)
    files = [volume(folder / kind, str(number), data) for kind, data in (("masks", mask), ("scans", scan))]
    facts = {"warnings": [f"warning {name}"], **({"quality": quality} if quality else {})}
    return Entry(name, files[0], Scan(name, (files[1],)), facts=facts, **more)


def quality(verdict: str, mean: float) -> dict:
    names = list(LABELS)[1:]
    ends = [mean - 0.1, mean + 0.05]
    return {"dice": {names[0]: mean, "mean": mean}, "interval": ends, "verdict": verdict, "reasons": [f"<i>{mean}"]}


@pytest.fixture
def judged(browser: Browser, tmp_path: Path) -> Path:
    """A page of six masks with nasty names, in the order of the list."""
    given = [("good", 0.9), ("review", 0.7), ("reject", 0.3), ("good", 0.8), ("reject", 0.1), ("review", 0.6)]
    entries = [
        entry(tmp_path, number, name, quality(*one))
        for number, (name, one) in enumerate(zip(NASTY, given, strict=True))
    ]
    page = tmp_path / "pa'ge & <more>.html"
    result = write_page(page, entries, LABELS, "</title><script>alert(2)</script>", ["A <note>."])
    assert result["verdicts"] == {"reject": 2, "review": 2, "good": 2} and result["shown"] == 6
    browser.open(page)
    browser.wait(f"{SHOWN} === '0'")
    return page


ORDER = [NASTY[k] for k in (4, 2, 5, 1, 3, 0)]  # reject, review, good; each by predicted Dice


def test_names_are_text_and_the_worst_comes_first(browser: Browser, judged: Path) -> None:
    assert browser.run(ROWS) == ORDER
    assert browser.run("document.scripts.length") == 8  # data, program, a volume each
    assert browser.run("document.images.length + document.querySelectorAll('i, #classes b').length") == 0
    assert browser.run("document.title").startswith("</title><script>alert(2)</script>")
    assert "A <note>." in browser.run("document.querySelector('#notes').textContent")
    facts = browser.run("document.querySelector('aside').innerText")
    assert "reject" in facts and "predicted Dice 0.10 (0.00–0.15)" in facts and "<i>0.1" in facts
    assert all(name in facts for name in list(LABELS)[1:]) and "warning =cmd" in facts
    assert browser.run("fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    browser.requests = [url for url in browser.requests if "example.org" not in url]
    browser.problems = [text for text in browser.problems if "example.org" not in text]  # the policy's own words


def test_choose_scroll_and_change_the_window(browser: Browser, judged: Path) -> None:
    browser.click("#list li:nth-child(3)")
    browser.wait(f"{SHOWN} === '2'")
    assert browser.run(NAME) == ORDER[2]
    for key, number in (("j", 3), ("ArrowDown", 4), ("PageDown", 5), ("j", 5), ("k", 4), ("ArrowUp", 3), ("PageUp", 2)):
        browser.press(key)
        browser.wait(f"{SHOWN} === '{number}'")
    caption = "document.querySelector('[data-axis=\"2\"]').nextElementSibling.textContent"
    before = int(browser.run(caption).split()[1])
    browser.wheel('[data-axis="2"]', -120)
    browser.wait(f"!{caption}.startsWith('axial {before} ')")
    assert int(browser.run(caption).split()[1]) > before
    browser.press("ArrowLeft")
    picture = "document.querySelector('[data-axis=\"1\"]').toDataURL()"
    for change in (
        lambda: browser.drag('[data-axis="1"]', (40, 30), "right"),
        lambda: browser.drag('[data-axis="2"]', (25, 30)),
        lambda: browser.run(
            "Object.assign(document.querySelector('#opacity'), {value: 1}).dispatchEvent(new Event('input'))"
        ),
        lambda: browser.press("+"),
        lambda: browser.press("m"),
    ):
        old = browser.run(picture)
        change()
        browser.wait(f"{picture} !== {json.dumps(old)}")


def test_judgements_are_kept_and_exported(browser: Browser, judged: Path, tmp_path: Path) -> None:
    for key in ("1", "j", "2", "j", "3", "j", "1", "j", "1", "j", "2"):
        browser.press(key)
    browser.wait("document.querySelector('#progress').textContent === '6 of 6 judged'")
    browser.press("c")
    comment = 'edge, "left" – <b>\nsecond line'
    browser.type(comment)
    browser.press("Escape", "k", "0")  # takes the fifth back
    browser.wait(f"{SHOWN} === '4'")
    browser.press("c")
    browser.type("=1+1")
    judgements = ["good", "needs correction", "unusable", "good", "", "needs correction"]
    for _ in ("now", "after a reload"):
        browser.click("#save-csv")
        rows = list(csv.DictReader(io.StringIO(browser.downloaded("judgements.csv"))))
        assert [row["name"].removeprefix("'") for row in rows] == ORDER and rows[0]["name"] == "'=cmd"
        assert [row["judgement"] for row in rows] == judgements
        assert [row["comment"] for row in rows] == ["", "", "", "", "'=1+1", comment]
        assert [row["verdict"] for row in rows] == ["reject"] * 2 + ["review"] * 2 + ["good"] * 2
        assert [float(row["predicted_dice"]) for row in rows] == [0.1, 0.3, 0.6, 0.7, 0.8, 0.9]
        assert float(rows[0][f"volume_ml {list(LABELS)[2]}"]) == pytest.approx(4 * 10 * 8 * 3 / 1000)
        browser.click("#save-cases")
        cases = tmp_path / "cases.txt"
        cases.write_text(browser.downloaded("cases.txt"), encoding="utf-8")
        kept = [n for n, one in zip(ORDER, judgements, strict=True) if one in ("good", "needs correction")]
        assert sorted(read_case_names(cases)) == sorted(kept)
        browser.open(judged)
        browser.wait(f"{SHOWN} === '0'")
        assert browser.run("document.querySelector('#progress').textContent") == "5 of 6 judged"
        assert browser.run("document.querySelectorAll('[aria-pressed=true]').length") == 1
    browser.run("Object.assign(document.querySelector('#filter'), {value: 'todo'}).dispatchEvent(new Event('input'))")
    assert browser.run(ROWS) == [ORDER[0], ORDER[4]]  # the chosen one stays


def test_a_name_that_a_case_list_cannot_hold_is_a_comment(browser: Browser, judged: Path, tmp_path: Path) -> None:
    browser.run("document.querySelectorAll('#list li')[2].click()")
    browser.wait(f"{SHOWN} === '2'")
    assert browser.run(NAME) == "no # comment"
    browser.press("1", "j", "1")
    browser.click("#save-cases")
    text = browser.downloaded("cases.txt")
    (tmp_path / "cases.txt").write_text(text, encoding="utf-8")
    assert read_case_names(tmp_path / "cases.txt") == [ORDER[3]]
    assert '"no # comment"' in text


def test_another_mask_of_the_same_name_is_not_judged(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for number, counted in ((0, "0"), (0, "1"), (1, "0")):  # the second time the same mask
        write_page(page, [entry(tmp_path, number, "scan")], LABELS)
        browser.open(page)
        browser.wait(f"{SHOWN} === '0'")
        assert browser.run("document.querySelector('#progress').textContent") == f"{counted} of 1 judged"
        browser.press("1")
        browser.wait("document.querySelector('#progress').textContent === '1 of 1 judged'")


def colors(browser: Browser, canvas: str) -> dict[str, int]:
    """How many pixels of a canvas are reddish, white, ..."""
    script = f"""(() => {{ const c = document.querySelector({json.dumps(canvas)}), d = c.getContext('2d')
      .getImageData(0, 0, c.width, c.height).data; let orange = 0, white = 0;
      for (let i = 0; i < d.length; i += 4) {{
        if (d[i] > 200 && d[i + 1] > 120 && d[i + 2] < 60) orange++;
        if (d[i] > 250 && d[i + 1] > 250 && d[i + 2] > 250) white++; }}
      return {{orange, white}}; }})()"""
    return browser.run(script)


def test_without_quality_with_a_reference(browser: Browser, tmp_path: Path) -> None:
    """Empty masks first, then by true Dice; the label map is a white outline where it is."""
    first, second, third = (entry(tmp_path, k, f"scan {k}") for k in range(3))
    empty = volume(tmp_path / "empty", "0", np.zeros((20, 24, 16), np.uint8))
    truth = np.asarray(nibabel.load(second.mask).dataobj).copy()
    truth[:, 10:15] = 0
    half = volume(tmp_path / "truth", "1", truth)
    entries = [
        third,
        Entry("half", second.mask, second.scan, half),
        Entry("same", third.mask, third.scan, third.mask),
        Entry("nothing", empty, first.scan, first.mask),
    ]
    page = tmp_path / "page.html"
    write_page(page, entries, LABELS)
    browser.open(page)
    browser.wait(f"{SHOWN} === '0'")
    assert browser.run(ROWS) == ["nothing", "half", "same", "scan 2"]
    assert "The mask is empty." in browser.run("document.querySelector('#facts').textContent")
    axial = '[data-axis="2"]'
    browser.run("range = [1e6, 2e6]; drawPlanes()")  # a black scan
    found = colors(browser, axial)
    assert found["orange"] == 0 and found["white"] > 100
    browser.press("j")
    browser.wait(f"{SHOWN} === '1'")
    text = browser.run("document.querySelector('aside').innerText")
    assert "no verdict" in text and f"Dice against the reference {2 / 3:.2f}" in text
    browser.press("j", "j")
    browser.wait(f"{SHOWN} === '3'")
    browser.run("range = [1e6, 2e6]; drawPlanes()")
    found = colors(browser, axial)
    assert found["orange"] > 100 and found["white"] < 100  # letters alone
    assert browser.run("document.querySelector('#reference').parentElement.hidden")


def place_of_color(browser: Browser, pixels: str, red: bool) -> tuple[int, float, float]:
    """Pixels of class 1 (more red than blue) or 2, and their mean place: x from the left, y from the top, in 0..1."""
    script = f"""(() => {{ const [d, w, h] = {pixels}; let n = 0, x = 0, y = 0;
      for (let i = 0; i < w * h; i++) {{ const r = d[4 * i], b = d[4 * i + 2];
        if ({"r > b + 60" if red else "b > r + 60"}) n++, x += i % w / w, y += Math.floor(i / w) / h; }}
      return [n, n ? x / n : 0, n ? y / n : 0]; }})()"""
    n, x, y = browser.run(script)
    return n, x, y


PIXELS = "((c) => [c.getContext('2d').getImageData(0, 0, c.width, c.height).data, c.width, c.height])(CANVAS)"
SURFACE = """(() => { const {gl} = view, w = gl.drawingBufferWidth, h = gl.drawingBufferHeight;
  const d = new Uint8Array(4 * w * h);
  gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, d); return [d, w, h]; })()"""  # from the bottom
# Texts on canvases: the axis of the plane (-1: a thumbnail) -> what is at its left, right, bottom and top
WATCH_LETTERS = """letters = {}, CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  const { width, height, dataset } = this.canvas, [u, v] = [x / width - 0.5, y / height - 0.5];
  const side = Math.abs(u) > Math.abs(v) ? (u < 0 ? 0 : 1) : (v > 0 ? 2 : 3);
  (letters[dataset.axis || -1] ||= ["", "", "", ""])[side] = text; }, 0"""


@pytest.fixture
def left_box(browser: Browser, tmp_path: Path) -> np.ndarray:
    """A page of a mask: class 1 is at the patient's left, back and feet, class 2 at the other end of each axis."""
    mask = np.zeros((30, 20, 20), np.uint8)
    mask[21:28, 2:9, 2:9] = 1  # the first axis runs to the left; the middle is 24, 5, 5
    mask[2:9, 11:18, 11:18] = 2
    page, file = tmp_path / "page.html", volume(tmp_path, "m", mask)
    write_page(page, [Entry("m", file, Scan("m", (volume(tmp_path, "s", mask.astype(np.int16)),)))], LABELS)
    browser.open(page)
    browser.wait(f"{SHOWN} === '0' && drawn.size === 1")
    browser.run(WATCH_LETTERS)
    return mask


# axis that is cut -> letters at the left, right, bottom and top, and whether class 1 is in the left half
RADIOLOGICAL = {2: ("RLPA", False), 1: ("RLIS", False), 0: ("APIS", False)}
NEUROLOGICAL = {2: ("LRPA", True), 1: ("LRIS", True), 0: ("APIS", False)}


@pytest.mark.parametrize("convention", ["radiological", "neurological"])
def test_left_and_right(browser: Browser, left_box: np.ndarray, convention: str) -> None:
    """In each convention: the half in which a class is drawn, the letters, the cross, clicking, dragging, zooming."""
    assert browser.run("$('radiological').checked"), "the default"
    for _ in range(2 if convention == "radiological" else 1):  # the switch draws everything again
        browser.click("#radiological")
    browser.wait("!drawing && !thumbnails.length")
    expected = RADIOLOGICAL if convention == "radiological" else NEUROLOGICAL
    letters = {int(axis): "".join(texts) for axis, texts in browser.run("letters").items()}
    assert letters == {axis: text for axis, (text, _) in expected.items()} | {-1: expected[2][0]}
    n, x, _ = place_of_color(browser, PIXELS.replace("CANVAS", "document.querySelector('#list canvas')"), True)
    assert n > 300 and (x < 0.4) == expected[2][1] and abs(x - 0.5) > 0.1, "the thumbnail"
    browser.run("range = [1e6, 2e6]; $('opacity').value = 1; drawPlanes()")
    first, second = (5, 5, 5), (24, 14, 14)  # the middles of the classes, in RAS
    for axis, (_, at_left) in expected.items():
        canvas = f'[data-axis="{axis}"]'
        pixels = PIXELS.replace("CANVAS", f"document.querySelector({json.dumps(canvas)})")
        size = np.array(browser.run(pixels)[1:])
        offsets = []
        for voxel, red in ((second, False), (first, True)):
            browser.run(f"cursor = {list(voxel)}; drawPlanes()")
            n, x, y = place_of_color(browser, pixels, red)
            assert n > 500 and (x < 0.45 if red == at_left else x > 0.55) and (y > 0.55 if red else y < 0.45)
            offsets.append(((x - 0.5) * size[0], (y - 0.5) * size[1]))
        browser.run("$('mask').checked = false; drawPlanes()")  # black with the cross
        data, width, height = browser.run(pixels)
        blue = np.array([data[str(i)] for i in range(len(data))]).reshape(height, width, 4)[..., 2] > 60
        cross = np.array([blue.sum(0).argmax(), blue.sum(1).argmax()])
        assert np.abs(cross - size / 2 - offsets[1]).max() < 2, (axis, "the cross is in the middle of the class")
        elsewhere = [voxel if k != axis else first[k] for k, voxel in enumerate(second)]
        browser.run(f"$('mask').checked = true; cursor = {elsewhere}; drawPlanes()")
        browser.drag(canvas, (0, 0), start=offsets[1])  # a click
        assert browser.run("cursor") == list(first), axis
        assert left_box[29 - first[0], first[1], first[2]] == 1 and "left <b>" in browser.run(
            "planes[0].nextElementSibling.textContent"
        )
        by = np.subtract(offsets[0], offsets[1])
        browser.drag(canvas, (by[0], by[1]), start=offsets[1])
        assert browser.run("cursor") == [voxel if k != axis else first[k] for k, voxel in enumerate(second)]
        browser.run(f"cursor = {list(first)}; drawPlanes()")
        browser.press("+", "+", "+")
        browser.drag(canvas, (0, 0), start=(1, 1))  # zoomed, the cross is in the middle
        n, x, y = place_of_color(browser, pixels, True)
        assert browser.run("cursor") == list(first) and abs(x - 0.5) < 0.02 and abs(y - 0.5) < 0.02
        browser.press("-", "-", "-", "-", "-", "-")


@pytest.mark.parametrize("convention", ["radiological", "neurological"])
def test_left_and_right_of_the_surface(browser: Browser, left_box: np.ndarray, tmp_path: Path, convention: str) -> None:
    """It is turned, never mirrored: the patient is seen from the front, or from behind."""
    if browser.run("view.gl === null"):
        pytest.skip("this browser has no WebGL")
    radiological = convention == "radiological"
    if not radiological:
        browser.click("#radiological")
    sides = "['left', 'right', 'bottom', 'top'].map((side) => document.querySelector('b.' + side).textContent)"
    browser.run("Object.assign(view, {turn: 0, tilt: 0}); drawSurface()")
    assert browser.run(sides) == ["R" if radiological else "L", "L" if radiological else "R", "I", "S"]
    for red in (True, False):
        n, x, y = place_of_color(browser, SURFACE, red)
        assert n > 500 and (x < 0.45 if red != radiological else x > 0.55) and (y < 0.45 if red else y > 0.55)
    browser.run("view.turn = Math.PI / 2; drawSurface()")  # from the right, or from the left
    assert browser.run(sides) == (["P", "A", "I", "S"] if radiological else ["A", "P", "I", "S"])
    n, x, _ = place_of_color(browser, SURFACE, True)  # at the back
    assert n > 500 and (x < 0.45 if radiological else x > 0.55)
    mask = np.zeros((20, 20, 20), np.uint8)
    mask[5:15, 2:6, 5:15], mask[5:15, 14:18, 5:15] = 1, 2  # the second is in front of the first
    write_page(tmp_path / "two.html", [Entry("two", volume(tmp_path, "two", mask))], LABELS)
    browser.open(tmp_path / "two.html")
    browser.wait(f"{SHOWN} === '0' && view.count > 0")
    if not radiological:
        browser.click("#radiological")
    browser.run("Object.assign(view, {turn: 0, tilt: 0}); drawSurface()")
    seen, hidden = (place_of_color(browser, SURFACE, red)[0] for red in (not radiological, radiological))
    assert seen > 500 and hidden < seen / 20

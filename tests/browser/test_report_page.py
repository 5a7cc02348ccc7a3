"""The report in a real browser: Debian's chromium, driven by playwright. `make test-browser` installs both."""

import os

import pytest

from softteacher.evaluation.analyze import analyze
from softteacher.evaluation.metrics import coco_metrics, coco_results
from softteacher.evaluation.report import write_report
from softteacher.watching.drift import compare
from softteacher.watching.report import write_report as write_watch_report
from tests.evaluation.test_metrics import perfect
from tests.samples import coco_tree, dataset, write_coco
from tests.watching.test_drift import profile

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# the font sizes of all elements that have text of their own
FONT_SIZES = """() => [...document.body.querySelectorAll("*")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()))
    .map(e => parseFloat(getComputedStyle(e).fontSize))"""
# none of its pictures but in view is loaded otherwise
LOAD = "() => Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => {}) }))"
OUTSIDE = """() => [...document.body.querySelectorAll("h1, h2, h3, p, figure, img, .tile")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""

if not os.access(CHROMIUM, os.X_OK):
    pytest.skip(f"{CHROMIUM} is not there; `make test-browser` installs it", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; `make test-browser` installs it")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(trained, manifests, tmp_path_factory):
    """What `analyze` writes, a report of endless names, and one of `watch`."""
    folder = tmp_path_factory.mktemp("reports")
    analyze(str(trained), str(manifests / "validation.json"), str(folder / "analysis"))
    endless = "endless" * 40
    tree = coco_tree(3, classes=(endless, "dog"))
    tree["images"][0]["file_name"] = "n" * 200 + ".png"
    data = dataset(write_coco(folder / endless[:200] / "set", tree, coco_tree(2, classes=(endless, "dog"))))
    results = coco_results(data, perfect(data))
    numbers = coco_metrics(data, results)
    numbers = numbers | {"segm": numbers}  # the longest page: a table of masks, too
    metrics = numbers | {"weights": "teacher", "teacher": numbers, "student": numbers}
    (folder / "endless.html").write_text(write_report(data, results, metrics, {}))
    base, live = profile(300, name=endless, version="1"), profile(300, name=endless, version="1", side=9, score=0.6)
    base.classes = live.classes = (endless, "dog", "方")
    facts = compare(base, live, 0.25, 200)
    facts |= {"name": endless, "version": "1", "verdict": "V.", "live": endless, "reference": endless}
    (folder / "watch.html").write_text(write_watch_report(base, live, facts | {"threshold": 0.25, "min_images": 200}))
    pages = {"analysis": "analysis/report.html", "endless names": "endless.html", "watch": "watch.html"}
    return {name: folder / file for name, file in pages.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(400, 800), (1400, 900)])
@pytest.mark.parametrize(("report", "pictures"), [("analysis", 4 + 12), ("endless names", 1 + 6), ("watch", 4)])
def test_the_page(browser, reports, report, pictures, size, scheme):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    wrong, requests = [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url[:100]))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[report].as_uri())
    page.evaluate(LOAD)
    images = page.evaluate("() => [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])")
    assert len(images) == pictures
    assert all(natural > 0 and shown >= 200 and alt for natural, shown, alt in images)
    width, inside = page.evaluate("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= inside
    assert page.evaluate(OUTSIDE) == []
    sizes = page.evaluate(FONT_SIZES)
    assert len(sizes) > 40
    assert min(sizes) >= 14
    assert wrong == []
    assert [url for url in requests if not url.startswith("data:")] == [reports[report].as_uri()]
    page.close()


def test_a_picture_that_is_broken_would_be_found(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text('<body><img src="data:image/png;base64,AAAA" loading="lazy"></body>')
    page = browser.new_page()
    page.goto(file.as_uri())
    page.evaluate(LOAD)
    assert page.evaluate("() => document.images[0].naturalWidth") == 0
    page.close()

"""The web page that shows two files' latencies side by side, in headless Chromium."""

import functools
import http.server
import math
import pathlib
import re
import threading
import time

import browsers
import pytest
from tflite_models import mlp, sparsify

import keras_sparse as ks
from keras_sparse.tflite.commands import RuntimeMissing, get

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "web"
LACKING = list(browsers.LACKING)
try:
    NODE_MODULES = pathlib.Path(get("wasm").start(".")[0][2]).parents[1]
except RuntimeMissing as error:
    LACKING.append(str(error))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
    # 2026-11, selenium 4.51: it leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page, LiteRT.js as npm installed it, and nothing else."""

    def translate_path(self, path):
        path = path.partition("?")[0]
        inside = path.removeprefix("/node_modules/")
        return str(PAGE / path.lstrip("/") if inside == path else NODE_MODULES / inside)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=PAGE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/speed.html?seconds=0.3&modules="
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsers.chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def wait(browser, *states):
    """Wait until the page is in one of these states; a page that never gets there fails the test."""
    end = time.monotonic() + 120
    while (state := browser.find_element("tag name", "main").get_attribute("data-state")) not in states:
        assert time.monotonic() < end, f"the page is still {state}"
        time.sleep(0.05)
    return state


def text(browser, name):
    return browser.find_element("id", name).text


def measure(browser):
    chosen = [browser.find_element("id", name) for name in ("accelerator", "dense-file", "sparse-file")]
    # In one script: it measures on only when the script has ended.
    click = "document.getElementById('start').click(); return arguments[0].map((one) => one.disabled)"
    assert browser.execute_script(click, chosen) == [True] * 3
    assert wait(browser, "done", "failed") == "done", text(browser, "error")
    assert [one.is_enabled() for one in chosen] == [True] * 3
    return float(browser.find_element("tag name", "main").get_attribute("data-ratio"))


def choose(browser, accelerator):
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", "accelerator")).select_by_value(accelerator)


@pytest.mark.parametrize("accelerator", ["wasm", "webgpu"])
def test_demo(accelerator, browser, address):
    """The shipped files: in WebAssembly the sparse one takes a third of the time, which a busy machine may hide."""
    browser.get(f"{address}/node_modules/")
    assert wait(browser, "ready", "failed") == "ready", text(browser, "error")
    choose(browser, accelerator)
    ratio = measure(browser)
    assert ratio > 0
    assert f"Sparse takes {ratio:.2f} of the dense time" in text(browser, "result")
    assert "Their outputs differ by" in text(browser, "agreement")
    for which in ("dense", "sparse"):
        right, of = re.fullmatch(r"(\d+) of (\d+) digits right", text(browser, f"{which}-right")).groups()
        assert int(right) >= 97 and int(of) == 100
        rounds = int(re.search(r"(\d+) rounds", text(browser, f"{which}-spread"))[1])
        points = browser.find_element("id", f"{which}-rounds").get_attribute("points").split()
        points = [tuple(map(float, point.split(","))) for point in points]
        assert len(points) == rounds >= 2 and all(0 <= x <= 400 and 0 <= y <= 100 for x, y in points)
    dense, sparse = (float(text(browser, f"{which}-median").removesuffix(" ms")) for which in ("dense", "sparse"))
    assert sparse / dense == pytest.approx(ratio, abs=0.02)
    assert "demo_sparse.tflite" in text(browser, "sparse-name")
    choose(browser, {"wasm": "webgpu", "webgpu": "wasm"}[accelerator])
    assert text(browser, "result") == text(browser, "most") == "", "what was measured on the other one is gone"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_scrolls_sideways(width, browser, address):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    try:
        browser.get(f"{address}/node_modules/")
        assert wait(browser, "ready", "failed") == "ready", text(browser, "error")
        measure(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_own_files(browser, address, tmp_path):
    """Files with a fixed and an open batch size, chosen by hand; then one that is none."""
    browser.get(f"{address}/node_modules/")
    wait(browser, "ready")
    model = sparsify(mlp(), 0.9, blocks=True)
    for name, sparse, size in (("dense", False, 1), ("sparse", True, None)):
        ks.tflite.export(model, tmp_path / f"own {name}.tflite", target="xnnpack", sparse=sparse, batch_size=size)
        browser.find_element("id", f"{name}-file").send_keys(str(tmp_path / f"own {name}.tflite"))
    while "own sparse.tflite" not in text(browser, "sparse-name"):
        time.sleep(0.05)
    assert measure(browser) > 0 and "Both compute the same" in text(browser, "agreement")
    assert text(browser, "dense-right").strip() == "", "the sample is for networks of other inputs"
    (tmp_path / "other.tflite").write_text("no model at all")
    browser.find_element("id", "dense-file").send_keys(str(tmp_path / "other.tflite"))
    assert wait(browser, "failed") and "other.tflite is not a .tflite file" in text(browser, "error")
    assert measure(browser) > 0, "the file that was there before can still be measured"


def test_coarse_clock_and_a_slow_begin(browser, address):
    """A run takes a fraction of what this clock tells apart, and seems to take long when it is measured first."""
    source = """const clock = performance.now.bind(performance);
        let calls = 0;
        const measuring = () => document.querySelector('main')?.dataset.state === 'measuring';
        performance.now = () => Math.floor(clock() / 2) * 2 + 100 * (measuring() && calls < 20 ? ++calls : calls)"""
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        browser.get(f"{address}/node_modules/")
        assert wait(browser, "ready", "failed") == "ready", text(browser, "error")
        ratio = measure(browser)
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    assert 0 < ratio < math.inf and float(text(browser, "sparse-median").removesuffix(" ms")) > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("/node_modules/&sparse=none.tflite", "none.tflite: 404"),
        ("/node_modules/&sparse=speed.js", "speed.js is not a .tflite file"),
        ("https://example.com/", "@litertjs/core"),
    ],
)
def test_wrong_address(parameters, message, browser, address):
    browser.get(address + parameters)
    assert wait(browser, "ready", "failed") == "failed" and message in text(browser, "error")
    assert not browser.find_element("id", "start").is_enabled()


@pytest.mark.parametrize("width", [320, 900])
def test_fits_the_screen(width, browser, address):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500},
    )
    browser.get(f"{address}/node_modules/")
    wait(browser, "ready")
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    columns = browser.execute_script("return getComputedStyle(document.querySelector('.models')).gridTemplateColumns")
    assert wide <= width and len(columns.split()) == (1 if width < 500 else 2)

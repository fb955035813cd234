"""The HTML page of a report, in a browser."""

import browsers
import pytest

import keras_sparse as ks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(browsers.LACKING), reason=f"needs {', '.join(browsers.LACKING)}"),
    # 2026-11, selenium 4.51: it leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROWS = [{"file": "b.tflite", "bytes": 1200}, {"file": "c.tflite", "bytes": 90}, {"file": "a.tflite", "bytes": 15_000}]


def test_a_click_on_a_column_sorts_by_it(tmp_path):
    report = ks.reports.Report("Sizes", ROWS, {"bytes": 16_290}, formats={"bytes": ",d"})
    page = tmp_path / "page.html"
    page.write_text(ks.reports.html_page("Sizes", report))
    with browsers.chromium(tmp_path / "profile") as browser:
        browser.get(page.as_uri())
        name, size = browser.find_elements("css selector", "thead th")

        def after(head):
            head.click()
            return "".join(row.text[0] for row in browser.find_elements("css selector", "tbody tr td:first-child"))[-3:]

        assert [after(head) for head in (size, size, name, name, size)] == ["cba", "abc", "abc", "cba", "cba"]
        assert size.get_attribute("data-order") == "up" and name.get_attribute("data-order") is None
        browser.set_window_size(800, 600)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")

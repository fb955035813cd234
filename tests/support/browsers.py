"""A headless Chromium for tests that look at pages."""

import contextlib
import importlib.util
import shutil

CHROME = shutil.which("chromium") or shutil.which("google-chrome")
LACKING = [name for name, found in (("chromium", CHROME), ("chromedriver", shutil.which("chromedriver"))) if not found]
if importlib.util.find_spec("selenium") is None:
    LACKING.append("the Python package selenium")


@contextlib.contextmanager
def chromium(profile):
    """A browser that keeps its data in the folder `profile`, with WebGPU in software, and asks nobody outside."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in (
        "headless", "no-sandbox", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "enable-unsafe-webgpu", "use-webgpu-adapter=swiftshader",
        "enable-features=Vulkan", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()

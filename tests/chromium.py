"""Chromium for tests and pictures of pages. Needs Chromium and the `browser` extra."""

import contextlib
import os
import shutil
import time

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


LIMIT = 120  # seconds: of a machine that hangs, not one that is busy


def until(page, function, arg=None):
    """Wait until a function of the page returns true.

    Playwright's ``wait_for_function`` compiles its text in the page at every try, which a policy
    without ``unsafe-eval`` refuses from the second one on.
    """
    last = time.monotonic() + LIMIT
    while not page.evaluate(function, arg):
        assert time.monotonic() < last, f"not true within {LIMIT} s: {function}"
        page.wait_for_timeout(50)


@contextlib.contextmanager
def chromium():
    """A browser of playwright's."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "Chromium is needed: apt-get install chromium, or name it in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()

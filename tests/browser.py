"""Pages in a real browser: fixtures that open one, and what axe-core has to say of it."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, headless, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page's text at a width, in light or dark; `said` collects what it asks for, logs or throws."""
    contexts = []

    def show(text: str, width: int = 1600, scheme: str = "light"):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.said = []
        tab.on("request", lambda request: tab.said.append(f"asked for {request.url}"))
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("dialog", lambda dialog: (tab.said.append(f"alert {dialog.message}"), dialog.dismiss()))
        tab.goto((tmp_path / "page.html").as_uri())
        assert tab.said.pop(0) == f"asked for {(tmp_path / 'page.html').as_uri()}"
        return tab

    yield show
    for context in contexts:
        context.close()


SERIOUS = ("serious", "critical")


def serious(tab) -> list[tuple[str, str, list[str]]]:
    """The violations of serious or critical impact that axe-core reports: rule, help, and where."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    violations = axe.Axe().run(tab).response["violations"]
    return [(v["id"], v["help"], [node["html"][:200] for node in v["nodes"]]) for v in violations if v["impact"] in SERIOUS]

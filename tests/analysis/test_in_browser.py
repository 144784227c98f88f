"""The page in a real browser, at the width of a telephone and at that of a desk."""

import html
import re
import shutil
import subprocess

import pytest

from pipeline.analysis import report

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=2000",
    "--dump-dom",
)
# The page in a frame of a given width: a browser's own window has a least width.
FRAME = """<!doctype html><body><iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const box = (f) => f.getBoundingClientRect();
  const figures = [...page.querySelectorAll("svg, img")];
  Object.assign(document.body.dataset, {{
    overflow: root.scrollWidth - root.clientWidth,
    figures: figures.length,
    invisible: figures.filter((f) => box(f).height < 20).length,
    outside: figures.filter((f) => box(f).right > root.clientWidth).length,
    mode: page.compatMode,
    line: page.defaultView.getComputedStyle(
      [...page.querySelectorAll("svg path")].find((p) => p.style.stroke.includes("series-1"))
    ).stroke,
  }});
}};
</script>"""


@pytest.fixture
def browse(tmp_path):
    """Renders a page; returns what the frame measured and the browser's console lines."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(names)} is on the path")

    def render(page: str, width: int) -> tuple[dict[str, str], list[str]]:
        file = tmp_path / "frame.html"
        file.write_text(FRAME.format(width=width, page=html.escape(page)))
        done = subprocess.run(
            [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        body = re.findall(r"<body[^>]*>", done.stdout)[-1]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return dict(re.findall(r'data-(\w+)="([^"]*)"', body)), console

    return render


@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_its_width_and_everything_is_visible(make_run, browse, width):
    page = report.write(make_run()).read_text()
    measured, console = browse(page, width)
    assert console == []
    assert measured == {
        "overflow": "0",
        "figures": str(3 + 2 + 1 + 12),
        "invisible": "0",
        "outside": "0",
        "mode": "CSS1Compat",
        "line": "rgb(0, 114, 178)",
    }


def test_console_errors_would_be_seen(browse):
    _, console = browse("<script>undefinedFunction()</script>", 400)
    assert any("undefinedFunction" in line for line in console)

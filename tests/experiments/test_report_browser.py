"""The report in a real browser, where there is one: no errors, no requests, nothing cut off."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="needs Chromium"),
    pytest.mark.slow,
]
# Appended to a copy of the report: what a person would see, as the page's title.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const style = (node, name) => getComputedStyle(node)[name];
  const charts = [...document.querySelectorAll(".chart")];
  parent.postMessage(JSON.stringify({
    page: document.documentElement.scrollWidth, window: innerWidth,
    charts: charts.length, drawn: charts.filter((c) => c.querySelector(".main-svg path")).length,
    narrow: charts.filter((c) => c.clientWidth < 250).length,
    claims: Math.max(...[...document.querySelectorAll(".row span")].map(
      (cell) => cell.getBoundingClientRect().right)),
    ink: style(document.body, "color"), paper: style(document.body, "backgroundColor"),
    tick: style(document.querySelector(".xtick text"), "fill"),
    font: parseFloat(style(document.body, "fontSize")),
    requests: performance.getEntriesByType("resource").map((r) => r.name),
  }), "*");
}, 1500));
</script></body>"""
# A browser's window cannot be as narrow as a phone; a frame in it can.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title></title>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: 900px }}</style>
<script>addEventListener("message", (event) => {{ document.title = event.data; }});</script>
<iframe src="{page}"></iframe>"""


def looked_at(page, folder, width, dark):
    """What the probe says, and the lines that the page wrote to the console."""
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=page.as_uri()), encoding="utf-8")
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-quic", f"--user-data-dir={folder / f'profile-{width}-{dark}'}",
        "--window-size=1400,900", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", ended.stdout, re.DOTALL)
    assert title, ended.stderr[-2000:]
    console = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(title[1])), console


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_is_whole_and_legible_and_asks_for_nothing(tiny_run, tmp_path, width, dark):
    text = (tiny_run.path / "report.html").read_text(encoding="utf-8")
    page = tmp_path / "report.html"
    page.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    seen, console = looked_at(page, tmp_path, width, dark)
    assert console == [] and seen["requests"] == []
    assert seen["charts"] == seen["drawn"] > 10 and seen["narrow"] == 0
    assert seen["page"] <= seen["window"] and seen["font"] >= 14
    assert 0 < seen["claims"] <= seen["window"]
    light, black = (sum(map(int, re.findall(r"\d+", seen[key])[:3])) for key in ("paper", "ink"))
    assert (light < black) is dark and abs(light - black) > 300
    assert seen["tick"] == seen["ink"]

"""The report and the audit in a real browser, with documents that try to break out of the page."""

import html
import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tda.audit import audit
from tda.report import build_report
from tests.fake_workspace import fake_workspace, scored_documents

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]

LEAK = "/leak"
HACK = "document.title='hacked'"
HOSTILE = (
    f'<script>{HACK}</script><svg onload="{HACK}"><img src=x onerror="{HACK}">',
    f"</textarea></details></section></main><style>*{{display:none}}</style><link rel=stylesheet href={LEAK}><img src={LEAK}>",
    f'"><iframe src="{LEAK}"></iframe><meta http-equiv="refresh" content="0;url={LEAK}"><base href="{LEAK}">',
    "\u202egnirts desrever a si siht\u202c and \u2066 an isolate that never ends",
    "שלום עולם, זהו טקסט עברי ארוך " * 20,
    "W" * 5000,
    "NUL \x00 and \x1b[31m escapes \x7f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f9ea" * 100,
    "Z" + "\u0334\u0335\u0336\u0337" * 400,
    "line\n" * 500,
    "\t" * 200 + "x",
)
MEASURE = """<script>
document.querySelectorAll("details").forEach(one => one.open = true);
const luminance = color => {
  const linear = part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4;
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(part => linear(part / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const background = element => {
  for (let one = element; one; one = one.parentElement) {
    const color = getComputedStyle(one).backgroundColor;
    if (/^rgb\\(/.test(color)) return color;
  }
};
let contrast = 99, worst = "";
for (const element of document.querySelectorAll("body *")) {
  const speaks = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!speaks || element.tagName === "title" || !element.checkVisibility()) continue;
  const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
  const [a, b] = [luminance(ink), luminance(background(element))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < contrast) [contrast, worst] = [ratio, element.outerHTML.slice(0, 120)];
}
const hidden = "svg, .scroll, .whole, caption, thead, .skip";
const over = one => one.checkVisibility() && !one.closest(hidden) && one.getBoundingClientRect().right > innerWidth + 1;
const wide = [...document.querySelectorAll("body *")].filter(over);
const heads = [...document.querySelectorAll("h1, h2, h3, h4")].map(one => +one.tagName[1]);
const found = {
  width: innerWidth, scroll: document.documentElement.scrollWidth, title: document.title, contrast, worst, heads,
  wide: wide.map(one => one.tagName + "." + one.className).slice(0, 5),
  unnamed: document.querySelectorAll("svg:not([aria-hidden]):not([aria-label])").length,
  captions: [...document.querySelectorAll("table")].filter(one => !one.caption).length,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
};
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""
HOST = """<!doctype html><body><iframe src="measure.html" width="{width}" height="900" style="border: 0"></iframe>
<script>addEventListener("message", message => document.body.append("MEASURED" + message.data + "END"));</script></body>"""


def chromium(tmp_path: Path, url: str, *arguments: str) -> str:
    """The page's DOM after it has loaded."""
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"),
        *(
            "--hide-scrollbars",
            "--virtual-time-budget=2000",
            f"--user-data-dir={tmp_path / 'profile'}",
            *arguments,
            "--dump-dom",
            url,
        ),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def measured(tmp_path: Path, page: str, *, width: int, dark: bool) -> dict:
    """What a script sees in a copy of the page with everything opened and, for the script's sake, without its content policy."""
    without_policy, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert removed == 1
    (tmp_path / "measure.html").write_text(without_policy.replace("</body>", MEASURE), encoding="utf-8")
    host = tmp_path / "host.html"  # a frame, for the window itself is never narrower than 500 pixels
    host.write_text(HOST.format(width=width), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = chromium(tmp_path, host.as_uri(), "--window-size=1400,1000", scheme)
    return json.loads(html.unescape(re.search(r"MEASURED(.*)END", dom.split("</script>")[-1], re.DOTALL).group(1)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    fake = fake_workspace(tmp_path_factory.mktemp("run"), num_documents=300, texts=HOSTILE)
    audit(fake.config, fake.workspace, date="2026-01-30", scored=scored_documents(fake), counts={}, quarantine=[])
    result = audit(
        fake.config,
        fake.workspace,
        date="2026-01-31",
        scored=scored_documents(fake, flipped=0.3, num_new=9),
        counts={},
        quarantine=[],
    )
    return {"report": build_report(fake.workspace, fake.config), "audit": result.report.read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", ["report", "audit"])
def test_nothing_runs_and_nothing_is_fetched(pages, name, tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(pages[name].encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        dom = chromium(tmp_path, f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert asked == ["/"]
    title = re.search("<title>(.*?)</title>", dom).group(1)
    assert title == {"report": "Data curation report", "audit": "Audit 2026-01-31"}[name]
    assert "<script" not in dom
    assert "<iframe" not in dom
    assert "</main>" in dom.split("<footer")[0].rsplit("</section>", 1)[1]  # no document closed a part of the page


@pytest.mark.parametrize("name", ["report", "audit"])
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_page_fits_the_screen_and_can_be_read(pages, name, width, dark, tmp_path):
    found = measured(tmp_path, pages[name], width=width, dark=dark)
    assert found["dark"] is dark
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["title"] != "hacked"  # escaping holds without the content policy
    assert found["contrast"] >= 4.5, found["worst"]  # WCAG AA for text
    assert found["unnamed"] == found["captions"] == 0
    assert found["heads"][0] == 1
    assert all(later <= earlier + 1 for earlier, later in zip(found["heads"], found["heads"][1:], strict=False))

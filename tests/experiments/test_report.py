"""Reports: complete, self-contained, right about the runs, and readable in a browser.

Needs chromium for the tests that look at the page; they are skipped without it.
Run: pytest tests/experiments/test_report.py
"""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from headway.core.errors import HeadwayError
from headway.core.run import Run
from headway.core.train import train
from headway.experiments.evidence import save_evidence
from headway.experiments.report import write_evidence_report, write_report
from tests.conftest import tiny_recipe
from tests.experiments.test_evidence import outcome

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

PROFILE = {
    "overhead": 0.12,
    "tree": {
        "name": "step",
        "milliseconds": 100.0,
        "share": 1.0,
        "calls": 1,
        "flops_rate": 1e11,
        "children": [
            {
                "name": "forward",
                "milliseconds": 40.0,
                "share": 0.4,
                "calls": 1,
                "flops_rate": 2e11,
                "utilization": 0.5,
                "children": [
                    {"name": "attention <x>", "milliseconds": 39.9, "share": 0.399, "calls": 2, "children": []},
                    {"name": "dust", "milliseconds": 0.1, "share": 0.001, "calls": 1, "children": []},
                ],
            },
            {"name": "backward", "milliseconds": 60.0, "share": 0.6, "calls": 1, "flops_rate": None, "children": []},
        ],
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """A plain run, and one with methods and another model."""
    root = tmp_path_factory.mktemp("runs")
    base = tiny_recipe(train={"steps": 60}, eval={"every": 20, "batches": 2})
    plain = train(base, run=root / "plain")
    other = {**base, "methods": {"ema": {"decay": 0.5}}, "model": {**base["model"], "hidden": 16}}
    averaged = train(other, run=root / "averaged <&>")
    (plain.path / "profile.json").write_text(json.dumps(PROFILE))
    return [plain, averaged]


def visible(page: str) -> str:
    """The page's text without style, script and tags."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def assert_self_contained(page: str) -> None:
    fetched = re.findall(r"""(?:src|href|action|data|url)\s*[=(]\s*["']?(?!#|data:)([^"'\s)>]+)""", page)
    fetched = [f for f in fetched if "://" in f or f.endswith((".js", ".css", ".png", ".svg", ".woff2"))]
    assert not fetched
    assert "@import" not in page
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_one_run(runs, tmp_path):
    path = write_report([runs[0]], tmp_path / "deep/report.html")
    page = path.read_text(encoding="utf-8")
    assert_self_contained(page)
    text = visible(page)
    summary = runs[0].summary
    for part in (
        f"{summary['bits_per_byte']:.3f}",
        f"{summary['eval_loss']:.3f}",
        "Loss by tokens",
        "Loss by training time",
        "Throughput",
        "Learning rate",
        "Gradient norm",
        "Live memory",
        "live peak",
        "process peak",
        "Where a step goes",
        "attention <x>",
        summary["hardware"]["system"],
        f"torch {summary['versions']['torch']}",
        "optimizer:",
    ):
        assert part in text, part
    assert "What differs" not in text
    assert "Not finished" not in text


def test_several_runs_side_by_side(runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    text = visible(page)
    for part in ("averaged <&>", "model.hidden", "methods.ema.decay", "weights averaged", "Where a step goes: plain"):
        assert part in text, part
    a, b = (run.summary["eval_loss"] for run in runs)
    assert f"{a:.4f}" in text
    assert f"{b:.4f} {b / a:.3g}x" in re.sub(r"\s+", " ", text)
    best = html.unescape(re.search(r'eval loss</th>.*?class="best">([\d.]+)', page, re.DOTALL)[1])
    assert best == f"{min(a, b):.4f}"


def test_curves_hold_what_was_logged(runs, tmp_path):
    page = write_report([runs[0]], tmp_path / "report.html").read_text(encoding="utf-8")
    data = [json.loads(p) for p in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)]
    series = {s["n"]: s for chart in data[:1] for s in chart["s"] if not s["f"]}
    assert series["eval"]["y"] == pytest.approx([r["eval_loss"] for r in runs[0].evaluations()], rel=1e-5)
    assert series["eval"]["x"] == [r["tokens"] for r in runs[0].evaluations()]
    faint = next(s for s in data[0]["s"] if s["f"])
    assert faint["y"] == pytest.approx([r["loss"] for r in runs[0].metrics()], rel=1e-5)


def test_a_run_that_is_not_finished(runs, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(runs[0].path, folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:7]) + '\n{"step": 8, "lo')
    text = visible(write_report([Run(folder)], tmp_path / "a.html").read_text())
    assert "Not finished: cut" in text
    assert "Loss by tokens" in text
    (folder / "metrics.jsonl").unlink()
    assert "No step has been logged" in visible(write_report([Run(folder)], tmp_path / "b.html").read_text())
    write_report([Run(folder), runs[0]], tmp_path / "c.html")


def test_fallbacks_are_shown(runs, tmp_path):
    folder = tmp_path / "fell"
    shutil.copytree(runs[0].path, folder)
    summary = {**runs[0].summary, "fallbacks": [{"what": "slow path", "why": "no kernel", "cost": "twice the time"}]}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = re.sub(r"\s+", " ", visible(write_report([Run(folder)], tmp_path / "a.html").read_text()))
    assert "slow path, because no kernel; it costs twice the time" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("profile.json", "{", "no breakdown"),
        ("profile.json", '{"tree": {"children": [{"name": "x"}]}}', "no breakdown"),
        ("summary.json", "{", "no JSON"),
    ],
)
def test_damaged_files_are_named(runs, tmp_path, name, content, message):
    folder = tmp_path / "run"
    shutil.copytree(runs[0].path, folder)
    (folder / name).write_text(content)
    with pytest.raises(HeadwayError, match=message):
        write_report([Run(folder)], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_nothing_to_report(tmp_path):
    with pytest.raises(HeadwayError, match="needs a run"):
        write_report([], tmp_path / "a.html")
    with pytest.raises(HeadwayError, match="no evidence"):
        write_evidence_report([tmp_path], tmp_path / "a.html")


def test_evidence(tmp_path):
    save_evidence(outcome(), tmp_path / "evidence/a.json")
    save_evidence(outcome(name="other", held=False, title="A <b>"), tmp_path / "evidence/b.json")
    page = write_evidence_report([tmp_path / "evidence"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    text = visible(page)
    for part in ("1 held here, 1 did not", "did not hold here", "1.9x to 3.3x", "2.4x", "at least 1.5", "A <b>"):
        assert part in text, part


# The page as a browser shows it.


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on this machine; `make browser` installs one")
    return found


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """The browser's own folder; it is slow to make."""
    return tmp_path_factory.mktemp("profile")


def look(browser: str, profile: Path, page: Path, *options: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--hide-scrollbars", f"--user-data-dir={profile}", *options, page.resolve().as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


GUARD = "<script>const errors = []; addEventListener('error', event => errors.push(event.message));</script>"
PROBE = """<script>
const found = { overflow: document.documentElement.scrollWidth > innerWidth, charts: [] };
for (const chart of document.querySelectorAll(".chart")) {
  const svg = [...chart.querySelectorAll("svg.plot")].find(s => s.getBoundingClientRect().width > 0);
  if (!svg) { found.charts.push(null); continue; }
  const box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.6, clientY: box.top + 50 }));
  const size = parseFloat(getComputedStyle(svg.querySelector("text")).fontSize);
  found.charts.push({ kind: svg.getAttribute("class"), tip: document.getElementById("tip").innerText,
                      font: size * box.width / svg.viewBox.baseVal.width });
}
const key = document.querySelector("button.key");
if (key) { key.click(); found.hidden = document.querySelectorAll(".mark.off").length; }
found.errors = errors;
const out = document.createElement("pre");
out.id = "probe"; out.textContent = JSON.stringify(found); document.body.append(out);
</script>"""


@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser(browser, profile, runs, tmp_path, width):
    page = write_report(runs, tmp_path / "report.html")
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8").replace("<head>", "<head>" + GUARD).replace("</body>", PROBE + "</body>")
    probed.write_text(text, encoding="utf-8")
    dom = look(browser, profile, probed, f"--window-size={width},900", "--dump-dom")
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert not found["errors"]
    shown = [chart for chart in found["charts"] if chart]
    assert len(shown) == len(found["charts"]) - 1, "the loss by training time waits behind its tab"
    assert not found["overflow"], "the page is wider than the screen"
    assert all(("narrow" in chart["kind"]) == (width < 720) for chart in shown)
    assert all(chart["font"] >= 9 for chart in shown), "text in a chart is too small to read"
    loss = shown[0]["tip"]
    number, unit = loss.splitlines()[0].split()
    end = runs[0].summary["tokens"]
    assert unit == "tokens"
    assert float(number.removesuffix("k")) * 1000 == pytest.approx(0.6 * end, abs=0.15 * end), (
        "not where the pointer is"
    )
    assert "plain" in loss
    assert found["hidden"] >= 2, "a click on the legend hides a line in both drawings"


def test_screenshots(browser, profile, runs, tmp_path):
    page = write_report(runs, tmp_path / "report.html")
    pictures = {}
    for theme in ("light", "dark"):
        picture = tmp_path / f"{theme}.png"
        themed = tmp_path / f"{theme}.html"
        themed.write_text(page.read_text(encoding="utf-8").replace('get("theme")', f'get("theme") || "{theme}"'))
        look(browser, profile, themed, "--window-size=1280,2000", f"--screenshot={picture}")
        pictures[theme] = picture.read_bytes()
        assert struct.unpack(">II", pictures[theme][16:24]) == (1280, 2000)
    light, dark = (_brightness(tmp_path / f"{theme}.png") for theme in ("light", "dark"))
    assert light > 0.8
    assert dark < 0.2


def _brightness(path: Path) -> float:
    from matplotlib import image

    return float(image.imread(path)[..., :3].mean())

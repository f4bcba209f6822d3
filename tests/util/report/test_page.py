"""Reports: the same blocks as Markdown and as a page, which a browser opens where one is installed."""

import base64
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from util.cli.finetune import FinetuneOptions
from util.log import versions
from util.report import page
from util.report.page import Code, Folded, Heading, Lines, Notes, Picture, Table, Text, markdown, write_report

LOCAL = ["--nproc_per_node=4"]
CHROMIUM = shutil.which("chromium")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
HOSTILE = [
    "<script>document.title = 'no'</script>",
    "a|b",
    "**bold**",
    "[x](y)",
    "`code`",
    "&lt;",
    "a\nb\0",
    "\udce9\ud800",
]
ROWS = [["b", "10.5", "0.1 to 3", ""], ["c", "9", "-2.5 to 1", "7 %"], ["a", "-1e-3", "10 to 11", "12 %"]]


@pytest.mark.parametrize(
    "ranks,here,launcher",
    [(1, 1, ["python"]), (4, 4, ["torchrun", "--nproc_per_node=4"]), (8, 4, ["torchrun", "--nnodes=2", *LOCAL])],
)
def test_a_report_begins_with_the_command_that_a_shell_would_run_again(tmp_path, monkeypatch, ranks, here, launcher):
    words = ["../main_x.py", "--data_path", "my photos", "--class", "it's", "x" * 500]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.chdir(tmp_path)
    write_report(str(tmp_path), "What came out", [Text("text")])
    title, _, command, _, where, _, text, _, *_ = (tmp_path / "report.md").read_text().split("\n")
    assert title == "# What came out" and where == f"Started in `{tmp_path}`." and text == "text"
    assert command.startswith("    ") and shlex.split(command) == [*launcher, *words]
    assert html.unescape(shown(tmp_path, "code"))[:70].startswith(shlex.join([*launcher, *words])[:60])


def shown(folder, tag: str) -> str:
    """The text inside the tags of a page, one after the other."""
    found: list[str] = []

    class Reader(HTMLParser):
        depth = 0

        def handle_starttag(self, name, attributes):
            self.depth += name == tag

        def handle_endtag(self, name):
            self.depth -= name == tag

        def handle_data(self, data):
            if self.depth:
                found.append(data)

    Reader().feed((folder / "report.html").read_bytes().decode("utf-8"))
    return "".join(found)


def test_a_report_ends_with_the_settings_that_are_not_the_defaults_and_the_versions(tmp_path):
    options = FinetuneOptions.of(lr=0.25, epochs=7, mixup=0.0, pretrained=True)
    write_report(str(tmp_path), "Run", [], options)
    text = (tmp_path / "report.md").read_text()
    end = text[text.index("## Settings and versions") :]
    rows = [line for line in end.splitlines() if line.startswith("| --")]
    assert sorted(rows) == ["| --epochs | 7 | 50 |", "| --lr | 0.25 | (not given) |", "| --pretrained | on | off |"]
    assert f"torch {versions()['torch']}" in end and "commit " in end
    assert shown(tmp_path, "td") == "".join(cell for row in rows for cell in row[2:-2].split(" | "))


def test_each_block_in_markdown():
    blocks = [
        Heading("Results"),
        Text(["see ", Code("a|b"), " and ", Code("a`b")]),
        Notes([]),
        Notes(["x", ("y", Code("z"))]),
        Lines(["ls -l", "pwd"]),
        Table(["", "n"], [["a|b", "1"], ["c", ""]], bold=[0]),
        Picture("curves", "curves.png", "Below: PSNR."),
        Picture("drawn", svg="<svg/>"),
        Folded("2 lines", [Lines(["x"])]),
    ]
    assert markdown(blocks).split("\n\n") == [
        "## Results",
        "see `a|b` and `` a`b ``",
        "- x\n- y`z`",
        "    ls -l\n    pwd",
        "| | n |\n|---|---|\n| **a\\|b** | **1** |\n| c | |",
        "![curves](curves.png)",
        "Below: PSNR.",
        "2 lines:",
        "    x\n",
    ]


def test_names_are_literal_in_markdown():
    literal = ["val_acc1", "95 % (Wilson)", "C:\\photos", "a - b", "#1", "x & y", "fish & chips;", "1 < 2"]
    assert markdown([Text(text) for text in literal]) == "\n\n".join(literal).replace("<", "&lt;") + "\n"
    expected = [
        "&lt;script>document.title = 'no'&lt;/script>",
        "a\\|b",
        "\\*\\*bold\\*\\*",
        "[x]\\(y)",
        "\\`code\\`",
        "&amp;lt;",
        "a b ",
        "\\xe9\\ud800",
    ]
    assert markdown([Text(text) for text in HOSTILE]).rstrip("\n").split("\n\n") == expected
    assert markdown([Text("_a_ __b__ \\* ~c~ $d$")]) == "\\_a\\_ \\_\\_b\\_\\_ \\\\\\* \\~c\\~ \\$d\\$\n"


def test_names_are_literal_in_the_page(tmp_path):
    blocks = [
        Heading(HOSTILE[0]),
        Text(HOSTILE[1]),
        Notes(HOSTILE),
        Lines(HOSTILE),
        Table(HOSTILE, [HOSTILE], sortable=True),
        Picture(HOSTILE[0], HOSTILE[0], HOSTILE[0]),
        Picture('"><b>', svg="<svg/>"),
        Folded(HOSTILE[0], [Text(Code(HOSTILE[0]))]),
    ]
    write_report(str(tmp_path), HOSTILE[0], blocks)
    text = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert text.count("<script>") == 1 and "<b>" not in text and "\0" not in text
    assert shown(tmp_path, "title") == HOSTILE[0]
    visible = [*HOSTILE[:6], "a b ", "\\xe9\\ud800"]
    assert shown(tmp_path, "td") == shown(tmp_path, "li") == "".join(visible)
    assert shown(tmp_path, "code").endswith(HOSTILE[0])


def png(path, width: int, height: int, dpi: int | None = None) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **({"dpi": (dpi, dpi)} if dpi else {}))
    return path.read_bytes()


def test_pictures_are_inside_the_page_at_their_resolution_unless_it_would_be_too_large(tmp_path, monkeypatch):
    small, plot = png(tmp_path / "small.png", 40, 20), png(tmp_path / "plot.png", 600, 300, dpi=120)
    png(tmp_path / "huge.png", 800, 500)
    monkeypatch.setattr(page, "LARGEST", len(small) + len(plot))
    names = ["small", "huge", "plot", "gone"]
    write_report(str(tmp_path), "Pictures", [Picture(f"the {name}", f"{name}.png") for name in names])
    text = (tmp_path / "report.html").read_text()
    found = re.findall(r'<img alt="the (\w+)" width="(\d+)" height="(\d+)".*?src="data:image/png;base64,(.*?)"', text)
    assert [one[:3] for one in found] == [("small", "40", "20"), ("plot", "480", "240")]
    for (*_, data), original in zip(found, (small, plot)):
        assert base64.b64decode(data) == original and Image.open(BytesIO(original))
    assert "Left out: huge.png, of 1.2 MB, is beside this page." in text and "gone.png could not be written." in text
    assert all(f"![the {name}]({name}.png)" in (tmp_path / "report.md").read_text() for name in names)


def test_numbers_and_intervals_are_columns_of_numbers():
    cells = ["-1.5", "+2", "1e-05", "inf", "12.3 %", "10.00%", "0.1 to 2", "base", "not finite", ""]
    assert all(Table(["x"], [[cell], ["1"]]).numeric(0) for cell in cells)
    assert not any(Table(["x"], [[cell], ["1"]]).numeric(0) for cell in ("3 x 8 x 8", "1a", "lr=1", "yes", "1 cat"))
    assert not Table(["x"], [[""], [""]]).numeric(0)


def browse(folder, script: str, width: int = 1200, dark: bool = False) -> dict:
    """What `script` returns in report.html of `folder`, opened in a window of this width.

    The page, with the script at its end, is in a frame, because a browser's own window has a least width.
    """
    text = (folder / "report.html").read_text("utf-8")
    told = f"<script>document.documentElement.dataset.told = JSON.stringify((() => {{ {script} }})())</script>"
    framed = html.escape(text.replace("</body>", told + "</body>"))
    loaded = "document.title = this.contentDocument.documentElement.dataset.told"
    size = f"border: 0; width: {width}px; height: 800px"
    outer = f'<!doctype html><iframe style="{size}" onload="{loaded}" srcdoc="{framed}"></iframe>'
    (folder / "outer.html").write_text(outer, "utf-8")
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={folder / 'profile'}"]
    line += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width + 100},900"]
    line += ["--dump-dom", (folder / "outer.html").as_uri()]
    dom = subprocess.run(line, capture_output=True, timeout=60, check=True).stdout.decode()
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S)[1]))


@in_chromium
@pytest.mark.slow
def test_a_browser_shows_the_page_and_sorts_its_tables(tmp_path):
    png(tmp_path / "wide.png", 900, 100)
    table = Table(["name", "value", "interval", "share"], ROWS, bold=[0], sortable=True)
    wide = Table([f"column {i}" for i in range(30)], [["1"] * 30])
    lines = Lines(["x" * 300, "python main_finetune.py " + "--flag value " * 40])
    write_report(str(tmp_path), HOSTILE[0], [table, wide, lines, Picture("wide", "wide.png"), *map(Text, HOSTILE)])
    script = """
        const buttons = [...document.querySelectorAll("th button")], order = [];
        const names = () => [...document.querySelector("tbody").rows].map(row => row.cells[0].textContent).join("");
        for (const press of [0, 1, 2, 3, 3]) {
            buttons[press].focus();
            const reached = document.activeElement === buttons[press];
            buttons[press].click();
            order.push([names(), reached, buttons[press].parentNode.getAttribute("aria-sort")]);
        }
        const style = getComputedStyle(document.body), root = document.documentElement;
        return {
            order, title: document.title, heading: document.querySelector("h1").textContent,
            colours: [style.color, style.backgroundColor], spare: innerWidth - root.scrollWidth, width: innerWidth,
            sorted: document.querySelectorAll("[aria-sort]").length,
            pictures: [...document.images].map(image => image.naturalWidth),
        };"""
    for width, dark in ((400, True), (1400, False)):
        seen = browse(tmp_path, script, width, dark)
        assert seen["width"] == width and seen["spare"] >= 0
        assert seen["title"] == seen["heading"] == HOSTILE[0] and seen["pictures"] == [900]
        ink, paper = (sum(map(int, re.findall(r"\d+", colour))) for colour in seen["colours"])
        assert ink - paper > 450 if dark else paper - ink > 450
        # by name, value, the interval's lower end, share; what has no share comes last both ways
        assert [one[0] for one in seen["order"]] == ["abc", "acb", "cba", "cab", "acb"] and seen["sorted"] == 1
        up, down = "ascending", "descending"
        assert [one[1:] for one in seen["order"]] == [[True, way] for way in (up, up, up, up, down)]


@in_chromium
@pytest.mark.slow
def test_a_browser_fetches_nothing_for_a_page(tmp_path):
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        drawn = f'<svg width="9" height="9"><image href="http://127.0.0.1:{server.server_port}/a.png"/></svg>'
        write_report(str(tmp_path), "Run", [Picture("svg", svg=drawn)])
        assert browse(tmp_path, "return 1") == 1 and asked == []
        path = tmp_path / "report.html"
        path.write_text(path.read_text().replace("Content-Security-Policy", "nothing"))
        assert browse(tmp_path, "return 1") == 1 and asked == ["/a.png"], "the test would see a request"
        server.shutdown()


def test_a_page_may_fetch_nothing(tmp_path):
    write_report(str(tmp_path), "Run", [Table(["x"], [["1"], ["2"], ["3"]], sortable=True)])
    text = (tmp_path / "report.html").read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy" content="(.*?)">', text)[1]
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed.pop("default-src") == "'none'" and allowed.pop("img-src") == "data:"
    assert allowed == {"style-src": "'unsafe-inline'", "script-src": "'unsafe-inline'"}
    assert not re.search(r"(src|href)=|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text

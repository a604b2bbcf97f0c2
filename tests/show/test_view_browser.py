"""The page in a real browser, where there is one: it renders, names ranges on hovering, and works by keyboard."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from engine import api
from engine.show.screenshot import browser
from tests.support.invoking import invoke

FIXTURES = Path(__file__).parents[1] / "fixtures" / "internevo"
pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium is installed")


def page(tmp_path: Path) -> Path:
    api.view("families/internlm2.yaml", FIXTURES / "v2_tp2_pp2", tmp_path / "view.html")
    return tmp_path / "view.html"


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_view_draws_itself_as_a_picture(tmp_path: Path) -> None:
    command = ["view", "-m", "families/internlm2.yaml", "-s", str(FIXTURES / "v2_tp2_pp2")]
    done = invoke(*command, "-o", str(tmp_path / "view.html"), "--png", str(tmp_path / "view.png"))
    assert done.exit_code == 0, done.stderr
    width, height = size(tmp_path / "view.png")
    assert width == 1200 and height > 4000
    assert (tmp_path / "view.png").stat().st_size > 50_000


def scripted(page: Path, script: str, tmp_path: Path) -> dict[str, object]:
    """What a script finds in the page as a browser shows it. The page's policy allows its own script only,
    so a copy without the policy has one more."""
    text = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page.read_text())
    copy = tmp_path / "scripted.html"
    probe = f"<script>addEventListener('load', () => {{ {script} }});</script>"
    copy.write_text(text.replace("</body>", f"{probe}<pre id='found'></pre></body>"))
    found = browser()
    assert found is not None
    command = [found, "--headless", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    command += ["--disable-background-networking", "--disable-sync", "--no-first-run"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    shown = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    told = re.search(r"<pre id=\"found\">(.*?)</pre>", shown, re.DOTALL)
    assert told is not None
    result: dict[str, object] = json.loads(told[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    return result


def test_hovering_and_typing_answer_where_an_element_comes_from(tmp_path: Path) -> None:
    script = """
      const figure = document.querySelector("figure");
      const svg = figure.querySelector("svg");
      const box = svg.querySelector(".box");
      box.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      const title = (box.querySelector("title") || box.closest("g").querySelector("title")).textContent;
      const on = svg.querySelectorAll(".box.on").length;
      const input = figure.querySelector(".asking input");
      input.focus();
      input.value = "0, 0";
      input.dispatchEvent(new Event("input", { bubbles: true }));
      const filter = document.getElementById("filter");
      filter.value = "k_proj";
      filter.dispatchEvent(new Event("input", { bubbles: true }));
      const left = [...document.querySelectorAll("[data-filtered]")].filter((one) => !one.hidden).length;
      document.getElementById("found").textContent = JSON.stringify({
        title, on, focused: document.activeElement === input,
        answer: figure.querySelector(".asking output").textContent, left,
        all: document.querySelectorAll("[data-filtered]").length,
      });
    """
    found = scripted(page(tmp_path), script, tmp_path)
    assert "model_tp" in str(found["title"])
    assert int(str(found["on"])) >= 1
    assert found["focused"] is True
    assert re.search(r"model_tp0_pp0\.pt:.*\[0, 0\], bytes \d+…\d+", str(found["answer"]))
    assert 0 < int(str(found["left"])) < int(str(found["all"]))

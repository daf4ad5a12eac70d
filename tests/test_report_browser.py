"""The report in a real browser: every view is an address, so a headless one opens it and prints what became of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
from report_runs import edit, write_run

from baft.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000"),
    "--enable-logging=stderr",  # what scripts throw or print
)
HOSTILE = "</script><script>document.title='taken'</script><b id='planted'>bold</b>"


@dataclass(frozen=True)
class View:
    """What stands in a page after its scripts ran."""

    dom: str

    def texts(self, pattern: str) -> list[str]:
        """The text within each match's group, without markup."""
        found = re.findall(pattern, self.dom, re.DOTALL)
        return [unescape(re.sub(r"<[^>]*>", "", text)).strip() for text in found]

    @property
    def numbers(self) -> list[int]:
        """Of the edits in the table."""
        return [int(number) for number in self.texts(r'<a id="link-edit-\d+"[^>]*>(\d+)</a>')]

    @property
    def count(self) -> str:
        (text,) = self.texts(r'<p id="count"[^>]*>(.*?)</p>')
        return text

    @property
    def detail(self) -> str:
        (text,) = re.findall(r'<article class="detail".*?</article>', self.dom, re.DOTALL)
        return text


@pytest.fixture(scope="session")
def browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")


def _open(browser: str, page: Path, view: str = "") -> View:
    with tempfile.TemporaryDirectory() as profile:
        arguments = [browser, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}{view}"]
        done = subprocess.run(arguments, capture_output=True, encoding="utf-8", errors="replace", timeout=240)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return View(done.stdout)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with 120 edits of all fates and a hostile text, and a small one."""
    folder = tmp_path_factory.mktemp("report")

    def fate(k: int) -> dict[str, object]:
        if k == 7:
            return {"prompt": HOSTILE, "said": HOSTILE}
        return {
            "right_after": k not in (3, 4),  # 3 never holds, 4 only at the end
            "right_at_the_end": k not in (3, 80, 81, 90),  # 90 is superseded
            "diverged": k == 99,
            "losses": [9.0, None] if k == 99 else [8.0, 2.5, 0.6, 0.02],
        }

    runs = [
        write_run(folder / "large", (edit(k, **fate(k)) for k in range(120)), superseded=[90]),
        write_run(folder / "small", [edit(0, target="viola"), edit(1, final=[])], method="LoRA"),
    ]
    return write_report(runs, folder / "page.html", most_edits=110).page


def test_the_first_view(browser: str, page: Path) -> None:
    view = _open(browser, page)
    assert view.numbers[:4] == [0, 1, 2, 3] and len(view.numbers) == 50
    assert view.count == "110 edits"
    (sample,) = view.texts(r'<p id="sample" class="aloud">(.*?)</p>')
    assert sample.startswith("This page has 110 of the run's 120 edits")
    filters = ["all 110", "failed at the end 3", "forgotten 2", "changed something else 0", "diverged 1"]
    (shown,) = re.findall(r'<nav id="filters".*?</nav>', view.dom, re.DOTALL)
    assert View(shown).texts(r"<a [^>]*>(.*?)</a>") == filters
    assert view.texts(r"<span>(page [^<]*)</span>") == ["page 1 of 3"]
    (plane,) = re.findall(r'<figure id="compared-trade-off">.*?</figure>', view.dom, re.DOTALL)
    assert "<svg" in plane and "BaFT, rank 8" in plane and "LoRA, rank 8" in plane


@pytest.mark.parametrize(
    ("address", "numbers", "count"),
    [
        ("#run=0&show=failed", [3, 80, 81], "3 edits"),
        ("#run=0&show=forgotten", [80, 81], "2 edits"),
        ("#run=0&show=diverged", [99], "1 edit"),
        ("#run=0&q=PERSON+11+", [11], "1 edit with “PERSON 11 ”"),
        ("#run=0&show=failed&q=person+8", [80, 81], "2 edits with “person 8”"),
        ("#run=0&q=nobody", [], "No edits with “nobody”"),
        ("#run=1&q=viola", [0], "1 edit with “viola”"),
        ("#run=77&show=nonsense&page=9", [0, 1], "2 edits"),
    ],
)
def test_filters_and_search(browser: str, page: Path, address: str, numbers: list[int], count: str) -> None:
    view = _open(browser, page, address)
    assert (view.numbers, view.count) == (numbers, count)


def test_a_superseded_edit_is_not_judged_at_the_end(browser: str, page: Path) -> None:
    view = _open(browser, page, "#run=0&edit=90&q=Person+90+")
    assert "A later request has its prompt and another target, so it isn't judged at the end." in view.detail
    rows = View(view.detail).texts(r'<tr>(<td class="prompt">.*?</tr>)')
    assert rows[0] == "Person 90 plays theoboecello.✓ oboeviolin"


def test_pages(browser: str, page: Path) -> None:
    view = _open(browser, page, "#run=0&page=3")
    assert len(view.numbers) == 10 and view.numbers[0] > 100
    assert view.texts(r"<span>(page [^<]*)</span>") == ["page 3 of 3"]


def test_one_edit_in_full(browser: str, page: Path) -> None:
    view = _open(browser, page, "#run=0&edit=80")
    assert 80 in view.numbers and 0 not in view.numbers  # the page that has it
    assert "Person 80 plays the" in view.detail and "<polyline" in view.detail
    assert "Loss from 8 to 0.02 in 4 steps" in view.detail
    rows = View(view.detail).texts(r'<tr>(<td class="prompt">.*?</tr>)')
    assert rows[0] == "Person 80 plays theoboecello.✓ oboe✗ violin"
    assert rows[3] == "unrelated The capital of Ruritania isthe same as beforeStrelsau.✓ Strelsau✓ Strelsau"


def test_an_edit_that_never_had_a_finite_loss_or_an_end(browser: str, page: Path) -> None:
    assert "its loss was no finite number any more" in _open(browser, page, "#run=0&edit=99").detail
    assert (
        View(_open(browser, page, "#run=1&edit=1").detail).texts(r'data-title="at the end">(.*?)</td>')[0] == "no data"
    )


def test_hostile_text_stays_text(browser: str, page: Path) -> None:
    view = _open(browser, page, "#run=0&edit=7&q=%3Cscript%3E")
    assert view.numbers == [7] and "<title>2 runs of editing, compared</title>" in view.dom
    assert not re.findall(r"<b id=.planted", view.dom)
    assert HOSTILE in unescape(view.detail)

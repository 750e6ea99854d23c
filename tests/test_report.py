"""Reports on runs: the page as a browser shows it, the table and the picture."""

import csv
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from llmtrain.folder import RunFolder, write_json, write_text
from llmtrain.report import main, write_report
from llmtrain.report.comparison import Comparison, compare
from llmtrain.report.curves import thinned
from llmtrain.report.importance import importance
from llmtrain.report.scaling import fit
from tests.conftest import SMALL, Command
from tests.synthetic_runs import make_run, make_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WITH_BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)
MOST_BYTES = 10_000_000
PNG = b"\x89PNG\r\n"
SORT_BY_LR = """<script>
for (const head of document.querySelectorAll("#runs th")) if (head.textContent.trim() === "lr") {
  head.querySelector("button").click(); head.querySelector("button").click();
}
</script></body>"""

SWITCH_ALL = """<script>
const chart = document.getElementById("loss-chart"), told = document.createElement("ol");
const item = (text) => Object.assign(document.createElement("li"), { textContent: text });
const tell = (text) => told.append(item(text));
for (const button of document.querySelectorAll("#loss-axis button")) {
  button.click();
  tell(chart.layout.xaxis.title.text);
}
for (const box of document.querySelectorAll("#loss-section input")) box.click();
document.querySelectorAll("#runs tbody tr")[2].click();
tell(chart.layout.xaxis.type + " " + chart.layout.yaxis.type);
told.id = "told";
document.body.append(told);
</script></body>"""


class Page(HTMLParser):
    """What a test asks of a page: its elements, its references, and its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.title = ""
        self.items: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img"):
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if "td" in self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()
        if self.inside[-2:] == ["ol", "li"]:
            self.items.append(data)
        if self.inside[-1:] == ["title"] and "svg" not in self.inside:
            self.title += data

    @property
    def references(self) -> list[str]:
        """Where it leads to and what it would load."""
        names = ("src", "href", "xlink:href", "action", "data", "poster")
        return [str(found[name]) for _, found in self.elements for name in names if name in found]

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def classes(self) -> list[str]:
        return [name for _, found in self.elements for name in (found.get("class") or "").split()]

    def problem(self) -> dict[str, str | None]:
        return next(found for _, found in self.elements if found.get("id") == "problems")


def shown(path: Path) -> Page:
    """The page after a browser has run its scripts."""
    assert CHROMIUM is not None
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000"]
    home = {"HOME": str(path.parent), "XDG_CONFIG_HOME": str(path.parent / ".config")}
    ended = subprocess.run(
        [CHROMIUM, *words, "--dump-dom", path.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | home,
    )
    return Page(ended.stdout)


def is_drawn(page: Page) -> bool:
    """Whether all scripts ran to their end and no error was met."""
    told = [found.get("data-drawn") for tag, found in page.elements if tag == "html"]
    return told == ["all"] and "hidden" in page.problem()


def csv_rows(
    comparison_paths: list[str], capsys: pytest.CaptureFixture[str]
) -> list[dict[str, str]]:
    assert main([*comparison_paths, "--format", "csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of twelve trials: done, pruned, failed and refused."""
    return make_sweep(tmp_path_factory.mktemp("twelve"), 12)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 300 trials."""
    return make_sweep(tmp_path_factory.mktemp("many"), 300)


@WITH_BROWSER
def test_a_browser_draws_a_sweep_of_twelve_without_an_error(twelve: Path) -> None:
    out = write_report([twelve], twelve / "report.html")
    page = shown(out)
    assert is_drawn(page)
    assert page.title == "lr_and_size · 12 runs: 8 done, 2 pruned, 1 refused, 1 failed"
    charts = {
        "loss-chart",
        "progress-chart",
        "parallel-chart",
        "importance-chart",
        "reality-chart",
        "scaling-chart",
    }
    assert charts <= page.ids()
    assert page.classes().count("js-plotly-plot") == len(charts)
    assert page.classes().count("main-svg") >= len(charts)
    assert "canvas" in {tag for tag, _ in page.elements}, "the parallel coordinates"
    assert (
        len([row for row in page.rows if row and row[1].startswith(("made", "★", "trial"))]) == 12
    )


@WITH_BROWSER
def test_a_click_on_a_header_sorts_and_another_turns_it_round(twelve: Path, tmp_path: Path) -> None:
    text = write_report([twelve], tmp_path / "report.html").read_text()
    copy = tmp_path / "clicked.html"
    copy.write_text(text.replace("</body>", SORT_BY_LR))
    page = shown(copy)
    heads = [found for tag, found in page.elements if tag == "th"]
    (sorted_,) = [place for place, head in enumerate(heads) if "aria-sort" in head]
    rates = [float(row[sorted_]) for row in page.rows if len(row) > 12]
    assert heads[sorted_]["aria-sort"] == "descending"
    assert len(rates) == 12
    assert rates == sorted(rates, reverse=True)


@WITH_BROWSER
def test_every_switch_of_the_loss_chart_draws_it_anew(twelve: Path, tmp_path: Path) -> None:
    text = write_report([twelve], tmp_path / "report.html").read_text()
    copy = tmp_path / "clicked.html"
    copy.write_text(text.replace("</body>", SWITCH_ALL))
    page = shown(copy)
    assert is_drawn(page)
    assert page.classes().count("lit") == 1
    assert page.items == ["steps", "tokens", "training FLOPs", "minutes of training", "log log"]


@WITH_BROWSER
def test_a_page_of_300_runs_is_drawn_and_stays_small(many: Path) -> None:
    out = write_report([many], many / "report.html")
    assert out.stat().st_size < MOST_BYTES
    page = shown(out)
    assert is_drawn(page)
    assert page.classes().count("legend") == 1
    assert page.classes().count("trace") < 60, "runs of one colour are one line"


@WITH_BROWSER
def test_a_page_of_one_run_has_no_empty_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "alone-1")
    page = shown(write_report([run.path], tmp_path / "report.html"))
    assert is_drawn(page)
    assert "loss-chart" in page.ids()
    others = {"parallel-chart", "importance-chart", "reality-chart", "scaling-chart", "runs"}
    assert not others & page.ids()
    assert page.title == "alone-1 · 1 run: done"


@WITH_BROWSER
def test_text_of_runs_is_shown_and_never_carried_out(tmp_path: Path) -> None:
    evil = (
        "<script>document.title = 'taken'</script><img src=http://example.com/x onerror=alert(1)>"
    )
    for number in range(3):
        keys = {"model.name": f"{evil}{number}", "optimizer.lr": 10.0**-number}
        error = f"why {evil}"
        make_run(tmp_path / f"<b>run{number}", keys, number, text=evil, error=error)
    out = write_report([tmp_path], tmp_path / "report.html")
    page = shown(out)
    assert is_drawn(page)
    assert "taken" not in page.title
    assert "img" not in {tag for tag, _ in page.elements}
    assert "b" not in {found.get("class") for tag, found in page.elements if tag == "b"}
    assert not [found for found in page.references if found.startswith(("http", "//"))]
    assert out.read_text().count("&lt;script&gt;") >= 3


@pytest.mark.parametrize("folder", ["twelve", "many"])
def test_a_page_loads_nothing(folder: str, request: pytest.FixtureRequest) -> None:
    sweep = request.getfixturevalue(folder)
    out = write_report([sweep], sweep / "report.html")
    page = Page(out.read_text())
    links = [found for found in page.references if not found.startswith("../")]
    assert links == []
    assert {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object"} == set()
    policy = [found["content"] for _, found in page.elements if "http-equiv" in found]
    assert str(policy[0]).startswith("default-src 'none'")


def test_links_lead_from_the_page_to_the_folders(twelve: Path, tmp_path: Path) -> None:
    out = write_report([twelve], tmp_path / "elsewhere" / "deep" / "page.html")
    page = Page(out.read_text())
    assert len(page.references) == 11, "a refused trial has no folder"
    for found in page.references:
        assert RunFolder(out.parent / unquote(found)).status.exists()


def test_a_sweep_is_written_into_its_folder_and_the_command_says_where(
    twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (twelve / "report.html").unlink(missing_ok=True)
    assert main([str(twelve)]) == 0
    assert capsys.readouterr().out == f"{twelve / 'report.html'}\n"
    assert (twelve / "report.html").exists()


def test_csv_has_a_row_for_each_trial_and_marks_the_best(
    twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = csv_rows([str(twelve)], capsys)
    trials = json.loads((twelve / "sweep.json").read_text())["trials"]
    assert len(rows) == 12
    (best,) = [row for row in rows if row["is_best"] == "true"]
    values = {trial["number"]: trial["values"][0] for trial in trials if trial["values"]}
    assert int(best["trial"]) == min(values, key=values.__getitem__)
    assert float(best["eval_loss"]) == min(values.values())
    by_trial = {int(row["trial"]): row for row in rows}
    for trial in trials:
        row = by_trial[trial["number"]]
        assert row["state"] == trial["state"]
        assert float(row["optimizer.lr"]) == trial["params"]["optimizer.lr"]
        assert row["error"] == (trial["error"] or "")
    assert float(best["tokens"]) == 400 * 4096
    assert float(best["flops"]) == pytest.approx(float(best["tokens"]) * 6.4 * 50.5e6)
    assert float(best["cost"]) == pytest.approx(float(best["seconds"]) / 3600 * 2.5)


def test_markdown_is_a_table_with_a_headline_and_its_text_stays_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a-1", {"optimizer.lr": 0.001}, error="a | b\n<i>")
    make_run(tmp_path / "b-2", {"optimizer.lr": 0.01})
    assert main([str(tmp_path), "--format", "md"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("2 runs: 2 done. Best: lr=0.001 with held-out loss 3.")
    assert lines[4].startswith("| run | state | held-out | lr |")
    assert lines[5].startswith("| --- | --- | --: | --: |")
    assert lines[6].startswith("| **a-1** | **done** |")
    assert r"a \| b &lt;i>" in lines[6]
    assert len(lines) == 8


def test_a_picture_is_drawn_of_runs_and_of_sweeps(twelve: Path, tmp_path: Path) -> None:
    assert write_report([twelve], tmp_path / "sweep.png").read_bytes().startswith(PNG)
    run = make_run(tmp_path / "alone-1", num_steps=20)
    assert write_report([run.path], tmp_path / "run.png").read_bytes().startswith(PNG)


def test_broken_folders_are_rows_that_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "whole", {"optimizer.lr": 0.001}, num_steps=50)
    for name in ("status.json", "plan.json", "config.yaml", "metrics.jsonl", "summary.json"):
        folder = make_run(tmp_path / f"bad_{name}", {"optimizer.lr": 0.01}, num_steps=50)
        (folder.path / name).write_bytes(b"{\xff: [torn")
    strange = make_run(tmp_path / "strange", num_steps=50)
    for path in (strange.path / "plan.json", strange.config, strange.summary):
        path.write_text("[1, 2]")
    strange.metrics.write_text('5\nnull\n{"step": "x", "loss": 1}\n{"step": 3, "loss": null}\n')
    strange.overrides.write_text("half a 'quote")
    halves = json.dumps({"step": 1, "prompt": "\udc80", "text": "\ud83d"})
    strange.samples.write_text(halves + '\n{"prompt": 1}\n{"prompt": null, "text": 7}\n')
    RunFolder(tmp_path / "new").write_status("planned", 0)
    rows = {row["run"]: row for row in csv_rows([str(tmp_path)], capsys)}
    assert len(rows) == 8
    assert rows["bad_status.json"]["state"] == "unreadable"
    for name in ("status.json", "plan.json", "config.yaml", "metrics.jsonl", "summary.json"):
        assert rows[f"bad_{name}"]["error"] == f"{name} cannot be read"
    broken = ("config.yaml", "overrides.txt", "plan.json", "summary.json")
    said = "; ".join(f"{name} cannot be read" for name in broken)
    assert rows["strange"]["error"] == said
    assert (rows["new"]["state"], rows["new"]["error"]) == ("planned", "")
    out = write_report([tmp_path], tmp_path / "report.html")
    assert "summary.json cannot be read" in out.read_text()
    assert write_report([tmp_path], tmp_path / "report.png").read_bytes().startswith(PNG)


def test_runs_that_have_recorded_nothing_are_a_table_without_charts(tmp_path: Path) -> None:
    for number in range(3):
        RunFolder(tmp_path / f"run{number}").write_status("failed", 0, error=f"because {number}")
    text = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "because 2" in text
    assert "plotly" not in text.split("<script id=")[0], "nothing is drawn, nothing is brought"
    assert write_report([tmp_path], tmp_path / "report.png").read_bytes().startswith(PNG)


def test_what_differs_is_told_and_what_only_follows_is_not(tmp_path: Path) -> None:
    base = {"output_root": "/somewhere", "train.log_every": 1}
    small = base | {"model.name": "small", "model.config.hidden_size": 64}
    large = {"model.name": "large", "model.config.hidden_size": 128, "optimizer.lr": 0.002}
    for name, keys in (("a", small), ("b", large), ("c", small | {"seed": 1})):
        folder = make_run(tmp_path / name, keys, num_steps=20)
        write_text(folder.overrides, "model=small,large optimizer.lr=0.001,0.002\n")
    comparison = compare([tmp_path])
    assert set(comparison.varied) == {"seed", "model.name", "optimizer.lr"}
    labels = [comparison.label(run) for run in comparison.runs]
    assert labels[1] == "seed=0 model=large lr=0.002"


def test_a_folder_counts_once_however_often_it_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=20)
    assert len(compare([tmp_path, run.path]).runs) == 1


def test_vocabularies_that_differ_are_ranked_by_bits_per_byte(tmp_path: Path) -> None:
    for number in range(2):
        run = make_run(tmp_path / f"run{number}", num_steps=20)
        plan = json.loads(run.plan.read_text())
        write_json(run.plan, plan | {"vocab_size": 4096 * (1 + number)})
    assert compare([tmp_path]).objective.name == "eval_bits_per_byte"
    assert "ranked by bits per byte" in write_report([tmp_path], tmp_path / "a.html").read_text()


def test_with_two_objectives_all_that_no_other_beats_are_best(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 6)
    told = json.loads((sweep / "sweep.json").read_text())
    told["objectives"] = {"eval_loss": "minimize", "tokens_per_second": "maximize"}
    pairs = [[3.0, 100], [2.0, 50], [3.5, 90], None, [2.5, 120], [2.1, 49]]
    for trial, values in zip(told["trials"], pairs, strict=True):
        trial["values"] = values
    write_json(sweep / "sweep.json", told)
    assert [run.number for run in compare([sweep]).best] == [1, 4]
    for trial in told["trials"]:
        trial["values"] = [3.0, None]
    write_json(sweep / "sweep.json", told)
    assert len(compare([sweep]).best) == 1, "by the objective that there is"
    assert "in every objective" not in write_report([sweep], sweep / "report.html").read_text()


def with_shares(comparison: Comparison) -> dict[str, float]:
    return importance(comparison).shares


def test_what_decides_is_found_and_too_few_runs_are_said(many: Path, twelve: Path) -> None:
    shares = with_shares(compare([many]))
    assert max(shares, key=shares.__getitem__) == "model.config.hidden_size"
    assert sum(shares.values()) == pytest.approx(1)
    found = compare([twelve])
    few = Comparison(found.name, found.place, found.runs[:5], found.objectives, True)
    assert importance(few).reason == "needs 8 finished runs; there are 4"


def test_a_power_law_is_found_again_and_none_is_made_up() -> None:
    flops = [10.0**power for power in (15, 16, 17, 18, 19)]
    law = fit(flops, [1.7 + 4e3 * x**-0.2 for x in flops])
    assert law is not None
    assert (law.floor, law.alpha) == (pytest.approx(1.7, abs=0.02), pytest.approx(0.2, rel=0.02))
    assert law.amplitude == pytest.approx(4e3, rel=0.1)
    assert law.low < 0.2 < law.high or law.low == law.high
    assert fit(flops[:3], [4.0, 3.5, 3.2]) is None, "three points say nothing of three constants"
    assert fit(flops, [4.0, 3.5, 3.9, 3.6, 3.8]) is None
    assert fit(flops, [4.0, 3.8, 3.6, 3.4, 3.2]) is None, "a line in log compute has no floor"


def test_a_thinned_curve_keeps_its_spikes_and_both_ends() -> None:
    rows = [(step, None, 3.0) for step in range(20_000)]
    rows[7777] = (7777, None, 99.0)
    rows[12_345] = (12_345, None, 0.5)
    kept = thinned(rows, 200)
    assert len(kept) <= 200
    assert {rows[0], rows[-1], rows[7777], rows[12_345]} <= set(kept)
    assert kept == sorted(kept, key=lambda row: row[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "path=nowhere does not exist; "),
        (["empty"], "path=empty holds no runs; "),
        (["torn"], "path=torn/sweep.json cannot be read ("),
        (["run", "--out", "a.pdf"], "--out=a.pdf ends in no format; "),
        (["run", "--out", "empty"], "--out=empty ends in no format; "),
        (["run", "--out", "run/config.yaml/a.html"], "cannot be written ("),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("run"), num_steps=20)
    Path("empty").mkdir()
    write_text(Path("torn/sweep.json"), "{")
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    ("package", "form"), [("plotly.offline", "html"), ("matplotlib.figure", "png")]
)
def test_a_missing_package_is_named_with_its_pip_line(
    package: str,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", num_steps=20)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert main([str(run.path), "--format", form]) == 2
    assert "pip install -c constraints.txt -e '.[report]'" in capsys.readouterr().err


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=20)
    code = "import sys; from llmtrain.report import main; main(sys.argv[1:]); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'hydra')))"
    words = [__import__("sys").executable, "-c", code, str(run.path)]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0


@WITH_BROWSER
def test_real_runs_are_compared(command: Command) -> None:
    words = [*SMALL, "train.log_every=1", "train.max_steps=6", "hardware=cpux1"]
    ended = command.run("-m", *words, "optimizer.lr=0.001,0.003")
    assert ended.returncode == 0, ended.stderr
    outputs = command.folder / "outputs"
    comparison = compare([outputs])
    assert comparison.varied == ["optimizer.lr"]
    for run in comparison.runs:
        summary = json.loads((run.path / "summary.json").read_text()) if run.path else {}
        assert run.eval_loss == summary["eval_loss"]
        assert run.tokens == summary["num_tokens"]
        assert run.memory_gib == summary["memory_gib"]
    page = shown(write_report([outputs], outputs / "report.html"))
    assert is_drawn(page)
    assert {"loss-chart", "runs"} <= page.ids()

"""The page of a run: what is in it, what it does not need, and what it looks like in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from measured_run import Reader, save_run

from rwkvinside.errors import UserError
from rwkvinside.report.facts import run_facts
from rwkvinside.report.figures import save_figure
from rwkvinside.report.page import describe, pictures_of, report_page
from rwkvinside.report.screen import end_screen
from rwkvinside.report.write import write_report

pytestmark = pytest.mark.integration
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = save_run(tmp_path_factory.mktemp("page") / "my run")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def test_the_page_needs_nothing_but_itself(run, page):
    reader = Reader(page)
    for link in reader.links:
        assert link.startswith(("#", "data:")) or (run / link).is_file(), link
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert len(reader.ids) == len(set(reader.ids)), "names of parts of figures are unique"
    assert len(page) < 2_000_000


def test_it_says_what_was_measured(page):
    text = " ".join(Reader(page).text.split())
    for part in (
        "my run",
        "Small, 2 of 3 layers of attention turned into RWKV-7, with a window of 8 tokens and 2 sinks.",
        "0.250 nats KL to the teacher, per token",
        "97.5 % same next token",
        "3.250 nats cross-entropy; the teacher has 3.000",
        "teacher 0.0000 3.0000 100.0 %",
        "control 0.7500 3.7500 92.5 %",
        "after align 0.5000 3.5000 95.0 %",
        "after distill 0.2500 3.2500 97.5 %",
        "align 4 K 0:01:20 50 25 % 95.4 MiB 191 MiB 50 %",
        "Once <b>upon</b> a time & so on",
        "no layer is spared",
        "rwkvinside train -c",
        "window: 8",
        "run abc",
    ):
        assert part in text, part
    assert page.count('<li class="window" title="layer') == 2 and page.count('<li class="attention" title="layer') == 1


def test_every_figure_has_its_files_and_its_numbers(run, page):
    names = ("validation", "training-loss", "alignment", "position")
    assert {path.stem for path in (run / "figures").iterdir()} == set(names)
    for name in names:
        assert (run / "figures" / f"{name}.svg").read_text().startswith("<?xml")
        assert (run / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"figures/{name}.csv" in page
    lines = (run / "figures" / "validation.csv").read_text().splitlines()
    assert lines[0] == "of,stage,step,tokens,kl,ce,ce_teacher,agreement"
    assert lines[-2:] == ["student,distill,40,8100,0.25,3.25,3.0,0.975", "control,distill,40,8100,0.75,3.75,3.0,0.925"]
    assert len((run / "figures" / "alignment.csv").read_text().splitlines()) == 1 + 3 * 40


def test_figures_take_the_colors_of_the_page(page):
    figures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(figures) == 4
    for svg in figures:
        assert "var(--ink)" in svg and "var(--blue)" in svg or "<image" in svg
        assert not re.search(r"#(0072b2|d55e00|000000|dddddd)", svg, re.I)
        assert 'role="img" aria-label="' in svg and "<text" in svg


def test_the_same_run_is_the_same_figure(run, tmp_path):
    figure = pictures_of(run_facts(run))["alignment"].figure
    for form in ("svg", "pdf"):
        save_figure(figure, tmp_path / f"alignment.{form}")
        assert (tmp_path / f"alignment.{form}").read_bytes() == (run / "figures" / f"alignment.{form}").read_bytes()


def test_a_large_run_stays_small(tmp_path):
    facts = run_facts(save_run(tmp_path / "large", layers=48, steps=2000))
    assert len(report_page(facts, pictures_of(facts))) < 2_000_000


def test_a_run_without_a_plan_says_what_it_knows(tmp_path):
    run = save_run(tmp_path / "old")
    for name in ("plan.json", "eval.json", "config.yaml"):
        (run / name).unlink()
    student = {"teacher.num_hidden_layers": 4, "rwkv_layers": [1, 2, 3], "window": 16, "sinks": 0}
    (run / "conversion.json").write_text(json.dumps({"teacher": "hub/Model", "student": student}))
    facts = run_facts(run)
    assert describe(facts) == "Model, 3 of 4 layers of attention turned into RWKV-7, with a window of 16 tokens"
    text = Reader(report_page(facts, pictures_of(facts))).text
    assert "By position" not in text and "Configuration" not in text


def test_what_is_not_an_evaluation_is_refused(tmp_path):
    run = save_run(tmp_path / "run")
    for content in ("{", "[]", "{}", '{"by_position": []}'):
        (run / "eval.json").write_text(content)
        with pytest.raises(UserError, match="eval.json is not an evaluation"):
            write_report(run)
    with pytest.raises(UserError, match="nowhere is not an evaluation"):
        write_report(run, evaluation=run / "nowhere")


def test_the_end_of_a_run_fits_80_columns(run):
    text = end_screen(run_facts(run))
    lines = text.splitlines()
    commands = [line for line in lines if line.startswith("  rwkvinside")]
    assert all(len(line) < 80 for line in lines if line not in commands and str(run) not in line)  # a path is whole
    assert [line.split()[1] for line in commands] == ["report", "chat", "export"]
    assert f"'{run}'" in commands[0], "a name with a space is quoted"
    table = {line[:16].strip(): line[16:].split() for line in lines if line[16:].strip()}
    assert table["after distill"] == ["0.2500", "3.2500", "97.5%", "4", "K", "0:01:20", "95.4", "MiB"]
    assert "student   a time & so on" in text.replace("student  a", "student   a")


def test_a_stage_that_ended_early_is_named(run, tmp_path):
    early = shutil.copytree(run, tmp_path / "early")
    end = {"step": 12, "steps": 40, "reason": "validation KL has not improved in 3 evaluations; best 0.25 at step 4"}
    (early / "conversion.json").write_text(json.dumps({"early_ends": {"distill": end}}))
    sentence = f"distill ended early, at step 12 of 40: {end['reason']}"
    facts = run_facts(early)
    lines = end_screen(facts).splitlines()
    assert sentence in " ".join(" ".join(lines).split())
    assert max(len(line) for line in lines if str(early) not in line) < 80
    assert f"<p>{sentence}.</p>" in report_page(facts, {})


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_a_browser_shows_it(run, tmp_path, mode):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    picture = tmp_path / ("page.pdf" if mode == "print" else "page.png")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1100,3600"]
    command += ["--blink-settings=preferredColorScheme=0"] if mode == "dark" else []
    command += [f"--print-to-pdf={picture}" if mode == "print" else f"--screenshot={picture}"]
    done = subprocess.run([*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    if mode == "print":
        assert picture.read_bytes().startswith(b"%PDF")
        return
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (3600, 1100)
    paper, bands = pixels[2, 2], pixels.reshape(36, 100, 1100, 3)
    assert (paper.mean() > 0.9) == (mode == "light")
    drawn = (abs(bands - paper).max(-1) > 0.2).any((1, 2))
    assert drawn[:20].all(), "the page is filled from the top"
    blue = (0.0, 0.447, 0.698) if mode == "light" else (0.361, 0.702, 0.910)
    assert (abs(pixels - blue).max(-1) < 0.03).sum() > 200, "curves have the page's blue"

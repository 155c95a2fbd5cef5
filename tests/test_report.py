"""The report on made-up results: every run present, nothing from outside, everything escaped."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from rich.console import Console

from vlmfast.eval import overlay, report, results
from vlmfast.eval.report import export, page, plot, text
from vlmfast.eval.report.rows import Interval, arrange, line_label
from vlmfast.eval.report.table import notes, print_tables
from vlmfast.eval.results import Metric, Result, TaskResult, load_results
from vlmfast.eval.tasks import TASKS as TASKS_BY_NAME
from vlmfast.eval.tasks import task_hash
from vlmfast.visual import View

TASKS = {
    "existence": "accuracy",
    "colour": "accuracy",
    "count": "accuracy",
    "where": "accuracy",
    "relation": "accuracy",
    "binding": "accuracy",
    "digits": "accuracy",
    "word": "accuracy",
    "caption": "recall",
}
METHODS = {"random": 0.0, "grid": 0.02, "fastervlm": 0.01, "hiprune": 0.05}
KEEPS = (1.0, 0.5, 0.33, 0.2, 0.11)


def metric(value, base=None, width=0.02):
    ends = {"low": max(0.0, value - width), "high": min(1.0, value + width)}
    if base is None:
        return Metric(value=value, **ends)
    return Metric(
        value=value,
        **ends,
        difference=value - base,
        difference_low=value - base - width,
        difference_high=value - base + width,
    )


def real_sample(task):
    """Hash of a task on two images, and its first question."""
    docs = TASKS_BY_NAME[task].load(2, 0)
    return task_hash(TASKS_BY_NAME[task], docs), docs[0]


def made_up(model, spec, tasks=tuple(TASKS), n=144, real=False):
    """A result in the schema, smooth in keep; every task a little different. `real`: samples on true test scenes."""
    name, _, settings = spec.partition(":")
    keep = float(settings.split("=")[1].split(",")[0]) if settings else None
    share = 1.0 if keep is None else keep
    base = 0.9 if "llava" in model else 0.86
    entries = {}
    for i, task in enumerate(tasks):
        full = base - 0.02 * i
        fall = (1 - share) ** 2 * (0.3 - METHODS.get(name, 0.0) + (0.08 if (i + len(name)) % 4 == 0 else 0))
        value = full - fall
        unpatched = None if keep is None else full
        metrics = {TASKS[task]: metric(value, unpatched)}
        if task == "existence":
            metrics |= {f"accuracy/{kind}": metric(value - 0.01 * k, unpatched) for k, kind in enumerate("ab")}
        entries[task] = TaskResult(hash=f"{i:064x}", n=300, images=100, headline=TASKS[task], metrics=metrics)
    values = [entry.metrics[entry.headline].value for entry in entries.values()]
    unpatched = None if keep is None else sum(base - 0.02 * i for i in range(len(tasks))) / len(tasks)
    kept = max(1, math.ceil(share * n))
    flops = 2.4e8 + 5.1e6 * kept
    side = math.isqrt(n)
    stride = [j for j in range(n) if (j * 7 + len(name)) % n < kept]
    result = Result(
        model=model,
        model_hash="ab" * 32,
        spec=spec,
        method=name,
        keep=keep,
        limit=2 if real else None,
        seed=0,
        batch=32,
        device="cpu",
        dtype="float32",
        tasks=entries,
        macro=metric(sum(values) / len(values), unpatched, 0.012),
        cost={
            "convention": "X2: 2 x multiply-adds, tower and selection included",
            "tower": 2e8,
            "projector": 4e7,
            "selection": 1e5,
            "prefill": flops - 2.4e8,
            "head": 1e6,
            "decode": 1e7,
            "total_prefill": flops,
            "share_of_unpatched": flops / (2.4e8 + 5.1e6 * n),
            "visual_tokens": float(kept),
            "visual_tokens_per_layer": [float(kept)] * 4,
            "visual_tokens_before": float(n),
            "kv_bytes": 1024.0 * (kept + 20),
        },
        latency={
            "ttft_ms": {"median": 8 + 0.06 * kept, "low": 7.8 + 0.06 * kept, "high": 8.3 + 0.06 * kept},
            "prefill_ms": {"median": 3 + 0.06 * kept, "low": 3 + 0.06 * kept, "high": 3.1 + 0.06 * kept},
            "decode_ms_per_token": {"median": 2.5, "low": 2.4, "high": 2.6},
            "vision_ms": {"median": 5.0, "low": 4.9, "high": 5.1},
            "ttft_speedup": {"median": 16.64 / (8 + 0.06 * kept), "low": 1.0, "high": 3.0},
            "peak_memory_mb": 30.0 + 0.05 * kept,
            "threads": 1,
            "repeats": 5,
        },
        environment={"python": "3.11", "torch": "2.13.0", "git_commit": "0" * 40, "device": "cpu", "cpu": "A & B <C>"},
        command="vlmfast eval --model testbed:llava",
        started="2026-11-20T10:00:00",
        seconds=12.5,
        samples=[
            {
                "task": task,
                "index": 3 * i,
                "prompt": f'Is there a <b>{task}</b> & a "dog"?',
                "answer": "yes" if share > 0.3 else "no </script><script>alert(1)</script>",
                "expected": "yes",
                "kept": [stride],
                "grid": [1, side, side],
            }
            for i, task in enumerate(tasks)
        ],
    )
    if not real:
        return result
    for sample in result.samples:
        digest, doc = real_sample(sample["task"])
        result.tasks[doc.task] = dataclasses.replace(result.tasks[doc.task], hash=digest)
        sample |= {"index": doc.scene, "prompt": doc.prompt, "expected": doc.answer}
        sample["answer"] = doc.answer if share > 0.3 else "no"
    return result


def sweep(models=("testbed:llava", "testbed:qwen2_5_vl"), methods=tuple(METHODS), keeps=KEEPS, **kwargs):
    specs = ["none", *(f"{method}:keep={keep}" for method in methods for keep in keeps)]
    return [made_up(model, spec, **kwargs) for model in models for spec in specs]


def store(folder, made):
    folder.mkdir(exist_ok=True)
    for result in made:
        results.write_result(folder / f"{results.run_name(result.model, result.spec)}.json", result)
    return folder


class Page(HTMLParser):
    """What a browser would see: elements, attributes, texts of table cells, balance of tags."""

    VOID = {"meta", "link", "br", "img", "source", "hr", "input"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack, self.text, self.ids = [], [], [], []
        self.feed(text)
        assert self.stack == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report on two models: its paths, the printed tables, its page as text and parsed."""
    folder = store(tmp_path_factory.mktemp("results"), sweep(real=True, keeps=(1.0, 0.33)))
    console = Console(file=io.StringIO(), width=200)
    paths = report.make(folder, console=console)
    text = paths.page.read_text("utf-8")
    return SimpleNamespace(folder=folder, paths=paths, printed=console.file.getvalue(), text=text, page=Page(text))


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that do not look at the pictures, which take most of the time."""
    monkeypatch.setattr(plot, "draw", lambda sections, **kwargs: repr(kwargs).encode())


class TestRows:
    def test_order_and_baseline(self):
        sections = arrange(sweep()[::-1])
        assert [section.title for section in sections] == ["testbed:llava", "testbed:qwen2_5_vl"]
        for section in sections:
            assert section.baseline is section.rows[0] and section.rows[0].spec == "none"
            assert section.labels == ("random", "grid", "fastervlm", "hiprune")
            assert section.keeps == KEEPS
            assert [row.keep for row in section.line("hiprune")] == list(KEEPS)
            assert [task.name for task in section.tasks] == list(TASKS)

    def test_numbers_of_tokens_are_no_shares(self):
        whole = dataclasses.replace(made_up("m", "grid:keep=1.0"), spec="grid:keep=1", keep=1)
        (section,) = arrange([made_up("m", "grid:keep=0.5"), whole, made_up("m", "grid:keep=1.0")])
        assert [row.spec for row in section.rows] == ["grid:keep=1.0", "grid:keep=0.5", "grid:keep=1"]
        assert section.rows[-1].keep_text == "1" and section.rows[0].keep_text == "1.0"

    def test_tokens_are_the_mean_over_the_layers(self):
        one = made_up("testbed:llava", "fastv:keep=0.5")
        one.cost["visual_tokens_per_layer"] = [144.0, 144.0, 72.0, 72.0]
        (section,) = arrange([one])
        assert section.rows[0].tokens == 108
        console = Console(file=io.StringIO(), width=200)
        print_tables([section], console)
        assert " 108 " in console.file.getvalue() and "mean over the layers" in console.file.getvalue()

    def test_settings_make_a_line_of_their_own(self):
        assert line_label("hiprune:keep=0.33") == ("hiprune", "")
        assert line_label("hiprune:keep=0.33,alpha=0.2") == ("hiprune", "alpha=0.2")
        assert line_label("hiprune:alpha=0.2, keep=4+var:beta=1") == ("hiprune+var", "alpha=0.2 beta=1")
        assert line_label("opera:alpha=0,threshold=inf") == ("plain beams", "")
        assert line_label("opera:alpha=0") == ("opera", "alpha=0")
        assert line_label("hiprune:keep=0.3+opera:alpha=0,threshold=inf")[0] == "hiprune+opera"
        assert line_label("dola:layers=none") == ("dola", "layers=none")
        plain, other, seeded = "hiprune:keep=0.5", "hiprune:keep=0.5,alpha=0.2", "random:keep=0.5,seed=3"
        (section,) = arrange([made_up("m", spec) for spec in (plain, other, seeded)])
        assert section.labels == ("random", "hiprune", "hiprune alpha=0.2")
        assert section.rows[0].control and not section.rows[1].control
        assert notes(section)[0] == "random is run with seed=3."

    def test_random_counts_with_the_mean_of_its_seeds(self):
        def scores(spec, value):
            made = made_up("m", spec)
            return dataclasses.replace(made, macro=dataclasses.replace(made.macro, value=value))

        seeds = [scores(f"random:keep=0.5,seed={seed}", value) for seed, value in enumerate((0.4, 0.6))]
        (section,) = arrange([*seeds, scores("grid:keep=0.5", 0.55), scores("hiprune:keep=0.5", 0.45)])
        assert {row.spec: row.beaten for row in section.rows[2:]} == {"grid:keep=0.5": False, "hiprune:keep=0.5": True}
        assert len({look.marker for look in plot.styles([section]).values()}) == 4, "both seeds look alike"

    def test_what_cannot_be_compared_is_kept_apart(self):
        other = dataclasses.replace(made_up("m", "grid:keep=0.5"), limit=7, device="cuda")
        sections = arrange([made_up("m", "none"), other])
        assert [section.title for section in sections] == ["m (limit 7, device cuda)", "m (limit None, device cpu)"]

    def test_marks_where_random_is_better(self):
        (section,) = arrange(sweep(models=("testbed:llava",)))
        grid, random = section.find("grid", 0.33), section.find("random", 0.33)
        worse = {task for task in TASKS if grid.tasks[task].value < random.tasks[task].value}
        assert grid.beaten_tasks == worse and worse
        assert grid.beaten == (grid.accuracy.value < random.accuracy.value)
        assert not random.beaten and not random.beaten_tasks and not section.baseline.beaten

    def test_random_beats_on_the_whole(self):
        poor = made_up("m", "grid:keep=0.33")
        poor = dataclasses.replace(poor, macro=dataclasses.replace(poor.macro, value=0.1))
        (section,) = arrange([made_up("m", "random:keep=0.33"), poor, made_up("m", "random:keep=0.5")])
        assert section.find("grid", 0.33).beaten


class TestTable:
    def test_every_run_with_accuracy_and_cost(self, made):
        for result in load_results(made.folder):
            row = next(r for s in arrange([result]) for r in s.rows)
            lines = [line for line in made.printed.splitlines() if line.split()[:1] == [row.label]]
            mine = [line for line in lines if row.unpatched or line.split()[1] == row.keep_text]
            assert any(text.interval(row.accuracy) in line and text.gflops(row.flops) in line for line in mine)

    def test_convention_stands_below(self, made):
        assert made.printed.count("X2: 2 x multiply-adds") == 2
        assert made.printed.index("X2") > made.printed.index("unpatched")

    def test_says_where_page_and_picture_are(self, made):
        assert str(made.paths.page) in made.printed and str(made.paths.picture) in made.printed

    def test_mark_and_its_meaning(self, made):
        assert "†" in made.printed and "† random pruning of the same budget scores higher" in made.printed

    def test_fits_a_terminal_of_80_columns(self):
        console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
        sections = arrange(sweep(models=("testbed:llava",)))
        print_tables(sections, console)
        printed = console.file.getvalue()
        assert "…" not in printed
        assert all(text.interval(row.accuracy) in printed for row in sections[0].rows)

    def test_a_file_is_wide_enough(self):
        console = Console(file=io.StringIO())
        sections = arrange(sweep(models=("testbed:llava",)))
        print_tables(sections, console)
        differences = [text.interval(row.difference, difference=True) for row in sections[0].rows[1:]]
        assert all(difference in console.file.getvalue() for difference in differences)

    def test_without_unpatched_run(self):
        console = Console(file=io.StringIO(), width=200)
        print_tables(arrange([made_up("m", "grid:keep=0.5")]), console)
        assert "no unpatched run" in console.file.getvalue()


class TestPicture:
    def test_png_of_readable_size(self, made):
        with Image.open(made.paths.picture) as picture:
            picture.load()
            assert picture.format == "PNG" and picture.width >= 1000 and picture.height >= 800
            assert len(np.unique(np.asarray(picture))) > 20

    def test_styles_differ_in_more_than_colour(self):
        sections = arrange(sweep(methods=("random", "grid", *(f"m{i}" for i in range(6)))))
        looks = list(plot.styles(sections).values())
        assert len({look.light for look in looks}) == len({look.dark for look in looks}) == len(looks)
        assert len({(look.marker, look.dashes) for look in looks}) == len(looks)

    def test_nothing_measured_but_accuracy(self):
        bare = [dataclasses.replace(result, cost={}, latency={}) for result in sweep(models=("m",), keeps=(0.5,))]
        assert plot.draw(arrange(bare)).startswith(b"\x89PNG")


class TestPage:
    def test_nothing_from_outside(self, made):
        for tag, attributes in made.page.elements:
            for name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href"):
                value = attributes.get(name) or ""
                assert value == "" or value.startswith(("data:", "#")), (tag, value[:80])
        styles = made.text.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in styles and "@import" not in styles
        own = made.text.replace(get_plotlyjs(), "")
        assert own.count("<script") == 3 and "fetch" not in own
        assert len(own) < 1.5e6 < len(made.text) < 8e6

    def test_links_and_ids(self, made):
        assert len(made.page.ids) == len(set(made.page.ids))
        targets = {attributes["href"][1:] for tag, attributes in made.page.elements if tag in ("a", "use")}
        assert targets <= set(made.page.ids)

    def test_every_run_is_there(self, made):
        for section in arrange(load_results(made.folder)):
            for row in section.rows:
                assert f"<code>{row.spec}</code>" in made.text
                assert text.interval(row.accuracy) in made.page.words
                assert text.interval(row.difference, difference=True) in made.page.words

    def test_every_metric_is_there(self, made):
        names = {
            name for result in load_results(made.folder) for task in result.tasks.values() for name in task.metrics
        }
        assert all(name in made.page.words for name in names)

    def test_the_data_of_the_interactive_picture(self, made):
        """Every run with its scores and costs as the table has them, in the table's order."""
        data = json.loads(made.text.partition('id="data">')[2].partition("</script>")[0])
        sections = arrange(load_results(made.folder))
        assert set(data["scores"]) == {"mean", *TASKS} and "flops" in data["costs"] and "ttft" in data["costs"]
        for runs, section in zip(data["sections"], sections, strict=True):
            for run, row in zip(runs, section.rows, strict=True):
                assert run["label"] == row.label and run["costs"]["ttft"] == list(row.ttft)
                assert run["costs"]["flops"][0] == row.flops / 1e9
                assert run["scores"]["mean"] == [100 * end for end in row.accuracy]
                assert run["scores"]["word"][0] == 100 * row.tasks["word"].value
                assert text.interval(row.accuracy) in run["told"][0]

    def test_picture_for_every_ground_and_width(self, made):
        sources, (image,) = made.page.all("source"), made.page.all("img")
        assert base64.b64decode(image["src"].partition(",")[2]) == made.paths.picture.read_bytes()
        assert len({source["srcset"] for source in sources} | {image["src"]}) == 4
        assert "dark" in sources[0]["media"] and "max-width" in sources[0]["media"]

    def test_alternatives_for_pictures(self, made):
        assert all(len(image["alt"]) > 100 for image in made.page.all("img"))
        for drawing in made.page.all("svg"):
            assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-label"])

    def test_headings_descend_one_by_one(self, made):
        levels = [int(tag[1]) for tag, _ in made.page.elements if tag in ("h1", "h2", "h3", "h4")]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))

    def test_scrolling_tables_can_be_reached_by_keyboard(self, made):
        for attributes in made.page.all("div"):
            if attributes.get("class") == "scroll":
                assert attributes["tabindex"] == "0" and attributes["role"] == "region"
                assert attributes.get("aria-label") or attributes.get("aria-labelledby")

    def test_cells_sort_by_number(self, made):
        start = made.text.index('<table class="sortable">')
        table = made.text[start : made.text.index("</table>", start)]
        heads = re.findall(r"<th scope=\"col\"", table)
        lines = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
        section = arrange(load_results(made.folder))[0]
        assert len(lines) == len(section.rows)
        for line, row in zip(lines, section.rows):
            values = re.findall(r'data-value="([^"]*)"', line)
            assert len(values) == len(heads)
            assert values[0] == row.label and values[1] == ("" if row.unpatched else str(row.keep))
            assert float(values[2]) == row.accuracy.value
            assert all(value == "" or math.isfinite(float(value)) for value in values[1:])

    def test_samples_show_pictures_and_verdicts(self, made):
        assert "No picture" not in made.page.words
        pictures = {attributes["id"] for attributes in made.page.all("image")}
        assert pictures and all(attributes["href"][1:] in pictures for attributes in made.page.all("use"))
        for task in TASKS:
            _, doc = real_sample(task)
            assert doc.prompt in made.page.words and doc.answer in made.page.words
        assert "right:" in made.page.words and "48 of 144 visual tokens kept" in made.text

    def test_metrics_of_others_keep_their_units(self):
        """A score of points reads as it is, in table and data, and a note says that it is no percentage."""
        task = TaskResult(hash="a", n=9, images=9, headline="points", metrics={"points": metric(1523.4)})
        share = TaskResult(hash="b", n=9, images=9, headline="accuracy", metrics={"accuracy": metric(0.75)})
        result = dataclasses.replace(
            made_up("m", "none"), tasks={"lmms:mme": task, "lmms:pope": share}, macro=metric(762.0), samples=[]
        )
        sections = arrange([result])
        assert text.percent(sections[0].rows[0].tasks["lmms:mme"].value) == "1523.4"
        assert text.percent(sections[0].rows[0].tasks["lmms:pope"].value) == "75.0"
        assert text.percent(sections[0].rows[0].accuracy.value) == "762.0"
        assert "Not in %, but in their own units: points of lmms:mme." in notes(sections[0])
        (line,) = csv.DictReader(export.written(sections).splitlines())
        numbers = [float(line[name]) for name in ("lmms:mme points", "lmms:pope accuracy", "accuracy")]
        assert numbers == pytest.approx([1523.4, 0.75, 762.0])
        assert not arrange(sweep(models=("m",), keeps=(0.5,)))[0].plain

    def test_everything_is_escaped(self, undrawn):
        evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
        model = dataclasses.replace(made_up(evil, "none"), command=f"vlmfast {evil}", environment={evil: evil})
        model = dataclasses.replace(
            model, spec=f"grid:keep=0.5,{evil}", keep=0.5, cost=model.cost | {"convention": evil}
        )
        for sample in model.samples:
            sample |= {"prompt": evil, "answer": evil, "expected": evil}
        sections = arrange([made_up(evil, "none"), model])
        html = page.render(sections)
        parsed = Page(html)
        assert html.count("<script") == 3 and len(parsed.all("img")) == 1
        assert not any("onerror" in attributes for _, attributes in parsed.elements)
        assert evil in parsed.words

    def test_samples_of_other_scenes_have_no_picture(self, undrawn):
        html = page.render(arrange(sweep(models=("m",), keeps=(0.5,))))
        parsed = Page(html)
        assert "No picture: the scenes of existence have changed since this result was made" in parsed.words
        assert not parsed.all("use") and parsed.all("path")

    def test_tasks_from_elsewhere_have_no_picture(self, undrawn):
        result = made_up("m", "none", tasks=("existence",))
        result.samples[0]["task"] = "pope"
        assert "No picture: the pictures of pope are not at hand" in Page(page.render(arrange([result]))).words

    def test_a_single_run(self, tmp_path, undrawn):
        paths = report.make(store(tmp_path, [made_up("m", "none")]), console=Console(file=io.StringIO()))
        assert "unpatched" in Page(paths.page.read_text("utf-8")).words


class TestMake:
    def test_several_folders_and_a_target(self, tmp_path, undrawn):
        first = store(tmp_path / "a", sweep(models=("a",), methods=("grid",), keeps=(0.5,)))
        second = store(tmp_path / "b", sweep(models=("b",), methods=("grid",), keeps=(0.5,)))
        paths = report.make([first, second], tmp_path / "new" / "both", Console(file=io.StringIO()))
        assert paths.page == tmp_path / "new" / "both" / "report.html" and paths.picture.exists()
        assert not list(first.glob("*.html"))

    def test_refuses_what_is_no_result(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            report.make(tmp_path / "nowhere")
        (tmp_path / "m--none.json").write_text("{")
        with pytest.raises(ValueError, match="m--none.json"):
            report.make(tmp_path)


class TestNumbers:
    def test_every_run_with_its_numbers(self, made):
        lines = list(csv.DictReader(made.paths.numbers.read_text("utf-8").splitlines()))
        rows = [(section.title, row) for section in arrange(load_results(made.folder)) for row in section.rows]
        assert len(lines) == len(rows)
        for line, (title, row) in zip(lines, rows):
            assert (line["model"], line["spec"], line["keep"]) == (title, row.spec, str(row.result.keep or ""))
            assert float(line["accuracy"]) == row.accuracy.value and float(line["prefill_flops"]) == row.flops
            assert float(line["word accuracy high"]) == row.tasks["word"].high
            assert float(line["existence accuracy/b"]) == row.result.tasks["existence"].metrics["accuracy/b"].value
            assert line["difference low"] == ("" if row.difference is None else str(row.difference.low))


class TestText:
    @pytest.mark.parametrize(
        "value, written",
        [(0, "0"), (0.00123, "0.00123"), (1.234, "1.23"), (123.4, "123"), (1234.5, "1,234"), (-2.5, "−2.50")],  # noqa: RUF001
    )
    def test_number(self, value, written):
        assert text.number(value) == written

    def test_zero_has_no_sign(self):
        assert text.signed(-0.0001) == "0.0" and text.signed(0.1) == "+10.0" and text.signed(-0.1) == "−10.0"  # noqa: RUF001

    def test_length_is_no_share(self):
        assert text.metric("length", Interval(8.5, 8.0, 9.0)) == "8.5 [8.0, 9.0]"
        assert text.metric("recall", Interval(0.85, 0.8, 0.9)) == "85.0 [80.0, 90.0]"


class TestOverlay:
    @pytest.mark.parametrize("grid, size", [((1, 3, 3), (90, 90)), ((1, 2, 5), (250, 100)), ((1, 5, 2), (80, 200))])
    def test_cells_of_kept_tokens_stay_bright(self, grid, size):
        _, height, width = grid
        kept = [0, width + 1, height * width - 1]
        drawn = np.asarray(overlay.overlay(Image.new("RGB", size, "white"), kept, grid))
        assert max(drawn.shape) >= 480 and drawn.shape[0] * size[0] == drawn.shape[1] * size[1]
        cells = drawn.reshape(height, drawn.shape[0] // height, width, drawn.shape[1] // width, 3)
        for token in range(height * width):
            cell = cells[token // width, :, token % width]
            assert (cell == 255).all() if token in kept else (cell < 200).all()

    def test_sides_that_the_grid_does_not_divide(self):
        drawn = np.asarray(overlay.overlay(np.full((500, 701, 3), 255, np.uint8), [4], (1, 3, 3)))
        bright = (drawn == 255).all(-1)
        assert bright[250, 350] and 0.1 < bright.mean() < 0.12
        assert not bright[:160].any() and not bright[:, :230].any()

    def test_all_kept_is_the_picture(self):
        picture = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
        assert (np.asarray(overlay.overlay(picture, range(9), (1, 3, 3))) == picture).all()
        assert overlay.dropped_path(range(9), (1, 3, 3)) == ""

    def test_path_covers_the_dropped_cells(self):
        generator = np.random.default_rng(0)
        kept = generator.permutation(35)[:12]
        covered = np.ones((5, 7), bool)
        for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", overlay.dropped_path(kept, (1, 5, 7))):
            assert covered[int(row), int(column) : int(column) + int(length)].all(), "no cell twice"
            covered[int(row), int(column) : int(column) + int(length)] = False
        assert sorted(np.flatnonzero(covered)) == sorted(kept)

    def test_large_pictures_shrink(self):
        assert max(overlay.overlay(Image.new("RGB", (4000, 3000)), [0], (1, 2, 2)).size) == 1200

    def test_several_views_share_the_brightness(self):
        """A thumbnail over all of it and a crop on the right half: a place is as bright as the views that keep it."""
        thumbnail = View(torch.arange(4), (2, 2), "thumbnail")
        crop = View(torch.arange(4, 8), (2, 2), "crop", (0, 1), (0.0, 0.5, 1.0, 1.0))
        bright = overlay.brightness([0, 1, 5, 7], (thumbnail, crop), (4, 8))
        expected = np.zeros((4, 8))
        expected[:2, :4] = 1  # only the thumbnail shows it, and keeps it
        expected[:2, 4:] = 0.5
        expected[:, 6:] += 0.5
        assert (bright == expected).all()
        drawn = np.asarray(
            overlay.overlay(np.full((4, 8, 3), 255, np.uint8), [0, 1, 5, 7], (1, 1, 8), (thumbnail, crop))
        )
        assert drawn[0, 0, 0] == 255 > drawn[0, 300, 0] > drawn[-1, 0, 0]
        padded = View(torch.arange(4), (2, 2), "crop", (0, 0), (-1.0, 0.0, 1.0, 1.0))  # its upper half is padding
        bright = overlay.brightness([2], (View(torch.arange(4, 8), (2, 2), "thumbnail"), padded), (4, 8))
        assert (bright[:, :4] == 0.5).all() and (bright[:, 4:] == 0).all()
        with pytest.raises(ValueError, match="frames of a video"):
            overlay.brightness([0], (View(torch.arange(4), (2, 2), "frame"),), (4, 4))

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="0 to 8"):
            overlay.overlay(Image.new("RGB", (9, 9)), [9], (1, 3, 3))
        with pytest.raises(ValueError, match="2 frames"):
            overlay.overlay(Image.new("RGB", (9, 9)), [0], (2, 3, 3))

    def test_visible_part(self):
        wide = Image.new("RGB", (400, 200))
        assert overlay.visible(wide, SimpleNamespace()).size == (400, 200)
        clip = SimpleNamespace(
            do_center_crop=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
        assert overlay.visible(wide, clip).size == (200, 200)
        smaller = SimpleNamespace(
            do_center_crop=True, size={"shortest_edge": 256}, crop_size={"height": 192, "width": 192}
        )
        assert overlay.visible(wide, smaller).size == (150, 150)
        stretched = SimpleNamespace(
            do_center_crop=True, size={"height": 120, "width": 120}, crop_size={"height": 120, "width": 120}
        )
        assert overlay.visible(wide, stretched).size == (400, 200)

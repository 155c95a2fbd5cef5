"""The report on methods that decode otherwise: their effect, and captions with what they invent."""

import dataclasses
import html
import io
import re

import pytest
from rich.console import Console
from test_report import Page, made_up, metric
from test_report_attention import compared, edited
from test_tasks_files import coco, pictures  # noqa: F401  a fixture

from vlmfast.eval import sweep
from vlmfast.eval.report import captions, effect, page, plot
from vlmfast.eval.report.rows import arrange
from vlmfast.eval.report.samples import Pictures
from vlmfast.eval.report.samples import gather as gather_samples
from vlmfast.eval.report.table import print_tables
from vlmfast.eval.results import TaskResult
from vlmfast.eval.tasks import TASKS, task, task_hash
from vlmfast.eval.tasks.chair import places_in, things_in
from vlmfast.eval.testbed.scenes import CATEGORIES

DOCS = TASKS["caption"].load(2, 0)
DOC = DOCS[0]
THERE = DOC.info["target"]
MISSING = next(word for word in CATEGORIES if word not in THERE)
PLAIN = f"a red {THERE[0]} , a {MISSING.upper()} <b> and a {MISSING} ."
AFTER = f"a red {THERE[0]} ."


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda sections, **kwargs: repr(kwargs).encode())


def run(spec, answer, task_name="caption", doc=DOC, digest=None, keep=None):
    """A run with one caption among its samples."""
    result = made_up("testbed:llava", "none")
    docs = task(task_name).load(2, 0)
    entry = TaskResult(
        hash=digest or task_hash(task(task_name), docs), n=2, images=2, headline="f1", metrics={"f1": metric(0.5)}
    )
    sample = {
        "task": task_name,
        "index": doc.scene,
        "prompt": doc.prompt,
        "answer": answer,
        "expected": doc.answer,
        "kept": [[0]],
        "grid": [1, 2, 2],
    }
    method = re.sub(r":[^+]*", "", spec)
    tasks = {task_name: entry}
    return dataclasses.replace(
        result, spec=spec, method=method, keep=keep, limit=2, tasks=tasks, samples=[sample, *result.samples[:2]]
    )


def views(runs):
    (section,) = arrange(runs)
    found = captions.gather([(section, gather_samples(section, Pictures()))])
    return found[0][1] if found else None


@pytest.fixture
def runs():
    return [
        run("none", PLAIN),
        run("vcd", AFTER),
        run("hiprune:keep=0.5+dola", "", keep=0.5),
        run("grid:keep=0.5", ""),
    ]


class TestMentions:
    def test_captions_of_the_testbed(self):
        found = TASKS["caption"].mentions(DOC, PLAIN)
        said = [(PLAIN[one.start : one.end], one.thing, one.there) for one in found]
        assert said == [(THERE[0], THERE[0], True), (MISSING.upper(), MISSING, False), (MISSING, MISSING, False)]

    @pytest.mark.parametrize("answer", [PLAIN, AFTER, "", "a leaf's wheel.anchor_heart,cups 3cup", DOC.answer])
    def test_they_are_what_chair_counts(self, answer):
        scores = TASKS["caption"].score(DOC, answer)
        made = captions.caption(["m"], TASKS["caption"], DOC, answer)
        assert (made.mentioned, made.invented) == (scores["mentioned"], scores["invented"])
        assert "".join(piece.text for piece in made.pieces) == answer

    def test_things_of_a_file_of_synonyms(self):
        names = {"dog": "dog", "puppy": "dog", "hot dog": "hot dog", "bus": "bus"}
        text = "Two Puppies, a hot  dog and buses; a home plate. A dog"
        found = places_in(text, names)
        assert [(text[start:end], thing) for start, end, thing in found] == [
            ("Puppies", "dog"), ("hot  dog", "hot dog"), ("buses", "bus"), ("dog", "dog"),
        ]  # fmt: skip
        assert [thing for *_, thing in found] == things_in(text, names)


class TestCaptions:
    def test_before_and_after(self, runs):
        (view,) = views(runs)
        assert [one.names for one in view.captions] == [("unpatched",), ("hiprune+dola keep 0.5",), ("vcd",)]
        before, silent, after = view.captions
        assert (before.invented, before.mentioned) == (1, 2), "a thing counts once"
        assert [piece.invented for piece in before.pieces] == [None, False, None, True, None, True, None]
        assert (after.invented, after.mentioned) == (0, 1) and (silent.mentioned, silent.pieces) == (0, ())
        assert view.things == tuple(THERE) and view.picture == f"scene-{DOC.scene}"

    def test_methods_that_say_the_same_share_a_line(self, runs, undrawn):
        runs = [*runs, run("dola", PLAIN), run("deco", AFTER)]
        (view,) = views(runs)
        names = [one.names for one in view.captions]
        assert names == [("unpatched", "dola"), ("deco", "vcd"), ("hiprune+dola keep 0.5",)]
        text = page.render(arrange(runs))
        assert '<th scope="row"><span>unpatched,</span><span>dola</span></th>' in text

    def test_only_where_methods_change_more_than_what_is_seen(self, runs):
        assert views([runs[0], runs[3]]) is None

    def test_only_captions(self):
        made = run("none", "yes", "existence", TASKS["existence"].load(2, 0)[0])
        assert views([made, dataclasses.replace(made, spec="vcd", method="vcd")]) is None

    def test_not_without_the_pictures_they_were_made_on(self, runs, undrawn):
        others = [dataclasses.replace(one, tasks={}) for one in runs]
        assert views(others) is None
        assert "What captions invent" not in page.render(arrange(others))
        assert views([run("none", PLAIN, digest="0" * 16), run("vcd", AFTER, digest="0" * 16)]) is None

    def test_captions_over_files_of_the_users(self, tmp_path, pictures):  # noqa: F811
        name = coco(tmp_path, pictures)
        doc = task(name).load(2, 0)[0]
        word = doc.info["target"][0]
        other = next(one for one in ("person", "cell phone") if one != word)
        made = [run("none", f"A {word} and a {other}", name, doc), run("vcd", f"{word}s", name, doc)]
        (view,) = views(made)
        assert [(one.invented, one.mentioned) for one in view.captions] == [(1, 2), (0, 1)]
        assert view.things == doc.info["target"]

    def test_on_the_page(self, runs, undrawn):
        text = page.render(arrange(runs))
        parsed = Page(text)
        assert "captions" in parsed.ids and "#captions" in {link.get("href") for link in parsed.all("a")}
        section = text[text.index('<section id="captions"') :]
        section = section[: section.index("</section>")]
        marked = re.findall(r'<span class="(invented|there)">([^<]*)<', section)
        assert marked[:2] == [("invented", "invented"), ("there", "there")], "the legend"
        assert marked[2:] == [
            ("there", THERE[0]), ("invented", MISSING.upper()), ("invented", MISSING), ("there", THERE[0]),
        ]  # fmt: skip
        assert section.count("(invented)") == 2, "also for those who hear the page"
        assert "&lt;b&gt;" in section and html.unescape(re.sub("<[^>]*>", "", section)).count("<b>") == 1
        words = " ".join(re.sub("<[^>]*>", " ", section).split())
        assert f"unpatched 1 of 2 1 of {len(THERE)}" in words and f"vcd 0 of 1 1 of {len(THERE)}" in words

    def test_marks_are_more_than_a_colour_and_follow_the_ground(self, runs, undrawn):
        style = page.render(arrange(runs)).split("</style>")[0]
        (invented,) = re.findall(r"\.invented \{([^}]*)\}", style)
        (there,) = re.findall(r"\.there \{([^}]*)\}", style)
        assert "var(--bad)" in invented and "underline" in invented and "underline" in there and "color:" not in there
        assert style.count("--bad:") == 2, "a colour for each ground"


class TestSamples:
    def test_captions_are_among_them(self):
        docs = [doc for one in TASKS.values() for doc in one.load(8, 0)]
        found = sweep.fixed_samples(docs)
        assert sum(doc.task == "caption" for doc in found) == sweep.CAPTIONS
        assert len({doc.scene for doc in found if doc.task == "caption"}) == sweep.CAPTIONS
        others = [doc for doc in docs if doc.task != "caption"]
        assert len(sweep.fixed_samples(others)) == sweep.SAMPLES
        assert len({doc.id for doc in found}) == len(found)

    def test_the_first_ones_are_those_of_before(self):
        docs = [doc for name in ("existence", "caption") for doc in TASKS[name].load(8, 0)]
        assert [doc.task for doc in sweep.fixed_samples(docs)] == ["existence", "caption"] * 3
        few = [doc for name in ("existence", "caption") for doc in TASKS[name].load(2, 0)]
        assert sum(doc.task == "caption" for doc in sweep.fixed_samples(few)) == 2


class TestEffect:
    def test_decoding_methods_are_there(self):
        (section,) = arrange(
            [made_up("m", "none"), edited("m", "vcd:alpha=0.5"), edited("m", "opera"), made_up("m", "grid:keep=0.5")]
        )
        assert [row.spec for row in effect.edited(section)] == ["none", "opera", "vcd:alpha=0.5"]

    def test_a_sentence(self):
        both = [made_up("m", "none"), edited("m", "vcd"), edited("m", "pai")]
        (section,) = arrange(both)
        assert effect.summary(section).startswith("2 runs with edited attention or with another decoding, with all")
        (section,) = arrange(both[:2])
        assert effect.summary(section).startswith("1 run with another decoding, with all tokens: 1 better")

    def test_precision_recall_and_f1_where_there_is_room(self, undrawn):
        method = edited("m", "vcd")
        more = {name: compared(0.7, 0.1, 0.05, 0.15) for name in ("precision", "recall", "f1")}
        method.tasks["existence"].metrics.update(more)
        sections = arrange([made_up("m", "none"), method])
        shown = effect.columns(sections[0])
        found = {(column.task, column.head): effect.cell(sections[0].rows[1], column) for column in shown}
        assert all(found["existence", head].verdict == 1 for head in ("precision", "recall", "F1"))
        wide, narrow = (printed(sections, width) for width in (126, 80))
        assert "precision" in wide and "F1" in wide and "precision" not in narrow and "adversarial" in narrow
        assert "…" not in wide + narrow
        assert "precision" in Page(page.render(sections)).words

    def test_tasks_over_files_are_like_those_of_the_testbed(self):
        method = edited("m", "vcd")
        named = {
            "pope:/data/coco_pope_random.json,images=/x": method.tasks["existence"],
            "chair:/data/val.json": method.tasks["caption"],
        }
        method = dataclasses.replace(method, tasks=named)
        (section,) = arrange([method])
        heads = {(column.asked, column.head) for column in effect.columns(section)}
        assert {("pope coco_pope_random", "random"), ("chair val", "CHAIR_i"), ("chair val", "length")} <= heads
        assert "Effect on the answers, chair val" in printed([section], 124)


def printed(sections, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    print_tables(sections, console)
    return console.file.getvalue()

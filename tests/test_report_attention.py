"""The report on methods that edit attention: what the attention did, and what came of it."""

import dataclasses
import io
import re

import pytest
from rich.console import Console
from test_report import Page, made_up, store

from vlmfast.eval import report
from vlmfast.eval.report import attention, effect, page, plot
from vlmfast.eval.report.rows import arrange
from vlmfast.eval.report.table import print_tables
from vlmfast.eval.results import Metric, TaskResult, load_results

DEPTH = 6


def shares(sinks, image, missing=()):
    """{class: [share of every layer]}, rising from layer to layer."""
    table = {"sinks": [sinks + 0.01 * n for n in range(DEPTH)], "image": [image] * DEPTH}
    table["text"] = [1 - a - b for a, b in zip(table["sinks"], table["image"])]
    return {name: [None if n in missing else x for n, x in enumerate(values)] for name, values in table.items()}


def looks(edited=(2, 3, 5), total=1.0, missing=()):
    """Data as `vlmfast.eval.attention.measure` gives them."""
    rows = ("prompt", "answer")
    return {
        "prompts": 6,
        "new_tokens": 8,
        "edited": list(edited),
        "before": {name: shares(0.5 if name == "answer" else 0.4, 0.2, missing) for name in rows},
        "after": {name: shares(0.1 if name == "answer" else 0.3, 0.6, missing) for name in rows},
        "total": {name: [total] * DEPTH for name in rows},
    }


def compared(value, difference, low, high):
    ends = {"difference": difference, "difference_low": low, "difference_high": high}
    return Metric(value=value, low=value - 0.05, high=value + 0.05, **ends)


def edited(model, spec, **data):
    """A run of a method that edits attention, with the metrics that tell what came of it."""
    result = made_up(model, "none")
    splits = ("random", "popular", "adversarial")
    existence = {
        "accuracy": compared(0.9, 0.02, -0.01, 0.05),
        **{f"accuracy/{split}": compared(0.9, 0.01 * k, 0.01 * k - 0.015, 0.03) for k, split in enumerate(splits)},
        "yes_ratio": compared(0.6, 0.1, 0.05, 0.15),
    }
    caption = {
        "recall": compared(0.7, -0.1, -0.2, -0.05),
        "chair_i": compared(0.1, -0.05, -0.08, -0.01),
        "chair_s": compared(0.3, 0.05, 0.01, 0.09),
        "length": compared(9.5, -1.25, -2.5, -0.5),
    }
    tasks = result.tasks | {
        "existence": dataclasses.replace(result.tasks["existence"], metrics=existence),
        "caption": TaskResult(hash="0", n=40, images=40, headline="recall", metrics=caption),
    }
    macro = compared(0.88, 0.03, 0.01, 0.05)
    return dataclasses.replace(
        result, spec=spec, method=spec.partition(":")[0], keep=None, tasks=tasks, macro=macro, attention=looks(**data)
    )


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(plot, "draw", lambda sections, **kwargs: repr(kwargs).encode())


@pytest.fixture
def runs():
    return [
        made_up("m", "none"),
        made_up("m", "hiprune:keep=0.5"),
        edited("m", "zerotuning:gamma=3.0"),
        edited("m", "zerotuning:gamma=0.5", total=0.8),
    ]


def test_stored_and_read_back(tmp_path, runs):
    again = load_results(store(tmp_path, runs))
    assert [one.attention for one in again if one.method == "zerotuning"] == [looks(total=0.8), looks()]
    assert all(one.attention is None for one in again if one.method != "zerotuning")


def test_results_without_it_are_read_and_shown(tmp_path, undrawn):
    """Files made before there was such a thing; and a method without data."""
    (folder,) = [store(tmp_path, [made_up("m", "none"), made_up("m", "hiprune:keep=0.5")])]
    for path in folder.glob("*.json"):
        path.write_text(re.sub(r'\n "attention": null,', "", path.read_text()))
        assert "attention" not in path.read_text()
    paths = report.make(folder, console=Console(file=io.StringIO()))
    text = paths.page.read_text("utf-8")
    assert "What the attention did" not in text and "Effect on the answers" not in text
    bare = dataclasses.replace(edited("m", "zerotuning:gamma=3.0"), attention=None)
    text = page.render(arrange([made_up("m", "none"), bare]))
    assert "What the attention did" not in text and "Effect on the answers" in text


class TestWhatTheAttentionDid:
    def test_page_is_sound(self, runs, undrawn):
        parsed = Page(page.render(arrange(runs)))
        assert {"attention", "effect"} <= set(parsed.ids) and len(parsed.ids) == len(set(parsed.ids))
        assert {"#attention", "#effect"} <= {link["href"] for link in parsed.all("a")}
        levels = [int(tag[1]) for tag, _ in parsed.elements if tag in ("h1", "h2", "h3", "h4")]
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))
        for drawing in parsed.all("svg"):
            assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-label"])

    def test_a_chart_for_every_run_and_kind_of_rows(self, runs):
        (section,) = arrange(runs)
        for rows in attention.ROWS:
            shown = attention.charts(section, rows)
            assert [one.title for one in shown] == ["zerotuning gamma=0.5", "zerotuning gamma=3.0"]
            for one in shown:
                assert [(line.name, line.when) for line in one.lines] == [
                    (name, when) for name in ("sinks", "image", "text") for when in ("before", "after")
                ]
                assert [label for _, label in one.x] == [str(n) for n in range(DEPTH)]

    def test_points_lie_where_the_shares_are(self, runs):
        (section,) = arrange(runs)
        chart = attention.charts(section, "answer")[0]
        zero, hundred = ({label: y for y, label in chart.y}[label] for label in ("0", "100"))
        ticks = [x for x, _ in chart.x]
        data = looks()
        for line in chart.lines:
            for layer, (x, y) in enumerate(line.points):
                share = data[line.when]["answer"][line.name][layer]
                assert x == ticks[layer]
                assert (zero - y) / (zero - hundred) == pytest.approx(share, abs=1e-3)

    def test_layers_that_were_not_measured_leave_a_gap(self):
        (section,) = arrange([edited("m", "zerotuning:gamma=3.0", missing=(0, 3))])
        line = attention.charts(section, "prompt")[0].lines[0]
        assert len(line.points) == DEPTH - 2
        assert re.sub(r"[\d. ]+", "", line.path) == "MLML"

    def test_the_table_is_about_the_layers_that_are_edited(self, runs):
        (section,) = arrange(runs)
        first = attention.entries(section)[0]
        assert (first.row.label, first.rows, first.layers) == ("zerotuning gamma=0.5", "answer", "2-3, 5")
        for name in ("sinks", "image", "text"):
            for when, value in zip(("before", "after"), first.changes[name]):
                found = [looks()[when]["answer"][name][n] for n in (2, 3, 5)]
                assert value == pytest.approx(sum(found) / 3)
        assert [one.total for one in attention.entries(section)] == pytest.approx([0.8, 0.8, 1.0, 1.0])

    def test_a_method_that_edits_no_layer_here(self):
        """Heads scaled behind the attention: the mean is over all layers."""
        (section,) = arrange([edited("m", "zerotuning:gamma=3.0", edited=(), missing=(5,))])
        first = attention.entries(section)[0]
        assert first.layers == "none" and first.changes["sinks"].before == pytest.approx(0.52)

    def test_weights_are_shown_only_where_they_matter(self, runs, undrawn):
        words = Page(page.render(arrange(runs))).words
        assert "what a row's weights sum to" in words and "0.800" in words
        words = Page(page.render(arrange(runs[:3]))).words
        assert "what a row's weights sum to" not in words

    def test_numbers_are_on_the_page(self, runs, undrawn):
        words = Page(page.render(arrange(runs[:3]))).words
        assert "53.3 → 13.3−40.0" in words and "20.0 → 60.0+40.0" in words  # noqa: RUF001


class TestEffect:
    def test_who_is_there(self, runs):
        (section,) = arrange(runs)
        assert [row.label for row in effect.edited(section)] == [
            "unpatched",
            "zerotuning gamma=0.5",
            "zerotuning gamma=3.0",
        ]
        (plain,) = arrange(runs[:2])
        assert effect.edited(plain) == [] and effect.columns(plain) == []

    def test_methods_in_a_row_and_unknown_ones(self):
        both = dataclasses.replace(edited("m", "hiprune:keep=0.5+zerotuning"), keep=0.5, method="hiprune+zerotuning")
        (section,) = arrange([both, dataclasses.replace(both, spec="gone:keep=0.5", method="gone")])
        assert [effect.name(row) for row in effect.edited(section)] == ["hiprune+zerotuning keep 0.5"]

    def test_verdicts(self, runs):
        (section,) = arrange(runs)
        row = effect.edited(section)[1]
        found = {
            column.head: effect.cell(row, column).verdict
            for column in effect.columns(section)
            if effect.cell(row, column)
        }
        assert found["CHAIR_i"] == 1, "fewer inventions are better"
        assert found["CHAIR_s"] == -1 and found["recall"] == -1
        assert found["says yes"] == found["length"] == 0, "neither more nor less is better"
        assert found["random"] == found["popular"] == 0, "the interval holds zero"
        assert found["adversarial"] == 1
        assert all(
            effect.cell(section.baseline, column).verdict == 0
            for column in effect.columns(section)
            if effect.cell(section.baseline, column)
        )

    def test_printed_with_intervals(self, runs):
        console = Console(file=io.StringIO(), width=124)
        print_tables(arrange(runs), console)
        printed = console.file.getvalue()
        assert "Effect on the answers, existence" in printed and "Effect on the answers, caption" in printed
        for words in ("90.0 +2.0▲", "[+0.5, +3.0]", "10.0 −5.0▲", "[−8.0, −1.0]", "30.0 +5.0▼", "9.5 −1.2"):  # noqa: RUF001
            assert words in printed, words
        assert "…" not in printed and "▲ better and ▼ worse" in printed

    def test_fits_80_columns(self, runs):
        console = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
        print_tables(arrange(runs), console)
        printed = console.file.getvalue()
        effects = printed[printed.index("Effect on the answers") :]
        assert "…" not in effects and "+2.0▲" in effects and "−5.0▲" in effects  # noqa: RUF001

    def test_page_shows_value_difference_and_verdict(self, runs, undrawn):
        words = Page(page.render(arrange(runs))).words
        assert "10.0−5.0 [−8.0, −1.0] ▲better" in words  # noqa: RUF001
        assert "9.5−1.2 [−2.5, −0.5]" in words and "30.0+5.0 [+1.0, +9.0] ▼worse" in words  # noqa: RUF001

    def test_a_sentence(self, runs):
        (section,) = arrange(runs)
        assert effect.summary(section).startswith("2 runs with edited attention, with all tokens: 2 better than the")
        worse = dataclasses.replace(runs[2], macro=compared(0.8, -0.03, -0.05, -0.01))
        unsure = dataclasses.replace(runs[3], macro=compared(0.8, -0.03, -0.05, 0.01))
        (section,) = arrange([runs[0], worse, unsure])
        assert "0 better than the unpatched model on the mean of the tasks, 1 worse, 1 not" in effect.summary(section)
        assert effect.summary(section) in page.lead(section)
        (plain,) = arrange(runs[:2])
        assert effect.summary(plain) == ""

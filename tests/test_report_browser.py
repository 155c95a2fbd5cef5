"""The report in a real browser: drawn without an error, readable at every width and ground, usable by keyboard."""

import json
import re

import pytest
from browser import open_page, shoot, sideways
from test_report import store, sweep

from vlmfast.eval import report

pytestmark = pytest.mark.browser
WIDE, PHONE = (1280, 800), (390, 844)
UNDRAWN = "() => document.querySelectorAll('.pareto .main-svg').length >= 2"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = store(tmp_path_factory.mktemp("results"), sweep(real=True))
    return report.make(folder, tables=False).page


def opened(file, size=WIDE, dark=False):
    return open_page(file.as_uri(), *size, dark=dark)


def drawn(page):
    page.wait_for_function(UNDRAWN)
    return page


def traces(page, chart=0):
    """What plotly was given for a model: without the line of best trade-offs."""
    return page.evaluate(
        "n => document.querySelectorAll('.pareto')[n].data.filter(t => t.hoverinfo !== 'skip')"
        ".map(t => ({name: t.name, x: t.x, y: t.y, second: t.xaxis === 'x2'}))",
        chart,
    )


def runs(file):
    return json.loads(file.read_text("utf-8").partition('id="data">')[2].partition("</script>")[0])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["laptop", "phone"])
def test_readable(page_file, size, dark):
    """No error, nothing from outside (`open_page`), nothing that scrolls sideways; text stands out from its ground."""
    with opened(page_file, size, dark) as page:
        drawn(page)
        assert sideways(page) == 0
        for details in page.locator("details").all():
            details.evaluate("one => { one.open = true; }")
        assert sideways(page) == 0
        colours = page.evaluate(
            "() => [getComputedStyle(document.documentElement).backgroundColor,"
            " ...[...document.querySelectorAll('p, td, th, dt, label, .pareto text')]"
            "   .filter(one => one.checkVisibility())"
            "   .map(one => one.tagName === 'text' ? getComputedStyle(one).fill : getComputedStyle(one).color)]"
        )
        ground, *inks = [luminance(colour) for colour in dict.fromkeys(colours)]
        assert (ground < 0.05) if dark else (ground > 0.9)
        assert len(inks) >= 2 and min(contrast(ground, ink) for ink in inks) > 4.5
        assert page.locator(".still").is_hidden() and page.locator(".pareto").first.is_visible()
        box = page.locator(".pareto").first.bounding_box()
        assert box["width"] <= size[0] and box["height"] > 350
        shoot(page, f"report-{size[0]}-{'dark' if dark else 'light'}")


def luminance(colour):
    """Relative luminance (WCAG 2) of rgb(r, g, b)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_the_picture_shows_every_run_and_what_is_chosen(page_file):
    data = runs(page_file)
    with opened(page_file) as page:
        drawn(page)
        for chart, section in enumerate(data["sections"]):
            for second, cost in ((False, "flops"), (True, "ttft")):
                points = [
                    (trace["name"], x, y)
                    for trace in traces(page, chart)
                    if trace["second"] == second
                    for x, y in zip(trace["x"], trace["y"])
                ]
                wanted = [(run["label"], run["costs"][cost][0], run["scores"]["mean"][0]) for run in section]
                assert sorted(points) == sorted(wanted)
        page.locator("#score").select_option("word")
        page.locator("#left").select_option("memory")
        page.get_by_role("checkbox", name="grid").uncheck()
        first = [trace for trace in traces(page) if not trace["second"]]
        assert "grid" not in {trace["name"] for trace in first}
        wanted = sorted(
            (run["costs"]["memory"][0], run["scores"]["word"][0])
            for run in data["sections"][0]
            if run["label"] != "grid"
        )
        assert sorted((x, y) for trace in first for x, y in zip(trace["x"], trace["y"])) == wanted
        best = page.evaluate(
            "() => { const t = document.querySelector('.pareto').data.find(t => t.hoverinfo === 'skip');"
            " return t.x.map((x, i) => [x, t.y[i]]); }"
        )
        assert [tuple(point) for point in best] == sorted(
            {point for point in wanted if not any(beats(other, point) for other in wanted)}
        )
        page.get_by_role("button", name="none", exact=True).click()
        assert not traces(page)
        page.get_by_role("button", name="all", exact=True).click()
        assert len(traces(page)) == 2 * len(data["labels"])


def beats(one, other):
    """Whether a run costs no more and scores no less than another, and is better in one of the two."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def test_by_keyboard_alone(page_file):
    data = runs(page_file)["sections"][0]
    with opened(page_file) as page:
        drawn(page)
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.classList.contains('pareto')"):
                break
        told = page.locator(".told").first
        page.keyboard.press("ArrowRight")
        assert told.text_content().startswith("unpatched · accuracy ")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        name = told.text_content().partition(" · ")[0]
        assert name.startswith("random keep ") and page.locator(".hoverlayer .hovertext").count() == 1
        page.keyboard.press("Enter")
        row = next(i for i, run in enumerate(data) if run["name"] == name)
        assert page.evaluate("document.activeElement.id") == f"run-0-{row}"
        assert page.locator(f"#run-0-{row}").evaluate(
            "one => { const r = one.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight; }"
        )
        head = page.locator("#runs table").first.get_by_role("button", name="accuracy")
        head.focus()
        page.keyboard.press("Enter")
        values = (
            page.locator("#runs tbody")
            .first.locator("tr td:nth-child(3)")
            .evaluate_all("cells => cells.map(cell => Number(cell.dataset.value))")
        )
        assert values == sorted(values) and len(values) == len(data)


def test_samples_are_found_and_leafed_through(page_file):
    with opened(page_file, PHONE) as page:
        drawn(page)
        form, questions = page.locator("#browse"), page.locator("details.one")
        everything = questions.count()
        assert form.locator("output").text_content() == f"{everything} of {everything} questions"
        form.locator("[name=task]").select_option("colour")
        form.locator("[name=model]").select_option("testbed:llava")
        visible = [one for one in questions.all() if one.is_visible()]
        assert visible and all(one.get_attribute("data-task") == "colour" for one in visible)
        assert len(visible) < everything
        form.locator("[name=task]").select_option("")
        form.locator("[name=only]").select_option("wrong")
        wrong = [one for one in questions.all() if one.is_visible()]
        assert wrong and all(one.locator(".wrong").count() for one in wrong)
        form.locator("[name=only]").select_option("")
        form.get_by_role("button", name="next").press("Enter")
        shown = page.locator("details.one[open]")
        assert shown.count() == 1 and page.evaluate("document.activeElement.tagName") == "SUMMARY"
        first = shown.text_content()
        form.get_by_role("button", name="next").press("Enter")
        assert shown.count() == 1 and shown.text_content() != first
        form.locator("[name=words]").fill("nothing says this")
        assert form.locator("output").text_content().startswith("0 of ")
        shoot(page, "report-samples-phone", whole=False)


def test_readable_without_scripts(page_file):
    with opened(page_file) as page:
        plain = page.context.browser.new_context(java_script_enabled=False).new_page()
        plain.goto(page_file.as_uri())
        assert plain.locator(".still img").is_visible() and plain.locator("#runs table").first.is_visible()
        assert plain.locator("#score").is_hidden() and plain.locator("#browse").is_hidden()

"""tests/browser.py finds fault with pages that have some, and with no others."""

import contextlib

import browser
import pytest

FINE = "<title>fine</title><link rel=icon href='data:,'><p style='width: {width}px'>text</p>"


@pytest.fixture
def page_of(tmp_path):
    """Opens a page of this text."""

    @contextlib.contextmanager
    def write(text, **options):
        (tmp_path / "page.html").write_text(f"<!doctype html>{text}")
        with browser.open_page((tmp_path / "page.html").as_uri(), **options) as page:
            yield page

    return write


@pytest.mark.parametrize(
    "url, leaves",
    [
        ("http://127.0.0.1:7860/config", False),
        ("ws://localhost:80/", False),
        ("http://[::1]:80/", False),
        ("data:image/png;base64,", False),
        ("file:///tmp/report.html", False),
        ("https://fonts.googleapis.com/css2", True),
        ("http://127.0.0.1.example.com/", True),
        ("wss://192.168.1.2/", True),
    ],
)
def test_what_leaves_the_machine(url, leaves):
    assert browser.leaves(url) is leaves


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_without_fault(page_of, dark, tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFAST_SCREENSHOTS", str(tmp_path / "shots"))
    with page_of(FINE.format(width=200), width=390, height=700, dark=dark) as page:
        assert page.title() == "fine" and browser.sideways(page) == 0
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert page.evaluate("[innerWidth, innerHeight]") == [390, 700]
        browser.shoot(page, "fine")
    assert (tmp_path / "shots" / "fine.png").is_file()


@pytest.mark.browser
def test_a_page_too_wide(page_of):
    with page_of(FINE.format(width=500), width=390) as page:
        assert browser.sideways(page) > 100


@pytest.mark.browser
@pytest.mark.parametrize(
    "text, told",
    [
        ("<script>console.error('broken')</script>", "console: broken"),
        ("<script>nothing.at.all</script>", "uncaught"),
        ("<link rel=stylesheet href='https://fonts.googleapis.com/css2'>", "request to https://fonts.googleapis.com"),
        ("<script>new WebSocket('ws://192.0.2.1/')</script>", "request to ws://192.0.2.1/"),
    ],
)
def test_a_page_at_fault(page_of, text, told):
    with pytest.raises(pytest.fail.Exception, match=told), page_of(text) as page:
        page.wait_for_timeout(300)


@pytest.mark.browser
def test_faults_that_a_test_provokes(page_of):
    twice = "<script>console.error('mine'); console.error('yours')</script>"
    with page_of(twice, provoked=["mine", "yours"]):
        pass
    with pytest.raises(pytest.fail.Exception, match="console: yours") as failed, page_of(twice, provoked=["mine"]):
        pass
    assert "mine" not in str(failed.value)


@pytest.mark.browser
def test_further_tabs_are_watched(page_of):
    with pytest.raises(pytest.fail.Exception, match="console: broken"), page_of(FINE.format(width=9)) as page:
        page.context.new_page().evaluate("console.error('broken')")

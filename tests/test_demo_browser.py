"""The page of vlmfast demo in a real browser, served by the real command."""

import base64
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.request import Request, urlopen

import browser
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vlmfast.eval import asking, tasks

pytestmark = pytest.mark.browser
CAPTION = "describe the picture ."
SPECS = ["none", "hiprune:keep=0.33", "random:keep=0.33"]  # what the page asks for when it opens
TOKENS = 24


class Demo:
    """`vlmfast demo` as a process: its address, the folder it may write to, and who asked its proxy."""

    def __init__(self, folder, asked):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "vlmfast", "demo", "--port", str(port), "--device", "cpu"]
        self.folder, self.asked, self.url = folder, asked, f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--max-new-tokens", str(TOKENS), "--repeats", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder), "HTTPS_PROXY": asked.url, "HTTP_PROXY": asked.url},
        )
        assert self.process.stdout.readline() == f"vlmfast demo: {self.url} (Ctrl-C ends it)\n"

    def uploaded(self):
        """The files that lie in its folder."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def end(self, number=signal.SIGINT):
        """End it. -> (standard output from here on, lines of standard error)"""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return out, err.splitlines()


class Proxy:
    """What a process would ask for anything outside of the machine; notes that it did."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url, self.requests = f"http://127.0.0.1:{self.listener.getsockname()[1]}", []
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            connection, _ = self.listener.accept()
            self.requests.append(connection.recv(200))
            connection.close()


@contextmanager
def running(folder):
    demo = Demo(folder, Proxy())
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One process for all tests that leave it running; it must not have asked for anything outside."""
    with running(tmp_path_factory.mktemp("demo")) as one:
        yield one
        out, told = one.end()
        assert out == "" and told[-1] == "vlmfast: the page is closed"
        faults = sum(line.startswith("Traceback") for line in told)
        assert faults == sum("InvalidPathError:" in line for line in told), "\n".join(told)  # of the forged upload
        assert one.uploaded() == [] and one.asked.requests == []


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    Image.fromarray(tasks.image(tasks.TASKS["colour"].load(1, seed=0)[0])).save(path)
    return path


def upload(page, path):
    """Put a file in the place of the picture."""
    page.get_by_role("button", name="Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(path)
    page.get_by_role("button", name="Remove Image").wait_for()


def choose(page, *names):
    """These methods and no others."""
    page.get_by_role("button", name="Clear").click()
    for name in names:
        page.get_by_role("combobox").fill(name)
        page.get_by_role("option", name=name, exact=True).click()
    page.keyboard.press("Escape")


def ask(page, question=None):
    if question is not None:
        page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answered(page, *specs):
    """Wait until these have answered. -> their answers"""
    for spec in specs:
        page.locator(f".card[data-spec='{spec}']").wait_for()
    page.locator(".card.waiting").first.wait_for(state="detached")
    assert page.locator(".card").count() == len(specs) and page.locator(".error").count() == 0
    return [page.locator(f".card[data-spec='{spec}'] .answer").inner_text() for spec in specs]


def refused(page, *words):
    """Wait for an error of one line that names what matters."""
    line = page.get_by_role("alert").inner_text()
    assert all(word in line for word in words) and "Traceback" not in line and "\n" not in line.strip()


def test_the_answers_are_those_of_vlmfast_run(demo, scene, tmp_path):
    """A picture is uploaded, two methods are chosen, and what the page shows is what the command's function gives."""
    with browser.open_page(demo.url) as page:
        upload(page, scene)
        choose(page, "hiprune", "random")
        ask(page, CAPTION)
        answers = answered(page, *SPECS)
        pictures = [page.locator(f".card[data-spec='{spec}'] img").get_attribute("src") for spec in SPECS]
        rows = [row.inner_text().split("\t") for row in page.locator("#answers tbody tr").all()]
    settings = {"max_new_tokens": TOKENS, "repeats": 1, "console": Console(file=io.StringIO())}
    expected = asking.run("testbed:llava", scene, CAPTION, SPECS[1:], tmp_path / "kept.png", **settings)
    assert answers == [outcome.answer for outcome in expected] and len(set(answers)) > 1
    assert rows == [[asking.called(one.spec), *asking.figures(one)[:3], *row[4:]] for one, row in zip(expected, rows)]
    assert all(float(time) > 0 for row in rows for time in row[4:])
    model, processor = asking.load_asked("testbed:llava", device="cpu", dtype="float32")
    question = asking.prepare(model, processor, asking.open_image(scene), CAPTION)
    for uri, outcome in zip(pictures, expected):
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert np.array_equal(np.asarray(shown), np.asarray(asking.drawn(question, outcome)))


def test_the_keyboard_alone(demo):
    """Enter in the question asks; so does Enter on the button, which Tab reaches."""
    with browser.open_page(demo.url) as page:
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement == document.querySelector('#question textarea')"):
                break
        page.keyboard.press("Control+A")
        page.keyboard.type("read the word .")
        page.keyboard.press("Enter")
        first = answered(page, *SPECS)
        page.keyboard.press("Control+A")
        page.keyboard.type("what is white ?")
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.innerText") == "Ask":
                break
        page.keyboard.press("Enter")
        page.locator(".card.waiting").first.wait_for()
        assert answered(page, *SPECS)[0] != first[0]


def test_wrong_input_and_on(demo, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with browser.open_page(demo.url) as page:
        other = page.get_by_label("Other methods")
        wrong = {"hipruni": "did you mean hiprune", "hiprune:keep=0": "keep=0", "grid+random": "cannot be combined"}
        for spec, word in wrong.items():
            other.fill(spec)
            other.press("Enter")
            page.get_by_role("alert").filter(has_text=word).wait_for()
            refused(page, word)
        other.fill("")
        ask(page, " ")
        page.get_by_role("alert").filter(has_text="question is empty").wait_for()
        page.get_by_role("button", name="Remove Image").click()
        ask(page, "read the word .")
        page.get_by_role("alert").filter(has_text="there is no picture").wait_for()
        page.locator("#picture input[type=file]").set_input_files(tmp_path / "torn.png")
        page.get_by_role("button", name="Remove Image").wait_for()
        ask(page)
        page.get_by_role("alert").filter(has_text="torn.png cannot be read as an image").wait_for()
        refused(page, "unknown format")
        page.get_by_role("button", name="where is the").click()
        page.wait_for_function("document.querySelector('#question textarea').value.startsWith('where')")
        page.get_by_label("number input for Keep").fill("0.5")
        ask(page, "where is the elephant ?")
        answered(page, *(spec.replace("0.33", "0.5") for spec in SPECS))
        assert "no token for 'elephant'" in page.locator(".warning").inner_text()


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "as a file"])
def test_a_forged_upload(demo, scene, meta):
    """Whoever reaches the page sees no file of this machine, whatever they ask for; nor is it copied."""
    with urlopen(f"{demo.url}/config") as config:
        asking = next(one for one in json.load(config)["dependencies"] if len(one["inputs"]) == 5)
    data = [{"path": str(scene), **meta}, "what is white ?", [], 1.0, ""]
    body = json.dumps({"data": data, "fn_index": asking["id"], "session_hash": "forged"}).encode()
    urlopen(Request(f"{demo.url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})).close()
    with urlopen(f"{demo.url}/gradio_api/queue/data?session_hash=forged") as events:
        told = b"".join(itertools.takewhile(lambda line: b"close_stream" not in line, events)).decode()
    assert ("scene.png was not uploaded here" if not meta else "Error") in told and "data:image" not in told
    assert "scene.png" not in [path.name for path in demo.uploaded()]


def test_two_tabs(demo):
    """Both ask at once, and each gets what it asked for: the answers of one after the other."""
    with browser.open_page(demo.url) as page:
        other = page.context.new_page()
        other.goto(demo.url)
        asked = {page: "read the word .", other: "describe the picture ."}
        for tab, question in asked.items():
            tab.get_by_label("Question").fill(question)
        for tab in asked:
            ask(tab)
        at_once = [answered(tab, *SPECS) for tab in asked]
        for tab in asked:
            tab.get_by_label("Question").fill("")
            ask(tab)
            tab.get_by_role("alert").filter(has_text="empty").wait_for()
        one_by_one = []
        for tab, question in asked.items():
            ask(tab, question)
            one_by_one.append(answered(tab, *SPECS))
    assert at_once == one_by_one and at_once[0] != at_once[1]


def test_asking_again_meanwhile(demo):
    """What was asked last is answered last."""
    with browser.open_page(demo.url) as page:
        ask(page, "read the word .")
        page.locator(".card.waiting").first.wait_for()
        page.get_by_label("Other methods").fill("grid")
        ask(page, "read the number .")
        page.locator(".card[data-spec='grid:keep=0.33']").wait_for()
        assert answered(page, *SPECS, "grid:keep=0.33")[0].replace(" ", "").isdigit()


def test_a_tab_that_is_closed_while_it_waits(demo):
    """Its answer goes on in the background for a moment; the next one does not meet a patched model."""
    with browser.open_page(demo.url) as page:
        for _ in range(3):
            tab = page.context.new_page()
            tab.goto(demo.url)
            ask(tab)
            tab.locator(".card.waiting").first.wait_for()
            tab.close()
        ask(page)
        answered(page, *SPECS)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_layout(demo, width, dark):
    """Nothing scrolls sideways but the table, in light and dark, on a laptop and on a phone."""
    with browser.open_page(demo.url, width, 800, dark) as page:
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        assert page.evaluate("document.body.classList.contains('dark')") is dark
        page.get_by_label("Other methods").fill("eemllm:layers=4:,visual_update=none")
        ask(page)
        page.locator(".card.waiting").first.wait_for()
        assert browser.sideways(page) <= 0
        browser.shoot(page, f"demo-waiting-{width}-{'dark' if dark else 'light'}")
        answered(page, *SPECS, "eemllm:layers=4:,visual_update=none")
        assert browser.sideways(page) <= 0
        browser.shoot(page, f"demo-{width}-{'dark' if dark else 'light'}")
        page.get_by_label("Other methods").fill("hipruni")
        ask(page)
        page.locator(".error").wait_for()
        assert browser.sideways(page) <= 0
        browser.shoot(page, f"demo-error-{width}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_its_end(tmp_path, scene, number):
    """One line, and no uploaded picture stays: while the page is open, and an answer under way."""
    lost = ["console: "]  # the page finds itself alone
    with running(tmp_path) as demo, browser.open_page(demo.url, provoked=lost) as page:
        upload(page, scene)
        ask(page)
        page.locator(".card.waiting").first.wait_for()
        assert "scene.png" in {path.name for path in demo.uploaded()}
        start = time.monotonic()
        assert demo.end(number) == ("", ["vlmfast: the page is closed"])
        assert demo.process.returncode == 0 and time.monotonic() - start < 10
        assert demo.uploaded() == [] and demo.asked.requests == []

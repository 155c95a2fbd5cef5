"""vlmfast demo without a browser: what the page asks for, and its command."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_cli import call, refused

from vlmfast.eval import asking, tasks
from vlmfast.eval.demo import answering, serving
from vlmfast.eval.demo.answering import Room, render

QUESTION = "what colour is the note ?"
TWO = ["hiprune", "random"]


@pytest.fixture(scope="module")
def room(uploads):
    """A room with the shipped model."""
    model, processor = asking.load_asked("testbed:llava", device="cpu", dtype="float32")
    return Room(model, processor, uploads, max_new_tokens=6, repeats=1)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def scene(uploads):
    """The file of a scene in which there is a note."""
    path = uploads / "scene.png"
    Image.fromarray(tasks.image(tasks.TASKS["colour"].load(1, seed=0)[0])).save(path)
    return str(path)


def end(room, picture, prompt=QUESTION, methods=(), keep=0.33, typed=""):
    """The last that is told of a request."""
    return list(room.ask(picture, prompt, methods, keep, typed))[-1]


def pixels(uri):
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


class TestAsking:
    def test_equals_vlmfast_run(self, room, scene, tmp_path):
        told = list(room.ask(scene, QUESTION, TWO, 0.33, ""))
        last, specs = told[-1], ["none", "hiprune:keep=0.33", "random:keep=0.33"]
        settings = {"max_new_tokens": 6, "repeats": 1, "console": Console(file=io.StringIO())}
        expected = asking.run("testbed:llava", Path(scene), QUESTION, specs[1:], tmp_path / "o.png", **settings)
        assert [outcome.spec for outcome in expected] == list(last.specs) == specs
        for one, other in zip(expected, (card.outcome for card in last.cards)):
            assert (one.answer, one.kept, one.per_layer, one.share) == (
                other.answer,
                other.kept,
                other.per_layer,
                other.share,
            )
        with Image.open(scene) as picture:
            question = asking.prepare(room.model, room.processor, picture.convert("RGB"), QUESTION)
        for card, outcome in zip(last.cards, expected):
            assert np.array_equal(pixels(card.picture), np.asarray(asking.drawn(question, outcome)))
        assert not np.array_equal(pixels(last.cards[1].picture), pixels(last.cards[2].picture))

    def test_tells_how_far_it_is(self, room, scene):
        told = list(room.ask(scene, QUESTION, ["random"], 0.5, ""))
        assert [(len(one.cards), one.waiting) for one in told] == [
            (0, ("none", "random:keep=0.5")),
            (0, ("none", "random:keep=0.5")),
            (1, ("random:keep=0.5",)),
            (2, ()),
        ]
        assert "answering: unpatched … (1 of 2)" in render(told[0])
        assert "answering" not in render(told[-1])

    def test_keep_of_the_slider_and_of_a_spec(self, room, scene):
        """A keep in a spec wins; a slider at its end gives 1, which is all tokens and not one."""
        last = end(room, scene, keep=1, typed="random:keep=20; hiprune+var ;")
        assert last.specs == ("none", "random:keep=20", "hiprune:keep=1.0+var")
        assert [card.outcome.kept for card in last.cards] == [144, 20, 144]

    def test_a_photo_that_lies_on_its_side(self, room, scene, uploads):
        """The camera's note of how it was held is heeded."""
        exif = Image.Exif()
        exif[0x0112] = 6  # turn it to the right by a quarter
        with Image.open(scene) as upright:
            upright.rotate(90, expand=True).save(uploads / "turned.png", exif=exif)
        upright, turned = (end(room, str(path), methods=["hiprune"]) for path in (scene, uploads / "turned.png"))
        assert [card.picture for card in upright.cards] == [card.picture for card in turned.cards]

    @pytest.mark.parametrize(
        "changes, words",
        [
            ({"picture": None}, ("no picture",)),
            ({"prompt": "  "}, ("question is empty",)),
            ({"typed": "hipruni"}, ("hipruni", "did you mean hiprune")),
            ({"typed": "hiprune:keep=0"}, ("keep=0",)),
            ({"typed": "hiprune:keep=145"}, ("145", "144")),
            ({"typed": "random+grid"}, ("cannot be combined",)),
            ({"typed": "<b>"}, ("no method '<b>'",)),
            ({"keep": 1.5, "methods": TWO}, ("1.5",)),
        ],
        ids=str,
    )
    def test_wrong_input(self, room, scene, changes, words, capsys):
        last = end(room, **({"picture": scene} | changes))
        assert last.error and all(word in last.error for word in words) and "\n" not in last.error
        assert 'role="alert"' in render(last) and "<b>" not in render(last)
        assert capsys.readouterr().err == "", "no traceback"
        assert end(room, scene).cards[0].outcome.answer == "white", "the room works afterwards"

    def test_what_is_no_picture(self, room, uploads):
        (uploads / "text.png").write_text("no picture")
        assert end(room, str(uploads / "text.png")).error == "text.png cannot be read as an image: unknown format"

    def test_a_bomb(self, room, uploads, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (30, 30)).save(uploads / "large.png")
        assert "exceeds limit" in end(room, str(uploads / "large.png")).error

    def test_other_files_of_the_machine(self, room, scene, uploads, tmp_path):
        """The page shows what it opens: no picture but those that were uploaded, by any name."""
        secret = tmp_path / "secret.png"
        secret.write_bytes(Path(scene).read_bytes())
        (uploads / "link.png").symlink_to(secret)
        for name in (secret, uploads / ".." / secret.relative_to(uploads.parent), uploads / "link.png"):
            assert end(room, str(name)).error == "secret.png was not uploaded here"

    def test_a_fault_of_ours(self, room, scene, monkeypatch, capsys):
        monkeypatch.setattr(answering, "answer", lambda *_: {}["features"])
        last = end(room, scene)
        assert last.error == "vlmfast failed, the terminal shows where: KeyError: 'features'"
        assert "Traceback" in capsys.readouterr().err

    def test_words_that_the_model_does_not_know(self, room, scene):
        last = end(room, scene, "what colour is the elephant ?")
        assert not last.error and "no token for 'elephant':" in last.warning and "elephant" in render(last)
        assert end(room, scene).warning is None

    def test_several_at_a_time(self, room, scene):
        """Even without Gradio's queue: a request that was given up may be at work when the next one comes."""
        found = {}

        def work(number):
            found[number] = end(room, scene, methods=["hiprune"])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.error for one in found.values()] == [None] * 2
        answers = {tuple(card.outcome.answer for card in one.cards) for one in found.values()}
        assert len(answers) == 1 and not hasattr(room.model, "vlmfast_handle")

    def test_methods_on_offer(self, room):
        assert {"hiprune", "fastv", "var", "vcd", "opera", "eemllm"} < set(room.offered)
        assert not {"evs", "vidcom2", "framefusion", "seal", "agla"} & set(room.offered), "videos and files"
        assert room.offered["hiprune"] == "hiprune"
        model, processor = asking.load_asked("testbed:qwen2_5_vl", device="cpu", dtype="float32")
        assert Room(model, processor, Path()).offered["fastervlm"] == "fastervlm:fallback=received"

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
    def test_every_method_on_offer_answers(self, name, uploads, scene):
        model, processor = asking.load_asked(f"testbed:{name}", device="cpu", dtype="float32")
        room = Room(model, processor, uploads, max_new_tokens=3, repeats=1)
        last = end(room, scene, methods=list(room.offered.values()))
        assert last.error is None and len(last.cards) == 1 + len(room.offered) > 25


def test_the_table_is_that_of_vlmfast_run(room, scene):
    last = end(room, scene, methods=TWO)
    page = render(last)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert rows[0][1:] == [head.replace("\n", " ") for head in asking.HEADS]
    assert [row[0] for row in rows[1:]] == ["unpatched", "hiprune:<wbr>keep=0.33", "random:<wbr>keep=0.33"]
    assert [tuple(row[1:]) for row in rows[1:]] == [asking.figures(card.outcome) for card in last.cards]
    assert "X2" in page, "cost never without its convention"


class TestCommand:
    @pytest.fixture
    def served(self, monkeypatch):
        calls = []
        monkeypatch.setattr(serving, "serve", lambda *args, **kwargs: calls.append((args, kwargs)))
        return calls

    def test_defaults(self, served):
        assert call("demo", "--device", "cpu").exit_code == 0
        expected = {"host": "127.0.0.1", "port": 7860, "max_new_tokens": 64, "repeats": 3}
        assert served == [(("testbed:llava",), expected | {"device": "cpu", "dtype": "float32", "browse": False})]

    def test_options_arrive(self, served):
        words = "--model m --adapter a --host ::1 --port 8000 --max-new-tokens 5 --repeats 1 --open --device cpu"
        assert call("demo", *words.split(), "--dtype", "bfloat16").exit_code == 0
        expected = {"host": "::1", "port": 8000, "max_new_tokens": 5, "repeats": 1}
        assert served == [(("m+adapter=a",), expected | {"device": "cpu", "dtype": "bfloat16", "browse": True})]

    def test_help_waits_for_nothing(self):
        code = (
            "import sys, vlmfast.__main__ as cli; cli.app(['demo', '--help'], standalone_mode=False); "
            "sys.exit(bool({'torch', 'gradio', 'transformers'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0

    def test_a_port_that_is_taken(self):
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            port = taken.getsockname()[1]
            refused(call("demo", "--port", port), f"port {port} is taken", f"--port {port + 1}")

    def test_wrong_place(self):
        refused(call("demo", "--port", 0), "--port")
        refused(call("demo", "--host", "no such host"), "no such host", "no address of this machine")
        refused(call("demo", "--host", "192.0.2.1"), "192.0.2.1", "no address of this machine")

    def test_missing_extra(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "vlmfast.eval.demo.page", raising=False)
        for name in ("gradio", "fastapi", "uvicorn"):
            monkeypatch.setitem(sys.modules, name, None)
        with closing(socket.create_server(("127.0.0.1", 0))) as free:
            port = free.getsockname()[1]
        refused(call("demo", "--port", port), "gradio is not installed; pip install 'vlmfast[demo]' brings it")

    @pytest.mark.parametrize("host, warned", [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)], ids=str)
    def test_who_reaches_it(self, host, warned, capsys):
        with closing(serving.listen(host, 0)) as listener:
            serving.warn(listener)
            port = listener.getsockname()[1]
            assert serving.address(listener).endswith(f":{port}")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == warned and all(f"everybody who reaches port {port}" in line for line in lines)

    def test_uploads_are_gone(self, monkeypatch):
        monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
        with pytest.raises(KeyboardInterrupt), serving.uploads() as folder:
            assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
            (folder / "picture").mkdir()
            (folder / "picture" / "photo.png").write_bytes(b"")
            raise KeyboardInterrupt
        assert not folder.exists() and "GRADIO_TEMP_DIR" not in os.environ

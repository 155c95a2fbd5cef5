"""The command line in process: what it prints, and one clear line for every wrong input."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_llava
from PIL import Image
from tiny import text_settings
from transformers import LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from typer.testing import CliRunner

import vlmfast
from vlmfast import __main__ as cli
from vlmfast.adapters import ADAPTERS
from vlmfast.eval import asking, bench, report, runner, sweep
from vlmfast.eval.report import plot
from vlmfast.eval.results import load_results
from vlmfast.eval.tasks import TASKS
from vlmfast.eval.testbed.build import new_model, new_processor
from vlmfast.families import FAMILIES

COMMANDS = ("list", "run", "demo", "eval", "bench", "report", "sinks", "heads", "flops", "rank-layers")
HELPS = [[], *([name] for name in COMMANDS)]


def call(*arguments, **kwargs):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **kwargs)


def refused(result, *words, code=2):
    """Exit code, one line on standard error that names what matters, nothing else."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("vlmfast: ")
    for word in words:
        assert str(word) in line
    return line


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A folder with an untrained model of the testbed's shape."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    new_model("llava").save_pretrained(folder)
    new_processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def ask(llava, photo, tmp_path):
    """vlmfast run with everything right, but for what the test changes."""

    def run(*more, **changes):
        options = {
            "--model": llava,
            "--image": photo,
            "--prompt": "what is red ?",
            "--method": "hiprune:keep=0.33",
            "--out": tmp_path / "kept.png",
            "--max-new-tokens": 3,
            "--repeats": 1,
        } | {f"--{name}": value for name, value in changes.items()}
        return call("run", *(word for pair in options.items() for word in pair), *more)

    return run


def any_resolution(folder):
    """A small random LLaVA-NeXT with the testbed's tokenizer, saved with its processor."""
    plain = new_processor("llava")
    sizes = [[48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
    config = LlavaNextConfig(
        vision_config=tiny_llava.clip(),
        text_config=LlamaConfig(**text_settings(vocab_size=len(plain.tokenizer))),
        image_token_id=plain.tokenizer.convert_tokens_to_ids(plain.image_token),
        vision_feature_layer=-2,
        image_grid_pinpoints=sizes,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, image_grid_pinpoints=sizes
    )
    LlavaNextProcessor(
        image_processor=images,
        tokenizer=plain.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=plain.chat_template,
        image_token=plain.image_token,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


class TestHelp:
    def test_alone_prints_help(self):
        result = call()
        assert result.exit_code == 0
        assert all(name in result.stdout for name in ("list", "run", "eval", "bench", "report"))

    @pytest.mark.parametrize("command", HELPS, ids=lambda words: " ".join(words) or "vlmfast")
    def test_examples_that_can_be_pasted(self, command):
        result = call(*command, "--help")
        assert result.exit_code == 0
        examples = result.stdout.partition("examples:")[2].strip().splitlines()
        assert examples and examples[0].strip().startswith("vlmfast")

    @pytest.mark.parametrize("command", cli.app.registered_commands, ids=lambda command: command.callback.__name__)
    def test_about_a_dozen_options(self, command):
        assert command.callback.__code__.co_argcount <= 16

    def test_version(self):
        result = call("--version")
        assert result.exit_code == 0 and result.stdout.startswith("vlmfast 0.")

    def test_starts_without_transformers(self):
        code = "import sys, vlmfast.__main__; sys.exit('transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def test_python_m(self):
        done = subprocess.run([sys.executable, "-m", "vlmfast", "list", "nothing"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines() == ["vlmfast: cannot list 'nothing'; there are methods, families, tasks"]


class TestList:
    @pytest.mark.parametrize("topic, names", [("methods", ADAPTERS), ("families", FAMILIES), ("tasks", TASKS)])
    def test_names_everything(self, topic, names):
        result = call("list", topic)
        assert result.exit_code == 0
        assert all(name in result.stdout for name in names)

    def test_methods_with_settings_and_papers(self):
        text = "".join(call("list", "methods", env={"COLUMNS": "200"}).stdout.split())
        for method in vlmfast.methods().values():
            assert method.paper in text
            assert all(f"{name}={value}" in text for name, value in method.settings.items())

    def test_all_topics(self):
        result = call("list")
        assert all(name in result.stdout for name in [*ADAPTERS, *FAMILIES, *TASKS])


class TestRun:
    def test_answers_costs_and_overlay(self, ask, tmp_path):
        result = ask("--method", "grid:keep=16")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        for name, tokens in (("unpatched", 144), ("hiprune:keep=0.33", 48), ("grid:keep=16", 16)):
            mine = [line for line in lines if line.strip().startswith(name)]
            assert len(mine) == 2, "an answer and its cost"
            assert mine[1].split()[1:3] == [str(tokens), f"{tokens}.0"], "left, and the mean of all decoder layers"
        assert "X2" in result.stdout, "cost never without its convention"
        assert str(tmp_path / "kept.png") in result.stdout
        with Image.open(tmp_path / "kept.png") as sheet:
            assert sheet.format == "PNG" and sheet.width > 2 * 480

    def test_words_that_the_model_does_not_know(self, ask):
        result = ask(prompt="What colour is the elephant ?")
        assert "no token for 'What', 'elephant': the model reads an unknown word" in " ".join(result.stdout.split())
        assert "no token" not in ask().stdout

    def test_an_empty_question(self, ask, tmp_path):
        refused(ask(prompt=" "), "the question is empty")

    def test_a_picture_cut_into_crops(self, ask, photo, tmp_path):
        """LLaVA-NeXT from a folder: a wide picture with padding, newlines, a thumbnail and crops."""
        wide = tmp_path / "wide.png"
        Image.open(photo).convert("RGB").resize((150, 70)).save(wide)
        result = ask("--method", "globalcom2:keep=40", model=any_resolution(tmp_path / "next"), image=wide)
        assert result.exit_code == 0, result.output
        costs = result.stdout.partition("TTFT")[2].splitlines()
        names = ("unpatched", "globalcom2")
        whole, kept = (int(line.split()[1]) for line in costs if line.strip().startswith(names))
        assert whole > 72 and whole > kept > 40, "more than one view, and newlines beside the 40 kept"
        with Image.open(tmp_path / "kept.png") as sheet:
            assert sheet.width > 2 * 480

    def test_a_method_inside_the_language_model(self, ask):
        """What is left after the last cut, and the mean over the six layers: two of 144, four of 16."""
        result = ask("--method", "fastv:keep=16")
        row = [line for line in result.stdout.splitlines() if line.strip().startswith("fastv")][1]
        assert row.split()[1:3] == ["16", f"{(2 * 144 + 4 * 16) / 6:.1f}"]

    @pytest.mark.parametrize(
        "method, words",
        [
            ("hipprune:keep=0.3", ("hipprune", "did you mean hiprune")),
            ("hiprune:kep=0.3", ("no setting 'kep'", "keep")),
            ("hiprune:keep", ("name=value",)),
            ("hiprune:keep=0", ("keep=0",)),
            ("hiprune:keep=-3", ("keep=-3",)),
            ("hiprune:keep=1.5", ("keep=1.5",)),
            ("hiprune:keep=nan", ("keep=nan",)),
            ("hiprune:keep=True", ("keep=True",)),
            ("hiprune:keep=many", ("keep='many'",)),
            ("hiprune:keep=145", ("145", "144")),
            ("random:keep=0.5+grid:keep=0.5", ("cannot be combined",)),
            ("none", ("name a method",)),
        ],
    )
    def test_wrong_method(self, ask, tmp_path, method, words):
        refused(ask(method=method), *words)
        assert not (tmp_path / "kept.png").exists()

    def test_wrong_model(self, ask, tmp_path, llava):
        refused(ask(model="testbed:lava"), "testbed:lava", "testbed:llava", "testbed:qwen2_5_vl")
        refused(ask(model=tmp_path / "nowhere"), tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        refused(ask(model=tmp_path / "empty"), "config.json")

    def test_model_without_processor(self, ask, tmp_path, llava):
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            os.link(llava / name, bare / name)
        refused(ask(model=bare), bare, "processor")

    @pytest.mark.parametrize("kind", ["blip-2", "gpt2"])
    def test_model_of_another_family(self, ask, tmp_path, kind):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        refused(ask(model=tmp_path), kind, "llava", "qwen2_5_vl")

    def test_wrong_image(self, ask, tmp_path):
        refused(ask(image=tmp_path / "nowhere.png"), "nowhere.png")
        refused(ask(image=tmp_path), tmp_path)
        text = tmp_path / "text.png"
        text.write_text("no picture")
        refused(ask(image=text), "text.png", "image")

    def test_torn_image(self, ask, tmp_path, photo):
        torn = tmp_path / "torn.png"
        torn.write_bytes(photo.read_bytes()[:2000])
        refused(ask(image=torn), "torn.png")

    def test_wrong_target(self, ask, tmp_path):
        refused(ask(out=tmp_path / "kept.jpg"), ".png")
        refused(ask(out=tmp_path / "nowhere" / "kept.png"), "nowhere")

    def test_wrong_device_and_dtype(self, ask):
        refused(ask(device="gpu"), "gpu")
        refused(ask(dtype="float8"), "float8", "bfloat16")

    def test_wrong_numbers(self, ask):
        refused(ask(**{"max-new-tokens": 0}), "--max-new-tokens")
        refused(ask(repeats="some"), "--repeats")


class TestUsage:
    def test_unknown_command(self):
        refused(call("evall"), "evall", "eval")

    def test_unknown_option(self):
        refused(call("eval", "--methods", "random"), "--methods", "--method")

    def test_missing_option(self):
        refused(call("run", "--model", "testbed:llava"), "--image")

    def test_unknown_topic(self):
        refused(call("list", "colours"), "colours", "methods, families, tasks")


class TestEval:
    @pytest.fixture
    def asked(self, monkeypatch):
        """Calls of evaluate and of the report, which do nothing here."""
        calls = []
        monkeypatch.setattr(runner, "evaluate", lambda *args, **kwargs: calls.append((args, kwargs)))
        monkeypatch.setattr(report, "make", lambda folders, out=None: calls.append(folders))
        return calls

    def test_defaults_are_the_main_job(self, asked):
        assert call("eval").exit_code == 0
        (arguments, settings), reported = asked
        models, specs, keeps, tasks, out = arguments
        assert models == ["testbed:llava", "testbed:qwen2_5_vl"]
        assert [spec.partition(":")[0] for spec in specs] == ["none", "random", "grid", "fastervlm", "hiprune"]
        assert keeps == [1.0, 0.5, 0.33, 0.2, 0.11]
        assert tasks is None
        assert str(out) == str(reported) == "results"
        assert settings["limit"] is None and settings["seed"] == 0 and settings["dtype"] == "float32"

    def test_options_arrive(self, asked, tmp_path):
        words = "--method grid --method hiprune:alpha=0.2 --keep 0.5,64 --task word --task count"
        words += " --limit 7 --seed 3 --batch 5 --beams 4 --match flops"
        assert call("eval", *words.split(), "--workers", 1, "--device", "cpu", "--out", tmp_path).exit_code == 0
        (_, specs, keeps, tasks, out), settings = asked[0]
        assert specs == ["grid", "hiprune:alpha=0.2"]
        assert keeps == [0.5, 64] and [type(keep) for keep in keeps] == [float, int]
        assert tasks == ["word", "count"] and out == tmp_path
        expected = {"limit": 7, "seed": 3, "batch": 5, "workers": 1, "device": "cpu", "dtype": "float32"}
        assert settings == expected | {"flops": [], "match": "flops", "beams": 4}

    def test_equal_flops(self, asked):
        assert call("eval", "--method", "all", "--flops", "0.6,0.5").exit_code == 0
        assert asked[0][1]["flops"] == [0.6, 0.5]
        refused(call("eval", "--keep", "0.5", "--flops", "0.6"), "--keep", "--flops", "not both")

    def test_interrupted(self, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "evaluate", interrupt)
        refused(call("eval", "--out", "somewhere"), "somewhere", "same command", code=130)

    @pytest.mark.parametrize(
        "words, expected",
        [
            (["--keep", "half"], ("half", "0.5")),
            (["--keep", "0.5,1.5"], ("1.5", "share")),
            (["--keep", "0"], ("keep=0",)),
            (["--keep", "nan"], ("nan",)),
            (["--keep", ""], ("needs a keep",)),
            (["--method", "hipprune"], ("hipprune", "did you mean hiprune")),
            (["--task", "colours"], ("colours", "did you mean colour", "existence")),
            (["--limit", "0"], ("--limit",)),
            (["--seed", "-1"], ("--seed",)),
            (["--model", "testbed:lava"], ("testbed:llava",)),
            (["--device", "gpu"], ("gpu",)),
            (["--dtype", "double"], ("double", "float32")),
        ],
    )
    def test_wrong_input(self, words, expected, llava, tmp_path):
        base = [] if "--model" in words else ["--model", llava]
        refused(call("eval", *base, *words, "--out", tmp_path / "out"), *expected)

    def test_target_is_a_file(self, llava, photo):
        refused(call("eval", "--model", llava, "--method", "none", "--out", photo), photo)

    def test_runs_then_only_reports(self, llava, tmp_path, monkeypatch):
        monkeypatch.setattr(sweep, "REPEATS", 1)
        monkeypatch.setattr(runner, "cores", lambda: 1)
        monkeypatch.setattr(plot, "draw", lambda sections, **kwargs: b"PNG")  # takes most of a report's time
        words = ["eval", "--model", llava, "--method", "grid", "--keep", "0.2", "--task", "word", "--limit", 1]
        first = call(*words, "--out", tmp_path)
        assert first.exit_code == 0, first.output
        assert "unpatched" in first.stdout and "X2" in first.stdout
        assert str(tmp_path / "report.html") in first.stdout and str(tmp_path / "pareto.png") in first.stdout
        before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
        assert len(before) == 4 and len(load_results(tmp_path)) == 2
        monkeypatch.setattr(sweep, "load_model", None)  # must not be needed again
        again = call(*words, "--out", tmp_path)
        assert again.exit_code == 0 and again.stdout == first.stdout
        assert before == {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
        assert call("report", tmp_path).stdout == first.stdout

        damaged = next(tmp_path.glob("*grid*.json"))
        damaged.write_text(damaged.read_text()[:100])
        refused(call(*words, "--out", tmp_path), damaged)
        refused(call("report", tmp_path), damaged)


class TestReport:
    def test_no_folder(self, tmp_path):
        refused(call("report", tmp_path / "nowhere"), "nowhere")

    def test_no_results(self, tmp_path):
        refused(call("report", tmp_path), tmp_path)

    def test_needs_a_folder(self):
        refused(call("report"), "DIR")


class TestBench:
    def test_measures_and_prints(self, monkeypatch, tmp_path):
        seen = {}

        def measure(*args, **kwargs):
            seen.update(kwargs, args=args)
            return ["rows"]

        monkeypatch.setattr(bench, "bench", measure)
        monkeypatch.setattr(bench, "print_table", lambda rows: seen.update(rows=rows))
        words = ["--model", "small", "--method", "none", "--method", "grid:keep=16", "--repeats", 2]
        assert call("bench", *words, "--out", tmp_path / "bench.json", "--device", "cpu").exit_code == 0
        assert seen["args"] == ("small", ["none", "grid:keep=16"]) and seen["rows"] == ["rows"]
        assert seen["repeats"] == 2 and seen["threads"] == 1 and seen["out"] == tmp_path / "bench.json"

    def test_wrong_input(self):
        refused(call("bench", "--model", "small", "--method", "gird"), "gird", "did you mean grid")
        refused(call("bench", "--model", "testbed:lava", "--method", "grid"), "testbed:llava")
        refused(call("bench", "--model", "small", "--method", "grid", "--repeats", 0), "--repeats")


class TestErrors:
    """Only what vlmfast says on purpose becomes one line: a fault of ours must show where it is."""

    def fail_with(self, monkeypatch, error):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(asking, "run", fail)
        return call("run", "--model", "m", "--image", "i", "--prompt", "p", "--method", "grid")

    def test_faults_keep_their_traceback(self, monkeypatch):
        error = ValueError("raised outside of vlmfast")
        assert self.fail_with(monkeypatch, error).exception is error
        error = KeyError("features")
        assert self.fail_with(monkeypatch, error).exception is error

    def test_errors_of_torch_inside_our_code_keep_their_traceback(self, monkeypatch):
        monkeypatch.setattr(asking, "run", lambda *args, **kwargs: runner.cores(1))
        result = call("run", "--model", "m", "--image", "i", "--prompt", "p", "--method", "grid")
        assert isinstance(result.exception, TypeError)

    def test_full_disk(self, monkeypatch):
        error = OSError(errno.ENOSPC, "No space left on device", "results/a.json")
        refused(self.fail_with(monkeypatch, error), "No space left on device", "results/a.json", code=1)

    def test_missing_extra(self, monkeypatch):
        error = ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        refused(self.fail_with(monkeypatch, error), "jinja2", "vlmfast[eval]")

    def test_interrupted(self, monkeypatch):
        assert self.fail_with(monkeypatch, KeyboardInterrupt()).exit_code == 130


def test_keeps():
    assert cli.parse_keeps("1.0, 0.5,64") == [1.0, 0.5, 64]
    assert [type(keep) for keep in cli.parse_keeps("1,1.0")] == [int, float]


def test_shares_of_flops():
    assert cli.parse_shares("0.6, 1") == [0.6, 1.0]
    for wrong in ("", "0", "1.5", "half", "nan"):
        with pytest.raises(ValueError, match="--flops"):
            cli.parse_shares(wrong)

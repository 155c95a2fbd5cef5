"""Fine-tuning: loss falls, runs go on bit for bit, pruning is active, adapters come back; wrong input stops early."""

import gc
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import finetune as script
import pytest
import torch
from chat_data import colours, turn, write_lines
from conftest import ROOT, every_family
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

import vlmfast
from vlmfast import __main__ as cli
from vlmfast.adapters.tuning import TUNERS
from vlmfast.eval.environment import describe
from vlmfast.eval.finetune import Arguments, Training, command, evaluating, finetune, training, tuners
from vlmfast.eval.finetune.collate import Collator
from vlmfast.eval.finetune.command import parsed
from vlmfast.eval.finetune.data import load_samples
from vlmfast.eval.models import load_model, model_folder, model_hash
from vlmfast.eval.results import load_results
from vlmfast.eval.runner import evaluate
from vlmfast.eval.testbed.build import new_model, new_processor
from vlmfast.families import family_of
from vlmfast.patching import handle_of

HALF = "hiprune:keep=0.5"
WEIGHTS = "adapter_model.safetensors"
AVAILABLE = [name for name in tuners.known() if name not in ("lora", "full")]


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """A Trainer collects garbage when it has done: not among everything that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders with untrained models of the testbed's shape."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("llava", "qwen2_5_vl"):
        smaller(name).save_pretrained(folder / name)
        new_processor(name).save_pretrained(folder / name)
    return folder


def smaller(name):
    """An untrained model of the testbed's shape with fewer layers."""
    config = new_model(name).config
    config.text_config.num_hidden_layers = 2
    if name == "llava":
        config.vision_config.num_hidden_layers = 3
        return LlavaForConditionalGeneration(config)
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 2, [1]
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return colours(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tune(models, data, tmp_path):
    """finetune with everything right, but for what the test changes."""

    def run(name="run", *, model=models / "llava", tuner="lora:r=4", **changes):
        own = {key: changes.pop(key) for key in list(changes) if key in Arguments.__dataclass_fields__}
        settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1}
        settings |= {"disable_tqdm": True, "save_strategy": "no"} | changes
        arguments = Arguments(**({"model": str(model), "data": str(data), "tuner": tuner} | own))
        return finetune(arguments, Training(output_dir=str(tmp_path / name), **settings))

    return run


def losses(outcome):
    return [one["loss"] for one in outcome.history if "loss" in one]


def told(outcome):
    return json.loads((outcome.folder / "vlmfast_finetune.json").read_text())


def logits(model, processor, data):
    batch = Collator(processor)(list(load_samples(data)))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


def same_weights(one, other):
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert set(first) == set(second) and first
    return all(first[name].equal(second[name]) for name in first)


def test_learns_and_comes_back(tune, models, data):
    """The loss falls; the folder holds adapter, processor and what was done; the adapter gives the same logits."""
    outcome = tune(max_steps=4, lr_scheduler_type="constant", learning_rate=0.02)
    first, *_, last = losses(outcome)
    assert last < 0.8 * first and outcome.metrics["train_loss"] > 0
    about = told(outcome)
    base = models / "llava"
    assert about["complete"] and about["model_hash"] == model_hash(base) and about["steps"] == 4
    assert (about["tuner"], about["method"], about["pruned_in_training"]) == ("lora:r=4", "none", False)
    assert about["records"] == 6 and about["data_hash"] == load_samples(data).check()
    assert about["trainable_parameters"] == outcome.trainable == sum(
        p.numel() for p in load_file(outcome.folder / WEIGHTS).values()
    )  # fmt: skip
    assert about["versions"].keys() == describe("cpu").keys() and about["command"]
    assert (outcome.folder / "processor_config.json").is_file()
    only_the_language_model(outcome.folder)
    model, processor = load_model(f"{base}+adapter={outcome.folder}")
    plain, _ = load_model(str(base))
    assert logits(model, processor, data).equal(logits(outcome.model, processor, data))
    assert not logits(plain, processor, data).allclose(logits(model, processor, data))


def only_the_language_model(folder):
    names = set(load_file(folder / WEIGHTS))
    assert all(".language_model.layers." in name for name in names)
    assert {name.split(".")[-3] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_goes_on_bit_for_bit(tune, tmp_path):
    """Interrupted in the second step, with dropout, and gone on with: as never interrupted."""
    steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "tuner": "lora:r=4,lora_dropout=0.1"}
    whole = tune("whole", **steps)

    class Stop(Exception):
        pass

    def log(trainer, logs, *times):
        if trainer.state.global_step == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "log", log)
        with pytest.raises(Stop):
            tune("parts", **steps)
    assert not json.loads((tmp_path / "parts" / "vlmfast_finetune.json").read_text())["complete"]
    with pytest.raises(ValueError, match=r"has checkpoints, the last is checkpoint-1: add --resume_from_checkpoint"):
        tune("parts", **steps)
    with pytest.raises(ValueError, match=r"made with tuner lora:r=4,lora_dropout=0.1 \(now lora:r=2\)"):
        tune("parts", **(steps | {"tuner": "lora:r=2"}), resume_from_checkpoint="true")
    step, taken = training.Trainer.training_step, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "training_step", lambda *a, **k: taken.append(1) or step(*a, **k))
        parts = tune("parts", **steps, resume_from_checkpoint="true")
    assert len(taken) == 1 and same_weights(whole.folder, parts.folder)
    assert losses(parts)[-1] == losses(whole)[-1]
    with pytest.raises(ValueError, match="holds a finished run"):
        tune("parts", **steps)


@pytest.mark.slow
def test_same_seed_same_result(tune):
    one, again, other = tune("one"), tune("again", dataloader_num_workers=1), tune("other", seed=7)
    assert same_weights(one.folder, again.folder) and not same_weights(one.folder, other.folder)


def test_pruning_is_active(tune, models, data, tmp_path):
    """The loss of the first step is that of the patched model, and what is saved knows nothing of it."""
    outcome = tune(method=HALF, max_steps=1, per_device_train_batch_size=6)
    model, processor = load_model(str(models / "llava"))
    batch = Collator(processor)(list(load_samples(data)))
    with torch.no_grad():
        plain = model(**batch).loss.item()
        with vlmfast.patch(model, HALF):
            pruned = model(**batch).loss.item()
    assert losses(outcome)[0] == pytest.approx(pruned, abs=2e-4) and abs(plain - pruned) > 1e-3
    assert handle_of(outcome.model) is None and not (outcome.folder / "vlmfast.json").exists()
    assert (told(outcome)["method"], told(outcome)["pruned_in_training"]) == (HALF, True)
    assert "prun" not in (outcome.folder / "adapter_config.json").read_text()


def test_tasks_while_training(tune, models, tmp_path):
    """Tasks are asked every so many steps, of the weights of then, and training does not notice."""
    options = {"max_steps": 2, "tuner": "lora:r=4,lora_dropout=0.1", "method": HALF}
    quiet = tune("quiet", **options)
    asked = tune("asked", **options, eval_tasks="count,where", eval_limit=1, eval_steps=1)
    scores = [one for one in asked.history if "eval_count_accuracy" in one]
    assert [one["step"] for one in scores] == [1, 2]
    assert {"eval_where_accuracy", "eval_tasks_mean"} < set(scores[0])
    assert same_weights(quiet.folder, asked.folder)
    assert asked.metrics["eval_tasks_mean"] == scores[-1]["eval_tasks_mean"]


def test_evaluation_leaves_no_trace(vlm, monkeypatch):
    """Asked in evaluation mode, without gradients and the method; then all is as before, after an error too."""
    seen = []

    class Scores:
        def __init__(self, job, model, processor):
            seen.append((model.training, torch.is_grad_enabled(), handle_of(model)))

        def scores(self, spec):
            torch.rand(3)
            raise ValueError(spec)

    monkeypatch.setattr(evaluating, "TaskScores", Scores)
    pruning = evaluating.Pruning(vlm.model, HALF)
    evaluation = evaluating.TaskEvaluation(["colour"], "m", None, pruning, limit=1, batch=1, seed=0)
    frozen = next(vlm.model.children())
    vlm.model.train()
    frozen.eval()
    try:
        modes, state = [m.training for m in vlm.model.modules()], torch.get_rng_state()
        pruning.start()
        with pytest.raises(ValueError, match=HALF):
            evaluation(vlm.model)
        assert handle_of(vlm.model).spec == HALF
        assert modes == [m.training for m in vlm.model.modules()] and state.equal(torch.get_rng_state())
        assert seen == [(False, False, None)]
    finally:
        pruning.stop()
        vlm.model.eval()


@pytest.mark.slow
def test_tasks_as_eval_scores_them(tune, models, tmp_path):
    """What a run logs in the end is what `vlmfast eval --adapter` finds, with the method and without."""
    for method in ("none", HALF):
        outcome = tune(method[:4], model="testbed:llava", method=method, eval_tasks="colour,count", eval_limit=4)
        name = f"testbed:llava+adapter={outcome.folder}"
        evaluate([name], [method], [], ["colour", "count"], tmp_path / "res" / method[:4], limit=4, seed=42, batch=32,
                 progress=False)  # fmt: skip
        result = next(r for r in load_results(tmp_path / "res" / method[:4]) if r.spec == method)
        for task in ("colour", "count"):
            assert result.tasks[task].metrics["accuracy"].value == outcome.metrics[f"eval_{task}_accuracy"]


@pytest.mark.slow
def test_best_by_a_task(tune):
    """Trainer's own options see the tasks' scores: the best checkpoint is loaded in the end."""
    outcome = tune(model="testbed:llava", learning_rate=0.3, max_steps=2, lr_scheduler_type="constant", eval_steps=1,
                   eval_tasks="colour", eval_limit=3, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
                   eval_strategy="steps", metric_for_best_model="eval_colour_accuracy")  # fmt: skip
    scores = {
        one["step"]: one["eval_colour_accuracy"] for one in outcome.history[:-1] if "eval_colour_accuracy" in one
    }
    best = max(scores, key=lambda step: (scores[step], -step))
    assert len(scores) == 2 and same_weights(outcome.folder, outcome.folder / f"checkpoint-{best}")
    assert outcome.metrics["eval_colour_accuracy"] == scores[best]


@pytest.mark.slow
def test_loss_on_other_data(tune, data):
    outcome = tune(eval_data=str(data), eval_strategy="steps", eval_steps=1)
    evaluated = [one["eval_loss"] for one in outcome.history if "eval_loss" in one]
    assert len(evaluated) == 2 and evaluated[1] != evaluated[0]
    assert outcome.metrics["eval_loss"] == evaluated[1]


@pytest.mark.slow
def test_too_long(tune, models, data):
    samples = load_samples(data)
    collator = Collator(load_model(str(models / "llava"))[1])
    length = collator.length(samples[0])
    assert told(tune("fits", max_length=length))["records_dropped"] == 0
    with pytest.raises(ValueError, match="6 of 6 records of train.jsonl are longer"):
        tune("raise", max_length=length - 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("tuner", ["full", *AVAILABLE])
def test_every_tuner(tune, models, data, kind, tuner):
    """Learns, and is saved and loaded back."""
    options = {"max_steps": 5, "per_device_train_batch_size": 6, "lr_scheduler_type": "constant"}
    if (tuner, kind) == ("slime", "qwen2_5_vl"):
        with pytest.raises(NotImplementedError, match="SliME wraps a projector"):
            tune(model=models / kind, tuner=tuner, **options)
        return
    outcome = tune(model=models / kind, tuner=tuner, learning_rate=5e-3, **options)
    assert losses(outcome)[-1] < losses(outcome)[0]
    name = str(outcome.folder) if tuner == "full" else f"{models / kind}+adapter={outcome.folder}"
    model, processor = load_model(name)
    expected = logits(outcome.model, processor, data)
    torch.testing.assert_close(logits(model, processor, data), expected)
    plain, _ = load_model(str(models / kind))
    before = logits(plain, processor, data)  # of a longer prompt where a tuner takes tokens out
    assert before.shape != expected.shape or not before.allclose(expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", AVAILABLE)
def test_every_tuner_goes_on(tune, tuner):
    steps = {"save_strategy": "steps", "save_steps": 2, "tuner": tuner, "lr_scheduler_type": "constant"}
    whole = tune("whole", **steps, max_steps=4)
    tune("parts", **steps, max_steps=2)
    record = json.loads((parts := whole.folder.parent / "parts" / "vlmfast_finetune.json").read_text())
    parts.write_text(json.dumps(record | {"complete": False}))
    again = tune("parts", **steps, max_steps=4, resume_from_checkpoint="auto")
    if tuner != "lofit":  # whose first stage was shorter, and may have chosen other heads
        assert same_weights(whole.folder, again.folder)
    assert again.history[-1]["step"] == 4


@pytest.mark.slow
def test_full_without_the_tower(tune, models):
    outcome = tune(tuner="full", method=HALF)
    before, after = (load_file(f / "model.safetensors") for f in (models / "llava", outcome.folder))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not (outcome.folder / "vlmfast.json").exists()
    model_folder(str(outcome.folder))  # is a model by itself
    tower = tune("tower", tuner="full:tower=true")
    after = load_file(tower.folder / "model.safetensors")
    assert any("vision_tower" in name for name in before if not before[name].equal(after[name]))


@pytest.mark.slow
def test_checkpointed_gradients(tune):
    plain, spared = tune("plain", method=HALF), tune("spared", method=HALF, gradient_checkpointing=True)
    first, second = load_file(plain.folder / WEIGHTS), load_file(spared.folder / WEIGHTS)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


class TestLofit:
    """The two stages of LoFiT."""

    OPTIONS = {"tuner": "lofit:k=3,first_rate=0.02", "save_strategy": "steps", "save_steps": 1}

    def test_two_stages(self, tune):
        outcome = tune(tuner="lofit:k=3")
        heads = json.loads((outcome.folder / "lofit_heads.json").read_text())
        assert sum(map(len, heads.values())) == 3 and outcome.trainable == 3 * 32
        config = json.loads((outcome.folder / "adapter_config.json").read_text())
        assert (config["component"], config["heads"], told(outcome)["heads"]) == ("v", heads, heads)

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", [1, 2])
    def test_goes_on_in_either(self, tune, monkeypatch, stage):
        whole = tune("whole", **self.OPTIONS)
        train, count = training.Trainer.train, []

        def interrupted(self, **kwargs):
            count.append(1)
            if len(count) == stage:
                self.args.max_steps = 1
                train(self, **kwargs)
                raise KeyboardInterrupt
            return train(self, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(training.Trainer, "train", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tune("parts", **self.OPTIONS, lr_scheduler_type="constant")
        again = tune("parts", **self.OPTIONS, lr_scheduler_type="constant", resume_from_checkpoint="true")
        other = tune("constant", **self.OPTIONS, lr_scheduler_type="constant")
        assert told(again)["heads"] == told(other)["heads"] and again.history[-1]["step"] == 2
        assert same_weights(again.folder, other.folder) and not same_weights(again.folder, whole.folder)

    @pytest.mark.slow
    def test_one_stage(self, tune):
        outcome = tune(tuner="lofit:component=both,l1_lambda=0.001", max_steps=1)
        assert outcome.trainable == 2 * 2 * 192 and not (outcome.folder / "lofit_heads.json").exists()


class TestTuners:
    def test_settings(self):
        tuning = tuners.parse("lora:r=16, lora_alpha=32,lora_dropout=0.1,use_rslora=true,target_modules=q_proj/v_proj")
        assert tuning.settings == {
            "r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]
        }  # fmt: skip
        assert tuners.parse(str(tuning)) == tuning
        assert str(tuners.parse("lora")) == "lora" and set(tuners.known()) == {"lora", *TUNERS, "full"}

    @pytest.mark.parametrize(
        "spec, message",
        [
            ("lroa", r"unknown tuner 'lroa' \(did you mean lora\?\); there are lora, ademvl,"),
            ("lora:rank=8", "lora has no setting 'rank'"),
            ("lora:lora_alfa=8", r"did you mean lora_alpha\?"),
            ("lora:r", "settings as name=value, got 'r'"),
            ("lora:r=eight", "lora: r=eight: it must be a int, such as 8"),
            ("lora:use_rslora=1", "must be a bool"),
            ("lora:r=8,r=4", "r is named twice"),
            ("full:r=8", "full has no setting 'r'; there are tower"),
            ("lofit:component=x", "choose 'A', 'v' or 'both'"),
            ("lofit:heads=x", "two stages.* has no setting 'heads'"),
            ("lofit:k=0", "k must be a number above 0"),
            ("lora:peft_type=X", "has no setting 'peft_type'"),
        ],
    )
    def test_wrong(self, spec, message):
        with pytest.raises(ValueError, match=message):
            tuners.parse(spec)

    @pytest.mark.parametrize("name", every_family())
    def test_projections_of_every_family(self, fresh, name):
        """All linear modules of the decoder's layers, and nothing of the tower."""
        model = fresh(name).model
        tuned = tuners.apply(tuners.parse("lora:r=2"), model)
        adapted = {n.partition(".lora_A")[0] for n, _ in tuned.named_parameters() if ".lora_A." in n}
        decoder = {id(module) for layer in model.get_decoder().layers for module in layer.modules()}
        linear = {n for n, m in tuned.named_modules() if n.endswith(".base_layer") and id(m) in decoder}
        assert adapted == {n.removesuffix(".base_layer") for n in linear} and adapted
        left = [
            m for layer in model.get_decoder().layers for n, m in layer.named_modules()
            if type(m) is torch.nn.Linear and not n.endswith(".base_layer") and "lora_" not in n
        ]  # fmt: skip
        assert not left

    @pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
    def test_named_projections(self, fresh, name):
        model = fresh(name).model
        tuned = tuners.apply(tuners.parse("lora:r=2,target_modules=q_proj"), model)
        places = {n.partition(".lora_A")[0] for n, _ in tuned.named_parameters() if ".lora_A." in n}
        assert len(places) == len(model.get_decoder().layers) and all(p.endswith("self_attn.q_proj") for p in places)
        with pytest.raises(ValueError, match=r"no projection 'qproj' \(did you mean q_proj\?\)"):
            tuners.projections(fresh(name).model, ["qproj"])

    @pytest.mark.parametrize("name", every_family())
    def test_all_weights_but_the_towers(self, fresh, name):
        model = fresh(name).model
        learns = {id(p) for p in tuners.apply(tuners.parse("full"), model).parameters() if p.requires_grad}
        base = getattr(model, model.base_model_prefix)
        source = family_of(model).sources["image"]
        blocks = [p for block in family_of(model).block_modules(base, source) for p in block.parameters()]
        assert blocks and not any(id(p) in learns for p in blocks)
        assert all(id(p) in learns for p in model.get_decoder().parameters())
        assert all(p.requires_grad for p in tuners.apply(tuners.parse("full:tower=true"), model).parameters())


class TestWrong:
    """Wrong options stop before anything is loaded, in one line."""

    @pytest.fixture(autouse=True)
    def unloaded(self, monkeypatch):
        def fail(*args, **kwargs):
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(training, "load_model", fail)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"tuner": "lroa"}, "did you mean lora"),
            ({"method": "hipruned:keep=0.5"}, "hiprune"),
            ({"model": "testbed:lava"}, "unknown testbed model"),
            ({"model": "testbed:llava+adapter=x"}, "an adapter is tuned on a model without another one"),
            ({"data": "missing.jsonl"}, "there is no data file or folder"),
            ({"eval_data": "missing.jsonl"}, "there is no data file or folder"),
            ({"eval_tasks": "color"}, "did you mean colour"),
            ({"eval_steps": 2}, "nothing to evaluate"),
            ({"too_long": "cut"}, "there are raise, drop"),
            ({"max_length": 0}, "max_length must be 1 or more"),
            ({"dtype": "bf16"}, "did you mean bfloat16"),
            ({"resume_from_checkpoint": "true"}, "there is no checkpoint in"),
            ({"resume_from_checkpoint": "x/checkpoint-3"}, "no folder of a checkpoint"),
            ({"train_sampling_strategy": "group_by_length"}, "there are random and sequential"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(self, tune, changes, message):
        with pytest.raises((ValueError, OSError, NotImplementedError), match=message):
            tune(**changes)

    def test_records(self, tune, tmp_path):
        path = write_lines(tmp_path / "x.jsonl", [{"messages": [turn("user", "hello")]}])
        with pytest.raises(ValueError, match="x.jsonl line 1 has no assistant's turn"):
            tune(data=str(path))
        path.write_text("")
        with pytest.raises(ValueError, match="x.jsonl holds no record"):
            tune(data=str(path))

    def test_output_folder(self, tune, tmp_path):
        (tmp_path / "run").write_text("")
        with pytest.raises(NotADirectoryError, match="is a file"):
            tune()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "vlmfast_finetune.json").write_text("{")
        with pytest.raises(ValueError, match="is damaged"):
            tune("other")

    def test_one_process_of_two(self, tune, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ValueError, match="accelerate launch --cpu starts one process"):
            tune()


class TestCommand:
    def words(self, *more):
        return ["--model", "testbed:llava", "--data", "d.jsonl", "--output_dir", "o", *more]

    def test_options_of_both(self):
        arguments, options = parsed(self.words("--tuner", "lofit", "--max_steps", "7", "--eval_steps", "3"))
        assert (arguments.tuner, options.max_steps, options.eval_strategy.value) == ("lofit", 7, "steps")
        assert (options.remove_unused_columns, options.report_to) == (False, [])

    def test_from_a_file(self, tmp_path):
        values = {"model": "testbed:llava", "data": "d.jsonl", "output_dir": "o", "max_steps": 7}
        (tmp_path / "run.json").write_text(json.dumps(values))
        arguments, options = parsed([str(tmp_path / "run.json")])
        assert (arguments.data, options.max_steps) == ("d.jsonl", 7)
        (tmp_path / "run.json").write_text(json.dumps(values | {"max_step": 1}))
        with pytest.raises(ValueError, match=r"unknown option 'max_step' \(did you mean max_steps\?\)"):
            parsed([str(tmp_path / "run.json")])

    @pytest.mark.parametrize(
        "more, message",
        [
            (["--max_step", "3"], "unknown option --max_step (did you mean --max_steps?)"),
            (["--max_steps", "three"], "invalid int value: 'three'"),
            (["--output_dir", ""], "--output_dir is missing"),
            (["--load_best_model_at_end", "true"], "requires the save and eval strategy to match"),
            (["--data", "missing.jsonl"], "there is no data file or folder missing.jsonl"),
        ],
    )
    def test_one_line(self, capsys, monkeypatch, more, message):
        monkeypatch.setattr(sys, "argv", ["finetune.py", *self.words(*more)])
        assert script.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vlmfast: ") and message in line

    def test_interrupted(self, capsys, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(command, "run", interrupt)
        assert script.main() == 130
        (line,) = capsys.readouterr().err.splitlines()
        assert "--resume_from_checkpoint auto goes on" in line

    def test_missing_options(self):
        with pytest.raises(ValueError, match="required: --model, --data"):
            parsed([])

    def test_without_peft(self, tmp_path):
        code = (
            "import sys, importlib.util as u; find = u.find_spec; "
            "u.find_spec = lambda name, *a: None if name == 'peft' else find(name, *a); "
            f"sys.argv = {['finetune.py', *self.words()]!r}; sys.path.insert(0, {str(ROOT / 'scripts')!r}); "
            "import finetune; sys.exit(finetune.main())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (
            2, "vlmfast: fine-tuning needs peft: pip install 'vlmfast[train]'\n"
        )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(models, data, tmp_path_factory):
    options = Training(output_dir=str(tmp_path_factory.mktemp("tuned") / "lora"), max_steps=2, disable_tqdm=True,
                       per_device_train_batch_size=2, save_strategy="no", learning_rate=0.05)  # fmt: skip
    return finetune(Arguments(model=str(models / "llava"), data=str(data)), options).folder


class TestAdapters:
    """`--adapter` of eval and run."""

    def call(self, *words):
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    @pytest.mark.slow
    def test_eval(self, models, tuned, tmp_path):
        words = ["eval", "--model", models / "llava", "--task", "colour", "--limit", 2, "--method", "none", "--out"]
        assert self.call(*words, tmp_path).exit_code == 0
        assert self.call(*words, tmp_path, "--adapter", tuned).exit_code == 0
        plain, adapted = sorted(load_results(tmp_path), key=lambda result: len(result.model))
        assert adapted.model == f"{models / 'llava'}+adapter={tuned}" and plain.model_hash != adapted.model_hash
        answers = [p.read_text().split("\n", 1)[1] for p in sorted(tmp_path.glob("*--none.jsonl"))]
        assert len(answers) == 2 and answers[0] != answers[1]

    def test_hash(self, models, tuned):
        base = models / "llava"
        assert len({model_hash(base), model_hash(base, tuned)}) == 2

    @pytest.mark.slow
    def test_run(self, models, tuned, data, tmp_path):
        words = ["run", "--model", models / "llava", "--image", data.parent / "pictures" / "0.png", "--prompt", "what",
                 "--method", HALF, "--max-new-tokens", 2, "--repeats", 1, "--out", tmp_path / "o.png"]  # fmt: skip
        assert self.call(*words, "--adapter", tuned).exit_code == 0

    @pytest.mark.parametrize(
        "model, adapter, message",
        [
            (["llava", "qwen2_5_vl"], "tuned", "--adapter goes with one --model"),
            (["llava"], "nowhere", "there is no folder of an adapter"),
            (["llava"], "models", "is no PEFT adapter: it has no adapter_config.json"),
        ],
    )
    def test_wrong(self, models, tuned, tmp_path, model, adapter, message):
        folder = {"tuned": tuned, "nowhere": tmp_path / "x", "models": models}[adapter]
        names = [word for name in model for word in ("--model", models / name)]
        result = self.call("eval", *names, "--adapter", folder, "--out", tmp_path, "--limit", 1)
        assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr

    def test_other_weights(self, models, tuned):
        with pytest.raises(ValueError, match="was trained on .*llava, not on the weights of .*qwen2_5_vl"):
            load_model(f"{models / 'qwen2_5_vl'}+adapter={tuned}")
        model, _ = load_model(f"{models / 'llava'}+adapter={tuned}")
        assert any("lora_A" in name for name, _ in model.named_parameters())


TWO = """
import hashlib, os, sys
from pathlib import Path
from vlmfast.eval.finetune import finetune
from vlmfast.eval.finetune.command import parsed

outcome = finetune(*parsed(sys.argv[2:]))
learnt = [p.detach().numpy().tobytes() for p in outcome.model.parameters() if p.requires_grad]
assert learnt
lines = [hashlib.sha256(b"".join(learnt)).hexdigest(), repr(outcome.metrics.get("eval_colour_accuracy"))]
Path(sys.argv[1] + os.environ.get("RANK", "0")).write_text(" ".join(lines))
"""


@pytest.mark.slow
def test_two_processes(models, data, tmp_path):
    """Both end with the same weights and scores; they are those of one process with batches of twice the size."""
    (tmp_path / "two.py").write_text(TWO)
    folder = Path(sys.executable).parent
    common = f"--model {models / 'qwen2_5_vl'} --data {data} --tuner lora:r=4 --method {HALF} --max_steps 3 "
    common += "--learning_rate 0.01 --eval_tasks colour --eval_limit 1 --eval_steps 2 --disable_tqdm true"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = f"{folder / 'accelerate'} launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    launch += "--dynamo_backend no --main_process_port 29731"
    for name, start, batch in (("two", launch, 1), ("one", sys.executable, 2)):
        words = f"{start} {tmp_path / 'two.py'} {tmp_path / name} {common} --output_dir {tmp_path / f'{name}-run'} "
        words += f"--per_device_train_batch_size {batch}"
        done = subprocess.run(shlex.split(words), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (tmp_path / "two0").read_text(), (tmp_path / "two1").read_text()
    assert first == second and first.split()[1] != "None"
    assert json.loads((tmp_path / "two-run" / "vlmfast_finetune.json").read_text())["processes"] == 2
    one, two = (load_file(tmp_path / f"{name}-run" / WEIGHTS) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)

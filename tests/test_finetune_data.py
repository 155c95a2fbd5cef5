"""Conversations read in every form, every wrong record named, and labels that are the answers alone."""

import functools
import io
import json
import pickle

import datasets
import pytest
import torch
from chat_data import (
    CHANGING_TEMPLATE,
    CHATML_TEMPLATE,
    LLAVA_TEMPLATE,
    bpe_processor,
    gemma_processor,
    picture,
    tile_processor,
    turn,
    write_lines,
)
from PIL import Image
from test_cli import any_resolution
from transformers.utils.chat_template_utils import render_jinja_template

from vlmfast.eval.finetune.collate import IGNORED, Collator, answers, fitting
from vlmfast.eval.finetune.data import Sample, load_samples
from vlmfast.eval.testbed.build import new_processor
from vlmfast.processors import load_processor

ONE = [turn("user", None, "what is red ?"), turn("assistant", "the cup")]
MANY = [
    turn("system", "count"), turn("user", "hello"), turn("assistant", "yes"),
    turn("user", None, "is there a cup ?", None, "or a dog"), turn("assistant", "no ball"),
]  # fmt: skip
TEXT = [turn("user", "what is red ?"), turn("assistant", "red")]
LLAVA = [{"from": "human", "value": "<image>\nwhat is red ?"}, {"from": "gpt", "value": "the cup"}]
SAMPLES = [
    Sample("one", ONE, (picture(90, 150, 0),)),
    Sample("many", MANY, (picture(60, 200, 1), picture(200, 60, 2))),
    Sample("text", TEXT, ()),
]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def stored(seed):
    """A picture as `datasets` keeps it."""
    return {"bytes": png(picture(seed=seed)), "path": None}


@pytest.fixture
def files(tmp_path):
    """A folder with two pictures in it."""
    (tmp_path / "in").mkdir()
    for name, seed in (("a.png", 0), ("in/b.png", 1)):
        picture(seed=seed).save(tmp_path / name)
    return tmp_path


def same(sample, messages, *images):
    assert sample.messages == messages
    found = sample.pictures()
    assert [(one.size, one.tobytes()) for one in found] == [(one.size, one.tobytes()) for one in images]


class TestForms:
    def test_json_lines(self, files):
        records = [
            {"messages": ONE, "images": ["a.png"], "id": 7},
            {"messages": MANY, "images": ["in/b.png", str(files / "a.png")]},
            {"messages": TEXT},
            {"conversations": LLAVA, "image": "in/b.png"},
            {"messages": [{"role": "user", "content": "what is red ? <image> say"}, turn("assistant", "the cup")],
             "images": "a.png"},
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, "what"]},
                          {"role": "assistant", "content": "the cup"}]},
        ]  # fmt: skip
        path = write_lines(files / "train.jsonl", records)
        path.write_text("\n" + path.read_text() + "\n")
        samples = load_samples(path)
        one, many, text, llava, plain, inline = samples
        a, b = picture(seed=0), picture(seed=1)
        same(one, ONE, a)
        same(many, MANY, b, a)
        same(text, TEXT)
        same(llava, ONE, b)
        same(plain, [turn("user", "what is red ?", None, "say"), turn("assistant", "the cup")], a)
        same(inline, [turn("user", None, "what"), turn("assistant", "the cup")], a)
        assert (len(samples), one.where) == (6, "train.jsonl line 2")
        assert samples.only([3, 1])[0].where == samples[3:][0].where == "train.jsonl line 5"
        assert len(samples.check()) == 16

    def test_json(self, files):
        (files / "train.json").write_text(json.dumps([{"conversations": LLAVA, "image": "b.png"}]))
        (sample,) = load_samples(files / "train.json", image_folder=files / "in")
        same(sample, ONE, picture(seed=1))
        assert sample.where == "train.json record 1"

    def test_folder_of_images(self, files):
        write_lines(files / "metadata.jsonl", [{"file_name": "a.png", "messages": ONE},
                                               {"file_names": ["a.png", "in/b.png"], "messages": MANY}])  # fmt: skip
        one, many = load_samples(files)
        same(one, ONE, picture(seed=0))
        same(many, MANY, picture(seed=0), picture(seed=1))

    @pytest.mark.parametrize("kind", ["paths", "bytes", "images"])
    def test_parquet(self, files, kind):
        values = {
            "paths": [["a.png"], ["a.png", "in/b.png"], []],
            "bytes": [[png(picture(seed=0))], [png(picture(seed=0)), png(picture(seed=1))], []],
            "images": [[stored(0)], [stored(0), stored(1)], []],
        }[kind]
        rows = [{"messages": m, "images": v} for m, v in zip((ONE, MANY, TEXT), values)]
        table = datasets.Dataset.from_list([{"messages": row["messages"]} for row in rows])
        feature = {"paths": datasets.Value("string"), "bytes": datasets.Value("binary"), "images": datasets.Image()}
        table = table.add_column("images", values, feature=datasets.List(feature[kind]))
        table.to_parquet(files / "train.parquet")
        for source in (files / "train.parquet", files):
            one, many, text = load_samples(source)
            same(one, ONE, picture(seed=0))
            same(many, MANY, picture(seed=0), picture(seed=1))
            same(text, TEXT)

    def test_hub(self, monkeypatch):
        asked = []
        table = datasets.Dataset.from_list([{"messages": ONE}]).add_column(
            "image", [stored(1)], feature=datasets.Image()
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
        (sample,) = load_samples("me/cups", split="validation", config="small")
        same(sample, ONE, picture(seed=1))
        assert asked == [(("me/cups", "small"), {"split": "validation"})]
        assert sample.where == "me/cups record 1"

    def test_pictures_as_the_camera_says(self, files):
        turned = Image.new("RGB", (40, 20))
        exif = turned.getexif()
        exif[0x0112] = 6  # to be turned by a quarter
        turned.save(files / "turned.jpg", exif=exif)
        path = write_lines(files / "train.jsonl", [{"messages": ONE, "images": ["turned.jpg"]}])
        assert load_samples(path)[0].pictures()[0].size == (20, 40)

    def test_hash(self, files):
        def hashed(record):
            return load_samples(write_lines(files / "x.jsonl", [record])).check()

        first = hashed({"messages": ONE, "images": ["a.png"]})
        assert first == hashed({"messages": ONE, "images": ["./a.png"], "id": 3})
        assert first == hashed({"conversations": LLAVA, "image": "a.png"})
        assert first != hashed({"messages": ONE, "images": ["in/b.png"]})
        assert first != hashed({"messages": [ONE[0], turn("assistant", "a cup")], "images": ["a.png"]})


WRONG = {
    "no object": (["a"], "is a list, not a record"),
    "no messages": ({"prompt": "x", "answer": "y"}, r"has no messages \(it has prompt, answer\)"),
    "no list": ({"messages": "hello"}, "no list of turns"),
    "no turns": ({"messages": []}, "no list of turns"),
    "turn is text": ({"messages": ["hello"]}, "turn 1 is a str"),
    "role": ({"messages": [turn("usr", "hello"), ONE[1]]}, "turn 1: its role is 'usr'"),
    "content": ({"messages": [{"role": "user", "content": 3}, ONE[1]]}, "turn 1: its content is a int"),
    "empty": ({"messages": [{"role": "user", "content": ""}, ONE[1]]}, "turn 1 is empty"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ONE[1]]}, "a part of type 'video'"),
    "text part": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ONE[1]]}, "without a text"),
    "no answer": ({"messages": [turn("user", "hello")]}, "has no assistant's turn"),
    "ends": ({"messages": [*TEXT, turn("user", "and ?")]}, "ends with a turn of the user"),
    "empty answer": ({"messages": [turn("user", "hi"), turn("assistant", " ")]}, "turn 2: the answer is empty"),
    "shows": ({"messages": [turn("user", "hi"), turn("assistant", None)], "images": ["a.png"]}, "is text alone"),
    "too few": ({"messages": MANY, "images": ["a.png"]}, r"has 1 image\(s\), but its messages have 2 place"),
    "too many": ({"messages": ONE, "images": ["a.png", "a.png"]}, r"has 2 image\(s\), but its messages have 1 place"),
    "no place": ({"messages": TEXT, "image": "a.png"}, r"has 1 image\(s\), but its messages have 0 place"),
    "both": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ONE[1]],
              "images": ["a.png"]}, "one or the other"),
    "kind": ({"messages": ONE, "images": [3]}, "an image is a int"),
    "address": ({"messages": ONE, "images": ["https://x/a.png"]}, "is an address"),
}  # fmt: skip


class TestErrors:
    @pytest.mark.parametrize("record, message", WRONG.values(), ids=WRONG)
    def test_record_and_reason(self, files, record, message):
        path = write_lines(files / "train.jsonl", [{"messages": ONE, "images": ["a.png"]}, record])
        with pytest.raises(ValueError, match=f"train.jsonl line 2.*{message}"):
            load_samples(path).check()

    def test_missing_image(self, files):
        path = write_lines(files / "train.jsonl", [{"messages": ONE, "images": ["c.png"]}])
        with pytest.raises(FileNotFoundError, match=r"train.jsonl line 1: there is no image file .*c\.png"):
            load_samples(path).check()

    def test_no_image(self, files):
        (files / "c.png").write_text("no picture")
        path = write_lines(files / "train.jsonl", [{"messages": ONE, "images": ["c.png"]}])
        with pytest.raises(ValueError, match=r"line 1: .*c\.png cannot be read as an image: unknown format"):
            load_samples(path)[0].pictures()

    def test_no_json(self, files):
        path = write_lines(files / "train.jsonl", [{"messages": ONE, "images": ["a.png"]}])
        path.write_text(path.read_text() + "\n{oops\n")
        with pytest.raises(ValueError, match="train.jsonl line 3 is no JSON"):
            load_samples(path).check()

    def test_no_text(self, files):
        (files / "train.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="is no text in UTF-8"):
            load_samples(files / "train.jsonl")

    def test_empty(self, files):
        (files / "train.jsonl").write_text("\n")
        with pytest.raises(ValueError, match=r"train.jsonl holds no record; a record looks like \{"):
            load_samples(files / "train.jsonl").check()

    @pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/c", "missing.parquet"])
    def test_no_file(self, name):
        with pytest.raises(FileNotFoundError, match="there is no data file or folder"):
            load_samples(name)

    def test_other_files(self, files):
        with pytest.raises(ValueError, match="data is a file .jsonl, .json or .parquet"):
            load_samples(files / "a.png")
        with pytest.raises(ValueError, match="has no metadata.jsonl"):
            load_samples(files / "in")
        (files / "x.parquet").write_text("no parquet")
        with pytest.raises(ValueError, match="x.parquet cannot be read as parquet"):
            load_samples(files / "x.parquet")
        with pytest.raises(FileNotFoundError, match="no folder of images nowhere"):
            load_samples(files, image_folder="nowhere")

    def test_hub(self, monkeypatch):
        def fail(*args, **kwargs):
            raise RuntimeError("no connection\nmore")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(
            OSError,
            match="cups is neither a file, a folder nor a data set of the hub with split=.train.: no connection$",
        ):
            load_samples("cups")


@functools.cache
def processor(name):
    if name == "llava_next":
        raise AssertionError("made by its fixture")
    return bpe_processor(name) if "{%" in name else new_processor(name)


@pytest.fixture(params=["llava", "qwen2_5_vl", "llava_next"])
def known(request, tmp_path_factory):
    """Processors of the testbed's tokenizer: CLIP, patches in one sequence, crops."""
    if request.param != "llava_next":
        return processor(request.param)
    return load_processor(any_resolution(tmp_path_factory.mktemp("next")))


class TestLabels:
    def test_answers_alone(self, known):
        """Against prompts as `generate` gets them: answers are what stands behind the prompts, up to the end token."""
        batch = Collator(known)(SAMPLES)
        length = batch["input_ids"].shape[1]
        assert batch["labels"].shape == batch["attention_mask"].shape == (3, length)
        for row, sample in enumerate(SAMPLES):
            expected = torch.full((length,), IGNORED)
            whole = prompt_ids(known, sample, len(sample.messages), False)
            for number, message in enumerate(sample.messages):
                if message["role"] == "assistant":
                    start = len(prompt_ids(known, sample, number, True))
                    stop = len(prompt_ids(known, sample, number + 1, False))
                    assert whole[stop - 1] == known.tokenizer.eos_token_id
                    expected[start:stop] = whole[start:stop]
            assert batch["labels"][row].equal(expected)
            assert batch["input_ids"][row, : len(whole)].equal(whole)
            assert batch["attention_mask"][row].tolist() == [1] * len(whole) + [0] * (length - len(whole))

    def test_all_else_is_the_processors(self, known):
        """Pictures of different size in one batch, exactly as the processor packs them."""
        collator = Collator(known)
        batch = collator(SAMPLES)
        own = known(
            text=[collator.rendered(sample)[0] for sample in SAMPLES],
            images=[sample.pictures() for sample in SAMPLES],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        assert set(batch) == {*own, "labels"}
        assert all(batch[name].equal(own[name]) and batch[name].dtype == own[name].dtype for name in own)
        assert set(collator(SAMPLES[2:])) == {*own, "labels"} - {"pixel_values", "image_grid_thw", "image_sizes"}

    def test_marks_of_the_template(self):
        """LLaVA-1.5: marked answers; no end of turn, so that the last answer gets the end token."""
        known = processor(LLAVA_TEMPLATE)
        batch = Collator(known)(SAMPLES)
        said = spans(known, batch)
        assert said == [[" the cup</s>"], [" yes", " no ball</s>"], [" red</s>"]]
        prompt = known.apply_chat_template(ONE[:1], add_generation_prompt=True)
        ids = known(text=[prompt], images=[SAMPLES[0].pictures()], return_tensors="pt")["input_ids"][0]
        assert batch["input_ids"][0, : len(ids)].equal(ids)
        assert batch["labels"][0].ne(IGNORED).nonzero()[0] == len(ids)

    def test_end_of_turn_without_the_new_line(self):
        known = processor(CHATML_TEMPLATE)
        said = spans(known, Collator(known)(SAMPLES))
        assert said == [["the cup<|im_end|>"], ["yes<|im_end|>", "no ball<|im_end|>"], ["red<|im_end|>"]]

    @pytest.mark.parametrize("kind", ["gemma3", "idefics3"])
    def test_other_placeholders(self, kind):
        """Families whose pictures begin and end with tokens of their own, or come in tiles."""
        known, end = (
            (gemma_processor(), "<|im_end|>") if kind == "gemma3" else (tile_processor(), "<end_of_utterance>")
        )
        batch = Collator(known)(SAMPLES)
        assert spans(known, batch) == [[f"the cup{end}"], [f"yes{end}", f"no ball{end}"], [f"red{end}"]]
        assert len(batch["pixel_values"]) == 3

    def test_answer_that_is_also_asked(self):
        """What an answer is does not depend on its words: the question has them, too."""
        known = processor(CHATML_TEMPLATE)
        messages = [
            turn("user", "cup cup"),
            turn("assistant", "cup"),
            turn("user", "cup"),
            turn("assistant", "cup cup"),
        ]
        rendered, found = answers(known, messages)
        assert [rendered[start:end] for start, end in found] == ["cup<|im_end|>", "cup cup<|im_end|>"]
        assert found[0][0] == rendered.index("assistant\n") + len("assistant\n")

    def test_template_that_changes_its_mind(self):
        known = processor(CHANGING_TEMPLATE)
        assert spans(known, Collator(known)(SAMPLES[:1])) == [["the cup<|im_end|>"]]
        with pytest.raises(ValueError, match="many: the chat template renders turn 3 in another way"):
            Collator(known)(SAMPLES)

    def test_placeholder_in_a_text(self):
        known = processor("llava")
        sample = Sample("train.jsonl line 4", [turn("user", "what is <image> ?"), turn("assistant", "red")], ())
        with pytest.raises(ValueError, match=r"train.jsonl line 4: 1 placeholder\(s\) <image> .* for 0 image"):
            Collator(known)([sample])

    def test_no_template(self):
        plain = bpe_processor("")
        plain.chat_template = None
        with pytest.raises(ValueError, match="no chat template"):
            Collator(plain)

    def test_worker_processes(self):
        known = processor("llava")
        batch = pickle.loads(pickle.dumps(Collator(known)))(SAMPLES)
        assert all(value.equal(batch[name]) for name, value in Collator(known)(SAMPLES).items())


def prompt_ids(known, sample, turns, prompt):
    """A conversation up to a turn as `generate` would get it."""
    messages = sample.messages[:turns]
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    (text,), _ = render_jinja_template([messages], chat_template=known.chat_template, add_generation_prompt=prompt)
    images = sample.pictures()[:shown]
    return known(text=[text], images=[images] if images else None, return_tensors="pt")["input_ids"][0]


def spans(known, batch):
    """The text of each run of labels, row by row."""
    rows = []
    for labels in batch["labels"].tolist():
        row, run = [], []
        for label in [*labels, IGNORED]:
            if label != IGNORED:
                run.append(label)
            elif run:
                row.append(known.tokenizer.decode(run))
                run = []
        rows.append(row)
    return rows


class TestLength:
    @pytest.fixture
    def samples(self, files):
        records = [{"messages": m, "images": i} for m, i in ((TEXT, []), (ONE, ["a.png"]), (MANY, ["a.png", "a.png"]))]
        return load_samples(write_lines(files / "train.jsonl", records))

    def test_lengths(self, samples):
        collator = Collator(processor("llava"))
        assert [collator.length(s) for s in samples] == [len(collator([s])["input_ids"][0]) for s in samples]

    def test_raise(self, samples):
        collator = Collator(processor("llava"))
        length = collator.length(samples[1])
        assert fitting(samples, collator, collator.length(samples[2]), "raise") == (samples, [])
        with pytest.raises(ValueError, match=f"1 of 3 records .* max_length={length} tokens: train.jsonl line 3"):
            fitting(samples, collator, length, "raise")

    def test_drop(self, samples):
        collator = Collator(processor("llava"))
        length = collator.length(samples[1])
        kept, dropped = fitting(samples, collator, length - 1, "drop")
        assert [one.where for one in kept] == ["train.jsonl line 1"]
        assert dropped == [f"train.jsonl line 2 ({length})", f"train.jsonl line 3 ({collator.length(samples[2])})"]
        with pytest.raises(ValueError, match="all 3 records of train.jsonl are longer than max_length=3"):
            fitting(samples, collator, 3, "drop")

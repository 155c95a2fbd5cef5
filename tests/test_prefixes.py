"""Questions about one picture share the prefill of what their prompts have in common: the answers are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORE, crossed, lend, some_families
from test_eval import TASKS_HERE, answers, finished, folders, quick, run, same  # noqa: F401  fixtures among them
from test_promises import spec
from tiny import IMAGE, Vlm
from torch import Tensor

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, support
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.eval import sweep
from vlmfast.eval.prefixes import divide, prefilled, shareable
from vlmfast.eval.prompts import Prompts, Row

# Questions of unequal length, about pictures that may differ in size; c is asked about once.
ASKED = [("a", [5, 6, 7, 8]), ("b", [9, 9]), ("a", [5, 6, 30]), ("c", [31, 32, 5]), ("b", [9, 8, 8, 40, 41])]


class Prepared:
    """A tiny model's prompts about encoded pictures, whole and in parts. before: text tokens in front of a picture."""

    def __init__(self, vlm: Vlm, text: str, before: int = 3) -> None:
        self.vlm, self.text = vlm, text
        self.prompts = Prompts.__new__(Prompts)
        self.prompts.pad = 0
        self.letters = [letter for letter, _ in ASKED]
        pictures = {letter: vlm.tiny.collect([[vlm.picture(letter)]]) for letter in self.letters}
        self.visual = {name: encode_images(vlm.model, from_spec(text), **one)[0] for name, one in pictures.items()}
        self.others = {name: {k: v for k, v in one.items() if "grid" in k} for name, one in pictures.items()}
        self.rows = [self.row(letter, question, before) for letter, question in ASKED]

    def row(self, letter: str, question: Sequence[int], before: int) -> Row:
        inputs = self.vlm.prompts([[before, letter, len(question)]])
        row = {name: value[0].clone() for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
        row["input_ids"][-len(question) :] = torch.tensor(question)
        return row

    def inputs(self, rows: Sequence[Row], letters: Sequence[str]) -> dict[str, Any]:
        others = {name: torch.cat([self.others[one][name] for one in letters]) for name in self.others["a"]}
        outputs = encoder_outputs([self.visual[letter] for letter in letters])
        return {**self.prompts.batch(rows), **others, "mm_encoder_outputs": outputs}

    def told(self, inputs: dict[str, Any], of: Sequence[int]) -> tuple[Tensor, Tensor, list[list[int]]]:
        """What is generated, its logits, and the tokens kept of each prompt's picture."""
        how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        out = self.vlm.model.generate(**inputs, **how)
        kept = self.vlm.model.vlmfast_handle.report().kept
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        return new, torch.stack(out.logits), [kept[prompt].tolist() for prompt in of] if kept else []

    def check(self) -> None:
        """In parts as whole."""
        with vlmfast.patch(self.vlm.model, self.text) as handle, torch.no_grad():
            assert shareable(self.vlm.model, handle.adapters, 1)
            tokens, logits, kept = self.told(self.inputs(self.rows, self.letters), range(len(self.rows)))
            divided = divide(self.rows, [ord(letter) for letter in self.letters], [IMAGE])
            assert divided is not None and divided.of == [0, 1, 0, 2, 1] and divided.first == [0, 1, 3]
            beginnings = self.inputs(divided.beginnings, [self.letters[row] for row in divided.first])
            inputs = prefilled(self.vlm.model, beginnings, self.prompts.batch(divided.rests), divided.of)
            assert inputs["past_key_values"].get_seq_length() < inputs["input_ids"].shape[1]
            again = self.told(inputs, divided.of)
        assert torch.equal(again[0], tokens) and again[2] == kept
        torch.testing.assert_close(again[1], logits, atol=5e-5, rtol=0)


@pytest.fixture
def lent(request: pytest.FixtureRequest) -> Any:
    yield from lend(request.getfixturevalue("family"))


@pytest.mark.parametrize(
    ("family", "text"),
    crossed(["qwen2_5_vl", "llava", "qwen3_vl"], ["none", "random:keep=0.4", "grid:keep=0.4,positions=compact"]),
)
@pytest.mark.parametrize("before", [3, 0])
def test_in_parts_as_whole(lent: Vlm, family: str, text: str, before: int) -> None:
    Prepared(lent, text, before).check()


@pytest.mark.parametrize("family", ["llava_onevision", *some_families("mistral3", "internvl", "qwen2_vl", "vipllava")])
def test_in_parts_on_other_families(lent: Vlm, family: str) -> None:
    """The first: beginnings of unequal length whose positions have one axis."""
    Prepared(lent, "random:keep=0.4").check()


IN_PARTS = [
    name
    for name, cls in ADAPTERS.items()
    if cls().prefills_in_parts and all(support(name, family).reason is None for family in CORE)
]


@pytest.mark.parametrize(("family", "name"), crossed(CORE, IN_PARTS))
def test_methods_that_prefill_in_parts(lent: Vlm, family: str, name: str) -> None:
    Prepared(lent, spec(name, family)).check()


def test_what_reads_the_question_does_not() -> None:
    assert {"hiprune", "visionzip", "random", "eemllm"} <= set(IN_PARTS)
    others = ("cdpruner", "slime", "fastv", "sparsevlm", "var", "pai", "vhr", "vcd", "dola", "vista", "opera")
    assert not {*others} & set(IN_PARTS)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "paligemma", "llava_next"])
def test_families_that_do_not(lent: Vlm, family: str) -> None:
    """One state of all tokens, pictures that see what follows, and a sliding window."""
    assert not shareable(lent.model, (), 1)


def test_settings_of_generate_that_do_not(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shareable(vlm.model, (), 2)
    for name, value in (("cache_implementation", "static"), ("use_cache", False), ("prefill_chunk_size", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(vlm.model.generation_config, name, value)
            assert not shareable(vlm.model, (), 1)
    assert shareable(vlm.model, (), 1)


def rows(*ids: Sequence[int]) -> list[Row]:
    return [{"input_ids": torch.tensor(one), "types": torch.arange(len(one))} for one in ids]


def test_where_prompts_are_divided() -> None:
    """Behind the picture, 90 90; text that all questions of each picture share stays with it, but for the last."""
    divided = divide(rows([1, 90, 90, 2, 3], [1, 90, 90, 2, 4], [1, 90, 90, 90, 7, 8, 9]), [5, 5, 6], [90])
    assert divided is not None
    assert [one["input_ids"].tolist() for one in divided.beginnings] == [[1, 90, 90, 2], [1, 90, 90, 90, 7]]
    assert [one["input_ids"].tolist() for one in divided.rests] == [[3], [4], [8, 9]]
    assert [one["types"].tolist() for one in divided.rests] == [[4], [4], [5, 6]]
    same_question = divide(rows([90, 2, 3], [90, 2, 3]), [5, 5], [90])
    assert same_question is not None and [len(one["input_ids"]) for one in same_question.rests] == [1, 1]
    assert divide(rows([90, 2], [90, 90, 2]), [5, 6], [90]) is None  # nothing is asked about twice
    assert divide(rows([2, 90, 4], [3, 90, 4]), [5, 5], [90]) is None  # the question comes before its picture
    assert divide(rows([2, 90], [2, 90]), [5, 5], [90]) is None  # nothing is left


@pytest.mark.parametrize("name", CORE)
def test_a_sweep_with_and_without(
    folders: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Records and results agree; a method that reads the question is left out."""
    asked: list[tuple[int, int]] = []

    def noting(model: Any, beginnings: Any, rests: Any, of: Sequence[int]) -> Any:
        asked.append((len(of), len(beginnings["input_ids"])))
        return prefilled(model, beginnings, rests, of)

    monkeypatch.setattr(sweep, "prefilled", noting)
    specs = {"specs": ["random:keep=0.3", "cdpruner:keep=0.3"], "keeps": [], "models": [name], "batch": 15}
    with_it = run(folders, tmp_path / "with", **specs)
    assert len(asked) >= 2 and all(1 < shared < questions for questions, shared in asked)
    assert sum(questions for questions, _ in asked) <= 2 * len(answers(with_it[0]))
    monkeypatch.setattr(sweep, "shareable", lambda *given: False)
    asked.clear()
    same(with_it, run(folders, tmp_path / "without", **specs))
    assert not asked


def test_answers_of_a_run_in_other_batches_are_gone_on_with(
    folders: Path,  # noqa: F811
    finished: list[Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an older version left it, which planned its batches otherwise: one that it did not finish."""
    identity, *lines = finished[0].with_suffix(".jsonl").read_text().splitlines()
    left = sorted(lines, key=lambda line: json.loads(line)["id"])[:-4]
    (tmp_path / finished[0].with_suffix(".jsonl").name).write_text("\n".join([identity, *left]) + "\n")
    answer, told = sweep.Sweep.answer, list[int]()
    monkeypatch.setattr(sweep.Sweep, "answer", lambda self, b, *r: told.append(len(b)) or answer(self, b, *r))
    same(run(folders, tmp_path, keeps=[1.0, 0.5]), finished)
    assert 4 <= sum(told) - 2 * len(lines) < len(lines)

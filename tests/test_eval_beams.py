"""Runs with beams: paired with plain beams of the same width, or, for methods that need them, with greedy search."""

import dataclasses
import json

import pytest
import test_eval
import torch
from test_eval import TASKS_HERE, answers, run
from test_report import made_up, store
from transformers import GenerationMixin

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec
from vlmfast.eval import sweep
from vlmfast.eval.models import load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.report import table
from vlmfast.eval.report.rows import arrange
from vlmfast.eval.results import load_results, read_result
from vlmfast.eval.tasks import TASKS, image

folders, quick = test_eval.folders, test_eval.quick


def expected(folder, spec, beams):
    """Answers of a plain `generate`, one question at a time."""
    model, processor = load_model(str(folder), device="cpu", dtype="float32")
    prompts, found = Prompts(processor, model.device, model.dtype), {}
    with vlmfast.patch(model, spec), torch.no_grad():
        for name in TASKS_HERE:
            for doc in TASKS[name].load(2, 0):
                inputs = prompts.full(TASKS[name].prompt(doc), image(doc))
                new = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=beams)
                text = processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                found[doc.id] = text.strip()
    return found


def told(path):
    return {record["id"]: record["answer"] for record in answers(path)}


def test_all_runs_of_a_folder_have_its_beams(folders, tmp_path):
    paths = run(folders, tmp_path, ["opera", "random:keep=0.5"], (), beams=3)
    for path, spec in zip(paths, ("none", "opera", "random:keep=0.5"), strict=True):
        assert told(path) == expected(folders / "llava", spec, 3)
        assert read_result(path).beams == 3 == json.loads(path.with_suffix(".jsonl").open().readline())["run"]["beams"]


def test_the_unpatched_model_searches_with_them(folders, tmp_path, monkeypatch):
    seen, search = [], GenerationMixin._beam_search

    def spied(self, input_ids, *args, **kwargs):
        seen.append(kwargs["generation_config"].num_beams)
        return search(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_beam_search", spied)
    run(folders, tmp_path / "greedy", [], ())
    assert not seen
    run(folders, tmp_path / "beams", [], (), beams=3)
    assert seen and set(seen) == {3}


def test_a_method_that_needs_beams_has_them_and_is_paired_with_greedy_search(folders, tmp_path):
    """Beside it, without its penalty: plain beams of its width, by a name of their own."""
    paths = run(folders, tmp_path, ["opera", "opera:alpha=0,threshold=inf"], ())
    for path, spec, beams in zip(paths, ("none", "opera", "none"), (1, 5, 5), strict=True):
        assert told(path) == expected(folders / "llava", spec, beams)
        assert read_result(path).beams == 1
    (section,) = arrange(load_results([tmp_path]))
    assert [row.label for row in section.rows] == ["unpatched", "opera", "plain beams"]
    assert section.rows[2].difference is not None


def test_beams_of_specs():
    assert sweep.beams_of(from_spec("none")) == sweep.beams_of(from_spec("vcd+hiprune:keep=0.5")) == 1
    assert sweep.beams_of(from_spec("hiprune:keep=0.5+opera")) == 5
    assert [name for name, cls in ADAPTERS.items() if cls.beams > 1] == ["opera"]


def test_other_beams_are_another_run(folders, tmp_path):
    run(folders, tmp_path, [], ())
    with pytest.raises(ValueError, match=r"beams 1 \(now 2\).*choose another folder"):
        run(folders, tmp_path, [], (), beams=2)
    with pytest.raises(ValueError, match="beams must be a whole number"):
        run(folders, tmp_path / "x", [], (), beams=0)


def test_files_of_before_there_were_beams_are_gone_on_with(folders, tmp_path, monkeypatch):
    (path,) = run(folders, tmp_path, [], ())
    result = json.loads(path.read_text())
    del result["beams"]
    path.write_text(json.dumps(result))
    log = path.with_suffix(".jsonl")
    first, *rest = log.read_text().splitlines()
    identity = json.loads(first)
    del identity["run"]["beams"]
    log.write_text("\n".join([json.dumps(identity), *rest]) + "\n")
    monkeypatch.setattr(sweep, "Sweep", None)  # nothing is run again
    assert run(folders, tmp_path, [], ()) == [path] and read_result(path).beams == 1
    with pytest.raises(ValueError, match=r"beams 1 \(now 4\)"):
        run(folders, tmp_path, [], (), beams=4)


@pytest.mark.parametrize(
    ("spec", "beams", "forwards", "rows"),
    [("none", 1, 1, 1), ("none", 3, 1, 3), ("opera", 1, 1, 25), ("opera:candidates=2", 3, 1, 6), ("vcd", 1, 1, 2)],
)
def test_latency_counts_forwards(folders, tmp_path, monkeypatch, spec, beams, forwards, rows):
    monkeypatch.undo()
    test_eval.hurry(monkeypatch)
    path = run(folders, tmp_path, [spec], (), tasks=["word"], limit=1, beams=beams)[-1]
    latency = read_result(path).latency
    assert (latency["forwards_per_token"], latency["rows_per_token"]) == (forwards, rows)
    assert latency["beams"] == (5 if spec == "opera" else beams)
    assert latency["decode_ms_per_token"]["median"] > 0 and latency["ttft_speedup"]["median"] > 0


def test_attention_of_a_spec_with_beams_is_that_of_its_edits(folders, tmp_path):
    paths = run(folders, tmp_path, ["zerotuning:gamma=2.0+opera", "zerotuning:gamma=2.0"], (), tasks=["word"])
    both, alone = (read_result(path).attention for path in paths[1:])
    assert both == alone and alone is not None


def test_greedy_and_beams_in_one_report(tmp_path):
    """Two sections: what is in one can be compared."""
    greedy = [made_up("m", "none"), opera_of(5)]
    store(tmp_path / "greedy", greedy)
    store(tmp_path / "beams", [dataclasses.replace(one, beams=5) for one in greedy])
    found = load_results([tmp_path / "greedy", tmp_path / "beams"])
    sections = arrange(found)
    assert [section.title for section in sections] == ["m (beams 1)", "m (beams 5)"]
    notes = [[line for line in table.notes(section) if "beams" in line] for section in sections]
    assert notes == [["opera: 5 beams; the unpatched model: 1."], []]


def opera_of(beams):
    result = made_up("m", "none")
    latency = result.latency | {"beams": beams}
    return dataclasses.replace(result, spec="opera", method="opera", keep=None, latency=latency)


def test_answers_without_what_samples_hold_are_asked_again(folders, tmp_path):
    """Which questions are samples may grow: an evaluation that was interrupted before that goes on."""
    (path,) = run(folders, tmp_path, [], ())
    before, log = test_eval.stable(path), path.with_suffix(".jsonl")
    first, *rest = [json.loads(line) for line in log.read_text().splitlines()]
    for record in rest:
        record.pop("indices", None)
        record.pop("grid", None)
    log.write_text("".join(json.dumps(line) + "\n" for line in (first, *rest)))
    path.unlink()
    assert run(folders, tmp_path, [], ()) == [path]
    assert test_eval.stable(path) == before

"""Door 2: tokens dropped between decoder layers, against a layer loop written by hand."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import tiny_others
import torch
from conftest import CORE, build, crossed, lend, shared
from test_promises import pictures, snapshot
from tiny import Tiny, make
from torch import Tensor
from transformers import CompileConfig

import vlmfast
import vlmfast.adapters
from vlmfast.adapters.pruning.dart import Dart
from vlmfast.adapters.pruning.fastv import FastV
from vlmfast.adapters.pruning.layered import LayerPruner
from vlmfast.adapters.pruning.lscenellm import LSceneLLM
from vlmfast.adapters.pruning.pyramiddrop import PyramidDrop
from vlmfast.adapters.pruning.sparsevlm import SparseVLM, rating, split
from vlmfast.families import family_of
from vlmfast.layers.prefill import merged
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.towers import Picture
from vlmfast.visual import VisualTokens, budget, top

ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "internvl", "mistral3", "llava_next", "smolvlm"]


@dataclass(frozen=True, kw_only=True)
class Staged(LayerPruner):
    """Shares of a picture's tokens by layer, scored by the last row of the layer before."""

    name = "staged"
    stages: ClassVar[dict[int, float]] = {}
    own: bool = False

    def layers(self, depth):
        return tuple(self.stages)

    def left(self, layer, total, depth):
        return budget(self.stages[layer], total)

    def asks(self, layer):
        return {"row": LayerScore(own=self.own)}

    def cut(self, tokens):
        return Cut(top(tokens.scores["row"], tokens.keep).sort().values)


def staged(stages: dict[int, float], **settings: Any) -> LayerPruner:
    return type("Now", (Staged,), {"stages": stages})(**settings)


@pytest.fixture(params=FAMILIES)
def family(request):
    yield from lend(request.param)


def logits_and_tokens(model: Any, inputs: dict[str, Tensor], steps: int = 4, **how: Any) -> tuple[Tensor, Tensor]:
    """Logits of every step and the tokens of a greedy continuation."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **how
    )
    return torch.stack(out.logits, 1), out.sequences[:, inputs["input_ids"].shape[1] :]


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass
class Captured:
    """What the decoder of the unpatched model is given for one prompt."""

    embeds: Tensor
    positions: Tensor
    deepstack: list[Tensor]
    calls: list[dict[str, Any]] = field(default_factory=list)


def capture(model: Any, inputs: dict[str, Tensor]) -> Captured:
    seen: list[dict[str, Any]] = []

    def look(module, args, kwargs):
        seen.append(kwargs)

    hook = model.model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**inputs)
    finally:
        hook.remove()
    kwargs = seen[0]
    length = kwargs["inputs_embeds"].shape[1]
    positions = kwargs.get("position_ids")
    positions = torch.arange(length)[None] if positions is None else positions
    return Captured(kwargs["inputs_embeds"], positions, list(kwargs.get("deepstack_visual_embeds") or ()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class Reference:
    """A decoder run layer by layer for one prompt without padding: own attention, own keys and values."""

    def __init__(self, vlm: Any, stages: dict[int, float], positions: str, own: bool = False) -> None:
        self.vlm, self.model, self.stages, self.compact, self.own = vlm, vlm.model, stages, positions == "compact", own
        self.decoder = self.model.model.get_decoder()
        self.config = self.decoder.config
        self.types = getattr(self.config, "layer_types", None) or ["full_attention"] * len(self.decoder.layers)

    def cos_sin(self, positions: Tensor, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        axes = positions[-3:] if positions.ndim == 3 else positions
        kind = (self.types[layer],) if self.vlm.name == "gemma3" else ()
        cos, sin = self.decoder.rotary_emb(like, axes, *kind)
        return cos[0], sin[0]

    def window(self, layer: int) -> float:
        return self.config.sliding_window if self.types[layer] == "sliding_attention" else math.inf

    def project(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.decoder.layers[layer].self_attn
        q, k, v = (getattr(module, f"{name}_proj")(x).unflatten(-1, (-1, module.head_dim)) for name in "qkv")
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        cos, sin = self.cos_sin(positions, layer, x)
        return rotate(q.transpose(0, 1), cos, sin), rotate(k.transpose(0, 1), cos, sin), v.transpose(0, 1)

    def map(self, layer: int, q: Tensor, k: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        """Attention [H, rows, columns]; rows and columns are places in the whole conversation."""
        k = k.repeat_interleave(len(q) // len(k), 0)
        visible = torch.tensor([[self.sees(layer, i, j) for j in columns] for i in rows])
        scores = q @ k.transpose(-1, -2) * self.decoder.layers[layer].self_attn.scaling
        return scores.masked_fill(~visible, -torch.inf).softmax(-1)

    def sees(self, layer: int, i: int, j: int) -> bool:
        near = i - j < self.window(layer)
        if self.vlm.name == "paligemma" and i < self.length and j < self.length:
            return True
        both_ways = self.vlm.name == "gemma3" and i in self.block and self.block.get(i) == self.block.get(j)
        return (j <= i or both_ways) and near

    def layer(self, number: int, hidden: Tensor, positions: Tensor, places: list[int]) -> Tensor:
        block = self.decoder.layers[number]
        q, k, v = self.project(number, block.input_layernorm(hidden), positions)
        keys, values, columns = self.kept.get(number, (k[:, :0], v[:, :0], []))
        keys, values, columns = torch.cat([keys, k], 1), torch.cat([values, v], 1), [*columns, *places]
        self.kept[number] = keys, values, columns
        weights = self.map(number, q, keys, places, columns)
        self.weights = weights
        mixed = (weights @ values.repeat_interleave(len(q) // len(keys), 0)).transpose(0, 1).flatten(1)
        mixed = block.self_attn.o_proj(mixed)
        if hasattr(block, "pre_feedforward_layernorm"):
            hidden = hidden + block.post_attention_layernorm(mixed)
            grown = block.mlp(block.pre_feedforward_layernorm(hidden))
            return hidden + block.post_feedforward_layernorm(grown)
        hidden = hidden + mixed
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    def run(self, inputs: dict[str, Tensor], steps: int = 4) -> tuple[Tensor, Tensor]:
        """Logits [steps, V] and tokens [steps] of a greedy continuation."""
        with torch.no_grad():
            return self._run(inputs, steps)

    def _run(self, inputs, steps):
        told = capture(self.model, inputs)
        ids = inputs["input_ids"][0].tolist()
        self.length = len(ids)
        pictures = self.places(inputs)
        self.block = {place: number for number, one in enumerate(pictures) for place in one["all"]}
        self.kept: dict[int, Any] = {}
        hidden, places, positions = told.embeds[0], list(range(len(ids))), told.positions
        left = [list(one["tokens"]) for one in pictures]
        newlines = [list(one["all"] - set(one["tokens"])) for one in pictures]
        self.shifts, shift = {}, 0
        for number in range(len(self.decoder.layers)):
            if number in self.stages:
                row = self.row(number, hidden, positions, places)
                before = list(places)
                for k, one in enumerate(pictures):
                    keep = budget(self.stages[number], len(one["tokens"]))
                    if keep >= len(left[k]):
                        continue
                    score = torch.tensor([float(row[before.index(place)]) for place in left[k]])
                    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))[:keep]
                    stays = {left[k][i] for i in order}
                    gone = (set(left[k]) - stays) | set(newlines[k])
                    left[k] = [place for place in left[k] if place in stays]
                    newlines[k] = []
                    places = [place for place in places if place not in gone]
                if self.compact:
                    positions, moved = self.renumbered(positions, before, places, pictures)
                    shift += moved
                index = [before.index(place) for place in places]
                hidden, positions = hidden[index], positions[..., index]
            self.shifts[number] = shift
            hidden = self.layer(number, hidden, positions, places)
            if number < len(told.deepstack):
                visual = [places.index(place) for one in pictures for place in one["tokens"]]
                hidden = hidden.clone()
                hidden[visual] += told.deepstack[number]
        self.left = left
        logits = [self.model.lm_head(self.decoder.norm(hidden[-1]))]
        tokens = [self.best(logits[0])]
        last = told.positions[-3:].max() if told.positions.ndim == 3 else told.positions.max()
        for step in range(1, steps):
            hidden = self.model.get_input_embeddings()(torch.tensor([tokens[-1]]))
            place = [len(ids) + step - 1]
            for number in range(len(self.decoder.layers)):
                position = last + step - self.shifts[number]
                position = position.view(1, 1).expand(*told.positions.shape[:-2], 1, 1)
                hidden = self.layer(number, hidden, position, place)
            logits.append(self.model.lm_head(self.decoder.norm(hidden[-1])))
            tokens.append(self.best(logits[-1]))
        return torch.stack(logits), torch.tensor(tokens)

    def best(self, logits: Tensor) -> int:
        allowed = logits.clone()
        allowed[self.model.generation_config.suppress_tokens] = -torch.inf
        return int(allowed.argmax())

    def row(self, number: int, hidden: Tensor, positions: Tensor, places: list[int]) -> Tensor:
        """The last token's attention, mean over heads: of the layer before, or of this one before it runs."""
        if not self.own:
            return self.weights[:, -1].mean(0)
        q, k, _ = self.project(number, self.decoder.layers[number].input_layernorm(hidden), positions)
        return self.map(number, q, k, places, places)[:, -1].mean(0)

    def places(self, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The places of every picture: of its tokens, and of all its placeholders."""
        if family_of(self.model).sources["image"].pixels not in inputs:
            return []
        token = self.model.config.image_token_id
        holders = (inputs["input_ids"][0] == token).nonzero().flatten().tolist()
        found, start = [], 0
        for visual in pictures(self.vlm, inputs):
            mine = holders[start : start + visual.span]
            slots = range(visual.span) if visual.slots is None else visual.slots.tolist()
            found.append({"tokens": [mine[slot] for slot in slots], "all": set(mine)})
            start += visual.span
        return found

    def renumbered(self, positions: Tensor, before: list[int], after: list[int], pictures: Any) -> tuple[Tensor, int]:
        """Positions of `before` with those of `after` closed up. -> (positions, how far what follows moved)"""
        positions = positions.clone()
        if positions.ndim == 2:
            for at, place in enumerate(before):
                positions[0, at] -= sum(other < place and other not in after for other in before)
            return positions, len(before) - len(after)
        total = 0
        for one in pictures:
            here = [at for at, place in enumerate(before) if place in one["all"]]
            stay = [at for at in here if before[at] in after]
            end = max(int(positions[axis, 0, at]) for axis in (-2, -1) for at in here) + 1
            for axis in (-3, -2, -1):
                there = sorted({int(positions[axis, 0, at]) for at in here})
                now = sorted({int(positions[axis, 0, at]) for at in stay})
                for at in stay:
                    positions[axis, 0, at] = there[now.index(int(positions[axis, 0, at]))]
            new = max(int(positions[axis, 0, at]) for axis in (-2, -1) for at in stay) + 1
            positions[-3:, 0, here[-1] + 1 :] -= end - new
            total += end - new
        return positions, total


# --- against the reference ------------------------------------------------------------------------------------------

STAGES = {"one": {2: 0.5}, "two": {1: 0.6, 2: 0.3}}
FIRST = {"qwen3_vl": 3, "qwen3_5": 4}  # the first layer that can be cut, where it is not 1


def at(name: str, stages: dict[int, float]) -> dict[int, float]:
    """A single stage, as early as the family lets it be."""
    return {max(layer, FIRST.get(name, 1)): share for layer, share in stages.items()}


CASES = [(name, "one", "original") for name in FAMILIES]
CASES += [(name, "one", "compact") for name in ("llava", "qwen3_vl", "llava_next", "paligemma")]
CASES += [(name, "two", how) for name in ("llava", "qwen2_5_vl", "gemma3") for how in ("original", "compact")]


@pytest.mark.parametrize("name, stages, positions", CASES)
def test_prefill_and_greedy_decoding_equal_a_layer_loop_by_hand(name, stages, positions):
    family = shared(name)
    inputs = family.prompts([[3, "a", 2, "b", 4]])
    cuts = at(name, STAGES[stages])
    reference = Reference(family, cuts, positions)
    logits, tokens = reference.run(inputs)
    with vlmfast.patch(family.model, staged(cuts, positions=positions)) as handle:
        ours, chosen = logits_and_tokens(family.model, inputs)
        kept = handle.report().kept
        direct = family.model(**inputs).logits
    torch.testing.assert_close(ours[0], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(chosen[0], tokens)
    torch.testing.assert_close(direct[0, -1], logits[0], rtol=1e-4, atol=1e-4)
    for indices, one, left in zip(kept, reference.places(inputs), reference.left):
        assert indices.tolist() == [one["tokens"].index(place) for place in left]


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_scores_of_a_layer_before_it_runs(vlm, positions):
    inputs = vlm.prompts([[3, "a", 2, "b", 4]])
    logits, tokens = Reference(vlm, STAGES["two"], positions, own=True).run(inputs)
    with vlmfast.patch(vlm.model, staged(STAGES["two"], positions=positions, own=True)):
        ours, chosen = logits_and_tokens(vlm.model, inputs)
    torch.testing.assert_close(ours[0], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(chosen[0], tokens)


# --- batches, caches, decoding --------------------------------------------------------------------------------------

DECODING = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beam": {"num_beams": 2, "cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


def continued(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **how)
    return tokens[:, inputs["input_ids"].shape[1] :]


def rows_equal_themselves_alone(vlm: Any, method: Any, **how: Any) -> None:
    together = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, method):
        logits, tokens = vlm.model(**together).logits[:, -1], continued(vlm.model, together, **how)
        for row in range(3):
            alone = vlm.prompts(ROWS, only=row)
            torch.testing.assert_close(vlm.model(**alone).logits[0, -1], logits[row], rtol=1e-3, atol=1e-3)
            assert torch.equal(continued(vlm.model, alone, **how)[0], tokens[row])


POSITIONS = list(itertools.product(["original", "compact"], DECODING))


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, POSITIONS), indirect=["vlm"])
def test_a_ragged_batch_equals_its_rows_alone(vlm, both):
    positions, how = both
    rows_equal_themselves_alone(vlm, staged(STAGES["two"], positions=positions), **DECODING[how])


@pytest.mark.parametrize(
    ("name", "how"), crossed(["gemma3", "paligemma", "qwen3_5", "llava_next"], ["greedy", "static", "beam"])
)
def test_rows_alone_with_other_masks(name, how):
    rows_equal_themselves_alone(shared(name), staged(at(name, {2: 0.4})), **DECODING[how])


def windowed(types: list[str]) -> Any:
    """Gemma 3 whose window is shorter than the prompt."""
    model = make("gemma3", Tiny(lambda: tiny_others.build_gemma3(16), tiny_others.gemma_image, types="token_type_ids"))
    config = model.model.model.language_model.config
    assert config.sliding_window == 16
    config.layer_types = types
    for layer, kind in zip(model.model.model.language_model.layers, types):
        attention = layer.self_attn
        attention.layer_type, attention.is_sliding = kind, kind == "sliding_attention"
        attention.sliding_window = config.sliding_window if attention.is_sliding else None
    return model


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("types", [[SLIDING, FULL, SLIDING], [SLIDING, SLIDING, FULL], [FULL, FULL, SLIDING]])
def test_sliding_windows(types):
    """The window counts the prompt's own columns; the mask of full layers is made for one behind the cut."""
    one = windowed(types)
    for stages in ({2: 0.4}, {1: 0.7, 2: 0.4}):
        inputs = one.prompts([[3, "a", 9]])
        logits, tokens = Reference(one, stages, "original").run(inputs, 6)
        with vlmfast.patch(one.model, staged(stages)):
            ours, chosen = logits_and_tokens(one.model, inputs, 6)
            static = logits_and_tokens(one.model, inputs, 6, cache_implementation="static")[1]
        torch.testing.assert_close(ours[0], logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(chosen[0], tokens) and torch.equal(static[0], tokens)
        rows_equal_themselves_alone(one, staged(stages))


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_eager_attention(fresh, name):
    one = fresh(name)
    inputs = one.prompts(ROWS)
    with vlmfast.patch(one.model, staged(STAGES["two"])):
        expected = one.model(**inputs).logits
    one.model.set_attn_implementation("eager")
    with vlmfast.patch(one.model, staged(STAGES["two"])):
        torch.testing.assert_close(one.model(**inputs).logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    rows_equal_themselves_alone(one, staged(STAGES["two"]))


def test_right_padding_in_direct_calls(vlm):
    """As in training: the last real token of each row has the logits it has alone."""
    inputs = vlm.prompts(ROWS, side="right")
    with vlmfast.patch(vlm.model, staged(STAGES["two"], positions="compact")):
        logits = vlm.model(**inputs).logits
        for row in range(3):
            alone = vlm.model(**vlm.prompts(ROWS, only=row)).logits[0, -1]
            last = int(inputs["attention_mask"][row].sum()) - 1
            torch.testing.assert_close(alone, logits[row, last], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_decoding_compiles_into_one_graph(vlm, method):
    inputs = vlm.prompts([[3, "a", 2]])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = CompileConfig(backend="aot_eager", fullgraph=True)
    how._compile_all_devices = True
    with vlmfast.patch(vlm.model, method):
        expected = continued(vlm.model, inputs)
        assert torch.equal(continued(vlm.model, inputs, cache_implementation="static", compile_config=how), expected)
    vlm.model.__dict__.pop("_compiled_call", None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_cache_is_shorter_behind_each_cut(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    n, length = len(vlm.picture("a").ids), inputs["input_ids"].shape[1]
    with vlmfast.patch(vlm.model, staged(STAGES["two"])) as handle:
        out = vlm.model(**inputs)
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [
            length,
            length - n + round(0.6 * n),
            length - n + round(0.3 * n),
        ]
        assert out.logits.shape[:2] == inputs["input_ids"].shape
        assert handle.report().per_layer == (n, round(0.6 * n), round(0.3 * n))
        assert vlm.model(**inputs, logits_to_keep=1).logits.shape[1] == 1


def test_a_dropped_place_holds_what_the_last_token_before_it_has(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, staged({2: 0.3})) as handle:
        logits = vlm.model(**inputs).logits[0]
        kept = set(handle.report().kept[0].tolist())
    places = (inputs["input_ids"][0] == vlm.model.config.image_token_id).nonzero().flatten().tolist()
    for number, place in enumerate(places):
        if number not in kept:
            assert torch.equal(logits[place], logits[place - 1])


def test_own_decoding_loop(vlm):
    """A loop by hand on the returned cache, as `generate` with the same positions."""
    inputs = vlm.prompts(ROWS[:2])
    told = capture(vlm.model, inputs).positions
    inputs["position_ids"] = told.expand(*told.shape[:-2], 2, -1)
    with vlmfast.patch(vlm.model, staged(STAGES["two"], positions="compact")):
        expected = continued(vlm.model, inputs)
        out = vlm.model(**inputs)
        mask, positions, chosen = inputs["attention_mask"], inputs["position_ids"][..., -1:], []
        for _ in range(4):
            logits = out.logits[:, -1].clone()
            logits[:, vlm.model.generation_config.suppress_tokens] = -torch.inf
            chosen.append(logits.argmax(-1, keepdim=True))
            mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
            now = {"input_ids": chosen[-1], "attention_mask": mask, "position_ids": positions}
            out = vlm.model(**now, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(chosen, 1), expected)


def test_prompt_lookup_takes_tokens_back(vlm):
    """Assisted decoding crops the cache behind the prompt: the tokens are those of greedy decoding."""
    inputs = vlm.prompts([[3, "a", 2]])
    with vlmfast.patch(vlm.model, staged(STAGES["two"], positions="compact")):
        greedy = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=12)
        found = vlm.model.generate(**inputs, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, found)


def test_a_turn_of_text_on_a_cache_that_holds_different_tokens(vlm):
    """Two further tokens at once equal two steps; padding among them is not seen."""
    inputs = vlm.prompts([[3, "a", 2]])
    more = torch.tensor([[11, 12]])
    with vlmfast.patch(vlm.model, staged(STAGES["two"])):
        at_once, by_step = vlm.model(**inputs), vlm.model(**inputs)
        length = inputs["input_ids"].shape[1]
        mask = torch.ones(1, length + 2, dtype=torch.long)
        both = vlm.model(
            input_ids=more,
            attention_mask=mask,
            position_ids=torch.tensor([[length, length + 1]]),
            past_key_values=at_once.past_key_values,
        )
        for step in range(2):
            last = vlm.model(
                input_ids=more[:, step : step + 1],
                attention_mask=mask[:, : length + step + 1],
                position_ids=torch.tensor([[length + step]]),
                past_key_values=by_step.past_key_values,
            )
        torch.testing.assert_close(both.logits[:, -1], last.logits[:, -1], rtol=1e-4, atol=1e-4)
        mask[0, -2] = 0
        hidden, plain = vlm.model(**inputs), vlm.model(**inputs)
        seen = vlm.model(
            input_ids=more,
            attention_mask=mask,
            position_ids=torch.tensor([[length, length]]),
            past_key_values=hidden.past_key_values,
        )
        without = vlm.model(
            input_ids=more[:, 1:],
            attention_mask=mask[:, :-1].clone().fill_(1),
            position_ids=torch.tensor([[length]]),
            past_key_values=plain.past_key_values,
        )
        torch.testing.assert_close(seen.logits[:, -1], without.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_picture_behind_text_in_the_cache(vlm):
    """Text prefilled first: the cut leaves it whole."""
    inputs = vlm.prompts([[5, "a", 3]])
    with vlmfast.patch(vlm.model, staged({2: 0.4})) as handle:
        expected, kept = vlm.model(**inputs).logits[:, -1], handle.report().kept[0]
        first = vlm.model(input_ids=inputs["input_ids"][:, :3], use_cache=True)
        rest = {name: value[:, 3:] if name.endswith("ids") else value for name, value in inputs.items()}
        told = capture_positions(vlm, inputs)[..., 3:]
        out = vlm.model(**rest, position_ids=told, past_key_values=first.past_key_values)
        assert torch.equal(handle.report().kept[0], kept)
        torch.testing.assert_close(out.logits[:, -1], expected, rtol=1e-4, atol=1e-4)


def capture_positions(vlm: Any, inputs: dict[str, Tensor]) -> Tensor:
    twin = build(vlm.name)
    return capture(twin.model, inputs).positions


def test_stale_and_wrong_caches(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    text = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    plain = vlm.model(**text).logits
    with vlmfast.patch(vlm.model, staged({2: 0.4})):
        cache = vlm.model(**inputs).past_key_values
        two = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache}
        with pytest.raises(ValueError, match="2 rows for a cache that was filled with 1"):
            vlm.model(**two, position_ids=torch.zeros(2, 1, dtype=torch.long))
        with pytest.raises((NotImplementedError, ValueError), match="fresh|position_ids"):
            vlm.model(**inputs | {"attention_mask": None}, past_key_values=cache)
        cache.reset()
        torch.testing.assert_close(vlm.model(**text, past_key_values=cache).logits, plain)
        cropped = vlm.model(**inputs).past_key_values
        for layer in cropped.layers:
            layer.crop(-4)
        with pytest.raises(ValueError, match="cropping into a pruned prompt"):
            vlm.model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[9]]), past_key_values=cropped)


# --- the identity, undoing, training --------------------------------------------------------------------------------


def test_keeping_everything_is_the_identity_bit_for_bit(family):
    inputs = family.prompts(ROWS)
    logits, tokens = family.model(**inputs).logits, continued(family.model, inputs)
    before = snapshot(family.model)
    with vlmfast.patch(family.model, staged(at(family.name, {2: 1.0}))) as handle:
        assert torch.equal(family.model(**inputs).logits, logits)
        assert torch.equal(continued(family.model, inputs), tokens)
        assert all(image.kept == image.n for image in handle.report().images)
        assert handle.report().share == 1
    assert snapshot(family.model) == before
    assert torch.equal(family.model(**inputs).logits, logits)


def test_the_hooks_of_a_decoder_can_be_pickled():
    decoder = shared("qwen2_5_vl").model.model.get_decoder()
    with vlmfast.patch(shared("qwen2_5_vl").model, FastV(keep=0.3)):
        twin = pickle.loads(pickle.dumps(decoder))
        for module, other in zip(decoder.modules(), twin.modules(), strict=True):
            assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
        door = next(iter(twin._forward_pre_hooks.values())).__self__
        assert door.cuts == (2,) and door.selector == FastV(keep=0.3)


def test_text_alone_is_left_alone(vlm):
    inputs = vlm.prompts([[7], [4]])
    logits, tokens = vlm.model(**inputs).logits, continued(vlm.model, inputs)
    with vlmfast.patch(vlm.model, staged({2: 0.2})):
        assert torch.equal(vlm.model(**inputs).logits, logits)
        assert torch.equal(continued(vlm.model, inputs), tokens)


def test_a_deep_copy_of_a_patched_model(vlm):
    inputs = vlm.prompts(ROWS)
    plain = vlm.model(**inputs).logits
    with vlmfast.patch(vlm.model, FastV(keep=0.3)):
        pruned = vlm.model(**inputs).logits
        twin = copy.deepcopy(vlm.model)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        torch.testing.assert_close(twin(**inputs).logits, pruned)
        vlmfast.unpatch(twin)
        assert torch.equal(twin(**inputs).logits, plain)
        with torch.no_grad():
            vlm.model.lm_head.weight.neg_()
        assert torch.equal(vlm.model(**inputs).logits, pruned)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_training_and_checkpoints(name):
    one = build(name)
    model = one.model
    model.train()
    inputs = one.prompts([[3, "a", 6], [2, "b", 4]], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == model.config.image_token_id] = -100
    labels[:, :4] = -100

    def step(**how):
        model.zero_grad()
        out = model(**inputs, labels=labels, use_cache=False, **how)
        out.loss.backward()
        return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out

    with vlmfast.patch(model, staged({1: 0.6, 2: 0.3})):
        loss, gradients, out = step()
        assert any("vision" in n or "visual" in n for n, g in gradients.items() if g.abs().sum() > 0)
        shifted = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(loss, shifted.detach())
        for reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            again, more, _ = step()
            model.gradient_checkpointing_disable()
            torch.testing.assert_close(again, loss)
            for key, gradient in gradients.items():
                if key in more:
                    torch.testing.assert_close(more[key], gradient)


def test_the_query_of_training_is_what_precedes_an_answer(vlm):
    """The choice must not look at the answer: other answers, the same tokens."""
    inputs = vlm.prompts([[3, "a", 6]])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -2:] = torch.tensor([7, 8])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -2:] = inputs["input_ids"][0, -2:]
    with vlmfast.patch(vlm.model, FastV(keep=0.2)) as handle:
        vlm.model(**inputs, labels=labels)
        first = handle.report().kept[0]
        vlm.model(**other, labels=labels)
        assert torch.equal(handle.report().kept[0], first)
        shorter = {name: value[:, :-2] if value.shape == labels.shape else value for name, value in inputs.items()}
        vlm.model(**shorter)
        assert torch.equal(handle.report().kept[0], first)


# --- with the inputs door -------------------------------------------------------------------------------------------


def test_behind_a_method_before_the_language_model(vlm):
    """Door 2 sees the shorter prompt; the report counts the picture's own tokens."""
    inputs = vlm.prompts([[3, "a", 2, "b", 4]])
    with vlmfast.patch(vlm.model, "hiprune:keep=0.5") as handle:
        short = handle_logits(vlm, inputs)
        first = handle.report()
    for spec in ("hiprune:keep=0.5+fastv:keep=0.5", "fastv:keep=0.5+hiprune:keep=0.5"):
        with vlmfast.patch(vlm.model, spec) as handle:
            both = handle_logits(vlm, inputs)
            report = handle.report()
            tokens = continued(vlm.model, inputs)
        assert not torch.allclose(both[:, -1], short[:, -1], atol=1e-4)
        for outer, inner, image in zip(first.kept, report.kept, report.images):
            assert set(inner.tolist()) < set(outer.tolist())
            assert image.kept == round(0.5 * round(0.5 * image.n))
        halves = sum(image.kept for image in first.images)
        assert report.per_layer == (halves, halves, sum(image.kept for image in report.images))
        assert report.share < first.share
        assert tokens.shape == (1, 4)
    with pytest.raises(NotImplementedError, match="cannot be combined"):
        vlmfast.patch(vlm.model, "fastv+pyramiddrop")
    assert "vlmfast_handle" not in vlm.model.__dict__


def handle_logits(vlm: Any, inputs: dict[str, Tensor]) -> Tensor:
    return vlm.model(**inputs).logits


def test_batches_and_beams_behind_a_method_before_the_language_model(vlm):
    for how in DECODING.values():
        together = vlm.prompts(ROWS)
        with vlmfast.patch(vlm.model, "hiprune:keep=0.6+fastv:keep=0.4"):
            tokens = continued(vlm.model, together, **how)
            for row in range(3):
                assert torch.equal(continued(vlm.model, vlm.prompts(ROWS, only=row), **how)[0], tokens[row])


def test_beams_are_reported_once(vlm):
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, FastV(keep=0.4)) as handle:
        vlm.model(**inputs)
        expected = handle.report()
        continued(vlm.model, inputs, num_beams=3)
        report = handle.report()
    assert [image.kept for image in report.images] == [image.kept for image in expected.images]
    assert report.per_layer == expected.per_layer and report.share == expected.share


def test_what_cannot_work_says_so(vlm):
    before = snapshot(vlm.model)
    for method, error, words in [
        ("fastv:layer=3", ValueError, "this decoder has 3 layers: choose ascending numbers from 1 to 2"),
        ("fastv:layer=0", ValueError, "a decoder layer, 1 or more"),
        ("pyramiddrop:stages=2/1", ValueError, "ascending"),
        ("pyramiddrop:stages=a/b", ValueError, "joined by slashes"),
        ("sparsevlm:schedule=5/4", ValueError, "one for each stage"),
        ("dart:pivots_image=0,pivots_text=0", ValueError, "nothing to compare with"),
        ("lscenellm:threshold=255", ValueError, "threshold"),
        ("fastv:keep=0", ValueError, "keep"),
        ("fastv:positions=none", ValueError, "original"),
    ]:
        with pytest.raises(error, match=words):
            vlmfast.patch(vlm.model, method)
        assert snapshot(vlm.model) == before


@pytest.mark.parametrize("spec", ["pyramiddrop:keep=0.125,stages=4/8", "sparsevlm:keep=0.2,schedule=300/200/110"])
def test_lists_in_specs_round_trip(spec):
    methods = vlmfast.adapters.from_spec(spec)
    assert vlmfast.adapters.from_spec(vlmfast.adapters.to_spec(methods)) == methods
    assert vlmfast.adapters.to_spec(methods) == spec


def test_layers_that_cannot_be_cut_or_asked():
    with pytest.raises(NotImplementedError, match="only layers 3 of this decoder attend"):
        vlmfast.patch(shared("qwen3_5").model, "fastv:layer=1")
    with pytest.raises(NotImplementedError, match="no attention that could score"):
        vlmfast.patch(shared("qwen3_5").model, "pyramiddrop")
    with pytest.raises(ValueError, match="behind its first 3 layers: choose 3 or more"):
        vlmfast.patch(shared("qwen3_vl").model, "fastv:layer=1")


# --- statistics and methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recorder(LayerPruner):
    """Asks for every statistic and keeps what it is given."""

    name = "recorder"
    own: bool = False
    seen: ClassVar[list[Any]] = []

    def layers(self, depth):
        return (2,)

    def asks(self, layer):
        asked = {
            f"{queries} {reduce}": LayerScore(queries=queries, reduce=reduce, own=self.own)
            for queries in ("last", "question", "chosen", "all")
            for reduce in ("mean", "rows", "heads")
        }
        return asked | {"norm": LayerScore(kind="key_norm", own=self.own)}

    def raters(self, visual, question):
        assert visual.shape[1] == question.shape[1]
        return torch.tensor([0, 2])

    def cut(self, tokens):
        self.seen.append(tokens)
        return Cut(torch.arange(1))


@pytest.mark.parametrize("own", [False, True])
def test_statistics_are_those_of_the_whole_map(vlm, own):
    rows = [[3, "a", 2, "b", 4], [2, "a", 5]]
    together = vlm.prompts(rows)
    for number in range(2):
        inputs = vlm.prompts(rows, only=number)
        reference = Reference(vlm, {}, "original")
        with torch.no_grad():
            told = capture(vlm.model, inputs)
            length, hidden = inputs["input_ids"].shape[1], told.embeds[0]
            places = reference.places(inputs)
            reference.length, reference.block, reference.kept = length, {}, {}
            for layer in range(2):
                before = hidden
                hidden = reference.layer(layer, hidden, told.positions, list(range(length)))
            layer, entering = (2, hidden) if own else (1, before)
            normed = vlm.model.model.get_decoder().layers[layer].input_layernorm(entering)
            q, k, _ = reference.project(layer, normed, told.positions)
            dense = reference.map(layer, q, k, list(range(length)), list(range(length)))  # [H, L, L]
            module = vlm.model.model.get_decoder().layers[layer].self_attn
            norms = module.k_proj(normed).abs().sum(-1)
        last = max(max(one["all"]) for one in places)
        queries = {"last": [length - 1], "question": list(range(last + 1, length)), "all": list(range(length))}
        queries["chosen"] = [queries["question"][0], queries["question"][2]]
        text = [place for place in range(length) if all(place not in one["all"] for one in places)]
        Recorder.seen.clear()
        with vlmfast.patch(vlm.model, Recorder(own=own)):
            vlm.model(**together)
        mine = Recorder.seen[:2] if number == 0 else Recorder.seen[2:]
        for tokens, one in zip(mine, places, strict=True):
            columns = list(one["tokens"])
            assert tokens.index.tolist() == list(range(len(columns)))
            torch.testing.assert_close(tokens.hidden, hidden[columns], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(tokens.text, hidden[text], rtol=1e-4, atol=1e-4)
            assert tokens.question.tolist() == [place > last for place in text]
            for there, found in ((columns, tokens.scores), (text, tokens.text_scores)):
                for which, picked in queries.items():
                    part = dense[:, picked][:, :, there]
                    torch.testing.assert_close(found[f"{which} mean"], part.mean((0, 1)), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(found[f"{which} rows"], part.mean(0), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(found[f"{which} heads"], part.mean(1), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found["norm"], norms[there], rtol=1e-4, atol=1e-4)


def tokens_of(scores: dict[str, Tensor], hidden: Tensor, keep: int, **more: Any) -> LayerTokens:
    n = len(hidden)
    settings = {
        "layer": 2,
        "depth": 32,
        "text": hidden[:0],
        "question": torch.ones(0, dtype=torch.bool),
        "index": torch.arange(n),
        "visual": VisualTokens(hidden, (1, 1, n), n),
        "total": n,
    }
    return LayerTokens(hidden=hidden, keep=keep, scores=scores, **settings | more)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fastv_keeps_the_largest_of_the_last_row():
    row = random(30).softmax(0)
    row[7] = row[3]
    kept = FastV(keep=9).cut(tokens_of({"attention": row}, random(30, 4), 9)).kept
    order = sorted(range(30), key=lambda j: (-float(row[j]), j))
    assert kept.tolist() == sorted(order[:9])
    assert FastV(keep=0.25).left(2, 10, 32) == 2 and FastV(keep=0.75).left(2, 10, 32) == 8  # halves to even


def test_pyramiddrop_falls_by_one_factor():
    method = PyramidDrop()
    assert method.layers(32) == (8, 16, 24) and method.layers(28) == (7, 14, 21)
    assert [method.left(layer, 576, 32) for layer in (8, 16, 24)] == [288, 144, 72]
    assert [PyramidDrop(keep=64).left(layer, 576, 32) for layer in (8, 16, 24)] == [277, 133, 64]
    assert [PyramidDrop(parity="official").left(layer, 576, 32) for layer in (8, 16, 24)] == [288, 144, 72]
    assert [PyramidDrop(keep=0.129, parity=how).left(24, 100, 32) for how in ("repaired", "official")] == [13, 12]
    assert PyramidDrop(stages="4/6", keep=0.25).left(4, 100, 32) == 50
    picture = Picture(patches=(1, 24, 24), tokens=576, span=576)
    held = method.visual_per_layer(picture, 32)
    assert sum(held) / 32 == 270  # of 576, as computed for the paper's setting


def test_sparsevlm_meets_the_authors_tables():
    method = SparseVLM()
    assert method.layers(32) == (3, 7, 16)
    for nominal, table, mean in ((192, "300/200/110", 206.5), (64, "66/30/17", 82.2)):
        held = SparseVLM(schedule=table).visual_per_layer(Picture(patches=(1, 24, 24), tokens=576, span=576), 32)
        assert sum(held) / 32 == pytest.approx(mean, abs=0.06), nominal
    for table in ("300/200/110", "303/110/36", "238/48/26", "66/30/17"):
        by_hand = SparseVLM(schedule=table)
        last = by_hand.left(16, 576, 32)
        chosen = [SparseVLM(keep=last).left(layer, 576, 32) for layer in (3, 7, 16)]
        assert chosen == [by_hand.left(layer, 576, 32) for layer in (3, 7, 16)]
        come = 576
        for left, kept in zip(chosen, table.split("/")):
            assert split(come, left)[0] == int(kept) and sum(split(come, left)) == left
            come = left
    for n in (5, 40, 576):
        for left in range(1, n):
            kept, means = split(n, left)
            assert kept >= 1 and means >= 0 and kept + means == left
            stages = [SparseVLM(keep=left).left(layer, n, 32) for layer in (3, 7, 16)]
            assert n >= stages[0] >= stages[1] >= stages[2] == left


def test_sparsevlm_rates_and_recycles():
    visual, text = random(9, 6), random(7, 6, seed=1)
    rates = []
    for t in range(7):
        shares = [math.exp(v @ text[t]) / sum(math.exp(v @ u) for u in text) for v in visual]
        rates.append(sum(shares) / 9)
    mean = sum(rates) / 7
    assert rating(visual, text).tolist() == [t for t in range(7) if rates[t] > mean]

    n, left = 80, 30
    scores, hidden = random(n).softmax(0), random(n, 5, seed=2)
    order = sorted(range(n), key=lambda j: (-float(scores[j]), j))
    k, count = split(n, left)
    kept, pool = sorted(order[:k]), order[k : k + int(0.3 * (n - k)) + 1]
    assert count == int(len(pool) / 10) + 1
    centres, members = peaks_by_hand(hidden[pool], count)
    for ordered in (True, False):
        cut = SparseVLM(keep=left).cut(tokens_of({"attention": scores}, hidden, left, ordered=ordered))
        places = [*kept, *(pool[c] for c in centres)]
        assert cut.kept.tolist() == sorted(places)
        assert cut.index.tolist() == (places if ordered else sorted(places))
        new = merged(hidden[None], 0, torch.arange(n), cut.kept, cut.merge)[0, cut.kept]
        for place, one in enumerate(cut.index.tolist()):
            expected = hidden[one]
            if one not in kept:
                group = [pool[i] for i, c in enumerate(members) if pool[centres[c]] == one]
                expected = sum(hidden[i] for i in group) / len(group)
            torch.testing.assert_close(new[place], expected)


def peaks_by_hand(states: Tensor, count: int) -> tuple[list[int], list[int]]:
    """Density peaks in plain loops."""
    m, width = states.shape
    far = [[float((states[i] - states[j]).norm()) / width**0.5 for j in range(m)] for i in range(m)]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    reach = []
    for i in range(m):
        denser = [far[i][j] for j in range(m) if (density[j], -j) > (density[i], -i)]  # pairs of neighbours are equal
        reach.append(min(denser) if denser else max(map(max, far)))
    centres = sorted(range(m), key=lambda i: -reach[i] * density[i])[:count]
    members = [min(range(count), key=lambda c: far[i][centres[c]]) for i in range(m)]
    for c, centre in enumerate(centres):
        members[centre] = c
    return centres, members


def test_dart_takes_the_least_alike_pivot_by_pivot():
    n, words, k = 40, 11, 17
    hidden, text = random(n, 6), random(words, 6, seed=1)
    norms, text_norms = random(n, seed=2).abs(), random(words, seed=3).abs()
    question = torch.arange(words) >= 5
    tokens = tokens_of(
        {"keys": norms}, hidden, k, text=text, question=question, text_scores={"keys": text_norms}, final_norm=double
    )
    own = sorted(range(n), key=lambda j: (-float(norms[j]), j))[:4]
    words_ = sorted((t for t in range(words) if question[t]), key=lambda t: (-float(text_norms[t]), t))[:4]
    pool, kept = [j for j in range(n) if j not in own], list(own)
    for number, pivot in enumerate([*(hidden[j] for j in own), *(text[t] for t in words_)]):
        share = (k - 4) // 8 + (number < (k - 4) % 8)
        cosine = {j: float(torch.nn.functional.cosine_similarity(pivot, hidden[j], dim=0)) for j in pool}
        taken = sorted(pool, key=lambda j: (cosine[j], j))[:share]
        kept += taken
        pool = [j for j in pool if j not in taken]
    assert Dart(keep=k).cut(tokens).kept.tolist() == sorted(kept)
    few = tokens_of({"keys": norms}, hidden, 3, text=text, question=question, text_scores={"keys": text_norms})
    few = dataclasses.replace(few, final_norm=double)
    assert Dart(keep=3).cut(few).kept.tolist() == sorted(own[:3])


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_lscenellm_counts_the_rows_that_single_a_token_out():
    rows = random(6, 25).softmax(-1)
    rows[4] = 0.04  # says nothing
    votes = []
    for j in range(25):
        count = mean = 0.0
        for row in rows:
            low, high = float(row.min()), float(row.max())
            part = (float(row[j]) - low) / (high - low) if high > low else 0.0
            count += 255 * part > 96
            mean += part / len(rows)
        votes.append((count, mean))
    best = sorted(range(25), key=lambda j: (-votes[j][0], -votes[j][1], j))[:8]
    assert LSceneLLM(keep=8).cut(tokens_of({"rows": rows}, random(25, 3), 8)).kept.tolist() == sorted(best)


@pytest.mark.parametrize("name", ["dart", "fastv", "lscenellm", "pyramiddrop", "sparsevlm"])
def test_the_cost_model_knows_what_each_layer_holds(vlm, name):
    """`flops=` is solved with what `visual_per_layer` says: it must be what happens."""
    method = vlmfast.adapters.from_spec(f"{name}:keep=0.4")[0]
    n = len(vlm.picture("a").ids)
    with vlmfast.patch(vlm.model, method) as handle:
        vlm.model(**vlm.prompts([[3, "a", 4]]))
        report = handle.report()
    picture = Picture(patches=report.images[0].patches, tokens=n, span=n)
    assert report.per_layer == tuple(method.visual_per_layer(picture, 3))
    assert report.images[0].kept == len(report.kept[0]) == round(0.4 * n)


def test_gradients_reach_merged_tokens():
    hidden = random(1, 6, 3).requires_grad_()
    out = merged(hidden, 0, torch.arange(1, 6), torch.tensor([1, 3]), torch.tensor([0, 0, -1, 1, -1]))
    torch.testing.assert_close(out[0, 2], (hidden[0, 1] + hidden[0, 2]) / 2)
    torch.testing.assert_close(out[0, 4], hidden[0, 4])
    out[0, 2].sum().backward()
    assert hidden.grad[0].sum(-1).tolist() == [0, 1.5, 1.5, 0, 0, 0]


def test_a_prompt_that_ends_with_a_picture(vlm, monkeypatch):
    """The last token may be gone at the second cut: the last one left then stands for it."""
    seen, cut = [], PyramidDrop.cut

    def spy(self, tokens):
        seen.append(tokens.scores["attention"])
        return cut(self, tokens)

    monkeypatch.setattr(PyramidDrop, "cut", spy)
    with vlmfast.patch(vlm.model, "pyramiddrop"), torch.no_grad():
        for letter in "abc":
            vlm.model(**vlm.prompts([[9, letter]]))
    assert len(seen) == 6 and all(bool(scores.isfinite().all()) for scores in seen)


@pytest.mark.parametrize("method", ["fastv:layer={}", "pyramiddrop:stages={}", "dart:layer={}"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_beside_images(name, method):
    """A video is one picture with one budget, whether its frames stand together or apart between words."""
    one, rows = shared(name), [[3, "A", 2, "a", 4], [2, "B", 5], [4]]
    together = one.prompts(rows)
    with vlmfast.patch(one.model, method.format(FIRST.get(name, 2)) + ",keep=0.3") as handle:
        logits, tokens = one.model(**together).logits[:, -1], continued(one.model, together)
        for image, indices in zip(handle.report().images, handle.report().kept, strict=True):
            assert len(indices) == image.kept == round(0.3 * image.n)
        for row in range(3):
            alone = one.prompts(rows, only=row)
            torch.testing.assert_close(one.model(**alone).logits[0, -1], logits[row], rtol=1e-3, atol=1e-3)
            assert torch.equal(continued(one.model, alone)[0], tokens[row])


def second_turn(vlm: Any, inputs: dict[str, Tensor], more: Tensor) -> Tensor:
    """Generate, add text, generate on with the same cache. -> the last three tokens"""
    first = vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rows = len(more)
    told = {
        "input_ids": torch.cat([first.sequences, more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, 3 + more.shape[1]).long()], 1),
    }
    if (types := vlm.tiny.types) is not None:
        told[types] = torch.cat([inputs[types], torch.zeros(rows, 3 + more.shape[1]).long()], 1)
        told |= {name: value for name, value in inputs.items() if name == "image_grid_thw"}
    out = vlm.model.generate(**told, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    return out[:, -3:]


@pytest.mark.parametrize("method", ["fastv:keep=0.4", "hiprune:keep=0.5+pyramiddrop:keep=0.2"])
def test_a_second_turn_of_a_ragged_batch_equals_its_rows_alone(vlm, method):
    rows, more = [[3, "a", 2], [2, "b", 1, "c", 6]], torch.tensor([[11, 12, 13], [14, 15, 16]])
    with vlmfast.patch(vlm.model, method):
        together = second_turn(vlm, vlm.prompts(rows), more)
        for row in range(2):
            alone = second_turn(vlm, vlm.prompts(rows, only=row), more[row : row + 1])
            assert torch.equal(together[row : row + 1], alone)

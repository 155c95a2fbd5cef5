"""Positions after pruning, against the unpatched sub-modules run by hand: direct call, generate, own decoding loop."""

from __future__ import annotations

import pytest
import torch

import vlmfast

ROW = [3, "a", 2, "b", 4]
STEPS = 4
POLICIES = ("original", "compact")


def expected_positions(vlm, inputs, kept, policy):
    """Axes of every kept token in plain loops. -> (columns that stay, [len, 3] positions, next position)"""
    ids = inputs["input_ids"][0].tolist()
    token = vlm.model.config.image_token_id
    grids = [[1, 6, 6]] * len(kept)
    if vlm.name == "qwen2_5_vl":
        grids = [[t, h // 2, w // 2] for t, h, w in inputs["image_grid_thw"].tolist()]
    columns, positions, column, place = [], [], 0, 0
    image = 0
    while column < len(ids):
        if ids[column] != token:
            columns.append(column)
            positions.append([place] * 3)
            column, place = column + 1, place + 1
            continue
        _, h, w = grids[image]
        stays = kept[image].tolist()
        if vlm.name == "llava":
            for k, i in enumerate(stays):
                positions.append([place + (i if policy == "original" else k)] * 3)
            place += h * w if policy == "original" else len(stays)
        else:
            ys, xs = sorted({i // w for i in stays}), sorted({i % w for i in stays})
            for i in stays:
                y, x = (i // w, i % w) if policy == "original" else (ys.index(i // w), xs.index(i % w))
                positions.append([place, place + y, place + x])
            place += max(h, w) if policy == "original" else max(len(ys), len(xs))
        columns += [column + i for i in stays]
        column += h * w
        image += 1
    return columns, positions, place


def by_hand(vlm, inputs, kept, policy):
    """Logits of the shortened prompt and STEPS greedy tokens, full forward each time: no cache, no patch."""
    model = vlm.model
    encode = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    features = torch.cat(list(model.model.get_image_features(**encode, return_dict=True).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"][0]).clone()
    embeds[inputs["input_ids"][0] == model.config.image_token_id] = features
    columns, positions, place = expected_positions(vlm, inputs, kept, policy)
    embeds, tokens, first = embeds[columns], [], None
    for step in range(STEPS):
        axes = torch.tensor(positions).T[:, None]
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=axes[0] if vlm.name == "llava" else axes,
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden)[0]
        first = logits if first is None else first
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
        positions = [*positions, [place + step] * 3]
    return first, tokens


@pytest.fixture(params=POLICIES)
def pruned(request, vlm):
    """(vlm, inputs, handle, logits by hand, tokens by hand) of a patched model under each policy."""
    inputs = vlm.prompts([ROW])
    method = "fastervlm:fallback=received,keep=0.4"
    with torch.no_grad():
        with vlmfast.patch(vlm.model, method) as handle:
            vlm.model(**inputs)
            kept = handle.report().kept
        logits, tokens = by_hand(vlm, inputs, kept, request.param)
        with vlmfast.patch(vlm.model, method, positions=request.param):
            yield vlm, inputs, logits, tokens


def test_direct_call(pruned):
    vlm, inputs, logits, _ = pruned
    torch.testing.assert_close(vlm.model(**inputs).logits[0], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vlm.model(**inputs, use_cache=False).logits[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_generate(pruned, cache):
    vlm, inputs, _, tokens = pruned
    vlm.model.generation_config.suppress_tokens, before = None, vlm.model.generation_config.suppress_tokens
    out = vlm.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=cache)
    vlm.model.generation_config.suppress_tokens = before
    assert out[0, -STEPS:].tolist() == tokens


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_positions", [True, False])
def test_own_loop(pruned, with_mask, with_positions):
    """A loop written by hand: the mask grows from the unpruned prompt, positions given or left to the model."""
    vlm, inputs, _, tokens = pruned
    out = vlm.model(**inputs, use_cache=True)
    mask, seen = inputs["attention_mask"], []
    following = inputs["input_ids"].shape[1]
    if vlm.name == "qwen2_5_vl":
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        following = int(vlm.model.model.get_rope_index(**{n: inputs[n] for n in names})[0].max()) + 1
    for step in range(STEPS):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        seen.append(int(token))
        mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
        given = {"attention_mask": mask} if with_mask else {}
        if with_positions:
            given["position_ids"] = torch.tensor([[following + step]])
        out = vlm.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, **given)
    assert seen == tokens


def test_own_loop_over_tuples(pruned):
    """return_dict=False: the cache in the tuple knows of the pruned prompt all the same."""
    vlm, inputs, _, tokens = pruned
    logits, cache = vlm.model(**inputs, use_cache=True, return_dict=False)[:2]
    seen = []
    for _ in range(STEPS):
        token = logits[:, -1].argmax(-1, keepdim=True)
        seen.append(int(token))
        logits, cache = vlm.model(input_ids=token, past_key_values=cache, use_cache=True, return_dict=False)[:2]
    assert seen == tokens


def test_batch_in_an_own_loop(vlm):
    """Rows that lose different numbers of tokens, with padding, in a loop written by hand."""
    inputs = vlm.prompts([[3, "a", 2], [2, "b", 1, "c", 6], [4]])
    for policy in POLICIES:
        with torch.no_grad(), vlmfast.patch(vlm.model, "hiprune:keep=0.3", positions=policy):
            reference = vlm.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=None)
            position_ids = inputs["attention_mask"].cumsum(1).sub(1).clamp(min=0) if vlm.name == "llava" else None
            out = vlm.model(**inputs, position_ids=position_ids, use_cache=True)
            mask, tokens = inputs["attention_mask"], []
            for _ in range(STEPS):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                out = vlm.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
            suppressed = vlm.model.generation_config.suppress_tokens
            ours = torch.cat(tokens, dim=1)
            if not (ours == suppressed[0]).any():
                assert torch.equal(ours, reference[:, -STEPS:])


def test_default_policies_follow_the_official_codes(vlm):
    inputs = vlm.prompts([ROW])
    with vlmfast.patch(vlm.model, "grid:keep=0.3"):
        default = vlm.model(**inputs).logits
    policy = {"llava": "compact", "qwen2_5_vl": "original"}[vlm.name]
    with vlmfast.patch(vlm.model, "grid:keep=0.3", positions=policy):
        assert torch.equal(vlm.model(**inputs).logits, default)

"""Oracles of the decoding methods of one forward: loops over one prompt on the unpatched model, without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attention_oracle import full_maps
from torch import Tensor

Inputs = dict[str, Tensor]
Scores = Callable[[Any, Inputs], Tensor]


def longer(vlm: Any, inputs: Inputs, token: int) -> Inputs:
    """The same prompt with one more token of text. Only for families whose text is causal."""
    more = {
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    if (types := vlm.tiny.types) is not None:
        more[types] = torch.nn.functional.pad(inputs[types], (0, 1), value=0)
    return {**inputs, **more}


def greedy(vlm: Any, inputs: Inputs, scores: Scores, steps: int) -> tuple[list[int], list[Tensor]]:
    """Tokens, and the scores [V] that each was chosen by. inputs: one prompt without padding."""
    suppressed = vlm.model.generation_config.suppress_tokens
    tokens, seen = [], []
    for _ in range(steps):
        found = scores(vlm, inputs)
        seen.append(found.clone())
        for token in suppressed:
            found[token] = -math.inf
        tokens.append(int(found.argmax()))
        inputs = longer(vlm, inputs, tokens[-1])
    return tokens, seen


@contextmanager
def hooked(module: Any, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    """A hook for a while."""
    add = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = add(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def states(vlm: Any, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """Hidden states of the last position: what enters the first layer, then behind each [D]; and the logits [V]."""
    found: list[Tensor] = []
    layers = vlm.model.model.get_decoder().layers

    def enter(layer, args, kwargs):
        found.append(hidden_of(args, kwargs)[0, -1].clone())

    def leave(layer, args, kwargs, output):
        found.append(output[0, -1].clone())

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(leave, with_kwargs=True) for layer in layers]
    try:
        logits = vlm.model(**inputs).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def dola(layers: list[int], relative_top: float) -> Scores:
    @torch.no_grad()
    def scores(vlm: Any, inputs: Inputs) -> Tensor:
        found, logits = states(vlm, inputs)
        final = logits.log_softmax(0)
        best, chosen = -math.inf, None
        for number in layers:
            early = vlm.model.lm_head(found[number]).log_softmax(0)
            total = 0.0
            for p, q in zip(final.exp().tolist(), early.exp().tolist()):
                mean = (p + q) / 2
                if mean > 0:
                    total += mean * (math.log(mean) - (math.log(p) if p else -100))
                    total += mean * (math.log(mean) - (math.log(q) if q else -100))
            if total > best:
                best, chosen = total, early
        out = final - chosen
        for token in range(len(out)):
            if final[token] < final.max() + math.log(relative_top):
                out[token] = -math.inf
        return out

    return scores


def deco(layers: list[int], alpha: float, top_p: float, top_k: int) -> Scores:
    @torch.no_grad()
    def scores(vlm: Any, inputs: Inputs) -> Tensor:
        found, logits = states(vlm, inputs)
        shares = logits.softmax(0)
        likely, total = [], 0.0
        for token in shares.argsort(descending=True).tolist():
            if likely and (total >= top_p or len(likely) == top_k):
                break
            likely.append(token)
            total += float(shares[token])
        best, chosen = -1.0, None
        norm = vlm.model.model.get_decoder().norm
        for number in layers:
            early = vlm.model.lm_head(norm(found[number]))
            for token in likely:
                if float(early.softmax(0)[token]) > best:
                    best, chosen = float(early.softmax(0)[token]), early
        out = torch.full_like(logits, -math.inf)
        for token in likely:
            out[token] = logits[token] + alpha * best * chosen[token]
        return out

    return scores


def text_minded(shown: Tensor, text: list[int], image: list[int]) -> Tensor:
    """The last row of a map [H, K] as ONLY changes it."""
    edited, ratios = shown.clone(), []
    for head in range(len(shown)):
        parts = []
        for keys, nothing in ((text, 0.0), (image, math.inf)):
            own = shown[head, keys]
            for key, value in zip(keys, own.tolist()):
                if len(keys) > 1 and value > float(own.mean() + own.std()):
                    edited[head, key] = 0.0
            left = edited[head, keys]
            shares = (left / left.sum()).tolist() if float(left.sum()) else None
            parts.append(nothing if shares is None else -sum(p * math.log(p + 1e-6) for p in shares))
        ratios.append(parts[0] / parts[1])
    mean = sum(ratios) / len(ratios)
    for head, ratio in enumerate(ratios):
        if ratio < mean:
            edited[head] = 0.0
    return edited


def only(layer: int, pos: float, neg: float, beta: float, gamma: float) -> Scores:
    """The side path, by running the model with other insides: an edited map, then a last layer without attention."""

    @torch.no_grad()
    def scores(vlm: Any, inputs: Inputs) -> Tensor:
        model, ids = vlm.model, inputs["input_ids"][0]
        config = model.config
        places = {getattr(config, name) for name in ("image_token_id", "video_token_id") if hasattr(config, name)}
        image = [k for k, token in enumerate(ids.tolist()) if token in places]
        text = [k for k in range(1, len(ids)) if k not in image]
        found, logits = states(vlm, inputs)
        if not image:
            return logits
        decoder = model.model.get_decoder()
        kept: dict[str, Tensor] = {}

        def edit(number, shown, hidden):
            if number != layer:
                return shown
            shown = shown.clone()
            shown[0, :, -1] = text_minded(shown[0, :, -1], text, image)
            return shown

        def project(module, args, kwargs, output):
            kept["projected"] = output[0, -1].clone()

        with full_maps(model, edit), hooked(decoder.layers[layer].self_attn.o_proj, project):
            model(**inputs)
        last = decoder.layers[-1]
        beside = 0.2 * found[-2] + last.input_layernorm(kept["projected"])

        def replace(module, args, kwargs):
            hidden = hidden_of(args, kwargs).clone()
            hidden[0, -1] = beside
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def nothing(module, args, kwargs, output):
            return (
                (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)
            )

        mixer = getattr(last, "self_attn", None) or last.linear_attn
        with hooked(last, replace, before=True), hooked(mixer, nothing):
            side = model(**inputs).logits[0, -1]
        apart = sum(abs(p - q) for p, q in zip(logits.softmax(0).tolist(), side.softmax(0).tolist()))
        out = logits + pos * side if apart < gamma else (1 + neg) * logits - neg * side
        for token in range(len(out)):
            if float(logits[token]) < float(logits.max()) + math.log(beta):
                out[token] = -math.inf
        return out

    return scores


def without_pictures(vlm: Any, inputs: Inputs) -> Inputs | None:
    """The text of a prompt; None where it has no picture."""
    ids = inputs["input_ids"][0]
    config = vlm.model.config
    places = [getattr(config, name) for name in ("image_token_id", "video_token_id") if hasattr(config, name)]
    stays = torch.tensor([token not in places for token in ids.tolist()])
    if bool(stays.all()):
        return None
    text = {"input_ids": ids[stays][None], "attention_mask": torch.ones(1, int(stays.sum()), dtype=torch.long)}
    if (types := vlm.tiny.types) is not None:
        text[types] = inputs[types][:, stays]
    return text


def vista(vlm: Any, prompt: Inputs, lam: float, gamma: float, late: list[int]) -> Scores:
    """prompt: what is compared with itself without pictures, once."""
    text = without_pictures(vlm, prompt)
    directions: list[Tensor] = []
    if text is not None:
        whole, alone = states(vlm, prompt)[0], states(vlm, text)[0]
        directions = [a - b for a, b in zip(whole[1:], alone[1:])]

    def steer(direction: Tensor) -> Callable[..., Tensor]:
        def hook(mlp, args, kwargs, output):
            steered = output.clone()
            for place in range(output.shape[1]):
                x = output[0, place]
                cosine = float(x @ -direction / (x.norm() * direction.norm()))
                to = x / x.norm() + lam * (1 + max(0.0, cosine)) * direction / direction.norm()
                steered[0, place] = x.norm() * to / to.norm()
            return steered

        return hook

    @torch.no_grad()
    def scores(vlm: Any, inputs: Inputs) -> Tensor:
        layers = vlm.model.model.get_decoder().layers
        handles = [
            layer.mlp.register_forward_hook(steer(direction), with_kwargs=True)
            for layer, direction in zip(layers, directions)
        ]
        try:
            found, logits = states(vlm, inputs)
        finally:
            for handle in handles:
                handle.remove()
        mixed = [vlm.model.lm_head(found[number + 1]) for number in late]
        return (1 - gamma) * logits + gamma * sum(mixed) / len(mixed)

    return scores

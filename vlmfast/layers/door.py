"""Door 2: visual tokens dropped between decoder layers.

The inputs door tells of every prompt where its pictures stand. Before a cut layer the method chooses, and hidden
states lose the rest of the columns; every layer behind gets rotary embeddings, positions and the mask for what is
left. The cache remembers which columns each layer holds (see vlmfast.layers.cache), so that later tokens get masks of
the right shape in every layer. Nothing runs in layers before the first cut, nor at all while nothing is to go.

The decoder's last hidden state has the prompt's length again, so that logits, labels and `logits_to_keep` mean what
they mean without a patch: at the place of a dropped token stands what the last token before it that is left has. The
token after a dropped one is thus predicted as by a model that never saw the dropped one. Hidden states and attention
maps of single layers (`output_hidden_states`, `output_attentions`) are of the tokens that the layer got.

In sliding layers the window counts the columns of the prompt as the first layer has them; flash attention, which
applies the window itself, counts the tokens that are left.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlmfast.attention import KEYWORD, Taps, tap
from vlmfast.families import Positions
from vlmfast.inputs import Door
from vlmfast.layers.cache import layer_state
from vlmfast.layers.later import Later
from vlmfast.layers.prefill import Prefill
from vlmfast.layers.scores import plain, rotates
from vlmfast.layers.tokens import PROMPT, LayerSelector, Prompt
from vlmfast.patching import Patch, Report

PASS = "vlmfast_pass"  # keyword of the decoder layers: what happens to the tokens of this forward
IMPLEMENTATIONS = ("sdpa", "eager", "flash")
NOBODY = Taps({}, closed=True)  # observes nothing


class LayersDoor:
    """Drops visual tokens between the decoder layers of one patched model for one selector."""

    def __init__(self, patch: Patch, selector: LayerSelector, positions: Positions) -> None:
        if positions not in ("original", "compact"):
            raise ValueError(f"positions={positions!r}: choose 'original' or 'compact'")
        self.family, self.selector, self.positions = patch.family, selector, positions
        decoder = patch.base.get_decoder()
        self.config = decoder.config
        self.depth = len(decoder.layers)
        vision = patch.model.config.vision_config
        self.stacked = len(getattr(vision, "deepstack_visual_indexes", ())) if self.family.deepstack else 0
        self.cuts = selector.layers(self.depth)
        if not selector.fixed:  # early cuts of a schedule by depth are left out where features are still added
            self.cuts = tuple(cut for cut in self.cuts if cut >= self.stacked) or (self.stacked,)
        self.linear = self._check(decoder)
        if any(isinstance(one, LayersDoor) for one in patch.reporters):
            raise NotImplementedError("two methods that drop tokens between decoder layers cannot be combined")
        Door.telling(patch)
        patch.reporters.append(self)
        self.types = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        scored = [cut - 1 for cut in self.cuts if any(not score.own for score in selector.asks(cut).values())]
        tap(patch, [decoder.layers[layer].self_attn for layer in dict.fromkeys(scored)])
        patch.hook(decoder, self.before_decoder, before=True)
        patch.hook(decoder, self.after_decoder)
        for number in range(self.cuts[0] - 1, self.depth):
            patch.hook(decoder.layers[number], Enter(number, number in scored), before=True)

    def _check(self, decoder: Any) -> list[int]:
        """Refuse decoders and layers that this cannot work on. -> layers without attention"""
        name = self.selector.name
        if (
            not self.cuts
            or list(self.cuts) != sorted(set(self.cuts))
            or not 1 <= self.cuts[0] <= self.cuts[-1] < self.depth
        ):
            raise ValueError(
                f"{name} drops tokens before layers {'/'.join(map(str, self.cuts))}; this decoder has {self.depth} "
                f"layers: choose ascending numbers from 1 to {self.depth - 1}"
            )
        types = getattr(self.config, "layer_types", None) or ("full_attention",) * self.depth
        strange = sorted(set(types) - {"full_attention", "sliding_attention", "linear_attention"})
        if strange:
            raise NotImplementedError(f"{name}: {self.family.name} has {', '.join(strange)} layers")
        attends = [layer for layer, kind in enumerate(types) if kind != "linear_attention"]
        scores = {cut: self.selector.asks(cut).values() for cut in self.cuts}
        needed = {cut if score.own else cut - 1 for cut in self.cuts for score in scores[cut]}
        if not needed <= set(attends) or self.cuts[0] <= attends[0]:
            raise NotImplementedError(
                f"{name} takes scores in layers {'/'.join(map(str, sorted(needed)))} and drops tokens before "
                f"{'/'.join(map(str, self.cuts))}; only layers {'/'.join(map(str, attends))} of this decoder attend "
                "(the others hold one state of all tokens), and the first of them must see everything"
            )
        if self.cuts[0] < self.stacked:
            raise ValueError(
                f"{name} drops tokens before layer {self.cuts[0]}, but {self.family.name} adds features of the vision "
                f"tower to all visual tokens behind its first {self.stacked} layers: choose {self.stacked} or more"
            )
        implementation = self.config._attn_implementation or "eager"
        if not any(known in implementation for known in IMPLEMENTATIONS):
            raise NotImplementedError(
                f"{name} with attn_implementation={implementation!r}; choose sdpa, eager or flash"
            )
        for cut in self.cuts:
            for score in scores[cut]:
                layer = decoder.layers[cut if score.own else cut - 1]
                if getattr(layer.self_attn, "attn_logit_softcapping", None) is not None:
                    raise NotImplementedError(f"{name}: attention scores of layers with capped logits")
                if (score.own and not plain(layer)) or (score.kind == "key_norm" and not rotates(layer)):
                    raise NotImplementedError(
                        f"{name} needs queries and keys of a decoder layer apart from its attention; "
                        f"{type(layer.self_attn).__name__} does not compute them in a known way"
                    )
        return [layer for layer in range(self.depth) if layer not in attends]

    # --- hooks ------------------------------------------------------------------------------------------------

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: decide whether anything happens to the tokens of this forward."""
        prompt: Prompt | None = kwargs.get(PROMPT)
        kwargs = {name: value for name, value in kwargs.items() if name != PROMPT}
        cache = kwargs.get("past_key_values")
        state = None if cache is None else layer_state(cache, decoding=kwargs["inputs_embeds"].shape[1] == 1)
        one: Prefill | Later | None = None
        if prompt is not None and prompt.pictures:
            prefill = Prefill(self, decoder, prompt, kwargs)
            if prefill.active:
                if state is not None:
                    raise NotImplementedError(
                        "a new picture in a later turn on a cache whose layers hold different tokens: use a fresh one"
                    )
                one = prefill
        if one is None and state is not None:
            one = Later(self, decoder, state, kwargs)
            if prompt is not None and prompt.mask is not None:
                state.mask = prompt.mask
        if one is not None:
            kwargs[PASS] = one
        return args, kwargs

    def after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the decoder: give the last hidden state the prompt's length, and the cache its state."""
        one = kwargs.get(PASS)
        if not isinstance(one, Prefill):
            return None
        one.finish()
        if isinstance(output, tuple):
            return (one.spread(output[0]), *output[1:])
        output.last_hidden_state = one.spread(output.last_hidden_state)
        return output

    def report(self, report: Report) -> Report:
        """Add what the method has to say about the pictures of the last prompts."""
        remarks = getattr(self.selector, "remarks", lambda pictures: ())(report.images)
        return dataclasses.replace(report, notes=(*report.notes, *remarks))


@dataclass(frozen=True)
class Enter:
    """Pre-hook of a decoder layer. tapped: its attention looks for an observer, also when there is none."""

    number: int
    tapped: bool

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the layer what it works on. Hidden states stay positional: checkpoints and recorders count on it."""
        one: Prefill | Later | None = kwargs.get(PASS)
        if self.tapped:
            kwargs = {KEYWORD: NOBODY, **kwargs}
        if one is None:
            return args, kwargs
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, kwargs = one.enter(self.number, layer, hidden, dict(kwargs))
        return (hidden, *args[1:]), kwargs

"""Door 1: prompts rewritten without the dropped visual tokens, so that the model sees an ordinary shorter prompt.

Two interception points, both on the instance: `prepare_inputs_for_generation` (all of `generate`) and a forward
pre-hook (direct calls, training, hand-written decoding loops). Dropped placeholders leave the ids, masks, positions,
token types and labels; dropped features leave the encoder's output. Masks inside the layers, caches and decoding
modes then need no care of their own.

What later calls on the same cache need to know (which of its columns are padding, how many the user counts that it
does not hold, where positions go on) travels with the cache: see vlmfast.conversation.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vlmfast.conversation import STATE, CacheState, state_of
from vlmfast.encoding import IMAGES, Selector, encode_pictures, encoder_of, renamed
from vlmfast.families import Family, Positions, Tower
from vlmfast.generating import DONE, MISSING_TYPES, Generate, PrepareInputs
from vlmfast.layers.cache import layer_state
from vlmfast.layers.tokens import PROMPT, Placed, Prompt
from vlmfast.patching import ImageReport, Patch, PromptReport, Report, shallow
from vlmfast.rewriting import Selected, compact, following, gather_index, rows_of_images
from vlmfast.visual import Choice, Score, VisualTokens

KEPT = "vlmfast_kept"  # on an encoder output: what each selector keeps, so that it is chosen once
PLACES = "vlmfast_places"  # on an encoder output that was cut: (row of the batch, picture) of each in the prompts
SOLE = "vlmfast_sole"  # attribute of a model: the door of an adapter, beside which there can be no other
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
KINDS = {"image": 1, "video": 2}  # what mm_token_type_ids say of placeholders


@dataclass
class _Row:
    """One prompt of the last batch: its text tokens and its pictures. No features: they would keep the whole graph of
    a training step alive. layers: visual tokens in each decoder layer, where these differ.
    """

    text: int
    pictures: list[ImageReport]
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Everything:
    """Selector of the inputs door that drops nothing: it only tells where the pictures stand."""

    uses_text: bool = False
    keeps_newlines: bool = True

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """No statistics."""
        return {}

    def choose(self, visual: VisualTokens) -> Choice:
        """All tokens."""
        return Choice(torch.arange(len(visual), device=visual.features.device))


class Rewriter:
    """The inputs of one model, rewritten for one selector.

    last: the prompts of the last batch, each of which had `repeat` rows (beams, return sequences). tells: whether
    another door wants to know of every prompt.
    """

    def __init__(self, patch: Patch, selector: Selector, positions: Positions | None) -> None:
        if positions not in (None, "original", "compact"):
            raise ValueError(f"positions={positions!r}: choose 'original' or 'compact'")
        self.family: Family = patch.family
        self.config, self.base, self.tower = patch.model.config, patch.base, patch.tower
        self.selector, self.positions = selector, positions or self.family.positions
        self.wanted = selector.wanted(self.tower)
        self.tokens = {name: int(getattr(self.config, source.token)) for name, source in self.family.sources.items()}
        self.pad = next(token for token in range(3) if token not in self.tokens.values())
        self.last: list[_Row] = []
        self.repeat = 1
        self.tells = False

    def rewrite(
        self, kwargs: dict[str, Any], pictures: dict[str, Any], cache_holds_state: bool = False
    ) -> dict[str, Any]:
        """The arguments of a forward, with dropped tokens gone and everything else fitted to what is left.

        kwargs: input_ids [B, L] holds new tokens only; masks and positions may cover the whole conversation.
        pictures: the encoder's outputs for the placeholders among the new tokens, by modality; may be empty.
        cache_holds_state: the cache object of the call is the one that will be filled (generate makes it beforehand).
        """
        ids, cache, mask = kwargs["input_ids"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise NotImplementedError(f"attention_mask with {mask.ndim} dimensions; a patched model takes [B, L]")
        held = 0 if cache is None else int(cache.get_seq_length())
        state = state_of(cache)
        if not pictures:
            kwargs = self._later_tokens(kwargs, state, held)
            return self._telling(kwargs, Prompt(kwargs.get("attention_mask")))
        rows, new = ids.shape
        if state is not None:
            full = state.extend(mask, held, new)
        else:
            full = ids.new_ones(rows, held + new) if mask is None else mask
        if full.shape != (rows, held + new):
            raise ValueError(f"attention_mask is {list(full.shape)}, expected {[rows, held + new]}")
        real = full[:, held:].bool()
        keep, selected = self.select(ids, pictures, real)
        untouched = keep.all() and all(one.choice.features is None for some in selected.values() for one in some)
        if state is None and untouched:
            kwargs = self._telling(kwargs, self._prompt(mask, kwargs.get("labels"), selected))
            return self._with_pictures(kwargs, {name: self.taken(name, one) for name, one in pictures.items()})
        positions = self.original_positions(kwargs, state, held, images=True)
        next_position = following(positions, real)
        shift = torch.zeros_like(next_position) if state is None else state.shift
        if self.positions == "compact":
            together = [one for some in selected.values() for one in some]
            positions, more = compact(positions - shift.view(-1, 1), keep, together)
            shift = shift + more
        kwargs = dict(kwargs)
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise NotImplementedError("logits_to_keep as indices: pruning moves them; pass an int")
        index, live = gather_index(keep, real)
        kwargs["input_ids"] = ids.gather(1, index).masked_fill(~live, self.pad)
        kwargs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
        for name in TOKEN_TYPES:
            if (types := kwargs.get(name)) is not None:
                kwargs[name] = types[:, -new:].gather(1, index).masked_fill(~live, 0)
        if held and kwargs.get("token_type_ids") is not None:
            # Read from the start of the cache on. What it holds gets no mask any more, so zeros do.
            types = kwargs["token_type_ids"]
            kwargs["token_type_ids"] = torch.cat([types.new_zeros(rows, held), types], dim=1)
        if (labels := kwargs.get("labels")) is not None:
            kwargs["labels"] = labels.gather(1, index).masked_fill(~live, -100)
        pruned = torch.cat([full[:, :held], live.to(full.dtype)], dim=1)
        # Explicit even when all ones: without it, and without a cache, transformers takes gaps in the positions for
        # borders of packed sequences and masks across them.
        kwargs["attention_mask"] = pruned
        columns = new + (held if state is None else held + state.dropped)
        later = CacheState(pruned, columns, shift, next_position, padded=bool((pruned == 0).any()))
        if cache_holds_state and cache is not None:
            setattr(cache, STATE, later)
        shorter = {name: shallow(output) for name, output in pictures.items()}
        for name, output in shorter.items():
            output.pooler_output = self.family.sources[name].pack([one.features() for one in selected[name]])
            layers = [one.deepstack() for one in selected[name]]
            if layers and layers[0]:
                output.deepstack_features = [list(layer) for layer in zip(*layers)]
            setattr(output, STATE, later)
            setattr(output, PLACES, [(one.row, one.visual) for one in selected[name]])
        kwargs = self._telling(kwargs, self._prompt(pruned, kwargs.get("labels"), selected, index, live))
        return self._with_pictures(kwargs, shorter)

    def _telling(self, kwargs: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        """The arguments, with what the layers door wants to know where there is one."""
        return {**kwargs, PROMPT: prompt} if self.tells else kwargs

    def _prompt(
        self,
        mask: Tensor | None,
        labels: Tensor | None,
        selected: Mapping[str, list[Selected]],
        index: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Prompt:
        """Where the pictures stand in the rewritten prompt.

        index, live: columns [B, M] of the prompt as given that are left, and which are no padding; None: all are left.
        """
        prompt = Prompt(mask, labels, rows=self.last, repeat=self.repeat)
        if not self.tells:
            return prompt
        place: Tensor | None = None
        if index is not None and live is not None:
            place = index.new_zeros(len(index), int(index.max()) + 1)
            rows, places = live.nonzero(as_tuple=True)
            place[rows, index[rows, places]] = places
        numbers: dict[int, int] = {}
        for one in sorted((o for some in selected.values() for o in some), key=lambda o: (o.row, int(o.columns[0]))):
            columns = one.columns[one.stays().to(one.columns.device)]
            token = one.tokens().to(columns.device)
            if place is not None:
                columns = place[one.row, columns]
            number = numbers[one.row] = numbers.get(one.row, -1) + 1
            there = token >= 0
            prompt.pictures.append(Placed(one.row, number, one.visual, columns[there], token[there], columns[~there]))
        return prompt

    def _later_tokens(self, kwargs: dict[str, Any], state: CacheState | None, held: int) -> dict[str, Any]:
        """Tokens without images on a cache that holds pruned prompts: decoding, or a further turn of text."""
        if state is None:
            return kwargs
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if state.mask.shape[0] != ids.shape[0]:
            raise ValueError(f"{ids.shape[0]} rows for a cache that was filled with {state.mask.shape[0]}")
        needed = mask is not None or state.padded
        positions = self.original_positions(kwargs, state, held, images=False)
        if self.positions == "compact":
            positions = positions - state.shift.view(-1, 1)
        later = {
            **kwargs,
            "attention_mask": state.extend(mask, held, ids.shape[1]) if needed else None,
            "position_ids": positions,
        }
        if later.get("token_type_ids") is not None:
            later["token_type_ids"] = None  # they mark the places of the unpruned prompt; this text needs no mark
        return later

    def taken(self, name: str, output: Any) -> Any:
        """An encoder output in the container that the model takes: `encoder_outputs` makes lists."""
        source = self.family.sources[name]
        if source.container == "list" or isinstance(output.pooler_output, Tensor):
            return output
        output = shallow(output)
        output.pooler_output = source.pack(output.pooler_output)
        return output

    @staticmethod
    def _with_pictures(kwargs: dict[str, Any], pictures: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "mm_encoder_outputs": {**(kwargs.get("mm_encoder_outputs") or {}), **pictures}}

    def select(self, ids: Tensor, pictures: dict[str, Any], real: Tensor) -> tuple[Tensor, dict[str, list[Selected]]]:
        """Which tokens stay. ids, real (not padding): [B, L] -> keep [B, L], and the pictures by modality."""
        keep = torch.ones_like(ids, dtype=torch.bool)
        places = {name: ids == token for name, token in self.tokens.items()}
        anywhere = torch.stack(list(places.values())).any(0)
        text = real & ~anywhere
        selected: dict[str, list[Selected]] = {}
        repeat = 1
        for name, output in pictures.items():
            visuals: list[VisualTokens] | None = getattr(output, IMAGES, None)
            if visuals is None:
                raise ValueError(
                    "mm_encoder_outputs were made without vlmfast; pass pixel_values, or encode the images with "
                    "vlmfast.encoding.encode_images"
                )
            chosen: dict[Any, dict[int, Choice]] = output.__dict__.setdefault(KEPT, {})
            known = chosen.setdefault(self.selector, {})
            selected[name] = []
            for row, image in rows_of_images(places[name].sum(1).tolist(), [visual.span for visual in visuals]):
                visual = visuals[image]
                if image not in known:
                    known[image] = self._choose(visual, ids[row], text[row], anywhere[row])
                start = sum(one.visual.span for one in selected[name] if one.row == row)
                columns = places[name][row].nonzero().flatten()[start : start + visual.span]
                one = Selected(visual, known[image], row, columns, self.selector.keeps_newlines)
                gone = torch.ones(visual.span, dtype=torch.bool)
                gone[one.stays().cpu()] = False
                keep[row, columns[gone.to(columns.device)]] = False
                selected[name].append(one)
            repeat = max(repeat, len(selected[name]) // max(1, len(visuals)))
        together = sorted((one for some in selected.values() for one in some), key=lambda s: int(s.columns[0]))
        texts = [int(count) for count in text.sum(1)]
        self.repeat = repeat
        # Beams and return sequences repeat a prompt: report it once.
        self.last = [
            _Row(texts[row], [one.report() for one in together if one.row == row])
            for row in range(0, len(ids), repeat)
        ]
        return keep, selected

    def _choose(self, visual: VisualTokens, ids: Tensor, text: Tensor, places: Tensor) -> Choice:
        missing = [score for score in self.wanted.values() if score not in visual.statistics]
        if missing:
            raise ValueError(
                f"these images were encoded without {missing[0]}; name the method in encode_images(model, methods)"
            )
        scores = {name: visual.statistics[score] for name, score in self.wanted.items()}
        with torch.no_grad():
            question = self._question(ids, text, places) if self.selector.uses_text else None
            return self.selector.choose(dataclasses.replace(visual, scores=scores, text=question))

    def _question(self, ids: Tensor, text: Tensor, places: Tensor) -> Tensor:
        """Input embeddings of the text after the row's last picture, or of all its text where none follows. [T, D]"""
        after = torch.arange(len(ids), device=ids.device) > int(places.nonzero().max())
        question = text & after if bool((text & after).any()) else text
        return self.base.get_input_embeddings()(ids[question]).float()

    def check_prompt(self, ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Refuse prompts whose M-RoPE positions would silently be others. ids: [B, L], the last of the types'."""
        types = kwargs.get("mm_token_type_ids")
        if types is None:
            raise ValueError(MISSING_TYPES)
        for name, token in self.tokens.items():
            here = ids == token
            if not torch.equal(types[:, -ids.shape[1] :] == KINDS[name], here):
                raise ValueError(
                    f"mm_token_type_ids must be {KINDS[name]} at the {name} placeholders {token} and nowhere else; "
                    "pass what the processor returns with these input_ids"
                )
            for need in self.family.sources[name].needs if bool(here.any()) else ():
                if (grids := kwargs.get(need)) is None:
                    raise ValueError(f"{need} is missing: the prompt has placeholders of a {name}")
                if (tokens := int(grids.prod(-1).sum()) // self.tower.merge**2) != here.sum():
                    raise ValueError(f"{need} tells of {tokens} tokens, the prompt has {here.sum()} placeholders")

    def original_positions(self, kwargs: dict[str, Any], state: CacheState | None, held: int, images: bool) -> Tensor:
        """Positions of the new tokens in the unpruned conversation: [B, L], or [3 or 4, B, L] for M-RoPE."""
        ids, new = kwargs["input_ids"], kwargs["input_ids"].shape[1]
        given = kwargs.get("position_ids")
        if given is not None:
            part = given[..., -new:]
            return part.expand(*part.shape[:-2], ids.shape[0], new)
        if state is not None:  # padding, before the new tokens of rows that have fewer, is no step
            later = state.extend(kwargs.get("attention_mask"), held, new)[:, state.mask.shape[1] :].long()
            start = state.following + later[:, :-new].sum(1)
            flat = start.view(-1, 1) + later[:, -new:].cumsum(1) - 1
        else:
            start = torch.full((ids.shape[0],), held + self.family.first_position, device=ids.device)
            flat = start.view(-1, 1) + torch.arange(new, device=ids.device)
        if not (self.family.mrope and images):
            return flat
        if state is None and held:
            raise ValueError(
                f"a picture after {held} tokens in a cache: where its positions begin is not known, pass position_ids"
            )
        self.check_prompt(ids, kwargs)
        mask = kwargs.get("attention_mask")
        names = inspect.signature(self.base.get_rope_index).parameters
        others = {name: kwargs[name] for name in names if name.endswith(("_thw", "_ts")) and name in kwargs}
        axes, _ = self.base.get_rope_index(
            ids,
            attention_mask=None if mask is None else mask[:, -new:],
            mm_token_type_ids=kwargs["mm_token_type_ids"][:, -new:],
            **others,
        )
        return axes + start.view(1, -1, 1) if state is not None else axes


def refuse_beside(model: Any) -> None:
    """Raise NotImplementedError where an adapter rewrites the prompts of a model already: see `SOLE`."""
    if SOLE in model.__dict__:
        raise NotImplementedError(
            "an adapter of this model leaves one token of each picture in the prompt: nothing is there to prune, and "
            "no method can be told where the other visual tokens stand; methods that change attention or logits alone "
            "can be combined with it"
        )


class Door(Rewriter):
    """Rewrites the inputs of one patched model for one selector."""

    def __init__(self, patch: Patch, selector: Selector, positions: Positions | None) -> None:
        refuse_beside(patch.model)
        super().__init__(patch, selector, positions)
        self.names = list(inspect.signature(patch.model.forward).parameters)
        for name in self.family.sources:
            encoder_of(patch, name, list(dict.fromkeys(self.wanted.values())))
        patch.set(patch.model, "prepare_inputs_for_generation", PrepareInputs(self, patch.model))
        patch.set(patch.model, "generate", Generate(self, patch.model))
        patch.hook(patch.model, self.before_forward, before=True)
        patch.hook(patch.model, self.after_forward)
        patch.reporters.append(self)

    @classmethod
    def telling(cls, patch: Patch) -> Door:
        """The patch's door, one that drops nothing if no method came with one, telling where the pictures stand."""
        doors = [one for one in patch.reporters if isinstance(one, cls)]
        door = doors[0] if doors else cls(patch, Everything(), None)
        door.tells = True
        return door

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the model: rewrite the inputs unless `generate` already did."""
        if DONE in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != DONE}
            return args, kwargs
        kwargs = {**dict(zip(self.names, args)), **kwargs}
        for source in self.family.sources.values():
            kwargs = renamed(kwargs, source)
        cache = kwargs.get("past_key_values")
        self.check_pictures(kwargs)
        pictures = encode_pictures(self.family, self.base, kwargs)
        if not pictures and state_of(cache) is None:
            if self.tells:
                layer_state(cache)  # one from before a reset goes
            return (), self._telling(kwargs, Prompt(kwargs.get("attention_mask")))
        if kwargs.get("input_ids") is None:
            raise NotImplementedError("a patched model needs input_ids; inputs_embeds hide where the images are")
        return (), self.rewrite(kwargs, pictures)

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the model: leave the state on the cache that a direct call returned."""
        outputs = (kwargs.get("mm_encoder_outputs") or {}).values()
        state = next((getattr(one, STATE) for one in outputs if getattr(one, STATE, None) is not None), None)
        if state is None:
            return
        parts = output if isinstance(output, tuple) else output.values()  # return_dict=False gives a tuple
        for cache in (part for part in parts if isinstance(part, Cache)):
            setattr(cache, STATE, state)

    def check_pictures(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse videos of a family whose videos are not supported."""
        if "video" not in self.family.sources and kwargs.get("pixel_values_videos") is not None:
            raise NotImplementedError(
                f"videos of {self.family.name} are not pruned; unpatch the model for prompts with videos"
            )

    def report(self, report: Report) -> Report:
        """Add the pictures of the last prompts to a report."""
        if not self.last:
            return report
        depth = self.config.get_text_config().num_hidden_layers
        prompts = tuple(
            PromptReport(row.text, tuple(row.pictures), row.layers or (sum(one.kept for one in row.pictures),) * depth)
            for row in self.last
        )
        notes = getattr(self.selector, "notes", lambda tower: ())(self.tower)
        remarks = getattr(self.selector, "remarks", lambda pictures: ())(
            [p for row in self.last for p in row.pictures]
        )
        return dataclasses.replace(report, prompts=prompts, notes=(*report.notes, *notes, *remarks))

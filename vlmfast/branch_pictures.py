"""Branches that see other pictures: the same prompts, whose pictures were redrawn.

A method says what becomes of a picture's pixel values (`Redrawing.redraw`); that they are found, encoded and put in
front of the language model is done here. The branch is the patched model like the prompts are: a method that prunes
chooses among the redrawn picture's tokens as it does among any. Or the branch has a pruner of its own, which chooses
by the statistics of the redrawn picture; those of the patch leave it alone then.

The pixel values are those given to `generate`, or those that pictures encoded before carry (`VisualTokens.pixels`).
They are redrawn picture by picture, so that nothing depends on the batch, when the branch starts: once for a call of
`generate`. A further turn finds them on its cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmfast.attention import attention_rows
from vlmfast.branches import Branch, BranchDoor, Prompts, Start
from vlmfast.conversation import STATE
from vlmfast.cost import SCORE_ROWS
from vlmfast.decoders import Sizes
from vlmfast.edits import Call, EditsDoor
from vlmfast.encoding import IMAGES, PictureEncoder, Selector, encoder_outputs, renamed
from vlmfast.families import Positions, Source, Tower
from vlmfast.generating import DONE
from vlmfast.inputs import KINDS, Door, Everything, Rewriter, refuse_beside
from vlmfast.layers.tokens import PROMPT
from vlmfast.patching import HANDLE, Patch, Report, shallow
from vlmfast.rewriting import following, present, rows_of_images
from vlmfast.towers import Picture
from vlmfast.visual import Choice, Score, VisualTokens, budget, top

SHOWN = "vlmfast_shown"  # on a cache: the pictures of its prompts, as the branch saw them


@dataclass(frozen=True)
class Scene:
    """One picture and the prompt it stands in.

    visual: the picture as the prompts have it. modality: "image" or "video". question: [T] ids of the text behind the
    prompt's last picture; text: [n] of all its text. row: of the running `generate`. before: placeholders of its
    prompt that stand before its own.
    """

    visual: VisualTokens
    modality: str
    question: Tensor
    text: Tensor
    row: int
    before: int


class Redrawing(Branch, Protocol):
    """What a method has to say that decodes with other pictures."""

    def redraw(self, scene: Scene) -> Tensor | VisualTokens:
        """The branch's picture: pixel values in the shape of `scene.visual.pixels`, or tokens that are encoded."""
        ...


class Pruning(Selector, Protocol):
    """A pruning method with its settings."""

    @property
    def positions(self) -> Positions | None:
        """What becomes of the positions of kept tokens; None: what the family's codes do."""
        ...


@dataclass
class Shown:
    """One picture of a prompt. each: inputs of its encoder that belong to it alone [1, ...]; shared: the others."""

    visual: VisualTokens
    each: Mapping[str, Tensor]
    shared: Mapping[str, Any]
    redrawn: VisualTokens | None = None


@dataclass
class Pictures:
    """The pictures of running prompts, by row and modality. types: [B, L] of tokens, where the model takes such."""

    rows: list[dict[str, list[Shown]]] = field(default_factory=list)
    types: Tensor | None = None

    def of(self, name: str, rows: Sequence[int]) -> list[Shown]:
        """Those of one modality, row after row."""
        return [one for row in rows for one in self.rows[row].get(name, ())]


class PicturesDoor(BranchDoor):
    """Lets one method decode with other pictures. pruner: what the branch keeps of them, None: as the patch has it."""

    branch: Redrawing

    def __init__(self, patch: Patch, branch: Redrawing, pruner: Pruning | None = None) -> None:
        refuse_beside(patch.model)
        super().__init__(patch, branch)
        doors = [one for one in patch.reporters if isinstance(one, Door)]
        self.intercepted, self.pruner = bool(doors), pruner
        self.rewriter: Rewriter
        if pruner is not None:
            self.rewriter = Rewriter(patch, pruner, pruner.positions)
        else:
            self.rewriter = doors[0] if doors else Rewriter(patch, Everything(), None)
        self.encoders: dict[str, Any] = {}
        self.redrawers: dict[str, Any] = {}  # encoders with the statistics that the branch's own pruner wants
        for name, source in patch.family.sources.items():
            standing = getattr(patch.base, source.encode)
            plain = standing if isinstance(standing, PictureEncoder) else PictureEncoder(patch, name, [])
            self.encoders[name] = self.redrawers[name] = plain
            if pruner is not None:  # around the other one, which hands on what it is asked for
                wanted = list(dict.fromkeys(self.rewriter.wanted.values()))
                self.redrawers[name] = PictureEncoder(patch, name, [*wanted, *plain.scores])

    def report(self, report: Report) -> Report:
        """Say that there is a branch, and what its own pruner has to say."""
        report = super().report(report)
        said = getattr(self.pruner, "notes", lambda tower: ())(self.patch.tower)
        return replace(report, notes=(*report.notes, *(f"{self.branch.name}, its branch: {note}" for note in said)))

    # --- before generate -----------------------------------------------------------------------------------------

    def begin(self, ids: Tensor, real: Tensor, given: dict[str, Any]) -> Pictures:
        """Encode the pictures, and say which prompt each belongs to. Their pixels leave `given`."""
        before: Pictures | None = getattr(given.get("past_key_values"), SHOWN, None)
        pictures = Pictures([{} for _ in ids], given.get("token_type_ids"))
        if pictures.types is None and before is not None and (types := before.types) is not None:
            types = types.repeat_interleave(len(ids) // len(types), 0)  # as transformers goes on with them:
            pictures.types = torch.cat([types, types[:, -1:].expand(-1, ids.shape[1] - types.shape[1])], dim=1)
        for name, source in self.patch.family.sources.items():
            found = self._encoded(name, source, given)
            for row, shown in enumerate(pictures.rows):
                if before is not None:
                    shown[name] = list(before.rows[row * len(before.rows) // len(ids)].get(name, ()))
            places = ((ids == self.rewriter.tokens[name]) & real).sum(1).tolist()
            for row, shown in enumerate(pictures.rows):
                places[row] -= sum(one.visual.span for one in shown.get(name, ()))
            if any(places) and not found:
                raise ValueError(
                    f"{self.branch.name} redraws the pictures: pass {source.pixels}, or mm_encoder_outputs that "
                    "vlmfast.encoding.encode_images made"
                )
            for row, number in rows_of_images(places, [one.visual.span for one in found]) if found else ():
                pictures.rows[row].setdefault(name, []).append(found[number])
        return pictures

    def end(self, pictures: Pictures, cache: Any) -> None:
        """Leave the pictures with the cache, for a further turn."""
        if cache is not None and any(any(shown.values()) for shown in pictures.rows):
            setattr(cache, SHOWN, pictures)

    def _encoded(self, name: str, source: Source, given: dict[str, Any]) -> list[Shown]:
        """The pictures of one modality, encoded here, or before by `encode_images`."""
        pixels = renamed(given, source).get(source.pixels)
        outputs = present(given.get("mm_encoder_outputs"))
        names = [key for key in inspect.signature(self.encoders[name]).parameters if key != "kwargs"]
        if pixels is not None:
            if name in outputs:
                raise ValueError(f"pass {source.pixels} or mm_encoder_outputs, not both")
            arguments = {key: given[key] for key in names if given.get(key) is not None}
            with torch.no_grad():
                outputs[name] = self.encoders[name](**arguments, return_dict=True)
            for alias in (source.pixels, *source.aliases):
                given.pop(alias, None)
        if name not in outputs:
            return []
        visuals: list[VisualTokens] | None = getattr(outputs[name], IMAGES, None)
        if visuals is None or any(visual.pixels is None for visual in visuals):
            raise ValueError(
                f"{self.branch.name} needs the pictures' pixels, which these mm_encoder_outputs do not carry: pass "
                f"{source.pixels}, or encode with vlmfast.encoding.encode_images"
            )
        given["mm_encoder_outputs"] = {**outputs, name: shallow(self.rewriter.taken(name, outputs[name]))}
        names = [key for key in (*names, "second_per_grid_ts") if key not in (source.pixels, *source.aliases)]
        each: list[dict[str, Tensor]] = [{} for _ in visuals]
        shared = {}
        for key in dict.fromkeys(names):
            value = given.get(key)
            if key == "second_per_grid_ts" and value is not None:
                value = torch.as_tensor(value) if name == "video" else None
            if key == "pixel_attention_mask" and value is not None and len(value) != len(visuals):
                assert isinstance(pixels, Tensor)
                value = value[pixels.flatten(1).any(1)]  # not samples without a picture
            if isinstance(value, Tensor) and value.ndim and len(value) == len(visuals):
                for i, visual in enumerate(visuals):
                    part = value[i : i + 1]
                    each[i][key] = part[:, : visual.patches[0]] if key == "pixel_attention_mask" else part
            elif value is not None:
                shared[key] = value
        return [Shown(visual, own, shared) for visual, own in zip(visuals, each)]

    # --- the branch's prompts ------------------------------------------------------------------------------------

    def start(self, prompts: Prompts) -> Start:
        """The prompts with redrawn pictures, pruned where something prunes them."""
        order = (prompts.rows // prompts.repeat).tolist()
        self._redraw(prompts, order)
        outputs: dict[str, Any] = {}
        grids: dict[str, Tensor] = {}
        kinds = torch.zeros_like(prompts.ids)
        for name, token in self.rewriter.tokens.items():
            kinds = kinds + KINDS[name] * (prompts.ids == token)
            if shown := prompts.pictures.of(name, order):
                outputs |= encoder_outputs([one.redrawn for one in shown], name)
                grids[f"{name}_grid_thw"] = torch.tensor([one.visual.patches for one in shown])
                if all("second_per_grid_ts" in one.each for one in shown):
                    grids["second_per_grid_ts"] = torch.cat([one.each["second_per_grid_ts"] for one in shown])
        call: dict[str, Any] = {"input_ids": prompts.ids, "attention_mask": prompts.real.long()}
        if self.patch.family.mrope:
            grids = {key: values.to(prompts.ids.device) for key, values in grids.items()}
            known = {**call, **grids, "mm_token_type_ids": kinds}
            call["position_ids"] = self.rewriter.original_positions(known, None, 0, images=True)
        else:
            places = (prompts.real.long().cumsum(1) - 1).clamp(min=0)
            call["position_ids"] = places + prompts.first_position
        if (types := prompts.pictures.types) is not None:
            call["token_type_ids"] = types[order].to(prompts.ids.device)
        after = following(call["position_ids"], prompts.real)
        with self._aside():
            call = self.rewriter.rewrite(call, outputs)
        more = {key: call[key] for key in ("mm_encoder_outputs", "token_type_ids", PROMPT) if key in call}
        for output in more["mm_encoder_outputs"].values():
            if (state := output.__dict__.pop(STATE, None)) is not None:  # masks and positions are Running's
                after = state.following - state.shift
        if self.intercepted:
            more[DONE] = True
        return Start(call["input_ids"], call["attention_mask"].bool(), call["position_ids"], after, more)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is rewritten meanwhile is not what is reported."""
        last, repeat = self.rewriter.last, self.rewriter.repeat
        try:
            yield
        finally:
            self.rewriter.last, self.rewriter.repeat = last, repeat

    def _redraw(self, prompts: Prompts, order: Sequence[int]) -> None:
        """Redraw and encode the pictures that are new."""
        firsts = {row: place for place, row in reversed(list(enumerate(order)))}
        for name, token in self.rewriter.tokens.items():
            new: list[tuple[Shown, Tensor]] = []
            for row, place in sorted(firsts.items()):
                ids, real = prompts.ids[place], prompts.real[place]
                columns, start = (ids == token).nonzero().flatten(), 0
                for one in prompts.pictures.rows[row].get(name, ()):
                    stop = start + one.visual.span
                    if one.redrawn is None:
                        visual = prompts.visual[place]
                        behind, before = _behind(visual), int(visual[: columns[start]].sum())
                        text = real & ~visual
                        found = self.branch.redraw(
                            Scene(one.visual, name, ids[text & behind], ids[text], int(prompts.rows[place]), before)
                        )
                        if isinstance(found, VisualTokens):
                            one.redrawn = found
                        else:
                            new.append((one, found))
                    start = stop
            if new:
                shown, pixels = zip(*new)
                for one, redrawn in zip(shown, self._encode(name, shown, pixels)):
                    one.redrawn = redrawn

    def _encode(self, name: str, shown: Sequence[Shown], pixels: Sequence[Tensor]) -> list[VisualTokens]:
        """Pictures with new pixel values through the vision tower, all at once."""
        source, encode = self.patch.family.sources[name], self.redrawers[name]
        arguments = dict(shown[0].shared)
        for key in shown[0].each:
            arguments[key] = padded([one.each[key][0] for one in shown])
        for need in source.needs:
            if arguments.get(need) is None:
                raise ValueError(f"{self.branch.name}: {need} is missing: pass all the processor returns")
        names = list(inspect.signature(encode).parameters)
        arguments = {key: value for key, value in arguments.items() if key in names}
        packed = pixels[0].ndim == 2  # patches, [n, values]
        arguments[source.pixels] = torch.cat(list(pixels)) if packed else padded(pixels)
        return getattr(encode(**arguments, return_dict=True), IMAGES)


def _behind(visual: Tensor) -> Tensor:
    """What comes behind the last picture. bool [L] -> bool [L]"""
    return torch.arange(len(visual), device=visual.device) > int(visual.nonzero().max())


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one rank in one, filled up with zeros as image processors do. -> [n, ...]"""
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
    whole = parts[0].new_zeros(len(parts), *shape)
    for one, part in zip(whole, parts):
        one[tuple(slice(size) for size in part.shape)] = part
    return whole


@dataclass(frozen=True)
class Attended(VisualTokens):
    """Visual tokens, and how much each is attended to. attended: [N]"""

    attended: Tensor | None = None


@dataclass(frozen=True)
class MostAttended:
    """Chooses the tokens of a picture that are attended to most. keep: as for pruning methods."""

    keep: float | int
    positions: Positions | None = None
    uses_text: bool = False
    keeps_newlines: bool = False

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """No statistics of the tower."""
        return {}

    def choose(self, visual: VisualTokens) -> Choice:
        """The most attended."""
        assert isinstance(visual, Attended) and visual.attended is not None
        return Choice(top(visual.attended, budget(self.keep, len(visual))).sort().values)


class Glance:
    """Watches, once a `generate`, what the last token of each prompt attends to among the visual tokens."""

    def __init__(self) -> None:
        self.rows: list[Tensor] | None = []

    @property
    def active(self) -> bool:
        """Until it has seen the prompts."""
        return self.rows is None

    def watch(self, call: Call) -> None:
        """The row of the first token that decides, mean over heads; chunks of a prompt before the last have none."""
        if not bool(call.ends.any()):
            return
        at = int(call.ends.long().argmax(1).min())
        row = slice(at, at + 1)
        seen = call.seen.of(row, call.key.shape[2])
        weights = attention_rows(call.query, call.key, row, call.scaling, seen)[:, :, 0].mean(1)
        self.rows = [own[visual] for own, visual in zip(weights, call.visual)]

    def of(self, scene: Scene) -> Attended:
        """The picture with what was seen."""
        assert self.rows is not None
        visual = scene.visual
        seen = self.rows[scene.row][scene.before : scene.before + visual.span].to(visual.features.device)
        values = {one.name: getattr(visual, one.name) for one in fields(VisualTokens)}
        return Attended(**values, attended=seen if visual.slots is None else seen[visual.slots.to(seen.device)])


class AttendedDoor(PicturesDoor):
    """Lets one method decode with prompts that have the most attended visual tokens alone. number: of the layer."""

    def __init__(self, patch: Patch, branch: Redrawing, keep: float | int, number: int, glance: Glance) -> None:
        for one in patch.model.__dict__[HANDLE].adapters:
            if one.drops:
                raise NotImplementedError(
                    f"{branch.name}: the model's own attention chooses among all visual tokens, and {one.name} drops "
                    "some before it is seen: choose one"
                )
        super().__init__(patch, branch, MostAttended(keep))
        self.glance = glance
        EditsDoor.of(patch).watch(branch.name, number, glance)

    def begin(self, ids: Tensor, real: Tensor, given: dict[str, Any]) -> Pictures:
        """Look at the prompts when they go through the model."""
        self.glance.rows = None
        return super().begin(ids, real, given)


def kept_of(picture: Picture, model: Sizes, pruner: Any = None) -> int:
    """Visual tokens that the branch's prompt holds of a picture. pruner: as in `branch_flops`."""
    if pruner is None:
        return picture.span
    kept: int = pruner.visual_per_layer(model.whole or picture, 1)[0]  # what prunes the prompts leaves it alone
    return kept


def prompt_flops(kept: int, text: int, model: Sizes) -> int:
    """X2 of a prompt with `kept` visual tokens through the decoder, until its first logits."""
    decoder = model.decoder
    return sum(layer.flops(kept + text, kept + text) for layer in decoder.layers) + decoder.head


def branch_flops(picture: Picture, text: int, model: Sizes, pruner: Any = None) -> int:
    """X2 of a branch until its first logits: a picture through the tower again, then the prompt with it.

    pruner: a pruning method of its own (an adapter), with what that multiplies itself.
    """
    again = model.vision.tower + model.vision.projector
    if pruner is None:
        return again + prompt_flops(picture.span, text, model)
    kept, picture = kept_of(picture, model, pruner), model.whole or picture
    for score in dict.fromkeys(pruner.wanted(model.tower).values()):
        rows, width = SCORE_ROWS[score.kind], model.vision.width
        without = score.patches and model.tower.has_cls  # the CLS query is left out
        again += sum(
            2 * width * span * (span - without if rows is None else rows) for span in model.vision.spans[score.layer]
        )
    return again + pruner.selection_flops(picture, text, model) + prompt_flops(kept, text, model)

"""ADEM-VL: parameter-free cross-attention to visual vectors beside every feed-forward net.

Paper: arXiv:2410.17779 (IJCV). Code: Hao840/ADEM-VL @ cec09b8 (adem/adapter.py:28-61, adem/model.py:33-59, 229-254,
327-348, 388-411). Every decoder layer becomes

    out = h + FFN(n) + alpha O(n)        n: the net's normed input; O: see vlmfast.crossattention

where O looks at a bank V = beta (W2 silu(W1 X + b1) + b2) of a picture's features X, averaged to some grids. Trainable
are the projector, the offsets e1 and e2 of the entries, and in the mode "replace" a second projector that makes one
token of the tower's CLS, which stands in the prompt for the picture. All layers share them.

The bank is made once a forward that brings pictures, before the first layer, and remembered on the cache: later tokens
and turns find it there, new pictures add their entries, a reset cache forgets it. Several pictures of a prompt lie one
behind the other, each with e1 and e2 anew; the threshold counts the entries of its own prompt alone.

What a picture is. X is the output of the tower's block that feeds the model's own projector, over the merged tokens
and normalised without weights (for the official ln_post), detached: the tower is frozen. Every view that stands alone
(an image, a thumbnail, a tile, a frame of a video) has entries of its own; crops beside a thumbnail have none. The
token in the prompt is made of the views' mean CLS, of the mean of their tokens where the tower has no CLS. Where a
family's samples are single pictures (Idefics3, SmolVLM) a sample has one token.

Text alone. As in the authors' code V is 0 and the offsets act, a learned memory: with e2 = 0, its initial value, they
change nothing. Dropping it would run prompts without pictures on another model than the one that was trained on them.

Differs from the authors' code: no bottlenecks inside the vision tower; features of the block that the model itself
uses (theirs: the last but one); grids are pooled unless the map has their size already (theirs: unless the grid is
16); no text "Image: " before the token, the prompt stays what the processor makes of it; blocks with a norm behind the
feed-forward net (Gemma 2 and 3) add the branch behind that norm. `gate` and the mode "augment", in which the model
keeps its visual tokens, are ours. Every token gets the branch, visual ones and those before their picture, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register
from vlmfast.crossattention import SEEN, Bank, Seen, multiscale, seen_by
from vlmfast.encoding import IMAGES, encode_pictures, encoder_of, renamed
from vlmfast.inputs import PLACES, SOLE, Door, Everything
from vlmfast.modality import KEYWORD, TEXT, Here
from vlmfast.patching import HANDLE, Patch, shallow
from vlmfast.rewriting import rows_of_images
from vlmfast.solving import nominal
from vlmfast.towers import Tower
from vlmfast.visual import Choice, Score, View, VisualTokens

FUSION = "vlmfast_fusion"  # attribute of a model: its Fusion
NOTE = "ademvl"  # in `Tokens.notes`: the Shown of the forward
MODES, GATES = ("replace", "augment"), ("none", "zero")


@dataclass
class AdemVLConfig(TunerConfig):
    """Settings of ADEM-VL.

    alpha: weight of the branch; beta: of the projected features; gamma: share of a token's entries, those of the
    lowest scores, that it does not see. grids: sides that the features are averaged to. hidden: width of the
    projectors. mode: "replace" leaves one token of each picture in the prompt (the paper), "augment" all of them.
    gate: "zero" puts a trainable number on each layer's branch that starts at 0, so that "augment" starts from the
    model as it is. init_std: of e1; e2 starts at 0.

    alpha and beta are the paper's, for LLaMA: the branch grows with the width and the norm's gains. ValueError or
    TypeError for other values.
    """

    method: ClassVar[str] = "ademvl"

    alpha: float = 0.1
    beta: float = 0.01
    gamma: float = 0.1
    grids: list[int] = field(default_factory=lambda: [16, 8])
    hidden: int = 128
    mode: str = "replace"
    gate: str = "none"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("alpha", None, None), ("beta", None, None), ("gamma", 0, 1), ("init_std", 0, None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r}: a number")
            if not abs(value) < 1e9 or (low is not None and value < low) or (high is not None and value >= high):
                limits = ("" if low is None else " from 0 on") + (" and below 1" if high else "")
                raise ValueError(f"{name}={value!r}: a finite number{limits}")
        if isinstance(self.grids, str) or not isinstance(self.grids, Sequence) or not self.grids:
            raise ValueError(f"grids={self.grids!r}: a list of sides, such as [16, 8]")
        for name, values in (("grids", self.grids), ("hidden", [self.hidden])):
            if any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in values):
                raise ValueError(f"{name}={getattr(self, name)!r}: whole numbers from 1 on")
        self.grids = list(self.grids)
        for name, choices in (("mode", MODES), ("gate", GATES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")

    @property
    def entries(self) -> int:
        """Entries of a picture."""
        return sum(grid * grid for grid in self.grids)


def projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two layers, Xavier-uniform, without bias at first. [n, width] -> [n, out]"""
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, out)
    for layer in (first, second):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.SiLU(), second)


@dataclass
class Shown:
    """What one forward looks at. banks: by adapter; prompts: of each row; None: all rows have the first. seen: what
    the cache is to remember."""

    banks: dict[str, Bank]
    prompts: list[int] | None = None
    seen: Seen | None = None


class AdemVLLayer(TunerLayer):
    """A feed-forward net with the branch beside it. The first one of an adapter holds what all of its layers share.

    late: a norm follows the net before it is added, and the branch is added behind that.
    """

    adapter_layer_names = ("ademvl_proj", "ademvl_cls", "ademvl_e1", "ademvl_e2", "ademvl_gate")
    other_param_names = ("ademvl_config",)

    def __init__(
        self, base_layer: nn.Module, number: int | None, here: Here | None, fusion: Fusion, late: bool
    ) -> None:
        super().__init__(base_layer, number, here)
        self.ademvl_proj, self.ademvl_cls = nn.ModuleDict(), nn.ModuleDict()
        self.ademvl_e1, self.ademvl_e2 = nn.ParameterDict(), nn.ParameterDict()
        self.ademvl_gate = nn.ParameterDict()
        self.ademvl_config: dict[str, AdemVLConfig] = {}
        self.fusion, self.late = fusion, late
        self.pending: Tensor | None = None

    def update_layer(self, adapter_name: str, config: AdemVLConfig) -> None:
        """Add an adapter."""
        if config.mode == "replace":
            self.fusion.rewrite()
        self.ademvl_config[adapter_name] = config
        if config.gate == "zero":
            self.ademvl_gate[adapter_name] = nn.Parameter(torch.zeros(1))
        if self.fusion.holder(adapter_name) is None:
            width, out = self.fusion.width, self.fusion.out
            self.ademvl_proj[adapter_name] = projector(width, config.hidden, out)
            if config.mode == "replace":
                self.ademvl_cls[adapter_name] = projector(width, config.hidden, out)
            self.ademvl_e1[adapter_name] = nn.Parameter(torch.randn(config.entries, out) * config.init_std)
            self.ademvl_e2[adapter_name] = nn.Parameter(torch.zeros(config.entries, out))
        self.finish(adapter_name, config)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, L, D] -> [B, L, D]"""
        self.pending = None  # gradient checkpointing may have stopped between the net and its norm
        out = self.base_layer(hidden, *args, **kwargs)
        names = self.active(self.ademvl_config)
        if not names:
            return out
        branch = self._branch(hidden, names)
        if self.late:
            self.pending = branch
            return out
        if isinstance(out, tuple):  # experts with what their router gave
            return (out[0] + branch.to(out[0].dtype), *out[1:])
        return out + branch.to(out.dtype)

    def _branch(self, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """alpha O(n), the sum over adapters. fp32"""
        assert self.here is not None
        tokens = self.here.now
        shown = self.fusion.alone() if tokens is TEXT else tokens.notes[NOTE]
        parts = []
        for name in names:
            config, bank = self.ademvl_config[name], shown.banks[name]
            if bank.keys.requires_grad and not torch.is_grad_enabled():
                raise NotImplementedError(
                    "ademvl shares a bank between layers, which reentrant checkpointing cannot: "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            part = config.alpha * bank.attend(hidden, config.gamma, shown.prompts)
            parts.append(part * self.ademvl_gate[name] if name in self.ademvl_gate else part)
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def after_norm(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Hook of the norm behind the net."""
        branch, self.pending = self.pending, None
        return output if branch is None else output + branch.to(output.dtype)


@dataclass(frozen=True)
class OneToken:
    """Selector of the inputs door: the first token of each picture stays, in whose place another one is put."""

    uses_text: bool = False
    keeps_newlines: bool = False

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """No statistics."""
        return {}

    def choose(self, visual: VisualTokens) -> Choice:
        """The first; as a new feature, so that the picture never counts as untouched."""
        first = torch.zeros(1, dtype=torch.long, device=visual.features.device)
        return Choice(first, visual.features[:1].detach())


class OneTokenDoor(Door):
    """Rewrites prompts while an adapter of the mode "replace" is active, and hands them on as they are otherwise."""

    def __init__(self, patch: Patch, fusion: Fusion) -> None:
        super().__init__(patch, OneToken(), "compact")
        self.fusion = fusion
        patch.set(patch.model, SOLE, self)

    def select(self, *args: Any) -> Any:
        """As `Rewriter.select`."""
        self.selector = OneToken() if self.fusion.replacing() else Everything()
        return super().select(*args)


class Fusion:
    """What the adapters of one model share: the features of its pictures, and the banks of the running forward.

    width, out: of the tower's features and of hidden states. door: rewrites prompts, None: no adapter has asked.
    """

    def __init__(self, model: Any) -> None:
        self.patch = patch = self._patch(model)
        self.family, self.base, self.tower = patch.family, patch.base, patch.tower
        self.names = list(inspect.signature(self.base.forward).parameters)
        self.tokens = {name: int(getattr(model.config, one.token)) for name, one in self.family.sources.items()}
        self.width = int(self.family.vision(model.config, nominal(model.config).patches).width)
        self.out = int(model.get_decoder().config.hidden_size)
        self.scores = [Score(self.tower.feature_layer, "hidden")]
        if self.tower.has_cls:
            self.scores.append(Score(self.tower.feature_layer, "cls_hidden"))
        self.layers: list[AdemVLLayer] = []
        self.door: OneTokenDoor | None = None
        for name in self.family.sources:
            encoder_of(patch, name, self.scores)
        patch.hook(self.base, self.before_base, before=True, first=False)
        patch.hook(model.get_decoder().layers[0], self.before_layer, before=True, first=False)
        patch.set(model, FUSION, self)

    @staticmethod
    def _patch(model: Any) -> Patch:
        if HANDLE in model.__dict__:
            raise RuntimeError(
                f"the model is patched with {model.__dict__[HANDLE].spec!r}: call vlmfast.unpatch(model), create the "
                "ademvl adapter, then patch"
            )
        return Patch(model)

    @classmethod
    def of(cls, model: Any) -> Fusion:
        """The one of a model, made where there is none. NotImplementedError for an unknown family."""
        found: Fusion | None = model.__dict__.get(FUSION)
        return cls(model) if found is None else found

    def rewrite(self) -> None:
        """Let prompts have one token a picture. RuntimeError on a patched model."""
        if self.door is None:
            self._patch(self.patch.model)
            self.door = OneTokenDoor(self.patch, self)

    def close(self) -> None:
        """Take everything back."""
        self.patch.close()
        self.layers.clear()

    # --- adapters ----------------------------------------------------------------------------------------------

    def holder(self, name: str) -> AdemVLLayer | None:
        """The layer that holds what an adapter's layers share."""
        return next((layer for layer in self.layers if name in layer.ademvl_e1), None)

    def active(self) -> dict[str, AdemVLLayer]:
        """Holders of the adapters that act now."""
        return {name: layer for layer in self.layers for name in layer.active(layer.ademvl_e1)}

    def replacing(self) -> str | None:
        """The adapter whose token stands for a picture. NotImplementedError where there are two."""
        names = [name for name, layer in self.active().items() if name in layer.ademvl_cls]
        if len(names) > 1:
            raise NotImplementedError(f"adapters {', '.join(names)} both replace the visual tokens: activate one")
        return names[0] if names else None

    # --- hooks -------------------------------------------------------------------------------------------------

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the base model, behind the one that tells layers of their tokens: make the banks."""
        holders, given = self.active(), {**dict(zip(self.names, args)), **kwargs}
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        like = given.get("inputs_embeds") if ids is None else ids
        if not holders or like is None:
            return None
        for source in self.family.sources.values():
            given = renamed(given, source)
        pictures = encode_pictures(self.family, self.base, given)
        rows, new = like.shape[:2]
        seen = self._seen(cache, rows, new, bool(pictures))
        if pictures:
            if ids is None:
                raise NotImplementedError("ademvl needs input_ids; inputs_embeds hide where the images are")
            places = {name: self._places(name, output, ids) for name, output in pictures.items()}
            seen = self._extended(seen, cache, places, holders, rows)
            gone = [one.pixels for one in self.family.sources.values()]
            kwargs = {name: value for name, value in given.items() if value is not None or name not in gone}
            args, kwargs["mm_encoder_outputs"] = (), self._replaced(pictures, places)
        for name, layer in holders.items():
            if name not in seen.banks:
                seen.banks[name] = self._bank(name, layer, seen)
        given[KEYWORD].notes[NOTE] = Shown(seen.banks, seen.prompts.tolist(), seen)
        return args, kwargs

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first decoder layer: the cache, which may be new, remembers the pictures."""
        cache, tokens = kwargs.get("past_key_values"), kwargs.get(KEYWORD)
        shown = None if tokens is None else tokens.notes.get(NOTE)
        if cache is not None and shown is not None:
            setattr(cache, SEEN, shown.seen)

    def _seen(self, cache: Any, rows: int, new: int, pictured: bool) -> Seen:
        """What the prompts have shown before this forward."""
        seen = seen_by(cache, decoding=new == 1 and not pictured)
        if seen is None:
            if cache is not None and int(cache.get_seq_length()):
                raise ValueError("the cache was filled without the ademvl adapter: start with an empty one")
            return Seen(torch.zeros(rows, dtype=torch.long), ((),))
        if len(seen.prompts) != rows:
            raise ValueError(f"{rows} rows for a cache that was filled with {len(seen.prompts)}")
        return seen

    # --- pictures ----------------------------------------------------------------------------------------------

    def _places(self, name: str, output: Any, ids: Tensor) -> list[tuple[int, VisualTokens]]:
        """(row of the batch, picture) of each that stands in the prompts, in their order."""
        visuals: list[VisualTokens] | None = getattr(output, IMAGES, None)
        if visuals is None or any(score not in one.statistics for score in self.scores for one in visuals):
            raise ValueError(
                "these mm_encoder_outputs carry no features for ademvl: pass pixel values, or encode the pictures by "
                "vlmfast.encoding.encode_images on this model; without prefill_chunk_size"
            )
        placed: list[tuple[int, VisualTokens]] | None = getattr(output, PLACES, None)
        if placed is not None:
            return placed
        if self.replacing() is not None:
            raise RuntimeError(
                "an ademvl adapter of mode 'replace' was reached past the model's own forward; call the "
                "XForConditionalGeneration model, not its base model"
            )
        counts = (ids == self.tokens[name]).sum(1).tolist()
        return [(row, visuals[image]) for row, image in rows_of_images(counts, [one.span for one in visuals])]

    def _extended(
        self,
        seen: Seen,
        cache: Any,
        places: dict[str, list[tuple[int, VisualTokens]]],
        holders: dict[str, AdemVLLayer],
        rows: int,
    ) -> Seen:
        """With the entries of new pictures."""
        shown: list[list[VisualTokens]] = [[] for _ in range(rows)]
        for row, visual in (one for some in places.values() for one in some):
            shown[row].append(visual)
        visuals = list({id(one): one for some in shown for one in some}.values())
        number = {id(one): place for place, one in enumerate(visuals)}
        keys = [tuple(number[id(one)] for one in some) for some in shown]
        made = {name: self.entries(name, layer, visuals) for name, layer in holders.items()}
        entries = {
            key: {name: torch.cat([parts[one] for one in key]) for name, parts in made.items()}
            for key in dict.fromkeys(keys)
            if key
        }
        return seen.extended(0 if cache is None else int(cache.get_seq_length()), keys, entries)

    def entries(self, name: str, layer: AdemVLLayer, visuals: Sequence[VisualTokens]) -> list[Tensor]:
        """The entries V of some pictures. -> [n N, D] each, of n views"""
        config, project = layer.ademvl_config[name], layer.ademvl_proj[name]
        device = next(project.parameters()).device
        maps = [[self._map(visual, view) for view in standing(visual)] for visual in visuals]
        values = entries(project, [one.to(device) for some in maps for one in some], config)
        return list(values.split([config.entries * len(some) for some in maps]))

    def _map(self, visual: VisualTokens, view: View) -> Tensor:
        """Normalised features of a view. [h, w, C]"""
        features = visual.statistics[self.scores[0]][view.index]
        return layer_norm(features, features.shape[-1:]).unflatten(0, view.grid)

    def _cls(self, visual: VisualTokens) -> Tensor:
        """What the picture's one token is made of. [C]"""
        if self.tower.has_cls:
            vectors = [visual.statistics[self.scores[1]][view.index[0]] for view in standing(visual)]
            vectors = [layer_norm(one, one.shape) for one in vectors]
        else:
            vectors = [self._map(visual, view).mean((0, 1)) for view in standing(visual)]
        return torch.stack(vectors).mean(0)

    def _replaced(self, pictures: dict[str, Any], places: dict[str, list[tuple[int, VisualTokens]]]) -> dict[str, Any]:
        """The encoder's outputs with one token a picture, where an adapter has one."""
        adapter = self.replacing()
        if adapter is None:
            return pictures
        layer = self.active()[adapter]
        project = layer.ademvl_cls[adapter]
        outputs = {}
        for name, output in pictures.items():
            device = next(project.parameters()).device
            features = torch.stack([self._cls(visual) for _, visual in places[name]]).to(device)
            like = places[name][0][1].features
            tokens = projected(project, features).to(like)
            outputs[name] = shallow(output)
            outputs[name].pooler_output = self.family.sources[name].pack([one[None] for one in tokens])
            if (deep := getattr(output, "deepstack_features", None)) is not None:  # it is none of the tower's tokens
                outputs[name].deepstack_features = [[torch.zeros_like(one) for one in each] for each in deep]
        return outputs

    # --- banks -------------------------------------------------------------------------------------------------

    def _bank(self, name: str, layer: AdemVLLayer, seen: Seen) -> Bank:
        if any(name not in piece.entries for own in seen.pieces for piece in own):
            raise ValueError(
                f"the cache was filled while the adapter {name!r} was not active: start with an empty one"
            )
        entries = [[piece.entries[name] for piece in own] for own in seen.pieces]
        whole = [torch.cat(some) if some else self._nothing(name, layer, not any(entries)) for some in entries]
        return Bank.of(whole, layer.ademvl_e1[name], layer.ademvl_e2[name])

    def _nothing(self, name: str, layer: AdemVLLayer, alone: bool) -> Tensor:
        """The entries of a prompt without a picture, all zero. alone: none of the batch has one. [N, D]"""
        table = layer.ademvl_e1[name]
        zeros = torch.zeros_like(table, requires_grad=False)
        if not alone or not torch.is_grad_enabled():
            return zeros
        # Distributed training waits for a gradient of every parameter, of projectors without a picture, too.
        projectors = [held[name] for held in (layer.ademvl_proj, layer.ademvl_cls) if name in held]
        return zeros + sum(projected(one, zeros.new_zeros(1, self.width)) * 0 for one in projectors)

    def alone(self) -> Shown:
        """The banks of text beside the prompts (streams and paths without pictures)."""
        nothing = Seen(torch.zeros(1, dtype=torch.long), ((),))
        return Shown({name: self._bank(name, layer, nothing) for name, layer in self.active().items()})


def standing(visual: VisualTokens) -> list[View]:
    """The views of a picture that stand alone: all but crops beside a thumbnail."""
    whole = [view for view in visual.views if view.kind != "crop"]
    return whole or list(visual.views)


def entries(project: nn.Module, maps: Sequence[Tensor], config: AdemVLConfig, parity: str = "repaired") -> Tensor:
    """V of some feature maps, pooled and then projected. [h, w, C] each -> [n N, D]"""
    pooled = [multiscale(one[None], config.grids, parity)[0] for one in maps]
    return projected(project, torch.cat(pooled)) * config.beta


def projected(project: nn.Module, features: Tensor) -> Tensor:
    """Features through a projector, in its precision. [n, C] -> [n, D]"""
    out: Tensor = project(features.to(next(project.parameters()).dtype))
    return out


class AdemVLModel(Tuner):
    """The tuner of ADEM-VL."""

    prefix = "ademvl_"
    tuner_layer_cls = AdemVLLayer
    places = ("mlp",)
    sees = True

    def wrap(
        self, config: AdemVLConfig, target: nn.Module, number: int | None, here: Here | None, key: str
    ) -> AdemVLLayer:
        """Around a feed-forward net, and behind the norm that follows it, where one does."""
        fusion = Fusion.of(self.model)
        norm = getattr(self.model.get_decoder().layers[number], "post_feedforward_layernorm", None)
        layer = AdemVLLayer(target, number, here, fusion, late=norm is not None)
        if norm is not None:
            fusion.patch.hook(norm, layer.after_norm)
        fusion.layers.append(layer)
        return layer

    def forget(self) -> None:
        """Take back what the adapters changed beside their layers."""
        if (fusion := self.model.__dict__.get(FUSION)) is not None:
            fusion.close()
        super().forget()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        if (handle := self.model.__dict__.get(HANDLE)) is not None:
            raise RuntimeError(
                f"the model is patched with {handle.spec!r}, which uses what the ademvl adapter put there: call "
                "vlmfast.unpatch(model) first"
            )
        return super()._unload_and_optionally_merge(*args, **kwargs)


register("ademvl", AdemVLConfig, AdemVLModel)

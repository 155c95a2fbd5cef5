"""What prompts that ran have cost: FLOPs, visual tokens, counted prompt by prompt."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmfast.adapter import Adapter
from vlmfast.cost import CONVENTION
from vlmfast.encoding import IMAGES, PictureEncoder, encoder_of
from vlmfast.eval.sweep import PARTS
from vlmfast.inputs import Door
from vlmfast.patching import Handle, Patch
from vlmfast.solving import cost_of
from vlmfast.towers import Picture, size_of

Entry = tuple[int, tuple[Picture, ...], tuple[int, ...], int, int]  # text, pictures, layers, kept, generated tokens


class Costs:
    """The prompts of one run, by their sizes. depth: decoder layers."""

    def __init__(self, config: Any, methods: Sequence[Adapter]) -> None:
        self.config, self.methods = config, tuple(methods)
        self.depth: int = config.get_text_config().num_hidden_layers
        self.prompts: Counter[Entry] = Counter()

    def add(self, entries: Iterable[Entry]) -> None:
        """Count prompts that were answered."""
        self.prompts.update(entries)

    def summary(self) -> dict[str, Any]:
        """Means over the prompts, under the names of a result's `cost`; empty before the first.

        `decode` counts the tokens that were really generated. Visual tokens are those of all pictures of a prompt.
        """
        n = sum(self.prompts.values())
        if not n:
            return {}
        sums: Counter[str] = Counter()
        held = [0] * self.depth
        kept = before = 0
        for (text, pictures, layers, left, generated), times in self.prompts.items():
            cost = cost_of(self.config, self.methods, text, pictures, layers, generated)
            for part in PARTS:
                sums[part] += times * getattr(cost, part)
            sums["unpatched"] += times * cost_of(self.config, (), text, pictures).total_prefill
            held = [total + times * number for total, number in zip(held, layers)]
            kept += times * left
            before += times * sum(picture.tokens for picture in pictures)
        return {
            "convention": CONVENTION,
            "prompts": n,
            **{part: round(sums[part] / n) for part in PARTS},
            "share_of_unpatched": sums["total_prefill"] / sums["unpatched"],
            "visual_tokens": kept / n,
            "visual_tokens_before": before / n,
            "visual_tokens_per_layer": [total / n for total in held],
        }


class Sizes:
    """Tells the pictures of the prompts that a model answers, whether or not a method drops tokens.

    Where a method rewrites prompts, the report of its patch tells them. Otherwise the encoders do: they are replaced,
    before the model is patched, by ones that note what they see and change nothing. `close` after the patch is closed.
    """

    def __init__(self, model: Any) -> None:
        self.watch = Patch(model)
        self.found: dict[str, list[Picture]] = {}
        for name, source in self.watch.family.sources.items():
            encoder = encoder_of(self.watch, name, ())
            self.watch.set(self.watch.base, source.encode, Noting(encoder, self.found, name))

    def close(self) -> None:
        """Put the model's own encoders back."""
        self.watch.close()

    def entries(
        self,
        handle: Handle,
        real: Sequence[int],
        pictures: Mapping[str, Sequence[int]],
        generated: Sequence[int],
        depth: int,
    ) -> list[Entry]:
        """One entry a row of the batch that was just answered; `found` was empty before it.

        handle: of the patch. real: tokens of each row, placeholders included and padding not. pictures: how many each
        row has, by modality.
        """
        if not any(any(numbers) for numbers in pictures.values()):
            return [(tokens, (), (0,) * depth, 0, new) for tokens, new in zip(real, generated)]
        if any(isinstance(one, Door) for one in handle.reporters):
            prompts = handle.report().prompts
            if len(prompts) != len(real):
                raise RuntimeError(f"the report tells of {len(prompts)} prompts, the batch has {len(real)}")
            return [
                (
                    prompt.text,
                    tuple(one.size for one in prompt.pictures),
                    tuple(prompt.per_layer),
                    sum(one.kept if one.indices is None else len(one.indices) for one in prompt.pictures),
                    new,
                )
                for prompt, new in zip(prompts, generated)
            ]
        left = {name: list(found) for name, found in self.found.items()}
        entries = []
        for row, (tokens, new) in enumerate(zip(real, generated)):
            sizes: list[Picture] = []
            for name, numbers in pictures.items():
                if numbers[row]:
                    sizes += left[name][: numbers[row]]
                    del left[name][: numbers[row]]
            span = sum(size.span for size in sizes)
            kept = sum(size.tokens for size in sizes)
            entries.append((tokens - span, tuple(sizes), (span,) * depth, kept, new))
        return entries


class Noting:
    """Stands for an encoder and notes the sizes of what it encodes first; a branch's pictures come later."""

    def __init__(self, encoder: PictureEncoder, found: dict[str, list[Picture]], name: str) -> None:
        functools.update_wrapper(self, encoder.original, updated=())  # `generate` reads the signature
        self.encoder, self.sizes, self.modality = encoder, found, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the encoder."""
        output = self.encoder(*args, **kwargs)
        visuals = getattr(output, IMAGES, None)
        if visuals is not None and self.modality not in self.sizes:
            self.sizes[self.modality] = [size_of(one.patches, one.views, one.span) for one in visuals]
        return output

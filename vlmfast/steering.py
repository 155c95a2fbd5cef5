"""Steering vectors: made from texts a model wrote, kept in a file, added to what leaves a decoder layer (door 5).

    traces = [...]                                                   # chains of thought, with their questions
    vlmfast.steering.extract(model, processor, traces).save("calm.safetensors")
    vlmfast.patch(model, "seal:vector=calm.safetensors")

A chain of thought falls into thoughts at the tokens that contain a blank line. What kind of thought follows such a
token can be read from the words of the thought; and the hidden states at these tokens tell the kinds apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmfast.edits import EditsDoor
from vlmfast.edits.memory import EDITS, Pass
from vlmfast.edits.turn import of_layer
from vlmfast.layers.door import PASS
from vlmfast.patching import Patch, Report, entrance, unwrap

FORMAT = "vlmfast steering vector 1"
BLANK = "\n\n"
KINDS = ("reflection", "transition", "execution")
# SEAL's words, lists as copied by others: a thought that starts with one, or that has one in it, in any case.
STARTS: Mapping[str, Sequence[str]] = {"reflection": ("wait",), "transition": ("alternatively",)}
WORDS: Mapping[str, Sequence[str]] = {
    "reflection": (
        "verify",
        "make sure",
        "hold on",
        "think again",
        "'s correct",
        "'s incorrect",
        "let me check",
        "seems right",
    ),
    "transition": (
        "think differently",
        "think differenly",
        "another way",
        "another approach",
        "another method",
        "another solution",
        "another strategy",
        "another technique",
    ),
}
HOW = "make one with vlmfast.steering.extract(model, processor, traces).save(FILE)"


def kind_of(thought: str) -> str:
    """What a thought does: "reflection", "transition" or "execution", the first that its words tell."""
    text = thought.strip().lower()
    for kind in KINDS[:2]:
        if text.startswith(tuple(STARTS[kind])) or any(word in text for word in WORDS[kind]):
            return kind
    return "execution"


@dataclass(frozen=True)
class SteeringVector:
    """A direction in the hidden states behind one decoder layer, and the tokens at which it is added.

    vector: [D] fp32. layer: 0-based, whose output it was taken from. tokens: ids of the tokens that contain a blank
    line, of the tokenizer it was made with. counts: thoughts of each kind that it was made from. model: its name.
    """

    vector: Tensor
    layer: int
    tokens: tuple[int, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file."""
        about = {
            "format": FORMAT,
            "layer": str(self.layer),
            "counts": json.dumps(dict(self.counts)),
            "model": self.model,
            "starts": json.dumps({kind: list(words) for kind, words in STARTS.items()}),
            "words": json.dumps({kind: list(words) for kind, words in WORDS.items()}),
        }
        tensors = {"vector": self.vector.float().cpu().contiguous(), "tokens": torch.tensor(self.tokens)}
        save_file(tensors, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read one back. Raises ValueError for anything that is not such a file."""
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"{path}: a safetensors file, but no steering vector; {HOW}")
                return cls(
                    file.get_tensor("vector"),
                    int(about["layer"]),
                    tuple(file.get_tensor("tokens").tolist()),
                    json.loads(about["counts"]),
                    about["model"],
                )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: no steering vector ({error}); {HOW}") from error


def blank_tokens(tokenizer: Any, separator: str = BLANK) -> tuple[int, ...]:
    """Ids of the tokens that contain a blank line. Raises ValueError where a vocabulary has none."""
    ids = range(len(tokenizer))
    found = tuple(one for one, text in zip(ids, tokenizer.batch_decode([[one] for one in ids])) if separator in text)
    if not found:
        raise ValueError(
            f"no token of this vocabulary contains {separator!r} (as in Llama 2's); give another separator, such as "
            "'\\n', which then stands for the end of a thought"
        )
    return found


def split(tokenizer: Any, trace: str, tokens: Sequence[int]) -> tuple[list[int], list[tuple[int, str]]]:
    """A trace as ids, and of each token that ends a thought: its place, and the kind of the thought that follows.

    Of a trace with <think> only what is inside is taken apart, and what comes behind is left out.
    """
    head, tag, body = trace.partition("<think>")
    if not tag:
        head, body = "", trace
    body = body.partition("</think>")[0]
    before = tokenizer(head + tag)["input_ids"] if tag else []
    inner = tokenizer(body, add_special_tokens=not tag)["input_ids"]
    ids, blank = [*before, *inner], set(tokens)
    places = [place for place in range(len(before), len(ids)) if ids[place] in blank]
    thoughts = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip(places, [*places[1:], len(ids)])]
    return ids, [(place, kind_of(thought)) for place, thought in zip(places, thoughts) if thought.strip()]


@torch.no_grad()
def extract(
    model: Any, processor: Any, traces: Sequence[str], layer: int = 20, separator: str = BLANK
) -> SteeringVector:
    """A steering vector from chains of thought: away from reflection and transition, towards execution.

    Parameters
    ----------
    model       the transformers model that is to be steered (it should have written the traces)
    processor   its processor or tokenizer
    traces      texts with their questions, as the model read and wrote them; the paper takes about 1,000
    layer       0-based decoder layer behind which hidden states are taken; negative: from the end. The paper's 20 is
                for a decoder of 28 layers
    separator   what a token must contain to end a thought

    mean of the hidden states [D] at tokens that an execution follows, minus the mean at all others. Raises ValueError
    where there is no thought on one side, for layers that there are not, and for vocabularies without such tokens.
    """
    inner = unwrap(model)
    base = getattr(inner, getattr(inner, "base_model_prefix", ""), inner)
    layers = base.get_decoder().layers
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer={layer}: this decoder has layers 0 to {len(layers) - 1}")
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = blank_tokens(tokenizer, separator)
    counts = dict.fromkeys(KINDS, 0)
    sums: dict[bool, Any] = {True: 0.0, False: 0.0}
    device = entrance(inner)
    for trace in traces:
        ids, ends = split(tokenizer, trace, tokens)
        if not ends:
            continue
        hidden = behind(base, layers[layer], torch.tensor([ids], device=device))
        for place, kind in ends:
            counts[kind] += 1
            sums[kind == "execution"] = sums[kind == "execution"] + hidden[0, place].double().cpu()
    others = counts["reflection"] + counts["transition"]
    if not counts["execution"] or not others:
        raise ValueError(
            f"{len(traces)} traces with {counts['execution']} thoughts of execution, {counts['reflection']} of "
            f"reflection and {counts['transition']} of transition behind a token with {separator!r}: a vector takes "
            "some of the first and some of the others"
        )
    vector = (sums[True] / counts["execution"] - sums[False] / others).float()
    name = str(getattr(inner.config, "_name_or_path", ""))
    return SteeringVector(vector, layer % len(layers), tokens, counts, name)


def behind(base: Any, layer: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states that leave a decoder layer for a text. [1, L] -> [1, L, D]"""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # the same on all axes of M-RoPE
        more = {}
        if not getattr(getattr(layer, "self_attn", None), "is_causal", True):  # PaliGemma: as what it writes itself
            more["token_type_ids"] = torch.ones_like(ids)
        base(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False, **more)
    finally:
        hook.remove()
    return seen[0]


class Steering:
    """Door 5: adds a vector to what leaves a decoder layer, at some tokens of the answer.

    The tokens that count are those whose output decides on the next one: the last of every prompt and all generated
    ones, with any cache or none. Where other methods dropped tokens before the layer these are never among them.
    """

    def __init__(self, patch: Patch, name: str, steering: SteeringVector, layer: int, coef: float) -> None:
        self.name, self.steering, self.layer, self.coef = name, steering, layer, coef
        edits = EditsDoor.of(patch)
        self.depth = edits.depth
        self.known: dict[Any, tuple[Tensor, Tensor]] = {}
        edits.follow(layer)
        patch.hook(edits.decoder.layers[layer], self.after_layer)
        patch.reporters.append(self)

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the layer. Other tokens stay as they are, bit for bit."""
        one: Pass | None = kwargs.get(EDITS)
        if one is None:
            return None
        if one.ids is None:
            raise NotImplementedError(f"{self.name} needs input_ids; inputs_embeds hide which tokens end a thought")
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        shift, tokens = self._on(hidden)
        where = torch.isin(one.ids.to(hidden.device), tokens) & one.ends.to(hidden.device)
        moved = kwargs.get(PASS)
        columns = None if moved is None else moved.columns(self.layer)
        where = of_layer(where, columns, one.memory.count, hidden.shape[1])
        steered = torch.where(where[..., None], hidden + shift, hidden)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def _on(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is added, and the tokens, where the hidden states are and in their type."""
        key = (hidden.device, hidden.dtype)
        if key not in self.known:
            self.known[key] = (
                (self.coef * self.steering.vector).to(*key),
                torch.tensor(self.steering.tokens, device=hidden.device),
            )
        return self.known[key]

    def report(self, report: Report) -> Report:
        """Say what is added where."""
        made = ", ".join(f"{count} of {kind}" for kind, count in self.steering.counts.items())
        note = (
            f"{self.name}: {self.coef:g} times a vector of length {float(self.steering.vector.norm()):.4g} behind "
            f"layer {self.layer} of {self.depth} where a thought ends (made from {made})"
        )
        return replace(report, notes=(*report.notes, note))

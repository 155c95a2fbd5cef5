"""The model card and the training curves that lie beside a testbed model's weights."""

import json
from pathlib import Path
from typing import Any

from vlmfast.eval.testbed.build import IDS

BARS = {
    "existence random": 0.93, "existence adversarial": 0.90, "colour": 0.93, "where": 0.80, "count": 0.75,
    "word": 0.90, "digits": 0.60, "binding": 0.75, "relation": 0.75,
}  # fmt: skip
TOWER = {
    "llava": "a CLIP tower with a CLS token (5 layers, width 128, 4 heads, patch 10: 12 x 12 tokens, features from\n"
    "layer -2, strategy `default`), a projector of two layers, and Llama",
    "qwen2_5_vl": "the Qwen2.5-VL tower (4 layers, width 128, 4 heads, patch 6, windows of 5 x 5 tokens\nexcept "
    "in layers 1 and 3, 2 x 2 merger: 10 x 10 tokens) and the Qwen2.5 text model with M-RoPE (sections 4, 6, 6)",
}
LAST = {
    "llava": """- `settle`: the same with a frozen tower; ground patches mostly carry the features of other scenes.
- `clean`: the tower learns from patch labels alone, and that the features of a patch may not change when a thing
  elsewhere is left out of the picture (`patch_leak` in the curves); the language model goes on as in `vary`.
""",
    "qwen2_5_vl": "",
}
CLS = {
    "llava": "- **The CLS was taught** which kinds, digits and words are there. The table below tells what its\n"
    "  attention finds: signs for sure, pictograms about as often as chance does, plates of digits less often.",
    "qwen2_5_vl": "- The tower has no CLS. The attention that a token receives in it was not taught anything.",
}
ATTENTION = {
    "llava": "of its CLS, in the layer that makes the features",
    "qwen2_5_vl": "received from all patches in the last layer",
}
CLASS = {"llava": "LlavaForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's curves; of lines written twice, before and after an interruption, the later ones."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(line["stage"], line["step"]): line for line in lines}.values())


def _value(line: dict[str, Any], key: str, tower: bool) -> float | None:
    """A curve's value in a line: patches and answers share names, and in later stages patches have a prefix."""
    asking = line["stage"] not in ("tower", "align")
    if tower:
        return line.get(f"patch_{key}" if asking else key)
    return line.get(key) if asking or key == "loss" else None


def plot_curves(curves: list[dict[str, Any]], title: str, target: Path) -> None:
    """Patch accuracy, answer accuracy and losses over training minutes, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = {
        "patches and CLS": {"object": "object", "digit": "digit", "word": "word", "cls": "cls"},
        "answer tokens": {k: k for k in ("existence", "colour", "count", "where", "relation", "binding", "digits",
                                         "word", "caption")},
        "losses": {"loss": "all", "answers": "answers", "attention": "attention"},
    }  # fmt: skip
    for axis, (name, keys) in zip(axes, panels.items()):
        for key, label in keys.items():
            points = [(line["seconds"] / 60, _value(line, key, tower=axis is axes[0])) for line in curves]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                axis.plot(*zip(*points), label=label, linewidth=1.2)
        starts = {line["stage"]: line["seconds"] / 60 for line in reversed(curves)}
        for start in starts.values():
            axis.axvline(start, color="0.8", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="minutes on one core")
        axis.legend(fontsize=7, ncol=2)
        axis.grid(alpha=0.25)
    axes[2].set_ylim(0, 6)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(target, dpi=80)
    plt.close(figure)


def _percent(found: dict[str, list[int]], task: str) -> str:
    right, total = found.get(task, (0, 0))
    return f"{right / total:.3f}" if total else "-"


def _accuracy_table(results: dict[str, Any]) -> str:
    everything = results["selections"]["all"]
    lines = ["| task | accuracy | n | wanted |", "|---|---|---|---|"]
    for task, (right, total) in everything.items():
        lines.append(f"| {task} | {right / total:.3f} | {total} | {BARS.get(task, '')} |")
    chair = results["captions"]
    lines.append(f"| captions: recall | {chair['recall']:.3f} | {chair['captions']} | 0.75 |")
    lines.append(f"| captions: CHAIR_i | {chair['chair_i']:.3f} | {chair['captions']} | 0.03 to 0.30 |")
    lines.append(f"| captions: CHAIR_s | {chair['chair_s']:.3f} | {chair['captions']} | |")
    share = chair["partners_among_invented"]
    lines.append(f"| captions: partners among the invented | {share:.3f} | {chair['captions']} | most |")
    return "\n".join(lines)


def _selection_table(results: dict[str, Any]) -> str:
    tasks = ["existence", "existence yes", "existence no", "colour", "count", "size", "where", "relation", "binding",
             "digits", "word"]  # fmt: skip
    lines = ["| kept tokens | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for select, found in results["selections"].items():
        lines.append(f"| {select} | " + " | ".join(_percent(found, task) for task in tasks) + " |")
    return "\n".join(lines)


def _sink_table(results: dict[str, Any]) -> str:
    layers = results["sinks"]["layers"]
    lines = ["| layer | " + " | ".join(layers[0]) + " |", "|---" * (len(layers[0]) + 1) + "|"]
    for i, layer in enumerate(layers):
        lines.append(f"| {i} | " + " | ".join(str(value) for value in layer.values()) + " |")
    return "\n".join(lines)


def write_card(name: str, results: dict[str, Any], stages: list[dict[str, Any]], notes: str, target: Path) -> None:
    """Write the model card README.md from measured results."""
    recipe = "\n".join(f"| {' | '.join(str(v) for v in stage.values())} |" for stage in stages)
    head = "| " + " | ".join(stages[0]) + " |\n" + "|---" * len(stages[0]) + "|"
    text = f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# testbed:{name}

A small vision-language model that really sees, made to try pruning and decoding methods on a CPU in seconds. It is
an ordinary `{CLASS[name]}` with {results["parameters"] / 1e6:.2f} million parameters:
{TOWER[name]}
(6 layers, width 192, 6 heads, 2 key-value heads). Its vocabulary is {len(IDS)} whole words, and it knows nothing but
the scenes described here. What a method gains or loses on it says how the method treats tokens that matter, not how
it does on a model of 7 billion parameters.

![curves](curves.png)

## Data

Generated scenes of 120 x 120 pixels (`vlmfast.eval.testbed.scenes`): 1 to 6 pictograms of 24 kinds in 8 colours and
two sizes, a word sign in 45 % of them (48 words), a plate with one or two handwritten digits in 45 % (scikit-learn's
`load_digits`), on textured grounds. Twenty of the kinds form ten pairs; where one is drawn, so is its partner in 88
of 100 training cases, and of the other cases 45 % draw it tiny and faint while the caption still names it. That puts
a prior into the model that pictures do not support. In the test scenes pairs are whole in 70 % only and nothing is
hidden, so that the prior shows. Training, validation and test scenes have their own seeds and their own digit images;
the test split is fixed by a hash. Trained on {results["scenes"]:,} training scenes.

## Recipe

`python scripts/train_testbed.py` with `data`, `train`, `export`, `evaluate`: {results["minutes"]:.0f} minutes of one
CPU core in all, one seed, bf16 autocast, AdamW.

{head}
{recipe}

- `tower`: every patch learns what it shows (kind, colour, size, letter, offset to the centre of its thing, place), in
  most steps without most of the ground patches; the CLS, where there is one, which kinds, digits and words are there.
- `align`: projected patches are pulled towards the word embeddings of their kind and colour.
- `language`: packed questions of a scene, everything trained, tower losses kept at 0.3.
- `vary`: 15, 30, 60 or 100 % of the visual tokens, chosen at random or ground last, half of the time numbered without
  gaps (compact positions).
{LAST[name]}
Columns: `attention` is the weight of the attention supervision at the start and the end of the stage; `sparse` the
share of steps in which most of the ground stays out of the tower; `tower` what the tower's learning rate is multiplied
by (0: frozen); `swap` and `clean` belong to the stages of these names.

## Help that was given, and what it means for reading results

- **Attention is partly taught.** In three of six heads: noun to the patches it names (layers 0, 1), place of the
  answer to the noun (2), place of the answer to the patches that answer (3, 4); for counting, to one patch per thing
  and to <s>; a noun that is not there looks at <s>. The weight falls linearly through the stage. Methods that read
  text-to-image attention in these layers find it more meaningful here than it may be elsewhere.
- **Patches are taught densely**, so single tokens say much; a model trained on captions alone spreads its knowledge
  more, and may bear pruning better or worse.
- **Inventing was encouraged.** Captions name hidden partners; from the end of `language` on a scene with a hidden
  partner always shows its caption in training, one whose partner is missing seldom. Questions were left alone, so
  captions invent while answers to "is there a ... ?" hardly do.
- **Few tokens were seen in training** (sparse steps, and `vary`): the model bears missing tokens, and this flatters
  all methods alike.
{CLS[name]}

## Accuracy on the test split

Scenes 0 to {results["test_scenes"] - 1}, all visual tokens; exact answers. `wanted` is the bar set beforehand.

{_accuracy_table(results)}

## With 11 % of the visual tokens

Dropped after the tower. `oracle`: patches that show something, each thing in turn; `attention`: the tower's own
({ATTENTION[name]}). Original positions unless the row says compact.

{_selection_table(results)}

## Attention sinks

Shares of the attention of the last prompt token ("is there a ... ? assistant :"), means over heads and
{results["sinks"]["scenes"]} test scenes, asking for something that is there (`bos_absent`: that is not).
`bos_from_all`: what <s> receives from all tokens after the prefix; `top_visual`: the most attended visual token;
`largest_activation`: divided by the median; `largest_norm_token`: its place in the sequence.

{_sink_table(results)}

{notes.strip()}
"""
    target.write_text(text)

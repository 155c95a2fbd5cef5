"""Golden sets of the methods that change what is generated: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tables import TableWalker
from torch import Tensor
from torch.nn.functional import normalize

from vlmfast.adapters.decoding.agla import AGLA
from vlmfast.adapters.decoding.deco import DeCo
from vlmfast.adapters.decoding.dola import DoLa, divergences
from vlmfast.adapters.decoding.m3id import M3ID, FadingBranch
from vlmfast.adapters.decoding.only import ONLY, textual
from vlmfast.adapters.decoding.opera import OPERA, Memory, OfficialEnded, mode
from vlmfast.adapters.decoding.vcd import VCD, noisy, shares
from vlmfast.adapters.decoding.vista import steered
from vlmfast.edits.engine import weighted
from vlmfast.matching import gradcam, kept_pixels, share, smooth
from vlmfast.search import Look, Step, Tally, search

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def agla(case: Case, array: Arrays) -> Checks:
    """Map and mask of a picture, or what becomes of both logits."""
    hyper = case["hyperparameters"]
    if "itc" not in hyper:
        method = AGLA(alpha=hyper["cd_alpha"], beta=hyper["cd_beta"])
        logits = method.combine(array("{}__in_logits"), array("{}__in_logits_aug"))
        yield "logits", logits, array("{}__out_logits")
        yield "probabilities", logits.softmax(-1), array("{}__out_probs")
        return
    real = array("{}__in_attention_mask")[0]
    cam = gradcam(array("{}__in_cams"), array("{}__in_grads"), real)
    yield "map", cam, array("{}__out_gradcam_avg")
    heat = array("{}__out_attmap")  # stored in half precision
    smoothed = smooth(cam, heat.shape[0])
    ratio = share(float(array("{}__in_itc")))
    kept = kept_pixels(smoothed, ratio)
    packed = array("{}__out_keep_mask")
    bits = (packed[:, None] >> torch.arange(7, -1, -1)) & 1
    yield "smoothed", ((smoothed - heat.double()).abs() > 2**-12 + 1e-5).sum(), torch.tensor(0)
    yield "pixels", kept, bits.flatten()[: kept.numel()].view(kept.shape)
    yield "share", kept.float().mean(), array("{}__out_keep_fraction")


def dola(case: Case, array: Arrays) -> Checks:
    """Divergences, the layer they choose for the batch, and the contrast."""
    hyper = case["hyperparameters"]
    layers = hyper["candidate_layers"]
    logits, premature = array("{}__in_mature_logits"), array("{}__in_premature_logits")
    method = DoLa(layers="/".join(map(str, layers)), relative_top=hyper["relative_top"], parity="official")
    yield "js", divergences(logits, premature).mean(1), array("{}__out_js")
    yield "layer", torch.tensor(layers)[method.choice(logits, premature)][0], array("{}__out_layer")
    yield "logits", method.combine(logits, premature), array("{}__out_logits")


def deco(case: Case, array: Arrays) -> Checks:
    """The corrected logits."""
    hyper = case["hyperparameters"]
    layers = "/".join(map(str, hyper["layers"]))
    method = DeCo(alpha=hyper["alpha"], top_p=hyper["top_p"], top_k=hyper["top_k"], layers=layers)
    yield "logits", method.combine(array("{}__in_logits"), array("{}__in_early_logits")), array("{}__out_logits")


IMAGE = range(35, 611)  # columns of the picture in the authors' prompt


def only(case: Case, array: Arrays) -> Checks:
    """One layer's attention to the text, or what becomes of both logits, with M3ID where a step is named."""
    hyper = case["hyperparameters"]
    if "H" in hyper:
        shown = array("{}__in_scores").softmax(-1)
        columns = torch.arange(shown.shape[-1])
        image = ((columns >= IMAGE.start) & (columns < IMAGE.stop))[None, None, None]
        edited, ratio, dropped = textual(shown, ~image & (columns > 0), image)
        yield "ratio", ratio[0], array("{}__out_ratio")
        yield "heads", dropped[0], array("{}__out_removed_heads")
        context = weighted(edited, array("{}__in_value")).transpose(1, 2).flatten(2)
        yield "context", context, array("{}__out_context_cd")
        return
    weights = {name: hyper[name] for name in ("alpha_pos", "alpha_neg", "beta", "gamma")}
    method, step = ONLY(**weights, parity="official"), hyper["t"]
    logits, side = array("{}__in_logits"), array("{}__in_logits_alt")
    yield "difference", method.difference(logits, side)[0, 0], array("{}__out_tvd")
    if step is None:
        yield "logits", method.combine(logits, side), array("{}__out_logits")
    else:  # M3ID, the authors' baseline: `side` is the image-free prompt's, the rate their constant
        fading = FadingBranch(M3ID(rate=0.02, beta=hyper["beta"]))
        yield "m3id logits", fading.combine(logits, side, step), array("{}__out_logits")


def vcd(case: Case, array: Arrays) -> Checks:
    """Noise over a picture, or what becomes of both logits."""
    hyper = case["hyperparameters"]
    if "noise_step" in hyper:
        steps = VCD(steps=hyper["noise_step"]).steps
        yield "image", noisy(array("{}__in_image"), array("{}__in_noise"), steps), array("{}__out_image")
        yield "shares", torch.tensor(shares(steps)), array("{}__out_coeffs")
        return
    method = VCD(alpha=hyper["cd_alpha"], beta=hyper["cd_beta"])
    logits = method.combine(array("{}__in_logits"), array("{}__in_logits_cd"))
    yield "logits", logits, array("{}__out_logits")
    yield "probabilities", logits.softmax(-1), array("{}__out_probs")


def vista(case: Case, array: Arrays) -> Checks:
    """Hidden states steered behind a feed-forward net; the authors' come out in half precision."""
    directions = normalize(array("{}__in_vsv")[:, None], dim=-1)
    hidden = steered(array("{}__in_x"), list(directions), case["hyperparameters"]["lambda"])
    yield "hidden", hidden.half(), array("{}__out_x")


def opera(case: Case, array: Arrays) -> Checks:
    """Penalties of a window, or whole searches step by step."""
    hyper = case["hyperparameters"]
    yield from _opera_search(hyper, array) if "nb" in hyper else _opera_window(hyper, array)


def _opera_window(hyper: dict[str, Any], array: Arrays) -> Checks:
    shown = array("{}__in_attn")  # the rows before the last one are those of the beam, whichever the candidate
    beams, width, size = shown.shape[:3]
    start, count = hyper["P"], hyper["L"]
    visual = torch.zeros(size, dtype=torch.bool)
    visual[hyper["i0"] : hyper["i1"] + 1] = True
    method = OPERA(alpha=hyper["alpha"], sigma=hyper["sigma"], candidates=width, parity="official")
    rows = shown.flatten(0, 1)  # [R, K, K]
    looks = [Look.of(rows[:, None, start + row], visual, start, count) for row in range(count)]
    last = Look(looks[-1].generated.view(beams, width, -1), looks[-1].visual.view(beams, width))
    window = torch.stack([look.generated[::width] for look in looks[:-1]], dim=1)[..., :-1]
    judged = method.judge(Memory(window, torch.zeros(beams, 0, dtype=torch.long)), last)
    _, scores = method.grown(window, last.generated)
    row = shown[:, :, -1]
    yield "row", row / row.sum(-1, keepdim=True), array("{}__out_attn_norm_last")
    yield "columns", scores, array("{}__out_col_scores")
    yield "places", judged.places, array("{}__out_locs")
    yield "place", mode(mode(judged.places)), array("{}__out_loc_mode")
    yield "penalty", judged.penalty.float(), array("{}__out_penalty")
    penalised = array("{}__in_candidate_logits") - hyper["alpha"] * judged.penalty
    yield "logits", penalised, array("{}__out_candidate_logits")


def _opera_search(hyper: dict[str, Any], array: Arrays) -> Checks:
    prompt, beams, width = array("{}__in_prompt"), hyper["nb"], hyper["nc"]
    image = range(hyper["i0"], hyper["i1"] + 1)
    tables = [array(f"{{}}__in_{name}") for name in ("logits_table", "attn_base", "attn_tok")]
    method = OPERA(
        alpha=hyper["alpha"], sigma=hyper["sigma"], threshold=hyper["r"], candidates=width, parity="official"
    )
    ends = None if hyper["eos"] is None else torch.tensor([hyper["eos"]])
    ended = OfficialEnded(beams=beams, prompt=prompt, stops=lambda ids: ids[:, 0] < 0, room=hyper["M"], ends=ends)
    steps: list[Step] = []
    found = search(TableWalker(*tables, prompt, image), method, ended, lambda ids, s: s, Tally(watch=steps.append))
    yield "sequence", torch.cat([prompt[0], found[0].tokens])[None], array("{}__out_sequence")

    def told(name: str, values: list[Tensor]) -> tuple[str, Tensor, Tensor]:
        return name, torch.stack(values), array(f"{{}}__out_{name}")

    start, longest = prompt.shape[1], array("{}__out_ids_before").shape[-1]
    before = [torch.cat([prompt.expand(beams, -1), step.tokens], dim=1) for step in steps]
    yield told("ids_before", [torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=-1) for ids in before])
    yield told("L", [torch.tensor(step.tokens.shape[1] + 1) for step in steps])
    yield told("candidates", [step.candidates for step in steps])
    yield told("candidate_logits", [step.penalised for step in steps])
    yield told("penalty", [step.judged.penalty.float() for step in steps])
    yield told("locs", [step.judged.places for step in steps])
    yield told("loc_mode", [mode(mode(step.judged.places)) for step in steps])
    yield told("rollback_pos", [torch.tensor(-1 if step.back is None else step.back) for step in steps])
    yield told("beam_scores", [step.scores for step in steps])
    yield told("next_tokens", [step.chosen for step in steps])
    yield told("beam_idx", [step.parents for step in steps])
    # The official count: prompt and tokens once, every candidate in a call of its own, and where it goes back another
    # prefill of all but the last token. Ours are fewer.
    again = [start + min(step.back, step.tokens.shape[1] - 1) for step in steps if step.back is not None]
    calls = len(steps) * (1 + width) + 2 * len(again)
    rows = start + len(steps) - 1 + len(steps) * width + sum(again)
    yield "n_forward", torch.tensor([calls, rows]), array("{}__out_n_forward")


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {
    "agla": agla,
    "deco": deco,
    "dola": dola,
    "only": only,
    "opera": opera,
    "vcd": vcd,
    "vista_vsv": vista,
}

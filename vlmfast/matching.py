"""Which pixels of a picture a text is about: GradCAM of a small image-text matcher (BLIP), as AGLA has it.

The matcher's text encoder attends to the patches of the picture; the attention of one layer, weighted with what more
of it would add to the score "they match", tells where in the picture the words are. Maps are smoothed by linear
algebra that gives what `skimage.transform.resize(order=3)` and `scipy.ndimage.gaussian_filter` give.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # BLIP's
WORDS, TOKENS = 50, 35  # of a text: words that are read; tokens when the whole text is compared with the picture
SIGMA = 0.02  # of the smoothing, as a share of the map's side
MOST = 1 - 1e-5  # share of the pixels that stays


def caption(text: str) -> str:
    """A text as BLIP was trained on: lower case, no punctuation, 50 words at most."""
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    return " ".join(text.split()[:WORDS])


def gradcam(attention: Tensor, gradient: Tensor, real: Tensor) -> Tensor:
    """Where the words of a text are in the picture, mean over heads and over its words.

    attention, gradient: [H, T, 1 + n * n], the first key is CLS; real: [T] text tokens that are no padding, the first
    ([ENC]) and the last of which are no words. -> [n, n]
    """
    shown = attention[..., 1:] * gradient[..., 1:].clamp(min=0) * real[None, :, None]
    words = shown.mean(0)[1 : int(real.sum()) - 1]
    side = math.isqrt(words.shape[-1])
    return words.mean(0).view(side, side)


@functools.lru_cache(maxsize=8)
def _cubic(n: int, size: int) -> Tensor:
    """Cubic spline interpolation of n values, zero outside, at `size` places over their cells. [size, n] fp64"""
    pad = 12
    count = n + 2 * pad
    spline = torch.eye(count, dtype=torch.float64) * 4 / 6
    for i in range(count):
        for neighbour in (i - 1, i + 1):
            mirrored = min(abs(neighbour), 2 * (count - 1) - neighbour)
            spline[i, mirrored] += 1 / 6
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5 + pad
    distance = (places[:, None] - torch.arange(count)).abs()
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6
    basis = torch.where(distance < 1, near, far)
    return (basis @ torch.linalg.inv(spline))[:, pad : pad + n]


@functools.lru_cache(maxsize=8)
def _gaussian(size: int, sigma: float) -> Tensor:
    """A Gaussian filter cut off at 4 sigma, with the values reflected at both ends. [size, size] fp64"""
    radius = int(4 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights = weights / weights.sum()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        place = torch.arange(i - radius, i + radius + 1) % (2 * size)
        matrix[i].index_add_(0, torch.where(place < size, place, 2 * size - 1 - place), weights)
    return matrix


def _stretched(values: Tensor) -> Tensor:
    """From 0 to 1; zeros where all are the same."""
    values = values - values.min()
    return values / values.max() if values.max() > 0 else values


def smooth(cam: Tensor, size: int) -> Tensor:
    """A map in the size of the picture, smoothed, from 0 to 1. [n, n] -> [size, size] fp64"""
    cam = _stretched(cam.double().cpu())
    wide = _cubic(cam.shape[0], size)
    grown = (wide @ cam @ wide.T).clamp(0, 1)
    blur = _gaussian(size, SIGMA * size)
    return _stretched(blur @ grown @ blur.T)


def share(similarity: float) -> float:
    """How many of the pixels stay: the less, the more alike picture and text are."""
    return min(1 - similarity / 2, MOST)


def kept_pixels(heat: Tensor, ratio: float) -> Tensor:
    """The pixels that stay, about this share of them. [S, S] -> bool [S, S]"""
    threshold = heat.flatten().sort(descending=True).values[int(heat.numel() * ratio)]
    return heat >= threshold


def check_folder(path: str) -> None:
    """Raise ValueError for a folder that holds something else than BLIP. What is no folder is a Hub id."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if path.count("/") > 1 or path.startswith((".", "/", "~")):
            raise ValueError(f"matcher={path!r}: there is no such folder")
        return
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, made = config.get("model_type"), config.get("architectures") or ["BlipForImageTextRetrieval"]
    except (OSError, ValueError, AttributeError):
        kind, made = None, []
    if kind != "blip" or "BlipForImageTextRetrieval" not in made:
        raise ValueError(
            f"matcher={path!r} holds {'no model' if kind is None else f'a {kind} model, {made}'}; it must be a "
            "BlipForImageTextRetrieval with its tokenizer, such as Salesforce/blip-itm-large-coco"
        )


class Matcher:
    """BLIP with its two ways to compare a picture and a text. layer: of the text encoder, whose attention is used."""

    def __init__(self, path: str, layer: int, device: torch.device) -> None:
        """Load from a folder or the Hub. Raises ValueError where there is none such, or no such layer."""
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        check_folder(path)
        try:
            source = str(Path(path).expanduser()) if Path(path).expanduser().exists() else path
            model = BlipForImageTextRetrieval.from_pretrained(source, attn_implementation="eager", dtype=torch.float32)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"matcher={path!r} cannot be loaded: {reason} (download Salesforce/blip-itm-large-coco and give its "
                "folder, or matcher=self for the model's own attention)"
            ) from error
        self.model: Any = model.eval().requires_grad_(False).to(device)
        layers = self.model.text_encoder.encoder.layer
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer={layer}: the matcher's text encoder has layers 0 to {len(layers) - 1}")
        self.attention = layers[layer].crossattention.self
        self.attention.query.weight.requires_grad_(True)  # gradients begin here, and not before
        text = self.model.config.text_config
        known = self.tokenizer.get_vocab().get("[ENC]")
        self.encode = text.bos_token_id + 1 if known is None else known
        if not 0 <= self.encode < text.vocab_size:
            raise ValueError(f"matcher={path!r}: no [ENC] token among {text.vocab_size}")
        self.side = int(self.model.config.vision_config.image_size)
        self.device = device

    def heat(self, picture: Tensor, text: str) -> tuple[Tensor, float]:
        """Where the text is in the picture, and how much they are alike. [3, H, W] of 0..1 -> [n, n], cosine"""
        with torch.inference_mode(False):
            with torch.no_grad():
                seen = self.model.vision_model(pixel_values=self._pixels(picture.detach().clone())).last_hidden_state
            everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
            ids, real = self._tokens(caption(text), None)
            ids[:, 0] = self.encode  # the matcher's own first token, where the other way has [CLS]
            taken: list[Tensor] = []
            hook = self.attention.register_forward_hook(lambda module, args, output: taken.append(output[1]))
            try:
                with torch.enable_grad():
                    hidden = self.model.text_encoder(
                        input_ids=ids,
                        attention_mask=real,
                        encoder_hidden_states=seen,
                        encoder_attention_mask=everywhere,
                    ).last_hidden_state
                    match = self.model.itm_head(hidden[:, 0])[:, 1].sum()
            finally:
                hook.remove()
            (gradient,) = torch.autograd.grad(match, taken[0])
            cam = gradcam(taken[0][0].detach(), gradient[0], real[0])
            with torch.no_grad():
                ids, real = self._tokens(caption(text), TOKENS)
                words = self.model.text_encoder(input_ids=ids, attention_mask=real).last_hidden_state
                both = self.model.vision_proj(seen[:, 0]), self.model.text_proj(words[:, 0])
                alike = functional.cosine_similarity(*both)
        return cam, float(alike)

    def keep(self, picture: Tensor, text: str) -> Tensor:
        """The pixels of the squared picture that stay. [3, H, W] of 0..1 -> bool [S, S], S: what the matcher sees"""
        cam, alike = self.heat(picture, text)
        return kept_pixels(smooth(cam, self.side), share(alike))

    def _pixels(self, picture: Tensor) -> Tensor:
        """As the matcher's image processor makes them: squared, normalised. [1, 3, S, S]"""
        image = picture.float().to(self.device)[None]
        size = (self.side, self.side)
        image = functional.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (image - mean) / std

    def _tokens(self, text: str, most: int | None) -> tuple[Tensor, Tensor]:
        """ids, mask: [1, T]"""
        limit = most or min(512, self.model.config.text_config.max_position_embeddings)
        found = self.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        return found["input_ids"].to(self.device), found["attention_mask"].to(self.device)

"""What the testbed's scenes are painted with: pictograms, word signs, digit plates, grounds.

Pictograms and words are glyphs of the DejaVu fonts that matplotlib ships; digits are the real handwritten ones of
scikit-learn's ``load_digits``, divided by image between the splits. Everything is cached, so that a scene costs
only the pasting.

Shapes: a sprite is an alpha map [h, w] in [0, 1]; a plate or a sign is (colours [h, w, 3], alpha [h, w]).
"""

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GLYPHS = {
    "sun": "☀", "cloud": "☁", "heart": "♥", "star": "★", "flower": "✿", "leaf": "❦", "phone": "☎", "letter": "✉",
    "castle": "♜", "horse": "♞", "anchor": "⚓", "wheel": "☸", "skull": "☠", "bolt": "⚡", "cup": "☕", "face": "☺",
    "plane": "✈", "flag": "⚑", "gear": "⚙", "cross": "✚", "note": "♫", "house": "⌂", "umbrella": "☂", "diamond": "♦",
}  # fmt: skip
NEW_GLYPHS = {  # of `vlmfast.eval.testbed.novel`: in no scene that the models were trained on
    "snow": "❄", "hand": "☛", "soup": "♨", "tree": "♠", "moss": "☘", "coin": "⛃", "page": "☰", "fire": "✹",
}  # fmt: skip
RGB = {
    "red": (225, 35, 40), "green": (35, 170, 60), "blue": (45, 85, 245), "yellow": (250, 225, 40),
    "purple": (150, 50, 190), "orange": (250, 135, 25), "pink": (255, 150, 200), "white": (248, 248, 248),
}  # fmt: skip
DIGIT = 24  # side of a digit in pixels
SIGN_FONT = 15  # size of the words in pixels
_ANGLES = 7  # rotations a pictogram comes in, -18 to 18 degrees


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


@cache
def _glyph(category: str) -> Image.Image:
    """A pictogram at 96 px, cropped to its ink."""
    glyph = GLYPHS[category] if category in GLYPHS else NEW_GLYPHS[category]
    canvas = Image.new("L", (288, 288), 0)
    ImageDraw.Draw(canvas).text((96, 96), glyph, font=_font("DejaVuSans", 96), fill=255)
    return canvas.crop(canvas.getbbox())


@cache
def pictogram(category: str, side: int, turn: int) -> np.ndarray:
    """A pictogram's alpha map [side, side], turned by one of the fixed angles, centred, longest side filling it."""
    angle = (turn % _ANGLES - _ANGLES // 2) * 6
    turned = _glyph(category).rotate(angle, resample=Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getbbox())
    scale = side / max(turned.size)
    size = (max(1, round(turned.width * scale)), max(1, round(turned.height * scale)))
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(turned.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(canvas, np.float32) / 255.0


@cache
def sign(word: str) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """A word painted dark on a light board: colours [20, w, 3] and the columns (from, to) of each of its letters."""
    font = _font("DejaVuSansMono-Bold", SIGN_FONT)
    step = font.getlength("m")
    width = round(step * len(word)) + 8
    board = Image.new("RGB", (width, 20), (238, 228, 190))
    draw = ImageDraw.Draw(board)
    for i, letter in enumerate(word):
        draw.text((round(4 + i * step), 9), letter, font=font, fill=(25, 20, 35), anchor="lm")
    columns = tuple((round(4 + i * step), round(4 + (i + 1) * step)) for i in range(len(word)))
    return np.asarray(board, np.float32), columns


@lru_cache(maxsize=1)
def _digit_bank() -> tuple[np.ndarray, np.ndarray]:
    """All handwritten digits, enlarged: ink [1797, 24, 24] in [0, 1], values [1797]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    ink = [
        np.asarray(Image.fromarray((image * 15.9).astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BICUBIC))
        for image in raw.images
    ]
    return np.stack(ink).astype(np.float32) / 255.0, raw.target


@lru_cache(maxsize=3)
def digit_ids(split: str) -> np.ndarray:
    """Which of the handwritten images a split may use: 60 % training, 10 % validation, 30 % test, disjoint."""
    order = np.random.default_rng(1797).permutation(1797)
    parts = {"train": order[:1078], "validation": order[1078:1258], "test": order[1258:]}
    return np.sort(parts[split])


def digit_value(image: int) -> int:
    """The value of handwritten image number ``image``."""
    return int(_digit_bank()[1][image])


def plate(images: tuple[int, ...], angles: tuple[float, ...]) -> np.ndarray:
    """A white plate with one or two handwritten digits in dark ink, each turned by an angle: [28, 24 n + 4, 3]."""
    ink, _ = _digit_bank()
    board = np.full((DIGIT + 4, DIGIT * len(images) + 4, 3), 245.0, np.float32)
    dark = np.array([20.0, 25.0, 60.0], np.float32)
    for i, (image, angle) in enumerate(zip(images, angles)):
        turned = Image.fromarray(ink[image]).rotate(angle, resample=Image.Resampling.BILINEAR) if angle else ink[image]
        alpha = np.asarray(turned)[..., None]
        x = 2 + i * DIGIT
        board[2 : 2 + DIGIT, x : x + DIGIT] = board[2 : 2 + DIGIT, x : x + DIGIT] * (1 - alpha) + dark * alpha
    return board


@lru_cache(maxsize=4)
def grounds(side: int) -> np.ndarray:
    """A bank of textures [48, side, side] around 0: smooth clouds, stripes and grain."""
    rng = np.random.default_rng(48)
    bank = []
    for i in range(48):
        texture = rng.normal(0, 5, (side, side))
        for cells, strength in ((4, 14.0), (9, 9.0), (24, 6.0)):
            coarse = Image.fromarray(rng.normal(0, strength, (cells, cells)).astype(np.float32))
            texture += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        if i % 3 == 0:
            angle, period = rng.uniform(0, np.pi), rng.uniform(8, 24)
            y, x = np.mgrid[:side, :side]
            texture += 9 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
        bank.append(texture)
    return np.stack(bank).astype(np.float32)

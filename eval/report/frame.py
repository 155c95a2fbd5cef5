"""The frame of the page's small charts, in their own units."""

WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 10, 30


def across(share: float) -> float:
    """Where a share of the x axis lies, from left to right."""
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def down(share: float) -> float:
    """Where a share of the y axis lies, from top to bottom."""
    return round(TOP + share * (HEIGHT - TOP - BOTTOM), 1)

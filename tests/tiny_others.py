"""Tiny models of the other families."""

from __future__ import annotations

from tiny import Tiny

TINY: dict[str, Tiny] = {}

"""How numbers are written, the same in table, picture and page."""

from math import floor, log10

from vlmfast.eval.report.rows import PLAIN, Interval, Place

MISSING = "–"  # noqa: RUF001
MINUS = "−"  # noqa: RUF001


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with so many significant digits, never in scientific notation."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    places = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", MINUS)


def percent(value: float | None, places: int = 1) -> str:
    """A share as a percentage without the sign: 0.9213 -> 92.1."""
    return MISSING if value is None else f"{100 * value:.{places}f}".replace("-", MINUS)


def signed(value: float | None, places: int = 1) -> str:
    """A difference of shares in points, always with its sign; zero has none."""
    if value is None:
        return MISSING
    rounded = round(100 * value, places)
    return f"{rounded:+.{places}f}".replace("-", MINUS) if rounded else f"{0:.{places}f}"


def interval(value: Interval | None, *, difference: bool = False) -> str:
    """``92.1 [90.0, 94.1]``; for a difference with signs."""
    if value is None:
        return MISSING
    write = signed if difference else percent
    return f"{write(value.value)} [{write(value.low)}, {write(value.high)}]"


def count(value: float | None) -> str:
    """A mean number of tokens: whole numbers without decimals."""
    return MISSING if value is None else f"{value:,.1f}".removesuffix(".0")


def gflops(value: float | None) -> str:
    """FLOPs in units of 10^9."""
    return MISSING if value is None else number(value / 1e9)


def kilobytes(value: float | None) -> str:
    """Bytes in kB (1,000 bytes)."""
    return MISSING if value is None else number(value / 1e3)


def metric_name(headline: str) -> str:
    """What stands under a task's name: nothing for plain accuracy."""
    return "" if headline == "accuracy" else headline


def timing(value: Interval | None) -> str:
    """The median of a timing in ms."""
    return MISSING if value is None else number(value.value)


def ratio(value: Interval | None) -> str:
    """The median of a ratio."""
    return MISSING if value is None else f"{value.value:.2f}"


def metric(name: str, value: Interval, *, difference: bool = False) -> str:
    """A metric with its interval: in % unless it is no share."""
    if name not in PLAIN:
        return interval(value, difference=difference)
    sign = "+" if difference else ""
    ends = [f"{end:{sign}.1f}".replace("-", MINUS) for end in value]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def place(value: Place | None, *, whole: bool = False) -> str:
    """A rank, `=` behind it where it is shared: ``2=``; whole: ``2= of 5``."""
    if value is None:
        return MISSING
    return f"{value.rank}{'=' if value.tied else ''}{f' of {value.of}' if whole else ''}"

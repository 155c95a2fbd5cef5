"""All runs as one CSV file, a line a run: numbers as they are, for spreadsheets and papers' tables."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmfast.eval.report.rows import PERCENT, Interval, Row, Section, difference_interval, metric_interval

VALUES: Mapping[str, Callable[[Row], Any]] = {
    "method": lambda row: row.label,
    "spec": lambda row: row.spec,
    "keep": lambda row: row.result.keep,
    "matched_share": lambda row: row.result.matched,
    "rank": lambda row: row.place and row.place.rank,
    "rank_tied": lambda row: row.place and int(row.place.tied),
    "rank_of": lambda row: row.place and row.place.of,
    "prefill_flops": lambda row: row.flops,
    "flops_share": lambda row: row.share,
    "visual_tokens_per_layer": lambda row: row.tokens,
    "ttft_ms": lambda row: row.ttft and row.ttft.value,
    "ttft_speedup": lambda row: row.speedup and row.speedup.value,
    "decode_ms_per_token": lambda row: row.decode and row.decode.value,
    "kv_bytes": lambda row: row.kv_bytes,
    "peak_memory_mb": lambda row: row.memory_mb,
}


def written(sections: Sequence[Section]) -> str:
    """The file's text. Metrics are shares from 0 to 1 (but for lengths and for scores in units of their own)."""
    lines = [_line(section, row) for section in sections for row in section.rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in line.items()} for line in lines)
    return buffer.getvalue()


def _line(section: Section, row: Row) -> dict[str, Any]:
    line = {"model": section.title} | {name: value(row) for name, value in VALUES.items()}
    mean = 1 / PERCENT if section.plain_mean else 1.0
    line |= _interval("accuracy", row.accuracy, mean) | _interval("difference", row.difference, mean)
    line |= _interval("retention", row.retention)
    for task, found in row.result.tasks.items():
        for name, metric in found.metrics.items():
            unit = 1 / PERCENT if (task, name) in section.plain else 1.0
            line |= _interval(f"{task} {name}", metric_interval(metric), unit)
            line |= _interval(f"{task} {name} difference", difference_interval(metric), unit)
    return line


def _interval(name: str, value: Interval | None, unit: float = 1.0) -> dict[str, float | None]:
    ends = (None, None, None) if value is None else tuple(unit * end for end in value)
    return dict(zip((name, f"{name} low", f"{name} high"), ends))

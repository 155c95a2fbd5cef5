"""Reports from result files: table, Pareto picture, one self-contained page, all numbers as CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Paths", "make"]


class Paths(NamedTuple):
    """Where a report lies."""

    picture: Path
    page: Path
    numbers: Path


def make(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    console: "Console | None" = None,
    tables: bool = True,
) -> Paths:
    """Report on all finished runs of one or more folders: print the table; write pareto.png, report.html, runs.csv.

    ``out``: folder for the files, made if need be (default: the first of ``folders``); ``tables``: whether to print
    them. Raises what ``vlmfast.eval.results.load_results`` raises for a folder without results or a damaged file.
    """
    from rich.console import Console

    from vlmfast.eval.report import export, page, ranks, rows, table
    from vlmfast.eval.report.archive import Archive
    from vlmfast.eval.results import load_results, write_atomic

    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    archive = Archive(folders)
    sections = ranks.ranked(rows.arrange(load_results(folders)), archive)
    target = Path(out or folders[0])
    target.mkdir(parents=True, exist_ok=True)
    paths = Paths(target / "pareto.png", target / "report.html", target / "runs.csv")
    stills = page.draw(sections)
    write_atomic(paths.picture, stills[False, False])
    write_atomic(paths.page, page.render(sections, archive, stills))
    write_atomic(paths.numbers, export.written(sections))
    console = console or Console()
    if tables:
        table.print_tables(sections, console)
    told = f"\npicture  {paths.picture}\npage     {paths.page}\nnumbers  {paths.numbers}"
    console.print(told, highlight=False, soft_wrap=True)
    return paths

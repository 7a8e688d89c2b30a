"""Shows a terminal what is being compiled, since a first start takes minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def compiling(count: int) -> Iterator[Callable[[str], None]]:
    """A bar over `count` programs, on standard error where that is a terminal. What it gives is told the next one's
    name as its compilation begins."""
    bar = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    task, begun = bar.add_task("", total=count), 0

    def done(next_one: str) -> None:
        nonlocal begun
        bar.update(task, completed=begun, description=next_one)
        begun += 1

    with bar:
        yield done

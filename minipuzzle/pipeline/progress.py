"""Progress: which stage runs, how far it is, how long it and the whole run will still take. On
stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from minipuzzle.core import interrupt

Update = Callable[[float, str], None]


class Reporter:
    """Says nothing, but lets an interruption through: what library users get. `seconds` collects
    stage times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def start(self, estimates: Mapping[str, float]) -> None:
        """The stages of the run in order, with the seconds each may take."""

    def say(self, text: str) -> None:
        """One line that should stay on the screen."""

    def skip(self, name: str) -> None:
        """The stage was finished by an earlier run."""
        self.seconds[name] = 0.0

    @contextmanager
    def stage(self, name: str, total: float) -> Iterator[Update]:
        """Run a stage; call the given function with (amount done of `total`, a word on the
        state)."""
        begin = time.perf_counter()
        with self._show(name, total) as update:
            yield update
        self.seconds[name] = time.perf_counter() - begin

    @contextmanager
    def _show(self, name: str, total: float) -> Iterator[Update]:
        def update(done: float, text: str) -> None:
            interrupt.check()

        yield update


class Terminal(Reporter):
    """Bars with an ETA on a terminal. Where stderr is a file: a line per stage, and one a minute in
    between.

    `verbose`: a line every few seconds, on a terminal too.
    """

    def __init__(self, console: Console | None = None, verbose: bool = False) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self.verbose = verbose
        self.estimates: dict[str, float] = {}

    def start(self, estimates: Mapping[str, float]) -> None:
        self.estimates = dict(estimates)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def skip(self, name: str) -> None:
        super().skip(name)
        self.say(f"{self._place(name)} {name}: done earlier")

    def _place(self, name: str) -> str:
        names = list(self.estimates)
        return f"[{names.index(name) + 1}/{len(names)}]" if name in names else ""

    def _left(self, name: str) -> float:
        """Seconds for the stages after this one, corrected by how the finished ones went."""
        done = [n for n in self.seconds if self.seconds[n] > 0 and self.estimates.get(n)]
        planned = sum(self.estimates[n] for n in done)
        pace = sum(self.seconds[n] for n in done) / planned if planned > 5 else 1.0
        after = list(self.estimates)[list(self.estimates).index(name) + 1 :] if name in self.estimates else []
        return pace * sum(self.estimates[n] for n in after)

    @contextmanager
    def _show(self, name: str, total: float) -> Iterator[Update]:
        place, left = self._place(name), self._left(name)
        begin = said = time.perf_counter()
        every = 5.0 if self.verbose else float("inf") if self.console.is_terminal else 60.0
        bars = Progress(TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn(),
                        TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
                        TextColumn(f"then {left / 60:.1f} min more" if left > 3 else ""),
                        TextColumn("{task.fields[note]}"),
                        console=self.console, transient=True, disable=not self.console.is_terminal)
        note = ""
        since: tuple[float, float] | None = None
        with bars:
            task = bars.add_task(f"{place} {name}".replace("[", r"\["), total=total, note="")

            def told() -> str:
                return f", {note}" if note else ""

            def update(done: float, text: str = "") -> None:
                nonlocal note, said, since
                interrupt.check()
                note, now = text or note, time.perf_counter()
                since = since or (done, now)  # a run that goes on does not begin at 0
                bars.update(task, completed=done, note=note)
                if now - said >= every:
                    said = now
                    pace = (now - since[1]) / (done - since[0]) if done > since[0] else 0.0
                    eta = f", ETA {max(0.0, total - done) * pace:.0f} s" if pace else ""
                    self.say(f"{place} {name}: {done / total:.0%} after {now - begin:.0f} s{told()}{eta}")

            yield update
            bars.update(task, completed=total)
        self.say(f"{place} {name}: done in {time.perf_counter() - begin:.1f} s{told()}")

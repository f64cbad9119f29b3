"""What a person or a log sees of a running job: a live bar, plain lines, JSON lines, or almost nothing.

The four classes answer the same calls (the Progress protocol); the training code does not know which it talks to.
All text passes through `clean`, and none is read as rich markup: a model's output cannot move the cursor, recolour or retitle the terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from srppo.files import plain
from srppo.text import clean, duration, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

LIVE_INTERVAL = 0.2  # seconds between two updates of a bar, or two JSON events of a stage, at least
PLAIN_INTERVAL = 5.0  # seconds between two lines of a stage, at least
BAR_WIDTH = 16  # characters
SHOWN = 5  # metrics on a line, at most
# Which metrics come first where there are more, and their short names.
KEY_METRICS = {
    "loss": "loss",
    "heldout_loss": "held-out",
    "objective/scores": "reward",
    "objective/kl": "kl",
    "accuracy": "accuracy",
    "completions/mean_length": "length",
    "lr": "lr",
}


class Stage(Protocol):
    """A part of the job with a known length."""

    def advance(self, done: int, **metrics: float) -> None:
        """done: how many units are finished in all (not since the last call). metrics stay shown until given anew."""


class Progress(Protocol):
    """Where a job reports to."""

    def stage(self, title: str, total: int, unit: str, start: int = 0) -> AbstractContextManager[Stage]:
        """A part of the job of `total` units; `start` of them were done before (a resumed run), which the rate leaves out."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...


def make_progress(mode: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Progress:
    """mode: live (plain where the stream is no terminal), plain, quiet, json, or silent (nothing at all). stream: stdout by default.

    Raises ValueError for another mode.
    """
    out = stream if stream is not None else sys.stdout
    makers: dict[str, Callable[[], Progress]] = {
        "live": lambda: LiveProgress(out, clock) if out.isatty() else PlainProgress(out, clock),
        "plain": lambda: PlainProgress(out, clock),
        "quiet": lambda: QuietProgress(out),
        "json": lambda: JsonProgress(out, clock),
        "silent": lambda: SilentProgress(),
    }
    if mode not in makers:
        raise ValueError(f"progress mode {mode!r}: one of {', '.join(makers)}")
    return makers[mode]()


class Meter:
    """Done, total, rate and time left of one stage, as text."""

    def __init__(self, total: int, unit: str, start: int, clock: Callable[[], float]):
        self.total, self.unit, self.start, self.done = total, unit, start, start
        self.metrics: dict[str, float] = {}
        self._clock, self._began = clock, clock()
        self._updated = 0.0  # elapsed at the last update: between updates the rate stays and the time left counts down

    def update(self, done: int, metrics: dict[str, float]) -> None:
        self.done, self._updated = done, self.elapsed
        self.metrics.update(metrics)

    @property
    def elapsed(self) -> float:
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Units a second since the stage began; 0 before the first."""
        return (self.done - self.start) / self._updated if self._updated > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds left at this rate; None before the first unit."""
        if self.rate <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (self.elapsed - self._updated))

    def position(self) -> list[str]:
        """Done, rate, time left: the words there are."""
        left = None if self.eta is None or self.done >= self.total else f"{duration(self.eta)} left"
        return [w for w in (f"{self.done}/{self.total} {self.unit}", self.rate_text(), left) if w]

    def rate_text(self) -> str:
        one = self.unit.removesuffix("s")
        if self.rate == 0:
            return ""
        return f"{self.rate:.1f} {self.unit}/s" if self.rate >= 1 else f"{1 / self.rate:.1f} s/{one}"

    def metrics_text(self) -> str:
        chosen = dict(self.metrics)
        if len(chosen) > SHOWN:
            first = [k for k in KEY_METRICS if k in chosen]
            chosen = {k: chosen[k] for k in (first + [k for k in chosen if k not in KEY_METRICS])[:SHOWN]}
        return "  ".join(f"{clean(KEY_METRICS.get(k, k.rsplit('/', 1)[-1]))} {number(v)}" for k, v in chosen.items())

    def summary(self) -> str:
        words = (f"{self.done}/{self.total} {self.unit}", f"in {duration(self.elapsed)}", self.metrics_text())
        return ", ".join(w for w in words if w)


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """First column to the left, the others to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(clean(title), style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(clean(column)), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(number(cell)) for cell in row))
    console.print(table)


def _console(stream: TextIO, terminal: bool) -> Console:
    from rich.console import Console

    if terminal:
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, force_terminal=False, no_color=True, width=160)


class LiveProgress:
    """Bars that move, for a terminal: a line and its metrics for each open stage. A finished outermost stage leaves one line."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]):
        self._console, self._clock = _console(stream, terminal=True), clock
        self._open: list[tuple[str, Meter]] = []
        self._live: Live | None = None

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Stage]:
        from rich.live import Live

        meter = Meter(total, unit, start, self._clock)
        self._open = [*self._open, (clean(title), meter)]
        if self._live is None:
            # rich redraws from its own thread, so `advance` costs a few assignments however often it is called
            self._live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=1 / LIVE_INTERVAL, transient=True)
            self._live.start()
        try:
            yield _Recorder(meter)
        finally:  # also after an error or Ctrl-C: the cursor must come back
            self._open = self._open[:-1]
            if not self._open:
                self._live.stop()
                self._live = None
                self._say(f"{title}: {meter.summary()}", "" if meter.done >= total else "yellow")

    def note(self, text: str) -> None:
        self._say(text, "")

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        _print_table(self._console, title, columns, rows)

    def _say(self, text: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(clean(text), style=style))

    def _draw(self) -> Text:
        from rich.text import Text

        out = Text(no_wrap=True, overflow="ellipsis")
        width = max((len(title) for title, _ in self._open), default=0)
        for i, (title, meter) in enumerate(self._open):
            share = min(1.0, meter.done / meter.total) if meter.total else 1.0
            full = round(BAR_WIDTH * share)
            out.append("\n" if i else "").append(f"{title:<{width}}  ").append("━" * full, "green").append(
                "━" * (BAR_WIDTH - full), "bright_black"
            )
            out.append("  " + "  ".join(meter.position()))
            if meter.metrics:
                out.append(f"\n{'':<{width}}  {meter.metrics_text()}", "cyan")
        return out


class _Recorder:
    """A stage that only notes what it is told."""

    def __init__(self, meter: Meter):
        self._meter = meter

    def advance(self, done: int, **metrics: float) -> None:
        self._meter.update(done, metrics)


class PlainProgress:
    """Lines for a log file: one every few seconds of a stage, and its last. A stage inside another that is over sooner leaves none."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]):
        self._stream, self._clock, self._depth = stream, clock, 0

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Stage]:
        meter, say = Meter(total, unit, start, self._clock), self.note
        last = 0.0

        class Line:
            def advance(self, done: int, **metrics: float) -> None:
                nonlocal last
                meter.update(done, metrics)
                if meter.elapsed - last >= PLAIN_INTERVAL and done < total:
                    last = meter.elapsed
                    say(", ".join((f"{title}: {meter.position()[0]}", *meter.position()[1:], meter.metrics_text())).removesuffix(", "))

        self._depth += 1
        try:
            yield Line()
        finally:
            self._depth -= 1
            if self._depth == 0 or last > 0:
                say(f"{title}: {meter.summary()}")

    def note(self, text: str) -> None:
        print(clean(text), file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        _print_table(_console(self._stream, terminal=False), title, columns, rows)
        self._stream.flush()


class SilentProgress:
    """Nothing: of several processes, all but the first."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Stage]:
        yield _Recorder(Meter(total, unit, start, time.monotonic))

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        pass


class QuietProgress(SilentProgress):
    """Warnings (on stderr) and tables only."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def warn(self, text: str) -> None:
        print(f"warning: {clean(text)}", file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        _print_table(_console(self._stream, terminal=False), title, columns, rows)
        self._stream.flush()


class JsonProgress:
    """One JSON object a line: {"event": stage_start | advance | note | warn | table | stage_end, …}. NaN and infinity are null."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]):
        self._stream, self._clock = stream, clock

    @contextlib.contextmanager
    def stage(self, title: str, total: int, unit: str, start: int = 0) -> Iterator[Stage]:
        meter, emit = Meter(total, unit, start, self._clock), self._emit
        last = -LIVE_INTERVAL
        emit("stage_start", title=title, total=total, unit=unit, start=start)

        class Events:
            def advance(self, done: int, **metrics: float) -> None:
                nonlocal last
                meter.update(done, metrics)
                if meter.elapsed - last >= LIVE_INTERVAL or done >= total:
                    last = meter.elapsed
                    emit("advance", title=title, done=done, total=total, seconds=round(last, 3), metrics=metrics)

        try:
            yield Events()
        finally:
            emit("stage_end", title=title, done=meter.done, total=total, seconds=round(meter.elapsed, 3), metrics=meter.metrics)

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def warn(self, text: str) -> None:
        self._emit("warn", text=text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._emit("table", title=title, columns=list(columns), rows=[list(row) for row in rows])

    def _emit(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **_cleaned(plain(fields))}, ensure_ascii=False), file=self._stream, flush=True)


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(v) for v in value]
    return {clean(k): _cleaned(v) for k, v in value.items()} if isinstance(value, dict) else value

"""What became of the data, told before any compute is spent: counts, lengths, what was cut or dropped and why, duplicates, overlap."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srppo.data.demonstrations import Demonstrations
    from srppo.data.prompts import PromptSet

EXAMPLES = 5  # places named for each reason


@dataclass(frozen=True)
class Lengths:
    """Quantiles of token counts: the smallest count that so many of them do not exceed."""

    min: int
    p50: int
    p90: int
    p99: int
    max: int
    total: int

    @classmethod
    def of(cls, counts: Iterable[int]) -> Lengths | None:
        """None where there is nothing to count."""
        ordered = sorted(counts)
        if not ordered:
            return None
        p50, p90, p99 = (ordered[-(-percent * len(ordered) // 100) - 1] for percent in (50, 90, 99))
        return cls(ordered[0], p50, p90, p99, ordered[-1], sum(ordered))

    def __str__(self) -> str:
        return f"median {self.p50}, 90 % up to {self.p90}, 99 % up to {self.p99}, longest {self.max}, all together {self.total}"


@dataclass(frozen=True)
class Affected:
    """Rows something happened to. places: the first few, as `line N`."""

    count: int
    places: list[str]

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.places) else ""
        return f"{self.count} ({', '.join(self.places)}{more})"


@dataclass
class Tally:
    """Counts while rows are read."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        self.reasons.setdefault(reason, []).append(place)

    def affected(self, reason: str) -> Affected:
        places = self.reasons.get(reason, [])
        return Affected(len(places), places[:EXAMPLES])

    def all(self) -> dict[str, Affected]:
        return {reason: self.affected(reason) for reason in sorted(self.reasons, key=lambda r: -len(self.reasons[r]))}


@dataclass(frozen=True)
class DataReport:
    """One source. Token counts are after cutting; a response's include its EOS."""

    purpose: str  # "demonstrations" or "prompts"
    source: str
    split: str
    rows: int  # in the source
    used: int  # demonstrations or prompts that remain
    shapes: dict[str, int]  # shape -> records read that way
    formats: dict[str, int]  # conversation, raw text, text without prompt -> used
    template: str  # "tokenizer", "plain" or a path; "none" where every row is plain text
    groups: dict[str, int]  # group -> used
    prompt_tokens: Lengths | None
    response_tokens: Lengths | None
    learned_tokens: int
    dropped: dict[str, Affected]  # reason -> rows
    truncated: Affected  # demonstrations cut at the end; they teach no EOS
    tokenised_apart: Affected  # prompt and response could not be tokenised together
    duplicates: int  # used ones that repeat an earlier one exactly, token for token
    repeated_prompts: int  # used ones whose prompt an earlier one has
    left_out: int  # usable ones beyond max_demonstrations or max_prompts, not looked at
    heldout: int  # of the used ones
    limits: dict[str, int]
    fingerprint: str  # blake2b of the used token ids in order
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for the terminal, most important first."""
        held = f", {self.heldout} of them held out" if self.heldout else ""
        out = [f"{self.purpose}: {self.used} used of {self.rows} rows in {self.source} (split {self.split}){held}"]
        out += [f"  read as {shape}: {count}" for shape, count in self.shapes.items()]
        if self.left_out:
            out.append(f"  left out beyond the limit, chosen by the seed: {self.left_out}")
        template = {"tokenizer": "the tokenizer's", "plain": "the plain one"}.get(self.template, self.template)
        out += [f"  as {name}{f', chat template: {template}' if name == 'conversation' else ''}: {n}" for name, n in self.formats.items()]
        out += [f"  tokens of a {name}: {counts}" for name, counts in self._lengths() if counts]
        out += [f"  dropped, {reason}: {affected}" for reason, affected in self.dropped.items()]
        if self.truncated.count:
            out.append(f"  cut at {self.limits['max_tokens']} tokens, so without EOS: {self.truncated}")
        if self.tokenised_apart.count:
            out.append(f"  prompt and response tokenised apart: {self.tokenised_apart}")
        if self.duplicates or self.repeated_prompts:
            out.append(f"  exact duplicates: {self.duplicates}; repeated prompts: {self.repeated_prompts}")
        if set(self.groups) != {"all"}:
            out.append("  groups: " + ", ".join(f"{name} {count}" for name, count in self.groups.items()))
        return out + [f"  note: {note}" for note in self.notes]

    def _lengths(self) -> list[tuple[str, Lengths | None]]:
        return [("prompt", self.prompt_tokens), ("response", self.response_tokens)]


@dataclass(frozen=True)
class Overlap:
    """Distinct prompts that are, token for token, also prompts of demonstrations."""

    prompts: int  # distinct ones
    with_train: int
    with_heldout: int


@dataclass(frozen=True)
class DataSummary:
    demonstrations: DataReport
    prompts: DataReport | None  # None: the demonstrations' prompts serve
    overlap: Overlap | None
    evaluation: DataReport | None  # None: held-out demonstrations serve
    retention: DataReport | None
    evaluation_overlap: Overlap | None  # of evaluation prompts with demonstrations
    notes: list[str]  # on the two together

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Both reports and the overlap, for the terminal."""
        out = self.demonstrations.lines()
        if self.prompts is None or self.overlap is None:
            out.append("prompts: those of the training demonstrations")
        else:
            o = self.overlap
            share = 100 * o.with_train / o.prompts if o.prompts else 0.0
            out += self.prompts.lines()
            out.append(f"overlap: {o.with_train} of {o.prompts} distinct prompts ({share:.1f} %) have a training demonstration")
        for name, report in (("evaluation", self.evaluation), ("retention", self.retention)):
            if report is not None:
                out += [f"{name} {line}" if line[:1] != " " else line for line in report.lines()]
        return out + [f"  note: {note}" for note in self.notes]


def data_summary(
    demonstrations: Demonstrations, prompts: PromptSet | None, evaluation: PromptSet | None = None, retention: PromptSet | None = None
) -> DataSummary:
    """All reports, and how rollout and evaluation prompts overlap with the demonstrations'. prompts None: the training prompts serve."""
    judged = None if evaluation is None else _overlap(evaluation, demonstrations)
    others = (evaluation.report if evaluation else None, retention.report if retention else None, judged)
    notes = []
    if judged and judged.with_train:
        notes.append(
            f"{judged.with_train} evaluation prompts are those of training demonstrations: accuracy there is not on unseen prompts"
        )
    if prompts is None:
        return DataSummary(demonstrations.report, None, None, *others, notes)
    overlap = _overlap(prompts, demonstrations)
    if overlap.with_heldout:
        notes.append(f"{overlap.with_heldout} prompts are those of held-out demonstrations: evaluation there is not on unseen prompts")
    unlearned = prompts.report.formats.keys() - demonstrations.report.formats.keys()
    if unlearned:
        learned = " and ".join(demonstrations.report.formats)
        notes.append(f"prompts come as {' and '.join(sorted(unlearned))}, but demonstrations as {learned}; see data.string_prompts")
    return DataSummary(demonstrations.report, prompts.report, overlap, *others, notes)


def _overlap(prompts: PromptSet, demonstrations: Demonstrations) -> Overlap:
    asked = {tuple(p.ids) for p in prompts.prompts}
    train = {tuple(p.ids) for p in demonstrations.train_prompts}
    held = {tuple(p.ids) for p in demonstrations.heldout_prompts}
    return Overlap(len(asked), len(asked & train), len(asked & held))


def repeats(items: Iterable[Sequence[int]]) -> int:
    """How many items an earlier one equals."""
    return sum(count - 1 for count in Counter(tuple(item) for item in items).values())


def fingerprint(items: Iterable[Sequence[int]]) -> str:
    """blake2b of token ids in order, 16 hex digits: equal for equal data."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        digest.update((",".join(map(str, item)) + "\n").encode())
    return digest.hexdigest()

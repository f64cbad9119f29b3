"""Demonstrations: rows to tokenised examples, dropped and cut ones counted, split by prompt into training and held-out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srppo.config import DataConfig
from srppo.data.chat import ChatFormat, Encoded
from srppo.data.messages import Unusable, answer_text
from srppo.data.report import DataReport, Lengths, Tally, fingerprint, repeats
from srppo.data.shapes import DEMONSTRATION_SHAPES, Record, read_records
from srppo.data.sources import Source, read_rows
from srppo.errors import ConfigError, DataError
from srppo.records import Example, Prompt
from srppo.seeding import permutation

TRUNCATED, APART = "truncated", "tokenised apart"
CONVERSATION, RAW, TEXT = "conversation", "raw text", "text without prompt"


@dataclass(frozen=True)
class Demonstrations:
    """Training and held-out demonstrations; no prompt is on both sides.

    train_prompts, heldout_prompts: their distinct prompts, in an order drawn by the seed (so that the first k are a random sample);
    fields hold the source row and "reference", the answer's text. Rows of the shape {"text"} have no prompt and give none.
    """

    train: list[Example]
    heldout: list[Example]
    train_prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    report: DataReport


@dataclass(frozen=True)
class _Kept:
    record: Record
    encoded: Encoded
    example: Example

    @property
    def key(self) -> tuple[int, ...]:
        """What makes prompts the same; a mere text is its own."""
        return tuple(self.encoded.prompt.ids or self.encoded.ids)


def load_demonstrations(data: DataConfig, chat: ChatFormat, seed: int, *, context: int | None = None) -> Demonstrations:
    """Read, tokenise and split data.demonstrations.

    context: the model's longest sequence, where it is less than data.max_tokens. Raises ConfigError where data.demonstrations is
    not set, DataError for a source that cannot be read, a malformed row (file and line named), or when nothing is left.
    """
    if not data.demonstrations:
        raise ConfigError("data.demonstrations is not set: give a jsonl, json, csv or parquet file, a saved data set, or a hub id")
    source = read_rows(data.demonstrations, data.demonstrations_split)
    records = read_records(source, data, DEMONSTRATION_SHAPES, strict=True)
    limit = min(data.max_tokens, context or data.max_tokens)
    tally, cut = Tally(), Tally()
    kept: list[_Kept] = []
    wanted = data.max_demonstrations or len(records)
    order = permutation(len(records), seed, "demonstrations") if wanted < len(records) else range(len(records))
    looked = 0
    for i in order:
        if len(kept) == wanted:
            break
        looked += 1
        place = source.place(records[i].row)
        try:
            kept.append(_encode(records[i], chat, data, limit, cut, place))
        except Unusable as drop:
            tally.add(drop.reason, place)
    kept.sort(key=lambda k: k.record.row)
    if not kept:
        reasons = "; ".join(f"{reason}: {affected}" for reason, affected in tally.all().items())
        raise DataError(f"no demonstration is left of {len(records)}. Dropped, {reasons}", source.path)
    held_keys = _heldout_keys(kept, data.heldout, seed)
    train = [k for k in kept if k.key not in held_keys]
    heldout = [k for k in kept if k.key in held_keys]
    if not train:
        raise DataError(f"data.heldout is {data.heldout}, which leaves nothing of {len(kept)} demonstrations to train on", source.path)
    report = _report(source, data, chat, records, kept, len(heldout), tally, cut, limit, len(records) - looked)
    return Demonstrations([k.example for k in train], [k.example for k in heldout], _prompts(train, seed), _prompts(heldout, seed), report)


def _encode(record: Record, chat: ChatFormat, data: DataConfig, limit: int, cut: Tally, place: str) -> _Kept:
    """One record within the length limits. Raises Unusable."""
    if record.unusable:
        raise Unusable(record.unusable)
    encoded = chat.encode(record.item)
    ids, mask, prompt = encoded.ids, encoded.target_mask, len(encoded.prompt.ids)
    if prompt >= limit:
        raise Unusable(f"the prompt fills the context of {limit} tokens")
    if prompt > data.max_prompt_tokens:
        raise Unusable(f"the prompt is longer than data.max_prompt_tokens ({data.max_prompt_tokens})")
    if len(ids) > limit:
        cut.add(TRUNCATED, place)
        ids, mask = ids[:limit], mask[:limit]
    if encoded.apart:
        cut.add(APART, place)
    return _Kept(record, encoded, Example(ids, mask, record.row, record.group))


def _heldout_keys(kept: Sequence[_Kept], heldout: float | int, seed: int) -> set[tuple[int, ...]]:
    """Distinct prompts to hold out: at least as many demonstrations as asked for, every group in proportion.

    In each group the prompts are shuffled and the j-th of g is placed at (j + 1/2) / g; taken in that order across the groups,
    any number of them holds each group's share to within one.
    """
    wanted = round(heldout * len(kept)) if heldout < 1 else int(heldout)
    if 0 < heldout < 1 and len(kept) > 1:
        wanted = max(1, wanted)
    sizes = Counter(k.key for k in kept)
    if heldout < 1 and len(sizes) == 1:
        return set()  # a share of a single prompt would be all of it
    groups: dict[str, list[tuple[int, ...]]] = {}
    for key, group in {k.key: k.record.group for k in reversed(kept)}.items():
        groups.setdefault(group, []).append(key)
    placed = []
    for group in sorted(groups):
        keys = sorted(groups[group])
        for j, i in enumerate(permutation(len(keys), seed, "heldout", group)):
            placed.append(((j + 0.5) / len(keys), group, keys[i]))
    out: set[tuple[int, ...]] = set()
    count = 0
    for _, _, key in sorted(placed):
        if count >= wanted:
            break
        out.add(key)
        count += sizes[key]
    return out


def _prompts(kept: Sequence[_Kept], seed: int) -> list[Prompt]:
    """The distinct prompts, the first row's fields with each, in seeded order."""
    first: dict[tuple[int, ...], _Kept] = {}
    for k in kept:
        if k.encoded.prompt.ids:
            first.setdefault(k.key, k)
    distinct = list(first.values())
    return [_prompt(distinct[i].record, distinct[i].encoded) for i in permutation(len(distinct), seed, "prompts")]


def _prompt(record: Record, encoded: Encoded) -> Prompt:
    prompt = encoded.prompt
    return Prompt(prompt.ids, prompt.text, record.row, record.group, fields_of(record), prompt.messages)


def fields_of(record: Record) -> dict[str, Any]:
    """A record's row with its answer's text as "reference" (unless the row has a column of that name, or no answer)."""
    reference = answer_text(record.item.completion)
    return {"reference": reference, **record.fields} if reference else dict(record.fields)


def _report(
    source: Source,
    data: DataConfig,
    chat: ChatFormat,
    records: Sequence[Record],
    kept: Sequence[_Kept],
    heldout: int,
    tally: Tally,
    cut: Tally,
    limit: int,
    left_out: int,
) -> DataReport:
    formats = dict(Counter(text_format(k.record, chat) for k in kept))
    notes = format_notes([k.record for k in kept], formats, chat)
    if limit < data.max_tokens:
        notes.append(f"the model's context of {limit} tokens is shorter than data.max_tokens ({data.max_tokens}) and limits it")
    return DataReport(
        purpose="demonstrations",
        source=source.path,
        split=data.demonstrations_split,
        rows=len(source.rows),
        used=len(kept),
        shapes=dict(Counter(r.shape for r in records)),
        formats=formats,
        template=chat.template_name if CONVERSATION in formats else "none",
        groups=dict(Counter(k.record.group for k in kept)),
        prompt_tokens=Lengths.of(len(k.encoded.prompt.ids) for k in kept if k.encoded.prompt.ids),
        response_tokens=Lengths.of(len(k.example.ids) - len(k.encoded.prompt.ids) for k in kept),
        learned_tokens=sum(sum(k.example.target_mask) for k in kept),
        dropped=tally.all(),
        truncated=cut.affected(TRUNCATED),
        tokenised_apart=cut.affected(APART),
        duplicates=repeats(k.example.ids for k in kept),
        repeated_prompts=repeats(k.encoded.prompt.ids for k in kept if k.encoded.prompt.ids),
        left_out=left_out,
        heldout=heldout,
        limits={"max_prompt_tokens": data.max_prompt_tokens, "max_tokens": limit},
        fingerprint=fingerprint(k.example.ids for k in kept),
        notes=notes,
    )


def text_format(record: Record, chat: ChatFormat) -> str:
    """How a record becomes text."""
    if record.item.prompt is None:
        return TEXT
    return RAW if isinstance(record.item.prompt, str) and chat.string_prompts == "raw" else CONVERSATION


def format_notes(records: Sequence[Record], formats: dict[str, int], chat: ChatFormat) -> list[str]:
    """What a user may not expect of these formats."""
    notes = []
    if CONVERSATION in formats and "strftime_now" in chat.template:
        notes.append("the chat template prints today's date: the same data gives other tokens on another day")
    if TEXT in formats:
        notes.append(f"{formats[TEXT]} rows are text without prompt: learned whole; they cannot start a rollout")
    if RAW in formats and CONVERSATION in formats:
        notes.append(f"{formats[RAW]} prompts are raw text, {formats[CONVERSATION]} conversations: the model sees both formats")
    if RAW in formats and chat.system_prompt is not None:
        notes.append("data.system_prompt is not used with raw text")
    raw = [(r.item.prompt, r.item.completion) for r in records if isinstance(r.item.prompt, str) and isinstance(r.item.completion, str)]
    glued = sum(bool(p and c) and not p[-1].isspace() and not c[0].isspace() for p, c in raw) if RAW in formats else 0
    if glued:
        notes.append(
            f"{glued} raw prompts touch their completions without a space or line break between; "
            "raw text is joined as it is: end the prompts with a separator, or use data.string_prompts: chat"
        )
    return notes

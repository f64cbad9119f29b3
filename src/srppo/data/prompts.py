"""Prompts without answers, for rollouts and evaluations. Any demonstration shape serves too: its answer becomes the reference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from srppo.config import DataConfig
from srppo.data.chat import ChatFormat, RenderedPrompt
from srppo.data.demonstrations import CONVERSATION, fields_of, format_notes, text_format
from srppo.data.messages import Unusable
from srppo.data.report import DataReport, Lengths, Tally, fingerprint, repeats
from srppo.data.shapes import PROMPT_SHAPES, Record, read_records
from srppo.data.sources import read_rows
from srppo.errors import DataError
from srppo.records import Prompt
from srppo.seeding import permutation


@dataclass(frozen=True)
class PromptSet:
    """Prompts in an order drawn by the seed, so that the first k are a random sample."""

    prompts: list[Prompt]
    report: DataReport


def load_prompts(
    source: str,
    split: str,
    data: DataConfig,
    chat: ChatFormat,
    seed: int,
    max_prompts: int | None = None,
    *,
    per_group: bool = False,
    context: int | None = None,
) -> PromptSet:
    """Read and tokenise prompts.

    max_prompts: keep this many, chosen by the seed; with per_group this many of each group. context: the model's longest sequence,
    where it is less than data.max_prompt_tokens. Fields hold the source row, and "reference" where the row has an answer. Raises
    DataError for a source that cannot be read, a malformed row (file and line named; {"text"} is one), or when nothing is left.
    """
    found = read_rows(source, split)
    records = read_records(found, data, PROMPT_SHAPES, strict=False)
    limit = min(data.max_prompt_tokens, (context or data.max_prompt_tokens + 1) - 1)
    tally, taken = Tally(), Counter[str]()
    prompts: list[Prompt] = []
    used: list[Record] = []
    left_out = 0
    for i in permutation(len(records), seed, "prompts", split):
        record = records[i]
        bucket = record.group if per_group else ""
        if max_prompts is not None and taken[bucket] >= max_prompts:
            left_out += 1
            continue
        try:
            rendered = _render(record, chat, limit)
        except Unusable as drop:
            tally.add(drop.reason, found.place(record.row))
            continue
        taken[bucket] += 1
        used.append(record)
        prompts.append(Prompt(rendered.ids, rendered.text, record.row, record.group, fields_of(record), rendered.messages))
    if not prompts:
        reasons = "; ".join(f"{reason}: {affected}" for reason, affected in tally.all().items())
        raise DataError(f"no prompt is left of {len(records)}. Dropped, {reasons}", source)
    formats = dict(Counter(text_format(r, chat) for r in used))
    report = DataReport(
        purpose="prompts",
        source=source,
        split=split,
        rows=len(found.rows),
        used=len(prompts),
        shapes=dict(Counter(r.shape for r in records)),
        formats=formats,
        template=chat.template_name if CONVERSATION in formats else "none",
        groups=dict(Counter(p.group for p in prompts)),
        prompt_tokens=Lengths.of(len(p.ids) for p in prompts),
        response_tokens=None,
        learned_tokens=0,
        dropped=tally.all(),
        truncated=tally.affected(""),
        tokenised_apart=tally.affected(""),
        duplicates=repeats(p.ids for p in prompts),
        repeated_prompts=repeats(p.ids for p in prompts),
        left_out=left_out,
        heldout=0,
        limits={"max_prompt_tokens": limit},
        fingerprint=fingerprint(p.ids for p in prompts),
        notes=format_notes(used, formats, chat),
    )
    return PromptSet(prompts, report)


def _render(record: Record, chat: ChatFormat, limit: int) -> RenderedPrompt:
    """Raises Unusable."""
    if record.unusable:
        raise Unusable(record.unusable)
    assert record.item.prompt is not None  # no prompt shape leaves it out
    rendered = chat.render_prompt(record.item.prompt)
    if len(rendered.ids) > limit:
        raise Unusable(f"the prompt is longer than {limit} tokens (data.max_prompt_tokens, or the model's context)")
    return rendered

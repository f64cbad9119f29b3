"""Answers of a trained model to a user's prompts, rendered as the run that trained it rendered its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from srppo.config import RunConfig, build, merge
from srppo.data.chat import ChatFormat, RenderedPrompt
from srppo.data.files import read_text
from srppo.data.messages import Message, Unusable
from srppo.data.prompts import load_prompts
from srppo.errors import DataError, ModelError
from srppo.models.roles import build_roles
from srppo.models.source import find_source, is_adapter, read_json
from srppo.rollout.engine import Sampling
from srppo.rollout.record import position_limit
from srppo.rollout.torch_engine import TorchEngine
from srppo.run_config import load_run_config
from srppo.run_folder import is_run
from srppo.seeding import stream_seed
from srppo.text import clean, json_text

STAGES = ("policy", "sft")  # of a run folder, the first that is there
SHOWN = 100  # characters of a prompt in a heading


@dataclass(frozen=True)
class Completion:
    """One answer. tokens include EOS; ended is False where the length limit cut it."""

    prompt: str  # as asked; of a conversation the last message
    rendered: str  # what the model was given
    completion: str
    tokens: int
    ended: bool


def generate_text(
    model: str,
    prompts: Sequence[str | list[Message]] = (),
    *,
    file: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    samples: int = 1,
    greedy: bool = False,
    raw: bool = False,
    seed: int = 0,
    device: str = "auto",
    trust: bool = False,
) -> list[Completion]:
    """`samples` answers to each prompt, in order.

    model: a run folder (its policy, else its SFT model), a folder inside one, another Hugging Face or adapter folder, or a hub id.
    file: more prompts: a text file with one a line, or whatever else holds prompts for training. base: an adapter's base model.
    trust: do what a run's configuration allows of code that comes with a model, and of pickle weights; without it neither is.
    raw: string prompts are continued as they are. Otherwise a run's own way holds, or the chat template where the tokenizer has one.
    Raises SrppoError: no such model, a wrong base, prompts that cannot be read or leave no room.
    """
    config, role, folder = _plan(model, base, device, trust)
    roles = build_roles(config)
    if folder is not None:
        roles.load(role, folder)
    template = raw is False and _trained_by(model) is None and bool(roles.tokenizer.chat_template)
    data = config.data.model_copy(update={"string_prompts": "raw"} if raw else {"string_prompts": "chat"} if template else {})
    chat = ChatFormat.from_config(roles.tokenizer, roles.special.eos_ids, data)
    asked = [(_last(p), _render(chat, p, number)) for number, p in enumerate(prompts, 1)]
    if file is not None:
        asked += _from_file(file, chat, config)
    index = [i for i in range(len(asked)) for _ in range(samples)]
    seeds = [stream_seed(seed, "generate", i, s) for i in range(len(asked)) for s in range(samples)]
    fast = {"cuda_graphs": config.rollout.cuda_graphs, "merge_adapters": config.rollout.merge_adapters}
    engine = TorchEngine(roles.special, config.rollout.batch_size, config.model.autocast, **fast)
    with roles.use(role) as network:
        room = position_limit(network.config)
        longest = max((len(rendered.ids) for _, rendered in asked), default=0)
        if room is not None:  # a small model has no room for the default; a prompt that fills it is still an error
            max_new_tokens = max(1, min(max_new_tokens, room - longest))
        sampling = Sampling(max_new_tokens, temperature=temperature, top_p=top_p, greedy=greedy)
        out = engine.generate(network, [asked[i][1].ids for i in index], seeds, sampling, index)
    answers = [(chat.response_text(out.response_ids(row)), int(out.lengths[row]), bool(out.ended[row])) for row in range(len(index))]
    return [Completion(asked[i][0], asked[i][1].text, *answer) for i, answer in zip(index, answers)]


def print_completions(completions: Sequence[Completion], *, as_json: bool = False) -> None:
    """To stdout: JSON lines, or text stripped of control characters, under its prompt where there are several."""
    for number, item in enumerate(completions, 1):
        if as_json:
            print(json_text(asdict(item)))
        else:
            if len(completions) > 1:
                prompt = " ".join(clean(item.prompt).split())
                print(f"[{number}] {prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + '…'}")
            print(clean(item.completion) + ("\n" if len(completions) > 1 else ""))
    cut = sum(not c.ended for c in completions)
    if cut and not as_json:
        print(f"{cut} of {len(completions)} answers were cut at the length limit", file=sys.stderr)


def _warn(text: str) -> None:
    print(f"warning: {clean(text)}", file=sys.stderr)


def _trained_by(model: str) -> Path | None:
    """The run folder that the model lies in, if any."""
    path = Path(model).expanduser()
    return next((p for p in (path, *path.resolve().parents) if is_run(p)), None) if path.is_dir() else None


def _plan(model: str, base: str | None, device: str, trust: bool) -> tuple[RunConfig, str, str | None]:
    """The configuration to load with, the role that answers, and the folder to load that role from (None: it is the base)."""
    run, place = _trained_by(model), os.path.expanduser(model)
    if not os.path.exists(place) and os.path.dirname(place) and os.path.isdir(os.path.dirname(place)):
        raise ModelError(f"{model}: no such folder in {os.path.dirname(place)}")  # a slip in a path, not a hub id to ask the network for
    config = load_run_config(run, _warn) if run else RunConfig()
    risks = [key for key in ("trust_remote_code", "allow_pickle") if getattr(config.model, key)]
    if risks and not trust:  # the folder may be somebody else's: who asks for an answer has not agreed to run code
        words = " and ".join(f"model.{key}" for key in risks)
        raise ModelError(f"{run}: its configuration sets {words}, so loading it can run code; add --trust if you trust where it comes from")
    if run is not None and is_run(place):
        found = next((run / stage for stage in STAGES if (run / stage).is_dir()), None)
        if found is None:
            raise ModelError(f"{model}: this run holds no model yet (neither {' nor '.join(f'{s}/' for s in STAGES)})")
        place = str(found)
    source = find_source(place)
    changes: dict[str, object] = {"model.device": device, "model.kernels": "plain"}
    if not is_adapter(source):
        if base is not None:
            raise ModelError(f"{model}: this is a whole model, not an adapter; leave --base out")
        # the folder brings its own tokenizer; nothing but the precision is taken from the run
        changes |= {"model.name": place, "model.gguf_file": None, "model.revision": None, "model.tokenizer": None, "tuning.kind": "full"}
        return build(merge(config.model_dump(), changes)), "base", None
    if base is None and run is None:
        base = str((read_json(source, "adapter_config.json") or {}).get("base_model_name_or_path") or "")
        if not base:
            raise ModelError(f"{model}: this adapter does not name its base model; give --base")
    if base is not None:
        changes |= {"model.name": base, "model.gguf_file": None, "model.revision": None, "model.tokenizer": None}
    return build(merge(config.model_dump(), changes | {"tuning.kind": "lora"})), "policy", place


def _last(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


def _render(chat: ChatFormat, prompt: str | list[Message], number: int) -> RenderedPrompt:
    for text in [prompt] if isinstance(prompt, str) else [str(m.get("content", "")) for m in prompt]:
        try:
            text.encode()
        except UnicodeEncodeError:  # what the shell hands on of bytes that are not UTF-8
            raise DataError(f"prompt {number}: {text[:SHOWN]!r} holds bytes that are not UTF-8, which is no text to a tokenizer") from None
    try:
        return chat.render_prompt(prompt)
    except Unusable as error:
        raise DataError(f"prompt {number}: {error.reason}") from None


def _from_file(file: str, chat: ChatFormat, config: RunConfig) -> list[tuple[str, RenderedPrompt]]:
    """(as asked, as rendered), in the file's order."""
    path = Path(file).expanduser()
    if path.suffix.lower() == ".txt":
        try:
            lines = [line for line in read_text(path).splitlines() if line.strip()]
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", path) from None
        if not lines:
            raise DataError("holds no prompt", path)
        return [(line, _render(chat, line, number)) for number, line in enumerate(lines, 1)]
    found = load_prompts(file, config.data.prompts_split, config.data, chat, config.seed)
    for reason, affected in found.report.dropped.items():
        _warn(f"prompts left out: {reason}: {affected}")
    return [(p.text, RenderedPrompt(p.text, p.ids)) for p in sorted(found.prompts, key=lambda p: p.row)]

"""What two runs of the same recipe have left: the same to the bit, or near where other numbers of processes have rounded otherwise."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

CLOCKS = ("timing/", "memory/", "comm/", "seconds", "wall_seconds", "peak_rss_mb", "stage_seconds", "versions")
ROLES = ("sft", "policy", "critic", "sft_continued")
NEAR = 5e-4  # of a weight, at the recipes' learning rates: AdamW's first steps go by the gradient's sign


def without_clocks(value: Any) -> Any:
    """A record without what differs between two runs on one machine."""
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if not k.startswith(CLOCKS) and "tokens_per_second" not in k}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def fingerprint(run: Path) -> dict[str, str]:
    """What a run has left, by file: a hash of its bytes, or of its records without clocks. Of other files the name alone.

    Tensors of checkpoints are taken by group: which process writes one that all have alike is left to chance.
    """
    out, groups = {}, dict[str, list[str]]()
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name, content = str(path.relative_to(run)), b""
        if name.startswith("checkpoints/"):
            if path.suffix == ".safetensors":
                groups.setdefault(re.sub(r"-\d+\.safetensors$", "", name), []).extend(tensors(path))
        elif path.suffix == ".safetensors" or path.name in ("README.md", "config.json", "adapter_config.json"):
            content = path.read_bytes()
        elif path.suffix == ".jsonl":
            content = json.dumps([without_clocks(json.loads(line)) for line in path.read_text().splitlines()]).encode()
        elif name in ("summary.json", "data.json", "diagnose.json") or name.startswith("stages/"):
            content = json.dumps(without_clocks(json.loads(path.read_text()))).encode()
        out[name] = digest(content)
    return out | {f"{group} (tensors)": digest(json.dumps(sorted(found)).encode()) for group, found in groups.items()}


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def tensors(path: Path) -> list[str]:
    """Name, kind and hash of each tensor in a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = {name: about for name, about in json.loads(content[8:start]).items() if name != "__metadata__"}
    place = {name: slice(*(start + offset for offset in about["data_offsets"])) for name, about in header.items()}
    return [f"{name} {about['dtype']} {about['shape']} {digest(content[place[name]])}" for name, about in header.items()]


def near(run: Path, right: Path) -> list[str]:
    """In what a run differs from another by more than rounding: weights of the models, answers of the samples and evaluations."""
    from safetensors.torch import load_file

    odd = []
    for role in ROLES:
        for path in sorted((right / role).glob("*.safetensors")):
            ours, theirs = load_file(run / role / path.name), load_file(path)
            worst = max(float((ours[name].float() - tensor.float()).abs().max()) for name, tensor in theirs.items())
            if not worst < NEAR:
                odd.append(f"{role}: weights {worst:.1e} apart")
    for name in ["samples.jsonl", *sorted(str(p.relative_to(right)) for p in (right / "evaluation").glob("*.jsonl"))]:
        said = [[_said(json.loads(line)) for line in (folder / name).read_text().splitlines()] for folder in (run, right)]
        if said[0] != said[1]:
            odd.append(f"{name}: other answers")
    return odd


def _said(record: dict[str, Any]) -> Any:
    return [record[key] for key in ("response", "greedy", "sampled") if key in record]

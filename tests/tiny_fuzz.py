"""What the fuzz tests share: hostile values, damaged files, and the property that everything read is used or refused in words.

SRPPO_FUZZ=20 tries 20 times as many examples, chosen at random (`python -m benchmarks.fuzz` does so); by default they are few and fixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, SearchStrategy

from srppo.errors import SrppoError

TIMES = int(os.environ.get("SRPPO_FUZZ", "0"))

WORDS = st.sampled_from(
    [
        "",
        " ",
        "a",
        "prompt",
        "42",
        "-0",
        "1e999",
        "null",
        "true",
        "../../x",
        "/etc/passwd",
        "~",
        "~nobody/x",
        "é",
        "日本",
        "\ufeff",
        "\u202ex",
    ]
    + [
        "\x00",
        "\x1b[2J",
        "\x1b]0;t\x07",
        "\ud800",
        "\udfff\ud800",
        "<script>",
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "'\"",
        "a\nb",
        "a\r\n",
        "%s",
    ]
    + ["[link](http://x)", "x" * 300, "</s>", "<|im_end|>", "\u2028", "🏳️‍🌈"]
)
TEXTS = st.one_of(WORDS, st.text(max_size=12), st.text(st.characters(), max_size=12))
NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 7, 10**3, 2**31, 2**63, 10**30, -(10**400), 10**400, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf")]
    ),
    st.integers(),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8)
DEEP = st.integers(2, 3000).map(lambda n: "[" * n + "]" * n)


def bounded(examples: int) -> settings:
    """Settings for a fuzz test: few fixed examples by default, TIMES as many random ones on demand."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    if TIMES:
        return settings(max_examples=examples * TIMES, deadline=None, suppress_health_check=quiet, print_blob=True)
    return settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=quiet, database=None)


def used_or_refused(use: Callable[[], Any], folder: Path | None = None, *mention: str) -> SrppoError | None:
    """Call `use`. It may work, or raise an SrppoError of one clean message that mentions one of the words; then `folder` is as it was.

    Returns the error. Anything else that is raised is a bug, and is not caught here.
    """
    before = contents(folder) if folder else {}
    try:
        use()
    except SrppoError as error:
        said = str(error)
        assert error.exit_code == 2
        assert said.strip() and len(said) < 20_000 and "Traceback" not in said
        assert not mention or any(word in said for word in mention), said
        assert folder is None or contents(folder) == before, "something was written, although it failed"
        return error
    return None


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with the files' bytes; the lock aside."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if p.name != ".lock"}


def json_bytes(value: Any) -> bytes:
    """As a careless program would write it: NaN and half surrogate pairs as they are."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Callable[[SearchStrategy[Any]], Any], whole: bytes) -> bytes:
    """Bytes with some accident: cut off, overwritten, doubled, prefixed by a byte order mark, of another encoding."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "double", "bom", "utf16", "crlf", "noise", "empty", "nul"]))
    at = draw(st.integers(0, max(len(whole) - 1, 0)))
    some = draw(st.binary(min_size=1, max_size=8))
    match kind:
        case "cut":
            return whole[:at]
        case "flip":
            return whole[:at] + some + whole[at + len(some) :]
        case "insert":
            return whole[:at] + some + whole[at:]
        case "remove":
            return whole[:at] + whole[at + len(some) * 3 :]
        case "double":
            return whole + whole[at:]
        case "bom":
            return b"\xef\xbb\xbf" + whole
        case "utf16":
            return whole.decode("utf-8", "replace").encode("utf-16")
        case "crlf":
            return whole.replace(b"\n", b"\r\n")
        case "noise":
            return draw(st.binary(max_size=200))
        case "nul":
            return whole[:at] + b"\0" * draw(st.integers(1, 50))
        case _:
            return b""


def spoil(data: DataObject, value: Any, others: SearchStrategy[Any] = VALUES) -> Any:
    """A copy of a JSON value in which one part, anywhere in it, is something else, is gone, or has company."""
    spots: list[tuple[Any, ...]] = []

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        spots.append(path)
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in list(children)[:40]:
            walk(inner, (*path, key))

    walk(value, ())
    path = data.draw(st.sampled_from(spots))
    out: Any = json.loads(json.dumps(value))
    if not path:
        return data.draw(others)
    node = out
    for key in path[:-1]:
        node = node[key]
    match data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
        case "remove":
            del node[path[-1]]
        case "add" if isinstance(node, dict):
            node[data.draw(TEXTS)] = data.draw(others)
        case _:
            node[path[-1]] = data.draw(others)
    return out

"""What is left of a JSON value that is not what it should be."""

from __future__ import annotations

from typing import Any

import pytest

from srppo.json_shape import ANY, DEEPEST, NUMBER, SWITCH, TEXT, fitted


@pytest.mark.parametrize(
    ("value", "shape", "left", "wrong"),
    [
        (1, NUMBER, 1, []),
        (1.5, NUMBER, 1.5, []),
        (True, NUMBER, None, ["all of it: true or false, not a number"]),
        (float("nan"), NUMBER, None, ["all of it: no finite number, not a number"]),
        (10**400, NUMBER, None, ["all of it: a number beyond reason, not a number"]),
        (10**400, ANY, None, ["all of it: a number beyond reason, not anything"]),
        ("a", TEXT, "a", []),
        (5, TEXT, None, ["all of it: a number, not text"]),
        (True, SWITCH, True, []),
        (None, NUMBER, None, []),
        ([1, "a", 2], [NUMBER], [1, 2], ["[1]: text, not a number"]),
        ([1, None], [NUMBER], [1], ["all of it: null among its items"]),
        ([1, None], ANY, [1, None], []),
        ({"a": {"b": "x", "c": 1}}, {"a": {"*": NUMBER}}, {"a": {"c": 1}}, ["a.b: text, not a number"]),
        ({"a": [], "z": [True]}, {"a": {"*": NUMBER}}, {"z": [True]}, ["a: a list, not an object"]),
        ({"a": "x"}, {"a": (NUMBER, TEXT)}, {"a": "x"}, []),
        ({"a": []}, {"a": (NUMBER, TEXT)}, {}, ["a: a list, not a number or text"]),
        ([], {"*": ANY}, None, ["all of it: a list, not an object"]),
        ({"a": {"b": [1, {"c": None}]}}, ANY, {"a": {"b": [1, {"c": None}]}}, []),
    ],
)
def test_what_does_not_fit_is_left_out_and_named(value: Any, shape: Any, left: Any, wrong: list[str]) -> None:
    found, said = fitted(value, shape)
    assert found == left and said == wrong


def test_depth_is_bounded() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    found, wrong = fitted(deep, ANY)
    depth = 0
    while found:
        found, depth = found[0], depth + 1
    assert depth == DEEPEST and len(wrong) == 1 and "nested too deeply" in wrong[0]

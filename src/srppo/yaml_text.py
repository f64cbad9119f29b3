"""YAML as people mean it, read without surprises: plain values only, no key twice, no expansion beyond reason. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_NODES = 100_000  # of a document with its aliases written out; a recipe has some hundred


class _Loader(yaml.SafeLoader):
    """1e-5 is a number (YAML 1.1 wants 1.0e-5), and a key given twice is an error, not a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """A YAML document or flag value, as dicts, lists and scalars. Raises yaml.YAMLError, and nothing else."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except Exception as error:  # PyYAML's constructors fail in their own ways: a date such as 2026-13-45, `!!bool x`
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below, aliases written out: a few lines can mean billions. Raises a YAMLError for too many, and for one inside itself."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands inside what it names", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 + (sum(_size(part, known) for part in parts) if isinstance(node, yaml.CollectionNode) else 0)
    if total > MOST_NODES:
        raise yaml.constructor.ConstructorError(None, None, f"its aliases mean more than {MOST_NODES} values", node.start_mark)
    known[id(node)] = total
    return total

"""Command-line flags derived from RunConfig: each dotted key is one, documented by its docstring and checked like a recipe."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from srppo.errors import ConfigError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SECTION_MARK = "__"  # stands for the dot in parameter names, which must be identifiers


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value."""

    section: str  # "" at the top level
    name: str
    kind: str  # what may be given, for people: "full | lora", "number", …
    types: frozenset[type]  # what the value may be: {str, float} where kind is "sft | number"
    default: Any
    doc: str

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


@functools.cache
def leaves() -> tuple[Leaf, ...]:
    """All of RunConfig's keys with their documentation, top level first."""
    from pydantic import BaseModel

    from srppo.config import RunConfig
    from srppo.section import members

    def leaf(section: str, name: str, field: FieldInfo) -> Leaf:
        kind, types = _kind(field.annotation), frozenset(members(field.annotation))
        return Leaf(section, name, kind, types, field.get_default(call_default_factory=True), _one_line(field.description))

    top, inner = [], []
    for name, info in RunConfig.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner += [leaf(name, key, field) for key, field in info.annotation.model_fields.items()]
        else:
            top.append(leaf("", name, info))
    return (*top, *inner)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _kind(annotation: Any) -> str:
    """A type in words: the literal values, or number, integer, text …"""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(_kind(a) for a in get_args(annotation))
    if origin is Literal:
        return " | ".join(str(a) for a in get_args(annotation))
    if origin is list:
        return f"[{_kind(get_args(annotation)[0])}, …]"
    if origin is dict:
        return "{key: value, …}"
    names = {bool: "true | false", int: "integer", float: "number", str: "text", type(None): "null"}
    return names.get(annotation, str(annotation))


def parse_overrides(given: dict[str, str | None]) -> dict[str, Any]:
    """{"ppo__clip": "1e-1", "seed": None} as {"ppo.clip": 0.1}: flags not given are left out.

    Numbers, booleans, lists and mappings are read as in a recipe; text is taken as it is, since YAML would see comments, dates
    and mappings in it. Raises ConfigError for a list or mapping that is not YAML.
    """
    types = {leaf.key: leaf.types for leaf in leaves()}
    keys = {name.replace(SECTION_MARK, "."): text for name, text in given.items() if text is not None}
    return {key: _read(key, text, types[key]) for key, text in keys.items()}


def _read(key: str, text: str, types: frozenset[type]) -> Any:
    """A flag's value. types: what its key takes."""
    import yaml

    from srppo.config import parse_yaml

    if text == "null" and type(None) in types:
        return None
    if types <= {str, type(None)} or not text:
        return text
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        if text[0] in "[{":
            raise ConfigError(f"--{key}: {text!r} is not valid YAML; lists are written '[a, b]', mappings '{{a: b}}'") from None
        return text
    fits = isinstance(value, tuple(types)) or (float in types and isinstance(value, int))
    return text if str in types and not fits else value


@functools.cache
def _options() -> tuple[click.Option, ...]:
    return tuple(click.Option([leaf.key.replace(".", SECTION_MARK), f"--{leaf.key}"], metavar="VALUE") for leaf in leaves())


def option_name(text: str) -> str:
    """--ppo.learning-rate is --ppo.learning_rate."""
    return text.replace("-", "_")


class RunCommand(click.Command):
    """A command that takes every key of RunConfig as a flag. The configuration is imported only when the command is used."""

    def __init__(self, name: str, **options: Any):
        settings = {"token_normalize_func": option_name, "help_option_names": ["-h", "--help"], "max_content_width": 110}
        super().__init__(name, **(options | {"context_settings": settings}))

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *_options()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise ConfigError(self._unknown(ctx, error.option_name)) from None

    def _unknown(self, ctx: click.Context, flag: str) -> str:
        import difflib

        from srppo.config import nearest_key

        name = option_name(flag.lstrip("-"))
        own = [o.lstrip("-") for p in super().get_params(ctx) for o in p.opts if o.startswith("--")]
        near = next(iter(difflib.get_close_matches(name, own, n=1, cutoff=0.75)), None)
        near = near or nearest_key(name, [leaf.key for leaf in leaves()])  # a section is no flag
        return f"unknown flag {flag}" + (f"; did you mean --{near}?" if near else "") + f" (`srppo {self.name} --help` lists them all)"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then the configuration's, section by section."""
        own = [p.get_help_record(ctx) for p in super().get_params(ctx) if isinstance(p, click.Option)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in own if record])
        for section in dict.fromkeys(leaf.section for leaf in leaves()):
            with formatter.section(f"Configuration: {section}" if section else "Configuration"):
                formatter.write_dl([_help(leaf) for leaf in leaves() if leaf.section == section], col_max=34)


def _help(leaf: Leaf) -> tuple[str, str]:
    default = "" if leaf.default in (None, "") else f"; default: {show(leaf.default)}"
    return f"--{leaf.key}", f"{leaf.doc} [{leaf.kind}{default}]"


def show(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def template() -> str:
    """Every key with its documentation and default, as YAML that is a recipe itself."""
    lines = [
        "# Every key of srppo's configuration with its default. A recipe need only hold the keys it changes.",
        "# model.name and data.demonstrations have no default.",
        "",
    ]
    for section in dict.fromkeys(leaf.section for leaf in leaves()):
        pad = "  " if section else ""
        lines += [f"{section}:"] if section else []
        for leaf in (leaf for leaf in leaves() if leaf.section == section):
            lines += [f"{pad}# {leaf.doc}", f"{pad}# ({leaf.kind})", f"{pad}{leaf.name}: {show(leaf.default)}"]
        lines.append("")
    return "\n".join(lines)

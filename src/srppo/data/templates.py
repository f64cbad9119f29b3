"""Chat templates: which one is in use, and rendering with it (in transformers' own Jinja sandbox)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srppo.data.messages import Message, Unusable
from srppo.errors import ConfigError
from srppo.limits import LONGEST, bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers that bring none. Roles are named in plain words a base model has read, a blank line ends a turn, and the
# end-of-sequence token closes each answer. docs/data.md shows it to users.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ message['content'] }}
{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""


def choose_template(tokenizer: PreTrainedTokenizerBase, option: str, bos: str) -> tuple[str, str]:
    """(name, Jinja text) for data.chat_template.

    option: "auto" (the tokenizer's own, else the plain one), "tokenizer", "plain", or the path of a Jinja file. bos: text of the token the
    tokenizer puts before plain text, "" if none; the plain template starts with it. Raises ConfigError for a file that cannot be
    read, for "tokenizer" where it has no template, and for a tokenizer with several templates and no default.
    """
    if option == "plain" or (option == "auto" and not tokenizer.chat_template):
        return "plain", ("{{- bos_token -}}\n" if bos else "") + PLAIN_TEMPLATE
    if option == "tokenizer" and not tokenizer.chat_template:
        raise ConfigError("data.chat_template is tokenizer, but this tokenizer has no chat template; use auto, plain, or a Jinja file")
    if option in ("auto", "tokenizer"):
        try:
            return "tokenizer", tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(f"data.chat_template: {error}") from None
    try:
        return option, Path(option).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: ~name of a user who does not exist
        raise ConfigError(
            f"data.chat_template: {option!r} is neither auto, tokenizer nor plain, nor a readable Jinja file: {error}"
        ) from None


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], *, generation_prompt: bool, tokens: dict[str, Any]
) -> str:
    """Messages as text. tokens: special tokens for the template that the tokenizer itself does not name.

    Raises Unusable with the template's reason where it refuses the conversation (Gemma's has no system role), ConfigError where
    the template itself is broken.
    """
    import jinja2

    try:
        with bounded():
            text = tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=generation_prompt, **tokens
            )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    except jinja2.exceptions.SecurityError as error:
        raise ConfigError(f"the chat template does what no template may, and was stopped: {error.message}") from None
    except jinja2.TemplateError as error:
        raise Unusable(f"the chat template refuses it: {error.message}") from None
    except Exception as error:  # a template computes, and can fail like any program; the cause is kept and shown
        raise ConfigError(f"the chat template is broken: {type(error).__name__}: {error}") from error
    if not isinstance(text, str) or len(text) > LONGEST:
        raise ConfigError(f"the chat template is broken: it makes a text of more than {LONGEST >> 20} million characters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the chat template prints half a surrogate pair (\\u{ord(text[error.start]):04x}), which is not text") from None
    return text

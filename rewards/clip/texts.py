"""Prompts as the texts that a CLIP reads.

A template is a text with ``{}`` where the prompt belongs, or ``{word}`` for the prompt with its numerals spelled out:
"a handwritten {word}" makes "a handwritten seven" of the digits' class "7".
"""

import string
from collections.abc import Sequence

from rlfusion.common.errors import ConfigError

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPELLED = {str(number): word for number, word in enumerate(NUMERALS)}


def spelled(prompt: str) -> str:
    """The prompt with each of its words "0" to "10" spelled out."""
    return " ".join(SPELLED.get(word, word) for word in prompt.split(" "))


def fill(template: str, prompt: str) -> str:
    """The text that the template makes of a prompt."""
    return template.format(prompt, word=spelled(prompt))


def fill_all(templates: str | Sequence[str], prompts: Sequence[str]) -> list[list[str]]:
    """One list of texts a template, each of them one text a prompt.

    Raises:
        ConfigError: no template, or one without a place for the prompt or with another one; no prompt.
    """
    templates = [templates] if isinstance(templates, str) else list(templates)
    for template in templates or [""]:
        require_template(template)
    if not prompts:
        raise ConfigError("prompts = []: expected the text of each condition")
    return [[fill(template, prompt) for prompt in prompts] for template in templates]


def require_template(template: str) -> None:
    """
    Raises:
        ConfigError: no place for the prompt, or another one.
    """
    try:
        found = [(name, form or how) for _, name, form, how in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"template = {template!r}: {error}") from error
    marks = [name for name, _ in found]
    if not found or any(formed for _, formed in found) or set(marks) - {"", "0", "word"} or marks.count("") > 1:
        raise ConfigError(
            f"template = {template!r}: expected {{}} (once) or {{word}} where the prompt belongs, and no other"
        )
    if {"", "0"} <= set(marks):
        raise ConfigError(f"template = {template!r}: expected {{}} or {{0}}, not both")

"""Prompts that are longer than a text encoder reads: it sees their first tokens alone, and the user is told.

A family's ``reads`` says how many tokens of a prompt each of its tokenizers passes on; 0 is the tokenizer's own limit.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlfusion.common.errors import ConfigError
from rlfusion.common.notices import say_once
from rlfusion.models.pipelines import hub
from rlfusion.models.pipelines.family import SEQUENCE, Family

BATCH = 4096
SHORTEST = 64
"""No tokenizer of a family has a limit of fewer tokens."""

LETTERS = 60
PER_BYTE = 2
"""Tokens that a byte of text may become at most: normalising can spell one sign out as several."""


def report(path: Path, family: Family, prompts: Sequence[str], max_sequence_length: int = 0) -> None:
    """Say, once for each tokenizer, how many of these distinct prompts are too long for it, and which is the first;
    ``max_sequence_length`` is that of the pipeline's call, 0 for its default.
    """
    longest, more = max(len(text.encode()) for text in prompts), 0
    if max_sequence_length:
        more = max_sequence_length - inspect.signature(hub.pipeline_class(path).__call__).parameters[SEQUENCE].default
    for name, own in family.reads.items():
        most = own and own + more
        tokenizer = _tokenizer(path, name) if PER_BYTE * longest >= (most or SHORTEST) else None
        if tokenizer is not None and (message := _said(tokenizer, name, most or tokenizer.model_max_length, prompts)):
            say_once(message)


def _tokenizer(path: Path, name: str) -> Any:
    """A pipeline's tokenizer; None where it has none of that name.

    Raises:
        ConfigError: its files cannot be read.
    """
    held = hub.index(path).get(name)
    if not isinstance(held, list) or held[0] is None:
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path / name, local_files_only=True)
    except hub.DAMAGED as error:
        raise ConfigError(f"{str(path / name)!r} cannot be loaded: {hub.first_line(error)}") from error


def _said(tokenizer: Any, name: str, most: int, prompts: Sequence[str]) -> str:
    tokenizer.model_max_length = 2**31  # it warns of longer ones in its own words otherwise
    distinct, first, count = [p for p in prompts if PER_BYTE * len(p.encode()) >= most], None, 0
    for at in range(0, len(distinct), BATCH):
        some = distinct[at : at + BATCH]
        for text, ids in zip(some, tokenizer(some)["input_ids"]):
            count += len(ids) > most
            first = first or ((text, len(ids)) if len(ids) > most else None)
    if first is None:
        return ""
    text = first[0] if len(first[0]) <= LETTERS else f"{first[0][:LETTERS]}..."
    return (
        f"{count:,} of {len(prompts):,} prompts are longer than the {most} tokens that {name} reads, marks "
        f"included: the first, {text!r}, has {first[1]}. What is beyond has no effect there"
    )

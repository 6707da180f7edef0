"""Findings and reports as text, in the form that a generator was trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from fvae_deploy.errors import ConditionError, UsageError

DELETED = str.maketrans("", "", "\"'()")  # by the published code, from every text


def read_text(text: str, option: str = "--findings", most: int = 1 << 16) -> str:
    """Return `text` itself, or the content of the text file of that name, white space joined.

    At most `most` bytes of a file are read. Raises ConditionError, which names the option, for an
    empty text and for a file that cannot be read.
    """
    content, path = text, Path(text)
    with contextlib.suppress(OSError):  # a long text is not a valid file name
        if path.suffix == ".txt" or path.is_file():
            try:
                content = path.read_bytes()[:most].decode()
            except FileNotFoundError:
                raise ConditionError(
                    f"expected text for {option} in {path}, found no such file: check the path"
                ) from None
            except (OSError, UnicodeDecodeError) as error:
                raise ConditionError(
                    f"expected text for {option} in {path}, found {error}: save it as UTF-8"
                ) from None
    content = " ".join(content.split())
    if not content:
        raise ConditionError(f"expected a text, found an empty text: omit {option}")
    return content


def text_of(
    findings: str | Sequence[str] | None,
    report: str | None,
    normal: str,
    *,
    published: bool,
    listed: bool,
) -> str:
    """Return the text that the network gets.

    `normal` is used if there are neither findings nor a report. `published` deletes quotes and
    round brackets, as the published code does, and with `listed` puts findings into one list in
    square brackets. Otherwise findings are sentences. Raises UsageError for findings with a
    report, and ConditionError for texts that are empty or cannot be read.
    """
    given = [findings] if isinstance(findings, str) else list(findings or ())
    if given and report is not None:
        raise UsageError("expected --findings or --report, found both: pass one of them")
    texts = [read_text(each) for each in given]
    if published and listed and texts:
        text = str(texts)  # a list as Python shows it: that is the form of training
    elif len(texts) > 1:
        text = " ".join(f"{each.rstrip('.')}." for each in texts)
    else:
        text = texts[0] if texts else normal if report is None else read_text(report, "--report")
    text = text.translate(DELETED) if published else text
    if not any(character.isalnum() for character in text):
        raise ConditionError(
            f"expected words in the text, found {text!r}: write what is to be seen"
        )
    return text

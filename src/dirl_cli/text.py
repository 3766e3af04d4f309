"""Text fit to be shown and kept: control characters made visible, secrets left out, nothing taken for a reference."""

import os
import re
import shlex
from typing import Any

# What a terminal would obey, as the pictures that Unicode has of it: ␛ for escape. Lines and tabs stay.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)

SECRET_KEY = re.compile(r"(?:^|[._])(?:api_?key|passw(?:or)?d|secret|token|(?:hf|api|auth|access)_?token)$", re.I)
SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
SECRET = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)|\b(?:hf_|sk-|gh[pousr]_)[A-Za-z0-9_-]{16,}")
HIDDEN = "***"


def escape_controls(text: str) -> str:
    """The text without what a terminal would obey."""
    return text.translate(CONTROLS)


def redact(text: str) -> str:
    """The text without tokens, passwords in addresses and the values of environment variables such as HF_TOKEN."""
    for value in known_secrets():
        text = text.replace(value, HIDDEN)
    return SECRET.sub(HIDDEN, text)


def known_secrets() -> list[str]:
    """What variables hold whose names tell that it is secret; a path to it is none."""
    values = (value for name, value in os.environ.items() if SECRET_VARIABLE.search(name))
    return [value for value in values if len(value) >= 8 and not value.startswith(("/", "~", "."))]


def is_secret(key: str, value: object) -> bool:
    """Whether a setting is one that nobody may read."""
    text = str(value)
    return value not in (None, "") and (SECRET_KEY.search(key) is not None or redact(text) != text)


def literal(value: Any) -> Any:
    """A text, or whatever holds texts, as OmegaConf has to be given it, which takes `${…}` for another key's value."""
    if isinstance(value, dict):
        return {key: literal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [literal(one) for one in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value


def counted(count: int, noun: str) -> str:
    """Such as: 1 row, or 2 rows."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shell_word(key: str, value: object) -> str:
    """`key=value` as it is typed in a shell."""
    return shlex.quote(f"{key}={value}")

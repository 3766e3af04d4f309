"""Make text fit to be shown and saved: numbers by digits, secrets redacted, control characters escaped."""

import os
import re
import shlex
from typing import Any

# Control characters, which a terminal would obey, to the pictures that Unicode has of them: ␛ for escape. Line breaks
# and tabs stay; those of 128 to 159 have no picture.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS[127] = 0x2421
CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)

SECRET_KEY = re.compile(r"(?:^|[._])(?:api_?key|passw(?:or)?d|secret|token|(?:hf|api|auth|access)_?token)$", re.I)
SECRET_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
SECRET = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)|\b(?:hf_|sk-|gh[pousr]_)[A-Za-z0-9_-]{16,}")
HIDDEN = "***"


def escape_controls(text: str) -> str:
    """The text with control characters replaced, so that a terminal obeys none."""
    return text.translate(CONTROLS)


def redact(text: str) -> str:
    """Replace tokens, passwords in addresses and the values of environment variables such as HF_TOKEN by ***."""
    for value in known_secrets():
        text = text.replace(value, HIDDEN)
    return SECRET.sub(HIDDEN, text)


def known_secrets() -> list[str]:
    """The values of environment variables whose names say that they are secret; a path is none, nor a short text."""
    values = []
    for name, value in os.environ.items():
        is_path = value.startswith(("/", "~", "."))
        if SECRET_VARIABLE.search(name) and len(value) >= 8 and not is_path:
            values.append(value)
    return values


def is_secret(key: str, value: object) -> bool:
    """Whether a setting holds a secret, by its key or by its value."""
    text = str(value)
    return value not in (None, "") and (SECRET_KEY.search(key) is not None or redact(text) != text)


def literal(value: Any) -> Any:
    """Escape `${…}`, which OmegaConf takes for another key's value, in a text or in all texts of nested containers."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):  # backslashes before it are doubled, since OmegaConf reads two as one
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


def counted(count: int, noun: str) -> str:
    """Such as: 1 row, or 2 rows."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shell_word(key: str, value: object) -> str:
    """`key=value` as it is typed in a shell."""
    return shlex.quote(f"{key}={value}")


def percent(share: float | None) -> str:
    """A share of 1 in percent, without the sign; "" for None."""
    return "" if share is None else with_digits(100 * share, 1)


def with_digits(value: float | None, digits: int) -> str:
    """A number with so many digits after the point; "" for None."""
    return "" if value is None else f"{value:.{digits}f}"

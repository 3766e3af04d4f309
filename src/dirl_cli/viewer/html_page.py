"""The page as one file: its parts joined, the payload compressed inside it."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "tokens.js", "answer.js", "list.js", "keys.js")  # in the order in which they run


def page(payload: dict[str, Any]) -> str:
    """A page that needs nothing else, and that holds no text of an answer but in base64: none can act as markup."""
    packed = gzip.compress(json.dumps(payload, separators=(",", ":")).encode(), compresslevel=6, mtime=0)
    parts = {
        "/* style */": part("page.css"),
        "/* scripts */": "\n".join(part(name) for name in SCRIPTS),
        "<!-- payload -->": base64.b64encode(packed).decode(),
    }
    text = part("page.html")
    for placeholder, content in parts.items():
        text = text.replace(placeholder, content)
    return text


def part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")

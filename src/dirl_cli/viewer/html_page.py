"""The page as one file: its parts joined, the payload compressed inside it."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "tokens.js", "answer.js", "list.js", "keys.js")  # in the order in which they run


def page(payload: dict[str, Any], is_served: bool = False) -> str:
    """A page that needs nothing else, and that holds no text of an answer but in base64: none can act as markup.

    is_served: it may ask the server that it comes from, and nobody else.
    """
    packed = gzip.compress(json.dumps(payload, separators=(",", ":")).encode(), compresslevel=6, mtime=0)
    scripts = ["served.js", *SCRIPTS] if is_served else SCRIPTS
    parts = {
        "connect-src 'none'": "connect-src 'self'" if is_served else "connect-src 'none'",
        "/* style */": part("page.css"),
        "/* scripts */": "\n".join(part(name) for name in scripts),
        "<!-- payload -->": base64.b64encode(packed).decode(),
    }
    text = part("page.html")
    for placeholder, content in parts.items():
        text = text.replace(placeholder, content)
    return text


def part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")

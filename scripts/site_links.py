"""A hook of the docs site: pages link into the repository as they stand in it, and the site holds what they link to.

README.md is the site's first page, docs/NAME.md is NAME.html, and directories of conf/ are pages of the configuration
reference. Every other file that a page links to is a page of its own: a notebook as prose and code, a text that is no
page as a listing.
"""

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()(?![\w+.-]+:|#)([^)#\s]+)(?=[)#])")
CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.M | re.S)
LANGUAGES = {".py": "python", ".pth": "python", ".yaml": "yaml", ".sh": "bash"}
PAGES = {"README.md": "index.md", "conf": "configuration/index.md"}  # of the repository, at a place of their own
PAGES |= {f"conf/{folder.name}": f"configuration/groups/{folder.name}.md" for folder in ROOT.glob("conf/*/")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what these link to in turn."""
    pending = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(pending)
    while pending:
        name = pending.pop()
        if place(name) not in files.src_uris:
            files.append(generated(name, config))
        if not name.endswith(".md") or not (ROOT / name).exists():
            continue
        for target in targets(name, (ROOT / name).read_text()):
            if target not in seen and (ROOT / target).exists():  # what is not there is MkDocs' to complain of
                seen.add(target)
                pending.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's links into the site's."""
    here = page.file.src_uri
    name = origin(here)

    def moved(match: re.Match[str]) -> str:
        target = resolved(name, match[2])
        return match[1] + posixpath.relpath(place(target), posixpath.dirname(here) or ".")

    return outside_code(markdown, lambda text: LINK.sub(moved, text))


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """A page with all but its code changed."""
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def targets(name: str, markdown: str) -> list[str]:
    """The files of the repository that one of its pages links to."""
    prose = "".join(CODE.split(markdown)[::2])
    return [resolved(name, match[2]) for match in LINK.finditer(prose)]


def resolved(name: str, link: str) -> str:
    """The path in the repository of what a page there links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def place(name: str) -> str:
    """Where the site has a file of the repository."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    is_asset = Path(name).suffix in (".md", ".png", ".svg", ".gif")
    return name if is_asset else f"{name}.md"


def origin(uri: str) -> str:
    """The file of the repository that a page of the site was made of."""
    for name, page in PAGES.items():
        if page == uri and (ROOT / name).is_file():
            return name
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def generated(name: str, config: MkDocsConfig) -> File:
    """A file of the repository outside docs/ as one of the site."""
    file, uri = ROOT / name, place(name)
    if file.suffix == ".ipynb":
        return File.generated(config, uri, content=prose_and_code(file), inclusion=InclusionLevel.NOT_IN_NAV)
    if uri == f"{name}.md":
        return File.generated(config, uri, content=listing(name), inclusion=InclusionLevel.NOT_IN_NAV)
    return File.generated(config, uri, abs_src_path=str(file), inclusion=InclusionLevel.INCLUDED)


def prose_and_code(notebook: Path) -> str:
    """A notebook as a page."""
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        language = "bash" if text.startswith("%%bash") else "python"
        parts.append(text if cell["cell_type"] == "markdown" else f"```{language}\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def listing(name: str) -> str:
    """A page that shows a text, which the search leaves out."""
    language = LANGUAGES.get(Path(name).suffix, "text")
    text = (ROOT / name).read_text()
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n````{language}\n{text}````\n"

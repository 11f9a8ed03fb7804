"""Builds the site's pages from files outside ``docs``: the README, and every file of the repository that a page names.

A link to a file (``../bench/results/host-cpu.md``) and a path in backticks (`tests/api/test_docs.py`) lead to a page
with its text. So each claim leads to what shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
# Pages of the site that lie outside docs.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".json": "json", "": "make"}
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
# In backticks, and not the text of a link or of a code block.
NAMED = re.compile(r"(?<!\[)`((?:\.ci|bench|examples|fused_clr|kernels|tests)/[\w/.-]+\.\w+)`(?!\])")
CODE = re.compile(r"(^```.*?^```$|^(?:    [^\n]*\n)+)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs, then the files that any page names."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        for name in _names(waiting.pop()):
            page = _page_of(name)
            if files.get_file_from_path(page) is None:
                added = _file(config, name, page)
                files.append(added)
                waiting += [added] if name.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links and paths in backticks into links within the site."""
    here = _path_of(page.file)

    def link(match: re.Match[str]) -> str:
        name = _resolve(here, match[1])
        return f"]({_relative(page.file, name)}{match[2] or ''})" if name else match[0]

    def named(match: re.Match[str]) -> str:
        return f"[`{match[1]}`]({_relative(page.file, match[1])})" if (ROOT / match[1]).is_file() else match[0]

    pieces = CODE.split(markdown)
    pieces[::2] = [NAMED.sub(named, LINK.sub(link, piece)) for piece in pieces[::2]]
    return "".join(pieces)


class Examples(griffe.Extension):
    """Renames the section ``Example:`` to the one that mkdocstrings knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that is documented."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")


def _names(file: File) -> set[str]:
    text, here = file.content_string, _path_of(file)
    found = {_resolve(here, match[1]) for match in LINK.finditer(text)}
    found |= {match[1] for match in NAMED.finditer(text) if (ROOT / match[1]).is_file()}
    return {name for name in found if name and not name.startswith("docs/") and name not in PAGES}


def _path_of(file: File) -> str:
    """Where a page's file lies in the repository."""
    for name, page in PAGES.items():
        if file.src_uri == page:
            return name
    if file.src_uri.startswith("source/"):
        return file.src_uri.removeprefix("source/")
    return f"docs/{file.src_uri}"


def _resolve(here: str, link: str) -> str | None:
    """The file of the repository that a relative link names, if there is one."""
    name = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    return name if (ROOT / name).is_file() else None


def _page_of(name: str) -> str:
    """The page or file of the site that shows a file of the repository."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"source/{name}" if Path(name).suffix in (".md", ".png", ".svg") else f"source/{name}.md"


def _relative(file: File, name: str) -> str:
    return posixpath.relpath(_page_of(name), posixpath.dirname(file.src_uri) or ".")


def _file(config: Any, name: str, page: str) -> File:
    path = ROOT / name
    if path.suffix in (".png", ".svg"):
        return File.generated(config, page, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV)
    text = path.read_text()
    if path.suffix != ".md":
        text = f"# {name}\n\n~~~~ {LANGUAGES[path.suffix]}\n{text}\n~~~~\n"
    # Found by their links, not by a search.
    text = f"---\nsearch:\n  exclude: true\n---\n{text}"
    return File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV)

"""What `make docs` does beside mkdocs: pages may link to files outside of docs/, as on a code host."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# these are pages of their own
PAGES = {"ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")
_FROM_OUTSIDE = re.compile(r"\]\((?:docs/)([^)]+)\)")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):(<code>)(?:~|)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, and every other file outside of docs/ that a page links to."""
    pages = [file.content_string for file in files.documentation_pages()]
    linked = {found for text in pages for found in _OUTSIDE.findall(text)} - PAGES.keys()
    for path, uri in (PAGES | {path: path for path in linked}).items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the copies, and those of the root's pages into it."""
    if page.file.src_uri in PAGES.values():
        return _FROM_OUTSIDE.sub(r"](\1)", markdown)
    return _OUTSIDE.sub(lambda found: f"]({PAGES.get(found[1], found[1])}", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drop the names of Sphinx's roles, which docstrings have for editors: :class:`Strategy` is `Strategy`."""
    return _ROLE.sub(r"\1", html)

"""How `make site` makes a site of the pages as they are in the repository (called by mkdocs; see mkdocs.yml).

Pages link to files outside of docs, such as the tour in CONTRIBUTING.md: these become part of the site, and links are
changed to where they lie there. The navigation is the list in index.md.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(\))")


def place_in_site(path: Path) -> str:
    """Where a file of the repository lies in the site. README.md would be a second index."""
    if path == ROOT / "README.md":
        return "readme.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def place_in_repository(place: str) -> Path:
    if place == "readme.md":
        return ROOT / "README.md"
    return DOCS / place if (DOCS / place).exists() else ROOT / place


def linked_from(page: Path) -> list[Path]:
    targets = ((page.parent / link[2]).resolve() for link in LINK.finditer(page.read_text(encoding="utf-8")))
    return [target for target in targets if target.is_file()]


def on_config(config: Any) -> Any:
    """The navigation: a section for each heading of index.md, a page for each link below it."""
    sections: list[dict[str, Any]] = [
        {"Overview": ["index.md", {"Introduction": "readme.md"}, {"简体中文": "README.zh.md"}]}
    ]
    for part in re.split(r"^## ", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        links = re.findall(r"\[([^\]]+)\]\(([^)#\s]+)\)", body)
        pages = [{title[0].upper() + title[1:]: place_in_site((DOCS / target).resolve())} for title, target in links]
        sections.append({heading: pages})
    config.nav = sections
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to outside of docs, and what that links to in turn."""
    found, open_ends = set(), sorted(DOCS.rglob("*.md"))
    while open_ends:
        for target in linked_from(open_ends.pop()):
            if target not in found and not target.is_relative_to(DOCS):
                found.add(target)
                files.append(File.generated(config, place_in_site(target), abs_src_path=str(target)))
                if target.suffix == ".md":
                    open_ends.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change each link to where its file lies in the site."""
    source = place_in_repository(page.file.src_uri)
    here = Path(page.file.src_uri).parent.as_posix()

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        place = os.path.relpath(place_in_site(target), here) if target.is_file() else link[2]
        return f"{link[1]}{place}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)

"""Links of the pages lead somewhere, both READMEs say the same, numbers beside other trainers are the measured ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pages import ROOT, blocks_of, pages, prose_of

MORE = ("CONTRIBUTING.md", "examples/README.md", "benchmarks/README.md", "downstream/README.md")
LINKED = [*pages(), *(ROOT / name for name in MORE), *(ROOT / "docs/decisions").glob("*.md")]
READMES = (ROOT / "README.md", ROOT / "README.zh.md")


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def headings_of(page: Path) -> list[str]:
    return re.findall(r"^(#+ .+)$", prose_of(page), re.MULTILINE)


def anchor_of(heading: str) -> str:
    """As GitHub and the site make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lstrip("# ").replace("`", "")).strip().lower())


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for link in links_of(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in [anchor_of(heading) for heading in headings_of(target)], link


def test_every_page_is_in_the_list_of_pages():
    listed = {link.partition("#")[0] for link in links_of(ROOT / "docs" / "index.md")}
    missing = [page.name for page in pages() if page.parent.name == "docs" and page.name not in listed]
    assert missing == ["index.md"]


def test_both_readmes_have_the_same_blocks():
    english, chinese = ([(block.language, block.text) for block in blocks_of(page)] for page in READMES)
    assert english == chinese


def test_both_readmes_have_the_same_headings_links_and_tables():
    english, chinese = READMES
    assert [heading.split()[0] for heading in headings_of(english)] == [
        heading.split()[0] for heading in headings_of(chinese)
    ]
    other_language = {"README.md", "README.zh.md"}
    assert [link for link in links_of(english) if link not in other_language] == [
        link for link in links_of(chinese) if link not in other_language
    ]
    rows = [[line.count("|") for line in prose_of(page).splitlines() if line.startswith("|")] for page in READMES]
    assert rows[0] == rows[1]
    names = [sorted(set(re.findall(r"`[^`]+`", prose_of(page)))) for page in READMES]
    assert names[0] == names[1]


def measured_rows(page: Path) -> list[list[str]]:
    """The cells of the table that compares trainers, without its head."""
    table = next(part for part in prose_of(page).split("\n\n") if part.startswith("|") and "Lightning" in part)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_numbers_beside_other_trainers_are_those_of_the_benchmarks_page(page):
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    numbers = set(re.findall(r"\d+(?:\.\d+)?", measured.replace(",", "")))
    rows = measured_rows(page)
    assert len(rows) == 10
    command = ""
    for _, *cells, words in rows:
        command = words if words.startswith("`") else command
        assert command.strip("`") in measured, words
        for cell in filter(None, cells):
            assert cell.removesuffix(" %") in numbers, cell


def texts_of_the_source() -> list[str]:
    """Texts of two words and more in src; "…" for what is filled in."""
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                parts = [re.sub(r"%(?:\.\d)?[sdrf]", "…", node.value)]
            else:
                continue
            texts.append("".join(parts))
    return texts


def test_every_message_that_troubleshooting_quotes_is_one_of_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", page, re.MULTILINE)
    assert len(quoted) > 20
    texts = texts_of_the_source()
    for message in quoted:
        fixed = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(fixed), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message

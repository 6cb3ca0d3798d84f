"""Turn README.md and docs/ into a site: a hook for MkDocs, which `make docs` runs.

README.md becomes the first page. A file outside docs/ that a page links to is copied into the site, so that the same
links work in the repository and in the site. The reference pages are made from the code, the proto and the metrics.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

import tinylm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COPIES = "repository"  # the folder of the site that holds files from outside docs/
LINK = re.compile(r"(\]\()([^)#\s:]+)([)#])")
PROTO = ROOT / "protos/tinylm/v1/tinylm.proto"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README.md, the files that pages link to, and the reference."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    copied = linked(readme, ROOT)
    for page in files.documentation_pages():
        copied |= linked(page.content_string, source_of(page.src_uri).parent)
    for path in sorted(copied):
        files.append(File.generated(config, f"{COPIES}/{path.relative_to(ROOT)}", abs_src_path=str(path)))
    generated = {
        "index": readme,
        "reference/python": python(),
        "reference/command-line": command_line(),
        "reference/grpc": grpc(),
        "reference/metrics": metrics(),
    }
    for name, content in generated.items():
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def source_of(uri: str) -> Path:
    """Return the file in the repository that a page of the site comes from."""
    if uri == "index.md":
        return ROOT / "README.md"
    return ROOT / uri.removeprefix(f"{COPIES}/") if uri.startswith(COPIES) else DOCS / uri


def linked(text: str, base: Path) -> set[Path]:
    """Return the files outside docs/ that a page in `base` links to, and the files that those pages link to."""
    found: set[Path] = set()
    for _, target, _ in LINK.findall(text):
        path = (base / target).resolve()
        if path.is_file() and path != ROOT / "README.md" and not path.is_relative_to(DOCS):
            found.add(path)
            if path.suffix == ".md":
                found |= linked(path.read_text(encoding="utf-8"), path.parent)
    return found


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite links between docs/ and the rest of the repository."""
    uri = page.file.src_uri
    base = source_of(uri).parent
    up = "../" * uri.count("/")

    def rewritten(match: re.Match[str]) -> str:
        path = (base / match[2]).resolve()
        if path.is_relative_to(DOCS):
            return f"{match[1]}{up}{path.relative_to(DOCS)}{match[3]}"
        return f"{match[1]}{up}{COPIES}/{path.relative_to(ROOT) if path.is_file() else 'missing'}{match[3]}"

    return LINK.sub(rewritten, markdown)


def python() -> str:
    """Return a page in which mkdocstrings documents every public name of the package `tinylm`."""
    names = [name for name in tinylm.__all__ if not name.startswith("_")]
    blocks = [f"::: {getattr(tinylm, name).__module__}.{name}" for name in names]
    return "\n\n".join(["# Python", "Import these names from `tinylm`.", *blocks]) + "\n"


def command_line() -> str:
    """Return the help of every command of `tinylm`, as Markdown."""
    from tinylm.cli import app

    command: Any = typer.main.get_command(app)
    command.commands = {name: own for name, own in command.commands.items() if not own.hidden}
    context = typer.Context(command, info_name="tinylm")
    return str(get_docs_for_click(obj=command, ctx=context, name="tinylm", title="Command line"))


def grpc() -> str:
    """Return the proto, whose comments explain every method and field."""
    return f"# gRPC\n\n```protobuf\n{PROTO.read_text(encoding='utf-8')}```\n"


def metrics() -> str:
    """Return the table of the service's metrics."""
    from tinylm.serving import metrics

    return f"# Metrics\n\nRay adds the prefix `ray_` to every name.\n\n{metrics.table()}\n"

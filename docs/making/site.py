"""Turn README.md and docs/ into a site: a hook for MkDocs, which `make docs` runs.

README.md becomes the first page. A file outside docs/ that a page links to is copied into the site, so that the same
links work in the repository and in the site. The reference pages are made from the proto, the code and the metrics.
"""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import grpc_tools
import typer.main
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

import tinylm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
COPIES = "repository"  # the folder of the site that holds files from outside docs/
LINK = re.compile(r"(\]\()([^)#\s:]+)([)#])")
PROTO = "protos/tinylm/v1/tinylm.proto"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add README.md, the files that pages link to, and the reference."""
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    pages |= {file.src_uri: file.content_string for file in files.documentation_pages()}
    copied: set[Path] = set()
    for uri, text in pages.items():
        copied |= linked(text, source_of(uri).parent)
    for path in sorted(copied):
        uri = f"{COPIES}/{path.relative_to(ROOT)}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", content=pages["index.md"]))
    for name, write in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    return files


def source_of(uri: str) -> Path:
    """Return the file in the repository that a page of the site comes from."""
    if uri == "index.md":
        return ROOT / "README.md"
    return ROOT / uri.removeprefix(f"{COPIES}/") if uri.startswith(COPIES) else DOCS / uri


def linked(text: str, base: Path) -> set[Path]:
    """Return the files outside docs/ that a page in `base` links to, and what these link to in turn."""
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
    """Return a page that has mkdocstrings document every name of the package `tinylm`."""
    names = [name for name in tinylm.__all__ if not name.startswith("_")]
    blocks = [f"::: {getattr(tinylm, name).__module__}.{name}" for name in names]
    return "\n\n".join(["# Python", "Import these names from `tinylm`.", *blocks]) + "\n"


def command_line() -> str:
    """Return what `tinylm COMMAND --help` says, as Markdown."""
    from tinylm.cli import app

    command: Any = typer.main.get_command(app)
    command.commands = {name: own for name, own in command.commands.items() if not own.hidden}
    context = typer.Context(command, info_name="tinylm")
    return str(get_docs_for_click(obj=command, ctx=context, name="tinylm", title="Command line"))


def metrics() -> str:
    """Return the table of the service's metrics."""
    from tinylm.serving import metrics

    return f"# Metrics\n\nRay adds the prefix `ray_` to every name.\n\n{metrics.table()}\n"


def grpc() -> str:
    """Return the methods, messages and enums of the proto, with the comment that stands before each of them."""
    file = _descriptor()
    comments = {tuple(place.path): " ".join(place.leading_comments.split()) for place in file.source_code_info.location}
    top = next(place for place in file.source_code_info.location if list(place.path) == [12])  # the `syntax` line
    lines = [f"# gRPC: package `{file.package}`", "", textwrap.dedent(top.leading_comments).strip(), ""]

    def section(title: str, head: str, at: tuple[int, ...], rows: list[list[str]]) -> None:
        lines.extend([f"## {title}", "", comments.get(at, ""), ""])
        if rows:
            lines.extend([head, "| --- " * head.count(" | ") + "| --- |"])
            lines.extend(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        lines.append("")

    for i, service in enumerate(file.service):
        methods = [
            [f"`{m.name}`", _link(m.input_type), _link(m.output_type, m.server_streaming), comments[6, i, 2, j]]
            for j, m in enumerate(service.method)
        ]
        section(f"Service `{service.name}`", "| method | request | response | meaning |", (6, i), methods)
    for i, message in enumerate(file.message_type):
        fields = [
            [f"`{f.name}`", _type(f), str(f.number), comments.get((4, i, 2, j), "")]
            for j, f in enumerate(message.field)
        ]
        section(message.name, "| field | type | number | meaning |", (4, i), fields)
    for i, enum in enumerate(file.enum_type):
        values = [[f"`{v.name}`", str(v.number), comments.get((5, i, 2, j), "")] for j, v in enumerate(enum.value)]
        section(enum.name, "| value | number | meaning |", (5, i), values)
    return "\n".join(lines)


def _descriptor() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        includes = [f"-I{ROOT / 'protos'}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        command = ["protoc", *includes, "--include_source_info", f"--descriptor_set_out={out}", str(ROOT / PROTO)]
        if status := protoc.main(command):
            sys.exit(status)
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _type(field: FieldDescriptorProto) -> str:
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = _link(field.type_name) if field.type_name else f"`{scalar}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _link(name: str, streamed: bool = False) -> str:
    name = name.rpartition(".")[2]
    return f"{'stream of ' if streamed else ''}[{name}](#{name.lower()})"


REFERENCE = {"python": python, "command-line": command_line, "grpc": grpc, "metrics": metrics}  # page -> what makes it

"""docs/reference/: the gRPC API from the proto, the Python API and the command line from their own docstrings.

    python -m docs.making.reference [--check]

`--check` writes nothing and fails when a page is stale. Explains nothing itself: what is missing there is to be said in
the proto's comments, the docstrings and the help texts.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc_tools
import typer.main
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from typer.cli import get_docs_for_click

import tinylm.client

OUT = Path("docs/reference")
PROTO = Path("protos/tinylm/v1/tinylm.proto")
NOT_LIBRARY = {"__init__", "__main__", "cli", "launch", "bench"}  # modules of tinylm/ that are for the command line
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# --- gRPC


def grpc_page() -> str:
    """Services, methods, messages, fields and enums, each with the comment that stands before it in the proto."""
    file = _descriptor()
    comments = {tuple(place.path): _one_line(place.leading_comments) for place in file.source_code_info.location}
    at_top = next(place for place in file.source_code_info.location if list(place.path) == [12])  # before `syntax`
    lines = [f"# gRPC: package `{file.package}`", "", textwrap.dedent(at_top.leading_comments).strip(), ""]
    for i, service in enumerate(file.service):
        lines += [f"## Service `{service.name}`", "", comments.get((6, i), ""), ""]
        lines += ["| method | takes | gives | |", "| --- | --- | --- | --- |"]
        for j, method in enumerate(service.method):
            gives = ("a stream of " if method.server_streaming else "") + _message_link(method.output_type)
            takes = ("a stream of " if method.client_streaming else "") + _message_link(method.input_type)
            lines.append(f"| `{method.name}` | {takes} | {gives} | {_cell(comments[6, i, 2, j])} |")
        lines.append("")
    for i, message in enumerate(file.message_type):
        lines += [f"## {message.name}", "", comments.get((4, i), ""), ""]
        if message.field:
            lines += ["| field | type | number | |", "| --- | --- | --- | --- |"]
        for j, field in enumerate(message.field):
            comment = _cell(comments.get((4, i, 2, j), ""))
            lines.append(f"| `{field.name}` | {_field_type(field)} | {field.number} | {comment} |")
        lines.append("")
    for i, enum in enumerate(file.enum_type):
        lines += [f"## {enum.name}", "", comments.get((5, i), ""), "", "| value | number | |", "| --- | --- | --- |"]
        for j, value in enumerate(enum.value):
            lines.append(f"| `{value.name}` | {value.number} | {_cell(comments.get((5, i, 2, j), ''))} |")
        lines.append("")
    return _page(PROTO, lines)


def _descriptor() -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        includes = ["-Iprotos", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        arguments = ["protoc", *includes, "--include_source_info", f"--descriptor_set_out={out}", str(PROTO)]
        if status := protoc.main(arguments):
            sys.exit(status)
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _field_type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        name = _message_link(field.type_name)
    else:
        name = f"`{FieldDescriptorProto.Type.Name(field.type).removeprefix('TYPE_').lower()}`"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _message_link(name: str) -> str:
    name = name.rpartition(".")[2]
    return f"[{name}](#{name.lower()})"


# --- Python


def python_page() -> str:
    """Public classes and functions of the library's modules: signature, docstring, fields with their comments."""
    exported = [name for name in tinylm.__all__ if not name.startswith("_")]
    lines = ["# Python", "", _docstring(_tree(Path("tinylm/__init__.py"))), ""]
    lines += ["Straight from `tinylm`: " + ", ".join(f"[`{n}`](#{n.lower()})" for n in exported) + ".", ""]
    files = sorted([*Path("tinylm").glob("*.py"), *Path("tinylm/client").glob("*.py")])
    modules = [path for path in files if path.stem not in NOT_LIBRARY]
    for path in [*modules, Path("serve_app.py")]:
        name = ".".join(path.with_suffix("").parts)
        tree, source = _tree(path), path.read_text(encoding="utf-8").splitlines()
        definitions = [n for n in tree.body if isinstance(n, (ast.ClassDef, *FUNCTIONS)) and not n.name.startswith("_")]
        if path.parent.name == "client":
            definitions = [n for n in definitions if n.name in {*tinylm.client.__all__, "Connection"}]
        if definitions:
            lines += [f"## {name}", "", _docstring(tree), ""]
        for node in definitions:
            lines += [f"### {node.name}", "", *_signature(node, source), "", _docstring(node), ""]
            if isinstance(node, ast.ClassDef):
                lines += [*_fields(node, source), *_methods(node, source)]
    return _page("tinylm/", lines)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As Markdown: what is indented, or an example for an interpreter, is code."""
    return "\n\n".join(
        f"```python\n{textwrap.dedent(part)}\n```" if part.startswith((" ", ">>>")) else part
        for part in (ast.get_docstring(node) or "").replace(":\n>>>", ":\n\n>>>").split("\n\n")
    )


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> list[str]:
    """As it stands in the file, decorators included."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    last = max(node.lineno, node.body[0].lineno - 1)
    if isinstance(node, ast.ClassDef):
        last = next(i for i in range(node.lineno, len(source) + 1) if source[i - 1].rstrip().endswith(":"))
    text = textwrap.dedent("\n".join(source[first - 1 : last])).strip()
    return ["```python", text.split("  # type: ignore")[0].removesuffix(":"), "```"]


def _fields(node: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """A table of annotated attributes; the comment is that of the line."""
    annotated = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = [n for n in annotated if not n.target.id.startswith("_")]  # type: ignore[union-attr]  # seen above
    if not fields:
        return
    yield from ("| field | type | default | |", "| --- | --- | --- | --- |")
    for field in fields:
        default = f"`{_cell(ast.unparse(field.value))}`" if field.value else ""
        comment = source[(field.end_lineno or field.lineno) - 1][field.end_col_offset :].strip().removeprefix("# ")
        name = ast.unparse(field.target)
        yield f"| `{name}` | `{_cell(ast.unparse(field.annotation))}` | {default} | {_cell(comment)} |"
    yield ""


def _methods(node: ast.ClassDef, source: list[str]) -> Iterator[str]:
    for method in node.body:
        if not isinstance(method, FUNCTIONS):
            continue
        if method.name.startswith("_") and method.name != "__init__":
            continue
        yield from (f"#### {node.name}.{method.name}", "", *_signature(method, source), "", _docstring(method), "")


# --- the command line


def cli_page() -> str:
    """What `tinylm COMMAND --help` says."""
    from tinylm.cli import app

    command: Any = typer.main.get_command(app)  # a group
    command.commands = {name: own for name, own in command.commands.items() if not own.hidden}
    context = typer.Context(command, info_name="tinylm")
    return _page("tinylm/cli.py", [get_docs_for_click(obj=command, ctx=context, name="tinylm", title="Command line")])


# --- all of them


def index_page() -> str:
    return _page(
        "docs/making/reference.py",
        [
            "# Reference",
            "",
            "- [gRPC](grpc.md): methods, messages, fields",
            "- [Python](python.md): the library's modules, the client, the service's settings",
            "- [Command line](cli.md): `tinylm` and its options",
        ],
    )


PAGES = {"README.md": index_page, "grpc.md": grpc_page, "python.md": python_page, "cli.md": cli_page}


def pages() -> dict[Path, str]:
    return {OUT / name: make() for name, make in PAGES.items()}


def _page(source: object, lines: list[str]) -> str:
    text = "\n".join([f"<!-- made from {source} by `make reference` -->", "", *lines]) + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.making.reference", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    if parser.parse_args().check:
        stale = [str(p) for p, text in pages().items() if not p.exists() or p.read_text(encoding="utf-8") != text]
        sys.exit(f"stale: {', '.join(stale)}; make reference" if stale else 0)
    OUT.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

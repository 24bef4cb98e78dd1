"""The vendor's wheel, read without being imported: its Python by ast, its operators, headers and library."""

from __future__ import annotations

import ast
import inspect
import re
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path

import torch
import yaml


class Wheel:
    def __init__(self, packages: Path) -> None:
        self.root = packages / "torch_npu"
        (information,) = packages.glob("torch_npu-*.dist-info")
        self.metadata = HeaderParser().parsestr((information / "METADATA").read_text(encoding="utf-8"))

    @cached_property
    def library(self) -> bytes:
        return (self.root / "lib" / "libtorch_npu.so").read_bytes()

    @cached_property
    def operators(self) -> dict[str, str]:
        """Name with overload -> schema, of everything that has a kernel of its own for the device.

        A schema is empty for torch's own operators that are listed by name only.
        """
        listed: dict[str, str] = {}
        for file in ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml"):
            lists = yaml.safe_load((self.root / "csrc" / "aten" / file).read_text(encoding="utf-8"))
            entries = [entry for entries in lists.values() if isinstance(entries, list) for entry in entries]
            for entry in entries:
                schema = entry if isinstance(entry, str) else entry.get("func", "")
                listed[schema.partition("(")[0]] = schema if "(" in schema else ""
        return listed

    def registered(self, name: str) -> torch.FunctionSchema:
        """The schema that the library itself registers for an operator without overloads."""
        found = re.search(rb"(?<![\w.])" + name.encode() + rb"\([^\0]*\) -> [^\0]*", self.library)
        assert found is not None, f"{name} is not registered"
        return torch._C.parse_schema(found.group().decode())

    def header(self, path: str) -> str:
        return (self.root / "include" / path).read_text(encoding="utf-8")

    def module(self, path: str) -> ast.Module:
        return ast.parse((self.root / path).read_text(encoding="utf-8"))

    def names_of(self, path: str) -> set[str]:
        """What a module defines or imports at its top level."""
        names: set[str] = set()
        for node in self.module(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names.update(alias.asname or alias.name for alias in node.names)
        return names

    def signature(self, folder: str, name: str, method: str | None = None) -> inspect.Signature:
        """Of a function, a class's constructor or a method that some module of a folder defines."""
        for path in sorted((self.root / folder).glob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                    return _signature_of(node, method)
        raise AssertionError(f"torch_npu/{folder} defines no {name}")


def _signature_of(node: ast.FunctionDef | ast.ClassDef, method: str | None) -> inspect.Signature:
    if isinstance(node, ast.ClassDef):
        wanted = (method,) if method else ("__init__", "__new__")
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef) and inner.name in wanted:
                return _parsed(inner.args)
        raise AssertionError(f"{node.name} has no {' or '.join(wanted)}")
    return _parsed(node.args)


def _parsed(arguments: ast.arguments) -> inspect.Signature:
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    function = ast.Lambda(arguments, ast.Constant(None))
    return inspect.signature(eval(ast.unparse(function)))

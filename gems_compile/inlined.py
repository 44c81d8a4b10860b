"""A user's Triton function as text that stands in a kernel by itself.

Kernels are compiled by processes that import Triton alone, and their text is their key in the
caches. So the text holds the function, and what it uses: helpers, constants, and imports of
Triton's own modules and of ours.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import math
import sys
import textwrap
from types import ModuleType
from typing import Any

import triton.language as tl

from .errors import AuthoringError

#: what compile workers can import
IMPORTABLE = ("triton", "math", "gems_compile.kernels")


def inlined(function: Any, name: str) -> str:
    """The text that defines ``function`` (a ``triton.jit`` function) as ``name``.

    All that it uses is named ``name_...``, so that texts of several functions can stand together.
    Comments and docstrings are no part of it.

    Raises:  AuthoringError for a global that is no Triton function, number, text, dtype or module,
             and for a function whose source Python cannot find
    """
    writer = _Writer(name)
    writer.define(function.fn, name)
    head = ["\n".join(writer.lines)] if writer.lines else []
    return "\n\n\n".join([*head, *writer.functions]) + "\n"


def returned(function: Any) -> set[int]:
    """How many results a function's ``return`` lines name; nothing of those that name a call."""
    tree = _parsed(function.fn, function.fn.__name__)
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    plain = [v for v in values if not isinstance(v, (ast.Call, ast.Name))]
    return {len(v.elts) if isinstance(v, ast.Tuple) else 1 for v in plain}


class _Writer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: list[str] = []  # imports and constants
        self.functions: list[str] = []  # helpers stand before what calls them
        self.known: dict[int, str] = {}  # id of an object -> what it is called
        self.objects: list[Any] = []  # those objects, or another might get the id of one

    def define(self, function: Any, name: str) -> None:
        tree = _parsed(function, self.name)
        tree.name, tree.decorator_list = name, []
        if ast.get_docstring(tree) is not None:
            tree.body = tree.body[1:] or [ast.Pass()]
        _Renamer(self, function, tree).visit(tree)
        self.functions.append(f"@triton.jit\n{ast.unparse(tree)}")

    def named(self, what: Any, like: str) -> str:
        """What an object is called in the text, which defines it from now on."""
        if what is tl:
            return "tl"
        if id(what) not in self.known:
            name = f"{self.name}_{like.strip('_')}"
            while name in self.known.values():
                name += "_"
            self.known[id(what)] = name
            self.objects.append(what)
            self._write(what, name, like)
        return self.known[id(what)]

    def _write(self, what: Any, name: str, like: str) -> None:
        home, own = _home(what)
        if isinstance(what, ModuleType):
            self.lines.append(f"import {what.__name__} as {name}")
        elif home is not None:
            self.lines.append(f"from {home} import {own} as {name}")
        elif is_jit(what):
            self.define(what.fn, name)
        else:
            self.lines.append(f"{name} = tl.constexpr({self._constant(what, like)})")

    def _constant(self, what: Any, like: str) -> str:
        value = what.value if isinstance(what, tl.constexpr) else what
        if isinstance(value, tl.dtype):
            return next(f"tl.{n}" for n in dir(tl) if getattr(tl, n) is value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        raise AuthoringError(
            f"{self.name}: its global {like!r} is a {type(value).__name__}; a body may use "
            "functions of triton.jit, numbers, text, dtypes and the modules of Triton"
        )


class _Renamer(ast.NodeTransformer):
    """Gives a function's globals the names that they have in the text."""

    def __init__(self, writer: _Writer, function: Any, tree: ast.FunctionDef) -> None:
        self.writer = writer
        self.globals = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        self.local = {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)} | {
            n.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)
        }

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.local or (node.id not in self.globals and hasattr(builtins, node.id)):
            return node
        return self._named(self._found(node), node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """What stands in a module that workers cannot import is taken out of it."""
        module = self._module(node.value)
        if module is None or _is_importable(module.__name__):
            return self.generic_visit(node)
        return self._named(getattr(module, node.attr), node.attr)

    def _module(self, node: ast.AST) -> ModuleType | None:
        if isinstance(node, ast.Name) and node.id not in self.local:
            found = self.globals.get(node.id)
        elif isinstance(node, ast.Attribute):
            found = getattr(self._module(node.value), node.attr, None)
        else:
            found = None
        return found if isinstance(found, ModuleType) else None

    def _found(self, node: ast.Name) -> Any:
        if node.id not in self.globals:
            raise AuthoringError(
                f"{self.writer.name}: {node.id!r} is not defined; what a body uses must be "
                "defined before it"
            )
        return self.globals[node.id]

    def _named(self, what: Any, like: str) -> ast.Name:
        return ast.Name(self.writer.named(what, like), ast.Load())


def _parsed(function: Any, name: str) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError) as error:
        raise AuthoringError(
            f"{name}: the source of {function.__qualname__} cannot be read ({error}); define it "
            "in a file or in a notebook"
        ) from None
    assert isinstance(tree, ast.FunctionDef)  # triton.jit takes no other
    return tree


def is_jit(what: Any) -> bool:
    """Whether it came out of ``triton.jit``, compiled or interpreted."""
    return hasattr(what, "fn") and type(what).__module__.startswith("triton.runtime")


def _is_importable(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in IMPORTABLE)


def _home(what: Any) -> tuple[str | None, str]:
    """(module, name) that import it, if workers can."""
    function = getattr(what, "fn", what)
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    if not isinstance(module, str) or not _is_importable(module):
        return None, name
    return (module if getattr(sys.modules[module], name, None) is what else None), name

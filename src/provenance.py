"""What made a result: a fingerprint of the code, the commit, versions, the machine."""

import ast
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from src import ROOT

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pycocotools")
FINGERPRINTED = (".py", ".json")  # endings of the files in `src` that decide results
_LIBRARIES = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib", "platlib"))
_HASHED_WHOLE = 2**24  # bytes; of a larger tensor an even sample and the sum are hashed


# --- the code as files ----------------------------------------------------------------------------
def code_fingerprint(*notebooks: Path, folder: Path = ROOT) -> str:
    """Digest the code behind a result: that of `src`, its data files, and the given notebooks.

    It is taken from the syntax trees without comments, docstrings, formatting and line endings, so
    that none of these makes a result look older than its code. Hidden files do not count, such as
    the copies that JupyterLab (`.ipynb_checkpoints/`) and macOS (`._name.py`) leave. It needs no
    git.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in (folder / "src").rglob("*") if p.suffix in FINGERPRINTED):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        name, text = path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        content = _tree(text) if path.suffix == ".py" else text
        digest.update(f"{name}\n{content}\n".encode())
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        digest.update("\n".join([path.name, *map(_tree, sources)]).encode())
    return digest.hexdigest()[:16]


def _tree(source: str) -> str:
    """The syntax tree of Python code as text that is the same in every version of Python."""

    def text(node) -> str:
        if isinstance(node, list):
            return "[" + ",".join(map(text, node)) + "]"
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = [
            f"{name}={text(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in ("kind", "type_comment")
        ]
        return f"{type(node).__name__}({','.join(fields)})"

    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a magic command
        return source.strip()
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return text(tree)


def commit() -> str:
    """The commit of this code, `+changes` where the code differs.

    "unknown" without git, and inside another project's repository.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(ROOT):
            return "unknown"
        changes = git("status", "--porcelain", "--", "src", "requirements.txt")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def machine(device: torch.device) -> str:
    """One line on the hardware, for results and timings."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            name = next(found, name)
    return f"{name}, {torch.get_num_threads()} threads"


def _is_ours(value) -> bool:
    """Whether a function or class is code of this project, not of a library."""
    name = str(getattr(value, "__module__", None))
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    library = name.split(".")[0] in sys.stdlib_module_names or file.startswith(_LIBRARIES)
    return name == "__main__" or not library


# --- the code as objects --------------------------------------------------------------------------
def object_digest(*objects) -> str:
    """Digest what objects are and do: values, tensors, and functions with all that they use.

    A function counts with its code, its defaults, what it closes over, and the functions, classes
    and values of this project that it names, but not with what it reaches through a module. So a
    checkpoint can tell whether the loss, the data or the network behind it are still the same.
    """
    digest, seen, kept = hashlib.sha256(), set(), []

    def put(text) -> None:
        digest.update(f"{text};".encode())

    def add_code(code: types.CodeType) -> None:
        digest.update(code.co_code)
        put(code.co_names)
        for constant in code.co_consts:
            add_code(constant) if isinstance(constant, types.CodeType) else add(constant)

    def names(code: types.CodeType) -> set[str]:
        inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
        return set(code.co_names).union(*map(names, inner))

    def add_function(function: types.FunctionType) -> None:
        add_code(function.__code__)
        add(function.__defaults__)
        add(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                add(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                put("unbound")
        for name in sorted(names(function.__code__) & function.__globals__.keys()):
            value = function.__globals__[name]
            if not isinstance(value, types.ModuleType):
                put(name)
                add(value)

    def add_class(kind: type) -> None:
        for name, part in sorted(vars(kind).items()):
            if isinstance(part, (types.FunctionType, staticmethod, classmethod)):
                put(name)
                add_function(getattr(part, "__func__", part))
            elif isinstance(part, property):
                put(name)
                add([part.fget, part.fset])
            elif not name.startswith("__"):  # those describe the class
                put(name)
                add(part)

    def add_tensor(tensor: torch.Tensor) -> None:
        put((tensor.dtype, tuple(tensor.shape)))
        if tensor.numel() * tensor.element_size() > _HASHED_WHOLE:
            flat = tensor.detach().reshape(-1)
            # in parts, as the sum takes a copy in double precision
            put(sum(float(part.double().sum()) for part in flat.split(2**20)))
            tensor = flat[:: max(1, flat.numel() // 2**20)]
        # contiguous() would leave the strides of dimensions of size 1, which view() refuses
        plain = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(plain.view(torch.uint8).numpy().tobytes())

    def add(value) -> None:
        if isinstance(
            value, (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
        ):
            return put(repr(value))
        if id(value) in seen:
            return put("again")
        seen.add(id(value))
        kept.append(value)  # alive, so that its id is not given away
        put(type(value).__qualname__)
        if isinstance(value, torch.Tensor):
            add_tensor(value.reshape(1) if value.ndim == 0 else value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            put((value.dtype, value.shape))
            digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, torch.nn.Module):
            put(value)
            for part in value.modules():
                add(type(part))
                add({k: v for k, v in vars(part).items() if not k.startswith("_")})
            add(dict(value.state_dict()))
        elif isinstance(value, types.MethodType):
            add(value.__self__)
            add_function(value.__func__)
        elif isinstance(value, types.FunctionType):
            add_function(value) if _is_ours(value) else put(value.__qualname__)
        elif isinstance(value, type):
            put(value.__qualname__)
            for kind in filter(_is_ours, value.__mro__):
                add_class(kind)
        elif isinstance(value, functools.partial):
            add([value.func, value.args, value.keywords])
        elif isinstance(value, dict):
            for key, part in value.items():
                put(repr(key))
                add(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part)
        elif isinstance(value, (set, frozenset)):  # their order differs from process to process
            put(sorted(map(repr, value)))
        elif hasattr(type(value), "digest_parts"):  # an object of which only some parts matter
            add(value.digest_parts())
        elif (
            dataclasses.is_dataclass(value)
            or _is_ours(type(value))
            or isinstance(value, torch.utils.data.Dataset)
        ):
            add(type(value))
            add(vars(value))
        elif isinstance(value, torch.utils.data.DataLoader):
            add(value.dataset)
        else:
            put(re.sub(" at 0x[0-9A-Fa-f]+", "", repr(value)))  # addresses differ from run to run

    for each in objects:
        add(each)
    return digest.hexdigest()[:16]

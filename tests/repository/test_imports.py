"""Who may import whom, read from the sources by `ast`: nothing of the package is imported here.

The package has layers, and a layer may import only what its row below names. That is what keeps algorithms out of the
kernels and the vocabulary out of the objective. Imports inside functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "conspo_kernels"
MAX_LINES = 350
MAX_FUNCTION_LINES = 60  # of its code: a docstring and the lines of its signature do not count
MAX_PUBLIC_LINES = 15  # of a public function's body
LONGER_FILES: frozenset[str] = frozenset()  # files of the package allowed above MAX_LINES
SHAPELESS_NAMES = {"util", "utils", "helper", "helpers"}
SOURCES = (PACKAGE, "benchmarks", "examples", "ptx_executor", "tests")

ROOT = PACKAGE  # the package's __init__, as a module that imports or is imported
EXTENSION = "_C"
CORE = {"torch", "numpy"}  # the dependencies every installation has
ANYTHING = {"*"}
EDGES = {"integrations", "gradcheck", "__main__"}
PUBLIC = {"loss", "logprobs", "two_phase", "modules", "trust_region"}


class Rule(NamedTuple):
    """What the modules of one row may import. Patterns are of areas and modules: "kernels" covers all below it."""

    ours: Set[str]
    foreign: Set[str]  # beside the standard library
    but: Set[str] = frozenset()  # taken out of `ours`
    names: Set[str] = frozenset()  # single names that may come from any module of ours
    lazy: bool = False  # what is neither CORE nor the standard library is imported inside functions only
    computed: bool = False  # a module's name may be computed at run time


# The first row that covers a module is its rule.
RULES = {
    ROOT: Rule(ours=PUBLIC | {"margin"}, foreign=set(), names={"ConSPOOutput", "Parallel"}),
    "__main__": Rule(ours=ANYTHING, foreign=CORE | {"triton"}),
    "gradcheck": Rule(ours=ANYTHING, foreign=CORE | {"triton", "ptx_executor"}),
    "reference": Rule(ours=set(), foreign={"torch"}),
    "margin": Rule(ours=set(), foreign={"torch"}),
    "objective": Rule(ours=set(), foreign={"torch"}),
    "metrics": Rule(ours=set(), foreign={"torch"}),
    "values": Rule(ours=set(), foreign={"torch"}),
    "parallel": Rule(ours={"values"}, foreign={"torch"}),
    "inputs.check": Rule(ours={"inputs.autocast", "backends.registry", "values"}, foreign={"torch"}),
    "inputs.rollouts": Rule(ours={"inputs", "sources", "ops", "objective", "values"}, foreign={"torch"}),
    "inputs": Rule(ours={"inputs", "sources", "ops", "parallel", "values"}, foreign={"torch"}),
    "backends.native": Rule(
        ours={"backends.contract", "backends.eager", "objective", "values", EXTENSION}, foreign=ANYTHING
    ),
    "backends.registry": Rule(ours={"backends.contract"}, foreign={"torch"}, computed=True),
    "backends.triton": Rule(
        ours={"backends.contract", "backends.triton", "objective", "values"}, foreign={"torch", "triton"}
    ),
    "backends.eager": Rule(ours={"backends.contract", "backends.eager", "objective", "values"}, foreign={"torch"}),
    "backends": Rule(ours={"objective", "values"}, foreign={"torch"}),
    "linear": Rule(ours={"linear", "backends.contract", "values"}, foreign={"torch"}),
    "ops": Rule(ours={"ops", "linear", "backends.contract", "backends.registry", "objective", "values"}, foreign=CORE),
    "sources": Rule(ours={"ops", "parallel", "values"}, foreign={"torch"}),
    "conspo": Rule(ours={"ops", "sources", "objective", "metrics", "parallel", "values"}, foreign={"torch"}),
    "weighted": Rule(ours={"ops", "sources", "conspo", "parallel", "values"}, foreign={"torch"}),
    "options": Rule(ours={"parallel"}, foreign={"torch"}),
    "integrations.required": Rule(ours=set(), foreign=set(), computed=True),
    "integrations.support": Rule(ours={"integrations.required"}, foreign=set(), computed=True),
    # trust_region: the public function and its module have one name.
    "integrations": Rule(ours={ROOT, "integrations", "trust_region"}, foreign=ANYTHING, lazy=True),
    # The public functions.
    "*": Rule(
        ours={*PUBLIC, "options", "inputs", "conspo", "weighted", "sources", "parallel", "values"},
        foreign={"torch", "typing_extensions"},
    ),
}


class Import(NamedTuple):
    line: int
    target: str  # "kernels.native" or ROOT for ours, "torch" for foreign, "" where it cannot be known
    name: str | None  # the name taken out of the target, by `from target import name`
    ours: bool
    in_function: bool


def covers(pattern: str, module: str) -> bool:
    """Whether the pattern is the module or one of the packages it lies in."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def covered(module: str, patterns: Set[str]) -> bool:
    return any(covers(pattern, module) for pattern in patterns)


def modules(package: Path) -> dict[str, Path]:
    """Modules by their names below the package; a folder's __init__ has the folder's name, the package's own ROOT."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        paths[".".join(parts) or ROOT] = path
    return paths


def nodes(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below the tree, and whether it is run by a function only."""
    for child in ast.iter_child_nodes(tree):
        yield child, in_function
        body = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from nodes(child, in_function or body)


def absolute(module: str, is_package: bool, level: int, name: str) -> str | None:
    """The full name that `from ..name import` means in a module of the package; None where it leaves the package."""
    if level == 0:
        return name
    own = [PACKAGE] if module == ROOT else [PACKAGE, *module.split(".")]
    base = own if is_package else own[:-1]
    base = base[: max(0, len(base) - (level - 1))]
    return ".".join([*base, name] if name else base) if base else None


def literal(argument: ast.expr) -> str:
    """The module a call imports; of f"..backends.{name}" or f".{name}" the package, "" where even that is computed."""
    match argument:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr([ast.Constant(str(text)), *_]):
            return text.rpartition(".")[0] or "." * (len(text) - len(text.lstrip(".")))
    return ""


def imports(path: Path, module: str, known: set[str]) -> Iterator[Import]:
    """The imports in a file, by statement or by a call of import_module or __import__."""

    def import_of(line: int, full: str, name: str | None, in_function: bool) -> Import:
        top, _, below = full.partition(".")
        if top != PACKAGE:
            return Import(line, top, name, False, in_function)
        if name is not None and (inner := f"{below}.{name}".lstrip(".")) in known:  # `from package import module`
            return Import(line, inner, None, True, in_function)
        return Import(line, below or ROOT, name, True, in_function)

    is_package = path.name == "__init__.py"
    for node, in_function in nodes(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names):
                yield from (import_of(node.lineno, alias.name, None, in_function) for alias in names)
            case ast.ImportFrom(source, names, level):
                full = absolute(module, is_package, level or 0, source or "")
                for alias in names:
                    yield import_of(node.lineno, full or "", alias.name, in_function)
            case ast.Call(ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"), [first, *_]):
                text = literal(first)
                level = len(text) - len(text.lstrip("."))
                full = absolute(module, is_package, level, text.lstrip("."))
                yield import_of(node.lineno, full or "", None, in_function)


def complaint(rule: Rule, it: Import) -> str | None:
    """What is wrong with one import, if anything."""
    if not it.target:
        if rule.computed:
            return None
        return "imports what cannot be read here: outside the package, or a name computed at run time"
    if it.ours:
        if it.name in rule.names:
            return None
        allowed = covered(it.target, rule.ours) and not covered(it.target, rule.but)
        return None if allowed else f"may not import {it.target}"
    if it.target in sys.stdlib_module_names:
        return None
    if not covered(it.target, rule.foreign):
        return f"may not import {it.target}"
    late = rule.lazy and it.target not in CORE and not it.in_function
    return f"imports {it.target} outside a function" if late else None


def import_violations(package: Path) -> list[str]:
    paths = modules(package)
    known = set(paths) | {area for area in RULES if "*" not in area} | PUBLIC | {EXTENSION}
    rules = {module: next(rule for row, rule in RULES.items() if covers(row, module)) for module in paths}
    return [
        f"{path.relative_to(package).as_posix()}:{it.line}: {module} {problem}"
        for module, path in paths.items()
        for it in imports(path, module, known)
        if (problem := complaint(rules[module], it))
    ]


def root_violations(package: Path) -> list[str]:
    """The package's __init__ holds public names only: a docstring, imports of them, and __all__ that lists them."""
    path = package / "__init__.py"
    listed: list[str] = []
    imported: list[str] = []
    violations = []
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        match node:
            case ast.Expr(ast.Constant(str())) | ast.ImportFrom(module="__future__"):
                pass
            case ast.ImportFrom(names=names):
                imported += [alias.asname or alias.name for alias in names]
            case ast.Assign([ast.Name("__all__")], ast.List(elements) | ast.Tuple(elements)):
                listed = [element.value for element in elements if isinstance(element, ast.Constant)]
            case ast.Assign([ast.Name("__version__")]):
                pass
            case _:
                violations.append(f"__init__.py:{node.lineno}: neither a docstring, a name taken in, nor __all__")
    private = [name for name in imported if name.startswith("_") or name == "*"]
    unlisted = sorted(set(imported) - set(listed) - set(private))
    violations += [f"__init__.py: {name} is not a public name" for name in private]
    return violations + [f"__init__.py: {name} is missing in __all__" for name in unlisted]


def length_violations(package: Path, longer: frozenset[str]) -> list[str]:
    files = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    too_long = {name for name in lines if lines[name] > MAX_LINES}
    violations = [f"{name}: {lines[name]} lines, more than {MAX_LINES}" for name in sorted(too_long - longer)]
    return violations + [f"{name}: need not be listed as longer" for name in sorted(longer - too_long)]


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of code behind the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def function_violations(package: Path) -> list[str]:
    """Functions that do not fit a screen, and public ones that do more than hand on what they were given."""
    violations = []
    for module, path in modules(package).items():
        for function in functions(path):
            public = module in PUBLIC and not function.name.startswith("_")
            most = MAX_PUBLIC_LINES if public else MAX_FUNCTION_LINES
            if body_lines(function) > most:
                violations.append(f"{module}.{function.name}: {body_lines(function)} lines, more than {most}")
    return violations


def ignore_index_violations(package: Path) -> list[str]:
    """Behind `inputs` a label is an index or one sentinel: nothing there takes an `ignore_index`."""
    return [
        f"{module}.{function.name} takes ignore_index"
        for module, path in modules(package).items()
        if covered(module, {"ops", "linear", "backends"})
        for function in functions(path)
        if "ignore_index" in {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    ]


def cycles(package: Path) -> list[str]:
    """Modules of the package that import one another in a circle; an import inside a function closes it as well."""
    paths = modules(package)
    known = set(paths) | {EXTENSION}
    edges = {
        module: {it.target for it in imports(path, module, known) if it.ours} & set(paths)
        for module, path in paths.items()
    }
    order = graphlib.TopologicalSorter({m: targets - {m, ROOT} for m, targets in edges.items() if m not in EDGES})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def name_violations(root: Path) -> list[str]:
    """A name that says nothing about what is inside, of a module or a folder of modules."""
    paths = [path.relative_to(root) for source in SOURCES for path in (root / source).rglob("*.py")]
    return [
        path.as_posix() for path in paths if SHAPELESS_NAMES & {part.strip("_") for part in path.with_suffix("").parts}
    ]


def report(violations: list[str]) -> None:
    assert not violations, "\n".join(["", *violations])


def test_imports_keep_to_the_table():
    report(import_violations(REPOSITORY / PACKAGE))


def test_package_root_holds_public_names_only():
    report(root_violations(REPOSITORY / PACKAGE))


def test_files_are_one_idea_long():
    report(length_violations(REPOSITORY / PACKAGE, LONGER_FILES))


def test_functions_fit_a_screen():
    report(function_violations(REPOSITORY / PACKAGE))


def test_no_circle():
    report(cycles(REPOSITORY / PACKAGE))


def test_only_inputs_know_ignore_index():
    report(ignore_index_violations(REPOSITORY / PACKAGE))
    sources = [*(REPOSITORY / "csrc").rglob("*.cpp"), *(REPOSITORY / "csrc").rglob("*.h")]
    assert not [path.name for path in sources if "ignore_index" in path.read_text(encoding="utf-8")]


def test_modules_have_telling_names():
    report(name_violations(REPOSITORY))


# The checks themselves, held against a small tree in which everything is as it should be, and then one thing is not.

GOOD_TREE = {
    "__init__.py": (
        '"""Doc."""\nfrom .loss import conspo_loss\nfrom .margin import CosineMargin\n'
        'from .conspo import ConSPOOutput\n__all__ = ["ConSPOOutput", "CosineMargin", "conspo_loss"]\n'
    ),
    "__main__.py": "from . import reference\nfrom .backends.eager import token\nfrom .gradcheck import command\n",
    "loss.py": "import torch\nfrom . import conspo\nfrom .inputs.tokens import tokens_of\n",
    "conspo.py": "from typing import NamedTuple\nfrom .metrics import means\nfrom .ops.token import token\n",
    "sources.py": "from .parallel import Parallel\nfrom .ops.token import token\n",
    "parallel.py": "from .values import number\n",
    "values.py": "from torch import Tensor\n",
    "margin.py": "import math\n",
    "metrics.py": "import torch\n",
    "objective.py": "from __future__ import annotations\nimport torch.nn.functional as F\n",
    "reference.py": "import math, torch\n",
    "gradcheck/__init__.py": "",
    "gradcheck/command.py": "from .. import ops, reference\nfrom ..backends.eager import forward\n",
    "inputs/__init__.py": "",
    "inputs/check.py": "from torch import Tensor\n",
    "inputs/tokens.py": "from . import check\nfrom ..ops.registration import op\n",
    "ops/__init__.py": "",
    "ops/registration.py": "import torch\n",
    "ops/token.py": (
        "import torch\nfrom .registration import op\n"
        "from ..backends.registry import backend_for\nfrom ..linear.modes import forward\n"
    ),
    "linear/__init__.py": "",
    "linear/modes.py": "import torch\nfrom ..backends.contract import Token\n",
    "backends/__init__.py": "",
    "backends/contract.py": "from ..values import Statistics\n",
    "backends/registry.py": "from .contract import Token\nimportlib.import_module(name, __package__)\n",
    "backends/triton/__init__.py": "",
    "backends/triton/rows.py": "import triton\n",
    "backends/triton/token.py": "import triton.language as tl\nfrom .rows import row\n",
    "backends/eager.py": "import torch\nfrom ..objective import q\n",
    "backends/native.py": "from .. import _C\nimport torch\n",
    "ops/ranks.py": "import torch.distributed as dist\n",
    "integrations/__init__.py": "",
    "integrations/trl.py": "from .. import conspo_loss\nimport torch\ndef trainer():\n    import trl\n    return trl\n",
}

PLANTED = {
    "objective knows a backend": ("objective.py", "from .backends.eager import token", "import backends.eager"),
    "reference knows ours": ("reference.py", "from .objective import q", "import objective"),
    "reference knows the package": ("reference.py", f"import {PACKAGE}", f"import {ROOT}"),
    "margin knows numpy": ("margin.py", "import numpy", "import numpy"),
    "check knows ops": ("inputs/check.py", "from ..ops import token", "import ops.token"),
    "metrics knows objective": ("metrics.py", f"from {PACKAGE}.objective import q", "import objective"),
    "values know ops": ("values.py", "from .ops import token", "import ops.token"),
    "backend knows an op": ("backends/triton/token.py", "from ...ops.token import token", "import ops.token"),
    "backend knows inputs": ("backends/eager.py", "from ..inputs import tokens", "import inputs.tokens"),
    "eager knows triton": ("backends/eager.py", "import triton", "import triton"),
    "eager knows another backend": ("backends/eager.py", "from .triton import token", "backends.triton.token"),
    "triton outside its backend": ("ops/token.py", "import triton", "import triton"),
    "op knows inputs": ("ops/token.py", "from ..inputs.tokens import tokens_of", "import inputs.tokens"),
    "op knows a backend": ("ops/token.py", "from ..backends.eager import token", "import backends.eager"),
    "op knows a public function": ("ops/token.py", "from ..loss import conspo_loss", "import loss"),
    "linear knows an op": ("linear/modes.py", "from ..ops.token import token", "import ops.token"),
    "inputs know the objective": ("inputs/tokens.py", "from ..objective import q", "import objective"),
    "source knows a backend": ("sources.py", "from .backends.eager import forward", "backends.eager"),
    "source knows inputs": ("sources.py", "from .inputs import check", "import inputs.check"),
    "computation knows inputs": ("conspo.py", "from .inputs import check", "import inputs.check"),
    "public function knows an op": ("loss.py", "from .ops.token import token", "import ops.token"),
    "source knows the objective": ("sources.py", "from .objective import q", "import objective"),
    "public function knows a backend": ("loss.py", "from .backends.eager import token", "backends.eager"),
    "public function knows the reference": ("loss.py", "from .reference import loss", "import reference"),
    "public function knows an integration": ("loss.py", "from .integrations import trl", "import integrations.trl"),
    "shared module knows linear": ("conspo.py", "from .linear import modes", "import linear.modes"),
    "inside a function": ("loss.py", "def f():\n    from .backends.eager import token", "import backends.eager"),
    "inside a method": ("loss.py", "class A:\n    def f(self):\n        import pandas", "import pandas"),
    "for a type checker": ("inputs/check.py", "if TYPE_CHECKING:\n    from ..ops import token", "import ops.token"),
    "caught": ("loss.py", "try:\n    import liger_kernel\nexcept ImportError:\n    pass", "import liger_kernel"),
    "by a call": ("loss.py", 'importlib.import_module(".backends.eager", __package__)', "import backends.eager"),
    "by a call, foreign": ("loss.py", '__import__("transformers.models")', "import transformers"),
    "by a call, composed": ("loss.py", 'import_module(f".backends.{op}_x", __package__)', "import backends"),
    "by a call, computed": ("ops/token.py", "import_module(name, __package__)", "run time"),
    "out of the package": ("loss.py", "from .. import benchmarks", "outside the package"),
    "extension by another": ("backends/eager.py", f"from .. import {EXTENSION}", f"import {EXTENSION}"),
    "optional in the core": ("inputs/check.py", "import tqdm", "import tqdm"),
    "integration knows inside": ("integrations/trl.py", "from ..ops import token", "import ops.token"),
    "integration at load time": ("integrations/trl.py", "import trl", "imports trl outside a function"),
    "root knows an op": ("__init__.py", "from .ops import token", "import ops.token"),
}


def plant(package: Path, name: str, text: str) -> None:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + text + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in GOOD_TREE.items():
        plant(tmp_path / PACKAGE, name, text)
    return tmp_path / PACKAGE


def test_good_tree_passes(tree):
    assert import_violations(tree) == []
    assert root_violations(tree) == []
    assert length_violations(tree, frozenset()) == []
    assert function_violations(tree) == []
    assert cycles(tree) == []
    assert name_violations(tree.parent) == []


@pytest.mark.parametrize(("name", "text", "message"), PLANTED.values(), ids=PLANTED.keys())
def test_planted_import_is_found(tree, name, text, message):
    plant(tree, name, text)
    (violation,) = import_violations(tree)
    assert violation.startswith(f"{name}:")
    assert message in violation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def conspo_loss(): ...", "neither"),
        ("from .loss import _private", "not a public name"),
        ("from .loss import *", "not a public name"),
        ("from .loss import conspo_scores", "missing in __all__"),
    ],
)
def test_root_that_holds_more_is_found(tree, text, message):
    plant(tree, "__init__.py", text)
    (violation,) = root_violations(tree)
    assert message in violation


def test_long_file_is_found_unless_listed(tree):
    plant(tree, "ops/token.py", "x = 0\n" * MAX_LINES)
    assert "more than 350" in length_violations(tree, frozenset())[0]
    assert length_violations(tree, frozenset({"ops/token.py"})) == []
    assert length_violations(tree, frozenset({"ops/token.py", "loss.py"})) == ["loss.py: need not be listed as longer"]


@pytest.mark.parametrize("name", ["utils.py", "ops/_utils.py", "backends/helpers/rows.py"])
def test_shapeless_name_is_found(tree, name):
    plant(tree, name, "")
    assert name_violations(tree.parent) == [f"{PACKAGE}/{name}"]


def test_long_function_is_found(tree):
    plant(tree, "ops/token.py", 'def f():\n    """Doc."""\n' + "    x = 0\n" * MAX_FUNCTION_LINES)
    assert function_violations(tree) == []
    plant(tree, "loss.py", "def conspo_loss():\n" + "    x = 0\n" * (MAX_PUBLIC_LINES + 1))
    plant(tree, "ops/token.py", "    x = 0")
    assert function_violations(tree) == [
        "loss.conspo_loss: 16 lines, more than 15",
        "ops.token.f: 62 lines, more than 60",
    ]


@pytest.mark.parametrize("text", ["from . import tokens", "def f():\n    from . import tokens"])
def test_circle_is_found(tree, text):
    plant(tree, "inputs/check.py", text)
    assert "inputs.check" in cycles(tree)[0]


def test_ignore_index_is_found(tree):
    plant(tree, "ops/token.py", "def token(labels, *, ignore_index): ...")
    assert ignore_index_violations(tree) == ["ops.token.token takes ignore_index"]

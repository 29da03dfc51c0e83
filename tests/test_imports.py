"""The packages form an order: each imports only what stands above it. And what must start fast does not load torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge.cli.__main__ import COMMANDS

ORDER = [
    *("errors", "files", "config", "distributed", "log", "layers", "data", "features", "models", "methods", "training"),
    *("decode", "eval", "suite", "ranking", "bench", "export", "report", "demo", "cli"),
]
ROOT = Path(__file__).parents[1] / "specforge"


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Every import of `source`, at any depth, as (line, dotted name below specforge); `module` resolves relative ones."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.removeprefix("specforge.")) for name in names if name.startswith("specforge."))


def violations(source: str, module: str) -> list[str]:
    """The imports of `module` that point down the order, or to a package that has no place in it."""
    own = place(module.split(".")[1]) if "." in module else -1
    return [f"{module}:{line} imports {name}" for line, name in imports(source, module) if place(name.split(".")[0]) > own]


def place(package: str) -> int:
    if package in ("__main__", "__version__"):  # `python -m specforge` is the command line; the version is a constant
        return len(ORDER) if package == "__main__" else -1
    return ORDER.index(package) if package in ORDER else len(ORDER)


def test_packages_import_only_what_stands_above_them() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        package = module.removesuffix(".__init__")
        found += violations(path.read_text(), package if package == "specforge" else module)
    assert found == []


def test_every_package_has_a_place() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")} - {"__init__", "__main__"} <= set(ORDER)


@pytest.mark.parametrize(
    "source",
    [
        "import specforge.eval",
        "from specforge.eval import Evaluator",
        "from specforge import eval",
        "from ..eval.evaluator import Evaluator",
        "def fit():\n    from specforge.eval import Evaluator",
        "if TYPE_CHECKING:\n    import specforge.eval.evaluator",
        "from specforge.utils import helper",
    ],
)
def test_an_import_down_the_order_is_found_in_every_form(source: str) -> None:
    assert len(violations(source, "specforge.training.controller")) == 1


@pytest.mark.parametrize(
    "source", ["import torch", "from specforge.methods import base", "from . import state", "from specforge import __version__"]
)
def test_an_import_up_the_order_is_allowed(source: str) -> None:
    assert violations(source, "specforge.training.controller") == []


def modules_loaded_by(statements: str) -> set[str]:
    program = f"import sys\n{statements}\nprint('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines()[-1].split())


def test_configuration_does_not_load_torch() -> None:
    loaded = modules_loaded_by("import specforge.config")
    assert "specforge.config.schema" in loaded
    assert "torch" not in loaded


def test_help_does_not_load_torch() -> None:
    """Of the program and of every command, and what is left of one that is refused by its words."""
    asked = [["--help"], *([name, "--help"] for name in COMMANDS), ["train", "none.yaml"], ["export", "--to", "hf"]]
    loaded = modules_loaded_by(f"""
import specforge.cli.__main__ as cli
for words in {asked}:
    try:
        cli.main(words)
    except SystemExit:
        pass
""")
    assert {f"specforge.cli.{name}" for name in COMMANDS} <= loaded
    assert not {"torch", "transformers"} & loaded

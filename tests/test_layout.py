"""The rules of the house: what may import what, and that importing is free of side effects."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saccade
import saccade_demo
from saccade.operator import declaration

ROOT = Path(__file__).parents[1]
PACKAGE = Path(saccade.__file__).parent
DEMO = Path(saccade_demo.__file__).parent
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("api.py"))
OPERATORS = {".".join(folder.relative_to(PACKAGE).parts): folder for folder in FOLDERS}
MODULES = sorted(PACKAGE.rglob("*.py"))
DEMO_MODULES = sorted(DEMO.rglob("*.py"))
KERNELS = [path for path in MODULES if path.stem == "kernels" or path.stem.endswith("_kernels")]
LAUNCHES = [path for path in MODULES if path.stem == "launch" or path.stem.endswith("_launch")]
SHARED = (PACKAGE, PACKAGE / "losses", PACKAGE / "operator")  # by several operators


def imports(path: Path) -> set[str]:
    """Dotted names of all that a module imports, functions and modules alike."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def depends_on(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def test_every_operator_is_known():
    assert {*OPERATORS} == {"deformable_aggregation", "gaussian_heatmap", "losses.focal", "losses.gaussian", "ragged"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_one_folder_with_the_same_files(operator):
    names = {path.name for path in OPERATORS[operator].glob("*.py")}
    assert names >= {"__init__.py", "api.py", "reference.py"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_never_import_operators(operator):
    others = [*(name for name in OPERATORS if name != operator), "nn", "compat", "cli", "doctor"]
    for path in OPERATORS[operator].glob("*.py"):
        for other in others:
            assert not depends_on(path, f"saccade.{other}"), f"{path.name} of {operator} imports {other}"


def module_of(path: Path) -> str:
    return ".".join(["saccade", *path.relative_to(PACKAGE).with_suffix("").parts])


def test_reference_and_kernels_never_import_each_other():
    for kernels in KERNELS:
        reference = kernels.parent / "reference.py"
        assert not depends_on(kernels, module_of(reference)), kernels
        assert not reference.exists() or not depends_on(reference, module_of(kernels)), kernels


def test_kernels_are_used_by_their_own_operator_alone():
    for path in MODULES:
        for used in (path for path in [*KERNELS, *LAUNCHES] if path.parent not in SHARED):
            assert path.parent == used.parent or not depends_on(path, module_of(used)), f"{path} uses {used}"


def test_kernels_are_launched_by_their_launch_alone():
    """Which the operator's declaration names; nothing else imports either, or Triton."""
    assert KERNELS
    assert LAUNCHES
    for path in MODULES:
        if path not in [*KERNELS, *LAUNCHES]:
            for used in ("triton", *map(module_of, [*KERNELS, *LAUNCHES])):
                assert not depends_on(path, used), f"{path} imports {used}"


def test_every_launch_that_a_declaration_names_is_there():
    """They are named by text, so that importing the library does not import Triton."""
    pytest.importorskip("triton")
    for operator in declaration.OPERATORS.values():
        gradient = operator._differentiation and operator._differentiation.gradient
        for name in (operator._kernels, getattr(gradient, "with_result", None)):
            assert name is None or callable(pkgutil.resolve_name(name)), f"{operator.name}: {name}"


def private_names(path: Path) -> set[str]:
    """Names of PyTorch and Triton with an underscore in front, of modules of Triton's own, or not documented."""
    found = {name for name in imports(path) if name.split(".")[0] in ("torch", "triton")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            found.add(ast.unparse(node))
    of_triton = ("triton.runtime", "triton.compiler", "triton.backends", "triton.knobs")
    return {
        name
        for name in found
        if re.match(r"(torch|triton|forward_ad|profiler)\..*\b_[a-z]", name, re.IGNORECASE)
        or name.rpartition(".")[2] in ("_version", "redispatch", "has_torch_function_unary", "WeakTensorKeyDictionary")
        or name.startswith(of_triton)
    }


def test_private_names_of_torch_and_triton_stand_in_one_file():
    """Which says what happens without each, and `tests/test_torch_internals.py` deletes them one by one."""
    one_file = PACKAGE / "operator" / "torch_internals.py"
    assert private_names(one_file)
    for path in [*MODULES, *DEMO_MODULES, *(ROOT / "benchmarks").glob("*.py")]:
        assert path == one_file or not private_names(path), f"{path}: {private_names(path)}"


def test_the_library_proper_needs_torch_alone():
    extras = {"rich", "typer", "matplotlib", "PIL", "scipy", "numpy"}
    for path in MODULES:
        if path != PACKAGE / "cli.py":
            assert not {name.split(".")[0] for name in imports(path)} & extras, path


def test_the_library_knows_neither_demo_nor_benchmarks():
    """But for its command line, which starts both."""
    for path in MODULES:
        for package in ("saccade_demo", "benchmarks"):
            assert path == PACKAGE / "cli.py" or not depends_on(path, package), f"{path} imports {package}"


def test_the_demo_uses_public_names_alone():
    """As anybody's own project would; besides it tells which backend served an operator."""
    public = {"saccade", "saccade.doctor", "saccade.doctor.backend"}
    for module in (saccade, saccade.nn, saccade.ragged):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert DEMO_MODULES
    for path in DEMO_MODULES:
        assert {name for name in imports(path) if name.split(".")[0] == "saccade"} <= public, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in (
                "saccade",
                "saccade.nn",
                "saccade.ragged",
            ):
                assert ast.unparse(node) in public, f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("folder", "never"),
    [
        ("rendering", ("data", "training", "pictures", "model", "run")),
        ("data", ("training", "pictures", "model", "run")),
        ("training", ("pictures", "run")),
        ("pictures", ("training", "run")),
    ],
)
def test_the_folders_of_the_demo_depend_on_each_other_in_one_direction(folder, never):
    assert (DEMO / folder / "__init__.py").is_file()
    for path in (DEMO / folder).rglob("*.py"):
        for other in never:
            assert not depends_on(path, f"saccade_demo.{other}"), f"{path} imports {other}"


def test_no_drawer_of_odds_and_ends():
    modules = [*MODULES, *DEMO_MODULES]
    assert not [path for path in modules if path.stem in ("utils", "common", "misc", "helpers")]


def test_importing_compiles_nothing_and_touches_no_gpu():
    script = """
import sys, torch
import saccade
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules, "triton was imported"
assert "torch._inductor" not in sys.modules, "the compiler was imported"
assert not {"rich", "typer", "matplotlib", "scipy", "saccade_demo", "benchmarks"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_has_a_docstring_and_exists():
    for name in saccade.__all__:
        value = getattr(saccade, name)
        assert name == "__version__" or value.__doc__, name


def test_nothing_advises_to_install_the_other_project_of_this_name():
    """On PyPI, `saccade` is another project; this one is `saccade-ops` there."""
    advice = re.compile(r"saccade\[|pip install ([^`\n]* )?['\"]?saccade(?!-ops)")
    assert advice.search("pip install 'saccade[demo]'")
    assert advice.search("pip install --upgrade saccade")
    assert not advice.search("`pip install '.[demo]'` and `saccade demo`")
    folders = [path for name in ("src", "docs", "benchmarks") for path in (ROOT / name).rglob("*")]
    texts = [path for path in (*folders, *ROOT.glob("*")) if path.suffix in (".py", ".md", ".toml", ".txt")]
    assert {ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "docs" / "demo.md", PACKAGE / "__main__.py"} <= {*texts}
    for path in [*texts, ROOT / "Makefile"]:
        assert not advice.search(path.read_text(encoding="utf-8")), path

"""The house's order: nothing in the package imports what comes after it, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lcm_distill"
COMMANDS = ("pack_shards", "encode_shards", "sample", "evaluate", "bench_inference", "export_model", "report")

# Lowest first; what stands on one line may import each other's line only downwards too (its own folder aside).
ORDER = (
    ("redaction", "launcher", "machine"),
    ("errors",),
    ("flags", "locks", "bars"),
    ("environment",),
    ("objective", "distributed", "data"),
    ("models",),
    ("sampling",),
    ("export",),
    ("run",),
    COMMANDS,
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too: "lcm_distill.data.tar", "toy.score", …"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str | None:
    """The folder or top-level module of the package that `module` is in; None outside, or for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "lcm_distill" and len(parts) > 1 and parts[1] in LEVEL else None


def climbing(path: Path, own: str) -> list[str]:
    """The imports of a module of the part `own` that are of a part on the same level or above it."""
    parts = {part for part in map(part_of, imported_modules(path)) if part}
    return sorted(part for part in parts - {own} if LEVEL[part] >= LEVEL[own])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_climbs(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not {part_of(module) for module in imported_modules(path)} - {None}
        return
    assert own in LEVEL, f"{own} has no place in the order: add it to ORDER here and to lcm_distill/__init__.py"
    assert climbing(path, own) == []
    outside = {module.split(".")[0] for module in imported_modules(path)}
    assert not outside & {"toy", "benchmarks", "tests", *(p.stem for p in ROOT.glob("train_*.py"))}


def test_a_climbing_import_is_found(tmp_path):
    (tmp_path / "tar.py").write_text("def f():\n    from lcm_distill.models import sd\n    import lcm_distill.flags\n")
    assert climbing(tmp_path / "tar.py", "data") == ["models"] and climbing(tmp_path / "tar.py", "run") == []
    (tmp_path / "sd.py").write_text("from lcm_distill import run\n")
    assert climbing(tmp_path / "sd.py", "models") == ["run"]


def test_folders_are_in_the_order_of_the_package_s_docstring():
    """lcm_distill/__init__.py says the order in a sentence: it must name every part, in this order."""
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())) or ""
    sentence = text[text.index("lowest first") :]
    names = [name for names in ORDER[:-1] for name in names]
    places = [sentence.index(name) for name in names]
    assert places == sorted(places)


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh Python has imported after `code`, which may end in an exit."""
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stderr.split()}


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}
PROGRAMS = sorted(path.stem for path in ROOT.glob("train_lcm_distill_*_wds.py"))


@pytest.mark.parametrize(
    "module",
    [
        "flags",
        "errors",
        "redaction",
        "launcher",
        "machine",
        "locks",
        "report",
        "pack_shards",
        "run.report",
        "run.journal",
        "export.usage",
        "models.code",
        "data.packing",
        "data.shards",
    ],
)
def test_light_modules_import_neither_torch_nor_the_libraries_on_it(module):
    assert not modules_after(f"import lcm_distill.{module}") & HEAVY


@pytest.mark.parametrize("target", [*PROGRAMS, *(f"lcm_distill.{command}" for command in COMMANDS)])
def test_help_version_and_mistakes_are_answered_before_torch_is_imported(target):
    """It took 7 s of CPU before the answer came, 18 s on a busy machine."""
    start = f"""import runpy
    for flag in ("--help", "--version", "--no_such_flag"):
        sys.argv = ["x", flag]
        try:
            runpy.run_module({target!r}, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            assert stopped.code == (2 if flag == "--no_such_flag" else 0)
        else:
            raise AssertionError(flag)"""
    assert not modules_after(start) & HEAVY

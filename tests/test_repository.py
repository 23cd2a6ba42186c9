"""The rules of the house that a program can check: sizes, frozen names, what may not stand in a file.

Needs: nothing but the checkout. Run: pytest tests/test_repository.py
"""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "headway"
SOURCES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# path -> why one idea needs more than 600 lines. Nothing does so far.
LONG_FILES: dict[str, str] = {}

# "path:function" -> why it is one thought and not several.
LONG_FUNCTIONS: dict[str, str] = {}

RECIPE_KEYS = [
    "name", "seed", "workload", "model", "data", "train", "optimizer", "schedule", "eval", "log", "checkpoint",
    "memory", "parallel", "methods", "strict",
]  # fmt: skip


def relative(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so it is not known which files belong to it")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short():
    lengths = {relative(path): lines(path) for path in SOURCES if lines(path)}
    assert statistics.median(lengths.values()) < 200
    long = {path: n for path, n in lengths.items() if n > 600}
    assert long.keys() == LONG_FILES.keys(), "above 600 lines: split it, or argue for it in LONG_FILES"


def test_functions_fit_on_a_screen():
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and (node.end_lineno or 0) - body[0].lineno + 1 > 60:
                    long[f"{relative(path)}:{node.name}"] = (node.end_lineno or 0) - body[0].lineno + 1
    assert long.keys() == LONG_FUNCTIONS.keys(), (
        f"above 60 lines: {long}; split it, or give the reason in LONG_FUNCTIONS"
    )


def test_the_keys_of_a_recipe_are_frozen():
    from headway.core.recipe import Recipe

    assert list(Recipe.model_fields) == RECIPE_KEYS, (
        "methods add options under `methods`; a new top-level key needs an argument"
    )


def test_the_training_loop_is_short_and_shows_every_point_in_order():
    from headway.core.method import POINTS

    text = (SOURCE / "core" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    docstring = ast.get_docstring(ast.parse(text)) or ""
    column = " ".join(re.split(r"  +", line)[-1] for line in docstring.splitlines() if re.search(r"\S  +\S", line))
    in_order = dict.fromkeys(word for word in re.findall(r"[a-z_]+", column) if word in POINTS)
    assert list(in_order) == list(POINTS)
    loop = docstring[docstring.index("until the budget") :]
    assert {
        "stream",
        "loss",
        "forward_backward",
        "gradients",
        "schedule",
        "update",
        "optimizer",
        "weights",
        "checkpointer",
    } <= {word for word in re.findall(r"[a-z_]+", loop) if word in POINTS}


def test_the_assembly_wraps_every_point_once_in_the_order_of_the_card():
    """`core/build.py` calls `wrap(methods, POINT, ...)`; the docstring of the loop promises this order."""
    from headway.core.method import POINTS

    tree = ast.parse((SOURCE / "core" / "build.py").read_text(encoding="utf-8"))
    calls = [
        (node.lineno, node.args[1].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "wrap"
        and isinstance(node.args[1], ast.Constant)
    ]  # fmt: skip
    assert [point for _, point in sorted(calls)] == list(POINTS)


def test_every_test_file_says_what_it_needs_and_how_to_run_it():
    silent = []
    for path in TESTS:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name.startswith("test_") and not ("needs" in docstring.lower() and "pytest tests/" in docstring):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, "open each with a docstring: what it checks, `Needs: ...`, `Run: pytest ...`"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"\b(TODO|FIXME|XXX|HACK)\b", "a promise in the code: keep it or file an issue"),
        (r"raise NotImplementedError", "a stub"),
        (r"@pytest\.mark\.xfail|pytest\.xfail\(", "a parked failure"),
    ],
)
def test_nothing_is_left_open(pattern, why):
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*SOURCES, *TESTS]
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, why


def test_no_machine_is_named():
    """Paths and hosts of one machine; the licence and documents may name public pages."""
    banned = re.compile(
        r"(?<![\w./-])/(work|opt|home/\w+|root|mnt)/|\b(files\.pythonhosted|pypi)\.org\b|download\.pytorch\.org"
    )
    found = []
    for path in tracked_files():
        if path == Path(__file__) or path.suffix in (".png", ".bin", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if banned.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_only_fallback_warns():
    """A warning that is not recorded with the run and that `strict: true` does not stop is a silent fallback."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn", "logging.warning"):
                found.append(f"{relative(path)}:{node.lineno}")
    assert not found, "use headway.core.fallback.fallback(what, why, cost)"


def test_only_the_command_line_prints_results():
    """Standard output is for the answer of a command; what takes long may say so on standard error."""
    found = []
    for path in SOURCES:
        if relative(path).split("/")[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "print"
                and (not any(keyword.arg == "file" for keyword in node.keywords))
            ):
                found.append(f"{relative(path)}:{node.lineno}")
    assert not found, "return it; commands print"


def test_tests_mirror_the_source():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in TESTS if path.parent != ROOT / "tests"}
    known = {path.parent.relative_to(SOURCE).parts[0] for path in SOURCES if path.parent != SOURCE}
    known.add("benchmarks")  # beside the package, not in it
    assert folders <= known, "a folder of tests without a folder of source"


def test_large_files_stay_out():
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files() if path.stat().st_size > 500_000
    }
    assert not large

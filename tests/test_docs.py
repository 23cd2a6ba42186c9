"""The documents say what the code does: pages made from it, commands, snippets, links. Needs torch.

Run: pytest tests/test_docs.py
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import headway
from headway.cli.main import app, main
from headway.core import registry
from headway.core.build import build_trainer
from headway.core.method import Method
from headway.core.recipe import Recipe
from tests.conftest import tiny_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_reference_pages_are_up_to_date():
    stale = [page.name for page, text in reference().pages().items() if page.read_text(encoding="utf-8") != text]
    assert not stale, "run `make docs`"


def test_the_documented_names_are_the_public_ones():
    titles = re.findall(r"^## headway\.(\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [title.replace("\\", "") for title in titles] == headway.__all__ == sorted(headway.__all__)


def shell_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        if page.name in ("cli.md", "api.md"):
            continue
        for line in page.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"(?:    |\$ )(headway|make) (.*?)(?:\s{2,}#.*| #.*)?$", line):
                found.append((match[1], match[2]))
    return found


@pytest.mark.parametrize("command", sorted({c for tool, c in shell_commands() if tool == "headway"}))
def test_commands_in_documents_exist(command, capsys):
    words = command.split()
    known = {info.name or info.callback.__name__: [] for info in app.registered_commands}
    known["recipe"] = ["check", "schema"]
    assert words[0] in known
    path = words[:2] if known[words[0]] else words[:1]
    assert main([*path, "--help"]) == 0
    text = capsys.readouterr().out
    for option in re.findall(r"(?<=\s)--[a-z-]+", command):
        assert re.search(rf"{option}\b", text), f"{option} is no option of headway {' '.join(path)}"
    for file in re.findall(r"\brecipes/\S+\.yaml", command):
        assert (ROOT / file).is_file()


def test_make_targets_in_documents_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {words.split()[0] for tool, words in shell_commands() if tool == "make"}
    assert {"train", "test"} <= named <= set(targets)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: str(p.relative_to(ROOT)))
def test_recipes_in_documents_are_right(page):
    import yaml

    for text in blocks(page, "yaml"):
        sections = yaml.safe_load(text)
        whole = sections if "model" in sections else {**tiny_recipe(), **sections}
        Recipe.load(whole)


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda p: p.name)
def test_python_in_documents_imports_what_exists(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headway"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "headway":
                assert node.attr in headway.__all__


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_the_method_in_contributing_works_from_outside(tmp_path, monkeypatch):
    """Fewer than forty lines of code, a file of its own, named in the recipe as `module:Class`."""
    source = next(text for text in blocks(ROOT / "CONTRIBUTING.md", "python") if "class GradientNoise" in text)
    code = [line for line in source.splitlines() if line.strip()]
    assert len(code) < 40
    (tmp_path / "gradient_noise.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)

    def losses(methods) -> list[float]:
        trainer = build_trainer(Recipe.load(tiny_recipe(methods=methods)))
        return [trainer.train_step()["loss"] for _ in range(4)]

    plain, noisy = losses({}), losses({"gradient_noise:GradientNoise": {"eta": 0.5}})
    assert plain[0] == noisy[0] and plain[2:] != noisy[2:]
    trainer = build_trainer(Recipe.load(tiny_recipe(methods={"gradient_noise:GradientNoise": {}})))
    assert issubclass(type(trainer.methods[0]), Method) and trainer.changes["gradient-noise"]


def test_an_installed_package_adds_its_methods_by_entry_point(tmp_path, monkeypatch, capsys):
    source = next(text for text in blocks(ROOT / "CONTRIBUTING.md", "python") if "class GradientNoise" in text)
    entry = next(text for text in blocks(ROOT / "CONTRIBUTING.md", "toml"))
    (tmp_path / "gradient_noise.py").write_text(source)
    installed = tmp_path / "noise-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: noise\nVersion: 1.0\n")
    group, line = re.search(r'entry-points\."(.*)"\]\n(.*)', entry).groups()
    (installed / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry._installed.cache_clear()
    try:
        assert "gradient-noise" in registry.names("methods")
        assert Recipe.load(tiny_recipe(methods={"gradient-noise": {"eta": 0.2}})).methods["gradient-noise"].eta == 0.2
        assert main(["methods", "gradient-noise"]) == 0
        assert "arXiv 1511.06807" in capsys.readouterr().out
    finally:
        registry._installed.cache_clear()

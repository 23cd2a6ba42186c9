"""A recipe file that trains in a second, and one finished run of it."""

from pathlib import Path

import pytest
import yaml

from headway.cli.main import main
from tests.conftest import generated_text, tiny_recipe


def write_recipe(folder: Path) -> Path:
    text = folder / "text"
    text.mkdir()
    for number, document in enumerate(generated_text()):
        (text / f"{number}.txt").write_text(document)
    data = {"source": "text", "path": str(text), "documents": None, "validation_fraction": 0.2}
    recipe = tiny_recipe(data=data, train={"steps": 6}, log={"every": 2, "tensorboard": True})
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe file; the working folder is its own."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run directory, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", str(write_recipe(folder)), "--run", str(folder / "run")]) == 0
    return folder / "run"

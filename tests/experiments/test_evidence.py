"""Evidence files: written and read back, damaged ones refused, quick runs kept from replacing full ones.

Needs git for the commit. Run: pytest tests/experiments/test_evidence.py
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest

import headway
from headway.core.errors import HeadwayError
from headway.experiments.evidence import (
    Figure,
    Outcome,
    Row,
    Series,
    Value,
    evidence_folder,
    load_evidence,
    provenance,
    save_evidence,
)


def outcome(**changes) -> Outcome:
    row = Row(
        measure="ratio",
        title="time, with / without",
        claimed="1.9x to 3.3x",
        measured=2.4,
        interval=(2.1, 2.8),
        unit="x",
        expected="at least 1.5",
        bound={"op": "at_least", "bound": [1.5]},
        held=True,
    )
    facts = {
        "name": "toy",
        "title": "Toy",
        "paper": "Nobody, arXiv 0000.00000",
        "claim": "It helps.",
        "held": True,
        "quick": False,
        "rows": [row],
        "measurements": {"ratio": Value(value=2.4), "never": Value(value=math.inf)},
        "arms": {"plain": [], "with": ["methods.toy={}"]},
        "recipe": {"train": {"steps": 5}},
        "seeds": [0],
        "figures": [Figure(title="F", x="steps", y="loss", series=[Series(name="a", x=[1, 2], y=[3, math.inf])])],
        "minutes": 1.5,
        **provenance(),
    }
    return Outcome(**{**facts, **changes})


def test_written_and_read_back(tmp_path):
    made = outcome()
    path = save_evidence(made, tmp_path / "toy.json")
    assert load_evidence(path) == made
    text = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {"name", "held", "rows", "hardware", "commit", "versions", "date", "minutes"} <= text.keys()
    assert {"measure", "claimed", "measured", "expected", "held"} <= text["rows"][0].keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no evidence file"),
        (lambda text: "", "is no evidence file"),
        (lambda text: "[]", "is no evidence file"),
        (lambda text: text.replace('"held"', '"hold"', 1), "held"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema_version"),
        (lambda text: text.replace('"minutes": 1.5', '"minutes": "soon"'), "minutes"),
    ],
)
def test_damaged_files_are_refused_by_field(tmp_path, damage, message):
    path = tmp_path / "toy.json"
    path.write_text(damage(outcome().to_json()))
    with pytest.raises(HeadwayError, match=message):
        load_evidence(path)


def test_binary_and_missing_files(tmp_path):
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name, message in (("b.json", "not text"), ("none.json", "cannot be read")):
        with pytest.raises(HeadwayError, match=message):
            load_evidence(tmp_path / name)


def test_a_quick_run_never_replaces_full_evidence(tmp_path):
    path = save_evidence(outcome(), tmp_path / "toy.json")
    before = path.read_bytes()
    with pytest.raises(HeadwayError, match="full run"):
        save_evidence(outcome(quick=True), path)
    assert path.read_bytes() == before
    quick = save_evidence(outcome(quick=True), tmp_path / "quick.json")
    save_evidence(outcome(quick=True, held=False), quick)
    save_evidence(outcome(), quick)  # the other way round is welcome
    assert not load_evidence(quick).quick


def test_folder_is_that_of_the_checkout_around(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "headway"\n')
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/pyproject.toml").write_text('[project]\nname = "other"\n')
    assert evidence_folder(tmp_path / "a/b") == tmp_path / "evidence"
    (tmp_path / "pyproject.toml").write_text("not toml [")
    assert evidence_folder(tmp_path / "a/b") == tmp_path / "a/b/evidence"


def test_commit_is_that_of_the_source():
    package = Path(headway.__file__).parent
    git = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("the source is not in a git checkout")
    assert provenance()["commit"].split("+")[0] == git.stdout.strip()


def test_exit_status_is_the_verdict():
    assert outcome().exit_status == 0
    assert outcome(held=False).exit_status == 1

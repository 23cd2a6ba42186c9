"""`headway generate`, `export` and `import` on a trained run. Needs torch. Run: pytest tests/cli/test_generate.py"""

import json

import pytest

from headway.cli.main import main


def generated(capsys, *arguments) -> str:
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_prompt_and_its_continuation_are_printed(trained, capsys):
    out = generated(capsys, trained, "--prompt", "the ", "--tokens", 20, "--seed", 1)
    assert out.startswith("the ") and out.endswith("\n") and len(out) > 10
    assert out == generated(capsys, trained, "--prompt", "the ", "--tokens", 20, "--seed", 1)
    assert out != generated(capsys, trained, "--prompt", "the ", "--tokens", 20, "--seed", 2)


def test_the_cache_changes_nothing(trained, capsys):
    greedy = ["--prompt", "the ", "--tokens", 24, "--temperature", 0]
    assert generated(capsys, trained, *greedy) == generated(capsys, trained, *greedy, "--no-cache")


def test_stop_and_narrow_draws(trained, capsys):
    greedy = generated(capsys, trained, "--prompt", "the ", "--tokens", 12, "--temperature", 0)
    assert generated(capsys, trained, "--prompt", "the ", "--tokens", 12, "--top-k", 1) == greedy
    letter = greedy[len("the ") :][3]
    stopped = generated(capsys, trained, "--prompt", "the ", "--tokens", 12, "--temperature", 0, "--stop", letter)
    assert stopped.rstrip("\n") == "the " + greedy[len("the ") :].split(letter)[0]


def test_a_model_goes_to_hugging_face_and_back(trained, tmp_path, capsys):
    folder, back = tmp_path / "hf", tmp_path / "back"
    assert main(["export", str(trained), "--to", "hf", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(folder), "format": "hf"}
    assert main(["import", str(folder), "--run", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(back)}
    prompt = ["--prompt", "the cat", "--tokens", 16, "--seed", 3]
    texts = {generated(capsys, place, *prompt) for place in (trained, folder, back)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere: there is no such folder"),
        (["generate", ".", "--prompt", "x"], "holds neither recipe.yaml nor config.json"),
        (["generate", "{run}", "--prompt", ""], None),
        (["generate", "{run}", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "{run}", "--prompt", "x", "--top-p", "0"], "top_p"),
        (["generate", "{run}", "--prompt", "x" * 500], "leaves no room"),
        (["export", "{run}", "--to", "gguf", "out"], "--to: got 'gguf', expected hf"),
        (["export", "{run}", "--to", "hf", "{run}"], "holds something that is no model"),
        (["export", "nowhere", "--to", "hf", "out"], "nowhere: there is no such folder"),
        (["import", "nowhere", "--run", "out"], "nowhere: there is no such folder"),
        (["import", "{run}", "--run", "out"], "is a run directory already"),
        (["report", "nowhere"], "there is no such run directory"),
    ],
)
def test_mistakes_are_told(arguments, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(trained.rglob("*"))
    status = main([argument.format(run=trained) for argument in arguments])
    err = capsys.readouterr().err
    assert status == (2 if message else 0)
    assert (message or "") in err and "Traceback" not in err
    assert sorted(trained.rglob("*")) == before
    assert not (tmp_path / "out").exists()

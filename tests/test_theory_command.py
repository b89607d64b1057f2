"""`postbc theory`, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from postbc.cli import main
from postbc.theory import STATEMENTS
from postbc.theory.command import Theory


def test_one_statement_prints_its_table_and_keeps_picture_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["theory", "bc-fails-to-cover", "--output", str(tmp_path / "new" / "folder"), "--repetitions", "500"]) == 0
    out = capsys.readouterr().out
    assert "bc-fails-to-cover" in out
    assert "Claims" in out
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["bc-fails-to-cover.json", "bc-fails-to-cover.png"]
    assert (folder / "bc-fails-to-cover.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "bc-fails-to-cover.json").read_text(encoding="utf-8"))
    assert content["statement"] == "bc-fails-to-cover"
    assert content["repetitions"] == 500
    assert all(check["holds"] for check in content["checks"])
    assert content["rows"][-1]["rollouts N"] == 1000


@pytest.mark.parametrize("name", [n for n in STATEMENTS if n not in ("main-theorem-return", "rl-finetuning")])
def test_every_statement_survives_a_handful_of_datasets(name: str, tmp_path: Path) -> None:
    """With two datasets claims may fail, numbers may be missing; the files are written and valid all the same."""
    assert main(["theory", name, "--output", str(tmp_path), "--repetitions", "2", "--seed", "3"]) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["seed"] == 3
    assert {tuple(row) for row in content["rows"]} == {tuple(content["rows"][0])}
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_seed_decides_the_numbers(tmp_path: Path) -> None:
    def numbers(seed: int) -> str:
        main(["theory", "return-lemma", "--output", str(tmp_path), "--repetitions", "5", "--seed", str(seed)])
        return (tmp_path / "return-lemma.json").read_text(encoding="utf-8")

    assert numbers(1) == numbers(1)
    assert json.loads(numbers(1))["rows"] != json.loads(numbers(2))["rows"]


def test_an_unknown_statement_is_refused_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory", "bc-covers-everything", "--output", str(tmp_path / "never")]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in STATEMENTS)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(("option", "value"), [("--repetitions", "1"), ("--seed", "-1")])
def test_options_that_cannot_work_are_refused(option: str, value: str, tmp_path: Path) -> None:
    assert main(["theory", "bc-fails-to-cover", "--output", str(tmp_path), option, value]) == 2


def test_output_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert main(["theory", "bc-fails-to-cover", "--output", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert "output directory" in capsys.readouterr().err


def test_without_a_statement_all_are_listed_and_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(STATEMENTS)[2:]:
        monkeypatch.delitem(STATEMENTS, name)  # two are enough to see the loop and the summary
    assert main(["theory", "--output", str(tmp_path), "--repetitions", "50"]) == 0
    out = capsys.readouterr().out
    assert "Summary" in out
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_help_names_every_statement(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(name in (Theory.__doc__ or "") for name in STATEMENTS)
    with pytest.raises(SystemExit) as exit_status:
        main(["theory", "--help"])
    assert exit_status.value.code == 0
    assert "--repetitions" in capsys.readouterr().out

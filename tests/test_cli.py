"""The command line: overview, help of every command, exit statuses."""

import errno
import subprocess
import sys
from dataclasses import dataclass

import pytest

import postbc
from postbc import cli


def test_every_command_has_complete_help(capsys):
    for words in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([*words.split(), "--help"])
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert f"postbc {words}" in out
        assert len(out.splitlines()) > 5, words


def test_overview_groups_and_unknown_commands(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(words in out for words in cli.COMMANDS)
    assert cli.main(["finetune"]) == 0
    out = capsys.readouterr().out
    assert "finetune dsrl" in out
    assert "theory" not in out
    assert cli.main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys; from postbc.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names_exist_and_others_do_not():
    assert len(postbc.__all__) <= 21
    for name in postbc.__all__:
        assert getattr(postbc, name) is not None
    assert set(postbc.__all__) == set(postbc._WHERE)
    with pytest.raises(AttributeError, match="nothing"):
        postbc.nothing  # noqa: B018


@dataclass(frozen=True)
class Failing:
    """Fails as the operating system would."""

    error: int = errno.ENOSPC

    def run(self):
        raise OSError(self.error, "from below")


def test_a_full_disk_anywhere_is_the_users_to_mend(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "doctor", (f"{__name__}:Failing", ""))
    assert cli.main(["doctor"]) == 2
    assert "disk is full" in capsys.readouterr().err
    with pytest.raises(OSError, match="from below"):
        cli.main(["doctor", "--error", str(errno.EIO)])

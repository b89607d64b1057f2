"""The command line: overview, help of every command, exit statuses."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import postbc
from made import save_policy
from postbc import cli
from postbc.jobs import Interrupted


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
    assert len(postbc.__all__) <= 30
    for name in postbc.__all__:
        assert getattr(postbc, name) is not None
    assert set(postbc.__all__) == set(postbc._WHERE)
    with pytest.raises(AttributeError, match="nothing"):
        postbc.nothing  # noqa: B018


class Failing:
    """A command in which `error` happens."""

    def __init__(self, error):
        self.error = error

    def parse(self, args):
        return None

    def run(self, config):
        raise self.error


def outcome(monkeypatch, error):
    monkeypatch.setattr(cli, "command", lambda words: Failing(error))
    return cli.main(["doctor"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ENODEV])
def test_whatever_the_operating_system_refuses_is_one_clear_error(monkeypatch, capsys, number):
    assert outcome(monkeypatch, OSError(number, os.strerror(number), "some/file")) == 2
    said = capsys.readouterr().err
    assert os.strerror(number) in said
    assert "some/file" in said


def test_an_interruption_is_one_line(monkeypatch, capsys):
    assert outcome(monkeypatch, Interrupted(signal.SIGINT)) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("resumable", [True, False])
def test_only_what_can_be_resumed_says_so(monkeypatch, capsys, resumable):
    class Stage:
        if resumable:
            resume = False

    class Module:
        def parse(self, args):
            return Stage()

        def run(self, config):
            raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(cli, "command", lambda words: Module())
    assert cli.main(["doctor"]) == 130
    assert ("--resume" in capsys.readouterr().err) == resumable


def test_sigterm_is_an_interruption(tmp_path):
    code = (
        "import signal, os, sys, time; from postbc import cli\n"
        "class Slow:\n"
        "    def parse(self, args): return None\n"
        "    def run(self, config): os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)\n"
        "cli.command = lambda words: Slow()\n"
        "sys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 143
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_of_another_encoding_shows_substitutes():
    for encoding in ("ascii", "cp1252", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-m", "postbc"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=60
        )
        assert done.returncode == 0
        assert b"Traceback" not in done.stderr


def test_the_library_does_not_import_the_command_line():
    root = Path(postbc.__file__).parent
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if inside.parts[0] != "cli" and inside.name != "__main__.py":
            assert "postbc.cli" not in path.read_text(encoding="utf-8"), inside


def test_modules_of_ones_own_are_imported_in_every_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from postbc.environments import ENVIRONMENTS\nfrom postbc.environments.registry import gymnasium_environment\n"
        "ENVIRONMENTS['my/Reach'] = lambda: gymnasium_environment('reach:Reach-v0')\n"
    )
    for seed in (0, 1):
        save_policy(tmp_path / f"policy/seed_{seed}", 4, 2, chunk=2, task="Reach-v0", seed=seed)
    options = [
        "evaluate",
        "--policy",
        "policy",
        "--environment",
        "my/Reach",
        "--episodes",
        "2",
        "--videos",
        "0",
        "--jobs",
        "2",
        "--output",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    for plugins, status in (("mine", 0), ("", 2), ("nobody", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "postbc", *options, f"out-{plugins}"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": path, "POSTBC_PLUGINS": plugins},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert ("POSTBC_PLUGINS" in done.stderr) == (plugins == "nobody")
        assert ("nobody: ModuleNotFoundError: " in done.stderr) == (plugins == "nobody")
    assert len(list(tmp_path.glob("out-mine/seed_*/evaluation.json"))) == 2


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_that_is_no_text_is_refused(capsys):
    assert cli.main(["evaluate", "--policy", "a", "--output", os.fsdecode(b"b\xff")]) == 2
    assert "no text" in capsys.readouterr().err

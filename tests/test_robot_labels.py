"""Labels against a simple model; torn lines, several writers at once, kills."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kills import in_a_process, kill_at_every_operation
from postbc.errors import InputError
from postbc.robot.labels import LABELS, Labels

PEOPLE = ["", "Ada", "Ben"]
decisions = st.tuples(st.integers(0, 3), st.sampled_from([*LABELS, None]))
undos = st.just("undo")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(PEOPLE), st.one_of(decisions, undos)), max_size=20))
def test_any_sequence_of_several_writers_is_a_list_of_decisions(tmp_path_factory, does):
    folder = tmp_path_factory.mktemp("session")
    writers = [Labels(folder) for _ in range(3)]
    model: list[tuple[int, str | None, str]] = []  # (episode, label, by)
    for writer, by, what in does:
        if what == "undo":
            # from the newest: the first decision that nothing said of its episode since, that is a label, and his own
            hidden, expected = set(), None
            for episode, label, who in reversed(model):
                if expected is None and episode not in hidden and label is not None and by in ("", who):
                    expected = episode
                hidden.add(episode)
            assert writers[writer].undo(by) == expected
            if expected is not None:
                model.append((expected, None, by))
        else:
            writers[writer].set(*what, by)
            model.append((*what, by))
        last = {episode: label for episode, label, _ in model}
        for reader in writers:
            assert reader.current() == {episode: label for episode, label in last.items() if label is not None}
    assert [(d.episode, d.label, d.by) for d in Labels(folder).history()] == model
    for episode in range(4):
        since = [m for m in model if m[0] == episode]
        nulls = [i for i, m in enumerate(since) if m[1] is None]
        standing = {by: label for _, label, by in since[nulls[-1] + 1 if nulls else 0 :]}
        assert Labels(folder).opinions().get(episode, {}) == standing


@settings(max_examples=60, deadline=None)
@given(st.lists(decisions, min_size=1, max_size=4), st.data())
def test_a_file_cut_anywhere_keeps_what_is_whole_and_can_be_written_on(tmp_path_factory, made, data):
    folder = tmp_path_factory.mktemp("session")
    labels = Labels(folder)
    for episode, label in made:
        labels.set(episode, label, "Ada", "ein Löffel lag im Weg")
    content = labels.file.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    labels.file.write_bytes(content[:cut])
    ends = [len(b"".join(content.splitlines(keepends=True)[: n + 1])) for n in range(len(made))]
    whole = sum(end - 1 <= cut for end in ends)  # a last line lacks nothing but its line feed
    torn = cut not in {0, *ends, *(end - 1 for end in ends)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [(d.episode, d.label) for d in Labels(folder).history()] == made[:whole]
    assert bool(said) == torn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Labels(folder).set(9, "discard")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [(d.episode, d.label) for d in labels.history()] == [*made[:whole], (9, "discard")]
    for line in labels.file.read_text().splitlines():
        json.loads(line)


def test_a_line_is_as_the_docs_say(tmp_path):
    Labels(tmp_path).set(12, "failure", "Ada", "slipped")
    line = json.loads((tmp_path / "labels.jsonl").read_text())
    assert line.pop("time").startswith("20")
    assert line == {"episode": 12, "label": "failure", "by": "Ada", "note": "slipped"}
    (tmp_path / "labels.jsonl").write_text(
        '{"episode": 3, "label": "success"}\n\n'
    )  # by hand: the rest is unknown, blank lines say nothing
    assert Labels(tmp_path).current() == {3: "success"}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("junk", "JSON"),
        ("[1]", ""),
        ('{"episode": -1, "label": "success"}', "episode"),
        ('{"episode": 1, "label": "sucess"}', "sucess"),
        ('{"episode": 1}', "label"),
        ('{"episode": 1, "label": null, "robot": 2}', "robot"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, line, named):
    good = '{"episode": 0, "label": "success"}\n'
    (tmp_path / "labels.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(InputError, match=r"labels\.jsonl, line 2") as error:
        Labels(tmp_path).current()
    assert named in str(error.value)


def test_what_cannot_be_said_is_refused_before_anything_is_written(tmp_path):
    for episode, label, by in [(-1, "success", ""), (0, "good", ""), (0, "success", "x" * 101), (0, "success", "\ud800")]:
        with pytest.raises(InputError):
            Labels(tmp_path).set(episode, label, by)
    assert Labels(tmp_path).undo() is None
    assert Labels(tmp_path).history() == []
    assert not (tmp_path / "labels.jsonl").exists()
    with pytest.raises(InputError, match="no such folder"):
        Labels(tmp_path / "nowhere")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    labels, write = Labels(tmp_path), os.write
    labels.set(0, "success")

    def half(handle, content):
        if len(content) > 40:
            return write(handle, content[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(InputError, match="disk is full"):
        labels.set(1, "failure")
    monkeypatch.undo()
    assert labels.current() == {0: "success"}
    assert labels.file.read_text().endswith("}\n")


def _append(folder: Path, by: str, start) -> None:
    start.wait()
    labels = Labels(folder)
    for episode in range(40):
        labels.set(episode, "success", by)


def test_two_processes_and_two_threads_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    processes = [context.Process(target=_append, args=(tmp_path, by, start)) for by in ("p", "q")]
    labels = Labels(tmp_path)  # one object in two threads, too

    def append(by: str) -> None:
        for episode in range(40):
            labels.set(episode, "failure", by)

    threads = [threading.Thread(target=append, args=(by,)) for by in ("t", "u")]
    for process in processes:
        process.start()
    start.set()
    for thread in threads:
        thread.start()
    for job in [*processes, *threads]:
        job.join(60)
    history = labels.history()
    assert len(history) == 160
    for by in ("p", "q", "t", "u"):
        assert [d.episode for d in history if d.by == by] == list(range(40))  # each in its order


def test_nobody_writes_or_reads_while_another_holds_the_lock(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    Labels(tmp_path).set(0, "success")
    done = []
    jobs = [
        threading.Thread(target=lambda: done.append(Labels(tmp_path).set(1, "failure"))),
        threading.Thread(target=lambda: done.append(Labels(tmp_path).undo())),
        threading.Thread(target=lambda: done.append(Labels(tmp_path).current())),
    ]
    with open(tmp_path / "labels.jsonl") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for job in jobs:
            job.start()
        time.sleep(0.2)
        assert not done
    for job in jobs:
        job.join(10)
    assert len(done) == 3


WRITER = """
import sys
from postbc.robot.labels import Labels
labels = Labels(sys.argv[1])
for episode in range(100000):
    labels.set(episode, "success", "killed")
    print(episode, flush=True)
"""


def test_what_set_returned_from_survives_a_kill(tmp_path):
    for round in range(3):
        folder = tmp_path / str(round)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
        assert writer.stdout is not None
        said = [writer.stdout.readline()]
        time.sleep(0.03 + 0.02 * round)
        writer.send_signal(signal.SIGKILL)
        said += writer.stdout.readlines()
        writer.wait(10)
        acknowledged = [int(line) for line in said if line.endswith("\n")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [d.episode for d in Labels(folder).history()]
        assert found[: len(acknowledged)] == acknowledged
        assert len(found) <= len(acknowledged) + 1


def label_all(directory: Path) -> None:
    """A stage that labels what has no label yet."""
    directory.mkdir(exist_ok=True)
    labels = Labels(directory)
    for episode in range(4):
        if episode not in labels.current():
            labels.set(episode, "failure", "stage")


def test_killed_before_any_file_operation_it_goes_on_to_the_same_labels(tmp_path):
    in_a_process(__file__, tmp_path)


if __name__ == "__main__":
    kill_at_every_operation(label_all, Path(sys.argv[1]), ignore=["labels.jsonl:time"])

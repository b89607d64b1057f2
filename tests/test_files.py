"""Trees as files with a checksum, atomic writes, small YAML: whatever is done to a file, it reads as it was or is refused."""

import errno
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postbc import disk
from postbc.errors import InputError
from postbc.files import (
    atomic_path,
    blame,
    check_fields,
    digest,
    first_not_finite,
    load_tree,
    read_yaml,
    remove_leftovers,
    save_tree,
    write_bytes,
    write_json,
    write_text,
)


def same(a, b):
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


leaves = (
    st.none() | st.booleans() | st.integers(-(2**130), 2**130) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from([torch.arange(6).view(2, 3), torch.zeros(0), torch.tensor(1.5), torch.ones(2, dtype=torch.bfloat16)])
    | st.sampled_from([np.arange(3, dtype=np.uint8), np.eye(2), np.array(True), np.arange(3, dtype=np.uint64)])
)  # fmt: skip
keys = st.text(max_size=5) | st.integers(0, 9)


@given(
    st.dictionaries(
        keys, st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3)), max_size=4
    )
)
@settings(max_examples=60, deadline=None)
def test_trees_come_back_as_they_were(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    save_tree(path, tree)
    assert same(load_tree(path), tree)


def test_keys_that_look_alike_are_apart(tmp_path):
    tree = {"a/b": torch.zeros(1), "a": {"b": torch.ones(2)}, "1": torch.full((1,), 3.0), 1: torch.full((1,), 4.0)}
    save_tree(tmp_path / "t", tree)
    assert same(load_tree(tmp_path / "t"), tree)


def test_any_reader_of_safetensors_opens_it(tmp_path):
    from safetensors.torch import load_file

    save_tree(
        tmp_path / "t", {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "flag": torch.tensor([True, False]), "n": 3}
    )
    loaded = load_file(str(tmp_path / "t"))
    assert torch.equal(loaded["/a"], torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    assert loaded["/flag"].tolist() == [True, False]


def test_optimiser_states_and_generator_states_survive(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    rng = np.random.default_rng(0)
    save_tree(tmp_path / "t", {"o": optimiser.state_dict(), "r": rng.bit_generator.state})
    loaded = load_tree(tmp_path / "t")
    other = torch.optim.Adam(model.parameters(), fused=True)
    other.load_state_dict(loaded["o"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])
    again = np.random.default_rng(1)
    again.bit_generator.state = loaded["r"]
    assert again.random() == rng.random()


def test_a_slice_is_saved_alone_and_a_loaded_tensor_is_its_own(tmp_path):
    save_tree(tmp_path / "t", {"a": torch.arange(10_000.0)[::1000], "b": torch.arange(6.0).view(2, 3).T})
    assert (tmp_path / "t").stat().st_size < 2000
    loaded = load_tree(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"")  # a mapped file would now be gone
    assert loaded["a"].tolist() == [1000.0 * i for i in range(10)]
    assert loaded["b"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize("thing", [object(), torch.zeros(2, dtype=torch.complex64), {(1, 2): 3}, {1.5: 2}])
def test_things_that_cannot_be_saved_are_named(tmp_path, thing):
    with pytest.raises(TypeError, match="/a/0"):
        save_tree(tmp_path / "t", {"a": [thing]})
    assert not list(tmp_path.iterdir())


# -- trust -------------------------------------------------------------------------------------------------------------------------
TREE = {
    "kind": "policy", "config": {"hidden": [16, 16], "rate": 0.5, "name": "é"}, "seed": 3, "flag": torch.tensor([True, False]),
    "weights": {"a": torch.linspace(-1, 1, 40).view(5, 8), "b": torch.zeros(3, dtype=torch.float64)}, "rows": np.arange(5),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "t.safetensors"
    save_tree(path, TREE)
    return path.read_bytes()


def read_or_refused(reader, path, content):
    """What the file says, or None if it was refused by an error that names it; anything else that is raised fails the test."""
    path.write_bytes(content)
    try:
        return reader(path)
    except InputError as error:
        refusal = str(error)
    assert str(path) in refusal
    return None


def refused_or_same(path, content):
    tree = read_or_refused(load_tree, path, content)
    assert tree is None or same(tree, TREE)


def test_every_flipped_bit_is_noticed(tmp_path, sound):
    path = tmp_path / "t.safetensors"
    data = 8 + int.from_bytes(sound[:8], "little")
    for at in range(len(sound)):
        content = bytearray(sound)
        content[at] ^= 1 << at % 8
        if at >= data:
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"(?s)checksum.*t\.safetensors"):
                load_tree(path)
        else:
            refused_or_same(path, content)


regions = st.tuples(st.integers(0, 10_000), st.integers(0, 200), st.binary(max_size=60))


@given(st.lists(regions, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_mutations_of_any_region_are_refused_or_harmless(tmp_path_factory, sound, changes):
    content = sound
    for at, length, new in changes:
        at %= len(content) + 1
        content = content[:at] + new + content[at + length :]
    refused_or_same(tmp_path_factory.getbasetemp() / "mutated.safetensors", content)


def signed(header, data=b""):
    """A file with a right checksum, whatever else is wrong."""
    metadata = header.setdefault("__metadata__", {"format": "2", "tree": "{}"})
    check = hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data)
    text = json.dumps({**header, "__metadata__": {**metadata, "sha256": check.hexdigest()}}).encode()
    return len(text).to_bytes(8, "little") + text + data


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "/a", "BOOL"]),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["@tensor", "@array", "@dict", "dtype", "x"]), x, max_size=2)
    ),
    max_leaves=8,
)
SOUND = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}


@given(
    st.fixed_dictionaries({}, optional={key: json_values for key in SOUND}),
    json_values,
    st.dictionaries(st.sampled_from(["/b", "/c"]), json_values, max_size=1),
)
@settings(max_examples=300, deadline=None)
def test_forged_headers_with_a_right_checksum_are_refused_or_read(tmp_path_factory, entry, tree, more):
    path = tmp_path_factory.getbasetemp() / "forged.safetensors"
    header = {"/a": {**SOUND, **entry}, **more, "__metadata__": {"format": "2", "tree": json.dumps(tree)}}
    read_or_refused(load_tree, path, signed(header, bytes(8)))


def deep(n):
    return "[" * n + "]" * n


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a checkpoint", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64, b"\0" * 100, (10**6).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + deep(100_000).encode(), (3).to_bytes(8, "little") + b"[1]",
        (5000).to_bytes(8, "little") + b"1" * 5000, (1).to_bytes(8, "little") + b"\xff",
        signed({"/a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        signed({"/a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}),
        signed({"/a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}, bytes(4)),
        signed({"/a": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x07"),
        signed({"/a": {**SOUND}, "/b": {**SOUND}}, bytes(8)),
        signed({"/a": {**SOUND}}, bytes(9)), signed({"/a": {**SOUND}}, bytes(7)),
        signed({"__metadata__": {"format": "2", "tree": deep(5000)}}),
        signed({"__metadata__": {"format": "2", "tree": "[" * 300 + "]" * 300}}),
        signed({"__metadata__": {"format": "2", "tree": '{"@tensor": "/missing"}'}}),
        signed({"__metadata__": {"format": "2", "tree": '{"@dict": [[[1], 2]]}'}}),
        signed({"__metadata__": {"format": "2", "tree": [1]}}), signed({"__metadata__": {"format": "2", "tree": "{"}}),
    ],
)  # fmt: skip
def test_broken_files_are_refused_at_once(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError, match=r"(?s)not a readable checkpoint.*x\.safetensors"):
        load_tree(path)
    assert time.monotonic() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB: nothing is allocated for a claim


def test_arrays_of_kinds_that_numpy_lacks_are_refused(tmp_path):
    header = {"/a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}
    header["__metadata__"] = {"format": "2", "tree": '{"@array": "/a"}'}
    (tmp_path / "x.safetensors").write_bytes(signed(header, bytes(2)))
    with pytest.raises(InputError, match="cannot be read"):
        load_tree(tmp_path / "x.safetensors")


def test_truncated_foreign_pickled_missing_and_no_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tree(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_tree(path)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, str(path))
    with pytest.raises(InputError, match="not written by postbc"):
        load_tree(path)
    for zipped in (True, False):
        torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="pickle"):
            load_tree(path)
    with pytest.raises(InputError, match="no such file"):
        load_tree(tmp_path / "none")
    with pytest.raises(InputError, match=r"(?s)not a file.*a directory"):
        load_tree(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        load_tree(tmp_path / "pipe")


def test_files_of_other_versions_and_kinds_say_so(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"/x": torch.ones(2)}, str(path), metadata={"tree": '{"@dict": [["x", {"@tensor": "/x"}]]}'})
    with pytest.raises(InputError, match=r"(?s)earlier postbc \(0\.1\).*use that version to read it, or run the stage again"):
        load_tree(path)
    path.write_bytes(signed({"__metadata__": {"format": "3", "tree": "1"}}))
    with pytest.raises(InputError, match=r"(?s)another version.*format 3"):
        load_tree(path)
    for tree in ({"kind": "agent"}, {}, [1], None, {"kind": ["policy"]}):
        save_tree(path, tree)
        with pytest.raises(InputError, match=r"(?s)something else.*'policy'"):
            load_tree(path, kind="policy")
    save_tree(path, TREE)
    assert same(load_tree(path, kind="policy"), TREE)


def test_fields_are_checked_by_type():
    tree = {"n": 3, "flag": True, "t": torch.ones(2), "none": None}
    check_fields(tree, {"n": int, "t": torch.Tensor, "flag": bool, "none": (dict, type(None)), "gone": (int, type(None))}, "f")
    for kinds in ({"flag": int}, {"n": str}, {"m": int}, {"t": dict}, {"none": int}):
        with pytest.raises(InputError, match=r"(?s)file: f.*key"):
            check_fields(tree, kinds, "f")
    with pytest.raises(InputError, match="list"):
        check_fields([], {}, "f")


def test_contents_that_do_not_fit_are_the_files_fault():
    model = torch.nn.Linear(2, 2)
    for state in ({}, {"weight": torch.ones(9), "bias": torch.ones(2)}, 3, {"weight": "x", "bias": 1}):
        with pytest.raises(InputError, match=r"(?s)file: f\.safetensors"), blame("f.safetensors"):
            model.load_state_dict(state)
    with pytest.raises(InputError, match="no 'a'"), blame("f"):
        _ = {}["a"]


def test_numbers_that_are_not_finite_are_found():
    assert first_not_finite({"a": [torch.ones(2), np.zeros(2)], "n": float("nan"), "i": torch.tensor([1])}) is None
    assert first_not_finite({"a": [torch.ones(2), np.array([1, np.nan])]}) == "/a/1"
    assert first_not_finite({"a": {"b": torch.tensor(-torch.inf)}}) == "/a/b"


# -- writing -----------------------------------------------------------------------------------------------------------------------
def test_a_failing_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_have_the_mode_of_any_new_file(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            save_tree(tmp_path / "t", {"a": torch.ones(1)})
            with atomic_path(tmp_path / "u") as temporary:  # a library that puts its own file there
                os.unlink(temporary)
                os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == stat.S_IMODE((tmp_path / "u").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EFBIG, "too large"), (errno.EROFS, "Read-only"),
        (errno.EACCES, "denied"), (errno.ENODEV, "No such device"), (errno.EIO, "error"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["open", "fsync", "replace"])
def test_the_disks_refusals_are_clear_and_leave_nothing(tmp_path, monkeypatch, number, text, where):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk.os, where, refuse)
    with pytest.raises(InputError, match=rf"(?s){text}.*what to do") as raised:
        write_text(tmp_path / "a.txt", "x")
    assert str(tmp_path / "a.txt") in str(raised.value)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_library_that_says_full_in_its_own_words(tmp_path):
    with pytest.raises(InputError, match="disk is full"), atomic_path(tmp_path / "a"):
        raise RuntimeError("HDF5: No space left on device")
    with pytest.raises(RuntimeError, match="other"), atomic_path(tmp_path / "a"):
        raise RuntimeError("other")


def test_a_file_size_limit_is_a_clear_error(tmp_path):
    code = (
        "import resource, sys, torch\nfrom postbc.files import save_tree\nfrom postbc.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: save_tree(sys.argv[1], {'a': torch.ones(1000)})\nexcept InputError as error: print(error)\n"
    )
    path = tmp_path / "t.safetensors"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr
    assert str(path) in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "a\ud800", "file/below", "directory", "fifo", "null", ""])
def test_names_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name if name != "null" else "/dev/null"
    with pytest.raises(InputError, match=r"(?s)cannot be written.*file"):
        write_bytes(path, b"x")
    for reader in (digest, read_yaml, load_tree):
        if name in ("directory", "") and reader is digest:
            continue
        with pytest.raises(InputError):
            reader(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "fifo", "file"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_long_name_that_fits_is_written(tmp_path):
    for name in ("n" * 255, "é" * 127, "\udcff"):
        write_bytes(tmp_path / name, b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for name in ("link", "dangling"):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "none").exists()


def test_text_is_utf8_whatever_is_in_it(tmp_path):
    write_text(tmp_path / "a", "α\udcff\n")
    assert (tmp_path / "a").read_bytes() == "α\\udcff\n".encode()
    write_json(tmp_path / "b", {"path": "\udcff"})
    assert json.loads((tmp_path / "b").read_bytes()) == {"path": "\udcff"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "c", float("nan"))
    assert not (tmp_path / "c").exists()


def test_leftovers_of_kills_go_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "other_run").mkdir()
    (tmp_path / "other_run/config.yaml").write_text("")
    kept = ["a.tmp", ".mine.tmp", ".a.0123456.tmp", ".x.01234567.tmpx", "other_run/.a.01234567.tmp"]
    gone = [".policy.safetensors.01234567.tmp", "sub/.a.deadbeef.tmp"]
    for name in kept + gone:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)


# -- reading -----------------------------------------------------------------------------------------------------------------------
def test_a_digest_is_of_the_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert digest(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/x").write_text("1")
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    (tmp_path / "two/sub/x").write_text("2")
    assert digest(tmp_path / "one") != digest(tmp_path / "two")
    with pytest.raises(InputError, match="no such file"):
        digest(tmp_path / "none")


BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijklmno", "bcdefghijklmnop"))


@pytest.mark.parametrize(
    "content",
    [
        "", "- 1\n- 2", "text", "a: [", "a: b: c", "\x00", b"\xff\xfe\x00", b"\x89HDF\r\n", "1: 2", "a: !!python/object:os.system x",
        "? [a]\n: 1", BOMB, "a: " + deep(50_000), "- " * 5000, "a: 2020-99-99", "a: " + "1" * 5000, "%YAML 9.9\n---\na: 1",
        "a: " + "x" * 2**20, "a: 1\n---\nb: 2", "a: !!int x", "a: !!set [1]", "a: !!binary €", "<<: 1", "<<: [1]", "a: &x [*x]",
    ],
)  # fmt: skip
def test_a_configuration_that_is_none_is_refused_at_once(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"config\.yaml"):
        read_yaml(path)
    assert time.monotonic() - begin < 2


@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>'\"#% \n\t0.", max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_yaml(tmp_path_factory, content):
    values = read_or_refused(read_yaml, tmp_path_factory.getbasetemp() / "any.yaml", content)
    assert values is None or isinstance(values, dict)

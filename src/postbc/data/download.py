"""The official robomimic and LIBERO files from their public hub, checked on arrival."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postbc.data.libero_tasks import find_tasks
from postbc.errors import InputError, require
from postbc.files import digest

REPOSITORY, LIBERO = "robomimic/robomimic_datasets", "yifengzhu-hf/LIBERO-datasets"
#: Tasks and data sets with low-dimensional files; proficient-human files hold 200 demonstrations, multi-human ones 300 (6 people × 50).
TASKS = ("lift", "can", "square")
DEMONSTRATIONS = {"ph": 200, "mh": 300}
#: Of each of LIBERO's tasks.
OF_A_TASK = 50
#: Simulator that the hub's v1.5 files were made with.
MADE_WITH = "1.5.1"
VERSION_NOTE = (
    f"The hub's v1.5 files were made with robosuite {MADE_WITH}. They can be inspected and trained on here, but robosuite 1.4.0,\n"
    "which postbc simulates with, moves differently under the same commands: `demos replay` refuses them, and a policy trained on\n"
    "them may succeed near 0 % in evaluation without any error. For use in the simulator make your own with `demos collect`, or\n"
    "take robomimic's older v1.4.1 files."
)


@dataclass(frozen=True)
class Remote:
    """What the hub says about a file."""

    filename: str
    """Path inside the repository."""
    size: int
    """Bytes."""
    sha256: str | None
    """Of the content, where the hub knows it."""
    licence: str
    """As the repository's card states it, or "not stated"."""
    commit: str
    """Revision that will be downloaded."""
    repository: str = REPOSITORY


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            "Downloading needs huggingface_hub.", found="not installed", remedy="pip install 'postbc[hub]'"
        ) from error
    return huggingface_hub


def _endpoint() -> str | None:
    """A mirror instead of the public hub, as huggingface_hub's own variable names it; read at each call, not at import."""
    return os.environ.get("HF_ENDPOINT") or None


def _network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the hub cannot be reached or refuses.

    Its HTTP library changes with its version (requests, httpx, httpx2); its own error derives from that library's root error.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _unreachable(error: Exception, filename: str, repository: str) -> InputError:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return InputError("The disk is full.", found=str(error), remedy="free space and run the same command: it resumes")
    return InputError(
        "The file could not be fetched from the hub.",
        key=f"{repository}: {filename}",
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
        expected="a connection to the Hugging Face hub (HF_ENDPOINT names a mirror, HF_HUB_OFFLINE forbids it)",
        remedy="connect and run the same command again: it resumes. Without a connection, `postbc demos collect` makes demonstrations",
    )


def look_up(task: str, dataset: str) -> Remote:
    """Size, checksum, licence and revision of a file, without downloading it. InputError: unknown data set, or no hub."""
    require(task in TASKS and dataset in DEMONSTRATIONS, "There is no such data set.", key="task, dataset", found=f"{task}, {dataset}",
            expected=f"{' | '.join(TASKS)} and {' | '.join(DEMONSTRATIONS)}")  # fmt: skip
    return _look_up(REPOSITORY, [f"v1.5/{task}/{dataset}/low_dim_v15.hdf5"])[0]


def look_up_libero(name: str) -> list[Remote]:
    """The files of LIBERO's tasks, one each, as :func:`postbc.data.libero_tasks.find_tasks` names them. InputError as above."""
    return _look_up(LIBERO, [f"{task.suite}/{task.name}_demo.hdf5" for task in find_tasks(name)])


def _look_up(repository: str, filenames: list[str]) -> list[Remote]:
    api = _hub().HfApi(endpoint=_endpoint())
    try:
        info = api.dataset_info(repository)
        files = {file.path: file for file in api.get_paths_info(repository, filenames, repo_type="dataset", revision=info.sha)}
    except _network_errors() as error:
        raise _unreachable(error, filenames[0], repository) from error
    for filename in filenames:
        require(filename in files, "The hub no longer has this file.", key=f"{repository}: {filename}",
                found=f"nothing at revision {info.sha}", remedy="look at the repository's file list, and tell us")  # fmt: skip
    licence = getattr(info.card_data, "license", None) if getattr(info, "card_data", None) else None
    return [
        Remote(
            filename, int(files[filename].size), getattr(getattr(files[filename], "lfs", None), "sha256", None),
            str(licence) if licence else "not stated", str(info.sha), repository,
        )
        for filename in filenames
    ]  # fmt: skip


def check_arrived(path: Path, remote: Remote, demonstrations: int) -> int:
    """Number of demonstrations in a downloaded file. InputError when size, checksum, format or that number is not as expected."""
    import h5py

    remedy = "run the same command again"
    size = path.stat().st_size
    require(size == remote.size, "The file is incomplete.", file=path, found=f"{size:,} bytes", expected=f"{remote.size:,} bytes",
            remedy=remedy)  # fmt: skip
    if remote.sha256 is not None:
        found = digest(path)
        require(found == remote.sha256, "The file is damaged.", file=path, key="SHA-256", found=found, expected=remote.sha256,
                remedy=remedy)  # fmt: skip
    try:
        with h5py.File(path, "r") as file:
            count = len(file["data"])
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise InputError("What arrived is not a robomimic file.", file=path, found=str(error), remedy=remedy) from error
    require(count == demonstrations, "The file holds another number of demonstrations than it should.", file=path, found=count,
            expected=demonstrations, remedy="look whether the hub's file has changed")  # fmt: skip
    return count


def fetch(remote: Remote, directory: str | Path, demonstrations: int, *, force: bool = False) -> Path:
    """Download into ``directory`` under the hub's own path and check what arrived; a whole file that is there already is kept.

    What has arrived of an interrupted download waits beside the file (``….part``), and the next call goes on from there:
    ``hf_hub_download`` itself resumes within one call only (since huggingface_hub 2). The file gets its name when it is whole.

    Args:
        remote: from :func:`look_up`.
        directory: made if it is missing.
        demonstrations: number that the file must hold.
        force: download again, over whatever is there.

    Raises InputError: no hub, no space, another file of that name, or a file that arrived damaged.
    """
    path = Path(directory) / remote.filename
    if path.exists() and not force:
        try:
            check_arrived(path, remote, demonstrations)
        except InputError as error:
            raise InputError(
                "There is another file of this name, or a damaged one.", file=path, found=str(error).splitlines()[0],
                remedy="move it away, or pass --force to replace it",
            ) from error  # fmt: skip
        return path
    part = path.with_name(f".{path.name}.{(remote.sha256 or remote.commit)[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if force:
            part.unlink(missing_ok=True)
        have = part.stat().st_size if part.exists() else 0
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise InputError("The directory cannot be used.", file=path.parent, found=error.strerror) from error
    require(free >= remote.size - have, "There is not enough space on the disk.", file=path.parent, found=f"{free:,} bytes free",
            expected=f"{remote.size - have:,} bytes", remedy="free space or choose another directory")  # fmt: skip
    hub = _hub()
    from huggingface_hub.file_download import http_get

    url = hub.hf_hub_url(remote.repository, remote.filename, repo_type="dataset", revision=remote.commit, endpoint=_endpoint())
    try:
        if have < remote.size:
            with part.open("ab") as file:
                http_get(
                    url, file, resume_size=have, headers=hub.utils.build_hf_headers(), expected_size=remote.size,
                    displayed_filename=path.name,
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
    except _network_errors() as error:
        raise _unreachable(error, remote.filename, remote.repository) from error
    try:
        check_arrived(part, remote, demonstrations)
    except InputError:
        part.unlink()  # or every later call would resume the damaged one
        raise
    os.replace(part, path)
    return path

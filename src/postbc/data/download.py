"""The official robomimic and LIBERO files from their public hub (robomimic's older ones: from its own server), checked on arrival."""

from __future__ import annotations

import errno
import os
import re
import shutil
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from postbc.data.belonging import CONVERT
from postbc.data.libero_tasks import find_tasks
from postbc.errors import InputError, require
from postbc.files import digest

REPOSITORY, LIBERO = "robomimic/robomimic_datasets", "yifengzhu-hf/LIBERO-datasets"
#: Where robomimic's older files lie, as its registry of data sets has it.
OLDER = "http://downloads.cs.stanford.edu/downloads/rt_benchmark"
TASKS = ("lift", "can", "square")
Release = Literal["v1.5", "v1.4.1"]
RobomimicSet = Literal["ph", "mh", "mg", "mg-dense"]
#: Low-dimensional files: one person's (200 demonstrations), six people's (6 × 50), and 300 rollouts of each checkpoint of an SAC agent.
DEMONSTRATIONS: dict[tuple[str, str], int] = {
    **{(task, "ph"): 200 for task in TASKS},
    **{(task, "mh"): 300 for task in TASKS},
    **{(task, kind): 300 * checkpoints for task, checkpoints in (("lift", 5), ("can", 13)) for kind in ("mg", "mg-dense")},
}
#: Of each of LIBERO's tasks.
OF_A_TASK = 50
VERSION_NOTE = (
    'robomimic\'s v1.5 files were made with robosuite 1.5.1, postbc simulates with 1.4.0, where "object" has other signs and another\n'
    f"order: training refuses them. `{CONVERT}` observes their states as 1.4.0\n"
    "does; --version v1.4.1 fetches files that need no conversion; `postbc doctor FILE` replays a few demonstrations."
)


@dataclass(frozen=True)
class Remote:
    """What the hub, or another server, says about a file."""

    filename: str
    """Where it will lie in the download's directory."""
    size: int
    """Bytes."""
    sha256: str | None
    """Of the content, where the hub knows it."""
    licence: str
    """As the repository's card states it, or "not stated"."""
    commit: str
    """Revision that will be downloaded."""
    url: str
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


def _unreachable(error: Exception, where: str) -> InputError:
    if getattr(error, "errno", None) == errno.ENOSPC:
        return InputError("The disk is full.", found=str(error), remedy="free space and run the same command: it resumes")
    return InputError(
        "The file could not be fetched.",
        key=where,
        found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
        expected="a connection (to the Hugging Face hub HF_ENDPOINT names a mirror, HF_HUB_OFFLINE forbids it)",
        remedy="connect and run the same command again: it resumes. Without a connection, `postbc demos collect` makes demonstrations",
    )


def filename_of(task: str, dataset: str, version: Release) -> str:
    """Where a file of robomimic's will lie: ``VERSION/TASK/SET/…``, as the hub has its own. InputError: unknown data set."""
    require((task, dataset) in DEMONSTRATIONS, "There is no such data set.", key="task, dataset", found=f"{task}, {dataset}",
            expected=", ".join(f"{t} {d}" for t, d in DEMONSTRATIONS))  # fmt: skip
    kind, _, reward = dataset.partition("-")
    reward = f"_{reward or 'sparse'}" if kind == "mg" else ""
    return f"{version}/{task}/{kind}/low_dim{reward}_{version.replace('.', '')}.hdf5"


def look_up(task: str, dataset: str, version: Release = "v1.5") -> Remote:
    """Size, checksum, licence and revision of a file, without downloading it. InputError: unknown data set, or no connection.

    v1.4.1 lies on a plain server, which says its size, and no checksum.
    """
    filename = filename_of(task, dataset, version)
    return _look_up_older(filename) if version == "v1.4.1" else _look_up(REPOSITORY, [filename])[0]


def _look_up_older(filename: str) -> Remote:
    url = f"{OLDER}/{filename.partition('/')[2]}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
            size, revision = (answer.headers.get(name, "") for name in ("Content-Length", "ETag"))
    except (OSError, HTTPException) as error:
        raise _unreachable(error, url) from error
    require(size.isdecimal(), "The server does not say how large the file is.", key=url, found=size)
    revision = re.sub(r"\W", "", revision) or "unknown"
    return Remote(filename, int(size), None, "not stated", revision, url, OLDER.partition("//")[2])


def look_up_libero(name: str) -> list[Remote]:
    """The files of LIBERO's tasks, one each, as :func:`postbc.data.libero_tasks.find_tasks` names them. InputError as above."""
    return _look_up(LIBERO, [f"{task.suite}/{task.name}_demo.hdf5" for task in find_tasks(name)])


def _look_up(repository: str, filenames: list[str]) -> list[Remote]:
    hub = _hub()
    api = hub.HfApi(endpoint=_endpoint())
    try:
        info = api.dataset_info(repository)
        files = {file.path: file for file in api.get_paths_info(repository, filenames, repo_type="dataset", revision=info.sha)}
    except _network_errors() as error:
        raise _unreachable(error, f"{repository}: {filenames[0]}") from error
    for filename in filenames:
        require(filename in files, "The hub no longer has this file.", key=f"{repository}: {filename}",
                found=f"nothing at revision {info.sha}", remedy="look at the repository's file list, and tell us")  # fmt: skip
    licence = getattr(info.card_data, "license", None) if getattr(info, "card_data", None) else None
    return [
        Remote(
            filename, int(files[filename].size), getattr(getattr(files[filename], "lfs", None), "sha256", None),
            str(licence) if licence else "not stated", str(info.sha),
            hub.hf_hub_url(repository, filename, repo_type="dataset", revision=info.sha, endpoint=_endpoint()), repository,
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
    """Download into ``directory`` under ``remote.filename`` and check what arrived; a whole file that is there already is kept.

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

    own = remote.repository in (REPOSITORY, LIBERO)  # another server is not told who you are on the hub
    try:
        if have < remote.size:
            with part.open("ab") as file:
                http_get(
                    remote.url, file, resume_size=have, headers=hub.utils.build_hf_headers() if own else {}, expected_size=remote.size,
                    displayed_filename=path.name,
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
    except _network_errors() as error:
        raise _unreachable(error, remote.url) from error
    try:
        check_arrived(part, remote, demonstrations)
    except InputError:
        part.unlink()  # or every later call would resume the damaged one
        raise
    os.replace(part, path)
    return path

"""Files that are whole or not there: written aside, synced, renamed; locks and checksums."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock
from zlib_ng.zlib_ng import crc32

# What flock says of a file system that has no locks, or that lost the service for them.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
# Where a ustar header has the owner's name, in which each member of a shard has its checksum.
CHECKSUM_PLACE = 265


def write_atomically(path: Path, data: bytes) -> None:
    """``path`` holds the old bytes or the new, never a part of them, whatever happens when.

    Raises OSError where the disk refuses; nothing is left aside then.
    """
    aside = name_aside(path)
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def name_aside(path: Path) -> Path:
    """Where to write what is to be ``path``: host and process keep two writers of it apart."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")


def replace_folder(path: Path, made: Path) -> None:
    """``made``, a finished folder beside ``path``, becomes ``path``; what was there is deleted.

    Linux exchanges the two names, so that at every moment one of the folders is ``path``. Where a
    file system cannot (NFS), there is a moment in which a kill leaves no ``path``: the folder that
    was there is then ``.NAME.before``, and ``made`` has the name it had.
    """
    before = path.with_name(f".{path.name}.before")
    for content in sorted(made.rglob("*")):
        sync(content)
    sync(made)
    if not path.exists():
        made.rename(path)
    elif not _exchange(made, path):
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
        made.rename(path)
    sync(path.parent)
    for old in (made, before):
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two files or folders have each other's name at once; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def checksum(content: bytes | memoryview) -> str:
    """CRC-32 in hexadecimal: the owner's name in the header of ``content`` in a shard."""
    return f"{crc32(content):08x}"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the renames in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock(FileLock):
    """A lock that the kernel gives back when its holder dies, however it dies, on whichever host.

    Where a file system has none, filelock would make do with a file, which stays when its holder is
    killed: whatever it locks could not be had again.
    """

    def __init__(self, path: Path, *, timeout: float = -1) -> None:
        super().__init__(path, timeout=timeout, fallback_to_soft=False)

    def acquire(self, *args: Any, **kwargs: Any) -> AcquireReturnProxy:
        """As of filelock.

        Raises:
            Timeout: somebody else holds it, for longer than `timeout` seconds.
            ValueError: the file system has no locks.
        """
        file = Path(self.lock_file)
        new = not file.exists()
        try:
            return super().acquire(*args, **kwargs)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if new:
                file.unlink(missing_ok=True)
            raise ValueError(
                f"the file system of {file.parent} has no locks "
                f"({error.strerror}): have it mounted with them (Lustre: -o flock; NFS: with its "
                "lock service), or use a folder on another one"
            ) from None


class OpenFiles:
    """Descriptors of numbered files for positioned reads, a limited number of them open at once.

    Shuffling stays within a few shards at a time, so few open files serve sets of any size. May be
    pickled.
    """

    def __init__(self, paths: Sequence[Path], limit: int = 64) -> None:
        self._paths = paths
        self._limit = limit
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def descriptor(self, number: int) -> int:
        """Of file `number`; may close the one that was not asked for the longest."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = os.open(self._paths[number], os.O_RDONLY)
        return self._open[number]

    def close(self) -> None:
        """Close all; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

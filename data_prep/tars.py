"""Members of tars, also of tars within tars, listed from their headers without extracting."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

GZIP_MAGIC = b"\x1f\x8b"


def members(file: IO[bytes] | Window, name: str) -> Iterator[tarfile.TarInfo]:
    """The plain files and folders of the tar in ``file``, one at a time.

    ``name`` is what errors call it. Raises ValueError for a damaged archive, also one that is cut,
    and for members that are links or devices or could be written outside of a folder.
    """
    cure = "fetch the archive again"
    try:
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:
            while (member := archive.next()) is not None:
                _refuse_unsafe(name, member)
                yield member
                vars(archive)["members"].clear()  # it keeps a kilobyte of each otherwise
            # tarfile takes an archive cut in or before a header for one that ends there.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{name} is cut short or damaged at {archive.offset}: {cure}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{name} is not a folder, a tar or a tar.gz, or it is damaged ({error}): {cure}"
        ) from None


def _refuse_unsafe(name: str, member: tarfile.TarInfo) -> None:
    if member.issym() or member.islnk():
        problem = f"is a link to {member.linkname!r}"
    elif not (member.isdir() or member.isreg()) or member.issparse():
        problem = "is neither a plain file nor a folder"
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        problem = "leads out of the archive"
    else:
        return
    raise ValueError(f"{name}: member {member.name!r} {problem}: pack plain files and folders only")


class Window(io.RawIOBase):
    """``size`` bytes of an open file from ``start`` on, as a file of its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._descriptor, length, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

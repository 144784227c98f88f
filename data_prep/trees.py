"""The files of a folder or of a tar or tar.gz of one, listed without extracting."""

import gzip
import hashlib
import os
import posixpath
import shutil
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from data_prep.items import Item
from data_prep.listing import FolderReader, RangeReader, Reader
from data_prep.tars import GZIP_MAGIC, Member, Window, members

_ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class File:
    """A file of a tree; ``path`` uses slashes and starts below what was listed.

    ``problem`` says why it cannot hold an image, without its content having been read;
    ``modified`` is in nanoseconds, and 0 for the members of an archive.
    """

    path: str
    offset: int
    size: int
    problem: str | None = None
    modified: int = 0


@dataclass(frozen=True)
class Tree:
    """Files and folders sorted by path. ``base`` is the leading folder with its slash, or "".

    ``stamp`` changes with the modification times.
    """

    name: str
    base: str
    files: list[File]
    folders: list[str]
    reader: Reader
    stamp: str

    def read(self, file: File) -> bytes:
        """Bytes of one file, outside of any split or class."""
        return self.reader.read(Item("", 0, file.path, file.offset, file.size))


def open_tree(path: Path, scratch: Path) -> Tree:
    """List ``path``, in which the splits may lie at the top or within one leading folder.

    A tar.gz has no random access, so it is unpacked to a plain tar in ``scratch``, never into
    memory. Raises FileNotFoundError where nothing is, and ValueError for another kind of file, a
    damaged archive, or one with members that could write outside of a folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder, a tar or a tar.gz")
    if path.is_dir():
        files, folders = _walk(path)
        return _tree(path, files, folders, FolderReader(path))
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder: give a folder, a tar or a tar.gz")
    tar = path
    with path.open("rb") as file:
        if file.read(2) == GZIP_MAGIC:
            tar = scratch / "source.tar"
            _gunzip(path, tar)
    files, folders = _contents(path, tar)
    return _tree(path, files, folders, RangeReader(tar))


def hidden(path: str) -> bool:
    """Whether a part of the path starts with a dot, as in ``._0001.jpg`` and ``.DS_Store``."""
    return "/." in f"/{path}"


def _stem(path: Path) -> str:
    name = path.resolve().name
    for suffix in _ARCHIVE_SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _walk(root: Path) -> tuple[list[File], list[str]]:
    files: list[File] = []
    folders: list[str] = []
    seen: dict[tuple[int, int], Path] = {}
    for place, names, file_names in os.walk(root, followlinks=True, onerror=_raise):
        folder = Path(place)
        status = folder.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            raise ValueError(f"{folder} and {first} are one folder: remove one of the links")
        folders += [(folder / name).relative_to(root).as_posix() for name in names]
        files += [describe(folder / name, root) for name in file_names]
    return files, folders


def describe(path: Path, root: Path) -> File:
    """A file on disk, its path from ``root`` on; ValueError where it cannot be looked at."""
    name = path.relative_to(root).as_posix()
    try:
        status = path.stat()
    except FileNotFoundError:
        return File(name, 0, 0, "a link that leads nowhere")
    except OSError as error:
        _raise(error)
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    return File(name, 0, status.st_size, problem, status.st_mtime_ns)


def _raise(error: OSError) -> NoReturn:
    raise ValueError(
        f"cannot list {error.filename} ({error.strerror}): make it readable or take it out"
    )


def _gunzip(path: Path, tar: Path) -> None:
    try:
        with gzip.open(path, "rb") as packed, tar.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None


def _contents(path: Path, tar: Path) -> tuple[list[File], list[str]]:
    files: dict[str, File] = {}
    folders: set[str] = set()
    for member in _plain_members(path, tar):
        name = posixpath.normpath(member.name)
        if member.is_folder:
            folders.add(name)
        elif name in files:
            raise ValueError(f"{path} holds {name} twice: pack it again from one folder")
        else:
            files[name] = File(name, member.offset, member.size)
            folders.add(posixpath.dirname(name))
    above = {str(parent) for name in folders for parent in PurePosixPath(name).parents}
    return list(files.values()), list(folders | above)


def _plain_members(path: Path, tar: Path) -> Iterator[Member]:
    with tar.open("rb") as file:
        yield from members(Window(file.fileno(), 0, tar.stat().st_size), str(path))


def _tree(path: Path, files: list[File], folders: list[str], reader: Reader) -> Tree:
    names = sorted(set(folders) - {"", "."})
    tops = {name.split("/", 1)[0] for name in names if not hidden(name)}
    base = "" if len(tops) != 1 or tops & set(SPLITS) else f"{tops.pop()}/"
    files.sort(key=lambda file: file.path)
    times = [path.stat().st_mtime_ns, *(file.modified for file in files)]
    stamp = hashlib.sha256(repr(times).encode()).hexdigest()
    return Tree(_stem(path), base, files, names, reader, stamp)

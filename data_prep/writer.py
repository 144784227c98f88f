"""Samples into one shard: a WebDataset tar and its DALI index, equal bytes for equal samples."""

import hashlib
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from data_prep.files import CHECKSUM_PLACE, name_aside, write_atomically
from data_prep.manifest import Shard

INDEX_VERSION = "v1.2"


class ShardWriter:
    """Writes ``<key>.jpg|png`` and ``<key>.cls`` per sample into ``folder/stem.tar``.

    The file has its name only once it is complete, after its index.

    A plain ustar archive without times and owners. The owner's name in each header is the content's
    `checksum`, which verification and training compare: neither JPEG nor tar notices a flipped byte
    in an image, and the shard's own hash cannot say which sample is damaged. The index,
    ``stem.idx``, has DALI's format: ``v1.2 N``, then one line of ``extension offset size name`` per
    component for each sample.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._path = folder / f"{stem}.tar"
        # A worker that outlives its parent is kept out of the next one's files.
        self._aside = name_aside(self._path)
        self._file = _HashedFile(self._aside)
        self._lines: list[str] = []

    def add(
        self, key: str, image: bytes, extension: str, label: int, crc: int | None = None
    ) -> None:
        """Append one sample; keys must be unique over the set and hold no dot.

        ``crc`` is the CRC-32 of ``image``, where it is known already.
        """
        text = b"%d" % label
        image_name, label_name = f"{key}.{extension}", f"{key}.cls"
        # As few pieces as can be: at the rate of a disk, each costs as much as some kilobytes.
        before = _header(image_name, len(image), crc32(image) if crc is None else crc)
        between = _padding(len(image)) + _header(label_name, len(text), crc32(text))
        start = self._file.written + len(before)
        label_start = start + len(image) + len(between)
        self._file.write(before, image, between + text + _padding(len(text)))
        self._lines.append(
            index_line(
                (
                    (extension, start, len(image), image_name),
                    ("cls", label_start, len(text), label_name),
                )
            )
        )

    def close(self) -> Shard | None:
        """Write both files down to the disk; a shard without samples leaves no file and is None."""
        end = self._file.written + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.close()
        if not self._lines:
            self._aside.unlink()
            return None
        index = index_bytes(self._lines)
        index_path = self._path.with_suffix(".idx")
        write_atomically(index_path, index)
        self._aside.replace(self._path)
        return Shard(
            name=self._path.name,
            samples=len(self._lines),
            bytes=self._file.written,
            sha256=self._file.hexdigest(),
            index=index_path.name,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def discard(self) -> None:
        """Leave nothing of a shard that cannot be finished."""
        self._file.abandon()
        self._aside.unlink(missing_ok=True)


def index_line(components: Iterable[tuple[str, int, int, str]]) -> str:
    """The index's line of one sample, from (extension, offset, size, name) of its components."""
    return " ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in components)


def index_bytes(lines: list[str]) -> bytes:
    """The whole index of the samples with these lines."""
    return "".join(f"{line}\n" for line in (f"{INDEX_VERSION} {len(lines)}", *lines)).encode(
        "ascii"
    )


def _padding(size: int) -> bytes:
    """What fills the last block of so many bytes."""
    return bytes(-size % tarfile.BLOCKSIZE)


_PLAIN = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
# To fill in: the name, the size, the sum of all bytes, where its own count as blanks, the owner.
_HEADER = b"%b" + _PLAIN[100:124] + b"%011o" + _PLAIN[135:148] + b"%06o"
_HEADER += _PLAIN[154:CHECKSUM_PLACE] + b"%08x" + _PLAIN[CHECKSUM_PLACE + 8 :]
_PLAIN_SUM = sum(_PLAIN) - sum(_PLAIN[124:135]) - sum(_PLAIN[148:156]) + 8 * ord(" ")


def _header(name: str, size: int, crc: int) -> bytes:
    """What tarfile makes of these values, at a thirtieth of its time."""
    text = name.encode("ascii")
    assert len(text) < tarfile.LENGTH_NAME, f"{name} fits into a header"
    total = _PLAIN_SUM + sum(b"%b%011o%08x" % (text, size, crc))
    return _HEADER % (text.ljust(tarfile.LENGTH_NAME, b"\0"), size, total, crc)


class _HashedFile:
    """A file being written once from start to end, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self.written = 0

    def write(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._digest.update(piece)
        size = sum(map(len, pieces))
        self.written += size
        done = os.writev(self._file.fileno(), pieces)
        if done < size:  # the disk is full, unless the rest can be written after all
            rest = b"".join(pieces)
            while done < size:
                done += os.write(self._file.fileno(), memoryview(rest)[done:])

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without forcing anything to the disk, which may not take even what there is."""
        with suppress(OSError):
            self._file.close()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

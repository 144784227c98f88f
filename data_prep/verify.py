"""Is what is on disk what the manifest says; and if not, what differs and where."""

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.facts import Facts
from data_prep.files import checksum
from data_prep.images import RejectedImageError, Treatment, check, counted_size, own_pixel_limit
from data_prep.manifest import (
    CARD_NAME,
    CARD_PICTURE_NAME,
    DUPLICATES_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    Manifest,
    Shard,
)
from data_prep.parallel import run_parallel
from data_prep.writer import index_bytes, index_line

IMAGE_EXTENSIONS = ("jpg", "png")


@dataclass(frozen=True)
class Finding:
    """Something that is not as the manifest says.

    ``path`` is relative to the set. ``sample`` is the key of the sample concerned and ``offset``
    the byte in the file where it, or what cannot be read, begins; None where it is the whole file.
    """

    path: str
    problem: str
    sample: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample is not None else ""
        offset = f", offset {self.offset}" if self.offset is not None else ""
        return f"{self.path}{sample}{offset}: {self.problem}"


@dataclass(frozen=True)
class _Task:
    root: Path
    shard: Shard
    classes: int
    owners: dict[str, str]
    treatment: Treatment


@dataclass
class _Checked:
    """What one shard holds and what is wrong with it."""

    shard: Shard
    facts: Facts
    findings: list[Finding] = field(default_factory=list)

    def report(self, problem: str, sample: str | None = None, offset: int | None = None) -> None:
        self.findings.append(Finding(self.shard.name, problem, sample, offset))


def verify(
    root: Path,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Read every byte of the set at ``root`` and return what does not match; empty: all is good.

    Every sample's checksum, label and image are checked, so that damage is found where it lies.
    ``progress`` is called with the samples done and the samples in all. Raises FileNotFoundError
    where there is no set.
    """
    root = Path(root)
    try:
        manifest = Manifest.load(root)
    except ValueError as error:
        return [Finding(MANIFEST_NAME, str(error))]
    shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
    owners = {shard.sha256: shard.name for _, shard in shards}
    owners |= {shard.index_sha256: shard.name for _, shard in shards}
    treatment = Treatment.of(manifest.settings)
    tasks = [_Task(root, shard, len(manifest.classes), owners, treatment) for _, shard in shards]
    results: dict[int, _Checked] = {}
    done = 0
    for position, checked in run_parallel(_check_shard, tasks, workers):
        results[position] = checked
        done += tasks[position].shard.samples
        if progress:
            progress(done, manifest.accepted)
    findings = [finding for n in range(len(tasks)) for finding in results[n].findings]
    if not findings:
        parts = [(name, results[n].facts) for n, (name, _) in enumerate(shards)]
        findings += _check_sums(manifest, parts)
    return findings + _check_rest(manifest)


def verify_quickly(root: Path) -> list[Finding]:
    """Compare what is cheap to read with the manifest: the shards' sizes and their whole indices.

    Finds what is missing, cut, exchanged or foreign, not a flipped byte within a shard. Raises
    FileNotFoundError where there is no set.
    """
    root = Path(root)
    try:
        manifest = Manifest.load(root)
    except ValueError as error:
        return [Finding(MANIFEST_NAME, str(error))]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    owners = {shard.index_sha256: shard.name for shard in shards}
    findings: list[Finding] = []
    for shard in shards:
        checked = _Checked(shard, Facts([]))
        try:
            size = (root / shard.name).stat().st_size
        except OSError as error:
            checked.report(f"cannot be read ({error.strerror})")
        else:
            if size != shard.bytes:
                checked.report(f"has {size} bytes, the manifest says {shard.bytes}")
        _check_index(checked, root, owners, None)
        findings += checked.findings
    return findings + _check_rest(manifest)


def _check_shard(task: _Task) -> _Checked:
    """Compare one shard and its index with the manifest; runs in a worker."""
    checked = _Checked(task.shard, Facts([0] * task.classes))
    lines: list[str] | None = None
    try:
        data = (task.root / task.shard.name).read_bytes()
    except OSError as error:
        checked.report(f"cannot be read ({error.strerror})")
    else:
        if len(data) != task.shard.bytes:
            checked.report(f"has {len(data)} bytes, the manifest says {task.shard.bytes}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != task.shard.sha256:
            owner = task.owners.get(digest)
            checked.report(f"is shard {owner}" if owner else "sha256 differs from the manifest")
        with own_pixel_limit():
            lines = _check_samples(checked, data, task.treatment)
    _check_index(checked, task.root, task.owners, lines)
    return checked


def _check_index(
    checked: _Checked, root: Path, owners: dict[str, str], lines: list[str] | None
) -> None:
    shard, name = checked.shard, checked.shard.index
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        checked.findings.append(Finding(name, f"cannot be read ({error.strerror})"))
        return
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.index_sha256:
        owner = owners.get(digest)
        problem = f"is the index of shard {owner}" if owner else "sha256 differs from the manifest"
        checked.findings.append(Finding(name, problem))
    elif lines is not None and not checked.findings and data != index_bytes(lines):
        checked.findings.append(Finding(name, f"does not describe {shard.name}"))


def _check_samples(checked: _Checked, data: bytes, treatment: Treatment) -> list[str]:
    """Check the samples of the tar in ``data``; returns the lines of the index it should have."""
    lines = []
    members = _members(checked, data)
    for key, group in itertools.groupby(members, key=lambda member: member.name.split(".", 1)[0]):
        sample = list(group)
        lines.append(index_line([(_extension(m), m.offset_data, m.size, m.name) for m in sample]))
        _check_sample(checked, data, key, sample, counted_size(treatment, len(lines) - 1))
    if len(lines) != checked.shard.samples:
        checked.report(f"holds {len(lines)} samples, the manifest says {checked.shard.samples}")
    return lines


def _members(checked: _Checked, data: bytes) -> Iterator[tarfile.TarInfo]:
    """Walk the headers up to the end or to the first that cannot be read."""
    position = 0
    while (header := data[position : position + tarfile.BLOCKSIZE]) != bytes(tarfile.BLOCKSIZE):
        if not header:
            checked.report("ends without the mark of a tar's end: it is cut", offset=position)
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "surrogateescape")
        except tarfile.HeaderError as error:
            checked.report(f"tar header cannot be read ({error})", offset=position)
            return
        member.offset_data = position + tarfile.BLOCKSIZE
        blocks = -(-member.size // tarfile.BLOCKSIZE)
        position = member.offset_data + blocks * tarfile.BLOCKSIZE
        if position > len(data):
            checked.report(f"{member.name} is cut", offset=member.offset_data)
            return
        end = member.offset_data + member.size
        if data[end:position].strip(b"\0"):
            checked.report(f"the filling after {member.name} is not empty", offset=end)
        yield member
    if data[position:].strip(b"\0"):
        checked.report("the filling at its end is not empty", offset=position)


def _extension(member: tarfile.TarInfo) -> str:
    return member.name.partition(".")[2]


def _check_sample(
    checked: _Checked, data: bytes, key: str, members: list[tarfile.TarInfo], counted: float
) -> None:
    extensions = [_extension(member) for member in members]
    start = members[0].offset_data
    if len(members) != 2 or extensions[0] not in IMAGE_EXTENSIONS or extensions[1] != "cls":
        held = ", ".join(extensions)
        checked.report(f"holds {held} and not one of jpg or png, then cls", key, start)
        return
    contents = [data[m.offset_data : m.offset_data + m.size] for m in members]
    for member, content in zip(members, contents, strict=True):
        if checksum(content) != member.uname:
            checked.report(f"{member.name} does not match its checksum", key, member.offset_data)
            return
    label = contents[1].decode("ascii", "replace")
    classes = len(checked.facts.counts)
    if not label.isdecimal() or int(label) >= classes:
        problem = f"label {label!r} is not one of 0 to {classes - 1}"
        checked.report(problem, key, members[1].offset_data)
        return
    try:
        image = check(contents[0], counted=counted)
    except RejectedImageError as reason:
        checked.report(str(reason), key, start)
        return
    if image.extension != extensions[0]:
        checked.report(f"{members[0].name} holds a {image.extension} image", key, start)
    elif image.reencoded:
        checked.report("readers decode the image differently", key, start)
    checked.facts.count(image, int(label))


def _check_sums(manifest: Manifest, parts: list[tuple[str, Facts]]) -> list[Finding]:
    """Compare what the manifest says of the images with what they add up to."""
    total = Facts([0] * len(manifest.classes))
    by_split = {name: Facts([0] * len(manifest.classes)) for name in manifest.splits}
    for name, facts in parts:
        total.add(facts)
        by_split[name].add(facts)
    mean, std = by_split[manifest.measured].channel_statistics()
    pairs: list[tuple[str, Any, Any]] = [
        *(
            (f"counts of {name}", manifest.splits[name].counts, tuple(facts.counts))
            for name, facts in by_split.items()
        ),
        ("image_size", manifest.image_size, total.image_size),
        ("channel_mean", manifest.channel_mean, mean),
        ("channel_std", manifest.channel_std, std),
    ]
    return [
        Finding(MANIFEST_NAME, f"says {name} {said}, the images have {found}")
        for name, said, found in pairs
        if said != found
    ]


def _check_rest(manifest: Manifest) -> list[Finding]:
    """What lies beside the shards."""
    findings = _check_lines(manifest, REJECTED_NAME, manifest.rejected)
    if manifest.duplicates:
        findings += _check_lines(manifest, DUPLICATES_NAME, manifest.duplicates)
    return findings + _unknown_files(manifest)


def _check_lines(manifest: Manifest, name: str, expected: int) -> list[Finding]:
    try:
        lines = (manifest.root / name).read_bytes().splitlines()
    except OSError as error:
        return [Finding(name, f"cannot be read ({error.strerror})")]
    findings = []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            findings.append(Finding(name, f"line {number} is damaged"))
    if len(lines) != expected:
        findings.append(Finding(name, f"has {len(lines)} lines, the manifest says {expected}"))
    return findings


def _unknown_files(manifest: Manifest) -> list[Finding]:
    known = {MANIFEST_NAME, REJECTED_NAME, CARD_NAME, CARD_PICTURE_NAME, LOCK_NAME}
    if manifest.duplicates:
        known.add(DUPLICATES_NAME)
    for split in manifest.splits.values():
        known |= {name for shard in split.shards for name in (shard.name, shard.index)}
    names = sorted(path.name for path in manifest.root.iterdir())
    return [Finding(name, "is not part of the set") for name in names if name not in known]

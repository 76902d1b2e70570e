"""Download a data set, unpack it safely and leave it as data.py reads it; or check one.

    python examples/recipes/prepare_data.py cocostuff10k --data-root data/cocostuff10k
    python examples/recipes/prepare_data.py ade20k --data-root data/ade20k --archive DOWNLOADED.zip
    python examples/recipes/prepare_data.py folder --data-root DIR --check

A download that broke off goes on where it stopped when the command is run again. ``--check`` reads
every file, prints all problems and how often each class occurs, and exits with 1 for problems.
The labels stay as they were published: reading them costs no more than reading converted ones.
"""

import gzip
import hashlib
import http.client
import lzma
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import tyro
from tqdm import tqdm

from commands import run
from data import (
    DATA_SETS,
    GIB,
    Archive,
    Layout,
    Report,
    SegmentationData,
    check,
    list_split,
    open_split,
)
from decoding import IGNORE

SPLITS = ("train", "val")
BLOCK = 2**16  # bytes; what a killed download loses at most
FAILURES = 5  # connections in a row that bring nothing, before a download gives up
PAUSE = 2.0  # seconds before the second of them; doubled each time


@dataclass(frozen=True)
class Settings:
    """Download and unpack a data set, or check one that is there."""

    layout: tyro.conf.Positional[Layout]
    """The data set; "folder", a plain folder, can only be checked."""
    data_root: Path
    """Folder of the data set, which will hold images/ and annotations/."""
    check: bool = False
    """Read every file instead, print all problems and the frequencies of the classes."""
    archive: tuple[Path, ...] = ()
    """Archives that are on disk already, instead of downloads; with several, by official name."""
    sha256: tuple[str, ...] = ()
    """Checksums that the archives must have, in the order in which they are used."""


# What zipfile and tarfile raise for archives that are broken, encrypted or packed otherwise.
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
)


class RefusedError(ValueError):
    """An archive that is broken, unsafe, or not the one that was expected."""


def main(settings: Settings) -> int:
    """Do what was asked for and return the number of problems that a check has found."""
    if settings.check:
        return report(settings.layout, settings.data_root)
    prepare(settings)
    return 0


def prepare(settings: Settings) -> None:
    layout, root = settings.layout, settings.data_root
    archives = DATA_SETS[layout].archives
    if not archives:
        raise ValueError('layout "folder" has nothing to download. Use --check to check a folder.')
    own = given_archives(settings.archive, archives)
    if settings.sha256 and len(settings.sha256) != len(archives):
        raise ValueError(
            f"sha256 must give a checksum for each of {', '.join(map(name_of, archives))}, got "
            f"{len(settings.sha256)}. Give them in this order."
        )
    pins = [f"sha256:{pin.lower()}" for pin in settings.sha256] or [a.checksum for a in archives]
    root.mkdir(parents=True, exist_ok=True)
    for archive, checksum in zip(archives, pins, strict=True):
        name = name_of(archive)
        if all((root / target).exists() for target in archive.parts.values()):
            print(f"{name}: what it holds is there already")
            continue
        path = own.get(name, root / name)
        if not path.exists():
            download(archive.url, path)
        try:
            verify(path, checksum)
            install(path, archive, root)
        except RefusedError:
            if name not in own:
                path.unlink()
            raise
        print(f"{path} is no longer needed")
    for split in SPLITS:
        try:
            print(f"{split}: {how_many(open_split(layout, root, split), layout, split)}")
        except ValueError as error:
            raise ValueError(
                f"{error} If that ran already, {root} holds a part: move images and labels away, "
                "and run it again."
            ) from error


def name_of(archive: Archive) -> str:
    return archive.url.rpartition("/")[2]


def given_archives(paths: tuple[Path, ...], archives: Sequence[Archive]) -> dict[str, Path]:
    """The user's archives by official name; where there is one only, it may be called anything."""
    names = [name_of(archive) for archive in archives]
    own = {names[0]: paths[0]} if len(names) == len(paths) == 1 else {p.name: p for p in paths}
    for name, path in own.items():
        if name not in names or not path.is_file():
            raise ValueError(
                f"archive must be a file called {' or '.join(names)}, got {path}. Download it "
                "first, or leave the option out to have it downloaded."
            )
    return own


def download(url: str, path: Path) -> None:
    """Fetch into ``path`` + ".partial", which an earlier call may have begun; rename it when whole.

    Raises:
        ValueError: The server refuses, or several connections in a row have brought nothing.
    """
    partial = path.with_name(f"{path.name}.partial")
    failures = 0
    while True:
        size = size_of(partial)
        try:
            fetch(url, partial)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise ValueError(
                    f"{url} cannot be downloaded: {error}. Find the file elsewhere and use "
                    f"--archive {path.name}."
                ) from error
            failures = failures + 1 if size_of(partial) == size else 1
            if failures == FAILURES:
                raise ValueError(
                    f"{url} cannot be downloaded now: {error}. Run the same command later; it "
                    f"goes on after the {size} bytes that are there."
                ) from error
        time.sleep(PAUSE * 2 ** (failures - 1))
    partial.replace(path)


def fetch(url: str, partial: Path) -> None:
    """Append to ``partial`` what it lacks, on one connection."""
    start = size_of(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing stands after what is there: that is all of it, or it is of some other file.
        if error.headers["Content-Range"] != f"bytes */{start}":
            partial.unlink()
            fetch(url, partial)
        return
    with response:
        if response.status != 206:
            start = 0  # this server sends files from their beginning only
        elif not response.headers["Content-Range"].startswith(f"bytes {start}-"):
            raise ConnectionError(
                f"asked for byte {start}, got {response.headers['Content-Range']}"
            )
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        bar = tqdm(total=total, initial=start, desc=partial.stem, unit="B", unit_scale=True)
        with partial.open("ab" if start else "wb") as file, bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    # A connection that breaks off looks like the end of the file to read().
    if total is not None and size_of(partial) < total:
        raise ConnectionError(f"the connection broke off at byte {size_of(partial)} of {total}")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def verify(path: Path, checksum: str) -> None:
    """Compare with the checksum; where none is known, print one that can be given next time."""
    kind, _, expected = checksum.partition(":")
    hashes = {name: hashlib.new(name) for name in {"sha256", kind or "sha256"}}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for each in hashes.values():
                each.update(block)
    found = hashes["sha256"].hexdigest()
    if not checksum:
        print(f"{path.name}: no checksum was published, so it is not verified; --sha256 {found}")
    elif hashes[kind].hexdigest() != expected:
        raise RefusedError(
            f"{path} must have {kind} {expected}, got {hashes[kind].hexdigest()}. Download it "
            f"again; if you trust the file, use --archive with --sha256 {found}."
        )


def install(path: Path, archive: Archive, root: Path) -> None:
    """Unpack beside the target, then move whole folders: nothing is ever there in part."""
    unfinished = root / ".unpacking"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        unfinished.mkdir()
        unpack(path, unfinished, archive.limit)
        for folder in (unfinished, *unfinished.iterdir()):
            if all((folder / part).is_dir() for part in archive.parts):
                break
        else:
            raise RefusedError(
                f"{path} must hold {', '.join(archive.parts)}, got "
                f"{sorted(p.name for p in unfinished.iterdir())}. Is it {name_of(archive)}?"
            )
        for part, target in archive.parts.items():
            if not (root / target).exists():
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                (folder / part).rename(root / target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def unpack(path: Path, folder: Path, limit: int) -> None:
    """Unpack a zip or tar archive, once all of its members have been found harmless."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
                check_members(path, map(describe_zipped, members), limit, folder)
                for member in tqdm(members, "unpacking", mininterval=1):
                    file.extract(member, folder)
        else:
            with tarfile.open(path) as file:
                described = ((m.name, m.size, m.isreg() or m.isdir()) for m in file)
                check_members(path, described, limit, folder)
                for member in tqdm(file.getmembers(), "unpacking", mininterval=1):
                    file.extract(member, folder, filter="data")
    except BROKEN as error:
        raise RefusedError(f"{path} cannot be unpacked: {error}. Download it again.") from error


def describe_zipped(member: zipfile.ZipInfo) -> tuple[str, int, bool]:
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0: not packed on Unix
    return member.filename, member.file_size, kind in {0, stat.S_IFREG, stat.S_IFDIR}


def check_members(
    path: Path, members: Iterable[tuple[str, int, bool]], limit: int, folder: Path
) -> None:
    """Refuse what would be written elsewhere, is no plain file, or is larger than it can be."""
    total = 0
    for name, size, plain in members:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or "/" in parts[:1] or PureWindowsPath(name).drive:
            raise RefusedError(f"{path} holds {name!r}, a path that leads out of its folder.")
        if not plain:
            raise RefusedError(f"{path} holds {name!r}, which is neither a file nor a folder.")
        total += max(size, 4096)  # a small file takes a block of the disk
        if total > limit:
            raise RefusedError(
                f"{path} must unpack to at most {limit / GIB:.3g} GiB, and holds more. It cannot "
                "be the archive that was published."
            )
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"data_root must have {total / GIB:.1f} GiB free to unpack {path}, got "
            f"{free / GIB:.1f}. Make room or choose another folder."
        )


def report(layout: str, root: Path) -> int:
    """Print the problems of both splits and how often each class occurs; return their number."""
    problems, notes, found = [], [], []
    classes: tuple[str, ...] = ()
    for split in SPLITS:
        try:
            data = list_split(layout, root, split)
        except ValueError as error:
            problems.append(str(error))
            found.append(Report([], *np.zeros((2, 256), np.int64)))
            continue
        classes = data.classes
        found.append(check(data))
        problems += found[-1].problems
        notes += found[-1].notes
        print(f"{split}: {how_many(data, layout, split)}")
    if classes:
        print(frequencies(classes, found))
    for text in (*notes, *problems):
        print(text)
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)}")
    return len(problems)


def how_many(data: SegmentationData, layout: str, split: str) -> str:
    published = DATA_SETS[layout].published.get(split, len(data))
    return f"{len(data)} images" + f", of {published} published" * (len(data) != published)


def frequencies(classes: tuple[str, ...], reports: list[Report]) -> str:
    """Table of each class's share of the pixels, and number of images, in both splits."""
    width = max(map(len, (*classes, "ignored")))
    head = "".join(f"{f'{split} pixels':>14}{'images':>9}" for split in SPLITS)
    lines = [f"{'':4}{'class':{width}}{head}"]
    for index, name in [*enumerate(classes), (IGNORE, "ignored")]:
        cells = (
            f"{100 * r.pixels[index] / max(r.pixels.sum(), 1):12.3f} %{r.images[index]:9}"
            for r in reports
        )
        lines.append(f"{index:3} {name:{width}}{''.join(cells)}")
    return "\n".join(lines)


def command_line() -> None:
    run(
        lambda: sys.exit(main(tyro.cli(Settings)) > 0),
        "Interrupted; run the same command again: a download goes on where it stopped.",
    )


if __name__ == "__main__":
    command_line()

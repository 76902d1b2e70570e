import hashlib
import importlib
import io
import re
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

import data
import prepare_data
import tiny_data

CONTENT = np.random.default_rng(0).bytes(100_000)


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``breaks`` gives the bytes after which each connection breaks off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.asked = []
        self.breaks = []
        self.ranges = True
        self.status = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers["Range"]
        server.asked.append((self.path, wanted))
        if server.status:
            return self.send_error(server.status)
        content = server.files[self.path]
        start = 0
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + server.breaks.pop(0) if server.breaks else len(content)
        self.wfile.write(content[start:stop])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare_data, "PAUSE", 0)
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def one_file(server):
    server.files["/a.zip"] = CONTENT
    return server


def ranges(server):
    return [wanted for _, wanted in server.asked]


def test_a_download_is_renamed_when_it_is_whole(one_file, tmp_path):
    prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_download_goes_on_where_it_stopped(one_file, tmp_path):
    (tmp_path / "a.zip.partial").write_bytes(CONTENT[:30_000])
    prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert ranges(one_file) == ["bytes=30000-"]


def test_a_connection_that_breaks_off_is_opened_again(one_file, tmp_path):
    # More often than a download may fail without progress.
    one_file.breaks = [10_000] * 2 * prepare_data.FAILURES
    one_file.breaks[1] = 0
    prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert ranges(one_file)[:4] == [None, "bytes=10000-", "bytes=10000-", "bytes=20000-"]


def test_a_server_without_ranges_sends_all_of_it_again(one_file, tmp_path):
    one_file.ranges = False
    (tmp_path / "a.zip.partial").write_bytes(b"something else" * 10_000)
    prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_a_partial_file_with_nothing_left_to_fetch(one_file, tmp_path, extra):
    (tmp_path / "a.zip.partial").write_bytes(CONTENT + extra)
    prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    assert len(one_file.asked) == (2 if extra else 1)


def test_a_server_that_sends_another_range_is_not_believed(one_file, tmp_path, monkeypatch):
    send = Handler.send_header

    def shift(self, name, value):
        send(self, name, value.replace("30000-", "20000-"))

    monkeypatch.setattr(Handler, "send_header", shift)
    (tmp_path / "a.zip.partial").write_bytes(CONTENT[:30_000])
    with pytest.raises(ValueError, match="asked for byte 30000, got bytes 20000-"):
        prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")


def test_a_server_that_fails_again_and_again_is_given_up_and_what_came_is_kept(one_file, tmp_path):
    one_file.breaks = [10_000] + [0] * 20
    with pytest.raises(ValueError, match="broke off at byte 10000 of 100000.* after the 10000 by"):
        prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert len(one_file.asked) == 1 + prepare_data.FAILURES - 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip.partial"]


def test_a_file_that_the_server_does_not_have_is_not_asked_for_again(one_file, tmp_path):
    one_file.status = 404
    with pytest.raises(ValueError, match=r"a\.zip cannot be downloaded: .*404.* --archive a\.zip"):
        prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert len(one_file.asked) == 1
    one_file.status = 503
    with pytest.raises(ValueError, match=r"cannot be downloaded now: .*503"):
        prepare_data.download(f"{one_file.url}/a.zip", tmp_path / "a.zip")
    assert len(one_file.asked) == 1 + prepare_data.FAILURES


def zipped(entries):
    """A zip archive of (name or ZipInfo, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return buffer.getvalue()


def tarred(entries):
    """A tar archive of (name, content), or of (TarInfo, None) for what is no file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content or b"")
            file.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def packed(root, *folders, top=""):
    paths = sorted(p for f in folders for p in (root / f).rglob("*") if p.is_file())
    return [(f"{top}{path.relative_to(root)}", path.read_bytes()) for path in paths]


def archives_of(layout):
    return data.DATA_SETS[layout].archives


def set_archives(monkeypatch, layout, archives):
    """Let the archives of a data set be these."""
    known = replace(data.DATA_SETS[layout], archives=tuple(archives))
    monkeypatch.setitem(data.DATA_SETS, layout, known)


def publish(monkeypatch, server, layout, contents):
    """Serve these archives of a layout instead of the real ones."""
    archives = []
    for archive, content in zip(archives_of(layout), contents, strict=True):
        name = f"/{prepare_data.name_of(archive)}"
        server.files[name] = content
        archives.append(archive._replace(url=server.url + name, checksum=""))
    set_archives(monkeypatch, layout, archives)


def published(layout, folder):
    """The archives of a layout as they are published, made of a tiny data set."""
    if layout == "cocostuff10k":
        tiny_data.make_cocostuff10k(folder)
        return [zipped(packed(folder, "images", "annotations", "imageLists"))]
    if layout == "ade20k":
        tiny_data.make_ade20k(folder)
        return [zipped(packed(folder, "images", "annotations", top="ADEChallengeData2016/"))]
    tiny_data.make_cocostuff164k(folder)
    parts = [("images", ["train2017"]), ("images", ["val2017"])]
    parts.append(("annotations", ["train2017", "val2017"]))
    return [zipped(packed(folder / where, *folders)) for where, folders in parts]


def settings(layout, root, **changes):
    return prepare_data.Settings(layout=layout, data_root=root, **changes)


@pytest.mark.parametrize("layout", ["cocostuff10k", "cocostuff164k", "ade20k"])
def test_a_published_archive_becomes_a_data_set(server, monkeypatch, tmp_path, layout, capsys):
    publish(monkeypatch, server, layout, published(layout, tmp_path / "made"))
    root = tmp_path / "new" / "root"
    prepare_data.main(settings(layout, root))
    for split in ("train", "val"):
        ours, made = (data.open_split(layout, place, split) for place in (root, tmp_path / "made"))
        assert_close(list(ours), list(made), rtol=0, atol=0)
    assert {path.name for path in root.iterdir() if path.is_dir()} <= {
        "images",
        "annotations",
        "imageLists",
    }
    printed = capsys.readouterr().out
    for content in server.files.values():
        assert f"not verified; --sha256 {hashlib.sha256(content).hexdigest()}" in printed
    count = data.DATA_SETS[layout].published["train"]
    assert f"train: 4 images, of {count} published\n" in printed

    server.asked.clear()
    for path in root.glob("*.zip"):
        path.unlink()  # no longer needed, as was printed
    prepare_data.main(settings(layout, root))
    assert server.asked == []


def test_a_tar_archive_that_is_there_already_is_used_and_kept(tmp_path):
    tiny_data.make_ade20k(tmp_path / "made")
    own = tmp_path / "mine.tgz"
    own.write_bytes(tarred(packed(tmp_path / "made", "images", "annotations")))
    pin = hashlib.sha256(own.read_bytes()).hexdigest()
    root = tmp_path / "root"
    prepare_data.main(settings("ade20k", root, archive=(own,), sha256=(pin.upper(),)))
    assert len(data.open_split("ade20k", root, "train")) == 4
    assert own.exists()


def test_an_archive_with_another_checksum_is_refused_and_removed(server, monkeypatch, tmp_path):
    contents = published("ade20k", tmp_path / "made")
    publish(monkeypatch, server, "ade20k", contents)
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=f"must have sha256 {'0' * 64}, got [0-9a-f]{{64}}"):
        prepare_data.main(settings("ade20k", root, sha256=("0" * 64,)))
    assert list(root.iterdir()) == []

    (known,) = archives_of("ade20k")
    sha1 = hashlib.sha1(contents[0]).hexdigest()
    for checksum in (f"sha1:{sha1[::-1]}", f"sha1:{sha1}"):
        set_archives(monkeypatch, "ade20k", [known._replace(checksum=checksum)])
        if checksum.endswith(sha1):
            prepare_data.main(settings("ade20k", root))
        else:
            with pytest.raises(ValueError, match="must have sha1"):
                prepare_data.main(settings("ade20k", root))
            assert list(root.iterdir()) == []


def zip_link():
    info = zipfile.ZipInfo("images/link")
    info.external_attr = 0o120777 << 16
    return info


def tar_info(kind, name="images/odd", link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def spoil(archive):
    """Overwrite the beginning of the first file's packed bytes with what no packer writes."""
    start = 30 + len("images/a.jpg")
    return archive[:start] + b"\xff" * 4 + archive[start + 4 :]


GOOD = [("images/a.jpg", b"a"), ("annotations/a.png", b"a")]
HOSTILE = {
    "zip upwards": lambda: zipped([*GOOD, ("../evil", b"")]),
    "zip hidden upwards": lambda: zipped([*GOOD, ("images/../../evil", b"")]),
    "zip absolute": lambda: zipped([*GOOD, ("/mvsc-evil", b"")]),
    "zip backslashes": lambda: zipped([*GOOD, ("..\\evil", b"")]),
    "zip drive": lambda: zipped([*GOOD, ("C:evil", b"")]),
    "zip link": lambda: zipped([*GOOD, (zip_link(), "/etc/passwd")]),
    "zip bomb": lambda: zipped([*GOOD, ("images/b.jpg", bytes(2**21))]),
    "zip of many": lambda: zipped([*GOOD, *((f"images/{i}.jpg", b"") for i in range(300))]),
    "tar upwards": lambda: tarred([*GOOD, ("../evil", b"")]),
    "tar absolute": lambda: tarred([*GOOD, ("/mvsc-evil", b"")]),
    "tar link": lambda: tarred([*GOOD, (tar_info(tarfile.SYMTYPE, link="/etc"), None)]),
    "tar link inside": lambda: tarred([*GOOD, (tar_info(tarfile.SYMTYPE, link="a.jpg"), None)]),
    "tar hard link": lambda: tarred([*GOOD, (tar_info(tarfile.LNKTYPE, link="/etc/passwd"), None)]),
    "tar device": lambda: tarred([*GOOD, (tar_info(tarfile.CHRTYPE), None)]),
    "tar pipe": lambda: tarred([*GOOD, (tar_info(tarfile.FIFOTYPE), None)]),
    "tar bomb": lambda: tarred([*GOOD, ("images/b.jpg", bytes(2**21))]),
    "no archive": lambda: CONTENT,
    "cut zip": lambda: zipped(GOOD)[:-30],
    "cut tar": lambda: tarred([("images/a.jpg", CONTENT)])[:-20_000],
    "broken zip": lambda: zipped([("images/a.jpg", CONTENT)]).replace(CONTENT[500:510], bytes(10)),
    "spoilt zip": lambda: spoil(zipped([("images/a.jpg", b"abc" * 9999)])),
    "other content": lambda: zipped([("labels/a.jpg", b"")]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_or_broken_archive_is_refused_and_leaves_nothing(
    server, monkeypatch, tmp_path, kind
):
    content = HOSTILE[kind]()
    publish(monkeypatch, server, "ade20k", [content])
    (archive,) = archives_of("ade20k")
    set_archives(monkeypatch, "ade20k", [archive._replace(limit=2**20)])
    root = tmp_path / "above" / "root"
    with pytest.raises(prepare_data.RefusedError, match=re.escape(str(root / "ADEChallenge"))):
        prepare_data.main(settings("ade20k", root))
    assert list(tmp_path.rglob("*")) == [root.parent, root]
    assert not Path("/mvsc-evil").exists()

    own = tmp_path / "own.zip"
    own.write_bytes(content)
    with pytest.raises(prepare_data.RefusedError):
        prepare_data.main(settings("ade20k", root, archive=(own,)))
    assert own.exists()  # the user's own file is not ours to remove
    assert list(root.iterdir()) == []


def test_a_harmless_archive_within_its_limit_is_unpacked(tmp_path):
    (archive,) = archives_of("ade20k")
    path = tmp_path / "a.zip"
    path.write_bytes(zipped(GOOD))
    prepare_data.install(path, archive._replace(limit=2**20), tmp_path)
    assert (tmp_path / "images" / "a.jpg").read_bytes() == b"a"


def test_a_full_disk_is_named_before_anything_is_written(server, monkeypatch, tmp_path):
    publish(monkeypatch, server, "ade20k", published("ade20k", tmp_path / "made"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="data_root must have .* GiB free"):
        prepare_data.main(settings("ade20k", tmp_path / "root"))
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["ADEChallengeData2016.zip"]


def interrupt_at(count):
    """A function that is interrupted when it is called for the ``count``-th time."""

    def wrap(function):
        def call(*args, **kwargs):
            nonlocal count
            count -= 1
            if count == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize(
    "what", ["zipfile.ZipFile.extract", "Path.rename", "urllib.request.urlopen"]
)
def test_an_interruption_leaves_nothing_half_and_the_next_run_completes_it(
    server, monkeypatch, tmp_path, capsys, what
):
    publish(monkeypatch, server, "ade20k", published("ade20k", tmp_path / "made"))
    root = tmp_path / "root"
    monkeypatch.setattr(prepare_data.tyro, "cli", lambda _: settings("ade20k", root))
    owner, _, name = f"prepare_data.{what}".rpartition(".")
    with monkeypatch.context() as patch:
        count = 1 if "urlopen" in what else 2
        target = getattr(importlib.import_module("pkgutil").resolve_name(owner), name)
        patch.setattr(f"{owner}.{name}", interrupt_at(count)(target))
        with pytest.raises(SystemExit) as stopped:
            prepare_data.command_line()
    assert stopped.value.code == 130
    assert "Interrupted; run the same command again" in capsys.readouterr().err
    assert not (root / ".unpacking").exists()
    assert not (root / "annotations").exists()
    with pytest.raises(SystemExit) as done:
        prepare_data.command_line()
    assert done.value.code == 0
    assert len(data.open_split("ade20k", root, "val")) == 2
    assert not (root / ".unpacking").exists()


def test_what_a_killed_run_left_is_removed(server, monkeypatch, tmp_path):
    publish(monkeypatch, server, "ade20k", published("ade20k", tmp_path / "made"))
    old = tmp_path / "root" / ".unpacking" / "images" / "training" / "half.jpg"
    old.parent.mkdir(parents=True)
    old.touch()
    prepare_data.main(settings("ade20k", tmp_path / "root"))
    assert len(data.open_split("ade20k", tmp_path / "root", "train")) == 4
    assert not list((tmp_path / "root").rglob("half.jpg"))


def test_the_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="has nothing to download. Use --check"):
        prepare_data.main(settings("folder", tmp_path))
    with pytest.raises(ValueError, match=r"sha256 must .* ADEChallengeData2016\.zip, got 2"):
        prepare_data.main(settings("ade20k", tmp_path, sha256=("a", "b")))
    with pytest.raises(ValueError, match=r"archive must be .* got .*nothing\.zip"):
        prepare_data.main(settings("ade20k", tmp_path, archive=(tmp_path / "nothing.zip",)))
    own = tmp_path / "other.zip"
    own.touch()
    with pytest.raises(ValueError, match=r"called train2017\.zip or .* got .*other\.zip"):
        prepare_data.main(settings("cocostuff164k", tmp_path, archive=(own,)))


def test_a_check_prints_problems_and_frequencies_and_exits_with_1(tmp_path, monkeypatch, capsys):
    root = tiny_data.make_folder(tmp_path)
    monkeypatch.setattr(prepare_data.tyro, "cli", lambda _: settings("folder", root, check=True))
    with pytest.raises(SystemExit) as done:
        prepare_data.command_line()
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["train: 4 images", "val: 2 images"]
    assert lines[-1] == "0 problems"
    _, pixels, images, _ = data.check(data.open_split("folder", root, "train"))
    line = next(line for line in lines if "ignored" in line)
    assert line.split()[:5] == [
        "255",
        "ignored",
        f"{100 * pixels[255] / pixels.sum():.3f}",
        "%",
        str(images[255]),
    ]

    wrong, missing = (data.open_split("folder", root, "val").pairs[i][1] for i in (0, 1))
    Image.fromarray(np.full((40, 56), 9, np.uint8)).save(wrong)
    with pytest.raises(SystemExit):
        prepare_data.command_line()
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem"
    missing.unlink()
    with pytest.raises(SystemExit) as done:
        prepare_data.command_line()
    assert done.value.code == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "2 problems"
    assert f"{wrong} must hold the numbers 0 .. 2" in printed
    assert f"{missing} is missing" in printed


def test_a_check_of_nothing_is_a_problem_in_both_splits(tmp_path, capsys):
    assert prepare_data.main(settings("ade20k", tmp_path, check=True)) == 2
    assert "images/validation must list or hold images" in capsys.readouterr().out


def test_an_error_is_printed_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data.tyro, "cli", lambda _: settings("folder", tmp_path))
    with pytest.raises(SystemExit) as done:
        prepare_data.command_line()
    assert done.value.code == 1
    assert capsys.readouterr().err.startswith('layout "folder" has nothing to download')

"""Downloads: resumed, whole or not at all, many at once, and everything that servers do wrong."""

import errno
import hashlib
import io
import os
import shutil
import urllib.request
import zipfile
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src import data, download
from src.download import DataError, DownloadError

CONTENT = np.random.default_rng(1).bytes(700_000)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waits between attempts, and no proxy between the test and its server."""
    monkeypatch.setattr(download, "WAITS", (0, 0))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def big(mirror) -> str:
    """The address of a file of `CONTENT`."""
    mirror.files["big"] = CONTENT
    return mirror.url + "/big"


def ranges(mirror) -> list:
    """What was asked of the server after the first look whether it answers."""
    return [asked for _, asked in mirror.asked[1:]]


# --- one file ------------------------------------------------------------------------------------
def test_goes_on_after_lost_connections(mirror, big, tmp_path):
    mirror.faults["big"] = ["", "cut", "cut"]
    download.download(big, tmp_path / "d" / "big", md5(CONTENT))
    assert (tmp_path / "d" / "big").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["big"]
    assert ranges(mirror) == [None, "bytes=350000-", "bytes=525000-"]


def test_a_failed_download_keeps_the_part_and_the_next_run_resumes(mirror, big, tmp_path):
    mirror.faults["big"], target = ["", "cut", "503", "503"], tmp_path / "big"
    with pytest.raises(DownloadError, match="Service Unavailable.*run again to go on"):
        download.download(big, target)
    assert not target.exists() and (tmp_path / "big.part").read_bytes() == CONTENT[:350000]
    download.download(big, target, md5(CONTENT))
    assert target.read_bytes() == CONTENT and ranges(mirror)[-1] == "bytes=350000-"


def test_a_connection_that_is_always_cut(mirror, big, tmp_path):
    mirror.faults[""] = ["cut", "no ranges"]
    with pytest.raises(DownloadError, match="connection lost after 350000 of 700000 bytes"):
        download.download(big, tmp_path / "big")


def test_server_without_resume_and_part_that_is_too_long(mirror, big, tmp_path):
    target = tmp_path / "big"
    (tmp_path / "big.part").write_bytes(CONTENT + b"more")
    download.download(big, target, md5(CONTENT))  # 416, then from the start
    mirror.faults[""] = ["no ranges"]
    (tmp_path / "big.part").write_bytes(b"other")
    download.download(big, target, md5(CONTENT))
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("fault", ["no length", "bad length"])
def test_a_length_that_is_missing_or_no_number(mirror, big, tmp_path, fault):
    mirror.faults[""] = [fault]
    download.download(big, tmp_path / "big", md5(CONTENT))
    assert (tmp_path / "big").read_bytes() == CONTENT


def test_a_server_may_take_its_time_and_is_never_asked_for_a_head(big, tmp_path, monkeypatch):
    """One that answers after 15 seconds, and to GET only."""
    asked = []

    def slow(request, timeout, answer=urllib.request.urlopen):
        asked.append(getattr(request, "get_method", lambda: "GET")())
        if timeout < 15:
            raise TimeoutError("timed out")
        return answer(request, timeout=timeout)

    def result(future, timeout=None, wait=futures.Future.result):
        if timeout is not None and timeout < 15:
            raise futures.TimeoutError
        return wait(future, timeout)

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    monkeypatch.setattr(futures.Future, "result", result)
    download.download(big, tmp_path / "big", md5(CONTENT))
    assert asked == ["GET", "GET"]


def test_a_loop_of_redirections_and_packed_content_are_no_file(mirror, big, tmp_path):
    mirror.faults[""] = ["loop"]
    with pytest.raises(DownloadError, match="infinite loop") as error:
        download.download(big, tmp_path / "big")
    assert "\n" not in str(error.value)
    mirror.faults[""] = ["packed"]
    with pytest.raises(DataError, match="wrong checksum .* and was removed"):
        download.download(big, tmp_path / "big", md5(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_final_and_an_overload_is_not(mirror, big, tmp_path):
    mirror.faults["big"] = ["", "503", "429"]
    download.download(big, tmp_path / "big")
    assert len(mirror.asked) == 4
    mirror.faults[""] = ["403"]
    with pytest.raises(DownloadError, match="Forbidden"):
        download.download(big, tmp_path / "other")
    assert len(mirror.asked) == 6


def test_a_web_page_instead_of_the_file(mirror, big, tmp_path):
    mirror.faults[""] = ["page"]
    with pytest.raises(DownloadError, match="a web page came instead.*log-in"):
        download.download(big, tmp_path / "big")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file", "nowhere/file", "http://[::1/file"])
def test_an_address_that_does_not_answer(url, tmp_path):
    with pytest.raises(DownloadError, match="cannot be reached"):
        download.download(url, tmp_path / "file")


def test_wrong_checksum_leaves_no_file_and_keeps_the_old_one(big, tmp_path):
    (tmp_path / "old").write_text("mine")
    for name in ("new", "old"):
        with pytest.raises(DataError, match="wrong checksum .* and was removed: run again"):
            download.download(big, tmp_path / name, md5(b"else"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["old"]
    assert (tmp_path / "old").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(big, tmp_path):
    (tmp_path / "big.part").symlink_to("/dev/full")
    message = "cannot write .*No space left.*: free space .*HW3_DATA.*HW3_PROFILE=demo"
    with pytest.raises(DataError, match=message):
        download.download(big, tmp_path / "big")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("big")]


def test_disk_that_is_too_small_is_noticed_before_writing(mirror, big, tmp_path, monkeypatch):
    mirror.files["big"] = CONTENT * 3
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match="2 MB more are needed"):
        download.download(big, tmp_path / "big")
    assert not (tmp_path / "big.part").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_folder(big, tmp_path, monkeypatch, number):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match="cannot write .*make the folder writable, point HW3_DATA"):
        download.download(big, tmp_path / "big")


# --- many files ----------------------------------------------------------------------------------
def photo() -> bytes:
    buffer, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def many(mirror, tmp_path) -> dict[Path, str]:
    """100 photos: where they are stored, and their addresses."""
    mirror.files |= {f"{i}.jpg": photo() for i in range(100)}
    return {tmp_path / "photos" / name: f"{mirror.url}/{name}" for name in mirror.files}


def test_many_files_are_fetched_once_and_whole(mirror, many):
    assert download.download_many(many, "photos", data.read_image) == []
    assert all(path.read_bytes() == photo() for path in many)
    assert len(list(next(iter(many)).parent.iterdir())) == 100
    assert len(mirror.asked) == 101  # one look whether the server answers
    assert download.download_many(many, "photos", data.read_image) == []
    assert len(mirror.asked) == 101


def test_what_another_process_is_fetching_is_left_alone(many):
    first = next(iter(many))
    first.parent.mkdir()
    part = first.with_name(first.name + ".1.part")
    part.write_bytes(photo()[:100])
    assert download.download_many(many, "photos", data.read_image) == []
    assert first.read_bytes() == photo() and part.read_bytes() == photo()[:100]


def test_faults_that_pass_cost_no_file(mirror, many):
    for i, fault in enumerate(["cut", "503", "page", "disguised page", "no length", "bad length"]):
        mirror.faults[f"{i + 1}.jpg"] = [fault]
    mirror.faults["7.jpg"] = ["cut", "cut"]
    assert download.download_many(many, "photos", data.read_image) == []
    assert all(path.read_bytes() == photo() for path in many)


def test_a_cut_without_a_length_is_noticed(mirror, many):
    mirror.faults[""] = ["no length", "cut"]
    with pytest.raises(DownloadError, match="did not arrive whole"):
        download.download_many(many, "photos", data.read_image)
    assert not [path for path in many if path.exists()]


@pytest.mark.parametrize("fault", ["403", "disguised page"])
def test_a_few_files_may_fail_and_are_asked_for_again(mirror, many, fault):
    for i in range(1, 6):
        mirror.faults[f"{i}.jpg"] = [fault] * 3
    failed = download.download_many(many, "photos", data.read_image)
    assert sorted(path.name for path in failed) == [f"{i}.jpg" for i in range(1, 6)]
    assert not [path for path in failed if path.exists()]
    mirror.faults.clear()
    assert download.download_many(many, "photos", data.read_image) == []


def test_more_than_a_few_end_the_download_early_and_the_next_run_goes_on(mirror, many):
    message = "6 of 100 files cannot be had.*run again to go on"
    del mirror.files["1.jpg"]
    for i in range(10, 100):
        mirror.faults[f"{i}.jpg"] = ["403"] * 3
    with pytest.raises(DownloadError, match=message):
        download.download_many(many, "photos", data.read_image)
    assert len(mirror.asked) < 60
    mirror.faults.clear()
    before, present = len(mirror.asked), sum(path.exists() for path in many)
    assert [path.name for path in download.download_many(many, "photos", data.read_image)] == [
        "1.jpg"
    ]
    assert len(mirror.asked) == before + 1 + 100 - present


def test_many_files_without_a_server(mirror, many):
    download.download_many(many, "photos", data.read_image)
    first, *others = many
    first.unlink()
    mirror.shutdown()
    mirror.server_close()
    assert download.download_many(many, "photos", data.read_image) == [first]
    for path in others:
        path.unlink()
    with pytest.raises(DownloadError, match="cannot be reached"):
        download.download_many(many, "photos", data.read_image)


def test_many_files_on_a_full_disk(many, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(DataError, match="cannot write .*No space left"):
        download.download_many(many, "photos", data.read_image)


# --- archives ------------------------------------------------------------------------------------
def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name in names:
            bundle.writestr(name, photo())
    return buffer.getvalue()


def everything(name: str) -> bool:
    return True


def test_an_archive_never_unpacks_outside_its_folder(mirror, tmp_path):
    mirror.files["evil.zip"] = archive("../../outside.jpg", "/absolute.jpg")
    download.download_zip(f"{mirror.url}/evil.zip", tmp_path / "deep" / "folder", everything)
    places = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*.jpg")}
    assert places == {("deep", "folder")}


def test_an_interrupted_unpacking_keeps_the_archive_and_nothing_half_done(
    mirror, tmp_path, monkeypatch
):
    mirror.files["photos.zip"], target = archive("a/1.jpg", "a/2.jpg"), tmp_path / "p"

    def interrupt(bundle, name, folder, extract=zipfile.ZipFile.extract):
        if name == "a/2.jpg":
            raise KeyboardInterrupt
        extract(bundle, name, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extract", interrupt)
        download.download_zip(f"{mirror.url}/photos.zip", target, everything)
    assert [path.name for path in target.iterdir()] == ["photos.zip"]
    mirror.files.clear()
    download.download_zip(f"{mirror.url}/photos.zip", target, everything)
    assert sorted(path.name for path in target.rglob("*")) == ["1.jpg", "2.jpg", "a"]


@pytest.mark.parametrize("content", ["page", "other names", "damaged"])
def test_what_is_not_the_archive_is_removed(mirror, tmp_path, content):
    mirror.files["photos.zip"] = archive("a/1.jpg")
    if content == "page":
        mirror.faults["photos.zip"] = ["", "disguised page"]
    if content == "damaged":
        damaged = bytearray(mirror.files["photos.zip"])
        damaged[300] ^= 0xFF
        mirror.files["photos.zip"] = bytes(damaged)
    with pytest.raises(DataError, match="photos.zip arrived damaged .* and was removed: run again"):
        download.download_zip(
            f"{mirror.url}/photos.zip", tmp_path, lambda name: content != "other names"
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

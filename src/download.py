"""Fetch files from the network: whole or not at all, resumed, and many at once."""

import contextlib
import errno
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from urllib.parse import urlsplit

from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from src import ProjectError

CONNECTIONS = 16  # of `download_many`
WAITS = (1, 4)  # seconds before the second and the third attempt
TOLERATED = 0.05  # share of many files that may fail
_TIMEOUT = 20  # seconds without a byte before a download counts as broken
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}
_NETWORK_ERRORS = (OSError, http.client.HTTPException, futures.TimeoutError)
_TRY_AGAIN = {408, 416, 425, 429}  # of the client errors; all others are final


class DataError(ProjectError):
    """Data that are missing, damaged or cannot be stored; the message says what to do."""


class DownloadError(DataError):
    """The network failed; what has arrived is kept for the next try."""


def mirrored(url: str, mirror: str | None) -> str:
    """The same path below the base address `mirror`, if there is one."""
    return mirror.rstrip("/") + urlsplit(url).path if mirror else url


@contextlib.contextmanager
def storing(target: Path, *unfinished: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one DataError; remove the unfinished files."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        for path in unfinished:
            with contextlib.suppress(OSError):
                path.unlink()
        raise DataError(
            f"cannot write {target} ({error.strerror}): free space or make the folder writable, "
            "point HW3_DATA at data elsewhere, or set HW3_PROFILE=demo to go on without a download"
        ) from error


def download(url: str, target: Path, md5: str | None = None) -> None:
    """Fetch `url` into `target` through `target`.part, going on where an earlier try stopped.

    Raises:
        DownloadError: the network failed several times; the part is kept.
        DataError: wrong checksum, full disk or unwritable folder; no file is left.
    """
    _check_reachable(url)
    _download(url, target, md5=md5)


def download_many(
    files: dict[Path, str], title: str, check: Callable[[Path], object]
) -> list[Path]:
    """Fetch those of the files (target: url) that are missing, several at once under one bar.

    Args:
        files: where each address is stored.
        title: of the bar.
        check: raises a DataError for a file that did not arrive whole.

    Returns:
        The targets that could not be had, at most a share of `TOLERATED`.

    Raises:
        DownloadError: more of them failed; what has arrived is kept.
        DataError: full disk or unwritable folder.
    """
    missing = {target: url for target, url in files.items() if not os.path.isfile(target)}
    if not missing:
        return []
    allowed = TOLERATED * len(files)
    try:
        _check_reachable(next(iter(missing.values())))
    except DownloadError:
        if len(missing) > allowed:
            raise
        return list(missing)
    failed = []
    with (
        futures.ThreadPoolExecutor(CONNECTIONS) as pool,
        tqdm(total=len(missing), desc=title, unit="file") as bar,
    ):
        jobs = {
            pool.submit(_download, url, path, check=check): path for path, url in missing.items()
        }
        try:
            for job in futures.as_completed(jobs):
                try:
                    job.result()
                except DownloadError as error:
                    failed.append(jobs[job])
                    if len(failed) > allowed:
                        raise DownloadError(
                            f"{len(failed)} of {len(files)} files cannot be had, such as: {error}; "
                            "what has arrived is kept: run again to go on"
                        ) from error
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _check_reachable(url: str) -> None:
    """Raise DownloadError unless something answers."""
    # in a thread, as looking up a name has no time limit of its own
    pool = futures.ThreadPoolExecutor(1)
    try:
        pool.submit(lambda: urllib.request.urlopen(url, timeout=_TIMEOUT).close()).result(_TIMEOUT)
    except urllib.error.HTTPError:
        pass  # an answer: what it means is for the download to say
    except (*_NETWORK_ERRORS, ValueError) as error:  # ValueError: it is not an address
        raise DownloadError(f"{url} cannot be reached ({str(error) or 'no answer'})") from error
    finally:
        pool.shutdown(wait=False)


def _download(
    url: str,
    target: Path,
    md5: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    # small files of their own for every process, as two notebooks may fetch the same photos
    ending = f".{os.getpid()}.part" if check else ".part"
    part = target.with_name(target.name + ending)
    with storing(target, part):
        target.parent.mkdir(parents=True, exist_ok=True)
        for wait in (*WAITS, None):
            try:
                _fetch_rest(url, part)
                if check:
                    _check_part(part, check)
                break
            except _NETWORK_ERRORS as error:
                if getattr(error, "errno", None) in _DISK_ERRORS:
                    raise
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if wait is None or (final and error.code not in _TRY_AGAIN):
                    kept = "; the part that arrived is kept, run again to go on"
                    reason = " ".join(str(error).split())  # that of a loop has several lines
                    raise DownloadError(
                        f"download of {url} failed ({reason}){kept * part.exists()}"
                    ) from error
                time.sleep(wait)
        if md5 and not check_integrity(part, md5):
            part.unlink()
            raise DataError(
                f"{url} arrived with a wrong checksum (MD5 is not {md5}) and was removed: run "
                "again, or set HW3_PROFILE=demo to go on without a download"
            )
        os.replace(part, target)


def _check_part(part: Path, check: Callable[[Path], object]) -> None:
    try:
        check(part)
    except DataError as error:
        part.unlink()
        raise ConnectionError("it did not arrive whole") from error


def _fetch_rest(url: str, part: Path) -> None:
    """Append to `part` what is missing of `url`; start over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond `have`: the next attempt starts over
            part.unlink()
        raise
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ConnectionError(
                "a web page came instead: does this network ask for a log-in? HW3_MIRROR names "
                "another address"
            )
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length", "")
        missing = int(length) if length.isdecimal() else 0  # 0: not known
        if missing > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, f"{missing / 1e6:.0f} MB more are needed")
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=have + missing,
                initial=have,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=missing < 5e6,
            ) as bar,
        ):
            while chunk := response.read(1 << 18):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size < have + missing:
        raise ConnectionError(
            f"connection lost after {part.stat().st_size} of {have + missing} bytes"
        )


def download_zip(url: str, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Fetch an archive and unpack the `wanted` names; none lands in `folder` before all are whole.

    Raises:
        DownloadError: the network failed; the part is kept.
        DataError: the archive is damaged (it is removed), or the disk is full or unwritable.
    """
    archive = folder / url.rpartition("/")[2]
    if not archive.is_file():  # an unpacking that was interrupted goes on with the archive it had
        download(url, archive)
    unpacked = folder / f"{archive.stem}.part"
    try:
        with storing(folder), zipfile.ZipFile(archive) as bundle:
            names = [name for name in bundle.namelist() if wanted(name)]
            if not names:
                raise zipfile.BadZipFile("none of the files is in it")
            for name in tqdm(names, desc=f"unpacking {archive.name}", disable=len(names) < 100):
                bundle.extract(name, unpacked)  # never outside; reading to the end checks the CRC
            for path in [path for path in unpacked.rglob("*") if path.is_file()]:
                target = folder / path.relative_to(unpacked)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise DataError(f"{url} arrived damaged ({error}) and was removed: run again") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()

"""Downloads the published datasets, checks them, and unpacks them where ``datasets.load`` looks."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pooch
from tqdm import tqdm

from experiments.datasets import PUBLISHED, PublishedName, load, locate


class Source(NamedTuple):
    """A file to download; ``checksum`` is "algorithm:hexadecimal digest"."""

    url: str
    checksum: str


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"

SOURCES: dict[PublishedName, tuple[Source, ...]] = {
    "mnist": (
        Source(
            f"{_MNIST}/train-images-idx3-ubyte.gz",
            "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Source(
            f"{_MNIST}/train-labels-idx1-ubyte.gz",
            "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Source(
            f"{_MNIST}/t10k-images-idx3-ubyte.gz",
            "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Source(
            f"{_MNIST}/t10k-labels-idx1-ubyte.gz",
            "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "cifar10": (
        Source("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530"),
    ),
    "tiny-imagenet": (
        Source("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de"),
    ),
}


def fetch(dataset: PublishedName, data_root: Path) -> Path:
    """The folder of the dataset, downloaded unless ``load`` can read it there already.

    A file put by hand where it would be downloaded to is used if its checksum is right. A damaged dataset is replaced
    as a whole, once the new one is complete.

    Raises OSError if a download fails, ValueError if a file has another checksum or an archive reaches out of its
    folder; what was there before is then untouched.
    """
    folder = locate(dataset, data_root)
    if folder is not None:
        try:
            load(dataset, data_root)
        except ValueError as error:
            print(f"{error}: fetching it again")
        else:
            print(f"{dataset} is complete in {folder}, nothing was downloaded")
            return folder
    target = data_root / PUBLISHED[dataset].places[0]
    if dataset == "mnist":
        for source in SOURCES[dataset]:
            _download(source, target)
    else:
        _unpack(_download(SOURCES[dataset][0], data_root), target)
    print(f"{dataset} is in {target}")
    return target


def _download(source: Source, folder: Path) -> Path:
    """The downloaded file in ``folder``, or the one there if its checksum is right."""
    name = source.url.rpartition("/")[2]
    by_hand = f"put the file by hand at {folder / name} ({source.checksum}) and repeat the command"
    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16)
    try:
        return Path(pooch.retrieve(source.url, source.checksum, name, folder, downloader=downloader))
    except OSError as error:
        raise OSError(f"{source.url} could not be downloaded ({error}): {by_hand}") from error
    except ValueError as error:
        raise ValueError(f"{source.url} is not the file it should be ({error}): try again, or {by_hand}") from error


def _unpack(archive: Path, target: Path) -> None:
    """Replaces ``target`` by the folder of its name in the archive.

    Raises ValueError if the archive is damaged, lacks that folder, or has members outside its own folder.
    """
    with TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
        unpacked = Path(temporary, "unpacked")
        try:
            _extract(archive, unpacked)
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise ValueError(f"{archive} cannot be unpacked ({error}): remove it and repeat the command") from error
        new = unpacked / target.name
        if not new.is_dir():
            raise ValueError(f"{archive} has no folder {target.name}: remove it and repeat the command")
        if target.exists():
            target.rename(Path(temporary, "old"))
        new.rename(target)


def _extract(archive: Path, folder: Path) -> None:
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return
    with zipfile.ZipFile(archive) as file:
        for member in tqdm(file.infolist(), desc="unpacking", unit=" files", delay=2):
            if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
                raise zipfile.BadZipFile(f"{member.filename!r} would be outside the folder")
            file.extract(member, folder)

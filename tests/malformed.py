"""A catalogue of files that go wrong in real life; every command is tested with it.

Each entry writes one file, or something in a file's place, where a 3-D scan or a label map of `SHAPE` should be.
"""

from __future__ import annotations

import bz2
import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (12, 10, 8)
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])
Write = Callable[[Path], object]


def sound(seed: int = 0) -> np.ndarray:
    """Voxels of a good scan."""
    return np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)


def nifti(array: np.ndarray, affine: np.ndarray = AFFINE, kind: type = nibabel.Nifti1Image) -> bytes:
    image = kind(array, affine, dtype=array.dtype)
    return bytes(image.to_bytes())


def header(offset: int, format_: str, *values: float) -> Write:
    """A good scan whose header holds other values at an offset."""

    def write(path: Path) -> None:
        content = bytearray(nifti(sound()))
        struct.pack_into("<" + format_, content, offset, *values)
        packed(path, bytes(content))

    return write


def packed(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, 1) if path.name.lower().endswith(".gz") else content)


def voxels(array: np.ndarray) -> Write:
    return lambda path: packed(path, nifti(array))


def raw(change: Callable[[bytes], bytes]) -> Write:
    """A good scan, packed as its name says, whose bytes are then changed."""

    def write(path: Path) -> None:
        packed(path, nifti(sound()))
        path.write_bytes(change(path.read_bytes()))

    return write


def put(array: np.ndarray, value: float) -> np.ndarray:
    array[3, 4, 5] = value
    return array


def flipped(content: bytes) -> bytes:
    stored = bytearray(gzip.compress(gzip.decompress(content), 0))
    stored[-40] ^= 4
    return bytes(stored)


def middle_lost(content: bytes) -> bytes:
    third = len(content) // 3
    return content[:third] + content[2 * third :]


def colours(path: Path) -> None:
    packed(path, nifti(np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])))


def looped(path: Path) -> None:
    path.symlink_to(path.name)


RANK = 40  # offsets in a NIfTI-1 header
KIND, BITS = 70, 72
PIXDIM, VOX_OFFSET, SLOPE = 76, 108, 112
SROW, MAGIC, CODES, UNITS = 280, 344, 252, 123

# Wrong as a scan and as a label map.
BROKEN: dict[str, tuple[str, Write]] = {
    "empty": (".nii.gz", lambda p: p.touch()),
    "empty_plain": (".nii", lambda p: p.touch()),
    "one_byte": (".nii.gz", lambda p: p.write_bytes(b"\x1f")),
    "gzip_header_alone": (".nii.gz", lambda p: p.write_bytes(gzip.compress(b"")[:10])),
    "gzip_of_nothing": (".nii.gz", lambda p: p.write_bytes(gzip.compress(b""))),
    "gzip_of_text": (".nii.gz", lambda p: p.write_bytes(gzip.compress(b"no scan" * 100))),
    "gzip_twice": (".nii.gz", lambda p: p.write_bytes(gzip.compress(gzip.compress(nifti(sound()))))),
    "text": (".nii.gz", lambda p: p.write_text("<html>404 Not Found</html>" * 20)),
    "text_plain": (".nii", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n" * 12)),
    "zeros": (".nii", lambda p: p.write_bytes(bytes(4000))),
    "noise": (".nii", lambda p: p.write_bytes(np.random.default_rng(0).bytes(4000))),
    "zlib": (".nii.gz", lambda p: p.write_bytes(zlib.compress(nifti(sound())))),
    "bzip2": (".nii.gz", lambda p: p.write_bytes(bz2.compress(nifti(sound())))),
    "zip_archive": (".nii.gz", lambda p: p.write_bytes(b"PK\x03\x04" + bytes(500))),
    "not_packed": (".nii.gz", lambda p: p.write_bytes(nifti(sound()))),
    "packed_but_not_called_so": (".nii", lambda p: p.write_bytes(gzip.compress(nifti(sound())))),
    "cut": (".nii.gz", raw(lambda c: c[: len(c) // 2])),
    "cut_in_the_header": (".nii.gz", raw(lambda c: c[:60])),
    "cut_by_a_byte": (".nii.gz", raw(lambda c: c[:-1])),
    "checksum_lost": (".nii.gz", raw(lambda c: c[:-8])),
    "bit_flipped": (".nii.gz", raw(flipped)),
    "middle_lost": (".nii.gz", raw(middle_lost)),
    "rubbish_behind": (".nii.gz", raw(lambda c: c + b"rubbish" * 9)),
    "cut_plain": (".nii", raw(lambda c: c[: len(c) // 2])),
    "cut_plain_in_the_header": (".nii", raw(lambda c: c[:200])),
    "header_alone": (".nii", raw(lambda c: c[:352])),
    "no_magic": (".nii.gz", header(MAGIC, "4s", b"abcd")),
    "rank_zero": (".nii.gz", header(RANK, "h", 0)),
    "rank_nine": (".nii.gz", header(RANK, "h", 9)),
    "negative_size": (".nii.gz", header(RANK + 2, "h", -12)),
    "size_zero": (".nii.gz", header(RANK + 4, "h", 0)),
    "larger_than_the_file": (".nii.gz", header(RANK + 2, "3h", 200, 200, 200)),
    "larger_than_memory": (".nii.gz", header(RANK, "8h", 4, 32767, 32767, 32767, 99, 1, 1, 1)),
    "unknown_type": (".nii.gz", header(KIND, "h", 4242)),
    "type_of_nothing": (".nii.gz", header(KIND, "2h", 0, 0)),
    "offset_behind_the_end": (".nii.gz", header(VOX_OFFSET, "f", 1e8)),
    "offset_negative": (".nii.gz", header(VOX_OFFSET, "f", -352.0)),
    "intercept_is_nan": (".nii.gz", header(SLOPE, "2f", 2.0, np.nan)),
    "affine_of_zeros": (".nii.gz", header(SROW, "12f", *[0.0] * 12)),
    "affine_of_nan": (".nii.gz", header(SROW, "f", np.nan)),
    "affine_of_inf": (".nii.gz", header(SROW + 12, "f", np.inf)),
    "affine_flat": (".nii.gz", header(SROW, "12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)),
    "two_d": (".nii.gz", voxels(sound()[:, :, 0])),
    "one_d": (".nii.gz", voxels(sound()[:, 0, 0])),
    "four_d": (".nii.gz", voxels(np.stack([sound(i) for i in range(3)], -1))),
    "five_d": (".nii.gz", voxels(np.ones((*SHAPE, 2, 3), np.float32))),
    "vector": (".nii.gz", voxels(np.ones((*SHAPE, 1, 3), np.float32))),
    "nan": (".nii.gz", voxels(put(sound(), np.nan))),
    "inf": (".nii.gz", voxels(put(sound(), -np.inf))),
    "all_nan": (".nii.gz", voxels(np.full(SHAPE, np.nan, np.float32))),
    "colours": (".nii.gz", colours),
    "complex": (".nii.gz", voxels(sound().astype(np.complex64))),
    "folder": (".nii.gz", lambda p: p.mkdir()),
    "link_to_nowhere": (".nii.gz", lambda p: p.symlink_to("gone.nii.gz")),
    "link_to_itself": (".nii.gz", looped),
    "pipe": (".nii.gz", os.mkfifo),
    "analyze": (".nii", lambda p: p.write_bytes(_analyze())),
}


def _analyze() -> bytes:
    """The header of an Analyze image, with its voxels behind."""
    head = nibabel.AnalyzeHeader()
    head.set_data_shape(SHAPE)
    head.set_data_dtype(np.float32)
    return bytes(head.binaryblock) + sound().tobytes()

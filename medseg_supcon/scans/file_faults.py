"""Why a path, or a NIfTI file, cannot be read, as a sentence for the person who has it."""

from __future__ import annotations

import math
import os
import stat
import struct
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"
MOST_PACKED = 1032  # bytes that deflate can make of one
MOST_BEFORE = 2**26  # bytes of header and extensions before the voxels
MOST_BEHIND = 2**20  # bytes that may follow the voxels: some programs pad
NIFTI = tuple(
    struct.pack(order + "i", size) for size in (348, 540) for order in "<>"
)  # a header's first bytes


def not_a_file(path: Path) -> str | None:
    """A sentence if there is nothing to read at `path`, or nothing that ends; None for a plain file.

    Example:
        >>> from pathlib import Path
        >>> from medseg_supcon.scans import not_a_file
        >>> not_a_file(Path("/nowhere/scan.nii.gz"))
        '/nowhere/scan.nii.gz: there is no such file or folder. Check the path.'
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"{path}: is a link to a file that does not exist. Correct the link."
        return f"{path}: there is no such file or folder. Check the path."
    except PermissionError:
        return f"{path}: there is no permission to look into its folder. Check its permissions."
    except (OSError, ValueError) as error:  # a name too long, links in a circle
        return f"{path}: cannot be reached ({getattr(error, 'strerror', None) or error}). Check the path."
    if stat.S_ISDIR(mode):
        return f"{path}: is a folder, expected a file. Give the files in it."
    if not stat.S_ISREG(mode):
        return f"{path}: is a pipe or device, expected a file. Save it as a file."
    return None


def wrong_size(path: Path, image: Any) -> str | None:
    """A sentence if a NIfTI header announces more voxels than its file can hold, or far fewer than it holds."""
    size, packed = path.stat().st_size, path.name.lower().endswith(".gz")
    offset = int(image.dataobj.offset)
    bytes_ = image.dataobj.dtype.itemsize * math.prod(int(n) for n in image.shape)
    if offset > MOST_BEFORE or bytes_ > size * (MOST_PACKED if packed else 1):
        return (
            f"{path}: cannot be read as NIfTI (its header announces {bytes_:,} bytes of voxels after byte {offset:,}, "
            f"the file has {size:,} bytes). It is damaged or cut short: copy or export it again."
        )
    most = (offset + bytes_) * (1.01 if packed else 1) + MOST_BEHIND  # deflate adds less than 1 % to noise
    return too_long(path) if size > most else None


def too_long(path: Path) -> str:
    """The sentence for a NIfTI file that goes on long after the last voxel that its header announces."""
    return (
        f"{path}: cannot be read as NIfTI (the file goes on for more than {MOST_BEHIND:,} bytes after the voxels that "
        "its header announces). Its header is wrong, or it is damaged: export it again."
    )


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for a NIfTI file at `path` that raised `error` when it was read."""
    if (sentence := not_a_file(path)) is not None:
        return sentence
    if isinstance(error, PermissionError) or not os.access(path, os.R_OK):  # nibabel hides the one in its own
        return f"{path}: there is no permission to read it. Ask its owner, or run: chmod u+r {path.name}"
    start = _first_bytes(path)
    packed = path.name.lower().endswith(".gz")
    if start == b"":
        return f"{path}: the file is empty (0 bytes). Copy or export it again."
    if packed and start in NIFTI:
        return f"{path}: is called .gz, but is not compressed. Rename it to .nii."
    if not packed and start is not None and start.startswith(GZIP):
        return f"{path}: is compressed, but is not called .gz. Rename it to .nii.gz."
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return f"{path}: cannot be read as NIfTI ({reason}). It is damaged or cut short: copy or export it again."


def _first_bytes(path: Path) -> bytes | None:
    try:
        with path.open("rb") as stream:
            return stream.read(4)
    except OSError:
        return None

"""Headers that ITK and nibabel take for something else without a word."""

import struct
import zlib

import nibabel
import numpy as np
import pytest

from medseg_supcon.errors import DataError
from medseg_supcon.scans import Scan, read_scan

VOXELS = np.arange(8 * 9 * 10, dtype="<i2")
HEADER = {
    "NDims": "3",
    "BinaryData": "True",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "0 0 0",
    "ElementSpacing": "1 2 3",
    "DimSize": "8 9 10",
    "ElementType": "MET_SHORT",
}


def write_mha(path, data, **changes):
    lines = [f"{key} = {value}\n" for key, value in (HEADER | changes | {"ElementDataFile": "LOCAL"}).items()]
    path.write_bytes("".join(lines).encode() + data)
    return path


PACKED = zlib.compress(np.random.default_rng(0).bytes(VOXELS.nbytes))
WRONG = PACKED[:700] + bytes([PACKED[700] ^ 0xFF]) + PACKED[701:]


@pytest.mark.parametrize(
    ("data", "changes", "sentence"),
    [
        (VOXELS.tobytes(), {}, None),
        (VOXELS.tobytes(), {"TransformMatrix": "2 0 0 0 2 0 0 0 2"}, "not of length 1"),
        (VOXELS.tobytes(), {"ElementToIntensityFunctionSlope": "2"}, "scales the values"),
        (VOXELS.tobytes(), {"ElementToIntensityFunctionSlope": "1"}, None),
        (VOXELS.tobytes(), {"DistanceUnits": "cm"}, "lengths in cm"),
        (VOXELS.tobytes(), {"DistanceUnits": "mm"}, None),
        (PACKED, {"CompressedData": "True", "CompressedDataSize": len(PACKED)}, None),
        (
            WRONG,
            {"CompressedData": "True", "CompressedDataSize": len(WRONG)},
            "compressed voxels are damaged",
        ),
        (VOXELS.tobytes(), {"CompressedData": "True"}, "compressed voxels are damaged"),
    ],
)
def test_metaimage(tmp_path, data, changes, sentence):
    scan = Scan("a", (write_mha(tmp_path / "a.mha", data, **changes),), "itk")
    if sentence is None:
        assert read_scan(scan, 1).data.shape == (8, 9, 10)
    else:
        with pytest.raises(DataError, match=sentence):
            read_scan(scan, 1)


@pytest.mark.parametrize(
    ("where", "values", "sentence"),
    [(80, (0, 0, 0), "pixdim 0"), (80, (1, 0, 1), "pixdim 0"), (108, (0,), "inside the header")],
)
def test_nifti(tmp_path, where, values, sentence):
    image = nibabel.Nifti1Image(VOXELS.reshape(8, 9, 10), np.eye(4))
    image.set_qform(np.eye(4), 1)
    image.set_sform(None, 0)
    content = bytearray(image.to_bytes())
    struct.pack_into(f"<{len(values)}f", content, where, *values)
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_scan(Scan("a", (path,)), 1)

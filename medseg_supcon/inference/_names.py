"""Names of masks that stay: a DICOM series keeps the name that it got when its folder held other series."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from medseg_supcon.inference._scans import Scan, refuse_equal_names


def keep_names(scans: Sequence[Scan], earlier: Mapping[str, Mapping[str, Any]]) -> list[Scan]:
    """The scans, DICOM series under the names that an earlier call gave them, new ones under names that are free.

    A folder's only series is called as the folder, and several by their numbers: without this, a series that is
    added would rename the one that was there.

    Args:
        scans: as `find_scans` gives them.
        earlier: name -> entry of the manifest.
    """
    given = {str(entry["series"]): name for name, entry in earlier.items() if entry.get("series")}
    kept = [replace(scan, name=given.get(scan.series, scan.name)) for scan in scans]
    taken = {scan.name for scan in kept if scan.series in given}
    # names that further new series have, or masks of series that are not there any more
    used = {scan.name for scan in kept} | {n for n, entry in earlier.items() if entry["status"] != "failed"}
    settled = []
    for scan in kept:
        if scan.series and scan.series not in given and scan.name in taken:
            base = re.sub(r"_series\d+$", "", scan.name)
            names = (f"{base}_series{number}" for number in count(1))
            scan = replace(scan, name=next(name for name in names if name not in used))
            used.add(scan.name)
        settled.append(scan)
    return refuse_equal_names(settled)

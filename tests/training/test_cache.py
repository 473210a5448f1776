"""Cases are prepared once, on several threads: in order, to a budget, and with no thread left behind."""

from __future__ import annotations

import threading
from time import sleep
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, Lambda, LoadImaged, NormalizeIntensityd, Spacingd

from medseg_supcon.errors import DataError
from medseg_supcon.training import CachedDataset, CountDisplay, cached_dataset
from medseg_supcon.training import data as _cache
from medseg_supcon.training import log as _progress


def write_scans(folder, count, shape=(12, 10, 8)):
    items = []
    for k in range(count):
        voxels = np.random.default_rng(k).normal(size=(shape[0] + k, *shape[1:])).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1.5, 2, 1])), folder / f"scan{k}.nii.gz")
        items.append({"name": f"scan{k}", "image": str(folder / f"scan{k}.nii.gz")})
    return items


PREPROCESSING = Compose(
    [
        LoadImaged("image", "NibabelReader"),
        EnsureChannelFirstd("image"),
        Compose([Spacingd("image", (1.2, 1.2, 1.2)), NormalizeIntensityd("image")]),
    ]
)


def test_threads_change_nothing_but_the_time(tmp_path):
    items = write_scans(tmp_path, 7)
    alone, together = (CachedDataset(items, PREPROCESSING, 1e9, threads) for threads in (1, 3))
    assert len(alone.held) == len(together.held) == 7
    for k, item in enumerate(items):
        expected = PREPROCESSING(dict(item))["image"]
        assert torch.equal(alone[k]["image"], expected)
        assert torch.equal(together[k]["image"], expected)
        assert torch.equal(together[k]["image"].affine, expected.affine)


def test_so_many_cases_are_under_way_at_once():
    meeting, under_way, most = threading.Barrier(3), [], []

    def load(item):
        under_way.append(item)
        most.append(len(under_way))
        if item["k"] < 3:
            meeting.wait(timeout=20)  # broken where fewer than three run at once
        sleep(0.01)
        under_way.remove(item)
        return {"k": item["k"]}

    dataset = CachedDataset([{"k": k} for k in range(9)], load, 1.0, threads=3)
    assert [case["k"] for case in dataset.held] == list(range(9))
    assert max(most) == 3


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("budget", "held"), [(0, 1), (100, 1), (250, 2), (1000, 3), (9999, 5)])
def test_cache_holds_what_memory_allows(budget, held, threads, monkeypatch):
    monkeypatch.setattr(_cache.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * budget))
    monkeypatch.setattr(_cache, "_threads", lambda *_: threads)
    calls = []

    def load(item):
        calls.append(item["k"])
        return {"image": torch.full((item["bytes"] // 4,), float(item["k"]))}

    items = [{"k": k, "bytes": size} for k, size in enumerate([100, 100, 400, 800, 100])]
    dataset = cached_dataset(items, Compose([Compose([Lambda(load)])]), memory_share=0.1)
    assert len(dataset) == 5
    calls.clear()
    for _ in range(2):
        assert [int(dataset[k]["image"][0]) for k in range(5)] == [0, 1, 2, 3, 4]
    assert calls == 2 * list(range(held, 5))  # beyond the budget: prepared anew each time


@pytest.mark.parametrize("fault", [ValueError("a broken scan"), KeyboardInterrupt()])
def test_a_fault_in_one_scan_leaves_no_thread_at_work(fault):
    """Such a thread aborts the program if it is still in a C++ library when the program ends."""
    there, begun = threading.active_count(), []

    def load(item):
        begun.append(item["k"])
        if item["k"] == 1:
            raise fault
        sleep(0.1 * item["k"])
        return {"image": torch.zeros(1)}

    items = [{"k": k, "name": f"scan {k}"} for k in range(50)]
    expected = pytest.raises(DataError, match=r"scan 1: cannot be prepared \(ValueError: a broken scan\)")
    with expected if isinstance(fault, ValueError) else pytest.raises(KeyboardInterrupt):
        CachedDataset(items, load, 1e9, threads=3)
    assert threading.active_count() == there
    assert len(begun) < 10  # what waited for its turn is not begun


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("place", [0, 3])
def test_a_scan_that_cannot_be_read_is_named(tmp_path, threads, place):
    items = write_scans(tmp_path, 4)
    broken = tmp_path / f"scan{place}.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"scan{place}\.nii\.gz: cannot be read as NIfTI .*copy or export it again"):
        CachedDataset(items, PREPROCESSING, 1e9, threads)


def test_a_scan_beyond_the_cache_is_named_too(tmp_path):
    items = write_scans(tmp_path, 2)
    dataset = CachedDataset(items, PREPROCESSING, budget=0)
    (tmp_path / "scan1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"scan1\.nii\.gz: there is no such file"):
        dataset[1]


def test_full_memory_is_not_the_scans_fault():
    def load(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        CachedDataset([{"image": "scan.nii.gz"}], Compose([Lambda(load)]), 1e9)


def test_no_more_threads_than_memory_has_room_for(tmp_path, monkeypatch):
    items = write_scans(tmp_path, 5, shape=(30, 10, 10))  # the last one has 34 x 10 x 10 voxels
    monkeypatch.setattr(_cache.torch, "get_num_threads", lambda: 4)
    one = 60 * 34 * 10 * 10
    assert [_cache._threads(items, room * one) for room in (0, 1, 2.5, 100)] == [1, 1, 2, 4]
    assert _cache._threads(items[:3], 100 * one) == 3
    monkeypatch.setattr(_cache.torch, "get_num_threads", lambda: 1)  # as torchrun sets it
    monkeypatch.setattr(_cache.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _cache._threads(items, 100 * one) == 2


def test_progress_shows_what_takes_its_time(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress, "monotonic", lambda: now[0])
    for quiet in (True, False):
        now[0] = 0.0
        with CountDisplay("preparing scans", 300, quiet) as display:
            for done in range(1, 41):
                now[0] += 0.5
                display.show(done)
        told = capsys.readouterr().err.splitlines()
        assert told == ([] if quiet else ["preparing scans: 6/300", "preparing scans: 36/300"])

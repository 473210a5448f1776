"""``import pretend_cuda`` before torch: ``torch.cuda`` is there, as two devices that are the machine's own memory.

A CPU shows so what a first run on a GPU would: tensors of one operation on two devices, what is loaded or made on the
wrong one, branches of the code that only a GPU takes. Not shown: CUDA's rounding, races, speed.

``MEDSEG_PRETEND_CUDA`` names the built library, see ``test_pretend_cuda.py``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

assert "torch" not in sys.modules, "torch asks for CUDA once, when it is imported"
_spec = importlib.util.find_spec("torch")
assert _spec is not None and _spec.origin is not None
for _name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so", "libtorch_python.so"):
    ctypes.CDLL(str(Path(_spec.origin).parent / "lib" / _name), ctypes.RTLD_GLOBAL)
_device = ctypes.CDLL(os.environ["MEDSEG_PRETEND_CUDA"], ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

COUNT = 2


def _number(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return int(_device.pretend_get_device()) if index is None else int(index)


def _restored(storage: Any, location: str) -> Any:
    """``torch.load`` of what was saved from, or is wanted on, a GPU."""
    if not str(location).startswith("cuda"):
        return None
    held = torch.empty(storage.nbytes(), dtype=torch.uint8, device=location)
    if storage.nbytes():
        held.copy_(torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)))
    return held.untyped_storage()


torch.serialization.register_package(1, lambda storage: None, _restored)
for _name, _value in {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: COUNT,
    "current_device": _number,
    "set_device": lambda device: _device.pretend_set_device(_number(device)),
    "get_device_name": lambda device=None: "pretended GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(name="pretended GPU", total_memory=16 << 30),
    "max_memory_allocated": lambda device=None: 1 << 30,
    "memory_allocated": lambda device=None: 1 << 30,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "manual_seed_all": lambda seed: None,
    "manual_seed": lambda seed: None,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
}.items():
    setattr(torch.cuda, _name, _value)
# what torch's Python side takes from a build with CUDA
torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
torch._C._cuda_exchangeDevice = torch._C._cuda_maybeExchangeDevice = lambda device: _number()  # type: ignore[attr-defined]

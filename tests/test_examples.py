"""Every example in a docstring of the package runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import medseg_supcon

MODULES = [
    module.name
    for module in pkgutil.walk_packages(medseg_supcon.__path__, "medseg_supcon.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch, "nn": nn}).failed == 0

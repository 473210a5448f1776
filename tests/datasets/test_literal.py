"""Names that look like references, macros or expressions of MONAI's configs stay names."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from medseg_supcon.plan import literal

TEXTS = st.text() | st.text("#@%$:/a'\\\" ", max_size=8)
VALUES = st.recursive(
    TEXTS | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(value=VALUES)
@example(value="@anon")
@example(value="%pct")
@example(value="$cash")
@example(value="/data/site #2/a::b")
@example(value={"/data/import#1.nii.gz": "import.nii.gz", "_target_": "torch.nn.Identity"})
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_name_comes_back_as_it_was(value):
    parser = ConfigParser({"a": literal(value), "b": "$[@a]", "c": "x"})
    assert parser.get_parsed_content("b") == [value]
    assert parser.get_parsed_content("a") == value


def test_common_paths_stay_readable():
    assert literal("/data/Task04 Hippocampus/imagesTr") == "/data/Task04 Hippocampus/imagesTr"

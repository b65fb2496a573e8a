from __future__ import annotations

import pytest

from weightwire.errors import ConfigError
from weightwire.runtime import KernelLayout, LoadFormat, parse_dtype


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (LoadFormat.DUMMY, LoadFormat.DUMMY),
        (0, LoadFormat.AUTO),
        (1, LoadFormat.DUMMY),
        (3, LoadFormat.PRESHARDED),
        ("auto", LoadFormat.AUTO),
        ("PreSharded", LoadFormat.PRESHARDED),
        (" DUMMY ", LoadFormat.DUMMY),
    ],
)
def test_legal_values(value: object, expected: LoadFormat) -> None:
    assert LoadFormat.parse(value) is expected


@pytest.mark.parametrize("value", [True, False, 2, -1, 1.0, "", "1", "true", "gms", None, [], b"auto"])
def test_everything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        LoadFormat.parse(value)
    message = str(caught.value)
    assert repr(value) in message
    assert "auto (0), dummy (1), presharded (3)" in message
    assert "\n" not in message


def test_layouts_and_dtypes_are_parsed_as_strictly() -> None:
    assert KernelLayout.parse("Packed") is KernelLayout.PACKED
    assert str(parse_dtype("float32")) == "torch.float32"
    for parse in (KernelLayout.parse, parse_dtype):
        for value in (True, 0, "fast", None):
            with pytest.raises(ConfigError, match="use one of"):
                parse(value)

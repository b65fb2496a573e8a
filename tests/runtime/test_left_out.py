"""How names and patterns of what is not quantized are read: as the field's tools do, or refused by name."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightwire.errors import ConfigError
from weightwire.runtime.quantization.left_out import MAX_CHARS, MAX_NAMES, MAX_PATTERNS, LeftOut

LEAVES = (
    *(f"self_attn.{leaf}" for leaf in ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(f"mlp.{leaf}" for leaf in ("gate", "gate_proj", "up_proj", "down_proj", "shared_experts.up_proj")),
    *(f"mlp.experts.{expert}.{leaf}" for expert, leaf in product((0, 1, 11, 384), ("gate_proj", "down_proj"))),
)
PATHS = ["lm_head", *(f"model.layers.{layer}.{leaf}" for layer, leaf in product((0, 1, 2, 10, 61), LEAVES))]


def left_out(*entries: str) -> set[str]:
    found = LeftOut.parse(entries)
    return {path for path in PATHS if found.has(path)}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("lm_head", {"lm_head"}),
        ("model.layers.1.mlp.gate", {"model.layers.1.mlp.gate"}),
        ("model.layers.1", {path for path in PATHS if path.startswith("model.layers.1.")}),
        ("model.layers.1.mlp.experts.1", {f"model.layers.1.mlp.experts.1.{leaf}_proj" for leaf in ("gate", "down")}),
        ("o_proj", {path for path in PATHS if path.endswith(".o_proj")}),
        ("mlp.gate", {path for path in PATHS if path.endswith(".mlp.gate")}),
        ("self_attn", set()),
        ("proj", set()),
        ("layers.1", set()),
        ("model.layers.1.", set()),
        ("", set()),
    ],
)
def test_a_name_is_a_whole_path_or_the_end_of_one_and_has_all_below_it(name: str, wanted: set[str]) -> None:
    assert left_out(name) == wanted


@pytest.mark.parametrize(
    "pattern",
    ["*self_attn*", "model.layers.1*", "model.layers.1.*", "*.mlp.gate", "*_proj", "model.layers.[01].mlp*", "?"],
)
def test_a_pattern_is_fnmatch_s_for_the_whole_path(pattern: str) -> None:
    assert left_out(pattern) == {path for path in PATHS if fnmatchcase(path, pattern)}


# as published checkpoints have them
EXPRESSIONS = [
    r"re:.*self_attn.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*shared_experts.*",
    r"re:.*mlp.gate$",
    r"re:.*lm_head",
    r"re:model\.layers\.\d+\.self_attn\.o_proj$",
    r"re:^model.layers.(?:0|1|61).mlp.*",
    r"re:model.layers.[0-9]+.mlp.experts.\d.gate_proj",
    r"re:.*\.experts\.[01]\..+_proj$",
    r"re:vision_tower.*",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_matches_what_it_says(expression: str) -> None:
    assert left_out(expression) == {path for path in PATHS if re.match(expression[3:], path)}


ATOMS = [".*", ".+", ".", r"\.", r"\d", r"\d+", "[0-9]+", "[01]", "m", "o", "1", "_", "model", "gate"]
ATOMS += ["(a|gate|up_)", "(?:1|.*)"]


@given(st.lists(st.sampled_from(ATOMS), max_size=5), st.sampled_from(["", "^"]), st.sampled_from(["", "$"]))
def test_what_is_rewritten_is_what_re_would_have_matched(atoms: list[str], begin: str, end: str) -> None:
    expression = begin + "".join(atoms) + end
    try:
        found = left_out(f"re:{expression}")
    except ConfigError as refused:
        assert len(atoms) > 2  # too many forms
        assert "is not read here" in str(refused)  # noqa: PT017 - it may be refused, or not
        return
    assert found == {path for path in PATHS if re.match(expression, path)}


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(.*)*x",
        "(.*a){20}",
        "a*b",
        ".*?x",
        ".{1,5}x",
        "(?!.*experts).*",
        "^(?=.*mlp)",
        "((a|b)|c)",
        r"(.*)\1",
        r"\w+",
        "[^a]x",
        "a|b",
        "(a",
        "a)",
        "[a",
        "\\",
        r"(\d+\d+)(\d+\d+)(\d+\d+)",
    ],
)
def test_an_expression_beyond_that_is_refused_by_name_and_never_run(expression: str) -> None:
    with pytest.raises(ConfigError, match="an expression that is not read here") as caught:
        LeftOut.parse(["lm_head", f"re:{expression}"])
    assert f"re:{expression}" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["x" * (MAX_CHARS + 1)], f"a name of {MAX_CHARS + 1} characters"),
        ([f"model.layers.{at}*" for at in range(MAX_PATTERNS + 1)], f"{MAX_PATTERNS + 1} patterns"),
        ([f"model.layers.{at}" for at in range(MAX_NAMES + 1)], f"{MAX_NAMES + 1} names"),
    ],
    ids=["long", "patterns", "names"],
)
def test_more_than_is_read_is_refused(entries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LeftOut.parse(entries)
    LeftOut.parse(entries[1:])


def test_hostile_patterns_take_time_in_proportion_to_the_path() -> None:
    """With a matcher that goes back, any of these would not end."""
    found = LeftOut.parse(["*a" * 100 + "!", "re:" + ".*a" * 80 + "x", "re:" + ".*.+" * 60 + "x"])
    assert not found.has("a" * 20_000)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (("*experts*",), True),
        (("model.layers.1.mlp.experts",), True),
        (("*self_attn*", "model.layers.0.mlp.experts*"), False),
        (("model.layers.1.mlp.experts.[0-9].*",), True),
    ],
)
def test_all_parts_of_a_layer_or_none(entries: tuple[str, ...], wanted: bool) -> None:
    paths = [f"model.layers.1.mlp.experts.{at}.{leaf}_proj" for at in range(10) for leaf in ("gate", "up", "down")]
    assert LeftOut.parse(entries).all_of(paths) is wanted
    for some in ("*experts.7.*", "model.layers.1.mlp.experts.7", "re:.*experts.7.down_proj", "*experts.[!0]*"):
        if not wanted:
            with pytest.raises(ConfigError, match=r"experts\.\d\.\w+ and not model\.layers\.1\.mlp\.experts"):
                LeftOut.parse([*entries, some]).all_of(paths)

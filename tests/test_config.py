from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from weightwire.config import SETTINGS, VARIABLES, OnMiss, ReplicaRole, Settings
from weightwire.errors import ConfigError
from weightwire.types import Stage

BOOLEANS = ["require_rdma", "accept_unpinned", "untrusted_readers"]


def test_defaults_come_from_an_empty_environment() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.transports == ("nixl", "tcp")
    assert settings.stages == (Stage.LOADED, Stage.PROCESSED)
    assert (settings.load_timeout, settings.stall_timeout, settings.wait_for_loading) == (600.0, 10.0, 300.0)
    assert settings.url is None
    assert not settings.require_rdma


@pytest.mark.parametrize("field", BOOLEANS)
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", False),
        ("false", False),
        ("NO", False),
        ("off", False),
        ("1", True),
        ("True", True),
        ("yes", True),
        ("on", True),
    ],
)
def test_h13_zero_is_false(field: str, text: str, value: bool) -> None:
    assert getattr(Settings.from_env({VARIABLES[field].name: text}), field) is value


@pytest.mark.parametrize("field", BOOLEANS)
@pytest.mark.parametrize("text", ["maybe", "", "2", "-1", "truee", "none", "0x1"])
def test_h13_anything_else_is_an_error(field: str, text: str) -> None:
    name = VARIABLES[field].name
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({name: text})
    assert name in caught.value.problem
    assert repr(text) in caught.value.problem
    assert "0, false" in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_every_variable_is_parsed() -> None:
    settings = Settings.from_env(
        {
            "WEIGHTWIRE_URL": "[fd00::5]:8471",
            "WEIGHTWIRE_SECRET_FILE": "/run/secrets/weightwire",
            "WEIGHTWIRE_TRANSPORTS": "tcp, nixl",
            "WEIGHTWIRE_ROLE": "Target",
            "WEIGHTWIRE_STAGES": "processed",
            "WEIGHTWIRE_ON_MISS": "fail",
            "WEIGHTWIRE_REQUIRE_RDMA": "1",
            "WEIGHTWIRE_BIND": "10.0.0.5",
            "WEIGHTWIRE_ADVERTISE": "node-5.example.org",
            "WEIGHTWIRE_LOAD_TIMEOUT": "60",
            "WEIGHTWIRE_STALL_TIMEOUT": "2.5",
            "WEIGHTWIRE_ACCEPT_UNPINNED": "on",
            "WEIGHTWIRE_WAIT_FOR_LOADING": "0",
            "WEIGHTWIRE_UNTRUSTED_READERS": "off",
            "WEIGHTWIRE_LOG_LEVEL": "debug",
        }
    )
    assert settings == Settings(
        url="[fd00::5]:8471",
        secret_file=Path("/run/secrets/weightwire"),
        transports=("tcp", "nixl"),
        role=ReplicaRole.TARGET,
        stages=(Stage.PROCESSED,),
        on_miss=OnMiss.FAIL,
        require_rdma=True,
        bind="10.0.0.5",
        advertise="node-5.example.org",
        load_timeout=60.0,
        stall_timeout=2.5,
        accept_unpinned=True,
        wait_for_loading=0.0,
        untrusted_readers=False,
        log_level="DEBUG",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("WEIGHTWIRE_URL", "localhost"),
        ("WEIGHTWIRE_URL", "http://localhost:8471"),
        ("WEIGHTWIRE_URL", "localhost:0"),
        ("WEIGHTWIRE_URL", "localhost:65536"),
        ("WEIGHTWIRE_URL", "fd00::5:8471"),
        ("WEIGHTWIRE_TRANSPORTS", "rdma"),
        ("WEIGHTWIRE_TRANSPORTS", "tcp,tcp"),
        ("WEIGHTWIRE_TRANSPORTS", "tcp,"),
        ("WEIGHTWIRE_ROLE", "1"),
        ("WEIGHTWIRE_STAGES", "RAW"),
        ("WEIGHTWIRE_ON_MISS", "disc"),
        ("WEIGHTWIRE_LOAD_TIMEOUT", "0"),
        ("WEIGHTWIRE_LOAD_TIMEOUT", "inf"),
        ("WEIGHTWIRE_STALL_TIMEOUT", "nan"),
        ("WEIGHTWIRE_STALL_TIMEOUT", "10s"),
        ("WEIGHTWIRE_WAIT_FOR_LOADING", "-1"),
        ("WEIGHTWIRE_LOG_LEVEL", "verbose"),
        ("WEIGHTWIRE_BIND", "10.0.0.5/24"),
    ],
)
def test_illegal_values_name_variable_value_and_what_is_legal(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({name: text})
    assert caught.value.problem.startswith(f"{name} cannot be {text!r}")
    assert caught.value.remedy.startswith("legal: ")


def test_h49_a_secret_in_the_place_of_its_path_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({"WEIGHTWIRE_SECRET_FILE": "hunter2hunter2hunter2"})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_overrides_win_and_are_parsed_where_they_are_text() -> None:
    environ = {"WEIGHTWIRE_LOAD_TIMEOUT": "60", "WEIGHTWIRE_ROLE": "nonsense"}
    settings = Settings.from_env(environ, role="source", transports=("tcp",), load_timeout=None)
    assert (settings.role, settings.transports, settings.load_timeout) == (ReplicaRole.SOURCE, ("tcp",), 60.0)
    with pytest.raises(ConfigError, match=r"^url cannot be 'nonsense'"):
        Settings.from_env({}, url="nonsense")
    with pytest.raises(TypeError):
        Settings.from_env({}, urls="a:1")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("WEIGHTWIRE_TRANSPORT", "WEIGHTWIRE_TRANSPORTS"),
        ("WEIGHTWIRE_REQUIRE_RMDA", "WEIGHTWIRE_REQUIRE_RDMA"),
        ("WEIGHTWIRE_LOADTIMEOUT", "WEIGHTWIRE_LOAD_TIMEOUT"),
    ],
)
def test_misspelt_names_are_refused(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}; did you mean {meant}"):
        Settings.from_env({name: "tcp"})


def test_what_kubernetes_injects_for_a_service_of_our_name_is_left_alone() -> None:
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_8471_TCP", "PORT_8471_TCP_PROTO"]
    names += ["PORT_8471_TCP_PORT", "PORT_8471_TCP_ADDR"]
    assert Settings.from_env({f"WEIGHTWIRE_{name}": "x" for name in names}) == Settings()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"require_rdma": True, "untrusted_readers": True}, "contradict"),
        ({"require_rdma": True, "transports": ("tcp",)}, "no nixl"),
        ({"transports": ()}, "no transport"),
    ],
)
def test_contradictions_are_refused(given: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Settings.from_env({}, **given)


def test_untrusted_readers_rule_nixl_out_by_name() -> None:
    settings = Settings(untrusted_readers=True)
    assert settings.offered == ("tcp",)
    assert settings.refused == {"nixl": "untrusted_readers is set"}
    assert Settings().offered == ("nixl", "tcp")


def test_the_table_is_small_complete_and_documented() -> None:
    assert len(VARIABLES) <= 15
    assert set(SETTINGS) == {field.name for field in dataclasses.fields(Settings)}
    assert set(SETTINGS) - set(VARIABLES) == {"max_rate", "max_readers", "tcp_streams", "tcp_read_bytes"}
    for field, variable in VARIABLES.items():
        assert variable.name == f"WEIGHTWIRE_{field.upper()}"
        assert variable.doc.endswith(".")
        assert "\n" not in variable.doc


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("0", 0.0),
        ("200MB/s", 2e8),
        ("1.5GB", 1.5e9),
        ("1.5 gb/s", 1.5e9),
        ("2e8", 2e8),
        ("64MiB", 64 * 2.0**20),
        ("10Gbit/s", 1.25e9),
        ("800kbit", 1e5),
    ],
)
def test_a_rate_is_bytes_a_second(text: str, rate: float) -> None:
    assert Settings.from_env({}, max_rate=text).max_rate == rate


@pytest.mark.parametrize("text", ["", "fast", "-1", "1", "99kB", "nan", "inf", "1e99", "MB/s", "10 per s", "2PB"])
def test_what_is_no_rate_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="max_rate cannot be"):
        Settings.from_env({}, max_rate=text)


def test_bits_and_bytes_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(ConfigError, match="Gb may be bits or bytes: write GB or Gbit"):
        Settings.from_env({}, max_rate="10Gb/s")


@pytest.mark.parametrize("given", [{"max_rate": -1.0}, {"max_rate": 5.0}, {"max_readers": -1}, {"max_readers": 9999}])
def test_caps_out_of_bounds_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        Settings(**given)


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "1025", ""])
def test_what_is_no_number_of_readers_is_an_error(text: str) -> None:
    assert Settings.from_env({}, max_readers="8").max_readers == 8
    with pytest.raises(ConfigError, match="max_readers cannot be"):
        Settings.from_env({}, max_readers=text)


def test_a_cap_has_no_variable_that_others_could_inherit() -> None:
    assert Settings.from_env({"WEIGHTWIRE_SERVICE_HOST": "10.0.0.1"}).max_rate == 0


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().url = "a:1"  # type: ignore[misc]

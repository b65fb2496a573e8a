from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from weightwire.cli.main import main

SMALL = ["--gb", "1", "--rate", "0.1", "--chunk", "10"]


def test_a_simulation_is_a_row_for_each_number_and_share(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "simulate",
        *SMALL,
        "--replicas",
        "2",
        "--replicas",
        "40",
        "--deaths",
        "0",
        "--deaths",
        "0.1",
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["plan"]["replicas"], each["plan"]["deaths"]) for each in found] == [
        (2, 0.0),
        (2, 0.1),
        (40, 0.0),
        (40, 0.1),
    ]
    for each in found:
        assert each["bound_s"] == pytest.approx(10.0)
        assert 1.0 <= each["ratio"] <= 1.5
        assert each["unfinished"] == 0


def test_the_table_and_the_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "ready.svg"
    assert main(["simulate", *SMALL, "--replicas", "3", "--plot", str(plot)]) == 0
    assert "3 replicas" in capsys.readouterr().out
    drawn = ET.fromstring(plot.read_text())
    (curve,) = (each for each in drawn.iter("{http://www.w3.org/2000/svg}path") if each.get("fill") == "none")
    steps = [float(at) for at in re.findall(r"V([\d.]+)", curve.attrib["d"])]
    assert len(steps) == 3, "one for each"
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 40.0, "all of them, at the top"


def test_a_plot_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["simulate", *SMALL, "--replicas", "1", "--plot", str(tmp_path / "no" / "a.svg")]) == 1
    assert "No such file" in capsys.readouterr().err

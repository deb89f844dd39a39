"""What happens to a run around the program: its data change, its files are damaged, the disk is full,
nobody reads, somebody is impatient. One line says so, and nothing is lost."""

import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_measure import fake, main
from test_train import (SMALL, STEP, assert_fails, assert_same_run, hook, killed_run, load_once,
                        program, run, save_small)

import data
import measure
import train
from model import GPT

ROOT = Path(__file__).parents[1]
FLAGS = "--method topv --out run"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test runs next to the model `small`; data are read anew where they may change."""
    monkeypatch.chdir(tmp_path)
    real = data.load
    monkeypatch.setattr(data, "load", lambda name, *args: (
        real if name == "e2e" else load_once)(name, *args))
    measure.load.cache_clear()
    measure.measure.cache_clear()
    save_small("small")


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def refused(capsys, *words):
    """The last line of measure.py, which ends with status 2."""
    assert pytest.raises(SystemExit, main, *words).value.code == 2
    line = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert re.match(r"measure.py \w+: error: ", line)
    return line


# Other data.

E2E = "--dataset e2e --block-size 64 --batch-size 2 --steps 4"


def write_e2e(folder, text):
    """Two pairs to train on, one to validate on; returns their files by their split."""
    files = {}
    for split, rows in ("train", 2), ("validation", 1):
        lines = [dict(meaning_representation=f"{split}[{n}]", human_reference=f"{text} {n} ü")
                 for n in range(rows)]
        files[split] = Path(folder, split, "0.jsonl")
        files[split].parent.mkdir(parents=True, exist_ok=True)
        files[split].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def test_metrics_and_the_first_line_tell_the_data(capsys):
    files = write_e2e("data", "Aromi")
    metrics = run(f"{E2E} --data-path data --out run")
    first, about = capsys.readouterr().err.splitlines()[0], metrics["data"]
    assert first.startswith(f"data: {Path('data').resolve()}; ") and len(about) == 2
    assert json.loads(Path("run/metrics.json").read_text())["data"] == about
    for split, rows in ("train", 2), ("validation", 1):
        name, content = f"{split}/0.jsonl", files[split].read_bytes()
        sha256 = hashlib.sha256(f"{name} {len(content)} ".encode() + content).hexdigest()
        tokens = rows * len(f"{split}[0]\nAromi 0 ü\0".encode())  # the last is the end of text
        assert about[split] == dict(source=str(Path("data").resolve()), sha256=sha256, rows=rows,
                                    files={name: len(content)}, tokens=tokens)
        assert f"; {split}: {tokens} tokens, sha256 {sha256[:8]}" in first


def test_an_interrupted_run_whose_data_have_changed_is_refused(capsys):
    flags = f"{E2E} --data-path data --out run --checkpoint-every 2"
    write_e2e("data", "Aromi")
    killed_run("before the first checkpoint", flags)
    before = contents("run")
    write_e2e("data", "Zizzi")
    assert_fails(capsys, f"{SMALL} {flags} --resume", f"run was made with other data|{os.getcwd()}")
    assert contents("run") == before
    write_e2e("data", "Aromi")
    run(f"{flags} --resume")


@pytest.mark.parametrize("flags", ["--method topv", "--method none --distill"])
def test_a_dense_run_of_other_data_is_refused_but_not_of_the_same_elsewhere(flags, capsys):
    for folder, text in ("one", "Aromi"), ("same", "Aromi"), ("two", "Zizzi"):
        write_e2e(folder, text)
    assert program(capsys, f"{E2E} --device cpu --method none --data-path one")[0] == 0
    (dense,) = Path("out").iterdir()
    before = contents(dense)
    flags = f"{E2E} {flags} --out run --device cpu --data-path"
    assert_fails(capsys, f"{flags} two", f"{dense} was made with other data|/one|/two")
    assert not Path("run").exists() and contents(dense) == before
    assert program(capsys, f"{flags} same")[0] == 0 and contents(dense) == before


def test_a_run_is_measured_on_its_own_data_or_others_that_are_named(capsys):
    write_e2e("data", "Aromi")
    run(f"{E2E} --data-path data --out run")
    files = write_e2e("data", "Other")
    assert re.search("data of run were others.*/data.*--dataset e2e", refused(capsys, "run"))
    assert not Path("run/measure.json").exists()
    main("run", "--dataset", "e2e")
    found = json.loads(Path("run/measure.json").read_text())["data"]["validation"]
    assert found["files"] == {"validation/0.jsonl": files["validation"].stat().st_size}


def test_the_dense_run_beside_a_run_is_of_the_same_data(capsys):
    fake("out/topv", "topv")
    fake("out/dense", "none", lr=0.2)
    fake("out/others", "none")  # more alike, but of other data
    metrics = measure.read_run("out/others").metrics
    metrics["data"]["train"]["sha256"] = "other"
    measure.write_json(Path("out/others/metrics.json"), metrics)
    os.mkdir("out/damaged")
    Path("out/damaged/metrics.json").write_text("{")
    assert measure.dense_run(measure.read_run("out/topv"), None).path == Path("out/dense")

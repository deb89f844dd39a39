"""The method that README adds works as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
FILES = ("model.py", "prune.py", "train.py", "data.py", "measure.py", "results/compare.py",
         "results/early.py", "results/export.py", "results/modeling_pruned.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ("--model small --steps 20 --batch-size 4 --dataset toysql --block-size 128 --log-every 5 "
         "--device cpu").split()


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def python(*words, cwd):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def forked(tmp_path):
    """A copy of the program with README's diff applied, and a small model."""
    (tmp_path / "results").mkdir()
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    [diff] = blocks("diff")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    config = GPTConfig(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    GPT(config).save_pretrained(tmp_path / "small")
    return tmp_path


def test_the_new_method_takes_at_most_twelve_lines_of_one_file():
    [diff] = blocks("diff")
    assert re.findall(r"^\+\+\+ .*", diff, re.MULTILINE) == ["+++ b/prune.py"]
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) <= 12
    assert not re.findall(r"^-(?!--)", diff, re.MULTILINE) and diff.count("@@") == 2


def test_the_new_method_trains_and_stands_in_help_tables_and_figures(forked):
    assert "wanda" in python("train.py", "--help", cwd=forked)
    for scope in ("layer", "global"):
        python("train.py", *SMALL, "--method", "wanda", "--scope", scope, "--out", scope,
               cwd=forked)
    each, whole = (GPT.from_pretrained(forked / scope).config.mlp_widths
                   for scope in ("layer", "global"))
    assert each == (16, 16) and sum(whole) == 32
    python("measure.py", "layer", "global", "--examples", 8, "--device", "cpu", cwd=forked)
    table = python("measure.py", "table", "layer", "global", cwd=forked)
    assert "Wanda, scope layer" in table and "Wanda, scope global" in table
    drawn = python("measure.py", "figures", "layer", "global", "--out", "drawn", cwd=forked)
    assert all((forked / line).is_file() for line in drawn.splitlines()) and drawn

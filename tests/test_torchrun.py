"""Two processes on the CPU, launched by torchrun: the run of one process, and what happens if one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import prune
import train
from model import GPT, GPTConfig
from prune import Pruner
from test_train import load_once

ROOT = Path(__file__).parents[1]
RUNS = ("none", "magnitude", "random", "topv", "soft", "gum", "topv --distill --teacher small", "gum --lambda-gum 0",
        "topv --accumulate 2", "topv --gradient-checkpointing")
WORDS = "--model small --steps 30 --batch-size 8 --block-size 32 --lr 1e-2 --log-every 10 --device cpu".split()
SCRIPT = """
import sys, torch, data, train
from prune import Pruner
from test_train import load_once

data.load = load_once
kept, select = [], Pruner.select
def selected(self, step):
    widths = select(self, step)
    kept.append([None if mlp.keep is None else mlp.keep.tolist() for mlp in self.mlps])
    return widths

Pruner.select = selected
words = sys.argv[1].split()
train.join_processes(train.parse(words))
for number, run in enumerate(sys.argv[2:]):
    kept.clear()
    train.run(train.parse([*words, "--method", *run.split(), "--out", f"two-{number}"]))
    torch.save(kept, f"kept-{number}-{train.PROCESS}.pt")
"""


def torchrun(script, *words, **how):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *words]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have made every run in RUNS."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(1)
    GPT(GPTConfig(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder / "small")
    (folder / "runs.py").write_text(SCRIPT)
    job = torchrun("runs.py", " ".join(WORDS), *RUNS, cwd=folder)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output
    return folder


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("number", range(len(RUNS)), ids=RUNS)
def test_two_processes_keep_the_same_neurons_at_every_step(folder, number):
    first, second = (torch.load(folder / f"kept-{number}-{process}.pt") for process in (0, 1))
    assert first == second and len(first) == 31  # once more after the last step
    assert RUNS[number] == "none" or any(len(keep or "many") < 64 for keep in first[-1])


@pytest.mark.parametrize("number", [number for number, run in enumerate(RUNS) if run != "gum"])
def test_two_processes_make_the_run_of_one(folder, number, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(data, "load", load_once)
    train.run(train.parse([*WORDS, "--method", *RUNS[number].split(), "--out", f"one-{number}"]))
    ours, theirs = (load_file(f"{name}-{number}/model.safetensors") for name in ("two", "one"))
    assert_same_weights(ours, theirs)
    losses = [[line.split('"loss": ')[1].split(",")[0] for line in Path(f"{name}-{number}/log.jsonl").open()]
              for name in ("two", "one")]
    assert len(losses[0]) == len(losses[1])
    assert [float(x) for x in losses[0]] == pytest.approx([float(x) for x in losses[1]], abs=1e-5)


def test_two_processes_make_gum_with_the_mean_of_their_uniqueness(folder, monkeypatch):
    # One process that keeps a running similarity for each half of the batch, and uses the mean of the two U.
    monkeypatch.chdir(folder)
    model = GPT.from_pretrained("small")
    pruner = Pruner(model, "gum", 0.25, 30)
    grams = [[C.clone() for C in pruner.gram] for _ in range(2)]
    args = train.resolve(train.parse([*WORDS, "--method", "gum"]))
    optimizer = prune.make_optimizer(model, pruner, args)
    train_data = data.load("stdlib", "train", 257, 32)
    for step in range(1, 31):
        pruner.select(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * prune.lr_factor(step, 30)
        idx, targets, _ = train_data.batch(train.batch_indices(step, len(train_data), 8, 0))
        penalties, scale = [], pruner.gram_scale
        for half, pruner.gram in enumerate(grams):
            pruner.gram_scale = scale
            rows = slice(4 * half, 4 * half + 4)
            with pruner.observing():
                logits, _ = model(idx[rows])
            penalties.append(pruner.uniqueness_penalty.clone())
            (F.cross_entropy(logits.flatten(0, 1), targets[rows].flatten()) / 2).backward()
        assert not penalties[0].equal(penalties[1])
        pruner.uniqueness_penalty.copy_((penalties[0] + penalties[1]) / 2)
        pruner.score_gradient(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pruner.select(30)
    prune.shrink(model).save_pretrained("reference")
    assert_same_weights(load_file("two-5/model.safetensors"), load_file("reference/model.safetensors"))


def workers(job):
    """The processes that torchrun has started, by their rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {rank: int(pid) for pid, words in environments.items() for rank in (0, 1) if b"RANK=%d" % rank in words}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux to find the processes")
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_job_and_leaves_a_checkpoint_to_go_on_from(folder, victim, monkeypatch):
    monkeypatch.chdir(folder)
    out = f"killed-{victim}"
    words = [*WORDS, "--method", "topv", "--steps", "400", "--checkpoint-every", "10", "--out", out]
    job = torchrun(ROOT / "train.py", *words)
    deadline = time.monotonic() + 90
    while not Path(out, "checkpoint.pt").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.kill(workers(job)[victim], signal.SIGKILL)
    output, _ = job.communicate(timeout=90)
    assert job.returncode != 0
    assert not Path(out, "metrics.json").exists()
    assert 10 <= torch.load(Path(out, "checkpoint.pt"), weights_only=True)["step"] < 400
    if victim == 1:
        assert "another process of this job is gone" in output and "--resume" in output
        for more in (["--resume"], ["--out", "whole"]):
            job = torchrun(ROOT / "train.py", *words, *more)
            output, _ = job.communicate(timeout=90)
            assert job.returncode == 0, output
        found, expected = (load_file(Path(name, "model.safetensors")) for name in (out, "whole"))
        assert all(found[name].equal(expected[name]) for name in expected)

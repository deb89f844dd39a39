"""A run from its command line to its folder: what it leaves, that nothing is lost, and what it says to mistakes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from model import GPT, GPTConfig
from prune import METHODS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
PRUNING = [method for method in METHODS if method != "none"]
SMALL = ("--model small --steps 12 --batch-size 2 --block-size 32 --lr 0.01 --log-every 2 "
         "--checkpoint-every 4 --device cpu").split()


@cache
def load_once(*args, real=data.load):
    """A data set as `data.load` gives it, its validation split cut short."""
    loaded = real(*args)
    if args[1] == "validation" and isinstance(loaded, data.Blocks):
        loaded.tokens = loaded.tokens[:4000]
    return loaded


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test runs where nothing else is, next to a byte-level GPT-2 (`small`), and reads each
    data set once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load_once)
    torch.manual_seed(1)
    GPT(GPTConfig(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2)
        ).save_pretrained("small")


def run(*flags, model="small", steps=12):
    """A run on the small model; returns its metrics."""
    words = [*SMALL, "--model", model, "--steps", steps, *flags]  # of a flag given twice, the last
    return train.run(train.parse([str(word) for word in words]))


def in_double(monkeypatch):
    """Have runs train in float64, where other orders of adding up choose the same neurons."""
    real = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: real(*args).double())


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def without_times(record):
    drop = ("seconds", "tokens_per_second", "prefill_tokens_per_second", "settings")
    return {key: without_times(value) if isinstance(value, dict) else value
            for key, value in record.items() if key not in drop}


def log_of(folder):
    return [without_times(json.loads(line)) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    assert_same_weights(a, b)
    assert log_of(a) == log_of(b)
    first, second = (json.loads((Path(folder) / "metrics.json").read_text()) for folder in (a, b))
    assert without_times(first) == without_times(second)


# What a run leaves.


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_has_exactly_its_four_files(method):
    run("--method", method, "--out", "run")
    assert sorted(os.listdir("run")) == ["config.json", "log.jsonl", "metrics.json",
                                         "model.safetensors"]


@pytest.mark.parametrize("method,leftover,kept", [
    ("topv", 0.25, [16, 16]), ("magnitude", 0.1, [6, 6]), ("random", 0.5, [32, 32])])
def test_the_saved_model_has_the_wanted_number_of_neurons(method, leftover, kept):
    metrics = run("--method", method, "--leftover", leftover, "--out", "run")
    model = GPT.from_pretrained("run")
    assert list(model.config.mlp_widths) == kept == metrics["result"]["widths"]
    assert [model.h[i].mlp.c_fc.weight.size(0) for i in (0, 1)] == kept
    assert metrics["leftover"] == sum(kept) / 128 and metrics["leftover_wanted"] == leftover


def test_global_top_v_keeps_an_exact_share_of_the_whole_network():
    metrics = run("--method", "gum", "--leftover", 0.3, "--out", "run")
    assert sum(metrics["result"]["widths"]) == round(0.3 * 128)


def test_the_saved_model_is_the_one_that_was_evaluated():
    metrics = run("--out", "run")
    blocks = load_once("stdlib", "validation", 257, 32, None, None)
    idx, targets, _ = blocks.batch(range(len(blocks)))
    with torch.no_grad():
        loss = GPT.from_pretrained("run")(idx, targets)[1].item()
    result = metrics["result"]
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["parameters"] == sum(tensor.numel() for tensor in weights("run").values())


def test_the_log_has_a_line_every_interval_and_follows_the_schedule():
    run("--method", "topv", "--leftover", 0.25, "--out", "run", steps=20)
    log = log_of("run")
    assert [record["step"] for record in log] == list(range(2, 21, 2))
    assert log[0]["v_t"] == log[0]["leftover"] == 1.0  # two of twenty steps are warm-up
    assert log[-1]["v_t"] == log[-1]["leftover"] == 0.25
    assert all(a["v_t"] >= b["v_t"] for a, b in zip(log, log[1:]))
    assert log[0]["lr"] == 1e-2 and log[-1]["lr"] == 0.0
    assert [record["step"] for record in log if "val_loss" in record] == [4, 8, 12, 16]


def test_an_evaluation_between_two_log_lines_gets_a_line_of_its_own():
    run("--method", "none", "--eval-every", 3, "--out", "run", steps=8)
    assert [(record["step"], "val_loss" in record) for record in log_of("run")] == \
        [(2, False), (3, True), (4, False), (6, True), (8, False)]


def test_training_lowers_the_loss():
    metrics = run("--method", "gum", "--leftover", 0.5, "--out", "run", steps=60)
    assert metrics["result"]["val_loss"] < metrics["start"]["val_loss"] - 1


def test_the_name_of_the_folder_tells_the_settings(tmp_path):
    run("--method", "topv", "--leftover", 0.25, "--scope", "global", "--seed", 3)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == ("topv-stdlib-small-0.25-block-size=32-steps=12-batch-size=2-lr=0.01-"
                           "scope=global-seed3")


# The ways through: tiny, pruned starts, accumulation, ablations.


def test_tiny_is_first_trained_dense_and_that_run_is_reused():
    run("--method", "gum", model="tiny", steps=4)
    (dense,) = Path("out").glob("none-*")
    before = (dense / "metrics.json").read_bytes()
    metrics = run("--method", "topv", "--distill", model="tiny", steps=4)
    assert [path.name for path in Path("out").glob("none-*")] == [dense.name]
    assert (dense / "metrics.json").read_bytes() == before
    assert metrics["start"]["val_loss"] == json.loads(before)["result"]["val_loss"]


def test_a_finished_run_can_be_pruned_further():
    half = run("--method", "topv", "--leftover", 0.5, "--out", "half")["result"]
    quarter = run("--method", "gum", "--leftover", 0.5, "--out", "quarter", model="half")["result"]
    assert quarter["parameters"] < half["parameters"] and sum(quarter["widths"]) == 32
    assert list(GPT.from_pretrained("quarter").config.mlp_widths) == quarter["widths"]


@pytest.mark.parametrize("method", ["none", "gum"])
def test_accumulation_changes_nothing_but_rounding(method, monkeypatch):
    in_double(monkeypatch)
    run("--method", method, "--batch-size", 4, "--out", "whole")
    run("--method", method, "--batch-size", 4, "--accumulate", 4, "--out", "parts")
    for name, tensor in weights("whole").items():
        torch.testing.assert_close(weights("parts")[name], tensor, rtol=0, atol=1e-9)


def test_epochs_set_the_steps():
    blocks = len(load_once("toysql", "train", 257, 128, None, None))
    words = ["--dataset", "toysql", "--block-size", 128, "--epochs", 40 / blocks, "--out", "run"]
    flags = train.parse([str(word) for word in ["--model", "small", "--device", "cpu", *words]])
    assert train.run(flags)["steps"] == 5


@pytest.mark.parametrize("flags", [
    ["--method", "gum", "--scope", "layer"], ["--method", "gum", "--lambda-gum", "0"],
    ["--method", "topv", "--lambda-gum", "10"], ["--method", "random", "--scope", "global"]])
def test_the_ablations_run(flags):
    assert sum(run(*flags, "--leftover", 0.5, "--out", "run")["result"]["widths"]) == 64


@pytest.mark.parametrize("method", PRUNING)
def test_at_leftover_1_every_method_trains_what_plain_fine_tuning_trains(method):
    run("--method", "none", "--out", "dense")
    run("--method", method, "--leftover", 1.0, "--out", "pruned")
    dense, pruned = weights("dense"), weights("pruned")
    for name in dense:
        torch.testing.assert_close(pruned[name], dense[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", PRUNING)
def test_layers_that_lose_every_neuron_still_train_save_load_and_export(method):
    tau = ["--tau", 0.9999, "--mask-lr", 0.1] if method == "soft" else []  # it leaves nothing, then
    metrics = run("--method", method, "--leftover", 0.004, *tau, "--out", "run")
    assert 0 in metrics["result"]["widths"]
    model = GPT.from_pretrained("run")
    model.save_pretrained("padded", pad=True)
    idx = torch.randint(257, (2, 20))
    assert math.isfinite(metrics["result"]["val_loss"])
    torch.testing.assert_close(GPT.from_pretrained("padded")(idx)[0], model(idx)[0], rtol=0, atol=1e-5)


# Distillation.


def test_distillation_lowers_kl_to_the_teacher():
    run("--method", "none", "--seed", 5, "--out", "out/teacher", steps=200)
    teacher = GPT.from_pretrained("out/teacher")
    idx = load_once("stdlib", "validation", 257, 32, None, None).batch(range(64))[0]

    def kl(folder):
        with torch.no_grad():
            p, q = (model(idx)[0].log_softmax(-1) for model in (teacher, GPT.from_pretrained(folder)))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    common = ["--method", "topv", "--leftover", 0.1, "--seed", 5]
    run(*common, "--out", "plain", model="out/teacher", steps=60)
    run(*common, "--distill", "--teacher", "out/teacher", "--out", "distilled", model="out/teacher",
        steps=60)
    assert kl("distilled") < 0.8 * kl("plain")


def test_a_teacher_is_found_by_data_model_and_seed(capsys):
    run("--method", "none", "--seed", 4, "--out", "out/other-seed")
    run("--method", "none", "--seed", 5, "--out", "out/same-seed", steps=6)
    run("--method", "topv", "--seed", 5, "--distill")
    assert "teacher: out/same-seed" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["topv", "gum"])
def test_distillation_without_weight_is_no_distillation_bit_for_bit(method):
    run("--method", "none", "--out", "teacher")
    same = ["--method", method]
    same += ["--lambda-gum", 10] if method == "gum" else []  # which distilling would change
    run(*same, "--out", "plain")
    run(*same, "--distill", "--teacher", "teacher", "--alpha-ce", 1, "--alpha-kd", 0,
        "--out", "distilled")
    assert_same_weights("plain", "distilled")


# Nothing is lost.


class Killed(BaseException):
    """Stands for a kill -9: nothing catches it."""


def die_at(monkeypatch, function, call, after=False):
    """Make the `call`-th call of `module.function` (from 1) raise Killed: before it works, or after."""
    module, name = function
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(None)
        if len(calls) != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        elif name == "save":  # half a file
            Path(args[1]).write_bytes(b"PK half a checkpoint")
        raise Killed

    monkeypatch.setattr(module, name, dying)


DEATHS = {"while a checkpoint is written": ((torch, "save"), 2, False),
          "before a checkpoint is in place": ((torch, "save"), 2, True),
          "in the middle of a step": ((torch.optim.AdamW, "step"), 7, False),
          "between two steps": ((torch.optim.AdamW, "step"), 10, True),
          "before the first checkpoint": ((torch.optim.AdamW, "step"), 3, True),
          "after training": ((train, "compare"), 1, False)}


@pytest.mark.parametrize("method, death", [
    *(("gum", death) for death in DEATHS),
    *((method, "in the middle of a step") for method in METHODS if method != "gum")])
def test_a_killed_run_resumes_bit_for_bit(method, death, monkeypatch):
    run("--method", method, "--out", "whole")
    with monkeypatch.context() as patched:
        die_at(patched, *DEATHS[death])
        with pytest.raises(Killed):
            run("--method", method, "--out", "killed")
    run("--method", method, "--out", "killed", "--resume")
    assert_same_run("whole", "killed")


def test_a_killed_distilled_tiny_run_resumes_even_if_killed_in_its_dense_run(monkeypatch):
    flags = ["--method", "gum", "--distill"]
    run(*flags, model="tiny", steps=5)
    for path in Path("out").iterdir():
        path.rename(path.name + "-whole")
    with monkeypatch.context() as patched:
        die_at(patched, (torch.optim.AdamW, "step"), 5, True)
        with pytest.raises(Killed):
            run(*flags, model="tiny", steps=5)
    with monkeypatch.context() as patched:
        die_at(patched, (torch.optim.AdamW, "step"), 4, True)
        with pytest.raises(Killed):
            run(*flags, "--resume", model="tiny", steps=5)
    run(*flags, "--resume", model="tiny", steps=5)
    for path in Path("out").iterdir():
        assert_same_run(path, path.name + "-whole")


HANGS = """import sys, time, train
real, sys.argv = train.fine_prune, ["train.py", *sys.argv[2:]]
def fine_prune(model, pruner, optimizer, micro_batches, step, *more):
    if step == 27:
        open("hangs", "w").close()
        time.sleep(600)
    return real(model, pruner, optimizer, micro_batches, step, *more)
train.fine_prune = fine_prune
train.main()"""


def start(*flags, steps=100_000, hangs=False):
    """The program itself, in a process of its own, on one thread; `hangs`: in its 27th step."""
    program = ["-c", HANGS, "train.py"] if hangs else [str(ROOT / "train.py")]
    words = [*SMALL, "--dataset", "toysql", "--block-size", "128", "--checkpoint-every", "10",
             "--steps", str(steps), *flags]
    threads = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, *program, *words], text=True, env=os.environ | threads,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process):
    while not Path(path).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_kill_9_and_resume_end_with_the_same_bits():
    assert start("--out", "whole", steps=60).wait() == 0
    process = start("--out", "killed", steps=60, hangs=True)
    wait_for("hangs", process)
    process.kill()
    process.wait()
    assert torch.load("killed/checkpoint.pt", weights_only=True)["progress"]["step"] == 20
    assert start("--out", "killed", "--resume", steps=60).wait() == 0
    assert_same_run("whole", "killed")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on():
    process = start("--method", "topv", "--out", "run")
    wait_for("run/checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    step = torch.load("run/checkpoint.pt", weights_only=True)["progress"]["step"]
    line = stderr.splitlines()[-1]
    assert f"after step {step} of 100000" in line and "--method topv" in line
    assert line.endswith("--out run --resume")


def test_resuming_a_finished_run_only_shows_it():
    first = run("--out", "run")
    before = weights("run")
    assert run("--out", "run", "--resume") == json.loads(json.dumps(first))
    assert all(torch.equal(weights("run")[name], before[name]) for name in before)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
        capsys, monkeypatch):
    real = train.fine_prune

    def fine_prune(model, pruner, optimizer, micro_batches, step, *more):
        widths, loss, norm = real(model, pruner, optimizer, micro_batches, step, *more)
        return widths, loss * (math.nan if step > 9 else 1), norm

    monkeypatch.setattr(train, "fine_prune", fine_prune)
    assert_fails(capsys, [*SMALL, "--out", "run"], "no longer a finite number", "step 8 is kept", "--lr")
    assert torch.load("run/checkpoint.pt", weights_only=True)["progress"]["step"] == 8


# What makes it faster, or smaller.


@pytest.mark.parametrize("flags", [["--gradient-checkpointing"], ["--accumulate", 2, "--gradient-checkpointing"]])
def test_gradient_checkpointing_trains_the_same(flags):
    run("--method", "topv", "--out", "plain")
    run("--method", "topv", "--out", "again", *flags)
    for name, tensor in weights("plain").items():
        torch.testing.assert_close(weights("again")[name], tensor, rtol=0, atol=1e-5)


def test_compiled_blocks_train_the_same(monkeypatch):
    # Traced, and run as traced: without the minutes that it takes to make kernels.
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **how: compiled.append(self) or real(self, backend="eager", **how))
    run("--method", "gum", "--leftover", 0.5, "--out", "plain")
    assert not compiled
    run("--method", "gum", "--leftover", 0.5, "--out", "compiled", "--compile")
    assert len(compiled) == 2  # blocks
    for name, tensor in weights("plain").items():
        torch.testing.assert_close(weights("compiled")[name], tensor, rtol=0, atol=1e-4)


def test_the_similarity_can_see_fewer_tokens_and_resumes_to_the_same_bits(monkeypatch):
    run("--method", "gum", "--out", "all")
    run("--method", "gum", "--out", "few", "--sim-tokens", 8)
    assert any(not tensor.equal(weights("few")[name]) for name, tensor in weights("all").items())
    with monkeypatch.context() as patched:
        die_at(patched, (torch.optim.AdamW, "step"), 7)
        with pytest.raises(Killed):
            run("--method", "gum", "--out", "killed", "--sim-tokens", 8)
    run("--method", "gum", "--out", "killed", "--sim-tokens", 8, "--resume")
    assert_same_run("few", "killed")


# Mistakes.


def assert_fails(capsys, flags, *says):
    """The program ends with status 2 and one line that says all of `says`."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(sys, "argv", ["train.py", *map(str, flags)])
        train.main()
    assert stopped.value.code == 2
    line = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
    assert line.startswith("train.py: error: ")
    for words in says:
        assert words in line, line


@pytest.mark.parametrize("flags,says", [
    (["--method", "gumm"], ["gumm", "magnitude"]),
    (["--dataset", "wiki"], ["wiki", "stdlib"]),
    (["--model", "gpt5"], ["gpt5", "gpt2-medium", "owner/name"]),
    (["--leftover", "0"], ["--leftover", "(0, 1]"]),
    (["--leftover", "1.5"], ["--leftover", "(0, 1]"]),
    (["--leftover", "nan"], ["--leftover", "(0, 1]"]),
    (["--leftover", "a"], ["--leftover", "float"]),
    (["--steps", "0"], ["--steps", "above 0"]),
    (["--steps", "9", "--epochs", "1"], ["--steps", "--epochs", "one of them"]),
    (["--seed", "-1"], ["--seed", "from 0"]),
    (["--seed", "99999999999999999999"], ["--seed", "from 0"]),
    (["--lr", "-1"], ["--lr", "above 0"]),
    (["--lr", "inf"], ["--lr", "above 0"]),
    (["--lambda-sim", "2"], ["--lambda-sim", "(0, 1]"]),
    (["--methd", "gum"], ["--methd"]),
    (["--method", "none", "--leftover", "0.5"], ["--leftover", "all stay"]),
    (["--method", "soft", "--scope", "global"], ["--scope"]),
    (["--method", "random", "--lambda-gum", "1"], ["--lambda-gum"]),
    (["--teacher", "small"], ["--teacher", "--distill"]),
    (["--distill", "--label-smoothing", "0.1"], ["--label-smoothing"]),
    (["--device", "tpu"], ["tpu", "cuda or cpu"]),
    (["--block-size", "257"], ["257", "256"]),
    (["--model", "small", "--block-size", "129"], ["129", "128"]),
    (["--batch-size", "2", "--accumulate", "3"], ["--accumulate 3", "2"]),
    (["--resume"], ["nothing to resume", "without --resume"]),
    (["--method", "topv", "--sim-tokens", "8"], ["--sim-tokens", "gum"]),
    (["--sim-tokens", "0"], ["--sim-tokens", "above 0"]),
    (["--model", "small", "--distill", "--lr", "0.1"],
     ["--teacher", "python train.py --method none --model small --lr 0.1"]),
    (["--model", "small", "--distill", "--teacher", "nowhere"], ["nowhere"]),
    (["--dataset", "wikitext", "--data-path", "nowhere"], ["nowhere"]),
])
def test_a_mistake_gets_one_line_and_status_2(flags, says, capsys):
    assert_fails(capsys, flags, *says)
    assert not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(capsys):
    assert_fails(capsys, ["--device", "cuda"], "--device cpu")


def test_a_folder_without_a_model(capsys):
    os.mkdir("empty")
    assert_fails(capsys, ["--model", "empty"], "empty", "config.json")


def test_a_truncated_weights_file(capsys):
    os.truncate("small/model.safetensors", 5000)
    assert_fails(capsys, ["--model", "small"], "model.safetensors", "cut off")


def test_a_teacher_with_another_vocabulary(capsys):
    config = GPTConfig(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT(config).save_pretrained("other")
    assert_fails(capsys, ["--model", "small", "--distill", "--teacher", "other"], "300", "257")
    assert not Path("out").exists()


def test_a_model_without_neurons_is_not_pruned_further(capsys):
    config = GPTConfig(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, mlp_widths=(0,))
    GPT(config).save_pretrained("none")
    assert_fails(capsys, ["--model", "none"], "no MLP neurons left")
    assert run("--method", "none", "--out", "run", model="none")["leftover"] == 0


def test_a_finished_run_is_not_overwritten(capsys):
    run("--out", "run")
    assert_fails(capsys, ["--model", "small", "--out", "run"], "finished run", "--out")


def test_an_interrupted_run_is_not_overwritten(capsys, monkeypatch):
    with monkeypatch.context() as patched:
        die_at(patched, (train, "compare"), 1)
        with pytest.raises(Killed):
            run("--out", "run")
    assert_fails(capsys, [*SMALL, "--out", "run"], "interrupted", "--resume")
    other = [*SMALL, "--steps", 13, "--out", "run", "--resume"]
    assert_fails(capsys, other, "other settings", "steps is 12 there")
    Path("run/checkpoint.pt").write_bytes(b"half")
    assert_fails(capsys, [*SMALL, "--out", "run", "--resume"], "checkpoint.pt is damaged")


@pytest.mark.parametrize("file,content", [
    ("metrics.json", "[3]"), ("metrics.json", '{"a": 1}'), ("metrics.json", '{"settings": '),
    ("settings.json", "[3]"), ("log.jsonl", '{"loss": 1}\n'), ("log.jsonl", "{a}\n")])
def test_a_damaged_file_in_a_runs_folder_is_named(file, content, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        die_at(patched, (train, "compare"), 1)
        with pytest.raises(Killed):
            run("--out", "run")
    Path("run", file).write_text(content)
    assert_fails(capsys, [*SMALL, "--out", "run", "--resume"], file, "damaged", "remove run")


def test_a_damaged_run_beside_it_is_no_concern_of_a_run():
    os.makedirs("out/damaged")
    Path("out/damaged/metrics.json").write_text("{")
    run("--method", "topv")


def test_two_processes_never_make_the_same_run_at_once(capsys):
    process = start("--out", "run")
    wait_for("run/checkpoint.pt", process)
    flags = [*SMALL, "--dataset", "toysql", "--steps", 100_000, "--out", "run", "--resume"]
    assert_fails(capsys, flags, "another process", "run")
    process.kill()
    process.communicate()


def test_running_out_of_memory_gets_one_line(capsys, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(train, "train", out_of_memory)
    assert_fails(capsys, ["--model", "small"], "out of memory", "--accumulate")


def test_a_folder_that_is_no_run_is_not_touched(capsys):
    before = sorted(os.listdir("small"))
    assert_fails(capsys, ["--out", "small"], "small", "--out")
    assert sorted(os.listdir("small")) == before


def test_a_hub_name_without_a_network(capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "no-cache")
    assert_fails(capsys, ["--model", "somebody/gpt2-of-theirs"], "somebody/gpt2-of-theirs", "--model tiny")


# On real text.


@pytest.mark.parametrize("kind,flags", [("gpt2", []), ("gpt2", ["--distill"]), ("gpt_neo", [])])
def test_wikitext_with_the_real_vocabulary(kind, flags, monkeypatch, tmp_path):
    hub, vocabulary = SHARED / "hub" / "Salesforce" / "wikitext", SHARED / "tiktoken_cache"
    if not (hub.is_dir() and vocabulary.is_dir()):
        pytest.skip("no local copy of WikiText and of the GPT-2 vocabulary in ../shared")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    config = GPTConfig(n_positions=64, n_embd=16, n_layer=2, n_head=2, model_type=kind,
                       qkv_bias=kind == "gpt2", attn_scaled=kind == "gpt2",
                       windows=() if kind == "gpt2" else (None, 16))
    GPT(config).save_pretrained("start")
    text = ["--dataset", "wikitext", "--data-path", hub, "--data-config", "wikitext-2-v1"]
    if flags:
        run("--method", "none", *text, "--out", "out/dense", model="start")
    metrics = run("--method", "gum", *text, *flags, "--out", "out/run", model="start")
    assert sum(GPT.from_pretrained("out/run").config.mlp_widths) == 32
    assert metrics["result"]["val_loss"] < metrics["start"]["val_loss"]

"""A run from its command line to its folder: what it leaves, loses, and says to mistakes."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import tqdm
from safetensors.torch import load_file

import data
import train
from model import ALIGNED, GPT, GPTConfig
from prune import METHODS
from results import compare, runs
from results.bench import NEO
from results.compare import draw_training

ROOT = Path(__file__).parents[1]
PRUNING = [method for method in METHODS if method != "none"]
SMALL = ("--model small --steps 12 --batch-size 2 --block-size 32 --lr 0.01 --log-every 2 "
         "--checkpoint-every 4 --device cpu")
UNTAUGHT = "--distill --teacher small --alpha-ce 1 --alpha-kd 0"
STEP = torch.optim.AdamW, "step"
FILES = {"README.md", "config.json", "generation_config.json", "log.jsonl", "metrics.json",
         "model.safetensors", "tokenizer.json", "tokenizer_config.json"}  # of a finished run


@cache
def load_once(*args, real=data.load):
    """A data set as `data.load` gives it, its validation split cut short."""
    loaded = real(*args)
    if args[1] == "validation" and args[0] == "toysql":
        loaded.prompts = loaded.prompts[:50]
    elif args[1] == "validation":
        loaded.tokens = loaded.tokens[: 2000 if args[2] == 257 else 200]
    return loaded


def save_small(folder, **how):
    """A byte-level GPT-2 with two layers of 64 neurons."""
    torch.manual_seed(1)
    config = dict(vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2) | how
    GPT(GPTConfig(**config)).save_pretrained(folder)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Every test runs where nothing else is, next to the model `small`; data are read once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", load_once)
    monkeypatch.setattr(train, "draw_training", lambda *_: None)  # it takes half of the time
    save_small("small")


def run(flags, *words, model="small", steps=12):
    """A run on the small model; returns its metrics. Of a flag given twice, the last one counts."""
    flags = f"{SMALL} --model {model} --steps {steps} {flags}".split()
    return train.run(train.parse([*flags, *words]))


def in_double(monkeypatch):
    """Have runs train in float64, where other orders of adding up choose the same neurons."""
    real = train.load_model
    monkeypatch.setattr(train, "load_model", lambda *args: real(*args).double())


def assert_same_weights(a, b, atol=0.0):
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in (a, b))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def assert_same_run(a, b):
    """Of two runs' folders: the same weights, log and metrics, bit for bit, but for the times and
    the checksums of these."""
    assert_same_weights(a, b)
    varying = r'"\w*seconds?": [^,}\n]+|"command": "[^\n]*|"log": \[[^]]*\]|"crc32": \d+'
    for file in ("log.jsonl", "metrics.json"):
        first, second = (re.sub(varying, "", Path(folder, file).read_text()) for folder in (a, b))
        assert first == second


def program(capsys, flags):
    """`python train.py` with these flags, in this process: its exit status and last line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags.split()])
        try:
            status = train.main() or 0
        except SystemExit as stopped:
            status = stopped.code
    return status, capsys.readouterr().err.strip().rpartition("\n")[2]


def assert_fails(capsys, flags, says):
    """The program ends with status 2, and one line that has everything in `says`, split at |."""
    status, line = program(capsys, f"--device cpu {flags}")
    assert status == 2 and line.startswith("train.py: error: ")
    assert [words for words in says.split("|") if words not in line] == [], line


# What a run leaves.


@pytest.mark.parametrize("flags,leftover,kept", [  # neurons of each of the layers, or of both
    ("none", 1, [64, 64]), ("magnitude", 0.1, [6, 6]), ("random", 0.5, [32, 32]),
    ("topv", 0.25, [16, 16]), ("gum", 0.3, 38),
    ("soft --tau 0.9999 --mask-lr 0.1", 0.25, [16, 16]),  # none reach that threshold
    ("gum --lambda-gum 0", 0.5, 64), ("gum --scope layer", 0.5, [32, 32]),
    ("topv --lambda-gum 10", 0.5, [32, 32]), ("random --scope global", 0.5, 64),
    ("topv --scope 30,2", 0.25, [30, 2]), ("gum --scope 0,32 --prune-until 0.3", 0.25, [0, 32])])
def test_a_finished_run_has_its_files_and_the_wanted_number_of_neurons(flags, leftover, kept):
    metrics = run(f"--method {flags} --leftover {leftover} --out run")
    model = GPT.from_pretrained("run")
    widths = list(model.config.mlp_widths)
    files = {*FILES, "modeling_pruned.py"} if len(set(widths)) > 1 else FILES
    assert {*os.listdir("run")} == files
    assert (widths if isinstance(kept, list) else sum(widths)) == kept
    assert widths == metrics["result"]["widths"] == [len(block.mlp.c_fc.bias) for block in model.h]
    assert metrics["leftover"] == sum(widths) / 128 and metrics["leftover_wanted"] == leftover


def test_neurons_leave_from_and_until_when_they_are_asked_to():
    run("--method random --leftover 0.5 --prune-from 0.3 --prune-until 0.8 --log-every 1 --out run",
        steps=20)
    shares = [json.loads(line)["v_t"] for line in open("run/log.jsonl")]
    assert [shares[step - 1] for step in (6, 16, 20)] == [1.0, 0.5, 0.5]
    assert 1.0 > shares[6] > shares[14] > 0.5


def test_the_saved_model_has_learned_and_is_the_one_that_was_evaluated():
    metrics = run("--method gum --leftover 0.5 --eval-every 6 --out run", steps=30)
    result, model = metrics["result"], GPT.from_pretrained("run").double()
    assert result["val_loss"] < metrics["start"]["val_loss"] - 1
    blocks = load_once("stdlib", "validation", 257, 32, None, None)
    idx, targets, _ = blocks.batch(range(len(blocks)))
    with torch.no_grad():
        loss = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).item()
    assert result["val_loss"] == pytest.approx(loss, rel=1e-5)  # it is computed in float32
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    log = [json.loads(line) for line in open("run/log.jsonl")]
    assert [line["step"] for line in log if "val_loss" in line] == [6, 12, 18, 24]


def test_the_log_has_a_line_every_interval_and_evaluation_and_follows_the_schedule():
    run("--method topv --leftover 0.25 --eval-every 3 --out run", steps=20)
    log = [json.loads(line) for line in open("run/log.jsonl")]
    assert [line["step"] for line in log] == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20]
    assert [line["step"] for line in log if "val_loss" in line] == [3, 6, 9, 12, 15, 18]
    assert log[0]["v_t"] == log[0]["leftover"] == 1.0  # two of twenty steps are warm-up
    assert log[-1]["v_t"] == log[-1]["leftover"] == 0.25
    assert all(a["v_t"] >= b["v_t"] for a, b in zip(log, log[1:]))
    assert log[0]["lr"] == 1e-2 and log[-1]["lr"] == 0.0


def test_the_name_of_the_folder_tells_the_settings_whatever_is_beside_it():
    os.makedirs("out/damaged")
    Path("out/damaged/metrics.json").write_text("{")
    run("--method topv --leftover 0.25 --scope global --seed 3 --block-size 64")
    (folder,) = {path.name for path in Path("out").iterdir()} - {"damaged"}
    assert re.fullmatch(r"topv-stdlib-small-0.25-block-size-64-steps-12-\w{8}-seed3", folder)


def test_other_settings_have_other_names_none_longer_than_60_characters():
    flags = ["", "--steps 9", "--lr 0.1", "--scope layer", "--scope layer --lr 0.1", "--distill",
             "--batch-size 7 --lr 0.1 --weight-decay 0.2 --eps 1e-5 --lambda-gum 3",
             "--batch-size 7 --lr 0.1 --weight-decay 0.2 --eps 1e-5 --lambda-gum 4",
             f"--dataset wikitext --data-config a/b --model {'m' * 99}", f"--model {'m' * 98}n"]
    names = [train.resolve(train.parse(f"--device cpu {words}".split())).out for words in flags]
    assert len(set(names)) == len(flags) and max(len(Path(name).name) for name in names) <= 60
    assert names[:2] == ["out/gum-stdlib-tiny-0.25-seed0", "out/gum-stdlib-tiny-0.25-steps-9-seed0"]
    assert all(name.count("/") == 1 for name in names)


def test_a_text_of_ones_own_gives_its_runs_their_name():
    names = {path: train.resolve(train.parse(["--dataset", "wikitext", "--data-path", path])).out
             for path in ("a/my notes", "a/b/", ".", "copies/Salesforce/wikitext")}
    assert [name.removesuffix("-tiny-0.25-seed0") for name in names.values()] == [
        "out/gum-my_notes", "out/gum-b", "out/gum-wikitext", "out/gum-wikitext"]


def test_uniqueness_weighs_as_much_when_distilling_but_for_the_papers_samsum():
    weights = {words: train.resolve(train.parse(f"--device cpu {words}".split())).lambda_gum
               for words in ("", "--distill", "--dataset samsum", "--dataset samsum --distill",
                             "--dataset samsum --distill --method topv")}
    assert [*weights.values()] == [10, 10, 10, 100, 0]


def test_gpt2_on_samsum_has_the_papers_rate_of_scores_whoever_it_is_from():
    rates = [train.resolve(train.parse(f"--device cpu --dataset samsum --model {model}".split()))
             .mask_lr for model in ("gpt2", "openai-community/gpt2", "copies/gpt2", "gpt2-medium")]
    assert rates == [1e-3, 1e-3, 1e-3, 1e-2]


def test_the_log_has_means_of_the_steps_since_its_last_line():
    run("--method topv --log-every 1 --out each")
    run("--method topv --log-every 4 --out some")
    each, some = ([json.loads(line) for line in open(f"{folder}/log.jsonl")]
                  for folder in ("each", "some"))
    assert [line["step"] for line in each] == [*range(1, 13)]
    for n, line in enumerate(some):
        for name in "loss", "grad_norm":
            values = [one[name] for one in each[4 * n : 4 * n + 4]]
            assert line[name] == pytest.approx(sum(values) / 4, rel=1e-5)


def test_the_log_has_the_weights_rate():
    run("--method soft --leftover 0.25 --log-every 6 --out run")
    assert json.loads(open("run/log.jsonl").readline())["lr"] == pytest.approx(0.01 * 6 / 11)


def test_a_validation_loss_on_the_way_is_the_pruned_models(monkeypatch):
    seen, real = [], train.measure.mean_loss
    monkeypatch.setattr(train.measure, "mean_loss", lambda model, examples, *rest: (
        seen.append([len(block.mlp.kept_weights()[1]) for block in model.h])
        or real(model, examples, *rest)))
    run("--method random --leftover 0.25 --eval-every 10 --out run")
    line = next(json.loads(line) for line in open("run/log.jsonl") if "val_loss" in line)
    assert line["widths"] == seen[0] == [16, 16]


def test_seconds_are_those_of_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(
        perf_counter=lambda: now[0], monotonic=lambda: 0.0))

    def takes(seconds, function):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    monkeypatch.setattr(train, "check_finite", takes(7, train.check_finite))
    monkeypatch.setattr(train.measure, "mean_loss", takes(100, train.measure.mean_loss))
    monkeypatch.setattr(train, "save", takes(1000, train.save))
    flags = "--method none --log-every 4 --checkpoint-every 6 --eval-every 4 --accumulate 2"
    metrics = run(f"{flags} --out run")
    assert metrics["seconds"] == 4 * 7  # in steps 4, 6, 8, 12
    assert metrics["tokens"] == 12 * 2 * 32
    assert metrics["tokens_per_second"] == metrics["tokens"] / metrics["seconds"]


# The ways through: tiny, pruned starts, epochs, teachers, and what changes nothing but rounding.


def test_tiny_is_first_trained_dense_and_that_run_is_reused():
    run("--method gum --eval-every 4", model="tiny", steps=4)
    (dense,) = Path("out").glob("none-*")
    before = (dense / "metrics.json").read_bytes()
    metrics = run("--method topv --distill --eval-every 4", model="tiny", steps=4)
    assert [path.name for path in Path("out").glob("none-*")] == [dense.name]
    assert (dense / "metrics.json").read_bytes() == before
    assert metrics["start"]["val_loss"] == json.loads(before)["result"]["val_loss"]


def test_a_finished_run_can_be_pruned_further():
    half = run("--method topv --leftover 0.5 --out half")["result"]
    quarter = run("--method gum --leftover 0.5 --out quarter", model="half")["result"]
    assert quarter["parameters"] < half["parameters"] and sum(quarter["widths"]) == 32
    assert list(GPT.from_pretrained("quarter").config.mlp_widths) == quarter["widths"]


@pytest.mark.parametrize("flags,evaluated", [
    ("", 1), ("--block-size 64", 2), ("--dtype bfloat16", 2), ("--dataset toysql", 2)])
def test_a_run_that_another_starts_from_is_not_evaluated_again_in_the_same_way(
        flags, evaluated, monkeypatch):
    before, models = run("--method none --block-size 128 --out dense")["result"], []
    real = compare.mean_loss
    monkeypatch.setattr(compare, "mean_loss", lambda *of: models.append(of[0]) or real(*of))
    start = run(f"--method topv --block-size 128 {flags} --out run", model="dense")["start"]
    assert len(models) == evaluated
    assert (start["val_loss"] == before["val_loss"]) == (evaluated == 1)


def test_a_run_is_timed_in_its_precision_and_at_widths_that_a_gpu_likes(monkeypatch):
    def noted(models, idx):
        assert torch.is_autocast_enabled("cpu")
        return [sum(model.config.mlp_widths) for model in models]  # for their speeds

    monkeypatch.setattr(compare, "prefill_speed", noted)
    monkeypatch.setitem(ALIGNED, "cpu", 8)
    metrics = run("--method topv --dtype bfloat16 --leftover 0.3 --out run")
    assert metrics["result"]["widths"] == [19, 19]
    assert [metrics[name]["prefill_tokens_per_second"] for name in ("start", "result")] == [128, 48]


def test_reading_is_timed_without_the_logits_that_nobody_asks_for(monkeypatch):
    # All logits of a large batch would take more memory than training it did.
    model, idx, made = runs.load_model("small"), torch.randint(257, (3, 20)), []
    wanted, real = model(idx)[0][:, -1], F.linear  # [B, V]
    monkeypatch.setattr(F, "linear", lambda *args: made.append(real(*args)) or made[-1])
    compare.prefill_speed([model], idx, rounds=1)
    logits = [out for out in made if out.size(-1) == 257]
    assert len(logits) == 2 and all(out.shape == wanted.shape for out in logits)
    torch.testing.assert_close(logits[0], wanted)


@pytest.mark.parametrize("how", ["", " --accumulate 2"])
def test_epochs_set_the_steps(how):
    epochs = 10 / len(load_once("stdlib", "train", 257, 32, None, None))
    flags = f"--model small --block-size 32 --batch-size 2 --device cpu --out run{how} --epochs"
    assert train.run(train.parse([*flags.split(), str(epochs)]))["steps"] == 5


@pytest.mark.parametrize("one,other", [
    ("none", "none --accumulate 4"), ("gum", "gum --accumulate 4"),
    ("gum --sim-tokens 8", "gum --sim-tokens 8 --accumulate 2"),
    ("topv --distill --teacher small", "topv --distill --teacher small --accumulate 2"),
    ("topv", "topv --gradient-checkpointing"), ("gum", "gum --compile"),
    ("gum", "gum --gradient-checkpointing --accumulate 2"),
    ("obs --prune-until 0.7", "obs --prune-until 0.7 --compile"),
    ("obs --prune-until 0.7", "obs --prune-until 0.7 --gradient-checkpointing --accumulate 2"),
    ("topv", f"topv {UNTAUGHT}"), ("gum", f"gum {UNTAUGHT} --lambda-gum 10"),
    *(("none", f"{method} --leftover 1") for method in PRUNING)])
def test_two_ways_to_the_same_weights(one, other, monkeypatch):
    # Traced blocks are run as traced, without the minutes that it takes to make kernels.
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled.append(block)
                        or real(block, backend="eager", **how))
    in_double(monkeypatch)
    run(f"--batch-size 4 --method {one} --out one")
    if "--compile" in other:  # with widths as on a GPU
        monkeypatch.setitem(ALIGNED, "cpu", 8)
    run(f"--batch-size 4 --method {other} --out other")
    assert_same_weights("one", "other", 1e-9)
    assert len(compiled) == (2 if "--compile" in other else 0)  # blocks


def test_the_similarity_can_see_fewer_tokens():
    run("--method gum --out all")
    run("--method gum --sim-tokens 8 --out few")
    with pytest.raises(AssertionError):
        assert_same_weights("all", "few")


@pytest.mark.parametrize("method", PRUNING)
def test_layers_that_lose_every_neuron_still_train_save_load_and_export(method):
    save_small("uneven", mlp_widths=(64, 8))
    tau = "--tau 0.9999 --mask-lr 0.1" if method == "soft" else ""  # then none reaches it
    metrics = run(f"--method {method} --leftover 0.02 {tau} --out run", model="uneven")
    assert sorted(metrics["result"]["widths"]) == [0, 1]
    assert math.isfinite(metrics["result"]["val_loss"])
    model = GPT.from_pretrained("run")
    model.save_pretrained("padded", pad=True)
    padded, idx = GPT.from_pretrained("padded"), torch.randint(257, (2, 20))
    ours, theirs = (model.double()(idx)[0] for model in (model, padded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_distillation_lowers_kl_to_the_teacher():
    run("--method none --out teacher", steps=100)
    teacher = GPT.from_pretrained("teacher")
    idx = load_once("stdlib", "validation", 257, 32, None, None).batch(range(62))[0]

    def kl(flags):
        run(f"--method topv --leftover 0.1 --out {flags}", model="teacher", steps=30)
        models = teacher, GPT.from_pretrained(flags.split()[0])
        with torch.no_grad():
            p, q = (model(idx)[0].log_softmax(-1) for model in models)
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert kl("distilled --distill --teacher teacher") < 0.8 * kl("plain")
    told = {name: runs.read_run(name).metrics["teacher"] for name in ("distilled", "plain")}
    assert told == dict(distilled="teacher", plain=None)


def test_a_teacher_is_found_by_data_model_and_seed(capsys):
    run("--method none --seed 4 --out out/other-seed")
    run("--method none --seed 5 --out out/same-seed", steps=6)
    run("--method topv --seed 5 --distill")
    assert "teacher: out/same-seed" in capsys.readouterr().err


@pytest.mark.parametrize("how,flags", [
    ({}, "--distill --teacher start"), (NEO | dict(windows=(None, 16)), "")])
def test_wikitext_with_the_real_vocabulary(how, flags, monkeypatch):
    hub, vocabulary = (ROOT.parent / "shared" / name for name in ("hub", "tiktoken_cache"))
    if not ((hub / "Salesforce/wikitext").is_dir() and vocabulary.is_dir()):
        pytest.skip("no local copy of WikiText and of the GPT-2 vocabulary in ../shared")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabulary))
    save_small("start", vocab_size=50257, **how)
    metrics = run(f"--method gum {flags} --dataset wikitext --data-config wikitext-2-v1 --out run",
                  "--data-path", str(hub / "Salesforce/wikitext"), model="start")
    assert sum(GPT.from_pretrained("run").config.mlp_widths) == 32
    assert metrics["result"]["val_loss"] < metrics["start"]["val_loss"]


def test_an_epoch_has_every_sequence_once_in_an_order_of_its_own_and_of_the_seed():
    orders = {}
    for seed in 0, 1:
        batches = [train.batch_indices(step, 10, 4, seed) for step in range(1, 6)]
        assert all(len(batch) == 4 for batch in batches)
        places = sum(batches, [])  # two epochs, cut in the middle of a batch
        orders[seed] = places[:10], places[10:]
        assert all(sorted(order) == list(range(10)) for order in orders[seed])
    assert len({tuple(order) for both in orders.values() for order in both}) == 4


def test_the_seed_decides_the_first_weights_and_the_random_scores(monkeypatch):
    # Else the seed also decides the order of the data.
    monkeypatch.setattr(train, "batch_indices", lambda *_: [0, 1])
    for seed in 0, 1:
        run(f"--method random --leftover 0.5 --seed {seed} --lr 1e-9 --out random{seed}")
    a, b = (GPT.from_pretrained(f"random{seed}").h[0].mlp.c_fc.weight for seed in (0, 1))
    assert a.shape == b.shape and (a - b).abs().max() > 0.1
    a, b = (train.load_model("tiny", SimpleNamespace(seed=seed, device="cpu")) for seed in (0, 1))
    assert not torch.equal(a.wte.weight, b.wte.weight)


def test_the_similarity_sees_other_random_tokens_at_every_step_and_seed(monkeypatch):
    seeds, real = [], data.micro_batches
    monkeypatch.setattr(data, "micro_batches", lambda *args: seeds.append(args[-1]) or real(*args))
    for seed in 0, 1:
        run(f"--method gum --sim-tokens 8 --seed {seed} --out run{seed}")
    assert len(set(seeds)) == len(seeds) == 24


def test_tiny_is_pruned_from_its_dense_run_and_another_model_from_itself(monkeypatch):
    began, real = [], train.train
    monkeypatch.setattr(train, "train", lambda args, steps, model, teacher, *rest: (
        began.append([one and runs.model_state(one) for one in (model, teacher)])
        or real(args, steps, model, teacher, *rest)))
    run("--method gum --distill", model="tiny", steps=4)
    (dense,) = Path("out").glob("none-*")
    dense = runs.model_state(GPT.from_pretrained(dense))
    assert began[1] == [dense, dense] != began[0]
    began.clear()
    run("--method none --out out/dense")
    run("--method topv --distill --out out/run")
    small, dense = (runs.model_state(GPT.from_pretrained(one)) for one in ("small", "out/dense"))
    assert began == [[small, None], [small, dense]]


@pytest.mark.parametrize("flag, value", [
    ("lambda_mvp", 7.0), ("lambda_gum", 3.0), ("lambda_sim", 0.25), ("mask_lr", 0.5)])
def test_a_flag_of_pruning_reaches_the_pruner(flag, value, monkeypatch):
    made, real = [], train.Pruner
    monkeypatch.setattr(train, "Pruner", lambda *args, **how: made.append(real(*args, **how))
                        or made[-1])
    run(f"--method gum --out run --{flag.replace('_', '-')} {value}", steps=2)
    assert getattr(made[0], flag) == value


def test_the_flags_defaults_are_the_papers():
    def settings(words):
        return vars(train.resolve(train.parse(f"--device cpu {words}".split())))

    paper = dict(epochs=5.0, steps=None, batch_size=8, lr=5e-4, eps=1e-4, weight_decay=0.1,
                 mask_lr=1e-2, lambda_mvp=2.0, lambda_gum=10.0, lambda_sim=0.99, scope="global",
                 prune_from=0.1, prune_until=0.7, leftover=0.25)
    gpt2 = settings("--model gpt2 --dataset wikisql --distill")
    assert gpt2.items() >= (paper | dict(alpha_ce=0.5, alpha_kd=0.5, temperature=2.0)).items()
    assert settings("--model gpt2 --dataset samsum")["epochs"] == 3.0
    tiny = settings("--dataset toysql")
    assert tiny.items() >= dict(steps=1000, epochs=None, batch_size=32, lr=5e-3, eps=1e-8).items()
    obs = dict(scope="global", lambda_sim=0.1, prune_from=0.0, prune_until=0.1)
    assert settings("--method obs").items() >= obs.items()
    assert settings("--method soft").items() >= dict(mask_lr=10.0, tau=0.1).items()
    assert train.BLOCK_SIZE == dict(stdlib=64, toysql=256, wikisql=512, e2e=512, wikitext=1024,
                                    samsum=1024)


@pytest.mark.parametrize("wanted", ["bfloat16", "float32"])
def test_the_precision_asked_for_is_trained_in(wanted, monkeypatch):
    seen, real = set(), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, **how: seen.add((x.dtype, torch.is_grad_enabled()))
                        or real(x, **how))
    run(f"--method topv --dtype {wanted} --out run", steps=3)
    assert {dtype for dtype, trains in seen if trains} == {getattr(torch, wanted)}


def test_blocks_are_computed_twice_where_memory_is_short(monkeypatch):
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("model.checkpoint", lambda *args, **how: calls.append(1)
                        or real(*args, **how))
    run("--method topv --gradient-checkpointing --out run", steps=3)
    assert len(calls) == 3 * 2


# Nothing is lost.


class Killed(BaseException):
    """Stands for a kill -9: nothing catches it."""


def die(*_):
    raise Killed


def hook(patch, owner, name, call, before=None, after=None):
    """Have `before` or `after` called, too, at the `call`-th call of `owner.name` (from 1)."""
    real, calls = getattr(owner, name), count(1)

    def hooked(*args, **kwargs):
        now = next(calls) == call
        if now and before:
            before(*args)
        result = real(*args, **kwargs)
        if now and after:
            after(*args)
        return result

    patch.setattr(owner, name, hooked)


def killed_run(death, flags, **how):
    """A run that ends at once in one of the DEATHS, or at such a place."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        hook(patch, *DEATHS.get(death, death))
        run(flags, **how)


DEATHS = {"while saving": (torch, "save", 2, lambda _, file: die(file.write(b"PK half"))),
          "before what is saved is in place": (torch, "save", 2, None, die),
          "in the middle of a step": (*STEP, 7, die),
          "between two steps": (*STEP, 10, None, die),
          "before the first checkpoint": (*STEP, 3, None, die),
          "after training": (train, "compare", 1, die)}


@pytest.mark.parametrize("method,death", [
    *(("gum", death) for death in DEATHS),
    *((method, "in the middle of a step") for method in (*METHODS, "gum --sim-tokens 8"))])
def test_a_killed_run_resumes_bit_for_bit(method, death):
    run(f"--method {method} --out whole")
    killed_run(death, f"--method {method} --out killed")
    run(f"--method {method} --out killed --resume")
    assert_same_run("whole", "killed")


def test_a_killed_distilled_tiny_run_resumes_even_if_killed_in_its_dense_run():
    flags, how = "--method gum --distill --eval-every 3", dict(model="tiny", steps=5)
    run(flags, **how)
    for path in Path("out").iterdir():
        path.rename(path.name + "-whole")
    killed_run((*STEP, 5, None, die), flags, **how)  # the last step of the dense run
    killed_run((*STEP, 4, None, die), flags + " --resume", **how)
    run(flags + " --resume", **how)
    assert len(os.listdir("out")) == 2
    for path in Path("out").iterdir():
        assert_same_run(path, path.name + "-whole")


HANGS = """import os, sys, torch, data, pytest, train
from test_train import STEP, hook, load_once
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
data.load = load_once
hook(pytest.MonkeyPatch(), *STEP, 7, lambda _: print("hangs", flush=True) or sys.stdin.read())
train.main()"""


def test_a_run_is_one_process_s_until_kill_9_and_then_resumes_to_the_same_bits(capsys):
    flags = f"{SMALL} --dataset toysql --block-size 128 --out"
    threads = str(torch.get_num_threads())  # other bits with another number
    env = os.environ | dict(OMP_NUM_THREADS=threads, PYTHONPATH=f"{ROOT}:{ROOT}/tests")
    with subprocess.Popen([sys.executable, "-c", HANGS, *flags.split(), "killed"], text=True,
                          env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "hangs\n"  # in the middle of its 7th step
        assert_fails(capsys, f"{flags} killed --resume", "another process is at work|killed")
        process.kill()
    assert program(capsys, f"{flags} whole")[0] == 0
    assert torch.load("killed/checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    assert program(capsys, f"{flags} killed --resume")[0] == 0
    assert_same_run("whole", "killed")


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_a_run_after_a_step_and_it_says_how_to_go_on(sent, capsys, monkeypatch):
    flags = f"{SMALL} --method topv --out run"
    with monkeypatch.context() as patch:
        if signal.getsignal(getattr(signal, sent)) == signal.SIG_IGN:
            pytest.skip(f"{sent} is ignored here, as nohup has it")
        hook(patch, *STEP, 7, lambda _: signal.raise_signal(getattr(signal, sent)))
        status, line = program(capsys, flags)
    assert status == 130
    assert line == ("stopped after step 7 of 12, which is saved in run/checkpoint.pt; go on with: "
                    f"python train.py {flags} --resume")
    assert program(capsys, f"{flags} --resume")[0] == 0
    program(capsys, f"{flags} --out whole")
    assert_same_run("run", "whole")


def test_a_checkpoint_is_written_every_ten_minutes_too(monkeypatch):
    # The clock is read at the start, after each step, and when something has been saved.
    minutes, saved = count(0, 4), []
    monkeypatch.setattr(train.time, "monotonic", lambda: 60 * next(minutes))
    monkeypatch.setattr(train, "save", lambda _, progress, *rest: saved.append(progress.step))
    run("--method topv --checkpoint-every 100 --out run")
    assert saved == [3, 6, 9, 12]


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            hook(patch, *STEP, 7, lambda _: signal.raise_signal(signal.SIGTERM))
            assert run("--method topv --out run")["steps"] == 12
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_in_the_dense_run_says_how_to_go_on(capsys):
    flags = TINY.replace("--steps 2", "--steps 5")
    with pytest.MonkeyPatch.context() as patch:
        hook(patch, *STEP, 3, lambda _: signal.raise_signal(signal.SIGINT))
        status, line = program(capsys, flags)
    assert status == 130 and line.endswith(f"; go on with: python train.py {flags} --resume")
    assert program(capsys, f"{flags} --resume")[0] == 0


def test_ctrl_c_while_the_end_is_written_says_how_to_go_on(capsys, monkeypatch):
    flags = f"{SMALL} --method topv --out run"
    with monkeypatch.context() as patch:
        hook(patch, train, "compare", 1, lambda *_: signal.raise_signal(signal.SIGINT))
        status, line = program(capsys, flags)
    assert (status, line) == (130, f"stopped; go on with: python train.py {flags} --resume")
    assert program(capsys, f"{flags} --resume")[0] == 0
    program(capsys, f"{flags} --out whole")
    assert_same_run("run", "whole")


@pytest.mark.parametrize("flags", ["--method topv", f"--method topv {UNTAUGHT} --teacher taught"])
def test_another_model_or_teacher_than_a_run_began_with_is_noticed(flags, capsys):
    save_small("taught")
    killed_run("in the middle of a step", f"{flags} --out run")
    before = contents("run")
    other = "taught" if "taught" in flags else "small"
    save_small(other, layer_norm_epsilon=1e-6)
    assert_fails(capsys, f"{SMALL} {flags} --out run --resume", "another --model, teacher|run")
    assert contents("run") == before
    save_small(other)
    run(f"{flags} --out run --resume")


@pytest.mark.parametrize("way", ["another folder of that name", "in its place", "beside"])
def test_the_dense_run_of_another_model_is_no_teacher(way, capsys):
    for folder, eps in ("a/m", 1e-5), ("b/m", 1e-6):
        save_small(folder, layer_norm_epsilon=eps)
    flags = f"{SMALL.replace('small', 'a/m')} --dataset toysql --block-size 128"
    assert program(capsys, f"{flags} --method none")[0] == 0
    if way == "another folder of that name":
        flags = flags.replace("a/m", "b/m")
    else:
        save_small("a/m", layer_norm_epsilon=1e-6)
    if way == "beside":
        (dense,) = Path("out").iterdir()
        dense.rename("out/other")
    assert_fails(capsys, f"{flags} --distill --out out/run", "started from another|/m|move it away")


TINY = "--model tiny --dataset toysql --block-size 128 --batch-size 2 --steps 2 --device cpu"


@pytest.mark.parametrize("flags, told", [
    ("--method none --seed 5", "seed is 5 there"), ("--method topv --out other", "topv")])
def test_what_stands_in_for_the_dense_run_has_to_be_it(flags, told, capsys):
    dense = train.resolve(train.parse(f"{TINY} --method none".split())).out
    assert program(capsys, f"{TINY} {flags}")[0] == 0
    made = train.resolve(train.parse(f"{TINY} {flags}".split())).out
    shutil.rmtree(dense, ignore_errors=True)
    shutil.copytree(made, dense)
    before = contents(dense)
    assert_fails(capsys, TINY, f"{dense} has other settings|{told}|move it away")
    assert contents(dense) == before


def test_a_run_does_not_lie_where_its_dense_model_goes(capsys):
    dense = train.resolve(train.parse(f"{TINY} --method none".split())).out
    assert_fails(capsys, f"{TINY} --out ./{dense}", "dense|another --out")


def test_evaluations_take_their_share_of_the_training(monkeypatch):
    shares, real = [], data.load
    monkeypatch.setattr(train.measure, "mean_loss", lambda *args: shares.append(args[3]) or 1.0)

    def ten_batches(*args):
        loaded = real(*args)
        if args[1] == "validation":
            loaded = data.Blocks(loaded.tokens[:1].repeat(10 * 2048), 32, 256)
            loaded.about = dict(source="", sha256="", tokens=10 * 2048)
        return loaded

    monkeypatch.setattr(data, "load", ten_batches)
    for steps, size, every, expected in [(12, 2, None, []), (10, 50, 5, [10]), (10, 300, 5, [4]),
                                         (20, 170, None, [8] * 4), (20, 450, None, [3] * 4)]:
        shares.clear()
        flags = f"--dataset stdlib --batch-size {size} --out run-{size}"
        run(flags + f" --eval-every {every}" * bool(every), steps=steps)
        assert shares == expected  # 10 / share batches: an eighth of those trained on meanwhile


def test_seconds_have_what_the_device_still_computes(monkeypatch):
    now, real = [0.0], train.check_finite
    monkeypatch.setattr(train, "time", Mock(perf_counter=lambda: now[0], monotonic=lambda: 0.0))

    def waits(*args):
        now[0] += 7
        return real(*args)

    monkeypatch.setattr(train, "check_finite", waits)
    assert run("--method none --log-every 4 --checkpoint-every 6 --out run")["seconds"] == 4 * 7


def test_tensorboard_gets_what_the_log_has(capsys):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    flags = "--method topv --out run --tensorboard"
    killed_run("in the middle of a step", flags)
    run(f"{flags} --resume")
    events = accumulator("run").Reload()
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert len(lines) > 5 and set(lines[0]) - {"step", "widths", "val_loss"} < set(
        events.Tags()["scalars"])
    for line in lines:
        values = line | {f"width {n}": width for n, width in enumerate(line.pop("widths"), 1)}
        for name, value in values.items():
            if name not in ("step", "seconds", "tokens_per_second", "widths"):
                told = [event.value for event in events.Scalars(name) if event.step == line["step"]]
                assert told[-1] == pytest.approx(value)


def test_tensorboard_that_is_not_installed_is_told_before_anything_is_read(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert_fails(capsys, f"{SMALL} --out run --tensorboard", "pip install tensorboard")
    assert not Path("run").exists()


def test_a_run_draws_its_curves(monkeypatch):
    monkeypatch.setattr(train, "draw_training", draw_training)
    run("--method topv --out run")
    assert Path("run/training.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_overwritten_and_resuming_only_shows_it(capsys):
    metrics = run("--out run")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert_fails(capsys, "--model small --out run", "finished run|--out")
    assert run("--out run --resume") == json.loads(json.dumps(metrics))
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(capsys, monkeypatch):
    hook(monkeypatch, *STEP, 9, None,
         lambda optimizer: optimizer.param_groups[0]["params"][0].data.fill_(math.nan))
    assert_fails(capsys, f"{SMALL} --out run", "no longer a finite number|step 8 is kept|--lr")
    assert torch.load("run/checkpoint.pt", weights_only=True)["progress"]["step"] == 8


# Mistakes.


@pytest.mark.parametrize("out", ["small/config.json/run", "small/config.json"])
def test_a_folder_that_can_t_be_made_is_told_before_data_are_read(out, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    assert_fails(capsys, f"{SMALL} --out {out}", "small/config.json|--out")


@pytest.mark.parametrize("flags,says", [
    ("--method gumm", "gumm|magnitude"), ("--dataset wiki", "wiki|stdlib"),
    ("--model gpt5", "gpt5|gpt2-medium|owner/name"), ("--device tpu", "tpu|allowed here is cpu"),
    ("--leftover 0", "--leftover|(0, 1]"), ("--leftover 1.5", "--leftover|(0, 1]"),
    ("--leftover nan", "--leftover|(0, 1]"), ("--leftover a", "--leftover|float"),
    ("--seed -1", "--seed|from 0"), ("--seed 99999999999999999999", "--seed|from 0"),
    ("--lr -1", "--lr|above 0"), ("--lr inf", "--lr|above 0"), ("--steps 0", "--steps|above 0"),
    ("--lambda-sim 2", "--lambda-sim|(0, 1]"), ("--sim-tokens 0", "--sim-tokens|above 0"),
    ("--steps 9 --epochs 1", "--steps|--epochs|one of them"), ("--methd gum", "--methd"),
    ("--method none --leftover 0.5", "--leftover|--method none"), ("--out small", "small|--out"),
    ("--method soft --scope global", "--scope"),
    ("--scope wide", "wide is not layer, global"), ("--scope 3,", "3, is not layer, global"),
    ("--model small --scope 9,9,9", "does not fit the layers' widths: 64,64"),
    ("--model small --scope 65,9", "does not fit"),
    ("--model small --scope 30,2 --leftover 0.5", "leaves 32 of 128 neurons: add --leftover 0.25"),
    ("--model small --scope 0,0", "--scope 0,0 leaves no neuron at all"),
    ("--out \udcff", "--out|UTF-8"),
    ("--prune-until 0", "in (0, 1]"), ("--prune-from 1", "in [0, 1)"),
    ("--model small --prune-from 0.8", "--prune-from 0.8 is after --prune-until 0.7"),
    ("--model small --method obs --prune-from 0.2", "--prune-until 0.1"),
    ("--method none --prune-until 0.3", "--prune-until means nothing with --method none"),
    ("--teacher small", "--teacher|--distill"),
    ("--method random --lambda-gum 1", "--lambda-gum"),
    *((f"--method {method} {flag} 1", f"{flag} means nothing with --method {method}")
      for method, flag in (("random", "--mask-lr"), ("magnitude", "--lambda-mvp"), ("gum", "--tau"),
                           ("topv", "--lambda-sim"), ("soft", "--lambda-sim"))),
    ("--distill --alpha-ce 0 --alpha-kd 0", "--alpha-ce 0 with --alpha-kd 0"),
    ("--model small --dataset toysql --batch-size 20001", "--batch-size 20001|on, 20000"),
    ("--model empty", "empty|config.json"),
    ("--method topv --sim-tokens 8", "--sim-tokens|gum"), ("--block-size 257", "257|256"),
    ("--distill --label-smoothing 0.1", "--label-smoothing"),
    ("--compile --gradient-checkpointing", "--compile|--gradient-checkpointing"),
    ("--model small --distill --teacher nowhere", "nowhere"),
    ("--model small --distill --teacher wide", "300|257"), ("--resume", "nothing|without --resume"),
    ("--model small --distill --lr 0.1", "--teacher|python train.py --method none --model small"),
    ("--model small --block-size 129", "129|128"), ("--model cut", "model.safetensors|cut off"),
    ("--batch-size 2 --accumulate 3", "--accumulate 3|--batch-size 2"),
    ("--dataset wikitext --data-path nowhere", "nowhere"),
    ("--model somebody/gpt2-of-theirs", "somebody/gpt2-of-theirs|--model tiny"),
    pytest.param("--device cuda", "--device cuda|there is no CUDA", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has CUDA"))])
def test_a_mistake_gets_one_line_and_status_2_and_leaves_nothing(flags, says, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "no-cache")
    save_small("wide", vocab_size=300)
    save_small("cut")
    os.truncate("cut/model.safetensors", 5000)
    os.mkdir("empty")
    before = {path: path.read_bytes() for path in Path("small").iterdir()}
    assert_fails(capsys, flags, says)
    assert not Path("out").exists()
    assert {path: path.read_bytes() for path in Path("small").iterdir()} == before


def test_a_gpu_that_is_not_there_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train.parse(["--device", "cuda:1"]).device == "cuda:1"
    assert_fails(capsys, f"{SMALL} --device cuda:2", "--device cuda:2|cuda:0 to cuda:1")


@pytest.mark.parametrize("method,scope,none,one", [  # each layer's 64 neurons, or all 128
    *((method, "layer", 0.0078, 0.0079) for method in PRUNING),
    *((method, "global", 0.0039, 0.00391) for method in PRUNING if method != "soft")])
def test_a_leftover_of_no_neuron_at_all_is_a_mistake_and_of_one_is_not(
        method, scope, none, one, capsys):
    how = "--tau 0.9999 --mask-lr 0.1" if method == "soft" else f"--scope {scope}"
    flags = f"{SMALL} --out run --steps 2 --method {method} {how} --leftover"
    assert_fails(capsys, f"{flags} {none}", f"--leftover {none} of 128 neurons is none")
    assert not Path("run").exists() and program(capsys, f"{flags} {one}")[0] == 0
    assert sum(GPT.from_pretrained("run").config.mlp_widths) == (2 if scope == "layer" else 1)


def test_a_micro_batch_too_large_for_the_memory_is_a_mistake(capsys, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # so many pages of so many bytes
    flags = f"{SMALL} --batch-size 64 --steps 2 --out run"  # 4 B an activation: over 2 MB
    assert_fails(capsys, flags, "a step takes over|--accumulate")
    assert not Path("run").exists() and program(capsys, f"{flags} --accumulate 8")[0] == 0


def test_the_progress_bar_is_named_in_a_few_words(monkeypatch):
    for_seconds = tqdm.tqdm  # what takes less has no bar
    monkeypatch.setattr(data, "tqdm", lambda *args, **how: for_seconds(
        *args, **how | dict(disable=False, delay=0, mininterval=0)))
    for terminal, start in (True, "\r"), (False, "(?m)^"):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        sys.stderr.isatty = lambda: terminal
        run(f"--method topv --leftover 0.5 --weight-decay 0.2 --out run-{terminal}")
        shown = sys.stderr.getvalue()
        bars = re.findall(rf"{start}([^:\n\r]*): +\d+%", shown)
        assert dict.fromkeys(bars) == dict.fromkeys(["topv 50%", "evaluating"])
        assert ("\r" in shown) == terminal


def test_a_model_without_neurons_can_only_be_fine_tuned(capsys):
    save_small("pruned-away", mlp_widths=(0, 0))
    assert_fails(capsys, "--model pruned-away", "no MLP neurons left")
    assert run("--method none --out run", model="pruned-away")["leftover"] == 0


def test_an_interrupted_run_is_not_overwritten_and_a_damaged_file_in_it_is_named(capsys):
    killed_run("after training", "--out run")
    again = f"{SMALL} --out run"
    assert_fails(capsys, again, "interrupted|--resume")
    assert_fails(capsys, f"{again} --steps 13 --resume", "other settings|steps is 12 there")
    assert_fails(capsys, f"{again} --lr 1 --eps 1 --leftover 0.5 --seed 1 --steps 9 --resume",
                 "other settings|seed is 0 there and 1 here|, and 2 more)")
    for file, content in (
            ("metrics.json", "[3]"), ("metrics.json", '{"a": 1}'), ("metrics.json", '{"a": '),
            ("settings.json", "[3]"), ("checkpoint.pt", "half"),
            ("log.jsonl", '{"loss": 1}\n'), ("log.jsonl", "{a}\n")):
        path = Path("run", file)
        before = path.read_bytes() if path.exists() else None
        path.write_text(content)
        assert_fails(capsys, f"{again} --resume", f"{file}|damaged|remove ")
        path.unlink() if before is None else path.write_bytes(before)
    run("--out run --resume")


def test_running_out_of_memory_gets_one_line(capsys, monkeypatch):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    monkeypatch.setattr(train, "train", Mock(side_effect=error))
    assert_fails(capsys, "--model small", "out of memory|--accumulate")

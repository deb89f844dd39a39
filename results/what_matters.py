"""What matters in structured pruning: the study behind results/what-matters.md, as a program.

    python -m results.what_matters                     make all runs that are not made yet
    python -m results.what_matters make --list         which these are: their commands
    python -m results.what_matters make --only where   those of one question
    python -m results.what_matters report              tables and figures, from what is made

Every run is a command of `train.py`, made by one of several processes. Its row in what-matters.csv
says all that tables and figures need: what has one is not made again, and Ctrl-C loses nothing.
Some runs wait for others: for those that choose a learning rate, or for the widths of GUM's.
"""

import copy
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import cache
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from statistics import correlation, fmean
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import torch
from filelock import FileLock

import data
import measure
import train
from model import GPT, GPTConfig, whole
from prune import cubic, defaults_of, shrink
from results import cli
from results.cli import ABOVE_0, Flag
from results.compare import draw, look, mean_std, paired
from results.export import command_of
from results.parts import PARTS, registered
from results.runs import load_model, locked, read_run

CSV = Path(__file__).with_name("what-matters.csv")
COLUMNS = ("command", "loss", "leftover", "widths", "sensitivity", "uniqueness", "span_uniqueness",
           "loss_pruned", "sensitivity_pruned", "uniqueness_pruned", "span_uniqueness_pruned",
           "exact_match", "bleu", "rougeL", "loss_before", "seconds", "data")
SEEDS, TUNING = 5, 99  # how many a table has, and the one that chooses learning rates
STEPS, DENSE_STEPS = 400, 6000  # of `tiny`; a Hub's model is trained as long as the paper does
LEFTOVERS = (0.75, 0.5, 0.25, 0.1)
DENSE, RANDOM, TOP_V, GUM = (dict(method=name) for name in ("none", "random", "topv", "gum"))
MAGNITUDE, SOFT, OBS = (dict(method=name) for name in ("magnitude", "soft", "obs"))
FROM_SCRATCH = dict(batch_size=32, lr=5e-3, eps=1e-8)  # as `tiny` has it
OTHER_SHAPE = "6x192"  # 6 layers of width 192, 4,608 MLP neurons
OF_E2E = "-e2e"  # dense0, fine-tuned on it, at the rate that is best in STEPS
TWICE = "copies-2-seed0"  # dense0 with every neuron twice, 4,096 in all
GLOBAL, EARLY = TOP_V | dict(scope="global"), GUM | dict(prune_until=0.3)
METHODS = {"Magnitude": MAGNITUDE, "Random": RANDOM, "Top_v": TOP_V, "Soft movement": SOFT,
           "Global Top_v": GLOBAL, "GUM": GUM, "OBS": OBS}
GUM_EARLY = "GUM, v reached at 30 %"
MAIN = {name: METHODS[name] for name in ("Random", "Top_v", "Global Top_v", "GUM", "OBS")}
MAIN_EARLY = MAIN | {GUM_EARLY: EARLY}
PAIRS = (("Top_v", "Random"), ("Global Top_v", "Top_v"), ("GUM", "Global Top_v"), ("OBS", "GUM"))
PAIRS_EARLY = PAIRS + ((GUM_EARLY, "GUM"), ("OBS", GUM_EARLY))


class Question(NamedTuple):
    """A table: {row: {column: run}}, over seeds 0 to `seeds` - 1. A run is a function from a seed
    to its flags, or to None as long as those depend on runs that are to be made. `pairs`: what to
    compare, seed by seed: rows, in every column, or cells, (row, column)."""

    title: str
    table: dict
    pairs: tuple = ()
    seeds: int = SEEDS


def command(flags):
    """The command of a run, by which it is known: without what is a method's default, and without
    the place of data, which are known by their hash."""
    part = flags["method"] in PARTS
    usual = defaults_of("obs" if part else flags["method"]) | dict(seed=0, dataset="stdlib")
    if flags.get("dataset") == "samsum" and flags.get("distill"):
        del usual["lambda_gum"]  # which is another then
    given = {name: flags[name] for name in train.ALL_FLAGS if name in flags and name != "data_path"
             and flags[name] is not None and flags[name] != usual.get(name)}
    text = command_of(SimpleNamespace(**given))
    return text.replace("train.py", "-m results.parts", 1) if part else text


def words_of(command):
    """The words of a command that are flags."""
    words = shlex.split(command)
    return words[words.index("--method"):]


class Study:
    """All questions, as far as the rows in `known` {command: row} tell which runs they take, and
    the runs that are `wanted` {command: flags} to go on. `args`: those of `make`."""

    def __init__(self, known, args):
        self.known, self.wanted, self.args = known, {}, args
        self.folder, self.tiny = Path(args.out), args.model == "tiny"
        lowest = 5e-4 if self.tiny else 1.25e-4
        self.lrs = tuple(lowest * 2**n for n in range(5))

    def want(self, flags):
        """The row of a run, or None: then it is wanted."""
        row = self.known.get(command(flags))
        if row is None or "out" in flags and not Path(flags["out"], "metrics.json").exists():
            self.wanted[command(flags)] = flags
            return None
        return row

    def dense(self, which=0):
        """The folder of a dense model: of `tiny`, well trained from this seed, of OTHER_SHAPE,
        OF_E2E, or TWICE; of a Hub's model fine-tuned. It is kept, for others start from it or learn
        from it."""
        if which == TWICE:
            self.dense()  # of which `new_model` makes it
            return str(self.folder / TWICE)
        name = "dense" if self.tiny else f"{Path(self.args.model).name}-dense"
        folder = str(self.folder / f"{name}{which}")
        how = dict(steps=DENSE_STEPS, seed=which) if self.tiny else self.start() | dict(seed=which)
        if which == OTHER_SHAPE:
            self.dense()  # of which `new_model` takes the rest
            new = str(self.folder / f"new-{OTHER_SHAPE}-seed0")
            how = FROM_SCRATCH | dict(steps=DENSE_STEPS, seed=0, model=new)
        elif which == OF_E2E:
            how = self.start() | self.data_of("e2e") | dict(batch_size=8, steps=2000, lr=4e-3)
        self.want(how | DENSE | dict(out=folder))
        return folder

    def start(self, dense=0):
        """What all fine-pruning shares: from a dense `tiny`, or from the Hub's model itself."""
        if self.tiny:
            return dict(model=self.dense(dense), steps=STEPS, batch_size=32, eps=1e-8)
        return dict(model=self.args.model, dataset=self.args.dataset,
                    data_path=self.args.data_path)

    def data_of(self, name):
        """The flags of a data set: its name, and where a copy is if --data has those."""
        flags, hub = dict(dataset=name), data.DATASETS[name].get("hub")
        if self.args.data and hub:
            flags["data_path"] = str(Path(self.args.data, hub))
        return flags

    def best(self, flags, name, values):
        """`flags` with that of `values` for a flag with which a run of the seed TUNING ends best:
        first of all, as soft movement may not, with what it should leave. None until these runs are
        made."""
        if flags is None:
            return None
        rows = {value: self.want(flags | {name: value, "seed": TUNING}) for value in values}
        if None in rows.values():
            return None

        def rank(value):
            too_many = rows[value]["leftover"] - flags.get("leftover", 1) - 0.02
            return max(too_many, 0), rows[value]["loss"]

        return flags | {name: min(rows, key=rank)}

    def tuned(self, how, leftover=0.1, dense=0, distill=None, teacher=None, **more):
        """The flags of a method: `how`, and the rate, and for soft movement and GUM the lambda,
        that suit it. From 50 % on the highest rate is left out, below it the lowest. Where only
        the end is given, up to 30 % has the rate of 30 %, else that of 70 %; longer trainings and
        dense models of other seeds those of STEPS from dense0. None as long as they are unknown."""
        flags, given = self.start(0 if isinstance(dense, int) else dense) | how, dict(more)
        flags |= dict(distill=distill, teacher=teacher)
        if "dataset" in more:
            flags |= more
        if more.get("steps", STEPS) < STEPS and self.tiny:
            flags["steps"] = more["steps"]
        lrs = self.lrs
        if how["method"] != "none":
            flags["leftover"] = leftover
            lrs = lrs[:-1] if leftover >= 0.5 else lrs[1:]
        if "prune_until" in how and "prune_from" not in how:
            flags["prune_until"] = 0.3 if how["prune_until"] <= 0.3 else 0.7
            given["prune_until"] = how["prune_until"]
        if how["method"] == "soft":
            flags = self.best(flags | dict(lr=self.lrs[2]), "lambda_mvp", (2.0, 20.0, 200.0))
        flags = self.best(flags, "lr", lrs)
        if how["method"] == "gum":
            flags = self.best(flags, "lambda_gum", (1.0, 10.0, 100.0))
        return flags and flags | given | dict(model=self.start(dense)["model"])

    def run(self, how, **more):
        """The run of each seed, tuned."""
        flags = self.tuned(how, **more)
        return lambda seed: flags and flags | dict(seed=seed)

    def as_gum(self, how):
        """The run of each seed with the layer widths that GUM ended with, tuned if `how` has no lr.
        `how["new"]`, "neurons" or "scratch": it is not pruned to them, but starts from a
        `new_model` that has them."""
        gum, how = self.tuned(GUM), dict(how)
        new = how.pop("new", None)

        def with_widths(seed, lr=None):
            row = gum and self.want(gum | dict(seed=seed))
            if not row:
                return None
            its = dict(leftover=0.1, scope=row["widths"])
            if new:
                its = dict(model=str(self.folder / f"{new}-{row['widths']}-seed{seed}"))
            return self.start() | its | how | dict(seed=seed, lr=lr)

        tuned = how if "lr" in how else self.best(with_widths(TUNING), "lr", self.lrs[1:])
        return lambda seed: tuned and with_widths(seed, tuned["lr"])

    def questions(self):
        """Yields each question's name and itself, in the order in which they are made."""
        def methods(**how):
            return {name: {f"{leftover:.0%}": self.run(flags, leftover=leftover, **how)
                           for leftover in LEFTOVERS} for name, flags in METHODS.items()}

        def uniqueness(**how):
            # Of the runs in a row, the rate that suits weight 0 serves all.
            return {name: {f"{weight:g}": self.run(flags, lambda_gum=weight, **how)
                           for weight in (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)}
                    for name, flags in (("each layer", TOP_V), ("all layers", GLOBAL))}

        def transfer(about, name, others=(), pairs=(), **more):
            more |= self.data_of(name)
            rows = {"Dense": DENSE, **MAIN_EARLY, **dict(others)}
            del rows["Random"]
            return Question(f"Fine-pruning on {about}, to 10 %", {
                label: {"": self.run(how, **more)} for label, how in rows.items()},
                PAIRS_EARLY[1:] + pairs)

        def distilling():  # when it is asked for: only then is a Hub's model's teacher wanted
            return dict(distill=True, teacher=self.dense())

        if self.tiny:
            yield "where", Question("Where neurons stay, or which, at 10 %", {
                "Random": {"each layer alike": self.run(RANDOM), "as GUM": self.as_gum(RANDOM)},
                "Magnitude": {"each layer alike": self.run(MAGNITUDE),
                              "as GUM": self.as_gum(MAGNITUDE)},
                "Top_v": {"each layer alike": self.run(TOP_V), "as GUM": self.as_gum(TOP_V)},
                "GUM": {"as GUM": self.run(GUM)},
                "New neurons": {"as GUM": self.as_gum(DENSE | dict(new="neurons"))}},
                ((("Top_v", "each layer alike"), ("Random", "each layer alike")),
                 (("Top_v", "as GUM"), ("Random", "as GUM")),
                 (("Random", "as GUM"), ("Random", "each layer alike")),
                 (("Top_v", "as GUM"), ("Top_v", "each layer alike")),
                 (("Magnitude", "as GUM"), ("Magnitude", "each layer alike")),
                 *(((name, "as GUM"), ("GUM", "as GUM"))
                   for name in ("Random", "Magnitude", "Top_v", "New neurons"))))
        yield "when", Question("When the leftover is reached, at 10 %", {
            name: {f"after {until:.0%}": self.run(how | dict(prune_until=until))
                   for until in (0.15, 0.3, 0.5, 0.7)}
            for name, how in METHODS.items() if how in (TOP_V, GLOBAL, GUM)},
            (*(((name, "after 30%"), (name, "after 70%"))
               for name in ("Top_v", "Global Top_v", "GUM")), ("GUM", "Global Top_v")))
        late, now = dict(prune_from=0.1, prune_until=0.2), dict(prune_from=0.0, prune_until=0.1)
        schedules = {"Global Top_v, from 10 to 20 %": GLOBAL | dict(prune_until=0.2),
                     "OBS, from 10 to 20 %": OBS | late,
                     "Global Top_v, from 0 to 10 %": GLOBAL | now, "OBS, from 0 to 10 %": OBS | now}
        global_later, obs_later, global_now, obs_now = schedules
        yield "surgeon", Question("OBS, or its schedule: when neurons leave", {
            name: {f"{leftover:.0%}": self.run(how, leftover=leftover) for leftover in LEFTOVERS}
            for name, how in ({"Global Top_v, from 10 to 70 %": GLOBAL} | schedules).items()},
            ((global_later, "Global Top_v, from 10 to 70 %"), (obs_later, global_later),
             (obs_now, global_now), (obs_now, global_later), (obs_now, obs_later)))
        weights = tuple(((scope, weight), (scope, "0")) for scope in ("each layer", "all layers")
                        for weight in ("1", "10", "100"))
        yield "uniqueness", Question("The weight of uniqueness, at 10 %", uniqueness(), weights)
        yield "methods", Question(
            "The methods", {"Dense": {"all": self.run(DENSE)}} | methods(), PAIRS)
        yield "methods-distilled", Question(
            "The methods, distilled", {"Dense": {"all": self.run(DENSE, **distilling())}}
            | methods(**distilling()) | {GUM_EARLY: {"10%": self.run(EARLY, **distilling())}},
            PAIRS_EARLY)
        yield "uniqueness-distilled", Question(
            "The weight of uniqueness, at 10 %, distilled", uniqueness(**distilling()), weights)
        yield "memory", Question("How much of the similarity is the last batch's, at 10 %", {
            "GUM": {f"{share:g}": self.run(GUM, lambda_sim=share)
                    for share in (0.01, 0.1, 0.5, 0.99)}},
            tuple((("GUM", share), ("GUM", "0.99")) for share in ("0.01", "0.1", "0.5")))
        if self.tiny:
            # 205 neurons, as 10 % of one each; and 2,048, as many as the dense model has.
            once, few, half = "205 of 2,048", "205 of 4,096", "2,048 of 4,096"
            left = {few: 0.05, half: 0.5}
            yield "twice", Question("Every neuron twice", {
                name: {once: self.run(how)} | {
                    column: self.run(how, leftover=leftover, dense=TWICE)
                    for column, leftover in left.items()} for name, how in MAIN.items()}
                | {"Dense, not pruned": {half: self.run(DENSE)}},
                (*(((name, few), (name, once)) for name in MAIN),
                 *(((name, half), ("Dense, not pruned", half)) for name in MAIN), *PAIRS))
            yield "uniqueness-twice", Question("The weight of uniqueness, every neuron twice", {
                column: {f"{weight:g}": self.run(GUM if weight else GLOBAL, lambda_gum=weight,
                                                 leftover=leftover, dense=TWICE)
                         for weight in (0.0, 1.0, 10.0, 100.0)}
                for column, leftover in left.items()} | {
                # Uniqueness adds to the penalty: what does as much of it do alone?
                f"{few}, λ_mvp {penalty}": {"0": self.run(
                    GLOBAL, lambda_mvp=float(penalty), leftover=left[few], dense=TWICE)}
                for penalty in (4, 8, 16)},
                (*(((column, weight), (column, "0")) for column in left
                   for weight in ("1", "10", "100")),
                 *(((f"{few}, λ_mvp {penalty}", "0"), (few, "0")) for penalty in (4, 8, 16)),
                 *(((few, "10"), (f"{few}, λ_mvp {penalty}", "0")) for penalty in (4, 8, 16))))
            yield "surgeon-twice", Question("When neurons leave, every neuron twice", {
                name: {half: self.run(how, leftover=left[half], dense=TWICE)}
                for name, how in ({"Global Top_v, from 10 to 70 %": GLOBAL} | schedules).items()},
                ((global_later, "Global Top_v, from 10 to 70 %"), (obs_later, global_later),
                 (obs_now, global_now), (obs_now, global_later), (obs_now, obs_later)))

            def as_obs(method, **how):  # at its rate
                flags = self.tuned(OBS, **how)
                return lambda seed: flags and flags | dict(method=method, seed=seed)

            ours = [name for name in (*PARTS, "obs") if "chance" not in name]
            cells = {half: (ours, dict(leftover=left[half], dense=TWICE)),
                     few: (set(ours) - {"alone-only"}, dict(leftover=left[few], dense=TWICE)),
                     once: (("greedy", "handed", "obs"), {})}
            short = {"10%, 50 steps": dict(steps=50),
                     "25%, 50 steps": dict(leftover=0.25, steps=50)}
            names = {name: part.name for name, part in PARTS.items()} | dict(obs="OBS")
            yield "parts", Question("OBS in parts", {
                text: {column: self.run(dict(method=name), **how) for column, how in short.items()}
                | {column: as_obs(name, **how) for column, (its, how) in cells.items()
                   if name in its}
                for name, text in names.items()},
                tuple((names[one], names[other]) for one, other in (
                    ("chance", "chance-only"), ("alone", "alone-only"), ("obs", "obs-only"),
                    ("alone", "chance"), ("pairs", "alone"), ("obs", "pairs"), ("obs", "alone"),
                    ("obs-only", "alone-only"), ("greedy", "obs"), ("handed", "greedy"),
                    ("handed", "obs"))))
            yield "scratch", Question("From scratch, for as long as all training before, at 10 %", {
                "GUM": {"as GUM": self.run(GUM)}, "From scratch": {"as GUM": self.as_gum(
                    DENSE | FROM_SCRATCH | dict(new="scratch", steps=DENSE_STEPS + STEPS))}},
                (("From scratch", "GUM"),))
            yield "other-shape", Question("Another shape: 6 layers of width 192, to 10 %", {
                name: {"": self.run(how, dense=OTHER_SHAPE)} for name, how in MAIN_EARLY.items()},
                PAIRS_EARLY)
            yield "other-models", Question("From other dense models, to 10 %", {
                name: {f"seed {dense}": self.run(how, dense=dense) for dense in (0, 1, 2)}
                for name, how in MAIN_EARLY.items()}, PAIRS_EARLY)
            later = {global_later: schedules[global_later]}
            yield "how-long", Question("How long, at 10 %", {
                name: {f"{steps:,} steps": self.run(how, steps=steps)
                       for steps in (50, 100, 200, 400, 1000, 3000)}
                for name, how in (MAIN | later).items()},
                PAIRS + ((global_later, "Global Top_v"), ("OBS", global_later)))
            yield "short", Question("Short trainings", {
                name: {f"{leftover:.0%}, {steps} steps": self.run(how, leftover=leftover,
                                                                  steps=steps)
                       for leftover in (0.25, 0.1) for steps in (50, 100)}
                for name, how in (METHODS | later).items()},
                tuple(("OBS", name) for name in METHODS | later if name != "OBS"))
            # Steps of 1,400 to 3,300 tokens; stdlib's have 2,048. toysql is soon learned.
            yield "toysql", transfer("toysql in 100 steps", "toysql", steps=100)
            late_too = {name: schedules[name] for name in (global_later, obs_later)}, (
                (obs_later, "GUM"), (obs_later, "OBS"), (obs_later, global_later),
                (global_later, "Global Top_v"), ("OBS", "Global Top_v"))
            yield "e2e", transfer("E2E", "e2e", *late_too, batch_size=8)
            yield "e2e-tuned", transfer("E2E, which the dense model knows", "e2e", *late_too,
                                        batch_size=8, dense=OF_E2E)
            yield "wikitext", transfer("WikiText-2", "wikitext", data_config="wikitext-2-v1",
                                      block_size=64)


def read_rows():
    """{command: row} of what is made. Numbers are numbers, what a run lacks is None."""
    if not CSV.exists():
        return {}
    texts = "command", "widths", "data"
    try:
        with open(CSV, newline="") as lines:
            reader = csv.DictReader(lines)
            rows = [*reader]
        if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
            raise ValueError("other columns, or a row that is cut off")
        return {row["command"]: {
            name: row[name] if name in texts else float(row[name]) if row[name] else None
            for name in COLUMNS} for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{CSV} is damaged, or of another version: put it back, or move it away "
                         "to begin anew") from error


def write_rows(rows):
    """Write what `read_rows` reads."""
    with whole(CSV) as beside, open(beside, "w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


# One run, in a process of its own.


def new_model(path):
    """Make the folder of a model that no training has: `neurons-W,W,..-seedN`, dense0 with new MLPs
    of these widths; `scratch-..`, all of it new; `new-LxD-seedN`, L new layers of width D;
    `copies-N-seedN`, which computes what dense0 does, with every neuron N times. It appears whole
    or not at all."""
    kind, how, seed = path.name.split("-")
    torch.manual_seed(int(seed.removeprefix("seed")))
    old = GPT.from_pretrained(path.parent / "dense0")
    if kind == "new":
        layers, width = map(int, how.split("x"))
        shape = dict(n_layer=layers, n_embd=width, n_head=width // 32, mlp_widths=(), windows=())
    elif kind == "copies":
        shape = dict(mlp_widths=tuple(int(how) * m for m in old.config.mlp_widths))
    else:
        shape = dict(mlp_widths=tuple(map(int, how.split(","))))
    model = GPT(GPTConfig(**vars(old.config) | shape))
    if kind == "neurons":
        kept = {name: value for name, value in old.state_dict().items() if ".mlp." not in name}
        model.load_state_dict(kept, strict=False)
    if kind == "copies":
        model.load_state_dict(copied(old.state_dict(), int(how)))
    with TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as beside:
        model.save_pretrained(Path(beside, "model"))
        Path(beside, "model").rename(path)


def copied(weights, copies):
    """The weights {name: tensor} of a model that computes the same, with every MLP neuron `copies`
    times: c_fc is the same, c_proj is split into random shares, of two each a quarter or more. If
    they were equal, so would be their gradients for ever."""
    weights = dict(weights)
    for name, value in weights.items():
        if ".mlp.c_fc." in name:
            weights[name] = torch.cat([value] * copies)  # [m, d] -> [n m, d], or [m] -> [n m]
        if name.endswith(".mlp.c_proj.weight"):
            shares = 0.5 + torch.rand(copies, value.size(1))
            shares /= shares.sum(0)  # [n, m]
            weights[name] = torch.cat([value * share for share in shares], 1)  # [d, n m]
    return weights


def split_of(args, config, split):
    """A split of a run's data, as it was trained on."""
    block_size = args.block_size or min(train.BLOCK_SIZE[args.dataset], config.n_positions)
    return data.load(args.dataset, split, config.vocab_size, block_size, args.data_path,
                     args.data_config)


def measures(model, args, suffix=""):
    """Sensitivity and uniqueness of the neurons that are left, on 512 training sequences."""
    sensitivity, Cs, tokens = measure.activation_statistics(
        model, split_of(args, model.config, "train"), first=512)
    values = dict(sensitivity=sensitivity) | measure.redundancy(Cs, tokens)[0]
    return {name + suffix: value for name, value in values.items()}


def watched(fine_prune, file):
    """`train.fine_prune`, that also measures, once all are pruned that should be, what is left."""
    def step_and_measure(model, pruner, optimizer, micro_batches, step, args, teacher=None):
        result = fine_prune(model, pruner, optimizer, micro_batches, step, args, teacher)
        before, now = (cubic(t, **pruner.when) for t in (step - 1, step))
        if pruner.leftover < 1 and now == 0 < before:
            small = shrink(copy.deepcopy(model)).eval()
            found = measures(small, args, "_pruned")
            validation = copy.copy(split_of(args, model.config, "validation"))
            if isinstance(validation, data.Blocks):
                validation.tokens = validation.tokens[: 65_536 + 1]  # they will do
                found["loss_pruned"] = measure.mean_loss(small, validation, nullcontext())
            with whole(file) as beside:
                beside.write_text(json.dumps(found))
        return result

    return step_and_measure


def end_with_parent():
    """Wait for the study's end. One that is killed can't stop its processes, and what is left of
    them would hold the locks of runs that the next one goes on with."""
    parent_process().join()
    os._exit(1)


def begin_process():
    """Begin one of the processes that make runs: it ends with the study, by Ctrl-C only if it makes
    one, and its runs share their data, for to read them takes as long as 30 steps."""
    signal.signal(signal.SIGINT, lambda *_: None)  # `handling` would leave SIG_IGN as it is
    data.load = cache(data.load)
    Thread(target=end_with_parent, daemon=True).start()


@cli.handling(signal.default_int_handler)
@registered()
def make_run(flags, folder):
    """Make a run in `folder`, as its command would, and return its row."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    pruned, log = Path(f"{folder}.json"), Path(f"{folder}.log")
    words = words_of(command(flags | dict(out=str(folder), eval_every=10**6)))
    if flags.get("data_path"):
        words += ["--data-path", flags["data_path"]]
    words += ["--resume"] * (folder.exists() and read_run(folder).state != "new")
    step, sys.argv = train.fine_prune, ["train.py", *words]
    train.fine_prune = watched(step, pruned)
    row = dict.fromkeys(COLUMNS) | dict(command=command(flags))
    try:
        with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
            train.main()
    except SystemExit as error:
        too_high = "no longer a finite number" in log.read_text()  # the rate
        if too_high and "out" not in flags:
            return row | dict(loss=math.inf, leftover=1.0)
        raise RuntimeError(f"see {log}") from error
    finally:
        train.fine_prune = step
    torch.set_float32_matmul_precision("highest")  # on a GPU train.py has it lower
    run = read_run(folder)
    metrics, args = run.metrics, train.resolve(train.parse(words))
    row |= dict(
        loss=metrics["result"]["val_loss"], leftover=metrics["leftover"],
        widths=",".join(map(str, metrics["result"]["widths"])), seconds=metrics["seconds"],
        loss_before=metrics["start"]["val_loss"], data=metrics["data"]["train"]["sha256"][:8])
    if data.DATASETS[args.dataset]["metric"] == "perplexity":
        row |= measures(load_model(folder).to(args.device).eval(), args)
    else:
        on = measure.On(args.dataset, args.data_path, args.data_config, metrics["block_size"],
                        split="train", examples=512, generate=200, beams=1, outputs=None)
        row |= measure.measure(folder, args.device, on)[0]
    if pruned.exists():
        row |= json.loads(pruned.read_text())
    return {name: row[name] for name in COLUMNS}


def folder_of(flags, folder):
    """Where a run is made: a dense model in its --out, another by its command."""
    if "out" in flags:
        return Path(flags["out"])
    name = "-".join(str(flags[key]) for key in ("method", "leftover", "seed") if key in flags)
    return folder / f"{name}-{zlib.crc32(command(flags).encode()):08x}"


def taken_by(flags, folder):
    """{model that a run takes from `folder`: the dense model for that, itself or what a new one is
    made of}."""
    paths = map(Path, filter(None, (flags.get("model"), flags.get("teacher"))))
    new = re.compile("(neurons|scratch|new|copies)-")
    return {path: folder / "dense0" if new.match(path.name) else path
            for path in paths if path.parent == folder}


def is_ready(flags, folder):
    """Whether the models that a run takes from `folder` are there. New ones are made."""
    taken = taken_by(flags, folder)
    if not all((dense / "metrics.json").exists() for dense in taken.values()):
        return False
    for path in taken:
        if not path.exists():
            new_model(path)
    return True


def needed(wanted, known, folder):
    """Of `wanted` {command: flags} the runs that are not `known`, and dense models, if they are
    gone from `folder`, only where those, or one of these, take them."""
    runs = {name: flags for name, flags in wanted.items() if name not in known}
    while True:
        taken = {dense for flags in runs.values() for dense in taken_by(flags, folder).values()}
        more = {name: flags for name, flags in wanted.items()
                if name not in runs and Path(flags["out"]) in taken}
        if not more:
            return runs
        runs |= more


def wanted_by(args, known):
    """{command: flags} of the runs that the questions in `args` take next, and are not `known`."""
    study, wanted = Study(known, args), {}
    for name, question in study.questions():
        if not args.only or re.search(args.only, name):
            runs = [run for row in question.table.values() for run in row.values()]
            for flags in (run(seed) for seed in range(question.seeds) for run in runs):
                if flags:
                    study.want(flags)
            wanted |= study.wanted
        study.wanted = {}
    wanted = needed(wanted, known, Path(args.out))

    def order(item):  # dense models first, for which others wait; then the shortest
        return "out" not in item[1], item[1].get("steps", 0)

    return dict(sorted(wanted.items(), key=order))


def check_only(args):
    """ValueError if --only is no regular expression, or the name of no question matches it."""
    names = [name for name, _ in Study({}, args).questions()]
    try:
        if not any(re.search(args.only, name) for name in names):
            raise ValueError(f"--only {args.only} matches none of {', '.join(names)}")
    except re.error as error:
        raise ValueError(f"--only {args.only} is no regular expression: {error}") from error


def dataset_of(name):
    """The data set in a command."""
    found = re.search(r"--dataset (\S+)", name)
    return found[1] if found else "stdlib"


def check_hash(row, known):
    """ValueError if a row of the same data set in `known` has other data than `row`."""
    dataset = dataset_of(row["command"])
    others = {other["data"] for name, other in known.items()
              if name != row["command"] and dataset_of(name) == dataset}
    others -= {row["data"], None, ""}  # those whose loss was no number have none
    if row["data"] and others:
        raise ValueError(f"{dataset} is other data here (sha256 {row['data']}) than in {CSV} "
                         f"({', '.join(others)}): go on with those, or move that file away to "
                         "begin anew")


@contextmanager
def stopping():
    """Whatever ends this, as Ctrl-C or SIGTERM, stops the runs that are being made, too: they are
    kept."""
    try:
        with cli.handling(signal.default_int_handler):
            yield
    except BaseException as error:
        for process in active_children():  # a terminal tells them, but not `kill`
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        if isinstance(error, BrokenProcessPool):
            raise ValueError("a run was killed, as where memory is short: try fewer --processes"
                             ) from error
        raise


def make(args):
    """Make all runs that are not made yet, several at a time."""
    known, folder, running, failed = read_rows(), Path(args.out), {}, {}
    if args.only:
        check_only(args)
    for flag, path in (("--data", args.data), ("--data-path", args.data_path)):
        if path and not Path(path).is_dir():
            raise ValueError(f"{flag} {path} is no folder: name one with copies of the data")
    wanted = wanted_by(args, known)
    if not wanted:
        print("nothing is left to make")
    elif args.list:
        for name, flags in wanted.items():
            if flags.get("data_path"):
                name += f" --data-path {shlex.quote(flags['data_path'])}"
            print(name)
    if args.list or not wanted:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder.mkdir(parents=True, exist_ok=True)
    processes = args.processes or (1 if torch.cuda.is_available() else os.cpu_count())
    with (locked(folder, wait=False), data.bar("what matters", unit="run", leave=True) as bar,
          ProcessPoolExecutor(processes, get_context("spawn"), begin_process) as pool, stopping()):
        while True:
            wanted = wanted_by(args, known)
            bar.total = bar.n + len(wanted)
            begun = {name for name, _ in running.values()} | {*failed}
            for name, flags in wanted.items():
                if len(running) < processes and name not in begun and is_ready(flags, folder):
                    running[pool.submit(make_run, flags, folder_of(flags, folder))] = name, flags
            if not running:
                break
            finished = []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, flags = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error:
                    failed[name] = error
                else:
                    finished.append((flags, future.result()))
            with FileLock(CSV.with_suffix(".lock")):
                known |= read_rows()  # those that are made elsewhere meanwhile
                for _, row in finished:
                    check_hash(row, known)
                    old = known.get(row["command"])
                    if old and old["loss"] != row["loss"]:  # as on another machine
                        bar.write(f"{row['command']} is another model than that which others in "
                                  f"{CSV} are from: {row['loss']:.6f}, it was {old['loss']:.6f}")
                    known[row["command"]] = row
                write_rows(known)
            bar.update(len(finished))
            for flags, _ in finished:
                if "out" not in flags:
                    made = folder_of(flags, folder)
                    shutil.rmtree(made)
                    for suffix in ("json", "log"):
                        Path(f"{made}.{suffix}").unlink(missing_ok=True)
    for name, error in failed.items():
        print(f"{name}: {type(error).__name__} {error}", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} runs failed")


# Tables and figures.


def rows_of(study, question, row, column, value="loss"):
    """{seed: value} of a cell, as far as it is made."""
    values, run = {}, question.table.get(row, {}).get(column)
    for seed in range(question.seeds if run else 0):
        flags = run(seed)
        made = flags and study.known.get(command(flags))
        if made and made[value] is not None:
            values[seed] = made[value]
    return values


def columns_of(question):
    """The columns of all rows, in order."""
    return list(dict.fromkeys(column for row in question.table.values() for column in row))


def cell_of(study, question, row, column, value):
    """A table's cell: mean ± sample standard deviation over the seeds, their number if some are
    missing, and what is left where that is not what was wanted."""
    values = rows_of(study, question, row, column, value).values()
    if not values:
        return ""
    text = "{:.4f} ± {:.4f}".format(*mean_std(values))
    if len(values) < question.seeds:
        text += f" ({len(values)})"
    left = fmean(rows_of(study, question, row, column, "leftover").values())
    runs = map(question.table[row][column], range(question.seeds))
    if abs(left - next(filter(None, runs)).get("leftover", 1)) > 0.01:
        text += f" at {left:.3f}"
    return text


def grid(question, cell, corner=""):
    """A question's rows and columns in Markdown, with `cell(row, column)` in each."""
    columns = columns_of(question)
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[row, *(cell(row, column) for column in columns)] for row in question.table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of(study, question, value="loss"):
    """A question's table in Markdown."""
    return grid(question, lambda row, column: cell_of(study, question, row, column, value))


def tuning_of(question):
    """The rates and lambdas that a question's methods are tuned to, in Markdown."""
    def cell(row, column):
        run = question.table[row].get(column)
        flags = run and run(0) or {}
        lambdas = (f"λ {flags[name]:g}" for name in ("lambda_gum", "lambda_mvp") if name in flags)
        return ", ".join([f"{flags['lr']:g}", *lambdas]) if flags else ""

    return grid(question, cell, "learning rate")


def differences_of(study, question):
    """What a question compares, in Markdown: mean paired differences and their 95 % intervals."""
    lines = []
    for one, other in question.pairs:
        cells = [(one, other)] if isinstance(one, tuple) else [
            ((one, column), (other, column)) for column in columns_of(question)]
        for a, b in cells:
            here, there = (rows_of(study, question, *cell) for cell in (a, b))
            seeds = [seed for seed in here if seed in there]
            if len(seeds) > 1:
                mean, half = paired([here[s] for s in seeds], [there[s] for s in seeds])
                names = [f"{row}, {column}" if column else row for row, column in (a, b)]
                if a[1] == b[1]:
                    names = [a[0], f"{b[0]}, {b[1]}" if b[1] else b[0]]
                lines.append(f"| {names[0]} − {names[1]} | {mean:+.4f} | [{mean - half:+.4f}, "
                             f"{mean + half:+.4f}] | {len(seeds)} |")
    head = ["| difference (nats/token) | mean | 95 % interval | seeds |", "|" + " --- |" * 4]
    return "\n".join(head + lines) if lines else ""


def commands_of(question):
    """The commands of a question's runs of seed 0, folded up."""
    runs = [run(0) for row in question.table.values() for run in row.values()]
    names = dict.fromkeys(command(flags) for flags in runs if flags)
    return "\n".join(["<details><summary>Commands (seed 0)</summary>", "", "```sh", *names, "```",
                      "", "</details>"])


def ranks(values):
    """Each value's place in their order; equal ones share theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def predictors(rows):
    """Spearman's rank correlation of each measure with the final loss over `rows`, and of how many
    of them, in Markdown: as measured when all were pruned, and at the end."""
    lines = ["| measure | when pruned | at the end |", "| --- | --- | --- |"]
    for name in ("sensitivity", "uniqueness", "span_uniqueness", "loss"):
        cells = []
        for suffix in ("_pruned", ""):
            found = [row for row in rows if row[name + suffix] is not None]
            values, losses = ([row[key] for row in found] for key in (name + suffix, "loss"))
            constant = len({*values}) < 2 or len({*losses}) < 2  # then there is no correlation
            if constant or len(found) < 3 or name + suffix == "loss":
                cells.append("")
            else:
                cells.append(f"{correlation(ranks(values), ranks(losses)):+.2f} ({len(found)})")
        lines.append(f"| {measure.MEASURES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves_of(study, question):
    """A panel's curves: the loss of every run by the number in its column's name, or, where that
    is what should be left, by what is left on average."""
    curves = []
    for row, columns in question.table.items():
        for column in (name for name in columns if name != "all"):
            x = float(re.sub("[^0-9.]", "", column)) / (100 if "%" in column else 1)
            if re.fullmatch(r"\d+%", column):
                x = fmean(rows_of(study, question, row, column, "leftover").values() or [x])
            losses = rows_of(study, question, row, column).values()
            curves += [(row, [x], [loss]) for loss in losses]
    return curves


def draw_figures(study, questions, at_10):
    """Draw what-matters.png, how-long.png and predictors.png beside the page."""
    loss, styles = "validation loss (nats/token)", {}
    for name, how in METHODS.items():
        color, marker = look(how["method"])
        styles[name] = dict(color=color, marker=marker)
    styles["Global Top_v"] |= dict(ls="--", mfc=styles["Top_v"]["color"])
    styles |= {"each layer": styles["Top_v"], "all layers": styles["Global Top_v"],
               "Global Top_v, from 10 to 20 %": styles["Global Top_v"] | dict(ls=":")}
    shown = {("by leftover", "leftover (share of neurons)"): "methods",
             ("by end of pruning, 10 % left", "share of the steps"): "when",
             ("by weight of uniqueness, 10 % left", "lambda_gum"): "uniqueness"}
    figures = {"what-matters": shown, "how-long": {("10 % left", "steps"): "how-long"}}
    for name, panels in figures.items():
        panels = {(*title, loss): curves_of(study, questions[question])
                  for title, question in panels.items() if question in questions}
        panels = {title: curves for title, curves in panels.items()
                  if len({x for _, (x,), _ in curves}) > 1}  # else there is no curve yet
        if panels:
            draw(CSV.with_name(name), panels, styles, ["png"], 150, bands=True)
    # A point for each run, in its method's colour.
    points = {name: style | dict(ls="") for name, style in styles.items()}
    panels = {}
    for value in ("sensitivity", "uniqueness", "span_uniqueness"):
        panels["when all were pruned", measure.MEASURES[value], loss] = [
            (label_of(row), [row[f"{value}_pruned"]], [row["loss"]]) for row in at_10
            if row[f"{value}_pruned"] is not None]
    if any(panels.values()):
        draw(CSV.with_name("predictors"), panels, points, ["png"], 150)


def label_of(row):
    """The method in a row's command, by its name in tables."""
    flags = train.parse(words_of(row["command"]))
    if flags.scope == "global":
        return "GUM" if flags.lambda_gum else "Global Top_v"
    return next(name for name, how in METHODS.items() if how["method"] == flags.method)


def report(args):
    """Write tables into what-matters.md, between the comments that name them, and draw figures; of
    a Hub's model print the tables."""
    study, page = Study(read_rows(), args), CSV.with_suffix(".md")
    text, parts, questions = page.read_text(encoding="utf-8"), {}, dict(study.questions())

    def is_made(question, value="loss"):
        return any(rows_of(study, question, row, column, value)
                   for row in question.table for column in columns_of(question))

    if not any(map(is_made, questions.values())):
        raise ValueError(f"no run in {CSV} is of --model {args.model}, made in --out {args.out}")
    for name, question in questions.items():
        if not is_made(question):
            continue
        tables = [f"**{question.title}**, validation loss (nats/token)",
                  table_of(study, question)] + [
            f"{measure.MEASURES[value]}:\n\n{table_of(study, question, value)}"
            for value in ("exact_match", "bleu", "rougeL") if is_made(question, value)]
        parts[name] = "\n\n".join(filter(None, [
            *tables, differences_of(study, question), commands_of(question)]))
        if name.startswith("methods"):
            parts[f"tuning-{name}"] = tuning_of(question)
    at_10 = [row for name, row in study.known.items() if re.search(r"--leftover 0\.1\b", name)
             and row["leftover"] < 0.11  # soft movement leaves more
             and not re.search(r"--(dataset|distill|seed 99|prune-until|method obs)|parts", name)
             and re.search(r"dense0 .*--steps 400 ", name)]
    # Global Top_v with a lambda_gum that GUM has is the same run.
    at_10 = [*{(row["loss"], row["widths"]): row for row in at_10}.values()]
    if at_10 and study.tiny:
        parts["predictors"] = predictors(at_10)
    for name in ("methods", "methods-distilled", "where", "twice", "uniqueness-twice", "parts"):
        if name in parts:
            parts[f"measures-{name}"] = "\n\n".join(
                f"{measure.MEASURES[value]}:\n\n{table_of(study, questions[name], value)}"
                for value in ("sensitivity", "uniqueness", "span_uniqueness"))
    if not study.tiny:  # whose page that is
        print(*parts.values(), sep="\n\n")
        return
    draw_figures(study, questions, at_10)
    for name in questions:
        if name not in parts and f"<!-- {name} -->" in text:
            print(f"no run of {name} is made: its table stays as it is")
    for name, part in parts.items():
        before, comment, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if end:
            text = f"{before}{comment}{part}\n{end}{after}"
        else:
            print(f"{page} has no place for {name}: <!-- {name} -->, and below it <!-- end -->")
    with whole(page) as file:
        file.write_text(text, encoding="utf-8")
    print(f"the tables are in {page}")


ABOUT = dict(
    out=Flag(str, "where to make them: part of their commands, so go on with the same",
             "out/what-matters"),
    model=Flag(str, "tiny, or a Hub's model: then of the paper's own questions", "tiny"),
    dataset=Flag(data.DATASETS, "for a Hub's model", "wikitext"),
    data_path=Flag(str, "for a Hub's model: a copy of the data"),
    data=Flag(str, "a folder with copies of the Hub's data, as Salesforce/wikitext"))
FLAGS = dict(
    make=dict(
        only=Flag(str, "only questions whose name matches this"),
        list=Flag(None, "only print the commands of what is to be made next"),
        processes=Flag(int, "how many at a time (default: one for each core, or one on a GPU)",
                       within=ABOVE_0), **ABOUT),
    report=ABOUT)


def main():
    cli.call(*cli.command_line((make, report), FLAGS, __doc__))


if __name__ == "__main__":
    main()

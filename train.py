"""Fine-prune a GPT from one command: `python train.py --method gum --dataset wikitext --model gpt2 --leftover 0.25`.

In order: the flags and their defaults, a run's folder, the training loop, a whole run, the closing table. Nothing here
depends on a random state that would have to be saved: the order of the data is a function of the seed and the step. So
an interrupted run (of one process) goes on bit for bit as if it had not been interrupted.
"""

import argparse
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import measure
from model import GPT, SHAPES, GPTConfig
from prune import LEARNED, METHODS, Pruner, autocast_of, fine_prune, leftover_at, make_optimizer, shrink

# Launched by torchrun, N processes run this file in step. Each trains on its share of every batch; 0 alone writes.
PROCESS, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# The paper's settings (Appendix F); what it does not give is its released code's. `tiny`, trained from scratch, has
# some of its own. Settings that depend on others are in `resolve`.
DEFAULTS = dict(
    method="gum", dataset="stdlib", model="tiny", leftover=0.25, seed=0, epochs=5.0, batch_size=8, accumulate=1,
    lr=5e-4, eps=1e-4, weight_decay=0.1, label_smoothing=0.0, mask_lr=1e-2, lambda_mvp=2.0, lambda_sim=0.99, tau=0.1,
    alpha_ce=0.5, alpha_kd=0.5, temperature=2.0, device="cuda" if torch.cuda.is_available() else "cpu",
    checkpoint_every=500, log_every=10)
FOR_TINY = dict(steps=1000, batch_size=32, lr=5e-3, eps=1e-8, checkpoint_every=200, log_every=20)
BLOCK_SIZE = dict(stdlib=64, toysql=256, wikisql=512, e2e=512, wikitext=1024, samsum=1024)  # tokens

# Settings that mean something only when pruning, or when distilling; and flags that do not change what comes out.
PRUNING = ("leftover", "scope", "mask_lr", "lambda_mvp", "lambda_gum", "lambda_sim", "sim_tokens", "tau")
DISTILLING = ("teacher", "alpha_ce", "alpha_kd", "temperature")
NOT_SETTINGS = ("out", "resume", "checkpoint_every")

# Each flag: its type or choices, and what it is; `parse` adds the defaults from above.
FLAGS = {
    "what to run": dict(
        method=(METHODS, "how neurons are chosen: " + "; ".join(f"{name}, {text}" for name, text in METHODS.items())),
        model=(str, "a Hub name (gpt2, EleutherAI/gpt-neo-125m), a folder in Hugging Face's format, a finished run's "
                    "folder, or tiny, a small byte-level GPT-2 that is first trained dense"),
        leftover=(float, "v, the fraction of MLP neurons left at the end"),
        scope=(("layer", "global"), "the best of each layer or of the network (default: global for gum, else layer)"),
        seed=(int, "of the initialisation, the data's order and random scores"),
        out=(str, "the run's folder (default: out/NAME, named from the settings)"),
        resume=(None, "go on with the interrupted run of this very command")),
    "data": dict(
        dataset=(data.DATASETS, "what to train on"),
        data_path=(str, "a local folder with the data in the Hub's layout, instead of the Hub"),
        data_config=(str, "the data's configuration (default for wikitext: wikitext-103-v1)"),
        block_size=(int, f"tokens per sequence, at most the model's context (default: {str(BLOCK_SIZE)[1:-1]})")),
    "training": dict(
        steps=(int, "optimizer steps (default: what --epochs make)"),
        epochs=(float, "passes over the training split (samsum: 3)"),
        batch_size=(int, "sequences per optimizer step"),
        accumulate=(int, "micro-batches that a step is computed in, to save memory"),
        lr=(float, "the weights' peak learning rate"),
        eps=(float, "AdamW's epsilon for the weights; the scores keep the paper's 1e-4"),
        weight_decay=(float, "of the weights; not of biases, norms and scores"),
        label_smoothing=(float, "always 0 when distilling")),
    "pruning": dict(
        mask_lr=(float, "the scores' peak learning rate (soft: 10; gum for gpt2 on samsum: 1e-3)"),
        lambda_mvp=(float, "weight of the scores' regulariser"),
        lambda_gum=(float, "weight of uniqueness in it (default: 0; gum: 10, and 100 when distilling)"),
        lambda_sim=(float, "how fast the running similarity forgets"),
        sim_tokens=(int, "update the similarity from so many random tokens of each step (default: all of them)"),
        tau=(float, "soft movement's final threshold")),
    "distillation": dict(
        distill=(None, "learn from a dense model, too"),
        teacher=(str, "a dense model's folder or Hub name (default: the dense run of the same data, model and seed)"),
        alpha_ce=(float, "weight of the data's loss"),
        alpha_kd=(float, "weight of the teacher's"),
        temperature=(float, "of both distributions")),
    "machine": dict(
        device=(str, "cuda or cpu"),
        dtype=(("float32", "bfloat16"), "of the matrix products (default: bfloat16 on a GPU that has it)"),
        compile=(None, "compile the model's blocks with torch.compile: slow to start, then faster, on a GPU above all"),
        gradient_checkpointing=(None, "compute activations twice instead of keeping them: a third slower, far smaller"),
        checkpoint_every=(int, "steps between checkpoints"),
        log_every=(int, "steps between lines of log.jsonl"),
        eval_every=(int, "steps between evaluations on part of the validation split (default: a fifth of all)"))}
# What a number must be: its flags, whether a value is right, and how to say so.
RANGES = [
    ("steps epochs batch_size accumulate block_size lr eps mask_lr temperature tau checkpoint_every log_every "
     "eval_every sim_tokens", lambda x: 0 < x < math.inf, "above 0 and finite"),
    ("seed", lambda x: 0 <= x < 2**31, "from 0 to 2^31 - 1"),
    ("weight_decay lambda_mvp lambda_gum alpha_ce alpha_kd", lambda x: 0 <= x < math.inf, "at least 0"),
    ("leftover lambda_sim", lambda x: 0 < x <= 1, "in (0, 1]"),
    ("label_smoothing", lambda x: 0 <= x < 1, "in [0, 1)")]


def fail(message):
    """A user's mistake: one line, exit status 2."""
    who = f" in process {PROCESS} of {PROCESSES}" if PROCESSES > 1 else ""
    print(f"train.py: error{who}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def say(message):
    """To the user, from process 0."""
    if PROCESS == 0:
        print(message, file=sys.stderr)


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """The flags as given, None where they are not. Ends the program if one makes no sense, alone or with others."""
    parser = argparse.ArgumentParser(description="Fine-prune the MLP neurons of GPT-2 and GPT-Neo.", allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see python train.py --help")  # argparse prints the usage first
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (kind, text) in flags.items():
            tables = (("", DEFAULTS), ("tiny: ", FOR_TINY))
            defaults = [f"{where}{values[name]}" for where, values in tables if name in values]
            text += f" (default: {'; '.join(defaults)})" if defaults else ""
            how = dict(type=kind) if callable(kind) else dict(choices=list(kind)) if kind else dict(action="store_true")
            group.add_argument(flag_of(name), help=text, **how)
    args = parser.parse_args(argv)
    for names, allowed, text in RANGES:
        for name in names.split():
            if getattr(args, name) is not None and not allowed(getattr(args, name)):
                fail(f"{flag_of(name)} {getattr(args, name)} is out of range: it must be {text}")
    method, given = args.method or DEFAULTS["method"], [name for name, value in vars(args).items() if value]
    pruning = [name for name in PRUNING if name in given and (name, args.leftover) != ("leftover", 1.0)]
    distilling = [name for name in DISTILLING if name in given]
    for wrong, message in (
        (method == "none" and pruning, f"{flag_of(*pruning[:1] or [''])} means nothing with --method none: all stay"),
        (method == "soft" and args.scope, "--scope means nothing with --method soft: one threshold serves every layer"),
        (method not in LEARNED and args.lambda_gum, f"--lambda-gum goes with learned scores, not --method {method}"),
        (args.sim_tokens and (args.lambda_gum == 0 or method != "gum" and not args.lambda_gum),
         "--sim-tokens goes with --method gum, or another with learned scores and --lambda-gum above 0"),
        (not args.distill and distilling, f"{flag_of(*distilling[:1] or [''])} goes with --distill"),
        (args.compile and args.gradient_checkpointing, "--compile and --gradient-checkpointing do not go together"),
        (args.steps and args.epochs, "--steps and --epochs both say how long to train: give one of them"),
        (args.distill and args.label_smoothing, "--label-smoothing is 0 when distilling: leave it out"),
        (not re.fullmatch(r"cpu|cuda(:\d+)?", args.device or "cpu"), f"--device {args.device}: it is cuda or cpu"),
        (args.device and args.device != "cpu" and not torch.cuda.is_available(),
         f"--device {args.device}: this machine, or this build of torch, has no CUDA; use --device cpu")):
        if wrong:
            fail(message)
    return args


def resolve(flags):
    """The settings that `flags` (from `parse`) mean: their defaults filled in, the run's folder named."""
    args = SimpleNamespace(**vars(flags))
    given = {name: value for name, value in vars(flags).items() if value is not None and name not in NOT_SETTINGS}
    method, model, dataset = ((DEFAULTS | given)[name] for name in ("method", "model", "dataset"))
    defaults = DEFAULTS | (FOR_TINY if model == "tiny" else {})
    if dataset == "samsum":
        defaults |= dict(epochs=3.0) | (dict(mask_lr=1e-3) if (method, model) == ("gum", "gpt2") else {})
    defaults.pop("epochs" if "steps" in given or "steps" in defaults and "epochs" not in given else "steps", None)
    defaults["scope"] = {"gum": "global", "soft": None}.get(method, "layer")
    defaults["lambda_gum"] = (100.0 if args.distill else 10.0) if method == "gum" else 0.0
    if method == "soft":
        defaults["mask_lr"] = 10.0
    if method == "none":
        defaults |= dict.fromkeys(PRUNING) | dict(leftover=1.0)
    if not args.distill:
        defaults |= dict.fromkeys(DISTILLING)
    device = given.get("device", defaults["device"])
    defaults["dtype"] = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.out is None:
        parts = [args.method, args.dataset, Path(args.model).name]
        parts += [f"{args.leftover:g}"] * (args.method != "none") + ["distill"] * args.distill
        unsaid = ("method dataset model leftover distill seed data_path device dtype compile gradient_checkpointing "
                  "log_every eval_every").split()
        parts += [f"{flag_of(name)[2:]}={Path(value).name if name == 'teacher' else value}"
                  for name, value in given.items() if name not in unsaid and value != defaults.get(name)]
        args.out = str(Path("out") / "-".join([*parts, f"seed{args.seed}"]))
    return args


# A run's folder ends with config.json, model.safetensors, log.jsonl, and metrics.json, which is written last and so
# says that the run is finished. Until then it holds settings.json, from the start, and checkpoint.pt.


def settings_of(args):
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def read_json(path):
    """What a run's metrics.json or settings.json holds; in both, with its settings as "settings"."""
    try:
        saved = json.loads(path.read_text())
        return saved | dict(settings=dict(saved["settings"] if path.name == "metrics.json" else saved))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove {path.parent} and start over") from error


@contextmanager
def locked(folder, wait):
    """Keep other processes from making the same run at once; the lock ends with the process, however that ends."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process is at work in {folder}: wait for it, or name another --out") from error
    finally:
        os.close(handle)


def check_folder(args):
    """Whether the run in args.out is "new", "interrupted" or "finished". Raises ValueError if it can't go on there."""
    out = Path(args.out)
    state = next((file for file in ("metrics.json", "settings.json") if (out / file).is_file()), None)
    if not args.resume and state == "metrics.json":
        raise ValueError(f"{out} holds a finished run: name another folder with --out, or remove it")
    if not args.resume and state and (out / "checkpoint.pt").exists():
        raise ValueError(f"{out} holds an interrupted run: add --resume to its command to go on, or remove it")
    if state is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is no run's folder: name another with --out")
    if not args.resume:
        return "new"
    if state is None:
        raise ValueError(f"nothing to resume in {out}: run the same command without --resume")
    saved = read_json(out / state)["settings"]
    different = [f"{name} is {saved.get(name)} there and {value} here" for name, value in settings_of(args).items()
                 if saved.get(name) != value]
    if different:
        raise ValueError(f"{out} is a run with other settings ({', '.join(different)}): resume it with its own command")
    return "finished" if state == "metrics.json" else "interrupted"


def dense_run(args, flags):
    """The folder of the dense run of the same data, model and seed, and its flags: the same run without pruning.

    If the folder that those flags name is no finished run, any finished one of that data, model and seed beside it or
    beside args.out can serve as a teacher (but for `tiny`, whose dense run is made on the spot).
    """
    without = dict.fromkeys(PRUNING + DISTILLING + ("out",)) | dict(method="none", distill=False)
    dense = SimpleNamespace(**vars(flags) | without)
    folder = Path(resolve(dense).out)
    if args.distill and args.model != "tiny" and not (folder / "metrics.json").exists():
        for path in sorted({*folder.parent.glob("*/metrics.json"), *Path(args.out).parent.glob("*/metrics.json")}):
            saved = read_json(path)["settings"]
            same = ("dataset", "data_config", "model", "seed")
            if saved["method"] == "none" and not saved["distill"] and all(saved[n] == getattr(args, n) for n in same):
                return path.parent, dense
    return folder, dense


# Training.


def told_by_first(function):
    """What `function` returns, called by process 0 alone: the others wait for it, and get the same."""
    result = [function() if PROCESS == 0 else None]
    if PROCESSES > 1:
        dist.broadcast_object_list(result)
    return result[0]


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)).tolist()


def batch_indices(step, n, batch_size, seed):
    """Which of the n training sequences make up the batch of `step` (from 1): one shuffled epoch after the other."""
    first = (step - 1) * batch_size
    return [shuffled(n, seed, place // n)[place % n] for place in range(first, first + batch_size)]


def lines_up_to(log, step):
    """The lines of a log up to `step`; a later one was written after the checkpoint, and will be written again."""
    try:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        return "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log} is damaged: remove {log.parent} and start over") from error


def train(args, steps, model, teacher, train_data, val_data, resumed, stop):
    """The loop: fine-tune `model` for `steps`, pruning as the schedule says. Returns its sums: seconds, tokens.

    On return the model skips the neurons that were pruned. `resumed` is a checkpoint to go on from, or None. Once
    something is put into the list `stop`, the loop ends between two steps: it saves a checkpoint and raises
    KeyboardInterrupt. Raises FloatingPointError when the loss is no longer a number.
    With several processes, each has its own running similarity, of which a checkpoint keeps that of process 0.
    """
    checkpoint, log = Path(args.out) / "checkpoint.pt", Path(args.out) / "log.jsonl"
    pruner = Pruner(model, args.method, args.leftover, steps, args.scope, args.lambda_mvp, args.lambda_gum,
                    args.lambda_sim, args.tau, args.seed)
    optimizer = make_optimizer(model, pruner, args)
    sums = dict(seconds=0.0, tokens=0, loss=0.0, norm=0.0, since=0)  # loss and norm: over the steps since the last line
    done = saved = 0
    if resumed is not None:
        done = saved = resumed["step"]
        sums = resumed["sums"]
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        pruner.load_state_dict(resumed["pruner"])
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile_blocks()
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if PROCESSES > 1 else model
    if PROCESS == 0:
        measure.write_whole(log, lines_up_to(log, done))
    eval_every = args.eval_every or max(steps // 5, 1)

    def save(step):
        if PROCESS == 0:
            sums.update(loss=float(sums["loss"]), norm=float(sums["norm"]))
            torch.save(dict(step=step, model=model.state_dict(), optimizer=optimizer.state_dict(),
                            pruner=pruner.state_dict(), sums=sums), checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    bar = tqdm(total=steps, initial=done, desc=Path(args.out).name, unit="step", dynamic_ncols=True, mininterval=0.5,
               **(dict(disable=True) if PROCESS else {}))
    model.train()
    clock = time.perf_counter()
    for step in range(done + 1, steps + 1):
        # Copying starts while the device is still busy with the step before.
        batch = train_data.batch(batch_indices(step, len(train_data), args.batch_size, args.seed))
        micro_batches = data.micro_batches(batch, args.device, args.accumulate, PROCESS, PROCESSES, args.sim_tokens,
                                           seed=1_000_003 * args.seed + step)
        try:
            widths, loss, norm = fine_prune(parallel, pruner, optimizer, micro_batches, step, args, teacher)
        except RuntimeError:  # another process is gone (on a CPU; GPUs wait): no weight has changed since the last step
            if PROCESSES > 1 and step > 1:
                save(step - 1)
            raise
        sums["loss"] += loss
        sums["norm"] += norm
        sums["tokens"] += batch[0].numel()
        sums["since"] += 1
        # Read once, because a signal may come at any moment. Several processes have to stop at the same step.
        last, stopping = step == steps, bool(stop)
        if PROCESSES > 1:
            stopping = step % args.log_every == 0 and told_by_first(lambda: bool(stop))
        evaluates = step % eval_every == 0 and not last
        logs = step % args.log_every == 0 or evaluates or last
        saves = step % args.checkpoint_every == 0 or last or stopping
        if logs or saves:
            sums["loss"], sums["norm"] = float(sums["loss"]), float(sums["norm"])
            sums["seconds"] += time.perf_counter() - clock
            if not (sums["loss"] + sums["norm"]) < float("inf"):
                bar.close()
                kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
                raise FloatingPointError(f"the loss is no longer a finite number at step {step}; {kept}; try a lower "
                                         f"--lr than {args.lr:g}")
            if logs and PROCESS == 0:
                n = sums["since"]
                record = dict(step=step, loss=sums["loss"] / n, grad_norm=sums["norm"] / n,
                              lr=optimizer.param_groups[0]["lr"], v=leftover_at(step, steps, args.leftover),
                              leftover=sum(widths) / max(sum(pruner.widths), 1), widths=widths)
                if evaluates:
                    autocast = autocast_of(args.device, args.dtype)
                    record["val_loss"] = measure.mean_loss(model, val_data, autocast, most=16)
                    model.train()
                record |= dict(seconds=sums["seconds"], tokens_per_second=sums["tokens"] / sums["seconds"])
                with open(log, "a") as file:
                    file.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{record['loss']:.3f}", leftover=f"{record['leftover']:.0%}",
                                tokens_per_s=f"{record['tokens_per_second']:,.0f}")
            if logs:
                sums["loss"], sums["norm"], sums["since"] = 0.0, 0.0, 0
            if saves:
                save(step)
                saved = step
            clock = time.perf_counter()  # evaluating and saving are not training
        bar.update(step - bar.n)
        if stopping and not last:
            bar.close()
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}, which is saved in {checkpoint}")
    bar.close()
    pruner.select(steps)
    return sums


# A whole run: check, load, train, shrink, save, report.


def load_model(source, args):
    """The model in folder or Hub name `source`, or for None a new `tiny`, initialised from the seed."""
    if source is not None:
        return GPT.from_pretrained(source).to(args.device)
    torch.manual_seed(args.seed)
    return GPT(GPTConfig(**SHAPES["tiny"])).to(args.device)


def run(flags, implied=False):
    """Make the run that `flags` (from `parse`) describe, and for `tiny` the dense run `implied`. Returns its metrics.

    Raises ValueError or OSError for what the user got wrong, before anything is trained, and what `train` raises.
    """
    args = resolve(flags)
    if args.accumulate * PROCESSES > args.batch_size:
        raise ValueError(f"--accumulate {args.accumulate} on {PROCESSES} processes is more than the {args.batch_size} "
                         "sequences of a batch")
    out, tiny = Path(args.out), args.model == "tiny"
    dense, dense_flags = dense_run(args, flags)
    state, has_dense = told_by_first(lambda: (check_folder(args), (dense / "metrics.json").exists()))
    if state == "finished":
        return read_json(out / "metrics.json")
    if args.distill and not (args.teacher or has_dense or tiny):
        told = ("data_path", "data_config", "block_size", "steps", "epochs", "lr")
        extra = "".join(f" {flag_of(name)} {shlex.quote(str(value))}" for name, value in vars(dense_flags).items()
                        if name in told and value is not None)
        raise ValueError(f"--distill found no teacher: name one with --teacher, or make it first with: python train.py "
                         f"--method none --dataset {args.dataset} --model {args.model} --seed {args.seed}{extra}")

    # What can be wrong with the model, the data and the teacher is found here.
    source = args.model if not tiny else dense if args.method != "none" else None
    model = None if tiny else load_model(source, args)
    config = GPTConfig(**SHAPES["tiny"]) if tiny else model.config
    block_size = args.block_size or min(BLOCK_SIZE[args.dataset], config.n_positions)
    if block_size > config.n_positions:
        raise ValueError(f"--block-size {block_size} is longer than the model's context of {config.n_positions} tokens")
    train_data, val_data = (
        data.load(args.dataset, split, config.vocab_size, block_size, args.data_path, args.data_config)
        for split in ("train", "validation"))
    if args.method != "none" and not sum(config.mlp_widths):
        raise ValueError(f"{args.model} has no MLP neurons left to prune")
    teacher = load_model(args.teacher or dense, args) if args.teacher or args.distill and not tiny else None
    if teacher and (teacher.config.vocab_size != config.vocab_size or teacher.config.n_positions < block_size):
        raise ValueError(f"the teacher has a vocabulary of {teacher.config.vocab_size} and a context of "
                         f"{teacher.config.n_positions} tokens; {config.vocab_size} and {block_size} are needed")
    steps = args.steps or max(1, round(args.epochs * len(train_data) / args.batch_size))
    resumed = None
    if state == "interrupted" and (out / "checkpoint.pt").exists():
        try:
            resumed = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # torch has several exceptions for a damaged file
            raise ValueError(f"{out}/checkpoint.pt is damaged: remove {out} and start over") from error

    out.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=implied) if PROCESS == 0 else nullcontext():
        if told_by_first((out / "metrics.json").exists):  # another command has finished it meanwhile
            return read_json(out / "metrics.json")
        if PROCESS == 0:
            measure.write_whole(out / "settings.json", json.dumps(settings_of(args), indent=2) + "\n")
        if tiny and not has_dense and (source is not None or args.distill and not args.teacher):
            say(f"first the dense model, in {dense}")
            dense_flags.resume = any((dense / file).exists() for file in ("settings.json", "metrics.json"))
            run(dense_flags, implied=True)
        model = model or load_model(source, args)
        if args.distill:
            say(f"teacher: {args.teacher or dense}")
            teacher = (teacher or load_model(dense, args)).requires_grad_(False).eval()

        stop = []  # filled by Ctrl-C and SIGTERM
        handlers = {n: signal.signal(n, lambda *_: stop.append(True)) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            sums = train(args, steps, model, teacher, train_data, val_data, resumed, stop)
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
        del teacher

        def finish():
            shrink(model).save_pretrained(out)
            metrics = dict(settings=settings_of(args), steps=steps, block_size=block_size, processes=PROCESSES,
                           seconds=sums["seconds"], tokens=sums["tokens"],
                           tokens_per_second=sums["tokens"] / sums["seconds"])
            metrics |= compare(load_model(source, args).eval(), load_model(out, args).eval(), val_data, args)
            metrics["versions"] = dict(python=platform.python_version(), torch=torch.__version__)
            on_gpu = args.device.startswith("cuda")
            metrics["machine"] = torch.cuda.get_device_name(args.device) if on_gpu else platform.machine()
            measure.write_whole(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            for file in ("checkpoint.pt", "settings.json"):
                (out / file).unlink(missing_ok=True)
            return metrics

        return told_by_first(finish)


def join_processes(flags):
    """Make this one of the processes that torchrun has launched, on the GPU that is its own, or the CPU."""
    device, local = flags.device or DEFAULTS["device"], int(os.environ["LOCAL_RANK"])
    if device == "cuda" and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # what "cuda" means from here on
    elif device != "cpu":
        raise ValueError(f"--device {device} with torchrun: it is cuda, or cpu, and this machine has "
                         f"{torch.cuda.device_count()} GPUs, each for one process")
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=1))


def compare(start, result, val_data, args):
    """Both models' loss on the whole validation split (nats per token), size, speed measured in turns, and a sample."""
    tokenizer = data.tokenizer(result.config.vocab_size)
    if isinstance(val_data, data.Blocks):
        ids = tokenizer.encode("def ") if args.dataset == "stdlib" else val_data.tokens[:16].tolist()
        ids = ids[: val_data.block_size]
    else:
        ids = val_data.prompts[0]
    speeds = measure.prefill_speed([start, result], val_data.batch(range(min(args.batch_size, len(val_data))))[0])
    about = {}
    for name, model, speed in zip(("start", "result"), (start, result), speeds):
        loss = measure.mean_loss(model, val_data, autocast_of(args.device, args.dtype))
        text = ids + model.generate([ids], val_data.block_size - len(ids), temperature=0.8, top_k=40, eot=tokenizer.eot,
                                    generator=torch.Generator(args.device).manual_seed(0))[0]
        about[name] = dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700)), widths=list(model.config.mlp_widths),
                           parameters=sum(p.numel() for p in model.parameters()), prefill_tokens_per_second=speed,
                           sample=tokenizer.decode(text))
    before, after = about["start"]["widths"], about["result"]["widths"]
    return about | dict(leftover_wanted=args.leftover, leftover=sum(after) / max(sum(before), 1),
                        leftover_per_layer=[k / max(m, 1) for k, m in zip(after, before)])


def report(metrics, folder):
    """Print a finished run as a table: the model it started from against the one it made."""
    start, result = metrics["start"], metrics["result"]
    method = metrics["settings"]["method"]
    print(f"\n{'':24}{'start' if method == 'none' else 'dense':>14}{method:>14}{'ratio':>9}")
    for title, key, form in (("parameters", "parameters", ",.0f"), ("validation loss (nats)", "val_loss", ".4f"),
                             ("validation perplexity", "val_perplexity", ".3f"),
                             ("tokens/s (prefill)", "prefill_tokens_per_second", ",.0f")):
        print(f"{title:24}{start[key]:>14{form}}{result[key]:>14{form}}{result[key] / start[key]:>8.2f}x")
    wanted, total = metrics["leftover_wanted"], sum(start["widths"])
    print(f"neurons left: {metrics['leftover']:.2%} of {total:,} ({wanted:.2%} wanted)")
    print(f"neurons per layer: {' '.join(map(str, start['widths']))} -> {' '.join(map(str, result['widths']))}")
    print(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s")
    for name, model in ((f"{'start' if method == 'none' else 'dense'}", start), (method, result)):
        print(f"\n--- {name} writes:\n{model['sample']}")
    print(f"\nthe model, its log and metrics are in {folder}")


def main():
    flags = parse()
    # A pruned neuron's gradient is 0, so AdamW's mean of it shrinks until a CPU would compute with it in slow motion.
    torch.set_flush_denormal(True)
    try:
        if PROCESSES > 1:
            join_processes(flags)
        metrics = run(flags)
        if PROCESS == 0:
            report(metrics, resolve(flags).out)
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except RuntimeError as error:  # torch has no exceptions of its own for these
        if re.search("out of memory|can't allocate memory", str(error)):
            fail("out of memory: try --gradient-checkpointing, a larger --accumulate, or a smaller --block-size")
        if PROCESSES > 1 and re.search("connection|socket|peer|timed out|timeout|nccl", str(error), re.IGNORECASE):
            fail("another process of this job is gone: go on from the last checkpoint with the same command and "
                 "--resume")
        raise
    except KeyboardInterrupt as stopped:
        launcher = ["torchrun", f"--nproc_per_node={PROCESSES}"] if PROCESSES > 1 else ["python"]
        again = shlex.join([*launcher, *sys.argv, *["--resume"] * (not flags.resume)])
        say(f"\n{stopped}; go on with: {again}" if str(stopped) else "\nstopped")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

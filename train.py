"""Fine-prune a GPT: `python train.py --method gum --dataset wikitext --model gpt2 --leftover 0.25`.

In order: a step of fine-pruning, the loop around it, what a run keeps in its folder, a whole run,
the flags. The order of the data is a function of the seed and the step, and nothing else is random:
an interrupted run goes on as if it had not been.
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
import traceback
import zipfile
import zlib
from contextlib import nullcontext, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from results import cli

if __name__ == "__main__":
    cli.look(__file__, "parse")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import measure
from model import GPT, TINY, GPTConfig, whole
from prune import METHODS, HeadLoss, Pruner, chosen, defaults_of, lr_factor, shrink, v_at
from results import runs
from results.checks import check_batch, check_leftover
from results.cli import ABOVE_0, AT_LEAST_0, DEVICE, SHARE, Flag, flag_of
from results.compare import compare, draw_training, known_loss, report, tracker
from results.export import command_of, write_card
from results.tokenizer import write_tokenizer

# Launched by torchrun, several train in step, each on its share of a batch; 0 alone writes.
PROCESS, PROCESSES = cli.processes()


def make_optimizer(model, pruner, args):
    """AdamW over weights, what does not decay (biases, norms), and scores at their own rate."""
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], peak=args.lr,
                   weight_decay=args.weight_decay),
              dict(params=[p for p in model.parameters() if p.dim() < 2], peak=args.lr)]
    if pruner.scores.requires_grad:
        groups.append(dict(params=[pruner.scores], peak=args.mask_lr, eps=1e-4))
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=args.eps, weight_decay=0.0,
                             fused=True)


def autocast_of(args):
    """Matrix products in bfloat16, if `args.dtype` says so."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, args.dtype == "bfloat16")


def hidden(model, micro):
    """The final hidden states of the tokens that are asked for the next one. [n, d]"""
    return chosen(model(micro.idx, head=False), micro.places)


def fine_prune(model, pruner, optimizer, micro_batches, step, args, teacher=None):
    """One step of fine-pruning, counted from 1. Returns how many neurons each layer keeps, the mean
    loss in nats of the batch's tokens that count, and the norm of the weights' gradient.

    `model` is a GPT, or DistributedDataParallel around one; `micro_batches` are `data`'s. `args`
    has device, dtype, and what `HeadLoss` reads.
    """
    widths = pruner.select(step)  # M: from here on the MLPs skip the other neurons
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor(step, pruner.steps)
    total, head = 0.0, getattr(model, "module", model).wte.weight  # [V, d]
    for micro in micro_batches:  # whose gradients add up
        taught = None
        if teacher is not None:
            with torch.no_grad(), autocast_of(args):
                taught = hidden(teacher, micro), teacher.wte.weight
        # With several processes, only the last backward pass averages the gradients over them.
        model.require_backward_grad_sync = micro is micro_batches[-1]
        with autocast_of(args), pruner.recording(micro.similar):
            x = hidden(model, micro)  # [n, d]
            loss = HeadLoss.apply(x, head, micro.targets, taught, args) / micro.divisor
        loss.backward()
        total += loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(total)
        total /= PROCESSES
    pruner.update(step)  # the scores' gradient
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # not the scores'
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return widths, total, norm


def train(args, steps, model, teacher, train_data, val_data, stop):
    """The loop: fine-tune `model` for `steps`, pruning as the schedule says. Returns its progress,
    with seconds and tokens; the model is left skipping the pruned neurons.

    Goes on from a checkpoint in the run's folder; writes one, and raises KeyboardInterrupt, once
    there is something in the list `stop`. Raises ValueError if it is damaged, FloatingPointError
    when the loss is no number.
    """
    # Evaluating a token takes up to 2/3 of its training, so an eighth of them under a tenth.
    folder, per_step = Path(args.out), args.batch_size * train_data.block_size / 8
    eval_every = args.eval_every or max(steps // 5, math.ceil(2048 / per_step))
    most = min(max(eval_every * per_step, 2048), 2**17)
    one_in = math.ceil(len(val_data) * val_data.block_size / most)
    pruner = Pruner(model, args.method, args.leftover, steps, args.seed,
                    **{name: getattr(args, name) for name in USUAL})
    optimizer = make_optimizer(model, pruner, args)
    progress = SimpleNamespace(step=0, saved=0, since=0, loss=0.0, norm=0.0, tokens=0, seconds=0.0,
                               log=runs.log_state(b""), started=runs.model_state(model))
    parts = dict(model=model, pruner=pruner, optimizer=optimizer)
    origin = [runs.FORMAT, settings_of(args) | dict(data_path=None), progress.started,
              teacher and runs.model_state(teacher)]
    if (folder / "checkpoint.pt").exists():
        restore(folder / "checkpoint.pt", progress, parts, origin)
    elif args.resume:
        say(f"no checkpoint in {folder}: the run begins with its first step")
    model.gradient_checkpointing, parallel = args.gradient_checkpointing, model
    if args.compile:
        model.compile_blocks()
    if PROCESSES > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if PROCESS == 0:
        progress.log = runs.cut_log(folder / "log.jsonl", progress.log)
    evaluations = range(eval_every, steps, eval_every)
    say(f"{steps:,} steps of {args.batch_size} x {train_data.block_size} tokens at most; evaluated "
        f"{len(evaluations)} times on 1/{one_in} of the validation data, at last on all")
    model.train()
    clock, saved_at = time.perf_counter(), time.monotonic()
    name, shown = f"{args.method} {args.leftover:.0%}", dict(disable=True) if PROCESS else {}
    with (data.bar(name, steps, "step", initial=progress.step, **shown) as bar,
          tracker(folder, args.tensorboard and not PROCESS) as track):
        for step in range(progress.step + 1, steps + 1):
            indices = batch_indices(step, len(train_data), args.batch_size, args.seed)
            batch, seed = train_data.batch(indices, args.device), 1_000_003 * args.seed + step
            micro_batches = data.micro_batches(batch, args.device, args.accumulate, PROCESS,
                                               PROCESSES, args.sim_tokens, seed)
            widths, loss, norm = fine_prune(parallel, pruner, optimizer, micro_batches, step, args,
                                            teacher)
            progress.step, progress.since = step, progress.since + 1
            progress.loss += loss
            progress.norm += norm
            progress.tokens += batch[0].numel()
            last = step == steps
            stopping, overdue = told_by_first(  # all stop at the same step
                lambda: (bool(stop), time.monotonic() - saved_at > 600))
            evaluates = step in evaluations
            logs = step % args.log_every == 0 or evaluates or last
            saves = step % args.checkpoint_every == 0 or last or stopping or overdue
            if logs or saves:
                check_finite(progress, args)  # waits for the device
                progress.seconds += time.perf_counter() - clock
                if logs:
                    v_t = v_at(step, args.leftover, **pruner.when)
                    record = dict(v_t=v_t, widths=widths,
                                  leftover=sum(widths) / max(sum(pruner.widths), 1),
                                  lr=optimizer.param_groups[0]["lr"])
                    if evaluates and PROCESS == 0:
                        record["val_loss"] = measure.mean_loss(model, val_data, autocast_of(args),
                                                               one_in)
                        model.train()
                    track(log(folder, progress, record, bar))
                if saves:
                    save(folder, progress, parts, origin)
                    saved_at = time.monotonic()
                    if stopping:  # or torchrun ends the first while it writes
                        told_by_first(lambda: None)
                clock = time.perf_counter()  # that was not training
            bar.update(step - bar.n)
            if stopping and not last:
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}, which is saved in "
                                        f"{folder / 'checkpoint.pt'}")
    pruner.select(steps)  # the final choice, also if nothing was left to do
    return progress


@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator).tolist()


def batch_indices(step, n, batch_size, seed):
    """Which of the n training sequences are the batch of `step` (from 1), epoch after epoch."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [shuffled(n, seed, place // n)[place % n] for place in places]


def told_by_first(function):
    """What `function` returns in process 0, for which the others wait."""
    result = [function() if PROCESS == 0 else None]
    if PROCESSES > 1:
        dist.broadcast_object_list(result, device=torch.device("cpu"))  # no GPU is waited for
    return result[0]


def check_finite(progress, args):
    """Fetch loss and norm from the device; FloatingPointError if one is not a number."""
    progress.loss, progress.norm = float(progress.loss), float(progress.norm)
    if not math.isfinite(progress.loss + progress.norm):
        kept = f"; the checkpoint of step {progress.saved} is kept" * (progress.saved > 0)
        raise FloatingPointError(f"the loss is no longer a finite number at step {progress.step}"
                                 f"{kept}; try less than --lr {args.lr:g}, or milder settings")


# Checkpoint and log; what else is in a run's folder, results/runs.py says.


def save(folder, progress, parts, origin):
    """Write the checkpoint, whole or not at all; all processes have the same. `origin`:
    the run's settings, and checksums of the models that it started from."""
    progress.saved = progress.step
    if PROCESS == 0:
        progress.log = runs.log_state((folder / "log.jsonl").read_bytes())
        states = {name: part.state_dict() for name, part in parts.items()}
        states |= dict(progress=vars(progress), origin=origin)
        # A file: torch then tells why it can't be written.
        with whole(folder / "checkpoint.pt") as path, open(path, "wb") as file:
            torch.save(states, file)


def restore(file, progress, parts, origin):
    """Go on from what `save` wrote, or raise ValueError."""
    try:
        with zipfile.ZipFile(file) as zipped:
            damaged = zipped.testzip()  # torch does not look
        mapped = os.name != "nt"  # Windows could not replace it
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if damaged or content.get("origin") != origin:
            raise ValueError("a wrong checksum, or another --model, teacher or setting")
        vars(progress).update(content["progress"])
        for name, part in parts.items():
            part.load_state_dict(content[name])
    except Exception as error:  # torch has several for a damaged file
        raise ValueError(f"can't go on from {file} ({type(error).__name__} {error}): give what it "
                         f"was begun with; if it is damaged, remove {file.parent} and start over"
                         ) from error


def log(folder, progress, record, bar):
    """Append `record` to log.jsonl, with means over the steps since the last line; returns it."""
    n = progress.since
    record = dict(step=progress.step, loss=progress.loss / n, grad_norm=progress.norm / n,
                  **record, seconds=progress.seconds,
                  tokens_per_second=progress.tokens / progress.seconds)
    progress.loss, progress.norm, progress.since = 0.0, 0.0, 0
    if PROCESS == 0:
        try:
            with open(folder / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk's does not name the file
            raise OSError(f"can't write {folder / 'log.jsonl'}: {error.strerror}") from error
        bar.set_postfix(loss=f"{record['loss']:.3f}", leftover=f"{record['leftover']:.0%}",
                        tokens_per_s=f"{record['tokens_per_second']:,.0f}", refresh=False)
    return record


# A whole run: check, load, train, shrink, save, compare.


START_OVER = "to use these, move it away"


def settings_of(args):
    """What decides the result: not where and how often something is written."""
    return {name: value for name, value in vars(args).items() if name not in
            ("out", "resume", "checkpoint_every", "log_every", "eval_every", "tensorboard")}


def check_folder(args):
    """Whether the run in args.out is "new", "interrupted" or "finished"; ValueError if it can't go
    on there."""
    out = Path(args.out)
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link to nothing: remove it, or name another --out")
    found = runs.read_run(out) if out.is_dir() else None
    state = found.state if found else "new"
    if state == "new" and out.exists() and not (found and all(
            path.name == ".lock" or runs.is_temporary(path) for path in out.iterdir())):
        raise ValueError(f"{out} exists and is no run's folder: move it, or name another --out")
    if args.resume:
        if state == "new":
            raise ValueError(f"nothing to resume in {out}: run the command without --resume")
        runs.check_settings(found, settings_of(args), "resume it with its own command")
        return state
    if state == "finished":
        raise ValueError(f"{out} holds a finished run: name another with --out, or remove it")
    if (out / "checkpoint.pt").exists():
        with runs.locked(out, wait=False):  # or it is not interrupted at all
            raise ValueError(f"{out} holds an interrupted run: go on with --resume, or remove it")
    above = next(one for one in out.absolute().parents if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ValueError(f"can't write into {above}: name another folder with --out")
    return "new"


def dense_for(args, flags):
    """The folder of the dense run of the same data, model and seed, or of another like it that is
    finished, and the flags that make it: the same but for pruning."""
    without = dict.fromkeys([*FLAGS["pruning"], *FLAGS["distillation"], "out", "resume"])
    dense = SimpleNamespace(**vars(flags) | without | dict(method="none"))
    folder = Path(resolve(dense).out)
    if args.distill and args.model != "tiny" and not (folder / "metrics.json").exists():
        beside = runs.find_dense([folder.parent, Path(args.out).parent], vars(args))
        folder = beside.path if beside else folder
    return folder, dense


def load_model(name, args):
    """The model in a folder or of the Hub, or a new `tiny`, drawn from the seed."""
    if name != "tiny":
        return runs.load_model(name).to(args.device)
    torch.manual_seed(args.seed)
    return GPT(GPTConfig(**TINY)).to(args.device)


def run(flags, implied=False):
    """Make the run of `flags` (from `parse`), for `tiny` first the dense run that is `implied`.
    Returns its metrics. Raises ValueError or OSError for a user's mistake, before anything is
    trained, and what `train` raises."""
    args = resolve(flags)
    out, tiny = Path(args.out), args.model == "tiny"
    dense, dense_flags = dense_for(args, flags)
    state, has_dense = told_by_first(
        lambda: (check_folder(args), (dense / "metrics.json").exists()))
    if state == "finished":
        load_model(out, args)
        return finished(out)
    if args.distill and not (args.teacher or has_dense or tiny):
        raise ValueError("--distill found no teacher: name one with --teacher, or first make it: "
                         f"{command_of(dense_flags)}")

    source = dense if tiny and args.method != "none" else args.model
    uses_dense = source == dense or args.distill and not args.teacher
    if uses_dense and out.resolve() == dense.resolve():
        raise ValueError(f"{out} is where its dense model goes: name another --out")
    model = load_model(args.model, args)
    vocab_size, n_positions = model.config.vocab_size, model.config.n_positions
    block_size = args.block_size or min(BLOCK_SIZE[args.dataset], n_positions)
    if block_size > n_positions:
        raise ValueError(f"--block-size {block_size} exceeds the model's context of {n_positions}")
    train_data, val_data = (data.load(args.dataset, split, vocab_size, block_size, args.data_path,
                                      args.data_config) for split in ("train", "validation"))
    about = dict(train=train_data.about, validation=val_data.about)
    check_leftover(args, model.config.mlp_widths)
    check_batch(args, PROCESSES, model.config, train_data)
    teacher = None
    if args.teacher or args.distill and not tiny:
        teacher = load_model(args.teacher or dense, args)
        known = teacher.config
        if known.vocab_size != vocab_size or known.n_positions < block_size:
            raise ValueError(f"the teacher has a vocabulary of {known.vocab_size}, a context of "
                             f"{known.n_positions}, not {vocab_size} and {block_size}")
    steps = args.steps or max(1, round(args.epochs * len(train_data) / args.batch_size))
    runs.check_data(about, told_by_first(lambda: about), "process 0", "give all the same")
    if has_dense and uses_dense:
        made = runs.read_run(dense)
        runs.check_data(about, made.metrics["data"], dense, START_OVER)
        usual = resolve(dense_flags)
        if usual.out == str(dense):  # else it was found by what it is
            own = {name: value for name, value in settings_of(usual).items() if name not in
                   ("model", "data_path", *FLAGS["machine"])}
            runs.check_settings(made, own, START_OVER)
        if not tiny and made.metrics["started"] != runs.model_state(model):
            raise ValueError(f"{dense} started from another {args.model}: {START_OVER}")
    say(f"data: {train_data.about['source']}" + "".join(
        f"; {split}: {of['tokens']:,} tokens, sha256 {of['sha256'][:8]}"
        for split, of in about.items()))

    out.mkdir(parents=True, exist_ok=True)
    with runs.locked(out, wait=implied) if PROCESS == 0 else nullcontext():
        if told_by_first((out / "metrics.json").exists):  # made meanwhile
            return finished(out)
        if (out / "checkpoint.pt").exists():
            runs.check_data(about, runs.read_run(out).settings["data"], out, START_OVER)
        if PROCESS == 0:
            for left in filter(runs.is_temporary, out.iterdir()):
                left.unlink()
            runs.write_json(out / "settings.json", settings_of(args) | dict(data=about))
        if tiny and not has_dense and uses_dense:
            say(f"first the dense model, in {dense}")
            dense_flags.resume = dense.is_dir() and runs.read_run(dense).state != "new"
            made = run(dense_flags, implied=True)
            runs.check_data(about, made["data"], dense, START_OVER)
        model = model if source == args.model else load_model(source, args)
        if args.distill:
            say(f"teacher: {args.teacher or dense}")
            teacher = (teacher or load_model(dense, args)).requires_grad_(False).eval()

        with cli.stopping_signals() as stop:
            done = train(args, steps, model, teacher, train_data, val_data, stop)
        del teacher

        def finish():
            shrink(model).save_pretrained(out)
            hub = None if tiny or os.path.isdir(args.model) else args.model
            write_tokenizer(out, vocab_size, n_positions)
            gpu = args.device != "cpu" and torch.cuda.get_device_name(args.device)
            metrics = dict(
                settings=settings_of(args), command=command_of(flags), base_model=hub, data=about,
                teacher=str(args.teacher or dense) if args.distill else None,
                log=done.log, started=done.started, model=runs.model_state(model), steps=steps,
                block_size=block_size, processes=PROCESSES, seconds=done.seconds,
                tokens=done.tokens, tokens_per_second=done.tokens / done.seconds,
                versions=dict(python=platform.python_version(), torch=torch.__version__),
                machine=gpu or platform.machine())
            models = load_model(source, args).eval(), load_model(out, args).eval()
            metrics |= compare(*models, val_data, args, autocast_of(args),
                               known_loss(source, metrics))
            draw_training(out, metrics)
            write_card(out, metrics)
            runs.write_json(out / "metrics.json", metrics)

        told_by_first(finish)
        return finished(out)


def finished(out):
    """A finished run's metrics; what it took to go on goes."""
    if PROCESS == 0:
        for file in ("checkpoint.pt", "settings.json", ".lock"):
            with suppress(OSError):  # none there; or, on Windows, the lock is held
                (out / file).unlink()
    return runs.read_run(out).metrics


# The flags. Defaults are the paper's (Appendix F) or its released code's; what depends on others
# is in `resolve`. `tiny`, trained from scratch, has some of its own.

BLOCK_SIZE = dict(stdlib=64, toysql=256, wikisql=512, e2e=512, wikitext=1024, samsum=1024)  # tokens
USUAL = defaults_of("topv")


def scope_of(text):
    """What --scope may be: layer, global, or the width that each layer ends with."""
    if text not in ("layer", "global") and not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(
            f"{text} is not layer, global, or a width for each layer, as 352,85,58,17")
    return text


FLAGS = {
    "what to run": dict(
        method=Flag(METHODS, "how neurons are chosen: " + "; ".join(
            f"{name}, {method.about}" for name, method in METHODS.items()), "gum"),
        model=Flag(str, "a Hub name (gpt2, EleutherAI/gpt-neo-125m), a folder in its format, as a "
                   "run's, or tiny, which is first trained dense", "tiny"),
        seed=Flag(int, "of the initialisation, the data's order and random scores", 0,
                  within="from 0 to 2^31 - 1"),
        out=Flag(str, "the run's folder (default: out/NAME, named from the settings)"),
        resume=Flag(None, "go on with the interrupted run of this command")),
    "data": dict(
        dataset=Flag(data.DATASETS, "what to train on", "stdlib"),
        data_path=Flag(str, "a local folder with the data in the Hub's layout"),
        data_config=Flag(str, "its configuration (wikitext: wikitext-103-v1)"),
        block_size=Flag(int, "tokens per sequence (default: at most the context, "
                        f"{str(BLOCK_SIZE)[1:-1]})", within=ABOVE_0)),
    "training": dict(
        steps=Flag(int, "optimizer steps (default: what --epochs make)", None, 1000, ABOVE_0),
        epochs=Flag(float, "passes over the training split (samsum: 3)", 5.0, None, ABOVE_0),
        batch_size=Flag(int, "sequences per optimizer step", 8, 32, ABOVE_0),
        accumulate=Flag(int, "micro-batches to cut it into", 1, None, ABOVE_0),
        lr=Flag(float, "the weights' peak learning rate", 5e-4, 5e-3, ABOVE_0),
        eps=Flag(float, "AdamW's epsilon, for the scores always 1e-4", 1e-4, 1e-8, ABOVE_0),
        weight_decay=Flag(float, "of weights, not of biases, norms, scores", 0.1, None, AT_LEAST_0),
        label_smoothing=Flag(float, "always 0 when distilling", 0.0, None, "in [0, 1)")),
    "pruning": dict(
        leftover=Flag(float, "v, the fraction of MLP neurons left at the end", 0.25, None, SHARE),
        scope=Flag(scope_of, "layer or global (gum, obs): the best of each, or of all; or each "
                   "layer's width, as in 352,85,58,17", USUAL["scope"]),
        prune_from=Flag(float, "the share of the steps after which pruning begins (obs: 0)",
                        USUAL["prune_from"], None, "in [0, 1)"),
        prune_until=Flag(float, "the share by which v is reached (obs: 0.1)",
                         USUAL["prune_until"], None, SHARE),
        mask_lr=Flag(float, "the scores' peak learning rate (soft: 10; gum, gpt2, samsum: 1e-3)",
                     USUAL["mask_lr"], None, ABOVE_0),
        lambda_mvp=Flag(float, "weight of their penalty", USUAL["lambda_mvp"], None, AT_LEAST_0),
        lambda_gum=Flag(float, "weight of uniqueness in it (gum: 10; samsum, distilled: 100)",
                        USUAL["lambda_gum"], None, AT_LEAST_0),
        lambda_sim=Flag(float, "how fast running means forget (obs: 0.1)", USUAL["lambda_sim"],
                        None, SHARE),
        sim_tokens=Flag(int, "of so many random tokens of a step (default: all)", within=ABOVE_0),
        tau=Flag(float, "soft movement's final threshold", USUAL["tau"], None, ABOVE_0)),
    "distillation": dict(
        distill=Flag(None, "learn from a dense model, too"),
        teacher=Flag(str, "its folder or Hub name (default: the dense run like this one)"),
        alpha_ce=Flag(float, "weight of the data's loss", 0.5, None, AT_LEAST_0),
        alpha_kd=Flag(float, "weight of the teacher's", 0.5, None, AT_LEAST_0),
        temperature=Flag(float, "of both distributions", 2.0, None, ABOVE_0)),
    "machine": dict(
        device=DEVICE,
        dtype=Flag(("float32", "bfloat16"),
                   "of the matrix products (default: bfloat16 on a GPU that has it)"),
        compile=Flag(None, "torch.compile the blocks: slow to start, then faster"),
        gradient_checkpointing=Flag(None, "compute activations twice, keep none"),
        checkpoint_every=Flag(int, "steps between checkpoints; one every 10 minutes, too", 500, 200,
                              ABOVE_0),
        log_every=Flag(int, "steps between lines of log.jsonl", 10, 20, ABOVE_0),
        eval_every=Flag(int, "steps between evaluations on some validation data (default: a fifth "
                        "of all)", within=ABOVE_0),
        tensorboard=Flag(None, "write the log for TensorBoard, too"))}
ALL_FLAGS = {name: one for group in FLAGS.values() for name, one in group.items()}


def fail(message):
    """A user's mistake: one line, status 2."""
    who = f" in process {PROCESS} of {PROCESSES}" if PROCESSES > 1 else ""
    print(f"train.py: error{who}: {cli.told(message)}", file=sys.stderr, flush=True)
    if PROCESSES > 1:  # an orderly end would wait for the others
        os._exit(2)
    sys.exit(2)


def say(message):
    """To the user, from process 0."""
    if PROCESS == 0:
        with suppress(OSError):  # nobody has to read it
            print(message, file=sys.stderr)


def parse(argv=None):
    """The flags as given, None where they are not. Ends the program where they make no sense."""
    parser = argparse.ArgumentParser(allow_abbrev=False,
                                     description="Fine-prune the MLP neurons of GPT-2 and GPT-Neo.")
    parser.error = lambda message: fail(f"{message}; see --help")
    args = cli.parse(parser, FLAGS, argv)
    check_together(args)
    return args


def check_together(args):
    """End the program where flags make no sense together."""
    name = args.method or ALL_FLAGS["method"].default
    method, unique = METHODS[name], args.lambda_gum
    similar = method.measure or (defaults_of(name)["lambda_gum"] if unique is None else unique)
    fits = dict.fromkeys(("mask_lr", "lambda_mvp", "lambda_gum"), method.learned)
    fits |= dict(scope=not method.threshold, tau=method.threshold)
    fits |= dict.fromkeys(("lambda_sim", "sim_tokens"), similar)
    if name == "none":
        fits = dict.fromkeys(FLAGS["pruning"]) | dict(leftover=args.leftover == 1.0)
    fits |= dict.fromkeys(FLAGS["distillation"], args.distill)
    for flag, fit in fits.items():
        if getattr(args, flag) is not None and not fit:
            zero = " --lambda-gum 0" * ("sim" in flag and method.learned)
            needs = ("without --distill" if flag in FLAGS["distillation"] else
                     f"with --method {name}{zero}")
            fail(f"{flag_of(flag)} means nothing {needs}")
    if args.tensorboard and not find_spec("tensorboard"):
        fail("--tensorboard takes a package: pip install tensorboard")
    if args.alpha_ce == args.alpha_kd == 0:
        fail("--alpha-ce 0 with --alpha-kd 0 trains nothing")
    for one, other in (("compile", "gradient_checkpointing"), ("steps", "epochs"),
                       ("distill", "label_smoothing")):
        if getattr(args, one) and getattr(args, other):
            fail(f"{flag_of(one)} and {flag_of(other)} do not go together: give one of them")


def resolve(flags):
    """The settings that `flags` (from `parse`) mean: defaults filled in, the run's folder named."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    usual = {name: False if one.kind is None else one.default for name, one in ALL_FLAGS.items()}
    method, model, dataset, distill = (
        (usual | given)[name] for name in ("method", "model", "dataset", "distill"))
    device = flags.device or cli.best_device()
    if model == "tiny":
        usual |= {name: one.tiny for name, one in ALL_FLAGS.items() if one.tiny is not None}
    usual |= METHODS[method].defaults
    if dataset == "samsum":
        usual["epochs"] = 3.0
        if method == "gum" and distill:
            usual["lambda_gum"] = 100.0
        if (method, Path(model).name) == ("gum", "gpt2"):
            usual["mask_lr"] = 1e-3
    by_steps = "steps" in given or usual["steps"] and "epochs" not in given
    usual["epochs" if by_steps else "steps"] = None
    if method == "none":
        usual |= dict.fromkeys(FLAGS["pruning"]) | dict(leftover=1.0)
    if not distill:
        usual |= dict.fromkeys(FLAGS["distillation"]) | dict(distill=False)
    fast = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    usual |= dict(device=device, dtype="bfloat16" if fast else "float32")
    args = SimpleNamespace(**usual | given)
    if args.out is None:
        own = dataset == "wikitext" and Path(args.data_path or "").name  # a text of one's own?
        parts = [method, own or dataset, Path(model).name]
        parts += [f"{args.leftover:g}"] * (method != "none") + ["distill"] * distill
        unsaid = {"method", "dataset", "model", "leftover", "distill", "seed", "data_path",
                  "resume", *FLAGS["machine"]}
        parts += [f"{flag_of(name)[2:]}-{Path(value).name if name == 'teacher' else value}"
                  for name, value in given.items() if name not in unsaid and value != usual[name]]
        parts, end = [re.sub(r"[^\w.+-]", "_", part) for part in parts], f"seed{args.seed}"
        if len("-".join([*parts, end])) > 60:
            end = f"{zlib.crc32('-'.join(parts).encode()):08x}-{end}"
            while len("-".join([*parts, end])) > 60:
                parts.pop()
        args.out = str(Path("out") / "-".join([*parts, end]))
    return args


def main():
    flags = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.compute_fast(flags.device or cli.best_device())
    try:
        if PROCESSES > 1:
            cli.join_processes(flags.device)
        metrics = run(flags)
        if PROCESS == 0:
            report(metrics, resolve(flags).out)
        if PROCESSES > 1:
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:
        fail(error)
    except Exception as error:  # torch has no exceptions of its own for these
        if cli.lacks_memory(error):
            fail("out of memory: try --accumulate, --gradient-checkpointing or a smaller "
                 "--block-size")
        if PROCESSES > 1:
            if re.search(cli.LOST, str(error), re.IGNORECASE):
                fail("another process of this job is gone: go on with the same command and "
                     "--resume")
            traceback.print_exc()
            os._exit(1)  # as in `fail`
        raise
    except KeyboardInterrupt as stopped:
        launcher = ["torchrun", f"--nproc_per_node={PROCESSES}"] if PROCESSES > 1 else ["python"]
        again = shlex.join([*launcher, *sys.argv, *["--resume"] * (not flags.resume)])
        begun = (Path(resolve(flags).out) / "settings.json").exists()
        say(f"\n{str(stopped) or 'stopped'}" + f"; go on with: {again}" * begun)
        sys.exit(130)


if __name__ == "__main__":
    main()

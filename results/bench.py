"""How fast pruning is, beside what arithmetic allows. Run from the repository's top:

    python -m results.bench steps --model gpt2      a step of training, by each method
    python -m results.bench trainings --model gpt2  whole short trainings, by each method
    python -m results.bench generation out/RUN ...  reading and writing, pruned against dense
    python -m results.bench report                  this machine, steps, trainings and generation
                                                    for a model's shape, GPU against CPU: to paste
                                                    into an issue

What a task can't do without are operations (a multiply-add is 2) and bytes. Divided by how many of
each the machine does in a second, they give the least time it can take, and the floor of a ratio.

Where a number can't be had, as for want of memory, words say why, and what comes after it goes on.
"""

import gc
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import measure
from model import ALIGNED, GPT, TINY, GPTConfig, KVCache, read_config
from prune import METHODS, Pruner, shrink, top_v, v_at
from results import cli, runs
from results.cli import ABOVE_0, DEVICE, Flag
from results.compare import timed
from train import fine_prune, make_optimizer

try:
    import resource
except ImportError:  # as on Windows
    resource = None

NEO = dict(model_type="gpt_neo", n_positions=2048, attn_scaled=False, qkv_bias=False)
SHAPES = {  # models whose shape is known without asking the Hub
    "tiny": TINY,
    "gpt2": dict(),
    "EleutherAI/gpt-neo-125m": dict(NEO, windows=(None, 256) * 6),
    "EleutherAI/gpt-neo-1.3B": dict(NEO, n_embd=2048, n_layer=24, n_head=16,
                                    windows=(None, 256) * 12)}


def config_of(model):
    return GPTConfig(**SHAPES[model]) if model in SHAPES else read_config(model)


def why(error):
    """Why there is no number, in a few words."""
    words = " ".join(str(error).split()).replace("|", "/")  # which would end a table's cell
    if cli.lacks_memory(error):
        return "out of memory"
    return f"failed ({type(error).__name__}: {words[:200]})"


def free():
    """Give back what nobody holds any more, so that it is there for what comes next."""
    gc.collect()
    torch.cuda.empty_cache()


def attempt(task, *args):
    """What `task(*args)` returns, or why it fails."""
    try:
        return task(*args)
    except Exception as error:
        reason = why(error)
    free()  # only here, where the error no longer holds the task's tensors
    return reason


def peaks(device, dtype):
    """Operations per second of a large matrix product, and bytes per second of a large copy."""
    n, size = (2048, 2**25) if device == "cpu" else (8192, 2**28)
    a, b, c = torch.randn(3, n, n, device=device, dtype=dtype)
    source, target = torch.zeros(2, size, device=device)
    product, copy = (min(timed(task, device)[0] for _ in range(20)) for task in
                     (lambda: torch.mm(a, b, out=c), lambda: target.copy_(source)))
    return 2 * n**3 / product, 2 * source.nbytes / copy


def operations(config, T):
    """What a forward pass over T tokens takes per token: in all blocks, and in the output head."""
    d = config.n_embd
    keys = sum(min(i, window or i) for window in config.windows for i in range(1, T + 1)) / T
    blocks = sum(8 * d * d + 4 * d * k for k in config.mlp_widths) + 4 * d * keys
    return blocks, 2 * d * config.vocab_size


def weights(config):
    """How many numbers its matrices hold, but for the positions'; its vectors are few."""
    return config.n_embd * (config.vocab_size + sum(4 * config.n_embd + 2 * m
                                                    for m in config.mlp_widths))


def held(device):
    """Bytes that this process has held at most: on the GPU, or in main memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def grown(device, task, args):
    before = held(device)
    task(*args)
    return held(device) - before


def peak_memory(device, task, *args):
    """Bytes that `task(*args)` takes at most, alone in a process of its own, or why that is not
    known. To be asked first: what this process has on a GPU, that one can't have."""
    if device == "cpu" and resource is None:
        return "this system does not say"
    # Not "spawn" where it can be helped: on Linux, such a child's peak starts out as its parent's.
    start = get_context("spawn" if resource is None else "forkserver")
    with ProcessPoolExecutor(1, mp_context=start) as pool:
        return attempt(pool.submit(grown, device, task, args).result)


def print_row(*cells):
    print(f"| {' | '.join(cells)} |")


def print_head(*cells):
    print_row(*cells)
    print("| --- " * len(cells) + "|")


# A step of training.

ROWS = {"none": ("none", "layer"), "topv": ("topv", "layer"), "Global Top_v": ("topv", "global"),
        "gum": ("gum", "global")}  # what is timed: method, scope
V_TS = (1.0, 0.5, 0.25, 0.1)  # at these fractions of neurons left
# A case is one of ROWS, v_t, `sim_tokens`, and 1 with a teacher. All are held against this one:
PLAIN = "none", 1.0, None, 0
LEARNING = dict(weight_decay=0.1, eps=1e-8, label_smoothing=0.0, alpha_ce=0.5, alpha_kd=0.5,
                temperature=2.0)


def least_work(config, v_t, shape, similar, distill):
    """Operations and bytes that a training step on a batch of `shape` (B, T) cannot do without, if
    the similarity sees `similar` tokens."""
    kept = replace(config, mlp_widths=[round(v_t * m) for m in config.mlp_widths])
    pairs, tokens, d = sum(k * k for k in kept.mlp_widths), math.prod(shape), config.n_embd
    # Backward is twice forward; a teacher goes forward only; the similarity is symmetric.
    ours, teachers = sum(operations(kept, shape[1])), sum(operations(config, shape[1]))
    work = tokens * (3 * ours + distill * teachers) + similar * pairs
    # In float32: a weight is read forward and backward, its gradient written, and read for the
    # norm; AdamW reads four numbers and writes three. Half of C is read and written.
    numbers = weights(config) + d * config.n_positions
    return work, 4 * (11 * numbers + pairs * (similar > 0))


def stepper(config, shape, names, args):
    """A function that makes a training step by one of ROWS, for those in `names`, on random weights
    and tokens. They share one model. A learning rate of 0 makes every step like the last."""
    torch.manual_seed(0)
    how = SimpleNamespace(**vars(args), **LEARNING, lr=0.0, mask_lr=0.0)
    model = GPT(config).to(args.device)
    teacher = GPT(config).to(args.device) if args.distill else None
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile_blocks()
    pruners = {name: Pruner(model, ROWS[name][0], 1.0, 1000, scope=ROWS[name][1]) for name in names}
    last = pruners[names[-1]]
    last.scores.data.normal_()
    for pruner in pruners.values():  # all that learn scores share them, for the optimizer's sake
        pruner.scores = last.scores if pruner.method.learned else pruner.scores
    optimizer = make_optimizer(model, last, how)
    tokens = torch.randint(config.vocab_size, shape)
    batch = tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)

    def step(name, v_t, sim_tokens=None, distill=0):
        optimizer.zero_grad(set_to_none=True)  # left by a step that failed
        pruners[name].leftover = v_t  # at the last step, 1000, one is the other
        micro = data.micro_batches(batch, args.device, args.accumulate, sim_tokens=sim_tokens)
        return fine_prune(model, pruners[name], optimizer, micro, 1000, how,
                          teacher if distill else None)

    return step


def some_steps(config, shape, name, args):
    cli.compute_fast(args.device)  # in a process of its own
    step = stepper(config, shape, [name], args)
    for _ in range(3):
        step(name, 1.0)


def over_schedule(costs, leftover):
    """The mean cost of a step while v_t falls from 1 to `leftover`, where it is `costs` at V_TS and
    on straight lines between them."""
    v_ts = [v_at(step, leftover, steps=1000) for step in range(1, 1001)]
    return np.interp(v_ts, V_TS[::-1], costs[::-1]).mean()


def peak_of_steps(config, shape, args):
    """Bytes that steps of none and of gum take at most, without a teacher."""
    alone = SimpleNamespace(**vars(args) | dict(distill=False))
    return [peak_memory(args.device, some_steps, config, shape, name, alone)
            for name in ("none", "gum")]


def cases_of(rows, distill):
    """A table's rows: {label: its case at each of V_TS}. `rows`: {label: (name, sim_tokens)}."""
    return {label + ", distilled" * taught:
            [(name, 1.0 if name == "none" else v_t, sim_tokens, taught) for v_t in V_TS]
            for taught in range(1 + distill) for label, (name, sim_tokens) in rows.items()}


def time_steps(config, shape, table, args):
    """{case: its seconds in each round, or why there are none}, in turns in one process. Without
    those of PLAIN there is nothing to hold others against: its error is raised."""
    seconds = {case: [] for case in (PLAIN, *sum(table.values(), []))}
    step = stepper(config, shape, list(dict.fromkeys(case[0] for case in seconds)), args)

    def seconds_of(case):
        return timed(lambda: step(*case), args.device)[0]

    for turn in tqdm(range(args.rounds + 1), unit="round", leave=False):
        for case in seconds:
            if isinstance(seconds[case], str):  # it has failed
                continue
            taken = seconds_of(case) if case == PLAIN else attempt(seconds_of, case)
            if isinstance(taken, str):
                seconds[case] = taken
            elif turn:  # the first round warms up
                seconds[case].append(taken)
    return seconds


def floor(case, config, shape, speeds):
    """The least seconds of a step; `speeds` are `peaks`."""
    name, v_t, sim_tokens, distill = case
    tokens = math.prod(shape)
    similar = min(sim_tokens or tokens, tokens) * (name == "gum")
    work, moved = least_work(config, v_t, shape, similar, distill)
    return work / speeds[0] + moved / speeds[1]


def ratios_of_steps(config, shape, table, seconds, speeds):
    """{label: (what its steps take, their floors)}, both as ratios to PLAIN: at each of V_TS, then
    over the schedule to 25 % and to 10 %."""
    found, plain = {}, floor(PLAIN, config, shape, speeds)
    for label, cases in table.items():
        failed = [seconds[case] for case in cases if isinstance(seconds[case], str)]
        ratios = [seconds[case] if isinstance(seconds[case], str) else
                  np.median(np.divide(seconds[case], seconds[PLAIN])) for case in cases]
        floors = [floor(case, config, shape, speeds) / plain for case in cases]
        ratios += [failed[0] if failed else over_schedule(ratios, leftover)
                   for leftover in (0.25, 0.1)]
        floors += [over_schedule(floors, leftover) for leftover in (0.25, 0.1)]
        found[label] = ratios, floors
    return found


def show_speeds(speeds):
    print(speeds if isinstance(speeds, str) else
          f"A large matrix product makes {speeds[0] / 1e12:.3g} TFLOP/s, a copy "
          f"{speeds[1] / 1e9:.3g} GB/s.")


def show_steps(config, shape, table, speeds, args):
    """Time them; print what of the machine's operations `none` makes, and the table."""
    seconds, (B, T) = time_steps(config, shape, table, args), shape
    usual = np.median(seconds[PLAIN])
    reached = least_work(config, 1.0, shape, 0, False)[0] / usual / speeds[0]
    print(f"{args.model}, {B} x {T} tokens, {args.device}, {args.dtype}"
          f"{', --compile' * args.compile}, {torch.get_num_threads()} threads, medians of "
          f"{args.rounds} rounds.")
    show_speeds(speeds)
    print(f"A step of none takes {usual:.4g} s, its floor is "
          f"{floor(PLAIN, config, shape, speeds):.4g} s; it makes {reached:.0%} of the TFLOP/s of "
          "that product.\n")
    print_head("a step's time, none = 1 (floor)", *(f"v_t = {v_t:g}" for v_t in V_TS), "1 to 0.25",
               "1 to 0.1")
    for label, pairs in ratios_of_steps(config, shape, table, seconds, speeds).items():
        print_row(label, *(ratio if isinstance(ratio, str) else f"{ratio:.2f} ({least:.2f})"
                           for ratio, least in zip(*pairs)))


def show_peak_of_steps(peak, config):
    matrices = 4 * sum(m * m for m in config.mlp_widths)
    if any(isinstance(one, str) for one in peak):
        none, gum = (one if isinstance(one, str) else f"{one / 1e9:.3g} GB" for one in peak)
        print(f"Peak memory: none: {none}; gum: {gum}.")
    else:
        none, gum = peak
        print(f"Peak memory: none {none / 1e9:.3g} GB, gum {gum / 1e9:.3g} GB, of which the "
              f"similarity's matrices {matrices / 1e9:.3g} GB: {gum / (none + matrices):.0%} of "
              "the two together.")


def steps(args):
    """Time training steps by each method, in turns in one process, as ratios to plain fine-tuning,
    with their floors."""
    if args.compile and args.gradient_checkpointing:
        raise ValueError("--compile and --gradient-checkpointing do not go together")
    config = config_of(args.model)
    shape = args.batch_size, min(args.block_size, config.n_positions)
    cli.compute_fast(args.device)
    peak = peak_of_steps(config, shape, args)
    rows = {name: (name, None) for name in ROWS}
    if args.sim_tokens:
        rows[f"gum, {args.sim_tokens} tokens for the similarity"] = "gum", args.sim_tokens
    speeds = peaks(args.device, getattr(torch, args.dtype))
    show_steps(config, shape, cases_of(rows, args.distill), speeds, args)
    print()
    show_peak_of_steps(peak, config)


# A whole training.


def losses_of(model, pruner, shape, how):
    """Fine-prune a random model to the end, on random tokens. Returns the losses [pruner.steps]."""
    losses, optimizer = [], make_optimizer(model, pruner, how)
    for step in range(1, pruner.steps + 1):
        tokens = torch.randint(20, (shape[0], shape[1] + 1))  # which 20, is something to learn
        batch = tokens[:, :-1], tokens[:, 1:], torch.ones(shape, dtype=torch.bool)
        micro = data.micro_batches(batch, how.device, how.accumulate)
        losses.append(fine_prune(model, pruner, optimizer, micro, step, how)[1])
    return torch.stack(losses)


def time_training(config, shape, method, leftover, args):
    """Seconds of a whole training by a method."""
    torch.manual_seed(0)
    model = GPT(config).to(args.device)
    pruner = Pruner(model, method, leftover, args.steps)
    how = SimpleNamespace(**vars(args) | LEARNING | dict(
        lr=1e-4, mask_lr=pruner.mask_lr, compile=False))
    return timed(lambda: losses_of(model, pruner, shape, how), args.device)[0]


def show_trainings(config, shape, names, args):
    """Time whole trainings, in turns, by each of the methods `names`; print them as ratios to plain
    fine-tuning."""
    plain = "none", 1.0
    seconds = {case: [] for case in (plain, *((name, v) for name in names for v in (0.25, 0.1)))}
    time_training(config, shape, *plain, SimpleNamespace(**vars(args) | dict(steps=3)))  # warms up
    for _ in tqdm(range(args.rounds), unit="round", leave=False):
        for case, taken in seconds.items():
            if not isinstance(taken, str):  # else it has failed
                found = attempt(time_training, config, shape, *case, args)
                seconds[case] = found if isinstance(found, str) else taken + [found]
    usual = seconds[plain]
    if isinstance(usual, str):
        raise ValueError(f"plain fine-tuning, to hold all others against: {usual}")
    print(f"{args.model}, {args.steps} steps of {shape[0]} x {shape[1]} tokens, {args.device}, "
          f"{args.dtype}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds. One "
          f"of none takes {np.median(usual):.4g} s.\n")
    print_head("a whole training's time, none = 1", "to 25 %", "to 10 %")
    for name in names:
        found = [seconds[name, v] for v in (0.25, 0.1)]
        print_row(name, *(taken if isinstance(taken, str) else
                          f"{np.median(np.divide(taken, usual)):.2f}" for taken in found))


def trainings(args):
    """Time whole trainings of a few steps by each method, in turns, as ratios to plain fine-tuning.
    Unlike `steps`, this counts what a method does at some steps only, as OBS while it prunes."""
    names, known = args.methods.split(","), [name for name in METHODS if name != "none"]
    for name in names:
        if name not in known:
            raise ValueError(f"--methods: {name} is not one of {', '.join(known)}")
    config = config_of(args.model)
    cli.compute_fast(args.device)
    show_trainings(config, (args.batch_size, min(args.block_size, config.n_positions)), names, args)


# Reading and writing.


@torch.no_grad()
def read_and_write(model, idx, new):
    """Seconds per token to read `idx` [B, T] (prefill), and to write `new` tokens after it, one by
    one (decode)."""
    device, (B, T) = idx.device, idx.shape
    start = torch.zeros(B, dtype=torch.long, device=device)
    cache = KVCache(model.config, start, T + new, model.wte.weight.dtype)
    prefill, logits = timed(lambda: model.next_logits(idx, cache), device)

    def write():
        token = logits.argmax(-1, keepdim=True)  # [B, 1]
        for _ in range(new):
            token = model.next_logits(token, cache).argmax(-1, keepdim=True)

    return prefill / (B * T), timed(write, device)[0] / (B * new)


@torch.no_grad()
def read_and_write_hf(model, idx, new):
    """The same of a model of transformers, with its own cache."""
    device, (B, T) = idx.device, idx.shape
    prefill, out = timed(lambda: model(idx, use_cache=True, logits_to_keep=1), device)

    def write(out):
        for _ in range(new):
            token = out.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return prefill / (B * T), timed(lambda: write(out), device)[0] / (B * new)


def in_transformers(paths, device, dtype):
    """The dense model and the pruned one at its true widths as transformers loads them, and the
    pruned one padded."""
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as padded:
        GPT.from_pretrained(paths[-1]).save_pretrained(padded, pad=True)
        return [AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).to(device, dtype)
                for path in (*paths, padded)]


def ready(model, device, dtype):
    """`model` as it is timed: on a GPU its widths are rounded up with zero neurons."""
    return shrink(model, ALIGNED.get(torch.device(device).type, 1)).to(device, dtype)


def load_and_generate(path, device, dtype, shape, new):
    model = ready(GPT.from_pretrained(path), device, dtype)
    read_and_write(model, torch.zeros(shape, dtype=torch.long, device=device), new)


def least_of_token(config, B, T, new, dtype):
    """What a token takes: operations to read it among B sequences of T, bytes to write it as one of
    `new` after them. All weights are read once for B, but for other positions' embeddings."""
    blocks, head = operations(config, T)
    keys = sum(min(window or math.inf, T + new / 2) for window in config.windows)
    numbers = weights(config) / B + 2 * config.n_embd * keys
    return blocks + head / T, numbers * dtype.itemsize


def allowed(configs, B, T, new, dtype):
    """How many times as fast as the first of `configs` each can be, by counting: [model, prefill or
    decode]."""
    least = np.array([least_of_token(config, B, T, new, dtype) for config in configs])
    return least[0] / least


def lengths(config):
    """How many tokens are read, and written."""
    return min(256, config.n_positions // 2), min(32, config.n_positions // 4)


def batches(device):
    """How many sequences at once. A few keep no GPU busy."""
    return (1, 8) if device == "cpu" else (1, 8, 64, 256)


def in_turns(read, models, B, T, new, args):
    """Tokens per second of each of `models`, and how many times as fast as the first it is: both
    [model, prefill or decode]."""
    idx = torch.randint(models[0].config.vocab_size, (B, T), device=args.device)
    seconds = np.array([[read(model, idx, new) for model in models]
                        for _ in range(args.rounds + 1)])[1:]  # the first round warms up
    return 1 / np.median(seconds, 0), np.median(seconds[:, :1] / seconds, 0)


def by_batch(read, models, T, new, args):
    """B, and what `in_turns` gives, for each of `batches`; where it fails, prints why."""
    for B in batches(args.device):
        found = attempt(in_turns, read, models, B, T, new, args)
        if isinstance(found, str):
            print(f"{f'batch {B}':20} {found}")
        else:
            yield B, *found


def show_widths(args):
    n = ALIGNED.get(torch.device(args.device).type, 1)
    print("Widths are timed as they are." if n == 1 else
          f"Widths are timed rounded up to multiples of {n} with zero neurons, as suits a GPU: the "
          "same function. What is allowed is counted without them.")


def show_overhead(short):
    """`short`: the batches at which decode was far from what bytes allow."""
    if short:
        print(f"Decode at batch {', '.join(map(str, short))} is far from what bytes allow: most "
              "likely, time goes into starting operations, of which dense and pruned have as many.")


def show_generation(paths, peak, args):
    """The table of one run, `paths` of its dense model and its own."""
    dtype, configs = getattr(torch, args.dtype), [read_config(path) for path in paths]
    T, new = lengths(configs[1])
    models, short = [ready(GPT.from_pretrained(path), args.device, dtype) for path in paths], []
    print(f"\n{paths[1]} against {paths[0]}: tokens per second, {T} read and {new} written, "
          f"medians of {args.rounds} rounds\n"
          f"{'':20}{'dense':>12}{'this':>12}{'ratio':>9}{'allowed':>9}{'reached':>9}")
    for B, speeds, ratios in by_batch(read_and_write, models, T, new, args):
        most = allowed(configs, B, T, new, dtype)
        for i, what in enumerate(("prefill", "decode")):
            ratio, reached = ratios[1, i], ratios[1, i] / most[1, i]
            print(f"{f'{what}, batch {B}':20}{speeds[0, i]:12,.0f}{speeds[1, i]:12,.0f}"
                  f"{ratio:8.2f}x{most[1, i]:8.2f}x{reached:9.0%}")
        if B <= 8 and reached < 0.9:  # decode's
            short.append(B)
    show_overhead(short)
    del models
    free()
    if args.transformers:
        show_in_transformers(paths, T, new, args)
    files = [[*path.glob("*.safetensors")] or [*path.glob("*.bin")] for path in paths]
    sizes = [sum(file.stat().st_size for file in of_model) for of_model in files]
    for what, pair in ("peak memory, batch 8", peak), ("file size", sizes):
        words = dict.fromkeys(one for one in pair if isinstance(one, str))
        print(f"{what:20}" + (f" {'; '.join(words)}" if words else "{:9,.1f} MB{:9,.1f} MB{:8.2f}x"
                              .format(pair[0] / 1e6, pair[1] / 1e6, pair[1] / pair[0])))
    if awkward := [k for k in configs[1].mlp_widths if k % 8]:
        print(f"widths {', '.join(map(str, awkward))} are awkward for most devices: "
              "shrink(model, multiple_of=8) of prune.py adds zero neurons up to a multiple of "
              "8; the model computes the same")


def show_in_transformers(paths, T, new, args):
    models = in_transformers(paths, args.device, getattr(torch, args.dtype))
    print(f"in transformers{'dense':>17}{'this':>12}{'ratio':>9}{'padded':>12}{'ratio':>9}")
    for B, speeds, ratios in by_batch(read_and_write_hf, models, T, new, args):
        for i, what in enumerate(("prefill", "decode")):
            print(f"{f'{what}, batch {B}':20}{speeds[0, i]:12,.0f}" + "".join(
                f"{speeds[n, i]:12,.0f}{ratios[n, i]:8.2f}x" for n in (1, 2)))


def generation(args):
    """Time each run's model against its dense one, in turns in one process, beside what counting
    allows."""
    pairs, dtype = [], getattr(torch, args.dtype)
    for run in map(runs.read_model, args.runs):
        dense = runs.dense_run(run, args.dense)
        if dense is None:
            raise ValueError(f"{run.path} has no dense model beside it to compare with: name one "
                             "with --dense DIR")
        pairs.append((dense.path, run.path))
    at = [lengths(read_config(path)) for _, path in pairs]
    cli.compute_fast(args.device)
    peak = [[peak_memory(args.device, load_and_generate, path, args.device, dtype, (8, T), new)
             for path in paths] for paths, (T, new) in zip(pairs, at)]
    show_widths(args)
    for paths, of_pair in zip(pairs, peak):
        show_generation(paths, of_pair, args)
        free()


# The report.


def first_line(*command):
    """Of what a command prints, or "unknown"."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout
        return said.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def show_machine(device):
    cpu = Path("/proc/cpuinfo")  # on Linux
    names = re.findall(r"model name\s*: (.+)", cpu.read_text() if cpu.exists() else "")
    memory = "memory unknown"
    if hasattr(os, "sysconf"):  # not on Windows
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.3g} GB"
    print(f"- CPU: {(names or [platform.processor() or platform.machine()])[0]}, "
          f"{os.cpu_count()} cores, {memory}; {torch.get_num_threads()} threads are used")
    if device != "cpu":
        gpu = torch.cuda.get_device_properties(device)
        driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        print(f"- GPU: {gpu.name}, {gpu.total_memory / 1e9:.3g} GB, {gpu.multi_processor_count} "
              f"multiprocessors, compute capability {gpu.major}.{gpu.minor}\n"
              f"- driver {driver}, CUDA {torch.version.cuda or torch.version.hip}")
    print(f"- torch {torch.__version__}, Python {platform.python_version()}, "
          f"{platform.platform()}\n"
          f"- this code: {first_line('git', 'describe', '--always', '--dirty')}")


def narrowed(config, share, alike):
    """`config` with this share of its neurons: of each layer, or as GUM leaves them (README), 20
    times as many in the first layer as in the last."""
    falling = np.ones(config.n_layer) if alike else np.geomspace(20, 1, config.n_layer)
    shares = share * falling / falling.mean()
    return replace(config, mlp_widths=[max(1, round(m * of_layer)) for m, of_layer in
                                       zip(config.mlp_widths, shares.tolist())])


def show_shapes(config, args):
    """How fast narrower models of random weights read and write, against `config`'s."""
    dtype, (T, new), short = getattr(torch, args.dtype), lengths(config), []
    shapes = {f"{share:.0%}, {how}": narrowed(config, share, how == "all layers alike")
              for share in (0.25, 0.1) for how in ("all layers alike", "as GUM leaves it")}
    configs, models = [config, *shapes.values()], []
    for one in configs:
        with torch.device(args.device):
            model = GPT(replace(one))  # a copy, for to be rounded up changes it
        models.append(ready(model, args.device, dtype))
    print(f"{args.model}, {T} tokens read and {new} written, {args.dtype}, medians of "
          f"{args.rounds} rounds. As GUM leaves it: {' '.join(map(str, configs[2].mlp_widths))} "
          f"neurons, and {' '.join(map(str, configs[4].mlp_widths))}.")
    show_widths(args)
    print()
    print_head("times as fast as dense (allowed)", "dense, tokens/s", *shapes)
    for B in batches(args.device):
        found = attempt(in_turns, read_and_write, models, B, T, new, args)
        most = allowed(configs, B, T, new, dtype)
        for i, what in enumerate(("prefill", "decode")):
            cells = [found] * len(configs)
            if not isinstance(found, str):
                speeds, ratios = found
                cells = [f"{speeds[0, i]:,.0f}", *(f"{ratio:.2f} ({could:.2f})" for ratio, could in
                                                   zip(ratios[1:, i], most[1:, i]))]
                if what == "decode" and B <= 8 and (ratios[1:, i] < 0.9 * most[1:, i]).any():
                    short.append(B)
            print_row(f"{what}, batch {B}", *cells)
    print()
    show_overhead(short)


def pruned_by_gum(device, dtype, steps=20):
    """The losses of so many steps of fine-pruning a small model by GUM to a quarter, from the same
    start on any device, and which neurons are left: [steps], bool [N]."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # what is compared is the same computation
    how = SimpleNamespace(**LEARNING | dict(eps=1e-4), device=device, dtype="float32", lr=1e-3,
                          mask_lr=1e-2, accumulate=1, compile=False)
    model = GPT(GPTConfig(**TINY)).to(device, dtype)
    pruner = Pruner(model, "gum", 0.25, steps)
    losses = losses_of(model, pruner, (8, 64), how)
    kept = top_v(pruner.scores.detach(), len(pruner.scores) // 4)
    return losses.double().cpu(), kept.cpu()


def show_agreement(device):
    """Whether a GPU prunes as the CPU does, beside what rounding alone changes."""
    ours = pruned_by_gum("cpu", torch.float32)
    pairs = {"CPU, float32 against float64": (ours, pruned_by_gum("cpu", torch.float64))}
    if device == "cpu":
        print("There is no GPU to compare with the CPU. What rounding alone changes:\n")
    else:
        pairs[f"float32, {device} against CPU"] = pruned_by_gum(device, torch.float32), ours
    print_head("20 steps of GUM on a small model", "largest difference of losses",
               "other neurons kept")
    for label, ((losses, kept), (losses_there, kept_there)) in pairs.items():
        print_row(label, f"{(losses - losses_there).abs().max():.1e}",
                  f"{(kept & ~kept_there).sum()} of {kept.sum()}")


def section(title, show, *args):
    """A part of the report. Where it fails, it says why."""
    print(f"\n## {title}\n", flush=True)
    try:
        show(*args)
    except Exception as error:
        print(f"\n{why(error)}")
    free()


def report(args):
    """Measure what matters on this machine, and print it as markdown, to paste into an issue. Made
    to take some ten minutes on a GPU; on a CPU it is of a small model, and takes about five."""
    small = dict(model="tiny", batch_size=32, block_size=64, dtype="float32")
    usual = dict(model="gpt2", batch_size=16, block_size=1024, dtype="bfloat16")
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = SimpleNamespace(**(small if args.device == "cpu" else usual) | given, accumulate=1,
                           distill=True, compile=False, gradient_checkpointing=False, steps=40)
    config = config_of(args.model)
    shape = args.batch_size, min(args.block_size, config.n_positions)
    table = cases_of({name: (name, None) for name in ("none", "topv", "gum")}, args.distill)
    cli.compute_fast(args.device)
    peak = peak_of_steps(config, shape, args)
    print("# How fast pruning is here\n\n`"
          + shlex.join(["python", "-m", "results.bench", *sys.argv[1:]]) + "`")
    section("Machine", show_machine, args.device)
    speeds = attempt(peaks, args.device, getattr(torch, args.dtype))
    section(f"Speed in {args.dtype}", show_speeds, speeds)
    if isinstance(speeds, str):
        speeds = math.nan, math.nan  # nor are there floors, then
    section("Memory of a step", show_peak_of_steps, peak, config)
    section("Training", show_steps, config, shape, table, speeds, args)
    if args.device != "cpu":
        compiled = SimpleNamespace(**vars(args) | dict(compile=True))
        section("Training, compiled", show_steps, config, shape, table, speeds, compiled)
    section("Whole trainings", show_trainings, config, shape, ("topv", "gum", "obs"), args)
    section("Reading and writing", show_shapes, config, args)
    section("GPU against CPU", show_agreement, args.device)


def number(about, default=None):
    return Flag(int, about, default, within=ABOVE_0)


MACHINE = dict(device=DEVICE, rounds=number("how often to time each thing", 5),
               dtype=Flag(("float32", "bfloat16"), "of the matrix products", "float32"))
SHAPE = dict(
    model=Flag(str, f"whose shape to give to random weights: {', '.join(SHAPES)}, or a folder",
               "tiny"),
    batch_size=number("sequences per step", 4), block_size=number("tokens per sequence", 256),
    accumulate=number("in so many micro-batches", 1))
FLAGS = dict(
    steps=dict(
        **SHAPE,
        sim_tokens=number("time gum with so many tokens for the similarity, too"),
        distill=Flag(None, "time all with a teacher, too"), compile=Flag(None, "as in train.py"),
        gradient_checkpointing=Flag(None, "as in train.py"), **MACHINE),
    trainings=dict(
        **SHAPE, steps=number("steps of a training", 40),
        methods=Flag(str, "which, beside none", "topv,gum,obs"), **MACHINE),
    generation=dict(
        runs=measure.RUNS, dense=measure.DENSE, **MACHINE,
        transformers=Flag(None, "the same in transformers, at true widths and padded")),
    report=dict(
        model=Flag(str, "whose shape to give to random weights (default: gpt2; CPU: tiny)"),
        batch_size=number("sequences per step (default: 16; CPU: 32)"),
        block_size=number("tokens per sequence (default: 1024; CPU: 64)"),
        **MACHINE | dict(dtype=Flag(("float32", "bfloat16"), "of the matrix products (default: "
                                    "bfloat16; CPU: float32)"))))


def main():
    cli.call(*cli.command_line((steps, trainings, generation, report), FLAGS, __doc__))


if __name__ == "__main__":
    main()

"""How fast pruning is, beside what arithmetic allows. Run from the repository's top:

    python -m results.bench steps --model gpt2      a step of training, by each method
    python -m results.bench generation out/RUN ...  reading and writing, pruned against dense

What a task can't do without are operations (a multiply-add is 2) and bytes. Divided by how many of
each the machine does in a second, they give the least time it can take, and the floor of a ratio.
"""

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import measure
from model import GPT, TINY, GPTConfig, KVCache, read_config
from prune import Pruner, v_at
from results import cli
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
    """Bytes that `task(*args)` takes at most, alone in a process of its own; nan where the system
    does not say."""
    if device == "cpu" and resource is None:
        return math.nan
    # Not "spawn" where it can be helped: on Linux, such a child's peak starts out as its parent's.
    start = get_context("spawn" if resource is None else "forkserver")
    with ProcessPoolExecutor(1, mp_context=start) as pool:
        return pool.submit(grown, device, task, args).result()


# A step of training.

ROWS = {"none": ("none", "layer"), "topv": ("topv", "layer"), "Global Top_v": ("topv", "global"),
        "gum": ("gum", "global")}  # what is timed: method, scope
V_TS = (1.0, 0.5, 0.25, 0.1)  # at these fractions of neurons left


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
    rows = config.vocab_size + config.n_positions + sum(4 * d + 2 * m for m in config.mlp_widths)
    return work, 4 * (11 * d * rows + pairs * (similar > 0))


def stepper(config, shape, names, args):
    """A function that makes a training step by one of ROWS, for those in `names`, on random weights
    and tokens. They share one model. A learning rate of 0 makes every step like the last."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as train.py does
    how = SimpleNamespace(**vars(args), lr=0.0, mask_lr=0.0, weight_decay=0.1, eps=1e-8,
                          label_smoothing=0.0, alpha_ce=0.5, alpha_kd=0.5, temperature=2.0)
    model = GPT(config).to(args.device)
    teacher = GPT(config).to(args.device) if args.distill else None
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile_blocks()
    pruners = {name: Pruner(model, ROWS[name][0], 1.0, 1000, ROWS[name][1]) for name in names}
    last = pruners[names[-1]]
    last.scores.data.normal_()
    for pruner in pruners.values():  # all that learn scores share them, for the optimizer's sake
        pruner.scores = last.scores if pruner.method.learned else pruner.scores
    optimizer = make_optimizer(model, last, how)
    tokens = torch.randint(config.vocab_size, shape)
    batch = tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)

    def step(name, v_t, sim_tokens=None, distill=0):
        pruners[name].leftover = v_t  # at the last step, 1000, one is the other
        micro = data.micro_batches(batch, args.device, args.accumulate, sim_tokens=sim_tokens)
        return fine_prune(model, pruners[name], optimizer, micro, 1000, how,
                          teacher if distill else None)

    return step


def some_steps(config, shape, name, args):
    step = stepper(config, shape, [name], args)
    for _ in range(3):
        step(name, 1.0)


def over_schedule(costs, leftover):
    """The mean cost of a step while v_t falls from 1 to `leftover`, where it is `costs` at V_TS and
    on straight lines between them."""
    v_ts = [v_at(step, 1000, leftover) for step in range(1, 1001)]
    return np.interp(v_ts, V_TS[::-1], costs[::-1]).mean()


def steps(args):
    """Time training steps by each method, in turns in one process, as ratios to plain fine-tuning,
    with their floors."""
    if args.compile and args.gradient_checkpointing:
        raise ValueError("--compile and --gradient-checkpointing do not go together")
    shape = SHAPES.get(args.model)
    config = read_config(args.model) if shape is None else GPTConfig(**shape)
    B, T = shape = args.batch_size, min(args.block_size, config.n_positions)
    plain, seconds = ("none", 1.0, None, 0), {}  # none, undistilled
    peak = [peak_memory(args.device, some_steps, config, shape, name, args) / 1e9
            for name in ("none", "gum")]
    rows = {name: (name, None) for name in ROWS}
    if args.sim_tokens:
        rows[f"gum, {args.sim_tokens} tokens for the similarity"] = "gum", args.sim_tokens
    cases = {label + ", distilled" * distill:
             [(name, 1.0 if name == "none" else v_t, sim_tokens, distill) for v_t in V_TS]
             for distill in range(1 + args.distill) for label, (name, sim_tokens) in rows.items()}
    step = stepper(config, shape, list(ROWS), args)
    for turn in tqdm(range(args.rounds + 1), unit="round", leave=False):
        for case in dict.fromkeys(sum(cases.values(), [])):
            taken = timed(lambda: step(*case), args.device)[0]
            if turn:  # the first round warms up
                seconds.setdefault(case, []).append(taken)
    multiplied, copied = peaks(args.device, getattr(torch, args.dtype))

    def floor(name, v_t, sim_tokens, distill):
        """The least seconds of a step."""
        similar = (sim_tokens or B * T) * (name == "gum")
        work, moved = least_work(config, v_t, shape, similar, distill)
        return work / multiplied + moved / copied

    usual = np.median(seconds[plain])
    reached = least_work(config, 1.0, shape, 0, False)[0] / usual / multiplied
    print(f"{args.model}, {B} x {T} tokens, {args.device}, {args.dtype}, "
          f"{torch.get_num_threads()} threads, medians of {args.rounds} rounds.\n"
          f"A large matrix product makes {multiplied / 1e12:.3g} TFLOP/s, a copy "
          f"{copied / 1e9:.3g} GB/s.\nA step of none takes {usual:.4g} s, its floor is "
          f"{floor(*plain):.4g} s; it makes {reached:.0%} of the TFLOP/s of that product.\n")
    columns = [f"v_t = {v_t:g}" for v_t in V_TS] + ["1 to 0.25", "1 to 0.1"]
    print(f"| a step's time, none = 1 (floor) | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 1) + "|")
    for label, of_row in cases.items():
        ratios = [np.median(np.divide(seconds[case], seconds[plain])) for case in of_row]
        floors = [floor(*case) / floor(*plain) for case in of_row]
        for costs in (ratios, floors):
            costs += [over_schedule(costs, leftover) for leftover in (0.25, 0.1)]
        cells = [f"{ratio:.2f} ({least:.2f})" for ratio, least in zip(ratios, floors)]
        print(f"| {label} | {' | '.join(cells)} |")
    matrices = 4 * sum(m * m for m in config.mlp_widths) / 1e9
    print("\nPeak memory: " + ("this system does not say." if math.isnan(peak[0]) else
          f"none {peak[0]:.3g} GB, gum {peak[1]:.3g} GB, of which the similarity's matrices "
          f"{matrices:.3g} GB: {peak[1] / (peak[0] + matrices):.0%} of the two together."))


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


def load_and_generate(path, device, dtype, shape, new):
    model = GPT.from_pretrained(path).to(device, dtype)
    read_and_write(model, torch.zeros(shape, dtype=torch.long, device=device), new)


def least_of_token(model, B, T, new):
    """What a token takes: operations to read it among B sequences of T, bytes to write it as one of
    `new` after them. All weights are read once for B, but for other positions' embeddings."""
    (blocks, head), config = operations(model.config, T), model.config
    keys = sum(min(window or math.inf, T + new / 2) for window in config.windows)
    cached = 2 * config.n_embd * keys * model.wte.weight.element_size()
    weights = sum(p.nbytes for p in model.parameters()) - model.wpe.weight.nbytes
    return blocks + head / T, weights / B + cached


def generation(args):
    """Time each run's model against its dense one, in turns in one process, beside what counting
    allows."""
    dtype = getattr(torch, args.dtype)
    for run in map(measure.read_model, args.runs):
        dense = measure.dense_run(run, args.dense)
        if dense is None:
            raise ValueError(f"{run.path} has no dense model beside it to compare with: name one "
                             "with --dense DIR")
        paths = [dense.path, run.path]
        models = [GPT.from_pretrained(path).to(args.device, dtype) for path in paths]
        longest = models[1].config.n_positions
        T, new = min(256, longest // 2), min(32, longest // 4)
        print(f"\n{run.path} against {dense.path}: tokens per second, {T} read and {new} written, "
              f"medians of {args.rounds} rounds\n"
              f"{'':20}{'dense':>12}{'this':>12}{'ratio':>9}{'allowed':>9}{'reached':>9}")
        for B in (1, 8):
            idx = torch.randint(models[0].config.vocab_size, (B, T), device=args.device)
            seconds = np.array([[read_and_write(model, idx, new) for model in models]
                                for _ in range(args.rounds + 1)])[1:]  # the first round warms up
            speeds = 1 / np.median(seconds, 0)  # [dense or this, prefill or decode]
            ratios = np.median(seconds[:, 0] / seconds[:, 1], 0)
            allowed = np.divide(*(least_of_token(model, B, T, new) for model in models))
            for i, what in enumerate(("prefill", "decode")):
                print(f"{f'{what}, batch {B}':20}{speeds[0, i]:12,.0f}{speeds[1, i]:12,.0f}"
                      f"{ratios[i]:8.2f}x{allowed[i]:8.2f}x{ratios[i] / allowed[i]:9.0%}")
        if args.transformers:
            models = in_transformers(paths, args.device, dtype)
            print(f"in transformers{'dense':>17}{'this':>12}{'ratio':>9}{'padded':>12}{'ratio':>9}")
            for B in (1, 8):
                idx = torch.randint(models[0].config.vocab_size, (B, T), device=args.device)
                seconds = np.array([[read_and_write_hf(model, idx, new) for model in models]
                                    for _ in range(args.rounds + 1)])[1:]
                speeds = 1 / np.median(seconds, 0)  # [dense, this or padded; prefill or decode]
                ratios = np.median(seconds[:, :1] / seconds, 0)
                for i, what in enumerate(("prefill", "decode")):
                    print(f"{f'{what}, batch {B}':20}{speeds[0, i]:12,.0f}" + "".join(
                        f"{speeds[n, i]:12,.0f}{ratios[n, i]:8.2f}x" for n in (1, 2)))
        files = [[*path.glob("*.safetensors")] or [*path.glob("*.bin")] for path in paths]
        sizes = [sum(file.stat().st_size for file in of_model) for of_model in files]
        peak = [peak_memory(args.device, load_and_generate, path, args.device, dtype, (8, T), new)
                for path in paths]
        for what, (before, after) in (("peak memory, batch 8", peak), ("file size", sizes)):
            print(f"{what:20}" + (" this system does not say" if math.isnan(before) else
                  f"{before / 1e6:9,.1f} MB{after / 1e6:9,.1f} MB{after / before:8.2f}x"))
        if awkward := [k for k in models[1].config.mlp_widths if k % 8]:
            print(f"widths {', '.join(map(str, awkward))} are awkward for most devices: "
                  "shrink(model, multiple_of=8) of prune.py adds zero neurons up to a multiple of "
                  "8; the model computes the same")


def number(about, default=None):
    return Flag(int, about, default, within=ABOVE_0)


MACHINE = dict(device=DEVICE, rounds=number("how often to time each thing", 5),
               dtype=Flag(("float32", "bfloat16"), "of the matrix products", "float32"))
FLAGS = dict(
    steps=dict(
        model=Flag(str, f"whose shape to give to random weights: {', '.join(SHAPES)}, or a folder",
                   "tiny"),
        batch_size=number("sequences per step", 4), block_size=number("tokens per sequence", 256),
        accumulate=number("in so many micro-batches", 1),
        sim_tokens=number("time gum with so many tokens for the similarity, too"),
        distill=Flag(None, "time all with a teacher, too"), compile=Flag(None, "as in train.py"),
        gradient_checkpointing=Flag(None, "as in train.py"), **MACHINE),
    generation=dict(
        runs=measure.RUNS, dense=measure.DENSE, **MACHINE,
        transformers=Flag(None, "the same in transformers, at true widths and padded")))


def main():
    cli.call(*cli.command_line((steps, generation), FLAGS, __doc__))


if __name__ == "__main__":
    main()

"""RAW: moved from measure.py, to be made a program of its own."""

# Speed. Two numbers first: the operations (a multiply-add is 2) and the bytes that a task cannot do without. Divided by
# how many of each the machine does in a second, they give the least time it can take, and so the floor of a ratio.


def peaks(device, dtype):
    """Operations per second of a large matrix product on this device, and bytes per second of a large copy."""
    n, size = (2048, 2**25) if device == "cpu" else (8192, 2**28)
    a, b, c = torch.randn(3, n, n, device=device, dtype=dtype)
    source, target = torch.zeros(2, size, device=device)
    product = min(timed(lambda: torch.mm(a, b, out=c), device)[0] for _ in range(20))
    return 2 * n**3 / product, 2 * 4 * size / min(timed(lambda: target.copy_(source), device)[0] for _ in range(20))


def operations(config, T):
    """What a forward pass over T tokens takes per token: in all blocks, and in the output head."""
    d = config.n_embd
    keys = sum(min(i, window or i) for window in config.windows for i in range(1, T + 1)) / T
    return sum(8 * d * d + 4 * d * k for k in config.mlp_widths) + 4 * d * keys, 2 * d * config.vocab_size


def weight_bytes(model):
    """Bytes of the weights that reading one token takes: all but the other positions' embeddings."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) - model.wpe.weight.nbytes


@torch.no_grad()
def read_and_write(model, idx, new):
    """Seconds per token to read `idx` [B, T] (prefill), and to write `new` tokens after it, one by one (decode)."""
    device, (B, T) = idx.device, idx.shape
    cache = KVCache(model.config, torch.zeros(B, dtype=torch.long, device=idx.device), T + new, model.wte.weight.dtype)
    prefill, logits = timed(lambda: model.next_logits(idx, cache), device)

    def write():
        token = logits.argmax(-1, keepdim=True)  # [B, 1]
        for _ in range(new):
            token = model.next_logits(token, cache).argmax(-1, keepdim=True)

    return prefill / (B * T), timed(write, device)[0] / (B * new)


def in_child(function, *args):
    """What `function` returns in a process of its own, of which nothing else has used memory."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def peak_memory(device):
    """Bytes that this process has held at most: on the GPU, or (Linux only) in main memory."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def inference_memory(path, device, dtype, shape, new):
    """Peak bytes of loading a model, reading `shape` (B, T) and writing `new` tokens, less what was there before."""
    before = peak_memory(device)
    model = GPT.from_pretrained(path).to(device, dtype)
    read_and_write(model, torch.zeros(shape, dtype=torch.long, device=device), new)
    return peak_memory(device) - before


def speed(args):
    """Time each run's model against its dense one, in turns in one process, beside what counting allows."""
    dtype = getattr(torch, args.dtype)
    for run in map(read_run, args.runs):
        dense = dense_run(run, args.dense)
        if dense is None:
            raise ValueError(f"{run.path} has no dense model beside it to compare with: name one with --dense DIR")
        paths = [dense.path, run.path]
        models = [GPT.from_pretrained(path).to(args.device, dtype) for path in paths]
        T, new = min(256, models[1].config.n_positions // 2), min(32, models[1].config.n_positions // 4)
        print(f"\n{run.path} against {dense.path}: tokens per second, {T} read and {new} written, medians of "
              f"{args.rounds} rounds\n{'':20}{'dense':>12}{'this':>12}{'ratio':>9}{'allowed':>9}{'reached':>9}")
        for B in (1, 8):
            idx = torch.randint(models[0].config.vocab_size, (B, T), device=args.device)
            rounds = [[read_and_write(model, idx, new) for model in models] for _ in range(args.rounds + 1)][1:]
            counts = []  # for each model, per token: operations of prefill, bytes of decode
            for model in models:
                (blocks, head), config = operations(model.config, T), model.config
                keys = sum(min(window or math.inf, T + new / 2) for window in config.windows)
                cached = 2 * config.n_embd * keys * model.wte.weight.element_size()
                counts.append((blocks + head / T, weight_bytes(model) / B + cached))
            for i, what in enumerate(("prefill", "decode")):
                ratio = statistics.median(before[i] / after[i] for before, after in rounds)
                allowed = counts[0][i] / counts[1][i]
                cells = [1 / statistics.median(of[m][i] for of in rounds) for m in (0, 1)]
                print(f"{f'{what}, batch {B}':20}{cells[0]:12,.0f}{cells[1]:12,.0f}{ratio:8.2f}x{allowed:8.2f}x"
                      f"{ratio / allowed:9.0%}")
        files = [[*path.glob("*.safetensors")] or [*path.glob("*.bin")] for path in paths]
        sizes = [sum(file.stat().st_size for file in of_model) for of_model in files]
        peak = [in_child(inference_memory, path, args.device, dtype, (8, T), new) for path in paths]
        for what, (before, after) in (("peak memory, batch 8", peak), ("file size", sizes)):
            print(f"{what:20}{before / 1e6:9,.1f} MB{after / 1e6:9,.1f} MB{after / before:8.2f}x")
        if awkward := [k for k in models[1].config.mlp_widths if k % 8]:
            print(f"widths {', '.join(map(str, awkward))} are awkward for most devices: shrink(model, multiple_of=8) "
                  f"of prune.py adds zero neurons up to a multiple of 8; the model computes the same")


BENCH = {"none": ("none", "layer"), "topv": ("topv", "layer"), "Global Top_v": ("topv", "global"),
         "gum": ("gum", "global")}  # what `bench` times: method, scope
FRACTIONS = (1.0, 0.5, 0.25, 0.1)  # at these v_t


def least_work(config, v, shape, similar, distill):
    """Operations and bytes that a training step on a batch of `shape` (B, T) cannot do without, at v_t = v."""
    kept = replace(config, mlp_widths=[round(v * m) for m in config.mlp_widths])
    pairs, tokens, d = sum(k * k for k in kept.mlp_widths), math.prod(shape), config.n_embd
    # Backward is twice forward; a teacher goes forward only; the similarity of `similar` tokens is symmetric.
    ours, teachers = sum(operations(kept, shape[1])), sum(operations(config, shape[1]))
    work = tokens * (3 * ours + distill * teachers) + similar * pairs
    # In float32: a weight is read forward and backward, its gradient written, and read for the norm; AdamW reads four
    # numbers and writes three. Half of C is read and written.
    weights = d * (config.vocab_size + config.n_positions + sum(4 * d + 2 * m for m in config.mlp_widths))
    return work, 4 * (11 * weights + pairs * (similar > 0))


def bench_steps(config, shape, names, args):
    """A function that makes a training step by one of BENCH, on random weights and tokens, for those in `names`.

    They share one model. A learning rate of 0 makes every step like the last.
    """
    torch.manual_seed(0)
    how = SimpleNamespace(lr=0.0, mask_lr=0.0, weight_decay=0.1, eps=1e-8, label_smoothing=0.0, alpha_ce=0.5,
                          alpha_kd=0.5, temperature=2.0, dtype=args.dtype)
    model = GPT(config).to(args.device)
    teacher = GPT(config).to(args.device).eval().requires_grad_(False) if args.distill else None
    model.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        model.compile_blocks()
    pruners = {name: Pruner(model, BENCH[name][0], 1.0, 1000, BENCH[name][1]) for name in names}
    scores = pruners[names[-1]].scores
    scores.data.normal_()
    for pruner in pruners.values():  # one set of scores serves all
        pruner.scores = scores if pruner.scores.requires_grad else pruner.scores
    optimizer = make_optimizer(model, pruners[names[-1]], how)
    tokens = torch.randint(config.vocab_size, shape)
    batch = tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)

    def step(name, v, similar=None, distill=False):
        pruners[name].leftover = v
        micro_batches = data.micro_batches(batch, args.device, args.accumulate, similar=similar)
        fine_prune(model, pruners[name], optimizer, micro_batches, 1000, how, teacher if distill else None)

    return step


def training_memory(config, shape, name, args):
    """Peak bytes of training steps by one of BENCH, less what was there before."""
    before, step = peak_memory(args.device), bench_steps(config, shape, [name], args)
    for v in (1.0, 1.0, 0.5):
        step(name, v)
    return peak_memory(args.device) - before


def bench(args):
    """Time a training step by each method, in turns in one process, as a ratio to plain fine-tuning, with its floor."""
    config = GPTConfig(**SHAPES[args.model]) if args.model in SHAPES else read_config(args.model)
    shape = args.batch_size, min(args.block_size or 256, config.n_positions)
    step, seconds = bench_steps(config, shape, list(BENCH), args), {}
    rows = [(name, None) for name in BENCH] + [("gum", args.sim_tokens)] * bool(args.sim_tokens)
    distills = (False, True) if args.distill else (False,)
    cases = [(name, v, similar, distill) for distill in distills for name, similar in rows
             for v in FRACTIONS[: 1 if name == "none" else None]]
    for number in tqdm(range(args.rounds + 1), unit="round", leave=False):
        for case in cases:
            taken, _ = timed(lambda: step(*case), args.device)
            if number:  # the first round warms up
                seconds.setdefault(case, []).append(taken)
    none, most = cases[0], peaks(args.device, getattr(torch, args.dtype))
    usual, tokens = statistics.median(seconds[none]), math.prod(shape)

    def floor(name, v, similar, distill):
        """The least seconds of a step."""
        work, moved = least_work(config, v, shape, (similar or tokens) * (name == "gum"), distill)
        return work / most[0] + moved / most[1]

    reached = least_work(config, 1.0, shape, 0, False)[0] / usual / most[0]
    print(f"{args.model}, {shape[0]} x {shape[1]} tokens, {args.device}, {args.dtype}, {torch.get_num_threads()} "
          f"threads, medians of {args.rounds} rounds.\n"
          f"A large matrix product makes {most[0] / 1e12:.3g} TFLOP/s, a copy {most[1] / 1e9:.3g} GB/s.\n"
          f"A step of none takes {usual:.4g} s, its floor is {floor(*none):.4g} s; it makes "
          f"{reached:.0%} of the TFLOP/s of that product.\n")
    columns = [f"v_t = {v:g}" for v in FRACTIONS] + ["1 to 0.25", "1 to 0.1"]
    print(f"| a step's time, none = 1 (floor) | {' | '.join(columns)} |")
    print("| --- " * (len(columns) + 1) + "|")
    for distill in distills:
        for name, similar in rows:
            row = [(name, 1.0 if name == "none" else v, similar, distill) for v in FRACTIONS]
            ratios = [statistics.median(map(operator.truediv, seconds[case], seconds[none])) for case in row]
            floors = [floor(*case) / floor(*none) for case in row]
            for goal in (0.25, 0.1):  # the mean over the schedule, on straight lines between the points
                along = [leftover_at(t, 1000, goal) for t in range(1, 1001)]
                for values in (ratios, floors):
                    values.append(np.interp(along, FRACTIONS[::-1], values[3::-1]).mean())
            print(f"| {name}{f', {similar} tokens for the similarity' if similar else ''}{', distilled' * distill} | "
                  + " | ".join(f"{ratio:.2f} ({least:.2f})" for ratio, least in zip(ratios, floors)) + " |")
    peak = {name: in_child(training_memory, config, shape, name, args) / 1e9 for name in ("none", "gum")}
    matrices = 4 * sum(m * m for m in config.mlp_widths) / 1e9
    print(f"\nPeak memory: none {peak['none']:.3g} GB, gum {peak['gum']:.3g} GB, of which the similarity's matrices "
          f"{matrices:.3g} GB: {peak['gum'] / (peak['none'] + matrices):.0%} of the two together.")



"""How a run is shown, and what `python measure.py table`, `figures` and `sample` show of several.

`run.leftover` is the share of neurons that a run was asked to leave; what it did is in its metrics.
"""

import csv
import json
import math
import os
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace

import torch

import data
from measure import MEASURES, mean_loss
from model import ALIGNED, whole
from prune import METHODS, shrink, world_size
from results.runs import check_data, dense_run, load_model, log_state, read_json, read_model

DRAWN = {  # method: colour (Okabe and Ito's, which the colour-blind can tell apart) and marker
    "none": ("#000000", "s"), "magnitude": ("#E69F00", "^"), "random": ("#56B4E9", "v"),
    "topv": ("#009E73", "D"), "soft": ("#CC79A7", "P"), "gum": ("#D55E00", "o"),
    "obs": ("#0072B2", "*")}
# Runs that differ in these share a table's row: these are columns or repetitions, or change no
# result.
NO_ROW = ("leftover", "seed", "teacher", "data_path", "device", "dtype", "compile",
          "gradient_checkpointing", "accumulate")


def read_runs(folders):
    """Runs by (data set, model), in the order of a table's rows: undistilled ones first, then by
    method. A run's `label` is its method's name and the settings in which runs by it differ."""
    runs, groups = [read_model(folder) for folder in dict.fromkeys(folders)], {}
    no_row = dict.fromkeys(NO_ROW)
    for n, run in enumerate(runs):
        if not run.metrics:
            raise ValueError(f"{run.path} has no metrics.json: it is no finished run of train.py")
        run.method, run.distill, run.leftover = (
            run.settings[name] for name in ("method", "distill", "leftover"))
        if run.method not in METHODS:
            raise ValueError(f"{run.path} is by {run.method}, which is no method of prune.py")
        if run.measures.get("model", run.metrics["model"]) != run.metrics["model"]:
            raise ValueError(f"{run.path}/measure.json is of another run: measure this one")
        check_measured(run)
        run.group = run.settings["dataset"], Path(run.settings["model"]).name
        run.settings["data"] = run.metrics["data"]["train"]["sha256"][:8]
        run.values = run.measures.get("values") or dict(
            perplexity=run.metrics["result"]["val_perplexity"], leftover=run.metrics["leftover"])
        for one in runs[:n]:
            same_row = one.settings | no_row == run.settings | no_row
            differ = [name for name in NO_ROW if name != "data_path"  # data are known by their hash
                      and one.settings.get(name) != run.settings.get(name)]
            if same_row and not {"leftover", "seed"} & {*differ}:  # it is no repetition
                how = (f"differ only in {', '.join(differ)}, which has no row of its own" if differ
                       else "are the same run twice")
                raise ValueError(f"{one.path} and {run.path} {how}: name one")
    for run in sorted(runs, key=lambda run: (run.distill, list(METHODS).index(run.method))):
        alike = [other.settings for other in runs if (other.group, other.method, other.distill)
                 == (run.group, run.method, run.distill)]
        own = [f"{name} {value}" for name, value in run.settings.items() if name not in NO_ROW
               and any(settings.get(name) != value for settings in alike)]
        run.label = ", ".join([METHODS[run.method].name, *own])
        groups.setdefault(run.group, []).append(run)
    return groups


def check_measured(run):
    """ValueError if a run's measure.json is of other data than the run's, or of sequences of
    another length."""
    if not run.measures:
        return
    file = run.path / "measure.json"
    way_out = f"first python measure.py {run.path}, or remove {file}"
    own, about = run.metrics["data"], run.measures["data"]
    check_data(about, {split: own[split] for split in about}, run.path,
               f"{file} is of those: {way_out}")
    there, here = run.measures["on"]["block_size"], run.metrics["block_size"]
    if there != here:
        raise ValueError(f"{file} is of sequences of {there} tokens, the run's have {here}: "
                         f"{way_out}")


DEPENDS_ON = {  # the flags of measure.py that decide what a measure is
    **dict.fromkeys(("sensitivity", "uniqueness", "span_uniqueness"), ("split", "examples")),
    **dict.fromkeys(("bleu", "rouge1", "rouge2", "rougeL"), ("generate", "beams"))}


def require(runs, name):
    """ValueError if not all of `runs` have the measure `name`, taken in the same way."""
    flags = DEPENDS_ON.get(name, ())
    lacking = [run for run in runs if name not in run.values]
    folders = " ".join(str(run.path) for run in lacking or runs)
    way_out = f"first python measure.py {folders}" + " --outputs" * ("beams" in flags)
    for run in lacking:
        if run.measures:
            more = f"; {way_out}" * ("beams" in flags)  # texts can still be written and scored
            raise ValueError(f"{run.path} has no {name}, but {', '.join(run.values)}{more}")
    if lacking:
        raise ValueError(f"no {name}: {way_out}")
    if name == "perplexity":  # measure.py's is of float32, train.py's of the run's own type
        types = {"float32" if run.measures else run.settings["dtype"] for run in runs}
        if len(types) > 1:
            raise ValueError(f"{name} was measured in {' or '.join(sorted(types))}: {way_out}")
    ways = {", ".join(f"--{flag} {run.measures['on'][flag]}" for flag in flags) for run in runs}
    if len(ways) > 1:
        raise ValueError(f"{name} was measured with {' or '.join(sorted(ways))}: {way_out}")


def mean_std(values):
    """Mean and sample standard deviation (0 of one value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


# 97.5 % quantiles of Student's t, of 1 to 20 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def paired(values, others):
    """The mean of `values` less `others`, pair by pair, and half of its 95 % interval's width
    (infinite of one pair)."""
    n = len(values)
    mean, std = mean_std([a - b for a, b in zip(values, others)])
    if n == 1:
        return mean, math.inf
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96 + 2.5 / (n - 1)  # to 0.002
    return mean, t * std / math.sqrt(n)


def cell(runs, metric):
    """A table's cell: mean ± sample standard deviation of `runs`, their number, and what is left
    where that is not what was wanted."""
    values = [run.values[metric] for run in runs if run.values[metric] is not None]
    if not values:
        return "-"
    mean, std = mean_std(values)
    text = f"{mean:.4g}" + f" ± {std:.2g}" * (len(values) > 1) + f" ({len(values)})"
    left = fmean(run.metrics["leftover"] for run in runs)
    return text + f" at {left:.3f}" * (abs(left - runs[0].leftover) >= 0.01)


def difference(runs, others, metric):
    """A table's cell: the mean difference of `runs` to the `others` of the same seeds, half of its
    95 % interval's width, and their number."""
    there = {run.settings["seed"]: run.values[metric] for run in others}
    pairs = [(run.values[metric], there.get(run.settings["seed"])) for run in runs]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return "-"
    mean, half = paired(*zip(*pairs))
    return f"{mean:+.4g}" + f" ± {half:.2g}" * (len(pairs) > 1) + f" ({len(pairs)})"


def timed(function, device):
    """How many seconds `function` takes, and what it returns."""
    began, result = time.perf_counter(), function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def as_timed(model):
    """`model`, on a GPU a copy with its widths rounded up, as `export --multiple-of` does."""
    multiple_of = ALIGNED.get(model.wte.weight.device.type, 1)
    if all(m % multiple_of == 0 for m in model.config.mlp_widths):
        return model
    return shrink(deepcopy(model), multiple_of)


@torch.no_grad()
def prefill_speed(models, idx, rounds=7):
    """Tokens per second with which each of `models` reads `idx` [B, T]: medians, in turns."""
    idx = idx.to(models[0].wte.weight.device)
    seconds = [[timed(lambda: model.next_logits(idx), idx.device)[0] for model in models]
               for _ in range(rounds + 1)]
    return [idx.numel() / median(times[1:]) for times in zip(*seconds)]  # the first round warms up


def sampled(model, ids, tokens):
    """The text of `ids` and up to `tokens` more: drawn, but always the same ones."""
    tokenizer = data.tokenizer(model.config.vocab_size)
    generator = torch.Generator(model.wte.weight.device).manual_seed(0)
    new, = model.generate([ids], tokens, 0.8, top_k=40, eot=tokenizer.eot, generator=generator)
    return tokenizer.decode(ids + new)


def known_loss(source, metrics):
    """The validation loss of the model in `source`, if that is a finished run which was evaluated
    just as the run is whose `metrics` these will be; or None."""
    known = read_json(Path(source, "metrics.json"), "settings") if source != "tiny" else {}

    def how(of):
        return [of["data"]["validation"]["sha256"], *map(of["settings"].get, ("dataset", "dtype")),
                *map(of.get, ("block_size", "machine", "versions"))]

    return known["result"]["val_loss"] if known and how(known) == how(metrics) else None


def compare(start, result, val_data, args, autocast, start_loss=None):
    """Both models' loss on all validation data (nats per token), size, speed, and a sample.
    `start_loss`: of the first, if known: with a large vocabulary it takes minutes."""
    if args.dataset == "stdlib":
        ids = data.tokenizer(result.config.vocab_size).encode("def ")[: val_data.block_size]
    elif isinstance(val_data, data.Blocks):
        ids = val_data.tokens[: min(16, val_data.block_size)].tolist()
    else:
        ids = val_data.prompts[0]
    # As many sequences as a process trains at once.
    rows = args.batch_size // args.accumulate // world_size()
    batch = val_data.batch(range(min(rows, len(val_data))))
    with autocast:
        speeds = prefill_speed([as_timed(start), as_timed(result)], batch[0])
    about = {}
    for name, model, speed, loss in zip(("start", "result"), (start, result), speeds,
                                        (start_loss, None)):
        if loss is None:
            loss = mean_loss(model, val_data, autocast)
        about[name] = dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700)),
                           widths=list(model.config.mlp_widths),
                           parameters=sum(p.numel() for p in model.parameters()),
                           prefill_tokens_per_second=speed,
                           sample=sampled(model, ids, val_data.block_size - len(ids)))
    full, left = about["start"]["widths"], about["result"]["widths"]
    return about | dict(leftover_wanted=args.leftover, leftover=sum(left) / max(sum(full), 1),
                        leftover_per_layer=[k / max(m, 1) for k, m in zip(left, full)])


def report(metrics, folder):
    """Print how a run has ended. It has, whether or not that can be printed."""
    try:
        show(metrics, folder)
        print(end="", flush=True)
    except OSError as error:
        unread = isinstance(error, BrokenPipeError)  # as after `| head -1`: nobody's mistake
        with suppress(OSError):
            print(f"the model is in {folder}", file=sys.stderr)
            if not unread:
                print(f"train.py: error: can't print: {error.strerror}", file=sys.stderr)
        os._exit(0 if unread else 2)


# Of a closing table, here and in a model card: title, key in the metrics, format.
CLOSING = (("parameters", "parameters", ",.0f"), ("validation loss (nats)", "val_loss", ".4f"),
           ("validation perplexity", "val_perplexity", ".3f"),
           ("tokens/s (prefill)", "prefill_tokens_per_second", ",.0f"))


def show(metrics, folder):
    """Print a finished run as a table: the model it started from against the one it made."""
    start, result, method = metrics["start"], metrics["result"], metrics["settings"]["method"]
    before = "start" if method == "none" else "dense"
    print(f"\n{'':24}{before:>14}{method:>14}{'ratio':>9}")
    for title, key, form in CLOSING:
        a, b = start[key], result[key]
        print(f"{title:24}{a:>14{form}}{b:>14{form}}{b / a:>8.2f}x")
    wanted, total = metrics["leftover_wanted"], sum(start["widths"])
    print(f"neurons left: {metrics['leftover']:.2%} of {total:,} ({wanted:.2%} wanted)")
    print("neurons per layer:", *start["widths"], "->", *result["widths"])
    speed = metrics["tokens_per_second"]
    print(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s, {speed:,.0f} tokens/s")
    for name, model in ((before, start), (method, result)):
        print(f"\n--- {name} writes:\n{model['sample']}")
    print(f"\nthe model, its log and metrics are in {folder}")


@contextmanager
def tracker(folder, wanted):
    """What hands a line of the log to TensorBoard, in files beside it, if that is `wanted`."""
    if not wanted:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        def track(record):
            layers = {f"width {n}": k for n, k in enumerate(record["widths"], 1)}
            for name, value in (record | layers).items():
                if name not in ("step", "widths"):
                    writer.add_scalar(name, value, record["step"])

        yield track


def table(args):
    """Print the paper's tables: methods down, leftover across, means over seeds, or, with
    --against, mean differences to a row, seed by seed, and their 95 % intervals."""
    for (dataset, model), runs in read_runs(args.runs).items():
        names = {run.label + ", distilled" * run.distill: (run.label, run.distill) for run in runs}
        if args.against and args.against not in names:
            raise ValueError(f"no row is {args.against}: they are {'; '.join(names)}")
        metric = args.metric or data.DATASETS[dataset]["metric"].replace("rouge", "rougeL")
        if not args.metric and any(metric not in run.values for run in runs):
            metric = "perplexity"
        require(runs, metric)
        leftovers = sorted({run.leftover for run in runs}, reverse=True)
        title = f"{dataset}, {model}: {MEASURES[metric]}"
        title += f", less {args.against}'s" if args.against else ""
        lines = [[title, *(f"{v:g}" for v in leftovers)]]

        def at(name, leftover):
            return [run for run in runs if (run.label, run.distill) == names[name]
                    and run.leftover == leftover]

        for name in names:
            if name != args.against:
                lines.append([name, *(
                    difference(at(name, v), at(args.against, v), metric) if args.against
                    else cell(at(name, v), metric) for v in leftovers)])
        if args.format == "csv":
            csv.writer(sys.stdout).writerows(lines)
        elif args.format == "markdown":
            lines.insert(1, ["---"] * len(lines[0]))
            print(*(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
        else:
            body = " \\\\\n".join(" & ".join(line) for line in lines)
            body = body.replace("_", r"\_").replace("±", r"$\pm$")
            print(f"\\begin{{tabular}}{{l{'r' * len(leftovers)}}}\n{body} \\\\\n\\end{{tabular}}\n")


def sample(args):
    """Print what the dense and the pruned model write after a prompt, side by side."""
    if not args.prompt:
        raise ValueError("there is nothing to continue: give a --prompt")
    for run in map(read_model, args.runs):
        columns = []
        for title, one in ("dense", dense_run(run, args.dense)), ("pruned", run):
            if one:
                model = load_model(one.path).to(args.device)
                ids = data.tokenizer(model.config.vocab_size).encode(args.prompt)
                text = sampled(model, ids, args.tokens)
                lines = [f"{title}: {one.path}", "", *text.splitlines()]
                columns.append([part for line in lines for part in textwrap.wrap(line, 56) or [""]])
        for parts in zip_longest(*columns, fillvalue=""):
            print(" | ".join(f"{part:56}" for part in parts).rstrip())


def look(method):
    """A method's colour and marker, always the same. One not in DRAWN gets matplotlib's colours."""
    if method in DRAWN:
        return DRAWN[method]
    n = [name for name in METHODS if name not in DRAWN].index(method)
    return f"C{n % 10}", "<>pXhd"[n % 6]


def styles_of(runs):
    """How matplotlib draws each curve: a method by its look, its ablations with other dashes."""
    from matplotlib import colormaps

    styles = {}
    for run in runs:
        color, marker = look(run.method)
        ablation = sum(style["color"] == color for style in styles.values())
        styles.setdefault(run.label, dict(color=color, marker=marker,
                                          ls=["-", "--", ":", "-."][ablation % 4]))
        layers = len(run.metrics["start"]["widths"])
        for n in range(layers):
            styles[f"layer {n + 1}"] = dict(color=colormaps["viridis"](n / layers), lw=1)
    return styles | {"v_t": dict(color="#555555", ls=":", zorder=3),
                     "training": dict(color="#555555"),
                     "validation": dict(color="#882255", marker="o")}


def draw(path, panels, styles, formats=("png", "pdf"), dpi=200, bands=False):
    """A figure of `panels` {(title, x label, y label): [(curve, xs, ys) of each run]}. Points are
    means over a curve's runs, bars, or `bands`, sample standard deviations; of a curve without a
    line, all its runs. Panels of the same quantities share their axes."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    matplotlib.rcdefaults()  # whatever the user's file says
    matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
                                "axes.titlesize": 10})
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows, handles, peers = -(-len(panels) // columns), {}, {}
    figure = Figure(figsize=(9, 0.7 + 2.5 * rows), layout="constrained")
    for place, ((title, x_label, y_label), lines) in enumerate(panels.items(), 1):
        peer = peers.get((x_label, y_label))
        ax = figure.add_subplot(rows, columns, place, sharex=peer, sharey=peer)
        peers[x_label, y_label] = ax
        ax.set(title=title, xlabel=x_label, ylabel=y_label)
        ax.xaxis.get_major_locator().set_params(integer=x_label in ("layer", "step"))
        if x_label in ("lambda_gum", "steps"):
            ax.set_xscale("symlog")  # which has room for 0
        points = {}  # curve: {x: y of each run}
        for curve, xs, ys in lines:
            for x, y in zip(xs, ys):
                if y is not None:
                    points.setdefault(curve, {}).setdefault(x, []).append(y)
        for curve, ys in points.items():
            if styles[curve].get("ls") == "":
                pairs = [(x, y) for x in ys for y in ys[x]]
                handles[curve], = ax.plot(*zip(*pairs), **dict(mfc="none") | styles[curve])
                continue
            xs = sorted(ys)
            means, stds = zip(*(mean_std(ys[x]) for x in xs))
            crowded = dict(marker="", elinewidth=0.5, capsize=0) if len(xs) > 12 else {}
            style = dict(capsize=2, mfc="none") | styles[curve] | crowded
            banded = bands and len(xs) > 1  # a single point has no area
            if banded:
                low, high = ([y + sign * std for y, std in zip(means, stds)] for sign in (-1, 1))
                ax.fill_between(xs, low, high, color=style["color"], alpha=0.2, lw=0)
            bars = stds if any(stds) and not banded else None
            handles[curve] = ax.errorbar(xs, means, bars, **style)
    for (_, y_label), ax in peers.items():
        if y_label.startswith("share"):  # bars may reach beyond what a share can be
            ax.set_ylim(0, min(1.03, ax.get_ylim()[1]))
    columns = max(1, min(6, 100 // (6 + max(map(len, handles), default=0))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in formats:
        with whole(path.with_name(f"{path.name}.{suffix}")) as file:
            figure.savefig(file, format=suffix, dpi=dpi)


def loss_panels(runs, how):
    """Loss against leftover."""
    return {(how, "leftover wanted (share of neurons)", MEASURES["loss"]):
            [(run.label, [run.leftover], [run.values["loss"]]) for run in runs]}


def redundancy_panels(runs, how, kind):
    """Panels of sensitivity and uniqueness against leftover: figures 1 and 2 (`kind` "ratios", to
    the dense run), 5 and 6 ("values")."""
    names = {name: MEASURES[name] for name in ("sensitivity", "uniqueness", "span_uniqueness")}
    if kind == "ratios":
        names = {name: f"{title.split(' (')[0]} (ratio to dense)" for name, title in names.items()}
    return {(how, "leftover wanted (share of neurons)", title):
            [(run.label, [run.leftover], [run.measures[kind][name]]) for run in runs]
            for name, title in names.items()}


def similarity_panels(runs):
    """Figure 3, a panel for each layer: its neurons by their largest |cos| to another one."""
    panels = {}
    for run in runs:
        for n, counts in enumerate(run.measures["counts"], 1):
            middles = [(i + 0.5) / len(counts) for i in range(len(counts))]
            shares = [count / max(sum(counts), 1) for count in counts]
            panel = f"layer {n}", "largest |cos| to another neuron", "share of neurons"
            panels.setdefault(panel, []).append((run.label, middles, shares))
    return panels


def read_log(run):
    """The run's log. Raises ValueError if it is not as the run has left it."""
    path = run.path / "log.jsonl"
    content = path.read_bytes() if path.exists() else b""
    if log_state(content) != run.metrics["log"]:
        raise ValueError(f"{path} is damaged, or of another run")
    return content.decode()


def training(runs):
    """Loss and leftover by step, for all methods; then each method's layers."""
    left, panels = "share of neurons left", {}
    alone = len(runs) == 1
    logs = [[json.loads(line) for line in read_log(run).splitlines()] for run in runs]
    schedules = {tuple((line["step"], line["v_t"]) for line in log) for log in logs}
    for run, log in zip(runs, logs):
        steps, widths = [line["step"] for line in log], run.metrics["start"]["widths"]

        def add(title, y_label, curve, ys):
            panels.setdefault((title, "step", y_label), []).append((curve, steps, ys))

        loss = ("loss", "nats/token") if alone else ("all methods", "training loss (nats/token)")
        add(*loss, "training" if alone else run.label, [line["loss"] for line in log])
        if alone:
            add(*loss, "validation", [line.get("val_loss") for line in log])
        if len(schedules) == 1:
            add("all layers", left, "v_t", [line["v_t"] for line in log])
        add("all layers", left, run.label, [line["leftover"] for line in log])
        for n, m in enumerate(widths):
            add(run.label, left, f"layer {n + 1}", [line["widths"][n] / max(m, 1) for line in log])
    return panels


def draw_training(folder, metrics):
    """Draw a run's curves as training.png into its folder."""
    method = metrics["settings"]["method"]
    run = SimpleNamespace(path=Path(folder), metrics=metrics, method=method,
                          label=METHODS[method].name)
    draw(run.path / "training", training([run]), styles_of([run]), ["png"], dpi=120)


def figures(args):
    """Draw the paper's figures 1 to 6, loss against leftover, and training curves."""
    for (dataset, model), runs in read_runs(args.runs).items():
        require(runs, "sensitivity")
        styles = styles_of(runs)

        def save(name, panels, **how):
            path = Path(args.out, f"{name}-{dataset}-{model}")
            draw(path, panels, styles, **how)
            print(f"{path}.png")

        dense = [run for run in runs if run.method == "none"]
        pruned = [run for run in runs if run.method != "none"]
        losses, ratios, values, layers = {}, {}, {}, {}
        for distill, leftover in dict.fromkeys(
                (run.distill, run.leftover) for run in pruned or dense):
            how = "with distillation" if distill else "without distillation"
            suffix = f"-{leftover:g}" + "-distilled" * distill
            own = [run for run in dense if run.distill == distill] or dense
            shown = own + [run for run in pruned if run.distill == distill]
            alike = [run for run in shown if run in pruned and run.leftover == leftover]
            losses |= loss_panels(shown, how)
            ratios |= redundancy_panels(shown, how, "ratios")
            values |= redundancy_panels(shown, how, "values")
            save("similarity" + suffix, similarity_panels(own + alike))
            if alike:
                save("training" + suffix, training(alike))
                layers[f"leftover {leftover:g}, {how}", "layer", "share of neurons left"] = [
                    (run.label, range(1, len(run.measures["counts"]) + 1),
                     run.metrics["leftover_per_layer"]) for run in alike]  # figure 4
        save("loss", losses, bands=True)
        save("redundancy-ratios", ratios)
        save("redundancy-values", values)
        if layers:
            save("layers", layers)

"""What the paper measures of a finished run, to see why methods differ (its section 3.2 and Appendix E).

    python measure.py out/RUN ...                        measure them: writes measure.json into each one's folder
    python measure.py table out/RUN ...                  the paper's tables: methods down, leftover across
    python measure.py figures out/RUN ... --out figures  the paper's figures, and training curves
    python measure.py sample out/RUN --prompt TEXT       what the dense and the pruned model write, side by side
    python measure.py speed out/RUN ...                  how fast both read and write, against what arithmetic allows
    python measure.py bench --model gpt2                 what a step of training costs by each method, likewise

Shapes: B sequences of T tokens; h [B, T, k] is what the k neurons left in a layer put out; V = vocab_size.
"""

import argparse
import csv
import json
import math
import operator
import os
import statistics
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import GPT, SHAPES, GPTConfig, KVCache, read_config
from prune import METHODS, Pruner, fine_prune, leftover_at, make_optimizer

MEASURES = {  # a value in measure.json: its name in tables and figures
    "loss": "validation loss (nats/token)", "perplexity": "perplexity", "exact_match": "exact match", "bleu": "BLEU",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "sensitivity": "sensitivity (nats)",
    "uniqueness": "uniqueness (share)", "span_uniqueness": "span uniqueness (share)", "leftover": "leftover (share)"}
DRAWN = {  # method: its name, marker and colour (from Okabe and Ito's palette, which the colour-blind can tell apart)
    "none": ("Dense", "s", "#000000"), "magnitude": ("Magnitude", "^", "#E69F00"), "random": ("Random", "v", "#56B4E9"),
    "topv": ("Top_v", "D", "#009E73"), "soft": ("Soft movement", "P", "#CC79A7"), "gum": ("GUM", "o", "#D55E00")}
load = cache(lambda *args: data.load(*args))  # runs share their data


def batches(examples, tokens=8192, first=None):
    """Batches of a split, or its `first` sequences: neighbours in length, at most `tokens` tokens (or one sequence)."""
    order, rows = [i for i in examples.by_length() if not first or i < first], max(1, tokens // examples.block_size)
    for start in range(0, len(order), rows):
        yield examples.batch(order[start : start + rows])


@torch.no_grad()
def mean_loss(model, examples, autocast, most=None):
    """Mean loss in nats per token that counts, over a split or its first `most` batches. exp() is the perplexity."""
    model.eval()
    total, count = 0.0, 0
    for batch in islice(batches(examples), most):
        micro, = data.micro_batches(batch, str(model.wte.weight.device))
        with autocast:
            _, loss = model(micro.idx, places=micro.places, loss_of=lambda logits, some: F.cross_entropy(
                logits, micro.targets[some], reduction="sum"))
        total += loss.item()
        count += micro.total
    return total / count


def timed(function, device):
    """How many seconds `function` takes, and what it returns."""
    began, result = time.perf_counter(), function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


@torch.no_grad()
def prefill_speed(models, idx, rounds=7):
    """Tokens per second with which each of `models` reads `idx` [B, T]: the median of `rounds`, the models in turns."""
    idx = idx.to(models[0].wte.weight.device)
    seconds = [[] for _ in models]
    for _ in range(rounds + 1):  # the first round warms up
        for model, times in zip(models, seconds):
            times.append(timed(lambda: model(idx), idx.device)[0])
    return [idx.numel() / sorted(times[1:])[rounds // 2] for times in seconds]


@torch.no_grad()
def exact_matches(model, examples, tokens=4096):
    """For each example, in the order of `by_length`: does the model give exactly the target, end of text included?"""
    # That is, every target token is the arg-max after the true ones before it. Greedy decoding then picks the same
    # first token, so reads the same text, so picks the same second one, ...: the same event, for one forward pass.
    matches = []
    for idx, targets, _ in batches(examples, tokens):
        said = model(idx.to(model.wte.weight.device))[0].argmax(-1).cpu()  # [B, T, V] -> [B, T]
        matches += ((said == targets) | (targets == -100)).all(1).tolist()
    return matches


def write_texts(model, examples, prompts=0, beams=1):
    """What the model writes, a line each, to the first `prompts` distinct prompts (0: all), and their references."""
    # Greedily, or by beam search; at most as long as the split's longest target.
    tokenizer, longest = data.tokenizer(model.config.vocab_size), max(map(len, examples.targets))
    chosen, rows, written = examples.distinct()[: prompts or None], max(1, 64 // beams), {}
    order = sorted(chosen, key=lambda i: len(examples.prompts[i]))
    for some in (order[start : start + rows] for start in range(0, len(order), rows)):
        new = model.generate([examples.prompts[i] for i in some], longest, temperature=0, eot=tokenizer.eot,
                             beams=beams, length_penalty=0.9, no_repeat_ngram=4 if beams > 1 else 0)  # usual for E2E
        written |= {i: " ".join(tokenizer.decode(ids).split()) for i, ids in zip(some, new)}
    return [written[i] for i in chosen], [[" ".join(text.split()) for text in examples.references[i]] for i in chosen]


def text_scores(written, references):
    """BLEU of the corpus (sacrebleu, 0 to 100) and mean ROUGE-1, -2, -L (rouge-score: F-measure, best reference)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(texts, text) for text, texts in zip(written, references)]
    values = {name: statistics.fmean(score[name].fmeasure for score in scores) for name in scorer.rouge_types}
    # sacrebleu wants all first references, then all second ones, ...; None where a text has no more.
    return values | {"bleu": corpus_bleu(written, list(zip_longest(*references))).score}


def observe(model, examples, tokens=2048, first=None):
    """Sensitivity, and C of each layer, from one pass over a split or its `first` sequences (Appendix E).

    Sensitivity = sum_l sum_i |h_i(X) . dL/dh_i(X)|, the mean over sequences X, in nats: the dot product is over X's
    tokens and L is X's own mean loss. C = sum over the real tokens of h^T h [k, k], Algorithm 1 without decay, in
    float64, so that no order of summing shows: 8 k^2 bytes a layer, 0.9 GB in all for gpt2, 13 GB for GPT-Neo-1.3B.
    """
    held, device, total, count = [], model.wte.weight.device, 0.0, 0  # held: h of each layer [B, T, k]
    Cs = [torch.zeros(k, k, dtype=torch.float64, device=device) for k in model.config.mlp_widths]
    for block in model.h:
        block.mlp.observer = held.append
    for batch in batches(examples, tokens, first):
        idx, targets, real = (tensor.to(device) for tensor in batch)
        logits, _ = model(idx)  # [B, T, V]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)  # [B, T]
        means = losses.sum(1) / (targets != -100).sum(1)  # [B]
        # Sequences do not see each other, so the gradient of the sum of their losses is for each one that of its own.
        for h, gradient, C in zip(held, torch.autograd.grad(means.sum(), held), Cs):
            h = h.detach().double()
            total += (h * gradient).sum(1).abs().sum().item()  # [B, T, k] -> [B, k]; padding has no gradient
            C.addmm_(h[real].T, h[real])  # [tokens, k] -> [k, k]
        count += len(idx)
        held.clear()
    for block in model.h:
        block.mlp.observer = None
    return total / count, Cs


def similarity(C):
    """|cos(h_i, h_j)| = |C_ij| / sqrt(C_ii C_jj) (eq. 3) [k, k]; 0 if i = j, and for a neuron that is always 0."""
    norm = C.diagonal().sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)  # [k]
    return (C * inverse[:, None] * inverse).abs_().fill_diagonal_(0)


def span_residuals(C, ridge=1e-6):
    """The share of |h_i|^2 that no linear combination of the layer's other neurons gives (Definition 3.1). [k]

    1 / (C_ii (C^-1)_ii), with `ridge` times the mean of C's diagonal added to it, lest C be singular: 0 if h_i is in
    the others' span, 1 if orthogonal to them. It takes more tokens than neurons to mean anything.
    """
    silent = C.diagonal() == 0  # h_i = 0 is in any span
    ridged = C + torch.diag_embed(ridge * C.diagonal().mean() + silent)  # anything above 0 does for a silent neuron
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).diagonal()  # [k]
    return torch.where(silent, 0.0, 1 / (ridged.diagonal() * inverse))


def redundancy(Cs, threshold=0.8, bins=10):
    """Uniqueness and span uniqueness of a network (None if nothing is left), and `counts`, from its layers' C.

    Uniqueness = 1 - duplicates / neurons: a duplicate has |cos| >= 0.8 to a *later* neuron of its layer, so each pair
    counts once and of k copies one is unique (Appendix E). Span uniqueness is the mean of `span_residuals`. `counts`:
    each layer's neurons by the largest |cos| to another one, in `bins` ranges from 0 to 1 (Figure 3).
    """
    duplicates, shares, counts = 0, [], [[0] * bins for _ in Cs]
    for layer, C in enumerate(Cs):  # one at a time: each takes a few times the memory of C
        if len(C):
            cos = similarity(C)
            duplicates += int((cos.triu(1) >= threshold).any(1).sum())
            counts[layer] = torch.histc(cos.amax(1).clamp(max=1).cpu(), bins, 0, 1).int().tolist()
            del cos
            shares += span_residuals(C).tolist()
    unique, span = (1 - duplicates / len(shares), statistics.fmean(shares)) if shares else (None, None)
    return dict(uniqueness=unique, span_uniqueness=span), counts


# From here on: runs as `train.py` leaves them, measured and compared.


def write_whole(path, text):
    """Write a small file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_run(folder):
    """A run's path, its `metrics` with their `settings`, and its `measures`; {} for each the folder does not hold."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such run: {folder} is not a folder")
    if (path / "settings.json").exists() and not (path / "metrics.json").exists():
        raise ValueError(f"{folder} is not finished: go on with its python train.py command and --resume")
    try:
        metrics, measures = (json.loads(file.read_text()) if file.exists() else {}
                             for file in (path / "metrics.json", path / "measure.json"))
    except ValueError as error:
        raise ValueError(f"metrics.json or measure.json in {folder} is damaged: {error}") from error
    settings = metrics.get("settings", {})
    if os.path.isdir(settings.get("model", "")):  # the same folder is the same model, however it was written
        settings["model"] = str(Path(settings["model"]).resolve())
    return SimpleNamespace(path=path, metrics=metrics, settings=settings, measures=measures)


def dense_run(run, dense):
    """The run in folder `dense`, or else the dense run of the same data, model and seed beside `run`, or None."""
    if dense or not run.metrics:
        return read_run(dense) if dense else None
    same = {name: run.settings[name] for name in ("dataset", "data_config", "model", "seed")} | {"method": "none"}
    beside = [read_run(file.parent) for file in sorted(run.path.parent.glob("*/metrics.json"))]
    found = [other for other in beside if same.items() <= other.settings.items()]
    return max(found, default=None, key=lambda other: len(other.settings.items() & run.settings.items()))  # most alike


@cache  # one dense run serves many
def measure(path, device, dataset, data_path, data_config, block_size, split, examples, generate, beams, outputs):
    """A model's values by name, `counts` of `redundancy`, widths, and the texts it wrote with their references."""
    model = GPT.from_pretrained(path).to(device)
    where = model.config.vocab_size, block_size or model.config.n_positions, data_path, data_config
    if where[1] > model.config.n_positions:
        raise ValueError(f"--block-size {block_size} is longer than the context of {path}, {model.config.n_positions}")
    validation, metric, texts = load(dataset, "validation", *where), data.DATASETS[dataset]["metric"], ()
    values = dict(loss=mean_loss(model, validation, nullcontext()))
    values["perplexity"] = math.exp(values["loss"])
    if metric == "exact_match":
        values[metric] = statistics.fmean(exact_matches(model, validation))
    if outputs or metric in ("rouge", "bleu"):
        if isinstance(validation, data.Blocks):
            raise ValueError(f"--outputs needs prompts, and {dataset} is plain text without any")
        texts = write_texts(model, validation, generate, beams)
        values |= text_scores(*texts)
    values["sensitivity"], Cs = observe(model, load(dataset, split, *where), first=examples)
    unique, counts = redundancy(Cs)
    return values | unique, counts, model.config.mlp_widths, texts


def evaluate(args):
    """Measure runs: write measure.json, and texts in the e2e-metrics format, into their folders; print the values."""
    flags = "dataset data_path data_config block_size split examples generate beams outputs".split()
    for run in map(read_run, args.runs):
        known = run.settings | dict(block_size=run.metrics.get("block_size"))
        on = {flag: known.get(flag) if vars(args)[flag] is None else vars(args)[flag] for flag in flags}
        if not on["dataset"]:
            raise ValueError(f"{run.path} does not say what it was trained on: add --dataset, and --block-size")
        dense = dense_run(run, args.dense)
        values, counts, widths, texts = measure(run.path.absolute(), args.device, **on)
        base, _, full, _ = measure(dense.path.absolute(), args.device, **on) if dense else ({}, (), (), ())
        full = run.metrics["start"]["widths"] if run.metrics else full
        ratios = {name: x / base[name] if base.get(name) and x is not None else None for name, x in values.items()}
        values = values | dict(leftover=sum(widths) / max(sum(full), 1) if full else None)
        left = [k / max(m, 1) for k, m in zip(widths, full)] or None
        about = dict(on=on, dense=dense and dense.path.name, values=values, ratios=ratios, widths=widths,
                     leftover_per_layer=left, counts=counts)
        files = {"measure.json": json.dumps(about, indent=1, allow_nan=False) + "\n"}
        if on["outputs"]:  # a line for each text; a group of lines for its references, an empty line between groups
            files["outputs.txt"] = "\n".join(texts[0]) + "\n"
            files["references.txt"] = "\n\n".join("\n".join(filter(None, group)) for group in texts[1]) + "\n"
        for name, text in files.items():
            write_whole(run.path / name, text)
        print(f"\n{str(run.path):40}{'this':>10}{'dense':>10}{'ratio':>10}")
        for name, value in values.items():
            row = ["-" if x is None else f"{x:.4g}" for x in (value, base.get(name), ratios.get(name))]
            print(f"{MEASURES[name]:40}" + "".join(f"{cell:>10}" for cell in row))
        print("leftover per layer:", *(f"{share:.1%}" for share in left or []))


def read_runs(folders, measured):
    """Runs by (data set, model), in the tables' order; `.label` is the method, and how one differs from its like."""
    runs, groups = [read_run(folder) for folder in dict.fromkeys(folders)], {}
    for run in runs:
        if not run.metrics or measured and not run.measures:
            raise ValueError(f"{run.path} has no {'measure' if run.metrics else 'metrics'}.json: it takes a run of "
                             f"train.py, and then python measure.py {run.path}")
        run.measures = run.measures or dict(values=dict(perplexity=run.metrics["result"]["val_perplexity"],
                                                        leftover=run.metrics["leftover"]))
        run.method, run.goal = run.settings["method"], (run.settings["distill"], run.settings["leftover"])
        run.group = run.settings["dataset"], Path(run.settings["model"]).name
    for run in sorted(runs, key=lambda run: (run.goal[0], list(METHODS).index(run.method))):
        alike = [other.settings for other in runs
                 if (other.group, other.method, other.goal[0]) == (run.group, run.method, run.goal[0])]
        free = ("seed", "leftover", "teacher", "device", "dtype", "data_path")  # the rest makes a row of its own
        run.label = ", ".join([DRAWN[run.method][0], *(
            f"{name} {value}" for name, value in run.settings.items()
            if name not in free and any(settings[name] != value for settings in alike))])
        groups.setdefault(run.group, []).append(run)
    return groups


def mean_std(values):
    """Mean, sample standard deviation (0 of one) and number of the values that are there; None without any."""
    values = [value for value in values if value is not None]
    return (statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0, len(values)) if values else None


def table(args):
    """Print runs as the paper's tables do: methods down, leftover across; mean ± sample standard deviation (seeds)."""
    for (dataset, model), runs in read_runs(args.runs, measured=False).items():
        asked = data.DATASETS[dataset]["metric"].replace("rouge", "rougeL")
        name = args.metric or (asked if all(asked in run.measures["values"] for run in runs) else "perplexity")
        if lacking := [str(run.path) for run in runs if name not in run.measures["values"]]:
            raise ValueError(f"no {name}: first python measure.py {' '.join(lacking)}")
        rows, leftovers = {}, sorted({run.goal[1] for run in runs}, reverse=True)
        for run in runs:
            distill, v = run.goal
            rows.setdefault(run.label + ", distilled" * distill, {v: [] for v in leftovers})[v].append(run)
        lines = [[f"{dataset}, {model}: {MEASURES[name]}", *(f"{v:g}" for v in leftovers)]]
        for label, row in rows.items():
            lines.append([label])
            for v, some in row.items():
                mean, std, n = mean_std(run.measures["values"][name] for run in some) or (None, None, 0)
                left = statistics.fmean(run.metrics["leftover"] for run in some) if n else v
                lines[-1].append(f"{mean:.4g}" + f" ± {std:.2g}" * (n > 1) + f" ({n})"
                                 + f" at {left:.3f}" * (abs(left - v) >= 0.01) if n else "-")  # not what was wanted
        if args.format == "csv":
            csv.writer(sys.stdout).writerows(lines)
        elif args.format == "markdown":
            lines.insert(1, ["---"] * len(lines[0]))
            print(*(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
        else:
            body = " \\\\\n".join(" & ".join(line) for line in lines).replace("_", r"\_").replace("±", r"$\pm$")
            print(f"\\begin{{tabular}}{{l{'r' * len(leftovers)}}}\n{body} \\\\\n\\end{{tabular}}\n")


def draw(path, panels, styles):
    """A figure of `panels` {(title, x label, y label): {curve: {x: {seed's run: y}}}}, as PNG and PDF."""
    # Points are means, bars sample standard deviations. Panels of the same quantities share their axes.
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    matplotlib.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10})
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows, handles, peers = -(-len(panels) // columns), {}, {}
    figure = Figure(figsize=(9, 0.7 + 2.5 * rows), layout="constrained")
    for place, ((title, x_label, y_label), curves) in enumerate(panels.items(), 1):
        peer = peers.get((x_label, y_label))
        ax = peers[x_label, y_label] = figure.add_subplot(rows, columns, place, sharex=peer, sharey=peer)
        ax.set(title=title, xlabel=x_label, ylabel=y_label)
        ax.xaxis.get_major_locator().set_params(integer=x_label in ("layer", "step"))
        for label, points in curves.items():
            xs = sorted(points)
            means, stds, _ = zip(*(mean_std(points[x].values()) for x in xs))
            crowded = dict(marker="", elinewidth=0.5, capsize=0) if len(xs) > 12 else {}
            style = dict(capsize=2, mfc="none") | styles[label] | crowded
            handles[label] = ax.errorbar(xs, means, stds if any(stds) else None, **style)
    for (_, y_label), ax in peers.items():
        if y_label.startswith("share"):  # bars may reach beyond what a share can be
            ax.set_ylim(0, min(1.03, ax.get_ylim()[1]))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        figure.savefig(f"{path}.tmp", format=suffix, dpi=200)
        os.replace(f"{path}.tmp", f"{path}.{suffix}")
    print(f"{path}.png")


def figures(args):
    """Draw the paper's figures 1, 2 (redundancy by dense), 5, 6 (raw), 3 (similarity), 4 (layers), and training."""
    from matplotlib import colormaps

    x_labels = {"redundancy": "leftover wanted (share of neurons)", "similarity": "largest |cos| to another neuron",
                "layers": "layer", "training": "step"}
    for (dataset, model), runs in read_runs(args.runs, measured=True).items():
        drawn, styles, left = {}, {"v_t": dict(color="#555555", ls=":", zorder=3)}, "share of neurons left"

        def add(figure, title, y_label, curve, xs, ys):
            panel = drawn.setdefault(figure, {}).setdefault((title, x_labels[figure.split("-")[0]], y_label), {})
            for x, y in zip(xs, ys):
                if y is not None:
                    panel.setdefault(curve, {}).setdefault(x, {})[run.path] = y

        goals = dict.fromkeys(run.goal for run in runs if run.method != "none")
        for run in runs:
            (_, marker, color), label, full = DRAWN[run.method], run.label, run.metrics["start"]["widths"]
            ablation = sum(style["color"] == color for style in styles.values())
            styles.setdefault(label, dict(color=color, marker=marker, ls=["-", "--", ":", "-."][ablation % 4]))
            for distill, v in [run.goal] if run.method != "none" else goals or [run.goal]:  # dense: in every panel
                how, goal = ("with" if distill else "without") + " distillation", f"-{v:g}" + "-distilled" * distill
                for name in ("sensitivity", "uniqueness", "span_uniqueness"):
                    by = MEASURES[name].split(" (")[0] + " (ratio to dense)"
                    add("redundancy-values", how, MEASURES[name], label, run.goal[1:], [run.measures["values"][name]])
                    add("redundancy-ratios", how, by, label, run.goal[1:], [run.measures["ratios"][name]])
                for n, counts in enumerate(run.measures["counts"], 1):
                    middles = [(i + 0.5) / len(counts) for i in range(len(counts))]
                    shares = [k / max(sum(counts), 1) for k in counts]
                    add("similarity" + goal, f"layer {n}", "share of neurons", label, middles, shares)
            if run.method != "none":
                shares = run.metrics["leftover_per_layer"]
                add("layers", f"leftover {v:g}, {how}", left, label, range(1, len(full) + 1), shares)
                log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
                steps, loss, v_t, leftover = ([line[key] for line in log] for key in ("step", "loss", "v", "leftover"))
                add("training" + goal, "all methods", "training loss (nats/token)", label, steps, loss)
                add("training" + goal, "all layers", left, "v_t", steps, v_t)
                add("training" + goal, "all layers", left, label, steps, leftover)
                for n, m in enumerate(full):
                    styles[f"layer {n + 1}"] = dict(color=colormaps["viridis"](n / len(full)), lw=1)
                    shares = [line["widths"][n] / max(m, 1) for line in log]
                    add("training" + goal, label, left, f"layer {n + 1}", steps, shares)
        for name, panels in drawn.items():
            draw(Path(args.out, f"{name}-{dataset}-{model}"), panels, styles)


def sample(args):
    """Print what the dense and the pruned model write after a prompt, side by side, drawn with the same seed."""
    run, columns = read_run(args.runs[0]), []
    for title, one in (("dense", dense_run(run, args.dense)), ("pruned", run)):
        if one:
            model = GPT.from_pretrained(one.path).to(args.device)
            tokenizer, generator = data.tokenizer(model.config.vocab_size), torch.Generator(args.device).manual_seed(0)
            ids = tokenizer.encode(args.prompt)
            ids += model.generate([ids], args.tokens, 0.8, top_k=40, eot=tokenizer.eot, generator=generator)[0]
            lines = [f"{title}: {one.path}", "", *tokenizer.decode(ids).splitlines()]
            columns.append([part for line in lines for part in textwrap.wrap(line, 56) or [""]])
    for parts in zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{part:56}" for part in parts).rstrip())


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


def at_least(least):
    """What argparse calls a type: a whole number from `least` upwards."""
    def whole(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return int(text)

    return whole


def main():
    commands = {command.__name__: command for command in (evaluate, table, figures, sample, speed, bench)}
    command, *words = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in commands else ["evaluate", *sys.argv[1:]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # so that a mistake takes one line

    def flag(name, where, **how):
        if command in where.split():
            parser.add_argument(name, **how)

    flag("runs", "evaluate table figures sample speed", metavar="RUN", nargs="+", help="the folders of finished runs")
    flag("--dense", "evaluate sample speed",
         help="the dense model's folder (default: the run of the same data, model and seed beside RUN)")
    flag("--device", "evaluate sample speed bench", default="cuda" if torch.cuda.is_available() else "cpu",
         help="cuda or cpu")
    flag("--dataset", "evaluate", choices=data.DATASETS,
         help="what to measure on (default, as of the next three: the run's)")
    flag("--data-path", "evaluate", help="a local folder with the data")
    flag("--data-config", "evaluate", help="the data's configuration")
    flag("--block-size", "evaluate bench", type=at_least(1),
         help="tokens per sequence (of a folder with only a model: its context; for bench: 256)")
    flag("--split", "evaluate", choices=("train", "validation"), default="train",
         help="to measure redundancy on (default: train)")
    flag("--examples", "evaluate", type=at_least(0), default=512,
         help="how many of its sequences, the first; 0 = all (default: 512)")
    flag("--generate", "evaluate", type=at_least(0), default=0,
         help="how many prompts to write texts for, if need be (default: 0 = all)")
    flag("--beams", "evaluate", type=at_least(1), default=1, help="for these texts (default: 1, greedy; for e2e: 10)")
    flag("--outputs", "evaluate", action="store_true", help="write outputs.txt and references.txt as e2e-metrics reads")
    flag("--metric", "table", choices=MEASURES, help="what to show (default: what the data asks for)")
    flag("--format", "table", choices=("markdown", "csv", "latex"), default="markdown", help="default: markdown")
    flag("--out", "figures", default="figures", help="the folder to draw into (default: figures)")
    flag("--prompt", "sample", required=True, help="the text to continue")
    flag("--tokens", "sample", type=at_least(0), default=120, help="how many to write at most (default: 120)")
    flag("--rounds", "speed bench", type=at_least(1), default=5, help="how often to time each thing (default: 5)")
    flag("--dtype", "speed bench", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    flag("--model", "bench", default="tiny", help=f"whose shape to give to random weights: {', '.join(SHAPES)}, or a "
         "folder (default: tiny)")
    flag("--batch-size", "bench", type=at_least(1), default=4, help="sequences per step (default: 4)")
    flag("--accumulate", "bench", type=at_least(1), default=1, help="in so many micro-batches (default: 1)")
    flag("--sim-tokens", "bench", type=at_least(1), help="time gum with so many tokens for the similarity, too")
    flag("--distill", "bench", action="store_true", help="time every method with a teacher, too")
    flag("--compile", "bench", action="store_true", help="as in train.py")
    flag("--gradient-checkpointing", "bench", action="store_true", help="as in train.py")
    args = parser.parse_args(words)
    if getattr(args, "compile", False) and args.gradient_checkpointing:
        parser.error("--compile and --gradient-checkpointing do not go together")
    if getattr(args, "device", "cpu") != "cpu" and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {args.device}: it is cpu, or cuda where this machine and this build of torch have it")
    try:
        commands[command](args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()

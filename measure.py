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
from model import GPT
from prune import METHODS

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
    for idx, targets, _ in islice(batches(examples, 2048), most):
        asked, device = targets != -100, model.wte.weight.device
        with autocast:
            x = model(idx.to(device), head=False)[asked.to(device)]  # [n, d]
            logits = F.linear(x, model.wte.weight).float()  # [n, V]
        total += F.cross_entropy(logits, targets[asked].to(device), reduction="sum").item()
        count += len(logits)
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
        block.mlp.record = held.append
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
        block.mlp.record = None
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
    """What a run's folder holds: `path`, `state` ("finished", "interrupted" or "new"), `settings`,
    `metrics` and `measures`, {} where it has none. Raises FileNotFoundError without a folder, ValueError for a damaged file."""
    path, found = Path(folder), {}
    if not path.is_dir():
        raise FileNotFoundError(f"no such run: {folder} is not a folder")
    for name in ("settings", "metrics", "measure"):
        file = path / f"{name}.json"
        try:
            found[name] = dict(json.loads(file.read_text())) if file.exists() else {}
            settings = dict(found["metrics"]["settings"]) if found.get("metrics") else found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: remove {path} and start over") from error
    state = "finished" if found["metrics"] else "interrupted" if found["settings"] else "new"
    return SimpleNamespace(path=path, state=state, settings=settings, metrics=found["metrics"], measures=found["measure"])


def find_dense(folders, settings):
    """The finished dense run among those in `folders` that is of the same data, model and seed as
    `settings`, most alike in all else; or None."""
    def same(one, name):
        value = one.get(name)
        return str(Path(value).resolve()) if name == "model" and os.path.isdir(value or "") else value

    found = []
    for file in sorted(file for folder in set(map(Path, folders)) for file in folder.glob("*/metrics.json")):
        run = read_run(file.parent)
        if run.settings["method"] == "none" and not run.settings["distill"] and all(
                same(run.settings, name) == same(settings, name) for name in ("dataset", "data_config", "model", "seed")):
            found.append(run)
    return max(found, default=None, key=lambda run: len(run.settings.items() & settings.items()))


def sampled(model, ids, tokens):
    """The text of `ids` and up to `tokens` more, drawn with a fixed seed."""
    tokenizer = data.tokenizer(model.config.vocab_size)
    generator = torch.Generator(model.wte.weight.device).manual_seed(0)
    return tokenizer.decode(ids + model.generate([ids], tokens, 0.8, top_k=40, eot=tokenizer.eot, generator=generator)[0])


def dense_run(run, dense):
    """The run in folder `dense`, or else the dense run beside `run`, or None."""
    if dense or not run.metrics:
        return read_run(dense) if dense else None
    return find_dense([run.path.parent], run.settings)


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


def at_least(least):
    """What argparse calls a type: a whole number from `least` upwards."""
    def whole(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return int(text)

    return whole


def main():
    commands = {command.__name__: command for command in (evaluate, table, figures, sample)}
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

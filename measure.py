"""What the paper measures of a finished run, to see why methods differ (its section 3.2 and Appendix E).

    python measure.py out/RUN ...                        measure them: writes measure.json into each one's folder
    python measure.py table out/RUN ...                  the paper's tables: methods down, leftover across
    python measure.py figures out/RUN ... --out figures  the paper's figures, and training curves
    python measure.py sample out/RUN --prompt TEXT       what the dense and the pruned model write, side by side

In order: quality, sensitivity, uniqueness, span uniqueness, a run's measures, tables, figures, the command line.
Shapes: B sequences of T tokens; h [B, T, k] is what the k neurons left in a layer put out; V = vocab_size.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
import textwrap
import time
from contextlib import nullcontext
from functools import cache
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data
from model import GPT
from prune import METHODS

MEASURES = {  # a value in measure.json: its name in tables and figures
    "loss": "validation loss (nats per token)", "perplexity": "perplexity", "exact_match": "exact match (share)",
    "bleu": "BLEU", "rouge1": "ROUGE-1 F", "rouge2": "ROUGE-2 F", "rougeL": "ROUGE-L F", "sensitivity": "sensitivity (nats)",
    "uniqueness": "uniqueness (share)", "span_uniqueness": "span uniqueness (share)", "leftover": "leftover (share)"}
DRAWN = {  # method: label, marker, colour (Okabe and Ito's palette, which the colour-blind can tell apart)
    "none": ("Dense", "s", "#000000"), "magnitude": ("Magnitude", "^", "#E69F00"), "random": ("Random", "v", "#56B4E9"),
    "topv": ("Top_v", "D", "#009E73"), "soft": ("Soft movement", "P", "#CC79A7"), "gum": ("GUM", "o", "#D55E00")}


TITLES = {False: "without distillation", True: "with distillation"}


def batches(examples, tokens=8192, first=None):
    """Batches of a split, or of its `first` sequences: neighbours in length, at most `tokens` tokens (or one sequence)."""
    order, rows = [i for i in examples.by_length() if not first or i < first], max(1, tokens // examples.block_size)
    for start in range(0, len(order), rows):
        yield examples.batch(order[start : start + rows])


@torch.no_grad()
def mean_loss(model, examples, autocast, most=None):
    """The mean loss in nats per token that counts, over a split or its first `most` batches. exp() is the perplexity."""
    model.eval()
    device = model.wte.weight.device
    total, count = 0.0, 0
    for idx, targets, _ in islice(batches(examples), most):
        with autocast:
            logits, _ = model(idx.to(device))
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.to(device).flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


@torch.no_grad()
def prefill_speed(models, idx, rounds=7):
    """Tokens per second with which each of `models` reads `idx` [B, T]: the median of `rounds`, the models in turns."""
    idx = idx.to(models[0].wte.weight.device)
    seconds = [[] for _ in models]
    for _ in range(rounds + 1):  # the first round warms up
        for model, times in zip(models, seconds):
            began = time.perf_counter()
            model(idx)
            if idx.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return [idx.numel() / sorted(times[1:])[rounds // 2] for times in seconds]


@torch.no_grad()
def exact_matches(model, examples, tokens=4096):
    """For each example, in the order of `by_length`: does the model give exactly the target, end of text included?

    That is, every target token is the arg-max after the true ones before it. Greedy decoding then picks the same first
    token, so reads the same text, so picks the same second one, ...: the same event, for one forward pass.
    """
    matches = []
    for idx, targets, _ in batches(examples, tokens):
        said = model(idx.to(model.wte.weight.device))[0].argmax(-1).cpu()  # [B, T, V] -> [B, T]
        matches += ((said == targets) | (targets == -100)).all(1).tolist()
    return matches


def write_texts(model, examples, prompts=0, beams=1, length_penalty=1.0, no_repeat_ngram=0):
    """What the model writes to the first `prompts` distinct prompts (0: all), greedily or by beam search, and references.

    Two lists: a line of text for each prompt, at most as long as the split's longest target, and its list of references.
    """
    tokenizer, longest = data.tokenizer(model.config.vocab_size), max(map(len, examples.targets))
    chosen, rows, outputs = examples.distinct()[: prompts or None], max(1, 64 // beams), {}
    order = sorted(chosen, key=lambda i: len(examples.prompts[i]))
    for some in (order[start : start + rows] for start in range(0, len(order), rows)):
        new = model.generate([examples.prompts[i] for i in some], longest, temperature=0, beams=beams, eot=tokenizer.eot,
                             length_penalty=length_penalty, no_repeat_ngram=no_repeat_ngram)
        outputs |= {i: " ".join(tokenizer.decode(ids).split()) for i, ids in zip(some, new)}
    return [outputs[i] for i in chosen], [[" ".join(text.split()) for text in examples.references[i]] for i in chosen]


def text_scores(outputs, references):
    """BLEU of the corpus (sacrebleu, 0 to 100) and the mean ROUGE-1, -2, -L (rouge-score's F, 0 to 1, best reference)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(texts, output) for output, texts in zip(outputs, references)]
    streams = list(zip_longest(*references))  # sacrebleu wants all first references, all second ones, ...; None: no more
    return {name: statistics.fmean(score[name].fmeasure for score in scores) for name in scorer.rouge_types} | dict(
        bleu=corpus_bleu(outputs, streams).score)


def observe(model, examples, tokens=2048, first=None):
    """Both kinds of redundancy (Definition 3.1, Appendix E) from one pass over a split, or its `first` sequences: S and Cs.

    Sensitivity S = sum_l sum_i |h_i(X) . dL/dh_i(X)|, the mean over sequences X, in nats: the dot product is over one
    sequence's tokens and L its own mean loss, so it does not matter which others share its batch. C = sum of h^T h over the
    real tokens (Algorithm 1 without decay), [k, k] for each layer, in float64, so that no order of summing shows: 8 k^2
    bytes, 0.9 GB for the layers of gpt2, 13 GB for those of GPT-Neo-1.3B.
    """
    mlps, device, total, count = [block.mlp for block in model.h], model.wte.weight.device, 0.0, 0
    Cs = [torch.zeros(k, k, dtype=torch.float64, device=device) for k in model.config.mlp_widths]
    for idx, targets, real in batches(examples, tokens, first):
        idx, targets, real = idx.to(device), targets.to(device), real.to(device)
        for mlp in mlps:
            mlp.hold = True
        features, held = model.features(idx), [mlp.held for mlp in mlps]  # [B, T, d], [B, T, k] each
        counts = targets != -100  # [B, T]
        losses = F.cross_entropy(F.linear(features[counts], model.wte.weight), targets[counts], reduction="none")
        shares = (1 / counts.sum(1, keepdim=True)).expand_as(counts)[counts]  # each token's part in its sequence's mean
        # Sequences do not see each other, so the gradient of the sum of their losses is for each one that of its own.
        for h, gradient, C in zip(held, torch.autograd.grad((losses * shares).sum(), held), Cs):
            h = h.detach().double()
            total += (h * gradient).sum(1).abs().sum().item()  # [B, T, k] -> [B, k]; padding has no gradient
            C.addmm_(h[real].T, h[real])  # [tokens, k] -> [k, k]
        count += len(idx)
    for mlp in mlps:
        mlp.hold, mlp.held = False, None
    return total / count, Cs


def similarity(C):
    """|cos(h_i, h_j)| = |C_ij| / sqrt(C_ii C_jj) (eq. 3) [k, k]; 0 if i = j, and for a neuron that is always 0."""
    norm = C.diagonal().sqrt()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)  # [k]
    return (C * inverse[:, None] * inverse).abs_().fill_diagonal_(0)


def span_residuals(C, ridge=1e-6):
    """How much of |h_i|^2 no linear combination of the layer's other neurons gives (Definition 3.1), in [0, 1]. [k]

    1 / (C_ii (C^-1)_ii), where `ridge` times the mean of C's diagonal is added to it, lest C be singular: 0 if h_i is in
    the others' span, 1 if it is orthogonal to them. It takes more tokens than neurons to mean anything.
    """
    silent = C.diagonal() == 0  # h_i = 0 is in any span
    ridged = C + torch.diag_embed(ridge * C.diagonal().mean() + silent)  # anything above 0 does for a silent neuron
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).diagonal()  # [k]
    return torch.where(silent, 0.0, 1 / (ridged.diagonal() * inverse))


def redundancy(Cs, threshold=0.8, bins=10):
    """From the layers' C: uniqueness and span uniqueness of the network (None if nothing is left), and `counts`.

    Uniqueness = 1 - duplicates / neurons. A duplicate has |cos| >= 0.8 to a *later* neuron of its layer: each pair counts
    once, so of k copies one is unique (Appendix E). Span uniqueness is the mean of `span_residuals`. `counts` has for each
    layer the number of neurons in each of `bins` ranges of the largest |cos| to another neuron, from 0 to 1 (Figure 3).
    """
    duplicates, shares, counts = 0, [], [[0] * bins for _ in Cs]
    for layer, C in enumerate(Cs):  # one at a time: each step takes a few times the memory of C
        if len(C):
            cos = similarity(C)
            duplicates += int((cos.triu(1) >= threshold).any(1).sum())
            counts[layer] = torch.histc(cos.amax(1).clamp(max=1).cpu(), bins, 0, 1).int().tolist()
            del cos
            shares += span_residuals(C).tolist()
    unique, span = (1 - duplicates / len(shares), statistics.fmean(shares)) if shares else (None, None)
    return dict(uniqueness=unique, span_uniqueness=span), counts


# From here on: runs as `train.py` leaves them, measured and compared.


def read_run(folder):
    """A run's path, its `metrics` with their `settings`, and its `measures`; {} for each that the folder does not hold."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such run: {folder} is not a folder")
    if (path / "settings.json").exists() and not (path / "metrics.json").exists():
        raise ValueError(f"{folder} is not finished: go on with its python train.py command and --resume")
    metrics, measures = (json.loads(file.read_text()) if file.exists() else {}
                         for file in (path / "metrics.json", path / "measure.json"))
    return SimpleNamespace(path=path, metrics=metrics, settings=metrics.get("settings", {}), measures=measures)


def dense_run(run, dense):
    """The run in folder `dense`, or else the dense run of the same data, model and seed beside `run`; None without one."""
    if dense or not run.metrics:
        return read_run(dense) if dense else None
    same = {name: run.settings[name] for name in ("dataset", "data_config", "model", "seed")} | {"method": "none"}
    beside = [read_run(file.parent) for file in sorted(run.path.absolute().parent.glob("*/metrics.json"))]
    found = [other for other in beside if same.items() <= other.settings.items()]
    return max(found, default=None, key=lambda other: len(other.settings.items() & run.settings.items()))  # most alike


@cache  # one dense run serves many
def measure(path, device, dataset, data_path, data_config, block_size, split, examples, generate, beams, outputs):
    """A model's values by name, its `counts` and widths, and the texts it wrote with their references."""
    model = GPT.from_pretrained(path).to(device)
    where = model.config.vocab_size, block_size or model.config.n_positions, data_path, data_config
    validation, metric, texts = data.load(dataset, "validation", *where), data.DATASETS[dataset]["metric"], ()
    loss = mean_loss(model, validation, nullcontext())
    values = dict(loss=loss, perplexity=math.exp(min(loss, 700)))
    if metric == "exact_match":
        values["exact_match"] = statistics.fmean(exact_matches(model, validation))
    if outputs or metric in ("rouge", "bleu"):
        if isinstance(validation, data.Blocks):
            raise ValueError(f"--outputs needs prompts, and {dataset} is plain text without any")
        texts = write_texts(model, validation, generate, beams)
        values |= text_scores(*texts)
    values["sensitivity"], Cs = observe(model, data.load(dataset, split, *where), first=examples)
    unique, counts = redundancy(Cs)
    return values | unique, counts, model.config.mlp_widths, texts


def evaluate(args):
    """Measure runs: write measure.json, and texts in the e2e-metrics format, into their folders; print the values."""
    for run in map(read_run, args.runs):
        on = {name: run.settings.get(name) if value is None else value for name, value in vars(args).items()
              if name not in ("command", "runs", "dense", "device")}
        on["block_size"] = on["block_size"] or run.metrics.get("block_size")
        if not on["dataset"]:
            raise ValueError(f"{run.path} does not say what it was trained on: add --dataset, and --block-size")
        dense = dense_run(run, args.dense)
        values, counts, widths, texts = measure(run.path.absolute(), args.device, **on)
        base, _, full, _ = measure(dense.path.absolute(), args.device, **on) if dense else ({}, 0, (), 0)
        full = run.metrics["start"]["widths"] if run.metrics else full
        left = [k / max(m, 1) for k, m in zip(widths, full)]
        ratios = {name: value / base[name] if value is not None and base.get(name) else None for name, value in values.items()}
        values = values | dict(leftover=sum(widths) / sum(full) if full else None)
        about = dict(on=on, dense=dense and dense.path.name, values=values, ratios=ratios, widths=widths,
                     leftover_per_layer=left or None, counts=counts)
        files = {"measure.json": json.dumps(about, indent=1, allow_nan=False) + "\n"}
        if on["outputs"]:  # a line for each output; for its references a group of lines, an empty line between groups
            files["outputs.txt"] = "\n".join(texts[0]) + "\n"
            files["references.txt"] = "\n\n".join("\n".join(filter(None, group)) for group in texts[1]) + "\n"
        for name, text in files.items():
            (run.path / (name + ".tmp")).write_text(text)
            os.replace(run.path / (name + ".tmp"), run.path / name)
        print(f"\n{str(run.path):42}{'this':>10}{'dense':>10}{'ratio':>10}")
        for name, value in values.items():
            row = (value, base.get(name), ratios.get(name))
            print(f"{MEASURES[name]:42}" + "".join(f"{'-' if x is None else format(x, '.4g'):>10}" for x in row))
        print("leftover per layer:", *(f"{share:.1%}" for share in left))


def compared(folders):
    """Runs as {(data set, model): {(method, distilled, label): {leftover wanted: [a run for each seed]}}}."""
    free, groups = ("seed", "leftover", "teacher", "device", "dtype", "data_path"), {}
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.path} was not made by train.py: there is no metrics.json in it")
        found = dict(perplexity=run.metrics["result"]["val_perplexity"], leftover=run.metrics["leftover"])
        run.measures = run.measures or dict(values=found, ratios={})  # not measured yet
        run.kind = [run.settings[name] for name in ("dataset", "model", "distill", "method")]
    for run in sorted(runs, key=lambda run: (run.kind[2], list(METHODS).index(run.kind[3]), run.path)):
        dataset, model, distill, method = run.kind
        alike = [other.settings for other in runs if other.kind == run.kind]
        differing = [f"{name} {value}" for name, value in run.settings.items()  # ablations get rows of their own
                     if name not in free and any(settings[name] != value for settings in alike)]
        label = ", ".join([DRAWN[method][0], *["distilled"] * distill, *differing])
        rows = groups.setdefault((dataset, Path(model).name), {})
        rows.setdefault((method, distill, label), {}).setdefault(run.settings["leftover"], []).append(run)
    return groups


def mean_std(values):
    """Mean and sample standard deviation (0 of one) of the values that are there, and their number; None without any."""
    values = [value for value in values if value is not None]
    return (statistics.fmean(values), statistics.stdev(values) if values[1:] else 0.0, len(values)) if values else None


def table(args):
    """Print runs as the paper's tables: methods down, leftover across; mean ± sample standard deviation (seeds)."""
    kind = "ratios" if args.ratio else "values"
    for (dataset, model), rows in compared(args.runs).items():
        leftovers = sorted({leftover for cells in rows.values() for leftover in cells}, reverse=True)
        runs = [run for cells in rows.values() for some in cells.values() for run in some]
        asked = {"rouge": "rougeL"}.get(data.DATASETS[dataset]["metric"], data.DATASETS[dataset]["metric"])
        name = args.metric or (asked if all(asked in run.measures[kind] for run in runs) else "perplexity")
        for run in runs:
            if name not in run.measures[kind]:
                raise ValueError(f"{run.path} has no {name}: first python measure.py {run.path}")
        lines = [[f"{dataset}, {model}: {MEASURES[name]}" + " / dense" * args.ratio] + [f"{v:.0%}" for v in leftovers]]
        for (_, _, label), cells in rows.items():
            lines.append([label])
            for v in leftovers:
                found = mean_std(run.measures[kind][name] for run in cells.get(v, []))
                real = mean_std(run.metrics["leftover"] for run in cells.get(v, []))
                text = f"{found[0]:.4g}" + f" ± {found[1]:.2g}" * (found[2] > 1) + f" ({found[2]})" if found else "-"
                lines[-1].append(text + (f" at {real[0]:.1%}" if real and abs(real[0] - v) >= 0.01 else ""))
        if args.format == "csv":
            csv.writer(sys.stdout).writerows(lines)
        elif args.format == "markdown":
            print(*("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]), sep="\n")
        else:
            body = " \\\\\n".join(" & ".join(line) for line in lines) + " \\\\\n"
            for plain, latex in (("%", r"\%"), ("_", r"\_"), ("±", r"$\pm$")):
                body = body.replace(plain, latex)
            print(f"\\begin{{tabular}}{{l{'r' * len(leftovers)}}}\n{body}\\end{{tabular}}")
        print()


def draw(path, panels, columns):
    """A figure of `panels`, (title, x label, y label, series); a series is (label, style, {x: values over seeds}).

    Points are means, bars the sample standard deviation; panels of the same quantities share their axes. PNG and PDF.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = -(-len(panels) // columns)
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(rows, columns, figsize=(9, 0.6 + 2.4 * rows), squeeze=False, layout="constrained")
    handles, peers = {}, {}
    for ax in axes.flat[len(panels):]:
        ax.remove()
    for ax, (title, x, y, series) in zip(axes.flat, panels):
        if (peer := peers.setdefault((x, y), ax)) is not ax:
            ax.sharex(peer), ax.sharey(peer)
        ax.set(title=title, xlabel=x, ylabel=y)
        for label, style, points in series:
            points = {x: found for x in sorted(points) if (found := mean_std(points[x]))}
            if points:
                means, stds, _ = zip(*points.values())
                dots = dict(marker="") if len(points) > 12 else {}
                handles[label] = ax.errorbar(points.keys(), means, stds, label=label, **style | dots)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        figure.savefig(path.with_name(f"{path.name}.tmp"), format=suffix, dpi=200)
        os.replace(path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.{suffix}"))
    plt.close(figure)
    print(f"{path}.png, .pdf")


def curves(rows, distill, leftover, pairs):
    """A curve for `draw` per row that is (not) distilled, through the points `pairs(run)` of its runs with `leftover`."""
    drawn = []
    for (method, distilled, label), cells in rows.items():
        if distilled == distill or method == "none":  # the dense runs serve both
            _, marker, color = DRAWN[method]
            nth, points = sum(style["color"] == color for _, style, _ in drawn), {}
            for run in [run for v, some in cells.items() for run in some if leftover in (None, v) or method == "none"]:
                for x, y in pairs(run):
                    points.setdefault(x, []).append(y)
            drawn.append((label, dict(color=color, marker=marker, ls=("-", "--", ":", "-.")[nth % 4]), points))
    return drawn


def figures(args):
    """Draw the paper's figures 1, 2 (redundancy, ratio to dense), 5, 6 (raw), 3 (similarity), 4 (layers), and training."""
    from matplotlib import colormaps

    for (dataset, model), rows in compared(args.runs).items():
        for run in [run for cells in rows.values() for some in cells.values() for run in some]:
            if "counts" not in run.measures:
                raise ValueError(f"{run.path} is not measured: first python measure.py {run.path}")
            run.log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
            run.full = run.metrics["start"]["widths"]
        pruned = {key: cells for key, cells in rows.items() if key[0] != "none"}
        layers, draws = range(len(run.full)), {}
        for kind, of in (("ratios", ", ratio to dense"), ("values", "")):
            draws["redundancy-" + kind] = 3, [
                (TITLES[d], "leftover (%)", MEASURES[name] + of, curves(rows, d, None, lambda run: [
                    (100 * run.settings["leftover"], run.measures[kind].get(name))]))
                for d in sorted({key[1] for key in pruned or rows}) for name in ("sensitivity", "uniqueness", "span_uniqueness")]
        sets = sorted({(d, v) for (_, d, _), cells in pruned.items() for v in cells})
        draws["layers"] = 2, [
            (f"{v:.0%} left, {TITLES[d]}", "layer", "neurons left in the layer (%)", curves(pruned, d, v, lambda run: [
                (n + 1, 100 * share) for n, share in enumerate(run.metrics["leftover_per_layer"])])) for d, v in sets]
        for d, v in sets:
            name = f"-{v:g}" + "-distilled" * d
            draws["similarity" + name] = min(len(layers), 4), [
                (f"layer {n + 1}", "largest |cos| to another neuron", "neurons (%)", curves(rows, d, v, lambda run: [
                    (i / 10 + 0.05, 100 * count / max(sum(run.measures["counts"][n]), 1))
                    for i, count in enumerate(run.measures["counts"][n])])) for n in layers]
            draws["training" + name] = 3, [
                (title, "step", y, curves(pruned, d, v, lambda run: [(line["step"], scale * line[key]) for line in run.log]))
                for title, key, scale, y in (("loss", "loss", 1, "training loss (nats per token)"),
                                             ("schedule", "v", 100, "v_t (%)"), ("network", "leftover", 100, "neurons left (%)"))]
            by_layer = [curves(pruned, d, v, lambda run: [(line["step"], 100 * line["widths"][n] / max(run.full[n], 1))
                                                          for line in run.log]) for n in layers]
            draws["training" + name][1].extend(
                (of_method[0][0], "step", "neurons left in the layer (%)",
                 [(f"layer {n + 1}", dict(color=colormaps["viridis"](n / len(layers))), points)
                  for n, (_, _, points) in enumerate(of_method)]) for of_method in zip(*by_layer))
        for name, (columns, panels) in draws.items():
            draw(Path(args.out, f"{name}-{dataset}-{model}"), panels, columns)


def sample(args):
    """Print what the dense and the pruned model write after a prompt, side by side, drawn with the same seed."""
    run, columns = read_run(args.run), []
    for title, one in (("dense", dense_run(run, args.dense)), ("pruned", run)):
        if one:
            model = GPT.from_pretrained(one.path).to(args.device)
            tokenizer, generator = data.tokenizer(model.config.vocab_size), torch.Generator(args.device).manual_seed(0)
            ids = tokenizer.encode(args.prompt)
            ids += model.generate([ids], args.tokens, 0.8, top_k=40, eot=tokenizer.eot, generator=generator)[0]
            lines = f"{title}: {one.path}\n\n{tokenizer.decode(ids)}".splitlines()
            columns.append([part for line in lines for part in textwrap.wrap(line, 56, replace_whitespace=False) or [""]])
    for parts in zip_longest(*columns, fillvalue=""):
        print(" | ".join(f"{part:56}" for part in parts).rstrip())


def fail(message):
    """A user's mistake: one line, exit status 2."""
    print(f"measure.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main():
    commands = {function.__name__: function for function in (evaluate, table, figures, sample)}
    argv = sys.argv[1:] if sys.argv[1:2] and sys.argv[1] in (*commands, "-h", "--help") else ["evaluate", *sys.argv[1:]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    parsers = {name: subparsers.add_parser(name, help=function.__doc__) for name, function in commands.items()}

    def flag(names, name, *, default=None, **more):
        for command in names.split():
            parsers[command].add_argument(name, default=default, **more)

    for one in parsers.values():
        one.error = fail
    flag("evaluate table figures", "runs", metavar="RUN", nargs="+", help="the folder of a finished run")
    flag("sample", "run", metavar="RUN", help="the folder of a finished run")
    flag("evaluate sample", "--dense", help="the dense model's folder (default: that of the same data, model and seed beside)")
    flag("evaluate sample", "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    flag("evaluate", "--dataset", choices=list(data.DATASETS), help="measure on this data (default: what the run trained on)")
    flag("evaluate", "--data-path", help="a local folder with the data")
    flag("evaluate", "--data-config", help="the data's configuration")
    flag("evaluate", "--block-size", type=int, help="tokens per sequence (default: the run's, or the model's context)")
    flag("evaluate", "--split", default="train", choices=("train", "validation"), help="for sensitivity and uniqueness")
    flag("evaluate", "--examples", default=512, type=int, help="sequences of it, the first ones; 0 = all (default: 512)")
    flag("evaluate", "--generate", default=0, type=int, help="prompts to generate from; 0, the default, = all")
    flag("evaluate", "--beams", default=1, type=int, help="for generation; 1 is greedy; 10 usual for e2e")
    flag("evaluate", "--outputs", action="store_true", help="also write outputs.txt and references.txt (e2e-metrics format)")
    flag("table", "--metric", choices=list(MEASURES), help="(default: what the data asks for)")
    flag("table", "--ratio", action="store_true", help="divide by the dense run's")
    flag("table", "--format", choices=("markdown", "csv", "latex"), default="markdown")
    flag("figures", "--out", default="figures", help="the folder for the figures")
    flag("sample", "--prompt", required=True, help="the text to continue")
    flag("sample", "--tokens", default=120, type=int, help="how many at most")
    args = parser.parse_args(argv)
    try:
        commands[args.command](args)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()

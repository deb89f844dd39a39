"""A run's model card, and `python measure.py export`, for loaders that run no code of ours."""

import json
import os
import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

import data
from model import config_to_hf, read_config, whole
from prune import METHODS, shrink
from results.cli import flag_of
from results.compare import CLOSING
from results.runs import load_model, read_model
from results.tokenizer import write_tokenizer


def command_of(flags):
    """The command whose flags `parse` has made `flags`, but for --resume."""
    given = [word for name, value in vars(flags).items() if value is not None and name != "resume"
             for word in (flag_of(name), str(value))[: 1 if value is True else 2]]
    return shlex.join(["python", "train.py", *given])


CARD = """---
{about}
---

# {name}

{what}

| | {before} | {after} | ratio |
| --- | ---: | ---: | ---: |
{numbers}

Loss is the mean over all validation tokens that the model is asked for{left_out}, perplexity its
exp; the speed was measured on {machine}.

| layer | neurons before | after | left |
| ---: | ---: | ---: | ---: |
{layers}

Data: {data}.

{made}

## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name = {path}  # or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(name{trust})
tokenizer = AutoTokenizer.from_pretrained(name)

write = pipeline("text-generation", model=name{trust})
print(write("The", max_new_tokens=20)[0]["generated_text"])
```

By the program that made it, in its folder:

```python
from model import GPT

model = GPT.from_pretrained({path})
```

To the Hub: `hf upload {hub_name} {folder}`
"""


def write_card(folder, metrics, place=None):
    """Write the model card README.md of the run whose metrics.json holds `metrics`, with what the
    Hub reads of it: the numbers as in the table at a run's end. `place`: where `folder` is going
    to be, if not where it is."""
    from huggingface_hub import EvalResult, ModelCardData  # comes with `datasets`

    folder, place = Path(folder), Path(place or folder)
    settings, start, result = map(metrics.get, ("settings", "start", "result"))
    config, method, dataset = read_config(folder), settings["method"], settings["dataset"]
    hub, base = data.DATASETS[dataset].get("hub"), metrics.get("base_model")
    if settings["data_path"]:  # perhaps a text of one's own: it is named by its folder alone
        hub, dataset = None, Path(settings["data_path"]).resolve().name or dataset
    pruned = method != "none"
    of_data = dict(task_type="text-generation", dataset_type=hub or dataset, dataset_name=dataset,
                   dataset_config=settings["data_config"], dataset_split="validation")
    about = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", base_model=base,
        tags=["pruning", "structured-pruning", method] * pruned + [config.model_type],
        datasets=[hub] if hub else None, model_name=place.absolute().name, eval_results=[
            EvalResult(metric_type=kind, metric_value=result[key], **of_data)
            for kind, key in (("loss", "val_loss"), ("perplexity", "val_perplexity"))])

    def source(of):  # without the way to a folder
        return dataset if settings["data_path"] else of["source"]

    full, left, name = start["widths"], result["widths"], METHODS[method].name
    family = "GPT-2" if config.model_type == "gpt2" else "GPT-Neo"
    tiny, origin = settings["model"] == "tiny", base or Path(settings["model"]).name
    made = f"trained on {dataset}, {'with' if settings['distill'] else 'without'} distillation"
    if metrics.get("teacher"):
        made += f" from {metrics['teacher']}"
    if pruned:
        origin = "a dense model of the same data" if tiny else origin
        what = (f"A {family} whose MLP neurons were pruned by {name} ({METHODS[method].about}) "
                f"while it was {made}, starting from {origin}. {metrics['leftover']:.2%} of its "
                f"{sum(full):,} neurons are left ({metrics['leftover_wanted']:.2%} wanted).")
    else:
        origin = "scratch" if tiny else origin
        what = (f"A {family} {made}, starting from {origin}. None of its {sum(full):,} MLP neurons "
                "was pruned.")
    if list(config.mlp_widths) != left:
        widths = ", ".join(map(str, dict.fromkeys(config.mlp_widths)))
        what += (f" Here layers are filled up with zero neurons to {widths}: the same function, "
                 "larger; the numbers below are those without them.")

    rows = [(title, start[key], result[key], form) for title, key, form in CLOSING]
    left_out = metrics["data"]["validation"].get("left_out", 0)
    versions = ", ".join(" ".join(pair) for pair in metrics["versions"].items())
    made = (f"{metrics['steps']:,} steps in {metrics['seconds']:.0f} s, seed {settings['seed']}, "
            f"{metrics['processes']} process(es), {metrics['machine']}, {versions}.")
    if metrics.get("command"):
        made += f" The command:\n\n```sh\n{metrics['command']}\n```"
    # What the Hub allows: letters, digits, _ - and ., no two of the latter in a row, or at an end.
    hub_name = re.sub(r"[^a-zA-Z0-9_.]+", "-", place.absolute().name)
    hub_name = re.sub(r"[.-]{2,}", "-", hub_name)[:96].strip("-.") or "model"
    card = CARD.format(
        about=about.to_yaml(), name=place.absolute().name, what=what, made=made,
        before="dense" if pruned else "start", after=method if pruned else "end",
        numbers="\n".join(f"| {title} | {a:{form}} | {b:{form}} | {b / a:.2f}x |"
                          for title, a, b, form in rows),
        machine=metrics["machine"],
        layers="\n".join(f"| {n} | {m} | {k} | {k / max(m, 1):.2%} |"
                         for n, (m, k) in enumerate(zip(full, left), 1)),
        data="; ".join(f"{split}, {source(of)}, {of['tokens']:,} tokens, sha256 "
                       f"`{of['sha256']}`" for split, of in metrics["data"].items()),
        left_out=f" ({left_out:,} examples, longer than a block, are left out)" * (left_out > 0),
        hub_name=hub_name, folder=shlex.quote(place.as_posix()),
        path=json.dumps(place.as_posix(), ensure_ascii=False),
        trust=", trust_remote_code=True" * ("auto_map" in config_to_hf(config)))
    with whole(folder / "README.md") as file:
        file.write_text(card, encoding="utf-8")


def export(args):
    """Write the model of one RUN with every layer padded with zero neurons to the widest, for
    loaders without remote code, or to a multiple, for devices that are faster so; with its
    tokenizer and card. The folder appears whole or not at all."""
    out = Path(args.out)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there, and no empty folder: name another with --out")
    run = read_model(args.run)
    model = load_model(run.path)
    above = next(one for one in out.absolute().parents if one.exists())
    with TemporaryDirectory(prefix=f"{out.name}.", dir=above) as beside:
        made = Path(beside, "model")
        write_tokenizer(made, model.config.vocab_size, model.config.n_positions)
        if args.multiple_of:
            shrink(model, args.multiple_of).save_pretrained(made)
        else:
            model.save_pretrained(made, pad=True)
        if run.metrics:
            write_card(made, run.metrics, out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            if os.name == "nt" and out.exists():  # an empty folder, which Windows does not replace
                out.rmdir()
            made.rename(out)
        except OSError as error:  # as where another export was faster
            raise ValueError(f"the model can't be put at {out} ({error.strerror}): name another "
                             "folder with --out") from error
    print(f"the padded model is in {out}")

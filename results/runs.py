"""A run's folder: what `train.py` leaves there, and how it is known again.

While it trains: settings.json, log.jsonl, checkpoint.pt. At its end the model with tokenizer, card
and curves, and metrics.json, written last; then settings.json and checkpoint.pt go. Later
measure.json, from `measure.py`.
"""

import json
import os
import re
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock, Timeout

from model import GPT, download, whole
from results.tokenizer import check_tokenizer

FORMAT = 2  # of these files: raise it when what they hold means something else


def checksum(content):
    """Of a dict in this format."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode(), FORMAT)


def write_json(path, content):
    """Write a dict, whole or not at all, with its checksum."""
    with whole(path) as file:
        file.write_text(json.dumps(content | dict(crc32=checksum(content)), indent=1))


def read_json(path, key):
    """What `write_json` has written, {} if nothing. Raises ValueError if it is no longer just that,
    or lacks `key`."""
    try:
        content = json.loads(path.read_text())
        if content[key] and content.pop("crc32") == checksum(content):
            return content
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    lost = path if key == "values" else path.parent
    raise ValueError(f"{path} is damaged, or of another version: remove {lost} and start over")


def log_state(content):
    """By which a log is known: its length in bytes, and its checksum."""
    return [len(content), zlib.crc32(content)]


def cut_log(path, known):
    """Drop what was logged after the checkpoint was written, when the log was `known`: it will come
    again. If it is gone, the curves begin here. ValueError if it is not as it was. Returns by what
    the log is known now."""
    gone = not path.exists()
    content = b"" if gone else path.read_bytes()
    if gone and known[0]:
        with suppress(OSError):  # nobody has to read it
            print(f"{path} is gone: the curves begin where the run goes on", file=sys.stderr)
    elif log_state(content[: known[0]]) != known:
        raise ValueError(f"{path} is damaged, or not the one that the checkpoint knows: put that "
                         "back, or remove it and go on without the curves so far")
    with whole(path) as beside:
        beside.write_bytes(content[: known[0]])
    return log_state(content[: known[0]])


def model_state(model):
    """By which a model is known: a checksum of its configuration and its weights."""
    crc = zlib.crc32(repr(model.config).encode())
    for parameter in model.parameters():
        crc = zlib.crc32(parameter.detach().float().cpu().numpy(), crc)
    return crc


def load_model(name):
    """`GPT.from_pretrained`; ValueError if it is not what a finished run of ours has made there,
    or, where there is none, comes with a tokenizer that is not ours; OSError if that, to compare
    with, is out of reach."""
    folder = name if os.path.isdir(name) else download(str(name))
    model, known = GPT.from_pretrained(folder), read_json(Path(folder, "metrics.json"), "settings")
    if not known:
        check_tokenizer(folder, model.config.vocab_size)
    elif known["model"] != model_state(model):
        raise ValueError(f"the model in {folder} is damaged, or not the one of its metrics.json")
    return model


def read_run(folder):
    """What a run's folder holds: `path`, `state` ("finished", "interrupted" or "new"), `settings`,
    `metrics` and `measures`, {} where it has none. Raises ValueError if a file is damaged, or the
    settings of a checkpoint are missing."""
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"no such run: {folder} is not a folder")
    # In this order, lest a run that ends meanwhile look new: its settings.json goes last.
    settings, metrics, measures = (
        read_json(path / f"{name}.json", key) for name, key in
        (("settings", "method"), ("metrics", "settings"), ("measure", "values")))
    state = "finished" if metrics else "interrupted" if settings else "new"
    if state == "new" and (path / "checkpoint.pt").exists():
        raise ValueError(f"{path} lacks its settings.json, without which its checkpoint.pt can't "
                         "go on: put that back, or move the folder away")
    return SimpleNamespace(path=path, state=state, settings=metrics.get("settings", settings),
                           metrics=metrics, measures=measures)


def read_model(folder):
    """`read_run`, of a finished run or a folder with only a model. ValueError if interrupted,
    FileNotFoundError if neither."""
    run = read_run(folder)
    if run.state == "interrupted":
        raise ValueError(f"{folder} is not finished: go on with its command and --resume")
    if run.state == "new" and not (run.path / "config.json").exists():
        raise FileNotFoundError(f"{folder} is neither a run's folder nor a model's: it has no "
                                "metrics.json and no config.json")
    return run


def hashes(about):
    """What tells data from others: each split's hash."""
    return {split: of_split["sha256"] for split, of_split in about.items()}


def check_data(about, known, folder, way_out):
    """ValueError if the data of the run in `folder`, as `known` there, are others than `about`."""
    for split, of in about.items():
        there, here = ((one["source"], one["sha256"][:8]) for one in (known[split], of))
        if known[split]["sha256"] != of["sha256"]:
            told = (f", {here[0]}, has changed since (sha256 {there[1]} there, {here[1]} now)"
                    if there[0] == here[0] else
                    f" is from {there[0]}, sha256 {there[1]}, not from {here[0]}, sha256 {here[1]}")
            raise ValueError(f"{folder} was made with other data: its {split} split{told}: "
                             f"{way_out}")


def find_dense(folders, settings, about=None, started=None):
    """The finished dense run in one of `folders` of the same data, model and seed as `settings`,
    and most alike in all else; or None. `about`: its data, `started`: the `model_state` that it
    has, or started from, if known."""
    def origin(settings):  # the same folder is the same model, however it was written
        return [os.path.realpath(settings.get("model", "")),
                *map(settings.get, ("dataset", "data_config", "seed"))]

    dense = []
    for file in sorted({file for one in folders for file in Path(one).glob("*/metrics.json")}):
        with suppress(ValueError):  # a damaged one is not meant
            run = read_run(file.parent)
            if (run.settings["method"] == "none" and not run.settings["distill"]
                    and origin(run.settings) == origin(settings)
                    and started in (None, run.metrics["started"], run.metrics["model"])
                    and (about is None or hashes(about) == hashes(run.metrics["data"]))):
                dense.append(run)
    return max(dense, default=None, key=lambda run: len(run.settings.items() & settings.items()))


def dense_run(run, folder):
    """The run in `folder`, or if that is None the dense one beside `run`, or None."""
    if folder:
        dense = read_model(folder)
        if dense.settings.get("method", "none") != "none":
            raise ValueError(f"{folder} is no dense model, but pruned: name another with --dense")
        return dense
    if not run.metrics:
        return None
    return find_dense([run.path.parent], run.settings, run.metrics["data"],
                      run.metrics["started"])


def is_temporary(path):
    """Whether `whole` names files so until they are in place."""
    return re.fullmatch(r".+\.\d+\.tmp", path.name) and path.is_file()


def check_settings(run, settings, way_out):
    """ValueError if one of `settings` is another in `run`. Where data are does not matter: they
    have a hash."""
    different = [f"{name} is {run.settings.get(name)} there and {value} here"
                 for name, value in settings.items()
                 if name != "data_path" and run.settings.get(name) != value]
    if different:
        more = f", and {len(different) - 3} more" * (len(different) > 3)
        raise ValueError(f"{run.path} has other settings ({', '.join(different[:3])}{more}): "
                         f"{way_out}")


@contextmanager
def locked(folder, wait):
    """Keep other processes from making the same run; the lock ends with this one. OSError that says
    so where the folder is gone meanwhile."""
    try:
        with FileLock(folder / ".lock", timeout=-1 if wait else 0):
            yield
    except Timeout as error:
        taken = f"another process is at work in {folder}: wait, or name another --out"
        raise ValueError(taken) from error
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(f"{folder} is gone: if it was moved, go on with --out NEW "
                                "--resume, or move it back first") from error

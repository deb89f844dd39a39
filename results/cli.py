"""The command line of train.py, measure.py and the programs in results/: a look at the flags before
torch is imported, which takes seconds; what a flag is; how torch computes; what becomes of
mistakes."""

import argparse
import os
import re
import runpy
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

# What is stood in for, and what is imported anew with the real thing.
LATER = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.parallel", "torch.nn.utils.rnn",
         "torch.utils.checkpoint", "torch.distributed", "safetensors.torch")
OURS = ("data", "measure", "model", "prune", "train", "results", "results.compare",
        "results.export", "results.runs", "results.texts", "results.tokenizer")


def look(file, function):
    """Run the program in `file` with a stand-in for torch up to its `function` that reads the
    flags: no more is needed to find mistakes in them, which end the program, or to show --help.
    Ctrl-C until torch is imported ends it without a traceback. What is printed where a stream is
    closed goes nowhere, and for what it has no characters it gets others. No environment variable
    ends the program later: it is told now, or ignored."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["MPLBACKEND"] = "agg"  # figures are files
    for name in [*os.environ]:  # `data.bar` says how bars look
        if name.startswith("TQDM_") and name != "TQDM_DISABLE":
            del os.environ[name]
    try:
        import huggingface_hub.constants  # noqa: F401, reads numbers
    except ValueError as error:
        mistake(file, error)
    sys.modules |= dict.fromkeys(LATER, MagicMock())
    with suppress(Exception):
        runpy.run_path(file)[function]()
    for name in LATER + OURS:
        sys.modules.pop(name, None)


def mistake(file, message):
    """End the program in `file` for a mistake of its user's."""
    print(f"{Path(file).name}: error: {told(message)}", file=sys.stderr)
    sys.exit(2)


def processes():
    """Which process of train.py this is, and of how many: what torchrun has set, or 0 of 1."""
    rank, size = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    if not ((rank + size).isdecimal() and int(rank) < int(size)
            and (int(size) == 1 or all(map(os.environ.get, names)))):
        mistake("train.py", f"the environment variables {', '.join(names)} do not fit together: "
                "torchrun sets them all; to run without it, unset them")
    return int(rank), int(size)


LACKS = "out of memory|can't allocate memory|ALLOC_FAILED"  # as torch and CUDA's libraries put it
LOST = "connection|socket|peer|timed? ?out|nccl"  # and what they say where another process is gone
ABOVE_0, AT_LEAST_0, SHARE = "above 0, at most 1e12", "from 0 to 1e12", "in (0, 1]"
RANGES = {ABOVE_0: lambda x: 0 < x <= 1e12, AT_LEAST_0: lambda x: 0 <= x <= 1e12,
          SHARE: lambda x: 0 < x <= 1, "in [0, 1)": lambda x: 0 <= x < 1,
          "from 0 to 2^31 - 1": lambda x: 0 <= x < 2**31}


class Flag(NamedTuple):
    kind: object  # its type, its choices, or None: a switch
    about: str
    default: object = None
    tiny: object = None  # the default for the model `tiny`
    within: str = None  # what a number must be


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse(parser, groups, words):
    """The flags in `words`, None where they are not given. A mistake is `parser.error`'s."""
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, about, default, tiny, _) in flags.items():
            usual = [str(default)] * (default is not None) + [f"tiny: {tiny}"] * (tiny is not None)
            about += f" (default: {'; '.join(usual)})" * bool(usual)
            how = dict(type=kind) if callable(kind) else dict(choices=kind)
            if kind is None:
                how = dict(action="store_true", default=None)
            if name in ("run", "runs"):
                number = "+" if name == "runs" else None
                parser.add_argument(name, metavar="RUN", nargs=number, help=about)
            else:
                group.add_argument(flag_of(name), help=about, **how)
    args = parser.parse_args(words)
    for name, flag in (item for flags in groups.values() for item in flags.items()):
        value = getattr(args, name)
        if value == "":
            parser.error(f"{flag_of(name)} is empty")
        try:
            str(value).encode()
        except UnicodeEncodeError:  # the run could not be told in its files
            parser.error(f"{flag_of(name)} {value!r} is no text in UTF-8")
        if flag.within and value is not None and not RANGES[flag.within](value):
            parser.error(f"{flag_of(name)} {value} is out of range: it must be {flag.within}")
    import torch

    device = getattr(args, "device", None) or "cpu"
    allowed = r"cpu|cuda(:\d+)?" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(allowed, device):
        names = "cpu, cuda, cuda:N" if "|" in allowed else "cpu, for there is no CUDA"
        parser.error(f"--device {device}: allowed here is {names}")
    if device[5:] and int(device[5:]) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        parser.error(f"--device {device}: the GPUs here are cuda:0 to cuda:{last}")
    return args


DEVICE = Flag(str, "cuda or cpu (default: cuda if there is one)")


def best_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def join_processes(device):
    """Be one of the processes that torchrun launched, on a GPU of its own, or the CPU; `device` is
    --device or None. ValueError if there are too few GPUs."""
    import torch

    device, gpus = device or best_device(), torch.cuda.device_count()
    if device == "cuda" and int(os.environ["LOCAL_RANK"]) < gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    elif device != "cpu":
        raise ValueError(f"--device {device} with torchrun: it is cpu, or cuda with a GPU for each "
                         f"process, not {gpus} in all")
    torch.distributed.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
                                         timeout=timedelta(hours=1))


def compute_fast(device):
    """Have torch compute as training does, fast and near enough."""
    import torch

    # A pruned neuron's mean gradient fades to numbers so small that they slow a CPU down.
    torch.set_flush_denormal(True)
    # TF32: by far faster.
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")


def command_line(commands, flags, about):
    """Which of `commands` is named, or the first, its flags, and the parser, whose `error` tells a
    mistake in one line."""
    words, commands = sys.argv[1:], {command.__name__: command for command in commands}
    named = bool(words) and words[0] in commands
    name = words.pop(0) if named else next(iter(commands))
    parser = argparse.ArgumentParser(f"{Path(sys.argv[0]).name} {name}", allow_abbrev=False,
                                     description=commands[name].__doc__ if named else about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.print_usage = lambda file: None  # so that a mistake takes one line
    if words and not named and words[0][:1] != "-" and not os.path.exists(words[0]):
        no_run = "no run's folder, and " * ("runs" in flags[name])
        parser.error(f"{words[0]} is {no_run}none of {', '.join(commands)}")
    args = parse(parser, {name: flags[name]}, words)
    for flag, one in flags[name].items():
        if getattr(args, flag) is None:
            usual = best_device() if flag == "device" else one.default
            setattr(args, flag, usual if one.kind else False)
    return commands[name], args, parser


def told(error):
    """What an exception or message says, in one line."""
    if isinstance(error, OSError) and error.filename:  # from the system
        error = f"can't use {error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    number = re.fullmatch(r"(?:invalid literal for int|could not convert string).*: ('.+')", text)
    # argparse tells flags; a library that could not make a number of a text found it elsewhere.
    names = [name for name, value in os.environ.items() if number and repr(value) == number[1]]
    return f"the environment variable {' or '.join(names)}: " * bool(names) + text


# What asks a job to end. Windows lacks the last two.
ENDING = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"


@contextmanager
def handling(handler):
    """While it is open, `handler` gets the signals in ENDING, but for those that are ignored."""
    before = {}
    for name in ENDING:
        one = getattr(signal, name, None)
        if one and signal.getsignal(one) != signal.SIG_IGN:  # as nohup has it
            before[one] = signal.signal(one, handler)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def lacks_memory(error):
    """Whether memory is what an exception tells of. torch has no class for it on a CPU."""
    return isinstance(error, MemoryError) or bool(re.search(LACKS, str(error)))


@contextmanager
def stopping_signals():
    """A list that Ctrl-C, or what asks a job to end, fills while it is open."""
    stop = []
    with handling(lambda *_: stop.append(True)):
        yield stop


def call(command, args, parser):
    """Call it. A user's mistake is one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command(args)
        print(end="", flush=True)
    except BrokenPipeError:  # as after `| head -1`
        os._exit(1)
    except (ValueError, OSError) as error:
        parser.error(told(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not lacks_memory(error):
            raise
        parser.error("out of memory: " + told(error)[:200])

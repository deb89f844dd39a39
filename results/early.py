"""A look at a program's flags before it imports torch, which takes seconds."""

import runpy
import signal
import sys
from contextlib import suppress
from unittest.mock import MagicMock

LATER = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.parallel", "torch.nn.utils.rnn",
         "torch.utils.checkpoint", "torch.distributed", "safetensors.torch")
OURS = ("data", "measure", "model", "prune", "train", "results", "results.compare",
        "results.texts")


def look(file, function):
    """Run the program in `file` with a stand-in for torch up to its `function` that reads the
    flags: no more is needed to find mistakes in them, which end the program, or to show --help.
    Ctrl-C until torch is imported ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.modules |= dict.fromkeys(LATER, MagicMock())
    with suppress(Exception):
        runpy.run_path(file)[function]()
    for name in LATER + OURS:
        sys.modules.pop(name, None)

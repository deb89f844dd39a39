"""The project's files are modules at its top level, wherever pytest is started from."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars among the tests' output

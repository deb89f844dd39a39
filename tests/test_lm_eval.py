"""lm-evaluation-harness on a pruned run, where it is installed (`pip install lm_eval`)."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

import data
from measure import mean_loss
from model import GPT
from results.tokenizer import write_tokenizer
from test_train import save_small

lm_eval = pytest.importorskip("lm_eval")

TASK = """task: here
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1}}
"""


def test_its_perplexity_of_a_ragged_model_is_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_small("run", mlp_widths=(40, 9))
    write_tokenizer(Path("run"), 257, 128)
    model = GPT.from_pretrained("run")
    text = (Path(data.__file__).read_text() * 2)[: 10 * model.config.n_positions]
    assert text.isascii()
    Path("text.jsonl").write_text(json.dumps({"text": text}))
    Path("here.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    found = lm_eval.simple_evaluate(
        "hf", model_args="pretrained=run,trust_remote_code=True,dtype=float32,device=cpu",
        tasks=["here"], task_manager=lm_eval.tasks.TaskManager(
            include_path=str(tmp_path), include_defaults=False))
    # It reads the text in full contexts, as blocks are: each token after those before it in its
    # block and the last one of the block before; the first one after end of text.
    eot = data.tokenizer(257).eot
    tokens = [eot, *data.tokenizer(257).encode(text)]
    blocks = data.Blocks(data.np.array(tokens, data.np.uint16), model.config.n_positions, eot)
    expected = math.exp(mean_loss(model, blocks, nullcontext()))  # a token is a byte
    assert found["results"]["here"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)

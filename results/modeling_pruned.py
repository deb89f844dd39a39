"""GPT-2 and GPT-Neo whose layers have MLPs of different widths, `mlp_widths` in config.json. A copy
lies beside such a model's weights: transformers runs it if given trust_remote_code=True."""

import warnings

from torch import addmm
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.pytorch_utils import Conv1D


class Project(Conv1D):
    """A Conv1D that can read 0 neurons, too."""

    def forward(self, x):
        y = addmm(self.bias, x.flatten(0, -2), self.weight)  # [tokens, m] -> [tokens, d]
        return y.unflatten(0, x.shape[:-1])


class GPT2MLP(modeling_gpt2.GPT2MLP):
    def __init__(self, width, config):
        super().__init__(width, config)
        self.c_proj = Project(config.n_embd, width)


def narrow(model, mlp):
    """Give every layer of a new `model` an MLP of its own width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that 0 neurons need no initialising
        for block, width in zip(model.transformer.h, model.config.mlp_widths):
            block.mlp = mlp(width, model.config)
        model.post_init()


# Their names stay: a pipeline knows by these what can write text.


class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        narrow(self, GPT2MLP)


class GPTNeoForCausalLM(modeling_gpt_neo.GPTNeoForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        narrow(self, modeling_gpt_neo.GPTNeoMLP)

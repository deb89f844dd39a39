"""GPT-2 and GPT-Neo whose layers have MLPs of different widths, `mlp_widths` in config.json. A copy
lies beside such a model's weights: transformers runs it if given trust_remote_code=True."""

import warnings

from torch import addmm
from transformers import GPT2LMHeadModel, GPTNeoForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.pytorch_utils import Conv1D


class Project(Conv1D):
    """A Conv1D that can read 0 neurons, too."""

    def forward(self, x):
        y = addmm(self.bias, x.flatten(0, -2), self.weight)  # [tokens, m] -> [tokens, d]
        return y.unflatten(0, x.shape[:-1])


class PrunedGPT2MLP(GPT2MLP):
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


class PrunedGPT2LMHeadModel(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        narrow(self, PrunedGPT2MLP)


class PrunedGPTNeoForCausalLM(GPTNeoForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        narrow(self, GPTNeoMLP)

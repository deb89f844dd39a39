"""GPT-2 and GPT-Neo in one plain definition, with MLPs that can skip neurons.

Read top to bottom: the configuration, attention, the MLP (the part that gets pruned), the model, then how weights
travel between files in Hugging Face's format and this definition. The MLP knows that some of its neurons may be
skipped; why they are is `prune.py`'s business.

Shapes: B sequences, T tokens each, d = n_embd, m neurons in an MLP of which k are kept, V = vocab_size.
"""

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """What a model looks like. The fields after `n_head` are what differs between GPT-2, GPT-Neo and pruned models."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the longest context, in tokens
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    model_type: str = "gpt2"  # or "gpt_neo": whose names and layout the weights files follow
    attn_scaled: bool = True  # GPT-Neo does not divide its attention logits by sqrt(head size)
    qkv_bias: bool = True  # GPT-Neo's query, key and value have no bias
    windows: tuple = ()  # for each layer: how many tokens back it may look, None = all; () = all, everywhere
    mlp_widths: tuple = ()  # for each layer: neurons in its MLP, 0 upwards; () = 4 * n_embd everywhere
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a whole number from 1 upwards")
        self.windows = tuple(self.windows) or (None,) * self.n_layer
        self.mlp_widths = tuple(self.mlp_widths) or (4 * self.n_embd,) * self.n_layer
        if not len(self.windows) == len(self.mlp_widths) == self.n_layer:
            raise ValueError(f"{self.n_layer} layers want as many windows and MLP widths, not "
                             f"{len(self.windows)} and {len(self.mlp_widths)}")
        if not all(isinstance(width, int) and width >= 0 for width in self.mlp_widths):
            raise ValueError(f"MLPs can't have {self.mlp_widths} neurons: not all are whole numbers from 0 upwards")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


NEO = dict(model_type="gpt_neo", n_positions=2048, attn_scaled=False, qkv_bias=False)
SHAPES = {  # models whose shape is known without asking the Hub
    "tiny": dict(vocab_size=257, n_positions=256, n_embd=128, n_layer=4, n_head=4),  # a byte-level GPT-2
    "gpt2": dict(),
    "EleutherAI/gpt-neo-125m": dict(**NEO, windows=(None, 256) * 6),
    "EleutherAI/gpt-neo-1.3B": dict(**NEO, n_embd=2048, n_layer=24, n_head=16, windows=(None, 256) * 12)}


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one token's work.

    `kv` is [2, n_layer, B, n_head, capacity, d / n_head], keys before values. Its first `length` positions are filled;
    the first `start` [B] of those are the row's left padding.
    """

    def __init__(self, config, start, capacity, dtype):
        shape = (2, config.n_layer, len(start), config.n_head, capacity, config.n_embd // config.n_head)
        self.kv = torch.empty(shape, device=start.device, dtype=dtype)
        self.windows, self.start, self.length = config.windows, start, 0

    def append(self, layer, k, v):
        """Store the new tokens' `k` and `v` [B, n_head, T, d / n_head]; returns all that any of them may look at."""
        window, end = self.windows[layer], self.length + k.size(2)
        first = 0 if window is None else max(0, self.length - window + 1)
        self.kv[0, layer, :, :, self.length : end] = k
        self.kv[1, layer, :, :, self.length : end] = v
        return self.kv[0, layer, :, :, first:end], self.kv[1, layer, :, :, first:end]

    def select(self, rows, shared=0):
        """Let row i be what row `rows[i]` was. The first `shared` positions are the same in both: no need to copy."""
        if shared:
            self.kv[..., shared : self.length, :] = self.kv[:, :, rows, :, shared : self.length]
            return
        self.start = self.start[rows]
        padding = int(self.start.min())  # what is padding in all rows left would only use up the context
        self.kv = self.kv[:, :, rows, :, padding:]
        self.start, self.length = self.start - padding, self.length - padding


def attention_mask(queries, keys, window, start, device):
    """Which of `keys` tokens each of the last `queries` tokens may look at: bool [B or 1, 1, queries, keys - first].

    Query i sees key j if 0 <= i - j < `window` (None = no limit) and j >= `start` [B], the row's left padding. Keys
    before `first`, which no query sees, are left out, as `KVCache.append` does. None: plain causal attention will do.
    """
    window = keys if window is None else window
    if start is None and (queries == 1 or queries == keys <= window):
        return None
    first = max(0, keys - queries - window + 1)
    i = torch.arange(keys - queries, keys, device=device)[:, None]
    j = torch.arange(first, keys, device=device)
    seen = ((j <= i) & (i - j < window))[None]  # [1, queries, keys - first]
    if start is not None:
        # A padding token sees itself, so that no row of the softmax is empty; nobody reads what it computes.
        seen = seen & (j >= start[:, None, None]) | (j == i)  # [B, queries, keys - first]
    return seen[:, None]


class Attention(nn.Module):
    """Causal multi-head self-attention; in GPT-Neo's local layers over a sliding window."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.scale = None if config.attn_scaled else 1.0  # None: torch's default, 1 / sqrt(head size)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None):
        B, T, d = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(d, dim=2))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, n_head, all tokens so far, d / n_head]
        causal = mask is None and T == k.size(2) and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))  # [B, T, d]


class MLP(nn.Module):
    """h = gelu(x W1^T + b1), output h W2^T + b2, over the neurons in `keep` only (section 2 of the paper).

    Neuron j is row j of W1 [m, d], entry j of b1 [m] and column j of W2 [d, m]. A masked neuron has h = gelu(0) = 0 and
    a zero column in W2, so it adds nothing to the output, and every product in its gradient has a zero factor. Leaving
    it out therefore gives the same outputs and gradients as multiplying by a mask, for less work.

    `keep`: indices of the kept neurons [k], None = all.
    `record`: called with the kept neurons' h [B, T, k] at every forward pass, None = nobody.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_widths[layer])
        self.c_proj = nn.Linear(config.mlp_widths[layer], config.n_embd)
        self.keep, self.record = None, None

    def forward(self, x):
        w1, b1, w2 = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight  # [m, d] [m] [d, m]
        if self.keep is not None:
            # w1[keep] would do, but its gradient is sorted into place: several times slower.
            w1, b1 = w1.index_select(0, self.keep), b1.index_select(0, self.keep)  # [k, d] [k]
            w2 = w2.index_select(1, self.keep)  # [d, k]
        h = F.gelu(F.linear(x, w1, b1), approximate="tanh")  # [B, T, d] -> [B, T, k]
        if self.record is not None:
            self.record(h)
        return F.linear(h, w2, self.c_proj.bias)  # [B, T, k] -> [B, T, d]


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, layer)

    def forward(self, x, mask, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 or GPT-Neo language model with its output head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: compute each block's activations again in the backward pass
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, config.n_embd), freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # GPT-2's initialisation: what adds to the residual stream starts smaller. Its 0.02 is for 768 dimensions; with
        # it a narrower model's products would start out too small, and it would take long to find its attention.
        std = 0.02 * (768 / config.n_embd) ** 0.5
        for name, parameter in () if self.wte.weight.is_meta else self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                nn.init.normal_(parameter, std=std / (2 * config.n_layer) ** (0.5 * name.endswith("c_proj.weight")))

    def features(self, idx, cache=None, start=None):
        """The final hidden states [B, T, d] of tokens `idx` [B, T]; `start` [B] counts each row's left padding."""
        T, past = idx.size(1), cache.length if cache else 0
        if past + T > self.config.n_positions:
            raise ValueError(f"{past + T} tokens are more than the model's context of {self.config.n_positions}")
        positions = torch.arange(past, past + T, device=idx.device)[None]  # [1, T]
        if start is not None:
            positions = (positions - start[:, None]).clamp(min=0)  # [B, T]
        x = self.wte(idx) + self.wpe(positions)  # [B, T, d]
        masks = {window: attention_mask(T, past + T, window, start, idx.device) for window in set(self.config.windows)}
        for block, window in zip(self.h, self.config.windows):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, masks[window], use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, masks[window], cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, head=True):
        """Next-token logits [B, T, V] of tokens `idx` [B, T], and the mean loss in nats per token.

        `targets` [B, T] holds the token that should follow each one, -100 where none counts; without
        them the loss is None. With `head=False`, the final hidden states [B, T, d] alone, for a loss
        that takes the output head itself. Raises ValueError if the sequence exceeds the context.
        """
        x = self.features(idx)  # [B, T, d]
        if not head:
            return x
        logits = F.linear(x, self.wte.weight)  # [B, T, V]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_blocks(self):
        """Have torch.compile make kernels for the blocks, for any number of neurons; their names stay the same."""
        # The blocks share their code, in many forms: with and without pruning, windows, gradients, observers.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False  # a block is a graph of its own already, small enough to send at once
        for block in self.h:
            block.compile(dynamic=True)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1, length_penalty=1.0,
                 no_repeat_ngram=0, eot=None, generator=None):
        """Continue `prompts`, lists of token ids of any lengths, by up to `max_new_tokens` each; returns the new ones.

        Tokens are drawn from softmax(logits / temperature), among the `top_k` likeliest, and of those the fewest whose
        probabilities reach `top_p` together; temperature 0 takes the likeliest. With `beams` > 1, beam search looks for
        the highest log-probability / tokens^length_penalty instead. No `no_repeat_ngram` tokens in a row (0: no limit)
        come twice in a prompt with its continuation, which ends before the token `eot` (None: never) and where the
        context is full. Prompts share only the random numbers. Raises ValueError for an empty or too long prompt.
        """
        n_positions = self.config.n_positions
        for prompt in prompts:
            if not 0 < len(prompt) <= n_positions:
                raise ValueError(f"a prompt has {len(prompt)} tokens; this model continues 1 to {n_positions}")
        if beams < 1 or temperature < 0 or not (top_k is None or top_k >= 1) or not (top_p is None or 0 < top_p <= 1):
            raise ValueError("generation wants beams >= 1, temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
        room = [min(max_new_tokens, n_positions - len(prompt)) for prompt in prompts]
        live = [i for i in range(len(prompts)) if room[i] > 0]  # row r of the batch is prompt live[r]
        if not live:
            return [[] for _ in prompts]
        idx = nn.utils.rnn.pad_sequence([torch.tensor(prompts[i]) for i in live], batch_first=True, padding_side="left",
                                        padding_value=-1).to(self.wte.weight.device)  # [B, T]; no token is -1
        cache = KVCache(self.config, (idx < 0).sum(1), idx.size(1) + max(room), self.wte.weight.dtype)
        if beams > 1:
            return self.beam_search(idx, cache, live, room, beams, length_penalty, no_repeat_ngram, eot)
        return self.sample(idx, cache, live, room, (temperature, top_k, top_p, generator), no_repeat_ngram, eot)

    def next_logits(self, idx, cache):
        """Logits [B, V] of the token after `idx` [B, T], which continues what `cache` holds (-1 = left padding)."""
        start = cache.start if cache.start.any() else None
        x = self.features(idx.clamp(min=0), cache, start)[:, -1]  # [B, T] -> [B, d]: only the last token is continued
        return F.linear(x, self.wte.weight).float()  # [B, V]

    def sample(self, idx, cache, live, room, how, no_repeat_ngram, eot):
        """Continue prompts i in `live`, rows of `idx` [B, T], by up to `room[i]` tokens from `pick(logits, *how)`."""
        outputs, new = [[] for _ in room], idx
        while live:
            logits = ban_repeats(self.next_logits(new, cache), idx, no_repeat_ngram)  # [B, V]
            new = pick(logits, *how)[:, None]  # [B, 1]
            idx = torch.cat([idx, new], dim=1)
            going = []
            for row, (i, token) in enumerate(zip(live, new[:, 0].tolist())):
                if token != eot:
                    outputs[i].append(token)
                    if len(outputs[i]) < room[i]:
                        going.append(row)
            if 0 < len(going) < len(live):  # finished rows leave: they cost time, and the longest, the context
                idx, new = idx[going], new[going]
                cache.select(going)
            live = [live[row] for row in going]
        return outputs

    def beam_search(self, idx, cache, live, room, beams, length_penalty, no_repeat_ngram, eot):
        """The best continuations found of prompts i in `live`, rows of `idx` [B, T], by up to `room[i]` tokens each.

        Keeps the `beams` likeliest unfinished continuations of each prompt and the `beams` best finished ones, and
        stops when the likeliest of the former, were it to end now, would not be among the latter.
        """
        finished = [[(-torch.inf, [])] * beams for _ in room]  # (score, tokens), best first
        logits = self.next_logits(idx, cache)
        copies = torch.arange(len(live), device=idx.device).repeat_interleave(beams)
        idx, logits = idx[copies], logits[copies]  # from here on, B = prompts * beams: a prompt's beams are neighbours
        cache.select(copies)
        # A prompt's beams start out the same: only the first may be continued, or all would stay the same.
        scores = torch.tensor([0.0] + [-torch.inf] * (beams - 1), device=idx.device).repeat(len(live))  # [B]
        for n in range(1, max(room) + 1):  # the n-th new token
            log_probs = ban_repeats(logits.log_softmax(-1), idx, no_repeat_ngram)  # [B, V]
            totals = (scores[:, None] + log_probs).view(len(live), -1)  # [B, V] -> [prompts, beams * V]
            # Each beam has one way to end, so 2 * beams candidates hold enough that go on.
            best, at = (x.tolist() for x in totals.topk(2 * beams))  # [prompts, 2 * beams], best first
            going, chosen = [], []
            for p, i in enumerate(live):
                running = []
                for rank, (score, where) in enumerate(zip(best[p], at[p])):
                    row, token = p * beams + where // log_probs.size(1), where % log_probs.size(1)
                    if token != eot and n < room[i]:
                        running.append((score, row, token))
                    elif rank < beams:
                        tokens = idx[row, idx.size(1) - n + 1 :].tolist() + [token] * (token != eot)
                        finished[i].append((score / n**length_penalty, tokens))
                finished[i] = sorted(finished[i], key=lambda pair: -pair[0])[:beams]
                if running and running[0][0] / n**length_penalty > finished[i][-1][0]:
                    going.append(i)
                    chosen += running[:beams]
            if not going:
                break
            scores, order, new = (torch.tensor(x, device=idx.device) for x in zip(*chosen))  # [B] each
            idx = torch.cat([idx[order], new[:, None]], dim=1)
            # The beams of a prompt have read the same prompt. Once one prompt is done, its rows leave: all is copied.
            cache.select(order, shared=cache.length - n + 1 if len(going) == len(live) else 0)
            live = going
            logits = self.next_logits(new[:, None], cache)
        return [of_prompt[0][1] for of_prompt in finished]

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """Load a model in Hugging Face's format from a local folder or by its name on the Hub (float32, on the CPU).

        Memory peaks at the model plus its largest tensor. Raises FileNotFoundError where there is no model,
        ConnectionError if the Hub cannot be reached, and ValueError for what is not exactly a GPT-2 or GPT-Neo that
        this file defines, naming the tensors that are missing or left over.
        """
        folder = Path(name_or_dir) if os.path.isdir(name_or_dir) else download(str(name_or_dir))
        config = read_config(folder)
        with torch.device("meta"), warnings.catch_warnings():  # shapes alone: no time to initialise, no random numbers
            warnings.simplefilter("ignore")  # torch remarks that a layer without neurons has nothing to initialise
            model = cls(config)
        wanted = hf_views(model.to_empty(device="cpu").state_dict(), config)
        left = {}  # read, but not wanted
        for name, tensor in read_tensors(folder):
            view = wanted.pop(name, None)
            if view is None:
                left[name] = tensor
            elif tensor.shape == view.shape:
                view.copy_(tensor)
            else:
                raise ValueError(f"{folder}: {name} has shape {list(tensor.shape)}, config.json has {list(view.shape)}")
        if wanted:
            raise ValueError(f"{folder}: its weights lack {', '.join(wanted)}")
        if not left.pop("lm_head.weight", model.wte.weight).float().equal(model.wte.weight):
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight; only tied output heads are known here")
        masks = re.compile(r"h\.\d+\.attn\.(attention\.)?(masked_)?bias")  # older releases wrote them as well
        unknown = [name for name in left if not masks.fullmatch(name)]
        if unknown:
            raise ValueError(f"{folder}: its weights hold {', '.join(sorted(unknown))}, which nothing here reads")
        return model

    def save_pretrained(self, folder, pad=False):
        """Write `config.json` and `model.safetensors` into `folder`, in Hugging Face's layout and names.

        Layers keep their own widths, as `mlp_widths` in the configuration. `pad=True` fills every layer with zero
        neurons to the widest one's width: the same function, larger, which any Hugging Face loader reads. Both files
        are written beside and then moved into place, so neither is ever torn.
        """
        config, state = self.config, self.state_dict()
        if pad:
            width = max(1, *config.mlp_widths)  # other loaders expect at least one neuron
            config = replace(config, mlp_widths=(width,) * config.n_layer)
            for name, tensor in state.items():
                if ".mlp.c_fc." in name:
                    state[name] = F.pad(tensor.t(), (0, width - len(tensor))).t()  # [m, d] or [m]
                elif name.endswith(".mlp.c_proj.weight"):
                    state[name] = F.pad(tensor, (0, width - tensor.size(1)))  # [d, m]
        tensors = {"transformer." + name: view.contiguous() for name, view in hf_views(state, config).items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        (folder / "config.json.tmp").write_text(json.dumps(config_to_hf(config), indent=2) + "\n")
        shutil.copymode(folder / "config.json.tmp", folder / "model.safetensors.tmp")  # safetensors' own is private
        for file in ("model.safetensors", "config.json"):
            os.replace(folder / (file + ".tmp"), folder / file)


def pick(logits, temperature, top_k, top_p, generator):
    """The next token of each row [B], drawn from `logits` [B, V] as `GPT.generate` says."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)  # [B, V]
    if top_p is None:
        return probs.multinomial(1, generator=generator)[:, 0]
    probs, order = probs.sort(descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the likelier ones are enough already (never true of the first)
    return order.gather(1, probs.multinomial(1, generator=generator))[:, 0]


def ban_repeats(scores, idx, n):
    """`scores` [B, V], but -inf for tokens that would complete an n-gram which `idx` [B, T] has (-1 = padding)."""
    if n == 0 or idx.size(1) < n:
        return scores
    ngrams = idx.unfold(1, n, 1)  # [B, T - n + 1, n]
    begun = (ngrams[:, :, :-1] == idx[:, None, idx.size(1) - n + 1 :]).all(-1) & (ngrams[:, :, -1] >= 0)
    row, position = begun.nonzero(as_tuple=True)
    banned = torch.zeros_like(scores, dtype=torch.bool)
    banned[row, ngrams[row, position, -1]] = True
    return scores.masked_fill(banned & ~banned.all(-1, keepdim=True), -torch.inf)  # something has to come


# From here on: Hugging Face's file format.

# What config.json calls these fields of ours, and after them the width of all MLPs.
FIELDS = ("n_positions", "n_embd", "n_layer", "n_head")
KEYS = {"gpt2": (*FIELDS, "n_inner"),
        "gpt_neo": ("max_position_embeddings", "hidden_size", "num_layers", "num_heads", "intermediate_size")}


def read_config(folder):
    """The GPTConfig that `folder`/config.json describes; raises FileNotFoundError or ValueError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    try:
        hf = json.loads(path.read_text())
        kind = hf.get("model_type")
        if kind not in KEYS:
            raise ValueError(f"model_type is {kind!r}; gpt2 and gpt_neo are known")
        activation = hf.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"activation_function is {activation!r}; gelu_new is known")
        if hf.get("tie_word_embeddings") is False or hf.get("scale_attn_by_inverse_layer_idx"):
            raise ValueError("untied output heads and scale_attn_by_inverse_layer_idx are not known")
        fields = {field: hf[key] for field, key in zip(FIELDS, KEYS[kind])}
        width = hf.get(KEYS[kind][-1])
        widths = hf.get("mlp_widths") or (() if width is None else (width,) * fields["n_layer"])
        layers = [] if kind == "gpt2" else [name for names, n in hf["attention_types"] for name in names * n]
        windows = [hf.get("window_size", 256) if name == "local" else None for name in layers]
        return GPTConfig(vocab_size=hf["vocab_size"], **fields, model_type=kind, windows=windows, mlp_widths=widths,
                         attn_scaled=kind == "gpt2" and hf.get("scale_attn_weights", True), qkv_bias=kind == "gpt2",
                         layer_norm_epsilon=float(hf.get("layer_norm_epsilon", 1e-5)))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {reason}") from error


def config_to_hf(config):
    """`config` as the dict that goes into config.json, with `mlp_widths` only where they differ."""
    kind, widths, end = config.model_type, config.mlp_widths, config.vocab_size - 1
    hf = {"architectures": ["GPT2LMHeadModel" if kind == "gpt2" else "GPTNeoForCausalLM"], "model_type": kind,
          "vocab_size": config.vocab_size, "bos_token_id": end, "eos_token_id": end, "torch_dtype": "float32",
          "activation_function": "gelu_new", "layer_norm_epsilon": config.layer_norm_epsilon,
          "tie_word_embeddings": True, KEYS[kind][-1]: max(widths)}
    hf |= {key: getattr(config, field) for field, key in zip(FIELDS, KEYS[kind])}
    if len(set(widths)) > 1:
        hf["mlp_widths"] = list(widths)
    if kind == "gpt2":
        return hf | {"scale_attn_weights": config.attn_scaled}
    layers = ["global" if window is None else "local" for window in config.windows]
    return hf | {"attention_types": [[[layer], 1] for layer in layers], "attention_layers": layers,
                 "window_size": next(filter(None, config.windows), 256)}


def hf_views(tensors, config):
    """Views of our parameters, `tensors` by name, with the names and the layout that they have in Hugging Face's files.

    GPT-2's hold the weights of its linear layers as [in, out] (`Conv1D`); GPT-Neo's keep query, key and value apart.
    """
    views = {}
    for name, tensor in tensors.items():
        if config.model_type == "gpt2":
            views[name] = tensor.t() if ".c_" in name else tensor  # (a bias is its own transpose)
        elif ".attn.c_attn." in name:
            for part, view in zip("qkv", tensor.chunk(3)):
                views[name.replace("attn.c_attn", f"attn.attention.{part}_proj")] = view
        else:
            views[name.replace("attn.c_proj", "attn.attention.out_proj")] = tensor
    return views


def read_tensors(folder):
    """Yields the name (without `transformer.`) and value of each tensor in the weights files of `folder`.

    No pickled code is run. Raises FileNotFoundError or ValueError.
    """
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / file for file in files if (folder / file).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no model: there is none of {', '.join(files)} in it")
    names_in = {path: None}  # what to read from each file, None = all
    if path.suffix == ".json":
        try:
            names_in = {}
            for name, file in json.loads(path.read_text())["weight_map"].items():
                names_in.setdefault(folder / file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} can't be read as an index of weights: {error}") from error
    for file, names in names_in.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which holds part of the model's weights")
        try:
            if file.suffix == ".safetensors":
                for name in names or safe_open(file, framework="pt").keys():
                    # Opened anew for each tensor: what was read of an open file is in our memory until it is closed.
                    yield name.removeprefix("transformer."), safe_open(file, framework="pt").get_tensor(name)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
                if not all(isinstance(name, str) and torch.is_tensor(tensors[name]) for name in tensors):
                    raise TypeError("it does not hold tensors by name")
                for name in names or list(tensors):
                    yield name.removeprefix("transformer."), tensors.pop(name)  # no longer in memory once it is copied
        except Exception as error:  # each format has its own exceptions for a file that is cut off or damaged
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} is damaged, cut off or no weights file: {reason}") from error


def download(name):
    """The folder in Hugging Face's local cache with the model `name` of the Hub, fetched unless it is there."""
    known = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
    local = os.path.isdir(os.path.dirname(name))  # "out/mistyped" is a folder that is not there, no name on the Hub
    if name not in known and (local or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)):
        raise FileNotFoundError(f"no model {name!r}: there is no such folder, and a name on the Hub is owner/name "
                                f"(say EleutherAI/gpt-neo-125m) or one of {', '.join(known)}")
    import huggingface_hub  # comes with `datasets`

    try:
        for weights in ("model*.safetensors*", "pytorch_model*"):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json", weights]))
            if any(folder.glob(weights)):
                break
        return folder
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"no model {name!r} on the Hub, or it is private") from error
    except Exception as error:  # whatever stands between us and the Hub, the way out is the same
        raise ConnectionError(f"can't get {name!r} from the Hub ({type(error).__name__}); give a folder "
                              f"with it in Hugging Face's format, --model DIR, or use --model tiny") from error

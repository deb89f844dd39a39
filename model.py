"""GPT-2 and GPT-Neo in one plain definition: the model, whose MLPs can skip neurons (`prune.py`
says which and why), its files in Hugging Face's format, and how it writes text.

Shapes: B sequences of T tokens, d = n_embd, k of an MLP's m neurons are kept, V = vocab_size.
"""

import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """What a model looks like; from `model_type` on, what tells GPT-2, GPT-Neo and pruned apart."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the longest context, in tokens
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    model_type: str = "gpt2"  # or "gpt_neo": whose names and layout the weights files follow
    attn_scaled: bool = True  # GPT-Neo does not divide its attention logits by sqrt(head size)
    qkv_bias: bool = True  # GPT-Neo's query, key and value have no bias
    windows: tuple = ()  # for each layer, how many tokens it sees, None = all; () = all, everywhere
    mlp_widths: tuple = ()  # for each layer or all, the neurons of its MLP; () = 4 * n_embd
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or not 0 < value < 2**20:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 upwards")
        self.windows = tuple(self.windows) or (None,) * self.n_layer
        self.mlp_widths = tuple(self.mlp_widths) or (4 * self.n_embd,)
        self.mlp_widths *= self.n_layer if len(self.mlp_widths) == 1 else 1
        windows, widths = len(self.windows), len(self.mlp_widths)
        if not windows == widths == self.n_layer:
            raise ValueError(f"{self.n_layer} layers, {windows} windows, {widths} MLP widths")
        sizes = *self.mlp_widths, *(w or -1 for w in self.windows if w is not None)
        if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
            raise ValueError(f"layers can't have {self.mlp_widths} neurons, {self.windows} windows")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


TINY = dict(vocab_size=257, n_positions=256, n_embd=128, n_layer=4, n_head=4)  # reads bytes
ALIGNED = dict(cuda=64)  # a GPU is far faster with matrices whose sides are multiples of it


def attention_mask(queries, keys, window, start, device):
    """Which of `keys` tokens the last `queries` of them see, bool [B or 1, 1, queries, columns].

    Token i sees j if 0 <= i - j < `window` (None = no limit) and j >= `start` [B], its row's left
    padding. The columns are the last keys: one query sees `window`, each further one makes it one
    more. None: plain causal attention will do.
    """
    window = keys if window is None else window
    if start is None and keys <= window and queries in (1, keys):
        return None
    i = torch.arange(keys - queries, keys, device=device)[:, None]  # [queries, 1]
    j = torch.arange(keys, device=device)[-(queries + window - 1) :]  # [columns]
    seen = ((j <= i) & (i - j < window))[None]  # [1, queries, columns]
    if start is not None:  # padding sees itself: a softmax over nothing would give NaN
        seen = seen & (j >= start[:, None, None]) | (i == j)  # [B, queries, columns]
    return seen[:, None]


class Attention(nn.Module):
    """Causal multi-head self-attention; in GPT-Neo's local layers over a sliding window."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.scale = None if config.attn_scaled else 1.0  # None: 1 / sqrt(head size)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache=None):
        B, T, d = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2)
                   for y in self.c_attn(x).split(d, dim=2))  # [B, n_head, T, d / n_head] each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, n_head, all tokens so far, d / n_head]
            if mask is not None:
                k, v = k[:, :, -mask.size(-1) :], v[:, :, -mask.size(-1) :]  # its columns
        causal = True if mask is None and T > 1 else False  # a bool, if compiled, too
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, d))  # [B, T, d]


class MLP(nn.Module):
    """h = gelu(x W1^T + b1), output h W2^T + b2, over the neurons in `keep` only (section 2).

    A masked neuron has h = gelu(0) = 0 and a zero column in W2: it adds nothing to the output, and
    every product in its gradient has a zero factor. Skipping it gives the same, for less work.

    `keep`: indices of the kept neurons [k], None = all.
    `record`: called with their h [B, T, k] at every forward pass, None = nobody. On a GPU, while
    neurons are skipped, h is filled up with zero neurons to k', a multiple of 64.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_widths[layer])
        self.c_proj = nn.Linear(config.mlp_widths[layer], config.n_embd)
        self.keep, self.record = None, None

    def kept_weights(self, multiple_of=1):
        """W1 [k', d], b1 [k'], W2 [d, k'] of the kept neurons, and zeros up to a multiple."""
        w1, b1, w2 = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight  # [m, d] [m] [d, m]
        if self.keep is not None:
            # w1[keep] would do, but its gradient is sorted into place: several times slower.
            w1, b1 = w1.index_select(0, self.keep), b1.index_select(0, self.keep)  # [k, d] [k]
            w2 = w2.index_select(1, self.keep)  # [d, k]
        extra = -len(b1) % multiple_of
        if extra:
            w1, b1 = F.pad(w1, (0, 0, 0, extra)), F.pad(b1, (0, extra))  # [k', d] [k']
            w2 = F.pad(w2, (0, extra))  # [d, k']
        return w1, b1, w2

    def forward(self, x):
        multiple_of = 1 if self.keep is None else ALIGNED.get(x.device.type, 1)
        w1, b1, w2 = self.kept_weights(multiple_of)
        h = F.gelu(F.linear(x, w1, b1), approximate="tanh")  # [B, T, d] -> [B, T, k']
        if self.record is not None:
            self.tell(h)
        return F.linear(h, w2, self.c_proj.bias)  # [B, T, k'] -> [B, T, d]

    @torch.compiler.disable  # or every layer is compiled by itself
    def tell(self, h):
        self.record(h)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        d, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(d, eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(d, eps)
        self.mlp = MLP(config, layer)

    def forward(self, x, mask, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 or GPT-Neo language model with its output head tied to the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config, d = config, config.n_embd
        self.gradient_checkpointing = False  # True: compute blocks twice, keep less in memory
        # nn.Embedding(V, d) would initialise them as well; they are large.
        wte, wpe = torch.empty(config.vocab_size, d), torch.empty(config.n_positions, d)
        self.wte = nn.Embedding.from_pretrained(wte, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(d, config.layer_norm_epsilon)
        # GPT-2's 0.02 is for d = 768; a narrower model's products would start too small.
        std = 0.02 * (768 / d) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):  # two in a layer add to the residual stream
                nn.init.normal_(parameter, std=std / (2 * config.n_layer) ** 0.5)
            elif "ln_" not in name:
                nn.init.normal_(parameter, std=std)

    def features(self, idx, cache=None, start=None):
        """The final hidden states [B, T, d] of tokens `idx` [B, T], which follow those in `cache`;
        `start` [B] counts each row's left padding."""
        T, past, windows = idx.size(1), cache.length if cache else 0, self.config.windows
        most = self.config.n_positions
        if start is None and past + T > most:  # `prepare` has seen to padded rows
            raise ValueError(f"{past + T} tokens are more than the model's context of {most}")
        positions = torch.arange(past, past + T, device=idx.device)  # [T]
        if start is not None:
            positions = (positions - start[:, None]).clamp(min=0)  # [B, T]
        x = self.wte(idx) + self.wpe(positions)  # [B, T, d]
        masks = {w: attention_mask(T, past + T, w, start, idx.device) for w in set(windows)}
        for block, window in zip(self.h, windows):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, masks[window], use_reentrant=False)
            else:
                x = block(x, masks[window], cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx, targets=None, head=True):
        """Next-token logits [B, T, V] of tokens `idx` [B, T], and the mean loss in nats per token.

        `targets` [B, T] holds the token that should follow each one, -100 where none counts;
        without them the loss is None. With `head=False`, the final hidden states [B, T, d] alone,
        for a loss that has the head in it. Raises ValueError beyond the context.
        """
        x = self.features(idx)  # [B, T, d]
        if not head:
            return x
        logits = F.linear(x, self.wte.weight)  # [B, T, V]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_blocks(self):
        """Have torch.compile make kernels for the blocks, for any number of neurons."""
        # Kernels with and without windows, pruning, gradients:
        torch._dynamo.config.cache_size_limit = 64
        torch._dynamo.config.optimize_ddp = False  # cuts up graphs; a block is small enough
        for block in self.h:
            block.compile(dynamic=True)

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """Load a model in Hugging Face's format, from a folder or by its name on the Hub (float32,
        on the CPU). Memory peaks at the model plus its largest tensor.

        Raises FileNotFoundError where there is no model, ConnectionError if the Hub can't be
        reached, ValueError for what is not exactly a GPT-2 or GPT-Neo as defined here.
        """
        folder = Path(name_or_dir) if os.path.isdir(name_or_dir) else download(str(name_or_dir))
        config = read_config(folder)
        with torch.device("meta"), warnings.catch_warnings():  # meta: nothing is initialised
            warnings.simplefilter("ignore")  # torch remarks that 0 neurons need no initialising
            try:
                model = cls(config).to_empty(device="cpu")
            except RuntimeError as error:
                raise ValueError(f"{folder}: the model does not fit into memory") from error
        wanted, left = hf_views(model.state_dict(), config), {}  # left: read, but not wanted
        for name, tensor in read_tensors(folder):
            name = str(name).removeprefix("transformer.")
            view = wanted.pop(name, None)
            if view is None:
                left[name] = tensor
            elif tensor.shape != view.shape or tensor.is_sparse:
                raise ValueError(f"{folder}: {name} is {[*tensor.shape]}, not {[*view.shape]}"
                                 + ", or sparse" * tensor.is_sparse)
            else:
                view.copy_(tensor)
                if not view.sum().isfinite():  # without a tensor of its size
                    raise ValueError(f"{folder}: {name} holds numbers that are not finite")
        if wanted:
            raise ValueError(f"{folder}: its weights lack {', '.join(wanted)}")
        if not left.pop("lm_head.weight", model.wte.weight).float().equal(model.wte.weight):
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight: not a tied head")
        masks = r"h\.\d+\.attn\.(attention\.)?(masked_)?bias"  # older releases wrote them as well
        left = sorted(name for name in left if not re.fullmatch(masks, name))
        if left:
            raise ValueError(f"{folder}: its weights hold {', '.join(left)}, unknown here")
        return model

    def save_pretrained(self, folder, pad=False):
        """Write `config.json`, `generation_config.json` and `model.safetensors` into `folder`, in
        Hugging Face's format, and where widths differ the code by which transformers loads it.

        `pad=True` fills every layer with zero neurons to the widest one's width: the same function,
        larger, which any Hugging Face loader reads.
        """
        config, state = self.config, self.state_dict()
        if pad:
            width = max(1, *config.mlp_widths)  # other loaders expect at least one neuron
            config = replace(config, mlp_widths=(width,) * config.n_layer)
            for name, tensor in state.items():
                if ".mlp.c_fc." in name:  # [m, d] or [m]
                    state[name] = F.pad(tensor.t(), (0, width - len(tensor))).t()
                elif ".mlp.c_proj.weight" in name:  # [d, m]
                    state[name] = F.pad(tensor, (0, width - tensor.size(1)))
        views = hf_views(state, config)
        tensors = {f"transformer.{name}": view.contiguous() for name, view in views.items()}
        folder, hf = Path(folder), config_to_hf(config)
        folder.mkdir(parents=True, exist_ok=True)
        if "auto_map" in hf:
            with whole(folder / "modeling_pruned.py") as code:
                shutil.copyfile(Path(__file__).parent / "results/modeling_pruned.py", code)
        with whole(folder / "generation_config.json") as ids:
            ids.write_text(json.dumps({f"{name}_token_id": hf["eos_token_id"]
                                       for name in ("bos", "eos", "pad")}))
        with whole(folder / "config.json") as settings:
            settings.write_text(json.dumps(hf, indent=2) + "\n")
            with whole(folder / WEIGHTS[0]) as weights:
                safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
                shutil.copymode(settings, weights)  # safetensors' own is private

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, eot=None,
                 generator=None):
        """Continue `prompts`, lists of token ids, by up to `max_new_tokens` each; returns the new.

        Tokens are drawn from softmax(logits / temperature), among the `top_k` likeliest;
        temperature 0 takes the likeliest. A continuation ends before the token `eot` and where the
        context is full. Prompts share only the random numbers. Raises ValueError if one is empty or
        too long, or logits are no numbers.
        """
        if temperature < 0 or top_k is not None and top_k < 1:
            raise ValueError("allowed are temperature >= 0 and top_k >= 1")
        room, live, idx, cache = prepare(self, prompts, max_new_tokens)
        written = [[] for _ in prompts]
        while live:
            logits = self.next_logits(idx, cache)  # [B, V]
            if temperature == 0:
                idx = logits.argmax(-1, keepdim=True)  # [B, 1]
            else:
                probs, tokens = (logits / temperature).softmax(-1).sort(descending=True)  # [B, V]
                if not probs.isfinite().all():
                    raise ValueError("can't draw: logits are no numbers")
                if top_k is not None:
                    probs[:, top_k:] = 0
                idx = tokens.gather(1, probs.multinomial(1, generator=generator))  # [B, 1]
            going = []  # rows with more to come
            for row, (i, token) in enumerate(zip(live, idx[:, 0].tolist())):
                if token != eot:
                    written[i].append(token)
                    if len(written[i]) < room[i]:
                        going.append(row)
            if len(going) < len(live):
                idx, live = idx[going], [live[row] for row in going]
                cache.select(going)
        return written

    def next_logits(self, idx, cache=None):
        """Logits [B, V] of the token after `idx` [B, T] (-1 = left padding), new to `cache`."""
        x = self.features(idx.clamp(min=0), cache, cache and cache.start)[:, -1]  # [B, T] -> [B, d]
        return F.linear(x, self.wte.weight).float()  # [B, V]


# Hugging Face's file format.


@contextmanager
def whole(path):
    """The name to write under what is to be at `path`, whole or not at all. Raises OSError, and
    leaves nothing, where there is no room."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write it, too
    try:
        yield beside
        os.replace(beside, path)
    except Exception as error:  # torch's own, too
        if isinstance(error, OSError) and error.__cause__:  # told already
            raise
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(reason, "strerror", None) or reason
        raise OSError(f"can't write {path}: {reason}") from error
    finally:
        beside.unlink(missing_ok=True)


# What config.json calls these fields of ours, and after them the width of all MLPs.
FIELDS = ("n_positions", "n_embd", "n_layer", "n_head")
KEYS = {"gpt2": (*FIELDS, "n_inner"),
        "gpt_neo": ("max_position_embeddings", "hidden_size", "num_layers", "num_heads",
                    "intermediate_size")}
KNOWN = dict(model_type=tuple(KEYS), activation_function=("gelu_new", "gelu_pytorch_tanh"),
             tie_word_embeddings=(True,), scale_attn_by_inverse_layer_idx=(False,))


def read_config(folder):
    """The GPTConfig that `folder`/config.json describes; raises FileNotFoundError or ValueError."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no model: there is no config.json in it")
    try:
        hf = json.loads(path.read_text())
        if not isinstance(hf, dict):
            raise ValueError("it is no JSON object")
        for key, known in KNOWN.items():
            if hf.get(key, known[0]) not in known:
                raise ValueError(f"{key} is {hf[key]!r}; known: {', '.join(map(str, known))}")
        kind, gpt2 = hf["model_type"], hf["model_type"] == "gpt2"
        fields = {ours: hf[key] for ours, key in zip(FIELDS, KEYS[kind])}
        width = hf.get(KEYS[kind][-1])
        widths = hf.get("mlp_widths") or (() if width is None else (width,))
        layers = [] if gpt2 else [name for names, n in hf["attention_types"] for name in names * n]
        windows = [hf.get("window_size", 256) if name == "local" else None for name in layers]
        return GPTConfig(hf["vocab_size"], **fields, model_type=kind, qkv_bias=gpt2,
                         attn_scaled=gpt2 and hf.get("scale_attn_weights", True),
                         windows=windows, mlp_widths=widths,
                         layer_norm_epsilon=float(hf.get("layer_norm_epsilon", 1e-5)))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no GPT's config.json: {reason}") from error


def config_to_hf(config):
    """`config` as the dict that goes into config.json; `mlp_widths` and `auto_map`, the code that
    reads them, only if they need that."""
    kind, widths, end = config.model_type, config.mlp_widths, config.vocab_size - 1
    hf = dict(architectures=["GPT2LMHeadModel" if kind == "gpt2" else "GPTNeoForCausalLM"],
              model_type=kind, vocab_size=config.vocab_size, bos_token_id=end, eos_token_id=end,
              torch_dtype="float32", activation_function="gelu_new", tie_word_embeddings=True,
              layer_norm_epsilon=config.layer_norm_epsilon)
    hf |= zip(KEYS[kind], [*(getattr(config, field) for field in FIELDS), max(widths)])
    if len(set(widths)) > 1 or not widths[0]:  # their own can't do with 0 neurons
        code = f"modeling_pruned.{hf['architectures'][0]}"
        hf |= dict(mlp_widths=list(widths), auto_map=dict(AutoModelForCausalLM=code))
    if kind == "gpt2":
        return hf | dict(scale_attn_weights=config.attn_scaled)
    layers = ["global" if window is None else "local" for window in config.windows]
    return hf | dict(attention_types=[[layers, 1]], attention_layers=layers,
                     window_size=next(filter(None, config.windows), 256))


def hf_views(tensors, config):
    """Views of our parameters, `tensors` by name, as Hugging Face's files name and lay them out:
    GPT-2's with linear weights as [in, out] (`Conv1D`), GPT-Neo's with query, key, value apart."""
    views = {}
    for name, tensor in tensors.items():
        if config.model_type == "gpt2":
            views[name] = tensor.t() if ".c_" in name else tensor  # a bias is its own transpose
        elif ".attn.c_attn." in name:
            for part, view in zip("qkv", tensor.chunk(3)):
                views[name.replace("attn.c_attn", f"attn.attention.{part}_proj")] = view
        else:
            views[name.replace("attn.c_proj", "attn.attention.out_proj")] = tensor
    return views


WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_tensors(folder):
    """Yields name and value of each tensor in the weights files of `folder`. Runs no pickled code.
    Raises FileNotFoundError or ValueError."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{folder} holds no model: there is none of {', '.join(WEIGHTS)}")
    try:
        files = [file]
        if file.suffix == ".json":  # an index: which file holds each tensor
            names = set(json.loads(file.read_text())["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        for file in files:
            if file.suffix == ".safetensors":
                for name in safetensors.safe_open(file, "pt").keys():
                    # Opened anew: until it is closed, a file keeps what was read of it.
                    yield name, safetensors.safe_open(file, "pt").get_tensor(name)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
                for name in list(tensors):
                    yield name, tensors.pop(name).detach()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing, which holds weights") from error
    except Exception as error:  # each format has its own for a file cut off or damaged
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is damaged, cut off or no weights file: {reason}") from error


def snapshot(name, **which):
    """The folder of a Hub's repository in Hugging Face's cache."""
    from huggingface_hub import errors, snapshot_download  # comes with `datasets`

    try:
        return Path(snapshot_download(name, **which))
    except errors.RepositoryNotFoundError:
        raise
    except Exception:  # a Hub that breaks off is like none at all: what is in the cache will do
        return Path(snapshot_download(name, local_files_only=True, **which))


def download(name):
    """The folder in Hugging Face's cache with the model `name` of the Hub, fetched if need be."""
    missing = f"no model {name!r}: there is no such folder, and "
    known = r"(distil)?gpt2(-medium|-large|-xl)?|\w[\w.-]*/\w[\w.-]*"
    if os.path.isdir(os.path.dirname(name)) or not re.fullmatch(known, name):  # like out/mistyped
        raise FileNotFoundError(f"{missing}a Hub's name is owner/name or like gpt2-medium")
    import huggingface_hub  # comes with `datasets`

    try:
        for weights in ("model*.safetensors*", "pytorch_model*"):
            # The tokenizer's only for results/tokenizer.py to see whether it is ours.
            folder = snapshot(name, allow_patterns=[
                "config.json", "tokenizer.json", "vocab.json", weights])
            if any(folder.glob(weights)):
                break
        return folder
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{missing}none on the Hub, or it is private") from error
    except Exception as error:  # whatever went wrong, the way out is the same
        raise ConnectionError(f"{missing}the Hub can't be asked for one ({type(error).__name__}): "
                              "give a folder, --model DIR, or use --model tiny") from error


# Generation.


class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one token's work.

    `kv` is [2, n_layer, B, n_head, capacity, d / n_head], keys before values. Its first `length`
    positions are filled; the first `start` [B] of those are the row's left padding (None: none).
    """

    def __init__(self, config, start, capacity, dtype):
        self.kv = torch.empty(2, config.n_layer, len(start), config.n_head, capacity,
                              config.n_embd // config.n_head, dtype=dtype, device=start.device)
        self.start, self.length = start if start.any() else None, 0

    def append(self, layer, k, v):
        """Store the new tokens' `k` and `v` [B, n_head, T, d / n_head]; returns those of all."""
        end = self.length + k.size(2)
        self.kv[:, layer, :, :, self.length : end] = torch.stack([k, v])
        return self.kv[:, layer, :, :, :end]

    def select(self, rows):
        """Let row i be what row `rows[i]` was."""
        self.kv = self.kv[:, :, rows]
        self.start = None if self.start is None else self.start[rows]


def prepare(model, prompts, max_new_tokens):
    """What writing begins with: how many tokens may follow each of `prompts`; the indices of those
    that any may; their tokens [B, T], -1 left of shorter ones; their cache. Raises ValueError."""
    most, wte = model.config.n_positions, model.wte.weight
    for prompt in prompts:
        if not 0 < len(prompt) <= most:
            raise ValueError(f"a prompt has {len(prompt)} tokens; allowed are 1 to {most}")
    room = [max(0, min(max_new_tokens, most - len(prompt))) for prompt in prompts]
    live = [i for i, left in enumerate(room) if left]
    T = max((len(prompts[i]) for i in live), default=0)
    padded = [[-1] * (T - len(prompts[i])) + list(prompts[i]) for i in live]
    idx = torch.tensor(padded, device=wte.device).view(len(live), T)  # [B, T]
    cache = KVCache(model.config, (idx < 0).sum(1), T + max(room, default=0), wte.dtype)
    return room, live, idx, cache

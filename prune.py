"""Fine-pruning: which MLP neurons stay, decided while the model is being fine-tuned.

From the paper's equations to code, in order: the schedule (automated gradual pruning), Top_v, the scores of the five
methods, the running cosine similarity (Algorithm 1), the regularisers R and R_sim (eq. 4), distillation, one step of
fine-pruning, and `shrink`, which makes the pruned widths real.

A neuron j of a layer is one group: row j of W1, entry j of b1, column j of W2. It has one score S_j. The kept neurons
are put in `mlp.keep`; the others are skipped (see `model.MLP`). A layer has m neurons, k of them kept; the
network has N.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

METHODS = {
    "none": "plain fine-tuning, the dense baseline",
    "magnitude": "the group's weight norm, recomputed every step",
    "random": "gradual random: scores drawn once, never changed",
    "topv": "hard movement: learned scores, the best of each layer",
    "soft": "soft movement: learned scores, all above a rising threshold",
    "gum": "Globally Unique Movement: learned scores, the best of the whole network, similar neurons penalised",
}
LEARNED = ("topv", "soft", "gum")  # the methods whose scores get gradients


# The schedule: `step` counts from 1 to `steps`, the first tenth is warm-up.


def warmup_steps(steps):
    return round(0.1 * steps)


def lr_factor(step, steps):
    """What the learning rate is multiplied by: linear from 0 up to 1 over the warm-up, then linear down to 0."""
    warmup = warmup_steps(steps)
    return step / warmup if step <= warmup else (steps - step) / (steps - warmup)


def cubic(step, steps):
    """Zhu & Gupta's curve (section 2): 1 during warm-up, 0 over the last three warm-ups, a falling cubic between."""
    warmup = warmup_steps(steps)
    if step <= warmup:
        return 1.0
    if step > steps - 3 * warmup:
        return 0.0
    return (1 - (step - warmup) / (steps - 4 * warmup)) ** 3


def leftover_at(step, steps, leftover):
    """v_t, the fraction of neurons to keep at `step`: from 1 down to v = `leftover`."""
    return leftover + (1 - leftover) * cubic(step, steps)


# Scores and the sets they keep.


def top_v(scores, count):
    """Which `count` of the `scores` [n] are largest: bool [n], exactly that many, the lower index first among ties."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def above_threshold(scores, threshold, least):
    """Soft movement's kept set: sigmoid(S) > `threshold`, but never fewer than the `least` best. bool [n]"""
    above = scores.sigmoid() > threshold
    return torch.where(above.sum() < least, top_v(scores, least), above)


def magnitude(mlp):
    """The group-lasso score of each neuron: (sum of its squared weights)^(1/2) (section 2). [m]"""
    w1, b1, w2 = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight
    return (w1.square().sum(1) + b1.square() + w2.square().sum(0)).sqrt()


def movement(mlp):
    """dL/dS_j = sum of W * dL/dW over neuron j's group (eq. 1), from the gradients of one backward pass. [m]

    The straight-through mask of a kept neuron is 1, so the masked weights' gradients are the weights' own; those of a
    skipped neuron are 0, and so is its score's.
    """
    w1, b1, w2 = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight
    scores, keep = torch.zeros_like(b1), mlp.keep
    if w1.grad is None:
        return scores
    if keep is None:
        return (w1 * w1.grad).sum(1) + b1 * b1.grad + (w2 * w2.grad).sum(0)
    w1, w1_grad = w1.index_select(0, keep), w1.grad.index_select(0, keep)  # [k, d]
    w2, w2_grad = w2.index_select(1, keep), w2.grad.index_select(1, keep)  # [d, k]
    scores[keep] = (w1 * w1_grad).sum(1) + (b1 * b1.grad)[keep] + (w2 * w2_grad).sum(0)
    return scores


# Uniqueness.


def update_gram(C, h, keep, weight):
    """Algorithm 1, in place: C <- C + weight h^T h. Returns the kept neurons' U [k] (eq. 4).

    `C` [m, m] are the running inner products, of which only those on and above the diagonal count: it is symmetric, and
    the paper's Q is its diagonal. `h` [tokens, k] are the outputs of the neurons `keep` [k] (None = all), in order.
    A pruned neuron has h = 0, so its row and column receive nothing. How C decays is in `Pruner.observing`; U does not
    depend on its scale.

    U_j = (1 / k) sum over i != j of |C_ij| / sqrt(C_ii C_jj): the released code's absolute value, not the signed eq. 4,
    for an opposite neuron is as redundant as an equal one. A neuron that is always 0 is like nothing: U = 0.
    """
    k = h.size(1)
    inverse, U = C.new_zeros(2, k)  # 1 / |h_i| [k], U [k]
    panel = max(512, -(-k // 4))  # rows at a time: no second [m, m], and nearly half of the products are never made
    for start in reversed(range(0, k, panel)):  # from the bottom up, because 1 / |h_j| of the columns is needed
        rows = slice(start, min(start + panel, k))
        products = inner_products(h[:, rows], h[:, start:], C.dtype).mul_(weight)  # [panel, k - start]
        if keep is None:
            block = C[rows, start:].add_(products)
        else:
            kept = C.index_select(0, keep[rows]).index_add_(1, keep[start:], products)  # [panel, m]
            C.index_copy_(0, keep[rows], kept)
            block = kept.index_select(1, keep[start:])  # [panel, k - start]
        inverse[rows] = block.diagonal().clamp(min=torch.finfo(C.dtype).tiny).rsqrt()  # if C_ii = 0, so is every C_ij
        alike = block.abs().triu_(1)  # each pair once
        U[rows] += alike @ inverse[start:]
        U[start:] += inverse[rows] @ alike
    return U.mul_(inverse).div_(max(k, 1))


def inner_products(a, b, dtype):
    """a^T b [i, j] of `a` [tokens, i] and `b` [tokens, j], summed up in `dtype`.

    Where the device multiplies faster in lower precision, float32 is rounded first, to TF32 on a GPU and to bfloat16 on
    a CPU with the units for it. U is a mean over so many products that it does not notice.
    """
    if a.dtype != dtype and a.is_cuda:
        return torch.mm(a.T, b, out_dtype=dtype)
    usual = torch.get_float32_matmul_precision()
    try:
        if b.size(1) >= 256:  # for fewer columns, making a kernel for the shape would cost more than it saves
            torch.set_float32_matmul_precision("medium")
        return a.to(dtype).T @ b.to(dtype)
    finally:
        torch.set_float32_matmul_precision(usual)


# The five methods.


class Pruner:
    """Keeps the scores of all neurons, chooses the kept ones at every step and gives the scores their gradient.

    One step of fine-pruning is: `select(step)`, a forward pass `with observing():`, backward, `score_gradient(step)`,
    clipping of the weights' gradients alone, optimizer step. `fine_prune` does it.
    `multiple_of`: pad the neurons that a layer computes to such a number; which ones are kept stays the same. None =
    the device's own: 64 on a GPU, whose tensor cores work on tiles, else 1.
    `scope` and `lambda_gum` are None for the method's own: Top_v over the whole network ("global") and uniqueness for
    `gum`, Top_v in each layer ("layer") and none for the others.
    """

    def __init__(self, model, method, leftover, steps, scope=None, lambda_mvp=2.0, lambda_gum=None, lambda_sim=0.99,
                 tau=0.1, seed=0, multiple_of=None):
        self.method, self.leftover, self.steps = method, leftover, steps
        self.scope = scope or ("global" if method == "gum" else "layer")
        self.lambda_mvp, self.lambda_sim, self.tau = lambda_mvp, lambda_sim, tau
        self.lambda_gum = (10.0 if method == "gum" else 0.0) if lambda_gum is None else lambda_gum
        self.mlps = [block.mlp for block in model.h]
        self.widths = [mlp.c_fc.out_features for mlp in self.mlps]
        like = model.wte.weight.detach()
        self.multiple_of = multiple_of or (64 if like.is_cuda else 1)
        self.scores = nn.Parameter(like.new_zeros(sum(self.widths)), requires_grad=method in LEARNED)  # [N]
        if method == "random":
            uniform = torch.rand(sum(self.widths), generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
            self.scores.data.copy_(uniform)
        self.gram, self.gram_scale = [], 1.0  # C of each layer, divided by the scale: [m, m], the upper triangle
        if method in LEARNED and self.lambda_gum > 0:
            self.gram = [like.new_zeros(width, width) for width in self.widths]
        self.uniqueness_penalty = torch.zeros_like(self.scores.data)  # U [N]

    @torch.no_grad()
    def select(self, step):
        """Choose the neurons kept at `step` and have the MLPs skip the others. Returns how many each layer keeps."""
        v_t = leftover_at(step, self.steps, self.leftover)
        if self.method == "magnitude":
            self.scores.data = torch.cat([magnitude(mlp) for mlp in self.mlps])
        if self.method == "soft":
            tau_t = self.tau * (1 - cubic(step, self.steps))
            kept = [above_threshold(s, tau_t, round(self.leftover * len(s))) for s in self.scores.split(self.widths)]
        elif self.scope == "layer":
            kept = [top_v(s, round(v_t * len(s))) for s in self.scores.split(self.widths)]
        else:
            kept = [top_v(self.scores, round(v_t * len(self.scores)))]
        counts = []
        for mlp, mask in zip(self.mlps, torch.cat(kept).cpu().split(self.widths)):  # the step's one wait for the device
            keep = mask.nonzero().squeeze(1)  # [k]
            extra = min(-len(keep) % self.multiple_of, len(mask) - len(keep))
            padded = F.pad(keep, (0, extra)).to(self.scores.device, non_blocking=True)
            mlp.keep = padded[: len(keep)] if len(keep) < len(mask) else None
            mlp.padded = padded if extra else None
            counts.append(len(keep))
        return counts

    @contextmanager
    def observing(self, tokens=None):
        """While open, a forward pass updates the running similarity and U, from the tokens numbered `tokens` [s] of its
        B * T (None = all). When the backward pass computes activations again, it is closed: each is seen once.
        """
        if not self.gram:
            yield
            return
        # C <- (1 - lambda_sim) C + lambda_sim h^T h, where the first factor goes into the scale: C is not even touched
        # where nothing is added to it. Before float32 runs out of exponents, the scale goes back into C.
        self.gram_scale *= 1 - self.lambda_sim
        if self.gram_scale < 1e-12:
            for C in self.gram:
                C.mul_(self.gram_scale)
            self.gram_scale = 1.0
        penalties = self.uniqueness_penalty.zero_().split(self.widths)  # U = 0 for pruned neurons
        for mlp, C, U in zip(self.mlps, self.gram, penalties):
            mlp.observer = partial(self.observe, mlp, C, U, tokens)
        try:
            yield
        finally:
            for mlp in self.mlps:
                mlp.observer = None

    @torch.compiler.disable
    @torch.no_grad()
    def observe(self, mlp, C, U, tokens, h):
        """One layer's part: h [B, T, k] goes into its C [m, m] and its neurons' U [m]."""
        h = h.flatten(0, 1) if tokens is None else h.flatten(0, 1).index_select(0, tokens)  # [tokens, k]
        with torch.autocast(h.device.type, enabled=False):
            penalty = update_gram(C, h, mlp.keep, self.lambda_sim / self.gram_scale)  # [k]
        U[slice(None) if mlp.keep is None else mlp.keep] = penalty

    @torch.no_grad()
    def score_gradient(self, step):
        """After the backward pass, before clipping: give the scores their gradient, from the task and the regulariser.

        R(S) = lambda_t / N sum sigmoid(S_j), and with uniqueness R_sim(S) = lambda_t / N sum (1 + lambda_gum U_j)
        sigmoid(S_j) (eq. 4 and its released code). U carries no gradient. lambda_t follows the schedule.
        """
        if not self.scores.requires_grad:
            return
        if self.gram and dist.is_initialized():  # each process has its own C; the mean gradient is that of the mean U
            dist.all_reduce(self.uniqueness_penalty)
            self.uniqueness_penalty /= dist.get_world_size()
        if self.method == "soft":
            scale = 1 - cubic(step, self.steps)  # tau_t / tau
        else:
            scale = leftover_at(step, self.steps, self.leftover) / self.leftover
        sigmoid = self.scores.sigmoid()
        weight = self.lambda_mvp * scale / len(self.scores) * (1 + self.lambda_gum * self.uniqueness_penalty)
        task = torch.cat([movement(mlp) for mlp in self.mlps])
        self.scores.grad = task + weight * sigmoid * (1 - sigmoid)

    def state_dict(self):
        return {"scores": self.scores.data, "gram": self.gram, "gram_scale": self.gram_scale}

    def load_state_dict(self, state):
        self.scores.data.copy_(state["scores"])
        self.gram_scale = state["gram_scale"]
        for C, saved in zip(self.gram, state["gram"]):
            C.copy_(saved)


# Distillation, one step, and the end.


def distillation_loss(logits, teacher_logits, targets, temperature):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean in nats over the tokens that count (section 2).

    `logits` and `teacher_logits` [B, T, V]; `targets` [B, T], -100 where a token does not count.
    """
    counts = targets != -100
    student = F.log_softmax(logits.float() / temperature, dim=-1)  # [B, T, V]
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    kl = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)  # [B, T]
    return temperature**2 * kl.where(counts, 0.0).sum() / counts.sum()  # kl[counts] would have to wait for the device


def make_optimizer(model, pruner, args):
    """AdamW over three groups: weights, what is not decayed (biases and norms), and scores at a rate of their own."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [dict(params=decayed, weight_decay=args.weight_decay, peak=args.lr),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0, peak=args.lr)]
    if pruner.scores.requires_grad:
        groups.append(dict(params=[pruner.scores], weight_decay=0.0, peak=args.mask_lr, eps=1e-4))
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=args.eps, fused=True)


def autocast_of(device, dtype):
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def fine_prune(model, pruner, optimizer, micro_batches, step, args, teacher=None):
    """One step of fine-pruning. Returns how many neurons each layer keeps, the loss, and the weights' gradient norm.

    `model` is a GPT, or DistributedDataParallel around one; `micro_batches` are from `data.micro_batches`, `args` has
    dtype, label_smoothing and, for a teacher, alpha_ce, alpha_kd and temperature. The loss is the mean in nats over the
    tokens of the whole batch that count, those of other processes included. Learning rates follow the schedule.
    """
    widths, total, autocast = pruner.select(step), 0.0, autocast_of(pruner.scores.device, args.dtype)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_factor(step, pruner.steps)
    for number, micro in enumerate(micro_batches, 1):
        if teacher is not None:
            with torch.no_grad(), autocast:
                taught = teacher.features_at(micro.idx, micro.places)  # [n, d]

        def loss_of(logits, some):  # [tokens, V]; a slice: which of the micro-batch's n tokens these are
            loss = F.cross_entropy(logits, micro.targets[some], reduction="sum",
                                   label_smoothing=args.label_smoothing)
            if teacher is not None:
                kl = distillation_loss(logits, F.linear(taught[some], teacher.wte.weight), micro.targets[some],
                                       args.temperature)
                loss = args.alpha_ce * loss + args.alpha_kd * kl * len(logits)
            return loss / micro.total

        # Gradients of micro-batches add up here; only the last one's backward pass averages them over the processes.
        waits = number < len(micro_batches) and dist.is_initialized()
        with model.no_sync() if waits else nullcontext():
            with autocast, pruner.observing(micro.similar):
                loss = model(micro.idx, places=micro.places, loss_of=loss_of)[1]
            loss.backward()
        total += loss.detach()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    pruner.score_gradient(step)
    # Only the weights are clipped: a large score gradient never scales them, nor they it.
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if norm.is_cuda or norm > 1:  # a GPU is not asked, because that would mean waiting for it
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return widths, total, norm


@torch.no_grad()
def shrink(model, multiple_of=1):
    """Make the pruned widths real, in place: each MLP keeps only its neurons in `keep`. Returns the model.

    `multiple_of` rounds every width up with neurons whose weights are zero, for devices that are faster so; the model
    computes the same. The old parameters are replaced: make a new optimizer to train on.
    """
    widths = []
    for mlp in (block.mlp for block in model.h):
        w1, b1, w2 = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight  # [m, d] [m] [d, m]
        keep = torch.arange(len(b1), device=b1.device) if mlp.keep is None else mlp.keep
        extra = -len(keep) % multiple_of
        mlp.c_fc.weight = nn.Parameter(F.pad(w1[keep], (0, 0, 0, extra)))  # [k, d]
        mlp.c_fc.bias = nn.Parameter(F.pad(b1[keep], (0, extra)))  # [k]
        mlp.c_proj.weight = nn.Parameter(F.pad(w2[:, keep], (0, extra)))  # [d, k]
        mlp.c_fc.out_features = mlp.c_proj.in_features = len(keep) + extra
        mlp.keep = mlp.padded = None
        widths.append(len(keep) + extra)
    model.config.mlp_widths = tuple(widths)
    return model

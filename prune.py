"""Fine-pruning: which MLP neurons stay, decided while the model is being fine-tuned.

From the paper's equations to code, in order: the schedule (automated gradual pruning), Top_v, the scores of the five
methods, the running cosine similarity (Algorithm 1), the regularisers R and R_sim (eq. 4), distillation, and `shrink`,
which makes the pruned widths real.

A neuron j of a layer is one group: row j of W1, entry j of b1, column j of W2. It has one score S_j. The kept neurons
are put in `mlp.keep`; the others are skipped (see `model.MLP`). A layer has m neurons, k of them kept; the
network has N.
"""

import torch
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
    if w1.grad is None:
        return torch.zeros_like(b1)
    return (w1 * w1.grad).sum(1) + b1 * b1.grad + (w2 * w2.grad).sum(0)


# Uniqueness.


def update_gram(C, h, keep, lambda_sim):
    """Algorithm 1, in place: C <- (1 - lambda_sim) C + lambda_sim h^T h. Returns the kept neurons' block [k, k].

    `C` [m, m] are the running inner products, `h` [tokens, k] the kept neurons' outputs. The paper's Q is C's diagonal.
    A pruned neuron has h = 0, so its row and column only decay.
    """
    if keep is None:
        return C.addmm_(h.T, h, beta=1 - lambda_sim, alpha=lambda_sim)
    rows = keep[:, None]
    block = C[rows, keep].addmm_(h.T, h, beta=1 - lambda_sim, alpha=lambda_sim)  # [k, k]
    C.mul_(1 - lambda_sim)
    C[rows, keep] = block
    return block


def similarity_to_others(C):
    """U_j = (1 / k) sum over i != j of |C_ij| / sqrt(C_ii C_jj), for the k neurons of a Gram matrix C [k, k]. [k]

    The released code's absolute value, not the signed eq. 4: an opposite neuron is as redundant as an equal one.
    A neuron that is always 0 is like nothing: U = 0.
    """
    norm = C.diagonal()
    inverse = torch.where(norm > 0, norm.rsqrt(), 0.0)
    return inverse * (C.abs() @ inverse - norm * inverse) / max(len(C), 1)


# The five methods.


class Pruner:
    """Keeps the scores of all neurons, chooses the kept ones at every step and gives the scores their gradient.

    One step of fine-pruning is: `select(step)`, forward, `observe()`, backward, `score_gradient(step)`, clipping of the
    weights' gradients alone, optimizer step.
    `scope` and `lambda_gum` are None for the method's own: Top_v over the whole network ("global") and uniqueness for
    `gum`, Top_v in each layer ("layer") and none for the others.
    """

    def __init__(self, model, method, leftover, steps, scope=None, lambda_mvp=2.0, lambda_gum=None, lambda_sim=0.99,
                 tau=0.1, seed=0):
        self.method, self.leftover, self.steps = method, leftover, steps
        self.scope = scope or ("global" if method == "gum" else "layer")
        self.lambda_mvp, self.lambda_sim, self.tau = lambda_mvp, lambda_sim, tau
        self.lambda_gum = (10.0 if method == "gum" else 0.0) if lambda_gum is None else lambda_gum
        self.mlps = [block.mlp for block in model.h]
        self.widths = [mlp.c_fc.out_features for mlp in self.mlps]
        like = model.wte.weight.detach()
        self.scores = nn.Parameter(like.new_zeros(sum(self.widths)), requires_grad=method in LEARNED)  # [N]
        if method == "random":
            uniform = torch.rand(sum(self.widths), generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
            self.scores.data.copy_(uniform)
        self.gram = []  # C of each layer [m, m]
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
        kept = torch.cat(kept).cpu().split(self.widths)  # the step's one wait for the device
        for mlp, mask in zip(self.mlps, kept):
            mlp.keep = None if mask.all() else mask.nonzero().squeeze(1).to(self.scores.device, non_blocking=True)
            mlp.hold = bool(self.gram)
        return [int(mask.sum()) for mask in kept]

    @torch.no_grad()
    def observe(self, real=None):
        """After a forward pass in training: update the running similarity and U. `real` bool [B, T]: not padding."""
        if not self.gram:
            return
        penalties = self.uniqueness_penalty.zero_().split(self.widths)  # U = 0 for pruned neurons
        for mlp, C, U in zip(self.mlps, self.gram, penalties):
            h = mlp.held.detach()  # [B, T, k], in the autocast dtype
            h = (h.flatten(0, 1) if real is None else h[real]).to(C.dtype)  # [tokens, k]
            mlp.held = None
            block = update_gram(C, h, mlp.keep, self.lambda_sim)
            U[slice(None) if mlp.keep is None else mlp.keep] = similarity_to_others(block)

    @torch.no_grad()
    def score_gradient(self, step):
        """After the backward pass, before clipping: give the scores their gradient, from the task and the regulariser.

        R(S) = lambda_t / N sum sigmoid(S_j), and with uniqueness R_sim(S) = lambda_t / N sum (1 + lambda_gum U_j)
        sigmoid(S_j) (eq. 4 and its released code). U carries no gradient. lambda_t follows the schedule.
        """
        if not self.scores.requires_grad:
            return
        if self.method == "soft":
            scale = 1 - cubic(step, self.steps)  # tau_t / tau
        else:
            scale = leftover_at(step, self.steps, self.leftover) / self.leftover
        sigmoid = self.scores.sigmoid()
        weight = self.lambda_mvp * scale / len(self.scores) * (1 + self.lambda_gum * self.uniqueness_penalty)
        task = torch.cat([movement(mlp) for mlp in self.mlps])
        self.scores.grad = task + weight * sigmoid * (1 - sigmoid)

    def state_dict(self):
        return {"scores": self.scores.data, "gram": self.gram}

    def load_state_dict(self, state):
        self.scores.data.copy_(state["scores"])
        for C, saved in zip(self.gram, state["gram"]):
            C.copy_(saved)


# Distillation, and the end.


def distillation_loss(logits, teacher_logits, targets, temperature):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean in nats over the tokens that count (section 2).

    `logits` and `teacher_logits` [B, T, V]; `targets` [B, T], -100 where a token does not count.
    """
    counts = targets != -100
    student = F.log_softmax(logits[counts].float() / temperature, dim=-1)  # [tokens, V]
    teacher = F.log_softmax(teacher_logits[counts].float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


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
        mlp.keep, mlp.hold, mlp.held = None, False, None
        widths.append(len(keep) + extra)
    model.config.mlp_widths = tuple(widths)
    return model

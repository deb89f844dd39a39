"""Fine-pruning: which MLP neurons stay, decided while the model is being fine-tuned.

The paper's equations in code: the schedule of gradual pruning, Top_v, scores and their regulariser,
what tells one method from another, the `Pruner`, the loss, and `shrink`.

A neuron j of a layer is one group: row j of W1, entry j of b1, column j of W2, with one score S_j.
A layer has m neurons, k of which are kept at this step; the network has N. The kept ones are put
in `mlp.keep` [k]; the others are skipped (`model.MLP` says why that equals a mask, and what k' is).
"""

from contextlib import contextmanager
from functools import cache
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import ALIGNED

# The schedule: `step` counts from 1 to `steps`, the first tenth is warm-up.


def warmup_steps(steps):
    return round(0.1 * steps)


def lr_factor(step, steps):
    """What the learning rates are multiplied by: linear from 0 to 1 over the warm-up, then to 0."""
    warmup = warmup_steps(steps)
    return step / warmup if step <= warmup else (steps - step) / (steps - warmup)


def cubic(step, steps, prune_from=0.1, prune_until=0.7, rounds=0):
    """Zhu & Gupta's curve (section 2): 1 up to the share `prune_from` of the steps, and at the
    first of several; 0 from `prune_until` on; a cubic between, in as many drops as steps,
    or `rounds` at most."""
    tenth = warmup_steps(steps)
    papers = 0, tenth, steps - 3 * tenth, steps  # its 0.1 and 0.7 are so many warm-ups
    start, end = (round(np.interp(share, (0, 0.1, 0.7, 1), papers))
                  for share in (prune_from, prune_until))
    start = min(max(start, 1), steps - 1)
    length = max(end - start, 1)
    every = -(-length // (rounds or steps))
    step = end + (step - end) // every * every  # the last drop's
    return min(max(1 - (step - start) / length, 0.0), 1.0) ** 3


def v_at(step, leftover, **when):
    """v_t, the fraction of neurons to keep at `step`: from 1 down to v = `leftover` (section 2).
    `when`: what `cubic` takes."""
    return leftover + (1 - leftover) * cubic(step, **when)


# Which neurons the scores keep.


def top_v(scores, count):
    """M = Top_v(S) (section 2): exactly the `count` largest of `scores` [n], of equal ones those of
    lower index. bool [n]"""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.sort(descending=True, stable=True).indices[:count]] = True
    return kept


def above_threshold(scores, tau, least):
    """M = 1[sigmoid(S) > tau], soft movement's (section 2), but never fewer than the `least` best.
    bool [m]"""
    above = scores.sigmoid() > tau
    return torch.where(above.sum() < least, top_v(scores, least), above)


# The scores.


def movement(mlp):
    """dL/dS_j = sum of W * dL/dW over neuron j's group (eq. 1), after the backward pass. [m]

    A kept neuron's mask is 1 and lets gradients straight through, so the masked weights' are the
    weights' own. A skipped neuron's are 0, and so is its score's.
    """
    w1, b1, w2 = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight  # [m, d] [m] [d, m]
    return (w1 * w1.grad).sum(1) + b1 * b1.grad + (w2 * w2.grad).sum(0)


def magnitude(mlp, _):
    """S_j = (sum of the group's squared weights)^(1/2), group-lasso magnitude (section 2). [m]"""
    w1, b1, w2 = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight
    return (w1.square().sum(1) + b1.square() + w2.square().sum(0)).sqrt()


@contextmanager
def exactly():
    """In full float32: TF32, in which a GPU trains, is too coarse to solve equations."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def cholesky(C, ridge=1e-2):
    """The lower L [k, k] of L L^T = C + ridge * (mean of C's diagonal), lest C be singular. NaN if
    C is not finite, as the loss is then."""
    added = ridge * C.diagonal().mean() + torch.finfo(C.dtype).tiny
    L, failed = torch.linalg.cholesky_ex(C + added * C.new_ones(len(C)).diag())
    return torch.where(failed == 0, L, float("nan"))


@exactly()
def surgeon(measured, C):
    """S_j = E[(dL/dh_j)^2] / (C^-1)_jj, how much the loss would rise without j if the others of its
    layer took over what they can of it: Optimal Brain Surgeon for whole neurons. [k]

    1 / (C^-1)_jj = min over a of E[(h_j - sum_i a_i h_i)^2] is the part of h_j that the others
    can't give, where C = E[h h^T] [k, k], and a ridge. How much the loss minds it is `measured`
    [k], E[(dL/dh_j)^2]: to second order, with Fisher's matrix for the Hessian, as in K-FAC. But
    tokens do not weigh alike in C: `Pruner.add` says how.
    """
    half = torch.linalg.solve_triangular(cholesky(C), C.new_ones(len(C)).diag(), upper=False)
    return measured / half.square().sum(0)  # C^-1 = half^T half


@exactly()
def take_over(w2, C, kept, lost):
    """W2_kept += W2_lost a^T, in place: the columns `kept` [k] of W2 [d, m] do what they can of
    those `lost` [l], where h_lost is about a^T h_kept by least squares; C [m, m] is as above."""
    a = torch.cholesky_solve(C[kept[:, None], lost], cholesky(C[kept[:, None], kept]))  # [k, l]
    w2[:, kept] += w2[:, lost] @ a.T


def similarity(C):
    """|sim(h_i, h_j)| = |C_ij| / (C_ii C_jj)^(1/2) (eq. 3, Algorithm 1) [k, k], from `C` [k, k].

    The paper's Q_i is C_ii. The absolute value is the released code's: an opposite neuron is as
    redundant as an equal one. 0 for i = j, and for a neuron that is always 0.
    """
    norm = C.diagonal().sqrt()  # |h_i| [k]
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    return (C * inverse[:, None]).mul_(inverse).abs_().fill_diagonal_(0)


def regulariser(scores, U, lambda_t, lambda_gum):
    """R_sim(S) = lambda_t (1/N) sum_j (1 + lambda_gum U_j) sigmoid(S_j) (eq. 4), of S, U [N].

    With lambda_gum = 0 it is R(S) (section 2). The paper has U_j alone; 1 + lambda_gum U_j is its
    released code's, and what its hyper-parameters are for. Over N: lambda means the same for every
    model.
    """
    return lambda_t * ((1 + lambda_gum * U) * scores.sigmoid()).mean()


# The methods.


class Method(NamedTuple):
    """What tells one method from another."""

    name: str  # in tables and figures
    about: str  # in --help
    learned: bool = False  # S starts at 0 and moves by its gradient; else it is drawn once,
    score: Callable = None  # or computed at every step: (mlp, measured [m]) -> S [m]
    measure: Callable = None  # h [tokens, k] -> [tokens, k], whose running mean is `measured`
    surgery: int = 0  # the most rounds in which neurons leave for good, and the others take over;
    # then `measure` sees dL/dh, not h; `score` is (measured [k], C [k, k]) -> S [k]
    threshold: bool = False  # keep what is above a rising tau_t, not the best v_t
    defaults: dict = {}  # of flags, where the general ones do not suit


METHODS = {
    "none": Method("Dense", "plain fine-tuning, the dense baseline"),
    "magnitude": Method("Magnitude", "the group's weight norm", score=magnitude),
    "random": Method("Random", "gradual random: scores drawn once, never changed"),
    "topv": Method("Top_v", "hard movement: learned scores, the best of each layer", learned=True),
    "soft": Method("Soft movement", "soft movement: learned scores, all above a rising threshold",
                   learned=True, threshold=True, defaults=dict(mask_lr=10.0, scope=None)),
    "gum": Method("GUM", "Globally Unique Movement: learned scores, the best of the whole network, "
                  "similar neurons penalised", learned=True,
                  defaults=dict(scope="global", lambda_gum=10.0)),
    "obs": Method("OBS", "Optimal Brain Surgeon, not the paper's: how much the loss would rise "
                  "without a neuron whose part the others take over", score=surgeon,
                  measure=torch.square, surgery=40, defaults=dict(
                      scope="global", lambda_sim=0.1, prune_from=0.0, prune_until=0.1)),
}


def defaults_of(method):
    """The paper's settings of a method (Appendix F; lambda_mvp and tau are its released code's)."""
    return dict(scope="layer", mask_lr=1e-2, lambda_mvp=2.0, lambda_gum=0.0, lambda_sim=0.99,
                tau=0.1, prune_from=0.1, prune_until=0.7) | METHODS[method].defaults


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def chosen(values, tokens):
    """The rows of the B * T in `values` [B, T, k] that `tokens` [s] numbers, None = all. [s, k]"""
    values = values.flatten(0, 1)
    return values if tokens is None else values.index_select(0, tokens)


class Pruner(nn.Module):
    """Keeps the scores, chooses the neurons to keep at every step, and gives the scores gradients.

    A step is: `select(step)`; each micro-batch's forward pass `with recording(tokens)` and backward
    pass; `update(step)`; the optimizer's step. `settings` are `defaults_of`'s, None is the
    method's own; `scope` is "layer", "global", or what each layer keeps at the end: "352,85,58,17".
    The state_dict is all that the next step depends on.
    """

    def __init__(self, model, method, leftover, steps, seed=0, **settings):
        super().__init__()
        for name, usual in defaults_of(method).items():
            given = settings.pop(name, None)
            setattr(self, name, usual if given is None else given)
        if settings:
            raise TypeError(f"no such settings: {settings}")
        self.method, self.leftover, self.steps = METHODS[method], leftover, steps
        self.when = dict(steps=steps, prune_from=self.prune_from, prune_until=self.prune_until,
                         rounds=self.method.surgery)
        self.mlps = [block.mlp for block in model.h]
        self.widths = [mlp.c_fc.out_features for mlp in self.mlps]
        N, like, learned = sum(self.widths), model.wte.weight.detach(), self.method.learned
        drawn = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
        scores = torch.zeros_like(drawn) if learned else drawn
        self.scores = nn.Parameter(scores.to(like.device), requires_grad=learned)  # S [N]
        # Running means over steps: C of each layer [m, m], and what the method measures [N].
        with_C = learned and self.lambda_gum > 0 or self.method.surgery
        self.C = nn.ParameterList(nn.Parameter(like.new_zeros(m, m), requires_grad=False)
                                  for m in self.widths if with_C)
        self.register_buffer("measured", like.new_zeros(N))
        self.sums = like.new_zeros(N + 1)  # over this step's tokens, and their number
        self.recorded = False  # whether anything is, of this step
        self.fading = set()  # the layers whose C has not taken in anything of this step yet

    @torch.no_grad()
    def select(self, step):
        """Begin `step`: choose its neurons, have the MLPs skip the others. Returns how many each
        layer keeps."""
        self.fading = set(range(len(self.C)))
        if self.method.score is not None and not self.method.surgery:
            measured = self.measured.split(self.widths)
            self.scores.copy_(torch.cat(list(map(self.method.score, self.mlps, measured))))
        v_t, ahead = v_at(step, self.leftover, **self.when), cubic(step, **self.when)
        over = self.method.surgery and ahead == 0  # after this choice nobody leaves
        self.recorded = bool(self.C or self.method.measure) and not over
        if v_t == 1 and not (self.method.threshold and ahead < 1):  # all stay: nothing to wait for
            for mlp in self.mlps:
                mlp.keep = None
            return self.widths
        leaving = self.method.surgery and cubic(step - 1, **self.when) > ahead
        if leaving:
            self.examine()
        layers = self.scores.split(self.widths)
        if self.method.threshold:
            tau_t = self.tau * (1 - ahead)
            kept = [above_threshold(S, tau_t, round(self.leftover * len(S))) for S in layers]
        elif self.scope == "global":
            kept = [top_v(self.scores, round(v_t * len(self.scores)))]
        else:
            shares = [self.leftover] * len(layers)
            if self.scope != "layer":
                asked = map(int, self.scope.split(","))
                shares = [k / max(m, 1) for k, m in zip(asked, self.widths, strict=True)]
            kept = [top_v(S, round(v_at(step, v, **self.when) * len(S)))
                    for S, v in zip(layers, shares)]
        if leaving:
            self.operate(torch.cat(kept))
        masks = torch.cat(kept).cpu().split(self.widths)  # waits for the device
        counts = [int(mask.sum()) for mask in masks]
        keep = torch.cat([mask.nonzero().squeeze(1) for mask in masks])
        keep = keep.pin_memory() if self.scores.is_cuda else keep
        keep = keep.to(self.scores.device, non_blocking=True)
        for mlp, m, indices in zip(self.mlps, self.widths, keep.split(counts)):
            mlp.keep = indices if len(indices) < m else None
        return counts

    def examine(self):
        """Compute the scores; those of what is gone are -1."""
        of_layers = (x.split(self.widths) for x in (self.measured, self.scores))
        for C, measured, S in zip(self.C, *of_layers):
            here = (S != -1).nonzero().squeeze(1)  # [k]
            S[here] = self.method.score(measured[here], C[here[:, None], here])

    def operate(self, kept):
        """Have those that stay, `kept` [N], take over the part of those that leave."""
        of_layers = (x.split(self.widths) for x in (self.scores, kept))
        for mlp, C, S, stays in zip(self.mlps, self.C, *of_layers):
            lost = (~stays & (S != -1)).nonzero().squeeze(1)  # [l]
            if len(lost):
                take_over(mlp.c_proj.weight, C, stays.nonzero().squeeze(1), lost)
                S[lost] = -1.0

    @contextmanager
    def recording(self, tokens=None):
        """While open, forward passes add to C and to what is measured, of their B * T tokens those
        numbered `tokens` [s], None = all. Not open when a backward pass computes h again."""
        for layer, mlp in enumerate(self.mlps if self.recorded else ()):
            mlp.record = lambda h, layer=layer: self.record(layer, tokens, h)
        try:
            yield
        finally:
            for mlp in self.mlps:
                mlp.record = None

    def at(self, layer, dimensions=1):
        """Where the kept neurons are in a tensor [m], or one [m, m]; ... is everywhere."""
        keep = self.mlps[layer].keep
        if keep is None:
            return ...
        return keep if dimensions == 1 else (keep[:, None], keep)

    @torch.no_grad()
    def record(self, layer, tokens, h):
        """Add one layer's h [B, T, k'], with surgery once its gradient is there."""
        seen = [chosen(h.detach(), tokens)]  # [tokens, k'], held until it is popped
        if self.method.surgery:
            h.register_hook(lambda grad: self.add(layer, seen.pop(),
                                                  chosen(grad, tokens) / world_size()))
        else:
            self.add(layer, seen.pop())

    @torch.no_grad()
    def add(self, layer, h, grad=None):
        """Add one layer's h, with surgery also dL/dh, [tokens, k'], to C and to what is measured.

        With surgery a token weighs 1 + w / E[w] in C, since an error costs as much as w = |dL/dh|^2
        there; without the 1 a few tokens outweigh all. E[w] is the mean of the steps so far, over
        what has left, too; in the first step there is none, and all weigh 1.
        """
        if self.method.measure is not None:
            sums = self.sums[:-1].split(self.widths)[layer]  # [m]
            old = sums[self.at(layer)]  # [k]
            x = h if grad is None else grad
            values = self.method.measure(x[:, : len(old)].to(sums.dtype))  # [tokens, k]
            sums[self.at(layer)] = old.add_(values.sum(0))
            self.sums[-1] += len(values) * (layer == 0)
        if not self.C:
            return
        C = self.C[layer]  # Algorithm 1: C <- (1 - lambda_sim) C + lambda_sim h^T h
        if layer in self.fading:  # once a step, from however many micro-batches h comes
            C *= 1 - self.lambda_sim
            self.fading.remove(layer)
        if grad is not None:
            mean = self.measured.split(self.widths)[layer].sum()
            cost = values.sum(1) / mean.where(mean > 0, float("inf"))  # [tokens]
            h = h.to(C.dtype) * (1 + cost).sqrt()[:, None]  # C is to have an inverse
        old = C[self.at(layer, 2)]  # [k, k]
        with torch.autocast(h.device.type, enabled=False):  # or h is bfloat16 again
            # `average` takes the mean over processes, and this is to be the batch's sum.
            new = (h.T @ h)[: len(old), : len(old)].to(C.dtype)  # [k', k'] -> [k, k]
            C[self.at(layer, 2)] = old.add_(self.lambda_sim * world_size() * new)

    def average(self):
        """Put together what several processes have seen, each of its own tokens: sums, and the mean
        of C of the kept neurons. A pruned one's fades everywhere alike."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            for layer, C in enumerate(self.C):
                kept = C[self.at(layer, 2)] / world_size()  # [k, k]
                dist.all_reduce(kept)
                C[self.at(layer, 2)] = kept

    def uniqueness(self):
        """U_j = 1/N_left sum over i != j of |sim(h_j, h_i)| (section 4), 0 for a pruned j. [N]"""
        U = torch.zeros_like(self.scores)
        for layer, (C, of_layer) in enumerate(zip(self.C, U.split(self.widths))):
            sim = similarity(C[self.at(layer, 2)])  # [k, k]
            of_layer[self.at(layer)] = sim.sum(1) / max(len(sim), 1)
        return U

    @torch.no_grad()
    def update(self, step):
        """End `step`, before the optimizer's: the scores get their gradient (eq. 1 and 4)."""
        if self.recorded:
            self.average()
            new = self.sums[:-1] / self.sums[-1].clamp(min=1)
            self.measured.lerp_(new, self.lambda_sim if step > 1 else 1.0)
            self.sums.zero_()
        if not self.method.learned:
            return
        if self.method.threshold:
            lambda_t = self.lambda_mvp * (1 - cubic(step, **self.when))  # tau_t / tau
        else:
            lambda_t = self.lambda_mvp * v_at(step, self.leftover, **self.when) / self.leftover
        U = self.uniqueness()
        self.scores.grad = torch.cat([movement(mlp) for mlp in self.mlps])
        with torch.enable_grad():  # adds to it; U carries no gradient
            regulariser(self.scores, U, lambda_t, self.lambda_gum).backward()


# The loss.


def distillation_loss(logits, taught, temperature):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) (section 2), in nats, summed over the n
    tokens of `logits` and of the teacher's, `taught`: [n, V]."""
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(taught / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def token_loss(logits, targets, taught, V, how):
    """Cross-entropy, or with a teacher alpha_ce CE + alpha_kd T^2 KL, in nats, the sum over the n
    tokens of `targets` [n] and the first V columns of `logits` and `taught` [n, V'], in float32 at
    least. `how` has label_smoothing, and for a teacher alpha_ce, alpha_kd, temperature.
    """
    def exact(x):  # [n, V'] -> [n, V]; compiled, it is never written
        return (x[:, :V] if x.size(1) > V else x).to(torch.promote_types(x.dtype, torch.float32))

    logits = exact(logits)
    loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=how.label_smoothing)
    if taught is not None:
        kl = distillation_loss(logits, exact(taught), how.temperature)
        loss = how.alpha_ce * loss + how.alpha_kd * kl
    return loss


@cache
def compiled(function):
    # Not dynamic=True: a varying V is a slow divisor.
    return torch.compile(function)


class HeadLoss(torch.autograd.Function):
    """`token_loss` of final hidden states `x` [n, d] under the output head [V, d], without ever
    holding all logits [n, V], which would take most of the memory.

    Gradients are taken here, some tokens at a time, and only scaled in the backward pass. On a GPU
    the head gets rows of zeros up to V', a multiple of 64. `teacher`: None, or its final hidden
    states [n, d'] and head [V, d']. Products are in the autocast dtype; the loss is compiled if
    `how.compile`.
    """

    @staticmethod
    def forward(ctx, x, head, targets, teacher, how):
        dtype, device, V = head.dtype, x.device.type, len(head)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Tokens at a time: 0.25 GB of float32 logits; their gradient takes five times that, with a
        # teacher ten. On a CPU 32 MiB: larger blocks go back to the system after use.
        rows = max(128, 2 ** (26 if x.is_cuda else 23) // V // 128 * 128)
        extra = -V % ALIGNED.get(device, 1)

        def aligned(head):  # [V, d] -> [V', d]
            return F.pad(head.to(dtype), (0, 0, 0, extra)) if extra else head.to(dtype)

        low, total = aligned(head), x.new_zeros(())
        grad_x, grad_head = torch.empty_like(x), torch.zeros_like(low, dtype=head.dtype)
        if teacher is not None:
            taught_x, taught_head = teacher[0].to(dtype), aligned(teacher[1])
        loss_of = compiled(token_loss) if how.compile else token_loss
        for start in range(0, len(x), rows):
            at, taught = slice(start, start + rows), None
            features = x[at].to(dtype)  # [rows, d]
            logits = (features @ low.T).requires_grad_()  # [rows, V']
            if teacher is not None:
                taught = taught_x[at] @ taught_head.T  # [rows, V']
            with torch.enable_grad():
                loss = loss_of(logits, targets[at], taught, V, how)
            grad = torch.autograd.grad(loss, logits)[0]  # [rows, V']
            total = total + loss.detach()
            del logits, loss, taught  # freed before the next are made
            grad_x[at] = grad @ low
            if dtype == head.dtype:  # adds in place: [V, d] is large enough to show in the time
                grad_head.addmm_(grad.T, features)
            else:
                grad_head += grad.T @ features
        ctx.grads = grad_x, grad_head[:V]
        return total

    @staticmethod
    def backward(ctx, scale):
        (grad_x, grad_head), ctx.grads = ctx.grads, None  # held no longer
        return grad_x.mul_(scale), grad_head.mul_(scale), None, None, None


# The end.


@torch.no_grad()
def shrink(model, multiple_of=1):
    """Make the pruned widths real, in place, and return the model. Its parameters are new: training
    on takes a new optimizer. `multiple_of` rounds widths up with zero neurons, for devices that are
    faster so; the model computes the same."""
    widths = []
    for mlp in (block.mlp for block in model.h):
        w1, b1, w2 = map(nn.Parameter, mlp.kept_weights(multiple_of))  # [k', d] [k'] [d, k']
        mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.keep = w1, b1, w2, None
        mlp.c_fc.out_features = mlp.c_proj.in_features = len(b1)
        widths.append(len(b1))
    model.config.mlp_widths = tuple(widths)
    return model

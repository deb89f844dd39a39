"""Optimal Brain Surgeon in parts: `train.py` with methods that lack some of them, or go further.

    python -m results.parts --method alone --leftover 0.1      train.py's flags, in one process

`obs` scores a neuron by how much the loss minds an error in it, times the part of it that all
others of its layer together can't give; and the others take over what leaves. Neurons leave here as
they do there, but are chosen

    chance    by chance: scores are drawn once, as those of `random`
    alone     by all of a neuron, whatever others can give of it
    pairs     by the part of it that no single other can give, which is what cosines tell
    greedy    as by `obs`, but one by one: what can't those others give that are then left?
    handed    likewise, and how much the loss minds it is handed on to those that take over

`chance-only`, `alone-only` and `obs-only` choose likewise, and nobody takes over.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from prune import METHODS, Pruner, cholesky, take_over

RIDGE = 1e-2  # as in `cholesky`
NOBODY = ", nobody takes over"


def alone(measured, C):
    """S_j = E[(dL/dh_j)^2] (C_jj + ridge), as `surgeon` has it of a layer of one neuron. [k]"""
    return measured * (C.diagonal() + RIDGE * C.diagonal().mean())


def pairs(measured, C):
    """S_j = E[(dL/dh_j)^2] min_i (C_jj + ridge - C_ij^2 / (C_ii + ridge)), as `surgeon` has it of a
    layer of two neurons, j and the one that gives most of it. [k]"""
    whole = C.diagonal() + RIDGE * C.diagonal().mean()  # [k]
    given = (C.square() / whole).fill_diagonal_(0)  # of j, by i [k, k]
    return measured * (whole - F.pad(given, (0, 1)).amax(1))


def one_by_one(G, C, hand_on=True):
    """S_j is what `surgeon` says of j when its turn comes, if neurons leave one by one, each time
    that of the lowest; and no less than that of those before. [k]

    G = E[g g^T], of g_j = dL/dh_j, has its measure on the diagonal. If i takes over a_i of what j
    did, its column of W2 grows by a_i of j's, and so g_i by a_i g_j; with `hand_on` G follows, so
    that the scores do not depend on how a neuron is split into copies. C, G: [k, k].
    """
    here, scores, last, gone = torch.arange(len(G)), torch.empty(len(G)), 0.0, []
    G, inverse = G.double().clone(), torch.cholesky_inverse(cholesky(C.double()))
    for _ in range(len(G)):  # here: [left], who they are
        S = G.diagonal() / inverse.diagonal()  # [left]
        S[gone] = torch.inf
        j = int(S.argmin())
        scores[here[j]] = last = max(last, float(S[j]))
        gone.append(j)
        if hand_on:
            a = -inverse[:, j] / inverse[j, j]  # [left]
            a[gone] = 0.0
            more = G[:, j] + a * G[j, j] / 2
            G.addr_(a, more).addr_(more, a)  # E[(g + a g_j) (g + a g_j)^T]
        inverse.addr_(inverse[:, j] / inverse[j, j], inverse[j].clone(), alpha=-1)
        inverse[j, j] = 1.0  # it is 0 now
        if len(gone) in (64, len(here)):  # from now on without them
            left = torch.ones(len(here), dtype=bool).index_fill(0, torch.tensor(gone), False)
            here, gone = here[left], []
            G, inverse = (matrix[left][:, left] for matrix in (G, inverse))
    return scores.to(C.dtype)


def greedy(measured, C):
    """`one_by_one`, but the loss goes on to mind each for its own part only. [k]"""
    return one_by_one(measured.diag(), C, hand_on=False)


OBS = METHODS["obs"]
PARTS = {
    name: OBS._replace(name=text, about=f"OBS, {text.lower()}", score=score)
    for name, text, score in (
        ("chance", "By chance", None), ("chance-only", f"By chance{NOBODY}", None),
        ("alone", "Each alone", alone), ("alone-only", f"Each alone{NOBODY}", alone),
        ("pairs", "In pairs", pairs), ("obs-only", f"OBS's choice{NOBODY}", OBS.score),
        ("greedy", "One by one", greedy), ("handed", "One by one, handed on", one_by_one))}


class PartPruner(Pruner):
    """A `Pruner` for these methods, too. `handed` keeps G of each layer as others do `measured`."""

    def __init__(self, model, method, *args, **settings):
        super().__init__(model, method, *args, **settings)
        self.G = nn.ParameterList(nn.Parameter(torch.zeros_like(C), requires_grad=False)
                                  for C in self.C if method == "handed")
        self.takes_over = not self.method.name.endswith(NOBODY)

    @torch.no_grad()
    def add(self, layer, h, grad=None):
        if self.G:
            G, at = self.G[layer], self.at(layer, 2)
            if layer in self.fading:  # the step's first micro-batch
                self.share = self.lambda_sim if G.any() else 1.0
                G *= 1 - self.share
            g = grad[:, : len(G[at])].to(G.dtype)  # [tokens, k]
            G[at] += self.share * g.T @ g
        super().add(layer, h, grad)

    def examine(self):
        if self.method.score is not None and not self.G:
            super().examine()
        for G, C, S in zip(self.G, self.C, self.scores.split(self.widths)):
            here = (S != -1).nonzero().squeeze(1)  # [k]
            S[here] = one_by_one(G[here[:, None], here], C[here[:, None], here])

    def operate(self, kept):
        of_layers = (x.split(self.widths) for x in (self.scores, kept))
        for G, C, S, stays in zip(self.G, self.C, *of_layers):
            lost = (~stays & (S != -1)).nonzero().squeeze(1)  # [l]
            for side in (G, G.T):  # g goes with W2's columns
                take_over(side, C, stays.nonzero().squeeze(1), lost)
        if self.takes_over:
            super().operate(kept)
        else:
            self.scores[~kept] = -1.0  # they have left


@contextmanager
def registered():
    """While open, `train` has these methods."""
    with patch.dict(METHODS, PARTS), patch.object(train, "Pruner", PartPruner):
        yield


@registered()
def main():
    train.main()


if __name__ == "__main__":
    main()

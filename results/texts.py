"""Texts that a model writes, and their scores, the way they are usual for E2E and SAMSum.

For E2E that is beam search without repeated n-grams, which nothing else here needs.
"""

from itertools import zip_longest
from statistics import fmean

import torch

import data
from model import prepare


def write_texts(model, examples, prompts=0, beams=1):
    """What the model writes, a line each, to the first `prompts` distinct prompts (0: all), and
    their references. Greedily or by beam search, at most as long as the longest target."""
    def line(text):
        return " ".join(text.split())

    tokenizer, longest = data.tokenizer(model.config.vocab_size), max(map(len, examples.targets))
    chosen, rows, written = examples.distinct()[: prompts or None], max(1, 64 // beams), {}
    order = sorted(chosen, key=lambda i: len(examples.prompts[i]))
    for start in data.bar("writing", of=range(0, len(order), rows)):
        indices = order[start : start + rows]
        batch = [examples.prompts[i] for i in indices]
        if beams == 1:
            new = model.generate(batch, longest, temperature=0, eot=tokenizer.eot)
        else:  # with the settings that are usual for E2E
            new = beam_search(model, batch, longest, beams, length_penalty=0.9, no_repeat_ngram=4,
                              eot=tokenizer.eot)
        written |= {i: line(tokenizer.decode(ids)) for i, ids in zip(indices, new)}
    return [written[i] for i in chosen], [[*map(line, examples.references[i])] for i in chosen]


def text_scores(written, references):
    """BLEU of the corpus (sacrebleu, 0 to 100) and mean ROUGE F-measures to the best reference."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(texts, text) for text, texts in zip(written, references)]
    values = {name: fmean(score[name].fmeasure for score in scores) for name in scorer.rouge_types}
    # sacrebleu wants all first references, then all second ones, ...; None where there is none.
    return values | {"bleu": corpus_bleu(written, [*zip_longest(*references)]).score}


@torch.no_grad()
def beam_search(model, prompts, max_new_tokens, beams, length_penalty=1.0, no_repeat_ngram=0,
                eot=None):
    """`prompts`, lists of token ids, continued as by `GPT.generate`, but by what beam search finds
    of highest log-probability / tokens^length_penalty, `eot` counted; returns the new tokens.

    It keeps a prompt's `beams` likeliest unfinished continuations and its `beams` best finished
    ones, until the likeliest of the former, were it to end now, would not be among the latter. No
    `no_repeat_ngram` tokens in a row (0: no limit) come twice in a prompt with its continuation.
    Raises ValueError.
    """
    if beams < 1:
        raise ValueError(f"{beams} beams find nothing: allowed are beams >= 1")
    room, live, idx, cache = prepare(model, prompts, max_new_tokens)
    if not live:
        return [[] for _ in prompts]
    T, vocab = idx.size(1), model.config.vocab_size
    finished = [[(-torch.inf, [])] * beams for _ in prompts]  # (score, tokens), best first
    logits = model.next_logits(idx, cache)  # [prompts, V]
    # From here on B = prompts * beams, those of a prompt side by side. They start out the same:
    # only the first may be continued.
    rows = [p for p in range(len(live)) for _ in range(beams)]
    idx, logits = idx[rows], logits[rows]  # [B, T] [B, V]
    cache.select(rows)
    scores = logits.new_tensor(([0] + [-torch.inf] * (beams - 1)) * len(live))  # [B]
    for n in range(1, max(room) + 1):  # the n-th new token
        log_probs = ban_repeats(logits.log_softmax(-1), idx, no_repeat_ngram)  # [B, V]
        totals = (scores[:, None] + log_probs).view(len(live), -1)  # [prompts, beams * V]
        best, at = totals.topk(2 * beams)  # [prompts, 2 * beams]: at most one of a beam ends
        going, chosen = [], []
        for p, (i, *candidates) in enumerate(zip(live, best.tolist(), at.tolist())):
            unfinished = []
            for rank, (score, where) in enumerate(zip(*candidates)):
                row, token = p * beams + where // vocab, where % vocab
                if token != eot and n < room[i]:
                    unfinished.append((score, row, token))
                elif rank < beams:
                    tokens = idx[row, T:].tolist() + [token] * (token != eot)
                    finished[i].append((score / n**length_penalty, tokens))
            finished[i] = sorted(finished[i], key=lambda pair: -pair[0])[:beams]
            if unfinished and unfinished[0][0] / n**length_penalty > finished[i][-1][0]:
                going.append(i)
                chosen += unfinished[:beams]
        if not going:
            break
        scores, rows, new = map(list, zip(*chosen))
        scores, new = logits.new_tensor(scores), idx.new_tensor(new)[:, None]  # [B] [B, 1]
        idx = torch.cat([idx[rows], new], dim=1)
        if going == live:  # rows change places within their prompt, which need not be copied
            cache.kv[..., T : cache.length, :] = cache.kv[:, :, rows, :, T : cache.length]
        else:
            cache.select(rows)
        live, logits = going, model.next_logits(new, cache)  # [B, V]
    return [of_prompt[0][1] for of_prompt in finished]


def ban_repeats(scores, idx, n):
    """`scores` [B, V], but -inf for tokens that would complete an n-gram which `idx` [B, T] has.

    -1 in `idx` is padding. Where all tokens would, none is banned: something has to come.
    """
    if not 0 < n <= idx.size(1):
        return scores
    ngrams = idx.unfold(1, n, 1)  # [B, T - n + 1, n]
    begin, end = ngrams[:, :, :-1], ngrams[:, :, -1]
    now = idx[:, None, idx.size(1) - n + 1 :]  # [B, 1, n - 1], what the next token would complete
    again = (begin == now).all(-1) & (end >= 0)  # [B, T - n + 1]
    banned = torch.zeros_like(scores, dtype=torch.bool)
    banned[again.nonzero()[:, 0], end[again]] = True
    return scores.masked_fill(banned & ~banned.all(-1, keepdim=True), -torch.inf)

"""The files of a model's tokenizer in Hugging Face's format: written into a run's folder, and
looked at where a model comes with some. Texts are read by `data.tokenizer` alone."""

import json
from pathlib import Path

import data
from model import whole

FILES = ("tokenizer.json", "vocab.json")
END = "<|endoftext|>"


def letters():
    """GPT-2's letter for each byte, so that JSON can hold tokens that are no text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)}


def halves(token, ranks):
    """The two tokens that were joined to make `token` (bytes), by the `ranks` of all."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1),
                key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def ranks_of(vocab_size):
    """{a token's bytes: its id} of the tokenizer that `data.tokenizer` gives, or raises."""
    data.tokenizer(vocab_size)  # raises for another size, or if GPT-2's is out of reach
    if vocab_size != 50257:
        return {bytes([byte]): byte for byte in range(256)}
    import tiktoken

    return tiktoken.get_encoding("gpt2")._mergeable_ranks


def vocabulary(ranks):
    """{a token as tokenizer.json writes it: its id}, without the end of text."""
    letter = letters()
    return {"".join(map(letter.get, token)): i for token, i in ranks.items()}


def tokenizer_json(vocab_size):
    """What tokenizer.json says of the tokenizer that `data.tokenizer` gives, or raises."""
    eot, ranks = vocab_size - 1, ranks_of(vocab_size)
    vocab = vocabulary(ranks)
    texts = dict(zip(ranks, vocab))  # in the same order
    longer = (token for token in sorted(ranks, key=ranks.get) if len(token) > 1)
    merges = [" ".join(map(texts.get, halves(token, ranks))) for token in longer]
    bytewise = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                    use_regex=vocab_size == 50257)  # False: nothing is split into words
    end = dict(id=eot, content=END, single_word=False, lstrip=False, rstrip=False,
               normalized=False, special=True)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                 vocab=vocab | {END: eot}, merges=merges)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[end], normalizer=None,
                pre_tokenizer=bytewise, post_processor=None, decoder=bytewise, model=model)


def write_tokenizer(folder, vocab_size, n_positions):
    """Write the files of `data.tokenizer`, by which a model was trained, into `folder`. What the
    model that it started from has there is not copied: that may be damaged, or another's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=END, eos_token=END,
                    pad_token=END, model_max_length=n_positions,
                    clean_up_tokenization_spaces=False)
    for name, content in (("tokenizer.json", tokenizer_json(vocab_size)),
                          ("tokenizer_config.json", settings)):
        with whole(folder / name) as file:
            file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tokenizer(folder, vocab_size):
    """ValueError if the model in `folder` comes with another vocabulary than `data.tokenizer`'s:
    it would read other tokens than it was trained on. Where there is none, none is known."""
    file = next((Path(folder, name) for name in FILES if Path(folder, name).exists()), None)
    if file is None:
        return
    ours, usual = vocabulary(ranks_of(vocab_size)), "GPT-2's" if vocab_size == 50257 else "bytes"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        its = content["model"]["vocab"] if file.name == FILES[0] else content
        same = ours.items() <= its.items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged, or of another kind than {usual}: put it back, or "
                         f"remove it to have texts read as {usual}") from error
    if not same:
        raise ValueError(f"{file} is another tokenizer than {usual}, as which texts are read here: "
                         "take a model that was trained with that")

"""A CLIP tokenizer in which every word of the embedded world is one token."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffusion_grpo.shapes.captions import VOCABULARY

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def _byte_symbols() -> list[str]:
    """One printable character for each byte, in the order of CLIP's vocabulary.

    Printable Latin-1 bytes stand for themselves; the others are moved to U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is a single token.

    Applying the merges in the order in which they were learned repeats the learning on each word,
    so every word is certain to end as one token. Ties go to the alphabetically first pair.

    Args:
        words: Lower-case ASCII words.

    Returns:
        Merges in order of priority.
    """
    pieces = [[*word[:-1], word[-1] + _WORD_END] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(p for piece in pieces for p in zip(piece, piece[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for piece in pieces:
            i = 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == best:
                    piece[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def write_tokenizer(directory: str | Path, model_max_length: int = 16) -> int:
    """Write the files that `transformers.CLIPTokenizer.from_pretrained(directory)` reads.

    Any other text becomes byte-level pieces. The end token has the highest id, as CLIP's pooling
    expects, and is the padding token too, as in Stable Diffusion 1.

    Args:
        directory: Where to write; created if missing.
        model_max_length: Tokens a caption, start and end included.

    Returns:
        The number of tokens in the vocabulary.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    symbols = _byte_symbols()
    merges = learn_merges(VOCABULARY)
    tokens = [*symbols, *(s + _WORD_END for s in symbols), *map("".join, merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **special,
    }
    texts = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return len(vocabulary)

"""Small tokenizers in the forms in which models have them, as directories that `AutoTokenizer` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LINES = [
    f"Chapter {i}. It was the best of times, it was the worst of times, it was the age of {i}." for i in range(120)
]
_SPECIAL = ["<unk>", "<s>", "</s>"]


def _directory(path: Path, kind: str, **fields: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **fields}))
    return path


def _sentencepiece(path: Path, kind: str, file: str, **options: Any) -> Path:
    _directory(path, kind)
    with (path / file).open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=model, vocab_size=90, minloglevel=2, num_threads=1, **options
        )
    return path


def _wordpiece(path: Path) -> Path:
    words = sorted({word.strip(".,").lower() for line in LINES for word in line.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,", *words]
    (_directory(path, "BertTokenizer") / "vocab.txt").write_text("\n".join(vocabulary))
    return path


def _slow_bpe(path: Path) -> Path:
    letters = sorted({letter for line in LINES for letter in line} - {" "})
    vocabulary = ["<unk>", *(f"{letter}@@" for letter in letters), *letters, "th@@", "the"]
    _directory(path, "CTRLTokenizer")
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "SentencePiece of Llama": lambda path: _sentencepiece(
        path, "LlamaTokenizer", "tokenizer.model", model_type="bpe", byte_fallback=False
    ),
    "SentencePiece of T5": lambda path: _sentencepiece(path, "T5Tokenizer", "spiece.model", pad_id=3),
    "WordPiece": _wordpiece,
    "slow SentencePiece": lambda path: _sentencepiece(path, "BertGenerationTokenizer", "spiece.model"),
    "slow BPE": _slow_bpe,
    "slow, of bytes": lambda path: _directory(path, "ByT5Tokenizer"),
}


def characters(letters: str, unknown: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters, which drops others if there is no unknown token."""
    vocabulary = {
        letter: i for i, letter in enumerate([*dict.fromkeys([*special.values(), *filter(None, [unknown])]), *letters])
    }
    model = models.BPE(vocabulary, []) if unknown is None else models.WordLevel(vocabulary, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, **({} if unknown is None else {"unk_token": unknown})
    )

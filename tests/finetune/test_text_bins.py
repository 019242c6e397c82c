"""Files of token ids that are not what a model's vocabulary makes one expect."""

import numpy as np
import pytest

from finetune.recipe import Text
from finetune.text import TextError, load_text

WORDS = np.random.default_rng(0).integers(1, 280, 20_000)


def refuse(path, tokenizer, vocab_size, match, **options):
    with pytest.raises(TextError, match=match) as caught:
        load_text(Text(str(path), **options), tokenizer, 16, vocab_size)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("token_dtype", ["auto", "uint16", "uint32"])
@pytest.mark.parametrize(
    ("kind", "vocab_size", "looks"),
    [
        ("<i8", 300, "int64, which is not supported"),
        ("<u8", 50_257, "int64, which is not supported"),
        ("<i8", 151_936, "int64, which is not supported"),
        ("|u1", 200, "uint8, which is not supported"),
        (">i4", 300, "uint32, big-endian, which is not supported"),
        (">u2", 300, "uint16, big-endian"),
        (">i8", 50_257, "int64, big-endian"),
    ],
)
def test_numbers_of_a_type_that_is_not_read(kind, vocab_size, looks, token_dtype, tmp_path, tokenizer):
    (WORDS % min(vocab_size, 280)).astype(kind).tofile(tmp_path / "text.bin")
    refuse(tmp_path / "text.bin", tokenizer, vocab_size, f"as in a file of {looks}", token_dtype=token_dtype)


@pytest.mark.parametrize(
    ("kind", "asked", "vocab_size"),
    [("<i4", "auto", 300), ("<u4", "uint16", 50_257), ("<u2", "uint32", 300), ("<i4", "auto", 65_536)],
)
def test_numbers_of_the_other_type(kind, asked, vocab_size, tmp_path, tokenizer):
    WORDS.astype(kind).tofile(tmp_path / "text.bin")
    name = np.dtype(kind).name.replace("int32", "uint32").replace("uu", "u")
    refuse(tmp_path / "text.bin", tokenizer, vocab_size, f"Set text.token_dtype to {name}", token_dtype=asked)
    splits = load_text(Text(str(tmp_path / "text.bin"), token_dtype=name), tokenizer, 16, vocab_size)
    assert splits.train.blocks.ravel()[:100].tolist() == WORDS[:100].tolist()


def test_the_line_that_a_message_gives_converts_the_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WORDS.tofile("int64.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(WORDS)
    (tmp_path / "llm.c.bin").write_bytes(header.tobytes() + WORDS.astype(np.uint16).tobytes())
    header[0] = 20240801
    (tmp_path / "llama.bin").write_bytes(header.tobytes() + WORDS.astype(np.uint32).tobytes())
    for name, vocab_size in (("int64.bin", 300), ("llm.c.bin", 50_257), ("llama.bin", 128_256)):
        with pytest.raises(TextError) as caught:
            load_text(Text(name), tokenizer, 16, vocab_size)
        eval(str(caught.value).split("`")[1], {"np": np})
        splits = load_text(Text("tokens.bin"), tokenizer, 16, vocab_size)
        assert splits.train.blocks.ravel()[:100].tolist() == WORDS[:100].tolist()


def test_what_is_not_numbers(tmp_path, tokenizer):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    np.save(tmp_path / "array", WORDS)
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    refuse(tmp_path / "array.bin", tokenizer, 300, r"\.npy file")
    refuse(file("text.bin", b"It was the best of times.\n" * 99), tokenizer, 50_257, "looks like text")
    refuse(file("zeros.bin", bytes(9999)), tokenizer, 50_257, "all zeros")
    refuse(file("empty.bin", b""), tokenizer, 50_257, "is empty")
    refuse(
        file("odd.bin", np.arange(300, dtype=np.uint16).tobytes() + b"x"), tokenizer, 300, "not a multiple of uint16"
    )
    labels = np.where(WORDS % 7 == 0, -100, WORDS)
    refuse(file("labels.bin", labels.astype(np.int32).tobytes()), tokenizer, 2**17, "negative numbers, such as -100")


def test_ids_that_only_look_odd_are_read(tmp_path, tokenizer):
    """Many zeros, few numbers, the largest id there is, ids beyond the vocabulary of another model."""
    for numbers, vocab_size in (
        (np.where(WORDS % 3, WORDS, 0), 300),
        (np.resize([65_535, 1, 2], 20_000), 65_536),
        (np.resize([5, 0, 7], 20_000), 50_257),
    ):
        numbers.astype(np.uint16).tofile(tmp_path / "text.bin")
        splits = load_text(Text(str(tmp_path / "text.bin")), tokenizer, 16, vocab_size)
        assert splits.train.blocks.ravel()[:100].tolist() == numbers[:100].tolist()
    (WORDS * 200).astype(np.uint16).tofile(tmp_path / "text.bin")
    refuse(tmp_path / "text.bin", tokenizer, 4096, "beyond the model's vocabulary")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "test", "eval"])
def test_the_file_beside_train_is_held_out(name, tmp_path, tokenizer):
    WORDS[:10_000].astype(np.uint16).tofile(tmp_path / "train.bin")
    WORDS[10_000:].astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    splits = load_text(Text(str(tmp_path)), tokenizer, 16, 300)
    assert splits.train.blocks.ravel().tolist() == WORDS[:10_000].tolist()
    assert splits.held_out.blocks.ravel()[:3000].tolist() == WORDS[10_000:13_000].tolist()

"""Reports of models and tokenizers that some analysis has nothing to say of, and of models that do not fit together."""

import random
import warnings

import pandas as pd
import pytest
from models import random_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis import load_trio, report
from analysis.__main__ import main
from finetune import checkpoint
from finetune.errors import CheckpointError

SHARED_IDS = "The vocabularies differ"


def letters(alphabet: str, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, *names.values()])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save(directory, name, tokenizer, family="gpt2", **config):
    """Save a model as `directory`/`name`, LN-free unless it is called otherwise."""
    config = {"vocab_size": len(tokenizer)} | config
    model = random_model(family, seed=len(name), std=0.2, frozen=name.startswith("ln_free"), **config)
    checkpoint.save(model, directory / name, tokenizer)
    return str(directory / name)


def write(directory, alphabet, count=3000):
    draw = random.Random(0)
    path = directory / "text.txt"
    path.write_text("".join(draw.choice(alphabet) for _ in range(count)))
    return str(path)


ODD = {
    "two letters, one layer, one head": ("AB", "gpt2", {"n_layer": 1, "n_head": 1, "n_embd": 3, "n_positions": 2}),
    "DNA": ("ACGT", "gpt2", {"n_positions": 64}),
    "DNA in a rotary family": ("ACGT", "gpt_neox", {"num_hidden_layers": 1, "max_position_embeddings": 16}),
    "protein": ("ACDEFGHIKLMNPQRSTVWY", "llama", {"max_position_embeddings": 30}),
    "a short context": ("abcdefghij .\n", "gpt2", {"n_positions": 8}),
    "one width": ("ACGT", "gpt2", {"n_embd": 2, "n_head": 1, "n_inner": 1, "n_positions": 5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD)
def test_a_section_that_cannot_be_made_is_left_out_with_the_reason(kind, tmp_path):
    alphabet, family, config = ODD[kind]
    tokenizer = letters(alphabet)
    original = save(tmp_path, "original", tokenizer, family, **config)
    ln_free = save(tmp_path, "ln_free", tokenizer, family, **config)
    text = write(tmp_path, alphabet)
    page = report.run(original=original, ln_free=ln_free, text=(text,), tokens=200, out=tmp_path / "r")
    html = page.read_text()
    assert html.count("<strong>Left out:</strong>") == 1
    assert "Left out:</strong> " in html.partition('<section id="patching">')[2].partition("</section>")[0]
    made = {path.name.partition("-")[0] for path in page.parent.glob("*.csv")}
    assert made == {analysis.name for analysis in report.ANALYSES} - {"patching"}


def test_the_reason_is_an_error_where_nothing_else_is_left(tmp_path):
    tokenizer = letters("ACGT")
    trio = load_trio(random_model(vocab_size=4), None, random_model(vocab_size=4, frozen=True), tokenizer)
    samples = {"text": report.read_text(write(tmp_path, "ACGT"), trio["original"], 60)}
    with pytest.raises(report.ReportError, match=r"no analysis suits .* Patching: .*names"):
        report.write(trio, samples, tmp_path / "r", only=("patching",))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("padded", ["original", "ln_free"])
def test_of_a_padded_vocabulary_the_shared_ids_are_compared(family, padded, tmp_path):
    tokenizer = letters("ACGT" + "efghij", eos_token="<e>")
    sizes = {name: {"vocab_size": 64 if name == padded else 11} for name in ("original", "ln_free")}
    text = write(tmp_path, "ACGT")
    named = {name: save(tmp_path, name, tokenizer, family, **size) for name, size in sizes.items()}
    with pytest.warns(UserWarning, match="first 11 tokens are compared"):
        models = load_trio(named["original"], None, named["ln_free"])
    assert {model.cfg.d_vocab for model in models.values()} == {11}
    tokens = report.read_text(text, models["original"], 44).tokens
    plain = checkpoint.load(named[padded])
    shown, expected = models[padded](tokens).log_softmax(-1), plain(tokens).logits[..., :11].log_softmax(-1)
    assert (shown - expected).abs().max() < 1e-4
    with pytest.warns(UserWarning, match=SHARED_IDS):
        page = report.run(**named, text=(text,), tokens=60, only=("loss", "other_text"), out=tmp_path / "r")
    assert page.is_file()


def test_the_shorter_context_is_used(tmp_path):
    tokenizer = letters("ACGT")
    text = write(tmp_path, "ACGT")
    original = save(tmp_path, "original", tokenizer, n_positions=20)
    ln_free = save(tmp_path, "ln_free", tokenizer, n_positions=9)
    named = {"original": original, "ln_free": ln_free, "text": (text,), "only": ("loss",), "tokens": 90}
    page = report.run(**named, out=tmp_path / "r")
    assert pd.read_csv(page.parent / "loss-position.csv")["position"].max() == 8
    assert ", context=9)" in page.read_text().replace("&#39;", "'")
    with pytest.raises(report.ReportError, match="context is 12, but one of the models takes at most 9"):
        report.run(**named, context=12, out=tmp_path / "r2")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"n_layer": 3}, r"ln_free differs from original in layers \(3 against 2\)"),
        ({"n_embd": 18}, r"width \(18 against 12\).*neurons of MLPs \(72 against 48\)"),
        ({"n_head": 2}, r"heads \(2 against 3\), width of heads \(6 against 4\)"),
        ({"n_inner": 7}, r"in neurons of MLPs \(7 against 48\)"),
    ],
)
def test_what_differs_is_said_in_a_line(config, said):
    with pytest.raises(CheckpointError, match=said):
        load_trio(random_model(), None, random_model(frozen=True, **config))


def test_another_family_or_tokenizer_is_said_in_a_line(tmp_path):
    with pytest.raises(CheckpointError, match="ln_free is a LlamaForCausalLM, unlike the original"):
        load_trio(random_model(), None, random_model("llama", frozen=True))
    original = save(tmp_path, "original", letters("ACGT"))
    ln_free = save(tmp_path, "ln_free", letters("ATGC"))
    with pytest.raises(CheckpointError, match="a different tokenizer from original: 2 of 4 tokens differ, such as 1"):
        load_trio(original, None, ln_free)
    with pytest.raises(SystemExit, match=r"error: ln_free has a different tokenizer"):
        main(["report", "--original", original, "--ln-free", ln_free, "--out", str(tmp_path / "r")])


def test_models_given_loaded_are_checked_too(tmp_path):
    first, second = (load_trio(random_model(n_layer=n), None, random_model(n_layer=n, frozen=True)) for n in (1, 2))
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="in layers"):
        report.write({"original": first["original"], "ln_free": second["ln_free"]}, {}, tmp_path / "r")

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, rel_entr

from finetune import evaluate
from finetune.evaluate import compare, js_divergence, kl_divergence, mean_and_error, measure_documents, measure_tokens
from finetune.sites import Sites
from finetune.text import Blocks

EOT = 0


@pytest.fixture
def models(make_gpt2):
    return {"original": make_gpt2(seed=0), "control": make_gpt2(seed=1), "ln_free": make_gpt2(seed=2)}


@pytest.fixture
def blocks():
    tokens = np.random.default_rng(0).integers(1, 23, 11 * 9).astype(np.uint16)
    tokens[[4, 13, 14, 40, 60, 61, 80]] = EOT
    return Blocks(tokens, 11, EOT)


def log_probs64(model, blocks) -> np.ndarray:
    tokens = torch.from_numpy(blocks.blocks.astype(np.int64))
    with torch.no_grad():
        return log_softmax(model.double()(tokens).logits.numpy(), -1)


def test_measures_are_scipys(models, blocks):
    found = measure_tokens(models, blocks)
    log_probs = {name: log_probs64(model, blocks)[:, :-1] for name, model in models.items()}
    p = np.exp(log_probs["original"])
    for name in models:
        q = np.exp(log_probs[name])
        surprise = [[-row[t] for row, t in zip(*pair, strict=False)]
                    for pair in zip(log_probs[name], blocks.blocks[:, 1:], strict=True)]  # fmt: skip
        expected = {"loss": surprise, "kl": rel_entr(p, q).sum(-1), "jsd": jensenshannon(p, q, axis=-1) ** 2}
        for measure, values in expected.items():
            assert found[name][measure].dtype == np.float64
            np.testing.assert_allclose(found[name][measure], values, rtol=1e-5, atol=1e-6, err_msg=measure)


def test_bfloat16_loses_nothing_to_what_is_added_to_all_logits(make_gpt2, blocks):
    """A direction of the residual that adds −65 to all logits, as GPT-2 has one."""

    def model(offset: float, dtype: torch.dtype):
        made = make_gpt2(tie_word_embeddings=False)
        norm, unembedding = made.transformer.ln_f, made.get_output_embeddings()
        norm.weight.data[0], norm.bias.data[0] = 0, 8
        unembedding.weight.data[:, 0] += offset / 8
        for parameter in made.parameters():  # as bfloat16 has it
            parameter.data = parameter.data.bfloat16().float()
        return made.to(dtype)

    found = {
        (offset, dtype): measure_tokens({"original": model(offset, dtype)}, blocks)["original"]["loss"].mean()
        for offset in (0.0, -64.0)
        for dtype in (torch.bfloat16, torch.float32)
    }
    change = found[-64.0, torch.bfloat16] - found[0.0, torch.bfloat16]
    assert change == pytest.approx(found[-64.0, torch.float32] - found[0.0, torch.float32], abs=1e-3)


def test_divergences_of_unlike_distributions_stay_finite():
    p, q = torch.tensor([[0.0, -300.0, -300.0], [-300.0, 0.0, -300.0]]).log_softmax(-1)
    assert kl_divergence(p, q).item() == pytest.approx(300)
    assert js_divergence(p, q).item() == pytest.approx(np.log(2))


def test_a_model_does_not_differ_from_itself(models, blocks):
    same = {"original": models["original"], "control": models["original"], "ln_free": models["original"]}
    frame = compare(measure_documents(same, blocks)).set_index("model")
    np.testing.assert_allclose(frame[["kl", "jsd", "gap"]].to_numpy(), 0, atol=1e-7)
    assert frame.loss.nunique() == 1


def test_no_number_depends_on_the_batch_size(models, blocks, monkeypatch):
    whole = measure_tokens(models, blocks)
    for size in (1, 2, 4):
        monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", size * 11 * 23)
        for name, measures in measure_tokens(models, blocks).items():
            for measure, values in measures.items():
                np.testing.assert_allclose(values, whole[name][measure], rtol=1e-5, atol=1e-6)


def test_blocks_are_taken_a_few_at_a_time(models, blocks, monkeypatch):
    sizes = []
    models["original"].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", 4 * 11 * 23)
    measure_tokens(models, blocks)
    assert sizes == [4, 4, 1]


def test_dropout_does_not_measure(models, blocks):
    expected = measure_tokens(models, blocks)
    for model in models.values():
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        model.train()
    found = measure_tokens(models, blocks)
    np.testing.assert_array_equal(found["ln_free"]["loss"], expected["ln_free"]["loss"])


def test_measuring_leaves_every_buffer_as_it_was(models, blocks):
    sites = Sites(models["ln_free"], EOT)
    before = {name: buffer.clone() for name, buffer in sites.model.named_buffers()}
    measure_tokens(models, blocks)
    for name, buffer in sites.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_error_of_equally_long_documents_is_that_of_their_means():
    values = np.random.default_rng(0).normal(3, 1, (40, 6)) + np.random.default_rng(1).normal(0, 1, (40, 1))
    mean, error = mean_and_error(values.ravel(), np.repeat(np.arange(40), 6))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(stats.sem(values.mean(1)))
    assert error > 1.5 * stats.sem(values.ravel())


def test_the_error_of_documents_of_any_length_is_that_of_leaving_out_each():
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 60, 400)
    documents = np.repeat(rng.permutation(400), lengths)
    values = np.repeat(rng.normal(0, 1, 400), lengths) + rng.normal(0, 2, lengths.sum())
    without = np.array([values[documents != document].mean() for document in range(400)])
    jackknife = np.sqrt(399 / 400 * np.square(without - without.mean()).sum())
    assert mean_and_error(values, documents)[1] == pytest.approx(jackknife, rel=0.02)


def test_one_document_has_no_error():
    mean, error = mean_and_error(np.array([1.0, 3.0]), np.array([0, 0]))
    assert mean == 2
    assert np.isnan(error)


def test_the_table_averages_over_tokens_and_pairs_the_gap(models, blocks):
    frame = compare(measure_documents(models, blocks)).set_index("model")
    measured = measure_tokens(models, blocks)
    documents = blocks.document_ids()[:, :-1].ravel()
    assert list(frame.index) == ["original", "control", "ln_free"]
    for name in models:
        for measure in ("loss", "kl", "jsd"):
            assert frame[measure][name] == pytest.approx(measured[name][measure].mean())
    difference = (measured["ln_free"]["loss"] - measured["control"]["loss"]).ravel()
    found = frame["gap"]["ln_free"], frame["gap_error"]["ln_free"]
    assert found == pytest.approx(mean_and_error(difference, documents))
    assert frame["gap"]["ln_free"] == pytest.approx(frame["loss"]["ln_free"] - frame["loss"]["control"])
    assert set(frame.tokens) == {9 * 10}
    assert set(frame.documents) == {len(set(documents.tolist()))}


def test_without_a_control_there_is_no_gap(models, blocks):
    del models["control"]
    frame = compare(measure_documents(models, blocks, reference="ln_free")).set_index("model")
    assert frame[["gap", "gap_error"]].isna().all(axis=None)
    assert frame["kl"]["ln_free"] == pytest.approx(0, abs=1e-7) != frame["kl"]["original"]

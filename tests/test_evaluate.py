import math

import pytest
import torch
from families import FAMILIES, build_model, tokenizer

from lorafit.batch import collate
from lorafit.evaluate import Evaluator, RowScore, completions, paired, prompts, summed
from lorafit.rows import IGNORED, Row, RowSet
from lorafit.step import Forward


def evaluator(model, rows, task="causal", size=3):
    return Evaluator(
        RowSet.of(rows), Forward.of(model, task), size, tokenizer(task == "masked"), 896, torch.device("cpu")
    )


ROWS = [
    Row(tuple(range(5, 5 + n)), (IGNORED, IGNORED, *range(7, 5 + n)), "x") for n in (9, 4, 17, 6, 12, 30, 3)
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_scores_the_same_alone_and_padded_beside_others(family):
    """To 1e-5 a token, in every family; what `Evaluator` runs together is padded far less."""
    model, task = build_model(family), FAMILIES[family].task
    found = evaluator(model, ROWS, task)
    rows = [found._masked(n) for n in range(len(ROWS))] if task == "masked" else ROWS
    together = collate(rows, 0, task)
    losses = found.forward.scores(model, together)[0].split(together.counts)
    for row, loss in zip(rows, losses, strict=True):
        alone = found.forward.scores(model, collate([row], 0, task))[0]
        torch.testing.assert_close(alone, loss, atol=1e-5, rtol=0)


def test_the_loss_is_that_of_transformers():
    model = build_model("gpt2")
    row = ROWS[2]
    ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
    wanted = model(input_ids=ids, labels=labels).loss.item()
    assert evaluator(model, [row]).loss(model).loss == pytest.approx(wanted, abs=1e-5)


def test_a_masked_model_hides_the_same_tokens_each_time():
    model = build_model("bert")
    found = evaluator(model, ROWS, "masked")
    assert found.scores(model) == found.scores(model)
    alone = [(s.tokens, s.correct) for s in evaluator(model, ROWS, "masked", size=1).scores(model)]
    assert alone == [(s.tokens, s.correct) for s in found.scores(model)]  # whatever the batch
    for score, row in zip(found.scores(model), ROWS, strict=True):
        assert 1 <= score.tokens <= row.supervised


def test_paired_against_the_arithmetic():
    base = [RowScore(10.0, 4, 1), RowScore(6.0, 2, 1), RowScore(9.0, 3, 0)]
    other = [RowScore(8.0, 4, 3), RowScore(5.0, 2, 1), RowScore(9.0, 3, 3)]
    found = paired("a", base, other)
    assert found.delta == pytest.approx(-3 / 9) and found.loss == pytest.approx(22 / 9)
    assert found.delta == pytest.approx(found.loss - summed(base).loss)
    residuals = [-2 + 4 / 3, -1 + 2 / 3, 0 + 1]
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 9)
    assert found.accuracy == pytest.approx(7 / 9) and found.perplexity == pytest.approx(math.exp(22 / 9))
    assert paired("a", base[:1], other[:1]).stderr == 0


def test_the_standard_error_is_that_of_resampled_rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (400,), generator=generator)
    gains = torch.randn(400, generator=generator) * tokens * 0.1 - 0.3 * tokens
    base = [RowScore(100.0, int(n), 0) for n in tokens]
    other = [RowScore(100.0 + float(g), int(n), 0) for g, n in zip(gains, tokens, strict=True)]
    draws = torch.randint(400, (2000, 400), generator=generator)
    resampled = gains[draws].sum(1) / tokens[draws].sum(1)
    assert paired("a", base, other).stderr == pytest.approx(float(resampled.std()), rel=0.1)


def test_several_end_tokens_end_a_completion():
    model = build_model("llama")
    model.generation_config.eos_token_id = [1, 2]
    said = completions(model, evaluator(model, ROWS), 2)
    assert len(said) == 2 and len(prompts(evaluator(model, ROWS), 2)) == 2


def test_perplexity_does_not_overflow():
    assert summed([RowScore(1e6, 1, 0)]).perplexity == math.inf

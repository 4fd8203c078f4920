import math

import pytest
import torch
from families import FAMILIES, build_model, tokenizer

from lorafit.data.collate import collate_rows
from lorafit.data.rows import IGNORED, Row, RowSet
from lorafit.evaluate.paired import RowScore, paired_score, summed
from lorafit.evaluate.score import Evaluator, short_answer
from lorafit.forward.head import Forward


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
    rows = [found.masked(n) for n in range(len(ROWS))] if task == "masked" else ROWS
    together = collate_rows(rows, 0, task)
    losses = found.forward.scores(model, together)[0].split(together.counts)
    for row, loss in zip(rows, losses, strict=True):
        alone = found.forward.scores(model, collate_rows([row], 0, task))[0]
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
    found = paired_score("a", base, other)
    assert found.delta == pytest.approx(-3 / 9) and found.loss == pytest.approx(22 / 9)
    assert found.delta == pytest.approx(found.loss - summed(base).loss)
    residuals = [-2 + 4 / 3, -1 + 2 / 3, 0 + 1]
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 9)
    assert found.accuracy == pytest.approx(7 / 9) and found.perplexity == pytest.approx(math.exp(22 / 9))
    assert paired_score("a", base[:1], other[:1]).stderr == 0


def test_the_standard_error_is_that_of_resampled_rows():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (400,), generator=generator)
    gains = torch.randn(400, generator=generator) * tokens * 0.1 - 0.3 * tokens
    base = [RowScore(100.0, int(n), 0) for n in tokens]
    other = [RowScore(100.0 + float(g), int(n), 0) for g, n in zip(gains, tokens, strict=True)]
    draws = torch.randint(400, (2000, 400), generator=generator)
    resampled = gains[draws].sum(1) / tokens[draws].sum(1)
    assert paired_score("a", base, other).stderr == pytest.approx(float(resampled.std()), rel=0.1)


def test_the_interval_is_that_of_normal_theory_where_rows_are_many():
    generator = torch.Generator().manual_seed(1)
    gains = (torch.randn(300, generator=generator) - 0.5).tolist()
    base = [RowScore(50.0, 10, 0)] * 300
    found = paired_score("a", base, [RowScore(50.0 + g, 10, 0) for g in gains])
    assert found.low < found.delta < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)
    same = paired_score("a", base, base)
    assert (same.delta, same.low, same.high) == (0, 0, 0)


def test_an_exact_match_is_what_greedy_decoding_says():
    """On real generation: a row counts where the model, decoding greedily, says its answer."""
    from lorafit.evaluate.generate import Generator, Sampling, row_prompts

    model = build_model("llama").eval()
    end = tokenizer().eos_token_id
    rows = []
    for number in range(6):
        prompt = [5 + number, 9, 30 + number]
        said = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0]
        answer = said[3:].tolist()
        if number % 2:
            answer[2] = (answer[2] + 1) % 800  # one other token
        rows.append(Row((*prompt, *answer), (IGNORED,) * 3 + tuple(answer), "x"))
    found = evaluator(model, rows)
    scores = found.scores(model)
    assert [s.exact for s in scores] == [True, False] * 3 and all(s.short for s in scores)
    assert summed(scores).exact == 0.5
    generator = Generator(
        tokenizer(), found.forward, torch.device("cpu"), sampling=Sampling(max_new_tokens=4)
    )
    model.generation_config.eos_token_id = [end, 1, 2]
    read = tokenizer().decode
    for row, score, said in zip(
        rows, scores, generator.completions(model, row_prompts(found, 6)), strict=True
    ):
        whole = str(read(list(row.ids[3:]), skip_special_tokens=True))
        assert said.endswith("…") or end in row.ids  # cut: the model would go on
        assert (said.removesuffix("…") == whole) == score.exact or end in row.ids
    model.generation_config.eos_token_id = rows[0].ids[3]  # what the model says first ends its answer
    (said,) = generator.completions(model, row_prompts(found, 1))
    assert not said.endswith("…")


def test_what_counts_as_a_short_answer():
    def row(*learned):
        return Row(tuple(range(100)), tuple(n if n in learned else IGNORED for n in range(100)), "x")

    assert short_answer(row(97, 98, 99), "causal") and short_answer(row(0, 1), "seq2seq")
    assert not short_answer(row(90, 99), "causal")  # two answers
    assert not short_answer(row(*range(1, 50)), "causal")  # a text, no prompt
    assert not short_answer(row(*range(20, 100)), "causal")  # a long one


def test_perplexity_does_not_overflow():
    assert summed([RowScore(1e6, 1, 0)]).perplexity == math.inf

from dataclasses import replace

import pytest
import yaml

from lorafit.errors import RequestError
from lorafit.settings.precedence import derive_from_model, derive_from_rows, settle
from lorafit.settings.run_config import OPTIONS


@pytest.fixture(scope="module")
def demo_map():
    from lorafit.model.chart import map_of

    return map_of("demo")


def write(tmp_path, **data) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_flag_over_a_file_over_a_preset_over_a_default(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "roles: [q]\nlayers: high\nlora: {r: 4}\ntraining: {epochs: 7, weight_decay: 0.1, warmup: 0.2}\n"
    )
    file = write(tmp_path, preset=str(mine), epochs=5, weight_decay=0.2)
    config, preset = settle({"epochs": 2}, file)
    assert (config.epochs, config.weight_decay, config.warmup, config.seed) == (2, 0.2, 0.2, 0)
    assert (config.layers, config.rank) == ("high", 4) and preset.lora.r == 4
    origins = [config.origin[n] for n in ("epochs", "weight_decay", "warmup", "seed", "layers", "rank")]
    assert origins == ["flag", "file", "preset mine", "default", "preset mine", "preset mine"]


def test_rank_alpha_and_dropout_override_the_preset():
    _, preset = settle({"preset": "ffn", "rank": 3, "alpha": 5.0, "dropout": 0.1})
    assert (preset.lora.r, preset.lora.alpha, preset.lora.dropout) == (3, 5.0, 0.1)


def test_without_anything_basic_on_the_demo():
    config, preset = settle({})
    assert (config.model, preset.name, config.layers) == ("demo", "basic", "all")


def stored(tmp_path, flags, demo_map):
    """A run file as a run writes it."""
    config, _ = settle(flags)
    config = derive_from_rows(derive_from_model(config, demo_map), 44, 900)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.as_file(), sort_keys=False))
    return config, str(path)


def test_a_run_file_repeats_the_run(tmp_path, demo_map):
    first, path = stored(tmp_path, {"preset": "ffn", "layers": "high", "seed": 3, "output": "x"}, demo_map)
    again, _ = settle({}, path)
    again = derive_from_rows(derive_from_model(again, demo_map), 999, 5)
    assert replace(again, output=None, origin={}) == replace(first, output=None, origin={})
    assert again.output is None and again.origin["seed"] == "file"
    assert again.origin["learning_rate"].startswith("derived")


def test_what_came_from_a_preset_goes_with_it(tmp_path, demo_map):
    _, path = stored(tmp_path, {"preset": "ffn", "rank": 4}, demo_map)
    config, _ = settle({"preset": "attention"}, path)
    assert config.rank == 4 and config.alpha == 32 and config.origin["alpha"] == "preset attention"
    mine = tmp_path / "mine.yaml"
    mine.write_text("roles: [q]\nlayers: low\nlora: {alpha: 7}\ntraining: {epochs: 9}\n")
    config, _ = settle({"preset": str(mine)}, path)
    assert (config.alpha, config.layers, config.epochs) == (7, "low", 9)


def test_what_was_derived_is_derived_again_when_its_source_changes(tmp_path, demo_map):
    first, path = stored(tmp_path, {}, demo_map)
    config, _ = settle({"model": "other"}, path)
    assert config.learning_rate is None and config.max_length is None and config.batch_size is None
    config, _ = settle({"data": ("other.jsonl",)}, path)
    assert config.learning_rate == first.learning_rate and config.batch_size is None


def test_literal_modules_replace_the_roles():
    config, preset = settle({"modules": ("q_proj,v_proj", "o_proj")})
    assert config.modules == ("q_proj", "v_proj", "o_proj") and preset.modules == config.modules
    assert preset.roles == ()


def test_the_rate_follows_the_hidden_size(demo_map):
    config, _ = settle({})
    small = derive_from_model(config, demo_map)
    large = derive_from_model(config, replace(demo_map, hidden_size=4096))
    qwen = derive_from_model(config, replace(demo_map, hidden_size=4096, family="qwen3"))
    assert (small.learning_rate, large.learning_rate, qwen.learning_rate) == (0.0043, 0.00029, 0.00047)
    assert "hidden size 128" in small.why("learning_rate")


@pytest.mark.parametrize("tokens, rows", [(44, 32), (512, 4), (100_000, 1), (1, 32), (250, 8)])
def test_a_batch_is_about_two_thousand_tokens(tokens, rows):
    config, _ = settle({})
    assert derive_from_rows(config, tokens).batch_size == rows


@pytest.mark.parametrize(
    "rows, flags, epochs",
    [
        (900, {}, 3),
        (7_000, {}, 2),
        (100_000, {}, 1),
        (900, {"max_steps": 20}, 1),
        (900, {"max_steps": 200}, 7),
        (900, {"epochs": 5}, 5),
    ],
)
def test_epochs_make_about_250_steps(rows, flags, epochs):
    assert derive_from_rows(settle(flags)[0], 44, rows).epochs == epochs


def test_a_length_beyond_the_models_positions(demo_map):
    config, _ = settle({"max_length": 513})
    with pytest.raises(RequestError, match="513 is beyond the 512 positions"):
        derive_from_model(config, demo_map)


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1.0), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("batch_size", 0),
        ("max_length", 0), ("epochs", 0), ("rank", -2), ("dropout", 1.0), ("holdout", -0.1), ("holdout", 0.9),
        ("scheduler", "cosin"), ("dtype", "int8"), ("format", "xml"), ("seed", -1), ("warmup", -0.1), ("data", ("",)),
    ],
)  # fmt: skip
def test_out_of_bounds(name, value):
    with pytest.raises(RequestError) as error:
        settle({name: value})
    assert OPTIONS[name].flag in error.value.message and "it takes" in error.value.message


@pytest.mark.parametrize(
    "data, word",
    [
        ({"epoch": 3}, "did you mean `epochs`"), ({"epochs": "3"}, "it takes"), ({"epochs": True}, "it takes"),
        ({"origin": [1]}, "`origin`"), ({"learning_rate": 0}, "it takes"), ({"preset": "fnn"}, "`ffn`"),
    ],
)  # fmt: skip
def test_run_files_are_strict(tmp_path, data, word):
    with pytest.raises(RequestError) as error:
        settle({}, write(tmp_path, **data))
    assert word in f"{error.value.message} {error.value.hint}"


def test_output_resume_and_overwrite_are_never_read_back(tmp_path):
    config, _ = settle({}, write(tmp_path, output="x", resume=True, overwrite=True, layers=3))
    assert (config.output, config.resume, config.overwrite, config.layers) == (None, False, False, "3")

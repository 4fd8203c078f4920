"""A flag that changes what a value follows from has it derived again."""

import pytest

from lorafit.settings import OPTIONS, changed_settings, settle
from lorafit.settings.precedence import derive_from_rows


def recorded(tmp_path, **flags):
    """A run file of a run whose batch and epochs were derived."""
    import yaml

    config = derive_from_rows(settle({"max_length": 512, **flags})[0], 40.0, 100)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.as_file()))
    return config, str(path)


@pytest.mark.parametrize(
    "flag",
    [
        {"overflow": "split"},
        {"format": "text"},
        {"data": ("x.jsonl",)},
        {"max_length": 64},
        {"accumulate": 2},
    ],
)
def test_batch_and_epochs_follow_from_the_rows(tmp_path, flag):
    """`--overflow split` makes other rows of the same texts, as another format does."""
    config, path = recorded(tmp_path)
    assert config.batch_size and config.epochs
    same, _ = settle({"weight_decay": 0.5}, path)
    assert (same.batch_size, same.epochs) == (config.batch_size, config.epochs)
    other, _ = settle(flag, path)
    assert other.batch_size is None and other.epochs is None
    fixed, _ = settle({**flag, "batch_size": 3}, path)
    assert fixed.batch_size == 3


def test_every_option_that_a_derived_value_depends_on_is_an_option():
    rows = ("model", "data", "format", "map", "chat_template", "overflow", "max_length")
    for name in ("batch_size", "epochs"):
        assert set(rows) <= set(OPTIONS[name].depends_on) <= set(OPTIONS)


def test_a_finished_run_is_compared_in_what_is_set(tmp_path):
    config, _ = recorded(tmp_path)
    was = config.as_file()
    assert changed_settings(settle({"max_length": 512})[0], was) == []
    assert changed_settings(settle({"max_length": 512, "save_steps": 9, "device": "cpu"})[0], was) == []
    assert changed_settings(settle({"max_length": 512, "seed": 3})[0], was) == [("seed", 0, 3)]
    del was["optimizer"]  # of an earlier version
    assert changed_settings(settle({"max_length": 512})[0], was) == []

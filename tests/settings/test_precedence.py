"""A flag that changes what a value follows from has it derived again."""

import pytest

from lorafit.errors import RequestError
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


def test_a_derived_value_that_was_edited_in_a_run_file_stands(tmp_path):
    config, path = recorded(tmp_path)
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(
        text.replace(f"batch_size: {config.batch_size}\n", "batch_size: 3\n", 1)
    )
    other, _ = settle({"data": ("x.jsonl",)}, path)
    assert other.batch_size == 3 and other.origin["batch_size"] == "file" and other.epochs is None
    (tmp_path / "run.yaml").write_text(text)
    same, _ = settle({}, path)
    assert same.origin == {**config.origin, "max_length": "file"}
    assert same.why("batch_size") == config.why("batch_size") != ""


def test_a_warm_up_that_the_schedule_does_not_have_is_refused(tmp_path):
    with pytest.raises(RequestError, match="--scheduler constant has no warm-up") as refused:
        settle({"scheduler": "constant", "warmup": 10.0})
    assert refused.value.hint == "--scheduler constant_with_warmup"
    assert settle({"scheduler": "constant"})[0].scheduler == "constant"
    assert settle({"scheduler": "constant", "warmup": 0.0})[0].warmup == 0
    assert settle({"scheduler": "constant_with_warmup", "warmup": 10.0})[0].warmup == 10

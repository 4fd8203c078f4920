from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import RequestError
from lorafit.model.roles import Role
from lorafit.settings import settle
from lorafit.settings.preset import load_preset, parse, preset_names, read_yaml

OURS = Path(__file__).parents[2] / "presets"


def test_the_five_strategies():
    assert preset_names() == ("basic", "attention", "extended", "ffn", "all")
    roles = {name: " ".join(load_preset(name).roles) for name in preset_names()}
    assert roles == {
        "basic": "q v", "attention": "q k v", "extended": "q k v o", "ffn": "gate up down",
        "all": "q k v o gate up down",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(OURS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_opens_with_its_command(path):
    preset = load_preset(path.stem)
    assert path.read_text().startswith(f"# lorafit train MODEL --preset {path.stem}")
    assert preset.description and preset.lora.dropout == 0 and preset.lora.bias == "none"
    assert preset.lora.modules_to_save == () and preset.layers == "all"


def write(folder: Path, **data) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_preset_of_ones_own(tmp_path):
    path = write(
        tmp_path, description="ends", roles=["v", "q"], layers="ends", bands={"ends": "first:1,last:1", "core": [0.25, 0.75]},
        lora={"r": 4, "alpha": 8, "use_rslora": True}, training={"epochs": 1, "learning_rate": 1e-4},
    )  # fmt: skip
    preset = load_preset(path)
    assert preset.name == "mine" and preset.roles == (Role.Q, Role.V) and preset.lora.r == 4
    assert preset.choice().indices(12) == (0, 11) and preset.choice("core").indices(12) == tuple(range(3, 9))


def test_literal_modules_and_layers(tmp_path):
    preset = load_preset(write(tmp_path, modules=["q_proj", "v_proj"], layers_to_transform=[0, 1, 2]))
    assert preset.modules == ("q_proj", "v_proj") and preset.choice().indices(12) == (0, 1, 2)


@pytest.mark.parametrize(
    "data, word",
    [
        ({"roles": ["q"], "layer": "high"}, "did you mean `layers`"),
        ({"roles": ["q", "gaet"]}, "did you mean `gate`"),
        ({"roles": ["q"], "layers": "hihg"}, "is not a choice of layers"),
        ({"roles": ["q"], "lora": {"rank": 8}}, "unknown key `lora.rank`"),
        ({"roles": ["q"], "lora": {"r": "8"}}, "a whole number above 0"),
        ({"roles": ["q"], "lora": {"r": True}}, "a whole number above 0"),
        ({"roles": ["q"], "lora": {"dropout": 1.0}}, "from 0 up to 1"),
        ({"roles": ["q"], "training": {"epoch": 3}}, "did you mean `epochs`"),
        ({"roles": ["q"], "training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"roles": ["q"], "training": {"output": "x"}}, "unknown key `training.output`"),
        ({"roles": "q"}, "a list of roles"),
        ({"roles": ["q"], "modules": ["q_proj"]}, "exclude each other"),
        ({"layers": "high"}, "neither `roles` nor `modules`"),
        ({"roles": ["q"], "bands": {"low": [0, 1]}}, "is built in"),
        ({"roles": ["q"], "bands": {"x": [0.9, 0.1]}}, "two fractions"),
        ({"roles": ["q"], "layers_to_transform": [-1]}, "a list of layer numbers"),
        ({"roles": ["q"], "lora": {1: 2}}, "is not a name"),
        ({"roles": ["q"], "lora": {"rank_pattern": {"q": 8.5}}}, "patterns to ranks"),
        ({"roles": ["q"], "lora": {"rank_pattern": {"(": 8}}}, "patterns to ranks"),
    ],
)
def test_what_is_wrong_is_named(data, word):
    with pytest.raises(RequestError) as error:
        parse(data, "mine")
    assert word in f"{error.value.message} {error.value.hint}"


def test_all_faults_at_once():
    with pytest.raises(RequestError) as error:
        parse({"roles": ["w"], "layer": 1, "lora": {"r": 0}}, "mine")
    assert all(word in error.value.message for word in ("`w` is not a role", "`layer`", "`lora.r`"))


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "is empty"), ("- q\n- v\n", "not a mapping"), ("roles: [q\n", "mine.yaml:2`"),
        ("a: &x [q]\nroles: *x\n", "aliases are not supported"), ("roles: !!python/object:os.system [q]\n", "tag"),
        ("roles: [q]\nroles: [v]\n", "appears twice"), ("\x00", "mine.yaml"), ("{[a]: b}\n", "a key is not a name"),
    ],
)  # fmt: skip
def test_yaml_that_is_none_of_ours(tmp_path, text, word):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as error:
        load_preset(str(path))
    assert word in error.value.message


def test_no_such_preset(tmp_path):
    with pytest.raises(RequestError) as error:
        load_preset("fnn")
    assert "`ffn`" in error.value.hint
    for name in (str(tmp_path / "none.yaml"), "../basic", ""):
        with pytest.raises(RequestError):
            load_preset(name)
    (tmp_path / "latin.yaml").write_bytes(b"description: caf\xe9\n")
    with pytest.raises(RequestError) as error:
        load_preset(str(tmp_path / "latin.yaml"))
    assert "UTF-8" in error.value.message


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["roles", "layers", "lora", "training", "bands", "modules", "layers_to_transform", "description"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(keys, json_like, max_size=5))
def test_anything_is_a_preset_or_an_error(data):
    try:
        preset = parse(data, "mine")
    except RequestError as error:
        assert error.message
    else:
        assert preset.roles or preset.modules


def test_a_file_takes_values_as_the_docs_write_them(tmp_path):
    """YAML 1.1 has `1e-4` as a text, `off` as false, and a date as no text."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "a: [1e-4, 1E3, 1.5e-3, 0.5, .5, 3, 1_000.5, -2e2]\nb: [off, on, 2026-01-31, 1.2.3, e4]\nc: [true, no, null, .inf]\n"
    )
    found = read_yaml(path, "file")
    assert found["a"] == [1e-4, 1000.0, 1.5e-3, 0.5, 0.5, 3, 1000.5, -200.0]
    assert found["b"] == ["off", "on", "2026-01-31", "1.2.3", "e4"]
    assert found["c"] == [True, False, None, float("inf")]
    path.write_text("learning_rate: 1e-4\nprefix_cache: off\ntemplate_date: 2026-01-31\n")
    config, _ = settle({}, str(path))
    assert (config.learning_rate, config.prefix_cache, config.template_date) == (1e-4, "off", "2026-01-31")
    path.write_text("roles: [q]\ntraining: {learning_rate: 2e-4}\n")
    assert settle({"preset": str(path)})[0].learning_rate == 2e-4

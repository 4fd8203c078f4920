import pytest
from comparisons import comparison_of

from lorafit.compare.candidates import parse_count, resolve_all, scale_note
from lorafit.compare.grid import from_file, from_lists, parse_seeds
from lorafit.compare.request import Request, full_settings
from lorafit.errors import RequestError
from lorafit.model.chart import map_of
from lorafit.settings import settle


@pytest.fixture(scope="module")
def demo_map():
    return map_of("demo")


def write(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return str(path)


def test_lists_make_every_combination_with_names_that_say_what_differs():
    found = from_lists(["basic,ffn"], ["low,low+high"], ["8", "32"], ["0.5x,1e-4"], ["2"])
    assert len(found) == 2 * 2 * 2 * 2 * 2 == len({one.name for one in found})
    assert found[0].name == "basic-low-r8-lr0.5x-s0" and found[0].choice == "basic-low-r8-lr0.5x"
    assert (
        found[0].settings == {"preset": "basic", "layers": "low", "rank": "8", "seed": 0}
        and found[0].times == 0.5
    )
    assert found[-1].settings["layers"] == "low,high" and found[-1].settings["learning_rate"] == "1e-4"
    assert [one.name for one in from_lists(["ffn"], ["high"], ["8"], [], [])] == ["ffn-high"]


@pytest.mark.parametrize(
    "texts, seeds", [(["3"], [0, 1, 2]), (["1,5"], [1, 5]), (["7,"], [7]), (["4", "2"], [4, 2]), ([], [])]
)
def test_seeds_are_a_number_of_them_or_a_list(texts, seeds):
    assert parse_seeds(texts) == seeds


def test_a_seed_is_not_taken_for_millions_of_them():
    with pytest.raises(RequestError, match="--seeds 20250101 is that many") as error:
        parse_seeds(["20250101"])
    assert "--seeds 20250101," in error.value.hint and parse_seeds(["20250101,"]) == [20250101]


@pytest.mark.parametrize(("name", "value"), [("compile", True), ("track", ("wandb",)), ("from_adapter", "a")])
def test_what_is_for_one_run_is_not_for_candidates(demo_map, name, value):
    wanted = from_lists(["basic"], ["high"], [], [], [])
    with pytest.raises(RequestError, match="is for one run, not for candidates"):
        resolve_all(demo_map, wanted, {name: value}, None, None)


@pytest.mark.parametrize("texts", [["x"], ["-1"], ["1.5"], ["0"]])
def test_seeds_that_are_none_are_refused_with_the_value(texts):
    with pytest.raises(RequestError, match=f"--seeds is `{texts[0]}`"):
        parse_seeds(texts)


@pytest.mark.parametrize(
    "lists, word",
    [
        ((["basic,basic"], [], [], [], []), "names `basic` twice"),
        ((["basic,"], [], [], [], []), "empty item"),
        ((["basic"], ["low"], [], ["0x"], []), "learning rate `0x`"),
    ],
)
def test_lists_that_are_wrong_are_named(lists, word):
    with pytest.raises(RequestError, match=word):
        from_lists(*lists)


def test_a_grid_file_names_candidates_over_a_common_base(tmp_path):
    path = write(
        tmp_path,
        "base: {epochs: 1}\ncandidates:\n- {name: tiny, preset: ffn, layers: high, rank: 4}\n"
        "- {preset: all, layers: 0-3, learning_rate: 2x}\n",
    )
    base, found = from_file(path, ["2"])
    assert base == {"epochs": 1}
    assert [one.name for one in found] == ["tiny-s0", "tiny-s1", "all-0-3-lr2x-s0", "all-0-3-lr2x-s1"]
    assert found[2].times == 2 and found[2].settings == {"preset": "all", "layers": "0-3", "seed": 0}


@pytest.mark.parametrize(
    "text, word",
    [
        ("candidates: 3\n", "is not a list"),
        ("candidates: [{preset: ffn, rnak: 3}]\n", "did you mean `rank`"),
        ("candidates: [{preset: ffn, data: x}]\n", "belongs in `base`"),
        ("candidates: [{preset: ffn}]\nbse: {}\n", "unknown key `bse`"),
        ("candidates: [{name: a/b, preset: ffn}]\n", "`a/b` is not a name"),
        ("candidates: [{name: scores, preset: ffn}]\n", "`scores` is not a name"),
        ("candidates: [{preset: ffn}, {preset: ffn}]\n", "two candidates are named `ffn`"),
        ("candidates: [{preset: null}]\n", "`preset` is None"),
    ],
)
def test_a_grid_file_that_is_wrong_says_where(tmp_path, text, word):
    with pytest.raises(RequestError, match=word):
        from_file(write(tmp_path, text))


def test_what_a_model_cannot_have_is_named_and_the_rest_goes_on(demo_map):
    wanted = from_lists(["basic,ffn"], ["high,last:99"], [], [], ["2"])
    found, impossible = resolve_all(demo_map, wanted, {}, None, None)
    assert [one.name for one in found] == ["basic-high-s0", "basic-high-s1", "ffn-high-s0", "ffn-high-s1"]
    assert [one.choice for one in impossible] == ["basic-last99", "ffn-last99"]
    assert "99" in impossible[0].reason


def test_multiples_are_of_the_derived_rate_and_the_rows_have_one_seed(demo_map):
    found, _ = resolve_all(demo_map, from_lists(["basic"], ["high"], [], ["0.5x,1x"], ["2"]), {}, None, None)
    half, _, whole, _ = (one.config for one in found)
    assert half.learning_rate == whole.learning_rate / 2 and half.origin["learning_rate"] == "flag"
    assert {one.config.seed_of_data for one in found} == {0} and {one.config.seed for one in found} == {0, 1}


@pytest.mark.parametrize("wanted", [50_000, 100_000, 1_000_000])
def test_ranks_come_as_near_to_a_number_of_parameters_as_they_can(demo_map, wanted):
    lists = from_lists(["basic,attention,ffn,all"], ["low,high,all"], [], [], [])
    found, _ = resolve_all(demo_map, lists, {}, None, wanted)
    for one in found:
        each = one.plan.trainable_params // one.config.rank
        assert abs(one.plan.trainable_params - wanted) <= each / 2 or one.config.rank == 1
        assert one.plan.lora.r == one.config.rank and one.config.origin["rank"].startswith("derived")


def test_candidates_differ_in_nothing_that_they_share(demo_map, tmp_path):
    (tmp_path / "mine.yaml").write_text("roles: [q]\ntraining: {batch_size: 3}\n")
    wanted = from_lists(["basic", str(tmp_path / "mine.yaml")], ["high"], [], [], [])
    with pytest.raises(RequestError, match="--batch-size is None for `basic-high` and 3 for `mine-high`"):
        resolve_all(demo_map, wanted, {}, None, None)
    assert len(resolve_all(demo_map, wanted, {"batch_size": 4}, None, None)[0]) == 2


@pytest.mark.parametrize(
    "text, number", [("1M", 1_000_000), ("1.5k", 1500), ("65,536", 65536), ("2b", 2_000_000_000)]
)
def test_a_number_of_parameters(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "0", "1 MB"])
def test_what_is_no_number_of_parameters(text):
    with pytest.raises(RequestError, match="--trainable is"):
        parse_count(text)


def test_a_request_without_lists_is_every_strategy_on_every_band_and_survives_its_file(tmp_path):
    from lorafit.jsonio import jsonable

    asked = Request({"epochs": "2"}).checked()
    assert len(asked.wanted()[1]) == 20
    again = Request.of(jsonable(asked))
    assert not again.differs(asked) and again.wanted() == asked.wanted()
    assert again.differs(Request({"epochs": "3"}).checked()) == "--epochs"
    assert again.differs(Request({"epochs": "2"}, ranks=("8",)).checked()) == "--ranks"
    with pytest.raises(RequestError, match="--trainable sets the ranks"):
        Request({}, ranks=("8",), trainable="1M").checked()
    with pytest.raises(RequestError, match="--grid names the candidates, and --layers too"):
        Request({}, layers=("low",), grid="g.yaml").checked()


def test_a_run_file_gives_what_no_list_names(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: ffn\nlayers: high\n")
    asked = Request({}, ranks=("8,16",), config=str(tmp_path / "run.yaml")).checked()
    assert [one.name for one in asked.wanted()[1]] == ["r8", "r16"]
    assert [one.name for one in Request({}, config=str(tmp_path / "run.yaml")).checked().wanted()[1]] == [
        "candidate"
    ]


def test_ranks_of_equal_size_keep_the_scale_and_a_list_of_ranks_says_that_it_changes(demo_map):
    """alpha / rank: with --trainable it is the preset's for all, with --ranks alpha is."""
    lists = from_lists(["basic,all"], ["high"], [], [], [])
    sized, _ = resolve_all(demo_map, lists, {}, None, 50_000)
    loras = [one.plan.lora for one in sized]
    assert len({lora.r for lora in loras}) == 2 and {lora.alpha / lora.r for lora in loras} == {2.0}
    assert full_settings(sized[0], {})["alpha"] == loras[0].alpha and not scale_note(sized)
    kept, _ = resolve_all(demo_map, lists, {"alpha": 8}, None, 50_000)
    assert {one.plan.lora.alpha for one in kept} == {8}
    listed, _ = resolve_all(demo_map, from_lists(["basic"], ["high"], ["4,16"], [], []), {}, None, None)
    assert {one.plan.lora.alpha for one in listed} == {32} and "8 at rank 4, 2 at rank 16" in scale_note(
        listed
    )


def test_candidates_whose_batches_would_differ_are_refused(tiny, pairs, tmp_path):
    """A batch follows from the rows and from `accumulate`: they would read one another's states."""
    (tmp_path / "once.yaml").write_text("roles: [q]\n")
    (tmp_path / "often.yaml").write_text("roles: [q]\ntraining: {accumulate: 8}\n")
    lists = {"presets": [f"{tmp_path / 'once.yaml'},{tmp_path / 'often.yaml'}"], "layers": ["high"]}
    with pytest.raises(RequestError, match="--batch-size is 32 for `once-high` and 8 for `often-high`"):
        comparison_of(tiny("llama"), pairs, tmp_path / "c", **lists, flags={"batch_size": None})


def test_the_run_in_full_adapts_the_modules_of_the_run_file(demo_map, tmp_path):
    """`--preset` on the command would set them aside."""
    (tmp_path / "run.yaml").write_text("modules: [q_proj, up_proj]\n")
    asked = Request({}, layers=("high",), config=str(tmp_path / "run.yaml")).checked()
    common, wanted = asked.wanted()
    ((one,), _) = resolve_all(demo_map, wanted, common, asked.config, None)
    settings = full_settings(one, common)
    again, preset = settle(settings, asked.config)
    assert again.modules == one.config.modules == ("q_proj", "up_proj") == preset.modules


def test_a_folder_with_the_name_of_a_preset_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ffn").mkdir()
    (tmp_path / "mine.yaml").write_text("roles: [q]\n")
    assert Request({}, presets=("ffn,mine.yaml",)).checked().presets == (f"ffn,{tmp_path / 'mine.yaml'}",)

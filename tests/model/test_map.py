import json

import pytest
from families import FAMILIES, build_config, build_model

from lorafit.jsonio import jsonable
from lorafit.model import map as model_map
from lorafit.model.chart import map_of
from lorafit.model.map import MapCache, from_json, sum_params


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_counted_once(name):
    found = map_of(build_config(name))
    model = build_model(name)
    total = sum(p.numel() for p in model.parameters())
    assert found.total_params == total
    assert sum_params(found.slots) + sum_params(found.uncovered) == total
    assert found.task == FAMILIES[name].task


def test_a_map_survives_json():
    found = map_of(build_config("t5"))
    assert from_json(json.loads(json.dumps(jsonable(found)))) == found


def test_the_cache_gives_back_what_was_put_and_nothing_damaged(tmp_path):
    found = map_of(build_config("llama"))
    cache = MapCache(tmp_path / "maps")
    key = cache.key({"a": 1})
    assert cache.get(key, "x") is None
    cache.put(key, found)
    kept = cache.get(key, "x")
    assert kept is not None and kept.model == "x" and kept.slots == found.slots
    (tmp_path / "maps" / f"{key}.json").write_text('{"model": 1}')
    assert cache.get(key, "x") is None
    (tmp_path / "maps" / f"{key}.json").write_text("{")
    assert cache.get(key, "x") is None
    assert cache.key({"a": 1}) != cache.key({"a": 2})


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    MapCache(blocked / "maps").put("key", map_of(build_config("llama")))


def test_another_version_reads_no_old_map(monkeypatch):
    before = MapCache.key({})
    monkeypatch.setattr(model_map, "installed", lambda package: "0.0")
    assert MapCache.key({}) != before


def test_a_slot_counts_its_weight_and_bias():
    found = map_of(build_config("bert"))
    query = next(s for s in found.slots if s.tail == "attention.self.query")
    assert query.params == 32 * 32 + 32 and query.layer == 0 and query.stack == "bert.encoder.layer"

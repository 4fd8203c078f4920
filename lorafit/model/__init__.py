"""Models: a name to files, a config to a map of every weight, and the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.lazy import door

if TYPE_CHECKING:
    from lorafit.model.chart import chart_of as chart_of
    from lorafit.model.chart import map_of as map_of
    from lorafit.model.checkpoint import DATA_FILES as DATA_FILES
    from lorafit.model.checkpoint import VOCABULARY as VOCABULARY
    from lorafit.model.checkpoint import check_tokenizer as check_tokenizer
    from lorafit.model.classes import config_of as config_of
    from lorafit.model.classes import model_class as model_class
    from lorafit.model.classes import on_meta as on_meta
    from lorafit.model.download import base_folder as base_folder
    from lorafit.model.download import download_weights as download_weights
    from lorafit.model.headers import FLOATS as FLOATS
    from lorafit.model.headers import INDEX as INDEX
    from lorafit.model.headers import TensorEntry as TensorEntry
    from lorafit.model.headers import TensorFile as TensorFile
    from lorafit.model.headers import dtype_of as dtype_of
    from lorafit.model.headers import open_file as open_file
    from lorafit.model.headers import shards as shards
    from lorafit.model.headers import stored_tensors as stored_tensors
    from lorafit.model.identity import called as called
    from lorafit.model.identity import fingerprint as fingerprint
    from lorafit.model.identity import hub_name as hub_name
    from lorafit.model.identity import local_folder as local_folder
    from lorafit.model.identity import sampled as sampled
    from lorafit.model.identity import shard_refusal as shard_refusal
    from lorafit.model.identity import stream_refusal as stream_refusal
    from lorafit.model.identity import unreadable as unreadable
    from lorafit.model.identity import weight_files as weight_files
    from lorafit.model.load import load_model as load_model
    from lorafit.model.load import load_tokenizer as load_tokenizer
    from lorafit.model.load import pick_device as pick_device
    from lorafit.model.load import pick_dtype as pick_dtype
    from lorafit.model.load import stored_dtype as stored_dtype
    from lorafit.model.map import ModelMap as ModelMap
    from lorafit.model.map import Slot as Slot
    from lorafit.model.map import Stack as Stack
    from lorafit.model.map import Uncovered as Uncovered
    from lorafit.model.map import sum_params as sum_params
    from lorafit.model.network import hub_reached as hub_reached
    from lorafit.model.network import why_offline as why_offline
    from lorafit.model.quantised import KINDS as KINDS
    from lorafit.model.quantised import Quantised as Quantised
    from lorafit.model.quantised import held_as as held_as
    from lorafit.model.quantised import quantised_params as quantised_params
    from lorafit.model.quantised import weight_bytes as weight_bytes
    from lorafit.model.quantised_linear import Pretended as Pretended
    from lorafit.model.quantised_linear import dequantised as dequantised
    from lorafit.model.quantised_linear import is_quantised as is_quantised
    from lorafit.model.quantised_linear import pretend as pretend
    from lorafit.model.quantised_linear import quantise_pretended as quantise_pretended
    from lorafit.model.roles import ATTENTIONS as ATTENTIONS
    from lorafit.model.roles import DEFAULT_PARTS as DEFAULT_PARTS
    from lorafit.model.roles import FEED_FORWARDS as FEED_FORWARDS
    from lorafit.model.roles import MEANING as MEANING
    from lorafit.model.roles import Part as Part
    from lorafit.model.roles import Role as Role
    from lorafit.model.safetensors_io import Change as Change
    from lorafit.model.safetensors_io import ShardLayout as ShardLayout
    from lorafit.model.safetensors_io import lay_out as lay_out
    from lorafit.model.safetensors_io import read_range as read_range
    from lorafit.model.safetensors_io import read_rows as read_rows
    from lorafit.model.safetensors_io import read_tensor as read_tensor
    from lorafit.model.safetensors_io import spans as spans
    from lorafit.model.safetensors_io import write as write
    from lorafit.model.sharded import Sharded as Sharded
    from lorafit.model.sharded import load_sharded as load_sharded
    from lorafit.model.sharded import local as local
    from lorafit.model.source import HUB_ID as HUB_ID
    from lorafit.model.source import ModelSource as ModelSource
    from lorafit.model.source import find as find
    from lorafit.model.source import first_line as first_line
    from lorafit.model.source import not_downloaded as not_downloaded
    from lorafit.model.source import split_revision as split_revision
    from lorafit.model.streamed import Streamed as Streamed
    from lorafit.model.streamed import let_go as let_go
    from lorafit.model.streamed import load_streamed as load_streamed

__getattr__ = door(
    __name__,
    {
        "chart": "chart_of map_of",
        "checkpoint": "DATA_FILES VOCABULARY check_tokenizer",
        "classes": "config_of model_class on_meta",
        "download": "base_folder download_weights",
        "load": "load_model load_tokenizer pick_device pick_dtype stored_dtype",
        "map": "ModelMap Slot Stack Uncovered sum_params",
        "quantised": "KINDS Quantised held_as quantised_params weight_bytes",
        "quantised_linear": "Pretended dequantised is_quantised pretend quantise_pretended",
        "roles": "ATTENTIONS DEFAULT_PARTS FEED_FORWARDS MEANING Part Role",
        "headers": "FLOATS INDEX TensorEntry TensorFile dtype_of open_file shards stored_tensors",
        "identity": "called fingerprint hub_name local_folder sampled shard_refusal stream_refusal unreadable weight_files",
        "safetensors_io": "Change ShardLayout lay_out read_range read_rows read_tensor spans write",
        "sharded": "Sharded load_sharded local",
        "streamed": "Streamed let_go load_streamed",
        "network": "hub_reached why_offline",
        "source": "HUB_ID ModelSource find first_line not_downloaded split_revision",
    },
)

"""Folders to the hub, against a stand-in that speaks its HTTP on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import Forked

import lorafit


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it sends a folder: make, look, large files, commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, server = self._body(), self.server
        here = f"http://127.0.0.1:{server.server_port}"
        path = self.path.split("?")[0]
        server.asked.append((path, self.headers.get("Authorization")))
        if server.refuse and path.startswith(server.refuse):
            return self._answer({"error": "You shall not pass"}, 403)
        if path == "/api/repos/create":
            server.made = json.loads(body)
            owner = server.made.get("organization") or "ada"
            return self._answer({"url": f"{here}/{owner}/{server.made['name']}", "name": server.made["name"]})
        if path.endswith("/validate-yaml"):
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            large = (".safetensors",)
            return self._answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for f in files
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{here}/up/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    server.files[entry["value"]["path"]] = server.large[entry["value"]["oid"]]
            return self._answer({"commitUrl": f"{here}/ada/x/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self._answer({"error": f"not spoken here: {path}"}, 404)

    def do_PUT(self):
        body = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._answer({})

    def do_GET(self):
        self._answer({"error": "not found"}, 404)


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def hub(server):
    server.files, server.large, server.asked, server.made, server.refuse = {}, {}, [], {}, ""
    return server


def environment_of(server, room, **more):
    """Where the hub is the stand-in."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_stand_in", "NO_PROXY": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(room / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more,
    }  # fmt: skip
    return {name: value for name, value in environment.items() if value}


@pytest.fixture(scope="module")
def online(server, tmp_path_factory):
    """Forks of a process that was told where the hub is, as its library asks for that once."""
    room = tmp_path_factory.mktemp("online")
    made = Forked(room, environment_of(server, room))
    yield made
    made.close()


@pytest.fixture
def said(hub, online, tmp_path):
    """`lorafit …` in a process of its own, whose hub is the stand-in."""

    def call(*arguments):
        return online.run(*arguments, cwd=tmp_path, env=environment_of(hub, tmp_path))

    return call


def test_an_adapter_and_its_merged_model_are_sent(said, hub, tmp_path):
    done = said(
        "train", "--preset", "ffn", "--layers", "high", "--max-steps", "3", "--save-steps", "2", "--keep", "2",
        "-o", "r", "--push-to-hub", "ada/lamps",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"http://127.0.0.1:{hub.server_port}/ada/lamps" in done.stdout
    assert hub.made["name"] == "lamps" and hub.made["organization"] == "ada"
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.asked[0][1] == "Bearer hf_stand_in"
    run = tmp_path / "r"
    kept = {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "base.json"}
    assert kept <= set(hub.files)
    assert hub.files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    private = {"events.jsonl", "run.yaml", "report.html", "held-out.safetensors"}  # they hold data and places
    assert not private & set(hub.files) and all((run / name).is_file() for name in private)
    told = (Path(lorafit.__file__).parent / "docs" / "merge.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in private | set(hub.files))
    assert not any("checkpoint" in name for name in hub.files) and list(run.glob("checkpoint-*"))
    assert all(str(tmp_path).encode() not in content for content in hub.files.values())

    from lorafit import digests

    there = tmp_path / "fetched"
    there.mkdir()
    for name, content in hub.files.items():
        (there / name).write_bytes(content)
    digests.check(there)  # what was sent is whole for who fetches it

    hub.files.clear()
    done = said("merge", "r", "-o", "m", "--push-to-hub", "ada/lamps-merged")
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(hub.files)
    assert b"largest logit difference" in hub.files["README.md"]
    done = said("push", "m", "ada/again", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["address"].endswith("ada/again")


def test_a_place_on_this_machine_is_not_sent(said, hub, tiny, pairs, tmp_path):
    """Absolute paths of the run, the data and the merged model: none is in a file of ours that is sent."""
    run, merged = tmp_path / "deep" / "r", tmp_path / "deep" / "m"
    run.parent.mkdir()
    assert said("train", tiny("llama"), "--data", pairs, "--max-steps", "1", "-o", run).returncode == 0
    assert said("eval", run, "--report", run / "second.html").returncode == 0
    assert said("push", run, "ada/lamps").returncode == 0
    assert "second.html" not in hub.files
    card = hub.files["README.md"].decode()
    assert "pairs.jsonl" in card and "lorafit eval r" in card
    (tmp_path / "customer").mkdir()
    (tmp_path / "customer" / "x.jsonl").write_bytes(pairs.read_bytes())
    assert said("train", "--data", "customer/x.jsonl", "--max-steps", "1", "-o", "near").returncode == 0
    near = (tmp_path / "near" / "README.md").read_text()
    assert "`x.jsonl`" in near and "customer" not in near
    for place in (tmp_path, tiny("llama"), pairs):
        assert str(place) not in card
    assert said("merge", run, "-o", merged, "--push-to-hub", "ada/merged").returncode == 0
    assert str(tmp_path) not in hub.files["README.md"].decode()


def test_a_checkpoint_goes_as_an_adapter(said, hub, tmp_path):
    assert said("train", "--max-steps", "3", "--save-steps", "2", "--keep", "1", "-o", "r").returncode == 0
    (checkpoint,) = (tmp_path / "r").glob("checkpoint-*")
    done = said("push", checkpoint, "ada/half-way")
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in hub.files
    assert not {"optimizer.safetensors", "parameters.safetensors", "random.safetensors", "state.json"} & set(
        hub.files
    )


def test_a_finished_run_that_was_not_sent_is_sent(said, hub):
    """The same command again after a hub that refused: nothing is trained, and it is sent."""
    hub.refuse = "/api/repos/create"
    command = ("train", "--max-steps", "1", "-o", "r", "--push-to-hub", "ada/lamps")
    assert said(*command).returncode == 1 and not hub.files
    hub.refuse = ""
    done = said(*command, "--resume")
    assert (
        done.returncode == 0
        and "nothing to resume" in done.stderr
        and "adapter_model.safetensors" in hub.files
    )


def test_a_hub_that_refuses_loses_nothing(said, hub, tmp_path):
    hub.refuse = "/api/repos/create"
    done = said("train", "--max-steps", "1", "-o", "r", "--push-to-hub", "ada/lamps")
    assert (
        done.returncode == 1
        and "the hub did not take" in done.stderr
        and "lorafit push r ada/lamps" in done.stderr
    )
    assert "Traceback" not in done.stderr and (tmp_path / "r" / "adapter_model.safetensors").is_file()
    hub.refuse = "/api/models/ada/lamps/commit"
    done = said("push", "r", "ada/lamps")
    assert done.returncode == 1 and "Traceback" not in done.stderr and not hub.files


@pytest.mark.parametrize(
    "arguments, more, words",
    [
        (("push", ".", "ada/lamps"), {}, "neither an adapter nor a model"),
        (("push", "nowhere", "ada/lamps"), {}, "there is no folder"),
        (("train", "--push-to-hub", "lamps"), {}, "is not a valid name on the Hub"),
        (("train", "--push-to-hub", "a/b/c"), {}, "is not a valid name on the Hub"),
        (("train", "--push-to-hub", "ada/lamps"), {"HF_TOKEN": ""}, "not logged in to the Hub"),
        (("train", "--push-to-hub", "ada/lamps"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_sent_is_said_before_the_work(hub, tmp_path, arguments, more, words):
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", *arguments],
        env=environment_of(hub, tmp_path, **more), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and not hub.asked
    assert not (tmp_path / "runs").exists()


def test_chat_templates_by_name_go_with_their_adapter(said, hub, tmp_path):
    assert said("train", "--max-steps", "1", "-o", "r").returncode == 0
    run = tmp_path / "r"
    (run / "additional_chat_templates").mkdir()
    (run / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (run / "mine").mkdir()
    (run / "mine" / "rows.txt").write_text("Ada")
    assert said("push", run, "ada/lamps").returncode == 0
    assert hub.files["additional_chat_templates/tool_use.jinja"] == b"{{ messages }}"
    assert not any(name.startswith(("mine", "checkpoint")) for name in hub.files)

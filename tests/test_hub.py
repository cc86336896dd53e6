"""The Hub, against a stand-in server on the loopback interface: upload, and a config loaded from a repository."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import safetensors.torch
from conftest import REPOSITORY, TINY_MODEL, equal, exported, without
from diffusers import VQModel

pytestmark = pytest.mark.slow
TOKEN = "hf_standintoken"


class StandIn(http.server.BaseHTTPRequestHandler):
    """The few calls of the Hub's interface that creating, uploading and reading a small repository take."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(("POST", self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "me"
            return self.answer(
                {
                    "url": f"http://{self.headers['Host']}/{owner}/{name}",
                    "name": f"{owner}/{name}",
                    "id": f"{owner}/{name}",
                }
            )
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.serve(body=True)

    def do_HEAD(self):
        self.serve(body=False)

    def serve(self, body):
        self.server.calls.append((self.command, self.path, self.headers.get("Authorization")))
        if self.path.startswith("/api/models/me/model/tree/"):
            return self.answer([{"type": "file", "path": p, "size": 1, "oid": "1"} for p in self.server.files])
        if self.path == "/me/architecture/resolve/main/config.json":
            data = json.dumps({"_class_name": "VQModel"} | TINY_MODEL).encode()
        elif (name := re.sub("^/me/model/resolve/[^/]+/", "", self.path)) in self.server.files:
            data = self.server.files[name]
        else:
            return self.missing()
        self.send_response(200)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "1" * 40}
        for key, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def missing(self):
        self.send_response(404)
        if self.path.startswith("/me/model/"):
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.calls, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(hub, tmp_path, flags):
    """The script in a process of its own: the address of the Hub is read at import."""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "train_vqgan.py"), *flags]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_upload(hub, flags, tmp_path, photos):
    """The export, card and pictures arrive, with the token; checkpoints stay. Red when upload() does nothing."""
    more = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/model", "--log_steps", "1"]
    more += ["--validation_images", str(photos / "0.png")]
    result = run(hub, tmp_path, [*flags, *more])
    assert result.returncode == 0, result.stderr[-3000:]
    expected = {"README.md", "metrics.jsonl", "vqmodel/config.json", "vqmodel/diffusion_pytorch_model.safetensors"}
    expected |= {"discriminator/config.json", "image_processor/config.json", "validation/step-2.png"}
    assert expected <= set(hub.files)
    assert not [name for name in hub.files if name.startswith(("checkpoint-", "unfinished-"))]
    assert {authorization for method, _, authorization in hub.calls if method == "POST"} == {f"Bearer {TOKEN}"}
    assert not [name for name, content in hub.files.items() if TOKEN.encode() in content]
    local = tmp_path / "run" / "vqmodel" / "diffusion_pytorch_model.safetensors"
    assert hub.files["vqmodel/diffusion_pytorch_model.safetensors"] == local.read_bytes()


def test_config_from_the_hub(hub, flags, tmp_path):
    """A Hub id as the model config. Red when read_config takes only files."""
    result = run(hub, tmp_path, [*flags, "--model_config_name_or_path", "me/architecture"])
    assert result.returncode == 0, result.stderr[-3000:]
    config = json.loads((tmp_path / "run" / "vqmodel" / "config.json").read_text())
    assert config["block_out_channels"] == TINY_MODEL["block_out_channels"]
    assert "Contacting the Hugging Face Hub for the config of me/architecture" in result.stderr


@pytest.mark.parametrize("subfolder", ["vqmodel/", "vqvae/", ""])
def test_pretrained_model_from_the_hub(hub, flags, tmp_path, subfolder):
    """Below vqmodel/ where this script uploads it, in --subfolder, or at the root; with a variant of the weights only.

    Red when the Hub is not asked for vqmodel/config.json, or not for the repository's files.
    """
    VQModel(**TINY_MODEL).save_pretrained(tmp_path / "pretrained", variant="fp16")
    hub.files |= {subfolder + path.name: path.read_bytes() for path in (tmp_path / "pretrained").iterdir()}
    more = ["--subfolder", "vqvae"] if subfolder == "vqvae/" else []
    flags = [*without(flags, "--model_config_name_or_path"), "--pretrained_model_name_or_path", "me/model", *more]
    result = run(hub, tmp_path, [*flags, "--learning_rate", "0"])
    assert result.returncode == 0, result.stderr[-3000:]
    before = safetensors.torch.load(hub.files[subfolder + "diffusion_pytorch_model.fp16.safetensors"])
    assert equal(before, exported(tmp_path / "run"))


@pytest.mark.parametrize("flag", ["--model_config_name_or_path", "--pretrained_model_name_or_path", "--dataset_name"])
def test_what_the_hub_does_not_have(hub, flags, tmp_path, flag):
    gone = "--train_data_dir" if flag == "--dataset_name" else "--model_config_name_or_path"
    result = run(hub, tmp_path, [*without(flags, gone), flag, "me/nothing"])
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2 and len(errors) == 1 and flag in errors[0] and "Traceback" not in result.stderr
    assert "Contacting the Hugging Face Hub" in result.stderr

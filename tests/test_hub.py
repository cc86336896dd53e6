"""The Hub, against a stand-in server on the loopback interface, with the real client: uploads, cards, and loading."""

import base64
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
import safetensors.torch
from conftest import REPOSITORY, TINY_MODEL, equal, exported, metrics, without
from diffusers import VQModel
from huggingface_hub import ModelCard

import train_vqgan

pytestmark = pytest.mark.slow
TOKEN = "hf_standintoken"
NO_LICENCE = {"error": "license must be one of [apache-2.0, ...]", "errors": [], "warnings": []}


class StandIn(http.server.BaseHTTPRequestHandler):
    """The few calls of the Hub's interface that creating, uploading and reading a small repository take."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(("POST", self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
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
            lines = [json.loads(line) for line in body.splitlines()]
            title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            if title in self.server.refused:
                return self.close()
            files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            files = {path: base64.b64decode(content) for path, content in files.items()}
            self.server.commits.append((title, files))
            self.server.files |= files
            return self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/model/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        if self.path == "/api/validate-yaml":
            known = "license: unheard" not in json.loads(body)["content"]
            return self.answer(*([{"errors": [], "warnings": []}] if known else [NO_LICENCE, 400]))
        self.missing()

    def close(self):
        """As a network that fails."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        self.serve(body=True)

    def do_HEAD(self):
        self.serve(body=False)

    def serve(self, body):
        self.server.calls.append((self.command, self.path, self.headers.get("Authorization")))
        if self.path == "/api/models/me/model":
            return self.answer({"id": "me/model", "sha": "1" * 40, "private": self.server.private})
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

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.calls, server.files, server.created, server.commits, server.refused = [], {}, [], [], ()
    server.private = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def run(hub, tmp_path, flags):
    """The script in a process of its own: the address of the Hub is read at import."""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "train_vqgan.py"), *flags]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def push(hub, flags, tmp_path, monkeypatch, capsys):
    """push(*more flags) -> (exit status, stderr) of a run that uploads to the stand-in, in this process."""
    address = f"http://127.0.0.1:{hub.server_port}"
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }
    settings |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hf")}
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)

    def run(*more):
        to = ["--push_to_hub", "--hub_token", TOKEN, "--hub_model_id", "me/model"]
        return train_vqgan.main([*flags, *to, *more]), capsys.readouterr().err

    return run


WEIGHTS = "vqmodel/diffusion_pytorch_model.safetensors"


def test_upload(hub, push, tmp_path, photos):
    """The export, card and picture arrive, with the token; all else stays. Red when upload() does nothing, or takes all."""
    status, said = push("--log_steps", "1", "--validation_images", str(photos / "0.png"))
    assert status == 0, said
    expected = {"README.md", "metrics.jsonl", "reconstructions.png", "vqmodel/config.json", WEIGHTS}
    expected |= {"discriminator/config.json", "discriminator/diffusion_pytorch_model.safetensors"}
    assert set(hub.files) == expected | {"image_processor/config.json"}
    sent = {authorization for _, path, authorization in hub.calls if path.startswith(("/api/repos", "/api/models"))}
    assert sent == {f"Bearer {TOKEN}"}
    assert not [name for name, content in hub.files.items() if TOKEN.encode() in content]
    assert hub.files[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert hub.files["reconstructions.png"] == (tmp_path / "run" / "validation" / "step-2.png").read_bytes()
    assert "visibility" not in hub.created[0] and [title for title, _ in hub.commits] == ["Step 2"]


def test_checkpoints_are_uploaded_and_a_network_that_fails_is_a_warning(hub, push, tmp_path):
    """Checkpoints 2, 4 and 6 of 7, and the result; that of step 4 does not get through, and training goes on.

    Red when an error of the upload ends the run, every checkpoint is pushed, or output_dir in place of the checkpoint.
    """
    hub.refused = ("Step 4",)
    status, said = push("--push_every", "2", "--checkpointing_steps", "1", "--max_train_steps", "7", "--log_steps", "1")
    assert status == 0, said
    assert [title for title, _ in hub.commits] == ["Step 2", "Step 6", "Step 7"]
    (warning,) = [line for line in said.splitlines() if "Could not upload" in line]
    assert "checkpoint-4 to me/model: " in warning and "Traceback" not in said
    for title, files in hub.commits[:2]:
        step = title.removeprefix("Step ")
        assert files[WEIGHTS] == (tmp_path / "run" / f"checkpoint-{step}" / WEIGHTS).read_bytes()
        assert "training.pt" not in files and "generator.safetensors" not in files
        assert f"Trained for {step} steps" in files["README.md"].decode()
    assert hub.commits[0][1][WEIGHTS] != hub.files[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("private", [True, False])
def test_private_repository(hub, push, tmp_path, private):
    """One that is there already and public is refused before training: nothing may leak.

    Red when create_repo is not told, or the Hub is not asked what the repository is.
    """
    hub.private = private
    status, said = push("--hub_private")
    assert hub.created[0]["visibility"] == "private"
    refused = "--hub_private: me/model is there already, and public; choose another --hub_model_id" in said
    assert (status, refused, bool(hub.files)) == ((0, False, True) if private else (2, True, False))
    assert (tmp_path / "run" / "vqmodel").exists() == private, "training had started"


def test_licence_that_the_hub_does_not_know(hub, push, tmp_path):
    """Known before training, not after it. Red without validate()."""
    status, said = push("--hub_license", "unheard")
    assert status == 2 and "--push_to_hub: " in said and "license must be one of" in said and not hub.created, said
    assert not (tmp_path / "run" / "vqmodel").exists()


@pytest.fixture
def snippet(photos, monkeypatch):
    """snippet(card, folder) -> (codes, reconstruction) of a card's Python, run in `folder` beside a photograph."""

    def run(card, folder):
        PIL.Image.open(photos / "0.png").crop((0, 0, 21, 18)).save(folder / "photo.jpg")
        monkeypatch.chdir(folder)
        names = {}
        exec(re.search("```python\n(.*?)```", card, re.S)[1], names)
        return names["codes"], np.asarray(names["reconstruction"])

    return run


def test_card_on_the_hub(hub, push, snippet, tmp_path, photos):
    """The client reads its metadata; the snippets run as they stand, each with its own weights.

    Red when a result is left out or has no protocol, the snippet names no repository, or that of best/ takes the last.
    """
    more = ["--validation_fraction", "0.4", "--num_validation_samples", "2", "--save_best", "psnr"]
    more += ["--validation_images", str(photos / "0.png"), "--hub_license", "cc-by-4.0"]
    status, said = push(*more, "--learning_rate", "0.01")
    assert status == 0, said
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.model_name == "me/model" and card.data.datasets is None
    last = metrics(tmp_path / "run")[-1]
    results = {result.metric_name: result for result in card.data.eval_results}
    held_out = {name: last[name] for name in last if name.startswith("val/") and "images" not in name}
    assert {name: result.metric_value for name, result in results.items()} == held_out and "val/psnr_n2" in results
    for name, result in results.items():
        assert result.dataset_args == {"step": last["step"]} | last["protocol"] and result.dataset_type == "imagefolder"
        assert name == f"val/{result.metric_type}_n2"
    assert "![Images, reconstructions, differences](reconstructions.png)" in card.text
    best = hub.files["best/README.md"].decode()
    codes, image = snippet(card.text, tmp_path)
    assert codes.shape == (10 * 9,) and image.shape == (18, 20, 3)
    for name in ("vqmodel/config.json", "image_processor/config.json"):
        del hub.files[name]  # so that the best one's snippet cannot take the other
    shutil.rmtree(tmp_path / "hf")
    assert (snippet(best, tmp_path)[1] == image).all(), "one validation: the best is the last"


def test_card_on_disk(train, snippet, photos):
    """Each export's snippet runs in its own folder. Red when `repository` is another, or undefined."""
    run = train("--checkpointing_steps", "1", "--learning_rate", "0.1")
    images = [snippet((run / name / "README.md").read_text(), run / name)[1] for name in ("", "checkpoint-1")]
    assert (images[0] != images[1]).any()
    card = ModelCard((run / "README.md").read_text())
    assert card.data.eval_results is None and "reconstructions.png" not in card.text, "nothing was measured"


def card_of(*flags, **measured):
    """The metadata that a run with these flags would have, as the client reads it."""
    run = SimpleNamespace(args=train_vqgan.parse_args([*map(str, flags), "--output_dir", "run"]), repository=None)
    return ModelCard(f"---\n{train_vqgan.card_metadata(run, measured).to_yaml()}\n---\n").data


@pytest.mark.parametrize("split", [[], ["--validation_split", "test"], ["--validation_data_dir", "PHOTOS"]])
def test_data_set_and_model_of_the_hub_are_named(photos, split):
    """Red when local folders and files are named, or what was measured on a folder is said to be of the data set."""
    split = [str(photos) if word == "PHOTOS" else word for word in split]
    measured = {"val/psnr_n5": 20.5, "val/images_psnr_n1": 30.0, "step": 3, "protocol": {"data": "them", "n": 5}}
    hub_ids = ["--dataset_name", "me/data", "--pretrained_model_name_or_path", "me/base"]
    data = card_of(*hub_ids, *split, **measured)
    assert data.datasets == ["me/data"] and data.base_model == "me/base" and data.license is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("psnr", 20.5, "them")
    on_theirs = "--validation_data_dir" not in split
    assert result.dataset_type == ("me/data" if on_theirs else "imagefolder")
    assert result.dataset_split == ("test" if "test" in split else None)
    for here in (photos, "a.tar", "s3://bucket/{00..03}.parquet"):
        data = card_of("--dataset_name", here, "--pretrained_model_name_or_path", photos)
        assert data.datasets is None and data.base_model is None and data.eval_results is None


def test_command_in_the_card(flags, tmp_path, photos, monkeypatch):
    """It gives the flags of the run, and no others. Red when a switch, a list or the drawn seed is lost, or a default given."""
    more = ["--no-allow_tf32", "--random_flip", "--value_range", "-1", "2", "--vae_loss", "l2", "--validation_data_dir"]
    more += [photos, "--validation_images", photos / "0.png", photos / "1.png"]
    assert train_vqgan.main([*without(flags, "--seed"), *map(str, more)]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    words = shlex.split(*re.findall("```bash\n(.*?)\n```", card, re.S))
    assert words[:5] == ["accelerate", "launch", "--num_processes", "1", "train_vqgan.py"]
    given = {word for word in words[5:] if word.startswith("--")}
    assert {"--no-allow_tf32", "--random_flip", "--max_train_steps"} <= given
    assert not given & {"--vae_loss", "--validation_fraction", "--gradient_checkpointing", "--hub_token"}
    monkeypatch.chdir(photos.parent)  # the card has names of files, not their places
    again = [str(tmp_path / word) if word.endswith(".json") else word for word in words[5:]]
    again = [str(photos / word) if word.endswith(".png") else word for word in again]
    args = vars(train_vqgan.parse_args(again))
    assert args["value_range"] == [-1, 2] and args["allow_tf32"] is False and args["random_flip"] is True
    assert args["validation_images"] == [str(photos / "0.png"), str(photos / "1.png")]
    assert f"\nderived/seed: {args['seed']}\n" in card


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

"""Models by their name on the Hub: out of a cache as huggingface_hub lays it out, and from a server that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from moec.compiler.errors import MoecError
from moec.compiler.errors.paths import check_source, find_source
from moec.compiler.frontends.companions import read_companions
from moec_command import shell
from places import ROOT

NAME, COMMIT = "someone/tiny-moe", "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
EXAMPLE = ROOT / "examples/tiny-moe"


def write_cache(hub: Path) -> Path:
    """Lay the example out as the Hub's cache: files by their hash, links to them by commit, the commit of a branch."""
    model = hub / "models--someone--tiny-moe"
    snapshot = model / "snapshots" / COMMIT
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True)
    for name in FILES:
        content = (EXAMPLE / name).read_bytes()
        blob = model / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    for branch in ("main", "v2"):
        (model / "refs" / branch).write_text(COMMIT)
    return snapshot


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: what a repository holds at a revision, and its files."""

    asked: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "models", "someone"] and parts[3] == "tiny-moe":
            names = [*FILES, "pytorch_model.bin", "modeling.py"]
            found = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            if "tree" in parts:
                found = [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in names]
            return self._send(200, json.dumps(found).encode(), body)
        if parts[:3] == ["someone", "tiny-moe", "resolve"] and parts[-1] in FILES:
            return self._send(200, (EXAMPLE / parts[-1]).read_bytes(), body)
        self._send(404, b"{}", body)

    def _send(self, code, content, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path):
    """Return the environment of a Hub on this machine, and what it was asked for."""
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield environment(tmp_path / "hub", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0"), asked
    server.shutdown()
    server.server_close()


def environment(hub: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return {**kept, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1", **more}


@pytest.mark.parametrize("name", [NAME, f"{NAME}@v2", f"{NAME}@{COMMIT}"])
def test_a_model_of_the_cache_is_a_source(tmp_path, name, monkeypatch):
    snapshot = write_cache(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert check_source(name) == snapshot
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert check_source(NAME) == Path(NAME)  # a folder of that name goes first
    (snapshot / "config.json").unlink()  # as a repository of GGUF files has none
    assert check_source(f"{NAME}@v2") == snapshot


@pytest.mark.long
def test_compiled_from_the_cache_and_verified_from_elsewhere(tmp_path):
    env = environment(tmp_path / "hub")
    write_cache(tmp_path / "hub")
    done = shell("compile", NAME, "--quantize", "int8", "-D", "kernels=onnxruntime", env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "tiny-moe-cpu-int8\n"), done.stderr
    made = tmp_path / "tiny-moe-cpu-int8"
    assert all(not path.is_symlink() for path in made.iterdir())
    assert (made / "tokenizer.json").read_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()
    (tmp_path / "elsewhere").mkdir()
    done = shell("verify", made, "--text-tokens", "50", "--json", env=env, cwd=tmp_path / "elsewhere")
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stderr


def test_a_model_that_is_nowhere_is_told_how_to_fetch(tmp_path):
    done = shell("compile", f"{NAME}@v3", env=environment(tmp_path / "hub"), cwd=tmp_path)
    assert done.returncode == 2
    assert "neither here nor in the Hugging Face cache" in done.stderr
    assert f"moec compile {NAME}@v3 --download" in done.stderr
    done = shell("compile", "a/b/c", "--download", env=environment(tmp_path / "hub"), cwd=tmp_path)
    assert done.returncode == 2 and "only a model on the Hugging Face Hub can be downloaded" in done.stderr


@pytest.mark.long
def test_download(hub, tmp_path):
    env, asked = hub
    done = shell("compile", NAME, "--download", "--stop-after", "graph", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'source "{NAME}"' in done.stdout
    fetched = {path.name for path in (tmp_path / "hub" / "models--someone--tiny-moe/snapshots" / COMMIT).iterdir()}
    assert fetched == set(FILES)  # no pickle and no code
    asked.clear()
    done = shell("inspect", NAME, "--json", env=env, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["source"] == NAME
    assert asked == []  # what is in the cache is not asked for
    done = shell("compile", "someone/nothing", "--download", env=env, cwd=tmp_path)
    assert done.returncode == 2 and "the model cannot be downloaded" in done.stderr


def test_links_out_of_a_checkpoint_are_refused(tmp_path):
    snapshot = write_cache(tmp_path / "hub")
    assert set(read_companions(snapshot)) == set(FILES) - {"model.safetensors"}
    secret = tmp_path / "secret.txt"
    secret.write_text("{}")
    for folder in (snapshot, Path(shutil.copytree(snapshot, tmp_path / "plain"))):
        (folder / "tokenizer_config.json").unlink()
        (folder / "tokenizer_config.json").symlink_to(secret)
        with pytest.raises(MoecError, match="a link to a file of another name outside of the checkpoint"):
            read_companions(folder)


def test_a_source_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "models/tiny").mkdir(parents=True)
    (tmp_path / "out/art").mkdir(parents=True)
    monkeypatch.chdir("/")
    assert find_source("models/tiny", tmp_path / "out/art") == tmp_path / "models/tiny"
    assert find_source("models/other", tmp_path / "out/art") is None
    monkeypatch.chdir(tmp_path)
    assert find_source("models/tiny", Path("/")) == Path("models/tiny")

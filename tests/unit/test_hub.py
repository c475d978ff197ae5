"""hub.py and hub_files.py: names, plans, and downloads by huggingface_hub's own client from a hub on loopback."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import hub_server
from condit.data.hub import HubName, RemoteFile, Repository, open_repository
from condit.weights.catalog import locate_adapter
from condit.weights.hub_files import (
    component_files,
    download_adapter,
    download_model,
    local_folder,
    model_files,
    of_variant,
)
from condit.weights.load import identify

BIG = bytes(range(256)) * 400


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h94/IP-Adapter", HubName("h94/IP-Adapter")),
        ("a/FLUX.1-dev@v1.0", HubName("a/FLUX.1-dev", "v1.0")),
        ("a/b/", HubName("a/b")),
        ("a/b/sub/x.safetensors", HubName("a/b", None, "sub/x.safetensors")),
        ("a/b@refs/pr/3/sub/x.bin", HubName("a/b", "refs/pr/3", "sub/x.bin")),
        ("ms:a/b@v1/x.safetensors", HubName("a/b", "v1", "x.safetensors", True)),
    ],
)
def test_a_name_has_a_repository_a_revision_and_a_path(text, name):
    assert HubName.of(text) == name and str(name) == text.rstrip("/")


@pytest.mark.parametrize("text", ["tiny", "./a/b", "../a/b", "/a/b", "~/a/b", "models/x.safetensors", "a//b", "a/b@"])
def test_other_texts_are_no_names(text):
    assert HubName.of(text) is None


def test_what_exists_and_every_path_object_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert HubName.of("a/b") is None and HubName.of("b/c") is not None
    assert HubName.of(Path("b/c")) is None


def test_a_mistyped_path_is_not_looked_up_where_its_folder_exists(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for find in (identify, locate_adapter):
        with pytest.raises(
            ValueError, match="No such file or folder is here.*the folder 'run' is here.*'run/export@main'"
        ):
            find("run/export")
    assert hub.requests == []
    assert HubName.of("run/export@main") == HubName("run/export", "main")
    assert HubName.of("ms:run/export") == HubName("run/export", None, modelscope=True)


def test_an_error_of_the_hub_says_first_that_nothing_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="^no file or folder 'run/export' here; on the hub: .* was not reached"):
        identify("run/export")


def test_names_of_the_catalogue_never_reach_a_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path))
    assert identify("tiny").kind == "tiny"
    with pytest.raises(FileNotFoundError, match="no weights for 'sd15'"):
        identify("sd15")
    with pytest.raises(ValueError, match="No adapter 'tiny/stile'"):
        locate_adapter("tiny/stile")
    with pytest.raises(ValueError, match="No model 'tiny/stile'"):
        identify("tiny/stile")
    assert hub.requests == []


# Plans, for the listings of published repositories (names as on the hub, not all of them)

VAE = "vae/config.json vae/diffusion_pytorch_model.safetensors"
SD15 = f"""{VAE} vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.safetensors model_index.json
 unet/config.json unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.bin
 unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
 text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16.safetensors
 text_encoder/pytorch_model.bin tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json
 scheduler/scheduler_config.json safety_checker/config.json safety_checker/model.safetensors
 feature_extractor/preprocessor_config.json v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors README.md"""
FLUX = f"""{VAE} model_index.json flux1-schnell.safetensors ae.safetensors README.md
 transformer/config.json transformer/diffusion_pytorch_model.safetensors.index.json
 transformer/diffusion_pytorch_model-00001-of-00002.safetensors scheduler/scheduler_config.json
 transformer/diffusion_pytorch_model-00002-of-00002.safetensors text_encoder/config.json
 text_encoder/model.safetensors text_encoder_2/config.json text_encoder_2/model-00001-of-00002.safetensors
 text_encoder_2/model-00002-of-00002.safetensors text_encoder_2/model.safetensors.index.json
 tokenizer/vocab.json tokenizer/merges.txt tokenizer_2/spiece.model tokenizer_2/tokenizer.json"""
SD15_INDEX = {part: ["x", "y"] for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler", "safety_checker")}


def repository(names: str) -> Repository:
    return Repository(HubName("a/b", "c0ffee"), {name: RemoteFile(1) for name in names.split()})


def test_of_stable_diffusion_one_copy_of_each_part_is_planned():
    plan = model_files(repository(SD15), "", SD15_INDEX)
    weights = {name for name in plan if name.endswith((".safetensors", ".bin", ".ckpt"))}
    parts = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}
    assert weights == {f"{part}.safetensors" for part in parts}
    assert {"model_index.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= {*plan}
    assert not [name for name in plan if name.startswith(("safety", "feature", "README"))]


def test_of_flux_the_shards_are_planned_and_the_single_file_is_not():
    plan = model_files(repository(FLUX), "", {})
    assert {*plan} == {*FLUX.split()} - {"flux1-schnell.safetensors", "ae.safetensors", "README.md"}
    assert not [p for p in component_files(repository(FLUX), "", ["text_encoder_2", "vae"]) if "transformer/diff" in p]


def test_half_precision_is_taken_where_there_is_nothing_else():
    half = repository("config.json diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.fp16.bin")
    assert model_files(half, "", {}) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


def test_a_variant_is_planned_for_the_parts_that_have_it():
    files = of_variant(repository(SD15).files, "fp16")
    plan = model_files(Repository(HubName("a/b", "c0ffee"), files), "", SD15_INDEX)
    weights = {name for name in plan if name.endswith((".safetensors", ".bin"))}
    parts = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}
    assert weights == {f"{part}.fp16.safetensors" for part in parts}
    assert of_variant(repository(SD15).files, "bf16") == of_variant(repository(SD15).files, None)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("config.json model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack", "model.safetensors"),
        ("config.json pytorch_model.bin", "pytorch_model.bin"),
        ("ViT-B_16.npz README.md", "ViT-B_16.npz"),
        ("model.safetensors other.safetensors", "model.safetensors"),
    ],
)
def test_of_a_network_alone_one_file_is_planned(names, chosen):
    assert [n for n in model_files(repository(names), "", {}) if n != "config.json"] == [chosen]


def test_several_models_in_one_folder_are_to_be_named():
    with pytest.raises(ValueError, match=r"holds 2 weight files: diffit_256.safetensors.* 'a/b@c0ffee/diffit_256"):
        model_files(repository("diffit_256.safetensors diffit_512.safetensors"), "", {})


@pytest.mark.parametrize(
    "lost",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ],
)
def test_a_part_that_the_repository_lacks_is_named_before_anything_is_downloaded(lost):
    stem = lost.removesuffix(".safetensors")  # with its variants
    names = " ".join(name for name in SD15.split() if not name.startswith(stem))
    with pytest.raises(FileNotFoundError, match=rf"no {lost.split('/')[0]}/\S+ in a/b@c0ffee"):
        model_files(repository(names), "", SD15_INDEX)


def test_a_shard_that_is_not_there_is_named():
    names = FLUX.replace("text_encoder_2/model-00001-of-00002.safetensors", "")
    with pytest.raises(FileNotFoundError, match="no model-00001-of-00002.safetensors at a/b@c0ffee, folder text_enc"):
        model_files(repository(names), "", {})


# Downloads


def test_a_file_comes_through_a_redirect_and_the_token_stays_with_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    commit = hub.add("a/b", {"config.json": b"{}", "sub/x.safetensors": BIG}, private=True)
    found = open_repository(HubName.of("a/b") or HubName(""))
    assert found.name.revision == commit and found.files["sub/x.safetensors"].bytes == len(BIG)
    folder = found.fetch(["config.json", "sub/x.safetensors"])
    assert (folder / "sub" / "x.safetensors").read_bytes() == BIG and (folder / "config.json").read_text() == "{}"
    assert any("/store/" in line for line in hub.requests) and not hub.leaked
    hub.requests.clear()
    assert found.fetch(["config.json", "sub/x.safetensors"]) == folder and hub.requests == []


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("a/b", {"x.safetensors": BIG})
    hub.cuts = 3
    folder = open_repository(HubName("a/b")).fetch(["x.safetensors"])
    ranges = [int(line.split("bytes=")[1][:-1]) for line in hub.requests if "bytes=" in line]
    assert len(ranges) == 3 and 0 < ranges[0] < ranges[1] < ranges[2]
    assert (folder / "x.safetensors").read_bytes() == BIG


def test_after_a_connection_is_lost_for_good_complete_files_stay_and_the_rest_is_loaded(hub):
    hub.add("a/b", {"x.safetensors": BIG, "y.safetensors": BIG[::-1]})
    found = open_repository(HubName("a/b"))
    found.fetch(["x.safetensors"])
    hub.cuts = 100
    with pytest.raises(OSError, match=r"(?s)(was not reached|broke off).*complete.* stay in the cache"):
        found.fetch(["x.safetensors", "y.safetensors"])
    hub.cuts, hub.requests[:] = 0, []
    folder = found.fetch(["x.safetensors", "y.safetensors"])
    assert (folder / "y.safetensors").read_bytes() == BIG[::-1]
    assert len([line for line in hub.requests if line.startswith("GET /store")]) == 1


def test_a_file_with_another_hash_is_removed(hub):
    hub.add("a/b", {"x.safetensors": BIG})
    hub.damaged.add("x.safetensors")
    found = open_repository(HubName("a/b"))
    with pytest.raises(ValueError, match=r"x.safetensors of a/b@\w+ arrived damaged .* was removed. Run again"):
        found.fetch(["x.safetensors"])
    hub.damaged.clear()
    assert (found.fetch(["x.safetensors"]) / "x.safetensors").read_bytes() == BIG


def test_a_file_of_another_size_is_refused(hub):
    hub.add("a/b", {"x.safetensors": b"other" * 100})
    hub.store[hashlib.sha256(b"other" * 100).hexdigest()] = b"other" * 99
    with pytest.raises(OSError, match=r"the transfer of a/b@\w+ broke off: .* should be of size 500 but has size 495"):
        open_repository(HubName("a/b")).fetch(["x.safetensors"])


def test_a_gated_model_says_which_page_to_accept(hub, monkeypatch):
    hub.add("a/b", {"x.safetensors": BIG}, gated=True)
    found = open_repository(HubName("a/b"))
    with pytest.raises(PermissionError, match=rf"gated: accept its licence at {hub.url}/a/b, .*HF_TOKEN.*no token"):
        found.fetch(["x.safetensors"])
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(PermissionError, match="the token in use has no access"):
        found.fetch(["x.safetensors"])
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert (found.fetch(["x.safetensors"]) / "x.safetensors").is_file()


def test_a_missing_repository_revision_and_file_are_told_apart(hub):
    hub.add("a/b", {"models/ip-adapter_sd15.safetensors": BIG})
    hub.add("a/secret", {"x.safetensors": BIG}, private=True)
    for name in ("a/nothing", "a/secret"):
        with pytest.raises(FileNotFoundError, match=rf"'{name}': no file or folder here, and no repository {hub.url}"):
            open_repository(HubName(name))
    with pytest.raises(FileNotFoundError, match="a/b has no revision 'v9'"):
        open_repository(HubName("a/b", "v9"))
    with pytest.raises(
        FileNotFoundError, match=r"no models/ip_adapter.bin in a/b@\w+. It has models/ip-adapter_sd15.s"
    ):
        download_adapter(HubName("a/b", None, "models/ip_adapter.bin"))


@pytest.mark.parametrize("status", [500, 503])
def test_without_the_hub_the_cache_serves(hub, status, monkeypatch):
    commit = hub.add("a/b", {"config.json": b"{}", "x.safetensors": BIG})
    folder = open_repository(HubName("a/b")).fetch(["x.safetensors"])
    hub.down = status
    again = open_repository(HubName("a/b"))
    assert again.name.revision == commit and again.fetch(["x.safetensors"]) == folder
    with pytest.raises(FileNotFoundError, match=r"no config.json in a/b@\w+ in the cache; the hub was not reached"):
        again.fetch(["config.json"])
    with pytest.raises(OSError, match=f"{hub.url}/a/other did not answer .*{status}"):
        open_repository(HubName("a/other"))


def test_a_hub_that_is_not_there_is_told_with_the_mirror(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9/a/b was not reached .* HF_ENDPOINT sets a mirror"):
        open_repository(HubName("a/b"))


def test_offline_mode_asks_nobody(hub, monkeypatch):
    commit = hub.add("a/b", {"x.safetensors": BIG})
    folder = open_repository(HubName("a/b")).fetch(["x.safetensors"])
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = open_repository(HubName("a/b"))
    assert again.name.revision == commit and again.fetch(["x.safetensors"]) == folder
    with pytest.raises(FileNotFoundError, match="'a/other' is not in the cache, and HF_HUB_OFFLINE forbids"):
        open_repository(HubName("a/other"))
    assert hub.requests == []


def test_the_environment_is_honoured(hub, tmp_path):
    hub.add("a/b", {"x.safetensors": BIG}, private=True)
    code = "from condit.data.hub import *; print(open_repository(HubName('a/b')).fetch(['x.safetensors']))"
    source = Path(__file__).parents[2] / "src"
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub_server.TOKEN, "PYTHONPATH": str(source)}

    def run(**more: str) -> Path:
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **settings, **more}, capture_output=True)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.decode().strip())

    folder = run()
    assert (tmp_path / "home") in folder.parents and (folder / "x.safetensors").read_bytes() == BIG
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == folder and hub.requests == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_bytes_of_all_files_together(hub, monkeypatch):
    hub.add("a/b", {"x.safetensors": BIG, "y.safetensors": BIG * 2, "config.json": b"{}"})
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    open_repository(HubName("a/b")).fetch(["x.safetensors", "y.safetensors", "config.json"])
    assert set(re.findall(r"/(\S+) \[", terminal.getvalue())) == {"307k"}


# What is loaded from a repository


def test_a_folder_of_a_part_comes_from_a_repository(hub, tmp_path):
    hub.add("a/vae", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": BIG, "model.ckpt": BIG})
    hub.add("a/pipe", {"vae/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": BIG, "x.safetensors": BIG})
    folder = Path(local_folder("a/vae", ["vae"]))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(p.name for p in Path(local_folder("a/pipe", ["vae"])).iterdir()) == ["vae"]
    assert local_folder(tmp_path) == tmp_path and local_folder("./a/vae") == "./a/vae"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model_index.json": {"_class_name": "StableDiffusion3Pipeline"}}, "StableDiffusion3Pipeline"),
        ({"model_index.json": {"_class_name": "KandinskyPipeline"}}, "KandinskyPipeline"),
        ({"config.json": {"model_type": "llama"}}, "llama"),
    ],
)
def test_a_model_that_condit_does_not_load_is_not_downloaded(hub, settings, what):
    files = {name: json.dumps(value).encode() for name, value in settings.items()}
    hub.add("a/b", {**files, "model.safetensors": BIG, "unet/diffusion_pytorch_model.safetensors": BIG})
    with pytest.raises(ValueError, match=f"No model 'a/b'. It is a {what}"):
        identify("a/b")
    assert not any("/store/" in line for line in hub.requests)


class StandIn(types.ModuleType):
    """ModelScope's package, as far as condit calls it: it asks the hub on loopback."""

    def __init__(self, url: str, home: Path):
        super().__init__("modelscope")
        self.url, self.home = url, home

    def get_model_files(self, name: str, revision: str | None = None, recursive: bool = False) -> list[dict]:
        assert recursive
        with urllib.request.urlopen(f"{self.url}/api/models/{name}/revision/{revision or 'main'}") as answer:
            return [{"Path": row["rfilename"], "Size": row["size"]} for row in json.load(answer)["siblings"]]

    def snapshot_download(self, name: str, revision: str | None = None, *, allow_patterns: list[str]) -> str:
        folder = self.home / name.replace(".", "___")  # as ModelScope's cache writes it
        for path in allow_patterns:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(f"{self.url}/{name}/resolve/{revision or 'main'}/{path}") as answer:
                (folder / path).write_bytes(answer.read())
        return str(folder)


def test_a_name_of_modelscope_goes_through_its_package(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match="pip install modelscope"):
        open_repository(HubName("a/b", modelscope=True))
    stand_in = StandIn(hub.url, tmp_path)
    api = types.ModuleType("modelscope.hub.api")
    api.HubApi = lambda: stand_in  # type: ignore[attr-defined]
    for name, module in (("", stand_in), (".hub", types.ModuleType("hub")), (".hub.api", api)):
        monkeypatch.setitem(sys.modules, f"modelscope{name}", module)
    stand_in.hub = types.SimpleNamespace(api=api)  # type: ignore[attr-defined]
    files = {"config.json": b"{}", "configuration.json": b"{}", "model.safetensors": BIG, "pytorch_model.bin": BIG}
    hub.add("a/FLUX.1", files)
    hub.repos["a/FLUX.1"].tags["v1"] = next(iter(hub.repos["a/FLUX.1"].commits))
    folder, name = download_model(HubName.of("ms:a/FLUX.1@v1") or HubName(""), lambda settings: None)
    assert str(name) == "ms:a/FLUX.1@v1" and folder == tmp_path / "a" / "FLUX___1"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "configuration.json", "model.safetensors"]


def test_the_client_is_the_real_one():
    assert "site-packages" in str(huggingface_hub.__file__)

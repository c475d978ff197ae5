"""Broken files of users: adapters, data rows, JSON. The error names the file and what is wrong with it."""

import json

import pytest
import torch

from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.controls.style_lora import StyleLoRA
from condit.data.images import save_image
from condit.data.pairs import check, open_pairs
from condit.training.run import check_data, read_recipe, tasks
from condit.weights.files import save_tensors
from condit.weights.folders import read_json
from condit.weights.load import LOADERS, identify, load_parts


def lora_of(unet, rank: int = 2) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in unet.named_modules():
        if name.endswith("attn2.to_k"):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank)
    return tensors


@pytest.mark.parametrize("kind", ["ip", "omini"])
def test_an_adapter_file_that_lacks_any_one_tensor_is_refused_by_name(kind, make_pipe, make_ip, make_omini, tmp_path):
    pipe = make_pipe(blocks=1)
    adapter, cls = (make_ip(pipe), IPAdapter) if kind == "ip" else (make_omini(pipe), OminiControl)
    for name in (tensors := adapter.tensors()):
        file = save_tensors(tmp_path / "canny.safetensors", {n: t for n, t in tensors.items() if n != name})
        with pytest.raises(ValueError, match=r"canny\.safetensors"):
            cls.load(file, pipe)


def test_an_adapter_file_without_tensors_is_refused(make_pipe, tmp_path):
    file = save_tensors(tmp_path / "canny.safetensors", {})
    for cls in (IPAdapter, OminiControl, StyleLoRA):
        with pytest.raises(ValueError, match="canny.safetensors holds no tensors. Is it cut off"):
            cls.load(file, make_pipe(blocks=1))


def test_loras_of_another_base_or_shape_are_refused_with_the_file(make_latent, tmp_path):
    pipe, other = make_latent("sd15"), make_latent("sdxl")
    tensors = lora_of(pipe.backbone)
    first = next(iter(tensors))
    text = {f"lora_te_text_model.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    for changes, host, message in (
        ({}, other, "takes no LoRA there.*Was it made for another base, such as SD 1.5 instead of SDXL"),
        ({first: torch.ones(12)}, pipe, r"matrices of shape \(12,\)"),
        ({first.replace("lora_A.weight", "alpha"): torch.ones(3)}, pipe, "no LoRA has"),
        (lora_of(pipe.backbone, rank=0), pipe, "rank >= 1"),
        (text, pipe, "text encoder.*ignore_text=True"),
        ({first.replace("lora_A.weight", "alpha"): torch.tensor(float("nan"))}, pipe, "alpha' holds NaN"),
    ):
        file = save_tensors(tmp_path / "style.safetensors", tensors | changes)
        with pytest.raises(ValueError, match=message):
            StyleLoRA.load(file, host)
    StyleLoRA.load(save_tensors(tmp_path / "style.safetensors", tensors | text), pipe, ignore_text=True)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "[" * 100_000, "{"])
def test_a_json_file_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    for read in (lambda: read_json(tmp_path / "model_index.json"), lambda: identify(tmp_path)):
        with pytest.raises(ValueError, match=r"model_index.json (is not JSON|holds a JSON \w+; expected an object)"):
            read()


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), IndexError("x"), RuntimeError("x")])
def test_what_a_loader_raises_on_strange_values_names_the_folder(tmp_path, monkeypatch, error):
    def fails(model, options):
        raise error

    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setitem(LOADERS, "flux", fails)
    with pytest.raises(ValueError, match=f"^{tmp_path} is broken or has values that condit does not read .*x"):
        load_parts(tmp_path)
    monkeypatch.setitem(LOADERS, "flux", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too big")))
    with pytest.raises(torch.OutOfMemoryError):
        load_parts(tmp_path)


def test_a_folder_beside_you_with_a_published_name_is_named_and_a_path_is_never_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDIT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "sd15"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(FileNotFoundError, match=r"no weights for 'sd15'.*Or pass '\./sd15', which is here too"):
        identify("sd15")
    assert {identify(source).kind for source in ("./sd15", folder.relative_to(tmp_path), folder)} == {
        "stable-diffusion"
    }


def test_data_check_goes_on_after_any_bad_row(tmp_path, pictures):
    from PIL import Image

    save_image(Image.fromarray(pictures(1)[0]), tmp_path / "ok.png")
    good = json.dumps({"file_name": "ok.png", "text": "x"}).encode()
    bad = [b'{"file_name": "\xff"}', b"[" * 100_000, b"null", b'{"file_name": "a\\u0000"}', b'{"file_name": "../x"}']
    bad.append(json.dumps({"file_name": "a" * 5000}).encode())
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([*bad, good]) + b"\n")
    report = check(tmp_path)
    assert report.pairs == 7 and len(report.problems) == 6
    assert [p.partition(" ")[0] for p in report.problems] == [f"metadata.jsonl:{n}:" for n in range(1, 7)]
    assert max(map(len, report.problems)) < 500  # a row is quoted in part
    with pytest.raises(ValueError, match="metadata.jsonl:1: not a JSON object"):
        open_pairs(tmp_path)


def test_data_check_goes_on_after_a_broken_tar(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(b"no tar")
    assert [problem[:6] for problem in check(tmp_path).problems] == ["a.tar:", "b.tar:"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("delta = [0, 99999999]", r"conditions\.0\.delta\.1: .*less than or equal to 4096 \(found 99999999\)"),
        ("adapter = '/elsewhere/x'", "adapter must be the name of a folder without dots or slashes"),
    ],
)
def test_a_wrong_field_of_a_recipe_is_named_without_the_names_of_validators(tmp_path, line, message):
    file = tmp_path / "recipe.toml"
    start = "task = 'omini'\n[train]\nsteps = 1\nbatch = 1\n"
    file.write_text(f"{start}[data]\nmodel = 'm'\npairs = 'p'\n[[data.conditions]]\nrole = 'a'\n{line}\n")
    with pytest.raises(ValueError, match=message):
        check_data(tasks()["omini"], read_recipe(file), file)
    file.write_text(f"{start}lr = inf\n[data]\n")
    with pytest.raises(ValueError, match=r"train\.lr: Input should be a finite number"):
        read_recipe(file)

"""publish.py: adapters saved with a model card and pushed to the hub on loopback; messages.py: both languages."""

import json
import re
import string
import tomllib
from pathlib import Path

import pytest
import torch

import hub_server
from condit.controls.deadiff import DEADiff
from condit.controls.instantstyle import InstantStyle
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.controls.style_lora import StyleLoRA
from condit.data import messages
from condit.data.hub import HubName
from condit.nn.lora import Linear, LoRA, linear_shapes
from condit.training.export import export_adapter
from condit.weights.files import save_tensors
from condit.weights.lora_files import TEXT
from condit.weights.lora_text import text_pairs

SOURCE = Path(messages.__file__).parents[1]
MESSAGES = tomllib.loads(Path(messages.__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def header(card: str) -> dict[str, str]:
    lines = card.split("---\n")[1].splitlines()
    return dict(line.split(": ") for line in lines if ": " in line)


def test_a_saved_adapter_loads_and_its_card_says_how(make_pipe, make_omini, tmp_path):
    pipe = make_pipe(name="me/base@0123456789abcdef0123456789abcdef01234567")
    adapter = make_omini(pipe, task="edges", delta=(0, 0))
    assert adapter.save_pretrained(tmp_path / "edges", license="apache-2.0") == tmp_path / "edges"
    again = OminiControl.load(tmp_path / "edges", pipe)
    assert again.config == adapter.config
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())
    card = (tmp_path / "edges" / "README.md").read_text(encoding="utf-8")
    assert header(card) == {
        "base_model": "me/base",
        "library_name": "condit",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
    }
    assert f'condit.load("{pipe.name}")' in card and "An OminiControl adapter for me/base@01234" in card
    assert '| task | "edges" |' in card


def test_a_card_names_no_base_model_that_is_no_repository(make_pipe, make_ip, tmp_path):
    make_ip(make_pipe()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in header(card) and "for random" in card


def test_a_trained_adapter_has_a_card(make_pipe, make_ip, tmp_path):
    export_adapter(make_ip(make_pipe()), tmp_path, {"steps": 10}, model="me/base@v1", base="c0ffee")
    assert json.loads((tmp_path / "card.json").read_text())["steps"] == 10
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert header(card)["base_model"] == "me/base" and "| steps | 10 |" in card


def test_a_pushed_adapter_loads_by_the_name_of_its_repository(hub, make_pipe, make_ip, monkeypatch):
    pipe = make_pipe()
    adapter = make_ip(pipe)
    with pytest.raises(PermissionError, match=rf"no write access to {hub.url}/me/style: set HF_TOKEN.*no token"):
        adapter.push_to_hub("me/style")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    address = adapter.push_to_hub("me/style", license="mit")
    commit = next(reversed(hub.repos["me/style"].commits))
    assert address == f"{hub.url}/me/style/commit/{commit}"
    assert hub.repos["me/style"].commits[commit].keys() == {"adapter.safetensors", "README.md"}
    assert b'IPAdapter.load("me/style", pipe)' in hub.repos["me/style"].commits[commit]["README.md"]
    again = IPAdapter.load("me/style", pipe)
    assert again.name == f"me/style@{commit}"
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())


# Messages


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_message_says_the_same_in_both_languages():
    for key, row in MESSAGES.items():
        assert row.keys() == {"en", "zh"}, key
        assert fields(row["en"]) == fields(row["zh"]), key
        assert re.search(r"[\u4e00-\u9fff]", row["zh"]) and not re.search(r"[\u4e00-\u9fff]", row["en"]), key


def test_every_message_is_used_and_every_one_used_is_there():
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    assert {key for key in MESSAGES if f'"{key}"' not in code} == set()
    assert set(re.findall(r'(?<!\w)text\(\s*"([\w-]+)"', code)) <= MESSAGES.keys()


@pytest.mark.parametrize(
    ("settings", "chinese"),
    [
        ({"CONDIT_LANG": "zh"}, True),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "zh_CN.UTF-8", "CONDIT_LANG": "en"}, False),
        ({"LANG": "de_DE.UTF-8"}, False),
    ],
)
def test_the_language_is_that_of_condit_lang_or_of_the_system(settings, chinese, monkeypatch):
    for name in ("CONDIT_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert messages.is_chinese() == chinese
    said = messages.text("gated", repo="a/b", page="https://x", token="-")
    assert ("许可" in said) == chinese and "https://x" in said


def test_a_beginners_error_is_in_chinese_on_a_chinese_system(hub, monkeypatch):
    from condit.weights.load import identify

    monkeypatch.setenv("CONDIT_LANG", "zh")
    with pytest.raises(FileNotFoundError, match=r"找不到 'a/nothing'：本地没有这个文件或文件夹，也没有 http"):
        identify("a/nothing")
    assert HubName.of("a/nothing") is not None


# Style LoRAs, InstantStyle, DEADiff


def made_lora(pipe, seed: int = 0) -> LoRA:
    paths = [path for path, module in pipe.backbone.named_modules() if isinstance(module, Linear)][:6]
    lora = LoRA(linear_shapes(pipe.backbone, paths), 2, alpha=5.0)
    g = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g))
    return lora


@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_a_style_lora_is_saved_in_diffusers_names_and_acts_as_before(kind, make_pipe, make_latent, tmp_path):
    pipe = make_pipe(name="me/base@v1") if kind == "flux" else make_latent("sd15")
    part = "transformer" if kind == "flux" else "unet"
    tensors = {n.replace("transformer.", f"{part}.", 1): t for n, t in made_lora(pipe).tensors().items()}
    adapter = StyleLoRA.load(save_tensors(tmp_path / "style.safetensors", tensors), pipe)
    again = StyleLoRA.load(adapter.save_pretrained(tmp_path / "saved"), pipe)
    assert again.tensors().keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(again.tensors()[name], tensor.to(pipe.dtype))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "condit.StyleLoRA.load" in card and "adapter.control()" in card and f'condit.load("{pipe.name}")' in card
    assert ("base_model" in header(card)) == (kind == "flux")


def test_a_style_lora_is_saved_with_its_updates_of_text_encoders(make_pipe):
    adapter = StyleLoRA(made_lora(make_pipe()), frozenset())
    for layer in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"):
        adapter.text[layer] = torch.ones(2, 8), torch.ones(8, 2)
    written = {name: t for name, t in adapter.tensors().items() if name.startswith(TEXT)}
    assert len(written) == 4
    for layer, pair in text_pairs(written).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, adapter.text[layer], strict=True))


def test_a_dora_is_not_saved(make_pipe):
    pipe = make_pipe()
    adapter = StyleLoRA(made_lora(pipe), frozenset())
    adapter.lora.bias["x"] = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="has biases or is a DoRA, which are not written. Copy the file"):
        adapter.tensors()


def test_instantstyle_publishes_its_ip_adapter(hub, make_pipe, make_ip, monkeypatch, tmp_path):
    pipe = make_pipe()
    adapter = make_ip(pipe)
    style = InstantStyle(adapter)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    style.push_to_hub("me/instant")
    saved = style.save_pretrained(tmp_path / "x")
    for again in (IPAdapter.load("me/instant", pipe), IPAdapter.load(saved, pipe)):
        assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in adapter.tensors().items())


def test_deadiff_loads_one_file_of_a_folder(make_latent, make_deadiff, make_tower, tmp_path):
    pipe = make_latent("sd15")
    adapter = make_deadiff(pipe)
    for name in ("a", "b"):
        adapter.save(tmp_path / "sub" / f"{name}.safetensors")
    again = DEADiff.load(tmp_path, pipe, subfolder="sub", weight_name="b.safetensors", image_encoder=make_tower())
    assert again.name.endswith("sub/b.safetensors")

"""publish.py: adapters saved with a model card and pushed to the hub on loopback; messages.py: both languages."""

import json
import re
import string
import tomllib
from pathlib import Path

import pytest
import torch

import hub_server
from condit.controls.ip_adapter import IPAdapter
from condit.controls.omini import OminiControl
from condit.data import messages
from condit.data.hub import HubName
from condit.training.export import export_adapter

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

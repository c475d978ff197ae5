"""InstantStyle's words: subtracted from image embeddings by the text tower of the same CLIP."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from condit.controls.instantstyle import Content, InstantStyle, Join, preset
from condit.controls.ip_adapter import IPAdapter
from condit.drawing.pipeline import Pipeline
from condit.encoders.image import CLIPImage, EncoderSize, TextTower
from ip_published import published, resampler, vision, write_file


@pytest.fixture(scope="module")
def pipe(make_latent) -> Pipeline:
    return make_latent("sd15")


@pytest.fixture
def file(pipe, tmp_path) -> Path:
    return write_file(pipe, tmp_path / "models")


class Words(TextTower):
    """Stands for a text tower: random vectors of words."""

    def __init__(self, hidden: int, projection: int):
        nn.Module.__init__(self)
        self.hidden, self.projection = hidden, projection

    def forward(self, phrases) -> Tensor:
        rows = [torch.randn(self.projection, generator=torch.Generator().manual_seed(len(p))) for p in phrases]
        return torch.stack(rows)


def test_one_or_more_phrases_are_subtracted_before_the_projector(pipe, file, pictures):
    style = InstantStyle(IPAdapter.load(file, pipe), Words(16, 12))
    assert style.text is not None
    e = style.adapter.features(pictures(2))
    one, two = style.text(["a dog"])[0], style.text(["a dog", "grass"])
    cases: tuple[tuple[Join, Content, torch.Tensor], ...] = (
        ("sum", "a dog", 0.5 * one),
        ("sum", ["a dog", "grass"], 0.5 * two.sum(0)),
        ("mean", ["a dog", "grass"], 0.5 * two.mean(0)),
        ("sum", [["a dog"], ["a dog", "grass"]], 0.5 * torch.stack([one, two.sum(0)])),  # of each image its own
    )
    for join, words, taken in cases:
        control = style.control(pictures(2), preset="style", content=words, content_scale=0.5, join=join)
        expected = style.adapter.reference(e - taken, where=preset("style", pipe.backbone))
        for path, pair in expected.kv.items():
            for actual, wanted in zip(control.kv[path], pair, strict=True):  # type: ignore[attr-defined]
                torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)  # the encoder saw one picture at a time
            assert torch.equal(control.negative().kv[path][1], expected.empty[path][1])  # type: ignore[union-attr]
        assert control.kv.keys() == expected.kv.keys()  # type: ignore[attr-defined]


def test_words_that_cannot_be_subtracted_raise(pipe, file, pictures, tmp_path):
    adapter = IPAdapter.load(file, pipe)
    style, picture = InstantStyle(adapter, Words(16, 12)), pictures(1)[0]
    for empty in ("", "  ", [], ["a dog", ""], [["a dog"], []]):
        with pytest.raises(ValueError, match="content must be words"):
            style.control(picture, content=empty)
    with pytest.raises(ValueError, match="content= needs the text tower"):
        InstantStyle(adapter).control(picture, content="a dog")
    with pytest.raises(ValueError, match="embeddings 14.*only with the text tower of the same CLIP"):
        InstantStyle(adapter, Words(16, 14)).control(picture, content="a dog")
    with pytest.raises(ValueError, match="a content vector of width 9; the image embeddings have 12"):
        style.control(picture, content=torch.zeros(9))
    with pytest.raises(ValueError, match="join must be"):
        style.control(picture, content=["a dog", "grass"], join="max")  # type: ignore[arg-type]
    tensors = {n: t for n, t in published(pipe).items() if "image_proj" not in n}
    plus = {f"image_proj.{n}": torch.randn(t.shape) / 8 for n, t in resampler(20, 12, 16, 1).items()}
    save_file(tensors | plus, file.parent / "plus.safetensors")
    with pytest.raises(ValueError, match="reads hidden features, from which words cannot be subtracted"):
        InstantStyle(IPAdapter.load(file.parent / "plus.safetensors", pipe), Words(16, 12)).control(
            picture, content="x"
        )
    with pytest.raises(ValueError, match="reads hidden features"):
        IPAdapter.load(file.parent / "plus.safetensors", pipe).control(picture, content=torch.zeros(12))


def test_a_text_tower_of_another_clip_raises_though_its_width_fits():
    bigg, h = EncoderSize(1664, 1280, 257, 224), EncoderSize(1280, 1024, 257, 224)
    Words(1280, 1280).check_twin(bigg)
    Words(1024, 1024).check_twin(h)
    with pytest.raises(ValueError, match=r"text tower is a CLIP \(states 768, embeddings 1024\).*ViT-H/14"):
        Words(768, 1024).check_twin(h)
    with pytest.raises(ValueError, match="text tower is CLIP ViT-bigG/14"):
        Words(1280, 1280).check_twin(h)


def test_an_encoder_of_its_own_on_the_pipeline_serves_a_global_adapter(pipe, tmp_path):
    save_file(published(pipe), tmp_path / "a.safetensors")  # 12 features, as the pipeline's own encoder has
    adapter = IPAdapter.load(tmp_path / "a.safetensors", pipe)
    assert adapter._encoder[0] is None
    assert isinstance(vision_of(tmp_path), CLIPImage)


def vision_of(tmp_path: Path) -> CLIPImage:
    from condit.weights.clip_towers import load_image_encoder

    return load_image_encoder(vision(tmp_path / "v"))

"""encoders/clip_model.py and clip_tokenizer.py against transformers' CLIPModel and PreTrainedTokenizerFast."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import CLIPModel, PreTrainedTokenizerFast

from condit.encoders.clip import embed_image, embed_text, normalise, token_ids
from condit.encoders.clip_model import ClipConfig
from condit.encoders.clip_patches import ClipPatches
from condit.encoders.clip_tokenizer import ClipTokenizer
from condit.encoders.prompts import warn_cut_tiny
from condit.encoders.words import words_of
from condit.weights.catalog import TINY
from condit.weights.tiny import load_clip
from condit_lab.training.clip_files import make_clip, make_tokenizer, save_clip, save_tokenizer

FOLDER = TINY / "model" / "clip"
PROMPTS = [
    "a red apple",
    "",
    "  Two   FOXES, one café [EOS] after another\n",
    "红苹果, flat style",
    "\u0000 \ufffd 🦊 zzyzx-ish don’t",
    "word " * 40,
    "[MASK] [UNK] ##ing",
]


@pytest.fixture(scope="module")
def ours():
    return load_clip(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    clip = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    return clip, PreTrainedTokenizerFast.from_pretrained(FOLDER, local_files_only=True)


def test_token_ids_equal_those_of_the_fast_tokenizer(ours, theirs):
    wanted = theirs[1](PROMPTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(token_ids(ours[1], PROMPTS), wanted)


def test_words_of_prompts_equal_those_of_the_fast_tokenizer(ours, theirs):
    assert ours[1].words(PROMPTS) == words_of(theirs[1], PROMPTS, 24)


def test_text_states_and_embeddings_equal_bit_for_bit(ours, theirs):
    ids = token_ids(ours[1], PROMPTS)
    with torch.no_grad():
        states, embedding = embed_text(ours[0], ids)
        wanted = theirs[0].text_model(input_ids=ids, output_hidden_states=True)
        assert torch.equal(states, wanted.last_hidden_state)
        assert torch.equal(embedding, normalise(theirs[0].text_projection(wanted.pooler_output)))
        assert torch.equal(torch.stack(ours[0].text_model(ids).hidden_states), torch.stack(wanted.hidden_states))


def test_image_states_and_embeddings_equal_bit_for_bit(ours, theirs):
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        hidden, embedding = embed_image(ours[0], images)
        wanted = theirs[0].vision_model(pixel_values=images, output_hidden_states=True)
        assert torch.equal(hidden, torch.stack(wanted.hidden_states))
        assert torch.equal(embedding, normalise(theirs[0].visual_projection(wanted.pooler_output)))


def test_patches_for_a_q_former_equal_with_either_tower(ours, theirs):
    image = torch.rand(1, 3, 100, 140, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(ClipPatches(ours[0].vision_model)(image), ClipPatches(theirs[0].vision_model)(image))


def test_gradients_equal(ours, theirs):
    """In training, too: the gradient of the loss by every weight."""
    ids, images = token_ids(ours[1], PROMPTS), torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    clip = load_clip(FOLDER)[0]
    ((embed_text(clip, ids)[1].sum() + embed_image(clip, images)[1].sum()) * clip.logit_scale).backward()
    text, image = theirs[0].text_model(input_ids=ids), theirs[0].vision_model(pixel_values=images)
    text, image = theirs[0].text_projection(text.pooler_output), theirs[0].visual_projection(image.pooler_output)
    ((normalise(text).sum() + normalise(image).sum()) * theirs[0].logit_scale).backward()
    wanted = {name: p.grad for name, p in theirs[0].named_parameters()}
    assert list(wanted) == [name for name, _ in clip.named_parameters()]
    for name, p in clip.named_parameters():
        # position embeddings sum over the batch in another order: transformers looks them up
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_folder_loads_in_transformers_and_here(tmp_path, dtype):
    tokenizer = make_tokenizer(["a red apple", "红苹果"], vocab_size=200)
    clip = make_clip(len(tokenizer)).to(dtype)
    save_clip(clip, tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    theirs = CLIPModel.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    again, words = load_clip(tmp_path)
    assert again.config == clip.config and words.tokenizer.to_str() == tokenizer.tokenizer.to_str()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, clip.state_dict()[name]) and torch.equal(value.float(), again.state_dict()[name])
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path)(PROMPTS, padding="max_length", truncation=True)
    assert torch.equal(torch.tensor(read["input_ids"]), token_ids(words, PROMPTS))


def test_what_the_embedded_tokenizer_cuts_off_is_named_in_a_warning(caplog):
    words = make_tokenizer(["a red apple"], vocab_size=60)
    warn_cut_tiny(words, ["a red apple", "apple " * 80 + "and a fox"])
    (record,) = caplog.records
    expected = rf"reads only the first {words.limit} tokens of a prompt; cut off: '\w*ple apple .* and a fox'$"
    assert re.search(expected, record.getMessage())


def test_a_tokenizer_without_the_special_tokens_raises():
    with pytest.raises(ValueError, match=r"no token '\[PAD\]'"):
        ClipTokenizer(Tokenizer(models.WordPiece(unk_token="[UNK]")))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "hidden_act", "quick_gelu", "hidden_act 'quick_gelu'.*only 'gelu'"),
        ("vision_config", "layer_norm_eps", 1e-6, "layer_norm_eps 1e-06"),
        ("vision_config", "image_size", None, "vision_config has no 'image_size'"),
        (None, "projection_dim", None, "no 'projection_dim'"),
    ],
)
def test_another_clip_raises(part, field, value, message):
    config = json.loads((FOLDER / "config.json").read_text())
    fields = config if part is None else config[part]
    if value is None:
        del fields[field]
    else:
        fields[field] = value
    with pytest.raises(ValueError, match=message):
        ClipConfig.from_fields(config, "a folder")

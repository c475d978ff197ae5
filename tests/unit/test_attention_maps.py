"""controls/attention_maps.py: the maps are the attention of the official formula, and the images do not change."""

from types import SimpleNamespace

import torch

from condit.controls.attention_maps import AttentionMaps
from condit.controls.control import Where
from condit.controls.ip_adapter import IPAdapter, IPConfig
from condit.controls.ip_reference import IPReference
from condit.nn.attention import Call, Site


def test_maps_of_every_step_and_layer_and_the_same_image(make_latent):
    pipe = make_latent("sd15")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = IPAdapter.new(pipe, IPConfig(12, 4, pipe.backbone.config.cross_attention_dim))
    control = adapter.reference(torch.randn(1, 12, generator=torch.Generator().manual_seed(1)))
    path = next(iter(control.kv))
    watched = AttentionMaps(control, where=path)
    how = {"seed": 0, "num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
    found, plain = (pipe("a red fox", controls=[c], **how).images for c in (watched, control))
    assert torch.equal(found, plain) and watched.describe() == control.describe()
    assert watched.maps.keys() == {path} and [m.shape for m in watched.maps[path]] == 3 * [watched.maps[path][0].shape]
    assert watched.maps[path][0].shape[0] == 1 and watched.maps[path][0].shape[2] == 4  # the negative side is not there
    torch.testing.assert_close(watched.maps[path][0].sum(-1), torch.ones(watched.maps[path][0].shape[:2]))


def test_a_map_weights_the_values_of_the_reference():
    """The side branch is the map times V' where there is one head."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, n, 8, generator=g) for n in (5, 3, 3))
    site, adapter = Site("x.attn2", "cross", 1), SimpleNamespace(config=SimpleNamespace(form="cross"))
    kv = {"x.attn2": (k, v)}
    reference = IPReference(kv=kv, empty={}, adapter=adapter, strength=1.0, where=Where())  # type: ignore[arg-type]
    watched = AttentionMaps(reference)
    call = Call(q, k, v, site, image=slice(0, 5), plain=q)
    out = watched.around(call, lambda call: torch.zeros_like(call.q))
    torch.testing.assert_close(out[:, 0], watched.maps["x.attn2"][0] @ v[:, 0])

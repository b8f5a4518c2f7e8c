"""Makes goldens_maps.npz: maps that pytorch-grad-cam and captum draw in float64 of a small network that anybody can draw again.

    python tests/make_map_goldens.py      # needs torch, grad-cam and captum

The legacy generator draws weights and image, since NumPy promises that its numbers never change.
"""

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "goldens_maps.npz"
SIDE, LABEL = 12, 2
SHAPES = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 6), "last": (6, 5)}  # HWIO, and [C, K]
HEADS = {"linear": 1, "quadratic": 2}  # power of the features before the mean over positions
PATCHES = {"overlapping": (4, 2), "over the border": (5, 3)}  # patch, stride
FILL = 0.5


def drawn():
    """Weights by name, and an image [12, 12, 3]."""
    random = np.random.RandomState(0)
    arrays = {
        key: random.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
        for key, shape in SHAPES.items()
    }
    # pytorch-grad-cam adds 1e-6 to the denominator of alpha, 2 g² + …: g must be large, and it is
    # the mean over 144 positions
    arrays["last"] *= 2e5
    arrays["image"] = random.random_sample((SIDE, SIDE, 3))
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def network(arrays, power):
    """The network in float64; its last features, as large as the image, are those of `convolutions`."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 6, 3, padding=1, bias=False),
                torch.nn.ReLU(),
            )
            self.linear = torch.nn.Linear(6, 5, bias=False)

        def forward(self, x):
            return self.linear((self.convolutions(x) ** power).mean((2, 3)))

    made = Network().double()
    first, second, last = (torch.from_numpy(arrays[key]).double() for key in SHAPES)
    made.load_state_dict(
        {
            "convolutions.0.weight": first.permute(3, 2, 0, 1),
            "convolutions.2.weight": second.permute(3, 2, 0, 1),
            "linear.weight": last.T,
        }
    )
    return made.eval()


def maps():
    """interpreter/variant -> map [12, 12]; those of occlusion are differences of logits, not scaled."""
    import torch
    from captum.attr import Occlusion
    from pytorch_grad_cam import GradCAMPlusPlus, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    arrays = drawn()
    image = torch.from_numpy(arrays["image"]).double().permute(2, 0, 1)[None]
    found = {}
    for head, power in HEADS.items():
        model = network(arrays, power)
        for name, method in {"grad_cam_pp": GradCAMPlusPlus, "layer_cam": LayerCAM}.items():
            draw = method(model=model, target_layers=[model.convolutions])
            found[f"{name}/{head}"] = draw(image, targets=[ClassifierOutputTarget(LABEL)])[0]
    for name, (patch, stride) in PATCHES.items():
        drops = Occlusion(network(arrays, 1)).attribute(
            image,
            sliding_window_shapes=(3, patch, patch),
            strides=(3, stride, stride),
            baselines=FILL,
            target=LABEL,
        )
        found[f"occlusion/{name}"] = drops[0, 0].detach().numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **maps())

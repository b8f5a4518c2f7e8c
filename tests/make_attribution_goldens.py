"""Makes goldens_attributions.npz: what captum and zennit say in float64 of a small network that anybody can draw again.

    python tests/make_attribution_goldens.py      # needs torch, captum and zennit

The legacy generator draws weights, image and noise, since NumPy promises that its numbers never change.
"""

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "goldens_attributions.npz"
SHAPES = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 8), "last": (8, 5)}  # HWIO, and [C, K]
LABEL, POINTS, BASELINE, SAMPLES = 2, 6, 0.25, 6
GAMMA = 0.25
SCORES = ("logit", "log_odds")


def drawn():
    """Weights by name, a bias of the first layer, an image [12, 12, 3] and noisy images [n, 12, 12, 3]."""
    random = np.random.RandomState(0)
    arrays = {
        key: random.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
        for key, shape in SHAPES.items()
    }
    arrays["bias"] = 0.3 * random.standard_normal(8)
    arrays["image"] = random.random_sample((12, 12, 3))
    noise = random.standard_normal((SAMPLES, 12, 12, 3))
    arrays["noisy"] = arrays["image"] + 0.1 * noise
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def network(arrays, score):
    """The network in float64, with scores [1, K] in place of logits."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 8, 3, bias=False),
                torch.nn.ReLU(),
                torch.nn.AvgPool2d(8),
                torch.nn.Flatten(),
            )
            self.linear = torch.nn.Linear(8, 5, bias=False)

        def forward(self, x):
            logits = self.linear(self.convolutions(x))
            if score == "logit":
                return logits
            others = torch.eye(logits.shape[-1], dtype=torch.bool)
            spread = logits[:, None].masked_fill(others, -torch.inf)  # row c: all but class c
            return logits - torch.logsumexp(spread, -1)

    made = Network().double()
    first, second, last = (torch.from_numpy(arrays[key]).double() for key in SHAPES)
    made.load_state_dict(
        {
            "convolutions.0.weight": first.permute(3, 2, 0, 1),
            "convolutions.0.bias": torch.from_numpy(arrays["bias"]).double(),
            "convolutions.2.weight": second.permute(3, 2, 0, 1),
            "linear.weight": last.T,
        }
    )
    return made.eval()


def attributions():
    """name/score -> attribution [12, 12, 3] by captum."""
    import torch
    from captum import attr

    arrays = drawn()
    image, noisy = (
        torch.from_numpy(arrays[key]).double().reshape(-1, 12, 12, 3).permute(0, 3, 1, 2)
        for key in ("image", "noisy")
    )
    found = {}
    for score in SCORES:
        model = network(arrays, score)
        saliency = attr.Saliency(model)
        drawn_by = {
            "input_x_gradient": attr.InputXGradient(model).attribute(image, target=LABEL),
            "guided_backprop": attr.GuidedBackprop(model).attribute(image, target=LABEL),
            "integrated_gradients": attr.IntegratedGradients(model).attribute(
                image,
                baselines=BASELINE,
                target=LABEL,
                n_steps=POINTS,
                method="riemann_middle",
            ),
            # the mean over noise of our own: that of captum's NoiseTunnel cannot be drawn again
            "smooth_grad": saliency.attribute(noisy, target=LABEL, abs=False).mean(0, True),
        }
        for name, values in drawn_by.items():
            found[f"{name}/{score}"] = values[0].detach().permute(1, 2, 0).numpy()
    return found


def relevance():
    """[12, 12, 3] by zennit: γ in the convolutions, 0 in the linear layer.

    No bias is positive: zennit weighs those that are by 1 + γ, we do not.
    """
    import torch
    from zennit import attribution, composites, rules, types

    arrays = drawn()
    model = network(arrays | {"bias": -np.abs(arrays["bias"])}, "logit")
    image = torch.from_numpy(arrays["image"]).double().permute(2, 0, 1)[None]
    composite = composites.LayerMapComposite(
        [
            (types.Convolution, rules.Gamma(GAMMA, stabilizer=1e-12)),
            (types.Linear, rules.Epsilon(1e-12)),
            (types.AvgPool, rules.Norm(1e-12)),
            (types.Activation, rules.Pass()),
        ]
    )
    one_hot = torch.eye(5).double()[[LABEL]]
    with attribution.Gradient(model, composite, attr_output=lambda out: out * one_hot) as draw:
        _, found = draw(image)
    return found[0].detach().permute(1, 2, 0).numpy()


if __name__ == "__main__":
    np.savez_compressed(PATH, **attributions(), **{"lrp/logit": relevance()})

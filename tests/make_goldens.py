"""Makes goldens_imagenet.npz: what torchvision's networks say in float64 of weights and an image that anybody can draw again.

    python tests/make_goldens.py      # needs torch and torchvision

The legacy generator draws them, since NumPy promises that its numbers never change.
"""

from pathlib import Path

import numpy as np

from adv2_jax.models.convert import canonical

PATH = Path(__file__).parent / "goldens_imagenet.npz"
# ours and torchvision's
NAMES = {name: name for name in ("resnet18", "resnet50", "densenet121", "densenet169")}
NAMES["vit_base_patch16"] = "vit_b_16"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PINNED = 8  # channels of the last features that are kept whole


def drawn(shapes):
    """Weights for shapes by name: no BatchNorm is the identity, no bias is zero; features of 5 to 13 rms, logits alike."""
    random = np.random.RandomState(0)
    # a residual network adds up what a dense one averages
    gain = 2 if "features.conv0.weight" in shapes else 1
    return {
        key: _draw(key, shape, gain, random).astype(np.float32)
        for key, shape in sorted(shapes.items())
    }


def _draw(key, shape, gain, random):
    uniform = random.random_sample(shape)
    if len(shape) > 1:
        return (2 * uniform - 1) * (3 * gain / np.prod(shape[1:])) ** 0.5
    positive = key.endswith(("running_var", "weight"))
    return uniform + 0.5 if positive else uniform - 0.5


def photograph():
    """[224, 224, 3] float32 in [0, 1]: coarse patches under noise, so that features differ from place to place."""
    random = np.random.RandomState(1)
    patches = np.kron(random.random_sample((14, 14, 3)), np.ones((16, 16, 1)))
    return (0.75 * patches + 0.25 * random.random_sample((224, 224, 3))).astype(np.float32)


def torchvision_network(name):
    """The network with drawn weights, in float64."""
    import torch
    import torchvision

    with torch.device("meta"):  # initialising takes longer than all the rest
        network = torchvision.models.get_model(NAMES[name], weights=None)
    # by our names, which give the order
    theirs = {
        key: value
        for key, value in network.state_dict().items()
        if "num_batches_tracked" not in key
    }
    new = canonical({key: np.zeros(()) for key in theirs}).renamed
    keys = {new.get(key, key): key for key in theirs}
    shapes = {ours: tuple(theirs[key].shape) for ours, key in keys.items()}
    arrays = {keys[key]: torch.from_numpy(array).double() for key, array in drawn(shapes).items()}
    network.load_state_dict(arrays, strict=False, assign=True)  # the counters are not used
    return network.eval()


def torchvision_forward(network, image):
    """Tensor [H, W, 3] -> last features [h, w, C] or tokens [T, C], and logits [K], both tensors."""
    import torch

    x = (image - torch.tensor(MEAN)) / torch.tensor(STD)
    x = x.permute(2, 0, 1)[None]
    if hasattr(network, "class_token"):
        seen = []
        network.encoder.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        logits = network(x)[0]
        return seen[0][0][0], logits
    if hasattr(network, "classifier"):
        features = torch.relu(network.features(x))
    else:
        features = torch.nn.Sequential(*list(network.children())[:-2])(x)
    return features[0].permute(1, 2, 0), network(x)[0]


def summary(features, logits):
    """What is kept of an answer: logits, mean and rms of every channel over the positions, and some channels whole."""
    positions = tuple(range(features.ndim - 1))
    return {
        "logits": logits,
        "mean": features.mean(positions),
        "rms": np.sqrt((features**2).mean(positions)),
        "pinned": features[..., :: features.shape[-1] // PINNED],
    }


def main():
    """Write the file."""
    import torch

    torch.set_default_dtype(torch.float64)
    image = torch.from_numpy(photograph()).double()
    found = {}
    with torch.no_grad():
        for name in NAMES:
            features, logits = torchvision_forward(torchvision_network(name), image)
            for part, array in summary(features.numpy(), logits.numpy()).items():
                found[f"{name}/{part}"] = array.astype(np.float32)
    np.savez_compressed(PATH, **found)


if __name__ == "__main__":
    main()

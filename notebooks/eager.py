"""The steps of attacks in eager PyTorch, beside which speed.py measures ours.

Written as the usual scripts are: NCHW images, `autograd.grad`, one step a Python iteration; cuDNN
chooses its fastest convolutions. The networks are functions of the same weights.
"""

import jax
import numpy as np
import torch
import torch.nn.functional as F

from adv2_jax.models.convert import to_state_dict

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # PyTorch's own default would round the logits compared


class Curved(torch.autograd.Function):
    """The step function 1[z > 0], whose derivative is the kernel of GRAD attacks."""

    @staticmethod
    def forward(context, z, tau):
        context.save_for_backward(z)
        context.tau = tau
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(context, slope):
        (z,) = context.saved_tensors
        return slope * 0.5 * context.tau * (z**2 + context.tau) ** -1.5, None


class CurvedRelu(torch.autograd.Function):
    """ReLU, whose first derivative is exact, and whose second is that of `Curved`."""

    @staticmethod
    def forward(context, z, tau):
        context.save_for_backward(z)
        context.tau = tau
        return z.clamp(min=0)

    @staticmethod
    def backward(context, slope):
        (z,) = context.saved_tensors
        return slope * Curved.apply(z, context.tau), None


class Twin:
    """A network of `adv2_jax.models` as PyTorch functions of its state dict."""

    def __init__(self, model):
        arrays = to_state_dict(model)
        self.weights = {
            key: torch.tensor(np.asarray(value), device=DEVICE) for key, value in arrays.items()
        }
        moments = [
            torch.tensor(values, device=DEVICE).view(1, 3, 1, 1)
            for values in (model.mean, model.std)
        ]
        self.mean, self.std = moments

    def conv(self, x, name, stride=1):
        kernel = self.weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(self, x, name):
        mean, var, scale, bias = (
            self.weights[f"{name}.{key}"]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, bias, eps=1e-5)

    def last_layer(self):
        name = next(
            key for key in ("linear", "fc", "classifier") if f"{key}.weight" in self.weights
        )
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def head(self, features):
        return F.linear(features.mean((2, 3)), *self.last_layer())


class ResNet(Twin):
    """ResNet, CIFAR or ImageNet style."""

    def features(self, x, relu=F.relu):
        x = relu(self.norm(self.conv((x - self.mean) / self.std, "conv1", self.stem), "bn1"))
        x = F.max_pool2d(x, 3, 2, 1) if self.stem == 2 else x
        names = dict.fromkeys(
            ".".join(key.split(".")[:2]) for key in self.weights if key.startswith("layer")
        )
        for name in sorted(names, key=lambda n: (n[5], int(n.split(".")[1]))):
            x = self.block(x, name, 2 if name.endswith(".0") and name[5] != "1" else 1, relu)
        return x

    @property
    def stem(self):
        return 2 if self.weights["conv1.weight"].shape[-1] == 7 else 1

    def block(self, x, name, stride, relu):
        deep = f"{name}.conv3.weight" in self.weights
        y = relu(self.norm(self.conv(x, f"{name}.conv1", 1 if deep else stride), f"{name}.bn1"))
        y = self.norm(self.conv(y, f"{name}.conv2", stride if deep else 1), f"{name}.bn2")
        if deep:
            y = self.norm(self.conv(relu(y), f"{name}.conv3"), f"{name}.bn3")
        if f"{name}.downsample.0.weight" in self.weights:
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        elif x.shape != y.shape:
            extra = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, extra, extra))
        return relu(x + y)


class DenseNet(Twin):
    """DenseNet-BC."""

    def features(self, x, relu=F.relu):
        x = self.conv((x - self.mean) / self.std, "features.conv0", 2)
        x = F.max_pool2d(relu(self.norm(x, "features.norm0")), 3, 2, 1)
        for b in range(1, 5):
            layer = 1
            while f"features.denseblock{b}.denselayer{layer}.conv1.weight" in self.weights:
                name = f"features.denseblock{b}.denselayer{layer}"
                y = self.conv(relu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
                y = self.conv(relu(self.norm(y, f"{name}.norm2")), f"{name}.conv2")
                x, layer = torch.cat([x, y], 1), layer + 1
            if b < 4:
                name = f"features.transition{b}"
                x = F.avg_pool2d(self.conv(relu(self.norm(x, f"{name}.norm")), f"{name}.conv"), 2)
        return relu(self.norm(x, "features.norm5"))


def twin(model):
    """Return the network in PyTorch, None where it is not written here.

    Raises:
        ValueError: it gives other logits than the network.
    """
    kinds = {"CifarResNet": ResNet, "ImageNetResNet": ResNet, "DenseNet": DenseNet}
    kind = kinds.get(type(model).__name__)
    if kind is None:
        return None
    net, image = kind(model), np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.vmap(lambda x: model.head(model.features(x)))(image))
    with torch.no_grad():
        theirs = net.head(net.features(torch.tensor(image.transpose(0, 3, 1, 2)).to(DEVICE)))
    off = np.abs(ours - theirs.cpu().numpy()).max() / np.abs(ours).max()
    if off > 1e-3:  # float32, through up to 169 layers
        raise ValueError(f"PyTorch's logits of {type(model).__name__} are off by {off:.1e}")
    return net


def min_max(m):
    """Return maps scaled to [0, 1], each by its own extremes."""
    low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
    return (m - low) / (high - low + 1e-12)


def odds(logits, targets):
    """Return the log-odds of the targets."""
    chosen = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return chosen[:, 0] - others.logsumexp(1)


def pgd(net, x, targets):
    """Return logits and no map."""
    return net.head(net.features(x)), None


def cam(net, x, targets):
    """Return logits and the CAM map."""
    features = net.features(x)
    weights = net.last_layer()[0][targets]
    return net.head(features), min_max(torch.einsum("bchw,bc->bhw", features, weights))


def grad_cam(net, x, targets):
    """Return logits and the Grad-CAM map."""
    features = net.features(x)
    logits = net.head(features)
    (slope,) = torch.autograd.grad(odds(logits, targets).sum(), features, create_graph=True)
    weighted = (features * slope.mean((2, 3), keepdim=True)).sum(1)
    return logits, min_max(F.relu(weighted))


def grad(net, x, targets):
    """Return logits and the GRAD map, attacked through a curved ReLU."""
    logits = net.head(net.features(x, lambda z: CurvedRelu.apply(z, 1e-3)))
    (slope,) = torch.autograd.grad(odds(logits, targets).sum(), x, create_graph=True)
    m = slope.abs().amax(1)
    return logits, min_max(F.avg_pool2d(m, 4) if m.shape[-1] >= 112 else m)


LOSSES = {"pgd": pgd, "cam": cam, "grad_cam": grad_cam, "grad": grad}


def attack_of(net, name, shape, precision, steps):
    """Return a function of no arguments that attacks a batch [B, H, W, 3], for speed.py to time."""
    # TF32 or not, as JAX's "highest" is float32 and what is below it TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "highest"
    torch.backends.cudnn.benchmark = True
    rng, (b, h, w, _) = np.random.default_rng(0), shape
    benign = torch.tensor(rng.random((b, 3, h, w), np.float32), device=DEVICE)
    targets = torch.tensor(rng.integers(0, 10, b), device=DEVICE)
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16")
    with half:
        drawn = LOSSES[name](net, benign.clone().requires_grad_(), targets)[1]
    wanted = None if drawn is None else torch.rand_like(drawn.detach())

    def attack():
        x, moved = benign.clone(), torch.zeros_like(benign)
        for _ in range(steps):
            x.requires_grad_()
            with half:
                logits, m = LOSSES[name](net, x, targets)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum")
                if m is not None:
                    loss = loss + ((m - wanted) ** 2).mean((1, 2)).sum()
            (slope,) = torch.autograd.grad(loss, x)
            with torch.no_grad():
                moved = 0.85 * moved + slope / slope.abs().mean((1, 2, 3), keepdim=True)
                x = (x - moved.sign() / 255).clamp(benign - 8 / 255, benign + 8 / 255).clamp(0, 1)
            x = x.detach()
        return x.cpu()

    return attack

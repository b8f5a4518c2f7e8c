"""MASK: the map is where an image must be blurred for its class to vanish (ADV² §3.5; Fong &
Vedaldi 2017).

No formula gives this map: it is where some dozens of steps down an objective end. Notation: f the
classifier, c the class, x the image, a = 1 - m the map; the paper's mask m is small where the
pixels matter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.sparse.linalg import cg

from adv2_jax.activations import relu_curved
from adv2_jax.blending import blend
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters.base import Context, Interpreter, Seen, Solver, recorded
from adv2_jax.losses import log_odds
from adv2_jax.maps import blur
from adv2_jax.options import bind, shown
from adv2_jax.types import Activation, Classifier, Image, Label, Map, Score


class MaskObjective(NamedTuple):
    """What a map minimises: presence of the class + l1 |mean(a) - area| + tv TV_β(a), with means
    where the paper has sums.

    Means hold for maps of any size. The sums of the released code are l1 = .0784, tv = 7.84, beta =
    3 at 28², with blur = 3.5/224; ours were found on the embedded set, where it is known what
    matters.

    Attributes:
        l1: weight of the map's size, 0 or more.
        tv: weight of its variation, 0 or more.
        beta: exponent β of the variation, 2 or more: below, its second derivative is not finite.
        blur: standard deviation of the blur, in sides of the image. A slight one leaves enough of
            the class to be seen.
        area: share of the image that the map is to cover, in [0, 1]. At 0 a map is to be small;
            above, l1 holds its size near the area, as the extremal perturbations of Fong et al.
            2019.
        game: "deletion" blurs where the map is high, and the class is to vanish; "preservation"
            blurs everything else, and the class is to stay.
        score: presence of the class, (logits, label) -> [], to be low for deletion and high for
            preservation. None stands for -log(1 - f_c) and -log f_c to be low, whose slope does not
            vanish where f_c rounds to 1 (or 0). `losses.probability` is the literal formula; for an
            image that f is too sure of, it has no slope, and the map comes out empty.
    """

    l1: float = 2.5
    tv: float = 10.0
    beta: float = 3.0
    blur: float = 0.6
    area: float = 0.0
    game: str = "deletion"
    score: Score | None = None

    def __repr__(self) -> str:
        return shown(self)


OBJECTIVE = MaskObjective()


class Game(NamedTuple):
    """Whether the class is to vanish (1) or to stay (-1), and the share of the image that a map lets through."""

    sign: int
    visible: Callable[[Map], Map]


ITERATIONS = 10

GAMES = {"deletion": Game(1, lambda a: 1 - a), "preservation": Game(-1, lambda a: a)}


class Descent(NamedTuple):
    """How a map is found. Static under `jit`, like all options.

    Attributes:
        size: entries of the map along the shorter side of the image; None is 28 at 224² and 8 at
            32² (`usual_size`).
        steps: of Adam, from .5 everywhere, clamped to [0, 1] after each.
        learning_rate: of the first step; it falls along half a cosine to a tenth, and stays there
            for whoever steps on.
        objective: what is minimised.
    """

    size: int | None = None
    steps: int = 50
    learning_rate: float = 0.2
    objective: MaskObjective = OBJECTIVE

    def __repr__(self) -> str:
        return shown(self)


class Memory(NamedTuple):
    """Where a descent stands: the map [h, w] in [0, 1], and Adam's moments."""

    map: Map
    optimiser: optax.OptState


def mask(
    model: Classifier,
    image: Image,
    label: Label,
    *,
    size: int | None = None,
    steps: int = 50,
    learning_rate: float = 0.2,
    objective: MaskObjective = OBJECTIVE,
) -> Map:
    """The mask that explains a class (ADV² §3.5; Fong & Vedaldi 2017), large = important: 1 - m of
    the paper.

    One program that loops over the steps. For a batch on a CPU, `adv2_jax.explain(...,
    interpreter="mask")` takes the same steps one by one, which is several times as fast there.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        size: entries of the map along the shorter side of the image; None is 28 at 224² and 8 at
            32² (`usual_size`).
        steps: of Adam, from .5 everywhere, clamped to [0, 1] after each; a gradient through the
            network each.
        learning_rate: of the first step; it falls along half a cosine to a tenth.
        objective: what is minimised: the game, its weights, the blur.

    Returns:
        [h, w] in [0, 1], not scaled: an image that does not show c has a map near zero.

    Raises:
        ValueError: names the option that is out of its range.
    """
    descent = check_descent(Descent(size, steps, learning_rate, objective))

    def body(_: int, memory: Memory) -> Memory:
        return step_mask(model, image, label, memory, descent)

    return jax.lax.fori_loop(0, steps, body, start_mask(image, descent)).map


def check_descent(descent: Descent) -> Descent:
    """The descent itself.

    Raises:
        ValueError: names the option that is out of its range.
    """
    size, steps, learning_rate, o = descent
    if o.game not in GAMES:
        raise ValueError(f"game {o.game!r} is not one of {', '.join(GAMES)}")
    for name, value, holds, allowed in (
        ("size", size, size is None or size >= 1, "1 or more"),
        ("steps", steps, steps >= 1, "1 or more"),
        ("learning_rate", learning_rate, 0 < learning_rate < float("inf"), "finite and above 0"),
        ("l1", o.l1, 0 <= o.l1 < float("inf"), "finite and not negative"),
        ("tv", o.tv, 0 <= o.tv < float("inf"), "finite and not negative"),
        ("beta", o.beta, 2 <= o.beta < float("inf"), "finite and 2 or more"),
        ("blur", o.blur, 0 < o.blur < float("inf"), "finite and above 0"),
        ("area", o.area, 0 <= o.area <= 1, "in [0, 1]"),
    ):
        if not holds:
            raise ValueError(f"{name} = {value} must be {allowed}")
    return descent


def usual_size(h: int, w: int) -> int:
    """28 at 224², as the released code, and 8 at 32²: a quarter of the shorter side, up to 28."""
    return max(min(h, w, 112) // 4, 1)


def start_mask(image: Image, descent: Descent) -> Memory:
    """A map of .5 everywhere, and an Adam that has seen nothing.

    Raises:
        ValueError: if the map is to be larger than the image.
    """
    h, w, _ = image.shape
    short = min(h, w)
    size = usual_size(h, w) if descent.size is None else descent.size
    if size > short:
        raise ValueError(f"size = {size} must be at most {short}, the shorter side of the image")
    a = jnp.full((round(h * size / short), round(w * size / short)), 0.5, image.dtype)
    return Memory(a, _adam(descent).init(a))


def step_mask(
    model: Classifier,
    image: Image,
    label: Label,
    memory: Memory,
    descent: Descent,
    act: Activation | None = None,
) -> Memory:
    """One step of Adam down `mask_loss`, clamped.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        memory: where the descent stands.
        descent: static options.
        act: stands in for every ReLU, or None; only one with curvature lets the step depend on the
            image as it should.
    """
    gradient = jax.grad(mask_loss, argnums=3)(
        model, image, label, memory.map, descent.objective, act
    )
    # in units of one entry, whose share of a mean is 1/size: Adam's ε then means the same for maps
    # of any size
    update, optimiser = _adam(descent).update(gradient * gradient.size, memory.optimiser)
    return Memory(jnp.clip(memory.map + update, 0, 1), optimiser)


def _adam(descent: Descent) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(descent.learning_rate, descent.steps, alpha=0.1)
    # short memories, for a short descent; a large ε, so that a gradient near zero is not blown up
    # and an optimum is kept; and something below the root, whose slope would be infinite where
    # there has been no gradient
    return optax.adam(rate, b1=0.7, b2=0.9, eps=0.5, eps_root=1e-12)


def mask_loss(
    model: Classifier,
    image: Image,
    label: Label,
    a: Map,
    objective: MaskObjective,
    act: Activation | None = None,
) -> Array:
    """ℓ_map(a; x), what a map minimises.

    Args:
        model: the classifier f.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        a: the map, [h, w] in [0, 1].
        objective: its terms.
        act: stands in for every ReLU.

    Returns:
        [], at least 0 unless the objective has a score of its own.
    """
    game = GAMES[objective.game]
    blurred = blur(image, objective.blur * min(image.shape[:2]))
    logits = logits_of(model, blend(image, game.visible(a), blurred), act)
    if objective.score is None:
        presence = jax.nn.softplus(game.sign * log_odds(logits, label))
    else:
        presence = game.sign * objective.score(logits, label)
    excess = a.mean() - objective.area
    # unlike that of |.|, its slope is not 0 for an empty map
    size = jnp.where(excess >= 0, excess, -excess)
    return presence + objective.l1 * size + objective.tv * variation(a, objective.beta)


def variation(a: Map, beta: float) -> Array:
    """TV_β: |difference|^β summed over vertical and horizontal neighbours, an entry of the map: [h, w] -> [] >= 0."""
    return (
        sum(
            (jnp.sum(jnp.abs(jnp.diff(a, axis=axis)) ** beta) for axis in (0, 1)),
            jnp.zeros((), a.dtype),
        )
        / a.size
    )


def unrolled(
    model: Classifier,
    image: Image,
    label: Label,
    memory: Memory,
    descent: Descent,
    act: Activation,
    steps: int,
) -> Map:
    """The map some steps ahead, whose slope in the image is that of these steps (ADV² §3.5).

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        memory: where the descent stands.
        descent: static options.
        act: stands in for every ReLU.
        steps: of the descent; none leave the map where it is, without a slope.
    """
    for _ in range(steps):  # a loop of XLA's would be slow on a CPU
        memory = step_mask(model, image, label, memory, descent, act)
    return memory.map


def implicit(
    model: Classifier,
    image: Image,
    label: Label,
    a: Map,
    descent: Descent,
    act: Activation,
    *,
    damping: float = 0.1,
    iterations: int = ITERATIONS,
) -> Map:
    """The map a itself, with the slope in x of the optimum that it is taken for.

    At an optimum ∂ℓ/∂a = 0 on the entries F strictly inside (0, 1), and the others stay where they
    are; so da = -(∂²ℓ/∂a_F² + damping)⁻¹ ∂²ℓ/∂a_F∂x dx, by conjugate gradients on Hessian-vector
    products.

    Args:
        model: the classifier.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        a: [h, w] in [0, 1].
        descent: static options.
        act: stands in for every ReLU.
        damping: 0 or more; where the map moves, the Hessian's own entries are about .1.
        iterations: of conjugate gradients at most, a gradient through the network each.
    """
    a, still = jax.lax.stop_gradient((a, image))
    free = (a > 0) & (a < 1)

    def slope(x: Image, b: Map) -> Map:
        return jnp.where(
            free, jax.grad(mask_loss, argnums=3)(model, x, label, b, descent.objective, act), 0
        )

    def damped_hessian(v: Map) -> Map:
        # of a vector of size 1: what an attack with a large λ asks for would overflow the float16
        # of a network
        size = jnp.maximum(jnp.abs(v).max(), jnp.finfo(v.dtype).tiny)
        curved = size * jax.jvp(lambda b: slope(still, b), (a,), (jnp.where(free, v / size, 0),))[1]
        return jnp.where(free, curved + damping * v, v)

    here = slope(image, a)
    nothing = here - jax.lax.stop_gradient(here)  # but it has the slope of `here`
    return a - cg(damped_hessian, nothing, maxiter=iterations)[0]


@recorded
def mask_interpreter(
    *,
    size: int | None = None,
    steps: int = 50,
    learning_rate: float = 0.2,
    objective: MaskObjective = OBJECTIVE,
    free: int = 2,
    ahead: int = 1,
    hypergradient: str = "unrolled",
) -> Interpreter:
    """MASK, and for the adversary a map that is always some steps short of the present image (ADV²
    §3.5).

    An attack carries a running map and its Adam state along. Each of its steps takes a few free
    steps of the descent on the present image, then some more that are differentiated, the
    look-ahead; the free ones are what it remembers.

    Args:
        size, steps, learning_rate, objective: of the descent, as in `mask`.
        free: steps before the look-ahead, 0 or more; the released code takes 4.
        ahead: steps of the look-ahead, 0 or more; the released code takes 4. Without any the map
            does not depend on the image: the attack is blind to it, and only scores what it meets.
        hypergradient: "unrolled" differentiates the look-ahead (the paper's way). "implicit" has
            none: it takes the running map for an optimum, whose slope is a Hessian-vector solve of
            10 iterations at most, and is charged for all of them.

    Returns:
        An interpreter; equal options give the same object.

    Raises:
        ValueError: names the option that is out of its range.
    """
    descent = check_descent(Descent(size, steps, learning_rate, objective))
    if hypergradient not in ("unrolled", "implicit"):
        raise ValueError(f"hypergradient {hypergradient!r} is not one of unrolled, implicit")
    for name, value in (("free", free), ("ahead", ahead)):
        if value < 0:
            raise ValueError(f"{name} = {value} must be 0 or more")

    explain = bind(mask, size=size, steps=steps, learning_rate=learning_rate, objective=objective)
    surrogate = bind(
        _mask_ahead, descent=descent, free=free, ahead=ahead, hypergradient=hypergradient
    )
    solver = Solver(
        bind(start_mask, descent=descent), bind(step_mask, descent=descent), _map_of, steps
    )
    return Interpreter("mask", explain, surrogate, faithful=False, solver=solver, needs=("act",))


def _map_of(memory: Memory) -> Map:
    return memory.map


def _mask_ahead(
    model: Classifier,
    image: Image,
    label: Label,
    context: Context,
    *,
    descent: Descent,
    free: int,
    ahead: int,
    hypergradient: str,
) -> Seen:
    memory: Memory = context.memory
    for _ in range(free):
        memory = step_mask(model, image, label, memory, descent)
    memory = jax.lax.stop_gradient(memory)

    def act(z: Array) -> Array:
        return relu_curved(z, context.tau)

    if hypergradient == "unrolled":
        m = unrolled(model, image, label, memory, descent, act, ahead)
    else:
        m = implicit(model, image, label, memory.map, descent, act)
    return Seen(logits_of(model, image), m, memory=memory)

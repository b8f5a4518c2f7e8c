"""MASK: the map marks the pixels whose blur removes the class (ADV² §3.5; Fong & Vedaldi 2017).

The map has no closed form: it is the result of a few dozen optimisation steps on ℓ_map. Notation:
f the classifier, c the class, x the image, a = 1 - m the map; the paper's mask m is small where the
pixels matter.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.scipy.sparse.linalg import cg

from adv2_jax.activations import relu_curved
from adv2_jax.blending import blend
from adv2_jax.capabilities import logits_of
from adv2_jax.interpreters.base import Context, Interpreter, Seen, Solver, interpreter_factory
from adv2_jax.losses import log_odds
from adv2_jax.maps import blur
from adv2_jax.options import bind, shown
from adv2_jax.types import Activation, Classifier, Image, Label, Map, Score


class MaskObjective(NamedTuple):
    """ℓ_map, the objective that a map minimises: presence + l1 |mean(a) - area| + tv TV_β(a).

    "Presence" is a number that grows with f_c on the blurred image. Means replace the paper's sums,
    so that one set of weights serves maps of any size.

    Attributes:
        l1: weight of the map's size, 0 or more.
        tv: weight of its variation, 0 or more.
        beta: exponent β of the variation, 2 or more: below, its second derivative is not finite.
        blur: standard deviation of the blur, in sides of the image. A weak blur leaves the class
            recognisable everywhere, and the map means little.
        area: share of the image that the map should cover, in [0, 1]. 0 asks for a small map; with
            another area l1 keeps the size near it, as for the extremal perturbations of Fong et al.
            2019.
        game: "deletion" blurs where the map is high, and presence is minimised; "preservation"
            blurs everything else, and presence is maximised.
        score: class score that stands for presence, (logits, label) -> []. None minimises
            -log(1 - f_c) for deletion and -log f_c for preservation, whose slopes do not vanish
            where f_c rounds to 1 (or 0). `losses.probability` is the formula of the paper: where f
            is too confident it has no slope, and the map stays empty.
    """

    # l1, tv and blur were found by search on the embedded set, where the object is known, by the
    # pointing game and the map inside and outside the object. The sums of the released code, as
    # means at 28²: l1 = .0784, tv = 7.84, beta = 3, blur = 3.5/224.
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
    """Direction of an objective and the share of the image that a map leaves visible.

    Attributes:
        sign: 1 if presence of the class is minimised, -1 if it is maximised.
        visible: map -> share of the image in the blend, both [h, w] in [0, 1].
    """

    sign: int
    visible: Callable[[Map], Map]


GAMES = {"deletion": Game(1, lambda a: 1 - a), "preservation": Game(-1, lambda a: a)}


class Descent(NamedTuple):
    """Options of the optimisation of a map; static under `jit`.

    Attributes:
        size: entries of the map along the shorter side of the image; None is 28 at 224² and 8 at
            32² (`usual_size`).
        steps: number of Adam steps, from .5 everywhere, clamped to [0, 1] after each.
        learning_rate: of the first step; it decays along half a cosine to a tenth, and keeps that
            value in later steps.
        objective: ℓ_map.
    """

    size: int | None = None
    steps: int = 50
    learning_rate: float = 0.2
    objective: MaskObjective = OBJECTIVE

    def __repr__(self) -> str:
        return shown(self)


class Memory(NamedTuple):
    """State of the optimisation: the running map [h, w] in [0, 1], and Adam's moments."""

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
    """Return the MASK map of a class, large = important, which is 1 - m of the paper (§3.5).

    It is one program that loops over the steps. For a batch on a CPU, `adv2_jax.explain(...,
    interpreter="mask")` calls the same steps one by one, which is several times as fast there.

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c the map explains.
        size: entries of the map along the shorter side of the image; None is 28 at 224² and 8 at
            32² (`usual_size`).
        steps: number of Adam steps, from .5 everywhere, clamped to [0, 1] after each; each costs
            one gradient through the network.
        learning_rate: of the first step; it decays along half a cosine to a tenth.
        objective: ℓ_map: the game, its weights, the blur.

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
    """Return the options themselves if all are in range.

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
    """Return the default map size: a quarter of the shorter side, at most 28."""
    # 28 at 224² and 8 at 32² are those of the released code
    return max(min(h, w, 112) // 4, 1)


def start_mask(image: Image, descent: Descent) -> Memory:
    """Return the state before the first step: a map of .5 everywhere and fresh Adam moments.

    Raises:
        ValueError: if the map would be larger than the image.
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
    """Take one Adam step on `mask_loss` and clamp the map to [0, 1].

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        memory: the running map and Adam's moments.
        descent: static options.
        act: replaces every ReLU, or None. To differentiate the step in the image it needs a second
            derivative, as that of `relu_curved`: the step is itself a gradient.
    """
    gradient = jax.grad(mask_loss, argnums=3)(
        model, image, label, memory.map, descent.objective, act
    )
    # times the number of entries, since the objective is made of means: Adam's ε then has the same
    # effect for maps of any size
    update, optimiser = _adam(descent).update(gradient * gradient.size, memory.optimiser)
    return Memory(jnp.clip(memory.map + update, 0, 1), optimiser)


def _adam(descent: Descent) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(descent.learning_rate, descent.steps, alpha=0.1)
    # - b1, b2: a short memory, since there are only some dozens of steps;
    # - eps: large, so that a gradient near zero is not scaled up and the map stays at an optimum;
    # - eps_root: the look-ahead differentiates the root, whose slope at 0 is infinite. It is 0 in
    #   entries whose gradient has always been 0.
    return optax.adam(rate, b1=0.7, b2=0.9, eps=0.5, eps_root=1e-12)


def mask_loss(
    model: Classifier,
    image: Image,
    label: Label,
    a: Map,
    objective: MaskObjective,
    act: Activation | None = None,
) -> Array:
    """Return ℓ_map(a; x), the objective that a map minimises.

    Args:
        model: the classifier f.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        a: the map, [h, w] in [0, 1].
        objective: weights of its terms.
        act: replaces every ReLU.

    Returns:
        [] >= 0 unless the objective has a score.
    """
    game = GAMES[objective.game]
    blurred = blur(image, objective.blur * min(image.shape[:2]))
    logits = logits_of(model, blend(image, game.visible(a), blurred), act)
    if objective.score is None:
        # softplus(u_c) = -log(1 - f_c) and softplus(-u_c) = -log f_c, without the rounding of f_c
        presence = jax.nn.softplus(game.sign * log_odds(logits, label))
    else:
        presence = game.sign * objective.score(logits, label)
    excess = a.mean() - objective.area
    # |excess|, but with slope 1 at 0 where JAX's abs has slope 0: an empty map must stay under the
    # pressure of l1
    size = jnp.where(excess >= 0, excess, -excess)
    return presence + objective.l1 * size + objective.tv * variation(a, objective.beta)


def variation(a: Map, beta: float) -> Array:
    """Return TV_β, the sum of |difference of neighbours|^β over h w: [h, w] -> [] >= 0."""
    vertical, horizontal = (jnp.abs(jnp.diff(a, axis=axis)) ** beta for axis in (0, 1))
    return (vertical.sum() + horizontal.sum()) / a.size


def unrolled(
    model: Classifier,
    image: Image,
    label: Label,
    memory: Memory,
    descent: Descent,
    act: Activation,
    steps: int,
) -> Map:
    """Return the map after some more steps, differentiated through these steps (ADV² §3.5).

    Args:
        model: the classifier.
        image: [H, W, 3] in [0, 1].
        label: [] the class c.
        memory: the running map and Adam's moments.
        descent: static options.
        act: replaces every ReLU.
        steps: number of steps; with 0 the map is returned as it is, and its slope is 0.
    """
    # unrolled in Python: XLA:CPU compiles convolutions inside loops to slow code (jax issue 12868)
    for _ in range(steps):
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
    iterations: int = 10,
) -> Map:
    """Return the map a itself, with the derivative in x that it has if a minimises ℓ_map.

    Implicit function theorem: at a minimum ∂ℓ/∂a = 0 on the entries F strictly inside (0, 1), and
    the others do not move; so da = -(∂²ℓ/∂a_F² + damping)⁻¹ ∂²ℓ/∂a_F∂x dx, solved by conjugate
    gradients on Hessian-vector products.

    Args:
        model: the classifier.
        image: x, [H, W, 3] in [0, 1].
        label: [] the class c.
        a: [h, w] in [0, 1], near a minimum.
        descent: static options.
        act: replaces every ReLU.
        damping: added to the Hessian's diagonal, 0 or more. The default is about the size of the
            entries where the map moves; the most negative eigenvalue seen was -.02, and conjugate
            gradients need none below 0.
        iterations: at most so many of conjugate gradients, each one Hessian-vector product.
    """
    # constants in the operator: since the solution is 0, a derivative of the operator would add
    # nothing but the work of third derivatives
    a, fixed = jax.lax.stop_gradient((a, image))
    free = (a > 0) & (a < 1)

    def slope(x: Image, b: Map) -> Map:
        return jnp.where(
            free, jax.grad(mask_loss, argnums=3)(model, x, label, b, descent.objective, act), 0
        )

    def damped_hessian(v: Map) -> Map:
        # on a vector scaled to a largest entry of 1: the cotangents of an attack with a large λ
        # would overflow a float16 network. `tiny` keeps the zero vector from 0/0.
        size = jnp.maximum(jnp.abs(v).max(), jnp.finfo(v.dtype).tiny)
        product = jax.jvp(lambda b: slope(fixed, b), (a,), (jnp.where(free, v / size, 0),))[1]
        # the identity on entries at 0 or 1: the matrix stays invertible and they do not mix
        return jnp.where(free, size * product + damping * v, v)

    residual = slope(image, a)
    # the value is 0, the derivative that of `residual`: the map is returned unchanged
    zero = residual - jax.lax.stop_gradient(residual)
    return a - cg(damped_hessian, zero, maxiter=iterations)[0]


@interpreter_factory
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
    """MASK, attacked through a running map that lags the image by a few inner steps (ADV² §3.5).

    An attack carries a running map and its Adam state from step to step. Each of its steps first
    takes some free inner steps on the present image, and keeps their result; then it takes the
    look-ahead, some more inner steps, which are differentiated and not kept.

    Args:
        size, steps, learning_rate, objective: options of the explained map, as in `mask`.
        free: inner steps before the look-ahead, 0 or more; the released code takes 4.
        ahead: inner steps of the look-ahead, 0 or more; the released code takes 4. With 0 the map
            has no gradient in the image: the attack ignores it and only scores its iterates by it.
        hypergradient: "unrolled" differentiates the look-ahead, as in the paper. "implicit" takes
            no look-ahead: it treats the running map as a minimum and solves a linear system for its
            derivative by at most 10 Hessian-vector products, all of which are charged.

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

    surrogate = bind(
        _mask_ahead, descent=descent, free=free, ahead=ahead, hypergradient=hypergradient
    )
    solver = Solver(
        bind(start_mask, descent=descent), bind(step_mask, descent=descent), _map_of, steps
    )
    return Interpreter(
        "mask",
        bind(mask, **descent._asdict()),
        surrogate,
        # the running map is not the explained one, which takes a whole solve
        faithful=False,
        solver=solver,
        needs=("act",),
    )


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
    # truncated: the free steps, of this outer step and of all before it, are not differentiated
    memory = jax.lax.stop_gradient(memory)
    act = partial(relu_curved, tau=context.tau)
    if hypergradient == "unrolled":
        m = unrolled(model, image, label, memory, descent, act, ahead)
    else:
        m = implicit(model, image, label, memory.map, descent, act)
    return Seen(logits_of(model, image), m, memory=memory)

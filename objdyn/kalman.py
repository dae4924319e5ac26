r"""Exact inference in linear Gaussian state-space models (LGSSM) whose initial state is a mixture.

.. math::
    z \sim \mathrm{Cat}(\pi), \quad h_1 \mid z = k \sim N(\mu_k, S_k), \quad
    h_t = A h_{t-1} + u + N(0, \Sigma_H), \quad a_t = B h_t + N(0, \Sigma_A)

One model is shared by every sequence; the leading axes of ``observations`` are sequences, objects, or both. Covariances
do not depend on the data, so they are computed once (for each distinct pattern of observed frames), and only means
per sequence. Three forms of the same numbers:

    dense         O(1) operations in time: one Cholesky factor of (t p, t p)       training, t up to some hundreds
    sequential    O(t) of small matrices; a frame depends on the past alone        long t on a CPU
    scan          2 log2(t) rounds of small matrices                               long t on an accelerator

All compute in float64 whatever they are given, and return the dtype of the observations. Gradients flow to every field
of the model and to the observations; the dense likelihood has its first derivative written out, and no second.

Sources: Chiappa & Paquet, "Unsupervised Separation of Dynamics from Pixels", section 2.1.2 (equations 3 to 5), for the
model; Särkkä & García-Fernández, "Temporal Parallelization of Bayesian Smoothers" (2021), for the scan; Rauch, Tung &
Striebel (1965) for the smoother; Durbin & Koopman, "A simple and efficient simulation smoother for state space time
series analysis" (2002), for posterior samples.
"""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["dense", "sequential", "scan"]

LOG_2PI = math.log(2 * math.pi)
TINY = 1e-30
"""A variance that is zero in all but name, where a matrix that may be zero must be factorised."""


class LGSSM(NamedTuple):
    r"""A linear Gaussian state-space model with k components of the initial state; any d and p, any A and B.

    Covariances are symmetric; ``emission_cov`` and ``initial_cov`` positive definite, ``transition_cov`` positive
    semi-definite (zero is allowed: motion without noise).
    """

    transition: Float[Tensor, "d d"]
    """:math:`A`"""
    offset: Float[Tensor, " d"]
    """:math:`u`, added in every step"""
    emission: Float[Tensor, "p d"]
    """:math:`B`"""
    transition_cov: Float[Tensor, "d d"]
    r""":math:`\Sigma_H`"""
    emission_cov: Float[Tensor, "p p"]
    r""":math:`\Sigma_A`"""
    initial_logits: Float[Tensor, " k"]
    r""":math:`\log \pi` up to a constant"""
    initial_mean: Float[Tensor, "k d"]
    r""":math:`\mu_k`"""
    initial_cov: Float[Tensor, "k d d"]
    """:math:`S_k`"""


class Filtered(NamedTuple):
    """The state of each frame given the frames up to it, for each component.

    Where all sequences have the same frames observed, the covariances do not depend on the sequence: they are then
    computed once and expanded (a view, not to be written to).
    """

    mean: Float[Tensor, "*batch k t d"]
    """E[h_t | a_1..a_t, z = k]"""
    cov: Float[Tensor, "*batch k t d d"]
    predicted_mean: Float[Tensor, "*batch k t d"]
    """E[h_t | a_1..a_{t-1}, z = k]; the initial mean for the first frame"""
    predicted_cov: Float[Tensor, "*batch k t d d"]
    log_likelihood: Float[Tensor, "*batch k"]
    """log p(a | z = k) of the observed frames, nats"""


class Smoothed(NamedTuple):
    """The state of each frame given all observed frames, for each component; covariances as in ``Filtered``."""

    mean: Float[Tensor, "*batch k t d"]
    cov: Float[Tensor, "*batch k t d d"]


class Sampled(NamedTuple):
    """Sequences drawn from a model."""

    component: Int[Tensor, "*batch"]
    states: Float[Tensor, "*batch t d"]
    observations: Float[Tensor, "*batch t p"]


class FieldError(ValueError):
    """A field of a model with which nothing can be computed."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        """Name of the field, ``initial_cov[k]`` for one of several, or ``joint`` for what they add up to."""


class NotFiniteError(FieldError):
    """A field with NaN or infinite entries."""


class NotPositiveDefiniteError(FieldError):
    """A covariance that is not positive definite (``transition_cov``: not positive semi-definite)."""


def component_log_likelihood(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch k"]:
    r"""The log-likelihood log p(a | z = k) of the observed frames, in nats, summed over time.

    ``observed`` says which frames are seen: (t,) for all sequences alike, or anything that broadcasts to (\*batch, t);
    ``None`` means all. What stands in ``observations`` at other frames, NaN included, has no influence; without any
    observed frame the result is 0. ``dense`` factorises once per distinct mask.

    Raises:
        ValueError: a shape that does not fit the model, a mask that is not bool, an unknown method.
        NotPositiveDefiniteError: a ValueError that names the covariance.
        NotFiniteError: as well, where its entries or those of A and B are not finite.
    """
    return _components(model, observations, observed, method).to(observations.dtype)


def log_likelihood(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch"]:
    r"""The log-likelihood of the observed frames, in nats, summed over time.

    .. math::  \log p(a) = \log \sum_k \pi_k \, p(a \mid z = k)

    Arguments and errors are those of ``component_log_likelihood``.
    """
    log_prior = model.initial_logits.double().log_softmax(-1)
    return torch.logsumexp(_components(model, observations, observed, method) + log_prior, -1).to(observations.dtype)


def component_posterior(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Form = "dense",
) -> Float[Tensor, "*batch k"]:
    """The log-probability log p(z = k | a) of each component given the observed frames; normalised over k.

    Arguments and errors are those of ``component_log_likelihood``.
    """
    joint = _components(model, observations, observed, method) + model.initial_logits.double()
    return joint.log_softmax(-1).to(observations.dtype)


def filter(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Literal["sequential", "scan"] = "sequential",
) -> Filtered:
    """The Kalman filter: p(h_t | a_1..a_t, z = k) for every frame and component.

    ``sequential`` walks over the frames; covariances are updated in Joseph's form and symmetrised. ``scan`` finds
    the covariances, and then the means, in log2(t) rounds each. Where a frame is not observed the state is predicted.

    Arguments and errors are those of ``component_log_likelihood``.
    """
    _check_choice(method, ("sequential", "scan"))
    data = _sequences(model, observations, observed)
    passed = _filter(model, data, method)
    return Filtered(
        mean=_of_sequences(passed.filtered, data, observations.dtype),
        cov=_of_masks(passed.covariances.filtered, data, observations.dtype),
        predicted_mean=_of_sequences(passed.predicted, data, observations.dtype),
        predicted_cov=_of_masks(passed.covariances.predicted, data, observations.dtype),
        log_likelihood=_of_sequences(passed.log_likelihood, data, observations.dtype),
    )


def smooth(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    method: Literal["rts", "dense"] = "rts",
) -> Smoothed:
    r"""The smoother: p(h_t | all observed frames, z = k) for every frame and component, seen or not; it fills gaps.

    ``rts`` goes back over the filter's results (Rauch, Tung & Striebel):

    .. math::
        J = P_t A^\top (P^-_{t+1})^{-1}, \quad m^s_t = m_t + J (m^s_{t+1} - m^-_{t+1}), \quad
        P^s_t = (I - JA) P_t (I - JA)^\top + J (P^s_{t+1} + \Sigma_H) J^\top

    The last is :math:`P_t + J (P^s_{t+1} - P^-_{t+1}) J^\top` as a sum of positive terms, so that nothing cancels. The
    modified Bryson-Frazier form, which inverts no predicted covariance :math:`P^-`, does cancel: with
    :math:`\Sigma_H = 0`, :math:`\Sigma_A = 10^{-6} I`, :math:`S_k = 100 I` its covariances were wrong by 12 per cent
    where these were within 1e-9. Where :math:`P^-` is singular, a rounding error on its diagonal picks one :math:`J`.

    ``dense`` conditions the joint Gaussian of all t d state variables on the observations: the same numbers, for tests
    and for short clips.

    Arguments and errors are those of ``component_log_likelihood``.
    """
    _check_choice(method, ("rts", "dense"))
    data = _sequences(model, observations, observed)
    if method == "rts":
        passed = _filter(model, data, "sequential")
        gain, cov = _smooth_covariances(model, passed.covariances)
        mean = _smooth_means(passed, gain, data)
    else:
        mean, cov = _smooth_dense(model, data)
    return Smoothed(_of_sequences(mean, data, observations.dtype), _of_masks(cov, data, observations.dtype))


def forecast(
    model: LGSSM, mean: Float[Tensor, "*batch d"], cov: Float[Tensor, "*batch d d"], steps: int
) -> tuple[Float[Tensor, "*batch steps d"], Float[Tensor, "*batch steps d d"]]:
    r"""The ``steps`` states that follow a state N(mean, cov), without observations; entry j is j + 1 steps later.

    .. math::  m_j = A^j m + \sum_{i<j} A^i u, \qquad P_j = A^j P A^{j\top} + \sum_{i<j} A^i \Sigma_H A^{i\top}

    A position follows as ``means @ B.T``. The result has the dtype of ``mean``.

    Raises:
        ValueError: less than one step, or a shape that does not fit the model.
    """
    _check_model(model)
    _check_steps(steps)
    d = len(model.transition)
    if mean.shape[-1:] != (d,) or cov.shape[-2:] != (d, d):
        raise ValueError(
            f"mean must be (..., {d}) and cov (..., {d}, {d}), got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    A, u, _, Q, *_ = _float64(model)
    powers = _responses(A, torch.eye(d, dtype=A.dtype, device=A.device), steps + 1)
    before, after = powers[:-1], powers[1:]
    means = torch.einsum("tde,...e->...td", after, mean.double()) + (before @ u).cumsum(0)
    covs = after @ cov.double().unsqueeze(-3) @ after.mT + (before @ Q @ before.mT).cumsum(0)
    return means.to(mean.dtype), covs.to(mean.dtype)


def sample(model: LGSSM, shape: tuple[int, ...], steps: int, generator: torch.Generator | None = None) -> Sampled:
    """Sequences of ``steps`` frames drawn from the model; ``shape`` are the leading axes.

    Drawn from ``generator``, which must live on the model's device, or from torch's global state when it is ``None``.
    Given the component, states and observations are reparameterised: gradients flow to the model. The result has the
    dtype of ``initial_mean``.

    Raises:
        ValueError: less than one step, or fields whose shapes do not fit.
        NotPositiveDefiniteError: a ValueError that names the covariance.
    """
    _check_model(model)
    _check_steps(steps)
    weights = model.initial_logits.detach().double().softmax(-1)
    component = torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator)
    states, observations = _simulate(model, component, steps, generator)
    dtype = model.initial_mean.dtype
    return Sampled(
        component.reshape(shape),
        states.to(dtype).reshape(*shape, *states.shape[1:]),
        observations.to(dtype).reshape(*shape, *observations.shape[1:]),
    )


def sample_posterior(
    model: LGSSM,
    observations: Float[Tensor, "*batch t p"],
    observed: Bool[Tensor, "*mask t"] | None = None,
    component: Int[Tensor, "*batch"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "*batch"], Float[Tensor, "*batch t d"]]:
    r"""A component and a path of states drawn from p(z, h | a), or from p(h | a, z) for a ``component`` that is given.

    A path and its observations :math:`(h^+, a^+)` are drawn from the model;
    :math:`h^+ + E[h \mid a] - E[h \mid a^+]` then has the posterior's law (Durbin & Koopman 2002). Forward
    filtering with backward sampling has the same law, but must factorise conditional covariances, which are zero where
    :math:`\Sigma_H` is. Drawn from ``generator``, and reparameterised, as in ``sample``.

    Other arguments and errors are those of ``component_log_likelihood``.
    """
    data = _sequences(model, observations, observed)
    if component is None:
        log_joint = _filter(model, data, "sequential").log_likelihood + model.initial_logits.double()
        component = torch.multinomial(log_joint.detach().softmax(-1), 1, generator=generator).reshape(data.batch)
    elif component.shape != data.batch:
        raise ValueError(f"component must have the leading axes, {tuple(data.batch)}, got {tuple(component.shape)}")
    index = component.flatten()
    drawn, drawn_observations = _simulate(model, index, data.values.shape[1], generator)
    # E[h | a] is affine in a: the difference of two is the answer of a model whose means are all zero
    centred = model._replace(offset=torch.zeros_like(model.offset), initial_mean=torch.zeros_like(model.initial_mean))
    difference = data._replace(values=_where_seen(data.values - drawn_observations, data))
    passed = _filter(centred, difference, "sequential")
    gain, _ = _smooth_covariances(centred, passed.covariances)
    mean = _smooth_means(passed, gain, difference)
    states = drawn + mean[torch.arange(len(mean), device=mean.device), index]
    return component, _of_sequences(states, data, observations.dtype)


def mix(
    log_weights: Float[Tensor, "*batch k"], mean: Float[Tensor, "..."], cov: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    r"""The mean and covariance of a mixture over k.

    .. math::  m = \sum_k w_k m_k, \qquad P = \sum_k w_k \left( P_k + (m_k - m)(m_k - m)^\top \right)

    ``mean`` is (\*batch, k, ..., d) and ``cov`` (\*batch, k, ..., d, d), as ``filter`` and ``smooth`` return them; both
    lose the axis k. The weights are normalised here.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    k = log_weights.ndim - 1
    if mean.shape[: k + 1] != log_weights.shape or cov.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(
            f"mean must be {tuple(log_weights.shape)} + (..., d), as log_weights, and cov one d more, "
            f"got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    weights = log_weights.softmax(-1).reshape(*log_weights.shape, *[1] * (mean.ndim - k - 1))
    mixed = (weights * mean).sum(k)
    apart = mean - mixed.unsqueeze(k)
    return mixed, (weights.unsqueeze(-1) * (cov + apart.unsqueeze(-1) * apart.unsqueeze(-2))).sum(k)


# What follows is internal. Axes: n sequences (all leading axes as one), m distinct masks, k components, t frames,
# s = t - 1 steps between them, o seen entries of the t p.


class _Sequences(NamedTuple):
    """Observations in float64 and the distinct patterns of their seen frames."""

    values: Float[Tensor, "n t p"]
    """Zero where a frame is not seen."""
    seen: Bool[Tensor, "m t"] | None
    """The distinct masks; None if every frame is seen."""
    mask: Int[Tensor, " n"] | None
    """Which mask a sequence has; None if all have the same."""
    batch: torch.Size
    """The leading axes, of which n is the product."""


class _Covariances(NamedTuple):
    """What the filter knows before it sees data."""

    predicted: Float[Tensor, "m k t d d"]
    filtered: Float[Tensor, "m k t d d"]
    gain: Float[Tensor, "m k t d p"]
    """Zero where a frame is not seen."""
    factor: Float[Tensor, "m k t p p"]
    """Lower Cholesky factor of the innovation's covariance."""


class _Passed(NamedTuple):
    """What the filter returns."""

    covariances: _Covariances
    predicted: Float[Tensor, "n k t d"]
    filtered: Float[Tensor, "n k t d"]
    log_likelihood: Float[Tensor, "n k"]


def _check_model(model: LGSSM) -> None:
    d, p, k = len(model.transition), len(model.emission), len(model.initial_logits)
    shapes = ((d, d), (d,), (p, d), (d, d), (p, p), (k,), (k, d), (k, d, d))
    for name, field, shape in zip(LGSSM._fields, model, shapes, strict=True):
        if field.shape != shape:
            raise ValueError(
                f"{name} must be {shape} where transition has d = {d}, emission p = {p} and initial_logits k = {k}, "
                f"got {tuple(field.shape)}"
            )


def _check_choice(method: str, choices: tuple[str, ...]) -> None:
    if method not in choices:
        raise ValueError(f"method must be one of {', '.join(choices)}, got {method!r}")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _sequences(model: LGSSM, observations: Tensor, observed: Tensor | None) -> _Sequences:
    """Check the input and bring it to the form in which the rest takes it."""
    _check_model(model)
    p = len(model.emission)
    if observations.ndim < 2 or observations.shape[-1] != p or observations.shape[-2] == 0:
        raise ValueError(f"observations must be (..., t, {p}) with t at least 1, got {tuple(observations.shape)}")
    if not observations.is_floating_point():
        raise ValueError(f"observations must be floating point, got {observations.dtype}; convert them")
    batch, t = observations.shape[:-2], observations.shape[-2]
    values = observations.double().reshape(-1, t, p)
    if observed is None:
        return _Sequences(values, None, None, batch)
    if observed.dtype != torch.bool:
        raise ValueError(f"observed must be bool, True where a frame is seen, got {observed.dtype}")
    try:
        masks = observed.expand(*batch, t).reshape(-1, t)
    except RuntimeError:
        raise ValueError(f"observed must broadcast to {(*batch, t)}, got {tuple(observed.shape)}") from None
    if observed.ndim == 1:
        data = _Sequences(values, observed.expand(1, t), None, batch)
    else:
        seen, mask = torch.unique(masks, dim=0, return_inverse=True)
        data = _Sequences(values, seen, mask if len(seen) > 1 else None, batch)
    return data._replace(values=_where_seen(values, data))


def _where_seen(values: Float[Tensor, "n t p"], data: _Sequences) -> Float[Tensor, "n t p"]:
    """Zero at the frames that are not seen: NaN there would survive a product with a gain of zero."""
    return values if data.seen is None else torch.where(_selected(data.seen, data).unsqueeze(-1), values, 0.0)


def _selected(per_mask: Tensor, data: _Sequences) -> Tensor:
    """(m, ...) to (n, ...), or to (1, ...) where all sequences have the same mask."""
    return per_mask if data.mask is None else per_mask[data.mask]


def _of_masks(per_mask: Tensor, data: _Sequences, dtype: torch.dtype) -> Tensor:
    """(m, ...) to the leading axes of the observations; a view where all sequences have the same mask."""
    per_mask = per_mask.to(dtype)
    if data.mask is None:
        return per_mask[0].expand(*data.batch, *per_mask.shape[1:])
    return per_mask[data.mask].reshape(*data.batch, *per_mask.shape[1:])


def _of_sequences(per_sequence: Tensor, data: _Sequences, dtype: torch.dtype) -> Tensor:
    return per_sequence.to(dtype).reshape(*data.batch, *per_sequence.shape[1:])


def _float64(model: LGSSM) -> LGSSM:
    return LGSSM(*(field.double() for field in model))


def _symmetric(matrix: Float[Tensor, "... d d"]) -> Float[Tensor, "... d d"]:
    return 0.5 * (matrix + matrix.mT)


def _nudged(cov: Float[Tensor, "d d"], eps: float) -> Float[Tensor, "d d"]:
    """A positive semi-definite matrix made positive definite, by what is a rounding error at precision ``eps``."""
    nudge = 16 * eps * cov.diagonal().sum() + TINY
    return cov + nudge * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)


def _require_definite(model: LGSSM, info: Int[Tensor, "..."] | None = None) -> None:
    """Raise if a covariance of the model, or a factorisation that reported ``info``, is not positive definite.

    One transfer from the device; only a failure is looked into.
    """
    eps = torch.finfo(model.transition_cov.dtype).eps
    with torch.no_grad():
        noise = _nudged(model.transition_cov.double(), eps)
        _, square = torch.linalg.cholesky_ex(torch.cat([model.initial_cov.double(), noise.unsqueeze(0)]))
        _, emission = torch.linalg.cholesky_ex(model.emission_cov.double())
        failures = torch.cat([square, emission.view(1), *([] if info is None else [info.flatten()])])
        if not failures.any():
            return
    for name, field in zip(LGSSM._fields, model, strict=True):
        if not field.isfinite().all():
            raise NotFiniteError(name, "has entries that are not finite; look for what made them so before this call")
    covariances = {"emission_cov": model.emission_cov.double()}
    covariances |= {f"initial_cov[{k}]": cov.double() for k, cov in enumerate(model.initial_cov)}
    for name, cov in {"transition_cov": noise, **covariances}.items():
        if torch.linalg.cholesky_ex(cov).info:
            wanted = "semi-definite (zero is allowed)" if name == "transition_cov" else "definite"
            least = torch.linalg.eigvalsh(cov)[0].item()
            raise NotPositiveDefiniteError(
                name,
                f"must be positive {wanted}, but its least eigenvalue is {least:.3g}; build it as L L^T plus a floor",
            )
    least = torch.linalg.eigvalsh(model.emission_cov.double())[0].item()
    raise NotPositiveDefiniteError(
        "joint",
        "covariance of the observed frames is not positive definite in float64, although each field's is: emission_cov "
        f"(least eigenvalue {least:.3g}) is too small beside what transition_cov adds up to; raise its floor",
    )


def _components(model: LGSSM, observations: Tensor, observed: Tensor | None, method: Form) -> Float[Tensor, "*batch k"]:
    """``component_log_likelihood`` in float64, so that differences of its values keep their digits."""
    _check_choice(method, ("dense", "sequential", "scan"))
    data = _sequences(model, observations, observed)
    if method == "dense":
        return _of_sequences(_dense_log_likelihood(model, data), data, torch.float64)
    return _of_sequences(_filter(model, data, method).log_likelihood, data, torch.float64)


# The dense form.


def _responses(A: Float[Tensor, "d d"], B: Float[Tensor, "q d"], steps: int) -> Float[Tensor, "t q d"]:
    """B A^j for j = 0..steps - 1, in log2(steps) doublings."""
    q = len(B)
    responses, power = B, A
    while len(responses) < steps * q:
        responses = torch.cat([responses, responses[: steps * q - len(responses)] @ power])
        power = power @ power
    return responses.view(steps, q, -1)


def _diagonal_sums(blocks: Float[Tensor, "t q t q"]) -> Float[Tensor, "t q t q"]:
    r"""Block (t, s) of the result is the sum over r >= 1 of block (t - r, s - r).

    The covariance that noise leaves: with G_j = B A^j and blocks G_t Sigma G_s^T it is
    sum_r G_{t-r} Sigma G_{s-r}^T over the steps r that both frames have behind them. Sheared, diagonals become columns
    and the sum is a cumulative one: O(t^2), where the product of the block Toeplitz matrix of the G_j with its
    transpose is O(t^3).
    """
    t, q = blocks.shape[:2]
    width = 2 * t - 1
    sheared = blocks.new_zeros(t, q, width, q)
    # frame (t, s) goes to column s - t + width // 2
    strides = (q * width * q - q, width * q, q, 1)
    sheared.as_strided((t, q, t, q), strides, (t - 1) * q)[1:, :, 1:] = blocks[:-1, :, :-1]
    return sheared.cumsum_(0).as_strided((t, q, t, q), strides, (t - 1) * q)


def _noise_cov(responses: Float[Tensor, "t q d"], transition_cov: Float[Tensor, "d d"]) -> Float[Tensor, "tq tq"]:
    """What transition noise adds to the covariance of the t q variables B h_1..B h_t."""
    t, q, _ = responses.shape
    flat = responses.flatten(0, 1)
    return _diagonal_sums((flat @ transition_cov @ flat.T).view(t, q, t, q)).reshape(t * q, t * q)


def _drift(responses: Float[Tensor, "t q d"], offset: Float[Tensor, " d"]) -> Float[Tensor, " tq"]:
    """What the offset adds to their mean: that of all steps before."""
    steps = responses @ offset
    return (steps.cumsum(0) - steps).flatten()


class _DenseLogLikelihood(torch.autograd.Function):
    r"""Log-densities of sequences that share one mask under the joint Gaussian, with their gradient written out.

    Stacked over time, a = G h_1 + c + N(0, N) with G_j = B A^j, and only h_1 depends on the component. So N alone,
    common to all components, is factorised, and h_1 is a regression. With C = N + G S G^T, m = G mu + c and h the
    posterior mean of h_1,

    .. math::
        (a - m)^\top C^{-1} (a - m) = (a - c - G h)^\top N^{-1} (a - c - G h) + (h - \mu)^\top S^{-1} (h - \mu), \quad
        |C| = |N| \, |I + S G^\top N^{-1} G|

    Positive terms, and h enters in second order: a wide S costs no digits, where a factor of C loses as many as C has
    in its condition number (at t = 150, S = 100 I, Sigma_A = 1e-6 I: 5e-4 nats). The derivatives are
    :math:`-\alpha` by a, :math:`\alpha` by m and :math:`\frac12 (\alpha \alpha^\top - C^{-1})` by C, where
    :math:`\alpha = C^{-1} (a - m) = N^{-1} (a - c - G h)`. One node stands for more than a hundred in the graph, which
    is most of the time at t = 30.
    """

    @staticmethod
    def forward(
        ctx: Any,
        transition: Tensor,
        offset: Tensor,
        emission: Tensor,
        transition_cov: Tensor,
        emission_cov: Tensor,
        initial_mean: Tensor,
        initial_cov: Tensor,
        values: Float[Tensor, "n t p"],
        rows: Int[Tensor, " o"] | None,
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, ""]]:
        """Log-densities, and what the factorisation reports; ``rows`` are the seen entries of the t p."""
        A, u, B, Q, S = (x.double() for x in (transition, offset, emission, transition_cov, initial_cov))
        mu, R = initial_mean.double(), emission_cov.double()
        (n, t, p), (k, d) = values.shape, mu.shape
        responses = _responses(A, B, t)
        G, apart, N = responses.flatten(0, 1), values.flatten(1) - _drift(responses, u), _noise_cov(responses, Q)
        N.view(t, p, t, p).diagonal(dim1=0, dim2=2).add_(R.unsqueeze(-1))
        if rows is not None:
            G, apart, N = G[rows], apart[:, rows], N[rows.unsqueeze(-1), rows]
        L, info = torch.linalg.cholesky_ex(N)
        white = torch.linalg.solve_triangular(L, torch.cat([apart, G.T]).T, upper=False)
        y, W = white.split([n, d], 1)
        projected = W.T @ white
        score, information = projected.split([n, d], 1)  # of the data about h_1
        # h = mu + root z, and root root^T = S
        root, _ = torch.linalg.cholesky_ex(S)
        gain = root.mT @ information
        factor, _ = torch.linalg.cholesky_ex(torch.eye(d, dtype=A.dtype, device=A.device) + gain @ root)
        sides = root.mT @ score - gain @ mu.unsqueeze(-1), gain, root.mT
        solved = torch.cholesky_solve(torch.cat(sides, -1), factor)
        z = solved[..., :n]
        h = (mu.unsqueeze(-1) + root @ z).transpose(0, 1).reshape(d, k * n)
        square = y.repeat(1, k).addmm_(W, h, alpha=-1).square_().sum(0).view(k, n) + z.square().sum(1)
        half_log_det = L.diagonal().log().sum() + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
        ctx.save_for_backward(A, u, Q, responses, rows, L, white, root, solved, h)
        ctx.mark_non_differentiable(info)
        return (-0.5 * (square + len(L) * LOG_2PI) - half_log_det).T, info

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (the decorator hides the parameters' names)
        ctx: Any, grad: Float[Tensor, "n k"], _: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The chain back: N, G, c and the initial states, then responses, then powers."""
        A, u, Q, responses, rows, L, white, root, solved, h = ctx.saved_tensors
        (t, p, d), (n, k) = responses.shape, grad.shape
        grad = grad.T
        total = grad.sum(1).view(k, 1, 1)
        alpha, X = torch.linalg.solve_triangular(L.mT, white, upper=True).split([n, d], 1)  # X = N^-1 G
        alpha = alpha.repeat(1, k).addmm_(X, h, alpha=-1)
        weighted = alpha * grad.flatten()
        d_mean = weighted.view(-1, k, n).sum(1)
        if rows is not None:
            d_mean = d_mean.new_zeros(t * p, n).index_copy_(0, rows, d_mean)
        d_values = -d_mean.T.reshape(n, t, p)
        if not any(ctx.needs_input_grad[:7]):  # a frozen model
            return *[None] * 7, d_values, None

        # C^-1 = N^-1 - X V X^T and C^-1 G S = X V, V being the posterior covariance of h_1
        XV = X @ (total * (root @ solved[..., n + d :])).sum(0)
        d_N = torch.cholesky_inverse(L).mul_(-0.5 * total.sum())
        d_N.addmm_(weighted, alpha.T, alpha=0.5).addmm_(XV, X.T, alpha=0.5)
        d_G = weighted @ h.T - XV
        # G^T alpha and G^T C^-1 G, without the cancellation in these products
        beta, GCG = torch.linalg.solve_triangular(root.mT, solved[..., : n + d], upper=True).split([n, d], -1)
        weighted_beta = beta * grad.unsqueeze(1)
        d_initial_mean = weighted_beta.sum(-1)
        d_initial_cov = 0.5 * (weighted_beta @ beta.mT - total * GCG)
        if rows is not None:
            seen_N, d_N = d_N, d_N.new_zeros(t * p, t * p)
            d_N[rows.unsqueeze(-1), rows] = seen_N
            d_G = d_G.new_zeros(t * p, d).index_copy_(0, rows, d_G)

        G, d_N, d_drift = responses.flatten(0, 1), d_N.view(t, p, t, p), d_mean.sum(1).view(t, p)
        d_emission_cov = d_N.diagonal(dim1=0, dim2=2).sum(-1)
        d_blocks = _diagonal_sums(d_N.flip(0, 2)).flip(0, 2).reshape(t * p, t * p)  # its transpose runs the other way
        d_blocks_G = d_blocks @ G
        d_transition_cov = G.T @ d_blocks_G
        later = (d_drift.sum(0) - d_drift.cumsum(0)).flatten()
        d_offset = later @ G
        d_G.addmm_(d_blocks_G, Q, alpha=2).addr_(later, u)

        # G_j = G_{j-1} A: what reaches G_j also reaches those before it, times a power of A^T; again in doublings
        power, step = A, p
        while step < t * p:
            d_G[:-step].add_(d_G[step:] @ power.T)
            power, step = power @ power, 2 * step
        d_dynamics = G[:-p].T @ d_G[p:], d_offset, d_G[:p], d_transition_cov, d_emission_cov
        return *d_dynamics, d_initial_mean, d_initial_cov, d_values, None


def _dense_log_likelihood(model: LGSSM, data: _Sequences) -> Float[Tensor, "n k"]:
    fields = (*model[:5], *model[6:])
    parts, infos = [], []
    groups = _groups(data)
    for rows, members in groups:
        part, info = cast("tuple[Tensor, Tensor]", _DenseLogLikelihood.apply(*fields, data.values[members], rows))
        parts.append(part)
        infos.append(info)
    _require_definite(model, infos[0] if len(infos) == 1 else torch.stack(infos))
    return _in_order(parts, groups)


def _groups(data: _Sequences) -> list[tuple[Tensor | None, Tensor | slice]]:
    """For each distinct mask the seen entries of the t p (None: all), and the sequences that have it."""
    if data.seen is None:
        return [(None, slice(None))]
    t, p = data.values.shape[1:]
    entries = torch.arange(t * p, device=data.values.device).view(t, p)
    return [
        (entries[seen].flatten(), slice(None) if data.mask is None else (data.mask == m).nonzero().squeeze(-1))
        for m, seen in enumerate(data.seen)
    ]


def _in_order(parts: list[Tensor], groups: list[tuple[Tensor | None, Tensor | slice]]) -> Tensor:
    """The parts of ``groups``, (members, ...) each, as one (n, ...)."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat([cast("Tensor", members) for _, members in groups]).argsort()]


def _smooth_dense(model: LGSSM, data: _Sequences) -> tuple[Float[Tensor, "n k t d"], Float[Tensor, "m k t d d"]]:
    A, u, B, Q, R, _, mu, S = _float64(model)
    (p, d), t = B.shape, data.values.shape[1]
    identity = torch.eye(t, dtype=A.dtype, device=A.device)
    responses = _responses(A, torch.eye(d, dtype=A.dtype, device=A.device), t)
    flat = responses.flatten(0, 1)
    mean, joint = mu @ flat.T + _drift(responses, u), flat @ S @ flat.T + _noise_cov(responses, Q)
    emission = torch.kron(identity, B)
    crossed = emission @ joint  # (k, tp, td)
    seen_cov = crossed @ emission.T + torch.kron(identity, R)
    apart = data.values.flatten(1) - (mean @ emission.T).unsqueeze(1)  # (k, n, tp)
    prior = joint.view(-1, t, d, t, d).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    means, covs, infos = [], [], []
    groups = _groups(data)
    for rows, members in groups:
        rows = torch.arange(t * p, device=A.device) if rows is None else rows
        L, info = torch.linalg.cholesky_ex(seen_cov[:, rows.unsqueeze(-1), rows])
        white = torch.linalg.solve_triangular(L, crossed[:, rows], upper=False)  # (k, o, td)
        white_apart = torch.linalg.solve_triangular(L, apart[:, members][..., rows].mT, upper=False)
        means.append((mean.unsqueeze(-1) + white.mT @ white_apart).unflatten(1, (t, d)).movedim(-1, 0))
        white = white.unflatten(-1, (t, d))
        covs.append(_symmetric(prior - torch.einsum("kotd,kote->ktde", white, white)))
        infos.append(info)
    _require_definite(model, torch.cat(infos))
    return _in_order(means, groups), torch.stack(covs)


# The recursive forms: covariances of all frames first, then means, then densities.


def _filter(model: LGSSM, data: _Sequences, method: str) -> _Passed:
    exact = _float64(model)
    t = data.values.shape[1]
    passes = {
        "sequential": (_sequential_covariances, _sequential_means),
        "scan": (_scanned_covariances, _scanned_means),
    }
    pass_covariances, pass_means = passes[method]
    covariances, info = pass_covariances(exact, data.seen, t)
    _require_definite(model, info)
    predicted, filtered = pass_means(exact, _selected(covariances.gain, data), data.values)
    identity = torch.eye(len(exact.emission), dtype=torch.float64, device=data.values.device)
    whitener = torch.linalg.solve_triangular(covariances.factor, identity, upper=False)
    white = _applied(_selected(whitener, data), data.values.unsqueeze(1) - predicted @ exact.emission.T)
    log_density = whitener.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * len(identity) * LOG_2PI
    terms = _selected(log_density, data) - 0.5 * white.square().sum(-1)
    if data.seen is not None:
        terms = torch.where(_selected(data.seen, data).unsqueeze(1), terms, 0.0)
    return _Passed(covariances, predicted, filtered, terms.sum(-1))


def _applied(matrices: Float[Tensor, "m ... d e"], vectors: Float[Tensor, "n ... e"]) -> Float[Tensor, "n ... d"]:
    """Matrix times vector, m being n or 1; in the latter case without a copy of the matrices per sequence."""
    if len(matrices) == 1:
        return torch.einsum("...de,n...e->n...d", matrices[0], vectors)
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _corrected(
    model: LGSSM, predicted: Float[Tensor, "... d d"], seen: Bool[Tensor, "..."] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariance after a frame (Joseph's form), gain, factor of the innovation's covariance, the factorisation's info.

    S = B P B^T + Sigma_A, G = P B^T S^-1, P+ = (I - G B) P (I - G B)^T + G Sigma_A G^T; G = 0 where it is not seen.
    """
    B, R = model.emission, model.emission_cov
    projected = B @ predicted
    factor, info = torch.linalg.cholesky_ex(_symmetric(projected @ B.T) + R)
    gain = torch.cholesky_solve(projected, factor).mT
    if seen is not None:
        gain = torch.where(seen[..., None, None], gain, 0.0)
    keep = torch.eye(B.shape[1], dtype=B.dtype, device=B.device) - gain @ B
    return _symmetric(keep @ predicted @ keep.mT + gain @ R @ gain.mT), gain, factor, info


def _advanced(model: LGSSM, cov: Float[Tensor, "... d d"]) -> Float[Tensor, "... d d"]:
    return _symmetric(model.transition @ cov @ model.transition.T + model.transition_cov)


def _sequential_covariances(
    model: LGSSM, seen: Bool[Tensor, "m t"] | None, t: int
) -> tuple[_Covariances, Int[Tensor, "..."]]:
    predicted = model.initial_cov.expand(1 if seen is None else len(seen), -1, -1, -1)
    steps = []
    for frame in range(t):
        step = _corrected(model, predicted, None if seen is None else seen[:, frame, None])
        steps.append((predicted, *step))
        predicted = _advanced(model, step[0])
    predictions, filtered, gains, factors, infos = (torch.stack(parts, 2) for parts in zip(*steps, strict=True))
    return _Covariances(predictions, filtered, gains, factors), infos


def _sequential_means(
    model: LGSSM, gain: Float[Tensor, "m k t d p"], values: Float[Tensor, "n t p"]
) -> tuple[Float[Tensor, "n k t d"], Float[Tensor, "n k t d"]]:
    A, u, B = model[:3]
    predicted = model.initial_mean.expand(len(values), -1, -1)
    predictions, filtered = [], []
    for frame in range(values.shape[1]):
        predictions.append(predicted)
        mean = predicted + _applied(gain[:, :, frame], values[:, frame, None] - predicted @ B.T)
        filtered.append(mean)
        predicted = mean @ A.T + u
    return torch.stack(predictions, 2), torch.stack(filtered, 2)


def _scanned_covariances(
    model: LGSSM, seen: Bool[Tensor, "m t"] | None, t: int
) -> tuple[_Covariances, Int[Tensor, "..."]]:
    """The covariances by scan over the elements (F, C, J) of Särkkä & García-Fernández.

    An element says of the frames that it spans: given the state before them, the state at their end has a mean that is
    affine in it with slope F, and covariance C; the observations hold information J about it. The paper's b and eta are
    not carried: with the gains known, means are a scan of their own (``_scanned_means``), which is lighter.
    """
    A, _, B, Q = model[:4]
    k, d = model.initial_mean.shape
    masks = 1 if seen is None else len(seen)
    eye = torch.eye(d, dtype=A.dtype, device=A.device)
    first, *_ = _corrected(model, model.initial_cov.expand(masks, -1, -1, -1), None if seen is None else seen[:, :1])
    later, gain, factor, _ = _corrected(model, Q.expand(masks, t - 1, -1, -1), None if seen is None else seen[:, 1:])
    slope = A - gain @ B @ A
    projected = torch.linalg.solve_triangular(factor, B @ A, upper=False)
    information = projected.mT @ projected
    if seen is not None:
        information = torch.where(seen[:, 1:, None, None], information, 0.0)
    zero = torch.zeros_like(first).unsqueeze(2)
    elements = tuple(
        torch.cat([head, rest.unsqueeze(1).expand(-1, k, -1, -1, -1)], 2)
        for head, rest in ((zero, slope), (first.unsqueeze(2), later), (zero, information))
    )
    step = 1
    while step < t:
        (F1, C1, J1), (F2, C2, J2) = ([x[:, :, :-step] for x in elements], [x[:, :, step:] for x in elements])
        solved = torch.linalg.solve(eye + C1 @ J2, torch.cat([F1, C1], -1))
        through, cov = solved.split(d, -1)
        combined = F2 @ through, _symmetric(F2 @ cov @ F2.mT) + C2, _symmetric(through.mT @ J2 @ F1) + J1
        elements = tuple(torch.cat([x[:, :, :step], y], 2) for x, y in zip(elements, combined, strict=True))
        step *= 2
    filtered = elements[1]
    predicted = torch.cat(
        [model.initial_cov.expand(masks, k, d, d).unsqueeze(2), _advanced(model, filtered[:, :, :-1])], 2
    )
    # one more update from the predictions: the gains, and the filtered covariances in Joseph's form
    filtered, gain, factor, info = _corrected(model, predicted, None if seen is None else seen.unsqueeze(1))
    return _Covariances(predicted, filtered, gain, factor), info


def _scanned_means(
    model: LGSSM, gain: Float[Tensor, "m k t d p"], values: Float[Tensor, "n t p"]
) -> tuple[Float[Tensor, "n k t d"], Float[Tensor, "n k t d"]]:
    """The means by scan over affine maps: m_t = (I - G B)(A m_{t-1} + u) + G a_t."""
    A, u, B = model[:3]
    mu = model.initial_mean.unsqueeze(1)
    t = values.shape[1]
    keep = torch.eye(len(A), dtype=A.dtype, device=A.device) - gain @ B
    start = torch.cat([mu, u.expand(len(mu), t - 1, -1)], 1)
    mean = (keep @ start.unsqueeze(-1)).squeeze(-1) + _applied(gain, values.unsqueeze(1))
    slope = keep @ A
    step = 1
    while step < t:
        mean = torch.cat([mean[:, :, :step], mean[:, :, step:] + _applied(slope[:, :, step:], mean[:, :, :-step])], 2)
        slope = torch.cat([slope[:, :, :step], slope[:, :, step:] @ slope[:, :, :-step]], 2)
        step *= 2
    predicted = torch.cat([mu.expand(len(mean), -1, -1, -1), mean[:, :, :-1] @ A.T + u], 2)
    return predicted, mean


def _smooth_covariances(
    model: LGSSM, covariances: _Covariances
) -> tuple[Float[Tensor, "m k s d d"], Float[Tensor, "m k t d d"]]:
    """The smoother's gains and covariances."""
    A, Q = model.transition.double(), model.transition_cov.double()
    filtered, predicted = covariances.filtered[:, :, :-1], covariances.predicted[:, :, 1:]
    d = len(A)
    nudge = 16 * d * torch.finfo(torch.float64).eps * predicted.diagonal(dim1=-2, dim2=-1) + TINY
    factor, info = torch.linalg.cholesky_ex(predicted + torch.diag_embed(nudge))
    _require_definite(model, info)
    gain = torch.cholesky_solve(A @ filtered, factor).mT
    keep = torch.eye(d, dtype=A.dtype, device=A.device) - gain @ A
    own = keep @ filtered @ keep.mT + gain @ Q @ gain.mT
    covs = [covariances.filtered[:, :, -1]]
    for frame in reversed(range(own.shape[2])):
        covs.append(_symmetric(own[:, :, frame] + gain[:, :, frame] @ covs[-1] @ gain[:, :, frame].mT))
    return gain, torch.stack(covs[::-1], 2)


def _smooth_means(passed: _Passed, gain: Float[Tensor, "m k s d d"], data: _Sequences) -> Float[Tensor, "n k t d"]:
    gain = _selected(gain, data)
    means = [passed.filtered[:, :, -1]]
    for frame in reversed(range(gain.shape[2])):
        ahead = means[-1] - passed.predicted[:, :, frame + 1]
        means.append(passed.filtered[:, :, frame] + _applied(gain[:, :, frame], ahead))
    return torch.stack(means[::-1], 2)


def _simulate(
    model: LGSSM, component: Int[Tensor, " n"], steps: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n t p"]]:
    """States and observations of sequences whose component is given."""
    _require_definite(model)
    A, u, B, Q, R, _, mu, S = _float64(model)
    n, (p, d) = len(component), B.shape
    noise = torch.randn(n, steps, d + p, generator=generator, dtype=A.dtype, device=A.device)
    drive, blur = noise.split([d, p], -1)
    state = mu[component] + _applied(torch.linalg.cholesky(S)[component], drive[:, 0])
    kicks = drive @ torch.linalg.cholesky(_nudged(Q, torch.finfo(model.transition_cov.dtype).eps)).T + u
    states = [state]
    for frame in range(1, steps):
        states.append(states[-1] @ A.T + kicks[:, frame])
    path = torch.stack(states, 1)
    return path, path @ B.T + blur @ torch.linalg.cholesky(R).T

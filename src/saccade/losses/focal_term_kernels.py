"""The focal term of ``focal_term.py`` as kernels compute it: from one exponential and one reciprocal square root."""

import triton
import triton.language as tl

# Beyond this, a probability of e ** -|z| is 0 in float64 and float32: to be multiplied by it, z need not be larger.
_FAR = tl.constexpr(1000.0)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(v):
    """``log(1 + v)``, accurate for small v too."""
    u = 1 + v
    return tl.where(u == 1, v, tl.log(u) * (v / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def _log1p_up_to_1(e):
    """``log1p`` for e in [0, 1], faster."""
    if e.dtype == tl.float64:
        return log1p(e)
    else:  # a polynomial of least relative error, which is 3.4e-7
        value = -0.008685274049639702 * e + 0.0446111261844635
        value = value * e - 0.1084151342511177
        value = value * e + 0.1779663860797882
        value = value * e - 0.24514161050319672
        value = value * e + 0.3327881395816803
        value = value * e - 0.49997642636299133
        return (value * e + 0.9999998211860657) * e


@triton.jit
def sigmoid_and_softplus(z):
    """``sigmoid(z)``, ``sigmoid(-z)`` and ``log(1 + exp(-|z|))``.

    The last is ``softplus`` of the one of z and -z that is negative; that of the other one has ``|z|`` on top.
    """
    if z.dtype == tl.float64:
        e = tl.exp(-tl.abs(z))
        likely = 1 / (1 + e)
    else:
        e = tl.exp2(tl.abs(z) * -_LOG2_E)
        root = tl.rsqrt(1 + e)  # two instructions to the reciprocal, where a division takes seven
        likely = root * root
    unlikely = e * likely
    return tl.where(z >= 0, likely, unlikely), tl.where(z >= 0, unlikely, likely), _log1p_up_to_1(e)


@triton.jit
def int_power(base, POWER: tl.constexpr):
    """``base ** POWER`` for a small integer; 1 for 0."""
    result = tl.full(base.shape, 1, base.dtype)
    for _ in tl.static_range(POWER):
        result *= base
    return result


@triton.jit
def power_of(base, power, POWER: tl.constexpr):
    """``base ** power`` of a base that is not negative; POWER is `power` if that is a small integer, else -1."""
    if POWER >= 0:
        return int_power(base, POWER)
    else:
        return tl.exp2(tl.log2(base) * power)


@triton.jit
def _power_of_sigmoid(z, p, log_term, power, POWER: tl.constexpr):
    if POWER >= 0:
        return int_power(p, POWER)
    else:
        return tl.exp2(-power * _LOG2_E * (tl.maximum(-z, 0.0) + log_term))


@triton.jit
def focal_term(z, power, POWER: tl.constexpr):
    """``-log(1 - p) * p ** power`` with ``p = sigmoid(z)``: 0 at minus infinity, infinite at infinity."""
    p, _, log_term = sigmoid_and_softplus(z)
    return (tl.maximum(z, 0.0) + log_term) * _power_of_sigmoid(z, p, log_term, power, POWER)


@triton.jit
def focal_term_slope(z, power, POWER: tl.constexpr):
    """The derivative of ``focal_term``: 0 at minus infinity, 1 at infinity."""
    p, not_p, log_term = sigmoid_and_softplus(z)
    softplus = softplus_to_multiply(z, log_term)
    return _power_of_sigmoid(z, p, log_term, power, POWER) * (p + power * (not_p * softplus))


@triton.jit
def softplus_to_multiply(z, log_term):
    """``softplus(z)``, but finite: an infinite one would be multiplied by a probability of 0."""
    return tl.minimum(tl.maximum(z, 0.0), _FAR) + log_term


def constant_power(power: float) -> int:
    """POWER of a power: itself if multiplying is cheaper than exponentials; all powers that are not share a kernel."""
    return int(power) if power in (0, 1, 2, 3, 4, 5) else -1

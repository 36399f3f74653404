"""How far a result may be from the exact one; what is further off is not timed."""

from collections.abc import Mapping

# Relative error (norm of the difference over norm of the exact result) by dtype. The operators sum in float32 and round
# once to the dtype of the result: a few dozen roundings of float32, or half an ulp of the smaller dtypes.
TOLERANCES = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4}


class WrongResultError(Exception):
    """What was to be timed does not compute what it should."""


def require_accurate(workload: str, dtype: str, errors: Mapping[str, float], result_dtype: str | None = None) -> None:
    """Raise unless the error of every pass is within the tolerance of the dtype, or of the result's if that differs.

    Raises:
        WrongResultError: The first pass that is not; an error that is not a number is none.
    """
    allowed = TOLERANCES[result_dtype or dtype]
    for kind, error in errors.items():
        if not error <= allowed:
            raise WrongResultError(
                f"{workload} ({dtype}) is not timed: {kind} has a relative error of {error:.1e}, allowed {allowed:.0e}"
            )

"""The one quantile that intervals need."""


def student_t(level: float, degrees: int) -> float:
    """The t with P(|T| <= t) = level, for Student's t with `degrees` >= 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))

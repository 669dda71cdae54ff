"""Numbers as text for people: fixed decimals, true minus signs, percentages, intervals."""

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from classifier_emergence.errors import InputError

NONE = "n/a"
"""How a missing value is printed."""

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(x: float | None, digits: int = 2) -> str:
    """A number with fixed decimals, a true minus and thousands separated: ``−1,234.50``.

    Integers stay whole, and so do whole numbers from a thousand up: ``15,594``. What would round to zero without being
    zero keeps one digit, ``0.004``, and below a thousandth (or from 10¹⁵ up) is written as ``3.2 × 10⁻⁷``. Ties go to
    the even digit, decided on the decimal form that a result file holds. None is ``n/a``.

    Raises:
        InputError: ``x`` is NaN or infinite.
    """
    if x is None:
        return NONE
    if isinstance(x, int) or (1000 <= abs(x) < 1e15 and x == int(x)):
        return f"{int(x):,}".replace("-", "−")
    vanishes = _rounded(x, digits) == 0 and x != 0
    if vanishes and abs(x) >= 0.001:
        return f"{Decimal(f'{x:.1g}'):f}".replace("-", "−")
    if vanishes or abs(x) >= 1e15:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa.replace('-', '−')} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return _fixed(x, digits)


def percent(x: float | None, digits: int = 1) -> str:
    """A share as a percentage: 0.8125 is ``81.2 %``; what is neither none nor all never looks so: ``<0.1 %``.

    Raises:
        InputError: ``x`` is NaN or infinite.
    """
    if x is None:
        return NONE
    rounded, step = _rounded(x, digits, scale=100), Decimal(1).scaleb(-digits)
    if x > 0 and rounded == 0:
        return f"<{step:f} %"
    if x < 1 and rounded == 100:
        return f">{100 - step:f} %"
    return f"{_fixed(x, digits, scale=100)} %"


def interval_text(interval: Sequence[float] | None, digits: int = 1, *, scale: int = 100) -> str:
    """An interval, of shares in percent: ``[57.0, 93.4]``; ``scale=1`` for other quantities. None is ``n/a``.

    Raises:
        InputError: An end is NaN or infinite.
    """
    if interval is None:
        return NONE
    low, high = interval
    return f"[{_fixed(low, digits, scale=scale)}, {_fixed(high, digits, scale=scale)}]"


def ends_text(interval: Sequence[float] | None, digits: int = 3) -> str:
    """An interval with each end as ``number`` writes it: ``[1.7 × 10⁻⁵, 0.004]``; None is empty."""
    return "" if interval is None else f"[{', '.join(number(end, digits) for end in interval)}]"


def share_text(share: float, interval: Sequence[float], digits: int = 0) -> str:
    """A share with its interval: ``81.2 % [57, 93]``; ``digits`` are the interval's."""
    return f"{percent(share)} {interval_text(interval, digits)}"


def accuracy_text(tally: Mapping[str, Any], at: int | None = None) -> str:
    """An accuracy with its interval: ``81.2 % [57.0, 93.4]``; ``at`` picks a row of arrays over layers."""
    value, interval = tally["accuracy"], tally["interval"]
    if at is not None:
        value, interval = value[at], interval[at]
    return share_text(value, interval, 1)


def small_share(share: float) -> str:
    """A share over many orders of magnitude: percent where that reads well, else a power of ten."""
    if share >= 0.0005 or share == 0:
        return percent(share, 2)
    return number(share, 1)


def _rounded(x: float, digits: int, *, scale: int = 1) -> Decimal:
    if not math.isfinite(x):
        raise InputError(f"{x}: not a finite number; pass None for a value that does not exist")
    # Through the shortest decimal form, which is what a result holds: 2.675 is a tie there, not a hair less.
    exact = Decimal(repr(float(x))) * scale
    return exact if abs(exact) >= 10**15 else exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)


def _fixed(x: float, digits: int, *, scale: int = 1) -> str:
    # + 0 drops the sign of a zero.
    return f"{_rounded(x, digits, scale=scale) + 0:,.{digits}f}".replace("-", "−")

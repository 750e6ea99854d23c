"""Figures as a reader wants them: a few digits, a unit, and nothing where nothing is known."""

SIZES = ((1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else scientific(value)


def figure(value: float) -> str:
    """Three digits, thousands apart."""
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f"{value:,.{digits}f}"
    return scientific(value)


def count(value: float) -> str:
    """Whole, thousands apart."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Tokens and parameters: three digits and a letter."""
    for least, letter in SIZES:
        if abs(value) >= 0.9995 * least:  # 999.9k is 1M
            return f"{value / least:.3g}{letter}"
    return f"{value:.0f}"


def scientific(value: float) -> str:
    """Two digits behind the point, and a power of ten."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def duration(seconds: float) -> str:
    """In its largest unit, finely enough to compare."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def money(value: float) -> str:
    return f"{value:,.2f}"

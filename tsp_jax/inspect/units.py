"""Bytes and seconds as people read them."""

from tsp_jax.hardware.rates import Band


def format_bytes(value: float) -> str:
    """Bytes in GB, below 0.1 GB in MB: ``19.84 GB``, ``58.72 MB``."""
    return f"{value / 1e9:.2f} GB" if abs(value) >= 1e8 else f"{value / 1e6:.2f} MB"


def format_seconds(value: float) -> str:
    """Seconds in s, ms or us: ``12.40 s``, ``919.40 ms``, ``3.20 us``."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 or not value else f"{value * 1e6:.2f} us"


def format_band(band: Band) -> str:
    """A band of seconds in the typical value's unit: ``11.40 to 14.20 s (12.00)``; one figure if they look alike."""
    unit = format_seconds(band.typical).split()[1]
    low, typical, high = (f"{value / {'s': 1, 'ms': 1e-3, 'us': 1e-6}[unit]:.2f}" for value in band)
    return f"{typical} {unit}" if low == high else f"{low} to {high} {unit} ({typical})"

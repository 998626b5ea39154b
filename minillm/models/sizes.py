"""Checks of sizes that several families share."""

from __future__ import annotations

from minillm.base.errors import ConfigError
from minillm.base.record import divisors, flag, or_list, some_divisors
from minillm.kernels.limits import refusal


def check_divides(part: str, size: int, whole: str, total: int) -> None:
    """Raise ConfigError with the sizes that fit unless `size` divides `total`."""
    if total % size:
        raise ConfigError(
            f"{flag(part)} {size} does not divide {flag(whole)} {total}; {flag(part)} can be "
            f"{some_divisors(total, near=size)}"
        )


def check_vocab(given: int | None, data: int | None) -> int:
    """Return the number of tokens of a model, from --vocab or from its data.

    Raises ConfigError if both are unknown, or if `given` is less than the tokens of the data.
    """
    if given is None and data is None:
        raise ConfigError("the number of tokens is not known; pass --vocab")
    if given is not None and data is not None and given < data:
        raise ConfigError(
            f"--vocab {given} is less than the {data} tokens of the data; pass --vocab {data} or "
            "leave it out"
        )
    return given or data or 0


def check_kernels(device: str, dim: int, heads: int, head_width: int | None = None) -> None:
    """Raise ConfigError if `device` has no kernels for rows of `dim`, or for heads.

    These have `head_width` channels (default: dim / heads).
    """
    why = refusal(device, row=dim)
    if why is not None:
        raise ConfigError(f"--dim {dim} {why}; use a smaller --dim, or --device cpu")
    width = head_width or dim // heads
    why = refusal(device, head_width=width)
    if why is not None and width != dim // heads:
        raise ConfigError(f"--head-width {width}, and {why}; use another, or --device cpu")
    if why is not None:
        fits = [n for n in divisors(dim) if refusal(device, head_width=dim // n) is None]
        way = f"--heads {or_list(fits)}" if fits else "a --dim that is a multiple of 32"
        raise ConfigError(f"dim / heads = {dim} / {heads} = {dim // heads}, and {why}; use {way}")

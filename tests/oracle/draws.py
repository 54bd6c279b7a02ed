"""The draws of a GPU's step from the CPU's generator: the numbers that the same seed gives on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

# All that the package's pipeline and adapters draw with.
NAMES = ["rand", "randn", "normal", "randn_like", "rand_like"]


def on_the_host(draw: Callable) -> Callable:
    """The same function, which draws on the CPU and gives its numbers to the device that was asked for."""

    def wrapped(*arguments, device=None, **keywords):
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        device = device or (tensors[0].device if tensors else None)
        arguments = [argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        drawn = draw(*arguments, **keywords)
        return drawn if device is None else drawn.to(device)

    return wrapped


@contextmanager
def drawn_by_the_host() -> Iterator[None]:
    """Within it PyTorch's draws by these names are the CPU's."""
    patches = [patch.object(torch, name, on_the_host(getattr(torch, name))) for name in NAMES]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()

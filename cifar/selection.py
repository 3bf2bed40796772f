"""The best epoch on held-out images: its weights, and when to look no further for a better one."""

from cifar.checkpoint import BestEpoch, Tensors


class Selection:
    """Keeps the weights of the epoch with the highest top-1 on the validation images.

    Of equally good ones the first. `patience` is for how many epochs a better one is waited for;
    with 0 nothing is selected: the last epoch's weights are those of the run.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: BestEpoch | None = None
        self.weights: Tensors = {}

    def offer(self, epoch: int, top1: float, weights: Tensors) -> None:
        """Compare the weights that an epoch ended with to those of the best one so far."""
        if self.patience and (self.best is None or top1 > self.best.top1):
            self.best = BestEpoch(epoch=epoch, top1=top1)
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def is_over(self, epoch: int) -> bool:
        """Whether no epoch was better for `patience` epochs when this one, the last, has ended."""
        return self.best is not None and epoch - self.best.epoch >= self.patience

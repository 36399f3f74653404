"""Sigmoid and softmax focal loss."""

from saccade.losses.focal.api import sigmoid_focal_loss, softmax_focal_loss

__all__ = ["sigmoid_focal_loss", "softmax_focal_loss"]

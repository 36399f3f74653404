"""Sigmoid and softmax focal loss."""

from saccade.focal_loss.api import sigmoid_focal_loss, softmax_focal_loss

__all__ = ["sigmoid_focal_loss", "softmax_focal_loss"]

"""Gaussian focal loss of heatmaps, from probabilities and from logits."""

from saccade.losses.gaussian.api import gaussian_focal_loss, gaussian_focal_loss_with_logits

__all__ = ["gaussian_focal_loss", "gaussian_focal_loss_with_logits"]

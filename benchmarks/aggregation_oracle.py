"""What deformable aggregation and its gradients are, in float64, one camera and level of one sample at a time.

Written from the definition and independent of the library. A GPU computes it for whole workloads: nothing larger than
the samples of one camera and level is ever held, beside the results.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    """The result for one sample of the batch and its gradients, float64."""

    output: Tensor  # (A, C)
    grad_features: Tensor  # (S, C)
    grad_location: Tensor  # (A, K, N, 2)
    grad_weights: Tensor  # (A, K, N, L, G)


def exact(
    features: Tensor,  # (S, C)
    spatial_shape: Tensor,  # (N, L, 2)
    scale_start_index: Tensor,  # (N, L)
    location: Tensor,  # (A, K, N, 2)
    weights: Tensor,  # (A, K, N, L, G)
    grad_output: Tensor,  # (A, C)
) -> Exact:
    """All in float64, but for the pixel coordinates of the points.

    Those are rounded to float32 as in the operator: a point that rounds across an integer pixel has the derivative of
    the other side, which is another one altogether and no matter of accuracy.
    """
    groups = weights.shape[-1]
    inputs = (features, location, weights)
    grad_features, grad_location, grad_weights = (torch.zeros_like(each, dtype=torch.float64) for each in inputs)
    output = torch.zeros_like(grad_output, dtype=torch.float64)
    for n, (sizes, starts) in enumerate(zip(spatial_shape.tolist(), scale_start_index.tolist(), strict=True)):
        x, y = location[:, :, n].float().unbind(-1)  # (A, K)
        visible = (x > 0) & (x < 1) & (y > 0) & (y < 1)
        anchor, point = visible.nonzero(as_tuple=True)  # (M,)
        x, y = x[visible], y[visible]
        incoming = grad_output[anchor].double().unflatten(-1, (groups, -1))  # (M, G, C / G)
        for level, ((height, width), start) in enumerate(zip(sizes, starts, strict=True)):
            u, v = (x * width - 0.5).double(), (y * height - 0.5).double()
            left, top = u.floor(), v.floor()
            du, dv = u - left, v - top
            weight = weights[anchor, point, n, level].double()  # (M, G)
            weighted = incoming * weight[:, :, None]
            sample = torch.zeros_like(incoming)
            slope_x, slope_y = torch.zeros_like(u), torch.zeros_like(v)
            for i, share_y, sign_y in ((top, 1 - dv, -1), (top + 1, dv, 1)):
                for j, share_x, sign_x in ((left, 1 - du, -1), (left + 1, du, 1)):
                    inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
                    row = (start + i * width + j).long()[inside]
                    pixel = torch.zeros_like(incoming)
                    pixel[inside] = features[row].double().unflatten(-1, (groups, -1))
                    share = (share_x * share_y)[:, None, None]
                    sample += share * pixel
                    grad_features.index_add_(0, row, (share * weighted)[inside].flatten(1))
                    product = (weighted * pixel).sum((1, 2))  # (M,)
                    slope_x += sign_x * share_y * product
                    slope_y += sign_y * share_x * product
            output.index_add_(0, anchor, (sample * weight[:, :, None]).flatten(1))
            grad_weights[anchor, point, n, level] = (incoming * sample).sum(-1)
            grad_location[anchor, point, n] += torch.stack([width * slope_x, height * slope_y], -1)
    return Exact(output, grad_features, grad_location, grad_weights)

"""Where an anchor looks: generators of the 3-D key points that ``DeformableFeatureAggregation`` samples."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.argument_checks import require_shape, require_tensor

# Layout of a box anchor: centre in metres, logarithms of the sizes, sine and cosine of the yaw, velocity in m/s.
X, Y, Z, W, L, H, SIN_YAW, COS_YAW, VX, VY, VZ = range(11)
YAW = 6  # of a decoded box
CNS, YNS = 0, 1  # centerness and yawness in the output of a quality head


def _checked_count(num_learnable_pts: int) -> int:
    if num_learnable_pts < 0:
        raise ValueError(f"num_learnable_pts: expected at least 0, got {num_learnable_pts}")
    return num_learnable_pts


def _rotate(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Apply (B, D, D) matrices to vectors (B, ..., D).

    By products and sums: autocast and TF32, which round coordinates to centimetres or worse, leave those alone.
    """
    matrix = matrix.to(vectors.dtype).reshape(len(matrix), *[1] * (vectors.dim() - 2), *matrix.shape[1:])
    return (matrix * vectors[..., None, :]).sum(-1)


def _transform(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply (B, 4, 4) rigid transforms to points (B, ..., 3)."""
    shift = matrix[:, :3, 3].to(points.dtype).reshape(len(matrix), *[1] * (points.dim() - 2), 3)
    return _rotate(matrix[:, :3, :3], points) + shift


def _per_sample(interval: Tensor, like: Tensor) -> Tensor:
    """(B,) intervals shaped to multiply ``like`` (B, ...)."""
    return interval.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


class SparseBox3DKeyPointsGenerator(nn.Module):
    """Key points of box anchors: fixed ones relative to the box, and learnt ones inside it.

    The anchor is ``(x, y, z, log w, log l, log h, sin yaw, cos yaw, vx, vy, vz)``: metres in the frame that the
    projection matrices take, z up, yaw about z. A fixed point is a fraction of the box's sizes from its centre, the x
    component times w, y times l and z times h; a learnt one is ``(sigmoid(learnable_fc(feature)) - 0.5)`` of them. The
    stored sine and cosine rotate as they are, without being normalised.

    Args:
        embed_dims: C, channels of the instance features.
        num_learnable_pts: Number of learnt points.
        fix_scale: (K, 3) fixed points in box fractions; ``None`` is one point at the centre. Kept as the parameter
            ``fix_scale`` that takes no gradient; a checkpoint's values win over the constructor's.

    Attributes:
        num_pts: Fixed and learnt points together.

    The generator of Sparse4D and SparseDrive; its checkpoints load.

    Example:
        >>> import torch, saccade
        >>> generator = saccade.nn.SparseBox3DKeyPointsGenerator(fix_scale=[[0.45, 0.0, 0.0]])
        >>> anchor = torch.tensor([[[1.0, 2.0, 3.0, 0, 0, 0, 1.0, 0.0, 0, 0, 0]]])
        >>> generator(anchor)
        tensor([[[[1.0000, 2.4500, 3.0000]]]])
    """

    num_pts: int

    def __init__(
        self,
        embed_dims: int = 256,
        num_learnable_pts: int = 0,
        fix_scale: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_learnable_pts = _checked_count(num_learnable_pts)
        scale = torch.as_tensor([[0.0, 0.0, 0.0]] if fix_scale is None else fix_scale, dtype=torch.float32)
        require_shape("fix_scale", scale, "K 3")
        self.fix_scale = nn.Parameter(scale.clone(), requires_grad=False)
        self.num_pts = len(scale) + num_learnable_pts
        if num_learnable_pts > 0:
            self.learnable_fc = nn.Linear(embed_dims, num_learnable_pts * 3)
        self.init_weight()

    def init_weight(self) -> None:
        """Xavier-uniform weights and zero biases."""
        if self.num_learnable_pts > 0:
            nn.init.xavier_uniform_(self.learnable_fc.weight)
            nn.init.zeros_(self.learnable_fc.bias)

    def forward(
        self,
        anchor: Tensor,
        instance_feature: Tensor | None = None,
        T_cur2temp_list: Sequence[Tensor] | None = None,
        cur_timestamp: Tensor | None = None,
        temp_timestamps: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Key points of each anchor.

        Args:
            anchor: (B, A, 11), see the class.
            instance_feature: (B, A, C); without it the learnt points are left out.
            T_cur2temp_list: One (B, 4, 4) transform from the current to another frame for each of those frames.
            cur_timestamp: (B,) seconds.
            temp_timestamps: One (B,) in seconds for each other frame.

        Returns:
            (B, A, K, 3) in metres; with all three temporal arguments also the list of the points in the other frames,
            moved back along the anchor's velocity.
        """
        require_tensor("anchor", anchor)
        batch, anchors, numbers = require_shape("anchor", anchor, "B A D")
        if numbers <= COS_YAW:
            raise ValueError(f"anchor: expected at least {COS_YAW + 1} numbers for a box, got {numbers}")
        size = anchor[..., None, W : H + 1].exp()  # slices: a list of indices would be copied to the device
        scale = self.fix_scale.to(size.dtype).expand(batch, anchors, -1, 3)
        if self.num_learnable_pts > 0 and instance_feature is not None:
            learnt = self.learnable_fc(instance_feature).unflatten(-1, (self.num_learnable_pts, 3))
            scale = torch.cat([scale, (learnt.sigmoid() - 0.5).to(size.dtype)], -2)
        x, y, z = (scale * size).unbind(-1)
        sine, cosine = anchor[..., SIN_YAW, None], anchor[..., COS_YAW, None]
        rotated = torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)
        key_points = rotated + anchor[..., None, X : Z + 1]
        if T_cur2temp_list is None or cur_timestamp is None or temp_timestamps is None or len(temp_timestamps) == 0:
            return key_points
        velocity = anchor[..., None, VX:]
        if velocity.shape[-1] != 3:
            raise ValueError(f"anchor: expected 3 velocity components to move points in time, got {velocity.shape[-1]}")
        temporal = []
        for matrix, timestamp in zip(T_cur2temp_list, temp_timestamps, strict=True):
            interval = _per_sample(cur_timestamp - timestamp, key_points)
            temporal.append(_transform(matrix, key_points - velocity * interval))
        return key_points, temporal

    @staticmethod
    def anchor_projection(
        anchor: Tensor,
        T_src2dst_list: Sequence[Tensor],
        src_timestamp: Tensor | None = None,
        dst_timestamps: Sequence[Tensor] | None = None,
        time_intervals: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Move box anchors into other frames.

        Args:
            anchor: (B, A, 8 + V) with V velocity components.
            T_src2dst_list: (B, 4, 4) transforms, one for each destination.
            src_timestamp: (B,) seconds; with ``dst_timestamps`` the interval is their difference.
            dst_timestamps: (B,) seconds for each destination.
            time_intervals: (B,) seconds for each destination; wins over the timestamps. The centre moves by
                ``-velocity * interval``.

        Returns:
            One (B, A, 8 + V) for each transform.

        Raises:
            ValueError: An interval is given and V is not 3.
        """
        projected = []
        for i, matrix in enumerate(T_src2dst_list):
            centre, size, direction, velocity = anchor.split([3, 3, 2, anchor.shape[-1] - 8], -1)
            interval = None
            if time_intervals is not None:
                interval = time_intervals[i]
            elif src_timestamp is not None and dst_timestamps is not None:
                interval = src_timestamp - dst_timestamps[i]
            if interval is not None:
                if velocity.shape[-1] != 3:
                    raise ValueError(
                        f"anchor: expected 3 velocity components with an interval, got {velocity.shape[-1]}"
                    )
                centre = centre - velocity * _per_sample(interval, centre)
            rotation = matrix[:, :3, :3]
            cosine_sine = _rotate(rotation[:, :2, :2], direction.flip(-1))
            known = velocity.shape[-1]
            velocity = _rotate(rotation[:, :known, :known], velocity)
            projected.append(torch.cat([_transform(matrix, centre), size, cosine_sine.flip(-1), velocity], -1))
        return projected

    @staticmethod
    def distance(anchor: Tensor) -> Tensor:
        """Distance of the centres from the origin in the ground plane: (..., 11) to (...), metres."""
        return anchor[..., :2].norm(dim=-1)


class SparsePoint3DKeyPointsGenerator(nn.Module):
    """Key points of map anchors, polylines of points on the ground.

    Every point of the polyline is looked up at several heights, each shifted by learnt offsets in metres.

    Args:
        embed_dims: C, channels of the instance features.
        num_sample: Points of a polyline.
        num_learnable_pts: Learnt offsets for each point and height.
        fix_height: Heights above the ground in metres.
        ground_height: z of the ground in metres.

    Attributes:
        num_pts: ``num_sample * len(fix_height) * num_learnable_pts``.

    The generator of SparseDrive; its checkpoints load.

    Example:
        >>> import torch, saccade
        >>> generator = saccade.nn.SparsePoint3DKeyPointsGenerator(embed_dims=8, num_sample=2, num_learnable_pts=3)
        >>> generator(torch.zeros(1, 5, 4), torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 6, 3])
    """

    num_pts: int
    heights: Tensor

    def __init__(
        self,
        embed_dims: int = 256,
        num_sample: int = 20,
        num_learnable_pts: int = 0,
        fix_height: Sequence[float] = (0,),
        ground_height: float = 0,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_sample = num_sample
        self.num_learnable_pts = _checked_count(num_learnable_pts)
        self.fix_height = fix_height
        self.ground_height = ground_height
        self.num_pts = num_sample * len(fix_height) * num_learnable_pts
        self.register_buffer("heights", torch.empty(len(fix_height)), persistent=False)  # so that no step copies them
        if num_learnable_pts > 0:
            self.learnable_fc = nn.Linear(embed_dims, self.num_pts * 2)
        self.init_weight()

    def init_weight(self) -> None:
        """Xavier-uniform weights and zero biases; also fills the heights, which checkpoints do not hold."""
        with torch.no_grad():
            for slot, height in zip(self.heights, self.fix_height, strict=True):
                slot.fill_(float(self.ground_height + height))
        if self.num_learnable_pts > 0:
            nn.init.xavier_uniform_(self.learnable_fc.weight)
            nn.init.zeros_(self.learnable_fc.bias)

    def forward(
        self,
        anchor: Tensor,
        instance_feature: Tensor | None = None,
        T_cur2temp_list: Sequence[Tensor] | None = None,
        cur_timestamp: Tensor | None = None,
        temp_timestamps: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Key points of each anchor.

        Args:
            anchor: (B, A, 2 * num_sample), the (x, y) of each point in metres.
            instance_feature: (B, A, C).
            T_cur2temp_list: One (B, 4, 4) transform from the current to another frame for each of those frames.
            cur_timestamp: (B,) seconds; only its presence matters, map elements do not move.
            temp_timestamps: One (B,) in seconds for each other frame; only its presence matters.

        Returns:
            (B, A, num_pts, 3) in metres, ordered by point, height, offset; with all three temporal arguments also the
            list of the points in the other frames.
        """
        if self.num_learnable_pts <= 0:
            raise ValueError(f"num_learnable_pts: expected at least 1 to make key points, got {self.num_learnable_pts}")
        if instance_feature is None:
            raise ValueError("instance_feature: expected a (B, A, C) tensor, got None")
        require_tensor("anchor", anchor)
        batch, anchors, _ = require_shape("anchor", anchor, "B A D", D=2 * self.num_sample)
        points = anchor.reshape(batch, anchors, self.num_sample, 1, 1, 2)
        shape = (self.num_sample, len(self.fix_height), self.num_learnable_pts, 2)
        xy = points + self.learnable_fc(instance_feature).unflatten(-1, shape).to(anchor.dtype)
        z = self.heights.to(xy.dtype)[:, None, None].expand(*xy.shape[:-1], 1)
        key_points = torch.cat([xy, z], -1).flatten(2, 4)
        if T_cur2temp_list is None or cur_timestamp is None or temp_timestamps is None or len(temp_timestamps) == 0:
            return key_points
        return key_points, [_transform(matrix, key_points) for matrix in T_cur2temp_list]

    def anchor_projection(
        self,
        anchor: Tensor,
        T_src2dst_list: Sequence[Tensor],
        src_timestamp: Tensor | None = None,
        dst_timestamps: Sequence[Tensor] | None = None,
        time_intervals: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Move anchors (B, A, 2 * num_sample) by each (B, 4, 4) transform; times are ignored."""
        points = anchor.unflatten(-1, (self.num_sample, 2))
        projected = []
        for matrix in T_src2dst_list:
            moved = _rotate(matrix[:, :2, :2], points) + matrix[:, None, None, :2, 3].to(anchor.dtype)
            projected.append(moved.flatten(-2))
        return projected

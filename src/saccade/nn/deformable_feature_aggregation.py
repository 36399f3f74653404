"""``DeformableFeatureAggregation``: anchors gather image features at their projected key points."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.argument_checks import require_shape, require_tensor
from saccade.deformable_aggregation import deformable_aggregation
from saccade.nn.key_points import SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator

_GENERATORS = {
    generator.__name__: generator for generator in (SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator)
}


class DeformableFeatureAggregation(nn.Module):
    """Gather image features for each anchor: key points, attention weights, projection, aggregation, residual.

    Letters: B batch, A anchors, C channels, K key points, N cameras, L levels, G groups.

    Args:
        embed_dims: C.
        num_groups: G; must divide C.
        num_levels: L.
        num_cams: N.
        proj_drop: Dropout after the output projection.
        attn_drop: Share of (camera, point) pairs dropped while training, in [0, 1); levels and groups share a draw.
        kps_generator: The generator's arguments as a dict; ``type`` is ``"SparseBox3DKeyPointsGenerator"`` (default) or
            ``"SparsePoint3DKeyPointsGenerator"``. The dict is left as it is.
        temporal_fusion_module: Kept as ``temp_module`` so that its weights load; not called.
        use_temporal_anchor_embed: Kept for compatibility; not used.
        use_deformable_func: ``forward`` takes the three tensors of ``feature_maps_format`` and calls
            ``deformable_aggregation``. Otherwise it takes the list of L maps (B, N, C, H, W) and calls ``grid_sample``,
            which also mixes in points up to half a pixel outside the images.
        use_camera_embed: Make the attention weights depend on each camera's projection matrix.
        residual_mode: ``"add"`` the input feature, concatenate it (``"cat"``, doubling the channels), or ``None``.

    Raises:
        ValueError: An argument out of range.
        NotImplementedError: ``temporal_fusion_module`` is a config dict; pass the module itself.

    The module of Sparse4D (Lin et al., https://arxiv.org/abs/2305.14018) and SparseDrive; their checkpoints load.

    Example:
        >>> import torch, saccade
        >>> module = saccade.nn.DeformableFeatureAggregation(
        ...     embed_dims=32, num_groups=4, num_levels=2, num_cams=1, use_deformable_func=True,
        ...     kps_generator=dict(type="SparseBox3DKeyPointsGenerator", num_learnable_pts=2))
        >>> maps = saccade.feature_maps_format([torch.rand(1, 1, 32, 8, 8), torch.rand(1, 1, 32, 4, 4)])
        >>> metas = {"projection_mat": torch.eye(4).expand(1, 1, 4, 4)}
        >>> feature, anchor, embed = torch.rand(1, 5, 32), torch.rand(1, 5, 11), torch.rand(1, 5, 32)
        >>> module(feature, anchor, embed, maps, metas).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_groups: int = 8,
        num_levels: int = 4,
        num_cams: int = 6,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        kps_generator: Mapping[str, Any] | None = None,
        temporal_fusion_module: nn.Module | None = None,
        use_temporal_anchor_embed: bool = True,
        use_deformable_func: bool = False,
        use_camera_embed: bool = False,
        residual_mode: Literal["add", "cat"] | None = "add",
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups: expected at least 1, got {num_groups}")
        if embed_dims % num_groups:
            raise ValueError(f"embed_dims: expected a multiple of num_groups={num_groups}, got {embed_dims}")
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop: expected a number in [0, 1), got {attn_drop}")
        if residual_mode not in ("add", "cat", None):
            raise ValueError(f"residual_mode: expected 'add', 'cat' or None, got {residual_mode!r}")
        if temporal_fusion_module is not None and not isinstance(temporal_fusion_module, nn.Module):
            raise NotImplementedError(
                "temporal_fusion_module: expected None or an nn.Module, got "
                f"{type(temporal_fusion_module).__name__}; build the module and pass it"
            )
        self.embed_dims = embed_dims
        self.group_dims = embed_dims // num_groups
        self.num_groups = num_groups
        self.num_levels = num_levels
        self.num_cams = num_cams
        self.attn_drop = attn_drop
        self.residual_mode = residual_mode
        self.use_deformable_func = use_deformable_func
        self.use_temporal_anchor_embed = use_temporal_anchor_embed
        self.kps_generator = _build_generator(kps_generator, embed_dims)
        self.num_pts = self.kps_generator.num_pts
        self.temp_module = temporal_fusion_module
        self.proj_drop = nn.Dropout(proj_drop)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        weights = num_groups * num_levels * self.num_pts
        if use_camera_embed:
            self.camera_encoder = nn.Sequential(
                nn.Linear(12, embed_dims),
                nn.ReLU(),
                nn.LayerNorm(embed_dims),
                nn.Linear(embed_dims, embed_dims),
                nn.ReLU(),
                nn.LayerNorm(embed_dims),
            )
            self.weights_fc = nn.Linear(embed_dims, weights)
        else:
            self.camera_encoder = None
            self.weights_fc = nn.Linear(embed_dims, weights * num_cams)
        self.init_weight()

    def init_weight(self) -> None:
        """Uniform attention weights at first; Xavier-uniform output projection with zero bias."""
        nn.init.zeros_(self.weights_fc.weight)
        nn.init.zeros_(self.weights_fc.bias)
        nn.init.xavier_uniform_(self.output_proj.weight)
        nn.init.zeros_(self.output_proj.bias)

    def forward(
        self,
        instance_feature: Tensor,
        anchor: Tensor,
        anchor_embed: Tensor,
        feature_maps: Sequence[Tensor],
        metas: Mapping[str, Any],
        **kwargs: Any,
    ) -> Tensor:
        """Gather features.

        Args:
            instance_feature: (B, A, C).
            anchor: (B, A, D), what the generator takes: D = 11 for boxes, 2 * num_sample for polylines.
            anchor_embed: (B, A, C), added to the feature where attention weights are made.
            feature_maps: With ``use_deformable_func`` the three tensors of ``feature_maps_format``, else L maps
                (B, N, C, H, W).
            metas: ``projection_mat`` (B, N, 4, 4), from homogeneous points in the anchors' frame to (u d, v d, d, .)
                with u, v in pixels and d the depth; ``image_wh`` (B, N, 2), (width, height) in pixels, without which
                the projection must give fractions of the image.
            **kwargs: Ignored.

        Returns:
            (B, A, C), or (B, A, 2 C) with ``residual_mode="cat"``, the gathered part first.

        Raises:
            KeyError: ``metas`` has no ``projection_mat``.
            ValueError: A shape disagrees.
        """
        for name, value in (
            ("instance_feature", instance_feature),
            ("anchor", anchor),
            ("anchor_embed", anchor_embed),
        ):
            require_tensor(name, value)
        batch, anchors, _ = require_shape("instance_feature", instance_feature, "B A C", C=self.embed_dims)
        require_shape("anchor_embed", anchor_embed, "B A C", B=batch, A=anchors, C=self.embed_dims)
        require_shape("anchor", anchor, "B A D", B=batch, A=anchors)
        projection_mat, image_wh = _projection(metas, batch, self.num_cams)
        key_points = self.kps_generator(anchor, instance_feature)  # (B, A, K, 3)
        weights = self._get_weights(instance_feature, anchor_embed, metas)  # (B, A, N, L, K, G)
        if self.use_deformable_func:
            if len(feature_maps) != 3:
                raise ValueError(
                    "feature_maps: expected the three tensors of feature_maps_format with use_deformable_func=True, "
                    f"got {len(feature_maps)} items"
                )
            location = self.project_points(key_points, projection_mat, image_wh)  # (B, N, A, K, 2)
            rows, spatial_shape, scale_start_index = feature_maps
            features = deformable_aggregation(
                rows,
                spatial_shape,
                scale_start_index,
                location.permute(0, 2, 3, 1, 4),  # (B, A, K, N, 2)
                weights.permute(0, 1, 4, 2, 3, 5),  # (B, A, K, N, L, G)
            )
        else:
            self._check_maps(feature_maps, batch)
            sampled = self.feature_sampling(feature_maps, key_points, projection_mat, image_wh)
            features = self.multi_view_level_fusion(sampled, weights).sum(2)
        output = self.proj_drop(self.output_proj(features.to(instance_feature.dtype)))
        if self.residual_mode == "add":
            return output + instance_feature
        if self.residual_mode == "cat":
            return torch.cat([output, instance_feature], -1)
        return output

    def _check_maps(self, feature_maps: Sequence[Tensor], batch: int) -> None:
        if len(feature_maps) != self.num_levels or any(feature.dim() != 5 for feature in feature_maps):
            shapes = [tuple(feature.shape) for feature in feature_maps]
            raise ValueError(
                f"feature_maps: expected {self.num_levels} maps (B, N, C, H, W) with use_deformable_func=False, "
                f"got shapes {shapes}"
            )
        for level, feature in enumerate(feature_maps):
            known = {"B": batch, "N": self.num_cams, "C": self.embed_dims}
            require_shape(f"feature_maps[{level}]", feature, "B N C H W", **known)

    def _get_weights(self, instance_feature: Tensor, anchor_embed: Tensor, metas: Mapping[str, Any]) -> Tensor:
        """Attention weights (B, A, N, L, K, G): a softmax over cameras, levels and points together, then dropout."""
        batch, anchors = instance_feature.shape[:2]
        feature = instance_feature + anchor_embed
        if self.camera_encoder is not None:
            projection_mat, _ = _projection(metas, batch, self.num_cams)
            embed = self.camera_encoder(projection_mat[:, :, :3].flatten(2).to(feature.dtype))  # (B, N, C)
            feature = feature[:, :, None] + embed[:, None]  # (B, A, N, C)
        logits = self.weights_fc(feature).reshape(batch, anchors, -1, self.num_groups)
        shape = (self.num_cams, self.num_levels, self.num_pts)
        weights = logits.softmax(-2).unflatten(2, shape)
        if self.training and self.attn_drop > 0:
            mask = torch.rand(batch, anchors, self.num_cams, 1, self.num_pts, 1, device=weights.device)
            weights = weights * ((mask > self.attn_drop) / (1 - self.attn_drop)).to(weights.dtype)
        return weights

    @staticmethod
    def project_points(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None) -> Tensor:
        """Project (B, A, K, 3) points into each camera: (B, N, A, K, 2), pixels, or image fractions with ``image_wh``.

        Depths are clamped to at least 1e-5, so that a point behind a camera lands far outside its image.
        """
        # In float32: half precision cannot tell neighbouring pixels apart. Products and sums instead of a matrix
        # product, which autocast and TF32 would round.
        dtype = torch.promote_types(key_points.dtype, torch.float32)
        matrix = projection_mat.to(dtype)[:, :, None, None, :3]  # (B, N, 1, 1, 3, 4)
        points = key_points.to(dtype)[:, None, :, :, None]  # (B, 1, A, K, 1, 3)
        projected = (matrix[..., :3] * points).sum(-1) + matrix[..., 3]  # (B, N, A, K, 3)
        location = projected[..., :2] / projected[..., 2:].clamp(min=1e-5)
        if image_wh is not None:
            location = location / image_wh.to(dtype)[:, :, None, None]
        return location

    @staticmethod
    def feature_sampling(
        feature_maps: Sequence[Tensor],
        key_points: Tensor,
        projection_mat: Tensor,
        image_wh: Tensor | None = None,
    ) -> Tensor:
        """Samples of L maps (B, N, C, H, W) at the projected points, by ``grid_sample``: (B, A, N, L, K, C)."""
        location = DeformableFeatureAggregation.project_points(key_points, projection_mat, image_wh)
        grid = (2 * location - 1).flatten(0, 1)  # (B * N, A, K, 2)
        # In the dtype of the locations: rounding them to half precision would move them by whole pixels.
        sampled = [
            F.grid_sample(feature.flatten(0, 1).to(grid.dtype), grid, align_corners=False).to(feature.dtype)
            for feature in feature_maps
        ]  # L of (B * N, C, A, K)
        batch, cameras = location.shape[:2]
        return torch.stack(sampled, 1).unflatten(0, (batch, cameras)).permute(0, 4, 1, 2, 5, 3)

    def multi_view_level_fusion(self, features: Tensor, weights: Tensor) -> Tensor:
        """Weight samples (B, A, N, L, K, C) by (B, A, N, L, K, G) and sum over cameras and levels: (B, A, K, C)."""
        weighted = weights[..., None] * features.unflatten(-1, (self.num_groups, self.group_dims))
        return weighted.sum((2, 3)).flatten(-2)


def _build_generator(
    config: Mapping[str, Any] | None, embed_dims: int
) -> SparseBox3DKeyPointsGenerator | SparsePoint3DKeyPointsGenerator:
    if config is None:
        raise ValueError("kps_generator: expected a dict with the generator's type and arguments, got None")
    if not isinstance(config, Mapping):
        raise TypeError(f"kps_generator: expected a dict with type and arguments, got {type(config).__name__}")
    arguments = dict(config)
    kind = arguments.pop("type", "SparseBox3DKeyPointsGenerator")
    if kind not in _GENERATORS:
        raise ValueError(f"kps_generator: expected a type in {sorted(_GENERATORS)}, got {kind!r}")
    arguments["embed_dims"] = embed_dims
    return _GENERATORS[kind](**arguments)


def _projection(metas: Mapping[str, Any], batch: int, cameras: int) -> tuple[Tensor, Tensor | None]:
    """``projection_mat`` and ``image_wh`` of the metas, checked."""
    if metas.get("projection_mat") is None:
        raise KeyError("metas: expected the key 'projection_mat', a (B, N, 4, 4) tensor")
    projection_mat, image_wh = metas["projection_mat"], metas.get("image_wh")
    require_tensor("metas['projection_mat']", projection_mat)
    require_shape("metas['projection_mat']", projection_mat, "B N 4 4", B=batch, N=cameras)
    if image_wh is not None:
        require_tensor("metas['image_wh']", image_wh)
        require_shape("metas['image_wh']", image_wh, "B N 2", B=batch, N=cameras)
    return projection_mat, image_wh

"""A small sparse multi-camera detector in the manner of Sparse4D.

A convolutional backbone with a feature pyramid looks at every image. A head finds the centres of boxes in the images
and says how far away they are; its highest peaks, lifted into space, are the anchors. Decoder layers then look the
anchors' key points up in the feature maps of all cameras, name a class and correct the box.

Letters: B batch, N cameras, A anchors, C channels. An anchor has the eleven numbers of
`SparseBox3DKeyPointsGenerator`: X, Y, Z, logarithms of three sizes (along the box's own x, y and z axes: length,
width, height), SIN_YAW, COS_YAW and three of velocity.

What a decoder layer reads or writes about an anchor is expressed in the frame of its line of sight (radial,
tangential, up). So the network is the same in every direction: what it learns about a car ahead, it knows about a car
behind. And where a box is, it can only know from the images: there are no learnt places.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade
from saccade.nn import DeformableFeatureAggregation

PRIOR = 0.01
"""Probability given to a class before training: most anchors and most pixels are background."""
GROUND_Z = -1.84
"""Height of flat ground in metres."""
HORIZON_FALL = 0.02
"""Metres per metre below which a line of sight counts as running to the horizon."""
FIRST_OFFSET = 2.0
"""Heatmap cells by which a box stands below its centre before training."""
FIRST_SIZE = (2.0, 2.0, 1.6)
"""Length, width and height of the anchors before the first decoder layer, in metres."""
KEY_POINTS = [[0, 0, 0], [0.45, 0, 0], [-0.45, 0, 0], [0, 0.45, 0], [0, -0.45, 0], [0, 0, 0.45], [0, 0, -0.45]]


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of the detector."""

    num_classes: int
    num_cams: int = 6
    widths: tuple[int, int, int] = (32, 64, 128)
    """Channels of the backbone at strides 4, 8 and 16."""
    blocks: tuple[int, int, int] = (1, 1, 2)
    """Residual blocks there."""
    embed_dims: int = 64
    num_groups: int = 4
    num_anchors: int = 80
    num_layers: int = 2


class ConvBlock(nn.Sequential):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """Two convolution blocks and a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(ConvBlock(channels, channels), ConvBlock(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x + self.body(x)


class Backbone(nn.Module):
    """Convolutional backbone with a feature pyramid of strides 4, 8 and 16."""

    def __init__(self, inputs: int, config: DetectorConfig):
        super().__init__()
        stem = ConvBlock(inputs, 16, 2, kernel=5)
        channels = [16, *config.widths]
        self.stages = nn.ModuleList(
            nn.Sequential(ConvBlock(narrow, wide, 2), *(Residual(wide) for _ in range(blocks)))
            for narrow, wide, blocks in zip(channels, config.widths, config.blocks, strict=False)
        )
        self.stages[0] = nn.Sequential(stem, self.stages[0])
        self.lateral = nn.ModuleList(nn.Conv2d(width, config.embed_dims, 1) for width in config.widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, inputs, H, W) to maps (B, C, H / stride, W / stride), finest first."""
        maps, x = [], images
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for level in (1, 0):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[-2:], mode="nearest")
        return maps


class Rays:
    """The lines of sight of pixels: where they start and which way they go.

    Args:
        origin: (..., 3).
        basis: (..., 3, 3); its columns are how the direction changes with u and v, and what it is at 0.
    """

    def __init__(self, origin: Tensor, basis: Tensor):
        self.origin = origin
        self.basis = basis

    @classmethod
    def of(cls, projection: Tensor) -> "Rays":
        """Those of projection matrices (..., 4, 4), see `Sample`."""
        # Cofactors: torch.linalg.inv would have the host wait for the device to hear whether there is an inverse.
        rows, shift = projection[..., :3, :3].float(), projection[..., :3, 3].float()
        a, b, c = rows.unbind(-2)
        b_c = torch.linalg.cross(b, c)
        basis = torch.stack([b_c, torch.linalg.cross(c, a), torch.linalg.cross(a, b)], -1)
        basis = basis / (a * b_c).sum(-1)[..., None, None]
        return cls(-(basis * shift[..., None, :]).sum(-1), basis)

    def of_pixels(self) -> "Rays":
        """Those of cameras (B, N), to broadcast with maps (B, N, H, W)."""
        return Rays(self.origin[:, :, None, None], self.basis[:, :, None, None])

    def of_cameras(self, camera: Tensor) -> "Rays":
        """Those of the cameras (B, A) that are chosen out of (B, N)."""
        index = camera[..., None]
        return Rays(
            self.origin.gather(1, index.expand(-1, -1, 3)),
            self.basis.gather(1, index[..., None].expand(-1, -1, 3, 3)),
        )

    def direction(self, u: Tensor, v: Tensor) -> Tensor:
        """Directions (..., 3), of unit length in the ground plane, at pixels that broadcast with the matrices."""
        towards = self.basis[..., 0] * u[..., None] + self.basis[..., 1] * v[..., None] + self.basis[..., 2]
        return towards / towards[..., :2].norm(dim=-1, keepdim=True).clamp(min=1e-6)


def line_of_sight(anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine, each (..., 1), of the azimuth at which anchors (..., 11) are seen from the vehicle."""
    direction = F.normalize(anchor[..., :2].detach(), dim=-1, eps=1e-3)
    return direction[..., 1:2], direction[..., 0:1]


def rotate(xy: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Vectors (..., 2) turned by an angle."""
    x, y = xy[..., 0:1], xy[..., 1:2]
    return torch.cat([cos * x - sin * y, sin * x + cos * y], -1)


class AnchorEncoder(nn.Module):
    """Embeds anchors as seen from the vehicle: distance, height, size and heading, but not in which direction."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(8, channels), nn.ReLU(), nn.LayerNorm(channels)),
            *(nn.Linear(channels, channels), nn.ReLU(), nn.LayerNorm(channels)),
        )

    def forward(self, anchor: Tensor) -> Tensor:
        """(B, A, 11) to (B, A, C)."""
        sin, cos = line_of_sight(anchor)
        distance = anchor[..., :2].norm(dim=-1, keepdim=True)
        heading = rotate(anchor[..., 6:8].flip(-1), -sin, cos)
        return self.layers(torch.cat([distance / 20, torch.log(distance + 1), anchor[..., 2:6], heading], -1))


class NeighbourAttention(nn.Module):
    """Self-attention that fades with the distance between anchors, each head with a reach of its own.

    It lets anchors on the same object agree on one that speaks for it.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(channels, 3 * channels)
        self.fade = nn.Linear(channels, heads)
        self.output = nn.Linear(channels, channels)
        nn.init.zeros_(self.fade.weight)
        with torch.no_grad():
            self.fade.bias.copy_(torch.linspace(-2, 1, heads))

    def forward(self, feature: Tensor, embedding: Tensor, anchor: Tensor) -> Tensor:
        """(B, A, C) features and embeddings with anchors (B, A, 11) to (B, A, C)."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.inputs(feature + embedding).chunk(3, -1)
        )
        centre = anchor[..., :2].detach()
        fade = F.softplus(self.fade(feature)).transpose(1, 2)[..., None]  # (B, heads, A, 1) per metre
        bias = (-fade * torch.cdist(centre, centre)[:, None]).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.output(mixed.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention, image features at the anchors' key points, a feed-forward network, refinement."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        channels = config.embed_dims
        self.attention = NeighbourAttention(channels)
        self.aggregation = DeformableFeatureAggregation(
            embed_dims=channels,
            num_groups=config.num_groups,
            num_levels=len(config.widths),
            num_cams=config.num_cams,
            kps_generator={"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": 2, "fix_scale": KEY_POINTS},
            use_deformable_func=True,
            use_camera_embed=True,
            residual_mode="cat",
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(2 * channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (channels, 2 * channels, channels))
        self.refine = nn.Sequential(
            *(nn.Linear(channels, channels), nn.ReLU(), nn.LayerNorm(channels)),
            *(nn.Linear(channels, channels), nn.ReLU()),
        )
        self.change = nn.Linear(channels, 11)
        self.classify = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.LayerNorm(channels))
        self.logits = nn.Linear(channels, config.num_classes)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)
        nn.init.constant_(self.logits.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(
        self, feature: Tensor, anchor: Tensor, embedding: Tensor, maps: list[Tensor], metas: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Look and correct.

        Args:
            feature: (B, A, C).
            anchor: (B, A, 11).
            embedding: (B, A, C) of the anchors.
            maps: The triple of `saccade.feature_maps_format`.
            metas: `projection_mat` and `image_wh`, as `DeformableFeatureAggregation` takes them.

        Returns:
            Features, refined anchors, and logits (B, A, classes).
        """
        feature = self.norms[0](feature + self.attention(feature, embedding, anchor))
        feature = self.norms[1](self.aggregation(feature, anchor, embedding, maps, metas))
        feature = self.norms[2](self.feed_forward(feature))
        change = self.change(self.refine(feature + embedding)).float()
        return feature, refined(anchor, change), self.logits(self.classify(feature)).float()


def refined(anchor: Tensor, change: Tensor) -> Tensor:
    """Anchors (..., 11) corrected by changes (..., 11) along and across the line of sight."""
    sin, cos = line_of_sight(anchor)
    # The farther away, the larger the unit: errors in depth grow with the distance.
    unit = 0.2 + anchor[..., :2].detach().norm(dim=-1, keepdim=True) / 15
    centre = anchor[..., :2] + rotate(change[..., :2] * unit, sin, cos)
    # Not [..., [7, 6]]: a list would be copied to the device, for which the host waits.
    heading = rotate(rotate(anchor[..., 6:8].flip(-1), -sin, cos) + change[..., 6:8].flip(-1), sin, cos)
    heading = F.normalize(heading, dim=-1, eps=1e-3)  # or key points would all move towards the centre
    return torch.cat(
        [centre, anchor[..., 2:6] + change[..., 2:6], heading.flip(-1), anchor[..., 8:] + change[..., 8:]], -1
    )


@dataclass(frozen=True)
class Output:
    """What the detector says about a batch."""

    logits: list[Tensor]  # of each decoder layer: (B, A, classes)
    anchors: list[Tensor]  # of each decoder layer: (B, A, 11)
    heatmap: Tensor  # (B * N, classes, H / 4, W / 4) logits of box centres in the images
    lift: Tensor  # (B * N, 3, H / 4, W / 4) at a centre: x, y in cells from the cell's corner; log of distance / 10 m


class Detector(nn.Module):
    """Images of all cameras and their projection matrices in, boxes and image heatmaps out."""

    STRIDE = 4
    """Image pixels to a cell of the heatmap."""

    first_size: Tensor

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(4, config)
        self.centres = ConvBlock(config.embed_dims, 48)
        self.heatmap = nn.Conv2d(48, config.num_classes, 1)
        self.lift = nn.Conv2d(48, 3, 1)
        nn.init.constant_(self.heatmap.bias, math.log(PRIOR / (1 - PRIOR)))  # type: ignore[arg-type] - a convolution with a bias
        self.content = nn.Sequential(nn.Linear(config.embed_dims, config.embed_dims), nn.LayerNorm(config.embed_dims))
        self.encoder = AnchorEncoder(config.embed_dims)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.register_buffer("first_size", torch.tensor(FIRST_SIZE).log(), persistent=False)

    def forward(self, images: Tensor, projection: Tensor) -> Output:
        """Detect.

        Args:
            images: (B, N, 3, H, W) uint8, H and W multiples of 16.
            projection: (B, N, 4, 4) float32, see `Sample`.
        """
        batch, cameras, _, height, width = images.shape
        u = torch.arange(width, device=images.device) + 0.5
        v = torch.arange(height, device=images.device)[:, None] + 0.5
        rays = Rays.of(projection)
        ground = log_ground_distance(rays, u, v)
        pixels = torch.cat([(images / 255 - 0.45) / 0.25, ground[:, :, None]], 2).flatten(0, 1)
        maps = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        centres = self.centres(maps[0])
        heatmap = self.heatmap(centres).float()
        lift = self._on_the_ground(self.lift(centres).float(), rays)

        by_camera = [m.unflatten(0, (batch, cameras)) for m in (heatmap, lift, *maps)]
        anchor, cell = self._lifted(by_camera[0].detach(), by_camera[1].detach(), rays)
        finest = by_camera[2].movedim(2, -1).flatten(1, 3)  # (B, N * h * w, C)
        feature = self.content(finest.gather(1, cell[..., None].expand(-1, -1, finest.shape[-1])))
        triple = saccade.feature_maps_format(by_camera[2:])
        size = torch.cat([projection.new_full((batch, cameras, 1), length) for length in (width, height)], -1)
        metas = {"projection_mat": projection, "image_wh": size}
        output = Output([], [], heatmap, lift)
        for layer in self.layers:
            feature, anchor, logits = layer(feature, anchor, self.encoder(anchor), triple, metas)
            output.logits.append(logits)
            output.anchors.append(anchor)
        return output

    def _on_the_ground(self, lift: Tensor, rays: Rays) -> Tensor:
        """Turn the last channel of `lift` (B * N, 3, h, w) from rows of the image into a distance, as `Output` has it.

        What a convolution can read off an image is how many rows below its centre a box stands on the ground; how far
        away that is, the calibration tells. Where the ground is not flat, the network learns the row at which flat
        ground would be as far away.
        """
        offset = lift.unflatten(0, rays.origin.shape[:2])  # (B, N, 3, h, w)
        height, width = lift.shape[-2:]
        row = torch.arange(height, device=lift.device)[:, None] + FIRST_OFFSET + offset[:, :, 2]
        column = (torch.arange(width, device=lift.device) + 0.5).expand_as(row)
        distance = log_ground_distance(rays, column * self.STRIDE, row * self.STRIDE)
        return torch.cat([offset[:, :, :2], distance[:, :, None]], 2).flatten(0, 1)

    def _lifted(self, heatmap: Tensor, lift: Tensor, rays: Rays) -> tuple[Tensor, Tensor]:
        """Anchors (B, A, 11) where the heatmaps peak, as far away as `lift` says, and their cells (B, A) of N * h * w.

        Args:
            heatmap: (B, N, classes, h, w).
            lift: (B, N, 3, h, w).
            rays: Of the cameras (B, N).
        """
        peak = heatmap.amax(2)  # (B, N, h, w)
        peak = torch.where(peak == F.max_pool2d(peak, 3, 1, 1), peak, -torch.inf)
        height, width = peak.shape[-2:]
        cell = peak.flatten(1).topk(self.config.num_anchors).indices
        camera, row, column = cell // (height * width), cell // width % height, cell % width
        place = lift.movedim(2, -1).flatten(1, 3).gather(1, cell[..., None].expand(-1, -1, 3))
        rays = rays.of_cameras(camera)
        distance = 10 * place[..., 2:].clamp(-3, 2).exp()
        centre = rays.origin + distance * rays.direction(
            (column + place[..., 0]) * self.STRIDE, (row + place[..., 1]) * self.STRIDE
        )
        # They head away from the vehicle.
        size = self.first_size.expand_as(centre)
        return torch.cat([centre, size, *line_of_sight(centre), torch.zeros_like(centre)], -1), cell


def log_ground_distance(rays: Rays, u: Tensor, v: Tensor) -> Tensor:
    """How far away flat ground is at pixels, as logarithm of the distance / 10 m; far, but finite, above the horizon.

    Args:
        rays: Of the cameras (B, N).
        u, v: Pixel coordinates that broadcast to (B, N, H, W).

    Returns:
        (B, N, H, W).
    """
    rays = rays.of_pixels()
    fall = -rays.direction(u, v)[..., 2]
    # Softplus: the gradient must know the way back below the horizon.
    fall = HORIZON_FALL * F.softplus(fall / HORIZON_FALL)
    return torch.log((rays.origin[..., 2] - GROUND_Z).clamp(min=0.1) / fall.clamp(min=1e-3) / 10)

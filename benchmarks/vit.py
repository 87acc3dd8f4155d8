"""A vision transformer for 8x8 images in two sizes, its pre-training, and its adapters."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlora_kernels as mk
import mtlora_kernels.nn

from .digits import TASKS, Digits

PATCH, CLASSES = 2, 10
PATCHES = (8 // PATCH) ** 2
RANK, EXPERTS, GROUPS = 8, 15, 2
PRETRAIN_STEPS, PRETRAIN_WARMUP, PRETRAIN_BATCH = 60, 20, 128  # about 90 % on upright digits, in seconds
BALANCE_COEF = 0.01  # of all adapters together, as published


@dataclass(frozen=True)
class Size:
    """A model and the batch it is trained with."""

    name: str
    width: int
    depth: int
    heads: int
    images_per_task: int
    pretrain_lr: float
    lr: float


# Of 15 tasks, 960 tokens a step: the reference stays near 0.2 s on a CPU. A GPU only waits for the host here.
TINY = Size("tiny", 64, 2, 4, images_per_task=4, pretrain_lr=3e-3, lr=5e-3)
# The encoder of ViT-B, and 7680 tokens a step: an H100 is busy for 85 ms, longer than its host.
BASE = Size("base", 768, 12, 12, images_per_task=32, pretrain_lr=3e-4, lr=1e-3)
SIZES = {size.name: size for size in (TINY, BASE)}


class Block(nn.Module):
    """Pre-norm attention and MLP. Attention is written out: fused backward kernels may add in any order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.mT * (width // self.heads) ** -0.5).softmax(-1)
        x = x + self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm_2(x))


class DigitTransformer(nn.Module):
    """Images [n, 8, 8] to features [n, size.width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Linear(PATCH * PATCH, size.width)
        self.position = nn.Parameter(torch.randn(PATCHES, size.width) * 0.5)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, PATCHES, PATCH * PATCH)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


class MultiTask(nn.Module):
    """A frozen backbone with block adapters shared by all tasks, and one head per task."""

    def __init__(self, backbone: DigitTransformer, impl: str | None) -> None:
        super().__init__()
        self.backbone, width = backbone, backbone.size.width
        mk.nn.attach_block_adapters(
            backbone,
            r"blocks\.\d+",
            features=width,
            rank=RANK,
            num_experts=EXPERTS,
            freeze_base=True,
            num_groups=GROUPS,
            balance_coef=BALANCE_COEF / backbone.size.depth,
            impl=impl,
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, CLASSES) for name in TASKS})

    def forward(self, images: Tensor) -> Tensor:
        """[tasks, n, 8, 8] to class scores [tasks, n, CLASSES]."""
        features = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return torch.stack([head(f) for head, f in zip(self.heads.values(), features, strict=True)])


def pretrained_backbone(digits: Digits, device: torch.device, size: Size = TINY) -> DigitTransformer:
    """A backbone that has seen upright digits, as adapters are put on pre-trained models."""
    torch.manual_seed(0)
    backbone, head = DigitTransformer(size).to(device), nn.Linear(size.width, CLASSES).to(device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=size.pretrain_lr)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / PRETRAIN_WARMUP, total_iters=PRETRAIN_WARMUP)
    for _ in range(PRETRAIN_STEPS):
        chosen = torch.randint(len(digits.train_labels), (PRETRAIN_BATCH,))
        images, labels = digits.train_images[chosen].to(device), digits.train_labels[chosen].to(device)
        loss = F.cross_entropy(head(backbone(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warmup.step()
    return backbone

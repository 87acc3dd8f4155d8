"""A small vision transformer for 8x8 images, its pre-training, and its adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlora_kernels as mk
import mtlora_kernels.nn

from .digits import TASKS, Digits

WIDTH, DEPTH, HEADS, PATCH, CLASSES = 64, 2, 4, 2, 10
PATCHES = (8 // PATCH) ** 2
RANK, EXPERTS, GROUPS = 8, 15, 2
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 60, 128, 3e-3  # about 90 % on upright digits, in two seconds
BALANCE_COEF = 0.01  # of all adapters together, as published


class Block(nn.Module):
    """Pre-norm attention and MLP. Attention is written out: fused backward kernels may add in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.mT * (width // HEADS) ** -0.5).softmax(-1)
        x = x + self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm_2(x))


class DigitTransformer(nn.Module):
    """Images [n, 8, 8] to features [n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

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
        self.backbone = backbone
        mk.nn.attach_block_adapters(
            backbone,
            r"blocks\.\d+",
            features=WIDTH,
            rank=RANK,
            num_experts=EXPERTS,
            freeze_base=True,
            num_groups=GROUPS,
            balance_coef=BALANCE_COEF / DEPTH,
            impl=impl,
        )
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in TASKS})

    def forward(self, images: Tensor) -> Tensor:
        """[tasks, n, 8, 8] to class scores [tasks, n, CLASSES]."""
        features = self.backbone(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return torch.stack([head(f) for head, f in zip(self.heads.values(), features, strict=True)])


def pretrained_backbone(digits: Digits, device: torch.device) -> DigitTransformer:
    """A backbone that has seen upright digits, as adapters are put on pre-trained models."""
    torch.manual_seed(0)
    backbone, head = DigitTransformer().to(device), nn.Linear(WIDTH, CLASSES).to(device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=PRETRAIN_LR)
    for _ in range(PRETRAIN_STEPS):
        chosen = torch.randint(len(digits.train_labels), (PRETRAIN_BATCH,))
        images, labels = digits.train_images[chosen].to(device), digits.train_labels[chosen].to(device)
        loss = F.cross_entropy(head(backbone(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone

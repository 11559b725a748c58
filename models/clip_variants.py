"""The nine published sizes of CLIP (Radford et al. 2021, arXiv 2103.00020, tables 19 and 20)."""

from typing import Literal

Name = Literal["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]

Size = int | tuple[int, int, int, int]


def _resnet(
    layers: tuple[int, int, int, int], width: int, heads: int, image: int, embed: int, text: int
) -> dict[str, Size]:
    vision: dict[str, Size] = {"vision_layers": layers, "vision_width": width, "vision_heads": heads}
    return vision | _rest(image, embed, text)


def _transformer(layers: int, width: int, patch: int, image: int, embed: int, text: int) -> dict[str, Size]:
    vision: dict[str, Size] = {"vision_layers": layers, "vision_width": width, "vision_heads": width // 64}
    return vision | {"patch_size": patch} | _rest(image, embed, text)


def _rest(image: int, embed: int, text: int) -> dict[str, Size]:
    tower: dict[str, Size] = {"text_width": text, "text_layers": 12, "text_heads": text // 64}
    return tower | {"image_size": image, "embed_dim": embed}


VARIANTS: dict[str, dict[str, Size]] = {
    "RN50": _resnet((3, 4, 6, 3), 64, heads=32, image=224, embed=1024, text=512),
    "RN101": _resnet((3, 4, 23, 3), 64, heads=32, image=224, embed=512, text=512),
    "RN50x4": _resnet((4, 6, 10, 6), 80, heads=40, image=288, embed=640, text=640),
    "RN50x16": _resnet((6, 8, 18, 8), 96, heads=48, image=384, embed=768, text=768),
    "RN50x64": _resnet((3, 15, 36, 10), 128, heads=64, image=448, embed=1024, text=1024),
    "ViT-B/32": _transformer(12, 768, patch=32, image=224, embed=512, text=512),
    "ViT-B/16": _transformer(12, 768, patch=16, image=224, embed=512, text=512),
    "ViT-L/14": _transformer(24, 1024, patch=14, image=224, embed=768, text=768),
    "ViT-L/14@336px": _transformer(24, 1024, patch=14, image=336, embed=768, text=768),
}
"""By name the arguments of `gpipe.models.clip.clip`; all of them have the activation ``quick_gelu``."""

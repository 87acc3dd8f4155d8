"""mtLoRA as a PEFT method, `MTLORA` (peft >= 0.18, transformers >= 4.57).

PEFT finds no methods by itself: import this package before `PeftModel.from_pretrained`.
"""

from .config import MtLoraConfig
from .convert import config_from_official, from_official, to_official
from .layer import MtLoraLayer
from .model import MtLoraModel
from .register import register

__all__ = [
    "MtLoraConfig", "MtLoraLayer", "MtLoraModel", "config_from_official", "from_official", "to_official",
]  # fmt: skip

register()

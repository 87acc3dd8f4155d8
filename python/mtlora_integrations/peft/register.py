"""Make PEFT know the method `MTLORA`; importing the package calls this once."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import NAME, MtLoraConfig
from .model import MtLoraModel


def register() -> None:
    """Add the method to PEFT's tables. Does nothing where they have it, from here or from PEFT itself."""
    if NAME not in PeftType.__members__:
        _add_member(NAME)
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=MtLoraConfig, model_cls=MtLoraModel, prefix=MtLoraModel.prefix
        )


def _add_member(name: str) -> None:
    """A member of the closed enum: `register_peft_method` takes members only, and up to 0.20 so does saving."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)

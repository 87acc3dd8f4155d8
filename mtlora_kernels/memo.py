"""What was decided once for every call of a kind."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")
MOST = 4096  # every number of tokens is a kind of its own: they are small, but not forever


class Memo(dict[Hashable, Value], Generic[Value]):
    """Values by key, forgotten all at once when there are too many."""

    def keep(self, key: Hashable, value: Value) -> Value:
        if len(self) >= MOST:
            self.clear()
        self[key] = value
        return value

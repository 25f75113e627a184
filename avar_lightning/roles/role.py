"""The roles of tokens."""

from enum import IntEnum


class Role(IntEnum):
    """The role of a token; the values of `role_ids`."""

    OTHER = 0
    SYSTEM = 1
    USER = 2
    IMAGE = 3
    RESPONSE = 4

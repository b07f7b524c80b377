"""Keys of the store: one deployment's share of a Redis, by its prefix.

All keys of one user share a hash tag and so a slot of a Cluster; ids of any length and spelling are safe in it.
"""

import hashlib
from base64 import urlsafe_b64encode
from functools import lru_cache

DAY_S = 86_400


class KeySpace:
    """The names of a deployment's keys. Several deployments share a server by different prefixes."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.words = f"{prefix}:words"
        self.item_changes = f"{prefix}:changes"

    def control(self, experiment: str) -> str:
        """What should serve; its audit trail has a key beside it."""
        return f"{self.prefix}:control:{{{experiment}}}"

    def profile(self, user: str) -> str:
        """The user's features."""
        return f"{self.prefix}:{{{_user_tag(user)}}}:p"

    def behaviours(self, user: str) -> str:
        """The user's past clicks."""
        return f"{self.prefix}:{{{_user_tag(user)}}}:b"

    def event_tags(self, owner: str, day: int) -> str:
        """The tags of one day's events, of a user or of an anonymous request. Days count from 1970, in UTC."""
        return f"{self.prefix}:{{{_user_tag(owner)}}}:e{day}"

    def item(self, item: str) -> str:
        """The item's features."""
        return f"{self.prefix}:i:{item}"


def day_of(ts: float) -> int:
    return int(ts // DAY_S)


@lru_cache(maxsize=4096)  # asked for several times of each event
def _user_tag(user: str) -> str:
    """96 bits: of a billion users no two share a tag, but for a chance of 1e-11."""
    return urlsafe_b64encode(hashlib.blake2b(user.encode(), digest_size=12).digest()).decode()

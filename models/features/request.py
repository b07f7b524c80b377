"""One raw request, as golden rows and the offline encoder have it."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.features.history import Event
from models.features.values import Columns, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, raw: a user in a context at a time, the user's past, and the candidates.

    The user's and the candidates' own ids stand in `user` and `items` under the schema's `user_key` and `item_key`.
    """

    user: Row
    context: Row
    ts: float
    behaviours: Sequence[Event]
    items: Columns
    num_items: int

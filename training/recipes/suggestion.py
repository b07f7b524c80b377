"""A model to begin with on a prepared data set: the first of a few that fits its fields."""

from collections.abc import Sequence

from models import zoo
from models.features.field import Field, Group
from models.features.schema import Schema
from training import recipes
from training.config import override
from training.errors import UserError

MODULES: dict[Group, str] = {"user": "iuim", "context": "icim"}  # of MIAN, and whose fields each attends to


def suggested(schema: Schema, dataset: str) -> tuple[str, tuple[str, ...]]:
    """The model and the settings, as `key=value`, that leave out what the schema has no fields for."""
    without = tuple(f"model.{module}=false" for group, module in MODULES.items() if not schema.group(group))
    candidates: list[tuple[str, tuple[str, ...]]] = [("stec", ()), ("deepfm", ()), ("lr", ())]
    if schema.history_length:
        candidates = [("mian", without), ("din", ()), *candidates]
    # What fits does not depend on how many values a field has, and tables of a million rows would take their memory.
    small = schema.model_copy(update={"fields": tuple(_of_few_values(field) for field in schema.fields)})
    return next((model, settings) for model, settings in candidates if _fits(model, settings, small, dataset))


def _of_few_values(field: Field) -> Field:
    return field if field.vocabulary is None else field.model_copy(update={"vocabulary": field.vocabulary[:1]})


def _fits(model: str, settings: Sequence[str], schema: Schema, dataset: str) -> bool:
    try:
        run = override(recipes.recipe(recipes.choose(model, dataset).name, model), settings)
        zoo.build(run.model, run.model_config, schema)
    except (ValueError, UserError):
        return False
    return True

"""What every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


def _all_or_list(value: Any) -> Any:
    if value == "all" or (isinstance(value, list | tuple) and value and all(type(n) is int and n >= 0 for n in value)):
        return value
    raise ValueError(f"{value!r} should be all, or a list of layers such as [0, 2]")


Layers = Annotated[
    Literal["all"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)],
    BeforeValidator(_all_or_list),
]


class Settings(BaseModel):
    """Base of every section: unknown keys fail, values never change, docstrings become the schema's descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        # YAML reads yes, no, on and off as truth values, which Python would count as 1 and 0.
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            boolean = field.annotation is bool or bool in get_args(field.annotation)
            if isinstance(value := values.get(name), bool) and not boolean:
                raise ValueError(f"{name} = {str(value).lower()} is a truth value, which has no meaning here")
        return values

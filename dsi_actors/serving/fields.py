"""Of what requests are made: objects in which nothing is ignored silently, and fields that are known but mean nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator


class Strict(BaseModel):
    """An object in a request. A field that it does not have is an error, unless the service allows such fields (the context of
    validation). null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        present = {name: value for name, value in given.items() if value is not None}
        if cls._is_of_another_type(present):
            return present  # the error names `type`, not the first field of an object that is not supported
        if not (info.context or {}).get("allow_unknown_fields"):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = next((name for name in present if name not in known), None)
            if unknown is not None:
                raise ValueError(f"there is no field {unknown!r} here: leave it out (docs/serving.md lists the fields)")
        return present

    @classmethod
    def _is_of_another_type(cls, given: dict[str, Any]) -> bool:
        """Return whether the value of `type` is not supported here, as that of an image is not."""
        declared = cls.model_fields.get("type")
        if declared is None or get_origin(declared.annotation) is not Literal:
            return False
        return given.get("type", declared.default) not in get_args(declared.annotation)


class Tagged(Strict):
    """An object whose `type` says which of the class's fields it has: those in `NEEDED`, and those in `OPTIONAL`. Fields that the
    class has beside these may stand in an object of each type."""

    #: By type.
    NEEDED: ClassVar[Mapping[str, tuple[str, ...]]]
    OPTIONAL: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @model_validator(mode="after")
    def _has_the_fields_of_its_type(self, info: ValidationInfo) -> Self:
        kind: str = self.type  # type: ignore[attr-defined]
        for name in self.NEEDED[kind]:
            if name not in self.model_fields_set:
                raise ValueError(f"{name} is missing")
        own = {*self.NEEDED[kind], *self.OPTIONAL.get(kind, ())}
        of_others = {name for lists in (self.NEEDED, self.OPTIONAL) for names in lists.values() for name in names} - own
        foreign = next((name for name in sorted(self.model_fields_set) if name in of_others), None)
        if foreign is not None and not (info.context or {}).get("allow_unknown_fields"):
            raise ValueError(f"there is no field {foreign!r} in an object of the type {kind}: leave it out")
        return self


class _Mark:
    """Says in a field's metadata how its value is treated."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def _refuse(given: Any) -> Any:
    if given:
        raise ValueError("is not supported: leave it out")
    return None


#: A field that clients may know. It is refused unless its value says nothing: null, false, 0, empty.
Refused: TypeAlias = Annotated[Any, BeforeValidator(_refuse), _Mark("refused")]
#: A label for the client's own use, or for accounts. It is taken and changes nothing.
Label: TypeAlias = Annotated[Any, _Mark("label")]


def kinds_of(model: type[BaseModel]) -> dict[str, str]:
    """For each field: understood, label or refused."""
    return {
        name: next((mark.kind for mark in field.metadata if isinstance(mark, _Mark)), "understood")
        for name, field in model.model_fields.items()
    }
